"""Log lines and progress bars: what a reader of the terminal, or of the file, sees."""

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    VERBS,
    Ended,
    assert_same,
    experiment,
    run_script,
    script_arguments,
    start,
)

from b2diffurl.experiment.stage import Stage
from b2diffurl.runtime import logs

# ---- log lines ----


LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


@pytest.fixture(scope="module")
def run(overrides, tmp_path_factory) -> tuple[Path, list[Ended]]:
    """A folder in which start.py and the scripts of both stages have run, and how each ended."""
    folder = tmp_path_factory.mktemp("run")
    ended = [start(folder, overrides)]
    for index in range(2):
        ended += [run_script(folder, verb, overrides | {"run_name": f"stage{index}"}) for verb in VERBS]
    return folder, ended


def test_the_log_tells_the_run(overrides, run):
    """The same lines on stdout and in the log, each with date and time, stage and phase; at the beginning the plan, after
    the first batch the time for all, after a stage the time left; paths are short."""
    place, ended = run
    lines = [line for one in ended for line in one.stdout.splitlines()]
    named, *logged = (place / "log" / "tiny.log").read_text().splitlines()
    assert re.fullmatch(LINE + f"log of the experiment in {place.resolve()}/model/lora/tiny", named)
    assert logged == lines
    assert all(re.match(LINE + r"(plan: |stage[01] (sample: |select: |train: |done: ))", line) for line in lines)
    said = [re.sub(LINE, "", line) for line in lines if "so none is held out" not in line]  # both prompt files are one
    model = overrides["pretrained.model"]
    assert said[0] == (
        f"plan: LoRA rank 4 on {model}, reward clip, 2 stages of 18 images (36), S 2..3 of 4, "
        "at most 12 updates, seed 300, minutes known after the first batch"
    )
    expected = [
        r"stage0 sample: S 2 of 4, 18 images, from a fresh LoRA",
        r"stage0 sample: first batch in [\d.]+ s; the run takes at most about [\d.]+ (s|min) \(.+ to .+\)",
        r"stage0 sample: done in [\d.]+ s, 18 images, [\d.]+ images/s",
        r"stage0 select: scoring 18 images by clip",
        r"stage0 select: done in [\d.]+ s, reward .* \(sd .*, in groups .*\), kept (\d+) of 18 images, \d+ good, \d+ bad",
        r"stage0 train: training on \d+ trajectories, 2 of their 2 steps, from a fresh LoRA",
        r"stage0 train: max \|log-ratio\| at the first update \d.\de[+-]\d\d",
        r"stage0 train: done in [\d.]+ s, \d+ updates, gradient norm .*, clipped .* %, to stage0/checkpoint_2, "
        r"for diffusers \(for ComfyUI, A1111, Forge: python -m b2diffurl\.export model/lora/tiny --format kohya\)",
        r"stage0 done: 1 of 2 stages, [\d.]+ (s|min) so far, about [\d.]+ (s|min) \(.+ to .+\) left",
        r"stage1 sample: S 3 of 4, 18 images, from stage0/checkpoint_2",
    ]
    assert [bool(re.fullmatch(form, line)) for form, line in zip(expected, said[1:], strict=False)] == [True] * len(expected)
    assert sum("first batch" in line for line in said) == 1 + 1  # the plan's line, and stage 0


@pytest.mark.long
def test_stdout_may_be_the_log_itself(workplace, overrides):
    """As in `bash run_process.sh > log/tiny.log`: every line once, one after the other, and a traceback where one is due."""
    log = workplace / "log" / "tiny.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as stream:
        for changed in ({}, {"seed": 1}, {}):
            argv = script_arguments("select", overrides | changed | {"run_name": "stage0"})
            command = [sys.executable, ROOT / argv[0], *argv[1:]]
            subprocess.run(command, cwd=workplace, stdout=stream, stderr=subprocess.DEVNULL, timeout=300, check=False)
    lines = log.read_text().splitlines()
    finished = [re.sub(LINE, "", line) for line in (lines[1], lines[-1])]
    assert finished == ["stage0 select: already finished"] * 2
    assert re.fullmatch(LINE + "select failed", lines[2])
    assert lines[3].startswith("Traceback")
    assert lines[-2].startswith("ValueError: ")


def test_equal_lines_come_from_a_resumed_run(workplace, overrides):
    """Finished phases say so in one line; the plan's line says that all is done."""
    said = start(workplace, overrides).stdout
    assert "seed 300, all stages done\n" in said
    for verb in VERBS:
        line = run_script(workplace, verb, overrides).stdout
        assert re.fullmatch(LINE + f"stage0 {verb}: already finished\n", line)


# ---- progress bars ----


ALL_VERBS = """
import copy, json, sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from conftest import make_config, run_verb
from b2diffurl.runtime.logs import set_up_logging

set_up_logging(Path("log/tiny.log"))
for verb in ("sample", "select", "train"):
    run_verb(Path.cwd(), make_config(json.loads(sys.argv[1])), verb)
"""


def on_terminal(folder: Path, overrides: dict) -> str:
    """What a stage writes on a pseudo-terminal, its stdout and stderr, in one process."""
    script = ALL_VERBS.format(tests=str(ROOT / "tests"), root=str(ROOT))
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 120))
    environment = os.environ | {"TQDM_MININTERVAL": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(overrides)], cwd=folder, env=environment, stdout=child, stderr=child
    )
    os.close(child)
    written = b""
    with contextlib.suppress(OSError):  # Linux: the other end is closed
        while data := os.read(parent, 65536):
            written += data
    os.close(parent)
    assert process.wait() == 0, written.decode()
    return written.decode()


@pytest.mark.long
def test_bars_on_a_terminal(stage_with, overrides, tmp_path):
    """Sampling advances within its batches and shows when it decodes, scoring by images, training by micro-batches to the
    last transition, each with the time left; log lines stay whole lines; and the files are those of a run without bars."""
    written = on_terminal(tmp_path, overrides)
    shown = {
        name: [
            int(n) for n in re.findall(rf"stage0 {name}: +\d+ % \|[^|]*\| (\d+)/{total} {unit}, [\d:]+, \S+ left", written)
        ]
        for name, total, unit in (("sample", 18, "images"), ("score clip", 18, "images"), ("train", r"\d+", "transitions"))
    }
    assert len({*shown["sample"]} - {0, 6, 12, 18}) >= 5
    assert shown["sample"] == sorted(shown["sample"]) and shown["sample"][-1] == 18
    assert {4, 8, 12, 16} <= {*shown["score clip"]}
    assert ", decoding" in written
    stage = Stage(experiment(tmp_path), 0)
    assert shown["train"][-1] == stage.manifest("train")["num_transitions"]
    assert len({*shown["train"]}) > 2 * stage.manifest("train")["num_updates"]
    lines = re.split(r"[\r\n]+", written)
    logged = (tmp_path / "log" / "tiny.log").read_text().splitlines()
    assert len(logged) == 9
    assert {*logged} <= {*lines}
    assert_same(stage.root, experiment(stage_with()))


def test_no_bars_in_a_pipe(run):
    """Where stderr is no terminal nothing is written there."""
    assert [ended.stderr for ended in run[1]] == [""] * (1 + 2 * len(VERBS))


def test_the_plan_needs_no_rank_but_the_first(overrides, tmp_path, monkeypatch):
    """Further processes show no bar."""
    from b2diffurl.runtime.logs import shows_progress

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert shows_progress()
    monkeypatch.setenv("RANK", "1")
    assert not shows_progress()


class Clock:
    """The time, as a test sets it."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(logs, "time", clock)
    return clock


def told(log: Path) -> list[str]:
    return [re.sub(LINE, "", line) for line in log.read_text().splitlines()]


def test_a_long_phase_says_how_far_it_is(tmp_path, clock, capsys):
    """Where stderr is no terminal: after a minute, and with the time left by the pace so far; not at the end, and with
    nothing on stderr. Advances may be fractions."""
    logs.set_up_logging(tmp_path / "x.log")
    with logs.Progress(32, "stage3 sample", "images") as bar:
        for _ in range(64):
            clock.now += 10
            bar.update(0.5)
    lines = told(tmp_path / "x.log")
    assert lines[:2] == [
        "stage3 sample: 3 of 32 images, 60 s, about 9.7 min left",
        "stage3 sample: 6 of 32 images, 2.0 min, about 8.7 min left",
    ]
    assert len(lines) == 10
    console = capsys.readouterr()
    assert [re.sub(LINE, "", line) for line in console.out.splitlines()] == lines
    assert console.err == ""


def test_a_phase_of_hours_says_so_ever_more_seldom(tmp_path, clock):
    """A day in 5-second steps: ten lines in ten minutes, and less than sixty in all the rest; hours from 1.5 hours on."""
    logs.set_up_logging(tmp_path / "x.log")
    with logs.Progress(86400 / 5, "stage0 train", "transitions") as bar:
        for _ in range(86400 // 5):
            clock.now += 5
            bar.update()
    lines = told(tmp_path / "x.log")
    assert sum(" h, about" in line for line in lines[:10]) == 0
    assert 40 < len(lines) < 70
    assert re.search(r"2\d h, about [\d.]+ (min|h) left", lines[-1])


def test_a_short_phase_says_nothing(tmp_path, clock, monkeypatch):
    """One of a minute, nor does a further process, nor the terminal, whose bar says it: only the log file has the line."""
    logs.set_up_logging(tmp_path / "x.log")
    for _ in logs.progress(range(59), "eval", "batches"):
        clock.now += 1
    assert told(tmp_path / "x.log") == []
    monkeypatch.setenv("RANK", "1")
    logs.set_up_logging(tmp_path / "second.log")
    for _ in logs.progress(range(5), "eval", "batches"):
        clock.now += 70
    assert told(tmp_path / "second.log") == []


def test_beside_a_bar_only_the_log_file_has_the_lines(tmp_path, clock, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    logs.set_up_logging(tmp_path / "x.log")
    for _ in logs.progress(range(3), "eval", "batches"):
        clock.now += 60
    assert told(tmp_path / "x.log") == [
        "eval: 1 of 3 batches, 60 s, about 2.0 min left",
        "eval: 2 of 3 batches, 2.0 min, about 60 s left",
    ]
    assert capsys.readouterr().out == ""


# ---- what is shown, and where ----

NASTY = "a cat\x1b[2J\r\n2026-01-01 00:00:00 stage9 done\u202e \x00\x9b \udcff é 日本"
SHOWN = r"a cat\x1b[2J\r\n2026-01-01 00:00:00 stage9 done\u202e \x00\x9b \udcff é 日本"


def test_nothing_shown_moves_the_cursor_or_forges_a_line(tmp_path, capsys):
    """Prompts, file names, servers' answers and exceptions are escaped in the log, on the console, and where they
    are shown to people; what can be printed stays. Only a traceback has several lines."""
    log = tmp_path / "x.log"
    logs.set_up_logging(log)
    logs.logger.warning("prompt %s", NASTY)
    try:
        raise ValueError(NASTY)
    except ValueError:
        logs.logger.debug("failed", exc_info=True)
    logs.show(NASTY, "second")
    console = capsys.readouterr().out.splitlines()
    assert [re.sub("^" + LINE, "", line) for line in console] == [f"prompt {SHOWN}", SHOWN, "second"]
    lines = log.read_text().splitlines()
    assert re.sub("^" + LINE, "", lines[0]) == f"prompt {SHOWN}"
    assert lines[2] == "Traceback (most recent call last):"
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("where", ["exp_name", "curriculum", "pretrained.model", "prompt_file", "run_name"])
def test_refusals_are_escaped(overrides, tmp_path, where):
    """Whatever a mistake quotes, it stays two lines that can be printed."""
    ended = run_script(tmp_path, "sample", overrides | {where: NASTY.replace("\udcff", "")})
    assert ended.code == 2
    assert len(ended.stderr.splitlines()) == 2 and all(line.isprintable() for line in ended.stderr.splitlines())


def test_a_plan_is_escaped(overrides, tmp_path):
    """A prompt in --dry_run."""
    ended = start(tmp_path, overrides | {"prompt": "a cat\x1b[2J\rdone"}, "--dry_run")
    assert ended.code == 0, ended.stderr
    assert "a cat" in ended.stdout and all(line.isprintable() for line in ended.stdout.split("\n"))


SAY = """
import sys
sys.path[:0] = [{root!r}]
from pathlib import Path
from b2diffurl.runtime.logs import logger, set_up_logging, set_up_streams, show
set_up_streams()
set_up_logging(Path("x.log"))
for n in range(2000):
    logger.info("%d é 日本", n)
    show("é 日本")
print("é")
open("ended", "w").close()
"""


@pytest.mark.parametrize(
    ("redirected", "environment"),
    [
        ("> out 2> err", {"PYTHONIOENCODING": "ascii"}),
        ("> out 2> err", {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}),
        ("2> err | head -n 1 > out", {}),
        (">&- 2> err", {}),
        ("2>&- > out", {}),
        ("<&- >&- 2>&-", {}),
    ],
)
def test_no_stream_stops_a_run(tmp_path, redirected, environment):
    """One that only takes ASCII, has no reader any more, or is closed: exit code 0, nothing on stderr, and a whole log."""
    (tmp_path / "say.py").write_text(SAY.format(root=str(ROOT)))
    command = f"set -o pipefail; {sys.executable} say.py {redirected}"
    ended = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=os.environ | environment, timeout=60)
    assert ended.returncode == 0
    assert (tmp_path / "ended").exists()
    lines = (tmp_path / "x.log").read_text(encoding="utf-8").splitlines()
    assert [re.sub(LINE, "", line) for line in lines] == [f"{n} é 日本" for n in range(2000)]
    assert not (tmp_path / "err").exists() or (tmp_path / "err").read_text() == ""
    if "encoding" in str(environment).lower() or "LC_ALL" in environment:
        assert r"\u65e5\u672c" in (tmp_path / "out").read_text()


def test_a_log_that_nobody_reads_any_more(tmp_path):
    """Python would try to write the rest at its end, and exit with code 120."""
    (tmp_path / "say.py").write_text(SAY.format(root=str(ROOT)).replace('    show("é 日本")\nprint("é")\n', ""))
    command = f"set -o pipefail; {sys.executable} say.py 2> err | head -n 1 > out"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, timeout=60).returncode == 0
    assert (tmp_path / "err").read_text() == ""


def test_experiments_of_one_name_have_logs_of_their_own(workplace, overrides):
    """log/<name>.log is the first one's; the second has another, which begins by saying so; each goes on in its own.
    One that has been moved goes on in its old log."""
    settings = overrides | {"log_path": str(workplace / "logs")}
    other = workplace / "other"
    other.mkdir()
    shutil.copytree(experiment(workplace), other / "tiny")
    logged = []
    for save_path in (experiment(workplace).parent, other, experiment(workplace).parent, other):
        assert run_script(workplace, "sample", settings | {"save_path": str(save_path)}).code == 0
        logged.append({path.name: len(path.read_text().splitlines()) for path in (workplace / "logs").iterdir()})
    (own,) = logged[1].keys() - {"tiny.log"}
    assert re.fullmatch(r"tiny\.[0-9a-f]{6}\.log", own)
    assert logged == [{"tiny.log": 2}, {"tiny.log": 2, own: 3}, {"tiny.log": 3, own: 3}, {"tiny.log": 3, own: 4}]
    assert "tiny.log is that of another experiment of this name" in (workplace / "logs" / own).read_text()
    moved = (workplace / "model").rename(workplace / "moved") / "lora"
    assert logs.log_of(workplace / "logs", moved / "tiny") == workplace / "logs" / "tiny.log"


def test_a_log_without_a_first_line_is_anybodys(tmp_path):
    """As earlier versions began it."""
    (tmp_path / "tiny.log").write_text("2026-01-01 00:00:00 plan: …\n")
    assert logs.log_of(tmp_path, tmp_path / "a" / "tiny") == tmp_path / "tiny.log"
