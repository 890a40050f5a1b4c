"Parts of messages that a chat template leaves out are counted and reported everywhere."

import importlib.util
import json
import time
from pathlib import Path

import pytest
from architectures import save_language_model
from chat_tokenizers import chat_tokenizer
from datasets import Dataset, IterableDataset

from rlhf_reward import RewardModel, tokenize_rows
from rlhf_reward.audit import audit, audit_table
from rlhf_reward.cli import main
from rlhf_reward.evaluation import evaluate
from rlhf_reward.omissions import EARLIER_REASONING, omissions, render_checked
from rlhf_reward.report import report_html, report_markdown
from rlhf_reward.rows import to_comparison
from rlhf_reward.scoring import Scorer

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
EVERYTHING = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.reasoning_content }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if enable_thinking %}{% endif %}"
)
ONLY_ANSWERS = "{% for m in messages %}" + TURN.replace("m.content", "m.content.split('</think>')[-1]") + "{% endfor %}"
ONLY_KNOWN = (
    "{% for m in messages if m.role in ('system', 'user', 'assistant') %}" + TURN + "{% endfor %}"
)
TWO_ROLES = (
    "{% for m in messages %}{% if m.role == 'user' %}User: {% else %}Assistant: {% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)
REASONING = "the reasoning before </think>"


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def tool_call(arguments):
    function = {"name": "book", "arguments": arguments}
    return assistant("", tool_calls=[{"id": "call_1", "type": "function", "function": function}])


TOOLS = [{"type": "function", "function": {"name": "book", "description": "Book a seat."}}]


def with_template(template):
    tokenizer = chat_tokenizer("qwen")
    tokenizer.chat_template = template
    return tokenizer


def kinds(messages, template, **variables):
    tokenizer = with_template(template)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
    return omissions(messages, rendered, tokenizer, variables)


SHOWN = {
    "short": [user("a"), assistant("user")],
    "long": [user("What is the capital of France, please?"), assistant("Paris is the capital of France.")],
    "reasoning": [user("q"), assistant("<think>\ngood\n</think>\n\nyes")],
    "field": [user("q"), assistant("yes", reasoning_content="good")],
    "numbers and empty fields": [user("q"), assistant("yes", rating=4, citations=[], usage={"tokens": 3})],
    "calls": [user("q"), tool_call({"row": 3, "seat": None, "city": "New York"})],
    "calls as JSON": [user("q"), tool_call('{"row": 3, "city": "New York"}')],
    "roles": [{"role": "developer", "content": "be"}, user("q"), assistant("a")],
    "signs": [user("?"), assistant("!!! <br> \\n 'a' \"b\"")],
    "other script": [user("你好"), assistant("您好 😀")],
    "empty": [user("q"), assistant("")],
    "spaces": [user(" q "), assistant("\n a\n\n")],
}


FIELDS = {  # of other libraries and servers, which are no strings
    "reasoning_details": [{"type": "reasoning.text", "text": "good", "index": 0}],
    "thinking_blocks": [{"type": "thinking", "thinking": "good", "signature": "x"}],
    "citations": ["a page", "another"],
    "audio": {"id": "1", "transcript": "good"},
}


@pytest.mark.parametrize("name", SHOWN)
def test_nothing_is_reported_where_everything_is_printed(name):
    for variables in ({}, {"tools": TOOLS}, {"enable_thinking": False}):
        assert kinds(SHOWN[name], EVERYTHING, **variables) == ([], False)


@pytest.mark.parametrize(
    "template, messages, variables, expected",
    [
        (ONLY_ANSWERS, [user("q"), assistant("<think>good</think>yes")], {}, [REASONING]),
        (ONLY_ANSWERS, [user("q"), assistant("a</think>yes, that is so")], {}, [REASONING]),
        (
            ONLY_ANSWERS,
            [user("q"), assistant("yes", reasoning_content="good")],
            {},
            ["the field reasoning_content of messages"],
        ),
        *(
            (ONLY_ANSWERS, [user("q"), assistant("yes", **{name: value})], {}, [f"the field {name} of messages"])
            for name, value in FIELDS.items()
        ),
        (
            ONLY_ANSWERS,
            [user("q"), assistant("<think>good</think>yes"), user("r"), assistant("no")],
            {},
            [EARLIER_REASONING],
        ),
        # "be" and "a" are in the text for other reasons
        (
            ONLY_KNOWN,
            [{"role": "developer", "content": "a"}, user("q"), assistant("be")],
            {},
            ["the content of developer messages"],
        ),
        (
            ONLY_KNOWN,
            [user("q"), assistant("a"), {"role": "critic", "content": "a"}, assistant("b")],
            {},
            ["the content of critic messages"],
        ),
        (
            ONLY_KNOWN,
            [user("q"), assistant("I will.", tool_calls=tool_call({"row": 3})["tool_calls"])],
            {},
            ["the tool calls"],
        ),
        (ONLY_KNOWN, [user("q"), assistant("a")], {"tools": TOOLS}, ["the tools"]),
        (
            ONLY_KNOWN,
            [user("q"), assistant("a")],
            {"enable_thinking": True},
            ["the variable enable_thinking of chat_template_kwargs"],
        ),
        (
            TWO_ROLES,
            [{"role": "system", "content": "be"}, user("q"), assistant("a")],
            {},
            ["the role system, which is written as assistant"],
        ),
        # the template prints a part of it
        (
            ONLY_KNOWN.replace("m.content", "m.content[:20]"),
            [user("What is the capital of France, and who lives there?"), assistant("a")],
            {},
            ["part of the content of user messages"],
        ),
    ],
)
def test_what_is_left_out_has_a_name(template, messages, variables, expected):
    assert kinds(messages, template, **variables) == (expected, False)


@pytest.mark.parametrize(
    "template, response",
    [
        (ONLY_ANSWERS, assistant("<think>good</think>")),
        (ONLY_KNOWN, tool_call({"row": 3})),
        (ONLY_KNOWN, {"role": "critic", "content": "a"}),
        (
            ONLY_KNOWN,
            {"role": "critic", "content": "This is a long response that is never printed."},
        ),
    ],
)
def test_a_response_of_which_nothing_is_left_is_a_bad_row(template, response, caplog):
    tokenizer = with_template(template)
    assert kinds([user("q"), response], template).is_lost
    row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [response]}
    with pytest.raises(ValueError, match=r"leaves out the .*, and with that all of response 2; expected"):
        render_checked(to_comparison(row), tokenizer)
    sound = {**row, "rejected": [assistant("b")]}
    rows = Dataset.from_list([row, sound])
    with pytest.raises(ValueError, match="^Row 1 of the data cannot be used: the chat template leaves out"):
        tokenize_rows(rows, tokenizer, 999)
    assert tokenize_rows(rows, tokenizer, 999, on_bad_row="skip")["row"] == [2]
    report = audit(rows, tokenizer=tokenizer)
    assert report["bad_rows"] == 1 and report["comparisons"] == 1
    assert "1 row(s) cannot be used" in report["problems"][0]


