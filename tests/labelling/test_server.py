"""Who may ask the server of the page for judging, and for what: all else is refused and changes nothing."""

import http.client
import json
import re
import socket
import threading

import pytest
from conftest import snapshot, stage_of
from serving import ask, ask_raw, serving

from b2diffurl.experiment.stage import Stage
from b2diffurl.labelling.server import MAX_BYTES, Handler, Server
from b2diffurl.labelling.session import Session

ANSWER = {"group": 0, "pick": [0, 1]}


@pytest.fixture
def stage(begin) -> Stage:
    return stage_of(begin({"reward.name": "file"})[0])


@pytest.fixture
def server(stage) -> Server:
    with serving(stage) as one:
        yield one


def test_it_serves_this_stage_s_page_images_and_answers(stage, server):
    """The images byte for byte; an answer is in the state that a reload gets, and on the disk."""
    status, headers, page = ask(server, "")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b"<title>tiny \xc2\xb7 stage 0" in page
    for n in (0, 17):
        status, headers, image = ask(server, f"image/{n}")
        assert (status, headers["Content-Type"], image) == (200, "image/png", stage.image(n).read_bytes())
    assert ask(server, "answer", ANSWER)[0] == 200
    state = json.loads(ask(server, "state")[2])
    prompts = json.loads(stage.prompts.read_text())
    assert (state["prompts"], state["num_siblings"], state["image_size"]) == (prompts[::3], 3, [64, 64])
    assert (state["mode"], state["picks"], state["ratings"]) == ("pick", {"0": [0, 1]}, {})
    assert Session(stage).votes.picks == {0: (0, 1)}


def test_nothing_can_be_loaded_from_elsewhere(server):
    """The page has no outer source; its policy allows this server, and the one script and style that came with it."""
    _, headers, page = ask(server, "")
    document = re.sub(r"<script.*</script>", "", page.decode(), flags=re.DOTALL)
    assert re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\'\s>)]+)', document) == ["data:,"]
    assert "://" not in page.decode()
    policy = headers["Content-Security-Policy"]
    (nonce,) = set(re.findall(r"'nonce-([\w-]{20,})'", policy))
    assert page.decode().count(f'nonce="{nonce}"') == page.decode().count("<script") + page.decode().count("<style") == 2
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert (headers["Referrer-Policy"], headers["Cache-Control"]) == ("no-referrer", "no-store")
    assert nonce not in ask(server, "")[1]["Content-Security-Policy"]
    assert "Python" not in headers["Server"]


@pytest.mark.parametrize(
    "path",
    ["/", "/state", "/image/0", "/{wrong}/", "/{wrong}/image/0", "/{short}/", "/%2e/{token}/", "http://127.0.0.1/{token}/"],
)
def test_without_the_token_there_is_nothing(stage, server, path):
    """No page, image, state or answer, and the refusal does not tell the token."""
    token = server.token
    path = path.format(wrong=("A" if token[0] != "A" else "B") + token[1:], short=token[:-1], token=token)
    before, host = snapshot(stage.folder), f"127.0.0.1:{server.server_address[1]}"
    for status, _, body in (ask_raw(server, path, Host=host), ask_raw(server, f"{path}/answer", ANSWER, Host=host)):
        assert status == 403
        assert token not in body.decode()
    assert snapshot(stage.folder) == before


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil", "0.0.0.0", "127.0.0.1:", "", None],
)
def test_another_host_s_name_is_refused(server, host):
    """A page of another name that has made it lead to this machine (DNS rebinding) gets nothing, even with the token."""
    host = host and host.format(port=server.server_address[1])
    assert ask(server, "", Host=host)[0] == 403
    assert ask(server, "state", Host=host)[0] == 403


def test_the_near_end_of_a_tunnel_may_have_another_port(server):
    """`ssh -L 9000:127.0.0.1:<port>`: the browser's host is localhost:9000, and so is the origin of its answers."""
    for host in ("localhost:9000", "127.0.0.1:9000", "localhost"):
        assert ask(server, "", Host=host)[0] == 200
        assert ask(server, "answer", ANSWER, Host=host)[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": None}, 403),
        ({"Origin": "https://127.0.0.1"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content_Type": None}, 415),
        ({"Content_Length": None}, 411),
        ({"Content_Length": "-1"}, 411),
        ({"Content_Length": "1e3"}, 411),
        ({"Content_Length": str(MAX_BYTES + 1)}, 413),
        ({"Content_Length": "9" * 9}, 413),
    ],
)
def test_answers_from_elsewhere_or_without_measure_are_refused(stage, server, headers, status):
    """What a form of another page can send, even if it knew the token, and what does not say how long it is."""
    assert ask(server, "answer", ANSWER, **headers)[0] == status
    assert not stage.labels.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b'{"group": NaN, "pick": []}', "no JSON"),
        (b"[" * 9_000, "no JSON"),
        (b"\xff\xfe", "no JSON"),
        ([ANSWER], "JSON object"),
        ({"group": 6, "pick": []}, "the group is 6"),
        ({"image": 18, "rating": 3}, "the image is 18"),
        ({"pick": [0, 1]}, "is no answer"),
    ],
)
def test_answers_that_are_none_are_refused(stage, server, content, said):
    """A sentence says why, and the server goes on."""
    status, _, body = ask(server, "answer", content)
    assert status == 400
    assert said in json.loads(body)["error"]
    assert not stage.labels.exists()
    assert ask(server, "answer", ANSWER)[0] == 200


