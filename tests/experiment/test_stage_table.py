"""An experiment's stages as rows."""

import json

import numpy as np
import pytest
from conftest import stage_of

from b2diffurl.experiment.metrics import read_events
from b2diffurl.experiment.stage import LORA_FILE, NOTED, PHASES, Stage
from b2diffurl.experiment.stage_table import per_step_rows, stage_list, stage_rows, updates_before
from b2diffurl.phases.health import WINDOW
from b2diffurl.runtime.files import read_json, read_json_lines


def test_stage_rows_are_what_the_files_say(root):
    one, two = stage_rows(root)
    assert (one["queries"], two["queries"]) == (18, 36)
    assert (one["num_trained_steps"], two["num_trained_steps"]) == (2, 3)
    for row, stage in zip((one, two), (Stage(root, 0), Stage(root, 1)), strict=True):
        rewards = np.array([score["reward"] for score in read_json_lines(stage.scores)])
        assert row["reward_mean"] == pytest.approx(rewards.mean())
        assert row["reward_std"] == pytest.approx(rewards.std(ddof=1))
        updates = read_events(stage.metrics("train"), "update")
        assert row["num_updates"] == len(updates) > 1
        assert row["clip_fraction"] == pytest.approx(np.mean([update["clip_fraction"] for update in updates]))
        assert row["grad_norm"] == pytest.approx(np.mean([update["grad_norm"] for update in updates]))
        assert row["max_abs_log_ratio_first"] == updates[0]["max_abs_log_ratio"]
        assert row["seconds/train/train"] == read_json(stage.manifest_path("train"))["seconds"]["train"]
        columns = np.mean([update["log_ratio_per_step"] for update in updates], axis=0)
        assert list(per_step_rows(root, "log_ratio_per_step")[stage.index].values()) == pytest.approx(columns)
    assert list(per_step_rows(root, "log_ratio_per_step")[1]) == read_events(Stage(root, 1).metrics("train"))[0]["timesteps"]


def test_updates_before_a_stage_are_the_latest_of_the_stages_before(finished):
    one = read_events(stage_of(finished).metrics("train"), "update")
    two = read_events(stage_of(finished, 1).metrics("train"), "update")
    assert updates_before(stage_of(finished, 2), WINDOW) == one + two
    assert updates_before(stage_of(finished, 2), len(two) + 1) == [one[-1], *two]
    assert updates_before(stage_of(finished, 0), WINDOW) == []


def test_what_is_noted_of_a_manifest_is_what_it_says(root):
    """All but the files, also of a manifest that was written in another form; and anew once the file is another."""
    stage = Stage(root, 0)
    for phase in PHASES:
        whole = stage.manifest(phase)
        assert stage.head(phase) == {key: whole[key] for key in whole if key != "files"}
        wanted = {key: whole[key] for key in whole if key in NOTED}
        steps = {"settings": {"sample.num_steps": 4}} if phase == "sample" else {}
        assert stage.noted(phase) == wanted | steps
    assert stage.loras() == {name: one["sha256"] for name, one in whole["files"].items() if name.endswith(LORA_FILE)}
    whole["warnings"] = [{"kind": "Log-ratio"}]
    stage.manifest_path("train").write_text(json.dumps(whole))  # in one line, without a checksum
    assert stage.noted("train")["warnings"] == whole["warnings"]
    stage.manifest_path("train").write_bytes(b'{"phase": "train", "stage": 0, "war')
    with pytest.raises(ValueError, match=r"train\.json is damaged"):
        stage.noted("train")


def test_many_stages_are_named_by_the_first_and_the_last():
    """So that a line of the log does not grow with the run."""
    assert stage_list([7, 2, 5, 6, 8]) == "stages 2, 5-8"
    every_other = stage_list(range(0, 1000, 2))
    assert every_other.startswith("stages 0, 2, 4,")
    assert every_other.endswith(", …, 998 (500 in all)")
    assert len(every_other) < 100
