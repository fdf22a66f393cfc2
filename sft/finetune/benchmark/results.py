"""The results of bench.py: how a path's is named, how it reaches the parent, how it is shown."""

import json
import signal
from pathlib import Path
from typing import Any

ARGUMENTS, RESULT = "arguments.json", "result.json"  # in the folder of a path's own process
# Seconds of a step, in the order of the table.
TIMES = ("seconds_per_step", "attention", "experts", "loss", "optimizer", "saving")


def label(path: str, *num_layers: int | None) -> str:
    return f"{path}, {num_layers[0]}-layer slice" if num_layers and num_layers[0] else path


def read_report(folder: Path, *, name: str, status: int) -> dict[str, Any]:
    """What a path's process has left in its folder: device, torch's version and its result.

    status: how the process ended. One that was killed has left what it had measured until then.
    """
    try:
        report = json.loads((folder / RESULT).read_text())
    except OSError:  # it ended before it could write anything
        report = {"device": None, "torch": None, "result": {"path": name}}
    if status != 0:
        report["result"]["failed"] = "; ".join(failures(report["result"], status=status))
    return report


def failures(result: dict[str, Any], *, status: int) -> list[str]:
    """What a path lacks whose process has ended with an error: parts, and how the process ended."""
    named = [result["failed"]] if "failed" in result else []
    if "tokens_per_sec" in result:
        missing = [name for name in TIMES if result[name] is None]
        named += [f"{name}: not measured" for name in missing if f"{name}:" not in "".join(named)]
    ended = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
    return [*named, f"its process ended: {ended}"]


def table(results: list[dict[str, Any]]) -> str:
    """The results as a table in Markdown, a column a path."""
    lines = ["| | " + " | ".join(result["path"] for result in results) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    names = dict.fromkeys(name for result in results for name in result if name != "path")
    for name in names:
        values = ["-" if r.get(name) is None else str(r[name]) for r in results]
        cells = [value.replace("|", "\\|") for value in values]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    first = results[0]
    for name in ("tokens_per_sec", "peak_memory_gib"):
        ratios = [
            f"{first[name] / r[name]:.2f}" if first.get(name) and r.get(name) else "-"
            for r in results
        ]
        shown = f"{first['path']}'s {name.replace('_', ' ')} : its own"
        lines.append(f"| {shown} | {' | '.join(ratios)} |")
    return "\n".join(lines)
