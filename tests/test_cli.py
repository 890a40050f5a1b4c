import json
import logging
import subprocess
import sys

import pytest
import yaml
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, set_seed

from rlhf_reward.cli import main, parse_train, train
from rlhf_reward.cli.arguments import read_chat_template
from rlhf_reward.reward import RewardModel
from rlhf_reward.synthetic import tiny_decoder

pytestmark = pytest.mark.usefixtures("few_synthetic_rows")
QUICK = ["--max_steps", "1", "--use_cpu", "--report_to", "none", "--eval_strategy", "no", "--disable_tqdm", "true"]
IMPORTED_BY_HELP = """
import sys
from rlhf_reward.cli import COMMANDS, main
for argv in ([], ["--help"], *([name, option] for name in COMMANDS for option in ("--help", "--help-all"))):
    try:
        main(argv)
    except SystemExit:
        pass
print("heavy:", {"torch", "transformers", "datasets", "numpy", "yaml"} & set(sys.modules))
"""


@pytest.mark.process
def test_help_imports_nothing_heavy():
    "So help is printed at once, that of each command too, and all of it."
    command = [sys.executable, "-c", IMPORTED_BY_HELP]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "train" in output and output.endswith("heavy: set()\n")


def test_help_of_train_lists_all_arguments(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", "--help-all"])
    help = capsys.readouterr().out
    assert exit.value.code == 0
    for name in ("--model", "--dataset", "--max_length", "--gradient_accumulation_steps", "--fsdp"):
        assert name in help


def test_command_line_wins_over_yaml(tmp_path):
    config = tmp_path / "config.yaml"
    arguments = {
        "model": "m",
        "dataset": "d.jsonl",
        "learning_rate": "3e-4",
        "seed": 5,
        "bf16": False,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "output_dir": str(tmp_path),
        "use_cpu": True,
    }
    config.write_text(yaml.safe_dump(arguments))
    job, args = parse_train([str(config), "--learning_rate", "1e-4", "--dropout", "0.2"])
    assert (job.model, job.dataset, job.dropout) == ("m", "d.jsonl", 0.2)
    assert (args.learning_rate, args.seed, args.num_train_epochs) == (1e-4, 5, 1.0)
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}


def test_yaml_values_are_what_they_say(tmp_path):
    config = tmp_path / "config.yaml"
    lines = [f"output_dir: {tmp_path}", "use_cpu: true", "resume_from_checkpoint: true", "report_to: [none]"]
    lines += ["logging_strategy: 'no'", "run_name: null", "warmup_steps: 0"]
    config.write_text("".join(f"{line}\n" for line in lines))
    job, args = parse_train([str(config)])
    assert (args.resume_from_checkpoint, args.logging_strategy, args.warmup_steps) == (True, "no", 0)
    assert job.dataset == "synthetic"


