"""Limits of connections, at a real socket: slow clients, too many of them, and what is not HTTP."""

import asyncio
import logging
import socket
from contextlib import asynccontextmanager, suppress

import pytest
import uvicorn

from holdfast.guard.rules import NoRules
from holdfast.server.answering_requests import Answerer, ServedSet
from holdfast.server.app import ServedModel, application
from holdfast.server.connections import JoinedWrites, limited_protocol
from holdfast.server.requests import LOGGER, Batcher
from holdfast.settings.serve_settings import RequestLimits

from .small import SIGNATURE, network

GET = b"GET /v2/health/live HTTP/1.1\r\nhost: here\r\n\r\n"


@asynccontextmanager
async def serving(
    *, most=100, header_timeout_s=5.0, limits=None, refused=lambda cause: None, write_timeout_s=30.0
):
    """The port of a server in this loop."""
    answer = Answerer(ServedSet(network(), "s", 1), NoRules())
    batcher = Batcher(answer, max_rows=8, max_latency_s=5.0)
    served = ServedModel(SIGNATURE, batcher, limits=limits or RequestLimits())
    protocol = limited_protocol(most, header_timeout_s, served.max_body, refused, write_timeout_s)
    config = uvicorn.Config(
        application(served), http=protocol, ws="none", lifespan="off", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        task = asyncio.create_task(server._serve([listener]))
        while not server.started:
            await asyncio.sleep(0.005)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task
            batcher.close()


async def answer_to(port, *parts, pause_s=0.0):
    """Everything that the server sends on a connection until it closes it or is silent for a second."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def send():
        for part in parts:
            writer.write(part)
            await asyncio.sleep(pause_s)

    sending, received = asyncio.create_task(send()), b""
    try:
        while data := await asyncio.wait_for(reader.read(65_536), 1.0):
            received += data
    except (TimeoutError, ConnectionError):
        pass
    finally:
        sending.cancel()
        writer.close()
    return received


def run(test):
    """What a test returns in the event loop that workers use: uvloop, if it is installed."""
    with asyncio.Runner(loop_factory=uvicorn.Config(None).get_loop_factory()) as runner:
        return runner.run(test())


@pytest.mark.slow
def test_headers_that_arrive_too_slowly_end_the_connection():
    async def test():
        async with serving(header_timeout_s=0.1) as port:
            slow = [bytes([byte]) for byte in GET[:-4]]
            answers = await asyncio.gather(
                answer_to(port), answer_to(port, *slow, pause_s=0.02), answer_to(port, GET)
            )
        silent, drop_by_drop, usual = answers
        for refused in (silent, drop_by_drop):
            assert refused.startswith(b"HTTP/1.1 408") and b'{"error":"the headers did not' in refused
        assert usual.startswith(b"HTTP/1.1 200")

    run(test)


def test_a_client_that_does_not_read_is_cut_off():
    async def sending(client):
        while True:
            with suppress(BlockingIOError):
                client.send(b"GET /openapi.json HTTP/1.1\r\nhost: here\r\n\r\n" * 10)
            await asyncio.sleep(0.01)

    async def test():
        async with serving(write_timeout_s=0.1) as port:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
                client.setblocking(False)
                await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
                with pytest.raises(ConnectionError):
                    await asyncio.wait_for(sending(client), 3.0)

    run(test)


def test_a_second_request_on_a_connection_has_the_same_limit():
    async def test():
        async with serving(header_timeout_s=0.1) as port:
            received = await answer_to(port, GET, b"GET /v2", pause_s=0.15)
        assert received.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 408" in received

    run(test)


@pytest.mark.slow
def test_a_thousand_connections_are_limited_and_the_others_are_answered():
    async def test():
        async with serving(most=50) as port:
            opening = (asyncio.open_connection("127.0.0.1", port) for _ in range(50))
            kept = await asyncio.gather(*opening)
            await asyncio.sleep(0.05)
            refused = await asyncio.gather(*(answer_to(port) for _ in range(950)))
            assert all(
                answer.startswith(b"HTTP/1.1 503") and b"too many connections" in answer for answer in refused
            )
            reader, writer = kept[0]
            writer.write(GET)
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
            for _, each in kept:
                each.close()
            await asyncio.sleep(0.05)
            assert (await answer_to(port, GET)).startswith(b"HTTP/1.1 200")

    run(test)


def test_a_client_whose_connection_is_refused_reads_the_reason_though_it_still_sends():
    async def test():
        causes = []
        async with serving(most=1, refused=causes.append) as port:
            _, kept = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.sleep(0.05)
            with socket.create_connection(("127.0.0.1", port), 5.0) as client:
                for part in (GET[:9], GET[9:]):
                    await asyncio.sleep(0.05)
                    client.sendall(part)  # raises an error if the server has closed the connection
                assert client.recv(1_000).startswith(b"HTTP/1.1 503")
            kept.close()
        assert causes == ["overload"]

    run(test)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"NOT HTTP\r\n\r\n",
        b"POST /v2/models/small/infer HTTP/1.1\r\nhost: h\r\ncontent-length: -1\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused_with_a_reason(sent):
    async def test():
        async with serving() as port:
            received = await answer_to(port, sent)
        assert received.startswith(b"HTTP/1.1 400") and received.endswith(
            b'{"error":"the request is not valid HTTP"}'
        )

    run(test)


def test_what_clients_cause_is_logged_at_a_limited_rate(caplog):
    upgrade = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: %s\r\n\r\n"
    requests = (
        *(GET[:-2] + upgrade % kind for kind in (b"websocket", b"h2c", b"TLS/1.0")), b"NOT HTTP\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    )  # fmt: skip

    async def test():
        async with serving() as port:
            for _ in range(5):
                await asyncio.gather(*(first_answer(port, each) for each in requests))

    async def first_answer(port, sent):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        await asyncio.sleep(0.02)
        writer.close()

    run(test)
    assert {record.name for record in caplog.records if record.levelno > logging.INFO} == {LOGGER}
    messages = [record.message for record in caplog.records if record.name == LOGGER]
    assert sorted(set(messages)) == sorted(messages) and len(messages) <= 3
    assert any("upgrade" in message for message in messages)


def test_a_compressed_bomb_is_refused_before_it_is_read():
    async def test():
        head = (
            b"POST /v2/models/small/infer HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n"
            b"content-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        async with serving() as port:
            received = await answer_to(port, head)
        assert received.startswith(b"HTTP/1.1 415") and b"connection: close" in received

    run(test)


def test_a_request_with_two_lengths_is_refused_and_its_connection_closed():
    async def test():
        head = (
            b"POST /v2/models/small/infer HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n"
            b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
        )
        async with serving() as port:
            received = await answer_to(port, head, GET)
        assert received.startswith(b"HTTP/1.1 400") and b"connection: close" in received
        assert received.count(b"HTTP/1.1") == 1

    run(test)


def test_headers_and_trailers_have_a_limit():
    async def test():
        line = b"x: " + b"a" * 1_000 + b"\r\n"
        chunked = b"POST /v2/models/small/infer HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n"
        async with serving() as port:
            most = 65_536 + 8 * SIGNATURE.most_bytes
            headers = await answer_to(port, GET[:-2], line * 100, b"\r\n")
            trailers = await answer_to(
                port,
                chunked + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n",
                *[line * 100] * (most // 100_000 + 2),
                b"\r\n",
            )
        # the parser h11 has limits of its own, and httptools has none
        assert headers.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
        assert b"JSON" not in trailers

    run(test)


def test_a_client_that_sends_too_much_reads_the_reason():
    async def test():
        body = b"x" * (3 * SIGNATURE.most_bytes)
        head = b"POST /v2/models/small/infer HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % len(body)
        async with serving() as port:
            received = await answer_to(
                port, head, *[body[start : start + 10_000] for start in range(0, len(body), 10_000)]
            )
        assert received.startswith(b"HTTP/1.1 413")

    run(test)


def test_head_and_body_of_a_response_are_written_together():
    class Transport:
        def __init__(self):
            self.written = []
            self.write = self.written.append
            self.is_closing = self.close = lambda: False

    class Cycle:
        response_started = False

    cycle, transport = Cycle(), Transport()
    joined = JoinedWrites(cycle, transport)
    joined.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    cycle.response_started = True
    for data in (b"HTTP/1.1 200 OK\r\n\r\n", b"body", b"more", b""):
        joined.write(data)
    assert transport.written == [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nbody",
        b"more",
        b"",
    ]


def test_a_response_without_a_body_is_sent():
    async def main():
        async with serving() as port:
            return await answer_to(port, GET.replace(b"GET", b"HEAD"))

    assert run(main).startswith(b"HTTP/1.1 200 OK")
