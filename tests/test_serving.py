"The server: what it answers, what it refuses, and that it answers the next request whatever the last one did."
import concurrent.futures
import contextlib
import copy
import functools
import itertools
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from architectures import save_chat_reward_model
from programs import kill_group

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

import rlhf_reward
from rlhf_reward import RewardModel
from rlhf_reward.cli import main
from rlhf_reward.data import to_responses
from rlhf_reward.scoring import Scorer
from rlhf_reward.serving import make_app, reading, schemas, tokenizing
from rlhf_reward.serving.connections import RepeatFilter
from rlhf_reward.serving.problems import field_problems

TEMPLATE = (
    "{% if tools %}w9 w9 {% endif %}"
    "{% if think %}w8 {% endif %}"
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
)
WORDS = [f"w{number}" for number in range(3, 64)]


def text(length, seed):
    return " " + " ".join(random.Random(seed).choices(WORDS, k=length))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_reward_model(tmp_path_factory.mktemp("model"), TEMPLATE)


@pytest.fixture(scope="module")
def opened(folder):
    return Scorer.from_pretrained(folder, device="cpu")


@pytest.fixture
def scorer(opened):
    "One for each test, which may change it."
    return copy.deepcopy(opened)


@contextlib.contextmanager
def serving(scorer, **options):
    app = make_app(scorer, **{"name": "tiny", **options})
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(scorer):
    with serving(scorer) as client:
        yield client


@pytest.fixture(scope="module")
def shared(opened):
    "A client and its scorer, for tests that change neither."
    with serving(opened) as client:
        yield client, opened


def close(rewards, expected):
    assert rewards == pytest.approx(expected, abs=1e-5, rel=1e-5)


def healthy(client, scorer, headers={}):
    "The next request is answered, and rightly."
    answer = client.post("/score", json={"prompts": ["w3"], "responses": [" w4 w5"]}, headers=headers)
    assert answer.status_code == 200
    close(answer.json()["rewards"], scorer.score(["w3"], [" w4 w5"]))


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


# ----- what it answers

def test_score(client, scorer):
    prompt = [user("w5")]
    response = [assistant("w6")]
    rows = [
        ("w3 w4", " w5"),
        (prompt, "w6"),
        (prompt, response),
        (None, prompt + response),
        (None, "w3 w4 w5"),
        ("", "w3 w4 w5"),
    ]
    prompts = [row[0] for row in rows]
    responses = [row[1] for row in rows]
    rewards = client.post("/score", json={"prompts": prompts, "responses": responses}).json()["rewards"]
    close(rewards, scorer.score(prompts, responses))
    of_text, of_messages = rewards[:2]
    close(rewards, [of_text, of_messages, of_messages, of_messages, of_text, of_text])
    assert client.post("/score", json={"prompts": [], "responses": []}).json() == {"rewards": []}


def test_rank(client, scorer):
    prompt = text(4, 0)
    responses = [text(3, 1), text(5, 2), text(3, 1), text(2, 3)]
    ranked = client.post("/rank", json={"prompt": prompt, "responses": responses}).json()["ranked"]
    for result, expected in zip(ranked, scorer.rank(prompt, responses), strict=True):
        assert (result["index"], result["response"]) == (expected.index, expected.response)
        close([result["reward"], result["probability"]], [expected.reward, expected.probability])
    conversation = {"prompt": [user("w5")], "responses": [[assistant("w6")], [assistant("w7")]]}
    answer = client.post("/rank", json=conversation)
    assert answer.status_code == 200
    assert answer.json()["ranked"][0]["response"][0]["role"] == "assistant"


def test_ranked_responses_have_the_attributes_of_their_rewards(folder, scorer):
    weights = {"helpfulness": 0.75, "verbosity": -0.5}
    model = RewardModel(str(Path(folder).parent / "base"), 0.0, "cpu", attributes=list(weights))
    model.set_attribute_weights(weights)
    body = {"prompt": "w3", "responses": [text(3, seed) for seed in range(4)]}
    with serving(Scorer(model, scorer.tokenizer)) as client:
        ranked = client.post("/rank", json=body).json()["ranked"]
        scored = client.post("/score", json={"prompts": ["w3"] * 4, "responses": body["responses"]}).json()
    assert [result["reward"] for result in ranked] == sorted(scored["rewards"], reverse=True)
    for result in ranked:
        close(list(result["attributes"].values()), list(scored["attributes"][result["index"]].values()))
        close(sum(weights[name] * value for name, value in result["attributes"].items()), result["reward"])
    with serving(scorer) as client:
        assert "attributes" not in client.post("/rank", json=body).json()["ranked"][0]


def test_normalized(client, scorer):
    ranking = {"prompt": "w3", "responses": ["w4", "w5"]}
    for path, body in (("/score", {"prompts": ["w3"], "responses": ["w4"]}), ("/rank", ranking)):
        answer = client.post(path, json={**body, "normalize": True})
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body", "normalize"]
    saved = scorer.model.config.rlhf_reward
    scorer.model.config.rlhf_reward = {**saved, "reward_mean": 1.0, "reward_std": 2.0}
    raw = client.post("/rank", json=ranking).json()["ranked"]
    normal = client.post("/rank", json={**ranking, "normalize": True}).json()["ranked"]
    close([result["reward"] for result in normal], [(result["reward"] - 1) / 2 for result in raw])
    close([result["probability"] for result in normal], [result["probability"] for result in raw])


def test_classify_as_vllm(client, scorer):
    tokenizer = scorer.tokenizer
    (expected,) = scorer.score(["w3 w4"], [" w5"])
    ids = tokenizer("w3 w4 w5")["input_ids"] + [tokenizer.eos_token_id]
    answer = client.post("/classify", json={"model": "tiny", "input": "w3 w4 w5"}).json()
    assert set(answer) == {"id", "object", "created", "model", "data", "usage"}
    assert answer["object"] == "list" and answer["model"] == "tiny"
    assert set(answer["data"][0]) == {"index", "label", "probs", "num_classes"}
    assert answer["data"][0]["num_classes"] == 1
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "total_tokens": 4,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }
    inputs = (
        ("w3 w4 w5", 1),
        (["w3 w4 w5", f"w3 w4 w5{tokenizer.eos_token}"], 2),  # without its end, and with it
        (ids, 1),
        ([ids, ids], 2),
    )
    for value, count in inputs:
        body = {"input": value, "add_special_tokens": False, "user": "me"}
        data = client.post("/classify", json=body).json()["data"]
        assert [result["index"] for result in data] == list(range(count))
        rewards = []
        for result in data:
            rewards += result["probs"]
        close(rewards, [expected] * count)


def test_classify_messages(client, scorer):
    messages = [user("w5"), assistant("w6")]

    def rewards(**options):
        return client.post("/classify", json={"messages": messages, **options}).json()["data"][0]["probs"]

    close(rewards(), scorer.score([None], [messages]))
    ids = scorer.tokenizer.apply_chat_template(messages, think=True, return_dict=True)["input_ids"]
    with torch.no_grad():
        expected = scorer.model(torch.tensor([ids])).item()
    close(rewards(chat_template_kwargs={"think": True}), [expected])


def test_a_conversation_has_one_reward_in_each_form(client, scorer):
    "As messages, rendered by the client and as ids, where the template writes more after the end of a text."
    scorer.tokenizer.chat_template = "{% for m in messages %}w9 {{ m.role }} {{ m.content }} <eos> w8 {% endfor %}"
    messages = [user("w5"), assistant("w6")]
    rendered = scorer.tokenizer.apply_chat_template(messages, tokenize=False)
    ids = scorer.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    with torch.no_grad():
        expected = scorer.model(torch.tensor([ids])).item()
    for body in ({"messages": messages}, {"input": rendered}, {"input": [ids]}, {"input": ids}):
        close(client.post("/classify", json=body).json()["data"][0]["probs"], [expected])
    close(client.post("/score", json={"prompts": [messages[:1]], "responses": ["w6"]}).json()["rewards"], [expected])


