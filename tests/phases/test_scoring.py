"""Rewards through the scripts: a URL, mixtures, watched judges, scores made elsewhere, and what goes wrong on the way."""

import base64
import contextlib
import csv
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import (
    ROOT,
    VERBS,
    assert_refused,
    call,
    experiment,
    flags,
    make_config,
    refuse,
    run_script,
    run_stage,
    snapshot,
)
from PIL import Image
from transformers import PreTrainedModel

from b2diffurl.configuration.plan import make_plan
from b2diffurl.configuration.recorded import record_experiment
from b2diffurl.configuration.rules import check
from b2diffurl.configuration.settings import read_settings
from b2diffurl.experiment.stage import Stage
from b2diffurl.phases.scoring import Batches, score_images
from b2diffurl.rewards import http, join, load_reward
from b2diffurl.runtime import files

CPU = torch.device("cpu")
NUM_IMAGES, BATCH = 18, 4  # of the tiny experiment's stage, and of its scorer
JPEG, CLIP = "jpeg_compressibility", "clip"


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


def ran(folder: Path, verb: str, settings: dict, *more: str) -> str:
    """What a script printed that must have worked."""
    ended = run_script(folder, verb, settings, *more)
    assert ended.code == 0, ended.stderr
    return ended.stdout


def stage_of(folder: Path, index: int = 0) -> Stage:
    return Stage(experiment(folder), index)


def scores(folder: Path, index: int = 0) -> list[dict]:
    return [json.loads(line) for line in stage_of(folder, index).scores.read_text().splitlines()]


def pixels(folder: Path, index: int = 0) -> list[np.ndarray]:
    """The stage's images as Pillow reads them."""
    return [np.asarray(Image.open(stage_of(folder, index).image(n))) for n in range(NUM_IMAGES)]


def jpeg_kb(image: np.ndarray) -> float:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return len(file.getvalue()) / 1000


def redness(image: np.ndarray) -> float:
    return float(image[..., 0].mean()) / 255


REDNESS = "def redness(images, prompts):\n    return images[..., 0].float().mean((1, 2)) / 255\n"


# ---- http ----


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable]:
    """serve(answer) -> (settings, requests): a server on loopback whose answer to each request is answer(request), JSON or
    bytes, with a status before it if it is not 200; an Exception is what it does to the connection."""
    monkeypatch.setattr(http, "FIRST_WAIT_SEC", 0.01)
    servers = []

    def start(answer: Callable) -> tuple[dict, list]:
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                result = answer(requests[-1])
                status, body = result if isinstance(result, tuple) else (200, result)
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                with contextlib.suppress(OSError):
                    if status == 0:  # no HTTP at all
                        self.wfile.write(body)
                        return
                    self.send_response(abs(status) if status not in (-1, -2) else 200)
                    if status == 302:
                        self.send_header("Location", "/score")
                    self.send_header("Content-Length", str(len(body) + (5 if status < 0 else 0)))  # -1, -500: cut off
                    self.end_headers()
                    for letter in body if status == -2 else ():  # drips, without an end
                        self.wfile.write(bytes([letter]))
                        time.sleep(0.05)
                    self.wfile.write(body)
                    if status == -500:
                        time.sleep(0.6)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return http_settings(f"http://127.0.0.1:{server.server_port}/score"), requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def http_settings(url: str) -> dict:
    return {"reward.name": "http", "reward.http.url": url, "reward.http.timeout_sec": 0.3, "reward.http.num_retries": 1}


def unpack(request: dict) -> list[np.ndarray]:
    found = [Image.open(io.BytesIO(base64.b64decode(image))) for image in request["images"]]
    assert {image.format for image in found} == {"PNG"}
    return [np.asarray(image) for image in found]


def measure(request: dict) -> dict:
    """The scores a well-behaved server sends."""
    pairs = zip(unpack(request), request["prompts"], strict=True)
    return {"scores": [redness(image) + len(prompt) for image, prompt in pairs]}


def test_http_scores_what_is_on_disk_in_order(begin, serve):
    """The server is sent every image bit for bit and in order with its prompt, the last batch filled up; its scores are the
    rewards. Where it stands may change after the experiment was begun."""
    there, requests = serve(measure)
    folder, settings = begin(http_settings("http://127.0.0.1:9/"))
    ran(folder, "select", settings | there | {"reward.http.timeout_sec": 30.0})
    assert [len(request["prompts"]) for request in requests] == [BATCH] * 5
    sent = [image for request in requests for image in unpack(request)]
    asked = [prompt for request in requests for prompt in request["prompts"]]
    assert all(np.array_equal(one, other) for one, other in zip(sent[:NUM_IMAGES], pixels(folder), strict=True))
    assert all(np.array_equal(image, sent[NUM_IMAGES - 1]) for image in sent[NUM_IMAGES:])
    assert asked[:NUM_IMAGES] == [row["prompt"] for row in scores(folder)]
    expected = [redness(image) + len(prompt) for image, prompt in zip(sent, asked, strict=True)][:NUM_IMAGES]
    assert [row["reward"] for row in scores(folder)] == pytest.approx(expected, rel=1e-6)


def test_http_asks_again_after_a_500(begin, serve):
    """One failure of the server's own costs one more request and a line in the log, nothing else."""
    failures = iter([(500, b"busy")])
    there, requests = serve(lambda request: next(failures, None) or measure(request))
    folder, settings = begin(there | {"reward.http.timeout_sec": 30.0})
    said = ran(folder, "select", settings)
    assert len(requests) == 6
    assert requests[0] == requests[1]
    assert re.search("500.*busy.*asking again", said)
    assert [row["reward"] for row in scores(folder)] == pytest.approx(
        [redness(image) + len(row["prompt"]) for image, row in zip(pixels(folder), scores(folder), strict=True)], rel=1e-6
    )


