"""train.ema through all phases: what is averaged, kept, resumed, judged and exported."""

import contextlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from conftest import PROMPTS, assert_same, experiment, flip, make_config, ran, run_evaluation, run_stage, snapshot, stage_of
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from b2diffurl.configuration.settings import read_settings
from b2diffurl.experiment.evaluation_table import evaluation_rows
from b2diffurl.experiment.folder import checkpoint_name, resolve_checkpoint
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.export import export
from b2diffurl.phases.trainer import Trainer
from b2diffurl.reporting import dry_run, forecast
from b2diffurl.runtime.files import read_json, read_json_lines

DECAY = 0.3  # that of the fourth update on; of those before less, by warm-up
EMA = {"train.ema": DECAY}


@dataclass(frozen=True)
class Averaged:
    folder: Path  # both stages of the tiny experiment are finished. Not to be changed
    loras: list[list[dict[str, Tensor]]]  # of each stage, after each update


@pytest.fixture(scope="module")
def averaged(overrides, tmp_path_factory) -> Averaged:
    folder, loras, update = tmp_path_factory.mktemp("averaged"), [], Trainer.update

    def noted(self, *given):
        report = update(self, *given)
        loras[-1].append({name: value.clone() for name, value in self.model.adapter_state().items()})
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", noted)
        for index in range(2):
            loras.append([])
            run_stage(folder, overrides | EMA, index)
    return Averaged(folder, loras)


@pytest.fixture
def copied(averaged, tmp_path) -> Path:
    """A copy of that folder to work on."""
    return shutil.copytree(averaged.folder, tmp_path / "copy")


def average_of(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "ema" / LORA_FILE)


# ---- training ----


def test_every_update_of_all_stages_is_averaged(averaged, models):
    """Both stages' averages are those of the recursion in float64, from the fresh LoRA on, in the LoRA's own file format;
    and each is far from the LoRA beside it, compared with rounding."""
    expected = {name: value.double() for name, value in tiny.load_model(models / "sd", seed=300).adapter_state().items()}
    count = 0
    for index, loras in enumerate(averaged.loras):
        for lora in loras:
            kept = min(DECAY, (count + 1) / (count + 10))
            expected = {name: kept * expected[name] + (1 - kept) * value.double() for name, value in lora.items()}
            count += 1
        checkpoint = stage_of(averaged.folder, index).checkpoints()[-1]
        found = average_of(checkpoint)
        assert found.keys() == load_file(checkpoint / LORA_FILE).keys()
        for name, value in found.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-8)
        assert any((value - loras[-1][name]).abs().max() > 1e-3 for name, value in found.items())
        assert read_json(checkpoint / "ema" / "state.json")["num_averaged"] == count
    assert count > 6


def test_an_average_changes_nothing_else(averaged, finished):
    """LoRAs, optimizers, images and scores have the bits of the run without one, which has no such folder."""
    with_it, without = snapshot(experiment(averaged.folder)), snapshot(experiment(finished))
    assert not [name for name in without if "ema" in name]
    differ = {name for name in with_it if with_it[name] != without.get(name)}
    untimed = {name for name in differ if not re.search(r"(config|state|sample|select|train)\.jsonl?$", name)}
    assert untimed == {f"stage{index}/checkpoints/checkpoint_{n}/ema/{LORA_FILE}" for index in (0, 1) for n in (1, 2)}


def lose(stage: Stage) -> None:
    shutil.rmtree(stage.checkpoint(2))


