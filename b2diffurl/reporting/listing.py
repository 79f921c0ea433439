"""Rows of experiments (experiment/overview.py) as a table for the terminal, as CSV and as Markdown."""

import csv
import io
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unicodedata import combining, east_asian_width

from b2diffurl.experiment.evaluation_table import short, with_error
from b2diffurl.experiment.stage_table import Row
from b2diffurl.runtime.logs import printable, shorten

MAX_WIDTH = 120  # columns of a terminal that a table may take
MAX_NAME = 32  # letters of a name that are shown; its end, because names of one study begin alike
GAP = "  "


@dataclass(frozen=True)
class Column:
    """A column of the list: its title, what it says of a row, and how early it goes where there is little room."""

    title: str
    text: Callable[[Row], str]
    goes: int = 0  # columns of the highest number go first; 0: stays
    left: bool = False  # whether its text begins at the left, and not ends at the right


def either(value: Any) -> str:
    """A value as text; "" for one that an experiment does not have."""
    return "" if value is None else str(value)


def stages(row: Row) -> str:
    """Trained and planned stages. A run may go on for longer than it was begun for."""
    return f"{row['stages_done']}/{max(row['stages_done'], row['stages_planned'])}"


def images(row: Row) -> str:
    return f"{row['images_scored']:,}"


def course(row: Row) -> str:
    """The mean reward of the first stage's images, and of the newest one's."""
    ends = [row["reward_first"], row["reward_last"]]
    return arrow("" if value is None else short(value) for value in ends)


def arrow(ends: Iterable[str]) -> str:
    """`from→to`, a dash for one that is missing; "" if both are."""
    ends = list(ends)
    return "→".join(end or "–" for end in ends) if any(ends) else ""


def held_out(figure: str) -> Callable[[Row], str]:
    """A function that gives a figure on held-out prompts, base → newest judged stage, with standard errors."""

    def text(row: Row) -> str:
        return arrow(figure_text(row, figure, whose) for whose in ("base", "tuned"))

    return text


def figure_text(row: Row, figure: str, whose: str) -> str:
    """One figure ± its standard error without spaces, an accuracy in percent without the sign: `41.1±2.5`."""
    pair = {figure: row[f"test_{figure}_{whose}"], f"{figure}_se": row[f"test_{figure}_{whose}_se"]}
    return with_error(pair, figure, digits=1).replace(" ", "").removesuffix("%")


def worked(row: Row) -> str:
    """When the experiment was last worked on; `now` if a run is at work."""
    if row["at_work"]:
        return "now"
    return "" if row["last_worked"] is None else time.strftime("%m-%d %H:%M", time.localtime(row["last_worked"]))


def size(row: Row) -> str:
    """The size on disk, in MB or GB of a million or a thousand million bytes."""
    return f"{row['bytes'] / 1e9:.1f} GB" if row["bytes"] >= 1e9 else f"{row['bytes'] / 1e6:.1f} MB"


def model(row: Row) -> str:
    """The end of the base model's name, which tells models apart."""
    return ending("/".join(either(row["model"]).rstrip("/").split("/")[-2:]), 20)


