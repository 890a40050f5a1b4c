"Adapters mean here what they mean to PEFT, and come back as they were trained, or are refused before training."
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from architectures import ENCODERS, VOCAB, save_language_model, word_tokenizer
from rlhf_reward import RewardModel
from rlhf_reward.adapters import add_adapter, load_adapter, merge_adapter
from rlhf_reward.reward import is_reward_model
from rlhf_reward.scoring import Scorer

TEXT = "w5 w6 w7 w8"
IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
QUERY = "model.layers.0.self_attn.q_proj"
SMALL = dict(r=2, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_language_model("llama", tmp_path_factory.mktemp("base"))
    word_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def perturb(model):
    "Change all that is trained, as training would."
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def by_peft(base, folder, config, num_labels=1):
    "An adapter as PEFT and TRL write it, on transformers' classifier; return its rewards."
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    model = perturb(get_peft_model(classifier, config))
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return rewards(model)


@torch.no_grad()
def rewards(model, ids=IDS):
    model.config.pad_token_id = 0
    outputs = model(ids)
    return outputs if torch.is_tensor(outputs) else outputs.logits


def here(folder, ids=IDS, **options):
    return rewards(RewardModel.from_pretrained(folder, device="cpu", **options), ids)


def in_peft(folder, ids=IDS):
    return rewards(AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1), ids)


def score(folder, **options):
    return Scorer.from_pretrained(folder, device="cpu", **options).score([None], [TEXT])[0]


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# Names


NAMES = {
    "alpha_pattern": dict(alpha_pattern={QUERY: 64}),
    "anchored alpha_pattern": dict(alpha_pattern={"^" + QUERY: 64}),
    "short alpha_pattern": dict(alpha_pattern={"q_proj": 64}),
    "rank_pattern": dict(rank_pattern={QUERY: 4}),
    "regular rank_pattern": dict(rank_pattern={r"model\.layers\.[01]\.self_attn\.q_proj": 4}),
    "full names": dict(target_modules=[QUERY, "model.layers.1.mlp.up_proj"]),
    "regular expression": dict(target_modules=r"model\.layers\.\d+\.self_attn\.(q|v)_proj"),
    "exclude_modules": dict(target_modules="all-linear", exclude_modules=[QUERY]),
    "excluded expression": dict(exclude_modules=r"model\.layers\.1\..*"),
    "layers_to_transform": dict(layers_to_transform=[1]),
    "layers_pattern": dict(layers_to_transform=[0], layers_pattern="layers"),
    "embeddings": dict(target_modules=["q_proj", "embed_tokens"]),
    "head": dict(target_modules=["q_proj", "score"]),
    "modules_to_save": dict(modules_to_save=["model.norm"]),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_mean_what_they_mean_to_peft(base, tmp_path, name):
    "An adapter of PEFT opens here, one that was made here opens in PEFT, and the same modules get the same adapters."
    config = LoraConfig(**{**SMALL, **NAMES[name]})
    torch.manual_seed(0)
    model = perturb(add_adapter(RewardModel(base, device="cpu"), config))
    model.save_pretrained(tmp_path / "ours", word_tokenizer())
    torch.testing.assert_close(in_peft(tmp_path / "ours"), rewards(model), atol=1e-5, rtol=1e-5)
    assert torch.equal(here(tmp_path / "ours"), rewards(model))
    config.task_type = "SEQ_CLS"
    expected = by_peft(base, tmp_path / "theirs", config)
    torch.testing.assert_close(here(tmp_path / "theirs"), expected, atol=1e-5, rtol=1e-5)
    shapes = []
    for folder in ("ours", "theirs"):
        weights = load_file(tmp_path / folder / "adapter_model.safetensors")
        shapes.append({key: weight.shape for key, weight in weights.items() if "lora" in key or "score" in key})
    assert shapes[0] == shapes[1]


def test_the_head_is_named_once(base, tmp_path):
    "As PEFT and TRL write `modules_to_save`, whether it was given or not."
    for number, names in enumerate([None, ["score"], ["model.norm", "score"]]):
        model = add_adapter(RewardModel(base, device="cpu"), LoraConfig(**SMALL, modules_to_save=names))
        model.save_pretrained(tmp_path / str(number), word_tokenizer())
        saved = json.loads((tmp_path / str(number) / "adapter_config.json").read_text())
        assert saved["modules_to_save"] == (names or ["score"])


@pytest.mark.parametrize("family", ["gpt2", "opt", "cohere"])
def test_full_names_of_other_families(family, tmp_path):
    "cohere has no classifier in transformers: its names are those of the backbone."
    base = save_language_model(family, tmp_path / "base")
    name = {"gpt2": "transformer.h.0.attn.c_attn", "opt": "model.decoder.layers.0.self_attn.q_proj"}
    name = name.get(family, "layers.0.self_attn.q_proj")
    config = LoraConfig(r=2, target_modules=[name], alpha_pattern={name: 64})
    model = perturb(add_adapter(RewardModel(base, device="cpu"), config))
    model.save_pretrained(tmp_path / "saved", word_tokenizer())
    assert torch.equal(here(tmp_path / "saved"), rewards(model))
    if family != "cohere":
        torch.testing.assert_close(in_peft(tmp_path / "saved"), rewards(model), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rewards(merge_adapter(model)), here(tmp_path / "saved"), atol=1e-5, rtol=1e-4)


# Where the files are


def put(cache, name, revision, commit, folder):
    "Put a folder into a cache of the hub, which knows of the usual files that it does not have."
    root = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, root / "snapshots" / commit)
    missing = root / ".no_exist" / commit
    missing.mkdir(parents=True)
    for file in ("config.json", "adapter_config.json", "added_tokens.json", "special_tokens_map.json", "vocab.json"):
        if not (Path(folder) / file).exists():
            (missing / file).touch()
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(commit)


