"""Stable Diffusion 3, with T5 and without, FLUX.1 and FLUX.2-klein against stock diffusers at tiny size; and refusals."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import (
    FEW_IMAGES,
    PROMPTS,
    experiment,
    make_config,
    refuse,
    run_evaluation,
    run_script,
    run_stage,
    stage_of,
    updates_of,
)
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from b2diffurl.algorithm.branching import denoise
from b2diffurl.configuration.settings import ModelSettings, read_settings
from b2diffurl.evaluation.generate import deployed_sampler, training_sampler
from b2diffurl.experiment.stage import LORA_FILE
from b2diffurl.export import export
from b2diffurl.models import Model, base_sizes, check_base, fit, flux, flux2, recognise, sd3
from b2diffurl.models import family as family_of
from b2diffurl.models.policy import decode, predictor
from b2diffurl.runtime import files

RANK, GUIDANCE = 4, 3.5
LONG = pytest.mark.long
FAMILIES = {"sd3": sd3.FAMILY, "sd3_without_t5": sd3.FAMILY, "flux": flux.FAMILY, "flux2": flux2.FAMILY}


def fast(*names: str) -> list:
    """All families as parameters of a test, those but `names` in the long suite."""
    return [name if name in names else pytest.param(name, marks=LONG) for name in FAMILIES]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """A folder with the tiny models by the names of FAMILIES, and `schnell`. Not to be changed."""
    root = tmp_path_factory.mktemp("bases")
    tiny.sd3(root / "sd3")
    tiny.sd3(root / "sd3_without_t5", t5=False)
    tiny.flux(root / "flux")
    tiny.flux(root / "schnell", schnell=True)
    tiny.flux2(root / "flux2")
    tiny.flux2(root / "klein", distilled=True)
    return root


@pytest.fixture(scope="module", params=fast("sd3", "flux", "flux2"))
def base(request, bases) -> Path:
    return bases / request.param


@pytest.fixture(scope="module")
def model(base) -> Model:
    """Not to be changed."""
    return load(base)


@pytest.fixture
def stock(base) -> DiffusionPipeline:
    return stock_pipeline(base)


def load(base: Path, **more) -> Model:
    return tiny.load_model(base, family="auto", resolution=64, **more)


def stock_pipeline(base: Path) -> DiffusionPipeline:
    index = files.read_json(base / "model_index.json")
    absent = [part for part in ("text_encoder_3", "tokenizer_3") if index.get(part) == [None, None]]
    pipeline = DiffusionPipeline.from_pretrained(base, **dict.fromkeys(absent))  # diffusers wants to be told of them
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def settings_of(name: object, **more) -> ModelSettings:
    given = {"model": str(name), "resolution": 64} | more
    return read_settings(make_config({f"pretrained.{key}": value for key, value in given.items()})).model


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def draw(pipeline: DiffusionPipeline, num_steps: int = 6, output_type: str = "np") -> Any:
    """What stock diffusers draws on fixed noise at the tiny model's size."""
    latents = noise(3, 4, 8, 8)
    match type(pipeline).__name__:
        case "FluxPipeline":
            latents = pipeline._pack_latents(latents, 3, 4, 8, 8)
        case "Flux2KleinPipeline":
            latents = noise(3, 16, 4, 4)
    call = {"latents": latents, "num_inference_steps": num_steps, "guidance_scale": GUIDANCE, "height": 64, "width": 64}
    return pipeline(prompt=PROMPTS, **call, output_type=output_type).images


def ours(model: Model, num_steps: int = 6) -> np.ndarray:
    """The same by training's sampler at eta 0."""
    table = model.sampler(num_steps, 0.0, sde="cps")
    predict = predictor(model, table.timesteps, model.encode(PROMPTS), model.unconditional(), guidance_scale=GUIDANCE)
    return decode(model, denoise(predict, table, noise(3, *model.latent_shape), torch.zeros, range(num_steps)), 3).numpy()


# ---- the pipeline's own functions ----


def test_the_sigmas_are_the_pipelines(model, stock):
    """Whatever the number of steps: shifted once, by the family's factor or that of the image's size."""
    for num_steps in (1, 5):
        draw(stock, num_steps, "latent")
        table = model.sampler(num_steps, 0.7, sde="flow")
        assert torch.equal(table.timesteps, stock.scheduler.timesteps)
        assert table.timesteps.dtype == torch.float32
        scheduler = model.scheduler("FlowMatchEulerDiscreteScheduler", num_steps)
        assert torch.equal(scheduler.sigmas, stock.scheduler.sigmas)


