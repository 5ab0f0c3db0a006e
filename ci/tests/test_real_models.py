"""Real architectures at full size with random weights: OpenAI's own code is the reference.

No published weights can be had in tests, so OpenAI's package builds its models, and they are saved
as OpenAI publishes them: a TorchScript archive with float16 weights.
"""

import importlib.util
import json
import math
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import normalize

from tpt_nb import __main__ as cli
from tpt_nb import datasets, models, runs
from tpt_nb.core import machine, messages
from tpt_nb.datasets import imagenet_classes
from tpt_nb.losses import marginal_entropy, select_confident
from tpt_nb.models import Prompts, load_coop
from tpt_nb.models import loading as load_module
from tpt_nb.runs import RunConfig
from tpt_nb.runs import profile as profile_module
from tpt_nb.runs import records as records_module

TEXTS = ["a photo of a cat.", "a tiny photo of a hot air balloon, plain background.", "dog", ""]
NAMES = ["tench", "great white shark", "hot air balloon", "cat", "fire truck"]
SIZES = {  # embed, pixels, image layers, width, patch; text width, heads (layers: 12)
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 512, 8),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 512, 8),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 640, 10),
    "ViT-B/32": (512, 224, 12, 768, 32, 512, 8),
    "ViT-B/16": (512, 224, 12, 768, 16, 512, 8),
    "ViT-L/14": (768, 224, 24, 1024, 14, 768, 12),
}
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in SIZES if name != "RN50"]


