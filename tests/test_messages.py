"Messages name the right response, the right limit and the right reason."
import re
from pathlib import Path

import pytest
import torch
from architectures import save_language_model, word_tokenizer
from datasets import Dataset, IterableDataset
from fastapi.testclient import TestClient
from transformers import AutoConfig, AutoModelForSequenceClassification

import rlhf_reward
from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, tokenize_rows
from rlhf_reward.audit import audit
from rlhf_reward.cli.train_command import parse_train
from rlhf_reward.comparison import BadResponse
from rlhf_reward.encoding import TooLong
from rlhf_reward.quotes import short
from rlhf_reward.rows import to_comparison
from rlhf_reward.scoring import Scorer
from rlhf_reward.serving import make_app

LONG = "w7 " * 300
SHORT = ["w5", "w6", "w8"]
REFUSES = (
    "{% for m in messages %}{% if 'w9' in m.content %}{{ raise_exception('no w9') }}{% endif %}{{ m.content }} "
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("base"))
    save_language_model("llama", folder)
    return folder


@pytest.fixture(scope="module")
def scorer(base):
    return Scorer(RewardModel(base, 0.0, "cpu"), word_tokenizer(chat_template=REFUSES), max_length=200)


def as_messages(text):
    return [{"role": "assistant", "content": text}]


def with_fault(fault, index, wrap=str):
    responses = [wrap(text) for text in SHORT]
    responses[index] = fault
    return responses


QUESTION = [{"role": "user", "content": "w4"}]
CALLS = {
    "rank": lambda scorer, prompt, responses: scorer.rank(prompt, responses),
    "best_of_n": lambda scorer, prompt, responses: scorer.best_of_n(prompt, responses, n=3),
    "compare": lambda scorer, prompt, responses: scorer.compare(prompt, responses[0], responses[1]),
    "whole": lambda scorer, prompt, responses: scorer.rank(None, responses),
}


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("call", CALLS)
def test_a_response_that_is_too_long_is_named(call, index, scorer):
    if call == "compare" and index == 2:
        pytest.skip("compares two responses")
    count = 2 if call == "compare" else 3
    noun = "text" if call == "whole" else "response"
    expected = f"^The {noun} 'w7 w7 .*, number {index + 1} of {count}, cannot be scored: it has"
    with pytest.raises(TooLong, match=expected):
        CALLS[call](scorer, "w4 ", with_fault(LONG, index))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_other_faults_of_a_response_are_named(index, scorer):
    with pytest.raises(ValueError, match=rf"cannot be scored: response {index + 1} of 3: found 7; expected a text"):
        scorer.rank("w4 ", with_fault(7, index))
    expected = f"'w9'}}\\], number {index + 1} of 3, cannot be scored: .* refuses its messages: no w9"
    with pytest.raises(BadResponse, match=expected):
        scorer.rank(QUESTION, with_fault("w9", index))
    system = [{"role": "system", "content": "w5"}]
    with pytest.raises(ValueError, match=f"response {index + 1} begins with a message of the system"):
        scorer.rank(QUESTION, with_fault(system, index, as_messages))


def test_a_fault_of_the_prompt_is_no_response_s(scorer):
    prompt = [{"role": "user", "content": "w9"}]
    with pytest.raises(ValueError, match="^Each of 3 responses, of which the first is .* cannot be scored: .*no w9"):
        scorer.rank(prompt, SHORT)
    with pytest.raises(ValueError, match=r"^The response \[.*'w5'}\] cannot be scored: .*no w9"):
        scorer.score([prompt], ["w5"])


def test_score_names_the_response_by_its_text(scorer):
    with pytest.raises(TooLong, match="^The response 'w7 w7 .* cannot be scored: it has 30"):
        scorer.score(["w4 "] * 3, ["w5", "w6", LONG])


