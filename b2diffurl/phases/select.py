"""The select phase: score one stage's images and select the trajectories to train on, contrast pairs or all.

G groups, K branches (siblings) in a group, N = G*K images
D depths of the tree in which the branches of a group part, 1 if they part at once
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from b2diffurl.algorithm.advantages import advantages
from b2diffurl.algorithm.selection import Selected, select_all, select_pairs
from b2diffurl.configuration.plan import Plan
from b2diffurl.configuration.settings import Selection
from b2diffurl.evaluation.intervals import MIN_PROMPTS, clustered
from b2diffurl.experiment.metrics import Metrics, timed
from b2diffurl.experiment.not_finite import listed, not_finite
from b2diffurl.experiment.origin import history_stages, made_from, require_origin, require_scales
from b2diffurl.experiment.stage import Stage, finished_stages
from b2diffurl.experiment.trajectories import save_selected
from b2diffurl.phases.health import in_words, stage_warnings
from b2diffurl.phases.inputs import reward_checksums
from b2diffurl.phases.normalising import normalise_scores, read_rows
from b2diffurl.phases.scoring import Scores, score_stage
from b2diffurl.rewards import check_rewards
from b2diffurl.rewards.file import write_template
from b2diffurl.runtime import files
from b2diffurl.runtime.batch_sizes import peak_memory
from b2diffurl.runtime.device import make_accelerator
from b2diffurl.runtime.logs import logger

ROUNDING = 1e-6  # relative; a scorer's rewards of equal images differ by about this, by their place in the batch


def select_stage(plan: Plan) -> None:
    """Score the stage's images, select trajectories, and write scores.jsonl, selection.json and the phase's manifest.

    If the scores are made elsewhere (reward `file`) and are not there yet, log where to put them and return. The phase is
    then unfinished.
    """
    stage, rewards = plan.stage, plan.settings.rewards
    check_rewards([*rewards.weights, *rewards.watched], rewards)
    require_origin(stage)
    if stage.finished("select"):
        logger.info("stage%d select: already finished", stage.index)
        clean_up(plan)  # a run killed between the manifest and its own clean_up has left files
        return
    reward_files = reward_checksums(plan)
    files.require_writable(stage.folder)
    sampled = stage.manifest("sample")
    accelerator = make_accelerator(plan.settings.compute)
    earlier = history_stages(stage, plan.settings.selection.num_history_stages)
    if rewards.standardise:
        require_scales(stage)
    earlier_rows = []
    if accelerator.is_main_process:
        stage.remove_temporaries()
        stage.verify("sample", stage.images.name, stage.prompts.name, stage.samples.name)
        # Read before scoring: a damaged file is then refused before the work and not after it.
        earlier_rows = read_rows(earlier)
    accelerator.wait_for_everyone()
    prompts = files.read_json(stage.prompts)
    if rewards.made_elsewhere and not stage.given_scores.is_file():
        if accelerator.is_main_process:
            ask_for_scores(stage, prompts)
    elif scores := score_stage(rewards, stage, prompts, accelerator):
        origin = {"made_from": made_from(stage, earlier), "reward_files": reward_files}
        finish(plan, prompts, scores, earlier_rows, origin, sampled, accelerator)
    accelerator.wait_for_everyone()  # no process goes on to the next phase before the manifest is written
    accelerator.end_training()


def finish(
    plan: Plan,
    prompts: list[str],
    scores: Scores,
    earlier_rows: list[dict[str, Any]],
    origin: dict[str, Any],
    sampled: dict[str, Any],
    accelerator: Accelerator,
) -> None:
    """Select, copy the selected trajectories, log and write metrics, and write the manifest after all other files."""
    stage, num_branches = plan.stage, plan.settings.sampling.num_branches
    normalised = normalise_scores(plan.settings, prompts, scores, earlier_rows)
    selected = select_trajectories(plan.settings.selection, normalised.scores, num_branches)
    written = write_selection(plan, selected, normalised.edges)
    with timed(scores.seconds, "write"):
        written += save_selected(stage, selected, plan.settings.sampling.num_groups)
    rewards = plan.settings.rewards
    apart = rewards.weights if rewards.combine == "advantages" else {}
    summary = summarise(scores, selected, num_branches, plan.settings.selection, apart)
    summary |= {f"{name}_share": share for name, share in normalised.shares.items()}
    summary |= {"num_twin_groups": num_twin_groups(stage, sampled, len(prompts), num_branches)}
    Metrics(stage.metrics("select")).log("select", stage=stage.index, **summary, **scores.seconds)
    figures = noted_figures(scores, apart, rewards.watched, prompts, num_branches)
    noted = summary | {"stage": stage.index, "figures": figures}
    warnings = stage_warnings(earlier_summaries(stage), noted, apart)
    facts = {
        "seconds": scores.seconds,
        "reward": dict(plan.settings.rewards.weights),
        "combine": plan.settings.rewards.combine,
        "scales": scores.scales,
        "num_history": len(earlier_rows),
        **origin,
        **summary,
        "figures": figures,
        "device": str(accelerator.device),
        "num_threads": torch.get_num_threads(),
        "seed": sampled["seed"],
        "num_processes": accelerator.num_processes,
        "batch_sizes": scores.batch_sizes,
        **({"spent": scores.spent} if scores.spent else {}),
        "warnings": warnings,
        **peak_memory(accelerator.device),
    }
    stage.write_manifest("select", facts, [stage.scores, *written, stage.metrics("select")])
    clean_up(plan)  # only now: until the manifest is written a killed run has to read the trajectories again
    log_summary(plan, summary, sum(scores.seconds.values()))
    for warning in warnings:
        logger.warning("stage%d select: %s", stage.index, in_words(warning))


def select_trajectories(selection: Selection, scores: Tensor, num_siblings: int) -> list[Selected]:
    """The trajectories to train on, by their scores [N]: of each group the best and the worst if they pass the thresholds,
    or all."""
    grouped = scores.unflatten(0, (-1, num_siblings))
    return select_all(grouped) if selection.which == "all" else select_pairs(grouped, **selection.thresholds)


def write_selection(plan: Plan, selected: list[Selected], edges: Tensor) -> list[Path]:
    """Write selection.json, each selected image with its score and its advantage: in a tree a list, one for each edge.

    `edges` [N,D] are the scores of the edges on each image's way. Returns the file in a list. Deletes the trajectories that
    an interrupted selection has copied.
    """
    stage, selection = plan.stage, plan.settings.selection
    ids = [one.group * plan.settings.sampling.num_branches + one.branch for one in selected]
    weighted = advantages(
        edges[ids],
        clip=selection.max_advantage,
        positive_weight=selection.positive_weight,
        negative_weight=selection.negative_weight,
    ).squeeze(1)  # of one depth: [selected]
    require_finite_advantages(stage, weighted, ids)
    rows = [
        {"id": image, "group": one.group, "branch": one.branch, "score": one.score, "advantage": advantage}
        for image, one, advantage in zip(ids, selected, weighted.tolist(), strict=True)
    ]
    files.write_json(stage.selection, rows)
    # An interrupted selection with other scores may have copied from batches that this one leaves out.
    stage.delete_ours(stage.selected)
    return [stage.selection]


def earlier_summaries(stage: Stage) -> list[dict[str, Any]]:
    """What the warnings need of the earlier stages' select manifests, in order."""
    found = [one.noted("select") for one in finished_stages(stage.root, "select") if one.index < stage.index]
    # Those that the first version wrote lack figures that the warnings need.
    return [summary for summary in found if "num_twin_groups" in summary]


