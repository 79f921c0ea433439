"""The training of a stage: what its epochs deal, which steps it takes, what it saves."""

import json
from collections import Counter

import pytest
import torch
from conftest import (
    REFERRING,
    distance,
    experiment,
    run_stage,
    stage_of,
    updates_of,
)
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file

from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.phases.train import choose_steps, update_rows


def test_gradient_checkpointing_gives_the_same_update(finished, overrides, tmp_path, monkeypatch):
    """And computes activations again: the blocks run twice for each time the whole network does."""
    calls = Counter()
    for kind in (UNet2DConditionModel, ResnetBlock2D):

        def forward(self, *args, original=kind.forward, name=kind.__name__, **kwargs):
            calls[name] += torch.is_grad_enabled()
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)
    run_stage(tmp_path, overrides | {"train.gradient_checkpointing": True})
    assert distance(tmp_path, finished) < 1e-4
    checkpointed, calls = dict(calls), calls.clear() or calls
    (tmp_path / "plain").mkdir()
    run_stage(tmp_path / "plain", overrides)
    assert checkpointed["UNet2DConditionModel"] == calls["UNet2DConditionModel"] > 0
    assert checkpointed["ResnetBlock2D"] > 1.5 * calls["ResnetBlock2D"]


def test_a_subset_of_the_steps(finished, overrides, tmp_path):
    """Every update takes as many of the S steps as asked for, each now and then; the metrics name them."""
    run_stage(tmp_path, overrides | {"train.timestep_fraction": 0.5})
    updates = [json.loads(line) for line in stage_of(tmp_path).metrics("train").read_text().splitlines()]
    timesteps = [update["timesteps"] for update in updates]
    assert [len(some) for some in timesteps] == [1] * len(updates)
    assert all(len(update["log_ratio_per_step"]) == 1 for update in updates)
    assert {t for some in timesteps for t in some} == {251, 1}
    kept = json.loads(stage_of(tmp_path).selection.read_text())
    assert stage_of(tmp_path).manifest("train")["num_transitions"] == 2 * len(kept)
    assert distance(tmp_path, finished) > 0.1


