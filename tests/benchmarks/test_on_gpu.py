"""The one command for a GPU: its plan fits, a call ends in time, nothing is lost or done twice, and the page says it all.

Items are stood in for by a script that does what its environment says. `long` makes all of them on tiny models, in one
process; `slow` by the command, each in a process of its own.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import conftest
import pytest
import torch
from conftest import ROOT

from b2diffurl.models.sd3 import SD3
from b2diffurl.models.sdxl import SDXL
from b2diffurl.models.stable_diffusion import StableDiffusion
from benchmarks import gpu_items, gpu_plan, gpu_report, on_gpu, stage

STAND_IN = """
import json, os, pathlib, sys, time
spec, answer, place = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
what = spec["what"]
with (place / "made.txt").open("a") as made:
    made.write(what + "\\n")
if what == "matmul" and os.environ.get("FAIL"):
    raise MemoryError("CUDA out of memory")
if what == "tests":
    (place / "pid.txt").write_text(str(os.getpid()))
    time.sleep(float(os.environ.get("SLEEP", 0)))
found = {"hardware": "card", "versions": "torch 2", "cuda": True} if what == "circumstances" else {}
found |= {"matmul": {"matmul_tflops": 2.0}, "tests": {"summary": "9 passed", "bad": [], "said": []}}.get(what, {})
answer.write_text(json.dumps(found))
"""
TWO = ("matmul", "tests")
EXTRA = [item.name for item in gpu_plan.ITEMS if item.extra]


@pytest.fixture
def call(tmp_path, monkeypatch):
    """call(*arguments): the command with two items, each of which the stand-in makes; returns what was made in it."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    items = [gpu_plan.Item(name, name, 5.0) for name in TWO]
    monkeypatch.setattr(on_gpu, "ITEMS", items)

    def command(what, arguments, place, answer):
        return [sys.executable, "-S", str(tmp_path / "stand_in.py"), json.dumps({"what": what}), str(answer), str(tmp_path)]

    monkeypatch.setattr(gpu_items, "command_of", command)
    made = tmp_path / "made.txt"

    def go(*arguments: str) -> list[str]:
        made.write_text("")
        on_gpu.main(["--folder", str(tmp_path / "work"), "--results", str(tmp_path / "gpu.json"), *arguments])
        return made.read_text().split()[1:]

    return go


def results(folder) -> dict:
    return json.loads((folder / "gpu.json").read_text())


def test_the_plan_fits_into_25_minutes():
    """All items that are not extra, models and compiling included, each in a call of nine minutes; names are unique."""
    planned, build = [item for item in gpu_plan.ITEMS if not item.extra], sum(gpu_plan.BUILD_SECONDS.values())
    assert {name for item in planned for name in item.models} == gpu_plan.BUILD_SECONDS.keys()
    assert sum(item.seconds for item in planned) + build <= 25 * 60
    assert max(item.seconds for item in gpu_plan.ITEMS) + build < 9 * 60 - on_gpu.SLACK_SEC
    assert len(set(gpu_plan.NAMES)) == len(gpu_plan.NAMES)
    assert {item.what for item in gpu_plan.ITEMS} == gpu_items.WORK.keys() - {"circumstances"}


def test_a_second_call_does_nothing(call, tmp_path):
    assert call() == ["matmul", "tests"]
    assert call() == []
    assert call("--again", "tests") == ["tests"]
    assert results(tmp_path)["items"].keys() == set(TWO)
    assert "2.00 TFLOP/s" in (tmp_path / "gpu.md").read_text()


def test_one_that_fails_is_recorded_and_the_others_run(call, tmp_path, monkeypatch):
    """With its message, which the page has, too; it is made again only if it is named."""
    monkeypatch.setenv("FAIL", "1")
    assert call() == ["matmul", "tests"]
    assert results(tmp_path)["items"]["matmul"]["failed"] == "MemoryError: CUDA out of memory"
    assert "matmul failed: `MemoryError: CUDA out of memory`" in (tmp_path / "gpu.md").read_text()
    monkeypatch.delenv("FAIL")
    assert call() == []
    assert call("--again", "matmul") == ["matmul"]
    assert "failed" not in results(tmp_path)["items"]["matmul"]


