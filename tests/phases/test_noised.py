"""Stages of objectives on noised images: what is stored and trained, and that a killed one goes on to the same bits."""

import contextlib
import json
import shutil
from dataclasses import fields, replace

import pytest
import torch
from conftest import assert_same, experiment, make_config, plan, read_selected, run_script, run_stage, snapshot, updates_of
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from test_pipeline import lose_last_epoch

from b2diffurl.algorithm.selection import Selected
from b2diffurl.configuration.plan import make_plan
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.experiment.trajectories import Trajectories
from b2diffurl.models.policy import load_lora, load_policy
from b2diffurl.objectives import OBJECTIVES
from b2diffurl.phases.losses import NoisedImages, make_loss
from b2diffurl.phases.trainer import Trainer, make_trainer
from b2diffurl.runtime import threads
from b2diffurl.runtime.device import make_accelerator

NFT = {"train.objective": "nft", "train.noise_levels": 3, "train.base_weight": 0.5}
FORWARD = [name for name, objective in OBJECTIVES.items() if objective.on_noised_images]
PLAIN = {"sampling": "independent"}


def stage0(folder) -> Stage:
    return Stage(experiment(folder), 0)


# ---- what is stored ----


def test_a_stage_stores_its_images_alone(stage_with, finished):
    """One latent an image and no log-probability; images, prompts, scores and selection are those of any other objective."""
    forward, other = stage0(stage_with(**NFT)), stage0(finished)
    for batch in range(3):
        stored, whole = load_file(forward.batch(batch)), load_file(other.batch(batch))
        assert torch.equal(stored["latents"], whole["latents"][:, :, -1:])
        assert stored["log_probs"].shape == (2, 3, 0)
        assert stored["timesteps"].shape == (0,)
    assert snapshot(forward.images) == snapshot(other.images)
    for name in ("prompts.json", "scores.jsonl", "selection.json", "tree.png"):
        assert (forward.folder / name).read_bytes() == (other.folder / name).read_bytes()


@pytest.mark.parametrize("objective", FORWARD)
def test_at_the_first_update_the_policy_is_the_one_that_sampled(stage_with, objective):
    """The first log-ratio is exactly 0 in both stages; later ones are not. Distances to both policies are reported."""
    folder = stage_with(**NFT | {"train.objective": objective, "train.micro_batch_size": 100})
    updates = updates_of(stage0(folder))
    assert [update["max_abs_log_ratio"] for update in updates if update["first"]] == [0.0]
    assert all(update["max_abs_log_ratio"] > 0 for update in updates if not update["first"])
    assert updates[0]["old_distance"] == 0.0
    assert updates[-1]["old_distance"] > 0.0
    assert updates[0]["base_penalty"] == 0.0  # a fresh LoRA is the base


def test_the_levels_are_those_of_the_window(stage_with):
    """T = 4, S = 2: the two last steps begin at t = 251, and the middles of three bands of 0..251 are named."""
    update = updates_of(stage0(stage_with(**NFT)))[0]
    assert update["timesteps"] == [42, 126, 210]
    assert len(update["log_ratio_per_step"]) == 3


# ---- the update ----


@pytest.fixture
def trainer(stage_with, overrides):
    """A Trainer of nft after stage 0, whose old policy is the one before that stage, with the samples of the stage."""
    folder = stage_with(**NFT)
    with contextlib.chdir(folder):
        plan = make_plan(make_config(overrides | NFT, run_name="stage0"))
        accelerator = make_accelerator(plan.settings.compute)
        model = load_policy(plan.settings.model, accelerator, None, seed=300, compile=False, decoder=False)
        old = {name: parameter.detach().clone() for name, parameter in model.trainable().items()}
        source = plan.stage.checkpoints()[-1] / LORA_FILE
        load_lora(model, plan.settings.model, source)
        made = make_trainer(plan, accelerator, model, source, old)
        rows = json.loads(plan.stage.selection.read_text())
        selected = [Selected(row["group"], row["branch"], row["score"]) for row in rows]
        stored = read_selected(plan.stage, selected, 2)
    samples = made.loss.prepare(stored, torch.Generator().manual_seed(7))
    advantages = torch.tensor([row["advantage"] for row in rows])[:, None].repeat(1, 2)
    return made, samples, advantages


def gradient(trainer: Trainer, samples: NoisedImages, advantages, *, size: int, apart: bool = False) -> torch.Tensor:
    trainer.optimizer.zero_grad()
    trainer.accumulate(samples, advantages, torch.arange(len(samples)), range(3), size=size, apart=apart)
    return trainer.gradient().clone()


