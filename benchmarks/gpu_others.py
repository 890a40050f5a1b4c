"""
Other programs in the table of `gpu.py`: OpenRLHF trains and vLLM scores, from the same weights and on the same tokens.

OpenRLHF's model computes its sequences without padding (`packing_samples`). Its loss is measured with the optimizer of
the other sides, without DeepSpeed. vLLM has prefix caching, which is emptied before each round.
"""
import gc
import importlib.util
import statistics
import tempfile
import time

import torch
import transformers
from gpu_sides import flash_name, free, short, shown_rewards, time_steps

from rlhf_reward.tokens import whole_sequences

START = 150 # seconds that vLLM may take to start, compile and capture graphs


def toy_tokenizer():
    "Return a tokenizer that trainers and servers accept; the data is tokenized already."
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<eos>": 1, "word": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def saved_model(bench, folder):
    "Save the model that all sides begin with. Return the folder."
    bench.model(bench.config("0.6B")).save_pretrained(folder, toy_tokenizer())
    free(bench)
    return folder


# ----- OpenRLHF 0.11


def openrlhf_steps(bench, examples):
    "Return the seconds of the steps without the first ones, and the losses, of OpenRLHF's reward model and its loss."
    from openrlhf.models import PairWiseLoss, get_llm_for_sequence_regression

    with tempfile.TemporaryDirectory() as folder:
        model = get_llm_for_sequence_regression(
            saved_model(bench, folder),
            "reward",
            attn_implementation=flash_name() or "flash_attention_2",
            packing_samples=True,
        )
    model = model.to(bench.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=bench.device.type == "cuda")
    loss_of = PairWiseLoss()
    chosen, rejected = zip(*map(whole_sequences, examples))
    input_ids, mask = left_padded([*chosen, *rejected])

    def step_loss():
        rewards = model(input_ids.to(bench.device), attention_mask=mask.to(bench.device))
        return loss_of(*rewards.chunk(2))

    return time_steps(bench, model, optimizer, step_loss)


def left_padded(sequences):
    "Return ids and mask, as OpenRLHF's trainer makes them."
    longest = max(map(len, sequences))
    rows, masks = [], []
    for ids in sequences:
        padding = longest - len(ids)
        rows.append([0] * padding + ids)
        masks.append([0] * padding + [1] * len(ids))
    return torch.tensor(rows), torch.tensor(masks)


# ----- vLLM 0.29


def vllm_table(bench, medians):
    "Print how long vLLM scores the responses to one prompt. `medians` has the seconds of varlen by their number."
    bench.print(
        "\n### Best of N by vLLM with prefix caching, 0.6B\n",
        "| responses | seconds | times as long as varlen | first rewards |",
        "|---|---|---|---|",
    )
    if importlib.util.find_spec("vllm") is None:
        bench.print("| vLLM is not installed | | | |")
        return
    if bench.time_left() < START:
        bench.print(f"| no time left: it may take {START} s to start | | | |")
        return
    try:
        rows = vllm_rows(bench, medians)
    except Exception as error: # a side that fails is a row of the table
        rows = [f"| {short(error)} | | | |"]
    bench.print(*rows)
    free(bench)


def vllm_rows(bench, medians):
    "Return the rows of the table."
    from vllm import LLM

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(
            model=saved_model(bench, folder),
            runner="pooling",
            dtype="bfloat16",
            enable_prefix_caching=True,
            max_model_len=2048,
            gpu_memory_utilization=0.5,
        )
        for count, median in medians.items():
            prompts = [{"prompt_token_ids": ids} for ids in whole_sequences(bench.best_of(count))]
            seconds = []
            for _ in range(bench.warmup + bench.steps):
                llm.reset_prefix_cache()
                start = time.perf_counter()
                outputs = llm.encode(prompts, pooling_task="classify", use_tqdm=False)
                rewards = [output.outputs.data.item() for output in outputs]
                seconds.append(time.perf_counter() - start)
            spent = statistics.median(seconds[bench.warmup :])
            rows.append(f"| {count} | {spent:.4f} | {spent / median:.2f} | {shown_rewards(rewards)} |")
    del llm
    gc.collect()
    return rows
