"""Judge the base model and checkpoints on prompt files, with the same noise for all of them.

N images. Image n has prompt n of the file, which is repeated if it is shorter
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from b2diffurl.configuration.limits import check_choice
from b2diffurl.configuration.prompts import batch_prompts, named_prompts, trained_on
from b2diffurl.configuration.recorded import exchanged, read_record
from b2diffurl.configuration.settings import SamplerSettings, Settings, describe_reward
from b2diffurl.evaluation.features import Features, check_features, features_identity, load_features
from b2diffurl.evaluation.generate import SAMPLERS, sample_images
from b2diffurl.evaluation.statistics import add_differences, summarise, summarise_diversity
from b2diffurl.experiment.checkpoints import read_state
from b2diffurl.experiment.evaluation_table import describe, drop_images, identity, record
from b2diffurl.experiment.folder import checkpoint_name, in_words, relative_to, resolve_checkpoint, stage_of
from b2diffurl.experiment.not_finite import listed
from b2diffurl.experiment.stage import finished_stages, versions
from b2diffurl.models import Model, base_fingerprint, base_identity
from b2diffurl.models.policy import check_base, load_policy, warn_of_cut_prompts
from b2diffurl.rewards import (
    Parts,
    Reward,
    by_name,
    check_rewards,
    cost_text,
    filled,
    fills_holes,
    join,
    load_reward,
    noting,
    require_finite,
    reward_identity,
    score,
    spent_by,
    waits,
)
from b2diffurl.rewards.mixture import Scales, recorded_scales
from b2diffurl.rewards.watched import Watched
from b2diffurl.runtime import files
from b2diffurl.runtime.device import make_accelerator
from b2diffurl.runtime.logs import logger, progress
from b2diffurl.runtime.threads import Behind

RESULT_FORMAT = 4  # raise it when result.json holds something new: results of an older format are then made again
# Packages whose version may change an image or a score. Results made with other versions are not read back.
DECISIVE_PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy", "pillow")
NUM_DRAWN = 6  # images of `--prompt`, and images that show whether a checkpoint differs from the base

Result = dict[str, Any]


def evaluate(
    settings: Settings, checkpoints: Sequence[str], prompt_sets: Sequence[str], samplers: Mapping[str, SamplerSettings]
) -> list[Result]:
    """Judge every checkpoint on every prompt set with every sampler. Returns one result for each, those of the base first.

    A checkpoint is named as in experiment/folder.py. A prompt set is `train`, `test`, or a prompt file; without held-out
    prompts `test` means `train`. Results that exist
    are read back. If `base` is among the checkpoints, the results of the others have their paired differences to it. Each
    result becomes a row of the experiment's eval.jsonl.
    """
    root, prompt_sets = settings.output.root, list(dict.fromkeys(map(settings.prompts.meant, prompt_sets)))
    # The base first, because the others are compared with it.
    loras = [resolve_checkpoint(root, name) for name in sorted(checkpoints, key=lambda name: name != "base")]
    evaluation = prepare(settings, prompt_sets, [lora for lora in loras if lora])
    results: list[Result] = []
    for lora in dict.fromkeys(loras):  # two names, such as `last` and `stage3`, may mean the same
        results += evaluation.of_checkpoint(lora, samplers)
        add_differences(results)
        record(root, results)  # after each checkpoint, so that the failure of a later one loses nothing
    drop_images(root, settings.output.keep_eval_images, {result["folder"] for result in results})
    for result in results:
        logger.info("eval %s", describe(result))
    return results


def prepare(settings: Settings, prompt_sets: Sequence[str], loras: Sequence[Path]) -> "Evaluation":
    """The evaluation of these prompt sets. What cannot be judged is refused before any work: a ValueError says why."""
    root, scorers, scales = settings.output.root, named_scorers(settings), mixture_scales(settings)
    placed = {name: named_prompts(settings.prompts, name) for name in prompt_sets}
    all_prompts = [prompt for prompt_set in placed.values() for _, prompt in prompt_set]
    check_rewards(scorers, settings.rewards, all_prompts)
    for name in settings.judging.diversity:
        check_features(name, settings.judging, settings.rewards, all_prompts)
    fingerprint, base = base_fingerprint(settings.model), base_identity(settings.model)
    for lora in loras:
        check_base(lora, settings.model, fingerprint)
    if trained := read_record(root):
        require_same_base(settings, trained, base)
        warn_of_other_settings(settings, trained["config"])
    accelerator = make_accelerator(settings.compute, shared=False)
    trained = [prompt for _, prompt in named_prompts(settings.prompts, "train")]
    return Evaluation(settings, placed, trained, scorers, scales, base, accelerator)


def mixture_scales(settings: Settings) -> Scales | None:
    """The scales of a mixture's parts, which the first stage has recorded; None where they are not standardised."""
    if not settings.rewards.standardise:
        return None
    if scales := recorded_scales(settings.output.root):
        return scales
    raise ValueError(
        f"reward.standardise takes its scale from the first stage, but {settings.output.root} has no selected stage with "
        "one. Sample and select a stage first, or set reward.standardise=False."
    )


