"""One update of the LoRA: the gradient of the mean loss over units and steps, however memory and processes cut it up.

N trajectories, S trained steps, W processes
U units: what one term of the loss is of, a trajectory, or a group's best and worst; M of them in one micro-batch
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict
from torch import Tensor
from tqdm import tqdm

from b2diffurl.algorithm.ddim import Sampler, log_prob, require_stochastic, step_weights, transition, transition_kl
from b2diffurl.configuration.plan import Plan
from b2diffurl.configuration.settings import read_training
from b2diffurl.experiment.checkpoints import load_optimizer, read_state
from b2diffurl.experiment.stage import Stage, listed, not_finite
from b2diffurl.experiment.trajectories import SelectedTrajectories, Trajectories
from b2diffurl.models import Model
from b2diffurl.objectives import Objective
from b2diffurl.runtime import files
from b2diffurl.runtime.batch_sizes import BatchSizes
from b2diffurl.runtime.logs import logger


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
    guidance_scale: float
    unconditional_gradient: bool
    sizes: BatchSizes  # train.micro_batch_size: transitions the network sees at once
    max_grad_norm: float
    constant_shape: bool = False  # micro-batches have the same shape in all updates, filled up
    num_updates: int = 0
    bar: tqdm = field(default_factory=partial(tqdm, disable=True))  # counts transitions, of all processes

    def warm_up(self, stored: SelectedTrajectories, units: Tensor) -> None:
        """Have a network that is compiled be so before the first update: by one step of a micro-batch, filled up."""
        device = self.sampler.sigma.device
        trajectories = stored.read(units.flatten().tolist()).to(device)
        local, advantages = torch.arange(units.numel()).view(units.shape), torch.ones(units.numel(), device=device)

        def one_step(size: int) -> None:
            [(rows, _)] = micro_batches(local, 0, 1, max(1, size // units[0].numel()), constant=True)
            with self.accelerator.no_sync(self.model.network):
                loss, _ = self.step_loss(trajectories, advantages, rows.to(device), torch.tensor([0], device=device))
                loss.sum().backward()

        self.sizes.fit("train.micro_batch_size", one_step)
        self.optimizer.zero_grad()

    def update(self, trajectories: Trajectories, advantages: Tensor, units: Tensor, steps: Sequence[int]) -> dict:
        """One optimizer step on `units`, trajectories [U] or pairs of them [U,2], and those of their S `steps`; returns the
        metrics, of all processes' shares.

        A stage's first update goes step by step, so that its metrics have each step's gradient."""
        apart = self.num_updates == 0

        def accumulate(size: int) -> list[dict[str, Tensor]]:
            self.optimizer.zero_grad()
            return self.accumulate(trajectories, advantages, units, steps, size=size, apart=apart)

        per_step = self.sizes.fit("train.micro_batch_size", accumulate)
        gradient = self.gradient()  # as it is: clipping to a norm that is not finite spoils all of it
        norm = self.accelerator.clip_grad_norm_(list(self.model.trainable().values()), self.max_grad_norm)
        self.require_finite(per_step, steps, norm, gradient, trajectories)
        self.optimizer.step()
        if self.accelerator.optimizer_step_was_skipped:
            logger.warning("stage%d train: fp16 overflow, update %d is skipped", self.stage.index, self.num_updates)
        self.optimizer.zero_grad()
        self.num_updates += 1
        return summarise(per_step, norm, self.timesteps(steps))

    def accumulate(
        self, trajectories: Trajectories, advantages: Tensor, units: Tensor, steps: Sequence[int], *, size: int, apart: bool
    ) -> list[dict[str, Tensor]]:
        """Add up the gradient of the mean loss over all units and `steps`, at most `size` transitions at once.

        A micro-batch holds transitions of one step, or, where one has room for all units and steps need not be kept `apart`,
        of several. Returns, for each step, all processes' `units` [U] or [U,2], their `loss` [U], whether it and their
        log-probabilities are `finite` [U], the objective's metrics [U] or [2U], and, where steps do not share a micro-batch,
        `grad_norm`, the norm of what the step alone adds.
        """
        size = max(1, size // units[0].numel())
        shares = micro_batches(
            units, self.accelerator.process_index, self.accelerator.num_processes, size, constant=self.constant_shape
        )
        together = 1 if apart or len(shares) > 1 else max(1, size // len(shares[0][0]))  # steps in a micro-batch
        num_real = [int(counts.sum()) for _, counts in shares]
        device = trajectories.latents.device  # where everything goes once, for each copy there makes the host wait
        all_units, all_counts = (torch.cat(parts).to(device) for parts in zip(*shares, strict=True))
        shares = list(zip(all_units.chunk(len(shares)), all_counts.chunk(len(shares)), strict=True))
        advantages, step_numbers = advantages.to(device), torch.tensor(list(steps), device=device)
        scale = self.accelerator.num_processes / (len(units) * len(steps))
        per_step: list[dict[str, Tensor]] = []  # of this process: each value [M] or [2,M], all its micro-batches' in a row
        norms: list[Tensor] = []
        before = self.gradient()
        for start in range(0, len(steps), together):
            some = step_numbers[start : start + together]
            collected: list[list[dict[str, Tensor]]] = [[] for _ in some]
            for number, (chosen, counts) in enumerate(shares):
                ends = (apart or start + together >= len(steps)) and number == len(shares) - 1  # with a sum over processes
                with nullcontext() if ends else self.accelerator.no_sync(self.model.network):
                    loss, metrics = self.step_loss(trajectories, advantages, chosen, some)  # [steps,M]
                    self.accelerator.backward(((loss * counts).sum(1) * self.step_weight[some]).sum() * scale)
                log_ratios = metrics["log_ratio"].reshape(len(some), -1, loss.shape[1])  # [steps,1,M], or [steps,2,M]
                values = {"loss": loss.detach(), "finite": loss.isfinite() & log_ratios.isfinite().all(1)} | metrics
                for n, kept in enumerate(collected):
                    kept.append({key: value[n] for key, value in values.items()})
                self.bar.update(len(some) * num_real[number] * units[0].numel() * self.accelerator.num_processes)
            per_step += [{key: torch.cat([part[key] for part in kept], -1) for key in kept[0]} for kept in collected]
            if together == 1 and (apart or self.accelerator.num_processes == 1):
                after = self.gradient()
                norms.append((after - before).norm())
                before = after
        found = self.of_all_processes(per_step, all_units, all_counts)
        gradient_scale = self.gradient_scale()
        for step, norm in zip(found, norms, strict=False):
            step["grad_norm"] = norm / gradient_scale
        return found

    def of_all_processes(self, per_step: list[dict[str, Tensor]], units: Tensor, counts: Tensor) -> list[dict[str, Tensor]]:
        """Each step's values of all processes, flat, and their `units`; without what only fills micro-batches up."""
        gather = self.accelerator.gather
        real = gather(counts).nonzero().flatten()
        found: list[dict[str, Tensor]] = [{"units": gather(units)[real]} for _ in per_step]
        for key in per_step[0]:
            together = gather(torch.stack([step[key] for step in per_step]))  # [W*S,M], or [W*S,2,M]
            for step, value in zip(found, together.unflatten(0, (-1, len(per_step))).unbind(1), strict=True):
                step[key] = value.movedim(0, -2).flatten(-2)[..., real].flatten()
        return found

    def step_loss(
        self, trajectories: Trajectories, advantages: Tensor, units: Tensor, steps: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [steps,M] and metrics ([steps,M], or of pairs [steps,2,M]) of `units` at some of the S steps, in one pass;
        all tensors on the trajectories' device."""
        rows = units.movedim(0, -1).flatten()  # of pairs: all the best, then the worst
        num_rows = len(rows)
        rows = rows.repeat(len(steps))  # [steps*M], or [steps*2M]
        step = steps.repeat_interleave(num_rows)
        i = self.sampler.num_steps - len(self.step_weight) + step
        x_t, x_prev = trajectories.latents[rows, step], trajectories.latents[rows, step + 1]
        conditions = {name: value[trajectories.prompt_ids[rows]] for name, value in trajectories.conditions.items()}

        def policy() -> tuple[Tensor, Tensor]:
            output = self.model.predict(
                x_t,
                self.sampler.timesteps[i],
                conditions,
                trajectories.unconditional,
                self.guidance_scale,
                unconditional_gradient=self.unconditional_gradient,
            )
            return transition(self.sampler, i, x_t, output)

        tensors = {"old_log_prob": trajectories.log_probs[rows, step], "advantage": advantages[rows]}
        mu_ref = None
        if self.objective.needs_base:
            with torch.no_grad(), self.model.base_policy():
                mu_ref, sigma = policy()
            tensors["base_log_prob"] = log_prob(x_prev, mu_ref, sigma)
        mu, sigma = policy()
        tensors["log_prob"] = log_prob(x_prev, mu, sigma)
        if "kl" in self.objective.terms:
            tensors["kl"] = transition_kl(mu, mu_ref, sigma)
        shape = units.movedim(0, -1).shape  # [M] or [2,M]
        found = []
        for part in range(len(steps)):
            own = slice(part * num_rows, (part + 1) * num_rows)
            arguments = (tensors[name][own].view(shape) for name in self.objective.terms)
            found.append(self.objective(*arguments))
        losses, metrics = zip(*found, strict=True)
        return torch.stack(losses), {key: torch.stack([each[key] for each in metrics]) for key in metrics[0]}

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

    def timesteps(self, steps: Sequence[int]) -> list[int]:
        """What the scheduler calls these of the S steps."""
        window = self.sampler.timesteps[-len(self.step_weight) :].tolist()
        return [window[step] for step in steps]

    def require_finite(
        self,
        per_step: list[dict[str, Tensor]],
        steps: Sequence[int],
        norm: Tensor,
        gradient: Tensor,
        trajectories: Trajectories,
    ) -> None:
        """Stop on a non-finite loss or log-probability; and on a non-finite `gradient`, as it was before its `norm` was
        clipped, except under fp16, whose scaler skips that update.

        A gradient is a mean over all processes: where it is not finite each of them stops on its own.
        """
        fine = torch.stack([step["finite"] for step in per_step], 1).all(1).cpu()  # [U]
        if fine.all() and (norm.isfinite() or self.accelerator.scaler):
            return
        units = per_step[0]["units"].cpu()
        rows = (units if fine.all() else units[~fine]).flatten()
        ids = trajectories.ids[rows].tolist()
        tensors = {"latents": trajectories.latents[rows], "log_probs": trajectories.log_probs[rows]}
        for name, key in (("losses", "loss"), ("log_ratios", "log_ratio")):  # [U,S]; log-ratios of pairs [2U,S]
            tensors[name] = torch.stack([step[key] for step in per_step], 1)
        facts = {"update": self.num_updates, "timesteps": self.timesteps(steps), "grad_norm": str(norm.item())}
        facts |= {"images": ids, "images_of_losses": trajectories.ids[units].tolist()}
        what = f"the loss or log-probability of images {listed(ids)} is not finite"
        if fine.all():
            what = f"the gradient is not finite, though the losses of images {listed(ids)} are"
        said = f"stage{self.stage.index}, update {self.num_updates}: {what}"
        name = f"update_{self.num_updates:05d}_rank{self.accelerator.process_index}"
        raise not_finite(self.stage, name, said, tensors | self.spoiled(gradient), facts)

    def spoiled(self, gradient: Tensor) -> dict[str, Tensor]:
        """Of each parameter whose gradient is not finite `gradient.<name>`; of all where their norm alone overflowed."""
        parameters = self.model.trainable()
        parts = (gradient / self.gradient_scale()).split([parameter.numel() for parameter in parameters.values()])
        shaped = {f"gradient.{name}": part.view_as(parameters[name]) for name, part in zip(parameters, parts, strict=True)}
        return {name: part for name, part in shaped.items() if not part.isfinite().all()} or shaped


def make_trainer(config: ConfigDict, plan: Plan, accelerator: Accelerator, model: Model, source: Path | None) -> Trainer:
    """Optimizer (with the state saved beside `source`), prepared network, sampler and objective."""
    objective = read_training(config.train).objective
    sampler = model.sampler(config.sample.num_steps, config.sample.eta)
    require_stochastic(sampler, plan.num_trained_steps)
    if config.train.gradient_checkpointing:
        model.checkpoint_gradients()
    parameters = model.trainable()
    optimizer = make_optimizer(config.train, list(parameters.values()), scaled=accelerator.scaler is not None)
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
        guidance_scale=config.sample.guidance_scale,
        unconditional_gradient=config.train.unconditional_gradient,
        sizes=BatchSizes(
            plan.stage.root,
            accelerator.device,
            {"train.micro_batch_size": config.train.micro_batch_size},
            alone=accelerator.num_processes == 1,
            given=[config.pretrained.resolution, config.compile, config.train.gradient_checkpointing],
        ),
        max_grad_norm=config.train.max_grad_norm,
        constant_shape=config.compile,
    )


