"""The command lines of the scripts: `--help` at once, and a mistake in one line.

torch, transformers and trl take eight seconds to import, so each script parses its flags before it
imports them. train.py cannot: most of its flags are declared in TRL's dataclasses. Its `--help`
reads the sources of those instead.
"""

import argparse
import ast
import difflib
import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

# The parser of transformers without an import of it, which takes a second (transformers#44273; in
# trl 1.16.0). Import it from transformers when that one is fixed.
from trl.scripts._hf_argparser import HfArgumentParser


def one_line(message: str, known: list[str]) -> str:
    """argparse's message without the usage, and what an unknown flag was probably meant to be."""
    unknown = "unrecognized arguments: "
    if not message.startswith(unknown):
        # Of "argument --max_steps/--max-steps: ..." one spelling is enough.
        return re.sub(r"^argument (--\w+)\S*:", r"\1:", message)
    words = message.removeprefix(unknown).split()
    flags = [word.split("=")[0] for word in words if word.startswith("--")] or words[:1]
    similar = difflib.get_close_matches(flags[0], known, n=1)
    return f"there is no flag {flags[0]}" + (f"; did you mean {similar[0]}?" if similar else "")


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """A script's docstring as it is written, and each flag's default behind its help."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required:
            return f"{action.help} (required)" if action.option_strings else action.help
        return super()._get_help_string(action)


class CommandLine(HfArgumentParser):
    """The flags of a small tool, declared as dataclasses; a mistake is one line.

    A script parses them before it imports what takes seconds: see preview.py.
    """

    def __init__(self, *dataclass_types: Any, description: str | None) -> None:
        super().__init__(dataclass_types, description=description, formatter_class=Formatter)

    def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The dataclasses and, where there are other arguments, the namespace that holds them."""
        kwargs["return_remaining_strings"] = True  # else the parent raises ValueError for them
        *parsed, unknown = super().parse_args_into_dataclasses(*args, **kwargs)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return tuple(parsed)

    def error(self, message: str) -> NoReturn:
        print("error:", one_line(message, list(self._option_string_actions)), file=sys.stderr)
        sys.exit(2)


@dataclass(frozen=True)
class FlagGroup:
    """Where a group of train.py's flags is declared: a dataclass in a file of a package."""

    title: str
    package: str
    file: str
    class_name: str


TRAINING_FLAGS = (
    FlagGroup("saving and resuming", "finetune", "arguments.py", "RunArguments"),
    FlagGroup("data and loss", "finetune", "data/options.py", "DataArguments"),
    FlagGroup("dataset (TRL's ScriptArguments)", "trl", "scripts/utils.py", "ScriptArguments"),
    FlagGroup("model, LoRA (TRL's ModelConfig)", "trl", "trainer/model_config.py", "ModelConfig"),
    FlagGroup("training (TRL's SFTConfig)", "trl", "trainer/sft_config.py", "SFTConfig"),
    FlagGroup("training (TRL's defaults)", "trl", "trainer/base_config.py", "_BaseConfig"),
    FlagGroup(
        "training (transformers' TrainingArguments)",
        "transformers",
        "training_args.py",
        "TrainingArguments",
    ),
)


def answer_help(description: str) -> None:
    """Print the flags of train.py and exit, if `--help` is asked for; else return."""
    if not {"-h", "--help"} & set(sys.argv[1:]):
        return
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s FLAGS",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shown: set[str] = set()
    for group in TRAINING_FLAGS:
        section = parser.add_argument_group(group.title)
        for name, default, text in declared_flags(group):
            if name not in shown:  # a subclass, listed before its parent, gives another default
                shown.add(name)
                said = f"{text.replace('%', '%%')} (default: {default.replace('%', '%%')})"
                section.add_argument(f"--{name}", metavar="", help=said)
    parser.print_help()
    sys.exit(0)


def declared_flags(group: FlagGroup) -> list[tuple[str, str, str]]:
    """(name, default as it is written, help) of each field of a dataclass, read from its source."""
    spec = find_spec(group.package)
    assert spec is not None and spec.submodule_search_locations
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / group.file).read_text())
    (declaration,) = (
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == group.class_name
    )
    flags = []
    for statement in declaration.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        default, text = "required", ""
        if isinstance(statement.value, ast.Call):  # field(default=..., metadata={"help": ...})
            for keyword in statement.value.keywords:
                if keyword.arg == "metadata":
                    text = help_of(keyword.value)
                elif keyword.arg in ("default", "default_factory"):
                    default = ast.unparse(keyword.value)
        elif statement.value is not None:
            default = ast.unparse(statement.value)
        flags.append((statement.target.id, default, text))
    return flags


def help_of(metadata: ast.expr) -> str:
    """The text under "help" in a field's metadata; "" where it is not written as a literal."""
    assert isinstance(metadata, ast.Dict)
    for key, value in zip(metadata.keys, metadata.values, strict=True):
        if isinstance(key, ast.Constant) and key.value == "help":
            try:
                return str(ast.literal_eval(value))
            except ValueError:
                return ""
    return ""
