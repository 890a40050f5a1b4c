"Rows of known sets, each exactly of its published schema, give the comparison that the same row has in the own form."
import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from torch.utils.data import DataLoader

from rlhf_reward.audit import audit
from rlhf_reward.comparison import Comparison
from rlhf_reward.forms import recognize_form, with_form
from rlhf_reward.known_forms import KNOWN_FORMS
from rlhf_reward.loading import load_rows
from rlhf_reward.rows import to_comparison


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def part(text):
    return [{"type": "text", "text": text, "image": None, "mimeType": None}]


def node(role, text, rank=None, replies=()):
    return {
        "message_id": text,
        "parent_id": None,
        "user_id": "u",
        "text": text,
        "role": role,
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "synthetic": False,
        "model_name": None,
        "rank": rank,
        "emojis": {"name": ["+1"], "count": [1]},
        "labels": {"name": ["spam"], "value": [0.0], "count": [3]},
        "replies": list(replies),
    }


def rated(response, fine, overall, *ratings):
    names = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    return {
        "annotations": {name: {"Rating": rating, "Rationale": "words"} for name, rating in zip(names, ratings)},
        "custom_system_prompt": "You are kind.",
        "model": "m",
        "principle": "helpfulness",
        "response": response,
        "critique": "words",
        "fine-grained_score": fine,
        "overall_score": overall,
    }


Q = [user("q")]
TWO = ([assistant("x")], [assistant("y")])
FIRST = Comparison(Q, TWO, (1, 2))
SECOND = Comparison(Q, TWO, (2, 1))
TIE = Comparison(Q, TWO, (1, 1))

