"""A row for every key of config/stage_process.py, in the same order: its allowed values, and whether it may change in an
experiment that has begun."""

import functools
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from b2diffurl.algorithm.flow import SDES
from b2diffurl.algorithm.transition import STEP_WEIGHTS
from b2diffurl.configuration.limits import (
    Choice,
    Counts,
    Entries,
    File,
    Folder,
    JsonObject,
    Limit,
    Mixture,
    ModelName,
    Name,
    Names,
    Number,
    Steps,
    Switch,
    Text,
    Unknown,
    check_value,
    shown,
)
from b2diffurl.configuration.settings import CURRICULA
from b2diffurl.objectives import OBJECTIVES
from b2diffurl.objectives.options import limits
from b2diffurl.runtime import paths

ALWAYS_THERE = object()  # every config.json has the key
HAD_NO_EFFECT = object()  # the key sets something that older experiments did not have, so they go on with any value


@dataclass(frozen=True)
class Key:
    """What is known of one key."""

    limit: Limit  # the allowed values
    may_change: bool = False  # whether an experiment may go on with another value; if not, config.json's value stays
    before: Any = ALWAYS_THERE  # for a key newer than some experiments: the value that acts as they did, or HAD_NO_EFFECT
    renamed_from: str = ""  # its name in the paper's repository or an earlier version, by which it may be given, too
    not_beside: tuple[
        str, ...
    ] = ()  # run_eval.py ignores config.json's value if the user gave one of these keys: they conflict


# Bounds far wider than any use. They refuse values that could only exhaust the memory or overflow float32.
COUNT, SIZE, SEED, WEIGHT = Number("[1, 1e9]"), Number("[0, 1e9]"), Number("[-2e18, 2e18]"), Number("[0, 1e6]")
STEPS, SWITCH, MODEL = Steps(), Switch(), ModelName()
TEXT, TEXT_OR_NONE, LINES = Text(), Text(may_be_empty=True), Text(may_have_lines=True)