@dataclass
class Evaluation:
    """What the evaluations of one call share. Models are loaded on first use, because all results may be on disk."""

    settings: Settings
    placed: dict[str, list[tuple[str, str]]]  # each prompt set by name: (file and line, prompt) of every prompt
    trained: list[str]  # the training prompts
    scorers: list[str]  # the rewards that score every image
    scales: Scales | None  # mean and deviation of a mixture's rewards, if it is standardised
    base: dict[str, str]  # {part of the base model: its checksum}
    accelerator: Accelerator
    warned: set[str] = field(default_factory=set)  # prompt sets whose too long prompts have been named in the log

    @cached_property
    def rewards(self) -> dict[str, Reward]:
        """The rewards by name, loaded; those that are only watched load when they begin, and may fail."""
        rewards, device = self.settings.rewards, self.accelerator.device
        decisive = {*rewards.weights, self.settings.judging.judge}
        return {
            name: load_reward(name, rewards, device)
            if name in decisive
            else Watched(name, partial(load_reward, name, rewards, device))
            for name in self.scorers
        }

    @property
    def watched(self) -> dict[str, Watched]:
        """Those of the rewards that are only watched."""
        return {name: reward for name, reward in self.rewards.items() if isinstance(reward, Watched)}

    @cached_property
    def features(self) -> dict[str, Features]:
        """The loaded features of `eval.diversity` by name."""
        judging, rewards, device = self.settings.judging, self.settings.rewards, self.accelerator.device
        loaded = self.rewards | {name: watched.reward for name, watched in self.watched.items()}
        return {name: load_features(name, judging, rewards, device, loaded) for name in judging.diversity}

    def of_checkpoint(self, lora: Path | None, samplers: Mapping[str, SamplerSettings]) -> list[Result]:
        """The results of one checkpoint on each prompt set with each sampler. `lora` None is the base model.

        A result on disk is read back. The model is loaded only if a result has to be made.
        """
        root, model, results = self.settings.output.root, None, []
        checkpoint = checkpoint_name(root, lora)
        for set_name, placed in self.placed.items():
            prompts = [prompt for _, prompt in placed]
            for sampler_name, sampler in samplers.items():
                conditions = self.conditions(sampler, prompts)
                folder = result_folder(root, checkpoint, lora, set_name, conditions)
                base_images = images_sha256(result_folder(root, "base", None, set_name, conditions))
                if not is_whole(folder):
                    model = model or load_checkpoint(self.settings, self.accelerator, lora)
                    # A LoRA that was not applied would be judged as the base is. Without a result of the base to compare
                    # with, draw a few images by both first.
                    if lora and not base_images:
                        draw_both(self.settings, model, lora, batch_prompts(prompts, NUM_DRAWN, 0, None), sampler)
                    self.warn_of_cut_prompts(model, set_name)
                    num_images = self.settings.judging.num_images
                    message = "eval %s on %s prompts, %s sampler: %d images"
                    logger.info(message, in_words(checkpoint), set_name, sampler_name, num_images)
                    self.measure(model, prompts, sampler, folder)
                facts = {"checkpoint": checkpoint, "stage": stage_of(checkpoint)}
                judging = self.settings.judging  # what an image's noise follows from, so that experiments can be compared
                facts |= {"prompts": set_name, "sampler": sampler_name} | self.seen(set_name)
                facts |= {"seed": judging.seed, "batch_size": judging.batch_size}
                facts |= {"lora": relative_to(root, lora) if lora else "", "conditions": conditions} | sampler.facts
                results.append(facts | {"folder": relative_to(root, folder)} | files.read_json(folder / "result.json"))
                if lora and base_images:
                    require_different(lora, same=results[-1]["images_sha256"] == base_images)
        return results

    def seen(self, set_name: str) -> dict[str, str]:
        """{"trained_on": how many of a set's prompts are trained on, `all` or `2 of 12`}; {} of none, and of `train`."""
        judged = {prompt for _, prompt in self.placed[set_name][: self.settings.judging.num_images]}
        both = trained_on(self.trained, judged) if set_name != "train" else []
        if not both:
            return {}
        return {"trained_on": "all" if len(both) == len(judged) else f"{len(both)} of {len(judged)}"}

    def conditions(self, sampler: SamplerSettings, prompts: list[str]) -> str:
        """A checksum of everything but the checkpoint that decides a result. Equal checksums make results comparable.

        The number of threads, which changes results by rounding alone, and this package's own code are left out.
        """
        rewards, judging, model = self.settings.rewards, self.settings.judging, self.settings.model
        installed = versions()
        decisive = [
            RESULT_FORMAT,
            [reward_identity(name, rewards) for name in self.scorers],
            [features_identity(name, judging, rewards) for name in judging.diversity],
            [dict(rewards.weights), rewards.mixed, self.scales, rewards.dtype, sorted(rewards.watched)],
            {
                "judge": judging.judge,
                "diversity": judging.diversity,
                "num_images": judging.num_images,
                "batch_size": judging.batch_size,
                "seed": judging.seed,
            },
            [self.accelerator.device.type, self.accelerator.mixed_precision, self.settings.compute.allow_tf32],
            self.base,
            model.resolution,
            # As results of earlier versions have it, unless it was chosen.
            *([{"max_sequence_length": model.max_sequence_length}] if model.max_sequence_length >= 0 else []),
            {package: installed[package] for package in DECISIVE_PACKAGES},
        ]
        return files.digest([sampler.facts, prompts, *decisive])

    def warn_of_cut_prompts(self, model: Model, name: str) -> None:
        """Name the prompts of a set that are judged and too long for the model, once a call."""
        if name not in self.warned:
            warn_of_cut_prompts(model, self.placed[name][: self.settings.judging.num_images])
            self.warned.add(name)

    def measure(self, model: Model, prompts: list[str], sampler: SamplerSettings, folder: Path) -> None:
        """Make one result: generate the images, score them, and write them and result.json to `folder`.

        result.json comes last, so a folder without it is unfinished and is made again.
        """
        judging = self.settings.judging
        model.prepare(prompts[: judging.num_images])
        for watched in self.watched.values():
            watched.begin(f"eval {folder.name}")
        scored: dict[str, list[tuple[Tensor, Parts]]] = {key: [] for key in self.rewards}
        features: dict[str, list[Tensor]] = {key: [] for key in self.features}
        pixels = hashlib.sha256()
        with ExitStack() as threads:
            # A reward that waits for another program scores a batch while the next one is drawn.
            beside = {key: threads.enter_context(Behind(abandon=True)) for key in self.rewards if waits(key)}
            for batch in progress(
                range(math.ceil(judging.num_images / judging.batch_size)), f"eval {folder.name}", "batches"
            ):
                start = batch * judging.batch_size
                # All batches have the same size, which rounding depends on; what the last one has too much is dropped.
                count = min(judging.batch_size, judging.num_images - start)
                batch_of_prompts = batch_prompts(prompts, judging.batch_size, batch, None)
                images = sample_images(self.settings, model, batch_of_prompts, sampler, batch)
                for n, image in enumerate(images[:count]):
                    files.write_image(folder / f"{start + n:05d}.png", image)
                    pixels.update(image.numpy().tobytes())
                # A judge that asks a server, or reads images one by one, need not do so for what is dropped.
                rows = [min(n, count - 1) for n in range(judging.batch_size)]
                shown, asked = images[rows], [batch_of_prompts[row] for row in rows]
                for key in self.rewards:
                    work = partial(self.score_batch, key, shown, asked, batch, count, scored[key])
                    beside[key].do(work) if key in beside else work()
                for key, feature in self.features.items():
                    features[key].append(feature.embed(images.clone(), list(batch_of_prompts))[:count])
            for thread in beside.values():
                thread.wait()
        self.finish_scores(folder.name, scored, batch_prompts(prompts, judging.num_images, 0, None))
        summary = self.summarise(prompts, scored, features)
        files.write_record(folder / "result.json", summary | {"images_sha256": pixels.hexdigest()})

    def score_batch(
        self, key: str, images: Tensor, prompts: list[str], batch: int, count: int, scored: list[tuple[Tensor, Parts]]
    ) -> None:
        """Score the first `count` images of a batch by one reward, and add the scores to `scored`."""
        start = batch * self.settings.judging.batch_size
        with noting(f"reward {key}, batch {batch}: images {start} to {start + count - 1} of the evaluation"):
            scored.append(score(self.rewards[key], images, prompts, count))
        if key not in self.watched and not fills_holes(key, self.settings.rewards):
            require_finite(key, scored[-1][0], f"of batch {batch}, prompts {prompts[:3]} …")

    def finish_scores(self, where: str, scored: dict[str, list[tuple[Tensor, Parts]]], prompts: list[str]) -> None:
        """Once all images [N] are scored: say what it has cost and what is missing, and fill what may be filled."""
        for key, batches in scored.items():
            if spent := spent_by(self.rewards[key]):
                logger.info("eval %s: reward %s has cost %s", where, key, cost_text(spent))
            rewards, parts = join(batches)
            if fills_holes(key, self.settings.rewards):
                rewards = filled(rewards, prompts)
                scored[key] = [(rewards, parts)]
            holes = (~rewards.isfinite()).nonzero().flatten().tolist()
            if key in self.watched:
                self.watched[key].warn_of_holes(rewards)
            elif fills_holes(key, self.settings.rewards) and 0 < len(holes) < len(rewards):
                told = "eval %s: reward %s is not finite for images %s, the only ones of their prompts; it is left out there"
                logger.warning(told, where, key, listed(holes))
            else:
                require_finite(key, rewards, f"of {where}")

    def summarise(
        self, prompts: list[str], scored: dict[str, list[tuple[Tensor, Parts]]], features: dict[str, list[Tensor]]
    ) -> Result:
        """Means, standard errors, values and diversity, from the batches of every reward and of all features."""
        judging = self.settings.judging
        image_prompts = batch_prompts(prompts, judging.num_images, 0, None)
        named = {part: numbers for key, batches in scored.items() for part, numbers in by_name(key, *join(batches)).items()}
        values = {part: numbers for part, numbers in named.items() if isinstance(numbers, Tensor)}  # parts may be text
        summary = summarise(self.settings.rewards, judging.judge, values, self.scales, image_prompts, len(prompts))
        accuracy = summary["values"].get("accuracy")
        summary["diversity"] = {
            key: summarise_diversity(torch.cat(batches), image_prompts, accuracy, self.features[key].metric)
            for key, batches in features.items()
        }
        return summary