HELPSTEER2 = {
    "split": "train",
    "prompt": "q",
    "response_1": "x",
    "response_2": "y",
    "preference_strength": -2,
    "preference_statement": "Response 1 is better.",
    "preference_elaboration": "words",
    "three_most_similar_preferences": [{"statement": "words", "elaboration": "words", "strength": -2}],
    "all_preferences_unprocessed": [{"statement": "words", "elaboration": "words", "strength": -2}],
}
HELPSTEER_RATINGS = {
    "prompt": "q",
    "response": "x",
    "helpfulness": 3,
    "correctness": 4,
    "coherence": 4,
    "complexity": 1,
    "verbosity": 0,
}
HELPSTEER3 = {
    "domain": "code",
    "language": "python",
    "context": Q,
    "response1": "x",
    "response2": "y",
    "overall_preference": -3,
    "individual_preference": [{"score": -3, "reasoning": "words", "feedback1": "words", "feedback2": "words"}],
}
PKU = {
    "prompt": "q",
    "response_0": "x",
    "response_1": "y",
    "prompt_source": "Alpaca3-70B",
    "response_0_source": "Alpaca3-8B",
    "response_1_source": "Alpaca-7B",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "response_0_harm_category": {"Privacy Violation": False},
    "response_1_harm_category": {"Privacy Violation": True},
    "response_0_severity_level": 0,
    "response_1_severity_level": 2,
    "better_response_id": 1,
    "safer_response_id": 0,
    "response_0_sha256": "00",
    "response_1_sha256": "01",
}
SHP = {
    "post_id": "p",
    "domain": "askbaking_train",
    "upvote_ratio": 0.9,
    "history": "q",
    "c_root_id_A": "a",
    "c_root_id_B": "b",
    "created_at_utc_A": 1,
    "created_at_utc_B": 2,
    "score_A": 7,
    "score_B": 3,
    "human_ref_A": "y",
    "human_ref_B": "x",
    "labels": 1,
    "seconds_difference": 1.0,
    "score_ratio": 2.3,
}
WEBGPT = {
    "question": {"dataset": "eli5", "id": "1", "full_text": "q"},
    "quotes_0": {"title": ["t"], "extract": ["e"]},
    "answer_0": "x",
    "tokens_0": {"prefix": [1], "completion": [2]},
    "score_0": -0.5,
    "quotes_1": {"title": ["t"], "extract": ["e"]},
    "answer_1": "y",
    "tokens_1": {"prefix": [1], "completion": [2]},
    "score_1": 0.5,
}
NECTAR = {
    "prompt": "\n\nHuman: q\n\nAssistant: ",
    "answers": [
        {"answer": "x", "model": "gpt-4", "rank": 2.0},
        {"answer": "y", "model": "llama", "rank": 1.0},
        {"answer": "z", "model": "other", "rank": 3.0},
    ],
    "turns": 1,
    "num_responses": 3,
    "source": ["sharegpt"],
    "good_natured": True,
}
ARENA_55K = {
    "id": 1,
    "model_a": "m",
    "model_b": "n",
    "prompt": json.dumps(["q", "r"]),
    "response_a": json.dumps(["x", "x2"]),
    "response_b": json.dumps(["y", "y2"]),
    "winner_model_a": 0,
    "winner_model_b": 1,
    "winner_tie": 0,
}
ARENA_140K = {
    "id": "1",
    "model_a": "m",
    "model_b": "n",
    "winner": "both_bad",
    "evaluation_session_id": "s",
    "evaluation_order": 1,
    "conversation_a": [{"role": "user", "content": part("q")}, {"role": "assistant", "content": part("x")}],
    "conversation_b": [{"role": "user", "content": part("q")}, {"role": "assistant", "content": part("y")}],
    "full_conversation": [{"user": {"role": "user", "content": part("q")}}],
    "conv_metadata": {"sum_user_tokens": 1},
    "category_tag": {"math_v0.1": {"math": False}},
    "language": "en",
    "is_code": False,
    "timestamp": "2025-06-01",
}
ARENA_33K = {
    "question_id": "1",
    "model_a": "m",
    "model_b": "n",
    "winner": "model_b",
    "judge": "arena_user_1",
    "conversation_a": [user("q"), assistant("x")],
    "conversation_b": [user("q"), assistant("y")],
    "turn": 1,
    "anony": True,
    "language": "English",
    "tstamp": 1.0,
    "openai_moderation": {"flagged": False},
    "toxic_chat_tag": {"roberta-large": {"flagged": False}},
}
OASST = {
    "message_tree_id": "q",
    "tree_state": "ready_for_export",
    "prompt": node("prompter", "q", replies=[
        node("assistant", "y", 1),
        node("assistant", "x", 0, [
            node("prompter", "r", replies=[
                node("assistant", "u", 2), node("assistant", "v", 0), node("assistant", "w")
            ]),
            node("prompter", "s", replies=[node("assistant", "alone", 0)]),
        ]),
    ]),
}
ULTRAFEEDBACK = {
    "source": "evol_instruct",
    "instruction": "q",
    "models": ["m", "n"],
    "completions": [rated("x", 4.5, 3.0, "5", "4", "5", "4"), rated("y", 2.0, 9.0, "2", "N/A", "1", "3")],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}
DISTILABEL = {
    "instruction": "q",
    "generations": ["x", "y"],
    "generation_models": ["m", "n"],
    "ratings": [4.0, 5.0],
    "rationales": ["words", "words"],
    "model_name": "judge",
}
ARGILLA = {
    "source": "evol_instruct",
    "instruction": "q",
    "chosen_response": "x",
    "rejected_response": "y",
    "chosen_avg_rating": 5.0,
    "rejected_avg_rating": 3.75,
    "chosen_model": "m",
}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "q"}],
    "chosen": {"from": "gpt", "value": "x"},
    "rejected": {"from": "gpt", "value": "y"},
}
SHAREGPT_WITH_ROLES = {
    "conversations": [{"role": "user", "content": "q"}],
    "chosen": {"role": "assistant", "content": "x"},
    "rejected": {"role": "assistant", "content": "y"},
}
OPENAI = {
    "input": {"messages": Q, "tools": [], "parallel_tool_calls": True},
    "preferred_output": [assistant("x")],
    "non_preferred_output": [assistant("y")],
}
SWIFT = {"messages": [*Q, assistant("x")], "rejected_response": "y"}
NEMO = {
    "context": Q,
    "completions": [
        {"rank": 1, "completion": [assistant("x")]},
        {"rank": 0, "completion": [assistant("y")]},
    ],
    "task_name": "t",
}
SWIFT_MESSAGES = {"messages": [*Q, assistant("x")], "rejected_messages": [*Q, assistant("y")]}
ORCA = {"system": "Be kind.", "question": "q", "chosen": "x", "rejected": "y"}


