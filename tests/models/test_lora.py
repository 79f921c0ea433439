"""LoRAs that other programs trained, and what is refused of them."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from conftest import experiment, run_stage, run_verb
from diffusers import StableDiffusionPipeline
from foreign import LORA_TARGETS, RANK, output, random_lora, save, save_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from b2diffurl.models.stable_diffusion import FAMILY
from b2diffurl.runtime import files


@pytest.fixture
def pipeline(models) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(models / "sd", safety_checker=None)


def stock_output(pipeline: StableDiffusionPipeline) -> Tensor:
    """What stock diffusers' UNet predicts on the noise of `output`, unguided."""
    ids = pipeline.tokenizer(
        ["a red circle", "a blue square"], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipeline.unet(noise, 501, pipeline.text_encoder(ids)[0]).sample


@pytest.mark.parametrize(
    ("form", "alpha"),
    [
        ("diffusers", RANK),
        ("diffusers", 8),
        ("kohya", RANK),
        ("kohya", 8),
        ("peft", RANK),
        ("peft", 8),
        ("attn_procs", RANK),
    ],
)
def test_foreign_lora_acts_as_where_it_comes_from(models, pipeline, tmp_path, form, alpha):
    """A LoRA of another program predicts here what it predicted there, whatever its alpha, and is float32 from then on."""
    path = save(form, tmp_path, pipeline, random_lora(pipeline, alpha=alpha), alpha)
    model = tiny.load_model(models / "sd")
    untouched = output(model, guidance_scale=1.0)
    model.load_adapter(path)
    expected = stock_output(pipeline)
    assert (expected - untouched).abs().max() > 1e-2
    torch.testing.assert_close(output(model, guidance_scale=1.0), expected, rtol=0, atol=1e-6)
    assert all(parameter.dtype == torch.float32 for parameter in model.trainable().values())


@pytest.mark.parametrize("alpha", [RANK, 8])
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_stock_diffusers_agrees(models, pipeline, tmp_path, form, alpha):
    """Stock `load_lora_weights` takes these files, and their alpha, the same way: they are the real formats."""
    path = save(form, tmp_path, pipeline, random_lora(pipeline, alpha=alpha), alpha)
    stock = StableDiffusionPipeline.from_pretrained(models / "sd", safety_checker=None)
    stock.load_lora_weights(path.parent, weight_name=path.name)
    torch.testing.assert_close(stock_output(stock), stock_output(pipeline), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "attn_procs"])
def test_experiment_starts_from_a_foreign_lora(models, pipeline, overrides, tmp_path, form):
    """`resume_from` a foreign file: the first update's ratio is 1, and the checkpoint holds what the file said, moved by
    no more than AdamW's few steps of the learning rate."""
    state = random_lora(pipeline)
    (tmp_path / "foreign").mkdir()
    path = save(form, tmp_path / "foreign", pipeline, state)
    rate = 1e-4
    run_stage(tmp_path, overrides | {"resume_from": str(path), "train.learning_rate": rate})
    stage = experiment(tmp_path) / "stage0"
    manifest = files.read_json(stage / "train.json")
    assert manifest["max_abs_log_ratio_first_update"] <= 1e-5
    trained = safetensors.torch.load_file(stage / "checkpoints/checkpoint_2/pytorch_lora_weights.safetensors")
    steps = [(trained[f"unet.{key}"] - value).abs().max().item() for key, value in state.items()]
    assert 0 < max(steps) < 2 * manifest["num_updates"] * rate


def test_lora_on_the_text_encoder_is_refused(models, pipeline, tmp_path):
    """Only the UNet is trained here, so a file that also changes the text encoder does not fit, and the error says so."""
    pipeline.text_encoder.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"]))
    text = get_peft_model_state_dict(pipeline.text_encoder)
    path = save_diffusers(tmp_path, pipeline, random_lora(pipeline), text_encoder_lora_layers=text)
    with pytest.raises(ValueError, match="also changes the text encoder"):
        tiny.load_model(models / "sd").load_adapter(path)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_lora_of_another_rank_is_refused(models, pipeline, tmp_path, form):
    """The error says which setting to change, and with it the file loads."""
    path = save(form, tmp_path, pipeline, random_lora(pipeline, rank=8, alpha=8), 8)
    with pytest.raises(ValueError, match=r"its rank is 8, not 4\. Set train\.lora_rank=8\."):
        tiny.load_model(models / "sd").load_adapter(path)
    tiny.load_model(models / "sd", rank=8).load_adapter(path)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_lora_on_other_layers_is_refused(models, pipeline, tmp_path, form):
    """One on the feed-forward layers too, as kohya's default is, would lose weights: refused, with a layer named."""
    path = save(form, tmp_path, pipeline, random_lora(pipeline, targets=[*LORA_TARGETS, "ff.net.2"]))
    with pytest.raises(ValueError, match=r"keys differ, such as unet\..*ff\.net\.2.*must be a LoRA on the UNet's attention"):
        tiny.load_model(models / "sd").load_adapter(path)


