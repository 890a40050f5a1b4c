"Batches of rows get the rewards that `Scorer` gives them, also in the workers of Ray."
import importlib.util
import json
import pickle

import pyarrow as pa
import pytest
import torch
from architectures import save_chat_reward_model
from programs import run

from rlhf_reward import Scorer
from rlhf_reward.data import to_responses
from rlhf_reward.many_machines import BatchScorer
from rlhf_reward.rule import Rule


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_reward_model(tmp_path_factory.mktemp("model"))


def message(role, content, **others):
    return {"role": role, "content": content, **others}


def text(number):
    return f" w{3 + number} w{4 + number}"


FORMS = {
    "a response": [{"prompt": "w5", "response": text(row)} for row in range(9)],
    "equally many": [{"prompt": "w5", "responses": [text(row), text(row + 1)]} for row in range(9)],
    "any number": [{"prompt": "w5", "responses": [text(row)] * (1 + row % 3)} for row in range(9)],
    "pairs": [{"prompt": "w5", "chosen": text(row), "rejected": text(row + 9), "tools": None} for row in range(9)],
    "conversations": [
        {"text": [message("user", text(row), name="Ada"), message("assistant", "w6")][row % 2:]} for row in range(9)
    ],
    "messages": [
        {
            "prompt": [message("user", text(row))] * (1 + row % 2),
            "responses": [[message("assistant", text(row))], [message("assistant", text(row + 1))]],
        }
        for row in range(9)
    ],
}


def as_numpy(table):
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


def rewards_of(rows, scorer):
    return scorer.score_comparisons([to_responses(row) for row in rows])


def test_batches_of_any_form(folder):
    score = BatchScorer(folder, device="cpu")
    for form, rows in FORMS.items():
        table = pa.Table.from_pylist(rows)
        expected = rewards_of(table.to_pylist(), score.scorer)
        for batch in (table, as_numpy(table), table.to_pandas()):
            scored = score(batch)
            added = ["reward"] if form in ("a response", "conversations") else ["rewards"]
            assert scored.column_names == [*table.column_names, *added]
            rewards = scored.column(added[0]).to_pylist()
            if added == ["reward"]:
                rewards = [[reward] for reward in rewards]
            torch.testing.assert_close(rewards, expected)
            assert scored.select(table.column_names).to_pylist() == table.to_pylist()


def test_options(folder):
    rows = [{"prompt": "w5", "response": " w6" * length} for length in (1, 100, 2)]
    table = pa.Table.from_pylist(rows)
    skipping = BatchScorer(folder, on_bad_row="skip", device="cpu", tokens_per_batch=50)
    assert len(pickle.dumps(skipping)) < 1000  # the name travels, not the weights
    for score in (skipping, pickle.loads(pickle.dumps(skipping))):
        scored = score(table)
        rewards = scored.column("reward").to_pylist()
        assert rewards[1] is None and scored.column("error")[1].as_py().startswith("Row 2 of the batch")
        torch.testing.assert_close([[rewards[0]], [rewards[2]]], rewards_of(rows[::2], score.scorer))
        assert score(table.slice(0, 1)).schema == scored.schema == score(table.slice(1, 1)).schema
        assert score.scorer.tokens_per_batch == 50
    opened = pickle.loads(pickle.dumps(BatchScorer(skipping.scorer)))
    torch.testing.assert_close(opened(table.slice(0, 1)).column("reward").to_pylist(), rewards[:1])
    with pytest.raises(ValueError, match="on_bad_row is 'none'; expected 'error' or 'skip'"):
        BatchScorer(folder, on_bad_row="none")
    with pytest.raises(ValueError, match="Row 1 of the batch has the column 'error'"):
        skipping(scored)
    with pytest.raises(ValueError, match="Row 2 of the batch: .* has 102 tokens"):
        BatchScorer(skipping.scorer)(table)
    with pytest.raises(ValueError, match="does not know the mean"):
        BatchScorer(skipping.scorer, normalize=True)(table.slice(0, 1))
    by_length = BatchScorer(Rule(lambda prompt, response: len(response)))
    assert by_length(pa.table({"prompt": ["w3"], "response": [" w45"]}))["reward"].to_pylist() == [4]


ON_RAY = """
import json, os, sys
sys.executable = os.environ.get("COLD_PYTHON", sys.executable)  # the processes of Ray import for themselves
import ray
from rlhf_reward.many_machines import BatchScorer

folder, rows = sys.argv[1], json.loads(sys.argv[2])
ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
scored = ray.data.from_items(rows, override_num_blocks=2).map_batches(
    BatchScorer,
    fn_constructor_kwargs={"model": folder, "device": "cpu", "on_bad_row": "skip"},
    compute=ray.data.ActorPoolStrategy(size=1),
    batch_size=4,
    batch_format="pyarrow",
)
print(json.dumps(scored.take_all()))
ray.shutdown()
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_on_a_local_cluster_of_ray(folder, python):
    rows = [{"id": number, **row} for number, row in enumerate(FORMS["messages"])]
    printed = run(python, "-c", ON_RAY, folder, json.dumps(rows)).stdout
    scored = sorted(json.loads(printed.splitlines()[-1]), key=lambda row: row["id"])
    expected = rewards_of(rows, Scorer.from_pretrained(folder, device="cpu"))
    torch.testing.assert_close([row["rewards"] for row in scored], expected, rtol=1e-5, atol=1e-5)
    assert [row["error"] for row in scored] == [None] * 9
