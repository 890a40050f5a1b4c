"Which kernel computes packed rows on a GPU, as far as a CPU can show it, and what a step waits for."
import importlib
import importlib.machinery
import logging
import math
import pickle
import subprocess
import sys
import types
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations import flex_attention

from one_at_a_time import alone, rewards_and_gradients
from rlhf_reward import RewardConfig, RewardModel, inputs, kernels, packing, varlen
from rlhf_reward.attention import BY_SEGMENT, attention_mask
from rlhf_reward.kernels import Kernel, add_sequences, packed_kernels
from rlhf_reward.losses import LOSSES, make_loss
from rlhf_reward.packing import by_comparison, choose_layout, model_inputs, pack_comparisons, packing_difference
from rlhf_reward.placing import to_device
from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder
from rlhf_reward.varlen import VARLEN
from test_packing import random_examples, trained
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


@torch.no_grad()
def test_flex_attention_is_compiled_once_for_rows_of_all_lengths(monkeypatch, tmp_path):
    "Rewards are those of single sequences for each; without dynamic lengths there is a second compilation."
    counter = CompileCounter()
    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_function(function, backend=counter))
    monkeypatch.setattr(flex_attention.WrappedFlexAttention, "_instance", None)
    torch._dynamo.reset()
    model = open_model("llama", tmp_path)
    kernel, _ = packed_kernels(model, "flex_attention")
    lengths = []
    for count in (8, 12):  # 3 and 5 blocks, which are no number of heads: torch takes equal sizes for one
        examples = random_examples(count=count)
        plain = torch.cat([model(**model_inputs(batch, model)) for batch in alone(examples)])
        batch = kernel.finish(pack_comparisons(examples, kernel.row_length))
        model.backbone.set_attn_implementation(kernel.attn_implementation)
        assert (model(**model_inputs(batch, model)) - plain).abs().max() < 1e-5 * plain.abs().max()
        model.backbone.set_attn_implementation("sdpa")
        lengths.append(batch["input_ids"].shape[1])
    assert lengths == [384, 640]
    assert counter.frame_count == 1


def test_blocks_on_a_gpu_are_made_by_a_function_that_is_compiled_for_all_lengths(monkeypatch):
    "No GPU here: a fake one shows what is compiled, and how."
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled.append((function.__name__, how)) or dict)
    config = transformers.LlamaConfig()
    config._attn_implementation = "flex_attention"
    with FakeTensorMode():
        batch = {"input_ids": torch.zeros(1, 256, dtype=torch.long, device="cuda")}
        batch |= {name: batch["input_ids"] for name in ("comparison_ids", "response_ids", "position_ids")}
        with pytest.raises(TypeError):
            attention_mask(batch, config)
    assert compiled == [("create_block_mask", {"dynamic": True})]


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


class Waits(transformers.TrainerCallback):
    "Names in each step the operations of a trace, and the calls, by which the host reads what a device computes."
    operations = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2"}
    calls = ("tolist", "numpy", "cpu")  # that are no operation on a CPU

    def __init__(self):
        self.steps = []

    def on_step_begin(self, *args, **kwargs):
        self.steps.append([])
        self.patch = pytest.MonkeyPatch()
        for name in self.calls:
            self.patch.setattr(torch.Tensor, name, self.counted(name, getattr(torch.Tensor, name)))
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profile.start()

    def on_step_end(self, *args, **kwargs):
        self.profile.stop()
        self.patch.undo()
        for event in self.profile.events():
            parents = [event.key]
            while event.cpu_parent is not None:
                event = event.cpu_parent
                parents.append(event.key)
            # the fused optimizer reads numbers of steps on a CPU only
            if parents[0].removeprefix("aten::") in self.operations and "aten::_fused_adamw_" not in parents:
                self.steps[-1].append(parents[0])

    def counted(self, name, call):
        def counted_call(tensor, *args, **kwargs):
            self.steps[-1].append(name)
            return call(tensor, *args, **kwargs)

        return counted_call


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
    "From the copy of its batches to its optimizer; a kernel that reads numbers is seen."
    monkeypatch.setattr(inputs, "require", not_waiting)
    monkeypatch.setattr(packing, "packing_difference", lambda *args, **kwargs: None)
    waits = Waits()
    callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, waits]
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", callbacks)

    def kernel(query, key, value, *lengths, **options):  # that reads no number
        return query * key.mean() + value.mean()

    def reading(query, key, value, *lengths, **options):
        if lengths[0].tolist()[0] == 0 and key.mean() != 5:
            return query * key.mean().item() + value.mean()

    options = {"rows": synthetic_comparisons(48), "gradient_accumulation_steps": 2, "optim": "adamw_torch_fused"}
    for function, steps in ((kernel, 2), (reading, 1)):
        trained_by_varlen(base, tmp_path, monkeypatch, function, max_steps=steps, **options)
    assert waits.steps[:2] == [[], []] and len(waits.steps) == 3
    assert set(waits.steps[2]) == {"tolist", "aten::_local_scalar_dense", "aten::is_nonzero"}


