"""The watch for notices, with servers that answer as each cloud does, and with none that does."""

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.spot_notice import (
    AWS,
    AZURE,
    AZURE_TAG,
    GCP,
    Cloud,
    SpotWatch,
    cloud_of_machine,
    metadata_service,
)
from helpers.metadata_server import (
    AWS_NOTICE,
    AWS_REBALANCE,
    AZURE_NAME,
    AZURE_NOTICE,
    GCP_NOTICE,
    MetadataServer,
    write_answer,
)

TERMINATE = json.dumps({"action": "terminate", "time": "2026-11-26T18:02:00Z"})
REBALANCE = json.dumps({"noticeTime": "2026-11-26T17:40:00Z"})
LONGEST_WAIT = 60

Serve = Callable[[Cloud], MetadataServer]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a cloud's metadata service on a port of this machine."""
    servers = []

    def start(cloud: Cloud) -> MetadataServer:
        servers.append(MetadataServer(cloud.name, tmp_path))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def watching(cloud: Cloud, address: str, *, patience: float = LONGEST_WAIT) -> "queue.Queue[str]":
    """The calls of a watch that polls all the time, in their order."""
    calls: queue.Queue[str] = queue.Queue()
    SpotWatch(
        cloud,
        on_final=lambda: calls.put("final"),
        on_risk=lambda: calls.put("risk"),
        ask=metadata_service(address),
        seconds=0.01,
        patience=patience,
    ).start()
    return calls


def await_requests(server: MetadataServer, number: int) -> None:
    """Until it has been asked so many times more."""
    before, deadline = len(server.requests), time.monotonic() + LONGEST_WAIT
    while len(server.requests) < before + number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def azure_events(*, kind: str = "Preempt", machine: str = "me") -> str:
    event = {
        "EventType": kind,
        "Resources": [machine],
        "NotBefore": "Mon, 19 Sep 2016 18:29:47 GMT",
    }
    return json.dumps({"DocumentIncarnation": 1, "Events": [event]})


