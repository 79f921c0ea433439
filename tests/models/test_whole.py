"""A base model with something missing is refused in one sentence, before any work; one that is whole passes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from conftest import (
    ROOT,
    assert_refused,
    experiment,
    make_config,
    refuse,
    run_evaluation,
    run_stage,
    start,
    unfinish,
    update_of,
)
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from foreign import output
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from b2diffurl.configuration.settings import ModelSettings, read_settings
from b2diffurl.models import unet, whole
from b2diffurl.models.stable_diffusion import FAMILY, StableDiffusion

SHAPES = ROOT / "model" / "shapes" / "base"
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture
def base(models, tmp_path) -> Path:
    """A copy of the tiny model, to break."""
    return shutil.copytree(models / "sd", tmp_path / "base")


def rewrite(path: Path, change: Callable[[dict], dict]) -> None:
    save_file(change(load_file(path)), path, {"format": "pt"})


def without(number: int, part: str = "") -> Callable[[dict], dict]:
    """Removes the first tensors whose names hold `part`."""

    def change(tensors: dict) -> dict:
        gone = [key for key in sorted(tensors) if part in key][:number]
        return {key: value for key, value in tensors.items() if key not in gone}

    return change


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_missing_tensor(base, part):
    """Of any part: its folder, its class, the first tensors and what to do."""
    name = min(load_file(base / WEIGHTS[part]))
    rewrite(base / WEIGHTS[part], without(1))
    with pytest.raises(ValueError, match=rf"base/{part} is not a whole \w+: it lacks tensors \({name}\)\. Get its"):
        tiny.load_model(base)


@pytest.mark.parametrize("script", ["dry run", "sample"])
def test_a_missing_layer_before_any_work(overrides, empty, tmp_path, script):
    """The text encoder of the embedded model without three tensors: refused by the dry run and by the first phase."""
    broken = shutil.copytree(SHAPES, tmp_path / "no_layer")
    rewrite(broken / WEIGHTS["text_encoder"], without(3, "layers.0"))
    settings = overrides | {"pretrained.model": str(broken)}
    said = r"no_layer/text_encoder is not a whole CLIPTextModel: it lacks tensors \(encoder\.layers\.0\.\S+, .*\)\. Get"
    if script == "dry run":
        assert_refused(start(empty, settings, "--dry_run"), said)
        assert not list(empty.iterdir())
    else:
        refuse(empty, "sample", settings, said)


def test_unknown_and_misshapen_tensors(base):
    """Those are named, too, each with the shape that it should have."""
    rewrite(base / WEIGHTS["vae"], lambda tensors: tensors | {"odd.weight": tensors["encoder.conv_in.bias"].clone()})
    with pytest.raises(ValueError, match=r"whole AutoencoderKL: it has unknown tensors \(odd\.weight\)\."):
        tiny.load_model(base)
    rewrite(base / WEIGHTS["unet"], lambda tensors: tensors | {"conv_in.weight": tensors["conv_in.weight"][:, :3].clone()})
    said = (
        r"whole UNet2DConditionModel: it has misshapen tensors \(conv_in\.weight is \(8, 3, 3, 3\), not \(8, 4, 3, 3\)\)\."
    )
    with pytest.raises(ValueError, match=said):
        tiny.load_model(base)


def test_a_unet_saved_with_its_lora(base):
    """The remedy is to fuse it."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    unet.save_pretrained(base / "unet")
    with pytest.raises(ValueError, match=r"base/unet .*lacks .*to_q\.weight.* It was saved with a LoRA attached: fuse"):
        tiny.load_model(base)


