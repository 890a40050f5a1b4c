"The scorer against the model on one text at a time, whatever the batches, kinds of models and forms of texts."
import logging
import math
import pickle
import random

import pytest
import torch
import transformers as T
from architectures import DECODERS, NOT_PACKABLE, SIZE, save_language_model, word_tokenizer
from chat_tokenizers import chat_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer
from rlhf_reward.data import to_comparison, to_responses
from rlhf_reward.evaluation import evaluate
from rlhf_reward.scoring import RewardFunction, Scorer
from rlhf_reward.tokens import encode

WORDS = [f"w{place}" for place in range(3, 64)]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


def text(length, seed):
    return " " + " ".join(random.Random(seed).choices(WORDS, k=length))


def texts(prompts=6, each=3, longest=12):
    "Prompts with several responses, in an order in which those of one prompt lie apart."
    rows = [(text(3 + 4 * prompt, prompt), text(1 + (7 * prompt + 3 * response) % longest, 100 + 10 * prompt + response))
            for prompt in range(prompts) for response in range(each)]
    random.Random(0).shuffle(rows)
    return [prompt for prompt, _ in rows], [response for _, response in rows]


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("models"), {}

    def make(family="llama"):
        if family not in made:
            model = RewardModel(save_language_model(family, folder / f"{family}-base"), 0.0, "cpu")
            tokenizer = word_tokenizer()
            tokenizer.chat_template = TEMPLATE
            model.save_pretrained(folder / family, tokenizer)
            made[family] = str(folder / family)
        return made[family]

    return make


def alone(scorer, prompts, responses):
    "The reward of each text by itself, through the model."
    with torch.no_grad():
        return [scorer.model(torch.tensor([ids])).item() for ids in
                encode([prompt + response for prompt, response in zip(prompts, responses)], scorer.tokenizer, scorer.model.ends_with_eos)]


def close(one, other, tolerance=1e-5):
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", [*DECODERS, "bert", "modernbert"])
def test_rewards_are_those_of_the_texts_alone(family, reward_models):
    # AutoTokenizer reads the folder of a qwen2 as byte-level BPE, whatever lies there
    scorer = Scorer(RewardModel.from_pretrained(reward_models(family), device="cpu"), word_tokenizer(), tokens_per_batch=60)
    assert scorer.packs == (family not in NOT_PACKABLE | {"bert", "modernbert"})
    prompts, responses = texts()
    rewards = scorer.score(prompts, responses)
    close(rewards, alone(scorer, prompts, responses), 2e-5)
    assert max(rewards) - min(rewards) > 1e-3
    batches = scorer._batches([[tuple(sequence) for sequence in own] for own in scorer.tokenize([to_responses({"prompt": p, "response": r})
                                                                                                for p, r in zip(prompts, responses)])])
    assert len(batches) > 2


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_order_batches_and_repetition_change_nothing(reward_models, data):
    scorer = Scorer.from_pretrained(reward_models(), device="cpu")
    prompts, responses = texts(4, 4)
    expected = dict(zip(zip(prompts, responses), alone(scorer, prompts, responses)))
    chosen = data.draw(st.lists(st.sampled_from(list(zip(prompts, responses))), min_size=1, max_size=30))
    scorer.tokens_per_batch = data.draw(st.integers(1, 200))
    rewards = scorer.score([prompt for prompt, _ in chosen], [response for _, response in chosen])
    close(rewards, [expected[pair] for pair in chosen])
    assert all(rewards[place] == rewards[chosen.index(pair)] for place, pair in enumerate(chosen)) # equal texts, equal rewards to the last bit


