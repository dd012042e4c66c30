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
from soco.evaluation import Evaluation, evaluate, small
from soco.pipeline import compress
from soco.reporting import report
from soco.sampling import sample_from_model

# What the demo takes where nothing else is asked for: two minutes on two cores.
OPTIONS: Mapping[str, Any] = {"calibration": "self", "samples": 128, "length": 256}

RIVALS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("KFAC-SVD, pivoted factors", {"method": "kfac-svd", "pivoted": True}),
    ("KFAC-SVD, ranks by energy", {"method": "kfac-svd"}),
    ("SVD-LLM, ranks by energy", {"method": "svd-llm", "allocator": "energy"}),
    ("SVD-LLM, uniform ranks", {"method": "svd-llm"}),
    ("SVD, ranks by energy", {"method": "svd", "allocator": "energy"}),
    ("SVD, uniform ranks", {"method": "svd"}),
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
    options: Mapping[str, Any],
    tell: Callable[[str], None],
) -> list[Row]:
    """Measure a compressed model, and fresh copies of the dense one compressed by closed forms.

    All have the same calibration, and are measured on a text that none of them has seen.

    Args:
        dense: the demo model.
        compressed: by SoCo.
        tokenizer: of both.
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
        common = {
            name: value
            for name, value in options.items()
            if name not in ("ratio", "size", "pivoted", "refine", "surgeon")
        }
        common |= {"calibration": windows, "samples": len(windows)}
        for title, own in RIVALS:
            model = copy.deepcopy(dense)
            compress(model, done.ratio, **{**common, **own})
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
            "-" if found.kl is None else small(found.kl),
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
