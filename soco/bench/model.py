"""``soco-bench model``: prefill and decoding of a whole random model, dense and compressed."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from soco.bench.shapes import SHAPES, rank_for
from soco.bench.timing import percentiles
from soco.memory import peak_memory, reset_peak, resident_memory
from soco.modules import LowRankLinear
from soco.optimization import optimize
from soco.packing import weight_bytes
from soco.surgery import find_linears, replace_module, shape_of

STATE = 0.02  # standard deviation of random weights


def random_model(
    shape: str, blocks: int, positions: int, dtype: torch.dtype, device: torch.device,
    kept: float | None,
) -> Any:  # fmt: skip
    """A Llama of this shape with random weights, made where it will run; ``kept`` None: dense."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model: Any = LlamaForCausalLM(SHAPES[shape].config(blocks, positions))
        model.to(dtype)
        if kept is not None:
            for name, layer in find_linears(model).items():
                out, inner = shape_of(layer)
                low = LowRankLinear(
                    inner, out, rank_for(out, inner, kept), bias=False, device="meta", dtype=dtype
                )
                replace_module(model, name, low)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
            else:
                parameter.normal_(std=STATE, generator=generator)
        _fill_buffers(model)
    return model.eval().requires_grad_(False)


def _fill_buffers(model: Any) -> None:
    """What is computed from the configuration (rotary frequencies) anew; sentinels are zero."""
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(model.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                getattr(module, name).copy_(buffer)
        elif isinstance(module, LowRankLinear):
            module.weight.zero_()


def variants(
    shape: str, blocks: int, positions: int, dtype: torch.dtype, device: torch.device,
    kept: Sequence[float], names: Sequence[str],
) -> Iterator[tuple[str, float | None, Callable[[], Any]]]:  # fmt: skip
    """What is measured: name, fraction kept (None for dense), and how the model is made."""

    def make(fraction: float | None, way: str) -> Any:
        model = random_model(shape, blocks, positions, dtype, device, fraction)
        if way == "pairs":
            for layer in model.modules():
                if isinstance(layer, LowRankLinear):
                    setattr(layer, "forward", nn.Sequential(layer.down, layer.up).forward)  # noqa: B010
        elif way != "dense":
            eight = way if way in ("int8", "float8") else None
            optimize(model, weights=eight)
        return model

    if "dense" in names:
        yield "dense", None, lambda: make(None, "dense")
    for fraction in kept:
        for name in names:
            if name != "dense":
                yield name, fraction, lambda fraction=fraction, name=name: make(fraction, name)


@torch.no_grad()  # a compiler wants no inference mode
def measure(
    shape: str,
    blocks: int,
    kept: Sequence[float],
    names: Sequence[str],
    modes: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    prompt: int,
    generated: int,
    batch: int,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """One row per model and mode; the models are in memory one after the other."""
    positions = prompt + generated + 1
    for name, fraction, make in variants(shape, blocks, positions, dtype, device, kept, names):
        gc.collect()
        before = _forget_peak(device)
        model = make()
        size = weight_bytes(model)
        ids = torch.randint(SHAPES[shape].vocabulary, (batch, prompt), device=device)
        for mode in modes:
            step = _step(model, mode)
            first, times = [], []
            for _ in range(repeats + 1):
                run = _generate(model, step, ids, generated, mode, positions)
                first.append(run["first"])
                times += run["steps"]
            first, times = first[1:], times[generated - 1 :]  # without what happens once
            decode = percentiles(times)
            yield {
                "shape": shape,
                "blocks": blocks,
                "model": name,
                "kept": fraction,
                "mode": mode,
                "dtype": str(dtype).removeprefix("torch."),
                "batch": batch,
                "prompt": prompt,
                "generated": generated,
                "time_to_first_token": percentiles(first),
                "prefill_tokens_per_s": round(
                    batch * prompt / percentiles(first)["median_us"] * 1e6, 1
                ),
                "decode_step": decode,
                "decode_tokens_per_s": round(batch / decode["median_us"] * 1e6, 2),
                "parameter_bytes": size,
                "peak_bytes": _peak(device, before),
            }
        del model


def _step(model: Any, mode: str) -> Callable[..., Tensor]:
    """One call of the model that gives the next token's logits."""

    def step(ids: Tensor, cache: Any, position: Tensor) -> Tensor:
        found = model(
            input_ids=ids, past_key_values=cache, cache_position=position, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        return found.logits[:, -1]

    if mode == "eager":
        return step
    kind = "reduce-overhead" if mode == "graphed" else "max-autotune-no-cudagraphs"
    return torch.compile(step, mode=kind, fullgraph=True)


def _generate(
    model: Any, step: Callable[..., Tensor], ids: Tensor, generated: int, mode: str, positions: int
) -> dict[str, Any]:
    """Greedy decoding with a cache, every token timed."""
    from transformers import DynamicCache, StaticCache

    device = ids.device
    if mode == "eager":
        cache: Any = DynamicCache(config=model.config)
    else:
        cache = StaticCache(config=model.config, max_cache_len=positions)
    eager = _step(model, "eager")  # the prompt is one call, and of another shape

    def timed(run: Callable[..., Tensor], given: Tensor, start: int) -> tuple[Tensor, float]:
        position = torch.arange(start, start + given.shape[1], device=device)
        begin = time.perf_counter()
        token = run(given, cache, position).argmax(-1, keepdim=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return token, time.perf_counter() - begin

    token, first = timed(eager, ids, 0)
    steps = []
    for index in range(generated - 1):
        token, seconds = timed(step, token.clone(), ids.shape[1] + index)
        steps.append(seconds)
    return {"first": first, "steps": steps}


def _forget_peak(device: torch.device) -> int | None:
    """Let the peak of memory begin anew.

    Returns:
        What is not the model's: the bytes of the process as they are; None where the system does
        not tell.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    return resident_memory() if reset_peak() else None


def _peak(device: torch.device, before: int | None) -> int | None:
    """The most memory that was held since: on a GPU by torch, on the CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return None if before is None else peak_memory() - before
