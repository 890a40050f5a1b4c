"The server: what it answers, what it refuses, and that it answers the next request whatever the last one did."
import concurrent.futures
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time

import httpx
import pytest
from architectures import save_language_model, word_tokenizer
from programs import kill_group

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from prometheus_client.parser import text_string_to_metric_families

from rlhf_reward import RewardModel
from rlhf_reward.cli import main
from rlhf_reward.data import to_responses
from rlhf_reward.scoring import Scorer
from rlhf_reward.serving import make_app

TEMPLATE = "{% if tools %}w9 w9 {% endif %}{% if think %}w8 {% endif %}{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


def text(length, seed):
    return " " + " ".join(random.Random(seed).choices([f"w{place}" for place in range(3, 64)], k=length))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("model"), word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    RewardModel(save_language_model("llama", folder / "base"), 0.0, "cpu").save_pretrained(folder / "reward", tokenizer)
    return str(folder / "reward")


@pytest.fixture
def scorer(folder):
    return Scorer.from_pretrained(folder, device="cpu")


@contextlib.contextmanager
def serving(scorer, **options):
    with TestClient(make_app(scorer, **{"name": "tiny", **options}), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(scorer):
    with serving(scorer) as client:
        yield client


def close(one, other):
    assert one == pytest.approx(other, abs=1e-5, rel=1e-5)


def healthy(client, scorer, headers={}):
    "The next request is answered, and rightly."
    answer = client.post("/score", json={"prompts": ["w3"], "responses": [" w4 w5"]}, headers=headers)
    assert answer.status_code == 200
    close(answer.json()["rewards"], scorer.score(["w3"], [" w4 w5"]))


# ----- what it answers

def test_score(client, scorer):
    asked, said = [{"role": "user", "content": "w5"}], [{"role": "assistant", "content": "w6"}]
    prompts, responses = ["w3 w4", asked, asked, None, None, ""], [" w5", "w6", said, asked + said, "w3 w4 w5", "w3 w4 w5"]
    rewards = client.post("/score", json={"prompts": prompts, "responses": responses}).json()["rewards"]
    close(rewards, scorer.score(prompts, responses))
    close(rewards, [rewards[0], rewards[1], rewards[1], rewards[1], rewards[0], rewards[0]])
    assert client.post("/score", json={"prompts": [], "responses": []}).json() == {"rewards": []}


def test_rank(client, scorer):
    prompt, responses = text(4, 0), [text(3, 1), text(5, 2), text(3, 1), text(2, 3)]
    ranked = client.post("/rank", json={"prompt": prompt, "responses": responses}).json()["ranked"]
    for one, expected in zip(ranked, scorer.rank(prompt, responses), strict=True):
        assert (one["index"], one["response"]) == (expected.index, expected.response)
        close([one["reward"], one["probability"]], [expected.reward, expected.probability])
    messages = client.post("/rank", json={"prompt": [{"role": "user", "content": "w5"}], "responses": [[{"role": "assistant", "content": "w6"}], [{"role": "assistant", "content": "w7"}]]})
    assert messages.status_code == 200 and messages.json()["ranked"][0]["response"][0]["role"] == "assistant"


def test_normalized(client, scorer):
    for path, body in (("/score", {"prompts": ["w3"], "responses": ["w4"]}), ("/rank", {"prompt": "w3", "responses": ["w4", "w5"]})):
        answer = client.post(path, json={**body, "normalize": True})
        assert answer.status_code == 422 and answer.json()["detail"][0]["loc"] == ["body", "normalize"]
    scorer.model.config.rlhf_reward = {**scorer.model.config.rlhf_reward, "reward_mean": 1.0, "reward_std": 2.0}
    raw = client.post("/rank", json={"prompt": "w3", "responses": ["w4", "w5"]}).json()["ranked"]
    normal = client.post("/rank", json={"prompt": "w3", "responses": ["w4", "w5"], "normalize": True}).json()["ranked"]
    close([one["reward"] for one in normal], [(one["reward"] - 1) / 2 for one in raw])
    close([one["probability"] for one in normal], [one["probability"] for one in raw])


def test_classify_as_vllm(client, scorer):
    tokenizer = scorer.tokenizer
    (expected,) = scorer.score(["w3 w4"], [" w5"])
    ids = tokenizer("w3 w4 w5")["input_ids"] + [tokenizer.eos_token_id]
    answer = client.post("/classify", json={"model": "tiny", "input": "w3 w4 w5"}).json()
    assert set(answer) == {"id", "object", "created", "model", "data", "usage"} and answer["object"] == "list" and answer["model"] == "tiny"
    assert set(answer["data"][0]) == {"index", "label", "probs", "num_classes"} and answer["data"][0]["num_classes"] == 1
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4, "completion_tokens": 0, "prompt_tokens_details": None}
    for given, count in (("w3 w4 w5", 1), (["w3 w4 w5", f"w3 w4 w5{tokenizer.eos_token}"], 2), (ids, 1), ([ids, ids], 2)): # with its end or without
        data = client.post("/classify", json={"input": given, "add_special_tokens": False, "user": "me"}).json()["data"]
        assert [one["index"] for one in data] == list(range(count))
        close([reward for one in data for reward in one["probs"]], [expected] * count)
    messages = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    close(client.post("/classify", json={"messages": messages}).json()["data"][0]["probs"], scorer.score([None], [messages]))
    thinking = client.post("/classify", json={"messages": messages, "chat_template_kwargs": {"think": True}}).json()["data"][0]["probs"]
    close(thinking, scorer.score([None], ["w8 " + tokenizer.apply_chat_template(messages, tokenize=False)]))
    assert client.post("/classify", json={"model": "gpt", "input": "w3"}).status_code == 404
    for wrong in ({"input": "w3", "messages": messages}, {}, {"input": "w3", "truncate_prompt_tokens": 3}, {"input": [[]]}, {"input": [-1]}, {"input": [64]}, {"messages": []}):
        assert client.post("/classify", json=wrong).status_code == 422, wrong
    healthy(client, scorer)


