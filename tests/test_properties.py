"""Bad input in bulk: every generated configuration, prompt file and stage folder ends in a correct run, or in a message that
names what is wrong, before anything has changed on disk.

A few of each are part of the fast tests; thousands are run, and their figures printed, by

    python -m pytest -m bulk -s --hypothesis-seed=0
"""

import contextlib
import json
import os
import re
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import pytest
import torch
from absl import flags
from accelerate.state import AcceleratorState
from conftest import (
    PROMPTS,
    ROOT,
    TINY,
    VERBS,
    call,
    comparable,
    experiment,
    get_config,
    make_config,
    run_script,
    run_stage,
    run_verb,
    script_arguments,
)
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from b2diffurl import start as beginning
from b2diffurl.configuration import command_line
from b2diffurl.configuration.keys import KEYS, flatten
from b2diffurl.configuration.limits import Number, Text
from b2diffurl.configuration.plan import checked_settings, make_plan
from b2diffurl.evaluation import measure
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.models import policy
from b2diffurl.reporting import dry_run
from b2diffurl.runtime.files import sha256

PRESETS = ("shapes", "sd14", "sd14_10gb", "b2", "bs", "bpt", "ddpo")
DEFAULTS = {key: value for preset in PRESETS for key, value in flatten(get_config(preset).to_dict()).items()}
SAYS_WHAT_IS_ALLOWED = re.compile(
    r"must|Mend it|[Ww]rite|known|allowed|names|needs?\b|[Gg]ive|Take|Use|Delete|Run|Set|Convert|holds|lacks|"
    r"pip install|be cast"
)
ERRORS = (ValueError, OSError, FloatingPointError, ImportError, SafetensorError)  # those that command_line.run_script knows
RAN, REFUSED_IT = "run to the end", "refused"
JPEG, OTHER_JPEG = "jpeg_incompressibility", "jpeg_compressibility"

# The smallest experiment: two groups of two in one batch, two steps, one update.
SMALL = TINY | {
    "reward.name": JPEG, "eval.diversity": (), "stage_cnt": 2, "split_time": 2, "split_step_left": 1, "split_step_right": 2,
    "sample.num_steps": 2, "sample.num_batches_per_epoch": 1, "sample.guidance_scale": 1.0, "train.num_epochs": 1,
    "train.gradient_accumulation_steps": 1, "train.lora_rank": 1, "eval.num_images": 2, "eval.batch_size": 2,
    "selection.pos_threshold": 0.0, "selection.neg_threshold": 0.0, "eval.deployed.num_steps": 2, "keep.samples": False,
}  # fmt: skip


# ---- running, and what must come of it ----


