"""Files that are either whole or not there: a temporary name, a flush, a rename. Those that decide what is trained on say
by a checksum whether they are still what was written.
"""

import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

TEMPORARY = ".tmp"
SEAL = "content_sha256"  # last key of a record: SHA-256 of all that stands before it
SEALED = re.compile(rb'(.*?),\s*"' + SEAL.encode() + rb'": "(.*?)"\s*}\s*', re.DOTALL)


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `data` under a temporary name and rename it to `path`; `durable` also waits until the disk has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with naming(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()  # on a full disk it would take room from the next one
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside names the file; that of a write, such as on a full disk, names none by itself."""
    try:
        yield
    except safetensors.SafetensorError as error:  # as that library says it
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from None
        raise
    except OSError as error:
        if error.errno:
            error.filename = str(path)
        raise


def require_writable(folder: Path) -> None:
    """Refuse a folder in which, or in whose place, nothing can be written; before work whose result would be lost."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "nothing can be written here", str(there))


def finite(value: float) -> float | None:
    """A number as JSON can hold it: None for what is not finite."""
    return value if math.isfinite(value) else None


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_record(path: Path, value: dict) -> None:
    """Write a JSON object with a checksum of itself as its last entry, which `read_json` compares and leaves out."""
    write_bytes(path, seal(json.dumps(value, indent=1, allow_nan=False), "\n ") + b"\n")


def seal(text: str, separator: str = " ") -> bytes:
    """The JSON object `text` with its checksum."""
    body = text.removesuffix("}").rstrip().encode()
    end = separator.removesuffix(" ")
    return body + f',{separator}"{SEAL}": "{hashlib.sha256(body).hexdigest()}"{end}}}'.encode()


def open_sealed(data: bytes) -> Any:
    """The JSON value in `data`, without the checksum that a record has; a ValueError if it is damaged."""
    value = json.loads(data)
    match = SEALED.fullmatch(data)
    if match:
        if hashlib.sha256(match[1]).hexdigest().encode() != match[2]:
            raise ValueError("its checksum is another")
        del value[SEAL]
    return value


def write_json_lines(path: Path, rows: list[dict], *, sealed: bool = False) -> None:
    """Write one JSON object a line, each with a checksum of itself if `sealed`."""
    lines = [json.dumps(row, allow_nan=False) for row in rows]
    write_bytes(path, b"".join((seal(line) if sealed else line.encode()) + b"\n" for line in lines))


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
    """A JSON value; a ValueError names a file that is none, or a record that is not as it was written."""
    with damage_named(path):
        return open_sealed(path.read_bytes())


def read_json_lines(path: Path) -> list[dict]:
    with damage_named(path):
        return [open_sealed(line) for line in path.read_bytes().splitlines()]


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, safetensors.SafetensorError) as error:  # ValueError: JSON's and Unicode's, too
        raise ValueError(f"{path} is damaged ({error}). Delete it and run the same command again.") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict | None = None) -> None:
    """Write a safetensors file. `metadata` is kept as one JSON string: with one key the bytes are reproducible."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"b2diffurl": json.dumps(metadata or {}, sort_keys=True)}
    write_bytes(path, safetensors.torch.save(tensors, metadata=header))


def read_metadata(path: Path) -> dict:
    """The metadata given to `write_tensors`."""
    with damage_named(path), safetensors.safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("b2diffurl", "{}"))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file ({error}).") from None


def tensors_sha256(tensors: dict[str, Tensor], metadata: dict) -> str:
    """SHA-256 of what a safetensors file holds, for its own metadata."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


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
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
