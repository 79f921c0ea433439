"""A reward behind a URL: images and prompts go out as JSON, scores come back. docs/reward_server.py is such a server.

Request: POST {"prompts": ["a cat", …], "images": ["<PNG, base64>", …]}. Answer: {"scores": [0.5, …]}, one for each image.
The environment variable REWARD_HTTP_AUTHORIZATION, if set, is sent as the header Authorization. It is never written to disk.
"""

import base64
import io
import ipaddress
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from b2diffurl.rewards import Reward
from b2diffurl.runtime.logs import logger, printable

WAITS = True  # for a server: a batch can be scored while the next images are sampled
NOT_DECISIVE = ("timeout_sec", "num_retries")
FIRST_WAIT_SEC = 0.5  # before the first retry; each further wait is twice as long
AUTHORIZATION = "REWARD_HTTP_AUTHORIZATION"
MAX_ANSWER_BYTES = 2**24  # of a server; a score takes about 20
MAX_SHOWN = 200  # characters of what a server said, in an error


def check(name: str, own: Mapping[str, Any], prompts: Sequence[str]) -> None:
    if not own["url"].startswith(("http://", "https://")):
        raise ValueError(f"reward.http.url is {own['url']!r}; give that of a reward server, http://HOST:PORT/…")


def files(name: str, own: Mapping[str, Any]) -> list[Path]:
    return []


