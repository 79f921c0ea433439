"""The policy of a stage: base model, LoRA and guidance, as sampling, training and judging all need it."""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from b2diffurl.experiment.checkpoints import read_state, require_whole
from b2diffurl.experiment.trajectories import Conditions
from b2diffurl.models import Model, load_model
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


_kept: dict[str, Model] | None = None  # base models by what decides them, in a process that keeps them


def keep_models() -> None:
    """From now on `load_policy` loads each base model once, and gives it out again with its adapter as it was at first."""
    global _kept
    _kept = {}


def load_policy(config: Mapping, accelerator: Accelerator, lora: Path | None, *, decoder: bool = True) -> Model:
    """The base model with the LoRA of file `lora`, or a fresh one; a LoRA trained on another base is refused."""
    decisive = [dict(config["pretrained"]), str(accelerator.device), accelerator.mixed_precision]
    key = files.digest([*decisive, config["train"]["lora_rank"], config["seed"], config["compile"]])
    if _kept is not None and key in _kept:
        model = _kept[key]
        model.reset()
    else:
        model = load_base(config, accelerator, decoder=decoder or _kept is not None)
        if _kept is not None:
            _kept[key] = model
    if lora is not None:
        require_whole(lora)
        check_base(lora, config["pretrained"], model.fingerprint)
        model.load_adapter(lora)
    return model


def load_base(config: Mapping, accelerator: Accelerator, *, decoder: bool) -> Model:
    """The base model with a fresh LoRA, compiled if so configured."""
    model = load_model(
        config["pretrained"],
        device=accelerator.device,
        dtype=DTYPES[accelerator.mixed_precision],
        lora_rank=config["train"]["lora_rank"],
        seed=config["seed"],
        decoder=decoder,
    )
    if config["compile"]:
        compilers = ("g++", "clang++") if accelerator.device.type == "cpu" else ("gcc", "clang", "cc")
        if not any(shutil.which(name) for name in compilers):
            raise ValueError(f"compile needs a compiler, {' or '.join(compilers)}. Install one, or take compile=False.")
        # Beside torch's own, which lies in a folder of temporary files: what is compiled outlives a restart.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "torchinductor"))
        model.compile()
    return model


@contextmanager
def compiling(config: Mapping, where: str) -> Iterator[bool]:
    """Whether the network is compiled, and so is to be called inside in the shapes to come, before their time counts; says
    how long that took."""
    started = time.perf_counter()
    yield config["compile"]
    if config["compile"]:
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        logger.info("%s: network compiled, or read back from %s, in %.1f s", where, folder, time.perf_counter() - started)


def check_base(lora: Path, pretrained: Mapping, fingerprint: str) -> None:
    """Refuse a LoRA that was trained on another base model than `pretrained`, which has this `fingerprint`."""
    state = read_state(lora)
    if state and state["base_model_sha256"] != fingerprint:
        raise ValueError(
            f"{lora.parent} was trained on another base model (SHA-256 {state['base_model_sha256'][:12]}…, "
            f"{pretrained['model']} has {fingerprint[:12]}…). Use that base, or start anew."
        )


def predictor(
    model: Model,
    timesteps: Tensor,
    conditions: Conditions,
    unconditional: Conditions,
    *,
    guidance_scale: float,
    micro_batch_size: int = 0,
) -> Callable[[Tensor, int], Tensor]:
    """predict(x_t [N,C,h,w], step), at `timesteps` [T], for N a multiple of the conditions' rows, each repeated for its
    branches.

    The network sees `micro_batch_size` rows at once (0: all).
    """

    @torch.no_grad()
    def predict(x_t: Tensor, i: int) -> Tensor:
        rows = micro_batch_size or len(x_t)
        outputs = []
        for start in range(0, len(x_t), rows):
            part = slice(start, start + rows)
            repeated = {
                name: value.repeat_interleave(len(x_t) // len(value), dim=0)[part] for name, value in conditions.items()
            }
            outputs.append(model.predict(x_t[part], timesteps[i], repeated, unconditional, guidance_scale))
        return torch.cat(outputs)

    return predict


def warn_of_cut_prompts(model: Model, placed: Iterable[tuple[str, str]]) -> None:
    """Name the prompts, of (where it stands, prompt), that the model reads in part."""
    for place, prompt in placed:
        if cut := model.num_tokens_cut(prompt):
            logger.warning("%s: the last %d tokens are cut off, the model takes no more: %.60s…", place, cut, prompt)


def decode(model: Model, latents: Tensor, batch_size: int) -> Tensor:
    """Images uint8 [N,H,W,3] on the CPU, decoded `batch_size` at once."""
    return torch.cat([model.decode(part).cpu() for part in latents.split(batch_size)])
