"""Parts of a pipeline with random weights, written as files without the part ever being in memory: as fast as the disk.

To initialise SDXL by its own layers takes minutes, and twice its size in memory.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

BLOCK = 1 << 24  # numbers that are drawn, and repeated: twice as many bytes
Fill = Callable[[BinaryIO, str, Tensor], None]  # writes the numbers of a tensor of this name and shape, in bfloat16


def make(kind: type, config: Mapping[str, Any]) -> nn.Module:
    """A part of a class of diffusers or transformers."""
    return kind(**config) if hasattr(kind, "load_config") else kind(kind.config_class(**config))


def write_part(folder: Path, name: str, kind: type, config: Mapping[str, Any], fill: Fill) -> None:
    """Write config.json of a part, and its weights in bfloat16 as file `name`, their numbers by `fill`."""
    with torch.device("meta"):
        part = make(kind, config)
    part.save_config(folder) if hasattr(part, "save_config") else part.config.save_pretrained(folder)
    write_weights(folder / name, part, fill)


def write_weights(path: Path, part: nn.Module, fill: Fill) -> None:
    """Write a safetensors file with a part's tensors, each once, their numbers by `fill`."""
    stored = part.state_dict().keys()
    tensors = {name: tensor for name, tensor in (*part.named_parameters(), *part.named_buffers()) if name in stored}
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * math.prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            fill(file, name, tensor)
        file.truncate(8 + len(text) + end)


def hole(file: BinaryIO, name: str, tensor: Tensor) -> None:
    """Write nothing: the file is as long as with numbers, and takes no room."""


def random_numbers() -> Fill:
    """Write numbers of the size that torch's layers begin with: norms 1, biases 0, others uniform by their inputs."""
    block = torch.rand(BLOCK, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16) * 2 - 1

    def fill(file: BinaryIO, name: str, tensor: Tensor) -> None:
        if tensor.dim() < 2:
            value = 1.0 if name.endswith("weight") or tensor.dim() == 0 else 0.0
            write(file, torch.full(tensor.shape, value, dtype=torch.bfloat16))
            return
        scaled = block[: tensor.numel()] / math.sqrt(math.prod(tensor.shape[1:]))
        for start in range(0, tensor.numel(), BLOCK):
            write(file, scaled[: tensor.numel() - start])

    return fill


def write(file: BinaryIO, numbers: Tensor) -> None:
    file.write(numbers.flatten().view(torch.uint8).numpy().data)
