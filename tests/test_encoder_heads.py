"""
A reward model on an encoder is its family's classifier in transformers without the last linear layer, and its
checkpoint is that classifier with a bias of 0.
"""
import json
import logging
import re

import pytest
import torch
import transformers as T
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch.testing import assert_close
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from architectures import ENCODERS, IDS, PAD, SIZE, padded, word_tokenizer
from rlhf_reward import RewardConfig, RewardModel, RewardTrainer
from rlhf_reward.encoders import EncoderClassifier, open_model
from rlhf_reward.packing import choose_layout
from rlhf_reward.reward import is_reward_model
from rlhf_reward.run_record import weights_fingerprint
from rlhf_reward.scoring import Scorer
from rlhf_reward.tokens import tokenized_comparison

CLOSE = dict(atol=1e-5, rtol=1e-5)
XLM = dict(vocab_size=64, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64, pad_index=PAD)
MODERNBERT = {**SIZE, "num_hidden_layers": 3, **IDS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}
FAMILIES = {  # the config, and the layers between the hidden states and the head
    "bert": (ENCODERS["bert"], ["bert.pooler.dense"]),
    "roberta": (ENCODERS["roberta"], ["classifier.dense"]),
    "xlm-roberta": (T.XLMRobertaConfig(**SIZE, **IDS), ["classifier.dense"]),
    "camembert": (T.CamembertConfig(**SIZE, **IDS), ["classifier.dense"]),
    "distilbert": (ENCODERS["distilbert"], ["pre_classifier"]),
    "electra": (T.ElectraConfig(**SIZE, pad_token_id=PAD, embedding_size=16), ["classifier.dense"]),
    "albert": (T.AlbertConfig(**SIZE, pad_token_id=PAD, embedding_size=16), ["albert.pooler"]),
    "deberta-v2": (ENCODERS["deberta-v2"], ["pooler.dense"]),
    "modernbert-mean": (T.ModernBertConfig(**MODERNBERT, classifier_pooling="mean"), ["head.dense", "head.norm"]),
    "modernbert-cls": (T.ModernBertConfig(**MODERNBERT, classifier_pooling="cls"), ["head.dense", "head.norm"]),
    "mpnet": (T.MPNetConfig(**SIZE, **IDS), ["classifier.dense"]),
    "squeezebert": (ENCODERS["squeezebert"], ["transformer.pooler.dense"]),
    "eurobert": (T.EuroBertConfig(**SIZE, **IDS, num_key_value_heads=2), ["dense"]),
    "xlm": (T.XLMConfig(**XLM), []),
}
OF_EACH_FORM = {"bert", "roberta", "modernbert-mean", "xlm"}  # a pooler, layers of the head, pretrained ones, none
PRETRAINED = {"modernbert-mean", "modernbert-cls", "squeezebert"}  # with layers that a language model has too
ROWS = [[1, 5, 6, 7, 8, 9, 10, 2], [1, 11, 2], [1, 12, 13, 14, 15, 2]]
TEXTS = ["w5 w6 w7 w8 w9 w10", "w11", "w12 w13 w14 w15"]


def tokenizer_of_encoder(**special):
    "One that writes <bos> as the classifier's token and <eos> as the separator, as encoders have them."
    tokenizer = word_tokenizer(cls_token="<bos>", sep_token="<eos>", **special)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B:1 <eos>:1", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return tokenizer


@torch.no_grad()
def change(model, scale=0.05):
    "Change all that is trained, as training would."
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "Folder of a family's language model, saved once."
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            change(AutoModelForMaskedLM.from_config(FAMILIES[family][0])).save_pretrained(folder)
            tokenizer_of_encoder().save_pretrained(folder)
            made[family] = str(folder)
        return made[family]

    return get


def reward_model(base, family, **kwargs):
    "A model that looks trained."
    torch.manual_seed(1)
    return change(RewardModel(base(family), device="cpu", **kwargs))


@torch.no_grad()
def alone(model, rows=ROWS):
    rewards = []
    for row in rows:
        outputs = model(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long))
        rewards.append(outputs if torch.is_tensor(outputs) else outputs.logits)
    return torch.cat(rewards).float()