@pytest.mark.parametrize(
    ("answer", "said", "num_requests"),
    [
        (lambda _: time.sleep(0.6), "did not answer within 0.3 s", 2),
        (lambda _: {"scores": [1.0] * 3}, "3 scores for 4 images", 1),
        (lambda _: {"scores": [1.0] * 5}, "5 scores for 4 images", 1),
        (lambda _: {"scores": ["1.0"] * 4}, "not a list of numbers", 1),
        (lambda _: {"scores": [1.0, None, 1.0, 1.0]}, "not a list of numbers", 1),
        (lambda _: {"scores": [[1.0]] * 4}, "not a list of numbers", 1),
        (lambda _: {"scores": 1.0}, "not a list of numbers", 1),
        (lambda _: b'{"scores": [' + b", ".join([b"9" * 400] * 4) + b"]}", "scores", 1),
        (lambda _: b"<html>hello</html>", "answered '<html>hello</html>'", 1),
        (lambda _: b"\xff\xfe\x00", "answered", 1),
        (lambda _: {"rewards": [1.0] * 4}, "answered.*rewards.*not.*scores", 1),
        (lambda _: [1.0] * 4, "answered.*not.*scores", 1),
        (lambda _: (500, b"out of cheese"), "answered 500 .*out of cheese; asked 2 times", 2),
        (lambda _: (503, b""), "answered 503 .*; asked 2 times", 2),
        (lambda _: (400, b"what?"), "answered 400 .*what.*; asked 1 time", 1),
        (lambda _: (404, b""), "answered 404 .*; asked 1 time", 1),
        (lambda _: (-1, {"scores": [1.0] * 4}), "asked 2 times", 2),
        (lambda _: (0, b"hello\r\n"), "asked 2 times", 2),
        (lambda _: (-2, b'{"scores": [1.0, 1.0, 1.0, 1.0]}'), "did not answer within 0.3 s", 2),
        (lambda _: (-500, b"half"), "answered 500 ", 2),
        (lambda _: (302, b""), "answered 302 .*asked 1 time", 1),
    ],
    ids=["slow", "too few", "too many", "strings", "null", "lists", "a number", "beyond a float", "no JSON", "no text",
         "no scores", "a list", "500", "503", "400", "404", "cut off", "no HTTP", "drips", "500 that hangs", "elsewhere"],
)  # fmt: skip
def test_http_servers_that_misbehave(begin, serve, answer, said, num_requests):
    """Whatever comes back, two lines with the URL say what; only a server that is away, slow or broken is asked again, as
    often as allowed; nothing on disk has changed."""
    there, requests = serve(answer)
    folder, settings = begin(there)
    refuse(folder, "select", settings, re.escape(there["reward.http.url"]), said, "batch 0: images 0 to 3")
    assert len(requests) == num_requests


def test_http_nobody_there(begin, serve):
    """A refused connection is tried again and then told with the URL."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    serve(measure)
    folder, settings = begin(http_settings(f"http://127.0.0.1:{port}/"))
    refuse(folder, "select", settings, f"http://127.0.0.1:{port}/ cannot be asked.*refused.*asked 2 times")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "1e39"])
def test_http_scores_that_are_not_finite(begin, serve, value):
    """A number that is none, or infinite as a float32, stops the run with the image's id."""
    there, requests = serve(lambda _: f'{{"scores": [0, 1, {value if len(requests) == 2 else 2}, 3]}}'.encode())
    folder, settings = begin(there)
    before = snapshot(folder)
    assert_refused(run_script(folder, "select", settings), r"http is not finite for images \[6\]")
    after = snapshot(folder)
    written = [name for name in after if name not in before]
    assert [Path(name).name for name in written] == ["rewards.safetensors", "scores.jsonl"]
    assert {name: after[name] for name in before} == before
    assert [row["reward"] for row in scores(folder)][4:8] == [0.0, 1.0, None, 3.0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward.http.url": ""}, "reward.http.url is ''"),
        ({"reward.http.url": "file:///etc/passwd"}, "reward.http.url is 'file:"),
        ({"reward.http.timeout_sec": 0.0}, r"timeout_sec is 0.0; it must lie in \(0, "),
        ({"reward.http.num_retries": -1}, r"num_retries is -1; it must lie in \[0, 20\]"),
    ],
)
def test_http_settings_that_cannot_work(empty, overrides, settings, said):
    """No URL, or no time to answer in: told before anything is sampled."""
    refuse(empty, "sample", overrides | http_settings("http://127.0.0.1:9/") | settings, said)


def test_the_reference_server_is_one(sampled, overrides):
    """docs/reward_server.py, of at most 60 lines, serves a numpy function to the reward http; an error of the function's is
    a 500 with its words, a request that is none a 400."""
    path = ROOT / "docs" / "reward_server.py"
    assert len(path.read_text().splitlines()) <= 60

    def function(images: np.ndarray, prompts: list[str]) -> list[float]:
        return [redness(image) / (len(prompt) - 12) for image, prompt in zip(images, prompts, strict=True)]

    server = runpy.run_path(str(path), run_name="module")["serve"](function, "127.0.0.1", 0)
    server.RequestHandlerClass.log_message = lambda *_: None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    config = make_config(
        overrides | http_settings(f"http://127.0.0.1:{server.server_port}/"), **{"reward.http.num_retries": 0}
    )
    config.reward.http.timeout_sec = 30.0
    try:
        reward = load_reward("http", read_settings(config).rewards, CPU)
        images = torch.from_numpy(np.stack(pixels(sampled)))
        found = reward(images, ["a blue square"] * NUM_IMAGES)
        assert found.tolist() == pytest.approx([redness(image) for image in pixels(sampled)], rel=1e-6)
        with pytest.raises(ConnectionError, match=r"500.*ZeroDivisionError"):
            reward(images[:1], ["a red circle"])
        with pytest.raises(ConnectionError, match=r"400.*not a request"):
            http.post(b"{}", **config.reward.http)
    finally:
        server.shutdown()
        server.server_close()


# ---- mixtures ----


