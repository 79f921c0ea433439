"""Does the default run learn? Measures everything that README and docs/ say about it.

    python -m benchmarks.learning                    # all parts, one after the other
    python -m benchmarks.learning run --seeds 1,2    # one part: base, run, judge, deployed or draw

Finished work is not repeated. After `base`, several processes of `judge` and `deployed` may run side by side, on different
seeds and with --threads=1 each.
"""

import argparse
import logging
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
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
from b2diffurl.evaluation.generate import SamplerSettings, training_sampler
from b2diffurl.evaluation.measure import evaluate
from b2diffurl.evaluation.statistics import add_differences, mean_and_error, paired_difference
from b2diffurl.experiment.evaluation_table import evaluation_rows
from b2diffurl.experiment.metrics import read_events
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.models import base_identity
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import set_up_logging
from config.stage_process import get_config

SEEDS = (1, 2, 3)
NUM_IMAGES, SWEEP_IMAGES = 1152, 192  # for a prompt set: 24 and 4 images of each prompt
EVAL_SEED, SWEEP_SEED = 1, 2  # of the noise; the sweep has its own, or the best sampler would look too good
GUIDANCES = (1.0, 1.5, 2.0, 2.5, 3.0, 5.0, 10.0)
STEP_COUNTS = {1.0: (10, 20, 30, 50), 0.0: (10, 20, 50)}  # eta -> numbers of sampler steps
NUM_FINALISTS = 4  # the best samplers of the sweep, which are judged again on other noise
DEPLOYED_STEPS, DEPLOYED_IMAGES = 50, 576
RESULTS = Path("docs/results")
SETS = ("train", "test")
BASE = "base"

log = logging.getLogger("b2diffurl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads for judging; 0: torch's default")
    given = parser.parse_args()
    set_up_logging(Path("log/learning.log"))
    for part in PARTS if given.part == "all" else [given.part]:
        PARTS[part]([int(seed) for seed in given.seeds.split(",")], given.threads)


def configure(name: str, threads: int = 0) -> ConfigDict:
    """The default configuration for the experiment `learning_<name>`; `name` is `base`, or seed<i> for that seed."""
    config = get_config("shapes")
    config.exp_name, config.num_threads = f"learning_{name}", threads
    config.eval.num_images, config.eval.seed = NUM_IMAGES, EVAL_SEED
    if name != BASE:
        config.seed = int(re.sub(r"\D", "", name))
    return config


def judged(name: str, threads: int = 0) -> ConfigDict:
    """`configure`, for judging: a ValueError if the run is incomplete or was made with other settings."""
    config = configure(name, threads)
    if name != BASE:
        require_finished(config)
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


def base(_seeds: Sequence[int], threads: int) -> None:
    """Judge the base model: by every sampler of the sweep, then in all ways in which runs are judged."""
    best_sampler(threads)
    at_best(BASE, threads)
    curve(BASE, threads)
    deploy([BASE], threads)


def run(seeds: Sequence[int], _threads: int) -> None:
    """Make the default run as users do, with only seed and name changed. Its time is recorded if nothing interrupted it."""
    for name in run_names(seeds):
        run_process(name)


def run_process(name: str) -> None:
    """`bash run_process.sh` for one seed, unless the run is finished."""
    config = configure(name)
    root = read_settings(config).output.root
    if evaluation_rows(root, stage=config.stage_cnt - 1, sampler="deployed"):  # the last thing that run_process.sh does
        require_finished(config)
        return
    fresh, started = not root.exists(), time.perf_counter()
    # A clean environment: a variable such as StageCnt would change the run.
    environment = {
        key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "VIRTUAL_ENV", "OMP_NUM_THREADS")
    }
    environment |= {"ExpName": config.exp_name, "Seed": str(config.seed)}
    subprocess.run(["bash", "run_process.sh"], env=environment, check=True)
    if fresh:
        files.write_json(root / "seconds.json", time.perf_counter() - started)


