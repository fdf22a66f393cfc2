"""summary.json of a finished run's artifact: what was trained, and the files' sizes and hashes.

"files" has sizes in bytes; "sha256" has the files' hashes, and "summary_sha256" that of the
summary's other entries. Artifacts of 0.1.0 have neither of the hashes.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from finetune.checkpoint.manifest import hash_problem, sha256, sha256_of
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
    try:
        return intact_summary(artifact)
    except ValueError as error:
        raise UserError(f"{error}: {REMEDY}") from error


def intact_summary(artifact: Path) -> dict[str, Any]:
    """As read_summary, with ValueError in place of UserError."""
    file = artifact / SUMMARY
    try:
        summary = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is torn, or the run is writing it just now") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{file} is not a run's summary")
    signature = summary.pop("summary_sha256", None)
    if signature is not None and signature != sha256_of(summary):
        raise ValueError(f"{file} is not what was written (SHA-256 differs)")
    check_files(artifact, summary)
    return summary


def check_files(artifact: Path, summary: dict[str, Any]) -> None:
    """Raise ValueError, naming the file, if one is not as the summary says."""
    sizes, hashes = summary.get("files", {}), summary.get("sha256", {})
    if not isinstance(sizes, dict) or not isinstance(hashes, dict):
        raise ValueError(f"{artifact / SUMMARY} is not a run's summary")
    for name, size in sizes.items():
        file = artifact / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, not {size}")
    if sizes and not hashes:
        print(f"{artifact} is of a version that wrote no hashes: only the sizes are compared")
    # In threads, since complete weights are up to 240 GB, and Python hashes without its lock.
    with ThreadPoolExecutor() as threads:
        files = [artifact / name for name in hashes]
        problems = threads.map(hash_problem, files, map(str, files), hashes.values())
        for problem in filter(None, problems):
            raise ValueError(problem)
