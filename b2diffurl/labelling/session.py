"""A stage whose images people judge: which one waits, its answers on disk, and the scores in the end.

Answers are kept in labels.json of the stage's folder, which is written anew at every answer: it is whole at any moment.
scores_given.csv is written once, when every image has a score.
"""

import shlex
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from b2diffurl.configuration.commands import as_flags
from b2diffurl.configuration.keys import flatten
from b2diffurl.configuration.settings import reward_weights
from b2diffurl.experiment.stage import Stage, finished_stages
from b2diffurl.labelling.votes import Votes
from b2diffurl.rewards.file import write_table
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import printable
from b2diffurl.runtime.paths import RUN


class TooLateError(ValueError):
    """Something else has happened meanwhile, such as scores from elsewhere, so an answer does not count."""


class Session:
    """The answers about the images of `stage`, and their scores. Threads of the server may call it at once."""

    def __init__(self, stage: Stage):
        """Open a stage that waits for scores, with the answers of an earlier session. A ValueError names what is damaged."""
        sampled = stage.manifest("sample")
        stage.verify("sample", stage.images.name, stage.prompts.name)
        files.require_writable(stage.folder)
        self.stage = stage
        self.prompts: list[str] = files.read_json(stage.prompts)
        self.images_sha256 = images_checksum(sampled)
        num_siblings = sampled["batch_shape"][1]
        self.votes = read_votes(stage, Votes.none(len(self.prompts) // num_siblings, num_siblings), self.images_sha256)
        with Image.open(stage.image(0)) as image:
            self.image_size = image.size  # width and height of every image [px]
        self.num_answers = 0  # that this session has taken
        self.lock = threading.Lock()

    def change(self, change: Any, known: int | None = None) -> None:
        """Take an answer (`Votes.changed`). It is on the disk when this returns; if it raises, nothing has changed.

        `known` is how many answers of this session a page knows of, if it says so: one that has missed some is refused.
        """
        with self.lock:
            self.require_current(known)
            votes = self.votes.changed(change)
            files.write_record(self.stage.labels, {"images_sha256": self.images_sha256} | votes.to_json())
            self.votes, self.num_answers = votes, self.num_answers + 1

    def finish(self, known: int | None = None) -> None:
        """Write scores_given.csv; a ValueError, and no file, if a group is open."""
        with self.lock:
            self.require_current(known)
            write_table(self.stage.given_scores, self.stage, self.prompts, self.votes.scores())

    def require_current(self, known: int | None) -> None:
        """Refuse a page that does not show all answers, or other images than the stage has by now, or one with scores."""
        if known not in (None, self.num_answers):
            raise TooLateError("in another window something else has been answered meanwhile")
        require_waiting(self.stage)
        if images_checksum(self.stage.manifest("sample")) != self.images_sha256:
            raise TooLateError(f"{self.stage.folder} has been sampled again meanwhile, so its images are others")

    def image(self, number: int) -> bytes | None:
        """The PNG of an image of this stage; None if there is no such image."""
        path = self.stage.image(number)
        return path.read_bytes() if number in range(len(self.prompts)) and path.is_file() else None

    def state(self) -> dict[str, Any]:
        """What the page shows: of each group the prompt, the size of an image [px], and the answers."""
        prompts = [printable(one, keep="\n") for one in self.prompts[:: self.votes.num_siblings]]
        with self.lock:
            votes, num_answers = self.votes, self.num_answers
        return votes.to_json() | {
            "prompts": prompts,
            "num_siblings": votes.num_siblings,
            "image_size": self.image_size,
            "num_answers": num_answers,
        }

    @property
    def progress(self) -> str:
        """How far it is, in words: `3 of 12 groups are answered`."""
        votes = self.votes
        return f"{votes.num_groups - len(votes.open_groups)} of {votes.num_groups} groups are answered"


def waiting_stage(root: Path, index: int | None) -> Stage:
    """The stage whose images are to be judged: stage `index`, else the newest that is sampled and not selected.

    A ValueError says why there is none, and what to do.
    """
    sampled = finished_stages(root, "sample")
    if index is not None:
        stage = Stage(root, index)
        if index not in [one.index for one in sampled]:
            known = ", ".join(str(one.index) for one in sampled) or "none yet"
            raise ValueError(f"{root} has no stage {index} with images to judge. Sampled are: {known}.")
    elif not sampled:
        raise ValueError(f"{root} has no images to judge yet. Run it with Reward=file: it samples a stage, then waits.")
    else:
        waiting = [one for one in sampled if not one.finished("select")]
        stage = (waiting or sampled)[-1]
        if not waiting:
            raise ValueError(
                f"nothing of {root} waits for scores: its newest stage with images, {stage.index}, has them. Run the same "
                f"command as before: it samples the next stage, then waits."
            )
    require_asked(stage)
    require_waiting(stage)
    return stage


def require_asked(stage: Stage) -> None:
    """Refuse an experiment that does not ask people: scores_given.csv would be of no use to it."""
    reward = files.read_json(stage.root / "config.json")["config"]["reward"]
    # The run may watch other rewards than those that config.json was begun with; it writes the table where it waits.
    if "file" not in (*reward_weights(reward), *reward.get("watch", ())) and not stage.wanted_scores.is_file():
        rewards = ", ".join(reward_weights(reward))
        raise ValueError(f"{stage.root} is rewarded by {rewards}, not by people. Begin another experiment with Reward=file.")


def require_waiting(stage: Stage) -> None:
    """Refuse a stage that has its scores already, or is said to."""
    if stage.finished("select"):
        raise TooLateError(f"{stage.folder} has been selected by the scores in {stage.scores}; others come too late")
    if stage.given_scores.exists():
        raise TooLateError(
            f"{stage.given_scores} is there already: run the command of the run again, which takes it, or move it away to "
            "judge the images here"
        )


def images_checksum(sampled: Mapping[str, Any]) -> str:
    """A checksum of a stage's images, from the manifest of its sampling: those that answers are about."""
    return files.digest({name: facts["sha256"] for name, facts in sampled["files"].items() if name.startswith("images/")})


def read_votes(stage: Stage, none: Votes, images_sha256: str) -> Votes:
    """The answers in labels.json, or `none` if there is no such file.

    A ValueError says that they are damaged, or about other images.
    """
    if not stage.labels.is_file():
        return none
    content = files.read_json(stage.labels)
    try:
        if content["images_sha256"] != images_sha256:
            raise ValueError("it is about other images: the stage has been sampled again since")
        return none.read(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error if isinstance(error, ValueError) else "it is none of ours"
        raise ValueError(f"{stage.labels} cannot be taken ({reason}). Move it away and judge the images anew.") from None


def run_command(root: Path) -> str:
    """The command with which the run of the experiment in `root` was begun, and goes on, without what was changed since."""
    record = files.read_json(root / "config.json")
    config, reward = record["config"], record["config"]["reward"]
    changed = {key: here for key, (here, _) in flatten(record.get("differs_from_preset") or {}).items()}
    changed |= {"reward.weights": reward["weights"]} if reward.get("weights") else {}
    short = {"preset": "Preset", "exp_name": "ExpName", "reward.name": "Reward"}
    named = {"preset": config.get("preset"), "exp_name": config["exp_name"]}
    named |= {} if reward.get("weights") else {"reward.name": reward["name"]}
    variables = [f"{short[key]}={shlex.quote(value)}" for key, value in named.items() if value]
    flags = as_flags({key: value for key, value in changed.items() if key not in short})
    return " ".join([*variables, RUN, *map(shlex.quote, flags)])
