"""A folder in which a long run keeps what it has done, for the same command to go on from."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from soco.processes import number, wait

PLAN = "plan.json"  # what the run is of
STATISTICS = "statistics"  # a folder in it, of soco.archive
_LOCK = "lock"
# What torch.load raises for bytes that it did not write.
_UNREADABLE = (
    RuntimeError, EOFError, OSError, UnpicklingError, LookupError, ValueError, TypeError,
    AttributeError,
)  # fmt: skip


class WorkFolderError(ValueError):
    """A work folder is damaged, or of another run; it stays as it is."""


class WorkFolder:
    """Files that are there as a whole or not at all, and a plan that they belong to.

    Attributes:
        path: of the folder.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any] | None) -> None:
        """Prepared by ``opened``; without a plan it is taken as it is."""
        self.path = path
        if plan is None:
            return
        self._plan = json.loads(json.dumps(plan))
        if self.has(PLAN):
            self._compare()
        else:
            self.put_json(PLAN, self._plan)

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.path / name).is_file()

    def put_json(self, name: str, data: object) -> None:
        """Write a JSON file."""
        text = json.dumps(data, indent=1) + "\n"
        self._put(name, lambda path: path.write_text(text, encoding="utf-8"))

    def get_json(self, name: str) -> Any:
        """Read one."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise self.broken(name) from error

    def put_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file."""
        held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        self._put(name, lambda path: save_file(held, path))

    def get_tensors(self, name: str) -> dict[str, Tensor]:
        """Read one."""
        try:
            return load_file(self.path / name)
        except SafetensorError as error:
            raise self.broken(name) from error

    def put_any(self, name: str, value: Any) -> None:
        """Write tensors in tuples and lists, None among them."""
        self._put(name, lambda path: torch.save(value, path))

    def get_any(self, name: str) -> Any:
        """Read such a file."""
        try:
            return torch.load(self.path / name, weights_only=True, map_location="cpu")
        except _UNREADABLE as error:
            raise self.broken(name) from error

    def drop(self, pattern: str) -> None:
        """Delete the files that match a glob pattern."""
        for path in self.path.glob(pattern):
            path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete what is in the folder; what a user put into it stays."""
        shutil.rmtree(self.path / STATISTICS, ignore_errors=True)
        self.drop("*.json")
        self.drop("*.safetensors")
        self.drop("*.pt")
        self.drop_parts()

    def drop_parts(self) -> None:
        """Delete what a killed run had not finished: our files, and those of safetensors."""
        self.drop(".*.part")
        self.drop(".tmp*")

    def _put(self, name: str, write: Callable[[Path], object]) -> None:
        part = self.path / f".{name}.part"
        try:
            write(part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(self.path / name)
        except (OSError, SafetensorError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise OSError(
                f"{self.path / name} cannot be written ({reason}): make room, and give the same "
                f"command again, which goes on from here"
            ) from error

    def broken(self, name: str) -> WorkFolderError:
        """What is raised for a damaged file."""
        return WorkFolderError(
            f"{self.path / name} is damaged: delete the folder {self.path} to begin anew"
        )

    def _compare(self) -> None:
        """Refuse to go on with a run of something else.

        Raises:
            ValueError: the plans differ; the first difference is named.
        """
        held = self.get_json(PLAN)
        if not isinstance(held, dict):
            raise self.broken(PLAN)
        before, now = _flat(held), _flat(self._plan)
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                raise WorkFolderError(
                    f"{self.path} holds the beginning of another run: {key} is "
                    f"{_told(before.get(key))} there and {_told(now.get(key))} here; give the "
                    f"command as it was, another work folder, or delete this one"
                )


@contextmanager
def opened(path: Path, plan: Mapping[str, Any], *, keep: bool = False) -> Iterator[WorkFolder]:
    """A work folder for one run at a time, kept when the block is interrupted or the disk is full.

    The processes of a run (``soco.together``) share it. It is deleted when the block ends well, and
    on a ValueError: then the input is bad, and would be again.

    Args:
        path: new, empty, or of an earlier run.
        plan: all that the result depends on, as JSON data.
        keep: whether it stays when the block ends well (``discard`` deletes it).

    Raises:
        ValueError: another run works in it, it holds something else, or a run with another plan.
        OSError: it cannot be written.
    """
    if number() > 0:  # what follows is for the first of several processes
        wait()
        yield WorkFolder(path, plan)
        wait()
        return
    if path.is_dir() and not (path / PLAN).is_file():
        left = [
            entry.name for entry in path.iterdir() if entry.name not in (_LOCK, f".{PLAN}.part")
        ]
        if left:
            raise ValueError(f"{path} holds {left[0]} and is no work folder: choose another one")
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another run works in {path}: wait for it, or stop it") from None
    ended = False
    try:
        folder = WorkFolder(path, plan)
        folder.drop_parts()
        wait()
        try:
            yield folder
            ended = not keep
        except WorkFolderError:
            raise
        except ValueError:  # what this run is of cannot be done, now or later
            ended = True
            raise
        finally:
            if ended:
                folder.discard()
    finally:
        lock.release()
        if ended:
            _remove(path)
    wait()


def work_folder(output: Path, work: str | PathLike[str] | None) -> Path:
    """Where a run keeps what is done: where it was told to, else beside its output.

    Raises:
        ValueError: that is the output.
    """
    beside = output.resolve()
    place = Path(work) if work is not None else beside.with_name(f"{beside.name}.work")
    if place.resolve() == beside:
        raise ValueError(f"{place} is the output: choose another work folder")
    return place


def discard(path: Path) -> None:
    """Delete a work folder that is not used any more; what a user put into it stays."""
    if (path / PLAN).is_file():
        WorkFolder(path, None).discard()
        _remove(path)


def _remove(path: Path) -> None:
    """Delete an empty work folder."""
    (path / _LOCK).unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, their keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _told(value: object) -> str:
    text = "not given" if value is None else json.dumps(value)
    return text if len(text) < 100 else f"{text[:97]}..."
