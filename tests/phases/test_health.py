"""Numbers that go wrong: what is not finite stops a phase and leaves its evidence until the phase is mended; what looks like
collapse warns, in log, manifest and report.

18 images of 6 groups, K = 3 siblings
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from conftest import ROOT, assert_same, experiment, flags, make_config, run_script, run_stage, settings_at
from PIL import Image
from safetensors.torch import load_file, save_file

from b2diffurl.configuration.keys import KEYS, Key
from b2diffurl.configuration.limits import Number
from b2diffurl.experiment.metrics import read_events
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.experiment.stage_table import stage_list, updates_before
from b2diffurl.models.stable_diffusion import StableDiffusion
from b2diffurl.objectives import OBJECTIVES
from b2diffurl.phases import health
from b2diffurl.phases.health import MIN_UPDATES, WINDOW, UpdateWatch, stage_warnings
from b2diffurl.phases.trainer import Trainer
from b2diffurl.reporting import forecast
from b2diffurl.reporting.page import warned_kinds, write_report
from b2diffurl.runtime import files

REWARD = "rewards_of_test_watch"


def stage_of(folder: Path, index: int = 0) -> Stage:
    return Stage(experiment(folder), index)


def refused(folder: Path, verb: str, settings: dict) -> tuple[str, dict, dict]:
    """The message of a script that must stop with exit code 2, and the metadata and tensors of the evidence it names."""
    ended = run_script(folder, verb, settings)
    assert ended.code == 2, ended.stdout + ended.stderr
    message, hint = ended.stderr.splitlines()
    assert "run the same command again" in hint
    assert not any(stage_of(folder, index).finished(verb) for index in (0, 1) if stage_of(folder, index).debug.exists())
    path = folder / re.search(r"what they came from is in (\S+)", message)[1]
    assert path.parent.name == "debug"
    return message, files.read_metadata(path), load_file(path)


def done(folder: Path, verb: str, settings: dict) -> str:
    ended = run_script(folder, verb, settings)
    assert ended.code == 0, ended.stderr
    return ended.stdout


# ---- not finite ----


@pytest.fixture
def reward(tmp_path, monkeypatch):
    """write(source): the body of a reward of the name that `settings` has."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body: str) -> None:
        source = f"def redness(images, prompts):\n    values = images[..., 0].float().mean((1, 2)) / 255\n{body}"
        (tmp_path / f"{REWARD}.py").write_text(source)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        sys.modules.pop(REWARD, None)

    yield write
    sys.modules.pop(REWARD, None)


def test_a_reward_of_nan_is_kept_and_mended(overrides, reward, tmp_path):
    """NaN for image 5 alone: its id, prompt, reward and parts are in debug/, nothing is selected; when the reward is mended
    the same command leaves what a run leaves that never failed."""
    settings = overrides | {"reward.name": f"{REWARD}:redness"}
    sound = "    return values, {'half': values / 2, 'note': ['seen'] * len(images)}\n"
    reward(sound)
    broken, healthy = tmp_path / "broken", tmp_path / "healthy"
    broken.mkdir()
    run_stage(broken, settings, verbs=["sample"])
    shutil.copytree(broken, healthy)
    red = np.asarray(Image.open(stage_of(broken).image(5)))[..., 0].astype(int)
    reward(  # by where its red is, for two images may have as much of it
        f"    values[images[..., 0].flatten(1).long().cumsum(1).sum(1) == {red.cumsum().sum()}] = float('nan')\n{sound}"
    )
    message, facts, tensors = refused(broken, "select", settings)
    assert "redness is not finite for images [5] of" in message
    prompts = json.loads(stage_of(broken).prompts.read_text())
    assert facts == {"images": [5], "prompts": [prompts[5]], "texts": {f"{REWARD}:redness/note": ["seen"]}}
    assert tensors.keys() == {f"{REWARD}:redness", f"{REWARD}:redness/half", "(weighted sum)"}
    assert all(tensor.shape == (1,) and tensor.isnan().all() for tensor in tensors.values())
    assert not stage_of(broken).selection.exists()
    reward(sound)
    for folder in (broken, healthy):
        done(folder, "select", settings)
    assert_same(broken, healthy)
    assert not stage_of(broken).debug.exists()


