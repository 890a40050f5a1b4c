import csv
import gzip
import json
import subprocess
from importlib import import_module
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from architectures import word_tokenizer
from chat_tokenizers import chat_tokenizer
from rlhf_reward import Comparison, columns, data, load_rows, loading, records, tokenize_rows
from rlhf_reward.audit import audit
from rlhf_reward.data import hold_out, text_key, to_comparison, to_responses
from rlhf_reward.encoding import render_comparison
from rlhf_reward.rows import UNREADABLE

PAIR = {"prompt": "w5 ", "chosen": "w6", "rejected": "w7"}


@pytest.mark.parametrize("module", ["comparison", "rows", "loading"])
def test_the_earlier_module_has_the_public_names(module):
    defined = import_module(f"rlhf_reward.{module}")
    for name in set(defined.__all__) - {"CACHE_VERSION"}:
        assert name in data.__all__
        assert getattr(data, name) is getattr(defined, name)


@pytest.mark.parametrize(
    "scores, ranks",
    [
        ((3, 1, 2), (1, 3, 2)),
        ((1, 1, 0), (1, 1, 3)),
        ((0.5, -0.5), (1, 2)),
        ((True, False), (1, 2)),
    ],
)
def test_ranks_follow_from_scores(scores, ranks):
    responses = ("a", "b", "c")[: len(scores)]
    row = {"prompt": "p", "responses": list(responses), "scores": list(scores), "extra": None}
    ratings = tuple(map(float, scores))
    assert to_comparison(row) == Comparison("p", responses, ranks, ratings)


def test_given_ranks_are_kept_in_their_order():
    row = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [5, 2, 2]}
    assert to_comparison(row).ranks == (3, 1, 1)


@pytest.mark.parametrize(
    "verdict, ranks",
    [
        ("a", (1, 2)),
        ("A", (1, 2)),
        ("model_a", (1, 2)),
        ("b", (2, 1)),
        ("model_b", (2, 1)),
        ("tie", (1, 1)),
        ("tie (bothbad)", (1, 1)),
        (" B ", (2, 1)),
        ("tie (inconsistent)", (1, 1)),
    ],
)
@pytest.mark.parametrize("column", ["winner", "preference"])
def test_arena_verdicts(column, verdict, ranks):
    assert to_comparison(
        {"prompt": "p", "response_a": "x", "response_b": "y", column: verdict}
    ) == Comparison("p", ("x", "y"), ranks)


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        (
            "\n\nHuman: Hi\n\nAssistant: Hello you",
            "\n\nHuman: Hi\n\nAssistant: Hello",
            "\n\nHuman: Hi\n\nAssistant:",
        ),
        (
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D",
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: E",
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:",
        ),
        ("2 + 2 = 4", "2 + 2 = 5", "2 + 2 = "),
        ("one", "two", ""),
        ("one", "one two", "one"),
    ],
)
def test_whole_texts_are_split_at_their_prompt_and_lose_nothing(chosen, rejected, prompt):
    comparison = to_comparison({"chosen": chosen, "rejected": rejected})
    assert comparison.prompt == prompt
    assert comparison.ranks == (1, 2)
    assert [comparison.prompt + response for response in comparison.responses] == [chosen, rejected]


U = "user"
A = "assistant"


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


ASKED = messages((U, "2+2?"))
FOUR = messages((A, "4"))
FIVE = messages((A, "5"))
SYSTEM = messages(("system", "Be brief."))


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"chosen": ASKED + FOUR, "rejected": ASKED + FIVE}, ASKED),
        ({"prompt": ASKED, "chosen": FOUR, "rejected": FIVE}, ASKED),
        ({"prompt": ASKED, "chosen": ASKED + FOUR, "rejected": ASKED + FIVE}, ASKED),
        ({"prompt": "2+2?", "chosen": FOUR, "rejected": FIVE}, ASKED),
        # UltraFeedback
        (
            {"prompt": "2+2?", "chosen": ASKED + FOUR, "rejected": ASKED + FIVE},
            ASKED,
        ),
        ({"prompt": "2+2? ", "chosen": ASKED + FOUR, "rejected": ASKED + FIVE}, ASKED),
        (
            {"prompt": ASKED, "chosen": SYSTEM + ASKED + FOUR, "rejected": SYSTEM + ASKED + FIVE},
            SYSTEM + ASKED,
        ),
        # a table that has the column for other rows
        (
            {"prompt": None, "chosen": ASKED + FOUR, "rejected": ASKED + FIVE},
            ASKED,
        ),
        (
            {"prompt": "2+2?", "chosen": SYSTEM + ASKED + FOUR, "rejected": SYSTEM + ASKED + FIVE},
            SYSTEM + ASKED,
        ),
        ({"prompt": SYSTEM + ASKED, "chosen": "4", "rejected": "5"}, SYSTEM + ASKED),
        ({"prompt": ASKED, "responses": ["4", "5"], "scores": [1, 0]}, ASKED),
        ({"responses": [ASKED + FOUR, ASKED + FIVE], "ranks": [1, 2]}, ASKED),
        # arena conversations
        (
            {"response_a": ASKED + FOUR, "response_b": ASKED + FIVE, "winner": "model_a"},
            ASKED,
        ),
    ],
)
def test_messages_become_prompt_and_responses(row, prompt):
    table = Dataset.from_list([row])[0]  # as it comes from a file
    for form in (row, table):
        comparison = to_comparison(form)
        assert comparison.prompt == prompt
        assert comparison.responses == (FOUR, FIVE)
        assert comparison.ranks == (1, 2)


