"""A configuration as values: one frozen dataclass for each concern.

Configuration keys keep the names of the paper's repository (`split_time`, `train.eps`). The fields here have the names that
are usual in the literature (num_branches, clip_range). Only the read_* functions below know both. Code below the phases
takes these dataclasses, or plain values, and never the configuration itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from b2diffurl.algorithm.seeding import stable_seed
from b2diffurl.algorithm.tree import Tree
from b2diffurl.algorithm.window import Window
from b2diffurl.objectives import OBJECTIVES, Objective
from b2diffurl.runtime.device import Compute

CURRICULA = ("progressive", "fixed", "reversed", "random", "early", "sliding")


@dataclass(frozen=True)
class LoraSettings:
    """The LoRA that is trained."""

    rank: int
    mlp: bool = False  # whether it is on the MLPs, too, and not on attention alone


@dataclass(frozen=True)
class ModelSettings:
    """The base model, and the LoRA on it."""

    family: str  # a name in b2diffurl.models.FAMILIES; auto: recognised by the model's files
    name: str  # hub id, directory, or a single .safetensors file
    revision: str
    variant: str
    config: str  # if `name` is a single file: a model from which the configs of its parts are taken; "": the family's first
    resolution: int  # pixels; 0: the model's own
    lora: LoraSettings
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # entries that count as if the model's scheduler had them
    offload: bool = False  # whether text encoders lie in main memory while they have nothing to encode
    max_sequence_length: int = -1  # text tokens from T5 or Qwen, for flow matching; -1: as many as its pipeline takes


@dataclass(frozen=True)
class Schedule:
    """Which LoRA a run starts from, and which steps each stage trains (arXiv 2503.11240, section 4.1)."""

    num_stages: int  # M
    num_steps: int  # T, sampler steps
    curriculum: str  # one of CURRICULA
    left: int  # L, S of the first stage
    right: int  # R, S of the last stage
    given: int  # S of this call, instead of the curriculum's; 0: by the curriculum
    stop: int  # the step at which windows that train backward from the image end; 0: the last
    seed: int  # of the experiment
    initial_lora: str = ""  # LoRA to start from, as `resume.resume_source` says; "": a fresh one

    def window(self, index: int) -> Window:
        """The steps that stage `index` trains.

        early: the first S steps
        sliding: S steps, the first ones in the first stage, the last ones in the last stage (MixGRPO, arXiv 2507.21802)
        others: from S steps before the image on, up to `stop`
        """
        size = self.size(index)
        match self.curriculum:
            case "early":
                return Window(0, size)
            case "sliding":
                start = self.moved(index, self.num_steps - size)
                return Window(start, start + size)
        return Window(self.num_steps - size, self.stop or self.num_steps)

    def moved(self, index: int, end: int) -> int:
        """A position that goes evenly from 0 in the first stage to `end` in the last one."""
        index, last = min(index, self.num_stages - 1), max(1, self.num_stages - 1)  # the index may lie beyond num_stages
        # Each position holds for as many stages as any other. Where they are more than the stages, some are left out.
        return max(index * (end + 1) // self.num_stages, index * end // last)

    def size(self, index: int) -> int:
        """S of stage `index`, in left..right.

        progressive, early: S = left + floor(index (right - left + 1) / num_stages), as in the paper
        reversed: the same from right down to left
        fixed, sliding: always left
        random: uniform in left..right, from a hash of (seed, stage)
        """
        if self.given:
            return self.given
        grown = index * (self.right - self.left + 1) // self.num_stages
        grown = min(grown, self.right - self.left)  # the index may lie beyond num_stages
        match self.curriculum:
            case "progressive" | "early":
                return self.left + grown
            case "reversed":
                return self.right - grown
            case "fixed" | "sliding":
                return self.left
            case "random":
                return self.left + stable_seed(self.seed, index, "curriculum") % (self.right - self.left + 1)
        raise ValueError(f"unknown curriculum {self.curriculum!r}; known: {', '.join(CURRICULA)}")


@dataclass(frozen=True)
class PromptSources:
    """Where prompts come from."""

    train_file: str
    one_prompt: str  # the only training prompt, instead of the file; "": use the file
    held_out_file: str  # "": there are none, and checkpoints are judged on the training prompts
    at_random: bool  # whether prompts are drawn at random; otherwise in the order of the file

    def meant(self, name: str) -> str:
        """The prompt set that is meant by `name`: where no prompts are held out, `test` means `train`."""
        return "train" if name == "test" and not self.held_out_file else name


@dataclass(frozen=True)
class Outside:
    """The sampler steps that are not trained."""

    prefix_eta: float  # eta of the steps before the window; below 0: that of the window
    suffix_eta: float  # eta of the steps after the window; below 0: that of the window
    num_suffix_steps: int  # so many steps are taken after the window at most; 0: all


@dataclass(frozen=True)
class SamplerSettings:
    """A sampler."""

    num_steps: int
    eta: float | None  # noise level: 1 is fully stochastic; None: the scheduler has no eta
    guidance_scale: float
    scheduler: str = ""  # name of a diffusers class; "": the sampler whose steps are trained
    sde: str = ""  # of a flow-matching model's steps, a name in algorithm.flow.SDES; "": the sampler has no such choice

    @property
    def facts(self) -> dict[str, Any]:
        """All that decides its images, by name. Results of earlier versions have no entry `sde`."""
        return {key: value for key, value in vars(self).items() if key != "sde" or value}


@dataclass(frozen=True)
class Sampling:
    """How a stage's images are sampled. A batch has num_groups * num_branches images."""

    num_groups: int  # G, groups in a batch; a group has one prompt
    num_batches: int  # batches in a stage, over all processes
    tree: Tree  # in which the images of a group part
    shared_prefix: bool  # siblings are branches of one prefix; otherwise each starts from noise of its own
    sampler: SamplerSettings  # with eta as in the trained window
    outside: Outside  # the steps before and after the window
    micro_batch_size: int  # images the network sees at once; 0: the whole batch
    decode_batch_size: int  # latents decoded at once

    @property
    def num_branches(self) -> int:
        """K, images in a group (siblings)."""
        return self.tree.num_leaves

    @property
    def num_steps(self) -> int:
        """T, sampler steps."""
        return self.sampler.num_steps

    @property
    def eta(self) -> float:
        return self.sampler.eta

    @property
    def guidance_scale(self) -> float:
        return self.sampler.guidance_scale

    @property
    def sde(self) -> str:
        return self.sampler.sde


