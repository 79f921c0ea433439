"""One update at a time: its gradient, its divisor, its optimizer step, and when it refuses.

N selected trajectories, S trained steps, U units: trajectories or pairs of them
"""

import contextlib
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import REFERRING, experiment, make_config, read_selected, run_stage
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from b2diffurl.algorithm.selection import Selected
from b2diffurl.algorithm.transition import step_weights
from b2diffurl.configuration.plan import make_plan
from b2diffurl.configuration.settings import ModelSettings, read_settings
from b2diffurl.experiment.checkpoints import load_optimizer, save_checkpoint
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.experiment.trajectories import Trajectories
from b2diffurl.models import stable_diffusion
from b2diffurl.models.policy import load_policy
from b2diffurl.objectives import Objective
from b2diffurl.objectives.options import NoOptions
from b2diffurl.phases.train import update_rows
from b2diffurl.phases.trainer import Trainer, make_trainer, micro_batches
from b2diffurl.phases.update_report import UpdateReport
from b2diffurl.runtime.device import make_accelerator

CLIP_RANGE = 1e-3  # of the gradient tests: small enough for the off-policy ratios below to be clipped in part
DPOK = {"train.objective": "dpok", "train.kl_weight": 2.0}  # large enough for both terms to count
D3PO = {"train.objective": "d3po", "train.dpo_beta": 2.0}
UNITS = {"ddpo": torch.arange(7), "dpok": torch.arange(7), "d3po": torch.tensor([[0, 1], [2, 3], [4, 5], [6, 0], [3, 1]])}


@pytest.fixture
def bench(finished, overrides):
    """make(**settings) -> a Trainer on stage 1's window with stage 1's trained LoRA, so that no ratio is 1; with `fresh` one
    on stage 0's window with the LoRA that stage 0 was sampled with."""

    def make(*, fresh: bool = False, **settings) -> Trainer:
        run_name = "stage0" if fresh else "stage1"
        with contextlib.chdir(finished):
            plan = make_plan(make_config(overrides, run_name=run_name))
            config = make_config(overrides, run_name=run_name, **({"train.eps": CLIP_RANGE} | settings))
            plan = replace(plan, settings=read_settings(config))
            accelerator = make_accelerator(plan.settings.compute)
            source = None if fresh else plan.stage.checkpoints()[-1] / LORA_FILE
            model = load_policy(plan.settings.model, accelerator, source, seed=config.seed, compile=False, decoder=False)
            return make_trainer(plan, accelerator, model, source)

    return make


@pytest.fixture
def batch(finished) -> tuple[Trajectories, Tensor]:
    """Stage 1's selected trajectories with the advantages [N,S] of their transitions."""
    stage = Stage(experiment(finished), 1)
    rows = json.loads(stage.selection.read_text())
    selected = [Selected(row["group"], row["branch"], row["score"]) for row in rows]
    trajectories = read_selected(stage, selected, 2)
    advantages = torch.tensor([row["advantage"] for row in rows])
    return trajectories, advantages[:, None].repeat(1, trajectories.log_probs.shape[1])


def gradient(
    trainer: Trainer, trajectories: Trajectories, advantages: Tensor, units: Tensor, *, apart: bool = True
) -> tuple[Tensor, UpdateReport]:
    trainer.optimizer.zero_grad()
    size = trainer.sizes.sizes["train.micro_batch_size"]
    report = trainer.accumulate(trajectories, advantages, units, every_step(trainer), size=size, apart=apart)
    return trainer.gradient().clone(), report


def every_step(trainer: Trainer) -> range:
    return range(len(trainer.loss.step_weight))


def difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def plainly(unet: UNet2DConditionModel, trainer: Trainer, trajectories: Trajectories, n: int, step: int) -> Normal:
    """One transition: the network called plainly, guidance written out, mu and sigma from stock diffusers."""
    scheduler = DDIMScheduler.from_config(trainer.model.scheduler_config)
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[4 - trajectories.log_probs.shape[1] + step]
    x_t, text = trajectories.latents[n, step][None], trajectories.conditions["prompt_embeds"]
    without = unet(x_t, t, trajectories.unconditional["prompt_embeds"]).sample
    eps = without + 5.0 * (unet(x_t, t, text[trajectories.prompt_ids[n]][None]).sample - without)
    mu = scheduler.step(eps, t, x_t, eta=1.0, variance_noise=torch.zeros_like(x_t)).prev_sample
    return Normal(mu, scheduler._get_variance(t, t - 250).sqrt())


