"""The objectives against their formulas worked by hand, in their limiting cases, and against each other."""

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from b2diffurl.objectives import OBJECTIVES, Objective

CLIP = 0.1
OPTIONS = {  # of the tests that want some
    "ddpo": {"clip_range": CLIP},
    "reinforce": {},
    "dpok": {"clip_range": CLIP, "kl_weight": 0.5},
    "d3po": {"beta": 2.0},
    "nft": {"old_weight": 0.5, "base_weight": 0.25, "outside_weight": 3.0, "beta": 0.5, "scale": 2.0},
    "awm": {"old_weight": 0.5, "base_weight": 0.25, "outside_weight": 3.0, "clip_range": 0.2},
}
NOISED = [name for name, objective in OBJECTIVES.items() if objective.on_noised_images]


def at(name: str, options: dict[str, float], **tensors: float | list) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, its gradient by each tensor that has one, and metrics; in float64."""
    values = {key: torch.tensor(value, dtype=torch.float64, requires_grad=True) for key, value in tensors.items()}
    loss, metrics = OBJECTIVES[name].loss(*(values[key] for key in OBJECTIVES[name].terms), **options)
    loss.sum().backward()
    return loss.detach(), {key: value.grad for key, value in values.items() if value.grad is not None}, metrics


def at_ratio(name: str, ratio: float, advantage: float, options: dict[str, float], **tensors: float):
    """The same for one transition whose probability is `ratio` times what it was."""
    log_probs = {"log_prob": [-1.0 + math.log(ratio)], "old_log_prob": [-1.0], "advantage": [advantage]}
    return at(name, options, **log_probs, **{key: [value] for key, value in tensors.items()})


def random_tensors(name: str, num: int = 6) -> list[Tensor]:
    """An objective's tensors for `num` units, small enough that some are clipped and some are not."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, num) if OBJECTIVES[name].paired else (num,)
    images = ("output", "old_output", "base_output", "target")
    tensors = {
        term: 0.1 * torch.randn((*shape, 1, 2, 2) if term in images else shape, generator=generator)
        for term in OBJECTIVES[name].terms
    }
    return [*(tensors | {"trained": (torch.arange(num) % 3 > 0).float()} if "trained" in tensors else tensors).values()]


# ---- by hand ----