@dataclass(frozen=True)
class Rewards:
    """The rewards that are trained on, and those that are only watched."""

    weights: Mapping[str, float]  # name -> weight of each reward trained on; without a mixture one name with weight 1
    mixed: bool  # whether the weights were given as a mixture
    combine: str  # a mixture's rewards are added up as they are (sum), or each normalised by its prompt first (advantages)
    standardise: bool  # whether a mixture's rewards are first standardised, by their mean and deviation in the first stage
    watched: tuple[str, ...]  # rewards that are scored and logged, never trained on
    dtype: str  # of reward models: auto | float32 | float16 | bfloat16
    batch_size: int  # images scored at once
    num_workers: int  # threads that read images ahead of the scorer
    own: Mapping[str, Mapping[str, Any]]  # name of a reward -> its own settings

    @property
    def made_elsewhere(self) -> bool:
        """Whether the run has to wait for scores from people or another program (reward `file`)."""
        return "file" in (*self.weights, *self.watched)

    @property
    def description(self) -> str:
        """The reward for people to read: `clip`, or for a mixture `1 clip + 0.1 aesthetic`."""
        return describe_mixture(self.weights) if self.mixed else next(iter(self.weights))


@dataclass(frozen=True)
class Selection:
    """How rewards become advantages, and which images are trained on (arXiv 2503.11240, section 4.2)."""

    which: str  # pairs: a group's best and worst image, if they pass the thresholds | all: every image
    baseline: str  # the mean that is subtracted from a reward: of its prompt | of its group
    pos_threshold: float  # the best is kept if its normalised reward is at least this
    neg_threshold: float  # the worst is kept if its normalised reward is below this
    num_history_stages: int  # earlier stages whose rewards count in a prompt's mean and deviation
    max_advantage: float  # advantages are clamped to +- this
    positive_weight: float  # factor of positive advantages
    negative_weight: float  # factor of negative advantages

    @property
    def thresholds(self) -> dict[str, float]:
        """The two thresholds as keyword arguments of `selection.select_pairs`."""
        return {"pos_threshold": self.pos_threshold, "neg_threshold": self.neg_threshold}