def test_classify_refuses(client, scorer):
    messages = [user("w5"), assistant("w6")]
    wrong = (
        {"input": "w3", "messages": messages},
        {},
        {"input": "w3", "truncate_prompt_tokens": 3},
        {"input": [[]]},
        {"input": [-1]},
        {"input": [64]},
        {"messages": []},
    )
    for body in wrong:
        assert client.post("/classify", json=body).status_code == 422, body
    healthy(client, scorer)


def test_classify_takes_what_clients_of_vllm_send_by_default(client, scorer):
    "And texts in parts."
    defaults = {
        "truncate_prompt_tokens": -1,
        "cache_salt": "x",
        "softmax": True,
        "activation": None,
        "continue_final_message": False,
        "chat_template": None,
        "mm_processor_kwargs": None,
        "use_activation": True,
        "priority": 0,
        "user": None,
        "request_id": "a",
        "truncation_side": "left",
        "padding": True,
        "media_io_kwargs": {"image": {}},
        "an_option_of_a_later_version": [1],
    }
    messages = [user("w5\nw7"), assistant("w6")]
    parts = [{"type": "text", "text": "w5"}, {"type": "text", "text": "w7"}]
    answer = client.post("/classify", json={"messages": [user(parts), messages[1]], **defaults})
    close(answer.json()["data"][0]["probs"], scorer.score([None], [messages]))
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    answer = client.post("/classify", json={"messages": [user(picture)]})
    assert answer.status_code == 422 and "parts of type text" in answer.text


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("truncate_prompt_tokens", 3, "found 3; expected -1. Length and truncation are settings of the server."),
        ("chat_template", "{{ messages }}", "expected null, or no such field"),
        ("documents", [{"title": "w3"}], "expected null, or no such field"),
        ("tools", [{"type": "function"}], "expected null, or no such field"),
        ("mm_processor_kwargs", {"size": 1}, "expected null, or no such field"),
        ("add_generation_prompt", True, "found true; expected false."),
        ("continue_final_message", True, "found true; expected false."),
    ],
)
def test_classify_refuses_what_would_change_the_reward(field, value, expected, shared):
    client, _ = shared
    messages = [user("w5"), assistant("w6")]
    answer = client.post("/classify", json={"messages": messages, field: value})
    assert answer.status_code == 422
    (problem,) = answer.json()["detail"]
    assert problem["loc"] == ["body", field] and expected in problem["msg"]


def test_tools_and_template_arguments(client, scorer):
    "As rows have them: the same number."
    prompt = [user("w5")]
    response = [assistant("w6")]
    arguments = {"chat_template_kwargs": {"think": True}}
    row = {"prompt": prompt, "response": response, **arguments}
    (expected,) = scorer.score_comparisons([to_responses(row)])
    scored = client.post("/score", json={"prompts": [prompt], "responses": [response], **arguments})
    close(scored.json()["rewards"], expected)
    ranked = client.post("/rank", json={"prompt": prompt, "responses": [response], **arguments}).json()["ranked"]
    close([ranked[0]["reward"]], expected)
    assert ranked[0]["response"] == [{"role": "assistant", "content": "w6"}]
    assert abs(expected[0] - scorer.score([prompt], [response])[0]) > 1e-4
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "w7"}}]}
    answer = client.post("/rank", json={"prompt": "w5", "responses": [[call]]})
    # a field that was not sent does not come back
    assert answer.status_code != 200 or "content" not in answer.json()["ranked"][0]["response"][0]


def test_get_reward_as_openrlhf(client, scorer):
    tokenizer = scorer.tokenizer
    pad = tokenizer.pad_token
    end = tokenizer.eos_token
    prompts = ["w3 w4", "w3 w4", "w5"]
    responses = [" w6", " w7 w8", " w9"]
    expected = scorer.score(prompts, responses)
    queries = [  # as OpenRLHF decodes rows
        pad + pad + prompts[0] + responses[0] + end,
        prompts[1] + responses[1],
        prompts[2] + responses[2] + end + pad + pad,
    ]
    body = {"query": queries, "prompts": prompts, "labels": ["x", "y", "z"], "anything": 1}
    answer = client.post("/get_reward", json=body).json()
    assert set(answer) == {"rewards"}
    close(answer["rewards"], expected)
    close(client.post("/get_reward", json={"query": queries[1]}).json()["rewards"], expected[1:2])
    assert client.post("/get_reward", json={"query": queries, "prompts": prompts[:2]}).status_code == 422


def samples(client, name):
    "The samples of a metric."
    metrics = client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(metrics)}
    return families[name].samples


def total(samples):
    return [sample for sample in samples if sample.name.endswith("_total")]


def test_health_and_metrics(client, scorer):
    health = client.get("/health").json()
    assert health == {"status": "ok", "model": "tiny", "chat": True, "version": rlhf_reward.__version__}
    healthy(client, scorer)
    client.post("/score", json={"prompts": []})
    client.get("/no/such/page")
    requests = {}
    for sample in total(samples(client, "rlhf_reward_requests")):
        requests[sample.labels["path"], sample.labels["status"]] = sample.value
    assert requests == {
        ("/health", "200"): 1,
        ("/score", "200"): 1,
        ("/score", "422"): 1,
        ("other", "404"): 1,
    }
    (tokens,) = total(samples(client, "rlhf_reward_tokens"))
    assert tokens.value == len(scorer.tokenizer("w3 w4 w5")["input_ids"]) + 1
    assert samples(client, "rlhf_reward_waiting_tokens")[0].value == 0


def example_requests(api, schema):
    "Yield (model, body) for each form that a request may have, with the example that the page of the API fills in."
    forms = schema.get("oneOf") or schema.get("anyOf") or [schema]
    for form in forms:
        name = form["$ref"].split("/")[-1]
        for body in api["components"]["schemas"][name].get("examples", [None]):
            yield name, body


def test_the_examples_of_the_api_are_answered(shared):
    "As they are, each form of each route; `None` is a form without an example, of which the page makes up values."
    client, _ = shared
    api = client.get("/openapi.json").json()
    answers = {}
    for path, operations in api["paths"].items():
        if "post" in operations:
            schema = operations["post"]["requestBody"]["content"]["application/json"]["schema"]
            for name, body in example_requests(api, schema):
                answers[path, name] = client.post(path, json=body).status_code
    assert len(answers) >= 18 and set(answers.values()) == {200}, answers


def test_pages_work_without_the_internet(client):
    for page in ("/", "/docs"):
        answer = client.get(page)
        assert answer.status_code == 200
        assert not re.search(r"(src|href)=[\"'](https?:)?//", answer.text)
    scripts = re.findall(r"(?:src|href)=\"(/static[^\"]*)\"", client.get("/docs").text)
    assert scripts and all(client.get(path).status_code == 200 for path in scripts)
    api = client.get("/openapi.json").json()
    groups = [group["name"] for group in api["tags"]]
    assert groups[0] == "Reward" and next(iter(api["paths"])) == "/score"
    tags = []
    for operations in api["paths"].values():
        tags += operations.popitem()[1]["tags"]
    assert set(tags) == set(groups) and len(tags) == len(api["paths"])  # none is under the heading "default"
    paths = {"/score", "/rank", "/classify", "/get_reward", "/metrics", "/health"}
    paths |= {"/rerank", "/v1/rerank", "/v2/rerank", "/v1/score", "/v1/classify", "/pooling", "/v1/embeddings"}
    paths |= {"/tokenize", "/predict", "/v1/models", "/info"}
    assert set(api["paths"]) == paths


# ----- what it refuses

BEARER = {"Authorization": "Bearer secret"}
RANKING = {"prompt": "w3", "responses": ["w4"]}
BODIES = {
    "/score": {"prompts": [], "responses": []},
    "/rank": RANKING,
    "/classify": {"input": "w3"},
    "/get_reward": {"query": "w3"},
}


def test_a_request_without_the_token_is_refused(scorer):
    with serving(scorer, token="secret") as client:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer secre"},
            {"Authorization": "Bearer secret2"},
            {"Authorization": "secret"},
            {"Authorization": "Basic c2VjcmV0"},
            {"Authorization": "Bearer "},
            {"Authorization": b"Bearer s\xe9cret"},
        ):
            for path, body in BODIES.items():
                answer = client.post(path, json=body, headers=headers)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", (path, headers)
            assert client.get("/metrics", headers=headers).status_code == 401
            malformed = client.post("/rank", content=b"{", headers=headers)
            assert malformed.status_code == 401  # before the body is read


