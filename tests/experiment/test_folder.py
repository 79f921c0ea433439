"""Which checkpoint is meant: by name or by path, the newest finished stage, and never an altered one."""

import shutil

import pytest
from conftest import experiment, run_evaluation
from safetensors.torch import load_file, save_file

from b2diffurl.experiment.folder import checkpoint_name, resolve_checkpoint
from b2diffurl.experiment.stage import LORA_FILE, Stage, finished_stages


def test_an_altered_checkpoint_is_refused_by_path_too(workplace, overrides):
    lora = Stage(experiment(workplace), 1).checkpoints()[0] / LORA_FILE
    save_file({name: value + 1 for name, value in load_file(lora).items()}, lora)
    with pytest.raises(ValueError, match=r"checkpoint_1.*checksum"):
        run_evaluation(workplace, overrides, ["model/lora/tiny/stage1/checkpoints/checkpoint_1"])


def test_last_is_the_newest_finished_stage(workplace):
    """By number, not by name: stage10 comes after stage2. What is unfinished, or only looks like a stage, is none."""
    root = experiment(workplace)
    for name in ("stage2", "stage10", "stage9_backup", "stage11"):
        shutil.copytree(root / "stage1", root / name)
    (root / "stage11" / "train.json").unlink()
    assert [stage.index for stage in finished_stages(root, "train")] == [0, 1, 2, 10]
    assert resolve_checkpoint(root, "last").is_relative_to(root / "stage10")


def test_a_checkpoint_inside_a_stage_goes_by_the_name_it_has_in_results(workplace, overrides):
    """It is that one, and a stage's last is the stage; one of a finished stage must be what the stage wrote, one of an
    interrupted stage is taken, and of one that is not there those that are are named."""
    root = experiment(workplace)
    first, last = (folder / LORA_FILE for folder in Stage(root, 0).checkpoints())
    for name, lora, found in (
        ("stage0/checkpoint_1", first, "stage0/checkpoint_1"),
        ("stage0/checkpoint_2", last, "stage0"),
    ):
        assert resolve_checkpoint(root, name) == lora
        assert checkpoint_name(root, lora) == found
    (result,) = run_evaluation(workplace, overrides, ["stage0/checkpoint_1"])
    assert (result["checkpoint"], result["stage"]) == ("stage0/checkpoint_1", 0)
    said = (
        r"no checkpoint 'stage0/checkpoint_7': there are stage0/checkpoint_1, stage0/checkpoint_2\. Experiments in .*: tiny"
    )
    with pytest.raises(FileNotFoundError, match=said):
        resolve_checkpoint(root, "stage0/checkpoint_7")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'stage7/checkpoint_1': trained are stage0, stage1"):
        resolve_checkpoint(root, "stage7/checkpoint_1")
    save_file({name: value + 1 for name, value in load_file(first).items()}, first)
    with pytest.raises(ValueError, match=r"checkpoint_1.*checksum"):
        resolve_checkpoint(root, "stage0/checkpoint_1")
    Stage(root, 0).manifest_path("train").unlink()
    assert resolve_checkpoint(root, "stage0/checkpoint_1") == first