def one_by_one(trainer: Trainer, loss: Callable[[int, int], Tensor], num_units: int, num_steps: int) -> Tensor:
    """Gradient [U,S,parameters] of loss(unit, step), each on its own."""
    gradients = []
    for unit in range(num_units):
        for step in range(num_steps):
            trainer.optimizer.zero_grad()
            loss(unit, step).backward()
            gradients.append(trainer.gradient().clone())
    return torch.stack(gradients).unflatten(0, (num_units, num_steps))


def surrogate(trainer: Trainer, trajectories: Trajectories, advantages: Tensor) -> tuple[Callable, Tensor]:
    """PPO's two cases by hand, the density from torch.distributions: a loss for `one_by_one`, and the clip flags [N,S] that
    it fills in."""
    cut = torch.zeros_like(trajectories.log_probs)

    def loss(n: int, step: int) -> Tensor:
        x_prev = trajectories.latents[n, step + 1]
        density = plainly(trainer.model.unet, trainer, trajectories, n, step).log_prob(x_prev).mean()
        ratio, advantage = (density - trajectories.log_probs[n, step]).exp(), advantages[n, step]
        cut[n, step] = ratio > 1 + CLIP_RANGE if advantage > 0 else ratio < 1 - CLIP_RANGE
        return -advantage * ratio * (1 - cut[n, step])

    return loss, cut


@pytest.fixture
def base_unet(models) -> UNet2DConditionModel:
    """The base network, loaded a second time and never given an adapter."""
    return UNet2DConditionModel.from_pretrained(models / "sd", subfolder="unet").eval().requires_grad_(False)


# ---- the gradient ----


def test_the_update_is_the_mean_over_all_pairs_computed_one_by_one(bench, batch):
    """Batched accumulation equals a loop over single pairs: its gradient is their mean over N*S, with and without step
    weights; each step's reported norm is that of its own share, its clip fraction that of its pairs."""
    trainer = bench()
    loss, cut = surrogate(trainer, *batch)
    num_rows, num_steps = cut.shape
    gradients = one_by_one(trainer, loss, num_rows, num_steps)
    assert 0.0 < cut.mean() < 1.0
    assert num_steps == 3
    for kind in ("none", "sigma", "leverage"):
        trainer.loss = replace(trainer.loss, step_weight=step_weights(trainer.loss.table, num_steps, kind))
        found, report = gradient(trainer, *batch, torch.arange(num_rows))
        shares = (gradients * trainer.loss.step_weight[None, :, None]).sum(0) / (num_rows * num_steps)
        assert difference(found, shares.sum(0)) < 1e-4
        torch.testing.assert_close(report.step_norms, shares.norm(dim=1), rtol=1e-3, atol=0)
        assert torch.equal(report.values.clipped, cut.T)
    assert trainer.loss.step_weight.max() > 1.5


def test_an_advantage_acts_on_its_own_transition(bench, batch):
    """Advantages that differ along a trajectory: the gradient is the mean over N*S of each transition's with its own. Where
    only one is not 0, no other step has a loss or a gradient, exactly."""
    trainer, (trajectories, advantages) = bench(), batch
    num_rows, num_steps = advantages.shape
    varied = advantages * torch.randn(num_rows, num_steps, generator=torch.Generator().manual_seed(0))
    gradients = one_by_one(trainer, surrogate(trainer, trajectories, varied)[0], num_rows, num_steps)
    found, _ = gradient(trainer, trajectories, varied, torch.arange(num_rows))
    expected = gradients.mean((0, 1))
    assert difference(found, expected) < 1e-4
    constant, _ = gradient(trainer, trajectories, varied.mean(1, keepdim=True).expand_as(varied), torch.arange(num_rows))
    assert difference(constant, expected) > 0.1

    n, step = torch.nonzero(gradients.norm(dim=2) == gradients.norm(dim=2).max())[0].tolist()
    single = torch.zeros_like(varied)
    single[n, step] = varied[n, step]
    found, report = gradient(trainer, trajectories, single, torch.arange(num_rows))
    assert difference(found, gradients[n, step] / (num_rows * num_steps)) < 1e-4
    assert report.values.loss.nonzero().tolist() == [[step, n]]
    assert report.step_norms.nonzero().flatten().tolist() == [step]


