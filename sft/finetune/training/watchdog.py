"""Ends a run that hangs, and names the rank that caused it.

If one rank hangs, the others wait for it in a collective. Without this they would wait for the
collective's timeout, whose message does not say which rank was missing.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from transformers import TrainerCallback, TrainerState


class Watchdog(TrainerCallback):
    """A thread on each rank that posts the rank's progress to torch's store and watches over it.

    Progress is a batch, of training or of evaluation. After `timeout` seconds without any, the
    rank reads the posts of all ranks and ends with status 1. The first rank whose process still
    runs prints which ranks are to blame. is_excused: whether this rank is waiting for something
    that may take longer, for example an upload.
    """

    def __init__(self, *, timeout: float, is_excused: Callable[[], bool]) -> None:
        self.timeout = timeout
        self.is_excused = is_excused
        self.interval = min(5.0, timeout / 10)  # seconds between two posts
        self.step = self.moves = 0  # moves: batches so far
        self.moved = time.monotonic()  # when the last batch ended
        self.ended = threading.Event()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if dist.is_available() and dist.is_initialized():
            self.move(state)
            # A connection of its own: the main thread may hang while it holds the other's lock.
            self.store = _get_default_store().clone()  # type: ignore[attr-defined]
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            threading.Thread(target=self.watch, name="watchdog", daemon=True).start()

    def move(self, state: TrainerState) -> None:
        """Note that this rank has made progress."""
        self.step, self.moves, self.moved = state.global_step, self.moves + 1, time.monotonic()

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.move(state)

    def on_substep_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.move(state)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.move(state)

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        self.move(state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.ended.set()

    def watch(self) -> None:
        """The thread: post until training ends, or end the process if it hangs."""
        beat = 0
        while not self.ended.wait(self.interval):
            beat += 1
            self.post(beat)
            if self.is_excused():
                self.moved = time.monotonic()
            if time.monotonic() - self.moved > self.timeout:
                before = self.posts()
                # A rank whose process runs posts at least once in this time, even if its main
                # thread hangs. One that was stopped, or whose node is gone, does not.
                for _ in range(3):
                    beat += 1
                    self.post(beat)
                    self.ended.wait(self.interval)
                self.report(before, self.posts())
                os._exit(1)  # the main thread hangs in a collective: it would not see an exception

    def post(self, beat: int) -> None:
        """Put this rank's progress into the store. beat: different in every post."""
        post = {"beat": beat, "moves": self.moves, "step": self.step, "host": socket.gethostname()}
        self.store.set(f"watchdog/{self.rank}", json.dumps(post))

    def posts(self) -> list[dict[str, Any]]:
        """The last post of each rank; an empty dict for a rank that never posted."""
        keys = [f"watchdog/{rank}" for rank in range(self.world_size)]
        return [json.loads(self.store.get(key)) if self.store.check([key]) else {} for key in keys]

    def report(self, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
        """Print which ranks are to blame, if this is the first rank whose process runs.

        before, after: the posts of all ranks at two times.
        """
        silent = [n for n, (old, new) in enumerate(zip(before, after, strict=True)) if old == new]
        alive = [n for n in range(self.world_size) if n not in silent]
        if not alive or self.rank != alive[0]:
            return
        behind = [n for n in alive if after[n]["moves"] < max(after[m]["moves"] for m in alive)]
        if silent:
            verdict = f"{names(silent, after)}: process or node is not responding"
        elif behind:
            verdict = f"{names(behind, after)}: behind the other ranks, which wait for it"
        else:
            verdict = "all ranks wait in the same place: a GPU or the network between them hangs"
        print(
            f"error: no progress for {self.timeout:.0f} s in step {self.step + 1}: {verdict}",
            file=sys.stderr,
            flush=True,
        )


def names(ranks: list[int], posts: list[dict[str, Any]]) -> str:
    """The ranks with their hosts, as a message names them."""
    return ", ".join(f"rank {rank} (host {posts[rank].get('host', '?')})" for rank in ranks)