@pytest.fixture(scope="module")
def openai():
    """``clip.model`` of the openai-clip package, without its loader (which needs pkg_resources)."""
    file = Path(importlib.util.find_spec("clip").origin).with_name("model.py")
    spec = importlib.util.spec_from_file_location("openai_clip_model", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_archive(openai, name: str, path: Path) -> dict:
    """Write an archive as OpenAI publishes them; returns its weights."""
    embed, pixels, layers, width, patch, text, heads = SIZES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = openai.CLIP(embed, pixels, layers, width, patch, 77, 49408, text, heads, 12)
        for module in model.modules():  # as it is made, batch norm would hide half of the network
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                torch.nn.init.uniform_(module.weight, 0.5, 1)
    openai.convert_weights(model)
    for key, value in (("context_length", 77), ("vocab_size", 49408)):
        delattr(model, key)
        model.register_buffer(key, torch.tensor(value))
    model.register_buffer("input_resolution", torch.tensor(pixels))
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(Holder(model), torch.zeros(1), check_trace=False)
        torch.jit.save(traced.model, path)  # the weights under OpenAI's names
    return model.state_dict()


class Holder(torch.nn.Module):
    """Traced without running the network: what is loaded is the weights of the archive."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return x


@pytest.fixture(scope="module")
def archive(openai, tmp_path_factory):
    """RN50: the archive, OpenAI's model of its weights in float32, ours."""
    path = tmp_path_factory.mktemp("clip") / "RN50.pt"
    state = save_archive(openai, "RN50", path)
    theirs = openai.build_model(dict(state)).float().eval().requires_grad_(False)
    return path, theirs, models.load(str(path), device="cpu")


def close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Agreement of 1e-4, relative to the size of the whole."""
    error = float((ours - theirs).norm() / theirs.norm())
    assert error < 1e-4, f"{what}: relative error {error:.1e}"


def their_gradient(openai_model, views, names):
    """Logits of all views and the gradient of TPT's loss, with OpenAI's modules alone."""
    tokens = open_clip.tokenize([f"a photo of a {name}." for name in names])
    embedded = openai_model.token_embedding(tokens)
    ctx = embedded[0, 1:5].clone().requires_grad_(True)
    x = torch.cat([embedded[:, :1], ctx.expand(len(names), -1, -1), embedded[:, 5:]], dim=1)
    x = (x + openai_model.positional_embedding).permute(1, 0, 2)
    x = openai_model.ln_final(openai_model.transformer(x).permute(1, 0, 2))
    x = x[torch.arange(len(names)), tokens.argmax(dim=-1)] @ openai_model.text_projection
    images = F.normalize(openai_model.encode_image(views), dim=-1)
    logits = openai_model.logit_scale.exp() * images @ F.normalize(x, dim=-1).T
    chosen = select_confident(logits.detach(), 0.5)
    log_p = logits[chosen].log_softmax(dim=-1)
    mean = log_p.logsumexp(dim=0) - math.log(len(chosen))
    loss = -(mean.exp() * mean).sum()
    return logits.detach(), torch.autograd.grad(loss, ctx)[0]


def compare(theirs, ours) -> None:
    generator = torch.Generator().manual_seed(1)
    size = ours.image_size
    views = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator)
    x = normalize(views / 255, ours.mean, ours.std)
    with torch.no_grad():
        close(ours.encode_views(views), F.normalize(theirs.encode_image(x), dim=-1), "images")
        texts = F.normalize(theirs.encode_text(open_clip.tokenize(TEXTS)), dim=-1)
        close(ours.encode_text(TEXTS), texts, "texts")
    logits, gradient = their_gradient(theirs, x, NAMES)
    prompts = Prompts(ours, NAMES)
    features = ours.encode_views(views)
    for exact in ("fast", "paper"):
        ctx = prompts.ctx.clone().requires_grad_(True)
        z = ours.logit_scale * features @ prompts.text_features(ctx, exact=exact).T
        close(z.detach(), logits, f"logits ({exact})")
        (mine,) = torch.autograd.grad(marginal_entropy(z, 0.5), ctx)
        close(mine, gradient, f"gradient ({exact})")


def test_full_size_rn50_agrees_with_openais_code(archive):
    _, theirs, ours = archive
    assert (ours.image_size, ours.embed_dim, ours.ctx_dim) == (224, 1024, 512)
    assert sum(p.numel() for p in ours.model.parameters()) == 102_007_137
    compare(theirs, ours)


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_architectures_agree_too(openai, tmp_path, name):
    path = tmp_path / f"{name.replace('/', '-')}.pt"
    state = save_archive(openai, name, path)
    theirs = openai.build_model(state).float().eval().requires_grad_(False)
    ours = models.load(str(path), device="cpu")
    assert ours.image_size == SIZES[name][1] and ours.embed_dim == SIZES[name][0]
    compare(theirs, ours)


def test_an_archive_in_openais_cache_is_taken(archive, monkeypatch):
    monkeypatch.setattr(load_module, "ARCHIVES_DIR", archive[0].parent)
    assert profile_module.weights_here("RN50") and not models.weights_file("ViT-B/32")
    assert models.weights_file("RN50") == archive[0]
    assert load_module.archive_source("ViT-L/14@336px")[0] == "ViT-L-14-336px.pt"
    assert len(load_module.archive_source("RN50")[2]) == 64
    monkeypatch.setattr(load_module, "_load_file", lambda path, device, name: (path, name))
    assert models.load("RN50") == (archive[0], "RN50")


# --- the run of the issue ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet_a(tmp_path_factory) -> Path:
    """20 generated JPEGs in ImageNet-A's layout."""
    root = tmp_path_factory.mktemp("data") / "imagenet-a"
    rng = np.random.default_rng(0)
    for i, synset in enumerate(list(imagenet_classes("a"))[::10]):
        (root / synset).mkdir(parents=True)
        pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC)
        image.save(root / synset / f"0.{i:06d}_thing _ thing_0.5.jpg", quality=90)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Features of the 20 images, computed once for all runs."""
    return tmp_path_factory.mktemp("cache")


def evaluate(archive, root, tmp_path, *options) -> list[str]:
    paths = ["--root", str(root), "--model", str(archive[0]), "--out", str(tmp_path / "runs")]
    usual = ["--dataset", "imagenet-a", "--device", "cpu", "--workers", "0", "--n_aug", "1"]
    return ["evaluate", *usual, *paths, *options, "--json"]


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "tpt", "--reduced_size", "2"),
        # of all 20 images: what an image passes through is the same as above
        pytest.param(("--method", "confident_view"), marks=pytest.mark.slow),
        pytest.param(("--method", "tpt"), marks=pytest.mark.slow),
    ],
)
def test_evaluate_imagenet_a_with_full_size_rn50(
    archive, imagenet_a, cache, tmp_path, capsys, monkeypatch, options
):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(messages, "_said", set())
    command = evaluate(
        archive, imagenet_a, tmp_path, "--cache", str(cache), "--selection_p_all", "1", *options
    )
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    n = 2 if "--reduced_size" in options else 20
    assert result["n"] == n and result["failed"] == 0 and result["dataset"] == "imagenet-a"
    assert "profile full: data set and model are named" in out
    assert "20 images of 20 classes are here; the whole set has 7,500 images of 200" in out
    (folder,) = (tmp_path / "runs").iterdir()
    config = json.loads((folder / "config.json").read_text())
    assert (
        len(config["classnames"]) == 200 and config["config"]["options"].get("lr", 0.005) == 0.005
    )
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert {r["target"] for r in records} <= set(range(0, 200, 10)) and len(records) == n
    assert all(0 <= r["pred_after"] < 200 and math.isfinite(r["loss"]) for r in records)

    # stopped in the middle of a record it goes on with that one, and to the same records
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "records.jsonl").write_bytes(b"".join(lines[: n // 2]) + lines[n // 2][:40])
    (folder / "summary.json").unlink()
    assert cli.main(command) == 0
    assert f"resumed at {n // 2} of {n} images" in capsys.readouterr().out
    assert (folder / "records.jsonl").read_bytes() == b"".join(lines)


def test_folders_that_do_not_fit_end_the_run_with_one_line(archive, tmp_path, capsys):
    root = tmp_path / "wrong"
    (root / "n01440764").mkdir(parents=True)  # tench, which ImageNet-A does not have
    Image.new("RGB", (9, 9)).save(root / "n01440764" / "x.jpg")
    assert cli.main(evaluate(archive, root, tmp_path)) == 2
    error = capsys.readouterr().err
    assert "n01440764: 'tench', a class of imagenet" in error and error.count("\n") == 1


# --- profiles ------------------------------------------------------------------------------------


def test_full_says_in_one_message_what_is_missing_and_from_where(tmp_path, monkeypatch):
    monkeypatch.setattr(load_module, "ARCHIVES_DIR", tmp_path / "none")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("TPT_NB_DATASETS", str(tmp_path / "none"))
    monkeypatch.setattr(profile_module, "weights_here", lambda model: False)
    with pytest.raises(ValueError) as error:
        runs.resolve(RunConfig(profile="full", device="cpu"))
    text = str(error.value)
    assert "the weights of CLIP RN50" in text and "TPT_NB_DOWNLOAD=0" in text
    assert "the images of imagenet-a" in text and "people.eecs.berkeley.edu" in text
    assert "profile=mini" in text
    monkeypatch.setattr(machine, "gpu_problem", lambda: "")
    profile, why = runs.choose_profile(RunConfig())
    assert profile == "mini" and "weights of CLIP RN50" in why


def test_auto_brings_what_it_needs_where_it_may(tmp_path, monkeypatch):
    asked = []

    def get(name):
        asked.append(name)
        folder = tmp_path / "data" / name / "imagenet-a" / "n07753592"
        folder.mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / "x.png")

    monkeypatch.setattr(machine, "gpu_problem", lambda: "")
    monkeypatch.setenv("TPT_NB_DATASETS", str(tmp_path / "data"))
    there = []
    monkeypatch.setattr(profile_module, "weights_here", lambda model: bool(there))
    monkeypatch.setattr(models, "fetch_weights", lambda model: there.append(model))
    monkeypatch.setattr(datasets, "download", get)
    assert runs.choose_profile(RunConfig())[0] == "mini" and not asked and not there
    monkeypatch.setenv("TPT_NB_DOWNLOAD", "1")
    assert runs.choose_profile(RunConfig())[0] == "full"
    assert asked == ["imagenet-a"] and there == ["RN50"]
    assert runs.choose_profile(RunConfig())[0] == "full"
    assert asked == ["imagenet-a"]

    def refused(name):
        raise OSError("no connection to the server")

    monkeypatch.setenv("TPT_NB_DATASETS", str(tmp_path / "empty"))
    monkeypatch.setattr(datasets, "download", refused)
    profile, why = runs.choose_profile(RunConfig())
    assert profile == "mini" and "the images of imagenet-a: no connection to the server" in why


@pytest.mark.parametrize(
    "n, hits, says", [(200, 1, True), (200, 4, True), (200, 12, False), (199, 1, False)]
)
def test_accuracy_near_chance_asks_for_the_label_map(capsys, n, hits, says):
    records_module.hint_at_chance({"n": n, "accuracy_before": hits / n}, 200)
    out = capsys.readouterr().out
    assert ("Check the label map" in out) == says
    assert not says or f"right on {hits} of {n} images" in out


# --- CoOp ----------------------------------------------------------------------------------------


def test_a_full_size_coop_checkpoint_gives_its_context(tmp_path, archive):
    """``model.pth.tar-50`` of CoOp's trainer: float16, buffers of 1,000 classes, optimiser."""
    ctx = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).half()
    parameter = torch.nn.Parameter(ctx.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.002, momentum=0.9, weight_decay=5e-4)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    state = {
        "ctx": ctx,
        "token_prefix": torch.zeros(1000, 1, 512, dtype=torch.half),
        "token_suffix": torch.zeros(1000, 72, 512, dtype=torch.half),
    }
    checkpoint = {
        "state_dict": state,
        "epoch": 50,
        "optimizer": optimizer.state_dict(),
        # the trainer's warm-up scheduler keeps the next one, an object, in its state
        "scheduler": {"successor": schedule, "warmup_epoch": 1, "last_epoch": 50},
        "val_result": np.float64(62.3),
    }
    path = tmp_path / "model.pth.tar-50"
    torch.save(checkpoint, path)
    assert 74e6 < path.stat().st_size < 76e6
    loaded = load_coop(path, 4, 512)
    assert loaded.dtype == torch.float32 and torch.equal(loaded, ctx.float())
    prompts = Prompts(archive[2], NAMES, coop=path)  # for other classes than those of the training
    assert torch.equal(prompts.ctx, ctx.float()) and prompts.text_features().shape == (5, 1024)
    with pytest.raises(ValueError, match=r"M=4 context vectors; pass n_ctx=4"):
        load_coop(path, 16, 512)


