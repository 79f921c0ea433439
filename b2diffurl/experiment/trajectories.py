"""Trajectories on disk: all those of a stage by sampling batch, and copies of the selected ones.

    samples/batch_<n>.safetensors    latents [G,K,S+1,C,h,w]: each state once, and not x_t and x_{t-1} of every transition
                                     log_probs [G,K,S], timesteps [S], prompt_ids [G], condition.<name> [P, ...],
                                     unconditional.<name> [1, ...]; metadata: the P prompts, what sampled them, checksums.
                                     An objective on noised images needs the images alone, as latents: S = 0
    selected/batch_<n>.safetensors   ids [N], latents [N,S+1,C,h,w], log_probs [N,S], prompt_ids [N], conditions as above

In a tree the two tensors above begin with the last parting. What siblings share before it is stored once, by depth d:

    samples/batch_<n>.safetensors    shared.<d>.latents [G,E,s,C,h,w], the state before each of the s steps of the depth's E
                                     edges; shared.<d>.log_probs [G,E,s]
    selected/batch_<n>.safetensors   shared.<d>.latents [M,s,C,h,w], shared.<d>.log_probs [M,s] of the M edges that any of
                                     the selected is on; shared.<d>.rows [N], each one's edge

G groups a batch, K branches, S trained steps, P distinct prompts, N selected trajectories
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from torch import Tensor

from b2diffurl.algorithm.selection import Selected
from b2diffurl.algorithm.tree import Tree
from b2diffurl.algorithm.types import Conditions
from b2diffurl.experiment.stage import Stage
from b2diffurl.runtime import files


@dataclass(frozen=True)
class Trajectories:
    """Trajectories with the text conditions they were sampled under. With S = 0 they are images alone."""

    ids: Tensor  # [N] of the images: group * K + branch
    latents: Tensor  # [N,S+1,C,h,w] float32: x_t from the first trained step to the image
    log_probs: Tensor  # [N,S] float32
    prompt_ids: Tensor  # [N] row of each trajectory in `conditions`
    conditions: Conditions  # each [P, ...]
    unconditional: Conditions  # each [1, ...]

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device) -> Self:
        """A copy on `device`. From pinned memory, so that the copying goes on beside the GPU's work."""

        def moved(value: Tensor | Conditions) -> Tensor | Conditions:
            if isinstance(value, dict):
                return {name: moved(one) for name, one in value.items()}
            return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)

        return replace(self, **{name: moved(value) for name, value in vars(self).items() if name != "ids"})


def save_batch(
    path: Path,
    latents: Tensor,  # [G,K,S+1,C,h,w]
    log_probs: Tensor,  # [G,K,S]
    timesteps: Tensor,  # [S]
    prompts: Sequence[str],  # [G]
    conditions: Conditions,  # each [P, ...], in the order of dict.fromkeys(prompts)
    unconditional: Conditions,  # each [1, ...]
    metadata: dict,
    beside: Sequence[Path] = (),  # files that belong to the batch and are already written: images, the branch picture
    *,
    tree: Tree,  # in which the K branches part
) -> None:
    """Write one sampling batch with checksums of itself and of the files `beside` it.

    `metadata` says what it was sampled with: batches of one stage must agree on it.
    """
    distinct = list(dict.fromkeys(prompts))  # a batch may ask for a prompt several times; it is stored once
    tensors = shared_steps({"latents": latents, "log_probs": log_probs}, tree) | {
        "timesteps": timesteps,
        "prompt_ids": torch.tensor([distinct.index(prompt) for prompt in prompts]),
    }
    tensors |= {f"condition.{name}": value for name, value in conditions.items()}
    tensors |= {f"unconditional.{name}": value for name, value in unconditional.items()}
    metadata = metadata | {"prompts": distinct}
    # Relative to the stage's folder, so that an experiment can be moved.
    metadata["files"] = {str(other.relative_to(path.parents[1])): files.sha256(other) for other in beside}
    files.write_tensors(path, tensors, metadata | {"sha256": files.tensors_sha256(tensors, metadata)})


def shared_steps(whole: dict[str, Tensor], tree: Tree) -> dict[str, Tensor]:
    """Tensors [G,K,S or S+1, ...] of whole trajectories as a batch's file has them: what branches share is there once."""
    tensors = {name: values[:, :, tree.starts[-1] :] for name, values in whole.items()}
    for depth, (start, stop) in enumerate(pairwise(tree.starts)):
        of_edges = slice(None, None, tree.leaves_below(depth))  # the first leaf below each edge
        tensors |= {f"shared.{depth}.{name}": values[:, of_edges, start:stop] for name, values in whole.items()}
    return tensors


def batch_damage(path: Path) -> str:
    """What is wrong with a sampling batch or with a file that belongs to it, in words; "" if both are whole."""
    try:
        metadata, tensors = files.read_metadata(path), files.read_tensors(path)
    except ValueError as error:
        return str(error)
    if "sha256" not in metadata:
        return f"{path} has no checksum; an earlier version wrote it"
    # Of the content and not of the file: the checksum itself stands in the file's metadata.
    if metadata.pop("sha256") != files.tensors_sha256(tensors, metadata):
        return f"{path} is not what was written (checksum)"
    for name, expected in metadata["files"].items():
        other = path.parents[1] / name
        if not other.is_file():
            return f"{other} is missing"
        if files.sha256(other) != expected:
            return f"{other} is not what was written (checksum)"
    return ""


