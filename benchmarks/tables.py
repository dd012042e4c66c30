"""Make the tables and pictures in README and docs from recorded results.

    python benchmarks/tables.py benchmarks/results/ablation-*.json

writes a table of every study between the ``studies`` markers of docs/ablations.md.

    python benchmarks/tables.py benchmarks/results/compare-*.json

takes what ``soco compare`` wrote (its compare.json under another name) and writes a table of every
model between the ``compare`` markers of docs/methods.md, a short one of all models between the
``results`` markers of README.md, docs/images/compare-MODEL.png, and docs/images/readme.png with the
methods of the short table on the first model.

    python benchmarks/tables.py benchmarks/results/resize.json \
        benchmarks/results/resize-stories260K.json

writes the tables between the markers of those names in docs/methods.md.

    cd benchmarks/results; python ../tables.py lowrank-cpu-*.json lowrank-compiled.json \
        decode.json model-*.json svd-w*.json svd-llama-2.json batched-svd-*.json \
        spectral-2.json grams.json

writes the tables of docs/performance.md, and

    python benchmarks/tables.py benchmarks/results/streaming-*.json benchmarks/results/fuzz-*.json \
        benchmarks/results/planning*.json

those of docs/reliability.md. All kinds may be given at once.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

from performance_tables import performance
from protocol import TEXTS
from reliability_tables import reliability

from soco import plots
from soco.evaluation import small
from soco.record import Comparison
from soco.rendering import about, across, notes, number
from soco.reporting import format_bytes

ROOT = Path(__file__).resolve().parents[1]
# Studies in which text of another kind is half of the question.
OUTSIDE_TOO = ("calibration", "refine", "written")
# The columns of the short table: what there was, the best closed forms, and what is trained.
BRIEF = (
    "svd", "svd-llm", "kfac-svd", "kfac-svd@lems", "kfac-svd+pivoted", "dobi-svd", "soco:fast",
    "soco", "kfac-svd+pivoted+refine", "soco:best",
)  # fmt: skip
# What of them README.md shows, and where: docs/methods.md has all.
SHOWN = tuple(entry for entry in BRIEF if entry not in ("kfac-svd", "kfac-svd@lems"))
SHOWN_RATIOS = (0.4, 0.6)
SHOWN_MODELS = ("babyllama105", "stories260K", "books-llama-1m", "books-llama-6m")


def studied(study: dict) -> str:
    """A section of docs/ablations.md: KL of every variant, and against the first one."""
    rows = study["rows"]
    commits = ", ".join(f"`{c}`" for c in dict.fromkeys(row["commit"] for row in rows))
    dates = sorted(row["date"][:10] for row in rows)
    parts = [f"### {study['study']}", _variants(rows, "kl", "KL")]
    if study["study"] in OUTSIDE_TOO:
        parts.append(_variants(rows, "kl_outside", "KL on text of another kind"))
    parts.append(
        f"Mean: geometric mean of the KL as a fraction of the first line's, over the places that "
        f"both have. ±: half the spread of several seeds. Made on {dates[0]} to {dates[-1]} at "
        f"{commits} by `{rows[-1]['command']}` and the like ({rows[-1]['machine']['cpu']}, "
        f"{rows[-1]['machine']['threads']} thread)."
    )
    return "\n\n".join(parts)


def _variants(rows: list[dict], kind: str, title: str) -> str:
    """A line for every variant, a column for every place."""
    places = sorted({(row["model"], row["ratio"]) for row in rows}, key=_place)
    heads = " | ".join(f"{model} {ratio:.0%}" for model, ratio in places)
    lines = [f"| {title} | {heads} | mean |", "|---" + "|--:" * (len(places) + 1) + "|"]
    means = {
        (row["variant"], row["model"], row["ratio"]): [
            each[kind]
            for each in rows
            if all(each[k] == row[k] for k in ("variant", "model", "ratio"))
        ]
        for row in rows
    }
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for variant in variants:
        cells, ratios = [], []
        for model, ratio in places:
            found = means.get((variant, model, ratio))
            if found is None:
                cells.append("-")
                continue
            value = sum(found) / len(found)
            spread = f" ± {(max(found) - min(found)) / 2:.2g}" if len(found) > 1 else ""
            cells.append(f"{value:.3g}{spread}")
            base = means.get((variants[0], model, ratio))
            if base is not None:
                ratios.append(math.log(value * len(base) / sum(base)))
        mean = f"{math.exp(sum(ratios) / len(ratios)):.2f}" if ratios else "-"
        lines.append(f"| {variant} | " + " | ".join(cells) + f" | {mean} |")
    return "\n".join(lines)


def _place(place: tuple[str, float]) -> tuple[int, float]:
    """Models in the order of ``TEXTS``, ratios ascending."""
    return list(TEXTS).index(place[0]), place[1]


def compared(comparison: Comparison) -> str:
    """A section of docs/methods.md on one model: its picture, a table for each text, what it is."""
    model = comparison.setup["model"]
    main, *others = comparison.setup["texts"]
    failures = [f"- {note}" for note in notes(comparison) if "failed:" in note or "keeps" in note]
    parts = [
        f"### {model}",
        f"![{model}: loss against kept parameters, a line for each method]"
        f"(images/{picture(comparison)})",
        f"On {main}:",
        across(comparison),
        *(part for title in others for part in (f"On {title}:", across(comparison, title))),
        "\n".join([about(comparison), *failures]),
    ]
    return "\n\n".join(parts)


def brief(comparisons: list[Comparison]) -> str:
    """Perplexity / KL of some methods on every model and text: the table of README.md."""
    shown = [c for c in comparisons if c.setup["model"] in SHOWN_MODELS]
    comparisons = shown or comparisons
    entries = [e for e in SHOWN if any(e == row["method"] for c in comparisons for row in c.rows)]
    lines = [
        "| model | text (dense perplexity) | removed | "
        + " | ".join(f"`{e}`" for e in entries)
        + " |",
        "|---" * (len(entries) + 3) + "|",
    ]
    for comparison in comparisons:
        for place, title in enumerate(comparison.setup["texts"]):
            dense = comparison.dense if not place else comparison.dense["texts"][title]
            kind = f"{'another kind' if place else 'same kind'} ({number(dense['perplexity'])})"
            for ratio in (r for r in comparison.ratios if r in SHOWN_RATIOS):
                found = {
                    row["method"]: row if not place else row["texts"][title]
                    for row in comparison.rows
                    if row["ratio"] == ratio and row["method"] in entries and "error" not in row
                }
                best = min(found, key=lambda e: found[e]["kl"])
                cells = []
                for entry in entries:
                    row = found.get(entry)
                    cell = "-"
                    if row is not None:
                        cell = f"{number(row['perplexity'])} / {small(row['kl'])}"
                    cells.append(f"**{cell}**" if entry == best else cell)
                head = f"| {comparison.setup['model']} | {kind} | {ratio:.0%} | "
                lines.append(head + " | ".join(cells) + " |")
    first = comparisons[0]
    calibration = first.setup["calibration"]
    main = next(iter(first.setup["texts"].values()))
    lines += [
        "",
        f"Perplexity / mean KL divergence to the dense model in nats per token "
        f"({main['windows']} windows of {first.setup['length']} tokens); lower is better, the best "
        f"of a row in bold. Text: held-out text of the kind that was calibrated on (stories, or "
        f"another novel), and of another kind (WikiText-2). Removed: of the parameters of the "
        f"linears in the blocks; no cell keeps more. All methods saw the same "
        f"{calibration['sequences']} calibration sequences. `@` names how ranks are shared, `+` "
        f"what was added, `:` the effort. Other sizes, models and methods, and pictures, are in "
        f"[docs/methods.md](docs/methods.md). Measured on {first.date[:10]} by "
        f"`python benchmarks/compare.py` (records `benchmarks/results/compare-*.json`); the table "
        f"was made by `python benchmarks/tables.py benchmarks/results/compare-*.json`.",
    ]
    return "\n".join(lines)


def costs(comparisons: list[Comparison]) -> str:
    """What the trained methods cost on every model, at the middle ratio: a part of docs/methods.md.

    Steps and tokens are those that a method may take; refine stops before where it gains no more.
    """
    lines = [
        "| model, removed | method | KL | steps | tokens | seconds | peak memory |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for comparison in comparisons:
        ratio = comparison.middle
        rows = {row["method"]: row for row in comparison.rows if row["ratio"] == ratio}
        for entry in ("svd-llm", *(e for e in BRIEF if e not in ("svd", "svd-llm"))):
            row = rows.get(entry)
            if row is None or "error" in row:
                continue
            settings = row["settings"]
            refine = settings.get("refine") or {}
            parts = [
                (each["steps"], each["steps"] * each["batch_size"])
                for each in (settings, refine)
                if "steps" in each
            ]
            steps, sequences = (sum(part[place] for part in parts) for place in (0, 1))
            tokens = sequences * comparison.setup["calibration"]["length"]
            lines.append(
                f"| {comparison.setup['model']}, {ratio:.0%} | `{entry}` | {small(row['kl'])} | "
                f"{steps or ''} | {f'{tokens:,}' if tokens else ''} | {row['seconds']:.0f} | "
                f"{format_bytes(row['peak_bytes'])} |"
            )
    lines += [
        "",
        "Seconds without the statistics, which all methods share; the machine was busy with other "
        "work. Memory is that of the whole process, model and evaluation text with it.",
    ]
    return "\n".join(lines)


def sized(record: dict) -> str:
    """What ``soco.resize`` gives against trainings of their own: a part of docs/methods.md."""
    heads = ("KL", "of its own", "", "KL on WikiText-2", "of its own", "")
    lines = [
        f"| model, removed | trained for | {' | '.join(heads)} |",
        "|---|---" + "|--:" * 6 + "|",
    ]
    for row in record["rows"]:
        one, own = row["one_training"], row["own_training"]
        cells = [
            cell
            for kind in ("kl", "kl_outside")
            for cell in (small(one[kind]), small(own[kind]), f"{one[kind] / own[kind] - 1:+.1%}")
        ]
        where = "yes" if row["station"] else "between"
        lines.append(f"| {row['model']}, {row['ratio']:.1%} | {where} | {' | '.join(cells)} |")
    steps = record["rows"][0]["steps"]
    lines += [
        "",
        f"Made on {record['date'][:10]} at `{record['commit']}` by `{record['command']}`; {steps} "
        f"steps for the first size and for every training of its own.",
    ]
    return "\n".join(lines)


def picture(comparison: Comparison) -> str:
    """The name of a comparison's picture in docs/images/."""
    return f"compare-{comparison.setup['model'].replace('/', '-')}.png"


