"Each figure of an evaluation against an independent computation, and planted facts that the report has to find."

import itertools
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from architectures import save_language_model, word_tokenizer
from datasets import Dataset
from programs import run
from scipy.stats import binomtest

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer
from rlhf_reward import cli as commands
from rlhf_reward.data import Comparison, to_comparison
from rlhf_reward.evaluation import (
    Evaluation,
    Rule,
    best_of_n,
    calibration,
    compare,
    evaluate,
    interval,
    jackknife,
    length_bias,
    pair_table,
    ranking,
    response_table,
    statistics,
    without_prompt,
)
from rlhf_reward.intervals import sign_flip_p_value
from rlhf_reward.scoring import Scorer


def table(rewards, ranks, ratings=None, prompts=None, tokens=None, blind=None):
    "Return a response table of given numbers."
    comparisons = []
    for index, (own_ranks, prompt) in enumerate(zip(ranks, prompts or range(len(ranks)))):
        responses = tuple(map(str, range(len(own_ranks))))
        own_ratings = None if ratings is None else tuple(ratings[index])
        comparisons.append(Comparison(str(prompt), responses, tuple(own_ranks), own_ratings))
    tokens = tokens or [[1] * len(own_ranks) for own_ranks in ranks]
    return response_table(comparisons, rewards, blind or rewards, tokens)


def count_characters(prompt, response):
    return float(len(response))


def random_table(count=200, seed=0):
    "Return rewards, ranks, prompts and lengths in tokens of comparisons of two to six responses."
    generator = random.Random(seed)
    ranks = []
    for _ in range(count):
        size = generator.randint(2, 6)
        ranks.append([generator.randint(1, 3) for _ in range(size)])
    rewards = []
    for own_ranks in ranks:
        rewards.append([round(generator.gauss(-rank, 1), 1) for rank in own_ranks]) # rounded: some tie
    prompts = [generator.randrange(60) for _ in ranks]
    tokens = []
    for own_ranks in ranks:
        tokens.append([generator.randint(1, 50) for _ in own_ranks])
    return rewards, ranks, prompts, tokens


# ----- intervals


def test_interval_of_independent_pairs():
    values = np.array([1] * 70 + [0] * 30)
    result = interval(values, np.arange(100))
    error = 1.96 * math.sqrt(0.7 * 0.3 / 100)
    assert result["value"] == 0.7
    assert result["low"] == pytest.approx(0.7 - error, abs=0.015)
    assert result["high"] == pytest.approx(0.7 + error, abs=0.015)
    assert interval(values, np.arange(100)) == result
    uneven = np.linspace(0, 1, 100)
    assert (
        interval(uneven, np.arange(100))
        == interval(uneven, np.arange(100))
        != interval(uneven, np.arange(100), seed=1)
    ) # by the seed alone
    assert interval(values, np.zeros(100)) == {
        "value": 0.7,
        "low": 0.0,
        "high": 1.0,
    } # one prompt tells nothing about others


def test_pairs_to_one_prompt_make_nothing_surer():
    values = np.array([1] * 70 + [0] * 30)
    prompts = np.arange(100)
    once = interval(values, prompts)
    often = interval(np.repeat(values, 9), np.repeat(prompts, 9))
    assert often == pytest.approx(once)
    alone = interval(np.repeat(values, 9), np.arange(900))
    assert alone["high"] - alone["low"] < 0.4 * (once["high"] - once["low"])


def test_interval_of_clusters_against_the_sandwich():
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 9, 300)
    values = np.concatenate([(draw.random(size) < share) * 1.0 for size, share in zip(sizes, draw.beta(2, 1, 300))])
    prompts = np.repeat(np.arange(300), sizes)
    residuals = np.array([(values[prompts == prompt] - values.mean()).sum() for prompt in range(300)])
    error = 1.96 * math.sqrt((residuals**2).sum()) / len(values) # of a ratio, linearised
    result = interval(values, prompts)
    assert (result["high"] - result["low"]) / 2 == pytest.approx(error, rel=0.1)


def test_interval_covers_what_it_says():
    draw = np.random.default_rng(1)
    inside = 0
    for repetition in range(200):
        values = (draw.random(120).reshape(40, 3) < draw.beta(4, 2, 40)[:, None]).astype(float).ravel() # mean 2/3
        result = interval(values, np.repeat(np.arange(40), 3), seed=repetition)
        inside += result["low"] <= 2 / 3 <= result["high"]
    assert 0.89 <= inside / 200 <= 0.99


def test_interval_where_all_are_right_or_wrong():
    right = interval(np.ones(20), np.repeat(np.arange(10), 2))
    assert right == {
        "value": 1.0,
        "low": pytest.approx(0.025 ** (1 / 10)),
        "high": 1.0,
    } # Clopper–Pearson, by hand: ten prompts
    wrong = interval(np.zeros(20), np.repeat(np.arange(10), 2))
    assert wrong == {"value": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025 ** (1 / 10))}
    with pytest.raises(ValueError, match="There is no pair"):
        interval(np.array([]), np.array([]))


def test_interval_of_differences():
    "From −1 to 1, and the same either way round."
    values = np.array([1.0, -1, 0, 0.5, 1, 0])
    prompts = np.array([0, 0, 1, 2, 3, 4])
    one = interval(values, prompts, lowest=-1)
    other = interval(-values, prompts, lowest=-1)
    assert one["value"] == -other["value"]
    assert one["low"] == pytest.approx(-other["high"], abs=0.05)
    assert one["high"] == pytest.approx(-other["low"], abs=0.05)
    assert interval(np.array([1.0, 0, 0.5]), np.zeros(3), lowest=-1) == {"value": 0.5, "low": -1.0, "high": 1.0}
    better, worse = (interval(sign * np.ones(10), np.arange(10), lowest=-1) for sign in (1, -1))
    assert better == {"value": 1.0, "low": pytest.approx(2 * 0.025 ** (1 / 10) - 1), "high": 1.0}
    assert worse == {"value": -1.0, "low": -1.0, "high": pytest.approx(1 - 2 * 0.025 ** (1 / 10))}


