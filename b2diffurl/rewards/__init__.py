"""Rewards: a score for each image, higher is better.

A reward is a function of images uint8 [N,H,W,3] and their prompts [N]. It returns the scores, a float tensor [N]. It may
return (scores, parts) instead. Parts are a dict of further values, each a float tensor [N] or a list of N strings, such as a
caption. scores.jsonl records them beside the score.

A reward's name is a key of REWARDS, or `package.module:function` for your own function on the Python path. docs/rewards.md
lists the rewards and says how to add one.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from b2diffurl.configuration.settings import Rewards
from b2diffurl.experiment.not_finite import listed
from b2diffurl.runtime.hub import checksum, naming_settings

Parts = dict[str, Tensor | list[str]]
Reward = Callable[[Tensor, Sequence[str]], Tensor | tuple[Tensor, Parts]]


class RewardModule(Protocol):
    """What every module of this package defines: `check`, `files` and `load`.

    One module may serve several rewards, so each function is told the reward's `name`. `own` is the reward's section of the
    configuration, config.reward.<name>, or {} if it has none.

    A module may also define:

    - NOT_DECISIVE, the keys of `own` that do not change a score. Examples are the path of a model, which is identified by
      the checksums of its files, and a timeout.
    - WAITS = True, if the reward only waits for another program, and reads nothing that may change in the process. Its
      batches are then scored in a thread while the next images are sampled.
    - NOT_FINITE, what the user can do where a score is NaN.
    - probe(name, own), which tries the program that the reward waits for, before any work. It raises as `check` does.

    The function that `load` returns may have a method `spent`, which returns what its requests have cost since it was last
    called, {"requests": 32, …}.
    """

    def check(self, name: str, own: Mapping[str, Any], prompts: Sequence[str]) -> None:
        """Raise a ValueError, OSError or ImportError, which says what to do, if the reward cannot work.

        Reasons are a missing model or package, a bad setting, or a prompt that the reward cannot score. `prompts` are the
        prompts of the run as far as they are known. Every phase calls this before it starts, so it must be quick and must
        not load a model.
        """

    def files(self, name: str, own: Mapping[str, Any]) -> list[Path]:
        """The files that determine the scores, such as a model's weights, always in the same order; [] if there are none."""

    def load(self, name: str, own: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Reward:
        """Return the reward function, with its model on `device` in `dtype`.

        The function is called batch by batch, and all batches of a run have the same size. A shorter last batch is padded,
        usually by repeating its last image and prompt; the scores of the padding are dropped. The score of an image must not
        depend on the other images of its batch. So if the function splits its batch, each piece needs a constant size, too.
        If the function raises an exception the run ends, and the same command scores the whole stage again. A reward that is
        only watched is left out instead, with a warning.
        """


# Reward -> module of this package. A module is imported only when its reward is used: some load large libraries.
REWARDS = {
    "clip": "clip",
    "pickscore": "pickscore",
    "aesthetic": "aesthetic",
    "bertscore": "bertscore",
    "jpeg_compressibility": "jpeg",
    "jpeg_incompressibility": "jpeg",
    "image_reward": "imscore",
    "hps_v2": "imscore",
    "vqascore": "imscore",
    "vlm": "vlm",
    "compose": "compose",
    "ocr": "ocr",
    "shapes": "shapes",
    "http": "http",
    "file": "file",
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_rewards(names: Sequence[str], rewards: Rewards, prompts: Sequence[str] = ()) -> None:
    """Raise an error, before any work, if a reward is unknown, lacks its model, or cannot score one of the prompts."""
    for name in names:
        own = rewards.own.get(name, {})
        with naming_settings({f"reward.{name}.{key}": value for key, value in own.items()}):
            reward_module(name).check(name, own, prompts)


def probe_rewards(names: Sequence[str], rewards: Rewards) -> None:
    """Raise an error, before any work, if the program that a reward waits for is not there or cannot do what it should."""
    for name in names:
        if hasattr(reward_module(name), "probe"):
            reward_module(name).probe(name, rewards.own.get(name, {}))


def waits(name: str) -> bool:
    """Whether a reward waits for another program, so that it can be scored in a thread beside other work."""
    return getattr(reward_module(name), "WAITS", False)


def load_reward(name: str, rewards: Rewards, device: torch.device) -> Reward:
    """The reward function `name` on `device`. Call `check_rewards` first: its errors are clearer."""
    return reward_module(name).load(name, rewards.own.get(name, {}), device, resolve_dtype(rewards.dtype, device))


def reward_identity(name: str, rewards: Rewards) -> list[Any]:
    """Everything that determines a reward's scores: its name, its settings, and the SHA-256 of its files.

    Two evaluations with equal identities can be compared. Paths are not part of it: a model may move.
    """
    module, own = reward_module(name), rewards.own.get(name, {})
    not_decisive = getattr(module, "NOT_DECISIVE", ())
    decisive = {key: value for key, value in own.items() if key not in not_decisive}
    return [name, decisive, file_checksums(name, rewards)]


def file_checksums(name: str, rewards: Rewards) -> list[str]:
    """The SHA-256 of each of a reward's files: its model's, or the code of a function of the user's own."""
    return [checksum(path) for path in reward_module(name).files(name, rewards.own.get(name, {}))]


def reward_module(name: str) -> RewardModule:
    """The module that implements the reward `name`; a ValueError if the name is unknown."""
    if ":" not in name and name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; known: {', '.join(REWARDS)}, or your own as package.module:function")
    return importlib.import_module(f"b2diffurl.rewards.{REWARDS.get(name, 'own')}")


def resolve_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype called `wanted`; `auto` is float16 on CUDA and float32 on the CPU.

    float16 has three more bits of precision than bfloat16. Siblings often differ by little, and these bits keep them apart.
    """
    if wanted == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return DTYPES[wanted]


def score(reward: Reward, images: Tensor, prompts: Sequence[str], count: int | None = None) -> tuple[Tensor, Parts]:
    """Call `reward` with images and prompts of its own, and return (rewards float32 [count], parts), on the CPU.

    Only the first `count` images are kept (None: all); the rest is padding. If the reward returned something of another form
    a ValueError says what is wrong with it.
    """
    with torch.no_grad():
        # Copies, because a user's function may change what it is given, and others read the same images and prompts. NumPy
        # copies them: see phases/scoring_beside.py.
        result = reward(torch.from_numpy(images.numpy().copy()), list(prompts))
    rewards, parts = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    # The function may be a user's own, so check everything it returned.
    if not isinstance(rewards, Tensor) or not isinstance(parts, Mapping):
        raise ValueError(
            f"the reward returned {type(result).__name__}; it must be a tensor [N], or that and a dict of parts"
        )
    for name, value in {"reward": rewards, **parts}.items():
        is_strings = isinstance(value, list) and all(isinstance(text, str) for text in value) and value is not rewards
        if not is_strings and not isinstance(value, Tensor):
            raise ValueError(
                f"{name!r} of the reward is {type(value).__name__}; it must be a tensor, or for a part N strings"
            )
        shape = tuple(value.shape) if isinstance(value, Tensor) else (len(value),)
        if shape != (len(prompts),):
            raise ValueError(f"{name!r} of the reward has shape {shape} for {len(prompts)} images")
    if "reward" in parts:
        raise ValueError("a part of the reward is called 'reward', as it is itself; call it otherwise")
    kept = {name: value[:count] for name, value in parts.items()}
    return own_floats(rewards[:count]), {
        name: own_floats(value) if isinstance(value, Tensor) else value for name, value in kept.items()
    }


def own_floats(values: Tensor) -> Tensor:
    """The values as float32 on the CPU, copied: a reward may fill the same tensor again for the next batch."""
    return values.detach().to("cpu", torch.float32, copy=True)


def different(images: Tensor, prompts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Which pairs of an image, uint8 [N,H,W,3], and a prompt to score: the first of equal ones; and the place of each of the
    N pairs among those.

    A batch repeats an image to fill up. A reward that takes long for an image, or costs money, scores it once.
    """
    places: dict[tuple[bytes, str], int] = {}
    pairs = zip(images.cpu(), prompts, strict=True)
    rows = [places.setdefault((image.numpy().tobytes(), prompt), len(places)) for image, prompt in pairs]
    return [rows.index(place) for place in range(len(places))], rows


@contextmanager
def noting(note: str) -> Iterator[None]:
    """Add `note`, which says where we are, to any exception raised inside the block."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


def join(batches: Sequence[tuple[Tensor, Parts]]) -> tuple[Tensor, Parts]:
    """Join (rewards, parts) of several batches into one.

    Batches may have different parts, because a part may depend on the kind of prompt. Where a batch lacks a part, its images
    get NaN, or an empty string if the part is text.
    """
    parts: Parts = {}
    for key in dict.fromkeys(key for _, batch_parts in batches for key in batch_parts):
        is_text = any(isinstance(batch_parts.get(key), list) for _, batch_parts in batches)
        blanks = [[""] * len(rewards) if is_text else torch.full((len(rewards),), torch.nan) for rewards, _ in batches]
        values = [batch_parts.get(key, blank) for (_, batch_parts), blank in zip(batches, blanks, strict=True)]
        parts[key] = [text for value in values for text in value] if is_text else torch.cat(values)
    return torch.cat([rewards for rewards, _ in batches]), parts


def by_name(name: str, rewards: Tensor, parts: Parts) -> Parts:
    """One dict of a reward and its parts: {name: rewards, "name/part": values, …}."""
    return {name: rewards} | {f"{name}/{key}": value for key, value in parts.items()}


def require_finite(name: str, rewards: Tensor, where: str) -> None:
    """Raise a FloatingPointError that lists the images whose reward is NaN or infinite; `where` says in which batch."""
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        module = reward_module(name) if name in REWARDS else None
        remedy = f"; {module.NOT_FINITE}" if hasattr(module, "NOT_FINITE") else ""
        raise FloatingPointError(f"reward {name} is not finite for images {listed(bad)} {where}{remedy}")


def spent_by(reward: Reward) -> dict[str, int]:
    """What a reward's requests have cost since this was last asked; {} if it makes none."""
    return reward.spent() if hasattr(reward, "spent") else {}


def cost_text(spent: Mapping[str, int]) -> str:
    """What requests have cost, for people: `1,280 requests, 2 retries, 512,000 prompt tokens`."""
    return ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in spent.items())


def fills_holes(name: str, rewards: Rewards) -> bool:
    """Whether an image that the reward could not score gets the mean of its prompt's other images."""
    return rewards.own.get(name, {}).get("unreadable") == "mean"


def filled(scores: Tensor, prompts: Sequence[str]) -> Tensor:
    """The scores [N] with the mean of its prompt's others instead of a NaN, or with NaN if the prompt has none."""
    known = scores.isfinite()
    result = scores.clone()
    for prompt in {prompts[n] for n in (~known).nonzero().flatten().tolist()}:
        of_prompt = torch.tensor([one == prompt for one in prompts])
        result[of_prompt & ~known] = scores[of_prompt & known].double().mean().float()
    return result
