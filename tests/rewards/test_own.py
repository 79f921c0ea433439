"""Rewards of the user's own: a function of any module, what it returns, and what it raises."""

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    assert_refused,
    experiment,
    judged,
    ran,
    refuse,
    run_script,
    snapshot,
    stage_of,
    update_of,
)
from scored import BATCH, NUM_IMAGES, REDNESS, pixels, redness, scores

from b2diffurl.rewards import own


def test_a_function_that_returns_too_few_scores(begin, module):
    """Both numbers and the batch are told; nothing on disk has changed."""
    mine = module(REDNESS + "def short(images, prompts):\n    return redness(images, prompts)[1:]\n")
    folder, settings = begin({"reward.name": f"{mine}:short"})
    refuse(folder, "select", settings, r"shape \(3,\) for 4 images", f"reward {mine}:short, batch 0: images 0 to 3 of ")


def test_a_function_that_returns_nan(begin, sampled, module):
    """The run stops with the very ids, which scores.jsonl has as null; nothing that was there has changed."""
    limit = float(np.median([redness(image) for image in pixels(sampled)]))
    mine = module(REDNESS + f"def bad(images, prompts):\n    values = redness(images, prompts)\n"
                  f"    return values.where(values < {limit}, float('nan'))\n")  # fmt: skip
    bad = [n for n, image in enumerate(pixels(sampled)) if redness(image) >= limit]
    assert 0 < len(bad) < NUM_IMAGES
    folder, settings = begin({"reward.name": f"{mine}:bad"})
    before = snapshot(folder)
    ended = run_script(folder, "select", settings)
    assert_refused(ended, f"reward {mine}:bad is not finite for images {re.escape(str(bad))} of .*scores.jsonl")
    after = snapshot(folder)
    assert {name: after[name] for name in before} == before
    assert not stage_of(folder).finished("select")
    assert [n for n, row in enumerate(scores(folder)) if row["reward"] is None] == bad


def test_a_function_that_raises(begin, module):
    """Its own traceback is shown, with the batch and its images; the exit code is not 0 and nothing on disk has changed."""
    mine = module(
        "import torch\ncalls = []\n"
        "def fails(images, prompts):\n    calls.append(1)\n"
        "    return torch.zeros(len(prompts)) + 1 // (3 - len(calls))  # the third batch\n"
    )
    folder, settings = begin({"reward.name": f"{mine}:fails"})
    before = snapshot(folder)
    ended = run_script(folder, "select", settings)
    assert ended.code not in (0, None)
    assert "# the third batch" in ended.stderr
    assert "ZeroDivisionError" in ended.stderr
    last = ended.stderr[ended.stderr.rindex("RuntimeError") :]
    assert re.search(f"reward {mine}:fails raised ZeroDivisionError", last)
    assert re.search(f"reward {mine}:fails, batch 2: images 8 to 11 of .*images", last)
    assert snapshot(folder) == before


def test_the_readmes_reward_runs(begin, tmp_path, monkeypatch):
    """The function in README works in a module of the name given there; the scores are what it returns."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    block = next(block for block in blocks if "def " in block and "images" in block)
    source = re.search(r"^def (?:.+\n)+", block, re.M)[0]  # without the run of it, which takes minutes
    name, function = re.search(r"Reward=(\w+):(\w+)", text).groups()
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder, settings = begin({"reward.name": f"{name}:{function}"})
    sys.modules.pop(name, None)  # another test's module of that name
    try:
        ran(folder, "select", settings)
    finally:
        sys.modules.pop(name, None)
    space: dict = {}
    exec(source, space)
    rows = scores(folder)
    result = space[function](torch.from_numpy(np.stack(pixels(folder))), [row["prompt"] for row in rows])
    expected = (result[0] if isinstance(result, tuple) else result).float().tolist()
    assert [row["reward"] for row in rows] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(set(expected)) > 1


# ---- what a reward's parts may be ----


PARTED = """
import torch

calls = []

