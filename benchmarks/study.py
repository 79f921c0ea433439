"""Do the claims of B2-DiffuRL hold? The runs behind docs/results/study.md.

    python -m benchmarks.study             # all runs; finished ones are not repeated, so a killed study goes on
    python -m benchmarks.study --quick     # a small version in three minutes, to see that it works
    python -m benchmarks.study --draw      # make no runs, only write the page from the finished ones
    python -m benchmarks.study --calibrate # measure CPU seconds, on a machine that does nothing else, and write the page

Runs are made side by side, one thread each: block after block, each seed by seed. A run in docs/results/study.json with the
settings of today is not made again.
"""

import argparse
import json
import logging
import multiprocessing
import os
import platform
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from b2diffurl.configuration.keys import flatten
from b2diffurl.configuration.plan import checked_settings, make_plan
from b2diffurl.configuration.settings import read_settings
from b2diffurl.evaluation.generate import training_sampler
from b2diffurl.evaluation.measure import evaluate
from b2diffurl.evaluation.statistics import add_differences
from b2diffurl.experiment.stage import Stage, versions
from b2diffurl.phases.sample import sample_stage
from b2diffurl.phases.select import select_stage
from b2diffurl.phases.train import train_stage
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import set_up_logging
from config.stage_process import get_config

SETS = ("train", "test")
EVAL_SEED = 1
IN_EVERY_RUN = {"preset", "exp_name", "run_name", "seed", "num_threads", "eval.seed"}  # keys that `configure` sets
RESULTS = Path("docs/results")
PHASES = {"sample": sample_stage, "select": select_stage, "train": train_stage}
CPU_FILE = "cpu_seconds.json"  # in an experiment's folder: CPU seconds by <stage>/<phase>

log = logging.getLogger("b2diffurl")


@dataclass(frozen=True)
class Variant:
    """An arm of the study, or an arm with some settings changed."""

    name: str
    arm: str  # a preset: b2, bs, bpt, ddpo
    seeds: int  # how many; they are 1, 2, …
    settings: dict[str, Any] = field(default_factory=dict)  # the changes, by key
    against: str = "b2"  # name of the variant that it is compared with
    judged_every: int = 3  # stages


@dataclass(frozen=True)
class Scale:
    """The size of a study."""

    prefix: str  # of the experiments' names
    seeds: int  # at most so many of each variant
    settings: dict[str, Any]  # changes to every run, by key
    blocks: tuple[list[Variant], ...]  # the runs, one block after the other
    committed: Path | None = None  # an earlier study.json; its runs need not be made again


