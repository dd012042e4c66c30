"""What work on tensors takes, told by doing it: live bytes, multiplications, eigendecompositions.

A model does it on tensors without values (torch's fake tensors), a decomposition on small ones.
"""

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from soco.experts import Experts
from soco.observing import InputSums

# glibc has chunks up to this size in its heaps, and keeps up to twice as much at the end of one
# when they are freed (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD).
CHUNK, KEPT = 2**25, 2**26
# LAPACK's eigensolver (syevd) and singular value decomposition (gesdd) of n columns work in so many
# numbers times n^2 beside what they give, which no operator shows.
_WORK = {"linalg_eigh": 2, "linalg_svd": 5, "linalg_qr": 1}


@dataclass(frozen=True)
class Work:
    """What a piece of work takes."""

    peak: int = 0  # bytes of tensors that are alive at once, beside those that were there before
    kept: int = 0  # bytes that the allocator keeps of what was freed
    products: Mapping[torch.dtype, float] = field(default_factory=dict)  # floating-point operations
    cubes: float = 0.0  # of eigendecompositions: the sum of n^3

    def times(self, count: float) -> "Work":
        """So many times as long, in the same memory."""
        found = {dtype: count * value for dtype, value in self.products.items()}
        return Work(self.peak, self.kept, found, count * self.cubes)

    def scaled(self, by: float) -> "Work":
        """The same on matrices whose sides are so many times as long."""
        found = {dtype: by**3 * value for dtype, value in self.products.items()}
        peak = math.ceil(by**2 * self.peak)
        return Work(peak, min(KEPT, peak), found, by**3 * self.cubes)

    def and_more(self, other: "Work", count: int) -> "Work":
        """This, and so many times what another one takes beyond it."""
        keys = {**self.products, **other.products}
        mine, theirs = ({k: w.products.get(k, 0.0) for k in keys} for w in (self, other))
        return Work(
            self.peak + count * (other.peak - self.peak),
            min(KEPT, self.kept + count * (other.kept - self.kept)),
            {k: mine[k] + count * (theirs[k] - mine[k]) for k in keys},
            self.cubes + count * (other.cubes - self.cubes),
        )

    def then(self, other: "Work") -> "Work":
        """One after the other."""
        found = dict(self.products)
        for dtype, value in other.products.items():
            found[dtype] = found.get(dtype, 0.0) + value
        peak, kept = max(self.peak, other.peak), max(self.kept, other.kept)
        return Work(peak, kept, found, self.cubes + other.cubes)


class Trace(TorchDispatchMode):
    """Inside, every operator is followed: what it makes is alive until nothing refers to it."""

    def __init__(self) -> None:
        """Nothing is alive yet."""
        super().__init__()
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}  # by address
        self._now = self._small_now = 0
        self._peak = self._small_peak = 0
        self._products: dict[torch.dtype, float] = {}
        self._cubes = 0.0

    @property
    def work(self) -> Work:
        """What it took so far."""
        kept = min(KEPT, self._small_peak)
        return Work(self._peak, kept, dict(self._products), self._cubes)

    @property
    def alive(self) -> int:
        """Bytes that are alive now."""
        return self._now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """One operator."""
        for given in tree_iter((args, kwargs)):
            if isinstance(given, Tensor):
                self._note(given, new=False)
        found = func(*args, **(kwargs or {}))
        for made in tree_iter(found):
            if isinstance(made, Tensor):
                self._note(made, new=True)
        self._count(func.overloadpacket.__name__, args, found)
        return found

    def _note(self, tensor: Tensor, *, new: bool) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return
        size = storage.nbytes() if new else 0
        self._alive[address] = weakref.ref(storage, lambda _: self._forget(address)), size
        self._add(size, 1)
        self._small_peak = max(self._small_peak, self._small_now)
        self._rise(0)

    def _forget(self, address: int) -> None:
        """Nothing refers to a storage any more."""
        self._add(self._alive.pop(address)[1], -1)

    def _add(self, size: int, sign: int) -> None:
        self._now += sign * size
        self._small_now += sign * size if size <= CHUNK else 0

    def _rise(self, beside: int) -> None:
        self._peak = max(self._peak, self._now + beside)

    def _count(self, name: str, args: tuple[Any, ...], found: Any) -> None:
        """Note what a product or a decomposition takes."""
        matrices = [x for x in args if isinstance(x, Tensor)]
        if name in ("mm", "bmm", "addmm", "baddbmm", "linear"):
            x = matrices[1] if name in ("addmm", "baddbmm") else matrices[0]
            self._multiply(x.dtype, 2 * x.shape[-1] * found.numel())
        elif name.startswith("_scaled_dot_product"):  # two products, and a backward pass of five
            query, keys = (x.shape for x in matrices[:2] if x.dim() == 4)
            each = 2 * math.prod(query) * keys[-2]
            self._multiply(matrices[0].dtype, each * (5 if "backward" in name else 2))
        elif name in ("linalg_eigh", "_linalg_eigh"):
            n = matrices[0].shape[-1]
            self._cubes += n**3
            self._rise(_WORK["linalg_eigh"] * n * n * matrices[0].element_size())
        elif name in ("linalg_svd", "_linalg_svd"):
            n = min(matrices[0].shape[-2:])
            self._cubes += 3.0 * n**3
            self._rise(_WORK["linalg_svd"] * n * n * matrices[0].element_size())
        elif name in ("linalg_qr", "linalg_solve_triangular", "linalg_cholesky_ex"):
            rows, columns = matrices[0].shape[-2:]
            self._multiply(matrices[0].dtype, 2.0 * max(rows, columns) * min(rows, columns) ** 2)

    def _multiply(self, dtype: torch.dtype, operations: float) -> None:
        self._products[dtype] = self._products.get(dtype, 0.0) + operations


