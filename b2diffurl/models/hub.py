"""Where a model's files are: a local path, the hub's cache, or the hub, asked once."""

import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

PROBE_TIMEOUT_SEC = 5


def locate(name: str, *, patterns: Sequence[str], weights: Sequence[str] = (), revision: str = "main") -> Path:
    """The local path of model `name`, downloaded (only files that match `patterns`) if it is not here yet.

    Of the patterns in `weights` one is enough; the first that the hub has is downloaded. Hub clients retry an unreachable
    hub for most of a minute, so it is probed once. A FileNotFoundError says what is missing and how to get it.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith((".", "/", "~", "model/")) or name.count("/") != 1:
        raise FileNotFoundError(f"no model at {name}. Give a local path to an existing model, or a hub id (owner/name).")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    required = [pattern for pattern in patterns if pattern.endswith(".safetensors")]

    def download(*alternative: str, offline: bool = False) -> Path | None:
        """The folder with all that is wanted, of the weights those of `alternative`; None if the hub has not got them."""
        wanted = [*patterns, *alternative]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=offline))
        found = all(any(folder.glob(pattern)) for pattern in (*required, *alternative))
        return folder if found or not (offline or alternative) else None

    alternatives = [[pattern] for pattern in weights] or [[]]
    try:
        folders = (download(*alternative, offline=True) for alternative in alternatives)
        if found := next(filter(None, folders), None):
            return found
    except LocalEntryNotFoundError:
        pass
    if constants.is_offline_mode() or not reachable(constants.ENDPOINT):
        raise FileNotFoundError(
            f"{name} is not in the local cache and {constants.ENDPOINT} cannot be reached. "
            f"Where there is network, run: hf download {name} --local-dir DIR; then give DIR as the model."
        )
    try:
        found = next(filter(None, (download(*alternative) for alternative in alternatives)), None)
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"the hub has no {name} (revision {revision}) for you: {error}") from None
    if found is None:
        raise FileNotFoundError(f"{name} on the hub has none of the files {', '.join(weights)}")
    return found


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
