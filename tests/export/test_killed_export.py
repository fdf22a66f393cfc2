"""A killed export goes on when it is repeated, and of two into one folder the second is refused."""

import signal
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import UserError
from finetune.export.record import Format
from helpers.paths import CPU_ENVS
from helpers.watched_export import (
    Pause,
    Place,
    kill,
    kill_in_the_next_file,
    run_export,
    run_export_until,
)

LONGEST = 600  # seconds that an export may take, on a machine that does much else
JOURNAL = ".model.gguf.journal"


def shard(number: int) -> Place:
    return Place("os.rename", ".safetensors", number)


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    """Makes processes that have imported export.py already: that takes 8 s, and is done once."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["helpers.watched_export"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU_ENVS.items():
            patch.setenv(name, value)
        start(context, print)  # starts the server, which keeps this environment
    return context


def start(context: ForkServerContext, target: Any, *args: Any) -> ForkServerProcess:
    process = context.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "kills"),
    [
        pytest.param(
            "bf16", [(shard(2), kill_in_the_next_file), (shard(2), kill)], marks=pytest.mark.long
        ),
        ("mxfp4", [(shard(1), kill), (shard(2), kill_in_the_next_file)]),
        # A weight is on the disk and not in the journal; all is done but the journal's removal.
        ("gguf", [(Place("open", JOURNAL, 20), kill), (Place("os.remove", JOURNAL, 1), kill)]),
    ],
)
def test_a_killed_export_goes_on_when_it_is_repeated(
    form: Format,
    kills: list[tuple[Place, Any]],
    context: ForkServerContext,
    run_dir: Path,
    tmp_path: Path,
) -> None:
    """Killed twice in one folder, then repeated: its files are those of an undisturbed one."""
    output, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    for place, happens in kills:
        process = start(context, run_export_until, place, happens, run_dir, output, form)
        process.join(LONGEST)
        killed_by = signal.SIGKILL if happens is kill else signal.SIGXFSZ
        assert process.exitcode == -killed_by
        assert any(file.name.startswith(".") for file in output.iterdir())
    run_export(run_dir, output, form)
    run_export(run_dir, undisturbed, form)
    assert content(output) == content(undisturbed)


@pytest.mark.slow
def test_a_second_export_is_refused_and_the_first_undisturbed(
    context: ForkServerContext, run_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    reached, go_on = context.Event(), context.Event()
    place, pause = Place("open", JOURNAL, 20), Pause(reached, go_on)
    first = start(context, run_export_until, place, pause, run_dir, output, "gguf")
    assert reached.wait(LONGEST)
    before = content(output)
    with pytest.raises(UserError, match="another export is writing to .*/out: wait for its end"):
        run_export(run_dir, output, "gguf")
    assert content(output) == before
    go_on.set()
    first.join(LONGEST)
    assert first.exitcode == 0
    run_export(run_dir, tmp_path / "undisturbed", "gguf")
    assert content(output) == content(tmp_path / "undisturbed")