def test_conversations_part_where_they_differ_and_end_in_a_response():
    later = messages((U, "Sure?"), (A, "Yes."))
    comparison = to_comparison({"chosen": ASKED + FOUR + later, "rejected": ASKED + FIVE + later})
    assert comparison.prompt == ASKED
    assert comparison.responses == (FOUR + later, FIVE + later)
    continued = to_comparison({"prompt": ASKED, "chosen": FOUR + later, "rejected": FIVE + later})
    assert continued.prompt == ASKED
    assert continued.responses == (FOUR + later, FIVE + later)
    same = to_comparison({"chosen": ASKED + FOUR, "rejected": ASKED + FOUR})
    assert same.prompt == ASKED
    assert same.responses == (FOUR, FOUR)
    nothing = to_comparison({"chosen": FOUR, "rejected": FIVE})
    assert nothing.prompt == []
    assert nothing.responses == (FOUR, FIVE)


def test_ratings_margin_weight_and_source_are_read():
    given = to_comparison(
        {**PAIR, "score_chosen": 8, "score_rejected": 6.5, "margin": 2, "weight": 0.5, "source": 7}
    )
    assert (given.ratings, given.margin, given.weight, given.source) == ((8.0, 6.5), 2.0, 0.5, "7")
    absent = to_comparison(
        {**PAIR, "score_chosen": None, "score_rejected": None, "margin": None, "source": None}
    )
    assert (absent.ratings, absent.margin, absent.weight, absent.source) == (None, None, 1.0, None)
    empty_cells = {"weight": None, "margin": "", "score_chosen": "", "score_rejected": ""}
    assert to_comparison({**PAIR, **empty_cells}) == to_comparison(PAIR)
    two = {"prompt": "p", "responses": ["a", "b"]}
    assert to_comparison({**two, "ranks": [1, 2], "scores": [1, 3]}).ratings == (1.0, 3.0)
    assert to_comparison({**two, "scores": [2, 3]}).ratings == (2.0, 3.0)
    assert to_comparison({**two, "ranks": [2, 3]}).ratings is None


