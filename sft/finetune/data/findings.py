"""What reading a row has found: problems that refuse it, and what a user should know of it."""

from dataclasses import dataclass, field


@dataclass
class Findings:
    """problems: why the row is refused. The others are for rows that are used.

    notes: what was read otherwise than it stands there, in the words by which rows are counted.
    warnings: what was left as it stands, although it looks like the markup of another format.
    unread: the keys that mean nothing to us, for example "messages[].id".
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
