"""Errors a user can act on: one line that says what was wrong, where, and what to do."""

import errno
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from finetune.credentials import without_secrets

NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)
LOST_DISK = (errno.EIO, errno.ENOTCONN, errno.ESTALE)  # broken, or a mount whose other end has gone


SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


class UserError(Exception):
    """Something the user can mend. Its message is the whole line the user reads."""


@contextmanager
def one_line_errors(*, status: int = 1) -> Iterator[None]:
    """End with this status and one line on stderr for a UserError, a full or a lost disk; for any
    other error with its traceback, in which credentials are left out. Ctrl-C ends with status 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted: the same command can be given again", status=130)
    except Exception as error:
        message = message_of(error)
        if message is not None:
            fail(message, status=status)
        # Errors of aiohttp and others quote the URL that they asked for.
        text = without_secrets("".join(traceback.format_exception(error)))
        print(text, end="", file=sys.stderr, flush=True)
        sys.exit(1)


def message_of(error: Exception) -> str | None:
    """What to tell the user about an error that the user can mend, or None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        file = error.filename or "a file"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left writing {file}: free some, or raise disk_size"
        problem = f"{file} cannot be read or written ({error.strerror})"
        if error.errno in NOT_ALLOWED:
            return f"{problem}: allow it to this user, or name another folder"
        if error.errno in LOST_DISK:
            return f"{problem}: is the disk, or the bucket that is mounted there, still there?"
    # Written by Rust, in safetensors and tokenizers, or by numpy, which says how much it wrote.
    is_short_write = isinstance(error, OSError) and SHORT_WRITE.fullmatch(str(error))
    if is_short_write or os.strerror(errno.ENOSPC) in str(error):
        return "no space left on the disk that is written to: free some, or raise disk_size"
    return None


@contextmanager
def only_warn(action: str) -> Iterator[None]:
    """Turn any error into a line on stdout: for what is nice to have, beside what must be kept.

    action: what was tried, for the line: "the plot of the losses cannot be drawn: ...".
    """
    try:
        yield
    except Exception as error:  # whatever a library raises, the run's result matters more
        reason = without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))
        print(f"warning: {action}: {reason}".encode("ascii", "replace").decode(), flush=True)


def fail(message: str, *, status: int = 1) -> NoReturn:
    """Print `error: message`, its further lines indented, once, and exit with this status."""
    if is_first_to_fail():
        message = without_secrets(message)
        lines = [" ".join(line.split()) for line in message.splitlines()]
        # An error may quote data; what would steer the terminal is written out.
        lines = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines]
        text = "\n  ".join(lines)
        print("error:", text, file=sys.stderr, flush=True)
        tell_launcher(text)
    sys.exit(status)


def tell_launcher(message: str) -> None:
    """The launcher prints a traceback of its own, and a report of which rank has failed. It comes
    last in the log, so it says the reason too. The file's form is that of torch's ErrorHandler.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with suppress(OSError):  # the disk may be what has failed
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))


def is_first_to_fail() -> bool:
    """Whether this rank should print: one does, whether all of them fail together or one alone."""
    if "RANK" not in os.environ:
        return True
    # Imported here: a tool that runs on its own must start, and fail, without torch.
    from accelerate import PartialState
    from torch.distributed import DistError, is_initialized
    from torch.distributed.distributed_c10d import _get_default_store

    if PartialState().num_processes == 1 or not is_initialized():
        return PartialState().is_main_process
    try:
        return _get_default_store().add("failed", 1) == 1
    except DistError:  # the process that hosts the store has ended
        return True
