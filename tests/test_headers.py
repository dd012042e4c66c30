"""soco.headers: every way in which a folder's files can be broken, and what is said of it."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from soco.headers import check_index, opened_tensors, read_headers, read_json, weight_files

TENSORS = {
    "a.weight": torch.zeros(2, 3),
    "b.weight": torch.zeros(4, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "scalar": torch.zeros((), dtype=torch.int64),
}


@pytest.fixture
def file(tmp_path):
    """A safetensors file that is in order."""
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def rewrite(file, change):
    """Let ``change`` alter the header, and keep the tensors' bytes."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header = json.dumps(change(header) or header).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def shards(folder, weight_map, **files):
    """Files of several tensors each, and an index."""
    for name, tensors in files.items():
        save_file({key: TENSORS[key] for key in tensors}, folder / f"{name}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_reads_what_is_there(file):
    entries = read_headers([file])
    assert {key: (entry.dtype, entry.shape) for key, entry in entries.items()} == {
        "a.weight": ("F32", (2, 3)),
        "b.weight": ("BF16", (4,)),
        "empty": ("F32", (0, 3)),
        "scalar": ("I64", ()),
    }
    assert all(entry.file == file for entry in entries.values())


@pytest.mark.parametrize("size", [0, 4, 8, 100])
def test_truncated_in_the_header(file, size):
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=rf"model\.safetensors is truncated in its header: {size} "
    ):
        read_headers([file])


def test_truncated_in_a_tensor(file):
    file.write_bytes(file.read_bytes()[:-1])
    last = max(read_order(file), key=lambda item: item[1])[0]
    with pytest.raises(ValueError, match=f"truncated: {re.escape(last)} ends at byte"):
        read_headers([file])


def read_order(file):
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__")
    return [(key, entry["data_offsets"][1]) for key, entry in header.items()]


@pytest.mark.parametrize("told", [["pt"], "pt", None, {"format": 1}, {"format": {}}])
def test_metadata_that_is_no_text_by_name(told, file):
    """Which the library refuses only when the first tensor is read."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]) | {"__metadata__": told}
    changed = json.dumps(header).encode()
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
    with pytest.raises(ValueError, match="its metadata must be text by name"):
        read_headers([file])


def test_tensors_are_read_one_by_one(file):
    with opened_tensors(file) as held:
        for name, tensor in TENSORS.items():
            assert torch.equal(held.get_tensor(name), tensor)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is broken: "), opened_tensors(file):
        pass


def test_bytes_too_many(file):
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(ValueError, match="broken: 4 bytes belong to no tensor"):
        read_headers([file])


BROKEN = {
    "shape": (lambda h: h["a.weight"].update(shape=[2, 4]), r"a\.weight, F32 \[2, 4\], cannot lie"),
    "negative": (lambda h: h["a.weight"].update(shape=[-2, 3]), r"describes a\.weight as"),
    "bool": (lambda h: h["a.weight"].update(shape=[True, 6]), r"describes a\.weight as"),
    "dtype": (lambda h: h["a.weight"].update(dtype="F12"), r"a\.weight in a dtype unknown to soco"),
    "offsets": (lambda h: h["a.weight"].update(data_offsets=[0]), r"describes a\.weight as"),
    "backwards": (
        lambda h: h["a.weight"].update(data_offsets=[24, 0]),
        r"a\.weight, .* cannot lie",
    ),
    "field": (lambda h: h["a.weight"].update(more=1), r"describes a\.weight as"),
    "entry": (lambda h: h.update({"a.weight": 3}), r"describes a\.weight as 3"),
    "no object": (lambda h: [1], "its header is no JSON object"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_headers(file, change, message):
    rewrite(file, change)
    with pytest.raises(ValueError, match=rf"model\.safetensors (is|holds) .*{message}"):
        read_headers([file])


def test_not_a_safetensors_file(file):
    file.write_bytes((4).to_bytes(8, "little") + b"\xff{{{")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
        read_headers([file])


def test_one_file_or_an_index(file, tmp_path):
    assert weight_files(tmp_path) == [file]
    file.unlink()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor model\.safet"):
        weight_files(tmp_path)
    weight_map = {"a.weight": "two.safetensors", "b.weight": "one.safetensors"}
    shards(tmp_path, weight_map, one=["b.weight"], two=["a.weight"])
    files = weight_files(tmp_path)
    assert [path.name for path in files] == ["one.safetensors", "two.safetensors"]
    check_index(tmp_path, read_headers(files))


def test_an_index_that_lies(tmp_path):
    weight_map = {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}
    shards(tmp_path, weight_map, one=["a.weight"])
    with pytest.raises(ValueError, match=r"two\.safetensors is missing, where .* places b\.weight"):
        weight_files(tmp_path)
    shards(tmp_path, weight_map, one=["a.weight"], two=["a.weight"])
    with pytest.raises(
        ValueError, match=r"two\.safetensors holds a\.weight, which .*one\.safetens"
    ):
        read_headers(weight_files(tmp_path))
    shards(tmp_path, weight_map, one=["a.weight"], two=["scalar"])
    with pytest.raises(ValueError, match=r"two\.safetensors lacks b\.weight, which model"):
        check_index(tmp_path, read_headers(weight_files(tmp_path)))
    shards(tmp_path, weight_map, one=["a.weight"], two=["b.weight", "scalar"])
    with pytest.raises(ValueError, match=r"two\.safetensors holds scalar, which model.* not name"):
        check_index(tmp_path, read_headers(weight_files(tmp_path)))
    shards(tmp_path, {"a.weight": "../one.safetensors"})
    with pytest.raises(ValueError, match=r"places a\.weight in '\.\./one\.safetensors', which is"):
        weight_files(tmp_path)
    shards(tmp_path, {})
    with pytest.raises(ValueError, match="has no weight_map"):
        weight_files(tmp_path)


def test_json(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        read_json(path)
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_json(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, got list"):
        read_json(path)