def test_forms_may_be_mixed_in_one_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        PAIR,
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]},
        {"prompt": ASKED, "chosen": FOUR, "rejected": FIVE},
        {"chosen_ids": [1, 2], "rejected_ids": [1, 3]},
        {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "model_b"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    comparisons = [to_comparison(row) for row in load_rows(str(path))]
    ranks = [comparison.ranks for comparison in comparisons]
    assert ranks == [(1, 2), (2, 1), (1, 2), (1, 2), (2, 1)]
    assert [comparison.prompt for comparison in comparisons] == ["w5 ", "p", ASKED, [1], "p"]


K2 = {"prompt": "p", "responses": ["a", "b"]}
ARENA = {"prompt": "p", "response_a": "a", "response_b": "b"}


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"prompt": "p", "chosen": "c"},
            r"it has the columns \['chosen', 'prompt'\]; expected one of: .*chosen, rejected;.*--columns",
        ),
        ({**PAIR, "chosen": None, "rejected": None}, r"columns \['prompt'\]; expected"),
        ({**PAIR, "rejected": None}, "found None as rejected; expected a text:"),
        ({**PAIR, "prompt": None}, "found None; expected a text"),
        ({**PAIR, "prompt": 3}, "found 3; expected a text"),
        ({**PAIR, "chosen": {"text": "a"}}, "found {'text': 'a'}; expected a text"),
        ({**PAIR, "chosen": ["a"]}, r"found \['a'\]; expected a text"),
        ({**PAIR, "prompt": []}, r"found \[\]; expected a text"),
        ({**PAIR, "prompt": [{"role": "user"}]}, "has no content; expected role and content"),
        ({**PAIR, "prompt": [{"content": "a"}]}, "the message {'content': 'a'} has no role"),
        (
            {**PAIR, "prompt": [{"role": "user", "content": ["a"]}]},
            r"found \['a'\]; expected a text",
        ),
        ({**PAIR, "chosen": FOUR}, "some responses are strings and some are messages"),
        ({**PAIR, "margin": "much"}, "found 'much' as margin; expected a finite number"),
        ({**PAIR, "margin": [1]}, r"found \[1\] as margin"),
        ({**PAIR, "margin": float("nan")}, "found nan as margin"),
        ({**PAIR, "weight": -1}, "the weight is -1.0; expected a number that is not negative"),
        ({**PAIR, "score_chosen": 1, "score_rejected": None}, "expected a number for each"),
        (
            {
                **PAIR,
                "tools": "[",
            },
            "the tools are not JSON",
        ),
        ({**PAIR, "tools": {"name": "f"}}, "the tools are .*; expected a list"),
        ({**PAIR, "chat_template_kwargs": [1]}, "the chat_template_kwargs are .*; expected a dict"),
        (
            {"prompt": "p", "responses": ["a"], "ranks": [1]},
            r"the responses are \['a'\]; expected a list of at least 2",
        ),
        ({**K2, "responses": None, "scores": [1, 2]}, "there are no responses; expected a list of at least 1"),
        ({**K2, "responses": 3, "scores": [1, 2]}, "the responses are 3; expected a"),
        ({**K2, "responses": "ab", "scores": [1, 2]}, "the responses are not JSON"),
        ({**K2, "responses": ["a", None], "scores": [1, 2]}, "found None; expected a text"),
        (
            {**K2, "scores": [1]},
            r"the scores are \[1\] for 2 responses; expected one number for each",
        ),
        ({**K2, "scores": [1, None]}, "a number for each"),
        ({**K2, "scores": [1, float("nan")]}, "found nan as scores; expected a finite number"),
        ({**K2, "scores": ["high", "2"]}, "found 'high' as scores"),
        ({**K2, "scores": [[1], [2]]}, r"found \[1\] as scores"),
        ({**K2, "scores": 3}, "the scores are 3"),
        ({**K2, "ranks": [1, None]}, "the ranks .*a number for each"),
        ({**K2, "scores": None, "ranks": None}, r"columns \['prompt', 'responses'\]; expected|the scores are None"),
        ({**K2, "scores": None}, "the scores are None and the ranks None for 2 responses"),
        ({**K2, "ranks": None}, "the scores are None and the ranks None"),
        ({**K2, "scores": []}, r"the scores are \[\] and the ranks None"),
        ({**K2, "ranks": []}, r"the scores are None and the ranks \[\]"),
        ({**K2, "scores": "", "ranks": ""}, "the scores are '' and the ranks ''"),
        ({**K2, "scores": 0}, "the scores are 0; expected a list"),
        ({**K2, "ranks": [1]}, "the ranks are .1. for 2 responses"),
        (
            {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 3], "margin": 1},
            "one margin for 3 responses",
        ),
        ({**ARENA, "winner": "left"}, "the winner is 'left'; expected one of a, model_a"),
        ({"chosen": "a", "rejected": None}, "found None as rejected; expected a text"),
        ({**PAIR, "chosen": [{"from": "gpt", "value": "c"}]}, "has no role; .* It has from and value, as ShareGPT"),
        ({**PAIR, "chosen": {"from": "gpt", "value": "c"}}, "expected a text.* It has from and value"),
        ({**PAIR, "prompt": [{"value": "c", "from": "human", "id": 1}]}, "It has from and value"),
        (
            {"chosen_ids": [1, 2], "rejected_ids": []},
            r"the rejected_ids are \[\]; expected a list of token ids",
        ),
        ({"chosen_ids": [1, -2], "rejected_ids": [1]}, "the chosen_ids are"),
        ({"chosen_ids": [1, 2.0], "rejected_ids": [1]}, "the chosen_ids are"),
        (
            {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
            "prompt_ids with .*expected whole texts",
        ),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        to_comparison(row)
    for read in (lambda rows: tokenize_rows(rows, word_tokenizer(), max_length=9), hold_out):
        with pytest.raises(ValueError, match="^Row 1 of the data cannot be used: "):
            read(Dataset.from_list([row]))


def test_lone_surrogates_are_named():
    with pytest.raises(
        ValueError,
        match=r"has a lone surrogate at character 1, half of a character; expected valid Unicode",
    ):
        to_comparison({**PAIR, "prompt": "a\ud800"})


def test_held_out_prompts_are_in_one_part_only():
    rows = []
    for n in range(90):
        prompt = f"Ｎr. {n % 30}" if n // 30 else f"nr.  {n % 30} "
        rows.append({**PAIR, "prompt": prompt, "chosen": f"{n} w8"})
    rows = Dataset.from_list(rows)
    train, held = hold_out(rows, 0.1, seed=3)
    keys = [set(map(text_key, part["prompt"])) for part in (train, held)]
    # Prompts that differ in case, spaces and width are the same.
    assert len(keys[1]) == 3
    assert len(held) == 9
    assert not keys[0] & keys[1]
    assert sorted([*train["chosen"], *held["chosen"]]) == sorted(rows["chosen"])
    assert hold_out(rows, 0.1, seed=3)[1][:] == held[:] != hold_out(rows, 0.1, seed=4)[1][:]
    tokenized_rows = tokenize_rows(rows, word_tokenizer(), 99, on_bad_row="skip")
    tokenized = hold_out(tokenized_rows, 0.1, seed=3)  # the same prompts
    assert [len(part) for part in tokenized] == [81, 9]
    assert {*tokenized[1]["prompt_key"]} == keys[1]
    with pytest.raises(ValueError, match=r"1 different prompt\(s\)"):
        hold_out(rows.select([0]))
    with pytest.raises(ValueError, match="of which 30 would be held out"):
        hold_out(rows, 1.0)


def test_prompts_in_messages_are_held_out_too():
    rows = []
    for n in range(20):
        rows.append({"prompt": messages((U, str(n % 10))), "chosen": FOUR, "rejected": FIVE})
    rows = Dataset.from_list(rows)
    train, held = hold_out(rows, 0.1)
    assert [len(train), len(held)] == [18, 2]
    assert held[0]["prompt"] == held[1]["prompt"]


@pytest.mark.parametrize(
    "name",
    [
        "rows.jsonl",
        "rows.json",
        "rows.csv",
        "rows.parquet",
        "rows.jsonl.gz",
        "rows.csv.gz",
        "folder",
    ],
)
def test_rows_are_read_from_files(tmp_path, name):
    rows = [PAIR, {**PAIR, "chosen": "w8"}]
    path = tmp_path / name
    table = Dataset.from_list(rows)
    if name == "folder":
        path.mkdir()
        table.to_json(path / "train.jsonl")
    elif ".parquet" in name:
        table.to_parquet(path)
    else:
        plain = tmp_path / "plain"
        if ".csv" in name:
            table.to_csv(plain)
        else:
            table.to_json(plain, lines=name != "rows.json")
        text = plain.read_bytes()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert load_rows(str(path)).to_list() == rows


def test_columns_of_other_names_are_mapped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"prompt": "not this", "instruction": "p", "output_1": "a", "output_2": "b"})
    )
    rows = load_rows(
        str(path), columns={"prompt": "instruction", "chosen": "output_1", "rejected": "output_2"}
    )
    assert to_comparison(rows[0]) == Comparison("p", ("a", "b"), (1, 2))
    assert sorted(rows.column_names) == ["chosen", "prompt", "rejected"]
    with pytest.raises(ValueError, match="no column 'question'; it has .*'instruction'"):
        load_rows(str(path), columns={"prompt": "question"})


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "header.csv").write_text("prompt,chosen,rejected\n")
    (tmp_path / "semicolons.csv").write_text("prompt;chosen;rejected\na;b;c\n")
    (tmp_path / "commas.tsv").write_text("prompt,chosen,rejected\na,b,c\n")
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "rows.txt").write_text("a")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b", \n')
    (tmp_path / "surrogate.jsonl").write_text('{"prompt": "a"}\n{"prompt": "\\ud800"}\n')
    (tmp_path / "latin.jsonl").write_bytes(
        '{"prompt": "a"}\n{"prompt": "\xe9"}\n'.encode("latin-1")
    )
    (tmp_path / "lists.jsonl").write_text("[1]\n[2]\n")
    (tmp_path / "array.json").write_bytes('[{"prompt": "a"}, {"prompt": "\xe9"}]'.encode("latin-1"))
    (tmp_path / "open.json").write_text('[{"prompt": "a"},')
    with pytest.raises(FileNotFoundError, match="missing.jsonl' does not exist"):
        load_rows(str(tmp_path / "missing.jsonl"))
    for name, message in (
        ("empty.jsonl", "it has no rows"),
        ("header.csv", "it has no rows"),
        ("semicolons.csv", "its only column is 'prompt;chosen;rejected'; expected columns separated by commas"),
        ("commas.tsv", "its only column is 'prompt,chosen,rejected'; .* by tabs in a .tsv file"),
        ("none.json", "it has no rows"),
        ("rows.txt", "another kind"),
        ("broken.jsonl", "broken.jsonl' cannot be read: line 3 is not JSON"),
        ("surrogate.jsonl", "line 2 is not valid Unicode"),
        ("latin.jsonl", "line 2 is not valid Unicode"),
        ("lists.jsonl", "line 1 is not an object with columns"),
        ("array.json", "element 2 is not valid Unicode"),
        ("open.json", "open.json' cannot be read: Expecting value: line 1 column 18"),
    ):
        with pytest.raises(ValueError, match=message):
            load_rows(str(tmp_path / name))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "folder"])