def damage(name: str, n: int):
    def do(stage: Stage) -> None:
        path = stage.checkpoint(n) / "ema" / name
        path.write_bytes(flip(path.read_bytes(), 8 * (path.stat().st_size // 2)))

    return do


def delete(name: str):
    def do(stage: Stage) -> None:
        (stage.checkpoint(2) / "ema" / name).unlink()

    return do


@pytest.mark.parametrize(
    "harm",
    [lose, damage(LORA_FILE, 1), damage(LORA_FILE, 2), damage("state.json", 2), delete(LORA_FILE), delete("state.json")],
    ids=["after an epoch", "first damaged", "last damaged", "record damaged", "last gone", "record gone"],
)
def test_a_training_that_was_stopped_ends_in_the_same_bits(averaged, copied, overrides, harm):
    """Stopped after an epoch; or its averages are damaged, which are then made again."""
    stage = stage_of(copied, 1)
    stage.manifest_path("train").unlink()
    harm(stage)
    run_stage(copied, overrides | EMA, 1, verbs=["train"])
    assert_same(copied, averaged.folder)


def test_a_damaged_average_of_a_finished_stage_is_refused(copied, overrides):
    """By whoever needs the stage, as a damaged LoRA is."""
    damage(LORA_FILE, 2)(stage_of(copied, 1))
    for name in ("last", "last/ema"):
        with pytest.raises(ValueError, match=r"ema/pytorch_lora_weights.* is not what the train phase wrote"):
            resolve_checkpoint(experiment(copied), name)


@pytest.mark.parametrize("start", ["a foreign LoRA", "a checkpoint", "an average"])
def test_a_run_from_elsewhere(averaged, overrides, tmp_path, start):
    """From a foreign LoRA, or an average, the average starts there; from a checkpoint with one it goes on. Here nothing is
    selected, so that what training began with is what it ends with."""
    checkpoint = stage_of(averaged.folder, 1).checkpoints()[-1]
    given = {"a checkpoint": checkpoint, "an average": checkpoint / "ema"}.get(start, tmp_path / "foreign.safetensors")
    if start == "a foreign LoRA":
        shutil.copy(checkpoint / LORA_FILE, given)
    nothing = {"selection.pos_threshold": 1e9, "selection.neg_threshold": -1e9, "resume_from": str(given)}
    run_stage(tmp_path, overrides | EMA | nothing)
    found = stage_of(tmp_path).checkpoints()[-1]
    lora, average = load_file(found / LORA_FILE), average_of(found)
    expected = average_of(checkpoint) if start != "a foreign LoRA" else load_file(checkpoint / LORA_FILE)
    assert all(torch.equal(average[name], value) for name, value in expected.items())
    assert all(torch.equal(lora[name], value) for name, value in expected.items()) == (start != "a checkpoint")
    counted = read_json(found / "ema" / "state.json")["num_averaged"]
    assert counted == (sum(map(len, averaged.loras)) if start == "a checkpoint" else 0)
    assert bool(load_file(found / "optimizer.safetensors")) == (start == "a checkpoint")


def test_a_stage_goes_on_from_its_predecessors_average(copied, overrides):
    """resume_from may name it, as it may name any checkpoint of the stage before; the log calls it by its name."""
    shutil.rmtree(stage_of(copied, 1).folder)
    average = stage_of(copied).checkpoints()[-1] / "ema"
    settings = overrides | EMA | {"run_name": "stage1", "resume_from": str(average)}
    for verb in ("sample", "select", "train"):
        said = ran(copied, verb, settings)
    assert ", from stage0/checkpoint_2/ema" in said
    assert stage_of(copied, 1).manifest("sample")["policy"]["lora_sha256"] in json.dumps(
        stage_of(copied).manifest("train")["files"][f"checkpoints/checkpoint_2/ema/{LORA_FILE}"]
    )


# ---- what others see ----


def draw(pipeline: StableDiffusionPipeline) -> np.ndarray:
    """Images of the tests' prompts on fixed noise, in 0..255."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return (
        pipeline(PROMPTS, latents=noise, num_inference_steps=6, guidance_scale=5.0, eta=0.0, output_type="np").images * 255
    )


def with_lora(models: Path, folder: Path, name: str = LORA_FILE) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(models / "sd", safety_checker=None)
    pipeline.load_lora_weights(folder, weight_name=name)
    return pipeline


@pytest.mark.parametrize("form", ["diffusers", "kohya", "pipeline"])
def test_stock_diffusers_draws_by_the_average_and_by_its_export(averaged, copied, models, form):
    """load_lora_weights takes the folder ema/ as it is; each exported format draws the same, and not what the LoRA beside it
    draws. Record and card say that it is an average."""
    root = experiment(copied)
    checkpoint = stage_of(copied, 1).checkpoints()[-1]
    expected = draw(with_lora(models, checkpoint / "ema"))
    out = export(root, "last/ema", form)
    exported = {
        "diffusers": lambda: with_lora(models, out),
        "kohya": lambda: with_lora(models, out, "tiny.safetensors"),
        "pipeline": lambda: StableDiffusionPipeline.from_pretrained(out),
    }[form]()
    assert np.abs(draw(exported) - expected).max() <= 0.01
    assert np.abs(draw(with_lora(models, checkpoint)) - expected).max() > 0.05
    assert read_json(out / "export.json")["checkpoint"] == "stage1/ema"
    card = (out / "README.md").read_text()
    updates = sum(map(len, averaged.loras))
    assert f", {updates} updates (stages: 2) |" in card
    assert "| checkpoint | stage1/ema, of stage0 to stage1 |" in card
    assert "| weights | the exponential average of the LoRA over its updates, decay 0.3; not the LoRA after" in card
    assert "`run_eval.py --checkpoint=base,stage1/ema " in card
    assert "exponential average" not in (export(root, "last", form) / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "folder", "called"),
    [
        ("last/ema", "stage1/checkpoints/checkpoint_2/ema", "stage1/ema"),
        ("stage0/ema", "stage0/checkpoints/checkpoint_2/ema", "stage0/ema"),
        ("stage1/checkpoint_2/ema", "stage1/checkpoints/checkpoint_2/ema", "stage1/ema"),
        ("stage1/checkpoint_1/ema", "stage1/checkpoints/checkpoint_1/ema", "stage1/checkpoint_1/ema"),
        (
            "model/lora/tiny/stage0/checkpoints/checkpoint_1/ema",
            "stage0/checkpoints/checkpoint_1/ema",
            "stage0/checkpoint_1/ema",
        ),
    ],
)
def test_names_of_averages(averaged, name, folder, called):
    root = experiment(averaged.folder)
    with contextlib.chdir(averaged.folder):
        lora = resolve_checkpoint(root, name)
        assert (root / folder / LORA_FILE).samefile(lora)
        assert checkpoint_name(root, lora) == called


def test_a_run_without_an_average_says_so(finished):
    for name in ("last/ema", "stage0/checkpoint_1/ema"):
        with pytest.raises(FileNotFoundError, match=r"checkpoint_\d has no average of its LoRA\. .*--config\.train\.ema=0"):
            resolve_checkpoint(experiment(finished), name)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'stage7'"):
        resolve_checkpoint(experiment(finished), "stage7/ema")


@pytest.mark.usefixtures("no_pictures")
def test_averages_are_judged_under_their_own_name(copied, overrides):
    """Rows, folders and the log tell them from the LoRA; the curve, --all and --best are of LoRAs alone; the report has a
    column for the newest one, where there is one."""
    root, settings = experiment(copied), overrides | EMA
    ran(copied, "eval", settings, "--checkpoint=base", "--sampler=training")
    page = (root / "report.html").read_text()
    assert "exponential average" not in page
    assert "(averaged LoRA)" not in page
    judged = ["base", "last/ema", "last", "stage1/checkpoint_1/ema"]
    said = ran(copied, "eval", settings, f"--checkpoint={','.join(judged)}", "--sampler=training")
    rows = {row["checkpoint"]: row for row in read_json_lines(root / "eval.jsonl")}
    assert [(name, row["stage"]) for name, row in rows.items()] == [
        ("base", None),
        ("stage1/ema", 1),
        ("stage1", 1),
        ("stage1/checkpoint_1/ema", 1),
    ]
    assert len({row["reward"] for row in rows.values()}) == len({row["folder"] for row in rows.values()}) == 4
    assert rows["stage1/ema"]["folder"].startswith("eval/stage1-ema_test_")
    assert rows["stage1/ema"]["reward_gain"] == pytest.approx(rows["stage1/ema"]["reward"] - rows["base"]["reward"])
    assert "eval stage1/ema (averaged LoRA) on test prompts" in said
    assert "eval stage1 on test prompts" in said
    assert [row["checkpoint"] for row in evaluation_rows(root)] == ["base", "stage1"]
    page = (root / "report.html").read_text()
    assert "<th>stage1</th><th>difference</th><th>stage1/ema (averaged LoRA)</th><th>difference</th>" in page
    assert "exponential average" in page

    said = ran(copied, "eval", settings, "--best", "--sampler=training")
    assert "Best of 3 checkpoints: " in said
    assert [row["checkpoint"] for row in evaluation_rows(root)] == ["base", "stage0", "stage1"]
    (result,) = run_evaluation(copied, settings, ["stage1/ema"])
    assert result["reward"] == rows["stage1/ema"]["reward"]


def test_its_cost_is_foretold(averaged, overrides):
    """Three more evaluations at the end of the run: both prompt sets, and the deployed sampler's; and a file each time."""
    with_it, without = (read_settings(make_config(overrides | {"eval.every": 0} | some)) for some in (EMA, {}))
    more, fewer = (forecast.evaluations_left(settings, finished=set()) for settings in (with_it, without))
    assert more.judged_evaluations - fewer.judged_evaluations == 6 * (2 * 4 + 6)
    assert more.judged - fewer.judged == 3 * 6
    base = dry_run.base_sizes(with_it.model)
    size = dry_run.checkpoint_bytes(with_it, base) - dry_run.checkpoint_bytes(without, base)
    saved = safetensors.torch.load_file(stage_of(averaged.folder).checkpoints()[-1] / "ema" / LORA_FILE)
    assert size == sum(value.nbytes for value in saved.values())
