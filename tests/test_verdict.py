"The verdict: one sentence about a model, the same in the terminal, the card and the report."

import json
import re

import numpy as np
import pandas as pd
import pytest

from rlhf_reward.comparison import Comparison
from rlhf_reward.evaluation import evaluate
from rlhf_reward.rule import Rule
from rlhf_reward.verdict import advantages, standing, verdict, verdict_figures, verdict_lines

ABOVE = (0.2, 0.15, 0.25)
LEVEL = (0.01, -0.03, 0.05)
BELOW = (-0.1, -0.15, -0.05)


def share(value, low, high):
    return {"value": value, "low": low, "high": high}


def made(over_length=ABOVE, over_no_prompt=ABOVE, rule="longer wins", prompts=200):
    return {
        "pairs": 300,
        "prompts": prompts,
        "accuracy_interval": share(0.782, 0.751, 0.81),
        "advantages": {
            "length_rule": rule,
            "over_length": share(*over_length),
            "over_no_prompt": over_no_prompt and share(*over_no_prompt),
        },
    }


ACCURACY = "accuracy 78.2 % (75.1 to 81.0)"
LONGER = '"longer wins"'
BLIND = "the model without the prompt"
SENTENCES = [
    (
        made(),
        "better",
        f"Better than length and than no prompt: {ACCURACY}, 20.0 points above {LONGER} (15.0 to 25.0), and 20.0 "
        f"points above {BLIND} (15.0 to 25.0).",
    ),
    (
        made(LEVEL),
        "not better",
        f"Not better than length, but better than no prompt: {ACCURACY}, 1.0 points above {LONGER} (3.0 below to 5.0 "
        f"above), and 20.0 points above {BLIND} (15.0 to 25.0).",
    ),
    (
        made(BELOW),
        "worse",
        f"Worse than length, but better than no prompt: {ACCURACY}, 10.0 points below {LONGER} (5.0 to 15.0), and 20.0 "
        f"points above {BLIND} (15.0 to 25.0).",
    ),
    (made(ABOVE, LEVEL), "not better", "Better than length, but not better than no prompt: "),
    (made(ABOVE, BELOW), "worse", "Better than length, but worse than no prompt: "),
    (made(LEVEL, LEVEL), "not better", "Not better than length or than no prompt: "),
    (made(BELOW, BELOW), "worse", "Worse than length and than no prompt: "),
    (made(BELOW, LEVEL), "worse", "Worse than length and not better than no prompt: "),
    (made(LEVEL, BELOW), "worse", "Not better than length and worse than no prompt: "),
    (
        made(ABOVE, None),
        "better",
        f"Better than length: {ACCURACY}, 20.0 points above {LONGER} (15.0 to 25.0); no prompt can be removed.",
    ),
    (
        made(prompts=9),
        "unknown",
        f"No verdict, 9 prompts are too few (expected 10 or more): {ACCURACY}, 20.0 points above {LONGER} (15.0 to "
        "25.0), ",
    ),
    (made(prompts=1), "unknown", "No verdict, 1 prompt is too few (expected 10 or more): "),
    (
        made(rule=None),
        "better",
        f"Better than chance and than no prompt: {ACCURACY}, 20.0 points above chance (15.0 to 25.0), as no "
        "responses differ in length, and ",
    ),
    (made(rule="shorter wins"), "better", f'Better than length and than no prompt: {ACCURACY}, 20.0 points'),
    ({"pairs": 0}, "unknown", "No verdict: no comparison has a better and a worse response."),
]


def test_each_case_has_its_sentence():
    for figures, word, sentence in SENTENCES:
        result = verdict(figures)
        assert result == sentence if sentence.endswith(".") else result.startswith(sentence), result
        assert result.endswith(".") and "-0.0" not in result
        assert standing(figures) == word, result
    assert '"shorter wins"' in verdict(made(rule="shorter wins"))


@pytest.mark.parametrize("difference, words", [
    ((0.05, -0.012, 0.11), "5.0 points above {} (1.2 below to 11.0 above)"),
    ((-0.05, -0.11, 0.012), "5.0 points below {} (11.0 below to 1.2 above)"),
    ((-0.05, -0.11, -0.012), "5.0 points below {} (1.2 to 11.0)"),
    ((0.05, 0.0, 0.11), "5.0 points above {} (0.0 to 11.0)"),
    ((-0.05, -0.11, 0.0), "5.0 points below {} (0.0 to 11.0)"),
    ((0.0, -0.0004, 0.0004), "as good as {} (0.0 below to 0.0 above)"),
    ((0.0, -0.02, 0.0), "as good as {} (2.0 below to 0.0 above)"),
    ((0.0, -0.02, 0.03), "as good as {} (2.0 below to 3.0 above)"),
])
def test_each_end_says_on_which_side_it_is(difference, words):
    assert words.format(LONGER) in verdict(made(difference))
    assert words.format(BLIND) in verdict(made(over_no_prompt=difference))


