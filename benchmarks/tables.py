"""Make the tables and pictures in README and docs from recorded results.

    python benchmarks/tables.py benchmarks/results/ablation-*.json

writes a table of every study between the ``studies`` markers of docs/ablations.md.

    python benchmarks/tables.py benchmarks/results/compare-*.json

takes what ``soco compare`` wrote (its compare.json under another name) and writes a table of every
model between the ``compare`` markers of docs/methods.md, a short one of all models between the
``results`` markers of README.md, docs/images/compare-MODEL.png, and docs/images/readme.png with the
methods of the short table on the first model.

    python benchmarks/tables.py benchmarks/results/resize.json

writes the table between the markers of that name in docs/methods.md.

    python benchmarks/tables.py benchmarks/results/lowrank-*.json benchmarks/results/decode.json \
        benchmarks/results/model-*.json benchmarks/results/*svd-*.json \
        benchmarks/results/spectral-*.json

writes the tables of docs/performance.md, and

    python benchmarks/tables.py benchmarks/results/streaming-*.json benchmarks/results/fuzz-*.json \
        benchmarks/results/planning.json

those of docs/reliability.md. All kinds may be given at once.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

from protocol import TEXTS
from reliability_tables import reliability

from soco import plots
from soco.record import Comparison
from soco.rendering import about, across, notes, number, small
from soco.reporting import format_bytes

ROOT = Path(__file__).parents[1]
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


def layers_timed(records: list[dict]) -> str:
    """What ``soco-bench lowrank`` measured: a part of docs/performance.md."""
    names = list(dict.fromkeys(name for r in records for row in r["rows"] for name in row["ways"]))
    lines = [
        f"| threads, dtype, tokens | layers, kept | {' | '.join(names)} | over pairs | roofline |",
        "|---|---" + "|--:" * (len(names) + 2) + "|",
    ]
    for record in records:
        order = {name: index for index, name in enumerate(("bfloat16", "float16", "float32"))}
        for row in sorted(record["rows"], key=lambda row: (order[row["dtype"]], row["tokens"])):
            ways = row["ways"]
            cells = [f"{ways[n]['median_us'] / 1e3:.2f}" if n in ways else "-" for n in names]
            ours = ways["soco"]
            where = f"{record['machine']['threads']}, {row['dtype']}, {row['tokens']}"
            lines.append(
                f"| {where} | {row['shape']} {row['group']}, {row['kept']:.0%} | "
                f"{' | '.join(cells)} | {ours['times_faster_than']['pairs']:.2f}x | "
                f"{ours['of_roofline']:.0%} |"
            )
    rates = " and ".join(_rates(record) for record in records)
    text = (
        f"Milliseconds; the roofline is memory read in the same rounds, {rates}. {_made(records)}"
    )
    return "\n".join([*lines, "", text])


def _rates(record: dict) -> str:
    found = sorted(row["read_gb_s"] for row in record["rows"])
    return f"{found[0]:.1f} to {found[-1]:.1f} GB/s with {record['machine']['threads']} thread(s)"


def generation_timed(record: dict) -> str:
    """What benchmarks/decode.py measured: a part of docs/performance.md."""
    rows = record["rows"]
    places = list(dict.fromkeys((r["model"], r["dtype"], r["threads"]) for r in rows))
    heads = [f"{model}, {dtype}, {threads} thread(s)" for model, dtype, threads in places]
    lines = [f"| model | {' | '.join(heads)} |", "|---" + "|--:" * len(heads) + "|"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        found = {(r["model"], r["dtype"], r["threads"]): r for r in rows if r["variant"] == variant}
        cells = [
            f"{found[p]['median_us'] / 1e3:.2f} ({found[p]['times_faster_than_dense']:.2f}x)"
            for p in places
        ]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    ratio = f"{rows[0]['ratio']:.0%} of the parameters of the compressed layers removed"
    return "\n".join(
        [*lines, "", f"Milliseconds per token (and times faster than dense); {ratio}. "
         f"{_made([record])}"]
    )  # fmt: skip


def models_timed(records: list[dict]) -> str:
    """What ``soco-bench model`` measured: a part of docs/performance.md."""
    lines = [
        "| model | kept | mode | first token, ms | per token, ms | tokens/s | weights, MB |",
        "|---|--:|---" + "|--:" * 4 + "|",
    ]
    for record in records:
        for row in record["rows"]:
            name = f"{row['shape']} ({row['blocks']} blocks, {row['dtype']}) {row['model']}"
            kept = "" if row["kept"] is None else f"{row['kept']:.0%}"
            lines.append(
                f"| {name} | {kept} | {row['mode']} | "
                f"{row['time_to_first_token']['median_us'] / 1e3:.0f} | "
                f"{row['decode_step']['median_us'] / 1e3:.1f} | "
                f"{row['decode_tokens_per_s']:.1f} | {row['parameter_bytes'] / 1e6:.0f} |"
            )
    row = records[0]["rows"][0]
    text = f"Prompt of {row['prompt']} tokens, {row['generated']} generated. {_made(records)}"
    return "\n".join([*lines, "", text])


def decompositions_timed(records: list[dict]) -> str:
    """What ``soco-bench svd`` measured: a part of docs/performance.md."""
    rows = [row for record in records for row in record["rows"]]
    names = list(dict.fromkeys(name for row in rows for name in row["ways"]))
    lines = [
        f"| matrix, spectrum | rank | {' | '.join(names)} |",
        "|---|--:" + "|--:" * len(names) + "|",
    ]
    for row in rows:
        cells = [
            f"{way['median_us'] / 1e6:.3f} s, {_percent(way['excess'])}"
            for way in (row["ways"][name] for name in names)
        ]
        where = f"{row['rows']} x {row['columns']}, {row['spectrum']}"
        lines.append(f"| {where} | {row['rank']} | {' | '.join(cells)} |")
    threads = records[0]["machine"]["threads"]
    text = (
        f"Seconds, and by how much the error of the truncation is above the least there is; "
        f"float32, {threads} threads. {_made(records)}"
    )
    return "\n".join([*lines, "", text])


def _percent(excess: float) -> str:
    if abs(excess) < 1e-9:
        return "0"
    return f"{excess:.1%}" if excess >= 1e-3 else f"{excess:.0e}"


def batches_timed(records: list[dict]) -> str:
    """What ``soco-bench batched-svd`` measured: a part of docs/performance.md."""
    rows = {
        (row["dtype"], row["side"], row["batch"]): row
        for record in records
        for row in record["rows"]
    }
    dtypes, sides, batches = (sorted({key[i] for key in rows}) for i in range(3))
    heads = " | ".join(f"{batch} at once" for batch in batches)
    lines = [
        f"| dtype, columns | {heads} | error | torch's |",
        "|---" + "|--:" * (len(batches) + 2) + "|",
    ]
    for dtype in dtypes:
        for side in sides:
            there = [rows.get((dtype, side, batch)) for batch in batches]
            cells = [
                "-" if row is None else f"{row['times_faster_than_torch']:.2f}x" for row in there
            ]
            errors = [
                max(row["ways"][name]["error"] for row in there if row is not None)
                for name in ("soco", "torch.linalg.svd")
            ]
            lines.append(
                f"| {dtype}, {side} | {' | '.join(cells)} | {errors[0]:.0e} | {errors[1]:.0e} |"
            )
    threads = records[0]["machine"]["threads"]
    text = (
        f"How many times as fast as `torch.linalg.svd`, all of a random square matrix, {threads} "
        f"threads; error: the largest entry of `A - U S Vh` over the largest singular value. "
        f"{_made(records)}"
    )
    return "\n".join([*lines, "", text])


def scalings_timed(records: list[dict]) -> str:
    """What ``soco-bench spectral`` measured: a part of docs/performance.md."""
    rows = [row for record in records for row in record["rows"]]
    names = list(dict.fromkeys(name for row in rows for name in row["ways"]))
    lines = [
        f"| rank, tokens, dtype | {' | '.join(names)} |", "|---" + "|--:" * len(names) + "|",
    ]  # fmt: skip
    for row in rows:
        times = [f"{row['ways'][name]['median_us'] / 1e3:.2f}" for name in names]
        cells = [
            f"{time} ({row['times_faster'][name]:.2f}x)" if name in row["times_faster"] else time
            for name, time in zip(names, times, strict=True)
        ]
        where = f"{row['rank']}, {row['tokens']}, {row['dtype']}"
        lines.append(f"| {where} | {' | '.join(cells)} |")
    threads = records[0]["machine"]["threads"]
    text = (
        f"Milliseconds for forward and backward pass (and how many times as fast ours is), "
        f"{rows[0]['outputs']} outputs, {threads} threads. {_made(records)}"
    )
    return "\n".join([*lines, "", text])


def _made(records: list[dict]) -> str:
    """When, where and by which commands."""
    machine = records[0]["machine"]
    commands = " and ".join(f"`{record['command']}`" for record in records)
    commits = ", ".join(f"`{c}`" for c in dict.fromkeys(record["commit"] for record in records))
    where = machine.get("gpu", machine["cpu"])
    return f"Made on {records[0]['date'][:10]} on {where} at {commits} by {commands}."


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
    performance = ROOT / "docs" / "performance.md"
    layers = [part for _, part in parts if part.get("kind") == "lowrank"]
    compiled = [part for part in layers if "compiled" in part["rows"][0]["ways"]]
    for marker, found in (
        ("lowrank", [part for part in layers if part not in compiled]),
        ("compiled", compiled),
    ):
        if found:
            insert(performance, marker, layers_timed(found))
    for marker, table in (
        ("model", models_timed),
        ("svd", decompositions_timed),
        ("batched-svd", batches_timed),
        ("spectral", scalings_timed),
    ):
        if found := [part for _, part in parts if part.get("kind") == marker]:
            insert(performance, marker, table(found))
    for marker, table in reliability([part for _, part in parts]).items():
        insert(ROOT / "docs" / "reliability.md", marker, table)
    for path, part in parts:
        if "rows" not in part:
            continue
        if any("times_faster_than_dense" in row for row in part["rows"]):
            insert(performance, "decode", generation_timed(part))
        if any("own_training" in row for row in part["rows"]):
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
