"""The study: its arithmetic by hand, its runs as the pipeline would take them, and a page that says what the runs say."""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest
from conftest import ROOT, experiment, get_config, make_config
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from scipy.stats import ttest_rel

from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.keys import flatten
from b2diffurl.configuration.rules import check
from b2diffurl.configuration.settings import read_settings
from b2diffurl.experiment.stage import Stage
from b2diffurl.objectives import OBJECTIVES, Objective
from b2diffurl.objectives.ddpo import DdpoOptions
from b2diffurl.runtime import files
from benchmarks.study import (
    CPU_FILE,
    FULL,
    PHASES,
    QUICK,
    VARIANTS,
    Scale,
    Variant,
    changes,
    configure,
    cost,
    draw,
    finished_run,
    make_stages,
    record_cpu_seconds,
    root_of,
    runs,
)
from benchmarks.study_format import SETS
from benchmarks.study_noised import ARMS as NOISED
from benchmarks.study_noised import BEST, seconds_per_evaluation, targets_table
from benchmarks.study_report import page, write_report
from benchmarks.study_statistics import (
    at_equal_cost,
    at_matched_accuracy,
    by_variant,
    cost_to_reach,
    differences,
    final,
    interval,
    mean_curve,
    pooled_deviation,
    value_at,
    with_cost,
    with_cpu_seconds,
)

MEASURED = (
    "accuracy", "reward", "shapes/well_formed", "diversity/clip", "diversity/clip_right", "diversity/clip_vendi",
    "diversity/layout_right",
)  # fmt: skip
COMMITTED = ROOT / "docs" / "results" / "study.json"
AGAINST = {variant.name: variant.against for variant in VARIANTS.values()}


def run(name: str, seed: int, accuracies: list[float], *, cost: float = 100.0, images: float = 100.0) -> dict:
    """A run whose curve has these accuracies at 0, 1, 2, … times `cost` of everything; diversity is 1 - accuracy.

    All runs score equally many `images` a point, unless told otherwise.
    """
    curve = []
    for n, accuracy in enumerate(accuracies):
        figures = {key: 1 - accuracy if key.startswith("diversity") else accuracy for key in MEASURED}
        spent = dict.fromkeys(("evaluations", "updates", "seconds"), n * cost) | {"queries": n * images}
        curve.append(spent | {prompts: dict(figures) for prompts in SETS})
    made = {"hardware": "here", "device": "cpu", "versions": {"torch": "2"}, "date": "today"}
    return {"name": name, "arm": name, "objective": "ddpo", "seed": seed, "settings": {}, "curve": curve} | made


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


def test_ends_are_compared_after_equally_many_images():
    """A run that scored a tenth more images is not compared at its end; one that scored 1 in 200 more is."""
    one, more = run("b2", 1, [0.4, 0.5]), run("ddpo", 1, [0.4, 0.5], images=110)
    with pytest.raises(ValueError, match="b2 scored 100 images and ddpo scored 110 images"):
        final("test", "accuracy")(one, more)
    assert final("test", "accuracy")(one, run("ddpo", 1, [0.4, 0.5], images=100.5)) == 0


def test_the_cost_of_an_accuracy_by_hand():
    """0.4, 0.6, 0.5, 0.9 at 0, 100, 200, 300: interpolated, first time round, nothing if never, 0 if the base has it."""
    found = run("ddpo", 1, [0.4, 0.6, 0.5, 0.9])
    for accuracy, spent in ((0.3, 0), (0.4, 0), (0.45, 25), (0.6, 100), (0.7, 250), (0.9, 300)):
        assert cost_to_reach(found, "test", accuracy, "queries") == pytest.approx(spent)
    assert cost_to_reach(found, "test", 0.91, "queries") is None


