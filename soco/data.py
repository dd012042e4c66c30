"""Token ids from whatever text comes in: files, strings, id lists, tensors or datasets."""

import gzip
import itertools
import json
import numbers
import operator
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

# What joins two documents of one text.
SEPARATOR = "\n\n"

# Characters read for every token that may be needed, so that a huge file is not read to its end.
# English text has about 4 to a token; a text with more than this many gives fewer tokens.
CHARACTERS_PER_TOKEN = 12

# A shuffled choice of windows is made among at least this many tokens, or four times those asked.
POOL_TOKENS = 2**18


def read_text(path: str | os.PathLike[str], characters: int | None = None) -> str:
    """Read a text file, or the documents of a JSON one joined by blank lines.

    ``.jsonl`` holds one object a line with its text under ``text``; ``.json`` the same, or one
    object, or one list of objects or strings; everything else is plain text. Each may also be
    compressed, with ``.gz`` at the end. All are UTF-8.

    Args:
        path: the file.
        characters: read no further than so many from the start, but documents to their end; None
            for all.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: it is empty, not UTF-8, not a whole gzip file, or not JSON with a text, with the
            line named.
    """
    return SEPARATOR.join(_documents(Path(path), characters))


def token_ids(
    source: Any,
    tokenizer: Any = None,
    *,
    tokens: int | None = None,
    special_tokens: bool = False,
    vocab_size: int | None = None,
    name: str = "calibration",
) -> Tensor:
    """Turn a source of text or of token ids into ids.

    Documents become one stream: texts are joined by a blank line and tokenized as one string,
    without special tokens; lists of ids are joined as they are. With ``special_tokens`` every
    document is tokenized by itself, with what its tokenizer adds to it.

    Args:
        source: a path (text, JSONL, JSON, each also .gz); an iterable of strings; an integer tensor
            or array, 1-D for a stream and 2-D for windows; a list of ids or an iterable of such
            lists; a ``datasets`` dataset, or any iterable of mappings, with a ``text`` or an
            ``input_ids`` column (where an ``attention_mask`` is 0, ids are left out).
        tokenizer: of the transformers or of the tokenizers library; not needed for ids.
        tokens: how many the caller may need. Text is read up to ``CHARACTERS_PER_TOKEN`` times as
            many characters, an iterable of ids until they are there; None reads everything.
        special_tokens: whether to let the tokenizer add its own.
        vocab_size: ids from here on are refused.
        name: what the source is for, in errors.

    Returns:
        Ids int64 on the CPU: a stream (tokens,), or windows (n, length) where a 2-D tensor came in.

    Raises:
        FileNotFoundError, IsADirectoryError: the path is not a file.
        ValueError: the source cannot be read, holds nothing, needs a tokenizer, or holds ids
            outside of the vocabulary.

    >>> token_ids([[5, 6], [7]])
    tensor([5, 6, 7])
    """
    characters = None if tokens is None else CHARACTERS_PER_TOKEN * tokens
    if isinstance(source, str | os.PathLike):
        documents = _documents(Path(source), characters)
        ids = _tokenize(documents, tokenizer, special_tokens, name)
    elif isinstance(source, Mapping):
        if not {"text", "input_ids"} & set(source):
            keys = ", ".join(repr(key) for key in list(source)[:5])
            raise ValueError(f"the {name} data is a mapping: choose one of {keys}")
        ids = _ids_of_items([source], tokenizer, tokens, special_tokens, name)
    elif isinstance(source, Tensor) or hasattr(source, "__array__"):
        ids = _checked_tensor(torch.as_tensor(source), name)
    elif isinstance(source, Iterable):
        ids = _ids_of_items(source, tokenizer, tokens, special_tokens, name)
    else:
        raise ValueError(
            f"the {name} data must be a path, texts, token ids or a dataset, "
            f"got {type(source).__name__}"
        )
    if ids.numel() == 0:
        raise ValueError(f"the {name} data holds no tokens")
    low, high = int(ids.min()), int(ids.max())
    if low < 0:
        raise ValueError(f"the {name} data holds the token id {low}, which is below 0")
    if vocab_size is not None and high >= vocab_size:
        raise ValueError(
            f"the {name} data holds the token id {high}, outside of the vocabulary of {vocab_size}"
        )
    return ids


