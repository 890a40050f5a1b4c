"Several heads, their weights, the posterior of the last layer, and everything that shows how sure a reward is."
import itertools
import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import save_language_model, word_tokenizer
from datasets import Dataset
from scipy.special import expit
from transformers import AutoModelForSequenceClassification

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, report
from rlhf_reward.bootstrap import bootstrap_weights
from rlhf_reward.cli import laplace as laplace_command
from rlhf_reward.cli import score as score_command
from rlhf_reward.evaluation import Rule, evaluate
from rlhf_reward.files import score_file, score_rows
from rlhf_reward.laplace import fit_laplace, head_posterior
from rlhf_reward.length_calibration import LengthCalibration
from rlhf_reward.many_machines import BatchScorer
from rlhf_reward.overoptimization import expected_picks, gold_model_curve, overoptimization
from rlhf_reward.packing import pack_comparisons, pad_comparisons
from rlhf_reward.reward import is_reward_model
from rlhf_reward.rl import RewardFunction
from rlhf_reward.scoring import Scorer, UncertainRanked
from rlhf_reward.spread_statistics import spread_statistics
from rlhf_reward.uncertainty import UncertainReward, margin_spread, member_deviations

IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6], [5, 5, 5, 5]])
PROMPT = "w3 w4"
RESPONSES = [" w5", " w6 w7", " w8 w9 w9"]
ROWS = [
    {"prompt": f"w{number % 7 + 3} w4", "chosen": f" w{number + 5} w6", "rejected": f" w{number % 3 + 8} w9"}
    for number in range(12)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_language_model("llama", tmp_path_factory.mktemp("base"))
    word_tokenizer().save_pretrained(folder)
    return folder


def new_model(base, heads=4, **options):
    torch.manual_seed(0)
    model = RewardModel(base, 0.0, "cpu", heads=heads, **options)
    model.config.rlhf_reward = {"reward_mean": 1.0, "reward_std": 2.0}
    return model


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    "A saved model of four heads with levels."
    model = new_model(base)
    model.head_levels.note(torch.tensor([[1.0, 2.0, 3.0, 6.0], [9.0, 9.0, 9.0, 9.0]]), 1) # the last fills up a step
    model.head_levels.end_step()
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder, word_tokenizer())
    return str(folder)


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    "A saved model with one head."
    folder = tmp_path_factory.mktemp("plain")
    new_model(base, heads=1).save_pretrained(folder, word_tokenizer())
    return str(folder)


@torch.no_grad()
def rewards_of(model, ids=IDS, **options):
    return model(ids, **options)


# ----- weights of the comparisons

def test_the_weights_of_heads_depend_on_row_set_and_seed_alone():
    rows = torch.tensor([0, 1, 2, 1_000_003])
    names = torch.tensor([list(b"a\0\0"), list(b"ab\0"), list(b"b\0\0"), list(b"\0\0\0")], dtype=torch.uint8)
    weights = bootstrap_weights(rows, names, 5, 7)
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(bootstrap_weights(rows[order], names[order], 5, 7), weights[order], atol=0, rtol=0)
    one_by_one = [bootstrap_weights(rows[n:n + 1], names[n:n + 1, :1 + (n == 1)], 3, 7) for n in range(4)]
    torch.testing.assert_close(torch.cat(one_by_one), weights[:, :3], atol=0, rtol=0)
    for other in (
        bootstrap_weights(rows, names, 5, 8),
        bootstrap_weights(rows + 1, names, 5, 7),
        bootstrap_weights(rows, names + 1, 5, 7),
    ):
        assert (other != weights).all()
    many = bootstrap_weights(torch.arange(50_000), torch.zeros(50_000, 0, dtype=torch.uint8), 4, 0).double()
    assert (many > 0).all() and (many.mean(0) - 1).abs().max() < 0.02 and (many.var(0) - 1).abs().max() < 0.05
    assert (torch.corrcoef(many.T) - torch.eye(4)).abs().max() < 0.02
    neighbors = torch.corrcoef(torch.stack([many[1:, 0], many[:-1, 0]]))[0, 1]
    assert neighbors.abs() < 0.02
    # exponential: the share above x is exp(−x)
    assert all(abs((many > x).double().mean() - math.exp(-x)) < 0.01 for x in (0.1, 1, 3))


# ----- the model

