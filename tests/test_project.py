"The tree agrees with itself: export, README, versions, and what the installed library imports."
import configparser
import filecmp
import json
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini")
SETTINGS = SETTINGS["DEFAULT"]
BIN = Path(sys.executable).parent


@pytest.fixture
def copy(tmp_path):
    "A copy of what export, clean and the README need, to run them on."
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "_proc", "_docs", "__pycache__", ".ipynb_checkpoints")
    return shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)


def run(*command, cwd):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def changed(copy, folder):
    names = [str(path.relative_to(ROOT / folder)) for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".ipynb") and "runs" not in path.parts]
    same, different, missing = filecmp.cmpfiles(ROOT / folder, copy / folder, names, shallow=False)
    added = {path.name for path in (copy / folder).glob("*.py")} - set(names)
    return different + missing + sorted(added)


@pytest.mark.process
def test_export_changes_nothing(copy):
    run(BIN / "nbdev_export", cwd=copy)
    assert changed(copy, "rlhf_reward") == [], "run `make export` and commit"


@pytest.mark.process
def test_notebooks_are_clean(copy):
    run(BIN / "nbdev_clean", cwd=copy)
    assert changed(copy, "nbs") == [], "run `nbdev_clean` and commit"


@pytest.mark.process
def test_readme_is_current(copy):
    run(BIN / "python", "tools/docs.py", "readme", cwd=copy)
    assert (copy / "README.md").read_text() == (ROOT / "README.md").read_text(), "run `make readme` and commit"
    pictures = sorted(path.name for path in (ROOT / "docs/readme").iterdir())
    assert pictures and filecmp.cmpfiles(ROOT / "docs/readme", copy / "docs/readme", pictures, shallow=False)[1:] == ([], []), "run `make readme` and commit"


@pytest.mark.parametrize("notebook", sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if "runs" not in path.parts), ids=lambda path: path.stem)
def test_notebook_is_committed_with_its_outputs(notebook):
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]


def test_version_and_requirements_come_from_settings():
    import rlhf_reward

    declared = requires("rlhf_reward")
    assert rlhf_reward.__version__ == SETTINGS["version"]
    assert {name.split(">")[0].split("=")[0] for name in SETTINGS["requirements"].split()} == {"torch", "transformers", "torchtyping", "accelerate", "datasets", "safetensors", "scipy",
                                                                                                 "scikit-learn"}
    runtime = [requirement for requirement in declared if "extra ==" not in requirement]
    assert len(runtime) == len(SETTINGS["requirements"].split())
    assert [requirement for requirement in runtime if requirement.startswith(("nbdev", "fastcore", "execnb"))] == []


@pytest.mark.process
def test_library_imports_neither_nbdev_nor_fastcore():
    modules = [f"rlhf_reward.{path.stem}" for path in (ROOT / "rlhf_reward").glob("*.py") if path.stem != "__init__"]
    code = f"import sys, importlib\nfor name in {modules}: importlib.import_module(name)\nprint({{'nbdev', 'fastcore', 'execnb'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
    assert len(modules) >= 7


@pytest.mark.process
def test_public_names_load_when_used():
    code = "import sys, rlhf_reward\nassert 'torch' not in sys.modules\nfor name in rlhf_reward.__all__: getattr(rlhf_reward, name)\nassert set(rlhf_reward.__all__) <= set(dir(rlhf_reward))"
    subprocess.run([sys.executable, "-c", code], check=True)
    import rlhf_reward

    with pytest.raises(AttributeError, match="no attribute 'Nothing'; its public names are RewardModel"):
        rlhf_reward.Nothing


@pytest.mark.process
def test_make_installs_only_once(tmp_path):
    "`make -n` prints what it would run: nothing of pip once the installation is there."
    commands = lambda installed: subprocess.run(["make", "-n", "demo", f"INSTALLED={installed}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "pip install" in commands(".venv/never-made") and "rlhf_reward train" in commands(".venv/never-made")
    (tmp_path / "installed").touch()
    assert "pip" not in commands(tmp_path / "installed")