def test_rows_name_the_response():
    row = {"prompt": "p", "responses": ["a", "b", 7], "scores": [1, 2, 3]}
    with pytest.raises(ValueError, match="^response 3 of 3: found 7; expected a text"):
        to_comparison(row)
    with pytest.raises(ValueError, match="^response 2 of 2: found 7; expected a text"):
        to_comparison({"prompt": "p", "chosen": "a", "rejected": 7})


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_server_names_the_response(index, scorer):
    with TestClient(make_app(scorer)) as client:
        answer = client.post("/rank", json={"prompt": "w4 ", "responses": with_fault(LONG, index)})
        assert answer.status_code == 413
        assert answer.json()["detail"][0]["loc"] == ["body", "responses", index]
        assert f"number {index + 1} of 3" in answer.json()["detail"][0]["msg"]
        chat = {"prompt": QUESTION, "responses": with_fault("w9", index)}
        answer = client.post("/rank", json=chat)
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body", "responses", index]
        responses = with_fault([{"role": "system", "content": "w5"}], index, as_messages)
        answer = client.post("/rank", json={"prompt": QUESTION, "responses": responses})
        assert answer.json()["detail"][0]["loc"] == ["body", "responses", index]
        responses = with_fault([{"role": "assistant"}], index, as_messages)  # a message without a content
        answer = client.post("/rank", json={"prompt": QUESTION, "responses": responses})
        assert answer.json()["detail"][0]["loc"] == ["body", "responses", index]
        answer = client.post("/score", json={"prompts": ["w4 "], "responses": [LONG]})
        assert answer.json()["detail"][0]["loc"] == ["body", "responses", 0]


def positions(base):
    return RewardModel(base, 0.0, "cpu").max_positions


def test_more_than_the_model_takes_is_not_advised(base):
    limit = positions(base)
    text = "w7 " * (limit + 1)
    for max_length in (None, limit, 10 * limit):
        scorer = Scorer(RewardModel(base, 0.0, "cpu"), word_tokenizer(), max_length)
        with pytest.raises(TooLong, match=rf"at most {limit}\. The model takes no more, whatever max_length"):
            scorer.score(["w4 "], [text])
        scorer = Scorer(RewardModel(base, 0.0, "cpu"), word_tokenizer(), max_length, "truncate_prompt")
        with pytest.raises(TooLong, match=rf"at most {limit}\. The model takes no more, .*: shorten the text\.$"):
            scorer.score(["w4 "], [text])


def test_cutting_the_prompt_is_advised_where_it_helps(base):
    scorer = Scorer(RewardModel(base, 0.0, "cpu"), word_tokenizer(), 5)
    with pytest.raises(TooLong, match="or choose another on_overlong, such as 'truncate_prompt'"):
        scorer.score(["w5 " * 9], ["w6"])
    for prompt, response in (("w4 ", "w5 " * 9), (None, "w5 " * 9), ("", "w5 " * 9)):
        with pytest.raises(TooLong, match=r"expected at most 5\. Allow more with max_length\.$"):
            scorer.score([prompt], [response])


