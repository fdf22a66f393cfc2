"""Real processes, one a node: all pass their checks, or all end with the reason of the one that
failed.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.rendezvous import NO_REPORT, Rendezvous
from helpers.paths import REPO
from rehearse import free_port

NODE = """
import socket, sys, time
from finetune.errors import UserError, one_line_errors
from finetune.rendezvous import Rendezvous

node, num_nodes, port, patience, checks, log = sys.argv[1:]

def note(event):
    with open(log, "a") as lines:
        print(f"node {node} {event}", file=lines)

with one_line_errors(), Rendezvous(
    int(node),
    ["127.0.0.1"] * int(num_nodes),
    port=int(port),
    run="this run",
    patience=float(patience),
    line_every=0.1,
):
    print("checking", flush=True)
    if checks == "wait" and sys.stdin.readline() != "go\\n":
        time.sleep(1000)
    if checks == "fail":
        raise UserError("its disk is full\\n  of old runs")
    note("has checked")
note("goes on")
if node == "0":
    socket.create_server(("", int(port))).close()  # as torch's store does next
"""
REASON = "error: node {} (127.0.0.1): its disk is full\n  of old runs\n"

StartNode = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def start_node(port: int, tmp_path: Path) -> Iterator[StartNode]:
    """Start a node of two or more. checks: "pass", "fail", or "wait" for a line on stdin first."""
    nodes = []

    def start(
        node: int, checks: str, *, num_nodes: int = 3, patience: float = 300
    ) -> subprocess.Popen[str]:
        words = [node, num_nodes, port, patience, checks, tmp_path / "log"]
        nodes.append(
            subprocess.Popen(
                [sys.executable, "-c", NODE, *map(str, words)],
                cwd=REPO / "sft",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return nodes[-1]

    yield start
    for node in nodes:
        node.kill()
        node.communicate()


def await_line(node: subprocess.Popen[str], words: str) -> None:
    assert node.stdout is not None
    assert any(words in line for line in node.stdout), f"it ended without {words!r}"


def errors(nodes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """The exit status and the stderr of each node, each within a minute."""
    streams = [node.communicate(timeout=60) for node in nodes]
    return [(node.returncode, stderr) for node, (_, stderr) in zip(nodes, streams, strict=True)]


def test_all_nodes_go_on_when_the_last_has_checked_and_the_port_is_free(
    start_node: StartNode, tmp_path: Path
) -> None:
    nodes = [start_node(0, "pass"), start_node(1, "pass"), start_node(2, "wait")]
    await_line(nodes[2], "checking")
    # Node 0 says whom it waits for. So it has checked, and does not go on.
    await_line(nodes[0], "node 2 (127.0.0.1) is checking")
    assert nodes[2].stdin is not None
    print("go", file=nodes[2].stdin, flush=True)
    assert errors(nodes) == [(0, "")] * 3
    log = (tmp_path / "log").read_text().splitlines()
    assert sorted(log[:3]) == [f"node {n} has checked" for n in range(3)]
    assert sorted(log[3:]) == [f"node {n} goes on" for n in range(3)]


@pytest.mark.parametrize("failing", range(3))
def test_one_that_fails_ends_all_while_they_still_check(
    failing: int, start_node: StartNode, tmp_path: Path
) -> None:
    nodes = [start_node(node, "fail" if node == failing else "wait") for node in range(3)]
    own = (1, "error: its disk is full\n  of old runs\n")
    told = (1, REASON.format(failing))
    assert errors(nodes) == [own if node == failing else told for node in range(3)]
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("late", [0, 1])
def test_a_node_that_comes_late_hears_of_it(late: int, start_node: StartNode) -> None:
    first = start_node(1 - late, "fail", num_nodes=2)
    await_line(first, "checking")
    second = start_node(late, "pass", num_nodes=2)
    assert errors([second]) == [(1, REASON.format(1 - late))]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_node_that_is_killed_ends_all(killed: int, start_node: StartNode) -> None:
    nodes = [start_node(node, "wait" if node == killed else "pass") for node in range(3)]
    if killed:
        await_line(nodes[0], f"node {killed} (127.0.0.1) is checking")
    else:
        for node in nodes[1:]:  # both have reported, and wait for the verdict
            await_line(node, "node 0 (127.0.0.1) has not told")
    nodes[killed].kill()
    reason = NO_REPORT if killed else "ended its checks without a verdict; see its log"
    for status, said in errors([node for n, node in enumerate(nodes) if n != killed]):
        assert status == 1 and said.count("error:") == 1
        assert f"node {killed} (127.0.0.1)" in said and reason in said


@pytest.mark.parametrize("missing", [0, 1])
def test_a_node_that_never_comes_is_named(missing: int, start_node: StartNode) -> None:
    (result,) = errors([start_node(1 - missing, "pass", num_nodes=2, patience=1)])
    where = f"node {missing} (127.0.0.1)"
    assert result[0] == 1 and result[1].startswith(f"error: {where}"), result


def test_whatever_else_connects_is_not_heeded(start_node: StartNode, port: int) -> None:
    node = start_node(0, "pass", num_nodes=2)
    await_line(node, "checking")
    other_run = json.dumps({"run": "another run", "node": 1}).encode() + b"\n"
    ours = {"run": "this run", "node": 7}
    for message in (b"", b"\x00\xff" * 50_000, b"[1]\n", other_run, json.dumps(ours).encode()):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            try:
                stranger.sendall(message)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(1) == b""  # hung up on, without a word
            except ConnectionError:
                pass
    with socket.create_connection(("127.0.0.1", port)):  # says nothing, and stays
        assert errors([node, start_node(1, "pass", num_nodes=2)]) == [(0, "")] * 2


def test_one_node_needs_no_network() -> None:
    with Rendezvous(0, ["127.0.0.1"], port=-1, run=""):
        pass
    with pytest.raises(ValueError, match="its own"), Rendezvous(0, [], port=-1, run=""):
        raise ValueError("its own")
