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
    as_json: JsonOption = False,
) -> None:
    """Say what soco compress will take in memory, on disk and in time, from config.json alone."""
    training = {"steps": steps, "micro_batch": micro_batch, "checkpointing": checkpointing or None}
    training = {name: value for name, value in training.items() if value is not None}
    if method is not MethodName.soco and training:
        option = next(iter(training)).replace("_", "-")
        raise ValueError(f"--{option} is for method soco: method {method.value} has no training")
    from soco.cli import planned

    planned.show(
        planned.Wanted(
            model=model,
            ratio=ratio,
            method=method.value,
            effort=None if effort is None else effort.value,
            preset=None if preset is None else preset.value,
            samples=samples,
            length=length,
            include=include,
            exclude=exclude,
            allocator=None if allocator is None else allocator.value,
            pivoted=pivoted,
            refine=refine or None,
            surgeon=surgeon or None,
            batch_size=batch_size,
            stream=stream,
            dtype=dtype.value,
            training=training,
        ),
        as_json=as_json,
    )
