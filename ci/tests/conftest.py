"""Fixtures that several test files share."""

import copy
import os
import sys

import pytest
import torch

from tpt_nb import models

torch.set_num_threads(1)
os.environ["TPT_NB_DOWNLOAD"] = "0"  # no test reaches for the net


@pytest.fixture(autouse=True)
def own_settings():
    """What a test, or what it calls, sets in the environment is not there for the next file."""
    before = {name: value for name, value in os.environ.items() if name.startswith("TPT_NB_")}
    yield
    for name in [name for name in os.environ if name.startswith("TPT_NB_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def no_open_figures():
    """Figures that a test leaves open would fail the tests that count them."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="session")
def mini() -> models.Clip:
    """A random MiniCLIP, float32 on the CPU, spread out so that prompts differ; left as it is."""
    model = models.build_mini(seed=0)
    with torch.no_grad():
        model.token_embedding.weight.mul_(5)
        model.logit_scale.fill_(4.6)  # about 100, as in trained models
    return models.wrap(model, "mini-random", device="cpu")


@pytest.fixture(scope="session")
def mini64(mini) -> models.Clip:
    """The same model in float64, for tests of exactness."""
    double = copy.copy(mini)
    double.model = copy.deepcopy(mini.model).double()
    return double
