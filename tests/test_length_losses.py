"Losses against length: by hand, what they do to a reward that can learn length, and in training."
import math

import numpy as np
import pytest
import torch
from architectures import save_language_model, word_tokenizer
from datasets import Dataset

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, tokenize_rows
from rlhf_reward.length_losses import LENGTH_LOSSES, LengthResidual, NoLengthLoss, Odin
from rlhf_reward.length_losses import correlation, start_length_loss
from rlhf_reward.losses import BradleyTerry
from rlhf_reward.packing import branch_comparisons, pack_comparisons, pad_comparisons
from rlhf_reward.scoring import Scorer

PAIRS = []
for number in range(8):
    words = [f"w{3 + (number * step) % 50}" for step in range(2, 9)]
    chosen = " ".join(words[number % 3 :])
    PAIRS.append({"prompt": f"w{number + 3}", "chosen": f" {chosen}", "rejected": f" {words[0]}"})
BATCH = {
    "ranks": torch.tensor([[1, 2, 0], [2, 1, 3], [1, 1, 0], [0, 0, 0]]), # the last fills up a step
    "weights": torch.tensor([1.0, 0.5, 1.0, 0.0]),
    "lengths": torch.tensor([[9.0, 4.0, 0.0], [5.0, 7.0, 2.0], [8.0, 1.0, 0.0], [1.0, 1.0, 0.0]]),
}


def test_the_residual_is_the_regression_of_all_pairs():
    torch.manual_seed(0)
    rewards = torch.randn(4, 3, requires_grad=True)
    compared, term = LengthResidual(2.0).in_training(rewards, None, BATCH, None)
    pairs = [(0, 0, 1, 1.0), (1, 1, 0, 0.5), (1, 1, 2, 0.5), (1, 0, 2, 0.5)] # comparison, winner, loser, weight
    differences, lengths, weights = [], [], []
    for row, winner, loser, weight in pairs:
        differences.append((rewards[row, winner] - rewards[row, loser]).item())
        lengths.append((BATCH["lengths"][row, winner] - BATCH["lengths"][row, loser]).item())
        weights.append(weight)
    scale = np.sqrt(weights)
    slope = np.linalg.lstsq((scale * lengths)[:, None], scale * differences, rcond=None)[0][0]
    for (row, winner, loser, _), difference, length in zip(pairs, differences, lengths):
        left = compared[row, winner] - compared[row, loser]
        assert left.item() == pytest.approx(difference - slope * length, abs=1e-5)
    assert term.item() == pytest.approx(2 * np.average((slope * np.array(lengths)) ** 2, weights=weights), rel=1e-4)
    # nothing is gained by length: neither value nor gradient
    other, _ = LengthResidual(2.0).in_training(rewards + 0.3 * BATCH["lengths"], None, BATCH, None)
    loss = BradleyTerry()
    torch.testing.assert_close(loss(other, BATCH["ranks"]), loss(compared, BATCH["ranks"]), atol=1e-5, rtol=0)
    gradient, = torch.autograd.grad((loss(compared, BATCH["ranks"]) * BATCH["weights"]).sum(), rewards)
    assert abs((gradient * BATCH["lengths"]).sum().item()) < 1e-4 < gradient.abs().max()
    same = {**BATCH, "lengths": torch.full_like(BATCH["lengths"], 4)} # no two lengths: nothing to take away
    compared, term = LengthResidual(2.0).in_training(rewards, None, same, None)
    assert term == 0 and torch.equal(compared, rewards)


def test_odin_is_its_formula():
    torch.manual_seed(0)
    outputs = torch.randn(9, 2) # the last two are of the comparison that fills up
    head = torch.randn(2, 6)
    sums, term = Odin(0.5).in_training(torch.zeros(4, 3), outputs, BATCH, head)
    expected = outputs.sum(dim=1)
    assert sums.tolist() == [[*expected[:2], 0], list(expected[2:5]), [*expected[5:7], 0], [0, 0, 0]]
    lengths = [9.0, 4, 5, 7, 2, 8, 1]
    quality, length = (np.corrcoef(outputs[:7, column], lengths)[0, 1] for column in range(2))
    cosine = (head[0] @ head[1] / head[0].norm() / head[1].norm()).item()
    assert term.item() == pytest.approx(0.5 * (abs(quality) - length) + abs(cosine), abs=1e-5)
    assert correlation(torch.ones(3), torch.arange(3.0)) == 0 # and no NaN


