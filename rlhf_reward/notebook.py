"Set up a notebook of this project so that its page shows results, without progress bars and notices."
import os
import sys
import warnings
from pathlib import Path


def quiet() -> None:
    "Turn off progress bars and warnings of dependencies."
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}" # for !rlhf_reward
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    warnings.filterwarnings("ignore") # tqdm without ipywidgets, and deprecations inside of dependencies
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