def test_a_request_with_the_token_is_answered(scorer):
    with serving(scorer, token="secret") as client:
        for path, body in BODIES.items():
            assert client.post(path, json=body, headers=BEARER).status_code == 200
        for path in ("/health", "/", "/docs"):
            assert client.get(path).status_code == 200
        lower = {"Authorization": "bearer secret"}  # a scheme in any case
        assert client.post("/rank", json=RANKING, headers=lower).status_code == 200
        for path in ("/what", "/metrics/"):  # a path that is not open is closed
            assert client.get(path).status_code == 401
        with TestClient(client.app, root_path="/rm") as proxied:
            assert proxied.post("/rm/rank", json=RANKING).status_code == 401
            assert proxied.get("/rm/metrics").status_code == 401
            assert proxied.get("/rm/health").status_code == 200
            assert proxied.post("/rm/rank", json=RANKING, headers=BEARER).status_code == 200


def test_mounted_in_another_application(scorer):
    "The other application starts nothing in it; and one application may be started twice."
    outer = FastAPI()
    outer.mount("/rm", make_app(scorer, token="secret"))
    for client in (TestClient(outer), TestClient(outer)):
        with client:
            assert client.post("/rm/rank", json=RANKING).status_code == 401
            assert client.get("/rm/metrics").status_code == 401
            assert client.post("/rm/rank", json=RANKING, headers=BEARER).status_code == 200
            assert client.get("/rm/health").status_code == 200
    alone = make_app(scorer)
    for _ in range(2):
        with TestClient(alone) as client:
            healthy(client, scorer)


@pytest.mark.parametrize(
    "path, body, field",
    [
        ("/score", {"responses": ["w3"]}, ["prompts"]),
        ("/score", {"prompts": ["w3"], "responses": [7]}, ["responses", 0]),
        ("/score", {"prompts": ["w3", 5], "responses": ["w4", "w5"]}, ["prompts", 1]),
        ("/score", {"prompts": ["w3"], "responses": ["w4", "w5"]}, ["responses"]),
        ("/score", {"prompts": "w3", "responses": ["w4"]}, ["prompts"]),
        ("/score", {"prompts": ["w3"], "responses": ["w4"], "normalise": True}, ["normalise"]),
        ("/score", {"prompts": ["w3"], "responses": ["w4"], "normalize": "yes"}, ["normalize"]),
        ("/score", {"prompts": [[{"content": "w3"}]], "responses": ["w4"]}, ["prompts", 0]),
        # an empty message
        ("/score", {"prompts": ["w3", [{"role": "user"}]], "responses": ["w4", "w5"]}, ["prompts", 1]),
        ("/rank", {"prompt": "w3", "responses": []}, ["responses"]),
        ("/rank", {"prompt": "w3"}, ["responses"]),
        ("/rank", {"prompt": "w3", "responses": ["w4", [assistant("w5")]]}, ["responses"]),
        ("/rank", {"prompt": "w3", "responses": ["w4"], "normalise": True}, ["normalise"]),
        ("/get_reward", {}, ["query"]),
        ("/get_reward", {"query": [None]}, ["query"]),
        ("/score", [], []),
        ("/score", {"prompts": ["\ud800"], "responses": ["w4"]}, ["prompts", 0]),
    ],
)
def test_bad_fields_are_named(path, body, field, shared):
    client, scorer = shared
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    expected = ["body", *field]
    found = [problem["loc"][: len(expected)] for problem in answer.json()["detail"]]
    assert expected in found, answer.text
    healthy(client, scorer)


def test_a_body_of_another_type_names_the_header(client):
    "Without the header, curl -d sends a form."
    body = json.dumps({"prompts": ["w3"], "responses": ["w4"]})
    for header, value in (
        ({"Content-Type": "application/x-www-form-urlencoded"}, "is 'application/x-www-form-urlencoded'"),
        ({}, "does not exist"),
    ):
        answer = client.post("/score", content=body, headers=header)
        assert answer.status_code == 422
        assert answer.json()["message"] == (
            f"The header Content-Type {value}; expected application/json. With curl, add "
            "-H 'Content-Type: application/json'."
        )
        assert answer.json()["detail"][0]["loc"] == ["body"]


@pytest.mark.parametrize(
    "body, key",
    [
        (b'{"prompt": "w3", "prompt": "w4", "responses": ["w5"]}', "prompt"),
        (b'{"messages": [{"role": "user", "content": "w3", "content": "w4"}]}', "content"),
        (b'{"input": "w3", "\\udfff": 1, "\\udfff": 1}', r"\udfff"),
    ],
)
def test_a_key_that_is_there_twice_is_refused_on_every_path(body, key, client):
    paths = [path for path, methods in client.get("/openapi.json").json()["paths"].items() if "post" in methods]
    assert {"/score", "/v1/rerank", "/pooling", "/tokenize"} <= set(paths)
    for path in paths:
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422, path
        assert answer.json()["message"] == f"an object has the key '{key}' twice; expected each key once."
        assert answer.json()["detail"][0]["loc"] == ["body"]


