"""
`verify` names what another program does differently: each fault alone, two at once, and none.

The other program of these tests is `OtherProgram`, which makes rewards with as little of the library as possible: it
renders, tokenizes and pads by itself, and calls the model.
"""
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import transformers
from architectures import PAD, SIZE, word_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from rlhf_reward import RewardModel, Scorer, verify_servers, verify_values
from rlhf_reward.cli import main
from rlhf_reward.synthetic import synthetic_texts, tiny_decoder
from rlhf_reward.verify import Verifier
from rlhf_reward.verify_probes import OtherRewards, make_probes
from rlhf_reward.verify_servers import CannotVerify, RewardServer
from rlhf_reward.verify_tools import ask_crossencoder, ask_folder, ask_function, ask_rewardbench, ask_transformers

TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}system: Be kind.<|end|>\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A checkpoint whose tokenizer writes BOS, with a chat template that ends in EOS and a line break."
    folder = tmp_path_factory.mktemp("verify")
    base = tiny_decoder(
        folder / "base",
        synthetic_texts(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=320,
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = RewardModel(base, 0.0, "cpu")
    model.backbone.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "reward", tokenizer)
    return str(folder / "reward")


def open_scorer(folder, chat):
    scorer = Scorer.from_pretrained(folder, device="cpu")
    if not chat:
        scorer.tokenizer.chat_template = None
    return scorer


@pytest.fixture(scope="module")
def chat(folder):
    return Verifier(open_scorer(folder, True))


@pytest.fixture(scope="module")
def plain(folder):
    return Verifier(open_scorer(folder, False))


COMPUTED = {}


class OtherProgram:
    "Another program with the faults of these names."

    def __init__(self, scorer, *faults):
        self.scorer = scorer
        self.tokenizer = scorer.tokenizer
        self.faults = faults

    @functools.cached_property
    def model(self):
        if "bfloat16" in self.faults:
            return copy.deepcopy(self.scorer.model).bfloat16()
        if "other checkpoint" in self.faults:
            model = copy.deepcopy(self.scorer.model)
            model.score.weight.data = model.score.weight.data.roll(1)
            return model
        return self.scorer.model

    def reward(self, ids):
        "The reward at the last of these ids, padding or not; each sequence is computed once in all tests."
        kind = tuple({"bfloat16", "other checkpoint"}.intersection(self.faults))
        key = (id(self.scorer), kind, tuple(ids))
        if key not in COMPUTED:
            with torch.no_grad():
                COMPUTED[key] = self.model(torch.tensor([ids])).float().item()
        return COMPUTED[key]

    def text(self, messages):
        template = None
        roles = [message["role"] for message in messages]
        if "ChatML" in self.faults:
            template = CHATML
        if "system dropped" in self.faults and "system" in roles:
            messages = messages[1:]
        if "last turn" in self.faults:
            messages = messages[-2:]
        if "joined" in self.faults:
            return "\n".join(message["content"] for message in messages)
        opened = "generation prompt" in self.faults
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=opened
        )
        if "no default system" in self.faults and messages[0]["role"] != "system":
            text = text.replace("system: Be kind.<|end|>\n", "")
        return text

    def ids(self, probe):
        tokenizer = self.tokenizer
        end = [tokenizer.eos_token_id]
        if probe.messages:
            text = self.text(probe.messages)
            text = text.rstrip("\n") if "no line break" in self.faults else text
            ids = tokenizer(text, add_special_tokens="joined" in self.faults)["input_ids"]
            if "joined" in self.faults and ids[-1:] != end:
                ids += end
        else:
            text = (probe.prompt + probe.response).removesuffix("<|end|>")
            ids = tokenizer(text)["input_ids"] + end
        if "BOS twice" in self.faults:
            ids = [tokenizer.bos_token_id, *ids]
        if "BOS missing" in self.faults:
            ids = ids[1:]
        if "EOS missing" in self.faults:
            ids = ids[:len(ids) - 1 - ids[::-1].index(tokenizer.eos_token_id)]
        if "EOS added" in self.faults:
            ids = ids + end
        if "line break" in self.faults:
            ids = ids + tokenizer("\n", add_special_tokens=False)["input_ids"]
        if "truncated right" in self.faults:
            ids = ids[:151]
        if "truncated left" in self.faults:
            ids = ids[-180:]
        return ids

    def rewards(self, rows):
        "The rewards of rows of ids, padded to the longest."
        longest = max(map(len, rows))
        rewards = []
        for ids in rows:
            padding = [self.tokenizer.pad_token_id] * (longest - len(ids))
            if "left padding" in self.faults:
                ids = padding + ids
            if "right padding" in self.faults:
                ids = ids + padding
            rewards.append(self.reward(ids))
        if "sigmoid" in self.faults:
            rewards = torch.tensor(rewards).sigmoid().tolist()
        if "negated" in self.faults:
            rewards = [-reward for reward in rewards]
        if "normalized" in self.faults:
            rewards = [(reward - 0.3) / 1.7 for reward in rewards]
        return rewards

    def answer(self, probes):
        rows = [self.ids(probe) for probe in probes]
        alone = [self.rewards([row])[0] for row in rows]
        return OtherRewards("other", "other", alone, [""] * len(rows), self.rewards(rows), alone[0])


