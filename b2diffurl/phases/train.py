"""The train phase: epochs of updates (trainer.py) on one stage's selected trajectories, with metrics and checkpoints.

N trajectories, S trained steps. For an objective on noised images a trajectory is an image alone
U units: the loss has one term for each unit and step. A unit is a trajectory, or a contrast pair if the objective is paired
"""

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from b2diffurl.algorithm.seeding import generator
from b2diffurl.algorithm.selection import Selected, contrast_pairs, owned_edges
from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.plan import Plan
from b2diffurl.experiment.checkpoints import read_state, save_checkpoint, whole_checkpoints
from b2diffurl.experiment.metrics import Metrics, read_events
from b2diffurl.experiment.origin import require_origin, selection_sha256
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.experiment.stage_table import updates_before
from b2diffurl.experiment.trajectories import SelectedTrajectories, Trajectories
from b2diffurl.models import Model, describe_base
from b2diffurl.models.policy import compiling, load_lora, load_policy
from b2diffurl.phases.health import WINDOW, UpdateHealth, in_words
from b2diffurl.phases.inputs import identified
from b2diffurl.phases.trainer import Trainer, make_trainer, warm_up
from b2diffurl.reporting.forecast import stage_done_line
from b2diffurl.runtime import files
from b2diffurl.runtime.batch_sizes import peak_memory
from b2diffurl.runtime.device import make_accelerator
from b2diffurl.runtime.logs import Progress, logger
from b2diffurl.runtime.stopwatch import working_sec
from b2diffurl.runtime.threads import ahead


@dataclass(frozen=True)
class TrainingData:
    """What a stage trains on."""

    stored: SelectedTrajectories  # on disk
    advantages: Tensor  # [N,S]
    owned: Tensor | None  # [N,S] whether a transition is trained with this trajectory; None: every one is
    units: Tensor  # [U] or [U,2]: each unit's trajectory, or each pair's (best, worst), by position among the selected

    @property
    def num_trajectories(self) -> int:
        """Trajectories in one epoch: all N, or with a paired objective those of groups that kept both siblings."""
        return self.units.numel()

    def num_transitions(self, num_steps: int) -> int:
        """Transitions in one epoch, if an update uses `num_steps` of a trajectory's steps."""
        return self.num_trajectories * num_steps if self.owned is None else int(self.owned.sum())


def train_stage(plan: Plan) -> None:
    """Train on the stage's selected trajectories, write checkpoints, metrics and the phase's manifest.

    A training that was interrupted goes on from its last checkpoint.
    """
    stage = plan.stage
    require_origin(stage)
    if stage.finished("train"):
        logger.info("stage%d train: already finished", stage.index)
        clean_up(plan)  # a run killed between the manifest and its own clean_up has left files
        return
    plan = identified(plan)
    started = working_sec()
    files.require_writable(stage.folder)
    sampled = stage.manifest("sample")
    stage.verify("select")
    if stage.manifest("select")["num_selected"] and not stage.selected.is_dir():
        raise ValueError(f"{stage.selected} is missing. Delete {stage.manifest_path('select')} and run run_select.py again.")
    accelerator = make_accelerator(plan.settings.compute)
    require_same_precision(stage, sampled["mixed_precision"], accelerator.mixed_precision)
    # Checkpoints of a stage that is not finished are those of an interrupted training.
    interrupted = whole_checkpoints(stage.checkpoints())
    source = interrupted[-1] / LORA_FILE if interrupted else plan.resume_from
    seed, compiled = plan.settings.schedule.seed, plan.settings.compute.compile
    model = load_policy(plan.settings.model, accelerator, plan.resume_from, seed=seed, compile=compiled, decoder=False)
    check_policy(plan, sampled["policy"], model)
    old_lora = {name: parameter.detach().clone() for name, parameter in model.trainable().items()}
    if interrupted:
        load_lora(model, plan.settings.model, source)
    check_scheduler(plan, sampled, model)
    trainer = make_trainer(plan, accelerator, model, source, old_lora)
    epochs_done = resumed_epochs(stage, source) if interrupted else 0
    if accelerator.is_main_process:
        stage.remove_temporaries()
    accelerator.wait_for_everyone()  # before another process writes a temporary file, which would be deleted, too
    limit = plan.settings.training.max_first_log_ratio
    log = UpdateLog(stage, limit, source if interrupted else None, epochs_done, writes=accelerator.is_main_process)
    trainer.num_updates = log.num_kept
    data = read_data(plan)
    with compiling(compiled, f"stage{stage.index} train") as wanted:
        if wanted and len(data.units):
            warm_up(trainer, data.stored, data.units[:1], plan.window.num_steps)
    loaded = working_sec()
    if len(data.units):
        train_epochs(plan, trainer, log, data, epochs_done)
    else:  # the next stage starts from this one's checkpoint, so there must be one
        logger.info("stage%d train: nothing to train on, the weights go on unchanged", stage.index)
        save(plan, trainer, plan.settings.training.num_epochs)
    if accelerator.is_main_process:
        seconds = {"load": loaded - started, "train": working_sec() - loaded}
        # The share of the epochs that these seconds were spent on, for forecasts.
        seconds["share"] = 1 - epochs_done / plan.settings.training.num_epochs
        finish(plan, trainer, log, data, sampled, seconds)
    accelerator.wait_for_everyone()  # no process goes on to the next phase before the manifest is written
    accelerator.end_training()


