"""How what a run costs grows with its work: with the images in a stage, and with the stages that are finished.

    python -m benchmarks.growth --folder build/growth            # half an hour on one core; goes on where it was stopped
    python -m benchmarks.growth --folder build/growth --write    # and write docs/results/growth.json and growth.md
    python -m benchmarks.growth --only stages --sizes 10 100     # a part of it

Images: one stage of the small model by each script, at 1, 4 and 16 times the batches. Stages: a real experiment of two
stages whose second is copied (benchmarks.grown), then every command is given to it; and what each phase looks at in the
stages before it is called alone, in a new process (`cold`) and again (`warm`, as where one process makes all calls).
"""

import argparse
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from b2diffurl.experiment.stage import Stage, hardware, versions
from b2diffurl.runtime import files
from benchmarks import chromium
from benchmarks.grown import grow
from benchmarks.growth_page import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
OBJECTIVES = {"nft": "shapes", "ddpo": "shapes_ddpo"}  # the preset of each
PRESET = OBJECTIVES["ddpo"]  # of the experiment that is grown: its report has maps by timestep, too
TIMES = (1, 4, 16)
SIZES = (10, 100, 1000)
EVERY = 10  # stages from one evaluation to the next
WIDTH = 1200  # of the browser's window [px]
# A stage of 32 images a batch: small, so that what is measured is what surrounds the work.
SMALL = {
    "sample.num_steps": 5,
    "split_step_left": 2,
    "split_step_right": 3,
    "split_time": 4,
    "sample.batch_size": 8,
    "train.batch_size": 8,
    "eval.batch_size": 16,
    "num_threads": 1,
}
Facts = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    folder = given.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if given.look:
        print(json.dumps(look(given.look)))
        return
    kept = folder / "growth.json"
    facts = files.read_json(kept) if kept.is_file() else {}
    # Each figure is written as soon as it is there, so that the same command goes on.
    for name, measure in jobs(given, folder):
        if name not in facts:
            print(name, flush=True)
            facts[name] = measure()
            files.write_json(kept, facts)
    facts |= {"command": "python -m benchmarks.growth", "date": str(date.today())}
    facts |= {"hardware": hardware(), "versions": versions()}
    print(text := markdown(facts))
    if given.write:
        files.write_json(RESULTS / "growth.json", facts)
        files.write_bytes(RESULTS / "growth.md", text.encode())
    if not given.folder:
        shutil.rmtree(folder)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where experiments and figures are kept; default: a temporary folder")
    parser.add_argument("--only", nargs="*", choices=["images", "stages"], default=["images", "stages"])
    parser.add_argument("--times", nargs="*", type=int, default=TIMES, help="times the images in a stage")
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES, help="numbers of finished stages")
    parser.add_argument("--write", action="store_true", help="write docs/results/growth.json and growth.md")
    parser.add_argument("--look", type=Path, help=argparse.SUPPRESS)  # in a process of its own: see `look`
    return parser.parse_args(arguments)


def jobs(given: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, function that measures it) of every figure."""
    if "images" in given.only:
        for objective in OBJECTIVES:
            for factor in given.times:
                yield f"images {objective} {factor}", lambda o=objective, f=factor: images(folder, o, f)
    if "stages" in given.only:
        for size in given.sizes:
            for name, measure in stages(folder, size):
                yield f"stages {size} {name}", measure


# ---- processes ----


def flags(preset: str, settings: Mapping[str, Any], folder: Path) -> list[str]:
    """The flags of a script for an experiment in `folder`."""
    settings = SMALL | {"save_path": folder / "model", "log_path": folder / "log"} | settings
    return [f"--config=config/stage_process.py:{preset}", *(f"--config.{key}={value}" for key, value in settings.items())]


def measured(command: Sequence[str | Path], *, until: str = "", **variables: str) -> Facts:
    """Wall and CPU seconds of a command and all that it starts, and the peak memory of the largest process, in MiB.

    With `until` it is stopped, and the wall time taken, at the first line of its output that has this text.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    started, seen = time.monotonic(), None
    process = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    told = []
    for line in process.stdout:
        told.append(line)
        if until and until in line and seen is None:
            seen = time.monotonic() - started
            process.send_signal(signal.SIGTERM)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and seen is None:
        raise RuntimeError(f"{command} has failed:\n{''.join(told)}")
    wall = time.monotonic() - started if seen is None else seen
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "mib": usage.ru_maxrss / 1024}