def test_lines_that_are_not_json_are_skipped_on_request(tmp_path, name, caplog):
    lines = [
        json.dumps(PAIR),
        "{not json",
        json.dumps({**PAIR, "chosen": "w8"}),
        '{"prompt": "\\ud800"}',
        "",
        json.dumps({**PAIR, "chosen": None}),
    ]
    path = tmp_path / name
    text = "\n".join(lines).encode()
    if name == "folder":
        path.mkdir()
        (path / "train.jsonl").write_bytes(text)
    else:
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    for streaming in (False, True):
        with pytest.raises(ValueError, match="line 2 is not JSON"):
            list(load_rows(str(path), streaming=streaming))
    rows = load_rows(str(path), on_bad_row="skip")
    streamed = list(load_rows(str(path), on_bad_row="skip", streaming=True))
    assert [row["chosen"] for row in streamed if row.get("chosen")] == ["w6", "w8"]
    assert len(streamed) == len(rows) == 5
    with pytest.raises(
        ValueError, match=r"^Row 2 of the data cannot be used: line 2 is not JSON \(Expecting"
    ):
        tokenize_rows(rows, word_tokenizer(), 9)
    kept = tokenize_rows(rows, word_tokenizer(), 9, on_bad_row="skip", name=name)
    # The two bad lines and the null are dropped.
    assert len(kept) == 2
    assert caplog.messages[-1] == f"Dropped 3 of 5 comparisons of {name}: bad row (3)."
    assert path.exists()
    assert path.is_dir() or text == (
        gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    )


def test_values_stay_as_they_are_written_anywhere_in_a_file(tmp_path):
    "A reader of tables would derive the types from the first 10 MB of this file."
    late = [
        {"prompt": [{"role": "user", "content": "q"}], "chosen": "42", "rejected": "null"},
        {**PAIR, "prompt": 3},
        {**PAIR, "margin": 1.5},
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2.5]},
        {**PAIR, "prompt": "7", "margin": 2},
    ]
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps({**PAIR, "prompt": "p" * 6000}) + "\n" for _ in range(1_800))
        file.writelines(json.dumps(row) + "\n" for row in late)
    assert path.stat().st_size > 10_000_000
    rows = load_rows(str(path))
    for row, expected in zip(rows.select(range(1_800, 1_805)), late, strict=True):
        assert {name: value for name, value in row.items() if value is not None} == expected
    assert list(load_rows(str(path), streaming=True))[-5:] == late
    with pytest.raises(
        ValueError, match=r"^Row 1802 of the data cannot be used: found 3; expected a text"
    ):
        tokenize_rows(
            rows.select_columns(rows.column_names),
            word_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"),
            999,
        )


