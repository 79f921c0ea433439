"""The report of an experiment: report.html, one file that any browser shows, and its pictures as PNG in report/.

It is written from the experiment's files alone; the same files give the same page.
"""

import base64
import io
import json
import re
import runpy
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from PIL import Image
from torch import Tensor

from b2diffurl.configuration.recorded import preset_differences
from b2diffurl.configuration.settings import describe_reward
from b2diffurl.experiment.branch_picture import load_tree
from b2diffurl.experiment.evaluation_table import describe_sampler, evaluation_rows, set_name, set_title, with_error
from b2diffurl.experiment.stage import PHASES, Stage, finished_stages
from b2diffurl.experiment.stage_table import Row, per_step_rows, stage_list, stage_rows, warned_rows
from b2diffurl.reporting.plots import (
    STYLE,
    Pair,
    curve_panels,
    describe_figure,
    figures_of,
    heat_map,
    pairs_figure,
    panel_figure,
    panels_figure,
    prompt_figure,
    save_png,
    short,
    shorten,
    to_svg,
    tree_figure,
)
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger

PRESETS = Path(__file__).parents[2] / "config" / "stage_process.py"
NUM_PAIRS = 12  # how many images of a prompt set are shown: the first ones, not picked
NUM_WARNINGS = 3  # how many warnings of a kind are shown
NUM_EXTREMES = 6  # how many of the largest losses, and of the largest gains, are shown
EMBEDDED_PX = 256  # larger images are scaled down for the page


def refresh(root: Path) -> None:
    """Write the report if a stage has been scored. An error is logged and not raised: a report must not stop a run."""
    if not finished_stages(root, "select"):
        return
    try:
        logger.info("report: %s", write_report(root))
    except Exception as error:
        logger.debug("report failed", exc_info=True)
        logger.warning("report: %s: %s; python -m b2diffurl.report %s tries again", type(error).__name__, error, root)


def write_report(root: Path) -> Path:
    """Write <root>/report.html and <root>/report/*.png; returns the page's path. A ValueError if no stage is scored."""
    stages, evaluations = stage_rows(root), evaluation_rows(root)
    if not stages:
        raise ValueError(f"{root} has no stage that has been scored, so there is nothing to report yet")
    config = files.read_json(root / "config.json")["config"]
    shutil.rmtree(root / "report", ignore_errors=True)  # no picture of an earlier report stays
    with drawing():
        page = {
            "name": root.name,
            "stages": stages,
            "config": config,
            "reward": describe_reward(config["reward"]),
            "warned": warned_kinds(warned_rows(root)),
            "figures": figure_table(evaluations),
            "galleries": galleries(root, evaluations),
            "curves": draw_curves(root, stages, evaluations),
            "heat_maps": draw_heat_maps(root),
            "trees": draw_trees(root),
            "facts": facts(root, stages),
        }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("b2diffurl.reporting"),
        autoescape=True,  # prompts may hold HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    html = environment.get_template("report.html").render(page)
    files.write_bytes(root / "report.html", html.encode())
    return root / "report.html"


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the report's style inside the block.

    matplotlib's font lacks letters of some prompts, such as Chinese ones. The PNGs have boxes for them and the page has the
    letters, so nobody needs a warning for each letter.
    """
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


# ---- warnings ----


def warned_kinds(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Warnings by kind, for the page: the stages that gave it, the first ones' texts, and what to try."""
    kinds = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        same = [row for row in rows if row["kind"] == kind]
        stages = [row["stage"] for row in same]
        more = stage_list(stages[NUM_WARNINGS:]) if stages[NUM_WARNINGS:] else ""
        shown = {"kind": kind, "stages": stage_list(stages), "first": same[:NUM_WARNINGS], "more": more}
        kinds.append(shown | {"advice": same[0]["advice"]})
    return kinds


# ---- figures ----


