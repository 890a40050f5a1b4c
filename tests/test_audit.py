import json

import pytest
from datasets import Dataset

from architectures import word_tokenizer
from rlhf_reward.audit import audit, audit_table
from rlhf_reward.cli import main

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
MANY = [
    {
        "prompt": f"Question {n}",
        "chosen": f"yes {n}",
        "rejected": f"no, not {n}",
        "source": "xy"[n % 2],
    }
    for n in range(200)
]
K3 = [
    {"prompt": f"Question {n}", "responses": [f"a{n}", f"bb{n}", f"ccc{n}"], "scores": [1, 3, 2]}
    for n in range(20)
]


def audited(rows, **options):
    return audit(Dataset.from_list(rows), **options)


def test_sound_rows_have_no_problems():
    report = audited(MANY)
    assert report["problems"] == report["notes"] == []
    assert report["comparisons"] == report["pairs"] == report["rows"] == 200
    assert report["forms"] == {"prompt, chosen, rejected": 200}
    assert report["responses"] == {2: 200}
    assert {source: part["comparisons"] for source, part in report["by_source"].items()} == {
        "x": 100,
        "y": 100,
    }
    assert report["overall"]["comparisons"] == 200
    # 10 of 5, 90 of 6, 100 of 7
    assert report["lengths"]["chosen"] == pytest.approx(
        {"min": 5, "5%": 5.95, "median": 6.5, "95%": 7, "max": 7}
    )
    assert "No problems found." in audit_table(report)


def changed(rows, indices, **values):
    return [{**row, **values} if index in indices else row for index, row in enumerate(rows)]


@pytest.mark.parametrize(
    "rows, count, value, kind, text",
    [
        (
            changed(MANY, {3, 4}, chosen=None),
            "bad_rows",
            2,
            "problems",
            "2 row(s) cannot be used. Row 4 of the data cannot be used: found None",
        ),
        (
            changed(MANY, {3, 4}, rejected=""),
            "empty_responses",
            2,
            "notes",
            "2 of 200 comparisons: an empty response (row 4, 5).",
        ),
        (
            changed(MANY, {3, 4, 5}, rejected=""),
            "empty_responses",
            3,
            "problems",
            "3 of 200 comparisons: an empty response",
        ),
        (
            changed(MANY, {3, 4, 5}, chosen="same", rejected="same"),
            "identical",
            3,
            "problems",
            "winner and loser are the same text (row 4, 5, 6)",
        ),
        (
            MANY + MANY[:4],
            "duplicates",
            4,
            "problems",
            "the same as an earlier row (row 201, 202, 203, …)",
        ),
        (MANY + MANY[:2], "duplicates", 2, "notes", "the same as an earlier row"),
        (
            [*MANY, {**MANY[7], "chosen": MANY[7]["rejected"], "rejected": MANY[7]["chosen"]}],
            "contradictions",
            2,
            "notes",
            "B above A, for one prompt (row 8, 201)",
        ),
        (
            changed(MANY, range(9), prompt=""),
            "empty_prompts",
            9,
            "notes",
            "9 of 200 comparisons: an empty prompt",
        ),
        (
            [{**row, "score_chosen": 1.0, "score_rejected": 2.0} for row in MANY],
            "inverted_scores",
            200,
            "problems",
            "the chosen response has the lower score",
        ),
        (
            [
                {**row, "score_chosen": float(n > 50), "score_rejected": 0.5}
                for n, row in enumerate(MANY)
            ],
            "inverted_scores",
            51,
            "notes",
            "the lower score",
        ),
        (
            changed(K3, {2}, scores=[1, 1, 1]),
            "all_tied",
            1,
            "notes",
            "1 of 20 comparisons: all responses tie (row 3).",
        ),
        (
            changed(K3, {2}, scores=[1, 1, 1]),
            "constant_scores",
            1,
            "notes",
            "1 of 20 comparisons: all scores are the same (row 3).",
        ),
        (
            [{**row, "score_chosen": 5, "score_rejected": 5} for row in MANY],
            "constant_scores",
            200,
            "problems",
            "all scores are the same",
        ),
        (
            [
                {**row, **dict.fromkeys(["score_chosen", "score_rejected"], 5 if n < 90 else None)}
                for n, row in enumerate(MANY)
            ],
            "constant_scores",
            90,
            "problems",
            "the same",
        ),
        (
            [
                {**row, "score_chosen": 5 + (n == 0), "score_rejected": 5}
                for n, row in enumerate(MANY)
            ],
            "constant_scores",
            199,
            "notes",
            "the same",
        ),
        (
            [{**row, "ranks": [1, 2, 3]} for row in K3],
            "inverted_scores",
            20,
            "problems",
            "the chosen response has the lower score",
        ),
        (
            [{**row, "chosen": row["prompt"] + "yes", "rejected": row["prompt"]} for row in MANY],
            "repeated_prompts",
            200,
            "problems",
            "begins with the prompt",
        ),
        (
            changed(K3, range(20), scores=[1, 1, 1]),
            "constant_scores",
            20,
            "problems",
            "There is nothing to learn",
        ),
        (
            K3,
            "constant_scores",
            0,
            "notes",
            "The scores of every row are 1 to K. If 1 is best they are ranks",
        ),
        ([], "comparisons", 0, "problems", "There is nothing to learn"),
    ],
)
def test_faults_are_found(rows, count, value, kind, text):
    report = audited(rows)
    assert report[count] == value
    assert any(text in line for line in report[kind])
    other = "notes" if kind == "problems" else "problems"
    assert not any(text in line for line in report[other])
    assert text in audit_table(report)


