"The model card: a hub reads its header, its numbers have baselines and intervals, and its code runs."

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from rlhf_reward import RewardConfig, RewardModel
from rlhf_reward.card import draw_curves, model_card, write_reward_scale
from rlhf_reward.card_header import base_facts, card_data, eval_results, hardware, show_time, software
from rlhf_reward.card_notes import add_to_card, form_notes
from rlhf_reward.held_out import HeldOut
from rlhf_reward.verdict import verdict_lines

SHARE = {"value": 0.7349, "low": 0.7012, "high": 0.7655}
FIGURES = {
    "pairs": 800,
    "prompts": 400,
    "accuracy_interval": SHARE,
    "advantages": {
        "length_rule": "longer wins",
        "over_length": {"value": 0.1, "low": 0.05, "high": 0.15},
        "over_no_prompt": None,
    },
}
HELD_OUT = HeldOut("pairs.jsonl", FIGURES, {"longer wins": {"value": 0.6349, "low": 0.6, "high": 0.67}}, [])
HELD_OUT.lines = verdict_lines(FIGURES)
LOG = [
    {"step": 1, "loss": 0.7, "accuracy": 0.5},
    {"step": 2, "loss": 0.6, "accuracy": 0.6},
    {"step": 2, "eval_loss": 0.65, "eval_accuracy": 0.7349},
    {"step": 2, "train_runtime": 5000.0},
]


def written(tmp_path, log=LOG, name="my-reward", base=None, **options):
    model = SimpleNamespace(config=SimpleNamespace(name_or_path=base))
    args = RewardConfig(str(tmp_path), use_cpu=True, report_to="none", hub_model_id=options.pop("hub", None))
    return model_card(model, args, log, name, **options)


def test_a_hub_reads_the_header(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\nlanguage: [en, de]\nbase_model: a/b\n---\n"
    )
    card = written(tmp_path, base=str(tmp_path / "base"), dataset="org/preferences", held_out=(HELD_OUT,))
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.content == card
    data = loaded.data
    assert (data.license, data.license_name, data.license_link) == ("other", "llama3", "LICENSE")
    assert data.language == ["en", "de"]
    assert data.datasets == ["org/preferences"] and data.pipeline_tag == "text-classification"
    assert data.base_model is None # a folder is no name on a hub
    result, = data.eval_results
    assert (data.model_name, result.dataset_name, result.metric_type) == ("my-reward", "pairs.jsonl", "accuracy")
    assert result.metric_value == 0.7349
    for line in (
        f"**{HELD_OUT.lines[0][1]}**",
        "On `pairs.jsonl`, 800 pairs to 400 prompts:",
        "| this model | 73.5 | 70.1 to 76.5 |",
        "| longer wins | 63.5 | 60.0 to 67.0 |",
        "| time | 83 min |",
        "| device | CPU |",
        "| torch | ",
    ):
        assert line in card, line


