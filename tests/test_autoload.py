"""soco._autoload: programs that know nothing of soco load its models, and none of them breaks."""

import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from soco.checkpoint import export_dense
from tiny_models import compress, logits, tiny_model, token_inputs

_autoload = importlib.import_module("soco._autoload")  # the package has a function of that name


@pytest.fixture
def awaited(tmp_path, monkeypatch):
    """Two modules in the place of transformers', and a list of the registrations."""
    (tmp_path / "first_awaited.py").write_text("import second_awaited\nready = True\n")
    (tmp_path / "second_awaited.py").write_text("ready = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_autoload, "_WATCHED", ("first_awaited", "second_awaited"))
    monkeypatch.setattr(sys, "meta_path", _others())
    registered = []

    def register():
        registered.append(getattr(sys.modules.get("first_awaited"), "ready", None))

    monkeypatch.setattr(_autoload, "_register", register)
    monkeypatch.delenv("SOCO_AUTOLOAD", raising=False)
    yield registered
    for name in ("first_awaited", "second_awaited"):
        sys.modules.pop(name, None)


def _others():
    return [finder for finder in sys.meta_path if not isinstance(finder, _autoload._Watcher)]


def watchers():
    return [finder for finder in sys.meta_path if isinstance(finder, _autoload._Watcher)]


def test_waits_for_the_module(awaited):
    _autoload.autoload()
    assert awaited == []
    module = importlib.import_module("first_awaited")
    assert awaited == [True]  # after the module was executed
    assert watchers() == []
    assert module.__spec__ is not None
    assert "exec_module" not in vars(module.__spec__.loader)
    importlib.reload(module)
    assert awaited == [True]


def test_registers_at_once_if_it_is_late(awaited):
    importlib.import_module("first_awaited")
    _autoload.autoload()
    assert awaited == [True]
    assert watchers() == []


def test_twice_is_once(awaited):
    _autoload.autoload()
    _autoload.autoload()
    assert len(watchers()) == 1


def test_called_while_the_module_is_imported(awaited, tmp_path):
    (tmp_path / "first_awaited.py").write_text(
        "from soco._autoload import autoload\nautoload()\nready = True\nimport second_awaited\n"
    )
    importlib.import_module("first_awaited")
    assert awaited == [True]


def test_switched_off(awaited, monkeypatch):
    monkeypatch.setenv("SOCO_AUTOLOAD", "0")
    _autoload.autoload()
    importlib.import_module("first_awaited")
    assert awaited == []
    assert watchers() == []


def test_finding_alone_registers_nothing(awaited):
    _autoload.autoload()
    assert importlib.util.find_spec("second_awaited") is not None
    assert len(watchers()) == 1
    assert awaited == []


def test_nothing_escapes(awaited, monkeypatch, caplog):
    def broken():
        raise ImportError("no core")

    monkeypatch.setattr(_autoload, "_register", broken)
    _autoload.autoload()
    with caplog.at_level(logging.WARNING, "soco"):
        assert importlib.import_module("first_awaited").ready
    assert "soco could not register with transformers" in caplog.text
    assert "ImportError: no core" in caplog.text


def test_a_module_that_fails_says_so_itself(awaited, tmp_path):
    (tmp_path / "first_awaited.py").write_text("raise RuntimeError('its own')\n")
    _autoload.autoload()
    with pytest.raises(RuntimeError, match="its own"):
        importlib.import_module("first_awaited")


def test_interrupts_pass(monkeypatch):
    def stopped(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(_autoload, "_is_complete", stopped)
    monkeypatch.delenv("SOCO_AUTOLOAD", raising=False)
    with pytest.raises(KeyboardInterrupt):
        _autoload.autoload()


def run(program, *arguments, **environment):
    """A fresh interpreter, away from the source folder."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("SOCO_", "COV"))}
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=variables | environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A compressed model, its folder, and the dense folder made of it."""
    compressed = compress(tiny_model("llama"))
    folder = tmp_path_factory.mktemp("compressed")
    compressed.save_pretrained(folder)
    dense = tmp_path_factory.mktemp("dense") / "model"
    export_dense(compressed, dense)
    return compressed, folder, dense


READ = """
import json, sys
import torch
assert not any(name.startswith("transformers") for name in sys.modules), "torch loaded transformers"
from transformers import AutoModelForCausalLM

def read(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        values = model(torch.tensor(json.loads(sys.argv[1]))).logits.tolist()
    print(json.dumps([type(model.model.layers[0].mlp.up_proj).__name__, values]))
"""


def read(program, compressed, *folders, **environment):
    """What the program reads: the kind of a layer, and the logits, for each of its calls."""
    tokens = json.dumps(token_inputs(compressed)["input_ids"].tolist())
    done = run(READ + program, tokens, *folders, **environment)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.strip().splitlines()]
    return [(kind, torch.tensor(values)) for kind, values in lines]


def test_a_program_that_never_imports_soco(model):
    compressed, folder, _ = model
    [(kind, values)] = read("read(sys.argv[2])", compressed, folder)
    assert kind == "LowRankLinear"
    torch.testing.assert_close(values, logits(compressed), rtol=0, atol=1e-6)


OFF = """
try:
    read(sys.argv[2])
except RuntimeError as error:
    assert "ignore_mismatched_sizes" in str(error) or "size mismatch" in str(error), error
else:
    raise AssertionError("stock transformers took the folder for a dense model")
assert "soco.plugin" not in sys.modules
read(sys.argv[3])
import os, soco._autoload
os.environ["SOCO_AUTOLOAD"] = "1"
sys.modules["soco._autoload"].autoload()  # late: transformers is there already
read(sys.argv[2])
"""


def test_without_the_plugin(model):
    compressed, folder, dense = model
    (stock, one), (kind, other) = read(OFF, compressed, folder, dense, SOCO_AUTOLOAD="0")
    assert (stock, kind) == ("Linear", "LowRankLinear")
    torch.testing.assert_close(one, logits(compressed), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other, logits(compressed), rtol=0, atol=1e-6)


FIRST = """
import soco.plugin
import transformers.quantizers.auto as auto
assert "soco" in auto.AUTO_QUANTIZER_MAPPING
print("registered")
"""


def test_soco_imports_transformers():
    done = run(FIRST)
    assert (done.stdout, done.stderr) == ("registered\n", "")


BROKEN = """
import sys
sys.modules["soco._C"] = None
import torch
import transformers.quantizers.auto as auto
assert "soco" not in auto.AUTO_QUANTIZER_MAPPING
print("fine")
"""


def test_a_broken_soco_breaks_nobody():
    done = run(BROKEN)
    assert done.stdout == "fine\n", done.stderr
    assert "soco could not register with transformers" in done.stderr
