"""One stage on disk: where its files lie, which phases are finished, and the manifests that say so.

Every file of a stage, below <experiment>/stage<i>/. `any` is whichever of the three phases; what has no entry in the last
column stays.

path                           phase   what it holds                                             when it is deleted
-----------------------------  ------  --------------------------------------------------------  ---------------------------
samples/batch_<n>.safetensors  sample  a sampling batch: states and log-probabilities of the     when select is finished,
                                       trained window, text conditions (trajectories.py)         unless keep.samples
images/<id>.png                sample  image <id> = group * branches + branch                    when train is finished, from
                                                                                                 keep.images on
prompts.json                   sample  list: the prompt of each image, by id
tree.png, tree.json            sample  the branch picture of the first group, if siblings share
                                       a prefix (branch_picture.py)
metrics/sample.jsonl           sample  one event: counts, and seconds of loading, sampling, …
sample.json                    sample  its manifest (see below)

scores_wanted.csv              select  reward `file` only: a table of images and prompts to fill
scores_given.csv               people  the same with scores; people or another program write it
scores.jsonl                   select  a line an image: reward, its parts, watched rewards
selection.json                 select  the images to train on: id, group, branch, score,
                                       advantage
selected/batch_<n>.safetensors select  copies of the selected trajectories (trajectories.py)     when train is finished,
                                                                                                 unless keep.samples
metrics/select.jsonl           select  one event: means and deviations of rewards, counts
select.json                    select  its manifest

checkpoints/checkpoint_<n>/    train   LoRA, optimizer, state (checkpoints.py); n = epoch /
                                       train.save_interval, rounded up
metrics/train.jsonl            train   an event an update: loss, gradient norm, log-ratios, …
train.json                     train   its manifest

debug/<name>.safetensors       any     what a NaN or an infinity came from (not_finite.py)       when the phase is finished
*.tmp                          any     half-written files of an interrupted phase                when the phase starts again

A phase's manifest <phase>.json is the last file that it writes: if it is there, the phase is finished. It holds the phase's
facts, seconds, hardware and versions, and size and SHA-256 of each file that the phase wrote.
"""

import os
import platform
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from b2diffurl.runtime import ambient, files

