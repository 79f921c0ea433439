"""Sampled trajectories on disk: one safetensors file a sampling batch, each state stored once.

G groups a batch, K branches, S trained steps, P distinct prompts, N selected trajectories
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
    """Read the selected trajectories, and only them, from the stage's batches of `batch_size` groups."""
    latents, log_probs, prompt_ids, known, conditions = [], [], [], {}, {}
    unconditional = {}
    by_batch: dict[int, list[int]] = {}
    for n, chosen in enumerate(selected):
        by_batch.setdefault(chosen.group // batch_size, []).append(n)
    for batch, members in sorted(by_batch.items()):
        path = stage.batch(batch)
        prompts = files.read_metadata(path)["prompts"]
        with safe_open(path, framework="pt") as file:
            ids = file.get_tensor("prompt_ids").tolist()
            all_latents, all_log_probs = file.get_slice("latents"), file.get_slice("log_probs")
            stored = {name: file.get_tensor(name) for name in file.keys() if "." in name}  # noqa: SIM118
        for n in members:
            g, k = selected[n].group % batch_size, selected[n].branch
            latents.append((n, all_latents[g, k]))
            log_probs.append((n, all_log_probs[g, k]))
            prompt = prompts[ids[g]]
            prompt_ids.append((n, known.setdefault(prompt, len(known))))
            conditions.setdefault(
                prompt, {name.split(".", 1)[1]: v[ids[g]] for name, v in stored.items() if name.startswith("condition.")}
            )
        unconditional = {name.split(".", 1)[1]: v for name, v in stored.items() if name.startswith("unconditional.")}
    names = next(iter(conditions.values())).keys()
    return Trajectories(
        latents=in_order(latents),
        log_probs=in_order(log_probs),
        prompt_ids=in_order([(n, torch.tensor(id_)) for n, id_ in prompt_ids]),
        conditions={name: torch.stack([conditions[prompt][name] for prompt in known]) for name in names},
        unconditional=unconditional,
    )


def in_order(numbered: list[tuple[int, Tensor]]) -> Tensor:
    return torch.stack([tensor for _, tensor in sorted(numbered, key=lambda pair: pair[0])])
