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
scored/<reward>_<id>.json      sample, a batch that a reward behind a server has scored          when select is finished
                               select  (scored_batches.py); id = its first image's
labels.json                    people  the answers that they gave on the page of b2diffurl.label
scores_given.csv               people  the same table with scores; that page, people or another
                                       program write it
scores.jsonl                   select  a line an image: reward, its parts, watched rewards
selection.json                 select  the images to train on: id, group, branch, score,
                                       advantage (in a tree a list, one for each edge)
selected/batch_<n>.safetensors select  copies of the selected trajectories (trajectories.py)     when train is finished,
                                                                                                 unless keep.samples
metrics/select.jsonl           select  one event: means and deviations of rewards, counts
select.json                    select  its manifest

checkpoints/checkpoint_<n>/    train   LoRA, its average, optimizer, state
                                       (checkpoints.py); n = epoch / train.save_interval,
                                       rounded up
metrics/train.jsonl            train   an event an update: loss, gradient norm, log-ratios, …
train.json                     train   its manifest

run.lock                       people  the page that is at work, as lock.py has it               when it ends

debug/<name>.safetensors       any     what a NaN or an infinity came from (not_finite.py)       when the phase is finished
<any of these>.tmp,            any     half-written files and folders of an interrupted phase    when the phase starts again
<any of these>.<process>.tmp

Only files and folders of these names are ever deleted; whatever else lies there is the user's.