def figure_table(evaluations: Sequence[Row]) -> list[dict[str, Any]]:
    """The page's section Figures: base, newest checkpoint and difference, for each prompt set, sampler and figure.

    `place` numbers the tables, one for each prompt set and sampler.
    """
    lines = []
    for place, (prompts, sampler) in enumerate(judged_sets(evaluations)):
        rows = [row for row in evaluations if (row["prompts"], row["sampler"]) == (prompts, sampler)]
        base, tuned = base_and_tuned(rows)  # either may be missing: a figure of one alone is shown, too
        for key in figures_of([row for row in (base, tuned) if row]):
            lines.append(
                {
                    "place": place,
                    "prompts": set_title(prompts),
                    "sampler": describe_sampler(tuned or base),
                    "figure": ("diversity: " if key.startswith("diversity/") else "") + describe_figure(key),
                    "base": with_error(base or {}, key),
                    "tuned": with_error(tuned or {}, key),
                    "checkpoint": tuned["checkpoint"] if tuned else "",
                    "gain": with_error(tuned or {}, f"{key}_gain", signed=True),
                }
            )
    return lines


def judged_sets(evaluations: Sequence[Row]) -> list[tuple[str, str]]:
    """Every (prompts, sampler) that has an evaluation: held-out prompts first, then training prompts, then files."""
    order = {"test": 0, "train": 1}
    pairs = dict.fromkeys((row["prompts"], row["sampler"]) for row in evaluations)
    return sorted(pairs, key=lambda key: (order.get(key[0], 2), key[0], key[1] != "training"))


def base_and_tuned(rows: Sequence[Row]) -> tuple[Row | None, Row | None]:
    """(base model's row, newest stage's row) among the rows of one prompt set and sampler; None for what is missing."""
    base = next((row for row in rows if row["checkpoint"] == "base"), None)
    tuned = [row for row in rows if row["stage"] is not None]
    return base, tuned[-1] if tuned else None


# ---- pictures ----


def draw_curves(root: Path, stages: list[Row], evaluations: list[Row]) -> list[str]:
    """Write report/curves.png, all panels in one; returns each panel as SVG, so that the page can arrange them."""
    panels = curve_panels(stages, evaluations)
    save_png(panels_figure(panels), root / "report" / "curves.png")
    return [to_svg(panel_figure(panel), f"curve{n}") for n, panel in enumerate(panels)]


def draw_heat_maps(root: Path) -> list[str]:
    """Write report/<metric>_per_step.png of the metrics by timestep; returns them as SVG."""
    titles = {"log_ratio": "Mean |log-ratio|", "clip_fraction": "Clip fraction"}
    drawn = []
    for key, title in titles.items():
        values = per_step_rows(root, f"{key}_per_step")
        if values:
            figure = heat_map(f"{title} by timestep", values, log=key == "log_ratio")
            save_png(figure, root / "report" / f"{key}_per_step.png")
            drawn.append(to_svg(figure, key))
    return drawn


def draw_trees(root: Path) -> list[str]:
    """Write the branch pictures of an early stage and of a late one (branches.png, branches_last.png); returns them as SVG.

    A stage's picture shows its first group. The stages are the first and the last in which that group has both a winner and
    a loser, or if there are none, the first and the last of all.
    """
    stages = [stage for stage in finished_stages(root, "select") if load_tree(stage)]
    telling = [stage for stage in stages if len(set(marks(stage).values())) == 2] or stages  # with winner and loser
    drawn = []
    ends = dict.fromkeys((*telling[:1], *telling[-1:]))  # one stage if there is only one
    for name, stage in zip(("branches", "branches_last"), ends, strict=False):
        tree, scores = load_tree(stage), files.read_json_lines(stage.scores)
        trained = stage.manifest("sample")["num_trained_steps"]
        what = f"{len(tree.branches)} branches, the last {trained} steps apart"
        title = f"Stage {stage.index}: “{shorten(tree.prompt, 60)}”, {what}"
        # scores.jsonl is in order of id, so the first K rows are the first group's.
        notes = [f"reward {short(row['reward'])}" for row in scores[: len(tree.branches)]]
        figure = tree_figure(tree, title, notes, marks(stage))
        save_png(figure, root / "report" / f"{name}.png")
        drawn.append(to_svg(figure, name))
    return drawn


def marks(stage: Stage) -> dict[int, str]:
    """{branch: "winner" or "loser"} of the selected ones in the first group; {} in a run that trains on all images."""
    if files.read_json(stage.root / "config.json")["config"]["eval"].get("selection") == "all":
        return {}
    rows = [row for row in files.read_json(stage.selection) if row["group"] == 0]
    return {row["branch"]: "winner" if row["score"] > 0 else "loser" for row in rows}


