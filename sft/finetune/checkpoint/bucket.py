"""Whether files written to a mounted bucket have been uploaded to it.

SkyPilot's MOUNT_CACHED is `rclone mount --vfs-cache-mode full`: a write goes to a cache on the
node's disk, and rclone uploads the files of the cache later, in any order. For each of them it
keeps a JSON record below vfsMeta in its --cache-dir. The record's "Dirty" is true from the first
write until the upload has succeeded (vfs/vfscache/item.go in rclone), and a file is dropped from
the cache only after that.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from finetune.errors import UserError
from finetune.node import upload_minutes

POLL_SECONDS = 0.2  # rclone sends no event when an upload ends
REMINDER_SECONDS = 60.0


def cache_of(folder: Path) -> Path | None:
    """The folder that holds rclone's records of the files in `folder`.

    None if folder is not on a mount of rclone, or on one without a cache: that one uploads a file
    before the file is closed, and there is nothing to wait for.
    """
    mount = rclone_mount(folder)
    if mount is None:
        return None
    source, mount_point = mount
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = command_line.read_bytes().decode().split("\0")
        except OSError:  # the process has ended, or belongs to another user
            continue
        if "mount" in words and mount_point in words and "--cache-dir" in words:
            cache_dir = Path(words[words.index("--cache-dir") + 1])
            records = cache_dir / "vfsMeta" / source.replace(":", "/", 1)
            return records / folder.resolve().relative_to(mount_point)
    return None


def rclone_mount(folder: Path) -> tuple[str, str] | None:
    """(source, mount point) of the file system that holds `folder` if it is rclone's, or None."""
    path = folder.resolve()
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    holding = [entry for entry in mounts if path.is_relative_to(entry[1])]
    # The longest mount point is the innermost. Of two mounts at the same point, the later one in
    # the list hides the earlier one.
    source, mount_point, kind, *_ = max(reversed(holding), key=lambda entry: len(entry[1]))
    return (source, mount_point) if kind == "fuse.rclone" else None


def is_uploaded(record: Path) -> bool:
    """Whether the file that this record of rclone's is about is in the bucket."""
    try:
        return not json.loads(record.read_text())["Dirty"]
    except FileNotFoundError:  # the file has left the cache, which happens after its upload
        return True
    except ValueError:  # rclone is writing the record just now
        return False


def await_upload(
    files: list[Path],
    *,
    find_records: Callable[[Path], Path | None] = cache_of,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Return when every file is in the bucket; print a reminder each minute until then.

    files: all in one folder. find_records, sleep and clock are parameters for tests.
    Raises UserError if the bucket takes nothing for UPLOAD_MINUTES.
    """
    records = find_records(files[0].parent) if files else None
    if records is not None:
        own = [records / file.name for file in files]
        await_records(lambda: own, folder=files[0].parent, sleep=sleep, clock=clock)


def await_all_uploads(
    folder: Path,
    *,
    find_records: Callable[[Path], Path | None] = cache_of,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """await_upload for all that is below the folder, whoever wrote it.

    Raises OSError as well, if the folder's mount has lost the process behind it.
    """
    if not folder.exists():
        return
    os.statvfs(folder)
    records = find_records(folder)
    if records is not None:
        await_records(
            lambda: [path for path in records.rglob("*") if path.is_file()],
            folder=folder,
            sleep=sleep,
            clock=clock,
        )


def await_records(
    find: Callable[[], list[Path]],
    *,
    folder: Path,
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    """Return when all records that `find` returns are of uploaded files.

    folder: the one that holds the files, for messages. Raises UserError if none of them is uploaded
    for UPLOAD_MINUTES.
    """
    patience = 60 * upload_minutes()
    started = reminded = progressed = clock()
    fewest: int | None = None
    while waiting := [record for record in find() if not is_uploaded(record)]:
        now = clock()
        if fewest is None or len(waiting) < fewest:
            fewest, progressed = len(waiting), now
        if now - progressed > patience:
            raise UserError(
                f"the bucket has taken none of {len(waiting)} files in {folder} for "
                f"{patience / 60:g} minutes (UPLOAD_MINUTES): is it there, and may this machine "
                "write to it? They are lost when the machine goes down"
            )
        if now - reminded > REMINDER_SECONDS:
            reminded = now
            print(
                f"bucket: {len(waiting)} files in {folder} are not uploaded after "
                f"{(now - started) / 60:.0f} min: is the bucket reachable?",
                flush=True,
            )
        sleep(POLL_SECONDS)
