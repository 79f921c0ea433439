"""The forward process against stock diffusers, and the levels that are drawn of a window."""

import pytest
import torch
from diffusers import DDIMScheduler

from b2diffurl.algorithm.ddim import PREDICTION_TYPES, make_noise_levels, make_transitions
from b2diffurl.algorithm.noising import NoiseLevels, draw_held, draw_levels, window_levels
from b2diffurl.algorithm.window import Window


def levels_of(prediction_type: str) -> tuple[DDIMScheduler, NoiseLevels]:
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type, clip_sample=False)
    return scheduler, make_noise_levels(scheduler.alphas_cumprod, prediction_type=prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_forward_process_is_that_of_diffusers(prediction_type):
    """x_t is `add_noise`, the target of v-prediction is `get_velocity`, and a network that outputs the target is told by
    diffusers' own step that the clean image is x_0."""
    scheduler, levels = levels_of(prediction_type)
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 5, 4, 8, 8, generator=generator)
    level = torch.tensor([1, 20, 400, 801, 999])
    x_t, target = levels.x_t(level, x_0, eps), levels.target(level, x_0, eps)
    assert torch.allclose(x_t, scheduler.add_noise(x_0, eps, level), atol=1e-6)
    known = {"epsilon": eps, "sample": x_0, "v_prediction": scheduler.get_velocity(x_0, eps, level)}
    assert torch.allclose(target, known[prediction_type], atol=1e-6)
    scheduler.set_timesteps(1000)
    for n, t in enumerate(level.tolist()):
        clean = scheduler.step(target[n], t, x_t[n]).pred_original_sample
        assert (clean - x_0[n]).abs().max() < 2e-4


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_gain_is_the_slope_of_the_clean_image(prediction_type):
    """An output that is off by 1 gives diffusers' clean image off by the gain."""
    scheduler, levels = levels_of(prediction_type)
    scheduler.set_timesteps(1000)
    x_t, output = torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    for t in (0, 3, 250, 999):
        clean, other = (scheduler.step(output + shift, t, x_t).pred_original_sample for shift in (0, 1))
        assert (other - clean).abs().mean().item() == pytest.approx(levels.gain[t].item(), rel=1e-5)


def test_a_flow_fits_the_same_table():
    """Rectified flow: x_t = (1-t) x_0 + t eps with target eps - x_0 has gain t, for x̂_0 = x_t - t output."""
    t = torch.tensor([0.1, 0.5, 1.0])
    flow = NoiseLevels(1000 * t, 1 - t, t, -torch.ones(3), torch.ones(3))
    assert torch.allclose(flow.gain, t)


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 4, (0, 1000)),  # all steps: from pure noise to the image
        (0, 1, (502, 1000)),  # above the level 501 to which the first step leads
        (1, 3, (2, 502)),  # of the two steps from 501 and 251, the second of which leads to 1
        (3, 4, (0, 2)),  # the last step, from t = 1
    ],
)
def test_the_levels_of_a_window_by_hand(start, stop, expected):
    """Four steps from t = 751, 501, 251 and 1: a window has the levels above where it ends, up to where it begins."""
    scheduler, levels = levels_of("epsilon")
    steps = torch.tensor([751, 501, 251, 1])
    table = make_transitions(steps, scheduler.alphas_cumprod, 1.0, eta=1.0, prediction_type="epsilon")
    # The table's third step, from 251, leads to 1.
    assert window_levels(levels, table, Window(start, stop)) == expected


def test_windows_side_by_side_have_every_level_once():
    """The levels of [0,i), [i,j) and [j,T) together are all levels, without overlap."""
    scheduler, levels = levels_of("epsilon")
    table = make_transitions(
        torch.tensor([876, 751, 626, 501, 376, 251, 126, 1]),
        scheduler.alphas_cumprod,
        1.0,
        eta=1.0,
        prediction_type="epsilon",
    )
    for i in range(1, 7):
        for j in range(i + 1, 8):
            ranges = [range(*window_levels(levels, table, Window(*ends))) for ends in ((0, i), (i, j), (j, 8))]
            assert sorted(n for one in ranges for n in one) == list(range(1000))


