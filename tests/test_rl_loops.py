"""
Rewards in verl and OpenRLHF: with their own code where it is at hand, and a copy of its loading.

Their code is that of the installed packages, or of clones: `VERL=verl OPENRLHF=OpenRLHF pytest tests/test_rl_loops.py`.
Only the files that load a function are run, with stubs for what they import, so nothing of either has to be installed.
"""
import asyncio
import functools
import importlib
import importlib.util
import inspect
import logging
import os
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import save_chat_reward_model

from rlhf_reward import RewardFunction, Scorer
from rlhf_reward.rl_loops import GatheredRewards, OpenRLHFReward, VerlRewardManager, compute_score, gathered_rewards

PROMPT = "w5 w6"
COMPLETIONS = [f" w{number} w{number + 1}" for number in range(3, 23)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_reward_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def scorer(folder):
    return Scorer.from_pretrained(folder, device="cpu")


def close(rewards, expected):
    torch.testing.assert_close(list(rewards), list(expected), rtol=1e-5, atol=1e-5)


def messages():
    return [{"role": "user", "content": PROMPT}]


# ----- calls that are computed together

def test_calls_are_computed_together_and_fail_alone(scorer, monkeypatch):
    sizes = []
    score = scorer.rewards

    def counted(sequences, *args, **kwargs):
        sizes.append(len(sequences))
        return score(sequences, *args, **kwargs)

    monkeypatch.setattr(scorer, "rewards", counted)
    gathered = GatheredRewards(RewardFunction(scorer))
    ready = threading.Event()
    gathered.worker.submit(ready.wait, 30)  # all arrive before the first batch
    futures = [gathered.submit(PROMPT, completion) for completion in COMPLETIONS]
    ready.set()
    rewards = [future.result() for future in futures]
    assert sizes == [20]
    close(rewards, scorer.score([PROMPT] * 20, COMPLETIONS))


def test_on_error(scorer):
    bad = " w7" * 100
    expected = scorer.score([PROMPT], [" w8"])
    gathered = GatheredRewards(RewardFunction(scorer))
    futures = [gathered.submit(PROMPT, completion) for completion in (bad, " w8", bad)]
    close([futures[1].result()], expected)
    for future in futures[::2]:
        with pytest.raises(ValueError, match="has 103 tokens; expected at most 64"):
            future.result()
    gathered = GatheredRewards(RewardFunction(scorer, on_error=-3))
    futures = [gathered.submit(PROMPT, completion) for completion in (bad, " w8", bad)]
    close([future.result() for future in futures], [-3.0, *expected, -3.0])
    assert gathered.function.num_errors == 2
    for make in (OpenRLHFReward, gathered_rewards):
        with pytest.raises(ValueError, match="needs a reward of each completion; expected 'raise' or a number"):
            make(model=scorer, on_error="none")


def add_stubs(monkeypatch, modules):
    "Add modules to those that are imported already, with the packages that they are in."
    for name, contents in modules.items():
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:count]))
            module.__path__ = []
            if module.__name__ not in sys.modules:
                monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(sys.modules[name]).update(contents)


def run_file(name, path):
    "Return a module from its file, without the package that it is in."
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----- OpenRLHF