@dataclass(frozen=True)
class Optimizer:
    """AdamW's settings, and the average of the LoRAs that it makes."""

    learning_rate: float  # in the first stage
    final_rate: float  # factor of it in the last stage
    betas: tuple[float, float]
    weight_decay: float
    epsilon: float
    use_8bit: bool  # bitsandbytes' AdamW
    max_grad_norm: float  # gradients are clipped to this norm
    ema: float  # decay per update of the LoRA's exponential average; 0: there is none

    def rate(self, index: int, num_stages: int) -> float:
        """The learning rate of stage `index`: it falls evenly to `final_rate` of the first stage's in the last one of M."""
        done = min(index / max(1, num_stages - 1), 1)  # the index may lie beyond num_stages
        return self.learning_rate * (1 - done * (1 - self.final_rate))


@dataclass(frozen=True)
class TrainedSteps:
    """Which of a window's steps an update uses, and how much each counts."""

    fraction: float  # of a trajectory's S trained steps
    weight: str  # of a step in the loss: none | leverage | sigma
    num_noise_levels: int  # for an objective on noised images: copies of an image in an update, each of another level


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance in training."""

    scale: float
    unconditional_gradient: bool  # whether the unconditional half is differentiated


@dataclass(frozen=True)
class Training:
    """How the LoRA is updated."""

    objective: Objective  # with its options
    max_first_log_ratio: float  # warn if |log-ratio| exceeds this in a stage's first update, where it should be about 0
    optimizer: Optimizer
    num_epochs: int  # passes over the selected trajectories of a stage
    num_trajectories: int  # in one update
    steps: TrainedSteps
    guidance: Guidance
    micro_batch_size: int  # transitions the network sees at once
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Judging:
    """How checkpoints are judged."""

    judge: str  # the reward whose mean is reported as accuracy; "": none
    diversity: tuple[str, ...]  # features whose diversity is measured; names in b2diffurl.evaluation.features
    inception_model: str  # image classifier of the Inception Score
    num_images: int  # for each prompt set
    batch_size: int  # images generated at once
    seed: int  # of the evaluation noise
    every: int  # evaluate on held-out prompts after every so many stages; 0: only at the end of the run
    # As given: its class may lack the ending `Scheduler`, or be "" for the family's own; guidance_scale 0: training's
    deployed: SamplerSettings

    def due(self, index: int) -> bool:
        """Whether a run judges stage `index` as soon as it is trained."""
        return self.every > 0 and (index + 1) % self.every == 0


@dataclass(frozen=True)
class Output:
    """Where an experiment's files go, which of them are kept, and which trackers follow it."""

    name: str  # of the experiment
    save_path: str  # the folder of all experiments
    log_path: str  # the folder of all logs
    preset: str  # name of the preset
    save_interval: int  # epochs from one checkpoint to the next
    keep_samples: bool  # whether trajectories stay after training
    keep_images: int  # images kept of each stage; below 0: all
    keep_eval_images: int  # newest judged stages whose images are kept; below 0: all
    trackers: tuple[str, ...]  # wandb, tensorboard
    wandb_mode: str  # offline | online

    @property
    def root(self) -> Path:
        """The experiment's folder."""
        return Path(self.save_path) / self.name


@dataclass(frozen=True)
class Settings:
    """A whole configuration."""

    compute: Compute
    model: ModelSettings
    schedule: Schedule
    prompts: PromptSources
    sampling: Sampling
    rewards: Rewards
    selection: Selection
    training: Training
    judging: Judging
    output: Output

    @property
    def guidance_scales(self) -> dict[str, float]:
        """{key: the scale of guidance} of sampling, of training and of the sampler that users will take."""
        sampled, deployed = self.sampling.guidance_scale, self.judging.deployed.guidance_scale
        return {
            "sample.guidance_scale": sampled,
            "train.guidance_scale": self.training.guidance.scale,
            "eval.deployed.guidance_scale": deployed or sampled,
        }