def variants(base, tmp_path):
    "Two adapters that differ in their config alone."
    folders = [tmp_path / "first", tmp_path / "second"]
    expected = [by_peft(base, folders[0], LoraConfig(task_type="SEQ_CLS", **SMALL))]
    shutil.copytree(folders[0], folders[1])
    change_json(folders[1] / "adapter_config.json", lora_alpha=64)
    expected.append(in_peft(folders[1]))
    assert not torch.allclose(*expected, atol=1e-3)
    return folders, expected


def test_revision_and_cache_reach_every_file_of_an_adapter_and_not_its_base(base, tmp_path):
    folders, expected = variants(base, tmp_path)
    cache = tmp_path / "cache"
    options = dict(cache_dir=str(cache), local_files_only=True)
    put(cache, "me/base", "main", "a" * 40, base)
    for folder, revision, commit in zip(folders, ("main", "v2"), ("b" * 40, "c" * 40)):
        change_json(folder / "adapter_config.json", base_model_name_or_path="me/base")
        put(cache, "me/adapter", revision, commit, folder)
    torch.testing.assert_close(here("me/adapter", **options), expected[0])
    torch.testing.assert_close(here("me/adapter", revision="v2", **options), expected[1])
    assert score("me/adapter", revision="v2", **options) == pytest.approx(expected[1][0].item(), abs=1e-5)
    other = save_language_model("llama", tmp_path / "other")
    weights = {name: 2 * weight for name, weight in load_file(f"{other}/model.safetensors").items()}
    save_file(weights, f"{other}/model.safetensors", {"format": "pt"})
    put(cache, "me/base", "v2", "d" * 40, other)
    torch.testing.assert_close(here("me/adapter", revision="v2", **options), expected[1])
    change_json(folders[1] / "adapter_config.json", revision="v2") # of the base model
    put(cache, "me/adapter", "v3", "e" * 40, folders[1])
    change_json(folders[1] / "adapter_config.json", base_model_name_or_path=other, revision=None)
    torch.testing.assert_close(here("me/adapter", revision="v3", **options), in_peft(folders[1]))
    with pytest.raises(OSError):
        here("me/adapter", local_files_only=True)


