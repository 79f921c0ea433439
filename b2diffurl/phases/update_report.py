"""What is said of an update: its metrics, and its evidence when it is not finite.

U units: what one term of the loss is of, a trajectory, or a group's best and worst
s steps of the update, W processes
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from b2diffurl.experiment.not_finite import listed, not_finite
from b2diffurl.experiment.stage import Stage
from b2diffurl.experiment.trajectories import Trajectories
from b2diffurl.runtime import files


@dataclass(frozen=True)
class StepValues:
    """The loss of U units at s steps, and the objective's metrics of them."""

    loss: Tensor  # [s,U]
    log_ratio: Tensor  # [s,U], or of pairs [s,2,U]
    clipped: Tensor  # [s,U]: 1 where the loss has cut the gradient
    others: dict[str, Tensor]  # the objective's own, by name, such as `kl`: each [s,U] or [s,2,U]

    @property
    def finite(self) -> Tensor:
        """Whether the loss and the log-probabilities of each unit are finite at each step, [s,U]."""
        ratios = self.log_ratio.reshape(len(self.loss), -1, self.loss.shape[1])
        return self.loss.isfinite() & ratios.isfinite().all(1)

    def each(self, change: Callable[[Tensor], Tensor]) -> "StepValues":
        """`change` of every tensor, in an order that all processes share."""
        first = (change(value) for value in (self.loss, self.log_ratio, self.clipped))
        return StepValues(*first, {name: change(value) for name, value in self.others.items()})


def join(parts: Sequence[StepValues], dim: int) -> StepValues:
    """Values of several micro-batches: of other units, along dim -1, or of other steps, along dim 0."""
    names = ("loss", "log_ratio", "clipped")
    first = (torch.cat([getattr(part, name) for part in parts], dim) for name in names)
    return StepValues(*first, {name: torch.cat([part.others[name] for part in parts], dim) for name in parts[0].others})


def of_all_processes(
    units: Tensor, values: StepValues, counts: Tensor, gather: Callable[[Tensor], Tensor]
) -> tuple[Tensor, StepValues]:
    """The units of all processes and their values, without those that only fill up micro-batches: they have `counts` 0."""
    real = gather(counts).nonzero().flatten()

    def together(value: Tensor) -> Tensor:
        parts = gather(value).unflatten(0, (-1, len(value)))  # [W,s,U] or [W,s,2,U]
        return parts.movedim(0, -2).flatten(-2)[..., real]

    return gather(units)[real], values.each(together)


@dataclass(frozen=True)
class UpdateReport:
    """What an update was computed from, of all processes."""

    units: Tensor  # [U] or [U,2], rows of the update's trajectories
    timesteps: list[int]  # [s]
    values: StepValues
    step_norms: Tensor | None  # [s] norm of the gradient that each step alone adds; None where steps share micro-batches

    def metrics(self, norm: Tensor) -> dict[str, Any]:
        """As metrics/train.jsonl has them, over all units and for each timestep; `norm` is that of the whole gradient.

        Everything comes from the device in one transfer.
        """
        values, names = self.values, list(self.values.others)
        figures = [values.loss, values.clipped, values.log_ratio.abs(), *values.others.values()]
        rows = [torch.stack([step.flatten().mean() for step in figure]) for figure in figures]
        largest = torch.stack([step.abs().max() for step in values.log_ratio])
        norms = [] if self.step_norms is None else [self.step_norms]
        table = [norm.expand(len(largest)), largest, *rows, *norms]
        (total, *_), largest, loss, clipped, log_ratio, *more = torch.stack([row.float() for row in table]).tolist()
        others = dict(zip(names, more, strict=False))
        metrics = {name: mean(row) for name, row in others.items()} | {
            **{f"{name}_per_step": row for name, row in others.items()},
            "loss": mean(loss),
            "grad_norm": files.finite(total),
            "clip_fraction": mean(clipped),
            "max_abs_log_ratio": max(largest),
            "timesteps": self.timesteps,
            "log_ratio_per_step": log_ratio,
            "clip_fraction_per_step": clipped,
        }
        if self.step_norms is not None:
            metrics["grad_norm_per_step"] = [files.finite(value) for value in more[-1]]
        return metrics


def refusal(
    report: UpdateReport,
    norm: Tensor,
    gradients: dict[str, Tensor],
    trajectories: Trajectories,
    stage: Stage,
    *,
    number: int,
    rank: int,
) -> FloatingPointError:
    """The error to raise on an update that is not finite, with its evidence in debug/update_<number>_rank<rank>.safetensors.

    That is of the units whose loss or log-probability is not finite; where only the gradient is not, of all of them.
    `gradients` are by parameter, as they were before their `norm` was clipped.
    """
    fine = report.values.finite.all(0).cpu()  # [U]
    units = report.units.cpu()
    rows = (units if fine.all() else units[~fine]).flatten()
    ids = trajectories.ids[rows].tolist()
    tensors = {
        "latents": trajectories.latents[rows],
        "log_probs": trajectories.log_probs[rows],
        "losses": report.values.loss.T.contiguous(),  # [U,s]
        "log_ratios": report.values.log_ratio.flatten(1).T.contiguous(),  # [U,s], of pairs [2U,s]
    }
    facts = {"update": number, "timesteps": report.timesteps, "grad_norm": str(norm.item())}
    facts |= {"images": ids, "images_of_losses": trajectories.ids[units].tolist()}
    what = f"the loss or log-probability of images {listed(ids)} is not finite"
    if fine.all():
        what = f"the gradient is not finite, though the losses of images {listed(ids)} are"
    said = f"stage{stage.index}, update {number}: {what}"
    return not_finite(stage, f"update_{number:05d}_rank{rank}", said, tensors | spoiled(gradients), facts)


def spoiled(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of each parameter whose gradient is not finite `gradient.<name>`; of all where their norm alone overflowed."""
    named = {f"gradient.{name}": gradient for name, gradient in gradients.items()}
    return {name: gradient for name, gradient in named.items() if not gradient.isfinite().all()} or named


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
