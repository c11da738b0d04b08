"""The model that a config describes, whatever its kind."""

from jaxlm.config import TransformerConfig
from jaxlm.models import decoder, encdec


def build(cfg: TransformerConfig) -> decoder.Model:
    """The model of a config whose `vocab_size` is known (see `decoder.vocabulary`)."""
    return encdec.build(cfg) if cfg.encoder_layers else decoder.build(cfg)
