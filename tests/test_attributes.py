"Several attributes: ratings by name, an output for each, their weighted sum, its weights, and everything that shows them."
import itertools
import json
import logging
import math

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import DECODERS, ENCODERS, save_language_model, word_tokenizer
from composites import save_composite
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, load_rows, tokenize_rows
from rlhf_reward.attribute_statistics import rating_fit
from rlhf_reward.attribute_weights import bradley_terry_weights, fit_attribute_weights
from rlhf_reward.attributes import AttributeRewards, attribute_losses
from rlhf_reward.audit import audit
from rlhf_reward.audit_text import audit_table
from rlhf_reward.branching import branch_comparisons
from rlhf_reward.encoders import EncoderClassifier
from rlhf_reward.evaluation import Rule, evaluate
from rlhf_reward.files import score_file
from rlhf_reward.packing import model_inputs, pack_comparisons, pad_comparisons
from rlhf_reward.reward import is_reward_model
from rlhf_reward.rows import to_comparison
from rlhf_reward.scoring import Scorer

NAMES = ["verbosity", "helpfulness", "clarity"] # not in the order of the alphabet
WEIGHTS = {"verbosity": -0.4, "helpfulness": 0.65}
ALL_WEIGHTS = {**WEIGHTS, "clarity": 0.0}
PAIR = {"prompt": "w3 w4", "chosen": " w5", "rejected": " w6 w7"}
IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_language_model("llama", tmp_path_factory.mktemp("base"))
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    "A saved model with three attributes."
    model = new_model(base)
    folder = tmp_path_factory.mktemp("saved")
    model.config.rlhf_reward = {"reward_mean": 1.0, "reward_std": 2.0}
    model.save_pretrained(folder, word_tokenizer())
    return str(folder)


def new_model(base, **options):
    torch.manual_seed(0)
    model = RewardModel(base, 0.0, "cpu", attributes=NAMES, **options)
    model.set_attribute_weights(WEIGHTS)
    return model


@torch.no_grad()
def outputs_of(model, ids=IDS):
    return model(ids, attributes=True)


@torch.no_grad()
def logits_of(folder, ids=IDS):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()(ids).logits


def weighted(outputs, weights=ALL_WEIGHTS):
    return (outputs * torch.tensor(list(weights.values()))).sum(dim=1, keepdim=True)


def made_elsewhere(folder, family, labels, **options):
    "A classifier of transformers with a label for each name, as other libraries save it."
    torch.manual_seed(1)
    config = type({**DECODERS, **ENCODERS}[family])(**({**DECODERS, **ENCODERS}[family]).to_dict())
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    for name, value in options.items():
        setattr(config, name, value)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


# ----- rows

RATED = {"helpfulness": (4.0, None)}
ROWS = [ # what is next to `ratings`, and the ranks
    ({"chosen": " w5", "rejected": " w6"}, (1, 2)),
    ({"response_a": " w5", "response_b": " w6", "winner": "b"}, (2, 1)),
    ({"responses": [" w5", " w6"], "ranks": [2, 1]}, (2, 1)),
    ({"responses": [" w5", " w6"], "scores": [1, 1]}, (1, 1)),
    ({"responses": [" w5", " w6"]}, (1, 1)),
]


@pytest.mark.parametrize("row, ranks", ROWS, ids=[" ".join(row) for row, _ in ROWS])
def test_a_row_of_any_form_may_rate_its_responses_by_attribute(row, ranks):
    for ratings in (
        {"helpfulness": [4, None]},
        {"helpfulness": ["4", ""], "clarity": None, "verbosity": [None, None]},
        '{"helpfulness": [4.0, null]}',
    ):
        comparison = to_comparison({"prompt": "w3", **row, "ratings": ratings})
        assert comparison.attributes == RATED and comparison.ranks == ranks
    if "responses" not in row or len(row) > 1: # a column that is not by attribute is not read
        for ratings in (None, [4, 5], "4 stars", {}):
            assert to_comparison({"prompt": "w3", **row, "ratings": ratings}).attributes is None


def test_one_response_may_have_a_number_for_each_attribute():
    for ratings in ({"clarity": 3}, {"clarity": [3]}, '{"clarity": 3}'):
        comparison = to_comparison({"prompt": "w3", "response": "w4", "ratings": ratings})
        assert comparison.attributes == {"clarity": (3.0,)} and comparison.responses == ("w4",)


