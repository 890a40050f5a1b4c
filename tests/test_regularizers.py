"Terms that training adds to the loss: the same gradient by hand, whatever the micro-batches and the layout."
import functools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from safetensors import safe_open
from torch.distributions import Bernoulli, kl_divergence
from transformers import AutoModelForCausalLM, AutoTokenizer

from architectures import save_language_model, word_tokenizer
from rlhf_reward import RewardConfig, RewardModel
from rlhf_reward.adapters import add_adapter, merge_adapter
from rlhf_reward.head_start import pooled_states
from rlhf_reward.language_loss import LanguageLoss, check_can_learn_language, predictions
from rlhf_reward.losses import Binary, BradleyTerry, Regression
from rlhf_reward.packing import by_comparison, model_inputs, pack_comparisons, pad_comparisons
from rlhf_reward.regularizers import check_regularizers, symmetric_divergence
from rlhf_reward.sampling import filler_comparison
from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder
from rlhf_reward.tokens import tokenize_rows, tokenized_comparison, whole_sequences
from tiny import open_tiny, tiny_trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return tiny_decoder(tmp_path_factory.mktemp("base"), synthetic_texts(), **small)


@functools.cache
def tokenized_rows(base):
    "Eight comparisons, of 4 responses and of 2, with weights."
    rows = []
    for number, row in enumerate([*synthetic_comparisons(4), *synthetic_comparisons(4, num_responses=2, seed=1)]):
        rows.append({**row, "weight": 0.5 + number % 3})
    rows = Dataset.from_list(rows[::2] + rows[1::2])
    return tokenize_rows(rows, AutoTokenizer.from_pretrained(base), 64)


def make_trainer(base, folder, dropout=0.0, rows=None, **options):
    defaults = {
        "learning_rate": 1.0,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "max_length": 64,
        "max_steps": 1,
        "logging_steps": 1,
    }
    rows = rows or tokenized_rows(base)
    return tiny_trainer(base, folder, {**defaults, **options}, model=open_tiny(base, dropout), train_dataset=rows)


def step(trainer):
    "One step of gradient descent with rate 1. Return what it subtracts from each weight, and the logged loss."
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    change = {name: before[name] - weight.detach() for name, weight in trainer.model.named_parameters()}
    return change, trainer.state.log_history[0]["loss"]


def assert_close(one, other, atol=2e-5):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=atol, msg=lambda text: f"{name}: {text}")


def loss_by_hand(trainer, added):
    "The gradient and value of the weighted mean loss of all comparisons at once plus `added(rewards, batch)`."
    model = trainer.model
    batch = pad_comparisons(list(trainer.train_dataset))
    rewards = by_comparison(model(**model_inputs(batch, model)), batch["ranks"])
    losses = BradleyTerry()(rewards, batch["ranks"], batch["margins"])
    loss = (losses * batch["weights"]).sum() / batch["weights"].sum() + added(rewards, batch)
    model.zero_grad()
    loss.backward()
    gradient = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    return gradient, loss.item()


# ----- sum to zero


def test_the_mean_reward_of_a_step_is_squared_whatever_its_micro_batches(base, tmp_path):
    def square(rewards, batch):
        means = []
        for row, ranks, weight in zip(rewards, batch["ranks"], batch["weights"]):
            means.append(weight * row[ranks > 0].mean())
        return 3.0 * (sum(means) / batch["weights"].sum()) ** 2

    expected = plain = None
    for size, accumulation in ((8, 1), (4, 2), (3, 3)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(base, tmp_path, sum_to_zero_coefficient=3.0, **options)
        trainer.model.score.weight.data += 0.5  # so that the mean is not about 0
        if expected is None:
            expected, value = loss_by_hand(trainer, square)
            plain, plain_value = loss_by_hand(trainer, lambda *_: 0.0)
            assert value > plain_value + 0.1
        change, loss = step(trainer)
        assert_close(change, expected)
        assert loss == pytest.approx(value, abs=1e-4)
    assert (expected["score.weight"] - plain["score.weight"]).abs().max() > 0.01


def test_the_mean_is_found_with_the_dropout_of_the_step(base, tmp_path):
    trainer = make_trainer(
        base,
        tmp_path,
        dropout=0.5,
        sum_to_zero_coefficient=1.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    result = {True: [], False: []}
    compute = trainer._losses

    def compute_and_keep(model, inputs):
        results = compute(model, inputs)
        result[torch.is_grad_enabled()].append(results[0].detach().clone())
        return results

    trainer._losses = compute_and_keep
    trainer.train()
    assert len(result[True]) == len(result[False]) == 4
    for one, other in zip(result[True], result[False]):
        assert torch.equal(one, other)


# ----- R-Drop


def test_divergences_of_pairs_by_hand():
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64)
    ranks = torch.tensor([[1, 2, 3, 4], [2, 1, 0, 0], [1, 0, 0, 0]])
    expected = []
    for first, second, number in zip(one, other, (4, 2, 1)):
        values = []
        for i in range(number):
            for j in range(i + 1, number):
                p, q = (Bernoulli(logits=rewards[i] - rewards[j]) for rewards in (first, second))
                values.append((kl_divergence(p, q) + kl_divergence(q, p)) / 2)
        expected.append(sum(values) / max(len(values), 1))
    torch.testing.assert_close(symmetric_divergence(one, other, ranks), torch.tensor(expected, dtype=torch.float64))


def test_two_draws_of_dropout_are_compared(base, tmp_path):
    "One draw by the model, then another; by hand of the pooled states."
    trainer = make_trainer(base, tmp_path, dropout=0.3, rdrop_coefficient=2.0, layout="padded")
    model = trainer.model.train()
    batch = pad_comparisons(list(trainer.train_dataset))
    states = pooled_states(model, list(trainer.train_dataset))
    torch.manual_seed(5)
    draws = [by_comparison(model.score(F.dropout(states, 0.3)), batch["ranks"]) for _ in range(2)]
    losses = sum(BradleyTerry()(draw, batch["ranks"], batch["margins"]) for draw in draws) / 2
    losses = losses + 2 * symmetric_divergence(*draws, batch["ranks"])
    expected = (losses * batch["weights"]).sum() / batch["weights"].sum()
    gradient, = torch.autograd.grad(expected, model.score.weight)
    with trainer._regularizing():
        torch.manual_seed(5)
        loss = trainer.compute_loss(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, model.score.weight)[0], gradient, rtol=1e-3, atol=1e-5)
    assert not model.dropout._forward_hooks


