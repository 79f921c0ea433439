"""Does the default run learn? Everything that README and docs/results say of it.

    python -m benchmarks.learning                    # all of it, one part after the other
    python -m benchmarks.learning run --seeds 1,2    # one part of it: sweep, run, control, judge, deployed, draw

What is done is not redone. Two calls may work side by side on different seeds (--threads=1 each), but for `run`, which is
timed, and `draw`, which collects what the others left in model/lora/learning_*.
"""

import argparse
import json
import logging
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from b2diffurl import files
from b2diffurl.evaluate import SamplerSettings, add_differences, evaluate, mean_and_error
from b2diffurl.metrics import read_events
from b2diffurl.prompts import load_prompts
from b2diffurl.runtime import set_up_logging
from b2diffurl.stage import Stage
from config.stage_process import get_config

SEEDS = (1, 2, 3)
NUM_IMAGES, SWEEP_IMAGES = 1152, 384  # 24 and 8 a prompt
EVAL_SEED = 1
GUIDANCES = (1.0, 1.5, 2.0, 2.5, 3.0, 5.0, 10.0)
STEP_COUNTS = {1.0: (10, 20, 50), 0.0: (50,)}  # by eta
DEPLOYED_STEPS = 50
RESULTS = Path("docs/results")
SETS = {"train": "training", "test": "held-out"}

log = logging.getLogger("b2diffurl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of judging; 0: torch's default")
    given = parser.parse_args()
    set_up_logging(Path("log/learning.log"))
    for part in PARTS if given.part == "all" else [given.part]:
        PARTS[part]([int(seed) for seed in given.seeds.split(",")], given.threads)


def configure(name: str, threads: int = 0, num_images: int = NUM_IMAGES) -> Any:
    """The default configuration as experiment `learning_<name>`, judged with noise of its own."""
    config = get_config("shapes")
    config.exp_name, config.num_threads = f"learning_{name}", threads
    config.eval.num_images, config.eval.seed = num_images, EVAL_SEED
    return config


def training_sampler() -> SamplerSettings:
    sample = get_config("shapes").sample
    return SamplerSettings(sample.num_steps, sample.eta, sample.guidance_scale)


# --- the parts ------------------------------------------------------------------------------------


def sweep(_seeds: Sequence[int], threads: int) -> None:
    """The base model at every sampler, on the training prompts; the best one again with more images, on both sets."""
    for settings in sweep_settings():
        evaluate(configure("base", threads, SWEEP_IMAGES), ["base"], ["train"], settings)
    evaluate(configure("base", threads), ["base"], ["train", "test"], best_sampler(threads))


def sweep_settings() -> list[SamplerSettings]:
    return [
        SamplerSettings(steps, eta, guidance)
        for guidance in GUIDANCES
        for eta, step_counts in STEP_COUNTS.items()
        for steps in step_counts
    ]


def sweep_results(threads: int = 0) -> list[dict]:
    config = configure("base", threads, SWEEP_IMAGES)
    return [result for settings in sweep_settings() for result in evaluate(config, ["base"], ["train"], settings)]


def best_sampler(threads: int = 0) -> SamplerSettings:
    """That with which the base gets most of the training prompts right."""
    best = max(sweep_results(threads), key=lambda result: result["accuracy"])
    return SamplerSettings(best["num_steps"], best["eta"], best["guidance_scale"])


def run(seeds: Sequence[int], _threads: int) -> None:
    """The default run as its users start it, with nothing but seed and name changed; the time counts if it is whole."""
    for seed in seeds:
        run_process(f"seed{seed}", seed)


def control(seeds: Sequence[int], _threads: int) -> None:
    """The same with a reward that means nothing: whatever it gains, any nudge would."""
    run_process(f"control{seeds[0]}", seeds[0], "--config.reward.name=benchmarks.learning:meaningless")


def run_process(name: str, seed: int, *arguments: str) -> None:
    config = configure(name)
    root = Path(config.save_path) / config.exp_name
    if Stage(root, config.stage_cnt - 1).finished("train") and (root / "before_after.png").is_file():
        return
    fresh, started = not root.exists(), time.perf_counter()
    environment = os.environ | {"ExpName": config.exp_name, "Seed": str(seed)}
    subprocess.run(["bash", "run_process.sh", *arguments], env=environment, check=True)
    if fresh:
        files.write_json(root / "seconds.json", time.perf_counter() - started)