SURROGATE = [  # ratio, advantage, loss, gradient by log_prob, clipped
    (1.00, 2.0, -2.0, -2.0, 0),  # at the old policy: the plain policy gradient
    (1.05, 2.0, -2.1, -2.1, 0),  # inside the range: weighted by the ratio
    (1.20, 2.0, -2.2, 0.0, 1),  # a good action made likely enough: no more push
    (0.80, 2.0, -1.6, -1.6, 0),  # a good action made unlikely: pushed back however far
    (1.00, -2.0, 2.0, 2.0, 0),
    (0.95, -2.0, 1.9, 1.9, 0),
    (0.80, -2.0, 1.8, 0.0, 1),  # a bad action made unlikely enough
    (1.20, -2.0, 2.4, 2.4, 0),  # a bad action made likely: pushed back however far
    (1.20, 0.0, 0.0, 0.0, 0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient", "clipped"), SURROGATE)
def test_clipped_surrogate_by_hand(ratio, advantage, loss, gradient, clipped):
    """ddpo: -min(ratio A, clip(ratio) A), its derivative by log_prob, and whether the clip cut that derivative."""
    found, gradients, metrics = at_ratio("ddpo", ratio, advantage, OPTIONS["ddpo"])
    assert (found.item(), gradients["log_prob"].item(), metrics["clipped"].item()) == pytest.approx(
        (loss, gradient, clipped)
    )
    assert metrics["log_ratio"].item() == pytest.approx(math.log(ratio))


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient", "clipped"), SURROGATE)
def test_a_penalty_by_hand(ratio, advantage, loss, gradient, clipped):
    """dpok: a KL of 3 at weight 0.5 adds 1.5 to ddpo's loss and nothing to what it says of the log-prob, clipped or not; a
    nat of KL always costs its weight."""
    found, gradients, metrics = at_ratio("dpok", ratio, advantage, OPTIONS["dpok"], kl=3.0)
    assert found.item() == pytest.approx(loss + 1.5)
    assert (gradients["log_prob"].item(), gradients["kl"].item()) == pytest.approx((gradient, 0.5))
    assert (metrics["clipped"].item(), metrics["kl"].item()) == (clipped, 3.0)


@pytest.mark.parametrize(("ratio", "advantage"), [row[:2] for row in SURROGATE])
def test_the_score_function_by_hand(ratio, advantage):
    """reinforce: -A log p with derivative -A, however far the policy has gone; it only reports how far."""
    loss, gradients, metrics = at_ratio("reinforce", ratio, advantage, {})
    assert (loss.item(), gradients["log_prob"].item()) == pytest.approx((-advantage * (-1 + math.log(ratio)), -advantage))
    assert (metrics["log_ratio"].item(), metrics["clipped"].item()) == (pytest.approx(math.log(ratio)), 0)


@pytest.mark.parametrize(
    ("beta", "better", "worse", "margin", "loss", "gradient", "saturated"),
    [
        (2.0, 0.0, 0.0, 0.0, math.log(2), 1.0, 0),  # no preference yet: half of beta
        (2.0, 0.3, -0.2, 1.0, 0.3132617, 0.5378828, 0),  # right by one: log(1 + 1/e), 2 / (1 + e)
        (2.0, -0.3, 0.2, -1.0, 1.3132617, 1.4621172, 0),  # wrong by one: log(1 + e), 2 e / (1 + e)
        (2.0, 5.0, 5.0, 0.0, math.log(2), 1.0, 0),  # both likelier than the base: no preference
        (1.0, 2.9, 0.0, 2.9, 0.0535628, 0.0521536, 0),
        (1.0, 3.0, 0.0, 3.0, 0.0485874, 0.0474259, 1),  # less than 0.05 of beta: a tenth of the start
    ],
)
def test_preferences_by_hand(beta, better, worse, margin, loss, gradient, saturated):
    """d3po: -log sigmoid(beta (better - worse)) of the two log-ratios to the base; its derivatives by both log-probs."""
    base, old = [[-1.3], [-0.8]], [[-1.0], [-1.0]]
    log_prob = [[-1.3 + better], [-0.8 + worse]]
    found, gradients, metrics = at("d3po", {"beta": beta}, log_prob=log_prob, old_log_prob=old, base_log_prob=base)
    assert found.tolist() == pytest.approx([loss], abs=1e-6)
    assert gradients["log_prob"].flatten().tolist() == pytest.approx([-gradient, gradient], abs=1e-6)
    assert metrics["margin"].tolist() == pytest.approx([margin])
    assert metrics["clipped"].tolist() == [saturated]
    assert metrics["log_ratio"].flatten().tolist() == pytest.approx([-0.3 + better, 0.2 + worse])


# ---- limiting cases ----


def test_gradient_at_the_old_policy_is_reinforce():
    """At ratio 1 ddpo's gradient is REINFORCE's for every pair, whatever the clip range, and so is dpok's at a KL of 0."""
    old, advantage = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).tolist()
    tensors = {"log_prob": old, "old_log_prob": old, "advantage": advantage, "kl": [0.0] * 50}
    _, expected, _ = at("reinforce", {}, **tensors)
    for clip_range in (1e-4, 0.1, 0.5):
        for name, options in [("ddpo", {}), ("dpok", {"kl_weight": 0.5})]:
            _, gradients, metrics = at(name, {"clip_range": clip_range} | options, **tensors)
            assert torch.equal(gradients["log_prob"], expected["log_prob"])
            assert not metrics["log_ratio"].any() and not metrics["clipped"].any()


def test_the_loss_bounds_the_surrogate_from_above():
    """PPO's objective is pessimistic: the loss is never below -ratio A."""
    log_prob, old, advantage = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    loss, metrics = OBJECTIVES["ddpo"].loss(log_prob, old, advantage, clip_range=CLIP)
    assert (loss >= -advantage * (log_prob - old).exp()).all()
    assert 0 < metrics["clipped"].mean() < 1


def test_no_weight_is_no_penalty():
    """At kl_weight 0 dpok is ddpo to the bit: loss, gradient and metrics."""
    log_prob, old, advantage, kl = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)).tolist()
    tensors = {"log_prob": log_prob, "old_log_prob": old, "advantage": advantage}
    loss, gradients, metrics = at("dpok", {"clip_range": CLIP, "kl_weight": 0.0}, **tensors, kl=kl)
    expected, plain, described = at("ddpo", {"clip_range": CLIP}, **tensors)
    assert torch.equal(loss, expected)
    assert torch.equal(gradients["log_prob"], plain["log_prob"])
    assert not gradients["kl"].any()
    assert metrics.keys() - described.keys() == {"kl"}
    assert all(torch.equal(metrics[key], value) for key, value in described.items())


