"Which files of a checkpoint are read, whose code runs, and whether it is a reward model."
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import deepspeed

from architectures import DECODERS, ENCODERS, save_language_model, word_tokenizer
from rlhf_reward import RewardModel
from rlhf_reward.adapters import add_adapter, lora_config
from rlhf_reward.checkpoint_files import check_index
from rlhf_reward.checkpoints import unsharded
from rlhf_reward.cli import score as score_command
from rlhf_reward.cli import train
from rlhf_reward.encoders import EncoderClassifier
from rlhf_reward.reward import is_reward_model
from rlhf_reward.scoring import Scorer
from rlhf_reward.synthetic import synthetic_texts, tiny_decoder

pytestmark = pytest.mark.usefixtures("no_curves")

TEXT = "w5 w6 w7 w8"
INDEX = "model.safetensors.index.json"


def save_classifier(folder, config=DECODERS["llama"], num_labels=1, **options):
    "A classifier made elsewhere, with its tokenizer."
    torch.manual_seed(0)
    config = type(config).from_dict({**config.to_dict(), "num_labels": num_labels})
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, **options)
    word_tokenizer().save_pretrained(folder)
    return Path(folder)


def change_json(path, **values):
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def reward(folder, **options):
    return Scorer.from_pretrained(folder, device="cpu", **options).score([None], [TEXT])[0]


def reward_in_transformers(folder, **options):
    model = AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
    ids = word_tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids).logits.item()


OPENERS = {
    "scorer": lambda folder: Scorer.from_pretrained(folder, device="cpu"),
    "reward model": lambda folder: RewardModel.from_pretrained(folder, device="cpu"),
    "backbone": lambda folder: RewardModel(folder, device="cpu"),
    "encoder": lambda folder: EncoderClassifier(folder, device="cpu"),
}


# No pickle is read, and no file of another folder


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize(
    "where", ["pickle", "absolute", "parent", "folder and parent", "head alone", "with the whole"]
)
def test_an_index_names_safetensors_of_its_folder_alone(tmp_path, where, opener):
    config = ENCODERS["bert"] if opener == "encoder" else DECODERS["llama"]
    folder = save_classifier(tmp_path / "model", config)
    weights = load_file(folder / "model.safetensors")
    if where == "pickle":
        torch.save(weights, folder / "weights.bin")
        file = "weights.bin"
    else:
        shutil.copy(folder / "model.safetensors", tmp_path / "other.safetensors")
        absolute = str(tmp_path / "other.safetensors")
        file = {"absolute": absolute, "folder and parent": "sub/../../other.safetensors"}
        file = file.get(where, "../other.safetensors")
    (folder / "sub").mkdir()
    files = dict.fromkeys(weights, file)
    if where == "head alone":
        backbone = [name for name in weights if "score" not in name and "classifier" not in name]
        files.update(dict.fromkeys(backbone, "model-1.safetensors"))
        shutil.copy(folder / "model.safetensors", folder / "model-1.safetensors")
    if where != "with the whole":
        (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    problem = "no safetensors file" if where == "pickle" else "not in its folder"
    with pytest.raises(ValueError, match=f"{problem}.*expected .safetensors files of the checkpoint alone"):
        OPENERS[opener](str(folder))


@pytest.mark.parametrize("file", [
    "..\\x.safetensors", "sub\\..\\..\\x.safetensors", "C:x.safetensors", "c:\\x.safetensors",
    "\\\\host\\x.safetensors", "~/x.safetensors", "/x.safetensors", "a/../../x.safetensors", "x.SAFETENSORS", "x.bin",
    "x.safetensors/", "x.safetensors.pt", "None",
])
def test_names_that_an_index_may_not_have(file):
    with pytest.raises(ValueError, match="files of the checkpoint alone"):
        check_index("model", ["model-1.safetensors", file])
    check_index("model", ["model-1.safetensors", "sub/model-2.safetensors", "a..b.safetensors"])


def test_the_base_of_an_adapter_names_safetensors_alone(tmp_path):
    from rlhf_reward.adapters import add_adapter, lora_config

    base = Path(save_language_model("llama", tmp_path / "base"))
    word_tokenizer().save_pretrained(base)
    add_adapter(RewardModel(str(base), device="cpu"), lora_config(2)).save_pretrained(tmp_path / "a", word_tokenizer())
    torch.save(load_file(base / "model.safetensors"), base / "weights.bin")
    files = dict.fromkeys(load_file(base / "model.safetensors"), "weights.bin")
    (base / "model.safetensors").unlink()
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for opener in ("scorer", "reward model"):
        with pytest.raises(ValueError, match="no safetensors file"):
            OPENERS[opener](str(tmp_path / "a"))


def test_a_pickled_adapter_is_refused_wherever_it_is(tmp_path):
    "Alone, named by the config of a model, and in a folder that transformers would open with its adapter by itself."
    from rlhf_reward.adapters import add_adapter, lora_config

    base = save_language_model("llama", tmp_path / "base")
    adapter = tmp_path / "adapter"
    add_adapter(RewardModel(base, device="cpu"), lora_config(2)).save_pretrained(adapter, word_tokenizer())
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="is an adapter with a reward head"):
        RewardModel(str(adapter), device="cpu")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match="adapter_model.safetensors"):
        RewardModel.from_pretrained(adapter, device="cpu")
    folder = save_classifier(tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")
    change_json(folder / "config.json", transformers_weights="adapter_model.bin")
    for opener in ("scorer", "reward model", "backbone"):
        with pytest.raises(ValueError, match="no safetensors file"):
            OPENERS[opener](str(folder))


def test_weights_under_other_names_are_read_with_their_head(tmp_path):
    "A variant, and a file that the config names; several files and one file that both exist, of which one is read."
    plain = save_classifier(tmp_path / "plain")
    expected = reward(plain)
    variant = save_classifier(tmp_path / "variant", variant="fp16")
    assert not (variant / "model.safetensors").exists() and reward(variant, variant="fp16") == expected
    assert is_reward_model(variant, variant="fp16")
    named = save_classifier(tmp_path / "named")
    (named / "model.safetensors").rename(named / "weights.safetensors")
    change_json(named / "config.json", transformers_weights="weights.safetensors")
    assert reward(named) == expected
    both = save_classifier(tmp_path / "both")
    weights = load_file(both / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, both / "old.safetensors", {"format": "pt"})
    (both / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "old.safetensors")}))
    assert reward(both) == expected == pytest.approx(reward_in_transformers(both), abs=1e-5)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"metadata": {}}'])