def some(images, prompts):
    calls.append(len(prompts))
    late = {"late": images.float().mean((1, 2, 3)), "said": list(prompts)}
    parts = late if len(calls) > 1 else {"holed": images[:, 0, 0, 0] / 0}
    return images.float().mean((1, 2, 3)), parts
"""


@pytest.mark.usefixtures("no_pictures")
def test_parts_that_some_batches_lack(begin, module):
    """A part that only later batches have stands beside their images, and null or nothing beside the others; parts that are
    not finite are null; means are of what there is. run_eval.py takes the same parts."""
    mine = module(PARTED)
    folder, settings = begin({"reward.name": f"{mine}:some"})
    ran(folder, "select", settings)
    parts = [row["parts"] for row in scores(folder)]
    late = [row["reward"] for row in scores(folder)][BATCH:]
    assert [part["late"] for part in parts] == [None] * BATCH + late
    assert [part["said"] for part in parts] == [""] * BATCH + [row["prompt"] for row in scores(folder)[BATCH:]]
    assert {part["holed"] for part in parts} == {None}
    (metrics,) = map(json.loads, stage_of(folder).metrics("select").read_text().splitlines())
    assert metrics["late_mean"] == pytest.approx(
        np.mean(late), rel=1e-6
    )  # of the images alone, not of what pads the last batch
    assert "holed_mean" not in metrics
    sys.modules[mine].calls.clear()
    result = judged(folder, settings, "--checkpoint=base", "--sampler=training")
    assert result[f"{mine}:some/late"] > 0
    assert result[f"{mine}:some/holed"] is None


@pytest.mark.parametrize("source", ["import json\njson.loads('{')\n", "import no_such_package\n"])
def test_a_module_that_raises_when_imported(empty, overrides, module, source):
    """Its own traceback is shown, not advice on where to keep it."""
    mine = module(source)
    ended = run_script(empty, "sample", overrides | {"reward.name": f"{mine}:reward"})
    assert ended.code == 1
    assert f"reward {mine}:reward: importing {mine} raised" in ended.stderr
    assert re.search(rf'{mine}.py", line \d', ended.stderr)
    assert not experiment(empty).exists()


# ---- which files it is made of ----


FILES = {
    "mine/__init__.py": "from .scale import FACTOR\n",
    "mine/scale.py": "FACTOR = 1\n",
    "mine/score.py": "import torch\nfrom . import scale\nfrom .deep.inner import *\ndef score(i, p):\n    import lazy\n",
    "mine/deep/inner.py": "from ..other import f\nfrom mine import scale\n",
    "mine/other.py": "import b2diffurl.start\n",
    "lazy.py": "import mine.score\n",
    "unused.py": "",
    "torch.py": "",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, source in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    return tmp_path


def names(folder: Path, name: str, module: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in own.modules_beside(folder / name, module)}


def test_a_reward_is_made_of_all_modules_beside_it_that_it_imports(folder):
    """Relative and absolute, within functions, in circles, from a folder without __init__.py; the package itself, too."""
    made_of = names(folder, "mine/score.py", "mine.score")
    assert made_of == {name for name in FILES if name not in ("unused.py",)}
    assert names(folder, "mine/__init__.py", "mine") == {"mine/__init__.py", "mine/scale.py"}
    assert names(folder, "unused.py", "unused") == {"unused.py"}


@pytest.mark.parametrize(
    "made", ["@plain\ndef score(i, p): pass\n", "score = functools.partial(plain)\n", "from {h} import plain as score\n"]
)
def test_the_module_that_is_named_counts_whoever_made_the_function(tmp_path, module, monkeypatch, made):
    """A decorator's function, a partial one and one that is only imported: the named module and the helper both count."""
    helper = f"{module('')}_helper"
    (tmp_path / f"{helper}.py").write_text("def plain(f=None, p=None):\n    return lambda i, p: f\n")
    name = module(f"import functools\nfrom {helper} import plain\n{made.format(h=helper)}")
    sys.modules.pop(name, None)
    assert own.files(f"{name}:score", {}) == [tmp_path / f"{name}.py", tmp_path / f"{helper}.py"]
    monkeypatch.delitem(sys.modules, helper, raising=False)