def test_shards_are_whole(base):
    """A part may lie in several files; one that its index names must be there, and all of them together must be whole."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    (base / WEIGHTS["unet"]).unlink()
    unet.save_pretrained(base / "unet", max_shard_size="50kB")
    shards = sorted((base / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    loaded = tiny.load_model(base).unet
    assert torch.equal(loaded.conv_in.weight, unet.conv_in.weight)
    rewrite(shards[1], without(1))
    with pytest.raises(ValueError, match="lacks tensors"):
        tiny.load_model(base)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        tiny.load_model(base)


def lose_vocabulary(base: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (base / "tokenizer" / name).unlink(missing_ok=True)


@pytest.mark.parametrize("script", ["dry run", "sample"])
def test_a_tokenizer_without_vocabulary(overrides, empty, tmp_path, script):
    """Transformers would make one up, to which all prompts are the empty one."""
    broken = shutil.copytree(SHAPES, tmp_path / "no_vocabulary")
    lose_vocabulary(broken)
    settings = overrides | {"pretrained.model": str(broken)}
    said = r"no_vocabulary/tokenizer lacks a tokenizer \(tokenizer\.json, or vocab\.json and merges\.txt, or"
    if script == "dry run":
        assert_refused(start(empty, settings, "--dry_run"), said)
    else:
        refuse(empty, "sample", settings, said)


def test_a_vocabulary_that_is_lost_between_two_stages(workplace, overrides, base):
    """The next stage's first phase refuses the base."""
    settings = overrides | {"pretrained.model": str(base), "run_name": "stage1"}
    unfinish(workplace, "sample")
    lose_vocabulary(base)
    refuse(workplace, "sample", settings, r"base/tokenizer lacks a tokenizer")


@pytest.mark.parametrize("kept", ["vocab.json", "merges.txt"])
def test_half_a_vocabulary(base, kept):
    """Words without merges, or merges without words, are no tokenizer."""
    lose_vocabulary(base)
    (base / "tokenizer" / kept).write_text("{}")
    with pytest.raises(FileNotFoundError, match="base/tokenizer lacks a tokenizer"):
        tiny.load_model(base)


def test_a_tokenizer_of_another_model(base):
    """One that counts further than the text encoder, that lets longer prompts pass, or that knows no word."""
    tokens = tiny.tokenizer()
    tokens.add_tokens(["extra"])
    tokens.save_pretrained(base / "tokenizer")
    with pytest.raises(ValueError, match=r"the tokenizer counts to 54, and vocab_size there is 54\."):
        tiny.load_model(base)
    tokens = tiny.tokenizer()
    tokens.model_max_length = 78
    tokens.save_pretrained(base / "tokenizer")
    with pytest.raises(ValueError, match=r"model_max_length is 78, and max_position_embeddings is 77\. Lower it in"):
        tiny.load_model(base)
    tokens = CLIPTokenizer(vocab={tiny.BOS: 0, tiny.EOS: 1}, merges=[], model_max_length=77)
    tokens.save_pretrained(base / "tokenizer")
    with pytest.raises(ValueError, match="base/tokenizer reads every prompt as the empty one"):
        tiny.load_model(base)


def change_config(base: Path, part: str, **entries) -> None:
    path = base / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"time_cond_proj_dim": 8}, "has time_cond_proj_dim 8, for an input that is never given here"),
        ({"class_embed_type": "timestep"}, "has class_embed_type 'timestep', for an input that is never given"),
        ({"num_class_embeds": 10}, "has num_class_embeds 10, for an input that is never given"),
        ({"addition_embed_type": "image", "encoder_hid_dim": 16}, "has addition_embed_type 'image', for an input that"),
        ({"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 16}, "has encoder_hid_dim_type 'image_proj', for an"),
        ({"attention_type": "gated"}, "has attention_type 'gated', for an input that is never given"),
        ({"in_channels": 9}, "has in_channels 9 and out_channels 4; models that also read an image, such as for inpainting"),
        ({"in_channels": 16, "out_channels": 16}, "has in_channels 16, but vae/config.json has latent_channels 4"),
        ({"cross_attention_dim": 32}, "has cross_attention_dim 32, but text_encoder/config.json has hidden_size 16"),
        ({"cross_attention_dim": [16, 32]}, "has cross_attention_dim 32, but text_encoder/config.json has hidden_size 16"),
        ({"encoder_hid_dim": 32}, "has encoder_hid_dim 32, but text_encoder/config.json has hidden_size 16"),
        (
            {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64},
            "has addition_embed_type 'text_time', for an input that is never given here",
        ),
    ],
)
def test_a_unet_that_reads_more_than_it_is_given(base, entries, said):
    """Or other text and latents than the other parts make."""
    change_config(base, "unet", **entries)
    with pytest.raises(ValueError, match=f"base/unet/config.json {said}"):
        tiny.load_model(base)


