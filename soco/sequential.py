"""What layers see behind compressed blocks, beside what they see in the dense model."""

from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from soco.linalg import add_gram
from soco.objectives import run_model
from soco.ops import all_finite
from soco.steps import with_forwards
from soco.surgery import replaced, transformer_blocks

_CHUNK = 2048  # tokens of a product in float32, which is summed in float64


@dataclass(frozen=True)
class Behind:
    """The inputs of one layer in two models, over the same tokens."""

    gram: Tensor  # (in, in), float64: X X^T per calibration token, X behind compressed blocks
    cross: Tensor  # (in, in), float64: X0 X^T likewise, X0 the inputs in the dense model
    tokens: int  # that the layer saw behind compressed blocks
    aligned: bool  # False: the layer sees other tokens than in the dense model; cross is gram


class EnoughError(Exception):
    """What a run is ended with when the block has run; nothing behind it matters."""


def stages(model: nn.Module, names: Mapping[str, nn.Module]) -> list[tuple[nn.Module, list[str]]]:
    """The layers by transformer block, in the model's order; those outside of blocks come last.

    Returns:
        Pairs of a block and the names of its layers; the model itself stands for the rest.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    left = list(names)
    found = []
    for block in transformer_blocks(model):
        path = paths[id(block)]
        mine = [name for name in left if name.startswith(f"{path}.")]
        left = [name for name in left if name not in mine]
        if mine:
            found.append((block, mine))
    return [*found, (model, left)] if left else found


class Walk:
    """The same windows through the dense model and a partly compressed one, block after block.

    What the last block put out that will not change any more is kept, so that each step runs the
    next blocks only; whether a model allows that is tried with one sequence at every step. Where it
    does not (blocks that are called several times, or that use more than the block before them
    gives), everything runs from the start: as many block runs as there are blocks, squared.

    Memory: two tensors of the size of the hidden states of all windows, on the CPU.

    Args:
        model: its blocks are compressed one after the other between two calls of ``collect``.
        dense: name to dense layer, of every layer that may be compressed.
        windows: token ids (sequences, length), on the CPU.
        batch_size: sequences at a time.
        keep: makes what holds the outputs of a block, by batch: of the dense model (0) or of the
            other one (1), and of which block. None: memory.
        sure: whether the model is known to allow that, and all layers are inside of blocks; then it
            is not tried, and nothing behind a block runs.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: Mapping[str, nn.Module],
        windows: Tensor,
        batch_size: int,
        keep: Callable[[int, int], MutableMapping[int, Any]] | None = None,
        *,
        sure: bool = False,
    ) -> None:
        """Nothing runs yet."""
        self.model, self.dense = model, dense
        self._keep = keep or (lambda stream, place: {})
        self._sure = sure
        self.tokens = windows.numel()
        # The first sequence runs alone: it is the one that is tried with and without what is kept.
        parts = (windows[:1], *windows[1:].split(batch_size))
        self.batches = [part for part in parts if len(part)]
        self.blocks = transformer_blocks(model)
        self.chained = True  # as far as we know
        self._streams = (_Stream(), _Stream())  # of the dense model, and of the model as it is
        self._stop = False  # a run may end behind the block that is asked about

    def go_on(self, block: nn.Module) -> None:
        """As if ``collect`` had been asked about a block, whose outputs are held already."""
        index = self.blocks.index(block)
        for number, (stream, place) in enumerate(
            zip(self._streams, (index, index - 1), strict=True)
        ):
            stream.place = place
            stream.kept = self._keep(number, place) if place >= 0 else {}

    @torch.no_grad()
    def collect(self, block: nn.Module, names: list[str]) -> dict[str, Behind]:
        """What the layers of one block see in both models.

        Args:
            block: of ``stages``, in their order; all layers before it have what they will have.
            names: its layers, which are still dense.

        Returns:
            name to what the layer saw. A layer that saw nothing has zeros.

        Raises:
            ValueError: the inputs of a layer hold NaN or Inf.
        """
        device = next(self.model.parameters()).device
        index = self.blocks.index(block) if block in self.blocks else len(self.blocks)
        ahead = any(stream.place >= index for stream in self._streams)
        if ahead:
            self._streams = (_Stream(), _Stream())
        # The outputs of this block in the dense model, and of the one before in the other, are
        # what will not change any more.
        places = (index, index - 1)
        outputs = [self._keep(number, place) for number, place in enumerate(places)]
        missing = [False, False]
        changed = {
            name: layer
            for name, layer in self.dense.items()
            if self.model.get_submodule(name) is not layer
        }
        products = _Products()
        self._stop = self._sure
        for number, batch in enumerate(self.batches):
            ids = batch.to(device)
            seen = []
            for which, (stream, newcomers, place, made) in enumerate(
                zip(self._streams, (changed, {}), places, outputs, strict=True)
            ):
                kept = stream.kept[number] if stream.kept else None
                with replaced(self.model, newcomers):
                    inputs, output = self._run(ids, block, names, stream.place, kept, place)
                    if number == 0 and kept is not None and not self._sure:
                        whole, _ = self._run(ids, block, names, -1, None, place)
                        if not _alike(inputs, whole):
                            self.chained, inputs = False, whole
                if not self.chained:
                    stream.kept = {}
                seen.append(inputs)
                if output is None:
                    missing[which] = True
                else:
                    made[number] = output
            products.add(*seen, tokens=ids.numel())
        for stream, place, made, lacks in zip(self._streams, places, outputs, missing, strict=True):
            whole = self.chained and not lacks
            stream.place, stream.kept = (place, made) if whole else (-1, {})
        return {name: self._result(name, products) for name in names}

    def _run(
        self,
        ids: Tensor,
        block: nn.Module,
        names: list[str],
        stand_in: int,
        kept: Any,
        place: int,
    ) -> tuple[dict[str, list[Tensor]], Any]:
        """One forward: the inputs of the layers, and what block ``place`` put out, on the CPU."""
        seen: dict[str, list[Tensor]] = {}
        calls = 0
        outputs: list[Any] = []

        def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, inputs: seen.setdefault(name, []).append(inputs[0].detach())

        def keep(module: nn.Module, inputs: object, output: Any) -> None:
            outputs.append(_mapped(output, lambda tensor: tensor.detach().to("cpu", copy=True)))

        def count(module: nn.Module, inputs: object, output: object) -> None:
            nonlocal calls
            calls += 1
            if self._stop:
                raise EnoughError

        hooks = [self.dense[n].register_forward_pre_hook(observe(n)) for n in names]
        if self.chained and 0 <= place < len(self.blocks):
            hooks.append(self.blocks[place].register_forward_hook(keep))
        hooks.append(block.register_forward_hook(count))
        blocks = self.blocks[: stand_in + 1] if kept is not None else []
        try:
            with standing_in(blocks, kept, ids.device), suppress(EnoughError):
                run_model(self.model, ids)
        finally:
            for hook in hooks:
                hook.remove()
        self._stop = calls == 1 and block is not self.model
        if calls != 1 or len(outputs) > 1:
            self.chained = False
        return seen, outputs[0] if len(outputs) == 1 else None

    def _result(self, name: str, products: "_Products") -> Behind:
        found = [sums for names, sums in products.sums.items() if name in names]
        if not found:
            module, device = self.dense[name], next(self.model.parameters()).device
            size = getattr(module, "in_features", None) or getattr(module, "nx")  # noqa: B009
            empty = torch.zeros(size, size, dtype=torch.float64, device=device)
            return Behind(empty, empty, 0, False)
        gram, cross = (
            torch.stack(parts).sum(0).div_(self.tokens) for parts in zip(*found, strict=True)
        )
        if not all_finite(gram):
            raise ValueError(
                f"the inputs of {name} hold NaN or Inf behind the compressed blocks: the ratio is "
                f"too high for this model, or it overflows in its dtype"
            )
        unaligned = name in products.unaligned
        return Behind(gram, gram if unaligned else cross, products.tokens[name], not unaligned)


