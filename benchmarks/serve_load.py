"""
Load on `rlhf_reward serve` over loopback, compared with scoring the same rows offline.

    pip install 'rlhf_reward[serve]'
    python benchmarks/serve_load.py --data ROWS.jsonl [--data MORE.jsonl] [--requests 10000] [--connections 64]
        [--apart] [--forms] [--offline_once]

Each request is one prompt with one response, sent to `/score` as soon as a connection is free; the responses to one
prompt follow each other, as from best-of-n sampling. With `--apart` each prompt begins with its own number, so that
there is nothing to share. With `--forms` each connection is another client: they send the forms of `FORMS` in turn,
six of which are complete texts that do not tell where the prompt ends. Offline is `Scorer.score` of all rows in one
call, in this process while the server is idle, before and after, or with `--offline_once` only before. Client and
server share the machine. Every answer is compared with the offline reward; statuses other than 200 are counted.
"""
import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import torch
import transformers
from paths import existing

from rlhf_reward import RewardModel, load_rows
from rlhf_reward.data import to_responses
from rlhf_reward.scoring import Scorer
from rlhf_reward.synthetic import tiny_decoder

REQUEST = (
    b"POST %s HTTP/1.1\r\n"
    b"Host: localhost\r\n"
    b"Content-Type: application/json\r\n"
    b"Content-Length: %d\r\n"
    b"\r\n"
    b"%s"
)


@dataclass(frozen=True)
class Form:
    "How a client sends one prompt with one response, and where the reward is in the answer."

    path: str
    body: Callable # of the prompt and the response
    reward: Callable # of the answer


def pair_in(first, second):
    return lambda prompt, response: {"model": "a-model", first: prompt, second: [response]}


def text_in(name):
    return lambda prompt, response: {"model": "a-model", name: prompt + response}


def in_data(name):
    return lambda answer: answer["data"][0][name]


def first_in_data(name):
    return lambda answer: answer["data"][0][name][0]


def relevance_score(answer):
    return answer["results"][0]["relevance_score"]


OWN_FORM = Form(
    "/score",
    lambda prompt, response: {"prompts": [prompt], "responses": [response]},
    lambda answer: answer["rewards"][0],
)
FORMS = {
    "score": OWN_FORM,
    "rank": Form(
        "/rank",
        lambda prompt, response: {"prompt": prompt, "responses": [response]},
        lambda answer: answer["ranked"][0]["reward"],
    ),
    "Cohere": Form("/v2/rerank", pair_in("query", "documents"), relevance_score),
    "Jina": Form("/v1/rerank", pair_in("query", "documents"), relevance_score),
    "TEI rerank": Form("/rerank", pair_in("query", "texts"), lambda answer: answer[0]["score"]),
    "vLLM score": Form("/v1/score", pair_in("text_1", "text_2"), in_data("score")),
    "OpenRLHF": Form(
        "/get_reward",
        lambda prompt, response: {"query": [prompt + response], "prompts": [prompt]},
        lambda answer: answer["rewards"][0],
    ),
    "TEI predict": Form("/predict", text_in("inputs"), lambda answer: answer[0]["score"]),
    "vLLM classify": Form("/classify", text_in("input"), first_in_data("probs")),
    "vLLM classify v1": Form("/v1/classify", text_in("input"), first_in_data("probs")),
    "vLLM pooling": Form("/pooling", text_in("input"), first_in_data("data")),
    "SGLang": Form("/classify", text_in("text"), lambda answer: answer["embedding"][0]),
    "verl": Form("/v1/embeddings", text_in("input"), first_in_data("embedding")),
}


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


class Connection:
    "A connection to the server. It does as little as possible, since client and server share the cores."

    def __init__(self, reader, writer):
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port):
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def post(self, path, body):
        "Return the status and the answer."
        body = json.dumps(body).encode()
        self.writer.write(REQUEST % (path.encode(), len(body), body))
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        answer = json.loads(await self.reader.readexactly(length))
        return int(head.split()[1]), answer

    def close(self):
        self.writer.close()


async def load(port, rows, connections, forms=(OWN_FORM,)):
    "Send every row, each connection in a form of its own."
    served = Served([None] * len(rows), [None] * len(rows))
    remaining = iter(enumerate(rows)) # of all connections

    async def send_rows(form):
        connection = await Connection.open(port)
        for index, (prompt, response) in remaining:
            started = time.perf_counter()
            status, answer = await connection.post(form.path, form.body(prompt, response))
            served.seconds[index] = time.perf_counter() - started
            served.statuses.append(status)
            if status == 200:
                served.rewards[index] = form.reward(answer)
        connection.close()

    started = time.perf_counter()
    await asyncio.gather(*(send_rows(forms[number % len(forms)]) for number in range(connections)))
    served.total_seconds = time.perf_counter() - started
    return served


@contextlib.contextmanager
def running_server(folder, library=None, timeout=300, tokens_per_batch=None):
    "Start the server, of the library in another folder if there is one, and yield its port at once."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rlhf_reward", "serve", "--model", folder, "--device", "cpu"]
    if tokens_per_batch:
        command += ["--tokens_per_batch", str(tokens_per_batch)]
    environment = {**os.environ, **({"PYTHONPATH": library} if library else {})}
    server = subprocess.Popen([*command, "--port", str(port), "--timeout", str(timeout)], env=environment)
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
    offline = statistics.mean(offline_seconds)
    shown = " and ".join(f"{seconds:.1f}" for seconds in offline_seconds)
    total = served.total_seconds
    print(
        f"offline {shown} s, {count / offline:.1f} a second; "
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
    parser.add_argument("--data", action="append", required=True, type=existing)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--apart", action="store_true", help="no two requests share a beginning")
    parser.add_argument("--forms", action="store_true", help="in the forms of all clients")
    parser.add_argument("--offline_once", action="store_true", help="score offline before, and not after")
    parser.add_argument("--tokens_per_batch", type=int, help="of the server and of offline scoring")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--max_characters", type=int, default=4000, help="longer rows are left out")
    return parser.parse_args()


def main():
    options = parse_arguments()
    rows = read(options.data, options.requests, options.max_characters, options.apart)
    prompts = [prompt for prompt, _ in rows]
    responses = [response for _, response in rows]
    forms = list(FORMS.values()) if options.forms else [OWN_FORM]
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, rows[:4000], options.width, options.layers)
        with running_server(folder, tokens_per_batch=options.tokens_per_batch) as port:
            url = f"http://127.0.0.1:{port}"
            scorer = Scorer.from_pretrained(folder, device="cpu", tokens_per_batch=options.tokens_per_batch)
            print_lengths(scorer, rows, options)
            wait_until_ready(url)
            scorer.score(prompts[:100], responses[:100]) # warm up both sides
            asyncio.run(load(port, rows[:200], options.connections, forms))
            warm_seconds = metric(httpx.get(f"{url}/metrics").text, "rlhf_reward_batch_seconds_sum")
            expected, seconds = timed_score(scorer, prompts, responses)
            offline_seconds = [seconds]
            served = asyncio.run(load(port, rows, options.connections, forms))
            if not options.offline_once:
                offline_seconds.append(timed_score(scorer, prompts, responses)[1])
            metrics = httpx.get(f"{url}/metrics").text
    print_results(served, expected, offline_seconds, metrics, warm_seconds, options.connections)


if __name__ == "__main__":
    main()
