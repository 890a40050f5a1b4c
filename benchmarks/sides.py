"""
The sides that `against_trl.py` and `accuracy_trl.py` compare: the trainers of this library and of TRL.
"""
import torch
import transformers
from datasets import Dataset

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer
from rlhf_reward.comparison import ranked_pairs
from rlhf_reward.synthetic import tiny_decoder
from rlhf_reward.tokens import FEATURES, whole_sequences

VOCAB = 8192

# Settings of glibc that keep memory in the process: otherwise page faults take up to half of the padded sides' time
MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**29),
}


def tokenizer_and_model(folder, texts, width, layers):
    "Save a llama with random weights. Return its tokenizer, which is trained on the texts."
    tiny_decoder(
        folder,
        texts or ["words"],
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=4096,
        initializer_range=0.02,
    )
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(0)
    model = RewardModel(folder, 0.0, "cpu")
    model.backbone.resize_token_embeddings(VOCAB)
    model.save_pretrained(folder, tokenizer)
    return tokenizer


def ours(folder, examples, tokenizer, batch, **options):
    "Return this library's trainer."
    model = RewardModel.from_pretrained(folder, dropout=0.0, device="cpu")
    for module in model.modules(): # as TRL does
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    args = RewardConfig(
        str(folder / "ours"),
        per_device_train_batch_size=batch,
        **{"layout": "packed", **options},
    )
    dataset = Dataset.from_list(examples, features=FEATURES)
    return RewardTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)


def theirs(folder, examples, tokenizer, batch, checkpointing=False, grouped=False, **options):
    "Return TRL's trainer, on all pairs of the same comparisons."
    import trl

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    pairs = []
    for example in examples:
        sequences = whole_sequences(example)
        for winner, loser in ranked_pairs(example["ranks"]):
            chosen = sequences[winner]
            rejected = sequences[loser]
            length = max(len(chosen), len(rejected))
            pairs.append({"chosen_ids": chosen, "rejected_ids": rejected, "length": length})
    per_comparison = len(pairs) // len(examples)
    if grouped:
        options |= {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    args = trl.RewardConfig(
        str(folder / "theirs"),
        per_device_train_batch_size=batch * per_comparison,
        max_length=None,
        gradient_checkpointing=checkpointing,
        **options,
    )
    return trl.RewardTrainer(model, args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)


def print_nothing(*args, **kwargs):
    "Replace the callback that prints each log."
