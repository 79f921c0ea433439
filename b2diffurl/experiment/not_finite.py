"""Numbers that are not finite stop a run; what they came from is kept first."""

from collections.abc import Sequence

from torch import Tensor

from b2diffurl.experiment.stage import Stage
from b2diffurl.runtime import files


def not_finite(stage: Stage, name: str, said: str, tensors: dict[str, Tensor], facts: dict) -> FloatingPointError:
    """Write `tensors` and `facts` to debug/<name>.safetensors and return the error to raise, which begins with `said`."""
    path = stage.debug / f"{name}.safetensors"
    files.write_tensors(path, {key: tensor.clone() for key, tensor in tensors.items()}, facts)
    return FloatingPointError(f"{said}; what they came from is in {path}")


def listed(ids: Sequence[int], at_most: int = 20) -> str:
    """Numbers in words: the first ones, and how many more."""
    return f"{list(ids[:at_most])}" + (f" and {len(ids) - at_most} more" if len(ids) > at_most else "")
