"""Does a preset of the small model learn? Measures everything that README and docs/ say about the default run.

    python -m benchmarks.learning                          # all parts, one after the other
    python -m benchmarks.learning --preset shapes_ddpo     # the same for another preset
    python -m benchmarks.learning run --seeds 1,2          # one part: base, run, judge, stock or draw

Finished work is not repeated. After `base`, several processes of `judge` and `stock` may run side by side, on different
seeds and with --threads=1 each. `run` and `draw` alone make a page, too. Its figures are those by which run_process.sh ends.
"""

import argparse
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor

from b2diffurl.configuration.plan import checked_settings, make_plan
from b2diffurl.configuration.prompts import batch_prompts, named_prompts
from b2diffurl.configuration.settings import read_settings
from b2diffurl.evaluation.generate import SamplerSettings, deployed_sampler, training_sampler
from b2diffurl.evaluation.measure import evaluate
from b2diffurl.evaluation.statistics import paired_difference
from b2diffurl.experiment.evaluation_table import evaluation_rows, every_evaluation
from b2diffurl.experiment.metrics import read_events
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.models import base_identity, family
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import set_up_logging
from benchmarks.learning_figures import against, ends, failures, mean_gain, plain, with_gains
from config.stage_process import get_config

SEEDS = (1, 2, 3)
NUM_IMAGES, SWEEP_IMAGES = 1152, 192  # for a prompt set: 24 and 4 images of each prompt
EVAL_SEED, SWEEP_SEED = 1, 2  # of the noise; the sweep has its own, or the best sampler would look too good
GUIDANCES = (1.0, 1.5, 2.0, 2.5, 3.0, 5.0, 10.0)
STEP_COUNTS = {1.0: (10, 20, 30, 50), 0.0: (10, 20, 50)}  # eta -> numbers of sampler steps
NUM_FINALISTS = 4  # the best samplers of the sweep, which are judged again on other noise
STOCK_STEPS, STOCK_IMAGES = 50, 576
RESULTS = Path("docs/results")
SETS = ("train", "test")
BASE = "base"
SWEPT = "shapes_ddpo"  # the preset whose page has the sweep of its base model. Others of the same base take it from there

log = logging.getLogger("b2diffurl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--preset", default="shapes", help="a preset of config/stage_process.py for the small model")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads for judging; 0: torch's default")
    given = parser.parse_args()
    set_up_logging(Path("log/learning.log"))
    runs = [Run(given.preset, int(seed)) for seed in given.seeds.split(",")]
    chosen = [*PARTS] if given.part == "all" else [given.part]
    if not has_sweep(given.preset):  # the other parts are for the base model that was swept
        chosen = [part for part in chosen if part in ("run", "draw")]
    for part in chosen:
        PARTS[part](runs, given.threads)


@dataclass(frozen=True)
class Run:
    """A preset with a seed, or the preset's base model."""

    preset: str
    seed: int | None  # None: the base model

    @property
    def name(self) -> str:
        return BASE if self.seed is None else f"seed{self.seed}"

    @property
    def base(self) -> "Run":
        return Run(self.preset, None)

    @property
    def root(self) -> Path:
        return read_settings(configure(self)).output.root

    @property
    def stages(self) -> list[Stage]:
        return [Stage(self.root, index) for index in range(configure(self).stage_cnt)]


def page_name(preset: str) -> str:
    """The name of a preset's page, with which the names of its experiments begin."""
    return "learning" if preset == "shapes" else f"learning_{preset}"


def configure(run: Run, threads: int = 0) -> ConfigDict:
    """The preset's configuration for the experiment `learning_<name>`, or `learning_<preset>_<name>`."""
    config = get_config(run.preset)
    config.exp_name, config.num_threads = f"{page_name(run.preset)}_{run.name}", threads
    if run.seed is not None:
        config.seed = run.seed
    return config