@pytest.mark.parametrize("body, status, message", [
    (b'{"a": "\xff"}', 400, "The body is not utf-8: invalid start byte; expected JSON in UTF-8."),
    (b'{"a": [-' + b"9" * 10_000 + b"]}", 422, "a number has 10000 digits; expected at most 4300."),
    (b'{"a": ' * 9_000, 400, "The body has too many lists and objects inside each other; expected a few, as /docs "
     "describes."),
])
def test_a_body_that_python_cannot_read_gets_no_advice_about_python(body, status, message, client):
    answer = client.post("/score", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and answer.json()["message"] == message


@pytest.mark.parametrize("body, character, problem", [
    ('{"prompts": ["w3"]', 18, "Expecting ',' delimiter"),
    ("{'prompts': ['w3']}", 1, "Expecting property name enclosed in double quotes"),
])
def test_a_body_that_is_not_json_is_refused_with_the_reason(client, body, character, problem):
    answer = client.post("/score", content=body, headers={"Content-Type": "application/json"}).json()
    expected = f"The body is not JSON at character {character}: {problem}; expected a JSON object."
    assert answer["detail"] == [{"type": "json_invalid", "loc": ["body", character], "msg": expected}]


def test_errors_have_one_text(client, scorer):
    "It is what OpenAI's client shows; `detail` is in the form of FastAPI."
    answer = client.post("/rank", json={"prompt": "w3", "normalise": True}).json()
    assert answer["message"] == (
        "responses: The request has no 'responses'; /rank expects responses. normalise: The request has the field "
        "'normalise', which /rank does not know; did you mean 'normalize'? Expected: prompt, responses, normalize, "
        "pessimism, tools, chat_template_kwargs."
    )
    assert [problem["loc"][1] for problem in answer["detail"]] == ["responses", "normalise"]
    answer = client.post("/score", json={"prompts": ["w3"], "responses": ["w4", "w5"]}).json()
    assert answer["message"] == "responses: There are 1 prompts and 2 responses; expected one prompt for each."
    answer = client.get("/no_such_path").json()
    assert answer["detail"] == answer["message"] == "The path /no_such_path does not exist. GET /docs lists all paths."
    locked = TestClient(make_app(scorer, token="secret"))
    answer = locked.post("/score", json={}).json()
    assert answer["message"] == answer["detail"]
    assert "Authorization" in answer["message"]


FIELDS_OF_SCORE = "Expected: prompts, responses, normalize, tools, chat_template_kwargs."
EXAMPLE = 'expected a JSON object such as {"prompt": "Ada likes birds.", "responses": [" iron", " robin wren"]}.'
TEXT_OR_MESSAGES = "expected a string or a list of messages with role and content."


@pytest.mark.parametrize("path, body, message", [
    ("/score", {"promts": ["w3"], "responses": ["w4"]},
     "promts: The request has the field 'promts', which /score does not know; did you mean 'prompts'? "
     + FIELDS_OF_SCORE),
    ("/score", {"prompt": "w3", "responses": ["w4"]},
     "prompt: The request has the field 'prompt', which /score does not know; did you mean 'prompts'? "
     + FIELDS_OF_SCORE),
    ("/rank", {"prompts": ["w3"], "responses": ["w4"]},
     "prompts: The request has the field 'prompts', which /rank does not know; did you mean 'prompt'? Expected: "
     "prompt, responses, normalize, pessimism, tools, chat_template_kwargs."),
    ("/rank", None, f"The request has no body; {EXAMPLE}"),
    ("/rank", [], f"The body is an empty list; {EXAMPLE}"),
    ("/rank", {"responses": ["w4"], "pessimism": -1}, "pessimism: found -1; expected 0 or more."),
    ("/rank", {"responses": []}, "responses: found 0 elements; expected 1 or more. Strings or messages."),
    ("/score", {"prompts": ["w3"], "responses": [7]}, f"responses.0: found 7; {TEXT_OR_MESSAGES}"),
    ("/score", {"prompts": [user("w3")], "responses": ["w4"]}, f"prompts.0: found an object; {TEXT_OR_MESSAGES}"),
    ("/rank", {"prompt": [{"content": "w3"}], "responses": ["w4"]},
     "prompt.0.role: This object has no 'role'; expected one."),
    ("/rank", {"prompt": [{"role": "user", "content": None}], "responses": ["w4"]}, "prompt: the message "
     "{'role': 'user'} has no content; expected role and content, both strings."),
    ("/classify", {"input": ["w3", None]}, "input.1: found null; expected a string."),
    ("/classify", {"input": [[3, -1]]}, "input.0.1: found -1; expected 0 or more."),
    ("/predict", {"inputs": ["w3", "w4", "w5"]}, "inputs: found 3 elements; expected at most 2. A complete text, a "
     "pair of query and text, or a list of [text] and [query, text]."),
    ("/rerank", {"query": "w3", "documents": [{"txt": "w4"}]}, "documents.0.txt: This object has the field 'txt', "
     "which is not known here; did you mean 'text'?"),
    ("/v1/embeddings", {"input": "w3", "encoding_format": "int8"},
     "encoding_format: found 'int8'; expected 'float' or 'base64'."),
])
def test_a_field_at_fault_has_one_sentence(path, body, message, shared):
    client, _ = shared
    answer = client.post(path, json=body) if body is not None else client.post(path)
    assert answer.status_code == 422 and answer.json()["message"] == message
    assert len(answer.json()["detail"]) == 1


def test_no_error_has_words_of_pydantic():
    "A value of each kind in each field of each request."
    values = (None, True, 7, -1, "w3", [], [7], [[]], {}, [{}], [[{}]], [None])
    models = set(schemas.RequestModel.__subclasses__())
    for model in list(models):
        models.update(model.__subclasses__())
    for model, value in itertools.product(models | {schemas.RewardRequest}, values):
        body = dict.fromkeys(model.model_fields, value) # a wrong value in every field
        try:
            model.model_validate({**body, "zz": 1})
        except ValidationError as error:
            errors = [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
            for problem in field_problems(errors, "/score", model):
                assert not re.search(r"[Ii]nput should|required|permitted|valid|list\[", problem["msg"]), problem


@pytest.mark.parametrize("path, nearest", [
    ("/score/", "POST /score"),  # a redirect of a POST is followed by few clients
    ("/v1/score/", "POST /v1/score"),
    ("/v1/rank", "POST /rank"),
    ("/get-reward", "POST /get_reward"),
    ("/Metrics", "GET /metrics"),
    ("/doc", "GET /docs"),
])
def test_a_path_that_does_not_exist_gets_the_nearest(path, nearest, shared):
    client, _ = shared
    answer = client.post(path, json=ONE, follow_redirects=False)
    message = f"The path {path} does not exist; did you mean {nearest}? GET /docs lists all paths."
    assert answer.status_code == 404 and answer.json() == {"detail": message, "message": message}


@pytest.mark.parametrize("method, path, expected", [
    ("GET", "/rank", "POST /rank with a JSON body, as GET /docs describes"),
    ("PUT", "/v2/rerank", "POST /v2/rerank with a JSON body, as GET /docs describes"),
    ("POST", "/health", "GET /health"),
    ("POST", "/", "GET /"),
])
def test_another_method_than_that_of_the_path(method, path, expected, shared):
    client, _ = shared
    answer = client.request(method, path)
    message = f"{method} {path} does not exist; expected {expected}."
    assert answer.status_code == 405 and answer.json() == {"detail": message, "message": message}
    assert answer.headers["allow"] == expected.split()[0]


def test_counts_that_differ(client):
    answer = client.post("/score", json={"prompts": ["w3"], "responses": ["w4", "w5"]})
    expected = "There are 1 prompts and 2 responses; expected one prompt for each."
    assert answer.json()["detail"][0]["msg"] == expected
    answer = client.post("/classify", json={})
    expected = "The request has neither input nor messages; expected one of them."
    assert answer.json()["detail"][0]["msg"] == expected


def test_what_templates_are_given(client, scorer):
    messages = [user("w5"), assistant("w6")]
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for name, value in (("chat_template", endless), ("add_generation_prompt", True), ("padding", True)):
        body = {"messages": messages, "chat_template_kwargs": {name: value}}
        assert client.post("/classify", json=body).status_code == 422
    deep = json.loads("[" * 400 + "]" * 400)
    strange = (
        {"role": "\ud800", "content": "w3"},
        {"role": "user", "content": "w3", "name": deep},
        {"role": "user", "content": "w3", "name": "\ud800"},
    )
    for message in strange:
        body = json.dumps({"prompts": [[message]], "responses": ["w4"]})
        answer = client.post("/score", content=body)
        assert answer.status_code in (200, 422)  # 200 if the template does not print it
    scorer.tokenizer.chat_template = "{{ 1 / 0 }}"
    answer = client.post("/score", json={"prompts": [messages[:1]], "responses": ["w4"]})
    assert answer.status_code == 422 and "the chat template refuses its messages" in answer.text
    scorer.tokenizer.chat_template = TEMPLATE
    healthy(client, scorer)


def test_a_long_wrong_list_is_reported_once(client, scorer):
    requests = (
        ("/score", {"prompts": [1] * 300_000, "responses": []}),
        ("/classify", {"input": [None] * 300_000}),
        ("/get_reward", {"query": [1] * 300_000}),
    )
    started = time.process_time()
    for path, body in requests:
        answer = client.post(path, json=body)
        assert answer.status_code == 422 and len(answer.content) < 20_000
    assert time.process_time() - started < 30  # it took minutes when each element was reported
    healthy(client, scorer)


def test_a_message_without_a_template(folder):
    scorer = Scorer.from_pretrained(folder, device="cpu")
    scorer.tokenizer.chat_template = None
    with serving(scorer) as client:
        body = {"prompts": ["w3", [user("w4")]], "responses": ["w5", "w6"]}
        answer = client.post("/score", json=body)
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body", "responses", 1]
        assert "no chat template" in answer.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b"\xff\xfe\x00",
        b'{"prompts": NaN, "responses": Infinity}',
        b'{"prompts": [NaN], "responses": ["w3"]}',
        b"[" * 100_000,
        b'{"prompts": [' + b"9" * 10_000 + b'], "responses": []}',
        b'{"prompts": ["\\ud800"], "\\udfff": 1}',
        b"null",
        b"7",
        b'"w3"',
        b'{"prompts": {"a": ' * 5_000,
    ],
)
def test_malformed_bodies(body, shared):
    client, scorer = shared
    requests = [(path, "application/json") for path in ("/score", "/rank", "/classify", "/get_reward")]
    for path, kind in [*requests, ("/score", "text/plain"), ("/rank", "multipart/form-data")]:
        answer = client.post(path, content=body, headers={"Content-Type": kind})
        assert 400 <= answer.status_code < 500, (path, kind)
    healthy(client, scorer)


