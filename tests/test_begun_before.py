"""An experiment that an earlier version began goes on: its records, checkpoint, scores and evaluations are kept."""

import json
import zipfile

import pytest
import tiny
from conftest import ROOT, run_script, snapshot
from recorded.make import PROMPTS, SETTINGS


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A folder in which the recorded experiment was gone on with to its end; and its files before that."""
    folder = tmp_path_factory.mktemp("begun")
    tiny.exact_stable_diffusion(folder / "base")
    (folder / "prompts.txt").write_text(PROMPTS)
    root = folder / "model" / "lora" / "begun"
    with zipfile.ZipFile(ROOT / "tests" / "recorded" / "begun.zip") as archive:
        archive.extractall(root)
    before = snapshot(root)
    places = {"pretrained.model": "base", "prompt_file": "prompts.txt", "eval.prompt_file": "prompts.txt"}
    said = ""
    for script, *more in (("sample",), ("select",), ("train",), ("eval", "--due")):
        ended = run_script(folder, script, SETTINGS | places | {"run_name": "stage1"}, *more)
        assert ended.code == 0, ended.stderr
        said += ended.stdout
    return root, before, said


def test_the_second_stage_follows_the_recorded_first_one(resumed):
    root, _, said = resumed
    assert "from stage0/checkpoint_1" in said
    manifest = json.loads((root / "stage1" / "select.json").read_text())
    assert manifest["num_history"] == 12  # all of stage 0's images
    assert json.loads((root / "stage1" / "train.json").read_text())["num_updates"] > 0


def test_what_was_recorded_is_left_as_it_was(resumed):
    root, before, _ = resumed
    now = snapshot(root)
    changed = [name for name in before if now[name] != before[name]]
    assert changed == ["config.json", "eval.jsonl"]  # the second gets the rows of stage 1
    old, new = (json.loads(content) for content in (before["config.json"], now["config.json"]))
    added = {"base_model", "content_sha256"}  # and the first, which had none, what the base model is
    assert {key: value for key, value in new.items() if key not in added} == {
        key: value for key, value in old.items() if key not in added
    }
    assert set(new["base_model"]) == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert set(before["eval.jsonl"].splitlines()) <= set(now["eval.jsonl"].splitlines())


def test_the_base_is_judged_again_because_its_record_does_not_say_by_which_decoder(resumed):
    """The old evaluation, known by its UNet alone, stays on disk. Stage 1 is compared with the new one."""
    root, _, said = resumed
    assert "eval base on test prompts, training sampler: 4 images" in said
    assert len(list((root / "eval").glob("base_test_*"))) == 2
    rows = [json.loads(line) for line in (root / "eval.jsonl").read_text().splitlines()]
    conditions = {row["checkpoint"]: row["conditions"] for row in rows}  # the last row of each
    assert conditions["base"] == conditions["stage1"]