@torch.no_grad()
def elsewhere(folder, texts=TEXTS):
    "Rewards of transformers, from the saved tokenizer and classifier, padded as they do by themselves."
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = T.PreTrainedTokenizerFast.from_pretrained(folder)
    return classifier(**tokenizer(texts, padding=True, return_token_type_ids=False, return_tensors="pt")).logits


def facts_of(folder):
    return json.loads((folder / "config.json").read_text())["rlhf_reward"]


# Saved


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_opens_elsewhere_with_the_same_rewards(base, family, tmp_path):
    model = reward_model(base, family)
    assert model.pooling == "classifier" and model.score.bias is None
    expected = alone(model)
    assert expected.std() > 1e-3, "rewards too much alike to tell anything"
    model.save_pretrained(tmp_path, tokenizer_of_encoder())
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"][0].endswith("ForSequenceClassification") and saved["problem_type"] == "regression"
    facts = saved["rlhf_reward"]
    assert facts["opens_as_sequence_classification"] and facts["pooling"] == "classifier" and "note" not in facts
    weights = load_file(tmp_path / "model.safetensors")
    assert weights[f"{facts['head']}.bias"].tolist() == [0] and "score.weight" not in weights
    assert_close(elsewhere(tmp_path), expected, **CLOSE)
    again = RewardModel.from_pretrained(tmp_path, device="cpu")
    assert is_reward_model(tmp_path) and not again.new_weights
    assert_close(alone(again), expected, **CLOSE)
    with torch.no_grad():
        assert_close(again(*padded(ROWS, "left", PAD)), expected, **CLOSE)
    opened = open_model(tmp_path, "cpu")
    assert isinstance(opened, RewardModel)
    assert_close(alone(opened), expected, **CLOSE)
    if family in OF_EACH_FORM:
        again.save_pretrained(tmp_path / "again", tokenizer_of_encoder())
        assert_close(elsewhere(tmp_path / "again"), expected, **CLOSE)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert-mean"])
def test_scores_are_those_of_one_text_as_in_training(base, family, tmp_path):
    "Prompt and response are one text, not the two segments of a cross-encoder, whichever class opens the folder."
    tokenizer = tokenizer_of_encoder()
    model = reward_model(base, family)
    model.save_pretrained(tmp_path, tokenizer)
    expected = alone(model)[:, 0].tolist()
    prompts = ["w5 w6 w7 ", "", "w12 "]
    responses = ["w8 w9 w10", "w11", "w13 w14 w15"]
    assert Scorer.from_pretrained(tmp_path, device="cpu").score(prompts, responses) == pytest.approx(expected, abs=1e-5)
    classifier = EncoderClassifier(str(tmp_path), device="cpu")
    assert Scorer(classifier, tokenizer).score(prompts, responses) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert-mean", "deberta-v2"])
def test_cross_encoder_gives_the_same_rewards(base, family, tmp_path):
    "It is given a whole text; a pair is two segments to it, another text than in training."
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is missing")
    model = reward_model(base, family)
    model.save_pretrained(tmp_path, tokenizer_of_encoder())
    cross = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    rewards = torch.tensor([float(cross.predict(text)) for text in TEXTS])[:, None]
    assert_close(rewards, alone(model), **CLOSE)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("special", [{"pad_token": None}, {"pad_token": "<eos>"}], ids=["no pad", "pad=sep"])
def test_an_added_pad_token_has_an_embedding(base, family, special, tmp_path):
    model = reward_model(base, family)
    expected = alone(model)
    model.save_pretrained(tmp_path, tokenizer_of_encoder(**special))
    assert_close(alone(RewardModel.from_pretrained(tmp_path, device="cpu")), expected, **CLOSE)
    saved = T.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert saved.pad_token == "<|pad|>"
    assert classifier.get_input_embeddings().num_embeddings == saved.pad_token_id + 1


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_the_head_stays_in_float32(base, family, tmp_path):
    model = reward_model(base, family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, tokenizer_of_encoder())
    again = RewardModel.from_pretrained(tmp_path, device="cpu")
    assert {parameter.dtype for parameter in again.backbone.parameters()} == {torch.bfloat16}
    assert torch.equal(again.score.weight, model.score.weight) and torch.equal(alone(again), alone(model))