def test_given_arguments_override_the_recipe(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("num_train_epochs: 5\n")
    _, args = parse_train([str(config), "--max_length", "32", "--output_dir", str(tmp_path), "--use_cpu"])
    assert (args.num_train_epochs, args.max_length, args.learning_rate) == (5, 32, 2e-3)


@pytest.mark.parametrize("yaml_text, argv, message", [
    ("learning_rat: 1", [], "config.yaml; did you mean 'learning_rate'?"),
    ("a: [1", [], "config.yaml is not YAML"),
    ("[" * 1_500, [], "config.yaml is not YAML"),
    ("max_length: 12.5", [], "argument --max_length"),
    ("eval_strategy: epochs", [], "argument --eval_strategy"),
    ("lr_scheduler_type: foo", [], "argument --lr_scheduler_type"),
    ("dtype: int8", [], "argument --dtype"),
    ("load_best_model_at_end: true\neval_strategy: steps", [], "load_best_model_at_end"),
    ("- 1", [], "expected a mapping"),
    (None, ["missing.yaml"], "'missing.yaml' does not exist"),
    (
        None,
        ["--learning_rat", "1"],
        "unknown argument '--learning_rat' on the command line (a YAML file comes first); "
        "did you mean 'learning_rate'?",
    ),
    (None, ["--dataset", "rows.jsonl"], "--model and --dataset go together"),
    (None, ["--model", "gpt2"], "--model and --dataset go together"),
    (None, ["--columns", "prompt"], "--columns prompt is not a mapping"),
    (
        None,
        ["--columns", "chosen=a,rejected=a"],
        "--columns chosen=a,rejected=a is not a mapping; expected names of this library and of the data, each once",
    ),
    (None, ["--columns", "prompt=a,prompt=b"], "is not a mapping"),
    (None, ["--resume_from_checkpoint", "runs/none"], "runs/none does not exist"),
])
def test_wrong_arguments_are_named(tmp_path, capsys, yaml_text, argv, message):
    if yaml_text:
        (tmp_path / "config.yaml").write_text(yaml_text)
        argv = [str(tmp_path / "config.yaml")]
    with pytest.raises(SystemExit):
        parse_train(argv)
    assert message in capsys.readouterr().err


def test_every_run_reports_dropped_rows_and_debug_gives_examples(tmp_path, caplog):
    from rlhf_reward.synthetic import synthetic_texts, tiny_decoder

    row = '{"prompt": "I like birds %d. ", "chosen": "robin", "rejected": "%s"}'
    rows = [row % (n, "owl" if n else "robin") for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "sound.jsonl").write_text("\n".join(rows[1:]))
    base = tiny_decoder(tmp_path / "base", synthetic_texts())
    argv = ["--model", base, "--output_dir", str(tmp_path / "out"), *QUICK]
    train([*argv, "--dataset", str(tmp_path / "sound.jsonl")])
    counted = [message.split(" of ")[0] for message in caplog.messages if "comparisons of" in message]
    assert counted == ["All 29 comparisons"]
    caplog.clear()
    train([*argv, "--dataset", str(tmp_path / "rows.jsonl"), "--log_level", "debug"])
    messages = [message for message in caplog.messages if "rows.jsonl" in message]
    assert messages[0].startswith("Row 1 of ")
    assert messages[1].startswith("Dropped 1 of 30 comparisons of ")


@pytest.mark.parametrize("options, message", [
    (["--model", "{folder}", "--dataset", "{folder}/none.jsonl"], "none.jsonl' does not exist"),
    (["--model", "./no/model", "--dataset", "synthetic"], "'./no/model' does not exist"),
    (["--model", "{folder}/base", "--dataset", "{folder}/broken.jsonl"], "line 1 is not JSON"),
    (
        ["--model", "{folder}/base", "--dataset", "{folder}/rows.jsonl"],
        "rows.jsonl cannot be used: it has the columns ['answer', 'prompt']",
    ),
])
def test_errors_in_the_input_are_reported_without_a_traceback(tmp_path, options, message):
    from rlhf_reward.synthetic import synthetic_texts, tiny_decoder

    (tmp_path / "rows.jsonl").write_text("".join('{"prompt": "%d", "answer": "a"}\n' % n for n in range(3)))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", \n')
    tiny_decoder(tmp_path / "base", synthetic_texts())
    argv = [option.format(folder=tmp_path) for option in options]
    with pytest.raises(SystemExit) as error:
        train([*argv, *QUICK, "--output_dir", str(tmp_path / "out")])
    assert str(error.value).startswith("rlhf_reward train: ")
    assert message in str(error.value)


def test_training_on_a_file_ends_with_accuracy_baseline_and_checkpoint(tmp_path, capsys):
    from rlhf_reward import RewardModel
    from rlhf_reward.synthetic import synthetic_texts, tiny_decoder

    row = '{"question": "I like birds. ", "chosen": "robin robin %d", "rejected": "%d"}\n'
    rows = [row % (n, n) for n in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(rows))
    (tmp_path / "eval.jsonl").write_text("".join(rows[:9]))
    base = tiny_decoder(tmp_path / "base", synthetic_texts())
    argv = ["--model", base, "--dataset", str(tmp_path / "train.jsonl")]
    argv += ["--eval_dataset", str(tmp_path / "eval.jsonl"), "--columns", "prompt=question"]
    metrics = train([*argv, "--output_dir", str(tmp_path / "out"), *QUICK])
    printed, errors = capsys.readouterr()
    data = f"--data {tmp_path / 'eval.jsonl'} --columns=prompt=question"
    assert f"Next: rlhf_reward evaluate --model {tmp_path / 'out'} {data} --output report\n" in errors
    assert f"Held-out accuracy: {metrics['eval_accuracy']:.4f} over 9 pairs" in printed
    assert "Longer wins:       1.0000" in printed
    assert f"Checkpoint:        {tmp_path / 'out'}" in printed
    RewardModel.from_pretrained(tmp_path / "out", device="cpu")


def test_training_on_a_stream_and_on_a_file_with_bad_lines(tmp_path, capsys, caplog):
    from rlhf_reward.synthetic import synthetic_texts, tiny_decoder

    rows = ['{"prompt": "I like birds %d. ", "chosen": "robin robin", "rejected": "owl"}' % n for n in range(40)]
    (tmp_path / "broken.jsonl").write_text("\n".join([*rows[:9], "{", *rows[9:]]))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    base = tiny_decoder(tmp_path / "base", synthetic_texts())
    out = ["--model", base, "--output_dir", str(tmp_path / "out"), *QUICK]
    with pytest.raises(SystemExit, match="line 10 is not JSON"):
        train([*out, "--dataset", str(tmp_path / "broken.jsonl")])
    assert train([*out, "--dataset", str(tmp_path / "broken.jsonl"), "--on_bad_row", "skip"])["eval_pairs"] == 4
    assert "Held out for the evaluation: 4 of 40 comparisons, by prompt." in caplog.messages
    with pytest.raises(SystemExit):
        train([*out, "--dataset", str(tmp_path / "rows.jsonl"), "--streaming"])
    assert "--streaming goes with --eval_dataset" in capsys.readouterr().err
    data = str(tmp_path / "rows.jsonl")
    streamed = [*out, "--dataset", data, "--eval_dataset", data, "--streaming", "--max_steps", "2"]
    assert train(streamed)["eval_pairs"] == 40
    bad = '{"prompt": "I", "chosen": 3, "rejected": "owl"}'
    (tmp_path / "bad.jsonl").write_text("\n".join([*rows[:12], bad, *rows[12:]]))
    bad_rows = ["--dataset", str(tmp_path / "bad.jsonl"), "--eval_dataset", data, "--streaming", "--max_steps", "9"]
    with pytest.raises(SystemExit, match=r"Row 13 of \S+bad.jsonl cannot be used"): # not where it was shuffled to
        train([*out, *bad_rows])
    import rlhf_reward.data

    loaded = []
    load_rows = rlhf_reward.data.load_rows

    def record(*args, **kwargs):
        loaded.append(load_rows(*args, **kwargs))
        return loaded[-1]

    with pytest.MonkeyPatch.context() as patch:  # it is read as a stream, and only the training set is
        patch.setattr(rlhf_reward.data, "load_rows", record)
        train(streamed)
    assert [type(rows).__name__ for rows in loaded] == ["IterableDataset", "Dataset"]


def test_messages_get_a_chat_template_by_name(tmp_path):
    "From a file, or from another model's tokenizer; it is saved with the model. One that has none is named."
    base = tiny_decoder(tmp_path / "base", ["user says ada. assistant says iron."])
    rows = []
    for n in range(20):
        row = {
            "prompt": [{"role": "user", "content": f"ada {n}"}],
            "chosen": [{"role": "assistant", "content": "iron"}],
            "rejected": [{"role": "assistant", "content": "tin"}],
        }
        rows.append(json.dumps(row))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    template = "{% for message in messages %}{{ message.role }} says {{ message.content }}. {% endfor %}"
    (tmp_path / "template.jinja").write_text(template)
    command = ["--model", base, "--dataset", str(tmp_path / "rows.jsonl"), *QUICK, "--max_steps", "1"]
    train([*command, "--chat_template", str(tmp_path / "template.jinja"), "--output_dir", str(tmp_path / "one")])
    assert AutoTokenizer.from_pretrained(tmp_path / "one").chat_template == template
    train([*command, "--chat_template", str(tmp_path / "one"), "--output_dir", str(tmp_path / "two")])
    assert AutoTokenizer.from_pretrained(tmp_path / "two").chat_template == template
    with pytest.raises(SystemExit, match="has no chat template; expected one that has, or a file"):
        train([*command, "--chat_template", base, "--output_dir", str(tmp_path / "three")])


@pytest.mark.parametrize("adapter", [False, True])
def test_training_continues_from_the_head_of_a_reward_model(tmp_path, adapter):
    "A language model gets a new head, a checkpoint keeps its own, with or without an adapter."
    import torch
    from rlhf_reward import RewardModel
    from rlhf_reward.adapters import add_adapter, lora_config
    from rlhf_reward.cli.train_command import prepare_trainer
    from rlhf_reward.synthetic import synthetic_texts

    base = tiny_decoder(tmp_path / "base", synthetic_texts())
    torch.manual_seed(7) # another than that of the runs
    model = RewardModel(base, device="cpu")
    model = add_adapter(model, lora_config(r=2)) if adapter else model
    model.save_pretrained(tmp_path / "trained", AutoTokenizer.from_pretrained(base))
    rows = ['{"prompt": "I like birds %d. ", "chosen": "robin", "rejected": "owl"}' % n for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))

    def opened(name):
        argv = ["--model", str(tmp_path / name), "--dataset", str(tmp_path / "rows.jsonl")]
        return prepare_trainer(*parse_train([*argv, "--output_dir", str(tmp_path / "out"), *QUICK])).model

    continued = opened("trained")
    new = opened("base")
    assert torch.equal(continued.score.weight, model.score.weight)
    assert not torch.equal(new.score.weight, model.score.weight)
    assert hasattr(continued.backbone, "peft_config") == adapter


