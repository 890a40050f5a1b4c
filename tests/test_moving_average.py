"With `ema_decay` the model of a run is the average of its weights; training continues from the weights themselves."
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoTokenizer, TrainerCallback

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer
from rlhf_reward.moving_average import STATE
from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder

ROWS = Dataset.from_list(synthetic_comparisons(24))
DECAY = 0.8


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("base"), synthetic_texts())


class Recorder(TrainerCallback):
    "Keeps the trained weights after each step."

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        named = dict(model.named_parameters())
        self.steps.append({name: weight.detach().clone() for name, weight in named.items() if weight.requires_grad})


def make(base, folder, dtype=torch.float32, peft_config=None, **options):
    torch.manual_seed(0)
    defaults = {
        "ema_decay": DECAY,
        "max_steps": 4,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return RewardTrainer(
        RewardModel(base, 0.0, "cpu", dtype=dtype),
        RewardConfig(str(folder), **{**defaults, **options}),
        train_dataset=ROWS,
        eval_dataset=ROWS if "eval_strategy" in options else None,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=peft_config,
        callbacks=[Recorder()],
    )


def recorded(trainer):
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, Recorder)).steps


def average_of(steps):
    "The definition: weights fall by the decay, and are divided by their sum."
    shares = [DECAY ** (len(steps) - 1 - index) for index in range(len(steps))]
    averages = {}
    for name in steps[0]:
        total = sum(share * step[name].double() for share, step in zip(shares, steps))
        averages[name] = total / sum(shares)
    return averages


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def different(one, other):
    return [name for name in one if not torch.equal(one[name], other[name])]


def assert_is_average(model, steps):
    weights = dict(model.named_parameters())
    for name, average in average_of(steps).items():
        dtype = weights[name].dtype
        tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
        assert_close(weights[name], average.to(dtype), rtol=tolerance, atol=tolerance / 100)


def test_the_model_and_its_checkpoints_are_the_average_and_resume_bit_for_bit(base, tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear")
    for number, options in enumerate(({"dtype": torch.bfloat16, "loss": "rao_kupper"}, {"peft_config": lora})):
        folder = tmp_path / f"{number}"
        whole = make(base, folder, save_strategy="steps", save_steps=2, **options)
        whole.train()
        steps = recorded(whole)
        assert len(steps) == 4 and whole.moving_average is None
        assert_is_average(whole.model, steps)
        assert not torch.allclose(steps[-1]["score.weight"], whole.model.score.weight, atol=1e-3)
        for step in (2, 4):
            saved = RewardModel.from_pretrained(folder / f"checkpoint-{step}", device="cpu")
            assert_is_average(saved, steps[:step])
            assert (folder / f"checkpoint-{step}" / STATE).is_file()
        whole.save_model()
        assert not (folder / STATE).exists()
        shutil.rmtree(folder / "checkpoint-4")
        resumed = make(base, folder, save_strategy="steps", save_steps=2, **options)
        resumed.train(resume_from_checkpoint=True)
        assert different(weights_of(whole.model), weights_of(resumed.model)) == []
        assert different(steps[-1], recorded(resumed)[-1]) == []
        for loss, other in zip(whole.reward_loss.parameters(), resumed.reward_loss.parameters(), strict=True):
            assert torch.equal(loss, other)
        state = load_file(folder / "checkpoint-4" / STATE)
        assert int(state["updates"]) == 4
        assert any(name.startswith("average.") for name in state) == (options.get("dtype") == torch.bfloat16)


def test_evaluations_and_the_best_checkpoint_are_of_the_average_and_change_no_step(base, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make(base, tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", **options)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert_is_average(trainer.model, recorded(trainer)[:best])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)
    without = make(base, tmp_path / "without", ema_decay=None)
    without.train()
    assert [different(one, other) for one, other in zip(recorded(trainer), recorded(without))] == [[]] * 4
    assert different(recorded(without)[-1], weights_of(without.model)) == []


def test_what_cannot_be_averaged_is_refused(base, tmp_path):
    for decay in (0.0, 1.0, -0.5, 2.0):
        with pytest.raises(ValueError, match=f"ema_decay is {decay}; expected .* between 0 and 1"):
            make(base, tmp_path, ema_decay=decay)
    make(base, tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    for decay in (None, 0.5):
        trainer = make(base, tmp_path, ema_decay=decay, save_strategy="steps", save_steps=1)
        with pytest.raises(ValueError, match="ema_decay 0.8 .*cannot change within a run"):
            trainer.train(resume_from_checkpoint=True)