def test_gathered_weights_are_what_is_written(base, tmp_path):
    model = reward_model(base, "roberta")
    gathered = {name: 2 * weight for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path, tokenizer_of_encoder(), gathered)
    again = RewardModel.from_pretrained(tmp_path, device="cpu")
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, gathered[name]), name


# The first token


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert-mean"])
def test_a_checkpoint_of_the_first_token_keeps_its_rewards(base, family, tmp_path):
    "As this library wrote every encoder before: the bare backbone, and the head under `score`."
    torch.manual_seed(0)
    backbone = change(T.AutoModel.from_pretrained(base(family), attn_implementation="sdpa"))
    head = torch.randn(1, 32)
    if hasattr(backbone, "pooler"):
        backbone.pooler = torch.nn.Identity()
    backbone.config.rlhf_reward = {"pooling": "first", "ends_with_eos": True, "opens_as_sequence_classification": False}
    backbone.save_pretrained(tmp_path)
    save_file({**load_file(tmp_path / "model.safetensors"), "score.weight": head}, tmp_path / "model.safetensors")
    tokenizer_of_encoder().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = [backbone(torch.tensor([row])).last_hidden_state[0, 0] @ head[0] for row in ROWS]
    model = open_model(str(tmp_path), "cpu")
    assert model.pooling == "first" and is_reward_model(tmp_path)
    assert_close(alone(model)[:, 0], torch.stack(expected), **CLOSE)
    with pytest.raises(ValueError, match="'classifier', but this is a reward model that was trained with 'first'"):
        RewardModel.from_pretrained(tmp_path, device="cpu", pooling="classifier")
    model.save_pretrained(tmp_path / "again", tokenizer_of_encoder())
    assert_close(alone(RewardModel.from_pretrained(tmp_path / "again", device="cpu")), alone(model))


def test_the_first_token_is_an_option_and_says_that_it_opens_here_only(base, tmp_path):
    model = reward_model(base, "bert", pooling="first")
    with torch.no_grad():
        hidden = model.backbone(torch.tensor([ROWS[0]])).last_hidden_state[0, 0]
        assert_close(alone(model)[0, 0], hidden @ model.score.weight[0], **CLOSE)
    model.config.rlhf_reward = {"head": "classifier"}  # of a checkpoint that this one was opened from
    model.save_pretrained(tmp_path, tokenizer_of_encoder())
    facts = facts_of(tmp_path)
    assert not facts["opens_as_sequence_classification"] and "RewardModel.from_pretrained" in facts["note"]
    assert "head" not in facts
    assert_close(alone(RewardModel.from_pretrained(tmp_path, device="cpu")), alone(model))


@pytest.mark.parametrize("config, reason", [
    (T.XLMConfig(**XLM, summary_activation="tanh"), "does not end in one linear layer"),
    (T.XLMConfig(**XLM, summary_type="mean"), "does not give a text the same states when it is padded"),
    (T.XmodConfig(**SIZE, **IDS), "XmodForSequenceClassification fails .*Input language unknown"),
    (T.NeoMMEConfig(**SIZE, **IDS, num_key_value_heads=2), "transformers has no sequence classifier for it"),
], ids=["activation", "padding", "language", "no class"])
def test_a_classifier_of_another_form_is_reported_and_the_first_token_read(config, reason, tmp_path, caplog):
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = RewardModel(str(tmp_path), device="cpu")
    assert model.pooling == "first" and model.score.in_features == 32
    assert "is read at the first token" in caplog.text and re.search(reason, caplog.text)
    with pytest.raises(ValueError, match=f"(?s)pooling is 'classifier', but .*{reason}"):
        RewardModel(str(tmp_path), device="cpu", pooling="classifier")