def test_a_mixture_is_the_weighted_sum_of_recorded_parts(begin, module, overrides):
    """Three rewards, one of them the user's with a part of its own: each is recorded, and the reward is their weighted
    sum; alone, each says the same. run_eval.py reports the parts and the sum."""
    mine = module(REDNESS + "def both(images, prompts):\n    return redness(images, prompts), {'said': list(prompts)}\n")
    weights = {CLIP: 1.0, JPEG: 0.1, f"{mine}:both": -0.5}
    folder, settings = begin({"reward.weights": weights})
    ran(folder, "select", settings)
    rows, images = scores(folder), pixels(folder)
    for row, image in zip(rows, images, strict=True):
        assert row["parts"].keys() == {*weights, f"{mine}:both/said"}
        assert row["parts"][JPEG] == pytest.approx(-jpeg_kb(image), rel=1e-6)
        assert row["parts"][f"{mine}:both"] == pytest.approx(redness(image), rel=1e-5)
        assert row["parts"][f"{mine}:both/said"] == row["prompt"]
        total = sum(weight * row["parts"][name] for name, weight in weights.items())
        assert row["reward"] == pytest.approx(total, abs=1e-6)
    manifest = stage_of(folder).manifest("select")
    assert (manifest["reward"], manifest["scales"]) == (weights, None)
    assert "already finished" in ran(folder, "select", settings | {"reward.name": "shapes"})  # of no effect in a mixture
    (metrics,) = map(json.loads, stage_of(folder).metrics("select").read_text().splitlines())
    assert metrics[f"{JPEG}_mean"] == pytest.approx(-np.mean([jpeg_kb(image) for image in images]), rel=1e-6)

    shutil.rmtree(folder)
    alone, single = begin({})
    ran(alone, "select", single)
    assert [row["parts"][CLIP] for row in rows] == [row["reward"] for row in scores(alone)]

    shutil.rmtree(alone)
    ended = ran(alone.parent, "eval", settings, "--checkpoint=base", "--sampler=training", "--prompts=train")
    result = json.loads(next((alone.parent / "model").rglob("result.json")).read_text())
    values = result["values"]
    assert {*weights, "reward"} <= values.keys()
    expected = [sum(weight * values[name][n] for name, weight in weights.items()) for n in range(6)]
    assert values["reward"] == pytest.approx(expected, abs=1e-6)
    assert json.loads(ended.splitlines()[-1])["reward"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_standardised_parts_keep_the_first_stages_scales(overrides, module, tmp_path):
    """With reward.standardise the parts are z-scores by the first stage's mean and population deviation, in the next stage
    and in run_eval.py, too; a part that is constant counts for nothing. The parts are recorded as they are."""
    mine = module("import torch\ndef constant(images, prompts):\n    return torch.full((len(prompts),), 0.1)\n")
    weights = {CLIP: 1.0, JPEG: 2.0, f"{mine}:constant": 50.0}
    settings = overrides | {"reward.weights": weights, "reward.standardise": True}
    refuse(
        tmp_path,
        "eval",
        settings,
        "standardise takes its scale from the first stage",
        arguments=(
            "--checkpoint=base",
            "--sampler=training",
        ),
    )
    for verb in ("sample", "select", "train"):
        ran(tmp_path, verb, settings)
    for verb in ("sample", "select"):
        ran(tmp_path, verb, settings | {"run_name": "stage1"})
    first = {name: np.array([row["parts"][name] for row in scores(tmp_path)]) for name in weights}
    scale = {name: (first[name].mean(), first[name].std()) for name in (CLIP, JPEG)}

    def total(parts: dict) -> np.ndarray:
        return sum(weights[name] * (np.array(parts[name]) - mean) / deviation for name, (mean, deviation) in scale.items())

    for index in range(2):
        rows = scores(tmp_path, index)
        parts = {name: [row["parts"][name] for row in rows] for name in weights}
        assert [-kb for kb in map(jpeg_kb, pixels(tmp_path, index))] == pytest.approx(parts[JPEG], rel=1e-6)
        assert [row["reward"] for row in rows] == pytest.approx(total(parts).tolist(), abs=1e-5)
        recorded = stage_of(tmp_path, index).manifest("select")["scales"]
        assert recorded.keys() == weights.keys()
        for name in scale:
            assert recorded[name] == pytest.approx(scale[name], rel=1e-6)
    assert np.mean([row["reward"] for row in scores(tmp_path)]) == pytest.approx(0, abs=1e-5)
    assert abs(np.mean([row["reward"] for row in scores(tmp_path, 1)])) > 1e-3
    ran(tmp_path, "eval", settings, "--checkpoint=base", "--sampler=training", "--prompts=train")
    values = json.loads(next(experiment(tmp_path).glob("eval/*/result.json")).read_text())["values"]
    assert values["reward"] == pytest.approx(total(values).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward.weights": "clip"}, "reward.weights is 'clip'.*must be like"),
        ({"reward.weights": "['clip']"}, "reward.weights is .*must be like"),
        ({"reward.weights": "{}"}, "reward.weights is .*must be like"),
        ({"reward.weights": "{'clip': 0}"}, "reward.weights has 0 for 'clip'"),
        ({"reward.weights": "{'clip': '1'}"}, "reward.weights has '1' for 'clip'"),
        ({"reward.weights": "{'clip': True}"}, "reward.weights has True for 'clip'"),
        ({"reward.weights": "{'clip': 1e999}"}, "reward.weights has inf for 'clip'"),
        ({"reward.weights": "{'clip': 1.0, 'beauty': 1.0}"}, "beauty.*clip, pickscore.*shapes, http, file"),
        ({"reward.weights": "{1: 1.0}"}, "1"),
        ({"reward.standardise": True}, "standardise is on without reward.weights"),
        ({"reward.watch": "('clip',)"}, "watch names 'clip', which is trained on"),
        ({"reward.weights": "{'shapes': 1.0}", "reward.watch": "('shapes',)"}, "watch names 'shapes', which is trained on"),
        ({"reward.watch": f"('{JPEG}', '{JPEG}')"}, f"watch names '{JPEG}' twice"),
        ({"reward.watch": "('beauty',)"}, "beauty.*clip, pickscore.*shapes, http, file"),
        ({"reward.dtype": "int8"}, "reward.dtype is 'int8'; known: 'auto', 'float32'"),
        ({"reward.batch_size": 0}, "reward.batch_size is 0"),
        ({"reward.num_workers": 0}, "reward.num_workers is 0"),
    ],
    ids=str,
)
def test_reward_settings_that_cannot_work(empty, overrides, settings, said):
    """Weights that are none, a mixture or judge that makes no sense: refused before anything is sampled."""
    refuse(empty, "sample", overrides | settings, said)


