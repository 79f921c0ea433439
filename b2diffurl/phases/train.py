"""Train on one stage's selected trajectories: epochs of updates (trainer.py), their metrics, a checkpoint now and then.

N trajectories, S trained steps
U units: what one term of the loss is of, a trajectory, or a group's best and worst
"""

import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from b2diffurl.algorithm.seeding import generator
from b2diffurl.algorithm.selection import Selected, contrast_pairs
from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.plan import Plan
from b2diffurl.experiment.checkpoints import read_state, save_checkpoint, whole_checkpoints
from b2diffurl.experiment.metrics import Metrics, read_events
from b2diffurl.experiment.stage import LORA_FILE, Stage, delete_batches
from b2diffurl.experiment.stage_table import updates_before
from b2diffurl.experiment.trajectories import SelectedTrajectories
from b2diffurl.models import Model
from b2diffurl.models.policy import compiling, load_policy
from b2diffurl.phases.health import WINDOW, UpdateWatch, in_words
from b2diffurl.phases.trainer import Trainer, make_trainer, warm_up
from b2diffurl.reporting.forecast import stage_done_line
from b2diffurl.runtime import files
from b2diffurl.runtime.batch_sizes import peak_memory
from b2diffurl.runtime.device import make_accelerator
from b2diffurl.runtime.logs import logger, progress_bar
from b2diffurl.runtime.threads import ahead


@dataclass(frozen=True)
class TrainingData:
    """What a stage trains on."""

    stored: SelectedTrajectories
    advantages: Tensor  # [N,S]
    units: Tensor  # rows of the selected: [U], or each group's (best, worst) [U,2]

    @property
    def num_trajectories(self) -> int:
        """In one epoch."""
        return self.units.numel()


def train_stage(plan: Plan) -> None:
    """Train over the stage's selection, from its last checkpoint if it was interrupted."""
    stage = plan.stage
    if stage.finished("train"):
        logger.info("stage%d train: already finished", stage.index)
        clean_up(plan)
        return
    started = time.perf_counter()
    files.require_writable(stage.folder)
    sampled = stage.manifest("sample")
    stage.verify("select")
    if stage.manifest("select")["num_selected"] and not stage.selected.is_dir():
        raise ValueError(f"{stage.selected} is missing. Delete {stage.manifest_path('select')} and run run_select.py again.")
    accelerator = make_accelerator(plan.settings.compute)
    require_same_precision(stage, sampled["mixed_precision"], accelerator.mixed_precision)
    interrupted = whole_checkpoints(stage.checkpoints())
    source = interrupted[-1] / LORA_FILE if interrupted else plan.resume_from
    seed, compiles = plan.settings.schedule.seed, plan.settings.compute.compile
    model = load_policy(plan.settings.model, accelerator, source, seed=seed, compile=compiles, decoder=False)
    check_policy(plan, sampled["policy"], model)
    trainer = make_trainer(plan, accelerator, model, source)
    done = read_state(source)["epoch"] if interrupted else 0
    if accelerator.is_main_process:
        files.remove_temporaries(stage.folder)
    accelerator.wait_for_everyone()
    limit = plan.settings.training.max_first_log_ratio
    log = UpdateLog(stage, limit, source if interrupted else None, done, writes=accelerator.is_main_process)
    trainer.num_updates = log.num_kept
    data = read_data(plan)
    with compiling(compiles, f"stage{stage.index} train") as wanted:
        if wanted and len(data.units):
            warm_up(trainer, data.stored, data.units[:1])
    loaded = time.perf_counter()
    if len(data.units):
        train_epochs(plan, trainer, log, data, done)
    else:
        logger.info("stage%d train: nothing to train on, the weights go on unchanged", stage.index)
        save(plan, trainer, plan.settings.training.num_epochs)
    if accelerator.is_main_process:
        seconds = {"load": loaded - started, "train": time.perf_counter() - loaded}
        finish(plan, trainer, log, sampled, seconds | {"share": 1 - done / plan.settings.training.num_epochs})
    accelerator.wait_for_everyone()
    accelerator.end_training()


def require_same_precision(stage: Stage, sampled: str, now: str) -> None:
    if sampled != now:
        raise ValueError(
            f"{stage.folder} was sampled with mixed_precision {sampled}, not {now}: the ratios would be off. Train on the "
            f"same kind of device, or set mixed_precision={sampled}."
        )


