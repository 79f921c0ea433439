"""Bad input ends before any work: exit code not 0, two lines that say what is wrong and what to do, nothing written."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
from conftest import (
    LIMIT_SEC,
    ROOT,
    VERBS,
    experiment,
    flags,
    judged,
    refuse,
    run_stage,
    script_arguments,
    snapshot,
)
from safetensors.torch import load_file, save_file

from b2diffurl.experiment.stage import LORA_FILE, Stage


def run_process(folder: Path, overrides: dict, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """run_sample.py as a process of its own."""
    argv = script_arguments("sample", overrides)
    return subprocess.run(
        [sys.executable, ROOT / argv[0], *argv[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def base(models, tmp_path) -> Path:
    """A base model of its own, to be damaged."""
    return shutil.copytree(models / "sd", tmp_path / "sd")


# ---- models that cannot be had ----


@pytest.mark.parametrize("name", ["/no/such/model", "./no/such/model", "~/no_such_model", "model/no/such"])
def test_missing_model_directory(empty, overrides, name):
    """A path at which there is nothing is named, with what may be given instead; for base model and scorer alike."""
    looked_at = str(empty / Path(name).expanduser())
    for key in ("pretrained.model", "reward.clip.model"):
        refuse(empty, "sample", overrides | {key: name}, re.escape(looked_at), "local path.*hub id")


def test_model_neither_here_nor_on_a_hub_in_reach(empty, overrides):
    """Offline, an id that is not in the cache is named with the command that downloads it."""
    for key in ("pretrained.model", "reward.clip.model"):
        refuse(empty, "sample", overrides | {key: "nobody/no-model"}, "nobody/no-model", "hf download nobody/no-model")


@pytest.mark.long
def test_a_silent_hub_is_probed_once(empty, overrides):
    """A hub that takes connections and never answers: it is asked once and left within 10 seconds, in two lines that say
    how to get the model."""
    waited = []
    with socket.create_server(("127.0.0.1", 0), backlog=16) as silent:

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, started = silent.accept()[0], time.perf_counter()
                    while connection.recv(1024):
                        pass
                    waited.append(time.perf_counter() - started)

        listener = threading.Thread(target=listen)
        listener.start()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(empty / "hub"), "HF_HUB_OFFLINE": "0"}
        result = run_process(empty, overrides | {"pretrained.model": "nobody/no-model"}, environment)
        silent.shutdown(socket.SHUT_RDWR)  # ends the listener's accept
        listener.join(LIMIT_SEC)
    assert len(waited) == 1
    assert waited[0] < LIMIT_SEC
    assert result.returncode == 2
    first, second = result.stderr.splitlines()
    assert "nobody/no-model" in first
    assert "hf download nobody/no-model" in first
    assert second.startswith("       ")
    assert not snapshot(empty)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_model_directory_with_a_part_missing(empty, overrides, base, part):
    """A directory that lacks a component says which."""
    shutil.rmtree(base / part)
    refuse(empty, "sample", overrides | {"pretrained.model": str(base)}, part)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_model_directory_without_weights(empty, overrides, base, part):
    """Weights that are not there, or are there as a pickle only, are missed by name; pickles are not tried."""
    (weights,) = (base / part).glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    refuse(empty, "sample", overrides | {"pretrained.model": str(base)}, part)


@pytest.mark.parametrize("damage", [b"", b"<html>not found</html>", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_damaged_base_weights(empty, overrides, base, damage):
    """A weights file that was cut off, or is an error page, is named."""
    (base / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(damage)
    refuse(empty, "sample", overrides | {"pretrained.model": str(base)}, "unet|diffusion_pytorch_model")


def test_a_scorer_directory_that_is_none(workplace, overrides, tmp_path):
    """A directory without a CLIP model in it is refused in both scripts that want one."""
    (tmp_path / "scorer").mkdir()
    shutil.rmtree(experiment(workplace))
    refuse(
        workplace, "sample", overrides | {"reward.clip.model": str(tmp_path / "scorer")}, re.escape(str(tmp_path / "scorer"))
    )


def test_a_variant_that_is_not_there(empty, overrides):
    """pretrained.variant names weights the directory lacks."""
    refuse(empty, "sample", overrides | {"pretrained.variant": "fp16"}, "fp16")


# ---- settings ----


def test_unknown_preset(empty):
    """The presets there are, are named."""
    refuse(empty, "sample", {}, "'sd15'", "shapes, shapes_flow, shapes_ddpo, sd14", preset="sd15")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"split_step": 5}, r"split_step is 5.*1\.\.4"),
        ({"split_step": -1}, r"split_step is -1.*1\.\.4"),
        ({"split_step_right": 5}, r"2\.\.5.*1\.\.4"),
        ({"split_step_left": 0}, r"0\.\.3.*1\.\.4"),
        ({"sample.eta": 0.0}, "eta is 0"),
        ({"run_name": "last"}, "run_name is 'last'"),
        ({"exp_name": "a/b"}, "exp_name is 'a/b'"),
        ({"reward.name": "beauty"}, "beauty.*clip, pickscore.*shapes, http, file"),
        ({"reward.name": "no.such.module:beauty"}, "no.such.module:beauty.*No module named 'no'"),
        ({"reward.name": "math:beauty"}, "math has no function 'beauty'"),
        ({"train.objective": "dpo"}, "'dpo'.*'ddpo', 'reinforce', 'dpok', 'd3po'"),
        ({"curriculum": "forward"}, "'forward'.*'progressive', 'fixed', 'reversed', 'random'"),
        ({"sampling": "prefix"}, "'prefix'.*'branch', 'independent'"),
        ({"selection.images": "best"}, "'best'.*'pairs', 'all'"),
        ({"selection.advantage": "batch"}, "'batch'.*'prompt', 'group'"),
        ({"train.objective": "d3po", "selection.images": "all"}, "d3po compares best and worst.*must be pairs"),
        ({"train.objective": "d3po", "sampling": "independent"}, "d3po compares branches of one prefix.*must be branch"),
        ({"train.objective": "reinforce"}, "num_epochs is 2; reinforce .* one pass"),
        ({"split_time": 1}, "split_time is 1; a contrast needs at least 2 siblings"),
        (
            {"split_time": 1, "selection.images": "all", "selection.advantage": "group"},
            "split_time is 1.*every image scores",
        ),
        ({"train.kl_weight": -0.1}, "kl_weight is -0.1.*it must lie in"),
        ({"train.dpo_beta": -0.1}, "dpo_beta is -0.1.*it must lie in"),
        ({"pretrained.family": "sdxxl"}, "sdxxl.*auto, stable_diffusion, sdxl"),
        (
            {"pretrained.family": "sdxl"},
            r"is a StableDiffusionPipeline, and not a StableDiffusionXLPipeline\. Leave pretrained\.family at auto",
        ),
        ({"pretrained.resolution": 100}, "resolution is 100.*multiple of 16"),
        ({"resume_from": "/no/such/lora"}, "resume_from: no LoRA at /no/such/lora"),
        ({"run_name": "stage1"}, "stage0.*not trained yet"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(empty, overrides, settings, said):
    """S outside 1..T, eta 0, names that are none, switches that exclude each other: what was given and what is allowed, or
    why not."""
    refuse(empty, "sample", overrides | settings, said)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.json", None, "no prompt file at"),
        ("empty.json", "", "holds no prompt"),
        ("empty_list.json", "[]", "holds no prompt"),
        ("empty.txt", "\n\n", "holds no prompt"),
        ("cut.json", '["a cat", "a d', "not JSON"),
        ("dict.json", '{"a": "cat"}', "is not a list"),
        ("numbers.json", "[1, 2]", "entry 1: 1 is no prompt"),
        ("blank.json", '["a cat", ""]', 'entry 2: "" is no prompt'),
        ("latin.txt", "caf\xe9".encode("latin-1"), "latin.txt"),
        ("folder", "", "folder"),
    ],
)
def test_prompt_file_missing_empty_or_malformed(empty, overrides, tmp_path, name, content, said):
    """Each is told apart, with the file's name."""
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(empty, "sample", overrides | {"prompt_file": str(path)}, said, re.escape(str(path)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clip_sample": True}, "clip_sample is on"),
        ({"clip_sample": None}, "clip_sample is not given"),
        ({"thresholding": True}, "thresholding is on"),
        ({"set_alpha_to_one": True}, r"t = \[1\].*sigma = 0"),
        ({"steps_offset": 0}, r"t = \[0\].*sigma = 0"),
        ({"prediction_type": "flow"}, "flow.*epsilon"),
    ],
    ids=str,
)
def test_schedulers_without_a_policy(empty, overrides, base, change, said):
    """clip_sample on, or left to DDIM's default, and windows with a sigma of 0: named with how to mend them."""
    config = tiny.V1_4_SCHEDULER | change
    tiny.write_scheduler(base, {key: value for key, value in config.items() if value is not None})
    refuse(empty, "sample", overrides | {"pretrained.model": str(base)}, said)


