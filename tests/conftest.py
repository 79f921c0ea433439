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
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# Child processes inherit these, and the libraries read them on import: one thread, no network, no reports to their makers.
# Scripts work in the folder where they are started, as if run_process.sh had gone there.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "B2DIFFURL_STARTED_IN": "."}
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import diffusers  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from absl.flags import FLAGS  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from b2diffurl.algorithm.selection import Selected  # noqa: E402
from b2diffurl.configuration.plan import Plan, make_plan  # noqa: E402
from b2diffurl.configuration.recorded import record_experiment  # noqa: E402
from b2diffurl.configuration.settings import Settings, read_settings  # noqa: E402
from b2diffurl.experiment.stage import LORA_FILE, Stage  # noqa: E402
from b2diffurl.experiment.trajectories import SelectedTrajectories, Trajectories, save_selected  # noqa: E402
from b2diffurl.objectives import OBJECTIVES  # noqa: E402
from b2diffurl.phases.trainer import Trainer  # noqa: E402
from b2diffurl.reporting import page  # noqa: E402
from b2diffurl.runtime import threads  # noqa: E402
from b2diffurl.runtime.files import SEAL, write_bytes  # noqa: E402

torch.set_num_threads(1)
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()

PROMPTS = ["a red circle", "a blue square", "a green cross"]
VERBS = ("sample", "select", "train")
REAL_SIZE = ("sd14", "sd14_10gb", "sd14_nft", "sdxl", "sdxl_24gb", "sd35", "sd35_24gb", "flux")
PRESETS = ("shapes", "shapes_flow", "shapes_ddpo", *REAL_SIZE, "b2", "bs", "bpt", "ddpo", "b2_nft")
CONFIG = f"--config={ROOT}/config/stage_process.py"

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

# Four images a stage, all of them selected: enough for an update, of a model whose images take long.
FEW_IMAGES = {"split_time": 2, "sample.num_batches_per_epoch": 1, "selection.images": "all"}

JUDGED = {"eval.judge": "shapes", "eval.diversity": ("clip", "layout")}

