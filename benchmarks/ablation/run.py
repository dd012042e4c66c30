r"""What each choice in soco is worth: one thing changed at a time, as the files beside this say.

    python benchmarks/ablation/run.py --data DIR --output benchmarks/results

``DIR`` holds ``models/``, ``text/`` and ``books/``. Every ``*.yaml`` in this folder is a study: a
question, the models and ratios it is asked for, and its variants. Results are written to
``OUTPUT/ablation-STUDY.json``, row by row; rows that are there already, made with the same
settings, are not made again. One row alone:

    python benchmarks/ablation/run.py --data DIR --output OUT --study basis --variant plain \
        --model babyllama105 --ratio 0.4 --seed 0
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))
from protocol import LENGTH, OUTSIDE, SAMPLES, TEXTS, WINDOWS, commit

import soco
from soco.data import token_windows
from soco.diagnosis import describe_machine
from soco.methods import METHODS, SoCo
from soco.preparation import prepare
from soco.refinement import Refinement
from soco.stages import Stage
from soco.workbench import Workbench

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Trial:
    """One row to be made."""

    study: str
    variant: str
    model: str
    ratio: float
    seed: int
    method: dict[str, Any]  # fields of SoCo, or "name" of another method
    options: dict[str, Any]  # of soco.compress; "refine" may be fields of Refinement; "samples",
    # and "calibration": files in DIR, of which each gives an equal share of the windows

    @property
    def key(self) -> tuple[str, str, float, int]:
        """What a row is known by in its study."""
        return self.variant, self.model, self.ratio, self.seed


def trials(path: Path) -> Iterator[Trial]:
    """The rows that a study asks for.

    ``common`` holds fields of the method for all variants. A variant may have models, ratios
    and seeds of its own, ``method`` (fields that differ), ``stages`` (instead of the study's, or
    of the preset where there are none) and ``options`` of ``soco.compress``.
    """
    study = yaml.safe_load(path.read_text("utf-8"))
    for name, variant in study["variants"].items():
        method = {**study.get("common", {}), **variant.get("method", {})}
        if stages := variant.get("stages", study.get("stages")):
            method["stages"] = stages
        options = {**study.get("options", {}), **variant.get("options", {})}
        for model in variant.get("models", study["models"]):
            for ratio in variant.get("ratios", study["ratios"]):
                for seed in variant.get("seeds", study.get("seeds", [0])):
                    yield Trial(path.stem, name, model, ratio, seed, method, options)


class Subject:
    """A model with all that its trials have in common."""

    def __init__(self, name: str, data: Path, device: str, stats: Path) -> None:
        """Load it and measure it dense."""
        self.data, self.device, self.stats = data, device, stats
        self.train, valid = TEXTS[name]
        self.texts = {"in": data / valid, "out": data / OUTSIDE}
        self.folder = data / "models" / name
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder)
        self.dense = self.load()
        self.reference = {kind: self.measure(self.dense, text) for kind, text in self.texts.items()}
        self.benches: dict[tuple, Workbench] = {}

    def load(self) -> torch.nn.Module:
        """The dense model, float32."""
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return model.to(self.device)

    def measure(self, model: torch.nn.Module, text: Path, *, against: bool = False) -> Any:
        """Perplexity, and the divergence from the dense model."""
        return soco.evaluate(
            model, text, tokenizer=self.tokenizer, dense=self.dense if against else None,
            length=LENGTH, windows=WINDOWS, progress=False,
        )  # fmt: skip

    def bench(self, samples: int, files: list[str]) -> Workbench:
        """Calibration, statistics and decompositions."""
        key = (samples, *files)
        if key not in self.benches:
            self.benches.clear()  # one at a time in memory
            count = samples // len(files)
            windows = torch.cat(
                [
                    token_windows(self.data / file, self.tokenizer, samples=count, length=LENGTH)
                    for file in files
                ]
            )
            self.benches[key] = prepare(
                self.load(), calibration=windows, samples=len(windows), length=LENGTH,
                stats=self.stats, progress=False,
            )  # fmt: skip
        return self.benches[key]

    def row(self, trial: Trial) -> dict[str, Any]:
        """Compress and measure."""
        fields = dict(trial.method)
        kind = METHODS[fields.pop("name", "soco")]
        if kind is not SoCo:
            fields = {}  # what is common to all is soco's
        preset = fields.pop("preset", None)
        if "stages" in fields:
            fields["stages"] = tuple(Stage(**stage) for stage in fields["stages"])
        for name, value in fields.items():
            fields[name] = tuple(value) if isinstance(value, list) else value
        if kind is SoCo:
            fields["seed"] = trial.seed
        method = SoCo.preset(preset, **fields) if preset else kind(**fields)
        options = dict(trial.options)
        files = options.pop("calibration", None) or [self.train]
        if isinstance(options.get("refine"), dict):
            options["refine"] = Refinement(**options["refine"])
        bench = self.bench(options.pop("samples", SAMPLES), files)
        model = self.load()
        begin = time.perf_counter()
        soco.compress(
            model, trial.ratio, method=method, seed=trial.seed, shared=bench, progress=False,
            **options,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        report = soco.report(model)
        found = {kind: self.measure(model, text, against=True) for kind, text in self.texts.items()}
        history = report.history
        steps = len(history.get("loss", ()))
        return {
            "variant": trial.variant,
            "model": trial.model,
            "ratio": trial.ratio,
            "seed": trial.seed,
            "kl": found["in"].kl,
            "kl_outside": found["out"].kl,
            "perplexity": found["in"].perplexity,
            "perplexity_outside": found["out"].perplexity,
            "dense_perplexity": self.reference["in"].perplexity,
            "dense_perplexity_outside": self.reference["out"].perplexity,
            "last_losses": history["divergence"][-10:] if steps else [],
            "steps": steps,
            "kept_params": report.params_after,
            "target_params": report.params_before,
            "seconds": round(seconds, 2),
            "phases": {name: round(value, 2) for name, value in report.seconds.items()},
            "method": trial.method,
            "options": trial.options,
            "commit": commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of models and texts")
    parser.add_argument("--output", type=Path, required=True, help="folder of the records")
    parser.add_argument("--study", nargs="*", help="names of files here; all of them otherwise")
    parser.add_argument("--variant", nargs="*", help="only these")
    parser.add_argument("--model", nargs="*", help="only these")
    parser.add_argument("--ratio", nargs="*", type=float, help="only these")
    parser.add_argument("--seed", nargs="*", type=int, help="only these")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--stats", type=Path, default=Path("build/ablation"), help="statistics")
    arguments = parser.parse_args()
    paths = sorted(HERE.glob("*.yaml"))
    known = [path.stem for path in paths]
    for name in arguments.study or ():
        if name not in known:
            parser.error(f"there is no study {name!r}: choose from {', '.join(known)}")
    wanted = [
        trial
        for path in paths
        if not arguments.study or path.stem in arguments.study
        for trial in trials(path)
        if (not arguments.variant or trial.variant in arguments.variant)
        and (not arguments.model or trial.model in arguments.model)
        and (not arguments.ratio or trial.ratio in arguments.ratio)
        and (not arguments.seed or trial.seed in arguments.seed)
    ]
    command = shlex.join(["python", "benchmarks/ablation/run.py", *sys.argv[1:]])
    names = {"DIR": arguments.data, "benchmarks/results": arguments.output}
    for called, folder in {**names, "STATS": arguments.stats}.items():
        command = command.replace(str(folder), called)
    records = {trial.study: Record(arguments.output, trial.study) for trial in wanted}
    todo = [trial for trial in wanted if not records[trial.study].has(trial)]
    print(f"{len(todo)} of {len(wanted)} rows to make", flush=True)
    for name in dict.fromkeys(trial.model for trial in todo):
        subject = Subject(name, arguments.data, arguments.device, arguments.stats)
        for trial in [each for each in todo if each.model == name]:
            row = subject.row(trial)
            records[trial.study].add(row, command, arguments.device)
            print(
                f"{trial.study} | {trial.variant} | {name} {trial.ratio} seed {trial.seed}: KL "
                f"{row['kl']:.5f} ({row['kl_outside']:.4f} outside), perplexity "
                f"{row['perplexity']:.3f}, {row['seconds']:.0f} s",
                flush=True,
            )


class Record:
    """The rows of one study, in a file."""

    def __init__(self, folder: Path, study: str) -> None:
        """Read what is there."""
        self.path, self.study = folder / f"ablation-{study}.json", study
        self.rows = json.loads(self.path.read_text())["rows"] if self.path.exists() else []

    def has(self, trial: Trial) -> bool:
        """Whether the row was made, with these settings."""
        return any(
            (row["variant"], row["model"], row["ratio"], row["seed"]) == trial.key
            and row["method"] == trial.method
            and row["options"] == trial.options
            for row in self.rows
        )

    def add(self, row: dict[str, Any], command: str, device: str) -> None:
        """Write the row, in the place of one that was made otherwise; others may write as well."""
        key = (row["variant"], row["model"], row["ratio"], row["seed"])
        if self.path.exists():
            self.rows = json.loads(self.path.read_text())["rows"]
        self.rows = [
            each for each in self.rows
            if (each["variant"], each["model"], each["ratio"], each["seed"]) != key
        ]  # fmt: skip
        self.rows.append({**row, "command": command, "machine": describe_machine(device)})
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps({"study": self.study, "rows": self.rows}, indent=1) + "\n")
        partial.replace(self.path)


if __name__ == "__main__":
    main()