def require_same_precision(stage: Stage, sampled: str, now: str) -> None:
    """Raise a ValueError unless the stage was sampled in this precision: otherwise the first importance ratio is not 1."""
    if sampled != now:
        raise ValueError(
            f"{stage.folder} was sampled with mixed_precision {sampled}, not {now}: the ratios would be off. Train on the "
            f"same kind of device, or set mixed_precision={sampled}."
        )


def check_policy(plan: Plan, sampled: dict, model: Model) -> None:
    """Raise a ValueError unless the policy that will be trained is the one that sampled: the same base, the same LoRA."""
    if model.fingerprint != sampled["base_model_sha256"]:
        raise ValueError(
            f"{plan.stage.folder} was sampled with another base model than {plan.settings.model.name}. Set pretrained.model "
            f"to the one that it was sampled with, or delete {plan.stage.folder} to sample it anew."
        )
    if (files.sha256(plan.resume_from) if plan.resume_from else "") != sampled["lora_sha256"]:
        raise ValueError(
            f"{plan.stage.folder} was sampled with another LoRA than {plan.resume_from or 'a fresh one'}. Give the one that "
            f"it was sampled with, or delete {plan.stage.folder} to sample it anew."
        )


def check_scheduler(plan: Plan, sampled: dict, model: Model) -> None:
    """Raise a ValueError if the scheduler that sampled, by the stage's manifest, had other settings than that of `model`.

    Or other timesteps: settings may stay and mean other steps in another version of diffusers.
    """
    now = json.loads(json.dumps(model.scheduler_config, default=str))  # as the manifest has it
    before, sampling, window = sampled.get("scheduler", {}), plan.settings.sampling, plan.window
    if "timesteps" in sampled:  # earlier versions did not record them
        trained = slice(window.start, window.stop)
        before = before | {"timesteps": sampled["timesteps"][trained]}
        now["timesteps"] = model.sampler(sampling.num_steps, sampling.eta, sde=sampling.sde).timesteps[trained].tolist()
    if other := [key for key in before.keys() & now.keys() if before[key] != now[key]]:
        raise ValueError(
            f"{plan.stage.folder} was sampled with another scheduler ({other[0]} was {before[other[0]]!r}, is "
            f"{now[other[0]]!r}). Put the old scheduler back, or delete {plan.stage.folder} to sample it anew."
        )


def resumed_epochs(stage: Stage, lora: Path) -> int:
    """The epochs that an interrupted training has done, by its last checkpoint; a ValueError if it had another selection."""
    state, selection = read_state(lora), selection_sha256(stage)
    if state.get("selection_sha256", selection) != selection:  # earlier versions did not record it
        raise ValueError(
            f"{lora.parent} was trained on another selection than {stage.selection}, which has been made anew since. Delete "
            f"{lora.parents[1]} and run the same command again."
        )
    return state["epoch"]


