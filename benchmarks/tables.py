"""Make the tables and pictures in README and docs from recorded results.

    python benchmarks/tables.py benchmarks/results/quality-*.json

writes the table between the ``results`` markers of docs/methods.md, and docs/images/quality.png.

    python benchmarks/tables.py benchmarks/results/compare-*.json

takes what ``soco compare`` wrote (its compare.json under another name) and writes a table of every
model between the ``compare`` markers of docs/methods.md, a short one of all models between the
``results`` markers of README.md, docs/images/compare-MODEL.png, and docs/images/readme.png with the
methods of the short table on the first model. Both kinds may be given at
once.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from soco import plots
from soco.record import Comparison
from soco.rendering import about, across, notes

ROOT = Path(__file__).parents[1]
# Okabe and Ito's colours, told apart by everybody, and a marker each.
LOOKS = {
    "svd, uniform ranks": ("#999999", "v"),
    "svd, energy ranks": ("#E69F00", "^"),
    "svd-llm, uniform ranks": ("#56B4E9", "s"),
    "svd-llm, energy ranks": ("#0072B2", "D"),
    "soco": ("#D55E00", "o"),
}

# The columns of the short table: what there was, the best closed forms, and what is trained.
BRIEF = (
    "svd", "svd-llm", "svd-llm@energy", "kfac-svd", "kfac-svd@lems", "kfac-svd+pivoted", "dobi-svd",
    "kfac-svd+refine", "soco",
)  # fmt: skip


def table(result: dict) -> str:
    """Perplexity / KL of every model and ratio, a column per method."""
    rows = {(row["model"], row["ratio"], row["method"]): row for row in result["rows"]}
    head = "| model (dense perplexity) | removed | " + " | ".join(LOOKS) + " |"
    lines = [head, "|---" * (len(LOOKS) + 2) + "|"]
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        for ratio in sorted({row["ratio"] for row in result["rows"] if row["model"] == model}):
            found = [rows[model, ratio, label] for label in LOOKS]
            best = min(found, key=lambda row: row["kl"])
            cells = []
            for row in found:
                cell = f"{number(row['perplexity'])} / {row['kl']:.3f}"
                cells.append(f"**{cell}**" if row is best else cell)
            dense = number(found[0]["dense_perplexity"])
            lines.append(f"| {model} ({dense}) | {ratio:.0%} | " + " | ".join(cells) + " |")
    lines += ["", caption(result, rows)]
    return "\n".join(lines)


def caption(result: dict, rows: dict) -> str:
    """What the table says, where and how it was measured."""
    machine = result["machine"]
    learned = [row for (_, _, label), row in rows.items() if label == "soco"]
    times = [row["seconds"] for row in learned]
    calibration = learned[0]["calibration"]
    return (
        f"Perplexity / mean KL divergence to the dense model in nats per token, on held-out text "
        f"({learned[0]['evaluation']['windows']} windows of {calibration['length']} tokens); lower "
        f"is better. Removed is the fraction of the parameters of the linears in the blocks; no "
        f"cell keeps more than that leaves. All methods saw the same {calibration['sequences']} "
        f"calibration sequences. soco took {min(times):.0f} to {max(times):.0f} s a run "
        f"(threads: {machine['threads']}; CPU: {machine['cpu']}, busy with other work). "
        f"Measured on {result['date'][:10]} at commit `{result['commit']}` by "
        f"`{result['command']}`; the table was made by "
        f"`python benchmarks/tables.py benchmarks/results/quality-*.json`."
    )


def number(value: float) -> str:
    """Four digits for people.

    >>> number(2.10689), number(52.39), number(20061.3)
    ('2.107', '52.39', '20061')
    """
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def draw(result: dict, path: Path) -> None:
    """KL against the fraction removed, a panel per model, log axis."""
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    figure = Figure(figsize=(4 * len(models), 3.8), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False)[0]
    for axis, model in zip(axes, models, strict=True):
        rows = [row for row in result["rows"] if row["model"] == model]
        for label, (color, marker) in LOOKS.items():
            mine = sorted((r["ratio"], r["kl"]) for r in rows if r["method"] == label)
            axis.semilogy(*zip(*mine, strict=True), color=color, marker=marker, label=label)
        axis.set_title(model)
        ratios = sorted({row["ratio"] for row in rows})
        axis.set_xticks(ratios, [f"{ratio:.0%}" for ratio in ratios])
        axis.set_xlabel("parameters removed")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(True, which="major", color="0.9")
    axes[0].set_ylabel("KL to the dense model (nats per token)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


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
    """Perplexity / KL of some methods on every model: the table of README.md."""
    entries = [e for e in BRIEF if any(e == row["method"] for c in comparisons for row in c.rows)]
    lines = [
        "| model (dense perplexity) | removed | " + " | ".join(f"`{e}`" for e in entries) + " |",
        "|---" * (len(entries) + 2) + "|",
    ]
    for comparison in comparisons:
        dense = number(comparison.dense["perplexity"])
        for ratio in comparison.ratios:
            rows = {row["method"]: row for row in comparison.rows if row["ratio"] == ratio}
            found = {e: rows[e] for e in entries if e in rows and "error" not in rows[e]}
            best = min(found, key=lambda e: found[e]["kl"])
            cells = []
            for entry in entries:
                row = found.get(entry)
                cell = "-" if row is None else f"{number(row['perplexity'])} / {row['kl']:.3f}"
                cells.append(f"**{cell}**" if entry == best else cell)
            model = comparison.setup["model"]
            lines.append(f"| {model} ({dense}) | {ratio:.0%} | " + " | ".join(cells) + " |")
    first = comparisons[0]
    calibration = first.setup["calibration"]
    main = next(iter(first.setup["texts"].values()))
    commands = "` and `".join(dict.fromkeys(c.command for c in comparisons))
    lines += [
        "",
        f"Perplexity / mean KL divergence to the dense model in nats per token, on held-out text "
        f"({main['windows']} windows of {first.setup['length']} tokens); lower is better, the best "
        f"of a row in bold. Removed: of the parameters of the linears in the blocks; "
        f"no cell keeps more. All methods saw the same {calibration['sequences']} calibration "
        f"sequences. `@` names how ranks are shared, `+` what was added; the other methods and the "
        f"pictures are in [docs/methods.md](docs/methods.md). Measured on {first.date[:10]} by "
        f"`{commands}`; the table was made by `python benchmarks/tables.py "
        f"benchmarks/results/compare-*.json`.",
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
        "results", type=Path, nargs="+", help="JSON of benchmarks/quality.py, or of soco compare"
    )
    arguments = parser.parse_args()
    parts = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in arguments.results]
    measured = [part for _, part in parts if "setup" not in part]
    comparisons = [Comparison.from_dict(part, str(path)) for path, part in parts if "setup" in part]
    if measured:
        write_results(measured)
    if comparisons:
        write_comparisons(comparisons)


def write_results(parts: list[dict]) -> None:
    """Update what benchmarks/quality.py measured."""
    result = {
        **parts[0],
        "rows": [row for part in parts for row in part["rows"]],
        "commit": "`, `".join(dict.fromkeys(part["commit"] for part in parts)),
        "command": "` and `".join(part["command"] for part in parts),
    }
    insert(ROOT / "docs" / "methods.md", "results", table(result))
    draw(result, ROOT / "docs" / "images" / "quality.png")


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
    insert(ROOT / "README.md", "results", brief(comparisons))


if __name__ == "__main__":
    main()