def test_the_order_of_rows_changes_no_interval():
    rule = Rule(count_characters)
    one = evaluate(rule, ROWS).report
    other = evaluate(rule, random.Random(0).sample(ROWS, len(ROWS))).report
    assert one["accuracy_interval"] == other["accuracy_interval"]
    assert one["length"]["controlled_accuracy"] == other["length"]["controlled_accuracy"]
    assert one["accuracy_interval"] != evaluate(rule, ROWS, seed=1).report["accuracy_interval"]


# ----- accuracy and its like


def test_accuracy_and_counts_by_a_plain_loop():
    rewards, ranks, prompts, tokens = random_table()
    result = statistics(table(rewards, ranks, prompts=prompts, tokens=tokens))
    pairs = []
    for own_rewards, own_ranks, own_tokens in zip(rewards, ranks, tokens):
        for winner, loser in itertools.permutations(range(len(own_ranks)), 2):
            if own_ranks[winner] < own_ranks[loser]:
                pairs.append((own_rewards[winner] - own_rewards[loser], own_tokens[winner] - own_tokens[loser]))

    def share(values):
        return sum(1 if value > 0 else 0.5 if value == 0 else 0 for value in values) / len(values)

    assert result["pairs"] == len(pairs)
    assert result["comparisons"] == 200
    assert result["responses"] == sum(map(len, ranks))
    assert (
        result["accuracy"]
        == pytest.approx(share([margin for margin, _ in pairs]))
        == result["accuracy_interval"]["value"]
    )
    assert result["tied_rewards"] == sum(margin == 0 for margin, _ in pairs) > 0
    assert result["baselines"]["longer wins"]["value"] == pytest.approx(share([longer for _, longer in pairs]))
    assert result["baselines"]["shorter wins"]["value"] == pytest.approx(1 - share([longer for _, longer in pairs]))
    random_share = statistics(table([[1.0, 2.0]] * 400, [[1, 2]] * 400))["baselines"]["random"]
    assert random_share["value"] == 0.5
    assert random_share["low"] == pytest.approx(0.5 - 1.96 * 0.5 / 20, abs=0.004) # 400 tosses of a coin
    assert random_share["high"] == pytest.approx(0.5 + 1.96 * 0.5 / 20, abs=0.004)
    assert result["length"]["chosen_longer"]["pairs"] == sum(longer > 0 for _, longer in pairs)
    assert result["length"]["chosen_shorter"]["accuracy"]["value"] == pytest.approx(
        share([margin for margin, longer in pairs if longer < 0])
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_every_interval_is_by_prompts():
    "Nine copies of each comparison, to the same prompt, make none of them narrower."
    generator = random.Random(0)

    def draw_pairs():
        return [[generator.gauss(0, 1), generator.gauss(0, 1)] for _ in range(60)]

    rewards = draw_pairs()
    tokens = [[round(20 + 9 * first), round(20 + 9 * second)] for first, second in draw_pairs()]
    blind = draw_pairs()

    def make(copies):
        responses = table(
            rewards * copies,
            [[1, 2]] * 60 * copies,
            prompts=list(range(60)) * copies,
            tokens=tokens * copies,
            blind=blind * copies,
        )
        return statistics(responses)

    once = make(1)
    often = make(9)
    assert once["prompts"] == often["prompts"] == 60
    assert often["comparisons"] == 540
    assert often["pairs"] == 540

    def flat(report):
        return {
            "accuracy": report["accuracy_interval"],
            **{name: share for name, share in report["baselines"].items() if name != "random"},
            "controlled": report["length"]["controlled_accuracy"],
            "longer": report["length"]["chosen_longer"]["accuracy"],
            "shorter": report["length"]["chosen_shorter"]["accuracy"],
        }

    for name, result in flat(often).items():
        assert result == pytest.approx(flat(once)[name]), name
    assert (
        make(1)["accuracy_interval"]
        != statistics(table(rewards, [[1, 2]] * 60, tokens=tokens), seed=1)["accuracy_interval"]
    )


def test_the_same_prompt_is_known_however_it_is_written():
    made = [
        Comparison("Is it so?", ("a", "b"), (1, 2)),
        Comparison("is  it so?", ("a", "b"), (1, 2)),
        *(to_comparison({"chosen": f"{start} a", "rejected": f"{start} b"}) for start in ("x", "x")),
    ] # of these nothing says what the prompt is
    assert response_table(made, [[1.0, 0.0]] * 4, [[1.0, 0.0]] * 4, [[1, 1]] * 4)["prompt"].tolist() == [
        0,
        0,
        0,
        0,
        1,
        1,
        2,
        2,
    ]


@pytest.mark.parametrize(
    "values, prompts, lowest",
    [
        ([1, 1, 0] * 4, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], 0),
        ([0.5] * 6, range(6), 0),
        ([1, 1], [0, 1], 0),
        ([0, 0, 0], range(3), -1),
    ],
)
def test_prompts_that_all_agree_leave_room(values, prompts, lowest):
    "Nothing is drawn, and few prompts are no certainty: as many others as the exact interval allows differ."
    result = interval(np.array(values, dtype=float), np.array(prompts), lowest=lowest)
    most = binomtest(0, len(set(prompts))).proportion_ci(method="exact").high
    value = np.mean(values)
    assert result == pytest.approx(
        {"value": value, "low": (1 - most) * value + most * lowest, "high": (1 - most) * value + most}
    )
    assert most > 0.3


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=20)
    result = jackknife(values.mean(), np.array([np.delete(values, place).mean() for place in range(20)]))
    low, high = scipy.stats.t.interval(0.95, 19, values.mean(), scipy.stats.sem(values))
    assert result == pytest.approx(
        {"value": values.mean(), "error": scipy.stats.sem(values), "low": low, "high": high}
    )
    assert jackknife(1.0, np.ones(20)) is None