class UpdateLog:
    """Writes a stage's updates to metrics/train.jsonl and logs warnings about them."""

    def __init__(self, stage: Stage, limit: float, interrupted: Path | None, epochs_done: int, *, writes: bool):
        """Start the log, or continue that of an interrupted training.

        A first log-ratio above `limit` is warned of. `interrupted` is the LoRA file of the last checkpoint, written after
        `epochs_done` epochs. Updates that came later are dropped from the file: they will be made again. A ValueError if
        earlier ones are missing. Only the process with `writes` writes and warns.
        """
        self.stage, self.health = stage, UpdateHealth(updates_before(stage, WINDOW), max_first_log_ratio=limit)
        path, kept, self.num_kept = stage.metrics("train"), [], 0
        # A damaged file stops the loop early. Then too few updates are kept, and the check below refuses the file.
        with suppress(ValueError, KeyError, TypeError):
            kept = [event for event in read_events(path) if event["epoch"] <= epochs_done] if interrupted else []
            for event in kept:
                self.health.see(event)
                self.num_kept += 1
        if interrupted and self.num_kept != read_state(interrupted)["num_updates"]:
            raise ValueError(
                f"{path} is damaged: it lacks updates of {interrupted.parent.name}. "
                f"Delete {interrupted.parents[1]} and run the same command again."
            )
        self.metrics = Metrics(path, keep=kept) if writes else None

    def add(self, update: dict) -> None:
        """Write an update's metrics. Log the first update's largest log-ratio, and warnings that are new.

        At the first update the policy is still the one that sampled, so its log-ratios should be about 0.
        """
        if self.metrics is None:
            return
        self.metrics.log("update", **update)
        if update["first"]:
            message = "stage%d train: max |log-ratio| at the first update %.1e"
            logger.info(message, self.stage.index, update["max_abs_log_ratio"])
        for warning in self.health.see(update):
            logger.warning("stage%d train: %s", self.stage.index, in_words(warning))


def read_data(plan: Plan) -> TrainingData:
    """The stage's selected trajectories, the advantages of their transitions, and the units of the loss."""
    rows = files.read_json(plan.stage.selection)
    selected = [Selected(row["group"], row["branch"], row["score"]) for row in rows]
    tree, objective = plan.settings.sampling.tree, plan.settings.training.objective
    depths = tree.depths(plan.window.num_steps)
    of_edges = torch.tensor([row["advantage"] for row in rows]).view(len(rows), tree.num_depths)
    return TrainingData(
        stored=SelectedTrajectories(plan.stage, selected, plan.settings.sampling.num_groups),
        # A transition has the advantage of its edge. Branches that part once have one edge each.
        advantages=of_edges[:, depths],
        # Leaves of a tree share transitions, but no images.
        owned=owned_edges(selected, tree)[:, depths] if tree.after and not objective.on_noised_images else None,
        units=make_units(selected, paired=objective.paired),
    )


