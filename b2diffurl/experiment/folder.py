"""Which experiment and which checkpoint a name means.

An experiment (`find_experiment`) is named by its folder, which holds config.json, or by its folder's name in model/lora.

A checkpoint of an experiment (`resolve_checkpoint`) is named so:

    base                      the base model, without a LoRA
    last                      the last checkpoint of the newest trained stage
    stage<i>                  the last checkpoint of stage i
    stage<i>/checkpoint_<n>   stage<i>/checkpoints/checkpoint_<n> of the experiment
    <one of these three>/ema  the exponential average of that checkpoint's LoRA, if training kept one (train.ema)
    any other text            a path: a .safetensors file, a checkpoint_<n> folder, a folder of those (its last one), or a
                              folder with such a folder `checkpoints` (`find_lora`)

Results have the same names (`checkpoint_name`), but for `last`, which they call by its stage.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from b2diffurl.experiment.stage import AVERAGE, LORA_FILE, find_checkpoints, finished_stages
from b2diffurl.runtime.paths import RUN, user_path

EXPERIMENTS = Path("model/lora")  # where an experiment is looked for by its name
NAME_OF_AVERAGE = re.compile(rf"(last|stage\d+(/checkpoint_\d+)?)/{AVERAGE}")


def find_experiment(name: str, experiments: Path = EXPERIMENTS) -> Path:
    """The folder of an experiment, by folder or by its name in the folder `experiments`, of which an error lists all."""
    folder = Path(user_path(name))
    for root in (folder, experiments / name):  # a folder before a name
        if os.path.isfile(root / "config.json"):
            return root
    known = known_experiments(experiments)
    raise FileNotFoundError(f"no experiment {name!r}, nor in {folder.absolute()}. Give its folder, or its name. {known}")


def known_experiments(folder: Path) -> str:
    """A sentence that lists the experiments in a folder, for error messages."""
    names = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f"Experiments in {folder}: {', '.join(names) or 'none yet'}."


def short_names(roots: Sequence[Path]) -> dict[Path, str]:
    """What to call experiments beside each other: each by its name, or by its path if another has the same name."""
    names = [root.name for root in roots]
    return {root: root.name if names.count(root.name) == 1 else str(root) for root in roots}


def resolve_checkpoint(root: Path, name: str) -> Path | None:
    """The LoRA file of the checkpoint called `name` (the table above); None for `base`.

    If it lies in a finished stage, that stage's checkpoints are compared with its manifest: a ValueError names a damaged
    file. A FileNotFoundError lists the checkpoints that the experiment has.
    """
    if name == "base":
        return None
    trained = {f"stage{stage.index}": stage for stage in finished_stages(root, "train")}
    average = is_average(name)
    name = name.removesuffix(f"/{AVERAGE}") if average else name
    name = list(trained)[-1] if name == "last" and trained else name
    match = re.fullmatch(r"(stage\d+)(?:/(checkpoint_\d+))?", name)
    path = root / match[1] / "checkpoints" / (match[2] or "") if match else Path(user_path(name))
    # By path and not by name: a path, too, may lead into a finished stage.
    stage = trained.get(relative_to(root, path.resolve()).split("/")[0])
    if stage:
        stage.verify("train", "checkpoints")
    if name == "last" or (match and not find_checkpoints(path) and not (path / LORA_FILE).is_file()):
        choices = f"trained are {', '.join(trained)}" if trained else f"it has no trained stage; {RUN} makes some"
        siblings = [f"{match[1]}/{folder.name}" for folder in find_checkpoints(path.parent)] if match else []
        choices = f"there are {', '.join(siblings)}" if siblings else choices
        raise FileNotFoundError(f"{root} has no checkpoint {name!r}: {choices}. {known_experiments(root.parent)}")
    return find_average(find_lora(path)) if average else find_lora(path)


def find_average(lora: Path) -> Path:
    """The file of the average in the checkpoint of the LoRA file `lora`; a FileNotFoundError says that it has none."""
    path = lora.parent / AVERAGE / LORA_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{lora.parent} has no average of its LoRA. A run keeps one if it is begun with train.ema, such as "
            "--config.train.ema=0.95."
        )
    return path


def checkpoint_name(root: Path, lora: Path | None) -> str:
    """What results call a LoRA file (None: the base model).

    `base`; `stage<i>` for a stage's last checkpoint; `stage<i>/checkpoint_<n>` for its others; either with `/ema` for the
    average there; the path for other files.
    """
    if lora is None:
        return "base"
    match = re.fullmatch(rf"(stage\d+)/checkpoints/(checkpoint_\d+)(/{AVERAGE})?/[^/]+", relative_to(root, lora))
    if not match:
        return str(lora)
    last, average = find_lora(root / match[1]), match[3] or ""
    is_last = lora == (last.parent / AVERAGE / LORA_FILE if average else last)
    return (match[1] if is_last else f"{match[1]}/{match[2]}") + average


def find_lora(path: Path) -> Path:
    """The LoRA file that a path leads to: the file itself, a checkpoint folder's, or the last checkpoint's below a folder.

    A ValueError refuses a file that is not .safetensors; a FileNotFoundError says that there is no LoRA.
    """
    if os.path.isfile(path):  # not path.is_file(), which raises for a name that is too long
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is not a .safetensors file. Convert it first; pickled weights are never loaded.")
        return path
    if os.path.isfile(path / LORA_FILE):
        return path / LORA_FILE
    checkpoints = os.path.isdir(path) and (find_checkpoints(path) or find_checkpoints(path / "checkpoints"))
    if not checkpoints:
        raise FileNotFoundError(
            f"no LoRA at {path.absolute()}. Give a .safetensors file, a checkpoint_<n> folder or a folder of them."
        )
    return checkpoints[-1] / LORA_FILE


def relative_to(root: Path, path: Path) -> str:
    """`path` as text: relative to `root` if it lies in that folder, else unchanged. Links are followed first."""
    inside = path.resolve().is_relative_to(root.resolve())
    return str(path.resolve().relative_to(root.resolve()) if inside else path)


def stage_of(checkpoint: str) -> int | None:
    """The stage number in a checkpoint's name in results; None for `base` and for a path."""
    match = re.fullmatch(rf"stage(\d+)(/checkpoint_\d+)?(/{AVERAGE})?", checkpoint)
    return int(match[1]) if match else None


def is_average(checkpoint: str) -> bool:
    """Whether a checkpoint's name is that of an average."""
    return NAME_OF_AVERAGE.fullmatch(checkpoint) is not None


def in_words(checkpoint: str) -> str:
    """A checkpoint's name for people, who are told which one is an average: `stage7/ema (averaged LoRA)`."""
    return f"{checkpoint} (averaged LoRA)" if is_average(checkpoint) else checkpoint
