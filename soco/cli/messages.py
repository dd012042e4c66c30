"""What reaches the user besides results: errors, warnings and progress, each in one line."""

import contextlib
import sys
import warnings
from collections.abc import Iterator

import typer
from rich.console import Console

FAILED = 2  # exit code of everything that the user can put right
INTERRUPTED = 130  # and of Ctrl-C, as shells have it

# What the user can put right: an argument, a file, a package that is missing. Their texts are one
# sentence where they are ours. Anything else is a mistake of ours and deserves its traceback.
USER_ERRORS = (ValueError, OSError, ImportError)

# Warnings for developers of the libraries, not for who uses them.
_FOR_DEVELOPERS = (
    DeprecationWarning,
    FutureWarning,
    ImportWarning,
    PendingDeprecationWarning,
    ResourceWarning,
    SyntaxWarning,
)


def say(text: str) -> None:
    """One line on stderr."""
    print(f"soco: {text}", file=sys.stderr, flush=True)


def shows_bars(quiet: bool) -> bool:
    """Whether someone looks who wants to see progress."""
    return not quiet and sys.stderr.isatty()


def console() -> Console:
    """Where results go: as they are, without guesses at what to highlight or where to break."""
    return Console(highlight=False, soft_wrap=True, emoji=False)


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Inside, errors that the user can put right, warnings and Ctrl-C become one line on stderr.

    Raises:
        typer.Exit: with the exit code, after the line was written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for category in _FOR_DEVELOPERS:
            warnings.simplefilter("ignore", category)
        warnings.showwarning = _show_warning
        try:
            yield
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise  # whoever read our output has seen enough: typer ends quietly
        except USER_ERRORS as error:
            say(f"error: {sentence(error)}")
            raise typer.Exit(FAILED) from None


def sentence(error: BaseException) -> str:
    r"""What an error says, in one line: of a foreign one that takes many, the first.

    >>> sentence(ValueError("no such thing\n\nTry another one."))
    'no such thing'
    >>> sentence(FileNotFoundError(2, "No such file or directory", "a.txt"))
    'a.txt: no such file or directory'
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


@contextlib.contextmanager
def quiet_libraries(bars: bool) -> Iterator[None]:
    """Inside, the Hugging Face libraries are silent, but for the bars of downloads.

    Their errors arrive as exceptions all the same, and what their warnings would tell (weights that
    are missing, say) is checked where a model is loaded.

    Args:
        bars: whether to show the bars of downloads.
    """
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    verbosities = logging.get_verbosity(), hub.get_verbosity()
    had_bars, had_hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    logging.disable_progress_bar()  # the hub's, too
    if bars:
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosities[0])
        hub.set_verbosity(verbosities[1])
        if had_bars:
            logging.enable_progress_bar()
        (enable_progress_bars if had_hub_bars else disable_progress_bars)()


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    say(f"warning: {' '.join(str(message).split())}")
