"""b2diffurl.finetune and b2diffurl.load: the scripts' work, from Python."""

import json
import logging
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from conftest import experiment, run_script, snapshot

import b2diffurl
from b2diffurl.api import process, run
from b2diffurl.api.experiment import Experiment
from b2diffurl.reporting import page
from b2diffurl.runtime import files

UNDRAWN = ("draw_curves", "draw_heat_maps", "draw_trees", "pairs_figure", "save_png")  # what conftest.no_pictures leaves out
QUICK = {"eval.num_images": 2, "eval.every": 0, "eval.diversity": (), "eval.deployed.num_steps": 1}


def warmth(images, prompts):
    """A reward of this file, for which it is a notebook: see `tuned`."""
    red, _, blue = images.float().mean((1, 2)).unbind(1)
    return red - blue


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The user's folder, in which there is nothing."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture(scope="module")
def tuned(overrides, tmp_path_factory):
    """(the experiment that finetune made of the tiny one, its folder): one stage, then called again for the second."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in UNDRAWN:
            patch.setattr(page, name, lambda *_: [])
        for stages in (1, 2):
            run = b2diffurl.finetune("sd14", name="tiny", stages=stages, quiet=True, **overrides | QUICK)
    return run, folder


def test_it_makes_the_scripts_files(tuned, finished):
    """LoRA, scores and images of both stages have the bytes of single scripts, though the second was called for later."""
    names = [name for name in snapshot(experiment(finished)) if name.endswith((".safetensors", ".png", "scores.jsonl"))]
    mine, theirs = snapshot(experiment(tuned[1])), snapshot(experiment(finished))
    assert len(names) > 40
    assert all(mine[name] == theirs[name] for name in names)


def test_called_again_when_all_is_done_it_changes_nothing(tuned, overrides, monkeypatch, no_pictures):
    run, folder = tuned
    monkeypatch.chdir(folder)
    before = without_report(folder)
    again = b2diffurl.finetune("sd14", name="tiny", stages=2, quiet=True, **overrides | QUICK)
    assert without_report(folder) == before
    assert again.folder == run.folder


def without_report(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in snapshot(folder / "model").items() if "/report" not in name}


def test_nothing_of_the_process_has_changed(overrides, here, new_accelerator, no_pictures):
    """Nor has accelerate's choice of the user's: state by state, also after an error. The user's settings of torch, such as
    no gradients, are none of the run's."""
    mine = Accelerator(cpu=True, mixed_precision="bf16")
    handler = logging.NullHandler()
    logging.getLogger("b2diffurl").addHandler(handler)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    states = {
        "torch": lambda: torch.get_rng_state().tolist(),
        "numpy": lambda: np.random.get_state()[1].tolist(),
        "random": random.getstate,
        "dtype": torch.get_default_dtype,
        "gradients": torch.is_grad_enabled,
        "threads": torch.get_num_threads,
        "folder": os.getcwd,
        "environment": lambda: dict(os.environ),
        "interrupt": lambda: signal.getsignal(signal.SIGINT),
        "log": lambda: list(logging.getLogger("b2diffurl").handlers),
        "level": lambda: logging.getLogger("b2diffurl").level,
        "accelerate": lambda: (PartialState()._shared_state.keys(), mine.mixed_precision),
        "open files": lambda: len(os.listdir("/proc/self/fd")),
    }
    before = {name: read() for name, read in states.items()}
    try:
        for settings in ({"stages": 1}, {"stages": 1, "seed": 4}):
            try:
                b2diffurl.finetune("sd14", quiet=True, name="tiny", **overrides | QUICK | settings)
            except ValueError as error:
                assert "seed is 4" in str(error)
        assert {name: read() for name, read in states.items()} == before
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        logging.getLogger("b2diffurl").removeHandler(handler)