def test_a_small_beta_is_half_the_plain_preference_gradient():
    """As beta -> 0, d3po's gradient over beta tends to 1/2 that of worse minus better log-prob, whatever the margin; the
    difference is of the order of beta."""
    log_prob, old, base = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0)).tolist()
    limit = torch.tensor([[-0.5], [0.5]], dtype=torch.float64).expand(2, 50)
    for beta in (1e-3, 1e-6):
        loss, gradients, _ = at("d3po", {"beta": beta}, log_prob=log_prob, old_log_prob=old, base_log_prob=base)
        assert (gradients["log_prob"] / beta - limit).abs().max() < 2 * beta
        assert (loss - math.log(2)).abs().max() < 5 * beta


def test_a_large_margin_pushes_no_more_and_a_wrong_one_no_harder():
    """A preference that is won by far has neither loss nor gradient; of one that is lost by far the gradient is beta, and
    the loss beta times the distance: no overflow on either side."""
    tensors = {"old_log_prob": [[0.0], [0.0]], "base_log_prob": [[0.0], [0.0]]}
    loss, gradients, metrics = at("d3po", {"beta": 2.0}, log_prob=[[1000.0], [-1000.0]], **tensors)
    assert (loss.item(), metrics["clipped"].item()) == (0.0, 1.0)
    assert not gradients["log_prob"].any()
    loss, gradients, metrics = at("d3po", {"beta": 2.0}, log_prob=[[-1000.0], [1000.0]], **tensors)
    assert (loss.item(), metrics["clipped"].item()) == (4000.0, 0.0)
    assert gradients["log_prob"].flatten().tolist() == [-2.0, 2.0]


# ---- on noised images; a latent has two dimensions here ----


def noised(
    name: str, *, output, old, base, target, advantage: float, gain: float = 1.0, trained: float = 1.0, **options: float
):
    """The loss of one noised image, its gradient by the output [2], and the metrics."""
    images = {"output": output, "old_output": old, "base_output": base, "target": target}
    tensors = {key: [[[value]]] for key, value in images.items()}  # [N,C,h,w] = [1,1,1,2]
    numbers = {"gain": [gain], "advantage": [advantage], "trained": [trained]}
    asked = {key: value for key, value in (tensors | numbers).items() if key in OBJECTIVES[name].terms}
    loss, gradients, metrics = at(name, OPTIONS[name] | options, **asked)
    return loss.item(), gradients["output"].flatten().tolist(), metrics


FREE = {"old_weight": 0.0, "base_weight": 0.0, "outside_weight": 0.0}


@pytest.mark.parametrize(
    ("advantage", "loss", "gradient"),
    [
        # out+ = (1.5, 0) and out- = (0.5, 0) are the errors, too: 2 (9/8) / (3/4) = 3 and 2 (1/8) / (1/4) = 1.
        (2.0, 3.0, [2.0, 0.0]),  # wholly good: 2 (error+ beta) / (3/4), as the mean of two dimensions
        (-2.0, 1.0, [-2.0, 0.0]),  # wholly bad: away, by the mirror image
        (9.0, 3.0, [2.0, 0.0]),  # no better than wholly good
        (0.0, 2.0, [0.0, 0.0]),  # neither: both pulls are of equal strength
        (1.0, 2.5, [1.0, 0.0]),  # r = 3/4
    ],
)
def test_drawn_and_pushed_by_hand(advantage, loss, gradient):
    """nft: both pulls, their weights r and 1 - r, and the derivative through the output alone, at gain 2 and beta 1/2."""
    given = {"output": [2.0, 0.0], "old": [1.0, 0.0], "base": [9.0, 9.0], "target": [0.0, 0.0]}
    found, by_output, metrics = noised("nft", **given, advantage=advantage, gain=2.0, **FREE)
    assert found == pytest.approx(loss)
    assert by_output == pytest.approx(gradient)
    assert metrics["log_ratio"].item() == pytest.approx(0.5 - 2.0)  # the old policy's error was 1/2, this one's is 2
    assert not metrics["clipped"].any()


