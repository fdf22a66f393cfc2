"""Whether files written to a mounted bucket have been uploaded to it.

SkyPilot's MOUNT_CACHED is `rclone mount --vfs-cache-mode full`: a write goes to a cache on the
node's disk, and rclone uploads the files of the cache later, in any order. For each of them it
keeps a JSON record below vfsMeta in its --cache-dir. The record's "Dirty" is true from the first
write until the upload has succeeded (vfs/vfscache/item.go in rclone), and a file is dropped from
the cache only after that.
"""

import functools
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError
from finetune.node import upload_minutes

POLL_SECONDS = 0.2  # rclone sends no event when an upload ends
REMINDER_SECONDS = 60.0
LOG_BYTES = 2**18  # of the log's end: rclone writes two lines for each file that it tries again


@dataclass(frozen=True)
class Cache:
    """What rclone says of the files in one folder of its mount.

    records: the folder of its records of them. log: its log file, if it writes one. folder: how the
    log calls the folder, by its path below the mount point.
    """

    records: Path
    log: Path | None = None
    folder: str = ""

    def refusal(self, records: list[Path]) -> str | None:
        """Why the bucket has refused one of these files when rclone last tried, or None."""
        if self.log is None:
            return None
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - LOG_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:
            return None
        files = [Path(self.folder) / record.relative_to(self.records) for record in records]
        names = "|".join(re.escape(str(file)) for file in files)
        failed = re.findall(rf"(?:{names}): vfs cache: failed to upload try .*", text)
        # Of S3's errors, what follows "api error" says it: the rest are ids of the request.
        return re.split(r"to remote: |, api error ", failed[-1])[-1] if failed else None


def cache_of(folder: Path) -> Cache | None:
    """What rclone says of the files in `folder`.

    None if folder is not on a mount of rclone, or on one without a cache: that one uploads a file
    before the file is closed, and there is nothing to wait for.
    """
    mount = rclone_mount(folder)
    if mount is None:
        return None
    source, mount_point = mount
    below = folder.resolve().relative_to(mount_point)
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = command_line.read_bytes().decode().split("\0")
        except OSError:  # the process has ended, or belongs to another user
            continue
        if "mount" in words and mount_point in words:
            cache_dir, log = cache_dir_of(words), option(words, "--log-file")
            if cache_dir is None:
                return None
            records = cache_dir / "vfsMeta" / source.replace(":", "/", 1) / below
            return Cache(records, Path(log) if log else None, str(below))
    warn_of_unseen(mount_point)
    return None


def cache_dir_of(words: list[str]) -> Path | None:
    """Where the rclone of this command line keeps its cache, or None if it writes without one."""
    if option(words, "--vfs-cache-mode") not in ("writes", "full"):
        return None
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rclone"
    return Path(option(words, "--cache-dir") or default)


def option(words: list[str], name: str) -> str | None:
    """The value of an option, written `--name value` or `--name=value`; None if it is not given."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


@functools.cache
def warn_of_unseen(mount_point: str) -> None:
    """Say so, once, if a run cannot know when its files are in the bucket."""
    print(
        f"warning: the rclone that has mounted {mount_point} is not among the processes that can "
        "be seen here: checkpoints count as complete before they are uploaded",
        flush=True,
    )


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
    is_patient: Callable[[], bool] = lambda: False,
    is_abandoned: Callable[[], bool] = lambda: False,
    find_cache: Callable[[Path], Cache | None] = cache_of,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Return when every file is in the bucket; print a reminder each minute until then.

    files: all in one folder. find_cache, sleep and clock are parameters for tests.
    Raises UserError if the bucket takes nothing for UPLOAD_MINUTES, unless is_patient; and at once,
    when nobody needs the files any more, if is_abandoned.
    """
    cache = find_cache(files[0].parent) if files else None
    if cache is not None:
        own = [cache.records / file.name for file in files]
        await_records(
            lambda: own,
            cache=cache,
            folder=files[0].parent,
            is_patient=is_patient,
            is_abandoned=is_abandoned,
            sleep=sleep,
            clock=clock,
        )


def await_all_uploads(
    folder: Path,
    *,
    find_cache: Callable[[Path], Cache | None] = cache_of,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """await_upload for all that is below the folder, whoever wrote it.

    Raises OSError as well, if the folder's mount has lost the process behind it.
    """
    if not folder.exists():
        return
    os.statvfs(folder)
    cache = find_cache(folder)
    if cache is not None:
        await_records(
            lambda: [path for path in cache.records.rglob("*") if path.is_file()],
            cache=cache,
            folder=folder,
            is_patient=lambda: False,
            is_abandoned=lambda: False,
            sleep=sleep,
            clock=clock,
        )


def await_records(
    find: Callable[[], list[Path]],
    *,
    cache: Cache,
    folder: Path,
    is_patient: Callable[[], bool],
    is_abandoned: Callable[[], bool],
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    """Return when all records that `find` returns are of uploaded files.

    folder: the one that holds the files, for messages. The rest is as in await_upload.
    """
    patience = 60 * upload_minutes()
    started = reminded = progressed = clock()
    fewest: int | None = None
    while waiting := [record for record in find() if not is_uploaded(record)]:
        if is_abandoned():
            raise UserError("the run has ended")
        now = clock()
        if fewest is None or len(waiting) < fewest:
            fewest, progressed = len(waiting), now
        if now - progressed > patience and not is_patient():
            refusal = cache.refusal(waiting)
            reason = f"it refuses them ({refusal})" if refusal else "it does not answer"
            raise UserError(
                f"the bucket has taken none of {len(waiting)} files in {folder} for "
                f"{patience / 60:g} minutes (UPLOAD_MINUTES): {reason}; may this machine write to "
                "it? They are lost when the machine goes down"
            )
        if now - reminded > REMINDER_SECONDS:
            reminded = now
            refusal = cache.refusal(waiting)
            reason = (
                f"the bucket refuses them ({refusal})" if refusal else "is the bucket reachable?"
            )
            print(
                f"bucket: {len(waiting)} files in {folder} are not uploaded after "
                f"{(now - started) / 60:.0f} min: {reason}",
                flush=True,
            )
        sleep(POLL_SECONDS)
