"""One update at a time: its gradient, its divisor, its optimizer step, and when it refuses.

N selected trajectories, S trained steps, U units: trajectories or pairs of them
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from conftest import experiment, make_config, read_selected
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from b2diffurl.algorithm.selection import Selected
from b2diffurl.algorithm.transition import step_weights
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.plan import make_plan
from b2diffurl.configuration.settings import read_settings
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.experiment.trajectories import Trajectories
from b2diffurl.models.policy import load_policy
from b2diffurl.objectives import Objective
from b2diffurl.objectives.options import NoOptions
from b2diffurl.phases.trainer import Trainer, make_trainer, micro_batches
from b2diffurl.phases.update_report import UpdateReport, update_metrics
from b2diffurl.runtime import threads
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
            old_lora = {name: parameter.detach().clone() for name, parameter in model.trainable().items()}
            return make_trainer(plan, accelerator, model, source, old_lora)

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
    (report,) = trainer.accumulate(trajectories, advantages, units, every_step(trainer), size=size, apart=apart)
    return trainer.gradient().clone(), report


def sum_of_siblings(trainer: Trainer, trajectories: Trajectories, advantages: Tensor, units: Tensor) -> Tensor:
    """d3po's gradient with the worse sibling's part added and not subtracted: what rounding is relative to.

    The parts of two siblings nearly cancel (to a seventh here), and what is left keeps the rounding of both.
    """

    def loss(log_prob: Tensor, old_log_prob: Tensor, base_log_prob: Tensor, *, beta: float):
        better, worse = log_prob - base_log_prob
        slope = beta * torch.sigmoid(-beta * (better - worse)).detach()
        metrics = {"log_ratio": log_prob.detach() - old_log_prob, "clipped": torch.zeros_like(log_prob)}
        return -slope * (better + worse), metrics

    trainer.loss = replace(trainer.loss, objective=replace(trainer.loss.objective, loss=loss))
    return gradient(trainer, trajectories, advantages, units)[0]


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


def test_side_by_side_the_gradient_is_the_same(bench, batch, side_by_side, monkeypatch):
    """Up to rounding it is that of one thread, and to the bit the same again, whichever thread is faster."""
    monkeypatch.setattr(threads, "MAX_AT_ONCE", 1)
    alone, expected = gradient(bench(), *batch, UNITS["ddpo"])
    monkeypatch.setattr(threads, "MAX_AT_ONCE", 2)
    trainer, before = bench(num_threads=2, **{"train.micro_batch_size": 2}), None
    for slow in (0, 1, 0):
        delays = itertools.cycle([0.02 * slow, 0.02 * (1 - slow)])
        monkeypatch.setattr(trainer, "gradient_by_twin", delayed(Trainer.gradient_by_twin.__get__(trainer), delays))
        found, report = gradient(trainer, *batch, UNITS["ddpo"])
        assert trainer.twins.qsize() == 2
        assert difference(found, alone) < 1e-5
        assert before is None or torch.equal(found, before)
        before = found
        torch.testing.assert_close(report.values.loss, expected.values.loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(report.step_norms, expected.step_norms, rtol=1e-4, atol=1e-8)
    # An update moves the weights that the twins share.
    trainer.update(*batch, UNITS["ddpo"], every_step(trainer))
    twin = trainer.twins.get().policy.model
    for name, parameter in trainer.model.trainable().items():
        assert torch.equal(twin.trainable()[name], parameter)


def delayed(work: Callable, delays: Iterator[float]) -> Callable:
    def later(*arguments):
        time.sleep(next(delays))
        return work(*arguments)

    return later


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
        trainer.loss = replace(trainer.loss, step_weight=step_weights(trainer.loss.table, trainer.loss.window, kind))
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


def test_a_transition_that_is_not_owned_is_not_trained(bench, batch):
    """The gradient is the mean over the transitions that are owned, computed one by one, the network sees no other, and so
    do several processes and micro-batches; a step's report is of its own units, and the loss the mean over all of them."""
    trainer, (trajectories, advantages) = bench(), batch
    num_rows, num_steps = advantages.shape
    owned = torch.ones(num_rows, num_steps, dtype=torch.bool)
    owned[[1, 2, 5], 0] = owned[[2, 5], 1] = False
    seen = []
    predict = trainer.model.predict
    trainer.model.predict = lambda x_t, *more, **options: (seen.append(len(x_t)), predict(x_t, *more, **options))[1]
    gradients = one_by_one(trainer, surrogate(trainer, trajectories, advantages)[0], num_rows, num_steps)
    expected = gradients[owned].sum(0) / 16

    def found(**how) -> tuple[Tensor, list[UpdateReport]]:
        trainer.optimizer.zero_grad()
        reports = trainer.accumulate(*batch, torch.arange(num_rows), every_step(trainer), owned, **how)
        return trainer.gradient().clone(), reports

    whole, reports = found(size=100, apart=True)
    assert difference(whole, expected) < 1e-4
    assert (seen, [report.units.tolist() for report in reports]) == ([4, 5, 7], [[0, 3, 4, 6], [0, 1, 3, 4, 6], [*range(7)]])
    for size, apart in ((3, True), (5, False), (100, False)):
        assert difference(found(size=size, apart=apart)[0], whole) < 1e-5
    shares = [gradients[owned[:, step], step].sum(0) / 16 for step in range(num_steps)]
    metrics = update_metrics(reports, torch.tensor(1.0))
    assert metrics["grad_norm_per_step"] == pytest.approx([share.norm().item() for share in shares], rel=1e-3)
    assert metrics["loss"] == pytest.approx(sum(report.values.loss.sum().item() for report in reports) / 16, rel=1e-5)
    total = torch.zeros_like(whole)
    for process in range(2):
        trainer.accelerator = Elsewhere(trainer.accelerator, process, 2)
        total += found(size=3, apart=True)[0] / 2
        trainer.accelerator = trainer.accelerator.real
    assert difference(total, whole) < 1e-5


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
    size_of_terms = sum_of_siblings(bench(**settings), *batch, units).norm() if settings else whole.norm()
    shapes = [
        *itertools.product((1, 4, 5, 14), (True, False), (False,)),
        (5, False, True),
        (100, True, True),
        (100, False, False),
    ]
    for size, apart, constant in shapes:
        trainer.sizes.sizes["train.micro_batch_size"], trainer.constant_shape = size, constant
        split, report = gradient(trainer, *batch, units, apart=apart)
        assert (split - whole).norm() / size_of_terms < 1e-5
        torch.testing.assert_close(report.values.loss, looped.values.loss, rtol=1e-4, atol=1e-6)
        assert torch.equal(report.units, units)
        assert (report.step_norms is not None) == (apart or constant or size < 2 * units.numel())


