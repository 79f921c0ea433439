"""What people call things, and the files that are meant: experiments, checkpoints, LoRAs."""

import os
import re
from pathlib import Path

from b2diffurl.experiment.stage import LORA_FILE, find_checkpoints, finished_stages

EXPERIMENTS = Path("model/lora")  # where an experiment is looked for by its name alone


def find_experiment(name: str) -> Path:
    """The folder of the experiment meant by a folder, or by a name; a FileNotFoundError lists those that there are."""
    for root in (Path(os.path.expanduser(name)), EXPERIMENTS / name):
        if (root / "config.json").is_file():
            return root
    raise FileNotFoundError(f"no experiment {name!r}. Give its folder, or its name. {known_experiments(EXPERIMENTS)}")


def known_experiments(folder: Path) -> str:
    """A sentence that names the experiments in a folder."""
    names = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f"Experiments in {folder}: {', '.join(names) or 'none yet'}."


def resolve_checkpoint(root: Path, name: str) -> Path | None:
    """The LoRA file that a checkpoint's name means, of a finished stage compared with its manifest; None for `base`.

    `last` is the newest stage's, `stage<i>` that of stage i, `stage<i>/checkpoint_<n>` the one that is called so in results,
    anything else a path; errors say what there is instead.
    """
    if name == "base":
        return None
    trained = {f"stage{stage.index}": stage for stage in finished_stages(root, "train")}
    name = list(trained)[-1] if name == "last" and trained else name
    named = re.fullmatch(r"(stage\d+)(?:/(checkpoint_\d+))?", name)
    path = root / named[1] / "checkpoints" / (named[2] or "") if named else Path(os.path.expanduser(name))
    of_stage = trained.get(relative_to(root, path.resolve()).split("/")[0])
    if of_stage:
        of_stage.verify("train", "checkpoints")
    if name == "last" or (named and not find_checkpoints(path) and not (path / LORA_FILE).is_file()):
        there = f"trained are {', '.join(trained)}" if trained else "it has no trained stage; run run_process.sh first"
        kept = [f"{named[1]}/{folder.name}" for folder in find_checkpoints(path.parent)] if named else []
        there = f"there are {', '.join(kept)}" if kept else there
        raise FileNotFoundError(f"{root} has no checkpoint {name!r}: {there}. {known_experiments(root.parent)}")
    return find_lora(path)


def checkpoint_name(root: Path, lora: Path | None) -> str:
    """What a LoRA file is called in results: `base`, `stage<i>`, `stage<i>/checkpoint_<n>` if not its last, or its path."""
    if lora is None:
        return "base"
    match = re.fullmatch(r"(stage\d+)/checkpoints/(checkpoint_\d+)/[^/]+", relative_to(root, lora))
    if not match:
        return str(lora)
    return match[1] if find_lora(root / match[1]) == lora else f"{match[1]}/{match[2]}"


def find_lora(path: Path) -> Path:
    """The LoRA file meant by a path: the file itself, a checkpoint folder, or the latest of a folder of checkpoints."""
    if os.path.isfile(path):
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is not a .safetensors file. Convert it first; pickled weights are never loaded.")
        return path
    if os.path.isfile(path / LORA_FILE):
        return path / LORA_FILE
    found = os.path.isdir(path) and (find_checkpoints(path) or find_checkpoints(path / "checkpoints"))
    if not found:
        raise FileNotFoundError(f"no LoRA at {path}. Give a .safetensors file, a checkpoint_<n> folder or a folder of them.")
    return found[-1] / LORA_FILE


def relative_to(root: Path, path: Path) -> str:
    """`path` from `root` on if it lies in it, else as it is."""
    inside = path.resolve().is_relative_to(root.resolve())
    return str(path.resolve().relative_to(root.resolve()) if inside else path)


def stage_of(checkpoint: str) -> int | None:
    """The i of a checkpoint that is called `stage<i>` or `stage<i>/checkpoint_<n>` in results."""
    match = re.fullmatch(r"stage(\d+)(/checkpoint_\d+)?", checkpoint)
    return int(match[1]) if match else None
