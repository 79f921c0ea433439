"""Damaged files, full disks and folders in which nothing can be written: named, redone or refused, and never trained on."""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from conftest import (
    VERBS,
    Ended,
    assert_refused,
    assert_same,
    call,
    experiment,
    refuse,
    run_evaluation,
    run_script,
    run_stage,
    snapshot,
)

from b2diffurl import export, report
from b2diffurl.experiment.checkpoints import OPTIMIZER_FILE, STATE_FILE
from b2diffurl.experiment.folder import resolve_checkpoint
from b2diffurl.experiment.metrics import read_events
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.experiment.trajectories import batch_damage
from b2diffurl.reporting import page
from b2diffurl.runtime import files

JUDGE = ("--checkpoint=base,last", "--sampler=training")


def flip(data: bytes, bit: int) -> bytes:
    """The data with one bit another."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def flip_in_the_middle(data: bytes) -> bytes:
    return flip(data, 8 * (len(data) // 2))


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip_a_digit(data: bytes) -> bytes:
    """JSON stays JSON: the last 1 to 8 before the checksum is one less or more."""
    end = data.rfind(files.SEAL.encode())
    place = max(data.rfind(digit, 0, end if end > 0 else len(data)) for digit in (b"2", b"3", b"4", b"5", b"6", b"7"))
    return flip(data, 8 * place)


@pytest.fixture
def work(workplace) -> Path:
    return workplace


def unfinish(folder: Path, verb: str, index: int = 1) -> Stage:
    """Take back the end of a phase of a stage, and those after it; returns the stage."""
    stage = Stage(experiment(folder), index)
    for later in VERBS[VERBS.index(verb) :]:
        stage.manifest_path(later).unlink(missing_ok=True)
    return stage


# ---- what is read only if it is what was written ----


def test_every_flipped_bit_of_a_record_is_found(tmp_path):
    """Whichever bit of a manifest or of an evaluation's rows it is: the file is named, or the same values are read."""
    rows = [{"seed": 3, "name": 'é "x" {}', "seconds": {"load": 0.25}, "steps": [1, None], "scale": 1e-3}, {"n": 1}]
    files.write_record(tmp_path / "record.json", rows[0])
    files.write_json_lines(tmp_path / "rows.jsonl", rows, sealed=True)
    for name, read in (("record.json", lambda path: [files.read_json(path)]), ("rows.jsonl", files.read_json_lines)):
        path, found = tmp_path / name, 0
        whole, expected = path.read_bytes(), read(path)
        assert expected == rows[: len(expected)]
        for bit in range(8 * len(whole)):
            path.write_bytes(flip(whole, bit))
            try:
                read_now = read(path)
            except ValueError as error:
                assert str(path) in str(error)
                found += 1
            else:
                same = [{key: now[key] for key in row} for now, row in zip(read_now, expected, strict=True)]
                assert same == expected
        assert found > 0.8 * 8 * len(whole)  # the others are in the checksum's own name


def test_every_flipped_bit_of_a_sampling_batch_is_found(finished, tmp_path):
    """In its header, a bit of 13, and at 100 places of its tensors; it passes as it was."""
    stage = Stage(shutil.copytree(experiment(finished), tmp_path / "copy"), 1)
    path = stage.batch(1)
    assert batch_damage(path) == ""
    whole = path.read_bytes()
    header = 8 * (8 + int.from_bytes(whole[:8], "little"))
    bits = [*range(0, header, 13), *random.Random(0).sample(range(header, 8 * len(whole)), 100)]
    for bit in bits:
        path.write_bytes(flip(whole, bit))
        assert str(path) in batch_damage(path), bit


# ---- files of each kind ----

