"Files are UTF-8, whatever the locale: no file is opened without an encoding, and the commands run in other locales."
import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import save_language_model, word_tokenizer

ROOT = Path(__file__).parents[1]
TEXT_METHODS = {"read_text": 0, "write_text": 1}  # arguments before the encoding


def opened_without_encoding(source):
    "Yield the line of each call that opens a file as text without naming an encoding."
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        has_encoding = any(keyword.arg in ("encoding", None) for keyword in node.keywords)
        strings = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        modes = strings + [keyword.value.value for keyword in node.keywords if keyword.arg == "mode"]
        is_binary = any(isinstance(mode, str) and set(mode) <= set("rwxab+") and "b" in mode for mode in modes)
        opens = name in ("open", "fdopen", "TextIOWrapper", "NamedTemporaryFile") and not is_binary
        reads = name in TEXT_METHODS and len(node.args) <= TEXT_METHODS[name]
        if (opens or reads) and not has_encoding:
            yield node.lineno


def test_no_file_is_opened_without_an_encoding():
    found = []
    for module in sorted((ROOT / "rlhf_reward").rglob("*.py")):
        for line in opened_without_encoding(module.read_text(encoding="utf-8")):
            found.append(f"{module.relative_to(ROOT)}:{line}")
    assert not found, found


@pytest.mark.parametrize(
    "source, is_found",
    [
        ("open('a')", True),
        ("open('a', 'w')", True),
        ("gzip.open(name, mode='rt')", True),
        ("Path('a').read_text()", True),
        ("path.write_text(json.dumps(x))", True),
        ("open('a', 'rb')", False),
        ("open('a', mode='wb')", False),
        ("open('a', encoding='utf-8')", False),
        ("path.read_text('utf-8')", False),
        ("path.write_text(x, encoding='utf-8')", False),
    ],
)
def test_what_is_found(source, is_found):
    assert bool(list(opened_without_encoding(source))) == is_found


PROGRAM = """
import locale, sys
from rlhf_reward.cli import main
print("encoding", locale.getpreferredencoding(False))
main(["train", "options.yaml"])
main(["train", "options.yaml", "--resume_from_checkpoint", "true", "--max_steps", "2"])
main(["score", "--model", "trained", "--data", "rows.jsonl", "--columns", "response=chosen", "--output", "scored.jsonl",
      "--device", "cpu", "--chat_template", "template.jinja"])
main(["evaluate", "--model", "trained", "--data", "rows.jsonl", "--output", "report", "--device", "cpu"])

print("help …")
main(["audit", "rows.jsonl"])
"""
OPTIONS = """# Größe …
dataset: rows.jsonl
model: base
output_dir: trained
max_steps: 1
save_steps: 1
per_device_train_batch_size: 4
report_to: none
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    save_language_model("llama", folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    lines = []
    for number in range(24):
        row = {
            "prompt": f"Grüße {number}, 你好 … é?",
            "chosen": f"w3 – ja {number}",
            "rejected": f"w4 ✗ {number}",
            "source": "naïve",
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "options.yaml").write_text(OPTIONS, encoding="utf-8")
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    template = "{# … #}{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.mark.parametrize("language, charset", [("C", None), ("zh_CN", "GBK"), ("en_US", "ISO-8859-1")])
def test_the_commands_in_other_locales(language, charset, rows, tmp_path, python):
    """
    `train` ended in a UnicodeDecodeError, and the help in a UnicodeEncodeError.

    The first is the locale of an interpreter from its start, the others are set in a fork of one.
    """
    name = language
    interpreter = python if charset else sys.executable
    if charset:
        name = f"{language}.{charset}"
        localedef = shutil.which("localedef")
        if localedef is None:
            pytest.skip("there is no localedef")
        subprocess.run([localedef, "-i", language, "-f", charset, str(tmp_path / name)], capture_output=True)
        if not (tmp_path / name).exists():
            pytest.skip(f"the locale {name} cannot be built")
    folder = tmp_path / "work"
    shutil.copytree(rows, folder)
    environment = {
        **os.environ,
        "LC_ALL": name,
        "LOCPATH": str(tmp_path),
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    environment.pop("PYTHONIOENCODING", None)
    command = [interpreter, "program.py"]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=600)
    output = (ended.stdout + ended.stderr).decode(errors="replace")
    assert ended.returncode == 0, output[-3000:]
    assert "encoding UTF-8" not in output and "help" in output
    scored = (folder / "scored.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(scored[3])["prompt"] == "Grüße 3, 你好 … é?"
