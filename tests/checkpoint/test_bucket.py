"""When a file counts as uploaded, by the records that rclone keeps of its cache."""

from pathlib import Path

import pytest

from finetune.checkpoint.bucket import (
    POLL_SECONDS,
    REMINDER_SECONDS,
    await_upload,
    cache_of,
    is_uploaded,
)


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
    assert "2 of 2 files in" in reminders[0] and "after 1 min" in reminders[0]
    assert "1 of 2 files in" in reminders[1] and "after 2 min" in reminders[1]


def test_a_local_folder_has_nothing_to_wait_for(tmp_path: Path) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("it waited")

    assert cache_of(tmp_path) is None
    await_upload([tmp_path / "file"], sleep=sleep)
    await_upload([], sleep=sleep)
