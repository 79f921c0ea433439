"""What a vision model reads of images: the same numbers as its image processor's, made for a whole batch at once.

N images [N,H,W,3], h, w the size that the model reads
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor

WITHOUT_ARITHMETIC = {"do_rescale": False, "do_normalize": False}
WITHOUT_GEOMETRY = {"do_resize": False, "do_center_crop": False}


class Pixels:
    """The image processor of a model directory `root`. Call it with images uint8 [N,H,W,3]: float32 [N,3,h,w].

    The processor resizes and normalises images one by one, in Python. Here it resizes only those that are not yet of the
    model's size, and normalises once each of the 256 values that a pixel can have.
    """

    def __init__(self, root: Path):
        # Always PIL: a reward must not depend on whether torchvision is installed.
        self.processor: Any = AutoImageProcessor.from_pretrained(root, backend="pil", trust_remote_code=False)
        values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
        self.table = self.process(values[None], **WITHOUT_GEOMETRY)[0].flatten(1)  # [3,256]
        self.keeps = cache(self.is_kept)

    def __call__(self, images: Tensor) -> Tensor:
        images = images.permute(0, 3, 1, 2).cpu()
        if not self.keeps(tuple(images.shape[1:])):
            images = self.process(images, **WITHOUT_ARITHMETIC)
        each = zip(self.table, images.unbind(1), strict=True)
        return torch.stack([table[channel.int()] for table, channel in each], 1)

    def process(self, images: Tensor, **options: bool) -> Tensor:
        return self.processor(images=[*images], return_tensors="pt", **options).pixel_values

    def is_kept(self, shape: tuple[int, int, int]) -> bool:
        """Whether the processor leaves an image of this shape [3,H,W] as it is, normalising left out."""
        image = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).byte()
        return torch.equal(self.process(image[None], **WITHOUT_ARITHMETIC)[0], image)
