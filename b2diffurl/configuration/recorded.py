"""config.json: what an experiment was begun with, compared with the settings asked for now. Most of them may not change."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from b2diffurl.configuration.keys import ALWAYS_THERE, HAD_NO_EFFECT, KEYS, flatten
from b2diffurl.configuration.limits import ModelName
from b2diffurl.experiment.stage import Stage
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger
from b2diffurl.runtime.paths import same_place

OF_ONE_CALL = ("run_name", "split_step", "resume_from", "preset")  # keys of a single call, not of the experiment


@dataclass(frozen=True)
class Record:
    """What config.json will hold, and how it differs from the one on disk."""

    stage: Stage  # the stage that this call works on
    content: dict[str, Any]  # of config.json, without the number of threads
    changes: tuple[str, ...]  # the differences that the user has allowed, in words


def read_record(root: Path) -> dict[str, Any] | None:
    """The config.json of the experiment in folder `root`; None if no experiment has begun there."""
    path = root / "config.json"
    return files.read_json(path) if path.is_file() else None


def make_record(
    stage: Stage, asked: Mapping[str, Any], prompts: Sequence[str], preset: Mapping[str, Any] | None, begun: dict | None
) -> Record:
    """Compare the settings `asked` for with the experiment's config.json, `begun` (None: no experiment yet).

    The base model is compared later, by `identified`: that takes reading gigabytes.

    A ValueError lists the differences, unless they are allowed. `preset` holds the preset's own settings (None: unknown).
    """
    content = {
        "config": asked,
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "differs_from_preset": None if preset is None else preset_differences(asked, preset),
    }
    content = json.loads(json.dumps(content))  # as a file gives it back, with lists for tuples, to compare like with like
    changes = differences(begun, content) if begun else ()
    if changes:
        refuse_change(stage, changes, allowed=asked["allow_config_change"])
    return Record(stage, content, changes)


def identified(record: Record, family: str, base_model: Mapping[str, str]) -> Record:
    """The record with the base model's family, and with a checksum of each of its parts, {part: checksum}.

    The family may have been recognised by the model's files. Exporting must know it without them.

    A ValueError names the parts that are others than the experiment began with, unless the user allows changes. An
    experiment of an earlier version has none recorded; it gets today's.
    """
    asked = record.content["config"]
    asked = asked | {"pretrained": asked["pretrained"] | {"family": family}}
    content, begun = record.content | {"config": asked, "base_model": dict(base_model)}, read_record(record.stage.root)
    changes = differences(begun, content) if begun else ()
    if changes:
        refuse_change(record.stage, changes, allowed=content["config"]["allow_config_change"])
    return replace(record, content=content, changes=changes)


def exchanged(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names in `now` whose checksum was another before; names without a checksum from before are passed over."""
    return [name for name, checksum in now.items() if before.get(name, checksum) != checksum]