def test_the_penalty_is_the_divergence_from_the_base_on_disk(bench, batch, base_unet):
    """dpok's gradient is the mean of ddpo's plus kl_weight times that of torch.distributions' KL to a second model without
    any adapter, computed one by one; both terms count, and the reported `kl` is that KL."""
    trainer = bench(**DPOK)
    plain, cut = surrogate(trainer, *batch)
    found_kl = torch.zeros_like(cut)

    def penalty(n: int, step: int) -> Tensor:
        normals = [plainly(unet, trainer, batch[0], n, step) for unet in (trainer.model.unet, base_unet)]
        kl = kl_divergence(*normals).mean()
        found_kl[n, step] = kl.detach()
        return 2.0 * kl

    shares = [one_by_one(trainer, loss, *cut.shape).mean((0, 1)) for loss in (plain, penalty)]
    found, report = gradient(trainer, *batch, UNITS["dpok"])
    assert difference(found, sum(shares)) < 1e-4
    assert min(share.norm() for share in shares) > 0.1 * sum(shares).norm()
    assert (found_kl > 0).all()
    torch.testing.assert_close(report.values.others["kl"], found_kl.T, rtol=1e-3, atol=1e-9)
    assert torch.equal(report.values.clipped, cut.T)


def test_preferences_are_those_over_the_base_on_disk(bench, batch, base_unet):
    """d3po's gradient is the mean over pairs and steps of DPO's, its log-ratios taken one by one to a second model without
    any adapter; the reported margins are theirs, and some bend the sigmoid."""
    trainer = bench(**D3PO | {"train.dpo_beta": 20.0, "train.micro_batch_size": 4})  # two pairs at once
    trajectories, units = batch[0], UNITS["d3po"]
    margins = torch.zeros(len(units), trajectories.log_probs.shape[1])

    def loss(unit: int, step: int) -> Tensor:
        ratios = []
        for n in units[unit].tolist():
            policy, base = (plainly(unet, trainer, trajectories, n, step) for unet in (trainer.model.unet, base_unet))
            x_prev = trajectories.latents[n, step + 1]
            ratios.append((policy.log_prob(x_prev) - base.log_prob(x_prev)).mean())
        margin = 20.0 * (ratios[0] - ratios[1])
        margins[unit, step] = margin.detach()
        return -(1 / (1 + (-margin).exp())).log()

    shares = one_by_one(trainer, loss, *margins.shape)
    found, report = gradient(trainer, *batch, units)
    assert difference(found, shares.mean((0, 1))) < 1e-4
    assert margins.abs().max() > 0.5
    torch.testing.assert_close(report.values.others["margin"], margins.T, rtol=1e-3, atol=1e-4)
    assert torch.equal(report.units, units)
    assert report.values.log_ratio.shape == (margins.shape[1], 2, len(units))


@pytest.mark.parametrize("settings", [pytest.param({}, id="ddpo"), pytest.param(D3PO, id="d3po", marks=pytest.mark.long)])
def test_micro_batching_does_not_change_the_update(bench, batch, settings):
    """Any micro-batch size, in transitions, gives the same gradient up to rounding, remainders included, filled up to that
    size or not, of one step or of several at once; and so are the losses of each step."""
    trainer = bench(**settings)
    units = UNITS[settings.get("train.objective", "ddpo")]
    whole, looped = gradient(trainer, *batch, units)
    shapes = [
        *itertools.product((1, 4, 5, 14), (True, False), (False,)),
        (5, False, True),
        (100, True, True),
        (100, False, False),
    ]
    for size, apart, constant in shapes:
        trainer.sizes.sizes["train.micro_batch_size"], trainer.constant_shape = size, constant
        split, report = gradient(trainer, *batch, units, apart=apart)
        assert difference(split, whole) < 1e-5
        torch.testing.assert_close(report.values.loss, looped.values.loss, rtol=1e-4, atol=1e-6)
        assert torch.equal(report.units, units)
        assert (report.step_norms is not None) == (apart or constant or size < 2 * units.numel())


