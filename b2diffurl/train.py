"""Update the LoRA on one stage's selected trajectories.

N trajectories, S trained steps, W processes
U units: what one term of the loss is of, a trajectory, or a group's best and worst; M of them in one micro-batch
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict
from torch import Tensor
from tqdm import tqdm

from b2diffurl import files
from b2diffurl.checkpoint import load_optimizer, read_state, save_checkpoint
from b2diffurl.ddim import Sampler, log_prob, require_stochastic, step_weights, transition, transition_kl
from b2diffurl.experiment import Plan, make_plan
from b2diffurl.forecast import stage_done_line
from b2diffurl.metrics import Metrics, read_events
from b2diffurl.models import Model
from b2diffurl.objectives import OBJECTIVES, Objective
from b2diffurl.policy import load_policy
from b2diffurl.runtime import logger, make_accelerator, progress_bar
from b2diffurl.seeding import generator
from b2diffurl.selection import Selected, contrast_pairs
from b2diffurl.stage import LORA_FILE, Stage
from b2diffurl.trajectory import Trajectories, load_selected


def train_stage(config: ConfigDict) -> None:
    """Train over the stage's selection, from its last checkpoint if it was interrupted."""
    plan = make_plan(config)
    stage = plan.stage
    if stage.finished("train"):
        logger.info("stage%d train: already finished", stage.index)
        clean_up(config, stage)
        return
    started = time.perf_counter()
    sampled = stage.manifest("sample")
    stage.verify("select")
    stage.verify("sample", stage.samples.name)
    accelerator = make_accelerator(config, plan.num_threads)
    if sampled["mixed_precision"] != accelerator.mixed_precision:
        raise ValueError(
            f"{stage.folder} was sampled with mixed_precision {sampled['mixed_precision']}, not "
            f"{accelerator.mixed_precision}: the ratios would be off. Train on the same kind of device, or set "
            f"mixed_precision={sampled['mixed_precision']}."
        )
    interrupted = stage.checkpoints()
    source = interrupted[-1] / LORA_FILE if interrupted else plan.resume_from
    model = load_policy(config, accelerator, source, decoder=False)
    check_policy(plan, sampled["policy"], model)
    trainer = make_trainer(config, plan, accelerator, model, source)
    done = read_state(source)["epoch"] if interrupted else 0
    if accelerator.is_main_process:
        files.remove_temporaries(stage.folder)
    accelerator.wait_for_everyone()
    selection = files.read_json(stage.selection)
    selected = [Selected(row["group"], row["branch"], row["score"]) for row in selection]
    loaded = time.perf_counter()
    kept = [event for event in read_events(stage.metrics("train")) if event.get("epoch", 0) <= done]
    trainer.num_updates = sum(event["event"] == "update" for event in kept)
    if accelerator.is_main_process:
        trainer.metrics = Metrics(stage.metrics("train"), keep=kept)
    units = make_units(selected, paired=trainer.objective.paired)
    if len(units):
        num_transitions = (config.train.num_epochs - done) * units.numel() * plan.num_trained_steps
        with progress_bar(num_transitions, f"stage{stage.index} train", "transitions") as trainer.bar:
            train_epochs(config, trainer, selected, torch.tensor([row["advantage"] for row in selection]), done)
    else:
        logger.info("stage%d train: nothing to train on, the weights go on unchanged", stage.index)
        trainer.save(config.train.num_epochs, config.train.save_interval)
    if accelerator.is_main_process:
        seconds = {
            "load": loaded - started,
            "train": time.perf_counter() - loaded,
            "share": 1 - done / config.train.num_epochs,
        }
        finish(config, trainer, sampled, seconds)
    accelerator.end_training()