class Interrupted:
    "A module whose import Ctrl-C ends."

    def __getattr__(self, name):
        raise KeyboardInterrupt


@pytest.mark.parametrize("command, module, argv", [
    ("train", "output_folder", []),
    ("score", "files", ["--model", "a", "--data", "b", "--output", "c"]),
    ("evaluate", "evaluation", ["--model", "a", "--data", "b", "--output", "c"]),
])
def test_ctrl_c_during_imports_is_one_line(command, module, argv, monkeypatch, capsys):
    "The imports take some seconds, in which Ctrl-C ended in a traceback."
    monkeypatch.setitem(sys.modules, f"rlhf_reward.{module}", Interrupted())
    with pytest.raises(SystemExit) as exit:
        main([command, *argv])
    assert exit.value.code == 130
    assert capsys.readouterr().err.strip() == f"rlhf_reward {command}: stopped by SIGINT."


def test_every_command_leaves_the_process_group(tmp_path, monkeypatch):
    "Also a command that fails; a member of the group at the end of its process can be aborted."
    from torch import distributed

    import rlhf_reward.cli

    def member(argv):
        store = f"file://{tmp_path}/{len(argv)}"
        distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        if argv:
            raise ValueError("no rows")

    commands = rlhf_reward.cli.COMMANDS
    monkeypatch.setitem(commands, "score", commands["score"]._replace(run=member))
    main(["score"])
    assert not distributed.is_initialized()
    with pytest.raises(ValueError, match="^no rows$"):
        main(["score", "rows"])
    assert not distributed.is_initialized()


