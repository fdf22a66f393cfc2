"""The saver's phases, driven in one process with an uploader that waits for the test."""

import queue
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import TrainerControl, TrainerState

from finetune.checkpoint.fence import Fence, FencedOff
from finetune.checkpoint.fingerprint import RunRecord
from finetune.checkpoint.manifest import MANIFEST, check_complete, read_manifest
from finetune.checkpoint.saver import FULL_BYTES, LONGEST_SAVE_SECONDS, Phase, Saver
from finetune.errors import UserError
from finetune.preemption import PreemptionNotice
from helpers.checkpoints import FINGERPRINT

DEADLINE = 60.0  # seconds for what takes milliseconds
SHARED_MEMORY = Path("/dev/shm")


class Upload:
    """One call of the uploader, which returns or raises when the test says so."""

    def __init__(self, files: list[Path]) -> None:
        self.names = [file.name for file in files]
        self.error: Exception | None = None
        self.ended = threading.Event()

    def end(self, error: Exception | None = None) -> None:
        self.error = error
        self.ended.set()


class FakeUploader:
    """Stands in for await_upload: each call blocks the saver's thread until the test ends it."""

    def __init__(self) -> None:
        self.uploads: queue.Queue[Upload] = queue.Queue()
        self.all: list[Upload] = []
        self.is_closed = False

    def __call__(self, files: list[Path]) -> None:
        upload = Upload(files)
        self.uploads.put(upload)
        self.all.append(upload)
        if self.is_closed:
            upload.end()
        assert upload.ended.wait(DEADLINE)
        if upload.error is not None:
            raise upload.error

    def next(self) -> Upload:
        """The next call, once the saver has made it."""
        return self.uploads.get(timeout=DEADLINE)

    def close(self) -> None:
        """End every upload. A test that has failed would else leave the saver's thread waiting."""
        self.is_closed = True
        for upload in self.all:
            if not upload.ended.is_set():
                upload.end()

    def has_been_called(self) -> bool:
        """Whether there is a call that the test has not taken yet."""
        return not self.uploads.empty()


class Run:
    """A saver and all that a test controls about it."""

    def __init__(
        self, run_dir: Path, *, keep: int | None = None, fence: Fence | None = None
    ) -> None:
        self.run_dir = run_dir
        self.uploader = FakeUploader()
        self.now = 1000.0
        self.free = 10 * FULL_BYTES
        self.notice = PreemptionNotice()
        self.saver = Saver(
            run_dir,
            notice=self.notice,
            every_minutes=5,
            keep=keep,
            manifest={"fingerprint": {"model": "m"}},
            fence=fence,
            await_upload=self.uploader,
            clock=lambda: self.now,
            free_bytes=lambda folder: self.free,
        )

    @property
    def phase(self) -> Phase:
        return self.saver.phase

    def step(self) -> TrainerControl:
        """The end of a training step; what the saver asks Trainer to do after it."""
        control = TrainerControl()
        self.saver.on_step_end(None, TrainerState(), control)
        return control

    def step_until(self, phase: Phase) -> None:
        """Train until the saver is in this phase; all that it waits for must have ended."""

        def is_there() -> bool:
            if self.phase is not phase:
                self.step()
            return self.phase is phase

        await_true(is_there)

    def save(self, step: int) -> Path:
        """Start a save without tensors; its folder."""
        self.saver.save(step, None, write_file)
        assert self.saver.folder is not None
        return self.saver.folder

    def save_completely(self, step: int) -> Path:
        folder = self.save(step)
        self.uploader.next().end()
        self.step_until(Phase.COMMITTING)
        self.uploader.next().end()
        self.step_until(Phase.IDLE)
        assert check_complete(folder) is None
        return folder


def await_true(condition: Callable[[], bool]) -> None:
    """Poll for what another thread is about to do."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def write_file(folder: Path) -> None:
    (folder / "scheduler.pt").write_text("state")


def start_thread(work: Callable[[], Any]) -> threading.Thread:
    """A daemon: if it never ends, the test fails instead of hanging."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def make_run() -> Iterator[Callable[..., Run]]:
    """Makes a Run, with Run's arguments."""
    runs: list[Run] = []

    def make(run_dir: Path, **options: Any) -> Run:
        runs.append(Run(run_dir, **options))
        return runs[-1]

    yield make
    for run in runs:
        run.uploader.close()


@pytest.fixture
def run(make_run: Callable[..., Run], tmp_path: Path) -> Run:
    return make_run(tmp_path)


