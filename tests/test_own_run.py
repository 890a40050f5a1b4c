"A run takes up its own checkpoints only, has its output folder for itself, and survives signals and a full disk."
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from architectures import save_language_model
from programs import run
from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, stopping, training
from rlhf_reward.file_list import FILES, checkpoint_problem
from rlhf_reward.cli import main
from rlhf_reward.output_folder import LOCK, own_folder
from rlhf_reward.resuming import newest_checkpoint
from rlhf_reward.run_record import CHANGEABLE, RUN, UNCHANGEABLE, data_fingerprint
from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder
from tiny import open_tiny, tokenized

ROWS = synthetic_comparisons(20)
OTHER_ROWS = synthetic_comparisons(20, seed=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("base"), synthetic_texts())


def make(
    base,
    folder,
    rows=ROWS,
    eval_rows=None,
    model=None,
    peft_config=None,
    dropout=0.0,
    callbacks=None,
    **options,
):
    torch.manual_seed(0)
    defaults = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "layout": "padded",
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return RewardTrainer(
        model or open_tiny(base, dropout),
        RewardConfig(str(folder), **{**defaults, **options}),
        train_dataset=tokenized(base, 20) if rows is ROWS else rows,
        eval_dataset=eval_rows or (ROWS if "eval_strategy" in options else None),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=peft_config,
        callbacks=callbacks,
    )


@pytest.fixture(autouse=True)
def unchecked_padding(monkeypatch):
    "The layout is not compared with each text alone: that takes longer than four steps, and is tested elsewhere."
    monkeypatch.setattr(training, "check_padding", lambda model, examples: None)


def assert_same_weights(one, other):
    one, other = one.model.state_dict(), other.model.state_dict()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# ----- what a run was begun with


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    "The trainer of a run of four steps, with checkpoints 2 and 4."
    trainer = make(base, tmp_path_factory.mktemp("begun") / "out")
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def begun(whole):
    "The folder of that run, which no test changes."
    return Path(whole.args.output_dir)


@pytest.fixture
def out(begun, tmp_path):
    "A copy of that folder."
    return shutil.copytree(begun, tmp_path / "out")


