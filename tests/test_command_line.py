"One command line: spellings, YAML in and out, help, recipes, the next command, completion."
import json
import re
import shlex
import subprocess
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import nbformat
import pytest
import yaml
from transformers import AutoTokenizer

import rlhf_reward
from rlhf_reward import RewardModel
from rlhf_reward.cli import COMMANDS, main, parse_train
from rlhf_reward.cli.arguments import exit_on_error, read_data
from rlhf_reward.cli.config import GENERAL, options_by_name
from rlhf_reward.cli.train_command import next_words, prepare_trainer
from rlhf_reward.cli.train_help import GROUPS, RECIPES, TABLE, options_of_train, train_parser
from rlhf_reward.columns import column_verdicts
from rlhf_reward.rows import to_comparison
from rlhf_reward.synthetic import tiny_decoder

ROOT = Path(__file__).parents[1]
# The fewest arguments of each command that is not train.
LEAST = {
    "audit": ["rows.jsonl"],
    "evaluate": ["--model", "m", "--data", "rows.jsonl", "--output", "report"],
    "score": ["--model", "m", "--data", "rows.jsonl", "--output", "scored.jsonl"],
    "serve": ["--model", "m"],
    "verify": ["--model", "m", "--folder", "other"],
    "convert": ["theirs", "ours"],
    "average": ["one", "two", "--output", "mean"],
    "calibrate": ["--model", "m", "--data", "rows.jsonl", "--output", "calibrated"],
    "laplace": ["--model", "m", "--data", "rows.jsonl"],
    "env": [],
    "completion": ["bash"],
}
QUICK = ["--max_steps", "1", "--use_cpu", "--report_to", "none", "--eval_strategy", "no", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A folder with a tiny model to train, one to score with, and rows of every kind that the recipes read."
    folder = tmp_path_factory.mktemp("tiny")
    base = tiny_decoder(folder / "base", ["iron tin p lead"])
    RewardModel(base, device="cpu").save_pretrained(folder / "model", AutoTokenizer.from_pretrained(base))
    names = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
    rows = {"pairs": [], "ranked": [], "rated": []}
    for n in range(12):
        prompt = {"prompt": f"p {n} "}
        rows["pairs"].append({**prompt, "chosen": "iron" if n % 3 else 6 * "iron ", "rejected": 3 * "iron "})
        rows["ranked"].append({**prompt, "responses": ["iron", "tin", "lead"], "ranks": [1, 2, 3]})
        ratings = {name: [4, 1] for name in names}
        rows["rated"].append({**prompt, "responses": ["iron", "tin"], "ratings": ratings})
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return folder


def least(name):
    assert name in LEAST, f"{name} is a new command; expected its fewest arguments in LEAST."
    return LEAST[name]


def value_for(action):
    "A value for an option, as on the command line."
    if action.nargs == 0:
        return []
    return [str(action.choices[-1])] if action.choices else ["7"]


def test_every_option_of_every_command_has_both_spellings():
    count = 0
    for command in COMMANDS.keys() - {"train"}:
        parser = COMMANDS[command].parser()
        for name, action in options_by_name(parser).items():
            if name in GENERAL or action.dest in ("url", "tool"):
                continue
            argv = least(command)
            if name in parser.words:  # which are then given by name
                argv = [f"--{word}=x" for word in {*parser.words, "output"} & set(options_by_name(parser)) - {name}]
            found = []
            for spelled in (f"--{name}", f"--{name.replace('_', '-')}"):
                found.append(parser.parse_args([*argv, spelled, *value_for(action)]))
            assert found[0] == found[1] and getattr(found[0], action.dest) not in (None, False), (command, name)
            count += "_" in name
    assert count > 40


@pytest.mark.parametrize("command, argv, same", [
    ("score", ["--model=m", "--dataset", "a", "--output-dir=o"], ["--model", "m", "--data", "a", "--output", "o"]),
    ("audit", ["--data", "a", "b", "--json"], ["a", "b", "--json"]),
    ("audit", ["a", "--json", "true", "--find_flips=false", "b"], ["a", "b", "--json"]),
    ("audit", ["--dataset=a", "--against", "c", "--against", "d"], ["--against", "c", "--against=d", "a"]),
    ("convert", ["--output", "b", "a"], ["a", "b"]),
    ("convert", ["--model", "a", "--output_dir", "b"], ["a", "b"]),
    (
        "evaluate",
        ["--model", "m", "--model", "n", "--data", "a", "--dataset=b", "--output", "o"],
        ["--model", "m", "n", "--data", "a", "b", "--output", "o"],
    ),
])
def test_two_ways_to_give_the_same(command, argv, same):
    parser = COMMANDS[command].parser
    assert parser().parse_args(argv) == parser().parse_args(same)


def test_the_folder_of_the_user_is_written_as_in_a_shell(tmp_path, monkeypatch):
    "A shell leaves ~ as it is after = and in a file: an output was written into a folder of the name ~."
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = COMMANDS["score"].parser
    (tmp_path / "run.yaml").write_text("data: ~/d.jsonl\nmodel: ~/m\n")
    options = parser().parse_args(["--config=~/run.yaml", "--output=~/a/o.jsonl", "--columns", "prompt=~"])
    values = options.model, options.data, options.output, options.columns
    assert values == (f"{tmp_path}/m", f"{tmp_path}/d.jsonl", f"{tmp_path}/a/o.jsonl", "prompt=~")


@pytest.mark.parametrize("text, problem", [
    ("max-length: 1\nmax_length: 2", "has max_length more than once, as max_length too"),
    ("data: a\ndataset: b", "has data more than once, as dataset too"),
    ("normalize: 1", "normalize is 1 in"),
    ("print_config: true", "has print_config, which is for the command line alone"),
    ("config: other.yaml", "has config, which is for the command line alone"),
    ("max_length: 7\nmax_length: 8", "has max_length more than once"),  # of which the last one counted
    ("columns:\n- {a: 1, a: 2}", "has a more than once"),
    ("colums: a", "; did you mean 'columns'?"),
    ("dtype: int8", "argument --dtype: invalid choice: 'int8'"),
    ("- a", "contains a list; expected a mapping"),
])
def test_a_wrong_yaml_file_is_refused(text, problem, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main(["score", str(tmp_path / "run.yaml"), *least("score")])
    assert problem in capsys.readouterr().err
    for last in ("--config", "--config="):
        with pytest.raises(SystemExit):
            main(["score", *least("score"), last])
        assert "--config has no value; expected a YAML file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["score", "a.yaml", "--config", "b.yaml"])
    assert "there is more than one YAML file, a.yaml and --config" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "rows.jsonl")])
    assert "rows.jsonl' has rows; expected a YAML file of arguments." in capsys.readouterr().err


