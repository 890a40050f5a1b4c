"Packed rows by flash kernels, shown without a GPU: the kernel is replaced by what flash-attention documents."
import importlib
import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from architectures import PACKABLE, save_language_model
from one_at_a_time import alone, rewards_and_gradients
from rlhf_reward import RewardModel, varlen
from rlhf_reward.attention import _visibility
from rlhf_reward.kernels import _chunks, add_sequences
from rlhf_reward.packing import model_inputs, pack_comparisons, pad_comparisons
from rlhf_reward.varlen import VARLEN, gather_keys, pack_sequences
from test_packing import example, random_examples

NOT_VARLEN = {  # what the kernel lacks, or why the model does not get there
    "gemma2": "does not support an attention implementation|attention has softcap",
    "gpt_oss": "does not support an attention implementation|attention has s_aux",
    "stablelm": "must match the size",  # it drops keyword arguments
    "falcon": None,  # looks up its attention elsewhere, as the next three
    "codegen": None,
    "gptj": None,
    "xglm": None,
}
BY_VARLEN = [family for family in PACKABLE if family not in NOT_VARLEN]


def documented(
    query, key, value, queries, keys, max_q, max_k, *,
    scale, window_size, enable_gqa=True, diagonal=0, softcap=None, sinks=None,
):
    """
    Check the contract of `varlen_attn`, and compute in float64 what it documents.

    `softcap` and `sinks` are those of other kernels; a `diagonal` other than 0 is a fault.
    """
    for lengths, states, longest in ((queries, query, max_q), (keys, key, max_k), (keys, value, max_k)):
        assert lengths.dtype == torch.int32 and lengths.is_contiguous() and lengths.device == states.device
        counts = lengths.diff().tolist()
        assert lengths[0] == 0 and sum(counts) == len(states) and max(counts) == longest and min(counts) > 0
        assert type(longest) is int
        assert states.ndim == 3 and states.is_contiguous() and states.dtype in varlen.HALF
        assert states.dtype == query.dtype and states.shape[2] == query.shape[2]
    assert len(queries) == len(keys) and key.shape == value.shape and query.shape[1] % key.shape[1] == 0
    assert query.shape[2] % 8 == 0 and query.shape[2] <= 256
    assert query.shape[1] == key.shape[1] or enable_gqa
    left, right = window_size
    assert type(window_size) is tuple and right == 0 and (left == -1 or left >= 0)
    outputs = []
    group = query.shape[1] // key.shape[1]
    key, value = (states.double().repeat_interleave(group, 1) for states in (key, value))
    by_sequence = (states.split(lengths.diff().tolist()) for states, lengths in (
        (query.double(), queries), (key, keys), (value, keys)
    ))
    for q, k, v in zip(*by_sequence):
        assert len(q) <= len(k)
        position = torch.arange(len(q))[:, None] + len(k) - len(q) + diagonal  # the last query sees the last key
        distance = position - torch.arange(len(k))
        hidden = (distance < 0) | ((distance > left) if left >= 0 else False)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[2] ** -0.5)
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:  # as if each head saw one more key, without a value
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(q), 1)], dim=2)
        weights = scores.softmax(-1)[..., : len(k)].nan_to_num()
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs).to(query.dtype)


@pytest.fixture
def on_cpu(monkeypatch):
    "Let float32 pass for half precision, and the documented kernel for the real one."
    monkeypatch.setattr(varlen, "varlen_attn", documented)
    monkeypatch.setattr(varlen, "KERNEL_OPTIONS", {"enable_gqa": True})
    monkeypatch.setattr(varlen, "HALF", (torch.float16, torch.bfloat16, torch.float32))


def open_model(family, folder, **options):
    torch.manual_seed(0)
    return RewardModel(save_language_model(family, folder), dropout=0.0, device="cpu", **options)


def packed(examples, model, **options):
    "One row, with its sequences."
    return add_sequences(pack_comparisons(examples, math.inf), _chunks(model.config), **options)