def test_the_reward_is_the_mean_of_the_heads_here_and_elsewhere(base, saved, tmp_path, caplog):
    model = RewardModel.from_pretrained(saved, device="cpu")
    outputs = rewards_of(model, per_head=True)
    assert model.heads == 4 and outputs.shape == (3, 4) and outputs.dtype == torch.float32
    torch.testing.assert_close(outputs, rewards_of(new_model(base), per_head=True), atol=0, rtol=0)
    torch.testing.assert_close(rewards_of(model), outputs.mean(dim=1, keepdim=True))
    assert outputs.std(dim=1).min() > 0.01 # they start apart
    with caplog.at_level(logging.WARNING):
        classifier, loaded = AutoModelForSequenceClassification.from_pretrained(saved, output_loading_info=True)
    assert not any(loaded[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), loaded
    assert not [record for record in caplog.records if "heads" in record.message]
    assert classifier.score.weight.shape == (1, model.score.in_features) and classifier.config.num_labels == 1
    with torch.no_grad():
        torch.testing.assert_close(classifier(IDS).logits, rewards_of(model), atol=1e-6, rtol=0)
    assert is_reward_model(saved)
    # nothing that a program takes for weights is next to those of the model
    assert [file.name for file in Path(saved).glob("*.safetensors")] == ["model.safetensors"]
    facts = json.loads(Path(saved, "config.json").read_text())["rlhf_reward"]
    assert facts["heads"] == 4 and facts["opens_as_sequence_classification"]
    # the levels come back, and with them the spread
    torch.testing.assert_close(model.head_levels(), torch.tensor([-2.0, -1.0, 0.0, 3.0]))
    # in bfloat16 the mean is rounded, and the heads are not
    half = RewardModel.from_pretrained(saved, device="cpu", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half", word_tokenizer())
    again = RewardModel.from_pretrained(tmp_path / "half", device="cpu")
    torch.testing.assert_close(again.score.weight, model.score.weight, atol=0, rtol=0)
    # a model with one head in the same folder leaves nothing of the others
    new_model(base, heads=1).save_pretrained(tmp_path / "half", word_tokenizer())
    assert not (tmp_path / "half" / "uncertainty").exists()
    assert RewardModel.from_pretrained(tmp_path / "half", device="cpu").heads == 1


@pytest.mark.parametrize("family", ["bert", "adapter"])
def test_encoders_and_adapters_have_heads_too(base, family, tmp_path):
    if family == "bert":
        folder = save_language_model("bert", tmp_path / "base")
        model = new_model(folder)
    else:
        peft = pytest.importorskip("peft")
        from rlhf_reward.adapters import add_adapter
        model = add_adapter(new_model(base), peft.LoraConfig(r=2, init_lora_weights=False))
    expected = rewards_of(model, per_head=True)
    model.save_pretrained(tmp_path / "saved", word_tokenizer())
    opened = RewardModel.from_pretrained(tmp_path / "saved", device="cpu")
    torch.testing.assert_close(rewards_of(opened, per_head=True), expected, atol=1e-6, rtol=0)
    if family == "bert":
        elsewhere = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    else:
        classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        elsewhere = peft.PeftModel.from_pretrained(classifier, tmp_path / "saved").eval()
        elsewhere.get_base_model().config.pad_token_id = 0
    with torch.no_grad():
        torch.testing.assert_close(elsewhere(input_ids=IDS).logits, expected.mean(1, keepdim=True), atol=1e-5, rtol=0)


def test_what_a_model_does_not_have_is_refused_with_the_remedy(base, plain, saved, tmp_path):
    for heads, problem in ((0, "heads is 0; expected"), (True, "heads is True"), (2.0, "heads is 2.0")):
        with pytest.raises(ValueError, match=problem):
            RewardModel(base, device="cpu", heads=heads)
    with pytest.raises(ValueError, match="several heads of one reward, or attributes with one head"):
        RewardModel(base, device="cpu", heads=2, attributes=["clarity"])
    scorer = Scorer.from_pretrained(plain, device="cpu")
    with pytest.raises(ValueError, match="per_head is True, but the model has one head"):
        scorer.model(IDS, per_head=True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "w3", "response": "w4"}) + "\n")
    rule = Rule(lambda prompt, response: len(response))
    remedy = "does not know how sure.*--heads 8.*rlhf_reward laplace"
    for call in (
        lambda: scorer.model(IDS, uncertainty=True),
        lambda: scorer.score([PROMPT], [" w5"], uncertainty=True),
        lambda: scorer.rank(PROMPT, RESPONSES, pessimism=1.0),
        lambda: scorer.best_of_n(PROMPT, RESPONSES, pessimism=0.5),
        lambda: rule.best_of_n(PROMPT, RESPONSES, pessimism=1.0),
        lambda: RewardFunction(scorer, pessimism=1.0)([PROMPT], [" w5"]),
        lambda: score_file(scorer, str(rows), str(tmp_path / "out.jsonl"), uncertainty=True),
        lambda: BatchScorer(scorer, uncertainty=True),
        lambda: BatchScorer(rule, uncertainty=True),
        lambda: list(score_rows([{"prompt": "w3", "response": "w4"}], 1, rule, "the rows", uncertainty=True)),
    ):
        with pytest.raises(ValueError, match=remedy):
            call()
    with pytest.raises(SystemExit, match=remedy):
        score_command(["--model", plain, "--data", str(rows), "--output", str(tmp_path / "o.jsonl"), "--uncertainty"])
    assert not list(tmp_path.glob("o*"))
    for pessimism in (-1, math.inf, math.nan, "1", True):
        with pytest.raises(ValueError, match="pessimism is .*; expected a finite number"):
            scorer.best_of_n(PROMPT, RESPONSES, pessimism=pessimism)
    # files that are missing, or of another head
    for change, problem in (
        (lambda folder: shutil.rmtree(folder / "uncertainty"), "has no uncertainty/heads.safetensors"),
        (lambda folder: shutil.copy(Path(plain, "model.safetensors"), folder), "is not the head of its weights"),
    ):
        copied = tmp_path / "copied"
        shutil.copytree(saved, copied)
        change(copied)
        with pytest.raises(ValueError, match=problem):
            RewardModel.from_pretrained(copied, device="cpu")
        shutil.rmtree(copied)


