"""Score one stage's images and pick what is trained on: contrast pairs, or all.

G groups, K branches, N = G*K images
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from b2diffurl import files
from b2diffurl.experiment import make_plan
from b2diffurl.metrics import open_metrics
from b2diffurl.rewards import Parts, Reward, check_rewards, load_reward, reward_weights, score
from b2diffurl.rewards.file import read_scores, write_template
from b2diffurl.rewards.mixture import combine, measure_scales, recorded_scales
from b2diffurl.runtime import logger, make_accelerator, progress
from b2diffurl.selection import Selected, advantages, normalise, select_all, select_pairs
from b2diffurl.stage import Stage


def select_stage(config: ConfigDict) -> None:
    """Write scores.jsonl, selection.json and the manifest of the select phase.

    Where scores are made elsewhere (reward `file`) and are not there yet, say so and return with the phase unfinished.
    """
    plan = make_plan(config)
    weights, watched = reward_weights(config.reward), config.reward.watch
    check_rewards([*weights, *watched], config.reward)
    stage = plan.stage
    if stage.finished("select"):
        logger.info("select stage%d: already finished", stage.index)
        return
    sampled = stage.manifest("sample")
    accelerator = make_accelerator(config, plan.num_threads)
    if not accelerator.is_main_process:
        return
    files.remove_temporaries(stage.folder)
    stage.verify("sample", "images", stage.prompts.name)
    prompts = files.read_json(stage.prompts)
    if "file" in (*weights, *watched) and not stage.given_scores.is_file():
        ask_for_scores(stage, prompts)
        return
    seconds = {"load": 0.0, "score": 0.0}
    scores = {name: score_stage(name, config, stage, prompts, accelerator.device, seconds) for name in (*weights, *watched)}
    values = {name: scores[name][0] for name in weights}
    scales = (recorded_scales(stage.root) or measure_scales(values)) if config.reward.standardise else None
    rewards = combine(values, weights, scales)
    parts = named_parts(scores, weights) if config.reward.weights else scores[config.reward.name][1]
    watch = named_parts(scores, watched)
    write_scores(stage, prompts, rewards, parts, watch)
    for name, (numbers, _) in scores.items():
        require_finite(stage, name, numbers)

    history = score_history(stage, config.eval.history_cnt)
    siblings = {"prompt": 0, "group": config.split_time}[config.eval.advantage]
    normalised = normalise(rewards, prompts, history, num_siblings=siblings)
    thresholds = {"pos_threshold": config.eval.pos_threshold, "neg_threshold": config.eval.neg_threshold}
    grouped = normalised.unflatten(0, (-1, config.split_time))
    chosen = select_all(grouped) if config.eval.selection == "all" else select_pairs(grouped, **thresholds)
    weighted = advantages(
        torch.tensor([one.score for one in chosen]),
        clip=config.train.adv_clip_max,
        positive_weight=config.train.beta1,
        negative_weight=config.train.beta2,
    )
    rows = [
        {"id": one.group * config.split_time + one.branch, "group": one.group, "branch": one.branch}
        | {"score": one.score, "advantage": advantage}
        for one, advantage in zip(chosen, weighted.tolist(), strict=True)
    ]
    files.write_json(stage.selection, rows)

    summary = summarise(
        rewards, parts | {f"watch/{key}": value for key, value in watch.items()}, chosen, config.split_time, **thresholds
    )
    open_metrics(config, plan, "select").log("select", stage=stage.index, **summary, **seconds)
    facts = {"seconds": seconds, "reward": weights, "scales": scales, "num_history": len(history)} | summary
    facts |= {"device": str(accelerator.device), "num_threads": torch.get_num_threads(), "seed": sampled["seed"]}
    stage.write_manifest("select", facts, [stage.scores, stage.selection, stage.metrics("select")])
    logger.info(
        "select stage%d: reward %.4f (sd %.4f, inside groups %.4f), kept %d (%d good and %d bad ones) of %d groups",
        stage.index, summary["reward_mean"], summary["reward_std"], summary["reward_group_std"],
        summary["num_selected"], summary["num_best"], summary["num_worst"], summary["num_groups"],
    )  # fmt: skip


def ask_for_scores(stage: Stage, prompts: list[str]) -> None:
    write_template(stage, prompts)
    logger.info(
        "select stage%d: waiting for the scores of %d images. Images: %s; ids and prompts: %s. Fill its column "
        "`score`, save it as %s, and run the same command again.",
        stage.index, len(prompts), stage.images, stage.wanted_scores, stage.given_scores,
    )  # fmt: skip


def score_stage(
    name: str, config: ConfigDict, stage: Stage, prompts: list[str], device: torch.device, seconds: dict[str, float]
) -> tuple[Tensor, Parts]:
    """What reward `name` says of the stage's images: rewards [N] and parts. Its model is gone again afterwards."""
    if name == "file":
        return read_scores(stage.given_scores, len(prompts)), {}
    started = time.perf_counter()
    reward = load_reward(name, config.reward, device)
    loaded = time.perf_counter()
    scores = score_images(reward, name, stage, prompts, config.reward.batch_size, config.reward.num_workers)
    seconds["load"] += loaded - started
    seconds["score"] += time.perf_counter() - loaded
    return scores


