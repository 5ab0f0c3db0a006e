import importlib.util
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from torchvision.transforms.functional import normalize

from tpt_nb import models

TEXTS = ["a photo of a cat.", "a tiny photo of a hot air balloon, plain background.", "dog", ""]


@pytest.fixture(scope="module")
def views():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def mini_file(tmp_path_factory):
    """The file of a random MiniCLIP that knows the tokens of TEXTS only, and the model in it."""
    path = tmp_path_factory.mktemp("mini") / "miniclip.safetensors"
    model = models.build_mini(seed=3)
    with torch.no_grad():
        for block in model.visual.modules():  # so that batch norm is more than the identity
            if isinstance(block, torch.nn.BatchNorm2d):
                block.running_mean.normal_(0, 0.1)
                block.running_var.uniform_(0.5, 2)
                block.weight.uniform_(0.5, 1)
    tokens = open_clip.tokenize(TEXTS).unique()
    models.save_mini(model, tokens, path)
    return path, model


# --- encoding ------------------------------------------------------------------------------------


def test_views_are_normalised_as_open_clip_expects(mini, views):
    x = normalize(views / 255, mini.mean, mini.std)
    expected = F.normalize(mini.model.encode_image(x), dim=-1)
    features = mini.encode_views(views)
    assert features.dtype == torch.float32 and features.shape == (5, mini.embed_dim)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))


def test_uint8_and_float_views_and_batch_sizes_agree(mini, views):
    features = mini.encode_views(views)
    torch.testing.assert_close(mini.encode_views(views.float() / 255), features)
    torch.testing.assert_close(mini.encode_views(views, batch=2), features, atol=1e-5, rtol=0)
    assert mini.encode_views(views[:0]).shape == (0, mini.embed_dim)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v[0], r"takes \[V,3,64,64\]"),
        (lambda v: v[:, :, :32], r"\[5, 3, 32, 64\]"),
        (lambda v: v.float(), r"must lie in \[0,1\]"),
        (lambda v: v.int(), "uint8 or float"),
    ],
)
def test_bad_views_are_named(mini, views, change, message):
    with pytest.raises(ValueError, match=message):
        mini.encode_views(change(views))


def test_cut_text_equals_all_77_tokens(mini64):
    expected = F.normalize(mini64.model.encode_text(open_clip.tokenize(TEXTS)), dim=-1)
    for batch in (1, 3, 256):
        features = mini64.encode_text(TEXTS, batch=batch)
        torch.testing.assert_close(features, expected, atol=1e-12, rtol=0)


def test_tokens_behind_the_end_of_text_change_nothing(mini64):
    tokens = open_clip.tokenize(TEXTS)
    noise = torch.randint(1, 40000, tokens.shape)
    behind = torch.arange(77) > tokens.argmax(dim=-1, keepdim=True)
    changed = mini64.model.encode_text(torch.where(behind, noise, tokens), normalize=True)
    torch.testing.assert_close(changed, mini64.encode_text(TEXTS), atol=1e-12, rtol=0)


def test_too_long_text_warns(mini):
    with pytest.warns(UserWarning, match="longer than 77 tokens"):
        mini.encode_text(["word " * 90])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mini.encode_text(["word " * 75])  # with start and end exactly 77


# --- MiniCLIP's file -----------------------------------------------------------------------------


def test_mini_file_keeps_the_features(mini_file, views):
    path, model = mini_file
    loaded = models.load_mini(path, device="cpu")
    original = models.wrap(model, "original", device="cpu")
    assert path.stat().st_size < 12e6
    torch.testing.assert_close(
        loaded.encode_views(views), original.encode_views(views), atol=5e-3, rtol=0
    )
    torch.testing.assert_close(
        loaded.encode_text(TEXTS), original.encode_text(TEXTS), atol=5e-3, rtol=0
    )


def test_saving_a_loaded_mini_again_changes_nothing(mini_file, tmp_path):
    path, _ = mini_file
    loaded = models.load(str(path), device="cpu")
    seen = loaded.model.token_embedding.weight.abs().sum(dim=1).nonzero().flatten()
    models.save_mini(loaded.model, seen, tmp_path / "again.safetensors")
    again = models.load_mini(tmp_path / "again.safetensors", device="cpu")
    assert again.fingerprint == loaded.fingerprint
    assert again.name == "mini" and again.image_size == 64
    assert (again.embed_dim, again.ctx_dim) == (256, 192)
    assert not any(p.requires_grad for p in again.model.parameters())