def test_train_takes_the_names_of_the_others(tmp_path):
    options = ["--use_cpu", "--max-length", "9", "--eval-data", "c"]
    job, args = parse_train(["--model", "m", "--data", "a", "--data", "b", "--output", str(tmp_path), *options])
    assert (job.dataset, job.eval_dataset) == (["a", "b"], "c")
    assert (args.output_dir, args.max_length) == (str(tmp_path), 9)
    (tmp_path / "run.yaml").write_text("data: [a, b]\nmax-length: 7\nuse_cpu: true\nmodel: m\n")
    job, args = parse_train(["--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path), "--dataset", "d"])
    assert (job.dataset, args.max_length) == ("d", 7)  # the command line wins, also over a list


@pytest.mark.parametrize("command, argv, message", [
    ("score", ["--model", "m", "--dta", "a"], "unknown argument '--dta' on the command line (a YAML file comes first)"),
    ("score", ["--datset", "a"], "did you mean 'dataset'?"),
    ("score", ["none"], "'none' does not exist; expected a YAML file of arguments, or arguments that begin with --."),
    ("score", [str(Path(__file__).parent)], "is a folder; expected a YAML file of arguments"),
    ("serve", ["--model", "m", "--max-bodi", "1"], "did you mean 'max_body'?"),
    ("evaluate", ["--benchmrk", "suite"], "did you mean 'benchmark'?"),
    ("audit", ["a", "--find-flip"], "did you mean 'find_flips'?"),
    ("audit", [], "FILE is missing; expected rlhf_reward audit FILE …."),
    ("train", ["--lr", "1e-5"], "did you mean 'learning_rate'?"),
    ("train", ["--device", "cpu"], "did you mean 'use_cpu'?"),
    ("train", ["--batch-size", "4"], "did you mean 'per_device_train_batch_size'?"),
    ("verify", ["--modle", "m"], "did you mean 'model'?"),
    ("convert", ["a", "b", "c"], "unknown argument 'c'"),
    ("convert", ["a", "--model", "b"], "model is given twice, as a and as --model b"),
    ("completion", ["fish"], "shell is 'fish'; expected one of bash, zsh, tcsh."),
    ("convert", ["a"], "OUT is missing; expected rlhf_reward convert FOLDER OUT."),
    ("completion", [], "SHELL is missing; expected rlhf_reward completion SHELL with one of bash, zsh, tcsh."),
    ("train", ["--out_dir", "x"], "did you mean 'output_dir'?"),
    ("train", ["none.yaml"], "one of the recipes attributes, full, head, kwise, lora, qlora"),
    ("train", ["heads"], "arguments that begin with --; did you mean 'head'?"),
    ("train", [str(RECIPES["full"].parent / "fsdp2.yaml")], "is for accelerate; expected arguments of the command"),
    ("train", ["fsdp2"], "configs/fsdp2.yaml -m rlhf_reward train …"),
    ("score", ["--normalize=yes"], "--normalize is 'yes'; expected true or false."),
    ("score", ["--max_length", "0"], "argument --max_length: it is 0; expected 1 or more."),
    ("serve", ["--model", "m", "--tokens_per_batch", "a"], "--tokens_per_batch: 'a' is no whole number; expected 1"),
    ("train", ["--per_device_eval_batch_size", "0"], "per_device_eval_batch_size is 0; expected 1 or more."),
    ("trian", [], "unknown command 'trian'; did you mean 'train'?"),
    ("--model", ["m", "train"], "'--model' comes before the command; expected one of audit, train,"),
])
def test_errors_name_what_was_meant(command, argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, *argv])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_a_tracker_without_a_login_ends_in_its_message():
    no_login = type("UsageError", (Exception,), {"__module__": "wandb.errors.errors"})
    with pytest.raises(SystemExit, match="^rlhf_reward train: No API key.* --report_to none"), exit_on_error("train"):
        raise no_login("No API key configured.")
    with pytest.raises(KeyError), exit_on_error("train"):
        raise KeyError("a fault of the library")


def printed_config(command, argv, path, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, *argv, "--print_config"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    path.write_text(text)
    return text


@pytest.mark.parametrize("command, argv", [
    ("audit", ["a.jsonl", "b, c.jsonl", "--against", "no", "--json", "--verdicts=-1=a,1=b", "--max_length", "7"]),
    ("evaluate", ["--model", "x=m", "n", "--benchmark", "suite", "--output", "on", "--columns", "prompt=é: #"]),
    ("score", ["--model", "1", "--data", "null", "--output", "~", "--normalize", "--ends_with_eos", "--form", "yes"]),
    ("serve", ["--model", "m", "--host", "0.0.0.0", "--port", "1", "--timeout", "0.25", "--allow_public"]),
    ("verify", ["--model", "m", "--with", "transformers", "--tolerance", "1e-7"]),
    ("convert", ["theirs", "ours", "--dtype", "bfloat16"]),
])
def test_printed_values_are_read_back(command, argv, tmp_path, capsys):
    "Each value, of any type, in a list, or that YAML would read as another type."
    path = tmp_path / "run.yaml"
    text = printed_config(command, argv, path, capsys)
    parser = COMMANDS[command].parser
    assert parser().parse_args([str(path)]) == parser().parse_args(argv)
    assert text.count("\n# ") > 5


def test_printed_values_of_train_are_read_back(tmp_path, capsys):
    "Also those of the recipe of the synthetic data, and of transformers alone; with a comment for each."
    out = ["--output_dir", str(tmp_path), "--use_cpu"]
    for argv in (
        ["--lr_scheduler_kwargs", '{"num_cycles": 2}', "--report_to", "none", "--adam_beta2", "0.95"],
        ["--model", "m", "--dataset", '{"name": "a", "share": 0.5}', '{"name": "b", "share": 0.5}'],
        ["--model", "m", "--dataset", "d", "--attributes", "on", "no", "--loss", "regression", "--seed", "9"],
    ):
        path = tmp_path / "run.yaml"
        text = printed_config("train", [*out, *argv], path, capsys)
        job, args = parse_train([*out, *argv])
        again, again_args = parse_train([str(path)])
        assert asdict(again) == asdict(job)
        assert again_args.to_dict() == args.to_dict()
        assert "skip_memory_metrics" not in text  # a default that is true
        assert "# ----- reward" in text and "# The initial learning rate of AdamW." in text


def test_a_token_is_not_printed(tmp_path, capsys):
    text = printed_config("serve", ["--model", "m", "--token", "secret"], tmp_path / "run.yaml", capsys)
    assert "secret" not in text and "# token:" in text


def test_without_required_values_a_template_is_printed(tmp_path, capsys):
    for command in COMMANDS:
        text = printed_config(command, [], tmp_path / "run.yaml", capsys)
        assert yaml.safe_load(text) is None or isinstance(yaml.safe_load(text), dict)


def test_help_is_short_and_whole(capsys, monkeypatch):
    "The groups of this library come first; --help-all has every option; alone the command prints its help."
    monkeypatch.setenv("COLUMNS", "98")
    for arguments in (["--help"], []):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        printed = capsys.readouterr().out
        assert exit.value.code == 0 and all(f"\n    {name}" in printed for name in COMMANDS)
    for command in COMMANDS:
        texts = []
        for spelled in ("--help", "-h", "--help-all", "--help_all"):
            with pytest.raises(SystemExit) as exit:
                main([command, "--unknown", spelled])
            assert exit.value.code == 0
            texts.append(capsys.readouterr().out)
        short, same, whole, same_whole = texts
        assert short == same and whole == same_whole
        parser = train_parser(is_whole=True) if command == "train" else COMMANDS[command].parser()
        for name in options_by_name(parser):
            assert f"--{name}" in whole, (command, name)
            assert (re.search(rf"--{name}\b", short) is None) == (name in parser.hidden), (command, name)
        assert len(short.splitlines()) < 80, command
        if command == "train": # lines may be broken elsewhere by another Python
            assert short.split() == output_on_page("09b_cli_train", "!rlhf_reward train --help").split()


def output_on_page(page, source):
    "Return what the cell with a command printed, when the page was made."
    cells = nbformat.read(ROOT / f"nbs/{page}.ipynb", as_version=4).cells
    (outputs,) = [cell.outputs for cell in cells if cell.source == source]
    return "".join(output.text for output in outputs)


def test_commands_that_read_rows_for_a_model_have_one_way_to_tell_what_they_mean(tmp_path):
    readers = ("calibrate", "laplace", "average", "score", "evaluate")
    texts = {name: set() for name in ("columns", "verdicts", "form", "on_bad_row")}
    for command in readers:
        parser = COMMANDS[command].parser()
        for name, found in texts.items():
            action = options_by_name(parser).get(name)
            if action is not None:
                text = action.help.replace(" in --data", "").replace("response=output", "chosen=output_1")
                found.add(text.rstrip(";"))
        assert parser.hidden <= {action.dest for action in options_by_name(parser).values()}
    assert {name: len(found) for name, found in texts.items()} == {
        "columns": 1,
        "verdicts": 1,
        "form": 2,  # score writes the rows of a known set as they are
        "on_bad_row": 2,  # and what it skips
    }
    row = {"question": "w3 ", "response_a": "w4", "response_b": "w5"}
    lines = [{**row, "preference": number} for number in (2, 3)] + [{**row, "response_a": None, "preference": 2}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    meaning = ["--columns", "prompt=question", "--verdicts", "2=a,3=b", "--on_bad_row", "skip"]
    for command, arguments in (
        ("evaluate", ["--model", "m", "--output", "o"]),
        ("laplace", ["--model", "m"]),
        ("average", ["--model", "m", "n", "--output", "o"]), # reads verdicts too
    ):
        parser = COMMANDS[command].parser()
        values = parser.parse_args([*arguments, "--data", str(file), *meaning])
        rows = read_data(values, str(file))
        assert [to_comparison(rows[number], column_verdicts(rows)).ranks for number in (0, 1)] == [(1, 2), (2, 1)]


def test_help_of_train_is_that_of_its_parser():
    "The list that help is read from is what the parser has: `python tools/options.py` writes it."
    table = json.loads(Path(str(TABLE)).read_text(encoding="utf-8"))
    assert table["options"] == options_of_train()
    names = {option["name"] for option in table["options"]}
    listed = " ".join(" ".join(parts) for parts in GROUPS.values()).split()
    assert len(listed) == len(set(listed)) and set(listed) <= names
    assert [*train_parser().groups()] == [*GROUPS, "others of transformers.TrainingArguments"]


STEPS = {"full": "pairs", "head": "pairs", "lora": "pairs", "kwise": "ranked", "attributes": "rated", "qlora": None}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe, tiny, tmp_path):
    "Each is parsed and makes one step, but for that in 4 bits, which needs a GPU."
    out = ["--output_dir", str(tmp_path / "out")]
    job, args = parse_train([recipe, *out])
    values = yaml.safe_load(Path(str(RECIPES[recipe])).read_text(encoding="utf-8"))
    assert {name for name in values if not hasattr(job, name) and not hasattr(args, name)} == set()
    assert args.output_dir == str(tmp_path / "out") and args.bf16
    data = STEPS[recipe]
    if recipe == "lora":
        pytest.importorskip("peft", reason="the extra peft is not installed")
    if data is not None:
        own = ["--model", str(tiny / "base"), "--dataset", str(tiny / f"{data}.jsonl"), "--max_length", "64"]
        own += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
        trainer = prepare_trainer(*parse_train([f"{recipe}.yaml", *out, *own, *QUICK]))
        assert trainer.train().global_step == 1


def test_recipes_of_the_folder_are_all_listed():
    shipped = {path.stem for path in (Path(rlhf_reward.__file__).parent / "configs").glob("*.yaml")}
    assert shipped == {*RECIPES, "fsdp2", "deepspeed_zero3"} and set(STEPS) == set(RECIPES)


def test_each_command_ends_with_the_next(tiny, tmp_path, capsys):
    "On stderr, once, as a command that its parser reads; stdout is as before. For train and evaluate: `test_cli.py`."
    rows = str(tiny / "pairs.jsonl")
    model = ["--model", str(tiny / "model")]
    commands = [
        (["audit", rows, "--json"], ["train", "--model", "MODEL", "--dataset", rows, "--output_dir", "OUT"]),
        (
            ["score", *model, "--device=cpu", "--dtype=float32", "--data", rows, f"--output={tmp_path}/out.jsonl"],
            ["serve", *model, "--dtype", "float32"],
        ),
    ]
    for argv, expected in commands:
        try:
            main(argv)
        except SystemExit as end:
            assert not end.code, argv
        printed = capsys.readouterr()
        (line,) = re.findall(r"^Next: rlhf_reward (.*)$", printed.err, flags=re.MULTILINE)
        assert shlex.split(line) == expected and "Next:" not in printed.out
        COMMANDS[expected[0]].parser().parse_args(expected[1:])
        if argv[0] == "audit":
            json.loads(printed.out)


@pytest.mark.parametrize("options, expected", [
    (["--dataset", "synthetic"], ["serve", "--model", "out"]),
    (["--dataset", "a b.jsonl"], ["evaluate", "--model", "out", "--data", "HELD_OUT.jsonl", "--output", "report"]),
    (["--dataset", "a", "--eval_dataset", "b", "c"], ["evaluate", "--model", "out", "--data", "HELD_OUT.jsonl"]),
    (
        ["--dataset", "org/a", "--eval_split", "dev", "--dataset_config", "c", "--verdicts=-1=a,1=b"],
        ["evaluate", "--model", "out", "--data", "org/a", "--split=dev", "--dataset_config=c", "--verdicts=-1=a,1=b"],
    ),
])
def test_after_training_the_held_out_data_are_evaluated(options, expected, tmp_path):
    "With the split, the configuration and the columns that training read them by."
    job, _ = parse_train(["--model", "m", "--use_cpu", "--output_dir", str(tmp_path), *options])
    words = next_words(job, "out")
    assert words[:len(expected)] == expected
    COMMANDS[words[0]].parser().parse_args(words[1:])


def test_env_names_what_a_bug_report_needs(capsys):
    main(["env"])
    printed = dict(line[2:].split(": ", 1) for line in capsys.readouterr().out.splitlines())
    names = {"rlhf_reward", "Python", "platform", "torch", "transformers", "datasets", "peft", "accelerate"}
    assert names <= set(printed)
    import torch

    assert printed["torch"] == torch.__version__ and (printed["GPUs"] == "none") != torch.cuda.is_available()


@pytest.mark.parametrize("typed, expected", [
    ("rlhf_reward tra", {"train"}),
    ("rlhf_reward score --dt", {"--dtype"}),
    ("rlhf_reward serve --dtype bfl", {"bfloat16"}),
    ("rlhf_reward train --per_device_train", {"--per_device_train_batch_size"}),
    ("rlhf_reward completion z", {"zsh"}),
])
def test_bash_completes(typed, expected, tmp_path, capsys):
    pytest.importorskip("shtab", reason="the extra completion is not installed")
    main(["completion", "bash"])
    words = typed.split(" ")
    script = tmp_path / "script.bash"
    quoted = " ".join(map(shlex.quote, words))
    script.write_text(
        capsys.readouterr().out
        + f"\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}\n"
        + 'COMPREPLY=(); $(complete -p rlhf_reward | sed "s/.*-F \\([^ ]*\\).*/\\1/")\n'
        + 'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=True)
    assert {word.strip() for word in done.stdout.splitlines()} - {""} == expected, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script(shell, capsys):
    pytest.importorskip("shtab", reason="the extra completion is not installed")
    main(["completion", shell])
    assert "per_device_train_batch_size" in capsys.readouterr().out


def test_the_page_lists_every_command_and_shared_option():
    "The tables on the page of the command line are those of the code."
    shown = ""
    for cell in nbformat.read(ROOT / "nbs/09_cli.ipynb", as_version=4).cells:
        for output in cell.get("outputs", ()):
            shown += output.get("data", {}).get("text/html", "")
    assert re.findall(r"<code>rlhf_reward (\w+)</code>", shown) == [*COMMANDS]
    counts = Counter()
    for command in COMMANDS.values():
        assert command.summary in shown
        counts.update(options_by_name(command.parser()).keys())
    for option, count in counts.items():
        assert count < 3 or f"<code>--{option}</code>" in shown, option
    assert all(f"<code>--{name}</code>" in shown for name in ("data", "dataset", "output", "output_dir"))


def test_layers_are_kept_of_a_new_model_only(tiny, tmp_path):
    "A number that would be ignored, or change what a trained head reads, is refused."
    def prepared(model, layers):
        words = ["--model", str(tiny / model), "--dataset", str(tiny / "pairs.jsonl"), "--num_hidden_layers", layers]
        return prepare_trainer(*parse_train([*words, "--output_dir", str(tmp_path), "--max_length", "64", *QUICK]))

    assert len(prepared("base", "1").model.backbone.layers) == 1
    for number in ("0", "9"):
        with pytest.raises(ValueError, match=f"--num_hidden_layers is {number}; expected 1 to 2, the layers of"):
            prepared("base", number)
    with pytest.raises(ValueError, match="is a reward model, whose head reads its last layer; expected no --num"):
        prepared("model", "1")
    with pytest.raises(ValueError, match="layers"): # weights of which are missing
        prepared("base", "9")


@pytest.mark.parametrize("command", ["score", "evaluate"])
def test_a_model_without_a_head_gets_the_remedy_of_its_caller(command, tiny, tmp_path):
    base = str(tiny / "base")
    with pytest.raises(SystemExit) as exited:
        main([command, "--model", base, "--data", str(tiny / "pairs.jsonl"), "--output", str(tmp_path / "to.jsonl")])
    assert f"rlhf_reward train --model {base} --dataset DATA" in str(exited.value)
    assert "RewardModel(" not in str(exited.value)
    with pytest.raises(ValueError, match=r"use RewardModel\(model_name\)\.$"):
        RewardModel.from_pretrained(base)


def test_evaluate_names_the_command_for_rows_without_labels(tiny, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "p", "response": "iron"}))
    arguments = ["--model", str(tiny / "model"), "--data", str(data), "--output", str(tmp_path / "report")]
    with pytest.raises(SystemExit, match="For rows without labels use rlhf_reward score."):
        main(["evaluate", *arguments])


def test_rows_that_cannot_be_scored_get_one_message(tiny, tmp_path, caplog):
    "The error names the columns; a warning about columns that are not read would repeat it."
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"question": "p", "answer": "iron"}))
    with pytest.raises(SystemExit, match="columns \\['answer', 'question'\\]"):
        main(["score", "--model", str(tiny / "model"), "--data", str(data), "--output", str(tmp_path / "scored.jsonl")])
    assert not [message for message in caplog.messages if "question" in message]