def score_images(
    reward: Reward, name: str, stage: Stage, prompts: list[str], batch_size: int, num_workers: int
) -> tuple[Tensor, Parts]:
    """Rewards [N] and parts of all images, `batch_size` at once; the last batch is filled up by repeating its last."""
    rewards: list[Tensor] = []
    parts: dict[str, list] = {}
    size = min(batch_size, len(prompts))
    batches = [[min(n, len(prompts) - 1) for n in range(start, start + size)] for start in range(0, len(prompts), size)]
    images = read_ahead([[stage.image(n) for n in batch] for batch in batches], num_workers)
    for index, batch in enumerate(progress(batches, f"stage{stage.index} score {name}")):
        real = min(size, len(prompts) - index * size)
        try:
            some_rewards, some_parts = score(reward, next(images), [prompts[n] for n in batch])
        except Exception as error:
            error.add_note(f"reward {name}, batch {index}: images {batch[0]} to {batch[-1]} of {stage.images}")
            raise
        rewards.append(some_rewards[:real])
        for key, value in some_parts.items():
            parts.setdefault(key, []).extend(value[:real])
    return torch.cat(rewards), {
        key: torch.stack(value) if isinstance(value[0], Tensor) else value for key, value in parts.items()
    }


def read_ahead(batches: list[list[Path]], num_workers: int) -> Iterator[Tensor]:
    """Images uint8 [N,H,W,3] of each batch of files, the next batch being read while one is worked on."""
    with ThreadPoolExecutor(num_workers) as pool:
        reading = deque()
        for paths in [*batches, []]:
            reading.append([pool.submit(files.read_image, path) for path in paths])
            if len(reading) > 1:
                yield torch.stack([image.result() for image in reading.popleft()])


def named_parts(scores: dict[str, tuple[Tensor, Parts]], names: Iterable[str]) -> Parts:
    """Each named reward's value under its name, and its parts as name/part."""
    return {
        key: value
        for name in names
        for key, value in (
            {name: scores[name][0]} | {f"{name}/{part}": value for part, value in scores[name][1].items()}
        ).items()
    }


def write_scores(stage: Stage, prompts: list[str], rewards: Tensor, parts: Parts, watch: Parts) -> None:
    rows = []
    for n, (prompt, reward) in enumerate(zip(prompts, rewards.tolist(), strict=True)):
        row = {"id": n, "prompt": prompt, "reward": finite(reward), "parts": nth(parts, n)}
        rows.append(row | ({"watch": nth(watch, n)} if watch else {}))
    files.write_json_lines(stage.scores, rows)


def nth(parts: Parts, n: int) -> dict[str, float | str | None]:
    return {key: finite(value[n].item()) if isinstance(value, Tensor) else value[n] for key, value in parts.items()}


def finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def require_finite(stage: Stage, name: str, rewards: Tensor) -> None:
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        shown = f"{bad[:20]}" + (f" and {len(bad) - 20} more" if len(bad) > 20 else "")
        raise FloatingPointError(f"reward {name} is not finite for images {shown} of {stage.images}; see {stage.scores}")


def score_history(stage: Stage, count: int) -> list[tuple[str, float]]:
    """(prompt, reward) of up to `count` stages before this one."""
    history = []
    for before in (Stage(stage.root, index) for index in range(max(0, stage.index - count), stage.index)):
        if before.finished("select"):
            before.verify("select", before.scores.name)
            history += [(row["prompt"], row["reward"]) for row in files.read_json_lines(before.scores)]
    return history


def summarise(
    rewards: Tensor, parts: Parts, chosen: list[Selected], num_siblings: int, *, pos_threshold: float, neg_threshold: float
) -> dict[str, float | int]:
    """The stage's figures for log, metrics and manifest."""
    inside = rewards.unflatten(0, (-1, num_siblings))
    return {
        "num_images": len(rewards),
        "num_groups": len(inside),
        "num_selected": len(chosen),
        "num_best": sum(one.score >= pos_threshold for one in chosen),
        "num_worst": sum(one.score < neg_threshold for one in chosen),
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std().item() if len(rewards) > 1 else 0.0,
        "reward_group_std": inside.std(1).mean().item() if num_siblings > 1 else 0.0,
    } | {f"{key}_mean": value.mean().item() for key, value in parts.items() if isinstance(value, Tensor)}