def test_the_adapter_names_the_revision_of_its_base(base, tmp_path):
    put(tmp_path, "me/base", "v2", "a" * 40, base)
    options = dict(cache_dir=str(tmp_path), local_files_only=True)
    model = add_adapter(RewardModel("me/base", device="cpu", revision="v2", **options), LoraConfig(**SMALL))
    perturb(model).save_pretrained(tmp_path / "saved", word_tokenizer())
    saved = json.loads((tmp_path / "saved/adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("me/base", "v2")
    assert torch.equal(here(tmp_path / "saved", **options), rewards(model))


def test_a_subfolder_reaches_every_file(base, tmp_path):
    folders, expected = variants(base, tmp_path)
    shutil.copytree(folders[1], tmp_path / "run/checkpoint-10")
    torch.testing.assert_close(here(tmp_path / "run", subfolder="checkpoint-10"), expected[1])
    assert score(tmp_path / "run", subfolder="checkpoint-10") == pytest.approx(expected[1][0].item(), abs=1e-5)
    assert is_reward_model(tmp_path / "run", subfolder="checkpoint-10")
    shutil.copytree(base, tmp_path / "all/base")
    model = RewardModel(str(tmp_path / "all"), device="cpu", subfolder="base")
    perturb(add_adapter(model, LoraConfig(**SMALL))).save_pretrained(tmp_path / "saved", word_tokenizer())
    assert torch.equal(here(tmp_path / "saved"), rewards(model))
    model.save_pretrained(tmp_path / "again", word_tokenizer())
    put(tmp_path, "me/base", "main", "a" * 40, tmp_path / "all")
    options = dict(cache_dir=str(tmp_path), local_files_only=True, subfolder="base")
    with pytest.raises(ValueError, match="in the subfolder 'base' of 'me/base' .* expected a base model in a folder"):
        add_adapter(RewardModel("me/base", device="cpu", **options), LoraConfig(**SMALL))


def test_the_token_reaches_every_file(base, tmp_path, monkeypatch):
    "Every file of an adapter, and of its base model."
    from transformers.utils import hub

    folder = tmp_path / "adapter"
    by_peft(base, folder, LoraConfig(task_type="SEQ_CLS", **SMALL))
    change_json(folder / "adapter_config.json", base_model_name_or_path="me/base")
    put(tmp_path, "me/base", "main", "a" * 40, base)
    put(tmp_path, "me/adapter", "main", "b" * 40, folder)
    asked = []
    download = hub.hf_hub_download

    def recorded(name, file, **kwargs):
        asked.append((name, file, kwargs["token"], kwargs["cache_dir"]))
        return download(name, file, **kwargs)

    monkeypatch.setattr(hub, "hf_hub_download", recorded)
    score("me/adapter", cache_dir=str(tmp_path), local_files_only=True, token="secret")
    asked_of = {(name, file) for name, file, *_ in asked}
    assert ("me/adapter", "adapter_model.safetensors") in asked_of and ("me/base", "model.safetensors") in asked_of
    assert [call for call in asked if call[2:] != ("secret", str(tmp_path))] == []


# What comes back


METHODS = {
    "RandLora": peft.RandLoraConfig(**SMALL),
    "VeRA": peft.VeraConfig(**SMALL),
    "AdaLoRA": peft.AdaLoraConfig(total_step=10, **SMALL),
    "LoHa": peft.LoHaConfig(**SMALL),
    "VBLoRA": peft.VBLoRAConfig(vector_length=8, num_vectors=8, **SMALL),
    "LayerNorm": peft.LNTuningConfig(),
    "pissa": LoraConfig(init_lora_weights="pissa", **SMALL),
    "olora": LoraConfig(init_lora_weights="olora", **SMALL),
    "dora": LoraConfig(use_dora=True, **SMALL),
    "bias": LoraConfig(bias="all", **SMALL),
    "replicated": LoraConfig(layer_replication=[[0, 2], [1, 2]], **SMALL),
    "tokens": LoraConfig(trainable_token_indices=[5, 6], **SMALL),
    "tokens by name": LoraConfig(trainable_token_indices={"embed_tokens": [5, 6]}, **SMALL),
    "all embeddings": LoraConfig(modules_to_save=["embed_tokens"], **SMALL),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_come_back_as_they_were_trained(base, tmp_path, name):
    torch.manual_seed(0)
    model = perturb(add_adapter(RewardModel(base, device="cpu"), METHODS[name]))
    model.save_pretrained(tmp_path, word_tokenizer())
    torch.testing.assert_close(here(tmp_path), rewards(model), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(in_peft(tmp_path), rewards(model), atol=1e-5, rtol=1e-5)
    other = add_adapter(RewardModel(base, device="cpu"), METHODS[name])
    load_adapter(other, tmp_path)
    torch.testing.assert_close(rewards(other.eval()), rewards(model), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "config, message",
    [
        (LoraConfig(init_lora_weights="pissa_niter_4", **SMALL), "random approximation.*expected 'pissa'"),
        (peft.TrainableTokensConfig(token_indices=[5]), "head would be lost.*trainable_token_indices"),
        (peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1), "head would be lost"),
        (peft.PolyConfig(target_modules=["q_proj"]), "number of a task"),
        (peft.XLoraConfig(hidden_size=32, adapters={}), "opens other adapters"),
        (LoraConfig(r=2, target_modules=["q_proj"], megatron_config={"a": 1}), "module of Python to import"),
        (peft.IA3Config(target_modules=["q_proj"]), "could not be opened again"),
        (LoraConfig(r=2, target_modules=["no_such"]), "does not fit LlamaForSequenceClassification: Target modules"),
        (LoraConfig(r=2, target_modules=r"layers\.\d+\.self_attn\.q_proj"), "does not fit LlamaForSequenceClass"),
        (LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="corda"), "does not fit.*preprocess_corda"),
        (LoraConfig(r=2, target_modules=["norm"]), "does not fit"),
    ],
    ids=lambda value: value.peft_type.value if hasattr(value, "peft_type") else None,
)
def test_what_would_not_come_back_is_refused_before_training(base, config, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        add_adapter(RewardModel(base, device="cpu"), config)


def test_a_trained_adapter_that_opens_differently_each_time_is_refused(base, tmp_path):
    by_peft(base, tmp_path, LoraConfig(task_type="SEQ_CLS", init_lora_weights="pissa_niter_4", **SMALL))
    with pytest.raises(ValueError, match="random approximation"):
        score(tmp_path)


NEW_IDS = torch.tensor([[5, VOCAB + 3, 7, VOCAB]])


def longer_tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([f"<new{number}>" for number in range(4)])
    return tokenizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": list(range(VOCAB, VOCAB + 4))},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_new_tokens_come_back(base, tmp_path, options):
    "The embeddings were resized; those of new tokens are in no base model, so that they are saved with the adapter."
    torch.manual_seed(0)
    model = RewardModel(base, device="cpu")
    model.backbone.resize_token_embeddings(VOCAB + 4)
    perturb(add_adapter(model, LoraConfig(**{**SMALL, **options})))
    model.save_pretrained(tmp_path / "ours", longer_tokenizer())
    assert torch.equal(here(tmp_path / "ours", NEW_IDS), rewards(model, NEW_IDS))
    torch.testing.assert_close(in_peft(tmp_path / "ours", NEW_IDS), rewards(model, NEW_IDS), atol=1e-5, rtol=1e-5)
    again = RewardModel.from_pretrained(tmp_path / "ours", device="cpu")
    again.save_pretrained(tmp_path / "again", longer_tokenizer())
    assert torch.equal(here(tmp_path / "again", NEW_IDS), rewards(model, NEW_IDS))
    merge_adapter(again).save_pretrained(tmp_path / "merged", longer_tokenizer())
    torch.testing.assert_close(here(tmp_path / "merged", NEW_IDS), rewards(model, NEW_IDS), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [VOCAB + 4, VOCAB + 16, VOCAB - 16], ids=["larger", "padded", "smaller"])
@pytest.mark.parametrize("options", [{}, {"trainable_token_indices": [5, 40]}], ids=["plain", "tokens"])
def test_embeddings_that_peft_resized_come_back(base, tmp_path, rows, options):
    "As TRL does with chat_template_path: the rows become as many as its tokenizer needs, rounded up."
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    classifier.resize_token_embeddings(rows)
    model = perturb(get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", **SMALL, **options)))
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, rows - 1, 40]])
    torch.testing.assert_close(here(tmp_path, ids), rewards(model, ids), atol=1e-5, rtol=1e-5)


# Parts that are elsewhere


def test_an_adapter_without_tokenizer_has_that_of_its_base(base, tmp_path):
    expected = by_peft(base, tmp_path, LoraConfig(task_type="SEQ_CLS", **SMALL))
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").unlink()
    assert score(tmp_path) == pytest.approx(expected[0].item(), abs=1e-5)


@pytest.mark.parametrize("config", [LoraConfig(**SMALL), peft.TrainableTokensConfig(token_indices=[5, 6])])
@pytest.mark.parametrize("ours", [True, False], ids=["of this library", "of transformers"])
def test_the_head_may_be_that_of_the_base(tmp_path, config, ours):
    "PEFT without a task on a reward model: the adapter has no head, and other tools take that of the base model."
    reward_model = tmp_path / "reward"
    RewardModel(save_language_model("llama", tmp_path / "base"), device="cpu").save_pretrained(
        reward_model, word_tokenizer()
    )
    if not ours:
        saved = json.loads((reward_model / "config.json").read_text())
        saved.pop("rlhf_reward")
        (reward_model / "config.json").write_text(json.dumps(saved))
    expected = by_peft(reward_model, tmp_path / "adapter", config)
    assert "score" not in "".join(load_file(tmp_path / "adapter/adapter_model.safetensors"))
    model = RewardModel.from_pretrained(tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(rewards(model), expected, atol=1e-5, rtol=1e-5)
    assert is_reward_model(tmp_path / "adapter") and model.ends_with_eos == ours


def test_an_adapter_without_any_head_is_refused(base, tmp_path):
    by_peft(base, tmp_path, LoraConfig(**SMALL))
    assert not is_reward_model(tmp_path)
    for open_it in (RewardModel.from_pretrained, Scorer.from_pretrained):
        with pytest.raises(ValueError, match="reward head of .* does not exist; .* or a base model with a head"):
            open_it(tmp_path, device="cpu")


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2", "modernbert"])
def test_adapters_of_encoder_classifiers_open_as_in_peft(tmp_path, family, task):
    config = ENCODERS[family]
    torch.manual_seed(0)
    config = type(config).from_dict({**config.to_dict(), "num_labels": 1})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    names = {"distilbert": "q_lin", "deberta-v2": "query_proj", "modernbert": "Wqkv"}
    adapter = LoraConfig(task_type=task, r=2, target_modules=[names.get(family, "query")])
    expected = by_peft(tmp_path / "base", tmp_path / "adapter", adapter)
    assert not is_reward_model(tmp_path / "adapter")
    assert score(tmp_path / "adapter") == pytest.approx(expected[0].item(), abs=1e-5)
    with pytest.raises(ValueError, match="Scorer.from_pretrained" if task else "does not exist"):
        RewardModel.from_pretrained(tmp_path / "adapter", device="cpu")


def test_adapters_of_encoders_that_lack_weights_or_have_several_labels_are_refused(tmp_path):
    "A language model has no pooler, and PEFT does not save it: a random one each time."
    AutoModelForMaskedLM.from_config(ENCODERS["bert"]).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    by_peft(tmp_path / "base", tmp_path / "adapter", config)
    with pytest.raises(ValueError, match="lacks 2 weights of BertForSequenceClassification, such as bert.pooler"):
        score(tmp_path / "adapter")
    AutoModelForSequenceClassification.from_config(ENCODERS["bert"]).save_pretrained(tmp_path / "base")
    by_peft(tmp_path / "base", tmp_path / "three", config, num_labels=2)
    with pytest.raises(ValueError, match="do not fit"):
        score(tmp_path / "three")


# Errors


@pytest.mark.parametrize("config", [dict(r=8), dict(rank_pattern={QUERY: 4}), dict(target_modules=["v_proj"])])
def test_an_adapter_of_another_form_is_a_value_error(base, tmp_path, config):
    by_peft(base, tmp_path, LoraConfig(task_type="SEQ_CLS", **SMALL))
    other = add_adapter(RewardModel(base, device="cpu"), LoraConfig(**{**SMALL, **config}))
    message = "(?s)weights of an adapter and the model .*expected an adapter of the same form"
    with pytest.raises(ValueError, match=message):
        load_adapter(other, tmp_path)
    change_json(tmp_path / "adapter_config.json", r=3)
    with pytest.raises(ValueError, match="do not fit"):
        RewardModel.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": 3}, "names no base model"),
        ({"target_modules": "(("}, "does not fit"),
        ({"trainable_token_indices": [10**7]}, "out of bounds"),
        ({"layers_to_transform": [77]}, "does not fit"),
        ({"init_lora_weights": "none"}, "does not fit"),
        ({"peft_type": "NO_SUCH"}, "no config of this PEFT"),
        ({"peft_type": None}, "no config of this PEFT"),
        ({"target_modules": ["no_such"]}, "does not fit"),
        ({"target_modules": 3}, "does not fit|no config of this PEFT"),
    ],
)
def test_a_config_that_cannot_be_read_is_a_value_error(base, tmp_path, values, message, capsys):
    from rlhf_reward.cli import score as score_command

    by_peft(base, tmp_path, LoraConfig(task_type="SEQ_CLS", **SMALL))
    change_json(tmp_path / "adapter_config.json", **values)
    with pytest.raises(ValueError, match=message):
        score(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "w5", "response": "w6"}\n')
    with pytest.raises(SystemExit, match="rlhf_reward score: "):
        files = ["--data", str(rows), "--output", str(tmp_path / "out.jsonl")]
        score_command(["--model", str(tmp_path), "--device", "cpu", *files])