def make_optimizer(train: ConfigDict, parameters: list[Tensor], *, scaled: bool) -> torch.optim.Optimizer:
    """AdamW; on CUDA one kernel for all of a LoRA's small matrices, but not under fp16's `scaled` loss: accelerate would not
    hear from it that an update was skipped."""
    if train.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit as AdamW
        except ImportError:
            raise ImportError("train.use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from None
    else:
        AdamW = partial(torch.optim.AdamW, fused=parameters[0].is_cuda and not scaled)
    return AdamW(
        parameters,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.adam_weight_decay,
        eps=train.adam_epsilon,
    )


def micro_batches(
    units: Tensor, process: int, num_processes: int, size: int, *, constant: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """One process's share of an update, in micro-batches of equal size M <= `size`: (units [M] or [M,2], counts [M]); of
    M = `size` in every update where it is `constant`.

    Every process gets as many micro-batches of the same shape, filled up with units that count 0, so that none waits for
    another and no trajectory is lost or counted twice.
    """
    share = math.ceil(len(units) / num_processes)
    number = math.ceil(share / size)
    length = (size if constant else math.ceil(share / number)) * number
    mine = units[process * share : (process + 1) * share]
    counts = torch.ones(len(mine))
    missing = length - len(mine)
    mine = torch.cat([mine, units[:1].expand(missing, *units.shape[1:])])
    counts = torch.cat([counts, torch.zeros(missing)])
    return list(zip(mine.chunk(number), counts.chunk(number), strict=True))


def summarise(per_step: list[dict[str, Tensor]], norm: Tensor, timesteps: list[int]) -> dict:
    """An update's metrics, over all units and for each timestep; what only some objectives have, such as `kl`, too.

    Everything comes from the device in one transfer.
    """
    figures = [
        {key: value.mean() for key, value in step.items() if key not in ("units", "finite", "log_ratio", "grad_norm")}
        | {"log_ratio": step["log_ratio"].abs().mean(), "largest": step["log_ratio"].abs().max()}
        | {key: step[key] for key in ("grad_norm",) if key in step}
        for step in per_step
    ]
    names = list(figures[0])
    table = torch.stack([torch.stack([figure[name].float() for name in names]) for figure in figures], 1)  # [names, steps]
    *rows, (total, *_) = torch.cat([table, norm.float().expand(1, len(figures))]).tolist()
    columns = dict(zip(names, rows, strict=True))
    special = [name for name in names if name not in ("loss", "log_ratio", "clipped", "largest", "grad_norm")]
    norms = {"grad_norm_per_step": [files.finite(value) for value in columns["grad_norm"]]} if "grad_norm" in columns else {}
    return {key: mean(columns[key]) for key in special} | {
        **{f"{key}_per_step": columns[key] for key in special},
        "loss": mean(columns["loss"]),
        "grad_norm": files.finite(total),
        "clip_fraction": mean(columns["clipped"]),
        "max_abs_log_ratio": max(columns["largest"]),
        "timesteps": timesteps,
        "log_ratio_per_step": columns["log_ratio"],
        "clip_fraction_per_step": columns["clipped"],
        **norms,
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