@dataclass
class Tally:
    """What was tried and what came of it."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    hit: dict[str, set[str]] = field(default_factory=lambda: {"valid": set(), "invalid": set()})
    seconds: float = 0.0

    def count(self, kind: str, refused: str) -> None:
        self.outcomes[kind, REFUSED_IT if refused else RAN] += 1

    def total(self, *outcomes: str) -> int:
        return sum(count for (_, outcome), count in self.outcomes.items() if outcome in outcomes)

    def lines(self) -> list[str]:
        kinds = sorted({kind for kind, _ in self.outcomes})
        rows = [(kind, *(self.outcomes[kind, one] for one in (REFUSED_IT, RAN))) for kind in kinds]
        total = ("all", *(sum(row[column] for row in rows) for column in (1, 2)))
        hit = ", ".join(f"{name} values of {len(keys)}" for name, keys in self.hit.items())
        return [
            *(f"{kind}: {no + yes} inputs, {no} refused, {yes} run to the end" for kind, no, yes in [*rows, total]),
            f"keys: {len(DEFAULTS)}, {hit}; failures 0; {self.seconds:.0f} s",
        ]


def hashes(box: Path) -> dict[str, str | None]:
    """Every file and link in a folder by what is in it; the readable log aside, if it is where it belongs."""
    paths = [path for path in sorted(box.rglob("*")) if path.is_symlink() or not path.is_dir()]
    logs = {path for path in (box / "work").rglob("*.log") if path.is_file()}
    return {str(path.relative_to(box)): content(path) for path in paths if path not in logs}


def content(path: Path) -> str | None:
    """A file by its checksum, a link by where it leads; None where nothing is."""
    if path.is_symlink():
        return f"-> {path.readlink()}"
    if not path.is_file():
        return "no file" if path.exists() else None
    return sha256(path)


def attempt(box: Path, settings: dict, verbs: tuple[str, ...], *, by_flags: bool) -> tuple[str, str]:
    """Run the verbs in box/work, one after the other: ("", ""), or the one that refused and what it said.

    A refusal is a message of one or two lines that says what is allowed, of ours, and leaves every file as it was.
    """
    for verb in verbs:
        AcceleratorState._reset_state()  # each is as in a process of its own
        before = hashes(box)
        said = (by_command if by_flags and verb != "eval" else by_call)(box / "work", verb, settings)
        if said:
            assert hashes(box) == before, f"{verb} said {said!r} and changed files"
            assert SAYS_WHAT_IS_ALLOWED.search(said), said
            return verb, said
    return "", ""


def by_command(work: Path, verb: str, settings: dict) -> str:
    """By the command line of a script: what its first line of two said, or "" where it came to its end."""
    if verb == "plan":

        def plan() -> None:
            flags.DEFINE_boolean("dry_run", True, "")
            flags.DEFINE_string("calls", "", "")
            command_line.run_script("process", beginning.start)

        ended = call(work, script_arguments("plan", settings), plan)
    else:
        ended = run_script(work, verb, settings)
    assert "Traceback" not in ended.stdout + ended.stderr, ended.stderr
    if ended.code == 0:
        return ""
    assert ended.code == 2, ended
    first, *_, last = ended.stderr.splitlines()  # a dry run lists every fault
    assert first.startswith("error: ")
    assert last.startswith("       ")
    return f"{first} Mend it" if "[Errno" in first else first


def by_call(work: Path, verb: str, settings: dict) -> str:
    """By the function of the library: what its error said, or "" where there was none."""
    try:
        config = make_config(settings)
    except (TypeError, ValueError) as error:  # a value of another type, refused by the configuration itself
        return " ".join(str(error).split())
    try:
        with contextlib.chdir(work):
            if verb == "plan":
                dry_run.describe(make_plan(config))
            elif verb == "eval":
                settings = checked_settings(config)
                samplers = measure.named_samplers(settings, ["training", "deployed"])
                measure.evaluate(settings, ["base"], ["test"], samplers)
            else:
                run_verb(work, config, verb)
    except ERRORS as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if isinstance(error, OSError) and error.filename:
            return f"{error}. Mend it"  # as run_script says; the system's own words name the file
        assert Path(raised_in).is_relative_to(ROOT / "b2diffurl"), f"raised in {raised_in}: {error!r}"
        assert len(str(error).splitlines()) <= 2, error
        return str(error)
    return ""


def assert_complete(work: Path, settings: dict, index: int = 0) -> None:
    """A stage that has come to its end: every manifest, every file as it says, a LoRA of numbers, nothing left over."""
    root = work / settings.get("save_path", "model/lora") / settings["exp_name"]
    stage = Stage(root, index)
    stage.verify("select", "scores.jsonl", "selection.json", "metrics")
    stage.verify("train")
    stage.verify("sample", "prompts.json", "metrics")
    lora = load_file(stage.checkpoints()[-1] / LORA_FILE)
    assert all(tensor.isfinite().all() for tensor in lora.values())
    assert not list(root.rglob("*.tmp"))


def names(said: str, key: str, value: Any) -> bool:
    """Whether a message names the key, or the file that the value is."""
    if isinstance(value, (tuple, list, dict)):
        return key in said or any(names(said, key, one) for one in value)
    return key in said or (
        isinstance(value, str) and (value[:40] in said if len(value) > 2 else f"at {value}." in said or repr(value) in said)
    )


# ---- configurations ----

# Values that can be run in a second, where keys.py allows more.
RUNNABLE = {
    "stage_cnt": [1, 2, 50], "split_time": [2, 3], "pretrained.resolution": [0, 16, 64],
    "split_times": [(), (2,), (3,)], "split_after": [()],
    "pretrained.scheduler": [None, {"steps_offset": 1}],
    "sample.num_steps": [2, 3, 5],
    "sample.batch_size": [1, 2, 3], "sample.num_batches_per_epoch": [1, 2], "train.num_epochs": [1, 2, 3],
    "train.lora_rank": [1, 3, 8], "num_threads": [0, 1], "num_processes": [0, 1], "dev_id": [0], "split_step_left": [1, 2],
    "split_step_right": [1, 2], "split_step": [0, 1, 2], "eval.num_images": [1, 2, 5], "eval.batch_size": [1, 2, 3],
    "eval.deployed.num_steps": [1, 2, 5],
    "selection.pos_threshold": [0.0, 0.5, 1e9], "selection.neg_threshold": [-1e9, -0.5, 0.0],
    "sample.guidance_scale": [1.0, 1.5, 7.5, 100.0], "reward.num_workers": [1, 4, 1024],
    "mixed_precision": ["auto", "no", "bf16"],
    "curriculum": ["progressive", "fixed", "reversed", "random", "early", "sliding"], "split_stop": [0, 2],
    "sample.suffix_steps": [0],
    "sampling": ["branch", "independent"], "selection.images": ["pairs", "all"], "selection.advantage": ["prompt", "group"],
    "train.objective": ["ddpo", "reinforce", "dpok", "d3po"], "train.step_weight": ["none", "leverage", "sigma"],
    "wandb_mode": ["offline", "online"], "pretrained.family": ["auto", "stable_diffusion"],
    "pretrained.variant": [""], "sample.sde": ["cps", "flow", "dance"],
    "reward.name": [JPEG, OTHER_JPEG, "clip"], "reward.dtype": ["auto", "float32", "float16", "bfloat16"],
    "reward.watch": [(), (OTHER_JPEG,)], "eval.judge": ["", "shapes", OTHER_JPEG], "run_name": ["stage0"],
    "eval.diversity": [(), ("layout",), ("clip", "layout")], "track_with": [(), ("tensorboard",), ("wandb", "tensorboard")],
    "reward.weights": [None, {JPEG: 1.0}, {JPEG: 0.5, OTHER_JPEG: -2}, {"clip": 1e6}], "resume_from": [""],
    "compile": [False], "train.use_8bit_adam": [False], "reward.standardise": [False], "reward.combine": ["sum"],
    "reward.compose.score": ["fraction", "all"], "reward.vlm.score": ["yes", "rating"],
    "reward.vlm.unreadable": ["stop", "mean"], "reward.vlm.questions": [(), ("{prompt}?",)],
    "reward.vlm.question_weights": [(), (1.0,)], "reward.vlm.scale": [(0, 10)],
    "reward.vlm.extra_body": [None, {"top_p": 1, "stop": ["a"]}],
    "eval.deployed.scheduler": ["", "DDIMScheduler", "DDIM", "EulerDiscreteScheduler"],
    "exp_name": ["x", "größe", "实验", "a.b-c_1", "..a", "-x", "n" * 200],
    "save_path": ["model/lora", "a b/ü", ".", "a/../b", "n" * 250], "log_path": ["log", "log/a b", "."],
    "prompt": ["", "a red circle", "b" * 10_000, "ein Vögelchen\n\tim 木", "\x07"],
}  # fmt: skip
NO_FOLDER = ["", " ", "n" * 300, "a\nb", "a\0b", "\ud800", "/dev/null", "/dev/null/x", "file", "file/x", "dangling"]
NO_MODEL = [
    "",
    "no/such/model",
    "nobody/no-model",
    "/no/such",
    "n" * 300,
    "a\0b",
    "..",
    "~no-such-user/x",
    "file",
    "größe ü/ö",
]
# Values that must be refused, beside those of other types and outside their range.
REFUSED = {
    "exp_name": ["", ".", "..", "../x", "a/b", "/abs", "a/../../b", "a b", "a\\b", "n" * 300, "ü" * 150, "a\nb", "a\0b", "~",
                 "\ud800", "*", "a:b", " x"],
    "run_name": ["", "0", "stage", "stage-1", "stage٣", "stage01", "stage1.5", "stage" + "9" * 5000, "stage0/../..", "../x"],
    "save_path": NO_FOLDER, "log_path": NO_FOLDER, "pretrained.model": NO_MODEL,
    "pretrained.variant": ["fp16", "**", "[", "../x", " "], "pretrained.family": ["", "sdxl", "Stable_Diffusion", "../x"],
    "pretrained.resolution": [8, 100], "pretrained.scheduler": [{"x": 1}, {"steps_offset": 0}, 3],
    "sample.num_steps": [1000], "split_time": [1],
    "split_times": [(1,), (-3,), (2.0,), ("2",), (True,), (2, 2), (None,)], "split_after": [(1,), (0,), ("1",)],
    "split_step_left": [0, -1, 3, 10**400], "split_step_right": [0, 3, 10**30], "split_step": [-1, 3, 10**30],
    "split_stop": [-1, 1, 3, 10**30], "sample.suffix_steps": [1, 2],
    "reward.name": ["", "beauty", "a:b:c", "no.such:reward", "math:nothing", ":", "x" * 300],
    "reward.weights": [{}, {JPEG: 0}, {JPEG: float("nan")}, {JPEG: 1e300}, {JPEG: True}, {1: 1.0}, {"beauty": 1.0}, "clip",
                       5, [1], {JPEG: {"a": 1}}, {"": 1.0}, {JPEG: None}],
    "reward.watch": [("beauty",), (JPEG,), (1,), (OTHER_JPEG, OTHER_JPEG), ((),), ("",)],
    "eval.diversity": [("beauty",), (1,), ((),), ("",), ([],)], "track_with": [("mlflow",), (1,), ((),), ("",)],
    "eval.judge": ["beauty", "file", "\n", "x" * 300], "eval.prompt_file": ["no.json", "n" * 300, "file", ".", "a\0b"],
    "prompt_file": ["", "no.json", "n" * 300, "file", ".", "a\0b"], "prompt": [" ", "\n", "\ud800"],
    "resume_from": ["no/such/lora", ".", "n" * 300, "a\0b", "~no-such-user/x", "file", "/dev/null"],
    "eval.deployed.scheduler": ["Magic", "os.system", "x" * 300], "selection.pos_threshold": [-1.0],
    "selection.neg_threshold": [1.0], "train.use_8bit_adam": [True], "reward.standardise": [True],
    "reward.combine": ["advantages"],
}  # fmt: skip
CHOICES = ("mixed_precision", "curriculum", "sampling", "selection.images", "selection.advantage", "train.objective",
           "train.step_weight", "wandb_mode", "reward.dtype", "reward.combine", "sample.sde", "reward.compose.score",
           "reward.vlm.score", "reward.vlm.unreadable")  # fmt: skip
PLACES = ("pretrained.model", "reward.clip.model", "prompt_file", "eval.prompt_file")  # for which the world has a path
# What makes a value count where it would not with SMALL.
BESIDE = {
    "reward.clip.model": {"reward.name": "clip"},
    "reward.pickscore.model": {"reward.name": "pickscore"},
    "reward.bertscore.captioner": {"reward.name": "bertscore"},
    "reward.http.url": {"reward.name": "http"},
    "eval.inception.model": {"eval.diversity": ("inception",)},
}


def valid(key: str, default: Any, paths: dict[str, str]) -> st.SearchStrategy:
    """Values of a key with each of which, by itself, an experiment can be run to its end."""
    if key in paths:
        return st.just(paths[key])
    if key in RUNNABLE:
        return st.sampled_from(RUNNABLE[key])
    limit = KEYS[key].limit
    if isinstance(limit, Number):
        _, low, high, brackets = limit.bounds
        if isinstance(default, int):
            return st.integers(int(low), int(high))
        ends = {"exclude_min": brackets[0] == "(", "exclude_max": brackets[1] == ")"}
        return st.floats(low, high, **ends, allow_subnormal=False) | st.floats(max(low, 0.01), min(0.99 * high, 2.0))
    if isinstance(default, bool):
        return st.booleans()
    assert isinstance(default, str), f"{key}: say which of its values can be run"
    assert isinstance(limit, Text)
    blank = st.just("") if limit.may_be_empty else st.nothing()
    return blank | st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=300)


def invalid(key: str, default: Any) -> st.SearchStrategy:
    """Values of a key with each of which a run must be refused; (value, whether only Python can give it)."""
    given = st.sampled_from(REFUSED[key]) if key in REFUSED else st.nothing()
    if key in CHOICES:
        given |= st.text(max_size=20).filter(lambda text: text not in RUNNABLE[key] and text != "fp16")
    if key in BESIDE:
        given |= st.sampled_from(NO_MODEL)
    limit = KEYS[key].limit
    if isinstance(limit, Number):
        single, low, high, _ = limit.bounds
        if isinstance(default, int):
            given |= st.integers(max_value=int(low) - 1) | st.integers(min_value=int(high) + 1)
            given |= st.sampled_from([-(10**30), 10**30, 10**400])
        else:
            given |= st.floats(max_value=low, exclude_max=True) | st.floats(min_value=high, exclude_min=True)
            given |= st.sampled_from([float("nan"), float("inf"), float("-inf")])
        given = given.filter(lambda value: value != single)
    elif isinstance(default, str):
        free = isinstance(limit, Text) and limit.may_have_lines
        given |= st.sampled_from(["\ud800", "a\ud8ffb"] if free else ["a\nb", "\x00", "\x1b[2J", "\ud800"])
        optional = isinstance(limit, Text) and limit.may_be_empty
        given |= st.just(" ") if optional else st.sampled_from(["", " ", "\t"])
    others = [None, 1.5, 7, "five", [1], {"a": 1}, b"x", float("nan"), object]
    fits = {int: (int,), float: (int, float), str: (str,), tuple: (list, tuple), bool: (bool,), type(None): (object,)}
    kinds = fits[type(default)]
    wrong = st.sampled_from([value for value in others if not isinstance(value, kinds)] or [b"x"])
    return st.tuples(given, st.just(False)) | st.tuples(wrong, st.just(True))


# ---- where it happens ----


@dataclass(frozen=True)
class World:
    """What inputs are made from, and where they are tried."""

    settings: dict[str, Any]
    boxes: Path
    full: bool  # all of them, or a few that are always the same
    tally: Tally = field(default_factory=Tally)

    @contextlib.contextmanager
    def box(self) -> Iterator[Path]:
        """A folder with a work folder in it, which holds a file and a link to nowhere."""
        box = self.boxes / "box"
        (box / "work").mkdir(parents=True)
        (box / "work" / "file").write_text("mine")
        (box / "work" / "dangling").symlink_to("nowhere")
        try:
            yield box
        finally:
            shutil.rmtree(box)

    def repeat(self, count: int, *strategies: st.SearchStrategy) -> Callable[[Callable], None]:
        """Calls the function with `count` generated inputs, or fewer where there are not so many."""
        how = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

        def run(body: Callable) -> None:
            @hypothesis.settings(max_examples=max(1, count), derandomize=not self.full, **how)
            @given(st.tuples(*strategies))
            def each(case: tuple) -> None:
                body(*case)

            if count:
                each()

        return run


def try_configurations(world: World, num_valid: int, num_invalid: int, keys: list[str]) -> None:
    """One key at a time: a value that works runs to its end; one that does not is refused first of all, by name."""
    paths = {key: world.settings[key] for key in PLACES}
    for key in keys:
        default = DEFAULTS[key]

        @world.repeat(num_valid, valid(key, default, paths), st.booleans())
        def runs(value: Any, by_flags: bool, key: str = key) -> None:
            verbs = ("plan", *VERBS, "eval") if key.startswith("eval.") else ("plan", *VERBS)
            settings = world.settings | {key: value}
            with world.box() as box:
                verb, said = attempt(box, settings, verbs, by_flags=by_flags)
                assert not said, f"{key}={value!r:.200} by {verb}: {said}"
                assert_complete(box / "work", settings)
            world.tally.hit["valid"].add(key)
            world.tally.count("configurations", said)

        @world.repeat(num_invalid, invalid(key, default), st.booleans())
        def is_refused(value: tuple[Any, bool], by_flags: bool, key: str = key) -> None:
            value, python_only = value
            settings = world.settings | BESIDE.get(key, {}) | {key: value}
            with world.box() as box:
                first = () if key in ("exp_name", "log_path") else ("plan",)  # which, like this, writes no log
                verb, said = attempt(box, settings, (*first, *VERBS), by_flags=by_flags and not python_only)
                assert said, f"{key}={value!r:.200} was run"
                assert names(said, key, value) or names(said, key.rpartition(".")[2], value), said
                assert verb in ("plan", "sample"), f"{key}={value!r:.200} was refused by {verb}: {said}"
            world.tally.hit["invalid"].add(key)
            world.tally.count("configurations", said)


def try_combinations(world: World, count: int) -> None:
    """Several keys at once: refused by the name of one of them, or run."""
    paths = {key: world.settings[key] for key in PLACES}

    def change(key: str) -> st.SearchStrategy:
        works = st.tuples(valid(key, DEFAULTS[key], paths), st.just(False))
        return st.tuples(st.just(key), works | works | invalid(key, DEFAULTS[key]))

    one = st.sampled_from(list(DEFAULTS)).flatmap(change)

    @world.repeat(count, st.lists(one, min_size=2, max_size=4, unique_by=lambda pair: pair[0]), st.booleans())
    def runs_or_is_refused(changes: list[tuple[str, tuple[Any, bool]]], by_flags: bool) -> None:
        changed = {key: value for key, (value, _) in changes}
        python_only = any(only for _, (_, only) in changes)
        settings = world.settings | changed
        with world.box() as box:
            _, said = attempt(box, settings, ("plan", *VERBS), by_flags=by_flags and not python_only)
            if said:
                assert any(names(said, key.rpartition(".")[2], value) for key, value in changed.items()), said
            else:
                assert_complete(box / "work", settings)
        world.tally.count("combinations", said)


# ---- prompt files ----

# Texts that are prompts, whatever one thinks of them.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
PROMPT = TEXT | st.sampled_from(
    [*PROMPTS, "b" * 10_000, "木" * 10_000, "a\tred\x07circle", "\u202eright to left", "'; --", "é́"]
)
NO_PROMPT = st.sampled_from(
    ["", " ", "\n", "\u3000", None, 7, -1.5, True, [], ["a cat"], {}, {"prompt": "a cat"}, "\ud800", "a\udfff"]
)
BROKEN = [
    b"", b"\n\n", b"[", b'["a cat", ', b'{"prompt": ', b"[" * 5000 + b"]" * 5000, b"[" + b"9" * 5000 + b"]", b"nan",
    b"\xff\xfe", b"\x89PNG\r\n\x1a\n\x00", b"a cat\xff", '["ein Vögelchen"]'.encode("latin-1"), '["a cat"]'.encode("utf-16"),
    b'{"a": "cat"}',
    b"null", b'"a cat"', b"7", b"[[]]", b"[" * 900 + b"]" * 900, b'["a cat",]', b"[NaN]", b"prompt\n1e999", b"\x00", b"[\n]",
]  # fmt: skip
FILE_NAME = st.sampled_from(["p", "a b", "größe", "..p", "p.tar", "-p", "n" * 200])


@dataclass(frozen=True)
class PromptFile:
    """How a prompt file is made: its name, its bytes or what it is instead, and the prompts in it, or None."""

    name: str
    content: bytes | str
    prompts: tuple[str, ...] | None

    def make(self, folder: Path) -> Path:
        path = folder / self.name
        match self.content:
            case bytes() as data:
                path.write_bytes(data)
            case "folder":
                path.mkdir()
            case "link to nowhere":
                path.symlink_to("nowhere")
            case "link":
                path.with_name("linked").write_text(json.dumps(PROMPTS))
                path.symlink_to("linked")
            case "link to itself":
                path.symlink_to(path.name)
            case "pipe":
                os.mkfifo(path)
        return path


def written(suffix: str, prompts: list) -> bytes:
    """A prompt file's bytes."""
    if suffix == ".json":
        return json.dumps(prompts).encode()
    if suffix == ".jsonl":
        return "".join(json.dumps({"prompt": prompt, "id": n}) + "\n\n" for n, prompt in enumerate(prompts)).encode()
    return "\n".join(prompts).encode()