def collect_behind(
    model: nn.Module,
    dense: Mapping[str, nn.Module],
    block: nn.Module,
    names: list[str],
    windows: Tensor,
    batch_size: int,
) -> dict[str, Behind]:
    """``Walk.collect`` of one block alone, from the start."""
    return Walk(model, dense, windows, batch_size).collect(block, names)


@dataclass
class _Stream:
    """What is kept of one of the two models."""

    place: int = -1  # the number of the block whose outputs these are
    kept: MutableMapping[int, Any] = field(default_factory=dict)  # its outputs, by batch


class _Products:
    """Sums over batches of ``X X^T`` and ``X0 X^T``, once for layers that see the same tensors."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], list[Tensor]] = {}  # names to the two sums
        self.tokens: dict[str, int] = {}
        self.unaligned: set[str] = set()

    def add(
        self, before: dict[str, list[Tensor]], behind: dict[str, list[Tensor]], tokens: int
    ) -> None:
        """Add one batch of ``tokens``: the inputs of the layers in the two models."""
        together: dict[tuple, list[str]] = {}
        for name, inputs in behind.items():
            same = tuple(map(id, inputs)), tuple(map(id, before.get(name, ())))
            together.setdefault(same, []).append(name)
        for names in together.values():
            x = _rows(behind[names[0]])
            x0 = _rows(before[names[0]]) if names[0] in before else None
            # An expert sees the tokens that were sent to it, which may be others in each model.
            if x0 is None or len(x0) != len(x) or len(x) % tokens:
                self.unaligned.update(names)
                x0 = None
            size = x.shape[-1]
            total = self.sums.setdefault(
                tuple(names),
                [torch.zeros(size, size, dtype=torch.float64, device=x.device) for _ in range(2)],
            )
            add_gram(total[0], x)
            if x0 is not None:
                for one, other in zip(x0.split(_CHUNK), x.split(_CHUNK), strict=True):
                    total[1].add_((one.float().mT @ other.float()).double())
            for name in names:
                self.tokens[name] = self.tokens.get(name, 0) + len(x)


def _rows(inputs: list[Tensor]) -> Tensor:
    rows = [x.reshape(-1, x.shape[-1]) for x in inputs]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _alike(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> bool:
    """Whether layers saw the same, up to rounding."""
    if one.keys() != other.keys():
        return False
    for name, inputs in one.items():
        if [x.shape for x in inputs] != [x.shape for x in other[name]]:
            return False
        for x, y in zip(inputs, other[name], strict=True):
            # What is not finite is found later, and named.
            gap = (x.float() - y.float()).abs().max() if x.numel() else torch.zeros(())
            if bool(gap > 1e-3 * y.float().abs().max()):
                return False
    return True


def standing_in(
    blocks: list[nn.Module], output: Any, device: torch.device
) -> AbstractContextManager[None]:
    """Inside, the blocks do not run, and return ``output``: tensors, or tuples or lists of them."""

    def given(*_: Any, **__: Any) -> Any:
        return _mapped(output, lambda tensor: tensor.to(device, copy=True))

    return with_forwards(blocks, lambda number, forward: given)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor changed, or a tuple or list of such; anything else as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(part, change) for part in value)
    return value
