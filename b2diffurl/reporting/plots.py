"""The pictures of a report, drawn by matplotlib. Each is a figure, saved as PNG and, for the page, as SVG."""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from b2diffurl.experiment.branch_picture import GroupPicture
from b2diffurl.experiment.evaluation_table import SETS, set_title, short
from b2diffurl.experiment.stage_table import Row
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import shorten

INK, FAINT, GRID = "#1b1d20", "#6a6f77", "#dfe2e6"  # `to_svg` replaces these by the page's colours, light or dark
BLUE, ORANGE, GREEN, PURPLE, RED = "#3b7dd8", "#e07b39", "#2f9e5f", "#a05cc0", "#d0453f"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED)
STYLE: dict[str, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",  # text stays text, which is set in the reader's own font
    "figure.dpi": 100,
}
# The page's own colours and letters. A picture in <img> has none of the page's style, so it brings them along.
PAGE_STYLE = (
    "<style>:root { --ink: #1b1d20; --faint: #5f656d; --grid: #dfe2e6; } "
    "@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --faint: #a2a9b1; --grid: #363b41; } } "
    "text { font-family: system-ui, sans-serif !important; }</style>"
)
PANEL_INCHES = (4.0, 2.9)
PANEL_AXES = (0.17, 0.27, 0.8, 0.63)  # left, bottom, width, height in a panel; the room below is for a legend
MANY = 100  # points of a curve, above which each is not marked; and the most columns of a map, and bars
TREE_COLUMN, TREE_ROW = 1.35, 1.12  # in the branch picture, from one image to the next; an image has side 1


@dataclass(frozen=True)
class Panel:
    """One small plot: its title, and the function that draws it."""

    title: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Pair:
    """One prompt's images by (base, tuned) model, on the same noise."""

    prompt: str
    images: tuple[Path, Path]
    rewards: tuple[float | None, float | None]
    right: tuple[bool, bool] | None  # whether the judge accepts each; None: there is no judge


# ---- curves over the images scored so far ----


def curve_panels(stages: Sequence[Row], evaluations: Sequence[Row], *, clips: bool = True) -> list[Panel]:
    """The panels of a run, over images scored (`queries`). The figures of a stage and of its checkpoint stand at the stage's
    end.

    `clips` is whether the objective clips gradients; if not there is no panel of how often.
    """
    after = [row["queries"] for row in stages]
    trained = [row for row in stages if "num_updates" in row]
    panels = [Panel("Reward of the stage's images, ± one sd", lambda axes: draw_spread(axes, after, stages, "reward"))]
    # A second slash marks a part of a reward: too many to have a panel each.
    watched = [key.removesuffix("_mean") for key in stages[-1] if key.startswith("watch/") and key.count("/") == 1]
    panels += [
        Panel(
            f"{ending(name.removeprefix('watch/'), 28)}, watched",
            lambda axes, name=name: draw_series(axes, after, stages, f"{name}_mean"),
        )
        for name in watched
    ]
    panels += [
        Panel(f"Judged: {ending(describe_figure(key), 31)}", lambda axes, key=key: draw_judged(axes, evaluations, key))
        for key in figures_of(evaluations)
    ]
    x = [row["queries"] for row in trained]
    return [
        *panels,
        Panel("Trained steps S", lambda axes: draw_series(axes, after, stages, "num_trained_steps", steps=True)),
        Panel("Kept images a stage", lambda axes: draw_kept(axes, after, stages)),
        Panel("Updates a stage", lambda axes: draw_series(axes, x, trained, "num_updates", steps=True)),
        *(
            [Panel("Clip fraction, mean over updates", lambda axes: draw_share(axes, x, trained, "clip_fraction"))]
            if clips
            else []
        ),
        Panel("Max |log-ratio| at the first update", lambda axes: draw_first_ratio(axes, x, trained)),
        Panel("Gradient norm, mean over updates", lambda axes: draw_series(axes, x, trained, "grad_norm")),
        Panel(f"Seconds a stage{mean_text(len(stages))}", lambda axes: draw_seconds(axes, after, stages)),
    ]


