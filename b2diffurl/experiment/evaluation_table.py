"""An experiment's evaluations as rows: reading and writing eval.jsonl, and a row in words.

A row holds the results of one checkpoint on one prompt set with one sampler: each figure's mean, its standard error
(`<figure>_se`), and the paired difference to the base model (`<figure>_gain`, with `<figure>_gain_se`).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from b2diffurl.experiment import lock
from b2diffurl.experiment.damage import skipping
from b2diffurl.experiment.folder import in_words
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.experiment.stage_table import Row, image_rows
from b2diffurl.runtime import files

SETS = {"test": "Held-out prompts", "train": "Training prompts"}  # the two prompt sets that every experiment has
DETAILS = ("values", "diversity", "shown_prompts", "images_sha256")  # in result.json only: one entry for each image


def record(root: Path, results: Sequence[dict[str, Any]]) -> None:
    """Append a row for each result to eval.jsonl.

    An older row of the same evaluation is replaced. Its `_gain` figures stay where the new result has none.
    """
    path, guard = root / "eval.jsonl", root / "eval.lock"
    root.mkdir(parents=True, exist_ok=True)
    with lock.exclusively(guard):  # another evaluation may end at the same moment, and each rewrites the whole file
        rows = {row["folder"]: row for row in (files.read_json_lines(path) if path.is_file() else [])}
        for result in results:
            rows[result["folder"]] = rows.pop(result["folder"], {}) | headline(result)
        files.write_json_lines(path, list(rows.values()), sealed=True)
        guard.unlink(missing_ok=True)


def drop_images(root: Path, num_kept: int, spared: Collection[str]) -> None:
    """Delete the images of stages' evaluations, but those of the `num_kept` newest stages (below 0: of all) and of the best.

    Both are meant among evaluations that can be compared: of one prompt set, by one sampler, under the same conditions.
    The images of the base model stay, and those in the folders `spared`. Figures stay in any case, and are read back.
    """
    comparable = defaultdict(list)
    for row in every_evaluation(root) if num_kept >= 0 else []:
        if row["stage"] is not None:
            comparable[row["prompts"], row["sampler"], row["conditions"]].append(row)
    for rows in comparable.values():
        newest = sorted({row["stage"] for row in rows})[-num_kept:]
        best = max(rows, key=lambda row: [-math.inf if row[key] is None else row[key] for key in ("accuracy", "reward")])
        for row in rows:
            folder = root / row["folder"]
            # eval.jsonl may come from somebody else: nothing outside eval/ is touched.
            if row["stage"] not in newest and row is not best and row["folder"] not in spared and is_ours(root, folder):
                for picture in folder.glob("[0-9][0-9][0-9][0-9][0-9]*.png"):
                    picture.unlink(missing_ok=True)


def is_ours(root: Path, folder: Path) -> bool:
    """Whether this is the folder of an evaluation, and no link to another place."""
    return folder.resolve() == (root / "eval").resolve() / folder.name


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result without the values of single images."""
    return {key: value for key, value in result.items() if key not in DETAILS}


def evaluation_rows(
    root: Path, stages: Sequence[Row] | None = None, damaged: list[str] | None = None, **wanted: Any
) -> list[Row]:
    """Evaluations of the base model and of each stage's last checkpoint, in the order of training: one curve a prompt set.

    `wanted` filters by value: `prompts="test"`. Each row gets `queries`, the images scored before its checkpoint was made
    (0 for the base).

    Only rows with the same `conditions` (seed, number of images, judge, …) can be compared. So for each prompt set and
    sampler the conditions with the most rows are chosen, the newest of them on a tie: one evaluation with other settings
    does not replace a curve.

    `stages` are rows of the experiment with `queries`, if they have been read; `damaged` is as for `every_evaluation`.
    """
    queries = {row["stage"]: row["queries"] for row in (image_rows(root) if stages is None else stages)} | {None: 0}
    course = {"base", *(f"stage{index}" for index in queries)}
    found = [
        row | {"queries": queries[row["stage"]]} for row in every_evaluation(root, damaged) if row["checkpoint"] in course
    ]
    # eval.jsonl is in the order of writing, so the newest of several equal evaluations is the one that stays.
    rows = list(
        {tuple(row[key] for key in ("checkpoint", "prompts", "sampler", "conditions")): row for row in found}.values()
    )
    counts = Counter((row["prompts"], row["sampler"], row["conditions"]) for row in rows)
    chosen: dict[tuple, str] = {}
    for row in reversed(rows):  # newest first: with `>` older conditions need more rows, not as many, to be chosen
        curve = (row["prompts"], row["sampler"])
        if counts[*curve, row["conditions"]] > counts[*curve, chosen.get(curve)]:
            chosen[curve] = row["conditions"]
    kept = [row for row in rows if row["conditions"] == chosen[row["prompts"], row["sampler"]]]
    kept = [row for row in kept if all(row.get(key) == value for key, value in wanted.items())]
    return sorted(kept, key=lambda row: -1 if row["stage"] is None else row["stage"])


