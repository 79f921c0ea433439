"""The policy of a stage, for sampling, training and judging: the base model with a LoRA, run with guidance.

N rows, P prompts, T sampler steps, latents [N,C,h,w]
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from b2diffurl.algorithm.types import Conditions
from b2diffurl.configuration.settings import ModelSettings
from b2diffurl.experiment.checkpoints import read_state, require_whole
from b2diffurl.models import Model, base_identity, family
from b2diffurl.runtime import files, threads
from b2diffurl.runtime.logs import logger

NUM_CUT_NAMED = 5  # prompts too long for the model that the log names
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_kept: dict[str, Model] | None = None  # loaded base models by a checksum of their settings and files; None: none is kept


@contextmanager
def keeping_models() -> Iterator[None]:
    """Inside the block `load_policy` loads each base model once, and then returns the same one, reset to its fresh LoRA."""
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def load_policy(
    model: ModelSettings, accelerator: Accelerator, lora: Path | None, *, seed: int, compile: bool, decoder: bool = True
) -> Model:
    """The base model with the LoRA of file `lora`, or a fresh LoRA from `seed` if that is None.

    A ValueError refuses a LoRA that is damaged, was trained on another base model, or does not fit. Without `decoder` the
    model can neither encode prompts nor decode images.
    """
    files_now = base_identity(model) if _kept is not None else {}  # they may have been exchanged since it was loaded
    decisive = [asdict(model), files_now, str(accelerator.device), accelerator.mixed_precision, seed, compile]
    key = files.digest(decisive)
    if _kept is not None and key in _kept:
        policy = _kept[key]
        policy.reset()
    else:
        # A model that is kept gets its decoder now: a later phase may need it.
        policy = load_base(model, accelerator, seed=seed, compile=compile, decoder=decoder or _kept is not None)
        if _kept is not None:
            _kept[key] = policy
    # The LoRA is no part of the key: it is loaded into the same model anew in each phase.
    if lora is not None:
        load_lora(policy, model, lora)
    return policy


def load_lora(policy: Model, model: ModelSettings, lora: Path) -> None:
    """Put the LoRA of a file into a loaded model; a ValueError if it is damaged, or of another base than `model`."""
    require_whole(lora)
    check_base(lora, model, policy.fingerprint)
    policy.load_adapter(lora)


def load_base(model: ModelSettings, accelerator: Accelerator, *, seed: int, compile: bool, decoder: bool) -> Model:
    """The base model with a fresh LoRA, set up for torch.compile if `compile`."""
    dtype = DTYPES[accelerator.mixed_precision]
    base = family(model).load(model, device=accelerator.device, dtype=dtype, seed=seed, decoder=decoder)
    if compile:
        # torch.compile generates C++ on the CPU; on a GPU Triton compiles a C launcher.
        compilers = ("g++", "clang++") if accelerator.device.type == "cpu" else ("gcc", "clang", "cc")
        if not any(shutil.which(name) for name in compilers):
            raise ValueError(f"compile needs a compiler, {' or '.join(compilers)}. Install one, or take compile=False.")
        # torch's default lies in /tmp. In the user's cache, compiled code outlives a restart of the machine.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "torchinductor"))
        base.compile()
    return base


@contextmanager
def compiling(wanted: bool, where: str) -> Iterator[bool]:
    """A block for warming up: if `wanted`, call the compiled network in it, once with each number of rows to come.

    Yields `wanted`. Logs how long compiling took, which the phase then does not count as its work.
    """
    started = time.perf_counter()
    yield wanted
    if wanted:
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        logger.info("%s: network compiled, or read back from %s, in %.1f s", where, folder, time.perf_counter() - started)


def check_base(lora: Path, model: ModelSettings, fingerprint: str) -> None:
    """Refuse a LoRA that was trained on another base model than `model`, whose fingerprint is given.

    A LoRA from elsewhere records no base model, and passes.
    """
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
    """A function predict(x_t [N,C,h,w], step) that returns the guided output [N,C,h,w]; `timesteps` is [T].

    N may be a multiple of the conditions' rows [G, ...]: each is repeated for its group's branches. The network sees
    `micro_batch_size` rows at once (0: all).
    """

    def predict(x_t: Tensor, i: int) -> Tensor:
        @torch.no_grad()
        def of_part(part: slice) -> Tensor:
            # Group-major rows: group g's branches are rows g*K to g*K + K-1, so each condition is repeated in place.
            repeated = {
                name: value.repeat_interleave(len(x_t) // len(value), dim=0)[part] for name, value in conditions.items()
            }
            return model.predict(x_t[part], timesteps[i], repeated, unconditional, guidance_scale)

        return in_pieces(model, of_part, len(x_t), micro_batch_size or len(x_t), x_t.device)

    return predict


def warn_of_cut_prompts(model: Model, placed: Sequence[tuple[str, str]]) -> None:
    """Log a warning for the first prompts that are too long for the model, and the number of the others.

    `placed` are (place in its file, prompt).
    """
    counts = model.num_tokens_cut([prompt for _, prompt in placed])
    cut = [(place, count, prompt) for (place, prompt), count in zip(placed, counts, strict=True) if count]
    for one in cut[:NUM_CUT_NAMED]:
        logger.warning("%s: the last %d tokens are cut off, the model takes no more: %.60s…", *one)
    if len(cut) > NUM_CUT_NAMED:
        logger.warning("prompts that are cut off, too: %d more", len(cut) - NUM_CUT_NAMED)


def decode(model: Model, latents: Tensor, batch_size: int) -> Tensor:
    """Decode latents [N,C,h,w] to images uint8 [N,H,W,3] on the CPU, `batch_size` at once."""
    return in_pieces(model, lambda part: model.decode(latents[part]).cpu(), len(latents), batch_size, latents.device)


def in_pieces(model: Model, work: Callable[[slice], Tensor], num_rows: int, at_most: int, device: torch.device) -> Tensor:
    """`work` on all rows of a batch, `at_most` at once. On the CPU pieces are computed side by side."""
    number = 1 if model.is_compiled else threads.at_once(num_rows, at_most, device)
    return torch.cat([*threads.side_by_side(work, threads.pieces(num_rows, at_most, number), number)])
