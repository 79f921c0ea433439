"""What flow-matching models share: a transformer with a LoRA on its attention, sampled by flow matching, and its sizes.

N rows, latents [N,C,h,w]
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from b2diffurl.algorithm.noising import NoiseLevels
from b2diffurl.algorithm.transition import Transitions
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import ModelSettings, Sampling
from b2diffurl.models import Sizes, diffusers_files, flow_schedule, lora
from b2diffurl.models.diffusers_files import ANOTHER_BASE, PipelineSpec
from b2diffurl.models.flow_schedule import SCHEDULER, FlowSchedule
from b2diffurl.models.lora import LoraSpec, State
from b2diffurl.models.pipeline_model import PipelineModel
from b2diffurl.runtime import files

# The layers that carry the LoRA: the attention's projections of the image, and those of the text beside it.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# How the names of the layers begin.
LAYERS = r"(?:single_)?transformer_blocks\.\d+|context_embedder|x_embedder|pos_embed|norm_out|proj_out|time_text_embed"
# Keys of OneTrainer, which ComfyUI reads, too: the layer's name with _ instead of dots.
FLAT_PREFIX = "lora_transformer_"
FLAT_NUMBER = re.compile(r"(blocks|net|to_out)_(\d+)")


def schedulers() -> list[str]:
    return [SCHEDULER]


# ---- sizes ----


@dataclass(frozen=True)
class Layout:
    """How a transformer sees latents."""

    channels: int
    patch: int  # latents that a token stands for, along each side
    side: int  # of the model's own latents
    largest: int  # side for which it has positions


ReadLayout = Callable[[Mapping[str, Any]], Layout]  # from the transformer's config
