"Text reward models on checkpoints that read images or sound, too."
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers as T
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from architectures import VOCAB, padded, word_tokenizer
from composites import CLASSIFIERS, COMPOSITES, paligemma, rename_weights, save_classifier, save_composite
from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, Scorer
from rlhf_reward.adapters import add_adapter, merge_adapter
from rlhf_reward.checkpoints import default_pooling, is_reward_model
from rlhf_reward.cli import main
from rlhf_reward.composite import text_config
from rlhf_reward.encoders import open_model

pytestmark = pytest.mark.usefixtures("no_curves")

CLOSE = dict(atol=1e-5, rtol=1e-5)
ISSUE = ("gemma3", "gemma4", "llama4", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_vl")
ROWS = [
    torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (9, 5, 1, 7)
]
IDS, MASK = padded(ROWS, "right", 0)


@pytest.fixture(scope="module")
def composite(tmp_path_factory):
    "Folder and language model of a family, saved once."
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, save_composite(family, folder, word_tokenizer())
        return made[family]

    return get


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    "Folder and model of a composite's own classifier, saved once."
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, save_classifier(family, folder, word_tokenizer())
        return made[family]

    return get


def opened(folder, **options):
    torch.manual_seed(1)
    return RewardModel(str(folder), 0.0, "cpu", **options)


@torch.no_grad()
def rewards(model, ids=IDS, mask=MASK):
    outputs = model(input_ids=ids, attention_mask=mask)
    return outputs if torch.is_tensor(outputs) else outputs.logits


def in_transformers(folder):
    model = T.AutoModelForSequenceClassification.from_pretrained(folder)
    ids, mask = padded(ROWS, "right", model.config.get_text_config().pad_token_id)
    return type(model).__name__, rewards(model.eval(), ids, mask)


def text(*numbers):
    return " ".join(f"w{number}" for number in numbers)


def comparisons(num_rows=8):
    rows = []
    for row in range(num_rows):
        prompt = text(5 + row % 7, 9, 11 + row % 3) + " "
        rows.append({"prompt": prompt, "chosen": text(20 + row % 5, 21), "rejected": text(30 + row % 6, 31, 32)})
    return Dataset.from_list(rows)


OPTIONS = dict(
    per_device_train_batch_size=8,  # all rows, so that their order does not matter
    learning_rate=3e-3,
    lr_scheduler_type="linear",
    weight_decay=0.0,
    logging_steps=1,
    use_cpu=True,
    bf16=False,
    report_to="none",
    disable_tqdm=True,
    save_strategy="no",
)


def trained(model, folder, peft_config=None, resume=None, **options):
    config = RewardConfig(str(folder), **{"max_steps": 4, **OPTIONS, **options})
    trainer = RewardTrainer(
        model,
        config,
        train_dataset=comparisons(),
        processing_class=word_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# Opening


@pytest.mark.parametrize("family", COMPOSITES)
def test_the_text_part_computes_what_the_composite_computes(family, composite, caplog):
    folder, model = composite(family)
    backbone = opened(folder).backbone
    with torch.no_grad():
        if family == "gemma3n":  # whose layers pass on several states of each token
            expected = model.model(input_ids=IDS, attention_mask=MASK).last_hidden_state
        else:
            expected = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states[-1]
        found = backbone(input_ids=IDS, attention_mask=MASK).last_hidden_state
    assert_close(found * MASK[..., None], expected * MASK[..., None], **CLOSE)
    assert not any(re.search("vision|visual|audio", name) for name, _ in backbone.named_modules())
    reports = [message for message in caplog.messages if "its text part is used" in message]
    part = backbone.config.model_type
    kind = "gemma3n" if family == "gemma3n" else model.config.model_type
    assert len(reports) == 1 and f"is of type {kind}: " in reports[0]
    assert f"its text part is used, as {part}; left out: " in reports[0]
    assert "language_model" not in reports[0] and "head" not in reports[0] and "nothing" not in reports[0]


NAMES = {
    "of the hub": lambda name: name,
    "of version 4.52": lambda name: name.replace("language_model.model.", "model.language_model."),
    "of the module alone": lambda name: name.replace("language_model.model.", "language_model."),
    "of a wrapper": lambda name: "thinker." + name,
}


@pytest.mark.parametrize("names", NAMES)
def test_the_text_part_is_found_by_the_names_of_its_weights(names, composite, tmp_path):
    folder, _ = composite("gemma3")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    rename_weights(copy, NAMES[names])
    assert_close(rewards(opened(copy)), rewards(opened(folder)), atol=0, rtol=0)


def test_another_part_with_embeddings_is_not_taken_for_the_text(composite, tmp_path):
    folder, _ = composite("gemma3")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    weights["a_talker.model.embed_tokens.weight"] = torch.zeros(VOCAB, 32)
    weights["z_talker.model.embed_tokens.weight"] = torch.zeros(VOCAB, 32)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert_close(rewards(opened(copy)), rewards(opened(folder)), atol=0, rtol=0)


def test_a_text_part_without_a_weight_is_refused(composite, tmp_path):
    folder, _ = composite("gemma3")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    del weights["language_model.model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of Gemma3TextModel, such as layers.1.mlp.up_proj.weight"):
        opened(copy)


def test_a_pickled_composite_is_refused(composite, tmp_path):
    folder, model = composite("gemma3")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="'gemma3_text' of a 'gemma3' in a pickle; expected safetensors"):
        opened(copy, use_safetensors=False)


def two_encoders():
    return T.VisionTextDualEncoderConfig.from_vision_text_configs(T.CLIPVisionConfig(), T.BertConfig())


@pytest.mark.parametrize("make_config", [T.CLIPConfig, T.ModernVBertConfig, two_encoders, paligemma])
def test_text_parts_that_are_no_decoders_are_refused(make_config):
    config = make_config()
    problem = f"of type '{config.model_type}', .*; expected a text part that is a causal decoder"
    with pytest.raises(ValueError, match=problem):
        default_pooling(config)


@pytest.mark.parametrize("make_config", [T.ViTConfig, T.T5Gemma2Config, T.LlamaConfig, T.BertConfig])
def test_a_checkpoint_of_one_part_is_as_it_was(make_config):
    config = make_config()
    assert text_config(config) is config


def test_the_config_is_that_of_the_hub():
    "Flat, with the rope parameters by their old names, and all ids at the top."
    config = T.AutoConfig.for_model(
        "qwen2_5_vl",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=[2, 5],
        rope_theta=5000.0,
        rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]},
        vision_config={"depth": 1},
    )
    text = text_config(config)
    assert text.model_type == "qwen2" and (text.hidden_size, text.vocab_size) == (32, 64)
    assert text.rope_parameters["rope_type"] == "default" and text.rope_parameters["rope_theta"] == 5000.0
    assert text.eos_token_id == [2, 5]


