"""The commands of ``soco`` and their options."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from soco.cli.decomposing import decompose
from soco.cli.options import (
    ENTRY_OPTIONS,
    RUNNING,
    AllocatorName,
    AllocatorOption,
    BasisOption,
    BatchSizeOption,
    BlockwiseOption,
    CalibrationOption,
    CheckpointingOption,
    DeviationOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    EffortOption,
    ExcludeOption,
    FolderArgument,
    IncludeOption,
    JsonOption,
    LearningRateOption,
    LengthOption,
    LimitOption,
    MethodName,
    MicroBatchOption,
    ModelArgument,
    NewFolderOption,
    NumFewshotOption,
    PivotedOption,
    PresetOption,
    QuietOption,
    RatioOption,
    RefineOption,
    ReplacedFolderOption,
    SamplesOption,
    SeveralRatiosOption,
    SizeOption,
    SpacingOption,
    StatsOption,
    StepsOption,
    StreamOption,
    SurgeonOption,
    TaskDataOption,
    WorkOption,
    WrittenOption,
    training_options,
    value_of,
)
from soco.cli.planning import plan
from soco.cli.program import Commands, run_program

# torch, transformers and what needs them are imported in the commands: `soco --help` is quick.

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(decompose)
app.command()(plan)


@app.callback(invoke_without_command=True)
def _soco(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks, and what other libraries have to say.")
    ] = False,
) -> None:
    """Compress the linear layers of language models by a learned SVD.

    A first try, which takes two minutes: soco compress demo --output demo-out
    """
    if show_version:
        print(f"soco-llm {version('soco-llm')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def compress(
    model: ModelArgument,
    output: ReplacedFolderOption,
    ratio: RatioOption = None,
    ratios: SeveralRatiosOption = None,
    size: SizeOption = None,
    calibration: CalibrationOption = None,
    method: Annotated[MethodName, typer.Option(help="How to compress.")] = MethodName.soco,
    effort: EffortOption = None,
    preset: PresetOption = None,
    samples: SamplesOption = None,
    length: LengthOption = None,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same model.")] = 0,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    steps: StepsOption = None,
    written: WrittenOption = None,
    spacing: SpacingOption = None,
    basis: BasisOption = None,
    deviation: DeviationOption = None,
    learning_rate: LearningRateOption = None,
    micro_batch: MicroBatchOption = None,
    checkpointing: CheckpointingOption = False,
    allocator: AllocatorOption = None,
    pivoted: PivotedOption = None,
    refine: RefineOption = False,
    surgeon: SurgeonOption = False,
    stats: StatsOption = None,
    batch_size: BatchSizeOption = 8,
    stream: StreamOption = False,
    work: WorkOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Compress a model and write it to a folder that transformers loads."""
    training = training_options(
        method,
        steps=steps,
        written=written,
        spacing=spacing,
        basis=value_of(basis),
        deviation=value_of(deviation),
        learning_rate=learning_rate,
        micro_batch=micro_batch,
        checkpointing=checkpointing or None,
    )
    if method is MethodName.soco and allocator is not None:
        raise ValueError("--allocator is for other methods: soco finds its ranks by training")
    sizes = {"ratio": ratio, "ratios": ratios, "size": size}
    given = [name for name, value in sizes.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} both say how small: give one of them")
    if spacing is not None and ratios is None:
        raise ValueError("--spacing is how far apart sizes between several are: give --ratios")
    from soco.cli import commands, streamed
    from soco.cli.shared import one_voice
    from soco.cli.wanted import Compression

    wanted = Compression(
        model=model,
        output=output,
        ratio=ratio,
        ratios=ratios,
        size=size,
        method=method.value,
        effort=value_of(effort),
        preset=value_of(preset),
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        include=include,
        exclude=exclude,
        allocator=value_of(allocator),
        pivoted=pivoted,
        refine=refine or None,
        surgeon=surgeon or None,
        stats=stats,
        batch_size=batch_size,
        stream=stream,
        work=work,
        dtype=dtype.value,
        device=device,
        quiet=quiet,
        training=training,
    )
    with one_voice():
        (streamed if stream else commands).compress(wanted)


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="A model, compressed or not: a folder, an id on the hub, or demo.",
            show_default=False,
        ),
    ],
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            "-t",
            metavar="FILE",
            help="Text to measure on: .txt, .jsonl or .json, also .gz; demo: a story that is part "
            "of soco.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Tasks of lm-evaluation-harness, with commas: arc_easy,piqa,gsm8k.",
            show_default=False,
        ),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model before compression, to compare with.",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Tokens per window.",
            show_default="the model's context, at most 2048",
        ),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="At most so many.", show_default="all")
    ] = None,
    task_data: TaskDataOption = None,
    limit: LimitOption = None,
    num_fewshot: NumFewshotOption = None,
    as_json: JsonOption = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Windows, or requests of tasks, at a time.",
            show_default="as many as hold 2048 tokens, 16384 on CUDA; 8 requests",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    stream: BlockwiseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure perplexity on a text and the distance to the dense model, or answers to tasks."""
    if text is None and tasks is None:
        raise ValueError("say what to measure on: --text FILE, --tasks NAMES, or both")
    of_tasks = {"task_data": task_data, "limit": limit, "num_fewshot": num_fewshot}
    of_text = {"length": length, "windows": windows}
    for given, needed, options in ((tasks, "--tasks", of_tasks), (text, "--text", of_text)):
        for name, value in options.items():
            if given is None and value is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for {needed}")
    from soco.cli import commands
    from soco.cli.shared import one_voice

    with one_voice():
        commands.evaluate(
            model,
            text,
            dense,
            tasks=tasks,
            task_options={"data": task_data, "limit": limit, "num_fewshot": num_fewshot},
            length=length,
            windows=windows,
            batch_size=batch_size,
            dtype=dtype.value,
            device=device,
            as_json=as_json,
            stream=stream,
            quiet=quiet,
        )


@app.command()
def compare(
    model: ModelArgument,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for report.md, pictures and compare.json. What an earlier run of the same "
            "left undone there is done, and nothing twice.",
            show_default=False,
        ),
    ],
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            "-m",
            metavar="NAMES",
            help="With commas between them: METHOD, METHOD@ALLOCATOR, and +OPTION behind either, "
            "as in svd,svd-llm@energy,soco. Methods: "
            f"{', '.join(name.value for name in MethodName)}. Allocators: "
            f"{', '.join(name.value for name in AllocatorName)}. Options: "
            f"{', '.join(ENTRY_OPTIONS)}.",
            show_default="each method once, and svd-llm@energy",
        ),
    ] = None,
    ratios: Annotated[
        str,
        typer.Option(
            "--ratios",
            "-r",
            metavar="X,X",
            help="Fractions of the compressed layers' parameters to remove.",
        ),
    ] = "0.2,0.4,0.6",
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            "-c",
            metavar="FILE|self",
            help="Text to learn from, as for soco compress.",
            show_default="self for demo, else none",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            "-t",
            metavar="FILE",
            help="Text to measure on, as for soco evaluate; more of them may follow, such as one "
            "of another kind than the calibration.",
            show_default="demo for demo, else none",
        ),
    ] = None,
    samples: SamplesOption = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Tokens in each, and in each window that is measured on.",
            show_default="256 for demo, else the model's context, at most 2048",
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Measure on at most so many of each text.", show_default="all"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all that is random.")] = 0,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print compare.json.")] = False,
    stats: StatsOption = None,
    batch_size: BatchSizeOption = 8,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Compare methods: the same text and sizes for all, one table, pictures."""
    from soco.cli import comparing

    comparing.compare(
        comparing.Wanted(
            model=model,
            output=output,
            methods=methods,
            ratios=ratios,
            calibration=calibration,
            texts=text or [],
            samples=samples,
            length=length,
            windows=windows,
            seed=seed,
            include=include,
            exclude=exclude,
            stats=stats,
            batch_size=batch_size,
            dtype=dtype.value,
            device=device,
            as_json=as_json,
            quiet=quiet,
        )
    )


