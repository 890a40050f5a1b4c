"""
Load on `rlhf_reward serve` over loopback, compared with scoring the same rows offline.

    pip install 'rlhf_reward[serve]'
    python benchmarks/serve_load.py --data ROWS.jsonl [--data MORE.jsonl] [--requests 10000] [--connections 64]
        [--apart]

Each request is one prompt with one response, sent to `/score` as soon as a connection is free; the responses to one
prompt follow each other, as from best-of-n sampling. With `--apart` each prompt begins with its own number, so that
there is nothing to share. Offline is `Scorer.score` of all rows in one call, in this process while the server is idle,
before and after. Client and server share the machine. Every answer is compared with the offline reward; statuses other
than 200 are counted.
"""
import argparse
import asyncio
import contextlib
import itertools
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

import httpx
import torch
import transformers

from rlhf_reward import RewardModel, load_rows
from rlhf_reward.data import to_responses
from rlhf_reward.scoring import Scorer
from rlhf_reward.synthetic import tiny_decoder

REQUEST = (
    b"POST /score HTTP/1.1\r\n"
    b"Host: localhost\r\n"
    b"Content-Type: application/json\r\n"
    b"Content-Length: %d\r\n"
    b"\r\n"
    b"%s"
)


def distinct_rows(paths, max_characters):
    "Return each (prompt, response) of the files once, ordered by prompt, without those that are too long."
    responses_of = {}
    for path in paths:
        for row in load_rows(path):
            comparison = to_responses(row)
            for response in comparison.responses:
                if len(comparison.prompt) + len(response) <= max_characters:
                    responses_of.setdefault(comparison.prompt, {}).setdefault(response)
    rows = []
    for prompt, responses in responses_of.items():
        rows += [(prompt, response) for response in responses]
    return rows


def repeated(rows):
    "Yield the rows, then again and again with the number of the turn before each prompt."
    yield from rows
    for turn in itertools.count(1):
        for prompt, response in rows:
            yield f"{turn} {prompt}", response


def read(paths, count, max_characters, apart):
    "Return as many (prompt, response) as requested."
    rows = distinct_rows(paths, max_characters)
    if not apart:
        return list(itertools.islice(repeated(rows), count))
    random.Random(0).shuffle(rows)
    numbered = []
    for number, (prompt, response) in enumerate(itertools.islice(repeated(rows), count)):
        numbered.append((f"{number} {prompt}", response))
    return numbered


def make_model(folder, rows, width, layers):
    "Save a llama with random weights and a tokenizer of the rows' texts."
    texts = []
    for row in rows:
        texts += row
    tiny_decoder(
        folder,
        texts,
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=8192,
        initializer_range=0.02,
    )
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    RewardModel(folder, 0.0, "cpu").save_pretrained(folder, tokenizer)


@dataclass
class Served:
    "The answers of the server."

    rewards: list # one for each row, None without an answer
    seconds: list # of each request
    statuses: list = field(default_factory=list)
    total_seconds: float = 0.0


async def load(port, rows, connections):
    "Send every row. The client does as little as possible, since it shares the cores with the server."
    served = Served([None] * len(rows), [None] * len(rows))
    remaining = iter(enumerate(rows)) # of all connections

    async def send_rows():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for index, (prompt, response) in remaining:
            body = json.dumps({"prompts": [prompt], "responses": [response]}).encode()
            started = time.perf_counter()
            writer.write(REQUEST % (len(body), body))
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.split("content-length: ")[1].split("\r\n")[0])
            answer = json.loads(await reader.readexactly(length))
            served.seconds[index] = time.perf_counter() - started
            status = int(head.split()[1])
            served.statuses.append(status)
            if status == 200:
                (served.rewards[index],) = answer["rewards"]
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(send_rows() for _ in range(connections)))
    served.total_seconds = time.perf_counter() - started
    return served


