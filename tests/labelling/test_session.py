"""Which stage waits, its answers on disk, and the scores in the end."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import CONFIG, experiment, get_config, make_config, parse_command, snapshot, stage_of
from scored import NUM_IMAGES

from b2diffurl.configuration.keys import by_todays_names
from b2diffurl.configuration.recorded import preset_differences
from b2diffurl.experiment.stage import Stage
from b2diffurl.labelling import session as sessions
from b2diffurl.labelling.session import Session, TooLateError, run_command, waiting_stage
from b2diffurl.rewards.file import read_scores
from b2diffurl.runtime.files import read_json, write_json, write_record

FILE = {"reward.name": "file"}
NUM_GROUPS = NUM_IMAGES // 3


@pytest.fixture
def stage(begin) -> Stage:
    """A stage of six groups of three images that waits for scores."""
    return stage_of(begin(FILE)[0])


def answer_all(session: Session) -> list[float]:
    """Pick in every group but the last; returns the scores, worked out by hand."""
    for group in range(NUM_GROUPS - 1):
        session.change({"group": group, "pick": [group % 3, (group + 1) % 3]})
    session.change({"group": NUM_GROUPS - 1, "pick": []})
    return [1, -1, 0, 0, 1, -1, -1, 0, 1, 1, -1, 0, 0, 1, -1, 0, 0, 0]


def test_answers_are_on_the_disk_at_once_and_taken_up_again(stage):
    """After each answer another session has it, and the mode; nothing else in the folder has changed."""
    before = snapshot(stage.folder)
    session = Session(stage)
    assert snapshot(stage.folder) == before
    half, whole = ({"group": 4, "pick": [2, worst]} for worst in (None, 0))
    for change in (half, {"image": 7, "rating": 5}, {"mode": "rate"}, whole):
        session.change(change)
        assert Session(stage).votes == session.votes
    assert snapshot(stage.folder).keys() - before.keys() == {"labels.json"}
    assert session.progress == "0 of 6 groups are answered"


def test_scores_are_written_when_everything_is_answered(stage):
    """Not before; then the reward reads them, each image's own, and the table is that of scores_wanted.csv with scores."""
    session = Session(stage)
    with pytest.raises(ValueError, match="6 of 6 groups are still open"):
        session.finish()
    expected = answer_all(session)
    assert not stage.given_scores.exists()
    session.finish()
    assert read_scores(stage.given_scores, NUM_IMAGES).tolist() == expected
    header, first, *rows = stage.given_scores.read_text().splitlines()
    assert (header, first) == ("id,score,image,prompt", f"0,1,images/00000.png,{read_json(stage.prompts)[0]}")
    assert len(rows) == NUM_IMAGES - 1


def test_a_kill_in_the_middle_of_an_answer_keeps_the_one_before(stage, monkeypatch):
    """Whatever is left half-written, the next session has all answers but that one, and cleans up behind it."""
    session = Session(stage)
    session.change({"group": 0, "pick": [0, 1]})

    def killed(self, target):
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(SystemExit):
            session.change({"group": 1, "pick": [0, 1]})
    assert dict(session.votes.picks) == dict(Session(stage).votes.picks) == {0: (0, 1)}
    assert list(stage.folder.glob("labels.json.*.tmp"))
    stage.remove_temporaries()
    assert not list(stage.folder.glob("*.tmp"))


def test_a_full_disk_changes_no_answer(stage, monkeypatch):
    session = Session(stage)
    session.change({"group": 0, "pick": [0, 1]})
    monkeypatch.setattr(sessions.files, "write_record", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        session.change({"group": 0, "pick": None})
    assert session.votes.picks == {0: (0, 1)}


def test_scores_that_came_another_way_end_it(stage):
    """A table from a spreadsheet is neither overwritten nor passed over; a stage that was selected takes no more answers."""
    session = Session(stage)
    answer_all(session)
    stage.given_scores.write_text("mine")
    for act in (session.finish, lambda: session.change({"group": 0, "pick": []}), lambda: waiting_stage(stage.root, None)):
        with pytest.raises(TooLateError, match=r"scores_given\.csv is there already: run the command of the run again"):
            act()
    assert stage.given_scores.read_text() == "mine"
    stage.given_scores.unlink()
    write_record(stage.manifest_path("select"), {"phase": "select", "stage": 0})
    with pytest.raises(TooLateError, match=r"stage0 has been selected by the scores in .*scores\.jsonl"):
        session.change({"group": 0, "pick": []})
    with pytest.raises(TooLateError, match="stage0 has been selected"):
        waiting_stage(stage.root, 0)


def sample_again(stage: Stage) -> None:
    """As if the first two images had been drawn the other way round."""
    manifest = read_json(stage.manifest_path("sample"))
    one, other = (f"images/0000{n}.png" for n in range(2))
    manifest["files"][one], manifest["files"][other] = manifest["files"][other], manifest["files"][one]
    write_record(stage.manifest_path("sample"), manifest)
    images = [stage.image(n).read_bytes() for n in range(2)]
    for n in range(2):
        stage.image(n).write_bytes(images[1 - n])


def test_answers_about_other_images_are_not_taken(stage):
    """A stage that was sampled again has new images under the old names."""
    session = Session(stage)
    answer_all(session)
    sample_again(stage)
    before = snapshot(stage.folder)
    for act in (session.finish, lambda: session.change({"group": 0, "pick": []})):
        with pytest.raises(TooLateError, match="sampled again meanwhile"):
            act()
    assert snapshot(stage.folder) == before
    assert not stage.given_scores.exists()
    with pytest.raises(ValueError, match=r"labels\.json cannot be taken \(it is about other images.*\)\. Move it away"):
        Session(stage)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), r"labels\.json is damaged"),
        (lambda path: path.write_text(path.read_text().replace("[\n   0,", "[\n   2,")), "checksum does not match"),
        (lambda path: write_json(path, {"picks": []}), r"labels\.json cannot be taken \(it is none of ours\)"),
        (lambda path: write_json(path, []), r"labels\.json cannot be taken \(it is none of ours\)"),
        (lambda path: edit(path, picks={"6": []}), "the group is 6; it must be a number from 0 to 5"),
        (lambda path: edit(path, picks={"x": []}), "the group is 'x'"),
        (lambda path: edit(path, picks=[[0, 1]]), "it is none of ours"),
        (lambda path: edit(path, ratings={"3": 9}), "the rating is 9"),
        (lambda path: edit(path, mode=None), "the mode is None"),
    ],
)
def test_a_damaged_file_of_answers_is_named(stage, damage, said):
    """Cut, a digit changed, none of ours, an answer that cannot be: one sentence, and the file stays as it is."""
    Session(stage).change({"group": 0, "pick": [0, 1]})
    damage(stage.labels)
    before = stage.labels.read_bytes()
    with pytest.raises(ValueError, match=said) as raised:
        Session(stage)
    assert "labels.json" in str(raised.value)
    assert stage.labels.read_bytes() == before


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    del content["content_sha256"]
    write_json(path, content | changes)


