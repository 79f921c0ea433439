"""Damaged files of an experiment: named, redone or refused, and never trained on."""

import itertools
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import (
    JUDGE,
    VERBS,
    assert_refused,
    assert_same,
    experiment,
    flip,
    refuse,
    run_evaluation,
    run_script,
    run_stage,
    snapshot,
    unfinish,
)

from b2diffurl.experiment.checkpoints import OPTIMIZER_FILE, STATE_FILE
from b2diffurl.experiment.folder import resolve_checkpoint
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.runtime import files


def flip_in_the_middle(data: bytes) -> bytes:
    return flip(data, 8 * (len(data) // 2))


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip_a_digit(data: bytes) -> bytes:
    """JSON stays JSON: the last 1 to 8 before the checksum is one less or more."""
    end = data.rfind(files.SEAL.encode())
    place = max(data.rfind(digit, 0, end if end > 0 else len(data)) for digit in (b"2", b"3", b"4", b"5", b"6", b"7"))
    return flip(data, 8 * place)


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


def test_a_folder_in_a_records_place_is_refused(work, overrides):
    """Before anything is done that could not be finished."""
    path = experiment(work) / "stage1" / "select.json"
    path.unlink()
    path.mkdir()
    before = snapshot(experiment(work))
    assert_refused(run_script(work, "select", overrides | {"run_name": "stage1"}), r"select\.json is a folder.*Move it away")
    assert snapshot(experiment(work)) == before


@pytest.mark.long
def test_what_decides_shapes_and_what_was_judged(work, overrides):
    """batch_sizes.json, an evaluation's result and the table of all: named; deleted, they are made again as they were."""
    root = experiment(work)
    run_evaluation(work, overrides)
    judged = snapshot(root)
    for path in (root / "eval.jsonl", *root.glob("eval/stage1*/result.json")):
        whole = path.read_bytes()
        for damage in (cut, flip_in_the_middle, flip_a_digit):
            path.write_bytes(damage(whole))
            said = rf"{re.escape(path.name)} is damaged"
            ended = run_script(work, "eval", overrides, *JUDGE)
            if path.name == "result.json":  # of one evaluation, which is made again by itself
                assert ended.code == 0 and re.search(said, ended.stdout)
                assert judged.items() <= snapshot(root).items()
            else:
                assert_refused(ended, said + ".*Delete it")
        path.unlink()
        run_evaluation(work, overrides)
        assert judged.items() <= snapshot(root).items()
    path = root / "batch_sizes.json"
    entry = {"key": "sample.decode_batch_size", "device": "cpu", "wanted": 16, "size": 4}
    files.write_record(path, {"sizes": [entry]})
    whole = path.read_bytes()
    unfinish(work, "sample")
    for damage in (cut, flip_in_the_middle, flip_a_digit):
        path.write_bytes(damage(whole))
        refuse(work, "sample", overrides | {"run_name": "stage1"}, r"batch_sizes\.json is damaged.*Delete it")


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
