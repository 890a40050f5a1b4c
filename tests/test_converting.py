"Reward models of other libraries become checkpoints that every tool opens, with the rewards of their own formula."
import copy
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from architectures import DECODERS, save_language_model, word_tokenizer
from programs import run
from rlhf_reward import RewardModel
from rlhf_reward.cli import main
from rlhf_reward.converting import convert
from rlhf_reward.reward import is_reward_model
from rlhf_reward.scoring import Scorer

IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
BIAS = 1.75
LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])


def change_json(path, **values):
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def change_weights(folder, **weights):
    file = folder / "model.safetensors"
    save_file({**load_file(file), **weights}, file, {"format": "pt"})


def language_model(folder, family="llama", size=32):
    "A language model with its tokenizer, and a head of one row for it."
    save_language_model(family, folder)
    word_tokenizer().save_pretrained(folder)
    torch.manual_seed(7)
    return Path(folder), torch.randn(1, size)


@torch.no_grad()
def by_hand(model, weight, bias=0.0):
    "The formula of all of them: the last hidden state, one row, a bias."
    last = model.eval()(IDS, output_hidden_states=True).hidden_states[-1][:, -1]
    return last @ weight[0] + bias


def llama_factory(folder, family="llama", size=32):
    model, weight = language_model(folder, family, size)
    head = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([BIAS])}
    save_file(head, model / "value_head.safetensors", {"format": "pt"})
    return by_hand(AutoModelForCausalLM.from_pretrained(model), weight, BIAS), BIAS


def llama_factory_lora(folder):
    base, weight = language_model(folder.with_name("base"))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(LORA))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    head = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([BIAS])}
    save_file(head, folder / "value_head.safetensors", {"format": "pt"})
    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return by_hand(fresh, weight, BIAS), BIAS


