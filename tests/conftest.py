"""What the tests share: tiny models on disk, one finished experiment of two stages, and ways to run the scripts."""

import contextlib
import copy
import io
import json
import logging
import os
import re
import runpy
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# Child processes inherit these, and the libraries read them on import: one thread, and no network.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import diffusers  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from absl.flags import FLAGS  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from b2diffurl.algorithm.selection import Selected  # noqa: E402
from b2diffurl.configuration.settings import Settings, read_settings  # noqa: E402
from b2diffurl.experiment.stage import Stage  # noqa: E402
from b2diffurl.experiment.trajectories import SelectedTrajectories, Trajectories, save_selected  # noqa: E402
from b2diffurl.runtime.files import SEAL  # noqa: E402

torch.set_num_threads(1)
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()

PROMPTS = ["a red circle", "a blue square", "a green cross"]
VERBS = ("sample", "select", "train")

# Two stages of 18 images that every selection rule meets: what the preset sd14 needs to run on a tiny model.
TINY = {
    "exp_name": "tiny",
    "num_threads": 1,
    "stage_cnt": 2,
    "split_step_left": 2,
    "split_step_right": 3,
    "split_time": 3,
    "sample.num_steps": 4,
    "sample.batch_size": 2,
    "sample.num_batches_per_epoch": 3,
    "reward.batch_size": 4,
    "eval.num_images": 6,
    "eval.deployed.num_steps": 6,
    "eval.batch_size": 4,
    "train.num_epochs": 2,
    "train.save_interval": 1,
    "train.batch_size": 2,
    "train.gradient_accumulation_steps": 2,
    "train.micro_batch_size": 3,
    "train.learning_rate": 1e-2,
    "keep.samples": True,
}

