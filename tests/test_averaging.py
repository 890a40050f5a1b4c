"The average of reward models is the mean of their weights on one scale of rewards, and what differs is refused."
import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from architectures import CHAT_TEMPLATE, save_language_model, word_tokenizer
from rlhf_reward import RewardModel, averaging
from rlhf_reward.adapter_averaging import averaged_factor, check_linear
from rlhf_reward.adapter_ensemble import AdapterEnsemble
from rlhf_reward.adapters import add_adapter, merge_adapter
from rlhf_reward.averaging import average_checkpoints
from rlhf_reward.cli import main
from rlhf_reward.converting import convert
from rlhf_reward.laplace import fit_laplace
from rlhf_reward.reward import is_reward_model
from rlhf_reward.rl import RewardFunction
from rlhf_reward.scoring import Scorer
from rlhf_reward.synthetic import synthetic_texts, tiny_decoder
from tiny import tiny_trainer

IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
ROWS = [{"prompt": f"w{i} w{i + 1} ", "chosen": f"w{i + 7}", "rejected": f"w{i + 9} w{i + 2}"} for i in range(4, 24)]
OVER = {"data": "held out", "responses": 40}


def varied(model, seed, size=0.02):
    "Move all weights a little, as training from one base does."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def save_part(base, folder, seed, dtype=torch.float32, std=None, facts=None, tokenizer=None, **options):
    torch.manual_seed(0)
    model = varied(RewardModel(base, 0.0, "cpu", dtype=dtype, **options), seed)
    scale = {} if std is None else {"reward_mean": 0.5, "reward_std": std, "reward_over": OVER}
    model.config.rlhf_reward = {**getattr(model.config, "rlhf_reward", {}), **scale, **(facts or {})}
    model.save_pretrained(folder, tokenizer or word_tokenizer())
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_language_model("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def parts(base, tmp_path_factory):
    "Three models with a recorded scale, the second with twice the standard deviation of the others."
    folder = tmp_path_factory.mktemp("parts")
    return [save_part(base, folder / f"{seed}", seed, std=std) for seed, std in ((1, 1.0), (2, 2.0), (3, 1.0))]


def weights(folder):
    result = {}
    for file in Path(folder).glob("*.safetensors"):
        result.update(load_file(file))
    return result


def change_json(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def rewards(folder):
    return RewardModel.from_pretrained(folder, device="cpu")(IDS).detach()


# ----- the mean


def test_weights_are_the_mean_in_float32_and_heads_are_on_one_scale(base, parts, tmp_path):
    half = save_part(base, tmp_path / "half", 4, torch.bfloat16, std=1.0)
    for number, (models, factors, align) in enumerate((
        (parts[:2], (1.5, 0.75), True),
        (parts, (4 / 3, 2 / 3, 4 / 3), True),
        (parts, (1.0, 1.0, 1.0), False),
        ([half, parts[0]], (1.0, 1.0), True),
        ([parts[0], half], (1.0, 1.0), True),
    )):
        average = average_checkpoints(models, tmp_path / f"{number}", align=align)
        result = weights(tmp_path / f"{number}")
        of_parts = [weights(model) for model in models]
        assert result.keys() == of_parts[0].keys() and len(result) > 20
        assert_close([part.factor for part in average.parts], list(factors))
        for name, weight in result.items():
            scales = factors if name == "score.weight" else [1.0] * len(models)
            expected = sum(part[name].double() * scale for part, scale in zip(of_parts, scales)) / len(models)
            assert weight.dtype == of_parts[0][name].dtype
            tolerance = 1e-2 if weight.dtype == torch.bfloat16 else 1e-6
            assert_close(weight.double(), expected, rtol=tolerance, atol=tolerance * 0.1)
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"{number}").eval()
        if number < 3:
            assert_close(rewards(tmp_path / f"{number}"), classifier(IDS).logits.detach(), rtol=1e-5, atol=1e-5)


def test_equal_parts_stay_as_they_are_bit_for_bit(base, parts, tmp_path):
    half = save_part(base, tmp_path / "bf16", 4, torch.bfloat16, std=0.3)
    for part in (parts[1], half):
        copies = [shutil.copytree(part, tmp_path / f"{Path(part).name}-{index}") for index in range(3)]
        average_checkpoints([part, *copies], tmp_path / f"mean-{Path(part).name}")
        result, expected = weights(tmp_path / f"mean-{Path(part).name}"), weights(part)
        assert [name for name in expected if not torch.equal(result[name], expected[name])] == []


def test_shards_are_read_and_written_and_no_model_is_in_memory(base, parts, tmp_path, monkeypatch):
    sharded = tmp_path / "sharded"
    shutil.copytree(parts[0], sharded)
    model = AutoModelForSequenceClassification.from_pretrained(parts[0])
    (sharded / "model.safetensors").unlink()
    model.save_pretrained(sharded, max_shard_size="20KB")
    change_json(sharded / "config.json", **json.loads(Path(parts[0], "config.json").read_text()))
    alive, most = weakref.WeakSet(), []

    class Counted:
        def __init__(self, file):
            self.file = file

        def get_tensor(self, name):
            tensor = self.file.get_tensor(name)
            alive.add(tensor)
            most.append(len(alive))
            return tensor

    open_weights = averaging.open_weights
    monkeypatch.setattr(averaging, "open_weights", lambda path: Counted(open_weights(path)))
    average_checkpoints([str(sharded), *parts[1:]], tmp_path / "mean")
    average_checkpoints(parts, tmp_path / "whole")
    assert max(most) <= 3 # one that is read, one that is added, the first one
    assert len(list((tmp_path / "mean").glob("model-*-of-*.safetensors"))) > 1
    result, expected = weights(tmp_path / "mean"), weights(tmp_path / "whole")
    assert [name for name in expected if not torch.equal(result[name], expected[name])] == []
    assert_close(rewards(tmp_path / "mean"), rewards(tmp_path / "whole"))


def test_other_families_attributes_and_encoders_are_averaged(tmp_path):
    names = ["helpful", "brief"]
    for family, options in (("gpt2", {}), ("qwen3", {"attributes": names}), ("roberta", {})):
        base = save_language_model(family, tmp_path / family)
        models = [save_part(base, tmp_path / f"{family}{seed}", seed, std=float(seed), **options) for seed in (1, 2)]
        average = average_checkpoints(models, tmp_path / f"{family}-mean")
        opened = [RewardModel.from_pretrained(model, device="cpu") for model in models]
        has_attributes = bool(options)
        assert [part.factor for part in average.parts] == ([1.0, 1.0] if has_attributes else [1.5, 0.75])
        states = [model.state_dict() for model in opened]
        for state, part in zip(states, average.parts):
            state["score.weight"] = state["score.weight"] * part.factor
        opened[0].load_state_dict({name: (states[0][name] + states[1][name]) / 2 for name in states[0]})
        result = RewardModel.from_pretrained(tmp_path / f"{family}-mean", device="cpu")
        assert result.attributes == tuple(options.get("attributes", ())) and result.pooling == opened[0].pooling
        assert_close(result(IDS), opened[0](IDS), rtol=1e-5, atol=1e-6)


def test_the_query_of_pooling_by_attention_is_averaged_and_not_scaled(base, tmp_path):
    models = [save_part(base, tmp_path / f"{seed}", seed, std=float(seed), pooling="attention") for seed in (1, 2)]
    average_checkpoints(models, tmp_path / "mean")
    first, second, mean = (RewardModel.from_pretrained(path, device="cpu") for path in (*models, tmp_path / "mean"))
    query = (first.response_pooling.query + second.response_pooling.query) / 2
    assert query.abs().max() > 0
    assert_close(mean.response_pooling.query, query)
    card = (tmp_path / "mean/README.md").read_text()
    assert "Pooling: the head reads" in card and 'Scorer.from_pretrained("mean")' in card
    assert_close(mean.score.weight, (first.score.weight * 1.5 + second.score.weight * 0.75) / 2)


def test_a_classifier_made_elsewhere_and_a_learned_offset_are_averaged(base, parts, tmp_path):
    elsewhere = []
    for part in parts[:2]:
        folder = shutil.copytree(part, tmp_path / f"elsewhere-{Path(part).name}")
        config = json.loads((folder / "config.json").read_text())
        del config["rlhf_reward"]
        (folder / "config.json").write_text(json.dumps(config))
        elsewhere.append(str(folder))
    average_checkpoints(elsewhere, tmp_path / "mean", align=False)
    average_checkpoints(parts[:2], tmp_path / "ours", align=False)
    assert_close(rewards(tmp_path / "mean"), rewards(tmp_path / "ours"))
    assert RewardModel.from_pretrained(tmp_path / "mean", device="cpu").ends_with_eos is False
    for folder, offset in zip(map(Path, elsewhere), (1.0, 3.0)):
        (folder / "loss.json").write_text(json.dumps({"loss": "binary", "offset": offset}))
    average_checkpoints(elsewhere, tmp_path / "offset", align=False)
    assert Scorer.from_pretrained(tmp_path / "offset", "cpu").offset == 2.0
    (tmp_path / "elsewhere-1" / "loss.json").unlink()
    with pytest.raises(ValueError, match="no offset of the loss binary.*same loss"):
        average_checkpoints(elsewhere, tmp_path / "one", align=False)


def test_models_of_different_bases_are_warned_about(base, parts, tmp_path, caplog):
    average_checkpoints(parts, tmp_path / "close")
    assert not caplog.records
    other = {name: torch.randn_like(weight) for name, weight in weights(parts[1]).items()}
    shutil.copytree(parts[1], tmp_path / "other")
    save_file(other, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    average_checkpoints([parts[0], str(tmp_path / "other")], tmp_path / "far")
    assert "may not have been trained from one base" in caplog.text


# ----- scales and figures


def test_data_measures_the_scale_the_parts_and_the_average(parts, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    mean = str(tmp_path / "mean")
    main(["average", *parts[:2], "--output", mean, "--data", str(data), "--device", "cpu", "--on_bad_row", "skip"])
    printed, errors = capsys.readouterr()
    following = f"evaluate --model {mean} --data {data} --on_bad_row skip --output report"
    assert f"Next: rlhf_reward {following}\n" in errors
    header, *lines = [re.split("  +", line) for line in printed.splitlines()]
    assert header[0] == "model" and [line[0] for line in lines] == [*parts[:2], mean]
    card = (tmp_path / "mean" / "README.md").read_text()
    stds = []
    prompts, chosen, rejected = zip(*(row.values() for row in ROWS))
    for folder, _, std, accuracy in lines:
        scorer = Scorer.from_pretrained(folder, "cpu")
        values = torch.tensor([scorer.score(prompts, chosen), scorer.score(prompts, rejected)])
        assert float(std) == pytest.approx(values.std(unbiased=False).item(), rel=1e-3)
        assert accuracy.startswith(f"{(values[0] > values[1]).float().mean():.4f} (")
        assert folder == mean or folder in card
        assert f"{std} | {accuracy}" in card
        stds.append(float(std))
    factors = [float(line[1]) for line in lines[:2]]
    assert factors == pytest.approx([sum(stds[:2]) / 2 / std for std in stds[:2]], rel=1e-3)
    facts = json.loads((tmp_path / "mean" / "config.json").read_text())["rlhf_reward"]
    assert facts["reward_over"] == {"data": str(data), "responses": 40}
    assert [part["model"] for part in facts["averaged"]] == parts[:2]
    assert [part["head_scaled_by"] for part in facts["averaged"]] == pytest.approx(factors, rel=1e-3)
    normalized = torch.tensor(scorer.score(prompts, chosen, normalize=True))
    assert_close(normalized, (values[0] - values.mean()) / values.std(unbiased=False), rtol=1e-3, atol=1e-4)
    with pytest.raises(SystemExit, match="rlhf_reward average: .*exists; expected the name of a new folder"):
        main(["average", *parts, "--output", mean])


def test_checkpoints_of_one_run_are_averaged(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = tiny_decoder(tmp_path / "base", synthetic_texts(), **small)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    tiny_trainer(base, tmp_path / "run", options).train()
    checkpoints = [str(tmp_path / f"run/checkpoint-{step}") for step in (1, 2)]
    main(["average", *checkpoints, "--output", str(tmp_path / "mean"), "--unaligned"])
    first, second = map(weights, checkpoints)
    averaged = weights(tmp_path / "mean")
    for name, value in averaged.items():
        assert_close(value, (first[name] + second[name]) / 2)
    assert not torch.equal(averaged["score.weight"], first["score.weight"])


def test_without_data_the_scale_of_the_average_is_not_known(parts, tmp_path):
    average_checkpoints(parts, tmp_path / "mean")
    with pytest.raises(ValueError, match="does not know the mean"):
        Scorer.from_pretrained(tmp_path / "mean", "cpu").score(["w4 "], ["w5"], normalize=True)


def test_scales_that_are_missing_or_of_other_data_are_refused(base, parts, tmp_path):
    other = {"reward_over": {"data": "other", "responses": 40}}
    for number, (part, message) in enumerate((
        (save_part(base, tmp_path / "none", 4), "records no standard deviation"),
        (save_part(base, tmp_path / "zero", 4, std=0.0), "records the standard deviation 0.0"),
        (save_part(base, tmp_path / "over", 4, std=1.0, facts=other), "40 responses of 'other'.* 40 .* of 'held out'"),
    )):
        with pytest.raises(ValueError, match=f"{message}.*expected.*--data.*--unaligned"):
            average_checkpoints([parts[0], part], tmp_path / "mean")
        average_checkpoints([parts[0], part], tmp_path / f"as-they-are-{number}", align=False)
    assert not (tmp_path / "mean").exists() and not (tmp_path / "mean.part").exists()


# ----- what is refused


def test_what_differs_is_refused_by_name(base, parts, tmp_path):
    wider = word_tokenizer()
    wider.add_tokens(["more"])
    template, eos = word_tokenizer(), word_tokenizer(eos_token="w9")
    template.chat_template = CHAT_TEMPLATE
    lower = word_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    gpt2 = save_language_model("gpt2", tmp_path / "gpt2-base")
    bert = save_language_model("bert", tmp_path / "bert-base")

    def part(name, base=base, **options):
        return save_part(base, tmp_path / name, 5, std=1.0, **options)

    def of_config(name, **values):
        folder = Path(part(name))
        change_json(folder / "config.json", **values)
        return str(folder)

    def of_facts(name, **facts):
        folder = Path(part(name))
        saved = json.loads((folder / "config.json").read_text())["rlhf_reward"]
        return of_config(name, rlhf_reward={**saved, **facts}) if saved else None

    half = shutil.copytree(part("reshaped"), tmp_path / "lacks")
    kept = {name: weight for name, weight in weights(half).items() if "layers.1.mlp.up" not in name}
    save_file(kept, half / "model.safetensors", {"format": "pt"})
    adapter = RewardModel(base, 0.0, "cpu")
    add_adapter(adapter, LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "lora", word_tokenizer())
    for other, message in (
        (part("gpt2", gpt2), "model_type gpt2, and .* llama.*one base"),
        (part("bert", bert), "model_type bert, and .* llama"),
        (of_config("heads", num_attention_heads=2), "num_attention_heads 2, and .* 4"),
        (of_config("window", rms_norm_eps=0.5), "rms_norm_eps 0.5"),
        (of_facts("pooling", pooling="first"), 'pooling first, and .* last'),
        (of_facts("eos", ends_with_eos=False), "ends_with_eos false, and .* true"),
        (part("attributes", attributes=["a", "b"]), "attributes|id2label"),
        (str(half), r"the weight model.layers.1.mlp.up_proj.weight \(none\)"),
        (part("wider", tokenizer=wider), "vocab_size|vocabulary"),
        (part("template", tokenizer=template), "the chat template .*one tokenizer"),
        (part("special", tokenizer=eos), "the special tokens|eos_token_id"),
        (part("lower", tokenizer=lower), "the rules of the tokenizer .*Lowercase"),
        (str(tmp_path / "lora"), "the form adapter, and .* whole model.*rlhf_reward convert"),
        (parts[0], "is given twice"),
        (base, "is no reward model"),
        (str(tmp_path / "nowhere"), "nowhere"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            average_checkpoints([parts[0], other], tmp_path / "mean", align=False)
    with pytest.raises(ValueError, match="models to average are .*; expected two or more, each by itself, no commas"):
        average_checkpoints(parts[:1], tmp_path / "mean")
    assert not (tmp_path / "mean").exists() and not (tmp_path / "mean.part").exists()


def test_what_does_not_change_the_function_may_differ(base, parts, tmp_path, caplog):
    padding = word_tokenizer(padding_side="left", model_max_length=50)
    other = Path(save_part(base, tmp_path / "other", 5, std=1.0, tokenizer=padding))
    change_json(other / "config.json", transformers_version="5.0.0", attention_dropout=0.1, use_cache=False)
    spread = json.loads((other / "config.json").read_text())["rlhf_reward"]
    change_json(other / "config.json", rlhf_reward={**spread, "laplace": {"data": "mine"}})
    average_checkpoints([parts[0], other], tmp_path / "mean")
    assert "no spread of its rewards" in caplog.text


# ----- adapters


def save_adapter_part(base, folder, seed, config, std=1.0):
    torch.manual_seed(0)
    model = varied(add_adapter(RewardModel(base, 0.0, "cpu"), config), seed, 0.2)
    model.config.rlhf_reward = {"reward_mean": 0.0, "reward_std": std, "reward_over": OVER}
    model.save_pretrained(folder, word_tokenizer())
    return str(folder)


LORAS = {
    "plain": ("llama", {"r": 2, "target_modules": "all-linear"}),
    "patterns, embeddings and a whole layer": ("llama", {
        "r": 2,
        "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"q_proj": 5},
        "use_rslora": True,
        "modules_to_save": ["norm"],
    }),
    "biases": ("gpt2", {
        "r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "bias": "all", "lora_bias": True,
    }),
    "an encoder": ("bert", {"r": 2, "target_modules": ["query", "value"]}),
}


def test_the_mean_of_adapters_is_exact(tmp_path):
    for name, (family, options) in LORAS.items():
        base = save_language_model(family, tmp_path / family)
        folders = []
        for seed, std in ((1, 1.0), (2, 3.0), (3, 2.0))[:3 if name == "plain" else 2]:
            config = LoraConfig(**options)
            folders.append(save_adapter_part(base, tmp_path / f"{name} {seed}", seed, config, std))
        average = average_checkpoints(folders, tmp_path / f"{name} mean")
        states = []
        for part in average.parts:
            state = merge_adapter(RewardModel.from_pretrained(part.model, device="cpu")).state_dict()
            state["score.weight"] = state["score.weight"] * part.factor
            states.append(state)
        merged = merge_adapter(RewardModel.from_pretrained(tmp_path / f"{name} mean", device="cpu"))
        result = merged.state_dict()
        for weight in result:
            expected = sum(state[weight] for state in states) / len(states)
            assert (result[weight] - expected).abs().max() < 1e-5, (name, weight)


def test_a_bias_of_the_product_is_averaged_with_its_scale():
    torch.manual_seed(0)
    biases = list(torch.randn(3, 5))
    mean = sum(biases) / 3
    for rank, alpha, uses_rslora in ((2, 3, False), (4, 1, True)):
        old, new = ((alpha / n**0.5 if uses_rslora else alpha / n) for n in (rank, 3 * rank))
        assert_close(averaged_factor("q_proj.lora_B.bias", biases, uses_rslora) * new, mean * old)


def test_an_average_of_adapters_is_an_adapter_and_converts(base, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    folders = [save_adapter_part(base, tmp_path / f"{seed}", seed, config) for seed in (1, 2)]
    average_checkpoints(folders, tmp_path / "mean")
    saved = json.loads((tmp_path / "mean" / "adapter_config.json").read_text())
    assert saved["r"] == 4 and is_reward_model(tmp_path / "mean")
    convert(tmp_path / "mean", tmp_path / "merged")
    assert_close(rewards(tmp_path / "merged"), rewards(tmp_path / "mean"), rtol=1e-4, atol=1e-5)


def test_adapters_of_other_forms_and_bases_are_refused(base, tmp_path):
    other_base = save_language_model("llama", tmp_path / ("long" * 20) / "other-base")
    first = save_adapter_part(base, tmp_path / "first", 1, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, (of, options, message) in {
        "rank": (base, {"r": 3, "target_modules": ["q_proj"]}, "of the adapter, r 3, and .* 2"),
        "alpha": (base, {"r": 2, "lora_alpha": 1, "target_modules": ["q_proj"]}, "lora_alpha 1"),
        "modules": (base, {"r": 2, "target_modules": ["v_proj"]}, "target_modules"),
        "base": (other_base, {"r": 2, "target_modules": ["q_proj"]}, "the base model .*other-base"),
        "dora": (base, {"r": 2, "target_modules": ["q_proj"], "use_dora": True}, "use_dora=True; expected plain LoRA"),
    }.items():
        other = save_adapter_part(of, tmp_path / name, 2, LoraConfig(**options))
        with pytest.raises(ValueError, match=message):
            average_checkpoints([first, other], tmp_path / "mean")
    for config, message in (
        ({"peft_type": "IA3"}, "of the type IA3"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "LORA", "target_parameters": ["experts"]}, "target_parameters"),
        ({"peft_type": "LORA", "layer_replication": [[0, 1]]}, "layer_replication"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*rlhf_reward convert"):
            check_linear("one", config)


# ----- ensembles of adapters


def test_an_ensemble_scores_as_its_members_alone_in_the_same_packed_batches(base, tmp_path, monkeypatch):
    config = {"r": 2, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["norm"]}
    folders = [save_adapter_part(base, tmp_path / f"{seed}", seed, LoraConfig(**config), seed) for seed in (1, 2, 3)]
    prompts, chosen, rejected = zip(*(row.values() for row in ROWS))
    alone = torch.tensor([Scorer.from_pretrained(folder, "cpu").score(prompts, chosen) for folder in folders])
    ensemble = AdapterEnsemble(folders, "cpu", align=False)
    scorer = Scorer(ensemble, word_tokenizer())
    sizes = []
    forward = ensemble.model.forward

    def counted(input_ids, *args, **inputs):
        sizes.append(input_ids.numel())
        return forward(input_ids, *args, **inputs)

    monkeypatch.setattr(ensemble.model, "forward", counted)
    assert scorer.packs
    assert_close(torch.tensor(scorer.score(prompts, chosen)), alone.mean(dim=0), rtol=1e-5, atol=1e-5)
    assert len(sizes) == 3 and len(set(sizes)) == 1 # one batch, once for each member
    members = ensemble(IDS, per_head=True)
    expected = torch.cat([rewards(folder) for folder in folders], dim=1)
    assert_close(members, expected, rtol=1e-5, atol=1e-5)
    mean, deviations = ensemble(IDS, uncertainty=True)
    assert_close(mean, expected.mean(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)
    assert_close(deviations.norm(dim=1), expected.std(dim=1), rtol=1e-5, atol=1e-5)
    margin = (expected[0] - expected[1]).std()
    assert_close((deviations[0] - deviations[1]).norm(), margin, rtol=1e-5, atol=1e-5)


def test_members_of_an_ensemble_are_on_one_scale_or_refused(base, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    folders = [save_adapter_part(base, tmp_path / f"{seed}", seed, config, std) for seed, std in ((1, 1.0), (2, 3.0))]
    change_json(Path(folders[1]) / "config.json", rlhf_reward={
        **json.loads(Path(folders[1], "config.json").read_text())["rlhf_reward"], "reward_mean": 7.0,
    })
    result = AdapterEnsemble(folders, "cpu")(IDS, per_head=True)
    first, second = map(rewards, folders)
    assert_close(result, torch.cat([first * 2, (second - 7) * 2 / 3], dim=1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected normalize=False"):
        Scorer(AdapterEnsemble(folders, "cpu"), word_tokenizer()).score(["w4 "], ["w5"], normalize=True)
    ensemble = AdapterEnsemble(folders, "cpu")
    with pytest.raises(ValueError, match="is not saved; expected the folders of its members"):
        ensemble.save_pretrained(tmp_path / "saved", word_tokenizer())
    with pytest.raises(ValueError, match="expected a reward model with one linear head"):
        fit_laplace(Scorer(ensemble, word_tokenizer()), ROWS)
    scorer = Scorer(ensemble, word_tokenizer())
    scored = scorer.score(["w4 "] * 3, ["w5", "w6 w7", "w8"], uncertainty=True)
    bounds = [reward.reward - 2 * reward.spread for reward in scored]
    best = scorer.best_of_n("w4 ", ["w5", "w6 w7", "w8"], pessimism=2.0)
    assert best.bound == pytest.approx(max(bounds), abs=1e-5) and best.index == bounds.index(max(bounds))
    assert RewardFunction(scorer, pessimism=2.0)(["w4 "] * 3, ["w5", "w6 w7", "w8"]) == pytest.approx(bounds, abs=1e-5)
    other = save_adapter_part(base, tmp_path / "other", 3, LoraConfig(r=3, target_modules=["q_proj"]))
    unknown = save_adapter_part(base, tmp_path / "unknown", 3, config, None)
    whole = save_part(base, tmp_path / "whole", 1)
    for adapters, message in (
        ([folders[0], other], "of the adapter, r 3"),
        ([folders[0], unknown], "no standard deviation.*align=False"),
        (folders[:1], "expected two or more adapters"),
        ([folders[0], whole], "expected two or more adapters"),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterEnsemble(adapters, "cpu")