def test_a_function_and_prompts_are_recorded_and_compared(overrides, here, monkeypatch, no_pictures):
    """The experiment has both; other ones are refused and change nothing; the shell can go on with the recorded function."""
    monkeypatch.setattr(warmth, "__module__", "__main__")
    given = overrides | QUICK | {"stages": 1, "name": "warm", "quiet": True}
    del given["prompt_file"]
    prompts = ["a red circle", "a blue square"]
    left = here / "model" / "lora" / "warm" / "given_prompts.json"  # of a process that was killed before the run began
    left.parent.mkdir(parents=True)
    left.write_text('["a"]')
    run = b2diffurl.finetune("sd14", reward=warmth, prompts=prompts, **given)
    assert "red - blue" in (run.folder / "reward_warmth.py").read_text()
    assert {row["prompt"] for row in run.scores(0)} == set(prompts)
    monkeypatch.chdir(here.parent)
    assert len(run.scores(0)) == 18 and run.lora.is_absolute()  # the working directory is another, the experiment is not
    monkeypatch.chdir(here)
    before = snapshot(here)

    def other(images, prompts):
        return -images.float().mean((1, 2, 3))

    other.__name__, other.__module__ = "warmth", "__main__"
    for change, said in (({"reward": other}, "with another warmth, as it"), ({"prompts": prompts[:1]}, "other training p")):
        with pytest.raises(ValueError, match=said):
            b2diffurl.finetune("sd14", **given | {"reward": warmth, "prompts": prompts} | change)
    assert {name: data for name, data in snapshot(here).items()} == before

    # run_process.sh's way: the recorded file is a module of its name.
    monkeypatch.syspath_prepend(str(run.folder))
    recorded = json.loads((run.folder / "config.json").read_text())["config"]
    settings = overrides | QUICK | {"exp_name": "warm", "stage_cnt": 2, "reward.name": recorded["reward"]["name"]}
    settings |= {"run_name": "stage1", "prompt_file": recorded["prompt_file"]}
    for verb in ("sample", "select"):
        ended = run_script(here, verb, settings)
        assert ended.code == 0, ended.stderr


def test_prompts_of_another_world_do_without_its_checker(here, monkeypatch):
    """As in the shell: the preset's own judge and held-out prompts step back, unless they were asked for."""
    seen = []
    monkeypatch.setattr(run, "run_stages", lambda config: seen.append(config["eval"].to_dict()))
    for settings in ({}, {"held_out": ["a witch"]}, {"eval": {"judge": "shapes"}}):
        b2diffurl.finetune("shapes", prompts=["a wizard"], quiet=True, **settings)
    assert [one["judge"] for one in seen] == ["", "", "shapes"]
    assert [Path(one["prompt_file"]).name for one in seen] == ["", "given_held_out.json", ""]


def test_a_run_that_is_refused_leaves_nothing(overrides, here, monkeypatch):
    monkeypatch.setattr(warmth, "__module__", "__main__")
    with pytest.raises(ValueError, match=r"sample\.num_steps"):
        b2diffurl.finetune("sd14", reward=warmth, prompts=["a"], quiet=True, **overrides | {"sample.num_steps": 1})
    assert not list(here.glob("model/lora/*"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sead": 1}, r"unknown key sead; did you mean seed\?"),
        ({"train": {"learning_rat": 1}}, r"unknown key train.learning_rat; did you mean train.learning_rate\?"),
        ({"seed": "x"}, "seed is 'x'; it must be a whole number"),
        ({"prompts": 3}, "prompts are 3; give a list of strings"),
        ({"prompts": ["a", 3]}, "entry 2: 3 is no prompt"),
        ({"prompts": []}, "holds no prompt"),
        ({"prompts": {"a", "b"}}, "give a list of strings"),
        ({"split_time": np.int64(0), "log_path": Path("log")}, "split_time is 0; it must"),
        ({"reward": "clop"}, "unknown reward 'clop'"),
        ({"reward": lambda images, prompts: images}, "is a lambda"),
        ({"name": "a/b"}, "exp_name is 'a/b'"),
        ({"preset": "shaped"}, "unknown preset 'shaped'"),
        ({"preset": None}, "preset is None; it must be a text"),
        ({"name": 3}, "name is 3; it must be a text"),
        ({"prompts": "a red circle"}, r"are a text, 'a red circle', which is no file\. Give a list"),
    ],
)
def test_mistakes_are_sentences(overrides, here, wrong, said):
    with pytest.raises(ValueError, match=said):
        b2diffurl.finetune(**{"preset": "sd14", "quiet": True} | overrides | wrong)
    assert not list(here.glob("model/lora/*"))


def test_a_second_call_at_once_is_refused(overrides, here):
    """Another thread of the same process: two runs cannot share threads, random numbers and the log."""
    process.AT_WORK.acquire()
    try:
        with pytest.raises(ValueError, match="another call of b2diffurl is at work"):
            b2diffurl.finetune("sd14", quiet=True, **overrides)
    finally:
        process.AT_WORK.release()