def test_nothing_is_begun_that_does_not_fit(call, tmp_path, monkeypatch):
    """What would take a call of its own waits for the next one, if another item came first."""
    monkeypatch.setattr(on_gpu, "ITEMS", [gpu_plan.Item("matmul", "matmul", 5.0), gpu_plan.Item("tests", "tests", 400.0)])
    monkeypatch.setattr(on_gpu, "SLACK_SEC", 0.0)
    assert call("--minutes", "0.6") == ["matmul"]  # 400 s become the whole call, of which the first item took a part
    assert list(results(tmp_path)["items"]) == ["matmul"]


def test_a_hang_is_ended(call, tmp_path, monkeypatch):
    """At the end of the call it counts as stopped; if the whole call was its own, as failed. Its process is gone."""
    monkeypatch.setenv("SLEEP", "100")
    path, hanging = tmp_path / "gpu.json", gpu_plan.Item("tests", "tests", 5.0)
    (tmp_path / "work").mkdir()
    for began, seconds, kind in ((time.monotonic() - 99.5, 100, "stopped"), (time.monotonic() + 0.5, 0.5, "items")):
        found = on_gpu.Results(path, {"items": {}, "stopped": {}, "versions": ""})
        on_gpu.Call(gpu_items.Place(tmp_path / "work", True), found, "", began, seconds).make(hanging)
        assert {name: list(found.content[name]) for name in ("stopped", "items")} == {
            "stopped": [], "items": [], kind: ["tests"]
        }  # fmt: skip
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid.txt").read_text()), 0)
    assert results(tmp_path)["items"]["tests"]["failed"].startswith("stopped at its limit")


def test_what_is_compiled_waits_for_the_compiler(call, monkeypatch):
    """All networks are compiled at once by one item, which may wait for the next call; one that is named does not wait."""
    compiled = gpu_plan.Item("network-sd14-blocks", "matmul", 5.0, compiled=("sd14", "blocks"))
    monkeypatch.setattr(on_gpu, "ITEMS", [compiled, gpu_plan.Item("compile", "compile", 5.0)])
    assert call() == ["compile"]
    assert call() == ["matmul"]
    assert call("--again", "network-sd14-blocks") == ["matmul"]


def test_results_of_two_cards_are_not_mixed(call, tmp_path):
    call()
    content = results(tmp_path)
    (tmp_path / "gpu.json").write_text(json.dumps(content | {"hardware": "another card"}))
    with pytest.raises(SystemExit, match="another card"):
        call("--again", "tests")


def test_last_words():
    """The error that ended a process, not what was printed after it."""
    assert (
        gpu_items.last_words("a\ntorch.OutOfMemoryError: no room\n[W1129 cleaning up]\n")
        == "torch.OutOfMemoryError: no room"
    )
    assert gpu_items.last_words("\n") == "it said nothing"


def row(kind: str, way: str, at_once: int, seconds: float) -> dict:
    found = {"kind": kind, "compiled": way, "at_once": at_once, "seconds": seconds, "first_seconds": 9.0}
    return found | {"peak_bytes": 2**30} | ({"flops": 10**12} if way == "no" else {})


def test_the_page_has_rates_and_their_share_of_the_peak():
    """40 evaluations of 1 TFLOP in 0.2 s are 200 TFLOP/s, half of a peak of 400."""
    rows = {
        way: [row("evaluation", way, 10, 0.1), row("evaluation", way, 40, seconds), row("transition", way, 16, 0.1)]
        for way, seconds in {"no": 0.4, "blocks": 0.2}.items()
    }
    items = {f"network-sd14-{way}": {"date": "2027-01-01", "found": {"rows": some}} for way, some in rows.items()}
    items["network-sd14-blocks"]["found"]["warm"] = True
    items["network-sd14-whole"] = {"date": "2027-01-02", "found": {"rows": [row("evaluation", "whole", 40, 0.8)]}}
    items["matmul"] = {"date": "2027-01-02", "found": {"matmul_tflops": 400.0}}
    items["compile"] = {
        "date": "2027-01-02",
        "found": {"first_seconds": {"sd14 blocks": {"evaluation 40": 30.0, "transition 16": 70.0}}},
    }
    page = gpu_report.markdown({"items": items, "hardware": "a card", "versions": "torch 2"})
    assert "2027-01-01 to 2027-01-02: a card; torch 2." in page
    assert "| not compiled | 100 | 100 (25.0 %) | 160 | 160 (40.0 %) | 1.00, 1.00 |  |  |" in page
    assert "| block by block, `compile=True` | 200 | 200 (50.0 %) | 160 | 160 (40.0 %) | 1.00, 1.00 | 100 | 18.0 |" in page
    assert "| as a whole | 50.0 | 50.0 (12.5 %) | did not fit |  | 1.00, - | 9.00 alone |  |" in page
    assert "| 10 evaluations | not compiled | 100 | 100 |" in page
    assert "| evaluations | 50.0 % of the peak | not compiled 25.0 %; block by block, `compile=True` 50.0 %;" in page
    assert "not measured yet: stage-sd14," in page


