"Small models of many families, built from configs and saved as ordinary language-model checkpoints."

import copy

import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from rlhf_reward import RewardModel

VOCAB = 64  # every id has an embedding row and a token, so that no row is free for a new pad token
PAD, BOS, EOS = 0, 1, 2
SIZE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
IDS = dict(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
LLAMA = {**SIZE, **IDS, "num_key_value_heads": 2}
HEADS = {**LLAMA, "head_dim": 8}
GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS)
BLOOM = dict(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, **IDS)
GPT_NEO = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    attention_types=[[["global", "local"], 1]],
    window_size=4,
    max_position_embeddings=64,
    **IDS,
)

DECODERS = {  # with a sequence classifier in transformers
    "llama": T.LlamaConfig(**LLAMA),
    "qwen2": T.Qwen2Config(**LLAMA),
    "qwen3": T.Qwen3Config(**HEADS),
    "mistral": T.MistralConfig(**LLAMA, sliding_window=4),
    "gemma2": T.Gemma2Config(**HEADS, sliding_window=4),
    "gemma3_text": T.Gemma3TextConfig(**HEADS, sliding_window=4),
    "gpt2": T.GPT2Config(**GPT2),
    "gpt_neox": T.GPTNeoXConfig(**SIZE, **IDS),
    "opt": T.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **IDS,
    ),
    "phi": T.PhiConfig(**LLAMA),
    "falcon": T.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **IDS),
    "bloom": T.BloomConfig(**BLOOM),
    "mixtral": T.MixtralConfig(**LLAMA, num_local_experts=4),
    "qwen3_moe": T.Qwen3MoeConfig(**HEADS, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2),
}
DECODERS_ALONE = {  # without one, or with a head of another form
    "cohere": T.CohereConfig(**LLAMA),
    "cohere2": T.Cohere2Config(**LLAMA, sliding_window=4),
    "granite": T.GraniteConfig(**LLAMA),
    "mamba": T.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, **IDS),
    "ctrl": T.CTRLConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, dff=48, n_positions=64),
}
ENCODERS = {
    "bert": T.BertConfig(**SIZE, pad_token_id=PAD),
    "roberta": T.RobertaConfig(**SIZE, **IDS),
    "deberta-v2": T.DebertaV2Config(
        **SIZE, pad_token_id=PAD, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False
    ),
    "distilbert": T.DistilBertConfig(
        vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64, pad_token_id=PAD
    ),
    "squeezebert": T.SqueezeBertConfig(**SIZE, embedding_size=32, pad_token_id=PAD),
    "modernbert": T.ModernBertConfig(
        **{**SIZE, "num_hidden_layers": 3}, **IDS, cls_token_id=BOS, sep_token_id=EOS, local_attention=4
    ),
}
MORE_DECODERS = {  # in addition to those above, to be packed
    "mistral_without_window": T.MistralConfig(**LLAMA, sliding_window=None),
    "gemma": T.GemmaConfig(**HEADS),
    "phi3": T.Phi3Config(**LLAMA, sliding_window=4),
    "stablelm": T.StableLmConfig(**LLAMA),
    "olmo2": T.Olmo2Config(**LLAMA),
    "smollm3": T.SmolLM3Config(**LLAMA),
    "starcoder2": T.Starcoder2Config(**LLAMA, sliding_window=4),
    "deepseek_v3": T.DeepseekV3Config(
        **{**LLAMA, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "glm4": T.Glm4Config(**HEADS),
    "xglm": T.XGLMConfig(
        vocab_size=VOCAB, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=64, **IDS
    ),
    "codegen": T.CodeGenConfig(**GPT2, rotary_dim=4),
    "gptj": T.GPTJConfig(**GPT2, rotary_dim=4),
    "ministral": T.MinistralConfig(**HEADS, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "olmo3": T.Olmo3Config(**LLAMA, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "gpt_oss": T.GptOssConfig(
        **HEADS,
        sliding_window=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "llama4_text": T.Llama4TextConfig(
        **HEADS,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=4,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "gpt_neo": T.GPTNeoConfig(**GPT_NEO),
}
NOT_PACKABLE = {"bloom", "mamba", "ctrl", "gpt_neo"}
PACKABLE = [family for family in (*DECODERS, *DECODERS_ALONE, *MORE_DECODERS) if family not in NOT_PACKABLE]
CONFIGS = {**DECODERS, **DECODERS_ALONE, **ENCODERS, **MORE_DECODERS}


def save_language_model(family, folder, **options):
    "A checkpoint of the family with weights large enough that its rewards differ clearly between texts."
    config = copy.deepcopy(CONFIGS[family])
    config.update(options)
    auto = (
        T.AutoModelForMaskedLM if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else T.AutoModelForCausalLM
    )
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def word_tokenizer(**special):
    "A tokenizer of `VOCAB` words: <pad>, <bos>, <eos>, w3, w4, …"
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", **special}
    return T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


def save_chat_reward_model(folder, chat_template=CHAT_TEMPLATE):
    "Save a reward model on a llama, whose tokenizer has words and a chat template. Return its folder."
    tokenizer = word_tokenizer()
    tokenizer.chat_template = chat_template
    base = save_language_model("llama", folder / "base")
    RewardModel(base, 0.0, "cpu").save_pretrained(folder / "reward", tokenizer)
    return str(folder / "reward")


def padded(rows, side, pad, width=None):
    "`input_ids` and `attention_mask` of rows of ids."
    width = width or max(map(len, rows)) + 2
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[index, start : start + len(row)] = torch.as_tensor(row)
        mask[index, start : start + len(row)] = 1
    return ids, mask
