"""soco.evaluate_tasks: the harness's numbers, where they come from, and nothing left changed."""

import json
import logging
import random
import socket
import sys
import tempfile

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import soco
from soco import tasks
from soco.tasks import TaskScore, TaskScores, check_tasks, evaluate_tasks
from task_rows import ARC, COPA, GSM8K, ROWS, write_all, write_rows
from tiny_models import compress, tiny_model

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def dense(demo_model):
    return AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def small(dense, tmp_path_factory):
    """The same model with few components, as it comes back from a folder."""
    folder = tmp_path_factory.mktemp("small") / "out"
    model = AutoModelForCausalLM.from_config(dense.config)
    model.load_state_dict(dense.state_dict())
    soco.save(compress(model, rank=8), folder)
    return soco.load(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def offline(monkeypatch):
    """Every try to reach a network fails, and fails the test."""

    def refuse(*_, **__):
        pytest.fail("the network was tried")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)


def log_likelihood(model, tokenizer, prompt, answer):
    """Of the tokens of an answer after a prompt; no token of the demo's goes over the seam."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
    with torch.no_grad():
        chosen = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
    return chosen[start - 1 :].sum().item()


@pytest.mark.parametrize("which", ["dense", "small"])
def test_accuracy_is_that_of_the_model(request, which, tokenizer, folder):
    """Computed here from the prompts that the harness documents for COPA."""
    model = request.getfixturevalue(which).eval()
    hits = []
    for row in COPA:
        word = {"cause": "because", "effect": "therefore"}[row["question"]]
        prompt = row["premise"][:-1] + f" {word}"
        answers = [f"  {row[c][0].lower()}{row[c][1:]}" for c in ("choice1", "choice2")]
        scores = [log_likelihood(model, tokenizer, prompt, answer) for answer in answers]
        hits.append((scores[1] > scores[0]) == row["label"])
    mean = float(np.mean(hits))
    error = (mean * (1 - mean) / (len(hits) - 1)) ** 0.5
    (score,) = evaluate_tasks(model, ["copa"], tokenizer=tokenizer, data=folder).scores
    assert (score.value, score.stderr) == (pytest.approx(mean), pytest.approx(error))
    assert (score.task, score.metric, score.chance, score.questions) == ("copa", "acc", 0.5, 3)
    assert (score.split, score.fewshot, score.examples) == ("validation", 0, None)
    assert (score.requests, score.truncated) == (6, 0)


def test_the_models_differ(dense, small, tokenizer):
    """Or the test above would pass with one of them in the place of the other."""
    prompt, answer = "The man turned on the faucet therefore", "  water flowed from the spout."
    values = [log_likelihood(model, tokenizer, prompt, answer) for model in (dense, small)]
    assert abs(values[0] - values[1]) > 1


def test_all_tasks_without_a_network_and_without_a_trace(
    small, tokenizer, folder, offline, monkeypatch, tmp_path, capfd
):
    datasets = pytest.importorskip("datasets")
    names = [name for name in ROWS if name != "gsm8k"]  # see below
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "home"))
    found = evaluate_tasks(small, ",".join(names), tokenizer=tokenizer, data=folder)
    assert list(dict.fromkeys(score.task for score in found.scores)) == names
    assert {(s.task, s.metric): s.chance for s in found.scores} == {
        ("arc_easy", "acc"): pytest.approx((1 / 4 + 1 / 5) / 2),
        ("arc_easy", "acc_norm"): pytest.approx((1 / 4 + 1 / 5) / 2),
        ("arc_challenge", "acc"): pytest.approx((1 / 4 + 1 / 5) / 2),
        ("arc_challenge", "acc_norm"): pytest.approx((1 / 4 + 1 / 5) / 2),
        ("copa", "acc"): 0.5,
        ("hellaswag", "acc"): 0.25,
        ("hellaswag", "acc_norm"): 0.25,
        ("mathqa", "acc"): 0.2,
        ("mathqa", "acc_norm"): 0.2,
        ("openbookqa", "acc"): pytest.approx((1 / 4 + 1 / 5) / 2),
        ("openbookqa", "acc_norm"): pytest.approx((1 / 4 + 1 / 5) / 2),
        ("piqa", "acc"): 0.5,
        ("piqa", "acc_norm"): 0.5,
        ("truthfulqa_mc1", "acc"): 0.5,
        ("truthfulqa_mc2", "acc"): None,  # a share of probability
        ("winogrande", "acc"): 0.5,
    }
    assert all(0 <= score.value <= 1 for score in found.scores)
    assert list(tmp_path.rglob("*")) == [scratch]
    assert capfd.readouterr() == ("", "")


def test_generated_answers(tokenizer, folder, offline):
    """gsm8k leaves 256 tokens for the answer, so the prompt with 2 examples has to be cut."""
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=300)
    found = evaluate_tasks(
        model, "gsm8k", tokenizer=tokenizer, data=folder, num_fewshot=2, limit=2, batch_size=2
    )
    assert [score.metric for score in found.scores] == [
        "exact_match (strict-match)",
        "exact_match (flexible-extract)",
    ]
    for score in found.scores:
        assert (score.questions, score.fewshot, score.examples, score.chance) == (
            2,
            2,
            "test",
            None,
        )
        assert (score.requests, score.truncated) == (2, 2)
    assert found.notes == (
        "gsm8k: the examples are of the split test, not of train",
        "gsm8k: 2 of 2 requests lost their beginning: they and their answer do not fit into 300 "
        "tokens",
    )


def test_a_context_that_leaves_no_room(tokenizer, folder):
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    with pytest.raises(ValueError, match="gsm8k cannot be asked: an answer may take 256 tok"):
        evaluate_tasks(model, "gsm8k", tokenizer=tokenizer, data=folder, num_fewshot=0)


def test_a_task_that_cannot_be_asked_is_told_before_any_is(tokenizer, folder, monkeypatch):
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    monkeypatch.setattr(tasks, "_run", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(ValueError, match="task gsm8k cannot be asked"):
        evaluate_tasks(model, "copa,gsm8k", tokenizer=tokenizer, data=folder, num_fewshot=0)


def test_questions_that_are_cut_are_counted(dense, tokenizer, tmp_path):
    context = dense.config.max_position_embeddings
    long = {**ARC[0], "question": "Is it warm? " * context}
    write_rows(tmp_path, "arc_easy.test.jsonl", [ARC[0], long])
    found = evaluate_tasks(dense, "arc_easy", tokenizer=tokenizer, data=tmp_path)
    assert [(score.requests, score.truncated) for score in found.scores] == [(8, 4)] * 2
    assert found.notes == (
        f"arc_easy: 4 of 8 requests lost their beginning: they and their answer do not fit into "
        f"{context} tokens",
    )
    assert found.context == context


@pytest.mark.parametrize("kind", ["gpt2", "mamba", "t5", "mixtral"])
def test_other_architectures(kind, tokenizer, folder):
    model = tiny_model(kind, vocab_size=len(tokenizer))
    found = evaluate_tasks(model, "copa,arc_easy", tokenizer=tokenizer, data=folder, limit=1)
    assert [score.questions for score in found.scores] == [1, 1, 1]


def test_what_is_asked_and_how(small, tokenizer, folder):
    found = evaluate_tasks(
        small, ["arc_easy", "arc_easy"], tokenizer=tokenizer, data=str(folder), limit=1, seed=7
    )
    assert [score.metric for score in found.scores] == ["acc", "acc_norm"]
    assert (found.limit, found.seed, found.batch_size, found.dtype) == (1, 7, 8, "float32")
    assert found.scores[0].stderr is None  # of one question
    assert found.seconds > 0


def test_the_same_seed_gives_the_same_numbers(small, tokenizer, tmp_path):
    """The same seed gives the same numbers, in batches of any size."""
    rows = [{**ARC[0], "question": f"Is it {n} degrees?"} for n in range(12)]
    write_rows(tmp_path, "arc_easy.test.jsonl", rows)

    def values(**changes):
        options = {"tokenizer": tokenizer, "data": tmp_path, "num_fewshot": 1, **changes}
        return [score.value for score in evaluate_tasks(small, "arc_easy", **options).scores]

    assert values() == values() == values(batch_size=1)


def test_the_caller_s_things_are_as_they_were(small, tokenizer, folder):
    api = pytest.importorskip("lm_eval.api.task")
    small.train()
    small.model.layers[0].eval()
    modes = [module.training for module in small.modules()]
    logger = logging.getLogger("lm_eval")
    weights = {name: weight.clone() for name, weight in small.state_dict().items()}

    def outside():
        numpy = np.random.get_state(legacy=False)["state"]["key"].tolist()  # type: ignore[index]
        states = random.getstate(), numpy, torch.get_rng_state().tolist()
        return *states, str(tokenizer), tokenizer.pad_token_id, api.tqdm, logger.level

    before = outside()
    evaluate_tasks(small, "copa", tokenizer=tokenizer, data=folder, num_fewshot=1, seed=5)
    assert outside() == before
    assert [module.training for module in small.modules()] == modes
    assert all(torch.equal(weights[name], weight) for name, weight in small.state_dict().items())


def test_tied_heads_that_were_compressed(tokenizer, folder):
    """The harness ties the weights of any model once more."""
    model = compress(tiny_model("llama-tied", vocab_size=len(tokenizer)), rank=4)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids).logits
        evaluate_tasks(model, "copa", tokenizer=tokenizer, data=folder, limit=1)
        assert torch.equal(model(ids).logits, before)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"num_fewshot": -1}, "num_fewshot must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"tasks": ""}, "tasks must be names of tasks, got ''"),
        ({"tasks": []}, r"tasks must be names of tasks, got \[\]"),
        ({"tasks": "copa,"}, "tasks must be names of tasks, got 'copa,'"),
        ({"tasks": "arc_eazy"}, "lm_eval has no task 'arc_eazy': did you mean arc_easy"),
        ({"tokenizer": None}, "tasks take text: give the tokenizer of the model"),
        ({"data": "nowhere"}, "there is no folder 'nowhere'"),
    ],
)
def test_what_is_refused(small, tokenizer, folder, changes, expected):
    options = {"tasks": "copa", "tokenizer": tokenizer, "data": folder, **changes}
    with pytest.raises(ValueError, match=expected):
        evaluate_tasks(small, **options)


def test_tasks_can_be_checked_beforehand(folder, offline):
    check_tasks("copa, arc_easy", data=folder)
    with pytest.raises(ValueError, match="lm_eval has no task 'arc_eazy': did you mean arc_easy"):
        check_tasks(["copa", "arc_eazy"], data=folder)
    with pytest.raises(ValueError, match="there is no folder 'nowhere'"):
        check_tasks("copa", data="nowhere")
    check_tasks("copa")  # the hub's data are not looked for


def test_encoders_are_refused(tokenizer, folder):
    with pytest.raises(ValueError, match="that predicts the next token, and BertForMaskedLM does"):
        evaluate_tasks(tiny_model("bert"), "copa", tokenizer=tokenizer, data=folder)


def test_a_tokenizer_without_an_end_is_refused(small, demo_model, folder):
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no eos token"):
        evaluate_tasks(small, "copa", tokenizer=tokenizer, data=folder)


def test_without_the_harness(small, tokenizer, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r'^tasks need .*: pip install "soco-llm\[eval\]"$'):
        evaluate_tasks(small, "copa", tokenizer=tokenizer, data=folder)


# ---- how it is told


def test_as_text_and_as_json():
    def score(task, metric, value, stderr=None, chance=None, fewshot=0, examples=None):
        return TaskScore(task, metric, value, stderr, chance, 20, "test", fewshot, examples, 80, 0)

    scores = (
        score("arc_easy", "acc", 0.25, 0.0993, 0.2475),
        score("gsm8k", "exact_match (strict-match)", 0.0, fewshot=5, examples="train"),
        score("words", "perplexity", float("inf")),
    )
    found = TaskScores(scores, ("a note",), 20, 0, 512, 8, "bfloat16", "0.4.13", 1.26)
    assert str(found).splitlines() == [
        "task      metric                       value  stderr  chance   n  split   few-shot",
        "arc_easy  acc                         0.2500  0.0993  0.2475  20  test           0",
        "gsm8k     exact_match (strict-match)  0.0000                  20  test   5 (train)",
        "words     perplexity                     inf                  20  test           0",
        "note: a note",
        "lm_eval 0.4.13, limit 20, bfloat16, 1.3 s",
    ]
    told = found.to_dict()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert [score["value"] for score in told["scores"]] == [0.25, 0.0, None]
    assert (told["notes"], told["lm_eval"], told["limit"]) == (["a note"], "0.4.13", 20)
    assert set(told["scores"][0]) == set(TaskScore.__dataclass_fields__)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("arc_easy", "validation"),
        ("arc_challenge", "validation"),
        ("copa", "validation"),
        ("gsm8k", "test"),
        ("openbookqa", "validation"),
        ("piqa", "validation"),
        ("winogrande", "validation"),
    ],
)
def test_real_questions(shared_data, dense, tokenizer, name, split, offline):
    folder = shared_data / "tasks"
    if not folder.is_dir():
        pytest.skip("the folder ../shared/data/tasks is not there")
    if name == "gsm8k":
        dense = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=300)
    found = evaluate_tasks(dense, name, tokenizer=tokenizer, data=folder, limit=2)
    assert {(score.split, score.questions) for score in found.scores} == {(split, 2)}


def test_rows_here_have_the_columns_of_the_hub(shared_data):
    """Or the tests above would be about data sets that do not exist."""
    folder = shared_data / "tasks"
    if not folder.is_dir():
        pytest.skip("the folder ../shared/data/tasks is not there")
    for stem, rows in (
        ("super_glue_copa.validation", COPA),
        ("ai2_arc_ARC-Easy.validation", ARC),
        ("gsm8k_test", GSM8K),
        ("piqa_plain_text.validation", ROWS["piqa"][1]),
        ("winogrande_winogrande_xl.validation", ROWS["winogrande"][1]),
    ):
        with (folder / f"{stem}.jsonl").open() as file:
            real = json.loads(file.readline())
        assert {k: type(v) for k, v in real.items()} == {k: type(v) for k, v in rows[0].items()}
