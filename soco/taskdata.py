"""Where lm-evaluation-harness finds a task: its definition, and data from the hub or a folder."""

import contextlib
import difflib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

DEFINITION = "task.yaml"  # file with the definition of a task whose data is in a folder
IN_DEFINITION = "task"  # stands for a split where a task's definition holds its own examples

# What a task makes of a document: templates of Jinja, bare names of columns, or functions.
_FIELDS = ("doc_to_text", "doc_to_target", "doc_to_choice")

# What the code of a task raises about rows that do not have the form it was written for.
_MISFIT = (AssertionError, AttributeError, LookupError, SyntaxError, TypeError, ValueError)

# Names that the hub gives to the only configuration of a dataset: files may have any or none.
ONLY_ONE = ("default", "main", "plain_text")

# Datasets of this name are files themselves: nothing about a task can be told from it.
_LOADERS = (None, "arrow", "csv", "json", "parquet", "text")


@dataclass(frozen=True)
class Plan:
    """One task: its definition in the harness, and where its data is."""

    name: str
    definition: Path  # YAML to load: the harness's own, or one that includes it
    config: Mapping[str, Any]  # the harness's own, functions as their names
    file: Path | None  # the questions; None: on the hub
    columns: tuple[str, ...]  # of the file
    split: str  # of the questions
    fewshot: int
    examples: str | None  # see TaskScore
    notes: tuple[str, ...]


def imported(name: str) -> Any:
    """A module of lm_eval or of what comes with it.

    Raises:
        ImportError: lm_eval is missing.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ImportError(
            'tasks need lm-evaluation-harness: pip install "soco-llm[eval]"'
        ) from error


@cache
def _definitions() -> dict[str, Path]:
    """All tasks of the harness by name, with the file that defines each.

    The harness's own index parses its 13,000 files, which takes half a minute. Here only the line
    with the name is read, in the same order; the harness then parses what is asked for.
    """
    line = re.compile(r"^[\"']?task[\"']?\s*:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)
    found: dict[str, Path] = {}
    folder = Path(imported("lm_eval.tasks").__file__).parent
    for path in sorted(folder.glob("**/*.yaml"), key=Path.as_posix):
        if match := line.search(path.read_text("utf-8")):
            found.setdefault(match[1], path)
    return found


def plan_task(name: str, folder: Path | None, num_fewshot: int | None, scratch: Path) -> Plan:
    """Find a task's definition and, if it is to come from a folder, its data.

    Args:
        name: of the task.
        folder: of the data; None: the hub.
        num_fewshot: see ``soco.evaluate_tasks``.
        scratch: a folder to make and to write into; needed until the task has been asked.

    Raises:
        ImportError: lm_eval is missing.
        ValueError: there is no such task, no file for it, or the file cannot be read.
    """
    known = _definitions()
    if name not in known:
        close = difflib.get_close_matches(name, known, 3, 0.7)
        hint = f": did you mean {' or '.join(close)}?" if close else " (groups are not taken)"
        raise ValueError(f"lm_eval has no task {name!r}{hint}")
    config = _index({"include": str(known[name]), "task": name}, scratch / "own")[name].cfg
    notes = []
    fewshot = config.get("num_fewshot") or 0
    if num_fewshot is not None and num_fewshot != fewshot:
        if config.get("num_fewshot") == 0:  # the harness does not change that either
            notes.append(f"{name}: it is defined without examples, and none were added")
        else:
            fewshot = num_fewshot
    plan = Plan(
        name=name,
        definition=known[name],
        config=config,
        file=None,
        columns=(),
        split=config.get("test_split") or config.get("validation_split") or "",
        fewshot=fewshot,
        examples=_examples_split(config) if fewshot else None,
        notes=tuple(notes),
    )
    return plan if folder is None else _local(plan, folder, scratch)


def _local(plan: Plan, folder: Path, scratch: Path) -> Plan:
    """The same task with its data from a folder: the harness's definition with other sources."""
    file, split = _find(plan, folder)
    files = {split: file}
    notes = list(plan.notes)
    if split != plan.split:
        notes.append(f"{plan.name}: the questions are of the split {split}, not of {plan.split}")
    examples = plan.examples
    if examples not in (None, IN_DEFINITION, split):
        others = [s for s in (examples, plan.config.get("validation_split")) if s and s != split]
        found = ((s, find_file(folder, _file_names(plan, s))) for s in others)
        examples, other = next((pair for pair in found if pair[1]), (split, None))
        if other is not None:
            files[examples] = other
            if read_rows(other)[0].keys() != read_rows(file)[0].keys():
                raise ValueError(f"{other} and {file} have different columns")
        if examples != plan.examples:
            notes.append(
                f"{plan.name}: the examples are of the split {examples}, not of {plan.examples}"
            )
    changed = {
        "include": str(plan.definition),
        "task": plan.name,
        "dataset_path": None,
        "dataset_name": None,
        "dataset_kwargs": {"files": {key: str(path) for key, path in files.items()}},
        "training_split": None,
        "validation_split": None,
        # Where both are one split, the harness leaves out the question that is asked.
        "test_split": split,
        "fewshot_split": examples if examples in files else split,
    }
    if _examples_split(plan.config) == IN_DEFINITION:
        del changed["fewshot_split"]
    _index(changed, scratch / "local", "custom_dataset: !function soco.taskdata.local_splits\n")
    return replace(
        plan,
        definition=scratch / "local" / DEFINITION,
        file=file,
        columns=tuple(read_rows(file)[0]),
        split=split,
        examples=examples,
        notes=tuple(notes),
    )


