"""The report of an experiment: report.html, one file that any browser shows, and its pictures as PNG in report/.

It is written from the experiment's files alone; the same files give the same page, where they lie in the same place.
"""

import base64
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from b2diffurl.configuration.keys import flatten
from b2diffurl.configuration.presets import preset_config
from b2diffurl.configuration.recorded import preset_differences, recorded_settings, setting_changes
from b2diffurl.configuration.settings import describe_reward
from b2diffurl.experiment.branch_picture import load_tree
from b2diffurl.experiment.damage import skipping
from b2diffurl.experiment.evaluation_table import (
    describe_sampler,
    evaluation_rows,
    every_evaluation,
    set_name,
    set_title,
    short,
    with_error,
)
from b2diffurl.experiment.folder import in_words, is_average
from b2diffurl.experiment.stage import PHASES, Stage, finished_stages
from b2diffurl.experiment.stage_table import Row, stage_list, stage_row, stage_warnings, step_means, with_queries
from b2diffurl.objectives import OBJECTIVES
from b2diffurl.reporting.markup import render, visible
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
    to_svg,
    tree_figure,
)
from b2diffurl.reporting.verdict import signs_of_evaluations, verdict
from b2diffurl.reporting.verdict_text import for_page
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger
from b2diffurl.runtime.paths import command

NUM_PAIRS = 12  # how many images of a prompt set are shown: the first ones, not picked
NUM_WARNINGS = 3  # how many warnings of a kind are shown
NUM_EXTREMES = 6  # how many of the largest losses, and of the largest gains, are shown
NUM_CHANGES = 50  # how many changes of settings are shown
KEPT_VERSION = 4  # raise it when a picture or `summary` changes: what an older report kept is then made again
HEAT_MAPS = {"log_ratio": "Mean |log-ratio|", "clip_fraction": "Clip fraction"}
# The names of the report's pictures.
PICTURE = re.compile(r"curves|branches(_last)?|(log_ratio|clip_fraction)_per_step|(before_after|losses|gains)_.+")
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
    """Write <root>/report.html and <root>/report/*.png; returns the page's path. A ValueError if no stage is scored.

    A damaged file is left out and named, in the log and on the page. What has not changed since the last report is not read
    or drawn again (`Kept`).
    """
    if not finished_stages(root, "select"):
        raise ValueError(f"{root} has no stage that has been scored, so there is nothing to report yet")
    damaged: list[str] = []
    kept = Kept(root / "report")
    summaries = read_stages(root, kept, damaged)
    stages = with_queries([one and one["row"] for one in summaries])
    if not stages:
        raise ValueError(f"no stage of {root} can be read: {'; '.join(damaged)}")
    readable = [one for one in summaries if one]
    evaluations = evaluation_rows(root, stages, damaged)
    record = files.read_json(root / "config.json")
    config = record["config"]
    signs = signs_of_evaluations(root, evaluations)
    objective = config["train"].get("objective", "ddpo")  # the only one that earlier versions had
    changes = setting_changes(different_settings(root, readable, kept), record)
    with drawing():
        page = {
            "name": root.name,
            "stages": stages,
            "config": config,
            "selected_images": selected_images(record),
            "reward": describe_training(config["reward"]),
            "watched": watched_rewards(config["reward"], stages),
            "verdict": draw_verdict(root, stages, evaluations, damaged),
            "judge": command("eval"),
            "warned": warned_kinds([*(row for one in readable for row in one["warned"]), *signs]),
            "figures": figure_table(evaluations, every_evaluation(root), roles(config["reward"], stages)),
            "galleries": galleries(root, evaluations, kept, damaged),
            "curves": draw_curves(stages, evaluations, kept, clips=clips(objective)),
            "heat_maps": draw_heat_maps(readable, kept, clips=clips(objective)),
            "trees": draw_trees(root, readable, kept, damaged),
            "changes": changes[:NUM_CHANGES],
            "num_more_changes": len(changes[NUM_CHANGES:]),
            "facts": facts(root, stages, record, readable) | {"disk": disk_usage(root, kept)},
            "damaged": damaged,
            "gaps": stage_list(gaps) if (gaps := missing_stages(stages)) else "",
        }
    kept.finish()
    files.write_bytes(root / "report.html", render("report.html", page))
    return root / "report.html"


