"""The dry run says what a run will take, and changes nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import (
    REAL_SIZE,
    ROOT,
    experiment,
    flags,
    get_config,
    make_config,
    settings_at,
    snapshot,
    start,
)

from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.keys import flatten
from b2diffurl.configuration.settings import read_settings
from b2diffurl.experiment.stage import Stage
from b2diffurl.models import Sizes, stable_diffusion
from b2diffurl.reporting import dry_run


def test_what_is_on_disk_in_all(overrides, tmp_path):
    """By hand: the trajectories of the larger stage or of both, a copy of two siblings in three, two checkpoints a stage,
    images of which 4 or all are kept, and those that are judged."""
    base = Sizes((4, 8, 8), (64, 64), 77 * 16, 100_000)
    rare = {"eval.every": 0, "keep.images": 4, "keep.samples": False}
    text = dry_run.disk_text(settings_at(make_config(overrides | rare), tmp_path), base, [10_000_000, 30_000_000])
    image, checkpoint = 3 * 64 * 64, 4 * 100_000 * 12
    total = 30e6 + 20e6 + 2 * (2 * checkpoint + 4 * image) + (14 + 36) * image
    assert text.startswith(f"at most {dry_run.size(total)}, ")
    assert f"{dry_run.size(2 * checkpoint)}" in text
    kept = rare | {"keep.images": -1, "keep.samples": True, "train.use_8bit_adam": True, "train.save_interval": 2}
    text = dry_run.disk_text(settings_at(make_config(overrides | kept), tmp_path), base, [10_000_000, 30_000_000])
    assert text.startswith(
        f"at most {dry_run.size(40e6 + 40e6 * 12 // 18 + 2 * (checkpoint / 2 + 18 * image) + 36 * image)}, "
    )


def test_what_is_loaded_by_hand(overrides):
    """SDXL at 2 bytes a number, its VAE at 4; a LoRA of rank 4 with gradients and AdamW's two moments at 4 each, or at 1."""
    base = Sizes((4, 128, 128), (1024, 1024), 0, 1_451_520, {"unet": 2_567_463_684, "vae": 83_653_863}, ("vae",))
    text = dry_run.memory_text(read_settings(make_config(overrides)), base, 2)
    assert text.startswith("weights 5.5 GB (unet 5.1 GB, vae 335 MB), LoRA and optimizer 93 MB; ")
    text = dry_run.memory_text(read_settings(make_config(overrides | {"train.use_8bit_adam": True})), base, 4)
    assert text.startswith("weights 11 GB (unet 10 GB, vae 335 MB), LoRA and optimizer 58 MB; ")


@pytest.mark.parametrize("preset", [pytest.param(one, marks=[] if one == "sd14" else pytest.mark.long) for one in REAL_SIZE])
def test_a_preset_whose_model_is_not_here_has_a_plan(tmp_path, preset):
    """Of images, evaluations, updates, and by what is known of the preset's model of parameters, disk and memory. The hub
    cannot be reached, so each model that is missing is a fault, with the setting that names it."""
    given = flatten(get_config(preset).to_dict())
    prompts = {key: f"{ROOT}/{given[key]}" for key in ("prompt_file", "eval.prompt_file")}
    ended = start(tmp_path, prompts, "--dry_run", preset=preset)
    assert ended.code == 2
    assert f"\npreset       {preset}\n" in ended.stdout
    assert re.search(r"^trained +a LoRA of rank \d+ on attention: [\d,]+ parameters", ended.stdout, re.M)
    assert re.search(r"^disk +at most [\d.]+ [GT]B", ended.stdout, re.M)
    assert re.search(r"^memory +weights [\d.]+ GB", ended.stdout, re.M)
    *errors, hint = ended.stderr.splitlines()
    assert [line.split(": ")[1] for line in errors] == ["reward.clip.model", "pretrained.model"]
    assert errors[1].endswith(
        f"hf download {given['pretrained.model']} --local-dir DIR; then give --config.pretrained.model=DIR."
    )
    assert hint == "       Mend these and run the same command again."
    assert not snapshot(tmp_path)


