"A wheel, built from the source archive of the tree as a release is, installed alone in an empty environment, away from the checkout."
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCORE = """
import importlib, importlib.resources, pkgutil, sys
import rlhf_reward
for module in pkgutil.iter_modules(rlhf_reward.__path__):
    try:
        importlib.import_module("rlhf_reward." + module.name)
    except ImportError as error: # of an extra, which it names
        assert module.name == "serving" and "pip install 'rlhf_reward[serve]'" in str(error), error
assert all((importlib.resources.files(rlhf_reward) / name).is_file() for name in ("serving.html", "report.html", "configs/fsdp2.yaml"))
assert "site-packages" in rlhf_reward.__file__, rlhf_reward.__file__
for name in ("nbdev", "fastcore", "pytest"):
    assert importlib.util.find_spec(name) is None, name
from rlhf_reward import Scorer
print("reward", *Scorer.from_pretrained("out", device="cpu").score(["Ada likes birds and dislikes tools."], [" robin"]))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, capture_output=True)
    venv.create(folder / "venv", with_pip=True)
    wheel, = folder.glob("*.whl")
    subprocess.run([folder / "venv/bin/pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel], check=True)
    return folder


def run(environment, *command):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([environment / "venv/bin" / command[0], *command[1:]], cwd=environment, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.wheel
def test_wheel_trains_imports_and_scores(environment):
    printed = run(environment, "rlhf_reward", "train", "--max_steps", "5", "--output_dir", "out", "--use_cpu", "--eval_strategy", "no")
    assert "Held-out accuracy" in printed
    printed = run(environment, "python", "-c", SCORE)
    (environment / "rows.jsonl").write_text('{"prompt": "Ada likes birds and dislikes tools.", "response": " robin"}\n')
    run(environment, "rlhf_reward", "score", "--model", "out", "--data", "rows.jsonl", "--output", "scored.jsonl", "--device", "cpu")
    reward = json.loads((environment / "scored.jsonl").read_text())["reward"]
    assert printed == f"reward {reward}\n"
