"""What one optimiser step turns into the next, and all that a resumed run needs besides its position in the data."""

from typing import Any, NamedTuple

import jax


class State(NamedTuple):
    """Every leaf is a `jax.Array`; in several processes a global one, `step` and `key` too, or they cannot be written together."""

    step: jax.Array  # int32 scalar: optimiser steps done
    params: dict[str, Any]  # float32; frozen ones may be kept in another form (jaxlm/lora.py)
    opt: Any  # the optax state
    ema: dict[str, Any] | None  # moving average of the trained parameters, None when it is off
    key: jax.Array  # uint32 raw key data, so that a State holds plain arrays only: jax.random.wrap_key_data(key) makes the typed key