@pytest.mark.parametrize(
    "name, text",
    [
        ("rows.jsonl", '{"prompt": "é", "responses": ["a", "b"], "scores": [NaN, 1]}\r\n'),
        ("rows.json", '[{"prompt": "é", "responses": ["a", "b"], "scores": [NaN, 1]}]'),
        ("rows.csv.jsonl", '{"prompt": "é", "responses": ["a", "b"], "scores": [NaN, 1]}'),
        ("rows.csv", 'prompt,responses,scores\r\né,"[""a"", ""b""]","[NaN, 1]"\r\n'),
    ],
)
def test_marks_and_line_ends_of_other_systems_are_no_content(tmp_path, name, text):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    for streaming in (False, True):
        (row,) = load_rows(str(tmp_path / name), streaming=streaming)
        assert row["prompt"] == "é"
        with pytest.raises(ValueError, match="(?i)found '?nan'? as scores"):
            to_comparison(row)


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "rows.jsonl"
    for chosen in ("w6", "w8"):
        path.write_text(json.dumps({**PAIR, "chosen": chosen}))
        assert load_rows(str(path))[0]["chosen"] == chosen


def test_a_csv_is_read_cell_by_cell(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        "prompt,chosen,rejected,margin,score_chosen,score_rejected\n2+2=,4,5,1.5,,\n3+3=,six,6,,2,1\n"
    )
    first, second = map(to_comparison, load_rows(str(path)))
    assert (first.responses, first.margin, first.ratings) == (("4", "5"), 1.5, None)
    assert (second.responses, second.margin, second.ratings) == (("six", "6"), None, (2.0, 1.0))
    path.write_text('prompt,responses,scores\np,"[""a"", ""b""]","[1, 2]"\n')
    assert to_comparison(load_rows(str(path))[0]) == Comparison("p", ("a", "b"), (2, 1), (1.0, 2.0))
    chat = json.dumps(ASKED + FOUR).replace('"', '""'), json.dumps(ASKED + FIVE).replace('"', '""')
    path.write_text('chosen,rejected\n"%s","%s"\n' % chat)
    assert to_comparison(load_rows(str(path))[0]) == Comparison(ASKED, (FOUR, FIVE), (1, 2))
    for text, message in (
        ("prompt,chosen,rejected\nq,a,b,\n", "line 2 has 4 cells for 3 columns"),
        ("prompt,chosen,rejected\nq,a\n", "has 2 cells"),
        ("prompt,prompt\na,b\n", "not all different"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_rows(str(path))


@pytest.mark.parametrize(
    "text, message, left",
    [
        ('q,a,"b\nq2,a2,b2\nq3,a3,b3\n', "lines 2 to 4 are not CSV", []),  # all of it was one cell
        ('q,a,"b"x\nq2,a2,b2\n', "line 2 is not CSV", ["q2"]),  # was bx
        ('"Say "hi" to me",a,b\nq2,a2,b2\n', "line 2 is not CSV", ["q2"]),
        ('q2,a2,b2\nq,"a\n",\'b\nq,"a\n"",b\n', "lines 5 to 6 are not CSV", ["q2", "q"]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_quotes_of_a_csv_that_do_not_fit_are_bad_rows(text, message, left, streaming, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected\n" + text)
    with pytest.raises(ValueError, match=message):
        list(load_rows(str(path), streaming=streaming))
    rows = list(load_rows(str(path), streaming=streaming, on_bad_row="skip"))
    assert [row["prompt"] for row in rows if not row.get("unreadable")] == left
    assert [message in row["unreadable"] for row in rows if row.get("unreadable")] == [True]


def test_quotes_of_the_first_line_of_a_csv_are_checked(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,chosen,"rejected\nq,a,b\n')
    with pytest.raises(ValueError, match="lines 1 to 2 are not CSV"):
        load_rows(str(path), on_bad_row="skip")


TWICE = '{"prompt": "q", "chosen": "a", "chosen": "c", "rejected": "b"}'


@pytest.mark.parametrize(
    "name, text",
    [
        ("rows.jsonl", TWICE),
        ("rows.json", f"[{TWICE}]"),
        ("rows.jsonl", '{"prompt": [{"role": "user", "content": "q", "content": "r"}], "chosen": "a"}'),
    ],
)
def test_keys_that_are_written_twice_are_refused(name, text, tmp_path):
    "Python keeps the last value, and the other would be lost without a word."
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match="an object has the key '(chosen|content)' twice; expected each key once"):
        load_rows(str(path))


def test_keys_that_are_written_twice_in_a_cell_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    message = '[{"role": "user", "content": "a", "content": "b"}]'
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], [message, "a", "b"]])
    with pytest.raises(ValueError, match="an object has the key 'content' twice"):
        load_rows(str(path))
    with pytest.raises(ValueError, match="an object has the key 'k' twice"):
        to_comparison({**PAIR, "chat_template_kwargs": '{"k": 1, "k": 2}'})


CONVERSATIONS = [  # one conversation, as it may be written
    json.dumps(ASKED + FOUR),
    json.dumps(ASKED + FOUR, indent=2),
    json.dumps(ASKED + FOUR, separators=(",", ":"), ensure_ascii=False),
    "\n\t " + json.dumps(ASKED + FOUR, indent="\t", sort_keys=True) + "\r\n",
    '[ { "content" : "2+2?" , "name": null, "role" : "user" } , {"role":"assistant","content":"4"} ]',
]


@pytest.mark.parametrize("written", CONVERSATIONS)
@pytest.mark.parametrize("streaming", [False, True])
def test_cells_of_a_csv_hold_conversations_however_they_are_written(written, streaming, tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["good", "rejected", "notes"], [written, json.dumps(ASKED + FIVE), written]])
    (row,) = load_rows(str(path), columns={"chosen": "good"}, streaming=streaming)
    assert to_comparison(row) == Comparison(ASKED, (FOUR, FIVE), (1, 2))
    assert row["notes"] == written  # no text


@pytest.mark.parametrize(
    "cell",
    [
        '[{"role": "admin"}] is JSON.',
        '[{"sum": 4}]',
        "[1, 2]",
        "[]",
        "{}",
        '{"answer": "4"}',
        "[{'sum': 4}]",
        '[{"role"',
        "[",
    ],
)
def test_other_cells_of_a_csv_stay_text(cell, tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], ["p", cell, "r"]])
    assert to_comparison(load_rows(str(path))[0]).responses == (cell, "r")