def test_a_weight_that_is_not_a_number(config):
    """NaN has no literal on the command line; from Python it is refused, too, and a good mixture is not."""
    config.reward.weights = {"clip": 1.0, "shapes": float("nan")}
    with pytest.raises(ValueError, match=r"reward\.weights has nan for 'shapes'"):
        check(config)
    config.reward.weights = {"clip": 1.0, "shapes": -1}
    check(config)


# ---- a judge that watches ----


def test_a_watched_reward_is_recorded_and_changes_nothing(begin, sampled, module):
    """What is watched stands in scores.jsonl, with its parts, and in the metrics; rewards, parts and selection are what they
    are without it. run_eval.py reports it beside the reward."""
    mine = module(REDNESS + "def both(images, prompts):\n    return redness(images, prompts), {'said': list(prompts)}\n")
    folder, settings = begin({})
    ran(folder, "select", settings)
    without, chosen = scores(folder), stage_of(folder).selection.read_bytes()
    assert all("watch" not in row for row in without)
    shutil.rmtree(folder)
    folder, settings = begin({"reward.watch": (JPEG, f"{mine}:both")})
    ran(folder, "select", settings)
    assert stage_of(folder).selection.read_bytes() == chosen
    rows = scores(folder)
    watched = [row.pop("watch") for row in rows]
    assert rows == without
    for seen, image, row in zip(watched, pixels(folder), rows, strict=True):
        assert seen.pop(f"{mine}:both/said") == row["prompt"]
        assert seen == pytest.approx({JPEG: -jpeg_kb(image), f"{mine}:both": redness(image)}, rel=1e-5)
    (metrics,) = map(json.loads, stage_of(folder).metrics("select").read_text().splitlines())
    assert metrics[f"watch/{JPEG}_mean"] == pytest.approx(np.mean([seen[JPEG] for seen in watched]), rel=1e-6)
    result = json.loads(
        ran(folder, "eval", settings, "--checkpoint=base", "--sampler=training", "--prompts=train").splitlines()[-1]
    )
    assert result[JPEG] < 0 < result[f"{mine}:both"]


def unselect(folder: Path, index: int) -> dict[str, bytes]:
    """Leave the stage as it was before run_select.py; what was selected and scored then."""
    stage = stage_of(folder, index)
    before = {path.name: path.read_bytes() for path in (stage.selection, stage.scores)}
    for verb in ("select", "train"):
        stage.manifest_path(verb).unlink()
    shutil.rmtree(stage.folder / "checkpoints")
    for path in (stage.selection, stage.scores):
        path.unlink()
    return before


def test_who_watches_may_change_and_what_is_trained_may_not(workplace, overrides, models, tmp_path):
    """From stage to stage a judge and its settings may come and go; another model of the trained reward is refused."""
    before = unselect(workplace, 1)
    second = overrides | {"run_name": "stage1"}
    moved = shutil.copytree(models / "clip", tmp_path / "moved")
    refuse(workplace, "select", second | {"reward.clip.model": str(moved)}, "reward.clip.model is .*moved.*, was ")
    refuse(workplace, "select", second | {"reward.name": JPEG}, f"reward.name is '{JPEG}', was 'clip'")
    refuse(workplace, "select", second | {"reward.weights": {"clip": 1.0}}, r"reward.weights is {'clip': 1.0}, was None")
    refuse(workplace, "select", second | {"reward.dtype": "bfloat16"}, "reward.dtype is 'bfloat16', was 'auto'")
    watching = {"reward.watch": ("pickscore",), "reward.pickscore.model": str(moved)}
    ran(workplace, "select", second | watching)
    assert stage_of(workplace, 1).selection.read_bytes() == before["selection.json"]
    scale = float(np.exp(2.6592))
    for row in scores(workplace, 1):
        assert row["watch"]["pickscore"] == pytest.approx(scale * row["reward"], rel=1e-4)


def test_an_experiment_begun_before_goes_on(workplace, overrides):
    """Its config.json has reward.model and none of the keys that came later; it selects the same. Another model is refused
    there as well."""
    before = unselect(workplace, 1)
    path = experiment(workplace) / "config.json"
    recorded = files.read_json(path)
    model = recorded["config"]["reward"]["clip"]["model"]
    recorded["config"]["reward"] = {"name": "clip", "model": model, "batch_size": 4}
    files.write_record(path, recorded)
    second = overrides | {"run_name": "stage1"}
    refuse(workplace, "select", second | {"reward.clip.model": f"{model}/"}, "reward.clip.model is .*, was ")
    ran(workplace, "select", second)
    stage = stage_of(workplace, 1)
    assert {path.name: path.read_bytes() for path in (stage.selection, stage.scores)} == before


# ---- scores made elsewhere ----

FILE = {"reward.name": "file"}


def read_table(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: list[dict], *, delimiter: str = ",", encoding: str = "utf-8") -> None:
    with path.open("w", newline="", encoding=encoding) as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)


def fill(stage: Stage) -> list[float]:
    """Do as the instructions say, with scores that are not in order."""
    rows = read_table(stage.wanted_scores)
    values = [(7 * n % 18) / 4 - 1 for n in range(len(rows))]
    write_table(stage.given_scores, [row | {"score": value} for row, value in zip(rows, values, strict=True)])
    return values


def test_scores_made_elsewhere(begin):
    """Without them selecting ends well, with a table of the ids, images and prompts and where to put it; again, nothing
    changes; with them filled in, in any order and as spreadsheets save them, it goes on, and training works."""
    folder, settings = begin(FILE)
    stage, before = stage_of(folder), snapshot(folder)
    said = ran(folder, "select", settings)
    relative = stage.folder.relative_to(folder)
    assert all(str(relative / name) in said for name in ("images", "scores_wanted.csv", "scores_given.csv"))
    after = snapshot(folder)
    assert after.keys() - before.keys() == {str(relative / "scores_wanted.csv")}
    rows = read_table(stage.wanted_scores)
    assert [row["prompt"] for row in rows] == json.loads(stage.prompts.read_text())
    assert [(row["id"], row["score"], stage.folder / row["image"]) for row in rows] == [
        (str(n), "", stage.image(n)) for n in range(NUM_IMAGES)
    ]
    ran(folder, "select", settings)
    assert snapshot(folder) == after

    values = fill(stage)
    rows = read_table(stage.given_scores)[::-1]
    write_table(stage.given_scores, [row | {"remark": "é"} for row in rows], encoding="utf-8-sig")
    for verb in ("select", "train"):
        ran(folder, verb, settings)
    assert [row["reward"] for row in scores(folder)] == values
    assert stage.manifest("train")["num_updates"] > 0