def meaningless(images: Tensor, _prompts: Sequence[str]) -> Tensor:
    """A reward [N] in [0, 1) that depends on every pixel and on nothing one can see."""
    weights = torch.arange(1, images[0].numel() + 1, dtype=torch.int64) * 2654435761 % 1000003
    return (images.flatten(1).long() @ weights % 10007) / 10007


def judge(seeds: Sequence[int], threads: int) -> None:
    """Every stage of every run at the sampler of training, and the last stage at the base's best one."""
    for name in ("base", *run_names(seeds)):
        curve(name, threads)
        for prompts in SETS:
            evaluate(configure(name, threads), ["base" if name == "base" else "last"], [prompts], best_sampler(threads))


def run_names(seeds: Iterable[int]) -> list[str]:
    """The runs that there are: of each seed, and their controls."""
    names = [f"{kind}{seed}" for kind in ("seed", "control") for seed in seeds]
    return [name for name in names if (Path(get_config("shapes").save_path) / f"learning_{name}").is_dir()]


def curve(name: str, threads: int = 0) -> list[dict]:
    """The results of each stage on both prompt sets, in order, or those of the base."""
    config = configure(name, threads)
    checkpoints = ["base"] if name == "base" else [f"stage{index}" for index in range(config.stage_cnt)]
    return evaluate(config, checkpoints, list(SETS), training_sampler())


def deployed(seeds: Sequence[int], threads: int) -> None:
    """What people do with the LoRA: stock diffusers, deterministic DDIM, 50 steps; at the guidance of training and at the
    base's best for this sampler."""
    if threads:
        torch.set_num_threads(threads)
    for guidance in deployed_guidances():
        for name in ("base", *(name for name in run_names(seeds) if name.startswith("seed"))):
            for prompts in SETS:
                deployed_values(name, prompts, guidance)


def deployed_guidances() -> list[float]:
    like_this = [one for one in sweep_results() if (one["num_steps"], one["eta"]) == (DEPLOYED_STEPS, 0.0)]
    best = max(like_this, key=lambda result: result["accuracy"])["guidance_scale"]
    return list(dict.fromkeys([training_sampler().guidance_scale, best]))


def deployed_values(name: str, prompts: str, guidance: float) -> dict[str, list[float]]:
    """The checker's values for each image of stock diffusers' pipeline, by part."""
    from b2diffurl.rewards.shapes import shapes
    from b2diffurl.shapes.sampling import load_pipeline, sample

    config = configure(name)
    root = Path(config.save_path) / config.exp_name
    file = root / "eval" / f"deployed_{prompts}_guidance{guidance:g}.json"
    if not file.is_file():
        pipeline = load_pipeline(config.pretrained.model)
        if name != "base":
            pipeline.load_lora_weights(Stage(root, config.stage_cnt - 1).checkpoints()[-1])
        some = load_prompts({"train": config.prompt_file, "test": config.eval.prompt_file}[prompts])
        asked = [some[n % len(some)] for n in range(NUM_IMAGES)]
        images = sample(pipeline, asked, seed=EVAL_SEED, num_steps=DEPLOYED_STEPS, guidance=guidance, eta=0.0)
        accuracy, parts = shapes(torch.from_numpy(images), asked)
        values = {"accuracy": accuracy} | {f"shapes/{part}": value for part, value in parts.items()}
        files.write_json(file, {key: value.tolist() for key, value in values.items()})
        log.info("deployed %s on %s prompts, guidance %g: %.4f", name, prompts, guidance, accuracy.mean().item())
    return json.loads(file.read_text())


def draw(seeds: Sequence[int], _threads: int) -> None:
    """docs/results/learning.json, .md and .png from what the other parts left."""
    from benchmarks.learning_report import draw_curves, write_tables

    names, base = run_names(seeds), curve("base")
    curves = {name: with_gains(base, curve(name)) for name in names}
    tuned = {name: results[-len(SETS) :] for name, results in curves.items()}
    facts = {
        "date": str(date.today()),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "seeds": list(seeds),
        "num_images": NUM_IMAGES,
        "sampler": vars(training_sampler()),
        "seconds": {name: seconds_of(name) for name in names},
        "training_reward": {name: training_reward(name) for name in names},
        "curves": {name: [plain(result) for result in results] for name, results in curves.items()},
        "failures": {name: {one["prompts"]: failures(base, one) for one in results} for name, results in tuned.items()},
        "sweep": [plain(result) for result in sweep_results()],
        "best": best_comparison(tuned),
        "deployed": {f"{guidance:g}": deployed_comparison(names, guidance) for guidance in deployed_guidances()},
    }
    files.write_json(RESULTS / "learning.json", facts)
    write_tables(facts, RESULTS / "learning.md")
    draw_curves(facts, RESULTS / "learning.png")


