"""Files: every flipped bit is found; full disks, and folders in which nothing can be written, are named."""

import contextlib
import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import (
    JUDGE,
    VERBS,
    Ended,
    assert_refused,
    assert_same,
    call,
    experiment,
    flip,
    run_evaluation,
    run_script,
    snapshot,
    unfinish,
)

from b2diffurl import export, report
from b2diffurl.experiment.checkpoints import save_checkpoint
from b2diffurl.experiment.metrics import read_events
from b2diffurl.experiment.stage import Stage
from b2diffurl.runtime import files


@pytest.mark.long
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
    run_evaluation(workplace, overrides, ["last"])
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


# ---- what somebody else may have put there ----


@pytest.fixture
def precious(tmp_path) -> Path:
    """A file of the user's that nobody may touch."""
    path = tmp_path / "precious"
    path.write_text("mine")
    return path


def test_no_write_goes_through_a_link(precious, tmp_path):
    """At a temporary name a link is replaced, and its target stays; so is what an interrupted write has left."""
    for name, kind in (("report.html", "link"), ("eval.jsonl", "dangling"), ("rest.json", "file")):
        temporary = tmp_path / f"{name}.{os.getpid()}.tmp"
        if kind == "file":
            temporary.write_text("half")
        else:
            temporary.symlink_to(precious if kind == "link" else tmp_path / "nowhere")
        files.write_bytes(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
        assert not (tmp_path / name).is_symlink() and not os.path.lexists(temporary)
    (tmp_path / "linked").symlink_to(precious)
    files.write_bytes(tmp_path / "linked", b"new")
    assert precious.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_two_writers_of_one_file(tmp_path):
    """Half-written files of living processes stay, for they rename them; those of ended ones go, and others' files stay."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    half = {name: tmp_path / name for name in (f"page.{os.getppid()}.tmp", f"page.{ended.pid}.tmp", "page.note.tmp")}
    for path in half.values():
        path.write_bytes(b"half")
    files.write_bytes(tmp_path / "page", b"new")
    assert snapshot(tmp_path) == {"page": b"new", f"page.{os.getppid()}.tmp": b"half", "page.note.tmp": b"half"}


def test_all_that_an_interrupted_phase_has_left_goes(tmp_path):
    """Under all temporary names of ours, of whatever process; also what was to be a temporary file."""
    stage = Stage(tmp_path, 0)
    ours = ["prompts.json.tmp", "prompts.json.123.tmp", "scores_of_process_1.json.tmp.123.tmp", "images/00001.png.1.tmp"]
    for name in (*ours, "notes.123.tmp", "prompts.json.old.tmp"):
        (stage.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (stage.folder / name).write_text("half")
    stage.remove_temporaries()
    assert set(snapshot(stage.folder)) == {"notes.123.tmp", "prompts.json.old.tmp"}


@pytest.mark.parametrize("kind", ["folder", "link", "file", "nothing"])
def test_an_empty_folder_is_a_new_one(precious, tmp_path, kind):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    precious.rename(theirs / "precious")
    place = tmp_path / "place.tmp"
    if kind == "folder":
        shutil.copytree(theirs, place)
    elif kind == "link":
        place.symlink_to(theirs)
    elif kind == "file":
        place.touch()
    files.empty_folder(place)
    assert place.is_dir() and not place.is_symlink() and not list(place.iterdir())
    assert (theirs / "precious").read_text() == "mine"


def test_a_checkpoint_is_not_written_through_a_link(tmp_path):
    """Its temporary folder may be a link to a folder of the user's, when training goes on in another's experiment."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (tmp_path / "checkpoint_1.tmp").symlink_to(theirs)
    weight = torch.nn.Parameter(torch.zeros(1))
    save_checkpoint(tmp_path / "checkpoint_1", {"lora": weight}, torch.optim.AdamW([weight]), ["lora"], {"epoch": 1})
    assert (tmp_path / "checkpoint_1" / "state.json").is_file()
    assert not (tmp_path / "checkpoint_1").is_symlink()
    assert not list(theirs.iterdir())


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", [DEEP, '{"a": ' * 100_000, "1" * 1_000_000, "[NaN]", "[-Infinity]", '{"a": 1e999}', "[1e"])
def test_json_that_no_computer_reads_is_damage(tmp_path, text):
    """The file is named, as one of JSON, of JSON lines, of metrics, or as the metadata of tensors."""
    path = tmp_path / "some.json"
    path.write_text(text + "\n" + text)
    for read in (files.read_json, files.read_json_lines, read_events):
        with pytest.raises(ValueError, match=r"some\.json is damaged \(.*\)\. Delete it") as refused:
            read(path)
        assert len(str(refused.value)) < 1000
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}, metadata={"b2diffurl": text}))
    with pytest.raises(ValueError, match=r"some\.json is damaged"):
        files.read_metadata(path)


@pytest.mark.parametrize("name", ["config.json", "stage1/sample.json", "stage0/scores.jsonl"])
def test_an_experiment_with_brackets_in_brackets_is_refused(work, overrides, name):
    """In two lines that name the file."""
    (experiment(work) / name).write_text(DEEP)
    unfinish(work, "select", 1)
    assert_refused(run_script(work, "select", overrides | {"run_name": "stage1"}), name)


def test_images_that_are_none_or_too_large(tmp_path):
    """A PNG of a few hundred bytes that would take gigabytes, whatever Pillow says of its size; and broken ones."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "image.png"
    for width, height in ((100_000, 100_000), (10_000, 8_000), (2**31 - 1, 2**31 - 1)):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0" * 1000)) + chunk(b"IEND", b""))
        with pytest.raises(ValueError, match=r"image\.png cannot be read as an image"):
            files.read_image(path)
    files.write_image(path, torch.zeros(8, 8, 3, dtype=torch.uint8))
    whole = path.read_bytes()
    for length in range(len(whole) - 20):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"image\.png cannot be read as an image"):
            files.read_image(path)