def test_a_step_that_is_left_out_leads_to_the_next(model):
    """A tail of fewer steps, by hand: its mean on x_0 and eps is (1 - sigma') x_0 + sigma' eps of the next sigma kept."""
    whole, tail = model.sampler(8, 0.0, sde="cps"), model.sampler(8, 0.0, [2, 5, 7], sde="cps")
    assert torch.equal(tail.timesteps, whole.timesteps[[2, 5, 7]])
    sigma = torch.cat([tail.timesteps, torch.zeros(1)]) / 1000
    x_0, eps = noise(2)
    for i in range(3):
        mean = tail.a[i] * ((1 - sigma[i]) * x_0 + sigma[i] * eps) + tail.b[i] * (eps - x_0)
        assert mean.item() == pytest.approx(((1 - sigma[i + 1]) * x_0 + sigma[i + 1] * eps).item(), abs=1e-5)


def test_noise_levels_are_spread_as_the_steps_are(model):
    """Each of ten steps has a tenth of the thousand levels, within the few that the ends cost."""
    levels, table = model.noise_levels(), model.sampler(10, 0.7, sde="cps")
    counts = torch.histogram(levels.timesteps, torch.cat([table.timesteps.flip(0), torch.tensor([1000.1])])).hist
    assert len(levels.timesteps) == 1000
    assert levels.timesteps.diff().min() > 0
    assert ((counts > 70) & (counts < 125)).sum() >= 9


def test_encode_is_the_pipelines(model, stock):
    """Byte for byte, of a prompt and of none. It does not depend on the prompts beside it."""
    others = [f"prompt_{n}" for n in (2, 3) if hasattr(stock, f"tokenizer_{n}")]
    found = model.encode(PROMPTS)
    for row, prompt in enumerate([*PROMPTS, ""]):
        ours = {name: value[row : row + 1] for name, value in found.items()} if prompt else model.unconditional()
        with torch.no_grad():
            expected = stock.encode_prompt(prompt=[prompt], **dict.fromkeys(others))
        assert torch.equal(ours["prompt_embeds"], expected[0])
        if others:
            assert torch.equal(ours["pooled_prompt_embeds"], expected[len(others)])


@pytest.mark.parametrize("name", FAMILIES)
def test_as_many_text_tokens_as_chosen(bases, name):
    """Each family's setting is that of its pipeline. None at all is for a model without T5 alone."""
    stock = stock_pipeline(bases / name)
    others = [f"prompt_{n}" for n in (2, 3) if hasattr(stock, f"tokenizer_{n}")]
    chosen = {"sd3_without_t5": 0, "flux2": 40}.get(name, 5)  # FLUX.2's prompts are messages, with words of their own
    with torch.no_grad():
        expected = stock.encode_prompt(prompt=PROMPTS[:1], max_sequence_length=chosen, **dict.fromkeys(others))[0]
    shorter = load(bases / name, max_sequence_length=chosen)
    conditions = shorter.encode(PROMPTS[:1])
    assert torch.equal(conditions["prompt_embeds"], expected)
    output = shorter.predict(noise(2, *shorter.latent_shape), torch.tensor(500.0), conditions, shorter.unconditional(), 1.0)
    assert output.isfinite().all()
    counted = base_sizes(settings_of(bases / name, max_sequence_length=chosen)).embedding
    assert counted == sum(value[0].numel() for value in conditions.values())
    if chosen:
        with pytest.raises(ValueError, match=r"max_sequence_length is 0, so .* would read no prompt"):
            check_base(settings_of(bases / name, max_sequence_length=0))