def test_a_matching_loss_as_likelihood_by_hand():
    """awm: the ratio is exp of the difference of the two errors, clipped as in ddpo."""
    given = {"old": [1.0, 0.0], "base": [9.0, 9.0], "target": [0.0, 0.0]}
    found, by_output, metrics = noised("awm", **given, output=[0.9, 0.0], advantage=2.0, **FREE)
    log_ratio = 0.5 - 0.405
    assert found == pytest.approx(-2 * math.exp(log_ratio))
    assert by_output == pytest.approx([2 * math.exp(log_ratio) * 0.9, 0.0])
    assert metrics["log_ratio"].item() == pytest.approx(log_ratio)
    found, by_output, metrics = noised("awm", **given, output=[0.0, 0.0], advantage=2.0, **FREE)
    assert (found, by_output, metrics["clipped"].item()) == (pytest.approx(-2.4), [0.0, 0.0], 1.0)


@pytest.mark.parametrize("name", NOISED)
def test_the_leash_by_hand(name):
    """Each distance adds its weight times the mean square of the difference, whatever the advantage."""
    given = {"output": [2.0, 0.0], "old": [1.0, 0.0], "base": [2.0, 4.0], "target": [0.0, 0.0], "advantage": 0.7}
    free, free_gradient, _ = noised(name, **given, **FREE)
    held, held_gradient, metrics = noised(name, **given)
    assert held - free == pytest.approx(0.5 * 0.5 + 0.25 * 8.0)
    assert [b - a for a, b in zip(free_gradient, held_gradient, strict=True)] == pytest.approx([0.5 * 1.0, -0.25 * 4.0])
    assert (metrics["old_distance"].item(), metrics["base_penalty"].item()) == (0.5, 2.0)
    outside, gradient, metrics = noised(name, **given, trained=0.0)
    assert (outside, metrics["base_penalty"].item()) == (24.0, 24.0)  # 3 times 8, and nothing else
    assert metrics["log_ratio"].item() == 0  # what is only held there says nothing of what was learnt
    assert gradient == pytest.approx([0.0, -3.0 * 4.0])


@pytest.mark.parametrize("gain", [0.5, 3.0])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_at_the_old_policy_the_gradient_is_the_policy_gradient(beta, gain):
    """nft at output = old_output: the gradient is beta gain (2r - 1) 2 (old - target) / (D mean |old - target|), and awm's
    is -A times that of the squared error: both go along A (target - output)."""
    generator = torch.Generator().manual_seed(1)
    old, target, advantage = (
        torch.randn(shape, generator=generator).double() for shape in ((5, 1, 2, 3), (5, 1, 2, 3), (5,))
    )
    rows = {"base": old, "target": target, "gain": torch.full((5,), gain).double()}
    rows |= {"advantage": advantage, "trained": torch.ones(5).double()}

    def gradient(name: str, **options: float) -> Tensor:
        output = old.clone().requires_grad_()
        tensors = rows | {"output": output, "old_output": old, "base_output": None}
        loss, _ = OBJECTIVES[name].loss(*(tensors[term] for term in OBJECTIVES[name].terms), **FREE, **options)
        return torch.autograd.grad(loss.sum(), output)[0]

    error, each = old - target, (-1, 1, 1, 1)
    strength = beta * gain * (advantage / 2).clamp(-1, 1) / error.abs().flatten(1).mean(1)
    expected = strength.view(each) * 2 * error / 6
    assert torch.allclose(gradient("nft", beta=beta, scale=2.0), expected, rtol=1e-12)
    assert torch.allclose(gradient("awm", clip_range=0.2), advantage.view(each) * 2 * error / 6, rtol=1e-12)