def test_the_update_is_the_mean_over_all_noised_images_computed_one_by_one(trainer):
    """Against the networks called plainly: noise by diffusers' add_noise, guidance written out, x̂_0 by diffusers' step, the
    old policy loaded from its tensors, the base with its adapters off."""
    made, samples, advantages = trainer
    model, options = made.model, made.loss.objective.options
    scheduler = DDIMScheduler.from_config(model.scheduler_config)
    scheduler.set_timesteps(len(scheduler.alphas_cumprod))
    text, without_text = samples.conditions["prompt_embeds"], samples.unconditional["prompt_embeds"]
    trained = {name: parameter.detach().clone() for name, parameter in model.trainable().items()}
    total = 0.0
    made.optimizer.zero_grad()

    def output(x_t, t, prompt):
        without = model.unet(x_t, t, without_text).sample
        return without + 5.0 * (model.unet(x_t, t, text[prompt][None]).sample - without)

    for n in range(len(samples)):
        for band in range(3):
            x_0, eps, t = samples.latents[n, -1][None], samples.eps[n, band][None], samples.level[n, band]
            x_t = scheduler.add_noise(x_0, eps, t[None])
            with torch.no_grad():
                for name, parameter in model.trainable().items():
                    parameter.copy_(made.loss.old_lora[name])
                old = output(x_t, t, samples.prompt_ids[n])
                for name, parameter in model.trainable().items():
                    parameter.copy_(trained[name])
                model.unet.disable_adapters()
                base = output(x_t, t, samples.prompt_ids[n])
                model.unet.enable_adapters()
            now = output(x_t, t, samples.prompt_ids[n])
            r = 0.5 + 0.5 * float((advantages[n, 0] / options.scale).clamp(-1, 1))
            loss = options.old_weight * (now - old).square().mean() + options.base_weight * (now - base).square().mean()
            for weight, out in ((r, old + options.beta * (now - old)), (1 - r, old - options.beta * (now - old))):
                error = scheduler.step(out, t, x_t).pred_original_sample - x_0
                loss = loss + weight * error.square().mean() / error.detach().abs().mean()
            (loss / (3 * len(samples))).backward()
            total += loss.item()
    expected = made.gradient().clone()
    found = gradient(made, samples, advantages, size=100)
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_micro_batching_does_not_change_the_update(trainer):
    """One by one, in threes, all at once, band by band or mixed: the same gradient up to rounding."""
    made, samples, advantages = trainer
    whole = gradient(made, samples, advantages, size=100)
    for size, apart in ((1, False), (3, False), (3, True), (100, True)):
        part = gradient(made, samples, advantages, size=size, apart=apart)
        assert (part - whole).norm() < 2e-5 * whole.norm()


def test_side_by_side_each_policy_is_the_right_one(trainer, side_by_side, monkeypatch):
    """While one thread has the old LoRA in place, or none, the other does not see it."""
    made, samples, advantages = trainer
    monkeypatch.setattr(threads, "MAX_AT_ONCE", 1)
    expected = gradient(made, samples, advantages, size=2)
    monkeypatch.setattr(threads, "MAX_AT_ONCE", 2)
    found = [gradient(made, samples, advantages, size=2) for _ in range(3)]
    assert made.twins.qsize() == 2
    assert (found[0] - expected).norm() < 2e-5 * expected.norm()
    assert all(torch.equal(again, found[0]) for again in found)


def test_images_without_an_advantage_only_feel_the_leash(trainer):
    """r = 1/2 everywhere, and the policy is the old one: no gradient at all but the base's."""
    made, samples, advantages = trainer
    objective = made.loss.objective
    free = replace(objective, options=replace(objective.options, base_weight=0.0))
    old_lora = {name: parameter.detach().clone() for name, parameter in made.model.trainable().items()}
    made.loss = replace(made.loss, objective=free, old_lora=old_lora)
    assert gradient(made, samples, advantages, size=100).any()
    assert not gradient(made, samples, 0 * advantages, size=100).any()


def test_a_level_takes_the_advantage_of_its_step(trainer):
    """Credit of the window's first step acts on the levels above t = 1 alone, that of the last one on those up to it."""
    made, samples, advantages = trainer
    samples = replace(samples, level=torch.tensor([0, 1, 2]).expand(len(samples), -1))
    parts = [gradient(made, samples, advantages * torch.tensor(mask), size=1) for mask in ([1.0, 0.0], [0.0, 1.0])]
    first = gradient(made, replace(samples, level=samples.level[:, [2]].expand(-1, 3)), advantages, size=1)
    assert not torch.equal(*parts)
    assert made.loss.step_of[[0, 1, 2]].tolist() == [1, 1, 0]
    assert first.any()