def test_scores_written_into_the_template_are_not_lost(begin):
    """Who fills in scores_wanted.csv itself and forgets to rename it keeps what was filled in."""
    folder, settings = begin(FILE)
    ran(folder, "select", settings)
    stage = stage_of(folder)
    fill(stage)
    stage.given_scores.replace(stage.wanted_scores)
    filled = stage.wanted_scores.read_bytes()
    run_script(folder, "select", settings)
    assert stage.wanted_scores.read_bytes() == filled


def changed(**columns) -> Callable[[list[dict]], list[dict]]:
    """A table whose row 5 has other values."""
    return lambda rows: [*rows[:5], rows[5] | columns, *rows[6:]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:3] + rows[5:11] + rows[12:], r"lacks the scores of 3 ids: 3, 4, 11$|lacks .*: 3, 4, 11\b"),
        (changed(score=""), r"lacks the scores of 1 ids: 5\b"),
        (changed(score=" "), r"lacks the scores of 1 ids: 5\b"),
        (changed(id=4), "line 7: id 4 is given twice"),
        (changed(id=18), r"line 7: id 18 .*0\.\.17"),
        (changed(id=-1), r"line 7: id -1 .*0\.\.17"),
        (changed(id="5.5"), "line 7: id '5.5'.*must be numbers"),
        (changed(id=""), "line 7: id ''.*must be numbers"),
        (changed(score="good"), "line 7: .*'good' must be numbers"),
        (changed(score="0,5"), "line 7: .*'0,5' must be numbers"),
        (changed(score="nan"), "line 7: the score of id 5 is nan"),
        (changed(score="-inf"), "line 7: the score of id 5 is -inf"),
        (changed(score="1e999"), "line 7: the score of id 5 is 1e999"),
        (changed(score="1e39"), "5"),
        (changed(score="1_0"), "line 7: .*'1_0' must be numbers"),
        (changed(id="0_5"), "line 7: .*'0_5'.* must be numbers"),
        (lambda rows: [{"id": row["id"], "rating": row["score"]} for row in rows], r"columns \['id', 'rating'\]; it needs"),
        (lambda rows: [{"score": row["score"]} for row in rows], r"columns \['score'\]; it needs"),
    ],
    ids=["missing", "empty", "blank", "twice", "unknown", "negative", "fraction", "no id", "word", "comma", "nan", "inf",
         "huge", "huge for a float32", "underscore", "underscored id", "other column", "no id column"],
)  # fmt: skip
def test_scores_given_wrongly(begin, change, said):
    """Ids missing, double or unknown, scores that are no finite numbers, columns missing: two lines with the file and the
    ids or the line; nothing else on disk has changed."""
    folder, settings = begin(FILE)
    ran(folder, "select", settings)
    stage = stage_of(folder)
    fill(stage)
    write_table(stage.given_scores, change(read_table(stage.given_scores)))
    before = snapshot(folder)
    ended = run_script(folder, "select", settings)
    assert_refused(ended, said)
    assert ended.code == 2
    evidence = ("scores.jsonl", "debug/rewards.safetensors")  # of a number beyond a float32
    assert {name: data for name, data in snapshot(folder).items() if not name.endswith(evidence)} == before


@pytest.mark.parametrize("damage", ["semicolons", "decimal commas", "empty", "latin-1"])
def test_score_files_that_are_none(begin, damage):
    """Semicolons for commas, commas for points, an empty file, bytes that are not UTF-8: the file is named."""
    folder, settings = begin(FILE)
    ran(folder, "select", settings)
    stage = stage_of(folder)
    fill(stage)
    rows = read_table(stage.given_scores)
    match damage:
        case "semicolons":
            write_table(stage.given_scores, rows, delimiter=";")
        case "empty":
            stage.given_scores.write_bytes(b"")
        case "decimal commas":
            stage.given_scores.write_text("id,score\n" + "".join(f"{n},0,5\n" for n in range(NUM_IMAGES)))
        case "latin-1":
            write_table(stage.given_scores, [row | {"prompt": "café"} for row in rows], encoding="latin-1")
    refuse(folder, "select", settings, "scores_given.csv")


def test_other_images_need_another_reward(begin):
    """run_eval.py, whose images nobody has scored, judges without the reward; it is not a judge itself."""
    folder, settings = begin(FILE)
    result = json.loads(ran(folder, "eval", settings, "--checkpoint=base", "--sampler=training").splitlines()[-1])
    assert (result["reward"], result["n_images"]) == (None, 6)
    refuse(
        folder,
        "eval",
        settings | {"eval.judge": "file"},
        "eval.judge is file",
        arguments=(
            "--checkpoint=base",
            "--sampler=training",
        ),
    )


def run_process(folder: Path, settings: dict, variables: dict[str, str]) -> tuple[int, list[str]]:
    """run_process.sh, each `python` of it a call in this process; its exit code and the scripts it ran, with their stage."""
    asked, answered, stub = folder / "asked", folder / "answered", folder / "bin" / "python"
    for pipe in (asked, answered):
        if not pipe.exists():
            os.mkfifo(pipe)
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" > {asked}\nread -r code < {answered}\ncat {folder}/stdout\nexit "$code"\n'
    )
    stub.chmod(0o755)
    shell = {}

    def run_shell() -> None:
        shell["ended"] = subprocess.run(
            ["bash", ROOT / "run_process.sh", *flags(settings | {"save_path": folder / "model/lora", "log_path": folder})],
            env=os.environ | variables | {"Preset": "sd14", "PATH": f"{stub.parent}:{os.environ['PATH']}"},
            capture_output=True,
            timeout=120,
        )
        asked.write_text("")

    thread = threading.Thread(target=run_shell, daemon=True)
    thread.start()
    ran_scripts = []
    while argv := asked.read_text().splitlines():
        script, *rest = argv[1:] if argv[0] == "-m" else argv
        path = script.replace(".", "/") + ".py" if argv[0] == "-m" else script
        ended = call(ROOT, [path, *rest], lambda path=path: runpy.run_path(str(ROOT / path), run_name="__main__"))
        ran_scripts.append(f"{Path(path).stem} {rest[-1].partition('run_name=')[2]}".strip())
        (folder / "stdout").write_text(ended.stdout)
        answered.write_text(f"{ended.code or 0}\n")
        assert not ended.code, ended.stderr
    thread.join()
    return shell["ended"].returncode, ran_scripts


