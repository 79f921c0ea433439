"""Export: what others load draws what we draw, the card says what the files say, nothing is lost, bad input is refused."""

import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import PROMPTS, ROOT, Ended, call, experiment, judged, snapshot
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from foreign import random_lora, save, save_kohya
from huggingface_hub import ModelCard, ModelCardData

from b2diffurl.experiment.evaluation_table import identity
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.export import export, main
from b2diffurl.models.lora import add_lora, lora_parameters
from b2diffurl.models.stable_diffusion import FAMILY
from b2diffurl.models.unet import LORA
from b2diffurl.runtime import files


def run(folder: Path, *options: str) -> Ended:
    """python -m b2diffurl.export tiny, with these options, in `folder`."""
    return call(folder, ["export.py", "tiny", *options], main)


def draw(pipeline: StableDiffusionPipeline) -> np.ndarray:
    """Images [N,H,W,3] in 0..255 of the tests' prompts on fixed noise, deterministic DDIM."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 6, "guidance_scale": 5.0, "eta": 0.0, "output_type": "np"}
    return pipeline(PROMPTS, latents=noise, **options).images * 255


def base_pipeline(models: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(models / "sd", safety_checker=None)


@pytest.fixture(scope="module")
def strong(models, tmp_path_factory) -> Callable[[str, int], tuple[Path, np.ndarray]]:
    """strong(form, alpha) -> a LoRA file of another program, strong enough to be seen, and what it draws there."""

    def make(form: str, alpha: int) -> tuple[Path, np.ndarray]:
        pipeline = base_pipeline(models)
        state = random_lora(pipeline, alpha=alpha)
        path = save(form, tmp_path_factory.mktemp("strong"), pipeline, state, alpha)
        return path, draw(pipeline)

    return make


def load_export(models: Path, out: Path, form: str) -> StableDiffusionPipeline:
    """As the card says."""
    if form == "pipeline":
        return StableDiffusionPipeline.from_pretrained(out)
    pipeline = base_pipeline(models)
    pipeline.load_lora_weights(out, weight_name="tiny.safetensors" if form == "kohya" else LORA_FILE)
    return pipeline


@pytest.mark.parametrize("form", ["diffusers", "kohya", "pipeline"])
@pytest.mark.parametrize(("source", "alpha"), [("diffusers", 4), ("diffusers", 12), ("kohya", 12), ("peft", 12)])
def test_draws_the_same(models, workplace, strong, form, source, alpha):
    """In stock diffusers every format draws what the LoRA drew where it came from, whatever its alpha, to within a
    hundredth of one of 255 levels; without it the picture is another."""
    path, expected = strong(source, alpha)
    out = export(experiment(workplace), str(path), form)
    assert np.abs(draw(load_export(models, out, form)) - expected).max() <= 0.01
    assert np.abs(draw(base_pipeline(models)) - expected).max() > 4.0


@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [("last", "stage1"), ("stage0", "stage0"), ("stage1", "stage1"), ("stage1/checkpoint_2", "stage1")],
)
def test_which_checkpoint(workplace, name, checkpoint):
    """A name means the last checkpoint of its stage, bit for bit; export.json says which it was."""
    root = experiment(workplace)
    out = export(root, name)
    stage = Stage(root, int(checkpoint[-1]))
    trained = safetensors.torch.load_file(stage.checkpoints()[-1] / LORA_FILE)
    exported = safetensors.torch.load_file(out / LORA_FILE)
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[key], trained[key]) for key in trained)
    record = json.loads((out / "export.json").read_text())
    assert (record["experiment"], record["checkpoint"], record["format"]) == ("tiny", checkpoint, "diffusers")
    assert record["lora_sha256"] == files.sha256(stage.checkpoints()[-1] / LORA_FILE)


def test_kohya_file_is_what_kohya_writes(models, workplace, tmp_path):
    """Keys and alphas are those of a file written key by key in kohya's form; the weights are ours."""
    root = experiment(workplace)
    out = export(root, "last", "kohya")
    ours = safetensors.torch.load_file(Stage(root, 1).checkpoints()[-1] / LORA_FILE)
    plain = {key.removeprefix("unet."): value for key, value in ours.items()}
    rank = len(next(value for key, value in plain.items() if ".lora_A." in key))
    theirs = safetensors.torch.load_file(save_kohya(tmp_path / "theirs.safetensors", plain, rank))
    exported = safetensors.torch.load_file(out / "tiny.safetensors")
    assert exported.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(exported[key].half(), value), key
        assert exported[key].dtype == torch.float32 or key.endswith(".alpha")


