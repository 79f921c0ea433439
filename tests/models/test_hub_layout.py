"""Stable Diffusion 1.x as it lies on the hub is whole, under the names of the libraries that wrote it."""

from pathlib import Path

import pytest

from b2diffurl.models import stable_diffusion, whole
from b2diffurl.models.diffusers_files import class_of
from b2diffurl.models.whole import Shapes
from benchmarks import sd14


def empty(tmp_path: Path, part: str, config: dict):
    (tmp_path / part).mkdir()
    kind = class_of(part, stable_diffusion.PIPELINE)
    sd14.write_json(tmp_path / part / "config.json", config)
    return whole.empty_part(kind, tmp_path / part)


@pytest.mark.parametrize(
    ("part", "config", "num_tensors", "num_weights"),
    [("unet", sd14.UNET, 686, 859_520_964), ("vae", sd14.VAE, 248, 83_653_863)],
)
def test_sizes_of_the_empty_parts(tmp_path, part, config, num_tensors, num_weights):
    """The numbers of tensors and weights are those of the files on the hub."""
    weights = empty(tmp_path, part, config).state_dict().values()
    assert (len(weights), sum(weight.numel() for weight in weights)) == (num_tensors, num_weights)
    assert all(weight.is_meta for weight in weights)


def text_encoder_on_the_hub() -> Shapes:
    """The 197 tensors of text_encoder/model.safetensors: CLIP ViT-L/14, with the buffer of positions."""
    wide, norm = 768, {"weight": (768,), "bias": (768,)}
    shapes = {
        "embeddings.position_ids": (1, 77),
        "embeddings.token_embedding.weight": (49408, wide),
        "embeddings.position_embedding.weight": (77, wide),
    }
    layers = {"final_layer_norm": norm}
    for number in range(12):
        layer = f"encoder.layers.{number}"
        square = {"weight": (wide, wide), "bias": (wide,)}
        layers |= {f"{layer}.self_attn.{name}_proj": square for name in ("q", "k", "v", "out")}
        layers |= {f"{layer}.layer_norm{one}": norm for one in (1, 2)}
        layers[f"{layer}.mlp.fc1"] = {"weight": (3072, wide), "bias": (3072,)}
        layers[f"{layer}.mlp.fc2"] = {"weight": (wide, 3072), "bias": (wide,)}
    shapes |= {f"{layer}.{name}": shape for layer, both in layers.items() for name, shape in both.items()}
    return {f"text_model.{name}": shape for name, shape in shapes.items()}


def test_the_text_encoder_on_the_hub(tmp_path):
    """It passes; without one tensor, or with one more, it does not."""
    part, stored = empty(tmp_path, "text_encoder", sd14.TEXT_ENCODER), text_encoder_on_the_hub()
    assert len(stored) == 197
    whole.check_tensors("text_encoder", part, stored, "")
    fewer = {name: shape for name, shape in stored.items() if name != "text_model.encoder.layers.7.mlp.fc1.bias"}
    with pytest.raises(ValueError, match=r"lacks tensors \(encoder\.layers\.7\.mlp\.fc1\.bias\)"):
        whole.check_tensors("text_encoder", part, fewer, "")
    with pytest.raises(ValueError, match=r"unknown tensors \(encoder\.layers\.12\.mlp\.fc1\.bias\)"):
        whole.check_tensors("text_encoder", part, stored | {"text_model.encoder.layers.12.mlp.fc1.bias": (3072,)}, "")


def test_the_vae_on_the_hub(tmp_path):
    """Its attention has the names of diffusers before 0.18."""
    part = empty(tmp_path, "vae", sd14.VAE)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    stored = {name: tuple(tensor.shape) for name, tensor in part.state_dict().items()}
    for side in ("encoder", "decoder"):
        for new, name in old.items():
            for which in ("weight", "bias"):
                attention = f"{side}.mid_block.attentions.0"
                stored[f"{attention}.{name}.{which}"] = stored.pop(f"{attention}.{new}.{which}")
    whole.check_tensors("vae", part, stored, "")
    del stored["decoder.mid_block.attentions.0.proj_attn.bias"]
    with pytest.raises(ValueError, match=r"lacks tensors \(decoder\.mid_block\.attentions\.0\.to_out\.0\.bias\)"):
        whole.check_tensors("vae", part, stored, "")
