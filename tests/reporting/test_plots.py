"""Plots are of the rows: curves, heat maps, axes and names."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from b2diffurl.experiment.evaluation_table import short
from b2diffurl.experiment.stage import Stage
from b2diffurl.experiment.stage_table import stage_rows
from b2diffurl.reporting import page
from b2diffurl.reporting.plots import curve_panels, heat_map, panel_figure, panels_figure
from b2diffurl.runtime.files import read_json_lines, write_json_lines


def drawn(panels: list, title: str):
    """The axes of a panel."""
    axes = Figure().subplots()
    next(panel for panel in panels if panel.title == title).draw(axes)
    return axes


def test_curves_are_drawn_of_the_rows(root):
    """Everything at the images scored by then, the spread one deviation to both sides, evaluations with their errors,
    seconds stacked to their sum."""
    rows, judged = stage_rows(root), page.evaluation_rows(root)
    panels = curve_panels(rows, judged)
    (line,) = drawn(panels, "Reward of the stage's images, ± one sd").lines
    assert line.get_xydata().tolist() == [[row["queries"], row["reward_mean"]] for row in rows]
    (band,) = drawn(panels, "Reward of the stage's images, ± one sd").collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(max(row["reward_mean"] + row["reward_std"] for row in rows))
    assert heights.min() == pytest.approx(min(row["reward_mean"] - row["reward_std"] for row in rows))
    test, train = drawn(panels, "Judged: reward").containers
    for container, prompts in ((test, "test"), (train, "train")):
        mine = [row for row in judged if row["prompts"] == prompts]
        assert container[0].get_xydata().tolist() == [[row["queries"], row["reward"]] for row in mine]
        (errors,) = container[2]
        spread = [segment[1, 1] - segment[0, 1] for segment in errors.get_segments()]
        assert spread == pytest.approx([2 * row["reward_se"] for row in mine])
    bars = drawn(panels, "Seconds a stage").collections  # one for each kind of work, with a bar a stage
    tops = [max(kind.get_paths()[n].vertices[:, 1].max() for kind in bars) for n in range(2)]
    timed = ("sample/load", "sample/sample", "select/load", "select/score", "train/load", "train/train")
    assert tops == pytest.approx([sum(row[f"seconds/{part}"] for part in timed) for row in rows])


def test_heat_maps_run_from_noise_to_image():
    """Stages across, timesteps down; what was not trained is empty."""
    figure = heat_map("title", {0: {101: 0.5}, 2: {901: 0.2, 101: 0.1}}, log=False)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["901", "101"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2"]
    (cells,) = axes.images
    np.testing.assert_array_equal(cells.get_array().filled(np.nan), [[np.nan, 0.2], [0.5, 0.1]])


def test_what_was_trained_and_is_zero_is_no_gap():
    """On a logarithmic scale, too, where a stage of one update has ratios of exactly 1."""
    (cells,) = heat_map("title", {0: {101: 1e-3}, 1: {901: 0.0, 101: 1e-5}}, log=True).axes[0].images
    np.testing.assert_array_equal(cells.get_array().filled(np.nan), [[np.nan, 1e-5], [1e-3, 1e-5]])


@pytest.mark.parametrize("values", [{101: 2e-5, 901: 6.4e-5}, {101: 3.1e-7, 901: 0.0094}, {101: 0.5, 901: 0.5}])
@pytest.mark.parametrize("log", [True, False])
def test_the_colour_bar_is_in_the_picture(values, log):
    """All of its labels, and they are numbers, the two ends of a logarithmic one among them."""
    figure = heat_map("title", {0: values}, log=log)
    figure.draw_without_rendering()
    labels = [one for one in figure.axes[1].get_yticklabels() if one.get_text()]
    assert len(labels) >= 4
    assert max(one.get_window_extent().x1 for one in labels) < figure.bbox.x1
    shown = [float(one.get_text()) for one in labels]
    assert (shown[0], shown[-1]) == pytest.approx((min(values.values()) if log else 0, max(values.values())), rel=0.05)


def test_what_never_clips_has_no_clip_fraction():
    titles = [[one.title for one in curve_panels([{"queries": 1}], [], clips=clips)] for clips in (True, False)]
    assert set(titles[0]) - set(titles[1]) == {"Clip fraction, mean over updates"}


def test_axes_say_what_is_there():
    """Percentages at half points are not rounded to whole ones, and there is no negative clip fraction."""
    judged = {"prompts": "test", "sampler": "training", "accuracy_se": 0.01}
    rows = [judged | {"queries": n, "accuracy": 0.45 + n / 100} for n in (0, 10)]
    panels = curve_panels([{"queries": 10, "num_updates": 1, "clip_fraction": 0.0}], rows)
    axis = drawn(panels, "Judged: accuracy").yaxis
    places = axis.get_majorticklocs()
    said = [float(label.removesuffix("%")) for label in axis.get_major_formatter().format_ticks(places)]
    assert said == pytest.approx([100 * place for place in places])
    assert drawn(panels, "Clip fraction, mean over updates").get_ylim()[0] == 0


def test_long_names_end_where_their_panel_ends():
    """Titles and legends of a function of a long package, and of a prompt file; what tells them apart is to be seen."""
    names = [f"my_company.rewards_of_ours:how_{word}_it_is" for word in ("beautiful", "surprising")]
    rows = [
        {"prompts": f"/home/{'a_long_name_' * 4}{n}.txt", "sampler": "training", "queries": 0, "stage": None}
        | dict.fromkeys(names, 0.5)
        | {f"{name}_se": 0.1 for name in names}
        for n in range(3)
    ]
    panels = [panel for panel in curve_panels([{"queries": 10}], rows) if panel.title.startswith("Judged")]
    assert len({panel.title for panel in panels}) == 2
    for panel in panels:
        figure = panel_figure(panel)
        figure.draw_without_rendering()
        (axes,) = figure.axes
        assert axes._left_title.get_window_extent().x1 < figure.bbox.x1
        legend = axes.get_legend().get_window_extent()
        assert figure.bbox.x0 < legend.x0 < legend.x1 < figure.bbox.x1


def test_watched_rewards_have_their_curve(root):
    for index in range(2):
        path = Stage(root, index).metrics("select")
        write_json_lines(
            path, [row | {"watch/clip_mean": 0.5, "watch/clip/part_mean": 0.1} for row in read_json_lines(path)]
        )
    titles = [panel.title for panel in curve_panels(stage_rows(root), [])]
    assert "clip, watched" in titles
    assert len(titles) == len(set(titles)) == 9
    assert titles[0] == "Reward of the stage's images, ± one sd"
    panels_figure(curve_panels(stage_rows(root), [])).draw_without_rendering()


def test_rewards_are_short():
    assert [short(value) for value in (0.00878, -1.8521, 12.345)] == ["0.009", "-1.852", "12.3"]
