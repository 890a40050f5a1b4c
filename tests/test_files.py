"Files that are scored: every form of row, bad rows, and what is left of runs that were interrupted."
import datetime
import gzip
import json
import math
import os
import random
import re
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pandas as pd
import pytest
import torch
from architectures import save_chat_reward_model
from datasets import Dataset
from filelock import FileLock
from programs import run

from rlhf_reward import RewardModel, files
from rlhf_reward.cli import main
from rlhf_reward.cli.arguments import shared_processes
from rlhf_reward.files import _run_options, score_file
from rlhf_reward.output_folder import check_writable
from rlhf_reward.rows import to_responses
from rlhf_reward.scoring import Scorer

WORDS = [f"w{index}" for index in range(3, 64)]


def text(length, seed):
    return " " + " ".join(random.Random(seed).choices(WORDS, k=length))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def rewards_of(path):
    return [line["reward"] for line in read(path)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_chat_reward_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer.from_pretrained(model, device="cpu")


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "out.jsonl")


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(files, "ROWS_AT_ONCE", 20)


def pairs(count):
    rows = []
    for number in range(count):
        rows.append({"prompt": text(4, number // 2), "response": text(1 + number % 7, 1000 + number), "id": number})
    return rows


QUESTION = [{"role": "user", "content": "w5"}]
ANSWER = [{"role": "assistant", "content": "w6"}]
EQUAL_PAIR = {"chosen": " w4", "rejected": " w4", "score_chosen": 1.0, "score_rejected": 1.0}
FORMS = [  # a row, and the prompt and responses that it means
    ({"prompt": "w3", "response": " w4", "note": None}, "w3", [" w4"]),
    ({"prompt": "w3", "chosen": " w4", "rejected": " w5"}, "w3", [" w4", " w5"]),
    ({"prompt": "w3", **EQUAL_PAIR}, "w3", [" w4", " w4"]),  # cannot be trained on, but scored
    ({"prompt": "w3", "responses": [" w4", " w5", " w6"], "scores": [1, 1, 1]}, "w3", [" w4", " w5", " w6"]),
    ({"prompt": "w3", "responses": [" w4", " w5"]}, "w3", [" w4", " w5"]),
    ({"prompt": "w3", "responses": [" w4"]}, "w3", [" w4"]),
    ({"prompt": "w3", "response_a": " w4", "response_b": " w5", "winner": "b"}, "w3", [" w4", " w5"]),
    ({"prompt": QUESTION, "response": ANSWER}, QUESTION, [ANSWER]),
    ({"prompt": QUESTION, "response": "w6"}, QUESTION, [ANSWER]),
    ({"text": QUESTION + ANSWER}, QUESTION, [ANSWER]),
    ({"response": QUESTION + ANSWER}, QUESTION, [ANSWER]),  # a conversation shows where its prompt ends
    ({"text": "w3 w4"}, "w3", [" w4"]),
    ({"texts": ["w3 w4", "w3 w5"]}, "w3", [" w4", " w5"]),
    ({"prompt": "w3", "completion": " w4", "label": 1}, "w3", [" w4"]), # no label is read
    ({"messages": QUESTION + ANSWER, "score": 3}, QUESTION, [ANSWER]),
    # whatever the label is
    ({"prompt": "w3", "response_a": " w4", "response_b": " w5", "winner": "?"}, "w3", [" w4", " w5"]),
    ({"prompt": "w3", "responses": [" w4"], "scores": [1]}, "w3", [" w4"]),
    ({"chosen_ids": [3, 4, 2], "rejected_ids": [3, 5, 2]}, "w3", [" w4", " w5"]),
]


def test_every_form_of_row(scorer, tmp_path, output):
    data = write(tmp_path / "rows.jsonl", [row for row, *_ in FORMS])
    counts = score_file(scorer, data, output)
    assert counts == {"rows": 18, "responses": 27, "without_reward": 0, "before": 0}
    for (row, prompt, responses), line in zip(FORMS, read(output), strict=True):
        expected = scorer.score([prompt] * len(responses), responses)
        is_single = {"response", "text", "completion", "messages"} & row.keys()
        rewards = [line.pop("reward")] if is_single else line.pop("rewards")
        assert line == row  # unchanged
        assert rewards == pytest.approx(expected, abs=1e-5)


def test_files_reach_the_disk(scorer, small_chunks, tmp_path, output, monkeypatch):
    "Each chunk of rewards does, and so does the file that shows whether a folder can be written to."
    sizes = []

    def note_size(descriptor):
        sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", note_size)
    score_file(scorer, write(tmp_path / "rows.jsonl", pairs(50)), output)
    lines = Path(output).read_bytes().splitlines(keepends=True)
    assert sizes == [len(b"".join(lines[:number])) for number in (20, 40, 50)]
    sizes.clear()
    check_writable(tmp_path / "folder")
    assert sizes == [4096]


def test_rows_of_known_sets_are_written_as_they_are(scorer, tmp_path):
    rated = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), 3)
    forms = [
        ("helpsteer_ratings", {"prompt": "w5", "response": "w6", **rated}, ["w6"]),
        ("swift", {"messages": QUESTION + ANSWER, "rejected_response": "w7", "id": 1}, ["w6", "w7"]),
        ("swift_messages", {"messages": QUESTION + ANSWER, "rejected_messages": [*QUESTION, *ANSWER]}, ["w6", "w6"]),
        ("nemo", {
            "context": QUESTION,
            "completions": [{"rank": 1, "completion": ANSWER}, {"rank": 0, "completion": ANSWER}],
        }, ["w6", "w6"]),
    ]
    for form, row, responses in forms:
        data = write(tmp_path / f"{form}.jsonl", [row, {**row, "note": "x"}])
        score_file(scorer, data, str(tmp_path / f"{form}_scored.jsonl"), form=form)
        first, second = read(tmp_path / f"{form}_scored.jsonl")
        rewards = [first.pop("reward")] if len(responses) == 1 else first.pop("rewards")
        assert first == row and second["note"] == "x"
        assert rewards == pytest.approx(scorer.score([QUESTION] * len(responses), responses), abs=1e-5)
    message = {"message_tree_id": "q", "message_id": "q", "role": "prompter", "text": "q", "parent_id": None, "rank": 0}
    parts = [("oasst_trees", {"message_tree_id": "q", "prompt": message}), ("oasst_messages", message)]
    for form, row in parts:
        data = write(tmp_path / f"{form}.jsonl", [row])
        with pytest.raises(ValueError, match="it is not one comparison in the form oasst_"):
            score_file(scorer, data, str(tmp_path / f"{form}_scored.jsonl"), form=form)
    with pytest.raises(ValueError, match="form is 'steer'; expected one of arena"):
        score_file(scorer, data, str(tmp_path / "none.jsonl"), form="steer")


def test_other_kinds_of_files_and_names_of_columns(scorer, tmp_path):
    rows = [{"instruction": text(3, number), "output": text(4, 50 + number)} for number in range(5)]
    expected = scorer.score([row["instruction"] for row in rows], [row["output"] for row in rows])
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    columns = {"prompt": "instruction", "response": "output"}
    for name in ("rows.csv", "rows.parquet", "rows.jsonl.gz"):
        scored = tmp_path / f"{name}.jsonl"
        score_file(scorer, str(tmp_path / name), str(scored), columns=columns)
        assert rewards_of(scored) == pytest.approx(expected, abs=1e-5)


def test_rows_that_cannot_be_scored(scorer, tmp_path, output):
    too_long = {"prompt": text(50, 0), "response": text(50, 1)}
    rows = [*pairs(2), {"prompt": "w3", "response": 7}, {"prompt": "w3"}, too_long, *pairs(1)]
    data = write(tmp_path / "rows.jsonl", rows)
    lines = Path(data).read_text()
    Path(data).write_text(lines + "{not json\n")
    with pytest.raises(ValueError, match="line 7 is not JSON"):
        score_file(scorer, data, output)
    Path(data).write_text(lines)
    expected = r"Row 3 of .*rows.jsonl cannot be used: found 7; expected a text.*on_bad_row='skip'"
    with pytest.raises(ValueError, match=expected):
        score_file(scorer, data, output)
    counts = score_file(scorer, data, output, on_bad_row="skip")
    written = read(output)
    assert counts == {"rows": 6, "responses": 3, "without_reward": 3, "before": 0} and len(written) == 6
    assert [line["reward"] is None for line in written] == [False, False, True, True, True, False]
    assert "found 7; expected a text" in written[2]["error"]
    assert "expected one of: prompt with response" in written[3]["error"]
    assert "it has 101 tokens; expected at most 64" in written[4]["error"]
    for line, row in zip(written, rows, strict=True):
        assert {name: value for name, value in line.items() if name not in ("reward", "error")} == row

    long_data = write(tmp_path / "long.jsonl", [too_long])
    long_output = str(tmp_path / "long_out.jsonl")
    with pytest.raises(ValueError, match="Row 1 of .*long.jsonl: The response .* it has 101 tokens"):
        score_file(scorer, long_data, long_output)
    cutting = Scorer(scorer.model, scorer.tokenizer, on_overlong="truncate_prompt")
    assert score_file(cutting, long_data, long_output)["without_reward"] == 0


WITH_TEMPLATE = {"prompt": QUESTION, "response": "w4", "chat_template_kwargs": {"chat_template": "{{ 7 }}"}}


@pytest.mark.parametrize("row, expected", [
    (
        {"instruction": "w3", "response": "w4"},
        "it has response, but no prompt; expected both, or whole texts in the column text",
    ),
    ({"prompt": "w3", "text": "w3 w4"}, "a prompt and whole texts"),
    ({"prompt": "w3", "response": "w4", "responses": ["w5"]}, "expected one of: prompt with response"),
    (WITH_TEMPLATE, "'chat_template', which is not a variable of a chat template"),
])
def test_rows_that_would_be_misread(row, expected, scorer, tmp_path, output):
    with pytest.raises(ValueError, match=expected):
        score_file(scorer, write(tmp_path / "rows.jsonl", [row]), output)


@pytest.mark.parametrize("columns", [{"prompt": "instructoin"}, {"response": "nope"}])
def test_columns_that_do_not_exist(columns, scorer, tmp_path, output):
    data = write(tmp_path / "rows.jsonl", pairs(3))
    with pytest.raises(ValueError, match="it has no column"):
        score_file(scorer, data, output, columns=columns)


def test_one_run_at_a_time(scorer, tmp_path, output):
    data = write(tmp_path / "rows.jsonl", pairs(3))
    with FileLock(f"{output}.part.lock"):
        with pytest.raises(FileExistsError, match="is being written by another run"):
            score_file(scorer, data, output)
    score_file(scorer, data, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_a_bad_line_can_be_skipped(scorer, tmp_path, output):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "w3", "response": " w4"}\n{not json\n')
    counts = score_file(scorer, str(data), output, on_bad_row="skip")
    assert counts["without_reward"] == 1
    assert "line 2 is not JSON" in read(output)[1]["error"]


@pytest.mark.parametrize("column", ["reward", "rewards", "error"])
def test_columns_that_would_be_overwritten(column, scorer, tmp_path, output):
    data = write(tmp_path / "rows.jsonl", [{**pairs(1)[0], column: 1}])
    with pytest.raises(ValueError, match=f"Row 1 of .* has the column '{column}'"):
        score_file(scorer, data, output)


def test_normalized(scorer, tmp_path):
    data = write(tmp_path / "rows.jsonl", pairs(3))
    with pytest.raises(ValueError, match="does not know the mean"):
        score_file(scorer, data, str(tmp_path / "no.jsonl"), normalize=True)
    score_file(scorer, data, str(tmp_path / "raw.jsonl"))
    config = scorer.model.config
    config.rlhf_reward = {**config.rlhf_reward, "reward_mean": 0.5, "reward_std": 2.0}
    try:
        score_file(scorer, data, str(tmp_path / "normal.jsonl"), normalize=True)
    finally:
        del config.rlhf_reward["reward_mean"]
    expected = [(reward - 0.5) / 2 for reward in rewards_of(tmp_path / "raw.jsonl")]
    assert rewards_of(tmp_path / "normal.jsonl") == pytest.approx(expected, abs=1e-6)


# ----- runs that were interrupted

def left_behind(output, lines, scorer):
    "Write the files of a run that was interrupted when it had written these lines."
    Path(f"{output}.part").write_bytes(lines)
    Path(f"{output}.part.json").write_text(json.dumps(_run_options(scorer, normalize=False)))


def test_a_run_resumes_wherever_it_was_interrupted(scorer, tmp_path, small_chunks):
    data = write(tmp_path / "rows.jsonl", pairs(57))
    score_file(scorer, data, str(tmp_path / "whole.jsonl"))
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    draw = random.Random(0)
    ends = [len(b"".join(lines[:count])) for count in (0, 1, 19, 20, 21, 40, 57)]
    ends += [draw.randrange(len(whole)) for _ in range(12)]
    for number, end in enumerate(ends):
        output = tmp_path / f"again-{number}.jsonl"
        left_behind(output, whole[:end], scorer)
        counts = score_file(scorer, data, str(output))
        assert output.read_bytes() == whole and not list(tmp_path.glob("*.part*"))
        assert counts["rows"] == 57 and counts["before"] == whole[:end].count(b"\n") // 20 * 20
        assert counts["responses"] == 57 - counts["before"]


def test_no_two_runs_are_mixed(scorer, model, tmp_path, output, small_chunks):
    data = write(tmp_path / "rows.jsonl", pairs(57))
    whole = tmp_path / "whole.jsonl"
    score_file(scorer, data, str(whole))
    with pytest.raises(FileExistsError, match="exists already, and complete"):
        score_file(scorer, data, str(whole))
    with pytest.raises(ValueError, match="the file of the rows; expected another name"):  # not: remove it
        score_file(scorer, data, data)
    part = Path(f"{output}.part")
    begun = b"".join(whole.read_bytes().splitlines(keepends=True)[:45])
    with_another_head = Scorer(RewardModel(model, 0.0, "cpu"), scorer.tokenizer)
    shorter = Scorer(scorer.model, scorer.tokenizer, max_length=24)
    changed = pairs(57)
    changed[30]["response"] = " w9"
    for using, rows, expected in [
        (with_another_head, pairs(57), "begun with weights "),
        (shorter, pairs(57), "begun with max_length 64, now 24"),
        (scorer, changed, "Line 31 of .* is not row 31 of the data"),
        (scorer, pairs(30), "Line 31 of .* is not row 31 of the data"),
    ]:
        left_behind(output, begun, scorer)
        with pytest.raises(ValueError, match=expected):
            score_file(using, write(tmp_path / "other.jsonl", rows), output)
        kept = part.read_bytes()  # what was done is still in the file
        assert begun.startswith(kept) and len(kept) > 0
    Path(f"{part}.json").unlink()
    with pytest.raises(ValueError, match="out.jsonl.part' exists, but no run of this library left it"):
        score_file(scorer, data, output)
    assert begun.startswith(part.read_bytes()[:400])
    left_behind(output, begun, scorer)
    score_file(scorer, data, output, on_bad_row="skip")  # which may change from run to run
    assert Path(output).read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("name", ["out/", "out.jsonl.gz", "out"])
def test_the_output_is_a_jsonl_file(name, scorer, tmp_path):
    data = write(tmp_path / "rows.jsonl", pairs(3))
    with pytest.raises(ValueError, match="expected the name of a .jsonl file"):
        score_file(scorer, data, f"{tmp_path}/{name}")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_empty_response_is_one_response(scorer, tmp_path, output):
    rows = [{"prompt": "w3", "response": ""}, {"prompt": "w3", "responses": [""]}]
    score_file(scorer, write(tmp_path / "rows.jsonl", rows), output)
    single, several = read(output)
    assert "rewards" not in single and several["rewards"] == [pytest.approx(single["reward"], abs=1e-5)]


def test_values_that_json_lacks(scorer, tmp_path, output):
    "Dates, durations and decimals are written as text; bytes, which no text is, are refused with their column."
    row = {"prompt": "w3", "response": " w4"}
    values = {
        "at": (datetime.datetime(2024, 2, 29, 1, 2, 3), "2024-02-29T01:02:03"),
        "on": (datetime.date(2024, 2, 29), "2024-02-29"),
        "took": (datetime.timedelta(seconds=90), "0:01:30"),
        "price": (Decimal("1.50"), "1.50"),
    }
    data = str(tmp_path / "rows.parquet")
    Dataset.from_list([{**row, **{name: value for name, (value, _) in values.items()}}]).to_parquet(data)
    score_file(scorer, data, output)
    written, = read(output)
    assert {name: written[name] for name in values} == {name: text for name, (_, text) in values.items()}
    Dataset.from_list([row | {"blob": None}, row | {"blob": b"x"}]).to_parquet(data)
    for on_bad_row in ("error", "skip"):
        with pytest.raises(ValueError, match="Row 2 of .* has bytes in the column 'blob', .*expected text.*Leave"):
            score_file(scorer, data, f"{output}.{on_bad_row}.jsonl", on_bad_row=on_bad_row)


def test_a_reward_that_is_not_finite(scorer, tmp_path, output, monkeypatch):
    "The error names the row, or is written to it, on_bad_row='skip'."
    forward = scorer._forward
    (infinite,), = scorer.tokenize([to_responses({"prompt": "w3", "response": " w9"})])

    def with_infinity(batch):
        rewards = forward(batch)
        for ids in rewards:
            if list(ids) == infinite:
                rewards[ids] = math.inf
        return rewards

    monkeypatch.setattr(scorer, "_forward", with_infinity)
    rows = [
        {"prompt": "w3", "response": " w8", "scores": {"own": [math.nan, 1.0]}},
        {"prompt": "w3", "response": " w9"},
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    expected = "Row 2 of .*rows.jsonl: The reward of a sequence of .* is inf.*on_bad_row='skip'"
    with pytest.raises(ValueError, match=expected):
        score_file(scorer, data, output)
    Path(f"{output}.part").unlink(missing_ok=True)
    assert score_file(scorer, data, output, on_bad_row="skip")["without_reward"] == 1
    fine, bad = read(output)
    assert math.isfinite(fine["reward"])
    assert bad["reward"] is None and "Row 2 of" in bad["error"] and "inf" in bad["error"]
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


@pytest.mark.parametrize("device, on_cpu", [(None, True), ("cpu", True), ("cuda", False)])
def test_processes_without_a_gpu_know_of_each_other(device, on_cpu, monkeypatch):
    "A process group on CPUs is one that accelerate is told of; without it each process would write the whole file."
    monkeypatch.setattr(torch.cuda, "is_available", bool)
    monkeypatch.setattr(accelerate, "PartialState", partial(SimpleNamespace, num_processes=1))
    processes, _ = shared_processes(SimpleNamespace(device=device))
    assert processes.cpu is on_cpu


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
    assert f"{len(rows)} rows: " in run(python, *arguments, one).stdout
    begun = one.read_bytes().splitlines(keepends=True)[:510]  # to be resumed
    left_behind(two, b"".join(begun), Scorer.from_pretrained(model, device="cpu"))
    assert shared(python, *arguments, two).count(f"{len(rows)} rows (500 were there before)") == 1
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
    ({"--model": "nowhere/at/all"}, "rlhf_reward score: .*nowhere/at/all.* does not exist"),
    ({"--data": "no.jsonl"}, "rlhf_reward score: 'no.jsonl' does not exist"),
    ({"--columns": "prompt"}, "--columns prompt is not a map"),
])
def test_the_command_reports_what_is_wrong(change, expected, model, tmp_path, output):
    data = write(tmp_path / "rows.jsonl", pairs(2))
    options = {"--model": model, "--data": data, "--output": output, "--device": "cpu", **change}
    arguments = []
    for name, value in options.items():
        arguments += [name, value]
    with pytest.raises(SystemExit) as exit:
        main(["score", *arguments])
    assert re.search(expected, str(exit.value.code)), exit.value.code


def test_the_command_counts_rows_without_a_reward(model, tmp_path, output, capsys):
    data = write(tmp_path / "rows.jsonl", [*pairs(2), {"prompt": "w3", "response": None}])
    arguments = ["--model", model, "--data", data, "--output", output, "--device", "cpu", "--on_bad_row", "skip"]
    main(["score", *arguments])
    assert "3 rows, 1 of them without a reward: " in capsys.readouterr().out
