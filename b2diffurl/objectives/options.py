"""An objective's options: a frozen dataclass beside its loss, each field with the key that sets it and what is allowed."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class NoOptions:
    """Of an objective that has none."""


def option(key: str, allowed: str) -> Any:
    """A field set by `train.<key>`, a number that lies in the interval `allowed`, such as `[0, 1]` or `(0, 1e6]`."""
    return field(metadata={"key": key, "allowed": allowed})


def read(kind: type[T], train: Mapping[str, Any]) -> T:
    """The options of dataclass `kind` in the section `train` of a configuration."""
    return kind(**{one.name: train[one.metadata["key"]] for one in fields(kind)})


def limits(kinds: list[type]) -> Iterator[tuple[str, str]]:
    """(key of the configuration, interval) of every option of these dataclasses."""
    for kind in kinds:
        for one in fields(kind):
            assert one.default is MISSING, "an option's default stands in config/stage_process.py"
            yield f"train.{one.metadata['key']}", one.metadata["allowed"]