@pytest.mark.parametrize(
    "path",
    ["image/18", "image/-1", "image/0.png", "image/00000000000000000001", "image/../../stage1/images/00000.png",
     "image/%2e%2e/config.json", "image//etc/passwd", "../../../../etc/passwd", "image/", "labels.json", "answer", "state/",
     "?state"],
)  # fmt: skip
def test_nothing_but_images_of_this_stage_is_served(stage, server, path):
    """No path leads out of the stage, to another stage's images, or to other files."""
    (stage.root / "stage1" / "images").mkdir(parents=True)
    (stage.root / "stage1" / "images" / "00000.png").write_bytes(b"another stage's")
    stage.image(18).write_bytes(b"not of the stage's prompts")
    assert ask(server, path)[0] == 404


def test_other_methods_do_nothing(stage, server):
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE"):
        assert ask(server, "answer", ANSWER, method)[0] == 501
    assert not stage.labels.exists()


def test_it_listens_on_this_machine_alone(server):
    """By its own address, and by none of the machine's others."""
    assert server.server_address[0] == "127.0.0.1"
    with socket.socket() as other, pytest.raises(OSError):
        other.settimeout(2)
        other.connect(("127.0.0.2", server.server_address[1]))


def test_a_port_that_is_taken_is_named(stage, server):
    with pytest.raises(
        OSError, match=rf"port {server.server_address[1]} cannot be used \(Address already in use\); give another"
    ):
        Server(Session(stage), server.server_address[1])


def test_a_connection_that_says_nothing_keeps_nobody_waiting(server):
    """As browsers open them ahead; and one that ends in the middle of an answer."""
    with socket.create_connection(server.server_address), socket.create_connection(server.server_address) as broken:
        broken.sendall(f"POST /{server.token}/answer HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n".encode())
        broken.sendall(b"Content-Type: application/json\r\nContent-Length: 500\r\n\r\n{")
        assert ask(server, "state")[0] == 200


def test_finishing_needs_every_answer_and_ends_the_server(stage, server):
    """Until then 400 and no file; then the scores, what to do next, and the end."""
    status, _, body = ask(server, "finish", {})
    assert (status, json.loads(body)["error"]) == (400, "6 of 6 groups are still open")
    for group in range(6):
        assert not stage.given_scores.exists()
        assert ask(server, "answer", {"group": group, "pick": []})[0] == 200
    status, _, body = ask(server, "finish", {})
    assert status == 200
    assert json.loads(body)["file"] == str(stage.given_scores)
    assert json.loads(body)["command"].endswith("ExpName=tiny Reward=file bash run_process.sh")
    assert stage.given_scores.is_file()


def test_it_ends_with_the_scores_also_if_the_browser_has_gone(stage, server, monkeypatch):
    """Who asked for the scores may close the window at once. They are written, so the command ends."""
    for group in range(6):
        server.session.change({"group": group, "pick": []})

    def gone(*given, **named):
        raise BrokenPipeError

    ended = threading.Event()
    monkeypatch.setattr(server, "shutdown", ended.set)
    monkeypatch.setattr(Handler, "send_json", gone)
    with pytest.raises(http.client.HTTPException):
        ask(server, "finish", {})
    assert ended.wait(10)
    assert stage.given_scores.is_file()
    monkeypatch.undo()


def test_a_window_that_has_missed_answers_is_refused(stage, server):
    """Of two windows the one that does not show what was answered in the other may not answer, nor write the scores."""
    status, _, body = ask(server, "answer", {"group": 0, "pick": [0, 1], "num_answers": 0})
    assert (status, json.loads(body)) == (200, {"saved": True})
    before = snapshot(stage.folder)
    for where, content in (("answer", {"group": 0, "pick": [1, 0]}), ("finish", {})):
        status, _, body = ask(server, where, content | {"num_answers": 0})
        assert status == 409
        assert "in another window" in json.loads(body)["error"]
    assert snapshot(stage.folder) == before
    assert json.loads(ask(server, "state")[2])["num_answers"] == 1


def test_an_address_that_has_lost_its_end(server):
    """Without the last stroke it leads to the page, whose own paths need it; another token leads nowhere."""
    host = f"127.0.0.1:{server.server_address[1]}"
    status, headers, _ = ask_raw(server, f"/{server.token}", Host=host)
    assert (status, headers["Location"]) == (307, f"/{server.token}/")
    assert ask_raw(server, "/other", Host=host)[0] == 403


def test_scores_that_came_another_way_are_said_to_the_page(stage, server):
    stage.given_scores.write_text("mine")
    status, _, body = ask(server, "answer", ANSWER)
    assert status == 409
    assert "scores_given.csv is there already" in json.loads(body)["error"]