def test_predict_is_the_pipelines_call(model, stock):
    """Bit for bit what its transformer gives to guidance. FLUX.1's is called once, with the scale of guidance."""
    calls: list[tuple[dict, Tensor]] = []
    stock.transformer.register_forward_hook(lambda _, args, kwargs, out: calls.append((kwargs, out[0])), with_kwargs=True)
    draw(stock, 2, "latent")

    def predict(x_t: Tensor, t: Tensor, text: dict, nothing: dict, **more) -> Tensor:
        """With the conditions of rows or calls of the pipeline."""
        names = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections"}
        given = [{ours: one[name] for ours, name in names.items() if name in one} for one in (text, nothing)]
        return model.predict(x_t, t, given[0], {name: value[:1] for name, value in given[1].items()}, GUIDANCE, **more)

    timesteps = model.sampler(2, 0.0, sde="cps").timesteps
    if isinstance(model, flux2.Flux2):  # two calls a step
        for (text, with_text), (nothing, without), t in zip(calls[::2], calls[1::2], timesteps, strict=True):
            x_t, out = text["hidden_states"], without + GUIDANCE * (with_text - without)
            x_t, out = (tokens.transpose(1, 2).unflatten(2, (4, 4)) for tokens in (x_t, out))
            assert torch.equal(predict(x_t, t, text, nothing, unconditional_gradient=False), out)
        return
    for (kwargs, out), t in zip(calls, timesteps, strict=True):
        if isinstance(model, flux.Flux):
            assert kwargs["guidance"].tolist() == [GUIDANCE] * 3
            x_t, out = (flux.unpack(tokens, model.latent_shape) for tokens in (kwargs["hidden_states"], out))
            assert torch.equal(predict(x_t, t, kwargs, kwargs), out)
        else:
            tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
            nothing, text = ({name: value.chunk(2)[n] for name, value in tensors.items()} for n in (0, 1))
            without, with_text = out.chunk(2)
            expected = without + GUIDANCE * (with_text - without)
            assert torch.equal(predict(text["hidden_states"], t, text, nothing), expected)


