"""Score a stage's images: by the rewards that are trained on, with their parts, and by the watched ones.

N images
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from b2diffurl.configuration.settings import Rewards
from b2diffurl.experiment.not_finite import not_finite
from b2diffurl.experiment.scored_batches import ScoredBatches
from b2diffurl.experiment.stage import Stage
from b2diffurl.rewards import (
    Parts,
    Reward,
    by_name,
    cost_text,
    filled,
    fills_holes,
    join,
    load_reward,
    noting,
    require_finite,
    reward_identity,
    reward_module,
    score,
    spent_by,
    waits,
)
from b2diffurl.rewards.file import read_scores
from b2diffurl.rewards.mixture import Scales, combine, measure_scales, recorded_scales
from b2diffurl.rewards.watched import Watched
from b2diffurl.runtime import files
from b2diffurl.runtime.batch_sizes import BatchSizes
from b2diffurl.runtime.logs import Progress, logger
from b2diffurl.runtime.stopwatch import working_sec
from b2diffurl.runtime.threads import ahead


@dataclass(frozen=True)
class Scores:
    """The scores of a stage's images by all rewards."""

    rewards: Tensor  # float32 [N], what is trained on: one reward, or the weighted sum of a mixture
    parts: Parts  # each [N]: of one reward by part; of a mixture each reward by name, and its parts as name/part
    watch: Parts  # the watched rewards by name, and their parts as name/part
    scales: Scales | None  # mean and deviation by which a mixture's rewards were standardised; None: they were not
    seconds: dict[str, float]  # load: for loading the models; score: for scoring
    batch_sizes: dict[str, int]  # images that a reward saw at once, by its name
    spent: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # what a reward's requests have cost, by its name


@dataclass(frozen=True)
class Scored:
    """The scores of a stage's images by one reward, and how long it took."""

    rewards: Tensor  # float32 [N]; empty in every process but the first
    parts: Parts
    load_sec: float = 0.0
    score_sec: float = 0.0
    batch_size: int = 0  # images that the reward saw at once; 0: its scores were made elsewhere
    spent: Mapping[str, int] = field(default_factory=dict)  # requests, tokens and the like

    def by_name(self, name: str) -> Parts:
        """The rewards under `name`, and their parts under name/part."""
        return by_name(name, self.rewards, self.parts)


@dataclass(frozen=True)
class ScoredBatch:
    """The scores of one batch by one reward."""

    rewards: Tensor  # float32 [N]
    parts: Parts
    spent: Mapping[str, int]  # what its requests have cost

    def as_json(self) -> dict[str, Any]:
        """JSON keeps every bit of a float32. A NaN becomes null."""
        parts = {key: value if isinstance(value, list) else as_list(value) for key, value in self.parts.items()}
        return {"rewards": as_list(self.rewards), "parts": parts, "spent": dict(self.spent)}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> "ScoredBatch":
        parts = {key: as_part(value) for key, value in kept["parts"].items()}
        return cls(as_tensor(kept["rewards"]), parts, kept["spent"])

    @property
    def is_finite(self) -> bool:
        """Whether all of its numbers are."""
        numbers = [value for value in (self.rewards, *self.parts.values()) if isinstance(value, Tensor)]
        return all(value.isfinite().all() for value in numbers)


@dataclass(frozen=True)
class Batches:
    """A stage's images cut into batches of one size. A batch is identified by the id of its first image, its `start`.

    The last batch is padded by repeating the stage's last image, because a network's rounding depends on the batch size.
    """

    stage: Stage
    prompts: Sequence[str]  # [N]
    batch_size: int  # images in a batch, at most
    process: int = 0  # this process; processes take the batches in turn
    num_processes: int = 1

    @property
    def size(self) -> int:
        """Images in a batch, repeated ones included."""
        return min(self.batch_size, len(self.prompts))

    @property
    def starts(self) -> range:
        """The id of the first image of each of this process's batches."""
        return range(0, len(self.prompts), self.size)[self.process :: self.num_processes]

    def count(self, start: int) -> int:
        """Images in a batch, repeated ones left out."""
        return min(self.size, len(self.prompts) - start)

    def ids(self, start: int) -> list[int]:
        """The images in a batch, repeated ones included."""
        return [min(n, len(self.prompts) - 1) for n in range(start, start + self.size)]

    def paths(self, start: int) -> list[Path]:
        return [self.stage.image(n) for n in self.ids(start)]

    def place(self, start: int) -> str:
        """A batch in words, for errors: `batch 2: images 8 to 11 of …`."""
        return f"batch {start // self.size}: images {start} to {start + self.count(start) - 1} of {self.stage.images}"