def test_a_template_that_refuses_the_marks_is_compared_by_its_text():
    refuses = "{% for m in messages %}{% if not m.content.isascii() %}{{ raise_exception('ASCII only') }}{% endif %}"
    for template, expected in ((ONLY_ANSWERS, [REASONING]), (EVERYTHING, [])):
        template = refuses + "{% endfor %}" + template
        assert kinds([user("q"), assistant("<think>good</think>yes")], template).kinds == expected


def test_marks_are_found_where_the_template_escapes_them_and_the_text_has_some():
    ascii_only = EVERYTHING.replace("{{ m.content }}", "{{ m.content | tojson(ensure_ascii=True) }}")
    for content in ("a", "\U000f0000", "\U000f0001 b \U000f0000", "é"):
        for template in (EVERYTHING, ascii_only):
            assert kinds([user(content), assistant(content)], template) == ([], False)
        dropped = [{"role": "developer", "content": content}, user("q"), assistant(content)]
        assert kinds(dropped, ONLY_KNOWN).kinds == ["the content of developer messages"]


def test_a_conversation_of_many_messages_is_checked_in_one_pass():
    conversation = []
    for number in range(10_000):
        conversation += [user(f"w{number}"), assistant("a")]
    started = time.process_time()
    assert kinds(conversation, EVERYTHING) == ([], False)
    assert time.process_time() - started < 10 # about 1; a pass for each message would take minutes


def test_an_empty_response_is_as_it_was_given():
    row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("")]}
    assert render_checked(to_comparison(row), with_template(ONLY_KNOWN)).omitted == ()


ROWS = [
    {
        "prompt": [{"role": "developer", "content": "be"}, user(f"q {number}")],
        "chosen": [assistant(f"<think>good</think>yes {number}")],
        "rejected": [assistant(f"no {number}")],
    }
    for number in range(3)
]
LEAVES_OUT = (
    "{% for m in messages if m.role != 'developer' %}"
    + TURN.replace("m.content", "m.content.split('</think>')[-1]")
    + "{% endfor %}"
)
COUNTED = f"the chat template leaves out the content of developer messages (3), {REASONING} (3)"


@pytest.mark.parametrize("is_stream", [False, True])
def test_training_reports_it(is_stream, caplog):
    rows = IterableDataset.from_generator(lambda: iter(ROWS)) if is_stream else Dataset.from_list(ROWS)
    tokenized = tokenize_rows(rows, with_template(LEAVES_OUT), 999)
    assert len(list(tokenized)) == 3
    if is_stream: # at once for the first row, then at 10, 100, …
        expected = COUNTED.replace("(3)", "(1)")
        assert caplog.messages == [f"In 1 of 1 comparisons of the data so far, {expected}."]
    else:
        assert caplog.messages == [f"In 3 of 3 comparisons of the data, {COUNTED}."]


def test_rows_that_become_equal_are_explained(caplog):
    chosen, rejected = assistant("<think>a</think>c"), assistant("<think>b</think>c")
    rows = [{"prompt": [user("q")], "chosen": [chosen], "rejected": [rejected]}]
    with pytest.raises(ValueError, match="winner and loser are the same tokens"):
        tokenize_rows(Dataset.from_list(rows), with_template(LEAVES_OUT), 999)
    assert f"In 1 of 1 comparisons of the data, the chat template leaves out {REASONING} (1)." in caplog.messages


