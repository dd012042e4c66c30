"""Models larger than memory: a folder compressed into another, block by block."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from soco.allocators import AdaCR, Allocator, Uniform
from soco.archive import hash_of_data
from soco.assembling import Assembly, Outcome, Piece
from soco.calibration import OF_GRADIENTS, Statistics
from soco.chain import Chain, inside
from soco.checkpoint import check_replaceable, mark_compressed
from soco.choices import Choices, check_streamed, choose
from soco.data import positive
from soco.diagnosis import versions
from soco.dismantling import Dismantling
from soco.factorization import choose_ranks, groups_of, stacked_shapes
from soco.guard import Clock
from soco.installation import layer_reports, size_of
from soco.keeping import clear, result
from soco.lending import Lender
from soco.linalg import Spectrum
from soco.memory import give_back_memory
from soco.methods import FittedMethod, Method, SequentialMethod, TrainedMethod
from soco.preparation import (
    calibration_source,
    calibration_windows,
    noted,
    progress_bar,
    warn_of_rare,
)
from soco.processes import count, number, told, wait
from soco.ranks import check_ratio, is_dense, parameter_budget, uniform_ranks
from soco.refitting import Fits
from soco.reporting import Report, history_columns
from soco.resuming import OWN_TEXT, drafts, forget_drafts, own_text
from soco.scoring import Training
from soco.sequential import stages
from soco.stored import StoredModel
from soco.surgery import find_linears, fused_experts, shape_of
from soco.workbench import Workbench
from soco.workfolder import WorkFolder, opened, work_folder

FORMAT = 3  # of the work folder


def compress_folder(
    folder: str | PathLike[str],
    output: str | PathLike[str],
    ratio: float = 0.5,
    *,
    method: str | Method = "svd-llm",
    effort: str | None = None,
    preset: str | None = None,
    tokenizer: Any = None,
    calibration: Any = None,
    samples: int = 256,
    length: int | None = None,
    seed: int = 0,
    allocator: str | Allocator | None = None,
    pivoted: bool | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    work: str | PathLike[str] | None = None,
    progress: bool | None = None,
) -> Report:
    """Compress a model that need not fit into memory, from folder to folder.

    One transformer block is in memory at a time: the calibration text runs through it, its layers
    are taken apart, and what it puts out goes to disk for the next one. So memory holds one block,
    the statistics of its layers (float64: the squares of their inputs), the decomposition of one
    layer, one batch, and the embeddings; not more for a deeper model. Methods that read gradients
    ("kfac-svd", "soco") go through all blocks to the loss, and back from the last one to the first:
    then memory holds what autograd keeps of one block, and the logits of one batch. The result is
    that of ``soco.compress`` with the same batch size.

    Where scores are learned ("soco") the components of all layers go to disk, and each block's are
    read when it runs, forward and on the way back, where it is computed again; a step reads those
    that are alive twice or three times. Memory then holds one block with its components, the scores
    and their optimizer, the logits of one micro-batch, and what each block was given of it: that
    alone grows with the depth. Text that the model writes itself costs a reading of all weights for
    every token. Fits to what layers see behind compressed blocks ("aa-svd") go through the blocks
    once more, of the dense model and of the compressed one: memory holds a block of either.

    What is done is kept in a work folder. After a crash, a kill or Ctrl-C the same call goes on
    where it was, repeats the calibration of one block and the decomposition of one layer at most,
    or a minute of the training, and ends with the same weights, bit for bit. On disk the work
    folder takes the factors in float32 and twice the hidden states of the calibration, or those of
    all blocks on the way back; with learned scores all components, in the dtype that is computed
    in, and the last hidden states of what is trained on.

    Args:
        folder: of a dense transformers model in safetensors.
        output: folder to write, new or empty, or of a model compressed by soco, which is replaced.
        ratio: fraction of the layers' parameters to remove, above 0 and below 1.
        method: "soco" without refinement, or a closed form, such as "svd-llm" or "kfac-svd"; a name
            or an instance.
        effort: of method "soco": "fast" or "balanced" (as without it).
        preset: of method "soco": "paper".
        tokenizer: needed where the calibration is text.
        calibration: as in ``soco.compress``. Not needed by "svd".
        samples: calibration sequences.
        length: tokens of each; None: what the model allows, at most 2048.
        seed: of the choice of sequences, of drawn labels, and of the training.
        allocator: "uniform", "energy", "v2", "effective-rank" or "adacr"; None: the method's own.
        pivoted: store a layer as pivot rows and what combines them, as in ``soco.compress``.
        include: glob patterns of the layers to compress, in the transformer blocks.
        exclude: glob patterns of layers to leave alone.
        batch_size: sequences at a time.
        dtype: to compute in; None: as the model is stored.
        device: to compute on.
        work: the work folder; None: ``output`` with ".work" at its end. Deleted at the end.
        progress: whether to show progress bars, on stderr; None: if that is a terminal.

    Returns:
        What was done, as ``soco.report`` reads it from the folder.

    Raises:
        ValueError: an argument makes no sense or does not go with streaming, the folder is broken,
            a weight or activation holds NaN or Inf (the layer is named), or the work folder is in
            use or of another run.
        OSError: a file cannot be written, the disk being full, say.

    Warns:
        UserWarning: the calibration has less than was asked for, or layers saw too little of it.
    """
    choices = choose(
        method, allocator, effort=effort, preset=preset, seed=seed, pivoted=pivoted
    )  # fmt: skip
    check_ratio(ratio)
    check_streamed(choices)
    positive("batch_size", batch_size)
    if choices.reads_text and calibration is None:
        raise ValueError(f"method {choices.method.name} learns from text: give calibration=")
    own = isinstance(calibration, str) and calibration == "self"
    target = Path(output)
    check_replaceable(target)
    place = work_folder(target, work)
    stored = StoredModel(folder)
    targets, fused = _check_model(stored, include, exclude)
    notes: list[str] = []
    clock = Clock(torch.device(device))
    windows = None

    def read(work: WorkFolder | None = None) -> Tensor:
        with clock("calibration text"), noted(notes):
            return calibration_windows(
                stored.model, calibration, tokenizer, samples, length, seed, progress, drafts(work)
            )

    if choices.reads_text and not own:
        windows = read()
    plan = {
        "format": FORMAT,
        "model": stored.fingerprint(),
        "method": choices.method.name,
        "settings": choices.settings(),
        "ratio": ratio,
        "layers": list(targets),
        "batch_size": batch_size,
        "seed": seed,
        "calibration": None if windows is None else hash_of_data(windows, batch_size),
        "own text": {"samples": samples, "length": length} if own and choices.reads_text else None,
        "dtype": str(dtype or stored.dtype),
        "device": torch.device(device).type,
        "versions": versions(),
    }
    if isinstance(choices.method, TrainedMethod):
        plan["processes"] = count()  # each has a state of its own
    with opened(place, plan) as kept:
        if number() == 0:
            clear(kept, target)
        where = dtype or stored.dtype, torch.device(device)
        if choices.reads_text and windows is None:
            windows = _own_text(kept, Lender(stored, kept, {}, *where), read)
        source = calibration_source(calibration, windows, seed)
        run = _Run(
            stored, targets, fused, windows, source, choices, ratio, batch_size, seed, *where, kept,
            clock, notes, progress,
        )  # fmt: skip
        run.all_blocks()
        outcome = run.outcome()
        give_back_memory()
        return run.write(target, outcome)


def _own_text(work: WorkFolder, lender: Lender, write: Callable[[WorkFolder], Tensor]) -> Tensor:
    """Token ids that the model writes, with a block in memory at a time; once."""
    if not told(work.has(OWN_TEXT)):
        with lender.lent():
            windows = write(work)
        if number() == 0:
            work.put_tensors(OWN_TEXT, {"ids": windows})
            forget_drafts(work)
        wait()
    return cast(Tensor, own_text(work))


def _check_model(
    stored: StoredModel, include: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The layers to compress, and fused experts that are layers now; refuses what is no chain."""
    model = stored.model
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} has an encoder and a decoder, and cannot be streamed")
    fused = stored.split_experts()
    targets = find_linears(model, include, exclude)
    for block, names in stages(model, targets):
        if block is model:
            raise ValueError(f"{names[0]} lies outside of the blocks, and cannot be streamed")
    stored.check_complete()
    return targets, fused


