"""The whole pipeline on a tiny model: what it writes, that it may be run twice, killed, spread over processes, and that
stock diffusers agrees with it."""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from children import Fault, run_ranks
from conftest import (
    PROMPTS,
    REFERRING,
    ROOT,
    VERBS,
    assert_same,
    call,
    experiment,
    flags,
    forget,
    json_lines,
    make_config,
    run_script,
    run_shell,
    run_stage,
    script_arguments,
    snapshot,
    stage_of,
    updates_of,
)
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from b2diffurl.algorithm.branching import denoise
from b2diffurl.configuration.keys import flatten
from b2diffurl.configuration.settings import read_settings
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.models.policy import decode, load_policy, predictor
from b2diffurl.runtime.device import make_accelerator
from b2diffurl.runtime.files import read_json, read_json_lines

# First update: how far a log-ratio may be from 0 when sampling and training batch their rows differently (contract 1).
LOG_RATIO_BOUND = 1e-5


def stages(folder: Path) -> list[Stage]:
    return [Stage(experiment(folder), index) for index in range(2)]


# ---- what is written ----


def selected_batches(folder: Path, stage: str) -> set[int]:
    """The batches, of two groups, of which something was selected."""
    rows = json.loads((experiment(folder) / stage / "selection.json").read_text())
    return {row["group"] // 2 for row in rows}


def test_files_of_an_experiment(finished):
    """Exactly the files of the design: nothing temporary, nothing pickled, each named by its manifest."""
    names = {"config.json"}
    for stage in ("stage0", "stage1"):
        names |= {f"{stage}/samples/batch_{batch:05d}.safetensors" for batch in range(3)}
        names |= {f"{stage}/selected/batch_{batch:05d}.safetensors" for batch in selected_batches(finished, stage)}
        names |= {f"{stage}/images/{image:05d}.png" for image in range(18)}
        names |= {f"{stage}/{name}" for name in ("prompts.json", "scores.jsonl", "selection.json", "tree.png", "tree.json")}
        names |= {f"{stage}/{verb}.json" for verb in VERBS} | {f"{stage}/metrics/{verb}.jsonl" for verb in VERBS}
        for number in (1, 2):
            checkpoint = f"{stage}/checkpoints/checkpoint_{number}"
            names |= {f"{checkpoint}/{name}" for name in (LORA_FILE, "optimizer.safetensors", "state.json")}
    found = snapshot(experiment(finished))
    assert found.keys() == names
    described = {
        f"stage{stage.index}/{name}": facts
        for stage in stages(finished)
        for verb in VERBS
        for name, facts in stage.manifest(verb)["files"].items()
    }
    manifests = {f"stage{index}/{verb}.json" for index in range(2) for verb in VERBS}
    assert described.keys() == names - manifests - {"config.json"}
    for name, facts in described.items():
        assert facts == {"bytes": len(found[name]), "sha256": hashlib.sha256(found[name]).hexdigest()}


def test_samples_hold_each_state_once(finished):
    """latents [G,K,S+1,C,H,W], log_probs [G,K,S], timesteps [S], a prompt id a group and each text embedding once;
    siblings share the first state; float32."""
    for stage, num_steps in zip(stages(finished), (2, 3), strict=True):
        prompts = json.loads(stage.prompts.read_text())
        for batch in range(3):
            with safe_open(stage.batch(batch), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = json.loads(file.metadata()["b2diffurl"])
            distinct = len(metadata["prompts"])
            assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
                "latents": (2, 3, num_steps + 1, 4, 8, 8),
                "log_probs": (2, 3, num_steps),
                "timesteps": (num_steps,),
                "prompt_ids": (2,),
                "condition.prompt_embeds": (distinct, 77, 16),
                "unconditional.prompt_embeds": (1, 77, 16),
            }
            assert tensors["latents"].dtype == tensors["log_probs"].dtype == torch.float32
            assert tensors["timesteps"].tolist() == [751, 501, 251, 1][-num_steps:]
            assert len(tensors["latents"][:, :, 0].flatten(0, 1).unique(dim=0)) == 2
            assert len(tensors["latents"][:, :, 1].flatten(0, 1).unique(dim=0)) == 6
            named = [metadata["prompts"][row] for row in tensors["prompt_ids"]]
            assert prompts[6 * batch : 6 * batch + 6] == [prompt for prompt in named for _ in range(3)]
            assert len(set(metadata["prompts"])) == distinct


def test_manifests_say_how_a_stage_was_made(finished, models):
    """Seeds, versions, threads, shapes, processes, the resolved scheduler with clip_sample off, the base model by the
    SHA-256 of its UNet, how many were selected and trained on, and how far the first update's ratio is from 1."""
    base = hashlib.sha256((models / "sd" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    for stage in stages(finished):
        sampled, trained = stage.manifest("sample"), stage.manifest("train")
        assert sampled["policy"]["base_model_sha256"] == base
        assert sampled["scheduler"]["clip_sample"] is False
        assert sampled["scheduler"]["beta_schedule"] == "scaled_linear"
        assert sampled["batch_shape"] == [2, 3, 4, 8, 8]
        for manifest in (sampled, trained):
            assert (manifest["seed"], manifest["num_threads"], manifest["num_processes"]) == (300, 1, 1)
            assert manifest["versions"]["torch"] == torch.__version__
        assert trained["max_abs_log_ratio_first_update"] is not None
        updates = [event for event in json_lines(stage.metrics("train")) if event["event"] == "update"]
        num_steps = sampled["num_trained_steps"]
        assert trained["num_transitions"] == num_steps * sum(update["num_trajectories"] for update in updates)
        selected = stage.manifest("select")
        kept = [row["score"] for row in json.loads(stage.selection.read_text())]
        assert selected["num_selected"] == len(kept) == selected["num_best"] + selected["num_worst"]
        assert selected["num_best"] == sum(score > 0 for score in kept)
    lora = stages(finished)[0].checkpoints()[-1] / LORA_FILE
    assert stages(finished)[1].manifest("sample")["policy"]["lora_sha256"] == hashlib.sha256(lora.read_bytes()).hexdigest()


def test_images_are_the_decoded_last_states(finished, models):
    """Every PNG is the stock VAE's decoding of the last stored state of its trajectory."""
    vae = StableDiffusionPipeline.from_pretrained(models / "sd").vae
    for stage in stages(finished):
        for batch in range(3):
            last = load_file(stage.batch(batch))["latents"][:, :, -1].flatten(0, 1)
            with torch.no_grad():
                pixels = (vae.decode(last / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1) * 255
            for n, expected in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
                found = np.array(Image.open(stage.image(6 * batch + n)), dtype=np.float32)
                assert found.shape == (64, 64, 3)
                assert np.abs(found - expected).max() <= 0.501


def test_scores_are_stock_clip_of_the_images_on_disk(finished, models):
    """The raw rewards are stock CLIPModel's cosine similarities of each image with its prompt, although the scorer's
    batch of 4 does not divide 18."""
    model, tokenizer = CLIPModel.from_pretrained(models / "clip"), CLIPTokenizer.from_pretrained(models / "clip")
    mean, std = (
        torch.tensor(value).view(3, 1, 1)
        for value in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    )
    for stage in stages(finished):
        rows = json_lines(stage.scores)
        assert [row["id"] for row in rows] == list(range(18))
        assert [row["prompt"] for row in rows] == json.loads(stage.prompts.read_text())
        pictures = [Image.open(stage.image(n)).resize((32, 32), Image.Resampling.BICUBIC) for n in range(18)]
        pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2) / 255
        tokens = tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
        with torch.no_grad():
            output = model(pixel_values=(pixels - mean) / std, **tokens)
        similarity = output.image_embeds @ output.text_embeds.T
        expected = [similarity[n, PROMPTS.index(row["prompt"])].item() for n, row in enumerate(rows)]
        assert [row["reward"] for row in rows] == pytest.approx(expected, abs=1e-5)
        assert len({row["reward"] for row in rows}) == 18


def test_selection_follows_from_the_scores_and_their_history(finished):
    """selection.json is the rule applied, in plain numpy, to scores.jsonl of this stage and the one before; it names
    images that exist, and both kinds are there."""
    history: list[dict] = []
    for stage in stages(finished):
        rows = json_lines(stage.scores)
        history = history + rows
        expected = []
        for group in range(6):
            members = rows[3 * group : 3 * group + 3]
            seen = np.array([row["reward"] for row in history if row["prompt"] == members[0]["prompt"]])
            scores = [(row["reward"] - seen.mean()) / seen.std(ddof=1) for row in members]
            best, worst = int(np.argmax(scores)), int(np.argmin(scores))
            kept = ([best] if scores[best] >= 0.5 else []) + ([worst] if scores[worst] < -0.5 else [])
            expected += [(3 * group + k, group, k, scores[k]) for k in kept]
        found = json.loads(stage.selection.read_text())
        assert [(row["id"], row["group"], row["branch"]) for row in found] == [row[:3] for row in expected]
        assert [row["score"] for row in found] == pytest.approx([row[3] for row in expected], rel=1e-5)
        assert [row["advantage"] for row in found] == pytest.approx([row[3] for row in expected], rel=1e-5)
        assert min(row["advantage"] for row in found) < 0 < max(row["advantage"] for row in found)


def test_selection_relative_to_siblings_follows_from_the_scores(overrides, tmp_path):
    """With selection.advantage=group a score is the reward minus its siblings' mean, over the deviation of its prompt."""
    thresholds = {"selection.pos_threshold": 0.0, "selection.neg_threshold": 0.0}  # everybody's best and worst
    run_stage(tmp_path, overrides | thresholds | {"selection.advantage": "group"}, verbs=VERBS[:2])
    stage = Stage(experiment(tmp_path), 0)
    rows, expected = json_lines(stage.scores), {}
    for group in range(6):
        rewards = np.array([row["reward"] for row in rows[3 * group : 3 * group + 3]])
        seen = [row["reward"] for row in rows if row["prompt"] == rows[3 * group]["prompt"]]
        scores = (rewards - rewards.mean()) / np.std(seen, ddof=1)
        best, worst = int(scores.argmax()), int(scores.argmin())
        expected |= {3 * group + best: scores[best], 3 * group + worst: scores[worst]}
        assert scores[worst] < 0 < scores[best]
    found = {row["id"]: row["score"] for row in json.loads(stage.selection.read_text())}
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_reward_of_the_users_own_through_the_scripts(overrides, tmp_path, monkeypatch):
    """`package.module:function` scores, selects and trains; it runs without gradients, and its values are recorded."""
    (tmp_path / "redness_rewards.py").write_text(
        "import torch\n\nscale = torch.tensor(2.0, requires_grad=True)\n\n\n"
        "def redness(images, prompts):\n    values = scale * images[..., 0].float().mean((1, 2))\n"
        "    assert not values.requires_grad\n    return values\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = overrides | {"reward.name": "redness_rewards:redness"}
    for verb in VERBS:
        ended = run_script(tmp_path, verb, mine)
        assert ended.code == 0, ended.stderr
    stage = experiment(tmp_path) / "stage0"
    for row in json_lines(stage / "scores.jsonl"):
        image = np.asarray(Image.open(stage / "images" / f"{row['id']:05d}.png"))
        assert row["reward"] == pytest.approx(2 * image[..., 0].mean(), rel=1e-5)
    assert json.loads((stage / "train.json").read_text())["num_updates"] > 0


def test_no_two_stages_or_seeds_share_their_noise(finished, overrides, tmp_path):
    """The first states of stage 0, of stage 1 and of stage 0 under another seed have nothing in common."""
    run_stage(tmp_path, overrides | {"seed": 301}, verbs=["sample"])
    one, two, other = (load_file(stage.batch(0))["latents"][:, :, 0] for stage in (*stages(finished), stages(tmp_path)[0]))
    for latents in (two, other):
        cosine = torch.cosine_similarity(one.flatten(1), latents.flatten(1))
        assert cosine.abs().max() < 0.5


# ---- the ratio ----


@pytest.mark.parametrize("base", ["sd", pytest.param("sd_v", marks=pytest.mark.long)])
def test_ratio_is_exactly_one_after_the_round_trip(models, overrides, tmp_path, base):
    """Same batch shape, float32: after a trip through disk the first update's log-ratio is 0.0 for every pair, at a fresh
    LoRA and at a trained one, for epsilon and v-prediction."""
    settings = overrides | {"pretrained.model": str(models / base), "train.num_epochs": 1}
    settings |= {"sample.micro_batch_size": 1, "train.micro_batch_size": 1, "train.gradient_accumulation_steps": 64}
    for index in range(2):
        run_stage(tmp_path, settings, index)
        stage = stages(tmp_path)[index]
        (update,) = (event for event in json_lines(stage.metrics("train")) if event["event"] == "update")
        assert update["num_trajectories"] == len(json.loads(stage.selection.read_text())) > 0
        assert update["max_abs_log_ratio"] == 0.0
        assert stage.manifest("train")["max_abs_log_ratio_first_update"] == 0.0
        assert update["grad_norm"] > 0


def test_ratio_is_one_within_the_bound_on_the_default_path(finished):
    """Where batch shapes differ, the first update's log-ratio stays within the stated bound; it is logged, overall and by
    timestep, and later updates are off-policy."""
    for stage in stages(finished):
        first, *later = (event for event in json_lines(stage.metrics("train")) if event["event"] == "update")
        assert first["max_abs_log_ratio"] < LOG_RATIO_BOUND
        assert first["first"] and not any(update["first"] for update in later)
        assert first["max_abs_log_ratio"] == stage.manifest("train")["max_abs_log_ratio_first_update"]
        assert max(update["max_abs_log_ratio"] for update in later) > 100 * LOG_RATIO_BOUND
        for update in (first, *later):
            for key in ("log_ratio_per_step", "clip_fraction_per_step", "grad_norm_per_step"):
                assert len(update[key]) == len(update["timesteps"]) == stage.manifest("train")["num_trained_steps"]


# ---- again, and interrupted ----


def test_running_anything_twice_changes_nothing(workplace, overrides):
    """Each verb of each stage once more: no file changes, none appears."""
    before = snapshot(workplace)
    stamps = {path: path.stat().st_mtime_ns for path in workplace.rglob("*")}
    for index in range(2):
        run_stage(workplace, overrides, index)
    assert snapshot(workplace) == before
    assert {path: path.stat().st_mtime_ns for path in workplace.rglob("*")} == stamps


def test_two_runs_give_the_same_bits(finished, overrides, tmp_path):
    """The same experiment in another folder: samples, images, scores, selection, LoRA and optimizer agree to the bit."""
    for index in range(2):
        run_stage(tmp_path, overrides, index)
    assert_same(tmp_path, finished)


def test_interrupted_between_batches(workplace, finished, overrides):
    """A stage left with one batch of three, without its manifest and with litter of a broken write, ends like one that
    was never interrupted; the batch that was there is not sampled again."""
    stage = stages(workplace)[1]
    for path in list(stage.folder.iterdir()):
        if path not in (stage.samples, stage.images):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for batch in (0, 2):
        stage.batch(batch).unlink()
    for image in range(15, 18):
        stage.image(image).unlink()
    (stage.samples / "batch_00000.safetensors.123.tmp").write_bytes(b"half")
    stamp = stage.batch(1).stat().st_mtime_ns
    run_stage(workplace, overrides, 1)
    assert_same(workplace, finished)
    assert stage.batch(1).stat().st_mtime_ns == stamp


def test_interrupted_before_selecting_and_after(workplace, finished, overrides):
    """Selecting anew from what an interrupted selection left counts no score twice."""
    stage = stages(workplace)[1]
    stage.manifest_path("select").unlink()
    stage.selection.unlink()
    stage.manifest_path("train").unlink()
    shutil.rmtree(stage.folder / "checkpoints")
    run_stage(workplace, overrides, 1)
    assert_same(workplace, finished)


@pytest.mark.parametrize("index", [0, 1])
def test_interrupted_after_an_epoch(workplace, finished, overrides, index):
    """Training left with the checkpoint of epoch 1, events of epoch 2 and half a line, ends in the same weights, the same
    optimizer and the same metrics."""
    lose_last_epoch(stages(workplace)[index])
    if index == 0:
        shutil.rmtree(stages(workplace)[1].folder)
    run_stage(workplace, overrides, index, verbs=["train"])
    if index == 0:
        run_stage(workplace, overrides, 1)
    assert_same(workplace, finished)


@pytest.mark.parametrize("objective", ["dpok", pytest.param("d3po", marks=pytest.mark.long)])
def test_interrupted_after_an_epoch_with_a_base_policy(stage_with, overrides, tmp_path, objective):
    """The same for the objectives that ask the base policy: it is the base still, not what the LoRA was on resuming."""
    finished = stage_with(**REFERRING[objective])
    folder = shutil.copytree(finished, tmp_path / "copy")
    lose_last_epoch(stages(folder)[0])
    run_stage(folder, overrides | REFERRING[objective], verbs=["train"])
    assert_same(folder, finished)


def lose_last_epoch(stage: Stage) -> None:
    """Leave training as if it had been stopped in its second epoch."""
    stage.manifest_path("train").unlink()
    shutil.rmtree(stage.checkpoint(2))
    with stage.metrics("train").open("a") as file:
        file.write('{"event": "upd')


@pytest.mark.long
def test_killed_again_and_again(finished, overrides, tmp_path):
    """Scripts killed before a rename, started again and killed at a later one, until they end: the same bits as never
    killed."""
    for verb, first in [("sample", 8), ("select", 1), ("train", 1)]:
        command = script_arguments(verb, overrides)
        codes = [children.run(tmp_path, command, Fault("whole", turn=turn)) for turn in range(first, first + 15, 5)]
        assert codes[0] == -9
        assert codes == sorted(codes)
        assert codes[-1] == 0
    run_stage(tmp_path, overrides, 1)
    assert_same(tmp_path, finished)


def test_damaged_files_are_noticed(workplace, overrides):
    """A sample, image or selection that is not what its phase wrote is refused by checksum, and named."""
    stage = stages(workplace)[1]
    for verb, path in (
        ("train", stage.selected_batch(min(selected_batches(workplace, "stage1")))),
        ("train", stage.selection),
        ("select", stage.batch(1)),
        ("select", stage.image(3)),
    ):
        stage.manifest_path(verb).unlink(missing_ok=True)
        original = path.read_bytes()
        path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{path.name}.*checksum"):
            run_stage(workplace, overrides, 1, verbs=[verb])
        path.write_bytes(original)


def test_what_is_not_kept_is_removed_after_training(overrides, finished, tmp_path):
    """By default the samples go once the checkpoint is final, and images beyond keep.images; scores, selection and the
    weights stay as they would be, and so does what the user put there. Running again changes nothing."""
    settings = overrides | {"keep.samples": False, "keep.images": 4}
    mine = ["debug/my notes.safetensors", "images/00009 (copy).png", "samples/batch_0 (copy).safetensors"]
    for name in mine:
        path = experiment(tmp_path) / "stage0" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    run_stage(tmp_path, settings)
    stage, kept = stages(tmp_path)[0], stages(finished)[0]
    left = [name for name in snapshot(stage.folder) if name.startswith(("debug", "images", "samples", "selected"))]
    assert sorted(left) == sorted([*mine, *(f"images/{n:05d}.png" for n in range(4))])
    for name in ("scores.jsonl", "selection.json", f"checkpoints/checkpoint_2/{LORA_FILE}"):
        assert (stage.folder / name).read_bytes() == (kept.folder / name).read_bytes()
    before = snapshot(tmp_path)
    run_stage(tmp_path, settings)
    assert snapshot(tmp_path) == before


# ---- stock diffusers ----


@pytest.mark.parametrize("base", ["sd", "sd_v"])
def test_lora_in_stock_diffusers_gives_the_same_image(models, overrides, tmp_path, base):
    """A trained checkpoint loaded with load_lora_weights draws what our policy draws from the same noise at eta = 0, to
    within one level of 255; without the LoRA the image is another."""
    settings = overrides | {"pretrained.model": str(models / base), "train.learning_rate": 5e-2}
    run_stage(tmp_path, settings)
    lora = stages(tmp_path)[0].checkpoints()[-1]
    config = make_config(settings)
    model = load_policy(
        read_settings(config).model,
        make_accelerator(read_settings(config).compute),
        lora / LORA_FILE,
        seed=config.seed,
        compile=False,
    )
    x_T = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sampler = model.sampler(10, 0.0)
    predict = predictor(model, sampler.timesteps, model.encode(PROMPTS), model.encode([""]), guidance_scale=5.0)
    ours = decode(model, denoise(predict, sampler, x_T, torch.zeros, range(10)), 3).numpy()

    stock = StableDiffusionPipeline.from_pretrained(models / base)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        images = stock(PROMPTS, latents=x_T, num_inference_steps=10, guidance_scale=5.0, eta=0.0, output_type="np").images
        return images * 255

    without = draw()
    stock.load_lora_weights(lora)
    assert np.abs(draw() - ours).max() <= 1.0
    assert np.abs(without - ours).max() > 5.0


# ---- the scripts, and two processes ----


@pytest.mark.long
@pytest.mark.parametrize("count", ["", pytest.param("2", marks=pytest.mark.long)])
def test_the_shell_script_runs_it_all(finished, overrides, tmp_path, count):
    """run_process.sh, driven by its variables and by flags it passes on, runs each script as a process of its own, or as
    several, and leaves what the functions leave in this one (of several processes but for the update, by rounding); it ends
    with base and final judged, by both samplers, and a report."""
    named = {"ModelVersion": "pretrained.model", "PromptFile": "prompt_file", "LR": "train.learning_rate"}
    variables = {name: str(overrides[key]) for name, key in named.items()}
    variables |= {"Preset": "sd14", "ExpName": "tiny", "SavePath": str(tmp_path), "StageCnt": "1"}
    variables |= {"NumProcesses": count, "Resident": "0"}
    kept = ("exp_name", "stage_cnt", *named.values())
    passed_on = {key: value for key, value in overrides.items() if key not in kept} | {"log_path": tmp_path}
    ended = run_shell(tmp_path, passed_on, variables)
    found, expected = Stage(tmp_path / "tiny", 0), stages(finished)[0]
    timed = {f"{verb}.json" for verb in VERBS} | {f"metrics/{verb}.jsonl" for verb in VERBS}
    assert snapshot(found.folder).keys() == snapshot(expected.folder).keys()
    for name, data in snapshot(expected.folder).items():
        rounded = count and name.startswith("checkpoints/")
        assert name in timed or rounded or (found.folder / name).read_bytes() == data
    log = (tmp_path / "tiny.log").read_text()
    assert all(f" stage0 {verb}: " in log for verb in VERBS)
    assert all(" plan: LoRA rank 4 on " in text for text in (log, ended.stdout))
    assert "max |log-ratio| at the first update" in log
    verdict = read_json(tmp_path / "tiny" / "verdict.json")
    assert ended.stdout.splitlines()[-len(verdict["text"]) :] == verdict["text"]  # once, at the very end
    assert ended.stdout.count("Verdict on tiny") == log.count("Verdict on tiny") == 1
    assert {"reward", "accuracy", "n_images", "checkpoint"} <= verdict["tables"][0]["rows"][1].keys()
    judged = [
        (row["checkpoint"], row["prompts"], row["sampler"]) for row in read_json_lines(tmp_path / "tiny" / "eval.jsonl")
    ]
    sets = [("train", "training"), ("test", "training"), ("test", "deployed")]
    assert sorted(judged) == sorted((name, *kind) for name in ("base", "stage0") for kind in sets)
    assert (tmp_path / "tiny" / "report.html").is_file()


RANK_WRITES_ITS_NORMS = """
import json, os, runpy, sys
from b2diffurl.phases.trainer import Trainer

update, norms = Trainer.update, []

def spying(self, *args):
    report = update(self, *args)
    norms.append(report["grad_norm"])
    averages[:] = [value.double().sum().item() for value in self.average.tensors.values()]
    return report

averages = []

Trainer.update = spying
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
open("norms" + os.environ["RANK"] + ".json", "w").write(json.dumps(norms))
open("averages" + os.environ["RANK"] + ".json", "w").write(json.dumps(averages))
"""


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.long)])
def test_several_processes_do_the_work_of_one(overrides, stage_with, tmp_path, count):
    """CPU processes that share 3 sampling batches and 5 of scoring: the same samples, images, scores and selection byte for
    byte; gradient norms equal across ranks in every update, though the adapter is switched off and on for the base policy;
    and the update is that of one process within rounding (AdamW's mean after one update is linear in the gradient). Every
    rank has the average that is on disk."""
    more = {"train.num_epochs": 1, "train.gradient_accumulation_steps": 64, "train.objective": "dpok", "train.ema": 0.9}
    settings, one = overrides | more, stage_with(**more)
    spy = tmp_path / "spy.py"
    spy.write_text(RANK_WRITES_ITS_NORMS)
    for verb in ("sample", "select"):
        run_ranks(tmp_path, script_arguments(verb, settings | {"num_processes": count}), count)
    found, expected = stages(tmp_path)[0], stages(one)[0]
    for name in ("samples", "images", "selected"):
        assert snapshot(found.folder / name) == snapshot(expected.folder / name)
    for name in ("prompts.json", "scores.jsonl", "selection.json", "tree.png"):
        assert (found.folder / name).read_bytes() == (expected.folder / name).read_bytes()
    assert [found.manifest(verb)["num_processes"] for verb in ("sample", "select")] == [count, count]
    verb, *words = script_arguments("train", settings)
    run_ranks(tmp_path, [str(spy), str(ROOT / verb), *words], count)
    norms = [json.loads((tmp_path / f"norms{rank}.json").read_text()) for rank in range(count)]
    assert norms == [norms[0]] * count
    averages = [json.loads((tmp_path / f"averages{rank}.json").read_text()) for rank in range(count)]
    saved = load_file(found.checkpoints()[-1] / "ema" / LORA_FILE)
    assert [sorted(sums) for sums in averages] == [sorted(value.double().sum().item() for value in saved.values())] * count
    first, second = (load_file(stage.checkpoints()[-1] / "optimizer.safetensors") for stage in (expected, found))
    means = [name for name in first if name.endswith("::exp_avg")]
    assert means
    for name in means:
        torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-4 * first[name].abs().max().item())
    (one_by_one,), (shared,) = (
        [event for event in json_lines(stage.metrics("train")) if event["event"] == "update"] for stage in (expected, found)
    )
    assert norms[0] == pytest.approx([one_by_one["grad_norm"]], rel=1e-5)
    assert shared.keys() == one_by_one.keys()
    del shared["event"], one_by_one["event"]
    for key, value in one_by_one.items():  # figures of all processes, not of the first one's share
        assert shared[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert not [path for path in experiment(tmp_path).rglob("*") if path.name.endswith((".tmp", ".lock"))]


@pytest.mark.gpu
def test_several_gpus_do_the_work_of_one(overrides, tmp_path):
    """Two processes with a GPU each, over NCCL, in float32 without TF32: the batches of one within rounding, the same
    gradient norms on both, and one's update."""
    if torch.cuda.device_count() < 2:
        pytest.skip("no two CUDA devices")
    settings = overrides | {"train.num_epochs": 1, "train.gradient_accumulation_steps": 64, "mixed_precision": "no"}
    settings |= {"allow_tf32": False, "reward.dtype": "float32"}
    spy = tmp_path / "spy.py"
    spy.write_text(RANK_WRITES_ITS_NORMS)
    norms, found = {}, {}
    for count in (1, 2):
        folder = tmp_path / f"{count}"
        folder.mkdir()
        for verb in VERBS:
            script, *words = script_arguments(verb, settings | {"num_processes": count})
            run_ranks(folder, [str(spy), str(ROOT / script), *words] if verb == "train" else [script, *words], count)
        norms[count] = [json.loads((folder / f"norms{rank}.json").read_text()) for rank in range(count)]
        found[count] = stages(folder)[0]
        assert found[count].manifest("train")["device"].startswith("cuda")
    assert norms[2][0] == norms[2][1] == pytest.approx(norms[1][0], rel=1e-3)
    for batch in range(3):
        one, two = (load_file(found[count].batch(batch)) for count in (1, 2))
        torch.testing.assert_close(two["latents"], one["latents"], rtol=0, atol=1e-3)
    one, two = (load_file(found[count].checkpoints()[-1] / "optimizer.safetensors") for count in (1, 2))
    for name in (name for name in one if name.endswith("::exp_avg")):
        torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=1e-2 * one[name].abs().max().item())


