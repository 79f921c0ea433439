"""Models of the hub that are not given to everybody."""

import http.server
import threading
from collections.abc import Iterator

import pytest

from b2diffurl.runtime import hub


class Gated(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a gated model needs: everybody may list its files, and nobody may have one."""

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            return self.answer(403, b'{"error": "Access is restricted"}', {"X-Error-Code": "GatedRepo"})
        files = b'[{"type": "file", "path": "model_index.json", "size": 2, "oid": "0"}]'
        info = b'{"id": "owner/gated", "sha": "%s", "siblings": [{"rfilename": "model_index.json"}]}' % (b"0" * 40)
        return self.answer(200, files if "/tree/" in self.path else info, {})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def gated(tmp_path, monkeypatch) -> Iterator[str]:
    """The URL of such a hub, which is the one that is asked."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gated)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield url
    server.shutdown()
    server.server_close()


def test_a_gated_model_says_how_to_get_access(gated):
    """Where its license is accepted, and how to log in."""
    with pytest.raises(FileNotFoundError) as error:
        hub.locate("owner/gated", patterns=["model_index.json"])
    assert str(error.value) == (
        f"the hub gives owner/gated only to those who have accepted its license: do so on {gated}/owner/gated, then run: "
        "hf auth login"
    )