def positive(name: str, value: Any) -> int:
    """A count, once it is one.

    Raises:
        ValueError: it is not a whole number, or below 1.

    >>> positive("length", 3)
    3
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    return number


def cut_windows(ids: Tensor, length: int, *, name: str = "calibration") -> Tensor:
    """Cut ids into windows that do not overlap, from the start; what is left over is dropped.

    Args:
        ids: a stream (tokens,), or rows (n, tokens) of which each is cut by itself.
        length: tokens per window.
        name: what the ids are for, in errors.

    Returns:
        Windows (n, length), in order.

    Raises:
        ValueError: there is no full window.

    >>> cut_windows(torch.arange(7), 3)
    tensor([[0, 1, 2],
            [3, 4, 5]])
    """
    length = positive("length", length)
    per_row = ids.shape[-1] // length
    if per_row == 0:
        rows = " in each row" if ids.dim() == 2 else ""
        raise ValueError(
            f"the {name} data has {ids.shape[-1]} tokens{rows}, fewer than one window of {length}"
        )
    return ids[..., : per_row * length].reshape(-1, length)


def token_windows(
    source: Any,
    tokenizer: Any = None,
    *,
    samples: int,
    length: int,
    seed: int | None = 0,
    special_tokens: bool = False,
    vocab_size: int | None = None,
    name: str = "calibration",
) -> Tensor:
    """Choose windows of token ids that do not overlap, in an order shuffled by ``seed``.

    The choice is made among all windows of the source; of a long one, among the first 4 ``samples``
    windows or ``POOL_TOKENS`` tokens, whichever is more.

    Args:
        source: anything ``token_ids`` takes.
        tokenizer: not needed for ids.
        samples: windows wanted.
        length: tokens per window.
        seed: of the order; None takes the windows in order from the start.
        special_tokens: as in ``token_ids``.
        vocab_size: as in ``token_ids``.
        name: what the source is for, in errors and warnings.

    Returns:
        Windows (samples, length), int64; fewer, with a warning, where the source is too short.

    Raises:
        FileNotFoundError, IsADirectoryError: the path is not a file.
        ValueError: the source cannot be read or holds no full window, or an argument is out of
            range.

    >>> token_windows(torch.arange(8), samples=2, length=4, seed=None)
    tensor([[0, 1, 2, 3],
            [4, 5, 6, 7]])
    """
    samples, length = positive("samples", samples), positive("length", length)
    needed = samples * length if seed is None else max(4 * samples * length, POOL_TOKENS)
    ids = token_ids(
        source,
        tokenizer,
        tokens=needed,
        special_tokens=special_tokens,
        vocab_size=vocab_size,
        name=name,
    )
    windows = cut_windows(ids, length, name=name)
    if len(windows) < samples:
        warnings.warn(
            f"the {name} data has {ids.numel()} tokens: {len(windows)} windows of {length}, "
            f"fewer than the {samples} asked for",
            stacklevel=2,
        )
    if seed is not None:
        windows = windows[
            torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        ]
    return windows[:samples].clone()


def _ids_of_items(
    source: Iterable[Any], tokenizer: Any, tokens: int | None, special_tokens: bool, name: str
) -> Tensor:
    """Ids of an iterable, by what its first item is; no more items are taken than needed."""
    items = (_value(item, i, name) for i, item in enumerate(source))
    first = next(items, None)
    if first is None:
        raise ValueError(f"the {name} data is empty")
    items = itertools.chain([first], items)
    if isinstance(first, str):
        characters = None if tokens is None else CHARACTERS_PER_TOKEN * tokens
        texts = _up_to(characters, _strings(items, name))
        return _tokenize(texts, tokenizer, special_tokens, name)
    if isinstance(first, numbers.Integral):
        return _checked_tensor(_as_tensor(list(itertools.islice(items, tokens)), name), name)
    documents = (_checked_tensor(_as_tensor(item, name), name).flatten() for item in items)
    return torch.cat(_up_to(tokens, documents))


def _value(item: Any, index: int, name: str) -> Any:
    """What an item of an iterable or a row of a dataset holds: a text, an id, or ids."""
    if not isinstance(item, Mapping):
        return item
    if isinstance(item.get("text"), str):
        return item["text"]
    if "input_ids" not in item:
        columns = ", ".join(repr(key) for key in item)
        raise ValueError(
            f"row {index} of the {name} data has no 'text' string and no 'input_ids': {columns}"
        )
    ids, mask = _as_tensor(item["input_ids"], name), item.get("attention_mask")
    return ids if mask is None else ids[_as_tensor(mask, name).bool()]


def _strings(items: Iterable[Any], name: str) -> Iterator[str]:
    for index, item in enumerate(items):
        if not isinstance(item, str):
            raise ValueError(
                f"item {index} of the {name} data is not a string like the first: {item!r:.60}"
            )
        yield item


def _up_to(limit: int | None, items: Iterable[Any]) -> list[Any]:
    """Take items until their lengths add up to ``limit``."""
    taken, total = [], 0
    for item in items:
        taken.append(item)
        total += len(item)
        if limit is not None and total >= limit:
            break
    return taken


def _tokenize(documents: list[str], tokenizer: Any, special_tokens: bool, name: str) -> Tensor:
    if tokenizer is None:
        raise ValueError(f"the {name} data is text, which needs a tokenizer: pass tokenizer=")
    texts = documents if special_tokens else [SEPARATOR.join(documents)]
    if isinstance(tokenizer, tokenizers.Tokenizer):
        if tokenizer.truncation or tokenizer.padding:
            tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
            tokenizer.no_truncation()
            tokenizer.no_padding()
        encodings = tokenizer.encode_batch(texts, add_special_tokens=special_tokens)
        lists = [encoding.ids for encoding in encodings]
    elif callable(tokenizer):
        encode: Callable[..., Any] = tokenizer
        lists = encode(texts, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    else:
        raise ValueError(
            "tokenizer must be one of the transformers or the tokenizers library, "
            f"got {type(tokenizer).__name__}"
        )
    return torch.tensor([i for ids in lists for i in ids], dtype=torch.int64)


def _as_tensor(ids: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the {name} data holds an item that is not a list of ids: {ids!r:.60}"
        ) from error


def _checked_tensor(ids: Tensor, name: str) -> Tensor:
    empty = ids.numel() == 0  # an empty list has no integer type
    if not empty and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise ValueError(f"the {name} ids must be integers, got {ids.dtype}")
    if ids.dim() not in (1, 2):
        raise ValueError(
            f"the {name} ids must be (tokens,) or (windows, length), got {tuple(ids.shape)}"
        )
    return ids.detach().to("cpu", torch.int64)


def _documents(path: Path, characters: int | None) -> list[str]:
    """The documents of a file, one for plain text; see ``read_text``."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder, not a text file")
    if not os.path.exists(path):  # False for a whole text, too, whatever its length
        raise FileNotFoundError(
            f"there is no file {str(path)[:200]} (a text itself goes in as a list of strings)"
        )
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if packed else suffixes)[-1:]
    try:
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig") as file:
            if kind == [".jsonl"]:
                documents = _up_to(characters, _documents_of_lines(file, path))
            elif kind == [".json"]:
                documents = _up_to(characters, _documents_of_json(file.read(), path))
            else:
                documents = [file.read(-1 if characters is None else characters)]
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path} is not UTF-8 text: it holds the byte 0x{byte:02x}") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if any("\0" in document for document in documents):
        raise ValueError(f"{path} is not text: it holds null characters")
    if not any(document.strip() for document in documents):
        raise ValueError(f"{path} holds no text")
    return documents


def _documents_of_lines(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} is not JSON: {error.msg}") from error
            yield _text_of(record, f"{path} line {number}")


def _documents_of_json(content: str, path: Path) -> Iterator[str]:
    try:
        value = json.loads(content)
    except json.JSONDecodeError:  # one object per line is common under this ending, too
        yield from _documents_of_lines(content.split("\n"), path)
        return
    for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
        yield record if isinstance(record, str) else _text_of(record, f"{path} item {number}")


def _text_of(record: Any, place: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"{place} is a {type(record).__name__}, not an object with a 'text'")
    if "text" not in record:
        fields = ", ".join(repr(key) for key in record) or "no fields"
        raise ValueError(f"{place} has no 'text', only {fields}")
    if not isinstance(record["text"], str):
        raise ValueError(f"{place} has a 'text' that is no string but {record['text']!r:.40}")
    return record["text"]