@pytest.mark.parametrize(
    "cell, message",
    [
        (str(ASKED + FOUR), "line 2 cannot be read: .* begins like messages, but is not JSON"),  # as pandas writes it
        ("[{'content': '4', 'role': 'assistant'}\n {'content': 5}]", "begins like messages"),  # as numpy writes it
        (json.dumps(ASKED + FOUR)[:-5], "begins like messages, but is not JSON"),
    ],
)
def test_cells_of_a_csv_that_are_no_json_are_bad_rows(cell, message, tmp_path, caplog):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], ["w5 ", cell, "w7"], ["w5 ", "w6", "w7"]])
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            list(load_rows(str(path), streaming=streaming))
    rows = load_rows(str(path), on_bad_row="skip")
    assert len(tokenize_rows(rows, word_tokenizer(), 9, on_bad_row="skip")) == 1


@pytest.mark.parametrize(
    "cell, message",
    [
        ('[{"from": "human", "value": "q"}]', "It has from and value"),
        ('[{"role": "admin"}]', "has no content; expected role and content"),
        ('{"role": "user", "content": "q"}', "found {'role': 'user', 'content': 'q'}; expected a text"),
        ('[{"role": "user", "content": "q"}, {"text": "a"}]', "has no role"),
    ],
)
def test_messages_of_a_csv_are_checked(cell, message, tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], ["p", cell, "r"]])
    with pytest.raises(ValueError, match=message):
        to_comparison(load_rows(str(path))[0])


ANSWERS_IN_JSON = [*CONVERSATIONS, json.dumps(FOUR), '[{"role": "user", "content": "hello"}]', str(FOUR)]


@pytest.mark.parametrize("answer", ANSWERS_IN_JSON)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_strings_of_typed_files_stay_strings(answer, kind, tmp_path):
    "A reward model may score answers that are JSON, also such with a role."
    row = {"prompt": answer, "chosen": answer, "rejected": "no", "response": answer}
    path = str(tmp_path / f"rows.{kind}")
    if kind == "parquet":
        Dataset.from_list([row]).to_parquet(path)
    else:
        Path(path).write_text(json.dumps([row] if kind == "json" else row))
    for streaming in (False, True):
        (loaded,) = load_rows(path, streaming=streaming)
        assert loaded == row
        assert to_comparison(loaded) == Comparison(answer, (answer, "no"), (1, 2))
        assert to_responses({"prompt": answer, "response": answer}).responses == (answer,)
        assert to_responses({"text": answer}).prompt == answer
    listed = {"prompt": "p", "responses": [answer, "no"], "scores": [2, 1]}
    assert to_comparison(listed).responses == (answer, "no")


def test_conversations_in_strings_of_typed_files_are_reported(caplog):
    rows = Dataset.from_list([{"prompt": "w5 ", "chosen": json.dumps(FOUR), "rejected": "w7"}] * 3)
    message = "The column chosen has messages that are written as JSON, in a file with types"
    tokenize_rows(rows, word_tokenizer(), 99, name="rows.parquet")
    assert any(line.startswith(f"rows.parquet: {message}") for line in caplog.messages)
    assert audit(rows)["problems"][0].startswith(message)
    one = Dataset.from_list([*rows, PAIR])  # an answer may be JSON
    assert not [line for line in audit(one)["problems"] + audit(one)["notes"] if message in line]


OTHER_FORMS = {
    "tuple of Python": str(tuple(FOUR)),
    "array of numpy": f"array({FOUR}, dtype=object)",
    "JSON twice": json.dumps(json.dumps(FOUR)),
    "object with messages": json.dumps({"messages": FOUR}, indent=1),
    "a line for each": "\n".join(map(json.dumps, FOUR + FIVE)),
    "capital letters": json.dumps([{"Role": "user", "Content": "w6"}]),
    "list in a list": json.dumps([FOUR]),
    "speakers": json.dumps([{"speaker": "user", "text": "w6"}]),
    "mark of a file": "\ufeff" + json.dumps(FOUR),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_conversations_in_other_forms_are_reported(form, tmp_path, caplog):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["chosen", "rejected"], [OTHER_FORMS[form], "w7"], [OTHER_FORMS[form], "w8"]])
    rows = load_rows(str(path))
    assert rows["chosen"][:] == [OTHER_FORMS[form]] * 2
    message = "The column chosen has strings with roles in them, such as "
    assert audit(rows)["problems"][0].startswith(message)
    tokenize_rows(rows, word_tokenizer(), 999, on_bad_row="skip")
    assert any(f"the data: {message}" in line for line in caplog.messages)
    caplog.clear()
    answer = {"prompt": "w5 ", "chosen": OTHER_FORMS[form], "rejected": "w7"}
    for plain in (PAIR, {**PAIR, "chosen": '{"name": "Ada"}'}, {**PAIR, "chosen": "The role: 'x'"}):
        assert not columns.messages_as_strings([answer, plain])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_csv_of_a_hub_has_no_types_either(streaming, tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        rows = [[written, json.dumps(ASKED + FIVE), index] for index, written in enumerate(CONVERSATIONS)]
        csv.writer(file).writerows([["good", "rejected", "margin"], *rows, ["w6", "w7", 1], [str(FOUR), "w7", 1]])

    def load_dataset(name, split, streaming):
        return datasets.load_dataset("csv", data_files=str(path), split=split, streaming=streaming)

    monkeypatch.setattr(loading, "load_dataset", load_dataset)
    loaded = list(load_rows("someone/rows", columns={"chosen": "good"}, streaming=streaming))
    for index, row in enumerate(loaded[:-2]):
        assert to_comparison(row) == Comparison(ASKED, (FOUR, FIVE), (1, 2), margin=index)
    assert (loaded[-2]["chosen"], loaded[-2]["rejected"]) == ("w6", "w7")
    with pytest.raises(ValueError, match="the chosen in this row cannot be read: .* begins like messages"):
        to_comparison(loaded[-1])


def call(arguments, **fields):
    function = {"name": "book", "arguments": arguments}
    return [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function, **fields}]}]


