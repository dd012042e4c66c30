"""The demo: what SoCo made of the shipped model, beside the closed forms at the same size."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from soco.cli.sources import DEMO_TEXT
from soco.data import token_windows
from soco.evaluation import Evaluation, evaluate
from soco.pipeline import compress
from soco.reporting import report
from soco.sampling import sample_from_model

# What the demo takes where nothing else is asked for: two minutes on two cores.
OPTIONS: Mapping[str, Any] = {"calibration": "self", "samples": 128, "length": 256}

RIVALS = (  # title, method, allocator
    ("KFAC-SVD, ranks by energy", "kfac-svd", "energy"),
    ("SVD-LLM, ranks by energy", "svd-llm", "energy"),
    ("SVD-LLM, uniform ranks", "svd-llm", "uniform"),
    ("SVD, ranks by energy", "svd", "energy"),
    ("SVD, uniform ranks", "svd", "uniform"),
)


class Row(NamedTuple):
    """One model of the comparison."""

    title: str
    params: int  # kept of the target layers
    found: Evaluation


def compare(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    tokenizer: Any,
    ratio: float,
    options: Mapping[str, Any],
    tell: Callable[[str], None],
) -> list[Row]:
    """Measure a compressed model, and fresh copies of the dense one compressed by closed forms.

    All have the same calibration, and are measured on a text that none of them has seen.

    Args:
        dense: the demo model.
        compressed: by SoCo.
        tokenizer: of both.
        ratio: that ``compressed`` was made with.
        options: of ``soco.compress``, that ``compressed`` was made with.
        tell: called with a sentence on what comes next.

    Returns:
        The dense model, SoCo, then the rivals.
    """

    def measured(title: str, params: int, model: PreTrainedModel) -> Row:
        found = evaluate(
            model,
            DEMO_TEXT,
            tokenizer=tokenizer,
            dense=dense,
            length=options["length"],
            progress=options["progress"] is not False,
        )
        return Row(title, params, found)

    done = report(compressed)
    tell(f"measuring on {DEMO_TEXT.stem}, which the model has never seen")
    rows = [
        measured("dense", done.params_before, dense),
        measured("SoCo", done.params_after, compressed),
    ]
    tell("compressing by closed forms, to compare")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # all of it was said of SoCo's run
        windows = _windows(dense, tokenizer, options)
        options = {**options, "calibration": windows, "samples": len(windows)}
        for title, method, rule in RIVALS:
            model = copy.deepcopy(dense)
            given = {**options, "method": method, "allocator": rule}
            compress(model, ratio, **given)
            rows.append(measured(title, report(model).params_after, model))
    return rows


def _windows(dense: PreTrainedModel, tokenizer: Any, options: Mapping[str, Any]) -> Tensor:
    """The calibration that SoCo had: the same arguments give the same text."""
    text, sizes = options["calibration"], {k: options[k] for k in ("samples", "length", "seed")}
    if text == "self":
        return sample_from_model(dense, **sizes, start=tokenizer.bos_token_id)
    return token_windows(text, tokenizer, **sizes)


def show(rows: Iterable[Row], length: int, console: Console) -> None:
    """Print the comparison as a table."""
    rows = list(rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for title in ("parameters", "perplexity", "KL to dense", "same choice"):
        table.add_column(title, justify="right")
    for title, params, found in rows:
        table.add_row(
            title,
            f"{params:,}",
            "-" if found.perplexity is None else f"{found.perplexity:,.2f}",
            "-" if found.kl is None else f"{found.kl:.4f}",
            "-" if found.top1 is None else f"{found.top1:.1%}",
            style="bold" if title == "SoCo" else None,
        )
    tokens = rows[0].found.tokens
    console.print(
        f"\nAt the same size, on {tokens:,} tokens of a story that the model has never seen",
        style="bold",
    )
    console.print(table)
    console.print(
        f"  parameters: of the compressed layers; windows of {length} tokens; same choice: how "
        f"often\n  the most probable next token is that of the dense model"
    )