def galleries(root: Path, evaluations: Sequence[Row]) -> list[dict[str, Any]]:
    """The page's galleries of image pairs, base and tuned on the same noise; writes each as a PNG, too.

    For each prompt set: the first images, and those with the largest losses and gains.
    """
    shown = []
    for prompts, sampler in judged_sets(evaluations):
        rows = [row for row in evaluations if (row["prompts"], row["sampler"]) == (prompts, sampler)]
        base, tuned = base_and_tuned(rows)
        if base is None or tuned is None or sampler != "training":  # the deployed sampler's images have figures only
            continue
        pairs, name, title = read_pairs(root, base, tuned), set_name(prompts), set_title(prompts)
        first = pairs[:NUM_PAIRS]
        shown.append(gallery(root, f"before_after_{name}", f"{title}: the first {len(first)}", base, tuned, first))
        # A pair that is neither better nor worse belongs to neither extreme, even if there are few others.
        changed = sorted((pair for pair in pairs if change(pair) is not None), key=change)
        worse = [pair for pair in changed if change(pair) < (0, 0)]
        better = [pair for pair in reversed(changed) if change(pair) > (0, 0)]
        for kind, extremes in (("losses", worse[:NUM_EXTREMES]), ("gains", better[:NUM_EXTREMES])):
            if extremes:
                what = f"{title}: the largest {kind} of {len(pairs)} images"
                shown.append(gallery(root, f"{kind}_{name}", what, base, tuned, extremes))
    return shown


def read_pairs(root: Path, base: Row, tuned: Row) -> list[Pair]:
    """The image pairs of two evaluations under the same conditions, so that image n is on the same noise in both."""
    results = [files.read_json(root / row["folder"] / "result.json") for row in (base, tuned)]
    rewards = list(zip(*(one["values"].get("reward", [None] * one["n_images"]) for one in results), strict=True))
    verdicts = [one["values"].get("accuracy") for one in results]  # None without a judge
    return [
        Pair(
            prompt,
            tuple(root / row["folder"] / f"{n:05d}.png" for row in (base, tuned)),
            rewards[n],
            None if None in verdicts else tuple(verdict[n] > 0.5 for verdict in verdicts),
        )
        for n, prompt in enumerate(results[0]["shown_prompts"])
    ]


def change(pair: Pair) -> tuple[int, float] | None:
    """How much better the tuned image is, to sort by: (judge: -1, 0 or 1; difference of rewards); None without either."""
    verdict = 0 if pair.right is None else pair.right[1] - pair.right[0]
    if None in pair.rewards:
        return None if pair.right is None else (verdict, 0.0)
    return verdict, pair.rewards[1] - pair.rewards[0]


def gallery(root: Path, name: str, title: str, base: Row, tuned: Row, pairs: Sequence[Pair]) -> dict[str, Any]:
    """One gallery for the page; writes report/<name>.png with the same images."""
    labels = [
        label if row["accuracy"] is None else f"{label}\n{row['accuracy']:.1%}"
        for label, row in (("base", base), ("tuned", tuned))
    ]
    save_png(pairs_figure(title, labels, pairs), root / "report" / f"{name}.png")
    shown = []
    for pair in pairs:
        sides = zip(("base", "tuned"), pair.images, pair.rewards, pair.right or (None, None), strict=True)
        images = [
            {"label": label, "reward": "" if reward is None else short(reward), "right": right} | embed(path)
            for label, path, reward, right in sides
        ]
        shown.append({"prompt": pair.prompt, "images": images})
    facts = {"checkpoint": tuned["checkpoint"], "sampler": describe_sampler(tuned), "judged": pairs[0].right is not None}
    return {"title": title, "pairs": shown} | facts