def trl(folder):
    "As the former AutoModelForCausalLMWithValueHead saved it."
    model, weight = language_model(folder)
    expected = by_hand(AutoModelForCausalLM.from_pretrained(model), weight, BIAS)
    change_weights(model, **{"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([BIAS])})
    return expected, BIAS


def openrlhf(folder, prefix="value_head", **values):
    model, weight = language_model(folder)
    expected = by_hand(AutoModelForCausalLM.from_pretrained(model), weight)
    weights = load_file(model / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("lm_head")}
    save_file({**weights, f"{prefix}.weight": weight}, model / "model.safetensors", {"format": "pt"})
    change_json(model / "config.json", architectures=["RewardModel"], **{"mean": 0.3, "std": 1.2, **values})
    return expected, 0.0


def token_classifier(folder):
    "One label for each token, as some save critics: transformers gives this head a bias."
    word_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = type(DECODERS["llama"]).from_dict({**DECODERS["llama"].to_dict(), "num_labels": 1})
    model = AutoModelForTokenClassification.from_config(config).eval()
    with torch.no_grad():
        model.score.weight.normal_()
        model.score.bias.fill_(BIAS)
        expected = model(IDS).logits[:, -1, 0]
    model.save_pretrained(folder)
    return expected, BIAS


def regression_head(folder):
    model, weight = language_model(folder)
    expected = by_hand(AutoModelForCausalLM.from_pretrained(model), weight)
    change_weights(model, **{"regression_head.weight": weight})
    return expected, 0.0


SAVED = {
    "llama-factory": llama_factory,
    "llama-factory gpt2": lambda folder: llama_factory(folder, "gpt2"),
    "llama-factory opt": lambda folder: llama_factory(folder, "opt", 16),
    "llama-factory granite": lambda folder: llama_factory(folder, "granite"),
    "llama-factory lora": llama_factory_lora,
    "trl": trl,
    "openrlhf": lambda folder: openrlhf(folder, value_head_prefix="value_head"),
    "openrlhf other name": lambda folder: openrlhf(folder, "my_head", value_head_prefix="my_head"),
    "openrlhf without a name": openrlhf,
    "token classifier": token_classifier,
    "regression head": regression_head,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", SAVED)
def test_rewards_are_those_of_the_original(kind, tmp_path):
    expected, bias = SAVED[kind](tmp_path / "model")
    done = convert(tmp_path / "model", tmp_path / "out")
    assert done.bias == bias and done.difference < 1e-4
    model = RewardModel.from_pretrained(tmp_path / "out", device="cpu")
    torch.testing.assert_close(model(IDS)[:, 0] + bias, expected, atol=1e-5, rtol=1e-5)
    facts = json.loads((tmp_path / "out/config.json").read_text())["rlhf_reward"]
    assert facts.get("left_out_bias", 0.0) == bias
    assert is_reward_model(tmp_path / "out") and not (tmp_path / "out.part").exists()
    if kind == "llama-factory granite": # transformers has no classifier
        assert done.difference_elsewhere is None
        return
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(classifier(IDS).logits[:, 0] + bias, expected, atol=1e-5, rtol=1e-5)
    assert done.difference_elsewhere < 1e-4


@pytest.mark.usefixtures("few_synthetic_rows")
@pytest.mark.parametrize("kind", [kind for kind in SAVED if "openrlhf" not in kind])
def test_opening_and_training_name_the_command(kind, tmp_path, capsys):
    "Before, training started from a new head in place of the trained one."
    SAVED[kind](tmp_path / "model")
    remedy = re.escape(f"rlhf_reward convert {tmp_path / 'model'} OUT")
    assert not is_reward_model(tmp_path / "model")
    for opener in (RewardModel.from_pretrained, Scorer.from_pretrained):
        with pytest.raises(ValueError, match=remedy):
            opener(tmp_path / "model", device="cpu")
    if kind not in ("llama-factory", "llama-factory lora"):  # a model and an adapter; `train` asks as the openers do
        return
    options = ["--dataset", "synthetic", "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    for adapter in ([], ["--lora_r", "2"]):
        with pytest.raises(SystemExit, match=remedy):
            main(["train", "--model", str(tmp_path / "model"), *options, *adapter])


# The scale of OpenRLHF


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["score", "value_head"])
@pytest.mark.parametrize("converted", [False, True])
def test_mean_and_standard_deviation_of_openrlhf_normalize(converted, prefix, tmp_path):
    expected, _ = openrlhf(tmp_path / "model", prefix)
    if converted:
        assert convert(tmp_path / "model", tmp_path / "out").has_scale
    model = RewardModel.from_pretrained(tmp_path / ("out" if converted else "model"), device="cpu")
    torch.testing.assert_close(model.normalize(model(IDS))[:, 0], (expected - 0.3) / 1.2, atol=1e-5, rtol=1e-5)


def test_a_model_without_the_scale_has_none(tmp_path):
    openrlhf(tmp_path / "model", mean=None, std=None)
    assert not convert(tmp_path / "model", tmp_path / "out").has_scale
    with pytest.raises(ValueError, match="does not know the mean"):
        RewardModel.from_pretrained(tmp_path / "out", device="cpu").normalize(torch.zeros(1, 1))


@torch.no_grad()
def test_a_bias_that_is_left_out_does_not_change_normalized_rewards(tmp_path):
    expected, _ = openrlhf(tmp_path / "model")
    change_weights(tmp_path / "model", **{"value_head.bias": torch.tensor([BIAS])})
    done = convert(tmp_path / "model", tmp_path / "out")
    model = RewardModel.from_pretrained(tmp_path / "out", device="cpu")
    assert done.bias == BIAS
    torch.testing.assert_close(model.normalize(model(IDS))[:, 0], (expected + BIAS - 0.3) / 1.2, atol=1e-5, rtol=1e-5)


def test_the_end_of_strings_is_recorded_as_given(tmp_path):
    llama_factory(tmp_path / "model")
    for given in (True, False):
        convert(tmp_path / "model", tmp_path / f"out {given}", ends_with_eos=given)
        assert RewardModel.from_pretrained(tmp_path / f"out {given}", device="cpu").ends_with_eos == given


def test_half_precision(tmp_path):
    expected, bias = llama_factory(tmp_path / "model")
    done = convert(tmp_path / "model", tmp_path / "out", dtype="bfloat16")
    assert 0 < done.difference < 0.1 or done.difference == 0
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


# Refused


def test_pickles_are_refused_with_the_command_that_rewrites_them(tmp_path, python):
    "DeepSpeed-Chat: the backbone under rwtransformer, the head without a bias. The command is run as it is printed."
    model, weight = language_model(tmp_path / "model")
    language = AutoModelForCausalLM.from_pretrained(model)
    expected = by_hand(language, weight)
    state = {f"rwtransformer.{name}": tensor for name, tensor in language.model.state_dict().items()}
    torch.save({**state, "v_head.weight": weight}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    message = "pytorch_model.bin, a pickle"
    for opener in (convert, lambda name, _: RewardModel(name, device="cpu")):
        with pytest.raises(ValueError, match=message) as refusal:
            opener(model, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        Scorer.from_pretrained(model, device="cpu")
    command = shlex.split(str(refusal.value).splitlines()[1])
    assert command[0] == "python"
    run(python, *command[1:])
    assert convert(model, tmp_path / "out").bias == 0.0
    with torch.no_grad():
        new = RewardModel.from_pretrained(tmp_path / "out", device="cpu")(IDS)[:, 0]
    torch.testing.assert_close(new, expected, atol=1e-5, rtol=1e-5)


def test_a_pickled_head_is_refused(tmp_path):
    llama_factory(tmp_path / "model")
    head = load_file(tmp_path / "model/value_head.safetensors")
    torch.save(head, tmp_path / "model/value_head.bin")
    os.remove(tmp_path / "model/value_head.safetensors")
    for opener in (convert, lambda name, _: Scorer.from_pretrained(name, device="cpu")):
        with pytest.raises(ValueError, match="value_head.bin, a pickle"):
            opener(tmp_path / "model", tmp_path / "out")


def two_layers(folder):
    model, weight = language_model(folder)
    change_weights(model, **{"v_head.weight": weight, "v_head.before.weight": torch.ones(32, 32)})


def two_heads(folder):
    trl(folder)
    change_weights(folder, **{"score.weight": torch.ones(1, 32)})


def narrow(folder):
    model, _ = language_model(folder)
    change_weights(model, **{"v_head.weight": torch.ones(1, 16)})


def not_finite(folder):
    model, _ = language_model(folder)
    change_weights(model, **{"v_head.weight": torch.full((1, 32), torch.nan)})


def encoder(folder):
    save_language_model("bert", folder)
    word_tokenizer().save_pretrained(folder)


def mean_over_the_response(folder):
    base = save_language_model("llama", folder / "base")
    RewardModel(str(base), device="cpu", pooling="mean").save_pretrained(folder, word_tokenizer())


REFUSED = {
    two_layers: "weights that are neither of its LlamaModel nor of the head v_head.weight: v_head.before.weight",
    two_heads: "has 2 heads of one row",
    narrow: r"has shape \(1, 16\); expected \(1, 32\)",
    not_finite: "infinite or not a number",
    encoder: r"is an encoder \(bert\); expected a decoder",
    language_model: "has no reward head that is known here",
    mean_over_the_response: "is a checkpoint of this library; expected one of another library, or an adapter to merge",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_is_not_one_linear_head_is_refused(make, tmp_path):
    make(tmp_path / "model")
    with pytest.raises(ValueError, match=REFUSED[make]):
        convert(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_adapter_of_this_library_is_merged(family, tmp_path):
    from rlhf_reward.adapters import add_adapter, lora_config

    base = save_language_model(family, tmp_path / "base")
    torch.manual_seed(0)
    model = add_adapter(RewardModel(str(base), device="cpu"), lora_config(2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.ends_with_eos = family == "bert"
    model.config.rlhf_reward = {**getattr(model.config, "rlhf_reward", {}), "reward_mean": 0.5, "reward_std": 2.0}
    model.save_pretrained(tmp_path / "adapter", word_tokenizer())
    done = convert(tmp_path / "adapter", tmp_path / "out")
    assert done.has_scale and done.ends_with_eos == (family == "bert") and done.difference < 1e-4
    merged = RewardModel.from_pretrained(tmp_path / "out", device="cpu")
    assert not hasattr(merged.backbone, "peft_config") and merged.ends_with_eos == (family == "bert")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model.eval()(ids)
        torch.testing.assert_close(merged(ids), expected, atol=1e-5, rtol=1e-4)
        assert (RewardModel(str(base), device="cpu")(ids) - expected).abs() > 1e-3  # the adapter matters
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(classifier(ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_nothing_is_written_over(tmp_path):
    llama_factory(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(FileExistsError, match="expected the name of a new folder"):
        convert(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    (tmp_path / "other.part").mkdir() # of a run that was killed, or that is writing
    (tmp_path / "other.part/file").touch()
    with pytest.raises(FileExistsError, match="other.part' exists, which a run is writing now or has left"):
        convert(tmp_path / "model", tmp_path / "other")
    assert (tmp_path / "other.part/file").exists()


def test_nothing_is_written_if_the_rewards_differ(tmp_path, monkeypatch):
    llama_factory(tmp_path / "model")
    save = RewardModel.save_pretrained

    def save_another(model, *args):
        with torch.no_grad():
            model.score.weight.add_(0.01)
        save(model, *args)

    monkeypatch.setattr(RewardModel, "save_pretrained", save_another)
    with pytest.raises(ValueError, match="differ from the original formula by .* Nothing was written"):
        convert(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


def test_the_command(tmp_path, capsys):
    _, bias = llama_factory_lora(tmp_path / "model")
    main(["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--ends_with_eos"])
    shown, following = capsys.readouterr()
    assert f"Next: rlhf_reward evaluate --model {tmp_path / 'out'} --data HELD_OUT.jsonl --output report\n" in following
    assert "v_head.summary.weight in value_head.safetensors" in shown and f"{bias}, left out" in shown
    assert "with AutoModelForSequenceClassification" in shown and f"Checkpoint:  {tmp_path / 'out'}" in shown
    assert RewardModel.from_pretrained(tmp_path / "out", device="cpu").ends_with_eos
    with pytest.raises(SystemExit, match="rlhf_reward convert: .* exists"):
        main(["convert", str(tmp_path / "model"), str(tmp_path / "out")])


def test_a_model_of_this_library_keeps_how_its_strings_end(tmp_path):
    from rlhf_reward import RewardModel, Scorer
    from rlhf_reward.converting import convert
    from rlhf_reward.synthetic import synthetic_texts, tiny_decoder
    from transformers import AutoTokenizer

    base = tiny_decoder(tmp_path / "base", synthetic_texts())
    model = RewardModel(base, 0.0, "cpu")
    model.ends_with_eos = True
    model.save_pretrained(tmp_path / "own", AutoTokenizer.from_pretrained(base))
    assert convert(tmp_path / "own", tmp_path / "converted").ends_with_eos
    own, converted = (Scorer(tmp_path / name).score("Ada likes birds.", " robin") for name in ("own", "converted"))
    assert own == pytest.approx(converted, abs=1e-5)