@st.composite
def prompt_files(draw: st.DrawFn) -> PromptFile:
    kind = draw(st.sampled_from(["good", "good", "one bad", "broken", "random", "no file"]))
    suffix = draw(st.sampled_from([".json", ".jsonl", ".txt"]))
    name = draw(FILE_NAME)
    if kind == "no file":
        content = draw(st.sampled_from(["missing", "folder", "link to nowhere", "link", "link to itself", "pipe", "long"]))
        name = "n" * 300 if content == "long" else name
        return PromptFile(f"{name}.json", content, tuple(PROMPTS) if content == "link" else None)
    if kind == "random":
        return PromptFile(name + draw(st.sampled_from([".csv", ".json", ".jsonl", ""])), draw(st.binary(max_size=60)), None)
    if kind == "broken":
        return PromptFile(
            name + draw(st.sampled_from([".json", ".jsonl", ".csv", ".JSON"])), draw(st.sampled_from(BROKEN)), None
        )
    prompts = draw(st.lists(PROMPT, min_size=1, max_size=4))
    prompts += prompts[:1] * draw(st.integers(0, 2))  # some twice
    if kind == "one bad":
        suffix = ".json" if suffix == ".txt" else suffix
        prompts.insert(draw(st.integers(0, len(prompts))), draw(NO_PROMPT))
        return PromptFile(name + suffix, written(suffix, prompts), None)
    if suffix == ".txt":  # there a line is a prompt
        prompts = [line.strip() for prompt in prompts for line in re.split(r"[\r\n]", prompt) if line.strip()]
    mark = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    return PromptFile(name + suffix, mark + written(suffix, prompts), tuple(prompts))


