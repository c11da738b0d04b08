"""From `model.kind` to the code that computes it."""

from collections.abc import Callable

from jaxlm.config import TransformerConfig
from jaxlm.models import decoder, encoder

KINDS: dict[str, Callable[[TransformerConfig], decoder.Model]] = {"decoder": decoder.build, "encoder": encoder.build}


def build(cfg: TransformerConfig) -> decoder.Model:
    """The model of a config whose `vocab_size` is known (see `decoder.vocabulary`)."""
    return KINDS[cfg.kind](cfg)
