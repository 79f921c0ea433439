"""Configurations without a command line: of a preset with some keys changed, or of an experiment on disk."""

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from b2diffurl.configuration.keys import by_todays_names, flatten, meant_paths
from b2diffurl.configuration.limits import shown
from b2diffurl.configuration.recorded import read_record, recorded_settings
from b2diffurl.configuration.typos import KINDS, nearest
from b2diffurl.runtime.paths import CONFIG_FILE, resource


def preset_config(name: str) -> ConfigDict:
    """The configuration of a preset of config/stage_process.py, locked; a ValueError lists the presets."""
    return by_todays_names(runpy.run_path(str(resource(CONFIG_FILE)))["get_config"](name).unlock()).lock()


def changed_config(preset: str, changes: Mapping[str, Any]) -> ConfigDict:
    """The configuration of a preset with some keys changed: {"seed": 1, "train": {"learning_rate": 1e-4}}, or dotted.

    A ValueError names a key that does not exist, with the nearest one, or a value of another type.
    """
    config = preset_config(preset)
    flat = flatten(changes)
    set_keys(config, flat, unknown="unknown key {key}{nearest}")
    config.update_from_flattened_dict(meant_paths(flatten(config.to_dict()), flat))
    return config


def recorded_config(root: Path) -> ConfigDict:
    """The configuration that the experiment in folder `root` was begun with, for work in that folder.

    A FileNotFoundError says that there is no experiment; a ValueError that a newer version has begun it.
    """
    record = read_record(root)
    if record is None:
        raise FileNotFoundError(f"{root.absolute()} is no experiment: it has no config.json")
    settings = recorded_settings(record["config"])
    presets = runpy.run_path(str(resource(CONFIG_FILE)))["PRESETS"]
    config = preset_config(settings["preset"] if settings.get("preset") in presets else next(iter(presets)))
    newer = f"{root / 'config.json'} has the key {{key}}, which this version does not know. Take the version that wrote it"
    set_keys(config, settings, unknown=newer)
    config.exp_name, config.save_path = root.name, str(root.parent)
    return config


def set_keys(config: ConfigDict, flat: Mapping[str, Any], *, unknown: str) -> None:
    """Set keys of a configuration. `unknown` is the error for a key that it does not have, with {key} and {nearest}."""
    known = flatten(config.to_dict())
    for key, value in flat.items():
        if key not in known:
            near = nearest(key, known)
            raise ValueError(unknown.format(key=key, nearest=f"; did you mean {near}?" if near else ""))
        try:
            with config.unlocked():
                config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
        except TypeError:
            kind = KINDS.get(type(known[key]), "other")
            raise ValueError(f"{key} is {shown(value)}; it must be {kind}, like {known[key]!r}") from None
