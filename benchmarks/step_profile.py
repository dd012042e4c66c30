"""Where the time of soco's training goes: all operations of one, by what they are for.

    python benchmarks/step_profile.py --data DIR --output benchmarks/results/step-profile.json

Text, statistics and decomposition are in it; what they take is written beside it (``seconds``).
"""

import argparse
import resource
from collections import Counter
from pathlib import Path

import torch
from protocol import LENGTH, TEXTS, write_record
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import soco
from soco.methods import SoCo

GROUPS = {
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention"),
    "softmax over the vocabulary": ("aten::_log_softmax",),
    "divergence and drawn labels": ("aten::exp", "aten::cumsum", "aten::searchsorted", "_Diverg"),
    "scores (soco's operator)": ("soco::", "GeneratedBackwardFor_soco"),
    "statistics and decomposition": ("aten::_linalg", "aten::linalg"),
    "elementwise": (
        "aten::mul", "aten::add", "aten::sub", "aten::sum", "aten::silu", "aten::pow", "aten::div",
        "aten::neg", "aten::mean", "aten::rsqrt",
    ),
}  # fmt: skip


def group_of(operation: str) -> str:
    """What an operation is for."""
    for group, names in GROUPS.items():
        if operation.startswith(names):
            return group
    return "copies, indices, the rest"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of models and texts")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--models", nargs="*", default=["books-llama-6m", "stories260K"])
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        folder = arguments.data / "models" / name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            soco.compress(
                model, arguments.ratio, method=SoCo(steps=arguments.steps),
                tokenizer=PreTrainedTokenizerFast.from_pretrained(folder),
                calibration=arguments.data / TEXTS[name][0], samples=arguments.samples,
                length=LENGTH, progress=False,
            )  # fmt: skip
        spent: Counter[str] = Counter()
        for event in found.key_averages():
            spent[group_of(event.key)] += int(event.self_cpu_time_total)
        whole = sum(spent.values())
        rows.append(
            {
                "model": name,
                "ratio": arguments.ratio,
                "steps": arguments.steps,
                "tokens_per_step": SoCo().batch_size * LENGTH,
                "seconds": soco.report(model).seconds,
                "peak_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "share": {group: round(part / whole, 4) for group, part in spent.most_common()},
            }
        )
        print(name, rows[-1]["seconds"], rows[-1]["share"], flush=True)
    write_record(arguments.output, arguments.data, rows)


if __name__ == "__main__":
    main()
