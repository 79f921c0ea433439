"""Commands for people to copy, from an experiment's config.json: what they leave out is in that file, or in the preset."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from b2diffurl.configuration.keys import KEYS, flatten
from b2diffurl.configuration.settings import reward_weights
from b2diffurl.experiment.folder import EXPERIMENTS
from b2diffurl.runtime.paths import CONFIG_FILE, command

JUDGING = ("pretrained.", "eval.", "reward.")  # of the settings that may change, those that decide how run_eval.py judges


def judging_command(root: Path, record: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> list[str]:
    """The words of a command of run_eval.py that judges the experiment in `root` as it was begun, but for `options`.

    config.json has what defines the experiment. Other settings come from the command, as far as they are not the preset's,
    and so does code of the user's own, which is not run because a file says so.
    """
    config = record["config"]
    changed = record.get("differs_from_preset")  # None: by an earlier version, or without a preset
    begun = flatten(config) if changed is None else {key: here for key, (here, _) in flatten(changed).items()}
    kept = {key: value for key, value in begun.items() if key == "prompt_file" or key.startswith(JUDGING)}
    kept = {key: value for key, value in kept.items() if key in KEYS and KEYS[key].may_change and key != "eval.every"}
    own = [name.partition(":")[0] for name in reward_weights(config["reward"]) if ":" in name]
    if own:
        which = "weights" if config["reward"].get("weights") else "name"
        kept[f"reward.{which}"] = config["reward"][which]
    beside = any((root / f"{module}.py").is_file() for module in own)  # a function of a notebook is kept there
    preset = [f"--config={CONFIG_FILE}:{config['preset']}"] if config.get("preset") else []
    place = {"exp_name": root.name} | ({} if root.parent == EXPERIMENTS else {"save_path": str(root.parent)})
    program = [*(["env", f"PYTHONPATH={root}"] if beside else []), *command("eval").split()]
    return [*program, *preset, *as_flags(place | kept | dict(options or {}))]


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as flags; None cannot be given by one."""
    return [f"--config.{key}={as_flag(value)}" for key, value in settings.items() if value is not None]


def as_flag(value: Any) -> str:
    """A setting of config.json as a flag takes it: lists there are tuples. A shell needs no quotes within quotes for it."""
    text = str(tuple(value) if isinstance(value, list) else value)
    return text if '"' in text or isinstance(value, str) else text.replace("'", '"')