def few_examples():
    "K of 2 and 8, no prefix, and an empty rest."
    examples = random_examples()
    return [examples[0], *examples[6:9]]


def differs(rewards, gradients, plain, plain_gradients, tolerance=1e-5):
    if (rewards - plain).abs().max() > tolerance * plain.abs().max():
        return "rewards"
    norm_of_all = torch.cat([gradient.flatten() for gradient in plain_gradients.values()]).norm()
    for name, gradient in plain_gradients.items():
        if (gradients[name] - gradient).norm() > tolerance * max(gradient.norm(), 1e-2 * norm_of_all):
            return name
    return None


@pytest.mark.parametrize("family", BY_VARLEN)
def test_varlen_is_one_sequence_at_a_time(family, on_cpu, tmp_path):
    "Rewards and all gradients, for K from 2 to 8, empty rests, no prefix, windows and chunks; by index and by parts."
    model = open_model(family, tmp_path)
    examples = random_examples() if family == "mistral" else few_examples()
    plain = rewards_and_gradients(model, alone(examples))
    model.backbone.set_attn_implementation(VARLEN)
    assert model.config._attn_implementation == VARLEN and plain[0].std() > 0.01
    of_varlen = rewards_and_gradients(model, [packed(examples, model)])
    assert of_varlen[1].keys() == plain[1].keys() and len(plain[1]) > 10
    assert differs(*of_varlen, *plain) is None
    if family in ("mistral", "llama4_text"):
        in_parts = rewards_and_gradients(model, [packed(examples, model, by_parts=True)])
        assert differs(*in_parts, *plain) is None


@pytest.mark.parametrize("family", NOT_VARLEN)
def test_varlen_refuses_what_it_cannot_compute(family, on_cpu, tmp_path):
    model = open_model(family, tmp_path)
    if NOT_VARLEN[family] is None:
        model.backbone.set_attn_implementation(VARLEN)
        assert model.config._attn_implementation != VARLEN
        return
    with pytest.raises((ValueError, RuntimeError), match=NOT_VARLEN[family]):
        model.backbone.set_attn_implementation(VARLEN)
        model(**model_inputs(packed(random_examples(), model), model))


def test_varlen_refuses_by_name(monkeypatch):
    states = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    sequences = {0: {"max_length_q": 3}}
    for query, value, options, message in (
        (states.float(), states.float(), {}, "attention is in torch.float32, and varlen in float16 or bfloat16 only"),
        (states[..., :4], states[..., :4], {}, "heads have the size 4, and varlen multiples of 8 up to 256"),
        (states.repeat(1, 1, 1, 33), states, {}, "heads have the size 264"),
        (states, states.repeat(1, 1, 1, 2), {}, "heads have the size 8"),
        (states, states, {"dropout": 0.1}, "attention has a dropout of 0.1, and varlen none"),
        (states, states, {"softcap": 50.0}, "attention has softcap, and varlen has not"),
        (states, states, {"s_aux": torch.zeros(2)}, "attention has s_aux, and varlen has not"),
    ):
        with pytest.raises(ValueError, match=message):
            varlen._attention_varlen(None, query, query, value, torch.empty(1, 1, 0, 0), sequences, **options)


def top_left(query, key, value, queries, keys, max_q, max_k, **options):
    "The diagonal of other libraries: the first query sees the first key."
    return documented(query, key[: len(query)], value[: len(query)], queries, queries, max_q, max_q, **options)


def with_window(left):
    "The kernel with another window."
    def kernel(*arguments, window_size, **options):
        return documented(*arguments, window_size=(left, 0), **options)

    return kernel


def next_key(index):
    index[-2] += 1


FAULTS = {  # the kernel, or what happens to the index of the keys
    "a diagonal one too low": (partial(documented, diagonal=-1), None),
    "a diagonal from the top left": (top_left, None),
    "a window of one more": (with_window(4), None),
    "a window of one less": (with_window(2), None),
    "no window": (with_window(-1), None),
    "all keys off by one": (documented, lambda index: index.add_(1).clamp_(max=index.max() - 1)),
    "one key off by one": (documented, next_key),
    "keys in another order": (documented, lambda index: index.copy_(index.flip(0))),
}