def test_every_band_and_part_has_one_level_of_each_image():
    """8 images at 4 levels each of 200..999: a level in every quarter for every image, and in each quarter's 8 parts one."""
    drawn = draw_levels(200, 1000, 8, 4, torch.Generator().manual_seed(0))
    assert drawn.shape == (8, 4)
    for band in range(4):
        part = (drawn[:, band] - 200 - 200 * band).div(25, rounding_mode="floor")
        assert part.sort().values.tolist() == list(range(8))


def test_every_level_is_equally_likely_for_every_image():
    """Counts over many draws: each of 10 levels comes as often, for the first image as for the last."""
    rng = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_levels(0, 10, 3, 2, rng) for _ in range(4000)])  # [4000,3,2]
    for image in range(3):
        counts = drawn[:, image].flatten().bincount(minlength=10)
        assert (counts - 800).abs().max() < 120  # 8000 draws, 4.5 standard deviations


def test_a_range_of_one_level_has_that_level():
    assert draw_levels(7, 8, 5, 3, torch.Generator().manual_seed(0)).eq(7).all()


def test_a_fifth_of_the_copies_is_held_outside_the_window():
    """Of 10 x 4 levels of 100..699 exactly 8 become rows of 0..99 or 700..999, which are equally likely. The others stay.
    All keep their prompt. A window of all levels leaves nothing outside."""
    rng, seen = torch.Generator().manual_seed(0), []
    for _ in range(500):
        level = draw_levels(100, 700, 10, 4, rng)
        drawn, unprompted = draw_held(level, 100, 700, 1000, rng, without_prompt=False)
        assert not unprompted.any()
        outside = (drawn < 100) | (drawn >= 700)
        assert outside.sum() == 8
        assert torch.equal(drawn[~outside], level[~outside])
        seen.append(drawn[outside])
    below = (torch.cat(seen) < 100).float().mean()
    assert below.item() == pytest.approx(0.25, abs=0.03)
    assert torch.cat(seen).max() == 999
    assert torch.equal(draw_held(level, 0, 1000, 1000, rng, without_prompt=False)[0], level)


def test_half_of_the_held_copies_lose_their_prompt():
    """Of 8 held copies 4 lose it and have any level, and 4 are outside the window; all 8 lose it if nothing is outside."""
    rng, seen = torch.Generator().manual_seed(0), []
    for _ in range(500):
        level = draw_levels(100, 700, 10, 4, rng)
        drawn, unprompted = draw_held(level, 100, 700, 1000, rng, without_prompt=True)
        outside = (drawn < 100) | (drawn >= 700)
        assert unprompted.sum() == (outside & ~unprompted).sum() == 4
        assert torch.equal(drawn[~outside & ~unprompted], level[~outside & ~unprompted])
        seen.append(drawn[unprompted])
    inside = ((torch.cat(seen) >= 100) & (torch.cat(seen) < 700)).float().mean()
    assert inside.item() == pytest.approx(0.6, abs=0.04)
    assert draw_held(level, 0, 1000, 1000, rng, without_prompt=True)[1].sum() == 8


@pytest.mark.parametrize("without_prompt", [False, True])
def test_an_update_of_one_copy_is_held_at_times(without_prompt):
    """A fifth of one copy is none, so it is held in a fifth of the updates, in half of these without its prompt."""
    rng, held, lost = torch.Generator().manual_seed(0), 0, 0
    for _ in range(1000):
        drawn, unprompted = draw_held(torch.tensor([[500]]), 100, 700, 1000, rng, without_prompt=without_prompt)
        held += bool((drawn < 100) | (drawn >= 700) | unprompted)
        lost += bool(unprompted)
    assert held == pytest.approx(200, abs=50)
    assert lost == pytest.approx(100 * without_prompt, abs=40 * without_prompt)


@pytest.mark.parametrize(("prediction_type", "count"), [("epsilon", 999), ("v_prediction", 1000), ("sample", 1000)])
def test_a_level_without_signal_is_left_out_where_nothing_tells_the_image(prediction_type, count):
    """A schedule of zero terminal SNR: an error of eps at its end would move the image infinitely far."""
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type)
    levels = make_noise_levels(scheduler.alphas_cumprod, prediction_type=prediction_type)
    assert len(levels.timesteps) == count
    assert levels.gain.isfinite().all()
