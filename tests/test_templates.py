"The same conversation has the same reward in every tool that renders the chat template."
import copy
import datetime
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers as T
from datasets import Dataset

from architectures import save_language_model, word_tokenizer
from chat_tokenizers import FAMILIES, chat_tokenizer
from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, Scorer, tokenize_rows
from rlhf_reward.cli import main
from rlhf_reward.encoding import encode, render
from rlhf_reward.templates import DATE, chat_marks, freeze_date, prints_date, report_template
from rlhf_reward.tokens import whole_sequences

CHAT = [{"role": "user", "content": "the ab"}, {"role": "assistant", "content": "ba the"}]
TURN = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
ENDINGS = {  # of a template, with bos and eos as "llama 3" has them
    "eos": TURN + "<|eot|>{% endfor %}",
    "eos and a line break": TURN + "<|eot|>\n{% endfor %}",
    "eos and two line breaks": TURN + "<|eot|>\n\n{% endfor %}",
    "eos and a space": TURN + "<|eot|> {% endfor %}",
    "eos, and another one at the end": TURN + "<|eot|>{% endfor %}<|eot|>",
    "another token and a line break": TURN + "<end_of_turn>\n{% endfor %}",
    "another token, then eos": TURN + "<|end|>\n{% endfor %}<|eot|>",
    "another token after eos": TURN + "<|eot|>\n{% endfor %}<|end|>",
    "a line break": TURN + "\n{% endfor %}",
    "the last word": TURN + "{% endfor %}",
    "only contents, then eos and a line break": "{% for m in messages %}{{ m.content }}{% endfor %}<|eot|>\n",
}


def trl_templates():
    "Return the chat templates that TRL ships, by file name."
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec else Path()
    return {path.name: path.read_text() for path in sorted(folder.glob("*.jinja"))}


TRL_TEMPLATES = trl_templates()
BEGINS = "{{ bos_token }}"


def chat_for(tokenizer):
    "Return the conversation with its contents as strings, or as parts where the template prints only those."
    marks = chat_marks(tokenizer)
    as_parts = []
    for message in CHAT:
        as_parts.append({**message, "content": [{"type": "text", "text": message["content"]}]})
    for chat in (CHAT, as_parts):
        try:
            rendered = tokenizer.apply_chat_template(chat, tokenize=False)
        except Exception:
            continue
        if "ba the" in rendered:
            assert rendered.endswith("ba the" + marks.end)
            return chat
    raise AssertionError("the template prints no conversation")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A saved reward model with the tokenizer of the family llama 3; its template is replaced by tests."
    folder = tmp_path_factory.mktemp("templates")
    tokenizer = chat_tokenizer("llama 3")
    config = T.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    T.LlamaForCausalLM(config).save_pretrained(folder / "base")
    RewardModel(str(folder / "base"), 0.0, "cpu").save_pretrained(folder / "reward", tokenizer)
    return folder / "reward"


@pytest.fixture(scope="module")
def classifier(checkpoint):
    return T.AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def scorers(checkpoint):
    "The same rewards with an end-of-sequence token of ours after each text, and without."
    return [Scorer.from_pretrained(checkpoint, device="cpu", ends_with_eos=ends) for ends in (True, False)]


def saved_with(template, checkpoint, folder):
    "Save the checkpoint once more with another template."
    tokenizer = chat_tokenizer("llama 3")
    tokenizer.chat_template = template
    RewardModel.from_pretrained(checkpoint, device="cpu").save_pretrained(folder, tokenizer)
    return str(folder)


@torch.no_grad()
def rewards_elsewhere(classifier, tokenizer, chat):
    "Return the reward of a conversation as other tools compute it."
    result = {}
    ids = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")["input_ids"]
    result["transformers"] = classifier(input_ids=ids).logits.item()
    hidden = classifier.model(input_ids=ids).last_hidden_state
    result["last token"] = classifier.score(hidden[0, -1]).item()
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    text = text.removeprefix(tokenizer.bos_token)  # as RewardBench does, since the tokenizer adds it
    longer = text + text
    batch = tokenizer([text, longer], padding=True, truncation=True, max_length=2048, return_tensors="pt")
    result["RewardBench"] = classifier(**batch).logits[0].item()
    return result


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_saved_checkpoint_gives_one_reward_in_every_tool(ending, checkpoint, tmp_path):
    folder = saved_with(BEGINS + ENDINGS[ending], checkpoint, tmp_path / "saved")
    classifier = T.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    scorer = Scorer.from_pretrained(folder, device="cpu")
    result = rewards_elsewhere(classifier, tokenizer, CHAT)
    ids = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    result["ids"], = scorer.rewards([[ids]], [None])[0]
    result["conversation"], = scorer.score([None], [CHAT])
    result["prompt and response"], = scorer.score([CHAT[:1]], [CHAT[1:]])
    if chat_marks(tokenizer).end.strip():
        rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
        without_begin = rendered.removeprefix(tokenizer.bos_token)
        result["rendered"], result["rendered, without bos"] = scorer.score([None] * 2, [rendered, without_begin])
        pipeline = T.pipeline("text-classification", folder, function_to_apply="none", device="cpu")
        result["pipeline"] = pipeline(without_begin)[0]["score"]
    expected = result["conversation"]
    assert result == pytest.approx(dict.fromkeys(result, expected), abs=1e-5)