PHASES = ("sample", "select", "train")
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Stage:
    """Stage `index` of the experiment in folder `root`. Its paths are those of the table above."""

    root: Path
    index: int

    @property
    def folder(self) -> Path:
        return self.root / f"stage{self.index}"

    @property
    def samples(self) -> Path:
        return self.folder / "samples"

    @property
    def selected(self) -> Path:
        return self.folder / "selected"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.json"

    @property
    def scores(self) -> Path:
        return self.folder / "scores.jsonl"

    @property
    def wanted_scores(self) -> Path:
        return self.folder / "scores_wanted.csv"

    @property
    def given_scores(self) -> Path:
        return self.folder / "scores_given.csv"

    @property
    def selection(self) -> Path:
        return self.folder / "selection.json"

    @property
    def debug(self) -> Path:
        """Evidence of numbers that are not finite. A phase deletes it when it finishes, so that a mended run leaves the same
        files as one that never failed."""
        return self.folder / "debug"

    def batch(self, index: int) -> Path:
        return self.samples / f"batch_{index:05d}.safetensors"

    def selected_batch(self, index: int) -> Path:
        return self.selected / f"batch_{index:05d}.safetensors"

    def image(self, index: int) -> Path:
        return self.images / f"{index:05d}.png"

    def metrics(self, phase: str) -> Path:
        return self.folder / "metrics" / f"{phase}.jsonl"

    def checkpoint(self, number: int) -> Path:
        return self.folder / "checkpoints" / f"checkpoint_{number}"

    def checkpoints(self) -> list[Path]:
        """The checkpoint folders that there are, in order."""
        return find_checkpoints(self.folder / "checkpoints")

    def manifest_path(self, phase: str) -> Path:
        return self.folder / f"{phase}.json"

    def finished(self, phase: str) -> bool:
        """Whether the phase has written its manifest, which it does last."""
        path = self.manifest_path(phase)
        if path.is_dir():
            raise ValueError(  # else the phase would run again, and fail only when it writes the manifest
                f"{path} is a folder; it must be that phase's record. Move it away, then run run_{phase}.py again"
            )
        return path.is_file()

    def manifest(self, phase: str) -> dict:
        """The manifest of `phase`; a ValueError if the phase is not finished."""
        if not self.finished(phase):
            raise ValueError(f"the {phase} phase of {self.folder} is not finished. Run run_{phase}.py first.")
        return files.read_json(self.manifest_path(phase))

    def write_manifest(self, phase: str, facts: dict, written: list[Path]) -> None:
        """Finish a phase: record `facts`, hardware, versions, environment, and size and checksum of each file `written`."""
        described = {str(path.relative_to(self.folder)): files.describe(path) for path in sorted(written)}
        machine = {"hardware": hardware(), "versions": versions(), "environment": ambient.recorded()}
        common = {"phase": phase, "stage": self.index, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        delete_files(self.debug, "*.safetensors")
        files.write_record(self.manifest_path(phase), common | facts | machine | {"files": described})

    def verify(self, phase: str, *folders: str) -> None:
        """Compare a finished phase's files with its manifest; a ValueError names the first that is missing or differs.

        `folders` limits this to files in those folders of the stage, or of those names: "samples", "prompts.json".
        """
        # By checksum and not by time: copying an experiment changes the times of its files.
        for name, expected in self.manifest(phase)["files"].items():
            path = self.folder / name
            if folders and Path(name).parts[0] not in folders:
                continue
            if not path.is_file():
                raise ValueError(f"{path} is missing. Delete {self.manifest_path(phase)} and run run_{phase}.py again.")
            if files.describe(path) != expected:
                raise ValueError(
                    f"{path} is not what the {phase} phase wrote (checksum). "
                    f"Delete it and {self.manifest_path(phase)}, then run run_{phase}.py again."
                )


def delete_batches(folder: Path) -> None:
    """Delete the batches in a stage's samples/ or selected/, and the folder; files that others put there stay."""
    delete_files(folder, "batch_*.safetensors")


def delete_files(folder: Path, pattern: str) -> None:
    """Delete a folder's files that match `pattern`, and the folder if it is empty then."""
    for path in folder.glob(pattern):
        path.unlink(missing_ok=True)  # another process may have deleted it in this moment
    with suppress(OSError):  # not empty, or a link to a folder on another disk
        folder.rmdir()


def finished_stages(root: Path, phase: str) -> list[Stage]:
    """The stages of the experiment in folder `root` that have finished `phase`, in order."""
    matches = (re.fullmatch(r"stage(\d+)", path.parent.name) for path in root.glob(f"stage*/{phase}.json"))
    return [Stage(root, index) for index in sorted(int(match[1]) for match in matches if match)]


def find_checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint_<n>` folders in `folder` that hold a LoRA, in order of n."""
    # The pattern leaves out checkpoint_<n>.tmp, which an interrupted write may have left.
    named = [path for path in folder.glob("checkpoint_*") if re.fullmatch(r"checkpoint_\d+", path.name)]
    return sorted((path for path in named if (path / LORA_FILE).is_file()), key=lambda path: int(path.name.split("_")[1]))


def hardware() -> dict[str, str | int]:
    """Names of CPU and GPU, and the number of CPU cores, for manifests."""
    cpuinfo = Path("/proc/cpuinfo")  # of Linux; platform.processor() is empty there
    match = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    cpu: dict[str, str | int] = {"cpu": match[1] if match else platform.machine(), "cpu_cores": os.cpu_count() or 0}
    return cpu | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a run's numbers."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")
    return {"python": platform.python_version(), "platform": sys.platform} | {
        package: metadata.version(package) for package in packages
    }