def test_a_damaged_index_or_file_is_named(tmp_path, content):
    folder = save_classifier(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match="no index of weights"):
        RewardModel.from_pretrained(folder, device="cpu")
    (folder / INDEX).unlink()
    (folder / "model.safetensors").write_bytes((folder / "model-1.safetensors").read_bytes()[:3000])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        RewardModel.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"hidden_size": 64}, r"shape \(64, 32\), and \(64, 64\) by its config.json"),
        ({"vocab_size": 7}, r"shape \(64, 32\), and \(7, 32\) by its config.json"),
        ({"num_hidden_layers": 3}, "lacks 9 weights of LlamaModel"),
        ({"num_attention_heads": 5}, "cannot be read"),
        ({"hidden_size": "x"}, "cannot be read"),
        ({"model_type": "none"}, "model type"),
        ({"architectures": 3}, "architectures in config.json .* is 3; expected a list"),
        ({"architectures": "LlamaForSequenceClassification"}, "expected a list"),
        ({"auto_map": 3}, "cannot be read"),
        ({"rlhf_reward": 3}, "expected a dict"),
        ({"rlhf_reward": {"pooling": "x"}}, "pooling is 'x'"),
        ({"transformers_weights": 3}, "expected a str"),
        (None, "config.json of .* cannot be read; expected JSON"),
    ],
    ids=str,
)
def test_commands_say_what_is_wrong_with_a_config(tmp_path, values, message):
    "Without a traceback."
    folder = save_classifier(tmp_path / "model")
    if values is None:
        (folder / "config.json").write_text("{")
    else:
        change_json(folder / "config.json", **values)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "w5", "response": "w6", "chosen": "w7", "rejected": "w8"}\n' * 20)
    output = str(tmp_path / "out.jsonl")
    with pytest.raises(SystemExit, match=f"rlhf_reward score: .*{message}"):
        score_command(["--model", str(folder), "--data", str(rows), "--output", output, "--device", "cpu"])
    common = ["--dataset", str(rows), "--output_dir", str(tmp_path / "run"), "--use_cpu", "--report_to", "none"]
    with pytest.raises(SystemExit, match=f"rlhf_reward train: .*{message}"):
        train(["--model", str(folder), *common])


