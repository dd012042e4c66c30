"""What the choices of soco's third stage cost: the KL divergence just before and after each.

    python benchmarks/last_cut.py --data DIR --output benchmarks/results/last-cut.json

Measured on held-out text. Under hard masks nothing is cut at the end, and what is measured after
the training is the model as it is stored. With ``--soft`` the preset "paper" as well, which prunes
once, at the end.
"""

import argparse
import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from protocol import LENGTH, SAMPLES, TEXTS, WINDOWS, write_record
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import soco
from soco import training
from soco.choosing import kept_params
from soco.methods import SoCo


def measured(name: str, ratio: float, method: SoCo, data: Path) -> dict[str, Any]:
    """Train, and measure around every choice that is made at the target."""
    folder = data / "models" / name
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = copy.deepcopy(dense)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    choose, cuts = training._choose, []

    def divergence() -> float:
        return soco.evaluate(
            model, data / TEXTS[name][1], tokenizer=tokenizer, dense=dense, length=LENGTH,
            windows=WINDOWS, progress=False,
        ).kl or 0.0  # fmt: skip

    def spy(run: Any, budget: int) -> float:
        living = kept_params(run.layers, run.pivoted)
        before = divergence() if living <= 1.05 * budget or not cuts else None
        changed = choose(run, budget)
        if before is not None:
            cuts.append(
                {
                    "parameters_before": living, "parameters_after": budget,
                    "changed_fraction": changed, "kl_before": before, "kl_after": divergence(),
                }
            )  # fmt: skip
        return changed

    with patch.object(training, "_choose", spy):
        soco.compress(
            model, ratio, method=method, tokenizer=tokenizer, calibration=data / TEXTS[name][0],
            samples=SAMPLES, length=LENGTH, progress=False,
        )  # fmt: skip
    row = {
        "model": name,
        "ratio": ratio,
        "steps": method.steps,
        "basis": method.basis,
        "hard": all(stage.hard for stage in method.stages),
        "choices": cuts,
        "kl_stored": divergence(),
    }
    last = cuts[-1]
    row["last_cut_costs"] = last["kl_after"] / last["kl_before"] - 1
    print(name, ratio, row["hard"], last, row["kl_stored"], flush=True)
    return row


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of models and texts")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--models", nargs="*", default=["stories260K", "babyllama105"])
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.4])
    parser.add_argument("--steps", type=int, default=SoCo().steps)
    parser.add_argument("--soft", action="store_true")
    arguments = parser.parse_args()
    methods = [SoCo(steps=arguments.steps)]
    if arguments.soft:
        methods.append(SoCo.preset("paper", steps=arguments.steps))
    rows = [
        measured(name, ratio, method, arguments.data)
        for name in arguments.models
        for ratio in arguments.ratios
        for method in methods
    ]
    write_record(arguments.output, arguments.data, rows)


if __name__ == "__main__":
    main()