A phase's manifest <phase>.json is the last file that it writes: if it is there, the phase is finished. It holds the phase's
facts, seconds, hardware and versions, and size and SHA-256 of each file that the phase wrote.
"""

import os
import platform
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

from b2diffurl.algorithm.window import Window
from b2diffurl.runtime import ambient, files
from b2diffurl.runtime.logs import logger

PHASES = ("sample", "select", "train")
READ_AT_ONCE = 200  # manifests that a ReadOnce remembers
# What later stages, forecasts and reports take from the manifest of a stage; of its settings the number of steps.
NOTED = (
    *("stage", "window", "num_trained_steps", "num_images", "num_groups", "num_flat_groups", "num_twin_groups"),
    *("reward_mean", "reward_std", "figures", "warnings", "seconds"),
)
HEAD_BYTES = 1 << 13  # of a manifest, that are read at a time to find the end of its own entries …
END_BYTES = 100  # of a manifest, with its checksum
FILES = b',\n "files": {'  # … where the checksums of its files begin; one space: it is an entry of the manifest itself
STAGE = re.compile(r"stage(0|[1-9]\d*)")  # the name of a stage's folder
LORA_FILE = "pytorch_lora_weights.safetensors"
AVERAGE = "ema"  # the folder in a checkpoint that holds the exponential average of its LoRA
# The names in a stage's folder that the package writes: those of the table above.
OURS = re.compile(
    r"((samples|selected)/batch_\d+|debug/\w+)\.safetensors|images/\d+\.png|tree\.(png|json)|checkpoints/checkpoint_\d+"
    r"|(metrics/)?(sample|select|train)\.jsonl?|(prompts|selection|scores_of_process_\d+)\.json|scores\.jsonl"
    r"|scores_wanted\.csv|labels\.json|scored/\w+_\d+\.json"
)


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
    def scored(self) -> Path:
        return self.folder / "scored"

    @property
    def wanted_scores(self) -> Path:
        return self.folder / "scores_wanted.csv"

    @property
    def given_scores(self) -> Path:
        return self.folder / "scores_given.csv"

    @property
    def labels(self) -> Path:
        return self.folder / "labels.json"

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

    def scored_batch(self, reward: str, start: int) -> Path:
        return self.scored / f"{reward}_{start:05d}.json"

    def selected_batch(self, index: int) -> Path:
        return self.selected / f"batch_{index:05d}.safetensors"

    def image(self, index: int) -> Path:
        return self.images / f"{index:05d}.png"

    def metrics(self, phase: str) -> Path:
        return self.folder / "metrics" / f"{phase}.jsonl"

    def checkpoint(self, number: int) -> Path:
        return self.folder / "checkpoints" / f"checkpoint_{number}"

    def ours(self, folder: Path) -> list[Path]:
        """What the package wrote in one of the stage's folders."""
        return [path for path in folder.glob("*") if OURS.fullmatch(path.relative_to(self.folder).as_posix())]

    def delete_ours(self, folder: Path) -> None:
        """Delete what the package wrote in one of the stage's folders, and the folder if it is empty then."""
        for path in self.ours(folder):
            path.unlink(missing_ok=True)  # another process may have deleted it in this moment
        with suppress(OSError):  # not empty, or a link to a folder on another disk
            folder.rmdir()

    def remove_temporaries(self) -> None:
        """Delete the half-written files and folders that an interrupted phase has left, and nothing else."""
        for path in sorted(self.folder.rglob(f"*{files.TEMPORARY}")):  # sorted: the walk is over before anything is deleted
            if OURS.fullmatch(files.TEMPORARY_END.sub("", path.relative_to(self.folder).as_posix())):
                files.remove(path)

    def checkpoints(self) -> list[Path]:
        """The checkpoint folders that there are, in order."""
        return find_checkpoints(self.folder / "checkpoints")

    def manifest_path(self, phase: str) -> Path:
        return self.folder / f"{phase}.json"

    def finished(self, phase: str) -> bool:
        """Whether the phase has written its manifest, which it does last."""
        path = f"{self.root}/stage{self.index}/{phase}.json"  # no Path, which takes several times as long to make
        if not os.path.lexists(path):
            return False
        if (other := stage_in(path)) not in (None, self.index):
            raise ValueError(
                f"{path} is the record of stage {other}: {self.folder} is a copy of it. Move {self.folder} elsewhere, out "
                "of the experiment."
            )
        if os.path.isdir(path):
            raise ValueError(  # else the phase would run again, and fail only when it writes the manifest
                f"{path} is a folder; it must be that phase's record. Move it away, then run run_{phase}.py again"
            )
        return os.path.isfile(path)

    def manifest(self, phase: str) -> dict:
        """The manifest of `phase`; a ValueError if the phase is not finished."""
        if not self.finished(phase):
            raise ValueError(f"the {phase} phase of {self.folder} is not finished. Run run_{phase}.py first.")
        return files.read_json(self.manifest_path(phase))

    def noted(self, phase: str) -> dict:
        """The entries NOTED of the manifest of a phase that is finished; do not change them.

        For looking at all stages of a long experiment: the checksums of a stage's files are not read, and what was read is
        remembered while the file stays the same. The manifest's own checksum is not compared, as `manifest` does.
        """
        return files.remembered(self.manifest_path(phase), noted_in, lambda _: self.head(phase))

    def head(self, phase: str) -> dict:
        """The manifest's own entries, which come before `files`. What is not as `write_manifest` left it is read whole."""
        with suppress(OSError, ValueError), self.manifest_path(phase).open("rb") as file:
            read = b""
            while block := file.read(HEAD_BYTES):
                read += block
                own, found, _ = read.partition(FILES)
                if found:
                    file.seek(-END_BYTES, os.SEEK_END)  # a manifest that was cut off has lost its checksum
                    if files.SEAL.encode() in file.read():
                        return files.parse_json(own + b"}")
                    break
        if not isinstance(manifest := self.manifest(phase), dict):
            raise ValueError(f"{self.manifest_path(phase)} is damaged: it holds no JSON object. Get it anew.")
        return {key: value for key, value in manifest.items() if key != "files"}

    def loras(self) -> dict[str, str]:
        """{path in the stage's folder: SHA-256} of every LoRA that its training has written."""
        return files.remembered(self.manifest_path("train"), loras_in, lambda _: self.manifest("train"))

    def sampled_window(self, num_steps: int) -> Window | None:
        """The trained window that the stage was sampled with; None if it is not sampled yet.

        Earlier versions recorded only S: they trained the last S of `num_steps`.
        """
        return window_in(self.manifest("sample"), num_steps) if self.finished("sample") else None

    def write_manifest(self, phase: str, facts: dict, written: list[Path]) -> None:
        """Finish a phase: record `facts`, hardware, versions, environment, and size and checksum of each file `written`."""
        described = {str(path.relative_to(self.folder)): files.describe(path) for path in sorted(written)}
        machine = {"hardware": hardware(), "versions": versions(), "environment": ambient.recorded()}
        common = {"phase": phase, "stage": self.index, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self.delete_ours(self.debug)
        files.write_record(self.manifest_path(phase), common | facts | machine | {"files": described})

    def verify(self, phase: str, *folders: str, by_size: bool = False) -> None:
        """Compare a finished phase's files with its manifest; a ValueError names the first that is missing or differs.

        `folders` limits this to files in those folders of the stage, or of those names: "samples", "prompts.json".
        `by_size` compares sizes and reads no file: enough for what is not used any more.
        """
        # By checksum and not by time: copying an experiment changes the times of its files.
        for name, expected in self.manifest(phase)["files"].items():
            path = self.folder / name
            if folders and Path(name).parts[0] not in folders:
                continue
            if not path.is_file():
                raise ValueError(f"{path} is missing. Delete {self.manifest_path(phase)} and run run_{phase}.py again.")
            same = path.stat().st_size == expected["bytes"] if by_size else files.describe(path) == expected
            if not same:
                raise ValueError(
                    f"{path} is not what the {phase} phase wrote ({'size' if by_size else 'checksum'}). "
                    f"Delete it and {self.manifest_path(phase)}, then run run_{phase}.py again."
                )


@dataclass(frozen=True)
class ReadOnce(Stage):
    """A stage that remembers the manifests it has read, together with those that `replace` makes of it.

    For looking through many finished stages, each of which asks for the manifests of its neighbours.
    """

    manifests: dict[tuple[int, str], dict] = field(default_factory=dict, compare=False)

    def manifest(self, phase: str) -> dict:
        key = (self.index, phase)
        if key not in self.manifests:
            if len(self.manifests) >= READ_AT_ONCE:
                del self.manifests[next(iter(self.manifests))]  # the oldest
            self.manifests[key] = super().manifest(phase)
        return self.manifests[key]


def noted_in(manifest: dict) -> dict:
    """The entries of a manifest that `Stage.noted` has."""
    steps = {key: value for key, value in manifest.get("settings", {}).items() if key == "sample.num_steps"}
    return {key: value for key, value in manifest.items() if key in NOTED} | ({"settings": steps} if steps else {})


def window_in(sampled: dict, num_steps: int) -> Window:
    """The trained window by a sample manifest. Earlier versions recorded S alone: the last S of `num_steps`, or of the
    number that the stage was sampled with if they recorded that."""
    if "window" in sampled:
        return Window(*sampled["window"])
    return Window.last(sampled["num_trained_steps"], sampled.get("settings", {}).get("sample.num_steps", num_steps))


def loras_in(trained: dict) -> dict[str, str]:
    """{path in the stage's folder: SHA-256} of every LoRA in a train manifest."""
    return {name: entry["sha256"] for name, entry in trained["files"].items() if name.endswith(LORA_FILE)}


def stage_in(manifest: Path | str) -> int | None:
    """The number of the stage that a manifest is of; None if there is no such file, or it does not say."""
    return files.remembered(manifest, number_in, read_beginning) if os.path.isfile(manifest) else None


def read_beginning(manifest: Path | str) -> bytes:
    with open(manifest, "rb") as file:
        return file.read(200)


def number_in(beginning: bytes) -> int | None:
    """The number of the stage: a manifest's second entry, so the checksums of files need not be read."""
    match = re.search(rb'"stage": (\d+)', beginning)
    return int(match[1]) if match else None


def finished_stages(root: Path, phase: str) -> list[Stage]:
    """The stages of the experiment in folder `root` that have finished `phase`, in order.

    A folder of another number than its manifest has is somebody's copy: it is left out, and the log names it.
    """
    found = []
    for name in os.listdir(root) if os.path.isdir(root) else ():
        path = f"{root}/{name}/{phase}.json"  # no Path: see Stage.finished
        if not (match := STAGE.fullmatch(name)) or not os.path.lexists(path):
            continue
        if stage_in(path) in (None, int(match[1])):
            found.append(int(match[1]))
        else:
            warn_of_copy(Path(path))
    return [Stage(root, index) for index in sorted(found)]


@cache
def warn_of_copy(manifest: Path) -> None:
    """Say once that a stage's folder is left out."""
    message = "%s is left out: it is a copy of stage %d. Move it elsewhere, out of the experiment."
    logger.warning(message, manifest.parent, stage_in(manifest))


def find_checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint_<n>` folders in `folder` that hold a LoRA, in order of n; of a finished stage those that it wrote."""
    # The pattern leaves out checkpoint_<n>.tmp, which an interrupted write may have left, and checkpoint_01.
    named = [path for path in folder.glob("checkpoint_*") if re.fullmatch(r"checkpoint_(0|[1-9]\d*)", path.name)]
    manifest = folder.parent / "train.json"
    if folder.name == "checkpoints" and STAGE.fullmatch(folder.parent.name) and manifest.is_file():
        written = {Path(name).parts[-2] for name in files.read_json(manifest)["files"] if name.endswith(LORA_FILE)}
        named = [path for path in named if path.name in written]
    return sorted((path for path in named if (path / LORA_FILE).is_file()), key=lambda path: int(path.name.split("_")[1]))


def hardware() -> dict[str, str | int]:
    """Names of CPU and GPU, and the number of CPU cores, for manifests."""
    import torch

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
