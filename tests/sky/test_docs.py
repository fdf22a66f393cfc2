"""The `sky` commands that the documentation shows: subcommands and options exist.

Options are parsed by SkyPilot's own command line; nothing is run, and no server is started.
"""

import click
import pytest
from sky.client.cli import command as sky_command

from helpers.markdown import DOCS, YAML_FILES, commands, shell_text


def shown() -> list[list[str]]:
    """Every sky command in the docs and in the headers of YAML files, each once."""
    found = [words for file in [*DOCS, *YAML_FILES] for words in commands(shell_text(file))]
    return [list(words) for words in sorted({tuple(w) for w in found if w[0] == "sky"})]


def test_there_are_sky_commands() -> None:
    assert {"launch", "jobs", "logs", "down"} <= {words[1] for words in shown()}


@pytest.mark.parametrize("words", shown(), ids=lambda words: " ".join(words)[:60])
def test_a_sky_command_has_options_that_exist(words: list[str]) -> None:
    command: click.Command = sky_command.cli
    context = click.Context(command, info_name="sky")
    rest = words[1:]
    while isinstance(command, click.Group) and rest:
        found = command.get_command(context, rest[0])
        assert found is not None, f"there is no sky {rest[0]}"
        command, rest = found, rest[1:]
        context = click.Context(command, parent=context, info_name=command.name)
    command.make_parser(context).parse_args(rest)  # raises click.UsageError
