"""Score one stage's images and pick what is trained on: contrast pairs, or all.

G groups, K branches, N = G*K images
"""

import torch
from ml_collections import ConfigDict
from torch import Tensor

from b2diffurl import files
from b2diffurl.experiment import make_plan
from b2diffurl.memory import peak_memory
from b2diffurl.metrics import Metrics
from b2diffurl.rewards import check_rewards, reward_weights
from b2diffurl.rewards.file import write_template
from b2diffurl.runtime import logger, make_accelerator, timed
from b2diffurl.scoring import Scores, score_stage
from b2diffurl.selection import Selected, advantages, normalise, select_all, select_pairs
from b2diffurl.stage import Stage, delete_batches
from b2diffurl.trajectory import save_selected


def select_stage(config: ConfigDict) -> None:
    """Write scores.jsonl, selection.json and the manifest of the select phase.

    Where scores are made elsewhere (reward `file`) and are not there yet, say so and return with the phase unfinished.
    """
    plan = make_plan(config)
    weights, watched = reward_weights(config.reward), config.reward.watch
    check_rewards([*weights, *watched], config.reward)
    stage = plan.stage
    if stage.finished("select"):
        logger.info("stage%d select: already finished", stage.index)
        clean_up(config, stage)
        return
    files.require_writable(stage.folder)
    sampled = stage.manifest("sample")
    accelerator = make_accelerator(config, plan.num_threads)
    if not accelerator.is_main_process:
        return
    files.remove_temporaries(stage.folder)
    stage.verify("sample", stage.images.name, stage.prompts.name, stage.samples.name)
    prompts = files.read_json(stage.prompts)
    if "file" in (*weights, *watched) and not stage.given_scores.is_file():
        ask_for_scores(stage, prompts)
        return
    scores = score_stage(config, stage, prompts, accelerator.device)
    history = score_history(stage, config.eval.history_cnt)
    chosen = choose(config, scores.rewards, prompts, history)
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
    delete_batches(stage.selected)  # of a selection that was interrupted
    with timed(scores.seconds, "write"):
        selected = save_selected(stage, chosen, config.sample.batch_size)

    summary = summarise(scores, chosen, config.split_time, **thresholds(config))
    Metrics(stage.metrics("select")).log("select", stage=stage.index, **summary, **scores.seconds)
    facts = {"seconds": scores.seconds, "reward": weights, "scales": scores.scales, "num_history": len(history)} | summary
    facts |= {"device": str(accelerator.device), "num_threads": torch.get_num_threads(), "seed": sampled["seed"]}
    facts |= peak_memory(accelerator.device)
    stage.write_manifest("select", facts, [stage.scores, stage.selection, *selected, stage.metrics("select")])
    clean_up(config, stage)
    logger.info(
        "stage%d select: done in %.1f s, reward %.4f (sd %.4f, in groups %.4f)%s, kept %d of %d images, %d good, %d bad",
        stage.index, sum(scores.seconds.values()),
        summary["reward_mean"], summary["reward_std"], summary["reward_group_std"],
        "".join(f", {name} {summary[f'watch/{name}_mean']:.4f}" for name in watched),
        summary["num_selected"], summary["num_images"], summary["num_best"], summary["num_worst"],
    )  # fmt: skip


def clean_up(config: ConfigDict, stage: Stage) -> None:
    """Delete the stage's trajectories, of which the selected ones have been copied, unless config.keep says otherwise."""
    if not config.keep.samples:
        delete_batches(stage.samples)


def choose(config: ConfigDict, rewards: Tensor, prompts: list[str], history: list[tuple[str, float]]) -> list[Selected]:
    """What is trained on: by scores relative to the prompt, or to the siblings, each group's best and worst, or all."""
    siblings = {"prompt": 0, "group": config.split_time}[config.eval.advantage]
    scores = normalise(rewards, prompts, history, num_siblings=siblings).unflatten(0, (-1, config.split_time))
    return select_all(scores) if config.eval.selection == "all" else select_pairs(scores, **thresholds(config))


def thresholds(config: ConfigDict) -> dict[str, float]:
    return {"pos_threshold": config.eval.pos_threshold, "neg_threshold": config.eval.neg_threshold}


def ask_for_scores(stage: Stage, prompts: list[str]) -> None:
    write_template(stage, prompts)
    logger.info(
        "stage%d select: waiting for the scores of %d images. Images: %s; ids and prompts: %s. Fill its column "
        "`score`, save it as %s, and run the same command again.",
        stage.index, len(prompts), stage.images, stage.wanted_scores, stage.given_scores,
    )  # fmt: skip


def score_history(stage: Stage, count: int) -> list[tuple[str, float]]:
    """(prompt, reward) of up to `count` stages before this one."""
    history = []
    for before in (Stage(stage.root, index) for index in range(max(0, stage.index - count), stage.index)):
        if before.finished("select"):
            before.verify("select", before.scores.name)
            history += [(row["prompt"], row["reward"]) for row in files.read_json_lines(before.scores)]
    return history


def summarise(
    scores: Scores, chosen: list[Selected], num_siblings: int, *, pos_threshold: float, neg_threshold: float
) -> dict[str, float | int]:
    """The stage's figures for log, metrics and manifest."""
    rewards = scores.rewards
    means = scores.parts | {f"watch/{key}": value for key, value in scores.watch.items()}
    means = {key: value for key, value in means.items() if isinstance(value, Tensor) and value.isfinite().any()}
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
    } | {f"{key}_mean": value[value.isfinite()].mean().item() for key, value in means.items()}
