"How a head starts, at which rate it learns, and which layers are trained."
import copy
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from scipy.optimize import minimize
from transformers import AutoTokenizer

from architectures import save_language_model
from rlhf_reward import RewardConfig, RewardModel, head_start
from rlhf_reward.arguments import check_arguments, check_sharded
from rlhf_reward.branching import branch_comparisons
from rlhf_reward.head_start import fit_head, pooled_states
from rlhf_reward.losses import LOSSES, BradleyTerry, make_loss
from rlhf_reward.packing import pack_comparisons, pad_comparisons
from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder
from rlhf_reward.tokens import tokenized_comparison
from rlhf_reward.trained_parts import freeze_lower_layers
from tiny import open_tiny, tiny_trainer, tokenized


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return tiny_decoder(tmp_path_factory.mktemp("base"), synthetic_texts(), **small)


def make_trainer(base, folder, rows=None, model=None, peft_config=None, **options):
    defaults = {"max_length": 64, "max_steps": 2, "logging_steps": 1, "lr_scheduler_type": "constant"}
    rows = rows or tokenized(base, 16)
    given = {"model": model, "train_dataset": rows, "peft_config": peft_config}
    return tiny_trainer(base, folder, {**defaults, **options}, **given)


def made(num=24, seed=0, vocab=60, **values):
    "Comparisons of 2 to 4 responses with weights, margins, ratings and labels; each prompt occurs twice."
    draw = np.random.default_rng(seed)
    examples = []
    for row in range(num):
        k = int(draw.integers(2, 5))
        ranks = draw.permutation(k) + 1
        tokens = draw.integers(3, vocab, size=(k + 1, 4)).tolist()
        examples.append(tokenized_comparison(
            tokens[0],
            tokens[1:],
            ranks=ranks.tolist(),
            margins=draw.uniform(0.1, 1, size=k * (k - 1) // 2).tolist(),
            ratings=draw.normal(size=k).tolist(),
            labels=(draw.random(k) < 0.5).tolist(),
            weight=float(draw.uniform(0.5, 2)),
            prompt_key=row // 2,
            **values,
        ))
    return examples


# ----- the fit


def test_what_is_fitted_is_what_the_head_reads(base, tmp_path):
    "In every layout and pooling, whatever the batch: states times head is the reward."
    examples = made()
    cases = [(base, {}, collator) for collator in (pad_comparisons, pack_comparisons, branch_comparisons)]
    bert = save_language_model("bert", tmp_path / "bert")
    cases += [(bert, {"pooling": pooling}, pad_comparisons) for pooling in ("first", "classifier")]
    for name, options, collator in cases:
        model = RewardModel(name, 0.5, "cpu", **options).train()
        sizes = [pooled_states(model, examples, collator, size) for size in (5, 100)]
        assert model.training and not model.score._forward_pre_hooks
        torch.testing.assert_close(*sizes, rtol=1e-4, atol=1e-5)
        model.eval()
        batch = pad_comparisons(examples)
        rewards = model(batch["input_ids"], batch["attention_mask"])
        torch.testing.assert_close(sizes[0] @ model.score.weight.T, rewards, rtol=1e-4, atol=1e-5)


def test_the_fit_is_the_minimum_that_scipy_finds(base):
    "The objective in plain numpy: K of 2 to 4, margins, weights, and soft labels of pairs."
    examples = made()
    for example in examples[:6]:
        example.update(rests=example["rests"][:2], ranks=[1, 2], margins=[0.0], preference=0.8)
        example.update(ratings=None, labels=None)
    model = open_tiny(base)
    ridge = 0.03
    fit = fit_head(model, examples, BradleyTerry(label_smoothing=0.1), ridge=ridge)
    states = pooled_states(model, examples).double().numpy()
    parts, start = [], 0
    for example in examples:
        parts.append(states[start:start + len(example["rests"])])
        start += len(example["rests"])
    scale = np.sqrt(np.mean(np.concatenate([part - part.mean(axis=0) for part in parts]) ** 2, axis=0))

    def cost(difference):
        return 0.9 * np.logaddexp(0, -difference) + 0.1 * np.logaddexp(0, difference)

    def objective(head):
        total = 0
        for part, example in zip(parts, examples):
            rewards = part @ (head / scale)
            ranks, margins = example["ranks"], iter(example["margins"])
            costs = []
            for winner in range(len(ranks)):
                for loser in range(len(ranks)):
                    if ranks[winner] < ranks[loser]:
                        difference = rewards[winner] - rewards[loser]
                        margin = next(margins)
                        share = example["preference"] or 1
                        costs.append(share * cost(difference - margin) + (1 - share) * cost(-difference + margin))
            total += example["weight"] * np.mean(costs)
        return total / sum(example["weight"] for example in examples) + ridge / 2 * head @ head

    best = minimize(objective, np.zeros(len(scale)), tol=1e-10).x / scale
    rewards = states @ best
    assert rewards.std() > 0.1
    np.testing.assert_allclose(states @ fit.weight[0].double().numpy(), rewards, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_a_head_is_fitted_for_every_loss(base, name):
    "No step from the fit lowers the penalized loss, and it is below that of the head 0."
    examples = made()
    model = open_tiny(base)
    loss = make_loss(name)
    for example in examples[:8] if loss.uses_ties else ():
        example.update(ranks=[1] * len(example["ranks"]), margins=[])
    before = copy.deepcopy(loss.state_dict())
    fit = fit_head(model, examples, loss, ridge=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())
    states = pooled_states(model, examples).double()
    sizes = [len(example["rests"]) for example in examples]
    seen = states
    if name not in ("regression", "binary"):
        seen = torch.cat([part - part.mean(dim=0) for part in states.split(sizes)])
    scale = seen.square().mean(dim=0).sqrt()
    batch = pad_comparisons(examples)

    def objective(head):
        rewards = torch.zeros(batch["ranks"].shape, dtype=torch.float64)
        rewards[batch["ranks"] > 0] = (states @ head.T).squeeze(1)
        targets = batch["labels" if name == "binary" else "ratings"]
        losses = loss(rewards, batch["ranks"], batch["margins"], targets)
        mean = (losses * batch["weights"]).sum() / batch["weights"].sum()
        return mean + 1e-3 / 2 * (head * scale).square().sum()

    head = fit.weight.double().requires_grad_()
    least = objective(head)
    gradient, = torch.autograd.grad(least, head)
    assert (gradient / scale).abs().max() < 1e-5
    assert least < objective(torch.zeros_like(head))


def test_attributes_get_a_row_each(base):
    examples = made()
    draw = np.random.default_rng(1)
    for example in examples:
        ratings = draw.normal(size=(2, len(example["rests"]))).round(3).tolist()
        example.update(attributes=[ratings[0], [None, *ratings[1][1:]]], attribute_names=["a", "b"])
    model = RewardModel(base, 0.0, "cpu", attributes=["a", "b"])
    fit = fit_head(model, examples, make_loss("regression"), ridge=0.1)
    states = pooled_states(model, examples).double().numpy()
    scale = np.sqrt(np.mean(states ** 2, axis=0))
    total = sum(example["weight"] for example in examples)
    for row, name in enumerate("ab"):
        # the ridge regression of each attribute, in closed form
        weights, targets = [], []
        for example in examples:
            rated = [rating is not None for rating in example["attributes"][row]]
            weights += [example["weight"] * is_rated / sum(rated) / 2 for is_rated in rated]
            targets += [rating or 0 for rating in example["attributes"][row]]
        features = states / scale
        weighted = features * np.array(weights)[:, None] / total
        head = np.linalg.solve(2 * weighted.T @ features + 0.1 * np.eye(len(scale)), 2 * weighted.T @ np.array(targets))
        np.testing.assert_allclose(fit.weight[row].numpy() * scale, head, atol=1e-5)


def test_the_ridge_is_chosen_on_other_prompts(base, monkeypatch):
    "Prompts that occur twice with opposite labels, and labels that a head of known direction gives."
    model = open_tiny(base)
    monkeypatch.setattr(head_start, "NUM_FOLDS", 2)
    examples = made(40, vocab=200)
    noise = fit_head(model, examples, BradleyTerry())
    assert noise.ridge == 100 and abs(noise.loss - noise.zero_loss) < 0.05
    states = pooled_states(model, examples)
    gold = states @ torch.randn(states.shape[1], generator=torch.Generator().manual_seed(0)) * 10
    start = 0
    for example in examples:
        rewards = gold[start:start + len(example["rests"])]
        start += len(rewards)
        example["ranks"] = [1 + int((rewards > reward).sum()) for reward in rewards]
        example["margins"] = [0.0] * len(example["margins"])
    known = fit_head(model, examples, BradleyTerry())
    assert known.ridge < 0.1 and known.loss < 0.7 * known.zero_loss
    for example in examples:
        example["prompt_key"] = 7
    alone = fit_head(model, examples, BradleyTerry())
    assert alone.ridge == 0.01 and math.isnan(alone.loss)


def test_nothing_to_learn_from_is_reported(base):
    examples = [tokenized_comparison([5], [[6], [7]], ranks=[1, 1])]
    with pytest.raises(ValueError, match="BradleyTerry can learn from none of 1 comparisons"):
        fit_head(open_tiny(base), examples, BradleyTerry())


# ----- the start in training


def test_the_head_starts_as_it_is_told(base, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(head_start, "RIDGES", (0.01,))
    rows = tokenized(base, 24)
    losses = {}
    for start in ("random", "small", "zero", "fitted"):
        trainer = make_trainer(base, tmp_path, rows, head_start=start, max_steps=1, per_device_train_batch_size=24)
        with caplog.at_level("INFO"):
            trainer.train()
        losses[start] = trainer.state.log_history[0]["loss"]
    assert losses["zero"] == pytest.approx(math.log(2), abs=1e-6)
    assert losses["fitted"] < losses["zero"] - 0.05 and losses["random"] != losses["zero"]
    distances = {start: abs(loss - losses["zero"]) for start, loss in losses.items()}
    assert 0 < distances["small"] < distances["random"]
    assert "fit to 24 comparisons" in caplog.text and "prompts that were left out" in caplog.text


def test_a_small_head_is_the_random_one_in_another_size(base, tmp_path):
    heads = {}
    for start in ("random", "small"):
        trainer = make_trainer(base, tmp_path, model=open_tiny(base), head_start=start, learning_rate=0.0, max_steps=1)
        trainer.train()
        heads[start] = trainer.model.score.weight.detach()
    torch.testing.assert_close(heads["small"] * math.sqrt(17), heads["random"]) # of width 16
    assert heads["small"].any()


def test_the_head_can_learn_alone_first(base, tmp_path):
    "A run with its rate alone, then another from its folder, which starts at that head."
    first = make_trainer(base, tmp_path, learning_rate=0.0, head_learning_rate=1e-2, weight_decay=0.1)
    moved = changes(first)
    assert moved.pop("score.weight") > 1e-3 and not any(moved.values())
    first.save_model(str(tmp_path / "head"))
    opened = RewardModel.from_pretrained(tmp_path / "head", device="cpu")
    assert torch.equal(opened.score.weight, first.model.score.weight)
    second = changes(make_trainer(base, tmp_path / "all", model=opened, head_start="zero"))
    assert all(change > 0 for change in second.values())
    assert (opened.score.weight - first.model.score.weight).abs().max() < 1e-2 # from the head of the first run


def test_a_trained_head_stays(base, tmp_path):
    "That of a reward model, of a second run in the same program, of an adapter, and of a checkpoint."
    options = {"head_start": "zero", "learning_rate": 0.0}
    trained = open_tiny(base)
    trained.save_pretrained(tmp_path / "model", AutoTokenizer.from_pretrained(base))
    opened = RewardModel.from_pretrained(tmp_path / "model", device="cpu")
    head = opened.score.weight.clone()
    make_trainer(base, tmp_path / "a", model=opened, **options).train()
    assert torch.equal(opened.score.weight, head)

    lora = LoraConfig(r=2, target_modules="all-linear")
    first = make_trainer(base, tmp_path / "b", peft_config=lora, head_start="zero", save_strategy="steps", save_steps=1)
    first.train()
    assert first.model.score.weight.any()
    head = first.model.score.weight.clone()
    resumed = make_trainer(
        base, tmp_path / "b", peft_config=lora, head_start="zero", save_strategy="steps", save_steps=1
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "b/checkpoint-2"))
    assert torch.equal(resumed.model.score.weight, head) and not resumed.model.head_is_new
    adapter = RewardModel.from_pretrained(tmp_path / "b/checkpoint-2", device="cpu")
    assert not adapter.head_is_new and torch.equal(adapter.score.weight, head)
    first.args.learning_rate = 0.0
    first.optimizer = None
    first.train()
    assert torch.equal(first.model.score.weight, head)


def test_a_stream_starts_too(base, tmp_path, monkeypatch):
    "In the padded layout; by its first comparisons."
    monkeypatch.setattr(head_start, "RIDGES", (0.1,))
    stream = tokenized(base, 16).to_iterable_dataset()
    trainer = make_trainer(base, tmp_path, stream, head_start="fitted", learning_rate=0.0, layout="padded", max_steps=1)
    fit = fit_head(trainer.model, list(tokenized(base, 16)), BradleyTerry())
    trainer.train()
    torch.testing.assert_close(trainer.model.score.weight.data, fit.weight, rtol=1e-3, atol=1e-5)


# ----- the rate of the head


def changes(trainer):
    "The largest change of each weight by training."
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    parameters = trainer.model.named_parameters()
    return {name: (weight.detach() - before[name]).abs().max().item() for name, weight in parameters}


def test_the_head_learns_at_its_rate(base, tmp_path):
    "With a schedule, and with an adapter. In the first step Adam moves each weight by the rate."
    lora = LoraConfig(r=2, target_modules="all-linear")
    for peft_config in (None, lora):
        options = {"max_steps": 1, "learning_rate": 1e-5, "head_learning_rate": 1e-2, "weight_decay": 0.1}
        trainer = make_trainer(base, tmp_path, peft_config=peft_config, **options)
        moved = changes(trainer)
        assert moved.pop("score.weight") == pytest.approx(1e-2, rel=0.1)
        assert 0 < max(moved.values()) < 2e-5
        groups = []
        for group in trainer.optimizer.param_groups:
            groups.append((group["lr"], group["weight_decay"], len(group["params"])))
        assert groups[-1] == (1e-2, 0.1, 1) and [rate for rate, *_ in groups[:-1]] == [1e-5, 1e-5]
    trainer = make_trainer(base, tmp_path, lr_scheduler_type="linear", head_learning_rate=1e-2)
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0, 0, 0]
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [1e-3, 1e-3, 1e-2]
    trainer.train() # once more, with the same optimizer


def test_both_rates_warm_up_together(base, tmp_path):
    options = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4, "learning_rate": 1e-5}
    trainer = make_trainer(base, tmp_path, head_learning_rate=1e-2, max_steps=1, **options)
    trainer.train()
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([2.5e-6, 2.5e-6, 2.5e-3]) # of the second step


