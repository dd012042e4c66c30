"""What hooks see of layers that run: sums over inputs, and over gradients of outputs."""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from soco.linalg import add_gram
from soco.objectives import by_sequence
from soco.ops import all_finite
from soco.processes import add_up, gathered, gathered_tensors

OF_GRADIENTS = frozenset({"fisher", "grad_gram", "sampled_grad_gram"})

# Rows of a chunk: of a sum in float32 that is added up in float64, and of one step of the QR.
_CHUNK = 2048


class InputSums:
    """Sums over inputs; layers with the same input tensors point to the same sums.

    A layer follows another from its first call on, if both were given the same tensor for the first
    time, and has to be given the same ones ever after.

    Args:
        alone: layers that follow no other.
        kinds: of statistics.
    """

    def __init__(self, alone: set[str], kinds: Collection[str]) -> None:
        self.alone = alone
        self.kinds = kinds
        self.parted: set[str] = set()  # layers that went another way than the one they followed
        self.sums: dict[str, dict[str, Tensor]] = {}  # by leader, then by kind
        self.tokens: dict[str, int] = {}
        self.leader: dict[str, str] = {}  # layer to the layer that sums for it
        self.fresh: list[str] = []  # leaders whose first forward this is
        self.seen: dict[str, list[weakref.ref[Tensor]]] = {}  # inputs of this forward, by leader
        self.calls: dict[str, int] = {}  # of a layer, in this forward
        self.shape: tuple[int, ...] = ()  # (sequences, length) of the ids that run

    def state(self) -> dict[str, Any]:
        """What has to be known between two forwards to go on, in plain values and tensors."""
        return {
            "alone": sorted(self.alone), "sums": self.sums, "tokens": self.tokens,
            "leader": self.leader,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: Mapping[str, Any], kinds: Collection[str]) -> "InputSums":
        """Those that go on from a ``state``."""
        found = cls(set(state["alone"]), kinds)
        found.sums, found.tokens, found.leader = state["sums"], state["tokens"], state["leader"]
        return found

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """The forward pre-hook of the layer ``name``."""

        def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            self.calls[name] = self.calls.get(name, 0) + 1
            if name not in self.leader:
                self.leader[name] = self._find_leader(name, x)
            leader = self.leader[name]
            if leader == name:
                self.seen.setdefault(name, []).append(weakref.ref(x))
                self._add(name, x.detach())
                return
            before = self.seen.get(leader, [])
            call = self.calls[name]
            if call > len(before) or before[call - 1]() is not x:
                self.parted.add(name)

        return observe

    def _find_leader(self, name: str, x: Tensor) -> str:
        if name not in self.alone:
            for other in self.fresh:
                if self.seen[other][0]() is x:
                    return other
        self.fresh.append(name)
        return name

    def end_forward(self) -> None:
        """Call after each forward."""
        for name, leader in self.leader.items():
            if self.calls.get(name, 0) != self.calls.get(leader, 0):
                self.parted.add(name)
        self.seen.clear()
        self.calls.clear()
        self.fresh.clear()

    def _add(self, name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        sums = self.sums.get(name)
        if sums is None:
            sums = self.sums[name] = _zeros(self.kinds, x.shape[-1], x.device)
        add_gram(sums["gram"], rows)
        for chunk in rows.split(_CHUNK):
            wide = chunk.float()
            if "mean" in sums:
                sums["mean"].add_(wide.sum(0).double())
            if "abs_mean" in sums:
                sums["abs_mean"].add_(wide.abs().sum(0).double())
            if "root" in sums:
                stack = torch.cat([sums["root"], chunk.double()])
                sums["root"] = torch.linalg.qr(stack, mode="r").R[: x.shape[-1]]
        if "stacked_gram" in sums:
            mean = by_sequence(x, self.shape).float().mean(0)  # (length, in)
            add_gram(sums["stacked_gram"], mean)
        self.tokens[name] = self.tokens.get(name, 0) + len(rows)

    def add_up(self, layers: Mapping[str, nn.Module]) -> None:
        """The sums over all processes, each of which ran some of the batches."""
        leaders = gathered(self.leader)
        agreed = {n: _agreed(n, leaders) for n in layers if any(n in each for each in leaders)}
        sums = {}
        for name, leader in agreed.items():
            if leader != name:
                continue
            mine = self.leader.get(name)
            if mine is None:  # only others saw it
                module = layers[name]
                device = next(module.parameters()).device
                held = _zeros(self.kinds, _shape(module)[1], device)
            elif mine == name:
                held = self.sums[name]
            else:
                held = {kind: total.clone() for kind, total in self.sums[mine].items()}
            sums[name] = held
        for held in sums.values():
            root = held.pop("root", None)
            add_up(*held.values())
            if root is not None:
                parts = torch.cat(gathered_tensors(root))
                held["root"] = torch.linalg.qr(parts, mode="r").R[: len(root)]
        tokens = gathered({name: self.tokens.get(self.leader.get(name) or "", 0) for name in sums})
        self.tokens = {name: sum(each[name] for each in tokens) for name in sums}
        self.sums, self.leader = sums, agreed

    def result(self, name: str, module: nn.Module) -> tuple[dict[str, Tensor], int]:
        """The sums of the layer ``name`` by their kind, and the tokens that it saw.

        Raises:
            ValueError: its inputs hold NaN or Inf.
        """
        leader = self.leader.get(name)
        if leader is None or leader not in self.sums:
            device = next(module.parameters()).device
            return _zeros(self.kinds, _shape(module)[1], device), 0
        sums = self.sums[leader]
        if not all_finite(sums["gram"]):
            raise ValueError(
                f"the inputs of {name} hold NaN or Inf on the calibration text: the model "
                f"overflows in its dtype, or its weights are broken"
            )
        return sums, self.tokens[leader]


def _agreed(name: str, leaders: Sequence[Mapping[str, str]]) -> str:
    """Whose sums a layer shares in every process, each of which may not have seen some layers."""
    found = {each[name] for each in leaders if name in each}
    leader = next(iter(found))
    alike = all((name in each) == (leader in each) for each in leaders)
    return leader if len(found) == 1 and alike else name


def _zeros(kinds: Collection[str], inputs: int, device: torch.device) -> dict[str, Tensor]:
    """The statistics of inputs that nobody has seen."""
    sizes = {
        "gram": (inputs, inputs),
        "mean": (inputs,),
        "abs_mean": (inputs,),
        "stacked_gram": (inputs, inputs),
        "root": (inputs, inputs),
    }
    return {
        kind: torch.zeros(size, dtype=torch.float64, device=device)
        for kind, size in sizes.items()
        if kind in kinds
    }


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of an ``nn.Linear`` or ``Conv1D``."""
    inputs = getattr(module, "in_features", None) or getattr(module, "nx")  # noqa: B009
    outputs = getattr(module, "out_features", None) or getattr(module, "nf")  # noqa: B009
    return cast(int, outputs), cast(int, inputs)


def _gradient_sizes(outputs: int, inputs: int) -> dict[str, tuple[int, int]]:
    sizes = dict.fromkeys(("grad_gram", "sampled_grad_gram"), (outputs, outputs))
    return {**sizes, "fisher": (outputs, inputs)}


class GradientSums:
    """Sums over the gradients of outputs, by layer.

    Nothing in the model requires a gradient; a zero that does is added to every layer's outputs.

    Args:
        kinds: of statistics.
    """

    def __init__(self, kinds: Collection[str]) -> None:
        self.kinds = frozenset(kinds) & OF_GRADIENTS
        self.sequences = 0
        self.sampling = False  # whether this batch goes into what is sampled
        self.sampled: dict[str, int] = {}  # tokens that did
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.calls: dict[str, int] = {}  # of a layer, in this forward
        self.pending: dict[str, Tensor] = {}  # gradients (sequences, out, in) of several calls
        self.shape: tuple[int, ...] = ()  # (sequences, length) of the ids that run

    def state(self) -> dict[str, Any]:
        """What has to be known between two batches to go on, in plain values and tensors."""
        return {"sequences": self.sequences, "sampled": self.sampled, "sums": self.sums}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], kinds: Collection[str]) -> "GradientSums":
        """Those that go on from a ``state``, or begin, where that is empty."""
        found = cls(kinds)
        for name, value in state.items():
            setattr(found, name, value)
        return found

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        """The forward hook of the layer ``name``."""

        def observe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            x = inputs[0].detach()
            self.calls[name] = self.calls.get(name, 0) + 1
            zero = torch.zeros(1, dtype=output.dtype, device=output.device, requires_grad=True)
            output = output + zero
            output.register_hook(lambda gradient: self._add(name, x, gradient))
            return output

        return observe

    def wants(self, sampling: bool) -> bool:
        """Whether a batch has to be run with gradients, if it is in the sample or not."""
        self.sampling = sampling and "sampled_grad_gram" in self.kinds
        return self.sampling or bool(self.kinds - {"sampled_grad_gram"})

    @contextmanager
    def batch(self, shape: tuple[int, int]) -> Iterator[None]:
        """Inside, one batch of (sequences, length) runs forward and backward."""
        self.calls.clear()
        self.shape = shape
        with torch.enable_grad():
            yield
        for name, weight in self.pending.items():
            self.sums[name]["fisher"].add_(weight.double().square().sum(0))
        self.pending.clear()
        self.sequences += shape[0]

    @torch.no_grad()
    def _add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        x, g = (by_sequence(rows, self.shape).float() for rows in (x, gradient))
        sums = self.sums.setdefault(name, {})
        into = ["grad_gram"] if "grad_gram" in self.kinds else []
        if self.sampling:
            into.append("sampled_grad_gram")
            self.sampled[name] = self.sampled.get(name, 0) + g.shape[0] * g.shape[1]
        if into:
            size = (g.shape[-1], g.shape[-1])
            for kind in into:
                sums.setdefault(kind, torch.zeros(size, dtype=torch.float64, device=g.device))
                add_gram(sums[kind], g.flatten(0, 1))
        if "fisher" in self.kinds:
            shape = (g.shape[-1], x.shape[-1])
            sums.setdefault("fisher", torch.zeros(shape, dtype=torch.float64, device=g.device))
            if self.calls[name] > 1:  # the gradient of a sequence is the sum over all calls
                self.pending[name] = self.pending.get(name, 0) + g.mT @ x
                return
            for one, other in zip(g, x, strict=True):
                sums["fisher"].add_((one.T @ other).double().square())

    def add_up(self, layers: Mapping[str, nn.Module]) -> None:
        """The sums over all processes, each of which ran some of the batches."""
        others = gathered((self.sequences, self.sampled, {n: set(s) for n, s in self.sums.items()}))
        self.sequences = sum(sequences for sequences, _, _ in others)
        for name, module in layers.items():
            sampled = sum(each.get(name, 0) for _, each, _ in others)
            if sampled:
                self.sampled[name] = sampled
            sizes = _gradient_sizes(*_shape(module))
            device = next(module.parameters()).device
            for kind in sorted(set[str]().union(*(seen.get(name, ()) for _, _, seen in others))):
                held = self.sums.setdefault(name, {})
                if kind not in held:
                    held[kind] = torch.zeros(sizes[kind], dtype=torch.float64, device=device)
                add_up(held[kind])

    def result(self, name: str, module: nn.Module, tokens: int) -> dict[str, Tensor]:
        """The sums of the layer ``name``, which saw so many tokens in all.

        Raises:
            ValueError: its gradients hold NaN or Inf.
        """
        sizes = _gradient_sizes(*_shape(module))
        device = next(module.parameters()).device
        found = dict(self.sums.get(name, {}))
        if "sampled_grad_gram" in found:  # as if all tokens had been like those
            found["sampled_grad_gram"] *= tokens / max(1, self.sampled[name])
        for kind, total in found.items():
            if not all_finite(total):
                raise ValueError(
                    f"the gradients at {name} hold NaN or Inf on the calibration text: the model "
                    f"overflows in its dtype, or its weights are broken ({kind})"
                )
        return {
            kind: found.get(kind, torch.zeros(sizes[kind], dtype=torch.float64, device=device))
            for kind in self.kinds
        }
