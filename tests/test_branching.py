"Branched batches: prefixes with a cache, then the rests, with the rewards and gradients of each text alone."

import math
import random
from functools import partial

import pytest
import torch
import transformers as T

from architectures import BLOOM, GPT2, GPT_NEO, IDS, LLAMA, VOCAB, save_language_model, word_tokenizer
from one_at_a_time import alone, rewards_and_gradients
from programs import run
from rlhf_reward import RewardModel, Scorer
from rlhf_reward.adapters import add_adapter, lora_config
from rlhf_reward.branching import PREFIX, WHOLE, BranchCache, branch_comparisons, group_by_length
from rlhf_reward.losses import BradleyTerry
from rlhf_reward.packing import by_comparison, choose_layout, model_inputs, pack_comparisons, pad_comparisons
from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder
from rlhf_reward.tokens import tokenized_comparison
from tiny import tiny_trainer, tokenized

SMALL = {**LLAMA, "head_dim": 8}
DELTA = dict(
    num_hidden_layers=3,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
)
MAMBA = dict(mamba_n_heads=4, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16)
WITHOUT_LAYERS = {name: value for name, value in SMALL.items() if name != "num_hidden_layers"}
NEMOTRON = dict(
    **WITHOUT_LAYERS,
    layers_block_type=["mamba", "attention", "mlp", "mamba"],
    mamba_num_heads=4,
    mamba_head_dim=16,
    ssm_state_size=8,
    n_groups=2,
    mamba_chunk_size=16,
)
FALCON = dict(**SMALL, **MAMBA, mamba_d_ssm=32, mamba_d_head=8)
LFM = dict(**{**SMALL, "num_hidden_layers": 3}, layer_types=["conv", "full_attention", "conv"])
HYBRIDS = {
    "qwen3_5_text": {**SMALL, **DELTA},
    "qwen3_next": dict(
        **{**SMALL, **DELTA},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "nemotron_h": NEMOTRON,
    "falcon_h1": FALCON,
    "lfm2": LFM,
}
OTHERS = {  # a cache, but no mask of packed rows; the last three pack too
    "bloom": BLOOM,
    "mpt": dict(vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "gpt_neo": GPT_NEO,
    "mamba2": dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        chunk_size=16,
        **IDS,
    ),
    "llama": LLAMA,
    "gemma3_text": dict(**SMALL, sliding_window=4),
    "gpt2": GPT2,
}
WITH_BIAS = {  # in the projection before a convolution, where padding is not 0
    "nemotron_h": dict(NEMOTRON, use_bias=True),
    "falcon_h1": dict(FALCON, mamba_proj_bias=True),
    "lfm2": dict(LFM, conv_bias=True),
}
in_fewest_calls = partial(branch_comparisons, padding=math.inf)


def open_model(family, folder, options=None, **kwargs):
    "A model of the family with large weights, in float32, in training mode without dropout."
    config = T.AutoConfig.for_model(family, **(options or {**HYBRIDS, **OTHERS}[family]))
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    model = RewardModel(str(folder), dropout=0.0, device="cpu", **kwargs)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def ids(draw, low, high):
    return draw.choices(range(3, VOCAB), k=draw.randint(low, high))


def random_examples(seed=0, most=8):
    "K from 2 to the most; no prefix or one of one token, rests that are empty or one token, one response, long ones."
    draw = random.Random(seed)
    examples = []
    for k in range(2, most + 1):
        examples.append(tokenized_comparison(ids(draw, 1, 9), [ids(draw, 1, 9) for _ in range(k)]))
    return [
        *examples,
        tokenized_comparison([], [ids(draw, 1, 6) for _ in range(3)]),
        tokenized_comparison([7], [ids(draw, 1, 6) for _ in range(2)]),
        tokenized_comparison(ids(draw, 3, 8), [ids(draw, 1, 5), [], ids(draw, 1, 1)]),
        tokenized_comparison(ids(draw, 3, 8), [[], []]),
        tokenized_comparison(ids(draw, 4, 4), [[5], [6], [7]]),
        tokenized_comparison(ids(draw, 4, 4), [ids(draw, 3, 3)]),
        tokenized_comparison(ids(draw, 25, 25), [ids(draw, 20, 20), ids(draw, 2, 2)]),
    ]


def assert_equal(computed, expected, rounding=1e-5):
    rewards, gradients = computed
    plain_rewards, plain_gradients = expected
    assert plain_rewards.std() > 0.01
    assert (rewards - plain_rewards).abs().max() <= rounding * plain_rewards.abs().max()
    assert gradients.keys() == plain_gradients.keys() and gradients
    norm_of_all = torch.cat([gradient.flatten() for gradient in plain_gradients.values()]).norm()
    for name, gradient in plain_gradients.items():
        difference = (gradients[name] - gradient).norm()
        assert difference <= rounding * max(gradient.norm(), 1e-2 * norm_of_all), name


@pytest.mark.parametrize("family", [*HYBRIDS, *OTHERS])
def test_rewards_and_gradients_are_those_of_one_sequence_at_a_time(family, tmp_path):
    model = open_model(family, tmp_path)
    examples = random_examples(most=8 if family == "lfm2" else 3)
    expected = rewards_and_gradients(model, alone(examples))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for collator in (branch_comparisons, in_fewest_calls):
        computed = rewards_and_gradients(model, [collator(examples)])
        assert_equal(computed, expected, 2e-5)
        assert trained - computed[1].keys() <= {"backbone.embeddings.weight"}
    if family in ("llama", "gemma3_text", "gpt2"):
        assert choose_layout(model, examples[1:], ("branched",)).difference is None
    else:  # branched by themselves
        layout = choose_layout(model, examples[1:])
        assert layout.collator.func is branch_comparisons and layout.difference is None
        assert "prefix_padding" not in layout.collator.keywords and model.training


def test_the_order_of_layouts(tmp_path):
    examples = random_examples(most=3)
    llama = open_model("llama", tmp_path / "llama")
    assert choose_layout(llama, examples).collator.func is pack_comparisons
    assert choose_layout(llama, examples, ("branched",)).collator.func is branch_comparisons
    hybrid = open_model("lfm2", tmp_path / "lfm2")
    layout = choose_layout(hybrid, examples, ("packed",))
    assert layout.collator is pad_comparisons and layout.difference.startswith("packed rows are refused")
    torch.manual_seed(0)
    for family in ("mamba", "bert"):  # neither continues from a cache as from the tokens themselves
        model = RewardModel(save_language_model(family, tmp_path / family), 0.0, "cpu")
        layout = choose_layout(model, examples)
        assert layout.collator is pad_comparisons
        assert layout.difference.startswith("packed ") and "; branched " in layout.difference


@pytest.mark.parametrize("family", WITH_BIAS)
def test_padding_before_a_prefix_changes_states_where_there_is_a_bias(family, tmp_path):
    "There, the prefixes of a call have one length; the trial sees it even where the data do not show it."
    model = open_model(family, tmp_path, WITH_BIAS[family])
    examples = random_examples(most=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("in_proj.bias"):
                parameter.add_(0.5 * torch.randn_like(parameter))
        plain = torch.cat([model(**model_inputs(batch, model)) for batch in alone(examples)])
        padded = model(**model_inputs(in_fewest_calls(examples), model))
        by_length = model(**model_inputs(in_fewest_calls(examples, prefix_padding=0), model))
    assert (padded - plain).abs().max() > 1e-4 * plain.abs().max()
    assert (by_length - plain).abs().max() < 1e-5 * plain.abs().max()
    same = [item for item in examples if len(item["shared_prefix"]) == 4]
    for compared in (examples, same, [tokenized_comparison([], [[5, 6, 7, 8, 9, 10, 11, 12], [6]])]):
        assert choose_layout(model, compared).collator.keywords["prefix_padding"] == 0


def before_prefix(batch):
    "Move the padding of each prefix to the right, as a plain batch has it."
    start = 0
    for _, width, branch in batch["branches"].tolist():
        if branch == PREFIX:
            row = slice(start, start + width)
            order = batch["attention_mask"][0, row].argsort(descending=True, stable=True)
            for name in ("input_ids", "attention_mask", "position_ids"):
                batch[name][0, row] = batch[name][0, row][order]
        start += width


def next_prefix(batch):
    branches = batch["branches"][:, 2]
    rests = branches >= 0
    branches[rests] = (branches[rests] + 1) % (branches.max() + 1)


BROKEN = {
    "padding after a prefix": before_prefix,
    "another prefix": next_prefix,
    "positions begin anew": lambda batch: batch["position_ids"].sub_(batch["position_ids"]),
    "padding is read": lambda batch: batch["attention_mask"].fill_(1),
    "a response ends one token early": lambda batch: batch["end_positions"][:, 1].sub_(1).clamp_(min=0),
}


@torch.no_grad()
def test_a_batch_with_a_fault_has_other_rewards(tmp_path):
    model = open_model("qwen3_5_text", tmp_path)
    examples = random_examples(most=4)
    plain = torch.cat([model(**model_inputs(made, model)) for made in alone(examples)])
    for fault, change in BROKEN.items():
        batch = in_fewest_calls(examples)
        change(batch)
        broken = model(**model_inputs(batch, model))
        assert (broken - plain).abs().max() > 1e-3 * plain.abs().max(), fault


def test_each_token_appears_once_with_little_padding():
    examples = random_examples()
    batch = branch_comparisons(examples)
    tokens = []
    for item in examples:
        if item["shared_prefix"] and len(item["rests"]) > 1:
            tokens += sum([item["shared_prefix"], *item["rests"]], [])
        else:
            for rest in item["rests"]:
                tokens += item["shared_prefix"] + rest
    real = batch["input_ids"][batch["attention_mask"] == 1]
    assert sorted(real.tolist()) == sorted(tokens)
    draw = random.Random(0)
    long = []
    for _ in range(16):
        rests = [[5] * draw.randint(1, 200) for _ in range(4)]
        long.append(tokenized_comparison([5] * draw.randint(20, 800), rests))
    batch = branch_comparisons(long)
    unique, padded = batch["tokens"].tolist()
    assert batch["input_ids"].numel() <= 1.11 * unique < 0.3 * padded
    assert batch["branches"][-1, 0] < 20  # calls
    fewest = in_fewest_calls(long)["branches"]
    assert fewest[:, 0].unique().tolist() == [0, 1] and set(fewest[:, 2].tolist()) == {PREFIX, *range(16)}


def test_groups_by_length():
    lengths = [20, 4, 21, 5, 90, 4]
    assert group_by_length(lengths, 0) == [[1, 5], [3], [0], [2], [4]]
    assert group_by_length(lengths, 0.1) == [[1, 5, 3], [0, 2], [4]]  # padding 2 and 1, of 144 tokens
    assert group_by_length(lengths, math.inf) == [[1, 5, 3, 0, 2, 4]]
    assert group_by_length([], 0.1) == []


def test_prefixes_on_another_side_of_a_limit_are_written_whole(tmp_path):
    "A prefix within the limit of longrope has other frequencies than its responses beyond it."
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [8.0, 11.0, 14.0, 17.0],
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 10000.0,
    }
    model = open_model("llama", tmp_path, dict(LLAMA, rope_parameters=rope))
    examples = random_examples(most=3)
    draw = random.Random(1)
    examples.append(tokenized_comparison(ids(draw, 12, 12), [ids(draw, 8, 8), ids(draw, 5, 5)]))  # the prefix within
    layout = choose_layout(model, examples, ("branched",))
    assert layout.difference is None and layout.collator.keywords["length_limits"] == {16}
    batch = layout.collator(examples)
    expected = rewards_and_gradients(model, alone(examples))
    assert_equal(rewards_and_gradients(model, [batch]), expected, 2e-5)
    shared = branch_comparisons(examples)
    assert (batch["branches"][:, 2] == WHOLE).sum() > (shared["branches"][:, 2] == WHOLE).sum()
    rewards, _ = rewards_and_gradients(model, [shared])
    assert (rewards - expected[0])[-2:].abs().max() > 1e-3 * expected[0].abs().max()


@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1", "lfm2", "bloom"])
def test_gradient_checkpointing(family, tmp_path):
    "The layers keep the cache, and less is held for the backward pass."
    model = open_model(family, tmp_path)
    examples = random_examples(most=4)
    batch = in_fewest_calls(examples)
    expected = rewards_and_gradients(model, [batch])
    held = bytes_held(model, batch)
    model.activation_checkpointing_enable()
    assert_equal(rewards_and_gradients(model, [batch]), expected, 1e-6)
    assert bytes_held(model, batch) < 0.5 * held
    model.backbone.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant.*expected gradient_checkpointing_kwargs"):
        model(**model_inputs(batch, model))


def bytes_held(model, batch):
    "Bytes of the activations that a forward pass saves for the backward pass."
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        rewards = model(**model_inputs(batch, model))
    assert rewards.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("family", ["qwen3_5_text", "nemotron_h"])
def test_adapters(family, tmp_path):
    modules = "all-linear" if family == "qwen3_5_text" else "in_proj,q_proj,v_proj"  # PEFT refuses others of Mamba
    model = add_adapter(open_model(family, tmp_path), lora_config(2, target_modules=modules))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    examples = random_examples(most=3)
    assert choose_layout(model, examples).collator.func is branch_comparisons
    expected = rewards_and_gradients(model, alone(examples))
    assert len(expected[1]) > 8
    assert_equal(rewards_and_gradients(model, [branch_comparisons(examples)]), expected, 2e-5)
    model.activation_checkpointing_enable()
    assert_equal(rewards_and_gradients(model, [branch_comparisons(examples)]), expected, 2e-5)


def test_half_precision_differs_by_its_rounding(tmp_path):
    model = open_model("qwen3_5_text", tmp_path)
    examples = random_examples()
    with torch.no_grad():
        truth = model(**model_inputs(pad_comparisons(examples), model))
        with torch.autocast("cpu", torch.bfloat16):
            branched = model(**model_inputs(branch_comparisons(examples), model))
            plain = model(**model_inputs(pad_comparisons(examples), model))
    assert branched.dtype == torch.float32
    assert (branched - truth).abs().max() <= 2 * (plain - truth).abs().max()


def test_compiled_models_branch_too(tmp_path):
    model = open_model("lfm2", tmp_path)
    batch = in_fewest_calls(random_examples())
    expected = rewards_and_gradients(model, [batch])
    compiled = torch.compile(model, backend="eager")
    rewards = compiled(**model_inputs(batch, model))
    torch.testing.assert_close(rewards.detach(), expected[0], atol=1e-6, rtol=1e-5)


def test_a_call_does_not_change_what_it_reads():
    config = T.AutoConfig.for_model("falcon_h1", **HYBRIDS["falcon_h1"])
    prefixes = BranchCache(config)
    ones = torch.ones(2, 3, 4)
    prefixes.update_conv_state(ones, 0, conv_kernel_size=6)
    prefixes.update_recurrent_state(ones[..., None], 0)
    prefixes.update(ones[:, None], ones[:, None], 0)
    assert prefixes.get_conv_state(0) is None and prefixes.get_seq_length() == 0
    joined = BranchCache.join([prefixes, prefixes])
    assert joined.convolution == {} and joined.get_seq_length() == 3
    rests = joined.branch(torch.tensor([0, 0, 3]))
    for _ in range(2):
        keys, _ = rests.update(ones[:1, None].repeat(3, 1, 1, 1), ones[:1, None].repeat(3, 1, 1, 1), 0)
        assert keys.shape == (3, 1, 6, 4)
        assert rests.update_conv_state(ones[:1].repeat(3, 1, 1), 0, conv_kernel_size=6).shape == (3, 3, 10)
        rests.update_recurrent_state(torch.zeros(3, 3, 4, 1), 0)
        assert torch.equal(rests.get_recurrent_state(0), torch.ones(3, 3, 4, 1))
        assert rests.get_conv_state(0)[0, 0].tolist() == [0, 0, 1, 1, 1, 1]


# Scoring


def test_best_of_n_computes_the_prompt_once(tmp_path):
    model = open_model("qwen3_5_text", tmp_path / "base")
    model.save_pretrained(tmp_path / "reward", word_tokenizer())
    scorer = Scorer.from_pretrained(tmp_path / "reward", device="cpu")
    assert scorer.packs
    draw = random.Random(0)
    words = [f"w{index}" for index in range(3, VOCAB)]
    prompt = " ".join(draw.choices(words, k=40)) + " "
    responses = [" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(16)]
    plain = []
    for response in responses:
        tokens = [*scorer.tokenizer(prompt + response)["input_ids"], IDS["eos_token_id"]]
        with torch.no_grad():
            plain.append(scorer.model(torch.tensor([tokens])).item())
    sizes = []
    handle = scorer.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    best = scorer.best_of_n(prompt, responses)
    rewards = scorer.score([prompt] * 16, responses)
    handle.remove()
    assert rewards == pytest.approx(plain, abs=1e-5)
    assert best.index == plain.index(max(plain)) and best.reward == pytest.approx(max(plain), abs=1e-5)
    unique = 40 + sum(len(response.split()) + 1 for response in responses)
    assert max(sizes) < 1.2 * unique < 16 * 40 / 3


# The trainer


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    "A tiny falcon_h1 with the tokenizer of the synthetic texts."
    folder = tmp_path_factory.mktemp("hybrid")
    tiny_decoder(folder, synthetic_texts())
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    options = {**HYBRIDS["falcon_h1"], "vocab_size": len(tokenizer)}
    options |= {"max_position_embeddings": 128, "hidden_size": 16, "mamba_d_ssm": 16, "mamba_n_heads": 2, "head_dim": 4}
    torch.manual_seed(0)
    T.AutoModelForCausalLM.from_config(T.AutoConfig.for_model("falcon_h1", **options)).save_pretrained(folder)
    return folder


def trained(base, folder, layout, peft_config=None, **options):
    trainer = tiny_trainer(
        str(base),
        folder,
        {"layout": layout, "logging_steps": 1, "max_steps": 2, **options},
        train_dataset=tokenized(str(base), 80),
        eval_dataset=tokenized(str(base), 30, 1),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_ten_steps_branched_and_padded_are_the_same_run(hybrid, tmp_path):
    options = {"max_steps": 10, "per_device_train_batch_size": 4}
    runs = [trained(hybrid, tmp_path, layout, **options) for layout in ("auto", "padded")]
    assert runs[0].data_collator.func is branch_comparisons and runs[1].data_collator is pad_comparisons
    assert len(losses(runs[0])) == 10 and max(losses(runs[0])) - min(losses(runs[0])) > 0.1
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-4)
    branched, padded = (run.evaluate() for run in runs)
    for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_chosen_reward"):
        assert branched[name] == pytest.approx(padded[name], abs=1e-3), name
    assert runs[0].state.log_history[0]["tokens_saved"] > 0.2


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"bf16": True},
        {"peft_config": lora_config(2, target_modules="in_proj,q_proj,v_proj"), "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_branching_works_with_the_trainers_options(hybrid, tmp_path, options):
    one = losses(trained(hybrid, tmp_path, "branched", **options))
    other = losses(trained(hybrid, tmp_path, "padded", **options))
    assert one == pytest.approx(other, abs=2e-2 if "bf16" in options else 1e-5)


def test_what_cannot_be_branched_is_reported(hybrid, tmp_path):
    with pytest.raises(ValueError, match="'packed', but for this falcon_h1 packed .*; expected layout='auto'"):
        trained(hybrid, tmp_path, "packed")
    mamba = save_language_model("mamba", tmp_path / "mamba")
    word_tokenizer().save_pretrained(mamba)
    with pytest.raises(ValueError, match="'branched', but for this mamba branched .*; expected layout='auto'"):
        trained(mamba, tmp_path, "branched")
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="layout is 'branched', with FSDP, DeepSpeed or use_reentrant"):
        trained(hybrid, tmp_path, "branched", **reentrant)
    assert trained(hybrid, tmp_path, "auto", **reentrant, max_steps=1).data_collator is pad_comparisons


def test_two_processes_are_one(hybrid, tmp_path, python):
    "The last step has 5 comparisons, and the second process one of them. The calls of the two differ in number."
    rows = tmp_path / "rows.jsonl"
    synthetic_comparisons(21).to_json(rows)
    weights = []
    for count in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count] if count > 1 else []
        arguments = [
            *(*launcher, "-m", "rlhf_reward", "train", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"),
            *("--model", hybrid, "--dataset", rows, "--output_dir", tmp_path / str(count), "--dropout", "0"),
            *("--learning_rate", "1e-3", "--per_device_train_batch_size", 8 // count, "--layout", "branched"),
            "--gradient_checkpointing",
        ]
        run(python, *arguments)
        weights.append(RewardModel.from_pretrained(str(tmp_path / str(count)), device="cpu").state_dict())
    name = "backbone.layers.0.mamba.in_proj.weight"
    assert (weights[0][name] - RewardModel(hybrid, device="cpu").state_dict()[name]).abs().max() > 1e-3
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_loss_of_a_branched_batch_is_that_of_the_padded_one(tmp_path):
    model = open_model("lfm2", tmp_path)
    examples = []
    for item in random_examples():
        k = len(item["rests"])
        examples.append({**item, "ranks": list(range(1, k + 1)), "margins": [0.5] * (k * (k - 1) // 2)})
    tables = []
    for collator in (branch_comparisons, pad_comparisons):
        batch = collator(examples)
        with torch.no_grad():
            rewards = by_comparison(model(**model_inputs(batch, model)), batch["ranks"])
        tables.append((rewards, BradleyTerry()(rewards, batch["ranks"], batch["margins"], batch["ratings"])))
    (rewards, losses), (plain_rewards, plain_losses) = tables
    assert rewards.abs().sum() > 1 and losses.sum() > 1
    torch.testing.assert_close(rewards, plain_rewards, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses, plain_losses, atol=1e-5, rtol=1e-5)
