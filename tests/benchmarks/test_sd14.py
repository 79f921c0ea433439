"""Stable Diffusion at its real size: one stage of a tiny budget through the three scripts.

    python -m pytest -m slow -rP tests/benchmarks/test_sd14.py     on the CPU, in float32
    python -m pytest -m gpu -rP tests/benchmarks/test_sd14.py      on CUDA, in bf16 and fp16

On two CPU cores that other work shared (2026-11-23), sampling took 304 s and 6.4 GiB, training 1,703 s and 9.8 GiB.

The weights are random (2 GB, written to a temporary folder), unless SD14_DIR names a directory of Stable Diffusion v1.4.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT, VERBS, flags
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

# The preset sd14 on one prompt: two branches, the last two of three guided steps, two updates.
TINY_BUDGET = {
    "exp_name": "sd14",
    "stage_cnt": 1,
    "split_step_left": 2,
    "split_step_right": 3,
    "split_time": 2,
    "sample.num_steps": 3,
    "sample.batch_size": 1,
    "sample.num_batches_per_epoch": 1,
    "sample.micro_batch_size": 1,
    "train.batch_size": 2,
    "train.gradient_accumulation_steps": 1,
    "train.micro_batch_size": 1,
    "train.num_epochs": 2,
    "train.learning_rate": 1e-3,
}


@dataclass(frozen=True)
class Stage:
    """One stage as its scripts left it, with what each took."""

    folder: Path
    seconds: dict[str, float]
    peak_gb: dict[str, float]

    def read(self, name: str):
        return json.loads((self.folder / name).read_text())

    @property
    def lora(self) -> Path:
        return self.folder / "checkpoints" / "checkpoint_1"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The model directory; what was built here goes when the tests are done, so that pytest does not keep 2 GB."""
    if "SD14_DIR" in os.environ:
        yield Path(os.environ["SD14_DIR"]).resolve()
        return
    root = tmp_path_factory.mktemp("sd14")
    # not in this process, whose memory would count in its children's peak
    subprocess.run([sys.executable, "-m", "benchmarks.sd14", root], cwd=ROOT, check=True)
    yield root
    shutil.rmtree(root)


def run_stage(base: Path, folder: Path, **more) -> Stage:
    """The three scripts in turn, as child processes with all cores, in `folder`."""
    tiny.clip(folder / "clip")
    overrides = TINY_BUDGET | {"pretrained.model": base, "reward.clip.model": folder / "clip"} | more
    overrides |= {"prompt_file": ROOT / "config/prompt/template1_train.json", "save_path": folder, "log_path": folder}
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    seconds, peak_gb = {}, {}
    for verb in VERBS:
        started = time.perf_counter()
        command = [sys.executable, ROOT / f"run_{verb}.py", f"--config={ROOT}/config/stage_process.py:sd14"]
        process = subprocess.Popen([*command, *flags(overrides)], cwd=folder, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, f"run_{verb}.py"
        seconds[verb], peak_gb[verb] = time.perf_counter() - started, usage.ru_maxrss / 2**20
        print(f"run_{verb}.py {seconds[verb]:.0f} s, peak {peak_gb[verb]:.1f} GiB of main memory")
    return Stage(folder / "sd14" / "stage0", seconds, peak_gb)


def check_trained(stage: Stage) -> None:
    """Two 512x512 images, both selected, two updates that moved every layer of the LoRA."""
    with Image.open(stage.folder / "images" / "00001.png") as image:
        assert image.size == (512, 512)
    assert [row["id"] for row in sorted(stage.read("selection.json"), key=lambda row: row["id"])] == [0, 1]
    assert stage.read("train.json")["num_updates"] == 2
    state = load_file(stage.lora / "pytorch_lora_weights.safetensors")
    assert sum(tensor.numel() for tensor in state.values()) == 797_184  # rank 4 on the attention of v1.4's UNet
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in state.values())
    assert all(tensor.abs().max() > 0 for tensor in state.values())


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_stage_on_the_cpu(base, tmp_path):
    """In float32 the first update's ratio is exactly 1, the second's is not, and stock diffusers loads the LoRA."""
    stage = run_stage(base, tmp_path, mixed_precision="no")
    check_trained(stage)
    first, second = [
        row["max_abs_log_ratio"]
        for row in map(json.loads, (stage.folder / "metrics" / "train.jsonl").read_text().splitlines())
        if row["event"] == "update"
    ]
    assert first == 0.0
    assert second > 0.0
    assert max(stage.peak_gb.values()) < 12

    pipeline = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float16, safety_checker=None)
    before = {name: parameter.clone() for name, parameter in pipeline.unet.mid_block.attentions.named_parameters()}
    pipeline.load_lora_weights(stage.lora)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    changed = [
        name
        for name, parameter in pipeline.unet.mid_block.attentions.named_parameters()
        if (parameter != before[name]).any()
    ]
    assert len(changed) == 8  # to_q, to_k, to_v and to_out.0 of its self- and its cross-attention, and nothing else


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stage_on_cuda(base, tmp_path, precision):
    """In half precision the first update's ratio is 1 within a tenth of the clip range."""
    stage = run_stage(base, tmp_path, mixed_precision=precision)
    check_trained(stage)
    manifest = stage.read("train.json")
    print(f"{precision}: max |log-ratio| at the first update {manifest['max_abs_log_ratio_first_update']:.2e}")
    print(f"{precision}: seconds { ({verb: stage.read(f'{verb}.json')['seconds'] for verb in VERBS}) }")
    assert manifest["device"].startswith("cuda")
    assert manifest["mixed_precision"] == precision
    assert manifest["max_abs_log_ratio_first_update"] <= 0.01