# stage → fault → name of its cause
FAULTS = {
    "messages": {"system dropped": "no system message", "last turn": "last two messages alone"},
    "template": {
        "ChatML": "template of the form ChatML",
        "joined": r"joined by '\n'",
        "generation prompt": "generation prompt",
        "no default system": "no default system message",
    },
    "begin": {"BOS twice": "BOS twice", "BOS missing": "BOS missing"},
    "end": {
        "no line break": "line break after EOS missing",
        "EOS missing": "EOS missing",
        "EOS added": "EOS added",
        "line break": "line break after EOS",
    },
    "length": {
        "truncated right": "truncated to 151 on the right",
        "truncated left": "truncated to 180 on the left",
    },
    "value": {"sigmoid": "sigmoid", "negated": "negated", "normalized": "scale"},
    "precision": {"bfloat16": "bfloat16"},
    "padding": {"left padding": "padding: left as text", "right padding": "padding: right as text"},
}
CAUSES = {}
for faults in FAULTS.values():
    CAUSES.update(faults)
NOT_TOGETHER = { # the one leaves nothing for the other
    ("system dropped", "joined"),
    ("ChatML", "BOS twice"),
    ("ChatML", "BOS missing"),
    ("ChatML", "no line break"),
    ("ChatML", "EOS missing"),
    ("joined", "no line break"),
    ("joined", "EOS missing"),
    ("generation prompt", "no line break"),
    ("generation prompt", "EOS missing"),
}
PLAIN_FAULTS = ("BOS twice", "BOS missing", "EOS missing", "EOS added", "line break", "truncated right", "sigmoid")


def diagnose(verifier, *faults):
    "The report on a program with these faults, and the sets of causes that explain its rewards equally."
    report = verifier.compare(OtherProgram(verifier.scorer, *faults).answer(verifier.probes))
    return report, [frozenset(diagnosis.causes) for diagnosis in report.diagnoses]


def test_equal_rewards_are_equal(chat, plain):
    for verifier in (chat, plain):
        report, result = diagnose(verifier)
        assert report.equal and not result
        assert "Equal: " in report.as_text()


def test_each_fault_is_named(chat, plain):
    for fault, cause in CAUSES.items():
        report, result = diagnose(chat, fault)
        assert not report.equal
        assert result[0] == {cause}, fault
        assert report.diagnoses[0].sentences[0] in report.as_text()
    for fault in PLAIN_FAULTS:
        _, result = diagnose(plain, fault)
        assert {CAUSES[fault]} in result, fault


def pairs_of_faults():
    "For each two stages a pair or two, such that each fault occurs."
    for number, (one, other) in enumerate(itertools.combinations(FAULTS.values(), 2)):
        for index in range(number, number + 2):
            pair = list(one)[index % len(one)], list(other)[index % len(other)]
            if pair not in NOT_TOGETHER:
                yield pair


