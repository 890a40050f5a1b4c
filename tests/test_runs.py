"Whole runs: several processes, interruption and resuming, adapters, losses, and what stops a run."
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EarlyStoppingCallback, EvalPrediction

import rlhf_reward.training
from architectures import save_language_model, word_tokenizer
from programs import run
from rlhf_reward import RewardConfig, RewardModel, RewardTrainer
from rlhf_reward.data import ranked_pairs
from rlhf_reward.losses import LOSSES
from rlhf_reward.metrics import pair_metrics
from rlhf_reward.packing import Layout, pack_comparisons, pad_comparisons
from rlhf_reward.resuming import SIZES, checkpoint_problem, newest_checkpoint
from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder
from tiny import open_tiny, tokenized

QUIET = dict(use_cpu=True, report_to="none", disable_tqdm=True)
EXACT = {"accuracy", "pairs", "tied_rewards"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("base"), synthetic_texts())


def make(
    base,
    folder,
    rows=None,
    eval_rows=None,
    model=None,
    tokenizer=None,
    callbacks=None,
    peft_config=None,
    compute_metrics=pair_metrics,
    **options,
):
    "A trainer, of the tiny decoder on 40 comparisons unless others are given."
    torch.manual_seed(0)
    defaults = {
        **QUIET,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "logging_first_step": False,
        "save_strategy": "no",
    }
    return RewardTrainer(
        model or open_tiny(base),
        RewardConfig(str(folder), **{**defaults, **options}),
        train_dataset=rows or tokenized(base, 40),
        eval_dataset=eval_rows or tokenized(base, 10, 1),
        processing_class=tokenizer or AutoTokenizer.from_pretrained(base),
        callbacks=callbacks,
        peft_config=peft_config,
        compute_metrics=compute_metrics,
    )


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer, name):
    return [entry[name] for entry in logs(trainer)]


def ragged(number):
    "K = 4 and K = 2 in turn, with weights."
    sets = synthetic_comparisons(number), synthetic_comparisons(number, num_responses=2, seed=7)
    return Dataset.from_list([{**sets[n % 2][n], "weight": 1.0 + n % 3} for n in range(number)])


def weights_of_ragged(number):
    return [1.0 + n % 3 for n in range(number)]


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def raising(error):
    "A function that raises an error, whatever it is called with."
    def function(*args, **kwargs):
        raise error

    return function


# A step is one mean


