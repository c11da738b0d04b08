"""Eight CPU devices for every test, asked for before anything imports jax; and machine code that compiles in a quarter of the time and runs slower."""

import importlib.metadata
import os
import sys

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Not optimised, and without the fusions that XLA emits through MLIR (a flag that jaxlib 0.12 no longer has): 1,430 CPU seconds of tests become 700.
QUICK = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith(("0.7.", "0.8.", "0.9.", "0.10.")):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), "--xla_force_host_platform_device_count=8", *QUICK])
os.environ.setdefault("PJRT_NPROC", "64")  # as cli.let_emulated_devices_meet does, which says why
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxlm/xla-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """After each file: a worker that held the programs of 1,700 tests, 3.7 GB of them, aborted in XLA."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
