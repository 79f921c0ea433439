"""One stage on disk: where its files lie, which phases are finished, and the manifest that says so."""

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

from b2diffurl.runtime import files

PHASES = ("sample", "select", "train")
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Stage:
    """Stage `index` of the experiment in folder `root`."""

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
        """What numbers that are not finite came from. A phase that finishes deletes it: a mended run leaves what one that
        never failed does."""
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
        return find_checkpoints(self.folder / "checkpoints")

    # A phase's manifest is the last file it writes: manifest there = phase finished.

    def manifest_path(self, phase: str) -> Path:
        return self.folder / f"{phase}.json"

    def finished(self, phase: str) -> bool:
        path = self.manifest_path(phase)
        if path.is_dir():
            raise ValueError(
                f"{path} is a folder; it must be that phase's record. Move it away, then run run_{phase}.py again"
            )
        return path.is_file()

    def manifest(self, phase: str) -> dict:
        """What `phase` recorded; a ValueError if it has not finished."""
        if not self.finished(phase):
            raise ValueError(f"the {phase} phase of {self.folder} is not finished. Run run_{phase}.py first.")
        return files.read_json(self.manifest_path(phase))

    def write_manifest(self, phase: str, facts: dict, written: list[Path]) -> None:
        """Finish a phase: its facts, hardware and software, and size and checksum of each file `written`."""
        described = {str(path.relative_to(self.folder)): files.describe(path) for path in sorted(written)}
        machine = {"hardware": hardware(), "versions": versions()}
        common = {"phase": phase, "stage": self.index, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        delete_files(self.debug, "*.safetensors")
        files.write_record(self.manifest_path(phase), common | facts | machine | {"files": described})

    def verify(self, phase: str, *folders: str) -> None:
        """Compare a finished phase's files (only those in `folders`, if given) with its manifest; a ValueError names
        the first that differs."""
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
    """Delete a stage's samples/ or selected/, but for what is not ours in it."""
    delete_files(folder, "batch_*.safetensors")


def delete_files(folder: Path, pattern: str) -> None:
    """Delete a folder's files of these names, and the folder if nothing else is in it."""
    for path in folder.glob(pattern):
        path.unlink(missing_ok=True)  # another process may be at it
    with suppress(OSError):  # not empty, or a link to another disk
        folder.rmdir()


def finished_stages(root: Path, phase: str) -> list[Stage]:
    """The stages of the experiment in folder `root` that have finished `phase`, in order."""
    named = (re.fullmatch(r"stage(\d+)", path.parent.name) for path in root.glob(f"stage*/{phase}.json"))
    return [Stage(root, index) for index in sorted(int(match[1]) for match in named if match)]


def find_checkpoints(folder: Path) -> list[Path]:
    """Finished `checkpoint_<n>` folders below `folder`, in order of n."""
    found = [path for path in folder.glob("checkpoint_*") if re.fullmatch(r"checkpoint_\d+", path.name)]
    return sorted((path for path in found if (path / LORA_FILE).is_file()), key=lambda path: int(path.name.split("_")[1]))


def hardware() -> dict[str, str | int]:
    """What the work was done on."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    found: dict[str, str | int] = {"cpu": named[1] if named else platform.machine(), "cpu_cores": os.cpu_count() or 0}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")
    return {"python": platform.python_version(), "platform": sys.platform} | {
        package: metadata.version(package) for package in packages
    }
