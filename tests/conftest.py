"""Every test leaves the loggers as it found them, whatever the order of the tests."""

import logging

import pytest


@pytest.fixture(autouse=True)
def log_levels_as_before():
    loggers = [logging.getLogger(name) for name in ("rlhf_reward", "transformers")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels):
        logger.setLevel(level)