@pytest.mark.parametrize("ratings, problem", [
    ({"clarity": [1]}, "ratings of clarity are .1. for 2 responses; expected a list"),
    ({"clarity": 1}, "ratings of clarity are 1 for 2 responses"),
    ({"clarity": [1, "much"]}, "found 'much' as rating of clarity; expected a finite number"),
    ({"clarity": [1, math.nan]}, "found nan as rating of clarity"),
    ({"clarity": [1, 1e31]}, "as rating of clarity; expected a finite number of at most"),
    ({"": [1, 2]}, "the attribute ''; expected a name"),
    ("{clarity: 1}", "the ratings are not JSON"),
])
def test_ratings_that_are_none_are_an_error_with_the_attribute(ratings, problem):
    with pytest.raises(ValueError, match=problem):
        to_comparison({**PAIR, "ratings": ratings})


def test_responses_without_order_and_ratings_by_name_are_refused():
    with pytest.raises(ValueError, match="nothing orders the responses; expected ratings by attribute, .* or ranks"):
        to_comparison({"prompt": "w3", "responses": ["w4", "w5"], "ratings": [4, 5]})


def test_not_a_number_in_a_file_is_no_missing_rating(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w3", "chosen": "w4", "rejected": "w5", "ratings": {"a": [NaN, 1]}}')
    row, = load_rows(str(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match="'NaN' as rating of a"):
        to_comparison(row)


# ----- tokens and batches

def rated_rows():
    "Rows of all kinds: with and without order, ratings, responses."
    rows = []
    for number in range(4):
        row = {"prompt": f"w{number + 3} w4", "responses": [" w5 w6", " w7", f" w8 w{number + 9}"]}
        row["ratings"] = {"helpfulness": [4, None, number], "taste": [1, 2, 3]}
        if number % 2:
            row["ranks"] = [1, 2, 3]
            row["ratings"]["verbosity"] = [1.5, number, 2]
        rows.append(row)
    rows.append({"prompt": "w3", "responses": [" w5"], "ratings": {"clarity": [3]}})
    rows.append({"prompt": "w3", "responses": [" w5", " w6"], "ranks": [2, 1]})
    return rows


def table(rows):
    return Dataset.from_list([{"ranks": None, "ratings": None, **row} for row in rows])


EXPECTED = [ # of NAMES
    [[None] * 3, [4.0, None, 0.0], [None] * 3],
    [[1.5, 1.0, 2.0], [4.0, None, 1.0], [None] * 3],
    [[None] * 3, [4.0, None, 2.0], [None] * 3],
    [[1.5, 3.0, 2.0], [4.0, None, 3.0], [None] * 3],
    [[None], [None], [3.0]],
    None,
]


def test_tokenized_rows_have_the_ratings_in_the_order_of_the_model(tmp_path):
    rows = rated_rows()
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table(rows).to_parquet(tmp_path / "rows.parquet")
    unordered = [row for row in rows if "ranks" not in row]
    cells = {name: [json.dumps(row[name]) for row in unordered] for name in ("responses", "ratings")}
    Dataset.from_dict({"prompt": [row["prompt"] for row in unordered], **cells}).to_csv(tmp_path / "rows.csv")
    expected = {name: EXPECTED for name in ("rows.jsonl", "rows.parquet")}
    expected["rows.csv"] = [EXPECTED[0], EXPECTED[2], EXPECTED[4]]
    for name, streaming in itertools.product(expected, (False, True)):
        loaded = load_rows(str(tmp_path / name), streaming=streaming)
        tokenized = list(tokenize_rows(loaded, word_tokenizer(), None, attributes=NAMES))
        assert [example["attributes"] for example in tokenized] == expected[name]
        names = [NAMES if ratings else None for ratings in expected[name]]
        assert [example["attribute_names"] for example in tokenized] == names
    loaded = load_rows(str(tmp_path / "rows.csv"))
    reordered = tokenize_rows(loaded, word_tokenizer(), None, attributes=["clarity", "helpfulness"])
    assert reordered[0]["attributes"] == [[None] * 3, [4.0, None, 0.0]]


def test_rows_that_nobody_ordered_are_ties_of_no_loss(caplog):
    rows = table(rated_rows()[:4])
    for keep_ties in (False, True): # of rao_kupper, for a model without attributes
        assert [row["row"] for row in tokenize_rows(rows, word_tokenizer(), None, keep_ties=keep_ties)] == [2, 4]
    assert "Dropped 2 of 4" in caplog.text
    tie = [{"prompt": "w3", "responses": ["w4", "w5"], "scores": [1, 1], "ratings": {"clarity": [1, 1]}}]
    assert len(tokenize_rows(Dataset.from_list(tie), word_tokenizer(), None, keep_ties=True)) == 1


@pytest.fixture(scope="module")
def tokenized():
    return tokenize_rows(table(rated_rows()), word_tokenizer(), None, attributes=NAMES)


def test_each_layout_has_the_same_ratings(tokenized):
    examples = list(tokenized)
    expected = torch.full((6, 3, 3), math.nan)
    for number, table in enumerate(EXPECTED[:5]):
        for attribute, ratings in enumerate(table):
            for response, rating in enumerate(ratings):
                expected[number, response, attribute] = math.nan if rating is None else rating
    for collate in (pad_comparisons, pack_comparisons, branch_comparisons):
        torch.testing.assert_close(collate(examples)["attributes"], expected, equal_nan=True)
        assert collate(examples[5:])["attributes"].shape == (1, 2, 0)


# ----- the model

def test_the_reward_is_the_weighted_sum_packed_or_alone(base, tokenized):
    model = new_model(base)
    packed = pack_comparisons(list(tokenized))
    with torch.no_grad():
        outputs = model(**model_inputs(packed, model), attributes=True)
        rewards = model(**model_inputs(packed, model))
        torch.testing.assert_close(rewards, weighted(outputs))
        alone = []
        for example in tokenized:
            for rest in example["rests"]:
                alone.append(model(torch.tensor([example["shared_prefix"] + rest])))
    torch.testing.assert_close(rewards, torch.cat(alone), atol=1e-5, rtol=0)
    assert rewards.dtype == torch.float32 and outputs.shape == (15, 3)
    assert RewardModel(base, 0.0, "cpu").attributes == () and outputs_of(RewardModel(base, 0.0, "cpu")).shape == (2, 1)


def test_weights_are_equal_until_they_are_set(base):
    model = RewardModel(base, 0.0, "cpu", attributes=["one", "two"])
    assert model.attribute_weights == {"one": 0.5, "two": 0.5}
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), outputs_of(model).mean(dim=1, keepdim=True))
    for weights, problem in (
        ({"three": 1.0}, "expected weights by name, of one, two"),
        ({"one": math.inf}, "The weight of one is inf; expected a finite number"),
        ({"one": "1"}, "The weight of one is '1'"),
        ({"one": 0.0}, "All of attribute_weights are 0"),
        ({}, "All of attribute_weights are 0"),
        ([1, 2], "expected weights by name"),
    ):
        with pytest.raises(ValueError, match=problem):
            model.set_attribute_weights(weights)
    with pytest.raises(ValueError, match="the model has one output, the reward; expected none"):
        RewardModel(base, 0.0, "cpu").set_attribute_weights({"one": 1.0})
    for names in ("one", [], ["one", "one"], [" "], [1]):
        with pytest.raises(ValueError, match="attributes is .*; expected"):
            RewardModel(base, 0.0, "cpu", attributes=names)


