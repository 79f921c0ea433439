"""Judge the base model and checkpoints on prompt files, with noise that is the same for all of them.

N images, one prompt each: the file's prompts in turn; E features an image
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict
from torch import Tensor

from b2diffurl import files
from b2diffurl.branching import denoise
from b2diffurl.diversity import mean_pairwise_distance, vendi_score
from b2diffurl.experiment import check, find_lora
from b2diffurl.features import REWARD_OF, Features, check_features, load_features
from b2diffurl.models import Model, base_fingerprint
from b2diffurl.policy import decode, load_policy, predictor, warn_of_cut_prompts
from b2diffurl.prompts import batch_prompts, named_prompts
from b2diffurl.rewards import (
    Parts,
    Reward,
    by_name,
    check_rewards,
    join,
    load_reward,
    noting,
    require_finite,
    reward_identity,
    reward_weights,
    score,
)
from b2diffurl.rewards.mixture import Scales, combine, recorded_scales
from b2diffurl.runtime import logger, make_accelerator, progress
from b2diffurl.seeding import generator
from b2diffurl.stage import Stage, finished_stages

RESULT_FORMAT = 2  # counts up when result.json holds something new, so that older ones are made again
NUM_SHOWN = 12  # images of each evaluation that are kept, for pictures


@dataclass(frozen=True)
class SamplerSettings:
    """How evaluation images are made."""

    num_steps: int
    eta: float
    guidance_scale: float


def training_sampler(config: ConfigDict) -> SamplerSettings:
    """That with which the policy is trained."""
    return SamplerSettings(config.sample.num_steps, config.sample.eta, config.sample.guidance_scale)


@dataclass(frozen=True)
class Instruments:
    """What images are judged by, by name."""

    rewards: dict[str, Reward]
    features: dict[str, Features]


def evaluate(
    config: ConfigDict, checkpoints: list[str], prompt_sets: list[str], settings: SamplerSettings
) -> list[dict[str, Any]]:
    """Judge every checkpoint on every prompt set; one result each, base first if asked for.

    A checkpoint is `base`, `last` (the experiment's newest), `stage<i>`, or the path of a LoRA. A prompt set is `train`,
    `test`, or a prompt file. What has been judged before is read back, not redone. Where `base` is among the checkpoints
    the others carry their paired difference to it.
    """
    check(config)
    root = Path(config.save_path) / config.exp_name
    scorers = named_scorers(config)
    scales = recorded_scales(root) if config.reward.standardise else None
    if config.reward.standardise and not scales:
        raise ValueError(f"reward.standardise takes its scale from the first stage; {root} has none selected with it")
    loras = {name: resolve_checkpoint(root, name) for name in sorted(checkpoints, key=lambda name: name != "base")}
    placed = {name: named_prompts(config, name) for name in prompt_sets}
    prompts = {name: [prompt for _, prompt in some] for name, some in placed.items()}
    everything = [prompt for some_prompts in prompts.values() for prompt in some_prompts]
    check_rewards(scorers, config.reward, everything)
    for name in config.eval.diversity:
        check_features(name, config.reward, everything)
    begun = root / "config.json"
    threads = config.num_threads or (files.read_json(begun)["num_threads"] if begun.is_file() else 0)
    accelerator = make_accelerator(config, threads)
    common = conditions(config, scorers, scales, accelerator)
    results = []
    instruments = None
    for checkpoint, lora in loras.items():
        model = None
        for name, some_prompts in prompts.items():
            folder = result_folder(root, checkpoint, lora, name, [vars(settings), some_prompts, *common])
            if not (folder / "result.json").is_file():
                model = model or load_judged(config, accelerator, lora)
                instruments = instruments or load_instruments(config, scorers, accelerator)
                warn_of_cut_prompts(model, placed[name])
                logger.info("eval %s on %s prompts: %d images", checkpoint, name, config.eval.num_images)
                judge(config, model, instruments, some_prompts, settings, scales, folder)
            facts = {"checkpoint": checkpoint, "lora": str(lora or ""), "prompts": name} | vars(settings)
            results.append(facts | files.read_json(folder / "result.json") | {"folder": str(folder)})
    add_differences(results)
    for result in results:
        logger.info("eval %s", describe(result))
    return results


def resolve_checkpoint(root: Path, name: str) -> Path | None:
    """The LoRA file a checkpoint's name means, or None for the base model."""
    if name == "base":
        return None
    if name == "last":
        trained = finished_stages(root, "train")
        if not trained:
            raise FileNotFoundError(f"{root} has no trained stage. Run run_process.sh first, or judge --checkpoint=base.")
        return find_lora(trained[-1].folder)
    if name.removeprefix("stage").isdigit():
        return find_lora(Stage(root, int(name.removeprefix("stage"))).folder)
    return find_lora(Path(name))


def named_scorers(config: ConfigDict) -> list[str]:
    """The rewards that score every image: those trained on, those watched, and the judge.

    `file` is not among them: it has no scores for new images.
    """
    named = (*reward_weights(config.reward), *config.reward.watch, config.eval.judge)
    return [name for name in dict.fromkeys(named) if name not in ("", "file")]


def conditions(config: ConfigDict, scorers: list[str], scales: Scales | None, accelerator: Accelerator) -> list:
    """What decides the numbers beside checkpoint, prompts and sampler.

    Left out are the number of threads, which moves results by rounding, and this package's own code.
    """
    models = sorted({*scorers, *(REWARD_OF[name] for name in config.eval.diversity)})
    return [
        RESULT_FORMAT,
        [reward_identity(name, config.reward) for name in models],
        [
            reward_weights(config.reward),
            bool(config.reward.weights),
            scales,
            config.reward.dtype,
            sorted(config.reward.watch),
        ],
        {key: config.eval[key] for key in ("judge", "diversity", "num_images", "batch_size", "seed")},
        [accelerator.device.type, accelerator.mixed_precision, config.allow_tf32],
        base_fingerprint(config.pretrained),
        config.pretrained.resolution,
    ]


def result_folder(root: Path, checkpoint: str, lora: Path | None, name: str, decisive: list) -> Path:
    """Where one evaluation lies: its name says what, a checksum of `decisive` and of the LoRA says which."""
    digest = files.digest([*decisive, files.sha256(lora) if lora else ""])
    label = checkpoint if lora is None else "-".join(lora.parent.parts[-3::2]) if "checkpoints" in lora.parts else lora.stem
    return root / "eval" / f"{label}_{Path(name).stem}_{digest}"


def load_instruments(config: ConfigDict, scorers: list[str], accelerator: Accelerator) -> Instruments:
    rewards = {key: load_reward(key, config.reward, accelerator.device) for key in scorers}
    features = {key: load_features(key, config.reward, accelerator.device, rewards) for key in config.eval.diversity}
    return Instruments(rewards, features)


def load_judged(config: ConfigDict, accelerator: Accelerator, lora: Path | None) -> Model:
    model = load_policy(config, accelerator, lora)
    model.network = accelerator.prepare_model(model.network, evaluation_mode=True)
    return model


def judge(
    config: ConfigDict,
    model: Model,
    instruments: Instruments,
    prompts: list[str],
    settings: SamplerSettings,
    scales: Scales | None,
    folder: Path,
) -> None:
    """Sample, score, and write result.json (last) with every image's values, and the first images."""
    found: dict[str, list[tuple[Tensor, Parts]]] = {key: [] for key in instruments.rewards}
    features: dict[str, list[Tensor]] = {key: [] for key in instruments.features}
    for batch in progress(range(math.ceil(config.eval.num_images / config.eval.batch_size)), "eval"):
        start = batch * config.eval.batch_size
        count = min(config.eval.batch_size, config.eval.num_images - start)
        some_prompts = batch_prompts(prompts, config.eval.batch_size, batch, None)
        images = sample_images(config, model, some_prompts, batch, settings)
        for n in range(start, min(start + count, NUM_SHOWN)):
            files.write_image(folder / f"{n:05d}.png", images[n - start])
        for key, reward in instruments.rewards.items():
            with noting(f"reward {key}, batch {batch}: images {start} to {start + count - 1} of the evaluation"):
                found[key].append(score(reward, images, some_prompts, count))
            require_finite(key, found[key][-1][0], f"of batch {batch}, prompts {some_prompts[:3]} …")
        for key, feature in instruments.features.items():
            features[key].append(feature.embed(images, some_prompts)[:count])
    asked = batch_prompts(prompts, config.eval.num_images, 0, None)
    named = {part: numbers for key, batches in found.items() for part, numbers in by_name(key, *join(batches)).items()}
    values = {part: numbers for part, numbers in named.items() if isinstance(numbers, Tensor)}
    summary = summarise(config, values, scales, asked, len(prompts))
    right = summary["values"].get("accuracy")
    summary["diversity"] = {
        key: summarise_diversity(torch.cat(parts), asked, right, instruments.features[key].metric)
        for key, parts in features.items()
    }
    files.write_json(folder / "result.json", summary)


def sample_images(config: ConfigDict, model: Model, prompts: list[str], batch: int, settings: SamplerSettings) -> Tensor:
    """Images uint8 [N,H,W,3] of one batch, from noise that follows from (eval.seed, batch) alone."""
    sampler = model.sampler(settings.num_steps, settings.eta)
    rng, device = generator(config.eval.seed, "eval", batch), sampler.sigma.device

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=rng).to(device)

    predict = predictor(
        model,
        sampler,
        model.encode(prompts),
        model.encode([""]),
        guidance_scale=settings.guidance_scale,
        micro_batch_size=config.sample.micro_batch_size,
    )
    latents = denoise(predict, sampler, noise((len(prompts), *model.latent_shape)), noise, range(settings.num_steps))
    return decode(model, latents, config.sample.decode_batch_size)


