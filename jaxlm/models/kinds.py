"""The model that a config describes, whatever its kind."""

from jaxlm.config import TransformerConfig
from jaxlm.models import decoder, encdec, encoder


def build(cfg: TransformerConfig) -> decoder.Model:
    """The model of a config whose `vocab_size` is known (see `decoder.vocabulary`)."""
    if cfg.encoder_layers:
        return encdec.build(cfg)
    return encoder.build(cfg) if cfg.kind == "encoder" else decoder.build(cfg)
