"""Memory of ``soco.compress_folder`` on random Llamas, and runs that are killed on the way.

    python benchmarks/streaming.py memory --layers 31,62 --hidden 2048 --inner 5632 --threads 2 \
        --output benchmarks/results/streaming-memory.json
    python benchmarks/streaming.py memory --method soco --layers 8,16 --hidden 1024 --inner 2816 \
        --samples 16 --threads 2 --output benchmarks/results/streaming-soco.json
    python benchmarks/streaming.py memory --layers 8,16 --hidden 1024 --inner 896 --experts 8 \
        --threads 2 --output benchmarks/results/streaming-experts.json
    python benchmarks/streaming.py killed --layers 8 --hidden 512 --inner 1408 --kills 20 \
        --threads 2 --output benchmarks/results/streaming-killed.json

    python benchmarks/streaming.py killed --method soco --layers 4 --hidden 256 --inner 704 \
        --samples 16 --kills 20 --threads 2 --output benchmarks/results/streaming-killed-soco.json
    python benchmarks/streaming.py killed --trained FOLDER --text FILE --within 40 \
        --threads 2 --output benchmarks/results/training-killed.json

Streamed, soco makes six steps. With ``--trained`` it is soco with effort best, in memory and on a
trained model, that is killed. A state of a training is kept every 5 seconds in either.

Every run is a process of its own, whose peak memory (resident, mapped files among it) is written
down, before and after ``soco.verify`` has looked at what came of it. A killed run gets SIGKILL
after a random time and is started again, until it ends; then its weights are compared with those of
a run that nobody disturbed, bit for bit.
"""

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from protocol import write_record
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from soco.contents import saved_as
from soco.memory import peak_memory

VOCABULARY = 32000
BATCH = 8  # sequences at a time


def make(
    folder: Path, layers: int, hidden: int, inner: int, dtype: torch.dtype = torch.bfloat16,
    experts: int = 0,
) -> int:  # fmt: skip
    """A random model, written file by file; returns the bytes of its weights."""
    options: dict[str, Any] = dict(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        vocab_size=VOCABULARY, num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 512), dtype=dtype, tie_word_embeddings=False,
    )  # fmt: skip
    if experts:
        kind, config = MixtralForCausalLM, MixtralConfig(num_local_experts=experts, **options)
    else:
        kind, config = LlamaForCausalLM, LlamaConfig(**options)
    config.architectures = [kind.__name__]
    with torch.device("meta"):
        model = kind(config)
    shapes = {
        saved: tuple(part.shape)
        for name, tensor in model.state_dict().items()
        for saved, part in saved_as(model, name, tensor).items()
    }
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, list[str]] = {}
    for name in shapes:
        number = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        parts.setdefault(number, []).append(name)
    places, total = {}, 0
    for count, names in enumerate(parts.values(), 1):
        file = f"model-{count:05}-of-{len(parts):05}.safetensors"
        tensors = {
            name: torch.ones(shapes[name], dtype=dtype)
            if len(shapes[name]) == 1
            else torch.randn(shapes[name], generator=generator).mul_(0.02).to(dtype)
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def stream(
    folder: Path, output: Path, method: str, threads: int, samples: int, length: int
) -> dict[str, Any]:
    """What this process needs for it; scores are learned in a few steps of two micro-batches."""
    from soco import keeping
    from soco.methods import SoCo
    from soco.streaming import compress_folder
    from soco.verification import verify

    keeping.EVERY = 5.0
    trained = SoCo(steps=6, fisher_warmup=1, batch_size=4, micro_batch=2)

    torch.set_num_threads(threads)
    before = peak_memory()
    ids = torch.randint(
        0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1)
    )
    begin = time.perf_counter()
    report = compress_folder(
        folder, output, 0.5, method=trained if method == "soco" else method, calibration=ids,
        samples=samples, batch_size=BATCH,
    )  # fmt: skip
    found = {
        "removed": report.removed,
        "seconds": round(time.perf_counter() - begin, 1),
        "phases": report.seconds,
        "peak_process_bytes": peak_memory(),
        "of_them_before": before,
    }
    begin = time.perf_counter()
    checked = verify(output, folder, text=ids[:1, :128], samples=1, stream=True)
    return found | {
        "broken": list(checked.broken),
        "seconds_of_check": round(time.perf_counter() - begin, 1),
        "peak_process_bytes_after_check": peak_memory(),
    }


