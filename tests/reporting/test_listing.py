"""The list of experiments: what a terminal, a spreadsheet and Markdown get of the rows."""

import csv
import io
import re

import pytest

from b2diffurl.experiment.overview import empty_row
from b2diffurl.reporting.listing import COLUMNS, as_csv, as_markdown, columns_of, table

WHOLE = empty_row() | {
    "name": "my_run", "folder": "model/lora/my_run", "problem": "", "damaged": [], "preset": "shapes",
    "model": "/home/me/models/shapes/base", "objective": "nft", "reward": "clip", "stages_done": 5, "stages_planned": 9,
    "images_scored": 7200, "reward_first": 0.18412, "reward_last": 0.2884, "checkpoint": "stage4",
    "test_reward_base": 0.1844, "test_reward_base_se": 0.0055, "test_reward_tuned": 0.2913, "test_reward_tuned_se": 0.0025,
    "test_accuracy_base": 0.512, "test_accuracy_base_se": 0.022, "test_accuracy_tuned": 0.906,
    "test_accuracy_tuned_se": 0.013, "last_worked": 1.8e9, "at_work": False, "bytes": 34_800_000,
}  # fmt: skip
FOREIGN = empty_row() | {"name": "holiday", "problem": "no config.json", "damaged": [], "at_work": False, "bytes": 4}


@pytest.mark.parametrize("width", [200, 120, 100, 80, 60, 40])
def test_a_line_an_experiment_within_the_terminal(width):
    """However wide it is: whole columns go, the first and the accuracy stay, and it says which are missing."""
    long = WHOLE | {"name": "a_name_of_a_study_" * 9 + "seed1", "model": "m" * 300, "preset": "p" * 50}
    lines = table([WHOLE, FOREIGN, long], width)
    assert max(map(len, lines)) <= min(width, 120)
    mine = next(line for line in lines if line.startswith("my_run"))
    assert "5/9" in mine
    assert "51.2±2.2→90.6±1.3" in mine
    assert any(line.startswith("holiday") for line in lines)
    assert sum("seed1" in line for line in lines) == 1
    left_out = {column.title for column in COLUMNS if column.title not in re.split("  +", lines[0])}
    said = " ".join(lines).partition("No room here for: ")[2].partition(";")[0]
    assert set(filter(None, said.split(", "))) == left_out


def test_letters_of_two_columns_stay_in_theirs():
    """A Japanese name takes two columns a letter, an accent by itself none: figures stand below each other, lines end in
    time, and a name is cut to whole letters."""
    names = ("日本語の実験", "re\u0301sume\u0301", "日本語の実験" * 9, "plain")
    for width in (120, 60):
        foreign = FOREIGN | {"name": "外国" * 3, "problem": "無い" * 60}
        lines = table([*(WHOLE | {"name": name} for name in names), foreign], width)
        assert len({columns_of(line.partition("5/9")[0]) for line in lines[1:5]}) == 1
        assert max(map(columns_of, lines)) <= width


def test_a_run_may_go_on_for_longer_than_planned():
    assert "13/13" in table([WHOLE | {"stages_done": 13}], 120)[1]


def test_the_cells_say_the_figures():
    first = table([WHOLE], 120)[1]
    assert first.split() == [
        "my_run", "shapes", "5/9", "7,200", "0.184→0.288", "0.184±0.005→0.291±0.003", "51.2±2.2→90.6±1.3",
        *first.split()[7:],
    ]  # fmt: skip
    assert first.endswith("34.8 MB")
    assert "now" in table([WHOLE | {"at_work": True}], 120)[1].split()
    bare = WHOLE | dict.fromkeys([key for key in WHOLE if key.startswith(("test_", "reward_"))])
    assert "±" not in table([bare], 120)[1]
    assert "–→90.6±1.3" in table([WHOLE | {"test_accuracy_base": None}], 120)[1]


def test_nothing_in_a_name_acts():
    """A terminal's escapes, and what would end a cell of Markdown."""
    evil = WHOLE | {"name": "a|b\x1b[31m\nc", "preset": "p|q"}
    assert not any("\x1b" in line or "\n" in line for line in table([evil], 120))
    lines = as_markdown([evil]).splitlines()
    assert "a\\|b" in lines[2]
    assert lines[2].replace("\\|", "").count("|") == lines[0].count("|")


def test_csv_has_everything_unrounded():
    (row, other) = csv.DictReader(io.StringIO(as_csv([WHOLE | {"damaged": ["one", "two"]}, FOREIGN])))
    assert float(row["test_reward_tuned"]) == WHOLE["test_reward_tuned"]
    assert (row["damaged"], row["name"]) == ("one; two", "my_run")
    assert (other["problem"], other["stages_done"]) == ("no config.json", "")
