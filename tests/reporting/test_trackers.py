"""wandb and TensorBoard show what the files say: one run an experiment, however often it is shown."""

import contextlib
import http.server
import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from accelerate import PartialState
from conftest import ROOT, experiment, make_config
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from b2diffurl.configuration.plan import checked_settings
from b2diffurl.configuration.settings import read_settings
from b2diffurl.evaluation.generate import training_sampler
from b2diffurl.evaluation.measure import evaluate
from b2diffurl.reporting.trackers import track
from b2diffurl.runtime import files

PER_STAGE = 18  # images of the tiny experiment
TRAIN = {"loss", "grad_norm", "clip_fraction", "max_abs_log_ratio", "epoch", "num_trajectories"}
TIMES = {"event", "stage", "load", "score", "write"}
TRAIN |= {"num_trained_steps", "num_updates", "max_abs_log_ratio_first"}


@pytest.fixture(scope="session")
def judged(finished, overrides, tmp_path_factory) -> Path:
    """The tiny experiment, whose base and both stages are judged on held-out prompts. Not to be changed."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("judged") / "copy")
    config = make_config(overrides)
    with contextlib.chdir(folder):
        settings = checked_settings(config)
        evaluate(settings, ["base", "stage1", "stage0"], ["test"], {"training": training_sampler(settings)})
    return folder


@pytest.fixture
def place(judged, tmp_path, monkeypatch) -> Path:
    """A copy of `judged` to work on, which is the current directory; no wandb account is at hand."""
    folder = shutil.copytree(judged, tmp_path / "place")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return folder


@pytest.fixture
def warnings() -> list[str]:
    """What the run's log says at the level of warnings."""
    lines, logger = [], logging.getLogger("b2diffurl")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def tracking(overrides: dict, *trackers: str, **more) -> ConfigDict:
    return make_config(overrides, track_with=trackers, **more)


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wandb_runs() -> list[Path]:
    return sorted(Path("log/wandb").glob("*run-*"))


def wandb_records(run: Path) -> list[Record]:
    """The records of a run's .wandb file, which is a LevelDB log: blocks of 32 KiB, chunks of 4 bytes of checksum, 2 of
    length and 1 of kind (1 whole, 2 first, 3 middle, 4 last), after a header of 7 bytes."""
    (path,) = run.glob("*.wandb")
    data, at, whole, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += -at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(whole))
            whole = b""
    return records


def wandb_history(run: Path) -> list[dict]:
    """The rows of a run, without wandb's own columns."""
    rows = []
    for record in wandb_records(run):
        if record.HasField("history"):
            rows.append({})
            for item in record.history.item:
                *groups, key = item.nested_key
                place = rows[-1].setdefault(groups[0], {}) if groups else rows[-1]
                place[key] = json.loads(item.value_json)
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def curve(rows: list[dict], name: str) -> list[tuple[float, float]]:
    return [(row["images_scored"], row[name]) for row in rows if name in row]


def tensorboard_curves() -> EventAccumulator:
    return EventAccumulator("log/tensorboard/tiny").Reload()


def scalars(events: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(name)]


def expected(root: Path) -> dict[str, list[tuple[float, float]]]:
    """The curves as the files have them, each a list of (images scored, value)."""
    found: dict[str, list[tuple[float, float]]] = {}

    def add(name: str, x: float, value: float) -> None:
        found.setdefault(name, []).append((x, value))

    for index in range(2):
        metrics, x = root / f"stage{index}" / "metrics", PER_STAGE * (index + 1)
        (select,) = json_lines(metrics / "select.jsonl")
        for key in ("reward_mean", "reward_std", "reward_group_std", "num_selected", "num_best", "num_worst"):
            add(f"select/{key}", x, select[key])
        updates = json_lines(metrics / "train.jsonl")
        for n, update in enumerate(updates):
            for key in ("loss", "grad_norm", "clip_fraction", "max_abs_log_ratio"):
                add(f"train/{key}", x - PER_STAGE + PER_STAGE * (n + 1) / len(updates), update[key])
        add("train/num_updates", x, len(updates))
        add("train/num_trained_steps", x, index + 2)
        add("train/max_abs_log_ratio_first", x, updates[0]["max_abs_log_ratio"])
    rows = {row["checkpoint"]: row for row in json_lines(root / "eval.jsonl")}
    for x, checkpoint in ((0, "base"), (18, "stage0"), (36, "stage1")):
        for key in ("reward", "reward_se", "diversity/clip", "diversity/clip_se"):
            add(f"eval/test/training/{key}", x, rows[checkpoint][key])
    return found


