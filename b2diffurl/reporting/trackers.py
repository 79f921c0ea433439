"""An experiment's curves and images in wandb and TensorBoard, one run for each experiment.

The experiment's files are the truth, and a tracker is a view of them. Each call of `track` builds the whole view anew and
then replaces the last one. So it does not matter how often it is called, by which process, or what was killed before.

    TensorBoard   <log_path>/tensorboard/<exp_name>
    wandb         <log_path>/wandb, always made offline; with wandb_mode `online` it is then uploaded by `wandb sync`, each
                  time under the same id, so that it replaces what was uploaded before

The x axis is `images_scored`, the number of images scored so far; TensorBoard has it as its step. A stage's updates are
spread evenly over the stage's images, so that its last update is at the stage's end.

    select/*                    a stage's figures from select.jsonl
    train/*                     an update's figures from train.jsonl, and three figures of a stage (OF_TRAINING)
    seconds/*                   the seconds of a stage's phases and their parts
    eval/<prompts>/<sampler>/*  an evaluation's figures from eval.jsonl, of the base model or a stage's last checkpoint
    images/stage, images/eval   first images of the newest trained stage, and of the newest evaluated stage
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.tracking import TensorBoardTracker, WandBTracker

from b2diffurl.configuration.settings import Output
from b2diffurl.experiment.evaluation_table import evaluation_rows, set_name
from b2diffurl.experiment.metrics import read_events
from b2diffurl.experiment.stage import Stage, finished_stages
from b2diffurl.experiment.stage_table import stage_rows
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import log_of, logger

PROJECT = "b2diffurl"  # wandb's project, unless WANDB_PROJECT names another
NUM_IMAGES = 8
UPLOAD_SEC = 60  # an upload that takes longer is given up, and training goes on
PER_UPDATE = ("loss", "grad_norm", "clip_fraction")  # left out of a stage's figures: its updates have them one by one
OF_TRAINING = ("num_trained_steps", "num_updates", "max_abs_log_ratio_first")  # a stage's figures that go under train/
CONDITIONS = ("stage", "queries", "n_images", "n_prompts", "num_steps", "eta", "guidance_scale")  # numbers, but no results

Point = dict[str, float]  # figures by name, with the number of images scored (SCORED) where they stand
SCORED = "images_scored"  # the x axis


def track(output: Output) -> None:
    """Bring every tracker up to date with the experiment; processes other than the main one do nothing.

    If a tracker fails, the log says so in one line and the run goes on.
    """
    if not output.trackers or not PartialState().is_main_process or not finished_stages(output.root, "train"):
        return
    for name in output.trackers:
        try:
            if find_spec(name) is None:  # both are optional packages
                raise ModuleNotFoundError(f"it is not installed. To have it: pip install {name}")
            TRACKERS[name](output)
        except Exception as error:  # any error at all: a view of the run must not stop the run
            said = " ".join(str(error).split()) or type(error).__name__
            logger.warning("track: %s is not up to date: %s", name, said)
            logger.debug("track: %s failed", name, exc_info=True)


# ---- what is shown ----


def points(root: Path) -> list[Point]:
    """All points of the run in order of the images scored: of updates, of trained stages, and of evaluations."""
    rows = {row["stage"]: row for row in stage_rows(root)}
    unordered = []
    for stage in finished_stages(root, "train"):
        row = rows[stage.index]
        unordered += [*update_points(stage, row), stage_point(row)]
    unordered += [evaluation_point(row) for row in evaluation_rows(root)]
    return sorted(unordered, key=lambda point: point[SCORED])


def update_points(stage: Stage, row: dict[str, Any]) -> Iterator[Point]:
    """A point for each update of a stage, evenly over the images of its row."""
    updates = read_events(stage.metrics("train"), "update")
    for left, update in zip(reversed(range(len(updates))), updates, strict=True):
        scored = row["queries"] - row["num_images"] * left / len(updates)
        yield {SCORED: scored} | {f"train/{key}": value for key, value in numbers(update).items()}


def stage_point(row: dict[str, Any]) -> Point:
    """The point of a stage, at its end."""

    def group(key: str) -> str:
        if key.startswith("seconds/"):
            return ""
        return "train/" if key in OF_TRAINING else "select/"

    elsewhere = ("stage", "queries", *PER_UPDATE)
    results = {group(key) + key: value for key, value in numbers(row).items() if key not in elsewhere}
    return {SCORED: row["queries"]} | results


def evaluation_point(row: dict[str, Any]) -> Point:
    """The point of an evaluation, at its checkpoint's stage."""
    group = f"eval/{set_name(row['prompts'])}/{row['sampler']}"
    results = {f"{group}/{key}": value for key, value in numbers(row).items() if key not in CONDITIONS}
    return {SCORED: row["queries"]} | results


def numbers(row: dict[str, Any]) -> Point:
    """The numbers of a row."""
    return {key: value for key, value in row.items() if type(value) in (int, float)}  # not isinstance: True is an int


