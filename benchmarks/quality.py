"""Measure what compression costs: perplexity and KL of every method on trained models.

    python benchmarks/quality.py --data DIR --output benchmarks/results/quality-NAME.json

``DIR`` holds ``models/``, ``text/`` and ``books/`` as the table ``RUNS`` names them. Every method
gets the same calibration windows and the same evaluation windows, and each row says how many
parameters were really kept. Rows that the output file has already are not run again.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import soco
from soco.diagnosis import describe_machine
from soco.methods import SVD, SVDLLM, SoCo
from soco.stages import STAGES, Stage

STORIES = ("text/tinystories_train_sample.clean.txt", "text/tinystories_valid_a.txt")
BOOKS = (
    "books/george-eliot_middlemarch.txt.gz",
    "books/arthur-conan-doyle_the-adventures-of-sherlock-holmes.txt.gz",
)
# model: calibration text, evaluation text, ratios
RUNS = {
    "babyllama105": (*STORIES, (0.2, 0.4, 0.6)),
    "stories260K": (*STORIES, (0.2, 0.4, 0.6)),
    "books-llama-6m": (*BOOKS, (0.6, 0.8)),
}
LENGTH, SAMPLES, WINDOWS = 256, 256, 100
CLOSED = {
    "svd, uniform ranks": (SVD(), "uniform"),
    "svd, energy ranks": (SVD(), "energy"),
    "svd-llm, uniform ranks": (SVDLLM(), "uniform"),
    "svd-llm, energy ranks": (SVDLLM(), "energy"),
}

# What each choice in soco is worth: one thing changed at a time.
TRIALS = {
    "soco": SoCo(),
    "seed 1": SoCo(seed=1),
    "seed 2": SoCo(seed=2),
    "choice only, no training (1 step)": SoCo(
        steps=1, fisher_warmup=32, stages=(Stage("choice", share=1.0, rate_begin=0, rate_end=0),)
    ),
    "120 steps": SoCo(steps=120),
    "480 steps": SoCo(steps=480),
    "no second stage": SoCo(
        stages=(replace(STAGES[0], share=0.55), replace(STAGES[2], share=0.45))
    ),
    "largest score 4": SoCo(largest_score=4.0),
    "learning rate 0.05": SoCo(learning_rate=0.05),
    "deviation": SoCo(deviation="vector"),
    "plain basis": SoCo(basis="plain"),
    "criterion score": SoCo(criterion="score"),
    "cross-entropy 0.5": SoCo(
        stages=tuple(replace(s, divergence=0.5, cross_entropy=0.5) for s in STAGES)
    ),
    "sparsity 0.1 in the third stage": SoCo(stages=(*STAGES[:2], replace(STAGES[2], sparsity=0.1))),
    "paper preset": SoCo.paper(),
    "paper preset, whitened basis": SoCo.paper(basis="whitened"),
}


def commit() -> str:
    """The commit this runs from, marked when files were changed since."""
    described = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()


def measure(arguments: argparse.Namespace, name: str, methods: dict, done: dict) -> None:
    """All rows of one model."""
    train, valid, ratios = RUNS[name]
    folder = arguments.data / "models" / name
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def load() -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.to(arguments.device)

    def score(model: torch.nn.Module, dense: torch.nn.Module | None) -> soco.Evaluation:
        return soco.evaluate(
            model,
            arguments.data / valid,
            tokenizer=tokenizer,
            dense=dense,
            length=LENGTH,
            windows=WINDOWS,
            progress=False,
        )

    dense = load()
    reference = score(dense, None)
    for ratio in arguments.ratios or ratios:
        for label, (method, rule) in methods.items():
            key = (name, ratio, label)
            if key in done:
                continue
            model = load()
            begin = time.perf_counter()
            soco.compress(
                model,
                ratio,
                method=method,
                allocator=rule,
                tokenizer=tokenizer,
                calibration=arguments.data / train,
                samples=SAMPLES,
                length=LENGTH,
                progress=False,
            )
            seconds = time.perf_counter() - begin
            found, report = score(model, dense), soco.report(model)
            done[key] = {
                "model": name,
                "ratio": ratio,
                "method": label,
                "perplexity": found.perplexity,
                "kl": found.kl,
                "top1": found.top1,
                "dense_perplexity": reference.perplexity,
                "kept_params": report.params_after,
                "target_params": report.params_before,
                "removed": report.removed,
                "layers_kept_dense": sum(layer.rank is None for layer in report.layers),
                "model_bytes": report.model_bytes_after,
                "model_bytes_before": report.model_bytes_before,
                "seconds": round(seconds, 2),
                "calibration": report.calibration,
                "settings": report.settings,
                "evaluation": {"text": valid, "windows": found.windows, "tokens": found.tokens},
            }
            write(arguments, done)
            row = done[key]
            print(
                f"{name} {ratio} {label}: perplexity {row['perplexity']:.3f} "
                f"(dense {row['dense_perplexity']:.3f}), KL {row['kl']:.4f}, removed "
                f"{row['removed']:.4f}, {seconds:.0f} s",
                flush=True,
            )


def write(arguments: argparse.Namespace, done: dict) -> None:
    """Write all rows so far."""
    result = {
        "machine": describe_machine(arguments.device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": arguments.command,
        "rows": list(done.values()),
    }
    partial = arguments.output.with_suffix(".tmp")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(arguments.output)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of models and texts")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--models", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ratios", nargs="*", type=float, help="only these")
    parser.add_argument("--trials", action="store_true", help="variants of soco, not the methods")
    arguments = parser.parse_args()
    command = " ".join(["python", "benchmarks/quality.py", *sys.argv[1:]])
    output = f"benchmarks/results/{arguments.output.name}"
    arguments.command = command.replace(str(arguments.data), "DIR").replace(
        str(arguments.output), output
    )
    methods = {**CLOSED, "soco": (SoCo(), None)}
    if arguments.trials:
        methods = {label: (method, None) for label, method in TRIALS.items()}
    done = {}
    if arguments.output.exists():
        rows = json.loads(arguments.output.read_text())["rows"]
        done = {(row["model"], row["ratio"], row["method"]): row for row in rows}
    for name in arguments.models:
        measure(arguments, name, methods, done)


if __name__ == "__main__":
    main()
