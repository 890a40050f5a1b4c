"The scorer against the model on one text at a time, whatever the batches, kinds of models and forms of texts."
import copy
import logging
import math
import pickle
import random
from pathlib import Path

import pytest
import torch
import transformers as T
from architectures import DECODERS, SIZE, save_language_model, word_tokenizer
from chat_tokenizers import chat_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm.auto import tqdm

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer
from rlhf_reward.encoding import encode
from rlhf_reward.engine import Cancelled, NotFinite
from rlhf_reward.evaluation import Rule, evaluate
from rlhf_reward.rl import RewardFunction
from rlhf_reward.rows import to_comparison, to_responses
from rlhf_reward.scoring import Scorer

WORDS = [f"w{index}" for index in range(3, 64)]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


def text(length, seed):
    return " " + " ".join(random.Random(seed).choices(WORDS, k=length))


def texts(prompts=6, each=3, longest=12):
    "Prompts with several responses, in an order in which those to one prompt are apart."
    rows = []
    for prompt in range(prompts):
        for response in range(each):
            length = 1 + (7 * prompt + 3 * response) % longest
            rows.append((text(3 + 4 * prompt, prompt), text(length, 100 + 10 * prompt + response)))
    random.Random(0).shuffle(rows)
    return [prompt for prompt, _ in rows], [response for _, response in rows]


def joined(prompts, responses):
    return [prompt + response for prompt, response in zip(prompts, responses)]


def user(content):
    return [{"role": "user", "content": content}]


def assistant(content):
    return [{"role": "assistant", "content": content}]


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {}

    def make(family="llama"):
        if family not in made:
            model = RewardModel(save_language_model(family, folder / f"{family}-base"), 0.0, "cpu")
            tokenizer = word_tokenizer()
            tokenizer.chat_template = TEMPLATE
            model.save_pretrained(folder / family, tokenizer)
            made[family] = str(folder / family)
        return made[family]

    return make


@pytest.fixture(scope="module")
def opened(reward_models):
    return Scorer.from_pretrained(reward_models(), device="cpu")


@pytest.fixture
def scorer(opened):
    "One for each test, which may change it."
    return copy.deepcopy(opened)


def alone(scorer, prompts, responses):
    "The reward of each text by itself, through the model."
    sequences = encode(joined(prompts, responses), scorer.tokenizer, scorer.model.ends_with_eos)
    with torch.no_grad():
        return [scorer.model(torch.tensor([ids])).item() for ids in sequences]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=tolerance, atol=tolerance)


def sequences_by_prompt(scorer, prompts, responses):
    "The token sequences of all texts, and the groups that the engine plans with."
    comparisons = []
    for prompt, response in zip(prompts, responses):
        comparisons.append(to_responses({"prompt": prompt, "response": response}))
    sequences = [tuple(sequence) for sequence, in scorer.tokenize(comparisons)]
    groups = {}
    for prompt, sequence in zip(prompts, sequences):
        groups.setdefault(prompt, []).append(sequence)
    return sequences, groups


@pytest.mark.parametrize("family", [*DECODERS, "bert", "modernbert"])
def test_rewards_are_those_of_the_texts_alone(family, reward_models):
    # AutoTokenizer reads the folder of a qwen2 as byte-level BPE, whatever the folder has
    model = RewardModel.from_pretrained(reward_models(family), device="cpu")
    scorer = Scorer(model, word_tokenizer(), tokens_per_batch=60)
    assert scorer.packs == (family not in {"mamba", "bert", "modernbert"})
    prompts, responses = texts()
    rewards = scorer.score(prompts, responses)
    close(rewards, alone(scorer, prompts, responses), 2e-5)
    assert max(rewards) - min(rewards) > 1e-3
    sequences, _ = sequences_by_prompt(scorer, prompts, responses)
    batches = scorer._batches([[sequence] for sequence in sequences])
    assert len(batches) > 2


@pytest.fixture(scope="module")
def alone_by_text(opened):
    "A scorer, and the reward of each of 16 texts alone."
    scorer = copy.deepcopy(opened)
    prompts, responses = texts(4, 4)
    return scorer, dict(zip(zip(prompts, responses), alone(scorer, prompts, responses)))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_order_batches_and_repetition_change_nothing(alone_by_text, data):
    scorer, expected = alone_by_text
    scorer = copy.copy(scorer)
    chosen = data.draw(st.lists(st.sampled_from(list(expected)), min_size=1, max_size=30))
    scorer.tokens_per_batch = data.draw(st.integers(1, 200))
    rewards = scorer.score([prompt for prompt, _ in chosen], [response for _, response in chosen])
    close(rewards, [expected[pair] for pair in chosen])
    for index, pair in enumerate(chosen):
        assert rewards[index] == rewards[chosen.index(pair)]  # equal texts, equal rewards to the last bit