def test_a_saved_model_is_a_classifier_with_a_label_for_each_attribute(base, saved, tmp_path):
    expected = outputs_of(new_model(base))
    config = json.loads((tmp_path.__class__(saved) / "config.json").read_text())
    assert config["id2label"] == {str(number): name for number, name in enumerate(NAMES)}
    assert config["label2id"] == {name: number for number, name in enumerate(NAMES)}
    assert config["problem_type"] == "regression" and AutoConfig.from_pretrained(saved).num_labels == 3
    torch.testing.assert_close(logits_of(saved), expected, atol=0, rtol=0)
    opened = RewardModel.from_pretrained(saved, device="cpu")
    assert opened.attributes == tuple(NAMES) and opened.attribute_weights == ALL_WEIGHTS
    with torch.no_grad():
        torch.testing.assert_close(opened(IDS), weighted(expected))
    assert is_reward_model(saved)
    opened.save_pretrained(tmp_path / "again", word_tokenizer())
    torch.testing.assert_close(logits_of(tmp_path / "again"), expected, atol=0, rtol=0)


def test_a_model_with_one_reward_is_saved_as_before(saved, tmp_path):
    model = RewardModel(saved, 0.0, "cpu") # a new head on the backbone of one with attributes
    model.save_pretrained(tmp_path, word_tokenizer())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0"} and "attribute_weights" not in config["rlhf_reward"]
    assert logits_of(tmp_path).shape == (2, 1) and RewardModel.from_pretrained(tmp_path, device="cpu").attributes == ()
    with pytest.raises(ValueError, match="the model has one output"):
        RewardModel.from_pretrained(tmp_path, device="cpu", attribute_weights={"clarity": 1.0})


def test_weights_are_set_on_opening_and_the_scale_of_others_is_forgotten(base, saved):
    outputs = outputs_of(new_model(base))
    kept = RewardModel.from_pretrained(saved, device="cpu", attribute_weights=WEIGHTS)
    assert kept.normalize(torch.zeros(1, 1)).item() == -0.5
    opened = RewardModel.from_pretrained(saved, device="cpu", attribute_weights={"clarity": 2.0})
    with torch.no_grad():
        torch.testing.assert_close(opened(IDS), 2 * outputs[:, 2:])
    with pytest.raises(ValueError, match="does not know the mean"):
        opened.normalize(torch.zeros(1, 1))
    for open_model in (RewardModel.from_pretrained, Scorer.from_pretrained):
        with pytest.raises(ValueError, match="weights by name, of verbosity, helpfulness, clarity"):
            open_model(saved, device="cpu", attribute_weights={"clearness": 1.0})