REFUSED = [  # what is damaged, of stage 1 or a path in the experiment, and the script that meets it
    ("config.json", "sample"),
    ("stage0/train.json", "sample"),
    (f"stage0/checkpoints/checkpoint_2/{LORA_FILE}", "sample"),
    (f"stage0/checkpoints/checkpoint_2/{OPTIMIZER_FILE}", "sample"),
    (f"stage0/checkpoints/checkpoint_2/{STATE_FILE}", "sample"),
    ("stage0/scores.jsonl", "select"),
    ("stage0/select.json", "select"),
    ("stage1/sample.json", "select"),
    ("stage1/samples/batch_00001.safetensors", "select"),
    ("stage1/images/00003.png", "select"),
    ("stage1/prompts.json", "select"),
    ("stage1/select.json", "train"),
    ("stage1/sample.json", "train"),
    ("stage1/scores.jsonl", "train"),
    ("stage1/selection.json", "train"),
    ("stage1/selected/batch_00001.safetensors", "train"),
    ("stage1/metrics/select.jsonl", "train"),
    (f"stage1/checkpoints/checkpoint_2/{LORA_FILE}", "eval"),
    (f"stage1/checkpoints/checkpoint_2/{STATE_FILE}", "eval"),
    ("stage1/train.json", "eval"),
]


@pytest.mark.parametrize(("name", "verb"), REFUSED)
def test_what_a_finished_phase_left_is_refused_if_it_is_damaged(work, overrides, name, verb):
    """Cut to its half, or with one bit flipped, also so that JSON stays JSON: the first script that reads the file names it,
    and says what to do; nothing else is changed."""
    if verb in VERBS:
        unfinish(work, verb)
    if verb == "train":
        shutil.rmtree(experiment(work) / "stage1" / "checkpoints")
    path = experiment(work) / name
    whole = path.read_bytes()
    settings = overrides | {"run_name": "stage1"}
    for damage in (cut, flip_in_the_middle, *((flip_a_digit,) if name.endswith(("json", "jsonl")) else ())):
        path.write_bytes(damage(whole))
        arguments = ("--checkpoint=last",) if verb == "eval" else ()
        refuse(work, verb, settings, rf"{re.escape(path.name)}.*([Dd]elete|again)", arguments=arguments)


UNFINISHED = [
    ("sample", "samples/batch_00001.safetensors", cut),
    ("sample", "samples/batch_00001.safetensors", flip_in_the_middle),
    ("sample", "images/00003.png", flip_in_the_middle),
    ("sample", "tree.png", flip_in_the_middle),
    ("sample", "tree.json", flip_a_digit),
    ("select", "scores.jsonl", flip_a_digit),
    ("select", "selection.json", cut),
    ("select", "selected/batch_00001.safetensors", flip_in_the_middle),
    ("train", f"checkpoints/checkpoint_1/{LORA_FILE}", flip_in_the_middle),
    ("train", f"checkpoints/checkpoint_2/{LORA_FILE}", cut),
    ("train", f"checkpoints/checkpoint_2/{OPTIMIZER_FILE}", flip_in_the_middle),
    ("train", f"checkpoints/checkpoint_2/{STATE_FILE}", flip_a_digit),
]


@pytest.mark.parametrize(("verb", "name", "damage"), UNFINISHED)
def test_what_an_unfinished_phase_left_is_made_again_if_it_is_damaged(finished, work, overrides, verb, name, damage):
    """Cut or flipped in an interrupted phase: the same command makes it again, bit for bit, and the log names it."""
    stage = unfinish(work, verb)
    path = stage.folder / name
    path.write_bytes(damage(path.read_bytes()))
    ended = run_script(work, verb, overrides | {"run_name": "stage1"})
    assert ended.code == 0, ended.stderr
    if verb != "select":  # which is made as a whole in any case
        assert re.search(rf"{re.escape(path.name)} is .*again|again: .*{re.escape(path.name)} is ", ended.stdout), ended
    for later in VERBS[VERBS.index(verb) + 1 :]:
        shutil.copy(experiment(finished) / "stage1" / f"{later}.json", stage.folder)
    assert_same(work, finished)


def test_a_damaged_log_of_updates_does_not_change_an_update(finished, work, overrides):
    """metrics/train.jsonl says how far an interrupted training is; if it lacks updates, it is named, and without its
    checkpoints the stage ends in the same bits."""
    stage = unfinish(work, "train")
    shutil.rmtree(stage.checkpoint(2))
    path = stage.metrics("train")
    path.write_bytes(b"#" + path.read_bytes()[1:])
    settings = overrides | {"run_name": "stage1"}
    refuse(work, "train", settings, r"train\.jsonl is damaged.*Delete .*stage1/checkpoints")
    shutil.rmtree(stage.folder / "checkpoints")
    assert run_script(work, "train", settings).code == 0
    assert_same(work, finished)