def test_a_reward_that_can_learn_length_does_not():
    "A linear reward of two features: what people prefer for, and the length, by which most winners can be told."
    draw = torch.Generator().manual_seed(0)
    good = torch.randn(200, 2, generator=draw)
    lengths = 20 + 5 * torch.randn(200, 2, generator=draw)
    utility = good + (lengths - 20) / 5
    ranks = 1 + (utility < utility.flip(1)).long()
    batch = {"ranks": ranks, "weights": torch.ones(200), "lengths": lengths}
    features = torch.stack([good, (lengths - 20) / 5], dim=2) # (200, 2, 2)
    learned = {}
    for name, make in LENGTH_LOSSES.items():
        head = torch.tensor([[0.1, 0.5], [0.5, 0.1]], requires_grad=True)
        optimizer = torch.optim.Adam([head], 0.1)
        for _ in range(40):
            outputs = (features @ head.T).flatten(0, 1)
            rewards = outputs[:, 0].reshape(200, 2)
            compared, term = make(1.0).in_training(rewards, outputs, batch, head)
            optimizer.zero_grad()
            (BradleyTerry()(compared, ranks).mean() + term).backward()
            optimizer.step()
        learned[name] = (head[0, 1] / head[0, 0]).item() # of length, relative to what counts
    assert learned["none"] > 0.7
    assert abs(learned["residual"]) < 0.25 and abs(learned["odin"]) < 0.25


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_language_model("llama", tmp_path_factory.mktemp("base"))


def arguments(folder, **options):
    defaults = dict(report_to="none", use_cpu=True, save_strategy="no", max_steps=2, learning_rate=0.01)
    return RewardConfig(str(folder), disable_tqdm=True, logging_strategy="no", **{**defaults, **options})


@pytest.mark.parametrize("name", ["residual", "odin"])
def test_training_with_a_length_loss(base, tmp_path, name):
    rows = Dataset.from_list(PAIRS)
    attributes = ["quality", "length"] if name == "odin" else None
    torch.manual_seed(0)
    model = RewardModel(base, 0.0, "cpu", attributes=attributes)
    sets = {"train_dataset": rows, "eval_dataset": rows}
    args = arguments(tmp_path, length_loss=name)
    trainer = RewardTrainer(model, args, **sets, processing_class=word_tokenizer())
    kept = trainer.length_loss
    before = trainer.evaluate()["eval_loss"]
    trainer.length_loss = NoLengthLoss() # an evaluation is of the rewards alone, whatever its batches
    assert trainer.evaluate()["eval_loss"] == before
    trainer.length_loss = kept
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    model.train()
    rewards, losses, _ = trainer._losses(model, batch)
    trainer.length_loss = NoLengthLoss()
    plain = trainer._losses(model, batch)
    torch.testing.assert_close(rewards, plain[0])
    assert not torch.allclose(losses, plain[1], atol=1e-4)
    trainer.length_loss = kept
    trainer.train()
    trainer.save_model()
    opened = Scorer.from_pretrained(tmp_path, "cpu")
    if name == "odin":
        assert opened.model.attribute_weights == {"quality": 1.0, "length": 0.0}
        reward, = opened.score([PAIRS[0]["prompt"]], [PAIRS[0]["chosen"]], attributes=True)
        assert reward.reward == reward.attributes["quality"]


def test_lengths_are_those_of_the_responses_in_every_layout():
    rows = [{"prompt": "w3 w4", "responses": [" w5", " w5 w6", ""], "ranks": [1, 2, 3]}]
    rows.append({"prompt": "w3", "responses": [" w5 w6 w7", " w5"], "ranks": [2, 1]})
    examples = list(tokenize_rows(Dataset.from_list(rows), word_tokenizer(), 32, response_starts=True))
    for collate in (pad_comparisons, pack_comparisons, branch_comparisons):
        assert collate(examples)["lengths"].tolist() == [[2, 3, 1], [4, 2, 0]] # with the end-of-sequence token
    assert "lengths" not in pad_comparisons(list(tokenize_rows(Dataset.from_list(rows), word_tokenizer(), 32)))


def test_what_cannot_be_trained_is_refused(base, tmp_path):
    model = RewardModel(base, 0.0, "cpu")
    cases = [
        (dict(length_loss="odin"), r"attributes \[\]; expected \['quality', 'length'\]"),
        (dict(length_loss="residual", per_device_train_batch_size=2), "expected 4 or more"),
        (dict(length_loss="residual", loss="regression"), "a loss that compares rewards"),
        (dict(length_coefficient=-1.0), "length_coefficient is -1.0"),
        (dict(length_coefficient=math.inf), "length_coefficient is inf"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            start_length_loss(arguments(tmp_path, **options), model)
    with pytest.raises(ValueError, match="'odin', and the model has 3 heads; expected one head"):
        start_length_loss(arguments(tmp_path, length_loss="odin"), RewardModel(base, 0.0, "cpu", heads=3))
    assert type(start_length_loss(arguments(tmp_path), model)) is NoLengthLoss
    tokenized = tokenize_rows(Dataset.from_list(PAIRS), word_tokenizer(), 32)
    args = arguments(tmp_path, length_loss="residual")
    trainer = RewardTrainer(model, args, train_dataset=tokenized, processing_class=word_tokenizer())
    with pytest.raises(ValueError, match="response_starts=True"):
        trainer.train()
