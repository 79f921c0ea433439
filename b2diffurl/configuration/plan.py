"""From a configuration to a plan: which stage, how many steps, from which checkpoint; and the experiment's identity.

Nothing here writes before everything is checked.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from b2diffurl.configuration.limits import flatten, shown
from b2diffurl.configuration.prompts import named_prompts
from b2diffurl.configuration.rules import check
from b2diffurl.configuration.settings import Schedule, Settings, read_settings
from b2diffurl.experiment.folder import experiment_folder, find_lora, relative_to
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger

# What may differ from call to call; everything else is the experiment and stays as config.json has it. Where things lie
# may change, too: the prompts and the base network are known by their checksums. So may what only memory limits, though it
# moves results by rounding; the same command gives the same bits.
VOLATILE = (
    "run_name", "split_step", "stage_cnt", "resume_from", "dev_id", "num_threads", "num_processes", "keep.samples",
    "keep.images", "allow_config_change",
    "preset", "track_with", "wandb_mode", "wandb", "exp_name", "save_path", "log_path", "prompt_file",
    "pretrained.model", "pretrained.revision", "pretrained.variant", "pretrained.config",
    "sample.micro_batch_size", "sample.decode_batch_size", "train.micro_batch_size", "reward.batch_size",
    "train.gradient_checkpointing", "compile",
    "reward.num_workers", "reward.watch", "reward.http.url", "reward.http.timeout_sec", "reward.http.num_retries",
    "eval.prompt_file", "eval.judge", "eval.diversity", "eval.num_images", "eval.batch_size", "eval.seed",
    "eval.inception.model", "eval.every",
    "eval.deployed.scheduler", "eval.deployed.num_steps", "eval.deployed.eta", "eval.deployed.guidance_scale",
)  # fmt: skip
# Keys that came later: what was done without them, so that an experiment begun before goes on; and those of new objectives.
ADDED = {
    "curriculum": "progressive", "sampling": "branch", "eval.selection": "pairs", "eval.advantage": "prompt",
    "sample.prefix_eta": -1.0, "train.timestep_fraction": 1.0, "train.unconditional_gradient": True,
    "reward.weights": None, "reward.standardise": False, "reward.dtype": "auto",
}  # fmt: skip
ADDED_UNUSED = ("train.kl_weight", "train.dpo_beta")
RENAMED = {"reward.model": "reward.clip.model"}
# What is not taken from a record where another key is given, which it would outdo or not fit.
BESIDE = {
    "reward.name": ("reward.weights", "reward.standardise"), "reward.weights": ("reward.standardise",),
    "prompt_file": ("prompt",),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What one call works on, in the library's own words."""

    config: ConfigDict  # going away: whatever reads it should read `settings`
    settings: Settings
    stage: Stage
    num_trained_steps: int  # S
    resume_from: Path | None  # the LoRA file the stage starts from; None: a fresh one
    prompts: tuple[str, ...]  # what is trained on
    record: dict[str, Any]  # the experiment, as config.json holds it
    changes: tuple[str, ...] = ()  # what, allowed, differs from config.json, in words

    @property
    def start(self) -> str:
        """Where the stage starts from, for people: `a fresh LoRA`, `stage2/checkpoint_1`, or the path of a LoRA."""
        if self.resume_from is None:
            return "a fresh LoRA"
        return relative_to(self.stage.root, self.resume_from.parent).replace("/checkpoints/", "/")


def stage_index(run_name: str) -> int:
    """The i of run_name `stage<i>`."""
    match = re.fullmatch(r"stage(0|[1-9][0-9]{0,5})", run_name)
    if not match:
        raise ValueError(f"run_name is {shown(run_name)}; it names the stage: stage0, stage1, …")
    return int(match[1])


def make_plan(config: ConfigDict) -> Plan:
    """Check the configuration and the experiment's folder; raises ValueError or FileNotFoundError, writes nothing."""
    check(config)
    stage = Stage(experiment_folder(config), stage_index(config["run_name"]))
    prompts = tuple(prompt for _, prompt in named_prompts(config, "train"))
    prompts_sha256 = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    record = json.loads(json.dumps({"config": config.to_dict(), "prompts_sha256": prompts_sha256}))
    settings, changes = read_settings(config), ()
    if (stage.root / "config.json").is_file():
        recorded = files.read_json(stage.root / "config.json")
        changes = differences(recorded, record)
        if changes:
            refuse_change(config, stage, changes)
        threads = settings.compute.num_threads or recorded["num_threads"]
        settings = replace(settings, compute=replace(settings.compute, num_threads=threads))
    num_trained_steps = trained_steps(settings.schedule, stage)
    return Plan(config, settings, stage, num_trained_steps, resume_source(config, stage), prompts, record, changes)


