"""How much time the shortcuts that change the algorithm save, and what they cost in accuracy (docs/performance.md).

    python -m benchmarks.accelerations            # finished runs are not made again
    python -m benchmarks.accelerations --write    # also write docs/results/accelerations.json

Every variant is the study's arm b2 with guidance, for 6 stages, on the same seeds.
"""

import argparse
import os
import platform
from datetime import date
from pathlib import Path
from statistics import fmean, median, stdev

from b2diffurl.experiment.stage import Stage, versions
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import set_up_logging
from benchmarks.page import percent, table
from benchmarks.study import Scale, Variant, configure, finished_run, perform_all, root_of
from benchmarks.study_statistics import interval

PLAIN = Variant("none", "b2", 3)
FASTER = [
    Variant("half of the steps", "b2", 3, {"train.timestep_fraction": 0.5}),
    Variant("no gradient through the unconditional half", "b2", 3, {"train.unconditional_gradient": False}),
    Variant("deterministic prefix", "b2", 3, {"sample.prefix_eta": 0.0}),
]
SETTINGS = {"stage_cnt": 6, "sample.guidance_scale": 2.0, "eval.num_images": 192}
SCALE = Scale("accelerations", 3, SETTINGS, ([PLAIN, *FASTER],))
SEEDS = range(1, SCALE.seeds + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side, one thread each")
    parser.add_argument("--write", action="store_true", help="write docs/results/accelerations.json")
    given = parser.parse_args()
    set_up_logging(Path("log/accelerations.log"))
    if failed := perform_all(SCALE, given.jobs):
        raise SystemExit(f"runs failed: {failed}")
    facts = {
        "command": "python -m benchmarks.accelerations",
        "date": str(date.today()),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": versions(),
        "settings": SETTINGS,
        "runs": {variant.name: [figures(variant, seed) for seed in SEEDS] for variant in (PLAIN, *FASTER)},
    }
    print(markdown(facts["runs"]))
    if given.write:
        files.write_json(Path("docs/results/accelerations.json"), facts)


def figures(variant: Variant, seed: int) -> dict[str, float]:
    """The figures of one run.

    They are the tuned model's accuracy on each prompt set, and the seconds to sample an image and to train on a transition,
    as medians over the stages.
    """
    last = finished_run(SCALE, variant, seed)["curve"][-1]
    config = configure(SCALE, variant, seed)
    sampling, training = [], []
    for stage in (Stage(root_of(config), index) for index in range(config.stage_cnt)):
        sampled, selected, trained = (stage.manifest(phase) for phase in ("sample", "select", "train"))
        sampling.append(sampled["seconds"]["sample"] / sampled["num_images"])
        training.append(trained["seconds"]["train"] / max(1, selected["num_selected"]) / sampled["num_trained_steps"])
    accuracy = {f"{name}_accuracy": last[name]["accuracy"] for name in ("train", "test")}
    return accuracy | {"sampling_sec": median(sampling), "training_sec": median(training)}


def markdown(runs: dict[str, list[dict[str, float]]]) -> str:
    """A table with a row for each variant; differences are to the plain runs with the same seeds."""
    plain = runs[PLAIN.name]

    def ratio(name: str, key: str) -> str:
        return f"{median(before[key] / after[key] for before, after in zip(plain, runs[name], strict=True)):.2f}"

    def cells(name: str, prompts: str) -> list[str]:
        values = [run[f"{prompts}_accuracy"] for run in runs[name]]
        gaps = [100 * (value - run[f"{prompts}_accuracy"]) for value, run in zip(values, plain, strict=True)]
        around = interval(gaps)
        # The plain runs' difference to themselves is 0.
        gap = "" if name == PLAIN.name else f"{around.mean:+.1f} [{around.low:+.1f}, {around.high:+.1f}]"
        return [f"{percent(fmean(values))} ± {100 * stdev(values):.1f}", gap]

    header = ["acceleration", "training prompts", "difference, points", "held-out", "difference, points"]
    rows = [
        [name, *cells(name, "train"), *cells(name, "test"), ratio(name, "sampling_sec"), ratio(name, "training_sec")]
        for name in runs
    ]
    return table([*header, "sampling, times as fast", "training, times as fast"], rows)


if __name__ == "__main__":
    main()