def test_a_lora_with_an_infinite_weight_is_kept_and_mended(finished, overrides, tmp_path):
    """One weight of inf: the first batch's images are named, and their states kept; with the file mended the same command
    leaves what a run leaves that never failed."""
    sound = stage_of(finished, 1).checkpoints()[-1] / LORA_FILE
    weights = load_file(sound)
    name = next(name for name in weights if "lora_B" in name)
    lora, broken, healthy = tmp_path / LORA_FILE, tmp_path / "broken", tmp_path / "healthy"
    settings = overrides | {"resume_from": str(lora)}
    save_file(weights | {name: weights[name].index_fill(0, torch.tensor([0]), torch.inf)}, lora)
    for folder in (broken, healthy):
        folder.mkdir()
    message, facts, tensors = refused(broken, "sample", settings)
    assert "batch_00000.safetensors: log-probabilities of images [0, 1, 2, 3, 4, 5], groups [0, 1], are not" in message
    assert (facts["images"], facts["groups"], len(facts["prompts"])) == ([*range(6)], [0, 1], 2)
    assert tensors["log_probs"].shape == (2, 3, 2) and not tensors["log_probs"].isfinite().any()
    assert tensors["latents"].shape == (2, 3, 3, 4, 8, 8)
    assert [path.name for path in stage_of(broken).folder.iterdir()] == ["debug"]
    shutil.copy(sound, lora)
    for folder in (broken, healthy):
        done(folder, "sample", settings)
    assert_same(broken, healthy)


def test_images_that_overflow_are_kept_and_mended(overrides, models, tmp_path):
    """A decoder with an infinite weight: the batch's images are named and their latents kept. With the decoder's file mended
    the same command goes on."""
    base = shutil.copytree(models / "sd", tmp_path / "sd")
    path = base / "vae" / "diffusion_pytorch_model.safetensors"
    sound = path.read_bytes()
    save_file(load_file(path) | {"decoder.conv_out.bias": torch.full((3,), torch.inf)}, path)
    settings = overrides | {"pretrained.model": str(base)}
    message, facts, tensors = refused(tmp_path, "sample", settings)
    assert "among images [0, 1, 2, 3, 4, 5] the VAE decoded to non-finite values; use --config.mixed_precision" in message
    assert facts["images"] == [*range(6)]
    assert tensors["latents"].shape == (6, 4, 8, 8)
    assert tensors["latents"].isfinite().all()
    path.write_bytes(sound)
    done(tmp_path, "sample", settings)
    assert not stage_of(tmp_path).debug.exists()


def test_advantages_that_overflow(overrides, tmp_path, monkeypatch):
    """A weight of 1e38 for good images: losses are finite, the gradient is not, and no parameter is stepped; one of 3.3e38:
    the advantage itself is beyond a float32."""
    monkeypatch.setitem(KEYS, "train.beta1", Key(Number("[0, 1e39]")))
    for weight, verb, said in ((1e38, "train", "the gradient is not finite, though the losses of images"),
                               (3.3e38, "select", "advantages of images")):  # fmt: skip
        folder = tmp_path / f"{weight:g}"
        settings = overrides | {"train.beta1": weight}
        folder.mkdir()
        run_stage(folder, settings, verbs=["sample"])
        if verb == "train":
            done(folder, "select", settings)
        message, facts, tensors = refused(folder, verb, settings)
        assert said in message
        assert set(facts["images"]) <= set(range(18))
        assert facts["images"]
        assert not stage_of(folder).checkpoints()
        if verb == "select":
            assert tensors["advantages"].isinf().sum() == len(facts["images"])
            continue
        rows = json.loads(stage_of(folder).selection.read_text())
        assert set(facts["images"]) <= {row["id"] for row in rows}
        assert (facts["update"], facts["grad_norm"], facts["timesteps"]) == (0, "inf", [251, 1])
        assert tensors["losses"].shape == (len(facts["images"]), 2)
        assert tensors["losses"].isfinite().all()
        assert tensors["losses"].abs().max() > 1e37
        gradients = {name: value for name, value in tensors.items() if name.startswith("gradient.")}
        assert gradients
        assert max(value.abs().max() for value in gradients.values()) > 1e18  # whose square is beyond a float32