@pytest.mark.parametrize("settings", [pytest.param({}, id="ddpo", marks=pytest.mark.long), pytest.param(D3PO, id="d3po")])
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


@pytest.mark.parametrize("settings", [pytest.param({}, id="ddpo"), pytest.param(D3PO, id="d3po", marks=pytest.mark.long)])
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


def test_an_update_that_fp16_skipped_is_not_averaged(bench, batch, monkeypatch):
    """After a step that was made a tenth of the average is what it was, and nine tenths are the LoRA; a step that the loss
    scaler has skipped leaves it alone."""
    trainer = bench(**{"train.ema": 0.9})
    before = {name: value.clone() for name, value in trainer.average.tensors.items()}
    trainer.update(*batch, UNITS["ddpo"], every_step(trainer))
    averaged = {name: value.clone() for name, value in trainer.average.tensors.items()}
    for name, value in trainer.model.adapter_state().items():
        torch.testing.assert_close(averaged[name], 0.1 * before[name] + 0.9 * value, rtol=1e-6, atol=1e-9)
    assert any(not torch.equal(averaged[name], before[name]) for name in before)
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", True)
    trainer.update(*batch, UNITS["ddpo"], every_step(trainer))
    assert all(torch.equal(averaged[name], value) for name, value in trainer.average.tensors.items())
    assert (trainer.average.num_updates, trainer.num_updates) == (1, 2)
    assert bench().average is None


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
        weights = {"window": Window(2, 4), "step_weight": torch.ones(2)}
        loss = replace(bench(fresh=fresh).loss, **weights, objective=Objective(everything, NoOptions()))
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
