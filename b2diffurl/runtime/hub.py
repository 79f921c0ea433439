"""A model's files: at a local path, in the cache of the Hugging Face hub, or on the hub; and whether they are whole."""

import contextlib
import functools
import os
import pickle
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from b2diffurl.runtime import files
from b2diffurl.runtime.paths import is_hub_id, resource, user_directory

PROBE_TIMEOUT_SEC = 5
# Files of a model of transformers that are downloaded. Weights are safetensors, or a .bin file for the models that have
# nothing else; that is a pickle, of which `load_whole` reads tensors only.
MODEL_PARTS = ("*.json", "*.txt", "*.model", "*.jinja")
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
# Any of these is a tokenizer's vocabulary; files that only work together stand together.
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("*.model",))


class MissingModelError(FileNotFoundError):
    """A model that is not on this machine, or not whole; `setting` names it if that is known (`naming_settings`)."""

    def __init__(self, model: str, said: str, setting: str = ""):
        super().__init__(said)
        self.model, self.said, self.setting = model, said, setting

    def __str__(self) -> str:
        if not self.setting:
            return self.said
        return f"{self.setting}: {self.said.replace('give DIR as the model', f'give --config.{self.setting}=DIR')}"


class DownloadNeededError(MissingModelError):
    """Raised instead of a download where files are only looked for (`only_looking`); the hub would give the model."""


@dataclass
class Looking:
    """What was found while nothing may be downloaded."""

    hub_answers: bool | None = None  # None: the hub has not been asked yet
    num_bytes: dict[str, int] = field(default_factory=dict)  # of the files that would be downloaded, by model


LOOKING: ContextVar[Looking | None] = ContextVar("LOOKING", default=None)


@contextlib.contextmanager
def only_looking() -> Iterator[Looking]:
    """In the block `locate` downloads nothing: it asks the hub for sizes, and raises a DownloadNeededError."""
    looking = Looking()
    token = LOOKING.set(looking)
    try:
        yield looking
    finally:
        LOOKING.reset(token)


@contextlib.contextmanager
def naming_settings(settings: Mapping[str, Any]) -> Iterator[None]:
    """In the block an error about a model that is missing says which setting asks for it, {setting: model}."""
    try:
        yield
    except MissingModelError as error:
        error.setting = error.setting or next((key for key, name in settings.items() if name == error.model), "")
        raise


def locate(
    name: str,
    *,
    patterns: Sequence[str],
    weights: Sequence[str] = (),
    missing: Callable[[Path], str] = lambda root: "",
    revision: str = "main",
) -> Path:
    """The local path of model `name`, a path or a hub id; files that are not here yet are downloaded.

    patterns  the files to download
    weights   further patterns, of which one is enough; the first one that the hub has is downloaded
    missing   names a part that a cached model lacks, "" if none: a model with a missing part is downloaded

    A model counts as cached if `missing` names nothing and the cache has one of `weights`. A MissingModelError, which is a
    FileNotFoundError, says what is missing and how to get it.
    """
    require_path_or_id(name)
    path = resource(name)
    if os.path.exists(path):
        return path
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    def download(alternative: list[str], *, offline: bool) -> Path:
        wanted = [*patterns, *alternative]
        if looking and not offline:
            look_on_hub(looking, name, revision, wanted, alternative)
            return Path(name)  # the hub has no such weights
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=offline))

    looking = LOOKING.get()
    alternatives = [[pattern] for pattern in weights] or [[]]
    # The cache first, without the network: a run must not depend on the hub for files that are here.
    for alternative in alternatives:
        with contextlib.suppress(LocalEntryNotFoundError):
            path = download(alternative, offline=True)
            if all(any(path.glob(pattern)) for pattern in alternative) and not missing(path):
                return path
    # Hub clients retry an unreachable hub for most of a minute, so one probe comes first.
    require_hub(name, looking)
    try:
        for alternative in alternatives:
            path = download(alternative, offline=False)
            if all(any(path.glob(pattern)) for pattern in alternative):
                return path
    except GatedRepoError:
        raise MissingModelError(
            name,
            f"the hub gives {name} only to those who have accepted its license: do so on {constants.ENDPOINT}/{name}, then "
            "run: hf auth login",
        ) from None
    except HfHubHTTPError as error:
        raise MissingModelError(name, f"the hub has no {name} (revision {revision}) for you: {error}") from None
    raise MissingModelError(name, f"{name} on the hub has none of the files {', '.join(weights)}")


def look_on_hub(looking: Looking, name: str, revision: str, wanted: Sequence[str], needed: Sequence[str]) -> None:
    """Raise a DownloadNeededError if the hub has a file for each of the patterns `needed`; note the size of all `wanted`."""
    from huggingface_hub import constants, snapshot_download

    listed = snapshot_download(name, revision=revision, allow_patterns=wanted, dry_run=True)
    if all(any(Path(file.filename).match(pattern) for file in listed) for pattern in needed):
        looking.num_bytes[name] = sum(file.file_size for file in listed if file.will_download)
        raise DownloadNeededError(name, f"{name} would be downloaded from {constants.ENDPOINT}")


def require_hub(name: str, looking: Looking | None) -> None:
    """Raise a MissingModelError if the hub, which has model `name`, cannot be asked."""
    from huggingface_hub import constants

    if not hub_answers(looking):
        raise MissingModelError(
            name,
            f"{name} is not, or not whole, in the local cache, {constants.ENDPOINT} cannot be reached, and there is no "
            f"{user_directory() / name}. Where there is network, run: hf download {name} --local-dir DIR; then give DIR as "
            "the model.",
        )