def test_two_models_that_differ_on_one_prompt():
    made = [Comparison(f"p{row}", ("aaa" if row else "a", "bb"), (1, 2)) for row in range(30)]
    (result,) = compare(
        {
            "one": evaluate(Rule(lambda prompt, response: len(response)), made),
            "other": evaluate(Rule(lambda prompt, response: response[0] == "a"), made),
        }
    )["pairs"]
    assert result["p_value"] == 1
    assert "mcnemar" not in result
    assert (result["only_first"], result["only_second"]) == (0, 1)
    assert result["score_difference"] is None


def test_a_rule_meets_no_prompt_where_there_is_none():
    "As strings and as messages; and it may give whatever is a number."
    question = [{"role": "user", "content": "which"}]
    good = [{"role": "assistant", "content": "good"}]
    bad = [{"role": "assistant", "content": "bad"}]
    for made in (
        Comparison("which", ("good", "bad"), (1, 2)),
        Comparison(question, (good, bad), (1, 2)),
    ):
        result = evaluate(Rule(lambda prompt, response: bool(prompt) and "good" in str(response)), [made]).report
        assert result["accuracy"] == 1
        assert result["baselines"]["prompt-blind"]["value"] == 0.5


def test_tools_are_of_the_prompt():
    made = Comparison(
        [{"role": "user", "content": "q"}],
        ([{"role": "assistant", "content": "a"}],),
        (1,),
        template={"tools": [{"name": "search"}], "thinking": True},
    )
    assert without_prompt(made).template == {"thinking": True}


def test_what_rewards_reach_by_chance():
    "A constant model reaches it exactly, random rewards on average."
    generator = np.random.default_rng(0)
    ranks = [[1, 2, 2, 3], [2, 1, 1], [1, 2]]
    constant = ranking(table([[0.0] * len(own) for own in ranks], ranks))
    assert (constant["best_found"], constant["ndcg"]) == pytest.approx(
        (constant["by_chance"]["best_found"], constant["by_chance"]["ndcg"])
    )
    assert constant["by_chance"]["best_found"] == pytest.approx((1 / 4 + 2 / 3) / 2)
    many_ranks = 300 * ranks
    rewards = [generator.random(len(own)).tolist() for own in many_ranks]
    drawn = ranking(table(rewards, many_ranks))
    assert drawn["best_found"] == pytest.approx(constant["best_found"], abs=0.05)
    assert drawn["ndcg"] == pytest.approx(constant["ndcg"], abs=0.015)
    assert drawn["by_chance"] == pytest.approx(constant["by_chance"])
    assert constant["best_found_interval"]["value"] == constant["best_found"]


def test_rewards_that_are_not_finite_name_their_row():
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": 7},
        {"prompt": "p", "chosen": "c", "rejected": "d"},
    ]
    with pytest.raises(ValueError, match="^Row 3 of rows.jsonl: The rule gives .*nan"):
        evaluate(Rule(lambda prompt, response: math.nan if response == "c" else 1.0), rows, "skip", "rows.jsonl")
    with pytest.raises(ValueError, match="^Row 40 of the data: "):
        evaluate(
            Rule(lambda prompt, response: math.nan if not prompt and response == "d" else 1.0),
            [rows[0], rows[2]],
            numbers=[7, 40],
        ) # without the prompt


def test_what_cannot_be_evaluated():
    with pytest.raises(ValueError, match="2 rewards are not finite, the first of comparison 2"):
        statistics(table([[1.0, 2.0], [math.nan, 1.0], [1.0, math.inf]], [[1, 2]] * 3))
    with pytest.raises(ValueError, match="no pair in which people prefer"):
        statistics(table([[1.0, 2.0]], [[1, 1]]))
    with pytest.raises(ValueError, match="No comparison of rows.jsonl is left: it has no rows"):
        evaluate(Rule(lambda prompt, response: 0.0), [], name="rows.jsonl")


# ----- calibration


def test_calibration_by_hand():
    margins = np.array(
        [math.log(3)] * 4 + [-math.log(3)] * 4 + [math.log(0.96 / 0.04)] * 2
    ) # 75 % sure and right in half, 96 % sure and always right
    result = calibration(margins)
    assert [(one["pairs"], one["accuracy"]) for one in result["bins"]] == [(8, 0.5), (2, 1.0)]
    assert [one["confidence"] for one in result["bins"]] == pytest.approx([0.75, 0.96])
    assert result["ece"] == pytest.approx(0.8 * 0.25 + 0.2 * 0.04)
    assert result["log_loss"] == pytest.approx(-(4 * math.log(0.75) + 4 * math.log(0.25) + 2 * math.log(0.96)) / 10)