def mean_text(count: int) -> str:
    """What a picture shows of so many stages, for its title or axis: of many the means of several."""
    return f", means of {together}" if (together := -(-count // MANY)) > 1 else ""


def figures_of(evaluations: Sequence[Row]) -> list[str]:
    """Which figures the evaluations have, in the order to show them: accuracy, reward, other rewards, diversities.

    Left out are parts of rewards, and figures that are None in all rows.
    """
    # Every figure has a standard error beside it, which tells figures from conditions such as num_steps.
    keys = dict.fromkeys(key.removesuffix("_se") for row in evaluations for key in row if key.endswith("_se"))
    figures = [key for key in keys if not key.endswith("_gain") and ("/" not in key or key.startswith("diversity/"))]
    figures = [key for key in figures if any(row.get(key) is not None for row in evaluations)]
    return sorted(figures, key=lambda key: (key != "accuracy", key != "reward", key.startswith("diversity/")))


def describe_figure(key: str) -> str:
    """A figure's name in words. Diversity is measured among the images of one prompt."""
    if not key.startswith("diversity/"):
        return key
    features, _, which = key.removeprefix("diversity/").partition("_")
    if features == "inception":
        return "Inception Score"
    return {"vendi": f"Vendi score ({features})", "right": f"{features} distance of right images"}.get(
        which, f"{features} distance"
    )


def draw_series(axes: Axes, x: Sequence[float], rows: Sequence[Row], key: str, *, steps: bool = False) -> None:
    """One figure over x; rows without it are skipped. `steps` is for counts: a staircase, whole numbers, from 0 on."""
    points = [(at, row[key]) for at, row in zip(x, rows, strict=True) if row.get(key) is not None]
    drawn = zip(*points, strict=True) if points else ((), ())
    axes.plot(*drawn, line(points), color=BLUE, drawstyle="steps-mid" if steps else "default")
    if steps:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
        axes.set_ylim(0, 1.15 * max((value for _, value in points), default=0) or 1)  # 1: an axis needs a length


def line(points: Sequence[Any]) -> str:
    """How a curve through these points is drawn: few of them are marked."""
    return "o-" if len(points) <= MANY else "-"


def draw_share(axes: Axes, x: Sequence[float], rows: Sequence[Row], key: str) -> None:
    """One figure over x, from 0 on."""
    draw_series(axes, x, rows, key)
    axes.set_ylim(bottom=0)


def draw_spread(axes: Axes, x: Sequence[float], rows: Sequence[Row], name: str) -> None:
    """`<name>_mean` over x, with a band of `<name>_std` on both sides."""
    mean, spread = (np.array([row[f"{name}_{key}"] for row in rows]) for key in ("mean", "std"))
    axes.fill_between(x, mean - spread, mean + spread, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(x, mean, line(mean), color=BLUE)


def draw_judged(axes: Axes, evaluations: Sequence[Row], key: str) -> None:
    """One evaluated figure ± its standard error over the images scored, a line for each prompt set and sampler."""
    others = sorted({row["prompts"] for row in evaluations} - set(SETS))
    for colour, prompts in zip(cycle(COLOURS), [*SETS, *others], strict=False):
        for sampler, dashes in (("training", "-"), ("deployed", ":")):
            rows = [row for row in evaluations if (row["prompts"], row["sampler"]) == (prompts, sampler)]
            rows = [row for row in rows if row["queries"] is not None and row.get(key) is not None]
            if rows:
                title = set_title(rows[-1])
                # In few letters: `held-out`, `training`, or `training, as test` where the held-out prompts are trained on.
                label = title.replace(" prompts", "").lower() if prompts in SETS else ending(title, 15)
                label = label.partition(" (")[0] if label.startswith("held-out") else label
                label += ", deployed" if sampler == "deployed" else ""
                at, values = [row["queries"] for row in rows], np.array([row[key] for row in rows])
                errors = np.array([row[f"{key}_se"] or 0.0 for row in rows])
                if len(rows) <= MANY:
                    axes.errorbar(at, values, errors, color=colour, linestyle=dashes, marker="o", label=label)
                else:
                    axes.plot(at, values, color=colour, linestyle=dashes, label=label)
                    axes.fill_between(at, values - errors, values + errors, color=colour, alpha=0.18, linewidth=0)
    if key == "accuracy":
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
    if axes.get_legend_handles_labels()[0]:
        # Below the axes, in the middle of the panel: inside it would hide lines, of which there may be many.
        axes.legend(loc="upper center", bbox_to_anchor=(0.41, -0.17), ncols=2)


def draw_kept(axes: Axes, x: Sequence[float], rows: Sequence[Row]) -> None:
    """How many good and bad images a stage kept, and how many groups there were."""
    best, worst = ([row[key] for row in rows] for key in ("num_best", "num_worst"))
    axes.plot(x, best, line(best), color=GREEN, label="good")
    axes.plot(x, worst, line(worst), color=RED, label="bad")
    axes.plot(x, [row["num_groups"] for row in rows], linestyle="--", color=FAINT, linewidth=1, label="groups")
    axes.margins(y=0.25)
    axes.autoscale_view()
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", ncols=3)


def draw_first_ratio(axes: Axes, x: Sequence[float], rows: Sequence[Row]) -> None:
    """The largest |log-ratio| of each stage's first update, where it should be 0 but for rounding."""
    draw_series(axes, x, rows, "max_abs_log_ratio_first")
    if any(row["max_abs_log_ratio_first"] for row in rows):
        # Linear near 0, because some stages may be exactly 0, which a logarithm cannot show.
        axes.set_yscale("symlog", linthresh=1e-7)
    else:
        axes.set_ylim(-0.1, 1)
        axes.set_yticks([0], ["0"])
        axes.annotate("exactly 0 in every stage", (0.5, 0.5), xycoords="axes fraction", ha="center", color=FAINT)


def draw_seconds(axes: Axes, x: Sequence[float], rows: Sequence[Row]) -> None:
    """Seconds of each stage as stacked bars: sampling, scoring, training, and the loading of all phases.

    Of many stages there are areas instead, of means of several that follow each other.
    """
    parts = {"sample": "sample/sample", "score": "select/score", "train": "train/train"}
    seconds = {name: [row.get(f"seconds/{key}", 0.0) for row in rows] for name, key in parts.items()}
    loading = [
        key for key in sorted({key for row in rows for key in row}) if key.startswith("seconds/") and key.endswith("/load")
    ]
    # Loading of all phases together: it does not grow with the stage.
    seconds["load"] = [sum(row.get(key, 0.0) for key in loading) for row in rows]
    together = -(-len(rows) // MANY)
    x = means_of(x, together)
    seconds = {name: means_of(values, together) for name, values in seconds.items()}
    below = np.zeros(len(x))
    for (name, values), colour in zip(seconds.items(), COLOURS, strict=False):
        if together == 1:
            draw_bars(axes, x, below, below + values, label=name, color=colour, linewidths=0)
        else:
            axes.fill_between(x, below, below + values, step="mid", label=name, color=colour, linewidth=0)
        below = below + values
    axes.margins(y=0.25)
    axes.autoscale_view()
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", ncols=4, columnspacing=1.0, handlelength=1.0)


def draw_bars(axes: Axes, x: Sequence[float], below: np.ndarray, top: np.ndarray, **style: Any) -> None:
    """A bar at each x, as wide as the smallest distance between two allows."""
    width = 0.7 * (x[0] if len(x) == 1 else min(np.diff(x)))
    left, right = np.array(x) - width / 2, np.array(x) + width / 2
    corners = np.stack([[left, below], [right, below], [right, top], [left, top]]).transpose(2, 0, 1)
    axes.add_collection(PolyCollection(corners, **style))  # not axes.bar, which makes a patch of each


def means_of(values: Sequence[float], together: int) -> np.ndarray:
    """The mean of each so many values that follow each other; of the last ones, which may be fewer. NaN does not count."""
    cut = [np.asarray(values[start : start + together], dtype=float) for start in range(0, len(values), together)]
    return np.array([np.nan if np.isnan(one).all() else np.nanmean(one) for one in cut])


def panel_figure(panel: Panel) -> Figure:
    """One panel as a figure of its own, for the page."""
    figure = Figure(figsize=PANEL_INCHES)
    fill_panel(figure.add_axes(PANEL_AXES), panel)
    return figure


def panels_figure(panels: Sequence[Panel]) -> Figure:
    """All panels in one figure, three in a row."""
    width, height = PANEL_INCHES
    rows = -(-len(panels) // 3)  # rounded up
    figure = Figure(figsize=(3 * width, rows * height))
    left, bottom, wide, high = PANEL_AXES
    for n, panel in enumerate(panels):
        across, up = n % 3, rows - 1 - n // 3
        fill_panel(figure.add_axes(((across + left) / 3, (up + bottom) / rows, wide / 3, high / rows)), panel)
    return figure


def fill_panel(axes: Axes, panel: Panel) -> None:
    """Draw a panel with its title, over the images scored."""
    panel.draw(axes)
    axes.set_title(panel.title)
    axes.set_xlabel("images scored", labelpad=2)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6))


# ---- by timestep ----


def heat_map(title: str, values: Mapping[int, Mapping[float, float]], *, log: bool) -> Figure:
    """`values`, {stage: {timestep: value}}, as colours: stages across, timesteps down from noise to image.

    Steps that a stage did not train stay empty. On a logarithmic scale 0 gets the colour of the smallest positive value. Of
    many stages a column has the mean of several that follow each other.
    """
    stages, timesteps = sorted(values), sorted({t for column in values.values() for t in column}, reverse=True)
    together = -(-len(stages) // MANY)
    grid = np.array([means_of([values[stage].get(t, np.nan) for stage in stages], together) for t in timesteps])
    stages = stages[::together]
    positive = grid[np.isfinite(grid) & (grid > 0)]
    if log and positive.size:
        norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01))  # equal ends would be no scale
        grid, ticks = np.where(grid <= 0, positive.min(), grid), np.geomspace(norm.vmin, norm.vmax, 4)
    else:
        norm = Normalize(0, positive.max() if positive.size else 1)
        ticks = np.linspace(0, norm.vmax, 5)
    figure = Figure(figsize=(4.6, 2.8))
    axes = figure.add_axes((0.14, 0.16, 0.64, 0.73))
    axes.grid(visible=False)
    # An image has its first row, of noise, on top. It leaves no seams between the cells, as their outlines would.
    cells = axes.imshow(grid, cmap="viridis", norm=norm, aspect="auto", interpolation="none")
    axes.set_yticks(range(len(timesteps)), [f"{t:.4g}" for t in timesteps])
    axes.set_xticks(thin(range(len(stages))), [str(stages[n]) for n in thin(range(len(stages)))])
    axes.set(xlabel=f"stage{mean_text(len(values))}", ylabel="timestep t", title=title)
    bar = figure.colorbar(cells, cax=figure.add_axes((0.8, 0.16, 0.03, 0.73)))
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])  # short: there is little room at the right
    bar.minorticks_off()
    bar.outline.set_visible(False)
    return figure