def draw_verdict(root: Path, stages: list[Row], evaluations: list[Row], damaged: list[str]) -> dict[str, Any] | None:
    """The verdict for the page; None if there is none yet."""
    with skipping(damaged, "the verdict"):
        found = verdict(root, stages, evaluations)
        return found and for_page(found)
    return None


def missing_stages(stages: Sequence[Row]) -> list[int]:
    """The stages between the first and the last that the page has no row of."""
    here = {row["stage"] for row in stages}
    return [index for index in range(min(here), max(here)) if index not in here]


# ---- what is kept from one report to the next ----


class Kept:
    """What the last report read and drew, in report/kept.json, each with a checksum of what it came from.

    So the time that a report takes hardly grows with the number of stages. Pictures that a report no longer has are deleted
    by `finish`, and no other file: a note of the user's in that folder stays.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "kept.json"
        self.before: dict[str, dict[str, Any]] = {}
        with suppress(ValueError, OSError):  # damaged or not there: everything is made anew
            found = files.read_json(self.path)
            self.before = found["entries"] if found.get("version") == KEPT_VERSION else {}
        self.now: dict[str, dict[str, Any]] = {}

    def get(self, name: str, source: Any, make: Callable[[], Any]) -> Any:
        """The value called `name`, made by `make` unless it was made from the same `source` before."""
        checksum, entry = files.digest(source), self.before.get(name, {})
        if entry.get("of") != checksum:
            entry = {"of": checksum, "value": json.loads(json.dumps(make()))}
        self.now[name] = entry
        return entry["value"]

    def picture(self, name: str, source: Any, draw: Callable[[], Figure], *, svg: bool = True) -> str:
        """Write a figure as <name>.png; returns it as SVG. It is drawn unless it is there, drawn from the same `source`."""
        if not (self.folder / f"{name}.png").is_file():
            self.before.pop(f"{name}.png", None)

        def make() -> str:
            figure = draw()
            save_png(figure, self.folder / f"{name}.png")
            return to_svg(figure, name) if svg else ""

        return self.get(f"{name}.png", source, make)

    def finish(self) -> None:
        """Write kept.json, and delete our own pictures that this report does not have."""
        for path in self.folder.glob("*.png"):
            if PICTURE.fullmatch(path.stem) and path.name not in self.now:
                path.unlink()
        if self.now != self.before:
            data = json.dumps({"version": KEPT_VERSION, "entries": self.now}, allow_nan=False)
            files.write_bytes(self.path, files.seal(data), durable=False)


def read_stages(root: Path, kept: Kept, damaged: list[str]) -> list[dict[str, Any] | None]:
    """`summary` of each scored stage, in order; None for one that is damaged."""
    found: list[dict[str, Any] | None] = []
    for stage in finished_stages(root, "select"):
        found.append(None)
        with skipping(damaged, f"stage {stage.index}"):
            manifests = [seal_of(stage.manifest_path(phase)) for phase in PHASES if stage.finished(phase)]
            found[-1] = kept.get(f"stage{stage.index}", manifests, lambda stage=stage: summary(stage))
    return found


def seal_of(path: Path) -> str:
    """The end of a manifest, which is a checksum of all before."""
    return files.remembered(path, as_text, read_end)


def read_end(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-min(100, path.stat().st_size), os.SEEK_END)
        return file.read()


def as_text(data: bytes) -> str:
    return data.decode(errors="replace")


def summary(stage: Stage) -> dict[str, Any]:
    """All that the report takes from a stage's manifests and metrics."""
    sampled = stage.manifest("sample")
    return {
        "row": stage_row(stage),
        "warned": stage_warnings(stage),
        "settings": files.digest(settings) if (settings := sampled.get("settings")) is not None else None,
        "telling": is_telling(stage),
        # As a list of pairs: keys of JSON objects are text.
        "steps": {key: list((step_means(stage, f"{key}_per_step") or {}).items()) for key in HEAT_MAPS},
        # An interrupted phase records the seconds of its last process only; `share` is the part that this process sampled.
        "sampled": [sampled["num_images"] * sampled["seconds"].get("share", 1), sampled["seconds"]["sample"]],
        "finished": max(stage.manifest(phase)["finished"] for phase in PHASES if stage.finished(phase)),
    }


