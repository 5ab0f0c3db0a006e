"""What a start loads and what it does not; MiniCLIP from torch alone; groups in threads."""

import inspect
import json
import subprocess
import sys
import threading
import time

import open_clip
import pytest
import torch

from tpt_nb import methods, models
from tpt_nb.core.paths import REPO
from tpt_nb.models.clip import simple_tokenizer
from tpt_nb.models.mini import MiniClip
from tpt_nb.runs.threads import in_order, threads_of

# none is needed for a run with the embedded model, and each takes from 0.2 s to as long as torch
HEAVY = {
    "torchvision", "open_clip", "transformers", "timm", "diffusers", "sklearn", "torch._dynamo",
    "pandas", "scipy", "matplotlib", "requests", "huggingface_hub", "tensorboard", "ray",
}  # fmt: skip


RUN = """
import json, sys
def told():
    print(json.dumps(list(sys.modules)))
from tpt_nb import runs
from tpt_nb.models.clip import simple_tokenizer
values = {"dataset": "iconshift-v2", "model": "mini", "method": "tpt", "n_aug": 2, "device": "cpu"}
values |= {"profile": "mini", "reduced_size": 3, "cache": sys.argv[1], "out": sys.argv[1]}
runs.run(values, progress=False)
told()
from tpt_nb.lessons import check, findings, setup, widgets
from tpt_nb import datasets, features, figures, losses, methods, metrics, models, runs, views
told()
print(json.dumps(simple_tokenizer()(["A Zebra, isn't it?", "x" * 300]).tolist()))
"""


def printed(code: str, *args: str) -> list:
    """The JSON lines that a process of its own ends with."""
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def test_help_imports_no_torch():
    code = "import json, sys; from tpt_nb.__main__ import main; main(['--help'])\n"
    (found,) = printed(code + "print(json.dumps(list(sys.modules)))")
    assert "tpt_nb.core.command_line" in found
    assert sorted({"torch", "numpy", *HEAVY} & set(found)) == []


def test_a_run_of_the_embedded_model_loads_torch_and_little_else(tmp_path):
    after_run, after_first_cell, tokens = printed(RUN, str(tmp_path))
    assert "torch" in after_run
    # the lowest torch imports its compiler when anybody calls vmap
    theirs = {"torch._dynamo"} if "from torch._dynamo" in inspect.getsource(torch.vmap) else set()
    assert sorted((HEAVY - theirs) & set(after_run)) == []
    assert sorted((HEAVY - theirs) & set(after_first_cell)) == ["matplotlib"]
    # and the tokenizer without the rest of open_clip is the one with it
    assert tokens == open_clip.tokenize(["A Zebra, isn't it?", "x" * 300]).tolist()
    assert torch.equal(simple_tokenizer()(["a fox"]), open_clip.tokenize(["a fox"]))


# --- MiniCLIP ------------------------------------------------------------------------------------


def test_the_mini_network_is_open_clips_to_the_bit():
    theirs = models.build_mini(seed=5).eval()
    generator = torch.Generator().manual_seed(0)
    for module in theirs.modules():  # untrained statistics would hide a batch norm left out
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
    ours = MiniClip(**models.MINI_CONFIG).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.attn_mask, theirs.attn_mask)
    images = torch.randn(3, 3, 64, 64, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    texts = open_clip.tokenize(["a zebra", "a photo of a tall ship."])
    with torch.no_grad():
        assert torch.equal(ours.encode_image(images), theirs.encode_image(images))
        assert torch.equal(ours.encode_text(texts), theirs.encode_text(texts))
    for model in (ours, theirs):  # encoder tuning goes this way back
        model.visual.zero_grad()
        model.encode_image(images).square().sum().backward()
    for a, b in zip(ours.visual.parameters(), theirs.visual.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


# --- groups of images in threads -----------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_order_and_the_first_item_alone(threads):
    lock, now, most, first = threading.Lock(), 0, 0, threading.Event()

    def work(k: int) -> int:
        nonlocal now, most
        assert k == 0 or first.is_set()
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.03 if k % 2 == 0 else 0.01)  # the later of a pair is ready first
        with lock:
            now -= 1
        if k == 0:
            first.set()
        return 10 * k

    out = list(in_order(work, range(9), threads))
    assert [value for _, value in out] == [10 * k for k in range(9)]
    assert most <= max(1, threads)
    assert {n for n, _ in out[1:]} == {max(1, threads)}
    assert most > 1 or threads < 2


def test_every_kernel_has_one_thread_and_the_setting_comes_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        seen = [n for _, n in in_order(lambda k: torch.get_num_threads(), range(5), 2)]
        assert seen == [1] * 5
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            list(in_order(lambda k: 1 / (3 - k), range(9), 2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_methods_that_change_the_model_or_keep_things_of_their_own_stay_alone(mini):
    known = {name: threads_of(methods.get(name), mini) for name in methods.names()}
    assert known["tpt"] == known["zero_shot"] == torch.get_num_threads()
    for name in methods.names():
        method = methods.get(name)
        if method.kind != "episodic" or method.tunes == "encoder" or method.needs:
            assert known[name] == 0, name


def test_records_do_not_depend_on_the_number_of_threads(tmp_path, mini):
    from tpt_nb import runs

    written, before = [], torch.get_num_threads()
    same = {
        "dataset": "iconshift-v2",
        "model": "mini",
        "method": "tpt",
        "n_aug": 1,
        "profile": "mini",
    }
    same |= {"reduced_size": 70, "device": "cpu", "cache": str(tmp_path / "cache")}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            done = runs.run({**same, "out": str(tmp_path / str(threads))}, progress=False)
            written.append((done.dir / "records.jsonl").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert written[0] == written[1]
    assert written[0].count(b"\n") == 70
