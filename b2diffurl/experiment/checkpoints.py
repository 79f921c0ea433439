"""Checkpoints: the LoRA in a file that stock diffusers loads, and beside it what training needs to go on.

    checkpoint_<n>/pytorch_lora_weights.safetensors   the adapter, float32
    checkpoint_<n>/optimizer.safetensors              the optimizer's tensors, by parameter name
    checkpoint_<n>/state.json                         epoch, base model, optimizer's numbers, gradient scaler; what
                                                      the other two are (size and checksum)

The folder appears by one rename, so it is whole or absent. Nothing in it is a pickle.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from b2diffurl.experiment.stage import LORA_FILE
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"


def save_checkpoint(
    folder: Path, adapter: dict[str, Tensor], optimizer: torch.optim.Optimizer, names: list[str], state: dict[str, Any]
) -> None:
    """Write one checkpoint. `names` are the parameters' names in the optimizer's order; `state` is JSON."""
    temporary = folder.with_name(folder.name + files.TEMPORARY)
    for leftover in (temporary, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    tensors, numbers = {}, {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in flatten(entries).items():
            kind = tensors if isinstance(value, Tensor) else numbers
            kind[f"{names[index]}::{key}"] = value
    files.write_tensors(temporary / LORA_FILE, adapter)
    files.write_tensors(temporary / OPTIMIZER_FILE, tensors)
    described = {path.name: files.describe(path) for path in sorted(temporary.iterdir())}
    files.write_record(temporary / STATE_FILE, state | {"optimizer": numbers, "files": described})
    temporary.replace(folder)


def read_state(lora: Path) -> dict[str, Any] | None:
    """The state.json beside a LoRA file, or None for a LoRA from elsewhere."""
    path = lora.parent / STATE_FILE
    return files.read_json(path) if path.is_file() else None


def require_whole(path: Path) -> None:
    """Refuse a LoRA or optimizer file that is not what state.json beside it says; if it says nothing of it, it passes."""
    state = read_state(path)
    expected = (state or {}).get("files", {}).get(path.name)
    if expected and (not path.is_file() or files.describe(path) != expected):
        raise ValueError(
            f"{path} is damaged (checksum). Delete {path.parent} and train the stage again, or take another LoRA."
        )


def whole_checkpoints(folders: list[Path]) -> list[Path]:
    """Of an unfinished stage's checkpoints those before the first damaged one, which is named in the log; it and those after
    it are made again."""
    for number, folder in enumerate(folders):
        try:
            if not (folder / STATE_FILE).is_file():
                raise ValueError(f"{folder / STATE_FILE} is missing")
            require_whole(folder / LORA_FILE)
            require_whole(folder / OPTIMIZER_FILE)
        except ValueError as error:
            logger.warning("%s; it is made again", str(error).split(" Delete ")[0].rstrip("."))
            return folders[:number]
    return folders


def load_optimizer(lora: Path, optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Restore the optimizer saved beside `lora`, matched by parameter name."""
    require_whole(lora.parent / OPTIMIZER_FILE)
    values = files.read_tensors(lora.parent / OPTIMIZER_FILE)
    values |= read_state(lora)["optimizer"]
    index_of = {name: index for index, name in enumerate(names)}
    entries: dict[int, dict] = {}
    for name, value in values.items():
        parameter, *path, key = name.split("::")
        if parameter not in index_of:
            raise ValueError(f"{lora.parent} holds optimizer state of {parameter}, which this model does not train.")
        entry = entries.setdefault(index_of[parameter], {})
        for part in path:
            entry = entry.setdefault(part, {})
        entry[key] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries (8-bit optimizers keep their state in them) as one, keys joined by `::`."""
    flat = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}::") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