def test_varlen_with_a_fault_is_seen(on_cpu, monkeypatch, tmp_path):
    "Rewards or gradients differ for each of these, so the comparison with single sequences detects them."
    model = open_model("mistral", tmp_path)  # with a window of 4
    examples = few_examples()
    plain = rewards_and_gradients(model, alone(examples))
    model.backbone.set_attn_implementation(VARLEN)
    for fault, (kernel, change) in FAULTS.items():
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        batch = packed(examples, model)
        if change is not None:
            change(batch["packed_sequences"][0]["key_index"])
        assert differs(*rewards_and_gradients(model, [batch]), *plain) is not None, fault
    monkeypatch.setattr(varlen, "varlen_attn", documented)
    assert differs(*rewards_and_gradients(model, [packed(examples, model)]), *plain) is None


def test_varlen_sequences_are_what_the_mask_shows():
    "Each query sees the keys that the mask of a packed row shows, in order, with and without chunks; at random."
    for seed, chunk in itertools.product(range(2), (0, 1, 3)):
        examples = random_examples(seed, count=3)
        batch = pack_comparisons(examples, math.inf)
        visible = _visibility(batch, chunk=chunk)
        num_tokens = batch["input_ids"].shape[1]
        tokens = torch.arange(num_tokens)
        seen = visible(torch.tensor(0), None, tokens[:, None], tokens)
        for by_parts in (False, True):
            sequences = pack_sequences(batch, chunk, by_parts)
            keys = gather_keys(tokens[:, None, None], sequences).flatten().tolist()
            first_q, first_k = sequences["cu_seq_lens_q"].tolist(), sequences["cu_seq_lens_k"].tolist()
            assert first_q[-1] == num_tokens and first_k[-1] == len(keys)
            for sequence, (start, end) in enumerate(itertools.pairwise(first_q)):
                own = keys[first_k[sequence] : first_k[sequence + 1]]
                for query in range(start, end):
                    count = len(own) - (end - 1 - query)
                    assert own[:count] == seen[query].nonzero().flatten().tolist()


def test_varlen_gathers_nothing_where_nothing_is_shared():
    batch = pack_comparisons([example([], [[5, 6, 7]]), example([5, 6], [[7]])], math.inf)
    sequences = pack_sequences(batch)
    assert "key_index" not in sequences and sequences["cu_seq_lens_q"].tolist() == [0, 3, 6]
    states = torch.zeros(6, 1, 8)
    assert gather_keys(states, sequences) is states


def test_varlen_in_half_precision(monkeypatch, on_cpu, tmp_path):
    "The kernel gets half precision with weights in it and under autocast; rewards stay float32, near the exact ones."
    claimed = []

    def kernel(query, *arguments, **options):
        claimed.append(query.dtype)
        return documented(query, *arguments, **options)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(varlen, "HALF", (torch.float16, torch.bfloat16))
    examples = few_examples()
    for family, dtype, autocast in (
        ("qwen3", torch.bfloat16, None),
        ("qwen3", torch.float32, torch.bfloat16),  # its norms leave queries and keys in float32
        ("llama", torch.float16, None),
    ):
        model = open_model(family, tmp_path / family, dtype=dtype)
        exact = open_model(family, tmp_path / family)
        exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
        with torch.no_grad():
            truth = exact(**model_inputs(pad_comparisons(examples), exact))
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                plain = model(**model_inputs(pad_comparisons(examples), model))
                model.backbone.set_attn_implementation(VARLEN)
                rewards = model(**model_inputs(packed(examples, model), model))
                again = model(**model_inputs(pad_comparisons(examples), model))
        assert torch.equal(again, plain) and rewards.dtype == torch.float32
        assert (rewards - truth).abs().max() <= 2 * (plain - truth).abs().max()
        assert set(claimed) == {autocast or dtype}
        claimed.clear()


