"""The reward of a server: what it is sent, what it may answer, and what happens when it does not."""

import base64
import contextlib
import io
import json
import re
import runpy
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    assert_refused,
    make_config,
    ran,
    refuse,
    run_script,
    snapshot,
)
from PIL import Image
from scored import BATCH, NUM_IMAGES, pixels, redness, scores

from b2diffurl.configuration.settings import read_settings
from b2diffurl.rewards import http, load_reward

CPU = torch.device("cpu")


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
        (lambda _: b"[" * 100_000, r"answered '\[+…', not", 1),
        (lambda _: b'{"scores": [1, 1, 1, 1], "scores": [2, 2, 2, 2]}', "answered.*not.*scores", 1),
        (lambda _: b"\x1b[2Jforged\nline" * 10**5, r"answered '\\x1b\[2Jforged\\nline.{150,200}…', not", 1),
        (lambda _: {"rewards": [1.0] * 4}, "answered.*rewards.*not.*scores", 1),
        (lambda _: [1.0] * 4, "answered.*not.*scores", 1),
        (lambda _: (500, b"out of cheese"), "answered 500 .*out of cheese; asked 2 times", 2),
        (lambda _: (503, b""), "answered 503 .*; asked 2 times", 2),
        (lambda _: (400, b"what?"), "answered 400 .*what.*; asked 1 time", 1),
        (lambda _: (400, b"\x1b]0;" + b"x" * 10**6), r"answered 400 .*: \\x1b\]0;x+…; asked 1 time", 1),
        (lambda _: (404, b""), "answered 404 .*; asked 1 time", 1),
        (lambda _: (-1, {"scores": [1.0] * 4}), "asked 2 times", 2),
        (lambda _: (0, b"hello\r\n"), "asked 2 times", 2),
        (lambda _: (-2, b'{"scores": [1.0, 1.0, 1.0, 1.0]}'), "did not answer within 0.3 s", 2),
        (lambda _: (-500, b"half"), "answered 500 ", 2),
        (lambda _: (302, b""), "answered 302 .*asked 1 time", 1),
    ],
    ids=["slow", "too few", "too many", "strings", "null", "lists", "a number", "beyond a float", "no JSON", "no text",
         "brackets", "twice", "escapes",
         "no scores", "a list", "500", "503", "400", "400 with escapes",
         "404", "cut off", "no HTTP", "drips", "500 that hangs", "elsewhere"],
)  # fmt: skip
def test_http_servers_that_misbehave(begin, serve, answer, said, num_requests):
    """Whatever comes back, two lines with the URL say what; only a server that is away, slow or broken is asked again, as
    often as allowed; nothing on disk has changed."""
    there, requests = serve(answer)
    folder, settings = begin(there)
    refuse(folder, "select", settings, re.escape(there["reward.http.url"]), said, "batch 0: images 0 to 3")
    assert len(requests) == num_requests


@pytest.fixture
def talk() -> Iterator[Callable]:
    """talk(first, again) -> the port of a server that answers `first`, and then `again` every 20 ms without end."""
    servers = []

    def start(first: bytes, again: bytes) -> int:
        def speak(server: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.sendall(first)
                        while True:
                            time.sleep(0.02)
                            connection.sendall(again)

        servers.append(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=speak, args=(servers[-1],), daemon=True).start()
        return servers[-1].getsockname()[1]

    yield start
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("first", "again", "body"),
    [
        (b"", b"", 10),
        (b"HTTP/1.1 ", b"2", 10),
        (OK + b"X: ", b"x", 10),
        (OK, b"X: x\r\n", 10),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 10),
        (OK + b"Content-Length: 10000\r\n\r\n", b"[", 10),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n0", b"0", 10),
        (b"HTTP/1.1 500 busy\r\nX: ", b"x", 10),
        (b"", b"", 50_000_000),
        (b"\x16\x03\x03\x40\x00", b"\x02", 10),
    ],
    ids=["silent", "status", "header", "headers", "continue", "body", "chunk size", "error", "does not read", "TLS"],
)
def test_http_the_time_limit_is_of_the_whole_exchange(talk, first, again, body):
    """However a server drips, in whatever part of its answer, the time is over in time, and nothing goes on behind."""
    before, started = threading.active_count(), time.perf_counter()
    scheme = "https" if first[:1] == b"\x16" else "http"
    url = f"{scheme}://127.0.0.1:{talk(first, again)}/"
    with pytest.raises(ConnectionError, match=r"did not answer within 0.2 s"):
        http.post(b"x" * body, url=url, timeout_sec=0.2, num_retries=0)
    assert time.perf_counter() - started < 2
    time.sleep(0.1)
    assert threading.active_count() <= before + 1  # the server's