# ---- images ----


def images(folder: Path, objective: str, factor: int) -> dict[str, Facts]:
    """What each script takes, and leaves on disk, for one stage of so many batches and for judging as many images."""
    name = f"images_{objective}_{factor}"
    root = folder / "model" / name
    shutil.rmtree(root, ignore_errors=True)
    settings = {"exp_name": name, "stage_cnt": 1, "sample.num_batches_per_epoch": factor, "eval.num_images": 32 * factor}
    settings["reward.batch_size"] = 32  # one that is full at 1 times the images
    given = flags(OBJECTIVES[objective], settings, folder)
    found = {}
    for verb in ("sample", "select", "train", "eval"):
        more = ["--config.run_name=stage0"] if verb != "eval" else ["--checkpoint=last", "--sampler=training", "--noverdict"]
        before = contents(root)
        found[verb] = measured([sys.executable, f"run_{verb}.py", *given, *more])
        made = [facts[0] for path, facts in contents(root).items() if before.get(path) != facts]
        found[verb] |= {"files": len(made), "bytes": sum(made)}
    found["images"] = 32 * factor
    return found


def contents(root: Path) -> dict[Path, tuple[int, int]]:
    """{file: (bytes, time of its last change)} of everything in a folder."""
    paths = [path for path in root.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


# ---- stages ----


def two_stages(folder: Path) -> Path:
    """The experiment that is grown: two stages, judged."""
    root = folder / "model" / "two"
    if not (root / "verdict.json").is_file():
        run_again(folder, "two", 2, EvalEvery="1")
    return root


def run_again(
    folder: Path, name: str, num_stages: int, *, within: Path | None = None, until: str = "", **variables: str
) -> Facts:
    """`bash run_process.sh` on an experiment in the folder `within`, by default that of all of `folder`."""
    variables = {"Preset": PRESET, "ExpName": name, "StageCnt": str(num_stages), "EvalEvery": str(EVERY)} | variables
    settings = {"sample.num_batches_per_epoch": 1, "eval.num_images": 16, "save_path": within or folder / "model"}
    given = flags(PRESET, settings, folder)[1:]
    return measured(["bash", "run_process.sh", *given], until=until, Python=sys.executable, **variables)


def stages(folder: Path, size: int) -> Iterator[tuple[str, Callable[[], Facts]]]:
    """(name, function that measures it) of all that is done with an experiment of so many finished stages."""
    alone = folder / "model" / f"of_{size}"  # a folder of its own, so that a list has nothing else
    root, other = alone / "long", alone / "other"
    module = [sys.executable, "-m"]

    def command(*words: str | Path) -> Callable[[], Facts]:
        return lambda: measured([*module, *words])

    yield "grow", lambda: grow_two(folder, size, (root, other))
    yield "report, the first", command("b2diffurl.report", root)
    yield "report, nothing new", command("b2diffurl.report", root)
    yield "list", command("b2diffurl.results", "--folder", alone)
    yield "compare two", command("b2diffurl.results", root, other)
    yield "the finished run again, Resident=1", lambda: run_again(folder, "long", size, within=alone, Resident="1")
    yield "the finished run again, Resident=0", lambda: run_again(folder, "long", size, within=alone, Resident="0")
    yield "to the first work of the next stage, Resident=1", lambda: go_on(folder, root, size, Resident="1")
    yield "to the first work of the next stage, Resident=0", lambda: go_on(folder, root, size, Resident="0")
    yield (
        "looks",
        lambda: json.loads(
            subprocess.run([*module, "benchmarks.growth", "--look", root], cwd=ROOT, check=True, capture_output=True).stdout
        ),
    )
    yield "page", lambda: in_browser(root / "report.html", folder / f"report_{size}.png")


def grow_two(folder: Path, size: int, targets: Sequence[Path]) -> Facts:
    """Two experiments of so many stages; returns the bytes and the files of one."""
    for target in targets:
        shutil.rmtree(target, ignore_errors=True)
        grow(two_stages(folder), target, size, every=EVERY)
    found = contents(targets[0])
    return {"files": len(found), "bytes": sum(size for size, _ in found.values())}


def go_on(folder: Path, root: Path, size: int, **variables: str) -> Facts:
    """`bash run_process.sh` for a stage more, until that begins; then all is as before."""
    text = f"stage{size} sample: S"
    found = run_again(folder, root.name, size + 1, within=root.parent, until=text, **variables)
    shutil.rmtree(Stage(root, size).folder, ignore_errors=True)
    forget_stage_cnt(root, size)
    return found


def forget_stage_cnt(root: Path, size: int) -> None:
    record = files.read_json(root / "config.json")
    record["config"]["stage_cnt"] = size
    files.write_record(root / "config.json", {key: value for key, value in record.items() if key != "changed"})


def look(root: Path) -> dict[str, dict[str, float]]:
    """CPU seconds of what a stage's phases look at in the stages before it: `cold`, in this new process, and `warm`.

    Sampling and selecting are those of the newest stage, which is put aside for the report before.
    """
    from b2diffurl.configuration.plan import make_plan
    from b2diffurl.configuration.presets import changed_config
    from b2diffurl.experiment.evaluation_table import drop_images, evaluation_rows, record
    from b2diffurl.experiment.origin import history_stages, require_origin
    from b2diffurl.experiment.stage import finished_stages
    from b2diffurl.experiment.stage_table import updates_before
    from b2diffurl.phases.evaluate import show
    from b2diffurl.phases.health import WINDOW, stage_warnings
    from b2diffurl.phases.inputs import reward_checksums
    from b2diffurl.phases.preflight import check_later_phases
    from b2diffurl.phases.select import earlier_summaries
    from b2diffurl.reporting.forecast import stage_done_line
    from b2diffurl.reporting.verdict import signs_of_evaluations

    stage = finished_stages(root, "train")[-1]
    changes = SMALL | {"exp_name": root.name, "save_path": str(root.parent), "log_path": str(root.parents[2] / "log")}
    changes |= {"stage_cnt": stage.index + 1, "run_name": f"stage{stage.index}", "sample.num_batches_per_epoch": 1}
    config = changed_config(PRESET, changes | {"eval.num_images": 16, "eval.every": EVERY})
    aside = root.parent / f"{root.name}_newest"
    stage.folder.rename(aside)
    show(make_plan(config).settings)
    aside.rename(stage.folder)
    plan = make_plan(config)

    def sampling() -> None:
        make_plan(config)
        check_later_phases(plan)
        require_origin(stage)
        reward_checksums(plan)
        history_stages(stage, plan.settings.selection.num_history_stages)

    looks = {
        "sample": sampling,
        "select": lambda: stage_warnings(earlier_summaries(stage), stage.manifest("select"), {}),
        "train": lambda: (updates_before(stage, WINDOW), stage_done_line(plan.settings, stage)),
        "evaluate": lambda: (record(root, []), drop_images(root, 1, ()), signs_of_evaluations(root, evaluation_rows(root))),
        "report": lambda: show(plan.settings),
    }
    return {name: seconds_of(act, once=name == "report") for name, act in looks.items()}


def seconds_of(act: Callable[[], object], *, once: bool) -> dict[str, float]:
    """CPU seconds of a call when this process remembers nothing, and of the same call again, unless it is made `once`."""
    if not once:
        act()  # imports what it needs
    files.REMEMBERED.clear()
    gc.collect()  # else it happens in one of the calls, and is of all that is imported
    gc.freeze()
    found = {}
    for name in ("cold",) if once else ("cold", "warm"):
        started = time.process_time()
        act()
        found[name] = time.process_time() - started
    return found


def in_browser(page: Path, picture: Path) -> Facts:
    """Seconds until Chromium has loaded the page, and until its end is scrolled to and drawn; and its bytes.

    The least of three times each; `picture` becomes the whole page.
    """
    size = page.stat().st_size
    if chromium.missing():
        return {"bytes": size}
    loads, uses = [], []
    for _ in range(3):
        with chromium.browser() as driver:
            chromium.set_size(driver, WIDTH)
            started = time.monotonic()
            driver.get(page.resolve().as_uri())  # returns after the load event
            loads.append(time.monotonic() - started)
            driver.execute_async_script(
                "window.scrollTo(0, document.body.scrollHeight);"
                "requestAnimationFrame(() => requestAnimationFrame(arguments[arguments.length - 1]))"
            )
            uses.append(time.monotonic() - started)
            driver.execute_script("window.scrollTo(0, 0)")
            height = chromium.screenshot(driver, WIDTH, picture)
    return {"bytes": size, "load": min(loads), "use": min(uses), "height": height}


if __name__ == "__main__":
    main()
