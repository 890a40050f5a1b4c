"A verdict means what its whole column shows."
import csv
import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from architectures import save_language_model, word_tokenizer
from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, columns, evaluate, load_rows, tokenize_rows
from rlhf_reward.audit import audit, audit_table
from rlhf_reward.cli import main
from rlhf_reward.cli.arguments import parse_verdicts
from rlhf_reward.columns import check_same_verdicts, column_verdicts, with_verdicts
from rlhf_reward.data import hold_out, to_comparison
from rlhf_reward.evaluation import Rule
from rlhf_reward.verdicts import UnclearVerdict, checked_verdicts, read_verdicts

RANKS = {"a": [1, 2], "b": [2, 1], "tie": [1, 1]}


def arena(verdicts, column="winner"):
    "A row for each verdict, each of another prompt."
    return [
        {"prompt": f"w{3 + index} ", "response_a": "w6 w8", "response_b": "w7", column: verdict}
        for index, verdict in enumerate(verdicts)
    ]


def ranks(rows, **options):
    tokenized = tokenize_rows(rows, word_tokenizer(), 99, keep_ties=True, **options)
    return [row["ranks"] for row in tokenized]


@pytest.mark.parametrize(
    "values, meanings",
    [
        ([0, 1], "a b"),  # PKU-SafeRLHF
        ([1, 0, 1], "b a b"),
        (["0", "1"], "a b"),
        ([0.0, 1.0], "a b"),
        ([1, 2], "a b"),
        (["1", "2.0", "tie"], "a b tie"),
        ([0, 1, "tie"], "a b tie"),
        ([-3, -2, -1, 0, 1, 2, 3], "a a a tie b b b"),  # HelpSteer3
        ([-1, 0, 1], "a tie b"),
        ([1, -1], "b a"),
        (["-2", " +1 "], "a b"),
        ([np.int64(-3), np.int64(1)], "a b"),
        (["model_a", "Model_B", " tie (bothbad)"], "a b tie"),
        (["a", "b", 1, 2], "a b a b"),
        ([float("nan"), 1, 2], "none a b"),
    ],
)
def test_codings_that_a_column_shows(values, meanings):
    read = read_verdicts(values)
    for value, meaning in zip(values, meanings.split(), strict=True):
        if meaning != "none":
            row = {"prompt": "p", "response_a": "x", "response_b": "y", "winner": value}
            assert list(to_comparison(row, read).ranks) == RANKS[meaning]


UNCLEAR = [
    [1],  # the second of 0 and 1, the first of 1 and 2, the second of -k to k
    [0],
    [2],
    [-1],
    [0, 1, 2],
    [0, 2],
    [-2, -1],
    [-1, 0],
    [1, 2, 3],
    [1, 2, 3, 4, 5],
    [0, 0.5, 1],
    [-0.5, 0.5],
    [0.2, 0.9],
    [True, False],
    ["true", "false"],
    ["1", "tie"],
    ["a", 1],
    [0, 1, 7],
]


@pytest.mark.parametrize("values", UNCLEAR, ids=str)
def test_numbers_that_a_column_does_not_show_are_refused_everywhere(values, tmp_path):
    rows = arena(values)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for on_bad_row in ("error", "skip"):
        table = load_rows(str(path), on_bad_row=on_bad_row)
        stream = load_rows(str(path), on_bad_row=on_bad_row, streaming=True)
        for read in (
            lambda: ranks(table, on_bad_row=on_bad_row),
            lambda: ranks(stream, on_bad_row=on_bad_row),
            lambda: evaluate(Rule(lambda prompt, response: len(response)), rows, on_bad_row),
            lambda: hold_out(table),
        ):
            with pytest.raises(UnclearVerdict, match="as winner of .*Give what each value means.*--verdicts="):
                read()
    report = audit(table)
    assert report["verdicts"] == {}
    assert report["problems"][0].startswith("found ")
    assert report["bad_rows"] > 0