def test_two_faults_are_named(chat):
    pairs = list(dict.fromkeys(pairs_of_faults()))
    assert {*itertools.chain.from_iterable(pairs)} == CAUSES.keys()
    for pair in pairs:
        expected = {CAUSES[fault] for fault in pair}
        _, result = diagnose(chat, *pair)
        if pair == ("normalized", "bfloat16"): # the fitted scale takes up some of the rounding
            assert {"scale", "float16"} in result or expected in result
        elif "bfloat16" in pair and pair[0].startswith("truncated"): # the limit is not certain
            assert {pair[0].replace("truncated", "truncated on the"), "bfloat16"} in result
        else:
            assert expected in result, pair


class FakeServer:
    "A server of some kind in place of a network: path and body → status and text."

    def __init__(self, kind, scorer, *faults, owner=None):
        self.kind = kind
        self.owner = owner
        self.program = OtherProgram(scorer, *faults)
        self.faults = faults
        self.requests = []

    def rewards(self, items):
        rows = []
        for item in items:
            if isinstance(item, list):
                item = self.program.text(item)
                ids = self.program.tokenizer(item, add_special_tokens=False)["input_ids"]
            else: # as a server tokenizes text
                ids = self.program.tokenizer(item)["input_ids"]
                if "text as it is" in self.faults:
                    ids = ids[1:]
            rows.append(ids)
        return self.program.rewards(rows)

    def __call__(self, path, body=None):
        self.requests.append((path, body))
        if body is None:
            status, answer = self.information(path)
        else:
            status, answer = self.answer(path, body)
        return status, json.dumps(answer)

    def information(self, path):
        if path == "/v1/models" and self.kind in ("vllm", "sglang"):
            return 200, {"data": [{"id": "tiny", "owned_by": self.owner or self.kind}]}
        if path == "/info" and self.kind == "tei":
            return 200, {"model_id": "tiny", "max_client_batch_size": 32}
        if path == "/get_model_info" and self.kind == "sglang":
            return 200, {"model_path": "tiny"}
        return 404, {"detail": "Not Found"}

    def answer(self, path, body):
        if (self.kind, path) in (("vllm", "/classify"), ("vllm", "/pooling")):
            assert body["model"] == "tiny"
            items = [body["messages"]] if "messages" in body else body["input"]
            name = "probs" if path == "/classify" else "data"
            data = [{"index": index, name: [reward]} for index, reward in enumerate(self.rewards(items))]
            return 200, {"data": data[::-1]}
        if (self.kind, path) == ("sglang", "/classify"):
            return 200, [{"embedding": [reward]} for reward in self.rewards(body["text"])]
        if (self.kind, path) == ("tei", "/predict"):
            rewards = self.rewards([text for text, in body["inputs"]])
            return 200, [[{"score": reward}] for reward in rewards]
        if (self.kind, path) == ("openrlhf", "/get_reward"):
            return 200, {"rewards": self.rewards(body["query"])}
        return 404, {"detail": "Not Found"}


def ask(verifier, server, url="http://host", how=None, **options):
    answer = RewardServer(url, send=server, **options).ask(verifier.probes, verifier.scorer.tokenizer, how)
    return answer, verifier.compare(answer)


def test_servers_of_each_kind(chat):
    for kind in ("vllm", "sglang", "tei", "openrlhf"):
        for how in ("messages", "text") if kind == "vllm" else ("text",):
            clean = FakeServer(kind, chat.scorer, "text as it is")
            answer, report = ask(chat, clean, how=how)
            assert (answer.kind, report.equal, report.diagnoses) == (kind, True, [])
            assert (answer.together is None) == (how == "messages")
            _, report = ask(chat, FakeServer(kind, chat.scorer, "sigmoid", "text as it is"), how=how)
            assert report.diagnoses[0].causes == ["sigmoid"]
    assert "use_activation" in verify_values.remedy_for(verify_values.value_causes()[0], "vllm")
    assert report.diagnoses[0].remedies[0] == verify_values.value_causes()[0].remedy