@pytest.mark.parametrize("settings", [{}, D3PO], ids=["ddpo", "d3po"])
def test_a_remainder_is_divided_by_its_own_size(bench, batch, settings):
    """An update on r trajectories or pairs is their mean: the updates of an epoch, weighted by their sizes, add up to the
    gradient of the whole epoch."""
    trainer = bench(**settings)
    units = UNITS[settings.get("train.objective", "ddpo")]
    whole, _ = gradient(trainer, *batch, units)
    for size in (4, 3):
        parts = units.split(size)
        total = sum(gradient(trainer, *batch, part)[0] * len(part) for part in parts) / len(units)
        assert len(parts[-1]) < size
        assert difference(total, whole) < 1e-5


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


@pytest.mark.parametrize("num_units", [1, 2, 5, 12])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 5, 64])
@pytest.mark.parametrize("shape", [(-1,), (-1, 2)], ids=["trajectories", "pairs"])
@pytest.mark.parametrize("constant", [False, True])
def test_processes_share_an_update_without_loss(num_units, num_processes, size, shape, constant):
    """Over all processes each unit counts exactly once; all have as many micro-batches, of one shape, within the size, or of
    it."""
    units = torch.arange(100, 100 + num_units * len(shape)).view(shape)
    shares = [micro_batches(units, process, num_processes, size, constant=constant) for process in range(num_processes)]
    assert len({part.shape for part, _ in shares}) == len({counts.shape for _, counts in shares}) == 1
    assert all(part.shape == (*counts.shape, *units.shape[1:]) for part, counts in shares)
    assert all(counts.shape[1] == size if constant else counts.shape[1] <= size for _, counts in shares)
    assert all(set(counts.flatten().tolist()) <= {0.0, 1.0} for _, counts in shares)
    counted = [unit for part, counts in shares for unit in part[counts > 0].tolist()]
    assert sorted(counted) == units.tolist()


@pytest.mark.parametrize("settings", [{}, D3PO], ids=["ddpo", "d3po"])
def test_processes_add_up_to_one(bench, batch, settings):
    """The mean over processes of their gradients, which is what DDP takes, is the gradient of one process."""
    trainer = bench(**settings)
    units = UNITS[settings.get("train.objective", "ddpo")]
    whole, _ = gradient(trainer, *batch, units)
    for num_processes in (2, 3):
        total = torch.zeros_like(whole)
        for process in range(num_processes):
            trainer.accelerator = Elsewhere(trainer.accelerator, process, num_processes)
            total += gradient(trainer, *batch, units)[0] / num_processes
            trainer.accelerator = trainer.accelerator.real
        assert difference(total, whole) < 1e-5


class Elsewhere:
    """The real accelerator, but at another place among more processes."""

    def __init__(self, real, process_index: int, num_processes: int):
        self.real, self.process_index, self.num_processes = real, process_index, num_processes

    def __getattr__(self, name: str):
        return getattr(self.real, name)


def test_an_update_is_clipped_adamw(bench, batch):
    """The parameters move as AdamW's formulas say (arXiv 1711.05101, algorithm 2) from the gradient scaled down to norm
    max_grad_norm, starting from the state the checkpoint held."""
    settings = {"train.max_grad_norm": 1e-4, "train.adam_weight_decay": 0.1, "train.learning_rate": 3e-3}
    trainer = bench(**settings)
    parameters = list(trainer.model.trainable().values())
    before = torch.cat([parameter.detach().flatten() for parameter in parameters])
    states = [trainer.optimizer.state[parameter] for parameter in parameters]
    (count,) = {int(state["step"]) for state in states}
    assert count > 0
    m, v = (torch.cat([state[key].flatten() for state in states]) for key in ("exp_avg", "exp_avg_sq"))
    rows = torch.arange(len(batch[0]))
    g, _ = gradient(trainer, *batch, rows)
    assert g.norm() > 1e-4
    g = g / g.norm() * 1e-4
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    step = (m / (1 - 0.9 ** (count + 1))) / ((v / (1 - 0.999 ** (count + 1))).sqrt() + 1e-8)
    expected = before * (1 - 3e-3 * 0.1) - 3e-3 * step
    trainer.optimizer.zero_grad()
    report = trainer.update(*batch, rows, every_step(trainer))
    after = torch.cat([parameter.detach().flatten() for parameter in parameters])
    assert difference(after - before, expected - before) < 1e-3
    assert report["grad_norm"] > 1e-4
    assert trainer.gradient().abs().max() == 0


# ---- the base policy ----


