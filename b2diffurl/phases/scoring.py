"""What the rewards say of a stage's images: those that are trained on, their parts, and the watched ones.

N images
"""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from b2diffurl.configuration.settings import Rewards
from b2diffurl.experiment.not_finite import not_finite
from b2diffurl.experiment.stage import Stage
from b2diffurl.rewards import Parts, Reward, by_name, join, load_reward, noting, require_finite, score
from b2diffurl.rewards.file import read_scores
from b2diffurl.rewards.mixture import Scales, combine, measure_scales, recorded_scales
from b2diffurl.runtime import files
from b2diffurl.runtime.batch_sizes import BatchSizes
from b2diffurl.runtime.logs import logger, progress_bar
from b2diffurl.runtime.threads import ahead


@dataclass(frozen=True)
class Scores:
    """Of one stage's images."""

    rewards: Tensor  # float32 [N], trained on
    parts: Parts  # of the reward; those of a mixture by name, and name/part
    watch: Parts  # watched rewards by name, and name/part
    scales: Scales | None  # in whose units a mixture's parts were taken
    seconds: dict[str, float]  # load: of the models; score
    batch_sizes: dict[str, int]  # images a reward saw at once, by its name


@dataclass(frozen=True)
class Scored:
    """What one reward says of a stage's images, and how it was asked."""

    rewards: Tensor  # float32 [N]; empty in every process but the first
    parts: Parts
    load_sec: float = 0.0
    score_sec: float = 0.0
    batch_size: int = 0  # images it saw at once; 0: its scores were made elsewhere

    def by_name(self, name: str) -> Parts:
        return by_name(name, self.rewards, self.parts)


@dataclass(frozen=True)
class Batches:
    """A stage's images in batches of one shape, each known by the id of its first image.

    The last batch is filled up by repeating the stage's last image.
    """

    stage: Stage
    prompts: Sequence[str]  # [N]
    batch_size: int  # images in each, if there are as many
    process: int = 0  # of `num_processes`, which take the batches in turn
    num_processes: int = 1

    @property
    def size(self) -> int:
        return min(self.batch_size, len(self.prompts))

    @property
    def starts(self) -> range:
        """The batches of this process."""
        return range(0, len(self.prompts), self.size)[self.process :: self.num_processes]

    def count(self, start: int) -> int:
        """Images of a batch, the repeated ones left out."""
        return min(self.size, len(self.prompts) - start)

    def ids(self, start: int) -> list[int]:
        return [min(n, len(self.prompts) - 1) for n in range(start, start + self.size)]

    def paths(self, start: int) -> list[Path]:
        return [self.stage.image(n) for n in self.ids(start)]

    def place(self, start: int) -> str:
        """For people: `batch 2: images 8 to 11 of …`."""
        return f"batch {start // self.size}: images {start} to {start + self.count(start) - 1} of {self.stage.images}"


def score_stage(rewards: Rewards, stage: Stage, prompts: list[str], accelerator: Accelerator) -> Scores | None:
    """Score every image by every reward, one model after the other, and write scores.jsonl. Processes share the batches, and
    the first one has the scores.

    A FloatingPointError names the images whose score is not finite, after all scores have been written.
    """
    weights, watched = rewards.weights, rewards.watched
    found = {name: score_by(name, rewards, stage, prompts, accelerator) for name in (*weights, *watched)}
    if not accelerator.is_main_process:
        return None
    values = {name: found[name].rewards for name in weights}
    scales = (recorded_scales(stage.root) or measure_scales(values)) if rewards.standardise else None
    named = {key: value for name in weights for key, value in found[name].by_name(name).items()}
    scores = Scores(
        rewards=combine(values, weights, scales),
        parts=named if rewards.mixed else found[next(iter(weights))].parts,
        watch={key: value for name in watched for key, value in found[name].by_name(name).items()},
        scales=scales,
        seconds={"load": sum(one.load_sec for one in found.values()), "score": sum(one.score_sec for one in found.values())},
        batch_sizes={name: one.batch_size for name, one in found.items() if one.batch_size},
    )
    write_scores(stage, prompts, scores)
    require_finite_scores(stage, prompts, found, scores)
    return scores


