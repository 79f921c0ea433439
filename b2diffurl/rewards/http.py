"""A reward behind a URL: images and prompts go out as JSON, scores come back. docs/reward_server.py is such a server.

Request: POST {"prompts": ["a cat", …], "images": ["<PNG, base64>", …]}. Answer: {"scores": [0.5, …]}, one for each image.
The environment variable REWARD_HTTP_AUTHORIZATION, if set, is sent as the header Authorization. It is never written to disk.
"""

import base64
import contextlib
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException, HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from b2diffurl.rewards import Reward
from b2diffurl.runtime.logs import logger

NOT_DECISIVE = ("timeout_sec", "num_retries")
FIRST_WAIT_SEC = 0.5  # before the first retry; each further wait is twice as long
AUTHORIZATION = "REWARD_HTTP_AUTHORIZATION"


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: urllib would repeat the request as a GET, without the images."""

    def redirect_request(self, *_: object) -> None:
        return None


OPENER = urllib.request.build_opener(NoRedirect)


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
            with OPENER.open(request, timeout=timeout_sec) as answer:
                return read_within(answer, timeout_sec)
        except urllib.error.HTTPError as error:
            said = b""
            with contextlib.suppress(OSError, HTTPException):
                said = error.read(500)
            problem = f"{url} answered {error.code} {error.reason}: {without_secret(said)}".rstrip(": ")
            if error.code < 500:  # the request itself is wrong: asking again would not help
                break
        except TimeoutError:
            problem = f"{url} did not answer within {timeout_sec} s (reward.http.timeout_sec)"
        except (OSError, HTTPException) as error:  # refused, unknown host, connection lost, no HTTP
            slow = isinstance(getattr(error, "reason", None), TimeoutError)
            problem = f"{url} cannot be reached within {timeout_sec} s" if slow else f"{url} cannot be asked: {error}"
    raise ConnectionError(f"reward http: {problem}; asked {attempt + 1} time{'s' if attempt else ''}")


def without_secret(said: bytes) -> str:
    """A server's answer as text, with our secret replaced by *** in case the server repeats it."""
    words = os.environ.get(AUTHORIZATION, "").split()
    text = said.decode(errors="replace")
    return text.replace(words[-1], "***") if words else text


def read_within(answer: HTTPResponse, timeout_sec: float) -> bytes:
    """Read the whole answer within `timeout_sec`, or raise a TimeoutError.

    urllib's own timeout bounds only the wait for the next bytes. A server that sends a few at a time would never reach it.
    """
    data, deadline = b"", time.monotonic() + timeout_sec
    while chunk := answer.read1():
        data += chunk
        if time.monotonic() > deadline:
            raise TimeoutError
    if answer.length:
        raise IncompleteRead(data, answer.length)
    return data


def read_scores(answer: bytes, url: str, count: int) -> Tensor:
    """Parse the scores [count] of an answer; a ValueError says what the server should have sent."""
    try:
        scores = json.loads(answer)["scores"]
    except (ValueError, KeyError, TypeError):
        shown = without_secret(answer)[:200]
        raise ValueError(f'reward http: {url} answered {shown!r}, not {{"scores": […]}}') from None
    if not isinstance(scores, list) or not all(type(value) in (int, float) for value in scores):
        raise ValueError(f"reward http: the scores of {url} are not a list of numbers")
    if len(scores) != count:
        raise ValueError(f"reward http: {url} answered {len(scores)} scores for {count} images")
    try:
        return torch.tensor(scores, dtype=torch.float32)
    except OverflowError:  # an integer beyond any float
        raise ValueError(f"reward http: one of the scores of {url} is too large for a float") from None
