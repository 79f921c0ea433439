"""The table of evaluations: what makes a curve, and what a row says."""

from pathlib import Path

import pytest
from conftest import experiment, run_evaluation
from safetensors.torch import load_file, save_file

from b2diffurl.configuration.settings import read_settings
from b2diffurl.evaluation.generate import SamplerSettings, deployed_sampler
from b2diffurl.experiment.evaluation_table import (
    describe_sampler,
    drop_images,
    evaluation_rows,
    every_evaluation,
    identity,
    lora_sha256,
    record,
)
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.runtime.files import describe, read_json_lines, write_bytes, write_record


def test_an_earlier_difference_stays_when_the_base_is_not_asked_for(workplace, overrides):
    run_evaluation(workplace, overrides, ["base", "last"])
    path = experiment(workplace) / "eval.jsonl"
    before = {row["checkpoint"]: row for row in read_json_lines(path)}
    run_evaluation(workplace, overrides, ["last"])
    rows = read_json_lines(path)
    assert {row["checkpoint"]: row for row in rows} == before
    assert rows[-1]["checkpoint"] == "stage1"
    assert rows[-1]["reward_gain"] != 0


def test_only_rows_that_can_be_compared_make_a_curve(workplace, overrides):
    """Rows of another number of images are other conditions: readers get the longest curve, of equals the newest. What was
    judged inside a stage is no part of it."""
    root = experiment(workplace)
    run_evaluation(workplace, overrides, ["base", "stage1"])
    run_evaluation(workplace, overrides, ["base", "stage1"], **{"eval.num_images": 3})
    assert [(row["checkpoint"], row["n_images"], row["queries"]) for row in evaluation_rows(root)] == [
        ("base", 3, 0),
        ("stage1", 3, 36),
    ]
    run_evaluation(workplace, overrides, ["stage0", "model/lora/tiny/stage1/checkpoints/checkpoint_1"])
    run_evaluation(workplace, overrides, ["base", "stage1"], **{"eval.num_images": 3})
    names = [row["checkpoint"] for row in read_json_lines(root / "eval.jsonl")]
    assert sorted(names) == ["base", "base", "stage0", "stage1", "stage1", "stage1/checkpoint_1"]
    rows = evaluation_rows(root, prompts="test", sampler="training")
    assert [(row["checkpoint"], row["n_images"], row["queries"]) for row in rows] == [
        ("base", 6, 0),
        ("stage0", 6, 18),
        ("stage1", 6, 36),
    ]
    assert evaluation_rows(root, prompts="train") == []


def test_a_checkpoint_that_was_made_anew_has_no_evaluation_yet(workplace, overrides):
    """Stage 1 is trained again and differs: its old evaluation stays on disk, but is neither in the curve nor in a table."""
    root = experiment(workplace)
    run_evaluation(workplace, overrides, ["base", "stage1"])
    lora = Stage(root, 1).checkpoints()[-1] / LORA_FILE
    save_file({name: value + 1 for name, value in load_file(lora).items()}, lora)
    manifest = Stage(root, 1).manifest("train")
    manifest["files"][str(lora.relative_to(root / "stage1"))] = describe(lora)
    write_record(Stage(root, 1).manifest_path("train"), manifest)
    assert [row["checkpoint"] for row in evaluation_rows(root)] == ["base"]
    assert [row["checkpoint"] for row in every_evaluation(root)] == ["base"]
    assert [row["checkpoint"] for row in read_json_lines(root / "eval.jsonl")] == ["base", "stage1"]
    Stage(root, 1).manifest_path("train").unlink()  # in the middle of its training a checkpoint is known by its own record
    assert [row["checkpoint"] for row in evaluation_rows(root)] == ["base", "stage1"]
    (lora.parent / "state.json").unlink()
    assert [row["checkpoint"] for row in evaluation_rows(root)] == ["base"]


def test_only_schedulers_that_have_an_eta_are_said_to(config):
    """DDIM is; Euler's ancestral one is stochastic without."""
    assert (
        describe_sampler(row_of(deployed_sampler(read_settings(config))))
        == "deployed sampler: DDIM, 6 steps, eta 0, guidance 5"
    )
    config.eval.deployed.scheduler = "EulerAncestralDiscrete"
    said = describe_sampler(row_of(deployed_sampler(read_settings(config))))
    assert said == "deployed sampler: EulerAncestralDiscrete, 6 steps, guidance 5"


def row_of(settings: SamplerSettings) -> dict:
    return {"sampler": "deployed"} | vars(settings)


# ---- images that stay ----


def with_images(root: Path, accuracies: list[float | None], rewards: list[float]) -> list[str]:
    """Evaluations of the base and of stages 0, 1, …, each with two pictures; returns their folders."""
    rows = []
    for n, (accuracy, reward) in enumerate(zip(accuracies, rewards, strict=True)):
        stage = n - 1 if n else None
        lora = f"stage{stage}/checkpoints/checkpoint_1/lora" if n else ""
        row = {"checkpoint": f"stage{stage}" if n else "base", "stage": stage, "lora": lora, "prompts": "test"}
        row |= {"sampler": "training", "conditions": "c", "accuracy": accuracy, "reward": reward}
        row["folder"] = f"eval/{row['checkpoint']}_test_{identity('c', lora_sha256(root, stage, lora) if n else '')}"
        for image in range(2):
            write_bytes(root / row["folder"] / f"{image:05d}.png", b"")
        write_bytes(root / row["folder"] / "result.json", b"{}")
        rows.append(row)
    record(root, rows)
    return [row["folder"] for row in rows]


def those_with_images(root: Path, folders: list[str]) -> list[int]:
    return [n for n, folder in enumerate(folders) if list((root / folder).glob("*.png"))]


@pytest.mark.parametrize(
    ("kept", "accuracies", "expected"),
    [
        (1, [0.5, 0.6, 0.9, 0.7, 0.8, 0.4], [0, 2, 5]),  # base, best by accuracy, newest
        (2, [0.5, 0.6, 0.9, 0.7, 0.8, 0.4], [0, 2, 4, 5]),
        (1, [None] * 6, [0, 3, 5]),  # best by reward
        (-1, [None] * 6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_images_of_old_evaluations_go_and_their_figures_stay(tmp_path, kept, accuracies, expected):
    folders = with_images(tmp_path, accuracies, [0.0, 0.1, 0.2, 0.9, 0.3, 0.4])
    before = every_evaluation(tmp_path)
    drop_images(tmp_path, kept, ())
    assert those_with_images(tmp_path, folders) == expected
    assert every_evaluation(tmp_path) == before
    assert all((tmp_path / folder / "result.json").is_file() for folder in folders)


def test_what_was_just_judged_and_what_lies_elsewhere_stays(tmp_path):
    """A link in eval/ may lead anywhere, and a row may have been made up."""
    root, outside = tmp_path / "one", tmp_path / "outside"
    folders = with_images(root, [None] * 5, [0.0, 0.1, 0.2, 0.3, 0.4])
    (root / folders[1]).rename(outside)
    (root / folders[1]).symlink_to(outside)
    drop_images(root, 1, {folders[2]})
    assert those_with_images(root, folders) == [0, 1, 2, 4]
