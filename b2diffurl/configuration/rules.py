"""Which combinations of values are refused. Single values are checked first (keys.py). All this comes before any work."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from ml_collections import ConfigDict

from b2diffurl.configuration.keys import faulty_values, flatten
from b2diffurl.configuration.limits import shown
from b2diffurl.objectives import OBJECTIVES

# Names of secrets, of environment variables and in the query or fragment of a URL: OPENAI_KEY, DB_PASS, X-Amz-Signature.
# A short word must stand for itself, as KEYBOARD and monkey are no keys. PWD alone is the working directory.
SECRET = re.compile(
    r"(token|secret|password|passwd|passphrase|credentials?|authorization|signature|(api|access|secret|private)key"
    r"|(^|[^a-z])(key|auth|pass|pat|sig|jwt|bearer|creds?)|[^a-z]pwd)[_\d]*$",
    re.IGNORECASE,
)

WHERE_SECRETS_BELONG = (
    "what reward http is to send as its header Authorization belongs into the variable REWARD_HTTP_AUTHORIZATION, the key "
    "of reward vlm into REWARD_VLM_API_KEY."
)
MOVING_ENDS = ("early", "sliding")  # curricula whose windows do not end at split_stop


def check(config: ConfigDict) -> None:
    """Check a whole configuration; a ValueError says which value cannot work and what is allowed."""
    for fault in faults(config):
        raise fault


def faults(config: ConfigDict) -> Iterator[ValueError]:
    """Every reason for which a configuration is refused. Combinations are looked at if each value alone can work."""
    settings = flatten(config.to_dict())
    try:
        check_secrets(settings)  # first, because the other errors show values
    except ValueError as secret:
        yield secret
        return
    single = [*faulty_values(settings)]
    yield from single
    combinations = (check_schedule, check_stop, check_tail, check_tree)
    combinations += (check_rewards, check_selection, check_objective, check_sampler)
    for check_one in () if single else combinations:
        try:
            check_one(settings)
        except ValueError as fault:
            yield fault


def check_secrets(settings: Mapping[str, Any]) -> None:
    """Refuse a setting with a password or key in its URL, or with the value of an environment variable such as HF_TOKEN.

    config.json and the log would keep it.
    """
    secret = {name: value.split() for name, value in os.environ.items() if SECRET.search(name)}
    # Of a value such as "Bearer abc…" the last word is the secret. Words under 8 characters would match by accident, and
    # SSH_KEY may have the path of a file.
    tokens = {words[-1]: name for name, words in secret.items() if words and len(words[-1]) >= 8 and not is_path(words[-1])}
    for key, value in settings.items():
        if name := secret_in_url(str(value)):
            raise ValueError(
                f"{key} has in its URL a value of {shown(name)}, which reads like a secret, and config.json and log would "
                f"keep it. Take it out; {WHERE_SECRETS_BELONG}"
            )
        if re.search(r"://[^/\s]*@", str(value)):
            raise ValueError(
                f"{key} has a user name or a password in its URL, which config.json and log would keep. Take them out; "
                f"{WHERE_SECRETS_BELONG}"
            )
        if found := [name for token, name in tokens.items() if token in str(value)]:
            raise ValueError(
                f"{key} has in it what the variable {found[0]} holds, which config.json and log would keep. Take it out."
            )


def secret_in_url(text: str) -> str:
    """The name of what reads like a secret in the query or fragment of a URL in the text, `?api_key=…`; "" if none."""
    parameters = re.findall(r"[?&#;]([^\s?&#;=/]+)=[^\s?&#;'\",)]", text) if "://" in text else []
    return next((name for name in map(unquote, parameters) if SECRET.search(f"-{split_camel(name)}")), "")


def split_camel(name: str) -> str:
    """`apiKey` as `api-Key`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name)


def is_path(text: str) -> bool:
    """Whether this is the absolute path of something that is there."""
    return os.path.isabs(text) and os.path.exists(text)


def check_schedule(settings: Mapping[str, Any]) -> None:
    """Refuse numbers of trained steps outside 1..sample.num_steps."""
    left, right, num_steps = settings["split_step_left"], settings["split_step_right"], settings["sample.num_steps"]
    right = left if settings["curriculum"] in ("fixed", "sliding") else right
    if not 1 <= left <= right <= num_steps:
        raise ValueError(
            f"split_step_left..split_step_right is {left}..{right}; it must lie in 1..{num_steps} (sample.num_steps), with "
            "its smaller end first"
        )
    given = settings["split_step"]
    if given and not 1 <= given <= num_steps:
        raise ValueError(
            f"split_step is {given}; it must lie in 1..{num_steps} (sample.num_steps), or be 0: by the schedule"
        )


