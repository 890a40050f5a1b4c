"Which requests are computed together: a large request delays no other one, and prompts stay shared."
import asyncio
import random
from dataclasses import dataclass, field
from itertools import chain

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from rlhf_reward.comparison import shared_length
from rlhf_reward.serving import BATCHES_PER_DRAIN, Batcher


class Engine:
    "Stands for a scorer. The reward of a sequence is its last token; the clock counts the tokens computed."

    reward_options = {}

    def __init__(self, tokens_per_batch, packs=True):
        self.tokens_per_batch = tokens_per_batch
        self.packs = packs
        self.clock = 0
        self.batches = []  # the prompts of each

    def rewards(self, sequences, prompts, progress, should_cancel):
        first_of = {}
        for (sequence,), prompt in zip(sequences, prompts):
            first = first_of.setdefault(prompt, sequence)
            shared = shared_length([first, sequence]) if self.packs and first is not sequence else 0
            self.clock += len(sequence) - shared
        self.batches.append(prompts)
        return [[sequence[-1]] for (sequence,) in sequences]


@dataclass
class Client:
    "Sends its next request as soon as the last one is answered."

    name: str
    responses: int = 1
    prompt: int = 0  # tokens, the same for all responses of a request
    shortest: int = 50  # tokens of a response
    longest: int = 400
    latencies: list = field(default_factory=list)  # tokens that were computed in the meantime

    async def ask(self, batcher, engine, seed):
        words = random.Random(f"{self.name} {seed}")
        prompt = [words.random()] * self.prompt
        sequences = []
        for _ in range(self.responses):
            length = words.randint(self.shortest, self.longest)
            sequences.append(prompt + [words.random() for _ in range(length)])
        started = engine.clock
        (rewards,) = await batcher.rewards([sequences], [f"{self.name} {seed}"])
        assert rewards == [sequence[-1] for sequence in sequences]
        self.latencies.append(engine.clock - started)

    async def ask_on(self, batcher, engine):
        seed = 0
        while True:
            await self.ask(batcher, engine, seed)
            seed += 1


def run_clients(clients, engine, batches):
    "Let the clients send for so many batches."

    async def run():
        batcher = Batcher(engine, max_waiting=10**9)
        batcher.start()
        tasks = [asyncio.create_task(client.ask_on(batcher, engine)) for client in clients]
        while len(engine.batches) < batches:
            await asyncio.sleep(0)
            for task in tasks:
                assert not task.done() or task.result()
        for task in (*tasks, batcher.task):
            task.cancel()

    asyncio.run(run())


def batches_of(requests, engine):
    "Return the prompts of each batch for requests [(prompt, sequences)] that arrive in this order."

    async def run():
        batcher = Batcher(engine, max_waiting=10**9)
        answers = [batcher.rewards([sequences], [prompt]) for prompt, sequences in requests]
        tasks = [asyncio.create_task(answer) for answer in answers]
        await asyncio.sleep(0)
        batcher.start()
        for (_, sequences), rewards in zip(requests, await asyncio.gather(*tasks)):
            assert rewards == [[sequence[-1] for sequence in sequences]]
        batcher.task.cancel()
        assert batcher.waiting == 0

    asyncio.run(run())
    return ["".join(prompts) for prompts in engine.batches]


def apart(length, responses=1):
    return [[index] * length for index in range(responses)]


def sharing(prompt, length, responses):
    return [[prompt[0]] * len(prompt) + [index] * length for index in range(1, responses + 1)]


# Requests in the order of their arrival, and the batches that they are computed in; one has 16 tokens.
@pytest.mark.parametrize(
    "requests, packs, expected",
    [
        ([("a", apart(4, 6)), ("b", apart(4))], False, ["aaab", "aaa"]),
        ([("a", apart(4, 6)), ("b", apart(4, 6))], False, ["aabb", "aabb", "aabb"]),
        ([("a", apart(4, 4)), ("b", apart(4)), ("c", apart(4)), ("d", apart(4))], False, ["abcd", "aaa"]),
        # who does not fit comes next, however small the others are
        ([("a", apart(4, 3)), ("b", apart(14)), ("c", apart(4)), ("d", apart(4))], False, ["aacd", "b", "a"]),
        # the longest sequence of all takes a batch of its own
        ([("a", apart(2)), ("b", apart(40)), ("c", apart(2, 3))], False, ["accc", "b"]),
        # tokens count, not responses: one of b is as long as four of a; and half a batch follows the first round
        ([("a", apart(1, 20)), ("b", apart(4, 4))], False, ["aaaaabb", "aaaaabb", "aaaaaaaaa", "a"]),
        # responses to one prompt come together, and cost what they do not share
        ([("a", sharing([7] * 6, 2, 6)), ("b", apart(4))], True, ["aaab", "aaa"]),
        # those of several requests too
        ([("a", sharing([7] * 6, 2, 1)), ("a", sharing([7] * 6, 3, 1)), ("a", sharing([7] * 6, 4, 1))], True, ["aaa"]),
    ],
)
def test_the_order_of_batches(requests, packs, expected):
    assert batches_of(requests, Engine(4, packs)) == expected


LARGE = {  # with 32 small requests of 100 to 900 tokens, which are two batches
    "one large": [{"responses": 1000, "prompt": 200}],
    "four large": [{"responses": 1000, "prompt": 200}] * 4,
    "long prompts": [{"responses": 1000, "prompt": 1500, "longest": 100}] * 8,
    "medium": [{"responses": 24, "prompt": 300}] * 6,
    "too long for half a batch": [{"shortest": 5000, "longest": 6000}] * 2,
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_request_starves_nobody(kind):
    "The smallest came first, up to one that did not fit: the longer of the small ones waited for 15 batches and more."
    large = [Client(f"large {number}", **options) for number, options in enumerate(LARGE[kind])]
    small = [Client(f"small {number}", shortest=100, longest=900) for number in range(32)]
    engine = Engine(2048)
    run_clients(large + small, engine, batches=60)
    batch = BATCHES_PER_DRAIN * engine.tokens_per_batch
    latencies = sorted(chain.from_iterable(client.latencies for client in small))
    assert len(latencies) > 500, len(latencies)
    assert latencies[len(latencies) // 2] <= 3 * batch
    assert latencies[-1] <= 6 * batch
    for client in large:  # nor do the small ones starve it
        turns = [f"{client.name} " in "".join(prompts) for prompts in engine.batches]
        assert sum(turns) >= 60 // (2 + len(large)), client.name
