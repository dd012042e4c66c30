"""Model folders that someone broke on purpose: each has to load as it was, or give one ValueError.

    python tests/fuzzing.py --count 20000 --output fuzz.json

breaks the config, the headers and the index of small models at random, one to three times each,
and opens every folder as ``soco.load``, ``soco compress``, ``soco.decompose``, ``soco.verify``,
``soco.blockwise`` and ``soco.Decomposition`` do. Anything but a model or a ValueError is a
failure: another exception, a crash, more than 20 seconds, or an allocation of more than 1 GB.
``tests/test_fuzzing.py`` runs a few hundred.
"""

import argparse
import collections
import copy
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

import soco
from soco.cli.sources import open_dense
from soco.decomposition import Decomposition, decompose
from soco.diagnosis import commit_of, describe_machine
from soco.running import lent, stored_model
from soco.stored import StoredModel
from tiny_models import tiny_model

SECONDS, BYTES = 20, 2**30
UNREAD = ("generation_config.json", "soco_checksums.json")  # not broken: no weight depends on them

NUMBERS = [0, 1, -1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 10**30, -(2**63)]
OTHERS = [
    None, True, False, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "a", "x" * 10000, "../..",
    "/etc/passwd", "\x00", "\ud800", [], [[]], [1, 2], {}, {"a": 1}, ["a"] * 1000,
]  # fmt: skip


def make(folder: Path) -> dict[str, Callable[[Path], object]]:
    """Folders to break, and how each is opened."""
    opened: dict[str, Callable[[Path], object]] = {}
    for name, kind in (("llama", "llama"), ("gpt2", "gpt2"), ("mixture", "qwen2_moe")):
        model = tiny_model(kind)
        model.save_pretrained(folder / f"dense-{name}", max_shard_size="20KB")
        opened[f"dense-{name}"] = StoredModel
        if kind != "gpt2":
            opened[f"blocks-{name}"] = by_blocks
            shutil.copytree(folder / f"dense-{name}", folder / f"blocks-{name}")
        opened[f"whole-{name}"] = lambda path: open_dense(str(path), "auto", torch.device("cpu"))
        shutil.copytree(folder / f"dense-{name}", folder / f"whole-{name}")
        if name == "llama":
            ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
            soco.compress(model, 0.4, method="svd-llm", calibration=ids, samples=4, progress=False)
            soco.save(model, folder / "whole")
            soco.save(model, folder / "shards", max_shard_size="20KB")
            opened |= {"whole": soco.load, "shards": soco.load}
            opened |= {"verified": verified, "verified-blocks": verified_by_blocks}
            for each in ("verified", "verified-blocks"):
                shutil.copytree(folder / "whole", folder / each)
            decompose(folder / "dense-llama", folder / "parts", kept=0.5, progress=False)
            opened["parts"] = lambda path: dict(Decomposition(path))
        if name == "gpt2":
            soco.compress(model, 0.4, method="svd", pivoted=True, progress=False)
            soco.save(model, folder / "pivoted")
            opened["pivoted"] = soco.load
            opened["blocks-pivoted"] = by_blocks
            shutil.copytree(folder / "pivoted", folder / "blocks-pivoted")
        if name == "mixture":
            soco.compress(model, 0.4, method="svd", progress=False)
            soco.save(model, folder / "experts")
            opened["experts"] = soco.load
            opened["blocks-experts"] = by_blocks
            shutil.copytree(folder / "experts", folder / "blocks-experts")
    return opened


def by_blocks(path: Path) -> None:
    """A model that is lent, and every tensor of it read once."""
    stored = stored_model(path)
    with lent(stored) as model:
        for name in model.state_dict():
            key = stored.key(name)
            if key is not None:
                stored.read(key, floating=False)


def verified(path: Path) -> None:
    soco.verify(path, samples=1)


def verified_by_blocks(path: Path) -> None:
    soco.verify(path, samples=1, stream=True)