LORA = LoraConfig(r=2, target_modules="all-linear")
REFUSED = {
    "seed": {"seed": 1},
    "data_seed": {"data_seed": 7},
    "train_data": {"rows": OTHER_ROWS},
    "max_length": {"max_length": 64},
    "total_batch_size": {"per_device_train_batch_size": 4},
    "loss": {"loss": "plackett_luce"},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "center_rewards_coefficient": {"center_rewards_coefficient": 0.1},
    "bf16": {"bf16": True},
    "dropout": {"dropout": 0.2},
    "train_sampling_strategy": {"train_sampling_strategy": "sequential"},
    "dataloader_drop_last": {"dataloader_drop_last": True},
    "optim": {"optim": "adafactor"},
    "adapter": {"peft_config": LORA},
    "sum_to_zero_coefficient": {"sum_to_zero_coefficient": 0.1},
    "freeze_layers": {"freeze_layers": 1},
    "form": {"loss": "davidson"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_result_is_refused_by_name(base, begun, name):
    expected = rf"its run was begun with .*{name} .*\(now .*expected the same values.*"
    expected += f"{name}.* cannot change" if name in UNCHANGEABLE else rf"resume_changes \(--resume_changes {name}\)"
    trainer = make(base, begun, **REFUSED[name])
    for checkpoint in (True, str(begun / "checkpoint-2")):
        with pytest.raises(ValueError, match=expected):
            trainer.train(resume_from_checkpoint=checkpoint)
    assert newest_checkpoint(begun).endswith("checkpoint-4")


def test_another_model_is_refused(base, out, tmp_path):
    "One with other weights, one of another family, and one in another dtype. A copy of the same is not another."
    torch.manual_seed(5)
    other = RewardModel(base, 0.0, "cpu")
    for weight in other.backbone.parameters():
        weight.data += 0.1
    family = RewardModel(save_language_model("gpt2", tmp_path / "gpt2"), 0.0, "cpu")
    family.backbone.resize_token_embeddings(other.num_embeddings)
    for name, model in {
        "model llama": other,
        "model .*now gpt2": family,
        "dtype": RewardModel(base, 0.0, "cpu", dtype="bfloat16"),
    }.items():
        with pytest.raises(ValueError, match=f"its run was begun with .*{name}"):
            make(base, out, model=model).train(resume_from_checkpoint=True)
    copy = shutil.copytree(base, tmp_path / "copy")
    make(copy, out, max_steps=5).train(resume_from_checkpoint=str(out / "checkpoint-4"))


def test_another_adapter_is_refused(base, tmp_path):
    make(base, tmp_path, peft_config=LORA).train()
    for config in (LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"), LoraConfig(r=3), None):
        with pytest.raises(ValueError, match="adapter.* cannot change within a run"):
            make(base, tmp_path, peft_config=config).train(resume_from_checkpoint=True)
    assert make(base, tmp_path, peft_config=LORA).train(resume_from_checkpoint=True).global_step == 4


def test_the_same_batch_and_data_in_another_form_resume(base, out, tmp_path, caplog):
    "Halves of the batch accumulated, and the rows read from another file."
    ROWS.save_to_disk(tmp_path / "rows")
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 6}
    resumed = make(base, out, load_from_disk(tmp_path / "rows"), **options)
    assert resumed.train(resume_from_checkpoint=True).global_step == 6
    assert "resumes with other values than it was begun with: max_steps 4 (now 6)." in caplog.text


def test_data_are_known_by_what_a_loss_learns_from(base, tmp_path):
    rows_of_run = make(base, tmp_path).train_dataset
    known = data_fingerprint(rows_of_run)
    assert data_fingerprint(rows_of_run.select(range(20))) == known
    assert data_fingerprint(Dataset.from_list(list(rows_of_run), features=rows_of_run.features)) == known
    changes = {"weight": 2.0, "ranks": [2, 1, 3, 4], "shared_prefix": [1], "ratings": [1.0, 2.0, 3.0, None]}
    others = [rows_of_run.select([1, 0, *range(2, 20)])]
    for name, value in changes.items():
        rows = list(rows_of_run)
        rows[7] = {**rows[7], name: value}
        others.append(Dataset.from_list(rows, features=rows_of_run.features))
    assert known not in map(data_fingerprint, others)
    assert data_fingerprint(rows_of_run.to_iterable_dataset()).startswith("a stream")


def test_changes_by_name(base, out):
    options = {"seed": 1, "bf16": True, "max_steps": 6}
    with pytest.raises(ValueError, match="begun with bf16"):
        make(base, out, resume_changes=["seed"], **options).train(resume_from_checkpoint=True)
    resumed = make(base, out, resume_changes=["seed", "bf16"], **options)
    assert resumed.train(resume_from_checkpoint=True).global_step == 6
    make(base, out, seed=1, bf16=True).train(resume_from_checkpoint=True)  # as it is now
    with pytest.raises(ValueError, match="resume_changes has 'sed'; expected names of model, train_data"):
        make(base, out, resume_changes=["sed"])
    assert not set(UNCHANGEABLE) & set(CHANGEABLE)


@pytest.mark.parametrize("difference", [{"rows": OTHER_ROWS, "seed": 1}, {"learning_rate": 2e-3}], ids=str)
def test_checkpoints_of_another_run_are_passed_over(base, tmp_path, caplog, difference):
    "A run in the folder of a longer one resumes from its own checkpoint, though that is not the newest."
    make(base, tmp_path / "shared", save_steps=1).train()
    make(base, tmp_path / "shared", max_steps=2, save_steps=1, **difference).train()
    assert "has checkpoints of an earlier run (checkpoint-1 to checkpoint-4). This run starts from" in caplog.text
    resumed = make(base, tmp_path / "shared", max_steps=5, save_steps=1, **difference)
    resumed.train(resume_from_checkpoint=True)
    assert "2 newer checkpoints are of another run and passed over" in caplog.text
    alone = make(base, tmp_path / "alone", max_steps=5, save_strategy="no", **difference)
    alone.train()
    assert_same_weights(resumed, alone)


def test_a_new_run_in_a_folder_with_a_model_says_so(base, tmp_path, caplog):
    trainer = make(base, tmp_path, save_strategy="no")
    trainer.train()
    assert "earlier run" not in caplog.text
    trainer.save_model()
    make(base, tmp_path, save_strategy="no").train()
    assert f"{tmp_path} has the model of an earlier run, which this run replaces." in caplog.text


def test_a_record_that_is_damaged_is_not_compared(base, out, caplog):
    "A digit of the seed is another one: the checkpoint is damaged, rather than one of another run."
    record = out / "checkpoint-4" / RUN
    record.write_text(record.read_text().replace('"seed": 42', '"seed": 43'))
    with pytest.raises(ValueError, match="run.json has its size, but other contents than were written"):
        make(base, out).train(resume_from_checkpoint=str(record.parent))
    make(base, out, max_steps=3).train(resume_from_checkpoint=True)
    assert "checkpoint-4 is incomplete (run.json has its size, but other contents" in caplog.text


def test_a_finished_run_that_is_resumed_takes_no_further_step(base, whole, out, caplog):
    "The last step is in the middle of an epoch of three."
    resumed = make(base, out)
    assert resumed.train(resume_from_checkpoint=True).global_step == 4
    assert_same_weights(resumed, whole)
    assert "checkpoint-4 is of the last step, 4: nothing is left to train" in caplog.text


@pytest.mark.parametrize("scheduler", ["constant", "cosine", "reduce_lr_on_plateau"])
def test_a_new_learning_rate_applies(base, tmp_path, scheduler):
    "As the advice for a run that diverged has it. From step 2 on the rates are those of the new run, scaled or not."
    options = {"lr_scheduler_type": scheduler, "warmup_steps": 1, "max_steps": 4}
    if scheduler == "reduce_lr_on_plateau":
        options.update(eval_strategy="steps", eval_steps=100)

    def rates(trainer):
        return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]

    begun = make(base, tmp_path, weight_decay=0.1, **options)
    begun.train()
    resumed = make(base, tmp_path, learning_rate=1e-6, weight_decay=0.0, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    fresh = make(base, tmp_path / "fresh", learning_rate=1e-6, **options)
    fresh.train()
    assert rates(resumed) == pytest.approx(rates(begun)[:2] + rates(fresh)[2:], rel=1e-9)
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} == {0.0}


# ----- files


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


def zeros(content):
    middle = len(content) // 2
    return content[:middle] + bytes(min(32768, len(content) - middle)) + content[middle + 32768:]


@pytest.mark.parametrize("damage", [flip_a_bit, zeros])
def test_damage_of_the_same_size_is_found_in_every_file(begun, damage):
    folder = begun / "checkpoint-2"
    assert checkpoint_problem(folder) is None
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 9
    for path in files:
        content = path.read_bytes()
        damaged = damage(content)
        assert len(damaged) == len(content) and damaged != content
        path.write_bytes(damaged)
        assert checkpoint_problem(folder), path.name
        path.write_bytes(content)
    assert checkpoint_problem(folder) is None


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}", '{"model.safetensors": {}}', "[" * 100_000, "{", ""])
@pytest.mark.parametrize("name", [FILES, "trainer_state.json"])
def test_a_damaged_list_of_files_is_found(begun, name, content):
    "JSON of another kind ended in a traceback, and an empty list was one of a complete checkpoint."
    file = begun / "checkpoint-2" / name
    whole = file.read_text(encoding="utf-8")
    file.write_text(content, encoding="utf-8")
    problem = checkpoint_problem(begun / "checkpoint-2")
    file.write_text(whole, encoding="utf-8")
    assert problem and checkpoint_problem(begun / "checkpoint-2") is None


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage, options", [
    (zeros, {"learning_rate": 1e-4}),
    (lambda content: bytes(64) + content[64:], {}),
    (lambda content: b"", {"learning_rate": 1e-4}),
], ids=["zeros, new rate", "no beginning", "empty, new rate"])
def test_damage_without_checksums_is_a_value_error(base, begun, tmp_path, name, damage, options):
    "Checkpoints of an earlier version list sizes alone: torch finds the damage, with an error of its own."
    folder = shutil.copytree(begun / "checkpoint-2", tmp_path / "checkpoint-2")
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.name != FILES}
    (folder / FILES).write_text(json.dumps(sizes), encoding="utf-8")
    with pytest.raises(ValueError, match="state of training in .* cannot be read.*the checkpoint before"):
        make(base, tmp_path / "run", **options).train(resume_from_checkpoint=str(folder))