def test_calibration_against_scikit_learn():
    draw = np.random.default_rng(0)
    strength = draw.normal(0, 2, 20_000) # of the first over the second response, as people are
    margins = np.where(
        draw.random(20_000) < 1 / (1 + np.exp(-strength)), strength, -strength
    ) # of the one that is preferred
    result = calibration(margins)
    probability = 1 / (1 + np.exp(-np.abs(margins)))
    assert result["log_loss"] == pytest.approx(sklearn.metrics.log_loss(margins > 0, probability), rel=1e-6)
    accuracy, confidence = sklearn.calibration.calibration_curve(
        margins > 0, probability * 2 - 1, n_bins=10
    ) # bins of 0.5 to 1, stretched to 0 to 1
    assert [one["accuracy"] for one in result["bins"]] == pytest.approx(accuracy)
    assert [one["confidence"] for one in result["bins"]] == pytest.approx((confidence + 1) / 2)
    assert result["ece"] < 0.01
    assert result["temperature"] == pytest.approx(1, abs=0.05)
    assert calibration(3 * margins)["temperature"] == pytest.approx(3, abs=0.15) # three times too sure
    assert calibration(3 * margins)["log_loss_at_temperature"] == pytest.approx(
        result["log_loss_at_temperature"], rel=1e-4
    )
    assert calibration(3 * margins)["log_loss_at_temperature"] < calibration(3 * margins)["log_loss"]
    assert calibration(5000 * margins)["temperature"] == pytest.approx(5000, rel=0.05)
    assert calibration(margins)["at_bound"] is None


def test_calibration_where_there_is_nothing_to_fit():
    tied = calibration(np.zeros(4))
    assert tied["temperature"] is None
    assert tied["ece"] == 0
    assert tied["log_loss_at_temperature"] == tied["log_loss"] == pytest.approx(math.log(2))
    right = calibration(np.ones(4))
    wrong = calibration(-np.ones(4))
    assert right["at_bound"] == "lower"
    assert right["temperature"] < 0.01
    assert wrong["at_bound"] == "upper"
    assert wrong["temperature"] > 100
    half_ties = calibration(np.array([2.0, 0.0, 0.0, -2.0])) # a tie is half right, and half sure
    assert half_ties["bins"][0] == {"confidence": 0.5, "accuracy": 0.5, "pairs": 2}


# ----- length


def lengths_and_quality(count=400, seed=0):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(5, 60, (count, 2))
    quality = draw.normal(0, 1, (count, 2))
    ranks = [[1, 2] if own[0] > own[1] else [2, 1] for own in quality]
    return tokens, quality, ranks


def test_a_model_that_is_length_is_called_so():
    tokens, quality, ranks = lengths_and_quality()
    responses = table((0.1 * tokens - 3).astype(np.float32).tolist(), ranks, tokens=tokens.tolist())
    result = length_bias(responses, pair_table(responses))
    assert result["pearson"] == pytest.approx(1)
    assert result["spearman"] == pytest.approx(1)
    assert result["reward_per_token"] == pytest.approx(0.1)
    assert result["controlled_accuracy"]["value"] == 0.5
    assert result["chosen_longer"]["accuracy"]["value"] == 1
    assert result["chosen_shorter"]["accuracy"]["value"] == 0
    same = sum(int(one == other) for one, other in tokens)
    assert result["same_length"]["pairs"] == same > 0
    assert result["same_length"]["accuracy"]["value"] == 0.5
    assert result["chosen_longer"]["pairs"] + result["chosen_shorter"]["pairs"] + same == 400


@pytest.mark.parametrize("offset, slope", [(10, 0.001), (1000, 0.001), (1000, 1.0), (0, 1e-4)])
def test_float32_has_no_more_digits(offset, slope):
    tokens, quality, ranks = lengths_and_quality()
    responses = table((offset + slope * tokens).astype(np.float32).tolist(), ranks, tokens=tokens.tolist())
    assert length_bias(responses, pair_table(responses))["controlled_accuracy"]["value"] == 0.5


def test_a_little_quality_is_seen_through_the_length():
    tokens, quality, ranks = lengths_and_quality()
    responses = table((0.01 * quality + tokens).astype(np.float32).tolist(), ranks, tokens=tokens.tolist())
    assert length_bias(responses, pair_table(responses))["controlled_accuracy"]["value"] > 0.9


def test_lengths_are_those_of_whole_responses():
    "Also those of responses that begin alike: a length-only model is exposed."
    made = []
    for row in range(60):
        start = "same start " * (row % 4)
        responses = tuple(start + "x" * (1 + (row * k) % 9) for k in (2, 5))
        made.append(Comparison("p " * (row % 5), responses, (1, 2)))
    result = evaluate(Rule(count_characters), made)
    texts = itertools.chain.from_iterable(comparison.responses for comparison in made)
    assert result.report["length"]["pearson"] == pytest.approx(1)
    assert result.responses["tokens"].tolist() == list(map(len, texts))


def test_length_is_taken_out_of_a_model_that_knows_more():
    tokens, quality, ranks = lengths_and_quality()
    responses = table((quality + 0.2 * tokens).tolist(), ranks, tokens=tokens.tolist())
    result = length_bias(responses, pair_table(responses))
    assert result["reward_per_token"] == pytest.approx(0.2, abs=0.01)
    assert result["controlled_accuracy"]["value"] > 0.9
    assert statistics(responses)["accuracy"] < 0.7
    reward, length = (responses[name].to_numpy(float) for name in ("reward", "tokens"))
    assert result["pearson"] == pytest.approx(np.corrcoef(reward, length)[0, 1])
    assert result["spearman"] == pytest.approx(
        np.corrcoef(scipy.stats.rankdata(reward), scipy.stats.rankdata(length))[0, 1]
    )