def test_a_run_with_a_rate_of_the_head_resumes(base, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "head_learning_rate": 1e-2}
    whole = make_trainer(base, tmp_path / "whole", **options)
    whole.train()
    checkpoint = str(tmp_path / "whole/checkpoint-2")
    again = make_trainer(base, tmp_path / "again", **options)
    again.train(resume_from_checkpoint=checkpoint)
    for one, other in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(one, other)
    other = make_trainer(base, tmp_path / "other", **{**options, "head_learning_rate": 1e-1, "learning_rate": 1e-4})
    other.train(resume_from_checkpoint=checkpoint)
    assert [group["lr"] for group in other.optimizer.param_groups] == pytest.approx([1e-4, 1e-4, 1e-1])
    with pytest.raises(ValueError, match="the head apart.*cannot change within a run"):
        make_trainer(base, tmp_path / "none", **{**options, "head_learning_rate": None}).train(checkpoint)


def test_an_optimizer_without_a_group_for_the_head_is_refused(base, tmp_path):
    trainer = make_trainer(base, tmp_path, head_learning_rate=1e-2)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="head_learning_rate is 0.01, but the optimizer was given"):
        trainer.train()


# ----- frozen layers


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "qwen3_moe", "mamba", "bert", "distilbert"])
def test_lower_layers_stay_as_they_are(family, tmp_path):
    model = RewardModel(save_language_model(family, tmp_path), 0.0, "cpu")
    count = sum(1 for _ in model.parameters())
    freeze_lower_layers(model, 0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    freeze_lower_layers(model, 1)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(frozen) + len(trained) == count and "score.weight" in trained
    assert not any(".1." in name for name in frozen) and any(".1." in name for name in trained)
    assert not any(".0." in name and ".1." not in name for name in trained)
    embeddings = [re.search("embed|wte|wpe", name) for name in (*frozen, *trained)]
    assert any(embeddings) and not any(embeddings[len(frozen):])
    with pytest.raises(ValueError, match="freeze_layers is 3; expected 0 to 2, the layers"):
        freeze_lower_layers(model, 3)


def test_frozen_layers_in_training(base, tmp_path):
    for options in ({}, {"activation_checkpointing": True}):
        moved = changes(make_trainer(base, tmp_path, freeze_layers=1, max_steps=1, **options))
        for name, change in moved.items():
            assert (change == 0) == ("embed_tokens" in name or ".layers.0." in name), name
    with pytest.raises(ValueError, match="freeze_layers is 1 with an adapter"):
        make_trainer(base, tmp_path, freeze_layers=1, peft_config=LoraConfig(r=2, target_modules="all-linear"))


def test_values_that_make_no_sense_are_refused(tmp_path):
    args = RewardConfig(str(tmp_path), use_cpu=True, report_to="none")
    problems = {"freeze_layers": -1, "head_learning_rate": -1e-3, "lm_coefficient": -2.0, "head_start": "warm"}
    for name, value in problems.items():
        expected = "'random', 'small', 'zero' or 'fitted'" if name == "head_start" else "0 or more"
        with pytest.raises(ValueError, match=f"{name} is {value!r}; expected {expected}"):
            check_arguments(replace(args, **{name: value}))


def test_what_does_not_go_with_parts_of_weights_is_refused(tmp_path):
    args = RewardConfig(str(tmp_path), use_cpu=True, report_to="none", head_learning_rate=1e-3, freeze_layers=2)
    ones = {version: SimpleNamespace(fsdp_version=version, use_orig_params=None) for version in (1, 2)}
    for plugin in ones.values():
        plugin.state_dict_type = "FULL_STATE_DICT"
    for plugin in (None, ones[2], SimpleNamespace(**{**vars(ones[1]), "use_orig_params": True})):
        check_sharded(args, BradleyTerry(), plugin)
    cases = [
        ({}, None, ones[1], "head_learning_rate is 0.001 with FSDP, whose version 1 .*use_orig_params: true, or None"),
        ({"head_learning_rate": None}, None, ones[1], "freeze_layers is 2 with FSDP, whose version 1 .*or 0"),
        ({"ema_decay": 0.9}, None, ones[2], "ema_decay is 0.9 with FSDP or DeepSpeed.*rlhf_reward average"),
        ({"lm_coefficient": 0.1}, None, None, "lm_coefficient is 0.1 with FSDP or DeepSpeed.*expected DDP, or 0"),
        ({"loss": "rao_kupper"}, make_loss("rao_kupper"), None, "loss is rao_kupper, which learns .*or another loss"),
    ]
    for options, loss, plugin, problem in cases:
        with pytest.raises(ValueError, match=problem):
            check_sharded(replace(args, **options), loss or BradleyTerry(), plugin)


def test_a_head_of_length_stays_random(base, tmp_path, monkeypatch):
    "The start is fitted to the quality alone, which the reward is."
    monkeypatch.setattr(head_start, "RIDGES", (0.1,))
    options = {"length_loss": "odin", "length_coefficient": 1.0, "learning_rate": 0.0, "max_steps": 1}
    model = RewardModel(base, 0.0, "cpu", attributes=["quality", "length"])
    before = model.score.weight.detach().clone()
    rows = synthetic_comparisons(16)
    make_trainer(base, tmp_path, rows, model=model, head_start="fitted", **options).train()
    assert torch.equal(model.score.weight[1], before[1]) and not torch.equal(model.score.weight[0], before[0])
    model = RewardModel(base, 0.0, "cpu", attributes=["quality", "length"])
    with pytest.raises(ValueError, match="head_start is 'zero' with length_loss='odin'"):
        make_trainer(base, tmp_path, rows, model=model, head_start="zero", **options).train()
