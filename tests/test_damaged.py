"Damaged files and numbers that nothing can be computed with end in a message that names them, not in a traceback."
import gzip
import json
import shutil

import pytest
from architectures import save_language_model, word_tokenizer

from rlhf_reward import RewardModel, Scorer
from rlhf_reward.cli import main
from rlhf_reward.data import load_rows, to_comparison

ROW = json.dumps({"prompt": "w3", "chosen": "w4", "rejected": "w5"}) + "\n"
PACKED = gzip.compress((ROW * 4_000).encode())
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    base = save_language_model("llama", folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    RewardModel(base, 0.0, "cpu").save_pretrained(folder / "reward", word_tokenizer())
    (folder / "rows.jsonl").write_text(ROW * 24, encoding="utf-8")
    return folder


def problem_of(argv):
    "Return the message with which a command ends; any other error is one of the test."
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert isinstance(exit.value.code, str), exit.value.code
    return exit.value.code


FILES = {
    "truncated.jsonl.gz": PACKED[: len(PACKED) // 2],
    "truncated.csv.gz": PACKED[:100],
    "no_gzip.jsonl.gz": b"hello",
    "checksum.jsonl.gz": PACKED[:-8] + b"00000000",
    "flipped.jsonl.gz": PACKED[:40] + bytes([PACKED[40] ^ 255]) + PACKED[41:],
    "deep.jsonl": (ROW[:-2] + f', "x": {DEEP}{"]" * 100_000}}}\n').encode(),
    "deep.json": (DEEP + "]" * 100_000).encode(),
    "deep_messages.csv": f'prompt,chosen,rejected\n[{{""role"": {DEEP}",a,b\n'.replace("\n[", '\n"[').encode(),
    "deep_list.jsonl": json.dumps({"prompt": "w3", "responses": DEEP}).encode(),
    "fairly_deep.jsonl": (ROW[:-2] + f', "x": {"[" * 900}{"]" * 900}}}\n').encode(),
    "digits.jsonl": (ROW[:-2] + f', "weight": {"9" * 5_000}}}\n').encode(),
    "no_parquet.parquet": b"PAR1xxxxPAR1",
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_data(name, folder, tmp_path):
    file = tmp_path / name
    file.write_bytes(FILES[name])
    options = ["--data", str(file), "--output", str(tmp_path / "scored.jsonl"), "--device", "cpu"]
    problem = problem_of(["score", "--model", str(folder / "reward"), *options])
    assert name in problem and "sys." not in problem
    with pytest.raises(SystemExit) as exit:
        main(["audit", str(file)])
    assert exit.value.code not in (0, None)


def half(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def without_heads(file):
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "hidden_size": 64}), encoding="utf-8")


DAMAGES = {
    "half of the weights": ("model.safetensors", half),
    "no weights": ("model.safetensors", b""),
    "other weights": ("model.safetensors", b"\xff" * 5_000),
    "header of the weights": ("model.safetensors", b"\x32\0\0\0\0\0\0\0" + b"x" * 200),
    "half of the config": ("config.json", half),
    "no config": ("config.json", b""),
    "config of another kind": ("config.json", b"[1]"),
    "deep config": ("config.json", DEEP.encode()),
    "config with a wrong value": ("config.json", b'{"model_type": "llama", "hidden_size": "x"}'),
    "config of other weights": ("config.json", without_heads),
    "half of the tokenizer": ("tokenizer.json", half),
    "tokenizer of another kind": ("tokenizer.json", b"[]"),
    "deep tokenizer": ("tokenizer.json", DEEP.encode()),
    "deep tokenizer config": ("tokenizer_config.json", DEEP.encode()),
    "adapter of another kind": ("adapter_config.json", b"[]"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoints(kind, folder, tmp_path):
    name, damage = DAMAGES[kind]
    model = shutil.copytree(folder / "reward", tmp_path / "damaged")
    if callable(damage):
        damage(model / name)
    else:
        (model / name).write_bytes(damage)
    options = ["--data", str(folder / "rows.jsonl"), "--device", "cpu", "--output", str(tmp_path / "scored.jsonl")]
    assert problem_of(["score", "--model", str(model), *options])
    options = ["--dataset", str(folder / "rows.jsonl"), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    assert problem_of(["train", "--model", str(model), *options, "--report_to", "none", "--use_cpu", "true"])


@pytest.mark.parametrize("number", [1e39, -1e31, 1e308, "1e39", 10**400, float("nan"), float("inf"), "nan"])
@pytest.mark.parametrize("column", ["weight", "margin", "score_chosen"])
def test_numbers_that_no_loss_can_have(number, column):
    "A weight of 1e39 is finite, but not in float32: the run ended much later, for a wrong reason."
    row = {"prompt": "w3", "chosen": "w4", "rejected": "w5", column: number}
    if column == "score_chosen":
        row["score_rejected"] = 0
    with pytest.raises(ValueError, match="expected a finite number"):
        to_comparison(row)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "name", ["weight_decay", "max_grad_norm", "num_train_epochs", "neftune_noise_alpha", "dropout"]
)
def test_arguments_that_are_not_finite(name, value, folder, tmp_path, capsys):
    "They ended in a traceback of torch or for a wrong reason, and a `max_grad_norm` of NaN clipped nothing."
    options = ["--dataset", str(folder / "rows.jsonl"), "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]
    with pytest.raises(SystemExit) as exit:
        main(["train", "--model", str(folder / "reward"), *options, "--report_to", "none", f"--{name}={value}"])
    assert f"{name} is {value}; expected" in f"{exit.value.code}{capsys.readouterr().err}"


@pytest.fixture(scope="module")
def scorer(folder):
    return Scorer.from_pretrained(folder / "reward", device="cpu")


@pytest.mark.parametrize("std", [0, 0.0, -1.0, float("nan"), float("inf"), None, 1])
@pytest.mark.parametrize("mean", [0.5, float("nan"), float("inf")])
def test_a_scale_that_normalizes_nothing(mean, std, scorer, tmp_path):
    scorer.model.config.rlhf_reward = {**scorer.model.config.rlhf_reward, "reward_mean": mean, "reward_std": std}
    if (mean, std) == (0.5, 1):
        assert scorer.score(["w3"], [" w4"], normalize=True)
        return
    with pytest.raises(ValueError, match="nothing can be normalized"):
        scorer.score(["w3"], [" w4"], normalize=True)


def test_the_command_refuses_such_a_scale(folder, tmp_path):
    "It wrote null for each reward and ended with status 0."
    model = shutil.copytree(folder / "reward", tmp_path / "model")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["rlhf_reward"] = {**config["rlhf_reward"], "reward_mean": 0.5, "reward_std": 0.0}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    output = tmp_path / "scored.jsonl"
    options = ["--data", str(folder / "rows.jsonl"), "--device", "cpu", "--output", str(output), "--normalize"]
    assert "standard deviation 0.0" in problem_of(["score", "--model", str(model), *options])
    assert not output.exists()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_nan_is_no_text(streaming, suffix, tmp_path):
    "A column of NaN became one of the string 'NaN', which was written, or scored as a response."
    row = '{"prompt": "w3", "chosen": "w4", "rejected": "w5", "note": NaN, "facts": {"a": [1, Infinity]}, '
    row += '"source": NaN}'
    file = tmp_path / f"rows.{suffix}"
    file.write_text(row + "\n" if suffix == "jsonl" else f"[{row}]", encoding="utf-8")
    (read,) = load_rows(str(file), streaming=streaming)
    assert read["note"] is None and read["source"] is None and read["facts"] == {"a": [1, None]}
    for column in ("chosen", "weight", "margin"):
        named = json.loads(row.replace('"chosen": "w4"', f'"{column}": NaN'), parse_constant=float)
        text = json.dumps({"chosen": "w4", **named})
        file.write_text(text + "\n" if suffix == "jsonl" else f"[{text}]", encoding="utf-8")
        (read,) = load_rows(str(file), streaming=streaming)
        with pytest.raises(ValueError, match=f"(?i)found '?(nan|none)'? as {column}"):
            to_comparison(read)
