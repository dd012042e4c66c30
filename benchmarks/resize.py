"""How close the sizes of one training are to trainings of their own: `soco.resize`, measured.

    python benchmarks/resize.py --data DIR --output benchmarks/results/resize.json

One training is for the ``--ratios``, and for those in between that soco adds by itself; all others
are interpolated. For each ratio, and for each of ``--others``, a model is trained alone as well,
with as many steps as the one training has for its first size.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from protocol import LENGTH, OUTSIDE, SAMPLES, TEXTS, WINDOWS, write_record
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import soco
from soco.methods import SoCo
from soco.resizing import spectrum_of


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of models and texts")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--models", nargs="*", default=["babyllama105", "stories260K"])
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.2, 0.4, 0.6])
    parser.add_argument("--others", nargs="*", type=float, default=[0.208, 0.33, 0.49])
    parser.add_argument("--steps", type=int, default=SoCo().steps)
    parser.add_argument("--spacing", type=float, default=SoCo().spacing)
    arguments = parser.parse_args()
    rows = [row for name in arguments.models for row in measured(name, arguments)]
    write_record(arguments.output, arguments.data, rows)


def measured(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every ratio of one model, from the one training and from its own."""
    folder = arguments.data / "models" / name
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    train, valid = (arguments.data / text for text in TEXTS[name])

    def compressed(ratio: Any) -> tuple[Any, float]:
        model = copy.deepcopy(dense)
        begin = time.perf_counter()
        soco.compress(
            model, ratio, method=SoCo(steps=arguments.steps, spacing=arguments.spacing),
            tokenizer=tokenizer, calibration=train, samples=SAMPLES, length=LENGTH, progress=False,
        )  # fmt: skip
        return model, time.perf_counter() - begin

    def divergences(model: Any) -> dict[str, Any]:
        texts = {"kl": valid, "kl_outside": arguments.data / OUTSIDE}
        return {
            kind: soco.evaluate(
                model, text, tokenizer=tokenizer, dense=dense, length=LENGTH, windows=WINDOWS,
                progress=False,
            ).kl
            for kind, text in texts.items()
        }  # fmt: skip

    model, seconds = compressed(arguments.ratios)
    trained = spectrum_of(model).ratios
    rows = []
    for ratio in sorted([*arguments.ratios, *arguments.others]):
        soco.resize(model, ratio=ratio)
        one = divergences(model)
        params = soco.report(model).params_after
        alone, own_seconds = compressed(ratio)
        own = divergences(alone)
        rows.append(
            {
                "model": name,
                "ratio": ratio,
                "station": ratio in trained,
                "one_training": one,
                "own_training": own,
                "kl_ratio": one["kl"] / own["kl"],
                "kl_outside_ratio": one["kl_outside"] / own["kl_outside"],
                "params": {"one": params, "own": soco.report(alone).params_after},
                "steps": arguments.steps,
                "spacing": arguments.spacing,
                "stations": trained,
                "seconds": {"one_training_all": round(seconds, 1), "own": round(own_seconds, 1)},
            }
        )
        print(name, ratio, round(one["kl"], 5), round(own["kl"], 5), flush=True)
    return rows


if __name__ == "__main__":
    main()
