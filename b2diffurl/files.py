"""Files that are either whole or not there: a temporary name, a flush, a rename."""

import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

TEMPORARY = ".tmp"


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `data` under a temporary name and rename it to `path`; `durable` also waits until the disk has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_json_lines(path: Path, rows: list[dict]) -> None:
    write_bytes(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())


def write_image(path: Path, image: Tensor) -> None:
    """Write one image uint8 [H,W,3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, format="png", compress_level=1)
    write_bytes(path, buffer.getvalue(), durable=False)


def read_image(path: Path) -> Tensor:
    """One image uint8 [H,W,3]; a ValueError names a file that is none."""
    try:
        return torch.from_numpy(np.array(Image.open(path).convert("RGB")))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from None


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it and run the same command again.") from None


def read_json_lines(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it and run the same command again.") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict | None = None) -> None:
    """Write a safetensors file. `metadata` is kept as one JSON string: with one key the bytes are reproducible."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"b2diffurl": json.dumps(metadata or {}, sort_keys=True)}
    write_bytes(path, safetensors.torch.save(tensors, metadata=header))


def read_metadata(path: Path) -> dict:
    """The metadata given to `write_tensors`."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("b2diffurl", "{}"))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it and run the same command again.") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file ({error}).") from None


def describe(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file, as manifests hold them."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """A short checksum of a JSON value, for a file name that says what made the file."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def remove_temporaries(folder: Path) -> None:
    """Delete what an interrupted write left below `folder`."""
    for path in sorted(folder.rglob("*" + TEMPORARY)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