def test_bodies_and_texts_that_are_too_long(scorer):
    with serving(scorer, max_body=10_000) as client:
        body = json.dumps({"prompts": ["w3"], "responses": ["w4 " * 5000]})
        assert client.post("/score", content=body).status_code == 413
        chunks = (body[start : start + 1000].encode() for start in range(0, len(body), 1000))
        answer = client.post("/score", content=chunks)  # without a length
        assert answer.status_code == 413 and "more than 10000 bytes" in answer.json()["detail"]
        answer = client.post("/score", json={"prompts": ["w3", "w3"], "responses": ["w4", text(70, 0)]})
        assert answer.status_code == 413
        assert answer.json()["detail"][0]["loc"] == ["body", "responses", 1]
        assert "expected at most 64" in answer.text
        answer = client.post("/rank", json={"prompt": "w3", "responses": ["w4", text(70, 0)]})
        assert answer.json()["detail"][0]["loc"] == ["body", "responses", 1]
        assert client.post("/classify", json={"input": text(70, 0)}).status_code == 413
        assert client.post("/get_reward", json={"query": text(70, 0)}).status_code == 413
        healthy(client, scorer)


def test_prompts_are_truncated_if_the_scorer_says_so(scorer):
    truncating = Scorer(scorer.model, scorer.tokenizer, on_overlong="truncate_prompt")
    prompt = text(70, 0)
    response = text(5, 1)
    with serving(truncating) as client:
        # without a prompt there is nothing to truncate
        assert client.post("/get_reward", json={"query": prompt + response}).status_code == 413
        assert client.post("/classify", json={"input": prompt + response}).status_code == 413
        split = client.post("/get_reward", json={"query": prompt + response, "prompts": [prompt]}).json()
        scored = client.post("/score", json={"prompts": [prompt], "responses": [response]}).json()
        close(split["rewards"], scored["rewards"])
        same = Scorer(scorer.model, scorer.tokenizer, on_overlong="truncate_prompt")
        close(scored["rewards"], same.score([prompt], [response]))
        # a response alone is too long
        answer = client.post("/score", json={"prompts": ["w3"], "responses": [text(70, 1)]})
        assert answer.status_code == 413