# Paths may change, because prompts and base model are identified by their checksums. Batch sizes that only memory limits may
# change, too: another size moves results by rounding, and the same size gives the same bits.
KEYS = {
    # ---- the experiment ----
    "preset": Key(TEXT_OR_NONE, may_change=True),
    "exp_name": Key(Name(), may_change=True),
    "run_name": Key(TEXT, may_change=True),
    "seed": Key(SEED),
    "save_path": Key(Folder(), may_change=True),
    "log_path": Key(Folder(), may_change=True),
    "allow_config_change": Key(SWITCH, may_change=True),
    "num_processes": Key(Number("[0, 1e5]"), may_change=True),
    "dev_id": Key(Number("[0, 1023]"), may_change=True),
    "mixed_precision": Key(Choice(("auto", "no", "fp16", "bf16"))),
    "allow_tf32": Key(SWITCH),
    "compile": Key(SWITCH, may_change=True),
    "num_threads": Key(Number("[0, 1024]"), may_change=True),
    "track_with": Key(Names(("wandb", "tensorboard")), may_change=True, renamed_from="wandb"),
    "wandb_mode": Key(Choice(("offline", "online")), may_change=True),
    # ---- the schedule ----
    "stage_cnt": Key(Number("[1, 1e5]"), may_change=True),
    "curriculum": Key(Choice(CURRICULA), before="progressive"),
    "split_step_left": Key(STEPS),
    "split_step_right": Key(STEPS),
    "split_step": Key(STEPS, may_change=True),
    "split_stop": Key(STEPS, before=0),
    "resume_from": Key(File(may_be_empty=True), may_change=True),
    "split_time": Key(Number("[1, 1e4]")),
    "split_times": Key(Counts("[2, 1e4]"), before=[]),
    "split_after": Key(Counts("[1, 1000]"), before=[]),
    "sampling": Key(Choice(("branch", "independent")), before="branch"),
    # ---- prompts ----
    "prompt_file": Key(File(), may_change=True),
    "prompt": Key(Text(may_be_empty=True, may_have_lines=True), not_beside=("prompt_file",)),
    "prompt_random_choose": Key(Number("[0, 1]")),
    # ---- the base model ----
    "pretrained.family": Key(TEXT, may_change=True),  # the checksums of the model's parts tell one from another
    "pretrained.model": Key(MODEL, may_change=True),
    "pretrained.revision": Key(TEXT, may_change=True),
    "pretrained.variant": Key(TEXT_OR_NONE, may_change=True),
    "pretrained.config": Key(ModelName(may_be_empty=True), may_change=True),
    "pretrained.resolution": Key(Number("[0, 8192]")),
    "pretrained.scheduler": Key(Entries(), before=None),
    "pretrained.offload": Key(SWITCH, may_change=True),
    "pretrained.max_sequence_length": Key(Number("[-1, 512]"), before=-1),
    # ---- sampling ----
    "sample.num_steps": Key(Number("[1, 1000]")),
    "sample.eta": Key(Number("0 or [0.001, 1]", "0 is deterministic")),
    "sample.sde": Key(Choice(SDES), before=HAD_NO_EFFECT),
    "sample.prefix_eta": Key(Number("-1 or [0, 1]", "-1 is as sample.eta"), before=-1.0),
    "sample.suffix_eta": Key(Number("-1 or [0, 1]", "-1 is as sample.eta"), before=-1.0),
    "sample.suffix_steps": Key(Number("[0, 1000]"), before=0),
    "sample.scheduler": Key(TEXT_OR_NONE, before=""),
    "sample.guidance_scale": Key(Number("[1, 1000]", "1 is no guidance")),
    "sample.batch_size": Key(Number("[1, 1e5]")),
    "sample.num_batches_per_epoch": Key(Number("[1, 1e6]")),
    "sample.micro_batch_size": Key(SIZE, may_change=True),
    "sample.decode_batch_size": Key(COUNT, may_change=True),
    # ---- reward; settings of a reward that is not trained on may always change (recorded.unused_settings) ----
    "reward.name": Key(TEXT),
    "reward.weights": Key(Mixture(), before=None, not_beside=("reward.name",)),
    "reward.combine": Key(Choice(("sum", "advantages")), before="sum", not_beside=("reward.name", "reward.weights")),
    "reward.standardise": Key(SWITCH, before=False, not_beside=("reward.name", "reward.weights")),
    "reward.watch": Key(Names(), may_change=True),
    "reward.batch_size": Key(COUNT, may_change=True),
    "reward.num_workers": Key(Number("[1, 1024]"), may_change=True),
    "reward.dtype": Key(Choice(("auto", "float32", "float16", "bfloat16")), before="auto"),
    "reward.clip.model": Key(MODEL, renamed_from="reward.model"),
    "reward.pickscore.model": Key(MODEL),
    "reward.aesthetic.clip": Key(MODEL),
    "reward.aesthetic.head": Key(MODEL),
    "reward.bertscore.captioner": Key(MODEL),
    "reward.bertscore.question": Key(LINES),
    "reward.bertscore.max_new_tokens": Key(Number("[1, 1e5]")),
    "reward.bertscore.reference": Key(LINES),
    "reward.bertscore.scorer": Key(MODEL),
    "reward.bertscore.num_layers": Key(Number("[0, 1000]")),
    "reward.image_reward.model": Key(MODEL),
    "reward.hps_v2.model": Key(MODEL),
    "reward.vqascore.model": Key(MODEL),
    "reward.compose.detector": Key(MODEL),
    "reward.compose.clip": Key(MODEL),
    "reward.compose.metadata": Key(File(may_be_empty=True), may_change=True),  # known by its checksum
    "reward.compose.score": Key(Choice(("fraction", "all"))),
    "reward.compose.threshold": Key(Number("[0, 1]")),
    "reward.compose.count_threshold": Key(Number("[0, 1]")),
    "reward.compose.overlap": Key(Number("[0, 1]")),
    "reward.compose.margin": Key(Number("[0, 1]")),
    "reward.http.url": Key(TEXT_OR_NONE, may_change=True),
    "reward.http.timeout_sec": Key(Number("(0, 1e6]"), may_change=True),
    "reward.http.num_retries": Key(Number("[0, 20]"), may_change=True),
    "reward.vlm.url": Key(TEXT_OR_NONE, may_change=True),
    "reward.vlm.model": Key(TEXT_OR_NONE),
    "reward.vlm.score": Key(Choice(("yes", "rating"))),
    "reward.vlm.questions": Key(Names()),
    "reward.vlm.question_weights": Key(Names()),
    "reward.vlm.scale": Key(Counts("[-1000, 1000]")),
    "reward.vlm.max_tokens": Key(Number("[1, 1e5]"), may_change=True),
    "reward.vlm.unreadable": Key(Choice(("stop", "mean")), may_change=True),
    "reward.vlm.extra_body": Key(JsonObject()),
    "reward.vlm.concurrency": Key(Number("[1, 1024]"), may_change=True),
    "reward.vlm.timeout_sec": Key(Number("(0, 1e6]"), may_change=True),
    "reward.vlm.num_retries": Key(Number("[0, 20]"), may_change=True),
    # ---- selection ----
    "selection.history_cnt": Key(SIZE, renamed_from="eval.history_cnt"),
    "selection.advantage": Key(Choice(("prompt", "group")), before="prompt", renamed_from="eval.advantage"),
    "selection.images": Key(Choice(("pairs", "all")), before="pairs", renamed_from="eval.selection"),
    "selection.pos_threshold": Key(Number("[-1e9, 1e9]"), renamed_from="eval.pos_threshold"),
    "selection.neg_threshold": Key(Number("[-1e9, 1e9]"), renamed_from="eval.neg_threshold"),
    # ---- judging ----
    "eval.prompt_file": Key(File(may_be_empty=True), may_change=True),
    "eval.judge": Key(TEXT_OR_NONE, may_change=True),
    "eval.diversity": Key(Names(), may_change=True),
    "eval.inception.model": Key(MODEL, may_change=True),
    "eval.num_images": Key(Number("[1, 1e6]"), may_change=True),
    "eval.batch_size": Key(Number("[1, 1e6]"), may_change=True),
    "eval.seed": Key(SEED, may_change=True),
    "eval.every": Key(SIZE, may_change=True),
    "eval.deployed.scheduler": Key(TEXT_OR_NONE, may_change=True),
    "eval.deployed.num_steps": Key(Number("[1, 1000]"), may_change=True),
    "eval.deployed.eta": Key(Number("[0, 1]"), may_change=True),
    "eval.deployed.guidance_scale": Key(Number("0 or [1, 1000]", "0 is as in training"), may_change=True),
    # ---- training; the options of a single objective are declared beside its loss, in b2diffurl/objectives ----
    "train.objective": Key(Choice(tuple(OBJECTIVES))),
    "train.num_epochs": Key(Number("[1, 1e5]")),
    "train.batch_size": Key(COUNT),
    "train.gradient_accumulation_steps": Key(COUNT),
    "train.micro_batch_size": Key(COUNT, may_change=True),
    "train.gradient_checkpointing": Key(SWITCH, may_change=True),
    "train.timestep_fraction": Key(Number("(0, 1]"), before=1.0),
    "train.unconditional_gradient": Key(SWITCH, before=True),
    "train.learning_rate": Key(Number("[0, 1]")),
    "train.final_rate": Key(Number("(0, 1]"), before=1.0),
    "train.adam_beta1": Key(Number("[0, 1)")),
    "train.adam_beta2": Key(Number("[0, 1)")),
    "train.adam_weight_decay": Key(Number("[0, 100]")),
    "train.adam_epsilon": Key(Number("[1e-20, 1]")),
    "train.use_8bit_adam": Key(SWITCH),
    "train.max_grad_norm": Key(Number("(0, 1e12]")),
    "train.guidance_scale": Key(Number("0 or [1, 1000]", "0 is as in sampling, 1 is none"), before=0.0),
    "train.noise_levels": Key(Number("[1, 1000]"), before=HAD_NO_EFFECT),
    "train.ema": Key(Number("[0, 1)"), before=0.0),
    "train.beta1": Key(WEIGHT),
    "train.beta2": Key(WEIGHT),
    "train.adv_clip_max": Key(Number("(0, 1e6]")),
    "train.step_weight": Key(Choice(STEP_WEIGHTS)),
    "train.lora_rank": Key(Number("[1, 4096]")),
    "train.lora_mlp": Key(SWITCH, before=False),
    "train.save_interval": Key(COUNT),
    **{
        key: Key(Number(interval), before=HAD_NO_EFFECT)
        for key, interval in limits([objective.options for objective in OBJECTIVES.values()])
    },
    # ---- what stays on disk ----
    "keep.samples": Key(SWITCH, may_change=True),
    "keep.images": Key(Number("[-1, 1e9]"), may_change=True),
    "keep.eval_images": Key(Number("-1 or [1, 1e6]", "-1 is all"), may_change=True, before=-1),
}