def rows_of(row, comparison, **other):
    return Comparison(**{**vars(comparison), "source": row, **other})


FOUR = { # of UltraFeedback; a string N/A is none
    "helpfulness": (4.0, 3.0),
    "honesty": (4.0, None),
    "instruction_following": (5.0, 2.0),
    "truthfulness": (5.0, 1.0),
}
ARENA = Comparison([user("q")], TWO, (1, 1))
CASES = [
    ("helpsteer2_preference", HELPSTEER2, [FIRST]),
    ("helpsteer2_preference", {**HELPSTEER2, "preference_strength": 1}, [SECOND]),
    ("helpsteer2_preference", {**HELPSTEER2, "preference_strength": 0}, [TIE]),
    ("helpsteer_ratings", HELPSTEER_RATINGS, [
        Comparison(Q, TWO[:1], (1,), ratings=(3.0,), attributes={
            "helpfulness": (3.0,),
            "correctness": (4.0,),
            "coherence": (4.0,),
            "complexity": (1.0,),
            "verbosity": (0.0,),
        })
    ]),
    ("helpsteer3", HELPSTEER3, [rows_of("code", FIRST)]),
    ("helpsteer3", {**HELPSTEER3, "overall_preference": 2}, [rows_of("code", SECOND)]),
    ("pku_better", PKU, [SECOND]),
    ("pku_safer", PKU, [FIRST]),
    ("shp", SHP, [rows_of("askbaking_train", SECOND, ratings=(3.0, 7.0))]),
    ("shp", {**SHP, "labels": 0}, [rows_of("askbaking_train", FIRST, ratings=(3.0, 7.0))]),
    ("webgpt", WEBGPT, [rows_of("eli5", SECOND, ratings=(-0.5, 0.5))]),
    ("nectar", NECTAR, [rows_of("['sharegpt']", Comparison(NECTAR["prompt"], ("x", "y", "z"), (2, 1, 3)))]),
    ("arena_55k", ARENA_55K, [
        Comparison(
            Q,
            ([assistant("x"), user("r"), assistant("x2")], [assistant("y"), user("r"), assistant("y2")]),
            (2, 1),
        )
    ]),
    ("arena", ARENA_140K, [TIE]),
    ("arena", ARENA_33K, [SECOND]),
    ("oasst_trees", OASST, [
        Comparison(Q, ([assistant("y")], [assistant("x")]), (2, 1)),
        Comparison([*Q, assistant("x"), user("r")], ([assistant("u")], [assistant("v")]), (2, 1)),
    ]),
    ("ultrafeedback_fine_grained", ULTRAFEEDBACK, [
        rows_of("evol_instruct", FIRST, ratings=(4.5, 2.0), attributes=FOUR)
    ]),
    ("ultrafeedback_overall", ULTRAFEEDBACK, [
        rows_of("evol_instruct", SECOND, ratings=(3.0, 9.0), attributes=FOUR)
    ]),
    ("distilabel", DISTILABEL, [Comparison(Q, TWO, (2, 1), ratings=(4.0, 5.0))]),
    ("argilla", ARGILLA, [rows_of("evol_instruct", FIRST)]),
    ("sharegpt", SHAREGPT, [FIRST]),
    ("sharegpt", SHAREGPT_WITH_ROLES, [FIRST]),
    ("sharegpt", {**SHAREGPT, "system": "s"}, [
        Comparison([{"role": "system", "content": "s"}, *Q], TWO, (1, 2))
    ]),
    ("openai", OPENAI, [FIRST]),
    ("swift", SWIFT, [FIRST]),
    ("swift_messages", SWIFT_MESSAGES, [FIRST]),
    ("nemo", NEMO, [SECOND]),
    ("orca", ORCA, [Comparison([{"role": "system", "content": "Be kind."}, *Q], TWO, (1, 2))]),
]
CHOSEN_BY_NAME = {"pku_better", "pku_safer", "ultrafeedback_fine_grained", "ultrafeedback_overall", "orca"}
OWN = [ # read as they are
    {"chosen": "\n\nHuman: q\n\nAssistant: x", "rejected": "\n\nHuman: q\n\nAssistant: y"}, # Anthropic/hh-rlhf
    {"chosen": [*Q, assistant("x")], "rejected": [*Q, assistant("y")], "source": "wildguard"}, # Skywork-Preference
    { # HuggingFaceH4/ultrafeedback_binarized
        "prompt": "q",
        "prompt_id": "1",
        "chosen": [*Q, assistant("x")],
        "rejected": [*Q, assistant("y")],
        "messages": [*Q, assistant("x")],
        "score_chosen": 8.0,
        "score_rejected": 5.0,
    },
]


