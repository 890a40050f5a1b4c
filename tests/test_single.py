"Rows with one response: their forms, labels, groups, losses and figures."
import json

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from rlhf_reward.columns import column_verdicts, with_verdicts
from rlhf_reward.comparison import Comparison
from rlhf_reward.labels import read_labels
from rlhf_reward.loading import load_rows
from rlhf_reward.rows import to_comparison, to_responses
from rlhf_reward.unread import unread_columns
from rlhf_reward.verdicts import UnclearVerdict

Q = [{"role": "user", "content": "q"}]
A = [{"role": "assistant", "content": "a"}]
HH = "\n\nHuman: q\n\nAssistant:"
FORMS = [ # (columns of the response, prompt and response that they mean)
    ({"prompt": "q", "response": "a"}, "q", "a"),
    ({"prompt": "q", "completion": "a"}, "q", "a"),
    ({"prompt": Q, "completion": A}, Q, A),
    ({"prompt": Q, "response": "a"}, Q, A),
    ({"prompt": "q", "completion": [*Q, *A]}, Q, A),
    ({"messages": [*Q, *A]}, Q, A),
    ({"prompt": Q, "messages": [*Q, *A]}, Q, A),
    ({"text": [*Q, *A]}, Q, A),
    ({"response": f"{HH} a"}, HH, " a"),
]


def test_pointwise_rows_of_every_form_are_the_canonical_row(tmp_path):
    for columns, prompt, response in FORMS:
        for value in ("score", "rating"):
            row = {**columns, value: 4}
            assert to_comparison(row) == Comparison(prompt, (response,), (1,), (4.0,))
            assert not unread_columns(row)
            (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
            Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
            cells = {name: cell if isinstance(cell, str) else json.dumps(cell) for name, cell in row.items()}
            Dataset.from_list([cells]).to_csv(tmp_path / "rows.csv")
            for name in ("rows.jsonl", "rows.parquet", "rows.csv"):
                (read,) = load_rows(str(tmp_path / name))
                assert to_comparison(read) == to_comparison(row), name
        scored = to_responses(columns)
        assert (scored.prompt, scored.responses) == (prompt, (response,))
    with_list = to_comparison({"prompt": "q", "responses": ["a"], "scores": [4]})
    assert with_list == to_comparison({"prompt": "q", "response": "a", "score": 4})


def test_binary_labels_mean_what_their_column_shows(tmp_path):
    readable = [
        [True, False],
        [0, 1],
        [0.0, 1.0],
        ["1", "0"],
        [-1, 1],
        ["Good", "bad"],
        ["desirable", "undesirable"],
        ["thumbs_up", " No "],
        [True],
    ]
    for values in readable:
        rows = [{"prompt": "q", "completion": "a", "label": value} for value in values]
        meanings = column_verdicts(rows)
        good_words = ("true", "1", "1.0", "good", "desirable", "thumbs_up")
        expected = [str(value).strip().lower() in good_words for value in values]
        assert [to_comparison(row, meanings).labels for row in rows] == [(good,) for good in expected]
        Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in ("rows.parquet", "rows.jsonl"):
            for streaming in (False, True):
                assert column_verdicts(load_rows(str(tmp_path / name), streaming=streaming)) == meanings
        together = {"prompt": "q", "responses": ["a"] * len(values), "labels": values}
        assert to_comparison(together, column_verdicts([together])).labels == tuple(expected)
    for values in ([1], [0, 0], [1, 2], [0, 1, 2], [0.2, 1]):
        rows = [{"prompt": "q", "completion": "a", "label": value} for value in values]
        with pytest.raises(UnclearVerdict, match="expected true and false, or 0 and 1. Give what each value means"):
            column_verdicts(rows)
        with pytest.raises(UnclearVerdict):
            to_comparison(rows[0])
        meanings = {value: "good" if value == max(values) else "bad" for value in values}
        given = Dataset.from_list(rows)
        read = [to_comparison(row).labels[0] for row in with_verdicts(given, meanings)]
        assert read == [value == max(values) for value in values]
        assert to_comparison(rows[0], meanings).labels == (values[0] == max(values),)


def test_binary_labels_of_a_class_label_and_of_later_rows():
    rows = [{"prompt": "q", "completion": "a", "label": 0}, {"prompt": "q", "completion": "a", "label": 1}]
    for names, good in ((["neg", "pos"], 1), (["true", "false"], 0)):
        features = Features({**dict.fromkeys(("prompt", "completion"), Value("string")), "label": ClassLabel(names=names)})
        table = Dataset.from_list(rows, features=features)
        meanings = column_verdicts(table)
        assert [to_comparison(row, meanings).labels for row in table] == [(good == 0,), (good == 1,)]
    features = Features({"responses": List(Value("string")), "labels": List(ClassLabel(names=["bad", "good"]))})
    table = Dataset.from_list([{"responses": ["x", "y"], "labels": [1, 0]}], features=features)
    assert to_comparison(table[0], column_verdicts(table)).ranks == (1, 2)
    known = read_labels([0, 1])
    assert to_comparison({"prompt": "q", "response": "a", "label": 1}, known).labels == (True,)
    with pytest.raises(UnclearVerdict, match="found 0, 1, 2 as label"):
        to_comparison({"prompt": "q", "response": "a", "label": 2}, known)


def test_labels_next_to_scores_are_read_only_if_they_are_labels():
    row = {"prompt": "q", "response": "a", "score": 2}
    for values, meaning in (([0, 1], (False,)), ([0.3, 1], (None,)), (["helpful", "true"], (None,))):
        rows = [{**row, "label": value} for value in values]
        assert to_comparison(rows[0], column_verdicts(rows)).labels == meaning
        assert to_comparison(rows[0], column_verdicts(Dataset.from_list(rows))).ratings == (2.0,)


BAD = [
    ({"prompt": "q", "response": "a", "score": 1, "rating": 2}, "it has a score and a rating; expected one of them"),
    ({"prompt": "q", "response": "a", "score": None}, "found None as score; expected a score, a rating or a label"),
    ({"prompt": "q", "response": "a", "score": "high"}, "found 'high' as scores; expected a finite number"),
    ({"prompt": "q", "response": "a", "label": "maybe"}, "the label is 'maybe'; expected one of true, good, "),
    ({"prompt": "q", "response": None, "score": 1}, "expected a text"),
    ({"prompt": "q", "text": "qa", "score": 1}, "it has a prompt and a whole text"),
    ({"prompt": "q", "response": "a", "score": 1, "margin": 1}, "there is one margin for 1 responses"),
    ({"prompt": "q", "responses": ["a", "b"], "labels": [True]}, "1 for|for 2 responses; expected one label for each"),
    ({"prompt": "q", "responses": ["a", "b"], "labels": [True, None]}, "or a label for each"),
    ({"prompt": "q", "response": "a"}, "one of response, completion, text, messages with one of score, rating, label"),
]


def test_rows_of_one_response_that_cannot_be_used_are_explained():
    for row, problem in BAD:
        with pytest.raises(ValueError, match=problem):
            to_comparison(row)
