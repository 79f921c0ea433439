"""What a stage was made from is recorded, and compared when it is gone on with or found finished."""

import shutil

import pytest
from conftest import experiment, make_config, run_stage, run_verb, stage_of, unfinish

from b2diffurl.experiment.checkpoints import read_state
from b2diffurl.experiment.origin import history_stages, require_origin, require_scales
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.runtime.files import describe, read_json, sha256, write_bytes, write_record


def rewrite(stage: Stage, phase: str, changed: dict) -> None:
    """Change entries of a manifest."""
    write_record(stage.manifest_path(phase), read_json(stage.manifest_path(phase)) | changed)


def made_anew(stage: Stage, phase: str, name: str, data: bytes | None = None) -> None:
    """As if `phase` had been done again, and had written another file `name`."""
    write_bytes(stage.folder / name, data or (stage.folder / name).read_bytes() + b" ")
    described = stage.manifest(phase)["files"] | {name: describe(stage.folder / name)}
    rewrite(stage, phase, {"files": described})


def test_what_a_stage_was_made_from_is_recorded(finished):
    one, two = stage_of(finished), stage_of(finished, 1)
    assert two.manifest("sample")["policy"]["lora_sha256"] == sha256(one.checkpoints()[-1] / LORA_FILE)
    assert one.manifest("select")["made_from"]["history"] == {}
    assert two.manifest("select")["made_from"]["history"] == {"stage0": sha256(one.scores)}
    assert two.manifest("train")["made_from"] == {"selection": sha256(two.selection)}
    for stage in (one, two):
        require_origin(stage)


@pytest.mark.parametrize("verb", ["sample", "select", "train"])
def test_a_stage_of_an_older_lora_is_not_finished(workplace, overrides, verb):
    """Stage 0 is deleted and made again with another rate: no phase of stage 1 says that it is finished."""
    shutil.rmtree(stage_of(workplace).folder)
    other = overrides | {"train.learning_rate": 2e-2, "allow_config_change": True}
    run_stage(workplace, other)
    before = {path: path.read_bytes() for path in stage_of(workplace, 1).folder.rglob("*") if path.is_file()}
    said = r"stage1 was made from the LoRA \(SHA-256 \w{12}…\), but .*stage0 now has .* Put back the old .*stage0, or delete"
    with pytest.raises(ValueError, match=said):
        run_verb(workplace, make_config(other, run_name="stage1"), verb)
    assert {path: path.read_bytes() for path in stage_of(workplace, 1).folder.rglob("*") if path.is_file()} == before


def test_another_checkpoint_of_the_stage_before_is_a_legitimate_start(workplace):
    """resume_from chooses among them."""
    one, two = stage_of(workplace), stage_of(workplace, 1)
    earlier = sha256(one.checkpoints()[0] / LORA_FILE)
    for phase in ("sample", "train"):
        rewrite(two, phase, {"policy": two.manifest(phase)["policy"] | {"lora_sha256": earlier}})
    require_origin(two)


@pytest.mark.parametrize(
    ("index", "phase", "name", "said"),
    [
        (1, "sample", "images/00003.png", r"stage1 was made from the images \(SHA.*\), but there are now \(SHA.*images, or"),
        (1, "sample", "prompts.json", "stage1 was made from the images"),
        (0, "select", "scores.jsonl", r"stage1 was made from the scores \(SHA.*\) of stage0, but stage0 now has \(SHA"),
        (1, "select", "selection.json", r"stage1 was made from the selection \(SHA.*\), but there is now \(SHA"),
    ],
)
def test_a_phase_whose_source_was_made_anew_is_refused(workplace, index, phase, name, said):
    made_anew(stage_of(workplace, index), phase, name)
    with pytest.raises(ValueError, match=said):
        require_origin(stage_of(workplace, 1))


def test_samples_of_another_policy_than_was_trained_are_refused(workplace):
    stage = stage_of(workplace)
    rewrite(stage, "sample", {"policy": stage.manifest("sample")["policy"] | {"base_model_sha256": "other"}})
    with pytest.raises(ValueError, match=r"stage0 was made from samples of .*there are now those of .*other"):
        require_origin(stage)


def test_other_scales_of_a_mixture_are_refused(workplace):
    rewrite(stage_of(workplace), "select", {"scales": {"clip": [0.0, 2.0]}})
    rewrite(stage_of(workplace, 1), "select", {"scales": {"clip": [0.0, 1.0]}})
    with pytest.raises(ValueError, match=r"stage1 was made from the scales .*1\.0.*, but stage0 now has .*2\.0"):
        require_origin(stage_of(workplace, 1))


def test_records_of_earlier_versions_say_less_and_pass(workplace):
    for index in (0, 1):
        stage = stage_of(workplace, index)
        for phase in ("select", "train"):
            manifest = read_json(stage.manifest_path(phase))
            del manifest["made_from"]
            write_record(stage.manifest_path(phase), manifest)
    made_anew(stage_of(workplace), "select", "scores.jsonl")
    require_origin(stage_of(workplace, 1))


# ---- history ----


@pytest.mark.parametrize("verb", ["sample", "select"])
def test_a_stage_without_its_history_is_refused(workplace, overrides, verb):
    """Once normalised by its own scores alone, without a word."""
    unfinish(workplace, verb)
    stage_of(workplace).manifest_path("select").unlink()
    with pytest.raises(ValueError, match=r"stage1 needs the scores of .*stage0, which has no select\.json.* run_select"):
        run_verb(workplace, make_config(overrides, run_name="stage1"), verb)


def test_history_has_no_holes(workplace):
    """A stage that the experiment has gone through is missed, by its neighbours or by the record of the stage before; one
    before the experiment's first stage is not."""
    root = experiment(workplace)
    assert [one.index for one in history_stages(Stage(root, 2), 8)] == [0, 1]
    assert [one.index for one in history_stages(Stage(root, 2), 1)] == [1]
    with pytest.raises(ValueError, match=r"stage5 needs the scores of .*stage2"):
        history_stages(Stage(root, 5), 8)
    assert history_stages(Stage(root, 5), 0) == []
    shutil.move(root / "stage0", workplace / "elsewhere")
    with pytest.raises(ValueError, match=r"stage2 needs the scores of .*stage0"):
        history_stages(Stage(root, 2), 8)
    rewrite(Stage(root, 1), "select", {"made_from": {}})  # an experiment that began with stage 1
    assert [one.index for one in history_stages(Stage(root, 2), 8)] == [1]


def test_scales_are_not_measured_a_second_time(workplace):
    root = experiment(workplace)
    for index in (0, 1):
        stage_of(workplace, index).manifest_path("select").unlink()
    require_scales(Stage(root, 0))
    with pytest.raises(ValueError, match=r"stage1 standardises rewards .* Put back that of .*stage0"):
        require_scales(Stage(root, 1))


def test_an_interrupted_training_does_not_go_on_with_another_selection(workplace, overrides):
    stage = unfinish(workplace, "train")
    shutil.rmtree(stage.checkpoint(2))
    assert read_state(stage.checkpoint(1) / LORA_FILE)["selection_sha256"] == sha256(stage.selection)
    made_anew(stage, "select", "selection.json")
    with pytest.raises(ValueError, match=r"checkpoint_1 was trained on another selection than .*selection\.json"):
        run_verb(workplace, make_config(overrides, run_name="stage1"), "train")
