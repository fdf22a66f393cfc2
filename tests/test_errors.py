"""An error that a user can mend is one line, whichever ranks meet it."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from finetune.errors import UserError, fail, one_line_errors, only_warn
from helpers.launching import launch_command
from helpers.paths import CPU_ENVS

UNUSABLE = "cannot be read or written"
SCRIPT = """
import sys
from accelerate import PartialState
from finetune.errors import UserError, one_line_errors
state = PartialState(cpu=True)
with one_line_errors():
    if sys.argv[1] in ("all", str(state.process_index)):
        raise UserError("the disk is gone")
    state.wait_for_everyone()
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["all", "0", "1"])
def test_an_error_of_one_or_all_ranks_is_printed_once(ranks: str, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(SCRIPT)
    command = launch_command("ddp.yaml", ranks, script=script)
    result = subprocess.run(command, env=os.environ | CPU_ENVS, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.count("error: the disk is gone") == 1
    # The launcher's report ends the log.
    assert "Root Cause" in result.stderr and "  traceback : the disk is gone\n" in result.stderr


def test_what_is_nice_to_have_warns_in_one_line_and_raises_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with only_warn("the plot cannot be drawn"):
        raise ValueError("two\nlines")
    assert capsys.readouterr().out == "warning: the plot cannot be drawn: ValueError: two lines\n"


@pytest.mark.parametrize(
    ("error", "text", "status"),
    [
        (KeyboardInterrupt(), "interrupted: the same command can be given again", 130),
        (UserError("no such run"), "no such run", 2),
        (OSError("2048 requested and 456 written"), "no space left on the disk", 2),  # numpy's
        (Exception("No space left on device (os error 28)"), "no space left on the disk", 2),
        (
            OSError(errno.EROFS, "Read-only", "/out/a"),
            f"/out/a {UNUSABLE} (Read-only): allow",
            2,
        ),
        (OSError(errno.EACCES, "Denied", "/out/a"), f"/out/a {UNUSABLE} (Denied): allow it", 2),
        (OSError(errno.EIO, "I/O", "/out/a"), f"/out/a {UNUSABLE} (I/O): is the disk, or the", 2),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    error: BaseException,
    text: str,
    status: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended, one_line_errors(status=2):
        raise error
    printed = capsys.readouterr().err
    assert ended.value.code == status and printed.startswith(f"error: {text}")
    assert printed.count("\n") == 1


def test_an_error_that_quotes_data_cannot_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        fail("row 1: \x1b]0;title\x07 ü")
    assert capsys.readouterr().err == "error: row 1: \\x1b]0;title\\x07 ü\n"
