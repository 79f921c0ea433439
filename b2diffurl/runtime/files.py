"""Reading and writing files that are whole or absent at any moment, and that show by a checksum if they were damaged.

Whole or absent: a file is written under a temporary name, flushed to the disk, and renamed. Checksums: a record, which is a
JSON object, ends with the SHA-256 of itself; manifests hold those of other files.
"""

import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
import safetensors
from PIL import Image

from b2diffurl.runtime.processes import started

R, T = TypeVar("R"), TypeVar("T")

if TYPE_CHECKING:  # importing torch takes seconds, and commands that only look at an experiment read no tensors
    from torch import Tensor

REMEMBERED: dict[tuple[str, Callable], tuple[tuple[int, ...], Any]] = {}  # of `remembered`
TEMPORARY = ".tmp"
# How the temporary name of a file ends: with the process that writes it. Twice if the file is a temporary one itself.
TEMPORARY_END = re.compile(r"((\.\d+)?\.tmp)+$")
MAX_PIXELS = 1 << 26  # of an image: 8192 x 8192. A file of a few kilobytes can hold a million times as much
SEAL = "content_sha256"  # last key of a record: SHA-256 of all bytes before it
SEALED = re.compile(rb',\s*"' + SEAL.encode() + rb'": "(.*?)"\s*}\s*', re.DOTALL)


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `data` under a temporary name of this process's own, then rename that to `path`.

    So of two processes that write one file at once, neither renames what the other has half written. `durable` waits until
    the disk has the data, so that it survives a crash of the machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    for left in leftovers(path.parent).get(path.name, ()):
        if not started(int(left.name.split(".")[-2])):
            left.unlink(missing_ok=True)
    try:
        with naming(path), create(temporary) as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()  # on a full disk it would take the room of the next file
        raise


@cache  # a folder of many images would take long to list before each of them
def leftovers(folder: Path) -> dict[str, list[Path]]:
    """The half-written files in a folder when this process first wrote there, by the name that they were to get."""
    found: dict[str, list[Path]] = {}
    for path in folder.glob(f"*{TEMPORARY}"):
        if match := re.fullmatch(r"(.+)\.\d+\.tmp", path.name, re.DOTALL):
            found.setdefault(match[1], []).append(path)
    return found


def create(path: Path) -> BinaryIO:
    """Open a new file for writing, in place of a file or link of that name. Never writes into what a link points to."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb")


def empty_folder(path: Path) -> Path:
    """Make a folder that is new and empty, in place of a folder or link of that name; returns it."""
    remove(path)
    path.mkdir(parents=True)
    return path


def remove(path: Path) -> None:
    """Delete a file, a folder with all that is in it, or a link, whose target stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError in the block. Python leaves it out when a write fails, as on a full disk."""
    try:
        yield
    except safetensors.SafetensorError as error:  # that library wraps an OSError into its own kind
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from None
        raise
    except OSError as error:
        if error.errno:
            error.filename = str(path)
        raise


def require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, or cannot be created. Called before work whose result would be lost."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "nothing can be written here", str(existing))


def finite(value: float) -> float | None:
    """The number, or None if it is NaN or infinite, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_record(path: Path, value: dict) -> None:
    """Write a JSON object with a checksum of itself as its last entry. `read_json` checks and removes that entry."""
    write_bytes(path, seal(json.dumps(value, indent=1, allow_nan=False), "\n ") + b"\n")


def seal(text: str, separator: str = " ") -> bytes:
    """The JSON object `text` as bytes, with its checksum added after `separator`."""
    body = text.removesuffix("}").rstrip().encode()
    end = separator.removesuffix(" ")
    return body + f',{separator}"{SEAL}": "{hashlib.sha256(body).hexdigest()}"{end}}}'.encode()


def parse_json(data: bytes | str) -> Any:
    """The JSON value in `data`; a ValueError for anything that is none, or that no computer can read whole."""
    try:
        return json.loads(data, parse_constant=parse_float, parse_float=parse_float)
    except RecursionError:
        raise ValueError("it has too many brackets within brackets") from None


