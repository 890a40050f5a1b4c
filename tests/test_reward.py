import copy
import functools
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import transformers as T
from huggingface_hub.errors import LocalEntryNotFoundError
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from architectures import (
    CONFIGS,
    DECODERS,
    DECODERS_ALONE,
    ENCODERS,
    EOS,
    PAD,
    VOCAB,
    padded,
    save_language_model,
    word_tokenizer,
)
from rlhf_reward import RewardModel, checkpoint_files, hub_names
from rlhf_reward.reward import default_pooling, right_padded

CLOSE = dict(atol=1e-5, rtol=1e-5)
ROWS = [
    torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist() + [EOS]
    for length in (9, 5, 1, 7)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "Folder of a family's language model, saved once."
    made = {}

    def get(family):
        if family not in made:
            made[family] = save_language_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def reward_model(base, family, **kwargs):
    torch.manual_seed(1)
    return RewardModel(base(family), device="cpu", **kwargs)


@pytest.fixture(scope="module")
def opened(base):
    "A family's model, which no test may change, opened once."
    return functools.cache(lambda family: reward_model(base, family))


@torch.no_grad()
def alone(model, rows=ROWS):
    return torch.cat([model(torch.tensor([row])) for row in rows])


# The reward of a text


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_batch_equals_rows_alone(opened, family):
    model = opened(family)
    expected = alone(model)
    assert expected.std() > 0.02, "rewards too much alike to tell anything"
    for side, pad in itertools.product(("left", "right"), (PAD, EOS)):
        rewards = model(*padded(ROWS, side, pad))
        assert rewards.shape == (len(ROWS), 1) and rewards.dtype == torch.float32
        assert_close(rewards, expected, **CLOSE, msg=f"{side} {pad}")


def test_padding_may_be_on_both_sides_and_between(base):
    model = reward_model(base, "gpt2")
    ids = torch.tensor([[EOS, 5, EOS, 6, 7, EOS]])
    mask = torch.tensor([[0, 1, 0, 1, 1, 0]])
    with torch.no_grad():
        assert_close(model(ids, mask), model(torch.tensor([[5, 6, 7]])), **CLOSE)


def test_padding_needs_no_embedding(base):
    "The pad token that was added to a tokenizer has an id after the last row; losses mark padding by -100."
    model = reward_model(base, "llama")
    for pad in (VOCAB, -100):
        with torch.no_grad():
            assert_close(model(*padded(ROWS, "right", pad)), alone(model), **CLOSE)


def test_right_padded_moves_all_tensors_alike():
    mask, ids, positions = right_padded(
        torch.tensor([[0, 1, 0, 1]]), torch.tensor([[9, 5, 9, 6]]), torch.tensor([[0, 1, 2, 3]])
    )
    assert mask.tolist() == [[1, 1, 0, 0]] and ids[0, :2].tolist() == [5, 6] and positions[0, :2].tolist() == [1, 3]


def test_right_padded_keeps_the_order_of_long_rows():
    mask = torch.rand(3, 2000, generator=torch.Generator().manual_seed(0)).gt(0.5).long()
    ids = torch.arange(2000).repeat(3, 1)
    moved_mask, moved = right_padded(mask, ids)
    for row in range(3):
        assert torch.equal(moved[row][moved_mask[row].bool()], ids[row][mask[row].bool()])
        assert moved_mask[row].diff().max() <= 0


def test_missing_mask_means_all_real(base):
    model = reward_model(base, "llama")
    ids = torch.tensor([[5, 6, EOS], [7, EOS, EOS]])
    with torch.no_grad():
        assert_close(model(ids), model(ids, torch.ones_like(ids)))
        assert_close(model(ids, torch.ones_like(ids).bool()), model(ids))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_pooling_reads_the_token_it_names(base, family):
    "The reward by hand from the backbone's own hidden states."
    for pooling, place in (("first", 0), ("last", -1)):
        model = reward_model(base, family, pooling=pooling)
        assert model.pooling == pooling
        ids = torch.tensor([ROWS[0]])
        with torch.no_grad():
            hidden = model.backbone(input_ids=ids).last_hidden_state[0, place]
            assert_close(model(ids)[0, 0], hidden @ model.score.weight[0], **CLOSE)
    assert reward_model(base, family).pooling == ("last" if family == "llama" else "classifier")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "opt", "phi"])
