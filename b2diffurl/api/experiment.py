"""An experiment on disk, for Python: its figures as rows, its checkpoints, images by its models."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from b2diffurl.api.given import HELD_OUT, PROMPTS, Given
from b2diffurl.api.process import borrowed
from b2diffurl.configuration.limits import check_choice
from b2diffurl.configuration.plan import checked_settings
from b2diffurl.configuration.presets import recorded_config
from b2diffurl.configuration.settings import Settings
from b2diffurl.evaluation.measure import named_samplers, prompt_images
from b2diffurl.experiment.evaluation_table import evaluation_rows, every_evaluation, headline
from b2diffurl.experiment.folder import find_experiment, resolve_checkpoint
from b2diffurl.experiment.metrics import read_events
from b2diffurl.experiment.stage import Stage, finished_stages
from b2diffurl.experiment.stage_table import stage_rows
from b2diffurl.export import FORMATS, export
from b2diffurl.models.policy import keeping_models
from b2diffurl.phases.evaluate import evaluate_and_show
from b2diffurl.reporting import page
from b2diffurl.reporting.verdict import verdict
from b2diffurl.rewards import own
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import log_of

Row = dict[str, Any]
Reward = str | Callable | Mapping[str | Callable, float]


class Rows(list[Row]):
    """Rows as dicts: pandas.DataFrame(rows) makes a table of them."""

    def to_pandas(self) -> Any:
        """The rows as a DataFrame; an ImportError if pandas is not installed."""
        import pandas

        return pandas.DataFrame(self)


@dataclass(frozen=True)
class Pictures:
    """Images of one prompt by base and tuned model; image n of both comes from the same noise. A notebook shows them."""

    prompt: str
    base: list[Image.Image]
    tuned: list[Image.Image]
    png: bytes  # all of them, base above, tuned below

    def _repr_png_(self) -> bytes:
        return self.png

    def __repr__(self) -> str:
        return f"<{len(self.base)} images of {self.prompt!r} by the base model, {len(self.tuned)} by the tuned one>"


def load(experiment: str | Path, *, reward: Reward | None = None) -> "Experiment":
    """Open an experiment, finished or not, by its folder or its name in model/lora.

    `reward` is what it was trained on, as finetune takes it, if that is code of yours: evaluating needs it, nothing else.
    Raises a FileNotFoundError that lists the experiments there are, or a ValueError for one of a newer version.
    """
    root = find_experiment(str(experiment))
    recorded_config(root)  # a newer version's is refused now
    given = Given(root)
    if reward is not None:
        for one in reward if isinstance(reward, Mapping | list | tuple) else [reward]:
            given.reward(one)
        for name, text in given.texts.items():
            given.require_same(root / name, text)
    return Experiment(root, given)


class Experiment:
    """An experiment in a folder. Nothing is kept here: each call reads the files as they are now."""

    def __init__(self, folder: Path, given: Given | None = None):
        self.as_given, self.place = folder, folder.absolute()
        self.functions = dict(given.functions) if given else {}  # of no module, as rewards.own.given has them
        self.code = set(given.code) if given else set()  # names of all rewards that the user has given as code

    def __repr__(self) -> str:
        done = len(finished_stages(self.folder, "train"))
        return f"<experiment {self.name} in {self.folder}: {done} stages trained>"

    @property
    def folder(self) -> Path:
        """Its folder as it was given, or an absolute path if the working directory has become another."""
        return self.as_given if self.as_given.absolute() == self.place else self.place

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def config(self) -> dict[str, Any]:
        """The settings that it was begun with, by section."""
        return recorded_config(self.folder).to_dict()

    @property
    def lora(self) -> Path:
        """The folder of the last checkpoint, for load_lora_weights of diffusers; a FileNotFoundError if there is none."""
        return resolve_checkpoint(self.folder, "last").parent

    @property
    def report(self) -> Path:
        """The page with all figures and pictures, report.html, brought up to date."""
        return page.write_report(self.folder)

    # ---- figures ----

    @property
    def verdict(self) -> dict[str, Any] | None:
        """What the newest judged stage has changed, with intervals; None while no stage has been judged."""
        return verdict(self.folder)

    def stages(self) -> Rows:
        """A row for each scored stage: images, rewards, losses, seconds (docs/evaluation.md#metrics)."""
        return Rows(stage_rows(self.folder))

    def updates(self) -> Rows:
        """A row for each update of the LoRA, in order."""
        rows = []
        for stage in finished_stages(self.folder, "train"):
            rows += [{"stage": stage.index} | row for row in read_events(stage.metrics("train"), "update")]
        return Rows(rows)

    def scores(self, stage: int) -> Rows:
        """A row for each image of a stage: its reward, the reward's parts, its prompt and the path of its picture.

        The picture may have been deleted (keep.images).
        """
        of = Stage(self.folder, stage)
        if not of.finished("select"):
            raise FileNotFoundError(f"stage {stage} of {self.folder} has no scores yet")
        prompts = files.read_json(of.prompts)
        rows = files.read_json_lines(of.scores)
        return Rows(row | {"prompt": prompts[row["id"]], "image": of.image(row["id"])} for row in rows)

    def evaluations(self) -> Rows:
        """A row for each evaluation: checkpoint, prompts, sampler, figures with standard errors (`_se`)."""
        return Rows(every_evaluation(self.folder))

    def curve(self) -> Rows:
        """The learning curve: base model and each stage with the images scored so far, the mean reward in training, and the
        held-out figures where they were measured with training's sampler."""
        judged = {row["stage"]: row for row in evaluation_rows(self.folder, prompts="test", sampler="training")}
        keys = ("reward", "reward_se", "accuracy", "accuracy_se")
        empty = dict.fromkeys(keys)
        rows = [{"stage": None, "images_scored": 0, "training_reward": None}] if None in judged else []
        rows += [
            {"stage": row["stage"], "images_scored": row["queries"], "training_reward": row["reward_mean"]}
            for row in self.stages()
        ]
        return Rows(row | {f"held_out_{key}": judged.get(row["stage"], empty).get(key) for key in keys} for row in rows)

    # ---- with its models ----

    def images(
        self, prompt: str | Sequence[str], *, checkpoint: str = "last", sampler: str = "deployed"
    ) -> Pictures | list[Pictures]:
        """Images of a prompt, or of each of several, by base and tuned model on the same noise.

        checkpoint   as run_eval.py names them: last, stage3, stage3/checkpoint_1, the path of a LoRA, …
        sampler      `training`, or `deployed`, the one that the LoRA will be used with
        """
        with self.at_work() as settings, keeping_models():
            drawn = [
                self.draw(settings, one, checkpoint, sampler) for one in ([prompt] if isinstance(prompt, str) else prompt)
            ]
        return drawn[0] if isinstance(prompt, str) else drawn

    def draw(self, settings: Settings, prompt: str, checkpoint: str, sampler: str) -> Pictures:
        chosen = named_samplers(settings, [sampler])[sampler]
        images = prompt_images(settings, checkpoint, prompt, chosen)
        with page.drawing():
            png = io.BytesIO()
            page.prompt_figure(prompt, list(images), [row.numpy() for row in images.values()]).savefig(png, format="png")
        base, tuned = ([Image.fromarray(one.numpy()) for one in list(images.values())[n]] for n in (0, -1))
        return Pictures(prompt, base, tuned, png.getvalue())

    def evaluate(
        self,
        checkpoints: str | Sequence[str] = ("base", "last"),
        *,
        prompts: str | Path | Sequence[str] = "test",
        sampler: str = "deployed",
        quiet: bool = False,
    ) -> Rows:
        """Judge checkpoints as run_eval.py does, all on the same noise, and return a row for each.

        prompts   `test` (held-out), `train`, or the path of a prompt file; or several of these
        """
        several = [[given] if isinstance(given, str | Path) else list(given) for given in (checkpoints, prompts)]
        with self.at_work(quiet=quiet) as settings:
            self.refuse_unknown_code(settings)
            return Rows(map(headline, evaluate_and_show(settings, several[0], list(map(str, several[1])), [sampler])))

    def export(self, form: str = "diffusers", *, checkpoint: str = "last", out: Path | None = None) -> Path:
        """Export a checkpoint for diffusers, kohya (ComfyUI, A1111, Forge), or as a whole pipeline; returns its folder."""
        check_choice("form", form, FORMATS)
        return export(self.folder, checkpoint, form, out=out)

    def refuse_unknown_code(self, settings: Settings) -> None:
        """Raise a ValueError for a reward that is code which only config.json names."""
        for name in settings.rewards.weights:
            if ":" in name and name not in self.code:
                raise ValueError(
                    f"{self.folder / 'config.json'} has the reward {name}, which is code of its own and is not run "
                    "because a file says so. If you know it, give it yourself: b2diffurl.load(experiment, reward=…)"
                )

    @contextmanager
    def at_work(self, *, quiet: bool = True) -> Iterator[Settings]:
        """A block that loads models: in a borrowed process, with the experiment's settings."""
        config = recorded_config(self.folder)
        for key, name in (("prompt_file", PROMPTS), ("eval.prompt_file", HELD_OUT)):  # the folder may have been moved
            if (self.folder / name).is_file():
                config.update_from_flattened_dict({key: str(self.folder / name)})
        log_file = log_of(Path(config.log_path), self.folder)
        functions = {name: (function, self.folder / file.name) for name, (function, file) in self.functions.items()}
        with borrowed(log_file if log_file.is_file() else None, quiet=quiet), own.given(functions):
            yield checked_settings(config)