def test_an_evaluation_set_without_pairs_ends_with_its_metrics(tmp_path, capsys):
    "Comparisons that only tie, with a loss that learns from ties: there is a loss, but no accuracy."
    rows = [{"prompt": "Ada ", "responses": [" robin", " wren"], "ranks": [1, 1]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_decoder(tmp_path / "base", ["Ada robin wren"])
    data = ["--model", model, "--dataset", tmp_path / "rows.jsonl", "--eval_dataset", tmp_path / "rows.jsonl"]
    arguments = [*QUICK, *data, "--loss", "davidson", "--output_dir", tmp_path / "out"]
    metrics = train(list(map(str, arguments)))
    assert metrics["eval_pairs"] == 0 and metrics["eval_loss"] > 0 and "eval_longer_wins" not in metrics
    assert "Held-out accuracy: none, since no comparison has a better and a worse response" in capsys.readouterr().out


def test_longer_wins_is_one_number(tmp_path, capsys):
    "That of the verdict: the lengths of responses alone, and not after a prompt whose end they continue as one token."
    rows = []
    for number in range(12):
        prompt = f"Ada {'likes ' * number}bir"
        rows.append({"prompt": prompt, "chosen": "ds robin", "rejected": " iron"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_decoder(tmp_path / "base", ["Ada likes birds robin iron"] * 50)
    data = ["--model", model, "--dataset", tmp_path / "rows.jsonl", "--eval_dataset", tmp_path / "rows.jsonl"]
    metrics = train(list(map(str, [*QUICK, *data, "--output_dir", tmp_path / "out"])))
    printed = capsys.readouterr().out
    assert metrics["eval_longer_wins"] == 1 and "Longer wins:       1.0000" in printed
    assert '"longer wins"' in printed and "| longer wins | 100.0 |" in (tmp_path / "out/README.md").read_text()


def test_warnings_of_the_hub_are_printed_once(capsys):
    "The commands print what reaches the root logger, and the hub has a handler of its own."
    main(["env"])
    assert "transformers" in capsys.readouterr().out
    logger = logging.getLogger("huggingface_hub")
    assert logger.handlers and not logger.propagate


def test_an_error_in_training_is_one_line(tmp_path):
    with pytest.raises(SystemExit) as exit:
        main(["train", *QUICK, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "true"])
    assert str(exit.value).startswith(f"rlhf_reward train: {str(tmp_path)!r} has no checkpoint; ")


NO_TEMPLATES = [(b"{% if %}x", "cannot be read, line 1"), (b"\xff\xfe{{ x }}", "is not text")]


@pytest.mark.parametrize("template, problem", NO_TEMPLATES)
def test_a_chat_template_that_is_none_is_refused(template, problem, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_bytes(template)
    with pytest.raises(ValueError, match=problem):
        read_chat_template(str(path))
    for right in ("{{ raise_exception('no') }}", "{{ messages[7].content.x }}", "{% generation %}a{% endgeneration %}"):
        path.write_text(right)
        assert read_chat_template(str(path)) == right


def saved_splits(folder):
    "Save a data set whose splits have other names than train and test; return its folder."
    splits = {}
    for name, count in (("train_prefs", 20), ("test_prefs", 6)):
        rows = [{"prompt": f"{name} {n}. ", "chosen": "iron", "rejected": "tin"} for n in range(count)]
        splits[name] = Dataset.from_list(rows)
    DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def test_training_on_named_splits(tmp_path, caplog):
    "Without --eval_dataset, --eval_split is of the same data; both are named in messages."
    caplog.set_level("INFO", "rlhf_reward")
    base = tiny_decoder(tmp_path / "base", ["iron tin train prefs"])
    data = saved_splits(tmp_path / "data")
    out = ["--model", base, "--output_dir", str(tmp_path / "out"), *QUICK]
    with pytest.raises(SystemExit, match=r"has the splits \['train_prefs', 'test_prefs'\]; expected one of them, not"):
        train([*out, "--dataset", data])
    split = ["--dataset", data, "--split", "train_prefs"]
    assert train([*out, *split, "--eval_split", "test_prefs"])["eval_pairs"] == 6
    assert "All 20 comparisons of " in caplog.text and "data (train_prefs)" in caplog.text
    assert "data (test_prefs)" in caplog.text
    assert train([*out, *split])["eval_pairs"] == 2  # a tenth of the prompts
    inside = ["--dataset", str(tmp_path), "--data_dir", "data", "--split", "train_prefs", "--eval_split", "test_prefs"]
    assert train([*out, *inside])["eval_pairs"] == 6
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "iron", "rejected": "tin"}))
    other = ["--dataset", str(tmp_path), "--data_dir", "data", "--split", "train_prefs"]
    assert train([*out, *other, "--eval_dataset", str(tmp_path / "eval.jsonl")])["eval_pairs"] == 1


def test_parts_that_data_does_not_have_are_refused_by_every_command(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}))
    base = tiny_decoder(tmp_path / "base", ["a b p"])
    set_seed(0)
    RewardModel(base, device="cpu").save_pretrained(tmp_path / "model", AutoTokenizer.from_pretrained(base))
    model = ["--model", str(tmp_path / "model"), "--device", "cpu", "--output"]
    commands = [
        ["train", "--model", base, "--output_dir", str(tmp_path / "out"), *QUICK, "--dataset", str(file)],
        ["audit", str(file)],
        ["evaluate", *model, str(tmp_path / "report"), "--data", str(file)],
        ["score", *model, str(tmp_path / "scored.jsonl"), "--data", str(file)],
    ]
    parts = {"split": "train", "dataset_config": "c", "revision": "v1", "data_dir": "d"}
    for command in commands:
        for name, value in parts.items():
            with pytest.raises(SystemExit, match=f"{name.removeprefix('dataset_')} is '{value}'; expected no|hub only"):
                main([*command, f"--{name}", value])
    with pytest.raises(SystemExit, match="is a single file, and split is 'test'"):
        main([*commands[0], "--eval_split", "test"])
    with pytest.raises(SystemExit):
        main(["train", "--output_dir", str(tmp_path / "out"), "--split", "train"])
    assert "--split goes with a --dataset of files or of the hub" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_known_sets_are_trained_on_audited_and_evaluated(tmp_path, capsys):
    row = {"response_0": "iron", "response_1": "tin", "better_response_id": 0, "safer_response_id": 1}
    lines = [json.dumps({"prompt": f"p {n}", **row}) for n in range(20)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    base = tiny_decoder(tmp_path / "base", ["iron tin p"])
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }} {% endfor %}")
    options = ["--model", base, "--output_dir", str(tmp_path / "out"), *QUICK, "--chat_template", str(template)]
    options += ["--dataset", str(file)]
    with pytest.raises(SystemExit, match="expected a choice, --form pku_better: .*; --form pku_safer: "):
        main(["train", *options])
    assert train([*options, "--form", "pku_safer"])["eval_pairs"] == 2
    with pytest.raises(SystemExit):
        main(["audit", str(file), "--form", "pku_better"])
    assert "20 rows of the form pku_better, read as responses, ranks (messages)" in capsys.readouterr().out
    report = tmp_path / "report"
    evaluate = ["evaluate", "--model", str(tmp_path / "out"), "--data", str(file), "--output", str(report)]
    accuracies = []
    for form in ("pku_better", "pku_safer"):
        main([*evaluate[:-1], f"{report}_{form}", "--device", "cpu", "--form", form])
        found = json.loads((tmp_path / f"report_{form}" / "report.json").read_text())
        accuracies.append(found["data"][str(file)]["models"][str(tmp_path / "out")]["accuracy"])
    assert sum(accuracies) == 1  # the labels are opposite
    following = f"Next: rlhf_reward score --model {tmp_path / 'out'} --data ROWS.jsonl --output scored.jsonl\n"
    assert capsys.readouterr().err.count(following) == 2


def test_score_writes_rows_of_known_sets_as_they_are(tmp_path):
    base = tiny_decoder(tmp_path / "base", ["a b p"])
    RewardModel(base, device="cpu").save_pretrained(tmp_path / "model", AutoTokenizer.from_pretrained(base))
    row = {"prompt": "p", "answers": [], "response": "a"}
    Dataset.from_list([row, row]).save_to_disk(tmp_path / "data")
    options = ["--model", str(tmp_path / "model"), "--device", "cpu", "--data", str(tmp_path / "data")]
    main(["score", *options, "--output", str(tmp_path / "out.jsonl")])
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first == second and first.pop("reward") is not None and first == row