def test_batches_keep_to_the_budget_and_share_prompts(scorer):
    prompts, responses = texts(5, 6)
    sequences, groups = sequences_by_prompt(scorer, prompts, responses)
    for budget, has_several in ((100, True), (15, False)):
        scorer.tokens_per_batch = budget
        batches = scorer._batches(groups.values())
        sizes = []
        planned = []
        for batch in batches:
            sizes.append([computed_tokens([piece]) for piece in batch])
            for _, group in batch:
                planned += group
        for batch_sizes in sizes:
            assert sum(batch_sizes) <= budget or len(batch_sizes) == 1 and batch_sizes[0] <= 4 * budget
        assert any(len(batch_sizes) > 1 for batch_sizes in sizes) == has_several and len(sizes) > 1
        assert sorted(planned) == sorted(sequences)
    scorer.tokens_per_batch = 10_000
    (batch,) = scorer._batches(groups.values())
    repeated = 0  # tokens of prompts that are computed once, of 6 times
    for prompt in groups:
        repeated += 5 * len(encode([prompt], scorer.tokenizer, False)[0])
    assert computed_tokens(batch) <= sum(map(len, sequences)) - repeated
    scorer.packs = False
    scorer.tokens_per_batch = 60
    for batch in scorer._batches(groups.values()):
        longest = max(len(sequence) for _, (sequence,) in batch)
        assert longest * len(batch) <= 60 or len(batch) == 1


def test_the_environment_can_hide_progress_bars(scorer, monkeypatch):
    "tqdm reads TQDM_DISABLE only where `disable` is not given."
    bars = []
    for module in ("rlhf_reward.engine.tqdm", "rlhf_reward.evaluation.tqdm"):
        monkeypatch.setattr(module, lambda *rows, **options: bars.append(options) or tqdm(*rows, **options))
    rows = [{"prompt": "w3", "chosen": " w4", "rejected": " w5", "source": "one"}] * 2
    evaluate(scorer, rows)
    assert {bar["desc"] for bar in bars} == {"Scoring", "Sources"} and not any("disable" in bar for bar in bars)


def computed_tokens(batch):
    "Tokens of a batch: each prefix once, then the rest of each of its sequences."
    tokens = 0
    for prefix, group in batch:
        tokens += len(prefix) + sum(len(sequence) - len(prefix) for sequence in group)
    return tokens


def test_a_batch_that_does_not_fit_is_halved(reward_models, caplog, monkeypatch):
    scorer = Scorer.from_pretrained(reward_models(), device="cpu", tokens_per_batch=500)
    prompts, responses = texts()
    expected = scorer.score(prompts, responses)
    again = Scorer(scorer.model, scorer.tokenizer, max_length=None)
    forward = RewardModel.forward
    sizes = []

    def with_little_memory(self, input_ids, **inputs):
        sizes.append(input_ids.numel())
        if input_ids.numel() > 60:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"
            )
        return forward(self, input_ids, **inputs)

    def with_another_error(self, **inputs):
        raise RuntimeError("another error")

    monkeypatch.setattr(RewardModel, "forward", with_little_memory)
    with caplog.at_level(logging.WARNING):
        close(scorer.score(prompts, responses), expected)
    assert "did not fit into the memory" in caplog.text and 20 < scorer.tokens_per_batch < 100 and max(sizes) > 60
    sequence = [*range(3, 63), *range(3, 40)]
    with pytest.raises(RuntimeError, match="A sequence of 9. tokens does not fit into the memory, alone"):
        again.rewards([[sequence]], ["p"])
    monkeypatch.setattr(RewardModel, "forward", with_another_error)
    with pytest.raises(RuntimeError, match="another error"):
        scorer.score(prompts, responses)


@pytest.mark.parametrize("name", ["should_cancel", "given_up"])
def test_work_that_nobody_needs_is_cancelled(name, scorer):
    "Before the next batch, under both names of the parameter."
    scorer.tokens_per_batch = 10
    computed = []
    forward = scorer._forward

    def counted(batch):
        computed.append(batch)
        return forward(batch)

    scorer._forward = counted
    with pytest.raises(Cancelled):
        scorer.rewards([[[3, 4, 5]], [[6, *range(7, 16)]]], ["a", "b"], **{name: lambda: bool(computed)})
    assert len(computed) == 1