def load(name: str, own: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Reward:
    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        body = {"prompts": list(prompts), "images": [encode(image) for image in images]}
        return read_scores(post(json.dumps(body).encode(), **own), own["url"], len(prompts))

    return reward


def encode(image: Tensor) -> str:
    """An image uint8 [H,W,3] as PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(image.cpu().numpy()).save(buffer, format="png", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def post(body: bytes, *, url: str, timeout_sec: float, num_retries: int) -> bytes:
    """Send `body` by POST and return the answer.

    If the server is down, too slow, or answers with an error of its own (5xx), it is asked again, `num_retries` times at
    most. Then a ConnectionError says what happened last.
    """
    secret = os.environ.get(AUTHORIZATION, "").strip()
    if not secret.isprintable():
        raise ValueError(f"the variable {AUTHORIZATION} has a character in it that no header can have")
    headers = {"Content-Type": "application/json"} | ({"Authorization": secret} if secret else {})
    request = urllib.request.Request(url, body, headers)
    problem = ""
    for attempt in range(num_retries + 1):
        if attempt:
            logger.warning("reward http: %s; asking again (%d of %d)", problem, attempt, num_retries)
            time.sleep(FIRST_WAIT_SEC * 2 ** (attempt - 1))
        try:
            return exchange(request, timeout_sec)
        except urllib.error.HTTPError as error:
            problem = f"{url} answered {error.code} {shown(error.reason)}: {shown(error.said)}".rstrip(": ")
            if error.code < 500:  # the request itself is wrong: asking again would not help
                break
        except TimeoutError:
            problem = f"{url} did not answer within {timeout_sec} s (reward.http.timeout_sec)"
        except (OSError, HTTPException) as error:  # refused, unknown host, connection lost, no HTTP
            problem = f"{url} cannot be asked: {shown(str(error))}"
    raise ConnectionError(f"reward http: {problem}; asked {attempt + 1} time{'s' if attempt else ''}")


def shown(said: bytes | str, secret: str | None = None) -> str:
    """What a server said, for an error: cut, without control characters, and with *** for the secret if it repeats that.

    Without a `secret` it is the one of this reward.
    """
    text = said[: 4 * MAX_SHOWN].decode(errors="replace") if isinstance(said, bytes) else said
    for word in (os.environ.get(AUTHORIZATION, "") if secret is None else secret).split()[-1:]:
        text = text.replace(word, "***")
    text = printable(text[:MAX_SHOWN])
    return text if len(text) < MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


# ---- one exchange with the server ----


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: urllib would repeat the request as a GET, without the images."""

    def redirect_request(self, *_: object) -> None:
        return None


class Line(HTTPConnection):
    """A connection that another thread can cut, whatever this one waits for."""

    twin: socket.socket | None = None
    is_cut = False

    def connect(self) -> None:
        super().connect()
        self.twin = self.sock.dup()  # the socket itself is handed on, to TLS and to the answer
        if self.is_cut:  # while the host's name was looked up: nothing must be sent any more
            self.cut()
            self.close()
            raise TimeoutError

    def cut(self) -> None:
        self.is_cut = True
        if self.twin:
            with suppress(OSError):  # the server has cut it already
                self.twin.shutdown(socket.SHUT_RDWR)
            self.twin.close()


class SecureLine(HTTPSConnection, Line):
    """The same with TLS, which HTTPSConnection begins after `Line.connect`."""


class Lines(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections of ours, and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[Line] = []

    def keep(self, line: Line) -> Line:
        self.opened.append(line)
        return line

    def http_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(lambda *given, **options: self.keep(Line(*given, **options)), request)

    def https_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(lambda *given, **options: self.keep(SecureLine(*given, **options)), request)


def exchange(request: urllib.request.Request, timeout_sec: float) -> bytes:
    """Send the request and read the whole answer, or raise a TimeoutError after `timeout_sec` in all.

    An answer with an error status is an HTTPError, whose `said` is the first part of the answer. The time limit of a socket
    bounds only the wait for the next bytes: a server that sends a few at a time would never reach it. So the work is done in
    a thread, and its connection is cut when the time is over.
    """
    lines, answered = Lines(), Future()
    refused: list[urllib.error.HTTPError] = []
    # What runs on this machine is never asked by way of a proxy, whatever the environment says.
    proxies = [urllib.request.ProxyHandler({})] if is_local(urlsplit(request.full_url).hostname or "") else []

    def work() -> None:
        try:
            with urllib.request.build_opener(NoRedirect, lines, *proxies).open(request, timeout=timeout_sec) as answer:
                answered.set_result(read(answer))
        except urllib.error.HTTPError as error:
            error.said = b""
            refused.append(error)
            with suppress(OSError, HTTPException):
                error.said = error.read1(MAX_SHOWN)  # what is there: the rest may never come
            answered.set_exception(error)
        except urllib.error.URLError as error:  # urllib's wrapping of the error that tells more
            answered.set_exception(error.reason if isinstance(error.reason, Exception) else error)
        except Exception as error:
            answered.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return answered.result(timeout_sec)
    except TimeoutError:
        raise (refused[0] if refused else TimeoutError()) from None  # a status that came in time tells more
    finally:
        for line in lines.opened:
            line.cut()


def read(answer: HTTPResponse) -> bytes:
    """The whole answer; an HTTPException if it is cut off, or far too long."""
    data = answer.read(MAX_ANSWER_BYTES + 1)
    if len(data) > MAX_ANSWER_BYTES:
        raise HTTPException(f"its answer is longer than {MAX_ANSWER_BYTES} bytes")
    if answer.length:
        raise IncompleteRead(data, answer.length)
    return data


def is_local(host: str) -> bool:
    """Whether a host is this machine: localhost, 127.0.0.1, ::1 and the like."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def read_scores(answer: bytes, url: str, count: int) -> Tensor:
    """Parse the scores [count] of an answer; a ValueError says what the server should have sent."""
    try:
        scores = json.loads(answer, object_pairs_hook=without_repeats)["scores"]
    except (ValueError, KeyError, TypeError, RecursionError):  # no JSON, or not this; brackets in brackets without end
        wanted = '{"scores": […]}'
        raise ValueError(f"reward http: {url} answered '{shown(answer)}', not {wanted}") from None
    if not isinstance(scores, list) or not all(type(value) in (int, float) for value in scores):
        raise ValueError(f"reward http: the scores of {url} are not a list of numbers")
    if len(scores) != count:
        raise ValueError(f"reward http: {url} answered {len(scores)} scores for {count} images")
    try:
        return torch.tensor(scores, dtype=torch.float32)
    except OverflowError:  # an integer beyond any float
        raise ValueError(f"reward http: one of the scores of {url} is too large for a float") from None


def without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a ValueError if it has a key twice, of which Python would take the last."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)