@pytest.mark.parametrize("line", [b'{"evenu": "update"}', b"5", b"{", b'{"event": "\xff"}'])
def test_events_that_are_damaged_are_named(tmp_path, line):
    """But for a last line without an end, as a crash leaves it."""
    path = tmp_path / "train.jsonl"
    whole = b'{"event": "update"}\n'
    path.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(ValueError, match=r"train\.jsonl is damaged"):
        read_events(path)
    path.write_bytes(whole + b'{"event": "upd')
    assert read_events(path) == [{"event": "update"}]


def test_a_folder_in_a_records_place_is_refused(work, overrides):
    """Before anything is done that could not be finished."""
    path = experiment(work) / "stage1" / "select.json"
    path.unlink()
    path.mkdir()
    before = snapshot(experiment(work))
    assert_refused(run_script(work, "select", overrides | {"run_name": "stage1"}), r"select\.json is a folder.*Move it away")
    assert snapshot(experiment(work)) == before


def test_what_decides_shapes_and_what_was_judged(work, overrides):
    """batch_sizes.json, an evaluation's result and the table of all: named; deleted, they are made again as they were."""
    root = experiment(work)
    run_evaluation(work, overrides)
    judged = snapshot(root)
    for path in (root / "eval.jsonl", *root.glob("eval/stage1*/result.json")):
        whole = path.read_bytes()
        for damage in (cut, flip_in_the_middle, flip_a_digit):
            path.write_bytes(damage(whole))
            said = rf"{re.escape(path.name)} is damaged.*Delete it"
            assert_refused(run_script(work, "eval", overrides, *JUDGE), said)
        path.unlink()
        run_evaluation(work, overrides)
        assert snapshot(root) == judged
    path = root / "batch_sizes.json"
    entry = {"key": "sample.decode_batch_size", "device": "cpu", "wanted": 16, "size": 4}
    files.write_record(path, {"sizes": [entry]})
    whole = path.read_bytes()
    unfinish(work, "sample")
    for damage in (cut, flip_in_the_middle, flip_a_digit):
        path.write_bytes(damage(whole))
        refuse(work, "sample", overrides | {"run_name": "stage1"}, r"batch_sizes\.json is damaged.*Delete it")


def test_a_report_shows_no_damaged_tree(work):
    """tree.png, tree.json: the page is not made, and the file is named."""
    root = experiment(work)
    for name, damage in itertools.product(("tree.png", "tree.json"), (cut, flip_in_the_middle)):
        path = root / "stage1" / name
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        with pytest.raises(ValueError, match=rf"{re.escape(name)} (is damaged|is not what the sample phase wrote)"):
            page.draw_trees(root)
        path.write_bytes(whole)


def test_damaged_weights_from_elsewhere(finished, work, overrides, tmp_path):
    """A checkpoint taken as a start, or exported by its path, is compared with the state.json beside it; a prompt file that
    has changed is another experiment's."""
    copied = shutil.copytree(Stage(experiment(finished), 1).checkpoint(2), tmp_path / "copied")
    whole = (copied / LORA_FILE).read_bytes()
    (copied / LORA_FILE).write_bytes(flip(whole, 8 * len(whole) - 1))
    shutil.rmtree(experiment(work))
    start = overrides | {"resume_from": str(copied)}
    refuse(work, "sample", start, rf"copied/{LORA_FILE} is damaged \(checksum\)")
    refuse(work, "eval", overrides, rf"copied/{LORA_FILE} is damaged", arguments=(f"--checkpoint={copied}",))
    (copied / LORA_FILE).write_bytes(whole)
    assert run_script(work, "sample", start).code == 0