@pytest.mark.parametrize("head_is_missing", [True, False])
def test_a_missing_shard_is_named(tmp_path, head_is_missing):
    folder = save_classifier(tmp_path, max_shard_size="10KB")
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    head = files["score.weight"]
    missing = head if head_is_missing else next(file for file in files.values() if file != head)
    (folder / missing).unlink()
    for opener in ("scorer", "reward model", "backbone"):
        with pytest.raises((ValueError, OSError), match=missing):
            OPENERS[opener](str(folder))
    if head_is_missing:
        with pytest.raises(ValueError, match=f"no {missing}, where its index has weights"):
            is_reward_model(folder)
        save_file({"other": torch.zeros(1)}, folder / missing, {"format": "pt"})
        with pytest.raises(ValueError, match=f"{missing} of .* lacks score.weight, which its index has there"):
            is_reward_model(folder)


# Weights that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "score.weight",
    ],
)
def test_weights_that_are_not_finite_are_found_at_opening(tmp_path, name, value):
    "Under SDPA on a CPU a NaN in q_proj or k_proj gives finite rewards, which are wrong."
    folder = save_classifier(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[3] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    message = f"{name.removeprefix('model.')} of .* has 1 of .* infinite or not a number; expected finite ones"
    for opener in ("scorer", "reward model"):
        with pytest.raises(ValueError, match=message):
            OPENERS[opener](folder)
    if name != "score.weight":
        with pytest.raises(ValueError, match=message):
            RewardModel(str(folder), device="cpu")


def test_numbers_that_the_dtype_cannot_hold_are_found(tmp_path):
    folder = save_classifier(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    RewardModel.from_pretrained(folder, device="cpu")
    with pytest.raises(ValueError, match="the dtype is too small.*dtype='float32'"):
        RewardModel.from_pretrained(folder, device="cpu", dtype="float16")


def test_encoders_and_adapters_with_weights_that_are_not_finite_are_found_too(tmp_path):
    from rlhf_reward.adapters import add_adapter, lora_config

    base = save_language_model("llama", tmp_path / "base")
    for word in ("lora_B", "score"):
        adapter = tmp_path / word
        add_adapter(RewardModel(base, device="cpu"), lora_config(2)).save_pretrained(adapter, word_tokenizer())
        weights = load_file(adapter / "adapter_model.safetensors")
        next(weight for name, weight in weights.items() if word in name).view(-1)[0] = float("nan")
        save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="infinite or not a number"):
            RewardModel.from_pretrained(adapter, device="cpu")
    encoder = save_classifier(tmp_path / "encoder", ENCODERS["bert"])
    weights = load_file(encoder / "model.safetensors")
    weights["classifier.bias"][0] = float("inf")
    save_file(weights, encoder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="classifier.bias of .* infinite or not a number"):
        Scorer.from_pretrained(encoder, device="cpu")


# Code of its own

CODE = """
from transformers import {family}ForSequenceClassification

class XModel({family}ForSequenceClassification):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = -10 * outputs.logits
        return outputs
"""


def with_code(folder, config=DECODERS["llama"], family="Llama", architectures=("XModel",), auto_map=None):
    save_classifier(folder, config)
    (folder / "modeling_x.py").write_text(CODE.format(family=family))
    if auto_map is None:
        auto_map = {"AutoModelForSequenceClassification": "modeling_x.XModel"}
    change_json(folder / "config.json", architectures=list(architectures), auto_map=auto_map)
    return folder


@pytest.mark.parametrize(
    "config, code",
    [
        ("llama", {}),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}), # auto_map alone
        ("llama", {"auto_map": {}, "architectures": ["XForRewardModel"]}), # an unknown architecture alone
        ("llama", {"auto_map": {"AutoModel": "modeling_x.XModel"}, "architectures": ["LlamaModel"]}),
        ("llama", {"auto_map": {}, "architectures": ["CriticModel"]}), # OpenRLHF's, with a value for each token
        ("qwen2", {"auto_map": {"AutoModel": "x.Qwen2ForRewardModel"}, "architectures": ["Qwen2ForRewardModel"]}),
        ("bert", {"family": "Bert"}),
    ],
    ids=str,
)
def test_a_checkpoint_with_code_of_its_own_is_refused(tmp_path, config, code):
    folder = with_code(tmp_path, {**DECODERS, **ENCODERS}[config], **code)
    for opener in OPENERS.values():
        with pytest.raises(ValueError, match="has code of its own .*expected a class of transformers"):
            opener(str(folder))
    with pytest.raises(ValueError, match="has code of its own"):
        is_reward_model(folder)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_code_that_is_trusted_runs(tmp_path, family):
    config = {**DECODERS, **ENCODERS}[family]
    folder = with_code(tmp_path / "model", config, family.capitalize())
    rewards = Scorer.from_pretrained(folder, device="cpu", trust_remote_code=True).score([None] * 2, [TEXT, "w9 w3"])
    assert rewards[0] == pytest.approx(reward_in_transformers(folder, trust_remote_code=True), abs=1e-5)
    assert rewards[0] == pytest.approx(-10 * reward(save_classifier(tmp_path / "plain", config)), abs=1e-4)
    with pytest.raises(ValueError, match="code of its own .* use Scorer.from_pretrained"):
        RewardModel.from_pretrained(folder, device="cpu", trust_remote_code=True)
    assert not is_reward_model(folder, trust_remote_code=True)