def pictures(root: Path) -> dict[str, list[tuple[Path, str]]]:
    """{name: [(file, caption), …]} of the first images of the newest trained stage, and of the newest evaluated stage's
    first held-out images. Images that have been deleted are left out."""
    newest = finished_stages(root, "train")[-1]
    shown = [
        (newest.image(row["id"]), caption(row["prompt"], reward=row["reward"]))
        for row in files.read_json_lines(newest.scores)[:NUM_IMAGES]
    ]
    images = {"images/stage": shown}
    rows = evaluation_rows(root, prompts="test") or evaluation_rows(root, prompts="train")  # where none is held out
    judged = [row for row in rows if row["stage"] is not None]  # without the base
    if judged and (root / judged[-1]["folder"] / "result.json").is_file():
        folder = root / judged[-1]["folder"]
        result = files.read_json(folder / "result.json")
        for n, prompt in enumerate(result["shown_prompts"][:NUM_IMAGES]):
            values = {key: result["values"][key][n] for key in ("reward", "accuracy") if key in result["values"]}
            images.setdefault("images/eval", []).append((folder / f"{n:05d}.png", caption(prompt, **values)))
    existing = {key: [(path, text) for path, text in group if path.is_file()] for key, group in images.items()}
    return {key: group for key, group in existing.items() if group}


def caption(prompt: str, **values: float | None) -> str:
    """A prompt and figures of its image: `a cat, reward 0.25`."""
    return ", ".join([prompt, *(f"{key} {value:.3g}" for key, value in values.items() if value is not None)])


def configuration(root: Path) -> dict[str, Any]:
    """The recorded configuration and, beside its sections, what else config.json has recorded."""
    record = files.read_json(root / "config.json")
    record.pop("differs_from_preset", None)  # follows from the settings
    return record.pop("config") | record


# ---- where it is shown ----


def show_in_wandb(output: Output) -> None:
    """Write the whole run offline, replace the last one by it, and upload it if the mode is online.

    The environment's WANDB_MODE has precedence over the setting wandb_mode.
    """
    mode = os.environ.get("WANDB_MODE", output.wandb_mode)
    if mode == "disabled":
        return
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # error reporting would look for a server, even offline
    import wandb

    root = output.root
    run_id = experiment_id(root)
    folder = Path(output.log_path).absolute() / "wandb"
    # Made in a folder of its own, so that a killed process leaves nothing half-made among the runs.
    workplace = files.empty_folder(folder.with_name(f"{view_name(output)}.wandb{files.TEMPORARY}"))
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        id=run_id,
        name=output.name,
        config=configuration(root),
        dir=str(workplace),
        mode="offline",
        reinit="create_new",
        settings=wandb.Settings(  # records the run's figures and nothing of this machine
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        ),
    )
    tracker.start()
    try:
        tracker.tracker.define_metric("*", step_metric=SCORED)
        everything = points(root)
        for point in everything:
            tracker.log(point)
        images = {
            key: [wandb.Image(str(path), caption=text) for path, text in group] for key, group in pictures(root).items()
        }
        tracker.log(images | {SCORED: everything[-1][SCORED]})
    finally:
        tracker.finish()
    # The last run is deleted only now that its successor is complete.
    (made,) = workplace.glob("wandb/offline-run-*")
    for old in folder.glob(f"offline-run-*-{run_id}"):
        shutil.rmtree(old)
    folder.mkdir(exist_ok=True)
    made = made.rename(folder / made.name)
    shutil.rmtree(workplace)
    if mode == "online":
        upload(made)


def experiment_id(root: Path) -> str:
    """An id for wandb that stays the same from the first stage to the last.

    An experiment that is deleted and begun anew under the same name gets another one, by the time of its first sampling.
    """
    first = finished_stages(root, "train")[0].manifest("sample")["finished"]
    return files.digest([root.name, files.read_json(root / "config.json"), first])


def upload(run: Path) -> None:
    """Upload an offline run by `wandb sync`, which asks no questions; a RuntimeError says why it failed."""
    command = [sys.executable, "-m", "wandb", "sync", str(run)]
    settings = os.environ | {"WANDB_DIR": str(run.parents[1])}  # where wandb writes its own log
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=UPLOAD_SEC, env=settings
        )
        said = "".join((ended.stdout + ended.stderr).strip().splitlines()[-1:])
    except subprocess.TimeoutExpired:
        said = f"no answer in {UPLOAD_SEC} s"
    # The mark that wandb leaves beside a run once it is uploaded.
    if not list(run.glob("*.wandb.synced")):
        raise RuntimeError(f"it was not uploaded ({said}). To do that later: wandb sync {run}")


def show_in_tensorboard(output: Output) -> None:
    """Write the whole run, and replace the last one by it."""
    root, log_path = output.root, Path(output.log_path)
    folder = log_path / "tensorboard" / view_name(output)
    workplace = files.empty_folder(log_path / f"{folder.name}.tensorboard{files.TEMPORARY}")
    tracker = TensorBoardTracker(folder.name, workplace)
    tracker.start()
    try:
        last = 0  # the step of the newest point, where the images stand
        for point in points(root):
            last = round(point.pop(SCORED))  # an update's place may be a fraction; TensorBoard's steps are whole
            tracker.log(point, step=last)
        tracker.log({"config": f"```\n{json.dumps(configuration(root), indent=1)}\n```"}, step=0)
        for key, group in pictures(root).items():
            images = torch.stack([files.read_image(path) for path, _ in group])
            tracker.log_images({key: images.numpy()}, step=last, dataformats="NHWC")
            tracker.log({f"{key}/captions": "\n\n".join(text for _, text in group)}, step=last)
    finally:
        tracker.finish()
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    (workplace / folder.name).rename(folder)
    workplace.rmdir()


def view_name(output: Output) -> str:
    """The experiment's name, or that of its log where another experiment has the usual one."""
    return log_of(Path(output.log_path), output.root).name.removesuffix(".log")


TRACKERS: dict[str, Callable[[Output], None]] = {"wandb": show_in_wandb, "tensorboard": show_in_tensorboard}
