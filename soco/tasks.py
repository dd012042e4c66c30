"""Questions of lm-evaluation-harness put to a model: its prompts, its answers, its metrics.

Nothing is scored here: what this adds is a record of how each number came about.
"""

import contextlib
import copy
import io
import logging
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from soco.taskdata import Plan, imported, load, plan_task

DEFAULT_BATCH = 8  # requests to the model at a time


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task."""

    task: str
    metric: str  # as lm_eval calls it, with the filter of the answers in brackets if it has one
    value: float
    stderr: float | None  # standard error over the questions; None: lm_eval has no estimate
    chance: float | None  # expected of blind choice; None where that is not what is measured
    questions: int
    split: str  # of the data set, that the questions are from
    fewshot: int  # solved examples before each question
    examples: str | None  # split that they are from, or ``IN_DEFINITION``; None: there are none
    requests: int  # to the model, one for each answer to choose from
    truncated: int  # of these, how many lost their beginning, since the context is too short


@dataclass(frozen=True)
class TaskScores:
    """What ``evaluate_tasks`` measured, and with what."""

    scores: tuple[TaskScore, ...]
    notes: tuple[str, ...]  # in what the numbers differ from what their names let expect
    limit: int | None  # questions per task that were asked for; None: all
    seed: int  # of the choice of examples
    context: int  # tokens that the model was given at most
    batch_size: int  # requests at a time
    dtype: str  # the model's, in which it ran
    lm_eval: str  # version of the harness
    seconds: float  # running the model, without reading the data

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them; None for a value that is not finite."""
        scores = [
            asdict(score) | {"value": score.value if math.isfinite(score.value) else None}
            for score in self.scores
        ]
        return asdict(self) | {"scores": scores, "notes": list(self.notes)}

    def __str__(self) -> str:
        """A line per metric, notes, and what it was measured with."""
        head = ("task", "metric", "value", "stderr", "chance", "n", "split", "few-shot")
        rows = [head, *(_cells(score) for score in self.scores)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        left = {0, 1, 6}
        lines = [
            "  ".join(
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        limit = "all questions" if self.limit is None else f"limit {self.limit}"
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"lm_eval {self.lm_eval}, {limit}, {self.dtype}, {self.seconds:.1f} s")
        return "\n".join(lines)


def evaluate_tasks(
    model: nn.Module,
    tasks: str | Sequence[str],
    *,
    tokenizer: Any,
    data: str | PathLike[str] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TaskScores:
    """Ask a model the questions of tasks of lm-evaluation-harness.

    Prompts, few-shot formats, answers and metrics are those of the installed ``lm_eval``. The model
    runs in the dtype it has. The global random states are left alone.

    With ``data`` nothing is downloaded, and no network is tried: the questions are read from JSON
    lines in that folder, with the columns that the data set has on the hub. A file is named after
    the data set, its configuration and the split (``ai2_arc_ARC-Easy.test.jsonl``), or after the
    task (``arc_easy.test.jsonl``); ``soco.taskdata.file_names`` has all names. The harness's own
    split is taken if its file is there, else the validation split. Few-shot examples are taken from
    the file of the split that the harness takes them from, or, if there is none, from the questions
    themselves, where the harness leaves out the one that is asked. Scores say which it was.

    Args:
        model: a transformers model that predicts tokens, compressed or not, wherever it is; left in
            the mode (training or not) it was in.
        tasks: their names, or one string of names with commas between them. Groups are not taken.
        tokenizer: the model's, of transformers; it is not changed.
        data: a folder with files of questions; None: the harness loads its data from the hub.
        limit: so many questions per task, from the first; None: all.
        num_fewshot: solved examples before each question, but for tasks that are defined without;
            None: as the task is defined, which is 5 for gsm8k and 0 for most.
        batch_size: requests to the model at a time; None: ``DEFAULT_BATCH``.
        seed: of the choice of examples.
        progress: show bars, if stderr is a terminal.

    Returns:
        The scores, in the order of ``tasks``.

    Raises:
        ImportError: lm_eval is missing (``pip install "soco-llm[eval]"``).
        ValueError: there is no such task, no file for it, or its file does not fit it; the model
            does not predict the next token; no tokenizer; the context is too short to answer at
            all; a count is out of range.
    """
    names = _names(tasks)
    for title, count, least in (
        ("limit", limit, 1),
        ("num_fewshot", num_fewshot, 0),
        ("batch_size", batch_size, 1),
    ):
        if count is not None and count < least:
            raise ValueError(f"{title} must be at least {least}, got {count}")
    _check_model(model, tokenizer)
    version = imported("lm_eval").__version__
    progress = progress and sys.stderr.isatty()
    size = batch_size or DEFAULT_BATCH
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet(progress, downloads=data is None))
        stack.enter_context(_own_random_state(model, seed))
        stack.enter_context(_own_modes(model))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soco-tasks-")))
        folder = None if data is None else Path(data).expanduser()
        plans = [
            plan_task(name, folder, num_fewshot, scratch / str(i)) for i, name in enumerate(names)
        ]
        loaded = [load(plan, limit, seed) for plan in plans]
        harness = _harness_model(model, tokenizer, size, progress)
        for plan, task in zip(plans, loaded, strict=True):
            _check_room(plan, task, harness)
        imported("lm_eval.evaluator")  # takes seconds that are not the model's
        start = time.perf_counter()
        scores = [
            score
            for plan, task in zip(plans, loaded, strict=True)
            for score in _run(plan, task, harness, limit)
        ]
        seconds = time.perf_counter() - start
    notes = [note for plan in plans for note in plan.notes]
    for name, count, total in dict.fromkeys((s.task, s.truncated, s.requests) for s in scores):
        if count:
            notes.append(
                f"{name}: {count} of {total} requests lost their beginning: they and their answer "
                f"do not fit into {harness.max_length} tokens"
            )
    return TaskScores(
        scores=tuple(scores),
        notes=tuple(notes),
        limit=limit,
        seed=seed,
        context=harness.max_length,
        batch_size=size,
        dtype=str(getattr(model, "dtype", None)).removeprefix("torch."),
        lm_eval=version,
        seconds=seconds,
    )


def check_tasks(
    tasks: str | Sequence[str],
    *,
    data: str | PathLike[str] | None = None,
    num_fewshot: int | None = None,
) -> None:
    """See whether the tasks exist, and their files, before a model is loaded for them.

    The arguments are those of ``evaluate_tasks``.

    Raises:
        ImportError: lm_eval is missing.
        ValueError: there is no such task, or no file for it in ``data``.
    """
    names = _names(tasks)
    imported("lm_eval")
    folder = None if data is None else Path(data).expanduser()
    with (
        _quiet(False, downloads=data is None),
        tempfile.TemporaryDirectory(prefix="soco-tasks-") as scratch,
    ):
        for i, name in enumerate(names):
            plan_task(name, folder, num_fewshot, Path(scratch) / str(i))


def _names(tasks: str | Sequence[str]) -> list[str]:
    given = tasks.split(",") if isinstance(tasks, str) else tasks
    names = list(dict.fromkeys(name.strip() for name in given))
    if not names or "" in names:
        raise ValueError(f"tasks must be names of tasks, got {tasks!r}")
    return names


def _check_model(model: nn.Module, tokenizer: Any) -> None:
    if not getattr(model, "can_generate", lambda: False)():
        raise ValueError(
            f"tasks take a model that predicts the next token, and {type(model).__name__} does not"
        )
    if not callable(tokenizer):
        raise ValueError("tasks take text: give the tokenizer of the model")
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError("the tokenizer has no eos token, with which lm_eval ends an answer")


# ---- the model


def _harness_model(model: nn.Module, tokenizer: Any, batch_size: int, progress: bool) -> Any:
    """The model as the harness takes it, and one that counts what it cuts off."""

    class Counting(imported("lm_eval.models.huggingface").HFLM):
        truncated = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not progress)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            hide = disable_tqdm or not progress
            return super().loglikelihood_rolling(requests, disable_tqdm=hide)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=disable_tqdm or not progress)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
            for _, before, after in requests:
                both = len(before) + len(after) - 1  # the last token is not given to the model
                given = len(before) if self.backend == "seq2seq" else both
                self.truncated += given > self.max_length
            return super()._loglikelihood_tokens(requests, *args, **options)

        def tok_batch_encode(self, strings: Any, *args: Any, **options: Any) -> Any:
            room = options.get("left_truncate_len") or math.inf
            self.truncated += sum(len(self.tok_encode(text)) > room for text in strings)
            return super().tok_batch_encode(strings, *args, **options)

    return Counting(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)


