"""From configuration to plan: how many steps each stage trains, and that planning writes nothing."""

import json
from collections import Counter

import pytest
from conftest import plan, snapshot

from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import Schedule
from b2diffurl.experiment.stage import Stage


def make_schedule(num_stages: int, curriculum: str, left: int, right: int, num_steps: int = 20, **more) -> Schedule:
    return Schedule(num_stages, num_steps, curriculum, left, right, **({"given": 0, "stop": 0, "seed": 0} | more))


def windows_of(curriculum: str, left: int, right: int, num_stages: int, **more) -> list[Window]:
    """The trained window of every stage."""
    schedule = make_schedule(num_stages, curriculum, left, right, **more)
    return [schedule.window(stage) for stage in range(num_stages)]


def steps_of(curriculum: str, left: int, right: int, num_stages: int, seed: int = 0) -> list[int]:
    """S of every stage."""
    return [window.num_steps for window in windows_of(curriculum, left, right, num_stages, seed=seed)]


def test_reference_schedule():
    """L = 14, R = 20, M = 100: the table of the method, stage by stage; reversed, its mirror image."""
    table = {14: range(0, 15), 15: range(15, 29), 16: range(29, 43), 17: range(43, 58), 18: range(58, 72)}
    table |= {19: range(72, 86), 20: range(86, 100)}
    expected = [steps for steps, stages in table.items() for _ in stages]
    assert steps_of("progressive", 14, 20, 100) == expected
    mirror = {14: 20, 15: 19, 16: 18, 17: 17, 18: 16, 19: 15, 20: 14}
    assert steps_of("reversed", 14, 20, 100) == [mirror[steps] for steps in expected]


@pytest.mark.parametrize(("left", "right", "num_stages"), [(1, 1, 1), (6, 10, 8), (1, 20, 7), (14, 20, 100), (3, 9, 70)])
def test_schedule_grows_evenly_from_left_to_right(left, right, num_stages):
    """S starts at L, never falls, ends at R if there are stages enough, and each value holds for as many stages, one
    more or less. Fixed, it stays at L."""
    assert steps_of("fixed", left, right, num_stages) == [left] * num_stages
    steps = steps_of("progressive", left, right, num_stages)
    assert steps[0] == left
    assert steps == sorted(steps)
    assert max(steps) <= right
    if num_stages > right - left:
        assert set(steps) == set(range(left, right + 1))
        assert max(Counter(steps).values()) - min(Counter(steps).values()) <= 1


def test_random_steps_are_uniform_and_follow_from_the_seed():
    """Every S of L..R comes as often as chance has it (within 5 standard errors) and no other; the seed and the stage decide
    it, however many stages there are."""
    steps = steps_of("random", 14, 20, 7000)
    assert set(steps) == set(range(14, 21))
    assert all(abs(count - 1000) < 5 * (7000 * 1 / 7 * 6 / 7) ** 0.5 for count in Counter(steps).values())
    assert steps_of("random", 14, 20, 100) == steps[:100]
    assert steps_of("random", 14, 20, 100, seed=1) != steps[:100]
    assert steps_of("random", 5, 5, 3) == [5, 5, 5]


# By hand, for T = 8: the curriculum, L, R, split_stop, and the window of each stage.
WINDOWS = [
    ("progressive", 4, 6, 0, [(4, 8), (3, 8), (2, 8)]),
    ("progressive", 4, 6, 5, [(4, 5), (3, 5), (2, 5)]),
    ("reversed", 4, 6, 7, [(2, 7), (3, 7), (4, 7)]),
    ("fixed", 6, 1, 4, [(2, 4), (2, 4)]),
    ("early", 2, 4, 0, [(0, 2), (0, 2), (0, 3), (0, 3), (0, 4), (0, 4)]),
    ("early", 8, 8, 0, [(0, 8), (0, 8)]),
    ("sliding", 2, 1, 0, [(0, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7), (6, 8)]),
    ("sliding", 6, 8, 0, [(0, 6), (0, 6), (1, 7), (1, 7), (2, 8), (2, 8)]),
    ("sliding", 6, 8, 0, [(0, 6), (0, 6), (1, 7), (2, 8)]),
    ("sliding", 2, 8, 0, [(0, 2), (1, 3), (3, 5), (4, 6), (6, 8)]),
    ("sliding", 3, 8, 0, [(0, 3), (5, 8)]),
    ("sliding", 3, 8, 0, [(0, 3)]),
    ("sliding", 8, 8, 0, [(0, 8), (0, 8)]),
]


@pytest.mark.parametrize(("curriculum", "left", "right", "stop", "expected"), WINDOWS)
def test_windows_of_every_curriculum(curriculum, left, right, stop, expected):
    """As by hand; a stage beyond the last has the last one's window."""
    expected = [Window(*ends) for ends in expected]
    assert windows_of(curriculum, left, right, len(expected), num_steps=8, stop=stop) == expected
    schedule = make_schedule(len(expected), curriculum, left, right, num_steps=8, stop=stop)
    assert [schedule.window(index) for index in (len(expected), 1000)] == [expected[-1]] * 2


