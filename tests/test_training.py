"The trainer in one process, its arguments, its metrics and its checkpoints."
import inspect
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from architectures import save_language_model, word_tokenizer
from programs import run
from rlhf_reward import RewardConfig, RewardModel, RewardTrainer
from rlhf_reward.data import hold_out
from rlhf_reward.metrics import pair_metrics
from rlhf_reward.packing import by_comparison, pad_comparisons
from rlhf_reward.synthetic import RECIPE, synthetic_comparisons, synthetic_texts, tiny_decoder
from rlhf_reward.tokens import whole_sequences
from tiny import open_tiny, tiny_trainer, tokenized


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("base"), synthetic_texts())


def make_trainer(base, folder, train_rows=None, eval_rows=None, dropout=0.0, tokenizer=None, **options):
    return tiny_trainer(
        base,
        folder,
        {"max_length": 64, "logging_strategy": "no", **options},
        model=open_tiny(base, dropout),
        train_dataset=train_rows,
        eval_dataset=eval_rows or tokenized(base, 21, 1),
        processing_class=tokenizer,
    )


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def in_turn(*data_sets):
    "Rows of several data sets, one of each at a time."
    rows = []
    for row_of_each in zip(*data_sets):
        rows += row_of_each
    return rows


# Metrics


def test_metrics_equal_a_count_by_hand():
    "Row 1: ranks 1, 2, 2 with rewards 0, 0, 1: pairs 0-0 (tie) and 0-1 (wrong). Row 2: one pair, 3-1 (right)."
    rewards = np.array([[0, 0, 1], [3, 1, -7]], dtype=np.float32)
    ranks = np.array([[1, 2, 2], [1, 2, -100]])  # the trainer pads with -100
    metrics = pair_metrics(EvalPrediction(rewards, ranks))
    expected = {
        "accuracy": 1.5 / 3,
        "pairs": 3,
        "tied_rewards": 1,
        "margin": (0 - 1 + 2) / 3,
        "chosen_reward": (0 + 0 + 3) / 3,
        "rejected_reward": (0 + 1 + 1) / 3,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_metrics_do_not_depend_on_the_batch_size(base, tmp_path):
    "K = 4 and K = 2 mixed, and a last batch that is not full."
    four = synthetic_comparisons(11, seed=1)
    two = synthetic_comparisons(10, num_responses=2, seed=2)
    rows = Dataset.from_list(in_turn(four, two))
    last_words = ("loss", "accuracy", "pairs", "rewards", "margin", "reward")
    results = []
    for size in (1, 4, 20):
        trainer = make_trainer(base, tmp_path, eval_rows=rows, per_device_eval_batch_size=size)
        metrics = trainer.evaluate()
        results.append({name: value for name, value in metrics.items() if name.split("_")[-1] in last_words})
    assert len(results[0]) == 7 and results[0]["eval_pairs"] == 10 * 6 + 10
    for result in results[1:]:
        assert result == pytest.approx(results[0], abs=1e-5)
    assert len({result["eval_accuracy"] for result in results}) == 1


@pytest.mark.parametrize("weight", [0, 1e-46])
def test_rows_without_any_weight_are_refused(base, tmp_path, weight):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "weight": float(weight)}] * 4
    with pytest.raises(ValueError, match="All 4 comparisons of the training set have the weight 0"):
        make_trainer(base, tmp_path, Dataset.from_list(rows))
    make_trainer(base, tmp_path, Dataset.from_list([*rows, {**rows[0], "weight": 1e-3}]))


def test_margins_and_weights_enter_the_training_loss(base, tmp_path):
    pairs = [
        {"prompt": "Ada ", "chosen": "robin", "rejected": "iron", "margin": 0.7, "weight": 2.0},
        {"prompt": "Ada ", "chosen": "wren", "rejected": "gold tin", "margin": -0.2, "weight": 0.5},
    ]
    trainer = make_trainer(base, tmp_path, train_rows=Dataset.from_list(pairs))
    batch = pad_comparisons(list(trainer.train_dataset))
    rewards = trainer.model(batch["input_ids"], batch["attention_mask"]).detach().reshape(2, 2).double()
    losses = []
    for (chosen, rejected), pair in zip(rewards.tolist(), pairs):
        difference = chosen - rejected - pair["margin"]
        losses.append(pair["weight"] * np.log1p(np.exp(-difference)))
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(sum(losses) / 2.5, rel=1e-5)