def test_batches_keep_to_the_budget_and_share_prompts(reward_models):
    scorer = Scorer.from_pretrained(reward_models(), device="cpu")
    prompts, responses = texts(5, 6)
    sequences = [own[0] for own in scorer.tokenize([to_responses({"prompt": p, "response": r}) for p, r in zip(prompts, responses)])]
    groups = {}
    for prompt, sequence in zip(prompts, sequences):
        groups.setdefault(prompt, []).append(tuple(sequence))
    for scorer.tokens_per_batch, several in ((100, True), (15, False)):
        batches = scorer._batches(groups.values())
        sizes = [[len(prefix) + sum(len(sequence) - len(prefix) for sequence in group) for prefix, group in batch] for batch in batches]
        assert all(sum(own) <= scorer.tokens_per_batch or len(own) == 1 and own[0] <= 4 * scorer.tokens_per_batch for own in sizes)
        assert any(len(own) > 1 for own in sizes) == several and len(sizes) > 1
        assert sorted(sequence for batch in batches for _, group in batch for sequence in group) == sorted(map(tuple, sequences))
    prompt_tokens = {prompt: len(encode([prompt], scorer.tokenizer, False)[0]) for prompt in groups}
    scorer.tokens_per_batch = 10_000
    (batch,) = scorer._batches(groups.values())
    computed = sum(len(prefix) + sum(len(sequence) - len(prefix) for sequence in group) for prefix, group in batch)
    assert computed <= sum(map(len, sequences)) - sum(5 * tokens for tokens in prompt_tokens.values()) # each prompt once, of 6 times
    scorer.packs, scorer.tokens_per_batch = False, 60
    for batch in scorer._batches(groups.values()):
        longest = max(len(sequence) for _, (sequence,) in batch)
        assert longest * len(batch) <= 60 or len(batch) == 1


def test_a_batch_that_does_not_fit_is_halved(reward_models, caplog, monkeypatch):
    scorer = Scorer.from_pretrained(reward_models(), device="cpu", tokens_per_batch=500)
    prompts, responses = texts()
    expected, forward, sizes = scorer.score(prompts, responses), RewardModel.forward, []

    def with_little_memory(self, input_ids, **inputs):
        sizes.append(input_ids.numel())
        if input_ids.numel() > 60:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")
        return forward(self, input_ids, **inputs)

    monkeypatch.setattr(RewardModel, "forward", with_little_memory)
    with caplog.at_level(logging.WARNING):
        close(scorer.score(prompts, responses), expected)
    assert "did not fit into the memory" in caplog.text and 20 < scorer.tokens_per_batch < 100 and max(sizes) > 60
    with pytest.raises(RuntimeError, match="A sequence of 9. tokens does not fit into the memory, alone"):
        Scorer(scorer.model, scorer.tokenizer, max_length=None).rewards([[list(range(3, 63)) + list(range(3, 40))]], ["p"])
    monkeypatch.setattr(RewardModel, "forward", lambda self, **inputs: (_ for _ in ()).throw(RuntimeError("another error")))
    with pytest.raises(RuntimeError, match="another error"):
        scorer.score(prompts, responses)


def test_strings_are_taken_as_they_are(reward_models):
    "Also one that looks like messages in JSON, as a file may have them."
    scorer = Scorer.from_pretrained(reward_models(), device="cpu")
    close(scorer.score(["w3"], ['[{"content": w4']), alone(scorer, ["w3"], ['[{"content": w4']))
    close(RewardFunction(scorer)(["w3"], ['[{"role": "user", "content": "w4"}]']), alone(scorer, ["w3"], ['[{"role": "user", "content": "w4"}]']))


def test_any_sequence_will_do(reward_models):
    scorer, rows = Scorer.from_pretrained(reward_models(), device="cpu"), Dataset.from_dict({"prompt": ["w3", "w5"], "response": [" w4", " w6"]})
    close(scorer.score(rows["prompt"], rows["response"]), alone(scorer, ["w3", "w5"], [" w4", " w6"]))


def test_a_folder_in_the_home(reward_models, monkeypatch):
    from pathlib import Path
    folder = Path(reward_models())
    monkeypatch.setenv("HOME", str(folder.parent))
    close(Scorer.from_pretrained(f"~/{folder.name}", device="cpu").score(["w3"], ["w4"]), Scorer.from_pretrained(folder, device="cpu").score(["w3"], ["w4"]))