def test_padding_is_not_the_token_that_conversations_end_with(checkpoint, tmp_path):
    tokenizer = chat_tokenizer("llama 3")
    tokenizer.chat_template = BEGINS + ENDINGS["another token after eos"]
    tokenizer.pad_token = "<|end|>"
    model = RewardModel.from_pretrained(checkpoint, device="cpu")
    model.save_pretrained(tmp_path, tokenizer)
    classifier = T.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    result = rewards_elsewhere(classifier, T.AutoTokenizer.from_pretrained(tmp_path), CHAT)
    reward, = Scorer(model, tokenizer).score([None], [CHAT])
    assert result == pytest.approx(dict.fromkeys(result, reward), abs=1e-5)


@pytest.mark.skipif(not TRL_TEMPLATES, reason="TRL is not installed")
@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_conversations_end_as_each_template_of_trl_ends(name, classifier, scorers):
    tokenizer = copy.deepcopy(scorers[0].tokenizer)
    tokenizer.chat_template = TRL_TEMPLATES[name]
    freeze_date(tokenizer)
    chat = chat_for(tokenizer)
    ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert encode([render(chat, tokenizer)], tokenizer) == [ids]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    if chat_marks(tokenizer).end:
        assert encode([rendered], tokenizer) == [ids]
    if chat is not CHAT:
        return  # rows and requests hold content as strings
    row = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "he"}]}
    stored = tokenize_rows(Dataset.from_list([row]), tokenizer, 10_000)[0]
    assert whole_sequences(stored)[0] == ids
    elsewhere = rewards_elsewhere(classifier, tokenizer, chat)
    if not chat_marks(tokenizer).begin.startswith(tokenizer.bos_token):
        del elsewhere["RewardBench"]  # where the tokenizer adds a token that the template does not write
    for scorer in scorers:
        scorer = copy.copy(scorer)
        scorer.tokenizer = tokenizer
        reward, = scorer.score([None], [chat])
        assert elsewhere == pytest.approx(dict.fromkeys(elsewhere, reward), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_made_elsewhere_is_read_as_apply_chat_template_writes(family):
    tokenizer = chat_tokenizer(family)
    ids = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    for ends_with_eos in (True, False):
        assert encode([render(CHAT, tokenizer)], tokenizer, ends_with_eos) == [ids]


def test_other_strings_still_end_once():
    tokenizer = chat_tokenizer("qwen")
    end = tokenizer.eos_token
    ids = encode(["ab"], tokenizer)
    for text in (f"ab{end}", f"ab{end}\n", f"ab{end}{end}\n", f"ab{end} \n {end}"):
        assert encode([text], tokenizer) == ids
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert encode(["user: ab\n"], tokenizer)[0][-1] == tokenizer.eos_token_id  # any text could end so


def test_rows_of_ids_may_end_as_texts_or_as_conversations(caplog):
    tokenizer = chat_tokenizer("qwen")
    begin = tokenizer("the ab")["input_ids"]
    end = tokenizer("<|im_end|>\n")["input_ids"]
    for last, warnings in (([], 1), (end[:1], 0), (end, 0)):
        caplog.clear()
        row = {"chosen_ids": begin + last, "rejected_ids": begin[:1] + last}
        tokenize_rows(Dataset.from_list([row]), tokenizer, 99)
        assert len([text for text in caplog.messages if "have token ids that do not end" in text]) == warnings


@pytest.mark.parametrize(
    "family, added", [("zephyr", "<s>"), ("phi 3", "<|endoftext|>"), ("llama 3", ""), ("qwen", "")]
)
def test_tokens_that_only_the_tokenizer_adds_are_reported(family, added, caplog):
    report_template(chat_tokenizer(family))
    reported = [f"The tokenizer adds {added} to the rendered text" in text for text in caplog.messages]
    assert reported == [True] * bool(added)


# ----- the date

DATED = (
    "Cutting off.\n{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ today }} {{ strftime_now(form | default('%A, %B %-d at %H:%M:%S.%f')) }}" + TURN + "<|eot|>\n{% endfor %}"
)


@pytest.fixture
def days(monkeypatch):
    "Make each look at the clock another day."
    class Clock(datetime.datetime):
        seen = 0

        @classmethod
        def now(cls, *_):
            Clock.seen += 1
            return datetime.datetime(2026, 1, 1, 1, 1, 1, 1) + datetime.timedelta(days=40 * Clock.seen, seconds=77)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    return Clock


DATED_TEMPLATES = {"dated": DATED, **{n: t for n, t in TRL_TEMPLATES.items() if "strftime_now" in t}}


@pytest.mark.parametrize("name", DATED_TEMPLATES)
def test_a_date_is_frozen_by_training_and_saved(name, checkpoint, tmp_path, days, caplog):
    tokenizer = chat_tokenizer("llama 3")
    tokenizer.chat_template = DATED_TEMPLATES[name]
    assert prints_date(tokenizer)
    assert len({tokenizer.apply_chat_template(CHAT, tokenize=False) for _ in range(3)}) > 1
    row = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "he"}]}
    config = RewardConfig(str(tmp_path / "run"), use_cpu=True, report_to="none", disable_tqdm=True, max_length=1000)
    rows = Dataset.from_list([row] * 2)
    model = RewardModel.from_pretrained(checkpoint, 0.0, "cpu")
    trainer = RewardTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    assert len([text for text in caplog.messages if "prints today's date. From now on" in text]) == 1
    trained_on = whole_sequences(trainer.train_dataset[0])[0]
    trainer.save_model(str(tmp_path / "saved"))
    saved = T.AutoTokenizer.from_pretrained(tmp_path / "saved")
    caplog.clear()
    scorer = Scorer.from_pretrained(tmp_path / "saved", device="cpu")
    assert not prints_date(saved) and not [text for text in caplog.messages if "date" in text]
    for form in (tokenizer, saved):
        texts = {form.apply_chat_template(CHAT, tokenize=False) for _ in range(3)}
        assert len(texts) == 1
        assert form.apply_chat_template(CHAT, return_dict=True)["input_ids"] == trained_on
    assert scorer.score([None], [CHAT]) == scorer.score([None], [CHAT])


