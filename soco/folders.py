"""Writing a folder so that it is there as a whole or not at all."""

import contextlib
import ctypes
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

SPECTRUM = "soco_spectrum.safetensors"  # beside a model that can be resized
CHECKSUMS = "soco_checksums.json"  # of the files of a compressed model

_AT_FDCWD = -100  # Linux: paths are relative to the working directory
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A new empty folder beside ``target`` to write into, which takes its place at the end.

    Whatever goes wrong before that, ``target`` stays as it was, and the new folder is removed. At
    the end everything is on the disk before the names change. On Linux old and new change names in
    one step; elsewhere, and on file systems that cannot, there is a moment between two renames in
    which the old folder has the name of the new one with ``.old`` at its end.

    Files of the old folder that the new one does not have are moved over, except weights: what a
    user put there is not ours to delete.
    """
    target = target.resolve()  # through links: the folder is to be replaced, not a link to it
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    old = new.with_name(f"{new.name}.old")
    new.mkdir()
    try:
        yield new
        _flush(new)
        if not target.exists():
            new.rename(target)
        elif not _exchange(new, target):
            target.rename(old)
            try:
                new.rename(target)
            except BaseException:
                old.rename(target)
                raise
        else:
            new.rename(old)  # it has the old folder's files now
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    _sync(target.parent)
    if old.exists():
        carry_over(old, target, move=True)
        shutil.rmtree(old)


def carry_over(source: Path, target: Path, *, move: bool = False) -> None:
    """Bring along what lies in ``source`` and not in ``target``, but nothing of the weights."""
    for entry in sorted(source.iterdir()):
        weights = entry.name.startswith(
            ("model", "pytorch_model", "decomposition")
        ) and entry.name.endswith((".safetensors", ".bin", ".index.json"))
        if weights or entry.name in (SPECTRUM, CHECKSUMS) or (target / entry.name).exists():
            continue
        if move:
            entry.rename(target / entry.name)
        elif entry.is_dir():
            shutil.copytree(entry, target / entry.name)
        else:
            shutil.copy2(entry, target / entry.name)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of a model's config and safetensors files, by name."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name == "config.json" or path.suffix == ".safetensors":
            told = hashlib.sha256()
            with path.open("rb") as file:
                while part := file.read(2**20):
                    told.update(part)
            found[path.name] = f"sha256:{told.hexdigest()}"
    return found


def write_checksums(folder: Path) -> None:
    """Write them into the folder, for ``soco.verify``."""
    text = json.dumps(checksums(folder), indent=1) + "\n"
    (folder / CHECKSUMS).write_text(text, encoding="utf-8")


def _flush(folder: Path) -> None:
    """Wait until every file below ``folder`` is on the disk.

    Some libraries write files that only their owner can read: they get the usual permissions.
    """
    probe = folder / ".permissions"
    probe.touch()
    usual = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in (*folder.rglob("*"), folder):
        if path.is_file() and not path.is_symlink():
            path.chmod(usual)
        _sync(path)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # only POSIX opens folders
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step; False where that cannot be done."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    return rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0