def test_fingerprint_sees_every_weight(mini_file):
    path, _ = mini_file
    loaded = models.load_mini(path, device="cpu")
    for name in ("logit_scale", "visual.bn1.running_mean", "positional_embedding"):
        value = loaded.model.state_dict()[name]
        kept = value.clone()
        value.view(-1)[0] += 1e-3
        assert models.weights_fingerprint(loaded.model) != loaded.fingerprint, name
        value.copy_(kept)
    assert models.weights_fingerprint(loaded.model) == loaded.fingerprint


def test_unseen_token_warns_once_and_names_it(mini_file):
    loaded = models.load_mini(mini_file[0], device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.encode_text(TEXTS)
    with pytest.warns(UserWarning, match="zebra"):
        loaded.encode_text(["a photo of a zebra."])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.encode_text(["a zebra"])
    weight = loaded.model.token_embedding.weight
    assert not weight[open_clip.tokenize("zebra")[0, 1]].any()


def test_missing_and_damaged_files_say_how_to_rebuild(mini_file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*data/miniclip/train.py"):
        models.load_mini(tmp_path / "nowhere.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(mini_file[0].read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"damaged.*data/miniclip/train.py"):
        models.load_mini(damaged)


def test_float16_overflow_is_refused(tmp_path):
    model = models.build_mini(0)
    with torch.no_grad():
        model.text_projection[0, 0] = 1e6
    with pytest.raises(ValueError, match="text_projection"):
        models.save_mini(model, [320], tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_build_mini_depends_on_its_seed_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b = models.build_mini(1), models.build_mini(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.text_projection, models.build_mini(1).text_projection)
    assert not torch.equal(a.text_projection, b.text_projection)


# --- OpenAI's own code ---------------------------------------------------------------------------


def _openai_model_module():
    """``clip.model`` of the openai-clip package, without its loader (which needs pkg_resources)."""
    spec = importlib.util.find_spec("clip")
    if spec is None:
        pytest.skip("openai-clip is not installed")
    file = Path(spec.origin).with_name("model.py")
    spec = importlib.util.spec_from_file_location("openai_clip_model", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_openai_code_gives_the_same_features(mini_file, views):
    loaded = models.load_mini(mini_file[0], device="cpu")
    state = openai_state_dict(loaded.model)
    theirs = _openai_model_module().build_model(state).float()
    with torch.no_grad():
        x = normalize(views / 255, loaded.mean, loaded.std)
        images = F.normalize(theirs.encode_image(x), dim=-1)
        texts = F.normalize(theirs.encode_text(open_clip.tokenize(TEXTS)), dim=-1)
    torch.testing.assert_close(loaded.encode_views(views), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(loaded.encode_text(TEXTS), texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(loaded.logit_scale, theirs.logit_scale.exp().detach())


def openai_state_dict(model):
    """The state dict under OpenAI's names, as their package's ``build_model`` takes it."""
    return {
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
    }


# --- local checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["state_dict", "nested", "safetensors", "torchscript"])
def test_local_checkpoints_load(mini_file, views, tmp_path, kind):
    loaded = models.load_mini(mini_file[0], device="cpu")
    state = openai_state_dict(loaded.model)
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "torchscript":
        _save_torchscript(state, path)
    elif kind == "nested":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    else:
        torch.save(state, path)
    again = models.load(str(path), device="cpu")
    assert again.fingerprint == loaded.fingerprint
    assert any(isinstance(m, QuickGELU) for m in again.model.modules())
    torch.testing.assert_close(again.encode_views(views), loaded.encode_views(views))
    torch.testing.assert_close(again.encode_text(TEXTS), loaded.encode_text(TEXTS))


def _save_torchscript(state, path):
    """An archive like OpenAI's: a scripted module with the weights and three integer buffers."""
    root = torch.nn.Module()
    extra = {"input_resolution": 64, "context_length": 77, "vocab_size": 49408}
    for key, value in {**state, **{k: torch.tensor(v) for k, v in extra.items()}}.items():
        *parents, leaf = key.split(".")
        module = root
        for name in parents:
            if name not in module._modules:
                module.add_module(name, torch.nn.Module())
            module = module._modules[name]
        module.register_buffer(leaf, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(root).save(str(path))


def test_float32_checkpoints_are_not_rounded(tmp_path):
    model = models.build_mini(4)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    loaded = models.load(str(tmp_path / "w.pt"), device="cpu")
    assert torch.equal(loaded.model.visual.conv1.weight, model.visual.conv1.weight)


def test_loading_runs_no_code_from_the_file(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.mkdir, (tmp_path / "pwned",))

    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        models.load(str(tmp_path / "evil.pt"), device="cpu")
    assert not (tmp_path / "pwned").exists()


def test_a_file_of_something_else_is_named(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt is not a checkpoint of the OpenAI family"):
        models.load(str(tmp_path / "other.pt"), device="cpu")


# --- open_clip's registry ------------------------------------------------------------------------


@pytest.fixture
def tiny_registry(monkeypatch, mini_file):
    """An architecture "tiny" with two tags in open_clip's registry, served from a local file."""
    loaded = models.load_mini(mini_file[0], device="cpu")
    weights = mini_file[0].with_name("tiny.pt")
    if not weights.exists():
        torch.save(loaded.model.state_dict(), weights)
    config = {k: v for k, v in models.MINI_CONFIG.items() if k != "quick_gelu"}
    tags = {tag: {"url": "local", "quick_gelu": tag == "openai"} for tag in ("openai", "laion")}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)
    monkeypatch.setattr(
        open_clip.factory, "download_pretrained", lambda *args, **kwargs: str(weights)
    )
    return loaded, weights


def test_tags_decide_the_activation(tiny_registry):
    expected, weights = tiny_registry
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # open_clip warns when activation and weights disagree
        quick = models.load("tiny@openai", device="cpu")
        plain = models.load("tiny@laion", device="cpu")
    assert any(isinstance(m, QuickGELU) for m in quick.model.modules())
    assert not any(isinstance(m, QuickGELU) for m in plain.model.modules())
    torch.testing.assert_close(quick.encode_text(TEXTS), expected.encode_text(TEXTS))
    assert (plain.encode_text(TEXTS) - expected.encode_text(TEXTS)).abs().max() > 1e-4
    named = models.load(f"tiny@{weights}", device="cpu")
    assert not any(isinstance(m, QuickGELU) for m in named.model.modules())


@pytest.mark.parametrize("name", [*models.OPENAI_MODELS, "ViT-B-16"])
def test_openai_names_get_quick_gelu(monkeypatch, name):
    built = {}
    create_model = open_clip.create_model

    def create(architecture, pretrained, force_quick_gelu):
        assert pretrained == "openai"
        with torch.device("meta"):  # the architecture without its gigabyte of weights
            built["model"] = create_model(
                architecture, force_quick_gelu=force_quick_gelu, device="meta"
            )
        raise RuntimeError("no network in tests")

    monkeypatch.setattr(open_clip, "create_model", create)
    with pytest.raises(RuntimeError, match="without a network use 'mini'"):
        models.load(name, device="cpu")
    mlp = [m for n, m in built["model"].named_modules() if n.endswith("mlp.gelu")]
    assert mlp and all(isinstance(m, QuickGELU) for m in mlp)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown model 'RN5O'.*mini.*RN50.*ViT-L/14"):
        models.load("RN5O")
    with pytest.raises(ValueError, match=r"known tags: .*openai"):
        models.load("RN50@nonsense")
    with pytest.raises(ValueError, match="there is no file"):
        models.load("no/such/file.pt")


def test_text_towers_that_are_not_causal_are_refused():
    config = {
        "embed_dim": 8,
        "vision_cfg": {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32},
        "text_cfg": {
            "width": 64,
            "heads": 1,
            "layers": 1,
            "vocab_size": 10,
            "no_causal_mask": True,
            "pool_type": "first",
        },
    }
    model = open_clip.model.CustomTextCLIP(**config)
    with pytest.raises(ValueError, match="causal text tower"):
        models.text_tower(model)