def test_length_where_there_is_none():
    responses = table([[1.0, 2.0], [2.0, 1.0]], [[1, 2], [1, 2]])
    result = length_bias(responses, pair_table(responses))
    assert result["pearson"] is None
    assert result["chosen_longer"] == {"pairs": 0, "accuracy": None}
    assert result["controlled_accuracy"]["value"] == 0.5


# ----- more than two responses


def test_ranking_by_hand():
    # right order; best of three second; two share the highest reward, one of them the best; all tie; not more than two
    rewards = [[3.0, 2.0, 1.0], [2.0, 3.0, 1.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0], [1.0, 2.0]]
    ranks = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2]]
    result = ranking(table(rewards, ranks))
    assert result["comparisons"] == 4
    assert result["without_tau"] == 1
    assert result["best_found"] == pytest.approx((1 + 0 + 1 / 2 + 1 / 3) / 4)
    tau_with_a_tie = 2 / math.sqrt(2 * 3) # concordant 2, discordant 0; 1 of 3 pairs tied in the rewards
    assert result["kendall_tau"] == pytest.approx((1 + 1 / 3 + tau_with_a_tie) / 3)
    discount = [1, 1 / math.log2(3), 1 / 2]
    ideal = 2 * discount[0] + 1 * discount[1]
    gains = [
        ideal,
        1 * discount[0] + 2 * discount[1],
        1.5 * (discount[0] + discount[1]),
        1 * sum(discount),
    ] # ties share their places
    assert result["ndcg"] == pytest.approx(sum(gain / ideal for gain in gains) / 4)
    assert ranking(table([[1.0, 2.0]], [[1, 2]])) is None
    assert (
        ranking(table([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], [[1, 1, 1], [1, 2, 3]]))["comparisons"] == 1
    ) # where all tie there is no best
    assert ranking(table([[1.0, 1.0, 1.0]], [[1, 2, 3]]))["kendall_tau"] is None


def expected_ratings(rewards, ratings, n):
    "Return the expected ratings of the pick and of the best, over all subsets of n responses."
    picked = []
    best = []
    for subset in itertools.combinations(range(len(rewards)), n):
        top = max(rewards[index] for index in subset)
        # equal rewards: each is worth the mean of all with this reward
        picked.append(np.mean([rating for reward, rating in zip(rewards, ratings) if reward == top]))
        best.append(max(ratings[index] for index in subset))
    return np.mean(picked), np.mean(best)


def test_best_of_n_against_all_subsets():
    generator = random.Random(0)
    rewards = []
    for _ in range(6):
        rewards.append([generator.choice([0.0, 1.0, 2.0, 3.0, 4.0]) for _ in range(5)])
    rewards.append([1.0, 2.0]) # has no third response
    ratings = []
    for own_rewards in rewards:
        ratings.append([float(generator.randint(1, 9)) for _ in own_rewards])
    curve = best_of_n(table(rewards, [[1] + [2] * (len(own) - 1) for own in rewards], ratings))
    # all points are of the same six
    assert [(point["n"], point["comparisons"]) for point in curve] == [(n, 6) for n in range(1, 6)]
    for point in curve:
        picked = []
        best = []
        for own_rewards, own_ratings in zip(rewards[:6], ratings[:6]):
            picked_rating, best_rating = expected_ratings(own_rewards, own_ratings, point["n"])
            picked.append(picked_rating)
            best.append(best_rating)
        assert point["picked"] == pytest.approx(np.mean(picked))
        assert point["best"] == pytest.approx(np.mean(best))
    assert curve[0]["picked"] == pytest.approx(curve[0]["mean"]) == pytest.approx(curve[0]["best"])
    assert best_of_n(table([[1.0, 2.0]], [[1, 2]])) == []
    pairs_and_a_triple = best_of_n(
        table(
            [[1.0, 2.0]] * 10 + [[1.0, 2.0, 3.0]], [[1, 2]] * 10 + [[1, 2, 3]], [[1.0, 2.0]] * 10 + [[1.0, 2.0, 3.0]]
        )
    )
    assert [(point["n"], point["comparisons"]) for point in pairs_and_a_triple] == [
        (1, 10),
        (2, 10),
    ] # where most responses are
    assert best_of_n(table([[1.0, 2.0]], [[1, 2]], [[3.0, math.nan]])) == [] # of each response there has to be one


# ----- a model on comparisons

ROWS = [
    Comparison(
        f"question {row % 40}",
        (f"answer {'x' * (row % 7)}", f"reply {'y' * (row % 5)} {row}"),
        (1, 2) if row % 3 else (2, 1),
        source="one" if row % 2 else "two",
    )
    for row in range(120)
]