@pytest.mark.parametrize("family", COMPOSITES)
def test_a_reward_does_not_depend_on_its_batch(family, composite):
    scorer = Scorer(opened(composite(family)[0]), word_tokenizer())
    responses = [text(8), text(9, 10), text(11, 12, 13)]
    together = scorer.score([text(5, 6, 7) + " "] * 3, responses)
    alone = [scorer.score([text(5, 6, 7) + " "], [response])[0] for response in responses]
    assert together == pytest.approx(alone, abs=1e-5)


# Saving


@pytest.mark.parametrize("family", COMPOSITES)
def test_a_saved_reward_model_opens_everywhere(family, composite, tmp_path):
    model = opened(composite(family)[0])
    expected = rewards(model)
    assert len({round(reward, 3) for reward in expected.flatten().tolist()}) == len(ROWS)
    model.save_pretrained(tmp_path, word_tokenizer())
    again = RewardModel.from_pretrained(tmp_path, 0.0, "cpu")
    assert_close(rewards(again), expected, **CLOSE)
    saved = json.loads((tmp_path / "config.json").read_text())
    class_name = COMPOSITES[family][1]
    assert "vision_config" not in saved and saved["rlhf_reward"]["opens_as_sequence_classification"] == bool(class_name)
    assert not any("vision" in name or "visual" in name for name in load_file(tmp_path / "model.safetensors"))
    if class_name:
        found_class, found = in_transformers(tmp_path)
        assert found_class == class_name
        assert_close(found, expected, **CLOSE)
    again.save_pretrained(tmp_path / "again", word_tokenizer())  # as it is trained further
    assert_close(rewards(RewardModel.from_pretrained(tmp_path / "again", 0.0, "cpu")), expected, **CLOSE)


def test_a_pad_token_that_can_end_a_text_is_replaced(tmp_path):
    "The ids that end a text are those of the whole checkpoint, which may be more than those of its text part."
    save_composite("gemma3", tmp_path / "base", word_tokenizer(), eos_token_id=[2, 5])
    tokenizer = word_tokenizer(pad_token="w5")
    opened(tmp_path / "base").save_pretrained(tmp_path / "reward", tokenizer)
    assert T.AutoTokenizer.from_pretrained(tmp_path / "reward").pad_token == "<|pad|>"
    assert in_transformers(tmp_path / "reward")[1].shape == (4, 1)


