"""Checkpoints: the LoRA in a file that stock diffusers loads, and beside it what training needs to continue.

    checkpoint_<n>/pytorch_lora_weights.safetensors   the LoRA, float32
    checkpoint_<n>/optimizer.safetensors              the optimizer's tensors, by parameter name
    checkpoint_<n>/state.json                         epoch, SHA-256 of the base model, the optimizer's plain numbers, the
                                                      gradient scaler's state; size and SHA-256 of all other files
    checkpoint_<n>/ema/                               with train.ema: the LoRA's exponential average, a checkpoint of its own
                                                      without an optimizer; its state.json counts the updates averaged

The folder appears by one rename, so it is whole or absent. Nothing in it is a pickle.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from b2diffurl.algorithm.average import Average
from b2diffurl.experiment.stage import AVERAGE, LORA_FILE
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"


def save_checkpoint(
    folder: Path,
    adapter: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    names: list[str],
    state: dict[str, Any],
    average: Average | None = None,
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
    if average:
        files.write_tensors(temporary / AVERAGE / LORA_FILE, average.tensors)
        write_state(temporary / AVERAGE, state | {"num_averaged": average.num_updates})
    write_state(temporary, state | {"optimizer": numbers})
    if folder.is_dir():  # a damaged one, which is made again; what is not ours in it moves over
        for path in sorted(folder.rglob("*")):  # a folder before what is in it, which moves along
            target = temporary / path.relative_to(folder)
            if os.path.lexists(path) and not target.exists():
                path.rename(target)
        files.remove(folder)
    temporary.replace(folder)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write state.json into a checkpoint's folder, with size and SHA-256 of each file that is there."""
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    described = {path.relative_to(folder).as_posix(): files.describe(path) for path in written}
    files.write_record(folder / STATE_FILE, state | {"files": described})


def read_state(lora: Path) -> dict[str, Any] | None:
    """The state.json beside a LoRA file; None for a LoRA that was made elsewhere and has none."""
    path = lora.parent / STATE_FILE
    return files.read_json(path) if path.is_file() else None


def require_whole(path: Path, checkpoint: Path | None = None) -> None:
    """Refuse a file that differs from its size and checksum in the state.json of `checkpoint`, by default the one beside it.

    A file that no state.json describes passes.
    """
    checkpoint = checkpoint or path.parent
    state = read_state(checkpoint / LORA_FILE)
    expected = (state or {}).get("files", {}).get(path.relative_to(checkpoint).as_posix())
    if expected and (not path.is_file() or files.describe(path) != expected):
        raise ValueError(
            f"{path} is damaged (checksum). Delete {checkpoint} and train the stage again, or take another LoRA."
        )


def whole_checkpoints(folders: list[Path]) -> list[Path]:
    """The checkpoints of an unfinished stage before the first damaged one.

    The log names the damaged one. It and all later ones are made again by training.
    """
    for number, folder in enumerate(folders):
        try:
            if not (folder / STATE_FILE).is_file():
                raise ValueError(f"{folder / STATE_FILE} is missing")
            for name in read_state(folder / LORA_FILE).get("files", {}):
                require_whole(folder / name, folder)
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


def load_average(lora: Path | None, decay: float, adapter: Mapping[str, Tensor]) -> Average:
    """The average saved in the checkpoint of the file `lora`, or a new one that starts as the LoRA itself.

    `adapter` is that LoRA, or a fresh one for None, under the keys of its file.
    """
    saved = lora.parent / AVERAGE / LORA_FILE if lora else None
    state = read_state(saved) if saved else None
    if state is None:
        return Average(decay, {name: value.detach().clone() for name, value in adapter.items()})
    require_whole(saved)
    tensors = files.read_tensors(saved)
    return Average(decay, {name: tensors[name].to(value.device) for name, value in adapter.items()}, state["num_averaged"])


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as a single one, keys joined by `::`. The state of 8-bit optimizers is nested."""
    flat = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}::") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