def ids(case):
    return case if isinstance(case, str) else ""


def test_each_form_has_a_row_here():
    assert {name for name, _, _ in CASES} | {"oasst_messages"} == set(KNOWN_FORMS)


@pytest.mark.parametrize("form, row, expected", CASES, ids=ids)
def test_rows_of_known_sets_become_the_same_comparisons_from_any_file(form, row, expected, tmp_path, caplog):
    given = form if form in CHOSEN_BY_NAME else None
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    cells = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_dict({name: [value] for name, value in cells.items()}).to_csv(tmp_path / "rows.csv")
    names = ["rows.jsonl", "rows.parquet"]
    if form not in ("nectar", "oasst_trees", "webgpt"): # which are not written as CSV
        names.append("rows.csv")
    for name in names:
        for streaming in (False, True):
            caplog.clear()
            rows = load_rows(str(tmp_path / name), form=given, streaming=streaming)
            assert [to_comparison(read) for read in rows] == expected
            assert f"is read in the form {form}; preferred:" in caplog.text
    report = audit(load_rows(str(tmp_path / "rows.jsonl"), form=given))
    (counted,) = report["forms"]
    assert counted.startswith(f"{form}, read as responses, ") and not report["bad_rows"]


@pytest.mark.parametrize("row", OWN)
def test_rows_of_this_library_stay_as_they_are(row, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (read,) = load_rows(str(tmp_path / "rows.jsonl"))
    assert read == row and recognize_form([row]) is None
    assert to_comparison(read).ranks == (1, 2)
    decorated = {**row, **HELPSTEER3, **NEMO}
    assert recognize_form([decorated]) is None


@pytest.mark.parametrize("row", [PKU, ULTRAFEEDBACK])
def test_several_readings_of_one_set_are_refused(row, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        for streaming in (False, True):
            with pytest.raises(ValueError, match="leave open which response is preferred; expected a choice, --form"):
                load_rows(str(tmp_path / name), streaming=streaming)
    assert len(load_rows(str(tmp_path / "rows.jsonl"), form="as_is")) == 1


BAD = [
    ("helpsteer3", {**HELPSTEER3, "overall_preference": None}, "the overall_preference is None; expected a number"),
    ("pku_better", {**PKU, "better_response_id": 2}, "better_response_id is 2; expected 0 or 1"),
    ("arena_55k", {**ARENA_55K, "winner_tie": 1}, "expected a single 1"),
    ("arena_55k", {**ARENA_55K, "response_a": '["x"]'}, "is not a row of the form arena_55k"),
    ("arena", {**ARENA_33K, "winner": "model_c"}, "the winner is 'model_c'"),
    ("swift", {**SWIFT, "messages": Q}, "the messages end with 'user'; expected the chosen response"),
    ("swift", {**SWIFT, "images": ["a.png"]}, "its column 'images' is filled, and only texts are read"),
    ("distilabel", {**DISTILABEL, "system_prompt": "s"}, "its column 'system_prompt' is filled, which this form does"),
    ("sharegpt", {**SHAREGPT, "chosen": {"from": "tool", "value": "x"}}, "a message is from 'tool'; expected one of"),
    ("nemo", {**NEMO, "completions": [{"rank": 0}]}, "no 'completion'"),
    ("oasst_trees", {**OASST, "prompt": "q"}, "is not a row of the form oasst_trees"),
]


@pytest.mark.parametrize("form, row, problem", BAD, ids=ids)
def test_rows_that_do_not_fit_are_named(form, row, problem):
    (read,) = with_form(Dataset.from_list([row]), form)
    with pytest.raises(ValueError, match=problem):
        to_comparison(read)


def test_what_rows_have_in_every_form_is_kept():
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {**SWIFT, "weight": 2.0, "source": "mine", "margin": 0.5, "tools": json.dumps(tools)}
    (read,) = with_form(Dataset.from_list([row]), "swift")
    comparison = to_comparison(read)
    assert (comparison.weight, comparison.source, comparison.margin) == (2.0, "mine", 0.5)
    assert comparison.template == {"tools": tools}


def test_columns_are_mapped_before_the_form_is_recognized(tmp_path):
    row = {**SWIFT, "conversation": SWIFT["messages"]}
    del row["messages"]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (read,) = load_rows(str(tmp_path / "rows.jsonl"), columns={"messages": "conversation"})
    assert to_comparison(read) == FIRST
    with pytest.raises(ValueError, match="it has no column 'turns' in its first 1 rows"):
        load_rows(str(tmp_path / "rows.jsonl"), columns={"messages": "turns"}, form="swift")


def test_an_unknown_form_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(SWIFT) + "\n")
    with pytest.raises(ValueError, match="form is 'steer'; expected one of arena, .*, or as_is"):
        load_rows(str(tmp_path / "rows.jsonl"), form="steer")


def test_labels_of_a_table_are_read_as_numbers():
    features = Features({**{name: Value("string") for name in ("prompt", "response_0", "response_1")}})
    labels = ClassLabel(names=["first", "second"])
    features |= {"better_response_id": labels, "safer_response_id": labels}
    row = {name: PKU[name] for name in features}
    (read,) = with_form(Dataset.from_list([row], features=Features(features)), "pku_safer")
    assert to_comparison(read) == FIRST


def flat(tree_id, messages):
    "Rows of one message each, as the files `*.messages.jsonl.gz` and the set on the hub have them."
    rows = []
    for name, parent, role, rank in messages:
        row = {**node(role, name, rank), "parent_id": parent, "message_tree_id": tree_id}
        row["tree_state"] = "ready_for_export"
        del row["replies"]
        rows.append(row)
    return rows


def test_messages_of_open_assistant_are_assembled_to_trees(tmp_path):
    tree = flat("q", [
        ("q", None, "prompter", None),
        ("y", "q", "assistant", 1),
        ("x", "q", "assistant", 0),
        ("r", "x", "prompter", None),
        ("u", "r", "assistant", 2),
        ("v", "r", "assistant", 0),
        ("w", "r", "assistant", None),
        ("s", "x", "prompter", None),
        ("alone", "s", "assistant", 0),
    ])
    other = flat("k", [("k", None, "prompter", None), ("m", "k", "assistant", 0), ("n", "k", "assistant", 1)])
    expected = [
        *next(found for name, _, found in CASES if name == "oasst_trees"),
        Comparison([user("k")], ([assistant("m")], [assistant("n")]), (1, 2)),
    ]
    rows = tree + other
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        for streaming in (False, True):
            read = load_rows(str(tmp_path / name), streaming=streaming)
            assert [to_comparison(row) for row in read] == expected, (name, streaming)
    for suffix in ("jsonl", "parquet"): # a tree that begins in one file and ends in the next
        folder = tmp_path / suffix
        folder.mkdir()
        for number, half in enumerate((rows[:3], rows[3:])):
            if suffix == "parquet":
                Dataset.from_list(half).to_parquet(folder / f"{number}.parquet")
            else:
                (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in half))
        stream = load_rows(str(folder), streaming=True)
        for workers in (0, 2):
            read = DataLoader(stream, batch_size=None, num_workers=workers)
            assert list(map(to_comparison, read)) == expected, (suffix, workers)
    (tmp_path / "apart.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*tree[:3], *other, *tree[3:]]))
    read = load_rows(str(tmp_path / "apart.jsonl"))
    with pytest.raises(ValueError, match="the parent 'x' of the message 'r' is not before it; expected the messages"):
        to_comparison(read[2])
