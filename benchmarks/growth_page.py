"""The page of benchmarks.growth: docs/results/growth.md."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from b2diffurl.configuration.loop import is_shown
from benchmarks.page import table

Facts = Mapping[str, Any]
STAGE_SEC = 10  # of a stage, in whose proportion looking back is told


def markdown(facts: Facts) -> str:
    """The page, of those figures that there are."""
    parts = [
        "# How cost grows with work",
        f"By `{facts['command']} --write`, {facts['date']}: {facts['hardware']['cpu']}, one thread, "
        f"torch {facts['versions']['torch']}. CPU seconds are of a command with all processes that it starts; memory is the "
        "peak of its largest process. The small model of the quick start, with few steps.",
    ]
    by_objective: dict[str, dict[int, Facts]] = {}
    for name, found in facts.items():
        kind, *rest = name.split()
        if kind == "images":
            by_objective.setdefault(rest[0], {})[int(rest[1])] = found
    parts += [images_part(objective, found) for objective, found in by_objective.items()]
    of_sizes: dict[int, dict[str, Facts]] = {}
    for name, found in facts.items():
        if name.startswith("stages "):
            _, size, what = name.split(" ", 2)
            of_sizes.setdefault(int(size), {})[what] = found
    of_sizes = {size: found for size, found in of_sizes.items() if "page" in found}  # the last that is measured of it
    if of_sizes:
        parts += [commands_part(of_sizes), looks_part(of_sizes), page_part(of_sizes)]
    return "\n\n".join(parts) + "\n"


def images_part(objective: str, found: Mapping[int, Facts]) -> str:
    """A row for each script: what it takes at each number of images, and what an image more takes."""
    factors = sorted(found)
    counts = [found[factor]["images"] for factor in factors]
    head = ["script", *(f"CPU s, {count} images" for count in counts)]
    head += ["ms an image more", "MiB", "MB written", "files"]
    rows = []
    for verb in ("sample", "select", "train", "eval"):
        of = [found[factor][verb] for factor in factors]
        seconds = [one["cpu"] for one in of]
        rows.append(
            [
                f"run_{verb}.py",
                *(f"{one:.1f}" for one in seconds),
                arrows([1000 * one for one in slopes(counts, seconds)], ".1f"),
                arrows([one["mib"] for one in of], ".0f"),
                arrows([one["bytes"] / 1e6 for one in of], ".2f"),
                arrows([one["files"] for one in of], "d"),
            ]
        )
    return f"## Images in a stage, `{objective}`\n\n{table(head, rows)}"


def slopes(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """By how much y grows for each x more, from each point to the next."""
    return [(b - d) / (a - c) for (c, d), (a, b) in pairwise(zip(x, y, strict=True))]


def arrows(values: Sequence[float], how: str) -> str:
    """How a figure goes on as the work grows."""
    return " → ".join(format(one, how) for one in values)


def commands_part(found: Mapping[int, Facts]) -> str:
    sizes = sorted(found)
    rows = []
    for name in [name for name, one in found[sizes[0]].items() if "cpu" in one]:
        of = [found[size][name] for size in sizes]
        rows.append([name, *(f"{one['cpu']:.1f}, {one['wall']:.1f}, {one['mib']:.0f}" for one in of)])
        rows[-1].append(arrows([1000 * one for one in slopes(sizes, [one["cpu"] for one in of])], ".2f"))
    head = ["command", *(f"{size} stages: CPU s, wall s, MiB" for size in sizes), "CPU ms a stage more"]
    return f"## Commands on finished stages\n\n{table(head, rows)}"


def looks_part(found: Mapping[int, Facts]) -> str:
    """What the phases of a stage look at in the stages before it, and what all stages of a run spend on that together."""
    found = {size: one for size, one in sorted(found.items()) if "looks" in one}
    sizes = list(found)
    rows, total = [], {"warm": 0.0, "cold": 0.0}
    for name in found[sizes[0]]["looks"]:
        shown: Callable[[int], bool] = is_shown if name == "report" else lambda _: True
        for kind in ("cold", "warm"):
            seconds = [found[size]["looks"][name].get(kind) for size in sizes]
            if None in seconds:
                total["warm"] += summed(sizes, [one["looks"][name]["cold"] for one in found.values()], shown)
                continue
            total[kind] += (spent := summed(sizes, seconds, shown))
            more = 1000 * (slopes(sizes, seconds)[-1] if len(sizes) > 1 else seconds[0] / sizes[0])
            rows.append([f"{name}, {kind}", *(f"{1000 * one:.0f}" for one in seconds), f"{more:.3f}", f"{spent:.0f}"])
    head = ["of one stage", *(f"ms with {size} before it" for size in sizes), "ms a stage before it", "s in the whole run"]
    shares = [f"{total[kind] / (STAGE_SEC * sizes[-1]):.1%}".replace("%", " %") for kind in ("warm", "cold")]
    said = (
        f"In a run of {sizes[-1]} stages of {STAGE_SEC} s all this together is {shares[0]} of the run in one process, and "
        f"{shares[1]} in a process for each script. `report` is drawing report, verdict and pictures after a stage, by a "
        f"process that has not looked before; it is done {sum(map(is_shown, range(1, sizes[-1] + 1)))} times in {sizes[-1]} "
        "stages."
    )
    return f"## Looking at the stages before\n\n{table(head, rows)}\n\n{said}"


def summed(sizes: Sequence[int], seconds: Sequence[float], shown: Callable[[int], bool]) -> float:
    """The seconds of all stages of the longest run, between the measured sizes by straight lines; of one size from 0."""
    if len(sizes) == 1:
        return seconds[0] / sizes[0] * sum(filter(shown, range(1, sizes[0] + 1)))
    total = 0.0
    for count in filter(shown, range(1, sizes[-1] + 1)):
        place = next((n for n, size in enumerate(sizes[1:-1], 1) if count <= size), len(sizes) - 1)
        low, high = sizes[place - 1], sizes[place]
        share = max(0.0, (count - low) / (high - low))
        total += seconds[place - 1] + share * (seconds[place] - seconds[place - 1])
    return total


def page_part(found: Mapping[int, Facts]) -> str:
    rows = []
    for size, one in sorted(found.items()):
        page = one["page"]
        opened = [f"{page[key]:.2f}" if key in page else "" for key in ("load", "use")]
        rows.append([str(size), f"{page['bytes'] / 1e6:.2f}", *opened])
    head = ["stages", "report.html, MB", "s until it is loaded in Chromium", "s until its end is scrolled to and drawn"]
    return f"## The report in a browser\n\n{table(head, rows)}"
