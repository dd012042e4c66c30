"""soco.data: every source gives the same ids, and every unreadable one its own sentence."""

import gzip
import itertools
import json
import re

import datasets
import numpy
import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from soco.data import cut_windows, positive, read_text, token_ids, token_windows

TEXTS = ["the cat sat", "on the mat", "and the dog sat on the cat"]
WORDS = ["[UNK]", "[BOS]", *sorted({word for text in TEXTS for word in text.split()})]
IDS = [WORDS.index(word) for text in TEXTS for word in text.split()]


@pytest.fixture
def words():
    """One id per word of TEXTS, in the tokenizers library, with a [BOS] as its special token."""
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 1)]
    )
    return tokenizer


@pytest.fixture
def transformers_words(words):
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=4)


def write(path, content):
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def json_lines(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


FILES = {
    "plain.txt": "\n\n".join(TEXTS),
    "plain": "\n\n".join(TEXTS),
    "windows.txt": "\ufeff" + "\r\n\r\n".join(TEXTS),
    "plain.v2.TXT.gz": "\n\n".join(TEXTS),
    "lines.jsonl": json_lines(TEXTS),
    "blank.jsonl.gz": json_lines(TEXTS).replace("\n", "\n\n"),
    "lines.json": json_lines(TEXTS),
    "objects.json": json.dumps([{"text": text} for text in TEXTS], indent=1),
    "strings.json.gz": json.dumps(TEXTS),
    "one.json": json.dumps({"text": "\n\n".join(TEXTS)}),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path, words, transformers_words):
    path = write(tmp_path / name, FILES[name])
    assert read_text(path) == "\n\n".join(TEXTS)
    for tokenizer in (words, transformers_words):
        for source in (path, str(path)):
            ids = token_ids(source, tokenizer)
            assert ids.dtype == torch.int64
            assert ids.tolist() == IDS


SOURCES = {
    "list": lambda: TEXTS,
    "generator": lambda: (text for text in TEXTS),
    "dataset": lambda: datasets.Dataset.from_dict({"id": [1, 2, 3], "text": TEXTS}),
    "streaming dataset": lambda: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
    "rows": lambda: [{"text": text} for text in TEXTS],
    "one row": lambda: {"text": "\n\n".join(TEXTS)},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_texts(kind, words, transformers_words):
    for tokenizer in (words, transformers_words):
        assert token_ids(SOURCES[kind](), tokenizer).tolist() == IDS


def id_lists():
    return [[WORDS.index(word) for word in text.split()] for text in TEXTS]


ID_SOURCES = {
    "stream": lambda: torch.tensor(IDS, dtype=torch.int32),
    "array": lambda: numpy.array(IDS, dtype=numpy.uint16),
    "flat list": lambda: IDS,
    "generator of ids": lambda: iter(IDS),
    "lists": id_lists,
    "generator": lambda: (ids for ids in id_lists()),
    "tensors": lambda: [torch.tensor([ids]) for ids in id_lists()],
    "dataset": lambda: datasets.Dataset.from_dict({"input_ids": id_lists()}),
    "tensor dataset": lambda: datasets.Dataset.from_dict({"input_ids": id_lists()}).with_format(
        "torch"
    ),
    "padded": lambda: [
        {"input_ids": [0, 0, *ids], "attention_mask": [0, 0, *[1] * len(ids)]} for ids in id_lists()
    ],
}


@pytest.mark.parametrize("kind", ID_SOURCES)
def test_ids_need_no_tokenizer(kind):
    ids = token_ids(ID_SOURCES[kind](), vocab_size=len(WORDS))
    assert ids.dtype == torch.int64
    assert ids.tolist() == IDS


def test_padded_batch_of_a_tokenizer(transformers_words):
    transformers_words.pad_token = "[UNK]"
    batch = transformers_words(TEXTS, add_special_tokens=False, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (3, 7)
    assert token_ids(batch).tolist() == IDS


def test_two_dimensions_are_windows():
    rows = torch.arange(12).reshape(2, 6)
    assert token_ids(rows).shape == (2, 6)
    assert cut_windows(rows, 4).tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert cut_windows(rows, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    with pytest.raises(ValueError, match="has 6 tokens in each row, fewer than one window of 7"):
        cut_windows(rows, 7)


def test_special_tokens_are_one_set_per_document(words, transformers_words, tmp_path):
    path = write(tmp_path / "three.jsonl", json_lines(TEXTS))
    wanted = [id_ for ids in id_lists() for id_ in [1, *ids]]
    for tokenizer, source in itertools.product([words, transformers_words], [TEXTS, path]):
        assert token_ids(source, tokenizer, special_tokens=True).tolist() == wanted
    plain = write(tmp_path / "plain.txt", "\n\n".join(TEXTS))
    assert token_ids(plain, words, special_tokens=True).tolist() == [1, *IDS]


def test_a_tokenizer_set_to_cut_or_pad_is_left_as_it_is(words):
    words.enable_truncation(2)
    words.enable_padding(length=40)
    assert token_ids(TEXTS, words).tolist() == IDS
    assert words.truncation["max_length"] == 2
    assert words.padding["length"] == 40


def test_only_what_is_needed_is_read(words, tmp_path):
    path = write(tmp_path / "long.txt", "the cat " * 1000)
    ids = token_ids(path, words, tokens=10)
    assert 10 <= len(ids) < 100
    assert read_text(path, 7) == "the cat"
    lines = write(tmp_path / "long.jsonl", json_lines(["the cat"] * 1000))
    assert 10 <= len(token_ids(lines, words, tokens=10)) < 100

    endless = itertools.repeat([3, 4, 5])
    assert len(token_ids(endless, tokens=10)) == 12
    assert len(token_ids(itertools.repeat("the cat"), words, tokens=10)) < 100
    assert len(token_ids(itertools.count(), tokens=10)) == 10


# ---- windows ------------------------------------------------------------------------------------


def test_windows_in_order_and_shuffled():
    ids = torch.arange(103)
    ordered = token_windows(ids, samples=5, length=10, seed=None)
    assert ordered.tolist() == ids[:50].reshape(5, 10).tolist()
    everything = token_windows(ids, samples=10, length=10, seed=None)
    shuffled = token_windows(ids, samples=10, length=10)
    assert not torch.equal(everything, shuffled)
    assert torch.equal(everything, shuffled[shuffled[:, 0].argsort()])
    assert torch.equal(shuffled, token_windows(ids, samples=10, length=10, seed=0))
    assert not torch.equal(shuffled, token_windows(ids, samples=10, length=10, seed=1))
    assert torch.equal(shuffled[:4], token_windows(ids, samples=4, length=10))


def test_windows_are_a_copy():
    ids = torch.arange(10)
    token_windows(ids, samples=1, length=10, seed=None).zero_()
    assert ids[-1] == 9


def test_fewer_windows_than_asked_is_a_warning():
    message = "calibration data has 25 tokens: 2 windows of 10, fewer than the 3 asked for"
    with pytest.warns(UserWarning, match=message):
        windows = token_windows(torch.arange(25), samples=3, length=10)
    assert windows.shape == (2, 10)


def test_windows_of_real_text(shared_data):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared_data / "models/books-llama-1m")
    path = shared_data / "text/c4_validation_a.jsonl.gz"
    windows = token_windows(path, tokenizer, samples=8, length=64, seed=None, vocab_size=1024)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        text = "\n\n".join(json.loads(next(file))["text"] for _ in range(10))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert windows.flatten().tolist() == ids[: 8 * 64]


# ---- refusals -----------------------------------------------------------------------------------

BAD_FILES = {
    "empty.txt": ("", "empty.txt holds no text"),
    "blank.txt": (" \n\n", "blank.txt holds no text"),
    "empty.jsonl": ("", "empty.jsonl holds no text"),
    "latin.txt": (b"caf\xe9 au lait", "latin.txt is not UTF-8 text: it holds the byte 0xe9"),
    "zeros.bin": (b"\0\0abc", "zeros.bin is not text: it holds null characters"),
    "broken.jsonl": ('{"text": "a"}\n\n{"text": ', "broken.jsonl line 3 is not JSON: Expecting"),
    "other.jsonl": (
        '{"text": "a"}\n{"id": 1, "content": "b"}',
        "other.jsonl line 2 has no 'text', only 'id', 'content'",
    ),
    "list.jsonl": ('["a"]', "list.jsonl line 1 is a list, not an object with a 'text'"),
    "number.jsonl": ('{"text": 3}', "number.jsonl line 1 has a 'text' that is no string but 3"),
    "other.json": ('[{"text": "a"}, {}]', "other.json item 2 has no 'text', only no fields"),
    "broken.json": ("[1,", "broken.json line 1 is not JSON"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, tmp_path, words):
    content, message = BAD_FILES[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        token_ids(write(tmp_path / name, content), words)


def test_bad_gzip_files(tmp_path, words):
    whole = gzip.compress(b"the cat sat" * 100)
    for content in (b"the cat sat", whole[:-20], whole[:20] + b"\xff\xff" + whole[22:]):
        (tmp_path / "bad.txt.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.txt\.gz is not a whole gzip file"):
            token_ids(tmp_path / "bad.txt.gz", words)


def test_bad_paths(tmp_path, words):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.txt \(a text itself"):
        token_ids(tmp_path / "missing.txt", words)
    with pytest.raises(FileNotFoundError, match="goes in as a list of strings"):
        token_ids("the cat sat " * 1000, words)
    with pytest.raises(IsADirectoryError, match="is a folder, not a text file"):
        token_ids(tmp_path, words)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TEXTS, "the calibration data is text, which needs a tokenizer: pass tokenizer="),
        (7, "must be a path, texts, token ids or a dataset, got int"),
        (None, "must be a path, texts, token ids or a dataset, got NoneType"),
        ([], "the calibration data is empty"),
        ([[]], "the calibration data holds no tokens"),
        (torch.zeros(0).long(), "the calibration data holds no tokens"),
        (torch.zeros(3), "the calibration ids must be integers, got torch.float32"),
        (torch.zeros(3).bool(), "the calibration ids must be integers, got torch.bool"),
        ([[0.5]], "the calibration ids must be integers, got torch.float32"),
        (
            torch.zeros(1, 2, 3).long(),
            r"ids must be (tokens,) or (windows, length), got (1, 2, 3)",
        ),
        ([3, -1], "the calibration data holds the token id -1, which is below 0"),
        ([3, 10], "holds the token id 10, outside of the vocabulary of 10"),
        ([[1], "a"], "an item that is not a list of ids: 'a'"),
        ([slice(2)], "an item that is not a list of ids: slice"),
        ([{"label": 1}], "row 0 of the calibration data has no 'text' string and no 'input_ids'"),
        ({"train": 1, "test": 2}, "data is a mapping: choose one of 'train', 'test'"),
    ],
    ids=str,
)
def test_bad_sources(source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        token_ids(source, vocab_size=10)


def test_bad_texts_and_tokenizers(words):
    with pytest.raises(
        ValueError, match="item 1 of the evaluation data is not a string like the first: 1"
    ):
        token_ids(["a", 1], words, name="evaluation")
    with pytest.raises(ValueError, match=r"or the tokenizers library, got str"):
        token_ids(TEXTS, "gpt2")


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", None])
def test_what_is_no_count(value):
    message = f"samples must be a positive whole number, got {value!r}"
    with pytest.raises(ValueError, match=message):
        positive("samples", value)


def test_counts_of_other_libraries_are_counts():
    found = positive("samples", torch.tensor([3]).numpy()[0])
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize("bad", [{"samples": 0}, {"length": -1}, {"samples": 1.5}])
def test_bad_counts(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be a positive whole number"):
        token_windows(IDS, **{"samples": 1, "length": 1, **bad})


def test_three_words_are_no_window(words):
    message = "the calibration data has 3 tokens, fewer than one window of 256"
    with pytest.raises(ValueError, match=message):
        token_windows(TEXTS[:1], words, samples=4, length=256)