@contextmanager
def without_values(model: nn.Module) -> Iterator[None]:
    """Inside, all tensors that are made are without values, and those of the model, too.

    Args:
        model: on the meta device, but for its buffers; its parameters are of their own dtypes
            inside, on what stands for the CPU.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    held = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    made: dict[int, nn.Parameter] = {}
    with mode:
        for module, parameters, buffers in held:
            for name, parameter in parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
            for name, buffer in buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        try:
            with _even_experts():
                yield
        finally:
            for module, parameters, buffers in held:
                module._parameters.update(parameters)
                module._buffers.update(buffers)


@contextmanager
def _even_experts() -> Iterator[None]:
    """Inside, every expert is sent as many tokens as the others: without values none is chosen."""

    def counts(self: Experts, chosen: Tensor) -> list[int]:
        each, rest = divmod(chosen.numel(), self.num_experts)
        return [each + (expert < rest) for expert in range(self.num_experts)]

    own = Experts.counts
    Experts.counts = counts
    try:
        yield
    finally:
        Experts.counts = own


def inputs_of(
    model: nn.Module, body: nn.Module, layers: Mapping[str, nn.Module], ids: Tensor, run: Any
) -> tuple[list[list[str]], Work]:
    """Which layers are given the same tensor, in groups, and what a pass takes that keeps none."""
    inputs = _Inputs(set(), ())
    hooks = [m.register_forward_pre_hook(inputs.hook(name)) for name, m in layers.items()]
    try:
        with torch.no_grad(), Trace() as trace:
            run(body, ids)
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[str, list[str]] = {}
    for name, leader in inputs.leader.items():
        groups.setdefault(leader, []).append(name)
    return list(groups.values()), trace.work


class _Inputs(InputSums):
    """Who follows whom as in a calibration; nothing is summed."""

    def _add(self, name: str, x: Tensor) -> None:
        _multiplied(x)


def _multiplied(x: Tensor) -> None:
    """What ``linalg.add_gram`` makes beside a sum: rows in float32, and some columns' products."""
    wide = x.reshape(-1, x.shape[-1])[:2048].float()
    (wide[:, :256].mT @ wide).double()


def curvature_pass(
    model: nn.Module, layers: Mapping[str, nn.Module], objective: Any, ids: Tensor
) -> Work:
    """A pass of ``calibration.collect`` that reads gradients of all layers' outputs."""

    def observe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].detach()
        zero = torch.zeros(1, dtype=output.dtype, requires_grad=True)
        output = output + zero

        def wide(gradient: Tensor) -> None:
            for each in (x, gradient):
                each.float()

        output.register_hook(wide)
        return output

    hooks = [layer.register_forward_hook(observe) for layer in layers.values()]
    try:
        with torch.enable_grad(), Trace() as trace:
            outputs = objective.outputs(model, ids)
            objective.surprise(outputs.detach(), outputs, range(len(ids))).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return trace.work


def training_pass(
    model: nn.Module,
    layers: Sequence[Any],
    objective: Any,
    ids: Tensor,
    *,
    record: bool,
    train: bool,
    dense: Any,
    again: bool = False,
) -> Work:
    """A pass of a training: the dense model, this one, and the gradients of it.

    Args:
        model: with the layers that are trained in place.
        layers: the spectral ones among these.
        objective: what is compared.
        ids: token ids of a batch that is held in memory at a time.
        record: whether the Fisher information is recorded.
        train: whether a gradient of the loss follows.
        dense: makes a context in which the model is the dense one.
        again: whether the dense model's states are known, so that only its head runs.
    """
    with torch.no_grad(), dense(), Trace() as teacher:
        wanted, states = objective.outputs_and_states(model, ids)
        if states is not None and not again:
            head = objective.from_states(model, states)
            torch.isclose(head, wanted, rtol=0, atol=1e-4)
            del head
    for layer in layers:
        layer.recording, layer.listening = record, True
    with torch.enable_grad(), Trace() as trace:
        held = wanted.clone()  # it is alive, and was made outside of this trace
        student = objective.outputs(model, ids)
        if record:
            surprise = objective.surprise(held, student, range(len(ids)))
            logits = [layer.logit for layer in layers]
            torch.autograd.grad(surprise, logits, allow_unused=True, retain_graph=train)
            for layer in layers:
                layer.listening = False
                layer.take_recorded()
        if train:  # as ``objectives.TokenDistribution.divergence`` has it
            gradient = student.new_empty(student.shape)
            torch.autograd.backward(student, gradient * torch.ones(()))
    for layer in layers:
        layer.recording, layer.listening = False, True
    return teacher.work.then(trace.work)
