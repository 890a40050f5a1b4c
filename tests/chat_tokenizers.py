"Byte-level tokenizers that begin, end and template texts like those of well-known chat models."

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

HEADER = "{% for m in messages %}<|start|>{{ m.role }}<|end_header|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
FAMILIES = {  # template, bos, eos, whether the tokenizer itself writes bos and eos
    "llama 3": ("{{ bos_token }}" + HEADER, "<|begin|>", "<|eot|>", "<|begin|> $A"),  # bos by both
    # eos, then a line break
    "qwen": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        None,
        "<|im_end|>",
        "$A",
    ),
    # turns end otherwise than texts
    "gemma": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}",
        "<bos>",
        "<eos>",
        "<bos> $A",
    ),
    # bos by the tokenizer only
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}",
        "<s>",
        "</s>",
        "<s> $A",
    ),
    # eos by both
    "phi 3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{{ eos_token }}",
        None,
        "<|endoftext|>",
        "$A <|endoftext|>",
    ),
}


def chat_tokenizer(family):
    "Return the tokenizer of one of the families."
    template, bos, eos, alone = FAMILIES[family]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("a", "b"), ("b", "a"), ("Ċ", "Ċ")]
    tokens = [*letters, *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    turns = [
        "<|start|>",
        "<|end_header|>",
        "<|im_start|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|user|>",
        "<|assistant|>",
        "<|end|>",
    ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token="<|pad|>",
        additional_special_tokens=turns,
        chat_template=template,
    )
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos) if token]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=alone, special_tokens=special
    )
    return tokenizer
