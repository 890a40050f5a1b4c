"""
Requests as the clients of other servers send them: each answered in the form that its client reads, with the rewards
of `Scorer`. The bodies are those of the clients' own code, named above each.
"""
import base64
import importlib
import json
import re
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest
from architectures import save_chat_reward_model

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from fastapi.testclient import TestClient
from tokenizers.processors import TemplateProcessing

from rlhf_reward.cli import main
from rlhf_reward.scoring import Scorer
from rlhf_reward.serving import make_app

QUERY = "w3 w4"
DOCUMENTS = ["w5", "w6 w7", "w8", "w6 w9"]
PAIR = {"query": QUERY, "documents": ["w3"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_reward_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["chat", "plain"])
def scorer(request, folder):
    "The scorer of a model with a chat template, and of one without."
    scorer = Scorer.from_pretrained(folder, device="cpu")
    if request.param == "plain":
        scorer.tokenizer.chat_template = None
    return scorer


@contextmanager
def serving(scorer, **options):
    with TestClient(make_app(scorer, **{"name": "tiny", **options}), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def client(scorer):
    with serving(scorer) as client:
        yield client


def conversation(query, document):
    return [{"role": "user", "content": query}, {"role": "assistant", "content": document}]


def expected_rewards(scorer, pairs):
    "The rewards of queries and documents: as conversations if there is a template, else joined."
    prompts = []
    for query, _ in pairs:
        prompts.append([{"role": "user", "content": query}] if scorer.tokenizer.chat_template else query)
    return scorer.score(prompts, [document for _, document in pairs])


def close(rewards, expected):
    assert rewards == pytest.approx(expected, abs=1e-5, rel=1e-5)


def answer(client, path, body):
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


RERANK = {
    # cohere 7.3.1, Client.rerank: base_client.py sends what was given
    "cohere v1": ("/v1/rerank", {"model": "rerank-v3.5", "query": QUERY, "documents": DOCUMENTS, "top_n": 3}),
    "cohere v1, objects": (
        "/v1/rerank",
        {
            "model": "rerank-v3.5",
            "query": QUERY,
            "documents": [{"text": document} for document in DOCUMENTS],
            "return_documents": True,
        },
    ),
    "cohere v1, more results than documents": (
        "/v1/rerank",
        {"query": QUERY, "documents": DOCUMENTS, "top_n": 99, "return_documents": True},
    ),
    # cohere 7.3.1, ClientV2.rerank: v2/raw_client.py
    "cohere v2": ("/v2/rerank", {"model": "rerank-v3.5", "query": QUERY, "documents": DOCUMENTS, "priority": 0}),
    # langchain-cohere 0.6.0, CohereRerank.rerank through ClientV2: what is not given is null
    "langchain-cohere": (
        "/v2/rerank",
        {"model": "rerank-v3.5", "query": QUERY, "documents": DOCUMENTS, "top_n": 3, "max_tokens_per_doc": None},
    ),
    # llama-index-postprocessor-cohere-rerank 0.10.0, CohereRerank through ClientV2
    "llama-index cohere": (
        "/v2/rerank",
        {"model": "rerank-english-v3.0", "query": QUERY, "documents": DOCUMENTS, "top_n": 2},
    ),
    # langchain-community 0.4.2, document_compressors/jina_rerank.py
    "jina": (
        "/v1/rerank",
        {"query": QUERY, "documents": DOCUMENTS, "model": "jina-reranker-v1-base-en", "top_n": None},
    ),
    # infinity-client 0.0.78, models/rerank_input.py
    "infinity": (
        "/rerank",
        {
            "query": QUERY,
            "documents": DOCUMENTS,
            "return_documents": False,
            "raw_scores": False,
            "model": "default/not-specified",
        },
    ),
    # vLLM, entrypoints/pooling/scoring/protocol.py: all fields with their defaults
    "vllm": (
        "/rerank",
        {
            "model": "tiny",
            "query": QUERY,
            "documents": DOCUMENTS,
            "top_n": 0,
            "use_activation": None,
            "truncate_prompt_tokens": None,
            "user": None,
            "priority": 0,
        },
    ),
}


@pytest.mark.parametrize("name", RERANK)
def test_rerank(name, client, scorer):
    path, body = RERANK[name]
    reply = answer(client, path, body)
    expected = expected_rewards(scorer, [(QUERY, document) for document in DOCUMENTS])
    order = sorted(range(len(DOCUMENTS)), key=lambda index: -expected[index])[: body.get("top_n") or None]
    assert [result["index"] for result in reply["results"]] == order
    close([result["relevance_score"] for result in reply["results"]], [expected[index] for index in order])
    assert reply["model"] == "tiny" and reply["id"] and reply["usage"]["total_tokens"] > 0
    shown = [result.get("document") for result in reply["results"]]
    if body.get("return_documents"):
        assert shown == [{"text": DOCUMENTS[index]} for index in order]
    else:
        assert shown == [None] * len(order)


def test_rerank_as_voyage(client, scorer):
    "voyageai 0.5.0, Client.rerank: `top_k` is null by default."
    expected = expected_rewards(scorer, [(QUERY, document) for document in DOCUMENTS])
    order = sorted(range(len(DOCUMENTS)), key=lambda index: -expected[index])
    for top_k in (2, None):
        body = {"query": QUERY, "documents": DOCUMENTS, "model": "rerank-2.5", "top_k": top_k, "truncation": True}
        reply = answer(client, "/v1/rerank", body)
        assert set(reply) == {"object", "data", "model", "usage"}
        assert [set(result) for result in reply["data"]] == [{"index", "relevance_score"}] * (top_k or len(order))
        assert [result["index"] for result in reply["data"]] == order[:top_k]
        close([result["relevance_score"] for result in reply["data"]], [expected[index] for index in order[:top_k]])
        assert reply["usage"]["total_tokens"] > 0
    reply = answer(client, "/v1/rerank", {**body, "return_documents": True})
    assert [result["document"] for result in reply["data"]] == [DOCUMENTS[index] for index in order]


def test_documents_of_infinity_are_strings(client):
    "infinity-client 0.0.78, models/re_rank_object.py."
    body = {"query": QUERY, "documents": DOCUMENTS, "return_documents": True, "raw_scores": False}
    results = answer(client, "/rerank", body)["results"]
    assert [result["document"] for result in results] == [DOCUMENTS[result["index"]] for result in results]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank_as_text_embeddings_inference(path, client, scorer):
    "llama-index-postprocessor-tei-rerank 0.6.0, and all fields of router/src/http/types.rs."
    expected = expected_rewards(scorer, [(QUERY, document) for document in DOCUMENTS])
    order = sorted(range(len(DOCUMENTS)), key=lambda index: -expected[index])
    ranks = answer(client, path, {"query": QUERY, "texts": DOCUMENTS})
    assert [set(rank) for rank in ranks] == [{"index", "score"}] * len(order)
    assert [rank["index"] for rank in ranks] == order
    close([rank["score"] for rank in ranks], [expected[index] for index in order])
    options = {"truncate": True, "raw_scores": True, "return_text": True, "truncation_direction": "Right"}
    ranks = answer(client, path, {"query": QUERY, "texts": DOCUMENTS, **options})
    assert [rank["text"] for rank in ranks] == [DOCUMENTS[index] for index in order]


# vLLM, examples/pooling/score/score_api_online.py and entrypoints/pooling/scoring/protocol.py
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize(
    "names",
    [("queries", "documents"), ("text_1", "text_2"), ("queries", "items"), ("data_1", "data_2")],
)
def test_score_as_vllm(path, names, client, scorer):
    first, second = names
    cases = (
        (QUERY, DOCUMENTS[0], [(QUERY, DOCUMENTS[0])]),
        (QUERY, DOCUMENTS, [(QUERY, document) for document in DOCUMENTS]),
        ([QUERY], DOCUMENTS, [(QUERY, document) for document in DOCUMENTS]),
        ([QUERY, "w10"], DOCUMENTS[:2], [(QUERY, DOCUMENTS[0]), ("w10", DOCUMENTS[1])]),
    )
    for queries, documents, pairs in cases:
        reply = answer(client, path, {"model": "BAAI/bge-reranker-v2-m3", first: queries, second: documents})
        assert set(reply) == {"id", "object", "created", "model", "data", "usage"}
        assert [item["index"] for item in reply["data"]] == list(range(len(pairs)))
        assert {item["object"] for item in reply["data"]} == {"score"}
        close([item["score"] for item in reply["data"]], expected_rewards(scorer, pairs))


def test_score_in_its_own_form_is_as_it_was(client, scorer):
    reply = answer(client, "/score", {"prompts": [QUERY], "responses": [DOCUMENTS[0]]})
    close(reply["rewards"], scorer.score([QUERY], [DOCUMENTS[0]]))


def complete_texts(scorer):
    "Bodies of `input`, and the reward of each text."
    ids = scorer.tokenizer(QUERY + " w5")["input_ids"] + [scorer.tokenizer.eos_token_id]
    first, second = scorer.score([None, None], [QUERY + " w5", "w7 w8"])
    bodies = [
        (QUERY + " w5", [first]),
        ([QUERY + " w5", "w7 w8"], [first, second]),
        (ids, [first]),
        ([ids, ids], [first, first]),
    ]
    return bodies, ids


def test_pooling_as_vllm(client, scorer):
    "examples/pooling/reward/sequence_reward_online.py, and the fields of entrypoints/pooling/pooling/protocol.py."
    bodies, _ = complete_texts(scorer)
    for value, expected in bodies:
        options = {"task": "classify", "use_activation": False, "encoding_format": "float", "embed_dtype": "float32"}
        reply = answer(client, "/pooling", {"model": "tiny", "input": value, **options})
        assert set(reply) == {"id", "object", "created", "model", "data", "usage"}
        close([item["data"][0] for item in reply["data"]], expected)
        assert [item["object"] for item in reply["data"]] == ["pooling"] * len(expected)
    if scorer.tokenizer.chat_template:
        messages = [{"role": "user", "content": [{"type": "text", "text": "w5"}]}]
        reply = answer(client, "/pooling", {"model": "tiny", "messages": messages})
        close(reply["data"][0]["data"], scorer.score([None], [[{"role": "user", "content": "w5"}]]))


def test_embeddings_as_verl_and_openai(client, scorer):
    "verl's experimental/reward_loop/reward_loop.py; openai 3.57.0, resources/embeddings.py."
    bodies, _ = complete_texts(scorer)
    for value, expected in bodies:
        reply = answer(client, "/v1/embeddings", {"model": "/models/reward", "input": value})
        close(reply["data"][-1]["embedding"][-1], expected[-1])
        assert reply["data"][0]["object"] == "embedding" and reply["object"] == "list"
        body = {"input": value, "model": "tiny", "encoding_format": "base64", "embed_dtype": "float32"}
        for item, reward in zip(answer(client, "/v1/embeddings", body)["data"], expected, strict=True):
            close(struct.unpack("<f", base64.b64decode(item["embedding"]))[0], reward)


def test_classify_as_verl(client, scorer):
    "verl with vLLM: the path of the model as its name, and `use_activation` false, or `activation` before."
    text = QUERY + " w5"
    for path in ("/classify", "/v1/classify"):
        for option in ("use_activation", "activation"):
            reply = answer(client, path, {"model": "/models/reward", "input": text, option: False})
            close(reply["data"][-1]["probs"][-1], scorer.score([None], [text])[0])


def test_classify_as_sglang(client, scorer):
    "docs/basic_usage/native_api of SGLang; examples/runtime/reward_model.py; `EmbeddingReqInput`."
    bodies, ids = complete_texts(scorer)
    for (value, expected), name in zip(bodies, ("text", "text", "input_ids", "input_ids"), strict=True):
        reply = answer(client, "/classify", {"model": "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2", name: value})
        if len(expected) == 1:
            close(reply["embedding"], expected)
        else:
            close([item["embedding"][0] for item in reply], expected)
    close(answer(client, "/classify", {"input_ids": [ids]})[0]["embedding"], bodies[0][1])
    if scorer.tokenizer.chat_template:
        conversations = [conversation(QUERY, document) for document in DOCUMENTS]
        reply = answer(client, "/classify", {"conv": conversations})
        close([item["embedding"][0] for item in reply], scorer.score([None] * 4, conversations))
        close(answer(client, "/classify", {"conv": conversations[0]})["embedding"], reply[0]["embedding"])


def test_predict_as_text_embeddings_inference(client, scorer):
    "`PredictInput` of router/src/http/types.rs: a text, a pair, or a list of both."
    text = QUERY + " w5"
    (whole,) = scorer.score([None], [text])
    (pair,) = expected_rewards(scorer, [(QUERY, "w5")])
    for inputs, expected in ((text, whole), ([text], whole), ([QUERY, "w5"], pair)):
        (prediction,) = answer(client, "/predict", {"inputs": inputs, "raw_scores": True, "truncate": False})
        assert prediction["label"] == "LABEL_0"
        close(prediction["score"], expected)
    reply = answer(client, "/predict", {"inputs": [[text], [QUERY, "w5"]]})
    close([prediction["score"] for (prediction,) in reply], [whole, pair])


def test_tokenize_as_vllm(client, scorer):
    "The tokens are those that are scored: sent back as ids they have the same reward."
    text = QUERY + " w5"
    reply = answer(client, "/tokenize", {"model": "tiny", "prompt": text, "add_special_tokens": True})
    assert reply["tokens"] == scorer.tokenizer(text)["input_ids"] + [scorer.tokenizer.eos_token_id]
    assert reply["count"] == len(reply["tokens"]) and reply["max_model_len"] == int(scorer.max_length)
    reward = answer(client, "/classify", {"input": reply["tokens"]})["data"][0]["probs"]
    close(reward, scorer.score([None], [text]))
    named = answer(client, "/tokenize", {"prompt": text, "return_token_strs": True})
    assert named["token_strs"] == scorer.tokenizer.convert_ids_to_tokens(reply["tokens"])
    if scorer.tokenizer.chat_template:
        messages = conversation(QUERY, "w5")
        tokens = answer(client, "/tokenize", {"messages": messages})["tokens"]
        close(answer(client, "/classify", {"input": tokens})["data"][0]["probs"], scorer.score([None], [messages]))


def test_information(client, scorer):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny" and model["object"] == "model" and model["max_model_len"] == scorer.max_length
    info = client.get("/info").json()
    assert info["model_id"] == "tiny" and info["model_type"]["classifier"]["id2label"] == {"0": "LABEL_0"}
    assert info["max_input_length"] == scorer.max_length and info["model_dtype"] == "float32"
    assert not info["auto_truncate"]


QUERIES = {"model": "other", "queries": QUERY, "documents": DOCUMENTS}
ROUTES = {
    "/rerank": {"model": "other", "query": QUERY, "documents": DOCUMENTS},
    "/v1/rerank": {"model": "other", "query": QUERY, "texts": DOCUMENTS},
    "/v2/rerank": {"model": "other", "query": QUERY, "documents": DOCUMENTS},
    "/score": QUERIES,
    "/v1/score": QUERIES,
    "/classify": {"model": "other", "text": "w3"},
    "/v1/classify": {"model": "other", "input": "w3"},
    "/pooling": {"model": "other", "input": "w3"},
    "/v1/embeddings": {"model": "other", "input": "w3"},
    "/tokenize": {"model": "other", "prompt": "w3"},
    "/predict": {"model": "other", "inputs": "w3"},
}


def test_the_name_of_the_model(client, scorer):
    "Another name is answered, unless the server compares names."
    with serving(scorer, strict_model_name=True) as strict:
        for path, body in ROUTES.items():
            answer(client, path, body)
            refused = strict.post(path, json=body)
            assert refused.status_code == 404, path
            assert refused.json()["detail"] == "The model 'other' is not served here; expected 'tiny', or no model."
            answer(strict, path, {**body, "model": "tiny"})
            answer(strict, path, {name: value for name, value in body.items() if name != "model"})


def test_the_token_and_the_metrics(scorer):
    headers = {"Authorization": "Bearer secret"}
    with serving(scorer, token="secret") as client:
        for path in (*ROUTES, "/v1/models", "/info"):
            method = "POST" if path in ROUTES else "GET"
            assert client.request(method, path, json=ROUTES.get(path)).status_code == 401, path
            assert client.request(method, path, json=ROUTES.get(path), headers=headers).status_code == 200, path
            counted = f'rlhf_reward_requests_total{{path="{path}",status="200"}} 1.0'
            assert counted in client.get("/metrics", headers=headers).text


def test_the_command_compares_names(folder, monkeypatch, capsys):
    given = []
    monkeypatch.setattr("rlhf_reward.serving.serve", lambda *values, **options: given.append(options))
    monkeypatch.setattr("rlhf_reward.cli.serve_command.check_address", lambda *values: None)
    for arguments in ([], ["--strict_model_name"]):
        main(["serve", "--model", folder, "--device", "cpu", *arguments])
    assert [options["strict_model_name"] for options in given] == [False, True]
    following = f"Next: rlhf_reward verify --model {folder} --url http://127.0.0.1:8000\n"
    assert capsys.readouterr().err.count(following) == 2


@pytest.mark.parametrize(
    "path, body, field",
    [
        ("/rerank", {"query": QUERY}, ["documents"]),
        ("/rerank", {"query": QUERY, "documents": []}, ["documents"]),
        ("/rerank", {"query": QUERY, "documents": ["w3", 5]}, ["documents", 1]),
        ("/rerank", {"query": QUERY, "documents": ["w3", {"text": "w4", "title": "w5"}]}, ["documents", 1]),
        ("/rerank", {"query": QUERY, "documents": ["w3", "\ud800"]}, ["documents", 1]),
        ("/rerank", {"query": "\ud800", "documents": ["w3"]}, ["query"]),
        ("/rerank", {"query": QUERY, "documents": ["w3"], "top_n": -1}, ["top_n"]),
        ("/v2/rerank", {"query": QUERY, "documents": ["w3"], "max_tokens_per_doc": 10}, ["max_tokens_per_doc"]),
        ("/v1/rerank", {"query": QUERY, "documents": ["w3"], "rank_fields": ["text"]}, ["rank_fields"]),
        ("/rerank", {"query": QUERY, "texts": []}, ["texts"]),
        ("/rerank", {"query": QUERY, "texts": ["w3", "\ud800"]}, ["texts", 1]),
        ("/v2/rerank", {**PAIR, "relevant_spans": {"mode": "enabled"}}, ["relevant_spans"]),
        ("/v1/rerank", {**PAIR, "max_chunks_per_doc": 2}, ["max_chunks_per_doc"]),
        ("/v1/rerank", {**PAIR, "overlap_tokens": 20}, ["overlap_tokens"]),
        ("/v1/rerank", {**PAIR, "max_doc_length": 20}, ["max_doc_length"]),
        ("/v1/rerank", {**PAIR, "max_query_length": 20}, ["max_query_length"]),
        ("/v1/rerank", {**PAIR, "top_k": 0}, ["top_k"]),
        ("/v1/rerank", {**PAIR, "top_k": 1, "top_n": 1}, ["top_n"]),
        ("/v1/rerank", {**PAIR, "truncation": "yes"}, ["truncation"]),
        ("/score", {"queries": QUERY}, ["queries"]),
        ("/score", {"queries": ["w3", "w4"], "documents": ["w3", "w4", "w5"]}, ["queries"]),
        ("/score", {"queries": ["w3", "w4"], "documents": ["w3", "\ud800"]}, ["documents", 1]),
        ("/score", {"text_1": "w3", "documents": "w4"}, ["documents"]),
        ("/score", {"text_1": "w3", "text_2": 5}, ["text_2"]),
        ("/score", {"prompts": ["w3"], "responses": ["w4"], "queries": "w5"}, ["queries"]),
        ("/v1/score", {}, []),
        ("/classify", {"text": "w3", "input": "w4"}, ["input"]),
        ("/classify", {"text": "w3", "input_ids": [3]}, ["text"]),
        ("/classify", {"input_ids": [3, 9_999]}, ["input_ids", 0]),
        ("/classify", {"text": ["w3", "\ud800"]}, ["text", 1]),
        ("/classify", {"text": "w3", "image_data": "x"}, ["image_data"]),
        ("/classify", {"text": "w3", "video_data": ["x"]}, ["video_data"]),
        ("/classify", {"text": "w3", "audio_data": ["x"]}, ["audio_data"]),
        ("/classify", {"text": "w3", "dimensions": 1}, ["dimensions"]),
        ("/classify", {"text": "w3", "input_embeds": [[0.5]]}, ["input_embeds"]),
        ("/rerank", {"query": QUERY, "documents": ["w3", {"image": "https://host/bird.png"}]}, ["documents", 1]),
        ("/rerank", {"query": QUERY, "documents": ["w3"], "top_n": 1.5}, ["top_n"]),
        ("/rerank", {"query": QUERY, "documents": ["w3"], "texts": ["w3"]}, ["texts"]),
        ("/v1/embeddings", {"input": [{"text": "w3"}]}, ["input"]),
        ("/v1/embeddings", {"input": "w3", "encoding_format": "int8"}, ["encoding_format"]),
        ("/v1/embeddings", {"input": "w3", "input_type": "query"}, ["input_type"]),
        ("/v1/embeddings", {"input": "w3", "task": "retrieval.query"}, ["task"]),
        ("/v1/embeddings", {"input": "w3", "output_dtype": "int8"}, ["output_dtype"]),
        ("/v1/embeddings", {"input": "w3", "output_dimension": 256}, ["output_dimension"]),
        ("/v1/embeddings", {"input": "w3", "embedding_type": "binary"}, ["embedding_type"]),
        ("/v1/embeddings", {"input": "w3", "normalized": True}, ["normalized"]),
        ("/v1/embeddings", {"input": ["w3", "w4"], "late_chunking": True}, ["late_chunking"]),
        ("/v1/embeddings", {"input": "w3", "encoding_format": "base64", "embed_dtype": "float16"}, ["embed_dtype"]),
        ("/v1/embeddings", {"input": "w3", "encoding_format": "base64", "endianness": "big"}, ["endianness"]),
        ("/score", {"queries": "w3", "documents": "w4", "truncate_prompt_tokens": 5}, ["truncate_prompt_tokens"]),
        ("/pooling", {"input": "w3", "task": "token_classify"}, ["task"]),
        ("/pooling", {"input": "w3", "encoding_format": "base64"}, ["encoding_format"]),
        ("/pooling", {}, ["input"]),
        ("/v1/embeddings", {"input": "w3", "dimensions": 2}, ["dimensions"]),
        ("/tokenize", {}, ["prompt"]),
        ("/tokenize", {"prompt": "w3", "add_generation_prompt": True}, ["add_generation_prompt"]),
        ("/predict", {"inputs": ["w3", "w4", "w5"]}, ["inputs"]),
        ("/predict", {"inputs": [["w3"], ["w4", "\ud800"]]}, ["inputs", 1, 1]),
        ("/predict", {}, ["inputs"]),
        ("/predict", {"inputs": "w3", "parameters": {"function_to_apply": "sigmoid"}}, ["parameters"]),
    ],
)
def test_bad_fields_are_named(path, body, field, client):
    refused = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert refused.status_code == 422, refused.text
    expected = ["body", *field]
    found = [problem["loc"][: len(expected)] for problem in refused.json()["detail"]]
    assert expected in found, refused.text
    assert "form of" not in str(found) and "None" not in refused.text  # which JSON calls null


def test_other_rewards_are_refused_where_there_are_none(client):
    "`normalize` and `pessimism` of /score and /rank, sent to a route without such an option, are not ignored."
    bodies = [*ROUTES.items(), ("/classify", {"input": "w3"}), ("/rerank", {"query": "w3", "texts": ["w4"]})]
    for path, body in [*bodies, ("/get_reward", {"query": ["w3"]})]:
        for option, value in (("normalize", True), ("pessimism", 1.0)):
            refused = client.post(path, json={**body, option: value})
            assert refused.status_code == 422, path
            assert [problem["loc"] for problem in refused.json()["detail"]] == [["body", option]]
        for value in (None, False):
            answer(client, path, {**body, "normalize": value, "pessimism": None})


def test_limits(scorer):
    "Too many texts, and a text that is too long."
    long = "w3 " * (int(scorer.max_length) + 1)
    with serving(scorer) as client:
        for path, body in (
            ("/rerank", {"query": QUERY, "documents": ["w3"] * 10_001}),
            ("/rerank", {"query": QUERY, "texts": ["w3"] * 10_001}),
            ("/score", {"queries": QUERY, "documents": ["w3"] * 10_001}),
            ("/classify", {"text": ["w3"] * 10_001}),
            ("/predict", {"inputs": [["w3"]] * 10_001}),
            ("/rerank", {"query": QUERY, "documents": ["w3", long]}),
            ("/rerank", {"query": QUERY, "texts": ["w3", long], "truncate": True}),
            ("/score", {"text_1": QUERY, "text_2": long}),
            ("/pooling", {"input": long}),
            ("/tokenize", {"prompt": long}),
        ):
            assert client.post(path, json=body).status_code == 413, path


REFUSES_TRUNCATION = (
    {"truncate": False},
    {"truncation": False},
    {"truncate": True, "truncation_direction": "Right"},
    {"truncate_prompt_tokens": -1, "truncation_side": "right"},
)


def test_a_server_that_truncates_does_not_where_the_client_refuses_it(folder):
    "Or expects it on the other side: otherwise the reward would be that of another text."
    scorer = Scorer.from_pretrained(folder, device="cpu", on_overlong="truncate_prompt")
    scorer.tokenizer.chat_template = None
    long = "w3 " * (int(scorer.max_length) + 1)
    (cut,) = scorer.score([long], ["w4"])
    pairs = {
        "/rerank": {"query": long, "documents": ["w4"]},
        "/v1/rerank": {"query": long, "texts": ["w4"]},
        "/score": {"queries": long, "documents": "w4"},
        "/predict": {"inputs": [long, "w4"]},
    }
    with serving(scorer) as client:
        for path, body in pairs.items():
            for option in ({}, {"truncate": True}, {"truncation_side": "left"}, {"truncation_direction": "Left"}):
                reply = json.dumps(answer(client, path, {**body, **option}))
                close(float(re.search('"(?:relevance_)?score": ([^,}]+)', reply)[1]), cut)
            for option in REFUSES_TRUNCATION:
                refused = client.post(path, json={**body, **option})
                assert refused.status_code == 413, (path, option, refused.text)
                answer(client, path, json.loads(json.dumps({**body, **option}).replace(long, QUERY)))


def test_special_tokens_are_those_of_training(folder):
    "`add_special_tokens` is refused where it would give a text others."
    scorer = Scorer.from_pretrained(folder, device="cpu")
    tokenizer = scorer.tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} <eos>{% endfor %}"
    text = "w3 w4"
    conversations = [conversation(QUERY, "w5")]
    rendered = tokenizer.apply_chat_template(conversations[0], tokenize=False)
    bodies = [("/classify", {"input": text}), ("/pooling", {"input": text}), ("/tokenize", {"prompt": text})]
    bodies += [("/classify", {"input": rendered}), ("/v1/embeddings", {"input": tokenizer(text)["input_ids"]})]
    bodies.append(("/classify", {"messages": conversations[0]}))
    with serving(scorer) as client:
        for path, body in bodies:  # a tokenizer that adds none
            for value in (True, False, None):
                answer(client, path, {**body, "add_special_tokens": value})
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A",
            special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)],
        )
        for index, (path, body) in enumerate(bodies):
            for value in (True, False):
                reply = client.post(path, json={**body, "add_special_tokens": value})
                differs = value if "messages" in body else not value and index < 3
                assert reply.status_code == (422 if differs else 200), (path, body, value)
                if differs:
                    (problem,) = reply.json()["detail"]
                    assert problem["loc"] == ["body", "add_special_tokens"]
                    assert f"is {str(value).lower()}, but texts are encoded as in training; expected" in problem["msg"]


def test_the_forms_of_the_load_test(client, scorer, monkeypatch):
    "benchmarks/serve_load.py compares every answer with the offline reward."
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    if not folder.is_dir():
        pytest.skip("there are no benchmarks here")
    monkeypatch.syspath_prepend(str(folder))
    forms = importlib.import_module("serve_load").FORMS
    assert len(forms) > 12
    pair = ("w5 w6", " w7")
    for form in forms.values():
        reward = form.reward(answer(client, form.path, form.body(*pair)))
        is_query = form.path.endswith("/rerank") or form.path == "/v1/score"
        expected = expected_rewards(scorer, [pair]) if is_query else scorer.score([None], ["".join(pair)])
        close(reward, expected[0])