def different_settings(root: Path, summaries: Sequence[dict[str, Any]], kept: Kept) -> dict[int, dict[str, Any] | None]:
    """{stage: its settings, None if it recorded none} of the stages whose settings differ from those of the one before."""
    found, before = {}, None
    for one in summaries:
        index, checksum = one["row"]["stage"], one["settings"]
        if checksum is None:
            found[index] = None
        elif checksum != before:
            read = lambda index=index: Stage(root, index).manifest("sample")["settings"]  # noqa: E731
            found[index] = kept.get(f"settings {checksum}", checksum, read)
            before = checksum
    return found


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


def clips(name: str) -> bool:
    """Whether the objective of this name clips gradients. One of a user may."""
    objective = OBJECTIVES.get(name)
    return objective is None or objective.clips


def describe_training(reward: Mapping[str, Any]) -> str:
    """What is trained on, in words: of a mixture also how its rewards are combined."""
    how = {"sum": "added up", "advantages": "each normalised by itself, then added up"}
    return describe_reward(reward) + (f" ({how[reward.get('combine', 'sum')]})" if reward.get("weights") else "")


def watched_rewards(reward: Mapping[str, Any], stages: Sequence[Row]) -> list[str]:
    """The rewards that are only watched: by the run's settings, or in its newest stage, for they may change."""
    scored = [key.removeprefix("watch/").removesuffix("_mean") for key in stages[-1] if key.startswith("watch/")]
    return list(dict.fromkeys([*(reward.get("watch") or ()), *(name for name in scored if "/" not in name)]))


def roles(reward: Mapping[str, Any], stages: Sequence[Row]) -> dict[str, str]:
    """{a reward's name: whether it is a part of what is trained on, or only watched}, for the table of figures."""
    return dict.fromkeys(watched_rewards(reward, stages), "watched") | dict.fromkeys(
        reward.get("weights") or (), "trained on"
    )