@pytest.mark.parametrize(
    "inputs", [{"addition_embed_type": "text", "addition_embed_type_num_heads": 2}, {"encoder_hid_dim": 16}]
)
def test_a_unet_that_reads_text_in_another_way(base, inputs):
    """Passes: what it needs is given to it."""
    config = UNet2DConditionModel.load_config(base / "unet") | inputs
    UNet2DConditionModel.from_config(config).save_pretrained(base / "unet")
    model = tiny.load_model(base)
    embeds = model.encode(["a"])
    assert model.predict(torch.zeros(1, *model.latent_shape), torch.tensor(1), embeds, embeds, 2.0).isfinite().all()


def test_a_sample_size_that_is_a_list(base, models, overrides, finished, tmp_path):
    """[8, 8] is 8: the dry run passes, and a stage ends in the same LoRA, bit for bit."""
    change_config(base, "unet", sample_size=[8, 8])
    settings = overrides | {"pretrained.model": str(base)}
    plans = [start(tmp_path, one, "--dry_run").stdout.splitlines() for one in (settings, overrides)]
    assert plans[0][-1] == plans[1][-1]
    assert [line for line in plans[0] if line.startswith("disk")] == [line for line in plans[1] if line.startswith("disk")]
    run_stage(tmp_path, settings)
    assert torch.equal(update_of(tmp_path), update_of(finished))


def test_images_that_are_not_square(base, overrides, tmp_path):
    """Height comes first, as in the pipeline of diffusers; sampling, training, judging and the plan follow."""
    change_config(base, "unet", sample_size=[8, 16])
    settings = overrides | {"pretrained.model": str(base)}
    run_stage(tmp_path, settings)
    run_evaluation(tmp_path, settings, checkpoints=["last"])
    stock = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    drawn = stock("a red circle", num_inference_steps=1).images[0].size
    images = [Image.open(path).size for path in experiment(tmp_path).rglob("*.png") if path.name != "tree.png"]
    assert (drawn, set(images)) == ((128, 64), {(128, 64)})
    sizes = FAMILY.sizes(read_settings(make_config(settings)).model)
    assert (sizes.latent_shape, sizes.image_px) == ((4, 8, 16), (64, 128))


def test_a_resolution_is_in_the_pixels_of_the_vae():
    """One that halves an image twice makes latents of 4 x 4 pixels, as in the pipeline of diffusers."""
    network, vae = {"block_out_channels": [8, 16], "sample_size": 8}, {"block_out_channels": [4, 8, 8]}
    assert unet.latent_size(network, vae, 64) == (16, 16)
    assert unet.latent_size(network, vae, 0) == (8, 8)
    with pytest.raises(ValueError, match="resolution is 60; this model needs a multiple of 8 pixels"):
        unet.latent_size(network, vae, 60)
    with pytest.raises(ValueError, match=r"no sample_size; set pretrained\.resolution"):
        unet.latent_size({"sample_size": None}, vae, 0)


@pytest.fixture
def in_the_hub(tmp_path, monkeypatch) -> Callable[[Path], Path]:
    """in_the_hub(folder) -> the snapshot in the hub's cache that holds a copy of it, as the model somebody/model."""

    def copy(folder: Path) -> Path:
        root = tmp_path / "hub" / "models--somebody--model"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("abc")
        return shutil.copytree(folder, root / "snapshots" / "abc")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return copy


def settings_of(name: object, variant: str = "") -> ModelSettings:
    return read_settings(make_config({"pretrained.model": str(name), "pretrained.variant": variant})).model


def load(settings: ModelSettings) -> StableDiffusion:
    return FAMILY.load(settings, device=torch.device("cpu"), dtype=torch.float32, seed=0, decoder=True)