def test_an_encoder_has_the_same_messages(tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = AutoConfig.for_model("bert", num_labels=1, vocab_size=100, max_position_embeddings=32, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    scorer = Scorer.from_pretrained(tmp_path, device="cpu", max_length=500)
    expected = "number 2 of 3, cannot be scored: it has .* at most 32. The model takes no more, whatever max_length is"
    with pytest.raises(TooLong, match=expected + r": shorten the text\.$"):
        scorer.rank("w4", with_fault("w7 " * 40, 1))
    with pytest.raises(TooLong, match=expected.replace("number 2 of 3, ", "") + ": shorten the text, or"):
        scorer.score(["w7 " * 40], ["w5"])


def trainer(base, tmp_path, rows, **options):
    args = RewardConfig(str(tmp_path), use_cpu=True, report_to="none", **options)
    return RewardTrainer(RewardModel(base, 0.0, "cpu"), args, train_dataset=rows, processing_class=word_tokenizer())


PAIR = {"prompt": "w5 ", "chosen": "w6 w6", "rejected": "w7"}
TIE = {"prompt": "w5 ", "responses": ["w6", "w7"], "scores": [1, 1]}
NOTE = "max_length is 100000, but the model and its tokenizer take"


def rows_of(*rows):
    empty = dict.fromkeys(set().union(*rows))
    return Dataset.from_list([{**empty, **row} for row in rows])


def test_the_limit_of_the_model_is_the_reason_only_where_it_is(base, tmp_path, caplog):
    for rows, options in (
        (rows_of(PAIR, TIE), {}),
        (rows_of(PAIR, {**PAIR, "rejected": "w6 w6"}), {}),
        (rows_of(PAIR, {**PAIR, "rejected": None}), {"on_bad_row": "skip"}),
        (rows_of(PAIR), {"on_overlong": "truncate_prompt"}),
    ):
        trainer(base, tmp_path, rows, max_length=100_000, **options)
        assert NOTE not in caplog.text
    stream = IterableDataset.from_generator(lambda: iter([PAIR, PAIR]))
    list(trainer(base, tmp_path, stream, max_length=100_000, max_steps=1).train_dataset)
    assert NOTE not in caplog.text
    limit = positions(base)
    long = {**PAIR, "prompt": "w5 " * limit}
    for options in ({}, {"on_overlong": "truncate_prompt"}):
        caplog.clear()
        trainer(base, tmp_path, rows_of(PAIR, long), max_length=100_000, **options)
        assert f"{NOTE} {limit} tokens." in caplog.messages
    with pytest.raises(ValueError, match=f"expected at most {limit}. The model takes no more, whatever max_length is"):
        trainer(base, tmp_path, rows_of(long), max_length=100_000, on_overlong="error")


def test_a_limit_of_none_is_that_of_the_model(base, tmp_path, caplog):
    limit = positions(base)
    rows = rows_of(PAIR, {**PAIR, "prompt": "w5 " * (limit - 10)}, {**PAIR, "prompt": "w5 " * limit})
    found = trainer(base, tmp_path, rows, max_length=None)
    assert found.train_dataset["row"][:] == [1, 2]
    assert f"max_length is None, but the model and its tokenizer take {limit} tokens." in caplog.messages
    assert len(tokenize_rows(rows, word_tokenizer(), None)) == 3
    assert audit(rows, tokenizer=word_tokenizer(), max_length=None)["overlong"] == 0


def test_the_remedy_fits_the_reason_why_none_is_left():
    for row, max_length, max_positions, remedy in (
        (TIE, 99, None, r"all responses tie \(1\)\. Check the data\.$"),
        (PAIR, 2, None, r"longer than 2 tokens \(1\)\. Check the data, or allow longer texts\.$"),
        (PAIR, 99, 2, r"longer than 2 tokens \(1\)\. max_length is 99, but the model and its tokenizer take 2 tokens"),
    ):
        with pytest.raises(ValueError, match=remedy):
            tokenize_rows(rows_of(row), word_tokenizer(), max_length, max_positions=max_positions)


def test_the_first_bad_row_is_shown_where_none_is_left():
    rows = rows_of({**PAIR, "rejected": None})
    with pytest.raises(ValueError, match=r"is left: bad row \(1\)\. Row 1 of the data cannot be used: found None"):
        tokenize_rows(rows, word_tokenizer(), 99, on_bad_row="skip")


def test_a_yaml_file_has_no_empty_values_that_mean_something_else(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("lora_r: null\nmax_length: null\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        parse_train([str(config), "--output_dir", str(tmp_path)])
    expected = f"max_length has no value in {config}; expected one, or no line for it, which is 2048"
    assert expected in capsys.readouterr().err
    config.write_text("lora_r: null\nmax_length: 64\n", encoding="utf-8")
    assert parse_train([str(config), "--output_dir", str(tmp_path)])[1].max_length == 64


def test_values_that_are_cut_end_in_an_ellipsis():
    assert short("a" * 78) == repr("a" * 78) and short("a" * 79) == "'" + "a" * 78 + "…"
    for path in sorted(Path(rlhf_reward.__file__).parent.rglob("*.py")):
        assert not re.search(r"!r:\.\d", path.read_text(encoding="utf-8")), f"{path.name}: expected quotes.short"
