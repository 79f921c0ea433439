"""What one key may be: a number in an interval, one of some names, a kind of text. Which key is what stands in keys.py."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

NAME_BYTES = 200  # of an experiment: what is made of its name, such as a log file's, must be a file name, too


class Limit(Protocol):
    """What the values of a key have in common."""

    def check(self, key: str, value: Any) -> None:
        """A ValueError that says what was given and what is allowed."""


@dataclass(frozen=True)
class Number:
    """A number in an interval, written like `[0, 1)`; or that or one value beside it: `-1 or [0, 1]`."""

    interval: str
    why: str = ""  # the reason for an end of it, or what the value beside it means

    @property
    def bounds(self) -> tuple[float | None, float, float, str]:
        """The value beside the interval, or None; its ends; its two brackets."""
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
class Choice:
    """One of these names."""

    names: tuple[str, ...]

    def check(self, key: str, value: Any) -> None:
        check_choice(key, value, self.names)


@dataclass(frozen=True)
class Names:
    """Any number of these names; without any here, of names that those who use them know."""

    known: tuple[str, ...] = ()

    def check(self, key: str, value: Any) -> None:
        for name in value if self.known else ():
            check_choice(key, name, self.known)


@dataclass(frozen=True)
class Steps:
    """A number of sampler steps, which rules.py holds to sample.num_steps."""

    def check(self, key: str, value: Any) -> None:
        pass


@dataclass(frozen=True)
class Switch:
    """On or off, to which the configuration holds by itself."""

    def check(self, key: str, value: Any) -> None:
        pass


@dataclass(frozen=True)
class Text:
    """Text that UTF-8 has bytes for, and not only blanks."""

    may_be_empty: bool = False
    may_have_lines: bool = False  # line breaks, tabs and control characters; else it is printable, for it names something

    def check(self, key: str, value: Any) -> None:
        odd = [one for one in value if (has_no_bytes(one) if self.may_have_lines else not one.isprintable())]
        if odd:
            raise ValueError(f"{key} is {shown(value)}; it must be text without {odd[0]!r}")
        if not value.strip() and (value or not self.may_be_empty):
            raise ValueError(f"{key} is {value!r}; it must not be blank")


@dataclass(frozen=True)
class Name(Text):
    """An experiment's name, which is that of a folder right under save_path."""

    def check(self, key: str, value: Any) -> None:
        super().check(key, value)
        if not re.fullmatch(r"[\w.-]+", value) or not value.strip("."):
            raise ValueError(f"{key} is {shown(value)}; allowed are letters, digits, '_', '-' and '.'")
        if len(value.encode()) > NAME_BYTES:
            raise ValueError(f"{key} is {shown(value)}, {len(value.encode())} bytes; it must have at most {NAME_BYTES}")


@dataclass(frozen=True)
class Folder(Text):
    """The path of a folder, which need not be there yet but can be made."""

    def check(self, key: str, value: Any) -> None:
        super().check(key, value)
        path = Path(value)
        try:
            there = next(place for place in (path, *path.parents) if os.path.lexists(place) or place.exists())
            reason = "" if there.is_dir() else f"{there} is no folder"
        except OSError as error:
            reason = error.strerror
        if reason:
            raise ValueError(f"{key} is {shown(value)}; it must be a folder, or one that can be made ({reason:.200})")


@dataclass(frozen=True)
class Mixture:
    """Weights by the names of rewards, or None for no mixture."""

    def check(self, key: str, value: Any) -> None:
        if value is None:
            return
        if not isinstance(value, Mapping) or not value:
            raise ValueError(f'{key} is {shown(value)}; it must be like {{"clip": 1.0, "aesthetic": 0.1}}')
        for name, weight in value.items():
            if not isinstance(name, str) or not name or type(weight) not in (int, float) or not 0 < abs(weight) <= 1e6:
                raise ValueError(f"{key} has {shown(weight)} for {shown(name)}; it must give names numbers up to 1e6, not 0")


@dataclass(frozen=True)
class Unknown:
    """The value of a key that only a config file of the user's own has."""

    def check(self, key: str, value: Any) -> None:
        if isinstance(value, str):
            Text().check(key, value)


def check_value(key: str, value: Any, limit: Limit) -> None:
    """Refuse a value that is not within `limit`. None is one for a mixture only."""
    if value is None and not isinstance(limit, Mixture):
        raise ValueError(f"{key} is None; it must have a value")
    limit.check(key, value)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse what is not among the choices, and list them."""
    if value not in choices:
        raise ValueError(f"{name} is {shown(value)}; known: {', '.join(repr(choice) for choice in choices)}")


def has_no_bytes(character: str) -> bool:
    """Whether it is a half of a character (a surrogate), which UTF-8 cannot write."""
    return "\ud800" <= character <= "\udfff"


def shown(value: Any) -> str:
    """A value as Python writes it, in one line, its beginning if it is long."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 100 else f"{text[:100]}…"