def log_summary(plan: Plan, summary: dict[str, Any], seconds: float) -> None:
    """The line that ends the phase, of a mixture with its parts' means and shares. A watched reward is given by its mean, or
    by `none` where it has scored nothing."""
    rewards = plan.settings.rewards
    means = {name: summary[f"{name}_mean"] for name in rewards.weights if rewards.mixed}
    means |= {name: summary[f"watch/{name}_mean"] for name in rewards.watched}
    others = [f"{name} " + ("none" if mean is None else f"{mean:.4f}") for name, mean in means.items()]
    others += [f"share of {name} {summary[f'{name}_share']:.2f}" for name in rewards.weights if rewards.mixed]
    logger.info(
        "stage%d select: done in %.1f s, reward %.4f (sd %.4f, in groups %.4f)%s, kept %d of %d images, %d good, %d bad",
        plan.stage.index, seconds, summary["reward_mean"], summary["reward_std"], summary["reward_group_std"],
        "".join(f", {other}" for other in others),
        summary["num_selected"], summary["num_images"], summary["num_best"], summary["num_worst"],
    )  # fmt: skip


def clean_up(plan: Plan) -> None:
    """Delete the scores of single batches and, unless the user keeps them, the trajectories; the selected are copied."""
    plan.stage.delete_ours(plan.stage.scored)
    if not plan.settings.output.keep_samples:
        plan.stage.delete_ours(plan.stage.samples)