def test_a_date_is_frozen_where_rows_are_tokenized_and_where_they_come_tokenized(checkpoint, tmp_path, days):
    dated = chat_tokenizer("llama 3")
    dated.chat_template = next(iter(DATED_TEMPLATES.values()))
    row = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "he"}]}
    tokenizers = [copy.deepcopy(dated), copy.deepcopy(dated)]
    tokenized = tokenize_rows(Dataset.from_list([row] * 2), tokenizers[0], 1000)
    config = RewardConfig(str(tmp_path / "run"), use_cpu=True, report_to="none", disable_tqdm=True, max_length=1000)
    model = RewardModel.from_pretrained(checkpoint, 0.0, "cpu")
    RewardTrainer(model, config, train_dataset=tokenized, processing_class=tokenizers[1])
    for tokenizer in tokenizers:
        ids = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
        assert ids == whole_sequences(tokenized[0])[0]


def test_a_frozen_template_prints_what_it_would_print_on_that_day(monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, *_):
            return DATE

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    space = "  {% for m in messages %}{{ strftime_now('%Y') }}{% endfor %}"
    for template in ({**DATED_TEMPLATES, "space": space, "break": "\n\n" + space, "text": "a " + space}).values():
        tokenizer = chat_tokenizer("llama 3")
        tokenizer.chat_template = template
        expected = tokenizer.apply_chat_template(CHAT, tokenize=False)
        freeze_date(tokenizer)
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == expected
        frozen = tokenizer.chat_template
        freeze_date(tokenizer)
        assert tokenizer.chat_template == frozen  # once is enough
    named = chat_tokenizer("llama 3")
    named.chat_template = {"default": DATED, "tool_use": FAMILIES["qwen"][0]}
    freeze_date(named)
    assert named.chat_template["default"].endswith(DATED) and named.chat_template["tool_use"] == FAMILIES["qwen"][0]


def test_a_date_is_frozen_when_a_model_is_saved_and_reported_when_one_is_opened(checkpoint, tmp_path, days, caplog):
    folder = saved_with(DATED, checkpoint, tmp_path / "saved")
    assert "From now on" in caplog.text and not prints_date(T.AutoTokenizer.from_pretrained(folder))
    elsewhere = T.AutoTokenizer.from_pretrained(folder)
    elsewhere.chat_template = DATED
    elsewhere.save_pretrained(folder)
    caplog.clear()
    scorer = Scorer.from_pretrained(folder, device="cpu")
    assert "rewards of conversations change from one day to the next" in caplog.text
    assert scorer.score([None], [CHAT]) != scorer.score([None], [CHAT])  # as in other tools


