"""One update of the LoRA by gradient accumulation over micro-batches, steps and processes.

The gradient is that of the mean loss over units and steps. How memory and processes cut the update up changes it by rounding
alone.

N trajectories, S trained steps, s of them in an update, W processes. For an objective on noised images a trajectory is an
image alone, and a step is a band of noise levels
U units: the loss has one term for each unit and step. A unit is a trajectory, or a contrast pair if the objective is paired
B micro-batches of M units
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from queue import Empty, SimpleQueue

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from b2diffurl.algorithm.average import Average
from b2diffurl.configuration.plan import Plan
from b2diffurl.configuration.settings import Optimizer
from b2diffurl.experiment.checkpoints import load_average, load_optimizer, read_state
from b2diffurl.experiment.stage import Stage
from b2diffurl.experiment.trajectories import SelectedTrajectories, Trajectories
from b2diffurl.models import Model
from b2diffurl.phases.losses import Loss, make_loss
from b2diffurl.phases.update_report import StepValues, UpdateReport, join, of_all_processes, refusal, update_metrics
from b2diffurl.runtime import threads
from b2diffurl.runtime.batch_sizes import BatchSizes
from b2diffurl.runtime.logs import logger


@dataclass
class Trainer:
    """Makes updates. It holds the policy, its loss and its optimizer; an update's trajectories are arguments."""

    stage: Stage
    accelerator: Accelerator
    loss: Loss
    optimizer: torch.optim.Optimizer
    max_grad_norm: float
    sizes: BatchSizes  # train.micro_batch_size: transitions the network sees at once
    average: Average | None = None  # of the LoRA over all updates
    constant_shape: bool = False  # pad micro-batches to the same shape in all updates, for a compiled network
    num_updates: int = 0  # of this stage
    bar: tqdm = field(default_factory=partial(tqdm, disable=True))  # counts the transitions of all processes

    @property
    def model(self) -> Model:
        return self.loss.policy.model

    def update(
        self,
        trajectories: Trajectories,
        advantages: Tensor,
        units: Tensor,
        steps: Sequence[int],
        owned: Tensor | None = None,
    ) -> dict:
        """Make one optimizer step on `units` [U] or [U,2], rows of `trajectories`, at `steps`, some of 0..S-1.

        `advantages` [N,S] are those of all transitions of `trajectories`. With `owned` [N,S] a trajectory is trained only
        where that is True (None: everywhere). Every process is given the whole update, computes its share, and returns the
        metrics over all processes. Raises a FloatingPointError if a number is not finite.
        """
        # A stage's first update never mixes steps in a micro-batch, so that its metrics have each step's gradient norm.
        apart = self.num_updates == 0

        def accumulate(size: int) -> list[UpdateReport]:
            self.optimizer.zero_grad()  # of an attempt that ran out of memory
            return self.accumulate(trajectories, advantages, units, steps, owned, size=size, apart=apart)

        reports = self.sizes.fit("train.micro_batch_size", accumulate)
        # A copy from before clipping, for the evidence: clipping by a norm that is not finite spoils all of the gradient.
        gradient = self.gradient()
        norm = self.accelerator.clip_grad_norm_(list(self.model.trainable().values()), self.max_grad_norm)
        self.require_finite(reports, norm, gradient, trajectories)
        self.optimizer.step()
        if self.accelerator.optimizer_step_was_skipped:
            logger.warning("stage%d train: fp16 overflow, update %d is skipped", self.stage.index, self.num_updates)
        elif self.average:
            self.average.add(self.model.adapter_state())
        self.optimizer.zero_grad()
        self.num_updates += 1
        return update_metrics(reports, norm)

    def accumulate(
        self,
        trajectories: Trajectories,
        advantages: Tensor,
        units: Tensor,
        steps: Sequence[int],
        owned: Tensor | None = None,
        *,
        size: int,
        apart: bool,
    ) -> list[UpdateReport]:
        """Accumulate the gradient of the mean loss over all units and `steps`, at most `size` transitions at once.

        With `owned`, as in `update`, the mean is over what is owned. There is a report for each run of steps that train the
        same units: a single one without `owned`.
        """
        runs = runs_of_steps(units, steps, owned)
        # The sum of losses becomes their mean. Times W, because processes average their gradients instead of adding them up.
        scale = self.accelerator.num_processes / sum(len(some) * len(those) for some, those in runs)
        data = trajectories, advantages.to(self.accelerator.device)
        return [self.accumulate_run(data, *run, scale, size=size, apart=apart, last=run is runs[-1]) for run in runs]

    def accumulate_run(
        self,
        data: tuple[Trajectories, Tensor],
        units: Tensor,
        steps: Sequence[int],
        scale: float,
        *,
        size: int,
        apart: bool,
        last: bool,
    ) -> UpdateReport:
        """Accumulate `scale` times the gradient of the summed loss of all units at each of `steps`.

        `data` are trajectories and the advantages of their transitions. A micro-batch holds units at one step. If all units
        of this process fit into one, it may hold several steps, unless steps are to be kept `apart`. The report has each
        step's own gradient norm only if no two steps shared a micro-batch.
        """
        num_processes, siblings = self.accelerator.num_processes, units[0].numel()
        room = max(1, size // siblings)  # units that fit into a micro-batch
        number_at_once = self.number_at_once(units.numel() * len(steps), size)
        cut, counts = micro_batches(
            units, self.accelerator.process_index, num_processes, room,
            constant=self.constant_shape, multiple=min(number_at_once, self.number_at_once(units.numel(), size)),
        )  # fmt: skip
        num_real = counts.sum(1).int().tolist()  # units of each micro-batch, padding left out
        share = math.ceil(len(steps) / number_at_once)
        steps_at_once = 1 if apart or len(cut) > 1 else max(1, min(room // cut.shape[1], share))  # in a micro-batch
        # Move everything to the device now: a copy inside the loop would make the CPU wait for the GPU each time.
        device = self.accelerator.device
        cut, counts = cut.to(device), counts.to(device)
        chunks = torch.tensor(list(steps), device=device).split(steps_at_once)
        parts: list[StepValues] = []  # of a chunk
        step_values, norms, after = [], [], self.gradient()

        def compute(chunk: Tensor, number: int) -> tuple[StepValues, list[Tensor]]:
            # Processes exchange gradients as rarely as possible: once an update, or once a step if steps are kept apart.
            exchanges = number == len(cut) - 1 and (apart or (last and chunk is chunks[-1]))
            given = cut[number], counts[number], chunk, scale
            if number_at_once == 1:
                return self.add_gradient(self.loss, data, *given, last=exchanges), []
            return self.gradient_by_twin(data, *given)

        tasks = [(chunk, number) for chunk in chunks for number in range(len(cut))]
        computed = threads.side_by_side(lambda task: compute(*task), tasks, number_at_once)
        for (chunk, number), (values, gradients) in zip(tasks, computed, strict=True):
            add(self.model, gradients)
            self.bar.update(len(chunk) * num_real[number] * siblings * num_processes)
            parts.append(values)
            if number < len(cut) - 1:
                continue
            step_values.append(join(parts, -1))
            parts = []
            # The norm of what this step has added, if the gradient is that of all processes by now.
            if steps_at_once == 1 and (apart or num_processes == 1):
                before, after = after, self.gradient()
                norms.append((after - before).norm())
        values = join(step_values, 0)
        units, values = of_all_processes(cut.flatten(0, 1), values, counts.flatten(), self.accelerator.gather)
        step_norms = torch.stack(norms) / self.gradient_scale() if norms else None
        return UpdateReport(units, self.loss.timesteps(steps), values, step_norms)

    def number_at_once(self, num_transitions: int, size: int) -> int:
        """How many micro-batches are computed side by side: several on the CPU, where one process trains."""
        alone = self.accelerator.num_processes == 1 and not self.model.is_compiled
        return threads.at_once(num_transitions, size, self.accelerator.device) if alone else 1

    def add_gradient(
        self,
        loss: Loss,
        data: tuple[Trajectories, Tensor],
        units: Tensor,
        counts: Tensor,
        steps: Tensor,
        scale: float,
        *,
        last: bool,
    ) -> StepValues:
        """Add `scale` times the gradient of the weighted loss of `units` [M] at `steps` [s]. Padding has `counts` [M] of 0.

        With `last` the processes average the gradients that they have accumulated.
        """
        with nullcontext() if last else self.accelerator.no_sync(loss.policy.model.network):
            values = loss(*data, units, steps)
            step_losses = (values.loss * counts).sum(1)  # [s]
            self.accelerator.backward((step_losses * loss.step_weight[steps]).sum() * scale)
        return replace(values, loss=values.loss.detach())

    def gradient_by_twin(
        self, data: tuple[Trajectories, Tensor], units: Tensor, counts: Tensor, steps: Tensor, scale: float
    ) -> tuple[StepValues, list[Tensor]]:
        """What `add_gradient` would add, by a twin of the policy that is free, so that other threads can do the same."""
        try:
            loss = self.twins.get_nowait()
        except Empty:
            loss = replace(self.loss, policy=replace(self.loss.policy, model=self.model.twin()))
        parameters = loss.policy.model.trainable().values()
        for parameter in parameters:
            parameter.grad = None  # also of an attempt that ran out of memory
        values = self.add_gradient(loss, data, units, counts, steps, scale, last=True)
        gradients = [parameter.grad for parameter in parameters]
        self.twins.put(loss)
        return values, gradients

    @cached_property
    def twins(self) -> SimpleQueue[Loss]:
        return SimpleQueue()

    def gradient(self) -> Tensor:
        """A copy of the accumulated gradient of all parameters, as one vector."""
        grads = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self.model.trainable().values()
        ]
        return torch.cat([grad.flatten() for grad in grads])

    def gradient_scale(self) -> float:
        """The factor by which fp16's loss scaling multiplies gradients; 1 in other precisions."""
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0

    def require_finite(
        self, reports: Sequence[UpdateReport], norm: Tensor, gradient: Tensor, trajectories: Trajectories
    ) -> None:
        """Stop if a loss, log-probability or gradient is not finite: write evidence to debug/, raise a FloatingPointError.

        `norm` and `gradient` are from before clipping. A gradient may overflow under fp16: the loss scaler skips the update.
        """
        # Losses are gathered and gradients averaged over all processes, so every process comes to the same verdict.
        bad = [report for report in reports if not report.values.finite.all()]
        if not bad and (norm.isfinite() or self.accelerator.scaler):
            return
        parameters = self.model.trainable()
        # The copy is from before accelerate took fp16's loss scale out of the gradient.
        parts = (gradient / self.gradient_scale()).split([parameter.numel() for parameter in parameters.values()])
        gradients = {name: part.view_as(parameters[name]) for name, part in zip(parameters, parts, strict=True)}
        rank = self.accelerator.process_index
        # If only the gradient is not finite, the last report will do: it has all units, as each owns its last step.
        report = (bad or reports)[-1]
        raise refusal(report, norm, gradients, trajectories, self.stage, number=self.num_updates, rank=rank)


def add(model: Model, gradients: Sequence[Tensor | None]) -> None:
    """Add gradients to those of the model's parameters, if there are any."""
    for parameter, gradient in zip(model.trainable().values(), gradients, strict=False):
        if parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None:
            parameter.grad += gradient


def warm_up(trainer: Trainer, stored: SelectedTrajectories, units: Tensor, num_steps: int) -> None:
    """Compile a network that is to be compiled before the first update, by one full micro-batch at one step."""
    device = trainer.accelerator.device
    trajectories = trainer.loss.prepare(stored.read(units.flatten().tolist()), torch.Generator()).to(device)
    local = torch.arange(units.numel()).view(units.shape)
    advantages = torch.ones(len(trajectories), num_steps, device=device)

    def one_step(size: int) -> None:
        cut, _ = micro_batches(local, 0, 1, max(1, size // units[0].numel()), constant=True)
        with trainer.accelerator.no_sync(trainer.model.network):
            values = trainer.loss(trajectories, advantages, cut[0].to(device), torch.tensor([0], device=device))
            values.loss.sum().backward()

    trainer.sizes.fit("train.micro_batch_size", one_step)
    trainer.optimizer.zero_grad()  # compiling needed a backward pass, whose gradient means nothing


def make_trainer(
    plan: Plan, accelerator: Accelerator, model: Model, source: Path | None, old_lora: Mapping[str, Tensor]
) -> Trainer:
    """The trainer of a stage, with the optimizer state and the average that were saved beside the LoRA `source`, if any.

    `old_lora` has the LoRA's parameters of the policy that sampled the stage.
    """
    training = plan.settings.training
    compiled = plan.settings.compute.compile
    loss = make_loss(model, plan.settings.sampling, training, plan.window, old_lora, constant_shape=compiled)
    if training.gradient_checkpointing:
        model.checkpoint_gradients()
    parameters = model.trainable()
    rate = training.optimizer.rate(plan.stage.index, plan.settings.schedule.num_stages)
    optimizer = make_optimizer(training.optimizer, list(parameters.values()), rate, scaled=accelerator.scaler is not None)
    # A LoRA from elsewhere, to which resume_from may point, has no state beside it, and an average has no optimizer: AdamW
    # then starts afresh.
    state = read_state(source) if source else None
    if state and "optimizer" in state:
        load_optimizer(source, optimizer, list(parameters))
    model.network, optimizer = accelerator.prepare(model.network, optimizer)
    if state and state["scaler"] and accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    sizes = BatchSizes(
        plan.stage.root,
        accelerator.device,
        {"train.micro_batch_size": training.micro_batch_size},
        alone=accelerator.num_processes == 1,
        given=[plan.settings.model.resolution, compiled, training.gradient_checkpointing],
    )
    max_grad_norm, ema = training.optimizer.max_grad_norm, training.optimizer.ema
    average = load_average(source, ema, model.adapter_state()) if ema else None
    return Trainer(plan.stage, accelerator, loss, optimizer, max_grad_norm, sizes, average, constant_shape=compiled)


def make_optimizer(optimizer: Optimizer, parameters: list[Tensor], rate: float, *, scaled: bool) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' 8-bit AdamW, with this learning rate. `scaled` says that fp16's loss scaling is on.

    On CUDA AdamW is fused, one kernel for all of a LoRA's small matrices. Not with loss scaling: the fused optimizer skips
    updates by itself, and accelerate would not notice.
    """
    if optimizer.use_8bit:
        try:
            from bitsandbytes.optim import AdamW8bit as AdamW
        except ImportError:
            raise ImportError("train.use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from None
    else:
        AdamW = partial(torch.optim.AdamW, fused=parameters[0].is_cuda and not scaled)
    return AdamW(
        parameters,
        lr=rate,
        betas=optimizer.betas,
        weight_decay=optimizer.weight_decay,
        eps=optimizer.epsilon,
    )


def runs_of_steps(units: Tensor, steps: Sequence[int], owned: Tensor | None) -> list[tuple[Tensor, list[int]]]:
    """Cut an update into runs of consecutive steps that train the same units, (units, steps) each.

    `owned` [N,S] says which transitions of the N trajectories are trained; None: all. A step that trains none is left out.
    """
    if owned is None:
        return [(units, list(steps))]
    runs: list[tuple[Tensor, list[int]]] = []
    for step in steps:
        some = units[owned[units, step]]
        if runs and torch.equal(runs[-1][0], some):
            runs[-1][1].append(step)
        elif len(some):
            runs.append((some, [step]))
    return runs


def micro_batches(
    units: Tensor, process: int, num_processes: int, size: int, *, constant: bool = False, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Cut one process's share of an update into B micro-batches of M <= `size` units.

    Returns units [B,M] or [B,M,2] and counts [B,M], 0 for padding and 1 elsewhere. With `constant` M = `size` in every
    update. B is a multiple of `multiple`. All processes get the same B and M: they exchange gradients equally often, and
    none waits in vain for another.
    """
    share = math.ceil(len(units) / num_processes)
    number = math.ceil(share / size / multiple) * multiple  # B
    length = (size if constant else math.ceil(share / number)) * number  # B*M
    own = units[process * share : (process + 1) * share]
    missing = length - len(own)
    counts = torch.cat([torch.ones(len(own)), torch.zeros(missing)])
    # Any unit will do for padding. The share of the last process may be empty, so take the first unit of the update.
    own = torch.cat([own, units[:1].expand(missing, *units.shape[1:])])
    return own.unflatten(0, (number, -1)), counts.view(number, -1)