def test_the_checkpoint_before_a_damaged_one_is_taken(base, whole, out, caplog):
    weights = out / "checkpoint-4/model.safetensors"
    weights.write_bytes(flip_a_bit(weights.read_bytes()))
    resumed = make(base, out)
    resumed.train(resume_from_checkpoint=True)
    assert "is incomplete (model.safetensors has its size, but other contents than were written)" in caplog.text
    assert_same_weights(resumed, whole)


def test_checkpoints_of_an_earlier_version_resume(base, out):
    "Those list sizes alone, and have no record but the arguments."
    for folder in (out, out / "checkpoint-2", out / "checkpoint-4"):
        (folder / RUN).unlink()
    for folder in out.glob("checkpoint-*"):
        sizes = {}
        for name, noted in json.loads((folder / FILES).read_text()).items():
            if name not in (RUN, "trainer_state.json"):
                sizes[name] = noted["bytes"]
        (folder / FILES).write_text(json.dumps(sizes))
    with pytest.raises(ValueError, match="begun with seed 42"):
        make(base, out, seed=1).train(resume_from_checkpoint=True)
    assert make(base, out, max_steps=6).train(resume_from_checkpoint=True).global_step == 6


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_pairs",  # which never changes: the first checkpoint is the best
}


def test_what_the_best_checkpoint_is_chosen_by_is_the_same(base, tmp_path):
    make(base, tmp_path, **BEST).train()
    changes = {
        "eval_data": {"eval_rows": OTHER_ROWS},
        "metric_for_best_model": {"metric_for_best_model": "eval_margin", "greater_is_better": True},
    }
    for name, change in changes.items():
        with pytest.raises(ValueError, match=f"its run was begun with .*{name}"):
            make(base, tmp_path, **{**BEST, **change}).train(resume_from_checkpoint=True)