def test_strings_are_taken_as_they_are(scorer):
    "Also one that looks like messages in JSON, as a file may have them."
    half_json = '[{"content": w4'
    close(scorer.score(["w3"], [half_json]), alone(scorer, ["w3"], [half_json]))
    json = '[{"role": "user", "content": "w4"}]'
    close(RewardFunction(scorer)(["w3"], [json]), alone(scorer, ["w3"], [json]))


def test_any_sequence_will_do(scorer):
    rows = Dataset.from_dict({"prompt": ["w3", "w5"], "response": [" w4", " w6"]})
    close(scorer.score(rows["prompt"], rows["response"]), alone(scorer, ["w3", "w5"], [" w4", " w6"]))


def test_a_folder_in_the_home(reward_models, monkeypatch):
    folder = Path(reward_models())
    monkeypatch.setenv("HOME", str(folder.parent))
    in_home = Scorer.from_pretrained(f"~/{folder.name}", device="cpu").score(["w3"], ["w4"])
    close(in_home, Scorer.from_pretrained(folder, device="cpu").score(["w3"], ["w4"]))


def test_rewards_that_are_not_finite_are_refused(scorer):
    with torch.no_grad():
        scorer.model.score.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="of comparison 1, is nan.*; expected a finite number"):
        scorer.score([" w3"], [" w4"])
    with pytest.raises(NotFinite) as error:
        scorer.score([" w3"], [" w4"])
    assert error.value.index == error.value.place == 0


def test_a_model_in_training_is_scored_without_dropout_and_trains_on(reward_models):
    model = RewardModel.from_pretrained(reward_models(), 0.5, "cpu")
    scorer = Scorer(model, word_tokenizer())
    prompts, responses = texts()
    expected = scorer.score(prompts, responses)
    model.train()
    model.backbone.eval() # by hand, such as for frozen layers
    modes = [module.training for module in model.modules()]
    assert scorer.score(prompts, responses) == expected and model.training
    assert [module.training for module in model.modules()] == modes


# ----- strings and messages

@pytest.mark.parametrize("family", ["llama 3", "qwen", "gemma", "zephyr", "phi 3"])
def test_messages_are_rendered_as_in_training(family, tmp_path):
    tokenizer = chat_tokenizer(family)
    config = T.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    T.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = RewardModel(str(tmp_path), 0.0, "cpu")
    scorer = Scorer(model, tokenizer)
    prompt = user("the abba")
    response = assistant("he ab")
    whole = tokenizer.apply_chat_template(prompt + response, tokenize=False)
    expected = model(torch.tensor(encode([whole], tokenizer))).item()
    forms = [
        (prompt, "he ab"),
        (prompt, response),
        ("the abba", response),
        (None, prompt + response),
        (prompt, prompt + response),
    ]
    for prompt_form, response_form in forms:
        close(scorer.score([prompt_form], [response_form]), [expected])
    close(scorer.score([None, ""], [whole, whole]), [expected, expected])


