"""Runs: a configuration in, records and a summary out; the profile, names, resuming.

Imports everything above but no method by name: a run asks the table of the methods.
A new setting that every run has is a field of ``RunConfig``; one of a method is in its options.
"""

from tpt_nb.runs.config import GROUP, RunConfig, augmenter_of, describe, identity, options_of
from tpt_nb.runs.engine import Session, make_prompts, run, run_name
from tpt_nb.runs.profile import (
    PROFILES,
    bring,
    choose_profile,
    coop_context,
    data_of,
    resolve,
    start_name,
)
from tpt_nb.runs.records import Run, load_run, to_records
from tpt_nb.runs.tensorboard import TAGS, meaning, read_scalars, write_tensorboard
from tpt_nb.runs.threads import memory_of

__all__ = [
    "GROUP",
    "PROFILES",
    "TAGS",
    "Run",
    "RunConfig",
    "Session",
    "augmenter_of",
    "bring",
    "choose_profile",
    "coop_context",
    "describe",
    "identity",
    "data_of",
    "load_run",
    "make_prompts",
    "meaning",
    "memory_of",
    "options_of",
    "read_scalars",
    "resolve",
    "run",
    "run_name",
    "start_name",
    "to_records",
    "write_tensorboard",
]
