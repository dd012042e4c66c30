"""What a long run keeps in its work folder: the state of a loop, and the name of its result."""

import shutil
import time
from collections import UserDict
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soco.folders import replaced
from soco.processes import count, gathered, number, told, wait
from soco.workfolder import WorkFolder

EVERY = 60.0  # seconds between two states
_TIMES = 10  # as long as it takes to write a state, at least, goes by before the next one
UNFINISHED = "unfinished.json"


@contextmanager
def result(work: WorkFolder, target: Path) -> Iterator[Path]:
    """``folders.replaced``, known to the work folder: ``clear`` deletes it if this is killed."""
    with replaced(target) as folder:
        work.put_json(UNFINISHED, folder.name)
        yield folder
    work.drop(UNFINISHED)


def clear(work: WorkFolder, target: Path) -> None:
    """Delete the half-written result of an earlier run."""
    if not work.has(UNFINISHED):
        return
    name = work.get_json(UNFINISHED)
    beside = target.resolve()
    ours = isinstance(name, str) and name.startswith(f".{beside.name}.")
    if ours and Path(name).name == name:
        shutil.rmtree(beside.parent / name, ignore_errors=True)
    work.drop(UNFINISHED)


class Filed(MutableMapping[int, Any]):
    """Tensors (or tuples and lists of them) by number, each in a file of the work folder.

    What an earlier run left is not known until it is named: a run that goes on from a moment has to
    know what was known at that moment, and no more. Several processes have files of their own.

    Args:
        work: the folder.
        name: of the files in it.
    """

    def __init__(self, work: WorkFolder, name: str) -> None:
        """Nothing is known yet."""
        self._work, self._name = work, name
        self._known: set[int] = set()

    def __getitem__(self, key: int) -> Any:
        """Read one.

        Raises:
            KeyError: it is not known.
            ValueError: its file is damaged.
        """
        if key not in self._known:
            raise KeyError(key)
        return self._work.get_any(self._file(key))

    def __setitem__(self, key: int, value: Any) -> None:
        """Write one."""
        self._work.put_any(self._file(key), value)
        self._known.add(key)

    def __delitem__(self, key: int) -> None:
        """Delete one."""
        self._known.remove(key)
        self._work.drop(self._file(key))

    def __iter__(self) -> Iterator[int]:
        """The numbers that are known."""
        return iter(sorted(self._known))

    def __len__(self) -> int:
        """How many are known."""
        return len(self._known)

    def know(self, key: int) -> None:
        """Name one that an earlier run wrote."""
        self._known.add(key)

    def know_all(self) -> "Filed":
        """Name all that an earlier run wrote, from 0 on without a gap; returns this."""
        key = 0
        while self._work.has(self._file(key)):
            self._known.add(key)
            key += 1
        return self

    def _file(self, key: int) -> str:
        return f"{self._name}-{key}-{number()}.pt"


class Notes(UserDict[str, Any]):
    """JSON data by name, in one file of a work folder; what an earlier run noted is there.

    Several processes note the same, and the first one writes.
    """

    def __init__(self, work: WorkFolder, file: str) -> None:
        """All processes at once.

        Raises:
            ValueError: the file is damaged.
        """
        self._work, self._file = None, file
        held = told(work.get_json(file) if work.has(file) else {})
        if not isinstance(held, dict):
            raise work.broken(file)
        super().__init__(held)
        self._work = work

    def __setitem__(self, key: str, item: Any) -> None:
        """Note something."""
        super().__setitem__(key, item)
        if self._work is not None and number() == 0:
            self._work.put_json(self._file, self.data)


class Keeper:
    """What a loop has to know to go on: one state, which is replaced, and parts, which add up.

    In several processes each keeps its own, all of the same moment.

    Args:
        work: the folder.
        name: of the loop in it.
        every: seconds between two states, or more where they are large; 0: always.
    """

    def __init__(self, work: WorkFolder, name: str, every: float | None = None) -> None:
        """Nothing is read yet."""
        self._work, self._name = work, name
        self._every = EVERY if every is None else every
        self._moment, self._parts = 0, 0
        self._since, self._took = time.monotonic(), 0.0

    def load(self) -> tuple[Any, list[Any]] | None:
        """The last state and all parts up to it; None if there is none.

        Raises:
            ValueError: a file is damaged; it is named.
        """
        marker = told(self._work.get_json(self._marker) if self._work.has(self._marker) else None)
        if marker is None:
            return None
        self._moment, self._parts = marker["moment"], marker["parts"]
        parts = [self._work.get_any(self._part(place)) for place in range(self._parts)]
        return self._work.get_any(self._state(self._moment)), parts

    def due(self) -> bool:
        """Whether it is time for another state; all processes get the same answer."""
        pause = max(self._every, _TIMES * self._took) if self._every else 0.0
        due = time.monotonic() - self._since >= pause
        return told(due) if count() > 1 else due

    def save(self, state: Any, part: Any) -> None:
        """Write a state: dictionaries, lists and tuples of tensors and plain values.

        Args:
            state: takes the place of the one before it.
            part: is added to the parts before it; nothing is written where it is empty.
        """
        begin = time.monotonic()
        grows = any(gathered(bool(part)))
        if grows:
            self._work.put_any(self._part(self._parts), part)
        self._work.put_any(self._state(self._moment + 1), state)
        wait()  # every process has written
        if number() == 0:
            marker = {"moment": self._moment + 1, "parts": self._parts + grows}
            self._work.put_json(self._marker, marker)
        wait()
        self._work.drop(self._state(self._moment))
        self._moment, self._parts = self._moment + 1, self._parts + grows
        self._since = time.monotonic()
        self._took = self._since - begin

    def forget(self) -> None:
        """Delete what is kept: it was for something that is done."""
        wait()  # for those who may still go on from it
        if number() == 0:
            self._work.drop(self._marker)
        for file in (self._state(self._moment), *map(self._part, range(self._parts))):
            self._work.drop(file)
        self._moment, self._parts = 0, 0

    @property
    def _marker(self) -> str:
        return f"{self._name}.json"

    def _state(self, moment: int) -> str:
        return f"{self._name}-{moment}-{number()}.pt"

    def _part(self, place: int) -> str:
        return f"{self._name}-part-{place}-{number()}.pt"


def moved(value: Any, device: torch.device) -> Any:
    """Tensors in dictionaries, lists and tuples on another device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(each, device) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(each, device) for each in value)
    return value
