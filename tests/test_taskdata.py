"""soco.taskdata: which file belongs to a task, what it must hold, and where examples come from."""

import itertools
import json
import sys

import pytest

from soco.taskdata import Plan, file_names, load, plan_task, read_rows
from task_rows import ARC, COPA, GSM8K, ROWS, TRUTH, write_all, write_rows

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


@pytest.fixture
def planned(tmp_path):
    """``planned(task, folder)``: the plan, and the task as the harness has it."""
    numbers = itertools.count()

    def plan(name, folder, num_fewshot=None, limit=None, seed=0):
        made = plan_task(name, folder, num_fewshot, tmp_path / f"scratch{next(numbers)}")
        return made, load(made, limit, seed)

    return plan


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "data"
    made.mkdir()
    return made


def prompts(task):
    task.build_all_requests()
    return [instance.arguments[0] for instance in task.instances]


# ---- the files


@pytest.mark.parametrize(
    ("task", "dataset", "config", "split", "expected"),
    [
        ("arc_easy", "allenai/ai2_arc", "ARC-Easy", "test", "ai2_arc_ARC-Easy.test.jsonl"),
        ("arc_easy", "allenai/ai2_arc", "ARC-Easy", "test", "ai2_arc_ARC-Easy_test.jsonl"),
        ("arc_easy", "allenai/ai2_arc", "ARC-Easy", "test", "arc_easy.test.jsonl"),
        ("piqa", "baber/piqa", None, "validation", "piqa.validation.jsonl"),
        ("piqa", "baber/piqa", None, "validation", "piqa_plain_text.validation.jsonl"),
        ("gsm8k", "openai/gsm8k", "main", "test", "gsm8k_test.jsonl"),
        ("gsm8k", "openai/gsm8k", "main", "test", "gsm8k_main.test.jsonl"),
        ("copa", "aps/super_glue", "copa", "validation", "super_glue_copa.validation.jsonl"),
        ("mine", None, None, "test", "mine.test.jsonl"),
    ],
)
def test_file_names(task, dataset, config, split, expected):
    assert expected in file_names(task, dataset, config, split)


def test_files_of_another_configuration_or_loader_are_not_taken():
    names = file_names("arc_easy", "allenai/ai2_arc", "ARC-Easy", "test")
    assert "ai2_arc.test.jsonl" not in names  # of which of its configurations?
    assert "ai2_arc_main.test.jsonl" not in names
    assert file_names("sum", "json", None, "test") == ["sum.test.jsonl", "sum_test.jsonl"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty: it has no questions"),
        (b"\n \n", "is empty: it has no questions"),
        (b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        (b"[1]\n", r"line 1 is not an object: \[1\]"),
        (b'{"a": 1}\n\n{"b": 1}\n', "line 3 lacks the column 'a', unlike the first row"),
        (b'{"a": 1}\n{"a": 1, "b": 1}\n', "line 2 has the column 'b', unlike the first row"),
        (b'{"a": "\xff"}\n', "is not UTF-8"),
    ],
)
def test_broken_files(tmp_path, content, expected):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"rows.jsonl {expected}"):
        read_rows(path)