# ----- training

def trainer_of(base, folder, heads=3, dropout=0.0, **options):
    torch.manual_seed(0)
    model = RewardModel(base, dropout, "cpu", heads=heads)
    settings = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "layout": "padded"}
    settings.update({"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **options})
    rows = Dataset.from_list(ROWS)
    args = RewardConfig(folder, **settings)
    return RewardTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=word_tokenizer())


def test_each_head_learns_from_its_own_weights_of_the_comparisons(base, tmp_path):
    trainer = trainer_of(base, str(tmp_path / "run"))
    model = trainer.model
    examples = list(trainer.train_dataset)
    expected = []
    weights = bootstrap_weights(torch.tensor([row["row"] for row in examples]), torch.zeros(12, 0), 3)
    for collate in (pad_comparisons, pack_comparisons):
        batch = collate(examples)
        if collate is pack_comparisons:
            continue # the layout of this trainer is padded
        model.eval()
        outputs = rewards_of(model, batch["input_ids"], attention_mask=batch["attention_mask"], per_head=True)
        margins = outputs[0::2] - outputs[1::2] # (12, 3)
        expected = (weights * torch.nn.functional.softplus(-margins)).mean(dim=1).mean()
        evaluated = torch.nn.functional.softplus(-margins.mean(dim=1)).mean()
        with torch.no_grad():
            torch.testing.assert_close(trainer.compute_loss(model, batch), evaluated)
            assert model.head_levels.of_step.abs().max() == 0 # an evaluation notes nothing
        model.train()
        torch.testing.assert_close(trainer.compute_loss(model, batch), expected)
        levels = outputs.mean(0) - outputs.mean()
        model.head_levels.end_step()
        torch.testing.assert_close(model.head_levels(), levels, atol=1e-6, rtol=0)
    # the gradient of micro-batches in another order is that of the batch
    gradients = []
    for parts in ([examples], [examples[7:], examples[:2], examples[2:7]]):
        model.zero_grad()
        for part in parts:
            trainer.compute_loss(model, pad_comparisons(part), num_items_in_batch=torch.tensor(12.0)).backward()
        gradients.append(model.score.weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert (gradients[0][0] - gradients[0][1]).abs().max() > 1e-4 # the heads differ


def test_a_resumed_run_has_the_same_heads_and_levels(base, tmp_path):
    whole = trainer_of(base, str(tmp_path / "whole"))
    whole.train()
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(base, str(tmp_path / "resumed"), **options).train()
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    resumed = trainer_of(base, str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=True)
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, atol=0, rtol=0)
    torch.testing.assert_close(resumed.model.head_levels.sums, whole.model.head_levels.sums, atol=0, rtol=0)
    assert whole.model.head_levels.sums[-1] > 0
    files = json.loads((tmp_path / "resumed" / "checkpoint-2" / "checkpoint_files.json").read_text())
    assert "uncertainty/heads.safetensors" in files
    with pytest.raises(ValueError, match="form"):
        trainer_of(base, str(tmp_path / "resumed"), heads=2, **options).train(resume_from_checkpoint=True)


def test_the_levels_are_of_the_steps_whatever_their_micro_batches(base, tmp_path):
    result = []
    for size, accumulation in ((6, 1), (2, 3)): # a step is found twice for the sum to zero
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 3}
        trainer = trainer_of(base, str(tmp_path), sum_to_zero_coefficient=1.0, **options)
        trainer.train()
        result.append(trainer.model.head_levels.sums)
    torch.testing.assert_close(*result, atol=1e-6, rtol=1e-4)
    assert result[0][-1].item() == pytest.approx(1 - 0.99**3) and result[0][:-1].abs().min() > 1e-5


