"""Stable Diffusion 1.x and 2.x (epsilon and v-prediction), and every model of their layout.

The functions are those of `b2diffurl.models.Family`, the class is a `b2diffurl.models.Model`; both are documented there.

N rows, P prompts, L tokens, E text width, latents [N,C,h,w]
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from b2diffurl.algorithm.noising import NoiseLevels
from b2diffurl.algorithm.transition import Transitions
from b2diffurl.algorithm.types import Conditions
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import ModelSettings, Sampling
from b2diffurl.models import Description, Sizes, diffusers_files, lora, noise_schedule, whole
from b2diffurl.models.diffusers_files import ANOTHER_BASE, PipelineSpec
from b2diffurl.models.lora import LoraSpec, State
from b2diffurl.runtime import files

COMPILED = ("ResnetBlock2D", "BasicTransformerBlock")  # blocks of the UNet that are compiled, each by itself
MAX_GRAPHS = 256  # a block's graphs differ by number of rows, width, resolution, with and without gradient or LoRA
# The first needs a network conditioned on sigma. The second draws noise that no generator controls, so it cannot be seeded.
UNFIT_SCHEDULERS = ("EDMEulerScheduler", "DPMSolverSDEScheduler")


# The values of a UNet's config with which it reads latents, timesteps and text alone. Nothing else is given to it.
FED: dict[str, tuple[Any, ...]] = {
    "addition_embed_type": (None, "text"),  # text_time: SDXL; others: Kandinsky
    "time_cond_proj_dim": (None,),  # else the guidance scale, in latent consistency models (LCM)
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),  # else embeddings of images
    "attention_type": ("default",),  # else boxes (GLIGEN)
}


def check_fit(root: Path, parts: Mapping[str, nn.Module]) -> None:
    """Refuse a UNet that reads more than it is given, and parts that do not fit one another. Not all need be given."""
    unet = parts["unet"].config
    check_inputs(root / "unet" / "config.json", unet)
    if "vae" in parts:
        factor = parts["vae"].config.scaling_factor
        if not isinstance(factor, int | float) or not factor > 0:
            raise ValueError(f"{root}/vae/config.json has scaling_factor {factor!r}; it must be a number. {ANOTHER_BASE}")
        latent = {"latent_channels": parts["vae"].config.latent_channels}
        require_equal(root, "in_channels", unet.in_channels, "vae", latent)
    if "text_encoder" in parts:
        text = parts["text_encoder"].config
        key = "cross_attention_dim" if unet.encoder_hid_dim is None else "encoder_hid_dim"
        widths = unet[key] if isinstance(unet[key], list | tuple) else [unet[key]]
        for width in widths:
            require_equal(root, key, width, "text_encoder", {"hidden_size": text.hidden_size})
        tokenizer = whole.read_tokenizer(
            root / "tokenizer", diffusers_files.class_of("tokenizer", PIPELINE), text.vocab_size
        )
        if tokenizer.model_max_length > text.max_position_embeddings:
            raise ValueError(
                f"{root}/tokenizer does not fit its text encoder: model_max_length is {tokenizer.model_max_length}, and "
                f"max_position_embeddings is {text.max_position_embeddings}. Lower it in tokenizer_config.json."
            )


def check_inputs(file: Path, unet: Mapping[str, Any]) -> None:
    """Refuse a UNet, by its config in `file`, that reads anything beside latents, timesteps and text."""
    for key, fed in FED.items():
        if unet[key] == "text_time":
            raise ValueError(f"{file} is a model of SDXL ({key} text_time), which is not supported yet. {ANOTHER_BASE}")
        if unet[key] not in fed:
            raise ValueError(f"{file} has {key} {unet[key]!r}, for an input that is never given here. {ANOTHER_BASE}")
    if unet["in_channels"] != unet["out_channels"]:
        raise ValueError(
            f"{file} has in_channels {unet['in_channels']} and out_channels {unet['out_channels']}; models that also read "
            f"an image, such as for inpainting, are not supported. {ANOTHER_BASE}"
        )


def require_equal(root: Path, key: str, value: Any, part: str, entry: Mapping[str, Any]) -> None:
    """Refuse a UNet whose entry `key` of its config is another than the one that another part's config has."""
    (other_key, other), *_ = entry.items()
    if value != other:
        raise ValueError(
            f"{root}/unet/config.json has {key} {value}, but {part}/config.json has {other_key} {other}. "
            "Get both parts from the same model."
        )


