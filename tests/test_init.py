"""soco itself: public names on demand, and nothing costly before."""

import subprocess
import sys

import pytest

import soco


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_soco_imports_neither_torch_nor_transformers():
    heavy = "('torch', 'transformers', 'numpy')"
    assert run(f"import soco, sys; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_importing_the_ops_does_not_import_transformers():
    assert run("import soco.ops, sys; print('transformers' in sys.modules)") == "False"


@pytest.mark.parametrize("name", soco.__all__)
def test_every_public_name_is_there(name):
    assert getattr(soco, name) is not None
    assert name in dir(soco)


def test_an_unknown_name_is_an_ordinary_attribute_error():
    with pytest.raises(AttributeError, match="module 'soco' has no attribute 'sonos'"):
        _ = soco.sonos


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert soco.__version__ == version("soco-llm")


def test_mixed_with_the_home_audio_library_is_said_at_the_first_use(tmp_path):
    soco._check_not_mixed(tmp_path)
    (tmp_path / "discovery.py").touch()
    with pytest.raises(ImportError, match=r"two different libraries called soco .* in one place"):
        soco._check_not_mixed(tmp_path)


def test_mixed_with_the_home_audio_library_does_not_break_importing_torch():
    """`import torch` imports soco, too: the message comes when soco is used, not before."""
    script = (
        "import pathlib\n"
        "real = pathlib.Path.exists\n"
        "pathlib.Path.exists = lambda self: self.name == 'discovery.py' or real(self)\n"
        "import torch, soco\n"
        "try:\n"
        "    soco.ops\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert "pip uninstall soco soco-llm" in run(script)
