"""An experiment's evaluations as rows: eval.jsonl, its file, and a row in words.

A row is what one checkpoint was found to be on one prompt set with one sampler: means, standard errors (`<figure>_se`), and
paired differences to the base (`<figure>_gain`).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from b2diffurl.experiment import lock
from b2diffurl.experiment.stage_table import Row, stage_rows
from b2diffurl.runtime import files

SETS = {"test": "Held-out prompts", "train": "Training prompts"}  # those that an experiment has of its own
DETAILS = ("values", "diversity", "shown_prompts", "images_sha256")  # what eval.jsonl leaves to result.json


def record(root: Path, results: Sequence[dict[str, Any]]) -> None:
    """Put one row for each result into eval.jsonl, last; a row of the same evaluation gives way, its differences stay."""
    path, guard = root / "eval.jsonl", root / "eval.lock"
    root.mkdir(parents=True, exist_ok=True)
    with lock.exclusively(guard):  # for another evaluation may go on
        rows = {row["folder"]: row for row in (files.read_json_lines(path) if path.is_file() else [])}
        for result in results:
            rows[result["folder"]] = rows.pop(result["folder"], {}) | headline(result)
        files.write_json_lines(path, list(rows.values()), sealed=True)
        guard.unlink(missing_ok=True)


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result without its values image by image."""
    return {key: value for key, value in result.items() if key not in DETAILS}


def evaluation_rows(root: Path, **wanted: Any) -> list[Row]:
    """The course of an experiment as judged: rows of eval.jsonl in which each key has the wanted value, of the
    base and of the last checkpoint of each stage, in their order.

    Rows can be compared where they were made under the same conditions. Of each prompt set and sampler there are those of
    the conditions with the most rows, so that a look with other settings does not take the place of a curve; of equals,
    the newest. Each row gets `queries`, the images scored before its checkpoint was made, 0 for the base.
    """
    queries = {row["stage"]: row["queries"] for row in stage_rows(root)} | {None: 0}
    course = ("base", *(f"stage{index}" for index in queries))
    found = [row | {"queries": queries[row["stage"]]} for row in every_evaluation(root) if row["checkpoint"] in course]
    rows = list(
        {tuple(row[key] for key in ("checkpoint", "prompts", "sampler", "conditions")): row for row in found}.values()
    )
    counts = Counter((row["prompts"], row["sampler"], row["conditions"]) for row in rows)
    chosen: dict[tuple, str] = {}
    for row in reversed(rows):
        judged = (row["prompts"], row["sampler"])
        if counts[*judged, row["conditions"]] > counts[*judged, chosen.get(judged)]:
            chosen[judged] = row["conditions"]
    kept = [row for row in rows if row["conditions"] == chosen[row["prompts"], row["sampler"]]]
    kept = [row for row in kept if all(row.get(key) == value for key, value in wanted.items())]
    return sorted(kept, key=lambda row: -1 if row["stage"] is None else row["stage"])


def every_evaluation(root: Path) -> list[Row]:
    """All rows of eval.jsonl."""
    path = root / "eval.jsonl"
    return files.read_json_lines(path) if path.is_file() else []


def set_title(prompts: str) -> str:
    """What a prompt set is called: Held-out prompts, Training prompts, or a file's name."""
    return SETS.get(prompts, Path(prompts).name)


def set_name(prompts: str) -> str:
    """A prompt set in a name: `test`, `train`, or a file's stem with a checksum of its path."""
    return prompts if prompts in SETS else f"{Path(prompts).stem}_{files.digest(prompts)[:6]}"


# ---- in words ----


def with_error(row: Mapping[str, Any], key: str, *, signed: bool = False) -> str:
    """A figure and its standard error as text, to the error's second digit, accuracies in percent; "" where there is none.

    `signed` is for differences: `+29.7 ± 4.2 points`.
    """
    value, error, sign = row.get(key), row.get(f"{key}_se"), "+" if signed else ""
    if value is None:
        return ""
    percent, unit = (100, " points" if signed else " %") if key.startswith("accuracy") else (1, "")
    decimals = 1 if unit else min(6, max(0, 1 - math.floor(math.log10(error)))) if error else 4
    spread = "" if error is None else f" ± {percent * error:.{decimals}f}"
    return f"{percent * value:{sign}.{decimals}f}{spread}{unit}"


def describe_sampler(row: Mapping[str, Any]) -> str:
    """As in `training sampler: DDIM, 10 steps, eta 1, guidance 2`."""
    scheduler = (row["scheduler"] or "DDIMScheduler").removesuffix("Scheduler")
    eta = "" if row["eta"] is None else f"eta {row['eta']:g}, "
    return f"{row['sampler']} sampler: {scheduler}, {row['num_steps']} steps, {eta}guidance {row['guidance_scale']:g}"


def describe(result: Mapping[str, Any]) -> str:
    """One readable line."""
    words = [
        f"{result['checkpoint']} on {result['prompts']} prompts, {result['sampler']} sampler, {result['n_images']} images:"
    ]
    named = [key for key in result["values"] if key not in ("reward", "accuracy") and "/" not in key]
    for key in ("reward", "accuracy", *named):
        if result[key] is not None:
            words.append(f"{key} {precisely(result, key, '.4f')}")
        if result.get(f"{key}_gain") is not None:
            words.append(f"(gain {precisely(result, f'{key}_gain', '+.4f')})")
    return " ".join(words)


def precisely(result: Mapping[str, Any], key: str, form: str) -> str:
    error = result[f"{key}_se"]
    return format(result[key], form) + ("" if error is None else f" ± {error:.4f}")
