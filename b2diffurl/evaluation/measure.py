"""Judge the base model and checkpoints on prompt files, with noise that is the same for all of them.

N images, one prompt each: the file's prompts in turn; E features an image
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from b2diffurl.configuration.limits import check_choice
from b2diffurl.configuration.prompts import batch_prompts, named_prompts
from b2diffurl.configuration.settings import SamplerSettings, Settings, describe_reward
from b2diffurl.evaluation.features import Features, check_features, features_identity, load_features
from b2diffurl.evaluation.generate import SAMPLERS, sample_images
from b2diffurl.evaluation.statistics import add_differences, summarise, summarise_diversity
from b2diffurl.experiment.checkpoints import read_state
from b2diffurl.experiment.evaluation_table import describe, record
from b2diffurl.experiment.folder import checkpoint_name, relative_to, resolve_checkpoint, stage_of
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
    score,
)
from b2diffurl.rewards.mixture import Scales, recorded_scales
from b2diffurl.runtime import files
from b2diffurl.runtime.device import make_accelerator
from b2diffurl.runtime.logs import logger, progress

RESULT_FORMAT = 3  # counts up when result.json holds something new, so that older ones are made again
NUM_DRAWN = 6  # images of one prompt, or to see whether two models differ

Result = dict[str, Any]


def evaluate(
    settings: Settings, checkpoints: Sequence[str], prompt_sets: Sequence[str], samplers: Mapping[str, SamplerSettings]
) -> list[Result]:
    """Judge every checkpoint on every prompt set with every sampler; one result each, base first if asked for.

    A checkpoint is `base`, `last` (the experiment's newest), `stage<i>`, `stage<i>/checkpoint_<n>`, or the path of a LoRA. A
    prompt set is `train`, `test`, or a prompt file. What has been judged before is read back, not redone. Where `base` is
    among the checkpoints the others carry their paired difference to it. Each result becomes a row of the experiment's
    eval.jsonl.
    """
    root = settings.output.root
    loras = [resolve_checkpoint(root, name) for name in sorted(checkpoints, key=lambda name: name != "base")]
    evaluation = prepare(settings, prompt_sets, [lora for lora in loras if lora])
    results: list[Result] = []
    for lora in dict.fromkeys(loras):
        results += evaluation.of_checkpoint(lora, samplers)
        add_differences(results)
        record(root, results)  # now, so that a later checkpoint's failure loses nothing
    for result in results:
        logger.info("eval %s", describe(result))
    return results


def prepare(settings: Settings, prompt_sets: Sequence[str], loras: Sequence[Path]) -> "Evaluation":
    """Refuse what cannot be judged, before any work."""
    root, scorers = settings.output.root, named_scorers(settings)
    scales = recorded_scales(root) if settings.rewards.standardise else None
    if settings.rewards.standardise and not scales:
        raise ValueError(f"reward.standardise takes its scale from the first stage; {root} has none selected with it")
    placed = {name: named_prompts(settings.prompts, name) for name in prompt_sets}
    everything = [prompt for some in placed.values() for _, prompt in some]
    check_rewards(scorers, settings.rewards, everything)
    for name in settings.judging.diversity:
        check_features(name, settings.judging, settings.rewards, everything)
    fingerprint = base_fingerprint(settings.model)
    for lora in loras:
        check_base(lora, settings.model, fingerprint)
    if (root / "config.json").is_file():
        warn_of_other_settings(settings, files.read_json(root / "config.json")["config"])
    accelerator = make_accelerator(settings.compute, shared=False)
    return Evaluation(settings, placed, scorers, scales, fingerprint, accelerator)


@dataclass
class Evaluation:
    """What the evaluations of one call share; models are loaded when something is left to judge."""

    settings: Settings
    placed: dict[str, list[tuple[str, str]]]  # (where it stands, prompt) of each prompt set
    scorers: list[str]  # the rewards that score every image
    scales: Scales | None
    fingerprint: str  # of the base model
    accelerator: Accelerator
    warned: set[str] = field(default_factory=set)  # prompt sets whose prompts that the model cuts have been named

    @cached_property
    def rewards(self) -> dict[str, Reward]:
        device = self.accelerator.device
        return {name: load_reward(name, self.settings.rewards, device) for name in self.scorers}

    @cached_property
    def features(self) -> dict[str, Features]:
        judging, rewards, device = self.settings.judging, self.settings.rewards, self.accelerator.device
        return {name: load_features(name, judging, rewards, device, self.rewards) for name in judging.diversity}

    def of_checkpoint(self, lora: Path | None, samplers: Mapping[str, SamplerSettings]) -> list[Result]:
        """The results of one checkpoint, the base model for None: read back where there are some, else made."""
        root, model, results = self.settings.output.root, None, []
        checkpoint = checkpoint_name(root, lora)
        for name, placed in self.placed.items():
            prompts = [prompt for _, prompt in placed]
            for sampler, chosen in samplers.items():
                under = self.conditions(chosen, prompts)
                folder = result_folder(root, checkpoint, lora, name, under)
                base = result_folder(root, "base", None, name, under) / "result.json"
                if not (folder / "result.json").is_file():
                    model = model or load_judged(self.settings, self.accelerator, lora)
                    if lora and not base.is_file():  # there is nothing to compare the images with, so draw some
                        draw_both(self.settings, model, lora, batch_prompts(prompts, NUM_DRAWN, 0, None), chosen)
                    self.warn_of_cut_prompts(model, name)
                    num_images = self.settings.judging.num_images
                    logger.info("eval %s on %s prompts, %s sampler: %d images", checkpoint, name, sampler, num_images)
                    self.measure(model, prompts, chosen, folder)
                facts = {"checkpoint": checkpoint, "stage": stage_of(checkpoint), "prompts": name, "sampler": sampler}
                facts |= {"lora": relative_to(root, lora) if lora else "", "conditions": under} | vars(chosen)
                results.append(facts | {"folder": relative_to(root, folder)} | files.read_json(folder / "result.json"))
                if lora and base.is_file():
                    same = results[-1]["images_sha256"] == files.read_json(base)["images_sha256"]
                    require_different(lora, same=same)
        return results

    def conditions(self, chosen: SamplerSettings, prompts: list[str]) -> str:
        """A checksum of what decides the numbers beside the checkpoint.

        Left out are the number of threads, which moves results by rounding, and this package's own code.
        """
        rewards, judging, model = self.settings.rewards, self.settings.judging, self.settings.model
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
            self.fingerprint,
            model.resolution,
        ]
        return files.digest([vars(chosen), prompts, *decisive])

    def warn_of_cut_prompts(self, model: Model, name: str) -> None:
        """Once a prompt set."""
        if name not in self.warned:
            warn_of_cut_prompts(model, self.placed[name])
            self.warned.add(name)

    def measure(self, model: Model, prompts: list[str], chosen: SamplerSettings, folder: Path) -> None:
        """Sample, score, and write every image and, last, result.json with its values."""
        judging = self.settings.judging
        found: dict[str, list[tuple[Tensor, Parts]]] = {key: [] for key in self.rewards}
        features: dict[str, list[Tensor]] = {key: [] for key in self.features}
        pixels = hashlib.sha256()
        for batch in progress(range(math.ceil(judging.num_images / judging.batch_size)), "eval"):
            start = batch * judging.batch_size
            count = min(judging.batch_size, judging.num_images - start)  # the last batch is filled up, and cut
            some_prompts = batch_prompts(prompts, judging.batch_size, batch, None)
            images = sample_images(self.settings, model, some_prompts, chosen, batch)
            for n, image in enumerate(images[:count]):
                files.write_image(folder / f"{start + n:05d}.png", image)
                pixels.update(image.numpy().tobytes())
            for key, reward in self.rewards.items():
                with noting(f"reward {key}, batch {batch}: images {start} to {start + count - 1} of the evaluation"):
                    found[key].append(score(reward, images, some_prompts, count))
                require_finite(key, found[key][-1][0], f"of batch {batch}, prompts {some_prompts[:3]} …")
            for key, feature in self.features.items():
                features[key].append(feature.embed(images, some_prompts)[:count])
        summary = self.summarise(prompts, found, features)
        files.write_record(folder / "result.json", summary | {"images_sha256": pixels.hexdigest()})

    def summarise(
        self, prompts: list[str], found: dict[str, list[tuple[Tensor, Parts]]], features: dict[str, list[Tensor]]
    ) -> Result:
        """Means, errors, values and diversity from the batches of every reward and of all features."""
        judging = self.settings.judging
        asked = batch_prompts(prompts, judging.num_images, 0, None)
        named = {part: numbers for key, batches in found.items() for part, numbers in by_name(key, *join(batches)).items()}
        values = {part: numbers for part, numbers in named.items() if isinstance(numbers, Tensor)}
        summary = summarise(self.settings.rewards, judging.judge, values, self.scales, asked, len(prompts))
        right = summary["values"].get("accuracy")
        summary["diversity"] = {
            key: summarise_diversity(torch.cat(parts), asked, right, self.features[key].metric)
            for key, parts in features.items()
        }
        return summary


def warn_of_other_settings(settings: Settings, trained: Mapping[str, Any]) -> None:
    """Name what of the reward and of the training sampler is not as in the experiment's recorded configuration `trained`."""
    found = {"reward": (settings.rewards.description, describe_reward(trained["reward"]))}
    for key in ("num_steps", "eta", "guidance_scale"):
        found[f"sample.{key}"] = (getattr(settings.sampling, key), trained["sample"][key])
    other = [f"{name} is {here}, in training it was {there}" for name, (here, there) in found.items() if here != there]
    if other:
        logger.warning("eval: %s; unless you mean that, leave it out, and it is as in training", "; ".join(other))


def named_samplers(settings: Settings, names: Sequence[str]) -> dict[str, SamplerSettings]:
    """The samplers of those names; a ValueError lists what there is."""
    for name in names:
        check_choice("--sampler", name, SAMPLERS)
    return {name: SAMPLERS[name](settings) for name in names}


def every_checkpoint(root: Path) -> list[str]:
    """The base and each trained stage of the experiment in folder `root`."""
    return ["base", *(f"stage{stage.index}" for stage in finished_stages(root, "train"))]


def require_different(lora: Path, *, same: bool) -> None:
    """A checkpoint that was updated draws other pictures than the base; if it is the `same` ones, it was not applied."""
    state = read_state(lora)
    if same and state and state["num_updates"]:
        raise ValueError(
            f"{lora} has had {state['num_updates']} updates and draws exactly the base model's images: it is damaged, "
            "or was not applied. Run its stage's training again, or report this."
        )


def named_scorers(settings: Settings) -> list[str]:
    """The rewards that score every image: those trained on, those watched, and the judge.

    `file` is not among them: it has no scores for new images.
    """
    named = (*settings.rewards.weights, *settings.rewards.watched, settings.judging.judge)
    return [name for name in dict.fromkeys(named) if name not in ("", "file")]


def result_folder(root: Path, checkpoint: str, lora: Path | None, name: str, under: str) -> Path:
    """Where one evaluation lies: its name says what, a checksum of the conditions and of the LoRA says which."""
    digest = files.digest([under, files.sha256(lora) if lora else ""])
    label = lora.stem if lora and stage_of(checkpoint) is None else checkpoint.replace("/", "-")
    return root / "eval" / f"{label}_{Path(name).stem}_{digest}"


def load_judged(settings: Settings, accelerator: Accelerator, lora: Path | None) -> Model:
    """The policy of a checkpoint, the base model for None."""
    model = load_policy(settings.model, accelerator, lora, seed=settings.schedule.seed, compile=settings.compute.compile)
    model.network = accelerator.prepare_model(model.network, evaluation_mode=True)
    return model


def prompt_images(settings: Settings, checkpoint: str, prompt: str, chosen: SamplerSettings) -> dict[str, Tensor]:
    """Images uint8 [N,H,W,3] of one prompt by `base` and by the checkpoint, if that is another, on the same noise."""
    if not prompt.strip():
        raise ValueError("--prompt is empty; give it the text to draw")
    root = settings.output.root
    lora = resolve_checkpoint(root, checkpoint)
    model = load_judged(settings, make_accelerator(settings.compute, shared=False), lora)
    warn_of_cut_prompts(model, [("--prompt", prompt)])
    asked = [prompt] * NUM_DRAWN
    if lora is None:
        return {"base": sample_images(settings, model, asked, chosen, 0)}
    return dict(zip(("base", checkpoint_name(root, lora)), draw_both(settings, model, lora, asked, chosen), strict=True))


def draw_both(
    settings: Settings, model: Model, lora: Path, prompts: list[str], chosen: SamplerSettings
) -> tuple[Tensor, Tensor]:
    """Images uint8 [N,H,W,3] on the same noise by the base and by the LoRA that `model` carries, which must differ."""
    with model.base_policy():
        base = sample_images(settings, model, prompts, chosen, 0)
    tuned = sample_images(settings, model, prompts, chosen, 0)
    require_different(lora, same=torch.equal(base, tuned))
    return base, tuned
