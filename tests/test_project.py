"The tree agrees with itself: export, README, versions, imports, and the rules of style."
import configparser
import filecmp
import importlib
import json
import re
import shutil
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import style
from programs import run

ROOT = Path(__file__).parents[1]
SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini")
SETTINGS = SETTINGS["DEFAULT"]
BIN = Path(sys.executable).parent
IGNORED = {".git", ".venv", "runs", "_proc", "_docs", "__pycache__", ".ipynb_checkpoints"}
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if not IGNORED & set(path.relative_to(ROOT).parts))


# ----- generated files


@pytest.fixture
def copy(tmp_path):
    "A copy of what export, clean and the README need, to run them on."
    return shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(*IGNORED))


def sources(folder):
    "The modules and notebooks of a folder and its packages, by their paths in it."
    found = set()
    for path in folder.rglob("*"):
        if path.suffix in (".py", ".ipynb") and not IGNORED & set(path.relative_to(folder).parts):
            found.add(str(path.relative_to(folder)))
    return found


def changed(copy, folder):
    "Files that differ between the project and the copy, or are in one of them alone."
    names = sources(ROOT / folder)
    _, different, missing = filecmp.cmpfiles(ROOT / folder, copy / folder, names, shallow=False)
    return different + missing + sorted(sources(copy / folder) - names)


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
    run(sys.executable, "tools/docs.py", "readme", cwd=copy)
    assert (copy / "README.md").read_text() == (ROOT / "README.md").read_text(), "run `make readme` and commit"
    pictures = sorted(path.name for path in (ROOT / "docs/readme").iterdir())
    compared = filecmp.cmpfiles(ROOT / "docs/readme", copy / "docs/readme", pictures, shallow=False)
    assert pictures and compared[1:] == ([], []), "run `make readme` and commit"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_with_its_outputs(notebook):
    "A page of text alone, such as the glossary, has none."
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = []
    for cell in cells:
        outputs += cell["outputs"]
    assert (outputs or not cells) and not [output for output in outputs if output["output_type"] == "error"]


# ----- versions, requirements, installation


def test_version_and_requirements_come_from_settings():
    import rlhf_reward

    declared = requires("rlhf_reward")
    assert rlhf_reward.__version__ == SETTINGS["version"]
    assert {name.split(">")[0].split("=")[0] for name in SETTINGS["requirements"].split()} == {
        "torch",
        "transformers",
        "torchtyping",
        "accelerate",
        "datasets",
        "safetensors",
        "scipy",
        "scikit-learn",
    }
    runtime = [requirement for requirement in declared if "extra ==" not in requirement]
    assert len(runtime) == len(SETTINGS["requirements"].split())
    assert [requirement for requirement in runtime if requirement.startswith(("nbdev", "fastcore", "execnb"))] == []


@pytest.mark.process
def test_make_installs_only_once(tmp_path):
    "`make -n` prints what it would run: nothing of pip once all is installed. The demo needs no developer tools."
    def commands(target, folder):
        markers = [f"INSTALLED={folder}/installed", f"RUNTIME={folder}/runtime"]
        return run("make", "-n", target, *markers, cwd=ROOT).stdout

    before = commands("demo", ".venv/never-made")
    assert "pip install" in before and "rlhf_reward train" in before and "[dev]" not in before
    assert re.search(r"Installing .*PyTorch.* minutes", before) and re.search(r"Training on .* minutes", before)
    assert "--editable '.[dev]'" in commands("quick", ".venv/never-made")
    (tmp_path / "runtime").touch()
    assert "pip" not in commands("demo", tmp_path)



# ----- imports


