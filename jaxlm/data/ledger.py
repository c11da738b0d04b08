"""What a checkpoint says of the data it was trained on: data.json. With the checkpoint's config and the corpus itself it determines every row so far."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.data.shards import Corpus

FILE = "data.json"


def entry(corpus: Corpus, step: int, seed: int, batch_size: int, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ledger after `step` steps.

    Args:
      history: what its first parameters had been trained on, oldest first: see `inherited`.

    Returns:
      A JSON value: "dir" and "manifest" (fingerprint) of the corpus; "sources" and "ids", checksums of what it says of its training documents beside
      their tokens; "step", "seed", "rows_per_step", "rows"; "history".
    """
    return {"step": step, "dir": str(corpus.folder.absolute()), "manifest": corpus.fingerprint, "sources": sources_sha256(corpus), "ids": ids_sha256(corpus),
            "seed": seed, "rows_per_step": batch_size, "rows": step * batch_size, "history": list(history)}


def inherited(origin: str, saved: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The history of a run that begins with other parameters.

    Args:
      origin: where they came from: a workdir, "hf:DIR" or "gguf:FILE".
      saved: the ledger of the checkpoint they were read from; None where there is none, so that nothing is known.
    """
    if saved is None:
        return [{"origin": origin}]
    own = {key: value for key, value in saved.items() if key != "history"}
    return [*saved.get("history", ()), *([{"origin": origin} | own] if saved["manifest"] else [])]


def sources_sha256(corpus: Corpus) -> str:
    """Of which source each training document is: a mixture follows from it."""
    found = hashlib.sha256(json.dumps(corpus.sources).encode())
    found.update(corpus.splits["train"].sources.astype("<i4").tobytes())
    return found.hexdigest()


def ids_sha256(corpus: Corpus) -> str:
    """Checksum (hex) of the training documents' ids in their order: equal corpora have equal ones."""
    return corpus.manifest["splits"]["train"]["ids"]["sha256"]
