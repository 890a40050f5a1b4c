"Formats of data sets, columns that are not read, parts of messages, and JSON files of other layouts."

import gzip
import json
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from architectures import save_language_model, word_tokenizer
from datasets import Dataset, DatasetDict, IterableDataset

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, load_rows, tokenize_rows
from rlhf_reward.audit import audit
from rlhf_reward.cli import main
from rlhf_reward.unread import plain_rows, unread_columns
from rlhf_reward.evaluation import Rule, evaluate
from rlhf_reward.files import score_file
from rlhf_reward.fields import checked_text
from rlhf_reward.length_calibration import calibrate_length
from rlhf_reward.loading import hold_out
from rlhf_reward.rl import RewardFunction
from rlhf_reward.rows import to_comparison, to_responses
from rlhf_reward.scoring import Scorer

PAIR = {"prompt": "w5 ", "chosen": "w6 w6", "rejected": "w7"}
ROWS = [
    {"prompt": f"w{number} ", "responses": ["w6", "w7 w8", "w9"], "scores": [1.0 + 1e-9, 1.0, 0.0], "weight": 0.1}
    for number in range(10, 16)
]
FORMATS = ("torch", "numpy", "pandas", "arrow")
LONGER = Rule(lambda prompt, response: len(response))


def tokenize(rows, **options):
    return list(tokenize_rows(rows, word_tokenizer(), 64, **options))


@pytest.mark.parametrize("shown_as", FORMATS)
@pytest.mark.parametrize("columns", [None, ["prompt", "responses", "scores"]])
def test_the_format_of_a_table_changes_nothing(shown_as, columns):
    plain = Dataset.from_list(ROWS)
    shown = plain.with_format(shown_as, columns=columns)
    if columns:
        plain = plain.select_columns(columns)
    assert list(plain_rows(shown)) == list(plain)
    assert tokenize(shown, margin_from_scores=True) == tokenize(plain, margin_from_scores=True)
    assert audit(shown, against=shown) == audit(plain, against=plain)
    assert evaluate(LONGER, shown).report == evaluate(LONGER, plain).report
    held = [list(plain_rows(part)) for part in hold_out(shown, 0.3)]
    assert held == [list(part) for part in hold_out(plain, 0.3)]
    tokenized = tokenize_rows(plain, word_tokenizer(), 64)
    assert hold_out(tokenized.with_format(shown_as))[1]["row"][:] is not None


@pytest.mark.parametrize("shown_as", ["torch", "numpy", "arrow"])
def test_the_format_of_a_stream_changes_nothing(shown_as):
    stream = IterableDataset.from_generator(partial(iter, ROWS))
    assert tokenize(stream.with_format(shown_as)) == tokenize(Dataset.from_list(ROWS))


@pytest.mark.parametrize("rows, problem", [
    ("pairs.jsonl", "str"),
    (Path("pairs.jsonl"), "PosixPath"),
    (DatasetDict(train=Dataset.from_list(ROWS)), "DatasetDict"),
    (pd.DataFrame(ROWS), "DataFrame"),
])
def test_what_is_no_rows_is_named(rows, problem):
    "And not taken apart into letters, splits or columns."
    reading = [tokenize, hold_out, partial(evaluate, LONGER), partial(calibrate_length, LONGER)]
    for read in reading if isinstance(rows, dict) else [*reading, audit]: # which takes several sets by name
        with pytest.raises(ValueError, match=f"^the rows are of the type {problem}; expected a "):
            read(rows)


def test_a_stream_is_no_table():
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(ValueError, match="of the type IterableDataset; expected .* without streaming"):
        hold_out(stream)
    with pytest.raises(ValueError, match="^the rows of the data are a stream; expected a table"):
        audit(stream)


def test_a_transform_is_applied():
    def louder(batch):
        return {**batch, "prompt": [prompt.upper() for prompt in batch["prompt"]]}

    rows = Dataset.from_list(ROWS).with_transform(louder)
    assert to_comparison(plain_rows(rows)[0]).prompt == "W10 "


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("base"))
    save_language_model("llama", folder)
    return folder


def trained_on(base, folder, rows, **options):
    torch.manual_seed(0)
    args = RewardConfig(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1, **options)
    trainer = RewardTrainer(
        RewardModel(base, 0.0, "cpu"),
        args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=word_tokenizer(),
    )
    trainer.train()
    return trainer


