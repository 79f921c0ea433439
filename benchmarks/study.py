"""Do the claims of B2-DiffuRL hold? The runs behind docs/results/study.md.

    python -m benchmarks.study             # all runs; finished ones are not repeated, so a killed study goes on
    python -m benchmarks.study --quick     # a small version in three minutes, to see that it works
    python -m benchmarks.study --draw      # make no runs, only write the page from the finished ones

Runs are made side by side, one thread each: first the four arms seed by seed, then other objectives, then controls.
"""

import argparse
import json
import logging
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from b2diffurl.configuration.plan import checked_settings, make_plan
from b2diffurl.configuration.settings import read_settings
from b2diffurl.evaluation.generate import training_sampler
from b2diffurl.evaluation.measure import evaluate
from b2diffurl.evaluation.statistics import add_differences
from b2diffurl.experiment.stage import Stage, versions
from b2diffurl.objectives import OBJECTIVES
from b2diffurl.phases.sample import sample_stage
from b2diffurl.phases.select import select_stage
from b2diffurl.phases.train import train_stage
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import set_up_logging
from config.stage_process import get_config

SETS = ("train", "test")
EVAL_SEED = 1
JUDGED_EVERY = 3  # stages

log = logging.getLogger("b2diffurl")


@dataclass(frozen=True)
class Variant:
    """An arm of the study, or an arm with some settings changed."""

    name: str
    arm: str  # a preset: b2, bs, bpt, ddpo
    seeds: int  # how many; they are 1, 2, …
    settings: dict[str, Any] = field(default_factory=dict)  # the changes, by key
    against: str = "b2"  # name of the variant that it is compared with


@dataclass(frozen=True)
class Scale:
    """The size of a study."""

    prefix: str  # of the experiments' names
    seeds: int  # at most so many of each variant
    settings: dict[str, Any]  # changes to every run, by key
    blocks: tuple[list[Variant], ...]  # the runs, one block after the other


