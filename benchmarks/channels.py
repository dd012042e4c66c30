"""How unequal input channels are on the trained models: what diagonal scalings have to work with.

python benchmarks/channels.py --data DIR --output benchmarks/results/channels-DATE.json
"""

import argparse
import json
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
from compare import RUNS
from protocol import LENGTH, commit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import soco
from soco.diagnosis import describe_machine


def row(folder: Path, text: Path) -> dict[str, float]:
    """Medians over the layers of a model, and the largest."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    bench = soco.prepare(
        model,
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder),
        calibration=text,
        samples=32,
        length=LENGTH,
        progress=False,
    )
    bench.statistics({"abs_mean"})
    spread, share, alike = [], [], []
    for name in bench.targets:
        known = bench.means(name)
        spread.append(known["abs_mean"].max() / known["abs_mean"].median())
        values = torch.linalg.eigvalsh(known["gram"])
        share.append(values[-1] / values.sum())
        root = known["gram"].diagonal().sqrt()
        cosines = known["gram"] / root[:, None] / root
        alike.append((cosines - torch.eye(len(root))).abs().mean())
    columns = {"largest over median channel": spread, "top eigenvalue's share": share,
               "mean absolute cosine of two channels": alike}  # fmt: skip
    found = {}
    for title, values in columns.items():
        found[f"{title}, median over layers"] = round(float(torch.stack(values).median()), 4)
        found[f"{title}, largest of all layers"] = round(float(torch.stack(values).max()), 4)
    return found


def main() -> None:
    """Measure all models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    made = " ".join(["python", "benchmarks/channels.py", *sys.argv[1:]])
    made = made.replace(str(arguments.data), "DIR").replace(
        str(arguments.output), f"benchmarks/results/{arguments.output.name}"
    )
    rows = {
        name: row(arguments.data / "models" / name, arguments.data / texts[0])
        for name, texts in RUNS.items()
    }
    result = {
        "machine": describe_machine(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": made,
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