def require_same_base(settings: Settings, trained: Mapping[str, Any], base: Mapping[str, str]) -> None:
    """Refuse a base model of which a part is another than in the experiment's record `trained`."""
    if parts := exchanged(trained.get("base_model", {}), base):
        raise ValueError(
            f"{settings.output.root} was begun with another {parts[0]} than {settings.model.name} has now, so images cannot "
            "be compared. Put the old one back, or say where the old model is by --config.pretrained.model."
        )


def warn_of_other_settings(settings: Settings, trained: Mapping[str, Any]) -> None:
    """Log a warning if the reward or training's sampler differ from `trained`, the experiment's recorded configuration."""
    compared = {"reward": (settings.rewards.description, describe_reward(trained["reward"]))}
    for key in ("num_steps", "eta", "guidance_scale", "sde"):
        here = getattr(settings.sampling, key)
        compared[f"sample.{key}"] = (here, trained["sample"].get(key, here))
    other = [f"{name} is {here}, in training it was {there}" for name, (here, there) in compared.items() if here != there]
    if other:
        logger.warning("eval: %s; leave out these flags to judge as in training", "; ".join(other))


def named_samplers(settings: Settings, names: Sequence[str]) -> dict[str, SamplerSettings]:
    """The samplers by name, `training` or `deployed`; a ValueError for another name."""
    for name in names:
        check_choice("--sampler", name, SAMPLERS)
    return {name: SAMPLERS[name](settings) for name in names}


