"""What the documentation names exists, its commands parse, and pasted output is what is printed.

`sky` commands are checked by tests/sky/test_docs.py, in the environment that holds SkyPilot.
"""

import argparse
import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from finetune.arguments import training_parser
from finetune.benchmark.options import BenchArguments
from finetune.command_line import CommandLine
from helpers.markdown import (
    DOCS,
    YAML_FILES,
    anchors,
    blocks,
    commands,
    header,
    links,
    prose,
    shell_text,
    spans,
)
from helpers.paths import CPU_ENVS, REPO, TASK_FILES

FILES = [*DOCS, *YAML_FILES]
README = REPO / "README.md"
EARLIER_RUN = REPO / "tests/runs/earlier_run"
# What a reader has or will have, and this repository has not.
PLACEHOLDERS = {"sft/my.jsonl", "sft/my-data", "sft/my-data/*.jsonl", "sft/data.py"}
PATH = re.compile(r"/?(?:sft|tests|docs|finetune)/[\w./*-]+|[\w-]+\.(?:yaml|md|toml|lock)|Makefile")
SCRIPT = re.compile(r"/?sft/(\w+)\.py")
# The flags in prose that are those of other programs than ours.
OTHER_FLAGS = {
    *("--env", "--secret", "--secret-file", "--gpus", "--infra", "--down", "--graceful"),
    *("--use-spot", "--memory", "--tag", "--config_file", "--num_processes", "--help"),
    *("--graceful-timeout", "--dir-cache-time", "--network-tier"),
}

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
each_page = pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)


def ids(values: list[str]) -> list[str]:
    """Short names of parametrised tests."""
    return [value[:60] for value in values]