def score_stage(rewards: Rewards, stage: Stage, prompts: list[str], accelerator: Accelerator) -> Scores | None:
    """Score every image by every reward and write scores.jsonl. Returns the scores in the first process, else None.

    Processes share the batches. If a score that is trained on is not finite, a FloatingPointError names the images after
    all scores have been written. A watched reward that fails has NaN.
    """
    weights, watched = rewards.weights, rewards.watched
    # One reward after the other, so that only one model is in memory.
    scored = {name: score_by(name, rewards, stage, prompts, accelerator) for name in (*weights, *watched)}
    if not accelerator.is_main_process:
        return None
    values = {name: scored[name].rewards for name in weights}
    # The first stage's scales hold for the whole experiment: a stage's own would hide that the reward rises.
    scales = (recorded_scales(stage.root) or measure_scales(values)) if rewards.standardise else None
    named = {key: value for name in weights for key, value in scored[name].by_name(name).items()}
    load_sec, score_sec = sum(one.load_sec for one in scored.values()), sum(one.score_sec for one in scored.values())
    scores = Scores(
        rewards=combine(values, weights, scales),
        parts=named if rewards.mixed else scored[next(iter(weights))].parts,
        watch={key: value for name in watched for key, value in scored[name].by_name(name).items()},
        scales=scales,
        seconds={"load": load_sec, "score": score_sec},
        batch_sizes={name: one.batch_size for name, one in scored.items() if one.batch_size},
        spent={name: dict(one.spent) for name, one in scored.items() if one.spent},
    )
    # Written before they are checked, so that the user can see the scores that stop the run.
    write_scores(stage, prompts, scores)
    require_finite_scores(stage, prompts, weights, scored, scores)
    return scores


def require_finite_scores(
    stage: Stage, prompts: list[str], trained: Iterable[str], scored: dict[str, Scored], scores: Scores
) -> None:
    """Stop if one of the `trained` rewards is not finite: write its images' scores to debug/, raise a FloatingPointError.

    Watched rewards may be NaN, and the parts of a reward, for images that lack one.
    """
    # The sum of finite rewards can overflow.
    named = {name: scored[name].rewards for name in trained} | {"(weighted sum)": scores.rewards}
    try:
        for name, rewards in named.items():
            require_finite(name, rewards, f"of {stage.images}; see {stage.scores}")
    except FloatingPointError as error:
        # The error names the images of one reward. The evidence is of the images that any reward has spoiled.
        bad = [n for n in range(len(prompts)) if not all(rewards[n].isfinite() for rewards in named.values())]
        values = {key: value for name, one in scored.items() for key, value in one.by_name(name).items()} | named
        tensors = {key: value[bad] for key, value in values.items() if isinstance(value, Tensor)}
        texts = {key: [value[n] for n in bad] for key, value in values.items() if isinstance(value, list)}
        facts = {"images": bad, "prompts": [prompts[n] for n in bad], "texts": texts}
        raise not_finite(stage, "rewards", str(error), tensors, facts) from None


def score_by(name: str, rewards: Rewards, stage: Stage, prompts: list[str], accelerator: Accelerator) -> Scored:
    """Score a stage's images by the reward `name`; the first process gets the scores. Its model is freed on return."""
    if name == "file":  # people or another program have made the scores
        return Scored(read_scores(stage.given_scores, len(prompts)), {})
    started = working_sec()
    reward = load(name, rewards, stage, accelerator.device)
    loaded = working_sec()
    logger.info("stage%d select: scoring %d images by %s", stage.index, len(prompts), name)
    wanted = {"reward.batch_size": rewards.batch_size}
    # `given`: what fits depends on the reward's model, so a size is kept for each reward.
    sizes = BatchSizes(stage.root, accelerator.device, wanted, alone=accelerator.num_processes == 1, given=[name])

    kept = kept_batches(name, rewards, stage)

    def score_share(batch_size: int) -> list[ScoredBatch]:
        batches = Batches(stage, prompts, batch_size, accelerator.process_index, accelerator.num_processes)
        return score_images(name, reward, batches, kept, num_workers=rewards.num_workers)

    with forgetting(kept):
        scored = gather(stage, sizes.fit("reward.batch_size", score_share), accelerator)
    seconds = (loaded - started, working_sec() - loaded)
    if not accelerator.is_main_process:
        return Scored(torch.empty(0), {}, *seconds)
    values, parts = join([(batch.rewards, batch.parts) for batch in scored])
    if kept and not kept.may_lack_scores and not values.isfinite().all():
        kept.clear()
    spent = sum((Counter(batch.spent) for batch in scored), Counter())
    if fills_holes(name, rewards) and (holes := int((~values.isfinite()).sum())):
        values, spent["unreadable"] = filled(values, prompts), holes
    if spent:
        logger.info("stage%d select: reward %s has cost %s", stage.index, name, cost_text(spent))
    if isinstance(reward, Watched):
        reward.warn_of_holes(values)
    return Scored(values, parts, *seconds, batch_size=sizes.sizes["reward.batch_size"], spent=spent)


def kept_batches(name: str, rewards: Rewards, stage: Stage) -> ScoredBatches | None:
    """Where a reward's batches are kept until the stage is scored; None for one that waits for no other program."""
    if not waits(name):
        return None
    identity = reward_identity(name, replace(rewards, own={**rewards.own, name: decisive_for_a_score(name, rewards)}))
    may_lack_scores = hasattr(reward_module(name), "NOT_FINITE")
    # A watched reward has no score either where its server is away.
    keeps_holes = fills_holes(name, rewards) and name not in rewards.watched
    return ScoredBatches(stage, name, files.digest(identity), may_lack_scores, keeps_holes)