def read_settings(config: Mapping[str, Any]) -> Settings:
    """The values of a configuration. Call `rules.check` first: nothing is checked here."""
    return Settings(
        compute=read_compute(config),
        model=read_model(config["pretrained"], config["train"]),
        schedule=read_schedule(config),
        prompts=PromptSources(
            train_file=config["prompt_file"],
            one_prompt=config["prompt"],
            held_out_file=config["eval"]["prompt_file"],
            at_random=bool(config["prompt_random_choose"]),
        ),
        sampling=read_sampling(config),
        rewards=read_rewards(config["reward"], tuple(filter(None, (config["prompt_file"], config["eval"]["prompt_file"])))),
        selection=read_selection(config["selection"], config["train"]),
        training=read_training(config["train"], config["sample"]["guidance_scale"]),
        judging=read_judging(config["eval"]),
        output=read_output(config),
    )


def read_compute(config: Mapping[str, Any]) -> Compute:
    return Compute(
        dev_id=config["dev_id"],
        mixed_precision=config["mixed_precision"],
        allow_tf32=config["allow_tf32"],
        compile=config["compile"],
        num_threads=config["num_threads"],
        num_processes=config["num_processes"],
    )


def read_schedule(config: Mapping[str, Any]) -> Schedule:
    return Schedule(
        num_stages=config["stage_cnt"],
        num_steps=config["sample"]["num_steps"],
        curriculum=config["curriculum"],
        left=config["split_step_left"],
        right=config["split_step_right"],
        given=config["split_step"],
        stop=config["split_stop"],
        seed=config["seed"],
        initial_lora=config["resume_from"],
    )


def read_sampling(config: Mapping[str, Any]) -> Sampling:
    sample = config["sample"]
    sampler = SamplerSettings(**{key: sample[key] for key in ("num_steps", "eta", "guidance_scale", "scheduler", "sde")})
    return Sampling(
        num_groups=sample["batch_size"],
        num_batches=sample["num_batches_per_epoch"],
        tree=read_tree(config),
        shared_prefix=config["sampling"] == "branch",
        sampler=sampler,
        outside=Outside(sample["prefix_eta"], sample["suffix_eta"], sample["suffix_steps"]),
        micro_batch_size=sample["micro_batch_size"],
        decode_batch_size=sample["decode_batch_size"],
    )


def read_tree(keys: Mapping[str, Any]) -> Tree:
    """The tree in which the images of a group part, from the keys at the top of a configuration."""
    return Tree(tuple(keys["split_times"]) or (keys["split_time"],), tuple(keys["split_after"]))


def read_selection(selection: Mapping[str, Any], train: Mapping[str, Any]) -> Selection:
    """From the sections `selection` and `train`, where the paper's repository keeps the rest."""
    return Selection(
        which=selection["images"],
        baseline=selection["advantage"],
        pos_threshold=selection["pos_threshold"],
        neg_threshold=selection["neg_threshold"],
        num_history_stages=selection["history_cnt"],
        max_advantage=train["adv_clip_max"],
        positive_weight=train["beta1"],
        negative_weight=train["beta2"],
    )


def read_judging(evaluation: Mapping[str, Any]) -> Judging:
    deployed = evaluation["deployed"]
    return Judging(
        judge=evaluation["judge"],
        diversity=tuple(evaluation["diversity"]),
        inception_model=evaluation["inception"]["model"],
        num_images=evaluation["num_images"],
        batch_size=evaluation["batch_size"],
        seed=evaluation["seed"],
        every=evaluation["every"],
        deployed=SamplerSettings(deployed["num_steps"], deployed["eta"], deployed["guidance_scale"], deployed["scheduler"]),
    )