def test_heads_go_with_the_other_ways_to_start_pool_and_regularize(base, tmp_path):
    zero = trainer_of(base, str(tmp_path / "zero"), head_start="zero", max_steps=2)
    zero.train()
    rows = zero.model.score.weight
    assert all((one - other).norm() > 1e-3 * one.norm() > 0 for one, other in itertools.combinations(rows, 2))
    fitted = trainer_of(base, str(tmp_path / "fitted"), head_start="fitted", max_steps=1, learning_rate=0.0)
    fitted.train()
    weight = fitted.model.score.weight
    assert (weight[0] - weight[1]).norm() > 0.01 * weight.norm() # each is fitted with its own weights
    for pooling in ("mean", "attention"):
        model = new_model(base, pooling=pooling)
        if pooling == "attention":
            torch.nn.init.normal_(model.response_pooling.query)
        model.save_pretrained(tmp_path / pooling, word_tokenizer())
        opened = RewardModel.from_pretrained(tmp_path / pooling, device="cpu")
        assert opened.heads == 4
        for name, value in model.state_dict().items():
            torch.testing.assert_close(opened.state_dict()[name], value, atol=0, rtol=0)
    # a second draw of dropout has the weights of the first
    trainer = trainer_of(base, str(tmp_path / "rdrop"), rdrop_coefficient=1.0, dropout=0.2)
    trainer.train()
    assert trainer.model.score.weight.isfinite().all()


# ----- scoring

@pytest.fixture(scope="module")
def scorer(saved):
    return Scorer.from_pretrained(saved, device="cpu")


def test_the_spread_is_the_standard_deviation_over_heads_without_their_levels(scorer):
    scored = scorer.score([PROMPT] * 3, RESPONSES, uncertainty=True)
    assert [reward.reward for reward in scored] == scorer.score([PROMPT] * 3, RESPONSES)
    members = []
    tokenizer = word_tokenizer()
    for response in RESPONSES:
        ids = torch.tensor([[*tokenizer(PROMPT + response)["input_ids"], 2]])
        members.append(rewards_of(scorer.model, ids, per_head=True)[0])
    members = torch.stack(members)
    own = members - torch.tensor([-2.0, -1.0, 0.0, 3.0])
    np.testing.assert_allclose([reward.spread for reward in scored], own.std(dim=1), atol=1e-5)
    for first, second in itertools.combinations(range(3), 2):
        expected = (members[first] - members[second]).std() # levels cancel
        assert abs(margin_spread(scored[first], scored[second]) - expected) < 1e-5
        assert margin_spread(scored[first], scored[second]) <= scored[first].spread + scored[second].spread + 1e-6
    normalized = scorer.score([PROMPT] * 3, RESPONSES, normalize=True, uncertainty=True)
    for raw, reward in zip(scored, normalized):
        assert abs(reward.reward - (raw.reward - 1) / 2) < 1e-6 and abs(reward.spread - raw.spread / 2) < 1e-6
        assert abs(np.linalg.norm(reward.deviations) - reward.spread) < 1e-6
    # any members will do
    with pytest.raises(ValueError, match="There are 1 members"):
        member_deviations(torch.zeros(2, 1))


def test_a_pessimistic_choice_goes_by_the_lower_bound(scorer):
    scored = scorer.score([PROMPT] * 3, RESPONSES, uncertainty=True)
    rewards = [reward.reward for reward in scored]
    for pessimism in (0.5, 3.0, 100.0):
        bounds = [reward.reward - pessimism * reward.spread for reward in scored]
        best = scorer.best_of_n(PROMPT, RESPONSES, pessimism=pessimism)
        assert isinstance(best, UncertainRanked) and best.index == int(np.argmax(bounds))
        assert abs(best.bound - max(bounds)) < 1e-5 and abs(best.reward - rewards[best.index]) < 1e-6
        ranked = scorer.rank(PROMPT, RESPONSES, pessimism=pessimism)
        assert [result.index for result in ranked] == np.argsort(-np.array(bounds)).tolist()
        by_reward = {result.index: result.probability for result in scorer.rank(PROMPT, RESPONSES)}
        assert all(abs(by_reward[result.index] - result.probability) < 1e-6 for result in ranked)
        for normalize in (False, True):
            function = RewardFunction(scorer, normalize, pessimism=pessimism)
            shown = [(bound - 1) / 2 for bound in bounds] if normalize else bounds
            np.testing.assert_allclose(function([PROMPT] * 3, RESPONSES), shown, atol=1e-4)
            own = scorer.rank(PROMPT, RESPONSES, normalize, pessimism=pessimism)
            assert [result.index for result in own] == [result.index for result in ranked]
            assert abs(own[0].bound - max(shown)) < 1e-4
    assert type(scorer.best_of_n(PROMPT, RESPONSES, pessimism=0.0)) is type(scorer.rank(PROMPT, RESPONSES)[0])