def train_epochs(plan: Plan, trainer: Trainer, log: UpdateLog, data: TrainingData, epochs_done: int) -> None:
    """Train the epochs that remain after `epochs_done`, with a checkpoint every `save_interval` and after the last.

    An epoch takes every unit once, in an order that depends on (seed, stage, epoch) alone. While an update is computed the
    trajectories of the next one are read, so those of at most two updates are in memory.
    """
    training, seed, index = plan.settings.training, plan.settings.schedule.seed, plan.stage.index
    units, num_steps = data.units, Budget.of(plan.settings).num_chosen_steps(plan.window.num_steps)
    what = f"{num_steps} of their {plan.window.num_steps} steps"
    if training.objective.on_noised_images:
        what = "each noised once an epoch" if num_steps == 1 else f"each noised to {num_steps} levels an epoch"
    logger.info(
        "stage%d train: training on %d %s, %s, from %s",
        index, data.num_trajectories, training.objective.samples, what, plan.start,
    )  # fmt: skip
    size = max(1, training.num_trajectories // units[0].numel())  # units in an update
    planned = [
        (epoch, number, units[rows])
        for epoch in range(epochs_done + 1, training.num_epochs + 1)
        for number, rows in enumerate(update_rows(len(units), size, generator(seed, index, "train", epoch)))
    ]

    def read(update: tuple[int, int, Tensor]) -> Trajectories:
        epoch, number, chosen = update
        stored = data.stored.read(chosen.flatten().tolist())
        return trainer.loss.prepare(stored, generator(seed, index, "noise", epoch, number))

    num_transitions = (training.num_epochs - epochs_done) * data.num_transitions(num_steps)
    with Progress(num_transitions, f"stage{index} train", "transitions") as trainer.bar:
        for (epoch, number, chosen), trajectories in ahead(read, planned):
            # Drawn for each update by a key of its own, so that a resumed training draws the same steps.
            steps = choose_steps(len(trainer.loss.step_weight), num_steps, generator(seed, index, "steps", epoch, number))
            first = trainer.num_updates == 0
            # The trainer sees only this update's trajectories, which are numbered from 0.
            local = torch.arange(chosen.numel()).view(chosen.shape)
            advantages = data.advantages[chosen.flatten()]
            owned = None if data.owned is None else data.owned[chosen]
            report = trainer.update(trajectories.to(trainer.accelerator.device), advantages, local, steps, owned)
            log.add({"epoch": epoch, "num_trajectories": chosen.numel(), "first": first} | report)
            ends_epoch = (number + 1) * size >= len(units)
            if ends_epoch and (epoch % plan.settings.output.save_interval == 0 or epoch == training.num_epochs):
                save(plan, trainer, epoch)


def choose_steps(num_trained_steps: int, count: int, rng: torch.Generator) -> list[int]:
    """Draw `count` of the S steps, uniformly and without replacement, in sampling order."""
    return sorted(torch.randperm(num_trained_steps, generator=rng)[:count].tolist())


def make_units(selected: list[Selected], *, paired: bool) -> Tensor:
    """The units of the loss, as positions in `selected`: each trajectory [U], or each contrast pair (best, worst) [U,2]."""
    return torch.tensor(contrast_pairs(selected), dtype=torch.int64) if paired else torch.arange(len(selected))


def update_rows(num_units: int, size: int, rng: torch.Generator) -> list[Tensor]:
    """Split a random permutation of the U units into ceil(U / size) updates of nearly equal size.

    They are nearly equal because AdamW makes as long a step on a remainder of one trajectory as on a full batch.
    """
    order = torch.randperm(num_units, generator=rng)
    return list(order.tensor_split(math.ceil(num_units / size)))


def save(plan: Plan, trainer: Trainer, epoch: int) -> None:
    """Write checkpoint_<n> after `epoch`, n = epoch / save_interval, rounded up for a last epoch between two intervals."""
    accelerator, model = trainer.accelerator, trainer.model
    if accelerator.is_main_process:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
        state = {"stage": plan.stage.index, "epoch": epoch, "num_updates": trainer.num_updates}
        state |= {"selection_sha256": selection_sha256(plan.stage)}
        state |= {"base_model_sha256": model.fingerprint, "scaler": scaler}
        folder = plan.stage.checkpoint(math.ceil(epoch / plan.settings.output.save_interval))
        save_checkpoint(folder, model.adapter_state(), trainer.optimizer, list(model.trainable()), state, trainer.average)
    accelerator.wait_for_everyone()


def finish(plan: Plan, trainer: Trainer, log: UpdateLog, data: TrainingData, sampled: dict, seconds: dict) -> None:
    """Write the manifest, delete what the user does not keep, and log how the training went."""
    stage, accelerator = plan.stage, trainer.accelerator
    updates = read_events(stage.metrics("train"), "update")
    last = stage.checkpoints()[-1]
    num_transitions = data.num_transitions(Budget.of(plan.settings).num_chosen_steps(plan.window.num_steps))
    facts = {
        "seed": plan.settings.schedule.seed,
        "num_trained_steps": plan.window.num_steps,
        "window": plan.window.ends,
        "num_updates": len(updates),
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "num_transitions": plan.settings.training.num_epochs * num_transitions,
        "max_abs_log_ratio_first_update": updates[0]["max_abs_log_ratio"] if updates else None,
        "policy": sampled["policy"],
        "made_from": {"selection": selection_sha256(stage)},
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "num_threads": torch.get_num_threads(),
        "num_processes": accelerator.num_processes,
        "batch_sizes": trainer.sizes.sizes,
        "warnings": log.health.warnings(),
        "seconds": seconds,
    } | peak_memory(accelerator.device)
    written = [path for folder in stage.checkpoints() for path in folder.rglob("*") if path.is_file()]
    stage.write_manifest("train", facts, [*written, stage.metrics("train")])
    clean_up(plan)  # only now: until the manifest is written a killed run has to read the trajectories again
    # Means over the stage's updates. A gradient norm is None where fp16's scaler skipped the update.
    norm, clipped = (
        sum(update[key] or 0.0 for update in updates) / max(1, len(updates)) for key in ("grad_norm", "clip_fraction")
    )
    logger.info(
        "stage%d train: done in %.1f s, %d updates, gradient norm %.3g, clipped %.1f %%, to stage%d/%s, for diffusers "
        "(for %s: python -m b2diffurl.export %s --format kohya)",
        stage.index, seconds["train"], len(updates), norm, 100 * clipped, stage.index, last.name,
        ", ".join(name for name in describe_base(plan.settings.model).readers if name != "diffusers"), stage.root,
    )  # fmt: skip
    logger.info(stage_done_line(plan.settings, stage))


def clean_up(plan: Plan) -> None:
    """Delete the stage's trajectories, and its images from number `keep.images` on, unless the user keeps them."""
    stage, output = plan.stage, plan.settings.output
    if not output.keep_samples:
        stage.delete_ours(stage.samples)
        stage.delete_ours(stage.selected)
    if output.keep_images >= 0:
        for path in stage.ours(stage.images):
            if int(path.stem) >= output.keep_images:
                path.unlink(missing_ok=True)
