"""``soco.plan``: what a compression takes in memory, on disk and in time, from a config alone."""

from soco.planning.plan import Phase as Phase
from soco.planning.plan import Plan as Plan
from soco.planning.plan import duration as duration
from soco.planning.plan import plan as plan