def test_classify_takes_what_clients_of_vllm_send_by_default(client, scorer):
    "And texts in parts."
    defaults = {"truncate_prompt_tokens": -1, "cache_salt": "x", "softmax": True, "activation": None, "continue_final_message": False, "chat_template": None, "mm_processor_kwargs": None,
                "use_activation": True, "priority": 0, "user": None, "request_id": "a"}
    messages = [{"role": "user", "content": "w5\nw7"}, {"role": "assistant", "content": "w6"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "w5"}, {"type": "text", "text": "w7"}]}, messages[1]]
    close(client.post("/classify", json={"messages": parts, **defaults}).json()["data"][0]["probs"], scorer.score([None], [messages]))
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    answer = client.post("/classify", json={"messages": picture})
    assert answer.status_code == 422 and "parts of type text" in answer.text


def test_tools_and_template_arguments(client, scorer):
    "As rows have them: the same number."
    messages = [{"role": "user", "content": "w5"}], [{"role": "assistant", "content": "w6"}]
    expected = scorer.score_comparisons([to_responses({"prompt": messages[0], "response": messages[1], "chat_template_kwargs": {"think": True}})])[0]
    close(client.post("/score", json={"prompts": messages[:1], "responses": messages[1:], "chat_template_kwargs": {"think": True}}).json()["rewards"], expected)
    ranked = client.post("/rank", json={"prompt": messages[0], "responses": messages[1:], "chat_template_kwargs": {"think": True}}).json()["ranked"]
    close([ranked[0]["reward"]], expected)
    assert ranked[0]["response"] == [{"role": "assistant", "content": "w6"}] and abs(expected[0] - scorer.score(*map(lambda one: [one], messages))[0]) > 1e-4
    calls = client.post("/rank", json={"prompt": "w5", "responses": [[{"role": "assistant", "tool_calls": [{"function": {"name": "w7"}}]}]]})
    assert calls.status_code != 200 or "content" not in calls.json()["ranked"][0]["response"][0] # what was not sent does not come back


