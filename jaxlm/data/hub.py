"""Folders that Hugging Face `datasets` wrote with `save_to_disk`: which Arrow files they consist of. Needs no package."""

import json
import os

from jaxlm.data.readers import Fault


def is_dataset(folder: str) -> bool:
    """Whether a folder holds a Dataset or a DatasetDict."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def files(folder: str) -> list[str]:
    """The Arrow files of a Dataset in their order; of a DatasetDict, those of its split "train".

    Raises:
      ValueError: one line: no such split, a listed file is missing, or the folder's own description is damaged.
    """
    description = os.path.join(folder, "dataset_dict.json")
    try:
        if os.path.isfile(description):
            splits = [str(name) for name in _load(description)["splits"]]
            if "train" not in splits:
                raise Fault(f"{folder} has no split 'train'; name one of its splits: {', '.join(os.path.join(folder, name) for name in splits)}")
            folder = os.path.join(folder, "train")
        description = os.path.join(folder, "state.json")
        state = _load(description)
        names = [entry["filename"] for entry in state["_data_files"]]
        for name in names:
            if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", "..") or "\\" in name or "\0" in name:
                raise Fault(f"{description} names the file {name!r}, which is not a plain name inside the folder: do not trust it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        if isinstance(error, Fault):
            raise
        raise ValueError(f"{description} does not describe a data set as datasets' save_to_disk writes it ({' '.join(str(error).split())})") from None
    if state.get("_indices_data_files"):
        raise ValueError(f"{folder} keeps its rows in another order (_indices_data_files): save it again with a newer version of datasets")
    paths = [os.path.join(folder, name) for name in names]
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"{path} is missing, which {description} lists: copy the folder again, whole")
    return paths


def _load(path: str) -> dict:
    with open(path, encoding="utf-8") as file:
        return json.load(file)