def test_a_variant_that_only_some_parts_have(base, models, in_the_hub):
    """The others are taken without it, as diffusers does; also from the hub's cache, when the hub cannot be asked."""
    file = base / WEIGHTS["unet"]
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    in_the_hub(base)
    expected = output(tiny.load_model(models / "sd"))
    for name in (base, "somebody/model"):
        assert torch.equal(output(load(settings_of(name, "fp16"))), expected)
    with pytest.raises(FileNotFoundError, match=r"base has no \*\.fp32\.safetensors in any part\. Set pretrained\.variant"):
        FAMILY.check(settings_of(base, "fp32"))


def test_a_download_that_was_cut_off(models, in_the_hub):
    """The check passes, because loading goes on with it. Without the hub loading says what to do."""
    snapshot = in_the_hub(models / "sd")
    settings = settings_of("somebody/model")
    assert torch.equal(output(load(settings)), output(tiny.load_model(models / "sd")))
    lose_vocabulary(snapshot)
    FAMILY.check(settings)
    with pytest.raises(FileNotFoundError, match=r"somebody/model is not, or not whole, in the local cache.* hf download"):
        load(settings)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_that_are_not_finite(base, part, number):
    """One number in one tensor is enough."""
    name = max(load_file(base / WEIGHTS[part]))

    def change(tensors: dict) -> dict:
        tensors[name].view(-1)[-1] = number
        return tensors

    rewrite(base / WEIGHTS[part], change)
    with pytest.raises(ValueError, match=rf"the {part} of \S+ has weights that are NaN or infinite \({re.escape(name)}\)\."):
        tiny.load_model(base)


def test_weights_that_half_precision_cannot_hold(base):
    """They become infinite by loading; the remedy is another precision."""
    rewrite(base / WEIGHTS["unet"], lambda tensors: tensors | {"conv_in.bias": torch.full((8,), 1e6)})
    with pytest.raises(ValueError, match=r"infinite \(conv_in\.bias\)\. .* --config\.mixed_precision=no helps"):
        tiny.load_model(base, dtype=torch.float16)
    tiny.load_model(base)


def test_a_part_that_is_loaded_with_holes():
    """Tensors that a library left empty are named, whatever the files looked like."""
    part = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"the unet of base lacks tensors \(1\.bias, 1\.weight\)"):
        whole.check_loaded("the unet of base", part)


def test_a_text_encoder_that_reads_nothing(base):
    """Its token embeddings are all the same, so any two prompts embed alike."""
    rewrite(base / WEIGHTS["text_encoder"], lambda tensors: {
        key: value.zero_() if "token_embedding" in key else value for key, value in tensors.items()
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"the text_encoder of \S+base embeds all prompts alike"):
        tiny.load_model(base)


def test_the_keys_of_older_libraries(base, models):
    """The models on the hub were written with a prefix and positions in the text encoder, and with other names in the VAE's
    attention. They are whole, and the same model."""
    old = {new: older for older, new in whole.ATTENTION.items()}

    def text(tensors: dict) -> dict:
        names = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in tensors.items()}
        return names | {"text_model.embeddings.position_ids": torch.arange(tiny.MAX_TOKENS)[None]}

    def vae(tensors: dict) -> dict:
        pattern = re.compile(r"(?<=attentions\.0\.)(to_q|to_k|to_v|to_out\.0)")
        return {pattern.sub(lambda match: old[match[1]], key): value for key, value in tensors.items()}

    rewrite(base / WEIGHTS["text_encoder"], text)
    rewrite(base / WEIGHTS["vae"], vae)
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in load_file(base / WEIGHTS["vae"])
    one, other = tiny.load_model(base), tiny.load_model(models / "sd")
    assert torch.equal(output(one), output(other))
    latents = torch.randn(1, *one.latent_shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one.decode(latents), other.decode(latents))


def test_a_config_of_another_class(base):
    """A UNet's config that its class cannot be built from is named."""
    change_config(base, "unet", down_block_types=["NoBlock", "DownBlock2D"])
    with pytest.raises(ValueError, match=r"base/unet/config\.json describes no UNet2DConditionModel \(.*NoBlock"):
        tiny.load_model(base)


