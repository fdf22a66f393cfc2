"""Errors a user can act on: one line that says what was wrong, where, and what to do."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from safetensors import SafetensorError

from finetune.credentials import without_secrets

# Read-only, not permitted, broken, or a mount whose other end has gone.
LOST_DISK = (
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTCONN,
    errno.ESTALE,
)


class UserError(Exception):
    """Something the user can mend. Its message is the whole line the user reads."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a UserError, a full or a lost disk into one line on stderr and exit status 1."""
    try:
        yield
    except UserError as error:
        fail(str(error))
    except OSError as error:
        file = error.filename or "a file"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fail(f"no space left writing {file}: free some, or raise disk_size")
        if error.errno in LOST_DISK:
            fail(f"{file} cannot be read or written ({error.strerror}): is the bucket still there?")
        raise
    except SafetensorError as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        fail("no space left writing the weights: free some, or raise disk_size")


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


def fail(message: str) -> NoReturn:
    """Print `error: message`, its further lines indented, once, and exit with status 1."""
    if is_first_to_fail():
        message = without_secrets(message)
        lines = [" ".join(line.split()) for line in message.splitlines()]
        # An error may quote data; what would steer the terminal is written out.
        lines = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines]
        print("error:", "\n  ".join(lines), file=sys.stderr, flush=True)
    sys.exit(1)


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
