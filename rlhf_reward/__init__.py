"Reward models for RLHF: data, training, evaluation, scoring."
__version__ = "0.1.0"

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; below they load when used
    from .data import Comparison as Comparison
    from .data import load_rows as load_rows
    from .evaluation import evaluate as evaluate
    from .reward import PairwiseLoss as PairwiseLoss
    from .reward import RewardModel as RewardModel
    from .rl import RewardFunction as RewardFunction
    from .scoring import Scorer as Scorer
    from .tokens import tokenize_rows as tokenize_rows
    from .training import RewardConfig as RewardConfig
    from .training import RewardTrainer as RewardTrainer

# bitsandbytes reports at its import that it does not find a kernel, also where nothing is in 4 bits
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))

# Public names by module. They load when first used, because importing torch and transformers takes seconds.
_PUBLIC = {
    "reward": ["RewardModel", "PairwiseLoss"],
    "data": ["Comparison", "load_rows"],
    "tokens": ["tokenize_rows"],
    "training": ["RewardConfig", "RewardTrainer"],
    "scoring": ["Scorer"],
    "rl": ["RewardFunction"],
    "evaluation": ["evaluate"],
}
_MODULE_OF = {}
for _module, _names in _PUBLIC.items():
    _MODULE_OF.update(dict.fromkeys(_names, _module))
__all__ = list(_MODULE_OF)


if not TYPE_CHECKING:  # which would take any name for one of the module

    def __getattr__(name):
        if name not in _MODULE_OF:
            public = ", ".join(__all__)
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {public}")
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
