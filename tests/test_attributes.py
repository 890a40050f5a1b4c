"Several attributes: ratings by name, an output for each, their weighted sum, its weights, and all that shows them."
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import DECODERS, ENCODERS, save_language_model, word_tokenizer
from composites import save_composite
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, load_rows, report, tokenize_rows
from rlhf_reward.attribute_statistics import rating_fit
from rlhf_reward.attribute_weights import bradley_terry_weights, fit_attribute_weights
from rlhf_reward.attributes import attribute_losses, checked_attributes
from rlhf_reward.audit import audit
from rlhf_reward.audit_text import audit_table
from rlhf_reward.branching import branch_comparisons
from rlhf_reward.encoders import EncoderClassifier
from rlhf_reward.evaluation import Rule, evaluate
from rlhf_reward.files import score_file
from rlhf_reward.flips import comparison_row
from rlhf_reward.packing import model_inputs, pack_comparisons, pad_comparisons
from rlhf_reward.reward import is_reward_model
from rlhf_reward.rows import to_comparison, to_responses
from rlhf_reward.scoring import Scorer

pytestmark = pytest.mark.usefixtures("no_curves")

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


def ids_of(text):
    "The ids of a text, as training has them."
    return torch.tensor([[*word_tokenizer()(text)["input_ids"], 2]])


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
    (tmp_path / "rows.jsonl").write_text(json.dumps({**PAIR, "ratings": {"a": [math.nan, 1]}}))
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
    cells = []
    for row in unordered:
        cells.append({"prompt": "w3", "responses": json.dumps(row["responses"]), "ratings": json.dumps(row["ratings"])})
    Dataset.from_list(cells).to_csv(tmp_path / "rows.csv")
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
        ({"three": 1.0}, "expected weights by name, of one, two. Other attributes than those of a recipe need"),
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
            checked_attributes(names)


def test_a_saved_model_is_a_classifier_with_a_label_for_each_attribute(base, saved, tmp_path):
    expected = outputs_of(new_model(base))
    config = json.loads(Path(saved, "config.json").read_text())
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
    assert scorer.attributes == ("bad", "good", "long")
    assert isinstance(scorer.model, EncoderClassifier) == (family == "bert")
    prompts, responses = ["w3 w4", "w3 w4", "w9"], [" w5", " w6 w7 w8", " w10"]
    rows = [{"prompt": prompt, "response": response} for prompt, response in zip(prompts, responses)]
    sequences = [own[0] for own in scorer.tokenize(list(map(to_responses, rows)))]
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


def test_an_encoder_has_attributes_too(tmp_path):
    base = save_language_model("bert", tmp_path / "base")
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
    opened = RewardModel.from_pretrained(tmp_path / "saved", device="cpu")
    torch.testing.assert_close(outputs_of(opened), outputs_of(model))
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
    if family == "bert":
        return
    done = convert(tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits_of(tmp_path / "merged"), expected)
    assert done.difference_elsewhere < 1e-4
    assert RewardModel.from_pretrained(tmp_path / "merged", device="cpu").attribute_weights == ALL_WEIGHTS


# ----- training

def test_the_loss_of_attributes_is_their_squared_error_without_missing_ratings():
    nan = math.nan
    outputs = torch.tensor([[[3.0, 1.0], [2.0, 7.0]], [[0.0, 0.0], [5.0, 5.0]], [[1.0, 9.0], [9.0, 9.0]]])
    outputs.requires_grad_()
    ratings = torch.tensor([[[4.0, 2.0], [2.0, nan]], [[nan, 2.0], [nan, 8.0]], [[nan, nan], [nan, nan]]])
    losses = attribute_losses(outputs, ratings)
    assert losses.tolist() == [((1 + 0) / 2 + 1) / 2, (4 + 9) / 2, 0]
    losses.sum().backward()
    assert (outputs.grad[ratings.isnan()] == 0).all() and outputs.grad[0, 0].tolist() == [-0.5, -1.0]
    assert attribute_losses(outputs, ratings[:, :, :0]).tolist() == [0, 0, 0]