def test_packing_is_the_pipelines(bases):
    pipeline, latents = stock_pipeline(bases / "flux"), noise(2, 4, 6, 10)
    tokens = flux.pack(latents)
    assert torch.equal(tokens, pipeline._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(flux.unpack(tokens, (4, 6, 10)), latents)
    ids = pipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
    assert torch.equal(load(bases / "flux")._image_ids, ids)


def test_long_prompts_are_counted(model):
    """T5 reads more than CLIP, whose tokens count where there is no T5; FLUX.2's text encoder reads a message."""
    t5 = next((name for name in ("tokenizer_3", "tokenizer_2") if "T5" in type(model.parts.get(name)).__name__), "")
    limit = {"tokenizer_3": 256, "tokenizer_2": 512, "": 77}[t5]
    prompts = ["b " * n for n in (3, 70, 200, 300, 600)]
    tokenizer = model.parts[t5 or "tokenizer"]
    expected = [max(0, len(tokenizer(prompt).input_ids) - limit) for prompt in prompts]
    if isinstance(model, flux2.Flux2):
        expected = [max(0, len(tokenizer(f"user {prompt} assistant ").input_ids) - 512) for prompt in prompts]
    assert model.num_tokens_cut(prompts) == expected
    assert expected[-1] > 0


# ---- stages, and stock diffusers ----


@dataclass(frozen=True)
class Run:
    """An experiment of two stages."""

    folder: Path
    base: Path
    settings: dict

    @property
    def lora(self) -> Path:
        return stage_of(self.folder, 1).checkpoints()[-1] / LORA_FILE


@pytest.fixture(scope="module")
def run(overrides, bases, tmp_path_factory) -> Callable[..., Run]:
    """run(name, objective) -> its run, made once."""
    made: dict[tuple[str, str], Run] = {}

    def make(name: str, objective: str) -> Run:
        if (name, objective) not in made:
            settings = overrides | {"pretrained.model": str(bases / name), "pretrained.resolution": 64, "sample.eta": 0.7}
            settings |= {"sample.guidance_scale": GUIDANCE, "train.objective": objective, "train.num_epochs": 1}
            settings |= {"split_step_left": 3, "split_step_right": 4, "split_stop": 3, "train.learning_rate": 5e-2}
            settings |= {"sample.micro_batch_size": 1, "train.micro_batch_size": 1, "train.gradient_accumulation_steps": 64}
            settings |= FEW_IMAGES | {"eval.deployed.eta": 0.5}  # which the deployed scheduler does not take
            folder = tmp_path_factory.mktemp("run")
            for index in range(2):
                run_stage(folder, settings, index)
            made[name, objective] = Run(folder, bases / name, settings)
        return made[name, objective]

    return make


WAYS = {
    "reinforce": {"train.objective": "reinforce", "selection.images": "all"},
    "dpok": {"train.objective": "dpok"},
    "d3po": {"train.objective": "d3po", "selection.images": "pairs", "selection.advantage": "group"}
    | {"selection.pos_threshold": 0.0, "selection.neg_threshold": 0.0}
    | {"sample.micro_batch_size": 2, "train.micro_batch_size": 2},  # a pair is computed at once
    "awm": {"train.objective": "awm", "selection.images": "all"},
    "flow": {"sample.sde": "flow", "split_stop": 0},  # its last step has noise, too
    "dance": {"sample.sde": "dance", "split_stop": 0, "sample.eta": 0.3},
    "tree": {"split_times": (2, 2), "split_after": (1,), "split_step_left": 3, "split_step_right": 3},
    "tail": {
        "sample.prefix_eta": 0.0,
        "sample.suffix_eta": 0.0,
        "sample.suffix_steps": 1,
        "curriculum": "early",
        "split_stop": 0,
    },
    "sliding": {"curriculum": "sliding", "split_stop": 0, "sample.sde": "flow"},
}


@pytest.mark.parametrize("way", [way if way in ("dpok", "dance") else pytest.param(way, marks=LONG) for way in WAYS])
def test_everything_else_works_on_flow_steps(overrides, bases, tmp_path, way):
    """Objectives, other SDEs, trees and windows: the first ratio is exactly 1, and the LoRA has changed."""
    settings = overrides | {"pretrained.model": str(bases / "sd3_without_t5"), "sample.eta": 0.7, "train.num_epochs": 1}
    settings |= {"split_step_left": 2, "split_step_right": 2, "split_stop": 3, "sample.micro_batch_size": 1}
    settings |= {"pretrained.resolution": 64, "train.micro_batch_size": 1, "train.gradient_accumulation_steps": 64}
    run_stage(tmp_path, settings | FEW_IMAGES | WAYS[way])
    first = updates_of(stage_of(tmp_path))[0]
    assert first["max_abs_log_ratio"] == 0.0
    assert first["grad_norm"] > 0
    lora = load_file(stage_of(tmp_path).checkpoints()[-1] / LORA_FILE)
    assert any(value.any() for key, value in lora.items() if "lora_B" in key)


@pytest.mark.parametrize("name", fast("sd3_without_t5", "flux"))
def test_two_stages_of_ddpo(run, name):
    """The ratio of each first update is exactly 1. The timesteps are on record as they were, fractions and all."""
    one = run(name, "ddpo")
    for index in range(2):
        (update,) = updates_of(stage_of(one.folder, index))
        assert update["max_abs_log_ratio"] == 0.0
        assert update["grad_norm"] > 0
    sampled = stage_of(one.folder).manifest("sample")
    timesteps = load(one.base).sampler(4, 0.7, sde="cps").timesteps
    assert sampled["timesteps"] == timesteps.tolist()
    assert any(t != round(t) for t in sampled["timesteps"])
    assert updates_of(stage_of(one.folder))[0]["timesteps"] == timesteps[1:3].tolist()
    batch = next((stage_of(one.folder).folder / "samples").glob("*.safetensors"))
    assert torch.equal(load_file(batch)["timesteps"], timesteps[1:3])
    record = files.read_json(experiment(one.folder) / "config.json")
    assert record["config"]["pretrained"]["family"] == name.split("_")[0]


@pytest.mark.parametrize("name", fast("sd3"))
def test_two_stages_of_nft(run, name):
    one = run(name, "nft")
    for index in range(2):
        for update in updates_of(stage_of(one.folder, index)):
            assert update["grad_norm"] > 0
    assert load_file(one.lora).keys() == load(one.base).adapter_state().keys()


@pytest.mark.parametrize("name", fast("sd3_without_t5", "flux"))
def test_stock_diffusers_draws_the_same(run, name):
    """Within a level, with the LoRA and without; the LoRA changes the images."""
    one = run(name, "ddpo")
    stock, model = stock_pipeline(one.base), load(one.base, rank=RANK)
    without = draw(stock) * 255
    assert np.abs(ours(model) - without).max() <= 1.0
    stock.load_lora_weights(one.lora.parent)
    model.load_adapter(one.lora)
    assert np.abs(ours(model) - draw(stock) * 255).max() <= 1.0
    assert np.abs(ours(model) - without).max() > 1.5


def test_judged_by_the_familys_own_scheduler(run):
    """Nobody has to name it; on the same noise it draws what training's sampler does without noise."""
    one = run("sd3_without_t5", "ddpo")
    settings = read_settings(make_config(one.settings))
    deployed, training = deployed_sampler(settings), training_sampler(settings)
    assert (deployed.scheduler, deployed.eta) == ("FlowMatchEulerDiscreteScheduler", None)
    assert (training.sde, training.facts["sde"]) == ("cps", "cps")
    (result,) = run_evaluation(one.folder, one.settings, ["last"])
    assert (result["sde"], result["scheduler"]) == ("cps", "")


@pytest.mark.parametrize("form", ["diffusers", "kohya", "pipeline"])
@pytest.mark.parametrize("name", ["sd3_without_t5", "flux", pytest.param("flux2", marks=LONG)])
def test_exports(run, name, form, tmp_path):
    """In stock diffusers they draw what the checkpoint does. In kohya's form it reads FLUX.1's alone; we read all."""
    one, out = run(name, "ddpo"), tmp_path / "out"
    export(experiment(one.folder), form=form, out=out)
    stock = stock_pipeline(one.base)
    stock.load_lora_weights(one.lora.parent)
    card = (out / "README.md").read_text()
    assert f"{type(stock).__name__}.from_pretrained" in card or form == "kohya"
    assert ("text_encoder_3=None, tokenizer_3=None" in card) == (name == "sd3_without_t5" and form != "kohya")
    assert "cps, η 0.7" in card
    assert "eta=" not in card
    assert ("OneTrainer's keys" in card, "kohya's scripts" in card) == (form == "kohya", False)
    if form == "kohya":
        path = out / "tiny.safetensors"
        assert all(key.startswith("lora_transformer_") for key in load_file(path))
        read, trained = FAMILIES[name].read_lora(path), load_file(one.lora)
        assert read.keys() == trained.keys()
        assert all(torch.equal(read[key], value) for key, value in trained.items())
        assert ("```python" in card) == (name == "flux")
        assert ("diffusers does not read this file" in card) == (name != "flux")
        if name != "flux":
            return
    exported = stock_pipeline(out if form == "pipeline" else one.base)
    if form != "pipeline":
        exported.load_lora_weights(out, weight_name="tiny.safetensors" if form == "kohya" else LORA_FILE)
    assert np.abs(draw(exported) - draw(stock)).max() <= 1e-4


@pytest.mark.parametrize("name", fast("flux"))
def test_in_bf16_the_first_ratio_is_near_1(overrides, bases, tmp_path, new_accelerator, name):
    """At equal batch shapes it is 1 to the last bit here, too; other kernels may round, so the bound is wider."""
    settings = overrides | {"pretrained.model": str(bases / name), "pretrained.resolution": 64, "sample.eta": 0.7}
    settings |= {"sample.guidance_scale": GUIDANCE, "split_step_left": 2, "split_step_right": 2, "split_stop": 3}
    settings |= FEW_IMAGES | {
        "mixed_precision": "bf16",
        "sample.micro_batch_size": 1,
        "train.micro_batch_size": 1,
        "train.num_epochs": 1,
    }
    run_stage(tmp_path, settings)
    assert updates_of(stage_of(tmp_path))[0]["max_abs_log_ratio"] < 1e-3


# ---- files ----


def test_sizes(base, model):
    sizes = family_of(settings_of(base)).sizes(settings_of(base))
    conditions = model.encode(["a"])
    assert (sizes.latent_shape, sizes.image_px) == (model.latent_shape, (64, 64))
    assert sizes.embedding == sum(value.numel() for value in conditions.values())
    rank_1 = load(base, rank=1)
    assert sizes.lora == sum(value.numel() for value in rank_1.trainable().values())


def test_only_attention_is_trained(base, model):
    """The projections of image and text in every block, also those of the second attention."""
    trained = {name.split(".lora_")[0] for name in model.trainable()}
    linear = {
        name for name, module in stock_pipeline(base).transformer.named_modules() if isinstance(module, torch.nn.Linear)
    }
    # FLUX.2's single blocks have an output layer that also reads the MLP.
    assert trained == {name for name in linear if ".attn" in name and not name.endswith("attn.to_out")}
    assert any("add_q_proj" in name for name in trained)


@pytest.mark.parametrize("name", fast("flux"))
def test_the_mlps_are_trained_if_asked_for(bases, tmp_path, name):
    """Those of image and text. The file is read by stock diffusers, and acts there as here."""
    base = bases / name
    model, stock = load(base, mlp=True), stock_pipeline(base)
    added = {name.split(".lora_")[0] for name in model.trainable()} - {
        name.split(".lora_")[0] for name in load(base).trainable()
    }
    blocks = {name: one for name, one in stock.transformer.named_modules() if "blocks." in name}
    linear = {name for name, one in blocks.items() if isinstance(one, torch.nn.Linear)}
    assert added == {name for name in linear if ".ff" in name or name.endswith("proj_mlp")}
    torch.manual_seed(0)
    for name, parameter in model.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_file(model.adapter_state(), tmp_path / LORA_FILE)
    stock.load_lora_weights(tmp_path)
    assert np.abs(ours(model) - draw(stock) * 255).max() <= 1.0
    with pytest.raises(ValueError, match=r"does not fit: \d+ keys differ.*with train\.lora_mlp on its MLPs"):
        load(base).load_adapter(tmp_path / LORA_FILE)


def test_a_lora_of_the_other_family_is_refused(bases, tmp_path):
    for own, other in (("sd3", "flux"), ("flux", "sd3")):
        save_file(load(bases / own).adapter_state(), tmp_path / f"{own}.safetensors")
        with pytest.raises(
            ValueError, match=rf"{own}\.safetensors (does not fit: \d+ keys differ|is no LoRA on a transformer)"
        ):
            load(bases / other).load_adapter(tmp_path / f"{own}.safetensors")


def test_kohyas_own_names_of_flux_are_read(bases, tmp_path):
    """The original code's, with q, k and v in one layer, as kohya's scripts write them: through diffusers' converter."""
    names = {"double_blocks_0_img_attn_qkv": 96, "double_blocks_0_txt_attn_qkv": 96, "double_blocks_0_img_attn_proj": 32}
    state = {}
    for name, width in names.items():
        state[f"lora_unet_{name}.lora_down.weight"] = noise(4, 32)
        state[f"lora_unet_{name}.lora_up.weight"] = noise(width, 4)
        state[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "kohya.safetensors")
    read = flux.FAMILY.read_lora(tmp_path / "kohya.safetensors")
    query = "transformer.transformer_blocks.0.attn.to_q.lora_"
    torch.testing.assert_close(
        read[f"{query}B.weight"] @ read[f"{query}A.weight"], 0.5 * noise(96, 4)[:32] @ noise(4, 32), rtol=1e-5, atol=1e-5
    )


# ---- what is refused ----


@pytest.fixture
def mine(bases, tmp_path) -> Callable[[str], Path]:
    """mine(name) -> a copy of a tiny model, to change."""
    return lambda name: shutil.copytree(bases / name, tmp_path / name)


@pytest.mark.parametrize(
    ("name", "part", "entries", "said"),
    [
        ("sd3", "transformer", {"in_channels": 33}, "in_channels 33 and out_channels 4; models that also read an image"),
        ("flux", "transformer", {"out_channels": 8}, "in_channels 16 and out_channels 8; models that also read an image"),
        ("flux", "vae", {"latent_channels": 8}, "room for latent channels 4, but vae/config.json has latent_channels 8"),
        (
            "sd3",
            "transformer",
            {"pooled_projection_dim": 16},
            "pooled_projection_dim 16, but text_encoder and text_encoder_2",
        ),
        (
            "sd3",
            "transformer",
            {"joint_attention_dim": 48},
            "joint_attention_dim 48, but text_encoder_3/config.json has d_mod",
        ),
        ("sd3_without_t5", "transformer", {"joint_attention_dim": 16}, "joint_attention_dim 16, less than the hidden_size"),
        (
            "flux",
            "transformer",
            {"joint_attention_dim": 48},
            "joint_attention_dim 48, but text_encoder_2/config.json has d_mo",
        ),
        ("sd3", "vae", {"scaling_factor": None}, "has scaling_factor None; it must be a number"),
        ("flux", "text_encoder_2", {"vocab_size": 8}, "tokenizer counts to"),
        ("flux", "vae", {"shift_factor": "x"}, "has shift_factor 'x'; it must be a number"),
        ("flux2", "text_encoder", {"hidden_size": "x"}, r"text_encoder/config\.json describes no Qwen3ForCausalLM \(.*'x'"),
    ],
)
def test_parts_that_do_not_fit(mine, name, part, entries, said):
    base = mine(name)
    edit(base / part / "config.json", **entries)
    with pytest.raises(ValueError, match=said):
        FAMILIES[name].check(settings_of(base))


@pytest.mark.parametrize(("name", "part"), [("sd3", "text_encoder_3"), ("sd3", "tokenizer_2"), ("flux", "text_encoder_2")])
def test_a_missing_part(mine, name, part):
    """T5, too, where model_index.json names it."""
    base = mine(name)
    shutil.rmtree(base / part)
    with pytest.raises(FileNotFoundError, match=rf"{name} has no {part}/\. A model directory holds transformer, vae, text_"):
        FAMILIES[name].check(settings_of(base))


def test_refused_before_any_work(bases, mine, overrides, empty):
    """The last step of cps, resolutions, schedulers of another kind, models of few steps; with the remedy."""

    def asked(name: Path, *said: str, **more) -> None:
        given = {"pretrained.model": str(name), "pretrained.resolution": 64, "sample.eta": 0.7}
        refuse(empty, "sample", overrides | given | more, *said)

    asked(bases / "sd3", r"t = \[\d.+\] add no noise.*split_stop=3.*or sample\.sde=flow")
    stop = {"split_stop": 3}
    asked(bases / "sd3", "resolution is 72; this model needs a multiple of 16", **stop | {"pretrained.resolution": 72})
    asked(bases / "sd3", "resolution is 256; this model draws at most 192", **stop | {"pretrained.resolution": 256})
    asked(
        bases / "flux",
        "unknown eval.deployed.scheduler 'DDIM'; known: FlowMatch",
        **stop | {"eval.deployed.scheduler": "DDIM"},
    )
    one = {"sample.guidance_scale": 1.0}
    asked(bases / "schnell", r"schnell is distilled .* Take train\.objective=nft or awm", **stop | one)
    nft = {"train.objective": "nft"}
    asked(bases / "schnell", r"guidance_scale is 5, and .*schnell takes no .* Set sample\.guidance_scale=1", **stop | nft)
    asked(bases / "klein", r"klein is distilled to draw", **stop | one)
    asked(bases / "klein", r"guidance_scale is 5, and .*klein takes no", **stop | nft)
    base = mine("flux")
    tiny.write_scheduler(base, tiny.FLUX_SCHEDULER | {"invert_sigmas": True})
    asked(base, r"has invert_sigmas True.*scheduler=\"\{'invert_sigmas': False\}\"", **stop)
    tiny.write_scheduler(base, tiny.V1_4_SCHEDULER)
    asked(base, "is of a PNDMScheduler, and a flow-matching model is sampled by a FlowMatchEulerDiscreteScheduler", **stop)


@pytest.mark.parametrize(
    ("name", "entries", "said"),
    [
        ("sd3", {"shift": 0}, r"sigmas of 4 steps must fall from at most 1, and are nan, nan, nan, …\. Get the model's own"),
        ("sd3", {"shift": "x"}, "FlowMatchEulerDiscreteScheduler cannot be made of this scheduler's settings"),
        ("flux", {"max_shift": None}, r"shifts by the size of images, but cannot with \{.*'max_shift': None\}\. Get the"),
        ("flux", {"max_image_seq_len": 256}, r"shifts by the size of images, but cannot with .*'max_image_seq_len': 256"),
        (
            "flux2",
            {"_class_name": "EulerDiscreteScheduler"},
            r"is of a EulerDiscreteScheduler, and a flow.*\. Get the mod",
        ),
    ],
)
def test_a_scheduler_that_cannot_be(mine, overrides, name, entries, said):
    base = mine(name)
    edit(base / "scheduler" / "scheduler_config.json", **entries)
    settings = read_settings(make_config(overrides | {"pretrained.model": str(base), "pretrained.resolution": 64}))
    with pytest.raises(ValueError, match=said):
        FAMILIES[name].check_sampler(settings.model, settings.sampling, None)


@pytest.mark.parametrize(
    ("name", "scales", "said"),
    [
        ("flux", (3.5, 1, 3.5), r"train\.guidance_scale is 1 and sample\.guidance_scale 3\.5; .*flux reads.*scale=0, which"),
        ("flux", (3.5, 3.5, 7), ""),
        ("schnell", (1, 3, 1), r"train\.guidance_scale is 3, and .*schnell takes no guidance.* Set train\.guidance_scale=1"),
        ("klein", (1, 1, 4), r"eval\.deployed\.guidance_scale is 4, and .*klein takes no guidance"),
        ("flux2", (4, 1, 2), ""),
        ("sd3", (4.5, 1, 7), ""),
    ],
)
def test_scales_of_guidance(bases, name, scales, said):
    """Of sampling, training and judging. Where it is an input of the network training must have that of sampling."""
    given = dict(zip(("sample.guidance_scale", "train.guidance_scale", "eval.deployed.guidance_scale"), scales, strict=True))
    settings = settings_of(bases / name)
    with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
        family_of(settings).check_guidance(settings, given)


def test_training_without_guidance_is_refused_before_any_work(bases, overrides, empty):
    """As the preset of Stable Diffusion has it, if only the model is another."""
    settings = overrides | {"pretrained.model": str(bases / "flux"), "pretrained.resolution": 64, "split_stop": 3}
    settings |= {"train.objective": "nft", "train.guidance_scale": 1.0}
    refuse(empty, "sample", settings, r"train\.guidance_scale is 1 and sample\.guidance_scale 5; .* train\.guidance_scale=0")


def test_a_decoder_that_overflows_ends_in_two_lines(mine, overrides, tmp_path):
    """With the images, and with what to do."""
    base = mine("flux")
    path = base / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: value * (1e12 if "decoder" in key else 1) for key, value in load_file(path).items()}, path)
    settings = overrides | {"pretrained.model": str(base), "pretrained.resolution": 64, "split_stop": 3}
    ended = run_script(tmp_path, "sample", settings)
    assert ended.code == 2
    assert re.search(r"^error: .*the VAE decoded to non-finite values; use --config\.mixed_precision=", ended.stderr, re.M)
    assert len(ended.stderr[ended.stderr.index("error: ") :].splitlines()) == 2