@dataclass
class _Run:
    """One compression under way."""

    stored: StoredModel
    targets: dict[str, nn.Module]
    fused: dict[str, nn.Module]  # experts of which the model has layers instead
    windows: Tensor | None  # None: the method reads no text
    source: Mapping[str, Any]  # of these, for the report
    choices: Choices
    ratio: float
    batch_size: int
    seed: int  # of drawn labels
    dtype: torch.dtype  # that is computed in
    device: torch.device
    work: WorkFolder
    clock: Clock
    notes: list[str]
    progress: bool | None

    def __post_init__(self) -> None:
        """What follows from that."""
        self.model = self.stored.model
        self.chain = Chain(
            self.stored, self.work, self.windows, self.batch_size, self.dtype, self.device
        )
        self.names = [[n for n in self.targets if inside(n, path)] for path in self.chain.paths]
        some = [i for i, names in enumerate(self.names) if names]
        self.last = some[-1]
        self.back = bool(self.choices.needs & OF_GRADIENTS)  # whether gradients are wanted
        self.order = range(self.last + 1)  # of the blocks
        if self.back:
            self.order = range(some[0], len(self.names))[::-1]
        self.shapes = {name: shape_of(module) for name, module in self.targets.items()}
        self.budget = parameter_budget(self.shapes, self.ratio)
        self.files = {name: f"layer-{i}.safetensors" for i, name in enumerate(self.targets)}
        self.pivoted = self.choices.pivoted
        self.reads = bool(self.choices.needs)  # whether there are statistics
        self.lender = Lender(self.stored, self.work, self.files, self.dtype, self.device)
        self.groups = groups_of(self.choices.method, self.shapes)
        self.units = stacked_shapes(self.shapes, self.groups)
        self.known = None  # ranks of units that can be told before any is taken apart
        if isinstance(self.choices.rule, Uniform):
            self.known = uniform_ranks(self.units, self.budget, pivoted=self.pivoted)
        tokens = 0 if self.windows is None else self.windows.numel()
        self.parts = Dismantling(
            self.stored, self.work, self.lender, self.files, self.groups, self.units, self.known,
            self.choices, tokens, self.dtype, self.device,
        )  # fmt: skip

    # Block after block ----------------------------------------------------------------------------

    def all_blocks(self) -> None:
        """Take all layers apart, from where an earlier run stopped.

        From the first block on; or, where gradients are wanted, from the last one back to it, after
        the calibration has run through all of them.
        """
        done = told({block: self.work.has(_marker(block)) for block in self.order})
        there = len(self._passes())
        with self.chain, progress_bar(there + len(done), "blocks", self.progress) as bar:
            self._through(bar)
            for place, block in enumerate(self.order):
                found = None if done[block] else self._block(block)
                wait()  # for the layers of the other processes, and what they read
                if number() == 0:
                    if found is not None:
                        self.work.put_json(_marker(block), found)
                    self.chain.forget(block + 1 if self.back else block)
                bar(there + place + 1)
        wait()
        for file in [*self._passes(), *map(_marker, self.order)]:
            for phase, seconds in self.work.get_json(file)["seconds"].items():
                self.clock.seconds[phase] = round(self.clock.seconds.get(phase, 0) + seconds, 3)
        if self.reads:
            with noted(self.notes):
                warn_of_rare(self._seen())

    def _passes(self) -> list[str]:
        """The files that tell of the way through all blocks to the loss."""
        if not self.back:
            return []
        return [*(f"forward-{block}.json" for block in range(len(self.chain.blocks))), "loss.json"]

    def _through(self, bar: Callable[[int], None]) -> None:
        """Where gradients are wanted, run the calibration through all blocks to the loss."""
        files = self._passes()
        done = told([self.work.has(file) for file in files])
        for block, file in enumerate(files):
            if not done[block]:
                begin = time.perf_counter()
                if block < len(self.chain.blocks):
                    self.chain.pass_on(block)
                else:
                    self.chain.turn(self.seed, self.choices.needs)
                wait()
                if number() == 0:
                    seconds = {"statistics": time.perf_counter() - begin}
                    self.work.put_json(file, {"seconds": seconds})
            bar(block + 1)

    def _seen(self) -> dict[str, tuple[int, int]]:
        """Layer to the tokens that it saw, and to how many inputs it has."""
        every = [self.work.get_json(_marker(block))["tokens"] for block in sorted(self.order)]
        return {n: (t, self.shapes[n][1]) for tokens in every for n, t in tokens.items()}

    def _block(self, block: int) -> dict[str, Any]:
        """One block: its statistics, and its layers taken apart, each by one of the processes."""
        begin = time.perf_counter()
        names = self.names[block]
        statistics: dict[str, Statistics] = {}
        if self.reads:
            layers = {name: self.targets[name] for name in names}
            kinds = self.choices.needs
            if self.back:
                statistics = self.chain.back(block, layers, kinds)
            else:
                statistics = self.chain.statistics(block, layers, kinds, last=block == self.last)
        tokens = {name: each.tokens for name, each in statistics.items()}
        between = time.perf_counter()
        self.parts.block(names, statistics)
        seconds = {"statistics": between - begin, "decomposition": time.perf_counter() - between}
        return {"tokens": tokens, "seconds": seconds}

    # What becomes of the layers -------------------------------------------------------------------

    def outcome(self) -> Outcome:
        """By learned scores, or by a closed form at the ranks that the rule finds."""
        method = self.choices.method
        if isinstance(method, TrainedMethod):
            training = Training(
                self.stored, self.work, self.lender, self.targets, self.files, self.budget,
                self.pivoted, self._bench(), self.clock, self.notes, self.progress,
            )  # fmt: skip
            return training.outcome(method)
        found = self._ranks()
        ranks = {
            name: found[group[0]]
            for group in self.groups
            if not is_dense(self.units[group[0]], found[group[0]], self.pivoted)
            for name in group
        }
        ranks = {name: ranks[name] for name in self.targets if name in ranks}
        fits = Fits(
            self.stored, self.work, self.targets, self.files, self.groups, ranks, self.windows,
            self.batch_size, self.dtype, self.device, self.progress,
        )  # fmt: skip
        follows = isinstance(method, SequentialMethod) and method.is_sequential(self.ratio)
        if not follows and not isinstance(method, FittedMethod):
            return Outcome(ranks, lambda name: Piece(fits.cut(name)))
        with self.clock("factors"), noted(self.notes):
            if follows:
                fits.behind_each_other(cast(SequentialMethod, method))
            else:
                fits.one_by_one(cast(FittedMethod, method))
        return Outcome(ranks, lambda name: Piece(fits.fitted(name) if name in ranks else None))

    def _ranks(self) -> dict[str, int]:
        if self.known is not None:
            return self.known
        empty = torch.empty(0)
        held = {unit: self.work.get_tensors(self.files[unit]) for unit in self.units}
        spectra = {name: Spectrum(empty, each["sigma"], empty) for name, each in held.items()}
        method, rule, bench = self.choices.method, self.choices.rule, self._bench()
        if isinstance(rule, AdaCR):
            bench.similarities = {name: float(each["similarity"]) for name, each in held.items()}
        return choose_ranks(
            bench, method, rule, self.groups, spectra, self.budget, self.pivoted, dict
        )

    def _bench(self) -> Workbench:
        """What learning and rules ask; it knows which layers saw nothing."""
        bench = Workbench(
            self.model, self.targets, self.windows, batch_size=self.batch_size, seed=self.seed,
            progress=lambda total, title: progress_bar(total, title, self.progress),
            source=dict(self.source), work=self.work, mean_of=self.parts.mean,
        )  # fmt: skip
        if self.reads:
            bench.note_unseen(name for name, (tokens, _) in self._seen().items() if not tokens)
        return bench

    # The result -----------------------------------------------------------------------------------

    def write(self, target: Path, outcome: Outcome) -> Report:
        """Put the result into a folder: what became of the layers, and all else as it is."""
        assembly = Assembly(
            self.stored, self.targets, self.fused, self.groups, outcome, self.pivoted, self.dtype
        )
        before, made = size_of(self.model), assembly.install()
        after, peak = size_of(self.model), self.clock.peak()
        report = Report(
            method=self.choices.method.name,
            ratio=self.ratio,
            layers=layer_reports(self.targets, made, self.groups, outcome.scores),
            model_params_before=before[0],
            model_params_after=after[0],
            model_bytes_before=before[1],
            model_bytes_after=after[1],
            seconds=self.clock.seconds,
            peak_bytes=peak[0],
            peak_of=peak[1],
            calibration=dict(self.source),
            settings=self.choices.settings(),
            left_dense=tuple(fused_experts(self.model)),
            warnings=tuple(self.notes),
            history=history_columns(list(outcome.history)),
            versions=versions(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        mark_compressed(self.model, outcome.ranks, report.to_dict(), outcome.biased)
        if number() == 0:
            with result(self.work, target) as folder:
                assembly.write(folder, self.progress)
        wait()
        return report


def _marker(number: int) -> str:
    return f"block-{number}.json"