def test_files_batches_and_servers_have_the_spread(scorer, saved, tmp_path):
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from rlhf_reward.serving.server import make_app

    scored = scorer.score([PROMPT] * 3, RESPONSES, uncertainty=True)
    spreads = [reward.spread for reward in scored]
    rows = [{"prompt": PROMPT, "response": RESPONSES[0]}, {"prompt": PROMPT, "responses": RESPONSES}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_command(["--model", saved, "--device", "cpu", "--data", str(data), "--output", str(tmp_path / "s.jsonl"),
                   "--uncertainty"])
    first, second = map(json.loads, (tmp_path / "s.jsonl").read_text().splitlines())
    assert abs(first["spread"] - spreads[0]) < 1e-5
    np.testing.assert_allclose(second["spreads"], spreads, atol=1e-5)
    score_file(scorer, str(data), str(tmp_path / "n.jsonl"), normalize=False)
    assert "spread" not in (tmp_path / "n.jsonl").read_text()
    table = BatchScorer(scorer, uncertainty=True)({"prompt": [PROMPT], "response": [RESPONSES[1]]})
    assert abs(table["spread"][0].as_py() - spreads[1]) < 1e-5
    with TestClient(make_app(scorer)) as client:
        request = {"prompts": [PROMPT] * 3, "responses": RESPONSES}
        answer = client.post("/score", json=request).json()
        np.testing.assert_allclose(answer["spread"], spreads, atol=1e-5)
        halved = client.post("/score", json={**request, "normalize": True}).json()
        np.testing.assert_allclose(halved["spread"], np.array(spreads) / 2, atol=1e-5)
        for normalize in (False, True):
            request = {"prompt": PROMPT, "responses": RESPONSES, "normalize": normalize}
            for result in client.post("/rank", json=request).json()["ranked"]:
                assert abs(result["spread"] - spreads[result["index"]] / (1 + normalize)) < 1e-5


def test_a_server_ranks_as_pessimistically_as_the_scorer(scorer, plain):
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from rlhf_reward.serving.ranking import rank_answer
    from rlhf_reward.serving.server import make_app

    request = {"prompt": PROMPT, "responses": RESPONSES}
    with TestClient(make_app(scorer)) as client:
        for pessimism, normalize in itertools.product((0, 0.5, 3, 100.0), (False, True)):
            body = {**request, "normalize": normalize, "pessimism": pessimism}
            answer = client.post("/rank", json=body).json()["ranked"]
            expected = scorer.rank(PROMPT, RESPONSES, normalize, pessimism=pessimism)
            assert [result["index"] for result in answer] == [result.index for result in expected]
            for result, own in zip(answer, expected):
                assert ("bound" in result) == bool(pessimism)
                names = ("reward", "probability", "spread", "bound") if pessimism else ("reward", "probability")
                for name in names:
                    assert abs(result[name] - getattr(own, name)) < 1e-4, (name, pessimism, normalize)
        for wrong in (-1, "1", True, None, 1e7):
            refused = client.post("/rank", json={**request, "pessimism": wrong})
            assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, ["body", "pessimism"]), wrong
        for wrong in ("NaN", "1e999", "1" + "0" * 400):
            refused = client.post("/rank", content=json.dumps(request)[:-1] + f', "pessimism": {wrong}}}')
            assert refused.status_code in (400, 422), wrong
    equal = rank_answer(["a", "b", "c"], [1.0, 3.0, 2.0], [1.0, 3.0, 2.0], spreads=[0.0, 2.0, 1.0], pessimism=1.0)
    assert [result.index for result in equal.ranked] == [0, 1, 2] # equal bounds keep their order
    with TestClient(make_app(Scorer.from_pretrained(plain, device="cpu"))) as client:
        assert client.post("/rank", json={**request, "pessimism": 0}).status_code == 200
        refused = client.post("/rank", json={**request, "pessimism": 1}).json()["detail"][0]
        assert refused["loc"] == ["body", "pessimism"] and "does not know how sure its rewards are" in refused["msg"]


def test_a_calibrated_reward_keeps_its_spread(saved):
    plain, scorer = (Scorer.from_pretrained(saved, device="cpu") for _ in range(2))
    LengthCalibration([1, 4], [0.0, 3.0], 1.0, 0.5, "rows", 1, 2, "", "").apply_to(scorer)
    before, after = (own.score([PROMPT] * 3, RESPONSES, uncertainty=True) for own in (plain, scorer))
    for words, first, second in zip((1, 2, 3), before, after): # and a token that ends them
        assert abs(second.reward - (first.reward + 1 - words)) < 1e-5 and abs(second.spread - first.spread) < 1e-5
    for pessimism in (0.5, 20.0):
        bounds = [reward.lower_bound(pessimism) for reward in after]
        best = scorer.best_of_n(PROMPT, RESPONSES, pessimism=pessimism)
        assert best.index == int(np.argmax(bounds)) and abs(best.bound - max(bounds)) < 1e-5
        function = RewardFunction(scorer, pessimism=pessimism)
        np.testing.assert_allclose(function([PROMPT] * 3, RESPONSES), bounds, atol=1e-5)