@pytest.mark.parametrize("options", [
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
], ids=str)
def test_micro_batches_of_any_size_are_one_step(base, tmp_path, options):
    "Comparisons of other K and weight in each micro-batch, and a last step of fewer; 8 or 9 comparisons a step."
    size = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    whole = make(base, tmp_path, ragged(21), num_train_epochs=1, per_device_train_batch_size=size)
    parts = make(base, tmp_path, ragged(21), num_train_epochs=1, **options)
    whole.train()
    parts.train()
    assert len(logs(whole)) == len(logs(parts)) == math.ceil(21 / size)
    for one, other in zip(logs(whole), logs(parts)):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6) and one["pairs"] == other["pairs"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    of_parts = parts.model.state_dict()
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(tensor, of_parts[name], atol=1e-5, rtol=1e-5)


def test_the_loss_of_a_step_is_the_weighted_mean_over_its_comparisons(base, tmp_path):
    trainer = make(
        base,
        tmp_path,
        ragged(12),
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        train_sampling_strategy="sequential",
    )
    losses, weights = [], []
    for example in trainer.train_dataset:
        batch = pad_comparisons([example])
        with torch.no_grad():
            rewards = trainer.model(batch["input_ids"], batch["attention_mask"]).double().flatten()
        pairs = ranked_pairs(example["ranks"])
        losses.append(np.mean([math.log1p(math.exp(rewards[lost] - rewards[won])) for won, lost in pairs]))
        weights.append(example["weight"])
    trainer.train()
    assert logs(trainer)[0]["loss"] == pytest.approx(np.average(losses, weights=weights), abs=1e-6)


# Metrics while training


def unique_tokens(example):
    return len(example["shared_prefix"]) + sum(map(len, example["rests"]))


def test_logged_metrics_are_those_of_all_pairs_since_the_last_log(base, tmp_path):
    "Learning rate 0, so that rewards stay: two logs of three steps are the metrics of their 24 comparisons."
    options = dict(max_steps=6, logging_steps=3, learning_rate=0.0, train_sampling_strategy="sequential")
    trainer = make(base, tmp_path, ragged(48), **options)
    trainer.train()
    names = (
        "accuracy",
        "pairs",
        "tied_rewards",
        "margin",
        "margin_q25",
        "margin_median",
        "margin_q75",
        "chosen_reward",
        "chosen_reward_std",
        "rejected_reward_std",
    )
    assert len(logs(trainer)) == 2
    for index, entry in enumerate(logs(trainer)):
        part = trainer.train_dataset.select(range(24 * index, 24 * index + 24))
        expected = trainer.evaluate(part, metric_key_prefix="x")
        # that of the steps is a mean of three means
        assert entry["loss"] == pytest.approx(expected["x_loss"], abs=0.1)
        for name in names:
            assert entry[name] == pytest.approx(expected[f"x_{name}"], abs=1e-5), name
        unique = sum(map(unique_tokens, part))
        padded = 0
        for start in (0, 8, 16):
            batch = pad_comparisons(list(part.select(range(start, start + 8))))
            padded += batch["input_ids"].numel()
        assert entry["tokens_saved"] == pytest.approx(1 - unique / padded)
        assert entry["tokens_per_second"] / entry["pairs_per_second"] == pytest.approx(unique / entry["pairs"])


@pytest.fixture
def clock(monkeypatch):
    "Let time pass: `clock(seconds)` moves the counter that rates are measured with."
    real, passed = time.perf_counter, []
    monkeypatch.setattr(time, "perf_counter", lambda: real() + sum(passed))
    return passed.append


def test_evaluating_is_not_counted_as_training(base, tmp_path, clock):
    def slow_metrics(prediction):
        clock(60)
        return {}

    trainer = make(
        base,
        tmp_path,
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        compute_metrics=slow_metrics,
    )
    trainer.train()
    seconds = [entry["pairs"] / entry["pairs_per_second"] for entry in logs(trainer)]
    assert len(seconds) == 2 and max(seconds) < 60


def test_own_metrics_get_rewards_and_ranks_alone(base, tmp_path):
    "Another metric, of comparisons with K = 4 and K = 2: the rewards are 0 where there is no response."
    def best_is_first(prediction):
        rewards, ranks = prediction.predictions, prediction.label_ids
        assert rewards.shape == ranks.shape == (9, 4)
        assert (rewards[ranks < 1] == 0).all() and (ranks < 1).sum() == 2 * 4
        highest = np.where(ranks > 0, rewards, -np.inf).argmax(1)
        best = (ranks == 1).argmax(1)
        return {"best": float((highest == best).mean())}

    options = dict(compute_metrics=best_is_first, per_device_eval_batch_size=2)
    trainer = make(base, tmp_path, eval_rows=ragged(9), **options)
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_best"] <= 1 and metrics["eval_loss"] > 0
    assert metrics["eval_responses"] == 5 * 4 + 4 * 2 and "eval_accuracy" not in metrics
    output = trainer.predict(ragged(9))
    rewards = output.predictions[output.label_ids > 0]
    assert metrics["eval_reward_mean"] == pytest.approx(np.mean(rewards), abs=1e-6)
    assert metrics["eval_reward_std"] == pytest.approx(np.std(rewards), abs=1e-6)
    assert "eval_accuracy" not in make(base, tmp_path, compute_metrics=None).evaluate()


def test_the_evaluation_loss_is_the_weighted_mean(base, tmp_path):
    trainer = make(base, tmp_path, eval_rows=ragged(9))
    losses = [trainer.evaluate(trainer.eval_dataset.select([n]))["eval_loss"] for n in range(9)]
    mean = np.average(losses, weights=weights_of_ragged(9))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean, abs=1e-6)


def test_metrics_of_pairs_by_hand():
    rewards = np.array([[3.0, 1.0, 0.0], [0.0, 4.0, -100]])
    ranks = np.array([[1, 2, 2], [1, 2, -100]])
    metrics = pair_metrics(EvalPrediction(rewards, ranks))  # margins 2, 3, -4
    assert metrics["accuracy"] == 2 / 3 and metrics["margin"] == pytest.approx(1 / 3)
    assert metrics["margin_median"] == 2 and metrics["margin_q25"] == -1
    assert metrics["chosen_reward_std"] == pytest.approx(np.std([3, 3, 0]))
    assert metrics["rejected_reward_std"] == pytest.approx(np.std([1, 0, 4]))
    assert pair_metrics(EvalPrediction(rewards, np.zeros((2, 3)))) == {"pairs": 0}


