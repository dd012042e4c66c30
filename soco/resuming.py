"""A compression in memory that goes on from where an earlier one stopped."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from soco.archive import fingerprint, hash_of_data
from soco.diagnosis import versions
from soco.keeping import Filed, Keeper
from soco.preparation import calibration_source
from soco.processes import count, number, wait
from soco.workbench import Workbench
from soco.workfolder import STATISTICS, WorkFolder, WorkFolderError, opened

FORMAT = 1  # of the work folder
OWN_TEXT, TEXT = "own-text.safetensors", "text.json"


@contextmanager
def resumable(
    work: str | PathLike[str] | None, model: nn.Module, plan: Mapping[str, Any]
) -> Iterator[WorkFolder | None]:
    """The work folder of a compression, which stays when that is done; None: there is none.

    Args:
        work: the folder, new or of an earlier run of the same compression; None: none.
        model: the dense model.
        plan: what else the result depends on, as JSON data.

    Raises:
        ValueError: as of ``workfolder.opened``.
    """
    if work is None:
        yield None
        return
    parameter = next(model.parameters())
    whole = {
        "format": FORMAT,
        "model": fingerprint(model),
        **plan,
        "dtype": str(parameter.dtype),
        "device": parameter.device.type,
        "processes": count(),
        "versions": versions(),
    }
    with opened(Path(work), whole, keep=True) as folder:
        yield folder


def patterns(given: str | Iterable[str] | None) -> list[str] | None:
    """Glob patterns as JSON data."""
    return [given] if isinstance(given, str) else None if given is None else list(given)


def drafts(work: WorkFolder | None) -> Filed | None:
    """The batches of such a text, while it is written."""
    return None if work is None else Filed(work, "own-text").know_all()


def own_text(work: WorkFolder | None) -> Tensor | None:
    """Token ids (sequences, length) that the model wrote for its calibration in an earlier run."""
    if work is None or not work.has(OWN_TEXT):
        return None
    return work.get_tensors(OWN_TEXT)["ids"]


def going_on(
    bench: Workbench, work: WorkFolder | None, own: Tensor | None, *, writes: bool
) -> None:
    """Let a workbench keep what it makes, and find what an earlier run made.

    Args:
        bench: just prepared.
        work: where; None: nowhere.
        own: text that the model wrote in an earlier run: the calibration.
        writes: whether the model writes its calibration.

    Raises:
        ValueError: the calibration is another one than in the earlier run.
    """
    if work is None:
        return
    if own is not None:
        bench.windows = own
        bench.source = calibration_source("self", own, bench.seed)
    bench.work = work
    if bench.directory is None:
        bench.directory = work.path / STATISTICS
    if bench.windows is None:
        return
    if number() == 0 and writes and own is None:
        work.put_tensors(OWN_TEXT, {"ids": bench.windows})
        forget_drafts(work)
    digest = hash_of_data(bench.windows, bench.batch_size)
    if work.has(TEXT) and work.get_json(TEXT) != digest:
        raise WorkFolderError(
            f"{work.path} holds the beginning of a run on another calibration text: give that one, "
            f"another work folder, or delete this one"
        )
    wait()
    if number() == 0 and not work.has(TEXT):
        work.put_json(TEXT, digest)


def forget_drafts(work: WorkFolder) -> None:
    """Delete them: the text is there as a whole."""
    Filed(work, "own-text").know_all().clear()


def keeper(work: WorkFolder | None, name: str) -> Keeper | None:
    """What keeps the state of a training, if there is a work folder."""
    return None if work is None else Keeper(work, name)