def test_training_evaluation_and_scoring_give_the_same_reward(reward_models, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    draw = random.Random(1)
    rows = []
    prompts = []  # three times each, with the responses
    responses = []
    for index in range(12):
        prompt = text(5, 3 * index)
        own_responses = [text(draw.randint(1, 9), 900 + 9 * index + k) for k in range(3)]
        rows.append({"prompt": prompt, "responses": own_responses, "scores": [3, 1, 2]})
        prompts += [prompt] * 3
        responses += own_responses
    data = Dataset.from_list(rows)
    config = RewardConfig(
        str(tmp_path),
        per_device_eval_batch_size=5,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        num_train_epochs=1,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        max_length=60,
    )

    def make_trainer():
        return RewardTrainer(
            RewardModel.from_pretrained(reward_models(), 0.0, "cpu"),
            config,
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
        )

    trainer = make_trainer()
    steps = []  # (rows, losses)
    losses = trainer._losses

    def recorded_losses(model, inputs):
        result = losses(model, inputs)
        steps.append((inputs["rows"].tolist(), result))
        return result

    trainer._losses = recorded_losses
    trainer.train()
    first_rows, (in_training, _, _) = steps[0]
    untrained = make_trainer().model  # as before the first step
    comparisons = [to_comparison(rows[row - 1]) for row in first_rows]
    scored = Scorer(untrained.eval(), tokenizer).score_comparisons(comparisons)
    close(in_training[:, :3].tolist(), scored)
    logged = [entry for entry in trainer.state.log_history if "chosen_reward" in entry][0]
    chosen = 0
    rejected = 0
    for rewards in scored:
        for winner, loser in ((0, 1), (0, 2), (2, 1)):
            chosen += rewards[winner]
            rejected += rewards[loser]
    close(logged["chosen_reward"], chosen / (3 * len(scored)), 1e-4)
    close(logged["rejected_reward"], rejected / (3 * len(scored)), 1e-4)

    predicted = trainer.predict(data).predictions
    metrics = trainer.evaluate()
    trainer.set_reward_scale(metrics, "rows")
    trainer.save_model()
    scorer = Scorer.from_pretrained(tmp_path, device="cpu")
    by_rank = []
    for row in rows:
        in_order = sorted(scorer.rank(row["prompt"], row["responses"]), key=lambda result: result.index)
        by_rank.append([result.reward for result in in_order])
    close(predicted.tolist(), by_rank)
    flat = scorer.score(prompts, responses)
    close(flat, sum(by_rank, []))
    close(metrics["eval_reward_mean"], sum(flat) / 36)
    normalized = torch.tensor(scorer.score(prompts, responses, True))
    close([normalized.mean().item(), normalized.std(correction=0).item()], [0.0, 1.0], 1e-4)
    classifier = T.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = torch.tensor(encode([prompts[0] + responses[0]], tokenizer))
    close(classifier(ids).logits.item(), flat[0])

    evaluated = evaluate(scorer, rows).responses["reward"].tolist()
    close(evaluated, flat)
    testclient = pytest.importorskip("fastapi.testclient", reason="the extra serve is not installed")
    from rlhf_reward.serving import make_app

    with testclient.TestClient(make_app(scorer)) as client:
        answer = client.post("/score", json={"prompts": prompts, "responses": responses})
        close(answer.json()["rewards"], flat)


def test_rank_best_of_n_and_compare(scorer):
    prompt = text(5, 0)
    responses = [text(4, seed) for seed in range(6)]
    rewards = scorer.score([prompt] * 6, responses)
    ranked = scorer.rank(prompt, responses)
    assert [result.index for result in ranked] == sorted(range(6), key=lambda index: -rewards[index])
    assert all(result.response == responses[result.index] for result in ranked)
    close([result.reward for result in ranked], sorted(rewards, reverse=True))
    total = sum(math.exp(reward) for reward in rewards)
    close([result.probability for result in ranked], [math.exp(rewards[result.index]) / total for result in ranked])
    equal = scorer.rank(prompt, [responses[0]] * 3)
    assert [result.index for result in equal] == [0, 1, 2]  # equal rewards keep their order
    for n in range(1, 7):
        best = max(range(n), key=lambda index: rewards[index])
        assert scorer.best_of_n(prompt, responses, n=n).index == best
    assert scorer.best_of_n(prompt, responses).index == ranked[0].index
    preference = scorer.compare(prompt, responses[0], responses[1])
    close([preference.reward_a, preference.reward_b], rewards[:2])
    close(preference.probability, 1 / (1 + math.exp(rewards[1] - rewards[0])))
    calls = [
        lambda: scorer.rank(prompt, responses, normalize=True),
        lambda: scorer.score([prompt], responses[:1], True),
        lambda: scorer.compare(prompt, "a", "b", normalize=True),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="does not know the mean and standard deviation"):
            call()


def test_a_rule_has_the_calls_of_a_scorer():
    rule = Rule(lambda prompt, response: len(response))
    assert rule.score(["a", "b"], ["cc", "d"]) == [2.0, 1.0]
    assert [result.index for result in rule.rank("a", ["x", "yy"])] == [1, 0]
    assert rule.compare("a", "x", "yy").reward_b == 2.0
    assert RewardFunction(rule)(["a"], ["xyz"]) == [3.0]
    with pytest.raises(ValueError, match="Rule does not know the mean and standard deviation of its rewards"):
        rule.score(["a"], ["b"], normalize=True)


def test_what_is_too_long(reward_models, caplog):
    long = Scorer.from_pretrained(reward_models(), device="cpu")
    assert long.max_length == 64
    with pytest.raises(ValueError, match="it has 81 tokens; expected at most 64"):
        long.score([text(40, 0)], [text(40, 1)])
    cutting = Scorer.from_pretrained(reward_models(), device="cpu", max_length=20, on_overlong="truncate_prompt")
    prompts = [text(30, 0), text(4, 1), text(30, 0)]
    responses = [text(8, 2), text(5, 3), text(3, 4)]
    with caplog.at_level(logging.WARNING):
        rewards = cutting.score(prompts, responses)
    assert "Cut the prompt of 2 of 3 to 20 tokens" in caplog.text
    sequences = encode(joined(prompts, responses), cutting.tokenizer)
    with torch.no_grad():  # each alone
        close(rewards, [cutting.model(torch.tensor([ids[-20:]])).item() for ids in sequences])
    ranked = cutting.rank(prompts[0], [responses[0], responses[2]])  # cut alike: by what the longest needs
    ids, longest = encode([prompts[0] + responses[2], prompts[0] + responses[0]], cutting.tokenizer)
    excess = len(longest) - 20
    with torch.no_grad():
        expected = cutting.model(torch.tensor([ids[excess:]])).item()
    close([result.reward for result in ranked if result.index == 1], [expected])
    with pytest.raises(ValueError, match="too few of them are the prompt's to be cut"):
        cutting.score([text(3, 0)], [text(30, 1)])
    with pytest.raises(ValueError, match="The text .* is a whole text that does not say where its prompt ends"):
        cutting.score([None], [text(30, 1)])
    human = "\n\nHuman: " + text(30, 1) + "\n\nAssistant:"  # says it
    assert len(cutting.score([None], [human + " w4"])) == 1


# ----- encoders with their own head

def encoder_config(kind):
    size = {**SIZE, "pad_token_id": 0, "num_labels": 1, "initializer_range": 0.4}
    if kind == "bert":
        return T.BertConfig(**size)
    if kind == "electra":
        return T.ElectraConfig(**size, embedding_size=16)
    if kind == "roberta":
        return T.RobertaConfig(**{**size, "pad_token_id": 1})
    if kind == "deberta-v2":
        relative = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False)
        return T.DebertaV2Config(**size, **relative)
    if kind == "distilbert":
        return T.DistilBertConfig(
            vocab_size=64,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            max_position_embeddings=64,
            num_labels=1,
            initializer_range=0.4,
        )
    ids = dict(bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)
    return T.ModernBertConfig(
        **{**size, "num_hidden_layers": 3}, **ids, local_attention=4, classifier_pooling="mean"
    )


