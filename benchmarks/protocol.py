"""What all records have in common: texts, sizes, and how the place they were made at is called."""

import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from soco.diagnosis import commit_of, describe_machine

STORIES = ("text/tinystories_train_sample.clean.txt", "text/tinystories_valid_a.txt")
BOOKS = (
    "books/george-eliot_middlemarch.txt.gz",
    "books/arthur-conan-doyle_the-adventures-of-sherlock-holmes.txt.gz",
)
OUTSIDE = "text/wikitext2.valid.tokens.txt"  # of another kind than any calibration text

# model: calibration text, and evaluation text of the same kind
TEXTS = {
    "babyllama105": STORIES,
    "stories260K": STORIES,
    "books-llama-6m": BOOKS,
    "books-llama-1m": BOOKS,
}
RECORDS = "benchmarks/results"
LENGTH, SAMPLES, WINDOWS = 256, 256, 100  # tokens of a window; calibration and evaluation windows


def commit() -> str | None:
    """The commit this runs from, marked when files other than records were changed since."""
    root = Path(__file__).parents[1]
    found = commit_of(root)
    if found is None:
        return None
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RECORDS}"]
    changed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return found.removesuffix("-dirty") + ("-dirty" if changed else "")


def write_record(
    output: Path, data: Path, rows: list[dict[str, Any]], kind: str | None = None
) -> None:
    """Write rows with machine, date, commit, and the command without the places of this machine."""
    script = Path(sys.argv[0]).name
    command = " ".join(["python", f"benchmarks/{script}", *sys.argv[1:]])
    result = {
        "machine": describe_machine("cpu"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command.replace(str(data), "DIR").replace(
            str(output), f"{RECORDS}/{output.name}"
        ),
        **({} if kind is None else {"kind": kind}),
        "rows": rows,
    }
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
