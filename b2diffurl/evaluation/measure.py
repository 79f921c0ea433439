"""Judge the base model and checkpoints on prompt files, with noise that is the same for all of them.

N images, one prompt each: the file's prompts in turn; E features an image
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict
from torch import Tensor

from b2diffurl.configuration.limits import check_choice
from b2diffurl.configuration.plan import stage_index
from b2diffurl.configuration.prompts import batch_prompts, named_prompts
from b2diffurl.configuration.rules import check
from b2diffurl.configuration.settings import describe_reward, read_settings
from b2diffurl.evaluation.features import Features, check_features, features_identity, load_features
from b2diffurl.evaluation.generate import SAMPLERS, SamplerSettings, sample_images, training_sampler
from b2diffurl.evaluation.statistics import add_differences, describe, record, summarise, summarise_diversity
from b2diffurl.experiment.checkpoints import read_state
from b2diffurl.experiment.folder import checkpoint_name, experiment_folder, relative_to, resolve_checkpoint, stage_of
from b2diffurl.experiment.stage import finished_stages
from b2diffurl.models import Model, base_fingerprint
from b2diffurl.models.policy import check_base, load_policy, warn_of_cut_prompts
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
from b2diffurl.rewards.mixture import Scales, recorded_scales
from b2diffurl.runtime import files
from b2diffurl.runtime.device import make_accelerator
from b2diffurl.runtime.logs import logger, progress

RESULT_FORMAT = 3  # counts up when result.json holds something new, so that older ones are made again
NUM_DRAWN = 6  # images of one prompt, or to see whether two models differ


@dataclass(frozen=True)
class Instruments:
    """What images are judged by, by name."""

    rewards: dict[str, Reward]
    features: dict[str, Features]


def evaluate(
    config: ConfigDict, checkpoints: Sequence[str], prompt_sets: Sequence[str], samplers: Mapping[str, SamplerSettings]
) -> list[dict[str, Any]]:
    """Judge every checkpoint on every prompt set with every sampler; one result each, base first if asked for.

    A checkpoint is `base`, `last` (the experiment's newest), `stage<i>`, `stage<i>/checkpoint_<n>`, or the path of a LoRA. A
    prompt set is `train`, `test`, or a prompt file. What has been judged before is read back, not redone. Where `base` is
    among the checkpoints the others carry their paired difference to it. Each result becomes a row of the experiment's
    eval.jsonl.
    """
    check(config)
    root = experiment_folder(config)
    scorers = named_scorers(config)
    scales = recorded_scales(root) if config.reward.standardise else None
    if config.reward.standardise and not scales:
        raise ValueError(f"reward.standardise takes its scale from the first stage; {root} has none selected with it")
    loras = [resolve_checkpoint(root, name) for name in sorted(checkpoints, key=lambda name: name != "base")]
    placed = {name: named_prompts(config, name) for name in prompt_sets}
    prompts = {name: [prompt for _, prompt in some] for name, some in placed.items()}
    everything = [prompt for some_prompts in prompts.values() for prompt in some_prompts]
    check_rewards(scorers, config.reward, everything)
    for name in config.eval.diversity:
        check_features(name, config, everything)
    fingerprint = base_fingerprint(config.pretrained)
    for lora in filter(None, loras):
        check_base(lora, config.pretrained, fingerprint)
    begun = files.read_json(root / "config.json") if (root / "config.json").is_file() else None
    threads = config.num_threads or (begun["num_threads"] if begun else 0)
    if begun:
        warn_of_other_settings(config, begun["config"])
    accelerator = make_accelerator(replace(read_settings(config).compute, num_threads=threads), shared=False)
    common = conditions(config, scorers, scales, accelerator, fingerprint)
    results = []
    instruments = None
    for lora in dict.fromkeys(loras):
        model, checkpoint = None, checkpoint_name(root, lora)
        for name, some_prompts in prompts.items():
            for sampler, settings in samplers.items():
                under = files.digest([vars(settings), some_prompts, *common])
                folder = result_folder(root, checkpoint, lora, name, under)
                base = result_folder(root, "base", None, name, under) / "result.json"
                if not (folder / "result.json").is_file():
                    model = model or load_judged(config, accelerator, lora)
                    if lora and not base.is_file():
                        draw_both(config, model, lora, batch_prompts(some_prompts, NUM_DRAWN, 0, None), settings)
                    instruments = instruments or load_instruments(config, scorers, accelerator)
                    warn_of_cut_prompts(model, placed.pop(name, ()))
                    logger.info(
                        "eval %s on %s prompts, %s sampler: %d images", checkpoint, name, sampler, config.eval.num_images
                    )
                    judge(config, model, instruments, some_prompts, settings, scales, folder)
                facts = {"checkpoint": checkpoint, "stage": stage_of(checkpoint), "prompts": name, "sampler": sampler}
                facts |= {"lora": relative_to(root, lora) if lora else "", "conditions": under} | vars(settings)
                facts |= {"folder": relative_to(root, folder)}
                results.append(facts | files.read_json(folder / "result.json"))
                if lora and base.is_file():
                    same = results[-1]["images_sha256"] == files.read_json(base)["images_sha256"]
                    require_different(lora, same=same)
        add_differences(results)
        record(root, results)
    for result in results:
        logger.info("eval %s", describe(result))
    return results


def warn_of_other_settings(config: ConfigDict, trained: Mapping) -> None:
    """Name what `reward` and `training sampler` would not be those of the experiment, whose config.json has `trained`."""
    found = {"reward": (describe_reward(config.reward), describe_reward(trained["reward"]))}
    found |= {
        f"sample.{key}": (config.sample[key], trained["sample"][key]) for key in ("num_steps", "eta", "guidance_scale")
    }
    other = [f"{name} is {here}, in training it was {there}" for name, (here, there) in found.items() if here != there]
    if other:
        logger.warning("eval: %s; unless you mean that, leave it out, and it is as in training", "; ".join(other))


def evaluate_due(config: ConfigDict) -> list[dict[str, Any]]:
    """After a stage of a run: judge it and the base on held-out prompts if it is its turn; what was found, or nothing."""
    index, every = stage_index(config.run_name), config.eval.every
    if not every or (index + 1) % every:
        return []
    return evaluate(config, ["base", config.run_name], ["test"], {"training": training_sampler(config)})


def named_samplers(config: ConfigDict, names: Sequence[str]) -> dict[str, SamplerSettings]:
    """The samplers of those names; a ValueError lists what there is."""
    for name in names:
        check_choice("--sampler", name, SAMPLERS)
    return {name: SAMPLERS[name](config) for name in names}


def is_newest(config: ConfigDict) -> bool:
    """Whether the stage of config.run_name is the last that has been trained."""
    trained = finished_stages(experiment_folder(config), "train")
    return bool(trained) and trained[-1].index == stage_index(config.run_name)


def every_checkpoint(config: ConfigDict) -> list[str]:
    """The base and each trained stage."""
    stages = finished_stages(experiment_folder(config), "train")
    return ["base", *(f"stage{stage.index}" for stage in stages)]


def require_different(lora: Path, *, same: bool) -> None:
    """A checkpoint that was updated draws other pictures than the base; if it is the `same` ones, it was not applied."""
    state = read_state(lora)
    if same and state and state["num_updates"]:
        raise ValueError(
            f"{lora} has had {state['num_updates']} updates and draws exactly the base model's images: it is damaged, "
            "or was not applied. Run its stage's training again, or report this."
        )


def named_scorers(config: ConfigDict) -> list[str]:
    """The rewards that score every image: those trained on, those watched, and the judge.

    `file` is not among them: it has no scores for new images.
    """
    named = (*reward_weights(config.reward), *config.reward.watch, config.eval.judge)
    return [name for name in dict.fromkeys(named) if name not in ("", "file")]


def conditions(
    config: ConfigDict, scorers: list[str], scales: Scales | None, accelerator: Accelerator, fingerprint: str
) -> list:
    """What decides the numbers beside checkpoint, prompts and sampler; `fingerprint` is the base model's.

    Left out are the number of threads, which moves results by rounding, and this package's own code.
    """
    return [
        RESULT_FORMAT,
        [reward_identity(name, config.reward) for name in scorers],
        [features_identity(name, config) for name in config.eval.diversity],
        [
            reward_weights(config.reward),
            bool(config.reward.weights),
            scales,
            config.reward.dtype,
            sorted(config.reward.watch),
        ],
        {key: config.eval[key] for key in ("judge", "diversity", "num_images", "batch_size", "seed")},
        [accelerator.device.type, accelerator.mixed_precision, config.allow_tf32],
        fingerprint,
        config.pretrained.resolution,
    ]


def result_folder(root: Path, checkpoint: str, lora: Path | None, name: str, under: str) -> Path:
    """Where one evaluation lies: its name says what, a checksum of the conditions and of the LoRA says which."""
    digest = files.digest([under, files.sha256(lora) if lora else ""])
    label = lora.stem if lora and stage_of(checkpoint) is None else checkpoint.replace("/", "-")
    return root / "eval" / f"{label}_{Path(name).stem}_{digest}"


def load_instruments(config: ConfigDict, scorers: list[str], accelerator: Accelerator) -> Instruments:
    rewards = {key: load_reward(key, config.reward, accelerator.device) for key in scorers}
    features = {key: load_features(key, config, accelerator.device, rewards) for key in config.eval.diversity}
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
    """Sample, score, and write every image and, last, result.json with its values."""
    found: dict[str, list[tuple[Tensor, Parts]]] = {key: [] for key in instruments.rewards}
    features: dict[str, list[Tensor]] = {key: [] for key in instruments.features}
    pixels = hashlib.sha256()
    for batch in progress(range(math.ceil(config.eval.num_images / config.eval.batch_size)), "eval"):
        start = batch * config.eval.batch_size
        count = min(config.eval.batch_size, config.eval.num_images - start)
        some_prompts = batch_prompts(prompts, config.eval.batch_size, batch, None)
        images = sample_images(config, model, some_prompts, settings, batch)
        for n, image in enumerate(images[:count]):
            files.write_image(folder / f"{start + n:05d}.png", image)
            pixels.update(image.numpy().tobytes())
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
    files.write_record(folder / "result.json", summary | {"images_sha256": pixels.hexdigest()})


def prompt_images(config: ConfigDict, checkpoint: str, prompt: str, settings: SamplerSettings) -> dict[str, Tensor]:
    """Images uint8 [N,H,W,3] of one prompt by `base` and by the checkpoint, if that is another, on the same noise."""
    check(config)
    if not prompt.strip():
        raise ValueError("--prompt is empty; give it the text to draw")
    root = experiment_folder(config)
    lora = resolve_checkpoint(root, checkpoint)
    model = load_judged(config, make_accelerator(read_settings(config).compute, shared=False), lora)
    warn_of_cut_prompts(model, [("--prompt", prompt)])
    asked = [prompt] * NUM_DRAWN
    if lora is None:
        return {"base": sample_images(config, model, asked, settings, 0)}
    return dict(zip(("base", checkpoint_name(root, lora)), draw_both(config, model, lora, asked, settings), strict=True))


def draw_both(
    config: ConfigDict, model: Model, lora: Path, prompts: list[str], settings: SamplerSettings
) -> tuple[Tensor, Tensor]:
    """Images uint8 [N,H,W,3] on the same noise by the base and by the LoRA that `model` carries, which must differ."""
    with model.base_policy():
        base = sample_images(config, model, prompts, settings, 0)
    tuned = sample_images(config, model, prompts, settings, 0)
    require_different(lora, same=torch.equal(base, tuned))
    return base, tuned
