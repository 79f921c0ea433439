"""Intervals hold what they promise, checked by draws from known distributions and by figures worked out by hand."""

import numpy as np
import pytest

from b2diffurl.evaluation.intervals import change, clustered, interval, student


def test_one_image_a_prompt_has_the_textbook_s_interval():
    """Mean 3.5, standard deviation sqrt(6) of eight numbers, t(7) = 2.3646."""
    found = interval([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], list("abcdefgh"))
    error = (6 / 8) ** 0.5
    assert (found.mean, found.error) == (3.5, pytest.approx(error))
    assert (found.low, found.high) == (pytest.approx(3.5 - 2.3646 * error, 1e-3), pytest.approx(3.5 + 2.3646 * error, 1e-3))


def test_copies_of_an_image_tell_nothing_new():
    """Eight prompts with one value each have the same interval if every image is there five times."""
    values, prompts = [0.2, 0.9, 0.4, 0.1, 0.5, 0.7, 0.3, 0.8], list("abcdefgh")
    once, often = interval(values, prompts), interval(values * 5, prompts * 5)
    assert (often.low, often.high) == (pytest.approx(once.low), pytest.approx(once.high))
    few = interval(values * 5, ["a", "b"] * 20)  # two prompts: what is said is of other images of these two
    assert not few.over_prompts
    assert few.high - few.low < once.high - once.low


def test_a_share_has_wilson_s_interval():
    """8 of 10 images of 10 prompts, with t(9) = 2.262 for z and 9 as many independent ones as have this standard error; none
    of them is 0 to 36 %, and no share lies beyond 0 or 1."""
    found = interval([1.0] * 8 + [0.0] * 2, range(10))
    square = 2.2622**2 / 9
    half = (2.2622**2 * 0.16 / 9 + square**2 / 4) ** 0.5
    assert (found.low, found.high) == pytest.approx(
        [(0.8 + square / 2 + sign * half) / (1 + square) for sign in (-1, 1)], 1e-3
    )
    none = interval([0.0] * 10, range(10))
    assert (none.low, none.high) == (0.0, pytest.approx(2.2622**2 / 10 / (1 + 2.2622**2 / 10), 1e-3))


def test_student_s_quantiles_are_those_of_a_table():
    assert [round(student(n), 3) for n in (1, 5, 6, 7, 10, 30, 100, 383)] == [
        12.706, 2.571, 2.447, 2.365, 2.228, 2.042, 1.984, 1.966,
    ]  # fmt: skip


def test_what_is_missing_counts_for_nothing():
    pairs = change([1.0, None, 3.0, 4.0] + [1.0] * 8, [0.0, 1.0, None, 1.0] + [0.0] * 8, range(12))
    assert (pairs.mean, pairs.num_units) == (1.2, 10)
    assert clustered([None, None], "ab") is None
    assert clustered([None, 2.0], "ab").low is None


def test_five_of_five_may_be_chance():
    """That all of five changes rise happens in 1 of 16 cases, of six in 1 of 32: only then a change is significant."""
    assert not change([1.0] * 5 + [0.0] * 5, [0.0] * 10, range(10)).is_significant
    assert change([1.0] * 6 + [0.0] * 4, [0.0] * 10, range(10)).is_significant
    assert change([0.0] * 4 + [0.0] * 6, [0.0] * 4 + [1.0] * 6, range(10)).is_significant
    assert not change([0.0] * 10, [0.0] * 10, range(10)).is_significant


@pytest.mark.parametrize(("num_prompts", "num_images"), [(200, 256), (40, 256), (3, 128)])
def test_no_change_is_called_one_in_a_twentieth_of_cases(num_prompts, num_images):
    """Both models draw each prompt rightly in the same share of images, which differs between prompts: 250 pairs."""
    draw, prompts = np.random.default_rng(5), [n % num_prompts for n in range(num_images)]
    called = 0
    for _ in range(250):
        share = draw.beta(1, 1, num_prompts)[prompts]
        after, before = ((draw.random(num_images) < share).astype(float).tolist() for _ in range(2))
        called += change(after, before, prompts).is_significant
    assert 0.016 < called / 250 < 0.09


def test_an_interval_holds_the_mean_of_all_prompts_in_19_of_20_cases():
    """Shares by prompt with mean 1/2, 40 prompts of six images. The usual error, which takes images as independent, would
    hold it in 7 of 10."""
    draw, prompts, held, naive = np.random.default_rng(6), [n % 40 for n in range(240)], 0, 0
    for _ in range(200):
        values = (draw.random(240) < draw.beta(0.5, 0.5, 40)[prompts]).astype(float)
        found = interval(values.tolist(), prompts)
        held += found.low <= 0.5 <= found.high
        naive += abs(values.mean() - 0.5) < 1.96 * values.std() / 240**0.5
    assert 0.9 < held / 200 < 0.99
    assert naive / 200 < 0.8