SEAT = {"type": "object", "properties": {"seat": {"type": ["string", "null"], "enum": ["a", None], "default": None}}}
TOOLS = [{"type": "function", "function": {"name": "book", "parameters": SEAT}}]
NULLS = [
    ({"seat": None, "row": 3}, {"row": 3}),
    ({"seat": None}, {}),
    ({"at": {"seat": None}}, {"at": {}}),
    ({"seats": [{"number": None}]}, {"seats": [{}]}),
    ({"seats": [None, 1]}, {"seats": [1]}),
    (None, {}),
]


@pytest.mark.parametrize("chosen, rejected", NULLS)
def test_nulls_of_tool_calls_and_schemas_are_values(chosen, rejected, tmp_path):
    row = {"prompt": ASKED, "chosen": call(chosen), "rejected": call(rejected), "tools": TOOLS}
    row["chat_template_kwargs"] = {"documents": [{"title": None}], "think": None}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    as_json = {**row, "tools": json.dumps(TOOLS)}
    template = "{{ tools | tojson }}{% for m in messages %}{{ m.tool_calls | default([]) | tojson }}{% endfor %}"
    tokenizer = chat_tokenizer("qwen")
    tokenizer.chat_template = template
    for read in (row, as_json, load_rows(str(path))[0], next(iter(load_rows(str(path), streaming=True)))):
        comparison = to_comparison(read)
        assert comparison.responses == (call(chosen), call(rejected))
        assert comparison.template == {"documents": [{"title": None}], "tools": TOOLS}
        texts = render_comparison(comparison, tokenizer)
        for text, response in zip(texts, (chosen, rejected), strict=True):
            messages = ASKED + call(response)
            assert text == tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    assert len(tokenize_rows(load_rows(str(path)), tokenizer, 9_999)) == 1  # winner and loser differ


def test_nulls_that_a_table_puts_around_arguments_are_removed():
    rows = [
        {"prompt": ASKED, "chosen": call({"row": 1}, id="x"), "rejected": FIVE},
        {"prompt": messages((U, "q")), "chosen": FOUR, "rejected": FIVE},
        {"prompt": ASKED, "chosen": call({"row": 2}), "rejected": FIVE},
    ]
    rows[1]["chosen"] = [{**FOUR[0], "name": "n"}]
    for row, read in zip(rows, Dataset.from_list(rows), strict=True):
        assert to_comparison(read).responses == (row["chosen"], row["rejected"])


@pytest.mark.parametrize("column", ["chosen", "tools"])
def test_nulls_that_a_table_may_have_filled_in_are_reported(column, caplog):
    other = [{"type": "function", "function": {"name": "g", "parameters": {"type": "object", "title": "t"}}}]
    rows = [
        {"prompt": ASKED, "chosen": call({"row": 1}), "rejected": FIVE, "tools": TOOLS},
        {"prompt": ASKED, "chosen": call({"row": 1}), "rejected": FIVE, "tools": TOOLS},
    ]
    plain = [{**row, "tools": None} for row in rows]
    assert not columns.nulls_of_tables(Dataset.from_list(plain))
    if column == "chosen":
        rows = plain
        rows[1]["chosen"] = call({"seat": 1})
    else:
        rows[1]["tools"] = other
    (warning,) = columns.nulls_of_tables(Dataset.from_list(rows))
    assert warning.startswith(f"The column {column} stores ")
    assert "null in rows that do not have them" in warning
    as_json = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    if column == "tools":
        assert not columns.nulls_of_tables(Dataset.from_list(as_json))


def test_long_cells_leave_the_limit_of_the_process_as_it_is(tmp_path):
    limit = csv.field_size_limit()
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,chosen,rejected\n{'a' * (limit + 1)},b,c\n")
    stream = iter(load_rows(str(path), streaming=True))
    assert len(next(stream)["prompt"]) == limit + 1
    assert csv.field_size_limit() == limit  # although the stream is still open
    assert len(load_rows(str(path))[0]["prompt"]) == limit + 1
    assert csv.field_size_limit() == limit


def test_a_long_cell_is_read_without_a_change_of_the_limit(monkeypatch):
    limit = csv.field_size_limit()

    def refuse(*new_limit):
        raise AssertionError(f"csv.field_size_limit{new_limit} during a read")

    def lines():
        "Lines of a file; while each is read, `csv` rejects a long cell elsewhere in the process as before."
        for line in ("chosen,rejected\n", f'"{"a" * limit}\n', 'a","b\n', 'c"\n', "d,e,f\n", "\n", "g,h\n"):
            with pytest.raises(csv.Error, match=f"larger than field limit .{limit}."):
                next(csv.reader(["a" * (limit + 1)]))
            yield line

    monkeypatch.setattr(csv, "field_size_limit", refuse)
    monkeypatch.setattr("_csv.field_size_limit", refuse)
    rows = list(records._csv_records(lines(), (), ","))
    assert rows == [
        {"chosen": "a" * limit + "\na", "rejected": "b\nc"},
        {UNREADABLE: "the row that ends in line 5 has 3 cells for 2 columns"},
        {"chosen": "g", "rejected": "h"},
    ]
    monkeypatch.undo()
    assert csv.field_size_limit() == limit


