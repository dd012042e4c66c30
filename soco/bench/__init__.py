"""``soco-bench``: how fast low-rank layers, decompositions and whole models run, beside what else
there is.
"""  # noqa: D205

from soco.bench.app import main as main