@pytest.mark.parametrize(
    ("curriculum", "stop", "expected"),
    [("progressive", 0, (3, 8)), ("random", 7, (3, 7)), ("early", 0, (0, 5)), ("sliding", 0, (3, 8))],
)
def test_a_call_s_own_number_of_steps_goes_into_any_curriculum(curriculum, stop, expected):
    """split_step 5 of 8 in the last stage."""
    assert windows_of(curriculum, 2, 4, 3, num_steps=8, given=5, stop=stop)[-1] == Window(*expected)


def test_a_sliding_window_holds_everywhere_as_long():
    """70 stages and 7 positions: 10 stages each, in order."""
    assert windows_of("sliding", 2, 8, 70, num_steps=8) == [Window(n // 10, n // 10 + 2) for n in range(70)]


@pytest.mark.parametrize(("curriculum", "last"), [("progressive", 9), ("reversed", 4), ("fixed", 4)])
def test_stages_beyond_the_last_stay_within_the_bounds(curriculum, last):
    """Stage 6 of 6 and stage 1,000 train as many steps as stage 5, R or L; at random any in L..R."""
    schedule = make_schedule(6, curriculum, 4, 9)
    assert [schedule.window(stage).num_steps for stage in (5, 6, 1000)] == [last] * 3
    schedule = make_schedule(6, "random", 4, 9)
    assert {schedule.window(stage).num_steps for stage in range(6, 100)} == set(range(4, 10))


def test_unknown_curriculum_lists_the_choices():
    """A ValueError names them all."""
    with pytest.raises(ValueError, match=r"'forward'.*progressive, fixed, reversed, random, early, sliding"):
        make_schedule(3, "forward", 1, 2).window(0)


@pytest.mark.parametrize(("curriculum", "steps"), [("progressive", [2, 3]), ("fixed", [2, 2]), ("reversed", [3, 2])])
def test_stage_takes_its_steps_from_schedule_or_flag(tmp_path, overrides, curriculum, steps):
    """split_step 0 follows the curriculum's schedule of the named stage; any other value is taken as it is."""
    lora = tmp_path / "any.safetensors"
    lora.touch()
    overrides = overrides | {"curriculum": curriculum}
    for stage, wanted in enumerate(steps):
        assert plan(tmp_path, overrides, run_name=f"stage{stage}", resume_from=str(lora)).window == Window.last(wanted, 4)
    assert plan(tmp_path, overrides, split_step=4).window == Window(0, 4)


def test_random_steps_follow_from_the_experiment_s_seed(tmp_path, overrides):
    """The plan of stage 0 takes what the schedule has for its seed; some seeds have L, others R."""
    overrides = overrides | {"curriculum": "random"}
    planned = [plan(tmp_path, overrides, seed=seed).window for seed in range(12)]
    assert planned == [make_schedule(2, "random", 2, 3, num_steps=4, seed=seed).window(0) for seed in range(12)]
    assert set(planned) == {Window(2, 4), Window(1, 4)}


def test_a_sampled_stage_keeps_its_steps(finished, overrides):
    """More stages stretch the schedule, but a stage already sampled is trained on the steps it was sampled with; asking
    for others is an error."""
    assert make_schedule(20, "progressive", 2, 3).window(1).num_steps == 2
    assert plan(finished, overrides, run_name="stage1", stage_cnt=20).window == Window(1, 4)
    with pytest.raises(ValueError, match=r"window \[1, 4\), not \[2, 4\) of split_step 2"):
        plan(finished, overrides, run_name="stage1", split_step=2)


def test_a_stage_of_an_earlier_version_trained_the_last_steps(tmp_path):
    """Its record has S alone, of the T steps that it says, or of today's."""
    path = Stage(tmp_path, 0).manifest_path("sample")
    path.parent.mkdir()
    for facts, expected in (
        ({}, (13, 16)),
        ({"settings": {"sample.num_steps": 8}}, (5, 8)),
        ({"window": [2, 5]}, (2, 5)),
    ):
        path.write_text(json.dumps({"num_trained_steps": 3} | facts))
        assert Stage(tmp_path, 0).sampled_window(16) == Window(*expected)
    assert Stage(tmp_path, 1).sampled_window(16) is None


def test_planning_writes_nothing(finished, overrides, tmp_path):
    """A plan only reads: neither a new experiment's folder nor a finished one changes."""
    before = snapshot(finished)
    plan(finished, overrides, run_name="stage1")
    plan(tmp_path, overrides)
    assert snapshot(finished) == before
    assert list(tmp_path.iterdir()) == []