def test_kohya_file_has_the_keys_that_others_know(tmp_path):
    """For a UNet of Stable Diffusion 1.x every key is one that ComfyUI, A1111 and Forge look for, and none is left out."""
    kinds = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 2}
    unet = UNet2DConditionModel(**kinds)
    add_lora(unet, LORA, rank=1, seed=0)
    FAMILY.write_kohya(tmp_path / "x.safetensors", {LORA.key(name): value for name, value in lora_parameters(unet).items()})
    modules = (ROOT / "tests" / "recorded" / "keys" / "kohya.txt").read_text().split()
    expected = {f"{module}.{part}" for module in modules for part in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert safetensors.torch.load_file(tmp_path / "x.safetensors").keys() == expected


@pytest.mark.parametrize(("width", "expected"), [(768, "False"), (1024, "True")])
def test_kohya_file_tells_sd2_from_sd1(tmp_path, width, expected):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_"
    FAMILY.write_kohya(
        tmp_path / "x.safetensors", {f"{name}A.weight": torch.ones(4, width), f"{name}B.weight": torch.ones(8, 4)}
    )
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"ss_v2": expected}


def test_pipeline_is_the_base_but_for_the_attention(models, workplace):
    """What the LoRA does not touch is the base's, bit for bit, scheduler and all; no trace of the adapter is left."""
    out = export(experiment(workplace), "last", "pipeline")
    base, fused = base_pipeline(models), StableDiffusionPipeline.from_pretrained(out)
    assert type(fused.scheduler) is type(base.scheduler)
    assert fused.scheduler.config["beta_start"] == base.scheduler.config["beta_start"]
    assert fused.safety_checker is None
    for part in ("unet", "vae", "text_encoder"):
        before, after = getattr(base, part).state_dict(), getattr(fused, part).state_dict()
        assert before.keys() == after.keys()
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert bool(changed) == (part == "unet")
        assert all(re.search(r"\.attn\d\.to_(q|k|v|out\.0)\.weight$", key) for key in changed)
    assert fused.tokenizer("a red circle").input_ids == base.tokenizer("a red circle").input_ids


def test_pipeline_has_the_files_and_names_of_the_hub(workplace):
    """What transformers 4 reads: CLIP's weights by the names that the hub has for Stable Diffusion 1.x, of the layers that
    the tiny model has, and the words of the tokenizer in two files of their own."""
    out = export(experiment(workplace), form="pipeline")
    layers = json.loads((out / "text_encoder" / "config.json").read_text())["num_hidden_layers"]
    names = (ROOT / "tests" / "recorded" / "keys" / "text_encoder.txt").read_text().split()
    expected = {name for name in names if not (found := re.search(r"layers\.(\d+)", name)) or int(found[1]) < layers}
    assert safetensors.torch.load_file(out / "text_encoder" / "model.safetensors").keys() == expected
    vocabulary = json.loads((out / "tokenizer" / "vocab.json").read_text())
    whole = json.loads((out / "tokenizer" / "tokenizer.json").read_text())["model"]
    assert vocabulary == whole["vocab"]
    version, *merges = (out / "tokenizer" / "merges.txt").read_text().splitlines()
    assert version.startswith("#version")
    assert [merge.split() for merge in merges] == whole["merges"]


