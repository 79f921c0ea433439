"""An objective's options: a frozen dataclass beside its loss, each field with its configuration key and allowed values."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class NoOptions:
    """For an objective without options."""


def option(key: str, allowed: str, *, term: str = "") -> Any:
    """A dataclass field that `train.<key>` sets, a number in the interval `allowed`, such as `[0, 1]` or `(0, 1e6]`.

    `term` is the term that it weighs, if it weighs one. A term without any weight is not computed, and the loss gets None.
    """
    return field(metadata={"key": key, "allowed": allowed, "term": term})


def read(kind: type[T], train: Mapping[str, Any]) -> T:
    """An instance of the dataclass `kind` with the values from the section `train` of a configuration."""
    return kind(**{option_field.name: train[option_field.metadata["key"]] for option_field in fields(kind)})


def weightless(options: Any) -> set[str]:
    """The terms whose weights are all 0 in these options."""
    weights = [(one.metadata["term"], getattr(options, one.name)) for one in fields(options) if one.metadata["term"]]
    return {term for term, _ in weights} - {term for term, weight in weights if weight}


def limits(kinds: list[type]) -> Iterator[tuple[str, str]]:
    """(configuration key, allowed interval) of every option of these dataclasses."""
    for kind in kinds:
        for option_field in fields(kind):
            # A second default here could contradict the first.
            assert option_field.default is MISSING, "an option's default stands in config/stage_process.py"
            yield f"train.{option_field.metadata['key']}", option_field.metadata["allowed"]
