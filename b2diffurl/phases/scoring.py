"""What the rewards say of a stage's images: the reward that is trained on, its parts, and the watched ones.

N images
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict
from torch import Tensor

from b2diffurl.experiment.stage import Stage, not_finite
from b2diffurl.rewards import Parts, Reward, by_name, join, load_reward, noting, require_finite, reward_weights, score
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


def score_stage(config: ConfigDict, stage: Stage, prompts: list[str], accelerator: Accelerator) -> Scores | None:
    """Score every image by every reward, one model after the other, and write scores.jsonl; processes share the batches, and
    the first one has the scores.

    A FloatingPointError names the images whose score is not finite, after all scores have been written.
    """
    weights, watched = reward_weights(config.reward), config.reward.watch
    seconds, batch_sizes = {"load": 0.0, "score": 0.0}, {}
    found = {
        name: score_by(name, config, stage, prompts, accelerator, seconds, batch_sizes) for name in (*weights, *watched)
    }
    if not accelerator.is_main_process:
        return None
    values = {name: found[name][0] for name in weights}
    scales = (recorded_scales(stage.root) or measure_scales(values)) if config.reward.standardise else None
    parts = {key: value for name in weights for key, value in by_name(name, *found[name]).items()}
    scores = Scores(
        combine(values, weights, scales),
        parts if config.reward.weights else found[config.reward.name][1],
        {key: value for name in watched for key, value in by_name(name, *found[name]).items()},
        scales,
        seconds,
        batch_sizes,
    )
    write_scores(stage, prompts, scores)
    require_finite_scores(stage, prompts, found, scores)
    return scores


def require_finite_scores(stage: Stage, prompts: list[str], found: dict[str, tuple[Tensor, Parts]], scores: Scores) -> None:
    """Parts need not be finite."""
    named = {name: rewards for name, (rewards, _) in found.items()} | {"(weighted sum)": scores.rewards}
    try:
        for name, rewards in named.items():
            require_finite(name, rewards, f"of {stage.images}; see {stage.scores}")
    except FloatingPointError as error:
        bad = [n for n in range(len(prompts)) if not all(rewards[n].isfinite() for rewards in named.values())]
        values = {key: value for name, one in found.items() for key, value in by_name(name, *one).items()} | named
        tensors = {key: value[bad] for key, value in values.items() if isinstance(value, Tensor)}
        texts = {key: [value[n] for n in bad] for key, value in values.items() if isinstance(value, list)}
        facts = {"images": bad, "prompts": [prompts[n] for n in bad], "texts": texts}
        raise not_finite(stage, "rewards", str(error), tensors, facts) from None


def score_by(
    name: str,
    config: ConfigDict,
    stage: Stage,
    prompts: list[str],
    accelerator: Accelerator,
    seconds: dict[str, float],
    batch_sizes: dict[str, int],
) -> tuple[Tensor, Parts]:
    """Rewards [N] and parts of one reward, in the first process, whose model is gone when it returns; adds to `seconds` and
    `batch_sizes`."""
    if name == "file":
        return read_scores(stage.given_scores, len(prompts)), {}
    started = time.perf_counter()
    reward = load_reward(name, config.reward, accelerator.device)
    loaded = time.perf_counter()
    logger.info("stage%d select: scoring %d images by %s", stage.index, len(prompts), name)
    wanted = {"reward.batch_size": config.reward.batch_size}
    sizes = BatchSizes(stage.root, accelerator.device, wanted, alone=accelerator.num_processes == 1, given=[name])
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    batches = sizes.fit(
        "reward.batch_size",
        lambda size: score_images(name, reward, stage, prompts, size, config.reward.num_workers, share),
    )
    batches = gather(stage, batches, accelerator)
    scores = join(batches) if accelerator.is_main_process else (torch.empty(0), {})
    batch_sizes[name] = sizes.sizes["reward.batch_size"]
    seconds["load"] += loaded - started
    seconds["score"] += time.perf_counter() - loaded
    return scores


def score_images(
    name: str, reward: Reward, stage: Stage, prompts: list[str], batch_size: int, num_workers: int, share: slice
) -> list[tuple[Tensor, Parts]]:
    """Rewards and parts of a `share` of the batches of `batch_size` images; the last batch of all is filled up by repeating
    its last image."""
    size = min(batch_size, len(prompts))
    starts = range(0, len(prompts), size)[share]
    num_images = sum(min(size, len(prompts) - start) for start in starts)
    found = []
    with (
        progress_bar(num_images, f"stage{stage.index} score {name}", "images") as bar,
        ThreadPoolExecutor(num_workers) as pool,
    ):

        def place(start: int) -> str:
            last = min(start + size, len(prompts)) - 1
            return f"reward {name}, batch {start // size}: images {start} to {last} of {stage.images}"

        def read(start: int) -> Tensor:
            paths = [stage.image(min(n, len(prompts) - 1)) for n in range(start, start + size)]
            with noting(place(start)):
                return torch.stack(list(pool.map(files.read_image, paths)))

        for start, images in ahead(read, starts):
            asked = [prompts[min(n, len(prompts) - 1)] for n in range(start, start + size)]
            count = min(size, len(prompts) - start)
            with noting(place(start)):
                found.append(score(reward, images, asked, count))
            bar.update(count)
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