def summarise(
    config: ConfigDict, values: dict[str, Tensor], scales: Scales | None, asked: list[str], num_prompts: int
) -> dict[str, Any]:
    """Means, errors and values; those that are not finite are None.

    `reward` is the trained one, `accuracy` the judge's; those of a mixture and watched ones stand under their names, parts
    of any under `<name>/<part>`.
    """
    weights, judge = reward_weights(config.reward), config.eval.judge
    kept: dict[str, Tensor] = {}
    if "file" not in weights:
        kept["reward"] = combine(values, weights, scales)
    if judge:
        kept["accuracy"] = values[judge]
    named = {*(config.reward.weights or ()), *config.reward.watch}
    kept |= {key: numbers for key, numbers in values.items() if "/" in key or key in named}
    nothing = dict.fromkeys(("reward", "reward_se", "accuracy", "accuracy_se"))
    summary = {"n_images": len(asked), "n_prompts": num_prompts} | nothing
    lists = {key: [value if math.isfinite(value) else None for value in numbers.tolist()] for key, numbers in kept.items()}
    for key, numbers in lists.items():
        summary[key], summary[f"{key}_se"] = mean_and_error(numbers)
    return summary | {"shown_prompts": asked[:NUM_SHOWN], "values": lists}


def summarise_diversity(
    features: Tensor, asked: list[str], right: list[float] | None, metric: str
) -> dict[str, dict[str, float]]:
    """Diversity of features [N,E], by prompt: mean pairwise distance of all its images, and where there is a judge of the
    right ones alone; where the metric is a cosine also the Vendi score, of all.

    Right is what the judge gives more than 1/2. Wrong images differ from right ones, so a model that makes fewer of them is
    less diverse for a good reason.
    """
    found = {"all": mean_pairwise_distance(features, asked, metric=metric)}
    if metric == "cosine":
        found["vendi"] = vendi_score(features, asked)
    if right is not None:
        rows = [n for n, value in enumerate(right) if value > 0.5]
        found["right"] = mean_pairwise_distance(features[rows], [asked[n] for n in rows], metric=metric)
    return found