def test_labels_that_do_not_belong_to_the_weights_are_refused(saved, tmp_path):
    import shutil

    shutil.copytree(saved, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    config["id2label"]["1"] = "honesty"
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has the labels .*honesty.* and attribute_weights of .*helpfulness"):
        RewardModel.from_pretrained(tmp_path / "copy", device="cpu")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_classifier_of_several_labels_made_elsewhere_opens_with_a_choice(family, tmp_path):
    folder = made_elsewhere(tmp_path, family, ["bad", "good", "long"])
    assert not is_reward_model(folder)
    asked = r"has 3 labels \(bad, good, long\).*attribute_weights=\{'bad': 1.0\}.*--attribute_weights bad=1"
    with pytest.raises(ValueError, match=asked):
        Scorer.from_pretrained(folder, device="cpu")
    scorer = Scorer.from_pretrained(folder, device="cpu", attribute_weights={"good": 1.0, "bad": -1.0})
    assert scorer.attributes == ("bad", "good", "long") and isinstance(scorer.model, EncoderClassifier) == (family == "bert")
    prompts, responses = ["w3 w4", "w3 w4", "w9"], [" w5", " w6 w7 w8", " w10"]
    sequences = [own[0] for own in scorer.tokenize([to_comparison_of(*texts) for texts in zip(prompts, responses)])]
    for sequence, scored in zip(sequences, scorer.score(prompts, responses, attributes=True)):
        pairs = sequence if family == "bert" else [(token, 0) for token in sequence]
        ids, types = torch.tensor(pairs).T[:, None]
        classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            logits = classifier(ids, **({"token_type_ids": types} if family == "bert" else {})).logits[0]
        assert list(scored.attributes) == ["bad", "good", "long"]
        assert list(scored.attributes.values()) == pytest.approx(logits.tolist(), abs=1e-5)
        assert scored.reward == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)
    if family == "llama": # saved here, it has its weights
        scorer.model.save_pretrained(tmp_path / "ours", word_tokenizer())
        again = Scorer.from_pretrained(tmp_path / "ours", device="cpu")
        assert again.score(prompts, responses) == pytest.approx(scorer.score(prompts, responses))


def to_comparison_of(prompt, response):
    from rlhf_reward.rows import to_responses

    return to_responses({"prompt": prompt, "response": response})


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_an_encoder_has_attributes_too(family, tmp_path):
    base = save_language_model(family, tmp_path / "base")
    model = new_model(base)
    model.save_pretrained(tmp_path / "saved", word_tokenizer())
    opened = RewardModel.from_pretrained(tmp_path / "saved", device="cpu")
    assert model.pooling == "classifier" and opened.attribute_weights == ALL_WEIGHTS
    torch.testing.assert_close(outputs_of(opened), outputs_of(model))
    torch.testing.assert_close(logits_of(tmp_path / "saved"), outputs_of(model))
    scorer = Scorer.from_pretrained(tmp_path / "saved", device="cpu")
    assert isinstance(scorer.model, RewardModel) and scorer.attributes == tuple(NAMES)


def test_a_composite_has_attributes_too(tmp_path):
    save_composite("gemma3", tmp_path / "base", word_tokenizer())
    model = new_model(str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "saved", word_tokenizer())
    torch.testing.assert_close(outputs_of(RewardModel.from_pretrained(tmp_path / "saved", device="cpu")), outputs_of(model))
    torch.testing.assert_close(logits_of(tmp_path / "saved"), outputs_of(model))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_adapter_has_attributes_too(family, tmp_path):
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    from rlhf_reward.adapters import add_adapter
    from rlhf_reward.converting import convert

    base = save_language_model(family, tmp_path / "base")
    word_tokenizer().save_pretrained(base)
    model = add_adapter(new_model(base), peft.LoraConfig(r=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected = outputs_of(model.eval())
    model.save_pretrained(tmp_path / "adapter", word_tokenizer())
    opened = RewardModel.from_pretrained(tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(outputs_of(opened), expected)
    assert opened.attribute_weights == ALL_WEIGHTS and is_reward_model(tmp_path / "adapter")
    chosen = RewardModel.from_pretrained(tmp_path / "adapter", device="cpu", attribute_weights={"clarity": 1.0})
    torch.testing.assert_close(chosen(IDS), expected[:, 2:])
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, expected)
    done = convert(tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits_of(tmp_path / "merged"), expected)
    assert done.difference_elsewhere < 1e-4
    assert RewardModel.from_pretrained(tmp_path / "merged", device="cpu").attribute_weights == ALL_WEIGHTS