PIPELINE = PipelineSpec(
    pipeline="StableDiffusionPipeline",
    network="unet",
    classes={
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    },
    weights={
        "unet": "diffusion_pytorch_model{}.safetensors",
        "vae": "diffusion_pytorch_model{}.safetensors",
        "text_encoder": "model{}.safetensors",
    },
    unused=("safety_checker", "feature_extractor", "image_encoder"),
    others={
        "conditioner.embedders.": "SDXL",
        "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
        "model.diffusion_model.double_blocks.": "Flux",
        "double_blocks.": "Flux",
    },
    check_fit=check_fit,
)


def to_diffusers(state: State) -> State:
    """A LoRA of another program under diffusers' keys: today's, or those of diffusers before it used peft."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.lora_state_dict(state)[0]


LORA = LoraSpec(
    prefix="unet",
    title="UNet",
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    layers=r"(?:(?:down|up)_blocks\.\d+|mid_block)\.(?:attentions|resnets|(?:down|up)samplers)\.\d+|conv_(?:in|out)|time_embedding",
    to_diffusers=to_diffusers,
)


def describe() -> Description:
    tags = ("stable-diffusion", "stable-diffusion-diffusers")
    return Description(title="Stable Diffusion", tags=tags, pipeline=PIPELINE.pipeline, network=LORA.title)


def fingerprint(model: ModelSettings) -> str:
    return diffusers_files.fingerprint(model, PIPELINE)


def identity(model: ModelSettings) -> dict[str, str]:
    return diffusers_files.identity(model, PIPELINE)


def check_sampler(model: ModelSettings, sampling: Sampling, window: Window | None) -> None:
    config = diffusers_files.scheduler_config(model, PIPELINE)
    noise_schedule.require_trainable(config, model, sampling, window)


def check(model: ModelSettings) -> None:
    diffusers_files.check_here(model, PIPELINE)


def sizes(model: ModelSettings) -> Sizes | None:
    local = diffusers_files.find_here(model, PIPELINE)
    if local is None:
        return None
    weights, configs = local
    unet, vae, text = (configs[part] for part in ("unet", "vae", "text_encoder"))
    height, width = latent_size(unet, vae, model.resolution)
    px = latent_px(vae)
    return Sizes(
        latent_shape=(unet["in_channels"], height, width),
        image_px=(height * px, width * px),
        embedding=text["max_position_embeddings"] * text["hidden_size"],  # L * E: prompts are padded to full length
        lora=lora.count_numbers(weights, LORA),
    )


def latent_size(unet: Mapping[str, Any], vae: Mapping[str, Any], resolution: int) -> tuple[int, int]:
    """Height and width of latents, from the configs of UNet and VAE. With `resolution` 0 they are the UNet's own.

    As in the pipeline of diffusers, these may be one number, or a height and a width.
    """
    if not resolution:
        own = unet.get("sample_size")
        if own is None:
            raise ValueError("unet/config.json has no sample_size; set pretrained.resolution to the images' side in pixels")
        size = tuple(own) if isinstance(own, list | tuple) else (own, own)
        if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
            raise ValueError(
                f"unet/config.json has sample_size {own!r}; it must be a number of latents, or height and width"
            )
        return size
    # Each of the UNet's down blocks but the last halves the latents, so they must divide evenly.
    multiple = latent_px(vae) * 2 ** (len(unet["block_out_channels"]) - 1)
    if resolution % multiple:
        raise ValueError(f"pretrained.resolution is {resolution}; this model needs a multiple of {multiple} pixels")
    return resolution // latent_px(vae), resolution // latent_px(vae)


def latent_px(vae: Mapping[str, Any]) -> int:
    """How many pixels a latent stands for, along each side: each of the VAE's blocks but the last halves an image."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def schedulers() -> list[str]:
    from diffusers.schedulers import KarrasDiffusionSchedulers

    # Diffusers' list of the schedulers that may replace one another in a Stable Diffusion pipeline.
    return sorted(scheduler.name for scheduler in KarrasDiffusionSchedulers if scheduler.name not in UNFIT_SCHEDULERS)