def test_get_reward_as_openrlhf(client, scorer):
    tokenizer = scorer.tokenizer
    prompts, responses = ["w3 w4", "w3 w4", "w5"], [" w6", " w7 w8", " w9"]
    expected = scorer.score(prompts, responses)
    pad, end = tokenizer.pad_token, tokenizer.eos_token
    queries = [pad + pad + prompts[0] + responses[0] + end, prompts[1] + responses[1], prompts[2] + responses[2] + end + pad + pad] # as it decodes rows
    answer = client.post("/get_reward", json={"query": queries, "prompts": prompts, "labels": ["x", "y", "z"], "anything": 1}).json()
    assert set(answer) == {"rewards"}
    close(answer["rewards"], expected)
    close(client.post("/get_reward", json={"query": queries[1]}).json()["rewards"], expected[1:2])
    assert client.post("/get_reward", json={"query": queries, "prompts": prompts[:2]}).status_code == 422


def test_health_metrics_and_pages(client, scorer):
    assert client.get("/health").json() == {"status": "ok", "model": "tiny", "chat": True, "version": __import__("rlhf_reward").__version__}
    healthy(client, scorer)
    client.post("/score", json={"prompts": []})
    client.get("/no/such/page")
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    requests = {(sample.labels["path"], sample.labels["status"]): sample.value for sample in families["rlhf_reward_requests"].samples if sample.name.endswith("_total")}
    assert requests == {("/health", "200"): 1, ("/score", "200"): 1, ("/score", "422"): 1, ("other", "404"): 1}
    tokens, = [sample.value for sample in families["rlhf_reward_tokens"].samples if sample.name.endswith("_total")]
    assert tokens == len(scorer.tokenizer("w3 w4 w5")["input_ids"]) + 1 and families["rlhf_reward_waiting_tokens"].samples[0].value == 0
    for page in ("/", "/docs"): # works without the internet
        body = client.get(page).text
        assert client.get(page).status_code == 200 and not re.search(r"(src|href)=[\"'](https?:)?//", body)
    scripts = re.findall(r"(?:src|href)=\"(/static[^\"]*)\"", client.get("/docs").text)
    assert scripts and all(client.get(path).status_code == 200 for path in scripts)
    assert set(client.get("/openapi.json").json()["paths"]) == {"/score", "/rank", "/classify", "/get_reward", "/metrics", "/health"}


# ----- what it refuses