def test_the_sets_of_a_mixture_have_their_own():
    mixture = {**made(), "datasets": {"sums": made(BELOW), "chats": made()}}
    lines = verdict_lines(mixture)
    assert [name for name, _ in lines] == ["", "chats", "sums"]
    assert lines[0][1] == verdict(made()) and lines[2][1] == verdict(made(BELOW))
    assert len(verdict_lines({**made(), "datasets": {"sums": made()}})) == 1


def pairs_of(margins, longer_by, blind, prompts=None):
    count = len(margins)
    return pd.DataFrame({
        "prompt": np.arange(count) if prompts is None else prompts,
        "margin": np.array(margins, float),
        "longer_by": np.array(longer_by),
        "blind_margin": np.array(blind, float),
    })


def test_differences_are_of_the_same_pairs():
    "Right on 90 of 100; the longer one is chosen in 70; without the prompt right on 80, among them all that it gets."
    right = [1.0] * 90 + [-1.0] * 10
    longer = [2] * 70 + [-2] * 30
    blind = [1.0] * 80 + [-1.0] * 20
    result = advantages(pairs_of(right, longer, blind))
    assert result["length_rule"] == "longer wins"
    assert result["over_length"]["value"] == pytest.approx(0.2)
    assert result["over_no_prompt"]["value"] == pytest.approx(0.1)
    # on 10 pairs of 100 alone they differ: closer than two intervals of about ±0.08 and ±0.06 would tell
    assert 0.03 < result["over_no_prompt"]["low"] < result["over_no_prompt"]["high"] < 0.17
    shorter = advantages(pairs_of(right, [-amount for amount in longer], blind))
    assert shorter["length_rule"] == "shorter wins" and shorter["over_length"] == result["over_length"]
    level = advantages(pairs_of(right, [0] * 100, blind))
    assert level["length_rule"] is None and level["over_length"]["value"] == pytest.approx(0.4)
    some = blind[:40] + [float("nan")] * 60 # of the others no prompt can be removed
    assert advantages(pairs_of(right, longer, some))["over_no_prompt"]["value"] == 0
    assert advantages(pairs_of(right, longer, [float("nan")] * 100))["over_no_prompt"] is None
    together = advantages(pairs_of(right, longer, blind, [number // 10 for number in range(100)]))
    width, wider = (own["over_length"]["high"] - own["over_length"]["low"] for own in (result, together))
    assert wider > 1.5 * width # pairs to one prompt are not independent
    assert verdict_figures(pairs_of([], [], [])) is None


def test_a_rule_that_counts_letters_is_not_better_than_length():
    rows = [
        Comparison(f"prompt {number}", ("a longer one", "short") if number % 4 else ("brief", "a longer one"), (1, 2))
        for number in range(80)
    ]
    by_length = evaluate(Rule(lambda prompt, response: float(len(response))), rows).report
    assert by_length["accuracy"] == 0.75
    assert verdict(by_length).startswith("Not better than length or than no prompt: accuracy 75.0 % (")
    reads = Rule(lambda prompt, response: (len(response) if int(prompt[7:] or 0) % 4 else -len(response)))
    assert verdict(evaluate(reads, rows).report).startswith("Better than length and than no prompt: accuracy 100.0 % (")
    against = evaluate(Rule(lambda prompt, response: -float(len(response))), rows).report
    assert verdict(against).startswith("Worse than length and not better than no prompt: accuracy 25.0 % (")
    assert against["advantages"]["over_length"]["value"] == -0.5


QUICK = [
    *("--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--report_to", "none", "--use_cpu"),
    *("--save_strategy", "no", "--logging_steps", "1", "--learning_rate", "1e-3", "--max_steps", "2"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A model trained by the command, what it printed, and the folder of the data."
    from contextlib import redirect_stdout
    from io import StringIO

    from rlhf_reward.cli.train_command import train
    from rlhf_reward.synthetic import synthetic_texts, tiny_decoder

    folder = tmp_path_factory.mktemp("trained")
    row = '{"prompt": "I like birds %d. ", "chosen": "%s", "rejected": "owl %d"}\n'
    rows = [row % (number, "robin robin" if number % 3 else "", number) for number in range(60)]
    (folder / "train.jsonl").write_text("".join(rows[:30]))
    (folder / "eval.jsonl").write_text("".join(rows[30:]))
    base = tiny_decoder(folder / "base", synthetic_texts())
    argv = ["--model", str(base), "--dataset", str(folder / "train.jsonl"), *QUICK]
    printed = StringIO()
    with redirect_stdout(printed):
        metrics = train([*argv, "--eval_dataset", str(folder / "eval.jsonl"), "--output_dir", str(folder / "out")])
    return folder, argv, printed.getvalue(), metrics


def test_training_the_card_and_the_report_say_the_same(trained, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    from rlhf_reward.cli.evaluate_command import evaluate as evaluate_command

    folder, _, printed, metrics = trained
    lines = [line for line in printed.splitlines() if "than length" in line]
    assert len(lines) == 1
    assert f"accuracy {100 * metrics['eval_accuracy']:.1f} % (" in lines[0] and metrics["eval_pairs"] == 30
    card = (folder / "out/README.md").read_text()
    assert f"**{lines[0]}**" in card
    monkeypatch.chdir(folder)
    evaluate_command(
        ["--model", "out", "--data", "eval.jsonl", "--output", "report", "--device", "cpu", "--max_length", "1024"]
    )
    assert f"  out: {lines[0]}\n" in capsys.readouterr().out
    report = json.loads((folder / "report/report.json").read_text())
    assert report["data"]["eval.jsonl"]["models"]["out"]["verdict"] == lines[0]
    assert report["record"]["command"].startswith("rlhf_reward evaluate --model out --data eval.jsonl")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", report["record"]["date"])
    assert lines[0] in (folder / "report/report.md").read_text()
    page = (folder / "report/report.html").read_text()
    assert lines[0].replace('"', "&#34;") in page and report["record"]["date"] in page
    assert "README.md" in {path.name for path in (folder / "out").iterdir()}


def test_rows_that_were_held_out_are_found_again(trained, capsys):
    "The command splits tokenized comparisons; the verdict is on the rows that they were made of."
    from rlhf_reward.cli.train_command import train

    folder, argv, *_ = trained
    metrics = train([*argv, "--output_dir", str(folder / "held")])
    line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("No verdict")]
    assert metrics["eval_pairs"] == 3
    assert line.startswith(f"No verdict, 3 prompts are too few (expected 10 or more): accuracy ")
    assert f"accuracy {100 * metrics['eval_accuracy']:.1f} % (" in line and "the model without the prompt" in line
    assert "On `held out of" in (folder / "held/README.md").read_text()


def test_the_verdict_of_a_trainer(trained, tmp_path, monkeypatch):
    from contextlib import nullcontext
    from unittest.mock import Mock

    from datasets import Dataset

    from rlhf_reward import RewardConfig, RewardModel, RewardTrainer
    from rlhf_reward.checkpoint_files import open_tokenizer
    from rlhf_reward.held_out import rows_with_prompts

    folder, _, printed, metrics = trained
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    model = RewardModel.from_pretrained(folder / "out", device="cpu")
    args = RewardConfig(str(tmp_path), use_cpu=True, report_to="none")
    trainer = RewardTrainer(
        model,
        args,
        eval_dataset=Dataset.from_list(rows),
        processing_class=open_tokenizer(folder / "out"),
    )
    sentence = trainer.verdict()
    assert f"\n{sentence}\n" in printed
    with_prompt, = trainer.held_out
    assert set(with_prompt.baselines) == {"longer wins", "shorter wins", "the model without the prompt"}
    assert trainer.verdict(rows=trainer.eval_dataset, name="ids").endswith("; no prompt can be removed.")
    of_ids, = trainer.held_out # from the rewards that the trainer predicts: the same pairs, prompts and draws
    assert of_ids.figures["accuracy_interval"] == with_prompt.figures["accuracy_interval"]
    for name in ("length_rule", "over_length"):
        assert of_ids.figures["advantages"][name] == with_prompt.figures["advantages"][name]
    assert of_ids.baselines["longer wins"] == with_prompt.baselines["longer wins"]
    shown = []

    def record(disable=None, **options):
        shown.append(disable)
        return nullcontext(Mock())

    monkeypatch.setattr("rlhf_reward.engine.tqdm", record)
    trainer.verdict()
    args.disable_tqdm = True
    trainer.verdict()
    assert shown == [None, None, True, True] # with the prompts and without
    monkeypatch.undo()
    several = trainer.verdict({"one": Dataset.from_list(rows), "two": trainer.eval_dataset})
    assert several.splitlines()[0] == f"one: {sentence}" and several.splitlines()[1].startswith("two: ")
    trainer.is_fsdp_enabled = True # sharded weights cannot be called by one process alone
    trainer.eval_rows = rows_with_prompts(trainer.eval_rows, trainer.eval_dataset["prompt_key"]) # as the command
    assert trainer.verdict().endswith("; no prompt can be removed.")
    trainer.eval_rows = None
    with pytest.raises(ValueError, match="There is no evaluation set; expected rows, or a trainer with an eval"):
        trainer.verdict()