def test_rows_keep_order_and_line_separators(tmp_path):
    rows = [{"a": "x\u2028y", "b": 2}, {"b": 1, "a": ""}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert read_rows(path) == rows


# ---- the definitions


def test_an_unknown_task(folder):
    with pytest.raises(ValueError, match="lm_eval has no task 'arc_eazy': did you mean arc_easy"):
        plan_task("arc_eazy", folder, None, folder / "s")
    with pytest.raises(ValueError, match=r"lm_eval has no task 'qqqqqq' \(groups are not taken\)"):
        plan_task("qqqqqq", folder, None, folder / "s")


def test_from_the_hub_the_definition_is_the_harness_s_own(tmp_path):
    plan = plan_task("gsm8k", None, None, tmp_path / "s")
    assert plan.definition.is_relative_to(lm_eval.__path__[0])
    assert (plan.file, plan.split, plan.fewshot, plan.examples) == (None, "test", 5, "train")


@pytest.mark.parametrize("name", ROWS)
def test_prompts_are_those_of_the_harness(planned, folder, name):
    """The definition with a local file differs from the harness's own in the source only."""
    plan, task = planned(name, write_all(folder), num_fewshot=0)
    own = plan_task(name, None, 0, folder / "own")
    manager = lm_eval.tasks.TaskManager(
        include_defaults=False, include_path=str(plan.definition.parent)
    )
    mine = manager.task_index[name].cfg
    source = {
        "custom_dataset", "dataset_path", "dataset_name", "dataset_kwargs",
        "training_split", "validation_split", "test_split", "fewshot_split",
    }  # fmt: skip
    assert {k: v for k, v in mine.items() if k not in source} == {
        k: v for k, v in own.config.items() if k not in source
    }
    assert len(task.eval_docs) == len(ROWS[name][1])
    assert plan.notes == ()


def test_a_prompt_word_for_word(planned, folder):
    write_rows(folder, "super_glue_copa.validation.jsonl", COPA[:1])
    _, task = planned("copa", folder)
    task.build_all_requests()
    assert [instance.arguments for instance in task.instances] == [
        ("The man turned on the faucet therefore", "  the toilet filled with water."),
        ("The man turned on the faucet therefore", "  water flowed from the spout."),
    ]


# ---- which file


def test_the_harness_s_own_split_comes_first(planned, folder):
    write_rows(folder, "ai2_arc_ARC-Easy.validation.jsonl", ARC)
    plan, _ = planned("arc_easy", folder)
    assert (plan.split, plan.notes) == (
        "validation",
        ("arc_easy: the questions are of the split validation, not of test",),
    )
    write_rows(folder, "ai2_arc_ARC-Easy.test.jsonl", ARC[:1])
    plan, task = planned("arc_easy", folder)
    assert (plan.split, plan.notes, len(task.eval_docs)) == ("test", (), 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hellaswag", "holds no hellaswag.validation.jsonl"),
        ("mathqa", "holds no math_qa.test.jsonl nor math_qa.validation.jsonl"),
        ("truthfulqa_mc2", "holds no truthful_qa_multiple_choice.validation.jsonl"),
        ("gsm8k", "holds no gsm8k.test.jsonl"),
    ],
)
def test_a_missing_file_is_named(folder, name, expected):
    with pytest.raises(ValueError, match=f"^task {name} has no questions: .*data {expected}$"):
        plan_task(name, folder, None, folder / "s")


def test_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder '.*nowhere'"):
        plan_task("copa", tmp_path / "nowhere", None, tmp_path / "s")


def test_tasks_that_no_file_can_serve(folder):
    with pytest.raises(ValueError, match="task squadv2 makes its data by a program"):
        plan_task("squadv2", folder, None, folder / "s")


# ---- what is in it


def without(rows, column):
    return [{key: value for key, value in row.items() if key != column} for row in rows]


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("arc_easy", "question"),
        ("arc_easy", "choices"),
        ("arc_easy", "answerKey"),
        ("copa", "premise"),
        ("copa", "label"),
        ("gsm8k", "answer"),
        ("hellaswag", "ctx_b"),
        ("hellaswag", "endings"),
        ("mathqa", "options"),
        ("openbookqa", "question_stem"),  # the harness would put this word into the prompt
        ("piqa", "sol2"),
        ("piqa", "label"),  # and here every answer would count as wrong
        ("truthfulqa_mc1", "mc1_targets"),
        ("winogrande", "answer"),
    ],
)
def test_a_missing_column_is_named(planned, folder, name, column):
    file, rows = ROWS[name]
    write_rows(folder, file, without(rows, column))
    with pytest.raises(ValueError, match=rf"{file} does not fit task {name}: it has no '{column}'"):
        planned(name, folder)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("piqa", {"label": -1}, "the answer -1 of question 2 is not a choice"),
        ("piqa", {"label": 2}, "the answer 2 of question 2 is not a choice"),
        ("piqa", {"label": None}, "the answer None of question 2 is not a choice"),
        ("arc_easy", {"answerKey": "E"}, "'E' is not in list"),
        ("winogrande", {"answer": "3"}, "it has no '3'"),
    ],
)
def test_answers_that_are_no_choices(planned, folder, name, change, expected):
    """They would count as wrong answers: a test split whose answers are hidden, for one."""
    file, rows = ROWS[name]
    first = ARC[0] if name == "arc_easy" else rows[0]
    write_rows(folder, file, [first, {**first, **change}])
    with pytest.raises(ValueError, match=expected):
        planned(name, folder)
    planned(name, folder, limit=1)  # only what is asked has to be right