def test_rendered_text_gets_special_tokens_twice_where_messages_do_not(chat):
    "vLLM adds BOS to `input`, and not to messages."
    server = FakeServer("vllm", chat.scorer)
    _, report = ask(chat, server, how="messages")
    assert report.equal
    _, report = ask(chat, server, how="text")
    assert report.diagnoses[0].causes == ["BOS twice"]
    assert "add_special_tokens" in report.diagnoses[0].remedies[0]
    _, report = ask(chat, FakeServer("openrlhf", chat.scorer, "left padding", "text as it is"))
    assert report.diagnoses[0].causes == ["padding: left as text"]


def test_the_path_of_the_address_chooses_the_request(chat):
    for url, path in (("host:8000", "/classify"), ("http://host/rm/pooling/", "/pooling")):
        server = FakeServer("vllm", chat.scorer)
        answer, report = ask(chat, server, url)
        assert report.equal and answer.name.endswith(path)
        assert {path for path, body in server.requests if body} == {path}
    answer, _ = ask(chat, FakeServer("sglang", chat.scorer, owner="somebody"), "http://host/classify")
    assert answer.kind == "sglang"


def test_a_server_that_gives_nothing_to_compare(chat):
    def refused(send, url="http://host", how=None, **options):
        with pytest.raises(CannotVerify) as error:
            ask(chat, send, url, how, **options)
        return str(error.value)

    def answering(text, status=200):
        def send(path, body=None):
            return (status, text) if body else (200, '{"data": [{"id": "m", "owned_by": "vllm"}]}')
        return send

    assert "--token" in refused(lambda path, body=None: (401, "no"))
    assert "none of the servers" in refused(lambda path, body=None: (404, "no"))
    assert "2 numbers for a text" in refused(answering('{"data": [{"probs": [0.1, 0.9]}]}'))
    assert "0 rewards for 1 texts" in refused(answering('{"data": []}'))
    assert "form of vllm" in refused(answering("<html>"))
    assert "expected a number" in refused(answering('{"data": [{"probs": ["high"]}]}'))
    assert "status 500" in refused(answering("out of memory", 500))
    assert "takes text only" in refused(FakeServer("tei", chat.scorer), how="messages")
    assert "which tei does not have" in refused(FakeServer("tei", chat.scorer), "http://host/pooling", kind="tei")
    assert "expected one such as" in refused(None, "ftp://host")
    with pytest.raises(CannotVerify, match="does not answer"):
        RewardServer("http://127.0.0.1:9", timeout=1)


def test_probes_that_are_refused_are_reported(chat):
    server = FakeServer("openrlhf", chat.scorer, "text as it is")

    longest = chat.probes[-1].text(chat.scorer.tokenizer)

    def short(path, body=None):
        if body and longest in body["query"]:
            return 413, '{"detail": "too long"}'
        return server(path, body)

    answer, report = ask(chat, short)
    assert answer.rewards[-1] is None and len(answer.together) == len(answer.rewards) - 1
    assert report.equal and "1 of the probes" in report.notes[0]
    assert "none: status 413: {\"detail\": \"too long\"}" in report.as_text()