@pytest.mark.parametrize("form", ["diffusers", "kohya", "pipeline"])
def test_twice_is_once(workplace, tmp_path, form):
    """The same export again, by another path, leaves the same files, bit for bit, and no other file of the experiment
    changes."""
    root = experiment(workplace)
    before = snapshot(root)
    out = export(root, form=form)
    assert {name: data for name, data in snapshot(root).items() if not name.startswith("export/")} == before
    first = snapshot(out)
    assert snapshot(export(root, form=form)) == first
    assert snapshot(export(root, form=form, out=tmp_path / "deep" / "there")) == first
    assert not list(root.rglob("*.tmp"))


def test_a_folder_of_others_is_not_overwritten(workplace, tmp_path):
    """Neither a folder that no export made nor an export that somebody edited or added to; both stay as they are."""
    root = experiment(workplace)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt and is not an earlier export.*another --out"):
        export(root, out=tmp_path / "mine")
    assert snapshot(tmp_path / "mine") == {"notes.txt": b"mine"}
    out = export(root)
    (out / "README.md").write_text("better words")
    with pytest.raises(ValueError, match=r"README\.md is not what was exported"):
        export(root, "stage0")
    assert (out / "README.md").read_text() == "better words"
    added = export(root, out=tmp_path / "empty") / "picture.png"
    added.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"picture\.png is not what was exported"):
        export(root, out=tmp_path / "empty")
    with pytest.raises(ValueError, match="is a file"):
        export(root, out=added)


def test_a_neighbour_is_not_deleted(workplace, tmp_path):
    """A folder beside the output that has the name of a temporary one, and a link or a file put there meanwhile."""
    root = experiment(workplace)
    (tmp_path / "x.tmp").mkdir()
    (tmp_path / "x.tmp" / "notes.txt").write_text("mine")
    out = export(root, out=tmp_path / "x")
    assert snapshot(tmp_path / "x.tmp") == {"notes.txt": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "x", "x.tmp"]
    (out / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match="link is not what was exported"):
        export(root, out=tmp_path / "x")
    assert (out / "link").is_symlink()


def test_what_is_put_into_the_folder_meanwhile_stays(workplace, tmp_path, monkeypatch):
    """A pipeline takes minutes: what the user saved into the folder in that time is not lost."""
    out = export(experiment(workplace), out=tmp_path / "x")
    monkeypatch.setattr("b2diffurl.export.write_card", lambda *_: (out / "notes.txt").write_text("mine"))
    with pytest.raises(ValueError, match=r"notes\.txt is not what was exported"):
        export(experiment(workplace), out=tmp_path / "x")
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "x"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_pipeline_in_half_precision(models, workplace, strong, dtype):
    """Weights of that type, which is base plus LoRA rounded once; what it draws is the same but for its rounding."""
    path, expected = strong("diffusers", 12)
    root = experiment(workplace)
    exact, out = (
        export(root, str(path), "pipeline", out=workplace / "exact"),
        export(root, str(path), "pipeline", dtype=dtype),
    )
    for file in exact.glob("*/*.safetensors"):
        half = safetensors.torch.load_file(out / file.relative_to(exact))
        for key, value in safetensors.torch.load_file(file).items():
            assert torch.equal(half[key], value.to(getattr(torch, dtype)) if value.is_floating_point() else value), key
    drawn = draw(StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32))
    assert np.abs(drawn - expected).max() <= (1.0 if dtype == "float16" else 12.0)
    assert f'from_pretrained("path/to/pipeline", torch_dtype=torch.{dtype})' in read_card(out)[1]


def test_a_lora_has_no_dtype(workplace):
    refused(run(workplace, "--dtype=float16"), r"--dtype=float16 is for --format=pipeline; a LoRA is always float32")