# Mutations ----------------------------------------------------------------------------------------


def broken_value(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice([*NUMBERS, *OTHERS]))


def break_json(chance: random.Random, data: Any) -> Any:
    """One place of a JSON tree replaced, removed, doubled, or renamed."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = (
            node.items()
            if isinstance(node, dict)
            else enumerate(node)
            if isinstance(node, list)
            else ()
        )
        for key, value in items:
            places.append((node, key))
            walk(value)

    walk(data)
    if not places or chance.random() < 0.02:
        return broken_value(chance)
    node, key = chance.choice(places)
    what = chance.randrange(5)
    if what == 0:
        del node[key]
    elif what == 1 and isinstance(node[key], int) and not isinstance(node[key], bool):
        node[key] = node[key] + chance.choice([-1, 1, 8, -8, node[key]])
    elif what == 2 and isinstance(node, dict):
        node[str(key) + chance.choice(["", "x", ".weight", "/.."])] = node.pop(key)
    elif what == 3:
        other, there = chance.choice(places)
        node[key] = copy.deepcopy(other[there])
    else:
        node[key] = broken_value(chance)
    return data


def break_bytes(chance: random.Random, original: bytes) -> bytes:
    """Bytes changed, cut off, inserted or repeated."""
    data = bytearray(original)
    place = chance.randrange(len(data)) if data else 0
    what = chance.randrange(5)
    if what == 0 and data:
        data[place] = chance.randrange(256)
    elif what == 1:
        del data[place:]
    elif what == 2:
        data[place:place] = chance.randbytes(chance.choice([1, 8, 1000]))
    elif what == 3:
        data[place:place] = data[place : place + chance.choice([1, 16, 300])]
    else:
        data[place:place] = chance.choice(
            [b"[" * 100000, b'{"a":' * 5000, b"1" * 5000, b"\xff\xfe"]
        )
    return bytes(data)


def break_header(chance: random.Random, data: bytes) -> bytes:
    """The header of a safetensors file: its length, its JSON, or its bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    what = chance.randrange(4)
    if what == 0:
        wrong = chance.choice([*NUMBERS, length - 1, length + 1, len(data)])
        return struct.pack("<Q", wrong % 2**64) + header + rest
    if what == 1:
        header = break_bytes(chance, header)
    else:
        header = json.dumps(break_json(chance, json.loads(header))).encode("utf-8", "surrogatepass")
    if chance.random() < 0.1:
        rest = break_bytes(chance, rest)
    return struct.pack("<Q", len(header)) + header + rest


def break_folder(chance: random.Random, folder: Path) -> list[str]:
    """One to three mutations; returns what was broken."""
    told = []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors"))
        files = [p for p in files if not p.is_dir() and p.name not in UNREAD]
        # Config and index in half of all cases, however many files of tensors there are.
        kinds = {".json", ".safetensors"} & {p.suffix for p in files}
        kind = chance.choice(sorted(kinds)) if kinds else ""
        files = [p for p in files if p.suffix == kind]
        if not files:
            break
        file = chance.choice(files)
        if chance.random() < 0.03:
            what = chance.choice(["removed", "a folder", "a link", "a loop", "empty"])
            file.unlink()
            if what == "a folder":
                file.mkdir()
            elif what == "a link":
                file.symlink_to("/dev/zero" if chance.random() < 0.5 else "/etc/passwd")
            elif what == "a loop":
                file.symlink_to(file.name)
            elif what == "empty":
                file.write_bytes(b"")
            told.append(f"{file.name}: {what}")
            continue
        if not file.is_file() or file.is_symlink():
            continue
        data = file.read_bytes()
        if kind == ".safetensors":
            with_header = len(data) > 8 and struct.unpack("<Q", data[:8])[0] <= len(data) - 8
            try:
                data = break_header(chance, data) if with_header else break_bytes(chance, data)
            except (ValueError, UnicodeDecodeError, RecursionError):  # broken before
                data = break_bytes(chance, data)
        elif chance.random() < 0.25:
            data = break_bytes(chance, data)
        else:
            try:
                text = json.dumps(break_json(chance, json.loads(data)))
                data = text.encode("utf-8", "surrogatepass")
            except (ValueError, UnicodeDecodeError, RecursionError):
                data = break_bytes(chance, data)
        file.write_bytes(data)
        told.append(file.name)
    return told