def try_prompt_files(world: World, count: int) -> None:
    """What holds prompts and nothing else is trained on, those prompts; anything else is refused by its name."""

    @world.repeat(count, prompt_files(), st.booleans())
    def runs_or_is_refused(file: PromptFile, by_flags: bool) -> None:
        with world.box() as box:
            path = file.make(box)
            settings = world.settings | {"prompt_file": f"../{path.name}"}
            _, said = attempt(box, settings, ("plan", *VERBS), by_flags=by_flags)
            if said:
                assert file.prompts is None, f"{file} was refused: {said}"
                assert path.name in said, said
            else:
                assert file.prompts, f"{file} was run"
                assert_complete(box / "work", settings)
                drawn = json.loads((experiment(box / "work") / "stage0" / "prompts.json").read_text())
                assert set(drawn) <= set(file.prompts)
        world.tally.count("prompt files", said)


# ---- stage folders ----

# How far an experiment of two stages is, by what is run of it, and then taken away of what an interruption leaves out.
HALF_SAMPLED = ("sample.json", "prompts.json", "metrics/sample.jsonl", "samples/batch_00001.safetensors")
HALF_TRAINED = ("train.json", "checkpoints/checkpoint_2")
STATES = {
    "half sampled": (0, ("sample",), HALF_SAMPLED),
    "sampled": (0, ("sample",), ()),
    "selected": (0, ("sample", "select"), ()),
    "half trained": (0, VERBS, HALF_TRAINED),
    "trained": (0, VERBS, ()),
    "next half sampled": (1, ("sample",), HALF_SAMPLED),
    "next sampled": (1, ("sample",), ()),
    "next selected": (1, ("sample", "select"), ()),
}
TWO_STAGES = {"sample.num_batches_per_epoch": 2, "train.num_epochs": 2, "keep.samples": True, "split_step_left": 2}
NOTES = "notes of mine.txt"
ACTIONS = ("delete", "empty", "cut", "flip", "append", "folder", "other file", "link to nowhere", "foreign", "temporary")


