"""The commands, code blocks, code spans and links of the documentation.

Standard library only: tests/sky/test_docs.py imports it in an environment without torch.
"""

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
DOCS = [
    REPO / "README.md",
    REPO / "CONTRIBUTING.md",
    REPO / "CHANGELOG.md",
    *sorted((REPO / "docs").glob("*.md")),
]
YAML_FILES = [*sorted(REPO.glob("*.yaml")), *sorted((REPO / "sft").glob("*.yaml"))]

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADER = re.compile(r"(?:^#.*\n)+")
PROGRAMS = ("make ", "sky ", "aws ", "rsync ", "ssh ", "git ", "curl ", "export ", ".venv/", "~/")


@dataclass(frozen=True)
class Block:
    """A fenced block of code, without its indentation."""

    file: Path
    language: str
    text: str

    def __str__(self) -> str:
        """The file and the first words: what pytest shows for a failing test."""
        return f"{self.file.name}: {self.text.strip()[:40]}"


def blocks(file: Path, *languages: str) -> list[Block]:
    """The fenced blocks of these languages; all blocks if none is given."""
    found = [
        Block(file, language, textwrap.dedent(text))
        for _, language, text in FENCE.findall(file.read_text())
    ]
    return [block for block in found if not languages or block.language in languages]


def prose(file: Path) -> str:
    """The text outside fenced blocks."""
    return FENCE.sub("", file.read_text())


def spans(file: Path) -> list[str]:
    """The code between backticks in the prose, on one line each."""
    return [" ".join(span.split()) for span in SPAN.findall(prose(file))]


def links(file: Path) -> list[str]:
    """The targets of links and pictures that are not on the web."""
    return [target for target in LINK.findall(prose(file)) if "://" not in target]


def anchors(file: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def header(file: Path) -> str:
    """The comment at the beginning of a YAML file, without its hashes."""
    found = HEADER.match(file.read_text())
    return re.sub(r"^# ?", "", found[0], flags=re.MULTILINE) if found else ""


def shell_text(file: Path) -> str:
    """All shell commands that a file shows: its bash blocks, code spans and a YAML's header."""
    if file.suffix == ".yaml":
        lines = re.sub(r"\\\n", " ", header(file)).splitlines()
        shown = [line.partition(": ")[2] if ": .venv" in line else line for line in lines]
        shown = [re.sub(r"<[^>]*>", "x", line.strip()) for line in shown]
        return "\n".join(line for line in shown if line.startswith(PROGRAMS))
    inline = [re.sub(r"<[^>]*>", "x", span) for span in spans(file)]
    inline = [span for span in inline if span.startswith(PROGRAMS) and " " in span]
    return "\n".join([*(block.text for block in blocks(file, "bash")), *inline])


def commands(shell: str) -> list[list[str]]:
    """The words of each command, those inside `$( )` and of a command given as one word included.

    Assignments before a command are left out.
    """
    found: list[list[str]] = []
    for line in re.sub(r"\\\n", " ", shell).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();|&")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("();|&"):
                found += [words] if words else []
                words = []
            elif words or not re.fullmatch(r"\w+=.*", word):
                words.append(word)
                inner = re.findall(r"\$\(([^()]*)\)", word)
                if " " in word and word.startswith(("~/", ".venv/")):
                    inner.append(word)
                found += commands("\n".join(inner)) if inner else []
    return found
