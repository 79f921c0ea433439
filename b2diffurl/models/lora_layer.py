"""A linear layer with a LoRA, as peft's, without the work that peft does for what a LoRA here never has.

x [N,in], base weight W [out,in], LoRA A [r,in] and B [out,r]
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor
from torch.nn.functional import linear


class LoraLinear(Linear):
    """(W + B A) x: one adapter of the name `default`, without dropout, scaled by alpha / rank = 1, never merged for good.

    B A is added to W where that is less work than W x + B (A x), in a narrow layer in float32. Elsewhere the result is that
    of peft's own layer to the bit.
    """

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        base = self.base_layer
        if self.disable_adapters:
            return base(x)
        A, B = self.lora_A["default"].weight, self.lora_B["default"].weight
        if base.weight.dtype == torch.float32 and base.weight.numel() < 3 * (A.numel() + B.numel()):
            # By row of x: 3 r (in + out) products forward and backward are saved, and in * out are made for W's gradient.
            return linear(x, torch.addmm(base.weight, B, A), base.bias)
        # Contiguous, because of a slice, such as the image's rows of joint attention, torch computes the product in another
        # order if a gradient is wanted. Sampling and training would differ by rounding.
        return base(x) + linear(linear(x.contiguous(), A), B)