# ----- the posterior of the last layer

def test_the_posterior_is_the_inverse_curvature_and_its_prior_the_most_evident():
    generator = np.random.default_rng(0)
    differences = generator.normal(size=(60, 5)) * [3, 1, 1, 0.1, 0]
    counts = generator.choice([0.5, 1.0], 60)
    weights = generator.normal(size=5)
    result = head_posterior(differences, counts, weights)
    parameter = torch.tensor(weights)

    def loss(value):
        margins = torch.tensor(differences) @ value
        return (torch.tensor(counts) * torch.nn.functional.softplus(-margins)).sum()

    hessian = torch.autograd.functional.hessian(loss, parameter).numpy()

    def evidence(precision):
        determinant = np.linalg.slogdet(hessian / precision + np.eye(5))[1]
        return -float(loss(parameter)) - precision * weights @ weights / 2 - determinant / 2

    assert abs(result.log_evidence - evidence(result.prior_precision)) < 1e-8
    for factor in (0.5, 0.9, 1.1, 2):
        assert evidence(result.prior_precision * factor) < result.log_evidence
    covariance = np.linalg.inv(hessian + result.prior_precision * np.eye(5))
    np.testing.assert_allclose(result.factor.T @ result.factor, covariance, atol=1e-10)
    trace = np.trace(hessian @ covariance)
    assert abs(result.effective_parameters - trace) < 1e-8 and not result.at_bound
    assert head_posterior(differences, counts, weights * 1e-12).prior_precision > 1e3 * result.prior_precision
    for bad in ((differences, counts, weights * 0), (differences * 0, counts, weights)):
        with pytest.raises(ValueError, match="are 0, so that nothing tells"):
            head_posterior(*bad)