@pytest.mark.long
def test_run_process_waits_for_scores_stage_by_stage(overrides, tmp_path):
    """Reward=file bash run_process.sh: each call ends well after sampling, before training or another stage, until the
    scores are there; the same command then trains and waits at the next stage; at the end both are judged."""
    settings = {key: value for key, value in overrides.items() if key != "exp_name"}
    variables = {"Reward": "file", "ExpName": "tiny"}
    start, first = ["begin"], [f"run_{verb} stage0" for verb in VERBS]
    assert run_process(tmp_path, settings, variables) == (0, start + first[:2])
    before = snapshot(experiment(tmp_path))
    assert run_process(tmp_path, settings, variables) == (0, start + first[:2])
    assert snapshot(experiment(tmp_path)) == before
    fill(stage_of(tmp_path))
    first.append("run_eval")  # when it is due
    second = [f"run_{verb} stage1" for verb in VERBS]
    assert run_process(tmp_path, settings, variables) == (0, start + first + second[:2])
    assert stage_of(tmp_path).finished("train")
    assert stage_of(tmp_path, 1).wanted_scores.is_file()
    values = fill(stage_of(tmp_path, 1))
    code, scripts = run_process(tmp_path, settings, variables)
    assert (code, scripts) == (0, [*start, *first, *second, *["run_eval"] * 3])
    assert [row["reward"] for row in scores(tmp_path, 1)] == values
    assert (experiment(tmp_path) / "report.html").is_file()


# ---- what goes wrong ----

HUB_KEYS = {
    "clip": ("clip.model",),
    "pickscore": ("pickscore.model",),
    "aesthetic": ("aesthetic.clip", "aesthetic.head"),
    "bertscore": ("bertscore.captioner", "bertscore.scorer"),
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in HUB_KEYS.items() for key in keys])
def test_a_model_out_of_reach(begin, overrides, tmp_path, name, key):
    """Offline, the id of a reward's model that is not here is named within seconds, with the command that gets it, before
    any sampling and again in selecting; as a judge that watches, too."""
    zoo = {"clip": tiny.clip(tmp_path / "clip"), "head": tmp_path / "head" / "head.pth"}
    tiny.aesthetic_head(tmp_path / "head", tiny.WIDTH)
    here = {
        "clip.model": zoo["clip"],
        "pickscore.model": zoo["clip"],
        "aesthetic.head": zoo["head"],
    }
    here |= {"aesthetic.clip": zoo["clip"], "bertscore.captioner": zoo["clip"], "bertscore.scorer": zoo["clip"]}
    missing = {f"reward.{other}": str(path) for other, path in here.items()} | {f"reward.{key}": "nobody/no-model"}
    missing |= {"eval.diversity": ()}
    folder, settings = begin(missing | {"reward.name": name})
    for verb in ("sample", "select"):
        refuse(folder, verb, settings, "nobody/no-model .*hf download nobody/no-model")
    if name != "clip":
        refuse(folder, "select", settings | {"reward.name": "clip", "reward.watch": (name,), "exp_name": "other"}, "nobody")


