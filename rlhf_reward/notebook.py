"Set up a notebook of this project so that its page shows results, without progress bars and notices."
import logging
import os
import sys
import warnings
from pathlib import Path


def quiet() -> None:
    "Turn off progress bars, notices about optional packages, and the dict that transformers prints at each log."
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}" # for !rlhf_reward
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    warnings.filterwarnings("ignore") # tqdm without ipywidgets, and deprecations inside of dependencies
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import datasets
    from transformers import PrinterCallback
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    PrinterCallback.on_log = _print_nothing


def _print_nothing(*args, **kwargs):
    "In the place of `PrinterCallback.on_log`."