def judge(seeds: Sequence[int], threads: int) -> None:
    """Judge every stage of every run by the training sampler, and the last one also by the base's best sampler."""
    for name in run_names(seeds):
        curve(name, threads)
        at_best(name, threads)


def deployed(seeds: Sequence[int], threads: int) -> None:
    """Judge the LoRAs as people use them: in stock diffusers, with deterministic DDIM and 50 steps."""
    deploy(run_names(seeds), threads)


def draw(seeds: Sequence[int], _threads: int) -> None:
    """Write docs/results/learning.json, .md and .png from the results of the other parts."""
    from benchmarks.learning_report import draw_curves, write_tables

    names, bases = run_names(seeds), curve(BASE)
    curves = {name: with_gains(bases, curve(name)) for name in names}
    tuned = {name: results[-len(SETS) :] for name, results in curves.items()}
    facts = {
        "date": str(date.today()),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "seeds": list(seeds),
        "num_images": NUM_IMAGES,
        "sweep_images": SWEEP_IMAGES,
        "deployed_images": DEPLOYED_IMAGES,
        "sampler": vars(training_sampler(read_settings(get_config("shapes")))),
        "seconds": {name: seconds_of(name) for name in names},
        "updates": {name: num_updates(name) for name in names},
        "training_reward": {name: training_reward(name) for name in names},
        "curves": {name: [plain(result) for result in results] for name, results in curves.items()},
        "mean_gain": {one["prompts"]: mean_gain(one, list(tuned.values())) for one in bases},
        "failures": {name: {one["prompts"]: failures(bases, one) for one in results} for name, results in tuned.items()},
        "sweep": [plain(result) for result in swept()],
        "best": best_comparison(tuned),
        "deployed": {f"{guidance:g}": deployed_comparison(names, guidance) for guidance in deployed_guidances()},
    }
    files.write_json(RESULTS / "learning.json", facts)
    write_tables(facts, RESULTS / "learning.md")
    draw_curves(facts, RESULTS / "learning.png")


def meaningless(images: Tensor, _prompts: Sequence[str]) -> Tensor:
    """A control for docs/shapes.md: a reward [N] in [0, 1) that is a hash of the pixels, so nothing visible changes it."""
    weights = torch.arange(1, images[0].numel() + 1, dtype=torch.int64) * 2654435761 % 1000003
    return (images.flatten(1).long() @ weights % 10007) / 10007


# --- what the parts judge -------------------------------------------------------------------------


def run_names(seeds: Iterable[int]) -> list[str]:
    return [f"seed{seed}" for seed in seeds]


def curve(name: str, threads: int = 0) -> list[dict]:
    """The results of each stage in order, or of the base, on both prompt sets by the training sampler."""
    config = judged(name, threads)
    checkpoints = [BASE] if name == BASE else [f"stage{index}" for index in range(config.stage_cnt)]
    settings = checked_settings(config)
    return evaluate(settings, checkpoints, list(SETS), {"training": training_sampler(settings)})


def at_best(name: str, threads: int = 0) -> list[dict]:
    """The results of a run's last stage, or of the base, by the base's best sampler."""
    settings, checkpoints = checked_settings(judged(name, threads)), [BASE if name == BASE else "last"]
    return evaluate(settings, checkpoints, list(SETS), {"best": best_sampler(threads)})


@cache
def swept(threads: int = 0) -> list[dict]:
    """The base's results on the training prompts by every sampler of the sweep, on noise that nothing else uses."""
    config = judged(BASE, threads)
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
def best_sampler(threads: int = 0) -> SamplerSettings:
    """The sampler with which the base is most accurate on training prompts.

    The best NUM_FINALISTS of the sweep are judged again on other noise: the best of 49 noisy figures is partly luck.
    """
    few = sorted(swept(threads), key=lambda result: -result["accuracy"])[:NUM_FINALISTS]
    samplers = {one["sampler"]: sampler_of(one) for one in few}
    again = evaluate(checked_settings(judged(BASE, threads)), [BASE], ["train"], samplers)
    return sampler_of(max(again, key=lambda result: result["accuracy"]))