def local_splits(files: Mapping[str, str], **_: Any) -> dict[str, Any]:
    """The splits of a task by name; the harness calls this with what the definition holds.

    ``datasets.load_dataset`` would do, but it counts each load over the network, leaves a cache,
    and makes dates of texts that look like dates.
    """
    dataset = imported("datasets").Dataset
    splits = {}
    for name, path in files.items():
        try:
            splits[name] = dataset.from_list(read_rows(Path(path)))
        except (TypeError, OverflowError, imported("pyarrow").ArrowException) as error:
            raise ValueError(f"values of one column of {path} differ in kind: {error}") from error
    return splits


def _index(content: Mapping[str, Any], folder: Path, more: str = "") -> Mapping[str, Any]:
    """What the harness reads in a new folder that holds one definition."""
    folder.mkdir(parents=True)
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in content.items()]  # JSON is YAML
    (folder / DEFINITION).write_text("".join(lines) + more, "utf-8")
    manager = imported("lm_eval.tasks").TaskManager(
        include_defaults=False, include_path=str(folder)
    )
    return manager.task_index


def _examples_split(config: Mapping[str, Any]) -> str:
    """The split that the harness takes examples from, or that they are part of the definition."""
    if (config.get("fewshot_config") or {}).get("samples") is not None:
        return IN_DEFINITION
    keys = ("fewshot_split", "training_split", "validation_split", "test_split")
    return next((config[key] for key in keys if config.get(key)), IN_DEFINITION)


def _file_names(plan: Plan, split: str) -> list[str]:
    dataset, configuration = plan.config.get("dataset_path"), plan.config.get("dataset_name")
    return file_names(plan.name, dataset, configuration, split)