@each_page
def test_links_resolve(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@each_file
def test_named_paths_exist(file: Path) -> None:
    words = [word for command in commands(shell_text(file)) for word in command]
    words += spans(file) if file.suffix == ".md" else header(file).replace(":", " ").split()
    words = [word.rstrip(".,;)") for word in words]
    named = {word.removeprefix("/") for word in words if PATH.fullmatch(word)}
    for path in sorted(named - PLACEHOLDERS):
        folders = ("", "sft/", "docs/") if file.suffix == ".md" else ("",)
        assert any(list(REPO.glob(folder + path)) for folder in folders), path


@each_file
def test_make_targets_and_variables_exist(file: Path) -> None:
    makefile = (REPO / "Makefile").read_text()
    for command in commands(shell_text(file)):
        if command[0] != "make":
            continue
        for word in command[1:]:
            name, equals, _ = word.partition("=")
            pattern = rf"\b{name}\b" if equals else rf"^{re.escape(name)}:"
            assert re.search(pattern, makefile, re.MULTILINE), command


@each_page
def test_shell_blocks_parse(page: Path) -> None:
    for block in blocks(page, "bash", "sh"):
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


@each_page
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block.text)


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser of one of the scripts in sft/."""
    if script in ("train", "preflight"):
        return training_parser()
    if script == "bench":  # it parses twice, since --tiny changes defaults
        return CommandLine(BenchArguments, description=None)
    parser = importlib.import_module(script).command_line()
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


@each_file
def test_our_scripts_accept_their_flags(file: Path) -> None:
    for command in commands(shell_text(file)):
        for position, word in enumerate(command):
            script = SCRIPT.fullmatch(word)
            flags = command[position + 1 :]
            if script and flags and flags != ["--help"]:
                parser_of(script[1]).parse_args(flags)  # a mistake exits, or raises UserError


@each_file
def test_train_args_are_flags_of_the_training_script(file: Path) -> None:
    values = re.findall(r'TRAIN_ARGS="([^"]*)"', file.read_text())
    if file in TASK_FILES:
        values += re.findall(r'TRAIN_ARGS: .*?"(--[^"]*)"', file.read_text())
    for value in values:
        training_parser().parse_args(shlex.split(value))


@cache
def our_flags() -> set[str]:
    """Every flag of the training script, the tools and the rehearsal."""
    scripts = sorted(path.stem for path in (REPO / "sft").glob("*.py"))
    parsers = [parser_of(script) for script in scripts]
    return {flag for parser in parsers for flag in parser._option_string_actions} | {"--dataset"}


@each_page
def test_flags_in_prose_exist(page: Path) -> None:
    for span in spans(page):
        if span.startswith("--"):
            flag = re.split(r"[ =]", span)[0]
            is_prefix = flag.endswith("...")
            assert is_prefix or flag in our_flags() | OTHER_FLAGS, span


@each_file
def test_envs_and_secrets_on_a_command_line_are_those_of_the_file(file: Path) -> None:
    for command in commands(shell_text(file)):
        tasks = [REPO / word for word in command if word.endswith(".yaml")]
        tasks = [path for path in tasks if path.name != "no-bucket.yaml"]  # a reader's own copy
        if command[0] != "sky" or not tasks:
            continue
        task = yaml.safe_load(tasks[0].read_text())
        for option, value in zip(command, command[1:], strict=False):
            if option == "--env":
                assert value.split("=")[0] in task["envs"], command
            if option == "--secret":
                assert value.split("=")[0] in task["secrets"], command


def test_every_recipe_is_in_the_table_of_the_readme() -> None:
    for task_file in TASK_FILES:
        assert f"[{task_file.name}]({task_file.name})" in README.read_text()


def test_every_page_is_linked_from_the_readme() -> None:
    for page in (REPO / "docs").glob("*.md"):
        assert f"docs/{page.name}" in links(README), page.name


def test_the_architecture_names_code_that_exists() -> None:
    """Each row of its tables that says `names` in `file`."""
    text = (REPO / "docs/architecture.md").read_text()
    rows = re.findall(r"\| ((?:`[\w.]+`(?:, )?)+) in `([\w/.]+)` \|", text)
    assert len(rows) > 40
    for names, file in rows:
        code = (REPO / file).read_text()
        for name in re.findall(r"[\w.]+", names):
            for part in name.split("."):
                assert re.search(rf"^ *(?:def|class) {part}\b", code, re.M), f"{part} in {file}"


def pasted_outputs() -> list[tuple[str, str]]:
    """(command, output) where a page shows one of these tools and, next, what it prints."""
    found = []
    for page in DOCS:
        shown = blocks(page)
        for block, following in zip(shown, shown[1:], strict=False):
            words = block.text.split()
            is_tool = "sft/roofline.py" in words or "sft/memory.py" in words
            if is_tool and following.language == "text" and len(commands(block.text)) == 1:
                found.append((" ".join(commands(block.text)[0]), following.text))
    return found


@cache
def printed_by(command: str) -> str:
    """What a tool prints. Two pages may show the same command: it runs once."""
    # COLUMNS would change the width of tables, TRAIN_ARGS the flags of the recipe.
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "TRAIN_ARGS")}
    result = subprocess.run(
        [sys.executable, *command.split()[1:]],
        cwd=REPO,
        env=environment | CPU_ENVS,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


def stripped(output: str) -> list[str]:
    """The lines without the spaces at their ends."""
    return [line.rstrip() for line in output.rstrip().splitlines()]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "pasted"), pasted_outputs(), ids=ids([command for command, _ in pasted_outputs()])
)
def test_pasted_output_is_what_the_tool_prints(command: str, pasted: str) -> None:
    assert stripped(pasted) == stripped(printed_by(command))


def message_texts() -> list[str]:
    """Every text in the source of sft/, what is filled in as three dots."""
    texts = []
    for path in (REPO / "sft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "..." for part in node.values
                ]
                texts.append("".join(map(str, parts)))
    return texts


def messages_of(page: Path) -> list[str]:
    """The first column of the tables that say what a run prints, those of other programs left out.

    Of them, some text stands behind the message, before the end of the column.
    """
    tables = re.findall(r"^\| it prints .*\n(?:\|.*\n)*", prose(page), re.MULTILINE)
    rows = re.findall(r"^\| `([^`]+)` \|", "".join(tables), re.MULTILINE)
    return [row for row in rows if row != "CUDA out of memory"]


def test_messages_in_tables_are_those_of_the_code() -> None:
    texts = [" ".join(text.split()) for text in message_texts()]
    messages = messages_of(REPO / "docs/troubleshooting.md") + messages_of(README)
    assert len(messages) >= 20
    for message in messages:
        fragments = [
            part.strip() for part in re.sub("^error: (flags: )?", "", message).split("...")
        ]
        for fragment in filter(None, fragments):
            assert any(fragment in text for text in texts), (message, fragment)


@pytest.mark.slow
def test_python_of_the_readme_loads_an_adapter_and_answers() -> None:
    (block,) = blocks(README, "python")
    code = block.text.replace("openai/gpt-oss-20b", str(EARLIER_RUN / "model"))
    code = code.replace("./final", str(EARLIER_RUN / "finished/final")).replace("=200", "=2")
    subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=os.environ | CPU_ENVS, check=True, timeout=300
    )