def as_made(run: Run, threads: int = 0) -> ConfigDict:
    """`configure`, for judging: a ValueError if the run is incomplete or was made with other settings."""
    config = configure(run, threads)
    if run != run.base:
        require_finished(config)
    return config


def to_judge(run: Run, threads: int = 0) -> ConfigDict:
    """`as_made`, but with the number of images and the noise of the parts `base` and `judge`."""
    config = as_made(run, threads)
    config.eval.num_images, config.eval.seed = NUM_IMAGES, EVAL_SEED
    return config


def require_finished(config: ConfigDict) -> None:
    """Raise a ValueError if the run is incomplete, or was made with other settings than today's."""
    make_plan(config)  # refuses other settings
    root = read_settings(config).output.root
    recorded = files.read_json(root / "config.json")["config"]["stage_cnt"]
    finished = all(Stage(root, index).finished("train") for index in range(config.stage_cnt))
    if not finished or recorded != config.stage_cnt:
        raise ValueError(f"{root} is not a whole run of {config.stage_cnt} stages; finish it, or delete it")


# --- the parts ------------------------------------------------------------------------------------


def base(runs: Sequence[Run], threads: int) -> None:
    """Judge the base model as runs are judged, and before that by the sweep if it is this preset's."""
    at_best(runs[0].base, threads)
    curve(runs[0].base, threads)
    deploy([runs[0].base], threads)


def run(runs: Sequence[Run], _threads: int) -> None:
    """Make the runs as users do, with only seed and name changed. The time is recorded of those that nothing interrupted."""
    for one in runs:
        run_process(one)


def run_process(run: Run) -> None:
    """`bash run_process.sh` for one seed, unless the run is finished."""
    config, root = configure(run), run.root
    if evaluation_rows(root, stage=config.stage_cnt - 1, sampler="deployed"):  # the last thing that run_process.sh does
        require_finished(config)
        return
    fresh, started = not root.exists(), time.perf_counter()
    # A clean environment: a variable such as StageCnt would change the run.
    environment = {
        key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "VIRTUAL_ENV", "OMP_NUM_THREADS")
    }
    environment |= {"Preset": run.preset, "ExpName": config.exp_name, "Seed": str(config.seed)}
    subprocess.run(["bash", "run_process.sh"], env=environment, check=True)
    if fresh:
        files.write_json(root / "seconds.json", time.perf_counter() - started)


def judge(runs: Sequence[Run], threads: int) -> None:
    """Judge every stage of every run by the training sampler, and the last one also by the base's best sampler."""
    for one in runs:
        curve(one, threads)
        at_best(one, threads)


def stock(runs: Sequence[Run], threads: int) -> None:
    """Judge the LoRAs without anything of this package: in stock diffusers, with deterministic DDIM and 50 steps."""
    deploy(runs, threads)