def test_a_decoder_has_no_such_pooling(tmp_path):
    T.LlamaForCausalLM(T.LlamaConfig(**SIZE)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pooling is 'classifier', but this is a decoder"):
        RewardModel(str(tmp_path), device="cpu", pooling="classifier")


# The layers before the head


@pytest.mark.parametrize("family", FAMILIES)
def test_new_layers_are_named_and_everything_is_trained(base, family, caplog):
    with caplog.at_level(logging.INFO):
        model = RewardModel(base(family), device="cpu")
    layers = FAMILIES[family][1]
    assert {name.rpartition(".")[0] for name in model.new_weights} == set(() if family in PRETRAINED else layers)
    assert ("they are new, as the head is" in caplog.text) == bool(model.new_weights)
    model.train()(*padded(ROWS, "right", PAD)).sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert model.score.weight.std().item() == pytest.approx(33**-0.5, rel=0.5)


@pytest.mark.parametrize("family", ["bert", "modernbert-cls", "albert"])
def test_pretrained_layers_are_kept(family, tmp_path):
    "BERT and ALBERT have a pooler in a bare backbone, ModernBERT its head in a language model."
    torch.manual_seed(0)
    auto_class = AutoModelForMaskedLM if family.startswith("modernbert") else T.AutoModel
    pretrained = change(auto_class.from_config(FAMILIES[family][0]))
    pretrained.save_pretrained(tmp_path)
    model = RewardModel(str(tmp_path), device="cpu")
    assert not model.new_weights
    weights = pretrained.state_dict()
    for layer in FAMILIES[family][1]:
        saved_name = layer if family.startswith("modernbert") else layer.partition(".")[2]
        assert torch.equal(model.backbone.get_submodule(layer).weight, weights[f"{saved_name}.weight"])


def test_a_classifier_of_several_labels_can_be_the_base(tmp_path):
    torch.manual_seed(0)
    config = T.RobertaConfig.from_dict({**ENCODERS["roberta"].to_dict(), "num_labels": 3})
    classifier = change(AutoModelForSequenceClassification.from_config(config))
    classifier.save_pretrained(tmp_path)
    model = RewardModel(str(tmp_path), device="cpu")
    assert torch.equal(model.backbone.classifier.dense.weight, classifier.classifier.dense.weight)
    assert model.config.num_labels == 1 and model.score.weight.shape == (1, 32)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "modernbert-mean"])
def test_dropout_before_the_head_is_the_models_own(base, family, tmp_path):
    "With none in the backbone, a model in training gives the rewards of evaluation, whatever the family has there."
    config = FAMILIES[family][0].to_dict()
    for name in config:
        if "dropout" in name:
            config[name] = 0.0
    for name in ("classifier_dropout", "cls_dropout", "pooler_dropout"):
        config[name] = 0.5
    AutoModelForMaskedLM.from_config(type(FAMILIES[family][0]).from_dict(config)).save_pretrained(tmp_path)
    model = RewardModel(str(tmp_path), 0.0, "cpu")
    assert_close(alone(model.train()), alone(model.eval()))
    model.dropout.p = 0.5
    assert not torch.allclose(alone(model.train()), alone(model.eval()), atol=1e-4)


def test_packed_rows_are_refused_and_batches_padded(base):
    model = reward_model(base, "bert")
    layout = choose_layout(model, [tokenized_comparison([1, 5, 6], [[7, 8, 2], [9, 2]])])
    assert "with pooling 'classifier' a row is one text" in layout.difference
    assert layout.collator.__name__ == "pad_comparisons"


def test_new_layers_do_not_make_another_model_of_a_run(base):
    "They are random, and a run that is resumed opens the base again."
    torch.manual_seed(0)
    models = [RewardModel(base("roberta"), device="cpu") for _ in range(2)]
    first, second = (model.backbone.classifier.dense.weight for model in models)
    assert not torch.equal(first, second)
    assert weights_fingerprint(models[0]) == weights_fingerprint(models[1])
    with torch.no_grad():
        models[1].get_input_embeddings().weight.add_(1)
    assert weights_fingerprint(models[0]) != weights_fingerprint(models[1])


PREFERENCES = Dataset.from_list([
    {"prompt": f"w{5 + number % 20} ", "chosen": f"w{30 + number % 9} w40", "rejected": f"w{30 + number % 9} w50"}
    for number in range(16)
])