def test_rewards_that_are_not_finite_are_refused(reward_models):
    scorer = Scorer.from_pretrained(reward_models(), device="cpu")
    with torch.no_grad():
        scorer.model.score.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="of comparison 1, is nan.*; expected a finite number"):
        scorer.score([" w3"], [" w4"])


def test_a_model_in_training_is_scored_without_dropout_and_trains_on(reward_models):
    model = RewardModel.from_pretrained(reward_models(), 0.5, "cpu")
    scorer = Scorer(model, word_tokenizer())
    prompts, responses = texts()
    expected = scorer.score(prompts, responses)
    model.train()
    assert scorer.score(prompts, responses) == expected and model.training


# ----- strings and messages

@pytest.mark.parametrize("family", ["llama 3", "qwen", "gemma", "zephyr", "phi 3"])
def test_messages_are_rendered_as_in_training(family, tmp_path):
    tokenizer = chat_tokenizer(family)
    model = RewardModel(T.LlamaForCausalLM(T.LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                                         num_attention_heads=2)).save_pretrained(tmp_path) or str(tmp_path), 0.0, "cpu")
    scorer = Scorer(model, tokenizer)
    prompt, response = [{"role": "user", "content": "the abba"}], "he ab"
    whole = tokenizer.apply_chat_template(prompt + [{"role": "assistant", "content": response}], tokenize=False)
    expected = model(torch.tensor(encode([whole], tokenizer))).item()
    forms = [(prompt, response), (prompt, [{"role": "assistant", "content": response}]), ("the abba", [{"role": "assistant", "content": response}]),
             (None, prompt + [{"role": "assistant", "content": response}]), (prompt, prompt + [{"role": "assistant", "content": response}])]
    for given_prompt, given_response in forms:
        close(scorer.score([given_prompt], [given_response]), [expected])
    close(scorer.score([None, ""], [whole, whole]), [expected, expected])


def test_training_evaluation_and_scoring_give_the_same_reward(reward_models, tmp_path):
    tokenizer, draw = word_tokenizer(), random.Random(1)
    tokenizer.chat_template = TEMPLATE
    rows = [{"prompt": text(5, 3 * row), "responses": [text(draw.randint(1, 9), 900 + 9 * row + k) for k in range(3)], "scores": [3, 1, 2]} for row in range(12)]
    data = Dataset.from_list(rows)
    config = RewardConfig(str(tmp_path), per_device_eval_batch_size=5, report_to="none", use_cpu=True, disable_tqdm=True, num_train_epochs=1,
                          learning_rate=1e-2, per_device_train_batch_size=4, logging_steps=1, save_strategy="no", max_length=60)
    trainer = RewardTrainer(RewardModel.from_pretrained(reward_models(), 0.0, "cpu"), config, data, data, tokenizer)
    seen = []
    losses = trainer._losses
    trainer._losses = lambda model, inputs: seen.append((inputs["rows"].tolist(), found := losses(model, inputs))) or found
    trainer.train()
    last_rows, (in_training, _, _) = seen[0][0], seen[0][1]
    first = RewardTrainer(RewardModel.from_pretrained(reward_models(), 0.0, "cpu"), config, data, data, tokenizer).model # as before the first step
    scored = Scorer(first.eval(), tokenizer).score_comparisons([to_comparison(rows[row - 1]) for row in last_rows])
    close(in_training[:, :3].tolist(), scored)
    logged = [entry for entry in trainer.state.log_history if "chosen_reward" in entry][0]
    pairs = [(0, 1), (0, 2), (2, 1)]
    close(logged["chosen_reward"], sum(own[winner] for own in scored for winner, _ in pairs) / (3 * len(scored)), 1e-4)
    close(logged["rejected_reward"], sum(own[loser] for own in scored for _, loser in pairs) / (3 * len(scored)), 1e-4)

    predicted, metrics = trainer.predict(data).predictions, trainer.evaluate()
    trainer.set_reward_scale(metrics, "rows")
    trainer.save_model()
    scorer = Scorer.from_pretrained(tmp_path, device="cpu")
    by_rank = [[one.reward for one in sorted(scorer.rank(row["prompt"], row["responses"]), key=lambda one: one.index)] for row in rows]
    close(predicted.tolist(), by_rank)
    flat = scorer.score([row["prompt"] for row in rows for _ in range(3)], [response for row in rows for response in row["responses"]])
    close(flat, [reward for own in by_rank for reward in own])
    close(metrics["eval_reward_mean"], sum(flat) / 36)
    normalized = torch.tensor(scorer.score([row["prompt"] for row in rows for _ in range(3)], [response for row in rows for response in row["responses"]], True))
    close([normalized.mean().item(), normalized.std(correction=0).item()], [0.0, 1.0], 1e-4)
    classifier = T.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = torch.tensor(encode([rows[0]["prompt"] + rows[0]["responses"][0]], tokenizer))
    close(classifier(ids).logits.item(), flat[0])

    evaluated = evaluate(scorer, rows).responses["reward"].tolist()
    close(evaluated, flat)
    testclient = pytest.importorskip("fastapi.testclient", reason="the extra serve is not installed")
    from rlhf_reward.serving import make_app
    with testclient.TestClient(make_app(scorer)) as client:
        answer = client.post("/score", json={"prompts": [row["prompt"] for row in rows for _ in range(3)], "responses": [response for row in rows for response in row["responses"]]})
        close(answer.json()["rewards"], flat)


