"A reward model starts from an adapter of a language model, which is never a reward model itself."
import copy
import json
import logging
from pathlib import Path

import peft
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, BitsAndBytesConfig
from transformers import PreTrainedTokenizerBase

from architectures import save_language_model, word_tokenizer
from rlhf_reward import RewardModel
from rlhf_reward.adapters import add_adapter, lora_config
from rlhf_reward.cli import train
from rlhf_reward.reward import is_reward_model
from rlhf_reward.scoring import Scorer
from rlhf_reward.sft_adapters import merge_sft_adapter

pytestmark = pytest.mark.usefixtures("no_curves")

IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")


@torch.no_grad()
def sft(folder, family="llama", config=LORA, opened_as=AutoModelForCausalLM, prepare=None):
    "An adapter as PEFT writes it, in `folder / 'sft'`; return it and the last hidden states of its language model."
    base = save_language_model(family, folder / "base")
    word_tokenizer().save_pretrained(base)
    language_model = opened_as.from_pretrained(base)
    if prepare is not None:
        prepare(language_model)
    model = get_peft_model(language_model, copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "sft")
    return folder / "sft", model(IDS, output_hidden_states=True).hidden_states[-1]


@torch.no_grad()
def hidden_states(model):
    return model.backbone(IDS).last_hidden_state


