"""Registers soco with transformers as soon as transformers is there, and not before.

``autoload`` runs when soco is imported, and at the end of ``import torch`` in every program of an
environment that has soco installed (the ``torch.backends`` entry point), so that programs that
know nothing of soco load its models, too. Therefore this file uses the standard library only, and
nothing in it may fail: an exception here would break ``import torch`` for everybody.
``SOCO_AUTOLOAD=0`` in the environment switches it off.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Sequence

# Modules of transformers that every way to a quantized model leads through, the right one first:
# the plug-in can be registered once the first of them is there. The second is for the case that
# importing the first is what imported torch, so that it is too late to watch for it.
_WATCHED = ("transformers.quantizers.auto", "transformers.modeling_utils")


def autoload() -> None:
    """Register now if transformers is imported already, else when it is. Never fails."""
    with _Shield():
        if os.environ.get("SOCO_AUTOLOAD", "1") == "0":
            return
        if _is_complete(_WATCHED[0]):
            _register()
        elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
            awaited = next((name for name in _WATCHED if name not in sys.modules), None)
            if awaited is not None:
                sys.meta_path.insert(0, _Watcher(awaited))


class _Shield:
    """Turns any exception into one line of the log: the program may not be about soco at all.

    This is the one place where everything is caught. It is a context manager with a reason to be,
    not a guard around an import that is allowed to fail: whoever then loads a model compressed by
    soco gets an error from the sentinel tensors, and this line says why.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):
            return False  # nothing happened, or Ctrl-C, or the interpreter is to stop
        logging.getLogger("soco").warning(
            "soco could not register with transformers, so models compressed by soco will not "
            "load: %s: %s",
            type(error).__name__,
            error,
        )
        return True


class _Watcher(importlib.abc.MetaPathFinder):
    """Waits for one module to be imported, registers after that, and is gone."""

    def __init__(self, awaited: str) -> None:
        self.awaited = awaited

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Leave the finding to the other finders, and hook the end of the module's execution."""
        if fullname != self.awaited:
            return None
        with _Shield():
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            spec = importlib.util.find_spec(fullname)
            if spec is not None and spec.loader is not None:
                _call_after(spec.loader)
            return spec
        return None


def _call_after(loader: importlib.abc.Loader) -> None:
    """Make ``loader`` register soco once, after it has executed its module."""
    execute = loader.exec_module

    def exec_module(module: types.ModuleType) -> None:
        del loader.exec_module  # the class's own again
        execute(module)
        with _Shield():
            _register()

    loader.exec_module = exec_module  # type: ignore[method-assign]


def _is_complete(name: str) -> bool:
    """Whether a module is imported, and not just on its way."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)


def _register() -> None:
    # It registers itself when it is imported. If it is on its way just now, and is itself what
    # imports transformers, it is not complete here, and registers at its end.
    importlib.import_module("soco.plugin")