ARMS = [Variant(arm, arm, 5, against="ddpo") for arm in ("ddpo", "bpt", "bs", "b2")]
OBJECTIVE_RUNS = [
    Variant("b2, dpok", "b2", 3, {"train.objective": "dpok"}),
    Variant("b2, d3po", "b2", 3, {"train.objective": "d3po"}),
    Variant("ddpo arm, dpok", "ddpo", 3, {"train.objective": "dpok"}, against="ddpo"),
]
CONTROLS = [  # the most telling first
    Variant("ddpo, updates of b2", "ddpo", 3, {"train.batch_size": 48}, against="ddpo"),
    Variant("b2, updates of ddpo", "b2", 3, {"train.num_epochs": 3}),
    Variant("ddpo, pairs", "ddpo", 3, {"selection.images": "pairs"}, against="ddpo"),
    Variant("b2, S = T", "b2", 3, {"curriculum": "fixed", "split_step_left": 8}),
    Variant("b2, all images", "b2", 3, {"selection.images": "all"}),
    Variant("b2, reversed", "b2", 3, {"curriculum": "reversed"}),
    Variant("b2, thresholds 0", "b2", 2, {"selection.pos_threshold": 0.0, "selection.neg_threshold": 0.0}),
    Variant("b2, thresholds 0.7", "b2", 2, {"selection.pos_threshold": 0.7, "selection.neg_threshold": -0.7}),
    Variant("b2, K = 3", "b2", 2, {"split_time": 3, "sample.batch_size": 53}),
    Variant("b2, K = 8", "b2", 2, {"split_time": 8, "sample.batch_size": 20}),
    Variant("b2, advantage by group", "b2", 2, {"selection.advantage": "group"}),
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
# Objectives on noised images, and a tree. Settings were fixed on seed 11 and a development split (docs/shapes.md).
FORWARD = {
    "train.objective": "nft",
    "train.outside_weight": 4.0,
    "train.batch_size": 32,
    "train.learning_rate": 3e-3,
    "train.final_rate": 0.1,
}
PAIRS = {"train.nft_scale": 0.5, "train.num_epochs": 6, "train.save_interval": 6}
ALL = {"train.num_epochs": 2, "train.save_interval": 2}  # nearly three times as many images as pairs have, so fewer passes
LATE = {"split_stop": 5}  # windows [2,5), [1,5) and [0,5): levels of noise below that of step 5 decide no relation
NFT = FORWARD | PAIRS | LATE
# 2 * 2 * 2 images a group, which part at x_T and after one and two steps: a relation is decided there.
TREE = {"sampling": "branch", "split_times": (2, 2, 2), "split_after": (1, 1), "sample.batch_size": 20}
BEST = Variant("b2, best", "b2_nft", 5, against="ddpo", judged_every=1)  # a target is where its curve crosses DDPO's end
MAIN = [BEST, Variant("ddpo arm, nft", "ddpo", 5, FORWARD | ALL, against="ddpo")]
NOISED = [
    *MAIN,
    Variant("b2, nft", "b2", 5, NFT, against="ddpo"),
    Variant("b2, nft, all images", "b2", 5, FORWARD | ALL | LATE | {"selection.images": "all"}, against="ddpo"),
    Variant("b2, nft, independent images", "b2", 5, NFT | {"sampling": "independent"}, against="ddpo"),
    Variant("b2, awm", "b2", 5, NFT | {"train.objective": "awm"}, against="ddpo"),
    Variant("ddpo, tree", "ddpo", 5, TREE, against="ddpo"),
]
VARIANTS = {variant.name: variant for variant in [*ARMS, *OBJECTIVE_RUNS, *CONTROLS, *NOISED]}
FULL = Scale("study", 5, {}, (ARMS, OBJECTIVE_RUNS, CONTROLS, NOISED), RESULTS / "study.json")
SHORT = {"stage_cnt": 2, "sample.num_batches_per_epoch": 1, "eval.num_images": 96}
QUICK = Scale("study_quick", 2, SHORT, (ARMS, [replace(one, seeds=2 if one in MAIN else 1) for one in NOISED]))
CALIBRATED = [VARIANTS["ddpo"], VARIANTS["b2"], BEST]
CALIBRATION = Scale("study_calibration", 1, {"stage_cnt": 2}, (CALIBRATED,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="the arms alone, one or two seeds, short runs; the page goes to log/study_quick"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--draw", action="store_true", help="make no runs, only write the page")
    instead.add_argument("--calibrate", action="store_true", help="measure CPU seconds instead, alone, and write the page")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many runs are made side by side")
    parser.add_argument("--out", type=Path, help="folder of the page; default: docs/results, or log/study_quick")
    given = parser.parse_args()
    scale = QUICK if given.quick else FULL
    out = given.out or (Path("log/study_quick") if given.quick else RESULTS)
    set_up_logging(Path(f"log/{scale.prefix}.log"))
    if given.calibrate:
        return draw(scale, out, {}, calibrate())
    failed = {} if given.draw else perform_all(scale, given.jobs)
    draw(scale, out, failed, committed(scale).get("calibration"))
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
    if todo:
        judge_base(scale)  # once, before the workers would all do it
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
    begun = root_of(config) / "config.json"
    if begun.is_file() and files.read_json(begun)["config"]["stage_cnt"] != config.stage_cnt:
        raise ValueError(f"{root_of(config)} was begun with another number of stages; delete it")
    warm_up()
    set_up_logging(Path(config.log_path) / f"{config.exp_name}.log", console_too=False)
    make_stages(config)
    files.write_json(root_of(config) / "study.json", describe_run(scale, variant, seed))


def finished_run(scale: Scale, variant: Variant, seed: int) -> dict[str, Any] | None:
    """A finished run, made here or committed; None if there is none, or only one with other settings than today's."""
    config = configure(scale, variant, seed)
    here, wanted = root_of(config) / "study.json", changes(config)
    elsewhere = [run for run in committed(scale).get("runs", []) if (run["name"], run["seed"]) == (variant.name, seed)]
    found = [files.read_json(here), *elsewhere] if here.is_file() else elsewhere
    return next((run for run in found if flatten(run["settings"]) == wanted), None)


def committed(scale: Scale) -> dict[str, Any]:
    """The content of the scale's committed study.json; {} if there is none."""
    return read_once(scale.committed) if scale.committed and scale.committed.is_file() else {}


@cache
def read_once(path: Path) -> dict[str, Any]:
    return files.read_json(path)


def title(variant: Variant, seed: int) -> str:
    return f"{variant.name}, seed {seed}"


def changes(config: ConfigDict) -> dict[str, Any]:
    """The settings that differ from the preset b2, as JSON has them.

    Two runs of a seed with the same changes are the same run: b2 keeps its values, and a new key is neutral in it.
    """
    run, b2 = (flatten(json.loads(json.dumps(one.to_dict()))) for one in (config, get_config("b2")))
    return {key: run[key] for key in run if run[key] != b2[key] and key not in IN_EVERY_RUN}


# --- CPU time -------------------------------------------------------------------------------------


def make_stages(config: ConfigDict) -> None:
    """Make all stages of a run, and record the CPU time of their phases. Finished phases are skipped."""
    for index in range(config.stage_cnt):
        config.run_name = f"stage{index}"
        for name, phase in PHASES.items():
            plan = make_plan(config)
            finished_before, started = plan.stage.finished(name), time.process_time()
            phase(plan)
            if not finished_before:
                record_cpu_seconds(plan.stage, name, time.process_time() - started)


@cache
def warm_up() -> None:
    """Make a tiny stage, once a process, so that importing libraries is in no run's CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        config = get_config("ddpo")
        config.save_path = folder
        config.stage_cnt = config.sample.num_batches_per_epoch = config.num_threads = 1
        config.sample.batch_size = 2
        make_stages(config)


def record_cpu_seconds(stage: Stage, phase: str, seconds: float) -> None:
    """Record the CPU seconds of a phase that is finished now.

    An interrupted phase counts as if it had been made in one go: `share` is the part that this process made. If that is
    nothing, the other process's time is unknown, and nothing is recorded.
    """
    if share := stage.manifest(phase)["seconds"].get("share", 1.0):
        path = stage.root / CPU_FILE
        recorded = files.read_json(path) if path.is_file() else {}
        files.write_json(path, recorded | {f"{stage.folder.name}/{phase}": seconds / share})


def cpu_seconds(config: ConfigDict, num_stages: int) -> float | None:
    """The CPU seconds of the first `num_stages` stages, loading included; None if those of some phase are not known."""
    path = root_of(config) / CPU_FILE
    recorded = files.read_json(path) if path.is_file() else {}
    spent = [recorded.get(f"stage{index}/{phase}") for index in range(num_stages) for phase in PHASES]
    return None if None in spent else sum(spent)


def calibrate() -> dict[str, Any]:
    """CPU seconds of two stages of each calibrated arm, made alone, in turn, three times."""
    warm_up()
    arms: dict[str, dict[str, Any]] = {}
    for repeat in range(3):
        for variant in CALIBRATED:
            with tempfile.TemporaryDirectory() as folder:
                config = configure(CALIBRATION, variant)
                config.save_path = folder
                make_stages(config)
                spent = cost(config, config.stage_cnt)
            log.info("calibration %d of 3: %s: %.1f CPU seconds", repeat + 1, variant.name, spent["cpu_seconds"])
            arm = arms.setdefault(
                variant.name, {key: spent[key] for key in ("queries", "evaluations")} | {"cpu_seconds": []}
            )
            arm["cpu_seconds"].append(spent["cpu_seconds"])
    return where_and_when() | {"arms": arms}


# --- a finished run -------------------------------------------------------------------------------


def describe_run(scale: Scale, variant: Variant, seed: int) -> dict[str, Any]:
    """The content of study.json: settings, and the learning curve from the base model on.

    A point of the curve has the costs up to that stage and the results on both prompt sets. Every run is judged by the b2
    arm's reward and by the checker, even if it was trained on another reward.
    """
    config, bases = configure(scale, variant, seed), judge_base(scale)
    config.reward.name = configure(scale, None).reward.name
    judged = [index for index in range(config.stage_cnt) if (config.stage_cnt - 1 - index) % variant.judged_every == 0]
    settings = checked_settings(config)
    checkpoints, samplers = [f"stage{index}" for index in judged], {"training": training_sampler(settings)}
    results = evaluate(settings, checkpoints, list(SETS), samplers)
    together = [dict(result) for result in [*bases, *results]]
    add_differences(together)
    points = [together[n : n + len(SETS)] for n in range(0, len(together), len(SETS))]
    costs = [dict.fromkeys((*COSTS, "cpu_seconds"), 0), *(cost(config, index + 1) for index in judged)]
    curve = [spent | {one["prompts"]: plain(one) for one in point} for spent, point in zip(costs, points, strict=True)]
    control = variant.settings.keys() - {"train.objective"}
    return {
        "name": variant.name,
        "arm": variant.name if control else variant.arm,  # a changed arm is not listed as the arm itself
        "preset": variant.arm,
        "objective": config.train.objective,
        "seed": seed,
        "settings": changes(configure(scale, variant, seed)),
        "device": Stage(root_of(config), 0).manifest("sample")["device"],
        "curve": curve,
        "stages": [stage_facts(Stage(root_of(config), index)) for index in range(config.stage_cnt)],
    } | where_and_when()


def where_and_when() -> dict[str, Any]:
    """Machine, versions of the software and date, for what is measured now."""
    hardware = f"{os.cpu_count()} cores, {platform.machine()}"
    return {"hardware": hardware, "versions": versions(), "date": str(date.today())}


def plain(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of a result, without the values of single images."""
    return {key: value for key, value in result.items() if isinstance(value, float)}


COSTS = ("queries", "evaluations", "updates", "seconds")


def cost(config: ConfigDict, num_stages: int) -> dict[str, float]:
    """The costs (see COSTS) of the first `num_stages` stages, and `cpu_seconds` if they are known.

    `evaluations` counts the network's work in forward passes of one image. A sampled step is one. A trained step, or noised
    image, is two: forward, and backward through frozen weights. It is one more for each other policy that the objective
    evaluates, or less if that is not evaluated every time. `seconds` is wall time of sampling, scoring and training, without
    loading, and without the lost work of a killed stage.
    """
    total = dict.fromkeys(COSTS, 0.0)
    passes = read_settings(config).training.objective.num_passes
    for stage in (Stage(root_of(config), index) for index in range(num_stages)):
        sampled, selected, trained = (stage.manifest(phase) for phase in ("sample", "select", "train"))
        total["queries"] += sampled["num_images"]
        total["evaluations"] += sampled["num_evaluations"] + passes * trained["num_transitions"]
        total["updates"] += trained["num_updates"]
        total["seconds"] += sampled["seconds"]["sample"] + selected["seconds"]["score"] + trained["seconds"]["train"]
    on_cpu = cpu_seconds(config, num_stages)
    return total if on_cpu is None else total | {"cpu_seconds": on_cpu}


def stage_facts(stage: Stage) -> dict[str, float]:
    """Figures of one stage: trained steps, updates, rewards and selection."""
    selected, trained = stage.manifest("select"), stage.manifest("train")
    keys = ("reward_mean", "reward_std", "reward_group_std", "num_selected", "num_best", "num_worst")
    return {"num_trained_steps": trained["num_trained_steps"], "num_updates": trained["num_updates"]} | {
        key: selected[key] for key in keys
    }


# --- the page -------------------------------------------------------------------------------------


def draw(scale: Scale, out: Path, failed: dict[str, str], calibration: dict[str, Any] | None) -> None:
    """Write study.md, study.json and the pictures from the finished runs."""
    from benchmarks.study_report import write_report

    found, config = [run for one in runs(scale) if (run := finished_run(scale, *one))], configure(scale, None)
    if not found:
        raise SystemExit("no run is finished; without --draw they are made")
    done = {(run["name"], run["seed"]) for run in found}
    missing = [(one, seed) for one, seed in runs(scale) if (one.name, seed) not in done and title(one, seed) not in failed]
    facts = {
        "quick": scale is QUICK,
        "command": "python -m benchmarks.study" + (" --quick" if scale is QUICK else ""),
        "num_images": config.eval.num_images,
        "setting": {key: config.train[key] for key in ("learning_rate", "batch_size", "num_epochs", "eps", "step_weight")},
        "missing": [(variant.name, seed) for variant, seed in missing],
        "failed": failed,
        "calibration": calibration,
        "runs": found,
    }
    write_report(facts, {one.name: one.against for one in VARIANTS.values()}, out)
    files.write_json(out / "study.json", facts)


if __name__ == "__main__":
    main()