def test_a_mean_curve_by_hand():
    """Means of accuracies and costs, point by point; a cost that one run lacks is left out."""
    cheap, dear = run("b2", 1, [0.4, 0.5]), run("b2", 2, [0.4, 0.9], cost=300)
    cheap["curve"][-1]["cpu_seconds"] = 7.0
    mean = mean_curve([cheap, dear])
    assert mean["curve"][-1]["test"]["accuracy"] == pytest.approx(0.7)
    assert (mean["curve"][-1]["queries"], mean["curve"][-1]["evaluations"]) == (100, 200)
    assert "cpu_seconds" not in mean["curve"][-1]
    assert cost_to_reach(mean, "test", 0.55, "evaluations") == pytest.approx(100)


def test_cpu_seconds_of_a_calibrated_arm_are_its_evaluations_times_the_median():
    """Three runs of 50 evaluations in 4, 9 and 5 s: 0.1 s each. Another arm keeps what it has, or stays without."""
    calibration = {"arms": {"ddpo": {"queries": 10, "evaluations": 50, "cpu_seconds": [4.0, 9.0, 5.0]}}}
    each = seconds_per_evaluation(calibration)
    assert each == {"ddpo": pytest.approx(0.1)}
    timed, untimed = run("b2", 1, [0.4, 0.5]), run("b2", 2, [0.4, 0.5])
    for n, point in enumerate(timed["curve"]):
        point["cpu_seconds"] = 3.0 * n
    found = by_variant(with_cpu_seconds([run("ddpo", 1, [0.4, 0.5, 0.6]), timed, untimed], each))
    assert [point["cpu_seconds"] for point in found["ddpo"][1]["curve"]] == pytest.approx([0, 10, 20])
    assert found["b2"] == {1: timed, 2: untimed}
    known = with_cost(found, "cpu_seconds")
    assert {name: [*some] for name, some in known.items()} == {"ddpo": [1], "b2": [1]}
    # 3 s of b2 are 30 % of the first 10 s of ddpo, where it has come from 0.4 to 0.43.
    assert differences(known, "b2", "ddpo", at_equal_cost("test", "accuracy", "cpu_seconds")) == [pytest.approx(0.07)]
    assert seconds_per_evaluation(None) == {}


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
        settings = read_settings(configure(FULL, variant))
        counts.append(settings.schedule.num_stages * Budget.of(settings).num_images)
    assert all(max(pair) / min(pair) < 1.01 for pair in combinations(counts, 2))


def test_every_variant_changes_what_it_says():
    """Settings are other values than the arm's own, so that no control is an arm by another name."""
    for variant in VARIANTS.values():
        plain = Variant(variant.arm, variant.arm, 1)
        changed, arm = (flatten(configure(FULL, one).to_dict()) for one in (variant, plain))
        assert {key for key in arm if changed[key] != arm[key]} - {"exp_name"} == set(variant.settings)


@pytest.fixture
def small(tmp_path, monkeypatch) -> Scale:
    """A study of plain DDPO and b2 with two seeds, of which a committed file has seed 1 of both; in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    arms = [VARIANTS["ddpo"], VARIANTS["b2"]]
    scale = Scale("small", 2, {}, (arms,), tmp_path / "committed.json")
    kept = [run(arm.name, 1, [0.4, 0.5]) | {"settings": changes(configure(scale, arm))} for arm in arms]
    files.write_json(scale.committed, facts_of(kept, calibration={"arms": {}}))
    return scale


def test_committed_runs_are_not_made_again(small):
    """A committed run counts if its settings are today's. A run made here goes before it, if it has them, too."""
    ddpo, b2 = small.blocks[0]
    assert finished_run(small, ddpo, 1)["date"] == "today"
    assert finished_run(small, ddpo, 2) is None
    assert finished_run(small, Variant("b2", "b2", 2, {"train.eps": 0.5}), 1) is None
    assert finished_run(replace(small, committed=None), ddpo, 1) is None
    here = root_of(configure(small, b2)) / "study.json"
    here.parent.mkdir(parents=True)
    files.write_json(here, run("b2", 1, [0.4, 0.7]) | {"date": "later"})
    assert finished_run(small, b2, 1)["date"] == "later"
    files.write_json(here, run("b2", 1, [0.4, 0.7]) | {"date": "later", "settings": {"train.eps": 0.5}})
    assert finished_run(small, b2, 1)["date"] == "today"


