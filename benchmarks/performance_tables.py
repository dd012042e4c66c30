"""The tables of docs/performance.md, from records of ``soco-bench`` and of scripts beside this."""


def performance(parts: list[dict]) -> dict[str, str]:
    """Marker in the document to its table, of the kinds that there are records of."""
    layers = [part for part in parts if part.get("kind") == "lowrank"]
    compiled = [part for part in layers if "compiled" in part["rows"][0]["ways"]]
    decoded = [p for p in parts if any("times_faster_than_dense" in r for r in p.get("rows", []))]
    found = {
        "lowrank": (layers_timed, [part for part in layers if part not in compiled]),
        "compiled": (layers_timed, compiled),
        "decode": (generation_timed, decoded),
    }
    for kind, table in (
        ("model", models_timed),
        ("svd", decompositions_timed),
        ("batched-svd", batches_timed),
        ("spectral", scalings_timed),
        ("grams", sums_timed),
    ):
        found[kind] = table, [part for part in parts if part.get("kind") == kind]
    return {marker: table(records) for marker, (table, records) in found.items() if records}


def layers_timed(records: list[dict]) -> str:
    """What ``soco-bench lowrank`` measured: a part of docs/performance.md."""
    _, names = _rows_and_ways(records)
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


def generation_timed(records: list[dict]) -> str:
    """What benchmarks/decode.py measured: a part of docs/performance.md."""
    rows = [row for record in records for row in record["rows"]]
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
         f"{_made(records)}"]
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
    rows, names = _rows_and_ways(records)
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
    rows, names = _rows_and_ways(records)
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


def sums_timed(records: list[dict]) -> str:
    """What benchmarks/grams.py measured: a part of docs/performance.md."""
    lines = ["| what | plainly | here | |", "|---|--:|--:|--:|"]
    for row in (row for record in records for row in record["rows"]):
        plain, ours = row["plain_ms"], row["soco_ms"]
        times = " | ".join(f"{each:.3g} ms" for each in (plain, ours))
        lines.append(f"| {row['what']} | {times} | {plain / ours:.2f}x |")
    threads = records[0]["machine"]["threads"]
    return "\n".join([*lines, "", f"Medians, both in turn, {threads} threads. {_made(records)}"])


def _rows_and_ways(records: list[dict]) -> tuple[list[dict], list[str]]:
    """All rows, and the names of the ways that were timed, in their order."""
    rows = [row for record in records for row in record["rows"]]
    return rows, list(dict.fromkeys(name for row in rows for name in row["ways"]))


def _made(records: list[dict]) -> str:
    """When, where and by which commands."""
    machine = records[0]["machine"]
    commands = " and ".join(f"`{record['command']}`" for record in records)
    commits = ", ".join(f"`{c}`" for c in dict.fromkeys(record["commit"] for record in records))
    where = machine.get("gpu", machine["cpu"])
    return f"Made on {records[0]['date'][:10]} on {where} at {commits} by {commands}."
