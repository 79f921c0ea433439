"""Scores made elsewhere, by people or another program, handed over as a CSV file with the columns id and score."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from b2diffurl.configuration.limits import shown
from b2diffurl.experiment.not_finite import listed
from b2diffurl.experiment.stage import Stage
from b2diffurl.rewards import Reward
from b2diffurl.runtime.files import write_bytes


def check(name: str, own: Mapping[str, Any], prompts: Sequence[str]) -> None:
    """Nothing to check yet: scores can be given only once the images exist."""


def files(name: str, own: Mapping[str, Any]) -> list[Path]:
    return []


def load(name: str, own: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Reward:
    raise ValueError("reward file has scores for the images of a stage only; other images need another reward")


def write_template(stage: Stage, prompts: Sequence[str]) -> None:
    """Write scores_wanted.csv with a row (id, empty score, image, prompt) for each image, unless it exists."""
    if not stage.wanted_scores.is_file():
        write_table(stage.wanted_scores, stage, prompts, [""] * len(prompts))


def write_table(path: Path, stage: Stage, prompts: Sequence[str], scores: Sequence[float | str]) -> None:
    """Write a row (id, score, image, prompt) for each image of the stage; an empty text is a score that is still to come."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("id", "score", "image", "prompt"))
    rows = enumerate(zip(scores, prompts, strict=True))
    table.writerows((n, score, stage.image(n).relative_to(stage.folder), prompt) for n, (score, prompt) in rows)
    write_bytes(path, text.getvalue().encode())


def read_scores(path: Path, count: int) -> Tensor:
    """Read the scores [count] of the images 0..count-1. A ValueError names the bad line, or the ids without a score."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets may write a byte order mark
            table = csv.DictReader(file)
            columns = list(table.fieldnames or ())
            rows = [(table.line_num, row) for row in table]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8 ({error})") from None
    for name in ("id", "score"):
        if columns.count(name) != 1:
            wanted = "it needs id and score, each once, with commas between columns"
            raise ValueError(f"{path} has the columns {shown(columns)}; {wanted}")
    scores: dict[int, float] = {}
    for line, row in rows:
        if not (row["score"] or "").strip():
            continue  # not scored yet: reported below with all others
        if None in row:
            raise ValueError(f"{path}, line {line} has more fields than the first line; a decimal comma?")
        try:
            if "_" in row["id"] + row["score"]:  # Python would read 1_0 as 10
                raise ValueError
            number, value = int(row["id"]), float(row["score"])
        except (TypeError, ValueError):
            given = f"id {shown(row['id'])} and score {shown(row['score'])}"
            raise ValueError(f"{path}, line {line}: {given} must be numbers") from None
        if number in scores or not 0 <= number < count:
            raise ValueError(f"{path}, line {line}: id {number} is given twice, or not one of 0..{count - 1}")
        if not math.isfinite(value):
            raise ValueError(f"{path}, line {line}: the score of id {number} is {value}; it must be finite")
        scores[number] = value
    missing = [number for number in range(count) if number not in scores]
    if missing:
        raise ValueError(f"{path} lacks the scores of {len(missing)} ids: {listed(missing)}")
    return torch.tensor([scores[number] for number in range(count)], dtype=torch.float32)
