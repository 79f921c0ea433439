"""b2diffurl.finetune: a whole run in this process, or the rest of one that was interrupted."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from b2diffurl.api.experiment import Experiment, Reward
from b2diffurl.api.given import HELD_OUT, PROMPTS, Given, named
from b2diffurl.api.process import borrowed
from b2diffurl.configuration.command_line import named_preset
from b2diffurl.configuration.keys import flatten
from b2diffurl.configuration.limits import Folder, Name, check_value
from b2diffurl.configuration.own_prompts import step_back
from b2diffurl.configuration.presets import changed_config, preset_config
from b2diffurl.experiment import lock
from b2diffurl.resident import run_stages
from b2diffurl.rewards import own
from b2diffurl.runtime.logs import log_of, logger, name_log

Prompts = str | Path | Sequence[str]


def finetune(
    preset: str = "shapes",
    *,
    reward: Reward | None = None,
    prompts: Prompts | None = None,
    held_out: Prompts | None = None,
    stages: int | None = None,
    name: str | None = None,
    folder: str | Path = "model/lora",
    quiet: bool = False,
    **settings: Any,
) -> Experiment:
    """Fine-tune a diffusion model by reinforcement learning, as `bash run_process.sh` does, and return the experiment.

        run = b2diffurl.finetune("shapes", reward=redness, prompts=["a red circle left of a blue square"], stages=3)

    Called again with the same arguments it goes on where it stopped, and returns at once if all is done. It makes the same
    phases, checks and files as the scripts, to the bit, and leaves the process as it was: threads, random numbers, logging.

    preset     a preset of config/stage_process.py: what is not given here is as it has it
    reward     a reward of docs/rewards.md, a function of (images uint8 [N,H,W,3], prompts [N]) that returns a tensor [N], or
               a mixture, {reward: weight}. The source of a notebook's function is written into the experiment
    prompts    the training prompts: a list, or the path of a prompt file
    held_out   the prompts that checkpoints are judged on, likewise
    stages     number of stages. A larger number than before adds stages to a finished experiment
    name       of the experiment; None: the preset's, with the name of the reward's function behind it
    folder     of all experiments; relative to the working directory, as are all paths
    quiet      whether nothing is printed; the log, log/<name>.log, has it all
    settings   any key of config/stage_process.py: seed=1, train={"learning_rate": 1e-4}, **{"sample.num_steps": 30}. Where
               a key is given beside the argument that means the same, the argument counts

    Raises a ValueError or OSError, which says what to do, before anything is sampled, for what a script would refuse.
    """
    settings = plain(settings)
    folder = settings.pop("save_path", folder)
    for key, value in {"preset": preset, "name": name or settings.get("exp_name") or ""}.items():
        if not isinstance(value, str):
            raise ValueError(f"{key} is {value!r}; it must be a text")
    name = name or settings.get("exp_name") or default_name(preset, reward)
    given = Given(Path(folder, name))
    changes = named(given, settings) | {"exp_name": name, "save_path": str(folder)}
    if isinstance(reward, Mapping):
        changes["reward.weights"] = {given.reward(one): weight for one, weight in reward.items()}
    elif reward is not None:
        changes["reward.name"] = given.reward(reward)
    if prompts is not None:
        changes["prompt_file"] = given.prompts(PROMPTS, prompts)
    if held_out is not None:
        changes["eval.prompt_file"] = given.prompts(HELD_OUT, held_out)
    if stages is not None:
        changes["stage_cnt"] = stages
    run(preset, changes, given, quiet=quiet)
    return Experiment(given.root, given)


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which paths are text and NumPy's numbers are Python's."""
    return {
        key: plain(value) if isinstance(value, Mapping) and all(isinstance(one, str) for one in value)
        else str(value) if isinstance(value, os.PathLike)
        else value.item() if isinstance(value, np.generic)
        else value
        for key, value in settings.items()
    }  # fmt: skip


def default_name(preset: str, reward: Any) -> str:
    """The name of an experiment that was given none."""
    function = getattr(reward, "__name__", "")
    return preset_config(preset).exp_name + (f"_{function}" if function.isidentifier() else "")


def run(preset: str, changes: Mapping[str, Any], given: Given, *, quiet: bool) -> None:
    """Make all calls of the loop that are left."""
    config = changed_config(preset, changes)
    for key, limit in (("exp_name", Name()), ("save_path", Folder()), ("log_path", Folder())):
        check_value(key, config[key], limit)  # before anything is written there
    log_file = log_of(Path(config.log_path), given.root)
    with ExitStack() as during:
        during.enter_context(borrowed(log_file, quiet=quiet))
        name_log(log_file, given.root)
        during.enter_context(lock.holding(given.root))
        during.enter_context(given.written())
        during.enter_context(own.given(given.functions))
        begun_with = preset_config(preset).to_dict()
        during.enter_context(named_preset(begun_with))
        # Now that a list of prompts is in its file.
        more, said = step_back(flatten(config.to_dict()), flatten(begun_with), flatten(changes).keys())
        config.update_from_flattened_dict(more)
        for sentence in said:
            logger.info("%s", sentence)
        run_stages(config)
