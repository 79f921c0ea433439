"""A LoRA on a base model's network: adding it, and reading and writing its files (low-rank adaptation, arXiv 2106.09685).

    W x  ->  W x + (alpha / rank) B A x        A [r,in], B [out,r]; here alpha = rank

Training writes files with diffusers' keys, `unet.<module>.lora_A.weight` and `unet.<module>.lora_B.weight`. Files of other
programs (peft, kohya's scripts, the paper's repository) are converted to these keys. `LoraSpec` says what differs between
families, the targets too: each family's module has its own.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from b2diffurl.algorithm.seeding import stable_seed
from b2diffurl.runtime import files

State = dict[str, Tensor]  # a LoRA's tensors under diffusers' keys


@dataclass(frozen=True)
class LoraSpec:
    """Which layers of a family's network carry the LoRA, and how its files name them."""

    prefix: str  # the first part of each key, a part of the pipeline: unet
    title: str  # that part's name in messages: UNet
    targets: tuple[str, ...]  # the linear layers that carry it, by the ends of their names
    to_diffusers: Callable[[State], State]  # converts another program's keys to diffusers' keys

    def key(self, name: str) -> str:
        """The key in pytorch_lora_weights.safetensors of the network's parameter `name`."""
        return f"{self.prefix}." + name.replace(".default.", ".")

    def has_key(self, key: str) -> bool:
        """Whether a key is one that this family's LoRA files may have."""
        return re.fullmatch(rf"{self.prefix}\..+\.lora_[AB]\.weight", key) is not None


# ---- on a network ----


def add_lora(network: nn.Module, spec: LoraSpec, *, rank: int, seed: int) -> None:
    """Add a LoRA to a network of diffusers: alpha = rank, A gaussian, B zero, float32 whatever the network's precision.

    B = 0, so that the network's output does not change until the first update.
    """
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(spec.targets))
    # peft draws A from the global generator. Its state is restored, so that nothing else depends on this.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(seed, "lora"))
        network.add_adapter(config)
    for parameter in lora_parameters(network).values():
        parameter.data = parameter.data.float()


def lora_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA's parameters by name, in the network's order."""
    return {name: parameter for name, parameter in network.named_parameters() if ".lora_" in name}


def load_lora(network: nn.Module, path: Path, spec: LoraSpec) -> None:
    """Copy a LoRA file of any program into the network's LoRA; a ValueError says which keys or shapes do not fit."""
    parameters = {spec.key(name): parameter for name, parameter in lora_parameters(network).items()}
    state = files.read_tensors(path)
    if state.keys() != parameters.keys():  # not diffusers' own format; read it as that of another program
        state = foreign_lora(path, spec)
    if state.keys() != parameters.keys():
        odd = sorted(state.keys() ^ parameters.keys())
        raise ValueError(
            f"{path} does not fit: {len(odd)} keys differ, such as {odd[0]}. "
            f"It must be a LoRA on the {spec.title}'s attention ({', '.join(spec.targets)}) of this base model."
        )
    scale = recorded_scale(path, spec)
    for key, parameter in parameters.items():
        if state[key].shape != parameter.shape:
            shapes = f"{tuple(state[key].shape)}, not {tuple(parameter.shape)}"
            raise ValueError(f"{path} does not fit: {key} is {shapes}. Set train.lora_rank to its rank.")
        # The network has alpha = rank, so another scale goes into B.
        parameter.data.copy_(state[key] * scale if ".lora_B." in key else state[key])


def count_numbers(weights: Sequence[Path], spec: LoraSpec) -> int:
    """How many numbers a LoRA of rank 1 has, from the shapes [out,in] of its layers; reads the files' headers only."""
    targets, shapes = re.compile(rf"\.({'|'.join(map(re.escape, spec.targets))})\.weight$"), {}
    for path in weights:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if targets.search(name)]  # noqa: SIM118
            shapes |= {name: file.get_slice(name).get_shape() for name in names}
    return sum(rows + columns for rows, columns in shapes.values())


