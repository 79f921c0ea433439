"""Whole stages whose branches part in a tree: what they store, what each edge is worth, and what is trained, once."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    comparable,
    experiment,
    json_lines,
    make_config,
    run_stage,
    stage_of,
    updates_of,
)
from safetensors.torch import load_file

from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.plan import make_plan
from b2diffurl.configuration.settings import read_settings
from b2diffurl.phases.train import read_data
from b2diffurl.reporting.page import draw_tree

# 6 groups of 2 x 2 leaves that part again after the first of two trained steps, one row at a time in network and decoder.
TREE = {
    "split_times": (2, 2),
    "split_after": (1,),
    "selection.images": "all",
    "sample.micro_batch_size": 1,
    "train.micro_batch_size": 1,
    "train.gradient_accumulation_steps": 4,
}


@pytest.fixture(scope="module")
def grown(stage_with) -> Path:
    """A folder in which stage 0 with TREE is finished. Not to be changed."""
    return stage_with(**TREE)


def test_one_parting_by_either_name_is_the_same(stage_with, finished):
    """split_times=(3,) writes what split_time=3 writes, file by file; only the records of the settings differ."""
    one, other = (comparable(stage_of(folder).folder) for folder in (stage_with(split_times=(3,), split_time=7), finished))
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == ["sample.json"]
    one["sample.json"].pop("settings"), other["sample.json"].pop("settings")
    assert one["sample.json"] == other["sample.json"]


def test_edges_of_a_stage_are_worth_what_their_leaves_score(grown, overrides):
    """selection.json has a list for each leaf, worked out here from scores.jsonl in plain numpy; its sum is the score."""
    stage = stage_of(grown)
    scored, rows = json_lines(stage.scores), json.loads(stage.selection.read_text())
    assert [row["id"] for row in rows] == list(range(24))
    for row in rows:
        rewards = {n: line["reward"] for n, line in enumerate(scored) if line["prompt"] == scored[row["id"]]["prompt"]}
        unit, pair = np.std(list(rewards.values()), ddof=1), row["id"] // 2 * 2
        of_edge = np.mean([rewards[pair], rewards[pair + 1]])
        expected = [(of_edge - np.mean(list(rewards.values()))) / unit, (rewards[row["id"]] - of_edge) / unit]
        assert row["advantage"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert sum(row["advantage"]) == pytest.approx(row["score"], rel=1e-4, abs=1e-5)
    assert np.std([row["advantage"][0] for row in rows]) > 0.1


def test_a_stage_evaluates_stores_and_trains_what_is_shared_once(grown, overrides):
    """Of every group two states of the first trained step and four of the second: in the sampling files, in the copies,
    among the network's evaluations and the trained transitions. The first update finds ratios of exactly 1."""
    stage, budget = stage_of(grown), Budget.of(read_settings(make_config(overrides | TREE)))
    stored, copied = (load_file(path(0)) for path in (stage.batch, stage.selected_batch))
    assert stored["shared.0.latents"].shape == (2, 2, 1, 4, 8, 8)
    assert stored["latents"].shape == (2, 4, 2, 4, 8, 8)
    assert copied["shared.0.latents"].shape == (4, 1, 4, 8, 8)
    assert len(stored["latents"][:, :, 0].flatten(0, 1).flatten(1).unique(dim=0)) == 4
    sampled, trained = stage.manifest("sample"), stage.manifest("train")
    assert sampled["num_evaluations"] == budget.num_evaluations(stage.sampled_window(4)) == 6 * (2 * 1 + 2 + 4)
    assert trained["num_transitions"] == 2 * budget.most_transitions(24, 2) == 2 * 6 * (2 + 4)
    first = updates_of(stage)[0]
    assert first["max_abs_log_ratio"] == 0.0
    assert len(first["grad_norm_per_step"]) == len(first["timesteps"]) == 2
    assert first["grad_norm"] > 0


def test_images_of_a_tree_are_noised_again_one_by_one(grown, overrides, tmp_path):
    """An objective on noised images samples and selects the same leaves, stores each image, and trains every one of them: an
    image at a level of the first step has the advantage of its first edge, at one of the second step that of its second."""
    settings = overrides | TREE | {"train.objective": "nft", "train.noise_levels": 2, "train.num_epochs": 1}
    run_stage(tmp_path, settings)
    stage, other = stage_of(tmp_path), stage_of(grown)
    stored = load_file(stage.batch(0))
    whole = load_file(other.batch(0))["latents"][:, :, -1:]
    assert torch.equal(stored["latents"], whole)
    assert not [name for name in stored if name.startswith("shared")]
    assert stage.selection.read_bytes() == other.selection.read_bytes()
    assert stage.manifest("train")["num_transitions"] == 24 * 2
    with contextlib.chdir(tmp_path):
        data = read_data(make_plan(make_config(settings)))
    edges = torch.tensor([row["advantage"] for row in json.loads(stage.selection.read_text())])
    assert torch.equal(data.advantages, edges)  # the loss takes the column of the step that a level belongs to
    assert data.owned is None


def test_a_training_of_a_tree_that_was_stopped_ends_the_same(grown, overrides, tmp_path):
    """Left with the checkpoint of epoch 1, and without one of the sampling batches: the same files to the bit."""
    folder = shutil.copytree(grown, tmp_path / "copy")
    stage = stage_of(folder)
    shutil.rmtree(stage.checkpoint(2))
    stage.manifest_path("train").unlink()
    run_stage(folder, overrides | TREE, verbs=["train"])
    assert comparable(folder) == comparable(grown)
    for path in (stage.manifest_path(phase) for phase in ("sample", "select", "train")):
        path.unlink()
    stage.batch(1).unlink()
    run_stage(folder, overrides | TREE, verbs=["sample", "select", "train"])
    one, other = (load_file(stage_of(where).batch(1)) for where in (folder, grown))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (experiment(folder) / "stage0/selection.json").read_bytes() == stage_of(grown).selection.read_bytes()


def test_pairs_of_a_tree_are_trained_and_reported(overrides, tmp_path):
    """Best and worst leaf of a group; where they share the first step it is trained once. The report's picture has a tile
    for each of 3 states of the prefix, for 2 edges and for 4 leaves."""
    everybody = {"selection.pos_threshold": 0.0, "selection.neg_threshold": 0.0}  # 's best and worst
    settings = overrides | TREE | {"selection.images": "pairs", "selection.advantage": "group"} | everybody
    run_stage(tmp_path, settings)
    stage = stage_of(tmp_path)
    rows = json.loads(stage.selection.read_text())
    assert len(rows) == 12
    edges = {(row["group"], row["branch"] // 2) for row in rows}
    assert stage.manifest("train")["num_transitions"] == 2 * (len(edges) + len(rows))
    assert len(draw_tree(stage).axes[0].images) == 3 + 2 + 4