def insert(file: Path, marker: str, text: str) -> None:
    """Put ``text`` between the markers of a Markdown file."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    content = file.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        raise SystemExit(f"{file} must have {begin} and {end} once each")
    before, rest = content.split(begin)
    file.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def main() -> None:
    """Update the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        help="JSON of what is measured here: see above",
    )
    arguments = parser.parse_args()
    parts = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in arguments.results]
    studies = [part for _, part in parts if "study" in part]
    comparisons = [Comparison.from_dict(part, str(path)) for path, part in parts if "setup" in part]
    if studies:
        write_studies(studies)
    if comparisons:
        write_comparisons(comparisons)
    for marker, table in performance([part for _, part in parts]).items():
        insert(ROOT / "docs" / "performance.md", marker, table)
    for marker, table in reliability([part for _, part in parts]).items():
        insert(ROOT / "docs" / "reliability.md", marker, table)
    for path, part in parts:
        if any("own_training" in row for row in part.get("rows", [])):
            insert(ROOT / "docs" / "methods.md", path.stem, sized(part))


def write_studies(studies: list[dict]) -> None:
    """Update what benchmarks/ablation measured."""
    insert(ROOT / "docs" / "ablations.md", "studies", "\n\n".join(map(studied, studies)))


def write_comparisons(comparisons: list[Comparison]) -> None:
    """Update what soco compare measured: one comparison for each model."""
    names = [picture(comparison) for comparison in comparisons]
    if len(set(names)) < len(names):
        raise SystemExit("give one comparison for each model")
    for name, comparison in zip(names, comparisons, strict=True):
        plots.draw_quality(comparison, ROOT / "docs" / "images" / name)
    first = comparisons[0]
    few = tuple(row for row in first.rows if row["method"] in BRIEF)
    plots.draw_quality(replace(first, rows=few), ROOT / "docs" / "images" / "readme.png")
    text = "\n\n".join(compared(comparison) for comparison in comparisons)
    insert(ROOT / "docs" / "methods.md", "compare", text)
    insert(ROOT / "docs" / "methods.md", "costs", costs(comparisons))
    insert(ROOT / "README.md", "results", brief(comparisons))


if __name__ == "__main__":
    main()