# What stages need beside TINY for the objectives that ask the base policy. Trained on all their steps siblings differ enough
# for three of the six groups to be complete, and the three pairs make one update of two and one of what is left.
REFERRING = {
    "dpok": {"train.objective": "dpok"},
    "d3po": {
        "train.objective": "d3po",
        "split_step_left": 4,
        "split_step_right": 4,
        "selection.pos_threshold": 0.2,
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


@pytest.fixture(scope="session")
def sampled(overrides, tmp_path_factory) -> Path:
    """A folder in which stage 0 of the tiny experiment is sampled. Not to be changed: see `begin`."""
    folder = tmp_path_factory.mktemp("sampled")
    run_stage(folder, overrides, verbs=["sample"])
    return folder


@pytest.fixture
def begin(sampled, overrides, tmp_path) -> Callable[..., tuple[Path, dict]]:
    """begin(settings) -> (folder, all settings): an experiment begun with these settings, its stage 0 sampled."""

    def make(settings: dict) -> tuple[Path, dict]:
        folder = shutil.copytree(sampled, tmp_path / "work")
        (experiment(folder) / "config.json").unlink()
        with contextlib.chdir(folder):
            record_experiment(make_plan(make_config(overrides | settings)).record, 1)
        return folder, overrides | settings

    return make


@pytest.fixture(scope="session")
def reported(finished, overrides, tmp_path_factory) -> Path:
    """A folder in which the tiny experiment is judged, every stage on both prompt sets, and reported. Not to be changed."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("reported") / "copy")
    ended = run_script(folder, "eval", overrides | JUDGED, "--all", "--prompts=test,train", "--sampler=training")
    assert ended.code == 0, ended.stderr
    return folder


@pytest.fixture
def root(reported, tmp_path) -> Path:
    """A copy of that experiment's own folder, to work on."""
    return shutil.copytree(experiment(reported), tmp_path / "tiny")


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


@pytest.fixture
def no_pngs(monkeypatch) -> None:
    """A report's PNG files are empty: drawing them takes a second. Its page is whole."""
    monkeypatch.setattr(page, "save_png", lambda _figure, path: write_bytes(path, b""))


@pytest.fixture
def no_pictures(no_pngs, monkeypatch) -> None:
    """Nothing is drawn for a report, which takes seconds: for tests of what is reported, not of how."""
    for name in ("draw_curves", "draw_heat_maps", "draw_trees", "pairs_figure"):
        monkeypatch.setattr(page, name, lambda *_, **__: [])


@pytest.fixture
def side_by_side(monkeypatch) -> Iterator[None]:
    """Torch has two threads, which compute side by side, however few rows there are."""
    monkeypatch.setattr(threads, "MIN_ROWS", 1)
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


@pytest.fixture
def empty(tmp_path) -> Path:
    """A folder in which nothing has been run."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def module(tmp_path, monkeypatch) -> Iterator[Callable[[str], str]]:
    """module(source) -> the name of a module with that source on the Python path."""
    name = "rewards_of_" + re.sub(r"\W", "_", tmp_path.name)

    def write(source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        return name

    yield write
    sys.modules.pop(name, None)


@pytest.fixture
def new_accelerator() -> Iterator[Callable[[], None]]:
    """Device and precision are chosen anew, as in a process of its own; called, once more."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    reset()
    yield reset
    reset()


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


def stage_of(folder: Path, index: int = 0) -> Stage:
    """A stage of the experiment in `folder`."""
    return Stage(experiment(folder), index)


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def updates_of(stage: Stage) -> list[dict]:
    return [event for event in json_lines(stage.metrics("train")) if event["event"] == "update"]


def update_of(folder: Path) -> torch.Tensor:
    """What stage 0's training made of B, which is 0 at first."""
    state = load_file(stage_of(folder).checkpoints()[-1] / LORA_FILE)
    return torch.cat([value.flatten() for name, value in state.items() if "lora_B" in name])


def distance(one: Path, other: Path) -> float:
    """Between the LoRAs of two experiments, relative to the other's update."""
    return ((update_of(one) - update_of(other)).norm() / update_of(other).norm()).item()


def forget(folder: Path, verb: str) -> None:
    """Make one phase of stage 0 unfinished, and what it needs be there."""
    one = stage_of(folder)
    one.manifest_path(verb).unlink()
    if verb == "sample":
        shutil.rmtree(one.samples)
    if verb == "train":
        shutil.rmtree(one.folder / "checkpoints")
        rows = json.loads(one.selection.read_text())
        save_selected(one, [Selected(row["group"], row["branch"], row["score"]) for row in rows], 2)


def unfinish(folder: Path, verb: str, index: int = 1) -> Stage:
    """Take back the end of a phase of a stage, and those after it; returns the stage."""
    stage = stage_of(folder, index)
    for later in VERBS[VERBS.index(verb) :]:
        stage.manifest_path(later).unlink(missing_ok=True)
    return stage


def read_selected(stage: Stage, selected: list[Selected], batch_size: int) -> Trajectories:
    """Trajectories of a stage whose samples were kept, by way of the files that selecting writes."""
    with tempfile.TemporaryDirectory() as folder:
        copied = Stage(Path(folder), stage.index)
        shutil.copytree(stage.samples, copied.samples)
        save_selected(copied, selected, batch_size)
        return SelectedTrajectories(copied, selected, batch_size).read(range(len(selected)))


def plan(folder: Path, overrides: dict, **more) -> Plan:
    """The plan of a call in `folder`."""
    with contextlib.chdir(folder):
        return make_plan(make_config(overrides, **more))


def run_verb(folder: Path, config: ConfigDict, verb: str) -> None:
    """Call one verb with `folder` as the current directory."""
    from b2diffurl.configuration.command_line import named_preset
    from b2diffurl.phases.sample import sample_stage
    from b2diffurl.phases.select import select_stage
    from b2diffurl.phases.train import train_stage

    preset = get_config("sd14").to_dict()  # make_config's
    with contextlib.chdir(folder), named_preset(preset):
        {"sample": sample_stage, "select": select_stage, "train": train_stage}[verb](make_plan(copy.deepcopy(config)))


def run_stage(folder: Path, overrides: dict, index: int = 0, verbs=VERBS) -> None:
    for verb in verbs:
        run_verb(folder, make_config(overrides, run_name=f"stage{index}"), verb)


def run_evaluation(
    folder: Path, overrides: dict, checkpoints: Sequence[str] = ("base", "last"), prompts: Sequence[str] = ("test",), **more
) -> list[dict]:
    """What run_eval.py does with the training's sampler, but for the report."""
    from b2diffurl.configuration.plan import checked_settings
    from b2diffurl.evaluation.generate import training_sampler
    from b2diffurl.evaluation.measure import evaluate

    with contextlib.chdir(folder):
        settings = checked_settings(make_config(overrides, **more))
        return evaluate(settings, checkpoints, prompts, {"training": training_sampler(settings)})


# ---- experiments on disk ----


JUDGE = ("--checkpoint=base,last", "--sampler=training")


@pytest.fixture
def work(workplace) -> Path:
    """The same as `workplace`, by a shorter name."""
    return workplace


def flip(data: bytes, bit: int) -> bytes:
    """The data with one bit another."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


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
    return [f"run_{verb}.py", f"{CONFIG}:{preset}", *flags(overrides), *more]


def run_script(folder: Path, verb: str, overrides: dict, *more: str, preset: str = "sd14") -> Ended:
    """run_<verb>.py from its first line to its exit code, in this process, with flags and in `folder`."""
    argv = script_arguments(verb, overrides, *more, preset=preset)
    return call(folder, argv, lambda: runpy.run_path(str(ROOT / argv[0]), run_name="__main__"))


def process_variables() -> set[str]:
    """What run_process.sh takes from the environment."""
    return set(re.findall(r"^(\w+)=\"\$\{\1:-", (ROOT / "run_process.sh").read_text(), re.MULTILINE))


def ran(folder: Path, verb: str, settings: dict, *more: str) -> str:
    """What a script printed that must have worked."""
    ended = run_script(folder, verb, settings, *more)
    assert ended.code == 0, ended.stderr
    return ended.stdout


def judged(folder: Path, settings: dict, *more: str, preset: str = "sd14") -> dict:
    """What run_eval.py --json printed, and nothing else on stdout."""
    ended = run_script(folder, "eval", settings, "--json", *more, preset=preset)
    assert ended.code == 0, ended.stderr
    return json.loads(ended.stdout)


def start(folder: Path, overrides: dict, *more: str, preset: str = "sd14") -> Ended:
    """`python -m b2diffurl.start`, in `folder`."""
    path = str(ROOT / "b2diffurl" / "start.py")
    argv = [path, *script_arguments("sample", overrides, *more, preset=preset)[1:]]
    return call(folder, argv, lambda: runpy.run_path(path, run_name="__main__"))


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
        mock.patch.object(sys, "path", [*sys.path]),
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


def run_shell(folder: Path, settings: dict, variables: dict[str, str]) -> subprocess.CompletedProcess:
    """run_process.sh as people call it, in `folder`, by variables and flags; a run that ends well."""
    ended = subprocess.run(
        ["bash", str(ROOT / "run_process.sh"), *flags(settings)],
        env=os.environ | variables | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    return ended


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