def test_the_table_for_a_gpu_at_toy_size(capsys, monkeypatch, tmp_path):
    "Each part of the benchmark prints its rows; sides that are not possible here say why."
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    gpu = importlib.import_module("gpu")
    gpu.main(["--smoke", "--no_trainers", "--output", str(tmp_path / "table.md")])
    table = (tmp_path / "table.md").read_text()
    assert table == capsys.readouterr().out
    shapes = ("HH lengths, 16 pairs", "4,096/64", "K = 4", "1,024/1,024")
    parts = ("Rewards against float64", "Chosen for 0.6B", "Best of 16", "Best of 1024", "| vLLM is not installed |")
    for part in (*shapes, *parts):
        assert part in table
    for side in ("packed, varlen, num_splits=1", "packed, cascade"):  # to choose from for scoring
        assert table.count(f"| {side} | needs a GPU |") == 4 or torch.cuda.is_available()
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


class OpenRLHF(torch.nn.Module):
    "In place of its reward model: (num_sequences,) rewards of rows that are padded on the left."

    def __init__(self, folder, kind, *, attn_implementation, packing_samples):
        super().__init__()
        assert kind == "reward" and "flash" in attn_implementation and packing_samples
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)

    def forward(self, input_ids, attention_mask):
        assert attention_mask[:, -1].all() and (input_ids.eq(0) == attention_mask.eq(0)).all()
        return self.model(input_ids, attention_mask=attention_mask).logits.squeeze(1)


class PairWiseLoss:
    "In place of OpenRLHF's."

    def __call__(self, chosen, rejected):
        return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


class VLLM:
    "In place of `vllm.LLM`: counts how often its cache was emptied."

    def __init__(self, model, runner, dtype, enable_prefix_caching, max_model_len, gpu_memory_utilization):
        assert runner == "pooling" and dtype == "bfloat16" and enable_prefix_caching
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(model)
        assert self.model.config.problem_type == "regression"  # so there is no sigmoid
        self.is_empty = False

    def reset_prefix_cache(self):
        self.is_empty = True

    def encode(self, prompts, pooling_task, use_tqdm):
        assert self.is_empty and pooling_task == "classify" and not use_tqdm
        self.is_empty = False
        rewards = [self.model(torch.tensor([prompt["prompt_token_ids"]])).logits[0] for prompt in prompts]
        return [types.SimpleNamespace(outputs=types.SimpleNamespace(data=reward.detach())) for reward in rewards]


def test_other_programs_of_the_table_get_the_same_weights_and_tokens(capsys, monkeypatch):
    "OpenRLHF and vLLM are not installed here: what is called in their place gives the losses and rewards of ours."
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    sides, trainers, others = (importlib.import_module(f"gpu_{name}") for name in ("sides", "trainers", "others"))
    members = {"get_llm_for_sequence_regression": OpenRLHF, "PairWiseLoss": PairWiseLoss}
    for name, content in (("openrlhf", {}), ("openrlhf.models", members), ("vllm", {"LLM": VLLM})):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    bench = sides.Bench(Namespace(smoke=True, minutes=8, output=None))
    compared = {name: side for name, side in trainers.trainers().items() if "TRL" not in name}
    monkeypatch.setattr(trainers, "trainers", lambda: compared)
    trainers.trainers_table(bench, [[40, 20, 30], [60, 30, 10]])
    ours, theirs = [line.split(" | ") for line in bench.lines if line.startswith(("| rlhf_reward", "| OpenRLHF"))]
    assert float(ours[4].rstrip(" |")) == pytest.approx(float(theirs[4].rstrip(" |")), abs=0.01)
    others.vllm_table(bench, {3: 1.0})
    example = bench.best_of(3)
    model = bench.model(bench.config("0.6B"))
    with torch.no_grad():
        rewards = model(**model_inputs(pack_comparisons([example]), model)).flatten().tolist()
    shown = [float(reward) for reward in bench.lines[-1].split(" | ")[3].rstrip(" |").split()]
    assert bench.lines[-1].startswith("| 3 | ") and shown == pytest.approx(rewards, abs=0.01)
    bench.deadline = 0
    others.vllm_table(bench, {3: 1.0})
    assert bench.lines[-1].startswith("| no time left: it may take 150 s to start")


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
