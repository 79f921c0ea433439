"""Whether a base model is whole: each tensor of each part is there in its shape, and the tokenizer fits the text encoder.

Libraries fill in what a file lacks: with random weights, or with a tokenizer that knows no word. So a part's files are
compared with an empty copy of its class. That reads the headers of the weight files and no weights.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from b2diffurl.runtime import files
from b2diffurl.runtime.hub import missing_tokenizer

Shapes = Mapping[str, tuple[int, ...]]

# Tensors that some files have and no model needs.
HARMLESS = re.compile(
    r"embeddings\.position_ids$"  # the numbers 0, 1, 2, …: older transformers saved them, newer ones count themselves
    r"|^text_projection\.weight$"  # of a CLIP text encoder with a projection, which Stable Diffusion does not use
)
# A VAE's attention as older diffusers named it, and as it is called today.
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
NUM_TRIED = 40  # so many words are given to a tokenizer, to see whether it knows them
NUM_NAMED = 3  # so many tensors are named in an error


def check_tensors(where: str, part: nn.Module, stored: Shapes, remedy: str) -> None:
    """Refuse the files of a part, at `where`, whose tensors are not those of `part`, which may lie on the meta device."""
    # Tied weights, such as T5's embedding, are stored once, under either name.
    tied = getattr(part, "_tied_weights_keys", None) or {}
    tied = tied if getattr(part.config, "tie_word_embeddings", True) else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in part.state_dict().items()}
    expected, stored = (
        canonical({tied.get(name, name): shape for name, shape in some.items()}) for some in (shapes, stored)
    )
    stored = {name: shape for name, shape in stored.items() if name in expected or not HARMLESS.search(name)}
    wrong = [
        f"{name} is {stored[name]}, not {shape}" for name, shape in expected.items() if stored.get(name, shape) != shape
    ]
    faults = {
        "lacks": listed(expected.keys() - stored.keys()),
        "has unknown": listed(stored.keys() - expected.keys()),
        "has misshapen": listed(wrong),
    }
    if not any(faults.values()):
        return
    if any(".lora_" in name or ".base_layer." in name for name in stored):
        remedy = "It was saved with a LoRA attached: fuse the LoRA (fuse_lora, unload_lora_weights), and save it again."
    said = "; it ".join(f"{fault} tensors ({names})" for fault, names in faults.items() if names)
    raise ValueError(f"{where} is not a whole {type(part).__name__}: it {said}. {remedy}")


def canonical(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes under one name each, however old the library is that wrote the file."""
    attention = re.compile(rf"\.({'|'.join(ATTENTION)})\.(weight|bias)$")

    def rename(name: str) -> str:
        # transformers 5 took away the prefix
        return attention.sub(lambda match: f".{ATTENTION[match[1]]}.{match[2]}", name.removeprefix("text_model."))

    return {rename(name): shape for name, shape in shapes.items()}


def names_of(part: nn.Module) -> set[str]:
    """The names of a part's tensors as `canonical` has them."""
    return {*canonical(dict.fromkeys(part.state_dict(), ()))}


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


def require_safetensors(path: Path) -> None:
    """Refuse a single file that is not named as safetensors, before anything of it is read."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a .safetensors file. Convert it first; pickled weights are never loaded.")


def stored_shapes(paths: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors in safetensors files, from their headers."""
    shapes = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no safetensors file ({error}). Get it anew.") from None
    return shapes


def converted(part: nn.Module, stored: Shapes) -> Shapes:
    """The shapes of a part's tensors under the keys of diffusers, from all of a single file in the original layout."""
    from diffusers.loaders import single_file_utils as original
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES as DIFFUSERS

    kind = type(part).__name__
    # The converters of diffusers work on empty tensors, too. Some remove what they have read, so they get a copy.
    tensors = {name: torch.empty(shape, device="meta") for name, shape in stored.items()}
    unread = {}
    try:
        if kind in DIFFUSERS:
            found = DIFFUSERS[kind]["checkpoint_mapping_fn"](config=dict(part.config), checkpoint=dict(tensors))
        else:
            found = converted_text(part, tensors)
    except (KeyError, ValueError, IndexError):  # some stumble over what is missing: then nothing counts as found
        found = {}
    if kind == "UNet2DConditionModel":  # its tensors are renamed one to one; what the converter leaves out is unknown
        read = {id(tensor) for tensor in found.values()}
        mine = original.LDM_UNET_KEY
        unread = {name: value for name, value in tensors.items() if name.startswith(mine) and id(value) not in read}
    return {name.removeprefix("text_model."): tuple(tensor.shape) for name, tensor in (found | unread).items()}


