"""The checks of all nodes pass, or none do: one node that failed would leave the others waiting.

    each node    connects to node 0 at its start, and stays connected while it checks
    each node    reports that its checks passed, or in one line why they did not
    node 0       tells all the joint verdict; a bad one at once, also to nodes that still check

Messages are JSON, one a line. Whatever else connects to the port is not heeded.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from finetune.errors import UserError, fail

MESSAGE_BYTES = 2**16
PROBLEM_CHARACTERS = 8000  # a list of bad rows is cut there; its node's log has all of it
NO_REPORT = "its checks ended without a report; see its log"
SECONDS_TO_GREET = 30.0
SECONDS_TO_TELL = 40.0  # how long a node that failed stays until the others know why
# A node that loses its power or its network is missed after 20 + 3 * 10 seconds.
KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


class Rendezvous:
    """A node's checks run inside it: `with Rendezvous(...): check()`.

    node: this one's rank. addresses: of all nodes, by rank; with one node there is no network.
    port: of node 0, and free again when the verdict is good. run: the same on all nodes, and
    another in other runs. patience: seconds to wait for a node that does not come at all.
    line_every: seconds between two lines that name who is waited for.

    Leaving it raises UserError on all nodes if one of them has failed. Nodes that still check when
    they hear of it end at once, with the same line and status 1.
    """

    def __init__(
        self,
        node: int,
        addresses: list[str],
        *,
        port: int,
        run: str,
        patience: float = 180.0,
        line_every: float = 30.0,
    ) -> None:
        self.node, self.addresses, self.port, self.run = node, addresses, port, run
        self.patience, self.line_every = patience, line_every
        self.started = time.monotonic()
        self.is_checking = True
        self.ending = threading.Lock()  # held by who changes is_checking, or ends the process
        self.lock = threading.RLock()  # for all that follows
        self.problem: str | None = None  # the joint verdict, once it is decided; None is good
        self.decided = threading.Event()
        # On node 0 all nodes that have come, on another the connection to node 0.
        self.connections: dict[int, socket.socket] = {}
        self.connected = threading.Event()
        self.passed: set[int] = set()  # on node 0: the nodes whose checks have passed
        self.left: set[int] = set()  # on node 0: the nodes that have hung up
        self.listener: socket.socket | None = None  # of node 0
        if len(addresses) > 1:
            self.thread = start(self.host if node == 0 else self.follow)
            start(self.end_if_checking)

    def __enter__(self) -> "Rendezvous":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if len(self.addresses) <= 1:
            return
        with self.ending:
            self.is_checking = False
        if error is not None:
            self.report(in_words(error), deadline=time.monotonic() + SECONDS_TO_TELL)
            self.decided.wait(SECONDS_TO_TELL)
        else:
            self.report(None)
            self.await_verdict()
        if self.node == 0 and self.problem is not None:
            self.await_farewells()
        if error is None and self.problem is not None:
            raise UserError(self.problem)

    def report(self, problem: str | None, *, deadline: float = float("inf")) -> None:
        """Say how this node's checks ended. Returns when node 0 has been told, or cannot be.

        deadline: when to stop waiting for node 0 to come, by time.monotonic.
        """
        if self.node == 0:
            self.note(0, problem)
            return
        while not self.connected.wait(0.2):
            if self.decided.is_set() or time.monotonic() > deadline:
                return
        with suppress(OSError):  # node 0 has gone; follow() sees it as well
            send(self.connections[0], {"problem": problem})

    def await_verdict(self) -> None:
        """Return once all nodes have reported or one has failed; name the missing ones meanwhile.

        Ends with a bad verdict if nodes have not even come within `patience` seconds.
        """
        next_line = time.monotonic() + self.line_every
        while not self.decided.wait(0.2):
            absent = [n for n in range(1, len(self.addresses)) if n not in self.connections]
            if self.node == 0 and absent and time.monotonic() - self.started > self.patience:
                names = ", ".join(map(self.name, absent))
                self.tell(f"{names} did not come to the checks within {self.patience:.0f} s")
            elif time.monotonic() > next_line:
                next_line += self.line_every
                print(f"preflight: this node's checks have passed, {self.missing()}", flush=True)

    def missing(self) -> str:
        """Whom this node waits for, in words."""
        if self.node != 0:
            return f"{self.name(0)} has not told the verdict of all nodes yet"
        others = [n for n in range(1, len(self.addresses)) if n not in self.passed]
        states = [("is checking" if n in self.connections else "has not come") for n in others]
        return "; ".join(
            f"{self.name(node)} {state}" for node, state in zip(others, states, strict=True)
        )

    def name(self, node: int) -> str:
        return f"node {node} ({self.addresses[node]})"

    def end_if_checking(self) -> None:
        """A thread: after a bad verdict, end the process if this node's checks still go on."""
        self.decided.wait()
        with self.ending:
            if self.problem is None or not self.is_checking:
                return
            if self.node == 0:
                self.await_farewells()
            with suppress(SystemExit):
                fail(self.problem)
            os._exit(1)

    # Node 0

    def host(self) -> None:
        """The thread of node 0: one more thread for each connection."""
        try:
            self.listener = listen(self.port)
        except OSError as error:
            self.tell(f"{self.name(0)} cannot listen on port {self.port} ({error.strerror})")
            return
        with suppress(OSError):  # tell() has shut the listener down
            while True:
                connection, _ = self.listener.accept()
                start(self.serve, connection)

    def serve(self, connection: socket.socket) -> None:
        """One connection: if it is one of our nodes, note how its checks end."""
        connection.settimeout(SECONDS_TO_GREET)
        greeting = receive(connection)
        node: Any = greeting.get("node")
        if greeting.get("run") != self.run or node not in range(1, len(self.addresses)):
            connection.close()
            return
        keep_alive(connection)
        with self.lock:
            self.connections[node] = connection
            with suppress(OSError):  # it has gone again, which receive() sees
                send(connection, {"welcome": self.run})
                if self.decided.is_set():  # it comes after another one has failed
                    send(connection, {"problem": self.problem})
        report = receive(connection)
        if self.connections[node] is connection:  # and it has not come anew
            self.note(node, report.get("problem", NO_REPORT))
            while receive(connection):
                pass
            self.left.add(node)

    def note(self, node: int, problem: str | None) -> None:
        """Take a node's report; once it decides the joint verdict, tell all."""
        with self.lock:
            if problem is not None:
                self.tell(f"{self.name(node)}: {problem}")
            else:
                self.passed.add(node)
                if len(self.passed) == len(self.addresses):
                    self.tell(None)

    def tell(self, problem: str | None) -> None:
        """Tell the joint verdict to all nodes that have come. The port is free before a good one is
        told; after a bad one node 0 still listens for those that come later.
        """
        with self.lock:
            if self.decided.is_set():
                return
            if problem is None and self.listener is not None:
                self.listener.shutdown(socket.SHUT_RDWR)  # ends accept(), which holds the port
                self.thread.join()
                self.listener.close()
            for connection in self.connections.values():
                with suppress(OSError):
                    send(connection, {"problem": problem})
            self.problem = problem
            self.decided.set()

    def await_farewells(self) -> None:
        """After a bad verdict: return when all nodes have hung up, or some time later. What is
        under way to a node can be lost if this process ends first.
        """
        deadline = time.monotonic() + SECONDS_TO_TELL
        while time.monotonic() < deadline:
            may_come = time.monotonic() - self.started < self.patience
            if self.left >= set(range(1, len(self.addresses)) if may_come else self.connections):
                return
            time.sleep(0.1)

    # The other nodes

    def follow(self) -> None:
        """The thread of another node: connect to node 0, and take its verdict."""
        connection = self.greet()
        while connection is None and time.monotonic() - self.started < self.patience:
            time.sleep(0.5)
            connection = self.greet()
        if connection is None:
            where = f"{self.name(0)}, port {self.port},"
            self.problem = f"{where} did not answer within {self.patience:.0f} s"
        else:
            self.connections[0] = connection
            self.connected.set()
            gone = f"{self.name(0)} ended its checks without a verdict; see its log"
            self.problem = receive(connection).get("problem", gone)
        self.decided.set()

    def greet(self) -> socket.socket | None:
        """A connection to node 0 of this run, or None: it has not come yet, or this is not it."""
        with suppress(OSError):
            connection = socket.create_connection((self.addresses[0], self.port), SECONDS_TO_GREET)
            send(connection, {"run": self.run, "node": self.node})
            if receive(connection).get("welcome") == self.run:
                keep_alive(connection)
                return connection
            connection.close()
        return None


def start(target: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, name="rendezvous", daemon=True)
    thread.start()
    return thread


def in_words(error: BaseException) -> str:
    """What the other nodes are told about an error that ended this one's checks."""
    if isinstance(error, SystemExit):  # its line has been printed, here alone
        return NO_REPORT
    return (str(error) if isinstance(error, UserError) else repr(error))[:PROBLEM_CHARACTERS]


def listen(port: int) -> socket.socket:
    """A listening socket. The launch before may hold the port for some seconds more."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_server(("", port))  # sets SO_REUSEADDR, as torch's store does
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def keep_alive(connection: socket.socket) -> None:
    """Checks may take long: wait without a timeout, as long as the other machine answers."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # the names are Linux's
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def receive(connection: socket.socket) -> dict[str, Any]:
    """The next message; an empty dict if the other side has gone, or sends no such thing.

    It is read byte by byte: what follows the line stays for the next call.
    """
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < MESSAGE_BYTES:
            byte = connection.recv(1)
            if not byte:
                return {}
            line += byte
        message = json.loads(line)
    except (OSError, ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}
