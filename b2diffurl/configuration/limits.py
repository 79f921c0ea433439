"""Kinds of limits for a key's value: a number in an interval, one of some names, a kind of text. keys.py uses them."""

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

NAME_BYTES = 200  # of an experiment's name; file systems allow 255 for a file, and ours append to it, such as `.log`


class Limit(Protocol):
    """What a key may be."""

    def check(self, key: str, value: Any) -> None:
        """Raise a ValueError that says what was given and what is allowed, if `value` is not."""


@dataclass(frozen=True)
class Number:
    """A number in an interval such as `[0, 1)`, or one special value or an interval: `-1 or [0, 1]`."""

    interval: str
    why: str = ""  # added to the error: why a bound is there, or what the special value means

    @property
    def bounds(self) -> tuple[float | None, float, float, str]:
        """(special value or None, lower bound, upper bound, the two brackets)."""
        single, opening, low, high, closing = re.fullmatch(r"(?:(.+) or )?([\[(])(.+), (.+)([\])])", self.interval).groups()
        return float(single) if single else None, float(low), float(high), opening + closing

    def check(self, key: str, value: Any) -> None:
        single, low, high, (opening, closing) = self.bounds
        inside = low <= value <= high and not (opening == "(" and value == low) and not (closing == ")" and value == high)
        if isinstance(value, bool) or not (inside or value == single):
            must = f"lie in {self.interval}" if single is None else f"be {self.interval.replace(' or ', ' or lie in ')}"
            why = f": {self.why}" if self.why else ""
            raise ValueError(f"{key} is {shown(value)}; it must {must}{why}")


@dataclass(frozen=True)
class Counts:
    """A list of whole numbers, each in an interval such as `[2, 9]`."""

    interval: str

    def check(self, key: str, value: Any) -> None:
        for one in value:
            if type(one) is not int:
                raise ValueError(f"{key} is {shown(value)}; it must be whole numbers, like (2, 3)")
            Number(self.interval).check(f"a number of {key}", one)


@dataclass(frozen=True)
class Choice:
    """One of these names."""

    names: tuple[str, ...]

    def check(self, key: str, value: Any) -> None:
        check_choice(key, value, self.names)


@dataclass(frozen=True)
class Names:
    """A list of names, all of them in `known`. If `known` is empty, names are checked where they are used."""

    known: tuple[str, ...] = ()

    def check(self, key: str, value: Any) -> None:
        for name in value if self.known else ():
            check_choice(key, name, self.known)


@dataclass(frozen=True)
class Steps:
    """A number of sampler steps. rules.py checks it against sample.num_steps."""

    def check(self, key: str, value: Any) -> None:
        pass


@dataclass(frozen=True)
class Switch:
    """True or False. ml_collections refuses other types itself."""

    def check(self, key: str, value: Any) -> None:
        pass


@dataclass(frozen=True)
class Text:
    """Text that UTF-8 can encode, and that is not only blanks."""

    may_be_empty: bool = False
    may_have_lines: bool = False  # whether line breaks, tabs and control characters are allowed; names must be printable

    def check(self, key: str, value: Any) -> None:
        refused = [one for one in value if (is_surrogate(one) if self.may_have_lines else not one.isprintable())]
        if refused:
            raise ValueError(f"{key} is {shown(value)}; it must be text without {refused[0]!r}")
        if not value.strip() and (value or not self.may_be_empty):
            raise ValueError(f"{key} is {value!r}; it must not be blank")


@dataclass(frozen=True)
class Name(Text):
    """An experiment's name. It is also the name of the folder under save_path, so `/` and `..` are refused."""

    def check(self, key: str, value: Any) -> None:
        super().check(key, value)
        if not re.fullmatch(r"[\w.-]+", value) or not value.strip("."):
            raise ValueError(f"{key} is {shown(value)}; allowed are letters, digits, '_', '-' and '.'")
        if len(value.encode()) > NAME_BYTES:
            raise ValueError(f"{key} is {shown(value)}, {len(value.encode())} bytes; it must have at most {NAME_BYTES}")