def converted_text(part: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder's tensors under the keys of transformers, from all of a single file; {} if it has none.

    Of SDXL's two encoders the one of the part's width is taken, as diffusers does.
    """
    from diffusers.loaders import single_file_utils as original

    if original.is_clip_model(tensors):
        return original.convert_ldm_clip_checkpoint(dict(tensors))
    if original.is_open_clip_model(tensors):
        return original.convert_open_clip_checkpoint(part, dict(tensors))
    keys = (original.CHECKPOINT_KEY_NAMES[kind] for kind in ("clip_sdxl", "open_clip_sdxl"))
    first, second = (key in tensors and tensors[key].shape[-1] == part.config.hidden_size for key in keys)
    if first:
        return original.convert_ldm_clip_checkpoint(dict(tensors))
    if second:
        return original.convert_open_clip_checkpoint(part, dict(tensors), prefix="conditioner.embedders.1.model.")
    return {}


def empty_part(kind: Any, folder: Path) -> nn.Module:
    """A model of a class of diffusers or transformers with the config in `folder`, and without weights."""
    files.read_object(folder / "config.json")  # names the file if it is none, which libraries do not always
    from huggingface_hub.errors import StrictDataclassError

    wrong = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    diffusers = hasattr(kind, "load_config")
    try:
        config = kind.load_config(folder) if diffusers else kind.config_class.from_pretrained(folder)
        with torch.device("meta"):
            return kind.from_config(config) if diffusers else kind(config)
    except (*wrong, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{folder}/config.json describes no {kind.__name__} ({said}). Get it anew.") from None


# ---- the tokenizer ----


def read_tokenizer(folder: Path, kind: Any, vocab_size: int) -> Any:
    """A tokenizer of class `kind`; refused if it knows no words, or more of them than its text encoder (`vocab_size`)."""
    if lacks := missing_tokenizer(folder):
        raise FileNotFoundError(f"{folder} lacks {lacks}, without which no prompt can be read. Get the model's files anew.")
    try:
        tokenizer = kind.from_pretrained(folder)
    except Exception as error:  # of any kind: the files may hold anything
        raise ValueError(f"{folder} holds no tokenizer that can be read ({error!r:.200}). Get its files anew.") from None
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ValueError(
            f"{folder} does not fit its text encoder: the tokenizer counts to {largest}, and vocab_size there is "
            f"{vocab_size}. Get both from the same model."
        )
    if not some_word(tokenizer):
        raise ValueError(f"{folder} reads every prompt as the empty one: its vocabulary has no words. Get its files anew.")
    words = [word for word in sorted(tokenizer.get_vocab()) if re.fullmatch(r"[a-z]{3,}</w>", word)]
    tried = words[:: len(words) // NUM_TRIED + 1]
    cut = [word.removesuffix("</w>") for word in tried if is_cut(tokenizer, word)]
    if len(cut) > len(tried) / 2:
        raise ValueError(
            f"{folder} cuts words of its own vocabulary, such as {cut[0]!r}. Get its files anew, merges above all."
        )
    return tokenizer


def is_cut(tokenizer: Any, word: str) -> bool:
    """Whether CLIP's tokenizer reads a word of its vocabulary, which ends with </w>, as something else."""
    return tokenizer.get_vocab()[word] not in tokenizer(word.removesuffix("</w>")).input_ids


def some_word(tokenizer: Any) -> str:
    """A text that the tokenizer does not read as it reads the empty one; "" if there is none."""
    nothing = tokenizer("").input_ids
    for number in sorted(tokenizer.get_vocab().values()):
        word = tokenizer.decode([number], skip_special_tokens=True)
        if set(tokenizer(word).input_ids) - set(nothing):
            return word
    return ""


# ---- once it is loaded ----


def is_number(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that may be NaN; one without elements, or of integers, does not."""
    return tensor.is_floating_point() and tensor.numel() > 0


def check_loaded(where: str, part: nn.Module) -> None:
    """Refuse a part, from files at `where`, that was loaded with holes, or whose weights are not all finite."""
    tensors: dict[str, Tensor] = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"{where} lacks tensors ({listed(empty)}). Get its files anew.")
    # The least and the largest: NaN passes through both, and it takes a twentieth of the time of asking each number.
    ends = {name: torch.stack(torch.aminmax(tensor)) for name, tensor in tensors.items() if is_number(tensor)}
    if wrong := [name for name, pair in ends.items() if not pair.isfinite().all()]:
        raise ValueError(
            f"{where} has weights that are NaN or infinite ({listed(wrong)}). Get its files anew; if they are sound, they "
            "are too large for half precision, and --config.mixed_precision=no helps."
        )