TODAYS_NAME = {row.renamed_from: key for key, row in KEYS.items() if row.renamed_from}


def flatten(nested: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dict with keys such as `train.learning_rate`, each by today's name.

    A dict that is the value of one key, such as `reward.weights`, stays one value.
    """
    flat = {}
    for name, value in nested.items():
        key = TODAYS_NAME.get(f"{prefix}{name}", f"{prefix}{name}")
        # A mapping that is itself a key, such as reward.weights, is a value and no section.
        flat |= flatten(value, f"{key}.") if isinstance(value, Mapping) and key not in KEYS else {key: value}
    return flat


def by_todays_names(nested: Any) -> Any:
    """Give each key of nested sections, dicts or an unlocked ConfigDict, today's name alone, in place; returns them.

    A key may have the older name, too, or instead. A ValueError names two of the same key that have different values.
    """
    for older, key in TODAYS_NAME.items():
        *sections, name = older.split(".")
        section = functools.reduce(lambda outer, inner: outer.get(inner, {}), sections, nested)
        if name not in section:
            continue
        given = section[name]
        del section[name]
        *sections, name = key.split(".")
        section = functools.reduce(part_of, sections, nested)
        if name not in section:
            section[name] = given
        refuse_two_values(key, section[name], older, given)
    return nested


def part_of(outer: Any, name: str) -> Any:
    """The section of that name in another; an empty one is put there if there is none."""
    if name not in outer:
        outer[name] = {}
    return outer[name]


def refuse_two_values(key: str, value: Any, older: str, given: Any) -> None:
    """Raise a ValueError if a key and its older name have different values."""
    if value != given:
        raise ValueError(
            f"{key} is {shown(value)} and {older}, an older name of the same key, {shown(given)}; give one of them"
        )


def check_values(flat: Mapping[str, Any]) -> None:
    """Check each value on its own; a ValueError says what is allowed. Combinations of keys are checked in rules.py."""
    for fault in faulty_values(flat):
        raise fault


def faulty_values(flat: Mapping[str, Any]) -> Iterator[ValueError]:
    """A ValueError for each value that is not allowed."""
    for key, value in flat.items():
        try:
            check_value(key, value, KEYS[key].limit if key in KEYS else Unknown())
        except ValueError as fault:
            yield fault


def meant_paths(flat: Mapping[str, Any], given: Collection[str]) -> dict[str, str]:
    """The settings that are paths or models. Keys in `given` are looked for in the user's directory; the others keep the
    preset's path, with `~` replaced."""
    meant = {}
    for key, value in flat.items():
        limit = KEYS[key].limit if key in KEYS else None
        if isinstance(limit, (File, Folder, ModelName)) and isinstance(value, str):
            of_user = paths.user_model if isinstance(limit, ModelName) else paths.user_path
            meant[key] = of_user(value) if key in given else os.path.expanduser(value)
    return meant