def test_a_lost_configuration_is_written_again(work, overrides):
    """config.json, deleted as its error says, comes back with the next run of any stage, the same to the last bit."""
    path = experiment(work) / "config.json"
    whole = path.read_bytes()
    path.unlink()
    assert run_script(work, "sample", overrides).code == 0
    found = json.loads(path.read_bytes())
    assert found["num_threads"] == json.loads(whole)["num_threads"]
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_no_damage_reaches_the_weights(finished, overrides, tmp_path):
    """A file of every kind there is after each phase of two stages, cut, or with some bit of it flipped, and the run gone on
    with: it ends in the undisturbed run's LoRA, bit for bit, or is refused in two lines that name the file. With -s it says
    how many."""
    chain = [(index, verb) for index in range(2) for verb in VERBS]
    chance, outcomes = random.Random(0), Counter()
    expected = (Stage(experiment(finished), 1).checkpoint(2) / LORA_FILE).read_bytes()
    base = tmp_path / "base"
    base.mkdir()
    for done, (index, verb) in enumerate(chain):
        run_stage(base, overrides, index, verbs=[verb])
        kinds = {re.sub(r"\d+\.(png|safetensors)$", "", name): name for name in snapshot(experiment(base))}
        for name, damage in itertools.product(
            kinds.values(), (cut, lambda data: flip(data, chance.randrange(8 * len(data))))
        ):
            place = shutil.copytree(base, tmp_path / "place")
            path = experiment(place) / name
            path.write_bytes(damage(path.read_bytes()))
            outcomes[go_on(place, overrides, chain[done + 1 :], path, expected)] += 1
            shutil.rmtree(place)
    print(f"{outcomes.total()} faults: {dict(outcomes)}")
    assert set(outcomes) == {"refused", "the same weights"}


def go_on(place: Path, overrides: dict, rest: list[tuple[int, str]], damaged: Path, expected: bytes) -> str:
    """How a run with a damaged file ends: `refused` for it, or in `the same weights`."""
    for index, verb in rest:
        ended = run_script(place, verb, overrides | {"run_name": f"stage{index}"})
        if ended.code:
            assert_refused(ended, re.escape(damaged.name))
            return "refused"
    try:
        lora = resolve_checkpoint(experiment(place), "last")
    except ValueError as error:
        assert damaged.name in str(error)
        return "refused"
    assert lora.read_bytes() == expected, damaged
    return "the same weights"


