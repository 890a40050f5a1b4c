"Tiny checkpoints of families that read more than text, saved as transformers saves them."

import json

import torch
import transformers as T
from safetensors.torch import save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from architectures import HEADS, LLAMA

VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
TOWER = {**VISION, "image_size": 16, "patch_size": 8}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model"}
QWEN_VISION = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, patch_size=8)
DEEPSTACK = {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 4}
ROPE = dict(rope_type="default", rope_theta=10000.0)
PLAIN_MROPE = {**ROPE, "mrope_section": [1, 1, 2]}
INTERLEAVED = {**ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
PLACES = dict(image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
EXPERTS = dict(num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2)
LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)
GEMMA = {**HEADS, "sliding_window": 4}
LLAMA4 = {**HEADS, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8}
TWO_TYPES = ["sliding_attention", "full_attention"]
BY_LAYER = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=64)
LLAMA_TEXT = T.LlamaConfig(**LLAMA)
QWEN2_TEXT = T.Qwen2Config(**LLAMA)


def gemma3():
    return T.Gemma3Config(text_config=GEMMA, vision_config=TOWER, mm_tokens_per_image=4)


def gemma3n():
    text = {
        **GEMMA,
        **BY_LAYER,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "layer_types": TWO_TYPES * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    }
    return T.Gemma3nConfig(text_config=text)


def gemma4():
    text = {**GEMMA, **BY_LAYER, "global_head_dim": 8, "layer_types": TWO_TYPES}
    return T.Gemma4Config(text_config=text, vision_config={**VISION, "num_key_value_heads": 2, "head_dim": 8})


def llama4():
    vision = {**TOWER, "intermediate_size": 64, "vision_output_dim": 16}
    return T.Llama4Config(
        text_config=LLAMA4, vision_config={**vision, "projector_input_dim": 16, "projector_output_dim": 16}
    )


def mistral3():
    text = T.MistralConfig(**LLAMA, sliding_window=4)
    return T.Mistral3Config(text_config=text, vision_config={**TOWER, "model_type": "pixtral"})


def ministral3():
    rope = {**ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
    text = T.Ministral3Config(**HEADS, rope_parameters=rope)
    return T.Mistral3Config(text_config=text, vision_config={**TOWER, "model_type": "pixtral"})


def qwen2_vl():
    vision = dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2)
    return T.Qwen2VLConfig(text_config={**LLAMA, "rope_parameters": PLAIN_MROPE}, vision_config=vision, **PLACES)


def qwen2_5_vl():
    text = {**LLAMA, "rope_parameters": PLAIN_MROPE}
    return T.Qwen2_5_VLConfig(text_config=text, vision_config=QWEN_VISION, **PLACES)


def qwen3_vl():
    text = {**HEADS, "rope_parameters": INTERLEAVED}
    return T.Qwen3VLConfig(text_config=text, vision_config=DEEPSTACK, **PLACES)


def qwen3_vl_moe():
    text = {**HEADS, **EXPERTS, "rope_parameters": INTERLEAVED}
    return T.Qwen3VLMoeConfig(text_config=text, vision_config=DEEPSTACK, **PLACES)


def qwen3_5():
    return T.Qwen3_5Config(text_config={**HEADS, **LINEAR}, vision_config=QWEN_VISION, **PLACES)


def qwen3_5_moe():
    text = {**HEADS, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16}
    return T.Qwen3_5MoeConfig(text_config=text, vision_config=QWEN_VISION, **PLACES)


def glm4v():
    text = {**LLAMA, "rope_parameters": PLAIN_MROPE}
    return T.Glm4vConfig(text_config=text, vision_config={**QWEN_VISION, "image_size": 16})


def llava():
    return T.LlavaConfig(text_config=LLAMA_TEXT, vision_config=T.CLIPVisionConfig(**TOWER))


def internvl():
    return T.InternVLConfig(
        text_config=QWEN2_TEXT, vision_config={**TOWER, "image_size": [16, 16], "patch_size": [8, 8]}
    )


