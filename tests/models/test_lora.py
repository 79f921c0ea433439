"""LoRAs that other programs trained, and what is refused of them."""

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
    ("form", "alpha"), [("diffusers", RANK), ("diffusers", 8), ("kohya", RANK), ("kohya", 8), ("attn_procs", RANK)]
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


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_lora_of_another_rank_is_refused(models, pipeline, tmp_path, form):
    """The error says which setting to change, and with it the file loads."""
    path = save(form, tmp_path, pipeline, random_lora(pipeline, rank=8, alpha=8), 8)
    with pytest.raises(ValueError, match=r"Set train\.lora_rank to its rank"):
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