def thin(values: Sequence[int]) -> list[int]:
    """At most ten of the values, evenly spaced: for the labels of an axis."""
    return list(values)[:: -(-len(values) // 10)]


# ---- the branch picture ----


def tree_figure(tree: GroupPicture, title: str, notes: Sequence[str], marks: Mapping[int, str]) -> Figure:
    """A group as a tree, from left to right: the shared prefix, then its K branches to their images.

    `notes` [K] stand beside the images. `marks` says which branches are a "winner" (green) or a "loser" (red).
    """
    shared, apart = sorted(tree.shared), sorted(tree.branches[0])
    left = {step: n * TREE_COLUMN for n, step in enumerate(shared)}
    left |= {step: (len(shared) + n) * TREE_COLUMN + 0.5 for n, step in enumerate(apart)}  # 0.5: room for the bends
    width, height = left[apart[-1]] + 2.5, len(tree.branches) * TREE_ROW + 1.0
    figure = Figure(figsize=(width * 0.92, height * 0.92))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.25, width - 0.25), ylim=(len(tree.branches) * TREE_ROW + 0.1, -0.9), aspect="equal")
    axes.set_axis_off()
    middle = (len(tree.branches) - 1) / 2 * TREE_ROW  # the prefix stands halfway between the first and the last branch
    draw_links(axes, [left[step] for step in shared], middle, FAINT)
    for branch, states in enumerate(tree.branches):
        colour = {"winner": GREEN, "loser": RED}.get(marks.get(branch, ""), FAINT)
        tops = draw_way(axes, tree, branch, left, middle, colour)
        for step in apart:
            frame, linewidth = (colour, 2.6) if step == apart[-1] else (GRID, 0.8)
            if branch % tree.together[step] == 0:  # the first of those that share it
                place(axes, states[step], left[step], tops[step], frame, linewidth)
        note = notes[branch] + (f"\n{marks[branch]}" if branch in marks else "")
        ink = colour if branch in marks else INK
        axes.text(left[apart[-1]] + 1.15, tops[apart[-1]] + 0.5, note, va="center", color=ink, linespacing=1.5)
    for step in shared:
        place(axes, tree.shared[step], left[step], middle, GRID, 0.8)
    for step in (*shared, *apart):
        name = {0: "noise", tree.num_steps: "image"}.get(step, f"{step} of {tree.num_steps} steps")
        above = middle - 0.08 if step in shared else (tree.together[step] - 1) / 2 * TREE_ROW - 0.08
        axes.text(left[step] + 0.5, above, name, ha="center", va="bottom", color=FAINT, fontsize=8)
    axes.text(-0.1, -0.72, title, fontsize=11, fontweight="bold", va="center", parse_math=False)
    return figure


