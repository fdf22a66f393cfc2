"""Errors a user can act on: one line that says what was wrong, where, and what to do."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState


class UserError(Exception):
    """Something the user can mend. Its message is the whole line the user reads."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a UserError or a full disk into one line on stderr, printed once, and exit status 1."""
    try:
        yield
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"no space left writing {error.filename or 'a file'}: free some, or raise disk_size")


def fail(message: str) -> None:
    """Print `error: message`, its further lines indented, once, and exit with status 1."""
    if PartialState().is_main_process:
        lines = [" ".join(line.split()) for line in message.splitlines()]
        print("error:", "\n  ".join(lines), file=sys.stderr, flush=True)
    sys.exit(1)