@app.command()
def resize(
    folder: FolderArgument,
    output: NewFolderOption,
    ratio: RatioOption = None,
    size: SizeOption = None,
) -> None:
    """Make another size of a model that was compressed with --ratios; no data, no training."""
    if (ratio is None) == (size is None):
        raise ValueError("give either --ratio or --size")
    from soco.cli import commands

    commands.resize(folder, output, ratio, size)


@app.command()
def report(
    folder: FolderArgument,
    as_json: JsonOption = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw it, too, into a .png, .svg or .pdf file.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say how a model was compressed, layer by layer."""
    from soco.cli import commands

    commands.report(folder, plot, as_json=as_json)


@app.command()
def export(
    folder: FolderArgument,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="New folder to write.", show_default=False
        ),
    ],
    dense: Annotated[
        bool, typer.Option("--dense", help="As the stock model, with the factors multiplied out.")
    ] = False,
) -> None:
    """Write a compressed model in a form that needs no soco, at the original size."""
    if not dense:
        raise ValueError("say in which form to write it: --dense is the one there is")
    from soco.cli import commands

    commands.export(folder, output)


@app.command()
def verify(
    folder: FolderArgument,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The dense model: every layer is compared with it."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="What is run.", show_default="a story that soco brings"),
    ] = None,
    as_json: JsonOption = False,
    stream: BlockwiseOption = False,
) -> None:
    """Check a compressed model: its files, its numbers, and its layers against the dense ones."""
    from soco.cli import commands

    commands.verify(folder, against, text, as_json=as_json, stream=stream)


@app.command()
def info(as_json: JsonOption = False) -> None:
    """Say what is installed, what can run on which device, and what is missing."""
    from soco.cli import commands

    commands.info(as_json=as_json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``soco``.

    Args:
        arguments: what stands after ``soco``; None: what the shell gave.

    Returns:
        The exit code: 0, 2 for what the user can put right, 130 for Ctrl-C.
    """
    return run_program(app, "soco", arguments)