@pytest.mark.parametrize("name", ["image_reward", "hps_v2", "vqascore"])
def test_imscore_that_is_not_installed(empty, overrides, monkeypatch, name):
    """The pip command stands in the error, before any sampling."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "imscore" else find(name, *more))
    refuse(empty, "sample", overrides | {"reward.name": name}, f"{name} needs.*pip install -r requirements-rewards")


def test_an_unknown_reward_in_selecting(begin):
    """The names there are, are named; also for a function that is not in its module, and a module that is not there."""
    folder, settings = begin({"reward.name": "beauty"})
    refuse(folder, "select", settings, "unknown reward 'beauty'.*clip, pickscore.*shapes, http, file.*module:function")


def test_a_function_that_returns_too_few_scores(begin, module):
    """Both numbers and the batch are told; nothing on disk has changed."""
    mine = module(REDNESS + "def short(images, prompts):\n    return redness(images, prompts)[1:]\n")
    folder, settings = begin({"reward.name": f"{mine}:short"})
    refuse(folder, "select", settings, r"shape \(3,\) for 4 images", f"reward {mine}:short, batch 0: images 0 to 3 of ")


@pytest.mark.parametrize("watched", [False, True])
def test_a_function_that_returns_nan(begin, sampled, module, watched):
    """The run stops with the very ids, which scores.jsonl has as null; nothing that was there has changed."""
    limit = float(np.median([redness(image) for image in pixels(sampled)]))
    mine = module(REDNESS + f"def bad(images, prompts):\n    values = redness(images, prompts)\n"
                  f"    return values.where(values < {limit}, float('nan'))\n")  # fmt: skip
    bad = [n for n, image in enumerate(pixels(sampled)) if redness(image) >= limit]
    assert 0 < len(bad) < NUM_IMAGES
    folder, settings = begin({"reward.watch": (f"{mine}:bad",)} if watched else {"reward.name": f"{mine}:bad"})
    before = snapshot(folder)
    ended = run_script(folder, "select", settings)
    assert_refused(ended, f"reward {mine}:bad is not finite for images {re.escape(str(bad))} of .*scores.jsonl")
    after = snapshot(folder)
    assert {name: after[name] for name in before} == before
    assert not stage_of(folder).finished("select")
    found = [row["watch"][f"{mine}:bad"] if watched else row["reward"] for row in scores(folder)]
    assert [n for n, value in enumerate(found) if value is None] == bad


def test_a_function_that_raises(begin, module):
    """Its own traceback is shown, with the batch and its images; the exit code is not 0 and nothing on disk has changed."""
    mine = module(
        "import torch\ncalls = []\n"
        "def fails(images, prompts):\n    calls.append(1)\n"
        "    return torch.zeros(len(prompts)) + 1 // (3 - len(calls))  # the third batch\n"
    )
    folder, settings = begin({"reward.name": f"{mine}:fails"})
    before = snapshot(folder)
    ended = run_script(folder, "select", settings)
    assert ended.code not in (0, None)
    assert "# the third batch" in ended.stderr
    assert "ZeroDivisionError" in ended.stderr
    last = ended.stderr[ended.stderr.rindex("RuntimeError") :]
    assert re.search(f"reward {mine}:fails raised ZeroDivisionError", last)
    assert re.search(f"reward {mine}:fails, batch 2: images 8 to 11 of .*images", last)
    assert snapshot(folder) == before


@pytest.mark.parametrize("content", [b"", b"not a picture", "half"])
def test_an_image_that_cannot_be_read(begin, sampled, tmp_path, content):
    """run_select.py notices that a file is not what was written; reading it anyway names it as well."""
    folder, settings = begin({})
    path = stage_of(folder).image(3)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if content == "half" else content)
    refuse(folder, "select", settings, r"00003\.png.*checksum")
    with pytest.raises(ValueError, match=r"00003\.png cannot be read as an image"):
        files.read_image(path)
    path.unlink()
    refuse(folder, "select", settings, r"00003\.png is missing")
    with pytest.raises(ValueError, match=r"00003\.png cannot be read as an image"):
        files.read_image(path)


# ---- how it runs ----


@pytest.fixture
def scored(begin, overrides) -> Callable:
    """scored(batch_size, num_workers) -> JPEG sizes of the sampled stage's images."""
    folder, settings = begin({})
    rewards = read_settings(make_config(settings)).rewards
    reward, stage = load_reward("jpeg_incompressibility", rewards, CPU), stage_of(folder)

    def run(batch_size: int, num_workers: int, reward=reward) -> list[float]:
        prompts = json.loads(stage.prompts.read_text())
        return join(score_images("jpeg", reward, Batches(stage, prompts, batch_size), num_workers=num_workers))[0].tolist()

    run.stage = stage
    return run


@pytest.mark.parametrize(("batch_size", "num_workers"), [(4, 1), (4, 4), (5, 3), (1, 2), (18, 1), (50, 4)])
def test_reading_ahead_changes_nothing(scored, batch_size, num_workers):
    """Any number of readers, a batch size that divides or does not or is too large: each image its own score, in order."""
    images = [np.asarray(Image.open(scored.stage.image(n))) for n in range(NUM_IMAGES)]
    assert scored(batch_size, num_workers) == pytest.approx([jpeg_kb(image) for image in images], rel=1e-6)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("num_workers", [1, 4])
def test_an_unreadable_image_among_many_is_named(scored, num_workers):
    """In whichever batch it is, the error names it and comes at once."""
    for number in (17, 9, 0):
        scored.stage.image(number).write_bytes(b"\x89PNG")
        with pytest.raises(ValueError, match=f"{number:05d}.png cannot be read") as raised:
            scored(4, num_workers)
        first = number // 4 * 4
        assert f"images {first} to {min(first + 3, 17)} of" in raised.value.__notes__[0]


@pytest.mark.timeout(30)
def test_the_next_batch_is_read_while_one_is_scored(scored):
    """While the first batch is scored a reader waits at the second's first image, here a pipe that nobody fills."""
    pipe, opened = scored.stage.image(4), []
    pipe.unlink()
    os.mkfifo(pipe)

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        for _ in range(1000):
            with contextlib.suppress(OSError):  # there is no reader yet
                opened.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
                break
            time.sleep(0.01)
        for descriptor in opened:
            os.close(descriptor)
        if not opened:  # whoever reads it later must not wait for ever
            pipe.unlink()
        return torch.zeros(len(prompts))

    with pytest.raises(ValueError, match=r"00004\.png cannot be read"):
        scored(4, 4, reward)
    assert opened


def test_a_model_is_loaded_once_a_stage(begin, models, tmp_path, monkeypatch):
    """One load for each reward that needs a model, however many batches there are; the captioner's and the scorer's too."""
    loaded, load = [], PreTrainedModel.from_pretrained.__func__

    def counting(cls, *args, **kwargs):
        loaded.append(cls.__name__)
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counting))
    tiny.aesthetic_head(tmp_path / "head", tiny.WIDTH)
    local = {"pickscore.model": models / "clip", "aesthetic.clip": models / "clip",
             "aesthetic.head": tmp_path / "head" / "head.pth", "bertscore.captioner": tiny.llava(tmp_path / "llava"),
             "bertscore.scorer": tiny.deberta(tmp_path / "deberta"), "bertscore.question": "what is this ?",
             "bertscore.num_layers": 2, "bertscore.max_new_tokens": 4}  # fmt: skip
    local = {f"reward.{key}": value if isinstance(value, int) else str(value) for key, value in local.items()}
    folder, settings = begin(
        local | {"reward.weights": {"clip": 1.0, "aesthetic": 0.1, "bertscore": 1.0}, "reward.watch": ("pickscore",)}
    )
    loaded.clear()
    ran(folder, "select", settings)
    assert Counter(loaded) == {"CLIPModel": 3, "LlavaForConditionalGeneration": 1, "DebertaModel": 1}
    for row in scores(folder):
        assert isinstance(row["parts"]["bertscore/caption"], str)
        assert row["parts"]["bertscore"] == row["parts"]["bertscore/recall"] > 0


# ---- README ----