def test_rank_best_of_n_and_compare(reward_models):
    scorer = Scorer.from_pretrained(reward_models(), device="cpu")
    prompt, responses = text(5, 0), [text(4, seed) for seed in range(6)]
    rewards = scorer.score([prompt] * 6, responses)
    ranked = scorer.rank(prompt, responses)
    assert [one.index for one in ranked] == sorted(range(6), key=lambda place: -rewards[place])
    assert all(one.response == responses[one.index] for one in ranked)
    close([one.reward for one in ranked], sorted(rewards, reverse=True))
    total = sum(math.exp(reward) for reward in rewards)
    close([one.probability for one in ranked], [math.exp(rewards[one.index]) / total for one in ranked])
    assert [one.index for one in scorer.rank(prompt, [responses[0]] * 3)] == [0, 1, 2] # equal rewards keep their order
    for n in range(1, 7):
        assert scorer.best_of_n(prompt, responses, n=n).index == max(range(n), key=lambda place: rewards[place])
    assert scorer.best_of_n(prompt, responses).index == ranked[0].index
    preference = scorer.compare(prompt, responses[0], responses[1])
    close([preference.reward_a, preference.reward_b], rewards[:2])
    close(preference.probability, 1 / (1 + math.exp(rewards[1] - rewards[0])))
    for call in (lambda: scorer.rank(prompt, responses, normalize=True), lambda: scorer.score([prompt], responses[:1], True),
                 lambda: scorer.compare(prompt, "a", "b", normalize=True)):
        with pytest.raises(ValueError, match="does not know the mean and deviation"):
            call()


