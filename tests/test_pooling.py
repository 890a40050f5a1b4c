"The mean of a response's tokens, with equal or learned weights: which tokens, in which batch, in which checkpoint."
import itertools
import json
import math
from os.path import commonprefix

import numpy as np
import pytest
import torch
from architectures import padded, save_language_model, word_tokenizer
from chat_tokenizers import FAMILIES, chat_tokenizer
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, tokenize_rows
from rlhf_reward.adapters import lora_config
from rlhf_reward.branching import branch_comparisons
from rlhf_reward.converting import convert
from rlhf_reward.encoding import encode, render
from rlhf_reward.packing import model_inputs, pack_comparisons, pad_comparisons
from rlhf_reward.pooling import RESPONSE_POOLINGS, ResponsePooling
from rlhf_reward.response_tokens import rendered_prompts, response_starts
from rlhf_reward.reward import is_reward_model
from rlhf_reward.rl import RewardFunction
from rlhf_reward.rows import to_comparison, to_responses
from rlhf_reward.scoring import Scorer
from rlhf_reward.tokenized import whole_sequences

ROWS = [
    {"prompt": "w3 w4 w5", "responses": [" w6 w7 w8", " w6", "", " w6 w7 w9 w9 w9 w9"]},
    {"prompt": "w9", "responses": [" w3 w4"]},
    {"prompt": "w3 w4 w5 w6", "responses": [" w7 w8", " w8 w7 w6"]},
    {"prompt": "", "responses": ["w5 w6 w7", "w5"]},
]
PAIRS = [
    {"prompt": "w3 w4 w5", "chosen": " w6 w7", "rejected": " w6 w8 w9"},
    {"prompt": "w7 w8", "chosen": " w9", "rejected": " w3 w4 w5 w6"},
    {"prompt": "w4", "chosen": " w5 w5", "rejected": ""},
]
CHAT = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    "Language models that are packed, branched and padded."
    families = ("llama", "bloom", "bert")
    return {family: save_language_model(family, tmp_path_factory.mktemp(family)) for family in families}


def new_model(base, pooling, **options):
    torch.manual_seed(0)
    model = RewardModel(base, 0.0, "cpu", pooling=pooling, **options)
    if pooling == "attention":
        torch.nn.init.normal_(model.response_pooling.query, std=3)
    return model


@torch.no_grad()
def expected_reward(model, ids, start):
    "The reward by the formula, from the states of the sequence alone."
    states = model.backbone(torch.tensor([ids])).last_hidden_state[0, start:]
    scores = torch.zeros(len(states))
    if model.pooling == "attention":
        scores = states @ model.response_pooling.query / math.sqrt(states.shape[1])
    return (scores.softmax(dim=0) @ states @ model.score.weight.T).item()


# ----- the formula

def test_pooled_states_are_weighted_means_of_the_tokens_of_each_response():
    torch.manual_seed(0)
    states = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    spans = [(0, 0, 3), (1, 2, 7), (0, 2, 4), (1, 6, 7)] # row, first token, end
    tokens = []
    for number, (row, first, end) in enumerate(spans):
        tokens += [(row, position, number) for position in range(first, end)]
    for pooling in RESPONSE_POOLINGS:
        module = ResponsePooling(pooling, 5).double()
        if pooling == "attention":
            torch.nn.init.normal_(module.query, std=30) # exponentials that overflow unless the highest is subtracted
        for order in (tokens, tokens[::-1]): # tokens of a response need not be neighbors
            pooled = module(states, torch.tensor(order), len(spans))
            for result, (row, first, end) in zip(pooled, spans):
                own = states[row, first:end]
                scores = own @ module.query / 5**0.5 if pooling == "attention" else own.new_zeros(len(own))
                torch.testing.assert_close(result, scores.softmax(0) @ own)
        gradient, = torch.autograd.grad(pooled.sum(), states)
        assert gradient[0, 4:].abs().max() == 0 and gradient[0, 2].abs().min() > 0
    start = ResponsePooling("attention", 5).double()(states, torch.tensor(tokens), len(spans))
    torch.testing.assert_close(start, ResponsePooling("mean", 5)(states, torch.tensor(tokens), len(spans)))


# ----- which tokens

