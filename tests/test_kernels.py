"Which kernel computes packed rows on a GPU, as far as a CPU can show it, and what a step waits for."
import importlib
import logging
import math
import pickle
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_flash_attention_utils as flash_utils

from one_at_a_time import alone, rewards_and_gradients
from rlhf_reward import RewardConfig, RewardModel, inputs, kernels, packing, varlen
from rlhf_reward.attention import BY_SEGMENT
from rlhf_reward.kernels import Kernel, add_sequences, packed_kernels
from rlhf_reward.losses import LOSSES, make_loss
from rlhf_reward.packing import by_comparison, choose_layout, model_inputs, pack_comparisons, packing_difference
from rlhf_reward.placing import to_device
from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder
from rlhf_reward.varlen import VARLEN
from test_packing import trained
from test_varlen import differs, documented, few_examples, on_cpu, open_model, packed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("base"), synthetic_texts())


@pytest.fixture
def on_gpu(monkeypatch, on_cpu):
    "Let the choice of kernels see a GPU without any flash package, and FlexAttention run without a compiler."
    monkeypatch.setattr(kernels, "input_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr(kernels, "_flash_name", lambda: None)
    with torch.compiler.set_stance("force_eager"):
        yield


def test_the_order_of_kernels(base, monkeypatch):
    model = RewardModel(base, 0.0, "cpu")
    cases = [  # device, attention, has SDPA, installed flash → attention implementations
        ("cpu", "sdpa", True, None, [BY_SEGMENT, "sdpa"]),
        ("cpu", "eager", False, None, ["eager"]),
        ("cpu", "flex_attention", True, None, ["flex_attention", "sdpa"]),
        ("cuda", "sdpa", True, None, [VARLEN, "flex_attention", "sdpa"]),
        ("cuda", "sdpa", True, "flash_attention_3", [VARLEN, "flash_attention_3", "flex_attention", "sdpa"]),
        ("cuda", "eager", True, "flash_attention_2", ["eager"]),  # asked for by name
        ("cuda", "eager", False, "flash_attention_2", [VARLEN, "flash_attention_2", "flex_attention", "eager"]),
        ("cuda", "flash_attention_2", True, None, ["flash_attention_2", VARLEN, "flex_attention", "sdpa"]),
        ("cuda", "flash_attention_2", False, None, ["flash_attention_2", VARLEN, "flex_attention", "eager"]),
        ("cuda", "flex_attention", True, "flash_attention_3", ["flex_attention", VARLEN, "sdpa"]),
        ("mps", "sdpa", True, None, ["sdpa"]),
    ]
    for device, attention, has_sdpa, flash, expected in cases:
        monkeypatch.setattr(kernels, "input_device", lambda model, device=device: torch.device(device))
        monkeypatch.setattr(kernels, "_flash_name", lambda flash=flash: flash)
        monkeypatch.setattr(type(model.backbone), "_supports_sdpa", has_sdpa)
        found = [kernel.attn_implementation for kernel in packed_kernels(model, attention)]
        assert found == expected, (device, attention)


def test_the_choice_on_a_gpu(on_gpu, monkeypatch, tmp_path, caplog):
    "The first kernel that gives the padded rewards and gradients; one line where it is not the first of the order."
    examples = few_examples()
    caplog.set_level(logging.INFO, "rlhf_reward")
    model = open_model("llama", tmp_path)

    def chosen(**options):
        caplog.clear()
        layout = choose_layout(model, examples, **options)
        assert model.config._attn_implementation == "sdpa" and layout.difference is None
        return layout, [record.message for record in caplog.records]

    layout, lines = chosen(for_training=True)
    assert layout.attn_implementation == VARLEN and not lines
    layout.apply_to(model)
    assert choose_layout(model, examples).attn_implementation == VARLEN  # again, from what was chosen
    with torch.no_grad():
        rewards = model(**model_inputs(layout.collator(examples), model))
    model.backbone.set_attn_implementation("sdpa")
    assert packing_difference(model, examples) is None
    assert (rewards - torch.cat([model(**model_inputs(batch, model)) for batch in alone(examples)])).abs().max() < 1e-5

    monkeypatch.setattr(varlen, "MAX_HEAD_SIZE", 4)
    layout, lines = chosen()
    assert layout.attn_implementation == "flex_attention" and len(lines) == 1
    assert "computed by FlexAttention. Not by varlen: packed rows are refused" in lines[0] and "size 8" in lines[0]
    assert layout.collator(examples)["input_ids"].shape[1] % 128 == 0
    layout, lines = chosen(for_training=True)  # it has no backward on a CPU
    assert layout.attn_implementation == "sdpa" and len(lines) == 1 and layout.collator is pack_comparisons
    assert "computed by a dense mask. Not by varlen: " in lines[0] and "Not by FlexAttention: " in lines[0]

    monkeypatch.setattr(varlen, "MAX_HEAD_SIZE", 256)
    model.config.attention_dropout = 0.1
    assert chosen(for_training=True)[0].attn_implementation == "sdpa"
    assert chosen()[0].attn_implementation == VARLEN


def test_a_kernel_with_wrong_gradients_is_refused(on_gpu, monkeypatch, tmp_path, caplog):
    "Its rewards are right, so only the comparison of gradients shows it."
    def without_gradient_of_keys(query, key, *arguments, **options):
        return documented(query, key.detach(), *arguments, **options)

    model = open_model("llama", tmp_path)
    monkeypatch.setattr(varlen, "varlen_attn", without_gradient_of_keys)
    assert choose_layout(model, few_examples()).attn_implementation == VARLEN
    layout = choose_layout(model, few_examples(), for_training=True)
    assert layout.attn_implementation == "sdpa" and "gradients differ from plain ones" in caplog.text


# ----- transformers' own flash attention


def flash(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
          causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False, s_aux=None):
    "`flash_attn_varlen_func`, as flash-attention documents it."
    assert causal and not dropout_p
    query = query.contiguous()  # this one needs no more than a contiguous last dimension
    left = window_size[0]
    options = {"scale": softmax_scale, "window_size": (left, 0), "softcap": softcap, "sinks": s_aux}
    return documented(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mistral", "qwen3"])
def test_flash_attention_of_transformers_takes_packed_rows(family, on_cpu, monkeypatch, tmp_path):
    "With what varlen lacks: a soft cap of the scores, and sinks."
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: (None, flash, None, None, None))
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    model = open_model(family, tmp_path)
    examples = few_examples()
    plain = rewards_and_gradients(model, alone(examples))
    first, *_ = packed_kernels(model, "flash_attention_2")
    model.config._attn_implementation = first.attn_implementation  # `set_attn_implementation` looks for the package
    assert first.attn_implementation == "flash_attention_2"
    batch = first.finish(pack_comparisons(examples, first.row_length))
    assert differs(*rewards_and_gradients(model, [batch]), *plain) is None
    batch["packed_sequences"][0]["key_index"][-2] -= 1
    assert differs(*rewards_and_gradients(model, [batch]), *plain) is not None


# ----- what a step waits for


def not_waiting(condition, message, wait):
    "Stand in for `inputs.require`, which on a GPU waits only if it is told to."
    assert not wait


def test_no_family_waits_for_a_number_in_a_step(monkeypatch, tmp_path):
    "Without data: a step that reads a number of a tensor, in forward, loss or backward, stops with an error."
    monkeypatch.setattr(inputs, "require", not_waiting)
    monkeypatch.setattr(varlen, "HALF", (torch.float32,))
    examples = few_examples()
    make_loss("plackett_luce")(torch.zeros(1, 8), torch.arange(1, 9)[None], torch.zeros(1, 8, 8)) # fills its tables
    for family in ("llama", "llama4_text"):
        mode = FakeTensorMode(allow_non_fake_inputs=True)

        def fake(values, mode=mode):
            if isinstance(values, dict):
                return {name: fake(value) for name, value in values.items()}
            return mode.from_tensor(values) if isinstance(values, torch.Tensor) else values

        model = open_model(family, tmp_path / family).train()
        model.backbone.set_attn_implementation(VARLEN)
        state = fake({**dict(model.named_parameters()), **dict(model.named_buffers())})
        batch = fake(packed(examples, model))
        for name in LOSSES if family == "llama" else ["bradley_terry"]:
            loss = make_loss(name)
            parameters = fake(dict(loss.named_parameters()))
            with mode:
                rewards = by_comparison(functional_call(model, state, (), model_inputs(batch, model)), batch["ranks"])
                targets = rewards, batch["ranks"], batch["margins"], batch["ratings"]
                losses = functional_call(loss, parameters, targets)
                (losses * batch["weights"] * loss.is_informative(*targets[1:])).sum().backward()
                assert losses.shape == (len(examples),)


class Waits(TorchDispatchMode):
    "Counts the operations that need a number of a tensor on the host, or a number of elements that depends on one."

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name in ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def trained_by_varlen(base, folder, monkeypatch, kernel, **options):
    "A run whose packed rows are computed by varlen."
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    def order(model, attention):
        by_parts = torch.are_deterministic_algorithms_enabled()
        return [Kernel("varlen", VARLEN, math.inf, partial(add_sequences, by_parts=by_parts))]

    monkeypatch.setattr(packing, "packed_kernels", order)
    trainer = trained(base, folder, "packed", **options)
    assert trainer.model.config._attn_implementation == VARLEN
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True, "full_determinism": True}, {"bf16": True}])
def test_a_run_by_varlen_is_the_padded_run(base, options, on_cpu, monkeypatch, tmp_path):
    options = {"max_steps": 2, "rows": synthetic_comparisons(24), **options}
    parts = []

    def split(states, sequences, gather=varlen.gather_keys):
        parts.append("split_order" in sequences)
        return gather(states, sequences)

    monkeypatch.setattr(varlen, "gather_keys", split)
    try:
        losses = trained_by_varlen(base, tmp_path, monkeypatch, documented, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    padded = trained(base, tmp_path, "padded", **{**options, "full_determinism": False})
    expected = [entry["loss"] for entry in padded.state.log_history if "loss" in entry]
    assert losses == pytest.approx(expected, abs=2e-2 if "bf16" in options else 1e-5) and len(losses) == 2
    assert set(parts) == {"full_determinism" in options}


def test_a_step_of_the_trainer_waits_for_nothing(base, on_cpu, monkeypatch, tmp_path):
    "Two runs with one log at the end need as many numbers on the host, whatever the number of their steps."
    monkeypatch.setattr(inputs, "require", not_waiting)
    monkeypatch.setattr(packing, "packing_difference", lambda *args, **kwargs: None)

    def kernel(query, key, value, *lengths, **options):  # that reads no number
        return query * key.mean() + value.mean()

    counts = []
    for steps in (1, 3):
        with Waits() as waits:
            trained_by_varlen(
                base,
                tmp_path / str(steps),
                monkeypatch,
                kernel,
                rows=synthetic_comparisons(48),
                max_steps=steps,
                logging_steps=100,
                gradient_accumulation_steps=2,
                optim="adamw_torch_fused",
            )
        counts.append(len(waits.found))
    assert counts[0] == counts[1] > 0


def test_the_table_for_a_gpu_at_toy_size(capsys, monkeypatch, tmp_path):
    "Each part of the benchmark prints its rows; sides that are not possible here say why."
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    gpu = importlib.import_module("gpu")
    gpu.main(["--smoke", "--no_trainers", "--output", str(tmp_path / "table.md")])
    table = (tmp_path / "table.md").read_text()
    assert table == capsys.readouterr().out
    for part in ("Rewards against float64", "Chosen for 0.6B", "Best of 16", "4,096/64", "K = 4", "1,024/1,024"):
        assert part in table
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| packed, dense mask")]
    assert len(rows) == 1 + 2 + 2 * 6 and "Error" not in table
    assert "| packed, varlen | needs " in table or torch.cuda.is_available()
    losses = {}
    for line in table.splitlines():
        cells = line.split(" | ")
        if line.startswith("###"):
            part = line
        elif len(cells) == 7 and cells[0] in ("| packed, dense mask", "| padded, SDPA"):
            losses.setdefault(part, []).append(float(cells[6].split()[0]))
    assert len(losses) == 12
    for both in losses.values():
        assert both[0] == pytest.approx(both[1], abs=0.02)


def test_wrapped_models_pass_the_sequences_on(python, tmp_path):
    "DDP and FSDP2 leave the keyword arguments of attention as they are."
    program = Path(__file__).with_name("varlen_sharded.py")
    done = subprocess.run([python, program, tmp_path / "meeting"], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith(("DDP", "FSDP2"))]
    assert [line[0] for line in lines] == ["DDP", "FSDP2"]
    assert all(float(difference) < 1e-5 and has_all == "True" for _, difference, has_all in lines)


def test_collators_go_to_the_workers_of_a_loader(base):
    "With what their kernels need, so a batch is packed where the loader has workers."
    model = RewardModel(base, 0.0, "cpu")
    for kernel in packed_kernels(model, "flash_attention_2"):
        collator = pickle.loads(pickle.dumps(packing._collator(kernel, frozenset())))
        batch = collator(few_examples())
        assert ("packed_sequences" in batch) == ("flash" in kernel.name)


def test_copies_to_a_gpu_are_pinned_and_not_waited_for(monkeypatch, tmp_path):
    assert not RewardConfig(str(tmp_path), use_cpu=True, report_to="none").accelerator_config.non_blocking
    monkeypatch.setattr(RewardConfig, "device", torch.device("cuda"))
    on_gpu = RewardConfig(str(tmp_path), report_to="none")
    assert on_gpu.dataloader_pin_memory and on_gpu.accelerator_config.non_blocking
    not_pinned = RewardConfig(str(tmp_path), report_to="none", dataloader_pin_memory=False)
    assert not not_pinned.accelerator_config.non_blocking

    copies = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: copies.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: copies.append(non_blocking) or tensor)
    batch = {"input_ids": torch.ones(1, 2), "packed_sequences": {0: {"max_length_q": 2, "key_index": torch.ones(2)}}}
    moved = to_device(batch, torch.device("cuda"))
    assert copies == ["pinned", True] * 2 and moved["packed_sequences"][0]["max_length_q"] == 2
