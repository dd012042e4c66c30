"""The options of ``soco plan``."""

from typing import Annotated

import typer

from soco.cli.options import (
    AllocatorOption,
    BatchSizeOption,
    CheckpointingOption,
    Dtype,
    DtypeOption,
    EffortOption,
    ExcludeOption,
    IncludeOption,
    JsonOption,
    LengthOption,
    MethodName,
    MicroBatchOption,
    ModelArgument,
    PivotedOption,
    PresetOption,
    RatioOption,
    RefineOption,
    SamplesOption,
    StepsOption,
    StreamOption,
    SurgeonOption,
    training_options,
    value_of,
)


def plan(
    model: ModelArgument,
    ratio: RatioOption = None,
    method: Annotated[MethodName, typer.Option(help="How to compress.")] = MethodName.soco,
    effort: EffortOption = None,
    preset: PresetOption = None,
    samples: SamplesOption = None,
    length: LengthOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    steps: StepsOption = None,
    micro_batch: MicroBatchOption = None,
    checkpointing: CheckpointingOption = False,
    allocator: AllocatorOption = None,
    pivoted: PivotedOption = None,
    refine: RefineOption = False,
    surgeon: SurgeonOption = False,
    batch_size: BatchSizeOption = 8,
    stream: StreamOption = False,
    dtype: DtypeOption = Dtype.auto,
    gpus: Annotated[
        int, typer.Option(metavar="N", help="Also the time of N GPUs that share the work.", min=1)
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Say what soco compress will take in memory, on disk and in time, from config.json alone."""
    training = training_options(
        method, steps=steps, micro_batch=micro_batch, checkpointing=checkpointing or None
    )
    from soco.cli.planned import show
    from soco.cli.wanted import Wanted

    show(
        Wanted(
            model=model,
            ratio=ratio,
            method=method.value,
            effort=value_of(effort),
            preset=value_of(preset),
            samples=samples,
            length=length,
            include=include,
            exclude=exclude,
            allocator=value_of(allocator),
            pivoted=pivoted,
            refine=refine or None,
            surgeon=surgeon or None,
            batch_size=batch_size,
            stream=stream,
            dtype=dtype.value,
            training=training,
        ),
        gpus=gpus,
        as_json=as_json,
    )