def _check_room(plan: Plan, task: Any, harness: Any) -> None:
    """Refuse a task whose answers alone would fill the model's context, before any is asked."""
    if task.OUTPUT_TYPE != "generate_until":
        return
    answer = (task.config.generation_kwargs or {}).get("max_gen_toks", harness.max_gen_toks)
    if answer >= harness.max_length:
        raise ValueError(
            f"task {plan.name} cannot be asked: an answer may take {answer} tokens, and the model "
            f"has a context of {harness.max_length}"
        )


def _run(plan: Plan, task: Any, harness: Any, limit: int | None) -> list[TaskScore]:
    """Ask the questions of one task."""
    evaluate = imported("lm_eval.evaluator").evaluate
    asked = {"tasks": {plan.name: task}}
    before = harness.truncated
    try:
        found = evaluate(lm=harness, task_dict=asked, limit=limit, log_samples=False)
    except AssertionError as error:  # of the harness, about the context of the model
        raise ValueError(f"task {plan.name} cannot be asked: {error}") from error
    chance = _chance(task)
    scores = []
    for key, value in found["results"][plan.name].items():
        metric, comma, strategy = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = found["results"][plan.name].get(f"{metric}_stderr,{strategy}")
        scores.append(
            TaskScore(
                task=plan.name,
                metric=metric if strategy == "none" else f"{metric} ({strategy})",
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, float) else None,
                chance=chance if metric.startswith("acc") else None,
                questions=found["n-samples"][plan.name]["effective"],
                split=plan.split,
                fewshot=plan.fewshot,
                examples=plan.examples,
                requests=len(task.instances),
                truncated=harness.truncated - before,
            )
        )
    return scores


