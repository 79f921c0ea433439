"""An experiment's curves and images in wandb and TensorBoard, one run an experiment.

Its files are the truth and a tracker is a view of them. Each call builds the whole view anew, beside the last one, and then
puts it in its place: it does not matter how often and by which process that is done, or what was killed before. wandb's run
is always made offline, in <log_path>/wandb; wandb_mode `online` then uploads it by `wandb sync`, under the same id every
time, so that it takes the place of what was uploaded before. TensorBoard's is <log_path>/tensorboard/<exp_name>.

Everything lies over `queries`, the images that had been scored; TensorBoard's step is their number. A stage's updates are
spread evenly over the stage's own images, the last of them at their end.

select/*                    of a stage: what select.jsonl has of it
train/*                     of an update, as in train.jsonl; of a stage S (num_trained_steps) and two more figures
seconds/*                   of a stage's phases and their parts
eval/<prompts>/<sampler>/*  of an evaluation of the base or a stage's last checkpoint, as in eval.jsonl
images/stage, images/eval   of the newest stage, and of the newest one that was judged
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
from b2diffurl.runtime.logs import logger

PROJECT = "b2diffurl"  # wandb's, where WANDB_PROJECT does not name one
NUM_IMAGES = 8
UPLOAD_SEC = 60  # then training goes on without
PER_UPDATE = ("loss", "grad_norm", "clip_fraction")  # in a stage's row: means of what stands update by update
OF_TRAINING = ("num_trained_steps", "num_updates", "max_abs_log_ratio_first")
CONDITIONS = ("stage", "queries", "n_images", "n_prompts", "num_steps", "eta", "guidance_scale")  # no results

Point = dict[str, float]


def track(output: Output) -> None:
    """Bring every tracker up to date with the experiment, in the main process.

    A tracker that fails says so in one line; it ends nothing.
    """
    if not output.trackers or not PartialState().is_main_process or not finished_stages(output.root, "train"):
        return
    for name in output.trackers:
        try:
            if find_spec(name) is None:
                raise ModuleNotFoundError(f"it is not installed. To have it: pip install {name}")
            TRACKERS[name](output)
        except Exception as error:  # whatever befalls a view of the run, the run goes on
            said = " ".join(str(error).split()) or type(error).__name__
            logger.warning("track: %s is not up to date: %s", name, said)
            logger.debug("track: %s failed", name, exc_info=True)


# ---- what is shown ----


def points(root: Path) -> list[Point]:
    """Numbers by name, each point with its `queries`, in their order: stages and their updates, and evaluations."""
    rows = {row["stage"]: row for row in stage_rows(root)}
    found = []
    for stage in finished_stages(root, "train"):
        row = rows[stage.index]
        found += [*update_points(stage, row), stage_point(row)]
    found += [evaluation_point(row) for row in evaluation_rows(root)]
    return sorted(found, key=lambda point: point["queries"])


def update_points(stage: Stage, row: dict[str, Any]) -> Iterator[Point]:
    updates = read_events(stage.metrics("train"), "update")
    for left, update in zip(reversed(range(len(updates))), updates, strict=True):
        queries = row["queries"] - row["num_images"] * left / len(updates)
        yield {"queries": queries} | {f"train/{key}": value for key, value in numbers(update).items()}


def stage_point(row: dict[str, Any]) -> Point:
    def group(key: str) -> str:
        if key == "queries" or key.startswith("seconds/"):
            return ""
        return "train/" if key in OF_TRAINING else "select/"

    return {group(key) + key: value for key, value in numbers(row).items() if key not in ("stage", *PER_UPDATE)}


def evaluation_point(row: dict[str, Any]) -> Point:
    group = f"eval/{set_name(row['prompts'])}/{row['sampler']}"
    results = {f"{group}/{key}": value for key, value in numbers(row).items() if key not in CONDITIONS}
    return {"queries": row["queries"]} | results


def numbers(row: dict[str, Any]) -> Point:
    return {key: value for key, value in row.items() if type(value) in (int, float)}


def pictures(root: Path) -> dict[str, list[tuple[Path, str]]]:
    """(file, caption) of the newest trained stage's first images and, as far as there are any, of the first held-out ones of
    the newest stage that was judged."""
    newest = finished_stages(root, "train")[-1]
    shown = [
        (newest.image(row["id"]), caption(row["prompt"], reward=row["reward"]))
        for row in files.read_json_lines(newest.scores)[:NUM_IMAGES]
    ]
    found = {"images/stage": shown}
    judged = [row for row in evaluation_rows(root, prompts="test") if row["stage"] is not None]
    if judged and (root / judged[-1]["folder"] / "result.json").is_file():
        folder = root / judged[-1]["folder"]
        result = files.read_json(folder / "result.json")
        for n, prompt in enumerate(result["shown_prompts"][:NUM_IMAGES]):
            values = {key: result["values"][key][n] for key in ("reward", "accuracy") if key in result["values"]}
            found.setdefault("images/eval", []).append((folder / f"{n:05d}.png", caption(prompt, **values)))
    there = {key: [one for one in some if one[0].is_file()] for key, some in found.items()}
    return {key: some for key, some in there.items() if some}


def caption(prompt: str, **values: float | None) -> str:
    return ", ".join([prompt, *(f"{key} {value:.3g}" for key, value in values.items() if value is not None)])


def configuration(root: Path) -> dict[str, Any]:
    record = files.read_json(root / "config.json")
    return record.pop("config") | record


# ---- where it is shown ----


def show_in_wandb(output: Output) -> None:
    """Write the whole run offline in place of the last one, and upload it if that is wanted; WANDB_MODE has precedence."""
    mode = os.environ.get("WANDB_MODE", output.wandb_mode)
    if mode == "disabled":
        return
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would look for a server in offline mode, too
    import wandb

    root = output.root
    run_id = experiment_id(root)
    folder = Path(output.log_path).absolute() / "wandb"
    workplace = empty(folder.with_name(f"{output.name}.wandb{files.TEMPORARY}"))
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        id=run_id,
        name=output.name,
        config=configuration(root),
        dir=str(workplace),
        mode="offline",
        reinit="create_new",
        settings=wandb.Settings(
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
        tracker.tracker.define_metric("*", step_metric="queries")
        everything = points(root)
        for point in everything:
            tracker.log(point)
        images = {key: [wandb.Image(str(path), caption=text) for path, text in some] for key, some in pictures(root).items()}
        tracker.log(images | {"queries": everything[-1]["queries"]})
    finally:
        tracker.finish()
    (made,) = workplace.glob("wandb/offline-run-*")
    for old in folder.glob(f"offline-run-*-{run_id}"):
        shutil.rmtree(old)
    folder.mkdir(exist_ok=True)
    made = made.rename(folder / made.name)
    shutil.rmtree(workplace)
    if mode == "online":
        upload(made)


def experiment_id(root: Path) -> str:
    """Of this run of this configuration, the same from its first stage to its last."""
    first = finished_stages(root, "train")[0].manifest("sample")["finished"]
    return files.digest([root.name, files.read_json(root / "config.json"), first])


def upload(run: Path) -> None:
    """Upload an offline run, without asking anything; a RuntimeError says why it could not be."""
    command = [sys.executable, "-m", "wandb", "sync", str(run)]
    settings = os.environ | {"WANDB_DIR": str(run.parents[1])}  # where its log goes
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=UPLOAD_SEC, env=settings
        )
        said = "".join((ended.stdout + ended.stderr).strip().splitlines()[-1:])
    except subprocess.TimeoutExpired:
        said = f"no answer in {UPLOAD_SEC} s"
    if not list(run.glob("*.wandb.synced")):
        raise RuntimeError(f"it was not uploaded ({said}). To do that later: wandb sync {run}")


def show_in_tensorboard(output: Output) -> None:
    """Write the whole run in place of the last one."""
    root, log_path = output.root, Path(output.log_path)
    folder = log_path / "tensorboard" / output.name
    workplace = empty(log_path / f"{output.name}.tensorboard{files.TEMPORARY}")
    tracker = TensorBoardTracker(output.name, workplace)
    tracker.start()
    try:
        last = 0
        for point in points(root):
            last = round(point.pop("queries"))
            tracker.log(point, step=last)
        tracker.log({"config": f"```\n{json.dumps(configuration(root), indent=1)}\n```"}, step=0)
        for key, some in pictures(root).items():
            images = torch.stack([files.read_image(path) for path, _ in some])
            tracker.log_images({key: images.numpy()}, step=last, dataformats="NHWC")
            tracker.log({f"{key}/captions": "\n\n".join(text for _, text in some)}, step=last)
    finally:
        tracker.finish()
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    (workplace / output.name).rename(folder)
    workplace.rmdir()


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


TRACKERS: dict[str, Callable[[Output], None]] = {"wandb": show_in_wandb, "tensorboard": show_in_tensorboard}