def test_an_undecided_image_has_no_gradient():
    """nft with r = 1/2 everywhere: exactly 0 at the old policy, in float32, and no pull of one kind elsewhere."""
    output = torch.randn(4, 1, 2, 2, requires_grad=True)
    old, target = output.detach().clone(), torch.randn(4, 1, 2, 2)
    loss, _ = OBJECTIVES["nft"].loss(
        output, old, None, target, torch.ones(4), torch.ones(4), torch.zeros(4), **FREE, beta=1.0, scale=1.0
    )
    assert not torch.autograd.grad(loss.sum(), output)[0].any()


def test_a_perfect_output_has_a_finite_gradient():
    """nft where the error is exactly 0, so that its division would be 0 / 0."""
    output = torch.zeros(1, 1, 2, 2, requires_grad=True)
    zero = torch.zeros(1, 1, 2, 2)
    loss, _ = OBJECTIVES["nft"].loss(
        output, zero, None, zero, torch.ones(1), torch.ones(1), torch.ones(1), **FREE, beta=1.0, scale=1.0
    )
    assert torch.autograd.grad(loss.sum(), output)[0].isfinite().all()


# ---- what they share ----


def test_the_objectives_named_here_are_all():
    """The registry's names and options; which need the base policy, which pairs, and which a single pass."""
    assert OBJECTIVES.keys() == OPTIONS.keys()
    for name, objective in OBJECTIVES.items():
        assert [one.name for one in fields(objective.options)] == list(OPTIONS[name])
        assert objective.needs_base == (name in ("dpok", "d3po", "nft", "awm"))
        assert (objective.needs_old, objective.on_noised_images) == (name in ("nft", "awm"),) * 2
        assert (objective.paired, objective.single_pass) == (name == "d3po", name == "reinforce")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_share_one_signature(name):
    """Tensors [N], or [2,N] of pairs, or images [N,C,h,w], and options -> loss [N] and detached metrics whose last dimension
    is N; the gradient goes through the log-prob or the output."""
    tensors = random_tensors(name)
    tensors[0].requires_grad_()
    loss, metrics = OBJECTIVES[name].loss(*tensors, **OPTIONS[name])
    assert loss.shape == (6,)
    assert {"log_ratio", "clipped"} <= metrics.keys()
    assert metrics["log_ratio"].shape == tensors[0].shape[: tensors[-1].dim()]
    assert all(value.shape[-1] == 6 and not value.requires_grad for value in metrics.values())
    (gradient,) = torch.autograd.grad(loss.sum(), tensors[0])
    assert gradient.shape == tensors[0].shape
    assert gradient.any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_units_are_independent_of_each_other(name):
    """Each unit's loss and metrics are to the bit what they are without the others."""

    def unit(tensor: Tensor, n: int) -> Tensor:
        return tensor[n : n + 1] if tensor.dim() == 4 else tensor[..., n : n + 1]

    tensors = random_tensors(name)
    loss, metrics = OBJECTIVES[name].loss(*tensors, **OPTIONS[name])
    for n in range(6):
        one_loss, one_metrics = OBJECTIVES[name].loss(*(unit(tensor, n) for tensor in tensors), **OPTIONS[name])
        assert torch.equal(loss[n : n + 1], one_loss)
        assert all(torch.equal(metrics[key][..., n : n + 1], value) for key, value in one_metrics.items())


@pytest.mark.parametrize("name", NOISED)
def test_a_term_without_weight_is_not_asked_for(name):
    """Without a weight the base policy is not evaluated; with one outside the window alone it costs a fifth. The policy that
    sampled is always evaluated."""

    def with_weights(**weights: float) -> Objective:
        return Objective(OBJECTIVES[name].loss, OBJECTIVES[name].options(**OPTIONS[name] | weights))

    held, free = with_weights(), with_weights(**FREE)
    costs = [one.num_passes for one in (held, with_weights(base_weight=0.0), free)]
    assert costs == [4, 3.2, 3]
    assert (held.needs_base, held.unused) == (True, set())
    assert (free.needs_base, free.unused, free.needs_old) == (False, {"base_output"}, True)
