"""
Shared by all tests: one thread a process, the order of the files, marks, programs that start fast, loggers.

A test that starts a Python program asks for the fixture `python`, which marks it as `process`; the fixtures `site` and
`chromium` mark tests in the same way. Other programs need the mark on the test: without it, starting Python fails.
"""
import gc
import logging
import os
import shutil
import subprocess
import sys
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two workers share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder that does not exist may be a name on the hub: 45 s of attempts

import pytest
import warm

gc.disable()  # until all tests are collected: imports make a million objects, of which none is garbage
if "PYTEST_XDIST_WORKER" in os.environ:
    sys.executable = os.environ.get("COLD_PYTHON", sys.executable)  # a worker is a fork: see `warm_python`

# The files that take long, longest first, so that none of them is left to one worker at the end. All others follow.
LONG_FILES = (
    "test_docs.py",
    "test_runs.py",
    "test_composite.py",
    "test_serving.py",
    "test_own_run.py",
    "test_training.py",
    "test_branching.py",
    "test_packing.py",
    "test_reward.py",
    "test_encoder_heads.py",
    "test_scoring.py",
    "test_evaluation.py",
    "test_peft.py",
    "test_cli.py",
    "test_benchmarks.py",
    "test_mixtures.py",
    "test_adapters.py",
    "test_files.py",
    "test_encodings.py",
    "test_many_machines.py",
    "test_kernels.py",
    "test_head_start.py",
    "test_pooling.py",
    "test_regularizers.py",
    "test_command_line.py",
    "test_front_door.py",
    "test_templates.py",
    "test_tokens.py",
    "test_single.py",
    "test_verify.py",
    "test_report.py",
    "test_project.py",
    "test_attributes.py",
    "test_columns.py",
    "test_checkpoints.py",
    "test_converting.py",
    "test_varlen.py",
    "test_verdicts.py",
    "test_sft_adapters.py",
)
LAST = "test_notebooks.py"  # many equal parts, which fill both workers to the end
MARKS_BY_FIXTURE = {"python": "process", "site": "site", "chromium": "browser"}
PROGRAM_MARKS = {"process", "notebook", "site", "browser", "fuzz", "wheel"}
running = None  # the test that runs


def pytest_addoption(parser):
    parser.addoption("--fuzz-cases", type=int, default=60, help="random requests to each address of a server")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    def weight(item):
        name = item.path.name
        return LONG_FILES.index(name) if name in LONG_FILES else len(LONG_FILES) + (name == LAST)

    for item in items:
        for fixture, mark in MARKS_BY_FIXTURE.items():
            if fixture in item.fixturenames:
                item.add_marker(mark)
    items.sort(key=weight)


def pytest_collection_finish():
    gc.enable()
    gc.set_threshold(20_000, 20, 20)
    leave_out_what_is_kept()
    shorten_configs()
    load_weights_in_one_thread()
    leave_writing_to_the_kernel()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    try:
        return (yield)
    finally:
        if nextitem is not None and nextitem.path != item.path:
            leave_out_what_is_kept()


def leave_out_what_is_kept():
    """
    Tell the garbage collector to leave out what the imports made and what the files before have kept.

    Each run of a Trainer ends with a full collection. Going through the objects of torch and transformers every time
    took two fifths of the time of the tests that train. One file that keeps all notebooks and their syntax trees made
    every training after it two to three times as long.
    """
    gc.collect()
    gc.freeze()


def shorten_configs():
    """
    Let a config be a short text.

    Each time one is read, transformers writes all of it into a log line that nobody has asked for: a tenth of the time
    of the tests that open models.
    """
    from transformers import PreTrainedConfig  # not in the controller, which needs no torch

    PreTrainedConfig.__repr__ = object.__repr__


