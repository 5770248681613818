"""The header Host: names of other sites are refused at both ports of a server on loopback."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest

from holdfast.core.errors import UsageError
from holdfast.server.admin import admin_application
from holdfast.server.requests import HostNames, Refused
from holdfast.verbs.serve_opening import server_setup
from holdfast.verbs.settings import Serve

from .small import request
from .test_app import INFER, JSON, Here, X

LOCAL = (
    "127.0.0.1", "127.0.0.1:8080", "127.9.9.9", "[::1]", "[::1]:8080", "10.0.0.1", "localhost", "LocalHost:80", "x",
    "x:1", "my_host", "localhost.", "a.localhost", "a.localhost:8080", "",
)  # fmt: skip
FOREIGN = (
    "evil.example", "evil.example:8080", "EVIL.example.", "127.0.0.1.evil.example", "localhost.evil.example", "127.1",
    "evil.localhost.example", "a@b", "evil.example#127.0.0.1", "[::1].evil.example", "[evil.example]", "x y", "\xe9",
    "127.0.0.1:80:80", "x/y", "localhost,evil.example", "0x7f.0.0.1", "a..b",
)  # fmt: skip


def refuses(names, *hosts):
    try:
        names.refuse_other([(b"accept", b"*/*"), *((b"host", host.encode("latin-1")) for host in hosts)])
    except Refused as refused:
        return refused.status == 421
    return False


def test_only_names_that_are_no_public_names_are_accepted():
    names = HostNames()
    assert [host for host in LOCAL if refuses(names, host)] == []
    assert [host for host in FOREIGN if not refuses(names, host)] == []
    assert refuses(names, "localhost", "localhost") and not refuses(names)
    named = HostNames(frozenset({"model.example"}))
    assert not any(refuses(named, host) for host in ("model.example", "Model.Example:443", "model.example."))
    assert all(refuses(named, host) for host in ("a.model.example", "model.example.evil", "odel.example"))
    assert not any(refuses(HostNames(everything=True), host) for host in FOREIGN)


def test_both_ports_refuse_other_names():
    here = Here()
    operator = SimpleNamespace(
        setup=SimpleNamespace(worker=SimpleNamespace(admin_hosts=HostNames()), flagged=None),
        totals=SimpleNamespace(text=lambda: b""),
        status=dict,
        request_swap=pytest.fail,
        adaptations=None,
        weights=None,
    )

    def status(app, method, path, host, **content):
        async def send():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
                headers = {"host": host, **content.pop("headers", {})}
                return await client.request(method, path, headers=headers, **content)

        response = asyncio.run(send())
        assert response.status_code != 421 or list(response.json()) == ["error"]
        return response.status_code

    admin = admin_application(operator, None)
    body = {"content": request(X), "headers": JSON}
    for host, refused in (("x", False), ("evil.example", True)):
        expected = 421 if refused else 200
        assert status(here.app, "POST", INFER, host, **body) == expected
        for path in ("/v2/health/live", "/v2", "/openapi.json"):
            assert status(here.app, "GET", path, host) == expected
        for path in ("/metrics", "/status"):
            assert status(admin, "GET", path, host) == expected
    assert status(admin, "POST", "/swap", "evil.example") == 421


def setup(**settings):
    return server_setup(Serve(model="mnist-cnn", **settings))


def test_the_names_follow_from_the_addresses_and_from_the_setting(tmp_path):
    from holdfast.server.keys import add_key

    def accepted(hosts):
        return [
            host for host in ("x", "evil.example", "model.example", "0.0.0.0") if not refuses(hosts, host)
        ]

    local = setup()
    assert accepted(local.worker.hosts) == accepted(local.worker.admin_hosts) == ["x", "0.0.0.0"]
    named = setup(accepted_hosts=["Model.example"])
    assert (
        accepted(named.worker.hosts)
        == accepted(named.worker.admin_hosts)
        == ["x", "model.example", "0.0.0.0"]
    )
    add_key(tmp_path / "keys", "alice", ["infer"])
    public = {"host": "0.0.0.0", "keys": str(tmp_path / "keys")}
    everyone = setup(**public)
    assert len(accepted(everyone.worker.hosts)) == 4 and accepted(everyone.worker.admin_hosts) == [
        "x",
        "0.0.0.0",
    ]
    assert "evil.example" not in accepted(setup(**public, accepted_hosts=["model.example"]).worker.hosts)
    for name in ("a:80", "*.example", "http://a", "a b", "[::1]"):
        with pytest.raises(UsageError, match="accepted_hosts is .*; a host name without a port"):
            setup(accepted_hosts=[name])