def test_a_fresh_lora_is_the_base_policy(bench, finished):
    """Where the adapter is 0, and in the batch shape of sampling, the base policy's log-probs are to the bit those of the
    policy and those that sampling recorded, and the KL is exactly 0; a trained adapter is another policy."""

    def everything(log_prob, old_log_prob, base_log_prob, kl):
        found = {"log_prob": log_prob, "old_log_prob": old_log_prob, "base_log_prob": base_log_prob, "kl": kl}
        return log_prob, found | {"log_ratio": log_prob, "clipped": log_prob}

    siblings = [Selected(group, branch, 0.0) for group in range(2) for branch in range(3)]
    trajectories = read_selected(Stage(experiment(finished), 0), siblings, 2)
    for fresh in (True, False):
        loss = replace(bench(fresh=fresh).loss, step_weight=torch.ones(2), objective=Objective(everything, NoOptions()))
        for step in range(2):
            values = loss(trajectories, torch.ones(6, 2), torch.arange(6), torch.tensor([step]))
            found = {key: value[0] for key, value in values.others.items()}
            assert torch.equal(found["base_log_prob"], found["old_log_prob"])
            assert torch.equal(found["log_prob"], found["base_log_prob"]) == fresh
            assert torch.equal(found["kl"], torch.zeros(6)) == fresh
            assert not found["base_log_prob"].requires_grad


def test_the_base_policy_leaves_no_trace(bench, batch, base_unet):
    """Inside base_policy the network is, to the bit, the one on disk. Afterwards, and after an error, the policy is what it
    was, all of the adapter wants gradients and nothing else does, and those that were accumulated are untouched."""
    trainer = bench()
    accumulated, _ = gradient(trainer, *batch, UNITS["ddpo"])
    unet = trainer.model.unet
    x, text = batch[0].latents[:, 0], batch[0].unconditional["prompt_embeds"].expand(7, -1, -1)
    with torch.no_grad():
        before = unet(x, 501, text).sample
        with contextlib.suppress(KeyError), trainer.model.base_policy():
            assert torch.equal(unet(x, 501, text).sample, base_unet(x, 501, text).sample)
            raise KeyError
        assert torch.equal(unet(x, 501, text).sample, before)
        assert not torch.equal(before, base_unet(x, 501, text).sample)
    assert {name for name, value in unet.named_parameters() if value.requires_grad} == set(trainer.model.trainable())
    assert torch.equal(trainer.gradient(), accumulated)
    again, _ = gradient(trainer, *batch, UNITS["ddpo"])
    assert torch.equal(again, accumulated)


# ---- the stage ----


