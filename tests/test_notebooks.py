"Every notebook runs from its first cell to its last, in a process of its own, as `nbdev_test` runs it."
import importlib.util
import sys
from pathlib import Path

import pytest

from programs import run

ROOT = Path(__file__).parents[1]
NBDEV_TEST = Path(sys.executable).with_name("nbdev_test")
SKIPPED = {"runs", ".ipynb_checkpoints"}
# Those that take seconds come first, the longest before the others, so that none is left to one worker at the end.
LONG = (
    "05_how_sure",
    "05_is_it_good",
    "01_train",
    "04_reinforcement_learning",
    "03_rankings",
    "01o_averaging",
    "06_scoring",
    "07b_report",
    "05l_head_start",
    "06a_files",
    "02_your_data",
    "07i_report_plots",
    "index",
)


def by_length(path):
    return (LONG.index(path.stem) if path.stem in LONG else len(LONG)), path


NOTEBOOKS = []
for path in sorted((ROOT / "nbs").rglob("*.ipynb"), key=by_length):
    if not SKIPPED & set(path.relative_to(ROOT).parts):
        NOTEBOOKS.append(path)
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