# ---- disks ----


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of 8 MB of its own; skipped where this process may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)]
        made = subprocess.run(command, capture_output=True, text=True)
        problem = made.stderr.strip() if made.returncode else ""
    except FileNotFoundError as error:
        problem = str(error)
    if problem:
        pytest.skip(f"no disk of its own: {problem}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextlib.contextmanager
def filled(disk: Path, *, left: int) -> Iterator[None]:
    """Inside it the disk is full but for about `left` bytes."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        space = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - left)
    try:
        yield
    finally:
        filler.unlink()


def run_out(disk: Path, rooms: Sequence[int], run: Callable[[], Ended]) -> None:
    """Run on a disk with nothing left, and with other `rooms`, and then with all there is; failures must be told."""
    failures = 0
    for left in (0, *rooms):
        with filled(disk, left=left):
            ended = run()
        if ended.code:
            assert_refused(ended, "No space left on device: '[^']+'")
            assert "Make room on that disk and run the same command again" in ended.stderr.splitlines()[1]
            assert not [path for path in disk.rglob("*" + files.TEMPORARY) if path.is_file()]  # it would take up room
            failures += 1
    assert failures >= 1
    ended = run()
    assert ended.code in (0, None), ended.stderr


MANY_ROOMS = pytest.param([4_096 * n**2 for n in range(1, 16)], marks=pytest.mark.slow)


@pytest.mark.parametrize("rooms", [(70_000,), MANY_ROOMS])
@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk(finished, disk, overrides, verb, rooms):
    """A phase ends in two lines that name the file and say what to do, wherever the disk was full, log and all; with room
    again the same command ends in the same bits, and leaves no temporary file."""
    work = shutil.copytree(finished, disk / "work")
    stage = unfinish(work, verb)
    doomed = {"sample": ("samples", "images", "checkpoints", "selected"), "select": ("selected",), "train": ("checkpoints",)}
    for name in doomed[verb]:
        shutil.rmtree(stage.folder / name)
    settings = overrides | {"run_name": "stage1"}
    run_out(disk, rooms, lambda: run_script(work, verb, settings))
    assert not list(work.rglob("*" + files.TEMPORARY))
    for later in VERBS[VERBS.index(verb) + 1 :]:
        assert run_script(work, later, settings).code == 0
    assert_same(work, finished)


@pytest.mark.parametrize("rooms", [(), MANY_ROOMS])
@pytest.mark.parametrize("form", ["diffusers", "pipeline"])
def test_exporting_on_a_full_disk(finished, workplace, disk, form, rooms):
    """The same for exports."""
    work = shutil.copytree(finished, disk / "work")
    command = ["export.py", "tiny", f"--format={form}"]
    run_out(disk, rooms, lambda: call(work, command, export.main))
    assert not list(work.rglob("*" + files.TEMPORARY))
    assert not call(workplace, command, export.main).code
    assert snapshot(experiment(work)) == snapshot(experiment(workplace))


@pytest.mark.slow
@pytest.mark.parametrize("rooms", [(), MANY_ROOMS])
def test_judging_and_reporting_on_a_full_disk(finished, workplace, disk, overrides, rooms):
    """The same for run_eval.py and the report, which is made with the evaluation, and on its own."""
    work = shutil.copytree(finished, disk / "work")
    run_out(disk, rooms, lambda: run_script(work, "eval", overrides, "--checkpoint=last", "--sampler=training"))
    run_out(disk, (), lambda: call(work, ["report.py", "tiny"], report.main))
    assert not list(work.rglob("*" + files.TEMPORARY))
    run_evaluation(workplace, overrides, "last")
    assert not call(workplace, ["report.py", "tiny"], report.main).code
    done, expected = snapshot(experiment(work)), snapshot(experiment(workplace))
    # the page's size of all files has its own in it
    assert {name for name in done if done[name] != expected[name]} <= {"report.html"}
    assert done.keys() == expected.keys()


@pytest.fixture
def locked(tmp_path) -> Iterator[Callable[[Path], None]]:
    """locked(folder) makes a folder one in which nothing can be written; for root by mounting it on itself, read-only."""
    undo = []

    def lock(folder: Path) -> None:
        if os.geteuid():
            folder.chmod(0o500)
            undo.append(lambda: folder.chmod(0o700))
            return
        try:
            subprocess.run(["mount", "--bind", folder, folder], check=True, capture_output=True)
            undo.append(lambda: subprocess.run(["umount", "--lazy", folder], check=True))
            subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True, capture_output=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            pytest.skip(f"root may write everywhere, and nothing can be mounted read-only: {error}")

    yield lock
    for each in reversed(undo):
        each()


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_in_which_nothing_can_be_written(work, overrides, locked, verb):
    """Before any work, the folder is named with what to do, and nothing is changed. What is finished there can be read: a
    finished phase is skipped, and a plan made."""
    unfinish(work, verb)
    place = (experiment(work) / "stage1").resolve()
    locked(place)
    settings = overrides | {"run_name": "stage1"}
    before = snapshot(work)
    ended = run_script(work, verb, settings)
    assert_refused(ended, r"nothing can be written here: '.*stage1'")
    assert "--config.save_path" in ended.stderr
    assert snapshot(work) == before
    assert run_script(work, verb, settings | {"run_name": "stage0"}).code == 0


def test_an_experiment_s_folder_that_cannot_be_written(work, overrides, locked):
    """Nor can evaluations, reports and exports: two lines each, with the path."""
    root = experiment(work).resolve()
    locked(root)
    for ended in (
        run_script(work, "eval", overrides, *JUDGE),
        call(work, ["report.py", "tiny"], report.main),
        call(work, ["export.py", "tiny"], export.main),
    ):
        assert_refused(ended, r"Read-only file system|Permission denied")
        assert "Make that place writable" in ended.stderr


def test_a_log_that_cannot_be_written(work, overrides, locked):
    """Is told before any work, with the option that says where it goes."""
    (work / "log").mkdir(exist_ok=True)
    locked((work / "log").resolve())
    for name in ("tiny", "another"):
        ended = run_script(work, "sample", overrides | {"exp_name": name})
        assert_refused(ended, rf"the log cannot be written: .*log/{name}\.log")
        assert "--config.log_path" in ended.stderr
