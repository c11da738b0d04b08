"""Rewrites the golden files under tests/golden: python tools/refresh_golden.py NAME [NAME ...]; without a name it lists them.

A golden file freezes a fact that people rely on. Refresh one only when the change is meant, and say in the commit why.
"""

import json
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"


def config_keys():
    from jaxlm import config
    return config.keys()


def parameter_paths():
    import jax

    from jaxlm import trees
    from jaxlm.models import decoder
    from tests.models.test_decoder import VARIANTS
    shape = lambda cfg: trees.flatten(jax.eval_shape(decoder.build(cfg).init, jax.random.key(0)))
    return {name: {path: list(leaf.shape) for path, leaf in shape(cfg).items()} for name, cfg in VARIANTS.items()}


def losses():
    from tests.train.test_step import golden_losses
    return golden_losses()


def collectives():
    """One file for each contract, in a folder of their own; needs libtpu."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from tests.aot import contracts
    for name in contracts.CONTRACTS:
        print(contracts.write(name), flush=True)


if __name__ == "__main__":
    makers = {f.__name__: f for f in (config_keys, parameter_paths, losses, collectives)}
    if len(sys.argv) < 2 or set(sys.argv[1:]) - set(makers):
        sys.exit(f"{__doc__}\nGolden files: {', '.join(makers)}")
    for name in sys.argv[1:]:
        if name == "collectives":
            collectives()
            continue
        path = ROOT / "tests" / "golden" / f"{name}.json"
        path.write_text(json.dumps(makers[name](), indent=1) + "\n")
        print(path)
