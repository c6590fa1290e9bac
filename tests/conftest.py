"""What every test gets: no network, one seed, few threads; and a guard against tests that quietly vanish."""

from __future__ import annotations

import os

# Before anything imports torch or transformers, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

import random
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
COLLECTED_FLOOR = 2290  # raise it as the suite grows: a suite that shrinks by accident must fail


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Same random numbers for a test alone and in the suite. torch is seeded when the test's module imported it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.hookimpl(tryfirst=True)  # before -m takes tests away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    whole_suite = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not config.getoption("keyword")
    if whole_suite and len(items) < COLLECTED_FLOOR:
        raise pytest.UsageError(
            f"{len(items)} tests collected, at least {COLLECTED_FLOOR} expected: where did they go?"
        )
