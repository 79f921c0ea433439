"""A watched reward that fails: a hole and a warning, from scores to report; never for what is trained on or judges."""

import re

import pytest
import torch
from conftest import JUDGE, experiment, json_lines, ran, refuse, run_script, stage_of
from scored import BATCH, NUM_IMAGES, REDNESS, scores

from b2diffurl.experiment.evaluation_table import every_evaluation, with_error
from b2diffurl.reporting import trackers
from b2diffurl.rewards.watched import Watched

FAILING = (
    REDNESS
    + """
import torch
calls = []


def holed(images, prompts):
    values = redness(images, prompts)
    values[torch.arange(len(prompts)) % 2 == 0] = float("nan")
    values[1] = float("inf")
    return values


def third(images, prompts):
    calls.append(1)
    if len(calls) > 2:
        raise ValueError("no more")
    return redness(images, prompts), {"prompt": list(prompts), "twice": 2 * redness(images, prompts)}


def never(images, prompts):
    return redness(images, prompts)[1:]
"""
)


def warnings_of(said: str, name: str) -> list[str]:
    return [line for line in said.splitlines() if f"watched reward {name} " in line]


def test_a_watched_reward_that_fails_leaves_a_hole(begin, module):
    """One that is NaN here and there, one that raises later, one that returns too few, and a server that is away: the stage
    is selected, trained, judged, reported and tracked, each is warned of once, and the means are of what there is."""
    mine = module(FAILING)
    names = [f"{mine}:holed", f"{mine}:third", f"{mine}:never", "http"]
    away = {"reward.http.url": "http://127.0.0.1:9/", "reward.http.num_retries": 0}
    folder, settings = begin({"reward.watch": tuple(names)} | away)
    said = ran(folder, "select", settings)
    expected = [
        r"not finite for images \[0, 1, 2",
        "from here on: .*no more",
        r"shape \(3,\) for 4",
        "127.0.0.1:9/ cannot be",
    ]
    for name, words in zip(names, expected, strict=True):
        (line,) = warnings_of(said, name)
        assert re.search(words, line)
        assert "stage0 select" in line
    seen = [row["watch"] for row in scores(folder)]
    assert [n for n, row in enumerate(seen) if row[names[0]] is None] == [n for n in range(NUM_IMAGES) if n % 4 != 3]
    assert [n for n, row in enumerate(seen) if row[names[1]] is not None] == list(range(2 * BATCH))
    assert [row[f"{names[1]}/prompt"] for row in seen[BATCH:]][BATCH - 1 : BATCH + 1] == [scores(folder)[7]["prompt"], ""]
    assert {row[name] for row in seen for name in names[2:]} == {None}
    (metrics,) = json_lines(stage_of(folder).metrics("select"))
    assert metrics[f"watch/{names[1]}_mean"] == pytest.approx(sum(row[names[1]] for row in seen[:8]) / 8, rel=1e-5)
    assert [metrics[f"watch/{name}_mean"] for name in names[2:]] == [None, None]
    assert f"{names[2]} none, http none" in said

    ran(folder, "train", settings)
    judged = ran(folder, "eval", settings, *JUDGE)
    assert len(warnings_of(judged, "http")) == 2  # of the base, and of the stage
    assert "report: " in judged
    assert "report.html: " not in judged  # an error would be logged so
    base, tuned = every_evaluation(experiment(folder))
    assert base[f"{names[0]}_n"] == 1
    assert (base["http"], base["http_n"], tuned["http_gain"]) == (None, 0, None)
    page = (experiment(folder) / "report.html").read_text()
    assert f"{with_error(base, names[0])}" in page
    assert with_error(base, names[0]).endswith(", 1 of 6 images")
    assert len(trackers.points(experiment(folder))) > 2
    assert all(isinstance(value, int | float) for point in trackers.points(experiment(folder)) for value in point.values())


@pytest.mark.parametrize("key", ["reward.name", "eval.judge"])
def test_what_is_trained_on_or_judges_must_not_fail(begin, module, key):
    """Watched as well or not."""
    mine = module(FAILING)
    watch = (f"{mine}:holed",) if key == "eval.judge" else ()
    folder, settings = begin({key: f"{mine}:holed", "reward.watch": watch})
    if key == "reward.name":
        refuse_with = run_script(folder, "select", settings)
    else:
        refuse_with = run_script(folder, "eval", settings, "--checkpoint=base", "--sampler=training")
    assert refuse_with.code == 2
    assert f"reward {mine}:holed is not finite" in refuse_with.stderr


def test_a_watched_reward_that_cannot_work_is_refused_at_the_start(empty, overrides):
    """A mistake in the settings shows before any work, and is not a hole in every stage."""
    refuse(empty, "sample", overrides | {"reward.watch": ("nowhere:reward",)}, "nowhere")


def test_a_watched_reward_that_was_lost_is_asked_again_the_next_time():
    """What could not be loaded is loaded then; what failed is asked. Memory that is used up is no hole."""
    loads = iter([OSError("away"), None, None])
    answers = iter([RuntimeError("busy"), torch.ones(2), MemoryError("out of memory")])

    def load():
        if error := next(loads):
            raise error

        def reward(images, prompts):
            if isinstance(answer := next(answers), Exception):
                raise answer
            return answer

        return reward

    watched, images = Watched("mine", load), torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    for expected in ([True] * 2, [True] * 2, [False] * 2):
        watched.begin("here")
        assert watched(images, ["a", "b"])[0].isnan().tolist() == expected
    with pytest.raises(MemoryError):
        watched(images, ["a", "b"])