def test_wandb_has_one_run_for_two_stages_and_their_evaluations(place, overrides, warnings):
    """Every curve is the files' own, over the images scored; the run's configuration is the experiment's."""
    track(read_settings(tracking(overrides, "wandb")).output)
    (run,) = wandb_runs()
    rows = wandb_history(run)
    for name, points in expected(experiment(place)).items():
        assert curve(rows, name) == [(pytest.approx(x), y) for x, y in points], name
    names = {name for row in rows for name in row}
    selected = json_lines(experiment(place) / "stage0" / "metrics" / "select.jsonl")[0].keys() - TIMES
    assert {name for name in names if name.startswith("train/")} == {f"train/{key}" for key in TRAIN}
    assert {name for name in names if name.startswith("select/")} == {f"select/{key}" for key in selected}
    assert {"seconds/sample/sample", "seconds/train/train", "eval/test/training/reward_gain"} <= names
    assert not names & {"eval/test/training/stage", "eval/test/training/num_steps", "stage"}
    assert all(before["images_scored"] <= after["images_scored"] for before, after in pairwise(rows))
    records = wandb_records(run)
    (header,) = (record.run for record in records if record.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in header.config.update}
    recorded = json.loads((experiment(place) / "config.json").read_text())
    assert config["train"] == recorded["config"]["train"]
    assert (config["prompts_sha256"], header.display_name) == (recorded["prompts_sha256"], "tiny")
    assert any(record.metric.glob_name == "*" and record.metric.step_metric == "images_scored" for record in records)
    assert any(record.HasField("exit") for record in records)
    assert not warnings