def test_columns_of_several_kinds(planned, folder):
    file, rows = ROWS["piqa"]
    write_rows(folder, file, [rows[0], {**rows[1], "goal": [1]}])
    with pytest.raises(ValueError, match=f"values of one column of .*{file} differ in kind"):
        planned("piqa", folder)


def test_texts_that_look_like_dates_stay_texts(planned, folder):
    file, rows = ROWS["piqa"]
    write_rows(folder, file, [{**row, "sol1": "2020-01-01", "sol2": "2021-02-03"} for row in rows])
    _, task = planned("piqa", folder)
    assert task.eval_docs[0]["sol1"] == "2020-01-01"


# ---- examples


def test_examples_of_the_split_that_the_harness_takes_them_from(planned, folder):
    write_rows(folder, "gsm8k.test.jsonl", GSM8K[:1])
    train = [{"question": f"Train {n}?", "answer": f"#### {n}"} for n in range(6)]
    write_rows(folder, "gsm8k.train.jsonl", train)
    plan, task = planned("gsm8k", folder)
    assert (plan.fewshot, plan.examples, plan.notes) == (5, "train", ())
    (prompt,) = prompts(task)
    assert prompt.count("Question: Train ") == 5
    assert prompt.endswith(f"Question: {GSM8K[0]['question']}\nAnswer:")


def test_without_that_split_a_question_is_no_example_of_itself(planned, folder):
    write_rows(folder, "gsm8k.test.jsonl", GSM8K)
    plan, task = planned("gsm8k", folder, num_fewshot=2)
    assert (plan.fewshot, plan.examples) == (2, "test")
    assert plan.notes == ("gsm8k: the examples are of the split test, not of train",)
    for row, prompt in zip(GSM8K, prompts(task), strict=True):
        assert row["answer"] not in prompt
        assert all(other["answer"] in prompt for other in GSM8K if other is not row)


def test_a_validation_file_is_a_better_source_than_the_questions(planned, folder):
    write_rows(folder, "arc_easy.test.jsonl", ARC)
    write_rows(folder, "arc_easy.validation.jsonl", [{**ARC[0], "question": "Which is it?"}])
    plan, task = planned("arc_easy", folder, num_fewshot=1)
    assert (plan.split, plan.examples) == ("test", "validation")
    assert plan.notes == ("arc_easy: the examples are of the split validation, not of train",)
    assert all(prompt.startswith("Question: Which is it?") for prompt in prompts(task))


def test_examples_follow_the_seed(planned, folder):
    rows = [{"question": f"Q{n}?", "answer": f"#### {n}"} for n in range(40)]
    write_rows(folder, "gsm8k.test.jsonl", rows)
    first, again, other = (
        prompts(planned("gsm8k", folder, seed=seed, limit=1)[1]) for seed in (3, 3, 4)
    )
    assert first == again != other


def test_too_few_examples(planned, folder):
    write_rows(folder, "gsm8k.test.jsonl", GSM8K)
    with pytest.raises(ValueError, match="task gsm8k: 5 examples are wanted, and there are 2"):
        planned("gsm8k", folder)


def test_examples_need_the_same_columns(planned, folder):
    write_rows(folder, "gsm8k.test.jsonl", GSM8K)
    write_rows(folder, "gsm8k.train.jsonl", without(GSM8K, "answer"))
    with pytest.raises(ValueError, match=r"train.jsonl and .*test.jsonl have different columns"):
        planned("gsm8k", folder)
    planned("gsm8k", folder, num_fewshot=0)  # it is not read then


def test_a_task_that_is_defined_without_examples(planned, folder):
    write_rows(folder, "truthful_qa_multiple_choice.validation.jsonl", TRUTH)
    plan, task = planned("truthfulqa_mc1", folder, num_fewshot=3)
    assert plan.notes == ("truthfulqa_mc1: it is defined without examples, and none were added",)
    assert (plan.fewshot, plan.examples, task.config.num_fewshot) == (0, None, 0)


def test_examples_that_are_part_of_the_definition(planned, folder):
    write_rows(folder, "gsm8k.test.jsonl", GSM8K)
    plan, task = planned("gsm8k_cot", folder)
    assert (plan.fewshot, plan.examples, plan.notes) == (8, "task", ())
    assert all(prompt.count("Q: ") == 9 for prompt in prompts(task))


def test_without_the_harness(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r'pip install "soco-llm\[eval\]"'):
        load(Plan("copa", tmp_path, {}, None, (), "test", 0, None, ()), None, 0)
