"""Experiments compared, in words: a sentence for each pair, a table of figures, and the same as CSV and Markdown."""

import shlex
from collections.abc import Sequence
from typing import Any

from b2diffurl.evaluation.comparison import Compared
from b2diffurl.evaluation.intervals import Interval
from b2diffurl.evaluation.pairing import Pairing
from b2diffurl.experiment.evaluation_table import describe_sampler, set_title, with_error
from b2diffurl.reporting.listing import ending, markdown_table, wrapped
from b2diffurl.reporting.plots import describe_figure
from b2diffurl.reporting.rounded import ends_text, mean_text
from b2diffurl.runtime.logs import printable

NAME_LENGTH = 18  # letters of an experiment's name above a column in a terminal: their end


def title(pairing: Pairing) -> str:
    """What was compared, in words: names, checkpoints, prompts, images, sampler."""
    first, second = pairing.judged
    of = [f"{name} ({one.row['checkpoint']})" for name, one in zip(pairing.names, (first, second), strict=True)]
    how = f"{first.row['n_images']} images on the same noise, {describe_sampler(first.row)}"
    return f"{' and '.join(of)}, {set_title(first.row['prompts']).lower()}: {how}"


def verdict(pairing: Pairing, one: Compared) -> str:
    """A figure's outcome: `b is better than a by 3.2 ± 1.1 points`, or that there is no significant difference."""
    size = difference_text(one)
    if not one.change.is_significant:
        return f"no significant difference, {size}"
    other, better = pairing.names if one.change.mean > 0 else pairing.names[::-1]
    return f"{better} is {'more diverse' if one.is_diversity else 'better'} than {other} by {size.lstrip('+-')}"


def headline(pairing: Pairing) -> str:
    """The outcome of the first figure as one sentence, or why there is none."""
    names = " and ".join(pairing.names)
    if pairing.compared:
        one = pairing.compared[0]
        who = "" if one.change.is_significant else f"{names}: "
        return f"{who}{verdict(pairing, one)} ({figure_name(one)})."
    if pairing.judged:
        return f"{names} cannot be compared: they have no figure in common."
    return f"{names} cannot be compared: {'; '.join(pairing.reasons)}."


def figure_name(one: Compared) -> str:
    return f"diversity, {describe_figure(one.figure)}" if one.is_diversity else one.figure


def difference_text(one: Compared) -> str:
    """The difference ± its standard error, accuracies in points."""
    return mean_text(one.figure, one.change, signed=True)


def interval_text(one: Compared) -> str:
    """The 95 % interval of the difference, rounded by its standard error; "" if there is none."""
    return " to ".join(ends_text(one.figure, one.change, signed=True))


def cells(pairing: Pairing) -> list[list[str]]:
    """The table's lines: figure, the two experiments' own figures, difference, interval, outcome."""
    first, second = pairing.judged
    return [
        [
            figure_name(one),
            with_error(first.row, one.keys[0]),
            with_error(second.row, one.keys[1]),
            difference_text(one),
            interval_text(one),
            outcome(pairing, one),
        ]
        for one in pairing.compared
    ]


def outcome(pairing: Pairing, one: Compared) -> str:
    """`verdict` in short: the size stands beside it, and there are only two."""
    if not one.change.is_significant:
        return "no significant difference"
    return f"{pairing.names[one.change.mean > 0]} is {'more diverse' if one.is_diversity else 'better'}"


def titles(pairing: Pairing) -> list[str]:
    return ["figure", *pairing.names, "second - first", "95 % interval", "outcome"]


def not_compared(pairing: Pairing) -> str:
    """The figures that are not the same in both, as a sentence; "" if there are none."""
    if not pairing.others:
        return ""
    return f"Not compared: {', '.join(pairing.others)}. Only one has it, or it is scored otherwise in both."


def command_lines(pairing: Pairing) -> list[str]:
    """The commands that would make a pair, as a shell takes them."""
    return [shlex.join(words) for words in pairing.commands.values()]


def as_text(pairings: Sequence[Pairing], width: int) -> list[str]:
    """All pairs for a terminal: the outcome, then the figures in columns; or why not, and what to do."""
    lines: list[str] = []
    for pairing in pairings:
        lines += ["", *wrapped(printable(headline(pairing)), width)]
        if pairing.compared:
            lines += [f"  {line}" for line in wrapped(printable(title(pairing)), width - 2)]
            figure, *names = titles(pairing)
            rows = [[figure, *(ending(name, NAME_LENGTH) for name in names)]]
            rows += [[line[0].removeprefix("diversity, "), *line[1:]] for line in cells(pairing)]
            if table_width(rows, 4) > width:
                rows = [[line[0].replace(" of right images", " (right)"), *line[1:]] for line in rows]
            # In a narrow terminal the last columns go: the outcome, the interval.
            count = next(n for n in range(len(rows[0]), 0, -1) if n <= 4 or table_width(rows, n) <= width)
            widths = [max(len(row[n]) for row in rows) for n in range(count)]
            lines += [
                "  " + "  ".join(cell.ljust(wide) for cell, wide in zip(row, widths, strict=False)).rstrip() for row in rows
            ]
        if pairing.judged and (left := not_compared(pairing)):
            lines += [f"  {line}" for line in wrapped(printable(left), width - 2)]
        if pairing.commands:
            lines.append("  This makes them comparable:" if len(pairing.commands) == 1 else "  These make them comparable:")
            lines += [f"    {printable(line)}" for line in command_lines(pairing)]
    return lines[1:]


def table_width(rows: Sequence[Sequence[str]], count: int) -> int:
    """The width of a table's first `count` columns, two spaces before each."""
    return sum(2 + max(len(row[n]) for row in rows) for n in range(count))


def as_markdown(pairings: Sequence[Pairing]) -> str:
    """The same in Markdown."""
    lines: list[str] = []
    for pairing in pairings:
        lines += [f"**{printable(headline(pairing))}**", ""]
        if pairing.compared:
            lines += [f"{printable(title(pairing))}", ""]
            lines += [*markdown_table(titles(pairing), cells(pairing), [":--", *["--:"] * 4, ":--"]), ""]
        if pairing.commands:
            lines += ["```bash", *command_lines(pairing), "```", ""]
    return "\n".join(lines)


def as_rows(pairings: Sequence[Pairing]) -> list[dict[str, Any]]:
    """A row for each figure of each pair, unrounded; a pair that could not be compared has one row, with its reasons."""
    found = []
    for pairing in pairings:
        pair = dict(zip(("first", "second"), (str(root) for root in pairing.roots), strict=True))
        if not pairing.compared:
            found.append(pair | {"problem": "; ".join(pairing.reasons) or "no figure in common"})
        for one in pairing.compared:
            found.append(pair | figure_row(pairing, one))
    return found


def figure_row(pairing: Pairing, one: Compared) -> dict[str, Any]:
    """A figure of a pair: the two values with their standard errors, and the difference with its interval."""
    row: dict[str, Any] = {"problem": "", "prompts": pairing.judged[0].row["prompts"], "figure": one.figure}
    for which, judged, key in zip(("first", "second"), pairing.judged, one.keys, strict=True):
        row |= {f"{which}_checkpoint": judged.row["checkpoint"], f"{which}_value": judged.row.get(key)}
        row |= {f"{which}_se": judged.row.get(f"{key}_se")}
    change: Interval = one.change
    row |= {"difference": change.mean, "difference_se": change.error, "low": change.low, "high": change.high}
    return row | {"significant": change.is_significant}