def check_stop(settings: Mapping[str, Any]) -> None:
    """Refuse an end of the trained window before its start, or beside a curriculum that has ends of its own."""
    stop, curriculum, num_steps = settings["split_stop"], settings["curriculum"], settings["sample.num_steps"]
    if not stop:
        return
    if curriculum in MOVING_ENDS:
        raise ValueError(f"split_stop is {stop}; curriculum {curriculum} decides itself where windows end, so it must be 0")
    start = num_steps - smallest_window(settings)
    if not start < stop <= num_steps:
        raise ValueError(
            f"split_stop is {stop}; a window of S = {num_steps - start} starts after step {start}, so it must lie in "
            f"{start + 1}..{num_steps} (sample.num_steps), or be 0: the last step"
        )


def check_tail(settings: Mapping[str, Any]) -> None:
    """Refuse a shorter tail that is not deterministic, or that is not shorter."""
    count, num_steps = settings["sample.suffix_steps"], settings["sample.num_steps"]
    if not count:
        return
    eta = settings["sample.suffix_eta"]
    if eta != 0:
        raise ValueError(
            f"sample.suffix_steps is {count} and sample.suffix_eta {eta}; only a deterministic tail may be shorter. Set "
            "sample.suffix_eta=0, or sample.suffix_steps=0: all steps."
        )
    moving = settings["curriculum"] in MOVING_ENDS
    longest = num_steps - (smallest_window(settings) if moving else settings["split_stop"] or num_steps)
    if count >= longest:
        raise ValueError(
            f"sample.suffix_steps is {count}; at most {longest} of {num_steps} steps follow the trained window (as "
            "split_stop or curriculum has it), and it must be fewer, or 0: all"
        )


def check_tree(settings: Mapping[str, Any]) -> None:
    """Refuse a tree of branches that does not fit into the trained steps, and what cannot be had with one."""
    times, after, objective = settings["split_times"], settings["split_after"], settings["train.objective"]
    if len(after) != max(0, len(times) - 1):
        raise ValueError(
            f"split_after has {len(after)} numbers and split_times {len(times)}; it must have one fewer: the steps from "
            "each parting to the next"
        )
    if not after:  # one parting, as with split_time
        return
    num_steps = settings["sample.num_steps"]
    fewest = smallest_window(settings) - (num_steps - (settings["split_stop"] or num_steps))
    if sum(after) >= fewest:
        raise ValueError(
            f"split_after is {shown(tuple(after))}, so the last parting comes after {sum(after)} trained steps; it must "
            f"come before the end of the shortest window, which has {fewest}"
        )
    if settings["sampling"] != "branch":
        raise ValueError("split_after makes a tree of branches, and independent images share none: sampling must be branch")
    if OBJECTIVES[objective].paired:
        raise ValueError(
            f"train.objective {objective} compares two ways step by step, and leaves of a tree share some of their steps: "
            "split_times must have one number, or none"
        )
    if settings["train.timestep_fraction"] < 1 and not OBJECTIVES[objective].on_noised_images:
        raise ValueError(
            f"train.timestep_fraction is {settings['train.timestep_fraction']}; it must be 1 in a tree, where a shared step "
            "is trained with one of its leaves: an update could be left without any step"
        )


def smallest_window(settings: Mapping[str, Any]) -> int:
    """The smallest S of the schedule and of this call."""
    return min(settings["split_step_left"], settings["split_step"] or settings["split_step_left"])


def check_rewards(settings: Mapping[str, Any]) -> None:
    """Refuse a judge or a watched reward that cannot be one, and settings of a mixture where there is none."""
    weights, watch = settings["reward.weights"], settings["reward.watch"]
    if settings["reward.standardise"] and weights is None:
        raise ValueError(
            "reward.standardise is on without reward.weights; it must be off: a single reward's scale has no effect"
        )
    if settings["reward.combine"] != "sum" and weights is None:
        raise ValueError(
            f"reward.combine is {settings['reward.combine']} without reward.weights; it must be sum: a single reward is "
            "normalised by its own prompt statistics anyway"
        )
    if settings["eval.judge"] == "file":
        raise ValueError("eval.judge is file; it must be a reward that can score the images that are judged")
    for name in watch:
        if not isinstance(name, str) or not name:
            raise ValueError(f"reward.watch names {shown(name)}; it must be names of rewards, like ('pickscore',)")
        if name in (weights or [settings["reward.name"]]):
            raise ValueError(f"reward.watch names {shown(name)}, which is trained on; it must name other rewards")
        if watch.count(name) > 1:
            raise ValueError(f"reward.watch names {shown(name)} twice; it must name each reward once")


