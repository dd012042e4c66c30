"""Around a compression: the model unharmed when it fails, and what it took."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from soco.memory import give_back_memory, peak_memory, reset_peak
from soco.surgery import bias_of, text_config


@contextmanager
def unchanged_on_error(model: nn.Module, targets: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the model is in evaluation mode and frozen; afterwards both are as before.

    On any exception, Ctrl-C among them, every module and parameter is put back in its place, a head
    that was untied is tied again, and what was written into the configs is gone. Values are not
    copied: nothing inside may write into a weight.

    Layers that are new at the end take over the training flag of the one in whose place they are,
    and its parameters' ``requires_grad``.

    Args:
        model: a transformers model.
        targets: name to module of the layers that may be replaced inside.
    """
    modes = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    flags = {name: _flags(module) for name, module in targets.items()}
    tree = [(m, dict(m._modules), dict(m._parameters)) for m in model.modules()]
    written = [(each, dict(vars(each))) for each in (model, *_configs(model))]
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    except BaseException:
        for module, children, parameters in tree:
            module._modules.update(children)
            module._parameters.update(parameters)
        for each, attributes in written:
            for name in vars(each).keys() - attributes.keys():
                del vars(each)[name]
            vars(each).update(attributes)
        raise
    finally:
        places = dict(model.named_modules(remove_duplicate=False))
        for name, (of_weight, of_bias) in flags.items():
            if name not in places:  # a layer of experts that were fused again
                continue
            now = places[name].train(modes[targets[name]])
            for key, parameter in now.named_parameters():
                parameter.requires_grad_(of_bias if key == "bias" else of_weight)
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode


class Clock:
    """Seconds per phase, and the highest memory use.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        """Start counting the peak anew, where the system can do that."""
        self.seconds: dict[str, float] = {}
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            reset_peak()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase, which may come in several parts; what it freed goes back to the system."""
        begin = time.perf_counter()
        yield
        give_back_memory()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = self.seconds.get(phase, 0.0) + time.perf_counter() - begin
        self.seconds[phase] = round(seconds, 3)

    def peak(self) -> tuple[int, str]:
        """Bytes, and of what: the CUDA device's allocations, or the process's resident memory.

        Since the clock was made; of the process since its start where that cannot be told.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device), str(self.device)
        return peak_memory(), "process"


def _flags(module: nn.Module) -> tuple[bool, bool]:
    """Whether the weight and the bias of a linear layer require a gradient."""
    weight, bias = module.get_parameter("weight"), bias_of(module)
    return weight.requires_grad, (weight if bias is None else bias).requires_grad


def _configs(model: nn.Module) -> list[object]:
    """The configs of a model and its parts, each once."""
    found = [getattr(module, "config", None) for module in model.modules()]
    found.append(text_config(model))
    return list({id(config): config for config in found if config is not None}.values())