def test_trusted_code_that_cannot_run_or_has_no_reward_is_refused(tmp_path):
    no_code = with_code(tmp_path / "no", auto_map={}, architectures=["XForRewardModel"])
    with pytest.raises(ValueError, match="name that class under 'architectures'"):
        Scorer.from_pretrained(no_code, device="cpu", trust_remote_code=True)
    first = with_code(tmp_path / "first")
    code = (first / "modeling_x.py").read_text()
    code = code.replace("-10 * outputs.logits", "outputs.logits * kwargs['input_ids'].shape[1]")
    (first / "modeling_x.py").write_text(code)
    with pytest.raises(ValueError, match="alone and .* padded; expected one reward for each text"):
        Scorer.from_pretrained(first, device="cpu", trust_remote_code=True)


def test_older_copies_of_classes_of_transformers_are_no_code_of_its_own(tmp_path):
    "As models have that transformers took over, and reward models that were trained on them."
    base = Path(save_language_model("llama", tmp_path / "base"))
    copies = {"AutoConfig": "c.LlamaConfig", "AutoModelForCausalLM": "m.LlamaForCausalLM", "AutoModel": "m.LlamaModel"}
    change_json(base / "config.json", auto_map=copies)
    model = RewardModel(str(base), device="cpu")
    model.save_pretrained(tmp_path / "saved", word_tokenizer())
    assert is_reward_model(tmp_path / "saved") and not is_reward_model(base)
    RewardModel.from_pretrained(tmp_path / "saved", device="cpu")
    sharded = save_classifier(tmp_path / "sharded")
    change_json(sharded / "config.json", architectures=["FSDPLlamaForSequenceClassification"])
    RewardModel.from_pretrained(sharded, device="cpu")


# One test of whether it is a reward model