def ending(name: str, length: int) -> str:
    """The end of a name, at most `length` columns of a terminal, with nothing in it that a terminal would act on."""
    name = printable(name)
    if columns_of(name) <= length:
        return name
    return "…" + next(name[start:] for start in range(len(name) + 1) if columns_of(name[start:]) < length)


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes: a letter of Chinese or Japanese takes two, an accent by itself none."""
    return len(text) if text.isascii() else sum(0 if combining(one) else 1 + (east_asian_width(one) in "WF") for one in text)


COLUMNS = (
    Column("experiment", lambda row: ending(row["name"], MAX_NAME), left=True),
    Column("preset", lambda row: ending(either(row["preset"]), 12), goes=6, left=True),
    Column("model", model, goes=8, left=True),
    Column("stages", stages),
    Column("images", images, goes=4),
    Column("reward", course, goes=7),
    Column("held-out reward", held_out("reward"), goes=2),
    Column("accuracy %", held_out("accuracy"), goes=1),
    Column("worked on", worked, goes=5),
    Column("size", size, goes=3),
)
LEGEND = (
    "images: scored so far. reward: mean of the first and of the newest stage's images. held-out reward, accuracy: base "
    "model → newest judged stage, ± standard error."
)


def table(rows: Sequence[Row], width: int) -> list[str]:
    """The lines of a table that is at most `width` wide, a line an experiment; what was left out is said below it."""
    width = min(width, MAX_WIDTH)
    whole = [row for row in rows if not row["problem"]]
    letters = min(MAX_NAME, max(12, width // 3))  # of a name: in a narrow terminal it leaves room for figures
    names = replace(COLUMNS[0], text=lambda row: ending(row["name"], letters))
    columns = fitting([names, *COLUMNS[1:]], rows, width)
    lines = aligned(columns, rows, width)
    missing = [column.title for column in COLUMNS[1:] if column not in columns and any(column.text(row) for row in whole)]
    if whole:
        lines += ["", *wrapped(LEGEND, width)]
    if missing:
        lines += wrapped(f"No room here for: {', '.join(missing)}; --csv and --markdown have all columns.", width)
    hurt = [f"{row['name']}: {one}" for row in whole for one in row["damaged"]]
    return lines + [line for one in hurt[:12] for line in wrapped(f"! {printable(one)}", width)]


def fitting(columns: Sequence[Column], rows: Sequence[Row], width: int) -> list[Column]:
    """The columns that say something of any row, without those that must go for the line to fit into `width`."""
    whole = [row for row in rows if not row["problem"]]
    kept = [column for column in columns if not column.goes or any(column.text(row) for row in whole)]
    while sum(wide + len(GAP) for wide in widths(kept, rows)) - len(GAP) > width and any(column.goes for column in kept):
        kept.remove(max(kept, key=lambda column: column.goes))
    return kept


def widths(columns: Sequence[Column], rows: Sequence[Row]) -> list[int]:
    """How wide each column must be. What is no experiment has a name only."""
    whole = [row for row in rows if not row["problem"]]
    shown = [rows, *([whole] * (len(columns) - 1))]
    return [
        max(columns_of(text) for text in (column.title, *map(column.text, some)))
        for column, some in zip(columns, shown, strict=True)
    ]


def aligned(columns: Sequence[Column], rows: Sequence[Row], width: int) -> list[str]:
    """Title line and one line a row, each at most `width` wide."""
    wide = widths(columns, rows)
    lines = [GAP.join(map(pad, columns, [column.title for column in columns], wide))]
    for row in rows:
        cells = [column.text(row) for column in columns[: 1 if row["problem"] else None]]
        lines.append(GAP.join([*map(pad, columns, cells, wide), *([printable(row["problem"])] if row["problem"] else [])]))
    return [cut(line.rstrip(), width) for line in lines]


def cut(line: str, width: int) -> str:
    """The beginning of a line, at most `width` columns of a terminal."""
    line = shorten(line, width)
    while columns_of(line) > width:
        line = line[:-2] + "…"
    return line


def pad(column: Column, text: str, width: int) -> str:
    space = " " * (width - columns_of(text))
    return text + space if column.left else space + text


def wrapped(text: str, width: int) -> list[str]:
    """A sentence in lines of at most `width`; a word that is longer has a line of its own."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


def as_csv(rows: Sequence[Row]) -> str:
    """Every entry of the rows, unrounded; lists as text, and what is missing empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: "; ".join(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows
    )
    return file.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """A table of all columns, and below it what could not be read."""
    cells = [[column.text(row) for column in COLUMNS] for row in rows if not row["problem"]]
    marks = [":--" if column.left else "--:" for column in COLUMNS]
    lines = markdown_table([column.title for column in COLUMNS], cells, marks)
    problems = [f"- `{row['name']}`: {row['problem']}" for row in rows if row["problem"]]
    return "\n".join([*lines, "", LEGEND, *(["", *problems] if problems else [])]) + "\n"


def markdown_table(titles: Sequence[str], cells: Sequence[Sequence[str]], marks: Sequence[str]) -> list[str]:
    """The lines of a table in Markdown. What would end a cell is escaped."""
    escaped = [[printable(cell).replace("\\", "\\\\").replace("|", "\\|") for cell in line] for line in cells]
    return [f"| {' | '.join(line)} |" for line in (titles, marks, *escaped)]
