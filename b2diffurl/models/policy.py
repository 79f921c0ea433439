"""The policy of a stage: base model, LoRA and guidance, as sampling, training and judging all need it."""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from b2diffurl.algorithm.types import Conditions
from b2diffurl.configuration.settings import ModelSettings
from b2diffurl.experiment.checkpoints import read_state, require_whole
from b2diffurl.models import Model, family
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_kept: dict[str, Model] | None = None  # base models by what decides them, in a process that keeps them


def keep_models() -> None:
    """From now on `load_policy` loads each base model once, and gives it out again with its adapter as it was at first."""
    global _kept
    _kept = {}


def load_policy(
    model: ModelSettings, accelerator: Accelerator, lora: Path | None, *, seed: int, compile: bool, decoder: bool = True
) -> Model:
    """The base model with the LoRA of file `lora`, or a fresh one from `seed`; one trained on another base is refused."""
    decisive = [asdict(model), str(accelerator.device), accelerator.mixed_precision, seed, compile]
    key = files.digest(decisive)
    if _kept is not None and key in _kept:
        policy = _kept[key]
        policy.reset()
    else:
        policy = load_base(model, accelerator, seed=seed, compile=compile, decoder=decoder or _kept is not None)
        if _kept is not None:
            _kept[key] = policy
    if lora is not None:
        require_whole(lora)
        check_base(lora, model, policy.fingerprint)
        policy.load_adapter(lora)
    return policy


def load_base(model: ModelSettings, accelerator: Accelerator, *, seed: int, compile: bool, decoder: bool) -> Model:
    """The base model with a fresh LoRA, compiled if so asked."""
    dtype = DTYPES[accelerator.mixed_precision]
    base = family(model).load(model, device=accelerator.device, dtype=dtype, seed=seed, decoder=decoder)
    if compile:
        compilers = ("g++", "clang++") if accelerator.device.type == "cpu" else ("gcc", "clang", "cc")
        if not any(shutil.which(name) for name in compilers):
            raise ValueError(f"compile needs a compiler, {' or '.join(compilers)}. Install one, or take compile=False.")
        # Beside torch's own, which lies in a folder of temporary files: what is compiled outlives a restart.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "torchinductor"))
        base.compile()
    return base


@contextmanager
def compiling(wanted: bool, where: str) -> Iterator[bool]:
    """Where the network is to be called in the shapes to come if it is compiled (`wanted`), before their time counts.

    Yields `wanted`, and logs how long that took.
    """
    started = time.perf_counter()
    yield wanted
    if wanted:
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        logger.info("%s: network compiled, or read back from %s, in %.1f s", where, folder, time.perf_counter() - started)


def check_base(lora: Path, model: ModelSettings, fingerprint: str) -> None:
    """Refuse a LoRA that was trained on another base model than `model`, which has this `fingerprint`."""
    state = read_state(lora)
    if state and state["base_model_sha256"] != fingerprint:
        raise ValueError(
            f"{lora.parent} was trained on another base model (SHA-256 {state['base_model_sha256'][:12]}…, "
            f"{model.name} has {fingerprint[:12]}…). Use that base, or start anew."
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