def draw_way(
    axes: Axes, tree: GroupPicture, branch: int, left: Mapping[int, float], middle: float, colour: str
) -> dict[int, float]:
    """Draw the lines of a branch from the prefix to its image; returns the top of its tile at each step.

    A tile that several branches share stands halfway between the first and the last of them, and so do their lines.
    """
    apart = sorted(tree.branches[branch])
    first = {step: branch - branch % tree.together[step] for step in apart}
    tops = {step: (first[step] + (tree.together[step] - 1) / 2) * TREE_ROW for step in apart}
    colours = {step: colour if tree.together[step] == 1 else FAINT for step in apart}
    draw_bend(axes, (left[max(tree.shared)] + 1, middle), (left[apart[0]], tops[apart[0]]), colours[apart[0]])
    for before, after in pairwise(apart):
        if tops[before] == tops[after]:
            draw_links(axes, [left[before], left[after]], tops[after], colours[after])
        else:
            draw_bend(axes, (left[before] + 1, tops[before]), (left[after], tops[after]), colours[after])
    return tops


def draw_links(axes: Axes, lefts: Sequence[float], top: float, colour: str) -> None:
    """Lines from each image of a row to the next, at half their height."""
    for before, after in pairwise(lefts):
        axes.plot([before + 1, after], [top + 0.5] * 2, color=colour, linewidth=1.4, zorder=0)


