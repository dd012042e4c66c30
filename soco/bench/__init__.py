"""``soco-bench``: how fast layers, decompositions and models run, beside what else there is."""

from soco.bench.app import main as main
