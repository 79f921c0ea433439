"""Checkpoints: the LoRA in a file that stock diffusers loads, and beside it what training needs to continue.

    checkpoint_<n>/pytorch_lora_weights.safetensors   the LoRA, float32
    checkpoint_<n>/optimizer.safetensors              the optimizer's tensors, by parameter name
    checkpoint_<n>/state.json                         epoch, SHA-256 of the base model, the optimizer's plain numbers, the
                                                      gradient scaler's state; size and SHA-256 of the other two files

The folder appears by one rename, so it is whole or absent. Nothing in it is a pickle.
"""

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
    """Write one checkpoint. `names` are the parameters' names in the optimizer's order; `state` is what state.json adds."""
    temporary = folder.with_name(folder.name + files.TEMPORARY)
    files.empty_folder(temporary)
    # Tensors go to safetensors and plain numbers to JSON: together they replace torch.save, which would be a pickle.
    tensors, numbers = {}, {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in flatten(entries).items():
            kind = tensors if isinstance(value, Tensor) else numbers
            kind[f"{names[index]}::{key}"] = value
    files.write_tensors(temporary / LORA_FILE, adapter)
    files.write_tensors(temporary / OPTIMIZER_FILE, tensors)
    described = {path.name: files.describe(path) for path in sorted(temporary.iterdir())}
    files.write_record(temporary / STATE_FILE, state | {"optimizer": numbers, "files": described})
    if folder.is_dir():  # a damaged one, which is made again; what is not ours in it moves over
        for path in folder.iterdir():
            if path.name not in (LORA_FILE, OPTIMIZER_FILE, STATE_FILE):
                path.rename(temporary / path.name)
        files.remove(folder)
    temporary.replace(folder)


def read_state(lora: Path) -> dict[str, Any] | None:
    """The state.json beside a LoRA file; None for a LoRA that was made elsewhere and has none."""
    path = lora.parent / STATE_FILE
    return files.read_json(path) if path.is_file() else None


def require_whole(path: Path) -> None:
    """Refuse a LoRA or optimizer file that differs from its size and checksum in the state.json beside it.

    A file that no state.json describes passes.
    """
    state = read_state(path)
    expected = (state or {}).get("files", {}).get(path.name)
    if expected and (not path.is_file() or files.describe(path) != expected):
        raise ValueError(
            f"{path} is damaged (checksum). Delete {path.parent} and train the stage again, or take another LoRA."
        )


def whole_checkpoints(folders: list[Path]) -> list[Path]:
    """The checkpoints of an unfinished stage before the first damaged one.

    The log names the damaged one. It and all later ones are made again by training.
    """
    for number, folder in enumerate(folders):
        try:
            if not (folder / STATE_FILE).is_file():
                raise ValueError(f"{folder / STATE_FILE} is missing")
            require_whole(folder / LORA_FILE)
            require_whole(folder / OPTIMIZER_FILE)
        except ValueError as error:
            # The advice to delete something is cut off: here training mends the damage by itself.
            logger.warning("%s; it is made again", str(error).split(" Delete ")[0].rstrip("."))
            return folders[:number]
    return folders


def load_optimizer(lora: Path, optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Restore the optimizer saved beside `lora`, matched by parameter name; a ValueError names an unknown parameter."""
    require_whole(lora.parent / OPTIMIZER_FILE)
    values = files.read_tensors(lora.parent / OPTIMIZER_FILE)
    values |= read_state(lora)["optimizer"]
    index_of = {name: index for index, name in enumerate(names)}
    entries: dict[int, dict] = {}
    for name, value in values.items():
        parameter, *path, key = name.split("::")  # path: of nested dictionaries, see `flatten`
        if parameter not in index_of:
            raise ValueError(f"{lora.parent} holds optimizer state of {parameter}, which this model does not train.")
        entry = entries.setdefault(index_of[parameter], {})
        for part in path:
            entry = entry.setdefault(part, {})
        entry[key] = value
    # Learning rate, betas and weight decay stay those of the configuration, which may have changed since.
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as a single one, keys joined by `::`. The state of 8-bit optimizers is nested."""
    flat = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}::") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
