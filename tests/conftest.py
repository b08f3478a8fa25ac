"""Fixtures every test file may ask for."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core, and threads that fight for one are slower than none
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel

from kvfactory import load_model

settings.register_profile("busy machine", deadline=None)  # how long an example takes says nothing about what it checks
settings.load_profile("busy machine")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden vectors and real rows; tests that need it skip where KVFACTORY_SHARED is not set."""
    folder = os.environ.get("KVFACTORY_SHARED")
    if not folder or not Path(folder).is_dir():
        pytest.skip("KVFACTORY_SHARED is not set to the folder of golden vectors")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def embedded() -> PreTrainedModel:
    """The embedded model in float32, as golden values have it."""
    return load_model(dtype="float32", attn_implementation="eager", device="cpu")[0]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> object:
    """Tests that use it run with one thread of torch and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)