def test_a_new_key_makes_no_other_run_of_a_committed_one(small, monkeypatch):
    """A key that is neutral in b2 is no change of any arm; set in an arm, it is one."""
    ddpo, wanted = small.blocks[0][0], changes(configure(small, small.blocks[0][0]))

    def get_newer(preset: str) -> ConfigDict:
        config = get_config(preset).unlock()
        config.newer_key = 0
        return config.lock()

    monkeypatch.setattr("benchmarks.study.get_config", get_newer)
    assert changes(configure(small, ddpo)) == wanted
    assert finished_run(small, ddpo, 1)
    changed = Variant("ddpo", "ddpo", 2, {"newer_key": 1})
    assert changes(configure(small, changed)) == wanted | {"newer_key": 1}
    assert finished_run(small, changed, 1) is None


def test_the_page_is_drawn_from_both(small, tmp_path, monkeypatch):
    """Committed runs and one made here are on one page, which says when and where; the rest is named as not run."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **options: None)  # the pictures are another test's
    here = root_of(configure(small, small.blocks[0][1], 2)) / "study.json"
    here.parent.mkdir(parents=True)
    files.write_json(here, run("b2", 2, [0.4, 0.7]) | {"date": "later", "hardware": "there"})
    draw(small, tmp_path / "out", {}, None)
    written = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [(found["name"], found["seed"]) for found in written["runs"]] == [("ddpo", 1), ("b2", 1), ("b2", 2)]
    text = (tmp_path / "out" / "study.md").read_text()
    assert "They were made later on there (cpu), torch 2 (1 runs); today on here (cpu), torch 2 (2 runs)." in text
    assert "Not run yet: ddpo (seed 2)." in text


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
    assert {path.name for path in tmp_path.iterdir()} == {"study.md", *pictures}  # and none of arms that were not run


def facts_of(made_up: list[dict], **more) -> dict:
    """The content of a study.json with these runs."""
    return {
        "quick": False,
        "command": "study",
        "num_images": 48,
        "setting": {"learning_rate": 1e-3, "batch_size": 1, "num_epochs": 1, "eps": 0.1, "step_weight": "none"},
        "failed": {},
        "missing": [("b2, dpok", 1), ("b2, dpok", 3)],
        "runs": made_up,
    } | more


def draw_page(made_up: list[dict], folder: Path, **more) -> str:
    write_report(facts_of(made_up, **more), AGAINST, folder)
    return (folder / "study.md").read_text()


def noised_runs(**changed: list[float]) -> list[dict]:
    """Five seeds of plain DDPO and of the best arm, whose evaluations are a quarter as many; both score 300 images."""
    curves = {"ddpo": [0.4, 0.5, 0.6, 0.7], BEST: [0.4, 0.7, 0.8, 0.9]} | changed
    made_up = [run("ddpo", seed, curves["ddpo"], cost=40_000) for seed in range(1, 6)]
    made_up += [run(BEST, seed, curves[BEST], cost=10_000) for seed in range(1, 6)]
    for one in made_up:
        for point, prompts in product(one["curve"], SETS):
            point[prompts]["shapes/well_formed"] = 0.9
    return made_up


CALIBRATION = {
    "arms": {
        "ddpo": {"queries": 100, "evaluations": 40_000, "cpu_seconds": [41.0, 40.0, 39.0]},
        BEST: {"queries": 100, "evaluations": 10_000, "cpu_seconds": [19.0, 20.0, 30.0]},
    },
    "date": "yesterday",
    "hardware": "here",
    "versions": {"torch": "2"},
}


def target_rows(made_up: list[dict], calibration: dict | None = None) -> list[list[str]]:
    found = by_variant(with_cpu_seconds(made_up, seconds_per_evaluation(calibration)))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in targets_table(found).splitlines()[2:]]


def test_targets_by_hand():
    """At equal images 0.9 against 0.7, at 30,000 evaluations against 0.475, at 60 CPU seconds against 0.55; 0.7 is reached
    at a third of the images and a twelfth of the evaluations. Diversity is 1 - accuracy here, so it is DDPO's."""
    rows = target_rows(noised_runs(), CALIBRATION)
    assert [row[2] for row in rows] == ["**yes**"] * 8
    assert [row[1].split()[0] for row in rows[:3]] == ["**+20.0**", "**+42.5**", "**+35.0**"]
    assert [row[1] for row in rows[3:5]] == ["33.3 %: 100", "8.3 %: 10 thousand"]
    assert rows[5][1].split()[0] == "**+0.0**"


