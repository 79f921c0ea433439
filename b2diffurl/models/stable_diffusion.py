"""Stable Diffusion 1.x and 2.x (epsilon and v-prediction), and every model of their layout, with a peft LoRA.

N rows, P prompts, L tokens, E text width, latents [N,C,h,w]
"""

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn

from b2diffurl.algorithm.ddim import make_transitions
from b2diffurl.algorithm.seeding import stable_seed
from b2diffurl.algorithm.transition import Transitions
from b2diffurl.experiment.trajectories import Conditions
from b2diffurl.runtime import files
from b2diffurl.runtime.hub import checksum, locate

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of the UNet's attention
COMPILED = (ResnetBlock2D, BasicTransformerBlock)  # blocks of the UNet that are compiled, each by itself
MAX_GRAPHS = 256  # of one kind of block: by number of rows, width, resolution, with and without gradient, and LoRA
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
CLASSES = {  # package and name, as a model_index.json has them
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}


class StableDiffusion:
    """A frozen Stable Diffusion whose UNet carries a trainable LoRA; see `b2diffurl.models.Model`."""

    def __init__(
        self, pretrained: Mapping, *, device: torch.device, dtype: torch.dtype, lora_rank: int, seed: int, decoder: bool
    ):
        root = locate(pretrained["model"], revision=pretrained["revision"], patterns=file_patterns(pretrained["variant"]))
        load = _load_single_file if root.is_file() else _load_directory
        parts, self.scheduler_config = load(root, pretrained, dtype, decoder)
        check_scheduler(self.scheduler_config, pretrained["model"])
        self._scheduler = DDIMScheduler.from_config(self.scheduler_config)
        self.scheduler_config = {key: value for key, value in self._scheduler.config.items() if not key.startswith("_")}
        self.fingerprint = base_fingerprint(pretrained)
        self.vae, self.text_encoder, self.tokenizer = parts.get("vae"), parts.get("text_encoder"), parts.get("tokenizer")
        for part in (self.vae, self.text_encoder):
            if part is not None:
                part.to(device).eval().requires_grad_(False)
        self.unet = parts["unet"].to(device).eval().requires_grad_(False)
        self._add_adapter(lora_rank, seed)
        self.network: nn.Module = self.unet
        size = self.unet.config.sample_size
        if pretrained["resolution"]:
            size = self._latent_size(pretrained["resolution"])
        self.latent_shape = (self.unet.config.in_channels, size, size)

    def _latent_size(self, resolution: int) -> int:
        multiple = 8 * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if resolution % multiple:
            raise ValueError(f"pretrained.resolution is {resolution}; this model needs a multiple of {multiple} pixels")
        return resolution // 8

    def _add_adapter(self, rank: int, seed: int) -> None:
        """A LoRA with alpha = rank, gaussian A and zero B, always float32."""
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_seed(seed, "lora"))
            self.unet.add_adapter(config)
        for parameter in self.trainable().values():
            parameter.data = parameter.data.float()
        self._fresh = {name: parameter.detach().clone() for name, parameter in self.trainable().items()}

    def sampler(self, num_steps: int, eta: float) -> Transitions:
        self._scheduler.set_timesteps(num_steps)
        known = len(self._scheduler.alphas_cumprod)
        if self._scheduler.timesteps.max() >= known:
            raise ValueError(f"sample.num_steps is {num_steps}; it must be less than this model's {known} timesteps")
        return make_transitions(
            self._scheduler.timesteps,
            self._scheduler.alphas_cumprod,
            self._scheduler.final_alpha_cumprod,
            eta=eta,
            prediction_type=self._scheduler.config.prediction_type,
        ).to(self.unet.device)

    def scheduler(self, kind: type) -> Any:
        return kind.from_config(self._scheduler.config)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditions:
        """prompt_embeds [P,L,E], truncated to the text encoder's length like Stable Diffusion's own pipeline."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        mask = None
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(self.text_encoder.device)
        ids = tokens.input_ids.to(self.text_encoder.device)
        return {"prompt_embeds": self.text_encoder(ids, attention_mask=mask)[0]}

    def num_tokens_cut(self, prompt: str) -> int:
        return max(0, len(self.tokenizer(prompt, verbose=False).input_ids) - self.tokenizer.model_max_length)

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
        if guidance_scale == 1:
            return self.network(x_t, timesteps, embeds, return_dict=False)[0].float()
        no_embeds = unconditional["prompt_embeds"].expand_as(embeds)
        if unconditional_gradient:
            rows = torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), torch.cat([no_embeds, embeds])
            without, with_text = self.network(*rows, return_dict=False)[0].float().chunk(2)
        else:
            with torch.no_grad():
                without = self.network(x_t, timesteps, no_embeds, return_dict=False)[0].float()
            with_text = self.network(x_t, timesteps, embeds, return_dict=False)[0].float()
        return without + guidance_scale * (with_text - without)

    def reset(self) -> None:
        self.network = extract_model_from_parallel(self.network, keep_fp32_wrapper=False)
        self.network._is_accelerate_prepared = False  # or accelerate would not wrap it again
        self.unet.disable_gradient_checkpointing()
        for name, parameter in self.trainable().items():
            parameter.data.copy_(self._fresh[name])
            parameter.grad = None

    def checkpoint_gradients(self) -> None:
        self.unet.enable_gradient_checkpointing()

    def compile(self) -> None:
        """Block by block: equal blocks are compiled once, and a process reads them back in seconds.

        Each number of rows by itself: where that is left open, torch keeps convolutions in the slower layout.
        """
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MAX_GRAPHS
        self.unet.to(memory_format=torch.channels_last)  # one by one, operations would go back and forth between layouts
        for module in self.unet.modules():
            if isinstance(module, COMPILED):
                module.compile(dynamic=False)

    @contextmanager
    def base_policy(self) -> Iterator[None]:
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        images = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        if not images.isfinite().all():
            raise FloatingPointError("the VAE decoded to non-finite values; use --config.mixed_precision=bf16 or no")
        images = (images.float() / 2 + 0.5).clamp(0, 1) * 255
        return images.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.unet.named_parameters() if ".lora_" in name}

    def adapter_state(self) -> dict[str, Tensor]:
        return {lora_key(name): parameter.detach() for name, parameter in self.trainable().items()}

    def load_adapter(self, path: Path) -> None:
        parameters = {lora_key(name): parameter for name, parameter in self.trainable().items()}
        state = files.read_tensors(path)
        if state.keys() != parameters.keys():
            state = foreign_lora(path)
        if state.keys() != parameters.keys():
            odd = sorted(state.keys() ^ parameters.keys())
            raise ValueError(
                f"{path} does not fit: {len(odd)} keys differ, such as {odd[0]}. "
                f"It must be a LoRA on the UNet's attention ({', '.join(LORA_TARGETS)}) of this base model."
            )
        scale = recorded_scale(path)
        for key, parameter in parameters.items():
            if state[key].shape != parameter.shape:
                shapes = f"{tuple(state[key].shape)}, not {tuple(parameter.shape)}"
                raise ValueError(f"{path} does not fit: {key} is {shapes}. Set train.lora_rank to its rank.")
            parameter.data.copy_(state[key] * scale if ".lora_B." in key else state[key])


def lora_key(name: str) -> str:
    """A parameter's key in pytorch_lora_weights.safetensors, as diffusers names it."""
    return "unet." + name.replace(".default.", ".")