def train(folder: Path, output: Path, text: Path, threads: int, samples: int) -> dict[str, Any]:
    """Compress a trained model by method soco in memory, or go on where an earlier run stopped."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import soco
    from soco import keeping, workfolder

    torch.set_num_threads(threads)
    keeping.EVERY = 5.0
    work = output.with_name(f"{output.name}.work")
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    soco.compress(
        model, 0.4, effort="best", tokenizer=AutoTokenizer.from_pretrained(folder),
        calibration=text, samples=samples, length=256, work=work,
    )  # fmt: skip
    soco.save(model, output)
    workfolder.discard(work)
    return {"seconds": round(time.perf_counter() - begin, 1)}


def _command(arguments: argparse.Namespace, folder: Path, output: Path) -> list[str]:
    given: dict[str, Any] = {"--threads": arguments.threads, "--samples": arguments.samples}
    given |= {"--length": arguments.length, "--method": arguments.method}
    if arguments.trained is not None:
        folder = arguments.trained
        given |= {"--trained": folder, "--text": arguments.text}
    told = [str(word) for pair in given.items() for word in pair]
    return [sys.executable, __file__, "once", str(folder), str(output), *told]


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A run for every depth."""
    rows = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            folder = Path(scratch) / "dense"
            size = make(
                folder, layers, arguments.hidden, arguments.inner, experts=arguments.experts
            )
            command = _command(arguments, folder, Path(scratch) / "compressed")
            told = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
            told_of = {"method": arguments.method, "layers": layers, "bytes": size}
            rows.append({**told_of, **_sizes(arguments), **json.loads(told)})
            print(rows[-1], flush=True)
    return rows


def killed(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """An undisturbed run, and one that is killed many times."""
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder, once, often = (Path(scratch) / name for name in ("dense", "once", "often"))
        if arguments.trained is None:
            size = make(folder, arguments.layers[0], arguments.hidden, arguments.inner)
            told = {"method": arguments.method, "layers": arguments.layers[0], "bytes": size}
            told |= _sizes(arguments)
        else:
            told = {"model": arguments.trained.name, "samples": arguments.samples}
        begin = time.perf_counter()
        subprocess.run(_command(arguments, folder, once), stdout=subprocess.DEVNULL, check=True)
        seconds = time.perf_counter() - begin
        begin, kills, starts = time.perf_counter(), [], 0
        while True:
            starts += 1
            run = subprocess.Popen(_command(arguments, folder, often), stdout=subprocess.DEVNULL)
            wait = (
                chance.uniform(0, arguments.within or seconds / 2)
                if len(kills) < arguments.kills
                else None
            )
            try:
                if run.wait(wait) != 0:
                    raise RuntimeError(f"run {starts} failed")
                break
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
                run.wait()
                kills.append(round(wait or 0, 2))
                print(f"killed after {kills[-1]} s", flush=True)
        return [
            {
                **told,
                "seconds_undisturbed": round(seconds, 1),
                "seconds_with_kills": round(time.perf_counter() - begin, 1),
                "killed_after_seconds": kills,
                "identical": hashes(once) == hashes(often),
                "left_behind": sorted(
                    entry.name
                    for entry in Path(scratch).iterdir()
                    if entry.name not in ("dense", "once", "often")
                ),
            }
        ]


def _sizes(arguments: argparse.Namespace) -> dict[str, int]:
    names = ("hidden", "inner", "experts", "samples", "length")
    return {name: getattr(arguments, name) for name in names}


def hashes(folder: Path) -> dict[str, str]:
    """File of weights or index to its SHA-256."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.glob("model*"))
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["memory", "killed", "once"])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--layers", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1408)
    parser.add_argument("--experts", type=int, default=0, help="of a mixture; 0: it is none")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--within", type=float, help="seconds after which a run is killed at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="where the models are made")
    parser.add_argument("--method", default="svd-llm")
    parser.add_argument("--trained", type=Path, help="folder of a model to train scores of")
    parser.add_argument("--text", type=Path, help="to train them on")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "once":
        folder, output = arguments.folders
        threads, samples = arguments.threads, arguments.samples
        if arguments.trained is not None:
            found = train(folder, output, arguments.text, threads, samples)
        else:
            found = stream(folder, output, arguments.method, threads, samples, arguments.length)
        print(json.dumps(found))
        return
    rows = memory(arguments) if arguments.what == "memory" else killed(arguments)
    if arguments.trained is not None:  # its place on this machine is not recorded
        rows[0]["text"] = arguments.text.name
        replaced = {str(arguments.trained): "FOLDER", str(arguments.text): "FILE"}
        sys.argv = [replaced.get(word, word) for word in sys.argv]
    write_record(arguments.output, arguments.scratch or Path(tempfile.gettempdir()), rows)


if __name__ == "__main__":
    main()
