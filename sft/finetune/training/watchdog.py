"""Ends a run that hangs, and says which rank did: collectives alone wait, and name nobody."""

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
    """A thread on each rank that posts to torch's store how far the rank is, and reads the others.

    timeout: seconds without a step, or a batch of evaluation, before every rank ends with status 1.
    is_excused: whether this rank waits for something that may take longer, an upload for example.
    """

    def __init__(self, *, timeout: float, is_excused: Callable[[], bool]) -> None:
        self.timeout = timeout
        self.is_excused = is_excused
        self.interval = min(5.0, timeout / 10)
        self.step = self.moves = 0
        self.moved = time.monotonic()
        self.ended = threading.Event()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if dist.is_available() and dist.is_initialized():
            self.move(state)
            # A connection of its own: the main thread may hang while it uses the other.
            self.store = _get_default_store().clone()  # type: ignore[attr-defined]
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            threading.Thread(target=self.watch, name="watchdog", daemon=True).start()

    def move(self, state: TrainerState) -> None:
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
        beat = 0
        while not self.ended.wait(self.interval):
            beat += 1
            self.post(beat)
            if self.is_excused():
                self.moved = time.monotonic()
            if time.monotonic() - self.moved > self.timeout:
                before = self.posts()
                for _ in range(3):  # a rank that lives posts meanwhile
                    beat += 1
                    self.post(beat)
                    self.ended.wait(self.interval)
                self.report(before, self.posts())
                os._exit(1)

    def post(self, beat: int) -> None:
        post = {"beat": beat, "moves": self.moves, "step": self.step, "host": socket.gethostname()}
        self.store.set(f"watchdog/{self.rank}", json.dumps(post))

    def posts(self) -> list[dict[str, Any]]:
        """Every rank's last post; an empty one of a rank that never posted."""
        keys = [f"watchdog/{rank}" for rank in range(self.world_size)]
        return [json.loads(self.store.get(key)) if self.store.check([key]) else {} for key in keys]

    def report(self, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
        """Name the ranks to blame; the first rank that is alive speaks."""
        silent = [n for n, (old, new) in enumerate(zip(before, after, strict=True)) if old == new]
        alive = [n for n in range(self.world_size) if n not in silent]
        if not alive or self.rank != alive[0]:
            return
        behind = [n for n in alive if after[n]["moves"] < max(after[m]["moves"] for m in alive)]
        if silent:
            verdict = f"{names(silent, after)} gave no sign of life: its process or its node stands"
        elif behind:
            verdict = f"{names(behind, after)} is behind the others, which wait for it"
        else:
            verdict = "all ranks wait in the same place: a GPU or the network between them hangs"
        print(
            f"error: no progress for {self.timeout:.0f} s in step {self.step + 1}: {verdict}",
            file=sys.stderr,
            flush=True,
        )


def names(ranks: list[int], posts: list[dict[str, Any]]) -> str:
    return ", ".join(f"rank {rank} (host {posts[rank].get('host', '?')})" for rank in ranks)