def sampler_of(result: dict) -> SamplerSettings:
    return SamplerSettings(result["num_steps"], result["eta"], result["guidance_scale"])


def deployed_guidances() -> list[float]:
    """Guidance scales for the deployed sampler: the one used in training, and the base's best with this sampler."""
    like_this = [one for one in swept() if (one["num_steps"], one["eta"]) == (DEPLOYED_STEPS, 0.0)]
    best = max(like_this, key=lambda result: result["accuracy"])["guidance_scale"]
    return list(dict.fromkeys([training_sampler(read_settings(get_config("shapes"))).guidance_scale, best]))


def deploy(names: Iterable[str], threads: int) -> None:
    """Draw and judge the images of `deployed_values` for each run, guidance and prompt set."""
    if threads:
        torch.set_num_threads(threads)
    for name in names:
        for guidance in deployed_guidances():
            for prompts in SETS:
                deployed_values(name, prompts, guidance)


def deployed_values(name: str, prompts: str, guidance: float) -> dict[str, list[float]]:
    """The checker's verdicts on images by stock diffusers: {part: a value for each image}. Computed once, then read back."""
    from b2diffurl.rewards.shapes import shapes
    from b2diffurl.shapes.sampling import load_pipeline, sample

    config = judged(name)
    lora = None if name == BASE else Stage(read_settings(config).output.root, config.stage_cnt - 1).checkpoints()[-1]
    some = [prompt for _, prompt in named_prompts(read_settings(config).prompts, prompts)]
    decisive = [base_identity(read_settings(config).model), files.sha256(lora / LORA_FILE) if lora else "", some]
    decisive += [guidance, DEPLOYED_STEPS, DEPLOYED_IMAGES, EVAL_SEED]
    file = read_settings(config).output.root / "eval" / f"deployed_{prompts}_{files.digest(decisive)}.json"
    if not file.is_file():
        pipeline = load_pipeline(config.pretrained.model)
        if lora:
            pipeline.load_lora_weights(lora)
        asked = batch_prompts(some, DEPLOYED_IMAGES, 0, None)
        images = sample(pipeline, asked, seed=EVAL_SEED, num_steps=DEPLOYED_STEPS, guidance=guidance, eta=0.0)
        accuracy, parts = shapes(torch.from_numpy(images), asked)
        values = {"accuracy": accuracy} | {f"shapes/{part}": value for part, value in parts.items()}
        files.write_json(file, {key: value.tolist() for key, value in values.items()})
        log.info("deployed %s on %s prompts, guidance %g: %.4f", name, prompts, guidance, accuracy.mean().item())
    return files.read_json(file)


# --- figures --------------------------------------------------------------------------------------


def with_gains(bases: list[dict], results: list[dict]) -> list[dict]:
    """Base and checkpoints in one list, each with its gain over the base and the number of reward queries up to it."""
    config = get_config("shapes")
    per_stage = config.sample.num_batches_per_epoch * config.sample.batch_size * config.split_time
    together = [dict(result) for result in [*bases, *results]]
    add_differences(together)
    for result in together:
        stage = result["checkpoint"].removeprefix("stage")
        result["queries"] = (int(stage) + 1) * per_stage if stage.isdigit() else 0
    return together


def plain(result: dict) -> dict:
    """A result without its values for single images, and without paths."""
    return {
        key: value for key, value in result.items() if isinstance(value, float | int) or key in ("checkpoint", "prompts")
    }


def training_reward(name: str) -> list[float]:
    """Mean reward of the images that each stage sampled. They show the policy before that stage's updates."""
    return [read_events(stage.metrics("select"), "select")[-1]["reward_mean"] for stage in stages(name)]


def num_updates(name: str) -> int:
    return sum(files.read_json(stage.folder / "train.json")["num_updates"] for stage in stages(name))


