"The reward of a text does not depend on the lengths of others, where a backbone looks at the longest of a batch."
import copy

import pytest
import torch
import transformers as T
from datasets import Dataset
from torch import nn

from architectures import word_tokenizer
from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, Scorer
from rlhf_reward.adapters import lora_config
from rlhf_reward.packing import choose_layout, model_inputs, pack_comparisons, packing_difference
from rlhf_reward.rope import check_frequencies, length_limits
from rlhf_reward.tokens import tokenized_comparison

LIMIT = 16
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0, 11.0, 14.0, 17.0],
    "original_max_position_embeddings": LIMIT,
}
FAMILIES = {
    "phi3": {"original_max_position_embeddings": LIMIT},
    "phimoe": {"num_local_experts": 4, "original_max_position_embeddings": LIMIT},
    "llama": {},
    "qwen3": {"head_dim": 8},
}


def save_backbone(family, folder, rope, **options):
    torch.manual_seed(0)
    config = T.AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], **options}, rope_parameters=rope)
    model = T.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def longrope(family):
    if family == "phimoe":
        return {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3}
    return LONGROPE


def random_ids(count, seed):
    return torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def comparisons():
    "Short, long, and responses on both sides of the limit, with a shared prefix and without."
    sizes = [(4, (5, 7)), (10, (20, 30)), (6, (3, 10, 11, 40)), (0, (15, 16, 17, 18)), (16, (1, 9)), (15, (1, 2))]
    examples = []
    for seed, (prefix, rests) in enumerate(sizes):
        parts = [random_ids(length, 100 * seed + number) for number, length in enumerate(rests)]
        examples.append(tokenized_comparison(random_ids(prefix, seed), parts))
    return examples


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_have_the_reward_of_each_text_alone(family, tmp_path):
    folder = save_backbone(family, tmp_path, longrope(family))
    model = RewardModel(folder, device="cpu")
    backbone = T.AutoModel.from_pretrained(folder).eval()  # transformers itself, one text at a time
    texts = [random_ids(length, length) for length in (3, 15, 16, 17, 40)]
    ids = torch.zeros(5, 40, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for side in ("right", "left"):
        for row, text in enumerate(texts):
            columns = slice(0, len(text)) if side == "right" else slice(40 - len(text), 40)
            ids[row], mask[row] = 0, 0
            ids[row, columns] = torch.tensor(text)
            mask[row, columns] = 1
        with torch.no_grad():
            together = model(ids, mask).squeeze(1)
            alone = []
            for text in texts:
                alone.append(model.score(backbone(torch.tensor([text])).last_hidden_state[0, -1]))
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_with_responses_on_both_sides(family, tmp_path):
    model = RewardModel(save_backbone(family, tmp_path, longrope(family)), device="cpu")
    assert length_limits(model.config) == {LIMIT}
    layout = choose_layout(model, comparisons())
    assert layout.difference is None
    layout.apply_to(model)
    assert packing_difference(model, comparisons(), layout.collator) is None
    assert packing_difference(model, comparisons(), pack_comparisons) is not None  # which shares the prefix anyway


def test_scorer_and_copies_and_adapters(tmp_path):
    folder = save_backbone("phi3", tmp_path / "base", LONGROPE)
    model = RewardModel(folder, device="cpu")
    model.save_pretrained(tmp_path / "reward", T.AutoTokenizer.from_pretrained(folder))
    scorer = Scorer.from_pretrained(tmp_path / "reward", device="cpu")
    assert scorer.packs
    words = scorer.tokenizer.convert_ids_to_tokens(range(5, 40))
    texts = [" ".join(words[:length]) for length in (3, 12, 30)]
    alone = [scorer.score(["a"], [text])[0] for text in texts]
    assert scorer.score(["a"] * 3, texts) == pytest.approx(alone, abs=1e-5)
    assert copy.deepcopy(scorer).score(["a"] * 3, texts) == pytest.approx(alone, abs=1e-5)
    rows = [{"prompt": "a", "responses": texts, "scores": [1, 2, 3]}] * 4
    config = RewardConfig(
        str(tmp_path / "adapter"), max_steps=2, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    trainer = RewardTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=scorer.tokenizer,
        peft_config=lora_config(r=2),
    )
    trainer.train()
    trainer.save_model()
    adapted = Scorer.from_pretrained(tmp_path / "adapter", device="cpu")
    alone = [adapted.score(["a"], [text])[0] for text in texts]
    assert adapted.score(["a"] * 3, texts) == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_loss_of_a_batch_is_the_mean_of_its_comparisons(layout, tmp_path):
    "In training: short, long and mixed comparisons in one batch, against each alone."
    folder = save_backbone("phi3", tmp_path / "base", LONGROPE)
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    words = tokenizer.convert_ids_to_tokens(range(5, 40))
    rows = []
    for lengths in ((3, 5), (20, 30), (4, 28)):
        responses = [" ".join(words[:length]) for length in lengths]
        rows.append({"prompt": "a", "chosen": responses[0], "rejected": responses[1]})
    losses = []
    for size in (1, 3):
        torch.manual_seed(0)
        config = RewardConfig(
            str(tmp_path / str(size)),
            layout=layout,
            per_device_eval_batch_size=size,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        data = Dataset.from_list(rows)
        trainer = RewardTrainer(
            RewardModel(folder, 0.0, "cpu"),
            config,
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_dynamic_scaling_does_not_reach_texts_that_are_accepted(tmp_path):
    "Beyond its positions such a backbone keeps the frequencies of the longest text so far."
    folder = save_backbone(
        "llama", tmp_path, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, max_position_embeddings=24
    )
    model = RewardModel(folder, device="cpu")
    text = torch.tensor([random_ids(20, 0)])
    with torch.no_grad():
        before = model(text)
        assert model(torch.tensor([random_ids(24, 1)])).isfinite().all()
        with pytest.raises(ValueError, match="has 25 tokens.*at most 24"):
            model(torch.tensor([random_ids(25, 2)]))
        assert torch.equal(model(text), before)


def test_block_sparse_attention_is_refused(tmp_path):
    "BigBird changes its attention at the first short batch, for good."
    options = {**SMALL, "block_size": 4, "num_random_blocks": 1}
    T.BigBirdModel(T.BigBirdConfig(**options)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="original_full"):
        RewardModel(str(tmp_path), device="cpu")
    config = T.BigBirdConfig.from_pretrained(tmp_path)
    config.attention_type = "original_full"
    config.save_pretrained(tmp_path)
    assert RewardModel(str(tmp_path), device="cpu").backbone.base_model.attention_type == "original_full"


def test_dynamic_scaling_counts_the_tokens_of_a_text_and_not_its_padding(tmp_path):
    folder = save_backbone(
        "llama", tmp_path, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, max_position_embeddings=24
    )
    model = RewardModel(folder, device="cpu")
    text = torch.tensor([random_ids(20, 0)])
    with torch.no_grad():
        for padding in ((0, 20), (20, 0)):
            ids = nn.functional.pad(text, padding)
            torch.testing.assert_close(model(ids, (ids > 0).long()), model(text))
        several = [tokenized_comparison([], [random_ids(20, seed)]) for seed in range(3)]
        assert packing_difference(model, several) is None
        one_text = tokenized_comparison([], [random_ids(40, 0)])
        with pytest.raises(ValueError, match="has 40 tokens.*at most 24"):
            model(**model_inputs(pack_comparisons([one_text]), model))


class ByTheLongest(nn.Module):
    "Rotary positions of code that nobody here knows: they shrink where the longest text has more than 64 tokens."

    def __init__(self, remembers=False):
        super().__init__()
        self.remembers = remembers
        self.scale = 1.0

    def forward(self, states, position_ids):
        scale = 0.5 if position_ids.max() >= 64 else 1.0
        if self.remembers:
            scale, self.scale = self.scale, scale
        angles = position_ids[..., None] * scale * torch.ones(8)
        return angles.cos(), angles.sin()


@pytest.mark.parametrize("remembers", [False, True])
def test_a_model_that_chooses_positions_by_its_batch_is_refused_when_it_opens(remembers, tmp_path, monkeypatch):
    default = {"rope_type": "default", "rope_theta": 1e4}
    folder = save_backbone("llama", tmp_path, default, max_position_embeddings=65)
    RewardModel(folder, device="cpu")
    unknown = type("UnknownRotaryEmbedding", (ByTheLongest,), {})
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.LlamaRotaryEmbedding", lambda config: unknown(remembers)
    )
    with pytest.raises(ValueError, match="UnknownRotaryEmbedding.*would depend on its batch"):
        RewardModel(folder, device="cpu")
    save_backbone("llama", tmp_path, default, max_position_embeddings=64)  # it has no text that long
    RewardModel(folder, device="cpu")


def test_known_ways_to_scale_open(tmp_path):
    scaled = {"factor": 4.0, "original_max_position_embeddings": LIMIT}
    llama3 = {**scaled, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    ways = {"default": {}, "linear": {"factor": 4.0}, "dynamic": {"factor": 4.0}, "yarn": scaled, "llama3": llama3}
    for rope_type, options in ways.items():
        rope = {"rope_type": rope_type, "rope_theta": 1e4, **options}
        RewardModel(save_backbone("llama", tmp_path / rope_type, rope), device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_tells_of_longrope(family, tmp_path):
    model = RewardModel(save_backbone(family, tmp_path / "longrope", longrope(family)), device="cpu")
    frequencies = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    for module in frequencies:  # without the choice by text the check tells
        module._forward_hooks.clear()
    with pytest.raises(ValueError, match="would depend on its batch"):
        check_frequencies(model.backbone)


def mix_texts(model):
    "Let the texts of a batch share something, as experts with a capacity do."
    def subtract_mean(module, args, output):
        output.last_hidden_state = output.last_hidden_state - output.last_hidden_state.mean(dim=(0, 1))
        return output

    model.backbone.register_forward_hook(subtract_mean)


@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_a_model_that_mixes_the_texts_of_a_batch_is_refused(layout, tmp_path):
    folder = save_backbone("llama", tmp_path / "base", {"rope_type": "default", "rope_theta": 1e4})
    model = RewardModel(folder, device="cpu")
    mix_texts(model)
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match="in a padded batch; expected a model whose reward depends on the text only"):
        Scorer(model, tokenizer)
    rows = [{"prompt": "a", "chosen": "b c", "rejected": "d e f"}] * 4
    config = RewardConfig(str(tmp_path / "run"), layout=layout, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = RewardTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    with pytest.raises(ValueError, match="in a padded batch"):
        trainer.train()
    assert not model.training
