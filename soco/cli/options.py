"""Names and options that several commands of ``soco`` share."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class MethodName(str, Enum):
    """The names in ``soco.methods.METHODS``."""

    soco = "soco"
    kfac_svd = "kfac-svd"
    svd_llm = "svd-llm"
    svd_llm_v2 = "svd-llm-v2"
    aa_svd = "aa-svd"
    saes = "saes"
    svd_surgeon = "svd-surgeon"
    dobi_svd = "dobi-svd"
    basis_sharing = "basis-sharing"
    adasvd = "adasvd"
    asvd = "asvd"
    fwsvd = "fwsvd"
    tfwsvd = "tfwsvd"
    svd = "svd"


class AllocatorName(str, Enum):
    """The names in ``soco.allocators.ALLOCATORS``."""

    uniform = "uniform"
    energy = "energy"
    adacr = "adacr"
    v2 = "v2"
    effective_rank = "effective-rank"
    sensitivity = "sensitivity"
    lems = "lems"
    learned = "learned"


# The switches of ``soco.comparison.OPTIONS``.
ENTRY_OPTIONS = ("pivoted", "unpivoted", "surgeon", "refine")


class Basis(str, Enum):
    """Whose components SoCo learns to weigh."""

    kfac = "kfac"
    whitened = "whitened"
    scaled = "scaled"
    plain = "plain"


class Deviation(str, Enum):
    """What is added to the outputs of a compressed layer."""

    none = "none"
    mean = "mean"
    vector = "vector"


class Effort(str, Enum):
    """The names in ``soco.methods.soco.EFFORTS``."""

    fast = "fast"
    balanced = "balanced"
    best = "best"


class Preset(str, Enum):
    """What else ``soco.methods.soco.PRESETS`` has."""

    paper = "paper"


class Dtype(str, Enum):
    """In what the weights are loaded."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def one_ratio(text: str) -> float:
    """Refuse what is no number, and a fraction that removes nothing, or everything."""
    try:
        value = float(text)
    except ValueError:
        raise typer.BadParameter(f"{text.strip()!r} is not a number.") from None
    if not 0 < value < 1:
        raise typer.BadParameter(
            f"{value:g} is not above 0 and below 1 (the fraction of parameters to remove)."
        )
    return value


def several_ratios(text: str) -> tuple[float, ...]:
    """Refuse what is not two or more different fractions with commas between them."""
    found = tuple(one_ratio(part) for part in text.split(","))
    if len(set(found)) < max(2, len(found)):
        raise typer.BadParameter(f"{text!r} must be two or more different ratios.")
    return tuple(sorted(found))


TRAINING = "Training (--method soco)"
CLOSED = "Methods without training (--method kfac-svd, svd-llm, ...)"
TASKS = "Tasks (--tasks)"
RUNNING = "Running"

