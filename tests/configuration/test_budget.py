"""What a run asks for: images, evaluations and updates, by hand and as a run then did."""

import json
from pathlib import Path

import pytest
from conftest import (
    experiment,
    get_config,
    make_config,
)
from ml_collections import ConfigDict

from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.settings import read_settings
from b2diffurl.experiment.stage import Stage


@pytest.mark.parametrize(
    ("more", "evaluations", "selected", "updates"),
    [
        ({}, 6 * 2 + 18 * 2, 12, 2 * 3),  # 6 prefixes of 2 steps, 18 images of 2; 12 in updates of 4
        ({"sampling": "independent"}, 18 * 4, 12, 2 * 3),
        ({"selection.images": "all", "train.num_epochs": 1}, 48, 18, 5),
        ({"train.objective": "d3po", "train.batch_size": 5, "train.gradient_accumulation_steps": 1}, 48, 12, 2 * 3),  # pairs
        ({"train.objective": "d3po", "train.batch_size": 1, "train.gradient_accumulation_steps": 1}, 48, 12, 2 * 6),
    ],
)
def test_amounts(overrides, more, evaluations, selected, updates):
    """By hand: 3 batches of 2 groups of 3, S = 2 of 4 steps, updates of 4 trajectories in 2 epochs."""
    config = make_config(overrides | more)
    budget = Budget.of(read_settings(config))
    assert (budget.num_groups, budget.num_images) == (6, 18)
    found = (budget.num_evaluations(Window(2, 4)), budget.most_selected, budget.most_updates)
    assert found == (evaluations, selected, updates)


@pytest.mark.parametrize(
    ("more", "window", "evaluations"),
    [
        ({}, (1, 3), 6 * 1 + 18 * (2 + 1)),
        ({}, (0, 1), 18 * (1 + 3)),
        ({"sample.suffix_steps": 2}, (0, 1), 18 * (1 + 2)),
        ({"sample.suffix_steps": 2}, (1, 3), 6 * 1 + 18 * (2 + 1)),  # one step is left
        ({"sample.suffix_steps": 2, "sampling": "independent"}, (1, 2), 18 * (1 + 1 + 2)),
    ],
)
def test_evaluations_of_prefix_window_and_tail(overrides, more, window, evaluations):
    """By hand, of 6 groups of 3 and 4 steps."""
    assert Budget.of(read_settings(make_config(overrides | more))).num_evaluations(Window(*window)) == evaluations


def test_amounts_are_those_of_a_run(stage_with, overrides):
    """Where all images are selected, the manifests have exactly the evaluations and updates that are foretold."""
    settings = {"selection.images": "all", "train.gradient_accumulation_steps": 4}
    stage = Stage(experiment(stage_with(**settings)), 0)
    budget = Budget.of(read_settings(make_config(overrides | settings)))
    assert stage.manifest("sample")["num_evaluations"] == budget.num_evaluations(Window(2, 4))
    assert stage.manifest("train")["num_updates"] == budget.most_updates == 2 * 3


def planned_steps(config: ConfigDict, root: Path) -> list[int]:
    """S of every stage."""
    return [window.num_steps for window in Budget.of(read_settings(config)).planned_windows(root)]


def test_a_shared_state_counts_once(overrides):
    """6 groups of 2 x 3 leaves that part again after 2 of 3 steps, T = 4: 1 step of the prefix, 2 of two edges, 1 of leaves.
    Trained on all leaves, an epoch has as many transitions as the window has distinct ones; two leaves have 3 each."""
    config = make_config(overrides | {"split_times": (2, 3), "split_after": (2,), "split_step_left": 3})
    budget = Budget.of(read_settings(config))
    assert (budget.num_images, budget.num_evaluations(Window(1, 4))) == (36, 6 * (1 + 2 + 2 + 6))
    assert budget.num_evaluations(Window(0, 3)) == 6 * (2 + 2 + 6 + 6)
    assert budget.most_transitions(36, 3) == 6 * (2 + 2 + 6)
    assert budget.most_transitions(12, 3) == 12 * 3


def test_planned_steps(tmp_path):
    """The schedule's, which is the reference's; a stage that is sampled keeps its own, and split_step is for the others."""
    config = get_config("sd14")
    steps = planned_steps(config, tmp_path)
    assert [steps.count(S) for S in range(14, 21)] == [15, 14, 14, 15, 14, 14, 14]
    manifest = Stage(tmp_path, 1).manifest_path("sample")
    manifest.parent.mkdir()
    manifest.write_text(json.dumps({"finished": "2001-09-09T01:46:40+0000", "num_trained_steps": 2}))
    assert planned_steps(config, tmp_path) == [14, 2, *steps[2:]]
    config.split_step = 17
    assert planned_steps(config, tmp_path) == [17, 2] + [17] * 98
