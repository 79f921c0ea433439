"""SDXL against stock diffusers at tiny size: encoding, prediction, sampling, decoding, LoRAs, files; and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from conftest import FEW_IMAGES, PROMPTS, experiment, make_config, refuse, run_stage, stage_of, updates_of
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from foreign import original_layout, output, random_lora, save_diffusers, save_kohya
from safetensors.torch import load_file, save_file
from torch import Tensor

from b2diffurl.algorithm.branching import denoise
from b2diffurl.configuration.settings import ModelSettings, read_settings
from b2diffurl.evaluation.generate import denoise_by
from b2diffurl.experiment.stage import LORA_FILE
from b2diffurl.export import export
from b2diffurl.models import base_identity, recognise, sdxl
from b2diffurl.models.lora import add_lora, lora_parameters
from b2diffurl.models.policy import decode, predictor
from b2diffurl.models.sdxl import SDXL
from b2diffurl.runtime import files
from benchmarks.full_size import XL_UNET

CPU = torch.device("cpu")
RANK = 4
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture(scope="module")
def model(base) -> SDXL:
    """Not to be changed."""
    return tiny.load_model(base, family="sdxl")


@pytest.fixture
def mine(base, tmp_path) -> Path:
    """A copy of the tiny model, to change."""
    return shutil.copytree(base, tmp_path / "mine")


def stock_pipeline(base: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def stock(base) -> StableDiffusionXLPipeline:
    return stock_pipeline(base)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def settings_of(name: object, **more) -> ModelSettings:
    return read_settings(make_config({"pretrained.model": str(name)} | more)).model


# ---- the pipeline's own functions ----


@pytest.mark.parametrize("zeros", [pytest.param(True, marks=LONG), False])
def test_encode_is_the_pipelines(model, mine, zeros):
    """Of prompts and of no prompt, which is zeros or "" as model_index.json says, and counts for the model's identity."""
    before = base_identity(settings_of(mine))
    edit(mine / "model_index.json", force_zeros_for_empty_prompt=zeros)
    assert (base_identity(settings_of(mine)) == before) == zeros  # the pipeline was saved with zeros
    model = tiny.load_model(mine, family="sdxl")
    text, nothing = model.encode(PROMPTS), model.unconditional()
    with torch.no_grad():
        stock = stock_pipeline(mine)
        rows = [stock.encode_prompt(prompt) for prompt in PROMPTS]  # as ours: another number of rows rounds differently
        _, no_embeds, _, no_pooled = rows[0]
    assert torch.equal(text["prompt_embeds"], torch.cat([row[0] for row in rows]))
    assert torch.equal(text["pooled_prompt_embeds"], torch.cat([row[2] for row in rows]))
    assert torch.equal(nothing["prompt_embeds"], no_embeds)
    assert torch.equal(nothing["pooled_prompt_embeds"], no_pooled)
    assert nothing["prompt_embeds"].any() != zeros
    assert [value.shape for value in text.values()] == [(3, 77, 40), (3, 12)]


def test_predict_is_the_pipelines_call(model, stock):
    """Bit for bit what its UNet gives to guidance, sizes of the image and all.

    With the pipeline's own conditions: it encodes all prompts in one batch, which rounds otherwise than one by one.
    """
    calls = []
    stock.unet.register_forward_hook(lambda _, args, kwargs, out: calls.append((args, kwargs, out[0])), with_kwargs=True)
    stock(PROMPTS, latents=noise(3, 4, 8, 8), num_inference_steps=2, guidance_scale=5.0, output_type="latent")
    for (x_t, t), kwargs, out in calls:
        without, with_text = out.chunk(2)
        added = kwargs["added_cond_kwargs"]
        nothing, text = (
            {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            for embeds, pooled in zip(kwargs["encoder_hidden_states"].chunk(2), added["text_embeds"].chunk(2), strict=True)
        )
        ours = model.predict(x_t[:3], t, text, {name: value[:1] for name, value in nothing.items()}, 5.0)
        assert torch.equal(ours, without + 5.0 * (with_text - without))
        assert added["time_ids"][0].tolist() == [64, 64, 0, 0, 64, 64]


@pytest.mark.parametrize("normalised", [pytest.param(False, marks=LONG), True])
def test_decode_is_the_pipelines(mine, normalised):
    """By the VAE's scale, or by the mean and deviation of its latents if it has them."""
    if normalised:
        edit(mine / "vae" / "config.json", latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[2.0, 3.0, 4.0, 5.0])
    pipeline, model = stock_pipeline(mine), tiny.load_model(mine, family="sdxl")
    call = {"latents": noise(1, 4, 8, 8), "num_inference_steps": 1, "output_type": "latent"}
    latents = pipeline("a", **call).images
    images = pipeline("a", **call | {"output_type": "np"}).images * 255
    assert np.abs(model.decode(latents).numpy() - images).max() <= 0.51
    assert np.ptp(images) > 20


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=LONG), torch.bfloat16])
def test_the_vae_stays_float32_where_its_config_says_so(mine, dtype):
    """Its weights are the file's, unrounded; everything else has the precision asked for."""
    model = tiny.load_model(mine, dtype=dtype, family="sdxl")
    stored = load_file(mine / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in model.parts["vae"].state_dict().items())
    assert {model.parts[part].dtype for part in ("unet", "text_encoder", "text_encoder_2")} == {dtype}
    edit(mine / "vae" / "config.json", force_upcast=False)
    assert tiny.load_model(mine, dtype=dtype, family="sdxl").parts["vae"].dtype == dtype