def require_finite_advantages(stage: Stage, weighted: Tensor, ids: list[int]) -> None:
    """Stop if an advantage is not finite: write all advantages to debug/, raise a FloatingPointError with the images.

    Scores are clamped, but the weights train.beta1 and train.beta2 may overflow.
    """
    bad = [image for image, advantage in zip(ids, weighted, strict=True) if not advantage.isfinite().all()]
    if bad:
        message = f"{stage.folder}: the advantages of images {listed(bad)}, with train.beta1 and train.beta2, are not finite"
        raise not_finite(stage, "advantages", message, {"advantages": weighted}, {"images": bad, "selected": ids})


def num_twin_groups(stage: Stage, sampled: dict, num_images: int, num_siblings: int) -> int:
    """The number of groups that have two identical images: a sign that the model has collapsed."""
    # The checksums of the image files will do: the same pixels make the same file.
    names = [str(stage.image(n).relative_to(stage.folder)) for n in range(num_images)]
    sums = [sampled["files"][name]["sha256"] for name in names]
    groups = (sums[start : start + num_siblings] for start in range(0, num_images, num_siblings))
    return sum(len(set(group)) < num_siblings for group in groups)


def ask_for_scores(stage: Stage, prompts: list[str]) -> None:
    """Write the table that people fill with scores, and log where it is, and which command shows them the images."""
    write_template(stage, prompts)
    logger.info(
        "stage%d select: waiting for the scores of %d images. Judge them in a browser: python -m b2diffurl.label %s. "
        "Or score the images of %s in a table: %s has ids and prompts, fill its column `score` and save it as %s. "
        "Then run the same command again.",
        stage.index, len(prompts), stage.root, stage.images, stage.wanted_scores, stage.given_scores,
    )  # fmt: skip


def summarise(
    scores: Scores, selected: list[Selected], num_siblings: int, selection: Selection, apart: Mapping[str, float]
) -> dict[str, Any]:
    """The stage's figures for log, metrics and manifest. The mean of a watched reward that has scored nothing is None.

    `apart` are the rewards that are normalised each by itself, if they are.
    """
    rewards = scores.rewards
    averaged = scores.parts | {f"watch/{key}": value for key, value in scores.watch.items()}
    # A part may be text. It or a watched reward may lack a value for some images: a mean is of the images that have one.
    watched = {f"watch/{key}_mean": None for key in scores.watch if "/" not in key}
    averaged = {key: value for key, value in averaged.items() if isinstance(value, Tensor) and value.isfinite().any()}
    grouped = rewards.unflatten(0, (-1, num_siblings))  # [G,K]
    flat = [is_flat(scores.parts[name].unflatten(0, (-1, num_siblings))) for name in apart] or [is_flat(grouped)]
    return {
        "num_images": len(rewards),
        "num_groups": len(grouped),
        "num_flat_groups": int(torch.stack(flat).all(0).sum()) if num_siblings > 1 else 0,
        "num_selected": len(selected),
        "num_best": sum(one.score >= selection.pos_threshold for one in selected),
        "num_worst": sum(one.score < selection.neg_threshold for one in selected),
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std().item() if len(rewards) > 1 else 0.0,
        "reward_group_std": grouped.std(1).mean().item() if num_siblings > 1 else 0.0,
        **watched,
    } | {f"{key}_mean": value[value.isfinite()].mean().item() for key, value in averaged.items()}


def is_flat(grouped: Tensor) -> Tensor:
    """Whether the rewards [G,K] of each group's siblings are all the same, [G]."""
    spread, size = grouped.amax(1) - grouped.amin(1), grouped.abs().amax(1)
    return spread <= ROUNDING * size


def noted_figures(
    scores: Scores, apart: Mapping[str, float], watched: Sequence[str], prompts: Sequence[str], num_siblings: int
) -> dict[str, list[float]]:
    """{name: [mean, its standard error, standard deviation of single images]} of what is trained on and of watched rewards.

    Siblings, and images of one prompt, are alike. So the errors are over prompts, or if there are few of them over groups.
    """
    few = len(set(prompts)) < MIN_PROMPTS
    units = [n // num_siblings for n in range(len(prompts))] if few else prompts
    values = {"reward": scores.rewards} | {name: scores.parts[name] for name in apart}
    values |= {name: scores.watch[name] for name in watched}
    figures = {}
    for name, numbers in values.items():
        finite = numbers.isfinite()
        found = clustered([files.finite(value) for value in numbers.tolist()], units, least=2)
        if found and found.error is not None:
            figures[name] = [found.mean, found.error, numbers[finite].double().std().item()]
    return figures
