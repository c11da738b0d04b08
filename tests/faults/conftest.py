"""What the tests of faults share."""

import functools

import pytest

from jaxlm.train import report, setup
from tests.train import runs


@pytest.fixture(scope="module")
def one_device():
    """And parts that are compiled once, as in tests/train."""
    with runs.devices(1), pytest.MonkeyPatch.context() as patch:
        for module, name in ((setup, "build"), (report, "measure_matmul")):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield
