"""Batches of a stage's images that a reward has scored before the stage as a whole is: stage<i>/scored/<reward>_<id>.json.

Only rewards that wait for another program have them (`waits` in b2diffurl/rewards). Their scores may cost money or a long
time, so none is asked for twice: not if the batch was scored while the stage was sampled, and not after a failure.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from b2diffurl.experiment.stage import Stage
from b2diffurl.runtime import files


@dataclass(frozen=True)
class ScoredBatches:
    """Those of one reward."""

    stage: Stage
    reward: str
    identity: str  # of everything but images and prompts that decides a score
    may_lack_scores: bool  # whether an image may have none; otherwise a NaN says that the other program is wrong
    keeps_holes: bool  # whether a batch is kept though an image of it has no score: it gets one from its prompt's others

    def key(self, images: Tensor, prompts: Sequence[str]) -> str:
        """A checksum of what decides the scores of a batch: images uint8 [N,H,W,3], prompts [N], and the reward."""
        pixels = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        return files.digest([self.identity, list(images.shape), pixels, list(prompts)])

    def find(self, start: int, key: str) -> dict[str, Any] | None:
        """What was kept of the batch that begins with image `start`; None if nothing was, or of another batch."""
        path = self.stage.scored_batch(self.reward, start)
        try:
            kept = files.read_json(path) if path.is_file() else {}
        except ValueError:  # damaged: scored again
            return None
        return kept.get("scores") if isinstance(kept, dict) and kept.get("key") == key else None

    def keep(self, start: int, key: str, scores: dict[str, Any]) -> None:
        """Keep a batch's scores, as JSON has them."""
        files.write_record(self.stage.scored_batch(self.reward, start), {"key": key, "scores": scores})

    def clear(self) -> None:
        """Forget all batches: the program that scored them has given a wrong answer, and may be mended before the next."""
        for path in self.stage.ours(self.stage.scored):
            if path.name.startswith(f"{self.reward}_"):
                path.unlink(missing_ok=True)
