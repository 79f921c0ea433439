"""B2-DiffuRL: backward progressive training and branch-based sampling for diffusion models (arXiv 2503.11240).

import b2diffurl

run = b2diffurl.finetune("shapes", reward="clip", stages=3)
run = b2diffurl.load("shapes")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from b2diffurl.api.experiment import Experiment, load
    from b2diffurl.api.run import finetune

__all__ = ["Experiment", "finetune", "load"]
__version__ = "0.1.0"
HOMES = {"Experiment": "b2diffurl.api.experiment", "load": "b2diffurl.api.experiment", "finetune": "b2diffurl.api.run"}


def __getattr__(name: str) -> Any:
    """`finetune`, `load` and `Experiment`, imported when first asked for: they import torch, which takes seconds."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