def test_arguments_for_the_data_are_used(base, tmp_path):
    rated = {
        "prompt": "Ada likes birds and dislikes tools.",
        "chosen": " robin",
        "rejected": " hammer",
        "score_chosen": 5,
        "score_rejected": 2,
    }
    rows = Dataset.from_list([rated, {**rated, "chosen": None}])
    options = dict(max_length=6, on_overlong="truncate_prompt", on_bad_row="skip", margin_from_scores=True)
    trainer = make_trainer(base, tmp_path, rows, rows, **options)
    (tokenized,) = trainer.train_dataset
    assert tokenized["margins"] == [3.0] and tokenized["length"] == 6
    with pytest.raises(ValueError, match=r"Row 2 of the training set cannot be used"):
        make_trainer(base, tmp_path, rows)
    with pytest.raises(ValueError, match=r"Row 1 of the training set has .* tokens; expected at most 6"):
        make_trainer(base, tmp_path, rows.select([0]), max_length=6, on_overlong="error")


def test_training_loss_is_the_metric_loss(base, tmp_path):
    trainer = make_trainer(base, tmp_path, per_device_eval_batch_size=21)
    batch = pad_comparisons(list(trainer.eval_dataset))
    loss = trainer.compute_loss(trainer.model, batch).item()
    assert loss == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)


def test_rewards_return_to_their_comparisons():
    common = {"shared_prefix": [], "ratings": None, "weight": 1, "row": 1}
    examples = [
        {**common, "rests": [[1], [2], [3]], "ranks": [3, 1, 1], "margins": [7, 8]},
        {**common, "rests": [[4], [5]], "ranks": [1, 2], "margins": [9]},
    ]
    batch = pad_comparisons(examples)
    table = by_comparison(batch["input_ids"].float(), batch["ranks"])
    assert table.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch["margins"][0].tolist() == [[0, 0, 0], [7, 0, 0], [8, 0, 0]]
    assert batch["margins"][1, 0].tolist() == [0, 9, 0]


# The synthetic preferences


def run_train(python, folder, *arguments):
    "Train by the command. Return the metrics that it saves."
    common = ("--output_dir", folder, "--use_cpu", "--report_to", "none", "--disable_tqdm", "true")
    run(python, "-m", "rlhf_reward", "train", *common, *arguments)
    return json.loads((folder / "eval_results.json").read_text())


def test_demo_learns_the_synthetic_preferences(python, tmp_path):
    "The run of `make demo`."
    metrics = run_train(python, tmp_path, "--eval_strategy", "no")
    assert metrics["eval_accuracy"] >= 0.95 and abs(metrics["eval_longer_wins"] - 0.5) < 0.06


def test_synthetic_preferences_are_not_learned_without_the_prompt(python, base, tmp_path):
    "The same training with and without the prompts, of a decoder that has read such texts."
    well_read = tmp_path / "base"
    read_texts(base, well_read)
    train_rows, eval_rows = hold_out(synthetic_comparisons(1700), 0.1)
    short = {"learning_rate": 2e-3, "num_train_epochs": 1, "per_device_train_batch_size": 16, "eval_strategy": "no"}
    accuracy = {}
    for with_prompt in (True, False):
        arguments = ["--model", well_read]
        for option, rows in (("--dataset", train_rows), ("--eval_dataset", eval_rows)):
            path = tmp_path / f"{option[2:]}_{with_prompt}.jsonl"
            rows.map(lambda row: {"prompt": row["prompt"] * with_prompt}).to_json(path)
            arguments += [option, path]
        for name, value in {**RECIPE, **short}.items():
            arguments += [f"--{name}", value]
        accuracy[with_prompt] = run_train(python, tmp_path / str(with_prompt), *arguments)["eval_accuracy"]
    assert accuracy[True] > 0.8 and accuracy[False] < 0.6