def begins(comparison, tokenizer):
    "Return the text of the tokens of each response."
    prompts = rendered_prompts(comparison, tokenizer)
    wholes = [comparison.prompt + response for response in comparison.responses]
    sequences = encode([render(text, tokenizer) for text in wholes], tokenizer)
    starts = response_starts(prompts, sequences, sequences, tokenizer)
    return [tokenizer.decode(ids[start:]) for ids, start in zip(sequences, starts)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_has_the_same_response_in_every_form(family):
    tokenizer = chat_tokenizer(family)
    user = {"role": "user", "content": "the the"}
    answers = [{"role": "assistant", "content": content} for content in ("abba", "\n\nabba he", "", "abb")]
    for before in ([user], [{"role": "system", "content": "he"}, user, answers[0], user]):
        found = begins(to_responses({"prompt": before, "responses": [[answer] for answer in answers]}), tokenizer)
        for answer, text in zip(answers, found):
            whole = [*before, answer]
            assert begins(to_responses({"text": whole}), tokenizer) == [text], "alone"
            assert begins(to_responses({"texts": [whole, [user, answers[0]]]}), tokenizer)[0] == text, "with another"
            rendered = render(whole, tokenizer)
            after = rendered.removeprefix(commonprefix([rendered, render(before, tokenizer)]))
            assert text.endswith(after) and after.count("assistant") == text.count("assistant") == 1


def test_where_a_response_begins():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    user, result = {"role": "user", "content": "w3"}, {"role": "tool", "content": "w5"}
    answer, call = {"role": "assistant", "content": "w6 w7"}, {"role": "assistant", "content": "w4"}
    cases = [
        ({"prompt": "w3 w4", "responses": [" w5", "", " w5 w6"]}, ["w5 <eos>", "<eos>", "w5 w6 <eos>"]),
        ({"prompt": "", "responses": ["w5 w6"]}, ["w5 w6 <eos>"]),
        ({"prompt": [user], "response": [answer]}, ["w6 w7"]),
        ({"prompt": [user], "response": [call, result, answer]}, ["w4 w3 w5 w3 w6 w7"]), # roles are unknown words, w3
        ({"prompt": [user, call], "response": [answer]}, ["w4 w3 w6 w7"]), # what the prompt begins for the assistant
        ({"text": [user, answer, user]}, ["w3"]),
        ({"text": [answer]}, ["w3 w6 w7"]),
    ]
    for row, expected in cases:
        assert begins(to_responses(row), tokenizer) == expected, row
    turns = "\n\nHuman: w3\n\nAssistant: w4\n\nHuman: w5\n\nAssistant:"
    for row in ({"text": turns + " w6"}, {"texts": [turns + " w6", "\n\nHuman: w9\n\nAssistant: w6"]}):
        assert begins(to_responses(row), tokenizer)[0] == "w6 <eos>"
    pair = {"chosen": turns + " w6", "rejected": "\n\nHuman: w3\n\nAssistant: w8\n\nHuman: w4\n\nAssistant: w5 w6"}
    assert begins(to_comparison(pair), tokenizer) == ["w6 <eos>", "w5 w6 <eos>"]
    # a token that prompt and response form together is of the response
    merged = chat_tokenizer("qwen")
    assert begins(to_responses({"prompt": "he a", "response": "b he"}), merged) == ["ab he<|im_end|>"]
    # a rendered conversation, in parts; before a word the line breaks are two tokens, at the end one
    rendering = chat_tokenizer("llama 3")
    prompt = render([user], rendering) + "<|start|>assistant<|end_header|>\n\n"
    assert begins(to_responses({"prompt": prompt, "response": "he<|eot|>"}), rendering) == ["\n\nhe<|eot|>"]


def test_whole_strings_and_token_ids_are_refused(bases):
    tokenizer = word_tokenizer()
    scorer = Scorer(new_model(bases["llama"], "mean"), tokenizer)
    for text in ("w3 w4", "w3"):
        with pytest.raises(ValueError, match="'w3.*does not show where its response begins.*prompt and response"):
            scorer.score([None], [text])
    ids = {"chosen_ids": [3, 4, 5, 2], "rejected_ids": [3, 4, 2]}
    results = scorer.read_rows([ids, PAIRS[0]], "the rows")
    assert isinstance(results[0], ValueError) and "Row 1" in str(results[0])
    rows = Dataset.from_list([{"chosen": "w3 w4", "rejected": "w3 w5"}])
    with pytest.raises(ValueError, match="Row 1.*does not show where its response begins"):
        tokenize_rows(rows, tokenizer, 32, response_starts=True)
    assert len(tokenize_rows(rows, tokenizer, 32)) == 1
    pairs = Dataset.from_list([*PAIRS, {"prompt": None, "chosen": "w3 w4", "rejected": "w3 w5"}])
    kept = tokenize_rows(pairs, tokenizer, 32, on_bad_row="skip", response_starts=True)
    assert kept["response_starts"] == [[3, 3], [2, 2], [1, 1]]
    with pytest.raises(ValueError, match="response_tokens is None; expected"):
        scorer.model(torch.tensor([[3, 4]]))


def test_a_prompt_that_is_cut_moves_the_response(bases):
    model = new_model(bases["llama"], "mean")
    scorer = Scorer(model, word_tokenizer(), max_length=6, on_overlong="truncate_prompt")
    row = {"prompt": "w3 w4 w5 w6 w7", "responses": [" w8", " w8 w9"]}
    sequences, = scorer.tokenize([to_responses(row)])
    assert [list(zip(*sequence))[1] for sequence in sequences] == [(0, 0, 0, 1, 1), (0, 0, 0, 1, 1, 1)]
    rows = Dataset.from_list([{**row, "ranks": [1, 2]}])
    tokenized = tokenize_rows(rows, word_tokenizer(), 6, "truncate_prompt", response_starts=True)
    assert tokenized[0]["response_starts"] == [3, 3] and tokenized[0]["rests"] == [[2], [9, 2]]


def test_single_responses_that_are_grouped_keep_their_starts():
    rows = [{"prompt": "w3 w4", "response": response, "score": score} for response, score in ((" w5", 1.0), ("", 2.0))]
    for table in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        example, = tokenize_rows(table, word_tokenizer(), 32, keep_ties=True, response_starts=True)
        assert example["response_starts"] == [2, 2] and len(example["rests"]) == 2


# ----- in any batch

@pytest.mark.parametrize("pooling", RESPONSE_POOLINGS)
def test_rewards_do_not_depend_on_the_batch(bases, pooling):
    for family, base in bases.items():
        model = new_model(base, pooling)
        tokenizer = word_tokenizer()
        scorer = Scorer(model, tokenizer)
        assert scorer.packs == (family != "bert")
        comparisons = [to_responses(row) for row in ROWS]
        together = scorer.score_comparisons(comparisons)
        for comparison, rewards in zip(comparisons, together):
            alone = scorer.score([comparison.prompt], comparison.responses[-1:])
            assert alone[0] == pytest.approx(rewards[-1], abs=1e-5), family
            start = len(encode([comparison.prompt], tokenizer)[0]) - 1
            for response, reward in zip(comparison.responses, rewards):
                ids, = encode([comparison.prompt + response], tokenizer)
                assert reward == pytest.approx(expected_reward(model, ids, start), abs=1e-5), family
        assert len(set(np.concatenate(together).round(4))) > 6


def test_every_layout_has_the_same_rewards_and_gradients(bases):
    tokenizer = word_tokenizer()
    rows = Dataset.from_list([{**row, "ranks": list(range(1, len(row["responses"]) + 1))} for row in ROWS[::2]])
    examples = list(tokenize_rows(rows, tokenizer, 32, response_starts=True))
    model = new_model(bases["llama"], "attention")
    found = {}
    for collate in (pad_comparisons, pack_comparisons, branch_comparisons):
        batch = collate(examples)
        model.zero_grad()
        rewards = model(**model_inputs(batch, model))
        rewards.pow(2).sum().backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        found[collate] = rewards.detach(), torch.cat(gradients), model.response_pooling.query.grad.clone()
    rewards, gradients, of_query = found[pad_comparisons]
    assert of_query.abs().max() > 0
    for others in found.values():
        torch.testing.assert_close(others[0], rewards, atol=1e-5, rtol=0)
        torch.testing.assert_close(others[1], gradients, atol=1e-5, rtol=1e-4)
    # padding on any side: positions count real tokens
    ids = list(itertools.chain.from_iterable(map(whole_sequences, examples)))
    batch = pad_comparisons(examples)
    for side in ("left", "right"):
        input_ids, mask = padded(ids, side, 0)
        with torch.no_grad():
            others = model(input_ids, mask, response_tokens=batch["response_tokens"])
        torch.testing.assert_close(others, rewards, atol=1e-5, rtol=0)
    # what no response can have
    for tokens in ([[0, 99, 0]], [[0, 0, 99]], [[0, 0, 0]], [[0, 0]]):
        with pytest.raises(ValueError, match="response_tokens"):
            model(input_ids, mask, response_tokens=torch.tensor(tokens))
    # the default reads none of them
    last = new_model(bases["llama"], None)
    assert "response_tokens" not in model_inputs(batch, last) and last.response_pooling is None


def test_a_reward_function_gives_the_rewards_of_the_scorer(bases):
    scorer = Scorer(new_model(bases["llama"], "mean"), word_tokenizer())
    prompts, completions = ["w3 w4", "w3 w4", "w5"], [" w5", "", " w6 w7"]
    assert RewardFunction(scorer)(prompts, completions) == scorer.score(prompts, completions)


# ----- in a checkpoint

@pytest.mark.parametrize("pooling, attributes", [("mean", None), ("attention", ["helpfulness", "verbosity"])])
def test_a_checkpoint_opens_here_and_nowhere_else(bases, tmp_path, pooling, attributes):
    model = new_model(bases["llama"], pooling, attributes=attributes)
    model.save_pretrained(tmp_path, word_tokenizer())
    opened = Scorer.from_pretrained(tmp_path, "cpu")
    assert opened.model.pooling == pooling and is_reward_model(tmp_path)
    expected = Scorer(model, word_tokenizer()).score(["w3 w4"] * 2, [" w5 w6", ""])
    assert opened.score(["w3 w4"] * 2, [" w5 w6", ""]) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    others = {"last", *RESPONSE_POOLINGS} - {pooling}
    for other in others:
        with pytest.raises(ValueError, match="The reward head.*expected one bias-free"):
            RewardModel.from_pretrained(tmp_path, device="cpu", pooling=other)
    facts = json.loads((tmp_path / "config.json").read_text())["rlhf_reward"]
    assert facts["pooling"] == pooling and not facts["opens_as_sequence_classification"] and "note" in facts
    assert RewardModel(tmp_path, device="cpu").pooling == pooling  # a new head on the same backbone
    if pooling == "attention":
        assert not torch.equal(opened.model.response_pooling.query, torch.zeros(32))
    half = RewardModel.from_pretrained(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert half.score.weight.dtype == torch.float32
    assert Scorer(half, word_tokenizer()).score(["w3 w4"], [" w5 w6"]) == pytest.approx(expected[:1], abs=0.1)


@pytest.mark.parametrize("pooling, adapter", [("mean", None), ("attention", "lora")])
def test_training_keeps_the_pooling(bases, tmp_path, pooling, adapter):
    peft = pytest.importorskip("peft")
    rows = Dataset.from_list(PAIRS * 2)
    options = dict(
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_steps=2,
        learning_rate=0.05,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=2,
    )
    model = new_model(bases["llama"], pooling)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    config = lora_config(2, 4, 0.0, "all-linear") if adapter else None
    args = RewardConfig(str(tmp_path), **options)
    sets = {"train_dataset": rows, "eval_dataset": rows}
    trainer = RewardTrainer(model, args, **sets, processing_class=word_tokenizer(), peft_config=config)
    trainer.train()
    assert trainer.data_collator.func is pack_comparisons
    trainer.save_model()
    metrics = trainer.evaluate()
    scorer = Scorer.from_pretrained(tmp_path, "cpu")
    margins = []
    for row in PAIRS:
        chosen, rejected = scorer.score([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        margins.append(chosen - rejected)
    assert metrics["eval_margin"] == pytest.approx(sum(margins) / 3, abs=1e-5)
    weights = load_file(next(tmp_path.glob("*.safetensors")))
    head, = [weight for name, weight in weights.items() if name.endswith("score.weight")]
    assert head.shape == (1 + (pooling == "attention"), 1, 32)
    if adapter:
        assert not torch.equal(model.response_pooling.query, before["response_pooling.query"])
        with pytest.raises((RuntimeError, ValueError), match="score"):
            peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
        convert(tmp_path, tmp_path / "merged")
        merged = Scorer.from_pretrained(tmp_path / "merged", "cpu")
        texts = ["w3 w4", "w5"], [" w5 w6", " w7"]
        assert merged.score(*texts) == pytest.approx(scorer.score(*texts), abs=1e-5)
        assert merged.model.pooling == pooling and not hasattr(merged.model.backbone, "peft_config")


def test_rows_that_were_tokenized_without_starts_are_refused(bases, tmp_path):
    rows = tokenize_rows(Dataset.from_list(PAIRS), word_tokenizer(), 32)
    args = RewardConfig(str(tmp_path), report_to="none", use_cpu=True, max_steps=1)
    model = new_model(bases["llama"], "mean")
    trainer = RewardTrainer(model, args, train_dataset=rows, processing_class=word_tokenizer())
    with pytest.raises(ValueError, match="tokenize_rows.*response_starts=True"):
        trainer.train()
