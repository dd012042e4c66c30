"""What the programs have in common: every mistake of a user is one sentence and an exit code."""

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from soco.cli.messages import FAILED, in_one_line, say

# A command line that makes no sense. Newer typer has its own copy of click, older ones import it.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class Commands(TyperGroup):
    """All commands of a program: whatever goes wrong in one of them is said in one line.

    Unless the program has an option ``--debug`` and it is given.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        if ctx.params.get("debug", False):
            return super().invoke(ctx)
        with in_one_line():
            return super().invoke(ctx)


def run_program(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a program.

    Args:
        app: its commands, of class ``Commands``.
        name: as it is called in the shell.
        arguments: what stands after the name; None: what the shell gave.

    Returns:
        The exit code: 0, 2 for what the user can put right, 130 for Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = typer.main.get_command(app).main(given, name, standalone_mode=False)
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        command = name if context is None else context.command_path
        text = " ".join(error.format_message().split())  # type: ignore[attr-defined]
        text = text.replace("Value error, ", "").rstrip(".")
        say(f"error: {text}. `{command} --help` lists the options.")
        return FAILED
    return code if isinstance(code, int) else 0
