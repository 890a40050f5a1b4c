"""
Clients of other servers, installed and called as their users call them, against a server on loopback.

Each gets `Scorer`'s rewards, and sends the body that is named: a new version that sends another field is noticed.
Those of cohere and openai are tools of development; the others are large, and tested where they are installed.
"""
import contextlib
import json
import socket
import threading
import time

import pytest
from architectures import save_chat_reward_model

pytest.importorskip("fastapi", reason="the extra serve is not installed")
import uvicorn

from rlhf_reward.scoring import Scorer
from rlhf_reward.serving import make_app

QUERY = "w3 w4"
DOCUMENTS = ["w5", "w6 w7", "w8", "w6 w9"]
PAIR = {"query": QUERY, "documents": DOCUMENTS}
TEXTS = ["w3 w4 w5", "w7 w8"]


class Recorder:
    "An application that keeps the path and the body of each request to another one."

    def __init__(self, app):
        self.app = app
        self.requests = []

    async def __call__(self, scope, receive, send):
        body = b""

        async def kept():
            nonlocal body
            message = await receive()
            if message["type"] == "http.request":
                body += message.get("body", b"")
                if not message.get("more_body"):
                    self.requests.append((scope["path"], json.loads(body or "null")))
            return message

        await self.app(scope, kept, send)


class Server:
    "A running server: its address, what it was sent, and the rewards that it should give."

    def __init__(self, url, recorder, scorer):
        self.url = url
        self.recorder = recorder
        prompts = [[{"role": "user", "content": QUERY}]] * len(DOCUMENTS)
        self.rewards = scorer.score(prompts, DOCUMENTS)
        self.text_rewards = scorer.score([None] * len(TEXTS), TEXTS)
        self.order = sorted(range(len(DOCUMENTS)), key=lambda index: -self.rewards[index])

    def sent(self):
        "Path and body of the last request."
        return self.recorder.requests[-1]

    def check_ranks(self, ranks, count=len(DOCUMENTS)):
        "Compare (index, reward) of each result with the best so many documents."
        assert [index for index, _ in ranks] == self.order[:count]
        close([reward for _, reward in ranks], [self.rewards[index] for index in self.order[:count]])


def close(rewards, expected):
    assert rewards == pytest.approx(expected, abs=1e-5, rel=1e-5)


@contextlib.contextmanager
def listening(app):
    "Run an application in a thread, and yield its address."
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    scorer = Scorer.from_pretrained(save_chat_reward_model(tmp_path_factory.mktemp("model")), device="cpu")
    recorder = Recorder(make_app(scorer, name="tiny"))
    with listening(recorder) as url:
        yield Server(url, recorder, scorer)


# ----- Cohere


def cohere_ranks(results):
    return [(result.index, result.relevance_score) for result in results]


def test_cohere_v1(server):
    import cohere

    client = cohere.Client("key", base_url=server.url)
    reply = client.rerank(query=QUERY, documents=DOCUMENTS, model="rerank-v3.5", top_n=3)
    server.check_ranks(cohere_ranks(reply.results), 3)
    assert server.sent() == ("/v1/rerank", {**PAIR, "model": "rerank-v3.5", "top_n": 3})
    documents = [{"text": document} for document in DOCUMENTS]
    reply = client.rerank(query=QUERY, documents=documents, model="rerank-v3.5", return_documents=True)
    server.check_ranks(cohere_ranks(reply.results))
    assert [result.document.text for result in reply.results] == [DOCUMENTS[index] for index in server.order]
    with pytest.raises(cohere.UnprocessableEntityError, match="rank_fields"):
        client.rerank(query=QUERY, documents=documents, model="rerank-v3.5", rank_fields=["text"])


def test_cohere_v2(server):
    import cohere

    client = cohere.ClientV2("key", base_url=server.url)
    reply = client.rerank(query=QUERY, documents=DOCUMENTS, model="rerank-v3.5")
    server.check_ranks(cohere_ranks(reply.results))
    assert server.sent() == ("/v2/rerank", {**PAIR, "model": "rerank-v3.5"})
    refused = {"max_tokens_per_doc": 5, "relevant_spans": cohere.RerankRelevantSpans(mode="enabled")}
    for option, value in refused.items():
        with pytest.raises(cohere.UnprocessableEntityError, match=option):
            client.rerank(query=QUERY, documents=DOCUMENTS, model="rerank-v3.5", **{option: value})


# ----- OpenAI


