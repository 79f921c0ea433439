"""The study: its arithmetic by hand, its runs as the pipeline would take them, and a page that says what the runs say."""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import pytest
from conftest import ROOT, experiment, make_config
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from b2diffurl.configuration.keys import flatten
from b2diffurl.configuration.rules import check
from benchmarks.study import FULL, QUICK, VARIANTS, configure, cost, root_of, runs
from benchmarks.study_report import SETS, write_report
from benchmarks.study_statistics import (
    at_equal_cost,
    at_matched_accuracy,
    by_variant,
    differences,
    final,
    interval,
    pooled_deviation,
    value_at,
)

MEASURED = ("accuracy", "reward", "diversity/clip", "diversity/clip_right", "diversity/clip_vendi", "diversity/layout_right")


def run(name: str, seed: int, accuracies: list[float], *, cost: float = 100.0) -> dict:
    """A run whose curve has these accuracies at 0, 1, 2, … times `cost` of everything; diversity is 1 - accuracy."""
    curve = []
    for n, accuracy in enumerate(accuracies):
        figures = {key: 1 - accuracy if key.startswith("diversity") else accuracy for key in MEASURED}
        spent = dict.fromkeys(("queries", "evaluations", "updates", "seconds"), n * cost)
        curve.append(spent | {prompts: dict(figures) for prompts in SETS})
    return {"name": name, "arm": name, "objective": "ddpo", "seed": seed, "curve": curve}


def test_the_paired_interval_is_students():
    """Mean and limits of scipy's paired t test, and the verdict that follows from them."""
    one, other = [0.61, 0.64, 0.60, 0.66, 0.59], [0.55, 0.60, 0.57, 0.58, 0.57]
    found = interval([a - b for a, b in zip(one, other, strict=True)])
    expected = ttest_rel(one, other).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.verdict == "supported"
    assert interval([-value for value in (0.1, 0.11, 0.12)]).verdict == "not supported"
    assert interval([-0.1, 0.1, 0.05]).verdict == "undecided"


def test_few_seeds_borrow_the_spread_of_all():
    """Deviation and degrees of freedom of two samples together by hand; with it two seeds have an interval of its width."""
    deviation, freedom = pooled_deviation([[1.0, 3.0], [0.0, 3.0, 6.0]])
    assert (deviation, freedom) == (pytest.approx(math.sqrt((1 + 1 + 9 + 0 + 9) / 3)), 3)
    found = interval([0.0, 1.0], pooled=(2.0, 60))
    assert found.high - found.mean == pytest.approx(2.0003 * 2 / math.sqrt(2), rel=1e-4)


def test_runs_are_paired_by_seed():
    """Only seeds that both variants have count."""
    found = by_variant([run("b2", 1, [0.4, 0.6]), run("b2", 2, [0.4, 0.7]), run("ddpo", 2, [0.4, 0.5])])
    assert differences(found, "b2", "ddpo", final("test", "accuracy")) == [pytest.approx(0.2)]


def test_equal_cost_is_where_the_cheaper_one_ends():
    """A run that costs four times as much is read off at a quarter of its curve."""
    cheap, dear = run("b2", 1, [0.4, 0.5]), run("ddpo", 1, [0.4, 0.8], cost=400)
    assert at_equal_cost("train", "accuracy", "seconds")(cheap, dear) == pytest.approx(0.5 - 0.5)
    assert at_equal_cost("train", "accuracy", "seconds")(dear, cheap) == pytest.approx(0.0)
    assert final("train", "accuracy")(cheap, dear) == pytest.approx(-0.3)


