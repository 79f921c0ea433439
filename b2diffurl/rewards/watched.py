"""A reward that is only watched. Nothing depends on it, so its errors leave holes in the records and stop no run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from b2diffurl.experiment.not_finite import listed
from b2diffurl.rewards import Parts, Reward, score, spent_by
from b2diffurl.runtime.batch_sizes import is_out_of_memory
from b2diffurl.runtime.logs import logger


class Watched:
    """A reward function whose errors become one warning, and NaN for the images that it has not scored by then.

    Memory that is used up stays an error: a smaller batch may do, and the error names the setting.
    """

    def __init__(self, name: str, load: Callable[[], Reward]):
        self.name, self.load = name, load
        self.reward: Reward | None = None
        self.where, self.lost = "", True

    def begin(self, where: str) -> None:
        """Load the reward unless it is, and ask it again if it was lost; `where` is what the log calls this work."""
        self.where, self.lost = where, False
        with self.forgiving():
            self.reward = self.reward or self.load()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Parts]:
        if not self.lost:
            with self.forgiving():
                return score(self.reward, images, prompts)
        return torch.full((len(prompts),), torch.nan), {}

    def spent(self) -> dict[str, int]:
        return spent_by(self.reward)

    def warn_of_holes(self, rewards: Tensor) -> None:
        """Log which of the images [N] have a reward that is NaN or infinite, unless the reward was lost, which is logged."""
        holes = (~rewards.isfinite()).nonzero().flatten().tolist()
        if holes and not self.lost:
            told = "%s: watched reward %s is not finite for images %s; it is left out there"
            logger.warning(told, self.where, self.name, listed(holes))

    @contextmanager
    def forgiving(self) -> Iterator[None]:
        """Go on after an error in the block, which ends this reward's work here."""
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.lost = True
            logger.debug("watched reward %s failed", self.name, exc_info=True)
            said = " ".join(str(error).split())[:300] or type(error).__name__
            logger.warning("%s: watched reward %s is left out from here on: %s", self.where, self.name, said)
