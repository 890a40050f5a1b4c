import itertools
import math
import random
import re
import warnings
from functools import partial

import pytest
import torch
import transformers as T
from datasets import Dataset

from architectures import LLAMA, PACKABLE, VOCAB, save_language_model, word_tokenizer
from one_at_a_time import alone, rewards_and_gradients
from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, packing
from rlhf_reward.branching import branch_comparisons
from rlhf_reward.losses import BradleyTerry
from rlhf_reward.packing import (
    BY_SEGMENT,
    Layout,
    attention_mask,
    best_fit,
    by_comparison,
    check_padding,
    choose_collator,
    choose_layout,
    model_inputs,
    pack_comparisons,
    packing_difference,
    pad_comparisons,
)
from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder
from rlhf_reward.trials import attention_of
from tiny import open_tiny, tiny_trainer, tokenized


def example(prefix, rests, ranks=None):
    return {
        "shared_prefix": prefix,
        "rests": rests,
        "ranks": ranks or list(range(1, len(rests) + 1)),
        "margins": [0.0] * (len(rests) * (len(rests) - 1) // 2),
        "ratings": None,
        "weight": 1.0,
        "row": 1,
        "length": len(prefix) + max(map(len, rests)),
    }


def random_examples(seed=0, count=7):
    """
    K from 2 to 8, or fewer, and odd cases.

    No prefix, a response that is the prefix, identical responses, rests of one token.
    """
    draw = random.Random(seed)

    def ids(low, high):
        return draw.choices(range(3, VOCAB), k=draw.randint(low, high))

    examples = []
    for k in range(2, 2 + count):
        prefix = ids(1, 9)
        examples.append(example(prefix, [ids(1, 9) for _ in range(k)]))
    same = ids(2, 4)
    return [
        *examples,
        example([], [ids(1, 6) for _ in range(3)]),
        example(ids(3, 8), [ids(1, 5), [], ids(1, 1)]),
        example(ids(2, 6), [same, same, ids(1, 4)], [1, 1, 2]) | {"margins": [0.0, 0.0]},
        example(ids(2, 6), [[5], [6], [7]]),
    ]


def rewards_alone(model, examples):
    "The reward of each response, computed in a batch of its own."
    return torch.cat([model(**model_inputs(batch, model)) for batch in alone(examples)])


def packer(attention):
    "The collator that is used with an attention implementation."
    return pack_in_one_row if attention == BY_SEGMENT else pack_comparisons


def num_tokens(examples):
    "Tokens of the examples, each shared prefix once."
    count = 0
    for item in examples:
        count += len(item["shared_prefix"]) + sum(map(len, item["rests"]))
    return count


def open_model(family, folder, attention, **options):
    torch.manual_seed(0)
    model = RewardModel(
        save_language_model(family, folder),
        dropout=0.0,
        device="cpu",
        attn_implementation="sdpa" if attention == BY_SEGMENT else attention,
        **options,
    )
    if attention == BY_SEGMENT:
        model.backbone.set_attn_implementation(BY_SEGMENT)
    return model


pack_in_one_row = partial(pack_comparisons, row_length=math.inf)


@pytest.fixture(scope="module")
def one_at_a_time(tmp_path_factory):
    "The eager model of the family asked for last, and the rewards and gradients of each text alone."
    made = {}

    def get(family):
        if family not in made:
            made.clear()
            folder = tmp_path_factory.mktemp(family)
            model = open_model(family, folder, "eager")
            made[family] = folder, model, rewards_and_gradients(model, alone(FEW_EXAMPLES))
        return made[family]

    return get


FEW_EXAMPLES = random_examples(count=3)  # of other numbers of responses there are tests below


@pytest.mark.parametrize("attention", [BY_SEGMENT, "sdpa", "eager"])
@pytest.mark.parametrize("family", PACKABLE)
def test_rewards_and_gradients_are_those_of_one_sequence_at_a_time(family, attention, one_at_a_time):
    folder, model, (plain, plain_gradients) = one_at_a_time(family)
    if attention == BY_SEGMENT and family == "falcon":
        pytest.skip("falcon looks up its attention by itself; test_what_is_taken_apart: it gets the dense mask")
    if attention != "eager":
        weights = model.state_dict()
        try:
            model = RewardModel(str(folder), dropout=0.0, device="cpu", attn_implementation="sdpa")
        except ValueError as error:
            assert "scaled_dot_product_attention" in str(error)
            pytest.skip("transformers has eager attention only for this family")
        model.load_state_dict(weights)
        model.backbone.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    packed, packed_gradients = rewards_and_gradients(model, [packer(attention)(FEW_EXAMPLES)])
    assert plain.std() > 0.01
    assert (packed - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert packed_gradients.keys() == plain_gradients.keys() and len(packed_gradients) > 10
    norm_of_all = torch.cat([gradient.flatten() for gradient in plain_gradients.values()]).norm()
    for name, gradient in plain_gradients.items():  # those that vanish, such as of a bias of keys, are rounding only
        difference = (packed_gradients[name] - gradient).norm()
        assert difference <= 1e-5 * max(gradient.norm(), 1e-2 * norm_of_all), name


def test_what_is_taken_apart(tmp_path):
    "On a CPU with sdpa, all in one row; the dense mask where the attention function cannot be replaced, or is eager."
    for family, attention, one_row in [
        ("llama", "sdpa", True),
        ("gemma3_text", "sdpa", True),
        ("falcon", "sdpa", False),
        ("llama", "eager", False),
    ]:
        model = open_model(family, tmp_path / family / attention, attention)
        examples = random_examples()
        for _ in range(2):  # a second trainer for the same model
            layout = choose_layout(model, examples)
            layout.apply_to(model)
            assert layout.difference is None
            assert (getattr(layout.collator, "keywords", {}) == {"row_length": math.inf}) == one_row
            assert model.config._attn_implementation == (BY_SEGMENT if one_row else attention)
    batch = pack_in_one_row(examples)
    assert batch["input_ids"].shape == (1, num_tokens(examples))


def test_asking_for_a_layout_does_not_change_the_model(tmp_path):
    for family, attention in [("llama", "sdpa"), ("falcon", "sdpa"), ("llama", "eager"), ("mamba", "eager")]:
        model = open_model(family, tmp_path / family / attention, attention).train()
        examples = FEW_EXAMPLES
        layout = choose_layout(model, examples)
        assert model.config._attn_implementation == attention and model.training
        layout.apply_to(model)
        assert model.config._attn_implementation == layout.attn_implementation
        assert choose_layout(model, examples).attn_implementation == layout.attn_implementation
        assert model.config._attn_implementation == layout.attn_implementation
        assert (layout.collator is pad_comparisons) == (layout.difference is not None) == (family == "mamba")
        assert choose_collator(model, examples)[1] == layout.difference
        assert model.config._attn_implementation == layout.attn_implementation


def test_the_collator_is_for_the_model_as_it_is(tmp_path):
    "Its batches give the padded rewards with the attention implementation that the model has, applied or not."
    examples = random_examples()
    for family, attention in [("llama", "sdpa"), ("mistral", "sdpa"), ("llama", "eager"), ("bloom", "eager")]:
        model = open_model(family, tmp_path / family / attention, attention)
        with torch.no_grad():
            expected = rewards_alone(model, examples)
        for chosen in (attention, choose_layout(model, examples).attn_implementation):
            model.backbone.set_attn_implementation(chosen)
            collator, difference = choose_collator(model, examples)
            assert difference is None and collator is not pad_comparisons
            assert model.config._attn_implementation == chosen
            with torch.no_grad():
                rewards = model(**model_inputs(collator(examples), model))
            assert (rewards - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_collator_is_another_one_where_a_kernel_is_not_applied(tmp_path, monkeypatch):
    "Where the layout is packed by another attention, and the model as it is takes no packed rows."
    model = open_model("llama", tmp_path, "sdpa")
    difference = packing.packing_difference

    def refuse_dense(model, examples, collator=pack_comparisons, *args, **kwargs):
        if model.config._attn_implementation == "sdpa" and collator is pack_comparisons:
            return "no mask"
        return difference(model, examples, collator, *args, **kwargs)

    monkeypatch.setattr(packing, "packing_difference", refuse_dense)
    assert choose_layout(model, FEW_EXAMPLES).attn_implementation == BY_SEGMENT
    assert choose_collator(model, FEW_EXAMPLES)[0].func is branch_comparisons
    no_branches = Layout(branch_comparisons, "sdpa", "no cache")
    monkeypatch.setitem(packing.TRIALS, "branched", lambda *_: no_branches)
    assert choose_collator(model, FEW_EXAMPLES) == (pad_comparisons, "no mask; no cache")


HOOKS = [name for name in vars(torch.nn.Module()) if "hook" in name]


def state_of(model):
    "All of a model that a trial could leave changed."
    modules = {}
    for name, module in model.named_modules():
        hooks = {hook: list(getattr(module, hook).items()) for hook in HOOKS if getattr(module, hook)}
        modules[name] = (module.training, hooks, sorted(vars(module)), vars(module).get("forward"))
    weights = {}
    for name, weight in model.named_parameters():
        weights[name] = (weight.requires_grad, weight.grad, weight.data_ptr(), weight._version)
    buffers = {name: buffer.tolist() for name, buffer in model.named_buffers()}
    config = (model.config.to_dict(), attention_of(model.config), id(model.config))
    return modules, weights, buffers, config, torch.is_grad_enabled(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("family, attention", [("llama", "sdpa"), ("bloom", "eager"), ("mamba", "eager")])
def test_asking_leaves_every_part_of_the_model_as_it_was(family, attention, tmp_path, monkeypatch):
    "Asked twice, and with an error in each of the passes that a choice takes. Some of its modules are frozen."
    model = open_model(family, tmp_path, attention).train()
    examples = FEW_EXAMPLES[:2] if family == "mamba" else FEW_EXAMPLES # it computes token by token
    next(model.backbone.children()).eval().requires_grad_(False)
    model.score.register_forward_hook(lambda *_: None)
    calls = itertools.count()
    fails_in = None

    def inputs(*args):
        if next(calls) == fails_in:
            raise torch.OutOfMemoryError
        return model_inputs(*args)

    monkeypatch.setattr(packing, "model_inputs", inputs)
    before = state_of(model)
    for ask in (choose_layout, choose_collator, partial(choose_layout, for_training=True)):
        ask(model, examples)
        assert state_of(model) == before
    calls = itertools.count()
    choose_layout(model, examples)
    num_passes = next(calls)
    assert num_passes >= len(examples) + 1
    for fails_in in range(num_passes):
        calls = itertools.count()
        with pytest.raises(torch.OutOfMemoryError):
            choose_layout(model, examples)
        assert state_of(model) == before


def test_segments_are_the_dense_mask(tmp_path):
    "Each line of the table, written into a mask, gives the mask; batches of several rows and padded ones work too."
    model = open_model("llama", tmp_path, BY_SEGMENT)
    examples = random_examples()
    batch = pack_in_one_row(examples)
    table = attention_mask(batch, model.config)[0, 0].tolist()
    seq_len = batch["input_ids"].shape[1]
    seen = torch.zeros(seq_len, seq_len, dtype=torch.bool)
    start = 0
    starts = []
    for length, prefix, window, chunk in table:
        starts.append(start)
        seen[start : start + length, start : start + length] = torch.ones(length, length).tril().bool()
        if prefix >= 0:
            seen[start : start + length, starts[prefix] : starts[prefix] + table[prefix][0]] = True
        start += length
        assert (window, chunk) == (0, 0)
    assert torch.equal(seen, attention_mask(batch, T.LlamaConfig(**LLAMA))[0, 0] == 0)
    with torch.no_grad():
        batches = (batch, pack_comparisons(examples, 40), pad_comparisons(examples))
        rewards = [model(**model_inputs(made, model)) for made in batches]
    for other in rewards[1:]:
        torch.testing.assert_close(other, rewards[0], atol=1e-6, rtol=1e-5)


def test_a_checkpoint_does_not_record_the_replaced_attention(tmp_path):
    model = open_model("llama", tmp_path / "base", BY_SEGMENT)
    model.save_pretrained(tmp_path / "saved", word_tokenizer())
    assert BY_SEGMENT not in (tmp_path / "saved/config.json").read_text()


def count_positions_through(batch):
    positions = batch["position_ids"]
    positions.copy_(torch.arange(positions.shape[1]).expand_as(positions))


def end_prefix_early(batch):
    responses = batch["response_ids"]
    responses.copy_(torch.where(responses.roll(-1, 1) == 1, 1, responses))


BROKEN = {
    "the prefix cannot be seen": lambda batch: batch["response_ids"].masked_fill_(batch["response_ids"] == 0, 99),
    "responses see each other": lambda batch: batch["response_ids"].clamp_(max=1),
    "comparisons see each other": lambda batch: batch["comparison_ids"].fill_(1),
    "positions continue from the response before": count_positions_through,
    "a prefix ends one token early": end_prefix_early,
    "a response ends one token early": lambda batch: batch["end_positions"][:, 1].sub_(1).clamp_(min=0),
    "the end is of another response": lambda batch: batch["end_positions"].copy_(batch["end_positions"].roll(1, 0)),
}


@torch.no_grad()
def test_a_mask_that_is_off_by_one_is_seen(tmp_path):
    "The comparison with sequences alone detects each of these faults: rewards differ."
    model = open_model("llama", tmp_path, "sdpa")
    examples = random_examples()
    plain = rewards_alone(model, examples)
    for attention, fault in itertools.product(("sdpa", BY_SEGMENT), BROKEN):
        model.backbone.set_attn_implementation(attention)
        batch = packer(attention)(examples)
        BROKEN[fault](batch)
        packed = model(**model_inputs(batch, model))
        assert (packed - plain).abs().max() > 1e-3 * plain.abs().max(), (attention, fault)


@torch.no_grad()
def test_windows_count_positions(tmp_path):
    "With a window of one more or less than the model's, rewards differ; with the model's own they do not."
    model = open_model("mistral", tmp_path, "sdpa")
    examples = random_examples()
    plain = rewards_alone(model, examples)
    batch = pack_in_one_row(examples)
    for attention, window in itertools.product(("sdpa", BY_SEGMENT), (3, 4, 5)):
        model.backbone.set_attn_implementation(attention)
        config = T.MistralConfig(**LLAMA, sliding_window=window)
        config._attn_implementation = attention
        packed = model(**{**model_inputs(batch, model), "attention_mask": attention_mask(batch, config)})
        is_equal = (packed - plain).abs().max() <= 1e-5 * plain.abs().max()
        assert is_equal == (window == 4), (attention, window)


def test_the_order_of_comparisons_and_the_length_of_rows_change_nothing(tmp_path):
    model = open_model("llama", tmp_path, "sdpa")
    examples = random_examples()
    backwards = examples[::-1]
    with torch.no_grad():
        batches = [pack_comparisons(examples, row_length) for row_length in (None, 1, 40, math.inf)]
        rewards = [model(**model_inputs(batch, model)) for batch in batches]
        batches = [pack_comparisons([item]) for item in backwards]
        of_backwards = torch.cat([model(**model_inputs(batch, model)) for batch in batches])
    for other in rewards[1:]:
        torch.testing.assert_close(other, rewards[0], atol=1e-6, rtol=1e-5)
    counts = [len(item["rests"]) for item in backwards]
    in_order = torch.cat(of_backwards.split(counts)[::-1])
    torch.testing.assert_close(in_order, rewards[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", [BY_SEGMENT, "sdpa"])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_half_precision_keeps_rewards_in_float32_and_differs_by_its_rounding(how, attention, tmp_path):
    model = open_model("llama", tmp_path, attention, dtype=torch.bfloat16 if how == "weights" else torch.float32)
    exact = open_model("llama", tmp_path, "sdpa")
    examples = random_examples()
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        packed = model(**model_inputs(pack_in_one_row(examples), model))
        plain = model(**model_inputs(pad_comparisons(examples), model))
    with torch.no_grad():
        truth = exact(**model_inputs(pad_comparisons(examples), exact))
    assert packed.dtype == plain.dtype == torch.float32
    rounding = (plain - truth).abs().max()  # what half precision costs without packing
    assert rounding > 0
    assert (packed - truth).abs().max() <= 2 * rounding
    assert (packed - plain).abs().max() <= 2 * rounding


def test_a_model_trained_in_mixed_precision_is_compared_by_its_rounding(tmp_path):
    "accelerate lets its `forward` compute in bfloat16 also where no autocast is enabled, as in a Scorer of it."
    base = tiny_decoder(tmp_path / "base", synthetic_texts())
    rows = tokenized(base, 40)
    args = RewardConfig(str(tmp_path / "out"), max_steps=1, bf16=True, use_cpu=True, save_strategy="no")
    trainer = RewardTrainer(open_tiny(base), args, train_dataset=rows)
    trainer.train()
    model = trainer.unwrapped_model()
    assert choose_layout(model, list(rows.select(range(6)))).difference is None
    check_padding(model, list(rows.select(range(6))))


@pytest.mark.parametrize("weight", [3e38, float("nan")])
def test_rewards_that_are_not_finite_are_named(weight, tmp_path):
    "They were reported as a model that mixes the texts of a batch: their difference is no number."
    base = tiny_decoder(tmp_path / "base", synthetic_texts())
    model = open_tiny(base)
    torch.nn.init.constant_(model.score.weight, weight)
    problem = r"torch.float32, gives \d+ of \d+ texts the reward -?(inf|nan); expected finite"
    with pytest.raises(ValueError, match=problem):
        choose_layout(model, list(tokenized(base, 40).select(range(6))))


def test_rows_hold_every_comparison_once_and_are_full():
    draw = random.Random(0)
    lengths = [draw.randint(20, 600) for _ in range(64)]
    rows = best_fit(lengths, 600)
    assert sorted(sum(rows, [])) == list(range(64))
    for row in rows:
        assert sum(lengths[index] for index in row) <= 600
    assert len(rows) <= -(-sum(lengths) // 600) * 11 / 9 + 1
    for lengths in (lengths, [100] + [60] * 15, [500], [7] * 16, [1000] + [10] * 15):
        batch = pack_comparisons([example([3] * (n - 2), [[4], [5]]) for n in lengths])
        assert batch["input_ids"].numel() <= 1.1 * sum(lengths)


def test_each_token_appears_once():
    examples = random_examples()
    batch = pack_comparisons(examples)
    assert (batch["comparison_ids"] > 0).sum() == num_tokens(examples)
    tokens = []
    for item in examples:
        tokens += sum([item["shared_prefix"], *item["rests"]], [])
    real = batch["input_ids"][batch["comparison_ids"] > 0].tolist()
    assert sorted(real) == sorted(tokens)


@pytest.mark.parametrize(
    "family, because",
    [("bloom", "refused"), ("mamba", "refused|differ"), ("bert", "differ|refused"), ("gpt_neo", "refused|differ")],
)
def test_models_that_take_no_such_rows_are_found_out(family, because, tmp_path):
    model = open_model(family, tmp_path, "eager")
    assert re.search(because, packing_difference(model.train(), random_examples())) and model.training


def test_rewards_that_are_all_zero_prove_nothing(tmp_path):
    model = open_model("llama", tmp_path, "sdpa")
    model.score.weight.data.zero_()
    assert packing_difference(model, random_examples()) == "all rewards are 0, by which nothing can be compared"


def test_what_packing_does_not_cover_is_refused_by_name():
    config = T.LlamaConfig(**LLAMA)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="layers of the type linear_attention; packing is for attention layers only"):
        attention_mask(pack_comparisons(random_examples()), config)


def test_running_out_of_memory_is_not_taken_for_a_difference(tmp_path, monkeypatch):
    model = open_model("llama", tmp_path, "sdpa")

    def forward(**inputs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        packing_difference(model, random_examples())


# The trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("base"), synthetic_texts())


def trained(base, folder, layout, rows=None, **options):
    given = {"train_dataset": rows or tokenized(base, 160), "eval_dataset": tokenized(base, 30, 1)}
    trainer = tiny_trainer(base, folder, {"layout": layout, "logging_steps": 1, "max_steps": 10, **options}, **given)
    trainer.train()
    return trainer


def test_ten_steps_packed_and_padded_are_the_same_run(base, tmp_path):
    runs = [trained(base, tmp_path, layout) for layout in ("packed", "padded")]
    assert runs[0].data_collator.func is pack_comparisons and runs[1].data_collator is pad_comparisons
    losses = []
    for run in runs:
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert len(losses[0]) == 10 and max(losses[0]) - min(losses[0]) > 0.1
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    packed, padded = (run.evaluate() for run in runs)
    for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_chosen_reward"):
        assert packed[name] == pytest.approx(padded[name], abs=1e-3), name


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"bf16": True},
    ],
)
def test_packing_works_with_the_trainers_options(base, tmp_path, options):
    options = {"max_steps": 2, "logging_steps": 2, **options}
    runs = [trained(base, tmp_path, layout, **options) for layout in ("packed", "padded")]
    one, other = (run.state.log_history[0]["loss"] for run in runs)
    assert one == pytest.approx(other, abs=2e-2 if "bf16" in options else 1e-5)


def test_auto_packs_what_can_be_packed_and_reports_once_what_cannot(tmp_path, caplog):
    rows = Dataset.from_list(
        [{"prompt": f"w{5 + n % 9} ", "chosen": "w6 " * (1 + n % 5), "rejected": "w7"} for n in range(20)]
    )
    trainers = {}
    for family in ("llama", "bloom", "mamba"):
        args = RewardConfig(
            str(tmp_path / family), use_cpu=True, report_to="none", max_steps=2, save_strategy="no", disable_tqdm=True
        )
        model = RewardModel(save_language_model(family, tmp_path / family), 0.0, "cpu")
        trainers[family] = RewardTrainer(
            model,
            args,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=word_tokenizer(),
        )
        trainers[family].train()
        trainers[family].evaluate()
        trainers[family].predict(rows)
    assert trainers["llama"].data_collator.func is pack_comparisons
    assert trainers["bloom"].data_collator.func is branch_comparisons
    assert trainers["mamba"].data_collator is pad_comparisons
    told = [message for message in caplog.messages if "layout" in message]
    assert len(told) == 1 and told[0].startswith(
        "The padded layout is used for this mamba, in order of length: packed r"
    )
    assert "; branched r" in told[0]
    assert trainers["mamba"].args.train_sampling_strategy == "group_by_length"
    assert trainers["llama"].args.train_sampling_strategy == "random"
    assert trainers["bloom"].args.train_sampling_strategy == "random"
    args = RewardConfig(str(tmp_path / "forced"), layout="packed", use_cpu=True, report_to="none", max_steps=2)
    with pytest.raises(
        ValueError,
        match="layout is 'packed', but for this bloom packed rows are refused .*; expected layout='auto' or 'padded'",
    ):
        RewardTrainer(trainers["bloom"].model, args, train_dataset=rows, processing_class=word_tokenizer()).train()


def test_the_longest_comparison_is_among_those_compared(base, tmp_path, monkeypatch):
    import rlhf_reward.training

    compared = []

    def record(model, examples, layouts, **options):
        compared.extend(examples)
        return choose_layout(model, examples, layouts, **options)

    monkeypatch.setattr(rlhf_reward.training, "choose_layout", record)
    rows = synthetic_comparisons(40)

    def longest(index):
        return max(len(response.split()) for response in rows[index]["responses"])

    short_first = rows.select(sorted(range(40), key=longest))
    trainer = trained(base, tmp_path, "auto", short_first, max_steps=1)
    lengths = list(trainer.train_dataset["length"])
    assert max(lengths[:3]) < max(lengths)
    assert compared == [trainer.train_dataset[n] for n in (lengths.index(max(lengths)), 0, 1, 2)]


def test_flex_attention_gives_the_same_rewards(tmp_path):
    model = open_model("llama", tmp_path, "sdpa")
    flex = open_model("llama", tmp_path, "flex_attention")
    batch = pack_comparisons(random_examples())
    mask = attention_mask(batch, flex.config)
    assert type(mask).__name__ == "BlockMask"
    num_rows, seq_len = batch["input_ids"].shape
    tokens = torch.arange(seq_len)
    seen = torch.zeros(num_rows, seq_len, seq_len, dtype=torch.bool)
    for row in range(num_rows):
        for query in range(seq_len):
            seen[row, query] = mask.mask_mod(torch.tensor(row), None, torch.tensor(query), tokens)
    assert torch.equal(seen, attention_mask(batch, model.config)[:, 0] == 0)
    eager = torch.compiler.set_stance("force_eager")  # its kernels are for GPUs
    with torch.no_grad(), eager, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_flex = flex(**model_inputs(batch, flex))
        of_sdpa = model(**model_inputs(batch, model))
    torch.testing.assert_close(of_flex, of_sdpa, atol=1e-6, rtol=1e-5)


def test_loss_of_packed_rows_is_that_of_pairs_alone(tmp_path):
    model = open_model("llama", tmp_path, "sdpa")
    examples = random_examples()
    batch = pack_comparisons(examples)
    rewards = by_comparison(model(**model_inputs(batch, model)).detach(), batch["ranks"])
    flat = rewards_alone(model, examples).detach().squeeze(1).double()
    by_hand = []
    first = 0
    for item in examples:
        ranks = item["ranks"]
        of_item = flat[first : first + len(ranks)]
        first += len(ranks)
        losses = []
        for i, j in itertools.permutations(range(len(ranks)), 2):
            if ranks[i] < ranks[j]:
                losses.append(torch.nn.functional.softplus(of_item[j] - of_item[i]))
        by_hand.append(torch.stack(losses).mean())
    loss = BradleyTerry()(rewards, batch["ranks"], batch["margins"]).mean()
    assert loss.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)