def test_targets_that_are_missed():
    """An arm that never comes to DDPO's accuracy, or is not measured, does not meet a target."""
    poor = target_rows(noised_runs(**{BEST: [0.4, 0.45, 0.5, 0.55]}))
    assert [row[2] for row in poor[:2]] == ["**no**", "**yes**"]
    assert poor[2][1:] == ["", "not measured"]
    assert [row[1:] for row in poor[3:5]] == [["never came to it", "**no**"]] * 2
    unlearned = target_rows(noised_runs(ddpo=[0.4, 0.45, 0.42, 0.4]))  # the base has what DDPO has in the end: at no cost
    assert [row[1] for row in unlearned[3:5]] == ["0.0 %: 0", "0.0 %: 0 thousand"]
    malformed = noised_runs()
    for found in malformed:
        found["curve"][-1]["test"]["shapes/well_formed"] = 0.87
    assert target_rows(malformed)[5][2] == "**no**"
    assert {row[2] for row in target_rows(noised_runs()[:5])} == {"not measured"}


def test_the_page_has_a_section_on_noised_images(tmp_path):
    """Its tables say what the runs say, and its picture is there; without such arms there is neither."""
    text = draw_page(noised_runs(), tmp_path, calibration=CALIBRATION)
    section = text[text.index("## Noised images and a tree") : text.index("## Controls")]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    assert [f"{BEST} − ddpo", "held-out", "**+20.0** [+20.0, +20.0]", "**+42.5** [+42.5, +42.5]",
            "**+35.0** [+35.0, +35.0]"] in lines  # fmt: skip
    assert [BEST, "100 (33 %)", "10 thousand (8 %)", "20 s (17 %)", "5 of 5"] in lines
    assert [BEST, *["100 / 10 / 20"] * 5] in lines
    assert [BEST, "19.0 20.0 30.0", "200.0", "2.00", ""] in lines
    assert "(yesterday, here, torch 2)" in section
    assert (tmp_path / "study_noised.png").is_file()
    assert "noised" not in page(facts_of([one for one in noised_runs() if one["name"] == "ddpo"]), AGAINST)


def test_arms_on_noised_images_leave_other_figures_alone():
    """Tables of the other arms and controls, and the deviations pooled for them, are the same without the new arms."""
    old = json.loads(COMMITTED.read_text())
    old["runs"] = [one for one in old["runs"] if one["name"] not in NOISED]
    added = [one | {"name": BEST} for one in old["runs"] if one["name"] == "b2"]
    before, after = page(old, AGAINST), page(old | {"runs": old["runs"] + added}, AGAINST)
    start = after.index("## Noised images and a tree")
    assert after[after.index("## The arms") : start] == before[before.index("## The arms") : before.index("## Controls")]
    assert after[after.index("## Controls") :] == before[before.index("## Controls") :]


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
    rows = [line for line in page.splitlines() if "equally many images scored" in line]
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


