"""Around a compression: the model unharmed when it fails, and what it took."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from soco.surgery import bias_of, replace_module


@contextmanager
def unchanged_on_error(model: nn.Module, targets: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the model is in evaluation mode and frozen; afterwards both are as before.

    On any exception, Ctrl-C among them, the layers in ``targets`` are put back in their places with
    the weights they had, and a head that was untied is tied again.

    Args:
        model: a transformers model.
        targets: name to module of the layers that may be replaced inside.
    """
    modes = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    weights = {n: (cast(nn.Parameter, m.weight), bias_of(m)) for n, m in targets.items()}
    configs = [c for c in (getattr(model, "config", None), _text_config(model)) if c is not None]
    ties = [getattr(config, "tie_word_embeddings", None) for config in configs]
    tied_keys = getattr(model, "all_tied_weights_keys", None)
    mode = model.training
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    except BaseException:
        for name, module in targets.items():
            module.weight, bias = weights[name]
            if bias is not None:
                module.bias = bias
            replace_module(model, name, module)
        for config, tie in zip(configs, ties, strict=True):
            if tie is not None:
                setattr(config, "tie_word_embeddings", tie)  # noqa: B010 - of any config class
        if tied_keys is not None:
            model.all_tied_weights_keys = tied_keys  # type: ignore[assignment]
        raise
    finally:
        for name, (weight, _) in weights.items():
            for parameter in model.get_submodule(name).parameters():
                parameter.requires_grad_(required.get(weight, True))  # new ones as the old one
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
        for module in model.modules():
            module.training = modes.get(module, mode)


class Clock:
    """Seconds per phase, and the highest memory use.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        """Start counting the peak of a CUDA device anew."""
        self.seconds: dict[str, float] = {}
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase."""
        begin = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = round(time.perf_counter() - begin, 3)

    def peak(self) -> tuple[int, str]:
        """Bytes, and of what: the CUDA device's allocations, or the process since its start."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device), str(self.device)
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"


def _text_config(model: nn.Module) -> object:
    getter = getattr(getattr(model, "config", None), "get_text_config", None)
    return None if getter is None else getter(decoder=True)