def test_a_config_with_a_value_of_another_type(base):
    """transformers refuses it by an error of its own kind."""
    change_config(base, "text_encoder", hidden_size="wide")
    with pytest.raises(ValueError, match=r"text_encoder/config\.json describes no CLIPTextModel \(.*'hidden_size'.*'wide'"):
        tiny.load_model(base)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_config_with_brackets_in_brackets(base, part):
    """It is named before a library reads it, which would raise a RecursionError."""
    (base / part / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=rf"base/{part}/config\.json is damaged \(it has too many brackets"):
        tiny.load_model(base)


def test_a_pipeline_of_another_kind(base):
    """Its name is given beside what it lacks; of another family, whatever it lacks."""
    shutil.move(base / "unet", base / "transformer")
    (base / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(FileNotFoundError, match=r"base has no unet/\. .* It is a WanPipeline, which may not be supported"):
        tiny.load_model(base)
    (base / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match=r"base is a FluxPipeline, and not a StableDiffusionPipeline\. Leave pretrained"):
        tiny.load_model(base)


def test_a_part_that_a_later_phase_needs(workplace, overrides, base):
    """A stage that is sampled but not trained refuses a broken VAE at its start, not when it is judged."""
    unfinish(workplace, "train")
    rewrite(base / WEIGHTS["vae"], without(1))
    settings = overrides | {"pretrained.model": str(base), "run_name": "stage1"}
    refuse(workplace, "sample", settings, r"base/vae is not a whole AutoencoderKL")


def configure(folder: Path, **entries) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def check_files(base: Path) -> None:
    FAMILY.check(read_settings(make_config({"pretrained.model": str(base)})).model)


@pytest.mark.parametrize("content", ["{}", "", "[1]"])
def test_a_tokenizer_that_cannot_be_read(base, content):
    (base / "tokenizer" / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer holds no tokenizer that can be read"):
        check_files(base)


def test_a_tokenizer_without_its_merges(tmp_path):
    """It reads every prompt letter by letter: words of its vocabulary are not found. The embedded model's is whole."""
    embedded = shutil.copytree(ROOT / "model" / "shapes" / "base", tmp_path / "base")
    check_files(embedded)
    path = embedded / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tokenizer cuts words of its own vocabulary, such as"):
        check_files(embedded)


def test_weights_under_another_name(base):
    """Libraries look for one name; another would only be refused when they load it."""
    (base / "text_encoder" / "model.safetensors").rename(base / "text_encoder" / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match=r"text_encoder has no model\.safetensors"):
        check_files(base)


@pytest.mark.parametrize("size", ["8", [8], [8, 8, 8], 0, [8, None]])
def test_a_sample_size_that_is_none(base, size):
    configure(base / "unet", sample_size=size)
    with pytest.raises(ValueError, match="sample_size"):
        tiny.load_model(base)


def test_a_vae_without_its_scale(base):
    configure(base / "vae", scaling_factor=None)
    with pytest.raises(ValueError, match=r"vae/config\.json has scaling_factor None"):
        check_files(base)


@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_config_that_is_no_object(base, file):
    """It is named by whatever reads it first: the sizes, the identity or the check."""
    (base / file).write_text("[1]")
    model = read_settings(make_config({"pretrained.model": str(base)})).model
    reads = [FAMILY.identity] if file.startswith("scheduler") else [FAMILY.sizes, FAMILY.identity]
    for read in reads:
        with pytest.raises(ValueError, match=f"{file} holds no JSON object"):
            read(model)


def test_a_stray_file_is_no_part_of_the_model(base):
    """What is not loaded counts neither for the identity nor for which LoRAs fit."""
    model = read_settings(make_config({"pretrained.model": str(base)})).model
    before = FAMILY.identity(model), FAMILY.fingerprint(model)
    shutil.copy(base / WEIGHTS["vae"], base / "unet" / "backup.safetensors")
    assert (FAMILY.identity(model), FAMILY.fingerprint(model)) == before
