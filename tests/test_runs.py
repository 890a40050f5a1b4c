"Whole runs: several processes, kill and resume, adapters, losses, and what stops a run."
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
from rlhf_reward.losses import LOSSES
from rlhf_reward.packing import pack_comparisons, pad_comparisons
from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder
from rlhf_reward.training import SIZES, newest_checkpoint, pair_metrics, unfinished

QUIET = dict(use_cpu=True, report_to="none", disable_tqdm=True)
EXACT = {"accuracy", "pairs", "tied_rewards"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("base"), synthetic_texts())


def make(base, folder, rows=None, eval_rows=None, model=None, tokenizer=None, callbacks=None, peft_config=None, compute_metrics=pair_metrics, **options):
    torch.manual_seed(0)
    args = RewardConfig(str(folder), **{**QUIET, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", **options})
    return RewardTrainer(model or RewardModel(base, 0.0, "cpu"), args, rows or synthetic_comparisons(40), eval_rows or synthetic_comparisons(10, seed=1),
                         tokenizer or AutoTokenizer.from_pretrained(base), callbacks=callbacks, peft_config=peft_config, compute_metrics=compute_metrics)


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def ragged(number):
    "K = 4 and K = 2 in turn, with weights."
    four, two = synthetic_comparisons(number), synthetic_comparisons(number, num_responses=2, seed=7)
    return Dataset.from_list([{**(four, two)[n % 2][n], "weight": 1.0 + n % 3} for n in range(number)])


# A step is one mean


@pytest.mark.parametrize("options", [{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}], ids=str)
def test_micro_batches_of_any_size_are_one_step(base, tmp_path, options):
    "Comparisons of other K and weight in each micro-batch, and a last step of fewer; 8 or 9 comparisons a step."
    size = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    whole, parts = (make(base, tmp_path, ragged(21), num_train_epochs=1, **more) for more in ({"per_device_train_batch_size": size}, options))
    whole.train(), parts.train()
    assert len(logs(whole)) == len(logs(parts)) == math.ceil(21 / size)
    for one, other in zip(logs(whole), logs(parts)):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6) and one["pairs"] == other["pairs"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(tensor, parts.model.state_dict()[name], atol=1e-5, rtol=1e-5)


def test_the_loss_of_a_step_is_the_weighted_mean_over_its_comparisons(base, tmp_path):
    trainer = make(base, tmp_path, ragged(12), max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=3, train_sampling_strategy="sequential")
    examples = list(trainer.train_dataset)
    with torch.no_grad():
        flat = [trainer.model(**{name: pad_comparisons([one])[name] for name in ("input_ids", "attention_mask")}).double().flatten() for one in examples]
    losses = []
    for own, one in zip(flat, examples):
        ranks = one["ranks"]
        losses.append(np.mean([math.log1p(math.exp(own[j] - own[i])) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]))
    trainer.train()
    assert logs(trainer)[0]["loss"] == pytest.approx(np.average(losses, weights=[one["weight"] for one in examples]), abs=1e-6)


# Metrics while training


def test_logged_metrics_are_those_of_all_pairs_since_the_last_log(base, tmp_path):
    "Learning rate 0, so that rewards stay: two logs of three steps are the metrics of their 24 comparisons."
    trainer = make(base, tmp_path, ragged(48), max_steps=6, logging_steps=3, learning_rate=0.0, train_sampling_strategy="sequential")
    trainer.train()
    for place, entry in enumerate(logs(trainer)):
        part = trainer.train_dataset.select(range(24 * place, 24 * place + 24))
        expected = trainer.evaluate(part, metric_key_prefix="x")
        assert entry["loss"] == pytest.approx(expected["x_loss"], abs=0.1) # that of the steps is a mean of three means
        for name in ("accuracy", "pairs", "tied_rewards", "margin", "margin_q25", "margin_median", "margin_q75", "chosen_reward", "chosen_reward_std", "rejected_reward_std"):
            assert entry[name] == pytest.approx(expected[f"x_{name}"], abs=1e-5), name
        batches = [[part[n] for n in range(start, start + 8)] for start in (0, 8, 16)]
        unique = sum(len(one["shared_prefix"]) + sum(map(len, one["rests"])) for batch in batches for one in batch)
        padded = sum(pad_comparisons(batch)["input_ids"].numel() for batch in batches)
        assert entry["tokens_saved"] == pytest.approx(1 - unique / padded)
        assert entry["tokens_per_second"] / entry["pairs_per_second"] == pytest.approx(unique / entry["pairs"])
    assert len(logs(trainer)) == 2


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
    "Another metric, of comparisons with K = 4 and K = 2: where there is no response stands 0."
    def best_is_first(prediction):
        assert prediction.predictions.shape == prediction.label_ids.shape == (9, 4)
        assert (prediction.predictions[prediction.label_ids < 1] == 0).all() and (prediction.label_ids < 1).sum() == 2 * 4
        return {"best": float((np.where(prediction.label_ids > 0, prediction.predictions, -np.inf).argmax(1) == (prediction.label_ids == 1).argmax(1)).mean())}

    trainer = make(base, tmp_path, eval_rows=ragged(9), compute_metrics=best_is_first, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_best"] <= 1 and metrics["eval_loss"] > 0 and metrics["eval_responses"] == 5 * 4 + 4 * 2 and "eval_accuracy" not in metrics
    rewards = [reward for row, ranks in zip(*trainer.predict(ragged(9))[:2]) for reward in row[ranks > 0]]
    assert metrics["eval_reward_mean"] == pytest.approx(np.mean(rewards), abs=1e-6) and metrics["eval_reward_std"] == pytest.approx(np.std(rewards), abs=1e-6)
    assert "eval_accuracy" not in make(base, tmp_path, compute_metrics=None).evaluate()


def test_the_evaluation_loss_is_the_weighted_mean(base, tmp_path):
    trainer = make(base, tmp_path, eval_rows=ragged(9))
    each = [trainer.evaluate(trainer.eval_dataset.select([n]))["eval_loss"] for n in range(9)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.average(each, weights=[1.0 + n % 3 for n in range(9)]), abs=1e-6)


def test_metrics_of_pairs_by_hand():
    rewards, ranks = np.array([[3.0, 1.0, 0.0], [0.0, 4.0, -100]]), np.array([[1, 2, 2], [1, 2, -100]])
    metrics = pair_metrics(EvalPrediction(rewards, ranks)) # margins 2, 3, -4
    assert metrics["accuracy"] == 2 / 3 and metrics["margin"] == pytest.approx(1 / 3) and metrics["margin_median"] == 2 and metrics["margin_q25"] == -1
    assert metrics["chosen_reward_std"] == pytest.approx(np.std([3, 3, 0])) and metrics["rejected_reward_std"] == pytest.approx(np.std([1, 0, 4]))
    assert pair_metrics(EvalPrediction(rewards, np.zeros((2, 3)))) == {"pairs": 0}


def test_the_host_waits_for_nothing_but_logs(base, tmp_path, monkeypatch):
    "No tensor becomes a number in a step that logs nothing, in rows as a GPU gets them. The Trainer's own loop has no such place either."
    import rlhf_reward.inputs
    import rlhf_reward.training

    monkeypatch.setattr(rlhf_reward.training, "choose_collator", lambda model, examples: (pack_comparisons, None))
    monkeypatch.setattr(rlhf_reward.inputs, "require", lambda *args: None) # on a GPU it asserts by itself
    trainer, waits, inside = make(base, tmp_path, max_steps=4, logging_steps=100), [], []
    for name in ("item", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, _name=name, _original=original, **more: (inside and waits.append(_name), _original(self, *args, **more))[1])
    compute_loss = trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda *args, **more: (inside.append(1), compute_loss(*args, **more), inside.pop())[1])
    trainer.train()
    assert waits == [] and trainer.state.global_step == 4
    inside.append(1)
    trainer.reward_loss.forward(torch.zeros(1, 2), torch.tensor([[1, 2]])).item()
    assert waits == ["item"] # the count itself works


# Losses by name


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(base, tmp_path, loss):
    "The loss of training, of evaluation and of the function are the same number, and it falls."
    rows = synthetic_comparisons(64)
    trainer = make(base, tmp_path, rows, rows, loss=loss, margin_from_scores=LOSSES[loss].uses_margins, max_steps=40, per_device_train_batch_size=64, learning_rate=3e-3)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert logs(trainer)[0]["loss"] == pytest.approx(before, abs=1e-5)
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    if loss in ("rao_kupper", "davidson"):
        assert trainer.reward_loss.log_tie.item() != type(trainer.reward_loss)().log_tie.item()


def test_a_learnt_threshold_is_saved_and_resumed(base, tmp_path):
    rows = Dataset.from_list([{"prompt": row["prompt"], "responses": row["responses"], "ranks": [1, 1, 2, 2]} for row in synthetic_comparisons(40)])
    options = dict(rows=rows, loss="rao_kupper", max_steps=8, save_strategy="steps", save_steps=4)
    whole, resumed = make(base, tmp_path / "whole", **options), make(base, tmp_path / "resumed", **options)
    whole.train()
    assert set(json.loads((tmp_path / "whole/checkpoint-8/loss.json").read_text())) == {"loss", "log_tie"}
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    assert resumed.reward_loss.log_tie.item() == whole.reward_loss.log_tie.item() != math.log(3)


@pytest.mark.parametrize("loss, row, told", [
    ("margin_scaled", {"chosen": "a", "rejected": "b"}, "Row 2 of the training set has a pair without a margin above 0"),
    ("regression", {"chosen": "a", "rejected": "b"}, "Row 2 of the training set has no scores, which the loss regression learns"),
])
def test_what_a_loss_needs_is_said_before_training(base, tmp_path, loss, row, told):
    good = {"chosen": " a", "rejected": " b", "margin": 1.0, "score_chosen": 2.0, "score_rejected": 1.0}
    rows = Dataset.from_list([{"prompt": "x", **good}, {"prompt": "y", **good, "margin": None, "score_chosen": None, "score_rejected": None, **row}])
    with pytest.raises(ValueError, match=told):
        make(base, tmp_path, rows, loss=loss)
    with pytest.raises(ValueError, match="margin_from_scores is on, but the loss davidson has no margin"):
        make(base, tmp_path, rows, loss="davidson", margin_from_scores=True)


def test_comparisons_that_only_tie_are_kept_for_losses_that_learn_from_ties(base, tmp_path):
    rows = Dataset.from_list([{"prompt": "x", "responses": [" a", " b"], "ranks": ranks} for ranks in ([1, 2], [1, 1])])
    assert len(make(base, tmp_path, rows, rows, loss="davidson").train_dataset) == 2 and len(make(base, tmp_path, rows, rows).train_dataset) == 1


# The arguments of transformers.Trainer


def test_several_sets_early_stopping_and_tensorboard(base, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sets = {"one": synthetic_comparisons(8, seed=1), "two": synthetic_comparisons(6, seed=2, num_responses=2)}
    trainer = make(base, tmp_path, eval_rows=sets, max_steps=12, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, learning_rate=0.0,
                   load_best_model_at_end=True, metric_for_best_model="eval_one_loss", callbacks=[EarlyStoppingCallback(2)], report_to="tensorboard")
    trainer.train()
    assert trainer.state.global_step == 6 # the first evaluation is the best, and two more are no better
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent))
    events.Reload()
    expected = {f"train/{name}" for name in ("loss", "accuracy", "tied_rewards", "margin", "margin_q25", "margin_median", "margin_q75", "chosen_reward", "chosen_reward_std",
                                           "rejected_reward", "rejected_reward_std", "grad_norm", "pairs_per_second", "tokens_per_second", "tokens_saved")}
    assert expected | {"eval/one_loss", "eval/two_accuracy"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("options", [{"torch_compile": True, "torch_compile_backend": "eager"}, {"torch_compile": True, "torch_compile_backend": "aot_eager", "layout": "padded"}], ids=str)
def test_compiled_training_is_the_same(base, tmp_path, options):
    plain, compiled = (make(base, tmp_path, max_steps=3, **more) for more in ({}, options))
    plain.train(), compiled.train()
    assert [entry["loss"] for entry in logs(plain)] == pytest.approx([entry["loss"] for entry in logs(compiled)], abs=1e-5)


def test_liger_kernels_go_into_the_backbone(base, tmp_path, monkeypatch):
    "What transformers calls for its own models is called for the backbone. The kernels themselves need a GPU."
    import transformers.trainer

    patched = []
    monkeypatch.setattr(rlhf_reward.training, "apply_liger_kernel", lambda model, config: patched.append((type(model).__name__, config)))
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", lambda *args: None)
    make(base, tmp_path, max_steps=1, use_liger_kernel=True, liger_kernel_config={"rope": False}).train()
    assert patched == [("LlamaModel", {"rope": False})]


# What TRL's own tests of its reward trainer check and the tests above do not (its test_reward_trainer.py, read as a list):
# one-label models, dtypes, dataset types, raw and tokenized rows, tools, template arguments, streams, margins, several
# evaluation sets, own metrics, adapters and tags have their tests here, in test_training, test_data, test_tokens and test_adapters.


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_reentrant_or_not(base, tmp_path, adapter, use_reentrant):
    peft_config = LoraConfig(r=4, target_modules="all-linear") if adapter else None
    runs = [make(base, tmp_path, max_steps=3, peft_config=peft_config, **more) for more in
            ({}, {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}})]
    before = {name: parameter.clone() for name, parameter in runs[1].model.named_parameters() if parameter.requires_grad}
    for run in runs:
        run.train()
    assert [entry["grad_norm"] for entry in logs(runs[0])] == pytest.approx([entry["grad_norm"] for entry in logs(runs[1])], rel=1e-4)
    assert not [name for name in before if torch.equal(before[name], runs[1].model.get_parameter(name))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_so_and_all_change(base, tmp_path, dtype):
    model = RewardModel(base, 0.0, "cpu", dtype=dtype)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    make(base, tmp_path, model=model, max_steps=3, learning_rate=0.02, adam_epsilon=1e-4).train()
    assert {parameter.dtype for name, parameter in model.named_parameters() if name != "score.weight"} == {dtype} and model.score.weight.dtype == torch.float32
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]


def test_a_mixture_of_experts_trains_with_an_adapter(tmp_path):
    model = RewardModel(save_language_model("qwen3_moe", tmp_path / "base"), 0.0, "cpu")
    rows = Dataset.from_list([{"prompt": f"w{n} ", "chosen": f"w{n + 1}", "rejected": f"w{n + 2}"} for n in range(5, 30)])
    trainer = make(None, tmp_path, rows, rows, model, word_tokenizer(), peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), max_steps=3)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name or name == "score.weight"}