@pytest.fixture
def harm(monkeypatch) -> Callable[[Callable], None]:
    """harm(how): from now on the loss of the reference objective is how(num_updates, loss, metrics)."""
    sound, update, running = OBJECTIVES["ddpo"], Trainer.update, []

    def noted(self, *given):
        running[:] = [self]
        return update(self, *given)

    def begin(how: Callable) -> None:
        @wraps(sound.loss)
        def loss(*tensors, **options):
            return how(running[0].num_updates, *sound.loss(*tensors, **options))

        monkeypatch.setattr(Trainer, "update", noted)
        monkeypatch.setitem(OBJECTIVES, "ddpo", replace(sound, loss=loss))

    return begin


@pytest.mark.parametrize("which", ["loss", "log_ratio"])
def test_what_overflows_in_training_is_kept_and_mended(workplace, finished, overrides, harm, monkeypatch, which):
    """In the second epoch the loss of the first image of each micro-batch is inf; or its log-ratio, of which clipping leaves
    no trace in loss and gradient. Those images are named, with states and losses. The same command goes on from the first
    epoch and ends in the bits of a run that never failed."""
    stage = stage_of(workplace, 1)
    bad = sum(event["epoch"] == 1 for event in read_events(stage.metrics("train"), "update"))
    for path in (stage.manifest_path("train"), stage.metrics("train")):
        path.unlink()
    shutil.rmtree(stage.folder / "checkpoints")

    def overflowing(num_updates, loss, metrics):
        factor = torch.where((torch.arange(len(loss)) == 0) & (num_updates == bad), torch.inf, 1.0)
        if which == "loss":
            return loss * factor, metrics
        return loss, metrics | {"log_ratio": metrics["log_ratio"].where(factor == 1, -torch.inf)}

    harm(overflowing)
    settings = overrides | {"run_name": "stage1"}
    message, facts, tensors = refused(workplace, "train", settings)
    assert f"stage1, update {bad}: the loss or log-probability of images {facts['images']} is not finite" in message
    assert [path.name for path in stage.checkpoints()] == ["checkpoint_1"]
    rows = [facts["images_of_losses"].index(image) for image in facts["images"]]
    assert 0 < len(rows) < len(facts["images_of_losses"])
    found = tensors["losses" if which == "loss" else "log_ratios"]
    assert (~found.isfinite()).any(1).nonzero().flatten().tolist() == rows
    assert tensors["latents"].shape == (len(rows), 4, 4, 8, 8)
    gradients = [value for name, value in tensors.items() if name.startswith("gradient.")]
    assert gradients
    assert all(value.isfinite().all() for value in gradients) == (which == "log_ratio")
    monkeypatch.undo()
    done(workplace, "train", settings)
    assert_same(workplace, finished)


