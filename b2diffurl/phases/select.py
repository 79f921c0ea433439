"""Score one stage's images and pick what is trained on: contrast pairs, or all.

G groups, K branches, N = G*K images
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from b2diffurl.algorithm.advantages import advantages, normalise
from b2diffurl.algorithm.selection import Selected, select_all, select_pairs
from b2diffurl.configuration.plan import Plan
from b2diffurl.configuration.settings import Selection
from b2diffurl.experiment.metrics import Metrics, timed
from b2diffurl.experiment.not_finite import listed, not_finite
from b2diffurl.experiment.stage import Stage, delete_batches, finished_stages
from b2diffurl.experiment.trajectories import save_selected
from b2diffurl.phases.health import in_words, stage_warnings
from b2diffurl.phases.scoring import Scores, score_stage
from b2diffurl.rewards import check_rewards
from b2diffurl.rewards.file import write_template
from b2diffurl.runtime import files
from b2diffurl.runtime.batch_sizes import peak_memory
from b2diffurl.runtime.device import make_accelerator
from b2diffurl.runtime.logs import logger

ROUNDING = 1e-6  # of a reward: a scorer's models move equal images by as much from one place in a batch to another


def select_stage(plan: Plan) -> None:
    """Write scores.jsonl, selection.json and the manifest of the select phase.

    Where scores are made elsewhere (reward `file`) and are not there yet, say so and return with the phase unfinished.
    """
    stage, rewards = plan.stage, plan.settings.rewards
    named = [*rewards.weights, *rewards.watched]
    check_rewards(named, rewards)
    if stage.finished("select"):
        logger.info("stage%d select: already finished", stage.index)
        clean_up(plan)
        return
    files.require_writable(stage.folder)
    sampled = stage.manifest("sample")
    accelerator = make_accelerator(plan.settings.compute)
    history = []
    if accelerator.is_main_process:
        files.remove_temporaries(stage.folder)
        stage.verify("sample", stage.images.name, stage.prompts.name, stage.samples.name)
        # Before the images are scored, which a damaged history would make vain.
        history = score_history(stage, plan.settings.selection.num_history_stages)
    accelerator.wait_for_everyone()
    prompts = files.read_json(stage.prompts)
    if rewards.made_elsewhere and not stage.given_scores.is_file():
        if accelerator.is_main_process:
            ask_for_scores(stage, prompts)
    elif scores := score_stage(rewards, stage, prompts, accelerator):
        finish(plan, prompts, scores, history, sampled, accelerator)
    accelerator.wait_for_everyone()  # until the phase is finished for all
    accelerator.end_training()


def finish(
    plan: Plan,
    prompts: list[str],
    scores: Scores,
    history: list[tuple[str, float]],
    sampled: dict[str, Any],
    accelerator: Accelerator,
) -> None:
    """Select, copy what is selected, and write the manifest, last."""
    stage, num_branches = plan.stage, plan.settings.sampling.num_branches
    chosen = choose(plan.settings.selection, num_branches, scores.rewards, prompts, history)
    written = write_selection(plan, chosen)
    with timed(scores.seconds, "write"):
        written += save_selected(stage, chosen, plan.settings.sampling.num_groups)
    summary = summarise(scores, chosen, num_branches, plan.settings.selection)
    summary |= {"num_twin_groups": num_twin_groups(stage, sampled, len(prompts), num_branches)}
    Metrics(stage.metrics("select")).log("select", stage=stage.index, **summary, **scores.seconds)
    warned = stage_warnings(earlier_summaries(stage), summary)
    facts = {
        "seconds": scores.seconds,
        "reward": dict(plan.settings.rewards.weights),
        "scales": scores.scales,
        "num_history": len(history),
        **summary,
        "device": str(accelerator.device),
        "num_threads": torch.get_num_threads(),
        "seed": sampled["seed"],
        "num_processes": accelerator.num_processes,
        "batch_sizes": scores.batch_sizes,
        "warnings": warned,
        **peak_memory(accelerator.device),
    }
    stage.write_manifest("select", facts, [stage.scores, *written, stage.metrics("select")])
    clean_up(plan)
    log_summary(plan, summary, sum(scores.seconds.values()))
    for one in warned:
        logger.warning("stage%d select: %s", stage.index, in_words(one))


def choose(
    selection: Selection, num_branches: int, rewards: Tensor, prompts: list[str], history: list[tuple[str, float]]
) -> list[Selected]:
    """What is trained on: by scores relative to the prompt, or to the siblings, each group's best and worst, or all."""
    num_siblings = {"prompt": 0, "group": num_branches}[selection.baseline]
    scores = normalise(rewards, prompts, history, num_siblings=num_siblings).unflatten(0, (-1, num_branches))
    return select_all(scores) if selection.which == "all" else select_pairs(scores, **selection.thresholds)


