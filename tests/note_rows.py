"""
Train in several processes and write which rows each process sees in each step: OUT/STEP-RANK.

With several heads, terms that draw dropout again or predict tokens, and the average of the weights as the model.

`note_rows.py BASE grouped|stream|mixture|streams OUT [CHECKPOINT]`; the model of the end is saved in OUT/end. A row of
a mixture is written with the name of its set.
"""
import json
import os
import sys
from pathlib import Path

import torch
from test_runs import make, ragged

from rlhf_reward import RewardModel
from rlhf_reward.mixtures import mix_rows
from rlhf_reward.targets import names_from_bytes

base, data, out, *checkpoint = sys.argv[1:]
rows = ragged(21)
if data in ("mixture", "streams"):
    sets = {"even": ragged(20), "odd": ragged(9)}
    if data == "streams":
        sets = {name: table.to_iterable_dataset() for name, table in sets.items()}
    rows = mix_rows(sets, {"even": 0.6, "odd": 0.4}, seed=3)
    rows = rows.shuffle(3, buffer_size=10) if data == "streams" else rows
    options = {"save_steps": 2}
elif data == "stream":
    rows = rows.to_iterable_dataset()
    options = {"save_steps": 2}
else:
    options = {"save_steps": 4, "train_sampling_strategy": "group_by_length"}
trainer = make(
    base,
    out,
    rows,
    model=RewardModel(base, 0.3, "cpu", heads=3),
    per_device_train_batch_size=4,
    max_steps=6,
    save_strategy="steps",
    ema_decay=0.8,
    lm_coefficient=0.1,
    rdrop_coefficient=0.5,
    **options,
)
compute_loss = trainer.compute_loss


def noted(model, inputs, **more):
    first_ranks = inputs["ranks"][:, 0].tolist()
    names = names_from_bytes(inputs["datasets"])
    numbers = inputs["rows"].tolist()
    named = [f"{number} of {name}" if name else number for number, name in zip(numbers, names)]
    seen = [row for row, rank in zip(named, first_ranks) if rank]
    Path(out, f"{trainer.state.global_step}-{os.environ['RANK']}").write_text(json.dumps(seen))
    return compute_loss(model, inputs, **more)


trainer.compute_loss = noted
trainer.train(resume_from_checkpoint=checkpoint[0] if checkpoint else None)
trainer.save_model(str(Path(out, "end")))
torch.distributed.destroy_process_group()