def paligemma():
    return T.PaliGemmaConfig(text_config=T.GemmaConfig(**HEADS).to_dict(), vision_config=SIGLIP)


def idefics3():
    return T.Idefics3Config(text_config=LLAMA_TEXT, vision_config=TOWER)


def lfm2_vl():
    text = T.Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"])
    vision = {**VISION, "patch_size": 8, "model_type": "siglip2_vision_model"}
    return T.Lfm2VlConfig(text_config=text, vision_config=vision)


def aya_vision():
    return T.AyaVisionConfig(text_config=T.Cohere2Config(**LLAMA, sliding_window=4), vision_config=SIGLIP)


def qwen2_audio():
    audio = dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16)
    return T.Qwen2AudioConfig(text_config=QWEN2_TEXT, audio_config=audio)


# By family: its config, and the class in which a reward model on it is saved, None for the text part and the head.
COMPOSITES = {
    "gemma3": (gemma3, "Gemma3TextForSequenceClassification"),
    "gemma3n": (gemma3n, None),
    "gemma4": (gemma4, None),
    "llama4": (llama4, None),
    "mistral3": (mistral3, "MistralForSequenceClassification"),
    "ministral3": (ministral3, "Ministral3ForSequenceClassification"),
    "qwen2_vl": (qwen2_vl, "Qwen2ForSequenceClassification"),
    "qwen2_5_vl": (qwen2_5_vl, "Qwen2ForSequenceClassification"),
    "qwen3_vl": (qwen3_vl, "Qwen3ForSequenceClassification"),
    "qwen3_vl_moe": (qwen3_vl_moe, None),
    "qwen3_5": (qwen3_5, "Qwen3_5TextForSequenceClassification"),
    "qwen3_5_moe": (qwen3_5_moe, None),
    "glm4v": (glm4v, None),
    "llava": (llava, "LlamaForSequenceClassification"),
    "internvl": (internvl, "Qwen2ForSequenceClassification"),
    "idefics3": (idefics3, "LlamaForSequenceClassification"),
    "lfm2_vl": (lfm2_vl, None),
    "aya_vision": (aya_vision, None),
    "qwen2_audio": (qwen2_audio, "Qwen2ForSequenceClassification"),
}
CLASSIFIERS = ("gemma3", "qwen3_5")  # the composites that have a classifier themselves


@torch.no_grad()
def spread(model):
    "Make the weights large enough that rewards differ clearly between texts."
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def save_composite(family, folder, tokenizer, **values):
    "Save a language model of the family, with values in its config; return it."
    make_config, _ = COMPOSITES[family]
    config = make_config()
    for name, value in values.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    if family == "gemma3n":  # its vision tower needs a package
        model = _save_gemma3n(config, folder)
    else:
        model = spread(MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)](config))
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def _save_gemma3n(config, folder):
    model = spread(T.AutoModelForCausalLM.from_config(config.text_config))
    weights = {"model.vision_tower.weight": torch.zeros(2)}
    for name, weight in model.model.state_dict().items():
        weights[f"model.language_model.{name}"] = weight.clone()
    config.architectures = ["Gemma3nForConditionalGeneration"]
    config.save_pretrained(folder)
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    return model


def save_classifier(family, folder, tokenizer, **values):
    "Save transformers' classifier of a composite, with one label; return it."
    config = COMPOSITES[family][0]()
    for name, value in {"num_labels": 1, **values}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = spread(T.AutoModelForSequenceClassification.from_config(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def rename_weights(folder, rename):
    "Write the weights of a folder under other names, in two files with an index."
    from safetensors.torch import load_file

    weights = {rename(name): weight for name, weight in load_file(f"{folder}/model.safetensors").items()}
    names = sorted(weights)
    files = {}
    for number in (0, 1):
        part = {name: weights[name] for name in names[number::2]}
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file(part, f"{folder}/{file}", metadata={"format": "pt"})
        files.update(dict.fromkeys(part, file))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
