"""One update of the LoRA: the gradient of the mean loss over units and steps, however memory and processes cut it up.

N trajectories, S trained steps, s of them in an update, W processes
U units: what one term of the loss is of, a trajectory, or a group's best and worst
B micro-batches of M units
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from b2diffurl.algorithm.transition import Transitions, require_stochastic, step_weights
from b2diffurl.configuration.plan import Plan
from b2diffurl.configuration.settings import Optimizer
from b2diffurl.experiment.checkpoints import load_optimizer, read_state
from b2diffurl.experiment.stage import Stage
from b2diffurl.experiment.trajectories import SelectedTrajectories, Trajectories
from b2diffurl.models import Model
from b2diffurl.objectives import Objective
from b2diffurl.objectives.terms import transition_terms
from b2diffurl.phases.update_report import StepValues, UpdateReport, join, of_all_processes, refusal
from b2diffurl.runtime.batch_sizes import BatchSizes
from b2diffurl.runtime.logs import logger


@dataclass(frozen=True)
class PolicyLoss:
    """The objective's loss of stored transitions under the policy as it now is."""

    model: Model
    table: Transitions
    step_weight: Tensor  # [S], mean 1
    objective: Objective
    guidance_scale: float
    unconditional_gradient: bool

    def __call__(self, trajectories: Trajectories, advantages: Tensor, units: Tensor, steps: Tensor) -> StepValues:
        """Of `units` [M] or [M,2] at some of the S steps [s], in one pass; `advantages` [N,S]. All are on one device."""
        shape = units.movedim(0, -1).shape  # [M], or of pairs [2,M]: all the best, then the worst
        rows = units.movedim(0, -1).flatten()
        step = steps.repeat_interleave(len(rows))  # [s*M] or [s*2M]
        rows = rows.repeat(len(steps))
        i = self.table.num_steps - len(self.step_weight) + step
        x_t, x_prev = trajectories.latents[rows, step], trajectories.latents[rows, step + 1]
        predict = partial(self.predict, trajectories, rows, x_t, self.table.timesteps[i])

        def predict_base() -> Tensor:
            with self.model.base_policy():
                return predict()

        terms = transition_terms(
            self.objective.terms,
            self.table,
            i,
            x_t,
            x_prev,
            old_log_prob=trajectories.log_probs[rows, step],
            advantage=advantages[rows, step],
            predict=predict,
            predict_base=predict_base,
        )
        by_step = zip(*(term.view(len(steps), *shape) for term in terms), strict=True)
        losses, metrics = zip(*(self.objective(*of_step) for of_step in by_step), strict=True)
        stacked = {name: torch.stack([each[name] for each in metrics]) for name in metrics[0]}
        return StepValues(torch.stack(losses), stacked.pop("log_ratio"), stacked.pop("clipped"), stacked)

    def predict(self, trajectories: Trajectories, rows: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The network's guided output at x_t under the conditions of the trajectories `rows`."""
        return self.model.predict(
            x_t,
            timesteps,
            {name: value[trajectories.prompt_ids[rows]] for name, value in trajectories.conditions.items()},
            trajectories.unconditional,
            self.guidance_scale,
            unconditional_gradient=self.unconditional_gradient,
        )

    def timesteps(self, steps: Sequence[int]) -> list[int]:
        """What the scheduler calls these of the S steps."""
        window = self.table.timesteps[-len(self.step_weight) :].tolist()
        return [window[step] for step in steps]


@dataclass
class Trainer:
    """Everything an update needs; the tensors it is computed from are arguments."""

    stage: Stage
    accelerator: Accelerator
    loss: PolicyLoss
    optimizer: torch.optim.Optimizer
    max_grad_norm: float
    sizes: BatchSizes  # train.micro_batch_size: transitions the network sees at once
    constant_shape: bool = False  # micro-batches have the same shape in all updates, filled up
    num_updates: int = 0
    bar: tqdm = field(default_factory=partial(tqdm, disable=True))  # counts transitions, of all processes

    @property
    def model(self) -> Model:
        return self.loss.model

    def update(self, trajectories: Trajectories, advantages: Tensor, units: Tensor, steps: Sequence[int]) -> dict:
        """One optimizer step on `units`, trajectories [U] or pairs of them [U,2], and those of their S `steps`, by the
        advantages [N,S] of all transitions; returns the metrics, of all processes' shares.

        A stage's first update goes step by step, so that its metrics have each step's gradient.
        """
        apart = self.num_updates == 0

        def accumulate(size: int) -> UpdateReport:
            self.optimizer.zero_grad()
            return self.accumulate(trajectories, advantages, units, steps, size=size, apart=apart)

        report = self.sizes.fit("train.micro_batch_size", accumulate)
        gradient = self.gradient()  # as it is: clipping to a norm that is not finite spoils all of it
        norm = self.accelerator.clip_grad_norm_(list(self.model.trainable().values()), self.max_grad_norm)
        self.require_finite(report, norm, gradient, trajectories)
        self.optimizer.step()
        if self.accelerator.optimizer_step_was_skipped:
            logger.warning("stage%d train: fp16 overflow, update %d is skipped", self.stage.index, self.num_updates)
        self.optimizer.zero_grad()
        self.num_updates += 1
        return report.metrics(norm)

    def accumulate(
        self, trajectories: Trajectories, advantages: Tensor, units: Tensor, steps: Sequence[int], *, size: int, apart: bool
    ) -> UpdateReport:
        """Add up the gradient of the mean loss over all units and `steps`, at most `size` transitions at once.

        A micro-batch holds transitions of one step, or, where one has room for all units and steps need not be kept `apart`,
        of several. Only where they share none does the report have each step's own gradient norm.
        """
        num_processes, siblings = self.accelerator.num_processes, units[0].numel()
        room = max(1, size // siblings)  # units
        cut, counts = micro_batches(units, self.accelerator.process_index, num_processes, room, constant=self.constant_shape)
        num_counted = counts.sum(1).int().tolist()
        at_once = 1 if apart or len(cut) > 1 else max(1, room // cut.shape[1])  # steps in a micro-batch
        device = trajectories.latents.device  # where everything goes once, for each copy there makes the host wait
        cut, counts = cut.to(device), counts.to(device)
        loss = partial(self.loss, trajectories, advantages.to(device))
        chunks = torch.tensor(list(steps), device=device).split(at_once)
        scale = num_processes / (len(units) * len(steps))
        found, norms, after = [], [], self.gradient()
        for some in chunks:
            parts = []
            for number in range(len(cut)):
                last = number == len(cut) - 1 and (apart or some is chunks[-1])  # when processes add up
                parts.append(self.add_gradient(loss, cut[number], counts[number], some, scale, last=last))
                self.bar.update(len(some) * num_counted[number] * siblings * num_processes)
            found.append(join(parts, -1))
            if at_once == 1 and (apart or num_processes == 1):
                before, after = after, self.gradient()
                norms.append((after - before).norm())
        units, values = of_all_processes(cut.flatten(0, 1), join(found, 0), counts.flatten(), self.accelerator.gather)
        step_norms = torch.stack(norms) / self.gradient_scale() if norms else None
        return UpdateReport(units, self.loss.timesteps(steps), values, step_norms)

    def add_gradient(
        self,
        loss: Callable[[Tensor, Tensor], StepValues],
        units: Tensor,
        counts: Tensor,
        steps: Tensor,
        scale: float,
        *,
        last: bool,
    ) -> StepValues:
        """Add `scale` times the gradient of the weighted loss of `units` [M] that count, at `steps` [s]; with the `last` one
        processes add up theirs."""
        with nullcontext() if last else self.accelerator.no_sync(self.model.network):
            values = loss(units, steps)
            of_steps = (values.loss * counts).sum(1)
            self.accelerator.backward((of_steps * self.loss.step_weight[steps]).sum() * scale)
        return replace(values, loss=values.loss.detach())

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

    def require_finite(self, report: UpdateReport, norm: Tensor, gradient: Tensor, trajectories: Trajectories) -> None:
        """Stop on a non-finite loss or log-probability; and on a non-finite `gradient`, as it was before its `norm` was
        clipped, except under fp16, whose scaler skips that update.

        A gradient is a mean over all processes: where it is not finite each of them stops on its own.
        """
        if report.values.finite.all() and (norm.isfinite() or self.accelerator.scaler):
            return
        parameters = self.model.trainable()
        parts = (gradient / self.gradient_scale()).split([parameter.numel() for parameter in parameters.values()])
        gradients = {name: part.view_as(parameters[name]) for name, part in zip(parameters, parts, strict=True)}
        rank = self.accelerator.process_index
        raise refusal(report, norm, gradients, trajectories, self.stage, number=self.num_updates, rank=rank)


def warm_up(trainer: Trainer, stored: SelectedTrajectories, units: Tensor) -> None:
    """Have a network that is compiled be so before the first update: by one step of a micro-batch, filled up."""
    device = trainer.accelerator.device
    trajectories = stored.read(units.flatten().tolist()).to(device)
    local = torch.arange(units.numel()).view(units.shape)
    advantages = torch.ones(trajectories.log_probs.shape, device=device)

    def one_step(size: int) -> None:
        cut, _ = micro_batches(local, 0, 1, max(1, size // units[0].numel()), constant=True)
        with trainer.accelerator.no_sync(trainer.model.network):
            values = trainer.loss(trajectories, advantages, cut[0].to(device), torch.tensor([0], device=device))
            values.loss.sum().backward()

    trainer.sizes.fit("train.micro_batch_size", one_step)
    trainer.optimizer.zero_grad()


def make_trainer(plan: Plan, accelerator: Accelerator, model: Model, source: Path | None) -> Trainer:
    """Optimizer (with the state saved beside `source`), prepared network, sampler and objective."""
    sampling, training = plan.settings.sampling, plan.settings.training
    table = model.sampler(sampling.num_steps, sampling.eta)
    require_stochastic(table, plan.num_trained_steps)
    if training.gradient_checkpointing:
        model.checkpoint_gradients()
    parameters = model.trainable()
    optimizer = make_optimizer(training.optimizer, list(parameters.values()), scaled=accelerator.scaler is not None)
    state = read_state(source) if source else None
    if state:
        load_optimizer(source, optimizer, list(parameters))
    model.network, optimizer = accelerator.prepare(model.network, optimizer)
    if state and state["scaler"] and accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    loss = PolicyLoss(
        model=model,
        table=table,
        step_weight=step_weights(table, plan.num_trained_steps, training.step_weight),
        objective=training.objective,
        guidance_scale=sampling.guidance_scale,
        unconditional_gradient=training.unconditional_gradient,
    )
    compiled = plan.settings.compute.compile
    sizes = BatchSizes(
        plan.stage.root,
        accelerator.device,
        {"train.micro_batch_size": training.micro_batch_size},
        alone=accelerator.num_processes == 1,
        given=[plan.settings.model.resolution, compiled, training.gradient_checkpointing],
    )
    max_grad_norm = training.optimizer.max_grad_norm
    return Trainer(plan.stage, accelerator, loss, optimizer, max_grad_norm, sizes, constant_shape=compiled)


def make_optimizer(optimizer: Optimizer, parameters: list[Tensor], *, scaled: bool) -> torch.optim.Optimizer:
    """AdamW; on CUDA one kernel for all of a LoRA's small matrices, but not under fp16's `scaled` loss: accelerate would not
    hear from it that an update was skipped."""
    if optimizer.use_8bit:
        try:
            from bitsandbytes.optim import AdamW8bit as AdamW
        except ImportError:
            raise ImportError("train.use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from None
    else:
        AdamW = partial(torch.optim.AdamW, fused=parameters[0].is_cuda and not scaled)
    return AdamW(
        parameters,
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        weight_decay=optimizer.weight_decay,
        eps=optimizer.epsilon,
    )


def micro_batches(
    units: Tensor, process: int, num_processes: int, size: int, *, constant: bool = False
) -> tuple[Tensor, Tensor]:
    """One process's share of an update, in B micro-batches of M <= `size` units: units [B,M] or [B,M,2], counts [B,M]; of
    M = `size` in every update where it is `constant`.

    Every process gets as many micro-batches of the same shape, filled up with units that count 0, so that none waits for
    another and no trajectory is lost or counted twice.
    """
    share = math.ceil(len(units) / num_processes)
    number = math.ceil(share / size)
    length = (size if constant else math.ceil(share / number)) * number
    mine = units[process * share : (process + 1) * share]
    missing = length - len(mine)
    counts = torch.cat([torch.ones(len(mine)), torch.zeros(missing)])
    mine = torch.cat([mine, units[:1].expand(missing, *units.shape[1:])])
    return mine.unflatten(0, (number, -1)), counts.view(number, -1)