def test_chosen_steps_are_every_one_as_likely():
    chosen = [choose_steps(5, 2, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    assert all(some == sorted(set(some)) and len(some) == 2 for some in chosen)
    counts = torch.tensor([sum(step in some for some in chosen) for step in range(5)])
    assert (counts - 800).abs().max() < 4 * (2000 * 0.4 * 0.6) ** 0.5
    assert choose_steps(5, 5, torch.Generator().manual_seed(0)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("num_trajectories", [1, 2, 7, 8, 9, 100])
@pytest.mark.parametrize("effective", [1, 4, 8, 128])
def test_every_trajectory_counts_once_an_epoch(num_trajectories, effective):
    """An epoch deals all rows, each once, to ceil(N / effective) updates of equal size, one more or less; its order
    depends on the epoch's key alone."""
    dealt = [update_rows(num_trajectories, effective, torch.Generator().manual_seed(3)) for _ in range(2)]
    sizes = [len(rows) for rows in dealt[0]]
    assert sorted(torch.cat(dealt[0]).tolist()) == list(range(num_trajectories))
    assert len(sizes) == -(-num_trajectories // effective)
    assert max(sizes) <= effective
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.cat(dealt[0]), torch.cat(dealt[1]))
    if num_trajectories == 100:
        other = torch.cat(update_rows(num_trajectories, effective, torch.Generator().manual_seed(4)))
        assert not torch.equal(other, torch.cat(dealt[0]))


# ---- the stage ----


def is_fresh(stage: Stage) -> bool:
    """Whether the stage's LoRA is still one that changes nothing."""
    tensors = load_file(stage.checkpoints()[-1] / LORA_FILE)
    return not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_a_stage_updates_on_its_whole_selection(finished):
    """Each epoch's updates take all selected trajectories; the manifest counts the updates, and what is not finite
    cannot be written."""
    for index in range(2):
        stage = Stage(experiment(finished), index)
        selected = len(json.loads(stage.selection.read_text()))
        assert selected % 4, "the remainder is what is tested here"
        for epoch in (1, 2):
            sizes = [event["num_trajectories"] for event in updates_of(stage) if event["epoch"] == epoch]
            assert sum(sizes) == selected
            assert len(sizes) == -(-selected // 4)
        assert stage.manifest("train")["num_updates"] == len(updates_of(stage))


def test_a_stage_of_pairs_leaves_single_siblings_out(stage_with):
    """d3po trains on the groups of which both siblings were selected: an update has half as many pairs as the effective
    batch has trajectories, rounded down, and all of them count in every epoch."""
    stage = Stage(experiment(stage_with(**REFERRING["d3po"])), 0)
    groups = [row["group"] for row in json.loads(stage.selection.read_text())]
    assert sorted(Counter(groups).values()) == [1, 1, 1, 2, 2, 2]
    sizes = [(event["epoch"], event["num_trajectories"]) for event in updates_of(stage)]
    assert sizes == [(1, 4), (1, 2), (2, 4), (2, 2)]
    assert stage.manifest("train")["num_transitions"] == (4 + 2) * 2 * 4
    assert not is_fresh(stage)


@pytest.mark.parametrize(("objective", "metric"), [("dpok", "kl"), ("d3po", "margin")])
def test_a_stage_reports_its_way_from_the_base(stage_with, objective, metric):
    """The distance to the base policy is exactly 0 at a fresh LoRA's first update, and not at the next ones."""
    first, *later = updates_of(Stage(experiment(stage_with(**REFERRING[objective])), 0))
    assert first[metric] == 0.0
    assert all(update[metric] != 0.0 for update in later)
    assert {"kl", "margin"} & first.keys() == {metric}


def test_without_a_complete_group_the_weights_go_on(overrides, tmp_path):
    """d3po on a selection of single siblings: no update, and the stage is finished with the LoRA it began with."""
    run_stage(tmp_path, overrides | {"train.objective": "d3po"})
    stage = Stage(experiment(tmp_path), 0)
    groups = [row["group"] for row in json.loads(stage.selection.read_text())]
    assert len(set(groups)) == len(groups) > 0
    assert (updates_of(stage), stage.manifest("train")["num_updates"]) == ([], 0)
    assert is_fresh(stage)


def test_optimizer_state_carries_over_from_stage_to_stage(finished):
    """AdamW's step count after stage 1 is the updates of both stages; its weights are not those of stage 0."""
    stages = [Stage(experiment(finished), index) for index in range(2)]
    counted = 0
    for stage in stages:
        counted += len(updates_of(stage))
        optimizer = load_file(stage.checkpoints()[-1] / "optimizer.safetensors")
        assert {int(value) for name, value in optimizer.items() if name.endswith("::step")} == {counted}
    one, two = (load_file(stage.checkpoints()[-1] / LORA_FILE) for stage in stages)
    assert any(not torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("epochs", "interval", "saved"), [(1, 2, {1: 1}), (3, 2, {1: 2, 2: 3}), (4, 2, {1: 2, 2: 4})])
def test_checkpoints_are_numbered_by_the_save_interval(finished, overrides, tmp_path, epochs, interval, saved):
    """checkpoint_<n> holds epoch n * interval; the last epoch is always saved."""
    settings = overrides | {"train.num_epochs": epochs, "train.save_interval": interval, "train.batch_size": 16}
    run_stage(tmp_path, settings)
    found = {
        int(path.name.split("_")[1]): json.loads((path / "state.json").read_text())["epoch"]
        for path in Stage(experiment(tmp_path), 0).checkpoints()
    }
    assert found == saved


def test_an_empty_selection_passes_the_weights_on(finished, overrides, tmp_path):
    """Nothing selected: the stage ends in a checkpoint with the weights, and the optimizer, it began with, to the bit;
    the first stage in the fresh LoRA; and the next stage goes on from it."""
    strict = overrides | {"selection.pos_threshold": 1e9, "selection.neg_threshold": -1e9}
    for index in range(2):
        run_stage(tmp_path, strict, index)
        stage = Stage(experiment(tmp_path), index)
        assert json.loads(stage.selection.read_text()) == []
        assert updates_of(stage) == []
        assert stage.manifest("train")["num_updates"] == 0
        assert is_fresh(stage)
    # and a trained LoRA with its optimizer
    last = Stage(experiment(finished), 1).checkpoints()[-1]
    run_stage(tmp_path, strict | {"exp_name": "other", "resume_from": str(last)})
    other = Stage(tmp_path / "model" / "lora" / "other", 0).checkpoints()[-1]
    for name in (LORA_FILE, "optimizer.safetensors"):
        one, two = load_file(last / name), load_file(other / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