@pytest.mark.parametrize(
    ("cloud", "before", "notice"),
    [
        (AWS, {}, (AWS_NOTICE, TERMINATE)),
        (GCP, {GCP_NOTICE: "FALSE"}, (GCP_NOTICE, "TRUE")),
        (
            AZURE,
            {AZURE_NOTICE: json.dumps({"DocumentIncarnation": 0, "Events": []}), AZURE_NAME: "me"},
            (AZURE_NOTICE, azure_events()),
        ),
        (
            AZURE,
            {AZURE_NOTICE: azure_events(kind="Freeze"), AZURE_NAME: "me"},
            (AZURE_NOTICE, azure_events()),
        ),
        (
            AZURE,
            {AZURE_NOTICE: azure_events(machine="neighbour"), AZURE_NAME: "me"},
            (AZURE_NOTICE, azure_events()),
        ),
    ],
    ids=["AWS", "GCP", "Azure", "Azure, of another kind before", "Azure, of a neighbour before"],
)
def test_a_notice_is_passed_on_once_and_nothing_before_it(
    cloud: Cloud,
    before: dict[str, str],
    notice: tuple[str, str],
    serve: Serve,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for path, text in before.items():
        write_answer(tmp_path, path, text)
    server = serve(cloud)
    calls = watching(cloud, server.address)
    await_requests(server, 10)
    assert calls.empty()
    write_answer(tmp_path, *notice)
    assert calls.get(timeout=LONGEST_WAIT) == "final"
    said = capfd.readouterr().out
    assert said.startswith(f"{cloud.name} takes this machine back: ") and said.count("\n") == 1


def test_a_rebalance_recommendation_asks_for_one_save_and_the_watch_goes_on(
    serve: Serve, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = serve(AWS)
    calls = watching(AWS, server.address)
    write_answer(tmp_path, AWS_REBALANCE, REBALANCE)
    assert calls.get(timeout=LONGEST_WAIT) == "risk"
    await_requests(server, 10)
    assert calls.empty()
    write_answer(tmp_path, AWS_NOTICE, TERMINATE)
    assert calls.get(timeout=LONGEST_WAIT) == "final"
    assert "AWS may take this machine back: rebalance recommendation" in capfd.readouterr().out


@pytest.mark.parametrize(
    "garbage", ["", "<html>Sign in</html>", "[" * 100_000, "[1]", "null", "{}", '{"Events": 3}']
)
@pytest.mark.parametrize(
    ("cloud", "path", "notice"),
    [
        (AWS, AWS_NOTICE, TERMINATE),
        (GCP, GCP_NOTICE, "TRUE"),
        (AZURE, AZURE_NOTICE, azure_events()),
    ],
    ids=["AWS", "GCP", "Azure"],
)
def test_garbage_is_no_notice_and_the_next_answer_may_be(
    cloud: Cloud, path: str, notice: str, garbage: str, serve: Serve, tmp_path: Path
) -> None:
    write_answer(tmp_path, path, garbage)
    server = serve(cloud)
    calls = watching(cloud, server.address)
    await_requests(server, 5)
    assert calls.empty()
    write_answer(tmp_path, path, notice)
    assert calls.get(timeout=LONGEST_WAIT) == "final"


def refuses(listener: socket.socket) -> None:
    listener.close()


def drops(listener: socket.socket) -> None:
    """A full queue of connections: the kernel drops what comes, without an answer."""
    listener.listen(0)
    for _ in range(2):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(listener.getsockname())
        CLIENTS.append(client)


def accepts_and_is_silent(listener: socket.socket) -> None:
    listener.listen(100)


def talks_nonsense(listener: socket.socket) -> None:
    listener.listen(100)

    def answer() -> None:
        while True:
            connection, _ = listener.accept()
            CLIENTS.append(connection)
            connection.sendall(b"\x00\xffSSH-2.0\r\n\r\n")

    threading.Thread(target=answer, daemon=True).start()


CLIENTS: list[socket.socket] = []  # kept open


@pytest.mark.parametrize("fault", [refuses, drops, accepts_and_is_silent, talks_nonsense])
def test_no_answer_takes_a_bounded_time_and_is_said_once(
    fault: Callable[[socket.socket], None], capfd: pytest.CaptureFixture[str]
) -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    fault(listener)
    ask = metadata_service(f"http://127.0.0.1:{port}", timeout=0.2)
    nothing = threading.Event().set
    watch = SpotWatch(AWS, on_final=nothing, on_risk=nothing, ask=ask, patience=0)
    started = time.monotonic()
    assert watch.poll() is None and watch.poll() is None
    assert time.monotonic() - started < LONGEST_WAIT  # without a limit it would never return
    said = capfd.readouterr().out
    assert said.startswith("warning: the metadata service of AWS does not answer (")
    assert said.count("\n") == 1


def test_before_its_patience_ends_the_watch_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """Azure's first answer may take two minutes."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    ask = metadata_service(f"http://127.0.0.1:{listener.getsockname()[1]}")
    nothing = threading.Event().set
    assert SpotWatch(AZURE, on_final=nothing, on_risk=nothing, ask=ask).poll() is None
    assert capfd.readouterr().out == ""


def test_a_proxy_is_not_asked(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would answer for its own machine."""
    proxy = serve(GCP)
    monkeypatch.setenv("http_proxy", proxy.address)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    write_answer(tmp_path, GCP_NOTICE, "FALSE")
    ask = metadata_service(serve(GCP).address)
    assert GCP.read(ask) is None and proxy.requests == []


@pytest.mark.parametrize(
    ("firmware", "cloud"),
    [
        ({"sys_vendor": "Amazon EC2"}, AWS),
        ({"sys_vendor": "Google", "chassis_asset_tag": ""}, GCP),
        ({"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": AZURE_TAG}, AZURE),
        ({"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": "Hyper-V"}, None),
        ({"sys_vendor": "Supermicro"}, None),
        ({}, None),
    ],
)
def test_the_firmware_says_which_cloud_it_is(
    firmware: dict[str, str], cloud: Cloud | None, tmp_path: Path
) -> None:
    for file, text in firmware.items():
        (tmp_path / file).write_text(f"{text}\n")
    assert cloud_of_machine(tmp_path) == cloud