def read_lora(path: Path) -> State:
    return lora.read_lora(path, LORA)


def write_kohya(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write kohya's format, with its metadata `ss_v2`, by which A1111 tells 2.x from 1.x: 2.x has text 1,024 wide."""
    text_width = next((value.shape[1] for key, value in state.items() if ".attn2.to_k.lora_A." in key), 0)
    lora.write_kohya(path, state, {"ss_v2": str(text_width == 1024)})


def write_pipeline(folder: Path, model: ModelSettings, lora_file: Path, *, dtype: str) -> None:
    """Write the pipeline without a safety checker: none is loaded here."""
    tuned = load(model, device=torch.device("cpu"), dtype=torch.float32, seed=0, decoder=True)
    tuned.load_adapter(lora_file)
    tuned.unet.fuse_lora()
    tuned.unet.unload_lora()
    parts = {name: getattr(tuned, name) for name in PIPELINE.classes}
    for name in PIPELINE.weights:  # only now: the sum of base and LoRA is rounded once
        nn.Module.to(parts[name], getattr(torch, dtype))  # torch's own: that of diffusers warns of layers to be kept
    diffusers_files.write_pipeline(folder, parts, model, PIPELINE, requires_safety_checker=False)


def load(model: ModelSettings, *, device: torch.device, dtype: torch.dtype, seed: int, decoder: bool) -> "StableDiffusion":
    return StableDiffusion(model, device=device, dtype=dtype, seed=seed, decoder=decoder)


class StableDiffusion:
    """A frozen Stable Diffusion (arXiv 2112.10752) whose UNet carries a trainable LoRA.

    The UNet is conditioned on the last hidden states [L,E] of CLIP's text encoder.
    """

    def __init__(self, model: ModelSettings, *, device: torch.device, dtype: torch.dtype, seed: int, decoder: bool):
        self._scheduler = noise_schedule.make_ddim(diffusers_files.scheduler_config(model, PIPELINE))
        parts = diffusers_files.load_parts(model, PIPELINE, dtype, decoder=decoder)
        self.scheduler_config = {key: value for key, value in self._scheduler.config.items() if not key.startswith("_")}
        self.fingerprint = fingerprint(model)
        self.vae, self.text_encoder, self.tokenizer = parts.get("vae"), parts.get("text_encoder"), parts.get("tokenizer")
        for part in (self.vae, self.text_encoder):
            if part is not None:
                part.to(device).eval().requires_grad_(False)
        if self.text_encoder is not None:
            self._check_text(model.name)
        self.unet = parts["unet"].to(device).eval().requires_grad_(False)
        lora.add_lora(self.unet, LORA, rank=model.lora_rank, seed=seed)
        # Kept for `reset`: loading a checkpoint overwrites the fresh LoRA.
        self._fresh = {name: parameter.detach().clone() for name, parameter in self.trainable().items()}
        self.network: nn.Module = self.unet  # callers may wrap this one; `unet` stays the bare network
        vae_config = files.read_json(diffusers_files.locate_configs(model, PIPELINE) / "vae" / "config.json")
        size = latent_size(self.unet.config, vae_config, model.resolution)
        self.latent_shape = (self.unet.config.in_channels, *size)

    def _check_text(self, name: str) -> None:
        """Refuse a text encoder to which a word is as good as none, or whose embeddings are not finite."""
        nothing, word = self.encode(["", whole.some_word(self.tokenizer)])["prompt_embeds"]
        if torch.equal(nothing, word) or not word.isfinite().all():
            raise ValueError(f"the text_encoder of {name} embeds all prompts alike, or as NaN. Get its files anew.")

    def sampler(self, num_steps: int, eta: float, steps: Sequence[int] | None = None) -> Transitions:
        return noise_schedule.make_table(self._scheduler, num_steps, eta, steps).to(self.unet.device)

    def noise_levels(self) -> NoiseLevels:
        return noise_schedule.make_levels(self._scheduler).to(self.unet.device)

    def scheduler(self, name: str) -> Any:
        import diffusers

        return getattr(diffusers, name).from_config(self._scheduler.config)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditions:
        """prompt_embeds [P,L,E]. Padded, and cut to the text encoder's length, like in Stable Diffusion's own pipeline."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        # Few text encoders want a mask; the pipeline of diffusers asks in the same way.
        mask = None
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(self.text_encoder.device)
        ids = tokens.input_ids.to(self.text_encoder.device)
        return {"prompt_embeds": self.text_encoder(ids, attention_mask=mask)[0]}

    def num_tokens_cut(self, prompts: Sequence[str]) -> list[int]:
        # CLIP's tokens never reach over a blank. So each distinct word goes to the tokenizer once, in one call. For 200,000
        # prompts of few words that takes 0.4 s; a call for each prompt would take half a minute.
        words = [*{word for prompt in prompts for word in prompt.split()}]
        marks, *tokens = self.tokenizer(["", *words], verbose=False, return_attention_mask=False).input_ids
        lengths = {word: len(ids) - len(marks) for word, ids in zip(words, tokens, strict=True)}
        room = self.tokenizer.model_max_length - len(marks)
        return [max(0, sum(map(lengths.__getitem__, prompt.split())) - room) for prompt in prompts]

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
        embeds = conditions["prompt_embeds"].expand(len(x_t), -1, -1)
        timesteps = timesteps.expand(len(x_t))
        if guidance_scale == 1:  # guidance would return the conditional output, at twice the cost
            return self.network(x_t, timesteps, embeds, return_dict=False)[0].float()
        # Classifier-free guidance, arXiv 2207.12598: eps = eps(empty) + scale * (eps(prompt) - eps(empty)).
        no_embeds = unconditional["prompt_embeds"].expand_as(embeds)
        if unconditional_gradient:
            rows = torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), torch.cat([no_embeds, embeds])
            without, with_text = self.network(*rows, return_dict=False)[0].float().chunk(2)
        else:
            # Two calls: within one, autograd would keep the activations of the unconditional half too.
            with torch.no_grad():
                without = self.network(x_t, timesteps, no_embeds, return_dict=False)[0].float()
            with_text = self.network(x_t, timesteps, embeds, return_dict=False)[0].float()
        return without + guidance_scale * (with_text - without)

    def reset(self) -> None:
        from accelerate.utils import extract_model_from_parallel

        self.network = extract_model_from_parallel(self.network, keep_fp32_wrapper=False)
        self.network._is_accelerate_prepared = False  # accelerate wraps no network that has this mark
        self.unet.disable_gradient_checkpointing()
        for name, parameter in self.trainable().items():
            parameter.data.copy_(self._fresh[name])
            parameter.grad = None

    def checkpoint_gradients(self) -> None:
        self.unet.enable_gradient_checkpointing()

    def compile(self) -> None:
        """Compile block by block: equal blocks share their code, and a later process reads it back in seconds.

        Not `dynamic`, so each number of rows is compiled by itself: for an open number of rows torch keeps convolutions in
        the slower memory layout.
        """
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MAX_GRAPHS
        self.unet.to(memory_format=torch.channels_last)  # else blocks would convert between layouts, back and forth
        for module in self.unet.modules():
            if type(module).__name__ in COMPILED:
                module.compile(dynamic=False)

    @contextmanager
    def base_policy(self) -> Iterator[None]:
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()

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
        images = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        if not images.isfinite().all():  # a VAE may overflow in fp16
            raise FloatingPointError("the VAE decoded to non-finite values; use --config.mixed_precision=bf16 or no")
        images = (images.float() / 2 + 0.5).clamp(0, 1) * 255
        return images.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    @cached_property
    def _trainable(self) -> dict[str, nn.Parameter]:
        return lora.lora_parameters(self.unet)  # looked up once: it walks through the whole network

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self._trainable)

    def adapter_state(self) -> State:
        return {LORA.key(name): parameter.detach() for name, parameter in self.trainable().items()}

    def load_adapter(self, path: Path) -> None:
        lora.load_lora(self.unet, path, LORA)