def load(base: Path, device: torch.device, **more) -> SDXL:
    settings = settings_of(base, **{f"pretrained.{key}": value for key, value in more.items()})
    return sdxl.FAMILY.load(settings, device=device, dtype=torch.float32, seed=0, decoder=True)


def test_offloaded_encoders_come_and_go(base, model, monkeypatch):
    """With pretrained.offload a call of `encode` takes both to the network's device once, and back even if it fails. Prompts
    that are known, such as those of a stage once it is prepared, need neither."""
    one, moves = load(base, CPU, offload=True), []
    assert torch.equal(one.encode(PROMPTS)["prompt_embeds"], model.encode(PROMPTS)["prompt_embeds"])
    one._encoders_rest = "main memory"
    for name in ("text_encoder", "text_encoder_2"):
        monkeypatch.setattr(one.parts[name], "to", lambda where, name=name: moves.append((name, str(where))))
    there, back = ([(name, where) for name in ("text_encoder", "text_encoder_2")] for where in ("cpu", "main memory"))
    one.prepare({*PROMPTS, "a blue cross"})
    assert moves == there + back
    found = one.encode(["a blue cross", *PROMPTS]), one.unconditional()
    assert moves == there + back
    expected = model.encode(["a blue cross", *PROMPTS]), model.unconditional()
    for ours, own in zip(found, expected, strict=True):
        assert all(torch.equal(ours[name], value) for name, value in own.items())
    with pytest.raises(ValueError, match="text"):
        one.encode([None])
    assert moves == 2 * (there + back)
    one.prepare(["a blue cross"])  # the others are forgotten, so that they do not pile up
    assert moves == 2 * (there + back)
    one.encode(PROMPTS)
    assert moves == 3 * (there + back)


@pytest.mark.gpu
def test_offloaded_encoders_leave_the_gpu(base):
    """They are in main memory from the start, and after encoding; what they encode is the same."""
    cuda = torch.device("cuda")
    plain, one = load(base, cuda), load(base, cuda, offload=True)
    for _ in range(2):
        assert {one.parts[name].device.type for name in ("text_encoder", "text_encoder_2")} == {"cpu"}
        text = one.encode(PROMPTS)
        assert text["prompt_embeds"].is_cuda
        assert torch.equal(text["prompt_embeds"], plain.encode(PROMPTS)["prompt_embeds"])
    assert {one.parts[name].device.type for name in ("unet", "vae")} == {"cuda"}


def test_the_last_step_lands_at_the_image(model):
    """The table is stock DDIM's with set_alpha_to_one; its last mean is the clean image, and its other steps have noise.
    Other schedulers have the file's own settings."""
    scheduler = DDIMScheduler.from_config(tiny.XL_SCHEDULER, set_alpha_to_one=True)
    scheduler.set_timesteps(4)
    table, (x, eps, z) = model.sampler(4, 1.0), noise(3, 1, 4, 8, 8)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(eps, t, x, eta=1.0, variance_noise=z).prev_sample
        torch.testing.assert_close(table.a[i] * x + table.b[i] * eps + table.sigma[i] * z, expected, rtol=1e-5, atol=1e-5)
    assert [bool(sigma) for sigma in table.sigma] == [True, True, True, False]
    assert model.scheduler("DDIMScheduler", 20).config.set_alpha_to_one is False


# ---- stages, and stock diffusers ----


