"""The server of the page on which people judge a stage's images, for one person on this machine.

Who reaches it: it listens on 127.0.0.1 alone. Every address begins with a token that only the one who started it knows, so
other users of the machine and other pages in the browser get nothing. A host's name that is not this machine's is refused
(DNS rebinding), and an answer that another page sends (CSRF).

    GET  /<token>/            the page
    GET  /<token>/state       prompts and answers as JSON (`Session.state`)
    GET  /<token>/image/<n>   image n of the stage
    POST /<token>/answer      {"group": 3, "pick": [2, 0]} and the like (`Votes.changed`)
    POST /<token>/finish      {}: write the scores, answer with what to do next, and end

With either the page sends `num_answers`, how many it knows of; one that has missed another window's is refused.
"""

import json
import re
import secrets
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from b2diffurl.labelling.session import Session, TooLateError, run_command
from b2diffurl.reporting.markup import render
from b2diffurl.runtime import files

MAX_BYTES = 10_000  # of an answer
LOCAL = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?")  # any port: an ssh tunnel may have another at its near end
IMAGE = re.compile(r"image/(\d{1,9})")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "Cross-Origin-Resource-Policy": "same-origin",
}
POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Server(ThreadingHTTPServer):
    """Serves one session. `serve_forever` returns when the scores are written, or by `shutdown`."""

    daemon_threads = True  # a browser holds connections open of which nothing will come

    def __init__(self, session: Session, port: int = 0):
        """Listen on this port of 127.0.0.1, 0 for a free one; an OSError says that it is taken."""
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"port {port} cannot be used ({reason}); give another by --port, or leave it out") from None
        self.session = session
        self.token = secrets.token_urlsafe(24)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers a request. What is refused changes nothing."""

    server: Server
    timeout = 30  # sec, until a connection that says nothing is closed
    server_version, sys_version = "b2diffurl", ""

    def do_GET(self) -> None:
        asked = self.allowed_path()
        if asked is not None:
            self.answer(lambda: self.get(asked))

    def do_POST(self) -> None:
        asked = self.allowed_path()
        content = self.read_content() if asked is not None else None
        if content is not None:
            self.answer(lambda: self.post(asked, content))

    def answer(self, work: Callable[[], None]) -> None:
        """Do what was asked for. An error is sent back in a sentence."""
        try:
            work()
        except TooLateError as error:
            self.refuse(HTTPStatus.CONFLICT, str(error))
        except ValueError as error:
            self.refuse(HTTPStatus.BAD_REQUEST, str(error))
        except ConnectionError:
            raise
        except OSError as error:  # the disk is full, or cannot be written to or read
            self.refuse(HTTPStatus.INSUFFICIENT_STORAGE, str(error))

    def get(self, asked: str) -> None:
        session = self.server.session
        if asked == "" and not self.path.endswith("/"):  # lost when the address was copied; the page's own paths need it
            self.send(HTTPStatus.TEMPORARY_REDIRECT, "text/plain", b"", {"Location": f"{self.path}/"})
        elif asked == "":
            self.send_page()
        elif asked == "state":
            self.send_json(session.state())
        elif (match := IMAGE.fullmatch(asked)) and (image := session.image(int(match[1]))):
            self.send(HTTPStatus.OK, "image/png", image, {"Cache-Control": "private, max-age=3600"})
        else:
            self.refuse(HTTPStatus.NOT_FOUND, "there is no such page or image")

    def post(self, asked: str, content: dict[str, Any]) -> None:
        session = self.server.session
        known = content.pop("num_answers", None)
        if asked == "answer":
            session.change(content, known)
            self.send_json({"saved": True})
        elif asked == "finish":
            command = run_command(session.stage.root)
            session.finish(known)
            try:
                self.send_json({"file": str(session.stage.given_scores), "command": command})
            finally:  # also if the browser has gone: the scores are there
                threading.Thread(target=self.server.shutdown).start()  # it waits for the loop that has started this thread
        else:
            self.refuse(HTTPStatus.NOT_FOUND, "there is nothing to be answered here")

    # ---- who may ask ----

    def allowed_path(self) -> str | None:
        """What is asked for, behind the token; None if the request was refused."""
        if not LOCAL.fullmatch(self.headers.get("Host", "")):
            return self.refuse(HTTPStatus.FORBIDDEN, "this server is 127.0.0.1 or localhost, under no other name")
        token, _, path = self.path.removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode(errors="replace"), self.server.token.encode()):
            return self.refuse(HTTPStatus.FORBIDDEN, "open the whole address that the command has printed, with its token")
        return path

    def read_content(self) -> Any:
        """The JSON object that a page of ours has sent; None if the request was refused."""
        if self.headers.get("Origin") != f"http://{self.headers['Host']}":
            return self.refuse(HTTPStatus.FORBIDDEN, "answers are taken from the page of this server alone")
        if self.headers.get("Content-Type") != "application/json":
            return self.refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "an answer is application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,9}", length):
            return self.refuse(HTTPStatus.LENGTH_REQUIRED, "an answer says how long it is")
        if int(length) > MAX_BYTES:
            return self.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an answer has at most {MAX_BYTES} bytes")
        try:
            content = files.parse_json(self.rfile.read(int(length)))
        except ValueError as error:
            return self.refuse(HTTPStatus.BAD_REQUEST, f"this is no JSON ({error})")
        return content if isinstance(content, dict) else self.refuse(HTTPStatus.BAD_REQUEST, "an answer is a JSON object")

    # ---- what they get ----

    def send_page(self) -> None:
        stage, nonce = self.server.session.stage, secrets.token_urlsafe(16)
        html = render("label.html", {"name": stage.root.resolve().name, "stage": stage.index, "nonce": nonce})
        self.send(HTTPStatus.OK, "text/html; charset=utf-8", html, {"Content-Security-Policy": POLICY.format(nonce=nonce)})

    def send_json(self, value: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send(status, "application/json", json.dumps(value).encode())

    def refuse(self, status: HTTPStatus, reason: str) -> None:
        self.send_json({"error": reason}, status)

    def send(self, status: HTTPStatus, kind: str, content: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        length = {"Content-Type": kind, "Content-Length": str(len(content))}
        for name, value in ({"Cache-Control": "no-store"} | HEADERS | length | (more or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal belongs to the person, and addresses hold the token."""