def test_http_nothing_is_sent_when_the_time_is_over(serve, monkeypatch):
    """A host's name is found too late: the server is not asked behind the back of who waited."""
    there, requests = serve(lambda request: {"scores": [1.0]})
    look_up, found = socket.getaddrinfo, threading.Event()

    def slowly(*given: object, **options: object) -> list:
        time.sleep(0.5)
        found.set()
        return look_up(*given, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    with pytest.raises(ConnectionError, match=r"did not answer within 0.1 s"):
        http.post(b"{}", url=there["reward.http.url"], timeout_sec=0.1, num_retries=0)
    assert found.wait(5)
    time.sleep(0.3)
    assert requests == []


def test_http_words_of_a_status_line(talk):
    """A server's reason is escaped and cut, too, as is a first line that is no HTTP."""
    for first in (b"HTTP/1.1 400 \x1b[2J" + b"x" * 5000 + b"\r\n\r\n", b"\x1b[2J" + b"x" * 5000 + b"\r\n\r\n"):
        with pytest.raises(ConnectionError) as raised:
            http.post(b"", url=f"http://127.0.0.1:{talk(first, b'')}/", timeout_sec=0.5, num_retries=0)
        said = str(raised.value)
        assert said.isprintable()
        assert "\\x1b[2Jxxx" in said
        assert len(said) < 400


def test_http_an_answer_without_end(serve, monkeypatch):
    """More than scores can need is not read into memory."""
    there, _ = serve(lambda _: {"scores": [1.0] * 100})
    monkeypatch.setattr(http, "MAX_ANSWER_BYTES", 100)
    with pytest.raises(ConnectionError, match="its answer is longer than 100 bytes"):
        http.post(b"{}", url=there["reward.http.url"], timeout_sec=5.0, num_retries=0)


def test_http_by_way_of_a_proxy(serve, monkeypatch):
    """A server on this machine is asked directly, under any of its names, whatever proxy is set; one elsewhere by way of the
    proxy, unless NO_PROXY names it."""
    there, requests = serve(lambda request: {"scores": [1.0]})
    port = there["reward.http.url"].rpartition(":")[2]
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    limits = {"timeout_sec": 5.0, "num_retries": 0}
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")  # where nobody is
    for host in ("127.0.0.1", "localhost"):
        http.post(b"{}", url=f"http://{host}:{port}", **limits)
    monkeypatch.setenv("http_proxy", there["reward.http.url"])
    http.post(b"{}", url="http://rewards.invalid/score", **limits)
    assert len(requests) == 3
    monkeypatch.setenv("no_proxy", "rewards.invalid")
    with pytest.raises(ConnectionError, match="cannot be asked"):
        http.post(b"{}", url="http://rewards.invalid/score", **limits)
    assert [http.is_local(host) for host in ("::1", "127.1.2.3", "0.0.0.0", "a.localhost", "10.0.0.1", "localhost.org")] == (
        [True] * 4 + [False] * 2
    )


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
    assert [Path(name).name for name in written] == [
        "rewards.safetensors",
        "scores.jsonl",
    ]  # of no batch alone: it is mended
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
