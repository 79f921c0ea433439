"""Scoring beside sampling: the scores are those of select alone, nothing is asked for twice, and a failure is select's."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
import torch
from chat_server import Request, chat_server
from conftest import assert_refused, assert_same, make_config, ran, run_script, stage_of
from PIL import Image
from scored import BATCH, NUM_IMAGES, pixels, redness, scores

from b2diffurl.configuration.settings import read_settings
from b2diffurl.experiment.scored_batches import ScoredBatches
from b2diffurl.experiment.stage import Stage
from b2diffurl.phases import sample, scoring_beside
from b2diffurl.rewards import waits

NUM_BATCHES = -(-NUM_IMAGES // BATCH)


def scored(request: Request) -> dict:
    """A server's right answer: redness."""
    images = [Image.open(io.BytesIO(base64.b64decode(image))) for image in request["images"]]
    return {"scores": [redness(np.asarray(image)) for image in images]}


def settings(overrides: dict, url: str, **more) -> dict:
    own = {"reward.name": "http", "reward.http.url": url, "reward.http.timeout_sec": 10.0, "reward.http.num_retries": 0}
    return overrides | own | more


@pytest.fixture
def places(tmp_path) -> Callable[[str], Path]:
    """places(name): an empty folder to work in."""

    def make(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make


def wait_for(reached: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not reached() and time.monotonic() < until:
        time.sleep(0.01)


def test_the_scores_are_those_of_select_alone(places, overrides, monkeypatch):
    """Every file of the stage is the same, and each batch is asked for once: those on disk while the stage is sampled."""
    with chat_server(scored) as (url, requests):
        beside, alone = places("beside"), places("alone")
        decode = sample.decode

        def decode_and_wait(*given):  # until the server has had the batches before: however slow this machine is
            images = decode(*given)
            wait_for(lambda: len(requests) >= len(list(stage_of(beside).images.glob("*.png"))) // BATCH)
            return images

        with monkeypatch.context() as patched:
            patched.setattr(sample, "decode", decode_and_wait)
            ran(beside, "sample", settings(overrides, url))
        asked = len(requests)
        assert 2 <= asked <= NUM_BATCHES
        assert len(list(stage_of(beside).scored.iterdir())) == asked
        ran(beside, "select", settings(overrides, url))
        assert len(requests) == NUM_BATCHES
        assert not stage_of(beside).scored.exists()
        monkeypatch.setattr(scoring_beside, "waits", lambda _: False)
        ran(alone, "sample", settings(overrides, url))
        assert len(requests) == NUM_BATCHES
        ran(alone, "select", settings(overrides, url))
    assert len(requests) == 2 * NUM_BATCHES
    assert_same(beside, alone)


@pytest.mark.long
def test_a_stage_with_a_slow_server_takes_the_longer_of_both(places, overrides, monkeypatch):
    """A server that sleeps, beside batches that take as long: sampling and scoring one after the other would be slower by
    what is scored beside sampling."""
    nap_sec = 0.4
    decode = sample.decode
    monkeypatch.setattr(sample, "decode", lambda *given: time.sleep(nap_sec) or decode(*given))
    seconds = {}
    with chat_server(lambda request: time.sleep(nap_sec) or scored(request)) as (url, _):
        for name, asked in (("beside", waits), ("alone", lambda _: False)):
            monkeypatch.setattr(scoring_beside, "waits", asked)
            folder = places(name)
            started = time.monotonic()
            for verb in ("sample", "select"):
                ran(folder, verb, settings(overrides, url))
            seconds[name] = time.monotonic() - started
    # Of three sampling batches two are followed by another one, in whose time a batch of scores is made.
    assert seconds["beside"] < seconds["alone"] - nap_sec


def test_a_server_that_is_not_there_yet_is_left_to_select(places, overrides):
    """It may be started while a stage is sampled: that goes on, with a line in the log, and select asks."""
    folder = places("work")
    with chat_server(scored) as (url, _):
        pass
    said = ran(folder, "sample", settings(overrides, url))
    assert "reward http is left to select, because beside sampling it failed: " in said
    assert not stage_of(folder).scored.exists()
    with chat_server(scored) as (url, requests):
        ran(folder, "select", settings(overrides, url))
    assert len(requests) == NUM_BATCHES


def test_what_is_scored_is_not_asked_for_again(places, overrides):
    """A server goes down in the middle of select. The same command asks for what is missing, and for what is damaged."""
    folder, left = places("work"), [True] * 3
    with chat_server(lambda request: scored(request) if left and left.pop() else (500, {}, b"down")) as (url, requests):
        ran(folder, "sample", settings(overrides, "http://127.0.0.1:9/"))
        assert_refused(run_script(folder, "select", settings(overrides, url)), "answered 500")
        kept = sorted(stage_of(folder).scored.iterdir())
        assert [path.name for path in kept] == ["http_00000.json", "http_00004.json", "http_00008.json"]
        kept[1].write_bytes(kept[1].read_bytes().replace(b"0.", b"1.", 1))
        left[:] = [True] * NUM_BATCHES
        del requests[:]
        ran(folder, "select", settings(overrides, url))
    assert len(requests) == NUM_BATCHES - 2
    assert [row["reward"] for row in scores(folder)] == pytest.approx([redness(image) for image in pixels(folder)], rel=1e-6)


def test_another_server_or_another_image_is_asked_for_anew(places, overrides):
    """What was kept counts for the same reward and the same images only."""
    folder = places("work")
    ran(folder, "sample", settings(overrides, "http://127.0.0.1:9/"))
    left = [*range(3)]
    with chat_server(lambda request: scored(request) if left and left.pop() >= 0 else (500, {}, b"down")) as (url, _):
        assert_refused(run_script(folder, "select", settings(overrides, url)), "answered 500")
    with chat_server(lambda request: {"scores": [5.0] * len(request["images"])}) as (other, requests):
        ran(folder, "select", settings(overrides, other))
    assert len(requests) == NUM_BATCHES
    assert {row["reward"] for row in scores(folder)} == {5.0}


@pytest.mark.parametrize("wrong", [b'{"scores": [1, 2, 3]}', b'{"scores": [1, 2, 3, NaN]}'], ids=["too few", "NaN"])
def test_a_wrong_answer_forgets_the_others(places, overrides, wrong):
    """A server that gives a wrong answer is about to be mended, and may have scored the other batches wrong, too."""
    folder = places("work")
    ran(folder, "sample", settings(overrides, "http://127.0.0.1:9/"))
    count = iter(range(NUM_BATCHES))
    with chat_server(lambda request: wrong if next(count, 9) == 2 else scored(request)) as (url, _):
        assert_refused(run_script(folder, "select", settings(overrides, url)), "reward http")
        assert not list(stage_of(folder).scored.glob("*"))


def test_an_error_in_sampling_does_not_wait_for_a_server(places, overrides, monkeypatch):
    """Sampling fails while the server sleeps: the run ends at once."""
    decode, calls = sample.decode, []

    def fail_at_the_third(*given):
        calls.append(time.sleep(0.3))
        if len(calls) > 3:
            raise ValueError("no room")
        return decode(*given)

    monkeypatch.setattr(sample, "decode", fail_at_the_third)
    asleep = threading.Event()
    with chat_server(lambda _: asleep.set() or time.sleep(20) or (500, {}, b"")) as (url, _):
        started = time.monotonic()
        ended = run_script(places("work"), "sample", settings(overrides, url) | {"reward.http.timeout_sec": 30.0})
    assert ended.code == 2
    assert asleep.is_set()
    assert time.monotonic() - started < 15


def test_an_evaluation_is_scored_beside_drawing(places, overrides):
    """The same figures as when a batch is scored before the next is drawn, in fewer seconds than both need."""
    folder = places("work")
    with chat_server(scored) as (url, _):
        ran(folder, "sample", settings(overrides, url))
        ran(folder, "eval", settings(overrides, url), "--checkpoint=base", "--sampler=training")
    result = next(folder.rglob("eval/*/result.json"))
    images = sorted(result.parent.glob("*.png"))
    expected = [redness(np.asarray(Image.open(path))) for path in images]
    assert json.loads(result.read_text())["values"]["reward"] == pytest.approx(expected, rel=1e-6)


def test_a_batch_is_scored_once_all_of_its_images_are_there(tmp_path):
    """In the order in which they are complete, the shorter last one, too; what another process has sampled is never."""
    rewards = read_settings(make_config({"reward.name": "http", "reward.batch_size": 3})).rewards
    with scoring_beside.Beside(rewards, Stage(tmp_path, 0), ["a"] * 8) as beside:
        beside.lanes[0].end()
        beside.lanes[0].thread.join()
        beside.lanes[0].starts = SimpleQueue()
        given = []
        for n in (0, 1, 6, 3, 4, 7, 5):  # 2 is another's
            beside.written([n])
            while not beside.lanes[0].starts.empty():
                given.append((n, beside.lanes[0].starts.get()))
    assert given == [(7, 6), (5, 3)]


def test_what_is_kept_is_of_these_images_and_prompts(tmp_path):
    """One pixel, another prompt or another reward, and it is another batch."""
    kept = ScoredBatches(Stage(tmp_path, 0), "vlm", "a", may_lack_scores=True, keeps_holes=False)
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    key = kept.key(images, ["x", "y"])
    kept.keep(0, key, {"rewards": [1.0]})
    assert kept.find(0, key) == {"rewards": [1.0]}
    other = images.clone()
    other[1, 3, 3, 2] = 1
    keys = [kept.key(other, ["x", "y"]), kept.key(images, ["x", "z"]), replace(kept, identity="b").key(images, ["x", "y"])]
    assert [kept.find(0, one) for one in keys] == [None] * 3
    assert len({key, *keys}) == 4
