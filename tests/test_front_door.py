"The calls that a user of TRL, transformers or sentence-transformers makes first, and what an editor says of them."
import itertools
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import architectures
import pytest
import torch
from transformers import AutoTokenizer, TrainerState, set_seed

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, Scorer, load_rows
from rlhf_reward.adapters import lora_config
from rlhf_reward.loading import as_table
from rlhf_reward.log_line import layout_part, model_line, steps_line
from rlhf_reward.packing import pack_comparisons, pad_comparisons
from rlhf_reward.starting import default_config
from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder
from rlhf_reward.tokens import tokenize_rows, whole_sequences

PROMPT = "Ada likes birds and dislikes metals."
RESPONSES = [" iron", " robin wren", " plum"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("front") / "base", synthetic_texts())


@pytest.fixture(scope="module")
def model(base):
    return RewardModel(base, 0.0, "cpu")


# ----- training


@pytest.mark.parametrize("name, remedy", [("tensorboard", "pip install tensorboard"), ("tensorbord", "among azure_ml")])
def test_a_tracker_that_is_not_installed_is_refused_with_the_arguments(name, remedy, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_reward.arguments.integration_utils.is_tensorboard_available", bool)
    with pytest.raises(ValueError, match=f"report_to has '{name}'.*{remedy}"):
        RewardConfig(str(tmp_path), use_cpu=True, report_to=name)


def test_the_order_of_trl(base, tmp_path, monkeypatch, caplog, capsys):
    "A name and a list train, the output folder opens, and its name continues the training."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    caplog.set_level(logging.INFO, "rlhf_reward")
    rows = list(synthetic_comparisons(12))
    trainer = RewardTrainer(model=base, train_dataset=rows)
    set_seed(42)
    assert torch.equal(trainer.model.score.weight, RewardModel(base, device="cpu").score.weight)
    trainer.train()
    assert trainer.args.output_dir == "base-Reward" and "training starts from a new one" in caplog.text
    scorer = Scorer(trainer.args.output_dir)
    results = scorer.rank(PROMPT, RESPONSES, top_k=2)
    assert [result.reward for result in results] == sorted(scorer.score([PROMPT] * 3, RESPONSES), reverse=True)[:2]
    assert scorer.score(PROMPT, " robin") == Scorer(trainer.model.eval()).score([PROMPT], [" robin"])[0]
    caplog.clear()
    options = {"train_dataset": rows, "tokenizer": AutoTokenizer.from_pretrained(base)}
    continued = RewardTrainer(Path("base-Reward"), **options)
    assert torch.equal(continued.model.score.weight, trainer.model.score.weight)
    assert "training continues from its head" in caplog.text and continued.args.output_dir == "base-Reward-Reward"
    assert continued.processing_class is options["tokenizer"]


def test_names_of_output_folders(model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    names = ("Qwen/Qwen3-0.6B", "models/mine/", ".", model, "../linked")
    folders = [default_config(name).output_dir for name in names]
    assert folders == ["Qwen3-0.6B-Reward", "mine-Reward", "here-Reward", "base-Reward", "linked-Reward"]


def test_a_list_is_the_table_of_a_file_with_its_rows(tmp_path):
    messages = [{"role": "user", "content": "2 + 2 = "}]
    answer = {"role": "assistant", "content": "4", "tool_calls": None}
    rows = [
        {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"},
        {"prompt": messages, "chosen": [answer], "rejected": "5", "margin": 0.5},
        {"prompt": "2 + 2 = ", "responses": ["4", "5", "6"], "scores": [1, 0.5, None]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    expected = load_rows(str(file))
    assert as_table(rows)[:] == as_table(tuple(rows))[:] == expected[:] and set(as_table(rows)[1]) == set(expected[1])
    assert as_table(rows)[1]["chosen"] == [answer] and as_table(rows)[0]["margin"] is None


def test_what_cannot_train_is_named(base, model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = synthetic_comparisons(3)
    args = RewardConfig(str(tmp_path / "out"), use_cpu=True)
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    cases = [
        (dict(data_collator=len), "data_collator is a builtin_function_or_method; expected none: RewardTrainer"),
        (dict(tokenizer=tokenizer, processing_class=tokenizer), "processing_class and its former name tokenizer"),
        (dict(processing_class=rows), "processing_class is a Dataset; expected the tokenizer of the model"),
        (dict(model=str(bare)), "processing_class is None, and no tokenizer is stored with '.*bare'; expected"),
        (dict(model=torch.nn.Linear(1, 1)), "model is a Linear; expected the name of a model, or a RewardModel"),
        (dict(train_dataset=[]), "train_dataset is an empty list; expected rows"),
        (dict(train_dataset=[rows[0], "x"]), "Element 2 of train_dataset is a str; expected rows, dictionaries"),
        (dict(eval_dataset={"a": ["x"]}), "Element 1 of eval_dataset 'a' is a str; expected rows"),
        (dict(train_dataset=iter([])), "train_dataset is a list_iterator; expected a list of rows, or a datasets"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            RewardTrainer(**{"model": model, "args": args, "train_dataset": rows, **options})
    with pytest.raises(TypeError, match="positional arguments"):
        RewardTrainer(model, args, rows)
    with pytest.raises(TypeError, match="train_datasett"):
        RewardTrainer(model, args, train_datasett=rows)
    with pytest.raises(ValueError, match="tokenizer is None, and no tokenizer is stored"):
        Scorer(RewardModel(str(bare), device="cpu"))


# ----- the model


def test_what_transformers_models_have(base, tmp_path, monkeypatch):
    model = RewardModel(base, 0.0, "cpu", dtype=torch.bfloat16)
    backbone, head = model.backbone, model.score.weight.numel()
    assert (model.device, model.dtype, model.score.weight.dtype) == (backbone.device, torch.bfloat16, torch.float32)
    assert model.num_parameters() == backbone.num_parameters() + head
    plain = backbone.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(exclude_embeddings=True) == plain + head
    backbone.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == head
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    embeddings = model.resize_token_embeddings(model.num_embeddings + 3)
    assert embeddings is model.get_input_embeddings() and model.num_embeddings == embeddings.num_embeddings
    model.set_input_embeddings(torch.nn.Embedding(7, 64))
    assert model.num_embeddings == 7
    uploads = fake_hub(monkeypatch)
    model = RewardModel(base, 0.0, "cpu")
    model.push_to_hub("me/model", AutoTokenizer.from_pretrained(base), private=True)
    assert uploads == {"me/model": {"README.md", "config.json", "model.safetensors", *TOKENIZER}}


TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


def fake_hub(monkeypatch):
    "Return the files of each upload from now on, by the name of the repository."
    from types import SimpleNamespace

    from transformers.utils import hub

    uploads = {}

    def commit(repo_id, operations, **_):
        uploads[repo_id] = {operation.path_in_repo for operation in operations}

    api = SimpleNamespace(create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id), create_commit=commit)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
    return uploads


@pytest.mark.parametrize("has_adapter", [False, True])
def test_saved_without_a_tokenizer(base, tmp_path, caplog, has_adapter):
    "It is reported, the rewards are the same, and a tokenizer that is there stays."
    model = RewardModel(base, 0.0, "cpu")
    if has_adapter:
        pytest.importorskip("peft")
        from rlhf_reward.adapters import add_adapter

        add_adapter(model, lora_config(2))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.save_pretrained(tmp_path)
    assert f"No tokenizer was written to {tmp_path}" in caplog.text
    assert {name: (tmp_path / name).read_bytes() for name in before} == before and "chat_template.jinja" in before
    ids = torch.tensor([[5, 6, 7]])
    opened = RewardModel.from_pretrained(tmp_path)
    assert torch.equal(opened(ids.to(opened.device)).cpu(), model(ids))
    assert opened.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_tokenizer_of_bert_may_be_unpacked(tmp_path, model):
    "Token types go where the backbone takes them, with their tokens, whatever the side of the padding."
    torch.manual_seed(0)
    config = architectures.ENCODERS["bert"]
    architectures.T.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    bert = RewardModel(str(tmp_path), 0.0, "cpu")
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    types = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    rewards = bert(input_ids=ids, token_type_ids=types, attention_mask=mask)
    outputs = bert.backbone(input_ids=ids, token_type_ids=types, attention_mask=mask)
    states = outputs.logits if bert.pooling == "classifier" else outputs.last_hidden_state[:, 0]
    torch.testing.assert_close(rewards, bert.score(states), atol=1e-6, rtol=0)
    assert (rewards - bert(ids, mask)).abs().max() > 1e-3
    turned = [tensor[1:].roll(1, dims=1) for tensor in (ids, mask, types)]
    torch.testing.assert_close(bert(turned[0], turned[1], token_type_ids=turned[2]), rewards[1:], atol=1e-6, rtol=0)
    assert torch.equal(model(ids, mask, token_type_ids=types), model(ids, mask))
    with pytest.raises(ValueError, match=r"token_type_ids has shape \(2, 3\); expected \(2, 4\)"):
        bert(ids, mask, token_type_ids=types[:, 1:])


# ----- the scorer


def test_conveniences_of_a_scorer(base, model):
    scorer = Scorer(model, max_length=32, on_overlong="truncate_prompt")
    assert repr(scorer) == f"Scorer('{base}', llama, float32 on cpu, max_length=32, on_overlong='truncate_prompt')"
    assert scorer.score(PROMPT, " robin") == scorer.score([PROMPT], [" robin"])[0]
    assert scorer.score(None, PROMPT + " robin") == scorer.score([None], [PROMPT + " robin"])[0]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    chat = Scorer(model, tokenizer)
    prompt, answer = [{"role": "user", "content": PROMPT}], [{"role": "assistant", "content": " robin"}]
    assert chat.score(prompt, answer) == chat.score([prompt], [answer])[0]
    ranked = scorer.rank(PROMPT, RESPONSES)
    assert [scorer.rank(PROMPT, RESPONSES, top_k=k) for k in (1, 3, 9)] == [ranked[:1], ranked, ranked]
    with pytest.raises(ValueError, match="top_k is 0; expected 1 or more"):
        scorer.rank(PROMPT, RESPONSES, top_k=0)


# ----- the first lines of a run


def test_defaults_of_the_log(tmp_path):
    args = RewardConfig(str(tmp_path), use_cpu=True)
    assert (args.logging_steps, args.logging_first_step) == (10, True)
    assert not RewardConfig(str(tmp_path), use_cpu=True, logging_strategy="no").logging_first_step


def test_lines_before_the_first_step(base, tmp_path, capsys):
    "The lines are counted anew: parameters as in the tests above, tokens by hand."
    model = RewardModel(base, 0.0, "cpu")
    rows = synthetic_comparisons(16)
    config = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "per_device_train_batch_size": 2}
    args = RewardConfig(str(tmp_path), **config, gradient_accumulation_steps=2, save_steps=2)
    trainer = RewardTrainer(model, args, train_dataset=rows)
    model.get_input_embeddings().requires_grad_(False)
    trainer.train()
    first, second, log = capsys.readouterr().out.splitlines()[:3]
    total, trained = f"{model.num_parameters() / 1e3:.3g}k", f"{model.num_parameters(only_trainable=True) / 1e3:.3g}k"
    assert first == f"model  {base} (llama)  {total} parameters, {trained} trained  float32 on cpu" and total != trained
    assert second.startswith("steps  4 of 4 comparisons  1 epoch of 16  packed layout, which saves ")
    assert log.startswith("step 1/4  loss ")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "steps  3 to 4 of 4 comparisons  1 epoch of 16  packed layout" in capsys.readouterr().out

    data = tokenize_rows(rows, AutoTokenizer.from_pretrained(base), 64)
    padded, computed = [], []  # tokens of each batch
    for start in range(0, 16, 4):
        batch = list(data.select(range(start, start + 4)))
        lengths = list(map(len, itertools.chain.from_iterable(map(whole_sequences, batch))))
        padded.append(len(lengths) * max(lengths))
        computed.append(pack_comparisons(batch)["input_ids"].numel())
    shares = [1 - computed[0] / padded[0], 1 - sum(computed) / sum(padded)]
    first, every = (f"packed layout, which saves {share:.0%} of the padded tokens" for share in shares)
    assert layout_part(data, pack_comparisons, 4) == every
    assert layout_part(data.to_iterable_dataset(), pack_comparisons, 4) == first
    assert layout_part(data, pad_comparisons, 4) == "padded layout"
    args = RewardConfig(str(tmp_path), **config, max_steps=5, eval_strategy="steps", bf16=True)
    model.backbone.requires_grad_(True)
    state = TrainerState(max_steps=5, eval_steps=10.0) # as from the command line
    assert steps_line(args, state, None, "x") == "steps  5 of 2 comparisons  evaluation every 10  x"
    assert steps_line(args, state, 80, "x").startswith("steps  5 of 2 comparisons  0.125 epochs of 80  evaluation")
    assert model_line(model, args).endswith(f"{total} parameters, all trained  float32, computed in bfloat16 on cpu")
    args.learning_rate = 0.0 # as in the recipe head, whose one step changes nothing
    assert f"{total} parameters, none trained (learning rate 0)  float32" in model_line(model, args)
    args.head_learning_rate = 1e-3
    assert "all trained" in model_line(model, args)


# ----- editors

RIGHT = '''
from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, Scorer, load_rows
from rlhf_reward.audit import audit
from rlhf_reward.evaluation import evaluate

rows = [{"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}]
trainer = RewardTrainer(model="base", train_dataset=rows)
trainer.train()
args = RewardConfig("out", learning_rate=1e-5, logging_steps=5)
model = RewardModel.from_pretrained("out", device="cpu")
trainer = RewardTrainer(model, args, train_dataset=load_rows("a.jsonl"), eval_dataset={"held": rows})
print(trainer.evaluate()["eval_accuracy"], model.num_parameters(), model.device.type)
model.save_pretrained("saved")
trainer.model.backbone.get_input_embeddings().requires_grad_(False)
scorer = Scorer("out", max_length=512)
prompts, responses = ["2 + 2 = "], ["4"]
print(scorer.rank("2 + 2 = ", responses, top_k=1)[0].response.upper() if False else "")
number: float = scorer.score("2 + 2 = ", "4")
numbers: list[float] = scorer.score(prompts, responses)
conversation = [{"role": "user", "content": "2 + 2 = "}]
numbers = Scorer.from_pretrained("out", device="cpu").score([conversation], ["4"])
table = load_rows("a.jsonl")
print(table[0], len(table), audit(table), evaluate(scorer, table).mistakes())
RewardTrainer("base", train_dataset=load_rows("a.jsonl", streaming=True).shuffle(0, buffer_size=9))
'''
WRONG = '''
import rlhf_reward
from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, Scorer, load_rows

rlhf_reward.Scorerr
from rlhf_reward import RewardTrianer
RewardTrainer("base", train_datset=[])
RewardTrainer("base", None, [])
RewardConfig("out", learning_rat=1)
Scorer("out", max_lenght=1)
Scorer("out").rnak("p", ["r"])
Scorer("out").rank("p", ["r"], topk=1)
Scorer("out").score("p", "r")[0]
RewardModel.from_pretraind("out")
RewardModel("base").save_pretraned("out")
RewardTrainer("base").trian()
RewardTrainer("base").args.lerning_rate
RewardTrainer("base").model.save_pretrained(foldr="out")
load_rows("a.jsonl", stream=True)
'''


@pytest.mark.process
def test_a_type_checker_finds_misspelt_names(tmp_path):
    checker = next(filter(None, map(shutil.which, ("basedpyright", "pyright"))), None)
    checker = checker or shutil.which("basedpyright", path=Path(sys.executable).parent)
    if checker is None:
        pytest.skip("there is no pyright here")
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(Path(__file__).parents[1])]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [checker, "--outputjson", "--pythonpath", sys.executable, "right.py", "wrong.py"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300).stdout
    errors = {"right.py": {}, "wrong.py": {}}
    for found in json.loads(printed)["generalDiagnostics"]:
        if found["severity"] == "error":
            errors[Path(found["file"]).name][found["range"]["start"]["line"]] = found["message"]
    assert errors["right.py"] == {}
    assert set(errors["wrong.py"]) == set(range(4, len(WRONG.splitlines()))), errors["wrong.py"]


def test_an_editor_completes():
    jedi = pytest.importorskip("jedi")
    cases = {
        "from rlhf_reward import Rew": {"RewardConfig", "RewardFunction", "RewardModel", "RewardTrainer"},
        "from rlhf_reward import Scorer\nScorer('out').r": {"rank", "rewards", "read_rows"},
        "import rlhf_reward\nrlhf_reward.Scorer('out', max_": {"max_length="},
    }
    for source, expected in cases.items():
        script = jedi.Script(source, environment=jedi.InterpreterEnvironment())  # in this process
        line, column = len(source.splitlines()), len(source.splitlines()[-1])
        assert expected <= {completion.name for completion in script.complete(line, column)}, source


# ----- lines of others


def test_the_line_of_bitsandbytes_about_a_kernel_is_left_out():
    "It is logged at the import of bitsandbytes, also where nothing is in 4 bits. Its other lines stay."
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    for message, is_shown in (("Failed to load CPU gemm_4bit_forward from …: %s", False), ("Another problem", True)):
        record = logger.makeRecord(logger.name, logging.WARNING, "ops.py", 1, message, (), None)
        assert bool(logger.filter(record)) is is_shown
