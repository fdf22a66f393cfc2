"""One process at a time writes to the folder of an export."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import UserError


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other exports out of a folder that exists. Raises UserError if one is at work there.

    The kernel holds the lock, on the folder itself: no file is left behind, and the lock goes with
    its process, however that ends. On a mounted bucket or a network disk it keeps out the processes
    of this machine alone: no machine knows of the locks of another there.
    """
    folder = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another export is writing to {output}: wait for its end, or give another --output"
            ) from None
        yield
    finally:
        os.close(folder)