# ---- reading files ----


def read_lora(path: Path, spec: LoraSpec) -> State:
    """Read a LoRA file of any program: float32 under diffusers' keys, alpha = rank (another alpha is folded into B).

    A ValueError says why it is not a LoRA of one rank on this family's network.
    """
    state = files.read_tensors(path)
    if not all(map(spec.has_key, state)):
        state = foreign_lora(path, spec)
    odd = [key for key in state if not spec.has_key(key)]
    if odd or not state:
        raise ValueError(f"{path} is no LoRA on a {spec.title}: it holds {odd[0] if odd else 'nothing'}.")
    ranks = {len(value) for key, value in state.items() if ".lora_A." in key}  # A is [r,in]
    if len(ranks) > 1:
        raise ValueError(f"{path} has layers of ranks {sorted(ranks)}; only a LoRA of one rank can be exported.")
    scale = recorded_scale(path, spec)
    return {key: (value.float() * (scale if ".lora_B." in key else 1)).contiguous() for key, value in state.items()}


def rank_of(state: Mapping[str, Tensor]) -> int:
    return next(len(value) for key, value in state.items() if ".lora_A." in key)


def recorded_scale(path: Path, spec: LoraSpec) -> float:
    """alpha / rank, from the metadata that diffusers writes into a LoRA file; 1 if there is none.

    A ValueError names variants of LoRA that one factor cannot express, such as DoRA.
    """
    with safe_open(path, framework="pt") as file:
        recorded = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    several = ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern")
    unsupported = [key for key in several if recorded.get(f"{spec.prefix}.{key}")]
    if unsupported:
        raise ValueError(f"{path} has {', '.join(unsupported)}; only a plain LoRA of one rank and alpha can be resumed.")
    return recorded.get(f"{spec.prefix}.lora_alpha", 1) / recorded.get(f"{spec.prefix}.r", 1)


def foreign_lora(path: Path, spec: LoraSpec) -> State:
    """Read a LoRA file of kohya's scripts or of the paper's repository, under diffusers' keys.

    kohya stores an alpha for each layer; alpha / rank is folded into B. A ValueError refuses a DoRA, and a LoRA that also
    changes a text encoder.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    state = files.read_tensors(path)
    if any("dora_scale" in key for key in state):
        raise ValueError(f"{path} is a DoRA; only a plain LoRA of one rank and alpha can be resumed.")
    for key in [key for key in state if key.endswith(".alpha")]:
        module, alpha = key.removesuffix(".alpha"), state.pop(key).item()
        up, rank = state[f"{module}.lora_up.weight"], len(state[f"{module}.lora_down.weight"])
        state[f"{module}.lora_up.weight"] = up.float() * (alpha / rank)
    state = spec.to_diffusers(state)
    others = sorted(key for key in state if key.startswith("text_encoder"))
    if others:
        raise ValueError(
            f"{path} also changes the text encoder ({others[0]}); only a LoRA on the {spec.title} can be resumed."
        )
    prefix = f"{spec.prefix}."
    # Despite its name it converts the attention layers of any network.
    network = convert_unet_state_dict_to_peft({key.removeprefix(prefix): value for key, value in state.items()})
    return {f"{prefix}{key}": value for key, value in network.items()}


# ---- writing files ----


def write_diffusers(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a LoRA as `load_lora_weights` of diffusers reads it. Without metadata diffusers takes alpha = rank."""
    write_tensors(path, state, {"format": "pt"})


def write_kohya(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA under kohya's keys. The converter of diffusers writes alpha = rank, which holds here."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    write_tensors(path, convert_state_dict_to_kohya(dict(state)), metadata)


def write_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. Give one key of metadata: several are written in an order that varies."""
    files.write_bytes(path, safetensors.torch.save(dict(state), metadata=dict(metadata)))