def test_a_compiled_network_is_given_the_same_number_of_rows_by_every_policy(trainer, overrides, tmp_path, monkeypatch):
    """Compiling takes minutes for each number of rows. Otherwise the base policy sees the levels outside alone."""
    made, samples, advantages = trainer
    one = plan(tmp_path, overrides | NFT | {"train.base_weight": 0.0, "train.outside_weight": 4.0})
    samples = replace(samples, level=torch.tensor([0, 500, 999]).expand(len(samples), -1))  # the window ends at 251
    seen, gradients = [], []
    monkeypatch.setattr(made.model, "predict", watched(made.model.predict, seen))
    for constant in (False, True):
        seen.append([])
        settings = one.settings.sampling, one.settings.training, one.window, made.loss.old_lora
        made.loss = make_loss(made.model, *settings, constant_shape=constant)
        gradients.append(gradient(made, samples, advantages, size=3 * len(samples)))
    assert seen == [[3 * len(samples), 2 * len(samples), 3 * len(samples)], 3 * [3 * len(samples)]]
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_copies_without_a_prompt_are_only_held_to_the_base(trainer, overrides, tmp_path, monkeypatch):
    """Sampled with guidance and trained without: some copies have the unconditional embedding. They feel no advantage, and
    at weight 4 the distance to the base alone. Trained with guidance there are none."""
    made, samples, advantages = trainer
    for guided, expected in ((0.0, 0), (1.0, round(0.2 * samples.level.numel()) // 2)):
        one = plan(tmp_path, overrides | NFT | {"train.outside_weight": 4.0, "train.guidance_scale": guided})
        made.loss = make_loss(made.model, one.settings.sampling, one.settings.training, one.window, made.loss.old_lora)
        prepared = made.loss.prepare(samples_of(samples), torch.Generator().manual_seed(7))
        assert prepared.unprompted.sum() == expected
    prepared = replace(prepared, unprompted=torch.ones_like(prepared.unprompted))
    texts, predict = [], made.model.predict
    monkeypatch.setattr(
        made.model, "predict", lambda x, t, text, *rest, **named: texts.append(text) or predict(x, t, text, *rest, **named)
    )
    found = gradient(made, prepared, advantages, size=100)
    without_text = samples.unconditional["prompt_embeds"]
    assert len(texts) == 3  # the old policy, the base, the policy
    assert all(text["prompt_embeds"].eq(without_text).all() for text in texts)
    assert found.any()
    assert torch.equal(found, gradient(made, prepared, -advantages, size=100))
    made.optimizer.zero_grad()
    rows, band = torch.arange(len(samples)).repeat(3), torch.arange(3).repeat_interleave(len(samples))
    level, eps = prepared.level[rows, band], prepared.eps[rows, band]
    x_t = made.loss.levels.x_t(level, samples.latents[rows, -1], eps)
    call = x_t, made.loss.levels.timesteps[level], without_text.expand(len(rows), -1, -1)
    with torch.no_grad(), made.model.base_policy():
        base = made.model.unet(*call).sample
    (4.0 * (made.model.unet(*call).sample - base).square().mean()).backward()
    assert (found - made.gradient()).norm() < 1e-5 * found.norm()


def samples_of(noised: NoisedImages) -> Trajectories:
    """The images without the noise of an update."""
    return Trajectories(**{field.name: getattr(noised, field.name) for field in fields(Trajectories)})


def watched(predict, seen: list[list[int]]):
    """`predict`, which notes the number of its rows in the last list of `seen`."""

    def noting(x_t, *given, **named):
        seen[-1].append(len(x_t))
        return predict(x_t, *given, **named)

    return noting


# ---- killed ----


@pytest.mark.parametrize("objective", FORWARD)
def test_interrupted_after_an_epoch(stage_with, overrides, tmp_path, objective):
    """Training left in its second epoch ends in the same bits: the old policy is the one that sampled, and not what the LoRA
    was on resuming, and each update's noise is its own."""
    settings = NFT | {"train.objective": objective}
    finished = stage_with(**settings)
    folder = shutil.copytree(finished, tmp_path / "copy")
    lose_last_epoch(stage0(folder))
    run_stage(folder, overrides | settings, verbs=["train"])
    assert_same(folder, finished)


# ---- other samplers ----


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"sample.eta": 0.0}, marks=pytest.mark.long),
        {"sample.scheduler": "DPMSolverMultistep"},
        pytest.param({"sample.scheduler": "EulerAncestralDiscrete"}, marks=pytest.mark.long),
    ],
)
def test_images_of_any_sampler_can_be_trained_on(stage_with, overrides, settings):
    """Without noise, and by schedulers of diffusers: a stage samples, trains and is judged with them."""
    folder = stage_with(**NFT, **PLAIN, **settings)
    assert updates_of(stage0(folder))
    assert load_file(stage0(folder).batch(0))["latents"].isfinite().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sample.eta": 0.0}, "ddpo needs the log-probability of a step, and a step without noise has none"),
        ({"sample.scheduler": "Euler"}, "ddpo is trained on steps with a log-probability"),
        ({"train.guidance_scale": 1.0}, "ddpo is trained on the steps that were sampled"),
        (NFT | {"sample.eta": 0.0}, "without noise the branches of a prefix are all alike"),
        (NFT | {"sample.scheduler": "Euler"}, "which cannot part into branches"),
        (NFT | PLAIN | {"sample.scheduler": "Euler", "sample.prefix_eta": 0.0}, "must be -1: it has no steps before"),
        (NFT | PLAIN | {"sample.scheduler": "Oiler"}, "unknown sample.scheduler 'Oiler'"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides, tmp_path, settings, words):
    ended = run_script(tmp_path, "sample", overrides | settings)
    assert ended.code == 2
    assert words in ended.stderr