def damage(path: Path, action: str, place: float, other: Path) -> None:
    """Do one of ACTIONS to a file; `place` is where in it."""
    data = path.read_bytes()
    where = min(int(place * len(data)), len(data) - 1)
    match action:
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(data[:where])
        case "flip":
            path.write_bytes(data[:where] + bytes([data[where] ^ 0x10]) + data[where + 1 :])
        case "append":
            path.write_bytes(data + b"\0")
        case "other file":
            path.write_bytes(other.read_bytes())
        case "foreign":
            path.with_name(NOTES).write_text("keep")
        case "temporary":
            path.with_name(path.name + ".tmp").write_bytes(data[:where])
        case "delete":
            path.unlink()
        case "folder" | "link to nowhere":
            path.unlink()
            path.mkdir() if action == "folder" else path.symlink_to("nowhere")


@dataclass(frozen=True)
class Began:
    """An experiment that is as far as one of STATES says, and as it ends if nothing happens to it."""

    folder: Path
    index: int
    files: tuple[str, ...]  # by which it can be damaged
    ended: dict[str, object]


def begin(world: World, state: str) -> Began:
    index, verbs, lacking = STATES[state]
    settings = world.settings | TWO_STAGES
    folder = world.boxes / state
    if index:
        run_stage(folder := make_folder(folder), settings)
    run_stage(make_folder(folder), settings, index, verbs)
    for name in lacking:
        path = experiment(folder) / f"stage{index}" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    ended = shutil.copytree(folder, world.boxes / f"{state}, ended")
    run_stage(ended, settings, index)
    files = tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
    return Began(folder, index, files, comparable(ended))