def test_a_fitted_posterior_gives_the_spread_of_rewards_and_margins(plain, base, saved, tmp_path, capsys):
    scorer = Scorer.from_pretrained(plain, device="cpu")
    before = scorer.score([PROMPT] * 3, RESPONSES)
    facts = fit_laplace(scorer, ROWS, name="rows")
    assert facts["pairs"] == 12 and facts["data"] == "rows" and 0 < facts["effective_parameters"] < 12
    states = []
    hook = scorer.model.score.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0].double()))
    model_rewards = []
    for row in ROWS:
        for name in ("chosen", "rejected"):
            ids = torch.tensor([[*word_tokenizer()(row["prompt"] + row[name])["input_ids"], 2]])
            model_rewards.append(rewards_of(scorer.model, ids))
    hook.remove()
    states = torch.cat(states).numpy()
    differences = states[0::2] - states[1::2]
    margins = differences @ scorer.model.score.weight.detach().double().numpy()[0]
    hessian = differences.T @ ((expit(margins) * expit(-margins))[:, None] * differences)
    covariance = np.linalg.inv(hessian + facts["prior_precision"] * np.eye(len(hessian)))
    centered = states - states.mean(0)
    chosen = scorer.score([row["prompt"] for row in ROWS], [row["chosen"] for row in ROWS], uncertainty=True)
    rejected = scorer.score([row["prompt"] for row in ROWS], [row["rejected"] for row in ROWS], uncertainty=True)
    for number, (first, second) in enumerate(zip(chosen, rejected)):
        expected = math.sqrt(centered[2 * number] @ covariance @ centered[2 * number])
        assert abs(first.spread - expected) < 1e-3 * expected
        expected = math.sqrt(differences[number] @ covariance @ differences[number])
        assert abs(margin_spread(first, second) - expected) < 1e-3 * expected + 1e-5
    assert scorer.score([PROMPT] * 3, RESPONSES) == before # rewards stay as they are
    # saved whole, or added to the checkpoint
    scorer.model.save_pretrained(tmp_path / "whole", word_tokenizer())
    shutil.copytree(plain, tmp_path / "added")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    laplace_command(["--model", str(tmp_path / "added"), "--device", "cpu", "--data", str(data)])
    printed, following = capsys.readouterr()
    assert "Pairs:       12 in 12 comparisons" in printed
    assert f"Next: rlhf_reward score --model {tmp_path / 'added'} --data ROWS.jsonl" in following
    weights = (tmp_path / "added" / "model.safetensors").read_bytes()
    assert weights == Path(plain, "model.safetensors").read_bytes()
    # a copy has all that was in the folder
    (tmp_path / "trained").mkdir()
    shutil.copytree(plain, tmp_path / "trained" / "model")
    (tmp_path / "trained" / "model" / "checkpoint-2").mkdir()
    (tmp_path / "trained" / "model" / "README.md").write_text("# A card")
    output = str(tmp_path / "trained" / "model" / "copied[1]") # within the folder that is copied
    options = ["--model", str(tmp_path / "trained" / "model"), "--device", "cpu", "--data", str(data)]
    laplace_command([*options, "--output", output])
    copied = {path.name for path in Path(output).iterdir()}
    card = Path(output, "README.md").read_text()
    assert card.startswith("# A card\n\n## Uncertainty\n\n") and f"12 pairs of `{data}`" in card
    assert (tmp_path / "trained" / "model" / "README.md").read_text() == "# A card"
    assert copied == {path.name for path in (tmp_path / "added").iterdir()} | {"README.md"}
    with pytest.raises(SystemExit, match="rlhf_reward laplace: .*exists; expected the name of a new folder"):
        laplace_command([*options, "--output", output])
    shutil.move(output, tmp_path / "copied")
    for name in ("whole", "added", "copied"):
        opened = Scorer.from_pretrained(tmp_path / name, device="cpu")
        again = opened.score([PROMPT] * 3, RESPONSES, uncertainty=True)
        expected = scorer.score([PROMPT] * 3, RESPONSES, uncertainty=True)
        np.testing.assert_allclose([own.spread for own in again], [own.spread for own in expected], rtol=1e-4)
        assert AutoModelForSequenceClassification.from_pretrained(tmp_path / name).config.num_labels == 1
    # it goes with its head alone
    for change, problem in (
        (lambda folder: shutil.copy(Path(saved, "model.safetensors"), folder), "laplace.* is not the head of its"),
        (lambda folder: shutil.rmtree(folder / "uncertainty"), "has no uncertainty/laplace.safetensors"),
    ):
        change(tmp_path / "added")
        with pytest.raises(ValueError, match=problem):
            RewardModel.from_pretrained(tmp_path / "added", device="cpu")
    # training forgets it
    model = RewardModel.from_pretrained(tmp_path / "whole", device="cpu")
    settings = {"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    args = RewardConfig(str(tmp_path / "run"), **settings)
    rows = Dataset.from_list(ROWS)
    trainer = RewardTrainer(model, args, train_dataset=rows, processing_class=word_tokenizer())
    trainer.train()
    trainer.save_model()
    assert not model.has_uncertainty and not (tmp_path / "run" / "uncertainty").exists()
    assert "laplace" not in json.loads((tmp_path / "run" / "config.json").read_text())["rlhf_reward"]
    # models that have no single head
    with pytest.raises(ValueError, match="has 4 heads, which have a spread already"):
        fit_laplace(Scorer.from_pretrained(saved, device="cpu"), ROWS)
    attributes = RewardModel(base, device="cpu", attributes=["clarity", "taste"])
    with pytest.raises(ValueError, match="one linear head and no attributes"):
        fit_laplace(Scorer(attributes, word_tokenizer()), ROWS)
    with pytest.raises(ValueError, match="no pair of which one response is preferred"):
        fit_laplace(scorer, [{"prompt": "w3", "responses": ["w4", "w5"], "ranks": [1, 1]}])
    assert scorer.model.posterior.facts == facts # an error leaves it as it was


# ----- figures

def test_the_figures_of_the_spread_are_those_of_their_definitions():
    generator = np.random.default_rng(1)
    margins = generator.normal(0.5, 1, 300).round(1)
    spreads = generator.uniform(0.05, 1, 300)
    result = spread_statistics(margins, spreads)
    wrong, right = np.flatnonzero(margins < 0), np.flatnonzero(margins > 0)
    ratio = spreads / np.abs(margins).clip(1e-9)
    for name, values in (("spread", spreads), ("margin", -np.abs(margins)), ("ratio", ratio)):
        above = (values[wrong][:, None] > values[right]) + 0.5 * (values[wrong][:, None] == values[right])
        assert abs(result[f"auroc_{name}"] - above.mean()) < 1e-9
    # RewardUQ's loop over bins, in both directions
    predicted = np.concatenate([expit(margins - 1.96 * spreads), 1 - expit(margins + 1.96 * spreads)])
    outcome = np.concatenate([np.ones(300), np.zeros(300)])
    bins = np.digitize(predicted, np.linspace(0, 1, 21)[1:-1])
    error = 0
    for number in range(20):
        own = bins == number
        if own.any():
            error += own.mean() * max(predicted[own].mean() - outcome[own].mean(), 0)
    assert abs(result["ebce"] - error) < 1e-9
    groups = np.array_split(np.argsort(spreads), 5)
    wrong_share = (margins < 0) + 0.5 * (margins == 0)
    assert [group["pairs"] for group in result["groups"]] == [60] * 5
    shares = [wrong_share[own].mean() for own in groups]
    np.testing.assert_allclose([group["error"] for group in result["groups"]], shares)
    confident = np.abs(margins) > 1.96 * spreads
    assert result["confident_right"] == pytest.approx((confident & (margins > 0)).mean())
    # soft labels, all right, and none
    soft = spread_statistics(margins, spreads, np.full(300, 0.75))
    assert soft["ebce"] != result["ebce"] and soft["auroc_spread"] == result["auroc_spread"]
    assert spread_statistics(np.ones(3), np.ones(3))["auroc_spread"] is None
    with pytest.raises(ValueError, match="There is no pair"):
        spread_statistics(np.array([]), np.array([]))


def test_the_over_optimization_curve_is_the_mean_over_all_subsets():
    generator = np.random.default_rng(2)
    proxy = generator.integers(0, 4, (6, 7)).astype(float) # with ties
    gold = generator.normal(size=(6, 7))
    for n in (1, 2, 5, 7):
        expected = []
        for own_proxy, own_gold in zip(proxy, gold):
            picks = []
            for subset in map(list, itertools.combinations(range(7), n)):
                best = own_proxy[subset] == own_proxy[subset].max()
                picks.append(own_gold[subset][best].mean())
            expected.append(np.mean(picks))
        np.testing.assert_allclose(expected_picks(proxy, gold, n), expected)
    curve = overoptimization(proxy, gold, np.zeros((6, 7)))
    assert [point["n"] for point in curve] == [1, 2, 4, 7]
    assert curve[0]["kl"] == 0 and curve[-1]["kl"] == pytest.approx(math.log(7) - 6 / 7)
    assert all(point["difference"]["value"] == 0 for point in curve)
    spreads = generator.uniform(0, 2, (6, 7))
    point = overoptimization(proxy, gold, spreads, pessimism=2.0)[2]
    difference = expected_picks(proxy - 2 * spreads, gold, 4) - expected_picks(proxy, gold, 4)
    assert point["difference"]["value"] == pytest.approx(difference.mean())
    assert point["difference"]["low"] < difference.mean() < point["difference"]["high"]
    for bad in ((proxy, gold[:, :3]), (proxy[0], gold[0]), (proxy, gold * np.nan)):
        with pytest.raises(ValueError, match="expected finite numbers, a row for each prompt"):
            overoptimization(*bad)


def test_an_evaluation_reports_the_spread_and_the_curves(scorer, plain, monkeypatch):
    rows = []
    for number in range(8):
        responses = [f" w{5 + (number + own) % 9} w{5 + own}" for own in range(4)]
        rows.append({"prompt": f"w{3 + number}", "responses": responses, "scores": [1.0, 2.5, 0.0, 4.0]})
    result = evaluate(scorer, rows)
    assert set(result.report) >= {"uncertainty", "overoptimization"} and "spread" in result.responses
    pairs = result.pairs
    scored = scorer.score([PROMPT], [" w5"], uncertainty=True) # keeps the scorer as it is
    assert isinstance(scored[0], UncertainReward) and len(pairs) == 48
    by_response = {}
    for line in result.responses.itertuples():
        row = rows[line.comparison]
        own, = scorer.score([row["prompt"]], [row["responses"][line.response]], uncertainty=True)
        assert abs(own.spread - line.spread) < 1e-5
        by_response[line.Index] = own
    spreads = [margin_spread(by_response[pair.winner], by_response[pair.loser]) for pair in pairs.itertuples()]
    assert result.report["uncertainty"]["spread"] == pytest.approx(np.median(spreads), rel=1e-4)
    curve = result.report["overoptimization"]
    assert curve["gold"] == "the ratings of the data" and curve["curve"][0]["gold"] == pytest.approx(1.875)
    one_head = evaluate(Scorer.from_pretrained(plain, device="cpu"), rows)
    assert "uncertainty" not in one_head.report and "overoptimization" not in one_head.report
    gold = gold_model_curve(one_head.responses, result.responses, "four heads")
    assert gold["gold"] == "the rewards of four heads" and gold["curve"][-1]["gold_pessimistic"] is None
    with pytest.raises(ValueError, match="evaluated on other responses"):
        gold_model_curve(one_head.responses, result.responses[:4], "four heads")
    one_head.report["overoptimization"] = gold
    evaluations = {"rows": {"four": result, "one": one_head}}
    monkeypatch.setattr(report, "plots", lambda evaluation: {}) # which take seconds
    text = report.report_markdown(evaluations)
    page = report.report_html(evaluations)
    for title in ("How sure it is", "Errors by spread", "Over-optimization"):
        assert f"{title}, four" in text and title in page
    assert "Over-optimization, one" in text and "How sure it is, one" not in text
    json.dumps(report.report_json(evaluations), allow_nan=False, default=str)
