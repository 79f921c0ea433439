"""The experiments of a folder as rows, one each: how far it is, what it has reached, what it takes on disk.

Nothing here writes or imports torch, and of a stage only the head of a manifest is read: hundreds of stages take seconds.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from b2diffurl.experiment import lock
from b2diffurl.experiment.evaluation_table import evaluation_rows
from b2diffurl.experiment.metrics import read_events
from b2diffurl.experiment.stage import Stage, finished_stages
from b2diffurl.experiment.stage_table import Row
from b2diffurl.runtime import files

FIGURES = ("reward", "accuracy")  # of an evaluation, that a row has


def rows(folder: Path) -> list[Row]:
    """`overview` of each experiment in `folder`, by name; a FileNotFoundError says that there is no such folder.

    A folder that is none, or whose records are damaged, has a row, too: `problem` says why it has no figures.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {folder}. Give the one that holds the experiments, as save_path does.")
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [overview(path) for path in found]


def overview(root: Path) -> Row:
    """One experiment as a row. What it does not have is None.

    name, folder                 its name, and its folder as text
    problem                      why it is no experiment, or cannot be read; "" for one that can
    damaged                      a list: what of it could not be read, though the rest could
    preset, model, objective     as they were asked for
    reward                       what is trained on, in words
    stages_done, stages_planned  trained stages, and how many the run is to have
    images_scored                over all stages
    reward_first, reward_last    mean reward of the images of the first and of the newest scored stage
    checkpoint                   the newest judged one: `stage8`
    test_<figure>_base, …_tuned  reward and accuracy on held-out prompts by training's sampler; with …_se, the standard error
    last_worked                  seconds since 1970 of the newest file, the report aside
    at_work                      whether a run is at work now
    bytes                        size on disk
    """
    size, newest = disk_use(root)
    row: Row = {"name": root.name, "folder": str(root), "problem": "", "damaged": []}
    try:
        row |= asked_for(root) | course(root, row["damaged"])
    except (ValueError, OSError, LookupError, TypeError, AttributeError) as error:
        row["problem"] = why(error)
    return empty_row() | row | {"last_worked": newest, "at_work": lock.at_work(root), "bytes": size}


def why(error: Exception) -> str:
    """What is wrong with an experiment, from the error of reading it. The advice to run again is of no use here."""
    if isinstance(error, LookupError | TypeError | AttributeError):
        return f"config.json is of another program, or damaged (no entry {error})"
    return str(error).split(" Delete ")[0].rstrip(".")


def empty_row() -> Row:
    """Every key of a row, with None for those that an experiment may lack."""
    names = "preset model objective reward stages_done stages_planned images_scored reward_first reward_last checkpoint"
    tested = [f"test_{figure}_{whose}{end}" for figure in FIGURES for whose in ("base", "tuned") for end in ("", "_se")]
    return dict.fromkeys(("name", "folder", "problem", "damaged", *names.split(), *tested))


def asked_for(root: Path) -> Row:
    """What config.json says of an experiment."""
    if not (root / "config.json").is_file():
        raise ValueError("no config.json: no experiment, or one that has not begun")
    config = files.read_object(root / "config.json")["config"]
    reward = config["reward"]
    # Earlier versions have neither presets nor objectives.
    return {
        "preset": config.get("preset") or None,
        "model": config["pretrained"]["model"],
        "objective": config["train"].get("objective"),
        "reward": " + ".join(f"{weight:g} {name}" for name, weight in (reward.get("weights") or {}).items())
        or reward["name"],
        "stages_planned": config["stage_cnt"],
    }


def course(root: Path, damaged: list[str]) -> Row:
    """How far an experiment is, and what it has reached. What cannot be read is added to `damaged`."""
    scored = with_images(finished_stages(root, "select"), damaged)
    row: Row = {
        "stages_done": len(finished_stages(root, "train")),
        "images_scored": scored[-1]["queries"] if scored else 0,
        "reward_first": mean_reward(root, scored[:1], damaged),
        "reward_last": mean_reward(root, scored[-1:], damaged),
    }
    judged = evaluation_rows(root, scored, damaged, prompts="test", sampler="training")
    tuned = [one for one in judged if one["stage"] is not None]
    named = {"base": next((one for one in judged if one["stage"] is None), {}), "tuned": tuned[-1] if tuned else {}}
    for whose, one in named.items():
        row |= {f"test_{figure}_{whose}{end}": one.get(f"{figure}{end}") for figure in FIGURES for end in ("", "_se")}
    return row | {"checkpoint": named["tuned"].get("checkpoint")}


def with_images(stages: Sequence[Stage], damaged: list[str]) -> list[Row]:
    """(stage, queries) of each scored stage, `queries` being the images scored until its end."""
    found, queries = [], 0
    for stage in stages:
        try:
            queries += stage.noted("select")["num_images"]
        except (ValueError, OSError, LookupError, TypeError) as error:
            damaged.append(f"stage{stage.index}: {why(error)}")
        found.append({"stage": stage.index, "queries": queries})
    return found


def mean_reward(root: Path, stages: Sequence[Row], damaged: list[str]) -> float | None:
    """The mean reward of the first of `stages`; None without one, or if it cannot be read."""
    for row in stages:
        try:
            [event, *_] = read_events(Stage(root, row["stage"]).metrics("select"), "select")
            return event["reward_mean"]
        except (ValueError, OSError, LookupError) as error:
            damaged.append(f"stage{row['stage']}: {why(error)}")
    return None


def disk_use(root: Path) -> tuple[int, float | None]:
    """(bytes below a folder, time of the newest file of a run in it in seconds since 1970, or None). Links are not followed.

    The report is left out of the time: whoever has it written again has not worked on the experiment.
    """
    size, newest, folders = 0, 0.0, [os.fspath(root)]
    while folders:
        here = folders.pop()
        of_a_run = os.path.basename(here) != "report"
        with suppress(OSError), os.scandir(here) as entries:  # several times as fast as Path.rglob
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:  # a file that was deleted in this moment
                    continue
                size += status.st_size
                if of_a_run and status.st_mtime > newest and entry.name != "report.html":
                    newest = status.st_mtime
    return size, newest or None