def test_a_model_trains_on_any_format(base, tmp_path):
    rows = Dataset.from_list(ROWS)
    losses = set()
    for name, part in {
        "plain": rows,
        "torch": rows.with_format("torch"),
        "tokenized": tokenize_rows(rows, word_tokenizer(), 64).with_format("torch"),
    }.items():
        trainer = trained_on(base, tmp_path / name, part)
        losses.add(round(trainer.evaluate()["eval_loss"], 6))
    assert len(losses) == 1


UNREAD = ("system", "input", "history", "system_prompt", "context", "Documents")
UNREAD += ("System Prompt", "system-prompt", "systemPrompt", "chat_history", "chatHistory", "passage")


@pytest.mark.parametrize("name", UNREAD)
def test_columns_that_change_the_meaning_are_reported(name, caplog):
    value = [["w4", "w5"]] if name == "history" else "w4"
    rows = [{**PAIR, name: value}, {**PAIR, "prompt": "w8 ", name: None}, {**PAIR, "prompt": "w9 ", name: value[:0]}]
    assert [unread_columns(row) for row in rows] == [(name,), (), ()]
    expected = f"columns are not read that would change the meaning: {name} (1); write them into the prompt"
    tokenize(Dataset.from_list(rows))
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"In 1 of 3 comparisons of the data, {expected}")
    report = audit(Dataset.from_list(rows))
    assert report["unread_columns"] == 1 and len(report["problems"]) == 1 and expected in report["problems"][0]
    caplog.clear()
    evaluate(LONGER, rows)
    assert caplog.messages[0].startswith(f"In 1 of 3 rows of the data, {expected}")


@pytest.mark.parametrize("name", ["Prompt", "PROMPT", "prompts", "messages", "user_prompt", "problem", "dialogue"])
def test_what_may_be_the_prompt_is_reported_where_there_is_none(name):
    responses = {"chosen": "w6 w6", "rejected": "w7"}
    assert unread_columns({name: "w4", **responses}) == (name,)
    assert unread_columns({name: "w4", "prompt": None, **responses}) == (name,)
    assert unread_columns({name: "w4", **PAIR}) == ()  # as in UltraFeedback


@pytest.mark.parametrize("name", ["promt", "propmt", "Prmpt", "promptt"])
def test_a_misspelled_prompt_is_reported_in_rows_without_one(name):
    responses = {"chosen": "w6", "rejected": "w7"}
    assert unread_columns({name: "w4", **responses}) == (name,)
    assert unread_columns({name: "w4", **PAIR}) == ()
    assert unread_columns({"prompt_id": "w4", "prompt_length": 4, "promoted": "w5", **responses}) == ()
    report = audit(Dataset.from_list([{name: "w4", **responses}] * 3))
    assert any(f"{name} (3)" in problem for problem in report["problems"])


@pytest.mark.parametrize("name", ["images", "Image", "image_url", "video", "videos", "audio"])
def test_columns_of_images_are_refused_by_name(name, base, tmp_path):
    rows = [PAIR, {**PAIR, name: ["x.png"]}, {**PAIR, name: []}, {**PAIR, name: None}]
    problem = f"its column '{name}' is filled, and only texts are read"
    for read in (to_comparison, to_responses):
        assert [read(row).prompt for row in (rows[0], *rows[2:])] == [PAIR["prompt"]] * 3
        with pytest.raises(ValueError, match=problem):
            read(rows[1])
    with pytest.raises(ValueError, match=problem):
        tokenize(Dataset.from_list([rows[1]]))
    assert problem in " ".join(audit(Dataset.from_list(rows[1:]))["problems"])
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "w5 ", "response": "w6", name: "x.png"}), encoding="utf-8")
    scorer = Scorer(RewardModel(base, 0.0, "cpu"), word_tokenizer())
    with pytest.raises(ValueError, match=problem):
        score_file(scorer, str(data), str(tmp_path / "out.jsonl"))
    function = RewardFunction(scorer)
    assert len(function(["w5 "] * 2, ["w6"] * 2, **{name: [None, []]}, question=["w4"] * 2)) == 2
    with pytest.raises(ValueError, match=problem):
        function(["w5 "] * 2, ["w6"] * 2, **{name: [None, ["x.png"]]})


def test_columns_are_reported_while_a_stream_is_read(caplog):
    rows = [{**PAIR, "system": "w4"}] * 3
    assert len(tokenize(IterableDataset.from_generator(partial(iter, rows)))) == 3
    assert "of the data so far, columns are not read that would change the meaning: system (1)" in caplog.text


