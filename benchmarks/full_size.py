"""Models of today in their real sizes without a download: SDXL, Stable Diffusion 3.5 medium, FLUX.1-dev, FLUX.2-klein.

python -m benchmarks.full_size sdxl DIR          # random weights in bfloat16, 7 GB, as fast as the disk
python -m benchmarks.full_size sd35_medium DIR   # 6.5 GB, without T5

`write_holes` writes the same files without contents, which take no room on disk: their headers have every tensor's shape.
"""

import argparse
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import Qwen2TokenizerFast, T5TokenizerFast

from b2diffurl.models import flux, flux2, sd3, sdxl
from b2diffurl.models.diffusers_files import PipelineSpec, class_of
from benchmarks.random_weights import Fill, hole, random_numbers, write_part
from benchmarks.sd14 import TEXT_ENCODER, VAE, write_json, write_tokenizer

# Literal copies of scheduler/scheduler_config.json, of stabilityai/stable-diffusion-xl-base-1.0,
XL_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
# stabilityai/stable-diffusion-3.5-medium,
SD3_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.29.0.dev0",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
# black-forest-labs/FLUX.1-dev,
FLUX_SCHEDULER = SD3_SCHEDULER | {
    "_diffusers_version": "0.30.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "use_dynamic_shifting": True,
}
# black-forest-labs/FLUX.1-schnell
SCHNELL_SCHEDULER = FLUX_SCHEDULER | {"shift": 1.0, "use_dynamic_shifting": False}
# and black-forest-labs/FLUX.2-klein-4B.
KLEIN_SCHEDULER = FLUX_SCHEDULER | {
    "_diffusers_version": "0.37.0.dev0",
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
XL_UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
FLUX_DEV = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
KLEIN_4B = {
    "patch_size": 1,
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (32, 32, 32, 32),
    "rope_theta": 2000,
    "guidance_embeds": False,
}
CLIP_G = TEXT_ENCODER | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
VAE_1024 = VAE | {"sample_size": 1024, "force_upcast": True}
VAE_16 = VAE_1024 | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


@dataclass(frozen=True)
class FullSize:
    """A model in its real size."""

    spec: PipelineSpec
    configs: Mapping[str, Mapping[str, Any]]  # {part: what its class is made of}
    scheduler: Mapping[str, Any]

    def without_t5(self) -> "FullSize":
        """Stable Diffusion 3.5 without its largest text encoder."""
        configs = {part: config for part, config in self.configs.items() if part != sd3.T5}
        return replace(self, spec=sd3.WITHOUT_T5, configs=configs)

    def with_shallow_encoders(self) -> "FullSize":
        """With text encoders of one layer and the real widths, whose embeddings have the real shapes."""
        one = {part: {"num_hidden_layers": 1} if part in self.spec.encoders else {} for part in self.configs}
        return replace(self, configs={part: dict(config) | one[part] for part, config in self.configs.items()})


FULL_SIZE = {
    "sdxl": FullSize(
        sdxl.PIPELINE,
        {
            "unet": XL_UNET,
            "vae": VAE_1024 | {"scaling_factor": 0.13025},
            "text_encoder": TEXT_ENCODER,
            "text_encoder_2": CLIP_G,
        },
        XL_SCHEDULER,
    ),
    "sd35_medium": FullSize(
        sd3.PIPELINE,
        {
            "transformer": SD35_MEDIUM,
            "vae": VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
            "text_encoder": TEXT_ENCODER,
            "text_encoder_2": CLIP_G,
            "text_encoder_3": T5_XXL,
        },
        SD3_SCHEDULER,
    ),
    "flux_dev": FullSize(
        flux.PIPELINE,
        {
            "transformer": FLUX_DEV,
            "vae": VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
            "text_encoder": TEXT_ENCODER,
            "text_encoder_2": T5_XXL,
        },
        FLUX_SCHEDULER,
    ),
    "klein_4b": FullSize(
        flux2.PIPELINE,
        {"transformer": KLEIN_4B, "vae": VAE | {"sample_size": 1024, "latent_channels": 32}, "text_encoder": QWEN3_4B},
        KLEIN_SCHEDULER,
    ),
}


def build(root: Path, model: FullSize) -> Path:
    """Write a model with random weights in bfloat16 into folder `root`, part by part. Returns `root`."""
    return write(root, model, random_numbers())


def write_holes(root: Path, model: FullSize) -> Path:
    """Write a model whose files of bfloat16 weights have a header and a hole, into folder `root`. Returns `root`."""
    return write(root, model, hole)


def write(root: Path, model: FullSize, fill: Fill) -> Path:
    """Write a model into folder `root` in the layout of diffusers, its weights by `fill`."""
    spec = model.spec
    for part, config in model.configs.items():
        write_part(root / part, spec.weights[part].format(""), class_of(part, spec), config, fill)
    writers = {
        "CLIPTokenizer": write_tokenizer,
        "T5TokenizerFast": t5_tokenizer().save_pretrained,
        "Qwen2TokenizerFast": qwen_tokenizer().save_pretrained,
    }
    for part in spec.classes.keys() - spec.weights.keys():
        writers[spec.classes[part][1]](root / part)
    write_json(root / "scheduler" / "scheduler_config.json", dict(model.scheduler))
    index = {"_class_name": spec.pipeline, "scheduler": ["diffusers", model.scheduler["_class_name"]]}
    write_json(root / "model_index.json", index | dict(spec.classes) | {part: [None, None] for part in spec.unused})
    return root


def t5_tokenizer() -> T5TokenizerFast:
    """One token a letter, and one for a blank."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((one, -3.0) for one in string.ascii_lowercase)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def qwen_tokenizer() -> Qwen2TokenizerFast:
    """One token a letter or digit, with a short template of messages."""
    letters = {letter: number for number, letter in enumerate(string.ascii_letters + "ĠĊ<>|_/?" + string.digits)}
    tokens = Qwen2TokenizerFast(vocab=letters | {"<|endoftext|>": len(letters)}, merges=[])
    tokens.chat_template = (
        "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}assistant "
    )
    return tokens


MEASURED = {"sdxl": FULL_SIZE["sdxl"], "sd35_medium": FULL_SIZE["sd35_medium"].without_t5()}


def build_measured(root: Path, name: str, *, shallow: bool = False) -> Path:
    """Write one of MEASURED with random weights, its text encoders of one layer if `shallow`. Returns `root`."""
    return build(root, MEASURED[name].with_shallow_encoders() if shallow else MEASURED[name])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MEASURED)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shallow", action="store_true", help="text encoders of one layer")
    given = parser.parse_args()
    build_measured(given.folder, given.model, shallow=given.shallow)