def test_matched_accuracy_is_read_off_both_curves():
    """At the accuracy that the poorer run reached, first time round; equal curves differ by nothing, however long."""
    short, long = run("b2", 1, [0.4, 0.5]), run("ddpo", 1, [0.4, 0.6, 0.5, 0.9])
    assert at_matched_accuracy("test", "diversity/clip")(short, long) == pytest.approx(0)
    dipped = run("bpt", 1, [0.40, 0.38, 0.50])
    for point, figure in zip(dipped["curve"], (17.0, 18.0, 10.0), strict=True):
        point["test"]["diversity/clip"] = figure
    assert value_at(dipped, "test", "diversity/clip", 0.40) == 17
    assert value_at(dipped, "test", "diversity/clip", 0.44) == pytest.approx(14)
    wider = run("bs", 1, [0.4, 0.5])
    wider["curve"][-1]["test"]["diversity/clip"] = 0.75
    assert at_matched_accuracy("test", "diversity/clip")(wider, long) == pytest.approx(0.25)


def test_every_run_of_the_study_is_accepted():
    """The checks pass for all of them, no two share a folder, and the arms have five seeds or more."""
    for scale in (FULL, QUICK):
        configs = [configure(scale, *one) for one in runs(scale)]
        for config in configs:
            check(config)
        assert len({root_of(config) for config in configs}) == len(configs)
    seeds = {name: {seed for one, seed in runs(FULL) if one.name == name} for name in VARIANTS}
    assert all(len(seeds[arm]) >= 5 for arm in ("ddpo", "bpt", "bs", "b2"))
    assert all(len(seeds[name]) >= 2 for name in VARIANTS)
    assert all(variant.against in VARIANTS for variant in VARIANTS.values())


def test_variants_cost_equally_many_queries():
    """Images scored a run differ by less than 1 % between any two variants."""
    counts = []
    for variant in VARIANTS.values():
        config = configure(FULL, variant)
        counts.append(config.stage_cnt * config.sample.num_batches_per_epoch * config.sample.batch_size * config.split_time)
    assert all(max(pair) / min(pair) < 1.01 for pair in combinations(counts, 2))


def test_every_variant_changes_what_it_says():
    """Settings are other values than the arm's own, so that no control is an arm by another name."""
    for variant in VARIANTS.values():
        changed, arm = (flatten(configure(FULL, one).to_dict()) for one in (variant, VARIANTS[variant.arm]))
        assert {key for key in arm if changed[key] != arm[key]} - {"exp_name"} == set(variant.settings)


def test_the_page_says_what_the_runs_say(tmp_path):
    """Made-up runs, b2 ten points above ddpo, four below bs, a toss-up with bpt: verdicts and pictures."""
    made_up = []
    for seed in range(1, 6):
        noise = 0.001 * seed
        made_up += [run("ddpo", seed, [0.4, 0.5 + noise]), run("b2", seed, [0.4, 0.6 + 2 * noise])]
        made_up += [run("bs", seed, [0.4, 0.65 - noise]), run("bpt", seed, [0.4, 0.6 + noise + 0.01 * (-1) ** seed])]
    page = draw_page(made_up, tmp_path)
    judged = [line.split("|") for line in page.splitlines() if line.endswith("ed** |") and " px" not in line]
    verdicts = {cells[3].strip(): (cells[5].split()[0], cells[-2].strip()) for cells in judged}
    beaten = [cells[-2].strip() for cells in judged if "b2 − ddpo" in cells[3] and "**+10.3** [+10.1, +10.5]" in cells[5]]
    assert beaten == ["**supported**"] * len(SETS)
    assert verdicts["b2 − bs"] == ("**-4.1**", "**not supported**")
    assert verdicts["b2 − bpt"][1] == "**undecided**"
    assert "Not run yet: b2, dpok (seed 1, 3)." in page
    pictures = {f"study_{name}.png" for name in ("arms", "diversity", "controls")}
    assert {path.name for path in tmp_path.iterdir()} == {"study.md", *pictures}


def draw_page(made_up: list[dict], folder: Path) -> str:
    setting = {"learning_rate": 1e-3, "batch_size": 1, "num_epochs": 1, "eps": 0.1, "step_weight": "none"}
    facts = {
        "quick": False,
        "command": "study",
        "date": "today",
        "hardware": "here",
        "devices": ["cpu"],
        "versions": {"torch": "2"},
    }
    facts |= {
        "num_images": 48,
        "setting": setting,
        "failed": {},
        "missing": [("b2, dpok", 1), ("b2, dpok", 3)],
        "runs": made_up,
    }
    write_report(facts, {one.name: one.against for one in VARIANTS.values()}, folder)
    return (folder / "study.md").read_text()