class CopiedExecutor:
    "Does with a file what `SingleTurnAgentExecutor` in openrlhf/utils/agent.py of OpenRLHF 0.11.2 does."

    def __init__(self, path):
        spec = importlib.util.spec_from_file_location("reward_func", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.reward_func = module.reward_func

    async def _fetch_rewards_via_func(self, queries, prompts, labels):
        calls = []
        for query, prompt, label in zip(queries, prompts, labels):
            calls.append(asyncio.to_thread(self.reward_func, [query], [prompt], [label]))
        return await asyncio.gather(*calls)


def their_executor(monkeypatch):
    "Load the file alone, as OpenRLHF's own tests do: the package needs a GPU."
    package = importlib.util.find_spec("openrlhf")
    if package:
        folder = Path(package.submodule_search_locations[0])
    elif "OPENRLHF" in os.environ:
        folder = Path(os.environ["OPENRLHF"]) / "openrlhf"
    else:
        pytest.skip("OpenRLHF is not installed, and OPENRLHF names no clone")
    stubs = {"openrlhf.utils.logging_utils": {"init_logger": logging.getLogger}}
    if importlib.util.find_spec("aiohttp") is None:
        stubs["aiohttp"] = {}
    add_stubs(monkeypatch, stubs)
    return run_file("openrlhf_agent", folder / "utils" / "agent.py").SingleTurnAgentExecutor


@pytest.mark.parametrize("kind", ["a copy", "OpenRLHF"])
def test_the_file_of_openrlhf(kind, folder, scorer, tmp_path, monkeypatch):
    executor = CopiedExecutor if kind == "a copy" else their_executor(monkeypatch)
    path = tmp_path / "reward_func.py"
    path.write_text(
        "from rlhf_reward.rl_loops import OpenRLHFReward\n"
        f"reward_func = OpenRLHFReward({folder!r}, device='cpu', on_error=-2)\n"
    )
    prompts = [PROMPT] * 20 + ["w7", "another", PROMPT]
    completions = COMPLETIONS + ["", "", " w9" * 100]
    queries = [prompt + completion for prompt, completion in zip(prompts, completions)]
    queries[21] = "w8 w9"  # not the prompt's text, as after truncation
    rewards = asyncio.run(executor(str(path))._fetch_rewards_via_func(queries, prompts, ["label"] * len(queries)))
    expected = scorer.score(prompts[:21], completions[:21]) + scorer.score([None], ["w8 w9"]) + [-2.0]
    for name in ("rewards", "scores"):
        assert {tuple(result[name].shape) for result in rewards} == {(1,)}
        close([torch.tensor([result[name]]).item() for result in rewards], expected)  # as samples_generator.py does
    assert all(result["extra_logs"] == {} for result in rewards)


# ----- verl

def copied_function(reward):
    "Do what `get_custom_reward_fn` and `load_extern_object` of verl 0.9.1 do with a path that begins with pkg://."
    config = reward["custom_reward_function"]
    function = getattr(importlib.import_module(config["path"].removeprefix("pkg://")), config["name"])

    async def call(function, extra, *args, **kwargs):
        return await function(*args, **{**kwargs, **extra})

    assert inspect.iscoroutinefunction(function)
    return functools.partial(call, function, dict(config["reward_kwargs"]))


def their_function(reward):
    return their_reward_module().get_custom_reward_fn(omega({"reward": reward}))


def copied_manager(reward, tokenizer):
    "Do what `load_reward_manager` of verl 0.9.1 does."
    manager = reward["reward_manager"]
    found = getattr(importlib.import_module(manager["module"]["path"].removeprefix("pkg://")), manager["name"])
    return found(
        config=SimpleNamespace(reward=reward),
        tokenizer=tokenizer,
        compute_score=print,
        reward_router_address=None,
        reward_model_tokenizer=None,
    )


def their_manager(reward, tokenizer):
    return their_reward_module().load_reward_manager(
        omega({"reward": reward}), tokenizer, reward_router_address=None, reward_model_tokenizer=None
    )


def their_reward_module():
    return pytest.importorskip("verl.trainer.ppo.reward", reason="verl is not installed, and VERL names no clone")


@pytest.fixture
def verl_clone(monkeypatch):
    "verl's files that load a reward function or manager, if VERL names a clone."
    if "VERL" in os.environ:
        add_stubs(monkeypatch, {
            "verl": {"DataProto": Copied},
            "verl.utils.reward_score": {"get_default_compute_score": lambda name: print},
        })
        for name in ("verl.utils.import_utils", "verl.trainer.ppo.reward"):
            module = run_file(name, Path(os.environ["VERL"], *name.split(".")).with_suffix(".py"))
            add_stubs(monkeypatch, {name: vars(module)})


class Config(dict):
    "A dict whose values are attributes, too."
    __getattr__ = dict.get


def omega(config):
    "A config of verl; of dicts where OmegaConf is not installed."
    if importlib.util.find_spec("omegaconf"):
        return importlib.import_module("omegaconf").OmegaConf.create(config)
    return Config({name: omega(value) if isinstance(value, dict) else value for name, value in config.items()})


MANAGER = {
    "reward_manager": {
        "source": "importlib",
        "name": "VerlRewardManager",
        "module": {"path": "pkg://rlhf_reward.rl_loops"},
    },
    "custom_reward_function": {"path": None, "name": "compute_score"},
}


@pytest.mark.parametrize("load", [copied_function, their_function])
def test_the_function_of_verl(load, folder, scorer, verl_clone):
    reward = {
        "custom_reward_function": {
            "path": "pkg://rlhf_reward.rl_loops",
            "name": "compute_score",
            "reward_kwargs": {"model": folder, "device": "cpu", "on_error": -4, "prompt_key": "question"},
        }
    }
    function = load(reward)
    prompts = [np.array(messages(), dtype=object)] * 20 + [PROMPT, PROMPT]
    completions = COMPLETIONS + [" w9", " w9" * 100]

    async def rewards():
        calls = []
        for prompt, completion in zip(prompts, completions):
            info = {"question": prompt, "num_turns": None}
            calls.append(
                function(data_source="x", solution_str=completion, ground_truth="7", extra_info=info)
            )
        return await asyncio.gather(*calls)

    expected = scorer.score([messages()] * 20 + [PROMPT], completions[:21])
    close(asyncio.run(rewards()), [*expected, -4.0])


def test_what_the_function_of_verl_refuses(folder):
    for options, expected in (
        ({}, r"no model in the options \[\]; expected its folder or name: \+reward.custom_reward_function"),
        ({"model": folder}, r"extra_info has the keys \['question'\]; expected the prompt as 'prompt'"),
    ):
        with pytest.raises(ValueError, match=expected):
            asyncio.run(compute_score("x", " w5", "7", {"question": "w3"}, **options))


def completion_data(completion_ids, prompt, make=None):
    "Return the data of one completion, padded on the right."
    ids = torch.tensor([[1, 1, *completion_ids, 0, 0]])
    batch = {
        "prompts": ids[:, :2],
        "responses": ids[:, 2:],
        "attention_mask": torch.tensor([[0, 1] + [1] * len(completion_ids) + [0, 0]]),
    }
    others = {"raw_prompt": np.array([prompt], dtype=object), "data_source": np.array(["x"], dtype=object)}
    if make is not None:
        return make(batch, others)
    return Copied(batch, others)


class Copied:
    "A `DataProto` with as much as a reward manager reads."

    def __init__(self, batch, non_tensor_batch):
        self.batch = batch
        self.non_tensor_batch = non_tensor_batch

    def __getitem__(self, index):
        def select(values):
            return {name: value[index] for name, value in values.items()}

        return Copied(select(self.batch), select(self.non_tensor_batch))


def their_data(batch, others):
    verl = pytest.importorskip("verl", reason="verl is not installed")
    if verl.DataProto is Copied: # of a clone, of which only the loading is run
        return Copied(batch, others)
    return verl.DataProto.from_dict(tensors=batch, non_tensors=others)


@pytest.mark.parametrize("load, make", [(copied_manager, Copied), (their_manager, their_data)])
def test_the_manager_of_verl(load, make, folder, scorer, verl_clone):
    tokenizer = scorer.tokenizer
    options = {"model": folder, "device": "cpu", "on_error": -5}
    manager = load({**MANAGER, "reward_kwargs": options}, tokenizer)
    completions = COMPLETIONS + [" w9" * 100]
    prompt = np.empty(1, dtype=object)
    prompt[0] = messages()[0]

    async def rewards():
        calls = []
        for completion in completions:
            ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
            calls.append(manager.run_single(completion_data([*ids, 2], list(prompt), make)))
        return await asyncio.gather(*calls)

    results = asyncio.run(rewards())
    expected = scorer.score([messages()] * 20, [completion.strip() for completion in COMPLETIONS])
    close([result["reward_score"] for result in results], [*expected, -5.0])
    data = completion_data([5, 6, 7], "w3", make)
    assert type(manager).assemble_rm_scores(data, [1.5]).tolist() == [[0, 0, 1.5, 0, 0]]


def test_what_the_manager_of_verl_refuses(scorer, folder):
    function = {**MANAGER, "custom_reward_function": {"path": "x.py"}, "reward_kwargs": {"model": folder}}
    for reward, expected in (
        (MANAGER, r"expected its folder or name: \+reward.reward_kwargs.model=my-reward-model"),
        ({**MANAGER, "reward_kwargs": {"max_length": 9}}, r"no model in the options \['max_length'\]"),
        (function, "a custom_reward_function and VerlRewardManager"),
    ):
        with pytest.raises(ValueError, match=expected):
            VerlRewardManager(SimpleNamespace(reward=reward), scorer.tokenizer)