@pytest.mark.parametrize("entry", [None, [], [None, None]])
def test_t5_may_be_absent_in_any_words(mine, entry):
    """model_index.json may say null, or nothing."""
    base = mine("sd3_without_t5")
    edit(base / "model_index.json", text_encoder_3=entry)
    sd3.FAMILY.check(settings_of(base))
    assert sd3.FAMILY.describe(settings_of(base)).absent == ("text_encoder_3", "tokenizer_3")


def test_a_single_file_is_refused(tmp_path):
    """By its keys it is known, and by the family that the user names; most such files lack text encoders."""
    for key, family in (("model.diffusion_model.joint_blocks.0.x", "sd3"), ("double_blocks.0.x", "flux")):
        path = tmp_path / f"{family}.safetensors"
        save_file({key: torch.zeros(1)}, path)
        for given in ("auto", family):
            with pytest.raises(ValueError, match=rf"{family}\.safetensors is a single file.* Give the model's directory"):
                family_of(settings_of(path, family=given)).check(settings_of(path))


def test_step_distilled_models_are_known_by_name():
    for name in ("stabilityai/stable-diffusion-3.5-large-turbo", "/models/FLUX.1-schnell", "x/SD3-Flash"):
        with pytest.raises(ValueError, match="is distilled to draw an image in a few steps"):
            fit.require_many_steps(settings_of(name), distilled=False)
    fit.require_many_steps(settings_of("/models/turbo/stable-diffusion-3.5-medium"), distilled=False)