def encoder_classifier(kind, folder):
    "A classifier with random weights and its tokenizer, saved in the folder and loaded from it."
    torch.manual_seed(0)
    T.AutoModelForSequenceClassification.from_config(encoder_config(kind)).save_pretrained(folder)
    special = ["<s>", "<pad>"] if kind == "roberta" else ["<pad>", "<unk>"]
    words = [*special, "<cls>", "<sep>", *(f"w{number}" for number in range(4, 64))]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w4"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=[("<cls>", 2), ("<sep>", 3)]
    )
    inputs = ["input_ids", "attention_mask"]
    if kind in ("bert", "electra"):
        inputs.insert(1, "token_type_ids")
    tokenizer = T.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        cls_token="<cls>",
        sep_token="<sep>",
        model_input_names=inputs,
    )
    tokenizer.save_pretrained(folder)
    classifier = T.AutoModelForSequenceClassification.from_pretrained(folder)
    return classifier, T.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def logit(classifier, tokenizer, *segments):
    return classifier(**tokenizer(*segments, return_tensors="pt")).logits.item()


@pytest.mark.parametrize("kind", ["bert", "electra", "roberta", "deberta-v2", "distilbert", "modernbert"])
def test_encoders_keep_their_head(kind, tmp_path, caplog):
    classifier, tokenizer = encoder_classifier(kind, tmp_path)
    scorer = Scorer.from_pretrained(tmp_path, device="cpu", tokens_per_batch=100)
    prompts, responses = texts(4, 3, 8)
    pairs = [logit(classifier, tokenizer, prompt, response) for prompt, response in zip(prompts, responses)]
    whole = [logit(classifier, tokenizer, whole_text) for whole_text in joined(prompts, responses)]
    close(scorer.score(prompts, responses), pairs)
    one_segment = Scorer.from_pretrained(tmp_path, device="cpu", text_pairs=False)
    close(one_segment.score(prompts, responses), whole)
    close(scorer.score([None] * len(prompts), joined(prompts, responses)), whole)
    assert max(pairs) - min(pairs) > 1e-3
    assert max(abs(of_pair - of_whole) for of_pair, of_whole in zip(pairs, whole)) > 1e-3
    rewards = [result.reward for result in scorer.rank(prompts[0], responses[:3])]
    assert rewards == sorted(rewards, reverse=True)


def test_a_question_and_its_answer_as_messages_are_two_segments(tmp_path):
    "For an encoder without a template; a conversation has no two segments."
    encoder_classifier("bert", tmp_path)
    scorer = Scorer.from_pretrained(tmp_path, device="cpu")
    prompts, responses = texts(4, 3, 8)
    as_messages = scorer.score(list(map(user, prompts)), list(map(assistant, responses)))
    assert as_messages == scorer.score(prompts, responses)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        scorer.score([[*user("w5"), *assistant("w6"), *user("w7")]], [assistant("w8")])