@pytest.mark.parametrize(
    "column, values, expected",
    [
        ("winner", [1, 0, 1, 1], "b a b b"),
        ("preference", [1, 2, 2, 1], "a b b a"),
        ("preference", [3, -1, 0, -2], "b a tie a"),
        ("winner", ["model_b", "model_a", "tie", "model_b"], "b a tie b"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "list"])
def test_a_column_means_the_same_from_every_file(values, expected, column, kind, tmp_path):
    rows = arena(values, column)
    expected = [RANKS[meaning] for meaning in expected.split()]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    tables = [Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()]
    if kind != "list":
        tables = [load_rows(str(path), streaming=streaming) for streaming in (False, True)]
    for table in tables:
        for on_bad_row in ("error", "skip"):
            assert ranks(table, on_bad_row=on_bad_row) == expected
    report = audit(tables[0])
    assert set(report["verdicts"].values()) == {"a", "b"} | ({"tie"} if [1, 1] in expected else set())
    for value, meaning in report["verdicts"].items():
        assert f"the verdict {value} is read as {meaning}" in audit_table(report)
    # longer is response_a
    evaluated = evaluate(Rule(lambda prompt, response: len(response)), tables[0], "skip")
    pairs = [rank for rank in expected if rank != [1, 1]]
    assert evaluated.report["accuracy"] == pairs.count([1, 2]) / len(pairs)


def labeled(names, values):
    types = dict.fromkeys(("prompt", "response_a", "response_b"), Value("string"))
    return Dataset.from_list(arena(values), features=Features({**types, "winner": ClassLabel(names=names)}))


def test_names_of_a_class_label_decide():
    names = ["tie", "model_b", "model_a"]
    table = labeled(names, ["model_b", "tie", "model_a"])
    expected = [RANKS["b"], RANKS["tie"], RANKS["a"]]
    for rows in (table, table.to_iterable_dataset(), table.select([0, 1, 2]).shuffle(seed=0).sort("winner")):
        assert sorted(ranks(rows)) == sorted(expected)
    assert ranks(table) == expected
    assert ranks(labeled(["2", "1"], ["2", "1"])) == [RANKS["b"], RANKS["a"]]  # numbers by name
    assert ranks(labeled(["unused", "a", "b"], ["b"])) == [RANKS["b"]]
    for unclear in (labeled(["win", "lose"], ["win"]), labeled(["0", "1", "2"], ["0"])):
        with pytest.raises(UnclearVerdict, match="found (win|0, 1, 2) as winner of the data"):
            ranks(unclear, on_bad_row="skip")
    mapped = with_verdicts(labeled(["win", "lose"], ["win", "lose"]), {"win": "a", "lose": "b"})
    assert ranks(mapped) == [RANKS["a"], RANKS["b"]]


@pytest.mark.parametrize("names", [["win", "lose"], ["a", "b"], ["tie", "b"], ["b", "tie", "a"]], ids=str)
def test_a_row_without_a_label_has_no_verdict(names):
    "`datasets` stores -1 for it, which is no index of a name."
    table = labeled(names, names[:2])
    rows = Dataset.from_list([{**row, "winner": winner} for row, winner in zip(table, [0, -1])], table.features)
    meanings = dict(zip(names, ("a", "b", "tie")))
    for unclear in (rows, rows.to_iterable_dataset(), with_verdicts(rows, meanings)):
        with pytest.raises(UnclearVerdict, match="found .*-1.* as winner of the data"):
            ranks(unclear, on_bad_row="skip")
    assert ranks(with_verdicts(rows, {**meanings, -1: "tie"})) == [RANKS["a"], RANKS["tie"]]


def test_verdicts_of_rows_of_other_forms_do_not_count():
    "A column of numbers may stay in rows of chosen and rejected, as in HelpSteer."
    pair = {"prompt": "w3 ", "chosen": "w6", "rejected": "w7", "preference": 2}
    assert ranks(Dataset.from_list([pair])) == [[1, 2]]
    missing = dict.fromkeys(("response_a", "response_b"))
    mixed = [{**pair, **missing}, *({**row, "chosen": None} for row in arena([0, 1], "preference"))]
    assert ranks(Dataset.from_list(mixed)) == [[1, 2], [1, 2], [2, 1]]
    assert column_verdicts(mixed) == {"0": "a", "1": "b"}
    with pytest.raises(UnclearVerdict, match="found 0, 1 as winner or preference|found 0, 1, 2|found 1"):
        column_verdicts([*arena([0, 1]), *arena([1, 2], "preference")])


def test_a_stream_is_read_by_what_has_been_seen(monkeypatch):
    monkeypatch.setattr(columns, "FIRST_ROWS", 3)

    def stream(values):
        return IterableDataset.from_generator(lambda: iter(arena(values)))

    assert ranks(stream([-2, 1, 0, -3, 3])) == [RANKS[meaning] for meaning in ("a", "b", "tie", "a", "b")]
    assert ranks(stream([0, 1, 1, 0])) == [RANKS[meaning] for meaning in ("a", "b", "b", "a")]
    for values in ([0, 1, 1, 2], [0, 1, 1, -1], [1, 2, 1, 0], [1, 2, 1, 3], ["a", "b", "a", 1]):
        with pytest.raises(UnclearVerdict, match="Row 4 of the data cannot be used: found"):
            ranks(stream(values), on_bad_row="skip")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_map_decides(kind, streaming, tmp_path):
    rows = arena([0, 1, 2, 1])
    path = str(tmp_path / f"rows.{kind}")
    table = Dataset.from_list(rows)
    {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[kind](path)
    mapped = load_rows(path, streaming=streaming, verdicts={0: "tie", 1: "b", "2": "a"})
    assert ranks(mapped) == [RANKS[meaning] for meaning in ("tie", "b", "a", "b")]
    with pytest.raises(UnclearVerdict, match="found 2 as winner"):
        ranks(load_rows(path, streaming=streaming, verdicts={0: "tie", 1: "b"}), on_bad_row="skip")
    assert to_comparison(rows[1], {1: "b"}).ranks == (2, 1)
    assert to_comparison(rows[1], {"1": "a"}).ranks == (1, 2)


def test_a_map_stands_above_words_and_leaves_other_rows():
    rows = Dataset.from_list(arena(["a", "left", "bothbad", None]))
    words = with_verdicts(rows, {"a": "b", "Left": "a"})
    assert words["winner"][:] == ["b", "a", "bothbad", None]
    pairs = Dataset.from_list([{"chosen": "a", "rejected": "b"}])
    assert with_verdicts(pairs, {0: "a"})[:] == pairs[:]


@pytest.mark.parametrize("verdicts", [{0: "first"}, {0: 1}, {0: "a", "0": "b"}, {0: None}])
def test_a_map_of_something_else_is_refused(verdicts):
    with pytest.raises(ValueError, match="expected a, b or tie for each value"):
        checked_verdicts(verdicts)


def test_words_that_are_no_verdicts_are_bad_rows(caplog):
    rows = Dataset.from_list(arena(["a", "left", "b"]))
    with pytest.raises(ValueError, match="Row 2 of .* the winner is 'left'; expected one of a, model_a"):
        ranks(rows)
    assert ranks(rows, on_bad_row="skip") == [[1, 2], [2, 1]]


def test_readings_of_numbers_are_logged(caplog):
    ranks(Dataset.from_list(arena([-1, 0, 2])), name="votes.jsonl")
    assert "votes.jsonl: Verdicts are read as -1 = a, 0 = tie, 2 = b (a is response_a)." in caplog.messages[0]
    caplog.clear()
    ranks(Dataset.from_list(arena(["a", "tie"])))
    assert not [message for message in caplog.messages if "Verdicts" in message]


def test_rows_to_train_and_to_evaluate_on_have_one_meaning():
    check_same_verdicts(Dataset.from_list(arena([-1, 0, 2])), Dataset.from_list(arena([-3, 1])))
    with pytest.raises(UnclearVerdict, match="the verdict 0 is tie in the rows to train on and a in those to evaluate"):
        check_same_verdicts(Dataset.from_list(arena([-1, 0, 2])), Dataset.from_list(arena([0, 1])))


def test_the_trainer_refuses_verdicts_that_mean_another_in_evaluation(tmp_path):
    model = RewardModel(save_language_model("llama", tmp_path / "base"), 0.0, "cpu")
    config = RewardConfig(str(tmp_path / "run"), use_cpu=True, report_to="none")
    rows, others = Dataset.from_list(arena([-1, 0, 2])), Dataset.from_list(arena([0, 1]))
    for train, part in ((rows, others), (rows, {"x": rows, "y": others}), (rows.to_iterable_dataset(), others)):
        with pytest.raises(UnclearVerdict, match="the verdict 0 is tie in the rows to train on and a in those to"):
            RewardTrainer(model, config, train_dataset=train, eval_dataset=part, processing_class=word_tokenizer())


@pytest.mark.parametrize("text", ["0", "0=c", "=a", "0=a,0=b", "0=a,,1=b", "a"])
def test_the_option_is_a_map(text):
    assert parse_verdicts("-1=a, 0 = tie,1=b") == {"-1": "a", "0": "tie", "1": "b"}
    assert parse_verdicts("A=B=tie") == {"A=B": "tie"}
    assert parse_verdicts(None) == {}
    with pytest.raises(ValueError, match="is not a mapping; expected the values of winner or preference"):
        parse_verdicts(text)


def test_commands_take_the_map(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, arena([0, 1, 2]))))
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(map(json.dumps, arena([2, 2]))))
    with pytest.raises(SystemExit) as exit:
        main(["audit", str(path)])
    assert exit.value.code == 1
    assert "PROBLEM  found 0, 1, 2 as winner" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        main(["audit", str(path), "--verdicts=0=tie,1=a,2=b", "--json", "--against", str(other)])
    report = json.loads(capsys.readouterr().out)
    assert report["verdicts"] == {"tie": "tie", "a": "a", "b": "b"}
    assert report["shared_prompts"] == 2
    assert report["bad_rows"] == 0
    options = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--on_bad_row", "skip"]
    with pytest.raises(SystemExit, match="rlhf_reward train: found 0, 1, 2 as winner of"):
        main(["train", "--model", "none", "--dataset", str(path), "--eval_dataset", str(path), *options])
    with pytest.raises(SystemExit, match="'none'|none"):  # the rows are read, and then there is no such model
        main(["train", "--model", "none", "--dataset", str(path), "--verdicts", "0=tie,1=a,2=b", *options])
    with pytest.raises(SystemExit):
        main(["train", "--model", "none", "--dataset", str(path), "--verdicts", "0", *options])
    assert "--verdicts=0 is not a mapping" in capsys.readouterr().err


def test_evaluation_audit_and_hold_out_read_names_too():
    table = labeled(["second", "tie", "model_b", "model_a"], ["model_b", "model_a", "model_b"])
    by_length = Rule(lambda prompt, response: len(response))  # prefers response_a
    for rows in (table, table.to_iterable_dataset()):
        assert evaluate(by_length, rows).report["accuracy"] == 1 / 3
    report = audit(table, against=table.select([1]))
    assert report["verdicts"] == {"1": "tie", "2": "b", "3": "a"}
    assert (report["bad_rows"], report["shared_prompts"]) == (0, 1)
    assert sum(map(len, hold_out(table, 0.3))) == 3


def test_rows_in_a_format_are_read_as_they_are():
    table = Dataset.from_list(arena([-1, 2, 0]))
    for kind in ("numpy", "torch", "pandas", "arrow"):
        assert column_verdicts(table.with_format(kind)) == {"-1": "a", "0": "tie", "2": "b"}