def figure_table(
    evaluations: Sequence[Row], everything: Sequence[Row] = (), roles: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The page's section Figures: base, newest checkpoint and difference, for each prompt set, sampler and figure.

    If an average of the LoRA was judged under the same conditions the newest one stands beside them. `everything` are the
    rows of eval.jsonl. `place` numbers the tables, one for each prompt set and sampler. `roles` are those of rewards.
    """
    lines = []
    for place, (prompts, sampler) in enumerate(judged_sets(evaluations)):
        rows = [row for row in evaluations if (row["prompts"], row["sampler"]) == (prompts, sampler)]
        base, tuned = base_and_tuned(rows)  # either may be missing: a figure of one alone is shown, too
        average = newest_average(everything, rows[0]) or {}
        for key in figures_of([row for row in (base, tuned) if row]):
            lines.append(
                {
                    "place": place,
                    "prompts": set_title(tuned or base),
                    "sampler": describe_sampler(tuned or base),
                    "figure": ("diversity: " if key.startswith("diversity/") else "") + describe_figure(key),
                    "role": (roles or {}).get(key, ""),
                    "base": with_error(base or {}, key),
                    "tuned": with_error(tuned or {}, key),
                    "checkpoint": tuned["checkpoint"] if tuned else "",
                    "gain": with_error(tuned or {}, f"{key}_gain", signed=True),
                    "average": with_error(average, key),
                    "average_checkpoint": in_words(average["checkpoint"]) if average else "",
                    "average_gain": with_error(average, f"{key}_gain", signed=True),
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


def newest_average(everything: Sequence[Row], like: Row) -> Row | None:
    """The newest stage's average that was judged on the prompts of the row `like`, by its sampler and conditions."""
    same = [row for row in everything if all(row[key] == like[key] for key in ("prompts", "sampler", "conditions"))]
    averages = [row for row in same if is_average(row["checkpoint"]) and "checkpoint_" not in row["checkpoint"]]
    return max(averages, key=lambda row: row["stage"], default=None)


# ---- pictures ----


def inert(svg: str, title: str) -> dict[str, str]:
    """A picture for the page's <img>, where nothing in it can act: what was kept may come with somebody else's folder."""
    data = base64.b64encode(str(svg).encode(errors="replace")).decode()
    return {"src": f"data:image/svg+xml;base64,{data}", "title": title}


def draw_curves(stages: list[Row], evaluations: list[Row], kept: Kept, *, clips: bool) -> list[dict[str, str]]:
    """Write report/curves.png, all panels in one; returns each panel as a picture, so that the page can arrange them."""
    panels = curve_panels(stages, evaluations, clips=clips)
    source = [stages, evaluations, clips]
    kept.picture("curves", source, lambda: panels_figure(panels), svg=False)
    drawn = kept.get("curves", source, lambda: [to_svg(panel_figure(panel), f"curve{n}") for n, panel in enumerate(panels)])
    return [inert(svg, panel.title) for svg, panel in zip(drawn, panels, strict=False)]


def draw_heat_maps(summaries: Sequence[dict[str, Any]], kept: Kept, *, clips: bool) -> list[dict[str, str]]:
    """Write report/<metric>_per_step.png of the metrics by timestep; returns them as pictures for the page.

    Where each stage trains a single level of noise there is nothing to tell apart, and where nothing clips no clip fraction.
    """
    drawn = []
    for key, title in HEAT_MAPS.items():
        values = {one["row"]["stage"]: dict(one["steps"][key]) for one in summaries if one["steps"][key]}
        if any(len(levels) > 1 for levels in values.values()) and (clips or key != "clip_fraction"):

            def draw(key: str = key, title: str = title, values: dict = values) -> Figure:
                return heat_map(f"{title} by timestep", values, log=key == "log_ratio")

            drawn.append(inert(kept.picture(f"{key}_per_step", list(values.items()), draw), f"{title} by timestep"))
    return drawn


def draw_trees(root: Path, summaries: Sequence[dict[str, Any]], kept: Kept, damaged: list[str]) -> list[dict[str, str]]:
    """Write the branch pictures of an early stage and of a late one (branches.png, branches_last.png); returns both.

    A stage's picture shows its first group. The stages are the first and the last in which that group has both a winner and
    a loser, or if there are none, the first and the last of all. A stage whose files are damaged is passed over.
    """
    stages = {one["row"]["stage"]: one["telling"] for one in summaries if one["telling"] is not None}
    chosen = [Stage(root, index) for index, telling in stages.items() if telling or not any(stages.values())]
    drawn: dict[int, dict[str, str]] = {}
    for name, candidates in (("branches", chosen), ("branches_last", chosen[::-1])):
        for stage in candidates:
            if stage.index in drawn:
                break
            with skipping(damaged, f"the branch picture of stage {stage.index}"):
                manifests = (seal_of(stage.manifest_path(phase)) for phase in ("sample", "select"))
                source = [stage.index, *manifests, marks(stage), *map(files.sha256, sorted(stage.folder.glob("tree.*")))]
                svg = kept.picture(name, source, lambda stage=stage: draw_tree(stage))
                drawn[stage.index] = inert(svg, f"Branches of stage {stage.index}")
                break
    return list(drawn.values())


def is_telling(stage: Stage) -> bool | None:
    """Whether a stage's branch picture has both a winner and a loser; None without a picture."""
    if not (stage.folder / "tree.json").is_file():
        return None
    with suppress(ValueError, OSError, LookupError, TypeError):  # a damaged selection: drawing names it
        return len(set(marks(stage).values())) == 2
    return True


def draw_tree(stage: Stage) -> Figure:
    """The branch picture of one stage."""
    tree, scores = load_tree(stage), files.read_json_lines(stage.scores)
    last, is_tree = tree.num_steps - max(tree.shared), max(tree.together.values()) > 1
    how = f"in a tree of the last {last} steps" if is_tree else f"the last {last} steps apart"
    what = f"{len(tree.branches)} branches, {how}"
    title = f"Stage {stage.index}: “{visible(tree.prompt, 60)}”, {what}"
    # scores.jsonl is in order of id, so the first K rows are the first group's.
    notes = [f"reward {short(row['reward'])}" for row in scores[: len(tree.branches)]]
    return tree_figure(tree, title, notes, marks(stage))


def marks(stage: Stage) -> dict[int, str]:
    """{branch: "winner" or "loser"} of the selected ones in the first group; {} in a run that trains on all images."""
    if selected_images(files.read_json(stage.root / "config.json")) == "all":
        return {}
    rows = [row for row in files.read_json(stage.selection) if row["group"] == 0]
    return {row["branch"]: "winner" if row["score"] > 0 else "loser" for row in rows}


def selected_images(record: Mapping[str, Any]) -> str:
    """Which images the run of a config.json trains on: pairs | all."""
    return recorded_settings(record["config"])["selection.images"]


def galleries(root: Path, evaluations: Sequence[Row], kept: Kept, damaged: list[str]) -> list[dict[str, Any]]:
    """The page's galleries of image pairs, base and tuned on the same noise; writes each as a PNG, too.

    For each prompt set: the first images, and those with the largest losses and gains.
    """
    shown = []
    for prompts, sampler in judged_sets(evaluations):
        rows = [row for row in evaluations if (row["prompts"], row["sampler"]) == (prompts, sampler)]
        base, tuned = base_and_tuned(rows)
        if base is None or tuned is None or sampler != "training":  # the deployed sampler's images have figures only
            continue
        with skipping(damaged, f"the images of {set_title(tuned)}"):
            shown += set_galleries(kept, prompts, base, tuned, read_pairs(root, base, tuned), damaged)
    return shown


def set_galleries(
    kept: Kept, prompts: str, base: Row, tuned: Row, pairs: list[Pair], damaged: list[str]
) -> list[dict[str, Any]]:
    """The galleries of one prompt set. A pair with a picture that cannot be read is left out."""
    name, title = set_name(prompts), set_title(tuned)
    unread: list[str] = []

    @cache
    def readable(pair: Pair) -> bool:
        try:
            for path in pair.images:
                if not files.is_whole_png(path):
                    raise ValueError(f"{path} is missing or cut off")
                files.read_image(path)
        except ValueError as error:
            unread.append(str(error))
            return False
        return True

    first = list(islice(filter(readable, pairs), NUM_PAIRS))
    shown = [gallery(kept, f"before_after_{name}", f"{title}: the first {len(first)}", base, tuned, first)] if first else []
    # A pair that is neither better nor worse belongs to neither extreme, even if there are few others.
    changed = sorted((pair for pair in pairs if change(pair) is not None), key=change)
    worse = (pair for pair in changed if change(pair) < 0 and readable(pair))
    better = (pair for pair in reversed(changed) if change(pair) > 0 and readable(pair))
    by = "by the judge" if all(None in pair.rewards for pair in pairs) else "of reward"
    for kind, candidates in (("losses", worse), ("gains", better)):
        if extremes := list(islice(candidates, NUM_EXTREMES)):
            what = f"{title}: the largest {kind} {by}, of {len(pairs)} images"
            shown.append(gallery(kept, f"{kind}_{name}", what, base, tuned, extremes))
    if unread:
        damaged.append(f"{len(unread)} of {len(pairs)} images of {title} are left out: {unread[0]}")
        logger.warning("report: %s; delete that file and judge again, which makes it again", damaged[-1])
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


def change(pair: Pair) -> float | None:
    """By how much the tuned image is better: by reward or, where there is none, by the judge; None without either.

    By one of them and not by both: an image that the judge accepts now may have a lower reward than before.
    """
    if None not in pair.rewards:
        return pair.rewards[1] - pair.rewards[0]
    return None if pair.right is None else float(pair.right[1] - pair.right[0])


def gallery(kept: Kept, name: str, title: str, base: Row, tuned: Row, pairs: Sequence[Pair]) -> dict[str, Any]:
    """One gallery for the page; writes report/<name>.png with the same images."""
    labels = [
        label if row["accuracy"] is None else f"{label}\n{row['accuracy']:.1%}"
        for label, row in (("base", base), ("tuned", tuned))
    ]
    drawn = [replace(pair, prompt=visible(pair.prompt)) for pair in pairs]
    source = [
        title,
        labels,
        [(one.prompt, [files.sha256(path) for path in one.images], one.rewards, one.right) for one in drawn],
    ]
    kept.picture(name, source, lambda: pairs_figure(title, labels, drawn), svg=False)
    shown = []
    for pair in pairs:
        sides = zip(("base", "tuned"), pair.images, pair.rewards, pair.right or (None, None), strict=True)
        images = [
            {"label": label, "reward": "" if reward is None else short(reward), "right": right} | embed(path)
            for label, path, reward, right in sides
        ]
        shown.append({"prompt": visible(pair.prompt), "images": images})
    facts = {"checkpoint": tuned["checkpoint"], "sampler": describe_sampler(tuned), "judged": pairs[0].right is not None}
    return {"title": title, "pairs": shown} | facts


def embed(path: Path) -> dict[str, Any]:
    """An image for the page: `src`, its data as a URL, scaled down if it is large; `small`, whether it has few pixels.

    Images are embedded so that the page is one file, which can be sent to others.
    """
    data, kind = path.read_bytes(), "png"
    picture = Image.fromarray(files.read_image(path).numpy())
    if max(picture.size) > EMBEDDED_PX:
        picture.thumbnail((EMBEDDED_PX, EMBEDDED_PX), Image.Resampling.LANCZOS)
        buffer, kind = io.BytesIO(), "webp"
        picture.save(buffer, format=kind, quality=85)
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


def facts(
    root: Path, stages: Sequence[Row], record: Mapping[str, Any], summaries: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The page's last section: settings that differ from the preset, software, hardware, seconds and disk."""
    # The parts are those of the newest stage; stages of an earlier version may lack some.
    seconds = {key: [row[key] for row in stages if key in row] for key in stages[-1] if key.startswith("seconds/")}
    images, sampling_sec = (sum(values) for values in zip(*(one["sampled"] for one in summaries), strict=True))
    sampled = Stage(root, stages[-1]["stage"]).manifest("sample")
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
        "finished": max(one["finished"] for one in summaries),
    }


def preset_rows(record: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, the run's value, the preset's value) of each setting that differs from the run's preset.

    The experiment recorded the differences when it began. Earlier versions did not; then the preset is read as it is now.
    [] if there is no such preset any more.
    """
    differences = record.get("differs_from_preset")
    if differences is None:
        try:
            preset = preset_config(record["config"]["preset"])
        except (KeyError, OSError, ValueError):
            return []
        plain = json.loads(json.dumps(preset.to_dict()))  # tuples are lists, as they are in the record
        plain["pretrained"]["family"] = record["config"]["pretrained"]["family"]  # it may have been recognised
        differences = preset_differences(record["config"], plain)
    return [(key, here, there) for key, (here, there) in flatten(differences).items()]


def disk_usage(root: Path, kept: Kept) -> dict[str, int]:
    """Bytes by kind of folder: `samples`, `images`, … over all stages, `eval`, …, and `other files`; without the report.

    Without it, so that the same experiment gives the same page. A folder in which nothing has been made or deleted since the
    last report is not looked through again.
    """
    sizes: dict[str, int] = {}
    for folder in sorted(parts_of(root)):
        name = folder.relative_to(root).as_posix()
        found = kept.get(f"disk {name}", times(folder), lambda folder=folder: sizes_in(root, folder))
        for kind, size in found.items():
            sizes[kind] = sizes.get(kind, 0) + size
    directly = [path for path in root.iterdir() if path.is_file() and path.name != "report.html"]
    others = sum(path.stat().st_size for path in directly if not path.name.endswith(files.TEMPORARY))
    return dict(sorted((sizes | {"other files": sizes.get("other files", 0) + others}).items()))


def parts_of(root: Path) -> Iterator[Path]:
    """The folders of stages and of evaluations, and all others but the report's."""
    for name in os.listdir(root):
        if name != "report" and os.path.isdir(root / name):
            yield from (root / name / one for one in os.listdir(root / name)) if name == "eval" else (root / name,)


def times(folder: Path) -> list[int]:
    """When something was last made or deleted in a folder, and in those directly in it."""
    with suppress(OSError), os.scandir(folder) as entries:
        inside = sorted(entry.stat().st_mtime_ns for entry in entries if entry.is_dir())
        return [os.stat(folder).st_mtime_ns, *inside]
    return []


def sizes_in(root: Path, part: Path) -> dict[str, int]:
    """Bytes below a folder of the experiment by kind: a stage's folders each have their own."""
    sizes: dict[str, int] = {}
    for folder, _, names in os.walk(part):  # several times as fast as Path.rglob
        kind, *inside = Path(folder).relative_to(root).parts
        if kind.startswith("stage"):  # a file directly in a stage's folder is one of the other files
            kind = inside[0] if inside else "other files"
        if counted := [name for name in names if not name.endswith(files.TEMPORARY)]:
            with suppress(OSError):  # a file that was deleted in this moment
                sizes[kind] = sizes.get(kind, 0) + sum(os.stat(os.path.join(folder, name)).st_size for name in counted)
    return sizes