def modules():
    "The names of all modules of the library, by path."
    found = {}
    for path in sorted((ROOT / "rlhf_reward").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "__pycache__" not in parts:
            found[path] = ".".join(parts).removesuffix(".__init__")
    return found


IMPORTS = """
import importlib, sys
import rlhf_reward
assert "torch" not in sys.modules, "the package itself"
import rlhf_reward.statistics
assert "torch" not in sys.modules, "figures"
import rlhf_reward.evaluation
assert "transformers.trainer" not in sys.modules, "an evaluation"
for name in rlhf_reward.__all__:
    getattr(rlhf_reward, name)
assert set(rlhf_reward.__all__) <= set(dir(rlhf_reward))
for name in sys.argv[1:]:
    importlib.import_module(name)
print({"nbdev", "fastcore", "execnb"} & set(sys.modules))
"""


@pytest.mark.process
def test_imports_load_what_is_used_and_neither_nbdev_nor_fastcore():
    "In a fresh interpreter, step by step: figures need no torch, an evaluation no trainer, nothing needs nbdev."
    names = [name for name in modules().values() if name != "rlhf_reward"]
    assert len(names) >= 7
    assert run(sys.executable, "-c", IMPORTS, *names).stdout == "set()\n"


def test_a_public_name_that_does_not_exist_is_named():
    import rlhf_reward

    with pytest.raises(AttributeError, match="no attribute 'Nothing'; its public names are RewardModel"):
        rlhf_reward.Nothing


PUBLIC_NAMES = json.loads(Path(__file__).with_name("public_names_0_1_0.json").read_text())


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_every_public_name_of_the_first_release_is_where_it_was(module):
    "Rooms change; an import that worked with 0.1.0 works still."
    loaded = importlib.import_module(module)
    assert [name for name in PUBLIC_NAMES[module] if not hasattr(loaded, name)] == []


def test_no_text_of_an_error_is_parsed():
    "Errors have fields for those that handle them. Only that of torch, when a disk is full, has nothing but its text."
    text = r"str\((error|exception|problem)\)"
    parsed = re.compile(rf" in {text}|{text}\.(startswith|endswith|find|index|partition)|\b(error|exception)\.args\b")
    found = []
    for path in modules():
        for line in path.read_text().splitlines():
            if parsed.search(line) and not line.lstrip().startswith("is_of_torch = "):
                found.append(f"{path.name}: {line.strip()}")
    assert not found


def test_no_import_goes_in_a_circle():
    "Counts the imports that run when a module is imported; those inside functions are free."
    imported = style.imported_modules(modules())
    done = set()

    def visit(name, path):
        assert name not in path, " → ".join([*path[path.index(name):], name])
        if name not in done:
            for other in sorted(imported[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in imported:
        visit(name, [])
    assert len(done) == len(modules())


# ----- style


@pytest.mark.parametrize("rule", style.CHECKS, ids=lambda rule: rule.__name__)
def test_style(rule):
    "A violation is shown as a place and what is wrong; `python tests/style.py FILE` lists those of a file."
    found = [line.replace(f"{ROOT}/", "") for line in style.violations(rule)]
    assert not found, "\n".join([f"{len(found)} violations; expected none", *found])


def test_the_rules_of_style_find_what_they_are_for(tmp_path, monkeypatch):
    root = tmp_path / "rlhf_reward"  # as `git clone` names it
    monkeypatch.setattr(style, "ROOT", root)
    old_word = style.WORDS[0][0].replace(r"\b", "")
    source = f'''"Of a module."
from rlhf_reward.data import _private
name = lambda value: value
table = [[cell for cell in row] for row in rows]
pairs = [(one, other) for one in rows for other in rows]
message = "found 3; {old_word} 4"


def shown():
    "What is shown."
'''
    module = root / "rlhf_reward/module.py"
    module.parent.mkdir(parents=True)
    module.write_text(source + "#" * 121 + "\n" + "pass\n" * 400 + "class Large:\n" + "    pass\n" * 200)
    counts = {rule.__name__: len(list(rule(module))) for rule in style.CHECKS}
    assert counts == {
        "wide_lines": 1,
        "nested_comprehensions": 2,
        "named_lambdas": 1,
        "large_parts": 2,
        "private_imports": 1,
        "old_words": 3,
        "long_stretches": 0,
        "unused_imports": 0,
    }
    for name in ("settings.yaml", "page.html", "page.js"):  # a text, all of it
        (module.parent / name).write_text(f"# found 3; {old_word} 4\n")
        assert len(list(style.old_words(module.parent / name))) == 1
    test = root / "tests/test_module.py"
    test.parent.mkdir()
    test.write_text("from rlhf_reward.data import _private\n")
    assert list(style.private_imports(test)) == []  # tests may look inside
    imports = "import os.path as path\nimport re, sys\nfrom fixtures import base\n\ndef test(base):\n    sys.exit()\n"
    test = test.with_name("test_other.py")
    test.write_text(imports)
    assert [line.split(": ")[1] for line in style.unused_imports(test)] == [
        "imports path, which is not used", "imports re, which is not used"
    ]
