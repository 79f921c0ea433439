"""The objectives learn, through the library's own sampling, selection and updates, in a world whose answers are known."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from gaussian import SPREAD, GaussianWorld
from torch import Tensor

from b2diffurl.algorithm.advantages import advantages, edge_scores, normalise
from b2diffurl.algorithm.branching import branch_sample, denoise
from b2diffurl.algorithm.seeding import generator
from b2diffurl.algorithm.selection import owned_edges, select_all, select_pairs
from b2diffurl.algorithm.transition import transition
from b2diffurl.algorithm.tree import Tree
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import read_settings
from b2diffurl.experiment.stage import Stage
from b2diffurl.experiment.trajectories import Trajectories
from b2diffurl.models.policy import predictor
from b2diffurl.objectives import OBJECTIVES, Objective
from b2diffurl.phases.losses import NoisedLoss, make_loss
from b2diffurl.phases.train import make_units
from b2diffurl.phases.trainer import Trainer
from b2diffurl.runtime.batch_sizes import BatchSizes
from config.stage_process import get_config

PROMPTS = ["-2", "0", "1"]  # the means of their data
TARGET = 1.0  # how far above its prompt's mean an image is best
OPTIONS = {"clip_range": 0.1, "kl_weight": 0.02, "beta": 1.0, "scale": 1.0}
OPTIONS |= {"old_weight": 0.1, "base_weight": 0.01, "outside_weight": 0.01}  # of the objectives on noised images

NUM_STEPS, NUM_STAGES, NUM_GROUPS, NUM_BRANCHES = 6, 12, 12, 4
ALL_STEPS = Window(0, NUM_STEPS)


def reward_of(images: Tensor, prompts: list[str]) -> Tensor:
    """Minus the mean squared distance of images [N,C,h,w] to what is best for their prompts, [N]."""
    best = torch.tensor([float(prompt) for prompt in prompts]) + TARGET
    return -(images - best.view(-1, 1, 1, 1)).square().flatten(1).mean(1)


def expected_reward(world: GaussianWorld, num_steps: int = NUM_STEPS) -> Tensor:
    """Expected reward but for a constant, exactly: transitions are affine, so mean images come from mean noise, and theta
    does not move their variance."""
    sampler = world.sampler(num_steps)
    conditions = world.encode(PROMPTS)

    def predict(x_t: Tensor, i: int) -> Tensor:
        return world.predict(x_t, sampler.timesteps[i], conditions, conditions, 1.0)

    noise = torch.zeros(len(PROMPTS), *world.latent_shape)
    return reward_of(denoise(predict, sampler, noise, torch.zeros, range(num_steps)), PROMPTS).mean()


def with_options(name: str, values: dict[str, float]) -> Objective:
    found = OBJECTIVES[name]
    return replace(found, options=found.options(**{one.name: values[one.name] for one in fields(found.options)}))


def make_trainer(world: GaussianWorld, objective: str, window: Window, **options: float) -> Trainer:
    accelerator = Accelerator(cpu=True)
    config = get_config("b2")
    config.sample.num_steps, config.train.step_weight = NUM_STEPS, "none"
    settings = read_settings(config)
    training = replace(settings.training, objective=with_options(objective, OPTIONS | options))
    optimizer = torch.optim.AdamW(world.trainable().values(), lr=0.05)
    world.network, optimizer = accelerator.prepare(world.network, optimizer)
    return Trainer(
        stage=Stage(Path("nowhere"), 0),
        accelerator=accelerator,
        loss=make_loss(world, settings.sampling, training, window, old_lora(world)),
        optimizer=optimizer,
        max_grad_norm=1.0,
        sizes=BatchSizes(Path("nowhere"), torch.device("cpu"), {"train.micro_batch_size": 100_000}),
    )


def old_lora(world: GaussianWorld) -> dict[str, Tensor]:
    """The policy as it is now, which will have sampled what comes next."""
    return {name: parameter.detach().clone() for name, parameter in world.trainable().items()}


def sample(world: GaussianWorld, prompts: list[str], num_branches: int | Tree, window: Window, *key) -> Trajectories:
    """Trajectories of K branches, or of a tree's leaves, for each of the prompts [G], group by group."""
    tree = num_branches if isinstance(num_branches, Tree) else Tree((num_branches,))
    rng, sampler, conditions = generator(*key), world.sampler(NUM_STEPS), world.encode(prompts)

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=rng)

    latents, log_probs, _ = branch_sample(
        predictor(world, sampler.timesteps, conditions, conditions, guidance_scale=1.0),
        sampler,
        noise((len(prompts), *world.latent_shape)),
        noise,
        tree=tree,
        window=window,
    )
    rows = torch.arange(len(prompts)).repeat_interleave(tree.num_leaves)
    return Trajectories(
        torch.arange(len(rows)), latents.flatten(0, 1), log_probs.flatten(0, 1), rows, conditions, world.encode(["0"])
    )


