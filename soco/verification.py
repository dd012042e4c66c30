"""Is a compressed model what was written, and is it the model that was compressed?"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soco.checkpoint import load
from soco.data import cut_windows, token_ids
from soco.evaluation import vocab_size
from soco.folders import CHECKSUMS, checksums
from soco.headers import read_json
from soco.modules import CompressedLinear
from soco.objectives import run_model
from soco.ops import all_finite, check_finite
from soco.running import compressed_model, lent
from soco.steps import frozen
from soco.stored import StoredModel
from soco.surgery import context_length, is_linear, low_rank_layers, shape_of

LENGTH = 128  # tokens of a sequence that is run, where the model allows as many


@dataclass(frozen=True)
class LayerCheck:
    """A compressed layer beside the dense one."""

    name: str
    rank: int
    weight_error: float  # |W - W'|_F / |W|_F
    output_error: float | None  # |x (W - W')^T| / |x W^T| on its inputs; None: it saw none


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found."""

    folder: str
    files: dict[str, str]  # name to "as written", "changed", "missing", or "not recorded"
    tokens: int  # that were run through the model
    layers: tuple[LayerCheck, ...] = ()  # where there is a dense model to compare with
    broken: tuple[str, ...] = ()  # files that changed, numbers that are none: one sentence each
    far: tuple[str, ...] = ()  # layers that are no nearer to the dense ones than zeros are

    @property
    def problems(self) -> tuple[str, ...]:
        """All of these; none: all is well."""
        return (*self.broken, *self.far)

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**asdict(self), "problems": list(self.problems)}

    def summary(self) -> str:
        """A few lines."""
        counts: dict[str, int] = {}
        for state in self.files.values():
            counts[state] = counts.get(state, 0) + 1
        told = ", ".join(f"{count} {state}" for state, count in counts.items())
        rows = [f"files    {told}", f"run      {self.tokens} tokens, all outputs finite"]
        if any("NaN or Inf" in problem for problem in self.problems):
            rows[-1] = f"run      {self.tokens} tokens"
        errors = [each.output_error for each in self.layers if each.output_error is not None]
        if errors:
            worst = max(self.layers, key=lambda each: each.output_error or 0)
            rows.append(
                f"layers   {len(self.layers)}, outputs off by {min(errors):.1%} to "
                f"{max(errors):.1%} ({worst.name})"
            )
        rows += [f"PROBLEM  {problem}" for problem in self.problems]
        return "\n".join(rows)


def verify(
    folder: str | PathLike[str],
    against: str | PathLike[str] | None = None,
    *,
    text: Any = None,
    tokenizer: Any = None,
    samples: int = 4,
    seed: int = 0,
    stream: bool = False,
) -> Verification:
    """Check a folder that soco wrote: its files, its numbers, and its layers.

    Files are compared with the checksums that were written with them; the model is loaded, which
    checks names and shapes, and run. With ``against``, every layer is compared with the dense one:
    the weight, and the outputs on what the layer is given in the compressed model. The dense model
    is never in memory, but for one weight at a time.

    Args:
        folder: of a compressed model.
        against: the folder of the dense model.
        text: what is run, the beginning of what ``soco.compress`` takes as calibration; None:
            random tokens, which are far from what layers are compressed for.
        tokenizer: needed where the text is text.
        samples: sequences of 128 tokens, or as long as the rows of a tensor.
        seed: of random tokens.
        stream: whether the compressed model is not loaded, either: it runs with one block in memory
            (``soco.blockwise``).

    Returns:
        What was found; ``problems`` is empty if all is well. A problem is a file that was changed
        or is missing, a NaN or Inf, or a layer that is not nearer to the dense one than zeros are.

    Raises:
        ValueError: the folder does not load, or the dense model is another one: a layer is missing
            there or has another shape.
    """
    place = Path(folder)
    opened = _Stored(place) if stream else _Loaded(place)
    files = _files(place)
    broken = [f"{name} is {state}" for name, state in files.items() if state in _BAD]
    nan = [
        f"{name} holds NaN or Inf"
        for name, tensor in opened.tensors()
        if tensor.is_floating_point() and not all_finite(tensor)
    ]
    layers = low_rank_layers(opened.model)
    errors = None
    if against is not None:
        dense = StoredModel(against)
        dense.split_experts()
        _check_same_model(dense, layers)
        errors = _Errors(dense, layers)
    ids = _ids(opened.model, text, tokenizer, samples, seed)
    if nan and stream:  # such a model is not lent
        return Verification(str(place), files, 0, (), (*broken, *nan))
    with opened.running() as model, frozen(model), torch.no_grad(), errors or nullcontext():
        output = run_model(model, ids)
    held = getattr(output, "logits", None)
    held = output[0] if held is None else held
    if not all_finite(held) and not nan:
        nan = ["the outputs of the model hold NaN or Inf: it overflows in its dtype"]
    checks = () if errors is None else errors.checks(opened.whole)
    far = [
        f"{each.name} is no nearer to the dense layer than zeros are: its outputs are off by "
        f"{each.output_error:.0%}"
        for each in checks
        if each.output_error is not None and not each.output_error < 1
    ]
    return Verification(
        str(place), files, ids.numel(), checks, (*broken, *nan), tuple(far)
    )  # fmt: skip