CONFIGS = {
    "lora": LORA,
    "without a task": LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "with the language-model head": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"]),
    "dora": LoraConfig(task_type="CAUSAL_LM", r=2, use_dora=True, target_modules=["v_proj"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "embeddings": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "trained tokens": LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 6]}
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_backbone_is_that_of_the_fine_tuned_model(kind, tmp_path, caplog):
    adapter, expected = sft(tmp_path, config=CONFIGS[kind])
    with caplog.at_level(logging.INFO, "rlhf_reward"):
        model = RewardModel(adapter, device="cpu")
    torch.testing.assert_close(hidden_states(model), expected, atol=1e-5, rtol=1e-5)
    assert not hasattr(model.backbone, "peft_config")
    lines = [record.getMessage() for record in caplog.records if "merged into its base model" in record.getMessage()]
    assert len(lines) == 1 and str(adapter) in lines[0] and str(tmp_path / "base") in lines[0]


# granite and cohere have no sequence classifier in transformers
@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "granite", "cohere"])
def test_families(family, tmp_path):
    adapter, expected = sft(tmp_path, family)
    torch.testing.assert_close(hidden_states(RewardModel(adapter, device="cpu")), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_a_masked_language_model(tmp_path):
    config = LoraConfig(r=2, target_modules=["query", "dense"])
    adapter, expected = sft(tmp_path, "bert", config, AutoModelForMaskedLM)
    torch.testing.assert_close(hidden_states(RewardModel(adapter, device="cpu")), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_a_backbone(tmp_path):
    "Names without the prefix of a language model, as PEFT has them for `AutoModel`."
    config = LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=["q_proj"])
    adapter, expected = sft(tmp_path, config=config, opened_as=AutoModel)
    torch.testing.assert_close(hidden_states(RewardModel(adapter, device="cpu")), expected, atol=1e-5, rtol=1e-5)


def test_new_tokens_come_along(tmp_path):
    adapter, _ = sft(tmp_path, prepare=lambda model: model.resize_token_embeddings(70))
    assert RewardModel(adapter, device="cpu").num_embeddings == 70


def test_it_is_no_reward_model(tmp_path):
    adapter, _ = sft(tmp_path)
    word_tokenizer().save_pretrained(adapter)
    assert not is_reward_model(adapter)
    for opener in (RewardModel.from_pretrained, Scorer.from_pretrained):
        with pytest.raises(ValueError, match="an adapter of a language model .* and no reward model; .* RewardModel"):
            opener(adapter, device="cpu")


def test_nor_is_it_on_a_base_model_with_a_head(tmp_path):
    adapter, _ = sft(tmp_path)
    RewardModel(str(tmp_path / "base"), device="cpu").save_pretrained(tmp_path / "base", word_tokenizer())
    assert is_reward_model(tmp_path / "base") and not is_reward_model(adapter)
    with pytest.raises(ValueError, match="and no reward model"):
        Scorer.from_pretrained(adapter, device="cpu")


def test_a_reward_adapter_does_not_lose_its_head(tmp_path):
    base = save_language_model("llama", tmp_path / "base")
    model = add_adapter(RewardModel(base, device="cpu"), lora_config(2))
    model.save_pretrained(tmp_path / "reward", word_tokenizer())
    with pytest.raises(ValueError, match="an adapter with a reward head, .*score.weight"):
        RewardModel(tmp_path / "reward", device="cpu")


def test_an_adapter_that_fits_in_part_is_refused(tmp_path):
    adapter, _ = sft(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected an adapter of the same form"):
        RewardModel(adapter, device="cpu")


def test_nothing_is_merged_into_a_quantized_base_model(tmp_path):
    adapter, _ = sft(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="is quantized, .* would be rounded away"):
        RewardModel(adapter, device="cpu", quantization_config=config)


# An adapter for rewards on top


def test_a_second_adapter_requires_a_base_model_that_others_can_open(tmp_path):
    adapter, expected = sft(tmp_path)
    with pytest.raises(ValueError, match="expected a base model that is saved"):
        add_adapter(RewardModel(adapter, device="cpu"), lora_config(2))
    merged = merge_sft_adapter(adapter, tmp_path / "merged")
    torch.testing.assert_close(hidden_states(RewardModel(merged, device="cpu")), expected, atol=1e-5, rtol=1e-5)
    assert AutoModelForCausalLM.from_pretrained(merged)(IDS).logits.shape == (2, 4, 64)


def test_a_merge_that_does_not_end_leaves_the_earlier_model(tmp_path, monkeypatch):
    adapter, expected = sft(tmp_path)
    merged = tmp_path / "merged"

    def full(tokenizer, folder, *args, **kwargs):
        raise OSError("No space left on device")

    def fail():
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
            merge_sft_adapter(adapter, merged, "bfloat16")
        assert not (merged / ".part").exists()

    fail()
    assert not list(merged.iterdir())
    merge_sft_adapter(adapter, merged)
    before = {path.name: path.read_bytes() for path in merged.iterdir()}
    fail()
    assert {path.name: path.read_bytes() for path in merged.iterdir()} == before
    torch.testing.assert_close(hidden_states(RewardModel(merged, device="cpu")), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_whose_base_model_is_an_adapter_is_refused(tmp_path):
    "PEFT opens it with other rewards, and only a warning."
    adapter, _ = sft(tmp_path)
    merged = merge_sft_adapter(adapter, tmp_path / "merged")
    reward = tmp_path / "reward"
    add_adapter(RewardModel(merged, device="cpu"), lora_config(2)).save_pretrained(reward, word_tokenizer())
    config = json.loads((reward / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(adapter)
    (reward / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is an adapter itself"):
        RewardModel.from_pretrained(reward, device="cpu")


def run_train(adapter, folder, *options):
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(
        json.dumps({"prompt": f"w{i} ", "chosen": f"w{i + 1}", "rejected": f"w{i + 2}"}) for i in range(3, 40)
    ))
    fixed = ["--max_steps", "1", "--learning_rate", "1e-3", "--use_cpu", "--save_strategy", "no", "--report_to", "none"]
    fixed += ["--disable_tqdm", "true", "--eval_strategy", "no", "--output_dir", str(folder / "out")]
    train(["--model", str(adapter), "--dataset", str(rows), *fixed, *options])
    return folder / "out"


def test_training_starts_from_an_adapter(tmp_path, caplog):
    adapter, expected = sft(tmp_path)
    with caplog.at_level(logging.INFO, "rlhf_reward"):
        out = run_train(adapter, tmp_path, "--learning_rate", "1e-12")
    text = caplog.text
    assert "merged into its base model" in text and "has no reward head to continue from" in text
    model = RewardModel.from_pretrained(out, device="cpu")
    torch.testing.assert_close(hidden_states(model), expected, atol=1e-4, rtol=1e-4)
    assert is_reward_model(out) and (out / "tokenizer.json").is_file()


def test_a_reward_adapter_is_trained_on_a_merged_adapter(tmp_path):
    "The merged base model is in the output folder, so that the reward is the same in PEFT."
    adapter, expected = sft(tmp_path)
    out = run_train(adapter, tmp_path, "--lora_r", "2")
    saved = json.loads((out / "adapter_config.json").read_text())
    assert Path(saved["base_model_name_or_path"]) == out / "base"
    torch.testing.assert_close(hidden_states(RewardModel(out / "base", device="cpu")), expected, atol=1e-5, rtol=1e-5)
    assert "base_model.model.score.weight" in load_file(out / "adapter_model.safetensors")
    here = RewardModel.from_pretrained(out, device="cpu")
    elsewhere = AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=1).eval()
    with torch.no_grad():
        torch.testing.assert_close(here(IDS), elsewhere(IDS).logits, atol=1e-5, rtol=1e-5)
    assert (here(IDS) - here(IDS.flip(1))).abs().max() > 1e-4
