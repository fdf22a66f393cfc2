"""summary.json of a finished run's artifact: what was trained, and the files' sizes and hashes.

"files" has sizes in bytes; "sha256" has the files' hashes, and "summary_sha256" that of the
summary's other entries. Artifacts of 0.1.0 have neither of the hashes.
"""

import json
from pathlib import Path
from typing import Any

from finetune.checkpoint.manifest import sha256, sha256_of
from finetune.errors import UserError

SUMMARY = "summary.json"
REMEDY = (
    "copy the artifact from the bucket again, or delete it and launch the run again, which writes "
    "it anew"
)


def write_summary(artifact: Path, summary: dict[str, Any], files: list[Path]) -> None:
    """Write summary.json. files: all others of the artifact, complete."""
    summary = summary | {
        "files": {file.name: file.stat().st_size for file in files},
        "sha256": {file.name: sha256(file) for file in files},
    }
    text = json.dumps(summary | {"summary_sha256": sha256_of(summary)}, indent=2)
    (artifact / SUMMARY).write_text(text)


def read_summary(artifact: Path) -> dict[str, Any]:
    """The summary of an artifact whose files are all as they were written.

    Prints a line if only their sizes can be compared. Raises UserError, naming the file, for one
    that is missing or damaged.
    """
    file = artifact / SUMMARY
    try:
        summary = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): {REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is torn: if the run is not writing it just now, {REMEDY}"
        ) from error
    if not isinstance(summary, dict):
        raise UserError(f"{file} is not a run's summary: {REMEDY}")
    signature = summary.pop("summary_sha256", None)
    if signature is not None and signature != sha256_of(summary):
        raise UserError(f"{file} is not what was written (SHA-256 differs): {REMEDY}")
    check_files(artifact, summary)
    return summary


def check_files(artifact: Path, summary: dict[str, Any]) -> None:
    """Raise UserError, naming the file, if one is not as the summary says."""
    sizes, hashes = summary.get("files", {}), summary.get("sha256", {})
    if not isinstance(sizes, dict) or not isinstance(hashes, dict):
        raise UserError(f"{artifact / SUMMARY} is not a run's summary: {REMEDY}")
    for name, size in sizes.items():
        file = artifact / name
        if not file.is_file():
            raise UserError(f"{file} is missing: {REMEDY}")
        if file.stat().st_size != size:
            raise UserError(f"{file} has {file.stat().st_size} bytes, not {size}: {REMEDY}")
    if sizes and not hashes:
        print(f"{artifact} is of a version that wrote no hashes: only the sizes are compared")
    for name, expected in hashes.items():
        if sha256(artifact / name) != expected:
            raise UserError(
                f"{artifact / name} is not what was written (SHA-256 differs): {REMEDY}"
            )
