"""A loaded pipeline of diffusers whose network carries a LoRA: all of a `Model` that does not depend on the kind of network.

N rows, P prompts, latents [N,C,h,w], images [N,H,W,3]
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from b2diffurl.algorithm.types import Conditions
from b2diffurl.configuration.settings import ModelSettings
from b2diffurl.models import diffusers_files, lora
from b2diffurl.models.diffusers_files import PipelineSpec
from b2diffurl.models.lora import LoraSpec, State

Shape = tuple[int, int, int]
ALIGNMENT = 64  # bytes, of torch's memory on the CPU
MAX_GRAPHS = 256  # a block's graphs differ by number of rows, width, resolution, with and without gradient or LoRA


class PipelineModel:
    """The parts of a frozen pipeline, and the LoRA on its network.

    A family's class adds the sampler and the text encoder, and says how its network is called (`output`).
    """

    spec: ClassVar[PipelineSpec]
    lora_spec: ClassVar[LoraSpec]
    compiled: ClassVar[tuple[str, ...]]  # classes of the network's blocks that are compiled, each by itself

    def __init__(self, model: ModelSettings, *, device: torch.device, dtype: torch.dtype, seed: int, decoder: bool):
        self.lora_spec = type(self).lora_spec.chosen(mlp=model.lora.mlp)
        self.parts: dict[str, Any] = diffusers_files.load_parts(model, self.spec, dtype, decoder=decoder)
        self.fingerprint = diffusers_files.fingerprint(model, self.spec)
        self._encoders_rest = torch.device("cpu") if model.offload else device
        for name in self.spec.weights.keys() & self.parts.keys():
            where = self._encoders_rest if name in self.spec.encoders else device
            align(self.parts[name].to(where).eval().requires_grad_(False))
        lora.add_lora(self.bare, self.lora_spec, rank=model.lora.rank, seed=seed)
        self._trainable = lora.lora_parameters(self.bare)  # looked up once: it walks through the whole network
        # Kept for `reset`: loading a checkpoint overwrites the fresh LoRA.
        self._fresh = {name: parameter.detach().clone() for name, parameter in self.trainable().items()}
        self.network: nn.Module = self.bare  # callers may wrap this one
        self._encoded: dict[str, Conditions] = {}  # of prompts, each tensor [1, ...] in main memory

    @property
    def bare(self) -> Any:
        """The network with its LoRA, and nothing wrapped around it."""
        return self.parts[self.spec.network]

    @contextmanager
    def encoders_at_work(self) -> Iterator[None]:
        """A context in which the text encoders are on the network's device. With `pretrained.offload` they then leave it."""
        for name in self.spec.encoders:
            self.parts[name].to(self.bare.device)
        try:
            yield
        finally:
            for name in self.spec.encoders:
                self.parts[name].to(self._encoders_rest)

    @classmethod
    def measure(cls, network: Mapping[str, Any], vae: Mapping[str, Any], resolution: int) -> tuple[Shape, tuple[int, int]]:
        """C, h, w of latents, and height and width of images in pixels, by the configs of network and VAE.

        With `resolution` 0, the images' side in pixels, they are the model's own. A ValueError says which ones it can draw.
        """
        raise NotImplementedError

    def encode(self, prompts: list[str]) -> Conditions:
        """Each prompt by itself, and once. With other numbers of rows products round differently, so its embedding would
        depend on the prompts beside it; and training, which has one for all batches, would find other ratios than 1."""
        if unknown := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]:
            with self.encoders_at_work():
                for prompt in unknown:
                    self._encoded[prompt] = {name: value.cpu() for name, value in self.encode_one(prompt).items()}
        each = [self._encoded[prompt] for prompt in prompts]
        return {name: torch.cat([one[name] for one in each]).to(self.bare.device) for name in each[0]}

    def encode_one(self, prompt: str) -> Conditions:
        """What the network is conditioned on for a prompt, each tensor [1, ...], as its pipeline makes it."""
        raise NotImplementedError

    def unconditional(self) -> Conditions:
        return self.encode([""])

    def prepare(self, prompts: Collection[str]) -> None:
        wanted = ["", *prompts]
        self._encoded = {prompt: self._encoded[prompt] for prompt in wanted if prompt in self._encoded}
        self.encode(wanted)

    def output(self, x_t: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The network's own output [N,C,h,w] float32 for timesteps [N] and conditions [N, ...], without guidance."""
        raise NotImplementedError

    def predict(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        unconditional: Conditions,
        guidance_scale: float,
        *,
        unconditional_gradient: bool = True,
    ) -> Tensor:
        conditions = {name: value.expand(len(x_t), *value.shape[1:]) for name, value in conditions.items()}
        timesteps = timesteps.expand(len(x_t))
        if guidance_scale == 1:  # guidance would return the conditional output, at twice the cost
            return self.output(x_t, timesteps, conditions)
        # Classifier-free guidance, arXiv 2207.12598: eps = eps(empty) + scale * (eps(prompt) - eps(empty)).
        nothing = {name: unconditional[name].expand_as(value) for name, value in conditions.items()}
        if unconditional_gradient:
            both = {name: torch.cat([nothing[name], value]) for name, value in conditions.items()}
            without, with_text = self.output(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), both).chunk(2)
        else:
            # Two calls: within one, autograd would keep the activations of the unconditional half too.
            with torch.no_grad():
                without = self.output(x_t, timesteps, nothing)
            with_text = self.output(x_t, timesteps, conditions)
        return without + guidance_scale * (with_text - without)

    def reset(self) -> None:
        from accelerate.utils import extract_model_from_parallel

        self.network = extract_model_from_parallel(self.network, keep_fp32_wrapper=False)
        self.network._is_accelerate_prepared = False  # accelerate wraps no network that has this mark
        self.bare.disable_gradient_checkpointing()
        for name, parameter in self.trainable().items():
            parameter.data.copy_(self._fresh[name])
            parameter.grad = None

    def twin(self) -> "PipelineModel":
        # The values are the same memory, which the optimizer changes in place.
        own = {name: nn.Parameter(parameter.data) for name, parameter in self.trainable().items()}
        shared = {id(tensor): tensor for tensor in (*self.bare.parameters(), *self.bare.buffers())}
        copied = shared | {id(parameter): own[name] for name, parameter in self.trainable().items()}
        twin = copy.copy(self)
        twin.network = copy.deepcopy(self.network, copied)
        twin.parts = self.parts | {self.spec.network: copied[id(self.bare)]}
        twin._trainable = own
        return twin

    def checkpoint_gradients(self) -> None:
        self.bare.enable_gradient_checkpointing()

    @property
    def is_compiled(self) -> bool:
        block = next((module for module in self.bare.modules() if type(module).__name__ in self.compiled), None)
        return getattr(block, "_compiled_call_impl", None) is not None

    def compile(self) -> None:
        """Compile block by block: equal blocks share their code, and a later process reads it back in seconds.

        Not `dynamic`, so each number of rows is compiled by itself: for an open number of rows torch keeps convolutions in
        the slower memory layout.
        """
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MAX_GRAPHS
        self.bare.to(memory_format=torch.channels_last)  # else blocks would convert between layouts, back and forth
        for module in self.bare.modules():
            if type(module).__name__ in self.compiled:
                module.compile(dynamic=False)

    @contextmanager
    def base_policy(self) -> Iterator[None]:
        self.bare.disable_adapters()
        try:
            yield
        finally:
            self.bare.enable_adapters()

    @contextmanager
    def with_lora(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        own = {name: parameter.data for name, parameter in self.trainable().items()}
        for name, parameter in self.trainable().items():
            parameter.data = parameters[name]
        try:
            yield
        finally:
            for name, parameter in self.trainable().items():
                parameter.data = own[name]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.parts["vae"]
        images = vae.decode(self.vae_latents(latents.to(vae.dtype)), return_dict=False)[0]
        if not images.isfinite().all():  # a VAE may overflow in fp16
            raise FloatingPointError("the VAE decoded to non-finite values; use --config.mixed_precision=bf16 or no")
        images = (images.float() / 2 + 0.5).clamp(0, 1) * 255
        return images.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def vae_latents(self, latents: Tensor) -> Tensor:
        """The latents in the scale of the VAE, of those in the scale of the network."""
        return latents / self.parts["vae"].config.scaling_factor

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self._trainable)

    def adapter_state(self) -> State:
        return {self.lora_spec.key(name): parameter.detach() for name, parameter in self.trainable().items()}

    def load_adapter(self, path: Path) -> None:
        lora.load_lora(self.bare, path, self.lora_spec)


def align(part: nn.Module) -> None:
    """Move tensors that lie in memory as in a file, which may begin anywhere, to where torch would put them.

    Products of the same numbers round differently by where they lie; and some launchers make torch copy them, others not.
    """
    for tensor in (*part.parameters(), *part.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
