"""Record `soco compare` on the trained models: every method, one protocol, one file per model.

    python benchmarks/compare.py --data DIR --output benchmarks/results --models babyllama105

``DIR`` holds ``models/``, ``text/`` and ``books/``. Writes ``OUTPUT/compare-MODEL.json``, with the
commit and this command in it. The rows go to ``WORK/compare-MODEL/compare.json`` one by one, and
those that are there already are not made again.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from protocol import LENGTH, OUTSIDE, SAMPLES, TEXTS, WINDOWS, commit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import soco
from soco.comparison import compare
from soco.record import RECORD

SORTING = "gpt-nano-sort-gpt2"  # sorts six digits; it has no tokenizer, and no text
RATIOS = {
    "babyllama105": (0.2, 0.4, 0.6),
    "stories260K": (0.2, 0.4, 0.6),
    "books-llama-6m": (0.2, 0.4, 0.6, 0.8),
    "books-llama-1m": (0.2, 0.4, 0.6, 0.8),
    SORTING: (0.2, 0.4, 0.6, 0.8),
}
METHODS = (
    "svd", "fwsvd", "tfwsvd", "asvd@uniform", "svd-llm", "svd-llm-v2", "adasvd", "basis-sharing",
    "aa-svd", "saes", "svd-surgeon", "svd@energy", "svd-llm@energy", "svd-llm@effective-rank",
    "kfac-svd@uniform", "kfac-svd", "kfac-svd+pivoted", "kfac-svd+surgeon", "asvd",
    "svd-llm@lems", "kfac-svd@lems",
)  # fmt: skip
TRAINED = ("soco:fast", "soco", "soco:best", "kfac-svd+pivoted+refine", "dobi-svd")


def texts(name: str, data: Path) -> dict[str, Any]:
    """What is read, and how much of it: arguments of ``compare``."""
    if name == SORTING:  # a third of all inputs, each with its first five sorted ones behind it
        digits = torch.cartesian_prod(*[torch.arange(3)] * 6)
        rows = torch.cat([digits, digits.sort().values], dim=1)[:, :11]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        seen, unseen = rows[order[:243]], rows[order[243:]]
        return {
            "calibration": seen, "samples": len(seen), "length": 11, "windows": None,
            "text": {"unseen inputs": unseen},
        }  # fmt: skip
    train, valid = TEXTS[name]
    return {
        "calibration": data / train,
        "samples": SAMPLES,
        "length": LENGTH,
        "windows": WINDOWS,
        "text": {Path(each).name: data / each for each in (valid, OUTSIDE)},
        "tokenizer": PreTrainedTokenizerFast.from_pretrained(data / "models" / name),
    }


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of models and texts")
    parser.add_argument("--output", type=Path, required=True, help="folder of the records")
    parser.add_argument("--work", type=Path, default=Path("build/compare"), help="folder of rows")
    parser.add_argument("--models", nargs="*", default=list(RATIOS), choices=list(RATIOS))
    parser.add_argument("--methods", nargs="*", default=[*METHODS, *TRAINED])
    parser.add_argument("--ratios", nargs="*", type=float, help="instead of the model's own")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    made = " ".join(["python", "benchmarks/compare.py", *sys.argv[1:]])
    for folder, called in (
        (arguments.work, "WORK"), (arguments.data, "DIR"), (arguments.output, "benchmarks/results"),
    ):  # fmt: skip
        made = made.replace(str(folder), called)
    made += f" (soco {soco.__version__}, commit {commit()})"
    for name in arguments.models:
        folder = arguments.data / "models" / name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        compare(
            model.to(arguments.device),
            arguments.methods,
            arguments.ratios or RATIOS[name],
            **texts(name, arguments.data),
            output=arguments.work / f"compare-{name}",
            name=name,
            command=made,
            on_row=lambda row: print(
                row["ratio"], row["method"], row.get("perplexity"), row.get("kl"),
                row.get("seconds"), row.get("error", ""), flush=True,
            ),
            tell=print,
            progress=False,
        )  # fmt: skip
        made_of = arguments.work / f"compare-{name}" / RECORD
        shutil.copy(made_of, arguments.output / f"compare-{name}.json")


if __name__ == "__main__":
    main()
