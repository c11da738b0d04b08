"""One file for each verb."""


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or this machine had too little memory: jax says so with RESOURCE_EXHAUSTED, on CPUs inside an internal error."""
    of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return isinstance(error, MemoryError) or of_jax and ("RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error))
