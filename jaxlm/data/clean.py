"""Stand-in."""
from typing import NamedTuple


class Cleaned(NamedTuple):
    text: str
    removed_by: str
    value: float
    language: str
    counts: dict


def cleaner(config):
    return lambda d: Cleaned(d.text if isinstance(d.text, str) else d.text.decode("utf-8", "replace"), "", 0.0, "", {})