@pytest.mark.filterwarnings("error::UserWarning")  # such as that of a legend without marks
@pytest.mark.parametrize(
    "made",
    [
        [("b2", 1)],
        [("ddpo", 1), ("bpt", 2)],
        [("ddpo", 1), ("ddpo", 2), ("b2", 2)],
        [(name, seed) for name in ("ddpo", "b2") for seed in (1, 2, 3)],
    ],
)
def test_a_page_of_few_runs(tmp_path, made):
    """Whatever is finished first, the page can be drawn, and claims nothing that has no spread to go by."""
    page = draw_page([run(name, seed, [0.4, 0.5 + 0.01 * seed]) for name, seed in made], tmp_path)
    assert "b2 − ddpo | 1 |" not in page


def test_two_seeds_decide_nothing(tmp_path, monkeypatch):
    """However wide apart two arms are, a claim needs three seeds."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **options: None)  # the pictures are another test's
    page = draw_page(
        [run(name, seed, [0.4, end + seed / 100]) for name, end in (("ddpo", 0.5), ("b2", 0.9)) for seed in (1, 2)], tmp_path
    )
    rows = [line for line in page.splitlines() if "equally many reward queries" in line]
    assert rows
    assert all(row.endswith("| **undecided: too few seeds** |") for row in rows)


def test_costs_by_hand(finished, overrides):
    """Of the tiny experiment, 6 groups of 3 branches a stage, S = 2 and 3 of 4: images, network passes, updates."""
    stages = [experiment(finished) / f"stage{index}" for index in range(2)]
    selected = [len(json.loads((stage / "selection.json").read_text())) for stage in stages]
    updates = [(stage / "metrics" / "train.jsonl").read_text().count('"update"') for stage in stages]
    sampled = [6 * 2 + 18 * 2, 6 * 1 + 18 * 3]
    trained = [2 * 2 * selected[0], 2 * 3 * selected[1]]  # two epochs
    with contextlib.chdir(finished):
        for passes, objective in ((2, "ddpo"), (3, "dpok")):
            config = make_config(overrides | {"train.objective": objective})
            for count in (1, 2):
                spent = cost(config, count)
                assert spent["queries"] == 18 * count
                assert spent["updates"] == sum(updates[:count])
                assert spent["evaluations"] == sum(sampled[:count]) + passes * sum(trained[:count])
                assert spent["seconds"] > 0


@pytest.mark.long
def test_workers_end_with_their_parent(tmp_path):
    """A study that is killed leaves no worker behind that would go on in its folders."""
    code = (
        "import multiprocessing, os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from benchmarks.study import end_with\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, mp_context=context, initializer=end_with, initargs=(os.getpid(),))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 60)\n"
        "    time.sleep(60)\n"
    )
    script = tmp_path / "study_like.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()


def test_the_committed_study_is_whole():
    """docs/results/study.json has five seeds or more of each arm and three of the other objectives, all of equally many
    queries; the page beside it was drawn from it."""
    facts = json.loads((ROOT / "docs" / "results" / "study.json").read_text())
    seeds = {name: {run["seed"] for run in facts["runs"] if run["name"] == name} for name in VARIANTS}
    assert all(len(seeds[arm]) >= 5 for arm in ("ddpo", "bpt", "bs", "b2"))
    assert all(len(seeds[name]) >= 3 for name in ("b2, dpok", "b2, d3po", "ddpo arm, dpok"))
    for found in facts["runs"]:
        assert {"arm", "objective", "seed", "curve"} <= found.keys()
        assert found["curve"][-1]["queries"] == pytest.approx(5760, rel=0.01)
    assert f"{len(facts['runs'])} runs" in (ROOT / "docs" / "results" / "study.md").read_text()
