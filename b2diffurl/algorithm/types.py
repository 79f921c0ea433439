"""Types that the mathematics and its callers share.

N rows, latents [N,C,H,W]
"""

from collections.abc import Callable

from torch import Tensor

Conditions = dict[str, Tensor]  # what the network is conditioned on, by name, such as text embeddings: each [N, ...]
Predict = Callable[[Tensor, int], Tensor]  # (x_t [N,C,H,W], step) -> guided model output [N,C,H,W]
Noise = Callable[[tuple[int, ...]], Tensor]  # shape -> standard normal noise
