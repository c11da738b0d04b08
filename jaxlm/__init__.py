"""jaxlm: from raw text to a trained, evaluated and served language model, in JAX."""

__version__ = "0.1.0"