def test_an_interrupted_kernel_goes_on(overrides, finished, here, monkeypatch, no_pictures):
    """Stopped in the middle of sampling, as by the stop button: KeyboardInterrupt, no lock left, and the same bits later."""
    given = {"name": "tiny", "stages": 1, "quiet": True} | overrides | QUICK
    written, write = [], files.write_tensors

    def interrupt(*arguments, **options):
        write(*arguments, **options)
        written.append(arguments)
        if len(written) == 1:
            os.kill(os.getpid(), signal.SIGINT)  # this is the writer's thread; the main one hears it
            time.sleep(0.1)

    monkeypatch.setattr(files, "write_tensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        b2diffurl.finetune("sd14", **given)
    monkeypatch.setattr(files, "write_tensors", write)
    root = here / "model" / "lora" / "tiny"
    assert not (root / "run.lock").exists()
    assert not (root / "stage0" / "sample.json").exists()
    run = b2diffurl.finetune("sd14", **given)
    lora = "stage0/checkpoints/checkpoint_2/pytorch_lora_weights.safetensors"
    assert (run.folder / lora).read_bytes() == (experiment(finished) / lora).read_bytes()


# ---- an experiment on disk ----


@pytest.fixture
def judged(reported, monkeypatch) -> Experiment:
    """The tiny experiment, judged with a judge; see conftest."""
    monkeypatch.chdir(reported)
    return b2diffurl.load("tiny")


def test_figures_are_those_on_disk(judged):
    curve = judged.curve()
    assert [(row["stage"], row["images_scored"]) for row in curve] == [(None, 0), (0, 18), (1, 36)]
    rows = [json.loads(line) for line in (judged.folder / "eval.jsonl").read_text().splitlines()]
    base = next(row for row in rows if (row["checkpoint"], row["prompts"]) == ("base", "test"))
    assert (curve[0]["held_out_reward"], curve[0]["held_out_accuracy"]) == (base["reward"], base["accuracy"])
    select = json.loads((judged.folder / "stage1" / "select.json").read_text())
    assert curve[2]["training_reward"] == select["reward_mean"]
    assert len(judged.evaluations()) == len(rows)
    assert judged.verdict["stage"] == 1
    assert [row["num_images"] for row in judged.stages()] == [18, 18]
    assert {row["stage"] for row in judged.updates()} == {0, 1}
    assert len(judged.scores(1)) == 18
    assert judged.config["train"]["learning_rate"] == 1e-2
    with pytest.raises(FileNotFoundError, match="stage 5"):
        judged.scores(5)


def test_images_are_of_base_and_tuned_on_the_same_noise(tuned, monkeypatch):
    """As run_eval.py --prompt draws them: six of each, the base's with the LoRA off."""
    run, folder = tuned
    monkeypatch.chdir(folder)
    drawn = run.images(["a red circle", "a blue square"])
    assert [len(one.base) for one in drawn] == [6, 6]
    assert drawn[0].base != drawn[0].tuned
    assert drawn[0]._repr_png_().startswith(b"\x89PNG")
    assert run.lora == run.folder / "stage1" / "checkpoints" / "checkpoint_2"


def test_a_checkpoint_is_exported(tuned, tmp_path, monkeypatch):
    run, folder = tuned
    monkeypatch.chdir(folder)
    out = run.export("kohya", out=tmp_path / "out")
    assert [path.suffix for path in out.glob("*.safetensors")] == [".safetensors"]
    with pytest.raises(ValueError, match="form is 'koyha'; known: "):
        run.export("koyha")


def test_evaluating_gives_a_row_a_checkpoint(tuned, monkeypatch):
    run, folder = tuned
    monkeypatch.chdir(folder)
    rows = run.evaluate(("base", "stage0"), prompts="test", sampler="training", quiet=True)
    assert [row["checkpoint"] for row in rows] == ["base", "stage0"]
    assert "reward_gain" in rows[1]
    assert "values" not in rows[0]


def test_rows_become_a_table(judged, monkeypatch):
    """pandas is not installed here; what is given to it is the rows."""
    fake = type("pandas", (), {"DataFrame": staticmethod(list)})
    monkeypatch.setitem(__import__("sys").modules, "pandas", fake)
    assert judged.curve().to_pandas() == list(judged.curve())


def test_experiments_of_other_versions(reported, tmp_path, monkeypatch):
    """A newer one is refused by the key that is not known; one that is none is, too."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no experiment 'tiny'"):
        b2diffurl.load("tiny")
    root = tmp_path / "newer"
    root.mkdir()
    record = files.read_json(experiment(reported) / "config.json")
    record["config"]["train"]["teleport"] = 1
    files.write_record(root / "config.json", record)
    with pytest.raises(ValueError, match=r"has the key train\.teleport, which this version does not know"):
        b2diffurl.load(root)


def test_code_that_only_a_record_names_is_not_run(reported, tmp_path, monkeypatch):
    """A folder from elsewhere may name a module that does harm; its figures can be read all the same."""
    monkeypatch.chdir(reported)
    root = tmp_path / "theirs"
    root.mkdir()
    record = files.read_json(experiment(reported) / "config.json")
    record["config"]["reward"]["name"] = "antigravity:geohash"
    files.write_record(root / "config.json", record)
    run = b2diffurl.load(root)
    assert run.stages() == []
    with pytest.raises(ValueError, match=r"antigravity:geohash, which is code of its own"):
        run.evaluate(quiet=True)
    known = b2diffurl.load(root, reward="antigravity:geohash")
    with known.at_work() as settings:
        known.refuse_unknown_code(settings)
