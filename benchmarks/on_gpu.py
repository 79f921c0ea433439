"""All figures of docs/performance.md that need a GPU, by one command, in the order of what a minute brings.

    python -m benchmarks.on_gpu --minutes 9       # the same command again goes on with what is missing
    python -m benchmarks.on_gpu --list            # what is measured, what is there, and how long the rest should take
    python -m benchmarks.on_gpu --again tests     # measure an item anew; those beyond the 25 minutes are made only so
    python -m benchmarks.on_gpu --page            # only write the page of what was measured
    python -m benchmarks.on_gpu --quick --folder DIR --results DIR/gpu.json   # tiny models, to see that it works

An item has a process of its own, with a time limit. As soon as it ends, its result is in docs/results/gpu.json. If it fails,
its message is there, and the others go on. At the end docs/results/gpu.md is written. With --minutes no item is begun that
would not fit. All models have random weights and are built in --folder.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from b2diffurl.runtime import files
from benchmarks import gpu_items
from benchmarks.gpu_items import Place, last_words
from benchmarks.gpu_plan import BUILD_SECONDS, COMPILE, ITEMS, NAMES, Item, compiled_name
from benchmarks.gpu_report import markdown
from benchmarks.stage import ROOT

RESULTS = ROOT / "docs" / "results" / "gpu.json"
SLACK_SEC = 20  # of a call: what it needs before its first item


class OutOfTimeError(Exception):
    """An item that was stopped at its time limit, or at the end of the call."""


@dataclass
class Results:
    """The file of results: of each item what it `found`, or why it `failed`; and items that the end of a call `stopped`."""

    path: Path
    content: dict[str, Any] = field(default_factory=lambda: {"items": {}, "stopped": {}})

    def __post_init__(self):
        if self.path.is_file():
            self.content = files.read_json(self.path)

    @property
    def items(self) -> dict[str, dict[str, Any]]:
        return self.content["items"]

    def require_same(self, hardware: str, *, quick: bool) -> None:
        """Refuse to mix the figures of two cards, or of tiny models and real ones."""
        found = self.content.setdefault("hardware", hardware), self.content.setdefault("quick", quick)
        if found != (hardware, quick):
            raise SystemExit(
                f"{self.path} has results of {found[0]}{' (--quick)' * found[1]}, and this is {hardware}"
                f"{' (--quick)' * quick}. Give another file: --results PATH"
            )

    def put(self, name: str, entry: dict[str, Any]) -> None:
        self.content["items"][name] = entry
        self.content["stopped"].pop(name, None)
        files.write_json(self.path, self.content)

    def put_stopped(self, name: str, seconds: float) -> None:
        self.content["stopped"][name] = seconds
        files.write_json(self.path, self.content)


@dataclass(frozen=True)
class Call:
    """One call of the command: where it works, and until when."""

    place: Place
    results: Results
    command: str
    began: float  # by time.monotonic
    seconds: float = float("inf")

    @property
    def left(self) -> float:
        return self.began + self.seconds - time.monotonic()

    def estimate(self, item: Item) -> float:
        """Seconds that an item should take: as it took before, or by the plan, with what is to be built and compiled."""
        before = self.results.items.get(item.name, {}).get("seconds", 0.0)
        if before:
            return before
        warm = item.compiled is None or (self.place.folder / compiled_name(*item.compiled)).exists()
        missing = [BUILD_SECONDS[name] for name in item.models if not (self.place.folder / name).is_dir()]
        planned = item.seconds + (0.0 if warm else item.cold_seconds) + sum(missing)
        # What did not fit into the end of a call may need longer than planned; but a call of its own has to do.
        planned = max(planned, 1.5 * self.results.content["stopped"].get(item.name, 0.0))
        return min(planned, self.seconds - SLACK_SEC)

    def make(self, item: Item) -> None:
        """Make an item, and write what it found, or why it failed. Nothing is written if the call ends before it."""
        limit, left = 3 * self.estimate(item) + 60, self.left
        has_all = left > self.seconds - 3 * SLACK_SEC  # nearly the whole call is its own
        started = time.monotonic()
        entry: dict[str, Any] = {"date": str(date.today()), "command": self.command}
        try:
            entry["found"] = run_apart(item.what, dict(item.arguments), self.place, item.name, min(limit, left))
        except OutOfTimeError:
            taken = time.monotonic() - started
            if left < limit and not has_all:
                self.results.put_stopped(item.name, taken)
                say(f"{item.name}: stopped after {taken:.0f} s, where this call ends; the next one makes it first or anew")
                return
            entry["failed"] = f"stopped at its limit of {taken:.0f} s"
        except RuntimeError as error:
            entry["failed"] = str(error)
        entry["seconds"] = time.monotonic() - started
        self.results.put(item.name, entry | {"versions": self.results.content["versions"]})
        say(f"{item.name}: {entry.get('failed') or 'done'}, {entry['seconds']:.0f} s")


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    results = Results(given.results.resolve())
    if given.list or given.page:
        print(listing(given, results) if given.list else write_page(results))
        return
    began = time.monotonic()
    place = Place(given.folder.resolve(), given.quick)
    place.folder.mkdir(parents=True, exist_ok=True)
    with stopped_by_signals():
        about = run_apart("circumstances", {}, place, "circumstances", 300)
        if not about["cuda"] and not given.quick:
            raise SystemExit("there is no CUDA device; --quick runs tiny models on the CPU")
        results.require_same(about["hardware"], quick=given.quick)
        results.content["versions"] = about["versions"]
        call = Call(place, results, given.command, began, 60 * given.minutes or float("inf"))
        for item in wanted(given, results):
            if item.compiled and not given.only and not given.again and COMPILE not in results.items:
                say(f"{item.name}: left until {COMPILE} has been made, which is faster for all networks together")
                continue
            if call.estimate(item) > call.left:
                say(f"{item.name}: left for the next call, {call.left:.0f} s are too few")
                continue
            say(f"{item.name}: begun, about {call.estimate(item):.0f} s")
            call.make(item)
        write_page(results)
    print(listing(given, results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.0, help="begin nothing that would not fit into so many; 0: all")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help="only these items, if they are missing")
    parser.add_argument("--again", nargs="+", choices=NAMES, metavar="NAME", help="only these items, also if they are there")
    parser.add_argument(
        "--folder", type=Path, default=Path.home() / ".cache" / "b2diffurl_on_gpu", help="models, caches, logs"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of results; the page lies beside it")
    parser.add_argument("--quick", action="store_true", help="tiny models, also on the CPU")
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing")
    parser.add_argument("--page", action="store_true", help="write the page of the results, and print it")
    given = parser.parse_args(arguments)
    given.command = shlex.join(["python", "-m", "benchmarks.on_gpu", *(sys.argv[1:] if arguments is None else arguments)])
    return given


def wanted(given: argparse.Namespace, results: Results) -> list[Item]:
    """The items that a call is to make, in order. `again` makes them in every call that names them."""
    if given.again:
        return [item for item in ITEMS if item.name in given.again]
    chosen = [item for item in ITEMS if (item.name in given.only if given.only else not item.extra)]
    return [item for item in chosen if item.name not in results.items]


def listing(given: argparse.Namespace, results: Results) -> str:
    """A line for each item: seconds that it took, or that it should take; and what remains."""
    call = Call(Place(given.folder.resolve(), given.quick), results, given.command, time.monotonic())
    lines = []
    for item in ITEMS:
        entry = results.items.get(item.name)
        state = f"failed: {entry['failed']}" if entry and "failed" in entry else "there" if entry else "missing"
        state = "not asked for" if item.extra and not entry else state
        lines.append(f"{item.name:28} {call.estimate(item):5.0f} s  {state}")
    left = [item for item in ITEMS if item.name not in results.items and not item.extra]
    minutes = sum(call.estimate(item) for item in left) / 60
    lines.append(f"{len(left)} items remain, about {minutes:.0f} minutes" if left else "nothing remains")
    return "\n".join(lines)


def write_page(results: Results) -> str:
    """Write the page beside the results. Returns it."""
    page = markdown(results.content)
    files.write_bytes(results.path.with_suffix(".md"), page.encode())
    return page


def run_apart(what: str, arguments: dict[str, Any], place: Place, name: str, limit: float) -> dict[str, Any]:
    """What an item found, in a process of its own; its output goes to logs/<name>.log.

    After `limit` seconds it is killed with all that it has started: an OutOfTimeError. A RuntimeError says why it failed.
    """
    answer, path = place.folder / "answer.json", place.folder / "logs" / f"{name}.log"
    answer.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as log:
        command = gpu_items.command_of(what, arguments, place, answer)
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            raise OutOfTimeError from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode < 0:
        raise RuntimeError(f"killed by {signal.Signals(-process.returncode).name}")
    if process.returncode:
        raise RuntimeError(last_words(path.read_text(errors="replace")))
    return files.read_json(answer)


class stopped_by_signals:  # noqa: N801
    """Inside the block SIGTERM and SIGHUP end this process as Ctrl-C does, so that it ends its item."""

    SIGNALS = (signal.SIGTERM, signal.SIGHUP)

    def __enter__(self) -> None:
        self.before: list[Callable | int | None] = [signal.signal(one, self.stop) for one in self.SIGNALS]

    def __exit__(self, *_: object) -> None:
        for one, handler in zip(self.SIGNALS, self.before, strict=True):
            signal.signal(one, handler)

    @staticmethod
    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