@pytest.mark.long
def test_a_pipeline_is_all_that_is_spoken_of(workplace):
    """As a process of its own, into pipes: one line on stdout, and nothing on stderr, whatever is not installed."""
    command = [sys.executable, "-m", "b2diffurl.export", "tiny", "--format=pipeline", "--license=mit"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.stdout == "export: model/lora/tiny/export/pipeline\n"
    assert (ended.returncode, ended.stderr) == (0, "")


# ---- bad input ----


def refused(ended: Ended, message: str) -> None:
    """Exit code 2 and two lines: what is wrong, and what to do."""
    assert ended.code == 2, ended
    assert ended.stderr.count("\n") == 2
    assert re.match(r"error: export: ", ended.stderr)
    assert re.search(message, ended.stderr), ended.stderr
    assert ended.stdout == ""


def test_unknown_experiment_and_checkpoint(workplace):
    refused(call(workplace, ["export.py", "tinny"], main), r"no experiment 'tinny'.*Experiments in model/lora: tiny")
    refused(run(workplace, "--checkpoint=stage7"), r"no checkpoint 'stage7'.*stage0, stage1")
    refused(run(workplace, "--checkpoint=base"), r"base model is not trained.*stage<i>")
    refused(run(workplace, "--checkpoint=nowhere"), rf"no LoRA at {workplace}/nowhere")
    assert not (experiment(workplace) / "export").exists()


@pytest.mark.parametrize("how", ["by name", "by path"])
def test_altered_checkpoint(workplace, how):
    """A finished stage's LoRA of which one byte is another is refused, though it could be read."""
    path = Stage(experiment(workplace), 1).checkpoints()[-1] / LORA_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    given = "last" if how == "by name" else str(path.parent)
    refused(run(workplace, f"--checkpoint={given}"), r"is not what the train phase wrote \(checksum\)")


def test_half_written_checkpoint(workplace, tmp_path):
    """A file cut off is named as damaged; a checkpoint that is still written is none."""
    stage = Stage(experiment(workplace), 1)
    lora = stage.checkpoints()[-1] / LORA_FILE
    (tmp_path / "cut.safetensors").write_bytes(lora.read_bytes()[:-100])
    refused(run(workplace, f"--checkpoint={tmp_path}/cut.safetensors"), r"cut\.safetensors is damaged")
    stage.manifest_path("train").unlink()
    folders = sorted(stage.folder.glob("checkpoints/*"))
    for folder in folders:
        folder.rename(f"{folder}.tmp")
    refused(run(workplace, "--checkpoint=stage1"), r"no checkpoint 'stage1'.*stage0")


def test_what_is_no_lora(models, workplace, tmp_path):
    """A base model's weights, and a LoRA of layers of several ranks, which has no one alpha."""
    unet = models / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    refused(run(workplace, f"--checkpoint={unet}"), r"is no LoRA on a UNet")
    state = safetensors.torch.load_file(Stage(experiment(workplace), 0).checkpoints()[-1] / LORA_FILE)
    key = next(key for key in state if ".lora_A." in key)
    state[key] = state[key][:2].clone()
    safetensors.torch.save_file(state, tmp_path / "mixed.safetensors")
    refused(run(workplace, f"--checkpoint={tmp_path}/mixed.safetensors"), r"layers of ranks \[2, 4\]")


@pytest.mark.parametrize("form", ["diffusers", "pipeline"])
def test_another_base_is_refused(models, workplace, tmp_path, form):
    """By the checksum that the checkpoint keeps; the same one elsewhere is taken."""
    other = shutil.copytree(models / "sd", tmp_path / "other")
    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file({key: value + 1e-3 for key, value in state.items()}, path)
    refused(run(workplace, f"--format={form}", f"--base={other}"), r"trained on another base model.*as --base")
    shutil.copy(models / "sd" / "unet" / path.name, path)
    assert run(workplace, f"--format={form}", f"--base={other}").code == 0


def test_base_that_is_gone(workplace, tmp_path):
    """A LoRA is exported without it; a pipeline is not, and the error says how to name it."""
    path = experiment(workplace) / "config.json"
    config = files.read_json(path)
    config["config"]["pretrained"]["model"] = "/gone/base"
    files.write_record(path, config)
    ended = run(workplace)
    assert (ended.code, ended.stdout) == (0, "export: model/lora/tiny/export/diffusers\n")
    refused(run(workplace, "--format=pipeline"), r"no model at /gone/base.*--base")
    assert not (experiment(workplace) / "export" / "pipeline").exists()


# ---- the card ----


def read_card(out: Path) -> tuple[dict, str]:
    """Metadata and text of an export's card."""
    _, data, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(data), text


def add_evaluations(root: Path) -> None:
    """Rows of eval.jsonl, and folders of pictures, as judging leaves them, for the base and the last stage."""
    common = {"scheduler": "", "num_steps": 4, "eta": 1.0, "guidance_scale": 5.0, "n_images": 8, "n_prompts": 3}
    last = {stage: Stage(root, stage).checkpoints()[-1].name for stage in (0, 1)}
    loras = {stage: f"stage{stage}/checkpoints/{name}/{LORA_FILE}" for stage, name in last.items()}
    rows = []
    for prompts, sampler in (("train", "training"), ("test", "deployed"), ("test", "training")):
        more = {"prompts": prompts, "sampler": sampler, "conditions": prompts + sampler}
        for name, stage, reward in (("base", None, 0.25), ("stage1", 1, 0.5), ("stage0", 0, 0.375)):
            state = "" if stage is None else files.sha256(Stage(root, stage).checkpoints()[-1] / LORA_FILE)
            folder = root / "eval" / f"{name}_{prompts}_{identity(more['conditions'], state)}"
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps({"shown_prompts": PROMPTS * 2}))
            for n in range(6):
                (folder / f"{n:05d}.png").write_bytes(f"{name} {prompts} {sampler} {n}".encode())
            row = {"checkpoint": name, "stage": stage, "lora": loras.get(stage, ""), "folder": f"eval/{folder.name}"}
            row |= {"reward": reward, "reward_se": 0.0125, "accuracy": None, "accuracy_se": None}
            row |= {"diversity/clip": 0.1, "diversity/clip_se": 0.02} | common | more
            row |= {"reward_gain": 0.25, "reward_gain_se": 0.0042} if stage == 1 else {}
            rows.append(row)
    files.write_json_lines(root / "eval.jsonl", rows)
    (root / "report").mkdir()
    (root / "report" / "before_after_test.png").write_bytes(b"a grid")


