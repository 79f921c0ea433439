"""What a configuration may be: each value by itself (ranges.py), and together. Everything here is done before anything is
written."""

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from ml_collections import ConfigDict

from b2diffurl.algorithm.transition import STEP_WEIGHTS
from b2diffurl.configuration.limits import check_values, flatten, shown
from b2diffurl.configuration.settings import CURRICULA
from b2diffurl.objectives import OBJECTIVES

SAMPLINGS = ("branch", "independent")
SELECTIONS = ("pairs", "all")
ADVANTAGES = ("prompt", "group")
REWARD_DTYPES = ("auto", "float32", "float16", "bfloat16")
PRECISIONS = ("auto", "no", "fp16", "bf16")
TRACKERS = ("wandb", "tensorboard")
SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY|AUTHORIZATION)$")  # names of variables


def check(config: ConfigDict) -> None:
    """Refuse values that cannot work, each with what is allowed."""
    check_secrets(config)  # first, for other messages show values
    check_values(flatten(config.to_dict()))
    sample, train, evaluation = config["sample"], config["train"], config["eval"]
    left, right, num_steps = config["split_step_left"], config["split_step_right"], sample["num_steps"]
    right = left if config["curriculum"] == "fixed" else right
    if not 1 <= left <= right <= num_steps:
        raise ValueError(
            f"split_step_left..split_step_right is {left}..{right}; it must lie in 1..{num_steps} (sample.num_steps)"
        )
    if config["split_step"] and not 1 <= config["split_step"] <= num_steps:
        raise ValueError(f"split_step is {config['split_step']}; it must lie in 1..{num_steps} (sample.num_steps)")
    if evaluation["pos_threshold"] < evaluation["neg_threshold"]:
        bounds = f"{evaluation['pos_threshold']} < {evaluation['neg_threshold']}"
        raise ValueError(f"eval.pos_threshold is below eval.neg_threshold, {bounds}; it must not be, or one sibling is both")
    check_reward_settings(config["reward"], evaluation["judge"])
    check_choice("mixed_precision", config["mixed_precision"], PRECISIONS)
    check_choice("curriculum", config["curriculum"], CURRICULA)
    check_choice("sampling", config["sampling"], SAMPLINGS)
    check_choice("eval.selection", evaluation["selection"], SELECTIONS)
    check_choice("eval.advantage", evaluation["advantage"], ADVANTAGES)
    check_choice("train.objective", train["objective"], OBJECTIVES)
    check_choice("train.step_weight", train["step_weight"], STEP_WEIGHTS)
    for name in config["track_with"]:
        check_choice("track_with", name, TRACKERS)
    check_choice("wandb_mode", config["wandb_mode"], ("offline", "online"))
    check_combination(config)


def check_secrets(config: ConfigDict) -> None:
    """Refuse a setting that has a password in it, or what a variable such as HF_TOKEN holds: it would be in config.json."""
    secret = {name: value.split() for name, value in os.environ.items() if SECRET.search(name)}  # "Bearer abc…": the last
    tokens = {words[-1]: name for name, words in secret.items() if words and len(words[-1]) >= 8}
    for key, value in flatten(config.to_dict()).items():
        if re.search(r"://[^/\s]*@", str(value)):
            raise ValueError(
                f"{key} has a user name or a password in its URL, which config.json and log would keep. Take them out; what "
                "reward http is to send as its header Authorization belongs into the variable REWARD_HTTP_AUTHORIZATION."
            )
        if found := [name for token, name in tokens.items() if token in str(value)]:
            raise ValueError(f"{key} has in it what the variable {found[0]} holds, which config.json and log would keep")


def check_reward_settings(reward: ConfigDict, judge: str) -> None:
    """Refuse a mixture or a list of judges that is none."""
    weights, watch = reward["weights"], reward["watch"]
    check_choice("reward.dtype", reward["dtype"], REWARD_DTYPES)
    if weights is not None:
        if not isinstance(weights, Mapping) or not weights:
            raise ValueError(f'reward.weights is {shown(weights)}; it must be like {{"clip": 1.0, "aesthetic": 0.1}}')
        for name, weight in weights.items():
            if not isinstance(name, str) or not name or type(weight) not in (int, float) or not 0 < abs(weight) <= 1e6:
                raise ValueError(
                    f"reward.weights has {shown(weight)} for {shown(name)}; it must give names numbers up to 1e6, not 0"
                )
    elif reward["standardise"]:
        raise ValueError(
            "reward.standardise is on without reward.weights; it must be off: a single reward's scale has no effect"
        )
    if judge == "file":
        raise ValueError("eval.judge is file; it must be a reward that can score the images that are judged")
    trained = list(weights or [reward["name"]])
    for name in watch:
        if not isinstance(name, str) or not name or name in trained or watch.count(name) > 1:
            raise ValueError(f"reward.watch names {shown(name)}, which is trained on, named twice or no name")


def check_combination(config: ConfigDict) -> None:
    """Refuse values that cannot work together, each with the reason."""
    train, evaluation, siblings = config["train"], config["eval"], config["split_time"]
    objective = OBJECTIVES[train["objective"]]
    if siblings < 2 and evaluation["selection"] == "pairs":
        raise ValueError("split_time is 1; a contrast needs at least 2 siblings. Or take eval.selection=all.")
    if siblings < 2 and evaluation["advantage"] == "group":
        raise ValueError("split_time is 1; relative to itself (eval.advantage=group) every image scores 0. Take prompt.")
    if objective.paired and evaluation["selection"] != "pairs":
        raise ValueError(f"train.objective {train['objective']} compares best and worst: eval.selection must be pairs")
    if objective.paired and config["sampling"] != "branch":
        raise ValueError(f"train.objective {train['objective']} compares branches of one prefix: sampling must be branch")
    if objective.single_pass and train["num_epochs"] > 1:
        raise ValueError(
            f"train.num_epochs is {train['num_epochs']}; {train['objective']} does not correct for samples of an older "
            "policy, so it makes one pass. Take ddpo for more."
        )


def check_installed(train: ConfigDict) -> None:
    """Refuse an optimizer that is not here, before there is something to train on."""
    if train["use_8bit_adam"] and not find_spec("bitsandbytes"):
        raise ImportError("train.use_8bit_adam is True, which needs bitsandbytes: pip install bitsandbytes")


def check_choice(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {shown(value)}; known: {', '.join(repr(choice) for choice in choices)}")