def test_varlen_accepts_the_shapes_of_the_real_operator():
    "A trace without data: the operator and the one that it calls on a fake GPU, and its backward."
    if varlen.varlen_attn is None:
        pytest.skip("this torch has no varlen_attn")
    batch = pack_comparisons(random_examples(), math.inf)
    num_tokens = batch["input_ids"].shape[1]
    shapes = ((0, 0, 2, 16), (0, 4, 4, 16), (4, 0, 1, 16), (0, 0, 4, 8))
    for (chunk, window, key_heads, value_size), device in itertools.product(shapes, ("cuda", "cpu")):
        sequences = pack_sequences(batch, chunk)
        num_keys = int(sequences["cu_seq_lens_k"][-1])
        with FakeTensorMode():
            fake = {}
            for name, values in sequences.items():
                is_tensor = isinstance(values, torch.Tensor)
                fake[name] = torch.empty(values.shape, dtype=values.dtype, device=device) if is_tensor else values

            def states(heads, size):  # a fake GPU has no autograd
                shape = (1, num_tokens, heads, size)
                return torch.empty(shape, dtype=torch.bfloat16, device=device, requires_grad=device == "cpu")

            leaves = states(4, 16), states(key_heads, 16), states(key_heads, value_size)
            query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
            mask = torch.empty(1, 1, chunk, window, device=device)
            output, _ = varlen._attention_varlen(None, query, key, value, mask, {chunk: fake}, 0.25)
            assert output.shape == (1, num_tokens, 4, value_size) and output.device.type == device
            if device == "cpu":
                output.sum().backward()
                assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]
                continue
            lengths = [fake["cu_seq_lens_q"], fake["cu_seq_lens_k"], *(fake[f"max_length_{of}"] for of in "qk")]
            keys = torch.empty(num_keys, key_heads, 16, dtype=torch.bfloat16, device=device)
            queries = torch.empty(num_tokens, 4, 16, dtype=torch.bfloat16, device=device)
            inner = torch.ops.aten._flash_attention_forward(queries, keys, keys, *lengths, 0.0, True, False)
            assert inner[0].shape == queries.shape


def with_lse(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale, window_size, enable_gqa):
    "The kernel with `return_aux`, for causal and full attention: outputs, and the LSE as (num_heads, num_queries)."
    assert return_aux.lse and window_size in ((-1, 0), (-1, -1)) and (max_q, max_k) == (
        max(cu_seq_q.diff().tolist()), max(cu_seq_k.diff().tolist())
    )
    group = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(group, 1) for states in (key, value))
    outputs, sums = [], []
    for number, (start, end) in enumerate(itertools.pairwise(cu_seq_q.tolist())):
        keys = slice(*cu_seq_k[number : number + 2].tolist())
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[keys]) * scale
        if window_size == (-1, 0):
            seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
            scores = scores.masked_fill(~seen, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[keys]))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(sums, dim=1)


@torch.no_grad()
def test_varlen_cascade_of_the_benchmark_gives_the_same_rewards(on_cpu, monkeypatch, tmp_path):
    "A prefix in a call of its own, merged by the LSE; with the shares of both parts exchanged they would differ."
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    cascade = importlib.import_module("gpu_cascade")
    monkeypatch.setattr(varlen, "varlen_attn", with_lse)
    model = open_model("llama", tmp_path)
    examples = random_examples()
    plain = torch.cat([model(**model_inputs(batch, model)) for batch in alone(examples)])
    model.backbone.set_attn_implementation(cascade.CASCADE)
    batch = cascade.pack_cascade(examples)
    assert (model(**model_inputs(batch, model)) - plain).abs().max() < 1e-5 * plain.abs().max()
    monkeypatch.setattr(torch, "sigmoid", lambda difference: 1 / (1 + difference.exp()))
    assert (model(**model_inputs(batch, model)) - plain).abs().max() > 1e-3 * plain.abs().max()