@contextlib.contextmanager
def running_server(folder):
    "Start the server, and yield its port at once."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rlhf_reward", "serve", "--model", folder, "--device", "cpu"]
    server = subprocess.Popen([*command, "--port", str(port), "--timeout", "300"])
    try:
        yield port
    finally:
        server.terminate()
        server.wait()


def wait_until_ready(url):
    while True:
        try:
            httpx.get(f"{url}/health").raise_for_status()
            return
        except httpx.TransportError:
            time.sleep(0.5)


def metric(text, name):
    "Return the value of the first metric whose name begins so."
    for line in text.splitlines():
        if line.startswith(name):
            return float(line.split()[-1])
    raise KeyError(name)


def timed_score(scorer, prompts, responses):
    started = time.perf_counter()
    rewards = scorer.score(prompts, responses)
    return rewards, time.perf_counter() - started


def print_lengths(scorer, rows, options):
    comparisons = [to_responses({"prompt": prompt, "response": response}) for prompt, response in rows]
    lengths = sorted(len(sequences[0]) for sequences in scorer.tokenize(comparisons))
    median = lengths[len(lengths) // 2]
    print(
        f"{len(rows)} requests, {sum(lengths)} tokens: {lengths[0]} to {lengths[-1]}, median {median}; "
        f"width {options.width}, {options.layers} layers, {torch.get_num_threads()} threads"
    )


def print_results(served, expected, offline_seconds, metrics, warm_seconds, connections):
    largest = max(map(abs, expected))
    differences = []
    for reward, expected_reward in zip(served.rewards, expected):
        if reward is not None:
            differences.append(abs(reward - expected_reward) / largest)
    count = len(expected)
    failed = sum(status != 200 for status in served.statuses)
    print(
        f"not 200: {failed}; answered: {len(differences)} of {count}; "
        f"largest difference from offline: {max(differences):.1e} of the largest reward"
    )
    before, after = offline_seconds
    offline = (before + after) / 2
    total = served.total_seconds
    print(
        f"offline {before:.1f} and {after:.1f} s, {count / offline:.1f} a second; "
        f"served {total:.1f} s, {count / total:.1f} a second: {offline / total:.2f} of offline"
    )
    quantiles = statistics.quantiles(served.seconds, n=100)
    requests = metric(metrics, "rlhf_reward_batch_requests_sum")
    batches = metric(metrics, "rlhf_reward_batch_requests_count")
    computing = metric(metrics, "rlhf_reward_batch_seconds_sum") - warm_seconds
    print(
        f"latency with {connections} connections: median {quantiles[49]:.3f} s, p99 {quantiles[98]:.3f} s; "
        f"{requests / batches:.1f} requests a batch, computing {computing:.1f} s"
    )


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--apart", action="store_true", help="no two requests share a beginning")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--max_characters", type=int, default=4000, help="longer rows are left out")
    return parser.parse_args()


def main():
    options = parse_arguments()
    rows = read(options.data, options.requests, options.max_characters, options.apart)
    prompts = [prompt for prompt, _ in rows]
    responses = [response for _, response in rows]
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, rows[:4000], options.width, options.layers)
        with running_server(folder) as port:
            url = f"http://127.0.0.1:{port}"
            scorer = Scorer.from_pretrained(folder, device="cpu")
            print_lengths(scorer, rows, options)
            wait_until_ready(url)
            scorer.score(prompts[:100], responses[:100]) # warm up both sides
            asyncio.run(load(port, rows[:200], options.connections))
            warm_seconds = metric(httpx.get(f"{url}/metrics").text, "rlhf_reward_batch_seconds_sum")
            expected, before = timed_score(scorer, prompts, responses)
            served = asyncio.run(load(port, rows, options.connections))
            _, after = timed_score(scorer, prompts, responses)
            metrics = httpx.get(f"{url}/metrics").text
    print_results(served, expected, (before, after), metrics, warm_seconds, options.connections)


if __name__ == "__main__":
    main()