def trainer_of(base, folder, rows, loss="regression", model=None, **options):
    args = RewardConfig(
        str(folder), loss=loss, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", **options
    )
    return RewardTrainer(model or new_model(base), args, train_dataset=table(rows), processing_class=word_tokenizer())


ALL_RATED = [ # each attribute has a rating somewhere
    {"prompt": "w3", "responses": [" w5", " w6 w7"], "ratings": {"clarity": [1, None], "helpfulness": [2, 3]}},
    {"prompt": "w4", "responses": [" w5", " w6"], "ratings": {"verbosity": [5, 4]}, "ranks": [2, 1]},
]


def test_attributes_are_trained_and_the_loss_of_the_reward_is_added(base, tmp_path):
    rows = [*ALL_RATED, {"prompt": "w9", "responses": [" w5", " w6"], "ranks": [1, 2]}]
    for loss, used in (("regression", rows[:2]), ("bradley_terry", rows), ("rao_kupper", rows[1:2])):
        model = new_model(base)
        if loss == "rao_kupper":
            model = RewardModel(base, 0.0, "cpu", attributes=["verbosity"])
        trainer = trainer_of(base, tmp_path, used, loss, model)
        for collate in (pad_comparisons, pack_comparisons):
            batch = collate(list(trainer.train_dataset))
            result = trainer.compute_loss(model, batch)
            expected = []
            for row in used:
                texts = [ids_of(row["prompt"] + response) for response in row["responses"]]
                outputs = torch.cat([model(ids, attributes=True) for ids in texts])
                by_attribute = []
                for name, ratings in row.get("ratings", {}).items():
                    column = outputs[:, model.attributes.index(name)]
                    errors = [(column[i] - rating) ** 2 for i, rating in enumerate(ratings) if rating is not None]
                    by_attribute.append(sum(errors) / len(errors))
                own = sum(by_attribute) / max(1, len(by_attribute))
                if loss != "regression" and "ranks" in row:
                    rewards = (outputs * torch.tensor(list(model.attribute_weights.values()))).sum(dim=1)
                    margin = rewards[row["ranks"].index(1)] - rewards[row["ranks"].index(2)]
                    threshold = trainer.reward_loss.threshold if loss == "rao_kupper" else 0
                    own = own - torch.nn.functional.logsigmoid(margin - threshold)
                expected.append(own)
            torch.testing.assert_close(result, sum(expected) / len(used))
    assert trainer_of(base, tmp_path, ALL_RATED, max_steps=1).train().training_loss > 0


def test_a_run_without_what_attributes_learn_from_is_refused(base, tmp_path):
    pair = {"prompt": "w9", "responses": [" w5", " w6"], "ranks": [1, 2]}
    tie = {"prompt": "w9", "responses": [" w5", " w6"], "ratings": {"clarity": [1, 1]}}
    for rows, loss, problem in (
        (ALL_RATED[:1], "regression", "No row of the training set rates verbosity"),
        (ALL_RATED[1:], "bradley_terry", "rates helpfulness, clarity"),
        ([*ALL_RATED, pair], "regression", "Row 3 of the training set has no rating of verbosity"),
        ([*ALL_RATED, tie], "rao_kupper", "Row 1 of the training set has ratings by attribute and no order"),
        ([*ALL_RATED, tie], "davidson", "Row 1 of the training set has ratings by attribute and no order"),
    ):
        with pytest.raises(ValueError, match=problem):
            trainer_of(base, tmp_path, rows, loss)
    other = tokenize_rows(table(ALL_RATED), word_tokenizer(), None, attributes=NAMES[::-1])
    with pytest.raises(ValueError, match="was tokenized with the attributes .*'clarity', 'helpfulness', 'verbosity'"):
        args = RewardConfig(str(tmp_path), loss="regression", use_cpu=True, report_to="none")
        RewardTrainer(new_model(base), args, train_dataset=other, processing_class=word_tokenizer())