def recorded_scale(path: Path) -> float:
    """alpha / rank as diffusers records it in the metadata of a LoRA file; 1 where it records none."""
    with safe_open(path, framework="pt") as file:
        recorded = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    unsupported = [key for key in ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern") if recorded.get(f"unet.{key}")]
    if unsupported:
        raise ValueError(f"{path} has {', '.join(unsupported)}; only a plain LoRA of one rank and alpha can be resumed.")
    return recorded.get("unet.lora_alpha", 1) / recorded.get("unet.r", 1)


def foreign_lora(path: Path) -> dict[str, Tensor]:
    """A LoRA file of another program (kohya, the paper's repository) under our keys, kohya's alpha / rank folded into B."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_unet_state_dict_to_peft

    state = files.read_tensors(path)
    if any("dora_scale" in key for key in state):
        raise ValueError(f"{path} is a DoRA; only a plain LoRA of one rank and alpha can be resumed.")
    for key in [key for key in state if key.endswith(".alpha")]:
        module, alpha = key.removesuffix(".alpha"), state.pop(key).item()
        up, rank = state[f"{module}.lora_up.weight"], len(state[f"{module}.lora_down.weight"])
        state[f"{module}.lora_up.weight"] = up.float() * (alpha / rank)
    state, _ = StableDiffusionPipeline.lora_state_dict(state)
    others = sorted(key for key in state if key.startswith("text_encoder"))
    if others:
        raise ValueError(f"{path} also changes the text encoder ({others[0]}); only a LoRA on the UNet can be resumed.")
    unet = convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in state.items()})
    return {f"unet.{key}": value for key, value in unet.items()}


def check_scheduler(config: Mapping, model: str) -> None:
    """Refuse a scheduler that would change latents behind the policy's back."""
    for key in ("clip_sample", "thresholding"):
        if config.get(key, key == "clip_sample"):
            state = "on" if key in config else "not given, and on by DDIM's default"
            raise ValueError(
                f"{key} is {state} in the scheduler of {model}; latents must not be clipped. "
                f'Put "{key}": false into its scheduler/scheduler_config.json.'
            )


def check_index(path: Path) -> None:
    """Refuse a model_index.json of other classes than Stable Diffusion's: diffusers would import whatever it names."""
    index = files.read_json(path)
    for name, allowed in CLASSES.items():
        if index.get(name) != allowed:
            raise ValueError(f"{path} names {index.get(name)} as its {name}; it must be {allowed}, and no other code is run")
    if index.get("scheduler", [""])[0] != "diffusers":
        raise ValueError(f"{path} names {index.get('scheduler')} as its scheduler; it must be one of diffusers")


def base_fingerprint(pretrained: Mapping) -> str:
    """SHA-256 of the UNet's weight file (of a single-file model: of that file), or of all files' digests in order."""
    root = locate(pretrained["model"], revision=pretrained["revision"], patterns=file_patterns(pretrained["variant"]))
    weights = [root] if root.is_file() else weight_files(root / "unet", pretrained["variant"])
    digests = [checksum(path) for path in weights]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def weight_files(folder: Path, variant: str) -> list[Path]:
    """A component's weight files of one variant; a FileNotFoundError if there are none."""
    pattern = f"*.{glob.escape(variant)}*.safetensors" if variant else "*.safetensors"
    weights = sorted(path for path in folder.glob(pattern) if variant or path.name.count(".") == 1)
    if not weights:
        raise FileNotFoundError(f"{folder} has no {pattern}. Weights must be safetensors; see pretrained.variant.")
    return weights


def file_patterns(variant: str) -> list[str]:
    """What to download: configs, tokenizer, and one variant of the weights, as safetensors."""
    suffix = f".{variant}" if variant else ""
    weights = [f"{folder}/{stem}{suffix}.safetensors" for folder, stem in (
        ("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")
    )]  # fmt: skip
    return ["model_index.json", "*/*.json", "tokenizer/*", *weights]


def _load_directory(root: Path, pretrained: Mapping, dtype: torch.dtype, decoder: bool) -> tuple[dict, dict]:
    """The components of a directory in the diffusers layout, and its scheduler config."""
    wanted = COMPONENTS if decoder else ("unet", "scheduler")
    missing = [name for name in wanted if not (root / name).is_dir()]
    if missing:
        raise FileNotFoundError(f"{root} has no {missing[0]}/. A model directory holds {', '.join(COMPONENTS)}.")
    for name in {"unet", "vae", "text_encoder"}.intersection(wanted):
        weight_files(root / name, pretrained["variant"])
    variant = pretrained["variant"] or None
    options = {"variant": variant, "use_safetensors": True, "dtype": dtype}
    parts = {"unet": UNet2DConditionModel.from_pretrained(root, subfolder="unet", **options)}
    if decoder:
        from diffusers import AutoencoderKL
        from transformers import CLIPTextModel, CLIPTokenizer

        parts["vae"] = AutoencoderKL.from_pretrained(root, subfolder="vae", **options)
        parts["text_encoder"] = CLIPTextModel.from_pretrained(
            root, subfolder="text_encoder", variant=variant, use_safetensors=True, dtype=dtype
        )
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(root, subfolder="tokenizer")
    return parts, files.read_json(root / "scheduler" / "scheduler_config.json")


def _load_single_file(root: Path, pretrained: Mapping, dtype: torch.dtype, decoder: bool) -> tuple[dict, dict]:
    """The same from one .safetensors file, with the component configs of `pretrained.config`."""
    if root.suffix != ".safetensors":
        raise ValueError(f"{root} is not a .safetensors file. Convert it first; pickled weights are never loaded.")
    from diffusers import StableDiffusionPipeline

    try:
        configs = locate(pretrained["config"], patterns=["model_index.json", "*/*.json", "tokenizer/*"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"a single file needs the configs of its components (pretrained.config): {error}") from None
    skipped = {} if decoder else {"vae": None, "text_encoder": None, "tokenizer": None}
    check_index(configs / "model_index.json")
    none = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    pipeline = StableDiffusionPipeline.from_single_file(
        str(root), config=str(configs), dtype=dtype, local_files_only=True, **none, **skipped
    )
    wanted = ("unet", "vae", "text_encoder", "tokenizer") if decoder else ("unet",)
    parts = {name: getattr(pipeline, name) for name in wanted}
    return parts, files.read_json(configs / "scheduler" / "scheduler_config.json")
