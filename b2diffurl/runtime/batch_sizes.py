"""How many rows are worked on at once: as many as the configuration allows, halved where memory does not hold them.

What was found to fit is kept in the experiment's batch_sizes.json, and later phases begin with it. A phase that runs out of
memory halfway has two shapes; killed and gone on with it has the smaller one, which moves its results by rounding.
"""

import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger

T = TypeVar("T")

# Of torch's errors: CUDA's own kind, the CPU's, and what libraries say on a card that is nearly full.
OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "Unable to find a valid cuDNN algorithm",
)  # fmt: skip


class BatchSizes:
    """Sizes by configuration key, at most those `wanted`, on one device."""

    def __init__(
        self, root: Path, device: torch.device, wanted: Mapping[str, int], *, alone: bool = True, given: Sequence = ()
    ):
        """`alone`: no other process waits for this one while it works. `given`: what else decides how much fits."""
        self.path, self.wanted, self.alone, self.given = root / "batch_sizes.json", dict(wanted), alone, list(given)
        self.device = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        found = {one["key"]: one["size"] for one in self._known() if self._is_ours(one)}
        for key, size in found.items():
            logger.info("%s=%d, as %s has it; delete that to try %d again", key, size, self.path, self.wanted[key])
        self.sizes = self.wanted | found

    def fit(self, key: str, work: Callable[[int], T]) -> T:
        """`work(size)`, done again with half the size for as long as memory does not suffice.

        A MemoryError where one row is too much, or where other processes would wait.
        """
        while True:
            size = self.sizes[key]
            try:
                return work(size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error).splitlines()[0]
            # Here and not in the handler, whose traceback holds on to what did not fit.
            if size == 1 or not self.alone:
                raise MemoryError(f"{problem} (with {key}={size})")
            self._halve(key, problem)

    def _halve(self, key: str, problem: str) -> None:
        size, half = self.sizes[key], self.sizes[key] // 2
        logger.warning("out of memory with %s=%d, going on with %d (%s)", key, size, half, problem)
        self.sizes[key] = half
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        entry = {"key": key, "device": self.device, "wanted": self.wanted[key], "given": self.given, "size": half}
        others = [one for one in self._known() if not (one["key"] == key and self._is_ours(one))]
        files.write_record(self.path, {"sizes": [*others, entry]})

    def _known(self) -> list[dict]:
        known = files.read_json(self.path) if self.path.is_file() else []
        return known["sizes"] if isinstance(known, dict) else known  # a list: by an earlier version

    def _is_ours(self, one: dict) -> bool:
        """Whether an entry was found on this device, and where as much was wanted, under the same conditions, as now."""
        mine = (self.device, self.wanted.get(one["key"]), self.given)
        return (one["device"], one["wanted"], one.get("given", [])) == mine


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def sampling_sizes(
    root: Path,
    device: torch.device,
    num_rows: int,
    *,
    micro_batch_size: int,
    decode_batch_size: int,
    given: Sequence,
    alone: bool = True,
) -> BatchSizes:
    """Those of sampling batches of `num_rows` images; a `micro_batch_size` of 0 is the whole batch."""
    sizes = {
        "sample.micro_batch_size": min(micro_batch_size or num_rows, num_rows),
        "sample.decode_batch_size": decode_batch_size,
    }
    return BatchSizes(root, device, sizes, alone=alone, given=given)


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most this process has held: of the device's memory, and on the CPU of the machine's."""
    if device.type == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
