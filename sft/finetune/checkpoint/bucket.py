"""Whether what was written below a mounted bucket has reached it.

SkyPilot's MOUNT_CACHED is `rclone mount --vfs-cache-mode full`: a write ends in a cache on the
node's disk and is uploaded later, in no order. rclone keeps a JSON record of each file of its
cache, below vfsMeta in its --cache-dir; its "Dirty" is true from the first write until the upload
has succeeded (vfs/vfscache/item.go), and a file is dropped from the cache only after that.
"""

import json
import time
from pathlib import Path

POLL_SECONDS = 0.2  # rclone tells nobody when an upload ends
REMINDER_SECONDS = 60.0


def cache_of(folder: Path) -> Path | None:
    """The folder of rclone's cache records that mirrors `folder`, or None.

    None: folder is not below a mount of rclone, or below one without a cache, which uploads before
    a file is closed.
    """
    mount = rclone_mount(folder)
    if mount is None:
        return None
    source, mount_point = mount
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = command_line.read_bytes().decode().split("\0")
        except OSError:  # it has ended, or is another user's
            continue
        if "mount" in words and mount_point in words and "--cache-dir" in words:
            cache_dir = Path(words[words.index("--cache-dir") + 1])
            records = cache_dir / "vfsMeta" / source.replace(":", "/", 1)
            return records / folder.resolve().relative_to(mount_point)
    return None


def rclone_mount(folder: Path) -> tuple[str, str] | None:
    """(source, mount point) of the file system that holds `folder`, if that is rclone's."""
    path = folder.resolve()
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    holding = [entry for entry in mounts if path.is_relative_to(entry[1])]
    # Of two mounts on one point the later one is seen.
    source, mount_point, kind, *_ = max(reversed(holding), key=lambda entry: len(entry[1]))
    return (source, mount_point) if kind == "fuse.rclone" else None


def is_uploaded(record: Path) -> bool:
    """Whether the file of this record is in the bucket; no record: it has left the cache."""
    try:
        return not json.loads(record.read_text())["Dirty"]
    except FileNotFoundError:
        return True
    except ValueError:  # it is being written
        return False


def await_upload(files: list[Path]) -> None:
    """Return when every file is durable, reminding of those that take long. All of one folder."""
    if not files:
        return
    records = cache_of(files[0].parent)
    if records is None:
        return
    started = reminded = time.monotonic()
    while waiting := [file for file in files if not is_uploaded(records / file.name)]:
        time.sleep(POLL_SECONDS)
        if time.monotonic() - reminded > REMINDER_SECONDS:
            reminded = time.monotonic()
            minutes = (reminded - started) / 60
            print(
                f"bucket: {len(waiting)} files of {waiting[0].parent} wait since {minutes:.0f} min "
                "for their upload: is the bucket reachable?",
                flush=True,
            )