@pytest.mark.parametrize("form", ["diffusers", "kohya", "pipeline"])
def test_card_metadata(workplace, form):
    """The hub's metadata: what it reads as library, task, tags, pictures that are there, and results by prompt set."""
    root = experiment(workplace)
    add_evaluations(root)
    out = export(root, form=form)
    data, _ = read_card(out)
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert ("lora" in data["tags"]) == (form != "pipeline")
    assert {"b2-diffurl", "reinforcement-learning"} < set(data["tags"])
    assert "base_model" not in data  # a local one
    assert [row["text"] for row in data["widget"]] == [*PROMPTS, PROMPTS[0]]
    for n, row in enumerate(data["widget"]):
        assert (out / row["output"]["url"]).read_bytes() == f"stage1 test deployed {n}".encode()
    results = {result.dataset_split: result for result in ModelCardData(**data).eval_results}
    assert results.keys() == {"test", "train"}
    assert all((result.metric_type, result.metric_value) == ("reward", 0.5) for result in results.values())
    assert results["test"].dataset_name == "prompts.json (Held-out prompts)"


def test_card_text(workplace):
    """Its figures are those of eval.jsonl and of the stages' manifests; the grid is copied; there is code to use it."""
    root = experiment(workplace)
    add_evaluations(root)
    out = export(root, repository="me/tuned")
    _, text = read_card(out)
    tables = text.split("Held-out prompts (3), 8 images, ")[1:]
    assert [table.split(":")[0] for table in tables] == ["deployed sampler", "training sampler"]
    assert "| reward | 0.250 ± 0.013 | 0.500 ± 0.013 | +0.2500 ± 0.0042 |" in tables[0]
    assert "| diversity, clip | 0.100 ± 0.020 | 0.100 ± 0.020 | – |" in tables[0]
    assert "accuracy" not in text.lower()
    assert "](images/before_after_test.png)" in text
    assert (out / "images" / "before_after_test.png").read_bytes() == b"a grid"
    stages = [Stage(root, index) for index in range(2)]
    images = sum(stage.manifest("select")["num_images"] for stage in stages)
    updates = sum(stage.manifest("train")["num_updates"] for stage in stages)
    assert f"| budget | {images} images scored, {updates} updates (stages: 2) |" in text
    assert "| schedule | progressive: the last 2 to 3 of 4 steps are trained |" in text
    recorded = stages[1].manifest("sample") | {"window": [0, 3]}
    files.write_record(stages[1].manifest_path("sample"), recorded)
    assert "| schedule | progressive: steps 3-4 to 1-3 of 4 are trained |" in read_card(export(root))[1]
    assert "| prompts | 3 drawn from `prompts.json` |" in text
    assert all(f"- `{prompt}`" in text for prompt in PROMPTS)
    assert 'load_lora_weights("me/tuned", weight_name="pytorch_lora_weights.safetensors")' in text
    assert "ComfyUI, AUTOMATIC1111's web UI and Forge do not read this file" in text
    assert "`python -m b2diffurl.export tiny --format kohya`" in text
    assert "2503.11240" in text


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        ({}, "| optimizer | AdamW, learning rate 0.0003 |"),
        ({"train.final_rate": 0.1}, "| optimizer | AdamW, learning rate 0.0003, falling to 3e-05 in the last stage |"),
        ({"train.final_rate": 0.1, "stage_cnt": 1}, "| optimizer | AdamW, learning rate 0.0003 |"),
        ({"train.objective": "awm", "train.awm_clip": 0.3}, "| objective | awm, clip range 0.3 |"),
        ({"train.objective": "nft", "train.guidance_scale": 1.0}, "| objective | nft, trained without guidance |"),
        ({"sample.scheduler": "EulerDiscreteScheduler"}, "; EulerDiscreteScheduler, guidance "),
    ],
)
def test_card_names_what_trained(workplace, settings, row):
    """The stage's own record is read: clip ranges, both rates, and another sampler or guidance than the usual one."""
    root = experiment(workplace)
    stage = Stage(root, 1)
    recorded = stage.manifest("sample")
    recorded["settings"] |= {"train.learning_rate": 3e-4} | settings
    files.write_record(stage.manifest_path("sample"), recorded)
    assert row in read_card(export(root))[1]


