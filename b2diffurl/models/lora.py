"""A LoRA on a base model's network: adding it, and reading and writing its files (low-rank adaptation, arXiv 2106.09685).

    W x  ->  W x + (alpha / rank) B A x        A [r,in], B [out,r]; here alpha = rank

Training writes files with diffusers' keys, `unet.<module>.lora_A.weight` and `unet.<module>.lora_B.weight`. Files of other
programs (peft, kohya's scripts, the paper's repository) are converted to these keys. `LoraSpec` says what differs between
families, the targets too: each family's module has its own.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from b2diffurl.algorithm.seeding import stable_seed
from b2diffurl.runtime import files

State = dict[str, Tensor]  # a LoRA's tensors under diffusers' keys

PEFT_PREFIX, PEFT_CONFIG = "base_model.model.", "adapter_config.json"
# A key of half a layer's weights: X.lora_A of peft, X.lora_down of kohya, X.lora.down and X_lora.down of older diffusers.
WEIGHT = re.compile(r"(?P<layer>.+)[._]lora[._](?P<half>down|up|A|B)\.weight")
# Other kinds of adapters, by what only their keys have.
OTHER_KINDS = {
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "OFT": r"\.b?oft_",
    "GLoRA": r"\.[ab][12]\.weight",
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "LoCon with a third matrix": r"\.lora_mid\.",
    "(IA)^3": r"\.(on_input|ia3_l)\b",
    "VeRA": r"\.vera_lambda",
    "full difference of weights": r"\.(diff|diff_b|w_norm|b_norm|set_weight)$",
}
# What peft may record that no one factor alpha / rank expresses, and ways to begin that change the base's weights, too.
NOT_PLAIN = ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern")
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraSpec:
    """Which layers of a family's network carry the LoRA, and how its files name them."""

    prefix: str  # the first part of each key, a part of the pipeline: unet
    title: str  # that part's name in messages: UNet
    targets: tuple[str, ...]  # the linear layers that carry it, by the ends of their names
    mlps: tuple[str, ...]  # those that may carry it beside, of the MLPs
    layers: str  # how the names of the network's layers begin, a regular expression
    to_diffusers: Callable[[State], State]  # converts another program's keys to diffusers' keys

    def chosen(self, *, mlp: bool) -> "LoraSpec":
        """The same with the MLPs among the targets, if `mlp`."""
        return replace(self, targets=(*self.targets, *self.mlps)) if mlp else self

    def key(self, name: str) -> str:
        """The key in pytorch_lora_weights.safetensors of the network's parameter `name`."""
        return f"{self.prefix}." + name.replace(".default.", ".")

    def has_key(self, key: str) -> bool:
        """Whether a key is one that this family's LoRA files may have."""
        return re.fullmatch(rf"{self.prefix}\.({self.layers})(\..+)?\.lora_[AB]\.weight", key) is not None


# ---- on a network ----


def add_lora(network: nn.Module, spec: LoraSpec, *, rank: int, seed: int) -> None:
    """Add a LoRA to a network of diffusers: alpha = rank, A gaussian, B zero, float32 whatever the network's precision.

    B = 0, so that the network's output does not change until the first update.
    """
    from peft import LoraConfig

    from b2diffurl.models.lora_layer import LoraLinear

    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(spec.targets))
    config._register_custom_module({nn.Linear: LoraLinear})
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
    state = read_lora(path, spec)
    if state.keys() != parameters.keys():
        odd = sorted(state.keys() ^ parameters.keys())
        raise ValueError(
            f"{path} does not fit: {len(odd)} keys differ, such as {odd[0]}. "
            f"It must be a LoRA on the {spec.title}'s attention, and with train.lora_mlp on its MLPs, of this base model: "
            f"on {', '.join(spec.targets)}."
        )
    if (rank := rank_of(state)) != rank_of(parameters):
        raise ValueError(f"{path} does not fit: its rank is {rank}, not {rank_of(parameters)}. Set train.lora_rank={rank}.")
    for key, parameter in parameters.items():
        if state[key].shape != parameter.shape:
            shapes = f"{tuple(state[key].shape)}, and this base model needs {tuple(parameter.shape)}"
            raise ValueError(f"{path} does not fit: {key} is {shapes}. Take the base model that it was trained on.")
        parameter.data.copy_(state[key])


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
    require_plain(path, state)
    recorded = adapter_config(path, state, spec)
    state = under_diffusers_keys(path, fold_alphas(path, state), spec)
    ranks = {len(value) for key, value in state.items() if ".lora_A." in key}  # A is [r,in]
    if len(ranks) > 1:
        raise ValueError(f"{path} has layers of ranks {sorted(ranks)}; only a LoRA of one rank can be read.")
    scale = recorded_scale(path, recorded, min(ranks))
    state = {key: (value.float() * (scale if ".lora_B." in key else 1)).contiguous() for key, value in state.items()}
    # Last, so that an alpha that is no number is found, too.
    if damaged := next((key for key, value in state.items() if not value.isfinite().all()), ""):
        raise ValueError(f"{path} holds NaN or infinite values, in {damaged}. Take another LoRA, or an earlier checkpoint.")
    return state