def test_openai(server):
    import openai

    client = openai.OpenAI(api_key="key", base_url=f"{server.url}/v1", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    reply = client.embeddings.create(model="tiny", input=TEXTS)
    close([item.embedding[0] for item in reply.data], server.text_rewards)
    assert server.sent() == ("/v1/embeddings", {"model": "tiny", "input": TEXTS, "encoding_format": "base64"})
    reply = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    close([item.embedding[0] for item in reply.data], server.text_rewards)
    pairs = {"queries": QUERY, "documents": DOCUMENTS}
    reply = client.post("/score", body={"model": "tiny", **pairs}, cast_to=object)
    close([item["score"] for item in reply["data"]], server.rewards)
    reply = client.post("/classify", body={"input": TEXTS}, cast_to=object)
    close([item["probs"][0] for item in reply["data"]], server.text_rewards)
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.embeddings.create(model="tiny", input=TEXTS, dimensions=2)
    assert str(refused.value).startswith("Error code: 422 - dimensions: ")
    (problem,) = refused.value.body["detail"]
    assert problem["loc"] == ["body", "dimensions"]


# ----- clients that are too large to be tools of development


def test_voyage(server):
    voyageai = pytest.importorskip("voyageai", reason="voyageai is not installed: it brings LangChain and aiohttp")
    client = voyageai.Client(api_key="key", base_url=f"{server.url}/v1")
    reply = client.rerank(QUERY, DOCUMENTS, model="rerank-2.5", top_k=2)
    server.check_ranks([(result.index, result.relevance_score) for result in reply.results], 2)
    assert server.sent() == ("/v1/rerank", {**PAIR, "model": "rerank-2.5", "top_k": 2, "truncation": True})
    reply = client.rerank(QUERY, DOCUMENTS, model="rerank-2.5")
    server.check_ranks([(result.index, result.relevance_score) for result in reply.results])
    assert [result.document for result in reply.results] == [DOCUMENTS[index] for index in server.order]
    assert reply.total_tokens > 0
    close([embedding[0] for embedding in client.embed(TEXTS, model="tiny").embeddings], server.text_rewards)
    for option, value in {"input_type": "query", "output_dtype": "int8", "output_dimension": 2}.items():
        with pytest.raises(voyageai.error.MalformedRequestError) as refused:
            client.embed(TEXTS, model="tiny", **{option: value})
        (problem,) = refused.value.user_message  # its `str` expects a string
        assert problem["loc"] == ["body", option]


def test_langchain_cohere(server):
    reason = "langchain-cohere is not installed: it requires cohere below 6"
    langchain_cohere = pytest.importorskip("langchain_cohere", reason=reason)
    client = langchain_cohere.CohereRerank(model="rerank-v3.5", cohere_api_key="key", base_url=server.url)
    results = client.rerank(DOCUMENTS, QUERY)
    server.check_ranks([(result["index"], result["relevance_score"]) for result in results], 3)
    body = {**PAIR, "model": "rerank-v3.5", "top_n": 3, "max_tokens_per_doc": None}
    assert server.sent() == ("/v2/rerank", body)


def test_langchain_jina(server, monkeypatch):
    reason = "langchain-community is not installed: it brings LangChain, SQLAlchemy and aiohttp"
    jina = pytest.importorskip("langchain_community.document_compressors.jina_rerank", reason=reason)
    monkeypatch.setattr(jina, "JINA_API_URL", f"{server.url}/v1/rerank")
    results = jina.JinaRerank(jina_api_key="key", top_n=2).rerank(DOCUMENTS, QUERY)
    server.check_ranks([(result["index"], result["relevance_score"]) for result in results], 2)
    assert server.sent() == ("/v1/rerank", {**PAIR, "model": "jina-reranker-v1-base-en", "top_n": 2})


NO_INFINITY = "infinity-client is not installed: it requires httpx below 0.28, and runs with 0.28, too"


def test_infinity(server):
    infinity = pytest.importorskip("infinity_client", reason=NO_INFINITY)
    from infinity_client.api.default import rerank
    from infinity_client.models import RerankInput

    body = RerankInput(query=QUERY, documents=DOCUMENTS, return_documents=True)
    reply = rerank.sync(client=infinity.Client(base_url=server.url), body=body)
    server.check_ranks([(result.index, result.relevance_score) for result in reply.results])
    assert [result.document for result in reply.results] == [DOCUMENTS[index] for index in server.order]
    options = {"model": "default/not-specified", "raw_scores": False, "return_documents": True}
    assert server.sent() == ("/rerank", {**PAIR, **options})


def test_langchain_infinity(server):
    infinity = pytest.importorskip("infinity_client", reason=NO_INFINITY)
    reason = "langchain-community is not installed: it brings LangChain, SQLAlchemy and aiohttp"
    module = pytest.importorskip("langchain_community.document_compressors.infinity_rerank", reason=reason)
    client = module.InfinityRerank(client=infinity.Client(base_url=server.url), model="tiny", top_n=2)
    results = client.rerank(DOCUMENTS, QUERY)
    server.check_ranks([(result["index"], result["relevance_score"]) for result in results], 2)
    options = {"model": "tiny", "raw_scores": False, "return_documents": False}
    assert server.sent() == ("/rerank", {**PAIR, **options})


def llama_index_nodes():
    from llama_index.core.schema import NodeWithScore, TextNode

    return [NodeWithScore(node=TextNode(text=document)) for document in DOCUMENTS]


def check_nodes(server, nodes, count):
    server.check_ranks([(DOCUMENTS.index(node.node.get_content()), node.score) for node in nodes], count)


def test_llama_index_cohere(server):
    reason = "llama-index-postprocessor-cohere-rerank is not installed: it requires cohere below 7"
    module = pytest.importorskip("llama_index.postprocessor.cohere_rerank", reason=reason)
    client = module.CohereRerank(api_key="key", base_url=server.url, top_n=2)
    check_nodes(server, client.postprocess_nodes(llama_index_nodes(), query_str=QUERY), 2)
    assert server.sent() == ("/v2/rerank", {**PAIR, "model": "rerank-english-v3.0", "top_n": 2})


def test_llama_index_tei(server):
    reason = "llama-index-postprocessor-tei-rerank is not installed: it brings LlamaIndex"
    module = pytest.importorskip("llama_index.postprocessor.tei_rerank", reason=reason)
    client = module.TextEmbeddingInference(base_url=server.url, top_n=2)
    check_nodes(server, client.postprocess_nodes(llama_index_nodes(), query_str=QUERY), 2)
    assert server.sent() == ("/rerank", {"query": QUERY, "texts": DOCUMENTS})
