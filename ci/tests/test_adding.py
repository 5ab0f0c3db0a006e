"""One file and one line: a new method, loss, augmenter, data set is everywhere at once.

Each test adds something as the README says, and looks where a reader would.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from test_runs import config, world  # noqa: F401 (fixtures)
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from tpt_nb import __main__ as cli
from tpt_nb import datasets, losses, methods, runs, scale, views
from tpt_nb.datasets.registry import DATASETS
from tpt_nb.figures.style import COLOURS, WIDTH
from tpt_nb.methods import Adapted, Method, as_mask, initial_logits, option
from tpt_nb.methods.registry import METHODS

REPO = Path(__file__).resolve().parents[2]


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


# --- the README's recipes ------------------------------------------------------------------------


def recipes() -> dict[str, str]:
    """Title -> code of the section "Adding your own"."""
    text = (REPO / "README.md").read_text()
    section = text.split("## Adding your own")[1].split("\n## ")[0]
    return dict(re.findall(r"\*\*(A[^*]+)\*\*.*?```python\n(.*?)```", section, re.DOTALL))


TABLES = (METHODS, losses.LOSSES, views.AUGMENTERS, DATASETS)


@pytest.fixture
def recipe():
    """Runs a recipe with the names that a notebook has; what it adds is gone afterwards."""
    kept = [dict(table) for table in TABLES]

    def run_it(title: str) -> dict:
        code = recipes()[title]
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) <= 11, "about ten lines each"
        names = vars(methods) | NAMES
        exec(compile(code, title, "exec", dont_inherit=True), names)
        return names

    yield run_it
    for table, before in zip(TABLES, kept, strict=True):
        table.clear()
        table.update(before)


NAMES = {
    "COLOURS": COLOURS, "Figure": Figure, "Image": Image, "Path": Path, "Sequence": Sequence,
    "Tensor": Tensor, "WIDTH": WIDTH, "dataclass": dataclass, "datasets": datasets,
    "losses": losses, "methods": methods, "pil_to_tensor": pil_to_tensor, "plt": plt,
    "torch": torch, "views": views,
}  # fmt: skip


def test_the_recipe_of_a_method(config, recipe):  # noqa: F811
    recipe("A method")
    assert len(runs.run(config.replace(method="power_vote", power=2.0), progress=False).records)


def test_the_recipe_of_a_loss(config, recipe):  # noqa: F811
    recipe("A loss")
    plain = runs.run(config, progress=False)
    margin = runs.run(config.replace(loss="margin"), progress=False)
    assert "loss=margin" in margin.name
    assert [r["loss"] for r in margin.records] != [r["loss"] for r in plain.records]


def test_the_recipe_of_an_augmenter(config, recipe):  # noqa: F811
    recipe("An augmenter")
    done = runs.run(config.replace(augmenter="mirror", method="vote"), progress=False)
    assert "augmenter=mirror" in done.name and done.config.groups == (1, 2)
    assert {view for r in done.records for view in r["selected"]} <= {0, 1}


def test_the_recipe_of_a_data_set(config, recipe, tmp_path):  # noqa: F811
    recipe("A data set")
    for name, colour in (("france", "blue"), ("italy", "green"), ("peru", "red")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
    done = runs.run(config.replace(dataset="flags", root=str(tmp_path)), progress=False)
    assert [r["id"] for r in done.records] == ["france.png", "italy.png", "peru.png"]
    with pytest.raises(ValueError, match="did you mean 'flags'"):
        runs.run(config.replace(dataset="flag"))


def test_the_recipe_of_a_figure(recipe):
    figure = recipe("A figure")["steps"]([1.0, 3.0, 2.0], "ms")
    assert figure.axes[0].get_ylabel() == "ms"