def require_finite_scores(stage: Stage, prompts: list[str], found: dict[str, Scored], scores: Scores) -> None:
    """Parts need not be finite."""
    named = {name: one.rewards for name, one in found.items()} | {"(weighted sum)": scores.rewards}
    try:
        for name, rewards in named.items():
            require_finite(name, rewards, f"of {stage.images}; see {stage.scores}")
    except FloatingPointError as error:
        bad = [n for n in range(len(prompts)) if not all(rewards[n].isfinite() for rewards in named.values())]
        values = {key: value for name, one in found.items() for key, value in one.by_name(name).items()} | named
        tensors = {key: value[bad] for key, value in values.items() if isinstance(value, Tensor)}
        texts = {key: [value[n] for n in bad] for key, value in values.items() if isinstance(value, list)}
        facts = {"images": bad, "prompts": [prompts[n] for n in bad], "texts": texts}
        raise not_finite(stage, "rewards", str(error), tensors, facts) from None


def score_by(name: str, rewards: Rewards, stage: Stage, prompts: list[str], accelerator: Accelerator) -> Scored:
    """One reward's scores, in the first process. Its model is gone when this returns."""
    if name == "file":
        return Scored(read_scores(stage.given_scores, len(prompts)), {})
    started = time.perf_counter()
    reward = load_reward(name, rewards, accelerator.device)
    loaded = time.perf_counter()
    logger.info("stage%d select: scoring %d images by %s", stage.index, len(prompts), name)
    wanted = {"reward.batch_size": rewards.batch_size}
    sizes = BatchSizes(stage.root, accelerator.device, wanted, alone=accelerator.num_processes == 1, given=[name])

    def score_share(batch_size: int) -> list[tuple[Tensor, Parts]]:
        batches = Batches(stage, prompts, batch_size, accelerator.process_index, accelerator.num_processes)
        return score_images(name, reward, batches, num_workers=rewards.num_workers)

    scored = gather(stage, sizes.fit("reward.batch_size", score_share), accelerator)
    values, parts = join(scored) if accelerator.is_main_process else (torch.empty(0), {})
    return Scored(values, parts, loaded - started, time.perf_counter() - loaded, batch_size=sizes.sizes["reward.batch_size"])


def score_images(name: str, reward: Reward, batches: Batches, *, num_workers: int) -> list[tuple[Tensor, Parts]]:
    """Rewards and parts of each batch; `num_workers` threads read the next one's images meanwhile."""
    found = []
    title, num_images = f"stage{batches.stage.index} score {name}", sum(map(batches.count, batches.starts))
    with progress_bar(num_images, title, "images") as bar, ThreadPoolExecutor(num_workers) as pool:

        def read(start: int) -> Tensor:
            with noting(f"reward {name}, {batches.place(start)}"):
                return torch.stack(list(pool.map(files.read_image, batches.paths(start))))

        for start, images in ahead(read, batches.starts):
            prompts = [batches.prompts[n] for n in batches.ids(start)]
            with noting(f"reward {name}, {batches.place(start)}"):
                found.append(score(reward, images, prompts, batches.count(start)))
            bar.update(batches.count(start))
    return found


def gather(stage: Stage, batches: list[tuple[Tensor, Parts]], accelerator: Accelerator) -> list[tuple[Tensor, Parts]]:
    """In the first process the batches of all, in order; they come by files, as JSON, which keeps every float32."""
    if accelerator.num_processes == 1:
        return batches
    paths = [stage.folder / f"scores_of_process_{rank}.json{files.TEMPORARY}" for rank in range(accelerator.num_processes)]
    own = [
        [rewards.tolist(), {key: value if isinstance(value, list) else value.tolist() for key, value in parts.items()}]
        for rewards, parts in batches
    ]
    paths[accelerator.process_index].write_text(json.dumps(own))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shares = [json.loads(path.read_text()) for path in paths]
        ordered = [share[turn] for turn in range(len(shares[0])) for share in shares if turn < len(share)]
        batches = [(as_tensor(rewards), {key: as_part(value) for key, value in parts.items()}) for rewards, parts in ordered]
        for path in paths:
            path.unlink()
    accelerator.wait_for_everyone()
    return batches


def as_tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def as_part(values: list) -> Tensor | list[str]:
    return values if values and isinstance(values[0], str) else as_tensor(values)


def write_scores(stage: Stage, prompts: list[str], scores: Scores) -> None:
    rows = []
    for n, (prompt, reward) in enumerate(zip(prompts, scores.rewards.tolist(), strict=True)):
        row = {"id": n, "prompt": prompt, "reward": files.finite(reward), "parts": nth(scores.parts, n)}
        rows.append(row | ({"watch": nth(scores.watch, n)} if scores.watch else {}))
    files.write_json_lines(stage.scores, rows)


def nth(parts: Parts, n: int) -> dict[str, float | str | None]:
    return {key: files.finite(value[n].item()) if isinstance(value, Tensor) else value[n] for key, value in parts.items()}