ARMS = [Variant(arm, arm, 5, against="ddpo") for arm in ("ddpo", "bpt", "bs", "b2")]
OBJECTIVE_RUNS = [
    Variant("b2, dpok", "b2", 3, {"train.objective": "dpok"}),
    Variant("b2, d3po", "b2", 3, {"train.objective": "d3po"}),
    Variant("ddpo arm, dpok", "ddpo", 3, {"train.objective": "dpok"}, against="ddpo"),
]
CONTROLS = [  # the most telling first
    Variant("ddpo, updates of b2", "ddpo", 3, {"train.batch_size": 48}, against="ddpo"),
    Variant("b2, updates of ddpo", "b2", 3, {"train.num_epochs": 3}),
    Variant("ddpo, pairs", "ddpo", 3, {"eval.selection": "pairs"}, against="ddpo"),
    Variant("b2, S = T", "b2", 3, {"curriculum": "fixed", "split_step_left": 8}),
    Variant("b2, all images", "b2", 3, {"eval.selection": "all"}),
    Variant("b2, reversed", "b2", 3, {"curriculum": "reversed"}),
    Variant("b2, thresholds 0", "b2", 2, {"eval.pos_threshold": 0.0, "eval.neg_threshold": 0.0}),
    Variant("b2, thresholds 0.7", "b2", 2, {"eval.pos_threshold": 0.7, "eval.neg_threshold": -0.7}),
    Variant("b2, K = 3", "b2", 2, {"split_time": 3, "sample.batch_size": 53}),
    Variant("b2, K = 8", "b2", 2, {"split_time": 8, "sample.batch_size": 20}),
    Variant("b2, advantage by group", "b2", 2, {"eval.advantage": "group"}),
    Variant("b2, weights none", "b2", 2, {"train.step_weight": "none"}),
    Variant("b2, weights leverage", "b2", 2, {"train.step_weight": "leverage"}),
    Variant("b2, clip range 0.1", "b2", 2, {"train.eps": 0.1}),
    Variant("b2, clip range 0.0064", "b2", 2, {"train.eps": 0.0064}),  # DDPO's 1e-4 at D = 16,384, at D = 256
    Variant("b2, rewarded by the checker", "b2", 2, {"reward.name": "shapes"}),
    Variant("b2, random S", "b2", 2, {"curriculum": "random"}),
    Variant("b2, L = 7", "b2", 2, {"split_step_left": 7}),
    Variant("b2, rate doubled", "b2", 2, {"train.learning_rate": 4e-3}),
    Variant("ddpo, rate doubled", "ddpo", 2, {"train.learning_rate": 4e-3}, against="ddpo"),
]
VARIANTS = {variant.name: variant for variant in [*ARMS, *OBJECTIVE_RUNS, *CONTROLS]}
FULL = Scale("study", 5, {}, (ARMS, OBJECTIVE_RUNS, CONTROLS))
SHORT = {"stage_cnt": 2, "sample.num_batches_per_epoch": 1, "eval.num_images": 96}
QUICK = Scale("study_quick", 2, SHORT, (ARMS,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="four arms, two seeds, short runs; the page goes to log/study_quick"
    )
    parser.add_argument("--draw", action="store_true", help="make no runs, only write the page")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many runs are made side by side")
    parser.add_argument("--out", type=Path, help="folder of the page; default: docs/results, or log/study_quick")
    given = parser.parse_args()
    scale = QUICK if given.quick else FULL
    set_up_logging(Path(f"log/{scale.prefix}.log"))
    failed = {} if given.draw else perform_all(scale, given.jobs)
    draw(scale, given.out or Path("log/study_quick" if given.quick else "docs/results"), failed)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {'; '.join(failed)}. Their logs are in log/; run again to go on.")


def runs(scale: Scale) -> list[tuple[Variant, int]]:
    """Every run as (variant, seed), in order: block after block, each seed by seed."""
    found = []
    for block in scale.blocks:
        found += [(one, seed) for seed in range(1, scale.seeds + 1) for one in block if seed <= one.seeds]
    return found


def configure(scale: Scale, variant: Variant | None, seed: int = 1) -> ConfigDict:
    """The configuration of one run; without a variant, of the evaluation of the base model."""
    config = get_config(variant.arm if variant else "b2")
    settings = scale.settings | (variant.settings if variant else {})
    config.update_from_flattened_dict(settings)
    name = "".join(char if char.isalnum() else "_" for char in variant.name) if variant else "base"
    config.exp_name = f"{scale.prefix}_{name}" + (f"_seed{seed}" if variant else "")
    config.seed, config.num_threads, config.eval.seed = seed, 1, EVAL_SEED
    return config


# --- runs -----------------------------------------------------------------------------------------


def perform_all(scale: Scale, jobs: int) -> dict[str, str]:
    """Make all unfinished runs, `jobs` at once. A failure does not stop the others. Returns {run: error} of the failed."""
    todo = [(variant, seed) for variant, seed in runs(scale) if not finished_run(scale, variant, seed)]
    judge_base(scale)
    started, failed = time.perf_counter(), {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=end_with, initargs=(os.getpid(),)) as pool:
        pending = {pool.submit(perform, scale, variant, seed): (variant, seed) for variant, seed in todo}
        try:
            for number, done in enumerate(as_completed(pending), 1):
                variant, seed = pending[done]
                minutes = (time.perf_counter() - started) / 60
                words = f"study: {number} of {len(todo)} after {minutes:.0f} min: {title(variant, seed)}"
                if done.exception():
                    failed[title(variant, seed)] = str(done.exception())
                    log.error("%s failed: %s", words, done.exception())
                    continue
                last = finished_run(scale, variant, seed)["curve"][-1]["test"]
                log.info("%s: held-out accuracy %.1f %% (%+.1f)", words, 100 * last["accuracy"], 100 * last["accuracy_gain"])
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            log.warning("study: interrupted; run the same command again to go on")
            os._exit(130)  # the runs under way end with this process
    return failed


def end_with(parent: int) -> None:
    """Make this worker process end with its parent, even if that is killed, and silence progress bars."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def root_of(config: ConfigDict) -> Path:
    """The folder of a configuration's experiment."""
    return read_settings(config).output.root


def judge_base(scale: Scale) -> list[dict[str, Any]]:
    """The base model's results on both prompt sets; they are computed once, then read back."""
    config = configure(scale, None)
    settings = checked_settings(config)
    return evaluate(settings, ["base"], list(SETS), {"training": training_sampler(settings)})


def perform(scale: Scale, variant: Variant, seed: int) -> None:
    """Make one run: all stages, their evaluation, and study.json. Finished parts are skipped."""
    config = configure(scale, variant, seed)
    set_up_logging(Path(config.log_path) / f"{config.exp_name}.log", console_too=False)
    begun = root_of(config) / "config.json"
    if begun.is_file() and files.read_json(begun)["config"]["stage_cnt"] != config.stage_cnt:
        raise ValueError(f"{root_of(config)} was begun with another number of stages; delete it")
    for index in range(config.stage_cnt):
        config.run_name = f"stage{index}"
        for phase in (sample_stage, select_stage, train_stage):
            phase(make_plan(config))
    files.write_json(root_of(config) / "study.json", describe_run(scale, variant, seed))


def finished_run(scale: Scale, variant: Variant, seed: int) -> dict[str, Any] | None:
    """study.json of a finished run; None if the run is unfinished or was made with other settings than today's."""
    path = root_of(configure(scale, variant, seed)) / "study.json"
    found = files.read_json(path) if path.is_file() else None
    return found if found and found["config"] == described_config(scale, variant, seed) else None


def title(variant: Variant, seed: int) -> str:
    return f"{variant.name}, seed {seed}"


def described_config(scale: Scale, variant: Variant, seed: int) -> dict[str, Any]:
    return json.loads(json.dumps(configure(scale, variant, seed).to_dict()))


def describe_run(scale: Scale, variant: Variant, seed: int) -> dict[str, Any]:
    """The content of study.json: settings, and the learning curve from the base model on.

    A point of the curve has the costs up to that stage and the results on both prompt sets. Every run is judged by the b2
    arm's reward and by the checker, even if it was trained on another reward.
    """
    config, bases = configure(scale, variant, seed), judge_base(scale)
    config.reward.name = configure(scale, None).reward.name
    judged = [index for index in range(config.stage_cnt) if (config.stage_cnt - 1 - index) % JUDGED_EVERY == 0]
    settings = checked_settings(config)
    checkpoints, samplers = [f"stage{index}" for index in judged], {"training": training_sampler(settings)}
    results = evaluate(settings, checkpoints, list(SETS), samplers)
    together = [dict(result) for result in [*bases, *results]]
    add_differences(together)
    points = [together[n : n + len(SETS)] for n in range(0, len(together), len(SETS))]
    costs = [dict.fromkeys(COSTS, 0), *(cost(config, index + 1) for index in judged)]
    curve = [spent | {one["prompts"]: plain(one) for one in point} for spent, point in zip(costs, points, strict=True)]
    control = variant.settings.keys() - {"train.objective"}
    return {
        "name": variant.name,
        "arm": variant.name if control else variant.arm,  # a changed arm is not listed as the arm itself
        "preset": variant.arm,
        "objective": config.train.objective,
        "seed": seed,
        "settings": variant.settings,
        "device": Stage(root_of(config), 0).manifest("sample")["device"],
        "curve": curve,
        "stages": [stage_facts(Stage(root_of(config), index)) for index in range(config.stage_cnt)],
        "versions": versions(),
        "date": str(date.today()),
        "config": described_config(scale, variant, seed),
    }


def plain(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of a result, without the values of single images."""
    return {key: value for key, value in result.items() if isinstance(value, float)}


COSTS = ("queries", "evaluations", "updates", "seconds")


def cost(config: ConfigDict, num_stages: int) -> dict[str, float]:
    """The costs (see COSTS) of the first `num_stages` stages.

    `evaluations` counts the network's work in forward passes of one image. A sampled step is one. A trained step is two:
    forward, and backward through frozen weights; it is three if the objective also evaluates the base policy. `seconds` is
    wall time of sampling, scoring and training, without loading, and without the lost work of a killed stage.
    """
    total = dict.fromkeys(COSTS, 0.0)
    passes = 2 + OBJECTIVES[config.train.objective].needs_base
    for stage in (Stage(root_of(config), index) for index in range(num_stages)):
        sampled, selected, trained = (stage.manifest(phase) for phase in ("sample", "select", "train"))
        total["queries"] += sampled["num_images"]
        total["evaluations"] += sampled["num_evaluations"] + passes * trained["num_transitions"]
        total["updates"] += trained["num_updates"]
        total["seconds"] += sampled["seconds"]["sample"] + selected["seconds"]["score"] + trained["seconds"]["train"]
    return total


def stage_facts(stage: Stage) -> dict[str, float]:
    """Figures of one stage: trained steps, updates, rewards and selection."""
    selected, trained = stage.manifest("select"), stage.manifest("train")
    keys = ("reward_mean", "reward_std", "reward_group_std", "num_selected", "num_best", "num_worst")
    return {"num_trained_steps": trained["num_trained_steps"], "num_updates": trained["num_updates"]} | {
        key: selected[key] for key in keys
    }


# --- the page -------------------------------------------------------------------------------------


def finished(scale: Scale) -> Iterator[dict[str, Any]]:
    """study.json of each finished run, without its configuration."""
    for variant, seed in runs(scale):
        if run := finished_run(scale, variant, seed):
            yield {key: value for key, value in run.items() if key != "config"}


def draw(scale: Scale, out: Path, failed: dict[str, str]) -> None:
    """Write study.md, study.json and the pictures from the finished runs."""
    from benchmarks.study_report import write_report

    found, config = list(finished(scale)), configure(scale, None)
    if not found:
        raise SystemExit("no run is finished; without --draw they are made")
    done = {(run["name"], run["seed"]) for run in found}
    missing = [(one, seed) for one, seed in runs(scale) if (one.name, seed) not in done and title(one, seed) not in failed]
    facts = {
        "quick": scale is QUICK,
        "command": "python -m benchmarks.study" + (" --quick" if scale is QUICK else ""),
        "date": str(date.today()),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "devices": sorted({run["device"] for run in found}),
        "versions": versions(),
        "num_images": config.eval.num_images,
        "setting": {key: config.train[key] for key in ("learning_rate", "batch_size", "num_epochs", "eps", "step_weight")},
        "missing": [(variant.name, seed) for variant, seed in missing],
        "failed": failed,
        "runs": found,
    }
    write_report(facts, {one.name: one.against for one in VARIANTS.values()}, out)
    files.write_json(out / "study.json", facts)


if __name__ == "__main__":
    main()