def _find(plan: Plan, folder: Path) -> tuple[Path, str]:
    """The file with a task's questions, and which split that is."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}")
    config = plan.config
    if "class" in config or config.get("custom_dataset"):
        raise ValueError(f"task {plan.name} makes its data by a program: no file can replace it")
    if any(metric.get("hf_evaluate") for metric in config.get("metric_list") or ()):
        raise ValueError(f"task {plan.name} downloads its metric: files alone are not enough")
    splits = [config[key] for key in ("test_split", "validation_split") if config.get(key)]
    for split in splits:
        if (path := find_file(folder, _file_names(plan, split))) is not None:
            return path, split
    wanted = " nor ".join(_file_names(plan, split)[0] for split in splits)
    raise ValueError(f"task {plan.name} has no questions: {folder} holds no {wanted}")


# ---- the data


def load(plan: Plan, limit: int | None, seed: int) -> Any:
    """The harness's task, its data read.

    That of a folder is checked for what would otherwise give a wrong number in silence: a column
    that is missing may end up as its name in the prompt, and an answer that is not among the
    choices counts as a wrong one.

    Args:
        plan: of ``plan_task``.
        limit: only so many questions are checked.
        seed: of the choice of examples.

    Raises:
        ValueError: the data cannot be loaded, or does not fit the task.
    """
    manager = imported("lm_eval.tasks").TaskManager(include_defaults=False)
    if plan.file is None:
        try:
            task = manager.load([str(plan.definition)])["tasks"][plan.name]
        except RuntimeError as error:
            raise ValueError(f"the data of task {plan.name} cannot be loaded: {error}") from error
    else:
        with _fitting(plan):
            if not plan.config.get("process_docs"):  # which may add columns
                _check_columns(plan, plan.columns)
            task = manager.load([str(plan.definition)])["tasks"][plan.name]
            _check_columns(plan, task.features)
            for number, doc in enumerate(islice(task.eval_docs, limit), start=1):
                _check_answer(task, doc, number)
            if plan.fewshot:
                _check_examples(plan, task)
    task.set_config("num_fewshot", plan.fewshot)
    task.set_fewshot_seed(seed)
    return task


@contextlib.contextmanager
def _fitting(plan: Plan) -> Iterator[None]:
    """Inside, what the code of a task raises about its rows becomes a sentence."""
    undefined = imported("jinja2").UndefinedError
    try:
        yield
    except (*_MISFIT, undefined) as error:
        missing = type(error) is KeyError
        reason = f"it has no {error}" if missing else str(error) or "an assertion failed"
        raise ValueError(f"{plan.file} does not fit task {plan.name}: {reason}") from error


def _check_columns(plan: Plan, columns: Any) -> None:
    """Refuse a missing column: the harness takes its bare name for a text, or leaves a hole."""
    environment = imported("jinja2").Environment()
    undeclared = imported("jinja2.meta").find_undeclared_variables
    for key in _FIELDS:
        field = plan.config.get(key)
        if not isinstance(field, str) or " is defined" in field:
            continue
        used = {field} if field.isidentifier() else undeclared(environment.parse(field))
        for name in sorted(used - set(environment.globals) - set(columns)):
            raise KeyError(name)


def _check_answer(task: Any, doc: Mapping[str, Any], number: int) -> None:
    """Refuse a question whose answer is not among the choices: it would count as a wrong one."""
    text, target = task.doc_to_text(doc), task.doc_to_target(doc)
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    choices = task.doc_to_choice(doc)
    answers = text if task.multiple_input else target
    for answer in answers if isinstance(answers, list) else [answers]:
        inside = answer in choices or (isinstance(answer, int) and 0 <= answer < len(choices))
        if not inside:
            raise ValueError(f"the answer {answer!r} of question {number} is not a choice")


def _check_examples(plan: Plan, task: Any) -> None:
    """Refuse fewer examples than asked for, and those that the task cannot read."""
    pool = list(task.fewshot_docs())
    own = plan.examples == plan.split
    if len(pool) - own < plan.fewshot:
        raise ValueError(f"{plan.fewshot} examples are wanted, and there are {len(pool) - own}")
    if plan.examples != IN_DEFINITION and not own:
        for doc in pool:
            task.doc_to_text(doc)
            task.doc_to_target(doc)


# ---- the files


def file_names(task: str, dataset: str | None, config: str | None, split: str) -> list[str]:
    """The names that a file with one split of a task may have, the plainest first.

    Args:
        task: as lm-evaluation-harness calls it, "arc_easy".
        dataset: as the hub calls it, "allenai/ai2_arc"; its owner is not part of the names.
        config: which of the dataset's configurations it is, "ARC-Easy"; None where it has but one.
        split: "validation".

    >>> file_names("arc_easy", "allenai/ai2_arc", "ARC-Easy", "test")[::2]
    ['ai2_arc_ARC-Easy.test.jsonl', 'arc_easy.test.jsonl']
    """
    stems = []
    if dataset not in _LOADERS:
        base = dataset.rpartition("/")[2]  # type: ignore[union-attr]
        if config is None or config in ONLY_ONE:
            stems = [base, *(f"{base}_{name}" for name in ONLY_ONE)]
        else:
            stems = [f"{base}_{config}"]
    stems = list(dict.fromkeys([*stems, task]))
    return [f"{stem}{between}{split}.jsonl" for stem in stems for between in "._"]


def find_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of the names that is a file in the folder."""
    paths = (folder / name for name in names)
    return next((path for path in paths if path.is_file()), None)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file with one JSON object a line, each with the same columns.

    Raises:
        ValueError: it is empty or not UTF-8, or a line is not an object, or has other columns than
            the first; the line is named.
    """
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is not an object: {row!r:.60}")
        if rows and row.keys() != rows[0].keys():
            odd = sorted(row.keys() ^ rows[0].keys())[0]
            has = "has" if odd in row else "lacks"
            raise ValueError(f"{path} line {number} {has} the column {odd!r}, unlike the first row")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty: it has no questions")
    return rows
