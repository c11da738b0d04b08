"""jaxlm verify: is a config's training the same on every mesh as on one device?

  jaxlm verify --config=quickstart
  jaxlm verify --config=llama_7b --meshes=fsdp=4+tensor=2,sequence=4 --steps=3

The config's model is made tiny with every knob of it kept, and trained for a few steps in float32 on one device and on each mesh, with packed, padded
rows. Losses, every leaf of the gradient and the updated parameters must agree within what rounding explains: the bound is measured by moving the
parameters by one unit of rounding (the error model stands in jaxlm/verify.py). The table shows the largest relative errors of each mesh and the
leaf nearest to its bound. Without --meshes: each axis alone and the useful combinations; what the model cannot use is said.

It needs no accelerator: 8 devices are emulated on the CPU. --real uses the devices of this machine.
Exit code 0: all agree; 1: one does not.
"""

import os

from absl import flags


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "Recipe: a packaged name (quickstart, gpt2_124m, ...) or a file, with an optional :argument.",
                        required=True, flag_values=values)
    flags.DEFINE_string("meshes", "", "Meshes to compare, AXIS=SIZE joined by + in a mesh and by , between meshes; empty: the useful ones.", flag_values=values)
    flags.DEFINE_integer("steps", 3, "Training steps.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("real", False, "Use this machine's devices instead of emulated ones.", flag_values=values)


def main(values: flags.FlagValues, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import config

    cfg = config.load(values.config, overrides)
    if not values.real:  # before jax starts
        os.environ["JAX_PLATFORMS"] = "cpu"
        if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
        os.environ.setdefault("PJRT_NPROC", "64")  # jaxlm/cli.py, let_emulated_devices_meet, says why

    import jax

    from jaxlm import verify

    names = [name for name in verify.parse(values.meshes) if values.meshes or verify.used(cfg.model, name) and verify.devices(name) <= jax.device_count()]
    print(verify.HEADER, flush=True)
    rows = verify.verify(cfg, names, values.steps, lambda row: print(verify.line(row), flush=True), chosen=bool(values.meshes))
    compared, wrong = [row for row in rows if not row.refused], [row.mesh for row in rows if not row.ok]
    print(f"{len(compared) - len(wrong)} of {len(compared)} meshes agree with one device over {values.steps} steps"
          + (f"; not {', '.join(wrong)}" if wrong else ""))
    return 1 if wrong else 0