def draw_bend(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """A line from where branches part to one of them, level at both ends; (x, top of the row) of each."""
    t = np.linspace(0, 1, 40)
    bend = (3 - 2 * t) * t**2
    x, y = start[0] + (end[0] - start[0]) * t, start[1] + 0.5 + (end[1] - start[1]) * bend
    axes.plot(x, y, color=colour, linewidth=1.4, zorder=0)


def place(axes: Axes, image: np.ndarray, left: float, top: float, frame: str, linewidth: float) -> None:
    """Draw an image [h,w,3] in the middle of the square of side 1 at (left, top), with a frame of this colour."""
    # Small images are pixel art or test images: their pixels should be seen as squares.
    smooth = "nearest" if image.shape[1] < 128 else "antialiased"
    high, wide = (side / max(image.shape[:2]) for side in image.shape[:2])
    left, top = left + (1 - wide) / 2, top + (1 - high) / 2
    axes.imshow(image, extent=(left, left + wide, top + high, top), interpolation=smooth, zorder=1)
    axes.add_patch(Rectangle((left, top), wide, high, fill=False, edgecolor=frame, linewidth=linewidth, zorder=2))


# ---- before and after ----


def pairs_figure(title: str, labels: Sequence[str], pairs: Sequence[Pair]) -> Figure:
    """Two rows of images, base above tuned, rewards under them; frames are green or red where a judge has accepted or not.

    `labels` name the two rows.
    """
    columns = len(pairs)
    figure = Figure(figsize=(1.18 * columns + 1.0, 3.75))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.85, columns * 1.18 + 0.02), ylim=(3.2, -0.42), aspect="equal")
    axes.set_axis_off()
    axes.text(-0.8, -0.25, title, fontsize=11, fontweight="bold", va="center", parse_math=False)
    for row, label in enumerate(labels):
        axes.text(-0.8, row * 1.28 + 0.5, label, va="center", linespacing=1.5)
        for column, pair in enumerate(pairs):
            left, top = column * 1.18, row * 1.28
            frame = GRID if pair.right is None else GREEN if pair.right[row] else RED
            place(axes, files.read_image(pair.images[row]).numpy(), left, top, frame, 2)
            if pair.rewards[row] is not None:
                axes.text(left + 0.5, top + 1.04, short(pair.rewards[row]), ha="center", va="top", fontsize=8, color=FAINT)
    for column, pair in enumerate(pairs):
        # Prompts are text: a pair of $ must not be read as a formula (parse_math).
        text = textwrap.fill(pair.prompt, 20, max_lines=4)
        axes.text(column * 1.18 + 0.5, 2.5, text, ha="center", va="top", fontsize=7.5, linespacing=1.25, parse_math=False)
    return figure