def test_tools_for_strings_are_reported(caplog):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "tools": TOOLS, "chat_template_kwargs": {"x": 1}}]
    tokenize_rows(Dataset.from_list(rows), with_template(EVERYTHING), 999)
    assert len(caplog.messages) == 1
    assert "the variable x of chat_template_kwargs (1)" in caplog.text and "the tools (1)" in caplog.text


def test_the_audit_reports_it():
    report = audit(Dataset.from_list(ROWS), tokenizer=with_template(LEAVES_OUT))
    assert report["omitted"] == 3
    assert report["problems"] == [f"3 of 3 comparisons: {COUNTED} (row 1, 2, 3)."]
    assert COUNTED in audit_table(report)
    assert audit(Dataset.from_list(ROWS), tokenizer=with_template(EVERYTHING))["omitted"] == 0
    assert "omitted" not in audit(Dataset.from_list(ROWS))


def test_reasoning_of_earlier_turns_is_only_noted():
    prompt = [user("q"), assistant("<think>good</think>yes"), user("r")]
    rows = [{"prompt": prompt, "chosen": [assistant("a")], "rejected": [assistant("b")]}]
    report = audit(Dataset.from_list(rows), tokenizer=with_template(ONLY_ANSWERS))
    assert report["problems"] == [] and EARLIER_REASONING in report["notes"][0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    base = save_language_model("llama", f"{folder}/base")
    tokenizer = with_template(LEAVES_OUT)
    reward_model = RewardModel(f"{folder}/base" if base is None else base, 0.0, "cpu")
    reward_model.backbone.resize_token_embeddings(len(tokenizer))
    return Scorer(reward_model, tokenizer)


def test_scoring_reports_it(model, caplog):
    row = ROWS[0]
    model.score([row["prompt"]], [row["chosen"]])
    once = COUNTED.replace("(3)", "(1)")
    assert caplog.messages == [f"In 1 of 1 comparisons, {once}."]
    model.rank(row["prompt"], [row["rejected"], row["chosen"]])
    assert len(caplog.messages) == 2
    with pytest.raises(ValueError, match="and with that all of response 2"):
        model.rank(row["prompt"], ["no", "<think>good</think>"])


def test_evaluation_reports_it(model):
    evaluation = evaluate(model, ROWS)
    assert evaluation.report["omitted"] == {"the content of developer messages": 3, REASONING: 3}
    assert COUNTED in report_html({"rows": {"m": evaluation}}).replace("&lt;", "<").replace("&gt;", ">")
    assert COUNTED in report_markdown({"rows": {"m": evaluation}}).replace("&lt;", "<").replace("&gt;", ">")
    strings = [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    assert evaluate(model, strings).report["omitted"] == {}


def trl_template(name):
    found = importlib.util.find_spec("trl")
    if found is None:
        pytest.skip("TRL is not installed, which ships these templates")
    return (Path(found.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


DEVELOPER = {"role": "developer", "content": "be"}


@pytest.mark.parametrize(
    "name, messages, expected",
    [
        ("deepseek_r1_distill", [user("q"), assistant("<think>good</think>yes")], [REASONING]),
        ("deepseekv3", [user("q"), assistant("<think>good</think>yes")], [REASONING]),
        ("qwen3", [user("q"), assistant("<think>good</think>yes")], []),
        (
            "qwen3",
            [user("q"), assistant("<think>good</think>yes"), user("r"), assistant("no")],
            [EARLIER_REASONING],
        ),
        ("qwen3", [DEVELOPER, user("q"), assistant("a")], ["the content of developer messages"]),
        ("llama3_1", [DEVELOPER, user("q"), assistant("a")], []),
        ("gptoss", [DEVELOPER, user("q"), assistant("a")], []),
        (
            "qwen3_instruct_2507",
            [user("q"), assistant("a", reasoning_content="good")],
            ["the field reasoning_content of messages"],
        ),
        ("gemma3", [user("q"), tool_call({"row": 3})], ["the tool calls"]),
        ("llama3_1", [user("q"), tool_call({"row": 3})], []),
        (
            "qwen2_5",
            [user("q"), tool_call({"row": 3}), {"role": "tool", "content": "ok"}, assistant("done")],
            [],
        ),
        (
            "phi3",
            [user("q"), tool_call({"row": 3}), {"role": "tool", "content": "ok"}, assistant("done")],
            ["the tool calls in the prompt", "the content of tool messages"],
        ),
    ],
)
def test_templates_of_known_models(name, messages, expected):
    found = kinds(messages, trl_template(name))
    assert found.kinds == expected
    assert found.is_lost == (name == "gemma3")


def test_the_score_command_reports_it(tmp_path, capsys, model):
    folder = tmp_path / "model"
    model.model.save_pretrained(folder, model.tokenizer)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    main(["score", "--model", str(folder), "--data", str(data), "--output", str(tmp_path / "out.jsonl")])
    assert f"Of these comparisons, {COUNTED}." in capsys.readouterr().out