def mean_and_error(numbers: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and its standard error, of those that are numbers; None of nothing."""
    numbers = [number for number in numbers if number is not None]
    if not numbers:
        return None, None
    tensor = torch.tensor(numbers, dtype=torch.float64)
    error = tensor.std().item() / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0
    return tensor.mean().item(), error


def paired_difference(after: Sequence[float | None], before: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean of after - before, value by value where both are numbers, and its standard error."""
    pairs = zip(after, before, strict=True)
    return mean_and_error([new - old for new, old in pairs if new is not None and old is not None])


def add_differences(results: list[dict[str, Any]]) -> None:
    """Beside each checkpoint's figures the mean paired difference to the base on the same noise, and its error.

    Values are paired by image. Diversity is paired by prompt, over those that both have; its mean is over all that it has.
    """
    base = {result["prompts"]: result for result in results if result["checkpoint"] == "base"}
    for result in results:
        for name, groups in list(diversities(result)):
            result[name], result[f"{name}_se"] = mean_and_error(list(groups.values()))
        against = base.get(result["prompts"])
        if against is None or result is against:
            continue
        for key, numbers in result["values"].items():
            if key not in against["values"]:
                continue  # a part that a reward gives for some images alone
            result[f"{key}_gain"], result[f"{key}_gain_se"] = paired_difference(numbers, against["values"][key])
        before = dict(diversities(against))
        for name, after in diversities(result):
            both = [prompt for prompt in after if prompt in before[name]]
            gain = paired_difference([after[prompt] for prompt in both], [before[name][prompt] for prompt in both])
            result[f"{name}_gain"], result[f"{name}_gain_se"] = gain


def diversities(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """(name, figure by prompt) of each diversity in a result: diversity/<features>, and with _right or _vendi after it."""
    for features, found in result["diversity"].items():
        for which, groups in found.items():
            yield f"diversity/{features}" + ("" if which == "all" else f"_{which}"), groups


def describe(result: dict[str, Any]) -> str:
    """One readable line."""
    words = [f"{result['checkpoint']} on {result['prompts']} prompts, {result['n_images']} images:"]
    named = [key for key in result["values"] if key not in ("reward", "accuracy") and "/" not in key]
    for key in ("reward", "accuracy", *named):
        if result[key] is not None:
            words.append(f"{key} {result[key]:.4f} ± {result[f'{key}_se']:.4f}")
        if f"{key}_gain" in result:
            words.append(f"(gain {result[f'{key}_gain']:+.4f} ± {result[f'{key}_gain_se']:.4f})")
    return " ".join(words)