def test_lora_with_an_alpha_a_layer_is_refused(models, pipeline, tmp_path):
    """One scale cannot stand for several, so the error names what is not supported."""
    path = save("diffusers", tmp_path, pipeline, random_lora(pipeline, alpha_pattern={"to_q": 8}))
    with pytest.raises(ValueError, match="alpha_pattern"):
        tiny.load_model(models / "sd").load_adapter(path)


LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def altered(path: Path, **entries: Tensor | None) -> Path:
    """The file with further tensors of LAYER by the ends of their keys, or without them."""
    state = safetensors.torch.load_file(path)
    for end, value in entries.items():
        state.pop(f"{LAYER}.{end}", None)
        state |= {} if value is None else {f"{LAYER}.{end}": value}
    safetensors.torch.save_file(state, path)
    return path


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("oft_blocks", "OFT"),
        ("oft_R.weight", "OFT"),
        ("a1.weight", "GLoRA"),
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("lora_mid.weight", "LoCon with a third matrix"),
        ("on_input", r"\(IA\)\^3"),
        ("vera_lambda_b", "VeRA"),
        ("diff", "full difference of weights"),
        ("w_norm", "full difference of weights"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_another_kind_is_named(tmp_path, end, kind, alone):
    """An adapter of another kind is refused by its name, whether it is the file's only one, with its alpha, or not."""
    path = tmp_path / "x.safetensors"
    halves = {} if alone else {f"{LAYER}.lora_{one}.weight": torch.ones(4, 4) for one in ("up", "down")}
    safetensors.torch.save_file(halves | {f"{LAYER}.{end}": torch.ones(4, 4), f"{LAYER}.alpha": torch.tensor(4.0)}, path)
    with pytest.raises(ValueError, match=rf"x\.safetensors is a {kind} \(lora_unet.*\); only a plain LoRA"):
        FAMILY.read_lora(path)


@pytest.mark.parametrize("missing", ["lora_up.weight", "lora_down.weight"])
def test_half_a_layer_is_refused(pipeline, tmp_path, missing):
    """With its alpha or without it."""
    path = altered(save("kohya", tmp_path, pipeline, random_lora(pipeline)), **{missing: None})
    with pytest.raises(ValueError, match=r"is not whole: .*lacks the layer's other matrix"):
        FAMILY.read_lora(path)
    with pytest.raises(ValueError, match=r"is not whole: .*lacks the layer's other matrix"):
        FAMILY.read_lora(altered(path, alpha=None))


def test_alpha_alone_is_refused(pipeline, tmp_path):
    path = altered(
        save("kohya", tmp_path, pipeline, random_lora(pipeline)), **{"lora_up.weight": None, "lora_down.weight": None}
    )
    with pytest.raises(ValueError, match=rf"is not whole: {LAYER}\.alpha is not one number beside"):
        FAMILY.read_lora(path)


def test_alpha_that_is_no_single_number_is_refused(pipeline, tmp_path):
    path = altered(save("kohya", tmp_path, pipeline, random_lora(pipeline)), alpha=torch.ones(2))
    with pytest.raises(ValueError, match=rf"is not whole: {LAYER}\.alpha"):
        FAMILY.read_lora(path)


@pytest.mark.parametrize("form", ["diffusers", "attn_procs"])
def test_alpha_beside_any_pair_counts(pipeline, tmp_path, form):
    """As kohya's: B is multiplied by alpha / rank, here 2, in that layer alone."""
    path = save(form, tmp_path, pipeline, random_lora(pipeline))
    plain, state = FAMILY.read_lora(path), safetensors.torch.load_file(path)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    name = f"unet.{layer}.to_q.alpha" if form == "diffusers" else f"{layer}.processor.to_q.alpha"
    safetensors.torch.save_file(state | {name: torch.tensor(8.0)}, path)
    scaled = FAMILY.read_lora(path)
    factors = {key: (scaled[key] / plain[key]).unique().tolist() for key in plain}
    assert factors == {key: [2.0 if key == f"unet.{layer}.to_q.lora_B.weight" else 1.0] for key in plain}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"use_rslora": True}, "has use_rslora"),
        ({"use_dora": True}, "has use_dora"),
        ({"alpha_pattern": {"to_q": 8}}, "has alpha_pattern"),
        ({"rank_pattern": {"to_q": 8}}, "has rank_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights=pissa_niter_4"),
        ({"r": 8}, "has rank 4, and is described as of alpha 4 and rank 8"),
        ({"lora_alpha": "4"}, "has rank 4, and is described as of alpha '4'"),
    ],
)
def test_what_peft_records_and_one_factor_cannot_say(pipeline, tmp_path, changed, said):
    path = save("peft", tmp_path, pipeline, random_lora(pipeline))
    described = path.with_name("adapter_config.json")
    described.write_text(json.dumps(json.loads(described.read_text()) | changed))
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors {re.escape(said)}"):
        FAMILY.read_lora(path)