def stages(name: str) -> list[Stage]:
    config = configure(name)
    return [Stage(read_settings(config).output.root, index) for index in range(config.stage_cnt)]


def seconds_of(name: str) -> float | None:
    """How long `bash run_process.sh` took; None where it was interrupted."""
    file = read_settings(configure(name)).output.root / "seconds.json"
    return files.read_json(file) if file.is_file() else None


def mean_gain(before: dict, tuned: Sequence[list[dict]]) -> dict[str, float]:
    """Mean gain in accuracy over the seeds, with two standard errors.

    Both are of the gain averaged over seeds: `se` treats images as independent, `se_by_prompt` only prompts.
    """
    runs = [one["values"]["accuracy"] for results in tuned for one in results if one["prompts"] == before["prompts"]]
    after, base_values = (torch.tensor(values, dtype=torch.float64) for values in (runs, before["values"]["accuracy"]))
    change = after.mean(0) - base_values
    by_prompt = [change[n :: before["n_prompts"]].mean().item() for n in range(before["n_prompts"])]
    gain, error = mean_and_error(change.tolist())
    return {"gain": gain, "se": error, "se_by_prompt": mean_and_error(by_prompt)[1]}


def failures(bases: list[dict], tuned: dict) -> dict[str, dict[str, float]]:
    """The shares of images by the first thing that is wrong, for base and tuned model.

    The four shares add up to 1, so the changes of the first three explain the gain.
    """
    (before,) = (split_by_failure(result["values"]) for result in bases if result["prompts"] == tuned["prompts"])
    after, found = split_by_failure(tuned["values"]), {}
    for kind in before:
        change, error = paired_difference(after[kind].tolist(), before[kind].tolist())
        found[kind] = {"base": before[kind].mean().item(), "tuned": after[kind].mean().item(), "change": change, "se": error}
    return found


def split_by_failure(values: dict[str, list[float]]) -> dict[str, Tensor]:
    """{kind: 1 or 0 for each image}, 1 at the first thing that is wrong with it: form, binding, relation.

    `right` is 1 where nothing is wrong.
    """
    formed, bound, right = (
        torch.tensor(values[key], dtype=torch.float64) for key in ("shapes/well_formed", "shapes/binding", "accuracy")
    )
    return {"malformed": 1 - formed, "binding": formed - bound, "relation": bound - right, "right": right}


def best_comparison(tuned: dict[str, list[dict]]) -> dict[str, Any]:
    """The base by its best sampler, compared with each tuned model by the training sampler and by that best sampler.

    An image has the same prompt and initial noise with every sampler, so these differences are paired, too.
    """
    bases = at_best(BASE)
    compared: dict[str, Any] = {"sampler": vars(best_sampler()), "base": {one["prompts"]: plain(one) for one in bases}}
    for name, results in tuned.items():
        as_trained, same_sampler = (with_gains(bases, some)[len(SETS) :] for some in (results, at_best(name)))
        compared[name] = {
            one["prompts"]: {"as_trained": plain(one), "at_best": plain(same)}
            for one, same in zip(as_trained, same_sampler, strict=True)
        }
    return compared


def deployed_comparison(names: Sequence[str], guidance: float) -> dict[str, Any]:
    """Accuracy of base and tuned models in stock diffusers, and the paired gain."""
    compared: dict[str, Any] = {BASE: {}}
    for prompts in SETS:
        before = deployed_values(BASE, prompts, guidance)["accuracy"]
        compared[BASE][prompts] = dict(zip(("accuracy", "se"), mean_and_error(before), strict=True))
        for name in names:
            after = deployed_values(name, prompts, guidance)["accuracy"]
            gain, error = paired_difference(after, before)
            compared.setdefault(name, {})[prompts] = {"accuracy": fmean(after), "gain": gain, "gain_se": error}
    return compared


PARTS: dict[str, Callable[[Sequence[int], int], None]] = {
    "base": base,
    "run": run,
    "judge": judge,
    "deployed": deployed,
    "draw": draw,
}


if __name__ == "__main__":
    main()