def test_what_is_too_long(reward_models, caplog):
    long = Scorer.from_pretrained(reward_models(), device="cpu")
    assert long.max_length == 64
    with pytest.raises(ValueError, match="it has 81 tokens; expected at most 64"):
        long.score([text(40, 0)], [text(40, 1)])
    cutting = Scorer.from_pretrained(reward_models(), device="cpu", max_length=20, on_overlong="truncate_prompt")
    prompts, responses = [text(30, 0), text(4, 1), text(30, 0)], [text(8, 2), text(5, 3), text(3, 4)]
    with caplog.at_level(logging.WARNING):
        rewards = cutting.score(prompts, responses)
    assert "Cut the prompt of 2 of 3 to 20 tokens" in caplog.text
    whole = encode([prompt + response for prompt, response in zip(prompts, responses)], cutting.tokenizer)
    kept = [ids[-20:] for ids in whole] # each alone
    with torch.no_grad():
        close(rewards, [cutting.model(torch.tensor([ids])).item() for ids in kept])
    ranked = cutting.rank(prompts[0], [responses[0], responses[2]]) # cut alike: by what the longest needs
    ids = encode([prompts[0] + responses[2]], cutting.tokenizer)[0]
    excess = len(encode([prompts[0] + responses[0]], cutting.tokenizer)[0]) - 20
    with torch.no_grad():
        close([one.reward for one in ranked if one.index == 1], [cutting.model(torch.tensor([ids[excess:]])).item()])
    with pytest.raises(ValueError, match="too few of them are the prompt's to be cut"):
        cutting.score([text(3, 0)], [text(30, 1)])
    with pytest.raises(ValueError, match="The text .* is a whole text that does not say where its prompt ends"):
        cutting.score([None], [text(30, 1)])
    human = "\n\nHuman: " + text(30, 1) + "\n\nAssistant:" # says it
    assert len(cutting.score([None], [human + " w4"])) == 1


# ----- encoders with their own head

