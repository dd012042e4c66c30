"""The tables of docs/reliability.md, from records of streaming, killed runs, plans and fuzzing."""

from collections import Counter

from soco.reporting import format_bytes


def reliability(parts: list[dict]) -> dict[str, str]:
    """Marker in the document to its table, of the kinds that there are records of."""
    rows = [(part, row) for part in parts for row in part.get("rows", [])]
    fuzzed = [part for part in parts if "outcomes" in part]
    streamed = [row for _, row in rows if "of_them_before" in row and "hidden" in row]
    killed = [(part, row) for part, row in rows if "killed_after_seconds" in row]
    shared = [(part, row) for part, row in rows if "processes" in row and "phases" in row]
    planned = [part for part in parts if any("planned" in row for row in part.get("rows", []))]
    found = {}
    if planned:
        found["planning"] = _planned(planned)
    if fuzzed:
        found["fuzz"] = _fuzzed(fuzzed)
    if streamed:
        found["streaming"] = _streamed(streamed)
    if killed:
        found["killed"] = "\n".join(_killed(part, row) for part, row in killed)
    if shared:
        found["processes"] = _shared(shared)
    return found


def _fuzzed(parts: list[dict]) -> str:
    lines = ["| what is broken at random | command | cases | outcome |", "|---|---|--:|---|"]
    for part in parts:
        what = "ops" if "low_rank_group" in part["outcomes"] else "model folders"
        counts: Counter[str] = Counter()
        for outcomes in part["outcomes"].values():
            counts.update(outcomes)
        told = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items())
        command = part["command"].split(" --output")[0]
        failed = f"{len(part['failures'])} failures: {told}"
        lines.append(f"| {what} | `{command}` | {part['count']:,} | {failed} |")
    return "\n".join(lines)


def _streamed(rows: list[dict]) -> str:
    lines = [
        "| method | layers | hidden, inner | weights | seconds | peak | after `soco verify` |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    return "\n".join(
        [
            *lines,
            *(
                f"| {row.get('method', 'svd-llm')} | {row['layers']} | "
                f"{row['hidden']}, {_inner(row)} | "
                f"{format_bytes(row['bytes'])} | {row['seconds']:.0f} | "
                f"{format_bytes(row['peak_process_bytes'])} | {_after(row)} |"
                for row in rows
            ),
        ]
    )


def _inner(row: dict) -> str:
    experts = row.get("experts")
    return f"{experts} experts of {row['inner']}" if experts else str(row["inner"])


def _after(row: dict) -> str:
    peak = row.get("peak_process_bytes_after_check")
    return "-" if peak is None else format_bytes(peak)


def _killed(part: dict, row: dict) -> str:
    after = row["killed_after_seconds"]
    if "model" in row:
        what = f"{row['model']}, method soco with effort best, in memory, a state every 5 s"
    else:
        what = (
            f"{row.get('method', 'svd-llm')}, `--stream`, {row['layers']} layers, "
            f"{format_bytes(row['bytes'])} in bfloat16"
        )
    return (
        f"- {what}: killed {len(after)} times, after {min(after):.0f} to {max(after):.0f} s; "
        f"{row['seconds_with_kills']:,.0f} s in all, {row['seconds_undisturbed']:,.0f} s "
        f"undisturbed (beside other work); weights "
        f"{'identical' if row['identical'] else 'DIFFERENT'}, {len(row['left_behind'])} files left "
        f"behind. Made on {part['date'][:10]} at `{part['commit']}` by `{part['command']}`."
    )


def _shared(rows: list[tuple[dict, dict]]) -> str:
    lines = [
        "| what | processes | statistics | decomposition | training | result |",
        "|---|--:|--:|--:|--:|---|",
    ]
    alone: dict[str, dict] = {}
    for _, row in rows:
        what = (
            f"{row['model']}, {row['method']}"
            if "model" in row
            else f"{row['layers']} layers of {row['hidden']} and {row['inner']}, svd-llm, streamed"
        )
        first = alone.setdefault(what, row)
        phases = [
            f"{seconds:.1f} s" if (seconds := row["phases"].get(name)) else "-"
            for name in ("statistics", "decomposition", "training")
        ]
        if "identical" in row:
            result = "identical" if row["identical"] else "equal up to rounding"
        else:
            result = f"KL {row['kl']:.9f}, {row['same_ranks']} of {row['layers']} ranks equal"
        result = "-" if row is first and "identical" in row else result
        lines.append(f"| {what} | {row['processes']} | {' | '.join(phases)} | {result} |")
    return "\n".join(lines)


def _planned(parts: list[dict]) -> str:
    """Model by model, all methods: the plan of the highest phase, and how far it is off."""
    rows = [row for part in parts for row in part["rows"]]
    ways = list(dict.fromkeys(_way(row) for row in rows))
    lines = [
        f"| layers, hidden, dtype | {' | '.join(ways)} |",
        "|---" + "|--:" * len(ways) + "|",
    ]
    for model in dict.fromkeys(_model(row) for row in rows):
        found = {_way(row): row for row in rows if _model(row) == model}
        cells = [
            f"{format_bytes(found[way]['planned']['peak'])} ({found[way]['off']['together']:+.1%})"
            if way in found
            else "-"
            for way in ways
        ]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    off = [abs(row["off"]["together"]) for row in rows]
    phases = [abs(value) for row in rows for name, value in row["off"].items()]
    far = sum(value > 0.15 for value in phases)
    times = sorted(row["measured"]["seconds"] / row["planned"]["seconds"] for row in rows)
    made = "; ".join(f"{p['date'][:10]} at `{p['commit']}` by `{p['command']}`" for p in parts)
    text = (
        f"At most {max(off):.1%} off at the peak; of {len(phases)} single phases {far} are off by "
        f"more than 15%, the farthest by {max(phases):.1%}. The runs took {times[0]:.1f} to "
        f"{times[-1]:.1f} times as long as planned (median "
        f"{times[len(times) // 2]:.1f}). Made on {made}."
    )
    return "\n".join([*lines, "", text])


def _way(row: dict) -> str:
    return f"`{row['method']}`{', streamed' if row['stream'] else ''}"


def _model(row: dict) -> str:
    experts = f" ({row['experts']} experts)" if row.get("experts") else ""
    return f"{row['layers']}, {row['hidden']}{experts}, {row['dtype']}"