def every_checkpoint(root: Path) -> list[str]:
    """The names of the base and of each trained stage of the experiment in folder `root`."""
    return ["base", *(f"stage{stage.index}" for stage in finished_stages(root, "train"))]


def require_different(lora: Path, *, same: bool) -> None:
    """Raise a ValueError if a LoRA that has had updates draws the `same` images as the base: it was not applied.

    If it is still as fresh ones are, the images have to be the same, and the log says why that can be.
    """
    state = read_state(lora)
    if not (same and state and state["num_updates"]):
        return
    if is_fresh(lora):
        logger.warning(
            "%s has had %d updates and is still the base model: none of them moved a weight, as with train.learning_rate=0 "
            "or advantages of 0",
            lora, state["num_updates"],
        )  # fmt: skip
        return
    raise ValueError(
        f"{lora} has had {state['num_updates']} updates and draws exactly the base model's images: it is damaged, was not "
        "applied, or is too small to change a pixel (train.learning_rate). Run its stage's training again, or report this."
    )


def is_fresh(lora: Path) -> bool:
    """Whether a LoRA is as before its first update: all second factors, B, are 0, and no first one, A, is."""
    weights = files.read_tensors(lora)
    second = {name for name in weights if re.search(r"lora_B|lora[._]up", name)}
    return bool(second) and all(bool(value.any()) != (name in second) for name, value in weights.items())