# --- figures --------------------------------------------------------------------------------------


def with_gains(base: list[dict], results: list[dict]) -> list[dict]:
    """Base and checkpoints in one list, each with the number of reward queries it cost and its gain over the base."""
    config = configure("base")
    per_stage = config.sample.num_batches_per_epoch * config.sample.batch_size * config.split_time
    together = [dict(result) for result in [*base, *results]]
    add_differences(together)
    for result in together:
        stage = result["checkpoint"].removeprefix("stage")
        result["queries"] = (int(stage) + 1) * per_stage if stage.isdigit() else 0
    return together


def plain(result: dict) -> dict:
    """A result without its values and paths."""
    return {
        key: value for key, value in result.items() if isinstance(value, float | int) or key in ("checkpoint", "prompts")
    }


def training_reward(name: str) -> list[float]:
    """Mean reward of the images that each stage sampled, so before its update."""
    config = configure(name)
    stages = [Stage(Path(config.save_path) / config.exp_name, index) for index in range(config.stage_cnt)]
    return [read_events(stage.metrics("select"), "select")[-1]["reward_mean"] for stage in stages]


def seconds_of(name: str) -> float | None:
    """How long `bash run_process.sh` took; None where it was interrupted."""
    config = configure(name)
    file = Path(config.save_path) / config.exp_name / "seconds.json"
    return files.read_json(file) if file.is_file() else None


def failures(base: list[dict], tuned: dict) -> dict[str, dict[str, float]]:
    """Where images go wrong first; the four shares add up to 1, so the changes of the first three make up the gain."""
    (before,) = (split_by_failure(result["values"]) for result in base if result["prompts"] == tuned["prompts"])
    after, found = split_by_failure(tuned["values"]), {}
    for kind in before:
        change, error = mean_and_error((after[kind] - before[kind]).tolist())
        found[kind] = {"base": before[kind].mean().item(), "tuned": after[kind].mean().item(), "change": change, "se": error}
    return found


def split_by_failure(values: dict[str, list[float]]) -> dict[str, Tensor]:
    """For each image 1 at the first thing that fails: being well formed, binding of shape and colour, relation; or none."""
    formed, bound, right = (
        torch.tensor(values[key], dtype=torch.float64) for key in ("shapes/well_formed", "shapes/binding", "accuracy")
    )
    return {"malformed": 1 - formed, "binding": formed - bound, "relation": bound - right, "right": right}


def best_comparison(tuned: dict[str, list[dict]]) -> dict[str, Any]:
    """The base at its best sampler, against each tuned model as it was trained, and against the same at that sampler."""
    settings = best_sampler()
    base = evaluate(configure("base"), ["base"], list(SETS), settings)
    compared: dict[str, Any] = {"sampler": vars(settings), "base": {result["prompts"]: plain(result) for result in base}}
    for name, results in tuned.items():
        same_sampler = with_gains(base, evaluate(configure(name), ["last"], list(SETS), settings))[len(SETS) :]
        compared[name] = {
            one["prompts"]: {
                "gain": one["accuracy"] - best["accuracy"],
                "gain_se": math.hypot(one["accuracy_se"], best["accuracy_se"]),
                "at_best": plain(same),
            }
            for one, best, same in zip(results, base, same_sampler, strict=True)
        }
    return compared


def deployed_comparison(names: Sequence[str], guidance: float) -> dict[str, Any]:
    """Accuracy of base and tuned model in stock diffusers, with the paired gain."""
    compared: dict[str, Any] = {"base": {}}
    for prompts in SETS:
        before = deployed_values("base", prompts, guidance)["accuracy"]
        compared["base"][prompts] = dict(zip(("accuracy", "se"), mean_and_error(before), strict=True))
        for name in (name for name in names if name.startswith("seed")):
            after = deployed_values(name, prompts, guidance)["accuracy"]
            gain, error = mean_and_error([new - old for new, old in zip(after, before, strict=True)])
            compared.setdefault(name, {})[prompts] = {"accuracy": fmean(after), "gain": gain, "gain_se": error}
    return compared


PARTS: dict[str, Callable[[Sequence[int], int], None]] = {
    "sweep": sweep,
    "run": run,
    "control": control,
    "judge": judge,
    "deployed": deployed,
    "draw": draw,
}

if __name__ == "__main__":
    main()
