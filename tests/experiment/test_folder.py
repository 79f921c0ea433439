"""Which checkpoint is meant: by name or by path, the newest finished stage, and never an altered one."""

import shutil

import pytest
from conftest import experiment, plan, run_evaluation
from safetensors.torch import load_file, save_file

from b2diffurl.experiment.folder import checkpoint_name, resolve_checkpoint
from b2diffurl.experiment.stage import LORA_FILE, Stage, finished_stages
from b2diffurl.experiment.stage_table import stage_rows
from b2diffurl.runtime.files import read_json, write_record
from b2diffurl.runtime.logs import logger


def test_an_altered_checkpoint_is_refused_by_path_too(workplace, overrides):
    lora = Stage(experiment(workplace), 1).checkpoints()[0] / LORA_FILE
    save_file({name: value + 1 for name, value in load_file(lora).items()}, lora)
    with pytest.raises(ValueError, match=r"checkpoint_1.*checksum"):
        run_evaluation(workplace, overrides, ["model/lora/tiny/stage1/checkpoints/checkpoint_1"])


def test_last_is_the_newest_finished_stage(workplace):
    """By number, not by name: stage10 comes after stage2. What is unfinished, or only looks like a stage, is none."""
    root = experiment(workplace)
    for name in ("stage2", "stage10", "stage9_backup", "stage11", "stage01"):
        shutil.copytree(root / "stage1", root / name)
    (root / "stage11" / "train.json").unlink()
    for index in (2, 10):
        path = root / f"stage{index}" / "train.json"
        write_record(path, read_json(path) | {"stage": index})
    assert [stage.index for stage in finished_stages(root, "train")] == [0, 1, 2, 10]
    assert resolve_checkpoint(root, "last").is_relative_to(root / "stage10")


def test_a_copy_of_a_stage_or_of_a_checkpoint_is_none(workplace, overrides, caplog, monkeypatch):
    """A folder's number is its manifest's: a copy is neither counted nor the last, the log names it, and a phase of that
    number is refused. Of a finished stage's checkpoints those count that its manifest lists."""
    monkeypatch.setattr(logger, "propagate", True)
    root = experiment(workplace)
    before = stage_rows(root)
    for name in ("stage01", "stage5"):
        shutil.copytree(root / "stage1", root / name)
    for name in ("checkpoint_01", "checkpoint_7"):
        shutil.copytree(root / "stage1/checkpoints/checkpoint_1", root / "stage1/checkpoints" / name)
    assert [stage.index for stage in finished_stages(root, "select")] == [0, 1]
    assert resolve_checkpoint(root, "last") == root / "stage1/checkpoints/checkpoint_2" / LORA_FILE
    assert stage_rows(root) == before
    assert "stage5 is left out: it is a copy of stage 1" in caplog.text
    assert "stage01" not in caplog.text  # which is no stage's name
    with pytest.raises(ValueError, match=r"stage5/sample\.json is the record of stage 1: .*stage5 is a copy .* Move"):
        plan(workplace, overrides, run_name="stage5", stage_cnt=9)


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