def test_card_of_an_earlier_checkpoint(workplace):
    """It counts what was spent until then, shows no picture of the newest, and says how to judge it."""
    root = experiment(workplace)
    add_evaluations(root)
    folders = sorted((root / "stage1" / "checkpoints").iterdir())
    assert len(folders) == 2
    out = export(root, str(folders[0]))
    data, text = read_card(out)
    state = json.loads((folders[0] / "state.json").read_text())
    updates = Stage(root, 0).manifest("train")["num_updates"] + state["num_updates"]
    assert f", {updates} updates (stages: 2) |" in text
    assert f"--checkpoint=base,stage1/{folders[0].name} " in text
    assert "widget" not in data
    assert not (out / "images").exists()


def test_card_of_an_earlier_stage(workplace):
    """What came after it is none of its business: neither images nor prompts."""
    root = experiment(workplace)
    first = Stage(root, 0)
    Stage(root, 1).prompts.write_text(json.dumps(["a later prompt"]))
    _, text = read_card(export(root, "stage0"))
    images, updates = first.manifest("select")["num_images"], first.manifest("train")["num_updates"]
    assert f"| budget | {images} images scored, {updates} updates (stages: 1) |" in text
    assert "a later prompt" not in text
    assert "a later prompt" in read_card(export(root))[1]


@pytest.mark.usefixtures("no_pictures")
def test_card_of_what_was_judged(workplace, overrides):
    """The figures that run_eval.py prints are those of the card of the next export."""
    result = judged(workplace, overrides, "--prompts=test", "--sampler=deployed")
    data, text = read_card(export(experiment(workplace)))
    metrics = data["model-index"][0]["results"][0]["metrics"]
    assert [(metric["type"], metric["value"]) for metric in metrics] == [("reward", round(result["reward"], 6))]
    assert "Training prompts, as test (3), 6 images, deployed sampler: DDIM, " in text
    assert len(data["widget"]) == 4