def test_rows_that_only_look_faulty_are_not_reported():
    def call(city):
        tool_call = {"name": "weather", "arguments": {"city": city}}
        return {"role": "assistant", "content": None, "tool_calls": [tool_call]}

    asked = [{"role": "user", "content": "Weather?"}]
    report = audited([{"prompt": asked, "chosen": [call("Paris")], "rejected": [call("Rome")]}])
    assert report["problems"] == report["notes"] == []
    whole = audited(
        [{"chosen": "one", "rejected": "one two"}, {"chosen": "three", "rejected": "four"}]
    )
    assert whole["empty_responses"] == whole["identical"] == 0
    ids = audited([{"chosen_ids": [1, 2], "rejected_ids": [1, 2, 3]}])
    assert ids["problems"] == ids["notes"] == []
    same = audited([{**PAIR, "chosen": "b"}])
    assert same["identical"] == 1
    assert same["contradictions"] == 0


def test_sources_of_any_name_are_counted():
    rows = [
        {**PAIR, "prompt": str(n), "source": source}
        for n, source in enumerate(["all", "(none)", None, "all"])
    ]
    report = audited(rows)
    assert {source: part["comparisons"] for source, part in report["by_source"].items()} == {
        "": 1,
        "(none)": 1,
        "all": 2,
    }
    assert report["overall"]["comparisons"] == 4


def test_more_rows_than_are_held_at_once():
    rows = [{**PAIR, "prompt": f"Question {n}"} for n in range(10_001)] + [
        {**PAIR, "prompt": "Question 0", "chosen": "b", "rejected": "a"}
    ]
    report = audited(rows)
    assert report["comparisons"] == 10_002
    assert report["contradictions"] == 2
    assert "(row 1, 10002)" in report["notes"][0]


def test_contradictions_are_found_between_forms_and_within_rankings():
    ranking = {
        "prompt": "Question 7",
        "responses": ["no, not 7", "so", "yes 7"],
        "ranks": [1, 2, 3],
    }
    rows = [{**row, "responses": None, "ranks": None} for row in MANY] + [
        {**dict.fromkeys(MANY[0]), **ranking}
    ]
    report = audited(rows)
    assert report["contradictions"] == 2
    assert "(row 8, 201)" in report["notes"][0]
    assert report["responses"] == {2: 200, 3: 1}
    assert set(report["forms"].values()) == {200, 1}


def test_scores_that_may_be_ranks_are_distinguished_from_scores():
    for scores, is_noted in (([1, 3, 2], True), ([1, 3, 0], False), ([1, 2], False)):
        rows = [
            *K3,
            {"prompt": "p", "responses": ["a", "bb", "ccc"][: len(scores)], "scores": scores},
        ]
        assert any("1 to K" in note for note in audited(rows)["notes"]) == is_noted


def test_prompts_shared_with_other_rows_are_a_problem():
    against = Dataset.from_list([{**PAIR, "prompt": " question   7\n"}])
    report = audited(MANY, against=against)
    assert report["shared_prompts"] == 1
    assert report["problems"] == [
        "1 of 200 comparisons: a prompt of the other rows (leakage) (row 8)."
    ]
    assert audited(MANY, against=Dataset.from_list([PAIR]))["problems"] == []
    as_messages = Dataset.from_list(
        [{**PAIR, "prompt": [{"role": "user", "content": "QUESTION 8"}]}]
    )
    assert audited(MANY, against=as_messages)["shared_prompts"] == 1
    bad = audited(
        MANY,
        against=Dataset.from_list([{**PAIR, "prompt": "Question 3"}, {**PAIR, "chosen": None}]),
    )
    assert bad["shared_prompts"] == 1
    assert bad["notes"][0].startswith("1 of the other rows cannot be used")
    assert "Row 2 of the other rows" in bad["notes"][0]


