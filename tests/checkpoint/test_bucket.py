"""When a file counts as uploaded, by the records that rclone keeps of its cache."""

from pathlib import Path

import pytest

from finetune.checkpoint.bucket import (
    POLL_SECONDS,
    REMINDER_SECONDS,
    await_all_uploads,
    await_upload,
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


def test_an_upload_that_takes_long_is_reported_each_minute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "run/checkpoint-4" / name for name in ("a", "b")]
    for file in files:
        (tmp_path / file.name).write_text('{"Dirty": true}')
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        assert seconds == POLL_SECONDS
        now += REMINDER_SECONDS / 2 + 1
        if now > 90:
            (tmp_path / "a").write_text('{"Dirty": false}')
        if now > 130:
            (tmp_path / "b").write_text('{"Dirty": false}')

    await_upload(files, find_records=lambda folder: tmp_path, sleep=sleep, clock=lambda: now)
    reminders = capsys.readouterr().out.splitlines()
    assert len(reminders) == 2
    assert "2 files in" in reminders[0] and "after 1 min" in reminders[0]
    assert "1 files in" in reminders[1] and "after 2 min" in reminders[1]


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
            tmp_path, find_records=lambda _: tmp_path / "records", sleep=sleep, clock=lambda: now
        )
    assert 3 * 3000 + 3600 < now < 3 * 3000 + 3600 + 180


def test_upload_minutes_that_are_no_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPLOAD_MINUTES", "an hour")
    with pytest.raises(UserError, match="UPLOAD_MINUTES 'an hour' is not a number"):
        upload_minutes()
