"""From a configuration to one call's work: which stage, how many steps, from which checkpoint. Nothing here writes."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ml_collections import ConfigDict

from b2diffurl.configuration.command_line import PRESET
from b2diffurl.configuration.keys import flatten
from b2diffurl.configuration.limits import shown
from b2diffurl.configuration.prompts import named_prompts
from b2diffurl.configuration.recorded import Record, make_record, read_record
from b2diffurl.configuration.resume import resume_source, trained_steps
from b2diffurl.configuration.rules import check, check_secrets
from b2diffurl.configuration.settings import Settings, read_settings
from b2diffurl.experiment.folder import relative_to
from b2diffurl.experiment.stage import Stage


@dataclass(frozen=True)
class Plan:
    """What one call works on, in the library's own words."""

    settings: Settings
    stage: Stage
    num_trained_steps: int  # S
    resume_from: Path | None  # the LoRA file the stage starts from; None: a fresh one
    prompts: tuple[str, ...]  # what is trained on
    record: Record  # the experiment, as config.json is to hold it

    @property
    def start(self) -> str:
        """Where the stage starts from, for people: `a fresh LoRA`, `stage2/checkpoint_1`, or the path of a LoRA."""
        if self.resume_from is None:
            return "a fresh LoRA"
        return relative_to(self.stage.root, self.resume_from.parent).replace("/checkpoints/", "/")


def stage_index(run_name: str) -> int:
    """The i of run_name `stage<i>`."""
    match = re.fullmatch(r"stage(0|[1-9][0-9]{0,5})", run_name)
    if not match:
        raise ValueError(f"run_name is {shown(run_name)}; it names the stage: stage0, stage1, …")
    return int(match[1])


def checked_settings(config: ConfigDict) -> Settings:
    """The checked values of a configuration; without num_threads as many as the experiment was begun with."""
    check(config)
    settings = read_settings(config)
    begun = read_record(settings.output.root)
    threads = settings.compute.num_threads or (begun["num_threads"] if begun else 0)
    return replace(settings, compute=replace(settings.compute, num_threads=threads))


def make_plan(config: ConfigDict) -> Plan:
    """Check the configuration and the experiment's folder; raises ValueError or FileNotFoundError, writes nothing."""
    settings, preset = checked_settings(config), PRESET.get()
    check_secrets(flatten(preset or {}))  # of which the record keeps what the command line replaces
    stage = Stage(settings.output.root, stage_index(config["run_name"]))
    prompts = tuple(prompt for _, prompt in named_prompts(settings.prompts, "train"))
    record = make_record(stage, config.to_dict(), prompts, preset, read_record(stage.root))
    num_trained_steps = trained_steps(stage, settings.schedule)
    start = resume_source(stage, settings.schedule.initial_lora)
    return Plan(settings, stage, num_trained_steps, start, prompts, record)