def test_columns_are_reported_where_a_file_is_scored(base, tmp_path, caplog):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "w5 ", "response": "w6", "system": "w4"}), encoding="utf-8")
    scorer = Scorer(RewardModel(base, 0.0, "cpu"), word_tokenizer())
    score_file(scorer, str(data), str(tmp_path / "out.jsonl"))
    assert "columns are not read that would change the meaning: system (1)" in caplog.text


def test_other_columns_are_nobodys_business(caplog):
    row = {**PAIR, "id": 7, "model_a": "x", "timestamp": "now", "source": "s", "margin": 1.0, "weight": 2.0}
    assert unread_columns(row) == ()
    tokenize(Dataset.from_list([row]))
    assert caplog.messages == []


def test_a_column_that_is_mapped_is_read(tmp_path, caplog):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"input": "w5 ", "chosen": "w6", "rejected": "w7"}), encoding="utf-8")
    tokenize(load_rows(str(data), columns={"prompt": "input"}))
    assert caplog.messages == []


def test_parts_of_text_are_one_content(base):
    parts = [{"type": "text", "text": "w5"}, {"type": "text", "text": "w6", "image": None}]
    assert checked_text([{"role": "user", "content": parts}]) == [{"role": "user", "content": "w5\nw6"}]
    tokenizer = word_tokenizer(chat_template="{% for m in messages %}{{ m.content }} {% endfor %}")
    rewards = RewardFunction(Scorer(RewardModel(base, 0.0, "cpu"), tokenizer))
    as_parts, as_string = (
        rewards([[{"role": "user", "content": content}]], [[{"role": "assistant", "content": "w7"}]])
        for content in (parts, "w5\nw6")
    )
    assert as_parts == as_string


@pytest.mark.parametrize(
    "part, kind",
    [({"type": "image", "image": "x.png"}, "image"), ({"type": "image_url", "image_url": {}}, "image_url")],
)
def test_other_parts_are_refused(part, kind):
    row = {**PAIR, "prompt": [{"role": "user", "content": [{"type": "text", "text": "w5"}, part]}]}
    with pytest.raises(ValueError, match=f"a message has a part of the type '{kind}'; expected parts of type text"):
        to_comparison(row)


MESSAGES = {
    "prompt": [{"role": "user", "content": "q"}],
    "chosen": [{"role": "assistant", "content": "a"}],
    "rejected": [{"role": "assistant", "content": "b"}],
}
LAYOUTS = {
    "a list": (lambda rows: json.dumps(rows), 2),
    "a list in lines": (lambda rows: json.dumps(rows, indent=1), 2),
    "data": (lambda rows: json.dumps({"data": rows}), 2),
    "data in lines": (lambda rows: json.dumps({"data": rows}, indent=2), 2),
    "rows with a version": (lambda rows: json.dumps({"version": "1", "n": [1], "rows": rows}, indent="\t"), 2),
    "a row in each line": (lambda rows: "\n\n".join(map(json.dumps, rows)) + "\n", 2),
    "one row": (lambda rows: json.dumps(rows[0]), 1),
    "one row in lines": (lambda rows: "\n" + json.dumps(rows[0], indent=1) + "\n", 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", [PAIR, MESSAGES, ROWS[0]], ids=["strings", "messages", "scores"])
def test_json_files_of_any_layout(layout, row, tmp_path):
    write, count = LAYOUTS[layout]
    rows = [row, {**row, "weight": 2.0}]
    text = write(rows)
    plain, packed = tmp_path / "rows.json", tmp_path / "rows.json.gz"
    plain.write_text(text, encoding="utf-8")
    packed.write_bytes(gzip.compress(text.encode()))
    for path in (plain, packed):
        for streaming in (False, True):
            read = [to_comparison(found) for found in load_rows(str(path), streaming=streaming)]
            assert read == [to_comparison(expected) for expected in rows[:count]]


def test_json_objects_that_are_no_rows_are_refused(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"train": [PAIR], "test": [PAIR]}, indent=1), encoding="utf-8")
    with pytest.raises(ValueError, match=r"one JSON object with the lists \['test', 'train'\]; expected one list"):
        load_rows(str(path))
    path.write_text(json.dumps({"data": [PAIR]}, indent=1)[:-5], encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        load_rows(str(path))


def test_the_audit_command_names_the_columns(tmp_path, capsys):
    data = tmp_path / "rows.json"
    data.write_text(json.dumps({"data": [{**PAIR, "history": [["a", "b"]]}]}, indent=1), encoding="utf-8")
    with pytest.raises(SystemExit) as exit_of:
        main(["audit", str(data)])
    assert exit_of.value.code == 1
    assert "columns are not read that would change the meaning: history (1)" in capsys.readouterr().out
