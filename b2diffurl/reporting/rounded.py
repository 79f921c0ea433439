"""An Interval in figures, rounded as all figures are (`evaluation_table.with_error`), accuracies in percent."""

from b2diffurl.evaluation.intervals import Interval
from b2diffurl.experiment.evaluation_table import decimals, with_error


def mean_text(figure: str, found: Interval, *, signed: bool = False) -> str:
    """The mean ± its standard error. `signed` is for differences: `+3.1 ± 2.0 points`."""
    return with_error({figure: found.mean, f"{figure}_se": found.error}, figure, signed=signed)


def ends_text(figure: str, found: Interval, *, signed: bool = False) -> tuple[str, ...]:
    """Both ends of its 95 % interval; () of a single unit, which has none."""
    if found.low is None:
        return ()
    percent, places = (100, 1) if figure == "accuracy" else (1, decimals(found.mean, found.error))
    return tuple(f"{percent * end:{'+' if signed else ''}.{places}f}" for end in (found.low, found.high))
