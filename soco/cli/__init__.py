"""The command line: what ``soco`` does when it is called in a shell."""

from soco.cli.app import main as main