def test_of_an_installed_package_only_its_own_modules_count(folder):
    installed = folder.rename(folder.with_name("site-packages"))
    made_of = names(installed, "mine/score.py", "mine.score")
    assert made_of == {name for name in FILES if name.startswith("mine/")}


def test_a_module_that_is_no_source_is_a_file_of_its_own(tmp_path):
    (tmp_path / "fast.so").write_bytes(b"\x7fELF")
    assert own.modules_beside(tmp_path / "fast.so", "fast") == [tmp_path / "fast.so"]


# ---- what a reward does to the process ----


MEDDLING = """
import logging
import os
import random
import signal
import sys

import numpy as np
import torch


def meddle():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    os.chdir("/")
    os.environ["HOME"] = os.environ["TMPDIR"] = "/nowhere"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.disable()
    sys.stdout = open(os.devnull, "w")


meddle()


def meddling(images, prompts):
    assert (torch.get_default_dtype(), os.getcwd()) == (torch.float64, "/")
    meddle()
    mean = redness(images, prompts)
    images.zero_()
    prompts.clear()
    return mean
"""


def test_a_function_that_changes_the_process(begin, module):
    """Seeds, types, threads, directory, signals, log: the run samples, selects and trains as with a function that does not,
    and says as much; where the module looks, it finds what it has set."""
    mine, learned, said = module(REDNESS + MEDDLING), [], []
    for function in ("redness", "meddling"):
        folder, settings = begin({"reward.name": f"{mine}:{function}", "keep.samples": False})
        said.append("".join(ran(folder, verb, settings) for verb in ("select", "train")))
        learned.append((stage_of(folder).selection.read_bytes(), update_of(folder), os.listdir(folder)))
        shutil.rmtree(folder)
    assert learned[0][0] == learned[1][0]
    assert torch.equal(learned[0][1], learned[1][1])
    assert learned[0][2] == learned[1][2]
    assert len(said[0].splitlines()) == len(said[1].splitlines())


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("sys.exit(0)", r"raised SystemExit\(0\)"),
        ("raise SystemExit", r"raised SystemExit\(\)"),
        ("raise KeyboardInterrupt", r"raised KeyboardInterrupt\(\)"),
    ],
)
@pytest.mark.parametrize("when", ["imported", "called"])
def test_a_function_that_would_end_the_run(begin, module, when, does, said):
    """Exit code 0 is for work that is done: the run stops with the reward's name, and selecting is not finished."""
    mine = module(f"import sys\ndef ends(images, prompts):\n    {does}\n" + (does if when == "imported" else ""))
    folder, settings = begin({"reward.name": f"{mine}:ends"})
    ended = run_script(folder, "select", settings)
    assert ended.code == 1
    assert re.search(f"RuntimeError: reward {mine}:ends.* {said}", ended.stderr)
    assert not stage_of(folder).finished("select")


def test_a_signal_that_comes_while_a_reward_works(begin, module):
    """It stops the run as at any other moment: no bug of the reward's."""
    kill = "    os.kill(os.getpid(), signal.SIGTERM)\n    return [0 for _ in prompts]\n"
    mine = module(f"import os, signal\ndef slow(images, prompts):\n{kill}")
    folder, settings = begin({"reward.name": f"{mine}:slow"})
    ended = run_script(folder, "select", settings)
    assert (ended.code, "Traceback" in ended.stderr) == (128 + 15, False)


def test_a_function_that_closes_stdout(module, monkeypatch):
    """The run stops with the reward's name: its log could not be read any more."""
    reward = own.load(
        module("import sys\ndef closing(images, prompts):\n    sys.stdout.close()\n") + ":closing", {}, None, None
    )
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.StringIO())
        with pytest.raises(RuntimeError, match=r"reward .*:closing has closed stdout"):
            reward(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), ["a cat"])