def test_a_damaged_best_checkpoint_is_not_loaded(base, tmp_path, caplog):
    class Damage(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                weights = Path(state.best_model_checkpoint, "model.safetensors")
                weights.write_bytes(flip_a_bit(weights.read_bytes()))

    trainer = make(base, tmp_path, callbacks=[Damage()], **BEST)
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert "checkpoint-2, is damaged (model.safetensors has its size, but other contents" in caplog.text
    last = load_file(tmp_path / "checkpoint-4/model.safetensors")
    assert torch.equal(trainer.model.score.weight, last["score.weight"])


# ----- the output folder


def test_a_folder_is_locked_while_a_run_trains(base, tmp_path):
    "Another thread is as good as another process. Afterwards nothing is left of the lock."
    errors = []

    class TrainToo(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            def train():
                try:
                    make(base, tmp_path).train()
                except OSError as error:
                    errors.append(str(error))

            if state.global_step == 1:
                thread = threading.Thread(target=train)
                thread.start()
                thread.join()

    make(base, tmp_path, callbacks=[TrainToo()]).train()
    assert len(errors) == 1 and "is the output folder of another training run, which has not ended" in errors[0]
    assert not (tmp_path / LOCK).exists()
    make(base, tmp_path).train()


def test_a_second_command_in_the_folder_ends_with_one_line(tmp_path, python):
    with own_folder(tmp_path):
        result = run(python, *CLI, "--output_dir", tmp_path, status=1)
    assert result.stderr.startswith("rlhf_reward train: ") and "of another training run" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/below", "/dev/null"])
def test_a_folder_that_cannot_be_written_to_is_found_before_training(base, tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written to: .*; expected a folder with space"):
        make(base, tmp_path / folder)


def test_a_disk_that_is_too_small_is_found_before_training(base, tmp_path, monkeypatch):
    trainer = make(base, tmp_path)
    free = sum(weight.numel() * 4 for weight in trainer.model.parameters()) * 3 // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    with pytest.raises(OSError, match="GB of free space; expected at least .* to save 2 x"):
        trainer.train()
    make(base, tmp_path, save_strategy="no").train()


@pytest.fixture
def disk():
    "Files are limited to `disk(bytes)`: a write beyond fails, as on a full disk."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size=None):
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))

    yield limit
    limit()


