"""How many rows are worked on at once: as many as the configuration asks for, halved while memory does not hold them.

The sizes that fitted are kept in the experiment's batch_sizes.json, and later phases begin with them. A network rounds
differently for another number of rows. So a phase that ran out of memory halfway, and was then killed and run again, differs
by rounding from one that was not killed: that one began with the larger size.
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

# Texts by which torch's errors are recognised: of CUDA, of the CPU, and of cuBLAS and cuDNN on a card that is nearly full.
OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "Unable to find a valid cuDNN algorithm",
)  # fmt: skip


class BatchSizes:
    """Batch sizes on one device by configuration key: those that `wanted` asks for, or the smaller ones that fit."""

    def __init__(
        self, root: Path, device: torch.device, wanted: Mapping[str, int], *, alone: bool = True, given: Sequence = ()
    ):
        """`alone`: no other process waits for this one while it works. `given`: what else decides how much fits, as JSON."""
        self.path, self.wanted, self.alone, self.given = root / "batch_sizes.json", dict(wanted), alone, list(given)
        self.device = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        known = {entry["key"]: entry["size"] for entry in self._entries() if self._applies(entry)}
        for key, size in known.items():
            logger.info("%s=%d, as in %s; delete that file to try %d again", key, size, self.path, self.wanted[key])
        self.sizes = self.wanted | known

    def fit(self, key: str, work: Callable[[int], T]) -> T:
        """Return `work(size)`; if it runs out of memory, halve the size and call it again.

        Raises a MemoryError if one row is too much, or if other processes would wait for this one meanwhile.
        """
        while True:
            size = self.sizes[key]
            try:
                return work(size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error).splitlines()[0]
            # Not inside the handler: there the error's traceback still holds the tensors that did not fit.
            if size == 1 or not self.alone:
                raise MemoryError(f"{problem} (with {key}={size})")
            self._halve(key, problem)

    def _halve(self, key: str, problem: str) -> None:
        """Halve the size of `key`, and record it for later phases."""
        size, half = self.sizes[key], self.sizes[key] // 2
        logger.warning("out of memory with %s=%d, going on with %d (%s)", key, size, half, problem)
        self.sizes[key] = half
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        entry = {"key": key, "device": self.device, "wanted": self.wanted[key], "given": self.given, "size": half}
        others = [other for other in self._entries() if not (other["key"] == key and self._applies(other))]
        files.write_record(self.path, {"sizes": [*others, entry]})

    def _entries(self) -> list[dict]:
        """The content of batch_sizes.json."""
        content = files.read_json(self.path) if self.path.is_file() else []
        return content["sizes"] if isinstance(content, dict) else content  # earlier versions wrote a bare list

    def _applies(self, entry: dict) -> bool:
        """Whether an entry was made on this device, for the same wanted size, under the same conditions."""
        now = (self.device, self.wanted.get(entry["key"]), self.given)
        return (entry["device"], entry["wanted"], entry.get("given", [])) == now


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of Python or torch says that memory is used up."""
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
    """The sizes for sampling batches of `num_rows` images: rows of the network, and latents decoded at once.

    A `micro_batch_size` of 0 stands for the whole batch.
    """
    sizes = {
        "sample.micro_batch_size": min(micro_batch_size or num_rows, num_rows),
        "sample.decode_batch_size": decode_batch_size,
    }
    return BatchSizes(root, device, sizes, alone=alone, given=given)


def peak_memory(device: torch.device) -> dict[str, int]:
    """{"peak_memory_bytes": the most that this process has held} of the GPU's memory, or on the CPU of the machine's."""
    if device.type == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device)}
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in kilobytes on Linux
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