def hub_answers(looking: Looking | None) -> bool:
    """Whether the hub may and can be asked. While files are only looked for, it is tried once."""
    from huggingface_hub import constants

    if looking and looking.hub_answers is not None:
        return looking.hub_answers
    answers = not constants.is_offline_mode() and reachable(constants.ENDPOINT)
    if looking:
        looking.hub_answers = answers
    return answers


def require_path_or_id(name: str) -> None:
    """Refuse a model's name that is no hub id, and a path at which there is nothing."""
    path = resource(name)
    if not is_hub_id(name) and not os.path.exists(path):  # not path.exists(), which raises for a name that is too long
        raise MissingModelError(
            name, f"no model at {path.absolute()}. Give a local path to an existing model, or a hub id (owner/name)."
        )


def find_local(name: str, file: str, *, revision: str = "main") -> Path | None:
    """The local path of model `name`: its file, its directory, or its snapshot in the hub's cache, if that holds `file`.

    None if the model is not on this machine. The network is not used.
    """
    path = resource(name)
    if os.path.exists(path):
        return path
    if not is_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, file, revision=revision)  # None, or a mark that the hub has no such file
    return Path(cached).parents[file.count("/")] if isinstance(cached, str) else None


def reachable(url: str) -> bool:
    """Whether anything answers at `url` within PROBE_TIMEOUT_SEC in all."""
    answered = threading.Event()

    def probe() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_TIMEOUT_SEC).close()
            answered.set()
        except urllib.error.HTTPError:  # an error of the server is an answer
            answered.set()
        except OSError:
            pass

    # In a thread: urlopen's timeout counts for each address anew, and not for the look-up of the name.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT_SEC)
    return answered.is_set()


def model_folder(model: str, *, tokenizer: bool = True) -> Path:
    """The directory of a model of transformers, by hub id or path; a FileNotFoundError names a part that it lacks."""

    def missing(root: Path) -> str:
        return missing_part(root, tokenizer=tokenizer)

    root = locate(model, patterns=MODEL_PARTS, weights=MODEL_WEIGHTS, missing=missing)
    if part := missing(root):
        raise MissingModelError(model, f"{root} is no model directory: it lacks {part}. Get its files anew.")
    return root


def missing_part(root: Path, *, tokenizer: bool) -> str:
    """A part of a model of transformers that a directory lacks, for an error message; "" if it is whole.

    `tokenizer` says whether the model reads text, and so needs one.
    """
    if not (root / "config.json").is_file():
        return "config.json"
    if tokenizer and (lacks := missing_tokenizer(root)):
        return lacks
    if not (weights := weight_files(root)):
        return " or ".join(MODEL_WEIGHTS)
    for index in root.glob(f"*{weights[0].suffix}.index.json"):
        shards = {*files.read_json(index)["weight_map"].values()} - {path.name for path in weights}
        if shards:
            return min(shards)
    return ""


def missing_tokenizer(root: Path) -> str:
    """The files of a tokenizer, for an error message, if a directory has none; else "".

    Without them transformers would make up a tokenizer with an empty vocabulary.
    """
    if any(all(any(root.glob(pattern)) for pattern in together) for together in TOKENIZERS):
        return ""
    return f"a tokenizer ({', or '.join(' and '.join(together) for together in TOKENIZERS)})"


def weight_files(root: Path) -> list[Path]:
    """The weights in a directory: its safetensors files or, if it has none, its .bin files."""
    return next((found for pattern in MODEL_WEIGHTS if (found := sorted(root.glob(pattern)))), [])


def model_files(model: str, *, tokenizer: bool = True) -> list[Path]:
    """The files of a model of transformers that decide its output: weights, configs, tokenizer."""
    root = model_folder(model, tokenizer=tokenizer)
    return [*weight_files(root), *(path for pattern in MODEL_PARTS for path in sorted(root.glob(pattern)))]


def checksum(path: Path) -> str:
    """SHA-256 of a file. In the hub's cache large files have it as their name, which saves reading gigabytes."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    status = blob.stat()
    return _checksum(blob, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=256)
def _checksum(path: Path, *_status: int) -> str:
    """SHA-256 of a file, read once in a process while its size, its time and its place on the disk stay."""
    return files.sha256(path)


def load_whole(kind: Any, root: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a model of class `kind` of transformers for inference.

    A ValueError says that the directory lacks some of the weights or has them in another shape, which transformers would
    fill with random numbers, or that they hold more than tensors.
    """
    try:
        # ignore_mismatched_sizes: what has another shape is named below; transformers would say that something has.
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
        model, info = kind.from_pretrained(root, dtype=dtype, **options)
    except pickle.UnpicklingError as error:  # a .bin file is a pickle, and torch refuses anything in it but tensors
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights in {root} are damaged, or hold more than tensors: {reason}") from None
    require_no_holes(root, model, info)
    return model.to(device).eval()


def require_no_holes(root: Path, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a model that was loaded with `info` (`output_loading_info`) if some weights were not in its files.

    The libraries fill such weights with random numbers.
    """
    # The second lists tensors of another shape, as (name, shape, shape).
    for fault, names in (("lacks", info["missing_keys"]), ("has misshapen", [name for name, *_ in info["mismatched_keys"]])):
        if names:
            raise ValueError(f"{root} {fault} weights of {type(model).__name__}, such as {min(names)}.")