def test_the_readmes_reward_runs(begin, tmp_path, monkeypatch):
    """The reward in README, of at most ten lines, works under the name given there; the scores are what it returns."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    source = next(block for block in blocks if "def " in block and "images" in block)
    assert len([line for line in source.splitlines() if line.strip()]) <= 10
    name, function = re.search(r"Reward=(\w+):(\w+)", text).groups()
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder, settings = begin({"reward.name": f"{name}:{function}"})
    sys.modules.pop(name, None)  # another test's module of that name
    try:
        ran(folder, "select", settings)
    finally:
        sys.modules.pop(name, None)
    space: dict = {}
    exec(source, space)
    rows = scores(folder)
    result = space[function](torch.from_numpy(np.stack(pixels(folder))), [row["prompt"] for row in rows])
    expected = (result[0] if isinstance(result, tuple) else result).float().tolist()
    assert [row["reward"] for row in rows] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(set(expected)) > 1


# ---- what a reward's parts may be ----

PARTED = """
import torch

calls = []

def some(images, prompts):
    calls.append(len(prompts))
    late = {"late": images.float().mean((1, 2, 3)), "said": list(prompts)}
    parts = late if len(calls) > 1 else {"holed": images[:, 0, 0, 0] / 0}
    return images.float().mean((1, 2, 3)), parts
"""


def test_parts_that_some_batches_lack(begin, module):
    """A part that only later batches have stands beside their images, and null or nothing beside the others; parts that are
    not finite are null; means are of what there is. run_eval.py takes the same parts."""
    mine = module(PARTED)
    folder, settings = begin({"reward.name": f"{mine}:some"})
    ran(folder, "select", settings)
    parts = [row["parts"] for row in scores(folder)]
    late = [row["reward"] for row in scores(folder)][BATCH:]
    assert [part["late"] for part in parts] == [None] * BATCH + late
    assert [part["said"] for part in parts] == [""] * BATCH + [row["prompt"] for row in scores(folder)[BATCH:]]
    assert {part["holed"] for part in parts} == {None}
    (metrics,) = map(json.loads, stage_of(folder).metrics("select").read_text().splitlines())
    assert metrics["late_mean"] == pytest.approx(
        np.mean(late), rel=1e-6
    )  # of the images alone, not of what pads the last batch
    assert "holed_mean" not in metrics
    sys.modules[mine].calls.clear()
    result = json.loads(ran(folder, "eval", settings, "--checkpoint=base", "--sampler=training").splitlines()[-1])
    assert result[f"{mine}:some/late"] > 0
    assert result[f"{mine}:some/holed"] is None


def test_the_checker_on_prompts_of_different_forms(begin, overrides, tmp_path):
    """The checker's `relation` is there for the prompts that have one, wherever in the stage they come."""
    (tmp_path / "mixed.txt").write_text("a red circle\n" * 5 + "a red circle left of a blue square\n")
    settings = overrides | {"reward.name": "shapes", "eval.diversity": (), "prompt_random_choose": 0}
    settings |= {"prompt_file": str(tmp_path / "mixed.txt")}
    folder = tmp_path / "mixed"
    folder.mkdir()
    for verb in ("sample", "select"):
        ran(folder, verb, settings)
    rows = scores(folder)
    asked = ["left of" in row["prompt"] for row in rows]
    assert sum(asked) == 3
    assert all(row["parts"]["relation"] is not None for row, relation in zip(rows, asked, strict=True) if relation)
    assert rows[0]["parts"]["relation"] is None


def big(images, prompts):
    """A reward near the largest float32."""
    return torch.full((len(images),), 1e38)


def test_a_sum_that_is_not_finite(begin):
    """Each reward is finite, their weighted sum is beyond a float32: the run stops with the ids."""
    folder, settings = begin({"reward.weights": {f"{__name__}:big": 1e3}})
    said = r"reward \(weighted sum\) is not finite for images \[0, 1, 2, .*scores.jsonl"
    assert_refused(run_script(folder, "select", settings), said)


def test_what_else_belongs_to_an_evaluation(begin):
    """An evaluation without a watched reward is not taken for one with it, though the judge has said the same; nor one of
    other weights, or of another precision, for this one."""
    folder, settings = begin({"eval.judge": JPEG})
    ran(folder, "eval", settings, "--checkpoint=base", "--sampler=training")
    watching = settings | {"reward.watch": (JPEG,)}
    result = json.loads(ran(folder, "eval", watching, "--checkpoint=base", "--sampler=training").splitlines()[-1])
    assert result[JPEG] == result["accuracy"] < 0
    folders = len([*(experiment(folder) / "eval").iterdir()])
    ran(folder, "eval", watching, "--checkpoint=base", "--sampler=training")
    assert len([*(experiment(folder) / "eval").iterdir()]) == folders == 2
    for weight in (1.0, 2.0):
        ran(folder, "eval", settings | {"reward.weights": {CLIP: weight}}, "--checkpoint=base", "--sampler=training")
    ran(folder, "eval", settings | {"reward.dtype": "bfloat16"}, "--checkpoint=base", "--sampler=training")
    assert len([*(experiment(folder) / "eval").iterdir()]) == 5


def test_standardised_evaluation_of_another_experiment(workplace, overrides):
    """An experiment that was selected without scales, or before there were any, has none to judge with: it is said so."""
    settings = overrides | {"reward.weights": {"clip": 1.0}, "reward.standardise": True}
    refuse(
        workplace,
        "eval",
        settings,
        "none selected with it",
        arguments=(
            "--checkpoint=base",
            "--sampler=training",
        ),
    )
    manifest = stage_of(workplace).manifest_path("select")
    without = {key: value for key, value in files.read_json(manifest).items() if key != "scales"}
    files.write_record(manifest, without)
    refuse(
        workplace,
        "eval",
        settings,
        "none selected with it",
        arguments=(
            "--checkpoint=base",
            "--sampler=training",
        ),
    )


@pytest.mark.parametrize("source", ["import json\njson.loads('{')\n", "import no_such_package\n"])
def test_a_module_that_raises_when_imported(empty, overrides, module, source):
    """Its own traceback is shown, not advice on where to keep it."""
    mine = module(source)
    ended = run_script(empty, "sample", overrides | {"reward.name": f"{mine}:reward"})
    assert ended.code == 1
    assert f"reward {mine}:reward: importing {mine} raised" in ended.stderr
    assert re.search(rf'{mine}.py", line \d', ended.stderr)
    assert not experiment(empty).exists()
