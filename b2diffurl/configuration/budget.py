"""How much work a run is: images, network evaluations, updates."""

import math
from dataclasses import dataclass
from pathlib import Path

from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import Sampling, Schedule, Settings, Training
from b2diffurl.experiment.stage import Stage, window_in


@dataclass(frozen=True)
class Budget:
    """Amounts of work in one stage, from the settings. The properties are the same for every stage."""

    schedule: Schedule
    sampling: Sampling
    training: Training
    selects_all: bool  # every image is trained on, so counts are exact; otherwise they are upper bounds

    @classmethod
    def of(cls, settings: Settings) -> "Budget":
        return cls(settings.schedule, settings.sampling, settings.training, settings.selection.which == "all")

    @property
    def num_groups(self) -> int:
        return self.sampling.num_batches * self.sampling.num_groups

    @property
    def num_images(self) -> int:
        return self.num_groups * self.sampling.num_branches

    def num_evaluations(self, window: Window) -> int:
        """Network evaluations to sample a stage; a guided one counts once. A state that branches share is evaluated once."""
        prefixes = self.num_groups if self.sampling.shared_prefix else self.num_images
        tail = window.tail(self.sampling.num_steps, self.sampling.outside.num_suffix_steps)
        in_window = self.num_groups * self.sampling.tree.num_evaluations(window.num_steps)
        return prefixes * window.start + in_window + self.num_images * len(tail)

    @property
    def most_selected(self) -> int:
        """The most trajectories that a stage can select: all, or a best and a worst of each group."""
        return self.num_images if self.selects_all else 2 * self.num_groups

    @property
    def most_updates(self) -> int:
        """The most updates that a stage can make: their number if `most_selected` trajectories are selected."""
        siblings = 2 if self.training.objective.paired else 1  # a paired loss takes two trajectories as one unit
        units_per_update = max(1, self.training.num_trajectories // siblings)
        return self.training.num_epochs * math.ceil(self.most_selected // siblings / units_per_update)

    @property
    def at_most(self) -> str:
        """The words to print before a count: "at most ", or nothing if the count is exact."""
        return "" if self.selects_all else "at most "

    def num_chosen_steps(self, num_trained_steps: int) -> int:
        """How many of a trajectory's S trained steps an update uses, or to how many levels of noise it noises an image."""
        if self.training.objective.on_noised_images:
            return self.training.steps.num_noise_levels
        return max(1, round(self.training.steps.fraction * num_trained_steps))

    def most_transitions(self, num_selected: float, num_trained_steps: int) -> float:
        """Transitions, or noised images, that an epoch trains at most, if so many trajectories are selected.

        Leaves of a tree share transitions, which are trained once.
        """
        count = num_selected * self.num_chosen_steps(num_trained_steps)
        distinct = self.num_groups * self.sampling.tree.num_evaluations(num_trained_steps)
        return count if self.training.objective.on_noised_images else min(count, distinct)

    def window(self, stage: Stage) -> Window:
        """The trained window of a stage: as it was sampled, or as the schedule has it if it is not sampled yet."""
        if not stage.finished("sample"):
            return self.schedule.window(stage.index)
        return window_in(stage.noted("sample"), self.schedule.num_steps)

    def planned_windows(self, root: Path) -> list[Window]:
        """The window of each stage of the experiment in folder `root`."""
        return [self.window(Stage(root, index)) for index in range(self.schedule.num_stages)]