def read_texts(base, folder):
    "Train a decoder as a language model on prompts with their best responses, and save it."
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in synthetic_comparisons(6400, num_responses=2, seed=2).iter(32):
        texts = []
        for prompt, responses, scores in zip(batch["prompt"], batch["responses"], batch["scores"]):
            texts.append(prompt + responses[scores.index(max(scores))] + tokenizer.eos_token)
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# Checkpoints


def test_every_checkpoint_opens_in_transformers(base, tmp_path):
    trainer = make_trainer(base, tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([whole_sequences(trainer.eval_dataset[0])[0]])
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        classifier = AutoModelForSequenceClassification.from_pretrained(folder)
        with torch.no_grad():
            assert torch.allclose(classifier(ids).logits, trainer.model.eval()(ids), atol=1e-5)
        assert AutoTokenizer.from_pretrained(folder).pad_token == "<|pad|>"
        assert json.loads((folder / "training_args.json").read_text())["max_length"] == 64
    assert not (tmp_path / "training_args.bin").exists()


@pytest.mark.parametrize("pad_token", ["<|pad|>", "<|end|>"], ids=["pad", "pad=eos"])
def test_resumed_run_ends_with_the_same_weights(base, tmp_path, pad_token):
    tokenizer = AutoTokenizer.from_pretrained(base, pad_token=pad_token)
    options = dict(max_steps=8, save_strategy="steps", save_steps=4, dropout=0.1, tokenizer=tokenizer)
    uninterrupted = make_trainer(base, tmp_path, **options)
    uninterrupted.train()
    resumed = make_trainer(base, tmp_path / "other", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_weights(weights(resumed), weights(uninterrupted))


def test_resuming_leaves_out_the_row_of_a_pad_token_made_for_saving(tmp_path):
    "All 64 rows are taken and the tokenizer pads with its end: checkpoints have a row 65, the model in memory has not."
    base = save_language_model("llama", tmp_path / "base")
    rows = Dataset.from_list([{"prompt": "w5 ", "chosen": f"w{n}", "rejected": f"w{n + 1}"} for n in range(6, 60)])
    options = dict(
        train_rows=rows,
        eval_rows=rows,
        tokenizer=word_tokenizer(pad_token="<eos>"),
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
    )
    uninterrupted = make_trainer(base, tmp_path / "whole", **options)
    resumed = make_trainer(base, tmp_path / "resumed", **options)
    uninterrupted.train()
    checkpoint = tmp_path / "whole/checkpoint-2"
    assert len(load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]) == 65
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(weights(resumed), weights(uninterrupted))


def test_only_the_process_that_should_writes(base, tmp_path, monkeypatch):
    trainer = make_trainer(base, tmp_path)
    monkeypatch.setattr(RewardConfig, "should_save", False)
    trainer.save_model(str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_missing_checkpoint_is_named(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="none' does not exist"):
        make_trainer(base, tmp_path)._load_from_checkpoint(str(tmp_path / "none"))


def test_best_checkpoint_is_loaded_at_the_end(base, tmp_path):
    trainer = make_trainer(
        base,
        tmp_path,
        max_steps=6,
        learning_rate=0.05,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    saved = load_file(Path(best) / "model.safetensors")
    assert torch.equal(saved["score.weight"], trainer.model.score.weight)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-5)


# The arguments of transformers.Trainer


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    "A trainer after three steps."
    trainer = make_trainer(base, tmp_path_factory.mktemp("plain"), max_steps=3)
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    {"gradient_checkpointing": True},
    {"dataloader_num_workers": 1},
    {"dataset_num_proc": 2},
], ids=str)
def test_what_should_not_change_the_numbers_does_not(base, tmp_path, plain, options):
    other = make_trainer(base, tmp_path, synthetic_comparisons(40), max_steps=3, **options)
    other.train()
    if "gradient_checkpointing" in options:
        assert other.model.backbone.is_gradient_checkpointing
        assert not plain.model.backbone.is_gradient_checkpointing
    expected = weights(plain)
    for name, tensor in weights(other).items():
        assert torch.allclose(tensor, expected[name], atol=1e-4), name


