"""Objectives: the losses that an update can minimise. Each is a pure function of tensors, in a module with its options.

The positional parameters of a loss are the terms that it asks for; terms.py lists and computes them. They decide what it is
trained on: transitions of a sampler, or images that are noised again. The keyword parameters are the fields of its options.
A loss returns (loss, metrics). `loss` [N] has a number for each transition or noised image, or each pair of transitions.
`metrics` is a dict of detached tensors whose last dimension is N. The trainer weighs the steps and takes the mean.
Log-probabilities and distances are means over the D latent dimensions.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from b2diffurl.algorithm.noising import HELD_SHARE
from b2diffurl.objectives import options
from b2diffurl.objectives.awm import AwmOptions, awm
from b2diffurl.objectives.d3po import D3poOptions, d3po
from b2diffurl.objectives.ddpo import DdpoOptions, ddpo
from b2diffurl.objectives.dpok import DpokOptions, dpok
from b2diffurl.objectives.nft import NftOptions, nft
from b2diffurl.objectives.reinforce import reinforce
from b2diffurl.objectives.terms import BASE_TERMS, NOISED_TERMS, OLD_TERMS, require_known


@dataclass(frozen=True)
class Objective:
    """A loss, and what the trainer and the checks of a configuration have to know about it."""

    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    options: Any = options.NoOptions  # the class in OBJECTIVES; an instance of it once a configuration has been read
    paired: bool = False  # terms are [2,N]: a group's best sibling, then its worst
    clips: bool = True  # whether it may clip a gradient, so that `clip_fraction` says something
    single_pass: bool = False  # does not correct for samples of an older policy, so one epoch only

    def __post_init__(self) -> None:
        require_known(self.terms)

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the terms that the loss asks for, in the order of its parameters."""
        parameters = inspect.signature(self.loss).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)

    @property
    def on_noised_images(self) -> bool:
        """Whether it is trained on images that are noised again, and not on a sampler's transitions."""
        return set(self.terms) <= {*NOISED_TERMS}

    @property
    def num_passes(self) -> float:
        """The cost of a transition or noised image in evaluations of the network: forward and backward, other policies.

        The backward pass costs as much as the forward one and not twice as much, because gradients of the frozen weights are
        not computed.
        """
        base = float(self.needs_base)
        if self.needs_base and self.on_noised_images and not self.options.base_weight:
            base = HELD_SHARE  # the base policy is evaluated only there
        return 2 + self.needs_old + base

    @property
    def samples(self) -> str:
        """What it is trained on, in a word for people."""
        return "images" if self.on_noised_images else "trajectories"

    @property
    def unused(self) -> set[str]:
        """The terms that are not computed, because the options give them no weight."""
        return set() if isinstance(self.options, type) else options.weightless(self.options)

    @property
    def needs_base(self) -> bool:
        """Whether the loss needs the frozen base policy, another evaluation of the network."""
        return any(name in BASE_TERMS for name in {*self.terms} - self.unused)

    @property
    def needs_old(self) -> bool:
        """Whether the loss needs the policy that sampled evaluated again, on what that has not seen."""
        return any(name in OLD_TERMS for name in {*self.terms} - self.unused)

    def read_options(self, train: Mapping[str, Any]) -> Any:
        """The options of this objective, read from the section `train` of a configuration."""
        return options.read(self.options, train)

    def __call__(self, *terms: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its metrics with the options that `read_options` has returned."""
        return self.loss(*terms, **asdict(self.options))


OBJECTIVES = {
    "ddpo": Objective(ddpo, DdpoOptions),
    "reinforce": Objective(reinforce, clips=False, single_pass=True),
    "dpok": Objective(dpok, DpokOptions),
    "d3po": Objective(d3po, D3poOptions, paired=True),
    "nft": Objective(nft, NftOptions, clips=False),
    "awm": Objective(awm, AwmOptions),
}