def check_selection(settings: Mapping[str, Any]) -> None:
    """Refuse thresholds that overlap, and groups of one where siblings are compared."""
    above, below = settings["selection.pos_threshold"], settings["selection.neg_threshold"]
    if above < below:
        raise ValueError(
            f"selection.pos_threshold is below selection.neg_threshold, {above} < {below}; it must not be, or one image is "
            "both good and bad"
        )
    if has_siblings(settings):
        return
    if settings["selection.images"] == "pairs":
        raise ValueError("split_time is 1; a contrast needs at least 2 siblings. Or take selection.images=all.")
    if settings["selection.advantage"] == "group":
        raise ValueError(
            "split_time is 1; relative to itself (selection.advantage=group) every image scores 0. Take "
            "selection.advantage=prompt."
        )


def has_siblings(settings: Mapping[str, Any]) -> bool:
    """Whether a group has more than one image. A tree has at least 2 leaves."""
    return bool(settings["split_times"]) or settings["split_time"] > 1


def check_objective(settings: Mapping[str, Any]) -> None:
    """Refuse a selection or number of epochs that the objective cannot train with."""
    name, num_epochs = settings["train.objective"], settings["train.num_epochs"]
    objective = OBJECTIVES[name]
    if objective.paired and settings["selection.images"] != "pairs":
        raise ValueError(f"train.objective {name} compares best and worst: selection.images must be pairs")
    if objective.paired and settings["sampling"] != "branch":
        raise ValueError(f"train.objective {name} compares branches of one prefix: sampling must be branch")
    if objective.single_pass and num_epochs > 1:
        raise ValueError(
            f"train.num_epochs is {num_epochs}; {name} does not correct for samples of an older policy, so it makes one "
            "pass. Take ddpo for more."
        )


def check_sampler(settings: Mapping[str, Any]) -> None:
    """Refuse an eta, a guidance or a scheduler with which the objective cannot train, or of which no branches come."""
    name = settings["train.objective"]
    objective, branches = OBJECTIVES[name], settings["sampling"] == "branch" and has_siblings(settings)
    forward = " and ".join(other for other, one in OBJECTIVES.items() if one.on_noised_images)
    if settings["sample.eta"] == 0 and not objective.on_noised_images:
        raise ValueError(
            f"sample.eta is 0; {name} needs the log-probability of a step, and a step without noise has none. Take an eta "
            f"above 0, or one of the objectives that need none: {forward}."
        )
    if settings["sample.eta"] == 0 and branches:
        raise ValueError(
            "sample.eta is 0; without noise the branches of a prefix are all alike. Take an eta above 0, or "
            "sampling=independent."
        )
    if settings["train.guidance_scale"] and not objective.on_noised_images:
        raise ValueError(
            f"train.guidance_scale is {settings['train.guidance_scale']:g}; {name} is trained on the steps that were "
            f"sampled, so it must be 0, which is sampling's guidance. {forward} may take another."
        )
    scheduler = settings["sample.scheduler"]
    if scheduler and not objective.on_noised_images:
        raise ValueError(
            f"sample.scheduler is {shown(scheduler)}; {name} is trained on steps with a log-probability, which a "
            f"scheduler has not. Leave it out, or take one of the objectives that need no steps: {forward}."
        )
    if scheduler and settings["sampling"] == "branch":
        raise ValueError(
            f"sample.scheduler is {shown(scheduler)}, which cannot part into branches; leave it out, or take "
            "sampling=independent"
        )
    if scheduler and max(settings["sample.prefix_eta"], settings["sample.suffix_eta"]) >= 0:
        raise ValueError(
            f"sample.scheduler is {shown(scheduler)}; sample.prefix_eta and sample.suffix_eta must be -1: it has "
            "no steps before and after the trained ones"
        )
