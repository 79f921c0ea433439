"""A mistyped word of a command line: what is wrong with it, and which key or option it was meant to be."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from b2diffurl.runtime.paths import CONFIG_FILE, RUN

NEAR = 0.75  # how alike two names are that may be meant for each other; 1: equal
PRESET_KEY = "preset"  # the key that only records which preset was chosen
CHOICE_OF_PRESET = f"--config={CONFIG_FILE}:NAME (Preset=NAME {RUN})"
# What a value of a key must be, by the type of the preset's value.
KINDS = {
    bool: "True or False", int: "a whole number", float: "a number", str: "a text", tuple: "a list, such as ('a','b')",
}  # fmt: skip


def unknown_option(words: Sequence[str], settings: Mapping[str, Any], options: Collection[str]) -> str | None:
    """A sentence about the first option among `words` that there is not; None if there are all.

    `settings` holds every key, dotted, with its value; `options` the names of the options that are no keys.
    """
    for word in words:
        if word.startswith("-") and (said := unknown_name(word.lstrip("-").partition("=")[0], settings, options)):
            return said
    return None


def unknown_name(name: str, settings: Mapping[str, Any], options: Collection[str]) -> str | None:
    """A sentence about an option's name, without its dashes, unless there is such an option."""
    key = name.removeprefix("config.") if name.startswith("config.") else None
    if key in settings or name.removeprefix("no") in options or name in options or not name:
        return None
    if key == "":
        return f"--{name} names no key"
    within = [one for one in settings if key is not None and one.startswith(f"{key}.")]
    if within:
        return f"--{name} is a section, not a key; set one of its keys, such as --config.{within[0]}"
    what = f"option --{name}" if key is None else f"key {key}"
    return f"there is no {what}{did_you_mean(name, settings, options)}"


def did_you_mean(name: str, settings: Collection[str], options: Collection[str]) -> str:
    """`; did you mean --config.seed?`, the nearest option to a name, or nothing if none is near."""
    prefix, _, key = name.lstrip("-").partition(".")
    bare = key if difflib.SequenceMatcher(None, prefix, "config").ratio() > NEAR else name.lstrip("-")
    near = nearest(bare, settings, options)
    if near == PRESET_KEY and near in settings:
        return f"; did you mean {CHOICE_OF_PRESET}?"
    return f"; did you mean --{'config.' if near in settings else ''}{near}?" if near else ""


def nearest(name: str, settings: Collection[str], options: Collection[str] = ()) -> str:
    """The key or option that is most like a name, or the only key that has that name in a section; "" if there is none."""
    in_other_section = [one for one in settings if one.rpartition(".")[2] == name.rpartition(".")[2]]
    near = difflib.get_close_matches(name, [*settings, *options], n=1, cutoff=NEAR) or in_other_section
    return near[0] if len(near) == 1 else ""


def bad_value(flag: str, settings: Mapping[str, Any]) -> str | None:
    """A sentence about `config.KEY=VALUE`, whose value is not of the key's type; None if the type has no name here."""
    name, _, value = flag.partition("=")
    kind = KINDS.get(type(settings.get(name.removeprefix("config."))))
    return f"--{name} is {value!r}; it must be {kind}" if kind else None