RatioOption = Annotated[
    float | None,
    typer.Option(
        "--ratio",
        "-r",
        metavar="X",
        parser=one_ratio,
        help="Fraction of the compressed layers' parameters to remove.",
        show_default="0.5",
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Instead of a ratio: what all weights may take, as in 4GiB or 500MB.",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        metavar="DTYPE",
        help="Of the weights: float32, bfloat16, float16, or auto, as stored.",
        rich_help_panel=RUNNING,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="As torch writes it: cpu, cuda, cuda:1.",
        show_default="cuda if there is one, else cpu",
        rich_help_panel=RUNNING,
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Print results and warnings only, no progress.",
        rich_help_panel=RUNNING,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SeveralRatiosOption = Annotated[
    tuple | None,
    typer.Option(
        metavar="X,X",
        parser=several_ratios,
        help="Several sizes from one training, each in a folder DIR/ratio-X; soco resize makes "
        "any between them.",
        show_default=False,
    ),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, an id on the Hugging Face hub, or demo: a small model that is part of "
        "soco.",
        show_default=False,
    ),
]
NewFolderOption = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="Folder to write.", show_default=False),
]
ReplacedFolderOption = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Folder to write. One that soco wrote before is replaced.",
        show_default=False,
    ),
]
FolderArgument = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="Folder that soco compress wrote.", show_default=False),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        "-c",
        metavar="FILE|self",
        help="Text to learn from: .txt, .jsonl or .json, also .gz; self: text that the model "
        "writes itself.",
        show_default="self for demo, else none",
    ),
]
LengthOption = Annotated[
    int | None,
    typer.Option(
        min=2,
        metavar="N",
        help="Tokens in each.",
        show_default="256 for demo, else the model's context, at most 2048",
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Sequences of calibration text.",
        show_default="128 for demo, else 256",
    ),
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Compress the layers that this glob matches; may be repeated.",
        show_default="all linear layers in the blocks",
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Leave alone what this glob matches; may be repeated.",
        show_default=False,
    ),
]
StatsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder in which calibration statistics are stored, and looked for.",
        show_default=False,
        rich_help_panel=RUNNING,
    ),
]
StreamOption = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Read the model block by block, never whole, and go on after a crash. For soco "
        "without refinement, and for closed forms such as --method svd-llm.",
        rich_help_panel=RUNNING,
    ),
]
BlockwiseOption = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Do not load the model: have one block of it in memory.",
        rich_help_panel=RUNNING,
    ),
]
WorkOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Keep what is done in a folder: after a crash, a kill or Ctrl-C the same command goes "
        "on from there.",
        show_default="with --stream the output with .work at its end, else nowhere",
        rich_help_panel=RUNNING,
    ),
]
BatchSizeOption = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Sequences at a time through the model to calibrate.",
        rich_help_panel=RUNNING,
    ),
]
EffortOption = Annotated[
    Effort | None,
    typer.Option(
        help="How long method soco may take: seconds; minutes, the three stages; or longer, "
        "to train all factors.",
        show_default="balanced",
    ),
]
PresetOption = Annotated[
    Preset | None,
    typer.Option(help="Method soco as near to its paper as is known.", show_default=False),
]
StepsOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Steps.", show_default="240", rich_help_panel=TRAINING),
]
WrittenOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="X",
        help="Train on text that the dense model writes itself, too: so many times the samples; "
        "0: on none, which spares the time to write it.",
        show_default="0.5 (--effort fast: 0)",
        rich_help_panel=TRAINING,
    ),
]
SpacingOption = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        metavar="X",
        help="With --ratios: train for others between them, so that none is larger than the one "
        "before by more than this fraction of it, and soco resize is close everywhere; a large "
        "number: for none, which is quicker.",
        show_default="0.085",
        rich_help_panel=TRAINING,
    ),
]
BasisOption = Annotated[
    Basis | None,
    typer.Option(
        help="Whose components: kfac-svd's, svd-llm's (whitened), asvd's (scaled), or svd's.",
        show_default="kfac",
        rich_help_panel=TRAINING,
    ),
]
DeviationOption = Annotated[
    Deviation | None,
    typer.Option(
        help="Add to each layer's outputs what keeps their mean, or a trained vector.",
        show_default="none",
        rich_help_panel=TRAINING,
    ),
]
LearningRateOption = Annotated[
    float | None,
    typer.Option(metavar="X", help="Of Adam.", show_default="measured", rich_help_panel=TRAINING),
]
MicroBatchOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Sequences of a step to hold in memory at a time.",
        show_default="all 8",
        rich_help_panel=TRAINING,
    ),
]
CheckpointingOption = Annotated[
    bool,
    typer.Option(
        "--checkpointing",
        help="Compute activations again where they are needed: less memory, a third slower.",
        rich_help_panel=TRAINING,
    ),
]
AllocatorOption = Annotated[
    AllocatorName | None,
    typer.Option(
        help="How the layers share the budget.",
        show_default="the method's own",
        rich_help_panel=CLOSED,
    ),
]
PivotedOption = Annotated[
    bool | None,
    typer.Option(
        "--pivoted/--no-pivoted",
        help="Store pivot rows and what combines them: the same layer in fewer parameters.",
        show_default="for soco",
    ),
]
RefineOption = Annotated[
    bool,
    typer.Option(
        "--refine",
        help="At the end, train all factors together to give what the dense model gives.",
    ),
]
SurgeonOption = Annotated[
    bool,
    typer.Option(
        "--surgeon",
        help="Scale the components that stay so that they make up for those that went.",
    ),
]
TaskDataOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Files with the questions, such as ai2_arc_ARC-Easy.test.jsonl: no network is used.",
        show_default="from the hub",
        rich_help_panel=TASKS,
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="At most so many questions per task.",
        show_default="all",
        rich_help_panel=TASKS,
    ),
]
NumFewshotOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Solved examples before each question.",
        show_default="as the task has it",
        rich_help_panel=TASKS,
    ),
]


def value_of(choice: Enum | None) -> Any:
    """The name that was chosen, None if none was."""
    return None if choice is None else choice.value


def training_options(method: MethodName, **given: Any) -> dict[str, Any]:
    """Those of SoCo's options that were given.

    Raises:
        ValueError: there are some, and the method is another one.
    """
    found = {name: value for name, value in given.items() if value is not None}
    if method is not MethodName.soco and found:
        option = next(iter(found)).replace("_", "-")
        raise ValueError(f"--{option} is for method soco: method {method.value} has no training")
    return found
