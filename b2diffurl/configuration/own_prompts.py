"""Prompts of the user's own in a preset: what the preset has for its own prompts alone then steps back by itself.

The presets of the small model judge by the exact checker of its world, which reads only that world's prompts, and every
preset has held-out prompts that belong to its training prompts.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from b2diffurl.configuration.prompts import load_prompts
from b2diffurl.configuration.recorded import read_record
from b2diffurl.runtime.paths import same_place

Settings = Mapping[str, Any]  # by key, such as `eval.judge`

JUDGE, FEATURES = "shapes", "layout"  # of the small world
NO_HELD_OUT = (
    "no held-out prompts were given for these training prompts, so checkpoints are judged on the training prompts "
    "themselves; EvalPromptFile=FILE (eval.prompt_file) gives others"
)


def step_back(settings: Settings, preset: Settings, given: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """({key: another value}, what to say of it in sentences), so that the user's own prompts can be trained on.

    `preset` holds the settings before the user's changes, `given` has the keys that the user has set: these are left as they
    are, and may be refused later.
    """
    try:
        trained = [settings["prompt"]] if settings["prompt"] else load_prompts(settings["prompt_file"])
        if gives_none_held_out(settings, preset, given) and not is_judged_as_before(settings, trained):
            changes, said, judged = {"eval.prompt_file": ""}, [NO_HELD_OUT], []
        else:
            path = settings["eval.prompt_file"]
            changes, said, judged = {}, [], load_prompts(path) if path else []
    except (ValueError, OSError):
        return {}, []  # the files are refused where settings are checked, in the order that is usual there
    if (left_out := checkers(settings, given)) and (foreign := outside_the_world([*trained, *judged])):
        changes |= left_out
        said.append(
            f"{foreign!r} is no prompt of the small world, whose exact checker cannot judge "
            f"it, so it steps back: {', '.join(f'{key} is {value!r}' for key, value in left_out.items())}"
        )
    return changes, said


def gives_none_held_out(settings: Settings, preset: Settings, given: Collection[str]) -> bool:
    """Whether the user has given training prompts other than the preset's, and no held-out ones with them."""
    own = [key for key in ("prompt_file", "prompt") if key in given and not is_same(settings[key], preset.get(key))]
    return bool(own) and "eval.prompt_file" not in given and bool(settings["eval.prompt_file"])


def is_same(here: Any, there: Any) -> bool:
    """Whether the user has given what the preset has anyway."""
    return here == there or (bool(here) and bool(there) and same_place(there, here))


def is_judged_as_before(settings: Settings, trained: Sequence[str]) -> bool:
    """Whether the preset's held-out prompts stay: they are of the same kind, because both are of the small world; or an
    earlier version has begun the experiment with them."""
    if settings["eval.judge"] == JUDGE and not outside_the_world(trained):
        return True
    begun = read_record(Path(settings["save_path"], settings["exp_name"]))
    return bool(begun and begun["config"]["eval"]["prompt_file"])


def checkers(settings: Settings, given: Collection[str]) -> dict[str, Any]:
    """{key: its value without the small world's checker}, for the keys that have it and that the user has not set."""
    without = {}
    if settings["eval.judge"] == JUDGE:
        without["eval.judge"] = ""
    if FEATURES in settings["eval.diversity"]:
        without["eval.diversity"] = tuple(name for name in settings["eval.diversity"] if name != FEATURES)
    return {key: value for key, value in without.items() if key not in given}


def outside_the_world(prompts: Sequence[str]) -> str:
    """The first prompt that the small world's checker cannot read; "" if it reads all."""
    from b2diffurl.shapes.scene import parse

    for prompt in prompts:
        try:
            parse(prompt)
        except ValueError:
            return prompt
    return ""
