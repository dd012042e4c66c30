"""Matrices of transformer blocks on loan from files: in memory while their block runs."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from soco.memory import give_back_memory
from soco.modules import LowRankLinear
from soco.spectral import Components, SpectralLinear
from soco.steps import frozen, with_forwards
from soco.stored import StoredModel
from soco.surgery import block_paths, layout_of, shape_of, transformer_blocks
from soco.workfolder import WorkFolder

# Bytes of a block from which on holes in memory are worth returning to the system: what a block had
# lies between what stays of it until the way back, and what the next one needs does not fit there.
_LARGE = 2**22

Slot = tuple[dict[str, Any], str, Any]  # a dictionary of a module, a key, and what belongs there
Want = tuple[str, nn.Module, Tensor | None]  # a module's name, itself, and which components


class Lender:
    """Runs a stored model, dense or with the spectra of its layers, of which a block is in memory.

    When a block begins, what the one before it had is given up, and the block's own is read: of a
    dense layer its weight, of a spectral one the components that it computes. Autograd keeps what
    it needs; so gradients go through blocks that are computed again on the way back
    (``steps.checkpointed``), or nothing is gained. What is small (vectors) or outside of all blocks
    (embeddings) stays in memory.

    On a GPU the next block is read while one computes; on the CPU the system is told to.

    Args:
        stored: the model; nothing of it is in memory.
        work: where components are; None where there are none.
        files: layer to its file there (``keep``).
        dtype: to compute in.
        device: to compute on.
    """

    def __init__(
        self,
        stored: StoredModel,
        work: WorkFolder | None,
        files: Mapping[str, str],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Nothing is read yet."""
        self._stored, self._work, self._files = stored, cast(WorkFolder, work), files
        self._dtype, self._device = dtype, device
        self._blocks = transformer_blocks(stored.model)
        self._paths = block_paths(stored.model)
        self._layouts = {name: layout_of(stored.model.get_submodule(name)) for name in files}
        self._shapes = {name: shape_of(stored.model.get_submodule(name)) for name in files}
        self._of_block = [[n for n in files if n.startswith(f"{p}.")] for p in self._paths]
        self._held: list[Slot] = []  # what was in the slots that are filled now
        self._inside: tuple[Any, ...] = ()  # of which block, and of which of its components
        self._orders: dict[str, tuple[Any, Tensor]] = {}  # as the layers have them, on the CPU
        self._last = -1  # block that began last
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._worker = None if self._stream is None else ThreadPoolExecutor(1)
        self._next: tuple[Any, Future[list[Slot]]] | None = None

    # Components in files --------------------------------------------------------------------------

    def keep(self, name: str, components: Components) -> None:
        """Write what ``pop`` and the layers read: a component is a row of either side."""
        held = components._asdict()
        self._work.put_tensors(self._files[name], {**held, "up": components.up.mT})

    def pop(self, name: str) -> Components:
        """The components of a layer, of which those that are lent have no values.

        From then on no dense layer has a value, which somebody might hold on to.
        """
        self._give_up()
        held = self._work.get_tensors(self._files[name])
        rows, columns = self._shapes[name]
        rank = min(rows, columns)
        empty = partial(torch.empty, dtype=self._dtype, device="meta")
        gain, sigma = (held[part].to(self._device, copy=True) for part in ("gain", "sigma"))
        return Components(empty(rows, rank), empty(rank, columns), gain, sigma)

    # Running --------------------------------------------------------------------------------------

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, the model runs, frozen and in evaluation mode.

        Raises:
            ValueError: a file lacks a tensor, or has it with NaN or Inf.
        """
        model = self._stored.model
        inside = {parameter for block in self._blocks for parameter in block.parameters()}
        stay = [
            name
            for name, parameter in model.named_parameters()
            if parameter not in inside or parameter.dim() < 2
        ]
        with (
            self._stored.in_memory(stay, self._dtype, self._device),
            frozen(model),
            with_forwards(self._blocks, self._run),
        ):
            for buffer in model.buffers():
                buffer.data = buffer.to(self._device)
            try:
                yield
            finally:
                self._give_up()
                self._next = None

    @contextmanager
    def whole(self, name: str, layer: SpectralLinear) -> Iterator[None]:
        """Inside, a layer has all of its components in memory, in its order."""
        self._give_up()
        try:
            self._fill(self._components(name, layer, layer.order.cpu()))
            yield
        finally:
            self._give_up()

    def _run(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._enter(number)
            return forward(*args, **kwargs)

        return run

    def _enter(self, number: int) -> None:
        """Give up what is held, and bring in what a block needs now."""
        wanted = self._state(number)
        turned = number == self._last == len(self._blocks) - 1
        back, self._last = turned or number == self._last - 1, number
        if wanted != self._inside:
            if not self._lends(number):
                return
            if self._give_up() >= _LARGE:
                give_back_memory()
            self._fill(self._fetched(number, wanted))
            self._inside = wanted
        following = number - 1 if back else number + 1
        if 0 <= following < len(self._blocks):
            self._read_ahead(following)

    def _lends(self, number: int) -> bool:
        """Whether a block that is not held needs anything: its layers may be compressed ones."""
        return any(
            isinstance(module, SpectralLinear)
            or any(p is not None and p.is_meta and p.dim() > 1 for p in module._parameters.values())
            for _, module in self._modules(number)
        )

    def _modules(self, number: int) -> Iterator[tuple[str, nn.Module]]:
        """What a block runs, by name: its own modules, and what lies elsewhere of shared bases."""
        own = set()
        elsewhere = []
        for name, module in self._blocks[number].named_modules(prefix=self._paths[number]):
            own.add(module)
            if isinstance(module, LowRankLinear) and module.basis is not None:
                elsewhere.append(module.basis.down)
            yield name, module
        if elsewhere := {module for module in elsewhere if module not in own}:
            for name, module in self._stored.model.named_modules():
                if module in elsewhere:
                    yield name, module

    def _state(self, number: int) -> tuple[Any, ...]:
        """What tells whether a block needs the same as when it began last."""
        found: list[Any] = [number]
        for _, module in self._modules(number):
            found.append(id(module))
            if isinstance(module, SpectralLinear):
                found += [module.dense, module.computed, module.order._version]
        return tuple(found)

    def _give_up(self) -> int:
        """Put back what was in the slots; how many bytes were there."""
        size = sum(dictionary[key].nbytes for dictionary, key, _ in self._held)
        for dictionary, key, value in self._held:
            dictionary[key] = value
        self._held.clear()
        self._inside = ()
        return size

    def _fill(self, slots: Sequence[Slot]) -> None:
        for dictionary, key, value in slots:
            self._held.append((dictionary, key, dictionary[key]))
            dictionary[key] = value

    def _wants(self, number: int) -> list[Want]:
        """The modules of a block by name, and the components that spectral ones compute."""
        found = []
        for name, module in self._modules(number):
            chosen = None
            if isinstance(module, SpectralLinear) and not module.dense:
                chosen = self._chosen(name, module)
            found.append((name, module, chosen))
        return found

    def _slots(self, wants: Iterable[Want]) -> list[Slot]:
        """What modules want, read."""
        found: list[Slot] = []
        for name, module, chosen in wants:
            if isinstance(module, SpectralLinear):
                if chosen is None:
                    found.append(self._weight(name, module))
                else:
                    found += self._components(name, module, chosen)
                continue
            for leaf, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta and parameter.dim() > 1:
                    value = self._parameter(f"{name}.{leaf}", tuple(parameter.shape))
                    found.append((module._parameters, leaf, nn.Parameter(value, False)))
        return found

    def _parameter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._brought(self._stored.read(self._stored.require(name, shape)), mapped=True)

    def _weight(self, name: str, layer: SpectralLinear) -> Slot:
        """The weight of a layer that computes what the dense one does."""
        conv = self._layouts[name] == "conv1d"
        rows, columns = self._shapes[name]
        value = self._parameter(f"{name}.weight", (columns, rows) if conv else (rows, columns))
        if "weight" in layer._parameters:
            return layer._parameters, "weight", nn.Parameter(value, False)
        return layer.__dict__, "weight", value.mT if conv else value

    def _components(self, name: str, layer: SpectralLinear, chosen: Tensor) -> list[Slot]:
        """Components of a layer, where ``arrange`` would have them."""
        held = self._work.get_tensors(self._files[name])
        rows, columns = self._shapes[name]
        rank, count = min(rows, columns), len(chosen)
        up = torch.empty(rows, rank, dtype=self._dtype, device=self._device)
        down = torch.empty(rank, columns, dtype=self._dtype, device=self._device)
        up[:, :count] = self._brought(held["up"].index_select(0, chosen)).mT
        down[:count] = self._brought(held["down"].index_select(0, chosen))
        return [(layer._buffers, "up", up), (layer._buffers, "down", down)]

    def _chosen(self, name: str, layer: SpectralLinear) -> Tensor:
        """What a layer computes, on the CPU; the device is asked only when it changed."""
        state = id(layer), layer.order._version
        known = self._orders.get(name)
        if known is None or known[0] != state:
            known = self._orders[name] = state, layer.order.cpu().clone()
        return known[1][: layer.computed]

    def _brought(self, value: Tensor, *, mapped: bool = False) -> Tensor:
        """On the device, in the dtype that is computed in; a copy of what a file is mapped to."""
        if self._stream is None:
            return value.to(self._device, self._dtype, copy=mapped)
        return value.to(self._dtype).pin_memory().to(self._device, non_blocking=True)

    # Reading ahead --------------------------------------------------------------------------------

    def _read_ahead(self, number: int) -> None:
        """Begin to read what a block will need, if nothing changes until it begins."""
        if self._worker is not None:
            begun = self._worker.submit(self._read, self._wants(number))
            self._next = self._state(number), begun
            return
        for name in self._of_block[number]:
            with suppress(OSError, AttributeError):  # not every system can be told
                handle = os.open(self._work.path / self._files[name], os.O_RDONLY)
                try:
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(handle)

    def _read(self, wants: Iterable[Want]) -> list[Slot]:
        """What modules want; on a GPU beside what that computes meanwhile."""
        there = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with torch.no_grad(), there:
            return self._slots(wants)

    def _fetched(self, number: int, wanted: tuple[Any, ...]) -> list[Slot]:
        """What a block needs: as it was read ahead, if it is what was read."""
        ahead, self._next = self._next, None
        slots = None if ahead is None else ahead[1].result()
        if ahead is None or slots is None or ahead[0] != wanted:
            slots = self._read(self._wants(number))
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for _, _, value in slots:
                value.record_stream(current)
        return slots