@pytest.fixture
def waits(monkeypatch):
    "Names of the methods that made a tensor a number, while `waits.are_counted`."
    class Waits(list):
        are_counted = False

    waits = Waits()

    def counted(name, original):
        def method(self, *args, **kwargs):
            if waits.are_counted:
                waits.append(name)
            return original(self, *args, **kwargs)

        return method

    for name in ("item", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    return waits


def test_the_host_waits_for_nothing_but_logs(base, tmp_path, monkeypatch, waits):
    """
    No tensor becomes a number in a step that logs nothing, in rows as a GPU gets them.

    The Trainer's own loop has no such place either.
    """
    import rlhf_reward.inputs

    monkeypatch.setattr(rlhf_reward.training, "choose_layout", lambda *_, **__: Layout(pack_comparisons, "sdpa"))
    monkeypatch.setattr(rlhf_reward.inputs, "require", lambda *args: None)  # on a GPU it asserts by itself
    trainer = make(base, tmp_path, max_steps=4, logging_steps=100)
    compute_loss = trainer.compute_loss

    def counted_loss(*args, **kwargs):
        waits.are_counted = True
        loss = compute_loss(*args, **kwargs)
        waits.are_counted = False
        return loss

    monkeypatch.setattr(trainer, "compute_loss", counted_loss)
    trainer.train()
    assert waits == [] and trainer.state.global_step == 4
    waits.are_counted = True
    trainer.reward_loss.forward(torch.zeros(1, 2), torch.tensor([[1, 2]])).item()
    assert waits == ["item"]  # the count itself works


# Losses by name


def with_labels(row):
    return {"labels": [bool(score > np.median(row["scores"])) for score in row["scores"]]}


@pytest.fixture(scope="module")
def labeled_rows():
    "Comparisons that every loss can learn from."
    return synthetic_comparisons(8).map(with_labels)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(base, tmp_path, labeled_rows, loss):
    "The loss of training, of evaluation and of the function are the same number, and it falls."
    rows = labeled_rows
    trainer = make(
        base,
        tmp_path,
        rows,
        rows,
        loss=loss,
        margin_from_scores=LOSSES[loss].uses_margins,
        max_steps=8,
        learning_rate=6e-3,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert logs(trainer)[0]["loss"] == pytest.approx(before, abs=1e-5)
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    for name, parameter in trainer.reward_loss.named_parameters():
        assert parameter.item() != getattr(type(trainer.reward_loss)(), name).item()


def test_a_learned_threshold_is_saved_and_resumed(base, tmp_path):
    rows = [
        {"prompt": row["prompt"], "responses": row["responses"], "ranks": [1, 1, 2, 2]}
        for row in synthetic_comparisons(40)
    ]
    options = dict(
        rows=Dataset.from_list(rows), loss="rao_kupper", max_steps=8, save_strategy="steps", save_steps=4
    )
    whole = make(base, tmp_path / "whole", **options)
    resumed = make(base, tmp_path / "resumed", **options)
    whole.train()
    saved = json.loads((tmp_path / "whole/checkpoint-8/loss.json").read_text())
    assert set(saved) == {"loss", "log_tie"}
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    assert resumed.reward_loss.log_tie.item() == whole.reward_loss.log_tie.item() != math.log(3)


@pytest.mark.parametrize("loss, problem", [
    ("margin_scaled", "Row 2 of the training set has a pair without a margin above 0"),
    ("regression", "Row 2 of the training set has no scores, which the loss regression learns"),
    ("binary", "Row 1 of the training set has no label, which the loss binary learns"),
])
def test_missing_data_for_a_loss_is_reported_before_training(base, tmp_path, loss, problem):
    good = {
        "prompt": "x",
        "chosen": " a",
        "rejected": " b",
        "margin": 1.0,
        "score_chosen": 2.0,
        "score_rejected": 1.0,
    }
    bare = {"prompt": "y", "chosen": "a", "rejected": "b", "margin": None, "score_chosen": None, "score_rejected": None}
    rows = Dataset.from_list([good, bare])
    with pytest.raises(ValueError, match=problem):
        make(base, tmp_path, rows, loss=loss)
    with pytest.raises(ValueError, match="margin_from_scores is on, but the loss davidson has no margin"):
        make(base, tmp_path, rows, loss="davidson", margin_from_scores=True)


def test_comparisons_that_only_tie_are_kept_for_losses_that_learn_from_ties(base, tmp_path):
    rows = Dataset.from_list([
        {"prompt": "x", "responses": [" a", " b"], "ranks": [1, 2]},
        {"prompt": "x", "responses": [" a", " b"], "ranks": [1, 1]},
    ])
    assert len(make(base, tmp_path, rows, rows, loss="davidson").train_dataset) == 2
    assert len(make(base, tmp_path, rows, rows).train_dataset) == 1


# The arguments of transformers.Trainer


def test_several_sets_early_stopping_and_tensorboard(base, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make(
        base,
        tmp_path,
        eval_rows={"one": synthetic_comparisons(8, seed=1), "two": synthetic_comparisons(6, seed=2, num_responses=2)},
        max_steps=12,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        learning_rate=0.0,
        load_best_model_at_end=True,
        metric_for_best_model="eval_one_loss",
        callbacks=[EarlyStoppingCallback(2)],
        report_to="tensorboard",
    )
    trainer.train()
    assert trainer.state.global_step == 6  # the first evaluation is the best, and two more are no better
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent))
    events.Reload()
    names = (
        "loss",
        "accuracy",
        "tied_rewards",
        "margin",
        "margin_q25",
        "margin_median",
        "margin_q75",
        "chosen_reward",
        "chosen_reward_std",
        "rejected_reward",
        "rejected_reward_std",
        "grad_norm",
        "pairs_per_second",
        "tokens_per_second",
        "tokens_saved",
    )
    expected = {f"train/{name}" for name in names} | {"eval/one_loss", "eval/two_accuracy"}
    assert expected <= set(events.Tags()["scalars"])


def test_compiled_training_is_the_same(python, base, tmp_path):
    output = run(python, Path(__file__).with_name("compiled.py"), base, tmp_path).stdout
    losses = json.loads(output.split("losses:")[1])
    for name in ("eager", "aot_eager, padded", "eager, varlen"):
        assert losses[name] == pytest.approx(losses["plain"], abs=1e-5), name


def test_liger_kernels_go_into_the_backbone(base, tmp_path, monkeypatch):
    "The function of transformers for its own models is called for the backbone. The kernels themselves need a GPU."
    import transformers.trainer

    patched = []

    def apply_liger_kernel(model, config):
        patched.append((type(model).__name__, config))

    monkeypatch.setattr(rlhf_reward.training, "apply_liger_kernel", apply_liger_kernel)
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", lambda *args: None)
    make(base, tmp_path, max_steps=1, use_liger_kernel=True, liger_kernel_config={"rope": False}).train()
    assert patched == [("LlamaModel", {"rope": False})]


# What TRL's own tests of its reward trainer check and the tests above do not (its test_reward_trainer.py, read as a
# list): one-label models, dtypes, dataset types, raw and tokenized rows, tools, template arguments, streams, margins,
# several evaluation sets, own metrics, adapters and tags have their tests here, in test_training, test_data,
# test_tokens and test_adapters.


def unchanged(model, before):
    "Names of the parameters that training left as they were."
    return [name for name in before if torch.equal(before[name], model.get_parameter(name))]


def copies(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("adapter", [False, True])
def test_activation_checkpointing_reentrant_or_not(base, tmp_path, adapter):
    peft_config = LoraConfig(r=4, target_modules="all-linear") if adapter else None
    plain = make(base, tmp_path, max_steps=3, peft_config=peft_config)
    plain.train()
    for use_reentrant in (True, False):
        checkpointed = make(
            base,
            tmp_path,
            max_steps=3,
            peft_config=peft_config,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": use_reentrant},
        )
        before = {}
        for name, parameter in checkpointed.model.named_parameters():
            if parameter.requires_grad:
                before[name] = parameter.clone()
        checkpointed.train()
        assert logged(plain, "grad_norm") == pytest.approx(logged(checkpointed, "grad_norm"), rel=1e-4)
        assert unchanged(checkpointed.model, before) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_so_and_all_change(base, tmp_path, dtype):
    model = RewardModel(base, 0.0, "cpu", dtype=dtype)
    before = copies(model)
    make(base, tmp_path, model=model, max_steps=3, learning_rate=0.02, adam_epsilon=1e-4).train()
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes.pop("score.weight") == torch.float32
    assert set(dtypes.values()) == {dtype}
    assert unchanged(model, before) == []


def test_a_mixture_of_experts_trains_with_an_adapter(tmp_path):
    model = RewardModel(save_language_model("qwen3_moe", tmp_path / "base"), 0.0, "cpu")
    rows = [{"prompt": f"w{n} ", "chosen": f"w{n + 1}", "rejected": f"w{n + 2}"} for n in range(5, 30)]
    rows = Dataset.from_list(rows)
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = make(None, tmp_path, rows, rows, model, word_tokenizer(), peft_config=peft_config, max_steps=3)
    before = copies(model)
    trainer.train()
    changed = set(before) - set(unchanged(model, before))
    assert changed == {name for name in before if "lora_" in name or name == "score.weight"}


# After training


def test_the_scale_of_rewards_is_saved_and_used_on_request(base, tmp_path):
    trainer = make(base, tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="does not know the mean and standard deviation of its rewards; expected"):
        trainer.model.normalize(torch.zeros(1, 1))
    trainer.train()
    trainer.save_model()
    trainer.set_reward_scale(trainer.evaluate(), "ten comparisons")
    output = trainer.predict(trainer.eval_dataset)
    rewards = torch.tensor(output.predictions[output.label_ids > 0])[:, None]
    for _ in range(2):  # in the folder that was saved before, and saved again
        model = RewardModel.from_pretrained(str(tmp_path), device="cpu")
        normalized = model.normalize(rewards)
        assert normalized.mean().item() == pytest.approx(0, abs=1e-5)
        assert normalized.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
        scale = model.config.rlhf_reward
        assert scale["reward_over"] == {"data": "ten comparisons", "responses": 40}
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert classifier.config.rlhf_reward["reward_mean"] == scale["reward_mean"]
        trainer.save_model()
    again = make(base, tmp_path / "more", model=model, max_steps=1)
    again.train()
    with pytest.raises(ValueError, match="does not know"):  # they were of the weights before
        again.model.normalize(rewards)


def test_the_card_describes_data_settings_and_metrics(base, tmp_path, monkeypatch):
    options = dict(max_steps=3, eval_strategy="steps", eval_steps=3, loss="plackett_luce", weight_decay=0.01)
    trainer = make(base, tmp_path, **options)
    trainer.train()
    trainer.set_reward_scale(trainer.evaluate(), "the evaluation set")
    trainer.create_model_card("my-reward", dataset="org/preferences", tags=["test"])
    card = (tmp_path / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "datasets": ["org/preferences"],
        "tags": ["reward-model", "rlhf_reward", "test"],
        "model-index": header["model-index"],
    }
    accuracy = trainer.state.log_history[-1]["eval_accuracy"]
    metric, = header["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == round(accuracy, 4)
    for line in (
        "# my-reward",
        "| `loss` | `plackett_luce` |",
        "| `weight_decay` | `0.01` |",
        f"| accuracy | {accuracy:.4g} |",
        "Rewards of 40 responses of `the evaluation set` have the mean",
        "| step | loss | accuracy |",
    ):
        assert line in card, line
    assert sum(line.startswith(("| 1 |", "| 2 |", "| 3 |")) for line in card.splitlines()) >= 3
    for absent in ("None", str(tmp_path), "runtime"):
        assert absent not in card
    assert "![loss and accuracy](curves.png)" in card
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    trainer.create_model_card("my-reward")
    assert "curves.png" not in (tmp_path / "README.md").read_text()
    peft_config = LoraConfig(r=3, target_modules="all-linear")
    adapter = make(base, tmp_path / "adapter", max_steps=1, peft_config=peft_config)
    adapter.train()
    adapter.create_model_card()
    described = "with the loss `bradley_terry`, as an adapter (LORA of rank 3)."
    assert described in (tmp_path / "adapter/README.md").read_text()


def test_push_to_hub_uploads_model_and_card(base, tmp_path, monkeypatch):
    "The hub's own functions are replaced by one that notes what would be uploaded."
    import transformers.trainer

    uploads = []

    class Hub:
        def create_repo(self, name, **more):
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, repo_id, folder_path, **more):
            uploads.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    trainer = make(base, tmp_path / "mine", max_steps=1, push_to_hub=True)
    trainer.train()
    trainer.push_to_hub(dataset="org/preferences")
    repo, files = uploads[-1]
    assert repo == "me/mine"
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json", "training_args.json"} <= files
    assert "datasets:\n- org/preferences" in (tmp_path / "mine/README.md").read_text()
    assert 'Scorer.from_pretrained("me/mine")' in (tmp_path / "mine/README.md").read_text()


# What stops a run


def test_a_loss_that_is_not_finite_stops_the_run_with_its_rows(base, tmp_path):
    options = dict(max_steps=3, logging_steps=3, train_sampling_strategy="sequential")
    trainer = make(base, tmp_path, synthetic_comparisons(24), **options)
    forward = trainer.reward_loss.forward

    def spoiled(rewards, ranks, *more):
        losses = forward(rewards, ranks, *more)
        is_spoiled = (torch.arange(len(ranks)) == 5) & torch.tensor(trainer.state.global_step == 1)
        return losses * torch.where(is_spoiled, math.nan, 1.0)

    trainer.reward_loss.forward = spoiled
    problem = r"The loss of step 2 is not finite, of 1 comparisons \(row 14 of the training set\)"
    with pytest.raises(ValueError, match=problem):
        trainer.train()


def test_weights_that_are_not_finite_are_neither_saved_nor_the_end(base, tmp_path):
    "The loss of the only step is finite, its update is not."
    for options in ({"save_strategy": "steps", "save_steps": 1}, {"logging_steps": 100}, {"logging_strategy": "no"}):
        trainer = make(base, tmp_path, max_steps=1, learning_rate=1e38, **options)
        problem = r"The weight .* is not finite after step 1, though the losses before were"
        with pytest.raises(ValueError, match=problem):
            trainer.train()
    assert not list(Path(tmp_path).glob("checkpoint-*"))
    with pytest.raises(ValueError, match="40 of 40 rewards of the evaluation set are not finite"):
        trainer.evaluate()


def test_comparisons_without_weight_do_not_count(base, tmp_path):
    rows = Dataset.from_list([{**row, "weight": float(n >= 8)} for n, row in enumerate(synthetic_comparisons(16))])
    trainer = make(base, tmp_path, rows, max_steps=2, train_sampling_strategy="sequential")
    trainer.train()
    first, second = logged(trainer, "loss")
    assert first == 0 and second > 0


def test_comparisons_without_anything_to_learn_do_not_count(base, tmp_path):
    good = {"prompt": "x", "chosen": " robin", "rejected": " iron"}
    scored = {**good, "score_chosen": 2.0, "score_rejected": 1.0}
    unscored = {**good, "score_chosen": None, "score_rejected": None}
    trainer = make(base, tmp_path, Dataset.from_list([scored, scored]), loss="regression")
    whole = trainer.evaluate(Dataset.from_list([scored]))
    mixed = trainer.evaluate(Dataset.from_list([scored, unscored]))
    none = trainer.evaluate(Dataset.from_list([unscored]))
    assert mixed["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-5)
    assert mixed["eval_without_loss"] == 1 and mixed["eval_pairs"] == 2
    assert "eval_loss" not in none and none["eval_without_loss"] == 1 and none["eval_pairs"] == 1
    assert "eval_without_loss" not in whole


def test_a_second_run_and_the_time_before_are_not_counted(base, tmp_path, clock):
    trainer = make(base, tmp_path, max_steps=2, logging_steps=2)
    clock(60)
    trainer.train()
    trainer.train()
    (entry,) = logs(trainer)
    assert entry["pairs"] == 96 and entry["pairs"] / entry["pairs_per_second"] < 60


@pytest.mark.parametrize("change, problem", [
    (dict(rows="x"), "train_dataset is a str; expected a list of rows, or a datasets.Dataset"),
    (dict(model=torch.nn.Linear(1, 1)), "model is a Linear; expected the name of a model, or a RewardModel"),
    (dict(eval_do_concat_batches=False), "eval_do_concat_batches is False"),
    (dict(include_for_metrics=["loss"]), "include_for_metrics is"),
])
def test_what_the_trainer_cannot_use_is_rejected_by_name(base, tmp_path, change, problem):
    with pytest.raises(ValueError, match=problem):
        make(base, tmp_path, **change)


def test_too_many_responses_for_plackett_luce_are_named_before_training(base, tmp_path):
    rows = []
    for k in (2, 13):
        ranks = list(range(1, k + 1))
        rows.append({"prompt": "x", "responses": [f" {n}" for n in range(k)], "ranks": ranks})
    with pytest.raises(ValueError, match="Row 2 of the training set has 13 responses; expected at most 12"):
        make(base, tmp_path, Dataset.from_list(rows), loss="plackett_luce")


def test_a_spoiled_run_is_not_saved(base, tmp_path):
    options = dict(max_steps=4, logging_steps=100, save_strategy="steps", save_steps=2, learning_rate=1e38)
    with pytest.raises(ValueError, match="The loss of step 2 is not finite, of 8 comparisons"):
        make(base, tmp_path, **options).train()
    assert not list(Path(tmp_path).glob("checkpoint-*"))


def test_out_of_memory_names_the_batch(base, tmp_path, monkeypatch):
    trainer = make(base, tmp_path, max_steps=1)
    trainer.get_train_dataloader()
    error = torch.OutOfMemoryError("CUDA out of memory. Tried …")
    monkeypatch.setattr(trainer, "compute_loss", raising(error))
    problem = (
        r"Step 1 does not fit into memory: 1 rows of \d+ tokens, of 8 comparisons. "
        "Lower per_device_train_batch_size .*CUDA out of memory"
    )
    with pytest.raises(torch.OutOfMemoryError, match=problem):
        trainer.train()


# Checkpoints


def test_truncated_checkpoints_are_known_and_the_one_before_is_used(base, tmp_path, caplog):
    options = dict(max_steps=6, save_strategy="steps", save_steps=2)
    whole = make(base, tmp_path, **options)
    whole.train()
    last, middle = tmp_path / "checkpoint-6", tmp_path / "checkpoint-4"
    assert checkpoint_problem(last) is None and newest_checkpoint(tmp_path) == str(last)
    weights = (last / "model.safetensors").read_bytes()
    (last / "model.safetensors").write_bytes(weights[:-5])
    problem = f"model.safetensors has {len(weights) - 5} bytes; expected {len(weights)}"
    assert checkpoint_problem(last) == problem
    (middle / SIZES).write_text((middle / SIZES).read_text()[:-4])
    assert checkpoint_problem(middle) == f"{SIZES} is truncated"
    resumed = make(base, tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    warnings = [message.split(" is incomplete")[0] for message in caplog.messages if "is incomplete" in message]
    assert warnings == [f"The checkpoint {last}", f"The checkpoint {middle}"]
    assert resumed.state.log_history[-1]["step"] == 6
    assert_same_tensors(resumed.model.state_dict(), whole.model.state_dict())
    assert checkpoint_problem(last) is None and checkpoint_problem(middle) is None  # written again
    (last / "optimizer.pt").unlink()
    problem = "checkpoint-6' cannot be resumed from: optimizer.pt does not exist; expected a complete one"
    with pytest.raises(ValueError, match=problem):
        make(base, tmp_path, **options).train(resume_from_checkpoint=str(last))
    with pytest.raises(ValueError, match="none' has no checkpoint; expected one to resume from"):
        newest_checkpoint(tmp_path / "none")


def test_a_checkpoint_written_over_another_is_incomplete_until_all_is_written(base, tmp_path, monkeypatch):
    options = dict(max_steps=2, save_strategy="steps", save_steps=2)
    make(base, tmp_path, **options).train()
    assert checkpoint_problem(tmp_path / "checkpoint-2") is None
    monkeypatch.setattr(RewardTrainer, "_save_optimizer_and_scheduler", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        make(base, tmp_path, **options).train()
    assert checkpoint_problem(tmp_path / "checkpoint-2") == f"{SIZES} does not exist"


CLI = ["-m", "rlhf_reward"]
FSDP_ON_CPU = Path(__file__).with_name("fsdp_on_cpu.py")


def command(base, rows, folder, *options):
    return [
        "train",
        *("--model", base),
        *("--dataset", rows),
        *("--eval_dataset", rows),
        *("--output_dir", folder),
        "--use_cpu",
        *("--report_to", "none"),
        *("--disable_tqdm", "true"),
        *("--dropout", "0"),
        *("--learning_rate", "1e-3"),
        *("--logging_steps", "1"),
        *("--max_length", "64"),
        *options,
    ]


def distributed(python, script, *arguments):
    "Run a program in two processes, with torch's own launcher."
    return run(python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script, *arguments)


def saved_weights(folder):
    "All weights, and those of several heads with their levels."
    weights = load_file(folder / "model.safetensors")
    heads = folder / "uncertainty/heads.safetensors"
    for name, value in load_file(heads).items() if heads.is_file() else ():
        weights[f"heads.{name}"] = value
    return weights


INTERRUPTED = [
    *("--dropout", "0.1"),  # so that the state of the random numbers counts
    *("--per_device_train_batch_size", "4"),
    *("--num_train_epochs", "2"),
    *("--save_strategy", "steps"),
    *("--save_steps", "3"),
    *("--eval_strategy", "no"),
]


@pytest.fixture(scope="module")
def undisturbed(base, python, tmp_path_factory):
    "The run that the killed ones are compared with: its data, and its weights."
    folder = tmp_path_factory.mktemp("undisturbed")
    ragged(50).to_json(folder / "rows.jsonl")
    run(python, *CLI, *command(base, folder / "rows.jsonl", folder / "whole", *INTERRUPTED))
    return folder / "rows.jsonl", saved_weights(folder / "whole")


@pytest.mark.parametrize("moment", [0.3, 0.6, 0.9])
def test_killed_at_any_moment_and_resumed_is_the_same_run(base, tmp_path, python, undisturbed, moment):
    "SIGKILL after a share of the run's log lines."
    rows, weights = undisturbed
    arguments = [*CLI, *command(base, rows, tmp_path / "killed", *INTERRUPTED)]
    process = subprocess.Popen(
        [python, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    logged = 0
    for line in process.stdout:  # 26 steps
        logged += "grad_norm" in line
        if logged >= 26 * moment:
            time.sleep(0.02 * moment)
            process.send_signal(signal.SIGKILL)
            break
    rest = process.stdout.read()  # ends when the process that writes it is gone
    assert process.wait() == -signal.SIGKILL and "train_runtime" not in rest
    run(python, *arguments, "--resume_from_checkpoint", "true")
    assert_same_tensors(saved_weights(tmp_path / "killed"), weights)


# Several processes

EPOCHS = ["--num_train_epochs", "2", "--eval_strategy", "epoch", "--save_strategy", "epoch", "--heads", "3"]


@pytest.fixture(scope="module")
def one_process(base, python, tmp_path_factory):
    "The run that those of two processes are compared with: 21 comparisons, 8 a step."
    folder = tmp_path_factory.mktemp("one_process")
    ragged(21).to_json(folder / "rows.jsonl")
    options = [*EPOCHS, "--per_device_train_batch_size", "8"]
    run(python, *CLI, *command(base, folder / "rows.jsonl", folder / "one", *options))
    return folder


def config_of_two_processes(name, path, **more):
    "Write a config that ships with the package, for two CPU processes."
    config = yaml.safe_load((Path(rlhf_reward.__file__).parent / f"configs/{name}.yaml").read_text())
    path.write_text(yaml.safe_dump({**config, "use_cpu": True, "num_processes": 2, **more}))
    return path


def accelerate(python, config, program, *arguments, **options):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    return run(python, *launcher, *program, *arguments, environment={"DS_ACCELERATOR": "cpu"}, **options)


def history(folder):
    return json.loads((folder / "checkpoint-6/trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("how", ["ddp", "fsdp2", "deepspeed_zero3"])
def test_two_processes_are_one(base, tmp_path, python, one_process, how):
    """
    The last step has 5 comparisons, and the second process of it one. K and weights differ. With several heads.

    With the configs that ship.
    """
    if how == "deepspeed_zero3":
        pytest.importorskip(
            "deepspeed",
            reason="deepspeed is not installed; it is no requirement of the tests, since it is built from source",
        )
    if how == "ddp":
        def launch(*arguments):
            return distributed(python, CLI, *arguments)
    else:
        config = config_of_two_processes(how, tmp_path / "config.yaml", mixed_precision="no")
        program = [FSDP_ON_CPU] if how == "fsdp2" else CLI

        def launch(*arguments):
            return accelerate(python, config, program, *arguments)

    options = [*EPOCHS, "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4"]
    arguments = command(base, one_process / "rows.jsonl", tmp_path / "two", *options)
    printed = launch(*arguments).stdout
    assert how != "fsdp2" or printed.count("sharded: True") == 2
    one = saved_weights(one_process / "one")
    two = saved_weights(tmp_path / "two")
    assert one["heads.weight"].shape[0] == 3 and one["heads.levels"].abs().min() > 0
    assert largest_change(one, RewardModel(base, device="cpu").state_dict()) > 1e-3
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-5, msg=name)
    histories = [history(one_process / "one"), history(tmp_path / "two")]
    for entries in histories:
        assert [entry["step"] for entry in entries] == [1, 2, 3, 3, 4, 5, 6, 6]
    for mine, theirs in zip(*histories):
        assert_same_metrics(mine, theirs)
    checkpoints = sorted(path.name for path in (tmp_path / "two").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-3", "checkpoint-6"]
    assert checkpoint_problem(tmp_path / "two/checkpoint-6") is None
    resume = ["--resume_from_checkpoint", tmp_path / "two/checkpoint-3", "--output_dir", tmp_path / "resumed"]
    launch(*arguments, *resume)
    assert_same_tensors(saved_weights(tmp_path / "resumed"), two)


OF_ONE_KIND = { # what only one of them has
    "fsdp2": {"freeze_layers": 1, "pooling": "attention"},
    "ddp": {"lm_coefficient": 0.5, "ema_decay": 0.8},
}


@pytest.mark.parametrize("how", OF_ONE_KIND)
def test_two_processes_start_and_regularize_as_one(base, tmp_path, python, how):
    "Fitted heads with their own rate, and rewards that sum to zero over two micro-batches."
    rows = ragged(21)
    rows.to_json(tmp_path / "rows.jsonl")
    options = {
        "head_start": "fitted",
        "head_learning_rate": 1e-2,
        "sum_to_zero_coefficient": 2.0,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "max_length": 64,
        "save_strategy": "no",
        **OF_ONE_KIND[how],
    }
    arguments = command(base, tmp_path / "rows.jsonl", tmp_path / "two", "--per_device_train_batch_size", "2")
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    arguments += ["--heads", "3"]
    if how == "ddp":
        distributed(python, CLI, *arguments)
    else:
        config = config_of_two_processes("fsdp2", tmp_path / "config.yaml", mixed_precision="no")
        assert accelerate(python, config, [FSDP_ON_CPU], *arguments).stdout.count("sharded: True") == 2
    pooling = options.pop("pooling", None)
    args = RewardConfig(str(tmp_path / "one"), per_device_train_batch_size=4, logging_steps=1, **QUIET, **options)
    model = RewardModel(base, 0.0, "cpu", pooling=pooling, heads=3)
    trainer = RewardTrainer(model, args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(base))
    trainer.train()
    trainer.save_model()
    one, two = saved_weights(tmp_path / "one"), saved_weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=1e-4, msg=name)


def largest_change(trained, start):
    "How far the weights moved that have gradients in every step."
    changes = []
    for name, tensor in trained.items():
        if "embed" not in name and name != "score.weight" and not name.startswith("heads."):
            before = start[name.replace("model.", "backbone.", 1) if name.startswith("model.") else name]
            changes.append((tensor - before).abs().max())
    return max(changes)


def assert_same_metrics(mine, theirs):
    for key in mine:
        bare = key.removeprefix("eval_")
        if bare in EXACT:
            assert mine[key] == theirs[key], key
        elif bare in ("loss", "grad_norm") or "margin" in bare or bare.endswith("_reward"):
            assert mine[key] == pytest.approx(theirs[key], abs=2e-5), key


def test_sharded_checkpoints_are_refused(base, tmp_path, python):
    "They would hold nothing that opens elsewhere."
    ragged(8).to_json(tmp_path / "rows.jsonl")
    config = config_of_two_processes("fsdp2", tmp_path / "config.yaml")
    settings = yaml.safe_load(config.read_text())
    settings["fsdp_config"]["fsdp_state_dict_type"] = "SHARDED_STATE_DICT"
    config.write_text(yaml.safe_dump(settings))
    arguments = command(base, tmp_path / "rows.jsonl", tmp_path / "out")
    result = accelerate(python, config, [FSDP_ON_CPU], *arguments, status=None)
    assert result.returncode != 0 and "expected FULL_STATE_DICT" in result.stderr


def seen_rows(path):
    "Rows of each step, over all processes."
    steps = {}
    for file in path.glob("[0-9]*-*"):
        step = int(file.name.split("-")[0])
        steps.setdefault(step, []).extend(json.loads(file.read_text()))
    return {step: sorted(rows) for step, rows in steps.items()}


@pytest.mark.parametrize("data", ["grouped", "stream"])
def test_two_processes_see_each_comparison_once_an_epoch(base, tmp_path, python, data):
    """
    21 comparisons, 8 a step, two epochs, with dropout, whose random numbers differ between the processes; then resumed
    in the second.
    """
    script = [Path(__file__).with_name("note_rows.py"), base, data]
    distributed(python, script, tmp_path / "whole")
    steps = seen_rows(tmp_path / "whole")
    assert [len(steps[step]) for step in range(6)] == [8, 8, 5, 8, 8, 5]
    for epoch in (0, 3):
        assert sorted(steps[epoch] + steps[epoch + 1] + steps[epoch + 2]) == list(range(1, 22))
    assert data == "stream" or steps[0] != steps[3]
    distributed(python, script, tmp_path / "resumed", tmp_path / "whole/checkpoint-4")
    resumed = seen_rows(tmp_path / "resumed")
    assert resumed == {step: rows for step, rows in steps.items() if step >= 4}
    one, other = (saved_weights(tmp_path / name / "end") for name in ("whole", "resumed"))
    assert_same_tensors(one, other)


@pytest.mark.parametrize("family", ["bert", "mamba"])
def test_padded_models_resume_to_the_same_weights(tmp_path, family):
    "They are grouped by length, in an order that is drawn anew each epoch."
    save_language_model(family, tmp_path / "base")
    rows = []
    for n in range(5, 45):
        rows.append({"prompt": f"w{n} ", "chosen": "w6 " * (1 + n % 7), "rejected": f"w{n + 1}"})
    rows = Dataset.from_list(rows)

    def new_trainer(folder):
        return make(
            None,
            folder,
            rows,
            rows,
            RewardModel(str(tmp_path / "base"), 0.1, "cpu"),
            word_tokenizer(),
            num_train_epochs=3,
            save_strategy="steps",
            save_steps=4,
        )

    whole = new_trainer(tmp_path / "whole")
    resumed = new_trainer(tmp_path / "resumed")
    whole.train()
    assert whole.args.train_sampling_strategy == "group_by_length"
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-8"))
    assert_same_tensors(resumed.model.state_dict(), whole.model.state_dict())