def named_scorers(settings: Settings) -> list[str]:
    """The names of the rewards that score every image: those trained on, those watched, and the judge.

    Not `file`, the scores that people or another program have made: there are none for new images.
    """
    named = (*settings.rewards.weights, *settings.rewards.watched, settings.judging.judge)
    return [name for name in dict.fromkeys(named) if name not in ("", "file")]


def result_folder(root: Path, checkpoint: str, lora: Path | None, set_name: str, conditions: str) -> Path:
    """The folder of one evaluation: checkpoint and prompt set for people, and a checksum that identifies it."""
    digest = identity(conditions, files.sha256(lora) if lora else "")
    # A LoRA from elsewhere is called by its path, which is no name for a folder.
    label = lora.stem if lora and stage_of(checkpoint) is None else checkpoint.replace("/", "-")
    return root / "eval" / f"{label}_{Path(set_name).stem}_{digest}"


def images_sha256(folder: Path) -> str | None:
    """The checksum of a result's images; None if there is no result, or it cannot be read: only its own turn mends it."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return files.read_json(folder / "result.json")["images_sha256"]
    return None


def is_whole(folder: Path) -> bool:
    """Whether a folder of `result_folder` holds a result that can be read back: result.json and its pictures.

    The log names what is damaged or missing; the result is then made again. A result without any picture is whole: they may
    have been deleted to save room.
    """
    path = folder / "result.json"
    if not path.is_file():
        return False
    try:
        pictures = [folder / f"{n:05d}.png" for n in range(files.read_json(path)["n_images"])]
        broken = [picture for picture in pictures if not files.is_whole_png(picture)]
        if broken and any(picture.exists() for picture in pictures):
            raise ValueError(f"{broken[0]} is missing or cut off")
    except (ValueError, LookupError, TypeError) as error:
        logger.warning("%s; this evaluation is made again", str(error).split(" Delete ")[0].rstrip("."))
        return False
    return True


def load_checkpoint(settings: Settings, accelerator: Accelerator, lora: Path | None) -> Model:
    """Load the policy to judge: the base model with the LoRA of a checkpoint, or without one for None."""
    model = load_policy(settings.model, accelerator, lora, seed=settings.schedule.seed, compile=settings.compute.compile)
    model.network = accelerator.prepare_model(model.network, evaluation_mode=True)
    return model


def prompt_images(settings: Settings, checkpoint: str, prompt: str, sampler: SamplerSettings) -> dict[str, Tensor]:
    """Images uint8 [N,H,W,3] of one prompt on the same noise, by name: by `base`, and by the checkpoint if it is another."""
    if not prompt.strip():
        raise ValueError("--prompt is empty; give it the text to draw")
    root = settings.output.root
    lora = resolve_checkpoint(root, checkpoint)
    model = load_checkpoint(settings, make_accelerator(settings.compute, shared=False), lora)
    warn_of_cut_prompts(model, [("--prompt", prompt)])
    prompts = [prompt] * NUM_DRAWN
    if lora is None:
        return {"base": sample_images(settings, model, prompts, sampler, 0)}
    return dict(zip(("base", checkpoint_name(root, lora)), draw_both(settings, model, lora, prompts, sampler), strict=True))


def draw_both(
    settings: Settings, model: Model, lora: Path, prompts: list[str], sampler: SamplerSettings
) -> tuple[Tensor, Tensor]:
    """Images uint8 [N,H,W,3] on the same noise by the base and by `model` with its LoRA. A ValueError if they are equal."""
    with model.base_policy():
        base = sample_images(settings, model, prompts, sampler, 0)
    tuned = sample_images(settings, model, prompts, sampler, 0)
    require_different(lora, same=torch.equal(base, tuned))
    return base, tuned