@pytest.mark.parametrize("limited", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_full_disk_loses_neither_the_run_nor_the_checkpoint_before(base, tmp_path, caplog, disk, limited):
    "At step 4 one file does not fit; the older checkpoint is kept, though only one may be."
    make(base, tmp_path / "size", save_steps=4).train()
    sizes = {name: noted["bytes"] for name, noted in json.loads(
        (tmp_path / "size/checkpoint-4" / FILES).read_text()).items()}
    assert sizes["model.safetensors"] < sizes["optimizer.pt"]
    size = {"model.safetensors": 100_000, "optimizer.pt": sizes["model.safetensors"] + 100_000}.get(limited)

    class Fill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if size is not None:
                disk(size if state.global_step == 3 else None)

    trainer = make(base, tmp_path / "out", max_steps=6, save_total_limit=1, callbacks=[Fill()])
    if size is None:
        save = type(trainer.state).save_to_json

        def save_unless_full(state, path):
            if state.global_step == 4:
                raise OSError(28, "No space left on device")
            save(state, path)

        type(trainer.state).save_to_json = save_unless_full
    seen = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append(sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")))

    trainer.add_callback(Look())
    try:
        assert trainer.train().global_step == 6
    finally:
        if size is None:
            type(trainer.state).save_to_json = save
    assert seen == [["checkpoint-2"], ["checkpoint-2"], ["checkpoint-6"]]
    assert "checkpoint-4 is missing, and training continues: " in caplog.text
    assert checkpoint_problem(tmp_path / "out/checkpoint-6") is None


def test_a_full_disk_at_the_last_save_is_an_error_with_the_folder(base, tmp_path, disk):
    trainer = make(base, tmp_path)
    trainer.train()
    disk(100_000)
    with pytest.raises(OSError, match="cannot be written to: .*expected a folder with space"):
        trainer.save_model(str(tmp_path / "model"))
    disk()
    assert checkpoint_problem(tmp_path / "checkpoint-4") is None


@pytest.mark.usefixtures("few_synthetic_rows")
def test_a_command_that_cannot_save_its_model_names_the_checkpoint(tmp_path, monkeypatch):
    save = RewardTrainer._write_model

    def save_checkpoints_only(trainer, folder, state_dict):
        if "checkpoint-" not in str(folder):
            raise OSError(28, "No space left on device")
        save(trainer, folder, state_dict)

    monkeypatch.setattr(RewardTrainer, "_write_model", save_checkpoints_only)
    options = ["--output_dir", str(tmp_path), "--max_steps", "2", "--save_strategy", "steps", "--eval_strategy", "no"]
    with pytest.raises(SystemExit) as exit:
        main(CLI[2:] + options)
    line = str(exit.value)
    assert line.startswith(f"rlhf_reward train: {str(tmp_path)!r} cannot be written to: No space left on device; expec")
    assert f"to continue from {tmp_path / 'checkpoint-2'}, add --resume_from_checkpoint true" in line
    monkeypatch.setattr(RewardTrainer, "_write_model", save)
    main([*CLI[2:], *options, "--resume_from_checkpoint", "true"])
    assert (tmp_path / "model.safetensors").is_file()


# ----- signals

CLI = ["-m", "rlhf_reward", "train", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
RUNNING = [*CLI, "--logging_steps", "1", "--eval_strategy", "no", "--dropout", "0.1", "--warmup_steps", "2"]


@pytest.fixture(scope="module")
def running(base, tmp_path_factory):
    "The command, on few rows."
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    synthetic_comparisons(200).to_json(rows)
    return [*RUNNING, "--model", base, "--dataset", str(rows)]


def stopped(python, running, folder, number, *options):
    "Start the command, send a signal after its third step, and return its status and what it printed to stderr."
    process = subprocess.Popen(
        [python, *running, "--output_dir", folder, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    steps = 0
    for line in process.stdout:
        steps += "grad_norm" in line
        if steps == 3:
            process.send_signal(number)
            break
    process.stdout.read()
    errors = process.stderr.read()
    return process.wait(), errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_after_a_checkpoint(python, running, tmp_path, number):
    "The resumed run ends with the weights of one that was not stopped."
    options = ["--max_steps", "12", "--save_strategy", "no"]
    status, errors = stopped(python, running, tmp_path / "out", number, *options, "--save_on_signal", "true")
    assert status == 128 + number and "Traceback" not in errors
    checkpoint, = (tmp_path / "out").glob("checkpoint-*")
    assert checkpoint_problem(checkpoint) is None
    step = int(checkpoint.name.split("-")[1])
    line = f"rlhf_reward train: stopped by {number.name} after step {step} of 12. To continue from {checkpoint}, add "
    assert line in errors
    if number == signal.SIGTERM:
        run(python, *running, *options, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "true")
        run(python, *running, *options, "--output_dir", tmp_path / "whole")
        one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_without_a_checkpoint_ends_the_command_with_one_line(python, running, tmp_path, number):
    status, errors = stopped(python, running, tmp_path / "out", number, "--max_steps", "200")
    assert status == 128 + number and "Traceback" not in errors
    assert f"rlhf_reward train: stopped by {number.name} after step" in errors
    assert not list((tmp_path / "out").glob("checkpoint-*")) and not (tmp_path / "out/model.safetensors").exists()


def test_a_signal_while_a_process_is_forked_is_not_lost():
    "Python ignores exceptions in what it runs then. The forked process dies of the signal itself."
    with pytest.raises(stopping.Stopped), stopping.handled_signals(stopping.raise_stopped):
        stopping._Forking.begin()
        os.kill(os.getpid(), signal.SIGTERM)
        stopping._Forking.end()
        time.sleep(5)
    with stopping.handled_signals(stopping.raise_stopped):
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
        time.sleep(0.5)  # the child is ready
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


def test_a_script_gets_an_exception_and_a_checkpoint(base, tmp_path):
    "A second signal does not wait. Before and after training the handlers are those of the script."
    before = signal.getsignal(signal.SIGTERM)

    class Send(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                for _ in range(self.times):
                    os.kill(os.getpid(), signal.SIGTERM)

    for times, checkpoints in ((1, ["checkpoint-3"]), (2, [])):
        Send.times = times
        folder = tmp_path / str(times)
        trainer = make(base, folder, save_strategy="epoch", callbacks=[Send()], save_on_signal=True)
        with pytest.raises(KeyboardInterrupt, match="stopped by SIGTERM"):
            trainer.train()
        assert [path.name for path in folder.glob("checkpoint-*")] == checkpoints
    assert signal.getsignal(signal.SIGTERM) == before
    state = json.loads((tmp_path / "1/checkpoint-3/trainer_state.json").read_text())
    assert not state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
