"""Checkpoints: the LoRA in a file that stock diffusers loads, and beside it what training needs to go on.

    checkpoint_<n>/pytorch_lora_weights.safetensors   the adapter, float32
    checkpoint_<n>/optimizer.safetensors              the optimizer's tensors, by parameter name
    checkpoint_<n>/state.json                         epoch, base model, optimizer's numbers, gradient scaler

The folder appears by one rename, so it is whole or absent. Nothing in it is a pickle.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from b2diffurl import files
from b2diffurl.stage import LORA_FILE


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
    files.write_tensors(temporary / "optimizer.safetensors", tensors)
    files.write_json(temporary / "state.json", state | {"optimizer": numbers})
    temporary.replace(folder)


def read_state(lora: Path) -> dict[str, Any] | None:
    """The state.json beside a LoRA file, or None for a LoRA from elsewhere."""
    path = lora.parent / "state.json"
    return files.read_json(path) if path.is_file() else None


def load_optimizer(lora: Path, optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Restore the optimizer saved beside `lora`, matched by parameter name."""
    values = files.read_tensors(lora.parent / "optimizer.safetensors")
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