def test_the_page_compares_stages_with_the_targets():
    """A stage of a part of the images counts as a whole one: start-up once, the rest by images and transitions."""
    seconds = {"sample": {"sample": 10.0}, "select": {"score": 2.0}, "train": {"train": 20.0}}
    ours = {"wall": dict.fromkeys(seconds, 20.0), "seconds": seconds, "num_images": 160, "num_transitions": 1000}
    ours |= {"device_bytes": {"train": 2**31}}
    peers = ours | {"wall": dict.fromkeys(seconds, 40.0), "seconds": seconds | {"train": {"train": 80.0}}, "num_images": 40}
    runs = {"stage-sd14": ours, "stage-sd14-peers": peers}
    items = {name: {"date": "2027-01-01", "found": {"run": run, "batch_sizes": {}}} for name, run in runs.items()}
    page = gpu_report.markdown({"items": items, "hardware": "a card", "versions": "torch 2"})
    # 28 s of start-up, 8 times 32 s; the peers 28 s, 32 times 12 s, 8 times 80 s
    assert "| stage, ours | at most 300 s | 284 s |" in page
    assert "| stage, peers / ours | 4× | 3.70× |" in page
    assert "| `sd14` |  |  | 2.00 |  |  |" in page


@pytest.fixture
def in_this_process(monkeypatch, new_accelerator):
    """Items, the scripts of their stages and what they build have no processes of their own, so imports are made once."""

    def script(arguments: list[str]) -> stage.Ended:
        new_accelerator()
        first, *others = map(str, arguments)
        argv = others if first == "-m" else [first, *others]
        by_name = runpy.run_module if first == "-m" else runpy.run_path
        ended = conftest.call(ROOT, argv, lambda: by_name(argv[0], run_name="__main__"))
        assert ended.code == 0, ended.stderr
        return stage.Ended(ended.seconds, 0, 0)

    def item(what: str, arguments: dict, place: gpu_items.Place, name: str, limit: float) -> dict:
        new_accelerator()
        with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(), torch.compiler.set_stance("force_eager"):
            for model in (StableDiffusion, SDXL, SD3):
                patch.setattr(model, "compiled", model.compiled)
            patch.setitem(stage.MATMUL_SIZE, "cpu", 256)
            return json.loads(json.dumps(gpu_items.WORK[what](place, **arguments)))

    monkeypatch.setattr(on_gpu, "run_apart", item)
    monkeypatch.setattr(gpu_items, "compile_one", lambda place, *pair: gpu_items.network(place, *pair, first_only=True))
    monkeypatch.setattr(stage, "elsewhere", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(stage, "run_process", script)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_all_items(tmp_path, in_this_process):
    """Every item, those beyond the 25 minutes, too, on tiny models, in one process, the compiler replaced by nothing."""
    arguments = ["--quick", "--folder", str(tmp_path), "--results", str(tmp_path / "gpu.json")]
    on_gpu.main(arguments)
    on_gpu.main([*arguments, "--only", *EXTRA])
    check_all(tmp_path, gpu_plan.NAMES)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_items_for_real(tmp_path):
    """By the command, in processes of their own; killed within an item, the command goes on with it."""
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--quick", "--folder", str(tmp_path)]
    command += ["--results", str(tmp_path / "gpu.json")]
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1"}
    first = subprocess.Popen(command, cwd=ROOT, env=environment)
    while not (tmp_path / "gpu.json").is_file():
        time.sleep(0.2)
    time.sleep(2)  # within the second item
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 128 + signal.SIGTERM
    assert list(results(tmp_path)["items"]) == ["matmul"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    check_all(tmp_path, [name for name in gpu_plan.NAMES if name not in EXTRA])


def check_all(folder: Path, names: Sequence[str]) -> None:
    """All of these items were made, none failed, and the page has them."""
    items, page = results(folder)["items"], (folder / "gpu.md").read_text()
    assert {name: entry["failed"] for name, entry in items.items() if "failed" in entry} == {}
    assert set(items) == set(names)
    for title in ("Stable Diffusion v1.4", "SDXL", "Stable Diffusion 3.5", "end to end", "nft", "Peak memory", "Tests"):
        assert title in page
    assert "## Not there" not in page
