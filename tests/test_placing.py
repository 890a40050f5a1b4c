"A device map of transformers is honored where it is given, and quantized models open by the same road."
import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from architectures import ENCODERS, save_language_model, word_tokenizer
from rlhf_reward import RewardConfig, RewardModel, RewardTrainer
from rlhf_reward.adapters import add_adapter, lora_config
from rlhf_reward.encoders import EncoderClassifier
from rlhf_reward.placing import input_device
from rlhf_reward.scoring import Scorer
from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder

IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
SPREAD = {"embed_tokens": "cpu", "rotary_emb": "cpu", "layers.0": "disk", "layers.1": "cpu", "norm": "cpu"}
MAPS = {"auto": "auto", "one": {"": "cpu"}, "spread": SPREAD}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A reward model and its rewards."
    folder = tmp_path_factory.mktemp("saved")
    model = RewardModel(save_language_model("llama", folder / "base"), device="cpu")
    model.save_pretrained(folder / "reward", word_tokenizer())
    with torch.no_grad():
        return folder, model(IDS)


@torch.no_grad()
@pytest.mark.parametrize("kind", MAPS)
def test_a_device_map_is_honored(kind, saved, tmp_path):
    "The default device, a GPU that is not here, is not used; offloaded weights stay where they are."
    folder, expected = saved
    options = {"device_map": MAPS[kind], "offload_folder": str(tmp_path)}
    model = RewardModel.from_pretrained(folder / "reward", **options)
    torch.testing.assert_close(model(IDS), expected, atol=1e-6, rtol=1e-6)
    is_spread = kind == "spread"
    assert any(parameter.is_meta for parameter in model.parameters()) == is_spread
    assert getattr(model, "hf_device_map", None) == (SPREAD if is_spread else None) # by which the Trainer moves nothing
    assert input_device(model).type == model.score.weight.device.type == "cpu"
    new = RewardModel(str(folder / "base"), **options)
    new.score.load_state_dict(model.score.state_dict())
    torch.testing.assert_close(new(IDS), expected, atol=1e-6, rtol=1e-6)
    scorer = Scorer.from_pretrained(folder / "reward", **options)
    plain = Scorer.from_pretrained(folder / "reward", device="cpu")
    assert scorer.score([None], ["w5 w6"]) == pytest.approx(plain.score([None], ["w5 w6"]), abs=1e-6)


@torch.no_grad()
def test_an_offloaded_embedding_gets_inputs_in_memory(saved, tmp_path):
    folder, expected = saved
    device_map = {**SPREAD, "embed_tokens": "disk"}
    options = {"device_map": device_map, "offload_folder": str(tmp_path)}
    model = RewardModel.from_pretrained(folder / "reward", **options)
    assert next(model.parameters()).is_meta and input_device(model).type == "cpu"
    scorer = Scorer.from_pretrained(folder / "reward", **options)
    plain = Scorer.from_pretrained(folder / "reward", device="cpu")
    assert scorer.tokens_per_batch == plain.tokens_per_batch
    assert scorer.score([None], ["w5 w6"]) == pytest.approx(plain.score([None], ["w5 w6"]), abs=1e-6)


def test_offloaded_weights_are_not_saved(saved, tmp_path):
    folder, _ = saved
    model = RewardModel.from_pretrained(folder / "reward", device_map=SPREAD, offload_folder=str(tmp_path / "disk"))
    with pytest.raises(ValueError, match="9 weights are offloaded by the device map"):
        model.save_pretrained(tmp_path / "out", word_tokenizer())


def test_an_adapter_is_put_on_weights_in_memory_alone(saved, tmp_path):
    "On offloaded ones it would return rewards that are no numbers."
    folder, _ = saved
    model = add_adapter(RewardModel(str(folder / "base"), device="cpu"), lora_config(2))
    model.save_pretrained(tmp_path / "adapter", word_tokenizer())
    again = RewardModel.from_pretrained(tmp_path / "adapter", device_map="auto")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS), model(IDS), atol=1e-6, rtol=1e-6)
    options = {"device_map": SPREAD, "offload_folder": str(tmp_path / "disk")}
    with pytest.raises(ValueError, match="9 weights are offloaded"):
        RewardModel.from_pretrained(tmp_path / "adapter", **options)
    with pytest.raises(ValueError, match="9 weights are offloaded"):
        add_adapter(RewardModel(str(folder / "base"), **options), lora_config(2))