def test_a_run_resumes_with_the_same_attributes_only(base, tmp_path):
    options = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 1}
    trainer = trainer_of(base, tmp_path, ALL_RATED, **options)
    trainer.args.save_strategy = "steps"
    trainer.train()
    assert RewardModel.from_pretrained(tmp_path / "checkpoint-1", device="cpu").attribute_weights == ALL_WEIGHTS
    torch.manual_seed(0)
    model = RewardModel(base, 0.0, "cpu", attributes=NAMES)
    other = trainer_of(base, tmp_path, ALL_RATED, model=model, **options)
    with pytest.raises(ValueError, match="attributes.*cannot change within a run"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    again = trainer_of(base, tmp_path, ALL_RATED, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    torch.testing.assert_close(again.model.state_dict(), trainer.model.state_dict(), atol=0, rtol=0)


def test_what_a_run_learned_from_includes_the_ratings(tokenized):
    from rlhf_reward.run_record import data_fingerprint

    without = tokenize_rows(table(rated_rows()), word_tokenizer(), None, keep_ties=True, attributes=["verbosity"])
    rows, fewer = tokenized.select([1, 3]), without.select([0, 1])
    assert fewer["row"][:] == rows["row"][:] == [2, 4] and data_fingerprint(rows) != data_fingerprint(fewer)
    assert data_fingerprint(rows.to_iterable_dataset()) != data_fingerprint(fewer.to_iterable_dataset())


# ----- weights from comparisons

def test_weights_are_those_of_bradley_terry():
    generator = np.random.default_rng(0)
    true = np.array([1.5, -0.7, 0.0])
    differences = generator.normal(size=(6000, 3)) * [1, 3, 1]
    wins = generator.random(6000) < 1 / (1 + np.exp(-differences @ true))
    oriented = np.where(wins[:, None], differences, -differences)
    result = bradley_terry_weights(oriented, np.ones(6000))
    assert result == pytest.approx(true, abs=0.12)
    scaled = bradley_terry_weights(oriented * [1, 10, 1], np.ones(6000))
    assert scaled == pytest.approx(result / [1, 10, 1], rel=1e-3, abs=1e-4) # the prior has no unit
    half = bradley_terry_weights(np.vstack([oriented, oriented]), np.full(12000, 0.5))
    assert half == pytest.approx(result, rel=1e-4, abs=1e-5)
    for share in (0.6, 0.9): # one attribute: σ(2 w) is the share of pairs that it orders right
        pairs = np.repeat([[2.0], [-2.0]], [round(1000 * share), round(1000 * (1 - share))], axis=0)
        assert 1 / (1 + np.exp(-2 * bradley_terry_weights(pairs, np.ones(1000))[0])) == pytest.approx(share, abs=3e-3)
    separable = bradley_terry_weights(np.array([[1.0, 0.0], [2.0, 0.0]]), np.ones(2))
    slope = 2.5 * separable[0] - 1 / (1 + np.exp(separable[0])) - 2 / (1 + np.exp(2 * separable[0]))
    assert separable[1] == 0 < separable[0] and slope == pytest.approx(0, abs=1e-5) # of the loss and (v s)² / 2


def test_weights_are_learned_on_a_model_that_stays(saved):
    scorer = Scorer.from_pretrained(saved, device="cpu")
    outputs = outputs_of(scorer.model)
    rows = rated_rows()[1:4:2] + [{"prompt": "w3 w8", "responses": [" w5 w6", " w7"], "ranks": [1, 2], "weight": 3}]
    weights = fit_attribute_weights(scorer, table([{"weight": 1, **row} for row in rows]))
    assert weights == scorer.model.attribute_weights and list(weights) == NAMES
    torch.testing.assert_close(outputs_of(scorer.model), outputs)
    comparisons = [to_comparison(row) for row in rows]
    differences, counts = [], []
    for comparison, scored in zip(comparisons, scorer.score_comparisons(comparisons, attributes=True)):
        values = np.array([list(reward.attributes.values()) for reward in scored])
        for winner, loser in itertools.combinations(range(len(values)), 2):
            differences.append(values[winner] - values[loser])
            counts.append(comparison.weight / math.comb(len(values), 2))
    expected = bradley_terry_weights(np.array(differences), np.array(counts))
    assert list(weights.values()) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="has 0 pairs in 1 comparisons, and none in which an attribute differs"):
        fit_attribute_weights(scorer, rated_rows()[:1])
    with pytest.raises(ValueError, match="Row 1 of the data cannot be used"):
        fit_attribute_weights(scorer, [{"prompt": "w3"}])


# ----- scores, files, serving

def test_a_scorer_shows_the_attributes_of_each_reward(saved):
    prompts, responses = ["w3 w4", "w3 w4", "w9"], [" w5", " w6 w7 w8", " w10"]
    scorer = Scorer.from_pretrained(saved, device="cpu")
    scored = scorer.score(prompts, responses, attributes=True)
    plain = scorer.score(prompts, responses)
    assert all(type(reward) is float for reward in plain) and [reward for reward, _ in scored] == plain
    for (reward, attributes), prompt, response in zip(scored, prompts, responses):
        outputs = outputs_of(scorer.model, ids_of(prompt + response))[0]
        assert list(attributes.values()) == pytest.approx(outputs.tolist(), abs=1e-5)
        assert reward == pytest.approx(sum(ALL_WEIGHTS[name] * value for name, value in attributes.items()), abs=1e-5)
    normalized = scorer.score(prompts, responses, normalize=True, attributes=True)
    assert [reward.attributes for reward in normalized] == [reward.attributes for reward in scored]
    assert [reward.reward for reward in normalized] == pytest.approx([(reward - 1) / 2 for reward in plain])
    assert scorer.rank("w3 w4", responses[:2])[0].reward == max(plain[:2])
    other = Scorer(scorer.model, scorer.tokenizer, attribute_weights={"clarity": 1.0})
    assert other.score(prompts, responses) == pytest.approx([reward.attributes["clarity"] for reward in scored])
    with pytest.raises(ValueError, match="the scorer has none"):
        Rule(lambda prompt, response: 0.0).score(prompts, responses, attributes=True)


def test_a_file_of_rewards_has_the_attributes(saved, tmp_path):
    rows = [{"prompt": "w3", "response": " w4"}, {"prompt": "w3", "responses": [" w5", " w6"]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scorer = Scorer.from_pretrained(saved, device="cpu")
    score_file(scorer, str(tmp_path / "rows.jsonl"), str(tmp_path / "out.jsonl"))
    one, two = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    scored = scorer.score(["w3"] * 3, [" w4", " w5", " w6"], attributes=True)
    assert one == {**rows[0], "reward": scored[0].reward, "attributes": scored[0].attributes}
    by_name = {name: [scored[1].attributes[name], scored[2].attributes[name]] for name in NAMES}
    assert two == {**rows[1], "rewards": [scored[1].reward, scored[2].reward], "attributes": by_name}
    (tmp_path / "taken.jsonl").write_text(json.dumps({**rows[0], "attributes": 1}))
    with pytest.raises(ValueError, match="has the column 'attributes', where the rewards are written"):
        score_file(scorer, str(tmp_path / "taken.jsonl"), str(tmp_path / "out2.jsonl"))


def test_the_server_answers_with_attributes(base, saved):
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    from fastapi.testclient import TestClient

    from rlhf_reward.serving import make_app

    scorer = Scorer.from_pretrained(saved, device="cpu")
    expected, = scorer.score(["w3"], [" w4"], attributes=True)
    with TestClient(make_app(scorer)) as client:
        body = {"prompts": ["w3"], "responses": [" w4"]}
        assert client.post("/score", json=body).json() == {
            "rewards": pytest.approx([expected.reward]), "attributes": [pytest.approx(expected.attributes)]
        }
        rank = client.post("/rank", json={"prompt": "w3", "responses": [" w4", " w5"]}).json()["ranked"]
        assert {answer["index"] for answer in rank} == {0, 1} and rank[0]["reward"] >= rank[1]["reward"]
        result, = client.post("/classify", json={"input": "w3 w4"}).json()["data"]
        assert result["label"] == "reward" and result["probs"] == pytest.approx([expected.reward], abs=1e-4)
        normalized = client.post("/score", json={**body, "normalize": True}).json()
        assert normalized["rewards"] == pytest.approx([(expected.reward - 1) / 2])
    plain = Scorer(RewardModel(base, 0.0, "cpu"), word_tokenizer())
    with TestClient(make_app(plain)) as client:
        assert list(client.post("/score", json=body).json()) == ["rewards"]


# ----- evaluation, audit

def test_an_attribute_is_calibrated_if_its_outputs_are_its_ratings():
    ratings = np.array([1.0, 2.0, 4.0, math.nan])
    assert rating_fit(ratings.copy(), np.full(4, math.nan)) is None
    exact = rating_fit(np.array([1.0, 2.0, 4.0, 9.0]), ratings)
    assert exact["responses"] == 3 and exact["mean_squared_error"] == exact["bias"] == 0
    assert exact["slope"] == pytest.approx(1) and exact["pearson"] == pytest.approx(1)
    wide = rating_fit(np.array([3.0, 5.0, 9.0, 0.0]), ratings) # 2 r + 1
    assert wide["slope"] == pytest.approx(0.5) and wide["bias"] == pytest.approx(10 / 3)
    assert wide["mean_squared_error"] == pytest.approx((4 + 9 + 25) / 3) and wide["spearman"] == pytest.approx(1)
    constant = rating_fit(np.ones(4), ratings)
    assert constant["pearson"] is constant["slope"] is None and constant["bias"] == pytest.approx(1 - 7 / 3)


def test_the_report_has_the_figures_of_each_attribute(saved, monkeypatch):
    monkeypatch.setattr(report, "plots", lambda evaluation: {}) # which take seconds
    scorer = Scorer.from_pretrained(saved, device="cpu")
    rows = rated_rows()[1:4:2] + rated_rows()[5:]
    result = evaluate(scorer, rows)
    figures = result.report["attributes"]
    assert list(figures) == NAMES and [figures[name]["weight"] for name in NAMES] == list(ALL_WEIGHTS.values())
    assert figures["helpfulness"]["ratings"]["responses"] == 4 and figures["clarity"]["ratings"] is None
    alone = evaluate(Scorer.from_pretrained(saved, device="cpu", attribute_weights={"helpfulness": 1.0}), rows).report
    assert figures["helpfulness"]["accuracy_interval"] == alone["accuracy_interval"]
    for name, value in figures["helpfulness"]["length"].items():
        is_number = isinstance(value, float)
        assert value == (pytest.approx(alone["length"][name]) if is_number else alone["length"][name])
    known = []
    for row in rows[:2]:
        scored = scorer.score([row["prompt"]] * 3, row["responses"], attributes=True)
        for reward, rating in zip(scored, row["ratings"]["helpfulness"]):
            if rating is not None:
                known.append((reward.attributes["helpfulness"], rating))
    assert figures["helpfulness"]["ratings"]["pearson"] == pytest.approx(np.corrcoef(*zip(*known))[0, 1], abs=1e-5)
    evaluations = {"data": {"model": result, "rule": evaluate(Rule(lambda prompt, response: len(response)), rows)}}
    for page in (report.report_markdown(evaluations), report.report_html(evaluations)):
        assert page.count("Attributes, model") == 1 and "Attributes, rule" not in page
        assert all(name in page for name in NAMES)
    assert json.dumps(report.report_json(evaluations), allow_nan=False)


def test_the_audit_counts_ratings(caplog):
    rows = table([*rated_rows(), {"prompt": "w3", "responses": ["a", "b"], "ratings": {"clarity": [90, 10]}}])
    result = audit(rows)
    assert result["attributes"]["helpfulness"] == {"rated": 8, "missing": 9, "min": 0.0, "mean": 22 / 8, "max": 4.0}
    assert result["attributes"]["clarity"]["rated"] == 3
    assert "helpfulness: 8 responses rated, 9 not; 0 to 4, mean 2.75" in audit_table(result)
    assert any("The ratings of clarity range over 87 and those of" in note for note in result["notes"])
    only = audit(table(rated_rows()[:1]))
    assert only["problems"] == [] and audit(table([{**PAIR}]).remove_columns(["ranks"]))["attributes"] == {}
    same = audit(table([{"prompt": "w3", "responses": ["a", "b"], "ratings": {"clarity": [2, 2]}}]))
    assert "All 2 ratings of clarity are 2, from which nothing can be learned." in same["notes"]


# ----- command line

def test_weights_on_the_command_line():
    from rlhf_reward.cli.arguments import parse_weights

    assert parse_weights(None) is None and parse_weights("a=1, b=-0.4") == {"a": 1.0, "b": -0.4}
    assert parse_weights("a=b=2") == {"a=b": 2.0}
    for wrong in ("a", "a=", "=1", "a=much", "a=1,a=2", "a=1,"):
        with pytest.raises(ValueError, match="is not a mapping; expected attributes, each once, with a number"):
            parse_weights(wrong)


def test_train_gives_attributes_and_learns_their_weights(base, tmp_path, capsys):
    from rlhf_reward.cli.train_command import train

    rows = [{**row, "prompt": f"w{number} w3"} for number, row in enumerate(ALL_RATED * 4, start=3)]
    pairs = [{"prompt": "w3", "chosen": f" w{number} w5", "rejected": f" w{number + 1}"} for number in range(5, 12)]
    for name, written in (("rows", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, written)))
    out = tmp_path / "out"
    options = ["--model", base, "--dataset", str(tmp_path / "rows.jsonl"), "--loss", "regression"]
    options += ["--eval_dataset", str(tmp_path / "pairs.jsonl"), "--output_dir", str(out), "--max_steps", "1"]
    options += ["--report_to", "none", "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no", "--dropout", "0"]
    learned = ["--attributes", *NAMES, "--learn_attribute_weights", str(tmp_path / "pairs.jsonl")]
    metrics = train([*options, *learned])
    model = RewardModel.from_pretrained(out, device="cpu")
    weights = model.attribute_weights
    assert list(weights) == NAMES and len(set(weights.values())) == 3
    scorer = Scorer.from_pretrained(out, device="cpu")
    assert fit_attribute_weights(scorer, pairs) == pytest.approx(weights, rel=1e-3)
    rewards = scorer.score_comparisons([to_comparison(row) for row in pairs])
    assert metrics["eval_accuracy"] == pytest.approx(np.mean([chosen > rejected for chosen, rejected in rewards]))
    assert metrics["eval_reward_mean"] == pytest.approx(np.mean(rewards), abs=1e-4)
    assert "`verbosity`" in (out / "README.md").read_text()
    for extra, problem in (
        (["--attributes", "clarity", "--model", str(out)], "is a reward model with the attributes"),
        ([*learned[4:], "--loss", "bradley_terry"], "goes with a model of several --attributes"),
        (["--attributes", *NAMES, "--attribute_weights", "verbosity"], "is not a mapping"),
        (["--attributes", *NAMES, "--attribute_weights", "taste=1"], "expected weights by name"),
    ):
        with pytest.raises(SystemExit) as stop:
            train([*options, *extra])
        assert problem in str(stop.value) + capsys.readouterr().err


def test_rows_that_are_written_again_keep_their_ratings():
    ranked = rated_rows()[1]
    for row in (ranked, {**ranked, "ranks": [3, 1, 2]}, {**PAIR, "ratings": {"clarity": [1, None]}}):
        comparison = to_comparison(row)
        assert to_comparison(comparison_row(comparison)) == comparison
    swapped = {"prompt": "w3", "response_a": "w4", "response_b": "w5", "winner": "b", "ratings": {"a": [1, 2]}}
    assert to_comparison(comparison_row(to_comparison(swapped))).attributes == {"a": (2.0, 1.0)}