def rank_of(state: Mapping[str, Tensor]) -> int:
    return next(len(value) for key, value in state.items() if ".lora_A." in key)


def require_plain(path: Path, state: State) -> None:
    """Refuse an adapter of another kind, such as LoHa, by its name."""
    for kind, pattern in OTHER_KINDS.items():
        if key := next((key for key in state if re.search(pattern, key)), ""):
            raise ValueError(f"{path} is a {kind} ({key}); only a plain LoRA of one rank and alpha can be read.")


def fold_alphas(path: Path, state: State) -> State:
    """Multiply each layer's B by the alpha / rank that the file states for it, as kohya's do; the alphas are left out.

    A ValueError names a matrix or an alpha that lacks its counterpart.
    """
    layers: dict[str, dict[str, str]] = {}  # {layer: {A or B: key}}
    for key in state:
        if match := WEIGHT.fullmatch(key):
            layers.setdefault(match["layer"], {})["A" if match["half"] in ("A", "down") else "B"] = key
    flat = [key for keys in layers.values() for key in keys.values() if state[key].dim() < 2 or not state[key].numel()]
    if flat:
        raise ValueError(f"{path} is not whole: {flat[0]} is no matrix, but {tuple(state[flat[0]].shape)}.")
    if half := next((keys for keys in layers.values() if len(keys) < 2), None):
        raise ValueError(f"{path} is not whole: {min(half.values())} lacks the layer's other matrix.")
    folded = {key: value for key, value in state.items() if not key.endswith(".alpha")}
    for key in state.keys() - folded.keys():
        layer, alpha = layers.get(key.removesuffix(".alpha")), state[key]
        if layer is None or alpha.numel() != 1:
            raise ValueError(f"{path} is not whole: {key} is not one number beside the two matrices of a layer.")
        folded[layer["B"]] = state[layer["B"]].float() * (alpha.item() / len(state[layer["A"]]))
    return folded


def under_diffusers_keys(path: Path, state: State, spec: LoraSpec) -> State:
    """The tensors of any program's LoRA under diffusers' keys; a ValueError names one that is none of this network's."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    prefix = f"{spec.prefix}."
    if any(key.startswith(PEFT_PREFIX) for key in state):
        state = {prefix + key.removeprefix(PEFT_PREFIX): value for key, value in state.items()}
    elif not all(map(spec.has_key, state)):
        state = spec.to_diffusers(state)
        others = sorted(key for key in state if key.startswith("text_encoder"))
        if others:
            raise ValueError(
                f"{path} also changes the text encoder ({others[0]}); only a LoRA on the {spec.title} can be read."
            )
        # Despite its name it converts the attention layers of any network.
        network = convert_unet_state_dict_to_peft({key.removeprefix(prefix): value for key, value in state.items()})
        state = {prefix + key: value for key, value in network.items()}
    odd = [key.removeprefix(prefix) for key in state if not spec.has_key(key)]
    if odd or not state:
        raise ValueError(f"{path} is no LoRA on a {spec.title}: it holds {odd[0] if odd else 'nothing'}.")
    return state


def adapter_config(path: Path, state: State, spec: LoraSpec) -> Mapping[str, Any]:
    """What peft recorded of a LoRA: beside its own files, and in the metadata of those that diffusers wrote; else {}."""
    if any(key.startswith(PEFT_PREFIX) for key in state):
        if not path.with_name(PEFT_CONFIG).is_file():
            raise ValueError(f"{path} is a LoRA of peft, whose alpha is in {PEFT_CONFIG}. Put that file beside it.")
        recorded = files.read_json(path.with_name(PEFT_CONFIG))
    else:
        with files.damage_named(path), safe_open(path, framework="pt") as file:
            recorded = files.parse_json((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    if not isinstance(recorded, dict):
        raise ValueError(f"{path} is described by {recorded!r:.100}, which names no rank and no alpha.")
    return {key.removeprefix(f"{spec.prefix}."): value for key, value in recorded.items()}


def recorded_scale(path: Path, recorded: Mapping[str, Any], rank: int) -> float:
    """alpha / rank as peft recorded it; 1 if it recorded nothing.

    A ValueError names what one factor cannot express, such as an alpha for each layer.
    """
    unsupported = [key for key in NOT_PLAIN if recorded.get(key)]
    if str(recorded.get("init_lora_weights")).startswith(CHANGES_BASE):
        unsupported.append(f"init_lora_weights={recorded['init_lora_weights']}")
    if unsupported:
        raise ValueError(f"{path} has {', '.join(unsupported)}; only a plain LoRA of one rank and alpha can be read.")
    alpha, stated = recorded.get("lora_alpha", rank), recorded.get("r", rank)
    if type(alpha) not in (int, float) or stated != rank:
        raise ValueError(f"{path} has rank {rank}, and is described as of alpha {alpha!r} and rank {stated!r}.")
    return alpha / rank


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