# ---- start-up ----


NOT_IN_TRAINING = [
    "b2diffurl.rewards.clip",
    "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.clip.modeling_clip",
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("verb", "unwanted"),
    [
        ("sample", ["wandb", "matplotlib", "tensorboard"]),
        (
            "select",
            [
                "diffusers",
                "peft",
                "wandb",
                "matplotlib",
                "tensorboard",
                "b2diffurl.phases.train",
                "b2diffurl.phases.trainer",
            ],
        ),
        ("train", [*NOT_IN_TRAINING, "wandb", "matplotlib", "tensorboard"]),
    ],
)
def test_a_script_imports_what_it_uses(workplace, overrides, verb, unwanted):
    """Selecting needs no diffusers, training no scorer, none of them trackers or pictures."""
    forget(workplace, verb)
    given = [f"--config={ROOT}/config/stage_process.py:sd14", *(f"--config.{k}={v}" for k, v in overrides.items())]
    code = f"""
import runpy, sys
sys.argv = ["run_{verb}.py", *{given!r}]
runpy.run_path({str(ROOT / f"run_{verb}.py")!r}, run_name="__main__")
print([name for name in {unwanted!r} if name in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, timeout=120, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    assert stage_of(workplace).finished(verb)
    assert ended.stdout.splitlines()[-1] == "[]"


INDEPENDENT = {"sampling": "independent"}


# ---- run_process.sh ----


PYTHON = f"""#!{sys.executable} -SE
import json, os, socket, sys