def learn(objective: str, seed: int, *, sign: float = 1.0, **options: float) -> GaussianWorld:
    """Train theta on `sign` times the reward: reinforce on independent images and all of them, the others on pairs."""
    plain = OBJECTIVES[objective].single_pass
    num_branches, window = (1, ALL_STEPS) if plain else (NUM_BRANCHES, Window.last(4, NUM_STEPS))
    world = GaussianWorld()
    trainer = make_trainer(world, objective, window, **options)
    prompts = PROMPTS * (NUM_GROUPS * (NUM_BRANCHES if plain else 1) // len(PROMPTS))
    asked = [prompt for prompt in prompts for _ in range(num_branches)]
    for index in range(NUM_STAGES):
        everything = sample(world, prompts, num_branches, window, seed, index)
        rewards = sign * reward_of(everything.latents[:, -1], asked)
        scores = normalise(rewards, asked).unflatten(0, (-1, num_branches))
        selected = select_all(scores) if plain else select_pairs(scores, pos_threshold=0.5, neg_threshold=-0.5)
        rows = torch.tensor([one.group * num_branches + one.branch for one in selected])
        kept = Trajectories(
            rows, everything.latents[rows], everything.log_probs[rows], everything.prompt_ids[rows],
            everything.conditions, everything.unconditional,
        )  # fmt: skip
        weights = advantages(
            torch.tensor([one.score for one in selected]), clip=5.0, positive_weight=1.0, negative_weight=1.0
        )
        credit = weights[:, None].expand(-1, window.num_steps)
        units = make_units(selected, paired=trainer.loss.objective.paired)
        if isinstance(trainer.loss, NoisedLoss):
            trainer.loss = replace(trainer.loss, old_lora=old_lora(world))
        for epoch in range(1 if plain else 2):
            samples = trainer.loss.prepare(kept, generator(seed, index, "noise", epoch))
            trainer.update(samples, credit, units, range(len(trainer.loss.step_weight)))
    return world


# ---- the world ----


def test_the_closed_form_is_the_conditional_mean_of_the_noise():
    """E[eps | x_t] is the affine function of x_t whose error has mean 0 and no correlation with x_t; and its square error is
    what is left of a unit variance, alpha_bar s^2 / (alpha_bar s^2 + 1 - alpha_bar)."""
    world, num = GaussianWorld(), 400_000
    x_0, eps = torch.randn(2, num, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    x_0 = 1.5 + 0.25 + SPREAD * x_0
    torch.nn.init.constant_(world.network.theta, 0.25)
    for t in (1, 201, 601, 951):
        alpha_bar = world.scheduler.alphas_cumprod[t]
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
        with torch.no_grad():
            guess = world.predict(x_t.expand(-1, 1, 2, 2), torch.tensor(t), world.encode(["1.5"]), {}, 1.0)
        error = eps - guess[..., :1, :1]
        left = alpha_bar * SPREAD**2 / (alpha_bar * SPREAD**2 + 1 - alpha_bar)
        assert abs(error.mean()) < 5 / num**0.5
        assert abs((error * x_t).mean()) < 5 / num**0.5 * x_t.std()
        torch.testing.assert_close(error.var(), left, rtol=0.02, atol=0)


@pytest.mark.parametrize("theta", [0.0, 0.7])
def test_many_steps_sample_the_data(theta):
    """The recursion of 500 stochastic DDIM steps ends at the mean and deviation of the data, whose mean theta has moved;
    inside base_policy it has not."""
    world = GaussianWorld()
    torch.nn.init.constant_(world.network.theta, theta)
    sampler, conditions = world.sampler(500), world.encode(["-2"])

    @torch.no_grad()
    def moments() -> tuple[float, float]:
        x, variance = torch.zeros(1, *world.latent_shape), 1.0
        for i in range(500):
            both = torch.cat([x, x + 1])
            mu, sigma = transition(sampler, i, both, world.predict(both, sampler.timesteps[i], conditions, {}, 1.0))
            variance = (mu[1] - mu[0]).mean().item() ** 2 * variance + sigma.item() ** 2
            x = mu[:1]
        return x.mean().item(), variance**0.5

    assert moments() == pytest.approx((theta - 2, SPREAD), rel=0.02)
    with world.base_policy():
        assert moments() == pytest.approx((-2, SPREAD), rel=0.02)


# ---- learning ----


@pytest.mark.parametrize("objective", ["reinforce", "ddpo"])
def test_the_policy_gradient_is_the_gradient_of_the_expected_reward(objective):
    """All steps of many independent images, each with its reward less the mean as advantage: the trainer's gradient, times
    S and D because log-probs are means, is minus autograd's of the exact expected reward."""
    world = GaussianWorld()
    torch.nn.init.constant_(world.network.theta, 0.2)
    trainer = make_trainer(world, objective, ALL_STEPS)
    prompts = PROMPTS * 30_000
    images = sample(world, prompts, 1, ALL_STEPS, 0)
    rewards = reward_of(images.latents[:, -1], prompts)
    credit = (rewards - rewards.mean())[:, None].expand(-1, NUM_STEPS)
    trainer.accumulate(images, credit, torch.arange(len(prompts)), range(NUM_STEPS), size=100_000, apart=False)
    (exact,) = torch.autograd.grad(expected_reward(world), world.network.theta)
    torch.testing.assert_close(-trainer.gradient() * NUM_STEPS * exact.numel(), exact.flatten(), rtol=0.06, atol=0)


def test_edges_of_a_tree_give_the_gradient_of_the_expected_reward():
    """All distinct transitions of many trees, each with the score of its edge: with every step weighed alike, minus the
    trainer's gradient is autograd's of the exact expected reward. An edge is compared with a mean of k siblings that it is
    part of, which takes 1/k of its score; the first ones are compared with their prompt's mean."""
    world, tree = GaussianWorld(), Tree((2, 3), (2,))
    torch.nn.init.constant_(world.network.theta, 0.2)
    trainer, prompts = make_trainer(world, "ddpo", ALL_STEPS), PROMPTS * 10_000
    images = sample(world, prompts, tree, ALL_STEPS, 0)
    asked = [prompt for prompt in prompts for _ in range(tree.num_leaves)]
    rewards, depths = reward_of(images.latents[:, -1], asked), tree.depths(NUM_STEPS)
    units = {prompt: rewards[torch.tensor([one == prompt for one in asked])].std() for prompt in PROMPTS}
    credit = edge_scores(rewards, asked, tree=tree) * torch.stack([units[prompt] for prompt in asked])[:, None]
    owned = owned_edges(select_all(rewards.view(-1, tree.num_leaves)), tree)[:, depths]
    counts = owned.sum(0)
    assert counts.tolist() == [60_000] * 2 + [180_000] * 4
    alike = counts.sum() / (NUM_STEPS * counts) * torch.tensor([1.0, 3 / 2])[depths]
    trainer.loss = replace(trainer.loss, step_weight=alike)
    update = images, credit[:, depths], torch.arange(len(asked)), range(NUM_STEPS), owned
    trainer.accumulate(*update, size=200_000, apart=False)
    (exact,) = torch.autograd.grad(expected_reward(world), world.network.theta)
    torch.testing.assert_close(-trainer.gradient() * NUM_STEPS * exact.numel(), exact.flatten(), rtol=0.06, atol=0)


@pytest.mark.parametrize(("start", "stop"), [(2, 4), (0, 3), (4, 6)])
def test_any_window_is_trained_at_its_own_steps(start, stop):
    """Before the first update every ratio is exactly 1, and the gradient is that of the window's log-probabilities and of no
    other step's: autograd's, with each step's mean and deviation by the table of all T."""
    world, window = GaussianWorld(), Window(start, stop)
    torch.nn.init.constant_(world.network.theta, 0.2)
    trainer = make_trainer(world, "ddpo", window)
    images = sample(world, PROMPTS, 4, window, 0)
    credit = torch.randn(12, window.num_steps, generator=torch.Generator().manual_seed(1))
    (report,) = trainer.accumulate(images, credit, torch.arange(12), range(window.num_steps), size=100_000, apart=True)
    assert torch.equal(report.values.log_ratio, torch.zeros(window.num_steps, 12))
    assert report.timesteps == world.sampler(NUM_STEPS).timesteps[start:stop].tolist()
    table, conditions = world.sampler(NUM_STEPS), world.encode([prompt for prompt in PROMPTS for _ in range(4)])
    loss = torch.tensor(0.0)
    for step, i in enumerate(range(start, stop)):
        x_t, x_prev = images.latents[:, step], images.latents[:, step + 1]
        mu, sigma = transition(table, i, x_t, world.predict(x_t, table.timesteps[i], conditions, {}, 1.0))
        density = torch.distributions.Normal(mu, sigma).log_prob(x_prev).flatten(1).mean(1)
        torch.testing.assert_close(density.detach(), images.log_probs[:, step])
        loss = loss - (credit[:, step] * density).mean() / window.num_steps
    (expected,) = torch.autograd.grad(loss, world.network.theta)
    torch.testing.assert_close(trainer.gradient(), expected.flatten(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns_and_unlearns(objective, seed):
    """The expected reward rises under training, and falls where rewards are negated before anything is selected."""
    before = expected_reward(GaussianWorld())
    after, flipped = (expected_reward(learn(objective, seed, sign=sign)) for sign in (1.0, -1.0))
    assert after > before + 0.3
    assert flipped < before - 0.3


def test_a_dearer_divergence_keeps_the_policy_nearer_to_the_base():
    """dpok: the more a nat costs, the less theta moves; for nothing it moves as with ddpo, to the bit."""
    moved = [learn("dpok", 0, kl_weight=weight).network.theta for weight in (0.0, 1.0, 100.0)]
    distances = [theta.norm().item() for theta in moved]
    assert distances[0] > 2 * distances[1] > 4 * distances[2]
    assert torch.equal(moved[0], learn("ddpo", 0).network.theta)