ONE_RANK_OVERFLOWS = """
import os, runpy, sys, torch
from dataclasses import replace
from functools import wraps
from b2diffurl.objectives import OBJECTIVES
from b2diffurl.phases.trainer import Trainer

sound, update, running = OBJECTIVES["ddpo"], Trainer.update, []

def noted(self, *given):
    running[:] = [self]
    return update(self, *given)

@wraps(sound.loss)
def loss(*tensors, **options):
    found, metrics = sound.loss(*tensors, **options)
    return found * (torch.inf if (os.environ["RANK"], running[0].num_updates) == ("1", 1) else 1.0), metrics

Trainer.update, OBJECTIVES["ddpo"] = noted, replace(sound, loss=loss)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_all_processes_stop_where_one_meets_what_is_not_finite(overrides, tmp_path):
    """Of two the second has a loss of inf: both know, name its images and end with code 2, the first if torchrun has not
    ended it by then."""
    run_stage(tmp_path, overrides, verbs=["sample", "select"])
    (tmp_path / "spy.py").write_text(ONE_RANK_OVERFLOWS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "spy.py"]
    script = [str(ROOT / "run_train.py"), f"--config={ROOT}/config/stage_process.py:sd14", *flags(overrides)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([*launch, *script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0
    found = {path.stem[-1]: files.read_metadata(path)["images"] for path in stage_of(tmp_path).debug.glob("*.safetensors")}
    assert f"stage0, update 1: the loss or log-probability of images {found['1']} is not finite" in ended.stderr
    assert set(re.findall(r"exitcode +: (-?\d+) ", ended.stderr)) <= {"2", "-15"}
    assert found.get("0", found["1"]) == found["1"]
    assert [path.name for path in stage_of(tmp_path).checkpoints()] == []


# ---- updates that are unusual ----


def update(norm: float | None = 1.0, ratio: float = 0.01, *, first: bool = False, steps: dict | None = None) -> dict:
    """One as metrics/train.jsonl has it; `steps` gives timesteps their mean |log-ratio|, `ratio` is the largest of one."""
    steps = steps or {1: ratio}
    kept = {"timesteps": list(steps), "log_ratio_per_step": list(steps.values())}
    return {"first": first, "grad_norm": norm, "max_abs_log_ratio": ratio} | kept


def said(earlier: list[dict], updates: list[dict]) -> list[tuple[int, str]]:
    """(number of the update, kind) of each warning when it is first given."""
    seeing = UpdateWatch(earlier, clip_range=0.1)
    return [(number, one["kind"]) for number, each in enumerate(updates) for one in seeing.see(each)]


def test_far_above_the_median_is_more_than_ten_times():
    """Of 1, ..., 9, 10, 11 the median is 6 (an update counts in its successors' medians); 60 is not far, 61 is."""
    usual = [update(float(norm)) for norm in range(1, 12)]
    assert said(usual, [update(60.0)]) == []
    assert said(usual, [update(61.0)]) == [(0, "Gradient norm")]
    assert said([], [*usual, update(60.0), update(61.0)]) == []  # by then the median is 6.5, and then 7
    assert said([], [*usual, update(60.0), update(61.0), update(71.0)]) == [(13, "Gradient norm")]
    seeing = UpdateWatch(usual, clip_range=0.1)
    assert [len(seeing.see(update(norm))) for norm in (61.0, 1.0, 100.0, 99.0)] == [1, 0, 0, 0]
    (warned,) = seeing.warnings()
    assert warned["what"] == "gradient norm up to 1e+02: 3 of 4 updates are above 10 times the median of those before, 6"


def test_a_median_needs_enough_updates_and_forgets_old_ones():
    assert said([update(1.0)] * (MIN_UPDATES - 1), [update(99.0)]) == []
    assert said([update(1.0)] * MIN_UPDATES, [update(99.0)]) == [(0, "Gradient norm")]
    assert said([update(1.0)] * 1000 + [update(10.0)] * WINDOW, [update(99.0)]) == []
    assert said([update(0.0)] * 50, [update(1.0)]) == []  # all was clipped away: nothing is usual


def test_log_ratios_are_compared_with_updates_that_trained_the_step_that_decides():
    """A stage's first update says nothing; what no clip range would bind is not far; and where an update takes some of the
    steps, one with the step of great leverage is compared with those that had it."""
    assert said([update(ratio=1e-6)] * 20, [update(ratio=9e-5)]) == []
    assert said([update(ratio=1e-4)] * 20, [update(ratio=1.1e-3)]) == [(0, "Log-ratio")]
    assert said([update(ratio=1e-9, first=True)] * 20, [update(ratio=0.9)]) == []
    quiet, loud = update(steps={751: 0.003, 1: 0.001}), update(steps={751: 0.003, 51: 0.1})
    assert said([quiet] * 12 + [loud] * 12, [loud]) == []
    assert said([quiet] * 12 + [loud] * 9, [loud]) == []
    assert said([quiet] * 12 + [loud] * 12, [update(steps={51: 1.1})]) == [(0, "Log-ratio")]
    assert said([loud] * 12, [update(ratio=99.0, steps={751: 0.003, 51: 0.9})]) == []  # one transition among hundreds


def test_a_first_ratio_has_its_own_bound():
    """The clip range; and it is no warning of a run that collapses."""
    assert said([], [update(ratio=0.09, first=True)]) == []
    assert said([], [update(ratio=0.11, first=True), update()]) == [(0, "First log-ratio")]


def test_updates_skipped_in_a_row_are_counted_across_stages():
    skipped = update(None)
    assert said([], [skipped] * 9 + [update()] + [skipped] * 9) == []
    assert said([], [*[skipped] * 12, update(), *[skipped] * 12]) == [(9, "Skipped updates")]
    assert said([update(), *[skipped] * 7], [skipped] * 5) == [(2, "Skipped updates")]
    assert said([skipped] * 20, [update()]) == []


def test_a_leap_in_training_warns(workplace, overrides, harm, monkeypatch):
    """A stage whose first update has a gradient a thousand times as large, and makes a step a thousand times as long, warns
    of both, once each in the log, and in its manifest; and so if it was interrupted after that. Usual is what the updates of
    the stage before were, here 4 of them."""
    assert [stage_of(workplace, index).manifest("train")["warnings"] for index in (0, 1)] == [[], []]
    monkeypatch.setattr(health, "MIN_UPDATES", 3)
    stage, step, settings = stage_of(workplace, 1), AcceleratedOptimizer.step, overrides | {"run_name": "stage1"}
    stage.manifest_path("train").unlink()
    shutil.rmtree(stage.folder / "checkpoints")
    leaps = [10.0]  # rates of the next steps

    def long_step(self, *given):
        for group in self.param_groups:
            group["lr"] = leaps.pop() if leaps else 1e-2
        return step(self, *given)

    monkeypatch.setattr(AcceleratedOptimizer, "step", long_step)
    harm(lambda number, loss, metrics: (loss * (1.0 if number else 1000.0), metrics))
    stdout = done(workplace, "train", settings)
    whole = stage.manifest("train")["warnings"]
    assert [one["kind"] for one in whole] == ["Gradient norm", "Log-ratio"]
    for name in ("gradient norm", r"mean \|log-ratio\| of a step"):
        assert len(re.findall(rf"stage1 train: {name} up to \S+: 1 of 1 updates are .* Try a new experiment", stdout)) == 1
    stage.manifest_path("train").unlink()
    shutil.rmtree(stage.checkpoint(2))
    assert "Try" not in done(workplace, "train", settings)
    assert stage.manifest("train")["warnings"] == whole


def test_updates_before_a_stage_are_the_latest_of_the_stages_before(finished):
    one = read_events(stage_of(finished).metrics("train"), "update")
    two = read_events(stage_of(finished, 1).metrics("train"), "update")
    assert updates_before(stage_of(finished, 2), WINDOW) == one + two
    assert updates_before(stage_of(finished, 2), len(two) + 1) == [one[-1], *two]
    assert updates_before(stage_of(finished, 0), WINDOW) == []


# ---- groups without a contrast ----


def group(flat: int = 0, twins: int = 0, groups: int = 100, *, mean: float = 1.0, std: float = 0.1) -> dict:
    counts = {"num_groups": groups, "num_flat_groups": flat, "num_twin_groups": twins}
    return counts | {"stage": 0, "reward_mean": mean, "reward_std": std}


def kinds(*given) -> list[str]:
    return [one["kind"] for one in stage_warnings(*given)]


def test_a_spread_of_rewards_that_is_gone_warns():
    """All groups at any time; nearly all if it was not so before. A sparse reward, whose groups mostly have none, may."""
    assert kinds([], group(99)) == []
    assert kinds([], group(100)) == ["Rewards of siblings"]
    assert kinds([group(50)] * 3, group(89)) == []
    assert kinds([group(50)] * 3, group(90)) == ["Rewards of siblings"]
    assert kinds([group(85)] * 3, group(95)) == []
    assert kinds([group(50), group(95), group(95)], group(95)) == []
    assert kinds([group(95)] * 3, group(100)) == ["Rewards of siblings"]


def test_a_reward_that_falls_warns():
    """By more than a standard deviation from the best stage; with 9 groups by more than two, which noise alone can make."""
    assert kinds([], group(std=0.0)) == []
    good, better = group(mean=0.2), group(mean=0.3) | {"stage": 1}
    assert kinds([good, better, good], group(mean=0.21)) == []
    (warned,) = stage_warnings([good, better, good], group(mean=0.19))
    assert warned["what"] == "mean reward 0.19, more than 1 standard deviation below that of stage 1, 0.3"
    assert kinds([better], group(mean=0.15, std=0.2)) == []
    assert kinds([better], group(mean=0.11, groups=9)) == []
    assert kinds([better], group(mean=0.09, groups=9)) == ["Mean reward"]
    assert kinds([group(mean=1.0, std=0.0)], group(mean=0.95, std=0.2)) == []
    assert kinds([group(mean=1.0, std=0.0)], group(100, mean=0.0, std=0.0)) == ["Mean reward", "Rewards of siblings"]


def test_identical_siblings_warn_beyond_a_few_groups():
    assert kinds([], group(0, 5)) == []
    assert kinds([], group(0, 6)) == ["Identical images"]
    assert kinds([], group(6, 6, 6)) == ["Rewards of siblings", "Identical images"]


def test_a_blank_model_warns_in_log_manifest_and_report(finished, overrides, monkeypatch, tmp_path):
    """A model that draws nothing any more: the same picture in every group, the same reward, nothing selected."""
    work = tmp_path / "work"
    shutil.copytree(finished, work)
    run = overrides | {"stage_cnt": 3, "run_name": "stage2"}
    blank = torch.zeros(64, 64, 3, dtype=torch.uint8)
    monkeypatch.setattr(StableDiffusion, "decode", lambda self, latents: blank.expand(len(latents), -1, -1, -1))
    for index in (0, 1):
        selected = stage_of(work, index).manifest("select")
        assert (selected["num_flat_groups"], selected["num_twin_groups"], selected["warnings"]) == (0, 0, [])
    stdout = "".join(done(work, verb, run) for verb in ("sample", "select", "train"))
    selected = stage_of(work, 2).manifest("select")
    assert [one["what"] for one in selected["warnings"]] == [
        "rewards are the same for all siblings in 6 of 6 groups, usual before: 0%",
        "6 of 6 groups have siblings whose images are identical",
    ]
    assert stdout.count("stage2 select: rewards are the same for all siblings in 6 of 6 groups") == 1
    assert re.search(r"stage2 done: 3 of 3 stages, .*, warnings in stage 2 \(see report.html\)", stdout)
    assert forecast.plan_line(settings_at(make_config(run), experiment(work))).endswith(
        ", warnings in stage 2 (see report.html)"
    )
    page = write_report(experiment(work)).read_text()
    assert page.index("<h2>Warnings</h2>") < page.index("<h2>Curves</h2>")
    section = page[page.index("<h2>Warnings</h2>") : page.index("</section>")]
    for words in (*(one["what"] for one in selected["warnings"]), "Try looking at", "in stage 2"):
        assert words in section


def test_the_report_shows_the_first_warnings_of_a_kind():
    rows = [{"stage": n, "kind": "A" if n < 7 else "B", "what": f"{n}", "advice": "rest"} for n in (1, 2, 4, 5, 6, 9)]
    a, b = warned_kinds(rows)
    assert (a["kind"], a["stages"], a["more"], [row["what"] for row in a["first"]]) == (
        *("A", "stages 1-2, 4-6", "stages 5-6"),
        ["1", "2", "4"],
    )
    assert (b["stages"], b["more"]) == ("stage 9", "")
    assert stage_list([3, 3, 4]) == "stages 3-4"
