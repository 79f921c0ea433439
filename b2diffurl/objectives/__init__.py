"""Objectives: pure functions of tensors, one number a transition (or, for d3po, a pair of transitions).

An objective takes the tensors that `tensors` names, in that order, and its options by keyword, and returns (loss [N],
metrics), the metrics a dict of detached tensors whose last dimension is N. Means, step weights and accumulation are the
trainer's business. Log-probabilities are means over D latent dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from b2diffurl.objectives.d3po import d3po
from b2diffurl.objectives.ddpo import ddpo
from b2diffurl.objectives.dpok import dpok
from b2diffurl.objectives.reinforce import reinforce

REFERENCE_TENSORS = ("ref_log_prob", "kl")  # these need the frozen base policy


@dataclass(frozen=True)
class Objective:
    """What the trainer has to know of an objective."""

    loss: Callable
    tensors: tuple[str, ...]  # among log_prob, old_log_prob, advantage, ref_log_prob, kl
    options: dict[str, str] = field(default_factory=dict)  # keyword -> key of config.train
    paired: bool = False  # tensors are [2,N]: a group's best sibling and its worst
    single_pass: bool = False  # sound for one pass over the selection only

    @property
    def needs_reference(self) -> bool:
        return any(name in REFERENCE_TENSORS for name in self.tensors)


OBJECTIVES = {
    "ddpo": Objective(ddpo, ("log_prob", "old_log_prob", "advantage"), {"clip_range": "eps"}),
    "reinforce": Objective(reinforce, ("log_prob", "old_log_prob", "advantage"), single_pass=True),
    "dpok": Objective(
        dpok, ("log_prob", "old_log_prob", "advantage", "kl"), {"clip_range": "eps", "kl_weight": "kl_weight"}
    ),
    "d3po": Objective(d3po, ("log_prob", "old_log_prob", "ref_log_prob"), {"beta": "dpo_beta"}, paired=True),
}
