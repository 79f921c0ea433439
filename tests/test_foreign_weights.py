"""Weights of other programs: a base model in one file of the original layout, and LoRAs that were not trained here."""

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import experiment, run_stage, run_verb
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from b2diffurl.configuration.settings import ModelSettings
from b2diffurl.models import Model, stable_diffusion
from b2diffurl.runtime import files

RANK = 4
LORA_TARGETS = list(stable_diffusion.LORA.targets)


def load(model: Path, *, rank: int = RANK, config: str = "") -> Model:
    settings = ModelSettings("stable_diffusion", str(model), "main", "", config, resolution=0, lora_rank=rank)
    return stable_diffusion.load(settings, device=torch.device("cpu"), dtype=torch.float32, seed=0, decoder=True)


def output(model: Model, *, guidance_scale: float = 3.0) -> Tensor:
    """What the model predicts on fixed noise."""
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    conditions, unconditional = model.encode(["a red circle", "a blue square"]), model.encode([""])
    with torch.no_grad():
        return model.predict(noise, torch.tensor(501), conditions, unconditional, guidance_scale)


# ---- a base model in one file ----


@pytest.fixture(scope="module")
def single_file(models, tmp_path_factory) -> Path:
    """The tiny model as the one .safetensors file that the original Stable Diffusion code would read."""
    pipeline = StableDiffusionPipeline.from_pretrained(models / "sd", safety_checker=None)
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    safetensors.torch.save_file(original_layout(pipeline), path)
    return path


def original_layout(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The weights under the keys of the original (CompVis) code."""
    layers = pipeline.unet.config.layers_per_block + 1
    levels = len(pipeline.vae.config.block_out_channels)
    state = {unet_key(key, layers): value for key, value in pipeline.unet.state_dict().items()}
    for key, value in pipeline.vae.state_dict().items():
        # its attention is of 1x1 convolutions there
        matrix = ".attentions." in key and value.ndim == 2
        state[vae_key(key, levels)] = value[:, :, None, None] if matrix else value
    for key, value in pipeline.text_encoder.state_dict().items():
        state["cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")] = value
    return {key: value.contiguous() for key, value in state.items()}


def unet_key(key: str, layers: int) -> str:
    """A UNet key in the original layout; `layers` blocks there make one level, a downsampler counted as one."""

    def block(match: re.Match) -> str:
        side, level, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * layers}.0.op"
        if kind == "upsamplers":
            # an upsampler stands after its level's last block, which at the first level has no attention
            return f"output_blocks.{level * layers + layers - 1}.{1 if level == 0 else 2}.conv"
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


def test_single_file_is_the_directory(models, single_file):
    """A base in one file, its configs from a local directory, computes what the directory does, bit for bit."""
    directory, file = load(models / "sd"), load(single_file, config=str(models / "sd"))
    assert torch.equal(output(file), output(directory))
    assert torch.equal(file.encode(["a cross"])["prompt_embeds"], directory.encode(["a cross"])["prompt_embeds"])
    latents = torch.randn(2, *file.latent_shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(file.decode(latents), directory.decode(latents))
    assert file.scheduler_config == directory.scheduler_config
    assert file.fingerprint == files.sha256(single_file)


def test_stage_from_a_single_file(models, single_file, overrides, finished, tmp_path):
    """A stage on it ends in the LoRA that the directory gives, bit for bit."""
    run_stage(tmp_path, overrides | {"pretrained.model": str(single_file), "pretrained.config": str(models / "sd")})
    lora = "stage0/checkpoints/checkpoint_2/pytorch_lora_weights.safetensors"
    assert (experiment(tmp_path) / lora).read_bytes() == (experiment(finished) / lora).read_bytes()


def test_single_file_must_be_safetensors(models, tmp_path):
    """A pickled checkpoint is refused before anything of it is read."""
    (tmp_path / "model.ckpt").write_bytes(b"never a pickle")
    with pytest.raises(ValueError, match=r"model\.ckpt is not a \.safetensors file"):
        load(tmp_path / "model.ckpt", config=str(models / "sd"))


def test_single_file_needs_its_configs(single_file):
    """Without configs at hand, and no hub, the error names what is missing and how to get it."""
    with pytest.raises(FileNotFoundError, match=r"pretrained\.config.*CompVis/stable-diffusion-v1-4.*hf download"):
        load(single_file, config="CompVis/stable-diffusion-v1-4")


# ---- LoRAs from elsewhere ----


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


def save(form: str, folder: Path, pipeline: StableDiffusionPipeline, state: dict, alpha: int = RANK) -> Path:
    """The LoRA file of one program or another; `save_attn_procs` knows no alpha."""
    if form == "diffusers":
        return save_diffusers(folder, pipeline, state)
    path = folder / f"{form}.safetensors"
    return save_kohya(path, state, alpha) if form == "kohya" else save_attn_procs(path, state)


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
    model = load(models / "sd")
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
        load(models / "sd").load_adapter(path)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_lora_of_another_rank_is_refused(models, pipeline, tmp_path, form):
    """The error says which setting to change, and with it the file loads."""
    path = save(form, tmp_path, pipeline, random_lora(pipeline, rank=8, alpha=8), 8)
    with pytest.raises(ValueError, match=r"Set train\.lora_rank to its rank"):
        load(models / "sd").load_adapter(path)
    load(models / "sd", rank=8).load_adapter(path)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_lora_on_other_layers_is_refused(models, pipeline, tmp_path, form):
    """One on the feed-forward layers too, as kohya's default is, would lose weights: refused, with a layer named."""
    path = save(form, tmp_path, pipeline, random_lora(pipeline, targets=[*LORA_TARGETS, "ff.net.2"]))
    with pytest.raises(ValueError, match=r"keys differ, such as unet\..*ff\.net\.2.*must be a LoRA on the UNet's attention"):
        load(models / "sd").load_adapter(path)


def test_lora_with_an_alpha_a_layer_is_refused(models, pipeline, tmp_path):
    """One scale cannot stand for several, so the error names what is not supported."""
    path = save("diffusers", tmp_path, pipeline, random_lora(pipeline, alpha_pattern={"to_q": 8}))
    with pytest.raises(ValueError, match="alpha_pattern"):
        load(models / "sd").load_adapter(path)


def test_dora_is_refused(models, pipeline, tmp_path):
    """Its magnitudes have no place in a LoRA, and are not dropped in silence."""
    path = save("kohya", tmp_path, pipeline, random_lora(pipeline))
    state = safetensors.torch.load_file(path)
    state["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.dora_scale"] = torch.ones(16, 1)
    safetensors.torch.save_file(state, path)
    with pytest.raises(ValueError, match="is a DoRA"):
        load(models / "sd").load_adapter(path)


def test_refused_lora_leaves_the_disk_alone(models, config, pipeline, tmp_path):
    """A file that does not fit stops a stage before it writes anything into the experiment."""
    path = save_diffusers(tmp_path / "foreign", pipeline, random_lora(pipeline, rank=8, alpha=8))
    config.resume_from = str(path)
    with pytest.raises(ValueError, match="does not fit"):
        run_verb(tmp_path, config, "sample")
    assert not experiment(tmp_path).exists()