@dataclass(frozen=True)
class Folder(Text):
    """The path of a folder that exists or can be created."""

    def check(self, key: str, value: Any) -> None:
        super().check(key, value)
        path = Path(value)
        try:
            # The nearest parent that exists decides whether the folder can be created. lexists also finds broken links.
            nearest = next(place for place in (path, *path.parents) if os.path.lexists(place) or place.exists())
            reason = "" if nearest.is_dir() else f"{nearest} is no folder"
        except OSError as error:
            reason = error.strerror
        if reason:
            raise ValueError(f"{key} is {shown(value)}; it must be a folder, or one that can be made ({reason:.200})")


@dataclass(frozen=True)
class File(Text):
    """The path of a file, or of a folder with one. Whether it is there shows where it is read."""


@dataclass(frozen=True)
class ModelName(Text):
    """The name of a model: a hub id, or a path."""


@dataclass(frozen=True)
class Mixture:
    """{name of a reward: its weight, not 0}, or None for no mixture."""

    def check(self, key: str, value: Any) -> None:
        if value is None:
            return
        if not isinstance(value, Mapping) or not value:
            raise ValueError(f'{key} is {shown(value)}; it must be like {{"clip": 1.0, "aesthetic": 0.1}}')
        for name, weight in value.items():
            if not isinstance(name, str) or not name or type(weight) not in (int, float) or not 0 < abs(weight) <= 1e6:
                raise ValueError(f"{key} has {shown(weight)} for {shown(name)}; it must give names numbers up to 1e6, not 0")


@dataclass(frozen=True)
class Entries:
    """{name: a number, a text, True, False, None, or a list of these}, or None for no entries."""

    def check(self, key: str, value: Any) -> None:
        if value is None:
            return
        if not isinstance(value, Mapping):
            raise ValueError(f'{key} is {shown(value)}; it must be like {{"timestep_spacing": "leading"}}')
        for name, entry in value.items():
            plain = entry if isinstance(entry, (list, tuple)) else [entry]
            if not isinstance(name, str) or not all(isinstance(one, (int, float, str, type(None))) for one in plain):
                raise ValueError(f"{key} has {shown(entry)} for {shown(name)}; it must give names numbers or texts")


@dataclass(frozen=True)
class JsonObject:
    """{name: anything that JSON has}, or None for nothing."""

    def check(self, key: str, value: Any) -> None:
        try:
            if value is None or isinstance(json.loads(json.dumps(value, allow_nan=False)), dict):
                return
        except (TypeError, ValueError, RecursionError):
            pass
        raise ValueError(f'{key} is {shown(value)}; it must be an object as JSON has it, like {{"top_p": 1}}')


@dataclass(frozen=True)
class Unknown:
    """Any value, of a key that we do not know: users may add keys in a config file of their own. Text must be printable."""

    def check(self, key: str, value: Any) -> None:
        if isinstance(value, str):
            Text().check(key, value)


def check_value(key: str, value: Any, limit: Limit) -> None:
    """Raise a ValueError if the value is not within `limit`. Only a mixture, entries and an object may be None."""
    if value is None and not isinstance(limit, (Mixture, Entries, JsonObject)):
        raise ValueError(f"{key} is None; it must have a value")
    limit.check(key, value)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise a ValueError that lists the choices if `value` is none of them."""
    if value not in choices:
        raise ValueError(f"{name} is {shown(value)}; known: {', '.join(repr(choice) for choice in choices)}")


def is_surrogate(character: str) -> bool:
    """Whether this is half of a character (a surrogate), which UTF-8 cannot encode."""
    return "\ud800" <= character <= "\udfff"


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Begin an error about a file with the key that gives the file."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{key}: {error}") from None


def shown(value: Any) -> str:
    """A value for an error message: its repr in one line, cut after 100 characters."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 100 else f"{text[:100]}…"