# ----- the language model


def language_gradients(folder, examples, weights):
    "The weighted mean loss of the first responses by transformers, one at a time, and its gradients."
    language_model = AutoModelForCausalLM.from_pretrained(folder)
    total = 0
    for example, weight in zip(examples, weights):
        ids = torch.tensor([whole_sequences(example)[example["ranks"].index(1)]])
        labels = ids.clone()
        labels[:, :len(example["shared_prefix"])] = -100
        total = total + weight * language_model(ids, labels=labels).loss / sum(weights)
    total.backward()
    base = language_model.base_model
    return total.item(), {name: weight.grad for name, weight in base.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("family, options", [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("gpt2", {}),
    ("gemma2", {"final_logit_softcapping": 2.0}),
    ("opt", {}),
    ("cohere", {"logit_scale": 0.5}),
    ("granite", {"logits_scaling": 3.0}),
    ("qwen3_moe", {}),
    ("gpt_neox", {}),
], ids=str)
def test_the_language_model_learns_as_in_transformers(family, options, tmp_path):
    "The gradient of the loss of language alone, packed and padded, against responses one at a time."
    folder = save_language_model(family, tmp_path, **options)
    examples = [
        tokenized_comparison([5, 6, 7], [[8, 9, 10], [11]], ranks=[1, 2]),
        tokenized_comparison([12], [[13], [14, 15, 16, 17], [18, 19]], ranks=[3, 1, 2]),
        tokenized_comparison([20, 21], [[22, 23], [26, 24, 25]], ranks=[2, 1]),
    ]
    weights = [1.0, 2.0, 0.5]
    value, expected = language_gradients(folder, examples, weights)
    for collator in (pack_comparisons, pad_comparisons):
        model = RewardModel(folder, 0.0, "cpu", attn_implementation="eager")
        language = LanguageLoss(model)
        language.TOKENS = 3
        batch = collator(examples)
        model(**model_inputs(batch, model))
        loss = (language(batch) * torch.tensor(weights)).sum() / sum(weights)
        loss.backward()
        language.close()
        assert loss.item() == pytest.approx(value, rel=1e-4)
        result = {name: weight.grad for name, weight in model.backbone.named_parameters() if weight.grad is not None}
        assert_close(result, expected)
        assert model.score.weight.grad is None and not model.backbone._forward_hooks


def test_an_adapter_learns_language_with_the_vocabulary_head_of_its_base(tmp_path):
    "The loss is that of the language model with the adapter merged, and only the adapter has gradients."
    for number, options in enumerate(({}, {"tie_word_embeddings": True})):
        folder = save_language_model("llama", tmp_path / f"{number}", **options)
        examples = [tokenized_comparison([5, 6, 7], [[8, 9, 10], [11]], ranks=[1, 2], response_starts=[3, 3])]
        model = RewardModel(folder, 0.0, "cpu", pooling="mean", heads=2)
        add_adapter(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        language = LanguageLoss(model)
        batch = pack_comparisons(examples)
        model(**model_inputs(batch, model))
        loss = language(batch).sum()
        loss.backward()
        language.close()
        trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
        assert trained and all("lora" in name for name in trained)
        merge_adapter(model)
        merged = AutoModelForCausalLM.from_pretrained(folder)
        merged.base_model.load_state_dict(model.backbone.state_dict())
        ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
        expected = merged(ids, labels=ids.where(ids > 7, -100)).loss
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_tokens_to_predict():
    "Ties for the best, a response without tokens of its own, no prefix, and comparisons that share a row."
    examples = [
        tokenized_comparison([5, 6], [[7, 8], [9], [10]], ranks=[1, 3, 1]),
        tokenized_comparison([11], [[], [12]], ranks=[1, 2]),
        tokenized_comparison([], [[13, 14, 15], [16]], ranks=[1, 2]),
        tokenized_comparison([17, 18], [[19], [20, 21]], ranks=[2, 1]),
    ]
    expected = {(6, 7, 0), (7, 8, 0), (6, 10, 0), (13, 14, 2), (14, 15, 2), (18, 20, 3), (20, 21, 3)}
    filled = [*examples, filler_comparison(), filler_comparison()] # the last step of several processes
    batches = [pad_comparisons(examples), pack_comparisons(examples), pack_comparisons(examples, math.inf)]
    batches += [pad_comparisons(filled), pack_comparisons(filled), pack_comparisons(filled, math.inf)]
    batches.append(pack_comparisons(examples, length_limits=frozenset({3}))) # two prefixes are written twice
    assert (batches[-1]["response_ids"] == 0).sum() < (batches[1]["response_ids"] == 0).sum()
    for batch in batches:
        result = predictions(batch)
        before = batch["input_ids"][result.rows, result.positions]
        triples = list(zip(before.tolist(), result.tokens.tolist(), result.comparisons.tolist()))
        assert len(triples) == len(expected) and set(triples) == expected


def test_the_vocabulary_head_is_not_saved(base, tmp_path):
    "Trained with every term: the same step in any micro-batches, and a checkpoint like any other."
    options = {"lm_coefficient": 0.5, "sum_to_zero_coefficient": 1.0}
    trainer = make_trainer(base, tmp_path / "one", **options)
    passes = []
    trainer.model.backbone.register_forward_hook(lambda backbone, *_: passes.append(backbone.training))
    one, loss = step(trainer)
    assert passes.count(True) == 1 # rewards and predictions are of one pass
    trainer = make_trainer(
        base, tmp_path / "two", per_device_train_batch_size=4, gradient_accumulation_steps=2, **options
    )
    two, other_loss = step(trainer)
    assert_close(one, two)
    assert loss == pytest.approx(other_loss, abs=1e-4)
    plain, plain_loss = step(make_trainer(base, tmp_path / "plain", sum_to_zero_coefficient=1.0))
    assert loss > plain_loss + 1
    trainer.save_model()
    with safe_open(tmp_path / "two/model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "score.weight" in names and not any("lm_head" in name for name in names)
    assert RewardModel.from_pretrained(tmp_path / "two", device="cpu").score.weight.shape == (1, 16)


# ----- what does not go together


def test_combinations_that_make_no_sense_are_refused(base, tmp_path):
    args = RewardConfig(str(tmp_path), use_cpu=True, report_to="none")
    model = open_tiny(base, 0.1)
    for name in ("sum_to_zero_coefficient", "rdrop_coefficient", "lm_coefficient"):
        on = replace(args, **{name: 0.5})
        check_regularizers(on, model, BradleyTerry())
        for loss in (Regression(), Binary()):
            with pytest.raises(ValueError, match=f"{name} is 0.5 with the loss .* learns rewards of single responses"):
                check_regularizers(on, model, loss)
        with pytest.raises(ValueError, match=f"{name} is 0.5 with attributes"):
            check_regularizers(on, RewardModel(base, device="cpu", attributes=["a"]), BradleyTerry())
    with pytest.raises(ValueError, match="rdrop_coefficient is 1.0, but the model has no dropout"):
        check_regularizers(replace(args, rdrop_coefficient=1.0), open_tiny(base), BradleyTerry())
    with pytest.raises(ValueError, match="lm_coefficient is on with layout='branched'"):
        check_regularizers(replace(args, lm_coefficient=1.0, layout="branched"), model, BradleyTerry())


def test_models_without_a_vocabulary_head_are_refused(tmp_path):
    untied = save_language_model("llama", tmp_path / "untied")
    RewardModel(untied, 0.0, "cpu").save_pretrained(tmp_path / "reward", word_tokenizer())
    with pytest.raises(ValueError, match="lm_coefficient is on, but its checkpoint has no lm_head.weight"):
        LanguageLoss(RewardModel.from_pretrained(tmp_path / "reward", device="cpu"))
    bert = RewardModel(save_language_model("bert", tmp_path / "bert"), 0.0, "cpu")
    with pytest.raises(ValueError, match="lm_coefficient is on, but the backbone is no decoder"):
        check_can_learn_language(bert, "auto")
    grown = RewardModel(untied, 0.0, "cpu")
    grown.backbone.resize_token_embeddings(70)
    with pytest.raises(ValueError, match="its vocabulary head has 64 tokens of 70"):
        LanguageLoss(grown)