# --- memory and precision ------------------------------------------------------------------------


class Encoder(torch.nn.Module):
    """Encodes views by their mean colour; can run out of memory, or out of float16's range."""

    def __init__(self, room: int = 1 << 30, largest: float = 1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(3) * largest)
        self.room, self.passes = room, []

    def encode_image(self, x):
        self.passes.append((len(x), torch.get_autocast_dtype("cpu")))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.99 GiB")
        return x.mean(dim=(2, 3)) @ self.weight


def wrapped(model: Encoder) -> models.Clip:
    return models.Clip(
        "toy", model, None, 8, (0.0,) * 3, (1.0,) * 3, torch.device("cpu"), fingerprint="toy"
    )


VIEWS = torch.rand(13, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_out_of_memory_halves_the_pass_and_is_remembered():
    expected = wrapped(Encoder()).encode_views(VIEWS)
    clip = wrapped(Encoder(room=3))
    torch.testing.assert_close(clip.encode_views(VIEWS, batch=12), expected)
    assert [n for n, _ in clip.model.passes] == [12, 6, 3, 3, 3, 3, 1]
    assert clip.max_views == 3
    clip.model.passes.clear()
    torch.testing.assert_close(clip.encode_views(VIEWS, batch=12), expected)
    assert [n for n, _ in clip.model.passes] == [3, 3, 3, 3, 1]


def test_memory_for_not_even_one_view():
    with pytest.raises(RuntimeError, match="cannot hold one view of 8 px beside toy"):
        wrapped(Encoder(room=0)).encode_views(VIEWS)


def test_what_leaves_the_range_of_float16_is_computed_again(monkeypatch):
    chosen = [torch.float16, torch.bfloat16]
    monkeypatch.setattr(models.Clip, "_precisions", lambda self: chosen)
    clip = wrapped(Encoder())
    assert clip.encode_views(VIEWS).isfinite().all()
    assert [dtype for _, dtype in clip.model.passes] == [torch.float16]
    clip = wrapped(Encoder(largest=1e6))
    features = clip.encode_views(VIEWS)
    assert [dtype for _, dtype in clip.model.passes] == chosen
    expected = wrapped(Encoder()).encode_views(VIEWS)
    torch.testing.assert_close(features, expected, atol=0, rtol=2**-7)  # 8 bits
    clip.model.passes.clear()
    unchecked = clip.encode_views(VIEWS, checked=False)  # whoever does not wait can still see it
    assert not unchecked.isfinite().all() and len(clip.model.passes) == 1


def test_the_cpu_computes_as_the_weights_are():
    clip = wrapped(Encoder())
    assert clip._precisions() == [None] and clip._room() > 1e6
    clip.encode_views(VIEWS)
    assert clip.model.passes == [(13, torch.get_autocast_dtype("cpu"))]