def load_weights_in_one_thread():
    """
    Open models as `HF_DEACTIVATE_ASYNC_LOAD=1` does, which transformers asks for each time.

    Four threads take turns with tensors of some kilobytes, and on a busy machine the one that opens the model waits for
    them. Programs and notebooks do not get the variable: they open models as users do.
    """
    from transformers import core_model_loading

    core_model_loading.is_env_variable_true = is_one_thread_asked_for


def is_one_thread_asked_for(variable):
    "Answer as if this variable alone were set."
    return variable == "HF_DEACTIVATE_ASYNC_LOAD"


def leave_writing_to_the_kernel():
    """
    Let nothing wait for the disk.

    Each training asks it for a write, to see whether its folder takes one, and waits for everything that the tests have
    written before. `test_files_reach_the_disk` sees that the library does wait.
    """
    os.fsync = sync_nothing


def sync_nothing(descriptor):
    "Do not wait until a file is on the disk."


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Give a whole file to one worker, which builds its fixtures once; but a notebook is a piece of work by itself."
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::", 1)[0]
            return nodeid if file.endswith(LAST) else file

    return Scheduling(config, log)


class MarkedPopen(subprocess.Popen):
    "A test without a mark for it starts no Python."
    def __init__(self, args, *others, **options):
        if running is not None:
            first = args if isinstance(args, (str, bytes, os.PathLike)) else args[0]
            program = os.path.basename(os.fsdecode(options.get("executable") or first).split()[0])
            marks = {mark.name for mark in running.iter_markers()}
            if program.startswith(("python", "rlhf_reward", "nbdev")) and not marks & PROGRAM_MARKS:
                expected = "expected the fixture `python` or the mark `process`"
                raise RuntimeError(f"{running.nodeid} starts {program}; {expected}.")
        super().__init__(args, *others, **options)


subprocess.Popen = MarkedPopen  # an audit hook would be called for each file and import, too


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    global running
    running = item
    try:
        return (yield)
    finally:
        running = None


def warm_python():
    "Return the path of a Python that has imported the library already: `WARM_PYTHON`, started if there is none yet."
    if not sys.platform.startswith("linux"):
        return sys.executable
    if "WARM_PYTHON" not in os.environ:
        os.environ["WARM_PYTHON"] = f"{warm.start(os.getpid())}/python"
    return os.environ["WARM_PYTHON"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs):
    "Workers are forks too, so that the library is imported once for all of them."
    gc.enable()
    for spec in specs:
        spec.python = warm_python()


@pytest.fixture(scope="session")
def python():
    "The path of a Python that has imported the library already. `rlhf_reward` and `accelerate` are in its folder."
    return warm_python()


@pytest.fixture(scope="module")
def chromium():
    "A browser. Where there is none, its tests are skipped, or fail if BROWSER_TESTS=required."
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        required = os.environ.get("BROWSER_TESTS") == "required"
        assert not required, "There is no Chromium here, and the tests in a browser are required."
        pytest.skip("there is no Chromium here")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def no_curves(monkeypatch):
    "Models are saved without a picture of their losses, which takes longer to draw than most tests."
    from rlhf_reward import card

    monkeypatch.setattr(card, "draw_curves", lambda log_history, path: False)


@pytest.fixture
def no_pictures(monkeypatch):
    "Reports of evaluations are written without pictures, which take longer to draw than most tests."
    from rlhf_reward import report

    monkeypatch.setattr(report, "plots", lambda evaluation: {})


@pytest.fixture
def few_synthetic_rows(monkeypatch, no_curves):
    "200 synthetic comparisons instead of 6,000, for commands of which only the errors or the first steps matter."
    from rlhf_reward import synthetic

    monkeypatch.setattr(synthetic, "synthetic_comparisons", partial(synthetic.synthetic_comparisons, 200))


@pytest.fixture(autouse=True)
def log_levels_as_before():
    "Every test leaves the loggers as it found them, whatever the order of the tests."
    loggers = [logging.getLogger(name) for name in ("rlhf_reward", "transformers")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels):
        if logger.level != level:  # setting one goes through all loggers
            logger.setLevel(level)