def differences(recorded: dict, wanted: dict) -> tuple[str, ...]:
    """Where a configuration differs from the recorded one in anything that is not volatile, in words."""
    now = flatten(wanted["config"])
    before = {key: now[key] for key in ADDED_UNUSED} | recorded_settings(recorded)
    reward = wanted["config"]["reward"]
    volatile = {*VOLATILE, *unused_settings(now, [*(reward["weights"] or [reward["name"]]), "weights"])}
    volatile |= {"reward.name"} if reward["weights"] else set()
    differing = [
        f"{key} is {now.get(key)!r}, was {before.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in volatile
    ]
    if recorded["prompts_sha256"] != wanted["prompts_sha256"]:
        differing.append("the training prompts are others")
    return tuple(differing)


def refuse_change(config: ConfigDict, stage: Stage, changes: tuple[str, ...]) -> None:
    """Refuse another configuration unless it is allowed; and in the middle of a stage in any case."""
    if not config["allow_config_change"]:
        raise ValueError(
            f"{stage.root} belongs to another configuration: {'; '.join(changes)}. Go on with the recorded values, or give "
            "the new experiment another exp_name; or, if you know what you do, --config.allow_config_change."
        )
    if stage.folder.exists() and not stage.finished("train"):
        raise ValueError(
            f"{stage.folder} is half done with another configuration: {'; '.join(changes)}. Finish it with the recorded "
            "values, or delete it; a change counts from a stage's beginning."
        )


def recorded_settings(recorded: Mapping) -> dict[str, Any]:
    """The flat configuration in what config.json holds, by today's keys where an earlier version wrote it."""
    return ADDED | {RENAMED.get(key, key): value for key, value in flatten(recorded["config"]).items()}


def take_recorded(config: ConfigDict, given: Collection[str]) -> None:
    """Set the experiment's own settings, which are all but the volatile ones, as its config.json has them; keys that are
    `given`, and those that mean nothing beside them, stay."""
    path = experiment_folder(config) / "config.json"
    if not path.is_file():
        return
    recorded = files.read_json(path)
    before = recorded_settings(recorded) | {"reward.weights": recorded["config"]["reward"].get("weights")}
    kept = {*VOLATILE, *given}.union(*(BESIDE.get(key, ()) for key in given))
    now = flatten(config.to_dict())
    taken = {key: before[key] for key in now if key not in kept and before.get(key, now[key]) != now[key]}
    for name in (taken.get("reward.name", ""), *(taken.get("reward.weights") or {})):
        if ":" in name:
            raise ValueError(
                f"{path} has the reward {name}, which is code of its own and is not run because a file says so. If you know "
                f"it, give it yourself: --config.reward.name={name}, or --config.reward.weights"
            )
    if taken:
        logger.info("as %s has it: %s", path, ", ".join(f"{key} {value!r}" for key, value in taken.items()))
    config.update_from_flattened_dict(taken)


def unused_settings(flat: Mapping[str, Any], rewards: Sequence[str]) -> list[str]:
    """The keys reward.<name>.<setting> of all rewards but these."""
    return [key for key in flat if re.match(r"reward\.\w+\.", key) and key.split(".")[1] not in rewards]


def record_experiment(plan: Plan, num_threads: int) -> None:
    """Write config.json the first time an experiment is run, or when it goes on otherwise, with what was different."""
    path = plan.stage.root / "config.json"
    recorded = files.read_json(path) if path.is_file() else None
    if not recorded:
        files.write_record(path, plan.record | {"num_threads": num_threads})
    elif plan.changes and recorded["config"] != plan.record["config"]:
        change = {"stage": plan.stage.index, "changes": plan.changes}
        logger.warning("stage%d goes on with another configuration: %s", plan.stage.index, "; ".join(plan.changes))
        earlier = {"num_threads": recorded["num_threads"], "changed": [*recorded.get("changed", []), change]}
        files.write_record(path, plan.record | earlier)


def trained_steps(schedule: Schedule, stage: Stage) -> int:
    """S of this stage: what it was sampled with, else what is scheduled."""
    wanted = schedule.num_trained_steps(stage.index)
    if not stage.finished("sample"):
        return wanted
    recorded = stage.manifest("sample")["num_trained_steps"]
    if schedule.given and recorded != wanted:
        raise ValueError(f"{stage.folder} was sampled with split_step {recorded}, not {wanted}. Use another exp_name.")
    return recorded


def resume_source(config: ConfigDict, stage: Stage) -> Path | None:
    """The LoRA file a stage starts from.

    A stage goes on from the one before it. `resume_from` is where a run starts, so it counts for stage 0, for a stage
    whose predecessor is not in this experiment, and where it names a checkpoint of that predecessor.
    """
    given = Path(os.path.expanduser(config["resume_from"])) if config["resume_from"] else None
    before = Stage(stage.root, stage.index - 1)
    inside = given is not None and given.resolve().is_relative_to(before.folder.resolve())
    if stage.index > 0 and not inside:
        if before.finished("train"):
            before.verify("train", "checkpoints")
            return before.checkpoints()[-1] / LORA_FILE
        if given is None or before.folder.exists():
            raise ValueError(f"{stage.folder} follows {before.folder}, which is not trained yet. Run that stage first.")
    return None if given is None else find_lora(given)