@pytest.mark.parametrize("options", [
    {"bf16": True},
    {"train_sampling_strategy": "group_by_length"},
    {"optim": "adafactor"},
    {"torch_empty_cache_steps": 1},
], ids=str)
def test_arguments_of_the_trainer_work(base, tmp_path, options):
    trainer = make_trainer(base, tmp_path, max_steps=3, **options)
    before = weights(trainer)
    trainer.train()
    after = trainer.evaluate()
    assert np.isfinite(after["eval_loss"]) and after["eval_pairs"] == 21 * 6
    assert [name for name, tensor in weights(trainer).items() if torch.equal(tensor, before[name])] == []


def test_comparisons_beyond_the_model_are_dropped_not_fed(tmp_path, caplog):
    short = tiny_decoder(tmp_path / "short", synthetic_texts(), max_position_embeddings=17)
    trainer = make_trainer(short, tmp_path, synthetic_comparisons(40), max_length=1000)
    assert 0 < len(trainer.train_dataset) < 40 and max(trainer.train_dataset["length"]) <= 17
    assert "max_length is 1000, but the model and its tokenizer take 17 tokens" in caplog.text
    assert "comparisons of the training set: longer than 17 tokens" in caplog.text


def test_positions_of_roberta_begin_after_its_padding(tmp_path):
    model = RewardModel(save_language_model("roberta", tmp_path), device="cpu")  # 64 positions, padding_idx 0
    assert model.max_positions == 63
    model(torch.full((1, 63), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 64), 5))


def test_other_rows_and_several_sets_are_evaluated_as_they_are(base, tmp_path):
    rows = synthetic_comparisons(9, seed=3)
    eval_rows = {"one": rows, "two": synthetic_comparisons(5, num_responses=2, seed=4)}
    trainer = make_trainer(base, tmp_path, eval_rows=eval_rows)
    several = trainer.evaluate()
    assert several["eval_one_pairs"] == 9 * 6 and several["eval_two_pairs"] == 5
    assert trainer.evaluate(rows)["eval_loss"] == several["eval_one_loss"]
    assert trainer.predict(rows).predictions.shape == (9, 4)


@pytest.fixture(scope="module")
def seven():
    "Comparisons of different lengths, fewer than a batch."
    rows = synthetic_comparisons(7, seed=4)
    return rows.map(lambda row, n: {"prompt": row["prompt"] * (1 + n * 5 % 4)}, with_indices=True)


@pytest.fixture(scope="module")
def of_seven(base, tmp_path_factory, seven):
    "Their metrics and rewards without any option."
    trainer = make_trainer(base, tmp_path_factory.mktemp("plain"), seven, seven, max_length=512)
    return trainer.evaluate(), trainer.predict(seven).predictions


@pytest.mark.parametrize("options", [
    {"dataloader_drop_last": True},
    {"dataloader_drop_last": True, "per_device_eval_batch_size": 4},
    {"dataloader_in_order": False, "dataloader_num_workers": 2},
    {"train_sampling_strategy": "group_by_length"},
    {"train_sampling_strategy": "batch_rebalance"},
    {"prediction_loss_only": True},
    {"eval_use_gather_object": True},
    {"eval_accumulation_steps": 1},
    {"dataloader_drop_last": True, "dataloader_num_workers": 1, "dataloader_persistent_workers": True},
], ids=str)
def test_no_option_of_the_loader_reaches_the_metrics(base, tmp_path, seven, of_seven, options):
    "All are evaluated, and predicted in the order of the rows, whichever is first."
    expected, predictions = of_seven
    trainer = make_trainer(base, tmp_path, seven, seven, max_length=512, **options)
    metrics = trainer.evaluate()
    assert metrics["eval_pairs"] == 7 * 6 and metrics["eval_accuracy"] == expected["eval_accuracy"]
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)
    np.testing.assert_allclose(trainer.predict(seven).predictions, predictions, atol=1e-5)
    for name, value in options.items():
        assert getattr(trainer.args, name) == value


def test_rewards_of_padded_models_are_predicted_in_the_order_of_the_rows(tmp_path):
    "Their training is grouped by length."
    base = save_language_model("bert", tmp_path / "base")
    rows = []
    for n in (9, 1, 5, 30, 2):
        rows.append({"prompt": "w5 ", "chosen": "w6 " * n, "rejected": "w7 " * n})
    rows = Dataset.from_list(rows)
    trainer = make_trainer(base, tmp_path, rows, rows, tokenizer=word_tokenizer(), per_device_eval_batch_size=2)
    together = trainer.predict(rows).predictions
    assert trainer.args.train_sampling_strategy == "group_by_length"
    for n in range(len(rows)):
        np.testing.assert_allclose(together[n], trainer.predict(rows.select([n])).predictions[0], atol=1e-5)


