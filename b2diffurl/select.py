"""Score one stage's images and pick what is trained on: contrast pairs, or all.

G groups, K branches, N = G*K images
"""

import time

import numpy as np
import torch
from ml_collections import ConfigDict
from PIL import Image
from torch import Tensor

from b2diffurl import files
from b2diffurl.experiment import make_plan
from b2diffurl.metrics import open_metrics
from b2diffurl.rewards import Parts, Reward, check_reward, load_reward, score
from b2diffurl.runtime import logger, make_accelerator, progress
from b2diffurl.selection import Selected, advantages, normalise, select_all, select_pairs
from b2diffurl.stage import Stage


def select_stage(config: ConfigDict) -> None:
    """Write scores.jsonl, selection.json and the manifest of the select phase."""
    plan = make_plan(config)
    check_reward(config.reward.name, config.reward)
    stage = plan.stage
    if stage.finished("select"):
        logger.info("select stage%d: already finished", stage.index)
        return
    sampled = stage.manifest("sample")
    accelerator = make_accelerator(config, plan.num_threads)
    if not accelerator.is_main_process:
        return
    started = time.perf_counter()
    files.remove_temporaries(stage.folder)
    stage.verify("sample", "images", stage.prompts.name)
    prompts = files.read_json(stage.prompts)
    reward = load_reward(config.reward.name, config.reward, accelerator.device)
    loaded = time.perf_counter()
    rewards, parts = score_images(reward, stage, prompts, config.reward.batch_size)
    write_scores(stage, prompts, rewards, parts)
    require_finite(stage, rewards)

    history = score_history(stage, config.eval.history_cnt)
    siblings = {"prompt": 0, "group": config.split_time}[config.eval.advantage]
    scores = normalise(rewards, prompts, history, num_siblings=siblings)
    thresholds = {"pos_threshold": config.eval.pos_threshold, "neg_threshold": config.eval.neg_threshold}
    grouped = scores.unflatten(0, (-1, config.split_time))
    chosen = select_all(grouped) if config.eval.selection == "all" else select_pairs(grouped, **thresholds)
    weights = advantages(
        torch.tensor([one.score for one in chosen]),
        clip=config.train.adv_clip_max,
        positive_weight=config.train.beta1,
        negative_weight=config.train.beta2,
    )
    rows = [
        {"id": one.group * config.split_time + one.branch, "group": one.group, "branch": one.branch}
        | {"score": one.score, "advantage": advantage}
        for one, advantage in zip(chosen, weights.tolist(), strict=True)
    ]
    files.write_json(stage.selection, rows)

    seconds = {"load": loaded - started, "score": time.perf_counter() - loaded}
    summary = summarise(rewards, parts, chosen, config.split_time, **thresholds)
    open_metrics(config, plan, "select").log("select", stage=stage.index, **summary, **seconds)
    facts = {"seconds": seconds, "reward": config.reward.name, "num_history": len(history)} | summary
    facts |= {"device": str(accelerator.device), "num_threads": torch.get_num_threads(), "seed": sampled["seed"]}
    stage.write_manifest("select", facts, [stage.scores, stage.selection, stage.metrics("select")])
    logger.info(
        "select stage%d: reward %.4f (sd %.4f, inside groups %.4f), kept %d (%d good and %d bad ones) of %d groups",
        stage.index, summary["reward_mean"], summary["reward_std"], summary["reward_group_std"],
        summary["num_selected"], summary["num_best"], summary["num_worst"], summary["num_groups"],
    )  # fmt: skip


def score_images(reward: Reward, stage: Stage, prompts: list[str], batch_size: int) -> tuple[Tensor, Parts]:
    """Rewards [N] and parts of all images, `batch_size` at once; the last batch is filled up by repeating its last."""
    rewards, parts = [], []
    for start in progress(range(0, len(prompts), batch_size), f"stage{stage.index} score"):
        ids = range(start, min(start + batch_size, len(prompts)))
        padded = [*ids, *[ids[-1]] * (batch_size - len(ids))] if len(prompts) > batch_size else ids
        images = torch.stack([torch.from_numpy(np.array(Image.open(stage.image(n)).convert("RGB"))) for n in padded])
        some_rewards, some_parts = score(reward, images, [prompts[n] for n in padded])
        rewards.append(some_rewards[: len(ids)])
        parts.append({key: value[: len(ids)] for key, value in some_parts.items()})
    return torch.cat(rewards), {key: torch.cat([some[key] for some in parts]) for key in parts[0]}


def write_scores(stage: Stage, prompts: list[str], rewards: Tensor, parts: Parts) -> None:
    rows = []
    for n, (prompt, reward) in enumerate(zip(prompts, rewards.tolist(), strict=True)):
        row = {"id": n, "prompt": prompt, "reward": finite(reward)}
        rows.append(row | {"parts": {key: finite(value[n].item()) for key, value in parts.items()}})
    files.write_json_lines(stage.scores, rows)


def finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def require_finite(stage: Stage, rewards: Tensor) -> None:
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(f"the reward is not finite for images {bad[:20]} of {stage.images}; see {stage.scores}")


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
    } | {f"{key}_mean": value.mean().item() for key, value in parts.items()}
