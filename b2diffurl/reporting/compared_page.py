"""The page that compares experiments: outcomes, curves of all in one plot, and the same prompts' pictures side by side."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from b2diffurl.configuration.settings import describe_reward
from b2diffurl.evaluation.comparison import Judged
from b2diffurl.evaluation.pairing import Pairing
from b2diffurl.experiment.evaluation_table import evaluation_rows, set_title, short
from b2diffurl.experiment.folder import short_names
from b2diffurl.experiment.overview import overview
from b2diffurl.experiment.stage_table import Row, stage_rows
from b2diffurl.reporting import compared, listing
from b2diffurl.reporting.markup import render, visible
from b2diffurl.reporting.page import drawing, embed, inert
from b2diffurl.reporting.plots import COLOURS, Panel, ending, fill_panel, to_svg
from b2diffurl.runtime import files

NUM_SHOWN = 12  # how many prompts' images are shown: the first ones, not picked
LINES = tuple(product(("solid", "dashed", "dotted"), COLOURS))  # how the experiments are drawn, in their order


def write_page(path: Path, roots: Sequence[Path], pairings: Sequence[Pairing], prompts: str, sampler: str) -> Path:
    """Write the page to `path`, one file that loads nothing else; returns the path."""
    names = short_names(roots)
    lines = dict(zip(roots, cycle(LINES), strict=False))
    courses = {root: stage_rows(root) for root in roots}
    judged = {root: evaluation_rows(root, courses[root], prompts=prompts, sampler=sampler) for root in roots}
    with drawing():
        panels = list(curve_panels(lines, courses, judged, prompts))
        drawn = [to_svg(curve_figure(panel), f"compared{n}") for n, panel in enumerate(panels)]
        curves = [inert(svg, panel.title.replace("\n", ", ")) for svg, panel in zip(drawn, panels, strict=True)]
    together = judged_together(pairings)
    page = {
        "names": list(names.values()),
        "pairs": [pair_entry(pairing) for pairing in pairings],
        "legend": [{"name": names[root], "style": style, "colour": colour} for root, (style, colour) in lines.items()],
        "curves": curves,
        "gallery": gallery(together, names) if together else None,
        "columns": [column.title for column in listing.COLUMNS],
        "rows": [[column.text(row) for column in listing.COLUMNS] for row in map(overview, roots) if not row["problem"]],
        "legend_of_rows": listing.LEGEND,
    }
    files.write_bytes(path, render("compared.html", page))
    return path


def pair_entry(pairing: Pairing) -> dict[str, Any]:
    """A pair for the template: outcome, table of figures, what was left out, commands."""
    return {
        "headline": compared.headline(pairing),
        "title": compared.title(pairing) if pairing.judged else "",
        "titles": compared.titles(pairing),
        "cells": compared.cells(pairing) if pairing.judged else [],
        "others": compared.not_compared(pairing),
        "commands": compared.command_lines(pairing),
    }


# ---- curves ----


def curve_panels(
    lines: dict[Path, tuple[str, str]], courses: dict[Path, list[Row]], judged: dict[Path, list[Row]], prompts: str
) -> Iterator[Panel]:
    """The panels, over images scored: accuracy, then for each reward that is trained on, judged and as the stages had it."""
    rewards = {root: describe_reward(files.read_json(root / "config.json")["config"]["reward"]) for root in lines}
    where = set_title(prompts).lower()
    if any(row.get("accuracy") is not None for rows in judged.values() for row in rows):
        yield panel(f"Accuracy, {where}", lines, judged, dict.fromkeys(lines, "accuracy"), percent=True)
    for reward in dict.fromkeys(rewards.values()):
        name = ending(reward, 40)
        # Where it is only watched it has its own name among the figures.
        keys = {root: "reward" if rewards[root] == reward else reward for root in lines}
        if any(row.get(keys[root]) is not None for root, rows in judged.items() for row in rows):
            yield panel(f"{name}\n{where}", lines, judged, keys)
        keys = {root: "reward_mean" if rewards[root] == reward else f"watch/{reward}_mean" for root in lines}
        yield panel(f"{name}\nimages of stages", lines, courses, keys)


def curve_figure(panel: Panel) -> Figure:
    """A panel as a figure without room for a legend: the page has one for all of them."""
    figure = Figure(figsize=(4.0, 2.5))
    fill_panel(figure.add_axes((0.17, 0.17, 0.8, 0.68)), panel)  # below a title of two lines
    return figure


def panel(
    title: str,
    lines: dict[Path, tuple[str, str]],
    rows: dict[Path, list[Row]],
    keys: dict[Path, str],
    *,
    percent: bool = False,
) -> Panel:
    """One figure of all experiments over images scored, ± standard errors where there are any."""

    def draw(axes: Axes) -> None:
        for root, (style, colour) in lines.items():
            key, factor = keys[root], 100 if percent else 1
            points = [row for row in rows[root] if row.get(key) is not None]
            values, errors = ([factor * (row.get(f"{key}{end}") or 0.0) for row in points] for end in ("", "_se"))
            if points:
                x = [row["queries"] for row in points]
                axes.errorbar(x, values, errors if any(errors) else None, color=colour, linestyle=style, marker="o")

    return Panel(title + (" [%]" if percent else ""), draw)


# ---- pictures ----


def judged_together(pairings: Sequence[Pairing]) -> list[Judged]:
    """The evaluations that are on the same noise as the first pair's first one, that one first; [] if there are none."""
    pairs = [pairing.judged for pairing in pairings if pairing.judged]
    if not pairs:
        return []
    first = pairs[0][0]
    found = {first.root: first}
    for one, other in pairs:
        if (one.root, one.row["folder"]) == (first.root, first.row["folder"]):
            found.setdefault(other.root, other)
    return list(found.values())


def gallery(together: Sequence[Judged], names: Mapping[Path, str]) -> dict[str, Any] | None:
    """The first prompts' images by base and experiments, all on the same noise; None if there are no pictures."""
    models = [(names[one.root], one.root / one.row["folder"], one.result) for one in together]
    first = together[0]
    if first.base_row and first.base:
        models.insert(0, ("base", first.root / first.base_row["folder"], first.base))
    shown = []
    for n, prompt in enumerate(first.result["shown_prompts"]):
        pictures = [folder / f"{n:05d}.png" for _, folder, _ in models]
        if all(map(files.is_whole_png, pictures)):
            images = [shot(name, picture, result, n) for (name, _, result), picture in zip(models, pictures, strict=True)]
            shown.append({"prompt": visible(prompt), "images": images})
        if len(shown) == NUM_SHOWN:
            break
    judged = all("accuracy" in result["values"] for _, _, result in models)
    return {"prompts": shown, "judged": judged, "columns": len(models), "of": first.result["n_images"]} if shown else None


def shot(name: str, picture: Path, result: dict[str, Any], n: int) -> dict[str, Any]:
    """Image n of a result for the page: its data, whose it is, its reward, whether the judge accepts it (None: no judge)."""
    reward, accuracy = (result["values"].get(key, {n: None})[n] for key in ("reward", "accuracy"))
    right = None if accuracy is None else accuracy > 0.5
    return {"label": name, "reward": "" if reward is None else short(reward), "right": right} | embed(picture)