def test_peft_without_its_config(pipeline, tmp_path):
    """Its alpha is unknown, so it is refused rather than guessed."""
    path = save("peft", tmp_path, pipeline, random_lora(pipeline))
    path.with_name("adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"whose alpha is in adapter_config\.json\. Put that file beside it"):
        FAMILY.read_lora(path)


@pytest.mark.parametrize("prefix", ["lora_unet_", "unet."])
def test_layers_of_another_network_are_refused(tmp_path, prefix):
    """Such as those of the original layout: they look like a LoRA, and nothing of diffusers would read them."""
    layer = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    kohya = prefix == "lora_unet_"
    name, halves = (layer.replace(".", "_"), ("down", "up")) if kohya else (layer, "AB")
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({f"{prefix}{name}.lora_{half}.weight": torch.ones(4, 4) for half in halves}, path)
    with pytest.raises(ValueError, match=r"x\.safetensors is no LoRA on a UNet: it holds .*blocks\.1\.1\."):
        FAMILY.read_lora(path)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite_is_refused(models, pipeline, tmp_path, form, value):
    """One number is enough: for resuming and judging, which load it, and for exporting, which reads it."""
    state = random_lora(pipeline)
    next(iter(state.values()))[0, 0] = value
    path = save(form, tmp_path, pipeline, state)
    with pytest.raises(ValueError, match="holds NaN or infinite values, in unet"):
        tiny.load_model(models / "sd").load_adapter(path)
    with pytest.raises(ValueError, match="holds NaN or infinite values, in unet"):
        FAMILY.read_lora(path)


def test_lora_of_another_width_is_refused(models, pipeline, tmp_path):
    """Its rank is right, so the error speaks of the base model and not of the rank."""
    state = {
        key: value.repeat(1, 2) if ".attn2.to_k.lora_A" in key else value for key, value in random_lora(pipeline).items()
    }
    path = save("kohya", tmp_path, pipeline, state)
    with pytest.raises(ValueError, match=r"is \(4, 32\), and this base model needs \(4, 16\)") as error:
        tiny.load_model(models / "sd").load_adapter(path)
    assert "lora_rank" not in str(error.value)


def test_dora_is_refused(models, pipeline, tmp_path):
    """Its magnitudes have no place in a LoRA, and are not dropped in silence."""
    path = save("kohya", tmp_path, pipeline, random_lora(pipeline))
    state = safetensors.torch.load_file(path)
    state["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.dora_scale"] = torch.ones(16, 1)
    safetensors.torch.save_file(state, path)
    with pytest.raises(ValueError, match="is a DoRA"):
        tiny.load_model(models / "sd").load_adapter(path)


def test_refused_lora_leaves_the_disk_alone(models, config, pipeline, tmp_path):
    """A file that does not fit stops a stage before it writes anything into the experiment."""
    path = save_diffusers(tmp_path / "foreign", pipeline, random_lora(pipeline, rank=8, alpha=8))
    config.resume_from = str(path)
    with pytest.raises(ValueError, match="does not fit"):
        run_verb(tmp_path, config, "sample")
    assert not experiment(tmp_path).exists()


@pytest.mark.parametrize("metadata", ["[1]", "null", "[" * 100_000, '{"unet.lora_alpha": true}'])
def test_metadata_that_describes_no_lora(pipeline, tmp_path, metadata):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(random_lora(pipeline), path, {"format": "pt", "lora_adapter_metadata": metadata})
    with pytest.raises(ValueError, match=r"x\.safetensors is d|x\.safetensors has rank"):
        FAMILY.read_lora(path)


@pytest.mark.parametrize("shape", [(), (4,), (0, 4)])
def test_a_tensor_that_is_no_matrix(tmp_path, shape):
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_"
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({f"{name}A.weight": torch.ones(shape), f"{name}B.weight": torch.ones(shape)}, path)
    with pytest.raises(ValueError, match="is no matrix"):
        FAMILY.read_lora(path)
