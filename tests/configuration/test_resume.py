"""Where a stage starts from: the last checkpoint before it, or the one that is named."""

import pytest
from conftest import experiment, plan

from b2diffurl.experiment.folder import find_lora
from b2diffurl.experiment.stage import LORA_FILE


def test_a_stage_goes_on_from_the_last_checkpoint_before_it(finished, overrides):
    """Stage 0 starts fresh, stage 1 from stage 0's newest checkpoint, stage 2 from stage 1's."""
    assert plan(finished, overrides, run_name="stage0").resume_from is None
    for stage in (1, 2):
        source = plan(finished, overrides, run_name=f"stage{stage}", stage_cnt=3).resume_from
        assert finished / source == experiment(finished) / f"stage{stage - 1}" / "checkpoints" / "checkpoint_2" / LORA_FILE


def test_checkpoints_are_ordered_by_number(tmp_path):
    """checkpoint_10 comes after checkpoint_9; unfinished folders and other names are no checkpoints."""
    for name in ("checkpoint_9", "checkpoint_10", "checkpoint_11.tmp", "checkpoint_x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / LORA_FILE).touch()
    (tmp_path / "checkpoints" / "checkpoint_12").mkdir()
    expected = tmp_path / "checkpoints" / "checkpoint_10" / LORA_FILE
    for given in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "checkpoint_10", expected):
        assert find_lora(given) == expected


def test_resume_from_is_where_a_run_starts(finished, overrides, tmp_path):
    """An outside LoRA starts stage 0, and a lone later stage; it does not displace a predecessor that is there. A
    checkpoint of the experiment itself is taken wherever it is named."""
    outside = tmp_path / "outside.safetensors"
    outside.touch()
    assert plan(tmp_path, overrides, resume_from=str(outside)).resume_from == outside
    assert plan(tmp_path, overrides, run_name="stage7", stage_cnt=9, resume_from=str(outside)).resume_from == outside
    kept = plan(finished, overrides, run_name="stage1", resume_from=str(outside)).resume_from
    assert kept.parts[-3:] == ("checkpoints", "checkpoint_2", LORA_FILE)
    inside = experiment(finished) / "stage0" / "checkpoints" / "checkpoint_1"
    assert plan(finished, overrides, run_name="stage1", resume_from=str(inside)).resume_from == inside / LORA_FILE


def test_a_stage_without_its_predecessor_is_refused(workplace, overrides, tmp_path):
    """No stage before it, or one that is not trained to its end: the error names the stage that is missing."""
    with pytest.raises(ValueError, match=r"stage4.*not trained yet"):
        plan(workplace, overrides, run_name="stage5", stage_cnt=9)
    (experiment(workplace) / "stage1" / "train.json").unlink()
    (tmp_path / "outside.safetensors").touch()
    for more in ({}, {"resume_from": str(tmp_path / "outside.safetensors")}):
        with pytest.raises(ValueError, match=r"stage1, which is not trained"):
            plan(workplace, overrides, run_name="stage2", stage_cnt=9, **more)


def test_pickled_or_missing_weights_are_no_lora(tmp_path):
    """A .pt file is refused by name, a folder without a LoRA is said to have none."""
    (tmp_path / "lora.pt").touch()
    with pytest.raises(ValueError, match="never loaded"):
        find_lora(tmp_path / "lora.pt")
    with pytest.raises(FileNotFoundError, match="no LoRA at"):
        find_lora(tmp_path)
