"""`python -m b2diffurl.label`, by hand: people judge a stage, are killed, come back, and the run goes on."""

import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import children
import pytest
from conftest import ROOT, assert_refused, call, experiment, ran, snapshot, stage_of
from scored import NUM_IMAGES, scores

from b2diffurl import label
from b2diffurl.experiment import lock
from b2diffurl.labelling.server import Server
from b2diffurl.labelling.session import Session
from b2diffurl.runtime.files import write_record

FILE = {"reward.name": "file"}


def command(folder: Path, *arguments: str):
    return call(folder, ["label", *arguments], label.main)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["tiyn"],
            "label: no experiment 'tiyn', nor in .*/tiyn. Give its folder, or its name. Experiments in .*: tiny",
        ),
        (["tiny", "--stage=3"], "label: model/lora/tiny has no stage 3 with images to judge. Sampled are: 0"),
        (["tiny", "--port=70000"], "--port is 70000; it must be a number from 0"),
    ],
)
def test_what_cannot_be_judged_is_refused(begin, arguments, said):
    """Two lines, code 2, and nothing on disk has changed."""
    folder, _ = begin(FILE)
    before = snapshot(folder)
    assert_refused(command(folder, *arguments), said)
    assert snapshot(folder) == before


def test_bad_files_are_named_before_anything_is_served(begin):
    """A damaged file of answers, an image that is gone, scores that are there: two lines each, and no lock is left."""
    folder, _ = begin(FILE)
    stage = stage_of(folder)
    stage.labels.write_text("{")
    assert_refused(command(folder, "tiny"), r"stage0/labels\.json is damaged")
    stage.labels.unlink()
    stage.given_scores.write_text("id,score\n")
    assert_refused(command(folder, "tiny"), r"stage0/scores_given\.csv is there already")
    stage.given_scores.unlink()
    stage.image(4).unlink()
    before = snapshot(folder)
    assert_refused(command(folder, "model/lora/tiny"), r"images/00004\.png is missing")
    assert snapshot(folder) == before


def test_one_at_a_time_judges_a_stage(begin):
    """While a page is open another one is refused, with the process that has it, and the run's own lock is not touched. That
    a killed page is not in the way is tested below."""
    folder, _ = begin(FILE)
    stage = stage_of(folder)
    with subprocess.Popen(["sleep", "60"]) as other:
        lock.take(stage.folder, other.pid)
        before = snapshot(folder)
        refused = command(folder, "tiny")
        other.kill()
    assert_refused(refused, rf"label: .*stage0 is being worked on by process {other.pid} on .*\. Wait until it has ended")
    assert snapshot(folder) == before
    assert not (stage.root / "run.lock").exists()


def test_it_says_where_to_go_and_ends_when_the_scores_are_there(begin, monkeypatch):
    """One line with the address, the token in it; another with the command that goes on; the run takes the scores."""
    folder, settings = begin(FILE)
    serve = Server.serve_forever

    def serve_and_judge(self, **how):
        def judge():
            for group in range(6):
                self.session.change({"group": group, "pick": [2, 1]})
            self.session.finish()
            self.shutdown()

        threading.Thread(target=judge).start()
        serve(self, **how)

    monkeypatch.setattr(Server, "serve_forever", serve_and_judge)
    assert f"python -m b2diffurl.label {experiment(folder).relative_to(folder)}." in ran(folder, "select", settings)
    ended = command(folder, "tiny")
    assert ended.code == 0, ended.stderr
    first, last = ended.stdout.splitlines()
    assert re.fullmatch(
        r"label: stage 0 of model/lora/tiny: open http://127\.0\.0\.1:\d+/[\w-]{32}/ \(Ctrl-C stops; .*\)", first
    )
    assert last.startswith(
        "label: model/lora/tiny/stage0/scores_given.csv has the scores. Run the command of the run again: "
    )
    ran(folder, "select", settings)
    assert [row["reward"] for row in scores(folder)] == [0, -1, 1] * 6


def test_ctrl_c_ends_in_one_line(begin, monkeypatch):
    folder, _ = begin(FILE)

    def interrupted(self, **_):
        self.session.change({"group": 0, "pick": []})
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    ended = command(folder, "tiny")
    assert (ended.code, ended.stderr) == (130, "")
    assert ended.stdout.splitlines()[1:] == [
        "label: stopped; 1 of 6 groups are answered, and the same command goes on from there"
    ]


@pytest.mark.long
@pytest.mark.parametrize("moment", ["half", "whole", "renamed"])
def test_killed_at_any_moment_of_an_answer(begin, moment):
    """SIGKILL while the third answer is half written, whole under its temporary name, or just renamed: the two before are
    there, and the third where it was renamed. The next command takes the dead one's lock, goes on and cleans up."""
    folder, _ = begin(FILE)
    stage = stage_of(folder)
    script = folder / "judge.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from b2diffurl.label import main\nfrom b2diffurl.labelling.server import Server\n"
        "def serve(self, **how):\n    for group in range(6):\n"
        "        self.session.change({'group': group, 'pick': [0, 1]})\n"
        "Server.serve_forever = serve\nmain()\n"
    )
    code = children.run(folder, [str(script), "tiny"], children.Fault(moment, r"labels\.json$", turn=3))
    assert code == -signal.SIGKILL
    assert (stage.folder / "run.lock").is_file()
    expected = range(3 if moment == "renamed" else 2)
    assert Session(stage).votes.picks == {group: (0, 1) for group in expected}
    assert not stage.given_scores.exists()
    assert children.run(folder, [str(script), "tiny"]) == 0
    assert Session(stage).votes.picks == {group: (0, 1) for group in range(6)}
    assert not [*stage.folder.glob("*.tmp"), *stage.folder.glob("run.lock")]


def test_a_stage_of_single_images_is_rated(begin):
    """split_time=1: no group has two images, so there is nothing to pick."""
    folder, _ = begin(FILE)
    stage = stage_of(folder)
    manifest = stage.manifest("sample")
    write_record(stage.manifest_path("sample"), manifest | {"batch_shape": [6, 1, *manifest["batch_shape"][2:]]})
    session = Session(stage)
    assert (session.votes.mode, session.votes.num_groups) == ("rate", NUM_IMAGES)
    with pytest.raises(ValueError, match="can only be rated"):
        session.change({"mode": "pick"})