def read_output(config: Mapping[str, Any]) -> Output:
    return Output(
        name=config["exp_name"],
        save_path=config["save_path"],
        log_path=config["log_path"],
        preset=config["preset"],
        save_interval=config["train"]["save_interval"],
        keep_samples=config["keep"]["samples"],
        keep_images=config["keep"]["images"],
        keep_eval_images=config["keep"]["eval_images"],
        trackers=tuple(config["track_with"]),
        wandb_mode=config["wandb_mode"],
    )


def read_model(pretrained: Mapping[str, Any], train: Mapping[str, Any]) -> ModelSettings:
    """From the sections `pretrained` and `train`, which may be those of an older config.json."""
    return ModelSettings(
        family=pretrained["family"],
        name=pretrained["model"],
        revision=pretrained["revision"],
        variant=pretrained["variant"],
        config=pretrained["config"],
        resolution=pretrained["resolution"],
        lora=LoraSettings(train["lora_rank"], train.get("lora_mlp", False)),
        scheduler=dict(pretrained.get("scheduler") or {}),  # older config.json files lack it, and the next two
        offload=pretrained.get("offload", False),
        max_sequence_length=pretrained.get("max_sequence_length", -1),
    )


def read_rewards(reward: Mapping[str, Any], prompt_files: tuple[str, ...] = ()) -> Rewards:
    """The section `reward` of a configuration. `prompt_files` are the run's: some say more of a prompt than its words."""
    # Every section but `weights` belongs to a reward. A ConfigDict is not a Mapping, so look for its method `keys`.
    own = {name: dict(section) for name, section in reward.items() if hasattr(section, "keys") and name != "weights"}
    if "compose" in own:  # not in a configuration of the user's own, made before there was this reward
        own["compose"]["prompt_files"] = prompt_files
    return Rewards(
        weights=reward_weights(reward),
        mixed=bool(reward["weights"]),
        combine=reward["combine"],
        standardise=reward["standardise"],
        watched=tuple(reward["watch"]),
        dtype=reward["dtype"],
        batch_size=reward["batch_size"],
        num_workers=reward["num_workers"],
        own=own,
    )


def read_training(train: Mapping[str, Any], guidance_scale: float) -> Training:
    """The section `train` of a configuration. `guidance_scale` is that of sampling."""
    objective = OBJECTIVES[train["objective"]]
    return Training(
        objective=replace(objective, options=objective.read_options(train)),
        max_first_log_ratio=train["eps"],
        optimizer=Optimizer(
            learning_rate=train["learning_rate"],
            final_rate=train["final_rate"],
            betas=(train["adam_beta1"], train["adam_beta2"]),
            weight_decay=train["adam_weight_decay"],
            epsilon=train["adam_epsilon"],
            use_8bit=train["use_8bit_adam"],
            max_grad_norm=train["max_grad_norm"],
            ema=train["ema"],
        ),
        num_epochs=train["num_epochs"],
        num_trajectories=train["batch_size"] * train["gradient_accumulation_steps"],
        steps=TrainedSteps(train["timestep_fraction"], train["step_weight"], train["noise_levels"]),
        guidance=Guidance(train["guidance_scale"] or guidance_scale, train["unconditional_gradient"]),
        micro_batch_size=train["micro_batch_size"],
        gradient_checkpointing=train["gradient_checkpointing"],
    )


def reward_weights(reward: Mapping[str, Any]) -> dict[str, float]:
    """{reward: weight} of what is trained on, from a section `reward`; one of weight 1 where it has no mixture."""
    return dict(reward.get("weights") or {reward["name"]: 1.0})


def describe_reward(reward: Mapping[str, Any]) -> str:
    """`Rewards.description` from the section `reward` of a config.json, which an earlier version may have written."""
    return describe_mixture(reward["weights"]) if reward.get("weights") else reward["name"]


def describe_mixture(weights: Mapping[str, float]) -> str:
    """A weighted sum for people to read: `1 clip + 0.1 aesthetic`."""
    return " + ".join(f"{weight:g} {name}" for name, weight in weights.items())


def combined_text(combine: str) -> str:
    """How a mixture's rewards are combined, to be said after the mixture; "" where they are added up as they are."""
    return {"sum": "", "advantages": ", each normalised by itself"}[combine]