if sys.argv[1] == "-c":
    sys.exit()  # asked for its version and packages
with socket.create_connection(("127.0.0.1", int(os.environ["WARM_PYTHON"]))) as server:
    server.sendall(json.dumps([os.getcwd(), sys.argv[1:]]).encode())
    server.shutdown(socket.SHUT_WR)
    code, stdout, stderr = json.load(server.makefile())
sys.stdout.write(stdout)
sys.stderr.write(stderr)
sys.exit(code)
"""


def run_process(folder: Path, arguments: list[str], variables: dict[str, str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of run_process.sh under `variables` of its environment. Its `python` hands each script to
    this process, where torch need not be imported anew."""
    stub = folder / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(PYTHON)
    stub.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.02)
        environment = os.environ | variables | {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
        environment["WARM_PYTHON"] = str(server.getsockname()[1])
        command = ["bash", str(ROOT / "run_process.sh"), *arguments]
        shell = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while shell.poll() is None:
            with contextlib.suppress(TimeoutError):
                answer(server.accept()[0])
    return shell.returncode, *shell.communicate()


def answer(connection: socket.socket) -> None:
    """Run the script that a stub's command line names, and send back its exit code and streams."""
    with connection:
        folder, argv = json.load(connection.makefile())
        if argv[0] == "-m":
            argv = [importlib.util.find_spec(argv[1]).origin, *argv[2:]]
        ended = call(folder, argv, lambda: runpy.run_path(argv[0], run_name="__main__"))
        connection.sendall(json.dumps([ended.code, ended.stdout, ended.stderr]).encode())


SWITCHES = {  # beside TINY; what has a variable in run_process.sh is set by it
    "dpok": REFERRING["dpok"],
    "d3po": REFERRING["d3po"],
    "reinforce": INDEPENDENT
    | {"curriculum": "fixed", "selection.images": "all", "train.objective": "reinforce", "train.num_epochs": 1},
}
VARIABLES = {
    "train.objective": "Objective",
    "curriculum": "Curriculum",
    "sampling": "Sampling",
    "selection.images": "Selection",
    "split_step_left": "SplitStepLeft",
    "split_step_right": "SplitStepRight",
    "train.num_epochs": "TrainEpoch",
}


@pytest.mark.long
@pytest.mark.parametrize("objective", SWITCHES)
def test_the_shell_script_takes_the_switches_from_the_environment(stage_with, overrides, tmp_path, objective):
    """Objective, Curriculum, Sampling and Selection of the environment end up in config.json, and in the bits that the
    functions give under the same settings; the LoRA has changed, and base and final are judged."""
    settings = SWITCHES[objective]
    switches = settings.keys() & VARIABLES.keys()
    variables = {VARIABLES[key]: str(settings[key]) for key in switches}
    variables |= {"Preset": "sd14", "StageCnt": "1", "SavePath": str(tmp_path), "Resident": "1"}
    rest = {key: value for key, value in (overrides | settings).items() if key not in {*switches, "stage_cnt"}}
    code, stdout, stderr = run_process(tmp_path, flags(rest | {"log_path": tmp_path}), variables)
    assert code == 0, stderr
    found, expected = Stage(tmp_path / "tiny", 0), stage_of(stage_with(**settings))
    recorded = flatten(json.loads((tmp_path / "tiny" / "config.json").read_text())["config"])
    assert {key: recorded[key] for key in settings} == settings
    kept = [name for name in snapshot(expected.folder) if not re.search(r"(sample|select|train)\.jsonl?$", name)]
    assert {name: (found.folder / name).read_bytes() for name in kept} == {
        name: (expected.folder / name).read_bytes() for name in kept
    }
    lora = load_file(found.checkpoints()[-1] / LORA_FILE)
    assert all(tensor.any() for tensor in lora.values())
    last = updates_of(found)[-1]
    assert ("kl" in last, "margin" in last) == (objective == "dpok", objective == "d3po")
    num_selected = len(json.loads(found.selection.read_text()))
    assert (num_selected == 18) == (objective == "reinforce")
    assert read_json(tmp_path / "tiny" / "verdict.json")["tables"][0]["checkpoint"] == "stage0"
    assert "Verdict on tiny after 1 of 1 stages, 18 images scored by" in stdout


@pytest.mark.long
def test_the_default_preset_takes_prompts_of_another_world(tmp_path, monkeypatch):
    """PromptFile alone: the run goes to its end, without the world's checker and on the prompts that were given. It says so
    once, records it, and calls nothing held out."""
    monkeypatch.setenv("B2DIFFURL_RUN", str(os.getpid()))  # as run_process.sh has it, whose scripts this process runs
    (tmp_path / "mine.txt").write_text("a wizard on a hill\na wizard\nA  wizard\n")
    few = {"eval.num_images": 4, "eval.batch_size": 4, "sample.batch_size": 4, "train.num_epochs": 1, "num_threads": 1}
    variables = {"PromptFile": str(tmp_path / "mine.txt"), "ExpName": "tiny", "SavePath": str(tmp_path), "Resident": "1"}
    variables |= {"StageCnt": "1", "BatchCnt": "1", "EvalEvery": "1"}
    code, stdout, stderr = run_process(tmp_path, flags(few | {"log_path": tmp_path}), variables)
    assert code == 0, stderr
    assert stdout.count("no held-out prompts were given") == stdout.count("is no prompt of the small world") == 1
    recorded = json.loads((tmp_path / "tiny" / "config.json").read_text())["config"]["eval"]
    assert (recorded["prompt_file"], recorded["judge"], recorded["diversity"]) == ("", "", ["clip"])
    rows = json_lines(tmp_path / "tiny" / "eval.jsonl")
    assert {(row["checkpoint"], row["prompts"], row["sampler"]) for row in rows} == {
        (checkpoint, "train", sampler) for checkpoint in ("base", "stage0") for sampler in ("training", "deployed")
    }
    page = (tmp_path / "tiny" / "report.html").read_text()
    assert "<h2>Training prompts: the first" in page and "eld-out" not in page