def test_a_window_without_noise_has_no_branches(empty, overrides, base):
    """nft needs no log-probabilities, but a window whose only step draws no noise would copy the prefix K times."""
    tiny.write_scheduler(base, tiny.V1_4_SCHEDULER | {"set_alpha_to_one": True})
    model = {"pretrained.model": str(base), "train.objective": "nft", "curriculum": "fixed"}
    refuse(
        empty, "sample", overrides | model | {"split_step_left": 1}, "draws noise", "branches of a prefix would be all alike"
    )


# ---- experiments that do not fit ----


@pytest.mark.parametrize("verb", VERBS)
def test_a_stage_of_another_configuration(workplace, overrides, verb):
    """A folder written by another configuration is refused by every script, finished or not, before any work."""
    refuse(workplace, verb, overrides | {"seed": 1, "train.eps": 0.2}, "seed is 1, was 300", "train.eps is 0.2, was 0.1")
    for manifest in VERBS[VERBS.index(verb) :]:
        (experiment(workplace) / "stage0" / f"{manifest}.json").unlink()
    refuse(workplace, verb, overrides | {"sample.guidance_scale": 3.0}, "guidance_scale is 3.0, was 5.0")


def test_a_checkpoint_of_another_base_model(finished, empty, workplace, overrides, models):
    """A LoRA trained on another base is refused: as a start, as the stage before, and as what a stage was sampled with."""
    lora = experiment(finished) / "stage1" / "checkpoints" / "checkpoint_2"
    different = shutil.copytree(models / "sd_v", empty.parent / "different")
    weights = different / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    other = {"pretrained.model": str(different)}
    refuse(empty, "sample", overrides | other | {"resume_from": str(lora)}, "another base model")
    next_stage = {"run_name": "stage2", "stage_cnt": 3}
    refuse(workplace, "sample", overrides | other | next_stage, "the unet of the base model is another")
    Stage(experiment(workplace), 0).manifest_path("train").unlink()
    shutil.rmtree(experiment(workplace) / "stage0" / "checkpoints")
    refuse(workplace, "train", overrides | other, "the unet of the base model is another")


