"""
Train in several processes and write which rows each process sees in each step: OUT/STEP-RANK.

`note_rows.py BASE grouped|stream OUT [CHECKPOINT]`; the model of the end is saved in OUT/end.
"""
import json
import os
import sys
from pathlib import Path

import torch
from test_runs import make, ragged

from rlhf_reward import RewardModel

base, data, out, *checkpoint = sys.argv[1:]
rows = ragged(21)
if data == "stream":
    rows = rows.to_iterable_dataset()
    options = {"save_steps": 2}
else:
    options = {"save_steps": 4, "train_sampling_strategy": "group_by_length"}
trainer = make(
    base,
    out,
    rows,
    model=RewardModel(base, 0.3, "cpu"),
    per_device_train_batch_size=4,
    max_steps=6,
    save_strategy="steps",
    **options,
)
compute_loss = trainer.compute_loss


def noted(model, inputs, **more):
    first_ranks = inputs["ranks"][:, 0].tolist()
    seen = [row for row, rank in zip(inputs["rows"].tolist(), first_ranks) if rank]
    Path(out, f"{trainer.state.global_step}-{os.environ['RANK']}").write_text(json.dumps(seen))
    return compute_loss(model, inputs, **more)


trainer.compute_loss = noted
trainer.train(resume_from_checkpoint=checkpoint[0] if checkpoint else None)
trainer.save_model(str(Path(out, "end")))
torch.distributed.destroy_process_group()