def embed(path: Path) -> dict[str, Any]:
    """An image for the page: `src`, its data as a URL, scaled down if it is large; `small`, whether it has few pixels.

    Images are embedded so that the page is one file, which can be sent to others.
    """
    data, kind = path.read_bytes(), "png"
    picture = Image.open(io.BytesIO(data))
    if max(picture.size) > EMBEDDED_PX:
        picture.thumbnail((EMBEDDED_PX, EMBEDDED_PX), Image.Resampling.LANCZOS)
        buffer, kind = io.BytesIO(), "webp"
        picture.convert("RGB").save(buffer, format=kind, quality=85)
        data = buffer.getvalue()
    src = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"src": src, "small": max(picture.size) < EMBEDDED_PX // 2}


def draw_prompt(root: Path, prompt: str, images: Mapping[str, Tensor], sampler: str) -> Path:
    """Write one PNG with a row of a prompt's `images` [N,H,W,3] for each checkpoint; returns its path.

    The file's name tells prompt, checkpoint and sampler; a checksum tells prompts apart that begin alike.
    """
    words, which = (re.sub(r"[^a-zA-Z0-9]+", "_", text).strip("_") for text in (prompt, list(images)[-1]))
    path = root / "prompts" / f"{words[:60]}_{which[-40:]}_{sampler}_{files.digest([prompt, *images])[:6]}.png"
    with drawing():
        save_png(prompt_figure(prompt, list(images), [row.numpy() for row in images.values()]), path)
    return path


# ---- facts ----


def facts(root: Path, stages: Sequence[Row]) -> dict[str, Any]:
    """The page's last section: settings that differ from the preset, software, hardware, seconds and disk."""
    record = files.read_json(root / "config.json")
    newest = Stage(root, stages[-1]["stage"])
    manifests = [stage.manifest(phase) for phase in PHASES for stage in finished_stages(root, phase)]
    # The parts are those of the newest stage; stages of an earlier version may lack some.
    seconds = {key: [row[key] for row in stages if key in row] for key in stages[-1] if key.startswith("seconds/")}
    sampling = [stage.manifest("sample") for stage in finished_stages(root, "sample")]
    # An interrupted phase records the seconds of its last process only; `share` is the part that this process sampled.
    images = sum(manifest["num_images"] * manifest["seconds"].get("share", 1) for manifest in sampling)
    sampling_sec = sum(manifest["seconds"]["sample"] for manifest in sampling)
    sampled = newest.manifest("sample")
    return {
        "differences": preset_rows(record),
        "preset": record["config"].get("preset", ""),
        "versions": sampled["versions"],
        "hardware": sampled.get("hardware", {})
        | {key: sampled[key] for key in ("device", "mixed_precision", "num_threads")},
        "seconds": {
            key.removeprefix("seconds/").replace("/", ": "): sum(values) / len(values) for key, values in seconds.items()
        },
        "images_per_second": images / sampling_sec if images else None,
        "disk": disk_usage(root),
        "finished": max(manifest["finished"] for manifest in manifests),
    }


def preset_rows(record: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, the run's value, the preset's value) of each setting that differs from the run's preset.

    The experiment recorded the differences when it began. Earlier versions did not; then the preset is read as it is now.
    [] if there is no such preset any more.
    """
    differences = record.get("differs_from_preset")
    if differences is None:
        try:
            preset = runpy.run_path(str(PRESETS))["get_config"](record["config"]["preset"])
        except (KeyError, OSError, ValueError):
            return []
        plain = json.loads(json.dumps(preset.to_dict()))  # tuples are lists, as they are in the record
        differences = preset_differences(record["config"], plain)
    return [(key, here, there) for key, (here, there) in differences.items()]


def disk_usage(root: Path) -> dict[str, int]:
    """Bytes by kind of folder: `samples`, `images`, … over all stages, `eval`, …, and `other files`; without the report.

    Without it, so that the same experiment gives the same page.
    """
    sizes: dict[str, int] = {}
    for path in root.rglob("*"):
        parts = path.relative_to(root).parts
        if path.is_file() and not path.name.endswith(files.TEMPORARY) and parts[0] not in ("report", "report.html"):
            inside = len(parts) > 2 and parts[0].startswith("stage")
            # samples, images, … of all stages add up; a file directly in a stage's folder is one of the other files.
            kind = parts[1] if inside else parts[0] if len(parts) > 1 else "other files"
            kind = "other files" if kind.startswith("stage") else kind
            sizes[kind] = sizes.get(kind, 0) + path.stat().st_size
    return dict(sorted(sizes.items()))
