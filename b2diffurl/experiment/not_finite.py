"""A NaN or an infinity stops a run. Before that, the tensors it came from are written to the stage's debug/."""

from collections.abc import Sequence

from torch import Tensor

from b2diffurl.experiment.stage import Stage
from b2diffurl.runtime import files


def not_finite(stage: Stage, name: str, said: str, tensors: dict[str, Tensor], facts: dict) -> FloatingPointError:
    """Write `tensors` and `facts` to debug/<name>.safetensors; returns the error to raise: `said`, and where the file is.

    The error is returned and not raised here, so that the `raise` stands where the reader looks for it.
    """
    path = stage.debug / f"{name}.safetensors"
    # Copies: safetensors refuses tensors that share memory, as slices of one batch do.
    files.write_tensors(path, {key: tensor.clone() for key, tensor in tensors.items()}, facts)
    return FloatingPointError(f"{said}; what they came from is in {path}")


def listed(ids: Sequence[int], at_most: int = 20) -> str:
    """Ids for an error message: `[3, 4, 7]`, beyond `at_most` of them `[…] and 12 more`."""
    return f"{list(ids[:at_most])}" + (f" and {len(ids) - at_most} more" if len(ids) > at_most else "")
