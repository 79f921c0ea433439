"""The exponential average of a LoRA over training's updates. It lacks much of the noise that single updates leave."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Average:
    """The exponential average of a LoRA's matrices.

        average <- d average + (1 - d) LoRA        d = min(decay, (1 + n) / (10 + n)) after n earlier updates

    d begins small so that the average soon forgets the LoRA that training began with, whose weight after n updates would
    otherwise be decay^n. The same warm-up is in TensorFlow's ExponentialMovingAverage (`num_updates`), in EMAModel of
    diffusers and in Flow-GRPO (arXiv 2505.05470). While it lasts the mean age of what is averaged is a tenth of all updates.

    A and B of a layer are averaged each on its own, as EMAModel does. Their product is not the average of the products B A,
    which has a higher rank: it lacks the covariance of A and B over the updates that count.
    """

    decay: float
    tensors: dict[str, Tensor]  # float32; they are changed in place
    num_updates: int = 0  # that have been averaged, in all stages

    def add(self, lora: Mapping[str, Tensor]) -> None:
        """Average in the LoRA as an update has left it."""
        kept = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, value in lora.items():
            self.tensors[name].lerp_(value, 1 - kept)  # of two equal numbers exactly that number
        self.num_updates += 1