def parse_float(text: str) -> float:
    """A number of a JSON file. Python would also take NaN and Infinity, and 1e999 as infinity."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is no number of JSON")
    return value


def open_sealed(data: bytes) -> Any:
    """The JSON value in `data`. A record's checksum is checked and removed; a ValueError says that it does not match."""
    value = parse_json(data)  # first: what is cut off is no JSON, and says so better than a checksum
    # From its end: to look for the checksum from the beginning would take longer than all the rest.
    comma = data.rfind(b",", 0, max(0, data.rfind(SEAL.encode())))
    if comma >= 0 and (match := SEALED.fullmatch(data, comma)):
        if hashlib.sha256(data[:comma]).hexdigest().encode() != match[1]:
            raise ValueError("its checksum does not match")
        del value[SEAL]
    return value


def write_json_lines(path: Path, rows: list[dict], *, sealed: bool = False) -> None:
    """Write one JSON object a line, each with a checksum of itself if `sealed`."""
    lines = [json.dumps(row, allow_nan=False) for row in rows]
    write_bytes(path, b"".join((seal(line) if sealed else line.encode()) + b"\n" for line in lines))


def write_image(path: Path, image: "Tensor") -> None:
    """Write one image uint8 [H,W,3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, format="png", compress_level=1)
    write_bytes(path, buffer.getvalue(), durable=False)  # the manifest's checksums tell if a crash of the machine lost it


def read_image(path: Path) -> "Tensor":
    """Read one image as uint8 [H,W,3]; a ValueError names a file that is not an image."""
    import torch

    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels")
            return torch.from_numpy(np.array(picture.convert("RGB")))
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from None


def is_whole_png(path: Path) -> bool:
    """Whether there is a PNG file with its last chunk, so that nothing was cut off. The pixels are not read."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        file.seek(-min(8, path.stat().st_size), os.SEEK_END)
        return file.read() == b"IEND\xaeB`\x82"


def read_json(path: Path) -> Any:
    """Read a JSON file; a ValueError names one that is not JSON, or a record whose checksum does not match."""
    with damage_named(path):
        return open_sealed(path.read_bytes())


def remembered(path: Path | str, use: Callable[[R], T], read: Callable[[Path | str], R]) -> T:
    """`use(read(path))`, remembered for the life of this process while the file stays the same. `use` is a function of a
    module; what it returns is shared by all who ask."""
    status = os.stat(path)
    same = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    found = REMEMBERED.get(key := (os.fspath(path), use))
    if found is None or found[0] != same:
        found = REMEMBERED[key] = (same, use(read(path)))
    return found[1]


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object, such as a model's config; a ValueError names one that holds anything else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object, which it must. Get it anew.")
    return content


def read_json_lines(path: Path) -> list[dict]:
    """Read a file of one JSON object a line; errors as of `read_json`."""
    with damage_named(path):
        return [open_sealed(line) for line in path.read_bytes().splitlines()]


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn an error of parsing in the block into a ValueError that names the file and says what to do."""
    try:
        yield
    except (ValueError, safetensors.SafetensorError) as error:  # errors of JSON and of Unicode are ValueErrors
        raise ValueError(f"{path} is damaged ({error}). Delete it and run the same command again.") from None


def write_tensors(path: Path, tensors: dict[str, "Tensor"], metadata: dict | None = None) -> None:
    """Write a safetensors file.

    `metadata` is stored as one JSON string under one key: safetensors writes several keys in an order that varies.
    """
    import safetensors.torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"b2diffurl": json.dumps(metadata or {}, sort_keys=True)}
    write_bytes(path, safetensors.torch.save(tensors, metadata=header))


def read_metadata(path: Path) -> dict:
    """The metadata given to `write_tensors`."""
    with damage_named(path), safetensors.safe_open(path, framework="pt") as file:
        return parse_json((file.metadata() or {}).get("b2diffurl", "{}"))


def read_tensors(path: Path) -> dict[str, "Tensor"]:
    """Read all tensors of a safetensors file; a ValueError names a file that is damaged or of another kind."""
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file ({error}).") from None


def tensors_sha256(tensors: dict[str, "Tensor"], metadata: dict) -> str:
    """SHA-256 of names, types, shapes and values of tensors, and of metadata.

    The file's own metadata can hold it, which it could not do with a checksum of the file.
    """
    import torch

    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def describe(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file, in the form that manifests hold."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """A checksum of a JSON value, 12 hex digits: for names that tell settings apart."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
