"""OpenAI-compatible chat servers on loopback: one that answers as a test says, and one with a real vision-language model."""

import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

Request = dict[str, Any]
MODELS = json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode()


def completion(text: str, likeliest: dict[str, float] | None = None, *, tokens: int = 0) -> dict[str, Any]:
    """A chat completion as the API has it; `likeliest`: log-probabilities of the first token; `tokens` read, 0: 10 with an
    image and 5 without."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    if likeliest is not None:
        rows = [{"token": token, "logprob": value, "bytes": None} for token, value in likeliest.items()]
        choice["logprobs"] = {"content": [rows[0] | {"top_logprobs": rows}]}
    usage = {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


def image_of(request: Request) -> Image.Image | None:
    """The image in the first message of a request; None if there is none."""
    for part in request["messages"][0]["content"]:
        if part["type"] == "image_url":
            kind, data = part["image_url"]["url"].split(",", 1)
            assert kind == "data:image/png;base64"
            return Image.open(io.BytesIO(base64.b64decode(data)))
    return None


def text_of(request: Request) -> str:
    """The last text of a request."""
    return request["messages"][-1]["content"][-1]["text"]


class TinyModel:
    """Answers requests by a LLaVA on disk: greedy, with the log-probabilities of its first token."""

    def __init__(self, root: Path):
        self.model = LlavaForConditionalGeneration.from_pretrained(root).eval()
        self.processor = AutoProcessor.from_pretrained(root, backend="pil")
        self.lock = threading.Lock()

    def __call__(self, request: Request) -> dict[str, Any]:
        content = [{"type": "image"} if part["type"] == "image_url" else part for part in request["messages"][0]["content"]]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        image = image_of(request)
        inputs = self.processor(images=[image.convert("RGB")] if image else None, text=[text], return_tensors="pt")
        with self.lock, torch.no_grad():
            logits = self.model(**inputs).logits[0, -1].double()
        values, tokens = logits.log_softmax(0).sort(descending=True)
        words = self.processor.tokenizer.convert_ids_to_tokens(tokens)
        likeliest = dict(zip(words, values.tolist(), strict=True))
        shown = likeliest if request.get("logprobs") else None
        return completion(words[0], shown, tokens=inputs["input_ids"].shape[1])


@contextlib.contextmanager
def chat_server(answer: Callable[[Request], Any]) -> Iterator[tuple[str, list[Request]]]:
    """(URL, requests so far) of a server. answer(request) is a completion, bytes, or (status, headers, either of them).

    A status below 0 is 200 with an answer that is cut off, and 0 one that drips without an end.
    """
    requests: list[Request] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send(200, {}, MODELS)

        def do_POST(self):
            asked = self.rfile.read(int(self.headers["Content-Length"]))
            if not asked:
                return  # the client is gone: another of its requests has failed
            requests.append(json.loads(asked))
            requests[-1]["authorization"], requests[-1]["path"] = self.headers.get("Authorization"), self.path
            result = answer(requests[-1])
            if isinstance(result, dict) and result.get("usage") and not result["usage"]["prompt_tokens"]:
                result["usage"]["prompt_tokens"] = 10 if image_of(requests[-1]) else 5
            status, headers, body = result if isinstance(result, tuple) else (200, {}, result)
            self.send(status, headers, body if isinstance(body, bytes) else json.dumps(body).encode())

        def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            with contextlib.suppress(OSError):
                self.send_response(status if status > 0 else 200)
                self.send_header("Content-Type", "application/json")
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body) + (5 if status < 0 else 10**6 if status == 0 else 0)))
                self.end_headers()
                while status == 0:
                    self.wfile.write(b" ")
                    time.sleep(0.05)
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
