"""The client of the operator's port: answers, refusals, and addresses that are none."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from holdfast.core.errors import TargetError, UsageError
from holdfast.io.remote.operator_port import OperatorPort, Refusal, read_key

ANSWERS = {
    "/status": (200, b'{"ready": true}'),
    "/other": (200, b"[1]"),
    "/key": (401, b'{"error": "no valid key"}'),
    "/busy": (409, b'{"error": "the run 7 holds the server"}'),
    "/moved": (302, b""),
    "/samples": (200, b"\x00\xff"),
}


class _Port(BaseHTTPRequestHandler):
    def _answer(self) -> None:
        status, content = ANSWERS[self.path]
        if self.command == "POST":
            body = self.rfile.read(int(self.headers["Content-Length"]))
            content = json.dumps({"body": json.loads(body), "key": self.headers["Authorization"]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = _answer  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Port) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_answers_and_refusals(url):
    port = OperatorPort(url, "hf_a")
    assert port.get("/status") == {"ready": True}
    assert port.read("/samples") == b"\x00\xff"
    assert port.post("/status", {"x": 1}) == {"body": {"x": 1}, "key": "Bearer hf_a"}
    with pytest.raises(UsageError, match="no valid key"):
        port.get("/key")
    with pytest.raises(Refusal, match="the run 7 holds the server") as refused:
        port.delete("/busy")
    assert (refused.value.status, refused.value.reason) == (409, "the run 7 holds the server")
    with pytest.raises(Refusal, match="302"):
        port.get("/moved")
    with pytest.raises(TargetError, match="JSON object"):
        port.get("/other")
    assert "hf_a" not in repr(port)


def test_a_port_without_a_server_is_reported():
    with pytest.raises(TargetError, match="cannot be reached"):
        OperatorPort("http://127.0.0.1:9").get("/status")


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8081", "http://127.0.0.1:8081/v2", "ftp://a", "http://", "http://a@b"]
)
def test_other_addresses_are_refused(url):
    with pytest.raises(UsageError, match="is not the address of an operator's port"):
        OperatorPort(url)


def test_key_files(tmp_path):
    (tmp_path / "key").write_text("hf_abc\n")
    assert read_key(tmp_path / "key") == "hf_abc"
    (tmp_path / "two").write_text("hf_a hf_b")
    for name in ("two", "absent"):
        with pytest.raises((UsageError, TargetError), match="key file"):
            read_key(tmp_path / name)
