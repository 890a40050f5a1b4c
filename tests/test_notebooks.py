"Every notebook runs from its first cell to its last, in a process of its own, as `nbdev_test` runs it."
import importlib.util
import sys
from pathlib import Path

import pytest

from programs import run

ROOT = Path(__file__).parents[1]
NBDEV_TEST = Path(sys.executable).with_name("nbdev_test")
SKIPPED = {"runs", ".ipynb_checkpoints"}
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if not SKIPPED & set(path.relative_to(ROOT).parts))
NEEDS = {"08_moving": "trl"}  # a package that Python 3.10 does not have
FRESH = "index"  # the notebook whose interpreter imports everything itself


@pytest.mark.notebook
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, python):
    needed = NEEDS.get(notebook.stem)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    interpreter = sys.executable if notebook.stem == FRESH else python
    run(interpreter, NBDEV_TEST, "--n_workers", "0", "--path", notebook, cwd=ROOT, timeout=500)
