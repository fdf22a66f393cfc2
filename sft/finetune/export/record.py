"""export.json, the record of an export in its output folder.

It tells a repeated call that it may go on with what an interrupted one has written, and refuses a
folder that holds anything else. The card is made from it. This file imports nothing heavy, because
export.py needs Format for its flags.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from finetune.errors import UserError

RECORD = "export.json"
Format = Literal["adapter", "bf16", "mxfp4", "gguf", "gguf-adapter"]


@dataclass
class ExportRecord:
    """What is exported, and how faithful the result is.

    format, origin (`final` or `checkpoint-N`), step, fingerprint (RunRecord.identity()),
    weights_sha256 (of the run's weights, None where nothing recorded it) and base_hash (of the base
    model, fingerprint.folder_hash; None in records of earlier versions) decide whether two calls
    make the same export. text: which conversations the export was compared on.
    fidelity: what fidelity.measure_fidelity returned; None if the export was not verified. hints:
    sentences for the user.
    """

    format: Format
    origin: str
    step: int | None
    fingerprint: dict[str, Any]
    text: str | None = None
    fidelity: dict[str, Any] | None = None
    hints: list[str] = field(default_factory=list)
    weights_sha256: str | None = None
    base_hash: str | None = None

    def write(self, output: Path, *, finished: bool) -> None:
        """Write it to the output folder; what was not measured is left out."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        text = json.dumps(values | {"finished": finished}, indent=2)
        # Renamed once it is complete: a torn one would make the folder one that holds no export.
        part = output / f".{RECORD}.part"
        part.write_text(text)
        part.rename(output / RECORD)


def read_record(output: Path) -> ExportRecord | None:
    """What an earlier call has begun in this folder; None if the folder is new or empty.

    Raises UserError if it holds anything that is not an export.
    """
    part = f".{RECORD}.part"  # alone there if the first call was interrupted at once
    try:
        if not output.exists() or all(file.name == part for file in output.iterdir()):
            return None
    except OSError as error:
        raise UserError(f"--output {output} cannot be a folder: {error.strerror}") from None
    try:
        values = json.loads((output / RECORD).read_text())
        known = {f.name: values[f.name] for f in fields(ExportRecord) if f.name in values}
        # A run's step is unknown if its summary.json does not name it.
        return ExportRecord(**({"step": None} | known))
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{output} holds something else than an export: give --output a new folder"
        ) from None


def check_same_export(begun: ExportRecord | None, record: ExportRecord, output: Path) -> None:
    """Raise UserError if the folder holds another export than the one that is to be written."""
    if begun is None:
        return
    names = ["format", "origin", "step", "fingerprint"]
    if begun.weights_sha256 is not None:  # version 0.1.0 did not record it
        names.append("weights_sha256")
    if any(getattr(begun, name) != getattr(record, name) for name in names):
        raise UserError(
            f"{output} holds an export as {begun.format} of step {begun.step} or of another run: "
            "give another --output"
        )
    # The fingerprint names the commit of a base from the hub, and --model may give any folder.
    if begun.base_hash not in (None, record.base_hash):
        raise UserError(
            f"{output} holds an export that was begun with another base model: repeat it with the "
            "--model of that call, or give another --output"
        )