@pytest.mark.parametrize("family, adapter", [("bert", False), ("roberta", True)])
def test_training_reaches_the_new_layers_and_resumes_from_any_start(base, family, adapter, tmp_path):
    def trainer(folder, seed):
        torch.manual_seed(seed)  # of the new layers
        args = RewardConfig(
            str(folder),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            max_steps=4,
            save_steps=2,
            seed=0,
        )
        peft_config = None
        if adapter:
            peft = pytest.importorskip("peft", reason="the extra peft is not installed")
            peft_config = peft.LoraConfig(r=2, target_modules="all-linear")
        model = RewardModel(base(family), 0.0, "cpu")
        return RewardTrainer(
            model,
            args,
            train_dataset=PREFERENCES,
            processing_class=tokenizer_of_encoder(),
            peft_config=peft_config,
        )

    uninterrupted = trainer(tmp_path / "run", seed=0)
    trained = [name for name, parameter in uninterrupted.model.named_parameters() if parameter.requires_grad]
    layer = next(name for name in trained if "pooler.dense" in name or "classifier.dense" in name)
    before = uninterrupted.model.get_parameter(layer).clone()
    uninterrupted.train()
    assert not torch.equal(uninterrupted.model.get_parameter(layer), before)
    resumed = trainer(tmp_path / "run", seed=1)
    assert not torch.equal(resumed.model.get_parameter(layer), before)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert_close(alone(resumed.model.eval()), alone(uninterrupted.model.eval()), atol=1e-6, rtol=1e-5)


# Refused


def test_a_head_that_got_a_bias_elsewhere_is_refused(base, tmp_path):
    model = reward_model(base, "electra")
    model.save_pretrained(tmp_path, tokenizer_of_encoder())
    weights = load_file(tmp_path / "model.safetensors")
    weights["classifier.out_proj.bias"] += 0.25
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="has the bias 0.25; expected 0.*remove rlhf_reward from its config.json"):
        RewardModel.from_pretrained(tmp_path, device="cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rlhf_reward"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    scorer = Scorer.from_pretrained(tmp_path, device="cpu", text_pairs=False)
    expected = (alone(model) + 0.25)[:, 0].tolist()
    assert scorer.score([None] * 3, TEXTS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family, missing", [
    ("bert", "bert.pooler.dense.weight"),
    ("roberta", "classifier.dense.bias"),
    ("deberta-v2", "pooler.dense.weight"),
    ("distilbert", "pre_classifier.weight"),
    ("modernbert-mean", "head.norm.weight"),
])
def test_a_trained_checkpoint_without_a_layer_is_refused(base, family, missing, tmp_path):
    reward_model(base, family).save_pretrained(tmp_path, tokenizer_of_encoder())
    weights = load_file(tmp_path / "model.safetensors")
    del weights[missing]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for open_it in (RewardModel.from_pretrained, RewardModel, EncoderClassifier):
        with pytest.raises(ValueError, match=f"lacks 1 weights of .*ForSequenceClassification, such as {missing}"):
            open_it(str(tmp_path), device="cpu")


def test_a_trained_checkpoint_without_its_head_is_refused(base, tmp_path):
    reward_model(base, "bert").save_pretrained(tmp_path, tokenizer_of_encoder())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert not is_reward_model(tmp_path)
    with pytest.raises(ValueError, match="The reward head of .* does not exist"):
        RewardModel.from_pretrained(tmp_path, device="cpu")


# Adapters


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "squeezebert"])  # which is convolutions
def test_adapters_open_in_peft_with_the_same_rewards(base, family, tmp_path):
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    from rlhf_reward.adapters import add_adapter, lora_config, merge_adapter

    torch.manual_seed(1)
    model = add_adapter(RewardModel(base(family), 0.0, "cpu"), lora_config(2))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for layer in FAMILIES[family][1]:
        assert any(f"{layer}.modules_to_save." in name for name in trained), layer
        assert not any(layer in name and "lora_" in name for name in trained), layer
    change(model, 0.1)
    expected = alone(model)
    model.save_pretrained(tmp_path / "adapter", tokenizer_of_encoder())
    with torch.no_grad():
        theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1)
    assert_close(alone(theirs.eval()), expected, **CLOSE)
    again = RewardModel.from_pretrained(tmp_path / "adapter", device="cpu")
    assert again.pooling == "classifier" and is_reward_model(tmp_path / "adapter")
    assert_close(alone(again), expected, **CLOSE)
    if family not in OF_EACH_FORM:
        return
    scores = Scorer.from_pretrained(tmp_path / "adapter", device="cpu").score([None] * 3, TEXTS)
    assert scores == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
    again.save_pretrained(tmp_path / "again", tokenizer_of_encoder())
    assert load_file(tmp_path / "again/adapter_model.safetensors").keys() == load_file(
        tmp_path / "adapter/adapter_model.safetensors"
    ).keys()
    assert_close(alone(RewardModel.from_pretrained(tmp_path / "again", device="cpu")), expected, **CLOSE)
    merge_adapter(again).save_pretrained(tmp_path / "merged", tokenizer_of_encoder())
    assert_close(elsewhere(tmp_path / "merged"), expected, **CLOSE)
    assert_close(alone(RewardModel.from_pretrained(tmp_path / "merged", device="cpu")), expected, **CLOSE)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert-mean"])
