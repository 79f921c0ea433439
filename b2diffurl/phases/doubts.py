"""What does not keep a run from starting, and the user should know before: the dry run and the run's start show it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from b2diffurl.configuration.command_line import PRESET
from b2diffurl.configuration.keys import flatten
from b2diffurl.configuration.plan import Plan
from b2diffurl.models import family_of, recognise
from b2diffurl.models.known import expected_family, expected_sizes
from b2diffurl.reporting import dry_run


def doubts(plan: Plan) -> list[str]:
    """A sentence for each. What cannot be told, because something is wrong that the run will refuse, is left out."""
    found: list[str] = []
    for group in (doubts_of_family, doubts_of_trackers, doubts_of_room):
        with suppress(ValueError, OSError):
            found += group(plan)
    return found


def doubts_of_family(plan: Plan) -> Iterator[str]:
    """A preset that was made for another family, and settings that this one does not have."""
    model, preset = plan.settings.model, flatten(PRESET.get() or {})
    family = expected_family(model)
    if family is None:
        return
    described = family_of(family).describe(model)
    title = described.title
    made_for = preset.get("pretrained.model", model.name)
    of_preset = replace(model, name=made_for, family=recognise.AUTO)
    other = expected_family(of_preset)
    if other not in (None, family):
        meant = family_of(other).describe(of_preset).title
        yield (
            f"preset {plan.settings.output.preset} is made for {meant}, and pretrained.model, {model.name}, is a {title} "
            f"model: its number of steps, guidance and learning rate may not suit it. Take a preset of that "
            "family, or set them."
        )
    if described.is_flow:
        return
    set_in_vain = {
        "sample.sde": (plan.settings.sampling.sde, "cps"),
        "pretrained.max_sequence_length": (model.max_sequence_length, -1),
    }
    for key, (value, default) in set_in_vain.items():
        if value != default:
            yield f"{key} is {value} and has no effect: {model.name} is a {title} model, which has no such choice."


def doubts_of_trackers(plan: Plan) -> Iterator[str]:
    """A tracker that is not installed: the run goes on without it."""
    for name in plan.settings.output.trackers:
        if find_spec(name) is None:
            yield f"track_with names {name}, which is not installed, so nothing will be tracked there: pip install {name}"


def doubts_of_room(plan: Plan) -> Iterator[str]:
    """A disk or a GPU that has less room than the run may take."""
    settings, root, base = plan.settings, plan.stage.root, expected_sizes(plan.settings.model)
    if base is None:
        return
    wanted, there = dry_run.disk_bytes(plan, base), size_of(root)
    free = shutil.disk_usage(existing(root)).free
    if wanted - there > free:
        yield (
            f"the run takes up to {dry_run.size(wanted)} on disk, and {existing(root)} has {dry_run.size(free)} free. Make "
            "room, keep less (keep.images, keep.samples, train.save_interval), or give another save_path."
        )
    if torch.cuda.is_available() and settings.compute.dev_id < torch.cuda.device_count():
        memory = torch.cuda.get_device_properties(settings.compute.dev_id).total_memory
        if (needed := dry_run.memory_bytes(settings, base)) > memory:
            yield (
                f"weights and optimizer take {dry_run.size(needed)}, and the GPU has {dry_run.size(memory)}. Take "
                "pretrained.offload=True, train.use_8bit_adam=True, a smaller model or a larger GPU."
            )


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(one for one in (folder, *folder.parents) if one.is_dir())


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder; 0 if it is not there."""
    return sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(folder) for name in names)
