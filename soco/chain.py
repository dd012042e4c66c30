"""The blocks of a stored model, run one at a time, forward and backward, each on files."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from soco.calibration import (
    OF_GRADIENTS,
    Run,
    Statistics,
    collect,
    label_seeds,
    sampled_batches,
    uncalled,
)
from soco.objectives import objective_for, run_model
from soco.processes import own
from soco.sequential import EnoughError, standing_in
from soco.steps import frozen
from soco.stored import StoredModel
from soco.surgery import block_paths, transformer_blocks
from soco.workfolder import WorkFolder


class Chain:
    """Transformer blocks of which each reads what the one before it puts out, and nothing else.

    Inside, once a block has run, what lies outside of all blocks (embeddings) is in memory.

    Attributes:
        blocks: in their order.
        paths: their names in the model.
    """

    def __init__(
        self,
        stored: StoredModel,
        work: WorkFolder,
        windows: Tensor | None,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Nothing is read or run yet.

        Args:
            stored: the model.
            work: where outputs are kept.
            windows: token ids (sequences, length), on the CPU; None: no block is going to run.
            batch_size: sequences at a time.
            dtype: to compute in.
            device: to compute on.
        """
        self._stored, self._work, self._dtype, self._device = stored, work, dtype, device
        self._windows = torch.empty(0, 0, dtype=torch.long) if windows is None else windows
        self._batch_size = batch_size
        self._base: nn.Module = getattr(stored.model, "base_model", stored.model)
        self._outside = ExitStack()
        self._begun = False
        self.blocks = transformer_blocks(stored.model)
        self.paths = block_paths(stored.model)

    def __enter__(self) -> "Chain":
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """What was in memory is so no longer."""
        self._outside.close()

    def statistics(
        self, number: int, layers: Mapping[str, nn.Module], kinds: Collection[str], *, last: bool
    ) -> dict[str, Statistics]:
        """What layers of a block see; what the block puts out is kept for the next one.

        Args:
            number: of the block; the one before it has run, or is told to have by its files.
            layers: name to module, of the block.
            kinds: of statistics, as in ``calibration.collect``; none of gradients.
            last: no other block is going to run.

        Raises:
            ValueError: the model is no chain of blocks, a layer is never called, or numbers are not
                finite.
        """

        def step(batch: int, ids: Tensor) -> None:
            output = self._run(number, ids, self._given(number, batch))
            if not last:
                self._work.put_any(_hidden(number + 1, batch), output)

        return self._collected(number, layers, kinds, step)

    def pass_on(self, number: int) -> None:
        """Run a block on all batches and keep what it puts out, for the next one and for ``back``.

        Raises:
            ValueError: the model is no chain of blocks.
        """
        batches = self._windows.split(self._batch_size)
        with self._loaded(number, {}), torch.no_grad():
            for batch in own(len(batches)):
                ids = batches[batch].to(self._device)
                output = self._run(number, ids, self._given(number, batch))
                self._work.put_any(_hidden(number + 1, batch), output)

    def turn(self, seed: int, kinds: Collection[str]) -> None:
        """Begin the way back: gradients of labels by what the last block puts out.

        Args:
            seed: of the labels, as in ``calibration.collect``.
            kinds: of statistics that will be asked for on the way.
        """
        self._begin()
        model, last = self._stored.model, len(self.blocks)
        of_base = set(self._outside_names())
        head = [n for n in self._outside_names(whole=True) if n not in of_base]
        batches = self._windows.split(self._batch_size)
        seeds = label_seeds(len(self._windows), seed).split(self._batch_size)
        sampled = set(kinds) & OF_GRADIENTS == {"sampled_grad_gram"}
        with self._stored.in_memory(head, self._dtype, self._device), frozen(model):
            with standing_in(self.blocks, self._given(last, 0), self._device):
                objective = objective_for(model, batches[0].to(self._device))
            for batch in own(sampled_batches(len(batches)) if sampled else len(batches)):
                given = _leaves(self._given(last, batch), self._device)
                with standing_in(self.blocks, given, self._device), torch.enable_grad():
                    outputs = objective.outputs(model, batches[batch].to(self._device))
                    objective.surprise(outputs.detach(), outputs, seeds[batch]).backward()
                self._work.put_any(_pull(last, batch), _gradients(given))

    def back(
        self, number: int, layers: Mapping[str, nn.Module], kinds: Collection[str]
    ) -> dict[str, Statistics]:
        """The same with gradients; the block behind this one has been back, or ``turn`` has run."""

        def step(batch: int, ids: Tensor) -> None:
            given = self._given(number, batch)
            if not torch.is_grad_enabled():
                self._run(number, ids, given)
                return
            given = _leaves(given, self._device)
            output = self._run(number, ids, given)
            pulls = zip(_floats(output), self._pulls(number + 1, batch), strict=True)
            reached = [(x, pull) for x, pull in pulls if x.requires_grad and pull is not None]
            torch.autograd.backward([x for x, _ in reached], [pull for _, pull in reached])
            if number:
                self._work.put_any(_pull(number, batch), _gradients(given))

        return self._collected(number, layers, kinds, step)

    def _collected(
        self, number: int, layers: Mapping[str, nn.Module], kinds: Collection[str], step: Run
    ) -> dict[str, Statistics]:
        """The statistics of a block's layers, each batch run by ``step``."""
        with self._loaded(number, layers):
            return collect(
                self.blocks[number], layers, self._windows, self._batch_size, kinds=kinds, run=step
            )

    @contextmanager
    def _loaded(self, number: int, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, a block is in memory, and known to be of a chain and to call its layers."""
        self._begin()
        first = self._windows[: self._batch_size]
        block = self.blocks[number]
        with (
            self._stored.in_memory(self._inside(number), self._dtype, self._device),
            frozen(block),
        ):
            with torch.no_grad():
                self._check(number, first.to(self._device))
                left = uncalled(
                    self._stored.model, layers, first,
                    lambda batch, ids: self._run(number, ids, self._given(number, batch)),
                )  # fmt: skip
            if left:
                raise ValueError(
                    f"{left[0]} is never called, because its module reads the weight itself: "
                    f"leave it out (exclude)"
                )
            yield

    def forget(self, number: int) -> None:
        """What a block was given is not needed any more."""
        self._work.drop(_hidden(number, "*"))
        self._work.drop(_pull(number, "*"))

    def _begin(self) -> None:
        """Bring in what lies outside of the blocks, once."""
        if self._begun:
            return
        self._begun = True
        names = self._outside_names()
        self._outside.enter_context(self._stored.in_memory(names, self._dtype, self._device))
        for buffer in self._stored.model.buffers():
            buffer.data = buffer.to(self._device)

    def _outside_names(self, *, whole: bool = False) -> list[str]:
        """Parameters outside of all blocks, of the base model or of the whole one."""
        of_base = {id(parameter) for parameter in self._base.parameters()}
        return [
            name
            for name, parameter in self._stored.model.named_parameters()
            if (whole or id(parameter) in of_base)
            and not any(inside(name, path) for path in self.paths)
        ]

    def _inside(self, number: int) -> list[str]:
        names = (name for name, _ in self._stored.model.named_parameters())
        return [name for name in names if inside(name, self.paths[number])]

    def _given(self, number: int, batch: int) -> Any:
        """The outputs of the block before; None for the first one."""
        return self._work.get_any(_hidden(number, batch)) if number else None

    def _pulls(self, number: int, batch: int) -> list[Tensor | None]:
        """The gradients by what the block before puts out, one for each of its float tensors."""
        pulls = self._work.get_any(_pull(number, batch))
        return [None if pull is None else pull.to(self._device) for pull in pulls]

    def _run(self, number: int, ids: Tensor, given: Any) -> Any:
        """What a block puts out for a batch, given what the one before it put out."""
        outputs: list[Any] = []

        def keep(module: nn.Module, inputs: object, output: Any) -> None:
            outputs.append(output)
            raise EnoughError

        hook = self.blocks[number].register_forward_hook(keep)
        try:
            with standing_in(self.blocks[:number], given, self._device), suppress(EnoughError):
                run_model(self._base, ids)
        finally:
            hook.remove()
        if not outputs:
            raise self._no_chain(number, "is not called")
        return outputs[0]

    def _check(self, number: int, ids: Tensor) -> None:
        """Refuse blocks that run more than once, or read more than what the last one put out.

        Tried on the first batch: blocks before the last one give something else, and blocks behind
        this one only pass something on.
        """
        given = self._given(number, 0)
        expected = self._run(number, ids, given)
        before, last = self.blocks[: max(0, number - 1)], self.blocks[max(0, number - 1) : number]
        for other in (given, _changed(given)):
            calls: list[Any] = []
            hook = self.blocks[number].register_forward_hook(
                lambda module, inputs, output, calls=calls: calls.append(output)
            )
            try:
                with (
                    standing_in(before, other, self._device),
                    standing_in(last, given, self._device),
                    standing_in(self.blocks[number + 1 :], expected, self._device),
                ):
                    run_model(self._base, ids)
            finally:
                hook.remove()
            if len(calls) != 1 or not _equal(calls[0], expected):
                raise self._no_chain(
                    number, "runs more than once, or reads more than the block before it gives"
                )

    def _no_chain(self, number: int, why: str) -> ValueError:
        return ValueError(
            f"{type(self._stored.model).__name__} is no chain of blocks ({self.paths[number]} "
            f"{why}), and cannot be streamed"
        )


def inside(name: str, path: str) -> bool:
    """Whether a parameter or module lies in the module of that path."""
    return name.startswith(f"{path}.")


def _hidden(number: int, batch: int | str) -> str:
    """The file of what a block is given: the outputs of the one before it."""
    return f"hidden-{number}-{batch}.pt"


def _pull(number: int, batch: int | str) -> str:
    """The file of the gradients by what a block is given."""
    return f"pull-{number}-{batch}.pt"


def _floats(value: Any) -> list[Tensor]:
    """The tensors of floating point in tuples and lists."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [x for part in value for x in _floats(part)] if type(value) in (tuple, list) else []


def _leaves(value: Any, device: torch.device) -> Any:
    """The same tensors as leaves that gradients are taken by."""
    if isinstance(value, Tensor):
        value = value.to(device)
        return value.requires_grad_() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_leaves(part, device) for part in value)
    return value


def _gradients(given: Any) -> list[Tensor | None]:
    """The gradients by the leaves."""
    return [leaf.grad for leaf in _floats(given)]


def _changed(value: Any) -> Any:
    """The same tensors with other numbers in them."""
    if isinstance(value, Tensor):
        return value * 0 + 1 if value.is_floating_point() else value
    return type(value)(map(_changed, value)) if type(value) in (tuple, list) else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        same = isinstance(other, Tensor) and one.shape == other.shape
        return same and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    if type(one) in (tuple, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return True