def test_layers_before_the_head_are_not_quantized(family, tmp_path):
    "They are trained whole under the adapter; the model can be trained after it was tried."
    pytest.importorskip("peft", reason="the extra peft is not installed")
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from rlhf_reward.adapters import add_adapter, lora_config

    config = FAMILIES[family][0].to_dict()
    config = type(FAMILIES[family][0]).from_dict({**config, "hidden_size": 64, "intermediate_size": 64})
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "base")
    quantized = T.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float32")
    model = RewardModel(str(tmp_path / "base"), 0.0, "cpu", quantization_config=quantized)
    assert quantized.llm_int8_skip_modules is None
    assert "Linear4bit" in {type(module).__name__ for module in model.backbone.modules()}
    assert type(model.backbone.get_submodule(FAMILIES[family][1][0])) is torch.nn.Linear
    model = add_adapter(model, lora_config(2))
    model.train()(*padded(ROWS, "right", PAD)).sum().backward()
    expected = alone(change(model, 0.1).eval())
    model.save_pretrained(tmp_path / "adapter", tokenizer_of_encoder())
    again = RewardModel.from_pretrained(tmp_path / "adapter", device="cpu", quantization_config=quantized)
    assert_close(alone(again), expected, **CLOSE)


def test_an_adapter_of_the_first_token_keeps_its_rewards(base, tmp_path):
    pytest.importorskip("peft", reason="the extra peft is not installed")
    from rlhf_reward.adapters import add_adapter, lora_config

    torch.manual_seed(1)
    model = change(add_adapter(RewardModel(base("bert"), 0.0, "cpu", pooling="first"), lora_config(2)), 0.1)
    model.save_pretrained(tmp_path, tokenizer_of_encoder())
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.score.weight" in names and not any("pooler" in name for name in names)
    again = RewardModel.from_pretrained(tmp_path, device="cpu")
    assert again.pooling == "first"
    assert_close(alone(again), alone(model))


def test_an_adapter_on_a_trained_encoder_may_have_no_head(base, tmp_path):
    "The head and the layers before it are then those of the base."
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")

    reward_model(base, "bert").save_pretrained(tmp_path / "reward", tokenizer_of_encoder())
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    adapted = peft.get_peft_model(classifier, peft.LoraConfig(r=2, target_modules=["query"]))
    change(adapted, 0.1).save_pretrained(tmp_path / "adapter")
    expected = alone(adapted.eval())
    assert is_reward_model(tmp_path / "adapter")
    assert_close(alone(RewardModel.from_pretrained(tmp_path / "adapter", device="cpu")), expected, **CLOSE)


def test_an_adapter_that_peft_trained_on_a_trained_encoder_reads_one_text(base, tmp_path):
    "It has a head with a bias, and its base was trained on one text."
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")

    reward_model(base, "bert").save_pretrained(tmp_path / "reward", tokenizer_of_encoder())
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    adapted = peft.get_peft_model(classifier, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    change(adapted, 0.1).save_pretrained(tmp_path / "adapter")
    tokenizer_of_encoder().save_pretrained(tmp_path / "adapter")
    expected = alone(adapted.eval())[0].item()
    scorer = Scorer.from_pretrained(tmp_path / "adapter", device="cpu")
    assert scorer.score(["w5 w6 w7 "], ["w8 w9 w10"]) == [pytest.approx(expected, abs=1e-5)]