def test_a_trained_noised_image_costs_a_pass_for_every_network_it_needs(finished, overrides, monkeypatch):
    """Two for forward and backward, one for the policy that sampled, one for the base."""
    spent = {}
    with contextlib.chdir(finished):
        config = make_config(overrides)
        trained = sum(Stage(root_of(config), index).manifest("train")["num_transitions"] for index in range(2))
        for old, base in ((False, False), (True, False), (True, True)):
            needing = type("Needing", (Objective,), {"needs_old": old, "needs_base": base})
            monkeypatch.setitem(OBJECTIVES, "ddpo", needing(OBJECTIVES["ddpo"].loss, DdpoOptions))
            spent[old, base] = cost(config, 2)["evaluations"]
    assert spent[True, False] - spent[False, False] == trained
    assert spent[True, True] - spent[False, False] == 2 * trained


def test_cpu_seconds_of_interrupted_phases(workplace, overrides):
    """Where half of a phase was made before, its seconds count twice. Where all of it was, they are not known, and the run
    has none from that stage on."""
    with contextlib.chdir(workplace):
        config = make_config(overrides)
        stages = [Stage(root_of(config), index) for index in range(2)]
        assert "cpu_seconds" not in cost(config, 1)
        for stage in stages:
            for phase, seconds in (("sample", 100.0), ("select", 10.0), ("train", 1.0)):
                record_cpu_seconds(stage, phase, seconds)
        assert cost(config, 2)["cpu_seconds"] == pytest.approx(222)
        set_share(stages[0], 0.5)
        record_cpu_seconds(stages[0], "sample", 70.0)
        assert cost(config, 1)["cpu_seconds"] == pytest.approx(151)
        (root_of(config) / CPU_FILE).unlink()
        set_share(stages[1], 0.0)
        for stage in stages:
            for phase in PHASES:
                record_cpu_seconds(stage, phase, 1.0)
        assert cost(config, 1)["cpu_seconds"] == pytest.approx(4)
        assert "cpu_seconds" not in cost(config, 2)


def test_only_phases_made_now_are_timed(begin):
    """A stage that was sampled before gets CPU seconds for the phases that follow; made again, nothing is timed."""
    folder, settings = begin({})
    with contextlib.chdir(folder):
        config = make_config(settings | {"stage_cnt": 1})
        make_stages(config)
        recorded = files.read_json(root_of(config) / CPU_FILE)
        assert recorded.keys() == {"stage0/select", "stage0/train"}
        make_stages(config)
        assert files.read_json(root_of(config) / CPU_FILE) == recorded


def set_share(stage: Stage, share: float) -> None:
    """Write into the sample phase's manifest that the last process made this share of it."""
    manifest = stage.manifest("sample")
    manifest["seconds"]["share"] = share
    files.write_record(stage.manifest_path("sample"), {key: value for key, value in manifest.items() if key != files.SEAL})


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
    facts = json.loads(COMMITTED.read_text())
    seeds = {name: {run["seed"] for run in facts["runs"] if run["name"] == name} for name in VARIANTS}
    assert all(len(seeds[arm]) >= 5 for arm in ("ddpo", "bpt", "bs", "b2"))
    assert all(len(seeds[name]) >= 3 for name in ("b2, dpok", "b2, d3po", "ddpo arm, dpok"))
    for found in facts["runs"]:
        assert {"arm", "objective", "seed", "curve"} <= found.keys()
        assert found["curve"][-1]["queries"] == pytest.approx(5760, rel=0.01)
    assert COMMITTED.with_suffix(".md").read_text() == page(facts, AGAINST)


def test_committed_runs_are_todays():
    """Each has the settings that its variant has now, so that the study would not make it again."""
    for found in json.loads(COMMITTED.read_text())["runs"]:
        assert flatten(found["settings"]) == changes(configure(FULL, VARIANTS[found["name"]], found["seed"])), found["name"]