@pytest.fixture(scope="module")
def trained(base, overrides, tmp_path_factory) -> Path:
    """A folder with two stages of `ddpo`, sampled and trained in equal batch shapes. Not to be changed."""
    settings = overrides | {"pretrained.model": str(base), "split_step_left": 3, "split_step_right": 4, "split_stop": 3}
    settings |= {"train.num_epochs": 1, "train.learning_rate": 5e-2, "train.gradient_accumulation_steps": 64}
    settings |= {"sample.micro_batch_size": 1, "train.micro_batch_size": 1} | FEW_IMAGES
    folder = tmp_path_factory.mktemp("trained")
    for index in range(2):
        run_stage(folder, settings, index)
    return folder


@pytest.fixture(scope="module")
def lora(trained) -> Path:
    return stage_of(trained, 1).checkpoints()[-1] / LORA_FILE


def test_two_stages(trained, base):
    """The ratio of each first update is exactly 1; a prompt's conditions are stored once; the family is on record."""
    for index in range(2):
        (update,) = updates_of(stage_of(trained, index))
        assert update["max_abs_log_ratio"] == 0.0
        assert update["grad_norm"] > 0
    selected = next((stage_of(trained).folder / "selected").glob("*.safetensors"))
    tensors = load_file(selected)
    assert {name: value.shape[1:] for name, value in tensors.items() if "embeds" in name} == {
        f"{kind}.{name}": shape
        for kind in ("condition", "unconditional")
        for name, shape in (("prompt_embeds", (77, 40)), ("pooled_prompt_embeds", (12,)))
    }
    record = files.read_json(experiment(trained) / "config.json")
    assert record["config"]["pretrained"]["family"] == "sdxl"
    assert {"text_encoder_2", "tokenizer_2", "empty prompt"} < record["base_model"].keys()


def draw(pipeline: StableDiffusionXLPipeline, **more) -> np.ndarray:
    call = {"latents": noise(3, 4, 8, 8), "num_inference_steps": 6, "guidance_scale": 5.0, "output_type": "np"}
    return pipeline(PROMPTS, **call | more).images * 255


def test_stock_diffusers_draws_the_same(base, lora, stock):
    """Within a level, by training's sampler at eta 0 and by the pipeline's own Euler; without the LoRA other images."""
    model = tiny.load_model(base, rank=RANK, family="sdxl")
    model.load_adapter(lora)
    x_T = noise(3, 4, 8, 8)

    def predict_at(timesteps: Tensor) -> Callable:
        return predictor(model, timesteps, model.encode(PROMPTS), model.unconditional(), guidance_scale=5.0)

    table = model.sampler(6, 0.0)
    by_ddim = decode(model, denoise(predict_at(table.timesteps), table, x_T, torch.zeros, range(6)), 3).numpy()
    euler = model.scheduler("EulerDiscreteScheduler", 6)
    by_euler = decode(model, denoise_by(euler, predict_at(euler.timesteps), x_T, torch.Generator(), None), 3).numpy()
    without = draw(stock)
    stock.load_lora_weights(lora.parent)
    assert np.abs(draw(stock) - by_euler).max() <= 1.0
    assert np.abs(without - by_euler).max() > 5.0
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, set_alpha_to_one=True)
    assert np.abs(draw(stock, eta=0.0) - by_ddim).max() <= 1.0


@pytest.mark.parametrize("form", ["diffusers", pytest.param("kohya", marks=LONG), pytest.param("pipeline", marks=LONG)])
def test_exports_draw_the_same(base, trained, lora, stock, tmp_path, form):
    """Every format, in stock diffusers, as the card says; the card is SDXL's."""
    out = export(experiment(trained), form=form, out=tmp_path / "out")
    stock.load_lora_weights(lora.parent)
    if form == "pipeline":
        exported = stock_pipeline(out)
        assert exported.config.force_zeros_for_empty_prompt is True
        assert exported.scheduler.config.set_alpha_to_one is False
    else:
        exported = stock_pipeline(base)
        exported.load_lora_weights(out, weight_name="tiny.safetensors" if form == "kohya" else LORA_FILE)
    assert np.abs(draw(exported) - draw(stock)).max() <= 0.01
    card = (out / "README.md").read_text()
    assert "Stable Diffusion XL" in card
    assert "StableDiffusionXLPipeline.from_pretrained" in card


# ---- LoRAs of other programs ----