# Runs ---------------------------------------------------------------------------------------------


class TooLongError(BaseException):
    """No Exception, so that nobody takes it for a broken file."""


def _too_long(*_: object) -> None:
    raise TooLongError


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attempt(open_folder: Callable[[Path], object], folder: Path) -> tuple[str, str]:
    """What came of opening a folder, "loaded" or "refused" if all is well, and more about it."""
    before = peak()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            open_folder(folder)
        outcome = "loaded", ""
    except ValueError as error:
        outcome = "refused", str(error)
    except TooLongError:
        outcome = "took too long", traceback.format_exc()
    except Exception as error:
        outcome = f"raised {type(error).__name__}", traceback.format_exc()
    finally:
        signal.alarm(0)
    if peak() - before > BYTES:
        return f"allocated {peak() - before:,} bytes", outcome[1]
    return outcome


def run(count: int, seed: int, scratch: Path, *, verbose: bool = False) -> dict[str, Any]:
    """Break and open so many folders.

    Returns:
        How many were loaded and refused by what was opened, and what failed, with its seed.
    """
    originals = scratch / "originals"
    opened = make(originals)
    tally: dict[str, collections.Counter[str]] = {}
    failures = []
    begin = time.perf_counter()
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space + 4 * BYTES, limits[1]))
    for number in range(count):
        chance = random.Random(f"{seed}.{number}")
        name = chance.choice(sorted(opened))
        folder = scratch / "folder"
        shutil.copytree(originals / name, folder)
        told = break_folder(chance, folder)
        outcome, why = attempt(opened[name], folder)
        tally.setdefault(name, collections.Counter())[outcome] += 1
        if outcome not in ("loaded", "refused"):
            failures.append({"case": f"{seed}.{number}", "folder": name, "broken": told,
                             "outcome": outcome, "why": why})  # fmt: skip
            if verbose:
                print(failures[-1]["case"], name, told, outcome, why.splitlines()[-1:], flush=True)
        for path in folder.rglob("*"):
            path.lstat()
        shutil.rmtree(folder)
        if verbose and number % 1000 == 999:
            print(f"{number + 1}: {time.perf_counter() - begin:.0f} s", flush=True)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    return {
        "count": count,
        "seed": seed,
        "seconds": round(time.perf_counter() - begin, 1),
        "outcomes": {name: dict(counter) for name, counter in sorted(tally.items())},
        "failures": failures,
    }


def command_line(told: str, run: Callable[[int, int], dict[str, Any]]) -> None:
    """Read --count, --seed and --output, run, and write the record; code 1 if anything failed.

    Args:
        told: what the program is for.
        run: the cases, given how many and their seed.
    """
    parser = argparse.ArgumentParser(
        description=told, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = run(arguments.count, arguments.seed)
    record = {
        "machine": describe_machine("cpu"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit_of(Path(__file__).parents[1]),
        "command": " ".join(["python", f"tests/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        **found,
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in found.items() if name != "failures"}))
    print(f"{len(found['failures'])} failures", flush=True)
    raise SystemExit(1 if found["failures"] else 0)


def run_somewhere(count: int, seed: int) -> dict[str, Any]:
    """``run`` in a folder that is deleted afterwards, telling of every failure."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        return run(count, seed, Path(scratch), verbose=True)


if __name__ == "__main__":
    command_line(__doc__ or "", run_somewhere)