def test_code_of_the_card_runs(models, workplace, tmp_path, monkeypatch):
    """The snippet, with the paths that only the reader knows, draws a picture."""
    out = export(experiment(workplace))
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.+?)```", read_card(out)[1], re.DOTALL)[1]
    code = code.replace('from_pretrained("sd",', f'from_pretrained("{models}/sd",').replace("path/to/diffusers", str(out))
    exec(code, {})
    assert (tmp_path / "image.png").is_file()


@pytest.mark.parametrize("separator", ["\n", "\r", "\u2028", "\x1b[2J", "\n---\n", "\n```\n", "\u202e"])
def test_card_has_any_prompt(workplace, separator):
    """Quotes, backslashes, lines, fences and marks that a terminal obeys: in the code they are the prompt's own, in the text
    they are out of the way, and the card's parts end where they should."""
    prompt = f'a "red" circle \\ three{separator}lines, | ein `Käse`'
    root = experiment(workplace)
    add_evaluations(root)
    for result in root.glob("eval/*/result.json"):
        result.write_text(json.dumps({"shown_prompts": [prompt] * 6}))
    Stage(root, 0).prompts.write_text(json.dumps([prompt]))
    card = (export(root) / "README.md").read_text()
    assert not set(card) & set("\r\u2028\x1b\u202e")
    data, text = ModelCard(card).data, ModelCard(card).text
    flat = "\n" not in "".join(row["text"] for row in data.widget)
    assert flat and all(row["text"].endswith("lines, | ein `Käse`") for row in data.widget)
    assert len(re.findall("^```", text, re.MULTILINE)) == text.count("```") == 4  # code and citation
    code = re.search(r"```python\n(.+?)```", text, re.DOTALL)[1]
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert prompt in strings
    assert re.search(r"^- `a \"red\" circle \\ three.*lines, ¦ ein 'Käse'`$", text, re.MULTILINE)