def updates(stage: Stage) -> list[dict]:
    events = [json.loads(line) for line in stage.metrics("train").read_text().splitlines()]
    return [event for event in events if event["event"] == "update"]


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
            sizes = [event["num_trajectories"] for event in updates(stage) if event["epoch"] == epoch]
            assert sum(sizes) == selected
            assert len(sizes) == -(-selected // 4)
        assert stage.manifest("train")["num_updates"] == len(updates(stage))


def test_a_stage_of_pairs_leaves_single_siblings_out(stage_with):
    """d3po trains on the groups of which both siblings were selected: an update has half as many pairs as the effective
    batch has trajectories, rounded down, and all of them count in every epoch."""
    stage = Stage(experiment(stage_with(**REFERRING["d3po"])), 0)
    groups = [row["group"] for row in json.loads(stage.selection.read_text())]
    assert sorted(Counter(groups).values()) == [1, 1, 1, 2, 2, 2]
    sizes = [(event["epoch"], event["num_trajectories"]) for event in updates(stage)]
    assert sizes == [(1, 4), (1, 2), (2, 4), (2, 2)]
    assert stage.manifest("train")["num_transitions"] == (4 + 2) * 2 * 4
    assert not is_fresh(stage)


@pytest.mark.parametrize(("objective", "metric"), [("dpok", "kl"), ("d3po", "margin")])
def test_a_stage_reports_its_way_from_the_base(stage_with, objective, metric):
    """The distance to the base policy is exactly 0 at a fresh LoRA's first update, and not at the next ones."""
    first, *later = updates(Stage(experiment(stage_with(**REFERRING[objective])), 0))
    assert first[metric] == 0.0
    assert all(update[metric] != 0.0 for update in later)
    assert {"kl", "margin"} & first.keys() == {metric}


def test_without_a_complete_group_the_weights_go_on(overrides, tmp_path):
    """d3po on a selection of single siblings: no update, and the stage is finished with the LoRA it began with."""
    run_stage(tmp_path, overrides | {"train.objective": "d3po"})
    stage = Stage(experiment(tmp_path), 0)
    groups = [row["group"] for row in json.loads(stage.selection.read_text())]
    assert len(set(groups)) == len(groups) > 0
    assert (updates(stage), stage.manifest("train")["num_updates"]) == ([], 0)
    assert is_fresh(stage)


def test_optimizer_state_carries_over_from_stage_to_stage(finished):
    """AdamW's step count after stage 1 is the updates of both stages; its weights are not those of stage 0."""
    stages = [Stage(experiment(finished), index) for index in range(2)]
    counted = 0
    for stage in stages:
        counted += len(updates(stage))
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
    strict = overrides | {"eval.pos_threshold": 1e9, "eval.neg_threshold": -1e9}
    for index in range(2):
        run_stage(tmp_path, strict, index)
        stage = Stage(experiment(tmp_path), index)
        assert json.loads(stage.selection.read_text()) == []
        assert updates(stage) == []
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


# ---- the LoRA ----


@cache
def tiny_model(root: str, seed: int = 0, rank: int = 4, dtype: torch.dtype = torch.float32):
    settings = ModelSettings("stable_diffusion", root, "main", variant="", config="", resolution=0, lora_rank=rank)
    return stable_diffusion.load(settings, device=torch.device("cpu"), dtype=dtype, seed=seed, decoder=False)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_fresh_lora_changes_nothing(models, rank):
    """With B = 0 the network gives the base's own output, to the bit; alpha equals rank, so the scaling is 1; A is
    gaussian of deviation 1 / rank; there is no dropout, and only the attention is trained."""
    model = tiny_model(str(models / "sd"), rank=rank)
    base = UNet2DConditionModel.from_pretrained(models / "sd", subfolder="unet")
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 77, 16, generator=generator)
    with torch.no_grad():
        assert torch.equal(model.network(x, 500, text).sample, base(x, 500, text).sample)
    lora = model.unet.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (rank, rank, 0)
    assert {module.scaling["default"] for module in model.unet.modules() if hasattr(module, "lora_A")} == {1.0}
    names = model.trainable().keys()
    assert {re.search(r"\.(to_\w+(?:\.0)?)\.lora_[AB]\.", name)[1] for name in names} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert len(names) == 2 * sum(name.split(".")[-1] in ("to_q", "to_k", "to_v") or name.endswith("to_out.0")
                                 for name, _ in base.named_modules())  # fmt: skip
    gaussian = torch.cat([value.flatten() for name, value in model.trainable().items() if "lora_A" in name])
    assert abs(gaussian.std().item() * rank - 1) < 0.2
    assert {name for name, value in model.unet.named_parameters() if value.requires_grad} == set(names)