def draw(runs: Sequence[Run], _threads: int) -> None:
    """Write the page in docs/results, .json, .md and .png, from the results of the other parts.

    Where `judge` or `stock` was not run on all seeds, the figures are those of run_process.sh itself.
    """
    from benchmarks.learning_report import draw_curves, write_tables

    preset, is_judged = runs[0].preset, all(map(was_judged, runs))
    sweep = sweep_page() if has_sweep(preset) else {"sweep": [], "best": {"sampler": {}, BASE: {}}}
    courses = {one.name: with_gains(preset, judged_course(one) if is_judged else own_course(one)) for one in runs}
    settings = read_settings(get_config(preset))
    facts = {
        "preset": preset,
        "date": str(date.today()),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "seeds": [one.seed for one in runs],
        "judged": is_judged,
        "num_images": NUM_IMAGES if is_judged else settings.judging.num_images,
        "sampler": vars(training_sampler(settings)),
        "seconds": {one.name: seconds_of(one) for one in runs},
        "updates": {one.name: num_updates(one) for one in runs},
        "training_reward": {one.name: training_reward(one) for one in runs},
        "curves": {name: [plain(result) for result in course] for name, course in courses.items()},
        "mean_gain": {prompts: mean_gain(list(courses.values()), prompts) for prompts in SETS},
        "failures": {name: {prompts: failures(course, prompts) for prompts in SETS} for name, course in courses.items()},
        "best": best_comparison(preset, courses) if is_judged else without_runs(sweep["best"]),
        "sweep_images": SWEEP_IMAGES,
        "sweep_judged_images": NUM_IMAGES,
        "sweep": [plain(result) for result in swept(preset)] if is_judged else sweep["sweep"],
        "deployed_by": "Euler's method" if family(settings.model).describe(settings.model).is_flow else "deterministic DDIM",
    }
    facts |= stock_deployment(runs) if all(map(was_judged_in_stock, [runs[0].base, *runs])) else own_deployment(runs)
    page = RESULTS / page_name(preset)
    files.write_json(page.with_suffix(".json"), facts)
    write_tables(facts, page.with_suffix(".md"))
    draw_curves(facts, page.with_suffix(".png"))


def meaningless(images: Tensor, _prompts: Sequence[str]) -> Tensor:
    """A control for docs/shapes.md: a reward [N] in [0, 1) that is a hash of the pixels, so nothing visible changes it."""
    weights = torch.arange(1, images[0].numel() + 1, dtype=torch.int64) * 2654435761 % 1000003
    return (images.flatten(1).long() @ weights % 10007) / 10007


# --- what run_process.sh itself has judged --------------------------------------------------------


def own_course(run: Run) -> list[dict]:
    """The base, the stages that run_process.sh judges and the last one, by the training sampler. They are read back.

    On training prompts there are only the base and the last stage.
    """
    config = as_made(run)
    settings, every = checked_settings(config), config.eval.every
    due = [f"stage{index}" for index in range(config.stage_cnt) if every and (index + 1) % every == 0]
    samplers = {"training": training_sampler(settings)}
    return evaluate(settings, [BASE, "last"], ["train"], samplers) + evaluate(
        settings, [BASE, *due, "last"], ["test"], samplers
    )


def own_deployment(runs: Sequence[Run]) -> dict[str, Any]:
    """Accuracy and gain on held-out prompts by the deployed sampler, and how they were measured. They are read back."""
    sampler, found = deployed_sampler(read_settings(get_config(runs[0].preset))), {}
    for one in runs:
        settings = checked_settings(as_made(one))
        tuned = evaluate(settings, [BASE, "last"], ["test"], {"deployed": sampler})[-1]
        found[one.name] = {
            "test": {
                "accuracy": tuned["accuracy"], "gain": tuned["accuracy_gain"], "gain_se": tuned["accuracy_gain_se"]
            }
        }  # fmt: skip
    return {
        "deployed_in_stock": False,
        "deployed_images": settings.judging.num_images,
        "deployed_steps": sampler.num_steps,
        "deployed": {f"{sampler.guidance_scale:g}": found},
    }


# --- what the parts judge -------------------------------------------------------------------------


def was_judged(run: Run) -> bool:
    """Whether the part `judge` has judged this run, the last thing of which is the base's best sampler."""
    return any(row["sampler"] == "best" and row["prompts"] == SETS[-1] for row in every_evaluation(run.root))


def judged_course(run: Run) -> list[dict]:
    return curve(run.base) + curve(run)


def curve(run: Run, threads: int = 0) -> list[dict]:
    """The results of each stage in order, or of the base, on both prompt sets by the training sampler."""
    config = to_judge(run, threads)
    checkpoints = [BASE] if run == run.base else [f"stage{index}" for index in range(config.stage_cnt)]
    settings = checked_settings(config)
    return evaluate(settings, checkpoints, list(SETS), {"training": training_sampler(settings)})


