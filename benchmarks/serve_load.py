"""
Load on `rlhf_reward serve` over loopback, beside scoring the same rows offline.

    pip install 'rlhf_reward[serve]'
    python benchmarks/serve_load.py --data ROWS.jsonl [--data MORE.jsonl] [--requests 10000] [--connections 64] [--apart]

Each request is one prompt with one response, sent to `/score` as soon as a connection is free; the responses to one prompt follow each
other, as from best-of-n sampling. With `--apart` each prompt begins with a number of its own, so that there is nothing to share. Offline is `Scorer.score` of all rows in one call, in this process while the server idles,
before and after. Client and server share the machine. Every answer is compared with the offline reward; anything but 200 is counted.
"""
import argparse
import asyncio
import itertools
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import httpx
import torch
import transformers

from rlhf_reward import RewardModel, load_rows
from rlhf_reward.data import to_responses
from rlhf_reward.scoring import Scorer
from rlhf_reward.synthetic import tiny_decoder


def read(paths, count, max_characters, apart):
    "(prompt, response) by prompt, again from the start until there are enough."
    responses_of = {}
    for path in paths:
        for row in load_rows(path):
            comparison = to_responses(row)
            for response in comparison.responses:
                if len(comparison.prompt) + len(response) <= max_characters:
                    responses_of.setdefault(comparison.prompt, {}).setdefault(response)
    rows = [(prompt, response) for prompt, responses in responses_of.items() for response in responses]
    random.Random(0).shuffle(rows) if apart else None
    again = ((f"{turn} " * (turn > 0) + prompt, response) for turn in itertools.count() for prompt, response in rows) # unlike the first time
    taken = itertools.islice(again, count)
    return [(f"{number} {prompt}", response) for number, (prompt, response) in enumerate(taken)] if apart else list(taken)


def make_model(folder, texts, width, layers):
    tiny_decoder(folder, texts, vocab_size=8192, hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers,
                 num_attention_heads=width // 64, max_position_embeddings=8192, initializer_range=0.02)
    torch.manual_seed(0)
    RewardModel(folder, 0.0, "cpu").save_pretrained(folder, transformers.AutoTokenizer.from_pretrained(folder))


async def load(port, rows, connections):
    "Rewards, seconds of each request, statuses, and seconds of all. The client is as light as can be: it has the cores in common with the server."
    rewards, seconds, statuses = [None] * len(rows), [None] * len(rows), []
    following = iter(enumerate(rows))

    async def connection():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for place, (prompt, response) in following:
            body = json.dumps({"prompts": [prompt], "responses": [response]}).encode()
            started = time.perf_counter()
            writer.write(b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            answer = json.loads(await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0])))
            seconds[place] = time.perf_counter() - started
            statuses.append(int(head.split()[1]))
            if statuses[-1] == 200:
                rewards[place], = answer["rewards"]
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(connections)))
    return rewards, seconds, statuses, time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--apart", action="store_true", help="no two requests share a beginning")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--max_characters", type=int, default=4000, help="longer rows are left out")
    options = parser.parse_args()

    rows = read(options.data, options.requests, options.max_characters, options.apart)
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, [text for row in rows[:4000] for text in row], options.width, options.layers)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = subprocess.Popen([sys.executable, "-m", "rlhf_reward", "serve", "--model", folder, "--device", "cpu", "--port", str(port), "--timeout", "300"])
        try:
            url, scorer = f"http://127.0.0.1:{port}", Scorer.from_pretrained(folder, device="cpu")
            prompts, responses = map(list, zip(*rows))
            lengths = sorted(len(own[0]) for own in scorer.tokenize([to_responses({"prompt": p, "response": r}) for p, r in rows]))
            print(f"{len(rows)} requests, {sum(lengths)} tokens: {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}; "
                  f"width {options.width}, {options.layers} layers, {torch.get_num_threads()} threads")
            while True:
                try:
                    httpx.get(f"{url}/health").raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(0.5)
            scorer.score(prompts[:100], responses[:100])
            asyncio.run(load(port, rows[:200], options.connections))

            def offline():
                started = time.perf_counter()
                rewards = scorer.score(prompts, responses)
                return rewards, time.perf_counter() - started

            warm = float(next(line.split()[-1] for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith("rlhf_reward_batch_seconds_sum")))
            expected, before = offline()
            rewards, seconds, statuses, took = asyncio.run(load(port, rows, options.connections))
            _, after = offline()
            metrics = httpx.get(f"{url}/metrics").text
        finally:
            server.terminate()
            server.wait()
    largest = max(map(abs, expected))
    differences = [abs(one - other) / largest for one, other in zip(rewards, expected) if one is not None]
    value = lambda name: float(next(line.split()[-1] for line in metrics.splitlines() if line.startswith(name)))
    quantiles = statistics.quantiles(seconds, n=100)
    print(f"not 200: {sum(status != 200 for status in statuses)}; answered: {len(differences)} of {len(rows)}; "
          f"largest difference from offline: {max(differences):.1e} of the largest reward")
    print(f"offline {before:.1f} and {after:.1f} s, {len(rows) / ((before + after) / 2):.1f} a second; served {took:.1f} s, {len(rows) / took:.1f} a second: "
          f"{(before + after) / 2 / took:.2f} of offline")
    print(f"latency with {options.connections} connections: median {quantiles[49]:.3f} s, p99 {quantiles[98]:.3f} s; "
          f"{value('rlhf_reward_batch_requests_sum') / value('rlhf_reward_batch_requests_count'):.1f} requests a batch, "
          f"computing {value('rlhf_reward_batch_seconds_sum') - warm:.1f} s")


if __name__ == "__main__":
    main()
