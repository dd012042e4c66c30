"""What layers see behind compressed blocks, beside what they see in the dense model."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from soco.objectives import run_model
from soco.surgery import replaced, transformer_blocks


@dataclass(frozen=True)
class Behind:
    """The inputs of one layer in two models, over the same tokens."""

    gram: Tensor  # (in, in), float64: X X^T per calibration token, X behind compressed blocks
    cross: Tensor  # (in, in), float64: X0 X^T likewise, X0 the inputs in the dense model
    tokens: int  # that the layer saw behind compressed blocks
    aligned: bool  # False: the layer sees other tokens than in the dense model; cross is gram


class _EnoughError(Exception):
    """The block has run; nothing behind it matters."""


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


@torch.no_grad()
def collect_behind(
    model: nn.Module,
    dense: Mapping[str, nn.Module],
    block: nn.Module,
    names: list[str],
    windows: Tensor,
    batch_size: int,
) -> dict[str, Behind]:
    """Run the windows through the dense and through the partly compressed model, side by side.

    Nothing is kept of one batch when the next begins. Both runs end behind the block where that is
    called once; together with all other blocks that is about as many block runs as there are blocks
    squared.

    Args:
        model: with compressed layers in place of those in the blocks before ``block``.
        dense: name to dense layer, of every layer that may be compressed.
        block: the one whose layers are meant.
        names: its layers, which are still dense.
        windows: token ids (sequences, length), on the CPU.
        batch_size: sequences at a time.

    Returns:
        name to what the layer saw. A layer that saw nothing has zeros.

    Raises:
        ValueError: the inputs of a layer hold NaN or Inf.
    """
    device = next(model.parameters()).device
    changed = {n: layer for n, layer in dense.items() if model.get_submodule(n) is not layer}
    seen: dict[str, list[Tensor]] = {}
    calls = 0

    def observe(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, []).append(inputs[0].detach().reshape(-1, inputs[0].shape[-1]))

        return hook

    def count(module: nn.Module, inputs: object, outputs: object) -> None:
        nonlocal calls
        calls += 1
        if stop:
            raise _EnoughError

    sums: dict[str, list[Tensor]] = {}
    tokens = dict.fromkeys(names, 0)
    unaligned: set[str] = set()
    stop = False
    hooks = [dense[name].register_forward_pre_hook(observe(name)) for name in names]
    hooks.append(block.register_forward_hook(count))
    try:
        for ids in windows.split(batch_size):
            ids = ids.to(device)
            runs = []
            for newcomers in (changed, {}):  # the dense model, then as it is
                seen = {}
                with replaced(model, newcomers):
                    calls = 0
                    with suppress(_EnoughError):
                        run_model(model, ids)
                    stop = calls == 1 and block is not model
                runs.append(seen)
            before, behind = runs
            for name, inputs in behind.items():
                x = torch.cat(inputs).float()
                x0 = torch.cat(before[name]).float() if name in before else None
                size = x.shape[-1]
                total = sums.setdefault(
                    name,
                    [torch.zeros(size, size, dtype=torch.float64, device=x.device) for _ in "gc"],
                )
                total[0].add_((x.mT @ x).double())
                tokens[name] += len(x)
                # An expert sees the tokens that were sent to it, which may be others in each model.
                if x0 is None or len(x0) != len(x) or len(x) % ids.numel():
                    unaligned.add(name)
                else:
                    total[1].add_((x0.mT @ x).double())
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: _result(name, sums.get(name), dense[name], tokens[name], name in unaligned, windows)
        for name in names
    }


def _result(
    name: str,
    sums: list[Tensor] | None,
    module: nn.Module,
    tokens: int,
    unaligned: bool,
    windows: Tensor,
) -> Behind:
    if sums is None:
        weight = next(module.parameters())
        size = getattr(module, "in_features", None) or getattr(module, "nx")  # noqa: B009
        empty = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
        return Behind(empty, empty, 0, False)
    gram, cross = (total / windows.numel() for total in sums)
    if not bool(torch.isfinite(gram).all()):
        raise ValueError(
            f"the inputs of {name} hold NaN or Inf behind the compressed blocks: the ratio is too "
            f"high for this model, or it overflows in its dtype"
        )
    return Behind(gram, gram if unaligned else cross, tokens, not unaligned)