def test_the_prompt_is_left_out():
    result = evaluate(Rule(lambda prompt, response: float(len(prompt) > 0 and response.startswith("answer"))), ROWS)
    assert result.report["accuracy"] == pytest.approx(2 / 3)
    assert result.report["baselines"]["prompt-blind"]["value"] == 0.5
    messages = Comparison(
        [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        ([{"role": "assistant", "content": "a"}],) * 2,
        (1, 2),
    )
    assert without_prompt(messages).prompt == [{"role": "user", "content": ""}]
    assert without_prompt(messages).responses == messages.responses
    ids = to_comparison({"chosen_ids": [3, 4, 5], "rejected_ids": [3, 4]})
    assert without_prompt(ids).prompt == []
    assert without_prompt(ids).responses == ([5], [4])


def test_sources_apart():
    result = evaluate(Rule(count_characters), ROWS)
    for source in ("one", "two"):
        alone = evaluate(Rule(count_characters), [row for row in ROWS if row.source == source]).report
        assert result.report["sources"][source] == {
            name: value for name, value in alone.items() if name not in ("sources", "left_out", "omitted")
        }


def test_rows_without_a_source_are_counted_too():
    mixed = [*ROWS[:60], *(replace(row, source=None) for row in ROWS[60:70]), replace(ROWS[70], source=7)]
    result = evaluate(Rule(count_characters), mixed)
    assert {name: of["comparisons"] for name, of in result.report["sources"].items()} == {
        "(no source)": 10,
        "7": 1,
        "one": 30,
        "two": 30,
    }
    assert None in {mistake["source"] for mistake in result.mistakes(100)}
    assert evaluate(Rule(lambda *_: 0.0), [replace(ROWS[0], source=None)]).report["sources"] == {}
    assert to_comparison({"prompt": "p", "chosen": "a", "rejected": "b", "subset": "hard"}).source == "hard"
    ties = evaluate(Rule(lambda *_: 1.0), [*ROWS, Comparison("p", ("a", "b"), (1, 1), source="ties")])
    assert ties.report["sources"]["ties"] == {"comparisons": 1, "pairs": 0}
    assert ties.report["sources"]["one"]["pairs"] == 60


def test_a_baseline_that_there_is_not():
    "Whole texts of which nothing says where the prompt ends have no reward without it."
    whole = [to_comparison({"chosen": f"text {row} good", "rejected": f"text {row} bad"}) for row in range(8)]
    result = evaluate(Rule(lambda prompt, response: float("good" in response)), whole)
    assert result.report["baselines"]["prompt-blind"] is None
    assert result.report["prompts"] == 8
    assert result.report["accuracy"] == 1
    some = evaluate(Rule(count_characters), [*whole, *ROWS[:10]]).report["baselines"]["prompt-blind"]
    assert some == evaluate(Rule(count_characters), ROWS[:10]).report["baselines"]["prompt-blind"]


def test_mistakes_are_the_most_confident_ones():
    result = evaluate(Rule(count_characters), ROWS)
    mistakes = result.mistakes(5)
    margins = np.sort(result.pairs["margin"])
    assert [mistake["margin"] for mistake in mistakes] == margins[:5].tolist()
    assert margins[0] < 0
    for mistake in mistakes:
        comparison = ROWS[mistake["row"] - 1]
        assert mistake["prompt"] == comparison.prompt
        assert mistake["source"] == comparison.source
        assert mistake["chosen"]["text"] == comparison.responses[comparison.ranks.index(1)]
        assert mistake["chosen"]["reward"] < mistake["rejected"]["reward"]
        assert mistake["probability"] == pytest.approx(1 / (1 + math.exp(mistake["margin"])))
    assert (
        len(result.mistakes(1000)) == (margins < 0).sum() > 20 == len(result.mistakes())
    ) # all of them where there are fewer
    skipped = evaluate(
        Rule(count_characters),
        [{"prompt": "no"}, {"prompt": "p", "chosen": "a", "rejected": "bb"}],
        "skip",
    )
    assert skipped.rows == [2]
    assert skipped.mistakes()[0]["row"] == 2
    assert skipped.report["left_out"]["rows"] == 1


def test_two_models_on_the_same_pairs():
    one = evaluate(Rule(lambda prompt, response: float(response.startswith("answer"))), ROWS)
    other = evaluate(Rule(count_characters), ROWS)
    result = compare({"one": one, "other": other, "again": one})
    right = {"one": np.sign(one.pairs["margin"].to_numpy()), "other": np.sign(other.pairs["margin"].to_numpy())}
    first = next(pair for pair in result["pairs"] if (pair["first"], pair["second"]) == ("one", "other"))
    more = int(((right["one"] == 1) & (right["other"] == -1)).sum()) # ties count for neither
    less = int(((right["other"] == 1) & (right["one"] == -1)).sum())
    assert (first["only_first"], first["only_second"]) == (more, less)
    assert more
    assert less
    assert (right["other"] == 0).any()
    assert first["difference"]["value"] == pytest.approx(one.report["accuracy"] - other.report["accuracy"])
    assert first["difference"]["low"] < first["difference"]["value"] < first["difference"]["high"]
    same = next(pair for pair in result["pairs"] if (pair["first"], pair["second"]) == ("one", "again"))
    assert same["p_value"] == 1
    assert result["agreement"]["one"]["again"] == 1
    prompts = len({comparison.prompt for comparison in ROWS})
    most = binomtest(0, prompts).proportion_ci(method="exact").high # of other prompts the two may differ on so many
    assert same["difference"] == pytest.approx({"value": 0, "low": -most, "high": most})
    assert 0 < most < 0.2
    assert result["agreement"]["one"]["other"] == pytest.approx((right["one"] == right["other"]).mean())
    one_often = evaluate(Rule(lambda prompt, response: float(response.startswith("answer"))), ROWS * 5)
    other_often = evaluate(Rule(count_characters), ROWS * 5)
    (often,) = compare({"one": one_often, "other": other_often})["pairs"] # the same prompts, asked five times
    assert often["difference"] == pytest.approx(first["difference"])
    assert often["p_value"] == pytest.approx(first["p_value"], abs=0.02)
    with pytest.raises(ValueError, match="evaluated on different comparisons"):
        compare({"one": one, "others": evaluate(Rule(lambda prompt, response: 1.0), ROWS[10:30])})


def test_models_that_left_out_other_rows_are_compared_on_the_rest():
    data = [
        {"prompt": f"p{row}", "chosen": "a" * (1 + row % 7), "rejected": "b" * (1 + row % 5)} for row in range(40)
    ]

    def keeps(numbers):
        return [row if number in numbers else {"prompt": "no"} for number, row in enumerate(data)]

    one = evaluate(Rule(count_characters), keeps(range(30)), "skip")
    other = evaluate(Rule(lambda prompt, response: -float(len(response))), keeps(range(10, 40)), "skip")
    both = {
        "one": evaluate(Rule(count_characters), data[10:30]),
        "other": evaluate(Rule(lambda prompt, response: -float(len(response))), data[10:30]),
    }
    assert compare({"one": one, "other": other}) == compare(both)
    assert compare(both)["comparisons"] == 20


def test_the_p_of_prompts_is_right_where_that_of_pairs_is_too_sure():
    "Pairs to a prompt are all alike, and the models do not differ: a p below 0.05 should come in 5 of 100."
    generator = np.random.default_rng(0)
    by_prompts = []
    by_pairs = [] # McNemar's exact test, which takes pairs as independent
    for _ in range(60):
        result = {}
        for name in ("one", "other"):
            right = np.repeat(generator.random(12) < 0.6, 20)
            comparisons = [Comparison(f"p{row // 20}", ("good", f"bad {row}"), (1, 2)) for row in range(240)]
            rewards = [[1.0, 0.0] if is_right else [0.0, 1.0] for is_right in right]
            responses = response_table(comparisons, rewards, rewards, [[1, 1]] * 240)
            result[name] = Evaluation(list(range(1, 241)), comparisons, responses, {})
        (pair,) = compare(result)["pairs"]
        by_prompts.append(pair["p_value"] < 0.05)
        only_one_right = pair["only_first"] + pair["only_second"]
        by_pairs.append(binomtest(pair["only_first"], only_one_right).pvalue < 0.05 if only_one_right else False)
    assert np.mean(by_prompts) <= 0.12
    assert np.mean(by_pairs) > 0.3


def test_the_p_of_prompts_by_all_signs():
    difference = np.array([1.0, 1, 0, -1, 0.5, 1])
    prompts = np.array([0, 0, 1, 2, 3, 4])
    sums = [2.0, -1.0, 0.5, 1.0] # a prompt without a difference does not count
    signs = np.array(list(itertools.product((1, -1), repeat=4)))
    far = np.abs(signs @ sums) >= abs(sum(sums)) - 1e-12
    assert sign_flip_p_value(difference, prompts, 0) == pytest.approx(np.mean(far))


# ----- a real model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = word_tokenizer()
    RewardModel(save_language_model("llama", folder / "base"), 0.0, "cpu").save_pretrained(
        folder / "reward", tokenizer
    )
    return str(folder / "reward")


def text(length, seed):
    return " " + " ".join(random.Random(seed).choices([f"w{place}" for place in range(3, 64)], k=length))


def rows(count=40):
    made = []
    for row in range(count):
        made.append(
            {
                "prompt": text(4, row // 2),
                "responses": [text(1 + (row + 3 * k) % 7, 100 * row + k) for k in range(3)],
                "scores": [(row * k) % 5 for k in range(1, 4)],
                "source": "ab"[row % 2],
            }
        )
    return made


def test_training_and_evaluation_agree(model, tmp_path):
    reward_model = RewardModel.from_pretrained(model, 0.0, "cpu")
    config = RewardConfig(
        str(tmp_path), per_device_eval_batch_size=7, report_to="none", use_cpu=True, disable_tqdm=True
    )
    data = [row for row in rows() if len(set(row["scores"])) > 1]
    trainer = RewardTrainer(
        reward_model,
        config,
        eval_dataset=Dataset.from_list(data),
        processing_class=word_tokenizer(),
    )
    metrics = trainer.evaluate()
    report = evaluate(Scorer(reward_model, word_tokenizer()), map(to_comparison, data)).report
    for name in (
        "pairs",
        "tied_rewards",
        "accuracy",
        "margin",
        "margin_q25",
        "margin_median",
        "margin_q75",
        "chosen_reward",
        "rejected_reward",
    ):
        assert report[name] == pytest.approx(metrics[f"eval_{name}"], abs=1e-5), name


def test_batches_change_nothing(model):
    comparisons = list(map(to_comparison, rows()))
    reports = [
        evaluate(Scorer.from_pretrained(model, device="cpu", tokens_per_batch=size), comparisons).report
        for size in (20, 5000)
    ]
    flat = []
    numbers = []
    others = []
    for report in reports:
        values = {".".join(map(str, path)): value for path, value in leaves(report)}
        flat.append(values)
        numbers.append({name: value for name, value in values.items() if isinstance(value, (int, float))})
        others.append({name: value for name, value in values.items() if not isinstance(value, (int, float))})
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-5)
    assert others[0] == others[1]
    assert len(numbers[0]) > 150
    assert all(
        value == flat[1][name]
        for name, value in flat[0].items()
        if "accuracy_interval" in name or name.startswith("baselines.longer")
    )


def leaves(report, path=()):
    "(path, number) of all that is in a report."
    if isinstance(report, (dict, list)):
        for name, value in report.items() if isinstance(report, dict) else enumerate(report):
            yield from leaves(value, (*path, name))
    else:
        yield path, report


def test_rows_that_are_left_out(model, caplog):
    scorer = Scorer.from_pretrained(model, device="cpu")
    same = {"prompt": "w3", "chosen": "w4", "rejected": "w4"}
    two = rows(3)[1:] # in the first all tie
    bad = [*two, {"prompt": "w3"}, {"prompt": text(50, 0), "chosen": text(30, 1), "rejected": "w4"}, same]
    with pytest.raises(ValueError, match="Row 3 of the data cannot be used.*on_bad_row='skip'"):
        evaluate(scorer, bad)
    result = evaluate(scorer, bad, "skip", "rows.jsonl")
    assert result.rows == [1, 2]
    assert result.report["left_out"]["rows"] == 3
    assert "Row 3 of rows.jsonl" in result.report["left_out"]["first"]
    with pytest.raises(ValueError, match="No comparison of the data is left"):
        evaluate(scorer, bad[2:], "skip")
    assert evaluate(scorer, two).report["left_out"] is None
    says_nothing = evaluate(scorer, [*two, same]).report["left_out"] # as training drops it
    assert says_nothing == {
        "rows": 1,
        "first": "Row 3 of the data carries no signal: winner and loser are the same tokens.",
    }
    cutting = Scorer.from_pretrained(model, device="cpu", max_length=10, on_overlong="truncate_prompt")
    with caplog.at_level("WARNING"):
        evaluate(cutting, rows(30))
    told = [record.getMessage() for record in caplog.records if record.name.startswith("rlhf_reward")]
    assert len(told) == 1
    assert "Cut the prompt of" in told[0] # told once, not for each row and each pass


def test_what_has_no_reward_without_its_prompt_is_evaluated_with_it(model):
    "A response without a token of its own, in a model whose texts end without one."
    scorer = Scorer.from_pretrained(model, device="cpu")
    scorer.model.ends_with_eos = False
    result = evaluate(
        scorer,
        [
            {"prompt": "w3 w4", "chosen": " w5", "rejected": ""},
            {"prompt": "w3 w4", "chosen": " w5", "rejected": " w6 w7"},
        ],
    )
    assert result.rows == [1, 2]
    assert np.isnan(result.responses["blind_reward"]).tolist() == [True, True, False, False]
    assert result.report["baselines"]["prompt-blind"]["value"] in (0, 1)
    assert result.report["pairs"] == 2


def test_the_command_with_two_models_and_two_processes(model, tmp_path, python, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1800000000") # the date of the report
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows(30 if name == "one" else 20))
        )
    RewardModel(model, 0.0, "cpu").save_pretrained(tmp_path / "other", word_tokenizer())
    arguments = [
        *("-m", "rlhf_reward", "evaluate"),
        *("--model", f"{model},{tmp_path / 'other'}"),
        *("--device", "cpu"),
        *("--tokens_per_batch", "50"),
        *("--data", f"{tmp_path / 'one.jsonl'},{tmp_path / 'two.jsonl'}"),
        "--output",
    ]
    printed = run(python, *arguments, tmp_path / "alone").stdout
    assert "longer wins" in printed
    assert "without the prompt" in printed
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run(python, *launcher, *arguments, tmp_path / "together", timeout=200)
    for name in ("report.json", "report.md", "report.html"):
        together = (tmp_path / "together" / name).read_bytes()
        together = together.replace(str(tmp_path / "together").encode(), str(tmp_path / "alone").encode()) # the command
        assert together == (tmp_path / "alone" / name).read_bytes(), name
    report = json.loads((tmp_path / "alone/report.json").read_text())["data"][str(tmp_path / "one.jsonl")]
    assert set(report["models"]) == {model, str(tmp_path / "other")}
    assert report["compared"]["pairs"][0]["first"] == model
    assert set(report["models"][model]["sources"]) == {"a", "b"}
    assert report["models"][model]["best_of_n"][2]["n"] == 3