def test_kohyas_names_are_those_of_the_original_code(stock, tmp_path):
    """Which kohya's scripts write for SDXL; with its mark, and read back as it was."""
    state = {f"unet.{key}": value for key, value in random_lora(stock).items()}
    sdxl.FAMILY.write_kohya(tmp_path / "x.safetensors", state)
    written = load_file(tmp_path / "x.safetensors")
    layers = {key.split("_transformer_blocks")[0] for key in written}
    blocks = [f"input_blocks_{n}_1" for n in (4, 5, 7, 8)] + [f"output_blocks_{n}_1" for n in range(6)]
    assert layers == {f"lora_unet_{block}" for block in (*blocks, "middle_block_1")}
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"ss_base_model_version": "sdxl_base_v1-0"}
    read = sdxl.FAMILY.read_lora(tmp_path / "x.safetensors")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("form", "alpha"),
    [pytest.param("diffusers", 8, marks=LONG), pytest.param("kohya", 8, marks=LONG), ("original", RANK)],
)
def test_foreign_loras_act_as_where_they_come_from(base, stock, tmp_path, form, alpha):
    """diffusers' with its alpha, kohya's under either kind of names."""
    state = random_lora(stock, alpha=alpha)
    match form:
        case "diffusers":
            path = save_diffusers(tmp_path, stock, state)
        case "kohya":
            path = save_kohya(tmp_path / "x.safetensors", state, alpha)
        case _:
            path = tmp_path / "x.safetensors"
            sdxl.FAMILY.write_kohya(path, {f"unet.{key}": value for key, value in state.items()})
    model = tiny.load_model(base, rank=RANK, family="sdxl")
    untouched = output(model)
    model.load_adapter(path)
    stock_model = tiny.load_model(base, rank=RANK, family="sdxl")
    stock_model.parts["unet"] = stock_model.network = stock.unet
    torch.testing.assert_close(output(model), output(stock_model), rtol=1e-5, atol=1e-5)
    assert (output(model) - untouched).abs().max() > 0.01


@pytest.mark.parametrize("encoder", [pytest.param("lora_te1", marks=LONG), "lora_te2"])
def test_a_lora_on_a_text_encoder_is_refused(stock, tmp_path, encoder):
    """Its part would be lost; the reason is given."""
    path = save_kohya(tmp_path / "x.safetensors", random_lora(stock), RANK)
    text = {f"{encoder}_text_model_encoder_layers_0_mlp_fc1.lora_{half}.weight": torch.ones(4, 4) for half in ("up", "down")}
    save_file(load_file(path) | text, path)
    with pytest.raises(ValueError, match=r"also changes the text encoder \(text_encoder.*only a LoRA on the UNet"):
        sdxl.FAMILY.read_lora(path)


def test_a_lora_of_another_family_is_refused(models, base, tmp_path):
    one = tiny.load_model(models / "sd")
    save_file(one.adapter_state(), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors does not fit: \d+ keys differ"):
        tiny.load_model(base, family="sdxl").load_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["input_blocks_99_7_attn1_to_q", "middle_block_7_x", "input_blocks_x_y"])
def test_layers_of_no_unet_are_refused(tmp_path, name):
    halves = {f"lora_unet_{name}.lora_{half}.weight": torch.ones(4, 4) for half in ("up", "down")}
    save_file(halves, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors is no LoRA on a UNet: it holds "):
        sdxl.FAMILY.read_lora(tmp_path / "x.safetensors")


# ---- files ----


@pytest.fixture(scope="module")
def single_file(base, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    save_file(original_layout(stock_pipeline(base)), path)
    return path


def test_single_file_is_the_directory(base, model, single_file):
    """Recognised by its keys, checked, and the same bits; in half precision its VAE is float32, too."""
    settings = settings_of(single_file, **{"pretrained.config": str(base)})
    assert recognise.find_family(settings) == "sdxl"
    sdxl.FAMILY.check(settings)
    one = tiny.load_model(single_file, config=str(base), family="sdxl")
    assert torch.equal(output(one), output(model))
    assert all(torch.equal(one.encode(PROMPTS)[name], value) for name, value in model.encode(PROMPTS).items())
    assert torch.equal(one.decode(noise(1, 4, 8, 8)), model.decode(noise(1, 4, 8, 8)))
    half = tiny.load_model(single_file, config=str(base), dtype=torch.bfloat16, family="sdxl")
    assert (half.parts["vae"].dtype, half.unet.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("part", "begins"),
    [("text_encoder", "conditioner.embedders.0."), ("text_encoder_2", "conditioner.embedders.1."), ("vae", "first_stage")],
)
def test_a_single_file_that_lacks_a_part(base, single_file, tmp_path, part, begins):
    tensors = {key: value for key, value in load_file(single_file).items() if not key.startswith(begins)}
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=rf"less\.safetensors has no {part}\. A single file must hold unet, vae, text_enc"):
        tiny.load_model(tmp_path / "less.safetensors", config=str(base), family="sdxl")


def test_single_files_of_others_are_named(base, single_file, tmp_path):
    """The refiner, an inpainting model, and Stable Diffusion 1.x where SDXL was asked for."""
    save_file({"conditioner.embedders.0.model.ln_final.bias": torch.zeros(1)}, tmp_path / "refiner.safetensors")
    with pytest.raises(ValueError, match=r"is a model of SDXL's refiner, which is not supported"):
        recognise.find_family(settings_of(tmp_path / "refiner.safetensors"))
    wide = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)}
    save_file(load_file(single_file) | wide, tmp_path / "inpaint.safetensors")
    with pytest.raises(ValueError, match=r"inpaint\.safetensors is an inpainting model, which also reads an image"):
        recognise.find_family(settings_of(tmp_path / "inpaint.safetensors"))
    save_file({"cond_stage_model.x": torch.zeros(1)}, tmp_path / "sd.safetensors")
    with pytest.raises(ValueError, match=r"is a model of stable_diffusion, and not of sdxl\. Leave pretrained\."):
        tiny.load_model(tmp_path / "sd.safetensors", config=str(base), family="sdxl")