def test_recognised(bases):
    for name in FAMILIES:
        assert recognise.find_family(settings_of(bases / name)) == name.split("_")[0]


def test_weights_lie_where_torch_puts_its_own(bases):
    """By where they lie products round differently, and torchrun has them copied: results would depend on the launcher."""
    parts = [part for part in load(bases / "flux").parts.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) == 4
    assert {tensor.data_ptr() % 64 for part in parts for tensor in (*part.parameters(), *part.buffers())} == {0}


def test_judging_refuses_guidance_that_a_model_does_not_take(bases):
    """As sampling does; and results depend on how many text tokens there are."""
    settings = {"pretrained.model": str(bases / "klein"), "pretrained.resolution": 64, "sample.guidance_scale": 1.0}
    deployed_sampler(read_settings(make_config(settings)))
    with pytest.raises(ValueError, match=r"eval\.deployed\.guidance_scale is 4, and .* takes no guidance"):
        deployed_sampler(read_settings(make_config(settings | {"eval.deployed.guidance_scale": 4.0})))


def test_results_are_of_so_many_text_tokens(run, bases):
    """Those of another number are made anew, and the card has no eta that the pipeline would not take."""
    one = run("sd3_without_t5", "ddpo")
    folders = set()
    for tokens in (-1, 3):
        settings = one.settings | {"pretrained.max_sequence_length": tokens, "allow_config_change": True}
        (result,) = run_evaluation(one.folder, settings, ["base"])
        folders.add(result["folder"])
    assert len(folders) == 2


def test_sdxl_turbo_is_known_by_its_name(tmp_path):
    """Its steps are not trained; nft, which needs none, takes it."""
    base = tiny.sdxl(tmp_path / "sdxl-turbo")
    settings = read_settings(make_config({"pretrained.model": str(base), "sample.guidance_scale": 1.0}))
    found = family_of(settings.model)
    with pytest.raises(ValueError, match=r"sdxl-turbo is distilled to draw an image in a few steps"):
        found.check_sampler(settings.model, settings.sampling, settings.schedule.window(0))
    found.check_sampler(settings.model, settings.sampling, None)
