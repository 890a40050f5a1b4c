"""
A wheel, built from the source archive of the tree as a release is, installed alone in an empty environment, away from
the checkout.
"""
import json
import sys
import venv
from pathlib import Path

import programs
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "rlhf_reward").rglob("__init__.py")}
SCORE = """
import importlib, importlib.resources, pkgutil
import rlhf_reward
for module in pkgutil.walk_packages(rlhf_reward.__path__, "rlhf_reward.", onerror=lambda name: None):
    try:
        importlib.import_module(module.name)
    except ImportError as error: # of an extra, which it names
        assert module.name == "rlhf_reward.serving" and "pip install 'rlhf_reward[serve]'" in str(error), error
for name in ("py.typed", "serving.html", "report.html", "configs/fsdp2.yaml"):
    assert (importlib.resources.files(rlhf_reward) / name).is_file(), name
assert "site-packages" in rlhf_reward.__file__, rlhf_reward.__file__
for name in ("nbdev", "fastcore", "pytest"):
    assert importlib.util.find_spec(name) is None, name
from rlhf_reward import Scorer
print("reward", *Scorer.from_pretrained("out", device="cpu").score(["Ada likes birds and dislikes tools."], [" robin"]))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    programs.run(sys.executable, "-m", "build", "--outdir", folder, ROOT, timeout=600)
    venv.create(folder / "venv", with_pip=True)
    (wheel,) = folder.glob("*.whl")
    pip = [folder / "venv/bin/pip", "install", "--quiet"]
    programs.run(*pip, "--constraint", ROOT / "constraints.txt", wheel, timeout=1800)
    return folder


def run(environment, program, *arguments):
    "Run a program of the environment, without the checkout on its path."
    command = [environment / "venv/bin" / program, *arguments]
    return programs.run("env", "--unset", "PYTHONPATH", *command, cwd=environment).stdout


@pytest.mark.wheel
def test_wheel_trains_imports_and_scores(environment):
    options = ["--max_steps", "5", "--output_dir", "out", "--use_cpu", "--eval_strategy", "no"]
    assert "Held-out accuracy" in run(environment, "rlhf_reward", "train", *options)
    printed = run(environment, "python", "-c", SCORE)
    row = {"prompt": "Ada likes birds and dislikes tools.", "response": " robin"}
    (environment / "rows.jsonl").write_text(json.dumps(row) + "\n")
    files = ["--model", "out", "--data", "rows.jsonl", "--output", "scored.jsonl"]
    run(environment, "rlhf_reward", "score", *files, "--device", "cpu")
    reward = json.loads((environment / "scored.jsonl").read_text())["reward"]
    assert printed == f"reward {reward}\n"


@pytest.mark.wheel
def test_wheel_holds_every_package(environment):
    "A package that setup.py does not name is missing from the wheel alone."
    installed = next((environment / "venv/lib").glob("python*/site-packages/rlhf_reward"))
    found = {path.parent.relative_to(installed.parent).as_posix() for path in installed.rglob("__init__.py")}
    assert found == PACKAGES and "rlhf_reward/serving" in found
