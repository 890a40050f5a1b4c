"A run prints one line at each log, and trackers still get everything."
import functools

import pytest
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer
from rlhf_reward.log_line import LogLine, log_line
from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder


class Everything(TrainerCallback):
    "A tracker."

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("with_bar", [False, True])
def test_a_run_prints_lines_and_trackers_get_all(with_bar, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    base = tiny_decoder(tmp_path / "base", synthetic_texts())
    set_seed(0)
    tracker = Everything()
    config = RewardConfig(
        str(tmp_path / "run"),
        max_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=not with_bar,
    )
    rows = synthetic_comparisons(32)
    sets = {"first": rows.select(range(4)), "rest": rows.select(range(4, 8))}
    trainer = RewardTrainer(
        RewardModel(base, device="cpu"),
        config,
        train_dataset=rows,
        eval_dataset=sets,
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[tracker],
    )
    trainer.train()
    lines = [line.strip() for line in capsys.readouterr().out.replace("\r", "\n").splitlines()]
    lines = [line for line in lines if line.startswith("step ")]
    history = trainer.state.log_history
    expected = []
    for logs in history:
        if "loss" in logs:
            names = ("loss", "accuracy", "margin", "grad_norm", "learning_rate")
            fields = [f"{name} {logs[name]:.4g}" for name in names]
            expected.append("  ".join([f"step {logs['step']}/2", *fields]))
        for part in ("eval_first", "eval_rest"):
            if f"{part}_accuracy" in logs:
                names = ("loss", "accuracy", "margin", "pairs")
                fields = [f"{name} {float(logs[f'{part}_{name}']):.4g}" for name in names]
                expected.append("  ".join([f"step {logs['step']}/2", part, *fields]))
    assert len(expected) == 6 and lines[:6] == expected
    assert lines[6].startswith("step 2/2  end of training after ") and len(lines) == 7
    assert all({"tokens_saved", "pairs", "tokens_per_second"} <= logs.keys() for logs in tracker.logs if "loss" in logs)


def test_an_evaluation_of_ratings_by_attribute_has_one_short_line():
    logs = {"eval_loss": 49.29, "eval_pairs": 0, "eval_reward_mean": 0.5, "eval_reward_std": 0.9}
    logs |= {"eval_responses": 24, "eval_runtime": 0.05, "eval_samples_per_second": 111.8}
    assert log_line(logs, 1, 2) == "step 1/2  eval  loss 49.29  reward_mean 0.5  reward_std 0.9  responses 24"


def test_callbacks_of_others_stay(tmp_path):
    class Mine(PrinterCallback):
        pass

    base = tiny_decoder(tmp_path / "base", synthetic_texts())
    model, tokenizer = RewardModel(base, device="cpu"), AutoTokenizer.from_pretrained(base)
    config = RewardConfig(str(tmp_path / "run"), report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = RewardTrainer(
        model,
        config,
        train_dataset=synthetic_comparisons(4),
        processing_class=tokenizer,
        callbacks=[Mine],
    )
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert Mine in kinds and LogLine in kinds
    assert PrinterCallback not in kinds and ProgressCallback not in kinds


def test_logs_of_others_are_shown_whole():
    assert log_line({"temperature": 0.5, "phase": "warm", "epoch": 0.1}, 3, 0) == "step 3  temperature 0.5  phase warm"


@pytest.mark.parametrize("is_hidden", [False, True])
def test_an_evaluation_alone_has_a_label_and_a_line(is_hidden, tmp_path, capsys, monkeypatch):
    "A bar that TQDM_DISABLE hides has not the attributes of others."
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    model = RewardModel(tiny_decoder(tmp_path / "base", synthetic_texts()), device="cpu")
    config = RewardConfig(str(tmp_path / "run"), report_to="none", use_cpu=True, disable_tqdm=False)
    monkeypatch.setattr("transformers.trainer_callback.tqdm", functools.partial(tqdm, disable=is_hidden))
    RewardTrainer(model, config, eval_dataset=synthetic_comparisons(4)).evaluate()
    printed = capsys.readouterr()
    assert ("Evaluation: 100%" in printed.err) == (not is_hidden)
    assert printed.out.replace("\r", "\n").splitlines()[-1].startswith("step 0  eval  loss "), printed.out


@pytest.mark.parametrize("has_args", [False, True])
def test_a_folder_that_nobody_has_chosen_is_printed_at_the_end(has_args, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_decoder("base", synthetic_texts())
    options = {"report_to": "none", "use_cpu": True, "max_steps": 1}
    monkeypatch.setattr("rlhf_reward.starting.RewardConfig", lambda folder: RewardConfig(folder, **options))
    args = RewardConfig("base-Reward", **options) if has_args else None
    trainer = RewardTrainer("base", args, train_dataset=synthetic_comparisons(4))
    trainer.train()
    assert ("Checkpoint: base-Reward" in capsys.readouterr().out) == (not has_args)
    assert (tmp_path / "base-Reward" / "model.safetensors").exists()