def _chance(task: Any) -> float | None:
    """The share of right answers that blind choice has: the mean of right over possible ones."""
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):
        return None
    shares = []
    for doc in {instance.doc_id: instance.doc for instance in task.instances}.values():
        right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        count = len(right) if isinstance(right, list) else 1
        shares.append(count / len(task.doc_to_choice(doc)))
    return sum(shares) / len(shares)


# ---- as it was before


@contextlib.contextmanager
def _quiet(progress: bool, downloads: bool) -> Iterator[None]:
    """Inside, the harness writes nothing but bars, to stderr, if there is progress to show."""
    datasets, api = imported("datasets"), imported("lm_eval.api.task")
    loggers = [logging.getLogger("lm_eval"), logging.getLogger("datasets")]
    levels = [logger.level for logger in loggers]
    had_bars = not datasets.are_progress_bars_disabled()
    bar = api.tqdm
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    if not (progress and downloads):
        datasets.disable_progress_bars()
    if not progress:
        api.tqdm = partial(tqdm, disable=True)  # building prompts has no switch for its bar
    try:
        with contextlib.redirect_stdout(sys.stderr if progress else io.StringIO()):
            yield
    finally:
        api.tqdm = bar
        if had_bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _own_random_state(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside, all random numbers follow from the seed; afterwards the states are as they were."""
    devices = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(sorted(devices)):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _own_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode (training or not) it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _cells(score: TaskScore) -> tuple[str, ...]:
    """One line of the table."""
    examples = f"{score.fewshot}" if not score.examples else f"{score.fewshot} ({score.examples})"
    return (
        score.task,
        score.metric,
        f"{score.value:.4f}",
        "" if score.stderr is None else f"{score.stderr:.4f}",
        "" if score.chance is None else f"{score.chance:.4f}",
        f"{score.questions}",
        score.split,
        examples,
    )