def test_rewards_that_are_not_finite(chat):
    "nan, inf and null (as servers write nan) are a difference, and the other rewards still tell why they differ."
    last = len(chat.probes) - 1
    for faults in ((), ("sigmoid",), ("BOS twice",)):
        for value in (math.nan, math.inf):
            for indices in ((0,), (last,), (0, last)):
                other = OtherProgram(chat.scorer, *faults).answer(chat.probes)
                for index in indices:
                    other.rewards[index] = other.together[index] = value
                other.again = other.rewards[0]
                report = chat.compare(other)
                assert not report.equal
                assert report.diagnoses[0].causes == [*map(CAUSES.get, faults), "not finite"]
                assert f"none: the reward is {value}" in report.as_text()
                json.dumps(report.as_dict(), allow_nan=False)
    other = OtherProgram(chat.scorer).answer(chat.probes)
    other.together[1] = math.nan # padding without a mask, in float16
    report = chat.compare(other)
    assert report.diagnoses[0].causes == ["padding: other"] and "nan" in report.as_text()
    json.dumps(report.as_dict(), allow_nan=False)
    nothing = OtherRewards("other", "other", [math.nan] * (last + 1), [""] * (last + 1))
    assert chat.compare(nothing).diagnoses[0].causes == ["not finite"]

    clean = FakeServer("vllm", chat.scorer, "text as it is")
    longest = chat.probes[-1].messages

    def overflowing(path, body=None):
        status, text = clean(path, body)
        return status, text if body is None or body["messages"] != longest else '{"data": [{"probs": [null]}]}'

    _, report = ask(chat, overflowing)
    assert report.diagnoses[0].causes == ["not finite"] and "none: the reward is nan" in report.as_text()


@contextlib.contextmanager
def over_http(answer):
    """
    Serve at the URL that is given. `answer(path, body, headers)` returns a status, a text, and headers if there are
    any; the body of a GET is None.
    """
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(*answer(self.path, None, self.headers))

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(*answer(self.path, json.loads(body), self.headers))

        def reply(self, status, text, headers=None):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_is_busy_or_breaks_off(plain, monkeypatch):
    "429 and 503 are asked again, as Retry-After says; an answer that ends early is no answer."
    waited = []
    monkeypatch.setattr(verify_servers.time, "sleep", waited.append)
    fake = FakeServer("openrlhf", plain.scorer)
    retry_after = {429: "3", 503: "Wed, 21 Oct 2026 07:28:00 GMT"} # the latter is no number
    statuses = [] # of the next answers, 200 after them

    def busy(path, body=None, headers=None):
        if body is None:
            return 404, "no"
        status = statuses.pop(0) if statuses else 200
        if status in retry_after:
            return status, "no room", {"Retry-After": retry_after[status]}
        _, text = fake(path, body)
        return status, text, {"Content-Length": str(len(text) + (9 if status == 206 else 0))}

    with over_http(busy) as base:
        url = f"{base}/get_reward"

        def asked(*planned):
            statuses[:] = planned
            return RewardServer(url).ask(plain.probes, plain.scorer.tokenizer)

        assert None not in asked(429, 503, 429).rewards and waited == [3, 1, 3]
        with pytest.raises(CannotVerify, match=r"answers 5 requests to /get_reward with status 429 \(no room\); exp"):
            asked(*[429] * 5)
        with pytest.raises(CannotVerify, match="does not answer .*IncompleteRead"):
            asked(206)


def test_a_server_that_answers_at_random(chat):
    rewards = itertools.count()

    def dropout(path, body=None):
        return 200, json.dumps({"rewards": [next(rewards) for _ in body["query"]]}) if body else ""

    _, report = ask(chat, dropout, kind="openrlhf")
    assert report.diagnoses[0].causes[0] == "random"
    assert "model.eval()" in report.as_text()


def test_over_http(plain):
    "A real connection, with a token."
    fake = FakeServer("tei", plain.scorer, "EOS missing")
    tokens = set()

    def with_token(path, body=None, headers=None):
        if body is not None:
            tokens.add(headers["Authorization"])
        return fake(path, body)

    with over_http(with_token) as url:
        answer = RewardServer(url, token="secret").ask(plain.probes, plain.scorer.tokenizer)
    assert tokens == {"Bearer secret"}
    report = plain.compare(answer)
    assert report.diagnoses[0].causes == ["tokenized as text"]
    assert "<|end|>" in report.diagnoses[0].remedies[0]


