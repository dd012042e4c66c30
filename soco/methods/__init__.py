"""The methods: how each takes a weight apart, under the name it is asked for by."""

from collections.abc import Callable, Mapping

from soco.methods.dobi import DobiSVD
from soco.methods.protocol import Method, TrainedMethod
from soco.methods.soco import SoCo
from soco.methods.weighted import SVD, SVDLLM

METHODS: Mapping[str, Callable[..., Method]] = {"svd": SVD, "svd-llm": SVDLLM, "soco": SoCo}

__all__ = ["METHODS", "SVD", "SVDLLM", "DobiSVD", "Method", "SoCo", "TrainedMethod"]
