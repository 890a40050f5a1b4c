import json

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, IA3Config, LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from architectures import save_language_model, word_tokenizer
from rlhf_reward import RewardConfig, RewardModel, RewardTrainer
from rlhf_reward.adapters import add_adapter, load_adapter, lora_config, merge_adapter
from rlhf_reward.cli import train
from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder
from tiny import open_tiny, tokenized

pytestmark = pytest.mark.usefixtures("no_curves")

IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("base"), synthetic_texts())


def make(base, folder, peft_config=None, model=None, **options):
    torch.manual_seed(0)
    args = RewardConfig(
        str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        **{"logging_steps": 1, "save_strategy": "no", "max_steps": 4, **options}
    )
    return RewardTrainer(
        model or open_tiny(base),
        args,
        train_dataset=tokenized(base, 40),
        eval_dataset=tokenized(base, 10, 1),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=peft_config or LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1),
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_only_the_adapter_and_the_head_change_and_both_are_saved(base, tmp_path):
    trainer = make(base, tmp_path)
    before = state(trainer.model)
    trainer.train()
    trainer.save_model()
    after = state(trainer.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name or name == "score.weight"} and len(changed) > 10
    assert trainer.data_collator.func.__name__ == "pack_comparisons"
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(changed) and "base_model.model.score.weight" in saved
    assert not (tmp_path / "model.safetensors").exists()
    expected = trainer.model.eval()(IDS)
    again = RewardModel.from_pretrained(str(tmp_path), device="cpu")
    assert torch.equal(again(IDS), expected) and again.ends_with_eos and not again.training
    elsewhere = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, pad_token_id=0)
    with torch.no_grad():
        torch.testing.assert_close(elsewhere(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    merge_adapter(again).save_pretrained(tmp_path / "merged", AutoTokenizer.from_pretrained(base))
    merged = RewardModel.from_pretrained(str(tmp_path / "merged"), device="cpu")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    for rewards in (merged(IDS), classifier(IDS).logits):
        torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=1e-5)


def test_a_resumed_run_of_an_adapter_is_the_same_run(base, tmp_path):
    options = dict(max_steps=6, save_strategy="steps", save_steps=3)
    uninterrupted = make(base, tmp_path / "uninterrupted", **options)
    resumed = make(base, tmp_path / "resumed", **options)
    uninterrupted.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "uninterrupted/checkpoint-3"))
    for name, tensor in state(uninterrupted.model).items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_adapters_train_with_the_trainers_options(base, tmp_path):
    plain = make(base, tmp_path, LoraConfig(r=4, target_modules="all-linear"), max_steps=3)
    before = state(plain.model)
    plain.train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in state(plain.model).items())
    for options in ({"gradient_checkpointing": True}, {"bf16": True}, {"layout": "padded"}):
        trainer = make(base, tmp_path, LoraConfig(r=4, target_modules="all-linear"), max_steps=3, **options)
        trainer.train()
        atol = 2e-2 if "bf16" in options else 1e-4
        for name, tensor in state(plain.model).items():
            assert torch.allclose(tensor, trainer.model.state_dict()[name], atol=atol), (options, name)


METHODS = {
    "lora": lora_config(2),
    "dora": LoraConfig(r=2, use_dora=True),
    "ia3": IA3Config(target_modules="all-linear", feedforward_modules=[]),
}