def at_best(run: Run, threads: int = 0) -> list[dict]:
    """The results of a run's last stage, or of the base, by the base's best sampler."""
    settings, checkpoints = checked_settings(to_judge(run, threads)), [BASE if run == run.base else "last"]
    return evaluate(settings, checkpoints, list(SETS), {"best": best_sampler(run.preset, threads)})


def sweep_page() -> dict[str, Any]:
    """The committed figures of the preset that has the sweep."""
    return files.read_json(RESULTS / f"{page_name(SWEPT)}.json")


def has_sweep(preset: str) -> bool:
    """Whether the sweep is of this preset's base model."""
    return get_config(preset).pretrained.model == get_config(SWEPT).pretrained.model


@cache
def swept(preset: str, threads: int = 0) -> list[dict]:
    """The base's results on the training prompts by every sampler of the sweep, on noise that nothing else uses."""
    if preset != SWEPT:
        return sweep_page()["sweep"]
    config = to_judge(Run(SWEPT, None), threads)
    config.eval.num_images, config.eval.seed = SWEEP_IMAGES, SWEEP_SEED
    return evaluate(
        checked_settings(config), [BASE], ["train"], {str(vars(settings)): settings for settings in sweep_settings()}
    )


def sweep_settings() -> list[SamplerSettings]:
    return [
        SamplerSettings(steps, eta, guidance)
        for guidance in GUIDANCES
        for eta, step_counts in STEP_COUNTS.items()
        for steps in step_counts
    ]


@cache
def best_sampler(preset: str, threads: int = 0) -> SamplerSettings:
    """The sampler with which the base is most accurate on training prompts.

    The best NUM_FINALISTS of the sweep are judged again on other noise: the best of 49 noisy figures is partly luck.
    """
    if preset != SWEPT:
        return sampler_of(sweep_page()["best"]["sampler"])
    few = sorted(swept(SWEPT, threads), key=lambda result: -result["accuracy"])[:NUM_FINALISTS]
    samplers = {one["sampler"]: sampler_of(one) for one in few}
    again = evaluate(checked_settings(to_judge(Run(SWEPT, None), threads)), [BASE], ["train"], samplers)
    return sampler_of(max(again, key=lambda result: result["accuracy"]))


def sampler_of(result: dict) -> SamplerSettings:
    return SamplerSettings(result["num_steps"], result["eta"], result["guidance_scale"])


def stock_guidances(preset: str) -> list[float]:
    """Guidance scales in stock diffusers: the one used in training, and the base's best with this sampler."""
    like_this = [one for one in swept(preset) if (one["num_steps"], one["eta"]) == (STOCK_STEPS, 0.0)]
    best = max(like_this, key=lambda result: result["accuracy"])["guidance_scale"]
    return list(dict.fromkeys([training_sampler(read_settings(get_config(preset))).guidance_scale, best]))


def was_judged_in_stock(run: Run) -> bool:
    """Whether the part `stock` has judged this run."""
    return any((run.root / "eval").glob("deployed_*.json"))


def deploy(runs: Iterable[Run], threads: int) -> None:
    """Draw and judge the images of `stock_values` for each run, guidance and prompt set."""
    if threads:
        torch.set_num_threads(threads)
    for one in runs:
        for guidance in stock_guidances(one.preset):
            for prompts in SETS:
                stock_values(one, prompts, guidance)