def save_selected(stage: Stage, selected: Sequence[Selected], batch_size: int) -> list[Path]:
    """Copy the selected trajectories from the stage's batches of `batch_size` groups; returns the files written.

    A batch that has any gets a file, with a row for each, in the order of `selected`. After this the batches may be deleted.
    """
    written = []
    for batch, members in groupby(selected, key=lambda one: one.group // batch_size):  # `selected` is in order of group
        source, chosen = stage.batch(batch), list(members)
        prompts = files.read_metadata(source)["prompts"]
        with safe_open(source, framework="pt") as file:
            places = [(one.group % batch_size, one.branch) for one in chosen]
            # The conditions of the remaining prompts only; prompt_ids are numbered anew to fit.
            prompt_ids = file.get_tensor("prompt_ids")[[g for g, _ in places]]
            used, prompt_ids = prompt_ids.unique(return_inverse=True)
            num_branches = file.get_slice("latents").get_shape()[1]
            tensors = {
                "ids": torch.tensor([one.group * num_branches + one.branch for one in chosen]),
                **rows_at(file, "", places),
                "prompt_ids": prompt_ids,
            }
            for depth in shared_depths(file):
                num_leaves = num_branches // file.get_slice(f"shared.{depth}.latents").get_shape()[1]  # below an edge
                edges = [(g, k // num_leaves) for g, k in places]
                distinct = list(dict.fromkeys(edges))
                tensors |= rows_at(file, f"shared.{depth}.", distinct)
                tensors[f"shared.{depth}.rows"] = torch.tensor([distinct.index(edge) for edge in edges])
            for name in names_under("condition.", file):
                tensors[f"condition.{name}"] = file.get_tensor(f"condition.{name}")[used]
            for name in names_under("unconditional.", file):
                tensors[f"unconditional.{name}"] = file.get_tensor(f"unconditional.{name}")
        written.append(stage.selected_batch(batch))
        files.write_tensors(written[-1], tensors, {"prompts": [prompts[n] for n in used]})
    return written


def rows_at(file: safe_open, prefix: str, places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """The states and log-probabilities at these (group, branch or edge) of a batch, under their names in the file."""
    sources = {name: file.get_slice(name) for name in (f"{prefix}latents", f"{prefix}log_probs")}
    return {name: torch.stack([source[place] for place in places]) for name, source in sources.items()}


def shared_depths(file: safe_open) -> range:
    """The depths whose edges the file stores apart from the trajectories' own steps."""
    return range(len({name.split(".")[0] for name in names_under("shared.", file)}))


def trajectory_at(file: safe_open, row: int) -> tuple[Tensor, Tensor]:
    """The states [S+1,C,h,w] and log-probabilities [S] of a selected trajectory: of its shared edges, then its own."""
    edges = ((f"shared.{depth}.", file.get_tensor(f"shared.{depth}.rows")[row].item()) for depth in shared_depths(file))
    places = [*edges, ("", row)]
    latents, log_probs = (
        torch.cat([file.get_slice(prefix + name)[place] for prefix, place in places]) for name in ("latents", "log_probs")
    )
    return latents, log_probs


class SelectedTrajectories:
    """A stage's selected trajectories on disk. `read` loads those of one update: memory does not grow with the stage."""

    def __init__(self, stage: Stage, selected: Sequence[Selected], batch_size: int):
        self.places: list[tuple[Path, int]] = []  # file and row of each selected trajectory
        for batch, members in groupby(selected, key=lambda one: one.group // batch_size):
            self.places += [(stage.selected_batch(batch), row) for row, _ in enumerate(members)]

    def read(self, which: Sequence[int]) -> Trajectories:
        """The trajectories with the numbers `which` among the selected, in that order; conditions once a prompt."""
        loaded: dict[int, tuple[Tensor, Tensor, Tensor, str]] = {}
        embedded: dict[str, Conditions] = {}
        unconditional: Conditions = {}
        # Sorted, so that each file is opened once.
        for path, members in groupby(sorted(set(which)), key=lambda n: self.places[n][0]):
            prompts = files.read_metadata(path)["prompts"]
            with safe_open(path, framework="pt") as file:
                ids, prompt_ids = file.get_tensor("ids"), file.get_tensor("prompt_ids")
                conditions = {name: file.get_tensor(f"condition.{name}") for name in names_under("condition.", file)}
                unconditional = {
                    name: file.get_tensor(f"unconditional.{name}") for name in names_under("unconditional.", file)
                }
                for n in members:
                    row = self.places[n][1]
                    prompt = prompts[prompt_ids[row]]
                    latents, log_probs = trajectory_at(file, row)
                    loaded[n] = (ids[row], latents, log_probs, prompt)
                    # Several files may hold the same prompt.
                    embedded.setdefault(prompt, {name: value[prompt_ids[row]] for name, value in conditions.items()})
        rows = {prompt: row for row, prompt in enumerate(embedded)}
        ids, latents, log_probs, prompts = zip(*(loaded[n] for n in which), strict=True)
        return Trajectories(
            ids=torch.stack(ids),
            latents=torch.stack(latents),
            log_probs=torch.stack(log_probs),
            prompt_ids=torch.tensor([rows[prompt] for prompt in prompts]),
            conditions={
                name: torch.stack([each[name] for each in embedded.values()]) for name in next(iter(embedded.values()))
            },
            unconditional=unconditional,
        )


def names_under(prefix: str, file: safe_open) -> list[str]:
    """The file's tensors whose names begin with `prefix`, without it."""
    return [name.removeprefix(prefix) for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118


def read_batch_prompts(path: Path) -> tuple[list[int], list[str]]:
    """(prompt_ids, prompts) of a sampling batch: for each group the row of its prompt, and the distinct prompts."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("prompt_ids").tolist(), files.read_metadata(path)["prompts"]