def test_what_is_not_gzip_or_ends_early_is_named(tmp_path):
    whole = gzip.compress(json.dumps(PAIR).encode() * 99)
    for text in (b'{"prompt": "a"}', whole[:-20]):
        (tmp_path / "rows.jsonl.gz").write_bytes(text)
        with pytest.raises(ValueError, match="rows.jsonl.gz' cannot be read: "):
            load_rows(str(tmp_path / "rows.jsonl.gz"))


def test_folders_hold_files_of_one_kind(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR))
    (tmp_path / "b.json").write_text(json.dumps([PAIR, PAIR]))
    (tmp_path / "README.md").write_text("words")
    assert len(load_rows(str(tmp_path))) == 3
    with pytest.raises(
        ValueError, match=r"has 0 files for the split 'test'.*Its splits are \['train'\]"
    ):
        load_rows(str(tmp_path), split="test")
    (tmp_path / "c.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    with pytest.raises(
        ValueError, match=r"has 3 files for the split 'train', of the kinds \['csv', 'json'\]"
    ):
        load_rows(str(tmp_path))


@pytest.mark.parametrize(
    "prompt, chosen, rejected",
    [
        ("3+3?", ASKED + FOUR, ASKED + FIVE),
        (ASKED, SYSTEM + FOUR, SYSTEM + FIVE),
        (ASKED, ASKED + FOUR, FIVE),
        (messages((U, "3+3?")), ASKED + FOUR, ASKED + FIVE),
    ],
)
def test_conversations_that_do_not_hold_their_prompt_are_refused(prompt, chosen, rejected):
    with pytest.raises(ValueError, match="but is not a conversation that holds the prompt"):
        to_comparison({"prompt": prompt, "chosen": chosen, "rejected": rejected})


def test_words_of_a_csv_stay_words(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected\nAny left?,None,NA\n,yes,null\n")
    assert [to_comparison(row) for row in load_rows(str(path))] == [
        Comparison("Any left?", ("None", "NA"), (1, 2)),
        Comparison("", ("yes", "null"), (1, 2)),
    ]


SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(
    not SHARED.is_dir(),
    reason="the real preference files are in ../shared only where the library is developed",
)
@pytest.mark.parametrize(
    "name, rows, pairs, longer, repeated",
    [  # figures counted without this library, by plain loops over the JSON
        ("pairs_train.jsonl", 4322, 4322, 0.581, 5),
        ("pairs_eval.jsonl", 790, 790, 0.574, 0),
        ("ranked_k4_train.jsonl", 382, 2089, 0.497, 0),
        ("ranked_k4_eval.jsonl", 70, 386, 0.557, 0),
        ("ranked_k5.jsonl", 80, 772, 0.802, 0),
        ("gsm8k_solutions.jsonl", 400, 1327, 0.538, 0),
        ("llmbar.jsonl", 395, 395, 0.278, 0),
        ("long_prompts_k3.jsonl", 30, 89, 0.674, 0),
    ],
)
def test_real_files_are_read_tokenized_and_audited(name, rows, pairs, longer, repeated):
    table = load_rows(str(SHARED / name))
    sample = table.select(range(0, rows, rows // 15))  # its tokenizer makes a token of each letter
    tokenized = tokenize_rows(sample, chat_tokenizer("qwen"), 100_000, name=name)
    report = audit(table, name=name)
    assert len(tokenized) == len(sample)
    assert len(table) == report["comparisons"] == rows
    assert report["bad_rows"] == 0
    assert not report["problems"]
    assert [row["ranks"] for row in tokenized] == [list(to_comparison(row).ranks) for row in sample]
    assert report["pairs"] == pairs
    assert round(report["overall"]["longer_wins"], 3) == longer
    assert report["duplicates"] == repeated


@pytest.mark.skipif(
    not SHARED.is_dir(),
    reason="the real preference files are in ../shared only where the library is developed",
)
def test_a_real_file_without_texts_is_refused():
    with pytest.raises(ValueError, match="element 1 is not an object with columns"):
        load_rows(str(SHARED / "hh_lengths.json"))
    report = audit(load_rows(str(SHARED / "hh_lengths.json"), on_bad_row="skip"))
    assert report["comparisons"] == 0
    assert report["bad_rows"] == 2312
    assert "element 1 is not" in report["problems"][0]


def test_lengths_for_the_benchmark(tmp_path, python):
    "The script writes the lengths of prompt and responses, in tokens of a tokenizer trained on the texts."
    begin = "\n\nHuman: say it\n\nAssistant: "
    row = {"chosen": begin + " hello" * 3, "rejected": begin + " hello" * 9}
    (tmp_path / "test.jsonl").write_text((json.dumps(row) + "\n") * 30)
    subprocess.run(
        [
            python,
            Path(__file__).parents[1] / "benchmarks/hh_lengths.py",
            tmp_path / "lengths.json",
            tmp_path / "test.jsonl",
        ],
        check=True,
    )
    lengths = json.loads((tmp_path / "lengths.json").read_text())
    assert len(lengths) == 30
    assert lengths[0][2] > lengths[0][1] >= 1
    assert lengths[0][0] >= 1
    assert lengths[0] == lengths[-1]