def stock_values(run: Run, prompts: str, guidance: float) -> dict[str, list[float]]:
    """The checker's verdicts on images by stock diffusers: {part: a value for each image}. Computed once, then read back."""
    from b2diffurl.rewards.shapes import shapes
    from b2diffurl.shapes.sampling import load_pipeline, sample

    settings = read_settings(as_made(run))
    lora = None if run == run.base else run.stages[-1].checkpoints()[-1]
    some = [prompt for _, prompt in named_prompts(settings.prompts, prompts)]
    decisive = [base_identity(settings.model), files.sha256(lora / LORA_FILE) if lora else "", some]
    decisive += [guidance, STOCK_STEPS, STOCK_IMAGES, EVAL_SEED]
    file = run.root / "eval" / f"deployed_{prompts}_{files.digest(decisive)}.json"
    if not file.is_file():
        pipeline = load_pipeline(settings.model.name)
        if lora:
            pipeline.load_lora_weights(lora)
        asked = batch_prompts(some, STOCK_IMAGES, 0, None)
        images = sample(pipeline, asked, seed=EVAL_SEED, num_steps=STOCK_STEPS, guidance=guidance, eta=0.0)
        accuracy, parts = shapes(torch.from_numpy(images), asked)
        values = {"accuracy": accuracy} | {f"shapes/{part}": value for part, value in parts.items()}
        files.write_json(file, {key: value.tolist() for key, value in values.items()})
        log.info(
            "in stock diffusers %s on %s prompts, guidance %g: %.4f", run.name, prompts, guidance, accuracy.mean().item()
        )
    return files.read_json(file)


# --- figures --------------------------------------------------------------------------------------


def training_reward(run: Run) -> list[float]:
    """Mean reward of the images that each stage sampled. They show the policy before that stage's updates."""
    return [read_events(stage.metrics("select"), "select")[-1]["reward_mean"] for stage in run.stages]


def num_updates(run: Run) -> int:
    return sum(files.read_json(stage.folder / "train.json")["num_updates"] for stage in run.stages)


def seconds_of(run: Run) -> float | None:
    """How long `bash run_process.sh` took; None where it was interrupted."""
    file = run.root / "seconds.json"
    return files.read_json(file) if file.is_file() else None


def best_comparison(preset: str, courses: dict[str, list[dict]]) -> dict[str, Any]:
    """The base by its best sampler, compared with each tuned model by the training sampler and by that best sampler."""
    bases = at_best(Run(preset, None))
    compared: dict[str, Any] = {"sampler": vars(best_sampler(preset)), "base": {one["prompts"]: plain(one) for one in bases}}
    for name, course in courses.items():
        same_sampler = at_best(Run(preset, int(name.removeprefix("seed"))))
        compared[name] = {
            before["prompts"]: {
                "as_trained": against(before, ends(course, before["prompts"])[1]),
                "at_best": against(before, same),
            }
            for before, same in zip(bases, same_sampler, strict=True)
        }
    return compared


def without_runs(compared: dict[str, Any]) -> dict[str, Any]:
    """What `best_comparison` says of the base alone."""
    return {key: compared[key] for key in ("sampler", BASE)}


def stock_deployment(runs: Sequence[Run]) -> dict[str, Any]:
    """Accuracy of base and tuned models in stock diffusers, the paired gain, and how they were measured."""
    guidances = stock_guidances(runs[0].preset)
    return {
        "deployed_in_stock": True,
        "deployed_images": STOCK_IMAGES,
        "deployed_steps": STOCK_STEPS,
        "deployed": {f"{guidance:g}": stock_comparison(runs, guidance) for guidance in guidances},
    }


def stock_comparison(runs: Sequence[Run], guidance: float) -> dict[str, Any]:
    """{run: {prompt set: its accuracy and gain}}."""
    compared: dict[str, Any] = {one.name: {} for one in runs}
    for prompts in SETS:
        before = stock_values(runs[0].base, prompts, guidance)["accuracy"]
        for one in runs:
            after = stock_values(one, prompts, guidance)["accuracy"]
            gain, error = paired_difference(after, before)
            compared[one.name][prompts] = {"accuracy": fmean(after), "gain": gain, "gain_se": error}
    return compared


PARTS: dict[str, Callable[[Sequence[Run], int], None]] = {
    "base": base,
    "run": run,
    "judge": judge,
    "stock": stock,
    "draw": draw,
}


if __name__ == "__main__":
    main()
