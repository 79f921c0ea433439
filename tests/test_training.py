"""One update at a time: its gradient, its divisor, its optimizer step, and when it refuses.

N selected trajectories, S trained steps
"""

import contextlib
import json
import re
import shutil
from functools import cache

import pytest
import torch
from conftest import experiment, make_config, run_stage
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from b2diffurl.checkpoint import load_optimizer, save_checkpoint
from b2diffurl.ddim import step_weights
from b2diffurl.experiment import make_plan
from b2diffurl.models import load_model
from b2diffurl.policy import load_policy
from b2diffurl.runtime import make_accelerator
from b2diffurl.selection import Selected
from b2diffurl.stage import LORA_FILE, Stage
from b2diffurl.train import Trainer, make_trainer, micro_batches, update_rows
from b2diffurl.trajectory import Trajectories, load_selected

CLIP_RANGE = 1e-3  # of the gradient tests: small enough for the off-policy ratios below to be clipped in part


@pytest.fixture
def bench(finished, overrides):
    """make(**settings) -> a Trainer on stage 1's window with stage 1's trained LoRA, so that no ratio is 1."""

    def make(**settings) -> Trainer:
        with contextlib.chdir(finished):
            plan = make_plan(make_config(overrides, run_name="stage1"))
            config = make_config(overrides, run_name="stage1", **({"train.eps": CLIP_RANGE} | settings))
            accelerator = make_accelerator(config, 1)
            source = plan.stage.checkpoints()[-1] / LORA_FILE
            model = load_policy(config, accelerator, source, decoder=False)
            return make_trainer(config, plan, accelerator, model, source)

    return make


@pytest.fixture
def batch(finished) -> tuple[Trajectories, Tensor]:
    """Stage 1's selected trajectories with their advantages."""
    stage = Stage(experiment(finished), 1)
    rows = json.loads(stage.selection.read_text())
    selected = [Selected(row["group"], row["branch"], row["score"]) for row in rows]
    return load_selected(stage, selected, 2), torch.tensor([row["advantage"] for row in rows])


def gradient(trainer: Trainer, trajectories: Trajectories, advantages: Tensor, rows: Tensor) -> tuple[Tensor, list]:
    trainer.optimizer.zero_grad()
    per_step = trainer.accumulate(trajectories, advantages, rows)
    return trainer.gradient().clone(), per_step


def difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def pair_gradients(trainer: Trainer, trajectories: Trajectories, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [N,S,parameters] and clip flag [N,S] of every pair on its own: the network called plainly, guidance
    written out, mu and sigma from stock diffusers, the density from torch.distributions, PPO's two cases by hand."""
    unet: UNet2DConditionModel = trainer.model.unet
    scheduler = DDIMScheduler.from_config(trainer.model.scheduler_config)
    scheduler.set_timesteps(4)
    num_rows, num_steps = trajectories.log_probs.shape
    gradients, flags = [], []
    for n in range(num_rows):
        text = trajectories.conditions["prompt_embeds"][trajectories.prompt_ids[n]][None]
        for step in range(num_steps):
            t = scheduler.timesteps[4 - num_steps + step]
            x_t, x_prev = trajectories.latents[n, step : step + 2].unsqueeze(1)
            without = unet(x_t, t, trajectories.unconditional["prompt_embeds"]).sample
            eps = without + 5.0 * (unet(x_t, t, text).sample - without)
            mu = scheduler.step(eps, t, x_t, eta=1.0, variance_noise=torch.zeros_like(x_t)).prev_sample
            sigma = scheduler._get_variance(t, t - 250).sqrt()
            log_ratio = torch.distributions.Normal(mu, sigma).log_prob(x_prev).mean() - trajectories.log_probs[n, step]
            ratio, advantage = log_ratio.exp(), advantages[n]
            cut = bool(ratio > 1 + CLIP_RANGE if advantage > 0 else ratio < 1 - CLIP_RANGE)
            trainer.optimizer.zero_grad()
            (-advantage * ratio * (0.0 if cut else 1.0)).backward()
            gradients.append(trainer.gradient().clone())
            flags.append(float(cut))
    return torch.stack(gradients).unflatten(0, (num_rows, num_steps)), torch.tensor(flags).view(num_rows, num_steps)


# ---- the gradient ----


def test_the_update_is_the_mean_over_all_pairs_computed_one_by_one(bench, batch):
    """Batched accumulation equals a loop over single pairs: its gradient is their mean over N*S, with and without step
    weights; each step's reported norm is that of its own share, its clip fraction that of its pairs."""
    trainer = bench()
    one_by_one, cut = pair_gradients(trainer, *batch)
    assert 0.0 < cut.mean() < 1.0
    num_rows, num_steps = cut.shape
    assert num_steps == 3
    for kind in ("none", "sigma", "leverage"):
        trainer.step_weight = step_weights(trainer.sampler, num_steps, kind)
        found, per_step = gradient(trainer, *batch, torch.arange(num_rows))
        shares = (one_by_one * trainer.step_weight[None, :, None]).sum(0) / (num_rows * num_steps)
        assert difference(found, shares.sum(0)) < 1e-4
        for step in range(num_steps):
            torch.testing.assert_close(per_step[step]["grad_norm"], shares[step].norm(), rtol=1e-3, atol=0)
            assert torch.equal(per_step[step]["clipped"], cut[:, step])
    assert trainer.step_weight.max() > 1.5


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_micro_batching_does_not_change_the_update(bench, batch, size):
    """Any micro-batch size gives the same gradient up to rounding, remainders included."""
    trainer = bench()
    rows = torch.arange(7)
    whole, _ = gradient(trainer, *batch, rows)
    trainer.micro_batch_size = size
    split, per_step = gradient(trainer, *batch, rows)
    assert difference(split, whole) < 1e-5
    assert all(len(step["loss"]) == 7 for step in per_step)


def test_a_remainder_is_divided_by_its_own_size(bench, batch):
    """An update on r trajectories is their mean: the updates of an epoch, weighted by their sizes, add up to the
    gradient of the whole epoch."""
    trainer = bench()
    num_rows = len(batch[0])
    whole, _ = gradient(trainer, *batch, torch.arange(num_rows))
    for sizes in ([num_rows - 1, 1], [4] * (num_rows // 4) + [num_rows % 4]):
        parts = [rows for rows in torch.arange(num_rows).split(sizes) if len(rows)]
        total = sum(gradient(trainer, *batch, rows)[0] * len(rows) for rows in parts) / num_rows
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


@pytest.mark.parametrize("num_rows", [1, 2, 5, 12])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_processes_share_an_update_without_loss(num_rows, num_processes, size):
    """Over all processes each row counts exactly once; all have as many micro-batches, of one shape, within the size."""
    rows = torch.arange(100, 100 + num_rows)
    shares = [micro_batches(rows, process, num_processes, size) for process in range(num_processes)]
    counted = [row for share in shares for part, counts in share for row in part[counts > 0].tolist()]
    assert sorted(counted) == rows.tolist()
    assert len({len(share) for share in shares}) == 1
    assert len({part.shape for share in shares for part, _ in share}) == 1
    assert all(len(part) <= size and set(counts.tolist()) <= {0.0, 1.0} for share in shares for part, counts in share)


def test_processes_add_up_to_one(bench, batch):
    """The mean over processes of their gradients, which is what DDP takes, is the gradient of one process."""
    trainer = bench()
    rows = torch.arange(7)
    whole, _ = gradient(trainer, *batch, rows)
    for num_processes in (2, 3):
        total = torch.zeros_like(whole)
        for process in range(num_processes):
            trainer.accelerator = Elsewhere(trainer.accelerator, process, num_processes)
            total += gradient(trainer, *batch, rows)[0] / num_processes
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
    report = trainer.update(*batch, rows)
    after = torch.cat([parameter.detach().flatten() for parameter in parameters])
    assert difference(after - before, expected - before) < 1e-3
    assert report["grad_norm"] > 1e-4
    assert trainer.gradient().abs().max() == 0


# ---- the stage ----


def updates(stage: Stage) -> list[dict]:
    events = [json.loads(line) for line in stage.metrics("train").read_text().splitlines()]
    return [event for event in events if event["event"] == "update"]


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
        tensors = load_file(stage.checkpoints()[-1] / LORA_FILE)
        assert all(not tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
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
    pretrained = {"family": "stable_diffusion", "model": root, "revision": "main", "variant": "", "resolution": 0}
    return load_model(pretrained, device=torch.device("cpu"), dtype=dtype, lora_rank=rank, seed=seed, decoder=False)


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


@pytest.mark.parametrize("where", ["latents", "log_probs", "advantages"])
def test_a_non_finite_loss_stops_the_update(bench, batch, tmp_path, where):
    """One poisoned trajectory of an update: nothing is stepped, the error names its image and no other, and the losses
    are on disk with its states."""
    trainer = bench()
    trainer.stage = Stage(tmp_path, 1)
    trajectories, advantages = batch
    {"latents": trajectories.latents, "log_probs": trajectories.log_probs, "advantages": advantages}[where][5] = torch.nan
    before = {name: value.detach().clone() for name, value in trainer.model.trainable().items()}
    rows = torch.tensor([2, 5, 6])
    with pytest.raises(FloatingPointError, match="not finite") as error:
        trainer.update(trajectories, advantages, rows)
    for name, value in trainer.model.trainable().items():
        assert torch.equal(value, before[name])
    (written,) = tmp_path.rglob("*.safetensors")
    assert str(written) in str(error.value)
    assert f"images [{trajectories.ids[5]}]" in str(error.value)
    found = load_file(written)
    assert found["losses"].isfinite().all(1).tolist() == [True, False, True]
    assert torch.equal(found["latents"][0].isnan(), trajectories.latents[5].isnan())
    assert len(found["latents"]) == 1


def test_a_non_finite_stage_is_not_sampled(finished, overrides, tmp_path):
    """A policy that has turned to NaN stops in sampling: what is needed to look into it is on disk, the error names batch
    and groups, and no sample is written."""
    stage, lora = Stage(experiment(tmp_path), 0), tmp_path / LORA_FILE
    trained = Stage(experiment(finished), 1).checkpoints()[-1] / LORA_FILE
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(trained).items()}, lora)
    with pytest.raises(FloatingPointError, match=r"batch_00000.*groups \[0, 1\]"):
        run_stage(tmp_path, overrides | {"resume_from": str(lora)})
    assert [path.name for path in stage.folder.iterdir()] == ["nonfinite_batch_0.safetensors"]
    assert load_file(stage.folder / "nonfinite_batch_0.safetensors")["log_probs"].isnan().any()


def test_a_non_finite_reward_stops_the_selection(workplace, overrides, models, tmp_path):
    """A scorer that has turned to NaN: the scores are on disk, the error names the images, nothing is selected."""
    broken = shutil.copytree(models / "clip", tmp_path / "clip")
    weights = load_file(broken / "model.safetensors")
    save_file({name: torch.full_like(value, torch.nan) for name, value in weights.items()}, broken / "model.safetensors")
    settings = overrides | {"exp_name": "broken", "reward.model": str(broken)}
    run_stage(tmp_path, settings, verbs=["sample"])
    with pytest.raises(FloatingPointError, match=r"images \[0, 1, 2"):
        run_stage(tmp_path, settings, verbs=["select"])
    stage = Stage(tmp_path / "model" / "lora" / "broken", 0)
    assert [json.loads(line)["reward"] for line in stage.scores.read_text().splitlines()] == [None] * 18
    assert not stage.finished("select")
    assert not stage.selection.exists()