class _Loaded:
    """A compressed model in memory."""

    def __init__(self, folder: Path) -> None:
        self.model = load(folder)

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """All there are, by name."""
        return self.model.state_dict().items()

    def running(self) -> AbstractContextManager[nn.Module]:
        """Inside, the model runs."""
        return nullcontext(self.model)

    def whole(self, layer: CompressedLinear) -> AbstractContextManager[None]:
        """Inside, the layer has all of its values."""
        return nullcontext()


class _Stored:
    """The same, not loaded: one block of it is in memory."""

    def __init__(self, folder: Path) -> None:
        self._stored = compressed_model(folder)
        self.model: nn.Module = self._stored.model

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        for key in self._stored.entries:
            yield key, self._stored.read(key, floating=False)

    def running(self) -> AbstractContextManager[nn.Module]:
        return lent(self._stored)

    def whole(self, layer: CompressedLinear) -> AbstractContextManager[None]:
        wanted = {*layer.parameters(), *layer.down.parameters()}
        names = [name for name, p in self.model.named_parameters() if p in wanted]
        return self._stored.in_memory(names, self._stored.dtype, torch.device("cpu"))


_BAD = ("changed", "missing")


def _files(folder: Path) -> dict[str, str]:
    """What became of the files that there are checksums of, and of weights that have none."""
    recorded: dict[str, Any] = {}
    if (folder / CHECKSUMS).is_file():
        recorded = read_json(folder / CHECKSUMS)
    found = checksums(folder)
    states = {name: "missing" for name in recorded if name not in found}
    for name, value in found.items():
        known = recorded.get(name)
        same = "as written" if known == value else "changed"
        states[name] = "not recorded" if known is None else same
    return dict(sorted(states.items()))


def _check_same_model(stored: StoredModel, layers: dict[str, CompressedLinear]) -> None:
    modules = dict(stored.model.named_modules())
    for name, layer in layers.items():
        if name not in modules or not is_linear(modules[name]):
            raise ValueError(f"{stored.folder} is another model: it has no layer {name}")
        shape, expected = shape_of(modules[name]), (layer.out_features, layer.in_features)
        if shape != expected:
            raise ValueError(
                f"{stored.folder} is another model: {name} has shape {shape} there, and stands for "
                f"{expected} here"
            )


def _ids(model: nn.Module, text: Any, tokenizer: Any, samples: int, seed: int) -> Tensor:
    length = min(LENGTH, context_length(model) or LENGTH)
    vocabulary = vocab_size(model) or 2
    if text is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, vocabulary, (samples, length), generator=generator)
    if isinstance(text, Tensor) and text.dim() == 2:
        length = text.shape[1]
    ids = token_ids(
        text, tokenizer, tokens=samples * length, vocab_size=vocabulary, name="verification"
    )  # fmt: skip
    return cut_windows(ids, min(length, ids.shape[-1]), name="verification")[:samples]


class _Errors:
    """Inside, every layer's outputs are compared with what the dense layer gives."""

    def __init__(self, stored: StoredModel, layers: dict[str, CompressedLinear]) -> None:
        self.stored, self.layers = stored, layers
        self.sums: dict[str, list[float]] = {}  # |x (W - W')^T|^2 and |x W^T|^2
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        for name, layer in self.layers.items():
            self.hooks.append(layer.register_forward_hook(self._hook(name)))

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def compare(layer: CompressedLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].float()
            weight = self.stored.weight(name)
            dense = x @ weight.mT.float()
            bias = 0 if layer.bias is None else layer.bias.float()
            gap = output.float() - bias - dense
            sums = self.sums.setdefault(name, [0.0, 0.0])
            sums[0] += gap.double().square().sum().item()
            sums[1] += dense.double().square().sum().item()

        return compare

    @torch.no_grad()
    def checks(
        self, whole: Callable[[CompressedLinear], AbstractContextManager[None]]
    ) -> tuple[LayerCheck, ...]:
        """Layer by layer, which ``whole`` brings into memory."""
        found = []
        for name, layer in self.layers.items():
            dense = self.stored.weight(name).float()
            check_finite(f"{self.stored.folder}: {name}.weight", dense)
            with whole(layer):
                gap = torch.linalg.norm(dense - layer.to_linear().weight.float())
            weight = float(gap / torch.linalg.norm(dense).clamp_min(1e-30))
            output = None
            if name in self.sums:
                squared, total = self.sums[name]
                output = math.sqrt(squared / total) if total > 0 else math.sqrt(squared)
            found.append(LayerCheck(name, layer.rank, weight, output))
        return tuple(found)