def test_a_fresh_lora_follows_from_the_seed(models):
    """The same seed gives the same initial A, another seed another, and torch's global generator is left alone."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = tiny_model.__wrapped__(str(models / "sd"), seed=1).adapter_state()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    same, other = (tiny_model.__wrapped__(str(models / "sd"), seed=seed).adapter_state() for seed in (1, 2))
    for name, value in one.items():
        assert torch.equal(value, same[name])
        assert "lora_B" in name or not torch.equal(value, other[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trainable_parameters_are_float32_in_every_precision(models, dtype):
    """A half-precision base carries a float32 LoRA, and it is saved so."""
    model = tiny_model(str(models / "sd"), dtype=dtype)
    assert {value.dtype for value in model.trainable().values()} == {torch.float32}
    assert {value.dtype for value in model.adapter_state().values()} == {torch.float32}
    assert {value.dtype for name, value in model.unet.named_parameters() if ".lora_" not in name} == {dtype}


def test_checkpoint_round_trip_is_exact(models, tmp_path):
    """LoRA and AdamW's state come back from disk bit for bit, and the next step is the same as without the trip."""
    model = tiny_model.__wrapped__(str(models / "sd"), seed=0)
    parameters = model.trainable()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)

    def step(model, optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.trainable().values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    step(model, optimizer, 0)
    state = {"stage": 0, "epoch": 1, "base_model_sha256": model.fingerprint, "scaler": None}
    save_checkpoint(tmp_path / "checkpoint_1", model.adapter_state(), optimizer, list(parameters), state)
    other = tiny_model.__wrapped__(str(models / "sd"), seed=9)
    other.load_adapter(tmp_path / "checkpoint_1" / LORA_FILE)
    other_optimizer = torch.optim.AdamW(other.trainable().values(), lr=1e-2)
    load_optimizer(tmp_path / "checkpoint_1" / LORA_FILE, other_optimizer, list(other.trainable()))
    for _ in range(2):
        for one, two in zip(parameters.values(), other.trainable().values(), strict=True):
            assert torch.equal(one, two)
            for key, value in optimizer.state[one].items():
                assert torch.equal(value, other_optimizer.state[two][key])
        step(model, optimizer, 1)
        step(other, other_optimizer, 1)


# ---- not finite ----


@pytest.mark.parametrize(
    ("settings", "where"),
    [({}, "latents"), ({}, "log_probs"), ({}, "advantages"), (DPOK, "latents"), (D3PO, "latents")],
    ids=str,
)
def test_a_non_finite_loss_stops_the_update(bench, batch, tmp_path, settings, where):
    """One poisoned trajectory of an update: nothing is stepped, the error names its image, or its pair's, and no other, and
    the losses are on disk with their states."""
    trainer = bench(**settings)
    trainer.stage = Stage(tmp_path, 1)
    trajectories, advantages = batch
    {"latents": trajectories.latents, "log_probs": trajectories.log_probs, "advantages": advantages}[where][5] = torch.nan
    before = {name: value.detach().clone() for name, value in trainer.model.trainable().items()}
    units = torch.tensor([[0, 1], [4, 5], [2, 3]] if settings is D3PO else [2, 5, 6])
    rows = units[1].flatten()
    with pytest.raises(FloatingPointError, match="not finite") as error:
        trainer.update(trajectories, advantages, units, every_step(trainer))
    for name, value in trainer.model.trainable().items():
        assert torch.equal(value, before[name])
    (written,) = tmp_path.rglob("*.safetensors")
    assert str(written) in str(error.value)
    assert f"images {trajectories.ids[rows].tolist()} " in str(error.value)
    found = load_file(written)
    assert found["losses"].isfinite().all(1).tolist() == [True, False, True]
    assert torch.equal(found["latents"].isnan(), trajectories.latents[rows].isnan())
    assert len(found["latents"]) == len(rows)


def test_a_non_finite_stage_is_not_sampled(finished, overrides, tmp_path):
    """A policy that has turned to NaN stops in sampling: what is needed to look into it is on disk, the error names batch
    and groups, and no sample is written."""
    stage, lora = Stage(experiment(tmp_path), 0), tmp_path / LORA_FILE
    trained = Stage(experiment(finished), 1).checkpoints()[-1] / LORA_FILE
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(trained).items()}, lora)
    with pytest.raises(FloatingPointError, match=r"batch_00000.*groups \[0, 1\]"):
        run_stage(tmp_path, overrides | {"resume_from": str(lora)})
    assert [path.relative_to(stage.folder).as_posix() for path in stage.folder.rglob("*.*")] == [
        "debug/batch_00000.safetensors"
    ]
    assert load_file(stage.debug / "batch_00000.safetensors")["log_probs"].isnan().any()


def test_a_non_finite_reward_stops_the_selection(workplace, overrides, models, tmp_path):
    """A scorer that has turned to NaN: the scores are on disk, the error names the images, nothing is selected."""
    broken = shutil.copytree(models / "clip", tmp_path / "clip")
    weights = load_file(broken / "model.safetensors")
    save_file({name: torch.full_like(value, torch.nan) for name, value in weights.items()}, broken / "model.safetensors")
    settings = overrides | {"exp_name": "broken", "reward.clip.model": str(broken)}
    run_stage(tmp_path, settings, verbs=["sample"])
    with pytest.raises(FloatingPointError, match=r"images \[0, 1, 2"):
        run_stage(tmp_path, settings, verbs=["select"])
    stage = Stage(tmp_path / "model" / "lora" / "broken", 0)
    assert [json.loads(line)["reward"] for line in stage.scores.read_text().splitlines()] == [None] * 18
    assert not stage.finished("select")
    assert not stage.selection.exists()