def test_small_bodies_with_much_in_them(scorer):
    """
    Each is answered at once, and the next one too.

    A prompt is read with each of its responses, and ends or padding would be stripped or searched for one by one.
    """
    end = scorer.tokenizer.eos_token
    pad = scorer.tokenizer.pad_token
    with serving(scorer, max_body=2_000_000, timeout=20) as client:
        started = time.process_time()
        body = {"prompt": "w3 w4 " * 20_000, "responses": [str(number) for number in range(5000)]}
        answer = client.post("/rank", json=body)
        assert answer.status_code == 413
        assert "600018890 characters; expected at most 2000000" in answer.text
        ends = {"input": end * (1_900_000 // len(end))}
        assert client.post("/classify", json=ends).status_code in (200, 413, 422)
        padding = {"query": pad * (1_900_000 // len(pad))}
        assert client.post("/get_reward", json=padding).status_code in (200, 413, 422)
        same = [user("w3")] * 25_000
        body = {"prompt": same[:12_000], "responses": [same[:12_001] + [assistant("w5")]]}
        assert client.post("/rank", json=body).status_code == 413
        healthy(client, scorer)
        assert time.process_time() - started < 40  # some seconds; minutes if each step copies the text


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--host", "0.0.0.0"], "the host 127.0.0.1, or --allow_public for a network"),
        (["--host", "::"], "which others can reach"),
        (["--host", "no such host"], "not an address of this machine"),
        (["--token", ""], "The token is empty"),
        (["--token", "sécret"], "other than printable ASCII"),
        (["--model", "nowhere/at/all"], "'nowhere/at/all' does not exist"),
        (["--token", "a b"], "without spaces"),
        (["--port", "99999"], "expected a port from 1 to 65535"),
        (["--timeout", "inf"], "expected a port"),
        (["--device", "cuda"], "no CUDA device. Pass --device cpu."),
    ],
)
def test_the_command_refuses(options, expected, folder, monkeypatch):
    monkeypatch.delenv("RLHF_REWARD_TOKEN", raising=False)
    if options[0] in ("--host", "--token"): # refused before anything slow is imported
        monkeypatch.setitem(sys.modules, "rlhf_reward.serving", None)
    with pytest.raises(SystemExit) as exit:
        main(["serve", "--model", folder, "--device", "cpu", *options])
    assert expected in exit.value.code


# ----- under load, and when something fails

class Held:
    "A scorer whose computation waits until it is let go, and which notes what it computes together."

    def __init__(self, scorer, monkeypatch):
        self.go = threading.Event()
        self.begun = threading.Event()
        self.batches = []
        rewards = scorer.rewards

        def held(sequences, *args, **kwargs):
            self.begun.set()
            assert self.go.wait(30)
            self.batches.append(len(sequences))
            return rewards(sequences, *args, **kwargs)

        monkeypatch.setattr(scorer, "rewards", held)


def ask(client, prompt, response):
    return client.post("/score", json={"prompts": [prompt], "responses": [response]})


def wait_until_idle(client):
    while client.app.state.batcher.waiting:
        time.sleep(0.01)


def test_requests_are_computed_together_and_keep_their_answers(scorer, monkeypatch):
    prompts = [text(1 + row % 9, row // 4) for row in range(60)]
    responses = [text(1 + row % 5, 100 + row) for row in range(60)]
    expected = scorer.score(prompts, responses)
    held = Held(scorer, monkeypatch)
    with serving(scorer) as client, concurrent.futures.ThreadPoolExecutor(60) as pool:
        answers = [pool.submit(ask, client, *row) for row in zip(prompts, responses)]
        assert held.begun.wait(30)
        while client.app.state.batcher.waiting < 300:  # all have arrived
            time.sleep(0.01)
        time.sleep(0.3)
        held.go.set()
        close([answer.result().json()["rewards"][0] for answer in answers], expected)
    assert len(held.batches) < 10 and sum(held.batches) == 60


def test_complete_texts_to_one_prompt_are_computed_together(scorer, monkeypatch):
    "A text does not tell where its prompt ends, so its beginning does: as ids, strings and in any route."
    prompts = [text(52, seed) for seed in range(2)]
    texts = [f"{prompts[number % 2]} w{number}" for number in range(3, 13)]
    expected = scorer.score([None] * 10, texts)
    computed = []
    rewards = scorer.rewards

    def noted(sequences, prompts, *args, **kwargs):
        computed.append(len(set(prompts)))
        return rewards(sequences, prompts, *args, **kwargs)

    monkeypatch.setattr(scorer, "rewards", noted)
    comparisons = [to_responses({"text": one}) for one in texts]
    ids = [own[0] for own in scorer.tokenize(comparisons)]
    with serving(scorer) as client:
        for path, value, name in (
            ("/classify", texts, "probs"),
            ("/pooling", ids, "data"),
            ("/v1/embeddings", texts, "embedding"),
        ):
            data = client.post(path, json={"model": "tiny", "input": value}).json()["data"]
            close([item[name][0] for item in data], expected)
        shorts = client.post("/classify", json={"input": [f"w{number}" for number in range(3, 9)]}).json()["data"]
    close([item["probs"][0] for item in shorts], scorer.score([None] * 6, [f"w{number}" for number in range(3, 9)]))
    assert computed[:3] == [2, 2, 2] and computed[3] == 6


def test_a_full_queue_is_refused_and_tried_again(scorer, monkeypatch):
    held = Held(scorer, monkeypatch)
    with serving(scorer, max_waiting=30) as client, concurrent.futures.ThreadPoolExecutor(20) as pool:
        first = pool.submit(ask, client, text(5, 0), text(5, 1))
        assert held.begun.wait(30)
        others = [pool.submit(ask, client, text(5, seed), text(5, seed)) for seed in range(8)]
        done = list(itertools.islice(concurrent.futures.as_completed(others, timeout=60), 7))
        (waiting,) = set(others) - set(done)  # 11 tokens each: two fit into 30
        assert not waiting.done()
        for answer in [request.result() for request in done]:
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1 and "try again" in answer.text
        held.go.set()
        assert first.result().status_code == 200
        assert waiting.result().status_code == 200
        healthy(client, scorer)
        assert ask(client, text(20, 0), text(20, 1)).status_code == 413  # it would never fit


def test_a_request_that_takes_too_long_is_cancelled(scorer, monkeypatch):
    held = Held(scorer, monkeypatch)
    with serving(scorer, timeout=0.5) as client, concurrent.futures.ThreadPoolExecutor(4) as pool:
        requests = [pool.submit(ask, client, text(3, 0), " w4")]
        assert held.begun.wait(30)
        requests += [pool.submit(ask, client, text(3, seed), " w4") for seed in range(1, 4)]
        for request in requests:
            answer = request.result()
            assert answer.status_code == 503 and "no answer in 0.5 s" in answer.text
            assert answer.headers["retry-after"]
        held.go.set()
        wait_until_idle(client)
        assert sum(held.batches) < 4  # those that were cancelled in the queue are not computed
        healthy(client, scorer)
        assert "rlhf_reward_timeouts_total 4.0" in client.get("/metrics").text


def test_a_cancelled_request_is_not_computed_completely(folder, monkeypatch):
    "So a cancelled request of many batches delays no other request."
    scorer = Scorer.from_pretrained(folder, device="cpu", tokens_per_batch=8)
    forward = scorer._forward
    computed = []

    def slow_forward(batch):
        time.sleep(0.05)
        computed.append(batch)
        return forward(batch)

    monkeypatch.setattr(scorer, "_forward", slow_forward)
    with serving(scorer, timeout=1) as client:
        prompts = [text(3, seed) for seed in range(200)]
        responses = [text(3, 1000 + seed) for seed in range(200)]
        answer = client.post("/score", json={"prompts": prompts, "responses": responses})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert len(computed) < 60
        wait_until_idle(client)
        assert len(computed) < 60
        healthy(client, scorer)


def test_limits_below_one(scorer):
    for options in ({"max_body": 0}, {"max_waiting": 0}):
        with pytest.raises(ValueError, match="expected 1 or more"):
            make_app(scorer, **options)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, type("Panic", (BaseException,), {})])
def test_a_failing_request_fails_alone(kind, scorer, monkeypatch):
    held = Held(scorer, monkeypatch)
    rewards = scorer.rewards
    (poison,) = scorer.tokenizer("w13")["input_ids"]

    def poisoned(sequences, *args, **kwargs):
        results = rewards(sequences, *args, **kwargs)
        for own in sequences:
            if any(poison in sequence for sequence in own):
                raise kind("a kernel failed")
        return results

    monkeypatch.setattr(scorer, "rewards", poisoned)
    rows = [("w3", " w4"), ("w5", " w13"), ("w6", " w7"), ("w8", " w9")]
    with serving(scorer) as client, concurrent.futures.ThreadPoolExecutor(5) as pool:
        first = pool.submit(ask, client, "w20", "w21")
        assert held.begun.wait(30)
        requests = [pool.submit(ask, client, *row) for row in rows]
        time.sleep(0.5)
        held.go.set()
        assert first.result().status_code == 200
        answers = [request.result() for request in requests]
        assert [answer.status_code for answer in answers] == [200, 500, 200, 200]
        assert "RuntimeError" in answers[1].json()["detail"] and "kernel" not in answers[1].text
        for index in (0, 2, 3):
            ids = scorer.tokenizer("".join(rows[index]))["input_ids"] + [2]
            ((expected,),) = rewards([[ids]], ["p"], progress=False)
            close(answers[index].json()["rewards"], [expected])
        healthy(client, scorer)


# ----- a process of its own

ENDED = (0, -signal.SIGTERM) # uvicorn ends, once it has shut down, by the signal that it was sent


class Server:
    "The command `rlhf_reward serve` in a process of its own, from its first answer to the end of the `with`."
    def __init__(self, python, folder, *options, files=None):
        limit = ("sh", "-c", f'ulimit -n {files}; exec "$@"', "sh") if files else ()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [
                *limit,
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


@pytest.fixture(scope="module")
def late_heads(server):
    "The seconds after which three connections ended, whose heads do not arrive; other tests run meanwhile."
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield pool.submit(wait_for_the_end, [server.connect() for _ in range(3)])


def wait_for_the_end(connections):
    "Send nothing on the first, some bytes of a head on the second, a request and some bytes of another on the third."
    connections[2].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert connections[2].recv(5000).startswith(b"HTTP/1.1 200")
    started = time.perf_counter()
    ended = {}
    while len(ended) < 3 and time.perf_counter() - started < 30:
        for number, connection in enumerate(connections):
            if number in ended:
                continue
            with contextlib.suppress(BlockingIOError):
                try:
                    if number:
                        connection.sendall(b"G" if number == 1 else b"H")
                    connection.setblocking(False)
                    if not connection.recv(100):
                        ended[number] = time.perf_counter() - started
                    connection.setblocking(True)
                except (ConnectionError, BrokenPipeError):
                    ended[number] = time.perf_counter() - started
            connection.setblocking(True)
        time.sleep(0.25)
    for connection in connections:
        connection.close()
    return ended


def request(body, length=None):
    body = json.dumps(body).encode()
    length = len(body) if length is None else length
    lines = [
        b"POST /score HTTP/1.1",
        b"Host: localhost",
        b"Content-Type: application/json",
        b"Content-Length: %d" % length,
        b"",
        body,
    ]
    return b"\r\n".join(lines)


ONE = {"prompts": ["w3"], "responses": [" w4 w5"]}


@pytest.mark.usefixtures("late_heads")
def test_clients_that_go(server, scorer):
    beginnings = (
        b"POST /score",
        request(ONE)[:-5],
        request(ONE),
        request(ONE, length=10**6),
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        request(ONE) * 5,
    )
    reset = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # a linger of no time
    for sent in beginnings:
        with server.connect() as connection:
            connection.sendall(sent)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
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
            head = [
                b"POST /score HTTP/1.1",
                b"Host: localhost",
                b"Content-Type: application/json",
                b"Transfer-Encoding: chunked",
            ]
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
            server.end()
            assert connection.recv(100).startswith(b"HTTP/1.1 408"), "it was cut off rather than answered"


def test_a_huge_body_is_not_read(server, scorer):
    with server.connect() as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    with httpx.Client(base_url=server.url) as client:
        healthy(client, scorer)


# ----- names of the server, HEAD, and the port

HOSTS = {
    "127.0.0.1": True,
    "127.0.0.1:8000": True,
    "127.8.9.1:1": True,
    "localhost:8000": True,
    "LOCALHOST": True,
    "localhost.": True,
    "reward.localhost:8000": True,
    "[::1]:8000": True,
    "page.example": False,
    "page.example:8000": False,
    "127.0.0.1.page.example": False,
    "localhost.page.example": False,
    "notlocalhost": False,
    "192.168.0.7:8000": False,
    "0.0.0.0:8000": False,
    "[2001:db8::1]:8000": False,
    "": False,
}


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_of_a_server_without_a_token(host, server):
    "A page in a browser reaches it under a name that resolves to 127.0.0.1 (DNS rebinding)."
    for path in ("/health", "/", "/docs"):
        answer = httpx.get(server.url + path, headers={"Host": host})
        assert answer.status_code == (200 if HOSTS[host] else 403), host
    body = {"prompts": ["w3"], "responses": [" w4"]}
    answer = httpx.post(f"{server.url}/score", json=body, headers={"Host": host})
    assert answer.status_code == (200 if HOSTS[host] else 403), host
    assert HOSTS[host] or "expected localhost" in answer.text


def test_hosts_of_a_server_with_a_token_are_not_checked(scorer):
    with serving(scorer, token="secret") as client:
        headers = {"Host": "reward.example", "Authorization": "Bearer secret"}
        healthy(client, scorer, headers)


@pytest.mark.parametrize("path", ["/", "/health", "/docs", "/openapi.json", "/metrics"])
def test_head_is_answered_as_get(path, server):
    whole = httpx.get(server.url + path)
    answer = httpx.head(server.url + path)
    assert answer.status_code == whole.status_code == 200 and answer.content == b""
    assert answer.headers["content-type"] == whole.headers["content-type"]
    assert httpx.head(f"{server.url}/nowhere").status_code == 404
    assert httpx.head(f"{server.url}/score").status_code == 405


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_in_use_is_found_before_the_model_opens(host, monkeypatch):
    monkeypatch.delenv("RLHF_REWARD_TOKEN", raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as exit:
            main(["serve", "--model", "no/such/model", "--device", "cpu", "--host", host, "--port", str(port)])
    assert f"cannot listen on port {port}" in exit.value.code and "choose another one with --port" in exit.value.code


# ----- one client does not stop others

LARGE = {
    "many texts": ("/rank", {"prompt": "w3", "responses": ["a"] * 500_000}),
    "one long text": ("/classify", {"input": "a " * 3_500_000}),
    "a long text that is allowed": ("/classify", {"input": "w3 " * 600_000}),
    "many texts to classify": ("/classify", {"input": ["w3 w4"] * 500_000}),
    "many lists of ids": ("/classify", {"input": [[3]] * 700_000}),
    "one list of ids": ("/classify", {"input": [3] * 2_000_000}),
    "many messages": ("/classify", {"messages": [user("a")] * 180_000}),
    "tools of a template": ("/rank", {"prompt": "w3", "tools": [{"a": [[]] * 1_500_000}], "responses": ["w4"]}),
    "one prompt with many responses": ("/rank", {"prompt": "w3 w4 " * 8_000, "responses": ["w5"] * 2_000}),
}


def seconds_of_small_requests(client, scorer):
    "More on a machine that is busy with other programs."
    started = time.perf_counter()
    healthy(client, scorer)
    assert client.get("/health").status_code == 200
    return time.perf_counter() - started


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_request_delays_no_small_one(kind, server, scorer):
    "It held a small one for up to 19 s, and ended in 413."
    path, body = LARGE[kind]
    body = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with concurrent.futures.ThreadPoolExecutor(3) as pool, httpx.Client(base_url=server.url, timeout=60) as client:
        post = functools.partial(httpx.post, server.url + path, content=body, headers=headers, timeout=60)
        idle = seconds_of_small_requests(client, scorer)
        large = [pool.submit(post) for _ in range(3)]
        slowest = 0
        while not all(request.done() for request in large):
            slowest = max(slowest, seconds_of_small_requests(client, scorer))
    assert {request.result().status_code for request in large} <= {413, 503}
    assert slowest < 5 + 100 * idle  # about 0.5 s where nothing else runs


def test_texts_of_a_request(client, scorer):
    for path, body, field in (
        ("/score", {"prompts": ["w3"] * 10_001, "responses": ["w4"] * 10_001}, "responses"),
        ("/rank", {"prompt": "w3", "responses": ["w4"] * 10_001}, "responses"),
        ("/classify", {"input": ["w4"] * 10_001}, "input"),
        ("/classify", {"input": [[4]] * 10_001}, "input"),
        ("/get_reward", {"query": ["w4"] * 10_001}, "query"),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 413, path
        assert answer.json()["detail"][0]["loc"] == ["body", field]
        assert "There are 10001 texts; expected at most 10000" in answer.text
    healthy(client, scorer)


LONG = "a" * 100_000
REPEATED = {  # in the template of each response
    "reasoning": {"prompt": [{"role": "user", "content": "w3", "reasoning_content": LONG}]},
    "tool calls": {"prompt": [{"role": "user", "content": "w3", "tool_calls": [{"function": {"name": LONG}}]}]},
    "role": {"prompt": [{"role": LONG, "content": "w3"}]},
    "messages": {"prompt": [user("")] * 10_000},
    "tools": {"prompt": [user("w3")], "tools": [{"function": {"description": LONG}}]},
    "names in tools": {"prompt": [user("w3")], "tools": [{"function": {"parameters": {LONG: {}}}}]},
    "variables": {"prompt": [user("w3")], "chat_template_kwargs": {"think": [LONG]}},
}


@pytest.mark.parametrize("kind", REPEATED)
def test_all_that_a_template_may_write_counts(kind, scorer):
    "One request of 100 KB with a long tool or reasoning and hundreds of responses kept the server busy for minutes."
    with serving(scorer, timeout=30) as client:
        responses = [[assistant("w4")]] * 100
        answer = client.post("/rank", json={**REPEATED[kind], "responses": responses})
        assert answer.status_code == 413 and "characters; expected at most 4000000" in answer.text
        if kind in ("tools", "variables"):
            shared = {name: value for name, value in REPEATED[kind].items() if name != "prompt"}
            body = {**shared, "prompts": [[user("w3")]] * 100, "responses": responses}
            assert client.post("/score", json=body).status_code == 413
        healthy(client, scorer)


@pytest.mark.parametrize("name, value", [
    ("tools", [{"function": {}}] * 2_000),
    ("chat_template_kwargs", {"think": [{"a": 1}] * 4_500}),
])
def test_what_all_texts_share_is_read_once(name, value, scorer, monkeypatch):
    "It was read and counted for each of them, which took minutes."
    rows = []

    def note(row):
        rows.append(row)
        return to_responses(row)

    monkeypatch.setattr(reading, "to_responses", note)
    with serving(scorer, timeout=100) as client:
        body = {"prompts": [[user("w3")]] * 2_000, "responses": ["w4"] * 2_000, name: value}
        started = time.process_time()
        assert client.post("/score", json=body).status_code == 413
        assert time.process_time() - started < 10  # about 1 s
        assert len([row for row in rows if row.get(name)]) == 1
        body = {"prompts": ["w3"], "responses": ["w4"], "chat_template_kwargs": {"padding": True}}
        assert client.post("/score", json=body).json()["detail"][0]["loc"] == ["body", "chat_template_kwargs"]


def test_a_large_request_is_tokenized_in_pieces_with_the_same_rewards(scorer, monkeypatch):
    """
    Responses are split over pieces and batches; each gets its own reward, also where prompts are truncated.

    Pieces and batches have a tenth of their size, so that 120 responses are a large request.
    """
    monkeypatch.setattr(tokenizing, "SMALL", tokenizing.SMALL // 10)
    monkeypatch.setattr(tokenizing, "PIECE", tokenizing.PIECE // 10)
    scorer.tokens_per_batch //= 10
    responses = [text(1 + number % 12, number) for number in range(120)]
    for on_overlong in ("error", "truncate_prompt"):
        scorer.on_overlong = on_overlong
        prompt = text(40 if on_overlong == "error" else 60, 0)
        with serving(scorer, timeout=300) as client:
            answer = client.post("/rank", json={"prompt": prompt, "responses": responses})
        rewards = dict((result["index"], result["reward"]) for result in answer.json()["ranked"])
        expected = scorer.rank(prompt, responses)
        close([rewards[result.index] for result in expected], [result.reward for result in expected])


def test_a_small_request_is_computed_before_the_rest_of_a_large_one(folder, monkeypatch):
    scorer = Scorer.from_pretrained(folder, device="cpu", tokens_per_batch=16)
    rewards = scorer.rewards
    begun = threading.Event()
    computed = []

    def slow_rewards(sequences, *args, **kwargs):
        begun.set()
        time.sleep(0.05)
        computed.append(len(sequences))
        return rewards(sequences, *args, **kwargs)

    monkeypatch.setattr(scorer, "rewards", slow_rewards)
    responses = [text(8, seed) for seed in range(200)]
    with serving(scorer) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        large = pool.submit(client.post, "/rank", json={"prompt": "w3", "responses": responses})
        assert begun.wait(30)
        assert ask(client, "w3", " w4").status_code == 200
        assert not large.done() and len(computed) < 10
        assert large.result().status_code == 200 and sum(computed) == 201


def test_large_bodies_together_have_a_limit_and_small_ones_pass(scorer, monkeypatch):
    held = Held(scorer, monkeypatch)
    prompts = ["w3" + " " * 90_000]
    with serving(scorer, max_body=100_000) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
        large = {"prompts": prompts, "responses": [" w4"]}
        waiting = [pool.submit(client.post, "/score", json=large) for _ in range(4)]
        assert held.begun.wait(30)
        time.sleep(0.5)
        answer = client.post("/score", json=large)
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert "too many large requests" in answer.text
        small = pool.submit(ask, client, "w3", " w4 w5")
        time.sleep(0.2)
        held.go.set()
        assert small.result().status_code == 200
        assert [request.result().status_code for request in waiting] == [200] * 4
        assert client.post("/score", json=large).status_code == 200  # there is room again


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory of a process from /proc")
def test_the_memory_of_large_requests_is_given_back(folder, scorer, python):
    body = json.dumps({"prompts": ["w3 " * 40] * 9_000, "responses": [" w4" * 10] * 9_000}).encode()
    headers = {"Content-Type": "application/json"}

    def megabytes():
        pages = int(Path(f"/proc/{server.process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def send(number):
        return httpx.post(f"{server.url}/score", content=body, headers=headers, timeout=90).status_code

    with Server(python, folder, "--timeout", "5") as server, httpx.Client(base_url=server.url) as client:
        healthy(client, scorer)
        before = megabytes()
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            assert set(pool.map(send, range(20))) <= {200, 413, 503}
        time.sleep(2)
        healthy(client, scorer)
        assert megabytes() < before + 250  # it was some gigabytes


@pytest.fixture(scope="module")
def few_files(folder, python):
    with Server(python, folder, "--name", "tiny", files=256) as server:
        yield server


BEGINNINGS = {
    "nothing": b"",
    "half a head": b"GET /heal",
    "half a body": b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    "an answer that is not read": b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_idle_connections_stop_nobody(kind, few_files, scorer):
    "More connections than the server has files: it could accept no other, and filled its log."

    def begin(_):
        connection = few_files.connect()
        with contextlib.suppress(ConnectionError):
            connection.sendall(BEGINNINGS[kind])
        return connection

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        connections = list(pool.map(begin, range(300)))
    try:
        with httpx.Client(base_url=few_files.url, timeout=20) as client:
            healthy(client, scorer)
    finally:
        for connection in connections:
            connection.close()
    assert len(few_files.printed()) < 20_000


def test_a_message_that_is_repeated_is_logged_once_in_some_seconds():
    repeats = RepeatFilter(seconds=0.2)

    def record(message):
        return logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, message, (), None)

    assert [repeats.filter(record("no files")) for _ in range(1_000)].count(True) == 1
    assert repeats.filter(record("another"))
    time.sleep(0.25)
    later = record("no files")
    assert repeats.filter(later) and "(999 more like this in the last" in later.msg


def test_a_head_that_does_not_arrive_is_not_awaited(late_heads):
    "Also one that arrives byte by byte, and the second one of a connection. The server waits for ten seconds."
    ended = late_heads.result()
    assert set(ended) == {0, 1, 2} and max(ended.values()) < 25


def test_a_body_in_tiny_chunks(server, scorer):
    "Some thousand are read; many more are refused, and do not keep the server from others."
    head = b"\r\n".join(
        [
            b"POST /score HTTP/1.1",
            b"Host: localhost",
            b"Content-Type: application/json",
            b"Transfer-Encoding: chunked",
            b"",
            b"",
        ]
    )
    body = json.dumps(ONE).encode().ljust(1_000)
    with server.connect() as connection:
        connection.sendall(head + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    with httpx.Client(base_url=server.url) as client:
        idle = seconds_of_small_requests(client, scorer)
    started = time.perf_counter()
    with server.connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(head + b"1\r\n \r\n" * 700_000)
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = connection.recv(1000)
        assert answer == b"" or b"chunks; send larger ones" in answer
    with httpx.Client(base_url=server.url) as client:
        healthy(client, scorer)
    assert time.perf_counter() - started < 4 + 100 * idle


@pytest.mark.fuzz
@pytest.mark.parametrize("path", ["/score", "/rank", "/classify", "/get_reward", "/rerank", "/pooling", "/predict"])
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

    def answerable(case):
        "Messages need a chat template; as many prompts as responses, and fields that go together, are seldom drawn."
        if path == "/classify" and isinstance(case.body, dict):
            case.body.pop("messages", None)
            case.body.setdefault("input", "robin")
        if path == "/score" and isinstance(case.body, dict):
            drawn = case.body.get("responses")
            responses = [response for response in drawn if isinstance(response, str)] if isinstance(drawn, list) else []
            responses.append(" w4")
            case.body = {"responses": responses, "prompts": ["w3"] * len(responses)}
        if path == "/pooling" and isinstance(case.body, dict):
            drawn = case.body.get("input")
            case.body = {"input": drawn if isinstance(drawn, str) and drawn else "robin"}
        return case

    @given(case=right | right.map(answerable) | wrong)
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


def test_the_page_in_a_browser(server, scorer, tmp_path, chromium):
    prompt = "w5 w6"
    responses = ["w7 <b>w8</b>", "w9 w10 w11", "w12"]
    expected = scorer.rank([user(prompt)], responses)
    blind = {result.index: result for result in scorer.rank([user("")], responses)}
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    urls = []
    errors = []
    page.on("request", lambda request: urls.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)

    def shown():
        page.wait_for_selector("#ranked:not([hidden])")
        return [row.locator("td").all_inner_texts() for row in page.locator("#ranked tbody tr").all()]

    page.get_by_role("button", name="Fill in an example").click()
    areas = page.get_by_label("Response", exact=True).all()
    assert "egg" in page.get_by_label("Prompt", exact=True).input_value() and all(area.input_value() for area in areas)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Add a response").click()  # it stays empty, and is left out
    for area, response in zip(areas, responses, strict=True):
        area.fill(response)
    page.get_by_role("button", name="Rank", exact=True).click()
    rows = shown()
    assert [row[1] for row in rows] == [result.response for result in expected]  # the tags as text
    assert [row[2] for row in rows] == [f"{result.reward:.4f}" for result in expected]
    assert [row[3] for row in rows] == [f"{100 * result.probability:.1f} %" for result in expected]
    assert {len(row) for row in rows} == {4} and not page.get_by_text("Without the prompt", exact=True).is_visible()

    page.get_by_label("Compare with the prompt left out").check()
    areas[1].press("Control+Enter")
    page.get_by_text("Without the prompt", exact=True).wait_for()
    for row, result in zip(shown(), expected, strict=True):
        alone = blind[result.index]
        assert row[2] == f"{result.reward:.4f}"
        assert row[4].split("\n") == [f"{alone.reward:.4f}", f"{100 * alone.probability:.1f} %"]
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=Path(os.environ.get("SCREENSHOTS") or tmp_path) / f"page{width}.png", full_page=True)

    areas[0].fill("")
    areas[2].fill("w3 " * 99)  # the second that is sent
    areas[2].press("Control+Enter")
    page.get_by_text("Response 3: ", exact=False).wait_for()
    assert "expected at most 64" in page.get_by_role("alert").inner_text()
    assert not page.locator("#ranked").is_visible()  # no old ranking under the error
    assert areas[2].get_attribute("aria-invalid") == "true"
    page.route("**/rank", lambda route: route.fulfill(status=502, body="<html>Bad gateway</html>"))
    areas[2].press("Control+Enter")
    page.get_by_text("The server answers with status 502.").wait_for()
    answer = {"index": 0, "response": "w12", "reward": 1.5, "probability": 1.0, "spread": 0.25}
    answer["attributes"] = {"helpfulness": 2.0, "<i>verbosity</i>": -1.234}
    page.unroute("**/rank")
    page.route("**/rank", lambda route: route.fulfill(json={"ranked": [answer]}))
    page.get_by_label("Compare with the prompt left out").uncheck()
    areas[2].press("Control+Enter")
    row, = shown()
    assert row[1].split() == ["w12", "helpfulness", "2.00", "<i>verbosity</i>", "-1.23"]
    assert row[2].split() == ["1.5000", "±", "0.2500"] and row[3] == "100.0 %"
    page.unroute("**/rank")
    page.route("**/rank", lambda route: route.abort())
    areas[2].press("Control+Enter")
    page.get_by_text("The server does not answer.").wait_for()
    for scheme, color in (("dark", "rgb(28, 32, 34)"), ("light", "rgba(0, 0, 0, 0)")):
        page.emulate_media(color_scheme=scheme)
        page.goto(f"{server.url}/docs")
        page.get_by_text("Cohere, Jina, Voyage", exact=True).wait_for()
        assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == color
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not errors
    assert all(url.startswith((server.url, "data:")) for url in urls)  # nothing from elsewhere
    page.close()
