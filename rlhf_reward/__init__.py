"Reward models for RLHF: data, training, evaluation, scoring."
__version__ = "0.1.0"

from importlib import import_module

# Public names by the module that defines them. They load when used, since torch and transformers take seconds to import.
_PUBLIC = {
    "reward": ["RewardModel", "PairwiseLoss"],
    "data": ["Comparison", "load_rows"],
    "tokens": ["tokenize_rows"],
    "training": ["RewardConfig", "RewardTrainer"],
    "scoring": ["Scorer"],
    "rl": ["RewardFunction"],
    "evaluation": ["evaluate"],
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = list(_MODULE_OF)


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