def check_policy(plan: Plan, sampled: dict, model: Model) -> None:
    """The policy that is trained must be the one that sampled."""
    if model.fingerprint != sampled["base_model_sha256"]:
        raise ValueError(f"{plan.stage.folder} was sampled with another base model than the one at hand.")
    if (files.sha256(plan.resume_from) if plan.resume_from else "") != sampled["lora_sha256"]:
        raise ValueError(f"{plan.stage.folder} was sampled with another LoRA than {plan.resume_from or 'a fresh one'}.")


class UpdateLog:
    """A stage's updates in metrics/train.jsonl, which one process `writes`, and what is noticed about them."""

    def __init__(self, stage: Stage, clip_range: float, interrupted: Path | None, done: int, *, writes: bool):
        """Begins with the `done` epochs of an `interrupted` training, named by its last checkpoint's LoRA; what came after
        them is dropped."""
        self.stage, self.watch = stage, UpdateWatch(updates_before(stage, WINDOW), clip_range=clip_range)
        path, kept, self.num_kept = stage.metrics("train"), [], 0
        with suppress(ValueError, KeyError, TypeError):  # damaged: said below
            kept = [event for event in read_events(path) if event["epoch"] <= done] if interrupted else []
            for event in kept:
                self.watch.see(event)
                self.num_kept += 1
        if interrupted and self.num_kept != read_state(interrupted)["num_updates"]:
            raise ValueError(
                f"{path} is damaged: it lacks updates of {interrupted.parent.name}. "
                f"Delete {interrupted.parents[1]} and run the same command again."
            )
        self.metrics = Metrics(path, keep=kept) if writes else None

    def add(self, update: dict) -> None:
        """Write it; and say how far the first one's ratio is from 1, which it should be, for the policy is the one that
        sampled, and what is wrong."""
        if self.metrics is None:
            return
        self.metrics.log("update", **update)
        if update["first"]:
            what = "stage%d train: max |log-ratio| at the first update %.1e"
            logger.info(what, self.stage.index, update["max_abs_log_ratio"])
        for one in self.watch.see(update):
            logger.warning("stage%d train: %s", self.stage.index, in_words(one))


def read_data(plan: Plan) -> TrainingData:
    """The stage's selected trajectories, the advantages of all their transitions, and what the objective's terms are of."""
    rows = files.read_json(plan.stage.selection)
    selected = [Selected(row["group"], row["branch"], row["score"]) for row in rows]
    of_trajectory = torch.tensor([row["advantage"] for row in rows])
    return TrainingData(
        stored=SelectedTrajectories(plan.stage, selected, plan.settings.sampling.num_groups),
        advantages=of_trajectory.unsqueeze(1).expand(-1, plan.num_trained_steps),
        units=make_units(selected, paired=plan.settings.training.objective.paired),
    )