def test_sizes(base, model):
    sizes = sdxl.FAMILY.sizes(settings_of(base))
    assert (sizes.latent_shape, sizes.image_px, sizes.embedding) == ((4, 8, 8), (64, 64), 77 * 40 + 12)
    assert sizes.lora * RANK == sum(value.numel() for value in model.trainable().values())


@LONG
def test_kohyas_layers_at_full_size():
    """A LoRA's layers are those that kohya's scripts name, in number."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**XL_UNET)
        add_lora(unet, sdxl.LORA, rank=1, seed=0)
    keys = [sdxl.original_key(sdxl.LORA.key(name)) for name in lora_parameters(unet)]
    depth = {}
    for key in keys:
        block, number = re.match(r"unet\.(.+)\.1\.transformer_blocks\.(\d+)\.", key).groups()
        depth[block] = max(depth.get(block, 0), int(number) + 1)
    expected = {f"input_blocks.{n}": d for n, d in ((4, 2), (5, 2), (7, 10), (8, 10))} | {"middle_block": 10}
    expected |= {f"output_blocks.{n}": 10 if n < 3 else 2 for n in range(6)}
    assert depth == expected
    assert len(keys) == 70 * 8 * 2


# ---- what is refused ----


@pytest.mark.parametrize(
    ("part", "entries", "said"),
    [
        ("unet", {"addition_embed_type": None}, r"is no UNet of SDXL: it has addition_embed_type None\. Leave pretrained"),
        (
            "unet",
            {"in_channels": 9},
            "has in_channels 9 and out_channels 4; models that also read an image, such as",
        ),
        ("unet", {"time_cond_proj_dim": 8}, "has time_cond_proj_dim 8, for an input that is never given here"),
        (
            "unet",
            {"cross_attention_dim": 32},
            r"has cross_attention_dim 32, but the text encoders' hidden sizes are 16 \+",
        ),
        (
            "unet",
            {"addition_time_embed_dim": 4},
            "has room for a pooled text of 36, but text_encoder_2/config.json has",
        ),
        ("vae", {"scaling_factor": None}, "has scaling_factor None; it must be a number"),
    ],
)
def test_parts_that_do_not_fit(mine, part, entries, said):
    edit(mine / part / "config.json", **entries)
    with pytest.raises(ValueError, match=said):
        sdxl.FAMILY.check(settings_of(mine))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer_2"])
def test_a_missing_part(mine, part):
    shutil.rmtree(mine / part)
    with pytest.raises(FileNotFoundError, match=rf"mine has no {part}/\. A model directory holds unet, vae, text_encoder, "):
        sdxl.FAMILY.check(settings_of(mine))


def test_a_missing_tensor_of_the_second_encoder(mine):
    """Its projection, too, which Stable Diffusion's encoder may lack."""
    path = mine / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path)
    del tensors["text_projection.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"is not a whole CLIPTextModelWithProjection: it lacks tensors \(text_projection"):
        sdxl.FAMILY.check(settings_of(mine))


def test_refused_before_any_work(mine, overrides, empty):
    """A resolution that does not divide, a step without noise that would be trained, and a scheduler of another kind."""
    settings = overrides | {"pretrained.model": str(mine)}
    refuse(empty, "sample", settings | {"pretrained.resolution": 100}, "resolution is 100; this model needs a multiple of")
    refuse(empty, "sample", settings, r"t = \[1\] add no noise.* let windows end before them: --config\.split_stop=3")
    tiny.write_scheduler(mine, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    refuse(empty, "sample", settings, "FlowMatchEulerDiscreteScheduler, which is not made of betas")
