"""One file and one line: a new method, loss, augmenter, data set is everywhere at once.

Each test adds something as the README says, and looks where a reader would.
"""

from dataclasses import dataclass

import pytest
import torch
from test_runs import config, world  # noqa: F401 (fixtures)

from tpt_nb import __main__ as cli
from tpt_nb import methods, runs, scale
from tpt_nb.methods import Adapted, Method, as_mask, initial_logits, option
from tpt_nb.methods.registry import METHODS


@dataclass(frozen=True)
class Options:
    power: float = option(3.0, "the larger, the more a sure view counts", flat="vote_power")


def power_vote(features, prompts, options):
    """Each view votes with its probabilities to a power."""
    logits = initial_logits(features, prompts)
    scores = logits.softmax(-1).pow(options.power).sum(1).log()
    everything = torch.arange(features.shape[1]).expand(len(features), -1)
    return Adapted(scores, logits[:, 0], scores.logsumexp(-1), as_mask(everything, features))


@pytest.fixture
def added(monkeypatch):
    """The line of the table; gone after the test."""
    monkeypatch.setitem(METHODS, "power_vote", Method(power_vote, Options))
    return "power_vote"


def test_a_method_runs_with_its_options(config, added):  # noqa: F811
    done = runs.run(config.replace(method=added, vote_power=2.0), progress=False)
    assert done.config.options == {"power": 2.0} and "power=2" in done.name
    usual = runs.run(config.replace(method=added), progress=False)
    assert usual.name != done.name and len(usual.records) == len(done.records)
    with pytest.raises(ValueError, match="vote_power=2.0 is for method 'power_vote', not 'tpt'"):
        runs.run(config.replace(vote_power=2.0))


def test_a_method_is_on_the_command_line(config, world, added, tmp_path, capsys):  # noqa: F811
    assert "vote_power" in cli.run_fields() and added in methods.names()
    words = [f"--{key}={value}" for key, value in world.items()]
    command = ["evaluate", *words, f"--out={tmp_path}", f"--method={added}", "--vote-power=4"]
    assert cli.main(command) == 0
    assert added in capsys.readouterr().out


def test_a_method_is_priced(added):
    found = scale.plan(dataset="imagenet-a", methods=[added, "tpt"])
    assert added in scale.plan_text(found)


def test_a_name_that_is_taken_or_wrong(added):
    with pytest.raises(ValueError, match="did you mean 'power_vote'"):
        methods.get("power_vot")
    with pytest.raises(ValueError, match="unknown tunes 'prompt'.*context"):
        Method(power_vote, Options, tunes="prompt")