def test_pairs_of_encoders_lose_their_oldest_prompt_tokens(tmp_path, caplog):
    classifier, tokenizer = encoder_classifier("bert", tmp_path)
    scorer = Scorer.from_pretrained(tmp_path, device="cpu", max_length=16, on_overlong="truncate_prompt")
    prompt = text(20, 0)
    response = text(5, 1)
    kept = " ".join(prompt.split()[-8:])  # 16 minus 5 of the response and three special tokens
    expected = logit(classifier, tokenizer, kept, response)
    with caplog.at_level(logging.WARNING):
        close(scorer.score([prompt], [response]), [expected])
    assert "Cut the prompt of 1 of 1 to 16 tokens" in caplog.text
    with pytest.raises(ValueError, match="of which the prompt has 2"):
        scorer.score([text(2, 0)], [text(20, 1)])
    with pytest.raises(ValueError, match="it has 28 tokens; expected at most 16"):
        Scorer(scorer.model, scorer.tokenizer, max_length=16).score([prompt], [response])


def test_decoders_made_elsewhere_open_packed(tmp_path):
    torch.manual_seed(0)
    config = T.Qwen3Config(
        **SIZE, num_key_value_heads=2, head_dim=8, num_labels=1, pad_token_id=0, initializer_range=0.3
    )
    classifier = T.AutoModelForSequenceClassification.from_config(config).eval()
    classifier.save_pretrained(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    scorer = Scorer.from_pretrained(tmp_path, device="cpu")
    prompts, responses = texts(3, 3)
    # without an end that is added here: as the tokenizer writes it
    theirs = [logit(classifier, tokenizer, whole_text) for whole_text in joined(prompts, responses)]
    close(scorer.score(prompts, responses), theirs)
    assert scorer.packs and isinstance(scorer.model, RewardModel) and not scorer.model.ends_with_eos


def classifier_of(config):
    return T.AutoModelForSequenceClassification.from_config(config)


T5 = dict(vocab_size=64, d_model=8, d_ff=8, d_kv=8, num_layers=1, num_heads=1, num_labels=1)


@pytest.mark.parametrize("make, expected", [
    (lambda: classifier_of(T.BertConfig(**SIZE, num_labels=3)), "has 3 labels"),
    (lambda: classifier_of(T.LlamaConfig(**SIZE, num_labels=2)), "has 2 labels"),
    (lambda: T.LlamaForCausalLM(T.LlamaConfig(**SIZE)), "The reward head of .* does not exist"),
    (lambda: T.BertModel(T.BertConfig(**SIZE)), "The reward head of .* does not exist"),
    (lambda: classifier_of(T.T5Config(**T5)), "encoder-decoder"),
])
def test_other_models_are_refused(make, expected, tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=expected):
        Scorer.from_pretrained(tmp_path, device="cpu")


def test_a_classifier_without_all_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    encoder_classifier("bert", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    expected = "lacks 1 weights of BertForSequenceClassification, such as classifier.weight"
    with pytest.raises(ValueError, match=expected):
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


# ----- wrong calls

@pytest.mark.parametrize("call, expected", [
    (lambda scorer: scorer.score("w3", ["w4"]), "prompts is str"),
    (lambda scorer: scorer.score([{"role": "user", "content": "w3"}], ["w4"]), "prompts is messages"),
    (lambda scorer: scorer.score(["w3"], "w4"), "responses is str"),
    (lambda scorer: scorer.score(["w3"], ["w4", "w5"]), "1 prompts and 2 responses"),
    (lambda scorer: scorer.score(["w3"], [7]), "Response 1 cannot be scored: found 7; expected a text"),
    (
        lambda scorer: scorer.score([["w3"]], ["w4"]),
        r"Response 1 cannot be scored: found \['w3'\]; expected a text",
    ),
    (lambda scorer: scorer.score([[{"content": "w3"}]], ["w4"]), "has no role"),
    (lambda scorer: scorer.rank("w3", []), "there are no responses; expected a list of at least 1"),
    (lambda scorer: scorer.rank("w3", None), r"responses is NoneType; expected a list with one response each\.$"),
    (lambda scorer: scorer.rank("w3", "w4"), "responses is str"),
    (lambda scorer: scorer.best_of_n("w3", ["w4"], n=0), "n is 0"),
])
def test_wrong_calls(call, expected, scorer):
    with pytest.raises(ValueError, match=expected):
        call(scorer)


def test_nothing_to_score(scorer):
    assert scorer.score([], []) == []


def test_a_model_that_does_not_exist(tmp_path):
    with pytest.raises(OSError, match="does not exist"):
        Scorer.from_pretrained(tmp_path / "no", device="cpu")


# ----- for RL trainers

def test_reward_function(scorer, reward_models):
    prompts, responses = texts(3, 3)
    expected = scorer.score(prompts, responses)
    function = RewardFunction(reward_models(), device="cpu", tokens_per_batch=30, name="helpful")
    again = pickle.loads(pickle.dumps(function))
    close(function(prompts=prompts, completions=responses, completion_ids=None, answer=["x"] * 9), expected)
    assert not isinstance(function, torch.nn.Module) and function.__name__ == again.__name__ == "helpful"
    assert again._opened is None and len(pickle.dumps(function)) < 1000  # the name travels, not the weights
    close(again(prompts, responses), expected)
    close(pickle.loads(pickle.dumps(RewardFunction(scorer)))(prompts, responses), expected)
    conversations = [user(prompt) for prompt in prompts]
    completions = [assistant(response) for response in responses]
    in_messages = scorer.score(conversations, responses)
    close(function(prompts=conversations, completions=completions), in_messages)
    with pytest.raises(ValueError):
        function(prompts=prompts, completions=responses[:2])
    with pytest.raises(ValueError, match="expected options with a name only"):
        RewardFunction(scorer, device="cpu")


def test_completions_without_a_reward(scorer, caplog, monkeypatch):
    prompts, responses = texts(2, 2)
    expected = scorer.score(prompts, responses)
    rows = [{"prompt": prompt, "response": response} for prompt, response in zip(prompts, responses)]
    scorer.max_length = max(len(ids) for ids, in scorer.tokenize(list(map(to_responses, rows))))
    bad = {"too long": responses[0] * 50, "of no type": None}
    for completion in bad.values():
        completions = [responses[0], completion, *responses[2:]]
        with pytest.raises(ValueError, match="Row 2 of the completions"):
            RewardFunction(scorer)(prompts, completions)
        for on_error, reward in (("none", None), (-3, -3.0), (0.0, 0.0)):
            function = RewardFunction(scorer, on_error=on_error)
            rewards = function(prompts, completions)
            assert rewards[1] == reward and function.num_errors == 1
            close(rewards[:1] + rewards[2:], expected[:1] + expected[2:])
            assert "1 of 4 completions cannot be scored" in caplog.text
            assert pickle.loads(pickle.dumps(function)).on_error == on_error
            assert function(prompts, [completion] * 4) == [reward] * 4 and function.num_errors == 5
        caplog.clear()
    ids = [scorer.tokenize([to_responses(row)])[0][0] for row in rows]
    forward = scorer._forward

    def overflowing(batch):
        rewards = forward(batch)
        return {sequence: math.inf if list(sequence) == ids[1] else reward for sequence, reward in rewards.items()}

    monkeypatch.setattr(scorer, "_forward", overflowing)
    with pytest.raises(ValueError, match="is inf"):
        RewardFunction(scorer)(prompts, responses)
    for on_error, reward in (("none", None), (-3, -3.0)):
        function = RewardFunction(scorer, on_error=on_error)
        rewards = function(prompts, responses)
        assert rewards[1] == reward and function.num_errors == 1
        close(rewards[:1] + rewards[2:], expected[:1] + expected[2:])
    assert "The first: The reward is inf." in caplog.text
    for on_error in ("skip", math.nan, math.inf, None):
        with pytest.raises(ValueError, match="on_error is .*; expected 'raise', 'none' or a finite number"):
            RewardFunction(scorer, on_error=on_error)


def test_completions_of_any_kind(scorer):
    "Empty ones are scored unless the template refuses them; long prompts are cut and counted, long completions not."
    scorer.tokenizer.chat_template = (
        "{% for m in messages %}{% if 'w13' in m.content or m.content == '' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role }} {% if 'w14' not in m.content %}{{ m.content }} {% endif %}{% endfor %}"
    )
    for prompt, completion in (("w5", "w6"), (user("w5"), assistant("w6"))):
        is_text = isinstance(prompt, str)
        refused = None if is_text else [assistant(""), assistant("w13"), assistant("w14"), [], ""]
        bad = [None, 7, *(refused or [])]
        function = RewardFunction(scorer, on_error="none")
        rewards = function([prompt] * (1 + len(bad)), [*bad, completion])
        assert rewards[:-1] == [None] * len(bad) and function.num_errors == len(bad)
        close(rewards[-1:], scorer.score([prompt], [completion]))
    for prompt, completion in (("w5", ""), (user("w5"), " ")):
        close(RewardFunction(scorer)([prompt], [completion]), scorer.score([prompt], [completion]))
    scorer.max_length = 20
    scorer.on_overlong = "truncate_prompt"
    function = RewardFunction(scorer, on_error=-1)
    rewards = function(["w5 " * 50] * 3, [" w6", " w7" * 9, " w8" * 30])
    assert rewards[2] == -1 and -1 not in rewards[:2]
    assert (function.num_errors, function.num_truncated) == (1, 2)
    function(["w5 " * 50], [" w6"])
    assert (function.num_errors, function.num_truncated) == (1, 3)


def test_tools_and_template_arguments_reach_the_template(scorer):
    with_variables = "{% if tools %}w9 w9 {% endif %}{% if think %}w8 {% endif %}"
    scorer.tokenizer.chat_template = with_variables + TEMPLATE
    function = RewardFunction(scorer)
    rewards = set()
    for columns in ({}, {"tools": [[{"name": "f"}]]}, {"chat_template_kwargs": [{"think": True}]}):
        rewards.add(round(function([user("w5")], [" w6"], **columns)[0], 4))
    assert len(rewards) == 3


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("trainer_name", ["GRPO", "RLOO"])
def test_two_steps_of_trl(trainer_name, conversational, reward_models, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    steps = []

    class Recording(RewardFunction):
        def __call__(self, prompts, completions, **columns):
            rewards = super().__call__(prompts, completions, **columns)
            steps.append((prompts, completions, rewards, sorted(columns)))
            return rewards

    policy_folder = save_language_model("llama", tmp_path / "policy")
    tokenizer = word_tokenizer(padding_side="left")
    tokenizer.chat_template = TEMPLATE
    prompts = [text(4, row) for row in range(8)]
    if conversational:
        prompts = list(map(user, prompts))
    config = getattr(trl, f"{trainer_name}Config")(
        str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        report_to="none",
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        temperature=1.5,
    )
    trainer = getattr(trl, f"{trainer_name}Trainer")(
        model=T.AutoModelForCausalLM.from_pretrained(policy_folder),
        reward_funcs=[Recording(reward_models(), device="cpu", name="helpful")],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts, "answer": list("abcdefgh")}),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.global_step == 2 and len(steps) == 2
    scorer = Scorer.from_pretrained(reward_models(), device="cpu")
    for step_prompts, completions, rewards, columns in steps:
        assert len(rewards) == 4 and "answer" in columns
        close(rewards, scorer.score(step_prompts, completions))
    name = "rewards/helpful/mean"
    logged = [entry[name] for entry in trainer.state.log_history if name in entry]
    close(logged, [sum(rewards) / 4 for _, _, rewards, _ in steps], 1e-4)


def test_a_completion_may_repeat_the_prompt(reward_models):
    "Several turns of which one repeats the prompt: what the assistant begins only follows the prompt."
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    scorer = Scorer(RewardModel.from_pretrained(reward_models(), 0.0, "cpu"), tokenizer)
    prompt = user("w5")
    turns = [*assistant("w6"), *prompt, *assistant("w7")]
    close(scorer.score([prompt], [turns]), scorer.score([None], [prompt + turns]))
    close(scorer.score([prompt], [prompt + turns]), scorer.score([None], [prompt + turns]))  # a whole conversation
    greeted = [*assistant("w8"), *prompt]  # also one that the assistant began
    close(scorer.score([greeted], [greeted + turns[:1]]), scorer.score([greeted], [turns[:1]]))


def test_ranks_what_can_be_read_once(scorer):
    from_iterator = scorer.rank("w3", iter([" w4", " w5"]))
    from_list = scorer.rank("w3", [" w4", " w5"])
    assert [result.response for result in from_iterator] == [result.response for result in from_list]


def test_tokens_that_the_model_does_not_have(reward_models):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    scorer = Scorer(RewardModel.from_pretrained(reward_models(), 0.0, "cpu"), tokenizer)
    expected = "cannot be scored: it has the token id 64; the model has the ids 0 to 63. Expected the tokenizer of the"
    with pytest.raises(ValueError, match=expected):
        scorer.score(["w3"], [" w4 <tool>"])


def test_padding_that_ends_texts_is_reported(tmp_path, caplog):
    "For models made elsewhere: transformers reads one token before."
    config = T.LlamaConfig(**{**SIZE, "vocab_size": 64}, num_labels=1, pad_token_id=2, eos_token_id=2)
    T.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        Scorer.from_pretrained(tmp_path, device="cpu")
    assert "pads with the token that ends texts" in caplog.text