def test_a_lora_that_does_not_fit(finished, empty, overrides):
    """Another rank is told with both shapes."""
    lora = experiment(finished) / "stage1" / "checkpoints" / "checkpoint_2"
    refuse(empty, "sample", overrides | {"resume_from": str(lora), "train.lora_rank": 8}, "rank is 4, not 8.*lora_rank=4")


@pytest.mark.parametrize("content", [b"", b"{}", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_lora_that_is_damaged(empty, overrides, tmp_path, content):
    """A .safetensors file that is none is named."""
    (tmp_path / LORA_FILE).write_bytes(content)
    refuse(empty, "sample", overrides | {"resume_from": str(tmp_path / LORA_FILE)}, LORA_FILE)


def test_a_pickled_lora(empty, overrides, tmp_path):
    """A .pt is not opened."""
    (tmp_path / "lora.pt").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    refuse(empty, "sample", overrides | {"resume_from": str(tmp_path / "lora.pt")}, "not a .safetensors file")


@pytest.mark.parametrize(("verb", "missing"), [("select", "sample"), ("train", "sample")])
def test_phases_out_of_order(empty, overrides, verb, missing):
    """A phase whose input is not there says which script makes it."""
    refuse(empty, verb, overrides, f"run_{missing}.py first")


def test_training_before_selecting(overrides, empty):
    """Sampled but not selected: run_select.py is what is missing."""
    run_stage(empty, overrides, verbs=["sample"])
    refuse(empty, "train", overrides, r"run_select.py first")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--checkpoint=last",), "no trained stage"),
        (("--checkpoint=stage4",), "no checkpoint 'stage4': it has no trained stage"),
        (("--checkpoint=/no/such/lora",), "no LoRA at /no/such/lora"),
        (("--checkpoint=base", "--prompts=/no/such/prompts.json"), "no prompt file at /no/such/prompts.json"),
        (("--checkpoint=base", "--config.eval.judge=beauty"), "beauty.*clip, pickscore.*shapes, http, file"),
        (("--checkpoint=base", "--config.eval.diversity=('beauty',)"), "beauty.*clip, layout"),
        (("--checkpoint=base", "--config.eval.deployed.eta=2.0"), "eval.deployed.eta is 2.0"),
        (("--checkpoint=base", "--config.eval.deployed.guidance_scale=0.5"), "eval.deployed.guidance_scale is 0.5"),
        (("--checkpoint=base", "--config.eval.deployed.scheduler=Magic"), "unknown eval.deployed.scheduler 'Magic'"),
        (("--checkpoint=base", "--sampler=mine"), "--sampler is 'mine'; known: 'training', 'deployed'"),
        (("--checkpoint=base", "--config.eval.diversity=('inception',)"), "inception.*cannot be had.*vit-base"),
        (("--checkpoint=base", "--config.pretrained.model=/no/such/model"), "/no/such/model"),
    ],
    ids=str,
)
def test_what_cannot_be_judged(empty, overrides, arguments, said):
    """run_eval.py names the checkpoint, prompts, judge or setting it cannot use."""
    refuse(empty, "eval", overrides, said, arguments=arguments)


