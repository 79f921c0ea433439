"""What a configuration asks for: images, network evaluations, updates."""

import math
from pathlib import Path

from ml_collections import ConfigDict

from b2diffurl.configuration.settings import read_settings
from b2diffurl.experiment.stage import Stage
from b2diffurl.objectives import OBJECTIVES


def num_groups(config: ConfigDict) -> int:
    """Of a stage."""
    return config.sample.num_batches_per_epoch * config.sample.batch_size


def num_images(config: ConfigDict) -> int:
    """Of a stage."""
    return num_groups(config) * config.split_time


def num_evaluations(config: ConfigDict, num_trained_steps: int) -> int:
    """(Guided) evaluations of the network for a stage's images; branches share those of their prefix."""
    prefixes = num_groups(config) if config.sampling == "branch" else num_images(config)
    return prefixes * (config.sample.num_steps - num_trained_steps) + num_images(config) * num_trained_steps


def most_selected(config: ConfigDict) -> int:
    """The most trajectories a stage can train on."""
    return num_images(config) if config.eval.selection == "all" else 2 * num_groups(config)


def most_updates(config: ConfigDict) -> int:
    """The most updates a stage can make: what it makes where all images are selected."""
    siblings = 2 if OBJECTIVES[config.train.objective].paired else 1  # in a term of the loss
    in_one = max(1, config.train.batch_size * config.train.gradient_accumulation_steps // siblings)
    return config.train.num_epochs * math.ceil(most_selected(config) // siblings / in_one)


def at_most(config: ConfigDict) -> str:
    return "" if config.eval.selection == "all" else "at most "


def num_chosen_steps(config: ConfigDict, num_trained_steps: int) -> int:
    """Of a trajectory's S steps, how many an update takes."""
    return max(1, round(config.train.timestep_fraction * num_trained_steps))


def planned_steps(config: ConfigDict, root: Path) -> list[int]:
    """S of each stage of the experiment in folder `root`: what it was sampled with, or will be."""
    return [stage_steps(config, Stage(root, index)) for index in range(config.stage_cnt)]


def stage_steps(config: ConfigDict, stage: Stage) -> int:
    sampled = stage.finished("sample")
    return (
        stage.manifest("sample")["num_trained_steps"]
        if sampled
        else read_settings(config).schedule.num_trained_steps(stage.index)
    )
