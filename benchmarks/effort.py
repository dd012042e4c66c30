"""What the efforts of soco cost: seconds against svd-llm and against a pass over the calibration.

    python benchmarks/effort.py --data DIR --output benchmarks/results/effort-NAME.json

Every method runs ``--rounds`` times in turn from the same model and text, statistics and
decomposition included; medians are written. An epoch is one pass over the calibration with the
losses and gradients of soco's training (at full rank, as it begins), measured in the same rounds.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from protocol import LENGTH, SAMPLES, TEXTS, write_record
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import soco
from soco.methods import SoCo
from soco.stages import Stage

METHODS = {
    "svd-llm": {"method": "svd-llm"},
    "kfac-svd": {"method": "kfac-svd"},
    "soco:fast": {"effort": "fast"},
    "soco": {"effort": "balanced"},
}


def epoch(method: SoCo, samples: int) -> SoCo:
    """One step for every batch of the calibration, with nothing pruned on the way."""
    stage = Stage("epoch", share=1.0, hard=False)
    return SoCo(steps=samples // method.batch_size, fisher_warmup=1, stages=(stage,))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of models and texts")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--models", nargs="*", default=["babyllama105", "books-llama-6m"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        folder = arguments.data / "models" / name
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        text = arguments.data / TEXTS[name][0]
        seconds: dict[str, list[float]] = {}
        phases: dict[str, list[dict[str, float]]] = {}
        for turn in range(arguments.rounds):
            for label in [*arguments.methods, "epoch"]:
                given = METHODS.get(label) or {"method": epoch(SoCo(), SAMPLES)}
                model = copy.deepcopy(dense)
                begin = time.perf_counter()
                soco.compress(
                    model, arguments.ratio, tokenizer=tokenizer, calibration=text,
                    samples=SAMPLES, length=LENGTH, progress=False, **given,
                )  # fmt: skip
                whole = time.perf_counter() - begin
                spent = soco.report(model).seconds
                seconds.setdefault(label, []).append(
                    spent["training"] if label == "epoch" else whole
                )
                phases.setdefault(label, []).append(spent)
                print(name, turn, label, round(seconds[label][-1], 2), flush=True)
        middle = {label: statistics.median(found) for label, found in seconds.items()}
        allowed = 2 * middle["svd-llm"] + 0.1 * middle["epoch"]
        rows.append(
            {
                "model": name,
                "ratio": arguments.ratio,
                "seconds": middle,
                "rounds": seconds,
                "phases": {
                    label: {
                        phase: statistics.median(each.get(phase, 0.0) for each in found)
                        for phase in found[0]
                    }
                    for label, found in phases.items()
                },
                "fast_over_twice_svd_llm_and_a_tenth_of_an_epoch": middle["soco:fast"] / allowed,
            }
        )
        print(name, {k: round(v, 2) for k, v in middle.items()}, "allowed", round(allowed, 2))
    write_record(arguments.output, arguments.data, rows)


if __name__ == "__main__":
    main()
