"""soco: learned SVD compression of language models.

The names below are imported when they are first used, so that ``import soco`` costs nothing. It
also lets transformers know how to load a model that soco has compressed.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soco import _autoload

if TYPE_CHECKING:
    from soco import data as data
    from soco import diagnosis as diagnosis
    from soco import linalg as linalg
    from soco import methods as methods
    from soco import modules as modules
    from soco import ops as ops
    from soco.checkpoint import export_dense as export_dense
    from soco.checkpoint import load as load
    from soco.checkpoint import save as save
    from soco.comparison import compare as compare
    from soco.decomposition import Decomposition as Decomposition
    from soco.decomposition import decompose as decompose
    from soco.evaluation import Evaluation as Evaluation
    from soco.evaluation import evaluate as evaluate
    from soco.optimization import optimize as optimize
    from soco.pipeline import compress as compress
    from soco.planning import Plan as Plan
    from soco.planning import plan as plan
    from soco.preparation import prepare as prepare
    from soco.processes import together as together
    from soco.reporting import Report as Report
    from soco.reporting import report as report
    from soco.resizing import resize as resize
    from soco.running import blockwise as blockwise
    from soco.streaming import compress_folder as compress_folder
    from soco.tasks import TaskScore as TaskScore
    from soco.tasks import TaskScores as TaskScores
    from soco.tasks import evaluate_tasks as evaluate_tasks
    from soco.verification import Verification as Verification
    from soco.verification import verify as verify

    __version__: str

__all__ = [
    "Decomposition",
    "Evaluation",
    "Plan",
    "Report",
    "TaskScore",
    "TaskScores",
    "Verification",
    "blockwise",
    "compare",
    "compress",
    "compress_folder",
    "data",
    "decompose",
    "diagnosis",
    "evaluate",
    "evaluate_tasks",
    "export_dense",
    "linalg",
    "load",
    "methods",
    "modules",
    "ops",
    "optimize",
    "plan",
    "prepare",
    "report",
    "resize",
    "save",
    "together",
    "verify",
]

_HOME = {  # public name to the file it lives in
    "Decomposition": "decomposition",
    "Evaluation": "evaluation",
    "Plan": "planning",
    "Report": "reporting",
    "TaskScore": "tasks",
    "TaskScores": "tasks",
    "Verification": "verification",
    "blockwise": "running",
    "compare": "comparison",
    "compress": "pipeline",
    "compress_folder": "streaming",
    "decompose": "decomposition",
    "evaluate": "evaluation",
    "evaluate_tasks": "tasks",
    "export_dense": "checkpoint",
    "load": "checkpoint",
    "optimize": "optimization",
    "plan": "planning",
    "prepare": "preparation",
    "report": "reporting",
    "resize": "resizing",
    "save": "checkpoint",
    "together": "processes",
    "verify": "verification",
}

# Files of the home-audio library that is called `soco` on the package index and installs a folder
# of the same name. Where they lie beside this file, the two are mixed: each of them has overwritten
# this __init__.py or will, and uninstalling either one takes it away from the other.
_HOME_AUDIO = ("discovery.py", "music_library.py", "zonegroupstate.py")


def _check_not_mixed(folder: Path = Path(__file__).parent) -> None:
    """Refuse to go on in a folder that the home-audio library `soco` shares."""
    if any((folder / name).exists() for name in _HOME_AUDIO):
        raise ImportError(
            "two different libraries called soco are installed in one place: soco-llm (compression "
            "of language models) and soco (home audio), and each has overwritten files of the "
            "other; put them into separate environments, or keep one: "
            "`pip uninstall soco soco-llm`, then `pip install` the one you want"
        )


def __getattr__(name: str) -> Any:
    # Only here, and not while this file is imported: `import torch` imports it, too (_autoload.py).
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("soco-llm")
    if name not in __all__:
        raise AttributeError(f"module 'soco' has no attribute {name!r}")
    _check_not_mixed()
    home = importlib.import_module(f"soco.{_HOME.get(name, name)}")
    value = getattr(home, name) if name in _HOME else home
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])


_autoload.autoload()