def test_overlong_comparisons_are_counted_by_the_tokenizer():
    rows = [{"prompt": "w3 w4", "chosen": " w5 " + "w6 " * n, "rejected": " w6"} for n in range(10)]
    report = audited(rows, tokenizer=word_tokenizer(), max_length=8)  # 4 + n tokens
    assert report["overlong"] == 5
    assert report["notes"] == [
        "5 of 10 comparisons: more than 8 tokens, which training drops unless on_overlong says otherwise "
        "(row 6, 7, 8, …)."
    ]
    assert audited(rows, tokenizer=word_tokenizer(), max_length=3)["problems"]
    ids = [{"chosen_ids": [3] * 9, "rejected_ids": [4]}]
    assert audited(ids, tokenizer=word_tokenizer(), max_length=8)["overlong"] == 1


def test_messages_are_measured_by_their_contents():
    chat = [{"role": "user", "content": "12345"}]
    report = audited(
        [
            {
                "chosen": [*chat, {"role": "assistant", "content": "123"}],
                "rejected": [*chat, {"role": "assistant", "content": ""}],
            }
        ]
    )
    assert report["lengths"]["prompt"]["max"] == 5
    assert report["lengths"]["chosen"]["max"] == 3
    assert report["empty_responses"] == 1
    assert report["forms"] == {"chosen, rejected (messages)": 1}


def run(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["audit", *map(str, argv)])
    return exit.value.code, capsys.readouterr().out


def test_command_prints_a_table_or_json_and_exits_by_what_it_found(tmp_path, capsys):
    sound = tmp_path / "sound.jsonl"
    spoiled = tmp_path / "spoiled.jsonl"
    broken = tmp_path / "broken.jsonl"
    sound.write_text("\n".join(map(json.dumps, MANY)))
    spoiled.write_text("\n".join(map(json.dumps, changed(MANY, range(9), chosen=None))))
    broken.write_text(json.dumps(PAIR) + "\n{\n")
    status, table = run([sound], capsys)
    assert not status
    assert "longer wins" in table
    assert "No problems found." in table
    assert "x " in table
    status, output = run([spoiled, "--json"], capsys)
    assert status == 1
    assert json.loads(output)["bad_rows"] == 9
    status, table = run([broken], capsys)
    assert status == 1
    assert "1 row(s) cannot be used. Row 2 of" in table
    assert "line 2 is not JSON" in table
    status, table = run([sound, "--against", sound], capsys)
    assert status == 1
    assert "200 of 200 comparisons: a prompt of the other rows" in table
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text(sound.read_text().replace('"prompt"', '"question"'))
    status, table = run(
        [renamed, "--columns", "prompt=question", "--against", sound, "--against_columns", ""],
        capsys,
    )
    assert status == 1
    assert "200 of 200 comparisons: a prompt of the other rows" in table
    status, _ = run([tmp_path / "none.jsonl"], capsys)
    assert status.startswith("rlhf_reward audit: ")
    assert "does not exist" in status
    status, _ = run([sound, "--columns", "prompt"], capsys)
    assert "is not a map" in status


def test_command_takes_columns_and_a_tokenizer(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"question": f"w3 {n}", "chosen": " w4", "rejected": " w5 w6"})
            for n in range(9)
        )
    )
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "llama"}')
    status, output = run(
        [
            path,
            "--columns",
            "prompt=question",
            "--tokenizer",
            tmp_path / "tokenizer",
            "--max_length",
            "4",
            "--json",
        ],
        capsys,
    )
    report = json.loads(output)
    assert status == 1
    assert report["overlong"] == 9
    assert report["overall"]["longer_wins"] == 0


def test_a_row_that_cannot_be_rendered_is_named():
    messages = {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}],
    }
    problems = audited([messages] * 2, tokenizer=word_tokenizer())["problems"]
    assert problems[0].startswith(
        "2 row(s) cannot be used. Row 1 of the data cannot be used: it holds messages, but the tokenizer has no chat "
        "template"
    )
