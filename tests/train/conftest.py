"""What the tests of training share."""

import functools

import pytest

from jaxlm.evaluate import likelihood
from jaxlm.train import report, setup


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """In a file, runs of one config share their compiled parts, which hold no state; test_processes.py has runs in processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((setup, "build"), (likelihood, "scorer"), (report, "measure_matmul")):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield
