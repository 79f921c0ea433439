"""Log lines and progress bars: what a reader of the terminal, or of the file, sees."""

import contextlib
import json
import os
import pty
import re
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
    folder, *made = ended[0].stdout.splitlines()[:11]
    assert folder == "model/lora/tiny"
    scripts = [line.split("\t")[2] for line in made]
    assert scripts == [f"run_{verb}.py" for verb in ("sample", "select", "train", "eval")] * 2 + ["run_eval.py"] * 2
    lines = [line for one in ended for line in one.stdout.splitlines()][11:]
    assert (place / "log" / "tiny.log").read_text().splitlines() == lines
    assert all(re.match(LINE + r"(plan: |stage[01] (sample: |select: |train: |done: ))", line) for line in lines)
    said = [re.sub(LINE, "", line) for line in lines]
    model = overrides["pretrained.model"]
    assert said[0] == (
        f"plan: LoRA rank 4 on {model}, reward clip, 2 stages of 18 images (36), S 2..3 of 4, "
        "at most 12 updates, seed 300, minutes known after the first batch"
    )
    expected = [
        r"stage0 sample: S 2 of 4, 18 images, from a fresh LoRA",
        r"stage0 sample: first batch in [\d.]+ s; the run takes at most about [\d.]+ (s|min)",
        r"stage0 sample: done in [\d.]+ s, 18 images, [\d.]+ images/s",
        r"stage0 select: scoring 18 images by clip",
        r"stage0 select: done in [\d.]+ s, reward .* \(sd .*, in groups .*\), kept (\d+) of 18 images, \d+ good, \d+ bad",
        r"stage0 train: training on \d+ trajectories, 2 of their 2 steps, from a fresh LoRA",
        r"stage0 train: max \|log-ratio\| at the first update \d.\de[+-]\d\d",
        r"stage0 train: done in [\d.]+ s, \d+ updates, gradient norm .*, clipped .* %, to stage0/checkpoint_2, "
        r"for diffusers \(for ComfyUI, A1111, Forge: python -m b2diffurl\.export model/lora/tiny --format kohya\)",
        r"stage0 done: 1 of 2 stages, [\d.]+ (s|min) so far, about [\d.]+ (s|min) left",
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
    finished = [re.sub(LINE, "", line) for line in (lines[0], lines[-1])]
    assert finished == ["stage0 select: already finished"] * 2
    assert re.fullmatch(LINE + "select failed", lines[1])
    assert lines[2].startswith("Traceback")
    assert lines[-2].startswith("ValueError: ")


def test_equal_lines_come_from_a_resumed_run(workplace, overrides):
    """Finished phases say so in one line; the plan's line says that all is done."""
    said = start(workplace, overrides).stdout.splitlines()[-1]
    assert said.endswith("seed 300, all stages done")
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