@pytest.mark.parametrize("family", ISSUE)
def test_half_precision_is_that_of_the_checkpoint(family, tmp_path):
    save_composite(family, tmp_path / "whole", word_tokenizer())
    model = T.AutoModelForMultimodalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    dtypes = []
    for options in ({}, {"dtype": "auto"}, {"dtype": torch.float16}):
        dtypes.append(opened(tmp_path / "half", **options).get_input_embeddings().weight.dtype)
    assert dtypes == [torch.float32, torch.bfloat16, torch.float16]


# Trained elsewhere


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_composite_classifier_opens_with_its_head(family, classifier, tmp_path):
    folder, model = classifier(family)
    expected = rewards(model)
    assert is_reward_model(folder)
    assert_close(rewards(RewardModel.from_pretrained(folder, 0.0, "cpu")), expected, **CLOSE)
    # by its type transformers opens the tokenizer of words that the tests have as one of bytes
    scorer = Scorer(open_model(str(folder), "cpu"), word_tokenizer())
    texts = [text(*row) for row in ROWS if min(row) > 2]
    ids, mask = padded([row for row in ROWS if min(row) > 2], "right", 0)
    alone = rewards(model, ids, mask).flatten().tolist()
    assert scorer.score([None] * len(texts), texts) == pytest.approx(alone, abs=1e-5)
    again = RewardModel.from_pretrained(folder, 0.0, "cpu")
    again.save_pretrained(tmp_path, word_tokenizer())
    assert in_transformers(tmp_path)[0] == COMPOSITES[family][1]
    assert_close(in_transformers(tmp_path)[1], expected, **CLOSE)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_language_model_and_a_classifier_of_several_labels_have_no_reward(family, composite, tmp_path):
    folder, _ = composite(family)
    assert not is_reward_model(folder)
    with pytest.raises(ValueError, match="The reward head of .* does not exist"):
        RewardModel.from_pretrained(folder, device="cpu")
    save_classifier(family, tmp_path, word_tokenizer(), num_labels=3)
    with pytest.raises(ValueError, match="has 3 labels"):
        Scorer.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("family", [*CLASSIFIERS, "qwen2_5_vl"])
def test_losses_are_those_of_trl(family, composite, classifier, tmp_path):
    "On the composite's classifier; TRL opens the other families only as they are saved here."
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    if family in CLASSIFIERS:
        folder = classifier(family)[0]
        model = RewardModel.from_pretrained(folder, 0.0, "cpu")
    else:
        folder = tmp_path / "start"
        model = opened(composite(family)[0])
        model.save_pretrained(folder, word_tokenizer())
    model.ends_with_eos = True  # as TRL trains on strings
    config = trl.RewardConfig(str(tmp_path / "trl"), max_steps=4, gradient_checkpointing=False, **OPTIONS)
    theirs = trl.RewardTrainer(
        str(folder), args=config, train_dataset=comparisons(), processing_class=word_tokenizer()
    )
    theirs.train()
    ours = trained(model, tmp_path / "ours", max_steps=4)
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    assert losses(ours)[-1] < losses(ours)[0] - 0.1
    theirs.save_model(tmp_path / "saved")
    assert_close(rewards(RewardModel.from_pretrained(tmp_path / "saved", 0.0, "cpu")), rewards(ours.model), **CLOSE)


# Training


# What is special about a family is how it is opened and saved, which is tested above for each of them.
@pytest.mark.parametrize("family, adapter", [("gemma4", False), ("llama4", False), ("gemma3", True), ("qwen3_5", True)])
def test_training_resumes_to_the_same_weights(family, adapter, composite, tmp_path):
    folder, _ = composite(family)
    modules = ["q_proj", "k_proj", "down_proj"]
    peft_config = LoraConfig(r=2, target_modules=modules) if adapter else None
    options = dict(peft_config=peft_config, save_strategy="steps", save_steps=2)
    whole = trained(opened(folder), tmp_path, **options)
    resumed = trained(opened(folder), tmp_path / "resumed", resume=str(tmp_path / "checkpoint-2"), **options)
    assert losses(whole)[-1] < losses(whole)[0] and losses(resumed) == losses(whole)
    weights = whole.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    saved = RewardModel.from_pretrained(tmp_path / "checkpoint-4", 0.0, "cpu")
    assert_close(rewards(saved), rewards(whole.model), **CLOSE)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("family", ["mistral3", "qwen3_vl"])