def test_own_server(chat, plain):
    "Every request of another client that it answers gives the same rewards."
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    from fastapi.testclient import TestClient

    from rlhf_reward.serving import make_app

    paths = ("", "/score", "/classify", "/pooling", "/predict", "/get_reward")
    for verifier in (chat, plain):
        with TestClient(make_app(verifier.scorer, name="tiny")) as client:
            def send(path, body=None):
                answer = client.get(path) if body is None else client.post(path, json=body)
                return answer.status_code, answer.text

            for path in paths if verifier is chat else paths[:1]:
                answer, report = ask(verifier, send, f"http://host{path}")
                assert report.equal, (path, report.as_text())
                assert answer.problems == [""] * len(verifier.probes)
            for kind in ("vllm", "sglang", "openrlhf"):
                answer, report = ask(verifier, send, kind=kind)
                assert report.equal and answer.kind == kind
            answer, report = ask(verifier, send, "http://host/score", kind="vllm")
            assert report.equal and answer.rewards.count(None) == (2 if verifier is chat else 0)


def copied(folder, new, change):
    "A copy of the checkpoint whose model and tokenizer were changed."
    model = RewardModel.from_pretrained(folder, 0.0, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(model, tokenizer)
    model.save_pretrained(new, tokenizer)
    return str(new)


def test_another_checkpoint(chat, folder, tmp_path):
    def other_head(model, tokenizer):
        model.score.weight.data += 0.1

    def other_template(model, tokenizer):
        tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>{% endfor %}"

    def half(model, tokenizer):
        model.bfloat16()

    causes = {
        other_head: "other checkpoint",
        other_template: "chat template that of the other tokenizer",
        half: "bfloat16",
    }
    for change, cause in causes.items():
        other = ask_folder(copied(folder, tmp_path / change.__name__, change), chat.probes, device="cpu")
        report = chat.compare(other)
        assert report.diagnoses[0].causes == [cause]
    assert chat.compare(ask_folder(folder, chat.probes, device="cpu")).equal


def test_transformers_and_rewardbench(chat, plain, folder):
    for ask_tool in (ask_transformers, ask_rewardbench):
        assert chat.compare(ask_tool(folder, chat.probes, "cpu")).equal
    report = plain.compare(ask_transformers(folder, plain.probes, "cpu"))
    assert report.diagnoses[0].causes == ["tokenized as text"]


def test_the_very_long_probe_is_scored_alone_only(chat, folder):
    "The others are not padded to it, and the padding of the others is still found."
    room_for_both = types.SimpleNamespace(tokenizer=chat.scorer.tokenizer, max_length=4000, tokenize_each=list)
    assert [probe.is_batched for probe in make_probes(room_for_both)][-3:] == [True, True, False]
    probes = [*chat.probes[:-1], dataclasses.replace(chat.probes[-1], is_batched=False)]
    equal = ask_transformers(folder, probes, "cpu")
    assert [reward is None for reward in equal.together] == [not probe.is_batched for probe in probes]
    assert chat.compare(equal).equal
    program = OtherProgram(chat.scorer, "left padding")
    padded = ask_function("other", program.rewards, [program.ids(probe) for probe in probes], probes=probes)
    assert chat.compare(padded).diagnoses[0].causes == ["padding: left as text"]


def test_padding_that_is_the_end_token(chat, folder, tmp_path):
    "transformers reads before EOS if that is the padding token."
    def ends_in_eos(model, tokenizer):
        tokenizer.chat_template = TEMPLATE.replace("<|end|>\n", "<|end|>")

    changed = copied(folder, tmp_path / "changed", ends_in_eos)
    config = json.loads((tmp_path / "changed" / "config.json").read_text())
    config["pad_token_id"] = chat.scorer.tokenizer.eos_token_id
    (tmp_path / "changed" / "config.json").write_text(json.dumps(config))
    verifier = Verifier(Scorer.from_pretrained(changed, device="cpu"))
    report = verifier.compare(ask_transformers(changed, verifier.probes, "cpu"))
    assert report.diagnoses[0].causes[0] == "padding is EOS"


def test_cross_encoder(plain, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(CannotVerify, match="pip install sentence-transformers"):
        ask_crossencoder(folder, plain.probes, "cpu")

    class CrossEncoder:
        "The part of sentence-transformers that is used, with its sigmoid."

        def __init__(self, name, device, model_kwargs):
            self.scorer = Scorer.from_pretrained(name, device=device)

        def predict(self, text, show_progress_bar):
            assert isinstance(text, str) # a list of two would be a pair
            return torch.tensor(self.scorer.score([None], [text])[0]).sigmoid().numpy()

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(CrossEncoder=CrossEncoder))
    report = plain.compare(ask_crossencoder(folder, plain.probes, "cpu"))
    assert report.diagnoses[0].causes == ["sigmoid"]
    assert "activation_fn" in report.diagnoses[0].remedies[0]


def test_an_encoder(tmp_path):
    "A sigmoid, and one segment in place of two; the tokens of an encoder have types."
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZE, pad_token_id=PAD, num_labels=1, initializer_range=0.3)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer = word_tokenizer(cls_token="<bos>", sep_token="<eos>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B:1 <eos>:1", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    tokenizer.save_pretrained(tmp_path)
    verifier = Verifier(Scorer.from_pretrained(tmp_path, device="cpu"))
    rewards = verifier.here.rewards(verifier.ids)
    problems = [""] * len(rewards)
    assert verifier.compare(OtherRewards("other", "tei", rewards, problems)).equal
    sigmoid = torch.tensor(rewards).sigmoid().tolist()
    report = verifier.compare(OtherRewards("other", "tei", sigmoid, problems))
    assert report.diagnoses[0].causes == ["sigmoid"]
    joined = verifier.scorer.score([None] * len(rewards), [probe.prompt + probe.response for probe in verifier.probes])
    report = verifier.compare(OtherRewards("other", "tei", joined, problems))
    assert report.diagnoses[0].causes == ["one segment"]
    assert verifier.compare(ask_transformers(str(tmp_path), verifier.probes, "cpu", text_pairs=True)).equal
    report = verifier.compare(ask_transformers(str(tmp_path), verifier.probes, "cpu"))
    assert report.diagnoses[0].causes == ["one segment"]


def test_known_scale_of_the_checkpoint(chat):
    "A normalization whose scale the checkpoint has is named as that one."
    verifier = copy.copy(chat)
    verifier.scorer = copy.copy(chat.scorer)
    verifier.scorer.model = types.SimpleNamespace(
        config=types.SimpleNamespace(rlhf_reward={"reward_mean": 0.3, "reward_std": 1.7})
    )
    rewards = chat.here.rewards(chat.ids)
    there = [(reward - 0.3) / 1.7 for reward in rewards]
    report = verifier.compare(OtherRewards("other", "other", there, [""] * len(there)))
    assert report.diagnoses[0].causes == ["normalized"]


def test_command(folder, tmp_path, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["verify", "--model", folder, "--device", "cpu", *arguments])
        return end.value.code

    assert run("--with", "transformers") == 0
    printed = capsys.readouterr()
    assert "Equal: " in printed.out
    assert "tokens with transformers; on a CPU, a large model takes minutes." in printed.err
    assert f"Next: rlhf_reward evaluate --model {folder} --data HELD_OUT.jsonl --output report\n" in printed.err
    report = tmp_path / "report.json"
    template = tmp_path / "template.jinja"
    template.write_text(CHATML)
    assert run("--folder", folder, "--chat_template", str(template), "--output", str(report)) == 1
    assert "another chat template, that of the checkpoint" in capsys.readouterr().out
    saved = json.loads(report.read_text())
    assert not saved["equal"] and saved["diagnoses"][0]["remedies"]
    assert {"name", "tokens", "here", "there", "difference"} <= saved["probes"][0].keys()
    assert run("--url", "http://127.0.0.1:9") == 2
    assert "does not answer" in capsys.readouterr().err
    assert run("--with", "transformers", "--kind", "vllm") == 2
    assert run("--with", "transformers", "--tolerance", "0") == 2
    assert run("--url", "a", "--folder", "b") == 2