def test_an_adapter_is_saved_with_a_frozen_date_and_a_plain_output(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    from rlhf_reward.adapters import add_adapter

    tokenizer = chat_tokenizer("llama 3")
    tokenizer.chat_template = DATED
    tokenizer.pad_token = tokenizer.eos_token
    model = add_adapter(RewardModel.from_pretrained(checkpoint, device="cpu"), peft.LoraConfig(r=2))
    model.save_pretrained(tmp_path, tokenizer)
    saved = T.AutoTokenizer.from_pretrained(tmp_path)
    assert not prints_date(saved) and tokenizer.chat_template == DATED
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["sentence_transformers"]["activation_fn"] == "torch.nn.modules.linear.Identity"


# ----- the output, and strings of models made elsewhere

def test_cross_encoders_get_no_sigmoid(checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["sentence_transformers"] == {"activation_fn": "torch.nn.modules.linear.Identity"}
    model = RewardModel.from_pretrained(checkpoint, device="cpu")
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.activation.Sigmoid", "version": "5.1"}
    model.save_pretrained(tmp_path, T.AutoTokenizer.from_pretrained(checkpoint))
    saved = T.AutoConfig.from_pretrained(tmp_path).sentence_transformers
    assert saved == {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.1"}


@pytest.fixture
def elsewhere(checkpoint, tmp_path):
    "The checkpoint as another library would have saved it."
    folder = tmp_path / "elsewhere"
    T.AutoModelForSequenceClassification.from_pretrained(checkpoint).save_pretrained(folder)
    T.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["rlhf_reward"]
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def notes(caplog):
    return [text for text in caplog.messages if "does not record whether strings end with <|eot|>" in text]


def test_strings_of_a_model_made_elsewhere_are_reported_once(elsewhere, classifier, caplog):
    tokenizer = T.AutoTokenizer.from_pretrained(elsewhere)
    scorer = Scorer.from_pretrained(elsewhere, device="cpu")
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    scorer.score([None, CHAT[:1], None, None], [CHAT, "he", rendered, "the ab<|eot|>"])
    assert not notes(caplog)  # each ends as it was given
    with_eos = Scorer.from_pretrained(elsewhere, device="cpu", ends_with_eos=True)
    without = Scorer.from_pretrained(elsewhere, device="cpu", ends_with_eos=False)
    result = with_eos.score(["the"], [" ab"]) + without.score(["the"], [" ab"])
    assert not notes(caplog)
    assert scorer.score(["the"] * 2, [" ab"] * 2) == [result[1]] * 2 and scorer.score(["the"], [" ba"])
    assert len(notes(caplog)) == 1
    with torch.no_grad():
        for reward, text in zip(result, ("the ab<|eot|>", "the ab")):
            assert reward == pytest.approx(classifier(**tokenizer(text, return_tensors="pt")).logits.item(), abs=1e-5)
    with_eos.model.save_pretrained(elsewhere, tokenizer)  # it is recorded with the model
    assert Scorer.from_pretrained(elsewhere, device="cpu").score(["the"], [" ab"]) == result[:1]
    assert len(notes(caplog)) == 1


def test_a_checkpoint_of_this_library_needs_no_report(checkpoint, caplog):
    Scorer.from_pretrained(checkpoint, device="cpu").score(["the"], [" ab"])
    model = RewardModel(save_language_model("llama", checkpoint.parent / "new"), 0.0, "cpu")
    Scorer(model, word_tokenizer()).score(["w3"], [" w4"])
    assert "does not record" not in caplog.text


def test_an_encoder_has_no_end_to_choose(tmp_path):
    config = T.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    T.BertForSequenceClassification(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ends_with_eos is True, but the model is an encoder"):
        Scorer.from_pretrained(tmp_path, device="cpu", ends_with_eos=True)


def test_the_command_line_ends_strings(elsewhere, tmp_path, caplog):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "the", "chosen": " ab", "rejected": " ba"}) + "\n")
    expected = {}
    for option in ([], ["--ends_with_eos"]):
        output = tmp_path / f"scored{len(option)}.jsonl"
        caplog.clear()
        main(["score", "--model", elsewhere, "--data", str(rows), "--output", str(output), "--device", "cpu", *option])
        assert len(notes(caplog)) == 1 - len(option)
        scorer = Scorer.from_pretrained(elsewhere, device="cpu", ends_with_eos=bool(option))
        expected[len(option)] = scorer.score(["the"] * 2, [" ab", " ba"])
        written = json.loads(output.read_text())["rewards"]
        assert written == pytest.approx(expected[len(option)], abs=1e-6)
    assert expected[0] != expected[1]