def test_what_is_not_known_is_left_out(tmp_path):
    card = written(tmp_path, [], base="no/model-of-this-name")
    header = yaml.safe_load(card.split("---")[1])
    assert set(header) == {"base_model", "library_name", "pipeline_tag", "tags"}
    assert "| time |" not in card and "Curves" not in card and "## Evaluation" not in card
    for name, text in (("none", None), ("broken", "---\n[: \n---\n"), ("plain", "# A model"), ("empty", "---\n---\n")):
        folder = tmp_path / name
        folder.mkdir()
        if text is not None:
            (folder / "README.md").write_text(text)
        assert base_facts(str(folder)) == {}, name
    assert base_facts(None) == base_facts("not a name, at all?") == {}
    without = written(tmp_path, LOG[:3]) # no verdict: the accuracy of the last evaluation
    assert yaml.safe_load(without.split("---")[1])["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.7349
    empty = HeldOut("ratings", {"pairs": 0}, {}, verdict_lines({"pairs": 0}))
    assert eval_results((empty,), 0.5) == [] and "No verdict" in written(tmp_path, held_out=(empty,))


def test_what_a_model_is_more_than_one_head_on_the_last_token(tmp_path):
    notes = {
        "attributes": {"attribute_weights": {"help|ful": 0.65, "verbosity": -0.4}},
        "heads": {"heads": 8},
        "pooling": {"pooling": "attention"},
        "none": {"heads": 1, "pooling": "last", "attribute_weights": {}},
    }
    sentences = {}
    for name, facts in notes.items():
        model = SimpleNamespace(config=SimpleNamespace(name_or_path=None), **facts)
        args = RewardConfig(str(tmp_path), use_cpu=True, report_to="none")
        card = model_card(model, args, LOG, "my-reward")
        sentences[name] = form_notes(model)
        assert all(f"\n\n{sentence}\n\n" in card for sentence in sentences[name])
    assert {name: len(found) for name, found in sentences.items()} == {
        "attributes": 1, "heads": 1, "pooling": 1, "none": 0
    }
    assert "weights `help\\|ful` 0.65, `verbosity` -0.4." in sentences["attributes"][0]
    assert "mean of 8 linear heads" in sentences["heads"][0]
    assert "no other tool opens" in sentences["pooling"][0] and "attention" in sentences["pooling"][0]


def test_a_section_of_a_card_is_written_once(tmp_path):
    add_to_card(tmp_path, "Uncertainty", "no card") # there is none, and none is made
    assert list(tmp_path.iterdir()) == []
    page = "---\ntags: [a]\n---\n\n# Größe\n\n## Uncertainty of others\n\ntext\n"
    file = tmp_path / "README.md"
    file.write_text(page, encoding="utf-8")
    for text in (r"first \1", "second", "second"):
        add_to_card(tmp_path, "Uncertainty", text)
        add_to_card(tmp_path, "Length calibration", text)
        assert file.read_text(encoding="utf-8") == (
            f"{page}\n## Uncertainty\n\n{text}\n\n## Length calibration\n\n{text}\n"
        )
    file.write_text(file.read_text(encoding="utf-8") + "\nMy own words.\n", encoding="utf-8")
    add_to_card(tmp_path, "Length calibration", "third")
    assert file.read_text(encoding="utf-8").endswith("## Length calibration\n\nthird\n\nMy own words.\n")


def test_curves_have_more_than_one_point(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    assert not draw_curves(LOG[:1], tmp_path / "one.png") and not (tmp_path / "one.png").exists()
    assert draw_curves(LOG, tmp_path / "two.png")
    assert "| step | loss | accuracy |" in written(tmp_path)
    assert "Curves" not in written(tmp_path, LOG[:1])


def test_versions_and_times():
    versions = dict(software(("torch", "no-such-package")))
    assert set(versions) == {"Python", "torch"}
    times = [show_time(seconds) for seconds in (4.4, 99, 100, 5900, 6000, 90000)]
    assert times == ["4 s", "99 s", "2 min", "98 min", "1 h 40 min", "25 h 0 min"]
    args = SimpleNamespace(device=SimpleNamespace(type="cpu"), world_size=4, n_gpu=0, bf16=True, fp16=False)
    assert hardware(args, []) == [("device", "4 × CPU"), ("mixed precision", "bf16")]


def test_names_of_any_kind_in_the_header():
    for name in ("a: b", "---", "x\n---\ny", "'\"", "{}", "#", "Größe", "- a"):
        data = card_data(None, [name], [name], name, eval_results((), 0.5))
        assert yaml.safe_load(data.to_yaml())["model-index"][0]["name"] == name
        text = f"---\n{data.to_yaml().strip()}\n---\n\n# A model\n"
        assert ModelCard(text).data.datasets == [name], name


def code_of(card):
    return re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)


def test_the_code_ranks_two_responses(tmp_path, monkeypatch):
    from rlhf_reward.checkpoint_files import open_tokenizer
    from rlhf_reward.synthetic import synthetic_texts, tiny_decoder

    base = tiny_decoder(tmp_path / "base", synthetic_texts())
    RewardModel(base, 0.0, "cpu").save_pretrained(tmp_path / "my-reward", open_tokenizer(base))
    monkeypatch.chdir(tmp_path)
    printed = StringIO()
    with redirect_stdout(printed):
        exec(code_of(written(tmp_path)), {})
    rewards = [float(line.split()[0]) for line in printed.getvalue().splitlines()]
    assert len(rewards) == 2 and rewards[0] >= rewards[1]
    assert 'from_pretrained("me/model")\n' in code_of(written(tmp_path, hub="me/model"))
    assert 'from_pretrained("my-reward") # the folder of this page\n' in code_of(written(tmp_path))
    chat = code_of(written(tmp_path, held_out=(HeldOut("chats", FIGURES, {}, HELD_OUT.lines, is_chat=True),)))
    assert 'prompt = [{"role": "user", "content": "How do I boil an egg?"}]' in chat
    compile(code_of(written(tmp_path, name='a "quoted"\nname')), "card", "exec")
    assert "Ada likes birds" in code_of(written(tmp_path, dataset="synthetic")) # the words that it knows


def test_a_scale_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", "rlhf_reward": {"pooling": "last"}}))
    before = file.read_text()
    write_text = Path.write_text

    def killed(path, text, **options):
        write_text(path, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", killed)
        write_reward_scale(file, {"reward_mean": 0.5})
    assert file.read_text() == before
    write_reward_scale(file, {"reward_mean": 0.5})
    scale = {"pooling": "last", "reward_mean": 0.5}
    expected = json.dumps({"model_type": "llama", "rlhf_reward": scale}, indent=2, sort_keys=True)
    assert file.read_text() == expected + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_model_that_is_evaluated_twice_has_one_line_in_the_curves(tmp_path):
    again = {**LOG[2], "eval_runtime": 2.0}
    assert written(tmp_path, [*LOG, again]) == written(tmp_path, LOG)
    other = {**LOG[2], "eval_accuracy": 0.5}
    assert written(tmp_path, [*LOG, other]).count("\n| 2 | ") == 2


def test_the_curves_of_a_long_run_have_its_evaluations_and_its_end(tmp_path):
    "Every second log was left out, which were all evaluations where each step had one; and the last step, too."
    log = []
    for step in range(1, 101):
        log.append({"step": step, "loss": 1 / step})
        if step % (1 if step > 80 else 40) == 0:
            log.append({"step": step, "eval_loss": 2 / step, "eval_accuracy": 0.5})
    lines = written(tmp_path, log).split("| step | loss | eval_loss | eval_accuracy |\n")[1].splitlines()[1:]
    steps = [int(line.split("|")[1]) for line in lines]
    assert len(steps) <= 20 and (steps[0], steps[-1]) == (1, 100) and steps == sorted(set(steps)) and 40 in steps
    assert lines[-1] == "| 100 | 0.01 | 0.02 | 0.5 |" and sum(line.endswith("| 0.5 |") for line in lines) >= 10
    assert "Curves" not in written(tmp_path, [log[0], {"step": 1, "eval_loss": 1.0}])


def test_a_local_base_model_is_named_without_its_path(tmp_path):
    (tmp_path / "private/base").mkdir(parents=True)
    card = written(tmp_path, base=str(tmp_path / "private/base"))
    assert "A reward model on the local model `base`: one number" in card and "private" not in card