def decisive_for_a_score(name: str, rewards: Rewards) -> dict[str, Any]:
    """A reward's settings without what is done about an image that has no score."""
    return {key: value for key, value in rewards.own.get(name, {}).items() if key != "unreadable"}


@contextmanager
def forgetting(kept: ScoredBatches | None) -> Iterator[None]:
    """Forget the batches of a reward if it gives a wrong answer in the block.

    Not of one that may lack scores: it has none of a wrong answer, and its errors are those of keys, credits and the like.
    """
    try:
        yield
    except ValueError:
        if kept and not kept.may_lack_scores:
            kept.clear()
        raise


def load(name: str, rewards: Rewards, stage: Stage, device: torch.device) -> Reward:
    """Load a reward; one that is only watched may fail."""
    if name not in rewards.watched:
        return load_reward(name, rewards, device)
    watched = Watched(name, lambda: load_reward(name, rewards, device))
    watched.begin(f"stage{stage.index} select")
    return watched


def score_images(
    name: str, reward: Reward, batches: Batches, kept: ScoredBatches | None = None, *, num_workers: int
) -> list[ScoredBatch]:
    """The scores of each batch. While one is scored, `num_workers` threads read the images of the next."""
    scored = []
    title, num_images = f"stage{batches.stage.index} score {name}", sum(map(batches.count, batches.starts))
    here = Path.cwd()  # a reward of the user's may be in another directory while the next images are read
    with Progress(num_images, title, "images") as bar, ThreadPoolExecutor(num_workers) as pool:

        def read(start: int) -> Tensor:
            with noting(f"reward {name}, {batches.place(start)}"):
                return torch.stack([*pool.map(files.read_image, [here / path for path in batches.paths(start)])])

        for start, images in ahead(read, batches.starts):
            scored.append(score_batch(name, reward, batches, start, images, kept))
            bar.update(batches.count(start))
    return scored


def score_batch(
    name: str, reward: Reward, batches: Batches, start: int, images: Tensor, kept: ScoredBatches | None
) -> ScoredBatch:
    """The scores of the batch that begins with image `start`, images uint8 [N,H,W,3]. With `kept` it is scored once only."""
    prompts = [batches.prompts[n] for n in batches.ids(start)]
    key = kept.key(images, prompts) if kept else ""
    if kept and (found := kept.find(start, key)):
        return ScoredBatch.from_json(found)
    with noting(f"reward {name}, {batches.place(start)}"):
        scored = ScoredBatch(*score(reward, images, prompts, batches.count(start)), spent_by(reward))
    if kept and (scored.is_finite or kept.keeps_holes):
        kept.keep(start, key, scored.as_json())
    return scored


def gather(stage: Stage, batches: list[ScoredBatch], accelerator: Accelerator) -> list[ScoredBatch]:
    """The batches of all processes, in order, in the first process. The other processes get their own back.

    They pass through JSON files, because parts may be text, which a collective operation cannot send.
    """
    if accelerator.num_processes == 1:
        return batches
    paths = [stage.folder / f"scores_of_process_{rank}.json{files.TEMPORARY}" for rank in range(accelerator.num_processes)]
    own = [batch.as_json() for batch in batches]
    files.write_bytes(paths[accelerator.process_index], json.dumps(own).encode(), durable=False)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shares = [json.loads(path.read_text()) for path in paths]
        # Processes took the batches in turn, so the first batch of each comes before the second of any.
        ordered = [share[turn] for turn in range(len(shares[0])) for share in shares if turn < len(share)]
        batches = [ScoredBatch.from_json(batch) for batch in ordered]
        for path in paths:
            path.unlink()
    accelerator.wait_for_everyone()  # before another process writes its scores by the next reward
    return batches


def as_list(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def as_tensor(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32)


def as_part(values: list) -> Tensor | list[str]:
    """A reward's part from JSON: a list of strings as it is, numbers as a tensor."""
    return values if values and isinstance(values[0], str) else as_tensor(values)


def write_scores(stage: Stage, prompts: list[str], scores: Scores) -> None:
    """Write scores.jsonl, a row for each image. A number that is not finite becomes null."""
    rows = []
    for n, (prompt, reward) in enumerate(zip(prompts, scores.rewards.tolist(), strict=True)):
        row = {"id": n, "prompt": prompt, "reward": files.finite(reward), "parts": nth(scores.parts, n)}
        rows.append(row | ({"watch": nth(scores.watch, n)} if scores.watch else {}))
    files.write_json_lines(stage.scores, rows)


def nth(parts: Parts, n: int) -> dict[str, float | str | None]:
    """The parts of image n, for JSON."""
    return {key: files.finite(value[n].item()) if isinstance(value, Tensor) else value[n] for key, value in parts.items()}
