"""One restartable training loop, shared by the three networks of the embedded world."""

import logging
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

log = logging.getLogger(__name__)

BUILD_DIR = Path("model/shapes/.build")  # rendered scenes, latents and checkpoints of unfinished stages
LOG_EVERY, SAVE_EVERY = 50, 250  # steps


def fit(
    name: str,
    model: nn.Module,
    loss_at: Callable[[int, torch.Generator], torch.Tensor],
    *,
    num_steps: int,
    peak_lr: float,
    seed: int,
    weight_decay: float = 0.01,
    ema_decay: float = 0.0,
    anneal: bool = True,
    on_save: Callable[[nn.Module, int], None] | None = None,
) -> nn.Module:
    """Train with AdamW and a one-cycle rate; returns the model, or its running average if `ema_decay` is set.

    Without `anneal` the rate stays at its peak, so that `num_steps` can be chosen by looking at the snapshots.
    The noise of each step depends on (seed, step) alone, so an interrupted run goes on where it stopped.
    """
    path = BUILD_DIR / f"{name}.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    if anneal:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=num_steps + 1, pct_start=0.1)
    else:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    average = deepcopy(model).requires_grad_(False)
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    step = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        for part, value in parts.items():
            value.load_state_dict(saved[part])
        step = saved["step"]
        log.info("%s: going on from step %d of %d", name, step, num_steps)
    model.train()
    running, started, first = [], time.monotonic(), step
    while step < num_steps:
        loss = loss_at(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        step += 1
        # The average forgets its random start: early on it follows the weights closely.
        decay = min(ema_decay, step / (step + 10)) if ema_decay else 0.0
        for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
            slow.data.lerp_(fast.data, 1 - decay)
        running.append(loss.item())
        if step % LOG_EVERY == 0:
            per_step_sec = (time.monotonic() - started) / (step - first)
            left_min = per_step_sec * (num_steps - step) / 60
            loss_text = f"loss {sum(running) / len(running):.5f}, {per_step_sec:.2f} s a step"
            log.info("%s: step %d of %d, %s, %.0f min left", name, step, num_steps, loss_text, left_min)
            running.clear()
        if step % SAVE_EVERY == 0 or step == num_steps:
            save_state({**{part: value.state_dict() for part, value in parts.items()}, "step": step}, path)
            if on_save:
                on_save(average, step)
    return average.eval()


def save_state(state: dict, path: Path) -> None:
    """Write a checkpoint in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    torch.save(state, unfinished)
    unfinished.replace(path)
