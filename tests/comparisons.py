"""A comparison that nobody has run, for tests of its record, its pictures and its report."""

import math

from soco.ranks import layer_params
from soco.record import Comparison

KINDS = {"attn.q_proj": [8, 8], "attn.k_proj": [4, 8], "mlp.up_proj": [16, 8]}


def made_up(methods=("svd", "svd-llm", "soco"), ratios=(0.2, 0.4), blocks=2, **changes):
    """Later methods are better; the best one keeps some layers dense."""
    shapes = {f"model.layers.{i}.{k}": list(s) for i in range(blocks) for k, s in KINDS.items()}
    total = sum(a * b for a, b in shapes.values())
    rows = [
        row(method, ratio, (len(methods) - i) * 2 * ratio, shapes)
        for ratio in ratios
        for i, method in enumerate(methods)
    ]
    parts = {
        "setup": {
            "model": "made-up",
            "class": "LlamaForCausalLM",
            "dtype": "float32",
            "layers": len(shapes),
            "calibration": {"source": "train.txt", "sequences": 8, "length": 16, "seed": 0},
            "texts": {
                "valid.txt": {"windows": 4, "tokens": 64},
                "other.txt": {"windows": 4, "tokens": 64},
            },
        },
        "dense": {
            "perplexity": 4.0,
            "kl": None,
            "top1": None,
            "distance": None,
            "tokens": 60,
            "texts": {"other.txt": {"perplexity": 9.0, "kl": None, "distance": None}},
            "kept_params": total,
            "target_params": total,
            "params": total + 100,
            "bytes": 4 * (total + 100),
        },
        "rows": tuple(rows),
        "shapes": shapes,
        "spectra": {
            f"model.layers.1.{kind}": {
                "at": list(range(1, min(shape) + 1)),
                "plain": [math.exp(-i) for i in range(min(shape))],
                "whitened": [math.exp(-2 * i) for i in range(min(shape))],
            }
            for kind, shape in KINDS.items()
        },
        "machine": {"cpu": "a cpu", "cores": 2},
        "date": "2026-01-01T00:00:00+00:00",
        "command": "soco compare made-up",
        "warnings": ("few tokens",),
    }
    return Comparison(**{**parts, **changes})


def row(method, ratio, kl, shapes):
    """A row with a given KL, whose ranks are within the ratio."""
    first = next(iter(shapes))
    ranks: dict[str, int | None] = {
        name: max(1, int((1 - ratio) * a * b / (a + b))) for name, (a, b) in shapes.items()
    }
    if method == "soco":
        ranks = {name: None if name == first else 1 for name in ranks}
    params = {
        name: layer_params((a, b), min(a, b) if (rank := ranks[name]) is None else rank)
        for name, (a, b) in shapes.items()
    }
    total = sum(a * b for a, b in shapes.values())
    kept = int(total * (1 - ratio))
    return {
        "method": method,
        "ratio": ratio,
        "perplexity": 4.0 * math.exp(kl),
        "kl": kl,
        "top1": math.exp(-kl),
        "distance": None,
        "tokens": 60,
        "texts": {"other.txt": {"perplexity": 9 * math.exp(kl), "kl": 2 * kl, "distance": None}},
        "kept_params": kept,
        "target_params": total,
        "removed": 1 - kept / total,
        "bytes": 4 * (kept + 100),
        "seconds": 1.5,
        "peak_bytes": 10**8,
        "peak_of": "process",
        "ranks": ranks,
        "params": params,
        "warnings": [],
    }


def failed(method, ratio, error="no such rank"):
    """A row of a method that could not do it."""
    return {"method": method, "ratio": ratio, "error": error}