def encoder_classifier(kind, folder, pairs=True):
    size = {**SIZE, "pad_token_id": 0, "num_labels": 1, "initializer_range": 0.4}
    config = {
        "bert": lambda: T.BertConfig(**size), "electra": lambda: T.ElectraConfig(**size, embedding_size=16), "roberta": lambda: T.RobertaConfig(**{**size, "pad_token_id": 1}),
        "deberta-v2": lambda: T.DebertaV2Config(**size, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False),
        "distilbert": lambda: T.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64, num_labels=1, initializer_range=0.4),
        "modernbert": lambda: T.ModernBertConfig(**{**size, "num_hidden_layers": 3}, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3, local_attention=4,
                                                 classifier_pooling="mean"),
    }[kind]()
    torch.manual_seed(0)
    T.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    special = ["<s>", "<pad>"] if kind == "roberta" else ["<pad>", "<unk>"]
    vocab = {word: place for place, word in enumerate([*special, "<cls>", "<sep>", *(f"w{i}" for i in range(4, 64))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w4"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=[("<cls>", 2), ("<sep>", 3)])
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", cls_token="<cls>", sep_token="<sep>",
                                          model_input_names=["input_ids", "token_type_ids", "attention_mask"] if kind in ("bert", "electra") else ["input_ids", "attention_mask"])
    tokenizer.save_pretrained(folder)
    return T.AutoModelForSequenceClassification.from_pretrained(folder), T.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["bert", "electra", "roberta", "deberta-v2", "distilbert", "modernbert"])
def test_encoders_keep_their_head(kind, tmp_path, caplog):
    classifier, tokenizer = encoder_classifier(kind, tmp_path)
    scorer = Scorer.from_pretrained(tmp_path, device="cpu", tokens_per_batch=100)
    prompts, responses = texts(4, 3, 8)
    with torch.no_grad():
        pairs = [classifier(**tokenizer(prompt, response, return_tensors="pt")).logits.item() for prompt, response in zip(prompts, responses)]
        whole = [classifier(**tokenizer(prompt + response, return_tensors="pt")).logits.item() for prompt, response in zip(prompts, responses)]
    close(scorer.score(prompts, responses), pairs)
    joined = Scorer.from_pretrained(tmp_path, device="cpu", text_pairs=False)
    close(joined.score(prompts, responses), whole)
    close(scorer.score([None] * len(prompts), [prompt + response for prompt, response in zip(prompts, responses)]), whole)
    assert max(pairs) - min(pairs) > 1e-3 and max(abs(one - other) for one, other in zip(pairs, whole)) > 1e-3
    ranked = scorer.rank(prompts[0], responses[:3])
    assert [one.reward for one in ranked] == sorted((one.reward for one in ranked), reverse=True)


def test_a_question_and_its_answer_as_messages_are_two_segments(tmp_path):
    "For an encoder without a template; a conversation has no two segments."
    encoder_classifier("bert", tmp_path)
    scorer, (prompts, responses) = Scorer.from_pretrained(tmp_path, device="cpu"), texts(4, 3, 8)
    user, assistant = (lambda text, role=role: [{"role": role, "content": text}] for role in ("user", "assistant"))
    assert scorer.score(list(map(user, prompts)), list(map(assistant, responses))) == scorer.score(prompts, responses)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        scorer.score([[*user("w5"), *assistant("w6"), *user("w7")]], [assistant("w8")])


def test_pairs_of_encoders_lose_their_oldest_prompt_tokens(tmp_path, caplog):
    classifier, tokenizer = encoder_classifier("bert", tmp_path)
    scorer = Scorer.from_pretrained(tmp_path, device="cpu", max_length=16, on_overlong="truncate_prompt")
    prompt, response = text(20, 0), text(5, 1)
    kept = " ".join(prompt.split()[-8:]) # 16 less 5 of the response and three special tokens
    with torch.no_grad():
        expected = classifier(**tokenizer(kept, response, return_tensors="pt")).logits.item()
    with caplog.at_level(logging.WARNING):
        close(scorer.score([prompt], [response]), [expected])
    assert "Cut the prompt of 1 of 1 to 16 tokens" in caplog.text
    with pytest.raises(ValueError, match="of which the prompt has 2"):
        scorer.score([text(2, 0)], [text(20, 1)])
    with pytest.raises(ValueError, match="it has 28 tokens; expected at most 16"):
        Scorer(scorer.model, scorer.tokenizer, max_length=16).score([prompt], [response])


def test_decoders_made_elsewhere_open_packed(tmp_path):
    torch.manual_seed(0)
    config = T.Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=8, num_labels=1, pad_token_id=0, initializer_range=0.3)
    classifier = T.AutoModelForSequenceClassification.from_config(config).eval()
    classifier.save_pretrained(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    scorer = Scorer.from_pretrained(tmp_path, device="cpu")
    prompts, responses = texts(3, 3)
    with torch.no_grad(): # without an end of ours: as the tokenizer writes it
        theirs = [classifier(**tokenizer(prompt + response, return_tensors="pt")).logits.item() for prompt, response in zip(prompts, responses)]
    close(scorer.score(prompts, responses), theirs)
    assert scorer.packs and isinstance(scorer.model, RewardModel) and not scorer.model.ends_with_eos


@pytest.mark.parametrize("make, expected", [
    (lambda folder: T.AutoModelForSequenceClassification.from_config(T.BertConfig(**SIZE, num_labels=3)), "has 3 labels"),
    (lambda folder: T.AutoModelForSequenceClassification.from_config(T.LlamaConfig(**SIZE, num_labels=2)), "has 2 labels"),
    (lambda folder: T.LlamaForCausalLM(T.LlamaConfig(**SIZE)), "The reward head of .* is not there"),
    (lambda folder: T.BertModel(T.BertConfig(**SIZE)), "The reward head of .* is not there"),
    (lambda folder: T.AutoModelForSequenceClassification.from_config(T.T5Config(vocab_size=64, d_model=8, d_ff=8, d_kv=8, num_layers=1, num_heads=1, num_labels=1)), "encoder-decoder"),
])
def test_other_models_are_refused(make, expected, tmp_path):
    make(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=expected):
        Scorer.from_pretrained(tmp_path, device="cpu")


def test_a_classifier_without_all_weights_is_refused(tmp_path):
    encoder_classifier("bert", tmp_path)
    from safetensors.torch import load_file, save_file
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if name != "classifier.weight"}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of BertForSequenceClassification, such as classifier.weight"):
        Scorer.from_pretrained(tmp_path, device="cpu")