def test_a_training_set_smaller_than_a_dropped_batch_is_refused(base, tmp_path):
    trainer = make_trainer(base, tmp_path, synthetic_comparisons(7), max_steps=1, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="drops all 7 comparisons of the training set, which are fewer than a batch"):
        trainer.train()


@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval", "enable_jit_checkpoint"])
def test_options_that_would_change_the_weights_or_checkpoints_are_refused_with_a_remedy(base, tmp_path, option):
    with pytest.raises(ValueError, match=rf"{option} is True; expected False: .*, since .*: use|{option}.*Use save_on"):
        make_trainer(base, tmp_path, **{option: True})


@pytest.mark.parametrize("option", ["logging_nan_inf_filter", "batch_eval_metrics", "remove_unused_columns"])
def test_unsupported_arguments_are_rejected(base, tmp_path, option):
    with pytest.raises(ValueError, match=f"{option} is .*RewardTrainer does not support this option"):
        make_trainer(base, tmp_path, **{option: True})


@pytest.mark.parametrize(
    "option",
    ["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_steps"],
)
def test_a_batch_or_a_run_of_nothing_is_rejected(base, tmp_path, option):
    with pytest.raises(ValueError, match=f"^{option} is 0; expected 1 or more"):
        make_trainer(base, tmp_path, **{option: 0})


@pytest.mark.parametrize("option, value", [("learning_rate", -1.0), ("max_length", 0)])
def test_what_no_run_can_have_is_refused_before_texts_are_tokenized(option, value, tmp_path):
    with pytest.raises(ValueError, match=f"^{option} is {value}; expected . or more"):
        RewardConfig(str(tmp_path), use_cpu=True, **{option: value})


@pytest.mark.parametrize("option", ["dispatch_batches", "split_batches"])
def test_slicing_batches_between_processes_is_rejected(base, tmp_path, option):
    with pytest.raises(ValueError, match="a batch of comparisons cannot be sliced"):
        make_trainer(base, tmp_path, accelerator_config={option: True})