@pytest.mark.usefixtures("no_pictures")
def test_names_and_paths_of_the_command(model, tmp_path, monkeypatch, capsys):
    """
    A name that data and a benchmark share would hide one of them.

    A local file with the name of a benchmark is that file; a model for messages gets a template.
    """
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    monkeypatch.chdir(tmp_path)
    chat = []
    for row in rows(4):
        chat.append(
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": "w5"}],
                "rejected": [{"role": "assistant", "content": "w6"}],
            }
        )
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    (tmp_path / "hh-rlhf").mkdir()
    pair = {"chosen": "\n\nHuman: w4\n\nAssistant: w5", "rejected": "\n\nHuman: w4\n\nAssistant: w6"}
    (tmp_path / "hh-rlhf/test.jsonl").write_text(json.dumps(pair) + "\n")
    with pytest.raises(SystemExit):
        commands.evaluate(
            ["--model", model, "--data", "hh-rlhf=chat.jsonl", "--benchmark", "hh-rlhf", "--output", "report"]
        )
    assert "--data and --benchmark both have hh-rlhf" in capsys.readouterr().err
    (tmp_path / "template.jinja").write_text("{% for message in messages %}{{ message.content }} {% endfor %}")
    arguments = [
        "--model",
        f"one={model},two={model}",
        "--data",
        "chat.jsonl",
        "--benchmark",
        "hh-rlhf",
        "--output",
        "report",
        "--device",
        "cpu",
    ]
    with pytest.raises(SystemExit, match="the tokenizer has no chat template"):
        commands.evaluate(arguments)
    commands.evaluate([*arguments, "--chat_template", "template.jinja"])
    report = json.loads((tmp_path / "report/report.json").read_text())["data"]
    assert report["hh-rlhf"]["models"]["two"]["pairs"] == 1
    assert report["chat.jsonl"]["models"]["one"]["pairs"] == 4


def test_a_rule_scores_like_a_model():
    rule = Rule(count_characters)
    assert rule.score(["p", "p"], ["a", "bbb"]) == [1.0, 3.0]
    assert rule.best_of_n("p", ["a", "bbb", "bb"]).response == "bbb"
    with pytest.raises(
        ValueError, match="Rule does not know the mean and standard deviation of its rewards; expected norm"
    ):
        rule.score(["p"], ["a"], normalize=True)