def every_evaluation(root: Path, damaged: list[str] | None = None) -> list[Row]:
    """The rows of eval.jsonl, in the order of writing; [] if there is no such file. Damaged ones are added to `damaged`.

    Left out are rows of a stage's checkpoint that has been made anew, or is being made, since: it is not what was judged.
    """
    path, rows = root / "eval.jsonl", {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        with skipping([] if damaged is None else damaged, f"{path}, line {number}"):
            row = files.open_sealed(line)
            rows[row["folder"]] = row

    today = []
    for row in rows.values():
        with skipping([] if damaged is None else damaged, f"the evaluation of {row['checkpoint']}"):
            lora = "" if row["stage"] is None else lora_sha256(root, row["stage"], row["lora"])
            if row["stage"] is None or row["folder"].endswith(identity(row["conditions"], lora)):
                today.append(row)
    return today


def lora_sha256(root: Path, stage: int, lora: str) -> str:
    """The checksum of a stage's LoRA file, by the record of its training or, until that is over, of its checkpoint."""
    of = Stage(root, stage)
    if of.finished("train"):
        return of.loras().get(lora.partition("/")[2], "")
    from b2diffurl.experiment.checkpoints import read_state  # imports torch, which takes seconds

    return ((read_state(root / lora) or {}).get("files") or {}).get(LORA_FILE, {}).get("sha256", "")


def identity(conditions: str, lora_sha256: str) -> str:
    """The checksum in the name of an evaluation's folder: of its conditions and of the LoRA ("": the base model)."""
    return files.digest([conditions, lora_sha256])


def set_title(of: Row | str) -> str:
    """The title of a row's prompt set, or of one by its name: Held-out prompts, Training prompts, or the name of its file.

    A row tells whether prompts that should be held out are trained on, and the title says so.
    """
    row = {"prompts": of} if isinstance(of, str) else of
    match row["prompts"], row.get("trained_on", ""):
        case "test", "all":
            return f"{SETS['train']}, as test"
        case "test", some if some:
            return f"{SETS['test']} ({some} are trained on, too)"
    return SETS.get(row["prompts"], Path(row["prompts"]).name)


def set_name(prompts: str) -> str:
    """A prompt set's name within file names: `test`, `train`, or the stem of its file with a checksum of the path."""
    return prompts if prompts in SETS else f"{Path(prompts).stem}_{files.digest(prompts)[:6]}"


# ---- in words ----


def with_error(row: Mapping[str, Any], key: str, *, signed: bool = False, digits: int = 2) -> str:
    """A figure ± its standard error, rounded by the error (`decimals`), accuracies in percent; "" if the row lacks it.

    `signed` is for differences: `+29.7 ± 4.2 points`.
    """
    value, error = row.get(key), row.get(f"{key}_se")
    if value is None or not math.isfinite(value):
        return ""
    error = error if error is not None and math.isfinite(error) else None
    percent, unit = (100, " points" if signed else " %") if key.startswith("accuracy") else (1, "")
    places = 1 if unit else decimals(value, error, digits)
    spread = "" if error is None else f" ± {percent * error:.{places}f}"
    return f"{percent * value:{'+' if signed else ''}.{places}f}{spread}{unit}{of_fewer(row, key)}"


def decimals(value: float, error: float | None, digits: int = 2) -> int:
    """How many decimals a figure is shown with: to the error's second digit; without an error as `short` has it."""
    # log10(error) tells where its first digit is.
    return min(6, max(0, digits - 1 - math.floor(math.log10(error)))) if error else 3 if abs(value) < 10 else 1


def short(value: float) -> str:
    """A figure without an error in few digits: 0.009, -1.852, 12.3."""
    return f"{value:.{decimals(value, None)}f}"


def describe_sampler(row: Mapping[str, Any]) -> str:
    """The row's sampler in words: `training sampler: DDIM, 10 steps, eta 1, guidance 2`."""
    scheduler = (row["scheduler"] or row.get("sde") or "DDIMScheduler").removesuffix("Scheduler")
    eta = "" if row["eta"] is None else f"eta {row['eta']:g}, "
    return f"{row['sampler']} sampler: {scheduler}, {row['num_steps']} steps, {eta}guidance {row['guidance_scale']:g}"


def describe(result: Mapping[str, Any]) -> str:
    """A result as one line of the log: checkpoint, prompts, sampler, and each reward's mean, error and gain."""
    seen = f" ({result['trained_on']} trained on)" if "trained_on" in result else ""
    where = f"{result['prompts']} prompts{seen}, {result['sampler']} sampler, {result['n_images']} images"
    words = [f"{in_words(result['checkpoint'])} on {where}:"]
    # The parts of a reward, such as clip/part, are too many for one line.
    others = [key for key in result["values"] if key not in ("reward", "accuracy") and "/" not in key]
    for key in ("reward", "accuracy", *others):
        if result[key] is not None:
            words.append(f"{key} {with_error(result, key)}")
        if result.get(f"{key}_gain") is not None:
            words.append(f"(gain {with_error(result, f'{key}_gain', signed=True)})")
    return " ".join(words)


def of_fewer(row: Mapping[str, Any], key: str) -> str:
    """How many images a watched reward has scored, if it has failed for others: `, 5 of 8 images`."""
    return f", {row[f'{key}_n']} of {row['n_images']} images" if f"{key}_n" in row else ""
