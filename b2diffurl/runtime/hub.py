"""Where a model's files are, a local path, the hub's cache, or the hub, asked once; and whether they are whole."""

import contextlib
import os
import pickle
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from b2diffurl.runtime import files

PROBE_TIMEOUT_SEC = 5
# What is downloaded of a model of transformers. In either form its weights are read as tensors alone; the second is for
# models that have not got the first.
MODEL_PARTS = ("*.json", "*.txt", "*.model", "*.jinja")
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")


def locate(
    name: str,
    *,
    patterns: Sequence[str],
    weights: Sequence[str] = (),
    missing: Callable[[Path], str] = lambda root: "",
    revision: str = "main",
) -> Path:
    """The local path of model `name`, downloaded (only files that match `patterns`) if it is not here yet.

    Of the patterns in `weights` one is enough; the first that the hub has is downloaded. What the cache has counts as here
    if it has every .safetensors of `patterns` and `missing` finds nothing amiss. Hub clients retry an unreachable hub for
    most of a minute, so it is probed once. A FileNotFoundError says what is missing and how to get it.
    """
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # False for a name too long to be one, too
        return path
    if name.startswith((".", "/", "~", "model/")) or name.count("/") != 1:
        raise FileNotFoundError(f"no model at {name}. Give a local path to an existing model, or a hub id (owner/name).")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def download(alternative: list[str], *, offline: bool) -> Path:
        wanted = [*patterns, *alternative]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=offline))

    alternatives = [[pattern] for pattern in weights] or [[]]
    for alternative in alternatives:
        required = [*(pattern for pattern in patterns if pattern.endswith(".safetensors")), *alternative]
        with contextlib.suppress(LocalEntryNotFoundError):
            path = download(alternative, offline=True)
            if all(any(path.glob(pattern)) for pattern in required) and not missing(path):
                return path
    if constants.is_offline_mode() or not reachable(constants.ENDPOINT):
        raise FileNotFoundError(
            f"{name} is not, or not whole, in the local cache and {constants.ENDPOINT} cannot be reached. "
            f"Where there is network, run: hf download {name} --local-dir DIR; then give DIR as the model."
        )
    try:
        for alternative in alternatives:
            path = download(alternative, offline=False)
            if all(any(path.glob(pattern)) for pattern in alternative):
                return path
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"the hub has no {name} (revision {revision}) for you: {error}") from None
    raise FileNotFoundError(f"{name} on the hub has none of the files {', '.join(weights)}")


def find_local(name: str, file: str, *, revision: str = "main") -> Path | None:
    """The local path of model `name`: its file, its directory, or its snapshot in the hub's cache if that has `file`.

    None if it is not on this machine; nothing is asked for.
    """
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found).parents[file.count("/")] if isinstance(found, str) else None


def reachable(url: str) -> bool:
    """Whether anything answers at `url` within PROBE_TIMEOUT_SEC, name look-up and every address included."""
    answered = threading.Event()

    def probe() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_TIMEOUT_SEC).close()
            answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except OSError:
            pass

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT_SEC)
    return answered.is_set()


def model_folder(model: str, *, tokenizer: bool = True) -> Path:
    """The directory of a model of transformers, by hub id or path; a FileNotFoundError says what is missing."""

    def missing(root: Path) -> str:
        return missing_part(root, tokenizer=tokenizer)

    root = locate(model, patterns=MODEL_PARTS, weights=MODEL_WEIGHTS, missing=missing)
    if part := missing(root):
        raise FileNotFoundError(f"{root} is no model directory: it lacks {part}.")
    return root


def missing_part(root: Path, *, tokenizer: bool) -> str:
    """What a directory lacks of a model of transformers, one that reads text if it has a `tokenizer`; "" if nothing."""
    if not (root / "config.json").is_file():
        return "config.json"
    # Without its files transformers would make a tokenizer up, of no words.
    if tokenizer and not any(any(root.glob(pattern)) for pattern in TOKENIZERS):
        return f"a tokenizer ({', '.join(TOKENIZERS)})"
    if not (weights := weight_files(root)):
        return " or ".join(MODEL_WEIGHTS)
    for index in root.glob(f"*{weights[0].suffix}.index.json"):
        shards = {*files.read_json(index)["weight_map"].values()} - {path.name for path in weights}
        if shards:
            return min(shards)
    return ""


def weight_files(root: Path) -> list[Path]:
    return next((found for pattern in MODEL_WEIGHTS if (found := sorted(root.glob(pattern)))), [])


def model_files(model: str, *, tokenizer: bool = True) -> list[Path]:
    """The files of a model of transformers that decide its output."""
    root = model_folder(model, tokenizer=tokenizer)
    return [*weight_files(root), *(path for pattern in MODEL_PARTS for path in sorted(root.glob(pattern)))]


def checksum(path: Path) -> str:
    """SHA-256 of a file. The hub's cache keeps large files under it, which saves reading them."""
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) else files.sha256(path)


def load_whole(kind: Any, root: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of transformers' class `kind`, for inference; a ValueError if its directory lacks weights of it, which would
    otherwise be random, or holds more than tensors."""
    try:
        model, info = kind.from_pretrained(root, dtype=dtype, output_loading_info=True, trust_remote_code=False)
    except pickle.UnpicklingError as error:  # of a .bin, of which only tensors are read
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights in {root} are damaged, or hold more than tensors: {reason}") from None
    if info["missing_keys"]:
        raise ValueError(f"{root} lacks weights of {type(model).__name__}, such as {min(info['missing_keys'])}.")
    return model.to(device).eval()
