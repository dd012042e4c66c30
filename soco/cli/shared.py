"""Commands that several processes work on: one of them speaks."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

import typer

from soco.cli.messages import FAILED, INTERRUPTED
from soco.processes import first_to, number, together


@contextmanager
def one_voice() -> Iterator[None]:
    """Inside, the processes of a launcher work together (``soco.together``), and the first speaks.

    Where one fails, that one speaks: the others end without a word, because they lost it. Ctrl-C,
    which reaches all of them, is told once as well.
    """
    with together():
        try:
            with ExitStack() as silent:
                if number() > 0:
                    nowhere = silent.enter_context(open(os.devnull, "w", encoding="utf-8"))
                    silent.enter_context(redirect_stdout(nowhere))
                    silent.enter_context(redirect_stderr(nowhere))
                yield
        except (Exception, KeyboardInterrupt) as error:
            if first_to("fail"):
                raise
            stopped = isinstance(error, KeyboardInterrupt)
            raise typer.Exit(INTERRUPTED if stopped else FAILED) from None
