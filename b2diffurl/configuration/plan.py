"""From a configuration to the work of one call: which stage, which trained steps, from which LoRA. Nothing is written."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ml_collections import ConfigDict

from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.command_line import PRESET
from b2diffurl.configuration.keys import by_todays_names, flatten
from b2diffurl.configuration.limits import shown
from b2diffurl.configuration.prompts import named_prompts
from b2diffurl.configuration.recorded import Record, make_record, read_record
from b2diffurl.configuration.resume import resume_source, trained_window
from b2diffurl.configuration.rules import check, check_secrets
from b2diffurl.configuration.settings import Settings, read_settings
from b2diffurl.experiment.folder import relative_to
from b2diffurl.experiment.stage import AVERAGE, Stage


@dataclass(frozen=True)
class Plan:
    """What one call of a script works on."""

    settings: Settings
    stage: Stage
    window: Window  # the trained steps
    resume_from: Path | None  # the LoRA file the stage starts from; None: a fresh one
    prompts: tuple[str, ...]  # training prompts
    record: Record  # what config.json will hold

    @property
    def start(self) -> str:
        """Where the stage starts from, for people: `a fresh LoRA`, `stage2/checkpoint_1`, or the path of a LoRA."""
        if self.resume_from is None:
            return "a fresh LoRA"
        path = relative_to(self.stage.root, self.resume_from)
        own = re.fullmatch(rf"(stage\d+)/checkpoints/(checkpoint_\d+(?:/{AVERAGE})?)/[^/]+", path)
        return f"{own[1]}/{own[2]}" if own else str(self.resume_from)


def stage_index(run_name: str) -> int:
    """The index i in a run_name `stage<i>`; a ValueError for any other name."""
    match = re.fullmatch(r"stage(0|[1-9][0-9]{0,5})", run_name)
    if not match:
        raise ValueError(f"run_name is {shown(run_name)}; it names the stage: stage0, stage1, …")
    return int(match[1])


def checked_settings(config: ConfigDict) -> Settings:
    """Check a configuration and return its values.

    If num_threads is 0 it becomes the number that the experiment was begun with, because another number changes the bits.
    """
    check(config)
    settings = read_settings(config)
    begun = read_record(settings.output.root)
    threads = settings.compute.num_threads or (begun["num_threads"] if begun else 0)
    return replace(settings, compute=replace(settings.compute, num_threads=threads))


def make_plan(config: ConfigDict) -> Plan:
    """Check the configuration against the experiment's folder, and plan this call. Writes nothing.

    Raises ValueError or FileNotFoundError.
    """
    settings, preset = checked_settings(config), PRESET.get()
    # config.json also keeps the preset's values that the command line replaced.
    check_secrets({f"{key} of the preset": value for key, value in flatten(preset or {}).items()})
    stage = Stage(settings.output.root, stage_index(config["run_name"]))
    prompts = tuple(prompt for _, prompt in named_prompts(settings.prompts, "train"))
    record = make_record(stage, by_todays_names(config.to_dict()), prompts, preset, read_record(stage.root))
    window = trained_window(stage, settings.schedule)
    start = resume_source(stage, settings.schedule.initial_lora)
    return Plan(settings, stage, window, start, prompts, record)