def prompt_figure(prompt: str, labels: Sequence[str], rows: Sequence[np.ndarray]) -> Figure:
    """Images of one prompt: a row [N,H,W,3] for each label; the images of a column are on the same noise."""
    columns = len(rows[0])
    figure = Figure(figsize=(1.6 * columns + 0.9, 1.6 * len(rows) + 0.7))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.6, columns * 1.08), ylim=(len(rows) * 1.08, -0.42), aspect="equal")
    axes.set_axis_off()
    axes.text(-0.55, -0.22, shorten(prompt, 14 * columns), fontsize=11, fontweight="bold", va="center", parse_math=False)
    for row, (label, images) in enumerate(zip(labels, rows, strict=True)):
        axes.text(-0.55, row * 1.08 + 0.5, label, va="center")
        for column, image in enumerate(images):
            place(axes, image, column * 1.08, row * 1.08, GRID, 0.8)
    return figure


def ending(name: str, length: int) -> str:
    """The end of a name, at most `length` characters: names of one package or folder differ at their ends."""
    return name if len(name) <= length else "…" + name[1 - length :]


# ---- saving ----


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG. The same figure gives the same bytes, so matplotlib's version is left out of the metadata."""
    options = {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 3}}
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white", **options)
    files.write_bytes(path, buffer.getvalue(), durable=False)


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG picture for the page, in the page's colours, light or dark.

    The same figure and name give the same text: the ids in it follow from the name.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # else the ids in it are random
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without XML header and doctype
    for colour, variable in ((INK, "--ink"), (FAINT, "--faint"), (GRID, "--grid")):
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace(">", f">{PAGE_STYLE}", 1)