@pytest.mark.parametrize("family, method", [
    ("gpt2", "lora"),
    ("gpt2", "dora"),
    ("gpt2", "ia3"),
    ("qwen3", "lora"),
    ("cohere", "dora"),
    ("bert", "ia3"),
])
def test_families_with_and_without_a_classifier(family, method, tmp_path):
    "gpt2 has Conv1D layers, cohere no classifier in transformers, bert has layers before its head."
    torch.manual_seed(0)
    model = add_adapter(RewardModel(save_language_model(family, tmp_path / "base"), 0.0, "cpu"), METHODS[method])
    trained = [parameter for name, parameter in model.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "saved", word_tokenizer())
    again = RewardModel.from_pretrained(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(again(IDS), model(IDS))
    torch.testing.assert_close(merge_adapter(again)(IDS), model(IDS), atol=1e-5, rtol=1e-4)


def test_an_adapter_made_by_peft_alone_opens_here(base, tmp_path):
    "As TRL writes it: task SEQ_CLS on transformers' classifier."
    from peft import TaskType, get_peft_model

    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = get_peft_model(
        classifier,
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=TaskType.SEQ_CLS, init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    model = RewardModel.from_pretrained(str(tmp_path), device="cpu")
    assert not model.ends_with_eos
    torch.testing.assert_close(model(IDS), adapted.eval()(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("saved, trained", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_an_adapter_opens_in_the_precision_it_was_trained_in(base, tmp_path, saved, trained, monkeypatch):
    "Whatever its base is saved in, and from another folder than it was trained in."
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    AutoModelForCausalLM.from_pretrained(base, dtype=saved).save_pretrained("half")
    AutoTokenizer.from_pretrained(base).save_pretrained("half")
    trainer = make("half", tmp_path / "out", model=RewardModel("half", 0.0, "cpu", dtype=trained))
    trainer.processing_class = AutoTokenizer.from_pretrained(base)
    trainer.train()
    trainer.save_model()
    monkeypatch.chdir("/")
    loaded = RewardModel.from_pretrained(str(tmp_path / "out"), device="cpu")
    assert torch.equal(loaded(IDS), trainer.model.eval()(IDS))
    (tmp_path / "half/config.json").rename(tmp_path / "half/other.json")
    with pytest.raises(OSError, match="The base model of the adapter '.*out' cannot be opened"):
        RewardModel.from_pretrained(str(tmp_path / "out"), device="cpu")


def test_a_second_adapter_and_prompts_before_the_text_are_refused(base):
    from peft import PromptTuningConfig

    model = add_adapter(RewardModel(base, device="cpu"), lora_config(2))
    with pytest.raises(ValueError, match="has an adapter already; expected one without"):
        add_adapter(model, lora_config(2))
    with pytest.raises(ValueError, match="PromptTuningConfig puts tokens before the text"):
        add_adapter(RewardModel(base, device="cpu"), PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"))


def test_embeddings_may_have_an_adapter_too(base, tmp_path):
    trainer = make(base, tmp_path, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    trainer.train()
    trainer.save_model()
    assert torch.equal(RewardModel.from_pretrained(str(tmp_path), device="cpu")(IDS), trainer.model.eval()(IDS))


def test_adapters_that_do_not_fit_are_refused(base, tmp_path):
    model = add_adapter(RewardModel(base, device="cpu"), lora_config(2))
    model.save_pretrained(tmp_path, AutoTokenizer.from_pretrained(base))
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    other = add_adapter(RewardModel(base, device="cpu"), lora_config(2, target_modules="q_proj"))
    with pytest.raises(ValueError, match="holds .* weights of an adapter and the model .*, which differ in"):
        load_adapter(other, tmp_path)
    save_file({name: weight for name, weight in weights.items() if "score" not in name}, file)
    message = "The reward head of .* does not exist; expected an adapter with base_model.model.score.weight"
    with pytest.raises(ValueError, match=message):
        RewardModel.from_pretrained(str(tmp_path), device="cpu")


def test_lora_from_the_command_line(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    synthetic_comparisons(60).to_json(rows)
    common = ["--model", base, "--dataset", str(rows), "--max_steps", "2", "--eval_strategy", "no"]
    common += ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
    common += ["--lora_r", "4", "--lora_target_modules", "q_proj, v_proj"]
    train([*common, "--output_dir", str(tmp_path / "adapter")])
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"] and (config["r"], config["lora_alpha"]) == (4, 8)
    loaded = RewardModel.from_pretrained(str(tmp_path / "adapter"), device="cpu")
    assert loaded.normalize(torch.zeros(1, 1)).isfinite()
    train([*common, "--output_dir", str(tmp_path / "merged"), "--merge_adapter"])
    assert (tmp_path / "merged/model.safetensors").exists() and not (tmp_path / "merged/adapter_config.json").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--load_in_4bit"], "go with --lora_r"),
        (["--merge_adapter"], "go with --lora_r"),
        (["--lora_r", "4", "--load_in_4bit", "--merge_adapter"], "rounded away"),
        (["--lora_r", "0"], "--lora_r is 0; expected a rank of 1 or more"),
    ],
)
def test_options_that_do_not_fit_together(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(["--output_dir", str(tmp_path), *options])
    assert message in capsys.readouterr().err


def test_qlora_trains_an_adapter_on_a_base_in_four_bits(base, tmp_path):
    """
    The layout is padded, so that no layouts are compared before, and there is no evaluation.

    On a CPU bitsandbytes has no backward once it has packed the weights for inference.
    """
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    model = RewardModel(base, 0.0, "cpu", quantization_config=config)
    trainer = make(base, tmp_path, lora_config(4), model, layout="padded")
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert before["backbone.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"].dtype == torch.uint8
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name and name != "score.weight"), name
    trainer.save_model()
    again = RewardModel.from_pretrained(str(tmp_path), device="cpu", quantization_config=config)
    torch.testing.assert_close(again(IDS), trainer.model.eval()(IDS), atol=1e-6, rtol=1e-5)
    on_unquantized_base = RewardModel.from_pretrained(str(tmp_path), device="cpu")
    assert not torch.allclose(on_unquantized_base(IDS), again(IDS), atol=1e-4)


def test_qlora_from_the_command_line_requires_a_gpu(base, tmp_path):
    options = ["--model", base, "--dataset", "synthetic", "--output_dir", str(tmp_path), "--use_cpu"]
    with pytest.raises(SystemExit, match="--load_in_4bit requires a GPU"):
        train([*options, "--lora_r", "4", "--load_in_4bit"])


def test_a_model_without_adapter_replaces_the_adapter_in_its_folder(base, tmp_path):
    make(base, tmp_path / "adapter").save_model(str(tmp_path / "out"))
    model = RewardModel(base, 0.0, "cpu")
    model.save_pretrained(tmp_path / "out", AutoTokenizer.from_pretrained(base))
    loaded = RewardModel.from_pretrained(tmp_path / "out", dropout=0.0, device="cpu")
    assert torch.equal(loaded(IDS), model(IDS))
