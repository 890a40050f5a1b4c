"""
Small requests next to a huge one: what one client with 1,000 responses in a request does to 32 clients with one.

    pip install 'rlhf_reward[serve]'
    python benchmarks/serve_fair.py --data ROWS.jsonl [--data MORE.jsonl] [--seconds 120] [--library FOLDER ...]

Small clients send one prompt with one response to `/score`, and the next one as soon as they have the answer; large
clients send `--responses` responses to one prompt to `/rank` in the same way. All begin at once. After `--seconds` the
latencies of the small requests that were answered are printed: first without the large clients, then with them. Each
`--library` is a folder with another version of the library, such as a `git worktree`, which serves in turn; by default
only the installed one does. Every answer of a small request is compared with the offline reward.
"""
import argparse
import asyncio
import itertools
import statistics
import tempfile
import time

import torch
from paths import existing
from serve_load import OWN_FORM, Connection, make_model, read, running_server, wait_until_ready

from rlhf_reward.scoring import Scorer


class Answers:
    "The answers of all clients, and their latencies."

    def __init__(self):
        self.small = {} # index of the row → reward
        self.seconds = [] # of small requests
        self.large = [] # seconds of large requests
        self.failed = 0 # statuses other than 200


async def send_small(port, remaining, answers, pause):
    connection = await Connection.open(port)
    for index, (prompt, response) in remaining:
        await asyncio.sleep(pause)
        started = time.perf_counter()
        status, answer = await connection.post(OWN_FORM.path, OWN_FORM.body(prompt, response))
        answers.seconds.append(time.perf_counter() - started)
        answers.failed += status != 200
        if status == 200:
            answers.small[index] = OWN_FORM.reward(answer)


async def send_large(port, bodies, answers):
    connection = await Connection.open(port)
    for body in bodies:
        started = time.perf_counter()
        status, answer = await connection.post("/rank", body)
        if status != 200:
            raise RuntimeError(f"A large request was refused: {answer}")
        answers.large.append(time.perf_counter() - started)


def large_bodies(rows, num_responses):
    "Yield requests of so many responses to one prompt: those of the shorter rows, each time with another prompt."
    rows = [(prompt, response) for prompt, response in rows if len(prompt) + len(response) < 800]
    responses = list(itertools.islice(itertools.cycle(response for _, response in rows), num_responses))
    for number, (prompt, _) in enumerate(rows):
        numbered = [f"{response} {index}" for index, response in enumerate(responses)]
        yield {"prompt": f"{number} {prompt}", "responses": numbered}


async def send_all(port, rows, num_large, options):
    "Return the answers that arrived in time."
    answers = Answers()
    remaining = iter(enumerate(rows)) # of all small clients
    clients = [send_small(port, remaining, answers, options.pause) for _ in range(options.small)]
    bodies = large_bodies(rows, options.responses)
    clients += [send_large(port, bodies, answers) for _ in range(num_large)]
    tasks = [asyncio.create_task(client) for client in clients]
    done, _ = await asyncio.wait(tasks, timeout=options.seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        task.cancel()
    for task in done:
        task.result() # its error
    return answers


def print_answers(name, num_large, answers, rows, scorer, seconds):
    indices = sorted(answers.small)
    expected = scorer.score([rows[index][0] for index in indices], [rows[index][1] for index in indices])
    largest = max(map(abs, expected))
    difference = max(abs(answers.small[index] - reward) for index, reward in zip(indices, expected)) / largest
    quantiles = statistics.quantiles(answers.seconds, n=100)
    print(
        f"{name}, {num_large} large: {len(answers.seconds) / seconds:.1f} small requests a second, median "
        f"{quantiles[49]:.2f} s, p99 {quantiles[98]:.2f} s, slowest {max(answers.seconds):.2f} s; "
        f"large answered {len(answers.large)}, seconds {[round(spent, 1) for spent in answers.large]}; "
        f"not 200: {answers.failed}; largest difference {difference:.1e} of the largest reward",
        flush=True,
    )


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", action="append", required=True, type=existing)
    parser.add_argument("--small", type=int, default=32, help="clients that send single responses")
    parser.add_argument("--large", type=int, default=1, help="clients that send many")
    parser.add_argument("--responses", type=int, default=1000, help="of a large request")
    parser.add_argument("--pause", type=float, default=0, help="seconds of a small client before each request")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--library", action="append", help="a folder with a version of the library")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--max_characters", type=int, default=2000, help="longer rows are left out")
    return parser.parse_args()


def main():
    options = parse_arguments()
    rows = read(options.data, 20_000, options.max_characters, apart=True)
    print(f"width {options.width}, {options.layers} layers, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, rows[:4000], options.width, options.layers)
        scorer = Scorer.from_pretrained(folder, device="cpu")
        for library in options.library or [None]:
            for num_large in (0, options.large):
                with running_server(folder, library, timeout=3600) as port:
                    wait_until_ready(f"http://127.0.0.1:{port}")
                    answers = asyncio.run(send_all(port, rows, num_large, options))
                name = library or "installed"
                print_answers(name, num_large, answers, rows, scorer, options.seconds)


if __name__ == "__main__":
    main()