@pytest.mark.parametrize(
    ("stage", "said"),
    [("last", "stage1/checkpoints.*checksum.*run run_train.py again"), ("unfinished", "pytorch_lora_weights.*damaged")],
)
def test_a_half_written_checkpoint_is_not_judged(workplace, overrides, stage, said):
    """Cut in the middle, of a finished stage and of one that was interrupted: named, with what to do."""
    lora = Stage(experiment(workplace), 1).checkpoints()[-1] / LORA_FILE
    lora.write_bytes(lora.read_bytes()[: lora.stat().st_size // 2])
    if stage == "unfinished":
        Stage(experiment(workplace), 1).manifest_path("train").unlink()
        stage = "stage1"
    refuse(workplace, "eval", overrides, said, arguments=(f"--checkpoint={stage}",))


@pytest.mark.parametrize("name", ["last", "stage1"])
def test_a_missing_checkpoint_is_not_judged(workplace, overrides, name):
    """A finished stage whose weights are gone is not said to have been trained, or not: what is missing is named."""
    for checkpoint in Stage(experiment(workplace), 1).checkpoints():
        (checkpoint / LORA_FILE).unlink()
    said = r"pytorch_lora_weights\.safetensors is missing\. Delete .*train\.json and run run_train\.py again"
    refuse(workplace, "eval", overrides, said, arguments=(f"--checkpoint={name}",))


def test_a_checkpoint_of_another_base_is_not_judged(workplace, overrides, models):
    """The manifest's checksum of the base is not that of the model at hand: it is neither judged nor drawn, and nor is that
    model judged first."""
    other = shutil.copytree(models / "sd", workplace / "other")
    path = next((other / "unet").glob("*.safetensors"))
    weights = load_file(path)
    save_file({name: value + 1e-3 for name, value in weights.items()}, path)
    settings = overrides | {"pretrained.model": str(other)}
    for arguments in (("--checkpoint=last",), ("--checkpoint=base,last",), ("--prompt=a red circle",)):
        said = r"was trained on another base model \(SHA-256 .*Use that base"
        refuse(workplace, "eval", settings, said, arguments=arguments)


def test_an_empty_prompt_file_is_not_judged(workplace, overrides):
    (workplace / "none.txt").write_text("\n\n")
    refuse(workplace, "eval", overrides, "none.txt holds no prompt", arguments=("--prompts=none.txt",))
    refuse(workplace, "eval", overrides, "--prompt is empty", arguments=("--prompt= ",))


def test_an_experiment_that_does_not_exist_is_not_judged(workplace, overrides):
    """Those that there are are named."""
    said = "nope has no checkpoint 'last': it has no trained stage.*Experiments in model/lora: tiny"
    refuse(workplace, "eval", overrides | {"exp_name": "nope"}, said)


def test_the_real_process_ends_in_two_lines(empty, overrides):
    """As a process of its own: exit code 2, nothing on stdout, two lines on stderr, the traceback in the log only."""
    result = run_process(empty, overrides | {"sample.eta": 0.0})
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 2
    assert not snapshot(empty)
    assert "Traceback" in (empty / "log" / "tiny.log").read_text()


def test_run_process_stops_at_bad_input(empty, overrides):
    """The loop ends before its first stage, with the exit code and the two lines of the check."""
    settings = flags(overrides | {"log_path": empty, "save_path": empty})
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "Preset": "sd14"}
    environment |= {"Objective": "d3po", "Selection": "all"}
    command = ["bash", ROOT / "run_process.sh", *settings]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 2
    assert "selection.images must be pairs" in result.stderr
    assert [path.name for path in empty.iterdir()] == ["tiny.log"]


def test_json_of_the_evaluation_needs_no_experiment(empty, overrides):
    """Judging the base needs no trained stage: the counterpart of the refusals above."""
    assert judged(empty, overrides, "--checkpoint=base")["checkpoint"] == "base"
