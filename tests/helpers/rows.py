"""Rows of datasets that the tests of the data package share."""

import json
from pathlib import Path

USER = {"role": "user", "content": "2+2?"}
ASSISTANT = {"role": "assistant", "thinking": "Easy.", "content": "4"}
WITHOUT_THINKING = {"role": "assistant", "content": "4"}
ROW = {"messages": [USER, ASSISTANT]}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "4"}


def write_rows(path: Path, *rows: object) -> Path:
    """Write each row as a line of JSON."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
