"""Wait until the bucket has all that this node wrote to it, or give it up when it takes nothing.

    python sft/await_uploads.py [--folder /checkpoints]

The recipes call it on each node when the run has ended, however it did. SkyPilot waits for uploads
too, but without an end: a bucket that is gone would keep the machine, and its price, for ever.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.command_line import CommandLine
from finetune.node import BUCKET_MOUNT


@dataclass(frozen=True)
class AwaitArguments:
    folder: str = field(default=BUCKET_MOUNT, metadata={"help": "where the bucket is mounted"})


def command_line() -> CommandLine:
    return CommandLine(AwaitArguments, description=__doc__)


if __name__ == "__main__":
    (arguments,) = command_line().parse_args_into_dataclasses()

from finetune.checkpoint.bucket import await_all_uploads
from finetune.errors import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        await_all_uploads(Path(arguments.folder))
