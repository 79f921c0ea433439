"""The ablation switches through the phases themselves: what each changes, alone and together, and what it does not.

6 groups in 3 batches of 2, K = 3 siblings, T = 4 steps
"""

import contextlib
import importlib.util
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REFERRING, ROOT, call, experiment, flags, run_stage, snapshot
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from b2diffurl.algorithm.seeding import generator
from b2diffurl.configuration.keys import flatten
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.models.stable_diffusion import StableDiffusion

INDEPENDENT = {"sampling": "independent"}
PLAIN_DDPO = INDEPENDENT | {"curriculum": "fixed", "split_step_left": 4, "split_step_right": 4, "eval.selection": "all"}


def stage0(folder: Path) -> Stage:
    return Stage(experiment(folder), 0)


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def updates(stage: Stage) -> list[dict]:
    return [event for event in json_lines(stage.metrics("train")) if event["event"] == "update"]


# ---- sampling ----


def test_independent_siblings_share_nothing_but_their_prompt(overrides, models, tmp_path):
    """Each image is its own run of stock diffusers from its own noise, under its group's prompt; the last S + 1 states of
    each are stored, and no two siblings have a first one in common."""
    run_stage(tmp_path, overrides | INDEPENDENT, verbs=["sample"])
    stage, num_steps = stage0(tmp_path), 2
    found = load_file(stage.batch(0))
    assert found["latents"].shape == (2, 3, num_steps + 1, 4, 8, 8)
    assert found["log_probs"].shape == (2, 3, num_steps)
    first = found["latents"][:, :, 0].flatten(0, 1).flatten(1)
    cosine = torch.cosine_similarity(first[:, None], first[None], dim=-1) - torch.eye(6)
    assert cosine.abs().max() < 0.5

    stock = StableDiffusionPipeline.from_pretrained(models / "sd")
    scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    scheduler.set_timesteps(4)
    asked = json.loads(stage.prompts.read_text())[:6]
    assert asked[0] == asked[1] == asked[2] and asked[3] == asked[4] == asked[5]
    text, without = stock.encode_prompt(asked, torch.device("cpu"), 1, True)
    rng = generator(300, 0, "sample", 0)
    x = torch.randn(6, 4, 8, 8, generator=rng)
    for t in scheduler.timesteps:
        with torch.no_grad():
            eps = stock.unet(x, t, without).sample
            eps = eps + 5.0 * (stock.unet(x, t, text).sample - eps)
        noise = torch.randn(6, 4, 8, 8, generator=rng)
        x = scheduler.step(eps, t, x, eta=1.0, variance_noise=noise).prev_sample
    torch.testing.assert_close(found["latents"][:, :, -1].flatten(0, 1), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sampling", "evaluations"), [("branch", 6 * 2 + 18 * 2), ("independent", 18 * 4)])
def test_evaluations_are_counted(overrides, tmp_path, monkeypatch, sampling, evaluations):
    """The manifest's num_evaluations is the number of images, or prefixes of them, that the network saw at one step or
    another: branches share those of their prefix."""
    seen, predict = [], StableDiffusion.predict

    def counting(self, x_t: Tensor, *arguments) -> Tensor:
        seen.append(len(x_t))
        return predict(self, x_t, *arguments)

    monkeypatch.setattr(StableDiffusion, "predict", counting)
    run_stage(tmp_path, overrides | {"sampling": sampling}, verbs=["sample"])
    assert stage0(tmp_path).manifest("sample")["num_evaluations"] == sum(seen) == evaluations
    assert json_lines(stage0(tmp_path).metrics("sample"))[-1]["num_evaluations"] == evaluations


# ---- selection ----


def test_independent_images_of_all_steps_and_all_selected_are_plain_ddpo(stage_with):
    """Every image is selected, in order, with its normalised score, clamped, as advantage, and trained on in all its T steps
    in every epoch; the first update, here of all of them, is on the policy that sampled."""
    stage = stage0(stage_with(**PLAIN_DDPO, **{"train.adv_clip_max": 0.5, "train.gradient_accumulation_steps": 64}))
    rows, prompts = json.loads(stage.selection.read_text()), json.loads(stage.prompts.read_text())
    rewards = np.array([row["reward"] for row in json_lines(stage.scores)])
    expected = []
    for prompt, reward in zip(prompts, rewards, strict=True):
        same = rewards[[one == prompt for one in prompts]]
        expected.append((reward - same.mean()) / same.std(ddof=1))
    assert [(row["id"], row["group"], row["branch"]) for row in rows] == [(n, n // 3, n % 3) for n in range(18)]
    assert [row["score"] for row in rows] == pytest.approx(expected, rel=1e-5)
    assert [row["advantage"] for row in rows] == pytest.approx(np.clip(expected, -0.5, 0.5), rel=1e-5)
    selected, trained = stage.manifest("select"), stage.manifest("train")
    assert (selected["num_selected"], selected["num_best"], selected["num_worst"]) == (
        18,
        sum(score >= 0.5 for score in expected),
        sum(score < -0.5 for score in expected),
    )
    assert (trained["num_trained_steps"], trained["num_transitions"]) == (4, 18 * 4 * 2)
    assert trained["max_abs_log_ratio_first_update"] < 1e-5


@pytest.mark.parametrize("sampling", ["branch", "independent"])
def test_a_stage_of_single_siblings(stage_with, sampling):
    """K = 1 and selection all: every phase ends, spread inside groups is 0, and no file holds a NaN or an infinity."""
    stage = stage0(stage_with(**{"split_time": 1, "eval.selection": "all", "sampling": sampling}))
    assert len(json.loads(stage.selection.read_text())) == stage.manifest("sample")["num_images"] == 6
    assert stage.manifest("select")["reward_group_std"] == 0.0
    assert stage.manifest("train")["num_updates"] == 4

    def refuse(name: str) -> None:
        raise AssertionError(name)

    for path in [*stage.folder.rglob("*.json"), *stage.folder.rglob("*.jsonl")]:
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=refuse)


def test_single_branches_are_independent_images(stage_with):
    """With K = 1 both kinds of sampling, and all that follows from it, are the same to the bit."""
    one, other = (
        stage0(stage_with(**{"split_time": 1, "eval.selection": "all", "sampling": sampling}))
        for sampling in ("branch", "independent")
    )
    assert snapshot(one.images) == snapshot(other.images)
    for path in one.samples.iterdir():
        tensors, others = load_file(path), load_file(other.samples / path.name)
        assert all(torch.equal(value, others[key]) for key, value in tensors.items())
    lora = [load_file(stage.checkpoints()[-1] / LORA_FILE) for stage in (one, other)]
    assert all(torch.equal(value, lora[1][key]) for key, value in lora[0].items())


# ---- run_process.sh ----

PYTHON = f"""#!{sys.executable} -SE
import json, os, socket, sys

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
    | {"curriculum": "fixed", "eval.selection": "all", "train.objective": "reinforce", "train.num_epochs": 1},
}
VARIABLES = {
    "train.objective": "Objective",
    "curriculum": "Curriculum",
    "sampling": "Sampling",
    "eval.selection": "Selection",
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
    found, expected = Stage(tmp_path / "tiny", 0), stage0(stage_with(**settings))
    recorded = flatten(json.loads((tmp_path / "tiny" / "config.json").read_text())["config"])
    assert {key: recorded[key] for key in settings} == settings
    kept = [name for name in snapshot(expected.folder) if not re.search(r"(sample|select|train)\.jsonl?$", name)]
    assert {name: (found.folder / name).read_bytes() for name in kept} == {
        name: (expected.folder / name).read_bytes() for name in kept
    }
    lora = load_file(found.checkpoints()[-1] / LORA_FILE)
    assert all(tensor.any() for tensor in lora.values())
    last = updates(found)[-1]
    assert ("kl" in last, "margin" in last) == (objective == "dpok", objective == "d3po")
    num_selected = len(json.loads(found.selection.read_text()))
    assert (num_selected == 18) == (objective == "reinforce")
    assert json.loads(stdout.splitlines()[-1])["checkpoint"] == "stage0"
