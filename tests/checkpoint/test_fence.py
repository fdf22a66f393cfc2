"""A launch's claim to its run, and what it sees of newer ones."""

import shutil
import threading
from pathlib import Path

import pytest

from finetune.checkpoint.fence import LISTING_LAG_SECONDS, Fence, FencedOff, listing_lag
from finetune.checkpoint.fingerprint import RunRecord
from finetune.checkpoint.writers import Writer, write_writer
from finetune.errors import UserError
from helpers.checkpoints import FINGERPRINT


def record(**changes: object) -> RunRecord:
    return RunRecord.from_json(FINGERPRINT | changes, file=Path("manifest.json"))


def make_fence(run_dir: Path, **options: object) -> Fence:
    return Fence(run_dir, record(), sleep=lambda seconds: None, **options)  # type: ignore[arg-type]


def claimed(run_dir: Path) -> Fence:
    fence = make_fence(run_dir)
    fence.claim()
    fence.is_closed.set()  # the tests look themselves
    return fence


def test_the_older_of_two_launches_is_fenced_off(tmp_path: Path) -> None:
    older = claimed(tmp_path)
    older.check()
    newer = claimed(tmp_path)
    newer.check()
    assert newer.writer is not None and newer.writer.number == 2
    with pytest.raises(FencedOff, match=r"^fenced off: .*: number 2, host .*, started 20.* UTC$"):
        older.check()


def test_a_launch_that_claims_the_run_looks_out_by_itself(tmp_path: Path) -> None:
    older = make_fence(tmp_path)
    older.claim()
    (thread,) = [t for t in threading.enumerate() if t.name == "fence" and t.is_alive()]
    claimed(tmp_path)
    thread.join(timeout=120)
    assert older.newer is not None


def test_on_a_mount_a_claim_is_uploaded_and_then_waits_for_what_listings_lag(
    tmp_path: Path,
) -> None:
    """A launch that claims the run in between is seen."""
    happened: list[str] = []

    def sleep(seconds: float) -> None:
        happened.append(f"slept {seconds}")
        claimed(tmp_path)

    fence = Fence(
        tmp_path,
        record(),
        await_upload=lambda files: happened.append(f"uploaded {files[0].parent.name}"),
        listing_lag=lambda run_dir: LISTING_LAG_SECONDS,
        sleep=sleep,
    )
    fence.claim()
    assert happened == ["uploaded writers", f"slept {LISTING_LAG_SECONDS}"]
    with pytest.raises(FencedOff):
        fence.check()
    assert listing_lag(tmp_path) == 0


def test_a_claim_that_is_withdrawn_stops_nobody(tmp_path: Path) -> None:
    older, newer = claimed(tmp_path), claimed(tmp_path)
    newer.withdraw(has_saved=False)
    older.check()
    assert len(list((tmp_path / "writers").iterdir())) == 1


def test_the_number_of_a_launch_that_has_begun_to_save_is_not_given_again(tmp_path: Path) -> None:
    """Its files may yet reach the bucket. Other settings may be tried."""
    claimed(tmp_path).withdraw(has_saved=True)
    other = Fence(tmp_path, record(seed=1))
    other.claim()
    assert other.writer is not None and other.writer.number == 2


@pytest.mark.parametrize(("double", "number"), [("0" * 8, 2), ("f" * 8, 1)])
def test_two_launches_that_claim_the_run_at_once_have_two_numbers(
    double: str, number: int, tmp_path: Path
) -> None:
    """The one with the higher id goes on. It is the one that takes another number."""

    def come(seconds: float) -> None:
        if not any(tmp_path.glob(f"writers/*-{double}.json")):
            write_writer(Writer(1, double), tmp_path)

    fence = Fence(tmp_path, record(), sleep=come)
    fence.claim()
    fence.is_closed.set()
    assert fence.writer is not None and fence.writer.number == number
    assert (fence.newer is None) == (number == 2)
    assert len(list((tmp_path / "writers").iterdir())) == 2


def test_a_claim_fails_where_others_cannot_be_seen(tmp_path: Path) -> None:
    def lose_the_bucket(seconds: float) -> None:
        shutil.rmtree(tmp_path / "writers")
        (tmp_path / "writers").write_text("")

    with pytest.raises(OSError):
        Fence(tmp_path, record(), sleep=lose_the_bucket).claim()


def test_a_launch_that_is_fenced_off_leaves_its_claim(tmp_path: Path) -> None:
    """So that numbers only grow."""
    older = claimed(tmp_path)
    claimed(tmp_path)
    older.look()
    older.withdraw(has_saved=False)
    assert len(list((tmp_path / "writers").iterdir())) == 2


def test_other_settings_are_refused_before_the_run_is_claimed(tmp_path: Path) -> None:
    claimed(tmp_path)
    other = Fence(tmp_path, record(seed=1))
    with pytest.raises(UserError, match="seed 0 -> 1"):
        other.claim()
    assert len(list((tmp_path / "writers").iterdir())) == 1
    Fence(tmp_path, record(seed=1), ignore_fingerprint=True).claim()
    assert len(list((tmp_path / "writers").iterdir())) == 2


def test_a_claims_number_is_above_those_of_launches_before_there_were_claims(
    tmp_path: Path,
) -> None:
    (tmp_path / "launches").mkdir()
    (tmp_path / "launches/0007.json").write_text("{}")
    fence = claimed(tmp_path)
    assert fence.writer is not None and fence.writer.number == 8


def test_a_folder_that_cannot_be_read_fences_nobody_off(tmp_path: Path) -> None:
    fence = claimed(tmp_path)
    for file in (tmp_path / "writers").iterdir():
        file.unlink()
    (tmp_path / "writers").rmdir()
    (tmp_path / "writers").write_text("")
    assert fence.look() is None
