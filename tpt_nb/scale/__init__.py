"""Scale: the same runs on many processes or machines, with Ray; the planner.

Imports runs and everything above, never lessons or the course.
A new place to run is a function as ``evaluate`` and ``run_all``; Ray is imported by these alone.
"""

from tpt_nb.scale.cluster import evaluate, run_all, spread
from tpt_nb.scale.planner import plan, plan_text, read_costs

__all__ = ["evaluate", "plan", "plan_text", "read_costs", "run_all", "spread"]
