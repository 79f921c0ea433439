"""What a process finds around it changes no result: it is set, refused or recorded."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, assert_refused, assert_same, forget, refuse, run_script, run_stage, script_arguments, stage_of

from b2diffurl.runtime import ambient, device


def test_gradients_are_not_divided_by_a_variable(workplace, finished, overrides, new_accelerator, monkeypatch):
    """accelerate would divide each by 4; the LoRA and its optimizer have the same bits as without it."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    forget(workplace, "train")
    run_stage(workplace, overrides, verbs=["train"])
    assert_same(stage_of(workplace).folder / "checkpoints", stage_of(finished).folder / "checkpoints")


@pytest.mark.parametrize(
    ("name", "value", "harmless"),
    [
        *(
            (f"ACCELERATE_USE_{plugin}", "True", "false")
            for plugin in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
        ),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "NO"),
        ("NVIDIA_TF32_OVERRIDE", "0", ""),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16", "STRICT"),
        ("DNNL_DEFAULT_FPMATH_MODE", "ANY", "strict"),
    ],
)
def test_what_a_setting_says_no_variable_says(overrides, tmp_path, monkeypatch, name, value, harmless):
    """Two lines with its name, and nothing is written; the value that a launcher sets for `not wanted` passes."""
    monkeypatch.setenv(name, value)
    assert_refused(run_script(tmp_path, "sample", overrides), f"{name} is '{value}'")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(name, harmless)
    ambient.require_usable()


ONE, TWO = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "left",
    [
        {"RANK": "1", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        ONE | {"RANK": "1"},
        ONE | {"RANK": "-1"},
        ONE | {"RANK": "one"},
        ONE | {"LOCAL_RANK": "1"},
        ONE | {"WORLD_SIZE": "0"},
        ONE | {"WORLD_SIZE": "2"},  # nowhere to meet
        {"RANK": "1"},
        {"LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "4"},
    ],
)
def test_what_is_left_of_another_launcher_is_refused(overrides, tmp_path, monkeypatch, left):
    """Before anything is written, the log too; else a process would take itself for the second one, without a lock."""
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    refuse(tmp_path, "sample", overrides, min(left))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("whole", [{}, ONE, ONE | TWO | {"WORLD_SIZE": "2"}, TWO, {"OMPI_COMM_WORLD_SIZE": "1"}])
def test_what_torchrun_says_passes(monkeypatch, whole):
    for name, value in whole.items():
        monkeypatch.setenv(name, value)
    ambient.require_usable()


def test_without_docstrings_nothing_is_begun(overrides, tmp_path):
    """transformers reads its own."""
    argv = script_arguments("sample", overrides)
    command = [sys.executable, "-OO", ROOT / argv[0], *argv[1:]]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 2)
    assert "PYTHONOPTIMIZE" in ended.stderr


@pytest.mark.long
@pytest.mark.parametrize("command", ["export", "report"])
def test_other_commands_refuse_it_too(command):
    ended = subprocess.run(
        [sys.executable, "-OO", "-m", f"b2diffurl.{command}", "tiny"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 2)
    assert ended.stderr.startswith(f"error: {command}: PYTHONOPTIMIZE is 2")


def test_warnings_are_no_errors(monkeypatch):
    """As with PYTHONWARNINGS=error, where a library's deprecation would end the run."""
    monkeypatch.setattr(sys, "warnoptions", ["error::DeprecationWarning"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("error")
        ambient.calm_warnings()
        warnings.warn("soon gone", DeprecationWarning, stacklevel=1)
    assert len(said) == 1


def test_onnxruntime_reports_nothing(empty, monkeypatch):
    """Every script sees to it, before a library that imports onnxruntime; what the user has set stays."""
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    assert run_script(empty, "sample", {"stage_cnt": -1}).code == 2
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    ambient.refuse_telemetry()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"


def test_variables_that_choose_kernels_are_recorded(workplace, overrides, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    forget(workplace, "train")
    assert run_script(workplace, "train", overrides).code == 0
    found = json.loads(stage_of(workplace).manifest_path("train").read_text())["environment"]
    assert found["OMP_NUM_THREADS"] == "3"
    assert found.keys() <= set(ambient.RECORDED)


def test_torch_s_defaults_are_set(workplace, finished, overrides):
    """A configuration file, or a module that it imports, may have changed them: the same bits."""
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_float32_matmul_precision("medium")
        forget(workplace, "sample")
        run_stage(workplace, overrides, verbs=["sample"])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.set_float32_matmul_precision("highest")
    assert_same(stage_of(workplace).folder / "samples", stage_of(finished).folder / "samples")


def test_another_device_than_chosen_is_refused(overrides, monkeypatch, new_accelerator):
    """ACCELERATE_USE_CPU on a machine with a GPU: here accelerate finds none where one was chosen."""
    from conftest import make_config, settings_at

    monkeypatch.setattr(device, "choose_device", lambda compute: (True, "no"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    compute = settings_at(make_config(overrides), ROOT).compute
    with pytest.raises(ValueError, match="accelerate chose cpu, by ACCELERATE_USE_CPU"):
        device.make_accelerator(compute)
