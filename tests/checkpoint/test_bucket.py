"""When a file counts as uploaded, by the records that rclone keeps of its cache."""

from pathlib import Path
from typing import Any

import pytest

from finetune.checkpoint.bucket import (
    POLL_SECONDS,
    REMINDER_SECONDS,
    Cache,
    await_all_uploads,
    await_upload,
    cache_dir_of,
    cache_of,
    is_uploaded,
)
from finetune.errors import UserError
from finetune.node import upload_minutes


@pytest.mark.parametrize(
    ("content", "uploaded"),
    [('{"Dirty": false}', True), ('{"Dirty": true}', False), ('{"Dir', False), (None, True)],
    ids=["uploaded", "waiting", "record being written", "left the cache"],
)
def test_a_record_says_whether_its_file_is_uploaded(
    content: str | None, uploaded: bool, tmp_path: Path
) -> None:
    record = tmp_path / "file"
    if content is not None:
        record.write_text(content)
    assert is_uploaded(record) is uploaded


@pytest.mark.parametrize(
    ("flags", "cache_dir"),
    [
        ("--vfs-cache-mode full --dir-cache-time 10s --cache-dir /c/hash", "/c/hash"),
        ("--cache-dir=/c --vfs-cache-mode=writes", "/c"),
        ("--vfs-cache-mode full", "/home/ada/.cache/rclone"),
        ("--cache-dir /c", None),
        ("--vfs-cache-mode off --cache-dir /c", None),
    ],
)
def test_the_cache_is_where_the_command_line_of_rclone_says(
    flags: str, cache_dir: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    words = ["rclone", "mount", "s3:bucket", "/checkpoints", *flags.split(), ""]
    assert cache_dir_of(words) == (cache_dir and Path(cache_dir))


class Bucket:
    """rclone's records of two files that wait for their upload, and a clock that a poll moves on.

    at: what happens at which second.
    """

    def __init__(self, folder: Path, *, log: str = "", at: dict[int, str] | None = None) -> None:
        self.folder, self.now, self.at = folder, 0.0, at or {}
        self.files = [folder / "run/checkpoint-4" / name for name in ("a", "b")]
        self.cache = Cache(folder, folder / "log", "run/checkpoint-4")
        (folder / "log").write_text(log)
        for file in self.files:
            (folder / file.name).write_text('{"Dirty": true}')

    def sleep(self, seconds: float) -> None:
        assert seconds == POLL_SECONDS
        self.now += REMINDER_SECONDS / 2 + 1
        for name in [name for second, name in self.at.items() if self.now > second]:
            (self.folder / name).write_text('{"Dirty": false}')

    def await_upload(self, **options: Any) -> None:
        await_upload(
            self.files,
            find_cache=lambda folder: self.cache,
            sleep=self.sleep,
            clock=lambda: self.now,
            **options,
        )


def refused(file: str) -> str:
    """A line of rclone 1.75.2's log."""
    return (
        f"2026/11/26 18:05:55 ERROR : run/checkpoint-4/{file}: vfs cache: failed to upload try #3, "
        "will retry in 40s: vfs cache: failed to transfer file from cache to remote: operation "
        "error S3: PutObject, https response error StatusCode: 404, RequestID: pyT9lK9un, HostID: "
        "9Gjjt1, api error NoSuchBucket: The specified bucket does not exist\n"
    )


def test_an_upload_that_takes_long_is_reported_each_minute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Bucket(tmp_path, at={90: "a", 130: "b"}).await_upload()
    reminders = capsys.readouterr().out.splitlines()
    assert len(reminders) == 2
    assert "2 files in" in reminders[0] and "after 1 min" in reminders[0]
    assert "1 files in" in reminders[1] and "after 2 min" in reminders[1]


def test_a_bucket_that_refuses_is_named_with_its_reason_and_given_up_after_an_hour(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hour begins anew whenever the bucket has taken a file."""
    bucket = Bucket(tmp_path, log=refused("b") + "of another file\n", at={600: "a"})
    with pytest.raises(UserError, match=r"taken none of 1 files .* refuses them \(NoSuchBucket"):
        bucket.await_upload()
    assert 3600 + 600 < bucket.now < 3600 + 800
    reminder = capsys.readouterr().out.splitlines()[0]
    assert "the bucket refuses them (NoSuchBucket: The specified bucket does not exist)" in reminder


def test_a_bucket_that_refuses_is_waited_for_while_training_goes_on(tmp_path: Path) -> None:
    at = {5 * 3600: "a", 10 * 3600: "b"}
    Bucket(tmp_path, log=refused("b"), at=at).await_upload(is_patient=lambda: True)


def test_an_upload_of_a_run_that_has_failed_is_not_waited_for(tmp_path: Path) -> None:
    bucket = Bucket(tmp_path)
    with pytest.raises(UserError, match="the run has ended"):
        bucket.await_upload(is_abandoned=lambda: bucket.now > 100)
    assert bucket.now < 200


def test_a_local_folder_has_nothing_to_wait_for(tmp_path: Path) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("it waited")

    assert cache_of(tmp_path) is None
    await_upload([tmp_path / "file"], sleep=sleep)
    await_upload([], sleep=sleep)
    await_all_uploads(tmp_path, sleep=sleep)
    await_all_uploads(tmp_path / "missing", sleep=sleep)


def test_a_bucket_that_takes_files_slowly_is_waited_for_and_a_dead_one_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of four files takes 50 minutes, and of 60 each is allowed; the last never comes."""
    monkeypatch.setenv("UPLOAD_MINUTES", "60")
    folder = tmp_path / "records/run/checkpoint-4"
    folder.mkdir(parents=True)
    records = [folder / name for name in "abcd"]
    for record in records:
        record.write_text('{"Dirty": true}')
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += 60
        for record in records[: min(3, int(now // 3000))]:
            record.write_text('{"Dirty": false}')

    with pytest.raises(UserError, match="taken none of 1 files in .* for 60 minutes"):
        await_all_uploads(
            tmp_path,
            find_cache=lambda _: Cache(tmp_path / "records"),
            sleep=sleep,
            clock=lambda: now,
        )
    assert 3 * 3000 + 3600 < now < 3 * 3000 + 3600 + 180


def test_upload_minutes_that_are_no_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPLOAD_MINUTES", "an hour")
    with pytest.raises(UserError, match="UPLOAD_MINUTES 'an hour' is not a number"):
        upload_minutes()