def test_a_stream_trains_as_its_table_does(base, tmp_path):
    rows = synthetic_comparisons(24)
    options = dict(max_steps=3, logging_strategy="steps", logging_steps=1, train_sampling_strategy="sequential")
    losses = []
    for data in (rows, rows.to_iterable_dataset()):
        trainer = make_trainer(base, tmp_path, data, **options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_uneven_batches_of_several_processes_are_rejected(base, tmp_path, monkeypatch):
    make_trainer(base, tmp_path, accelerator_config={"even_batches": False})
    monkeypatch.setattr(RewardConfig, "world_size", 2)
    with pytest.raises(ValueError, match="even_batches=False; expected True with several processes"):
        make_trainer(base, tmp_path, accelerator_config={"even_batches": False})


def test_plain_training_arguments_are_rejected(base, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="args is a TrainingArguments; expected a RewardConfig"):
        RewardTrainer(RewardModel(base, device="cpu"), args, train_dataset=synthetic_comparisons(3))


def test_two_processes_measure_what_one_does(python, base, tmp_path):
    "An evaluation set that does not divide by two, with K = 4 and K = 2. Each of the two imports for itself."
    rows = in_turn(synthetic_comparisons(6), synthetic_comparisons(5, num_responses=2))[:9]
    file = tmp_path / "rows.jsonl"
    Dataset.from_list(rows).to_json(file)
    arguments = [
        *("--model", base),
        *("--dataset", file),
        *("--eval_dataset", file),
        *("--learning_rate", "0"),
        *("--max_steps", "1"),
        "--use_cpu",
        *("--report_to", "none"),
        *("--eval_strategy", "no"),
        *("--disable_tqdm", "true"),
        *("--per_device_eval_batch_size", "2"),
    ]
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    programs = {1: ["-m", "rlhf_reward"], 2: ["--no_python", Path(sys.executable).with_name("rlhf_reward")]}
    results = []
    verdicts = []
    for processes, program in programs.items():
        folder = tmp_path / str(processes)
        printed = run(*launcher, processes, *program, "train", *arguments, "--output_dir", folder).stdout
        assert printed.count("Held-out accuracy") == 1
        verdicts.append([line for line in printed.splitlines() if line.startswith("No verdict")])
        results.append(json.loads((folder / "eval_results.json").read_text()))
    one, two = results
    assert verdicts[0] == verdicts[1] and len(verdicts[0]) == 1 and "model without the prompt" in verdicts[0][0]
    assert one["eval_pairs"] == two["eval_pairs"] == 5 * 6 + 4
    for name in ("loss", "accuracy", "margin", "chosen_reward", "longer_wins"):
        assert one[f"eval_{name}"] == pytest.approx(two[f"eval_{name}"], abs=1e-6), name


def test_several_gpus_in_one_process_are_rejected(base, tmp_path):
    args = RewardConfig(str(tmp_path), use_cpu=True)
    args._n_gpu = 2
    model, tokenizer = RewardModel(base, device="cpu"), AutoTokenizer.from_pretrained(base)
    with pytest.raises(ValueError, match="2 GPUs.*accelerate launch"):
        RewardTrainer(model, args, train_dataset=synthetic_comparisons(3), processing_class=tokenizer)


# Hooks of transformers.Trainer that RewardTrainer overrides or calls, with the first parameters that it relies on.
HOOKS = {
    "_get_num_items_in_batch": ("batch_samples", "device"),
    "_init_training_state": (
        "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"
    ),
    "_get_output_dir": ("trial",),
    "_get_train_sampler": ("train_dataset",),
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_maybe_log_save_evaluate": (),
    "_prepare_inputs": ("inputs",),
    "_run_epoch": (),
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
    "_load_rng_state": ("checkpoint",),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_save_rng_state": ("output_dir",),
    "_save_scaler": ("output_dir",),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "compute_loss_context_manager": (),
    "create_model_card": (),
    "create_optimizer": ("model",),
    "evaluate": ("eval_dataset", "ignore_keys", "metric_key_prefix"),
    "evaluation_loop": ("dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"),
    "get_eval_dataloader": ("eval_dataset",),
    "get_test_dataloader": ("test_dataset",),
    "get_train_dataloader": (),
    "log": ("logs", "start_time"),
    "predict": ("test_dataset", "ignore_keys", "metric_key_prefix"),
    "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys"),
    "train": ("resume_from_checkpoint",),
    "training_step": ("model", "inputs", "num_items_in_batch"),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_the_trainer_exist_with_their_parameters(name):
    remedy = f"Find its successor in transformers {transformers.__version__} and change RewardTrainer."
    hook = getattr(Trainer, name, None)
    assert hook is not None, f"transformers.Trainer has no {name}. {remedy}"
    parameters = tuple(inspect.signature(hook).parameters)[1:]
    expected = HOOKS[name]
    problem = f"Trainer.{name} has the parameters {parameters}; expected {expected}."
    assert parameters[:len(expected)] == expected, f"{problem} {remedy}"


def test_every_overridden_hook_is_listed():
    parts = RewardTrainer.__mro__[:RewardTrainer.__mro__.index(Trainer)]
    overridden = set()
    for part in parts:
        for name in vars(part):
            if callable(getattr(Trainer, name, None)) and not name.startswith("__"):
                overridden.add(name)
    assert overridden <= set(HOOKS)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_bf16_on_a_cpu_needs_no_further_argument(tmp_path):
    config = RewardConfig(str(tmp_path), bf16=True, report_to="none")
    assert config.device.type == "cpu" and config.bf16


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_several_processes_on_a_cpu_need_no_further_argument(tmp_path, monkeypatch):
    "Without use_cpu transformers starts no process group there, and each process trains alone."
    monkeypatch.setattr(RewardConfig, "_setup_devices", torch.device("cpu")) # otherwise it waits for the other process
    assert not RewardConfig(str(tmp_path), report_to="none").use_cpu
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert RewardConfig(str(tmp_path), report_to="none").use_cpu