def test_images_are_the_newest_stages_with_prompt_and_reward(place, overrides):
    """The first images of the last stage, and the first held-out ones it was judged by, to the bit, with what they say."""
    root = experiment(place)
    track(read_settings(tracking(overrides, "wandb", "tensorboard")).output)
    (run,) = wandb_runs()
    row = wandb_history(run)[-1]
    scored = json_lines(root / "stage1" / "scores.jsonl")
    (judged,) = (row for row in json_lines(root / "eval.jsonl") if row["checkpoint"] == "stage1")
    result = json.loads((root / judged["folder"] / "result.json").read_text())
    wanted = {
        "images/stage": [
            (root / "stage1/images" / f"{n:05d}.png", scored[n]["prompt"], scored[n]["reward"]) for n in range(8)
        ],
        "images/eval": [
            (root / judged["folder"] / f"{n:05d}.png", result["shown_prompts"][n], result["values"]["reward"][n])
            for n in range(6)
        ],
    }
    events = tensorboard_curves()
    for key, images in wanted.items():
        captions = [f"{prompt}, reward {reward:.3g}" for _, prompt, reward in images]
        assert row[key]["captions"] == captions
        shown = [run / "files" / name for name in row[key]["filenames"]]
        assert [path.read_bytes() for path in shown] == [path.read_bytes() for path, *_ in images]
        assert len(events.Images(key)) == 1
        (text,) = (event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{key}/captions/text_summary"))
        assert text.split("\n\n") == captions


def test_tensorboard_has_one_run_with_the_same_curves(place, overrides, warnings):
    """As in wandb; its steps are whole images."""
    track(read_settings(tracking(overrides, "tensorboard")).output)
    events = tensorboard_curves()
    for name, points in expected(experiment(place)).items():
        assert scalars(events, name) == [(round(x), pytest.approx(y, rel=1e-6)) for x, y in points], name
    assert sorted(path.name for path in Path("log").rglob("*") if path.is_dir()) == ["tensorboard", "tiny"]
    assert not warnings


def test_what_is_shown_again_is_shown_once(place, overrides, warnings):
    """After a second and a third time there is one run with the same rows under the same id."""
    config = tracking(overrides, "wandb", "tensorboard")
    track(read_settings(config).output)
    (run,) = wandb_runs()
    name, rows, losses = next(run.glob("*.wandb")).name, wandb_history(run), scalars(tensorboard_curves(), "train/loss")
    (run / f"{name}.synced").touch()
    for _ in range(2):
        track(read_settings(config).output)
    (run,) = wandb_runs()
    assert next(run.glob("*.wandb")).name == name  # it carries the run's id
    assert not list(run.glob("*.synced"))
    without = [{key: value for key, value in row.items() if not key.startswith("images/")} for row in rows]
    assert [{key: row.get(key) for key in old} for row, old in zip(wandb_history(run), without, strict=True)] == without
    assert len(list(Path("log/tensorboard/tiny").iterdir())) == 1
    assert scalars(tensorboard_curves(), "train/loss") == losses
    assert not warnings


def test_a_run_goes_on_from_stage_to_stage(place, overrides):
    """Shown after the first stage and after the second: one run that has both, under the id it had."""
    root, config = experiment(place), tracking(overrides, "wandb", "tensorboard")
    manifest = (root / "stage1" / "train.json").read_bytes()
    (root / "stage1" / "train.json").unlink()
    track(read_settings(config).output)
    (first,) = wandb_runs()
    assert [x for x, _ in curve(wandb_history(first), "select/reward_mean")] == [18]
    assert wandb_history(first)[-1]["images/stage"]["count"] == 8
    (root / "stage1" / "train.json").write_bytes(manifest)
    track(read_settings(config).output)
    (second,) = wandb_runs()
    assert next(first.parent.glob("*/*.wandb")).name == next(second.glob("*.wandb")).name
    assert [x for x, _ in curve(wandb_history(second), "select/reward_mean")] == [18, 36]
    assert [x for x, _ in scalars(tensorboard_curves(), "select/reward_mean")] == [18, 36]


def test_experiments_are_runs_of_their_own(place, overrides):
    """A second experiment beside the first leaves the first one's run alone, even where the configuration is the same; so
    does one of the same name that was begun at another time."""
    root = experiment(place)
    shutil.copytree(root, root.with_name("other"))
    track(read_settings(tracking(overrides, "wandb", "tensorboard")).output)
    (first,) = wandb_runs()
    track(read_settings(tracking(overrides, "wandb", "tensorboard", exp_name="other")).output)
    assert len(wandb_runs()) == 2
    assert first in wandb_runs()
    assert len({next(run.glob("*.wandb")).name for run in wandb_runs()}) == 2
    assert sorted(path.name for path in Path("log/tensorboard").iterdir()) == ["other", "tiny"]
    begun = files.read_json(root / "stage0" / "sample.json")
    files.write_record(root / "stage0" / "sample.json", begun | {"finished": "2001-01-01T00:00:00+0000"})
    track(read_settings(tracking(overrides, "wandb")).output)
    assert len(wandb_runs()) == 3


def test_what_a_kill_left_is_cleared_away(place, overrides, warnings):
    """Half a run in the place where runs are made is in nobody's way."""
    for name in ("tiny.wandb.tmp/wandb/offline-run-20200101_000000-x", "tiny.tensorboard.tmp/tiny"):
        Path("log", name).mkdir(parents=True)
        Path("log", name, "events.out.tfevents.half").touch()
    track(read_settings(tracking(overrides, "wandb", "tensorboard")).output)
    assert sorted(path.name for path in Path("log").iterdir() if path.is_dir()) == ["tensorboard", "wandb"]
    assert len(wandb_runs()) == len(list(Path("log/tensorboard/tiny").iterdir())) == 1
    assert not warnings


def test_a_curve_has_one_value_a_stage(place, overrides):
    """Of a stage that was judged again under other conditions the latest; checkpoints inside a stage, or from elsewhere, are
    in no curve."""
    path = experiment(place) / "eval.jsonl"
    rows = {row["checkpoint"]: row for row in files.read_json_lines(path)}
    rows["later"] = rows["stage0"] | {"reward": 7.0}
    rows["inside"] = rows["stage1"] | {"checkpoint": "stage1/checkpoint_1", "reward": 8.0}
    rows["outside"] = rows["stage1"] | {"checkpoint": "elsewhere.safetensors", "stage": None, "reward": 9.0}
    rows["deployed"] = rows["stage1"] | {"sampler": "deployed", "reward": 10.0}
    for key, row in rows.items():  # each evaluation has a folder, whose name ends with the checksum of what was judged
        row["folder"] = row["folder"].replace("eval/", f"eval/{key}_")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    track(read_settings(tracking(overrides, "tensorboard")).output)
    values = scalars(tensorboard_curves(), "eval/test/training/reward")
    assert values == [(0, pytest.approx(rows["base"]["reward"])), (18, 7.0), (36, pytest.approx(rows["stage1"]["reward"]))]
    assert scalars(tensorboard_curves(), "eval/test/deployed/reward") == [(36, 10.0)]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_one_line(place, overrides, warnings, monkeypatch, name):
    """It names the command that installs it; the other tracker has its run."""
    monkeypatch.setitem(sys.modules, name, None)
    track(read_settings(tracking(overrides, "wandb", "tensorboard")).output)
    (line,) = warnings
    assert f"pip install {name}" in line
    assert sorted(path.name for path in Path("log").iterdir() if path.is_dir()) == [
        {"wandb": "tensorboard", "tensorboard": "wandb"}[name]
    ]


def test_a_tracker_that_fails_ends_nothing(place, overrides, warnings):
    """A log folder that cannot be: one line each, and no exception."""
    Path("log_file").touch()
    track(read_settings(tracking(overrides, "wandb", "tensorboard", log_path="log_file")).output)
    assert [line.split(" is ")[0] for line in warnings] == ["track: wandb", "track: tensorboard"]


def test_nobody_is_asked_to_log_in(place, overrides, warnings):
    """Online without an account, at a terminal: one line that says how to upload later, and the run is on disk."""
    ours, theirs = os.openpty()
    stdin = os.dup(0)
    os.dup2(theirs, 0)
    try:
        track(read_settings(tracking(overrides, "wandb", wandb_mode="online")).output)
    finally:
        os.dup2(stdin, 0)
        for descriptor in (ours, theirs, stdin):
            os.close(descriptor)
    (run,) = wandb_runs()
    (line,) = warnings
    assert "No API key" in line
    assert f"wandb sync {run.absolute()}" in line
    assert curve(wandb_history(run), "select/reward_mean")


def test_the_environment_has_the_last_word(place, overrides, warnings, monkeypatch):
    """WANDB_MODE is stronger than wandb_mode, and WANDB_PROJECT names the project."""
    config = tracking(overrides, "wandb", wandb_mode="online")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track(read_settings(config).output)
    assert not Path("log/wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    track(read_settings(config).output)
    (header,) = (record.run for record in wandb_records(*wandb_runs()) if record.HasField("run"))
    assert header.project == "mine"
    assert not warnings


def test_only_the_main_process_tracks_and_only_what_is_trained(place, overrides, monkeypatch):
    """The second of two processes writes nothing, nor does an experiment without a trained stage."""
    config = tracking(overrides, "wandb", "tensorboard")
    with monkeypatch.context() as second:
        second.setattr(PartialState(), "process_index", 1)
        track(read_settings(config).output)
    for manifest in experiment(place).glob("stage*/train.json"):
        manifest.unlink()
    track(read_settings(config).output)
    assert not [path for path in Path("log").glob("*") if path.is_dir()]


SCRIPT = """
import runpy, sys
from pathlib import Path
from b2diffurl.configuration.settings import read_settings
from b2diffurl.reporting.trackers import track
config = runpy.run_path(sys.argv[1])["get_config"]("sd14").unlock()
root = Path("model/lora/tiny")
config.exp_name = "tiny"
track(read_settings(config).output)
print([name for name in ("wandb", "tensorboard") if name in sys.modules])
config.track_with = ("wandb", "tensorboard")
track(read_settings(config).output)
"""


class Server(http.server.BaseHTTPRequestHandler):
    """As much of wandb's server as an upload needs: it keeps a run's rows by their offset, and the names of its files."""

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.calls.append(self.path)
        answer = {}
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            answer = {"data": {"serverInfo": {"features": []}} | self.answer(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            for name, part in (json.loads(body).get("files") or {}).items():
                kept = self.server.lines.setdefault((self.path, name), [])
                kept[part["offset"] :] = part["content"]
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_CONNECT = do_POST  # noqa: N815

    def answer(self, query: str, given: dict) -> dict:
        if "upsertBucket" in query:
            project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": given["name"], "config": "{}", "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket | {"displayName": "", "description": ""}, "inserted": True}}
        if "createRunFiles" in query:
            self.server.files.update(given["files"])
            urls = [{"name": name, "uploadUrl": f"{self.server.address}/upload"} for name in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": urls}}
        return {}


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.address = f"http://127.0.0.1:{server.server_port}"
        server.calls, server.lines, server.files = [], {}, set()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.long
def test_online_the_whole_run_takes_the_place_of_the_last_one(place, overrides, warnings, monkeypatch, server):
    """Uploaded after the first stage and after the second, the server has one run, with every row once, and the images."""
    monkeypatch.setenv("WANDB_BASE_URL", server.address)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    root, config = experiment(place), tracking(overrides, "wandb", wandb_mode="online")
    manifest = (root / "stage1" / "train.json").read_bytes()
    (root / "stage1" / "train.json").unlink()
    for stages in ([18], [18, 36]):
        track(read_settings(config).output)
        (rows,) = (lines for (_, name), lines in server.lines.items() if name == "wandb-history.jsonl")
        assert [x for x, _ in curve([json.loads(row) for row in rows], "select/reward_mean")] == stages
        (root / "stage1" / "train.json").write_bytes(manifest)
    uploaded = [json.loads(row) for row in rows]
    for name, points in expected(root).items():
        assert curve(uploaded, name) == [(pytest.approx(x), pytest.approx(y)) for x, y in points], name
    (run,) = wandb_runs()
    images = {str(path.relative_to(run / "files")) for path in run.glob("files/media/**/*.png")}
    assert len(images) == 8 + 6
    assert images <= server.files
    assert list(run.glob("*.synced"))
    assert not warnings


def test_offline_calls_nobody_and_without_trackers_nothing_is_imported(place, tmp_path, server):
    """In a process of its own, for which every way out leads to a server that listens."""
    names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "WANDB_BASE_URL")
    kept = {key: value for key, value in os.environ.items() if key.lower() != "no_proxy"}
    environment = kept | dict.fromkeys(names, server.address) | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(ROOT / "config/stage_process.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (ended.stdout, ended.stderr) == ("[]\n", "")
    assert len(wandb_runs()) == 1
    assert not server.calls
