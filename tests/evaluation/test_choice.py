"""The best checkpoint is chosen by some prompts and judged by others, so that its figure does not flatter."""

import numpy as np
import pytest

from b2diffurl.evaluation.choice import choose, half

PROMPTS = [f"prompt {n}" for n in range(64)]


def results(shares: list[list[float]], *, prompts: str = "test", figure: str = "accuracy") -> list[dict]:
    """A result for each checkpoint, the base first, with a value for each image in turn through the prompts."""
    shown = [PROMPTS[n % len(PROMPTS)] for n in range(len(shares[0]))]
    common = {"prompts": prompts, "sampler": "training", "shown_prompts": shown}
    names = ["base", *(f"stage{n}" for n in range(len(shares) - 1))]
    return [
        common | {"checkpoint": name, "lora": "" if name == "base" else f"{name}/lora", "values": {figure: values}}
        for name, values in zip(names, shares, strict=True)
    ]


def test_what_is_chosen_and_judged_by_the_same_prompts_flatters():
    """Twelve checkpoints that all get half of 256 images right, 100 times: the best one's figure is 7 points too high
    where it was chosen, as the largest of 12 normal deviates is 1.63 on average, and right where it was not."""
    draw, flattering, fair = np.random.default_rng(3), [], []
    for seed in range(100):
        drawn = results((draw.random((12, 256)) < 0.5).astype(float).tolist())
        choice = choose(drawn, "training", seed=seed)
        flattering.append(choice.flattering.mean)
        fair.append(choice.fair.mean)
    assert np.mean(flattering) == pytest.approx(0.5 + 1.63 * (0.25 / 128) ** 0.5, abs=0.012)
    assert np.mean(fair) == pytest.approx(0.5, abs=0.012)


def test_halves_are_of_prompts_and_stay():
    """No prompt is on both sides; order and repetitions of prompts do not count, the seed does."""
    chosen = half(PROMPTS, 7)
    assert len(chosen) == 32
    assert chosen == half(PROMPTS[::-1] * 2, 7)
    assert chosen != half(PROMPTS, 8)
    assert len(half(["a", "b"], 0)) == 1


def test_the_best_is_by_the_judge_and_the_earliest_of_equals():
    """Right are all of a checkpoint's images or none; a reward counts where there is no judge."""
    good, bad = [1.0] * 64, [0.0] * 64
    choice = choose(results([bad, good, good, bad]), "training", seed=1)
    assert (choice.best["checkpoint"], choice.figure, choice.num_checkpoints) == ("stage0", "accuracy", 4)
    assert (choice.over_base.mean, choice.over_last.mean) == (1.0, 1.0)
    assert choice.chosen_by == choice.judged_by == ("test", 32)
    choice = choose(results([[0.3] * 64, [0.1] * 64], figure="reward"), "training", seed=1)
    assert (choice.best["checkpoint"], choice.figure, choice.over_base) == ("base", "reward", None)


def prompts_of(results: list[dict], *, start: int) -> list[dict]:
    """The same results of other prompts: each is another one of the list, `start` places on."""
    return [row | {"shown_prompts": [f"prompt {n + start}" for n in range(len(row["shown_prompts"]))]} for row in results]


def test_a_validation_set_chooses_and_all_held_out_prompts_judge():
    good, bad = [1.0] * 64, [0.0] * 64
    held_out, chosen_by = results([bad, bad, good]), prompts_of(results([bad, good, bad], prompts="train"), start=64)
    mixed = [row for pair in zip(chosen_by, held_out, strict=True) for row in pair]
    choice = choose(mixed, "training", seed=1, validation="train")
    assert choice.best is held_out[1]
    assert (choice.chosen_by, choice.judged_by) == (("train", 64), ("test", 64))
    assert (choice.flattering.mean, choice.fair.mean, choice.over_last.mean) == (1.0, 0.0, -1.0)
    facts = choice.to_json()
    assert facts["judged_by"]["prompts"] == "test"
    assert facts["chosen_by"]["mean"] == 1.0


def test_prompts_that_have_chosen_do_not_judge():
    """48 of the 64 held-out prompts are in the validation set, too: the other 16 judge."""
    half_right = [1.0] * 32 + [0.0] * 32
    held_out, chosen_by = results([half_right] * 2), prompts_of(results([half_right] * 2, prompts="train"), start=16)
    choice = choose([*chosen_by, *held_out], "training", seed=1, validation="train")
    assert (choice.chosen_by, choice.judged_by) == (("train", 64), ("test", 16))
    assert (choice.fair.mean, choice.fair.num_units) == (1.0, 16)
