"""Eight CPU devices for every test, asked for before anything imports jax; and machine code that is not optimised, which compiles in half the time."""

import os
import sys

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0").strip()
os.environ.setdefault("PJRT_NPROC", "64")  # as cli.let_emulated_devices_meet does, which says why
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxlm/xla-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """After each file: a worker that held the programs of 1,700 tests, 3.7 GB of them, aborted in XLA."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