@dataclass
class Trainer:
    """Everything an update needs; the tensors it is computed from are arguments."""

    stage: Stage
    accelerator: Accelerator
    model: Model
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    step_weight: Tensor  # [S], mean 1
    objective: Objective
    options: dict[str, float]  # of the objective
    guidance_scale: float
    micro_batch_size: int
    max_grad_norm: float
    metrics: Metrics | None = field(default=None)
    num_updates: int = 0
    bar: tqdm = field(default_factory=partial(tqdm, disable=True))  # counts transitions, of all processes

    def update(self, trajectories: Trajectories, advantages: Tensor, units: Tensor) -> dict:
        """One optimizer step on `units`, trajectories [U] or pairs of them [U,2], all their S steps; returns the metrics of
        this process's share, which can be empty in all but the first process."""
        per_step = self.accumulate(trajectories, advantages, units)
        norm = self.accelerator.clip_grad_norm_(list(self.model.trainable().values()), self.max_grad_norm)
        self.require_finite(per_step, norm, trajectories)
        self.optimizer.step()
        if self.accelerator.optimizer_step_was_skipped:
            logger.warning("stage%d train: fp16 overflow, update %d is skipped", self.stage.index, self.num_updates)
        self.optimizer.zero_grad()
        self.num_updates += 1
        if not len(per_step[0]["loss"]):
            return {"grad_norm": finite(norm.item())}
        return summarise(per_step, norm, self.sampler.timesteps[-len(self.step_weight) :])

    def accumulate(self, trajectories: Trajectories, advantages: Tensor, units: Tensor) -> list[dict[str, Tensor]]:
        """Add up the gradient of the mean loss over all units and steps, step by step.

        Returns, for each of the S steps, this process's `units` [U] or [U,2], their `loss` [U] and the objective's metrics
        [U] or [2U], and `grad_norm`, the norm of what the step alone adds to the gradient.
        """
        num_steps = len(self.step_weight)
        size = max(1, self.micro_batch_size // units[0].numel())
        shares = micro_batches(units, self.accelerator.process_index, self.accelerator.num_processes, size)
        scale = self.accelerator.num_processes / (len(units) * num_steps)
        per_step, before = [], self.gradient()
        for step in range(num_steps):
            collected = []
            for number, (chosen, counts) in enumerate(shares):
                last = step == num_steps - 1 and number == len(shares) - 1
                with nullcontext() if last else self.accelerator.no_sync(self.model.network):
                    loss, metrics = self.step_loss(trajectories, advantages, chosen, step)
                    counts = counts.to(loss.device)
                    self.accelerator.backward((loss * counts).sum() * self.step_weight[step] * scale)
                real = counts > 0
                values = {"loss": loss.detach()} | metrics
                kept = {key: value[..., real].flatten() for key, value in values.items()}
                collected.append(kept | {"units": chosen.to(loss.device)[real]})
                self.bar.update(len(kept["loss"]) * units[0].numel() * self.accelerator.num_processes)
            after = self.gradient()
            merged = {key: torch.cat([part[key] for part in collected]) for key in collected[0]}
            per_step.append(merged | {"grad_norm": (after - before).norm() / self.gradient_scale()})
            before = after
        return per_step

    def step_loss(
        self, trajectories: Trajectories, advantages: Tensor, units: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [M] and metrics ([M], of pairs [M] or [2,M]) of `units` at one of the S steps."""
        device, rows = self.sampler.sigma.device, units.movedim(0, -1).flatten()  # of pairs: all the best, then the worst
        i = self.sampler.num_steps - len(self.step_weight) + step
        x_t, x_prev = trajectories.latents[rows, step : step + 2].to(device).unbind(1)
        ids = trajectories.prompt_ids[rows]
        conditions = {name: value[ids].to(device) for name, value in trajectories.conditions.items()}
        unconditional = {name: value.to(device) for name, value in trajectories.unconditional.items()}

        def policy() -> tuple[Tensor, Tensor]:
            output = self.model.predict(x_t, self.sampler.timesteps[i], conditions, unconditional, self.guidance_scale)
            return transition(self.sampler, i, x_t, output)

        tensors = {"old_log_prob": trajectories.log_probs[rows, step].to(device), "advantage": advantages[rows].to(device)}
        mu_ref = None
        if self.objective.needs_reference:
            with torch.no_grad(), self.model.base_policy():
                mu_ref, sigma = policy()
            tensors["ref_log_prob"] = log_prob(x_prev, mu_ref, sigma)
        mu, sigma = policy()
        tensors["log_prob"] = log_prob(x_prev, mu, sigma)
        if "kl" in self.objective.tensors:
            tensors["kl"] = transition_kl(mu, mu_ref, sigma)
        shape = units.movedim(0, -1).shape  # [M] or [2,M]
        return self.objective.loss(*(tensors[name].view(shape) for name in self.objective.tensors), **self.options)

    def gradient(self) -> Tensor:
        """The accumulated gradient, flat."""
        grads = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self.model.trainable().values()
        ]
        return torch.cat([grad.flatten() for grad in grads])

    def gradient_scale(self) -> float:
        """What fp16's loss scaling multiplies gradients by."""
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0

    def require_finite(self, per_step: list[dict[str, Tensor]], norm: Tensor, trajectories: Trajectories) -> None:
        """Stop on a non-finite loss; and on a non-finite gradient, except under fp16, whose scaler skips that update."""
        losses = torch.stack([step["loss"] for step in per_step], 1).cpu()  # [U,S]
        finite_units = losses.isfinite().all(1)
        if finite_units.all() and (norm.isfinite() or self.accelerator.scaler):
            return
        units = per_step[0]["units"].cpu()
        rows = (units if finite_units.all() else units[~finite_units]).flatten()
        where = self.stage.folder / f"nonfinite_update_{self.num_updates}.safetensors"
        kept = {"latents": trajectories.latents[rows], "log_probs": trajectories.log_probs[rows], "losses": losses}
        files.write_tensors(where, kept, {"images": trajectories.ids[rows].tolist()})
        raise FloatingPointError(
            f"stage{self.stage.index}, update {self.num_updates}: the loss or gradient of images "
            f"{trajectories.ids[rows].tolist()} is not finite; see {where}"
        )

    def save(self, epoch: int, save_interval: int) -> Path:
        """Write checkpoint_<n> after `epoch`: n = epoch / save_interval, rounded up for a last odd epoch."""
        folder = self.stage.checkpoint(math.ceil(epoch / save_interval))
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
            state = {"stage": self.stage.index, "epoch": epoch, "num_updates": self.num_updates}
            state |= {"base_model_sha256": self.model.fingerprint, "scaler": scaler}
            names = list(self.model.trainable())
            save_checkpoint(folder, self.model.adapter_state(), self.optimizer, names, state)
        self.accelerator.wait_for_everyone()
        return folder


def make_trainer(config: ConfigDict, plan: Plan, accelerator: Accelerator, model: Model, source: Path | None) -> Trainer:
    """Optimizer (with the state saved beside `source`), prepared network, sampler and objective."""
    objective = OBJECTIVES[config.train.objective]
    sampler = model.sampler(config.sample.num_steps, config.sample.eta)
    require_stochastic(sampler, plan.num_trained_steps)
    parameters = model.trainable()
    optimizer = make_optimizer(config.train, list(parameters.values()))
    state = read_state(source) if source else None
    if state:
        load_optimizer(source, optimizer, list(parameters))
    model.network, optimizer = accelerator.prepare(model.network, optimizer)
    if state and state["scaler"] and accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    return Trainer(
        stage=plan.stage,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        sampler=sampler,
        step_weight=step_weights(sampler, plan.num_trained_steps, config.train.step_weight),
        objective=objective,
        options={keyword: config.train[key] for keyword, key in objective.options.items()},
        guidance_scale=config.sample.guidance_scale,
        micro_batch_size=config.train.micro_batch_size,
        max_grad_norm=config.train.max_grad_norm,
    )


def make_optimizer(train: ConfigDict, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if train.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit as AdamW
        except ImportError:
            raise ImportError("train.use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from None
    else:
        from torch.optim import AdamW
    return AdamW(
        parameters,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.adam_weight_decay,
        eps=train.adam_epsilon,
    )


def check_policy(plan: Plan, sampled: dict, model: Model) -> None:
    """The policy that is trained must be the one that sampled."""
    if model.fingerprint != sampled["base_model_sha256"]:
        raise ValueError(f"{plan.stage.folder} was sampled with another base model than the one at hand.")
    if (files.sha256(plan.resume_from) if plan.resume_from else "") != sampled["lora_sha256"]:
        raise ValueError(f"{plan.stage.folder} was sampled with another LoRA than {plan.resume_from or 'a fresh one'}.")


def train_epochs(config: ConfigDict, trainer: Trainer, selected: list[Selected], advantages: Tensor, done: int) -> None:
    """The epochs after `done`: every unit once an epoch, in an order from (seed, stage, epoch)."""
    trajectories = load_selected(trainer.stage, selected, config.sample.batch_size)
    units = make_units(selected, paired=trainer.objective.paired)
    effective = config.train.batch_size * config.train.gradient_accumulation_steps
    for epoch in range(done + 1, config.train.num_epochs + 1):
        rng = generator(config.seed, trainer.stage.index, "train", epoch)
        deal = update_rows(len(units), max(1, effective // units[0].numel()), rng)
        for rows in deal:
            first = trainer.num_updates == 0
            report = trainer.update(trajectories, advantages, units[rows])
            if trainer.metrics:
                trainer.metrics.log("update", epoch=epoch, num_trajectories=units[rows].numel(), first=first, **report)
                if first:
                    what = "stage%d train: %d trajectories, max |log-ratio| at the first update %.1e"
                    logger.info(what, trainer.stage.index, units.numel(), report["max_abs_log_ratio"])
                    if report["max_abs_log_ratio"] > config.train.eps:
                        warning = "stage%d train: that is beyond the clip range; was the stage sampled on another device?"
                        logger.warning(warning, trainer.stage.index)
        if epoch % config.train.save_interval == 0 or epoch == config.train.num_epochs:
            trainer.save(epoch, config.train.save_interval)


def make_units(selected: list[Selected], *, paired: bool) -> Tensor:
    """What the loss has one term for, as rows of `selected`: each trajectory [N], or each group's (best, worst) [P,2]."""
    return torch.tensor(contrast_pairs(selected), dtype=torch.int64) if paired else torch.arange(len(selected))


def update_rows(num_units: int, effective: int, rng: torch.Generator) -> list[Tensor]:
    """Deal a permutation of the units to ceil(U / effective) updates of nearly equal size.

    Nearly equal, for AdamW makes as long a step on a remainder of one trajectory as on a full batch.
    """
    order = torch.randperm(num_units, generator=rng)
    return list(order.tensor_split(math.ceil(num_units / effective)))


def micro_batches(units: Tensor, process: int, num_processes: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """One process's share of an update, in micro-batches of equal size M <= `size`: (units [M] or [M,2], counts [M]).

    Every process gets as many micro-batches of the same shape, filled up with units that count 0, so that none waits for
    another and no trajectory is lost or counted twice.
    """
    share = math.ceil(len(units) / num_processes)
    number = math.ceil(share / size)
    length = math.ceil(share / number) * number
    mine = units[process * share : (process + 1) * share]
    counts = torch.ones(len(mine))
    missing = length - len(mine)
    mine = torch.cat([mine, units[:1].expand(missing, *units.shape[1:])])
    counts = torch.cat([counts, torch.zeros(missing)])
    return list(zip(mine.chunk(number), counts.chunk(number), strict=True))


def summarise(per_step: list[dict[str, Tensor]], norm: Tensor, timesteps: Tensor) -> dict:
    """An update's metrics, over all units and for each timestep; what only some objectives have, such as `kl`, too."""
    ratios = [step["log_ratio"] for step in per_step]
    clipped = [step["clipped"].mean().item() for step in per_step]
    special = [key for key in per_step[0] if key not in ("units", "loss", "log_ratio", "clipped", "grad_norm")]
    means = {key: [step[key].mean().item() for step in per_step] for key in special}
    return {key: sum(values) / len(values) for key, values in means.items()} | {
        **{f"{key}_per_step": values for key, values in means.items()},
        "loss": torch.stack([step["loss"].mean() for step in per_step]).mean().item(),
        "grad_norm": finite(norm.item()),
        "clip_fraction": sum(clipped) / len(clipped),
        "max_abs_log_ratio": max(ratio.abs().max().item() for ratio in ratios),
        "timesteps": timesteps.tolist(),
        "log_ratio_per_step": [ratio.abs().mean().item() for ratio in ratios],
        "clip_fraction_per_step": clipped,
        "grad_norm_per_step": [finite(step["grad_norm"].item()) for step in per_step],
    }


def finite(value: float) -> float | None:
    """JSON has no infinity; fp16's scaler meets some."""
    return value if math.isfinite(value) else None


def finish(config: ConfigDict, trainer: Trainer, sampled: dict, seconds: dict) -> None:
    """Write the manifest, and only then delete what the configuration does not keep."""
    stage = trainer.stage
    updates = read_events(stage.metrics("train"), "update")
    last = stage.checkpoints()[-1]
    facts = {
        "seed": config.seed,
        "num_trained_steps": len(trainer.step_weight),
        "num_updates": len(updates),
        "num_transitions": sum(update["num_trajectories"] for update in updates) * len(trainer.step_weight),
        "max_abs_log_ratio_first_update": updates[0]["max_abs_log_ratio"] if updates else None,
        "policy": sampled["policy"],
        "device": str(trainer.accelerator.device),
        "mixed_precision": trainer.accelerator.mixed_precision,
        "num_threads": torch.get_num_threads(),
        "num_processes": trainer.accelerator.num_processes,
        "seconds": seconds,
    }
    written = [path for folder in stage.checkpoints() for path in folder.iterdir()]
    stage.write_manifest("train", facts, [*written, stage.metrics("train")])
    clean_up(config, stage)
    mean = {
        key: sum(update[key] or 0.0 for update in updates) / max(1, len(updates)) for key in ("grad_norm", "clip_fraction")
    }
    logger.info(
        "stage%d train: done in %.1f s, %d updates, gradient norm %.3g, clipped %.1f %%, to stage%d/%s",
        stage.index, seconds["train"], len(updates), mean["grad_norm"], 100 * mean["clip_fraction"], stage.index, last.name,
    )  # fmt: skip
    logger.info(stage_done_line(config, stage))


def clean_up(config: ConfigDict, stage: Stage) -> None:
    """Delete the stage's trajectories and images beyond what config.keep says."""
    if not config.keep.samples:
        for path in stage.samples.glob("batch_*.safetensors"):
            path.unlink()
        if stage.samples.is_dir():
            stage.samples.rmdir()
    if config.keep.images >= 0:
        for path in sorted(stage.images.glob("*.png"))[config.keep.images :]:
            path.unlink()
