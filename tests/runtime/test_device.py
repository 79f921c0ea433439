"""Device, precision and processes: what a run asks for is there, or is refused."""

from unittest import mock

import pytest
import torch
from conftest import distance, make_config, run_script, run_stage, snapshot, stage_of
from safetensors.torch import load_file

from b2diffurl.configuration.settings import read_settings
from b2diffurl.phases import sample, train
from b2diffurl.runtime import files
from b2diffurl.runtime.device import choose_device


def test_another_number_of_processes_than_asked_for_is_refused(overrides, tmp_path):
    """As where a launcher quietly starts one."""
    ended = run_script(tmp_path, "sample", overrides | {"num_processes": 2})
    assert ended.code == 2
    assert "num_processes is 2, but this run has 1" in ended.stderr
    assert not snapshot(tmp_path)


LORA_BOUND = 2e-2  # of a LoRA's update, relative: AdamW's first steps divide by gradients that are near 0


def test_a_precision_that_the_device_lacks(overrides, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GTX 1080")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(ValueError, match=r"bf16, which GTX 1080 lacks\. Use fp16, or no"):
        choose_device(read_settings(make_config(overrides | {"mixed_precision": "bf16"})).compute)


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_stage_within_rounding(finished, overrides, tmp_path, monkeypatch):
    """Latents as uncompiled, the first ratio within 1e-4 of 1, and
    nothing is compiled any more once a phase has begun."""
    compiled = torch._dynamo.utils.counters["stats"]
    warm_ups = {"sample": (sample, sample.warm_up), "train": (train, train.warm_up)}
    for verb, (owner, warm_up) in warm_ups.items():
        after = []
        monkeypatch.setattr(
            owner, "warm_up", lambda *a, to=after, do=warm_up: (do(*a), to.append(compiled["unique_graphs"]))
        )
        run_stage(tmp_path, overrides | {"compile": True}, verbs=(verb,) if verb == "sample" else ("select", "train"))
        assert after == [compiled["unique_graphs"]]
    for batch in range(3):
        mine, theirs = (load_file(stage_of(folder).batch(batch)) for folder in (tmp_path, finished))
        assert (mine["latents"] - theirs["latents"]).abs().max() < 1e-3
    assert stage_of(tmp_path).manifest("train")["max_abs_log_ratio_first_update"] < 1e-4


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(new_accelerator, overrides, tmp_path):
    """Same seed, float32 without TF32: latents within 1e-2, the same selection, the LoRA's update within 2 % of its norm,
    the first ratio within 1e-5 of 1."""
    settings = overrides | {"mixed_precision": "no", "allow_tf32": False, "reward.dtype": "float32"}
    folders = {device: tmp_path / device for device in ("cpu", "cuda")}
    for device, folder in folders.items():
        folder.mkdir()
        new_accelerator()
        with mock.patch("torch.cuda.is_available", return_value=device == "cuda"):
            run_stage(folder, settings)
        assert stage_of(folder).manifest("train")["device"].startswith(device)
    for batch in range(3):
        mine, theirs = (load_file(stage_of(folder).batch(batch)) for folder in folders.values())
        difference = (mine["latents"] - theirs["latents"]).abs().max()
        print(f"batch {batch}: latents differ by up to {difference:.1e}")
        assert difference < 1e-2
    chosen = [
        [(row["group"], row["branch"]) for row in files.read_json(stage_of(folder).selection)] for folder in folders.values()
    ]
    assert chosen[0] == chosen[1]
    assert distance(*folders.values()) < LORA_BOUND
    assert stage_of(folders["cuda"]).manifest("train")["max_abs_log_ratio_first_update"] < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_ratio_in_half_precision(new_accelerator, overrides, tmp_path, precision):
    run_stage(tmp_path, overrides | {"mixed_precision": precision})
    found = stage_of(tmp_path).manifest("train")["max_abs_log_ratio_first_update"]
    print(f"{precision}: max |log-ratio| at the first update {found:.1e}")
    assert found < 1e-2


@pytest.mark.gpu
def test_cuda_memory_does_not_grow_over_stages(new_accelerator, overrides, tmp_path):
    """Three stages of the same S in one process: what is allocated after the third is what was after the second."""
    settings = overrides | {"curriculum": "fixed", "stage_cnt": 3}
    allocated = []
    for index in range(3):
        run_stage(tmp_path, settings, index)
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[2] <= allocated[1] * 1.01 + 1e5