# After training


def test_the_scale_of_rewards_is_saved_and_used_on_request(base, tmp_path):
    trainer = make(base, tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="does not know the mean and deviation of its rewards; expected"):
        trainer.model.normalize(torch.zeros(1, 1))
    trainer.train()
    trainer.save_model()
    trainer.set_reward_scale(trainer.evaluate(), "ten comparisons")
    output = trainer.predict(trainer.eval_dataset)
    rewards = torch.tensor(output.predictions[output.label_ids > 0])[:, None]
    for _ in range(2): # in the folder that was saved before, and saved again
        model = RewardModel.from_pretrained(str(tmp_path), device="cpu")
        normalized = model.normalize(rewards)
        assert normalized.mean().item() == pytest.approx(0, abs=1e-5) and normalized.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
        assert model.config.rlhf_reward["reward_over"] == {"data": "ten comparisons", "responses": 40}
        assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.rlhf_reward["reward_mean"] == model.config.rlhf_reward["reward_mean"]
        trainer.save_model()
    again = make(base, tmp_path / "more", model=model, max_steps=1)
    again.train()
    with pytest.raises(ValueError, match="does not know"): # they were of the weights before
        again.model.normalize(rewards)


def test_the_card_says_what_was_trained_on_what(base, tmp_path, monkeypatch):
    import yaml

    trainer = make(base, tmp_path, max_steps=3, eval_strategy="steps", eval_steps=3, loss="plackett_luce", weight_decay=0.01)
    trainer.train()
    trainer.set_reward_scale(trainer.evaluate(), "the evaluation set")
    trainer.create_model_card("my-reward", dataset="org/preferences", tags=["test"])
    card = (tmp_path / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header == {"library_name": "transformers", "pipeline_tag": "text-classification", "datasets": ["org/preferences"], "tags": ["reward-model", "rlhf_reward", "test"]}
    for line in ("# my-reward", "| `loss` | `plackett_luce` |", "| `weight_decay` | `0.01` |", f"| accuracy | {trainer.state.log_history[-1]['eval_accuracy']:.4g} |",
                 "Rewards of 40 responses of `the evaluation set` have the mean", "| step | loss | accuracy |"):
        assert line in card, line
    assert sum(line.startswith(("| 1 |", "| 2 |", "| 3 |")) for line in card.splitlines()) >= 3 and "None" not in card and str(tmp_path) not in card and "runtime" not in card
    assert "![loss and accuracy](curves.png)" in card and (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    trainer.create_model_card("my-reward")
    assert "curves.png" not in (tmp_path / "README.md").read_text()
    adapter = make(base, tmp_path / "adapter", max_steps=1, peft_config=LoraConfig(r=3, target_modules="all-linear"))
    adapter.train()
    adapter.create_model_card()
    assert "with the loss `bradley_terry`, as an adapter (LORA of rank 3)." in (tmp_path / "adapter/README.md").read_text()


def test_push_to_hub_uploads_model_and_card(base, tmp_path, monkeypatch):
    "The hub's own functions are stood in for; what would be uploaded is looked at."
    import transformers.trainer

    uploads = []
    class Hub:
        def create_repo(self, name, **more):
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, repo_id, folder_path, **more):
            uploads.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    trainer = make(base, tmp_path / "mine", max_steps=1, push_to_hub=True)
    trainer.train()
    trainer.push_to_hub(dataset="org/preferences")
    repo, files = uploads[-1]
    assert repo == "me/mine" and {"README.md", "model.safetensors", "config.json", "tokenizer.json", "training_args.json"} <= set(files)
    assert "datasets:\n- org/preferences" in (tmp_path / "mine/README.md").read_text()


# What stops a run


def test_a_loss_that_is_not_finite_stops_the_run_with_its_rows(base, tmp_path):
    rows = synthetic_comparisons(24)
    trainer = make(base, tmp_path, rows, max_steps=3, logging_steps=3, train_sampling_strategy="sequential")
    original = trainer.reward_loss.forward
    trainer.reward_loss.forward = lambda rewards, ranks, *known: original(rewards, ranks, *known) * torch.where(
        (torch.arange(len(ranks)) == 5) & torch.tensor(trainer.state.global_step == 1), math.nan, 1.0)
    with pytest.raises(ValueError, match=r"The loss of step 2 is not finite, of 1 comparisons \(row 14 of the training set\)"):
        trainer.train()


def test_weights_that_are_not_finite_are_neither_saved_nor_the_end(base, tmp_path):
    "The loss of the only step is finite, its update is not."
    for options in ({"save_strategy": "steps", "save_steps": 1}, {"logging_steps": 100}, {"logging_strategy": "no"}):
        trainer = make(base, tmp_path, max_steps=1, learning_rate=math.inf, **options)
        with pytest.raises(ValueError, match=r"The weight .* is not finite after step 1, though the losses before were"):
            trainer.train()
    assert not list(Path(tmp_path).glob("checkpoint-*"))
    with pytest.raises(ValueError, match="40 of 40 rewards of the evaluation set are not finite"):
        trainer.evaluate()


def test_comparisons_without_weight_or_without_anything_to_learn_do_not_count(base, tmp_path):
    rows = Dataset.from_list([{**row, "weight": float(n >= 8)} for n, row in enumerate(synthetic_comparisons(16))])
    trainer = make(base, tmp_path, rows, max_steps=2, train_sampling_strategy="sequential")
    trainer.train()
    assert logs(trainer)[0]["loss"] == 0 and logs(trainer)[1]["loss"] > 0
    good = {"prompt": "x", "chosen": " robin", "rejected": " iron"}
    scored, unscored = {**good, "score_chosen": 2.0, "score_rejected": 1.0}, {**good, "score_chosen": None, "score_rejected": None}
    trainer = make(base, tmp_path, Dataset.from_list([scored, scored]), loss="regression")
    whole, mixed, none = (trainer.evaluate(Dataset.from_list(part)) for part in ([scored], [scored, unscored], [unscored]))
    assert mixed["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-5) and mixed["eval_without_loss"] == 1 and mixed["eval_pairs"] == 2
    assert "eval_loss" not in none and none["eval_without_loss"] == 1 and none["eval_pairs"] == 1 and "eval_without_loss" not in whole


def test_a_second_run_and_the_time_before_are_not_counted(base, tmp_path, clock):
    trainer = make(base, tmp_path, max_steps=2, logging_steps=2)
    clock(60)
    trainer.train()
    trainer.train()
    (entry,) = logs(trainer)
    assert entry["pairs"] == 96 and entry["pairs"] / entry["pairs_per_second"] < 60


@pytest.mark.parametrize("change, told", [
    (dict(rows=[{"prompt": "x"}]), "train_dataset is a list; expected a datasets.Dataset"),
    (dict(model=torch.nn.Linear(1, 1)), "model is a Linear; expected a RewardModel"),
    (dict(eval_do_concat_batches=False), "eval_do_concat_batches is False"),
    (dict(include_for_metrics=["loss"]), "include_for_metrics is"),
])
def test_what_the_trainer_cannot_use_is_refused_by_name(base, tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        make(base, tmp_path, **change)


def test_too_many_responses_for_plackett_luce_are_named_before_training(base, tmp_path):
    rows = Dataset.from_list([{"prompt": "x", "responses": [f" {n}" for n in range(k)], "ranks": list(range(1, k + 1))} for k in (2, 13)])
    with pytest.raises(ValueError, match="Row 2 of the training set has 13 responses; expected at most 12"):
        make(base, tmp_path, rows, loss="plackett_luce")


def test_a_spoilt_run_is_not_saved(base, tmp_path):
    trainer = make(base, tmp_path, max_steps=4, logging_steps=100, save_strategy="steps", save_steps=2, learning_rate=math.inf)
    with pytest.raises(ValueError, match="The loss of step 2 is not finite, of 8 comparisons"):
        trainer.train()
    assert not list(Path(tmp_path).glob("checkpoint-*"))


def test_out_of_memory_names_the_batch(base, tmp_path, monkeypatch):
    trainer = make(base, tmp_path, max_steps=1)
    trainer.get_train_dataloader()
    monkeypatch.setattr(trainer, "compute_loss", lambda *args, **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried …")))
    with pytest.raises(torch.OutOfMemoryError, match=r"Step 1 does not fit into memory: 1 rows of \d+ tokens, of 8 comparisons. Lower per_device_train_batch_size .*CUDA out of memory"):
        trainer.train()


# Checkpoints


def test_torn_checkpoints_are_known_and_the_one_before_is_taken(base, tmp_path, caplog):
    options = dict(max_steps=6, save_strategy="steps", save_steps=2)
    whole = make(base, tmp_path, **options)
    whole.train()
    last, middle = tmp_path / "checkpoint-6", tmp_path / "checkpoint-4"
    assert unfinished(last) is None and newest_checkpoint(tmp_path) == str(last)
    weights = (last / "model.safetensors").read_bytes()
    (last / "model.safetensors").write_bytes(weights[:-5])
    assert unfinished(last) == f"model.safetensors has {len(weights) - 5} bytes; expected {len(weights)}"
    (middle / SIZES).write_text((middle / SIZES).read_text()[:-4])
    assert unfinished(middle) == f"{SIZES} is truncated"
    resumed = make(base, tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert [message.split(" is incomplete")[0] for message in caplog.messages if "is incomplete" in message] == [f"The checkpoint {last}", f"The checkpoint {middle}"]
    assert resumed.state.log_history[-1]["step"] == 6 and all(torch.equal(tensor, whole.model.state_dict()[name]) for name, tensor in resumed.model.state_dict().items())
    assert unfinished(last) is None and unfinished(middle) is None # written anew
    (last / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="checkpoint-6' cannot be resumed from: optimizer.pt does not exist; expected a complete one"):
        make(base, tmp_path, **options).train(resume_from_checkpoint=str(last))
    with pytest.raises(ValueError, match="none' has no complete checkpoint, of 0; expected one to resume from"):
        newest_checkpoint(tmp_path / "none")


def test_a_checkpoint_written_over_another_is_not_whole_until_its_end(base, tmp_path, monkeypatch):
    options = dict(max_steps=2, save_strategy="steps", save_steps=2)
    make(base, tmp_path, **options).train()
    assert unfinished(tmp_path / "checkpoint-2") is None
    monkeypatch.setattr(RewardTrainer, "_save_optimizer_and_scheduler", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(base, tmp_path, **options).train()
    assert unfinished(tmp_path / "checkpoint-2") == f"{SIZES} does not exist"


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
    return load_file(folder / "model.safetensors")


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


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

EPOCHS = ["--num_train_epochs", "2", "--eval_strategy", "epoch", "--save_strategy", "epoch"]


@pytest.fixture(scope="module")
def one_process(base, python, tmp_path_factory):
    "What the runs of two processes are compared with: 21 comparisons, 8 a step."
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
    "The last step has 5 comparisons, and the second process of it one. K and weights differ. With the configs that ship."
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
    assert unfinished(tmp_path / "two/checkpoint-6") is None
    resume = ["--resume_from_checkpoint", tmp_path / "two/checkpoint-3", "--output_dir", tmp_path / "resumed"]
    launch(*arguments, *resume)
    assert_same_tensors(saved_weights(tmp_path / "resumed"), two)


def largest_change(trained, start):
    "How far the weights moved that have gradients in every step."
    changes = []
    for name, tensor in trained.items():
        if "embed" not in name and name != "score.weight":
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
    last = 2 if data == "stream" else 4  # of a stream only the first pass can be resumed to the same rows
    distributed(python, script, tmp_path / "resumed", tmp_path / f"whole/checkpoint-{last}")
    resumed = seen_rows(tmp_path / "resumed")
    assert resumed[last] == steps[last]
    if data == "grouped":
        assert resumed == {step: rows for step, rows in steps.items() if step >= last}
        one, other = (saved_weights(tmp_path / name / "end") for name in ("whole", "resumed"))
        assert_same_tensors(one, other)


@pytest.mark.parametrize("family", ["bert", "bloom"])
def test_padded_models_resume_to_the_same_weights(tmp_path, family):
    "They are grouped by length, in an order that is drawn anew each epoch."
    save_language_model(family, tmp_path / "base")
    rows = Dataset.from_list([{"prompt": f"w{n} ", "chosen": "w6 " * (1 + n % 7), "rejected": f"w{n + 1}"} for n in range(5, 45)])
    options = dict(rows=rows, eval_rows=rows, tokenizer=word_tokenizer(), num_train_epochs=3, save_strategy="steps", save_steps=4)
    whole, resumed = (make(None, tmp_path / name, model=RewardModel(str(tmp_path / "base"), 0.1, "cpu"), **options) for name in ("whole", "resumed"))
    whole.train()
    assert whole.args.train_sampling_strategy == "group_by_length"
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-8"))
    assert all(torch.equal(tensor, resumed.model.state_dict()[name]) for name, tensor in whole.model.state_dict().items())
