"""Imported by the process that the rows of a sweep are forked from: makes what they share, once.

That is the model, the prompts, and the Jacobian of the text tower where the rows are long enough to
use it. A forked row finds them where ``experiment.run`` looks for those of the run before.
"""

import contextlib
import json
import os
from pathlib import Path

import torch

from tpt_nb import datasets, runs
from tpt_nb.methods import tuning


def warm(rows: list[dict]) -> bool:
    """Make what the first unfinished row that tunes needs; is there anything to share now?

    Only where there is no GPU: neither CUDA nor its autograd threads survive a fork.
    """
    if torch.cuda.is_available():
        return False
    torch.set_num_threads(1)  # threads do not survive it either; a row sets its own number
    for values in rows:
        config = runs.resolve(runs.RunConfig.from_dict(values))[0]
        folder = Path(config.out) / runs.run_name(config)
        if config.method != "tpt" or (folder / "summary.json").is_file():
            continue
        images = datasets.load(
            config.dataset, config.reduced_size, config.subset_seed, config.root or None
        )
        _, prompts = runs.model_and_prompts(config, images.classnames)
        if tuning._worth_a_jacobian(prompts, len(images)):
            prompts.jacobian()
        return True
    return False


if "TPT_NB_SWEEP" in os.environ:
    # what is wrong with a row, the row itself will say
    with contextlib.suppress(ValueError, OSError, RuntimeError, TypeError):
        warm(json.loads(os.environ["TPT_NB_SWEEP"]))
