"""Where a stage starts from: the last checkpoint before it, or the one that is named."""

import contextlib
from dataclasses import replace

import pytest
from conftest import experiment, plan

from b2diffurl.configuration.plan import Plan
from b2diffurl.experiment.folder import find_lora
from b2diffurl.experiment.stage import LORA_FILE
from b2diffurl.reporting import dry_run
from b2diffurl.runtime import files


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
    """An outside LoRA starts stage 0, and a lone later stage; an experiment that began otherwise is refused, for its
    predecessor would be taken. A checkpoint of the experiment itself is taken wherever it is named."""
    outside = tmp_path / "outside.safetensors"
    outside.touch()
    assert plan(tmp_path, overrides, resume_from=str(outside)).resume_from == outside
    assert plan(tmp_path, overrides, run_name="stage7", stage_cnt=9, resume_from=str(outside)).resume_from == outside
    for stage in ("stage0", "stage1"):
        with pytest.raises(ValueError, match="began from a fresh LoRA, and goes on from its own"):
            plan(finished, overrides, run_name=stage, resume_from=str(outside))
    inside = experiment(finished) / "stage0" / "checkpoints" / "checkpoint_1"
    assert plan(finished, overrides, run_name="stage1", resume_from=str(inside)).resume_from == inside / LORA_FILE


def test_a_stage_without_its_predecessor_is_refused(workplace, overrides, tmp_path):
    """No stage before it, or one that is not trained to its end: the error names the stage that is missing."""
    with pytest.raises(ValueError, match=r"stage4.*not trained yet"):
        plan(workplace, overrides, run_name="stage5", stage_cnt=9)
    (experiment(workplace) / "stage1" / "train.json").unlink()
    with pytest.raises(ValueError, match=r"stage1, which is not trained"):
        plan(workplace, overrides, run_name="stage2", stage_cnt=9)
    (tmp_path / "outside.safetensors").touch()
    with pytest.raises(ValueError, match="began from a fresh LoRA"):  # nor does another LoRA stand in for it
        plan(workplace, overrides, run_name="stage2", stage_cnt=9, resume_from=str(tmp_path / "outside.safetensors"))


def test_pickled_or_missing_weights_are_no_lora(tmp_path):
    """A .pt file is refused by name, a folder without a LoRA is said to have none."""
    (tmp_path / "lora.pt").touch()
    with pytest.raises(ValueError, match="never loaded"):
        find_lora(tmp_path / "lora.pt")
    with pytest.raises(FileNotFoundError, match="no LoRA at"):
        find_lora(tmp_path)


def start_text(folder, plan: Plan) -> str:
    with contextlib.chdir(folder):
        return dry_run.start_text(plan)


def test_the_same_command_goes_on_and_the_dry_run_says_from_where(workplace, overrides, tmp_path):
    """resume_from is what the experiment began with, perhaps a copy of it: it has no effect any more, and is said to have
    none. A checkpoint of the last stage is chosen by it."""
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"a LoRA")
    path = experiment(workplace) / "stage0" / "sample.json"
    manifest = files.read_json(path)
    manifest["policy"]["lora_sha256"] = files.sha256(outside)
    files.write_record(path, manifest)
    assert start_text(tmp_path, plan(tmp_path, overrides, resume_from=str(outside))) == str(outside)
    begun = plan(workplace, overrides, run_name="stage1", resume_from=str(outside))
    assert begun.start == "stage0/checkpoint_2"
    said = "stage1/checkpoint_2; resume_from has no effect, the experiment has begun"
    assert start_text(workplace, begun) == said
    assert start_text(workplace, plan(workplace, overrides, run_name="stage1")) == "stage1/checkpoint_2"
    chosen = experiment(workplace) / "stage1" / "checkpoints" / "checkpoint_1"
    assert start_text(workplace, plan(workplace, overrides, resume_from=str(chosen))) == "stage1/checkpoint_1"
    outside.write_bytes(b"another LoRA")
    with pytest.raises(ValueError, match="began from another LoRA"):
        plan(workplace, overrides, resume_from=str(outside))


def test_a_lora_from_elsewhere_is_named_by_its_file(finished, overrides, tmp_path):
    """Not by its folder, which may have dozens; the experiment's own checkpoints have names."""
    one = plan(finished, overrides, run_name="stage1")
    assert one.start == "stage0/checkpoint_2"
    for name in ("loras/red.safetensors", f"other/stage0/checkpoints/checkpoint_1/{LORA_FILE}"):
        assert replace(one, resume_from=tmp_path / name).start == str(tmp_path / name)
