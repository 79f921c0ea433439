"""Weights as other programs write them: a base model in one file of the original layout, and LoRAs."""

import re
from pathlib import Path

import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from b2diffurl.models import Model, unet

RANK = 4
LORA_TARGETS = list(unet.LORA.targets)


def output(model: Model, *, guidance_scale: float = 3.0) -> Tensor:
    """What the model predicts on fixed noise."""
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    conditions, unconditional = model.encode(["a red circle", "a blue square"]), model.unconditional()
    with torch.no_grad():
        return model.predict(noise, torch.tensor(501), conditions, unconditional, guidance_scale)


def original_layout(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> dict[str, Tensor]:
    """The weights under the keys of the original (CompVis, or for SDXL Stability's) code."""
    levels = len(pipeline.vae.config.block_out_channels)
    state = {unet_key(key, pipeline.unet.config): value for key, value in pipeline.unet.state_dict().items()}
    for key, value in pipeline.vae.state_dict().items():
        # its attention is of 1x1 convolutions there
        matrix = ".attentions." in key and value.ndim == 2
        state[vae_key(key, levels)] = value[:, :, None, None] if matrix else value
    xl = hasattr(pipeline, "text_encoder_2")
    first = "conditioner.embedders.0" if xl else "cond_stage_model"
    for key, value in pipeline.text_encoder.state_dict().items():
        state[f"{first}.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    if xl:
        text = open_clip(pipeline.text_encoder_2.state_dict())
        state |= {f"conditioner.embedders.1.model.{key}": value for key, value in text.items()}
    return {key: value.contiguous() for key, value in state.items()}


def open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder's weights as Open CLIP has them: queries, keys and values of a layer in one tensor."""
    text = {key.removeprefix("text_model."): value for key, value in state.items()}
    names = {"embeddings.token_embedding.weight": "token_embedding.weight", "final_layer_norm": "ln_final"}
    names |= {"embeddings.position_embedding.weight": "positional_embedding", "encoder.layers": "transformer.resblocks"}
    names |= {"layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    if "text_projection.weight" in text:  # a matrix there, which multiplies from the other side
        text["text_projection"] = text.pop("text_projection.weight").T
    for layer in sorted({key.split(".")[2] for key in text if key.startswith("encoder.layers")}):
        for kind in ("weight", "bias"):
            joined = torch.cat([text.pop(f"encoder.layers.{layer}.self_attn.{one}_proj.{kind}") for one in "qkv"])
            text[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = joined
    renamed = {}
    for key, value in text.items():
        for here, there in names.items():
            key = key.replace(here, there)
        renamed[key] = value
    return renamed


def unet_key(key: str, config: dict) -> str:
    """A UNet key in the original layout, where the blocks of a level are counted on, a downsampler as one."""
    layers = config["layers_per_block"] + 1

    def block(match: re.Match) -> str:
        side, level, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * layers}.0.op"
        if kind == "upsamplers":
            # an upsampler stands after its level's last block, which may have attention
            attends = config["up_block_types"][level].startswith("CrossAttn")
            return f"output_blocks.{level * layers + layers - 1}.{2 if attends else 1}.conv"
        number = level * layers + layer + (side == "down")
        return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{0 if kind == 'resnets' else 1}"

    key = re.sub(r"(down|up)_blocks\.(\d)\.(downsamplers|upsamplers)\.(\d)\.conv", block, key)
    key = re.sub(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)", block, key)
    for here, there in {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }.items():
        key = re.sub(rf"^{re.escape(here)}\b", there, key)
    if re.match(r"(input|output)_blocks\.\d+\.0\.|middle_block\.[02]\.", key):
        for here, there in {
            "norm1": "in_layers.0",
            "conv1": "in_layers.2",
            "time_emb_proj": "emb_layers.1",
            "norm2": "out_layers.0",
            "conv2": "out_layers.3",
            "conv_shortcut": "skip_connection",
        }.items():
            key = key.replace(f".{here}.", f".{there}.")
    return "model.diffusion_model." + key


def vae_key(key: str, levels: int) -> str:
    """A VAE key in the original layout, which counts the decoder's `levels` from the image up."""
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda match: f"up.{levels - 1 - int(match[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{levels - 1 - int(match[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    for here, there in {
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
        "mid_block.attentions.0.to_": "mid.attn_1.",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
    }.items():
        key = key.replace(here, there)
    return "first_stage_model." + key


def random_lora(
    pipeline: StableDiffusionPipeline, *, rank: int = RANK, alpha: int = RANK, targets=LORA_TARGETS, **more
) -> dict:
    """A LoRA on the pipeline's UNet of random weights that half precision holds exactly; its state by peft's names."""
    pipeline.unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **more))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in pipeline.unet.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.1).half().float()
    return get_peft_model_state_dict(pipeline.unet)


def save_diffusers(folder: Path, pipeline: StableDiffusionPipeline, state: dict, **more) -> Path:
    """As diffusers' own training scripts save it, alpha in the file's metadata."""
    metadata = {"unet_lora_adapter_metadata": pipeline.unet.peft_config["default"].to_dict()}
    pipeline.save_lora_weights(folder, unet_lora_layers=state, **metadata, **more)
    return folder / "pytorch_lora_weights.safetensors"


def save_kohya(path: Path, state: dict, alpha: float) -> Path:
    """As kohya's scripts save it: flat names, half precision, an alpha a layer."""
    flat = {}
    for key, value in state.items():
        module, which = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key).groups()
        name = "lora_unet_" + module.replace(".", "_")
        flat[f"{name}.{'lora_down' if which == 'A' else 'lora_up'}.weight"] = value.half().contiguous()
        flat[f"{name}.alpha"] = torch.tensor(alpha).half()
    safetensors.torch.save_file(flat, path)
    return path


def save_attn_procs(path: Path, state: dict) -> Path:
    """As diffusers saved attention processors before it took to peft, and the paper's repository its checkpoints."""
    old = {}
    for key, value in state.items():
        module, which = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key).groups()
        attention, layer = re.fullmatch(r"(.+)\.(to_\w+)(?:\.0)?", module).groups()
        old[f"{attention}.processor.{layer}_lora.{'down' if which == 'A' else 'up'}.weight"] = value
    safetensors.torch.save_file(old, path)
    return path


def save_peft(folder: Path, pipeline: StableDiffusionPipeline, state: dict) -> Path:
    """As peft's own `save_pretrained` does, which writes alpha and rank into a file beside it."""
    network = UNet2DConditionModel.from_config(pipeline.unet.config)
    model = get_peft_model(network, pipeline.unet.peft_config["default"])
    set_peft_model_state_dict(model, {f"base_model.model.{key}": value for key, value in state.items()})
    model.save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def save(form: str, folder: Path, pipeline: StableDiffusionPipeline, state: dict, alpha: int = RANK) -> Path:
    """The LoRA file of one program or another; `save_attn_procs` knows no alpha."""
    if form == "diffusers":
        return save_diffusers(folder, pipeline, state)
    if form == "peft":
        return save_peft(folder, pipeline, state)
    path = folder / f"{form}.safetensors"
    return save_kohya(path, state, alpha) if form == "kohya" else save_attn_procs(path, state)
