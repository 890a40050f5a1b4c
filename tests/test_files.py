"Files that are scored: every form of row, bad rows, and what is left of runs that were stopped."
import gzip
import json
import math
import random
from pathlib import Path

import pandas as pd
import pytest
from architectures import save_language_model, word_tokenizer
from programs import run

from rlhf_reward import RewardModel, files
from rlhf_reward.cli import main
from rlhf_reward.data import to_responses
from rlhf_reward.files import _run, score_file
from rlhf_reward.scoring import Scorer



def text(length, seed):
    return " " + " ".join(random.Random(seed).choices([f"w{place}" for place in range(3, 64)], k=length))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    RewardModel(save_language_model("llama", folder / "base"), 0.0, "cpu").save_pretrained(folder / "reward", tokenizer)
    return str(folder / "reward")


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer.from_pretrained(model, device="cpu")


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(files, "ROWS_AT_ONCE", 20)


def pairs(count):
    return [{"prompt": text(4, row // 2), "response": text(1 + row % 7, 1000 + row), "id": row} for row in range(count)]


ASKED, SAID = [{"role": "user", "content": "w5"}], [{"role": "assistant", "content": "w6"}]
FORMS = [ # a row, and the prompt and responses that it means
    ({"prompt": "w3", "response": " w4", "note": None}, "w3", [" w4"]),
    ({"prompt": "w3", "chosen": " w4", "rejected": " w5"}, "w3", [" w4", " w5"]),
    ({"prompt": "w3", "chosen": " w4", "rejected": " w4", "score_chosen": 1.0, "score_rejected": 1.0}, "w3", [" w4", " w4"]), # nothing to train on, but to score
    ({"prompt": "w3", "responses": [" w4", " w5", " w6"], "scores": [1, 1, 1]}, "w3", [" w4", " w5", " w6"]),
    ({"prompt": "w3", "responses": [" w4", " w5"]}, "w3", [" w4", " w5"]),
    ({"prompt": "w3", "responses": [" w4"]}, "w3", [" w4"]),
    ({"prompt": "w3", "response_a": " w4", "response_b": " w5", "winner": "b"}, "w3", [" w4", " w5"]),
    ({"prompt": ASKED, "response": SAID}, ASKED, [SAID]),
    ({"prompt": ASKED, "response": "w6"}, ASKED, [SAID]),
    ({"text": ASKED + SAID}, ASKED, [SAID]),
    ({"response": ASKED + SAID}, ASKED, [SAID]), # a conversation says itself where its prompt ends
    ({"text": "w3 w4"}, "w3", [" w4"]),
    ({"texts": ["w3 w4", "w3 w5"]}, "w3", [" w4", " w5"]),
    ({"prompt": "w3", "response_a": " w4", "response_b": " w5", "winner": "?"}, "w3", [" w4", " w5"]), # whatever people said
    ({"prompt": "w3", "responses": [" w4"], "scores": [1]}, "w3", [" w4"]),
    ({"chosen_ids": [3, 4, 2], "rejected_ids": [3, 5, 2]}, "w3", [" w4", " w5"]),
]


def test_every_form_of_row(scorer, tmp_path):
    data = write(tmp_path / "rows.jsonl", [row for row, *_ in FORMS])
    counts = score_file(scorer, data, str(tmp_path / "out.jsonl"))
    assert counts == {"rows": 16, "responses": 25, "without_reward": 0, "before": 0}
    for (row, prompt, responses), line in zip(FORMS, read(tmp_path / "out.jsonl"), strict=True):
        expected = scorer.score([prompt] * len(responses), responses)
        given = [line.pop("reward")] if {"response", "text"} & row.keys() else line.pop("rewards")
        assert line == row # as it stood
        assert given == pytest.approx(expected, abs=1e-5)


def test_other_kinds_of_files_and_names_of_columns(scorer, tmp_path):
    rows = [{"instruction": text(3, row), "output": text(4, 50 + row)} for row in range(5)]
    expected = scorer.score([row["instruction"] for row in rows], [row["output"] for row in rows])
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    for name in ("rows.csv", "rows.parquet", "rows.jsonl.gz"):
        score_file(scorer, str(tmp_path / name), str(tmp_path / f"{name}.jsonl"), columns={"prompt": "instruction", "response": "output"})
        assert [line["reward"] for line in read(tmp_path / f"{name}.jsonl")] == pytest.approx(expected, abs=1e-5)


def test_rows_that_cannot_be_scored(scorer, tmp_path):
    rows = [*pairs(2), {"prompt": "w3", "response": 7}, {"prompt": "w3"}, {"prompt": text(50, 0), "response": text(50, 1)}, *pairs(1)]
    data = write(tmp_path / "rows.jsonl", rows)
    Path(data).write_text(Path(data).read_text() + "{not json\n")
    with pytest.raises(ValueError, match="line 7 is not JSON"):
        score_file(scorer, data, str(tmp_path / "out.jsonl"))
    Path(data).write_text(Path(data).read_text().replace("{not json\n", ""))
    with pytest.raises(ValueError, match=r"Row 3 of .*rows.jsonl cannot be used: 7 stands where a text is expected.*on_bad_row='skip'"):
        score_file(scorer, data, str(tmp_path / "out.jsonl"))
    counts = score_file(scorer, data, str(tmp_path / "out.jsonl"), on_bad_row="skip")
    lines = read(tmp_path / "out.jsonl")
    assert counts == {"rows": 6, "responses": 3, "without_reward": 3, "before": 0} and len(lines) == 6
    assert [line["reward"] is None for line in lines] == [False, False, True, True, True, False]
    assert "7 stands where" in lines[2]["error"] and "expected one of: prompt with response" in lines[3]["error"] and "it has 101 tokens; expected at most 64" in lines[4]["error"]
    assert [{name: value for name, value in line.items() if name not in ("reward", "error")} for line in lines] == rows
    write(tmp_path / "long.jsonl", rows[4:5])
    with pytest.raises(ValueError, match="Row 1 of .*long.jsonl: The response .* it has 101 tokens"):
        score_file(scorer, str(tmp_path / "long.jsonl"), str(tmp_path / "long_out.jsonl"))
    cutting = Scorer(scorer.model, scorer.tokenizer, on_overlong="truncate_prompt")
    assert score_file(cutting, str(tmp_path / "long.jsonl"), str(tmp_path / "long_out.jsonl"))["without_reward"] == 0


@pytest.mark.parametrize("row, expected", [
    ({"instruction": "w3", "response": "w4"}, "it has response, but no prompt; expected both, or whole texts in the column text"),
    ({"prompt": "w3", "text": "w3 w4"}, "a prompt beside whole texts"), ({"prompt": "w3", "response": "w4", "responses": ["w5"]}, "expected one of: prompt with response"),
    ({"prompt": ASKED, "response": "w4", "chat_template_kwargs": {"chat_template": "{{ 7 }}"}}, "'chat_template', which is no variable of a chat template")])
def test_rows_that_would_be_misread(row, expected, scorer, tmp_path):
    with pytest.raises(ValueError, match=expected):
        score_file(scorer, write(tmp_path / "rows.jsonl", [row]), str(tmp_path / "out.jsonl"))


@pytest.mark.parametrize("columns", [{"prompt": "instructoin"}, {"response": "nope"}])
def test_columns_that_are_not_there(columns, scorer, tmp_path):
    with pytest.raises(ValueError, match="it has no column"):
        score_file(scorer, write(tmp_path / "rows.jsonl", pairs(3)), str(tmp_path / "out.jsonl"), columns=columns)


def test_one_run_at_a_time(scorer, tmp_path):
    from filelock import FileLock
    data = write(tmp_path / "rows.jsonl", pairs(3))
    with FileLock(tmp_path / "out.jsonl.part.lock"):
        with pytest.raises(FileExistsError, match="is being written by another run"):
            score_file(scorer, data, str(tmp_path / "out.jsonl"))
    score_file(scorer, data, str(tmp_path / "out.jsonl"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_a_bad_line_can_be_skipped(scorer, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w3", "response": " w4"}\n{not json\n')
    assert score_file(scorer, str(tmp_path / "rows.jsonl"), str(tmp_path / "out.jsonl"), on_bad_row="skip")["without_reward"] == 1
    assert "line 2 is not JSON" in read(tmp_path / "out.jsonl")[1]["error"]


@pytest.mark.parametrize("column", ["reward", "rewards", "error"])
def test_columns_that_would_be_written_over(column, scorer, tmp_path):
    data = write(tmp_path / "rows.jsonl", [{**pairs(1)[0], column: 1}])
    with pytest.raises(ValueError, match=f"Row 1 of .* has the column '{column}'"):
        score_file(scorer, data, str(tmp_path / "out.jsonl"))


def test_normalized(scorer, tmp_path):
    data = write(tmp_path / "rows.jsonl", pairs(3))
    with pytest.raises(ValueError, match="does not know the mean"):
        score_file(scorer, data, str(tmp_path / "no.jsonl"), normalize=True)
    score_file(scorer, data, str(tmp_path / "raw.jsonl"))
    scorer.model.config.rlhf_reward = {**scorer.model.config.rlhf_reward, "reward_mean": 0.5, "reward_std": 2.0}
    try:
        score_file(scorer, data, str(tmp_path / "normal.jsonl"), normalize=True)
    finally:
        del scorer.model.config.rlhf_reward["reward_mean"]
    raw, normal = ([line["reward"] for line in read(tmp_path / name)] for name in ("raw.jsonl", "normal.jsonl"))
    assert normal == pytest.approx([(reward - 0.5) / 2 for reward in raw], abs=1e-6)


# ----- runs that were stopped

def left_behind(output, lines, scorer):
    "What a run leaves that was stopped when it had written so much."
    Path(f"{output}.part").write_bytes(lines)
    Path(f"{output}.part.json").write_text(json.dumps(_run(scorer, normalize=False)))


def test_a_run_goes_on_wherever_it_was_stopped(scorer, tmp_path, small_chunks):
    data = write(tmp_path / "rows.jsonl", pairs(57))
    score_file(scorer, data, str(tmp_path / "whole.jsonl"))
    whole, draw = (tmp_path / "whole.jsonl").read_bytes(), random.Random(0)
    lines = whole.splitlines(keepends=True)
    at_lines = [len(b"".join(lines[:count])) for count in (0, 1, 19, 20, 21, 40, 57)]
    for number, end in enumerate([*at_lines, *(draw.randrange(len(whole)) for _ in range(12))]):
        output = tmp_path / f"again-{number}.jsonl"
        left_behind(output, whole[:end], scorer)
        counts = score_file(scorer, data, str(output))
        assert output.read_bytes() == whole and not list(tmp_path.glob("*.part*"))
        assert counts["rows"] == 57 and counts["before"] == whole[:end].count(b"\n") // 20 * 20
        assert counts["responses"] == 57 - counts["before"]


def test_no_two_runs_are_mixed(scorer, model, tmp_path, small_chunks):
    data = write(tmp_path / "rows.jsonl", pairs(57))
    score_file(scorer, data, str(tmp_path / "whole.jsonl"))
    with pytest.raises(FileExistsError, match="is there already, and whole"):
        score_file(scorer, data, str(tmp_path / "whole.jsonl"))
    part = tmp_path / "out.jsonl.part"
    begun = b"".join((tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)[:45])
    other = Scorer(RewardModel(model, 0.0, "cpu"), scorer.tokenizer) # another head
    changed = pairs(57)
    changed[30]["response"] = " w9"
    longer = Scorer(scorer.model, scorer.tokenizer, max_length=24)
    for using, rows, expected in ((other, pairs(57), "begun with weights "), (longer, pairs(57), "begun with max_length 64, now 24"), (scorer, changed, "Line 31 of .* is not row 31 of the data"),
                                (scorer, pairs(30), "Line 31 of .* is not row 31 of the data")):
        left_behind(tmp_path / "out.jsonl", begun, scorer)
        with pytest.raises(ValueError, match=expected):
            score_file(using, write(tmp_path / "other.jsonl", rows), str(tmp_path / "out.jsonl"))
        assert begun.startswith(part.read_bytes()) and len(part.read_bytes()) > 0 # what was done is still there
    lines = begun.splitlines()
    left_behind(tmp_path / "out.jsonl", b"\n".join([*lines[:21], lines[21].replace(b'"reward": ', b'"reward": 1'), *lines[22:], b""]), scorer)
    with pytest.raises(ValueError, match="where the model now gives"): # whatever else makes the numbers others
        score_file(scorer, data, str(tmp_path / "out.jsonl"))
    Path(f"{part}.json").unlink()
    with pytest.raises(ValueError, match="out.jsonl.part' is there, and no run of this library has left it"):
        score_file(scorer, data, str(tmp_path / "out.jsonl"))
    assert begun.startswith(part.read_bytes()[:400])
    left_behind(tmp_path / "out.jsonl", begun, scorer)
    score_file(scorer, data, str(tmp_path / "out.jsonl"), on_bad_row="skip") # which a run may go on with


@pytest.mark.parametrize("output", ["out/", "out.jsonl.gz", "out"])
def test_the_output_is_a_jsonl_file(output, scorer, tmp_path):
    with pytest.raises(ValueError, match="expected the name of a .jsonl file"):
        score_file(scorer, write(tmp_path / "rows.jsonl", pairs(3)), f"{tmp_path}/{output}")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_empty_response_is_one_response(scorer, tmp_path):
    score_file(scorer, write(tmp_path / "rows.jsonl", [{"prompt": "w3", "response": ""}, {"prompt": "w3", "responses": [""]}]), str(tmp_path / "out.jsonl"))
    one, several = read(tmp_path / "out.jsonl")
    assert "rewards" not in one and several["rewards"] == [pytest.approx(one["reward"], abs=1e-5)]


def test_a_reward_that_is_not_finite(scorer, tmp_path, monkeypatch):
    "Names its row, or is written as what is wrong; what JSON has no word for is null."
    forward, of_w9 = scorer._forward, scorer.tokenize([to_responses({"prompt": "w3", "response": " w9"})])[0][0]
    monkeypatch.setattr(scorer, "_forward", lambda batch: {ids: math.inf if list(ids) == of_w9 else reward for ids, reward in forward(batch).items()})
    data = write(tmp_path / "rows.jsonl", [{"prompt": "w3", "response": " w8", "scores": {"own": [math.nan, 1.0]}}, {"prompt": "w3", "response": " w9"}])
    with pytest.raises(ValueError, match="Row 2 of .*rows.jsonl: The reward of a sequence of .* is inf.*on_bad_row='skip'"):
        score_file(scorer, data, str(tmp_path / "out.jsonl"))
    Path(f"{tmp_path}/out.jsonl.part").unlink(missing_ok=True)
    assert score_file(scorer, data, str(tmp_path / "out.jsonl"), on_bad_row="skip")["without_reward"] == 1
    fine, bad = read(tmp_path / "out.jsonl")
    assert math.isfinite(fine["reward"]) and bad["reward"] is None and "Row 2 of" in bad["error"] and "inf" in bad["error"]
    with pytest.raises(ValueError, match="on_bad_row is 'drop'; expected 'error' or 'skip'"):
        score_file(scorer, data, str(tmp_path / "no.jsonl"), on_bad_row="drop")


def test_killed_twenty_times(model, tmp_path, python):
    data = write(tmp_path / "rows.jsonl", pairs(600))
    printed = run(python, Path(__file__).with_name("score_killed.py"), model, data, tmp_path, "0").stdout
    print(printed)
    assert "20 kills" in printed
    assert "whole lines" in printed or "a torn line" in printed


# ----- the command


def shared(python, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return run(python, *launcher, *arguments, timeout=200).stdout


def test_two_processes_write_the_file_of_one(model, tmp_path, python):
    rows = []
    for copy in range(60):  # more than one chunk
        rows += [{**row, "id": copy} for row, *_ in FORMS]
    data = write(tmp_path / "rows.jsonl", rows)
    arguments = [
        *("-m", "rlhf_reward", "score"),
        *("--model", model),
        *("--data", data),
        *("--device", "cpu"),
        *("--tokens_per_batch", "200"),
        "--output",
    ]
    one = tmp_path / "one.jsonl"
    two = tmp_path / "two.jsonl"
    assert "960 rows: " in run(python, *arguments, one).stdout
    begun = one.read_bytes().splitlines(keepends=True)[:510]  # to be resumed
    left_behind(two, b"".join(begun), Scorer.from_pretrained(model, device="cpu"))
    assert shared(python, *arguments, two).count("960 rows (500 were there before)") == 1
    assert two.read_bytes() == one.read_bytes()


def test_processes_share_the_work_also_where_one_has_less_memory(model, tmp_path, python):
    data = write(tmp_path / "rows.jsonl", pairs(1200))
    script = Path(__file__).with_name("score_shared.py")
    printed = {}
    for room in (10_000, 90):
        printed[room] = shared(python, script, model, data, tmp_path / f"{room}.jsonl", room)
    counts = [int(line.split(": ")[1].split()[0]) for line in printed[10_000].splitlines() if " of 2: " in line]
    assert len(counts) == 2 and min(counts) > 0.4 * max(counts), printed
    ample, scarce = (read(tmp_path / f"{room}.jsonl") for room in (10_000, 90))
    assert [line["id"] for line in scarce] == list(range(1200))
    assert [line["reward"] for line in scarce] == pytest.approx([line["reward"] for line in ample], abs=1e-5)


@pytest.mark.parametrize("change, expected", [
    ({"--model": "nowhere/at/all"}, "rlhf_reward score: .*nowhere/at/all.* is not there"),
    ({"--data": "no.jsonl"}, "rlhf_reward score: 'no.jsonl' is not there"),
    ({"--columns": "prompt"}, "--columns prompt is not a map"),
    ({"--max_length": "0"}, "max_length 0; expected 1 or more"),
])
def test_the_command_says_what_is_wrong(change, expected, model, tmp_path):
    data = write(tmp_path / "rows.jsonl", pairs(2))
    arguments = {"--model": model, "--data": data, "--output": str(tmp_path / "out.jsonl"), "--device": "cpu", **change}
    with pytest.raises(SystemExit) as exit:
        main(["score", *[part for pair in arguments.items() for part in pair]])
    import re
    assert re.search(expected, str(exit.value.code)), exit.value.code


def test_the_command_counts_rows_without_a_reward(model, tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", [*pairs(2), {"prompt": "w3", "response": None}])
    main(["score", "--model", model, "--data", data, "--output", str(tmp_path / "out.jsonl"), "--device", "cpu", "--on_bad_row", "skip"])
    assert "3 rows, 1 of them without a reward: " in capsys.readouterr().out