# What stages need beside TINY for the objectives that ask the base policy. Trained on all their steps siblings differ enough
# for three of the six groups to be complete, and the three pairs make one update of two and one of what is left.
REFERRING = {
    "dpok": {"train.objective": "dpok"},
    "d3po": {
        "train.objective": "d3po",
        "split_step_left": 4,
        "split_step_right": 4,
        "eval.pos_threshold": 0.2,
        "train.batch_size": 5,
        "train.gradient_accumulation_steps": 1,
    },
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with `sd` (epsilon), `sd_v` (v-prediction), `clip` and the prompt file `prompts.json`."""
    root = tmp_path_factory.mktemp("models")
    tiny.stable_diffusion(root / "sd")
    tiny.stable_diffusion(root / "sd_v", prediction_type="v_prediction")
    tiny.clip(root / "clip")
    (root / "prompts.json").write_text(json.dumps(PROMPTS))
    return root


@pytest.fixture(scope="session")
def overrides(models) -> dict:
    """The settings of the tiny experiment, by dotted key."""
    return TINY | {
        "pretrained.model": str(models / "sd"),
        "reward.clip.model": str(models / "clip"),
        "prompt_file": str(models / "prompts.json"),
        "eval.prompt_file": str(models / "prompts.json"),
    }


@pytest.fixture
def config(overrides) -> ConfigDict:
    """The tiny experiment's configuration."""
    return make_config(overrides)


@pytest.fixture(scope="session")
def finished(overrides, tmp_path_factory) -> Path:
    """A folder in which both stages of the tiny experiment are finished. Not to be changed: see `workplace`."""
    folder = tmp_path_factory.mktemp("finished")
    for index in range(2):
        run_stage(folder, overrides, index)
    return folder


@pytest.fixture(scope="session")
def stage_with(overrides, tmp_path_factory) -> Callable[..., Path]:
    """stage_with(**settings) -> a folder in which stage 0 with these settings is finished. Made once; not to be changed."""
    made: dict[str, Path] = {}

    def make(**settings) -> Path:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("stage")
            run_stage(made[key], overrides | settings)
        return made[key]

    return make


@pytest.fixture
def workplace(finished, tmp_path) -> Path:
    """A copy of `finished` to work on."""
    return shutil.copytree(finished, tmp_path / "copy")


def make_config(overrides: dict, preset: str = "sd14", **more) -> ConfigDict:
    config = get_config(preset)
    config.update_from_flattened_dict(overrides | more)
    return config


def settings_at(config: ConfigDict, root: Path) -> Settings:
    """The values of a configuration whose experiment lies in folder `root`."""
    settings = read_settings(config)
    return replace(settings, output=replace(settings.output, save_path=str(root.parent), name=root.name))


def get_config(preset: str) -> ConfigDict:
    return runpy.run_path(str(ROOT / "config" / "stage_process.py"))["get_config"](preset)


def experiment(folder: Path) -> Path:
    return folder / "model" / "lora" / "tiny"


def read_selected(stage: Stage, selected: list[Selected], batch_size: int) -> Trajectories:
    """Trajectories of a stage whose samples were kept, by way of the files that selecting writes."""
    with tempfile.TemporaryDirectory() as folder:
        copied = Stage(Path(folder), stage.index)
        shutil.copytree(stage.samples, copied.samples)
        save_selected(copied, selected, batch_size)
        return SelectedTrajectories(copied, selected, batch_size).read(range(len(selected)))


def run_verb(folder: Path, config: ConfigDict, verb: str) -> None:
    """Call one verb with `folder` as the current directory."""
    from b2diffurl.configuration.command_line import named_preset
    from b2diffurl.configuration.plan import make_plan
    from b2diffurl.phases.sample import sample_stage
    from b2diffurl.phases.select import select_stage
    from b2diffurl.phases.train import train_stage

    preset = get_config("sd14").to_dict()  # make_config's
    with contextlib.chdir(folder), named_preset(preset):
        {"sample": sample_stage, "select": select_stage, "train": train_stage}[verb](make_plan(copy.deepcopy(config)))


def run_stage(folder: Path, overrides: dict, index: int = 0, verbs=VERBS) -> None:
    for verb in verbs:
        run_verb(folder, make_config(overrides, run_name=f"stage{index}"), verb)


def run_evaluation(folder: Path, overrides: dict, *checkpoints: str) -> None:
    """What run_eval.py does, but for the report."""
    from b2diffurl.configuration.plan import checked_settings
    from b2diffurl.evaluation.generate import training_sampler
    from b2diffurl.evaluation.measure import evaluate

    with contextlib.chdir(folder):
        settings = checked_settings(make_config(overrides))
        evaluate(settings, checkpoints or ("base", "last"), ["test"], {"training": training_sampler(settings)})


# ---- experiments on disk ----


def snapshot(folder: Path, *, log: bool = False) -> dict[str, bytes]:
    """Every file below `folder` with its bytes; without `log`, all but the readable log."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return found if log else {name: data for name, data in found.items() if not name.startswith("log/")}


def comparable(folder: Path) -> dict[str, object]:
    """Every file below `folder` by what must not depend on when, or in how many pieces, the run was made."""

    def timeless(value):
        if isinstance(value, dict):
            keys = ("finished", "seconds", "load", "sample", "decode", "write", "score", "train", "peak_memory_bytes", SEAL)
            kept = {key: timeless(item) for key, item in value.items() if key not in keys}
            return {key: item for key, item in kept.items() if not key.startswith("metrics/")}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    found: dict[str, object] = {}
    for name, data in snapshot(folder).items():
        if re.search(r"(sample|select|train)\.json$", name):
            found[name] = timeless(json.loads(data))
        elif name.endswith(".jsonl"):
            found[name] = [timeless(json.loads(line)) for line in data.splitlines()]
        else:
            found[name] = data
    return found


def assert_same(one: Path, other: Path) -> None:
    """Two experiments agree file by file: bytes, or for manifests and metrics all but the time they took."""
    one, other = comparable(one), comparable(other)
    assert one.keys() == other.keys()
    differing = [name for name in one if one[name] != other[name]]
    assert not differing


# ---- the scripts ----

LIMIT_SEC = 10  # until a script has refused what it cannot do


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str
    seconds: float


def flags(overrides: dict) -> list[str]:
    return [f"--config.{key}={value}" for key, value in overrides.items()]


def script_arguments(verb: str, overrides: dict, *more: str, preset: str = "sd14") -> list[str]:
    return [f"run_{verb}.py", f"--config={ROOT}/config/stage_process.py:{preset}", *flags(overrides), *more]


def run_script(folder: Path, verb: str, overrides: dict, *more: str, preset: str = "sd14") -> Ended:
    """run_<verb>.py from its first line to its exit code, in this process, with flags and in `folder`."""
    argv = script_arguments(verb, overrides, *more, preset=preset)
    return call(folder, argv, lambda: runpy.run_path(str(ROOT / argv[0]), run_name="__main__"))


def parse_command(folder: Path, argv: list[str]) -> Ended:
    """Parse the flags of a command line `run_<verb>.py …` and print the resulting configuration as JSON."""
    from b2diffurl.configuration import command_line

    def parse() -> None:
        runpy.run_path(str(ROOT / argv[0]), run_name="flags_only")
        command_line.run_script("parse", lambda config: print(json.dumps(config.to_dict())))

    return call(folder, argv, parse)


def call(folder: Path, argv: list[str], main: Callable[[], object]) -> Ended:
    """Call `main` as the interpreter would in a process of its own: its flags, streams and exit code are its own."""
    known, started = set(FLAGS), time.perf_counter()
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        mock.patch.object(sys, "argv", argv),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            code = 1
            traceback.print_exc()
        finally:
            FLAGS.unparse_flags()
            for name in set(FLAGS) - known:
                delattr(FLAGS, name)
            for handler in list(logging.getLogger("b2diffurl").handlers):
                logging.getLogger("b2diffurl").removeHandler(handler)
                handler.close()
    return Ended(code, stdout.getvalue(), stderr.getvalue(), time.perf_counter() - started)


def assert_refused(ended: Ended, *said: str) -> None:
    """Two lines on stderr that say all of `said`; no traceback anywhere; and soon."""
    assert ended.code not in (0, None)
    assert "Traceback" not in ended.stdout + ended.stderr, ended.stderr
    first, second = ended.stderr.splitlines()
    assert first.startswith("error: ")
    assert second.startswith("       ")
    for words in said:
        assert re.search(words, first), first
    assert ended.seconds < LIMIT_SEC


def refuse(folder: Path, verb: str, overrides: dict, *said: str, arguments: tuple = (), preset: str = "sd14") -> None:
    """Run a script that must be refused, and look whether anything but the log has changed in `folder`."""
    before = snapshot(folder)
    assert_refused(run_script(folder, verb, overrides, *arguments, preset=preset), *said)
    assert snapshot(folder) == before