def test_a_save_that_is_asked_for_is_made_once_and_training_goes_on(run: Run) -> None:
    run.notice.request_save()
    control = run.step()
    assert control.should_save and not control.should_training_stop
    run.save(1)
    run.uploader.next()
    run.notice.request_save()  # while the first save is under way: another one, after it
    assert not run.step().should_save
    run.uploader.close()
    run.step_until(Phase.IDLE)
    assert run.step().should_save
    run.save_completely(2)
    assert not run.step().should_save


def test_a_save_goes_through_its_phases_and_ends(run: Run) -> None:
    assert run.phase is Phase.IDLE
    folder = run.save(3)
    upload = run.uploader.next()
    assert upload.names == ["scheduler.pt"]
    run.step()
    assert run.phase is Phase.WRITING
    upload.end()
    run.step_until(Phase.COMMITTING)
    upload = run.uploader.next()
    assert upload.names == [MANIFEST]
    run.step()
    assert run.phase is Phase.COMMITTING
    upload.end()
    run.step_until(Phase.IDLE)
    assert check_complete(folder) is None
    manifest = read_manifest(folder)
    assert manifest["fingerprint"] == {"model": "m"} and manifest["step"] == 3
    assert manifest["files"]["scheduler.pt"]["size"] == len("state")


def test_training_does_not_wait_for_a_save_that_never_ends_but_saves_when_it_has(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.save(3)
    upload = run.uploader.next()
    run.now += LONGEST_SAVE_SECONDS + 1
    run.saver.save(6, None, write_file, required=False)
    assert "checkpoint-6 is not saved: checkpoint-3 is still on" in capsys.readouterr().out
    assert not (run.run_dir / "checkpoint-6").exists()
    assert not run.step().should_save
    upload.end()
    run.step_until(Phase.COMMITTING)
    run.uploader.next().end()
    await_true(lambda: run.step().should_save)
    assert check_complete(run.run_dir / "checkpoint-3") is None


def test_tensors_are_saved_as_they_were_when_save_returned(run: Run) -> None:
    weight = torch.ones(4)
    for step in (1, 2):  # with the same stager
        weight.fill_(step)
        run.saver.save(step, {"model": {"weight": weight}}, write_file)
        weight.fill_(-1.0)  # the next optimizer step
        upload = run.uploader.next()
        assert {"__0_0.distcp", ".metadata"} < set(upload.names)
        upload.end()
        run.step_until(Phase.COMMITTING)
        run.uploader.next().end()
        run.step_until(Phase.IDLE)
    for step in (1, 2):
        saved = {"model": {"weight": torch.zeros(4)}}
        dcp.load(saved, checkpoint_id=run.run_dir / f"checkpoint-{step}", no_dist=True)
        assert saved["model"]["weight"].tolist() == [step] * 4


def test_the_manifest_is_not_written_before_all_files_are_uploaded(run: Run) -> None:
    folder = run.save(1)
    upload = run.uploader.next()
    for _ in range(3):
        run.step()
    assert (folder / "scheduler.pt").exists()
    assert not (folder / MANIFEST).exists()
    assert not run.uploader.has_been_called()
    upload.end()
    run.step_until(Phase.COMMITTING)
    upload = run.uploader.next()
    assert (folder / MANIFEST).exists()
    upload.end()
    run.step_until(Phase.IDLE)


def test_old_checkpoints_are_deleted_only_after_the_manifests_own_upload(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run(tmp_path, keep=1)
    first = run.save_completely(1)
    second = run.save(2)
    run.uploader.next().end()
    run.step_until(Phase.COMMITTING)
    upload = run.uploader.next()
    assert (second / MANIFEST).exists()
    assert check_complete(first) is None
    upload.end()
    run.step_until(Phase.IDLE)
    assert not first.exists()
    assert check_complete(second) is None


def test_a_save_is_due_when_the_time_has_passed(run: Run) -> None:
    run.now += 5 * 60
    assert not run.step().should_save
    run.now += 1
    assert run.step().should_save
    run.save_completely(1)
    assert not run.step().should_save


def test_a_save_that_is_due_while_another_runs_waits(run: Run) -> None:
    run.save(1)
    upload = run.uploader.next()
    run.now += 5 * 60 + 1
    assert not run.step().should_save
    upload.end()
    run.step_until(Phase.COMMITTING)
    upload = run.uploader.next()
    assert not run.step().should_save
    upload.end()
    run.saver.finish()
    assert run.step().should_save


def test_the_next_save_first_brings_the_one_before_to_its_end(run: Run) -> None:
    first = run.save(1)
    upload = run.uploader.next()
    found: list[str | None] = []

    def write(folder: Path) -> None:
        found.append(check_complete(first))
        write_file(folder)

    thread = start_thread(lambda: run.saver.save(2, None, write))
    upload.end()
    upload = run.uploader.next()
    assert upload.names == [MANIFEST] and not found
    upload.end()
    thread.join(DEADLINE)
    assert found == [None]
    run.uploader.next().end()
    run.step_until(Phase.COMMITTING)
    run.uploader.next().end()


def test_a_step_is_saved_once(run: Run) -> None:
    run.save_completely(4)
    run.saver.save(4, None, lambda folder: pytest.fail("it was saved again"))
    assert run.phase is Phase.IDLE


def claimed(run_dir: Path) -> Fence:
    """That of a launch which claims the run now."""
    record = RunRecord.from_json(FINGERPRINT, file=run_dir / MANIFEST)
    fence = Fence(run_dir, record, await_upload=lambda files: None)
    fence.claim()
    fence.is_closed.set()  # the saver looks itself
    return fence


def names(run_dir: Path) -> list[str]:
    return sorted(folder.name for folder in run_dir.glob("checkpoint-*"))


def test_no_launch_writes_where_another_one_does(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """An older one may still have files on their way to its folder of the same step."""
    older = make_run(tmp_path, fence=claimed(tmp_path))
    older.save(3)
    newer = make_run(tmp_path, keep=1, fence=claimed(tmp_path))
    (tmp_path / "checkpoint-3/scheduler.pt").write_text("of the older one")
    newer.save_completely(3)
    assert read_manifest(tmp_path / "checkpoint-3.0002")["step"] == 3
    assert names(tmp_path) == ["checkpoint-3.0002"]  # the newest one is kept, as everywhere
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3/scheduler.pt").write_text("came late")
    older.uploader.next().end()
    with pytest.raises(FencedOff):
        older.step_until(Phase.IDLE)
    newer.save_completely(4)
    assert names(tmp_path) == ["checkpoint-4.0002"]


def test_what_an_earlier_launch_left_of_a_checkpoint_is_removed(run: Run) -> None:
    remains = run.run_dir / "checkpoint-2/__7_0.distcp"
    remains.parent.mkdir()
    remains.write_text("of rank 7")
    folder = run.save_completely(2)
    assert not remains.exists()
    assert list(read_manifest(folder)["files"]) == ["scheduler.pt"]


def test_finish_waits_until_the_save_is_complete(run: Run) -> None:
    folder = run.save(1)
    ended = threading.Event()

    def finish() -> None:
        run.saver.finish()
        ended.set()

    thread = start_thread(finish)
    await_true(lambda: run.saver.is_waiting)
    for name in ("scheduler.pt", MANIFEST):
        upload = run.uploader.next()
        assert upload.names == [name]
        assert run.saver.is_waiting and not ended.is_set()
        upload.end()
    assert ended.wait(DEADLINE)
    thread.join(DEADLINE)
    assert not run.saver.is_waiting
    assert check_complete(folder) is None


def test_finish_without_a_save_returns_at_once(run: Run) -> None:
    run.saver.finish()
    assert run.phase is Phase.IDLE


def test_training_waits_only_while_save_copies(run: Run) -> None:
    def write(folder: Path) -> None:
        run.now += 2.0

    run.saver.save(1, None, write)
    upload = run.uploader.next()
    run.now += 100.0  # the upload goes on meanwhile
    upload.end()
    run.step_until(Phase.COMMITTING)
    run.uploader.next().end()
    run.saver.finish()
    assert run.saver.stall_seconds == 2.0
    assert read_manifest(run.run_dir / "checkpoint-1")["stall_seconds"] == 2.0


def test_a_notice_makes_it_save_and_stop(run: Run) -> None:
    assert not run.step().should_training_stop
    run.notice.receive(signal.SIGTERM, None)
    control = run.step()
    assert control.should_save and control.should_training_stop
    assert run.saver.preempted
    assert run.saver.noticed_at == run.notice.received_at


def test_a_notice_stops_training_while_a_save_is_running(run: Run) -> None:
    run.save(1)
    upload = run.uploader.next()
    run.notice.receive(signal.SIGTERM, None)
    control = run.step()
    assert control.should_save and control.should_training_stop
    upload.end()
    run.step_until(Phase.COMMITTING)
    run.uploader.next().end()
    run.saver.finish()


def failure(folder: Path, reason: str, last: str) -> str:
    return re.escape(
        f"saving {folder} failed on rank 0: {reason}; "
        f"training stops, the last complete checkpoint is {last}"
    )


def test_a_failed_write_stops_training_and_names_the_last_complete_checkpoint(
    make_run: Callable[..., Run],
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, keep=1)

    def write(folder: Path) -> None:
        raise PermissionError("not allowed")

    reason = "PermissionError: not allowed"
    with pytest.raises(UserError, match=failure(tmp_path / "checkpoint-1", reason, "none")):
        run.saver.save(1, None, write)
    first = run.save_completely(2)
    with pytest.raises(UserError, match=failure(tmp_path / "checkpoint-3", reason, first.name)):
        run.saver.save(3, None, write)
    assert check_complete(first) is None


@pytest.mark.parametrize("phase", [Phase.WRITING, Phase.COMMITTING])
def test_a_failure_in_the_background_stops_training_at_the_next_step(
    make_run: Callable[..., Run], phase: Phase, tmp_path: Path
) -> None:
    run = make_run(tmp_path, keep=1)
    first = run.save_completely(1)
    second = run.save(2)
    if phase is Phase.COMMITTING:
        run.uploader.next().end()
        run.step_until(Phase.COMMITTING)
    run.uploader.next().end(OSError("the bucket refuses"))
    # The manifest that was not uploaded is on the disk all the same.
    last = "checkpoint-2" if phase is Phase.COMMITTING else "checkpoint-1"
    with pytest.raises(UserError, match=failure(second, "OSError: the bucket refuses", last)):
        run.step_until(Phase.IDLE)
    assert check_complete(first) is None


@pytest.mark.parametrize(
    ("free", "reason"),
    [
        (FULL_BYTES - 1, "No space left on device"),
        (FULL_BYTES, "RuntimeError: unexpected pos 64 vs 0"),
    ],
    ids=["full", "not full"],
)
def test_a_full_disk_is_named(free: int, reason: str, run: Run) -> None:
    """torch's writer reports it as an odd position in a file."""

    def write(folder: Path) -> None:
        raise RuntimeError("unexpected pos 64 vs 0\nand a trace")

    run.free = free
    with pytest.raises(UserError, match=failure(run.run_dir / "checkpoint-1", reason, "none")):
        run.saver.save(1, None, write)


def test_an_error_of_dcps_writer_is_named_not_its_wrapper(run: Run) -> None:
    def write(folder: Path) -> None:
        write_file(folder)
        (folder / "__0_0.distcp").mkdir()  # where DCP is about to write a file

    run.saver.save(1, {"model": {"weight": torch.ones(4)}}, write)
    with pytest.raises(UserError, match="failed on rank 0: IsADirectoryError"):
        run.saver.finish()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A link to a folder, in the place of a mount point: a test may point it elsewhere."""
    (tmp_path / "bucket").mkdir()
    link = tmp_path / "run"
    link.symlink_to(tmp_path / "bucket")
    yield link


def test_a_run_folder_that_is_gone_raises(make_run: Callable[..., Run], mount: Path) -> None:
    run = make_run(mount)
    run.save_completely(1)
    mount.unlink()
    with pytest.raises(UserError, match=f"{mount} is no longer mounted: is the bucket gone?"):
        run.save(2)


@pytest.mark.parametrize("phase", [Phase.IDLE, Phase.WRITING])
def test_a_run_folder_in_another_file_system_raises(
    make_run: Callable[..., Run], phase: Phase, mount: Path, tmp_path: Path
) -> None:
    """A bucket that is unmounted leaves an empty folder on the node's disk."""
    if not SHARED_MEMORY.is_dir() or SHARED_MEMORY.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    run = make_run(mount)
    first = run.save_completely(1).resolve()
    upload = None
    if phase is Phase.WRITING:
        run.save(2)
        upload = run.uploader.next()
    elsewhere = SHARED_MEMORY / f"{tmp_path.parent.name}-{tmp_path.name}"
    elsewhere.mkdir()
    try:
        mount.unlink()
        mount.symlink_to(elsewhere)
        with pytest.raises(UserError, match=f"{mount} is no longer mounted: is the bucket gone?"):
            if upload is None:
                run.save(2)
            else:
                upload.end()
                run.saver.finish()
        assert list(elsewhere.iterdir()) == []
    finally:
        shutil.rmtree(elsewhere)
    assert check_complete(first) is None