def test_license_of_the_card(models, workplace):
    """As given, else that of the base model's own card, else none, which is said."""
    root = experiment(workplace)
    assert "license" not in read_card(export(root))[0]
    assert "no license is known of the base model" in run(workplace).stderr
    base = shutil.copytree(models / "sd", workplace / "base")
    (base / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\nA base.\n")
    data, text = read_card(export(root, base=str(base)))
    assert data["license"] == "creativeml-openrail-m"
    assert "License: `creativeml-openrail-m`" in text
    assert read_card(export(root, base=str(base), license="mit"))[0]["license"] == "mit"
    for unreadable in ("no metadata", "---\nlicense: [a: b\n---\n", "---\n- a list\n---\n", "---\nlicense: [mit]\n---\n"):
        (base / "README.md").write_text(unreadable)
        assert "license" not in read_card(export(root, base=str(base)))[0]
    refused(run(workplace, "--license=My own"), r"--license is 'My own'; the hub writes licenses such as mit")


@pytest.mark.parametrize("form", ["diffusers", "kohya", "pipeline"])
def test_no_path_of_this_machine(models, workplace, tmp_path, form):
    """None of the exported files says where the experiment, the base or the reward's model lies."""
    out = export(experiment(workplace), form=form)
    for name, data in snapshot(out).items():
        for place in (models, workplace, tmp_path, ROOT):
            assert str(place).encode() not in data, name


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_base_on_the_hub(workplace, form):
    """Is named as the hub names it, in the metadata, the text and the code."""
    path = experiment(workplace) / "config.json"
    config = files.read_json(path)
    config["config"]["pretrained"]["model"] = "CompVis/stable-diffusion-v1-4"
    files.write_record(path, config)
    data, text = read_card(export(experiment(workplace), form=form))
    assert (data["base_model"], data["base_model_relation"]) == ("CompVis/stable-diffusion-v1-4", "adapter")
    assert "[CompVis/stable-diffusion-v1-4](https://huggingface.co/CompVis/stable-diffusion-v1-4)" in text
    assert 'StableDiffusionPipeline.from_pretrained("CompVis/stable-diffusion-v1-4", torch_dtype=torch.float32)' in text


def test_base_that_has_moved_keeps_its_name(models, workplace):
    """The base is a copy on this machine now, and compared; the card still has the hub's name of it, and how to get it."""
    path = experiment(workplace) / "config.json"
    config = files.read_json(path)
    config["config"]["pretrained"] |= {"model": "CompVis/stable-diffusion-v1-4", "variant": "fp16", "revision": "v1"}
    files.write_record(path, config)
    base = shutil.copytree(models / "sd", workplace / "base")
    for file in base.glob("*/*.safetensors"):
        shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    out = export(experiment(workplace), base=str(base))
    data, text = read_card(out)
    assert data["base_model"] == files.read_json(out / "export.json")["base_model"] == "CompVis/stable-diffusion-v1-4"
    options = 'variant="fp16", revision="v1", torch_dtype=torch.float32'
    assert f'from_pretrained("CompVis/stable-diffusion-v1-4", {options})' in text


# ---- the hub ----


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; it keeps what it was asked, and takes every file in the commit itself."""

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == "Bearer right"
        self.answer(200 if known else 401, {"name": "me", "type": "user"} if known else {"error": "Invalid token"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, body))
        if self.path.endswith("/preupload/main"):
            taken = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer(200, {"files": [{"path": file["path"]} | taken for file in json.loads(body)["files"]]})
        url = f"http://127.0.0.1:{self.server.server_port}/me/tuned"
        self.answer(200, {"url": url, "commitUrl": f"{url}/commit/abc", "commitOid": "abc", "id": "me/tuned"})

    def answer(self, code: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(workplace: Path, server: ThreadingHTTPServer, *options: str, token: str) -> subprocess.CompletedProcess:
    variables = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    variables |= {"HF_HOME": str(workplace / "hf"), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "b2diffurl.export", "tiny", *options]
    return subprocess.run(command, cwd=workplace, env=os.environ | variables, capture_output=True, text=True, timeout=120)


@pytest.mark.long
def test_push(workplace, hub):
    """Makes the repository, private if asked, and uploads what was exported, byte for byte."""
    ended = push(workplace, hub, "--push=me/tuned", "--private", token="right")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1].endswith("/me/tuned")
    asked = dict(hub.asked)
    created = json.loads(asked["/api/repos/create"])
    assert (created["name"], created["organization"], created["visibility"]) == ("tuned", "me", "private")
    lines = [json.loads(line) for line in asked["/api/models/me/tuned/commit/main"].splitlines()]
    sent = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
    exported = snapshot(experiment(workplace) / "export" / "diffusers")
    assert {name: base64.b64decode(content) for name, content in sent.items()} == exported
    assert b'"me/tuned"' in exported["README.md"]


@pytest.mark.parametrize("token", ["", pytest.param("wrong", marks=pytest.mark.long)])
def test_push_without_login(workplace, hub, token):
    """Is refused before any work, and the error says how to log in."""
    ended = push(workplace, hub, "--push=me/tuned", token=token)
    assert ended.returncode == 2
    assert re.search(r"^error: export: .*hf auth login\n.*\n\Z", ended.stderr, re.MULTILINE), ended.stderr
    assert not (experiment(workplace) / "export").exists()


def test_push_without_network(workplace, hub):
    """Is told as that; nobody is asked to log in, for they are."""
    hub.server_close()
    ended = push(workplace, hub, "--push=me/tuned", token="right")
    assert ended.returncode == 2
    assert re.search(r"^error: export: the hub cannot be reached \(.*\)", ended.stderr, re.MULTILINE), ended.stderr
    assert "hf auth login" not in ended.stderr
    assert not (experiment(workplace) / "export").exists()


def test_push_needs_owner_and_name(workplace):
    refused(run(workplace, "--push=tuned"), r"--push is 'tuned'; it must be OWNER/NAME")
