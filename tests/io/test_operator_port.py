"""The client of the operator's port ends in time, and with one error, whatever answers."""

import os
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from holdfast.core.errors import TargetError
from holdfast.io.remote.operator_port import OperatorPort, Refusal, Unanswered, read_key

HEAD = b"HTTP/1.1 200 OK\r\n"
LIMIT_S = 0.4


@contextmanager
def answering(send):
    """The address of a server whose answer a function sends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            with suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1 << 16)
                    send(connection)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(5)


def dripping(piece, head=b"", pause_s=0.02):
    def send(connection):
        connection.sendall(head)
        for _ in range(10_000):
            connection.sendall(piece)
            time.sleep(pause_s)

    return send


def raw(content):
    return lambda connection: connection.sendall(content)


@pytest.mark.parametrize(
    "send",
    [
        lambda connection: connection.recv(1),
        dripping(b"H"),
        dripping(b"\r\nX: y", HEAD[:-2]),
        dripping(b" ", HEAD + b"Content-Length: 99999\r\n\r\n"),
        dripping(b"1\r\n \r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\n"),
        dripping(b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_a_whole_answer_has_one_limit_of_time(send):
    begun = time.monotonic()
    with answering(send) as url, pytest.raises(Unanswered):
        OperatorPort(url, answer_s=LIMIT_S).get("/status")
    assert time.monotonic() - begun < 10 * LIMIT_S


@pytest.mark.parametrize(
    "send",
    [
        dripping(b"X: " + b"y" * 1000 + b"\r\n", HEAD, 0.0),
        dripping(b"HTTP/1.1 100 Continue\r\n\r\n" * 100, pause_s=0.0),
        dripping(b" " * 9000, HEAD + b"\r\n", 0.0),
        dripping(b"1;" + b"x" * 9000 + b"\r\n \r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\n", 0.0),
        raw(b""),
        raw(b"\x00\xff\n\n"),
        raw(HEAD + b"Content-Length: 5\r\n\r\n{}"),
        raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
        *(
            raw(HEAD + b"\r\n" + content)
            for content in (
                b"", b"[]", b"[" * 100_000, b'{"a": NaN}', b'{"a": "\\ud800"}', b'{"a": ' + b"9" * 5000 + b"}",
                b'{"a": "\xff"}',
            )
        ),
    ],
)  # fmt: skip
def test_odd_answers_are_limited_in_size_and_have_one_error(send, set_limit):
    set_limit("holdfast.io.remote.operator_port._MOST_JSON", 1 << 17)
    with answering(send) as url, pytest.raises(Unanswered) as error:
        OperatorPort(url, answer_s=5.0).get("/status")
    assert len(str(error.value)) < 600 and str(error.value).isprintable()


def test_a_reason_of_a_server_is_shown_in_one_line():
    content = b'{"error": "\\u001b]0;title\\n::error::' + b"x" * 900 + b'"}'
    with answering(raw(b"HTTP/1.1 409 Conflict\r\n\r\n" + content)) as url, pytest.raises(Refusal) as refused:
        OperatorPort(url).get("/status")
    assert (
        refused.value.status == 409 and str(refused.value).isprintable() and len(refused.value.reason) <= 300
    )


def test_a_request_waits_no_longer_for_another_thread_than_for_its_answer():
    with answering(dripping(b"H")) as url:
        port = OperatorPort(url, answer_s=1.0)
        first = threading.Thread(target=lambda: suppressed(port))
        first.start()
        time.sleep(0.2)
        begun = time.monotonic()
        with pytest.raises(Unanswered, match="none arrived as a whole"):
            port.post("/adaptation", {}, answer_s=0.2)
        assert time.monotonic() - begun < 0.7
        first.join()


def suppressed(port):
    with suppress(Unanswered):
        port.get("/status")


@pytest.mark.skipif(os.name == "nt", reason="permissions are no modes")
@pytest.mark.parametrize(("mode", "accepted"), [(0o600, True), (0o440, True), (0o644, False), (0o602, False)])
def test_a_file_with_a_key_that_other_users_can_access_is_refused(mode, accepted, tmp_path):
    path = tmp_path / "adapt.key"
    path.write_text("hf_x\n")
    path.chmod(mode)
    if accepted:
        assert read_key(path) == "hf_x"
        return
    with pytest.raises(TargetError, match=f"has the mode {mode:04o}, .*chmod 600 .*keys revoke"):
        read_key(path)
