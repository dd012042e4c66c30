"""Measure the stages that follow a truncation: choice by saliency, svd-surgeon, refine.

    python benchmarks/stages.py --data DIR --output benchmarks/results/stages-NAME.json

``DIR`` is the one of ``quality.py``, whose texts, windows and record it uses. Every row is one
model, one truncation and what was done after it.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from quality import LENGTH, RUNS, SAMPLES, WINDOWS, write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import soco
from soco.calibration import collect
from soco.data import token_windows
from soco.linalg import Factors, Spectrum, whitened_svd
from soco.modules import LowRankLinear
from soco.objectives import TokenDistribution
from soco.ranks import allocate, is_dense, parameter_budget, relative_energy, uniform_ranks
from soco.refinement import Refinement, refine
from soco.surgeon import SVDSurgeon, rescale, saliency
from soco.surgery import bias_of, find_linears, replace_module, shape_of, weight_of

OBJECTIVE = TokenDistribution()
CHOICES = ("svd-llm, uniform", "svd-llm, energy", "svd-llm, saliency")


@dataclass
class Setting:
    """One model with its texts."""

    name: str
    data: Path
    valid: str
    tokenizer: PreTrainedTokenizerFast
    dense: nn.Module
    windows: Tensor

    def load(self) -> nn.Module:
        """The dense model, new."""
        folder = self.data / "models" / self.name
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def score(self, model: nn.Module) -> dict[str, float | None]:
        """Perplexity and divergence on the evaluation text."""
        found = soco.evaluate(
            model,
            self.data / self.valid,
            tokenizer=self.tokenizer,
            dense=self.dense,
            length=LENGTH,
            windows=WINDOWS,
            progress=False,
        )
        return {"perplexity": found.perplexity, "kl": found.kl}


def install(
    model: nn.Module, factors: dict[str, Factors]
) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Put compressed layers in; name to (dense, compressed)."""
    pairs = {}
    for name, each in factors.items():
        dense = model.get_submodule(name)
        pairs[name] = (dense, LowRankLinear.from_factors(each, bias_of(dense)))
        replace_module(model, name, pairs[name][1])
    return pairs


def keep(spectrum: Spectrum, order: Tensor, rank: int) -> Factors:
    """The factors of the first ``rank`` components in ``order``."""
    chosen = order[:rank].sort().values
    part = Spectrum(spectrum.up[:, chosen], spectrum.sigma[chosen], spectrum.down[chosen])
    return part.truncate(rank)


def truncate(setting: Setting, label: str, ratio: float) -> dict[str, Factors]:
    """The factors of all layers that do not stay dense."""
    choice = label.split(", ")[1]
    targets = find_linears(setting.dense)
    stats = collect(setting.dense, targets, setting.windows)
    spectra = {n: whitened_svd(weight_of(m), stats[n].gram) for n, m in targets.items()}
    shapes = {name: shape_of(module) for name, module in targets.items()}
    budget = parameter_budget(shapes, ratio)
    orders = {name: torch.arange(len(each.sigma)) for name, each in spectra.items()}
    if choice == "uniform":
        ranks = uniform_ranks(shapes, budget)
    elif choice == "energy":
        energy = relative_energy({name: each.sigma for name, each in spectra.items()})
        ranks = allocate(energy, shapes, budget)
    else:
        values = saliency(setting.dense, spectra, targets, setting.windows, OBJECTIVE, SVDSurgeon())
        ranks = allocate(values, shapes, budget)
        orders = {name: each.argsort(descending=True) for name, each in values.items()}
    return {
        name: keep(spectra[name], orders[name], rank)
        for name, rank in ranks.items()
        if not is_dense(shapes[name], rank)
    }


def measure(
    setting: Setting, ratio: float, label: str, arguments: argparse.Namespace, done: dict
) -> None:
    """All rows of one truncation."""

    def note(stage: str, model: nn.Module, seconds: float, **more: object) -> None:
        row = {"model": setting.name, "ratio": ratio, "method": f"{label} + {stage}"}
        row |= {**setting.score(model), "seconds": round(seconds, 1), **more}
        done[setting.name, ratio, row["method"]] = row
        write(arguments, done)
        print({k: v for k, v in row.items() if k not in ("settings", "held_out")}, flush=True)

    begin = time.perf_counter()
    factors = truncate(setting, label, ratio)
    seconds = time.perf_counter() - begin
    model = setting.load()
    install(model, factors)
    note("nothing", model, seconds)
    for steps in arguments.steps:
        tuning = Refinement(steps=steps)
        model = setting.load()
        pairs = install(model, factors)
        begin = time.perf_counter()
        history = refine(model, pairs, setting.windows, OBJECTIVE, tuning)
        seconds = time.perf_counter() - begin
        note(
            f"refine {steps}",
            model,
            seconds,
            steps=history[-1].step,
            held_out=[round(s.held_out, 5) for s in history if s.held_out is not None],
            settings=asdict(tuning),
        )
    settings = SVDSurgeon()
    targets = find_linears(setting.dense)
    begin = time.perf_counter()
    updated = rescale(setting.dense, factors, targets, setting.windows, OBJECTIVE, settings)
    seconds = time.perf_counter() - begin
    model = setting.load()
    install(model, updated)
    note("svd-surgeon", model, seconds, settings=asdict(settings))


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of models and texts")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--models", nargs="*", default=["babyllama105", "stories260K"])
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--steps", nargs="*", type=int, default=[200], help="of refine")
    arguments = parser.parse_args()
    arguments.device = "cpu"
    command = " ".join(["python", "benchmarks/stages.py", *sys.argv[1:]])
    output = f"benchmarks/results/{arguments.output.name}"
    arguments.command = command.replace(str(arguments.data), "DIR").replace(
        str(arguments.output), output
    )
    done: dict = {}
    for name in arguments.models:
        train, valid, _ = RUNS[name]
        folder = arguments.data / "models" / name
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        windows = token_windows(
            arguments.data / train, tokenizer, samples=SAMPLES, length=LENGTH, seed=0,
            vocab_size=dense.config.vocab_size,
        )  # fmt: skip
        setting = Setting(name, arguments.data, valid, tokenizer, dense, windows)
        for label in CHOICES:
            measure(setting, arguments.ratio, label, arguments, done)


if __name__ == "__main__":
    main()