def preset_differences(asked: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{key: (value, preset's value)} of each setting that differs from the preset."""
    here, there = flatten(asked), flatten(preset)
    return {
        key: (here[key], value)
        for key, value in there.items()
        if key in here and here[key] != value and key not in OF_ONE_CALL
    }


def differences(begun: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, ...]:
    """How the record `wanted` differs from the record `begun`, in words, leaving out what may change."""
    now, before = flatten(wanted["config"]), recorded_settings(begun["config"])
    # Free to change: keys with may_change, settings of rewards not in use, and options that came with a newer objective.
    free = {key for key, row in KEYS.items() if row.may_change} | unused_settings(now)
    free |= {key for key, row in KEYS.items() if row.before is HAD_NO_EFFECT and key not in before}
    found = [
        f"{key} is {now.get(key)!r}, was {before.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in free and not is_same_place(key, before.get(key), now.get(key))
    ]
    if begun["prompts_sha256"] != wanted["prompts_sha256"]:
        found.append("the training prompts are others")
    parts = exchanged(begun.get("base_model", {}), wanted.get("base_model", {}))
    return (*found, *(f"the {part} of the base model is another" for part in parts))


def is_same_place(key: str, before: Any, now: Any) -> bool:
    """Whether a model's path only reads differently, because the command was given in another directory."""
    return isinstance(getattr(KEYS.get(key), "limit", None), ModelName) and before is not None and same_place(before, now)


def refuse_change(stage: Stage, changes: Sequence[str], *, allowed: bool) -> None:
    """Raise a ValueError for changed settings, unless they are allowed. In the middle of a stage they never are."""
    if not allowed:
        raise ValueError(
            f"{stage.root} belongs to another configuration: {'; '.join(changes)}. Go on with the recorded values, or give "
            "the new experiment another name (ExpName=…, --config.exp_name=…); or, if you know what you do, "
            "--config.allow_config_change."
        )
    if stage.folder.exists() and not stage.finished("train"):
        raise ValueError(
            f"{stage.folder} is half done with another configuration: {'; '.join(changes)}. Finish it with the recorded "
            "values, or delete it; a change counts from a stage's beginning."
        )


def recorded_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's settings under today's keys: renamed keys are translated, missing keys get their `before` value."""
    added = {key: row.before for key, row in KEYS.items() if row.before not in (ALWAYS_THERE, HAD_NO_EFFECT)}
    return added | flatten(config)


def lasting_settings(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that may not change unless the user allows it: each stage records those that it was made with."""
    free = {key for key, row in KEYS.items() if row.may_change}
    now = flatten(asked)
    return {key: value for key, value in now.items() if key not in free | unused_settings(now)}


def setting_changes(recorded: Mapping[int, Mapping | None], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{stage, change} for each setting by which a stage differs from the one before it, in order.

    `recorded` holds each stage's settings (`lasting_settings`, from sample.json), and `record` is config.json. Stages of
    earlier versions recorded none (None); what config.json says of their changes is taken.
    """
    rows: list[dict[str, Any]] = []
    before: Mapping = {}
    for stage, now in recorded.items():
        if now is None:
            said = [entry["changes"] for entry in record.get("changed", []) if entry["stage"] == stage]
            rows += [{"stage": stage, "change": change} for changes in said[-1:] for change in changes]
            continue
        now = flatten(now)
        changed = sorted(key for key in before.keys() & now.keys() if before[key] != now[key])
        rows += [{"stage": stage, "change": f"{key} is {now[key]!r}, was {before[key]!r}"} for key in changed]
        before = now
    return rows


def unused_settings(settings: Mapping[str, Any]) -> set[str]:
    """The reward keys that have no effect: settings of rewards not trained on, and reward.name if there is a mixture."""
    weights = settings["reward.weights"]
    others = {key for key in settings if re.match(r"reward\.\w+\.", key)}
    used = {key for key in others if key.split(".")[1] in (weights or [settings["reward.name"]])}
    return others - used | ({"reward.name"} if weights else set())


def take_recorded(config: ConfigDict, given: Collection[str]) -> None:
    """Take the settings that define the experiment from its config.json, if there is one.

    Keys that the user has `given` on the command line stay, and so do the keys that conflict with them (`not_beside`).
    """
    root = Path(config["save_path"], config["exp_name"])
    begun = read_record(root)
    if not begun:
        return
    recorded, now, path = recorded_settings(begun["config"]), flatten(config.to_dict()), root / "config.json"
    before = {key: tuple(value) if isinstance(value, list) else value for key, value in recorded.items()}  # JSON has lists
    kept = {key for key, row in KEYS.items() if row.may_change or not set(given).isdisjoint((key, *row.not_beside))}
    taken = {key: before[key] for key in now if key not in kept and before.get(key, now[key]) != now[key]}
    refuse_code(path, [taken.get("reward.name", ""), *(taken.get("reward.weights") or {})])
    if taken:
        logger.info("as %s has it: %s", path, ", ".join(f"{key} {value!r}" for key, value in taken.items()))
    config.update_from_flattened_dict(taken)


def refuse_code(path: Path, rewards: Sequence[str]) -> None:
    """Refuse a reward of the user's own code that only the record `path` names: its folder may be somebody else's."""
    for name in rewards:
        if ":" in name:
            raise ValueError(
                f"{path} has the reward {name}, which is code of its own and is not run because a file says so. If you know "
                f"it, give it yourself: --config.reward.name={name}, or --config.reward.weights"
            )


def record_experiment(record: Record, num_threads: int) -> None:
    """Write config.json when the experiment begins, and again when it goes on with allowed changes, which it then lists."""
    root, index = record.stage.root, record.stage.index
    begun = read_record(root)
    if not begun:
        files.write_record(root / "config.json", record.content | {"num_threads": num_threads})
    elif not record.changes and (meanwhile := differences(begun, record.content)):
        refuse_change(record.stage, meanwhile, allowed=False)  # another run began it after this one had planned
    elif record.changes and any(begun.get(key) != value for key, value in record.content.items()):
        logger.warning("stage%d goes on with another configuration: %s", index, "; ".join(record.changes))
        changed = [*begun.get("changed", []), {"stage": index, "changes": record.changes}]
        files.write_record(root / "config.json", record.content | {"num_threads": begun["num_threads"], "changed": changed})
    elif "base_model" in record.content and "base_model" not in begun:  # an earlier version began it
        files.write_record(root / "config.json", begun | {"base_model": record.content["base_model"]})
