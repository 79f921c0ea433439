"""Sampled trajectories on disk: one safetensors file a sampling batch, each state stored once.

G groups a batch, K branches, S trained steps, P distinct prompts, N selected trajectories
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from b2diffurl import files
from b2diffurl.selection import Selected
from b2diffurl.stage import Stage

Conditions = dict[str, Tensor]  # what the network is conditioned on, by name: each [N, ...]


@dataclass(frozen=True)
class Trajectories:
    """Trajectories with the text conditions they were sampled under."""

    ids: Tensor  # [N] each one's image
    latents: Tensor  # [N,S+1,C,H,W] float32: x_t from the first trained step to the image
    log_probs: Tensor  # [N,S] float32
    prompt_ids: Tensor  # [N] row of each trajectory in `conditions`
    conditions: Conditions  # each [P, ...]
    unconditional: Conditions  # each [1, ...]

    def __len__(self) -> int:
        return len(self.latents)


def save_batch(
    path: Path,
    latents: Tensor,  # [G,K,S+1,C,H,W]
    log_probs: Tensor,  # [G,K,S]
    timesteps: Tensor,  # [S]
    prompts: Sequence[str],  # [G]
    conditions: Conditions,  # each [P, ...], in the order of dict.fromkeys(prompts)
    unconditional: Conditions,  # each [1, ...]
    metadata: dict,
) -> None:
    """Write one sampling batch; `metadata` says what it was sampled with."""
    distinct = list(dict.fromkeys(prompts))
    tensors = {
        "latents": latents,
        "log_probs": log_probs,
        "timesteps": timesteps,
        "prompt_ids": torch.tensor([distinct.index(prompt) for prompt in prompts]),
    }
    tensors |= {f"condition.{name}": value for name, value in conditions.items()}
    tensors |= {f"unconditional.{name}": value for name, value in unconditional.items()}
    files.write_tensors(path, tensors, metadata | {"prompts": distinct})


def load_selected(stage: Stage, selected: Sequence[Selected], batch_size: int) -> Trajectories:
    """Read the selected trajectories, in order of their groups, from the stage's batches of `batch_size` groups."""
    ids, latents, log_probs, prompt_ids = [], [], [], []
    prompt_rows: dict[str, int] = {}  # of every prompt seen so far, its row in the conditions
    conditions: dict[str, list[Tensor]] = {}
    unconditional: Conditions = {}
    for batch, members in groupby(selected, key=lambda one: one.group // batch_size):
        path = stage.batch(batch)
        prompts = files.read_metadata(path)["prompts"]
        with safe_open(path, framework="pt") as file:
            all_latents, all_log_probs = file.get_slice("latents"), file.get_slice("log_probs")
            rows = file.get_tensor("prompt_ids")
            stored = {name: file.get_tensor(f"condition.{name}") for name in names_under("condition.", file)}
            unconditional = {name: file.get_tensor(f"unconditional.{name}") for name in names_under("unconditional.", file)}
        for one in members:
            g = one.group % batch_size
            prompt = prompts[rows[g]]
            if prompt not in prompt_rows:
                prompt_rows[prompt] = len(prompt_rows)
                for name, value in stored.items():
                    conditions.setdefault(name, []).append(value[rows[g]])
            ids.append(one.group * all_latents.get_shape()[1] + one.branch)
            latents.append(all_latents[g, one.branch])
            log_probs.append(all_log_probs[g, one.branch])
            prompt_ids.append(prompt_rows[prompt])
    return Trajectories(
        ids=torch.tensor(ids),
        latents=torch.stack(latents),
        log_probs=torch.stack(log_probs),
        prompt_ids=torch.tensor(prompt_ids),
        conditions={name: torch.stack(values) for name, values in conditions.items()},
        unconditional=unconditional,
    )


def names_under(prefix: str, file: safe_open) -> list[str]:
    return [name.removeprefix(prefix) for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