def experiment_in(record: bytes) -> dict[str, Any]:
    """A config.json without the stage at which it was written."""
    found = json.loads(record)
    return {key: found[key] for key in ("prompts_sha256", "num_threads")} | {"config": found["config"] | {"run_name": ""}}


def remove(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def try_stage_folders(world: World, count: int, states: Sequence[str]) -> None:
    """A damaged experiment is made whole, to the bit, or refused by the damaged file's name. What is finished, and nothing
    more is made of, may stay as it is; what is not ours stays in any case."""
    begun = {state: begin(world, state) for state in states}
    cases = st.sampled_from(list(begun)).flatmap(
        lambda state: st.tuples(st.just(state), *[st.sampled_from(begun[state].files)] * 2)
    )

    @world.repeat(count, cases, st.sampled_from(ACTIONS), st.floats(0, 1), st.booleans())
    def is_mended_or_refused(case: tuple[str, str, str], action: str, place: float, by_flags: bool) -> None:
        state, name, other = case
        one = begun[state]
        with world.box() as box:
            shutil.copytree(one.folder, box / "work", dirs_exist_ok=True)
            path = box / "work" / name
            damage(path, action, place, one.folder / other)
            damaged = content(path)
            settings = world.settings | TWO_STAGES | {"run_name": f"stage{one.index}"}
            _, said = attempt(box, settings, VERBS, by_flags=by_flags)
            where = f"{action} of {name} when {state}"
            if said:
                assert action not in ("foreign", "temporary"), f"{where}: {said}"
                assert path.name in said or path.parent.name in said, f"{where}: {said}"
            else:
                expected = dict(one.ended)
                if action not in ("foreign", "temporary") and content(path) == damaged:
                    remove(path)
                    del expected[name]
                (box / "work" / "file").unlink()
                after = comparable(box / "work")
                if name.endswith("config.json") and name in expected:  # it may have been lost, and written anew
                    assert experiment_in(after.pop(name)) == experiment_in(expected.pop(name)), where
                strange = {found for found in after if found not in one.ended}
                assert {Path(found).suffix for found in strange} <= {".tmp", ".txt"}, f"{where}: {strange}"
                assert action != "foreign" or str(Path(name).with_name(NOTES)) in strange, where
                differing = {found for found in expected if after.get(found) != expected[found]}
                assert not differing, f"{where}: {differing} are others"
        world.tally.count("stage folders", said)


# ---- the test ----


@pytest.mark.parametrize("full", [pytest.param(False, id="few"), pytest.param(True, id="bulk", marks=pytest.mark.bulk)])
def test_whatever_is_given_is_run_or_refused_and_nothing_is_lost(models, tmp_path, capsys, full):
    """In bulk at least 2,000 inputs, one in ten of which runs to its end, and every key with values that can be run and with
    values that cannot; of the few, every key with one that cannot."""
    settings = SMALL | {"pretrained.model": str(models / "sd"), "reward.clip.model": str(models / "clip")}
    settings |= {key: str(models / "prompts.json") for key in ("prompt_file", "eval.prompt_file")}
    world, started, threads = World(settings, tmp_path, full), time.perf_counter(), torch.get_num_threads()
    states = list(STATES) if full else ["sampled", "half trained"]
    with mock.patch.object(policy, "_kept", {}):  # base models are loaded once
        try_configurations(world, 0, 12 if full else 1, list(DEFAULTS))
        try_configurations(world, 2 if full else 1, 0, list(DEFAULTS) if full else ["exp_name", "eval.seed", "train.eps"])
        try_combinations(world, 160 if full else 4)
        try_prompt_files(world, 260 if full else 6)
        try_stage_folders(world, 240 if full else 4, states)
    AcceleratorState._reset_state()
    torch.set_num_threads(threads)
    world.tally.seconds = time.perf_counter() - started
    with capsys.disabled():
        print("", *world.tally.lines(), sep="\n")
    assert world.tally.hit["invalid"] == {*DEFAULTS}
    if full:
        assert world.tally.total(RAN, REFUSED_IT) >= 2000
        assert world.tally.total(RAN) >= world.tally.total(RAN, REFUSED_IT) / 10
        assert world.tally.hit["valid"] == {*DEFAULTS}