def test_the_command_line_trains_evaluates_and_scores(family, composite, tmp_path):
    folder, _ = composite(family)
    rows, texts, out = (str(tmp_path / name) for name in ("rows.jsonl", "texts.jsonl", "out"))
    comparisons().to_json(rows)
    Path(texts).write_text(json.dumps({"prompt": "w5 ", "response": "w6"}))
    options = "--max_steps 2 --use_cpu --report_to none --eval_strategy no --disable_tqdm true".split()
    main(["train", "--model", str(folder), "--dataset", rows, "--output_dir", out, *options])
    report, scored = (str(tmp_path / name) for name in ("report", "scored.jsonl"))
    main(["evaluate", "--model", out, "--data", rows, "--device", "cpu", "--output", report])
    main(["score", "--model", out, "--data", texts, "--device", "cpu", "--output", scored])
    reward = json.loads(Path(scored).read_text())["reward"]
    assert reward == pytest.approx(Scorer.from_pretrained(out, device="cpu").score(["w5 "], ["w6"])[0], abs=1e-5)


# Adapters


def perturbed(model):
    "Change all that is trained, as training would."
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


TARGETS = {
    "names": ["q_proj", "v_proj", "down_proj"],
    "all-linear": "all-linear",
    "a pattern": r".*layers\.1\..*\.(up_proj|down_proj)",
}


WITH_TARGETS = [
    *itertools.product(CLASSIFIERS, TARGETS),
    *zip(("gemma4", "mistral3", "qwen2_5_vl", "qwen3_vl"), itertools.cycle(TARGETS)),
]


@pytest.mark.parametrize("family, targets", WITH_TARGETS)
def test_an_adapter_is_saved_opened_and_merged(family, targets, composite, tmp_path):
    folder, _ = composite(family)
    model = add_adapter(opened(folder), LoraConfig(r=2, target_modules=TARGETS[targets]))
    expected = rewards(perturbed(model))
    model.save_pretrained(tmp_path / "adapter", word_tokenizer())
    again = RewardModel.from_pretrained(tmp_path / "adapter", 0.0, "cpu")
    assert is_reward_model(tmp_path / "adapter")
    assert_close(rewards(again), expected, **CLOSE)
    if family in CLASSIFIERS:
        base = T.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        assert_close(rewards(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), expected, **CLOSE)
    merge_adapter(again).save_pretrained(tmp_path / "merged", word_tokenizer())
    assert_close(rewards(RewardModel.from_pretrained(tmp_path / "merged", 0.0, "cpu")), expected, **CLOSE)
    if COMPOSITES[family][1]:
        assert in_transformers(tmp_path / "merged")[0] == COMPOSITES[family][1]
        assert_close(in_transformers(tmp_path / "merged")[1], expected, **CLOSE)


@pytest.mark.parametrize("targets", ["all-linear", r"model\.language_model\.layers\.1\..*(q_proj|out_proj)", None])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_an_adapter_of_peft_opens_without_what_it_has_on_the_vision_tower(family, targets, composite, tmp_path):
    "Its names are those of the composite's classifier."
    folder, _ = composite(family)
    if targets is None:
        targets = ["q_proj", "out_proj", "fc1", "linear_fc1"]  # some are only in the vision tower
    config = LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS")
    base = T.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    theirs = perturbed(get_peft_model(base, config))
    theirs.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert any("vis" in name for name in names) == (not isinstance(targets, str) or targets == "all-linear")
    expected = rewards(theirs)
    assert_close(rewards(RewardModel.from_pretrained(tmp_path, 0.0, "cpu")), expected, **CLOSE)
    assert Scorer.from_pretrained(tmp_path, device="cpu").score([None], [text(5, 6)])


def test_an_adapter_that_lacks_a_weight_of_the_text_part_is_refused(composite, tmp_path):
    folder, _ = composite("gemma3")
    model = perturbed(add_adapter(opened(folder), LoraConfig(r=2, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path, word_tokenizer())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    del weights["base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_B.weight"]
    weights["base_model.model.model.vision_tower.layer.lora_B.weight"] = torch.zeros(2)
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="which differ in .*layers.1.self_attn.q_proj.lora_B.weight"):
        RewardModel.from_pretrained(tmp_path, device="cpu")


def test_new_tokens_are_trained_with_an_adapter(composite, tmp_path):
    folder, _ = composite("gemma3")
    model = opened(folder)
    model.backbone.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[VOCAB, VOCAB + 1, VOCAB + 2])
    expected = rewards(perturbed(add_adapter(model, config)), IDS + (IDS == 9) * (VOCAB - 9))
    model.save_pretrained(tmp_path, word_tokenizer())
    again = RewardModel.from_pretrained(tmp_path, 0.0, "cpu")
    assert_close(rewards(again, IDS + (IDS == 9) * (VOCAB - 9)), expected, **CLOSE)