def test_an_image_that_is_gone_or_another_is_named(stage):
    stage.image(3).write_bytes(stage.image(2).read_bytes())
    with pytest.raises(ValueError, match=r"00003\.png is not what the sample phase wrote"):
        Session(stage)
    stage.image(3).unlink()
    with pytest.raises(ValueError, match=r"00003\.png is missing"):
        Session(stage)


# ---- which stage waits ----


def test_the_newest_stage_without_scores_waits(stage):
    """Another one by its number; of one that is not there the sampled ones are named."""
    shutil.copytree(stage.folder, stage.root / "stage1")
    for index in (1, 2):
        one = Stage(stage.root, index)
        if index == 2:
            shutil.copytree(stage.folder, one.folder)
            one.manifest_path("sample").unlink()  # half sampled
        else:
            write_record(one.manifest_path("sample"), read_json(one.manifest_path("sample")) | {"stage": index})
    assert waiting_stage(stage.root, None).index == 1
    assert waiting_stage(stage.root, 0).index == 0
    for index in (2, 7, -1):
        with pytest.raises(ValueError, match=rf"no stage {index} with images to judge. Sampled are: 0, 1\."):
            waiting_stage(stage.root, index)


def test_nothing_waits(stage):
    """Nothing sampled, everything selected, a reward that is no person: each says what to do."""
    write_record(stage.manifest_path("select"), {"phase": "select", "stage": 0})
    with pytest.raises(ValueError, match=r"nothing of .* waits for scores: .* 0, has them\. Run the same command as before"):
        waiting_stage(stage.root, None)
    stage.manifest_path("select").unlink()
    record = read_json(stage.root / "config.json")
    reward = record["config"]["reward"]
    reward["name"] = "jpeg_compressibility"
    write_json(stage.root / "config.json", record)
    with pytest.raises(ValueError, match=r"is rewarded by jpeg_compressibility, not by people\. Begin another experiment"):
        waiting_stage(stage.root, None)
    reward["watch"] = ["file"]
    write_json(stage.root / "config.json", record)
    assert waiting_stage(stage.root, None) == stage
    stage.manifest_path("sample").unlink()
    with pytest.raises(ValueError, match=r"has no images to judge yet\. Run it with Reward=file"):
        waiting_stage(stage.root, None)


def test_the_command_with_which_the_run_goes_on(begin, models):
    """A shell reads it as variables and flags of run_process.sh, and these give every setting that the run began with."""
    root = experiment(begin(FILE)[0])
    assert run_command(root).endswith(" ExpName=tiny Reward=file bash run_process.sh")
    asked = {"exp_name": "my_run", "reward.weights": {"file": 1.0, "clip": 0.5}, "split_time": 4, "train.ema": 0.5}
    asked |= {"eval.diversity": ("clip", "layout"), "prompt_file": str(models / "prompts.json"), "eval.prompt_file": ""}
    config = by_todays_names(make_config(asked).to_dict())
    differs = preset_differences(config, get_config("sd14").to_dict())
    write_json(root / "config.json", {"config": config | {"preset": "sd14"}, "differs_from_preset": differs})
    preset, name, shell, script, *flags = shlex.split(run_command(root))
    assert (preset, name, shell, script) == ("Preset=sd14", "ExpName=my_run", "bash", "run_process.sh")
    ended = parse_command(root, ["run_train.py", f"{CONFIG}:sd14", "--config.exp_name=my_run", *flags])
    assert ended.code == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == json.loads(json.dumps(config))