def test_adapters_open_as_scorers(reward_models, tmp_path):
    pytest.importorskip("peft", reason="the extra peft is not installed")
    from rlhf_reward.adapters import add_adapter, lora_config
    model = RewardModel(reward_models(), 0.0, "cpu")
    add_adapter(model, lora_config(4, None, 0.0, "all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    model.save_pretrained(tmp_path, word_tokenizer())
    scorer = Scorer.from_pretrained(tmp_path, device="cpu")
    prompts, responses = texts(3, 3)
    close(scorer.score(prompts, responses), alone(Scorer(model.eval(), word_tokenizer()), prompts, responses))
    assert scorer.packs


# ----- what is given wrongly

@pytest.mark.parametrize("call, expected", [
    (lambda scorer: scorer.score("w3", ["w4"]), "prompts is str"),
    (lambda scorer: scorer.score([{"role": "user", "content": "w3"}], ["w4"]), "prompts is messages"),
    (lambda scorer: scorer.score(["w3"], "w4"), "responses is str"),
    (lambda scorer: scorer.score(["w3"], ["w4", "w5"]), "1 prompts and 2 responses"),
    (lambda scorer: scorer.score(["w3"], [7]), "Response 1 cannot be scored: 7 stands where a text"),
    (lambda scorer: scorer.score([["w3"]], ["w4"]), r"Response 1 cannot be scored: \['w3'\] stands where a text"),
    (lambda scorer: scorer.score([[{"content": "w3"}]], ["w4"]), "has no role"),
    (lambda scorer: scorer.rank("w3", []), "expected a list of at least 1"),
    (lambda scorer: scorer.rank("w3", "w4"), "responses is str"),
    (lambda scorer: scorer.best_of_n("w3", ["w4"], n=0), "n is 0"),
])
def test_wrong_calls(call, expected, reward_models):
    with pytest.raises(ValueError, match=expected):
        call(Scorer.from_pretrained(reward_models(), device="cpu"))


def test_nothing_to_score(reward_models):
    assert Scorer.from_pretrained(reward_models(), device="cpu").score([], []) == []


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="is not there"):
        Scorer.from_pretrained(tmp_path / "no", device="cpu")


# ----- for RL trainers

def test_reward_function(reward_models):
    scorer = Scorer.from_pretrained(reward_models(), device="cpu")
    prompts, responses = texts(3, 3)
    function = RewardFunction(reward_models(), device="cpu", tokens_per_batch=30, name="helpful")
    again = pickle.loads(pickle.dumps(function))
    close(function(prompts=prompts, completions=responses, completion_ids=None, answer=["x"] * 9), scorer.score(prompts, responses))
    assert not isinstance(function, torch.nn.Module) and function.__name__ == again.__name__ == "helpful"
    assert again._opened is None and len(pickle.dumps(function)) < 1000 # the name travels, not the weights
    close(again(prompts, responses), scorer.score(prompts, responses))
    close(pickle.loads(pickle.dumps(RewardFunction(scorer)))(prompts, responses), scorer.score(prompts, responses))
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    completions = [[{"role": "assistant", "content": response}] for response in responses]
    close(function(prompts=messages, completions=completions), scorer.score(messages, responses))
    with pytest.raises(ValueError):
        function(prompts=prompts, completions=responses[:2])
    with pytest.raises(ValueError, match="expected options with a name only"):
        RewardFunction(scorer, device="cpu")


def test_tools_and_template_arguments_reach_the_template(reward_models):
    scorer = Scorer.from_pretrained(reward_models(), device="cpu")
    scorer.tokenizer.chat_template = "{% if tools %}w9 w9 {% endif %}{% if think %}w8 {% endif %}" + TEMPLATE
    prompt, function = [{"role": "user", "content": "w5"}], RewardFunction(scorer)
    plain, with_tools, thinking = (function([prompt], [" w6"], **columns)[0] for columns in
                                   ({}, {"tools": [[{"name": "f"}]]}, {"chat_template_kwargs": [{"think": True}]}))
    assert len({round(value, 4) for value in (plain, with_tools, thinking)}) == 3


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("trainer_name", ["GRPO", "RLOO"])
def test_two_steps_of_trl(trainer_name, conversational, reward_models, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    seen = []

    class Recording(RewardFunction):
        def __call__(self, prompts, completions, **columns):
            rewards = super().__call__(prompts, completions, **columns)
            seen.append((prompts, completions, rewards, sorted(columns)))
            return rewards

    policy_folder = save_language_model("llama", tmp_path / "policy")
    tokenizer = word_tokenizer(padding_side="left")
    tokenizer.chat_template = TEMPLATE
    prompts = [[{"role": "user", "content": text(4, row)}] if conversational else text(4, row) for row in range(8)]
    config = getattr(trl, f"{trainer_name}Config")(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, num_generations=4, max_completion_length=6, report_to="none", use_cpu=True,
        bf16=False, logging_steps=1, save_strategy="no", disable_tqdm=True, temperature=1.5)
    trainer = getattr(trl, f"{trainer_name}Trainer")(
        model=T.AutoModelForCausalLM.from_pretrained(policy_folder), reward_funcs=[Recording(reward_models(), device="cpu", name="helpful")], args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts, "answer": list("abcdefgh")}), processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 2 and len(seen) == 2
    scorer = Scorer.from_pretrained(reward_models(), device="cpu")
    for given_prompts, completions, rewards, columns in seen:
        assert len(rewards) == 4 and "answer" in columns
        close(rewards, scorer.score(given_prompts, completions))
    logged = [entry["rewards/helpful/mean"] for entry in trainer.state.log_history if "rewards/helpful/mean" in entry]
    close(logged, [sum(rewards) / 4 for *_, rewards, _ in seen], 1e-4)


def test_a_completion_may_repeat_the_prompt(reward_models):
    "Several turns of which one says what the prompt said: what the assistant begins only follows the prompt."
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    scorer = Scorer(RewardModel.from_pretrained(reward_models(), 0.0, "cpu"), tokenizer)
    prompt = [{"role": "user", "content": "w5"}]
    turns = [{"role": "assistant", "content": "w6"}, *prompt, {"role": "assistant", "content": "w7"}]
    close(scorer.score([prompt], [turns]), scorer.score([None], [prompt + turns]))
    close(scorer.score([prompt], [prompt + turns]), scorer.score([None], [prompt + turns])) # a whole conversation
    greeted = [{"role": "assistant", "content": "w8"}, *prompt]
    close(scorer.score([greeted], [greeted + turns[:1]]), scorer.score([greeted], [turns[:1]])) # also one that the assistant began


def test_ranks_what_can_be_read_once(reward_models):
    scorer = Scorer.from_pretrained(reward_models(), device="cpu")
    assert [one.response for one in scorer.rank("w3", iter([" w4", " w5"]))] == [one.response for one in scorer.rank("w3", [" w4", " w5"])]


def test_tokens_that_the_model_has_not(reward_models):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    scorer = Scorer(RewardModel.from_pretrained(reward_models(), 0.0, "cpu"), tokenizer)
    with pytest.raises(ValueError, match="has the token id 64; the model has the ids 0 to 63. Expected the tokenizer of the model"):
        scorer.score(["w3"], [" w4 <tool>"])


def test_padding_that_ends_texts_is_told(tmp_path, caplog):
    "Of models made elsewhere: transformers reads one token before."
    config = T.LlamaConfig(**{**SIZE, "vocab_size": 64}, num_labels=1, pad_token_id=2, eos_token_id=2)
    T.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        Scorer.from_pretrained(tmp_path, device="cpu")
    assert "pads with the token that ends texts" in caplog.text