def test_token(scorer):
    with serving(scorer, token="secret") as client:
        bodies = {"/score": {"prompts": [], "responses": []}, "/rank": {"prompt": "w3", "responses": ["w4"]}, "/classify": {"input": "w3"}, "/get_reward": {"query": "w3"}}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer secre"}, {"Authorization": "Bearer secret2"}, {"Authorization": "secret"},
                        {"Authorization": "Basic c2VjcmV0"}, {"Authorization": "Bearer "}, {"Authorization": b"Bearer s\xe9cret"}):
            for path, body in bodies.items():
                answer = client.post(path, json=body, headers=headers)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", (path, headers)
            assert client.get("/metrics", headers=headers).status_code == 401
            assert client.post("/rank", content=b"{", headers=headers).status_code == 401 # before the body is read
        for path, body in bodies.items():
            assert client.post(path, json=body, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/health").status_code == client.get("/").status_code == client.get("/docs").status_code == 200
        assert client.post("/rank", json=bodies["/rank"], headers={"Authorization": "bearer secret"}).status_code == 200 # a scheme in any case
        assert client.get("/what").status_code == client.get("/metrics/").status_code == 401 # what is not open is closed
        with TestClient(client.app, root_path="/rm") as behind:
            assert behind.post("/rm/rank", json=bodies["/rank"]).status_code == behind.get("/rm/metrics").status_code == 401
            assert behind.get("/rm/health").status_code == behind.post("/rm/rank", json=bodies["/rank"], headers={"Authorization": "Bearer secret"}).status_code == 200


def test_mounted_in_another_application(scorer):
    "Which starts nothing in it; and one application may be started twice."
    inner, outer = make_app(scorer, token="secret"), FastAPI()
    outer.mount("/rm", inner)
    headers = {"Authorization": "Bearer secret"}
    for client in (TestClient(outer), TestClient(outer)):
        with client:
            assert client.post("/rm/rank", json={"prompt": "w3", "responses": ["w4"]}).status_code == client.get("/rm/metrics").status_code == 401
            assert client.post("/rm/rank", json={"prompt": "w3", "responses": ["w4"]}, headers=headers).status_code == client.get("/rm/health").status_code == 200
    alone = make_app(scorer)
    for _ in range(2):
        with TestClient(alone) as client:
            healthy(client, scorer)


@pytest.mark.parametrize("path, body, place", [
    ("/score", {"responses": ["w3"]}, ["prompts"]),
    ("/score", {"prompts": ["w3"], "responses": [7]}, ["responses", 0]),
    ("/score", {"prompts": ["w3", 5], "responses": ["w4", "w5"]}, ["prompts", 1]),
    ("/score", {"prompts": ["w3"], "responses": ["w4", "w5"]}, ["responses"]),
    ("/score", {"prompts": "w3", "responses": ["w4"]}, ["prompts"]),
    ("/score", {"prompts": ["w3"], "responses": ["w4"], "normalise": True}, ["normalise"]),
    ("/score", {"prompts": ["w3"], "responses": ["w4"], "normalize": "yes"}, ["normalize"]),
    ("/score", {"prompts": [[{"content": "w3"}]], "responses": ["w4"]}, ["prompts", 0]),
    ("/score", {"prompts": ["w3", [{"role": "user"}]], "responses": ["w4", "w5"]}, ["prompts", 1]), # a message of nothing
    ("/rank", {"prompt": "w3", "responses": []}, ["responses"]),
    ("/rank", {"prompt": "w3"}, ["responses"]),
    ("/rank", {"prompt": "w3", "responses": ["w4", [{"role": "assistant", "content": "w5"}]]}, ["responses"]),
    ("/get_reward", {}, ["query"]),
    ("/get_reward", {"query": [None]}, ["query"]),
    ("/score", [], []),
    ("/score", {"prompts": ["\ud800"], "responses": ["w4"]}, ["prompts", 0]),
])
def test_bad_fields_are_named(path, body, place, client, scorer):
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert any(detail["loc"][:1 + len(place)] == ["body", *place] for detail in answer.json()["detail"]), answer.text
    healthy(client, scorer)


def test_what_templates_are_given(client, scorer):
    messages = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    for name, value in (("chat_template", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"), ("add_generation_prompt", True), ("padding", True)):
        assert client.post("/classify", json={"messages": messages, "chat_template_kwargs": {name: value}}).status_code == 422
    deep = json.loads("[" * 400 + "]" * 400)
    for wrong in ([{"role": "\ud800", "content": "w3"}], [{"role": "user", "content": "w3", "name": deep}], [{"role": "user", "content": "w3", "name": "\ud800"}]):
        body = json.dumps({"prompts": [wrong], "responses": ["w4"]})
        assert client.post("/score", content=body).status_code in (200, 422) # 200 where the template does not print it
    scorer.tokenizer.chat_template = "{{ 1 / 0 }}"
    answer = client.post("/score", json={"prompts": [messages[:1]], "responses": ["w4"]})
    assert answer.status_code == 422 and "the chat template refuses its messages" in answer.text
    scorer.tokenizer.chat_template = TEMPLATE
    healthy(client, scorer)


def test_a_long_wrong_list_is_told_once(client, scorer):
    started = time.perf_counter()
    for path, body in (("/score", {"prompts": [1] * 300_000, "responses": []}), ("/classify", {"input": [None] * 300_000}), ("/get_reward", {"query": [1] * 300_000})):
        answer = client.post(path, json=body)
        assert answer.status_code == 422 and len(answer.content) < 20_000
    assert time.perf_counter() - started < 30 # it took minutes when each element was told
    healthy(client, scorer)


def test_a_message_without_a_template(folder):
    scorer = Scorer.from_pretrained(folder, device="cpu")
    scorer.tokenizer.chat_template = None
    with serving(scorer) as client:
        answer = client.post("/score", json={"prompts": ["w3", [{"role": "user", "content": "w4"}]], "responses": ["w5", "w6"]})
        assert answer.status_code == 422 and answer.json()["detail"][0]["loc"] == ["body", "responses", 1] and "no chat template" in answer.text


@pytest.mark.parametrize("body", [b"", b"{", b"not json", b"\xff\xfe\x00", b'{"prompts": NaN, "responses": Infinity}', b'{"prompts": [NaN], "responses": ["w3"]}', b"[" * 100_000,
                                  b'{"prompts": [' + b"9" * 10_000 + b'], "responses": []}', b'{"prompts": ["\\ud800"], "\\udfff": 1}', b"null", b"7", b'"w3"',
                                  b'{"prompts": {"a": ' * 5_000])
def test_malformed_bodies(body, client, scorer):
    for path in ("/score", "/rank", "/classify", "/get_reward"):
        for kind in ("application/json", "text/plain", "multipart/form-data"):
            assert 400 <= client.post(path, content=body, headers={"Content-Type": kind}).status_code < 500, (path, kind)
    healthy(client, scorer)


def test_what_is_too_large(scorer):
    with serving(scorer, max_body=10_000) as client:
        body = json.dumps({"prompts": ["w3"], "responses": ["w4 " * 5000]})
        assert client.post("/score", content=body).status_code == 413
        def chunks(): # without a length
            for start in range(0, len(body), 1000):
                yield body[start:start + 1000].encode()
        answer = client.post("/score", content=chunks())
        assert answer.status_code == 413 and "more than 10000 bytes" in answer.json()["detail"]
        answer = client.post("/score", json={"prompts": ["w3", "w3"], "responses": ["w4", text(70, 0)]})
        assert answer.status_code == 413 and answer.json()["detail"][0]["loc"] == ["body", "responses", 1] and "expected at most 64" in answer.text
        assert client.post("/rank", json={"prompt": "w3", "responses": ["w4", text(70, 0)]}).json()["detail"][0]["loc"] == ["body", "responses"]
        assert client.post("/classify", json={"input": text(70, 0)}).status_code == client.post("/get_reward", json={"query": text(70, 0)}).status_code == 413
        healthy(client, scorer)
    with serving(Scorer(scorer.model, scorer.tokenizer, on_overlong="truncate_prompt")) as client: # the model's policy
        query = {"query": text(70, 0) + text(5, 1)}
        assert client.post("/get_reward", json=query).status_code == client.post("/classify", json={"input": query["query"]}).status_code == 413 # what is the prompt?
        known = client.post("/get_reward", json={**query, "prompts": [text(70, 0)]}).json()
        close(known["rewards"], client.post("/score", json={"prompts": [text(70, 0)], "responses": [text(5, 1)]}).json()["rewards"])
        answer = client.post("/score", json={"prompts": [text(70, 0)], "responses": [text(5, 1)]})
        close(answer.json()["rewards"], Scorer(scorer.model, scorer.tokenizer, on_overlong="truncate_prompt").score([text(70, 0)], [text(5, 1)]))
        assert client.post("/score", json={"prompts": ["w3"], "responses": [text(70, 1)]}).status_code == 413 # not even then


def test_small_bodies_with_much_in_them(scorer, monkeypatch):
    "Each is answered at once, and the next one too: a prompt that is read with each of its responses, and what would be taken off or searched for one by one."
    end = scorer.tokenizer.eos_token
    with serving(scorer, max_body=2_000_000, timeout=20) as client:
        started = time.perf_counter()
        answer = client.post("/rank", json={"prompt": "w3 w4 " * 20_000, "responses": list(map(str, range(5000)))})
        assert answer.status_code == 413 and "600018890 characters; expected at most 2000000" in answer.text
        assert client.post("/classify", json={"input": end * (1_900_000 // len(end))}).status_code in (200, 413, 422)
        assert client.post("/get_reward", json={"query": scorer.tokenizer.pad_token * (1_900_000 // len(scorer.tokenizer.pad_token))}).status_code in (200, 413, 422)
        same = [{"role": "user", "content": "w3"}] * 25_000
        assert client.post("/rank", json={"prompt": same[:12_000], "responses": [same[:12_001] + [{"role": "assistant", "content": "w5"}]]}).status_code == 413
        healthy(client, scorer)
        assert time.perf_counter() - started < 40 # some seconds; minutes where one by one is a copy each


@pytest.mark.parametrize("options, expected", [
    (["--host", "0.0.0.0"], "which others can reach"), (["--host", "::"], "which others can reach"), (["--host", "no such host"], "no address of this machine"),
    (["--token", ""], "The token is empty"), (["--token", "sécret"], "other than printable ASCII"), (["--model", "nowhere/at/all"], "is not there"), (["--token", "a b"], "without spaces"),
    (["--port", "99999"], "expected a port from 1 to 65535"), (["--timeout", "inf"], "expected a port"), (["--device", "cuda"], "no CUDA device")])
def test_the_command_refuses(options, expected, folder, monkeypatch):
    monkeypatch.delenv("RLHF_REWARD_TOKEN", raising=False)
    with pytest.raises(SystemExit) as exit:
        main(["serve", "--model", folder, "--device", "cpu", *options])
    assert expected in exit.value.code


# ----- under load, and when something fails

class Held:
    "A scorer whose computation waits until it is let go, and which notes what it computes together."
    def __init__(self, scorer, monkeypatch):
        self.go, self.begun, self.batches, rewards = threading.Event(), threading.Event(), [], scorer.rewards

        def held(sequences, *args, **kwargs):
            self.begun.set()
            assert self.go.wait(30)
            self.batches.append(len(sequences))
            return rewards(sequences, *args, **kwargs)

        monkeypatch.setattr(scorer, "rewards", held)


def ask(client, prompt, response):
    return client.post("/score", json={"prompts": [prompt], "responses": [response]})


def test_requests_are_computed_together_and_keep_their_answers(scorer, monkeypatch):
    rows = [(text(1 + row % 9, row // 4), text(1 + row % 5, 100 + row)) for row in range(60)]
    expected, held = scorer.score(*map(list, zip(*rows))), Held(scorer, monkeypatch)
    with serving(scorer) as client, concurrent.futures.ThreadPoolExecutor(60) as pool:
        answers = [pool.submit(ask, client, *row) for row in rows]
        assert held.begun.wait(30)
        while client.app.state.batcher.waiting < 300: # all have come
            time.sleep(0.01)
        time.sleep(0.3)
        held.go.set()
        close([answer.result().json()["rewards"][0] for answer in answers], expected)
    assert len(held.batches) < 10 and sum(held.batches) == 60


def test_a_full_queue_is_refused_and_tried_again(scorer, monkeypatch):
    held = Held(scorer, monkeypatch)
    with serving(scorer, max_waiting=30) as client, concurrent.futures.ThreadPoolExecutor(20) as pool:
        first = pool.submit(ask, client, text(5, 0), text(5, 1))
        assert held.begun.wait(30)
        others = [pool.submit(ask, client, text(5, seed), text(5, seed)) for seed in range(8)]
        done, waiting = concurrent.futures.wait(others, timeout=2)
        refused = [answer.result() for answer in done]
        assert len(refused) == 7 and len(waiting) == 1 # 11 tokens each: two fit into 30
        assert all(answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1 and "try again" in answer.text for answer in refused)
        held.go.set()
        assert first.result().status_code == waiting.pop().result().status_code == 200
        healthy(client, scorer)
        assert ask(client, text(20, 0), text(20, 1)).status_code == 413 # it would never fit


def test_a_request_that_takes_too_long_is_given_up(scorer, monkeypatch):
    held = Held(scorer, monkeypatch)
    with serving(scorer, timeout=0.5) as client, concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, client, text(3, seed), " w4") for seed in range(4)]
        for answer in answers:
            assert answer.result().status_code == 503 and "no answer in 0.5 s" in answer.result().text and answer.result().headers["retry-after"]
        held.go.set()
        while client.app.state.batcher.waiting:
            time.sleep(0.01)
        assert sum(held.batches) < 4 # those that were given up while they waited are not computed
        healthy(client, scorer)
        assert "rlhf_reward_timeouts_total 4.0" in client.get("/metrics").text


def test_what_nobody_waits_for_is_not_computed_to_the_end(folder, monkeypatch):
    "A request of many batches that was given up holds up no other one."
    scorer = Scorer.from_pretrained(folder, device="cpu", tokens_per_batch=8)
    forward, computed = scorer._forward, []
    monkeypatch.setattr(scorer, "_forward", lambda batch: time.sleep(0.05) or computed.append(batch) or forward(batch))
    with serving(scorer, timeout=1) as client:
        many = {"prompts": [text(3, seed) for seed in range(200)], "responses": [text(3, 1000 + seed) for seed in range(200)]}
        answer = client.post("/score", json=many)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1 and len(computed) < 60
        while client.app.state.batcher.waiting:
            time.sleep(0.01)
        assert len(computed) < 60
        healthy(client, scorer)


def test_limits_below_one(scorer):
    for options in ({"max_body": 0}, {"max_waiting": 0}):
        with pytest.raises(ValueError, match="expected 1 or more"):
            make_app(scorer, **options)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, type("Panic", (BaseException,), {})])
def test_a_failing_request_fails_alone(kind, scorer, monkeypatch):
    held, rewards, poison = Held(scorer, monkeypatch), scorer.rewards, None
    (poison,) = scorer.tokenizer("w13")["input_ids"]

    def poisoned(sequences, *args, **kwargs):
        found = rewards(sequences, *args, **kwargs)
        if any(poison in sequence for own in sequences for sequence in own):
            raise kind("a kernel failed")
        return found

    monkeypatch.setattr(scorer, "rewards", poisoned)
    rows = [("w3", " w4"), ("w5", " w13"), ("w6", " w7"), ("w8", " w9")]
    with serving(scorer) as client, concurrent.futures.ThreadPoolExecutor(5) as pool:
        first = pool.submit(ask, client, "w20", "w21")
        assert held.begun.wait(30)
        answers = [pool.submit(ask, client, *row) for row in rows]
        time.sleep(0.5)
        held.go.set()
        assert first.result().status_code == 200
        assert [answer.result().status_code for answer in answers] == [200, 500, 200, 200]
        assert "RuntimeError" in answers[1].result().json()["detail"] and "kernel" not in answers[1].result().text
        close([answers[place].result().json()["rewards"][0] for place in (0, 2, 3)], [rewards([[scorer.tokenizer(p + r)["input_ids"] + [2]]], ["p"], progress=False)[0][0]
                                                                                       for p, r in (rows[0], rows[2], rows[3])])
        healthy(client, scorer)


# ----- a process of its own

ENDED = (0, -signal.SIGTERM) # uvicorn ends, once it has shut down, by the signal that it was sent


class Server:
    "The command `rlhf_reward serve` in a process of its own, from its first answer to the end of the `with`."
    def __init__(self, python, folder, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [
                *(python, "-m", "rlhf_reward", "serve"),
                *("--model", folder),
                *("--device", "cpu"),
                *("--port", str(self.port)),
                *options,
            ],
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def __enter__(self):
        for _ in range(240):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{self.url}/health")
                return self
            assert self.process.poll() is None, self.printed()
            time.sleep(0.25)
        self.close()
        raise AssertionError(f"The server did not start in a minute:\n{self.printed()}")

    def __exit__(self, *_):
        self.close()

    def close(self):
        kill_group(self.process)
        self.process.wait()

    def end(self):
        "Ask the server to end, and see that it does."
        self.process.terminate()
        assert self.process.wait(60) in ENDED, self.printed()

    def printed(self):
        self.log.seek(0)
        return self.log.read()

    def connect(self):
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.settimeout(30)
        return connection


@pytest.fixture(scope="module")
def server(folder, python):
    with Server(python, folder, "--name", "tiny") as server:
        yield server
        server.end()


def request(body, length=None):
    body = json.dumps(body).encode()
    length = len(body) if length is None else length
    lines = [
        b"POST /score HTTP/1.1",
        b"Host: x",
        b"Content-Type: application/json",
        b"Content-Length: %d" % length,
        b"",
        body,
    ]
    return b"\r\n".join(lines)


ONE = {"prompts": ["w3"], "responses": [" w4 w5"]}


def test_clients_that_go(server, scorer):
    for sent in (b"POST /score", request(ONE)[:-5], request(ONE), request(ONE, length=10 ** 6), b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", request(ONE) * 5):
        with server.connect() as connection:
            connection.sendall(sent)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00") # gone at once, with a reset
        with httpx.Client(base_url=server.url) as client:
            healthy(client, scorer)


def test_bodies_that_never_end(folder, scorer, python):
    "The server waits for them as long as for an answer, and does not read beyond the limit."
    with Server(python, folder, "--timeout", "2", "--max_body", "100000") as server:
        with server.connect() as connection:
            connection.sendall(request(ONE)[:-5])
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
            while connection.recv(1000):
                pass  # until the server closes it
        with server.connect() as connection:
            head = [b"POST /score HTTP/1.1", b"Host: x", b"Content-Type: application/json", b"Transfer-Encoding: chunked"]
            connection.sendall(b"\r\n".join([*head, b"", b""]))
            sent = 0
            with contextlib.suppress(ConnectionError):
                while sent < 50_000_000:
                    connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
                    sent += 0x10000
            assert sent < 50_000_000
        with httpx.Client(base_url=server.url) as client:
            healthy(client, scorer)
        with server.connect() as connection:
            connection.sendall(request(ONE)[:-5])
            time.sleep(0.3)
            started = time.perf_counter()
            server.end()
            assert time.perf_counter() - started < 6


def test_a_huge_body_is_not_read(server, scorer):
    with server.connect() as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    with httpx.Client(base_url=server.url) as client:
        healthy(client, scorer)


@pytest.mark.fuzz
@pytest.mark.parametrize("path", ["/score", "/rank", "/classify", "/get_reward"])
def test_random_requests(path, server, scorer, pytestconfig):
    """
    Requests made from the server's own OpenAPI, some as it describes them and some not: no error of the server's, every
    answer documented and of the documented shape. `--fuzz-cases` sets how many.
    """
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    cases = pytestconfig.getoption("--fuzz-cases")
    operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path]["POST"]
    right = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    wrong = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    seen = []

    @given(case=right | wrong)
    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def send(case):
        answer = case.call()
        case.validate_response(answer, checks=checks)
        seen.append(answer.status_code)

    send()
    assert len(seen) >= cases and {200, 422} <= set(seen), (len(seen), set(seen))
    with httpx.Client(base_url=server.url) as client:
        healthy(client, scorer)


def test_what_was_accepted_is_answered_before_the_end(folder, scorer, python):
    rows = []
    for number in range(24):
        prompts = [text(20, 50 * number + row) for row in range(40)]
        responses = [text(20, 9000 + 50 * number + row) for row in range(40)]
        rows.append((prompts, responses))
    with Server(python, folder) as server:
        connections = [server.connect() for _ in rows]
        for connection, (prompts, responses) in zip(connections, rows):
            connection.sendall(request({"prompts": prompts, "responses": responses}))
        while tokens_received(server) < 24 * 40 * 41:
            pass
        server.process.send_signal(signal.SIGTERM)
        answered = 0
        for connection, (prompts, responses) in zip(connections, rows):
            with connection, connection.makefile("rb") as file:
                assert file.readline().startswith(b"HTTP/1.1 200")
                headers = dict(line.lower().strip().split(b": ", 1) for line in iter(file.readline, b"\r\n"))
                rewards = json.loads(file.read(int(headers[b"content-length"])))["rewards"]
                close(rewards, scorer.score(prompts, responses))
                answered += 1
        assert answered == 24 and server.process.wait(60) in ENDED
        with pytest.raises(OSError):
            server.connect()


def tokens_received(server):
    "Tokens that wait or were computed."
    names = ("rlhf_reward_waiting_tokens", "rlhf_reward_tokens_total")
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(names))


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_the_page_in_a_browser(server, scorer, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    prompt, responses = "w5 w6", ["w7 <b>w8</b>", "w9 w10 w11", "w12"]
    expected = scorer.rank([{"role": "user", "content": prompt}], responses)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page, asked, errors = browser.new_page(), [], []
        page.on("request", lambda one: asked.append(one.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.get_by_label("Prompt").fill(prompt)
        page.get_by_role("button", name="Add a response").click()
        for area, response in zip(page.get_by_label("Response", exact=True).all(), responses, strict=True):
            area.fill(response)
        page.get_by_role("button", name="Rank", exact=True).click()
        page.wait_for_selector("#ranked:not([hidden])")
        rows = [[cell.inner_text() for cell in row.locator("td").all()] for row in page.locator("#ranked tbody tr").all()]
        assert [row[1] for row in rows] == [one.response for one in expected] # the tags as text
        assert [row[2] for row in rows] == [f"{one.reward:.4f}" for one in expected]
        assert [row[3] for row in rows] == [f"{100 * one.probability:.1f} %" for one in expected]
        page.screenshot(path=os.environ.get("SCREENSHOT") or tmp_path / "page.png", full_page=True)
        page.get_by_label("Response", exact=True).first.fill("w3 " * 99)
        page.get_by_role("button", name="Rank", exact=True).click()
        page.get_by_text("expected at most 64").wait_for()
        assert not errors and all(url.startswith((server.url, "data:")) for url in asked) # nothing from elsewhere
        browser.close()