def openrlhf(folder, prefix="score"):
    save_classifier(folder)
    weights = load_file(folder / "model.safetensors")
    weights[f"{prefix}.weight"] = weights.pop("score.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    values = dict(architectures=["RewardModel"], value_head_prefix=prefix, mean=0.3, std=1.2)
    change_json(folder / "config.json", num_labels=None, id2label=None, label2id=None, **values)
    return folder


def test_the_one_test_says_what_opens(tmp_path):
    "`is_reward_model`, `RewardModel.from_pretrained` and `Scorer` agree on every kind."
    language = Path(save_language_model("llama", tmp_path / "language"))
    word_tokenizer().save_pretrained(language)
    two_labels_in_config = save_classifier(tmp_path / "config")
    change_json(two_labels_in_config / "config.json", id2label=None, label2id=None, num_labels=None)
    without_head = save_classifier(tmp_path / "headless")
    weights = load_file(without_head / "model.safetensors")
    weights.pop("score.weight")
    save_file(weights, without_head / "model.safetensors", {"format": "pt"})
    with_bias = save_classifier(tmp_path / "bias")
    weights = load_file(with_bias / "model.safetensors")
    save_file({**weights, "score.bias": torch.zeros(1)}, with_bias / "model.safetensors", {"format": "pt"})
    unnamed = save_classifier(tmp_path / "unnamed")
    change_json(unnamed / "config.json", architectures=None)
    kinds = {
        openrlhf(tmp_path / "openrlhf"): True,
        openrlhf(tmp_path / "value_head", "value_head"): True,
        save_classifier(tmp_path / "shards", max_shard_size="10KB"): True,
        two_labels_in_config: True,
        unnamed: True,
        save_classifier(tmp_path / "gpt2", DECODERS["gpt2"]): True,
        save_classifier(tmp_path / "opt", DECODERS["opt"]): True,
        save_classifier(tmp_path / "three", num_labels=3): False,
        without_head: False,
        with_bias: False,
        language: False,
    }
    for folder, expected in kinds.items():
        assert is_reward_model(folder) == expected, folder.name
        for opener in ("reward model", "scorer"):
            if expected:
                OPENERS[opener](folder)
            else:
                with pytest.raises(ValueError):
                    OPENERS[opener](folder)
    assert reward(tmp_path / "openrlhf") == reward(tmp_path / "value_head")
    assert reward(tmp_path / "openrlhf") == pytest.approx(reward_in_transformers(tmp_path / "openrlhf", num_labels=1))


@pytest.mark.parametrize("kind", ["openrlhf", "language", "encoder"])
def test_training_says_which_head_it_starts_from(tmp_path, kind, caplog):
    if kind == "openrlhf":
        folder = openrlhf(tmp_path / "model")
    elif kind == "encoder":
        folder = save_classifier(tmp_path / "model", ENCODERS["bert"])
    else:
        folder = Path(save_language_model("llama", tmp_path / "model"))
        word_tokenizer().save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(
        json.dumps({"prompt": f"w{i} ", "chosen": f"w{i + 1}", "rejected": f"w{i + 2}"}) for i in range(3, 40)
    ))
    options = ["--max_steps", "1", "--learning_rate", "1e-12", "--use_cpu", "--save_strategy", "no"]
    options += ["--report_to", "none", "--disable_tqdm", "true", "--eval_strategy", "no"]
    with caplog.at_level(logging.INFO, "rlhf_reward"):
        train(["--model", str(folder), "--dataset", str(rows), "--output_dir", str(tmp_path / "out"), *options])
    lines = [record.getMessage() for record in caplog.records if " head" in record.getMessage()]
    assert len(lines) == 1
    if kind == "openrlhf":
        assert "is a reward model; training continues from its head." in lines[0]
        head = load_file(folder / "model.safetensors")["score.weight"]
        torch.testing.assert_close(load_file(tmp_path / "out/model.safetensors")["score.weight"], head)
    else:
        assert "has no reward head to continue from; training starts from a new head on its backbone." in lines[0]


@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_chat_template_of_an_earlier_tokenizer_does_not_stay(is_adapter, tmp_path):
    base = tiny_decoder(tmp_path / "base", synthetic_texts())
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    model = RewardModel(base, device="cpu")
    if is_adapter:
        add_adapter(model, lora_config(r=2))
    model.save_pretrained(tmp_path / "saved", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == tokenizer.chat_template
    tokenizer.chat_template = None
    model.save_pretrained(tmp_path / "saved", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template is None


@pytest.mark.parametrize("device", ["foo", "cuda:x"])
def test_a_device_that_torch_does_not_know(device, tmp_path):
    with pytest.raises(ValueError, match=f"device is '{device}'; expected one of torch"):
        RewardModel(str(tmp_path), device=device)


# DeepSpeed


def test_a_model_is_opened_in_one_piece_under_zero3(tmp_path):
    "With the config of a run, which stays the same object, is in force afterwards, and ends with the run."
    folder = save_classifier(tmp_path / "model")
    expected = reward(folder)
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    deepspeed.set_hf_deepspeed_config(config)
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        assert reward(folder) == expected  # transformers would shard the backbone, for which deepspeed must be there
        assert deepspeed.is_deepspeed_zero3_enabled() and deepspeed.deepspeed_config() is config.config
        with pytest.raises(KeyError), unsharded(), unsharded():
            assert not deepspeed.is_deepspeed_zero3_enabled()
            raise KeyError
        assert deepspeed.is_deepspeed_zero3_enabled()
        with unsharded():
            with unsharded():
                pass
            assert not deepspeed.is_deepspeed_zero3_enabled()
        del config
        assert not deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