def write_selection(plan: Plan, chosen: list[Selected]) -> list[Path]:
    """selection.json: each chosen image with its score and its advantage; deletes what an interrupted selection copied."""
    stage, selection = plan.stage, plan.settings.selection
    weighted = advantages(
        torch.tensor([one.score for one in chosen]),
        clip=selection.max_advantage,
        positive_weight=selection.positive_weight,
        negative_weight=selection.negative_weight,
    )
    ids = [one.group * plan.settings.sampling.num_branches + one.branch for one in chosen]
    require_finite_advantages(stage, weighted, ids)
    rows = [
        {"id": image, "group": one.group, "branch": one.branch, "score": one.score, "advantage": advantage}
        for image, one, advantage in zip(ids, chosen, weighted.tolist(), strict=True)
    ]
    files.write_json(stage.selection, rows)
    delete_batches(stage.selected)
    return [stage.selection]


def earlier_summaries(stage: Stage) -> list[dict[str, Any]]:
    """The manifests of the earlier stages' select phases; those of the first version, which lack figures, are left out."""
    manifests = [one.manifest("select") for one in finished_stages(stage.root, "select") if one.index < stage.index]
    return [manifest for manifest in manifests if "num_twin_groups" in manifest]


def log_summary(plan: Plan, summary: dict[str, Any], seconds: float) -> None:
    watched = "".join(f", {name} {summary[f'watch/{name}_mean']:.4f}" for name in plan.settings.rewards.watched)
    logger.info(
        "stage%d select: done in %.1f s, reward %.4f (sd %.4f, in groups %.4f)%s, kept %d of %d images, %d good, %d bad",
        plan.stage.index, seconds, summary["reward_mean"], summary["reward_std"], summary["reward_group_std"], watched,
        summary["num_selected"], summary["num_images"], summary["num_best"], summary["num_worst"],
    )  # fmt: skip


def clean_up(plan: Plan) -> None:
    """Delete the stage's trajectories, of which the selected ones have been copied, unless they are to be kept."""
    if not plan.settings.output.keep_samples:
        delete_batches(plan.stage.samples)


def require_finite_advantages(stage: Stage, weighted: Tensor, ids: list[int]) -> None:
    """A FloatingPointError names the images whose advantage is not finite, after all of them have been kept."""
    bad = [image for image, one in zip(ids, weighted, strict=True) if not one.isfinite()]
    if bad:
        said = f"{stage.folder}: the advantages of images {listed(bad)}, with train.beta1 and train.beta2, are not finite"
        raise not_finite(stage, "advantages", said, {"advantages": weighted}, {"images": bad, "selected": ids})


def num_twin_groups(stage: Stage, sampled: dict, num_images: int, num_siblings: int) -> int:
    """Groups with two equal images, by the checksums of their files: one writer makes one file of the same pixels."""
    names = [str(stage.image(n).relative_to(stage.folder)) for n in range(num_images)]
    sums = [sampled["files"][name]["sha256"] for name in names]
    groups = (sums[start : start + num_siblings] for start in range(0, num_images, num_siblings))
    return sum(len(set(group)) < num_siblings for group in groups)


def ask_for_scores(stage: Stage, prompts: list[str]) -> None:
    """Write the table that people fill with scores, and say where it is."""
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


def summarise(scores: Scores, chosen: list[Selected], num_siblings: int, selection: Selection) -> dict[str, float | int]:
    """The stage's figures for log, metrics and manifest."""
    rewards = scores.rewards
    means = scores.parts | {f"watch/{key}": value for key, value in scores.watch.items()}
    means = {key: value for key, value in means.items() if isinstance(value, Tensor) and value.isfinite().any()}
    inside = rewards.unflatten(0, (-1, num_siblings))
    spread, size = inside.amax(1) - inside.amin(1), inside.abs().amax(1)
    return {
        "num_images": len(rewards),
        "num_groups": len(inside),
        "num_flat_groups": int((spread <= ROUNDING * size).sum()) if num_siblings > 1 else 0,
        "num_selected": len(chosen),
        "num_best": sum(one.score >= selection.pos_threshold for one in chosen),
        "num_worst": sum(one.score < selection.neg_threshold for one in chosen),
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std().item() if len(rewards) > 1 else 0.0,
        "reward_group_std": inside.std(1).mean().item() if num_siblings > 1 else 0.0,
    } | {f"{key}_mean": value[value.isfinite()].mean().item() for key, value in means.items()}
