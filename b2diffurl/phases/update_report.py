"""The metrics of an update, and the evidence that is kept if one of its numbers is not finite.

U units: the loss has one term for each unit and step. A unit is a trajectory, or a contrast pair if the objective is paired
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
    """The losses of U units at s steps, and the metrics that the objective returns beside them."""

    loss: Tensor  # [s,U]
    log_ratio: Tensor  # [s,U], or [s,2,U] for pairs
    clipped: Tensor  # [s,U], 1 where the objective has clipped the gradient
    others: dict[str, Tensor]  # metrics that only some objectives have, by name, such as `kl`: each [s,U] or [s,2,U]

    @property
    def finite(self) -> Tensor:
        """Whether the loss and the log-ratio of each unit are finite at each step, [s,U]; a pair has two log-ratios."""
        ratios = self.log_ratio.reshape(len(self.loss), -1, self.loss.shape[1])
        return self.loss.isfinite() & ratios.isfinite().all(1)

    def each(self, change: Callable[[Tensor], Tensor]) -> "StepValues":
        """The same values with `change` applied to every tensor.

        The order is fixed, so that `change` may be a collective operation, which all processes call in the same order.
        """
        first = (change(value) for value in (self.loss, self.log_ratio, self.clipped))
        return StepValues(*first, {name: change(value) for name, value in self.others.items()})


def join(parts: Sequence[StepValues], dim: int) -> StepValues:
    """Concatenate the values of several micro-batches: along dim -1 other units, along dim 0 other steps."""
    names = ("loss", "log_ratio", "clipped")
    first = (torch.cat([getattr(part, name) for part in parts], dim) for name in names)
    return StepValues(*first, {name: torch.cat([part.others[name] for part in parts], dim) for name in parts[0].others})


def of_all_processes(
    units: Tensor, values: StepValues, counts: Tensor, gather: Callable[[Tensor], Tensor]
) -> tuple[Tensor, StepValues]:
    """Gather the units of all processes and their values. Padding, with `counts` of 0, is left out."""
    real = gather(counts).nonzero().flatten()

    def gather_units(value: Tensor) -> Tensor:
        # `gather` joins along the first dimension, here the steps; the units are the last one.
        parts = gather(value).unflatten(0, (-1, len(value)))  # [W,s,U] or [W,s,2,U]
        return parts.movedim(0, -2).flatten(-2)[..., real]

    return gather(units)[real], values.each(gather_units)


@dataclass(frozen=True)
class UpdateReport:
    """What an update, or some steps of it, was computed from, over all processes."""

    units: Tensor  # [U] or [U,2], rows of the update's trajectories
    timesteps: list[float]  # [s]
    values: StepValues
    step_norms: Tensor | None  # [s] norm of each step's own gradient; None if steps have shared a micro-batch

    def table(self) -> Tensor:
        """Each step's largest |log-ratio|, and its means over all units, [4+,s]: loss, clipped, |log-ratio|, the others."""
        values = self.values
        figures = [values.loss, values.clipped, values.log_ratio.abs(), *values.others.values()]
        rows = [torch.stack([step.flatten().mean() for step in figure]) for figure in figures]
        largest = torch.stack([step.abs().max() for step in values.log_ratio])
        return torch.stack([row.float() for row in (largest, *rows)])


def update_metrics(reports: Sequence[UpdateReport], norm: Tensor) -> dict[str, Any]:
    """An update's metrics for metrics/train.jsonl: means over all transitions, and for each timestep.

    `norm` is the norm of the whole gradient. It becomes None if it is not finite, which JSON cannot hold.
    """
    table = torch.cat([report.table() for report in reports], 1)
    norms = [report.step_norms for report in reports if report.step_norms is not None]
    with_norms = len(norms) == len(reports)
    rows = [norm.float().expand(1, table.shape[1]), table, *([torch.cat(norms).float()[None]] if with_norms else [])]
    # One table of all figures, because each transfer from the device makes the CPU wait.
    (total, *_), largest, loss, clipped, log_ratio, *more = torch.cat(rows).tolist()
    # A step weighs as much as it has transitions.
    counts = [len(report.units) for report in reports for _ in report.timesteps]
    weights = [count / max(counts) for count in counts]
    others = dict(zip(reports[0].values.others, more, strict=False))  # `more` may end with the steps' gradient norms
    metrics = {name: mean(row, weights) for name, row in others.items()} | {
        **{f"{name}_per_step": row for name, row in others.items()},
        "loss": mean(loss, weights),
        "grad_norm": files.finite(total),
        "clip_fraction": mean(clipped, weights),
        "max_abs_log_ratio": max(largest),
        "timesteps": [t for report in reports for t in report.timesteps],
        "log_ratio_per_step": log_ratio,
        "clip_fraction_per_step": clipped,
    }
    if with_norms:
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
    """Write the evidence of an update that is not finite to debug/ and return the error to raise.

    The file is update_<number>_rank<rank>.safetensors. It has the states of the units whose loss or log-ratio is not finite,
    or of all units if only the gradient is not. `gradients`, by parameter, and their `norm` are from before clipping.
    """
    fine = report.values.finite.all(0).cpu()  # [U]
    units = report.units.cpu()
    rows = (units if fine.all() else units[~fine]).flatten()
    ids = trajectories.ids[rows].tolist()
    tensors = {
        "latents": trajectories.latents[rows],
        "log_probs": trajectories.log_probs[rows],
        **{name: getattr(trajectories, name)[rows] for name in ("level", "eps") if hasattr(trajectories, name)},
        "losses": report.values.loss.T.contiguous(),  # [U,s]
        "log_ratios": report.values.log_ratio.flatten(1).T.contiguous(),  # [U,s], or [2U,s] for pairs
    }
    facts = {"update": number, "timesteps": report.timesteps, "grad_norm": str(norm.item())}
    facts |= {"images": ids, "images_of_losses": trajectories.ids[units].tolist()}
    problem = f"the loss or log-probability of images {listed(ids)} is not finite"
    if fine.all():
        problem = f"the gradient is not finite, though the losses of images {listed(ids)} are"
    message = f"stage{stage.index}, update {number}: {problem}"
    return not_finite(stage, f"update_{number:05d}_rank{rank}", message, tensors | spoiled(gradients), facts)


def spoiled(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients that are not finite, as `gradient.<name>`; all of them if only their norm has overflowed."""
    named = {f"gradient.{name}": gradient for name, gradient in gradients.items()}
    return {name: gradient for name, gradient in named.items() if not gradient.isfinite().all()} or named


def mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