def train_epochs(plan: Plan, trainer: Trainer, log: UpdateLog, data: TrainingData, done: int) -> None:
    """The epochs after `done`: every unit once an epoch, in an order from (seed, stage, epoch).

    In memory are an update's trajectories, and the next one's, which are read meanwhile.
    """
    training, seed, index = plan.settings.training, plan.settings.schedule.seed, plan.stage.index
    units, num_steps = data.units, Budget.of(plan.settings).num_chosen_steps(plan.num_trained_steps)
    logger.info(
        "stage%d train: training on %d trajectories, %d of their %d steps, from %s",
        index, data.num_trajectories, num_steps, plan.num_trained_steps, plan.start,
    )  # fmt: skip
    size = max(1, training.num_trajectories // units[0].numel())
    deals = [
        (epoch, number, units[rows])
        for epoch in range(done + 1, training.num_epochs + 1)
        for number, rows in enumerate(update_rows(len(units), size, generator(seed, index, "train", epoch)))
    ]
    num_transitions = (training.num_epochs - done) * data.num_trajectories * num_steps
    with progress_bar(num_transitions, f"stage{index} train", "transitions") as trainer.bar:
        for (epoch, number, dealt), trajectories in ahead(lambda deal: data.stored.read(deal[2].flatten().tolist()), deals):
            steps = choose_steps(plan.num_trained_steps, num_steps, generator(seed, index, "steps", epoch, number))
            first = trainer.num_updates == 0
            local = torch.arange(dealt.numel()).view(dealt.shape)
            advantages = data.advantages[dealt.flatten()]
            report = trainer.update(trajectories.to(trainer.accelerator.device), advantages, local, steps)
            log.add({"epoch": epoch, "num_trajectories": dealt.numel(), "first": first} | report)
            ends = (number + 1) * size >= len(units)
            if ends and (epoch % plan.settings.output.save_interval == 0 or epoch == training.num_epochs):
                save(plan, trainer, epoch)


def choose_steps(num_trained_steps: int, count: int, rng: torch.Generator) -> list[int]:
    """`count` of the S steps, every one as likely, in sampling order."""
    return sorted(torch.randperm(num_trained_steps, generator=rng)[:count].tolist())


def make_units(selected: list[Selected], *, paired: bool) -> Tensor:
    """What the loss has one term for, as rows of `selected`: each trajectory [N], or each group's (best, worst) [P,2]."""
    return torch.tensor(contrast_pairs(selected), dtype=torch.int64) if paired else torch.arange(len(selected))


def update_rows(num_units: int, effective: int, rng: torch.Generator) -> list[Tensor]:
    """Deal a permutation of the units to ceil(U / effective) updates of nearly equal size.

    Nearly equal, for AdamW makes as long a step on a remainder of one trajectory as on a full batch.
    """
    order = torch.randperm(num_units, generator=rng)
    return list(order.tensor_split(math.ceil(num_units / effective)))


def save(plan: Plan, trainer: Trainer, epoch: int) -> None:
    """Write checkpoint_<n> after `epoch`: n = epoch / save_interval, rounded up for a last odd epoch."""
    accelerator, model = trainer.accelerator, trainer.model
    if accelerator.is_main_process:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
        state = {"stage": plan.stage.index, "epoch": epoch, "num_updates": trainer.num_updates}
        state |= {"base_model_sha256": model.fingerprint, "scaler": scaler}
        folder = plan.stage.checkpoint(math.ceil(epoch / plan.settings.output.save_interval))
        save_checkpoint(folder, model.adapter_state(), trainer.optimizer, list(model.trainable()), state)
    accelerator.wait_for_everyone()


def finish(plan: Plan, trainer: Trainer, log: UpdateLog, sampled: dict, seconds: dict) -> None:
    """Write the manifest, and only then delete what is not to be kept."""
    stage, accelerator = plan.stage, trainer.accelerator
    updates = read_events(stage.metrics("train"), "update")
    last = stage.checkpoints()[-1]
    num_trajectories = sum(update["num_trajectories"] for update in updates)
    facts = {
        "seed": plan.settings.schedule.seed,
        "num_trained_steps": plan.num_trained_steps,
        "num_updates": len(updates),
        "num_transitions": num_trajectories * Budget.of(plan.settings).num_chosen_steps(plan.num_trained_steps),
        "max_abs_log_ratio_first_update": updates[0]["max_abs_log_ratio"] if updates else None,
        "policy": sampled["policy"],
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "num_threads": torch.get_num_threads(),
        "num_processes": accelerator.num_processes,
        "batch_sizes": trainer.sizes.sizes,
        "warnings": log.watch.warnings(),
        "seconds": seconds,
    } | peak_memory(accelerator.device)
    written = [path for folder in stage.checkpoints() for path in folder.iterdir()]
    stage.write_manifest("train", facts, [*written, stage.metrics("train")])
    clean_up(plan)
    norm, clipped = (
        sum(update[key] or 0.0 for update in updates) / max(1, len(updates)) for key in ("grad_norm", "clip_fraction")
    )
    logger.info(
        "stage%d train: done in %.1f s, %d updates, gradient norm %.3g, clipped %.1f %%, to stage%d/%s",
        stage.index, seconds["train"], len(updates), norm, 100 * clipped, stage.index, last.name,
    )  # fmt: skip
    logger.info(stage_done_line(plan.settings, stage))


def clean_up(plan: Plan) -> None:
    """Delete the stage's trajectories and images beyond what is to be kept."""
    stage, output = plan.stage, plan.settings.output
    if not output.keep_samples:
        delete_batches(stage.samples)
        delete_batches(stage.selected)
    if output.keep_images >= 0:
        for path in sorted(stage.images.glob("*.png"))[output.keep_images :]:
            path.unlink(missing_ok=True)
