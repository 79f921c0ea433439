"""Objectives: what one update minimises. Each is a pure function of tensors, in a module of its own beside its options.

The positional parameters of a loss are the terms that it asks for; terms.py says which there are, and computes them. Its
keyword parameters are the fields of its options. It returns (loss [N], metrics): one number for each transition, or for each
pair of transitions, and a dict of detached tensors whose last dimension is N. The trainer takes means, weighs steps and adds
up. Log-probabilities are means over the D latent dimensions.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from b2diffurl.objectives import options
from b2diffurl.objectives.d3po import D3poOptions, d3po
from b2diffurl.objectives.ddpo import DdpoOptions, ddpo
from b2diffurl.objectives.dpok import DpokOptions, dpok
from b2diffurl.objectives.reinforce import reinforce
from b2diffurl.objectives.terms import BASE_TERMS, require_known


@dataclass(frozen=True)
class Objective:
    """A loss, and what the trainer has to know of it."""

    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    options: Any = options.NoOptions  # a dataclass; with its values once a configuration has been read
    paired: bool = False  # terms are [2,N]: a group's best sibling and its worst
    single_pass: bool = False  # sound for one pass over the selection only

    def __post_init__(self) -> None:
        require_known(self.terms)

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the terms that the loss asks for, in its order."""
        parameters = inspect.signature(self.loss).parameters.values()
        return tuple(one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD)

    @property
    def needs_base(self) -> bool:
        """Whether the frozen base policy has to be evaluated, too."""
        return any(name in BASE_TERMS for name in self.terms)

    def read_options(self, train: Mapping[str, Any]) -> Any:
        """The options in the section `train` of a configuration."""
        return options.read(self.options, train)

    def __call__(self, *terms: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its metrics, by the options at hand."""
        return self.loss(*terms, **asdict(self.options))


OBJECTIVES = {
    "ddpo": Objective(ddpo, DdpoOptions),
    "reinforce": Objective(reinforce, single_pass=True),
    "dpok": Objective(dpok, DpokOptions),
    "d3po": Objective(d3po, D3poOptions, paired=True),
}