def test_the_base_model_is_looked_for_only_here(models, overrides, tmp_path, monkeypatch):
    """In the hub's cache by its id; elsewhere it is unknown, and so is one without weights. Nothing is asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("network"))

    def sizes(**pretrained) -> Sizes | None:
        settings = overrides | {f"pretrained.{key}": value for key, value in pretrained.items()}
        return stable_diffusion.FAMILY.sizes(read_settings(make_config(settings)).model)

    assert sizes(model="somebody/model") is None
    root = tmp_path / "hub" / "models--somebody--model"
    shutil.copytree(models / "sd", root / "snapshots" / "abc")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    assert sizes(model="somebody/model") == sizes()
    assert sizes() is not None
    assert sizes(model="./no/model") is None
    assert sizes(model="somebody/model", resolution=128).latent_shape == (4, 16, 16)
    for path in (root / "snapshots").rglob("unet/*.safetensors"):
        path.unlink()
    assert sizes(model="somebody/model") is None


def test_the_dry_run_of_a_new_experiment(overrides, tmp_path):
    """The plan: exit code 0, what was asked for in numbers, and nothing is written, not even a log."""
    ended = start(tmp_path, overrides | {"reward.watch": "('shapes',)", "seed": 7}, "--dry_run")
    assert (ended.code, ended.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in ended.stdout.splitlines() if "  " in line)
    assert lines["experiment"] == "tiny in model/lora/tiny, new"
    assert lines["reward"] == "clip; watched: shapes"
    assert lines["prompts"].startswith("3 of ")
    assert lines["device"].endswith("CPU, threads: 1, float32")
    assert lines["seeds"].startswith("7 of the experiment, 0 of")
    assert lines["stage0"].split() == ["2", "18", "48", "6", lines["stage0"].split()[-2], "kB"]
    assert lines["stage1"].split()[:4] == ["3", "18", "60", "6"]
    assert lines["in all"].split()[:3] == ["36", "108", "12"]
    assert lines["time"].startswith("unknown until the run has sampled its first batch")
    assert ended.stdout.splitlines()[-1].startswith("ready: the run would start.")


def test_stages_of_one_window_share_a_row(overrides):
    """Windows of one S differ in cost by where they lie; those that do not end with the image say where they begin."""
    sliding = {"curriculum": "sliding", "stage_cnt": 6, "sample.suffix_eta": 0.0, "sample.suffix_steps": 1}
    budget = Budget.of(read_settings(make_config(overrides | sliding)))
    lines = dry_run.stage_table(budget, [budget.schedule.window(index) for index in range(6)], [])
    assert [re.split(r"  +", line.strip())[:4] for line in lines[1:]] == [
        ["stages 0-1", "2 from step 1", "18", str(18 * 3)],
        ["stages 2-3", "2 from step 2", "18", str(6 + 18 * 3)],
        ["stages 4-5", "2", "18", str(12 + 18 * 2)],
        ["in all", "108", str(2 * (54 + 60 + 48)), "36"],
    ]


def test_the_dry_run_of_the_reference(tmp_path):
    """Stages of one S in one row; a curriculum at random by counts; what follows from the model is unknown without it."""
    settings = {"pretrained.model": "nobody/no-model", "prompt_file": ROOT / "config/prompt/template1_train.json"}
    settings |= {"eval.prompt_file": ROOT / "config/prompt/template1_test.json"}
    text = start(tmp_path, settings, "--dry_run").stdout
    assert re.search(r"^stages 0-14 +14 +1,280 +19,456 +8 +\?$", text, re.MULTILINE)
    assert re.search(r"^stages 86-99 +20 +1,280 +25,600 ", text, re.MULTILINE)
    assert re.search(r"^in all +128,000 ", text, re.MULTILINE)
    assert re.search(r"^disk +unknown until the base model is here", text, re.MULTILINE)
    counts = re.findall(
        r"^(\d+) stages +\d+ ", start(tmp_path, settings | {"curriculum": "random"}, "--dry_run").stdout, re.M
    )
    assert sum(map(int, counts)) == 100


def test_the_dry_run_of_an_experiment_that_is_there(workplace, overrides):
    """It says where a run would go on, and how long that takes; the files are as before."""
    Stage(experiment(workplace), 1).manifest_path("train").unlink()
    before = snapshot(workplace, log=True)
    ended = start(workplace, overrides, "--dry_run")
    assert "1 of 2 stages finished; goes on with train of stage1" in ended.stdout
    assert re.search(r"^time +1 of 2 stages done, about .* left$", ended.stdout, re.MULTILINE)
    assert snapshot(workplace, log=True) == before


def test_a_dry_run_that_finds_a_mistake(workplace, overrides):
    """Another configuration than the experiment's is refused like in a run, but no log is written."""
    shutil.rmtree(workplace / "log", ignore_errors=True)
    ended = start(workplace, overrides | {"train.eps": 0.5}, "--dry_run")
    assert (ended.code, ended.stdout) == (2, "")
    assert "belongs to another configuration" in ended.stderr
    assert ".log" not in ended.stderr
    assert not (workplace / "log").exists()


@pytest.mark.long
def test_the_shell_script_only_plans(overrides, tmp_path):
    """bash run_process.sh --dry_run: the same plan; nothing is written."""
    settings = flags(overrides | {"save_path": tmp_path / "out", "log_path": tmp_path / "log"})
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"Preset": "sd14", "PATH": path}
    ended = subprocess.run(
        ["bash", ROOT / "run_process.sh", "--dry_run", *settings],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("experiment   tiny in ")
    assert list(tmp_path.iterdir()) == []


def test_images_alone_take_a_tenth_of_their_trajectories():
    """Stable Diffusion v1.4, 20 trained steps of 20: one latent an image and the prompts' embeddings, against 21 latents."""
    base = Sizes(latent_shape=(4, 64, 64), image_px=(512, 512), embedding=77 * 768, lora=1)
    whole, alone = (
        dry_run.trajectory_bytes(read_settings(get_config(preset)), base, 20, 45, embedding_bytes=4)
        for preset in ("sd14", "sd14_nft")
    )
    assert alone <= 0.1 * whole
