"""A server of the page for judging, in a thread of its own, and requests to it as a browser makes them."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from b2diffurl.experiment.stage import Stage
from b2diffurl.labelling.server import Server
from b2diffurl.labelling.session import Session


@contextmanager
def serving(stage: Stage) -> Iterator[Server]:
    """The server of a stage's page; it has ended behind the block, or before, when the scores were written."""
    with Server(Session(stage)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(10)
            assert not thread.is_alive()


def ask(server: Server, path: str, content: object = None, method: str = "", **headers: str | None):
    """(status, headers, body) of a request for what stands behind the token. A header that is None is left out."""
    host = f"127.0.0.1:{server.server_address[1]}"
    return ask_raw(server, f"/{server.token}/{path}", content, method, **{"Host": host} | headers)


def ask_raw(server: Server, path: str, content: object = None, method: str = "", **headers: str | None):
    body = content if isinstance(content, bytes | None) else json.dumps(content).encode()
    if body is not None:
        usual = {"Origin": f"http://{headers['Host']}", "Content-Type": "application/json", "Content-Length": str(len(body))}
        headers = usual | {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.putrequest(method or ("GET" if body is None else "POST"), path, skip_host=True)
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read()
    connection.close()
    return found