def test_packed_rows_equal_plain_rows(base, family, attention):
    "Two rows, each a prompt with two responses after it, one of them with a padded end."
    model = reward_model(base, family, attn_implementation=attention)
    prompt, responses, width = [5, 6, 7, 8], [[9, 10, EOS], [11, EOS]], 10
    row = torch.tensor(prompt + responses[0] + responses[1] + [PAD])
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 4, 5, 0])
    visible = torch.ones(width, width).tril().bool()
    visible[7:, 4:7] = False
    mask = torch.zeros(width, width).masked_fill(~visible, torch.finfo(torch.float32).min)
    ends = torch.tensor([[0, 6], [0, 8], [1, 6], [1, 8]])
    with torch.no_grad():
        packed = model(row.repeat(2, 1), mask.repeat(2, 1, 1, 1), positions.repeat(2, 1), ends)
    plain = alone(model, [prompt + response for response in responses])
    assert packed.shape == (4, 1)
    assert_close(packed, plain.repeat(2, 1), **CLOSE)


def test_given_positions_go_with_their_tokens(base):
    model = reward_model(base, "gpt2")
    ids, mask = padded(ROWS, "left", PAD)
    with torch.no_grad():
        counted = model(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
        shifted = model(ids, mask, mask.cumsum(1))
    assert_close(counted, alone(model), **CLOSE)
    assert not torch.allclose(shifted, counted, atol=1e-3)


def test_dropout_works_in_training_only(base):
    model = reward_model(base, "llama", dropout=0.5)
    ids = torch.tensor([ROWS[0]])
    assert not model.training and torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


# The parts


def test_whole_model_is_on_the_device(base):
    model = reward_model(base, "llama").to("cpu")
    assert {parameter.device.type for parameter in RewardModel(base("llama"), device="meta").parameters()} == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_default_device_without_cuda_says_what_to_pass(base):
    with pytest.raises(ValueError, match=r"'cuda'.*Pass device='cpu'"):
        RewardModel(base("llama"))


def test_head_is_bias_free_with_the_standard_deviation_of_its_width(tmp_path):
    T.LlamaForCausalLM(
        T.LlamaConfig(
            **{**DECODERS["llama"].to_dict(), "hidden_size": 4096, "num_hidden_layers": 1, "intermediate_size": 8}
        )
    ).save_pretrained(tmp_path)
    model = RewardModel(str(tmp_path), device="cpu")
    assert model.score.bias is None and model.score.weight.shape == (1, 4096)
    assert model.score.weight.std().item() == pytest.approx(4097**-0.5, rel=0.05)  # 4 standard errors


def test_weights_are_float32_for_training_and_as_saved_for_scoring(base, tmp_path):
    reward_model(base, "llama", dtype=torch.bfloat16).save_pretrained(tmp_path, word_tokenizer())

    def dtype(model):
        return next(model.backbone.parameters()).dtype

    assert dtype(RewardModel(tmp_path, device="cpu")) == torch.float32
    assert dtype(RewardModel.from_pretrained(tmp_path, device="cpu")) == torch.bfloat16


def test_rewards_are_float32_whatever_the_backbone(base):
    ids, mask = padded(ROWS, "right", PAD)
    expected = reward_model(base, "llama")(ids, mask)
    half = reward_model(base, "llama", dtype=torch.bfloat16)
    assert next(half.backbone.parameters()).dtype == torch.bfloat16 and half.score.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = reward_model(base, "llama")(ids, mask)
    for rewards in (half(ids, mask), autocast, half.to(torch.bfloat16)(ids, mask)):
        assert rewards.dtype == torch.float32
        assert_close(rewards, expected, atol=0.1, rtol=0.1)
        assert not torch.equal(rewards, expected)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_head_and_backbone_get_gradients(base, family):
    model = reward_model(base, family).train()
    model(*padded(ROWS, "left", PAD)).sum().backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert without == []


# Checkpoints


def with_labels(family, num_labels):
    config = copy.deepcopy(DECODERS[family])
    config.num_labels = num_labels
    return config


def check_opens_elsewhere(folder, model, texts):
    "The saved classifier with the saved tokenizer, padding as that does by itself."
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = T.PreTrainedTokenizerFast.from_pretrained(
        folder
    )  # AutoTokenizer reads every qwen2 folder as byte-level BPE, which these words are not
    assert classifier.config.num_labels == 1 and classifier.config.problem_type == "regression"
    assert classifier.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    batch = tokenizer(texts, padding=True, return_token_type_ids=False, return_tensors="pt")
    with torch.no_grad():
        rewards = alone(model, [tokenizer(text)["input_ids"] for text in texts])
        assert_close(classifier(**batch).logits.float(), rewards, **CLOSE)
        assert_close(RewardModel.from_pretrained(folder, device="cpu")(**batch), rewards, **CLOSE)


TEXTS = ["w5 w6 w7 w8 <eos>", "w9 <eos>", "w10 w11 w12 <eos>", "w10 w3"]


SPECIAL = {
    "pad": {},
    "pad=eos": {"pad_token": "<eos>"},
    "no pad": {"pad_token": None},
    "pad=unk": {"pad_token": "w3", "unk_token": "w3"},
}
TOKENIZERS = list(itertools.product(SPECIAL, ("left", "right")))
# One family with each tokenizer, the others with one of them in turn, those that learn their positions from both sides:
# the head is read where the mask ends, which no family does by itself.
OTHERS = [family for family in DECODERS if family != "llama"]
BOTH_SIDES = itertools.product(("opt", "gpt2"), itertools.product(["pad=eos", "no pad"], ("left", "right")))
OPENED = dict.fromkeys(
    [*itertools.product(["llama"], TOKENIZERS), *zip(OTHERS, itertools.cycle(TOKENIZERS)), *BOTH_SIDES]
)


@pytest.mark.parametrize("family, tokenizer", OPENED)
def test_decoder_opens_in_transformers_with_the_same_rewards(opened, tmp_path, family, tokenizer):
    model = opened(family)
    special, side = tokenizer
    tokenizer = word_tokenizer(padding_side=side, **SPECIAL[special])
    before, rows = tokenizer.pad_token, model.get_input_embeddings().num_embeddings
    model.save_pretrained(tmp_path, tokenizer)
    assert (tokenizer.pad_token, model.get_input_embeddings().num_embeddings) == (
        before,
        rows,
    ), "saving changed what is in memory"
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pth")] == []
    check_opens_elsewhere(tmp_path, model, TEXTS)


@pytest.mark.parametrize("family", {**DECODERS_ALONE, **ENCODERS})
def test_others_open_here_and_their_config_says_so(base, tmp_path, family):
    model = reward_model(base, family, pooling="first" if family in ENCODERS else None)
    model.save_pretrained(tmp_path, word_tokenizer())
    saved = json.loads((tmp_path / "config.json").read_text())["rlhf_reward"]
    assert not saved["opens_as_sequence_classification"] and "RewardModel.from_pretrained" in saved["note"]
    assert_close(alone(RewardModel.from_pretrained(tmp_path, device="cpu")), alone(model))


def test_chosen_pooling_is_saved(base, tmp_path):
    model = reward_model(base, "llama", pooling="first")
    model.save_pretrained(tmp_path, word_tokenizer())
    again = RewardModel.from_pretrained(tmp_path, device="cpu")
    assert again.pooling == "first" and torch.equal(alone(again), alone(model))
    assert not json.loads((tmp_path / "config.json").read_text())["rlhf_reward"]["opens_as_sequence_classification"]


@pytest.mark.parametrize("shard_size", ["50GB", "10KB"], ids=["one file", "sharded"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_classifier_made_elsewhere_opens_here(tmp_path, family, shard_size):
    torch.manual_seed(0)
    config = with_labels(family, 1)
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    classifier.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "10KB")
    with torch.no_grad():
        expected = torch.cat([classifier(torch.tensor([row])).logits for row in ROWS])
    assert_close(alone(RewardModel.from_pretrained(tmp_path, device="cpu")), expected, **CLOSE)


def test_bfloat16_checkpoint_keeps_its_head(base, tmp_path):
    model = reward_model(base, "llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, word_tokenizer())
    again = RewardModel.from_pretrained(tmp_path, device="cpu")
    assert next(again.backbone.parameters()).dtype == torch.bfloat16
    assert torch.equal(again.score.weight, model.score.weight) and torch.equal(alone(again), alone(model))


def test_gathered_state_dict_is_what_is_written(base, tmp_path):
    model = reward_model(base, "gpt2")
    gathered = {name: 2 * weight for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path, word_tokenizer(pad_token="<eos>"), gathered)
    saved = RewardModel.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(saved.score.weight, 2 * model.score.weight)
    assert torch.equal(saved.get_input_embeddings().weight[:VOCAB], 2 * model.get_input_embeddings().weight)


def test_chat_template_lies_beside_the_weights(base, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    reward_model(base, "llama").save_pretrained(tmp_path, tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


# What goes wrong


@pytest.mark.parametrize(
    "inputs, message",
    [
        (lambda ids, mask: (ids[0],), r"shape \(4,\).*expected token ids \(batch_size, seq_len\)"),
        (lambda ids, mask: (ids.float(),), r"torch.float32.*expected token ids"),
        (lambda ids, mask: (ids, mask[:, :2]), r"shape \(2, 2\).*expected \(2, 4\)"),
        (lambda ids, mask: (ids, mask[:, None, None]), r"shape \(2, 1, 1, 4\).*expected \(2, 4\)"),
        (
            lambda ids, mask: (ids, torch.ones(2, 1, 4, 4).bool(), None, torch.zeros(1, 2).long()),
            r"torch.bool.*a float mask",
        ),
        (lambda ids, mask: (ids, torch.zeros(2, 1, 4, 4)), "pass end_positions"),
        (lambda ids, mask: (ids, mask * torch.tensor([[1], [0]])), "Row 1 .* all 0"),
        (lambda ids, mask: (ids + VOCAB, mask), rf"id {VOCAB + 5} at \(row, position\) \(0, 0\).*0 to {VOCAB - 1}"),
        (lambda ids, mask: (ids - 6, mask), r"id -1 at"),
        (lambda ids, mask: (ids, mask, torch.arange(4)), r"position_ids has shape \(4,\); expected \(2, 4\)"),
        (lambda ids, mask: (ids, {"full_attention": mask}), "pass end_positions"),
        (lambda ids, mask: (ids, torch.zeros(3, 1, 4, 4), None, torch.zeros(1, 2).long()), r"shape \(3, 1, 4, 4\)"),
        (
            lambda ids, mask: (ids, mask, None, torch.tensor([[0, 3], [1, -1]])),
            r"end_positions has \[1, -1\]; expected .* inside \(2, 4\)",
        ),
        (lambda ids, mask: (ids, mask, None, torch.tensor([[2, 0]])), r"end_positions has \[2, 0\]"),
        (
            lambda ids, mask: (ids, mask, None, torch.tensor([3])),
            r"end_positions has shape \(1,\); expected \(num_responses, 2\)",
        ),
    ],
)
def test_bad_inputs_are_named(base, inputs, message):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with pytest.raises(ValueError, match=message):
        reward_model(base, "llama")(*inputs(ids, torch.ones_like(ids)))


@pytest.mark.parametrize(
    "config, message",
    [
        (T.ViTConfig(), "'vit'.*more or other than text"),
        (T.T5Config(), "'t5', an encoder-decoder"),
        (T.BartConfig(), "'bart', an encoder-decoder"),
        (T.PaliGemmaConfig(), "'paligemma'.*text part that is a causal decoder"),
        (T.CLIPConfig(), "'clip'.*other than text"),
        (T.Wav2Vec2Config(), "'wav2vec2'.*no language model"),
        (T.FNetConfig(), "'fnet', in which padding changes"),
        (T.YosoConfig(), "'yoso', in which padding changes"),
        (T.ConvBertConfig(), "'convbert', in which padding changes"),
        (T.NystromformerConfig(), "'nystromformer', in which padding changes"),
    ],
)
def test_other_kinds_of_checkpoint_are_refused(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        RewardModel(str(tmp_path), device="cpu")


def test_decoder_form_of_an_encoder_family_pools_last():
    assert default_pooling(T.BertConfig(is_decoder=True)) == "last"


def test_path_without_config_is_named(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(FileNotFoundError, match=r"no config.json.*holds \['notes.txt'\]"):
        RewardModel(str(tmp_path), device="cpu")
    for missing in (str(tmp_path / "missing"), "./missing", "runs/demo/missing", Path("missing"), "~/missing"):
        with pytest.raises(FileNotFoundError, match="does not exist; expected the name"):
            RewardModel(missing, device="cpu")
    with pytest.raises(FileNotFoundError, match="is a file; expected the name"):
        RewardModel(str(tmp_path / "notes.txt"), device="cpu")

    def from_pretrained(*args, **kwargs):
        raise OSError("no such repository")

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    monkeypatch.setattr(checkpoint_files, "cached_file", from_pretrained)
    with pytest.raises(
        OSError, match=r"'runs/x' is no folder in .* could not be opened on the hub; expected .*no such repository"
    ):
        RewardModel("runs/x", device="cpu")


def test_a_name_on_the_hub_is_reported_before_the_search(tmp_path, monkeypatch, caplog):
    "A similar folder is named, and without a connection the hub is tried for one file only."
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_names.constants, "HF_HUB_CACHE", str(tmp_path))
    for switch in hub_names.SWITCHES:
        monkeypatch.delenv(switch, raising=False)
    tried = []

    def look_up(name, file="config.json", **options):
        tried.append(file)
        raise OSError("no connection") from LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(checkpoint_files, "cached_file", look_up)
    monkeypatch.setattr(AutoConfig, "from_pretrained", look_up)
    expected = r"'my-modle' is no folder in .* \(did you mean 'my-model'\?\)"
    with pytest.raises(OSError, match=expected + " and could .*connection to the internet, or give the path of a copy"):
        RewardModel("my-modle", device="cpu")
    assert tried == ["adapter_config.json"]
    assert re.fullmatch(expected + "; looking for it on the hub.", caplog.messages[-1])
    (tmp_path / "models--my-modle").mkdir() # something of it is in the cache
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="switched off by HF_HUB_OFFLINE=1: unset it"):
        RewardModel("my-modle", device="cpu")
    assert len(caplog.messages) == 1


def test_home_is_expanded(base, monkeypatch):
    folder = Path(base("llama"))
    monkeypatch.setenv("HOME", str(folder.parent))
    RewardModel(f"~/{folder.name}", device="cpu")


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    "Neither without asking, nor by asking at a terminal."
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        RewardModel(str(tmp_path), device="cpu")


def test_wrong_pooling_is_named(base):
    with pytest.raises(ValueError, match="'max'; expected one of last, first, classifier, mean"):
        reward_model(base, "llama", pooling="max")


def test_from_pretrained_requires_one_reward_head(base, tmp_path):
    with pytest.raises(ValueError, match=r"reward head of .* does not exist.*RewardModel\(model_name\)"):
        RewardModel.from_pretrained(base("llama"), device="cpu")
    AutoModelForSequenceClassification.from_config(with_labels("llama", 3)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 3 labels \(LABEL_0, .*attribute_weights=\{'LABEL_0': 1.0\}"):
        RewardModel.from_pretrained(tmp_path, device="cpu")


def test_checkpoint_that_lacks_weights_is_not_filled_with_random_ones(tmp_path):
    from safetensors.torch import load_file, save_file

    save_language_model("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of LlamaModel, such as layers.1.mlp.down_proj.weight"):
        RewardModel(str(tmp_path), device="cpu")


def test_pickled_weights_are_read_only_on_request(tmp_path):
    from safetensors.torch import load_file

    save_language_model("llama", tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="a pickle, .*; expected model.safetensors"):
        RewardModel(str(tmp_path), device="cpu")
    RewardModel(str(tmp_path), device="cpu", use_safetensors=False)


def test_what_is_a_reward_model(tmp_path):
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
    )

    from rlhf_reward.reward import is_reward_model

    small = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    kinds = {
        "language": LlamaForCausalLM(LlamaConfig(**small)),
        "one": LlamaForSequenceClassification(LlamaConfig(**small, num_labels=1)),
        "three": LlamaForSequenceClassification(LlamaConfig(**small, num_labels=3)),
        "encoder": BertForSequenceClassification(BertConfig(**small, num_labels=1)),
    }
    for name, model in kinds.items():
        model.save_pretrained(tmp_path / name)
    expected = {"language": False, "one": True, "three": False, "encoder": False}
    assert {name: is_reward_model(tmp_path / name) for name in kinds} == expected