def test_the_trainer_sees_the_device_map_through_an_adapter(saved):
    model = RewardModel(str(saved[0] / "base"), device="cpu")
    assert not hasattr(model, "hf_device_map")
    model.backbone.hf_device_map = {"embed_tokens": 0, "layers": 1}
    assert add_adapter(model, lora_config(2)).hf_device_map == {"embed_tokens": 0, "layers": 1}


@torch.no_grad()
def test_an_sft_adapter_takes_a_device_map(saved, tmp_path):
    folder, _ = saved
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    language_model = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = get_peft_model(language_model, copy.deepcopy(config)).eval()
    adapted.save_pretrained(tmp_path / "sft")
    model = RewardModel(tmp_path / "sft", device_map={"": "cpu"})
    expected = adapted(IDS, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(model.backbone(IDS).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_encoders_take_a_device_map(tmp_path):
    config = type(ENCODERS["bert"]).from_dict({**ENCODERS["bert"].to_dict(), "num_labels": 1})
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    classifier.save_pretrained(tmp_path)
    model = EncoderClassifier(str(tmp_path), device_map="auto")
    mask = torch.ones_like(IDS)
    rewards = model(IDS, mask, torch.zeros_like(IDS))
    torch.testing.assert_close(rewards, classifier(IDS).logits, atol=1e-6, rtol=1e-6)


def test_without_a_device_map_a_missing_gpu_is_named(saved):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        RewardModel(str(saved[0] / "base"))


def test_a_model_with_a_device_map_trains(tmp_path):
    base = tiny_decoder(tmp_path / "base", synthetic_texts())
    args = RewardConfig(
        str(tmp_path / "out"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=2,
        learning_rate=1e-3,
        save_strategy="no",
    )
    model = RewardModel(base, device_map="auto")
    before = model.score.weight.clone()
    tokenizer = AutoTokenizer.from_pretrained(base)
    RewardTrainer(
        model,
        args,
        train_dataset=synthetic_comparisons(40),
        eval_dataset=synthetic_comparisons(8),
        processing_class=tokenizer,
    ).train()
    assert not torch.equal(model.score.weight, before)


# 8 and 4 bits

BITS = {8: BitsAndBytesConfig(load_in_8bit=True), 4: BitsAndBytesConfig(load_in_4bit=True)}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("device_map", [None, {"": "cpu"}], ids=["device", "device map"])
@pytest.mark.parametrize("bits", BITS)
def test_quantized_models_open_score_and_come_back(bits, device_map, family, tmp_path):
    "With gradients: without them bitsandbytes packs 4 bits for CPUs, for which these layers are too small."
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = save_language_model(family, tmp_path / "base")
    RewardModel(base, device="cpu").save_pretrained(tmp_path / "whole", word_tokenizer())
    whole = RewardModel.from_pretrained(tmp_path / "whole", device="cpu")
    options = {"device": "cpu"} if device_map is None else {"device_map": device_map}
    model = RewardModel.from_pretrained(tmp_path / "whole", quantization_config=BITS[bits], **options)
    small = {parameter.dtype for parameter in model.backbone.layers.parameters()} & {torch.int8, torch.uint8}
    assert small == {torch.int8 if bits == 8 else torch.uint8}
    assert torch.equal(model.score.weight, whole.score.weight) and model.score.weight.dtype == torch.float32
    error = (model(IDS) - whole(IDS)).abs().max()
    assert 0 < error < (0.1 if bits == 8 else 1.0) * whole(IDS).abs().max()
    # saved quantized, it opens here and elsewhere
    model.save_pretrained(tmp_path / "quantized", word_tokenizer())
    again = RewardModel.from_pretrained(tmp_path / "quantized", **options)
    torch.testing.assert_close(again(IDS), model(IDS), atol=1e-5, rtol=1e-5)
    elsewhere = AutoModelForSequenceClassification.from_pretrained(tmp_path / "quantized").eval()
    torch.testing.assert_close(elsewhere(IDS).logits, model(IDS), atol=1e-5, rtol=1e-5)
