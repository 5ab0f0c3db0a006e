import os
import shutil
import warnings

import open_clip
import pytest
import torch
import torch.nn.functional as F

from tpt_nb import models
from tpt_nb.models import (
    Prompts,
    TemplatePrompts,
    load_coop,
    save_coop,
    template_features,
    train_coop,
)

NAMES = ["cat", "hot air balloon", "fire_engine", "St. Bernard", "U.S.", "X-ray of a b c", "cat"]
POSITIONS = ["end", "middle", "front"]


def near(ctx, *batch, seed=0):
    """Contexts close to ``ctx``, float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*batch, *ctx.shape, generator=generator, dtype=torch.float64)
    return ctx.double() + 0.05 * noise


def clean(name):
    return name.replace("_", " ")


# --- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
def test_fast_features_equal_all_77_tokens(mini64, position, class_specific):
    prompts = Prompts(mini64, NAMES, class_token_position=position, class_specific=class_specific)
    ctx = near(prompts.ctx, 2).requires_grad_(True)
    fast, paper = prompts.text_features(ctx), prompts.text_features(ctx, exact="paper")
    assert fast.shape == (2, len(NAMES), mini64.embed_dim)
    torch.testing.assert_close(fast, paper, atol=1e-12, rtol=0)
    cotangent = torch.randn_like(fast)
    (g_fast,) = torch.autograd.grad(fast, ctx, cotangent)
    (g_paper,) = torch.autograd.grad(paper, ctx, cotangent)
    assert g_fast.abs().min() > 0
    torch.testing.assert_close(g_fast, g_paper, atol=1e-11, rtol=0)


@pytest.mark.parametrize("exact", ["fast", "paper"])
@pytest.mark.parametrize(
    "position, sentence",
    [
        ("end", "a photo of a {}."),
        ("middle", "a photo {} of a."),
        ("front", "{} a photo of a."),
    ],
)
def test_words_as_context_give_the_features_of_the_sentence(mini64, exact, position, sentence):
    names = [name for name in NAMES if name != "U.S."]  # its own period would fuse with the last
    prompts = Prompts(mini64, names, "a_photo_of_a", class_token_position=position)
    expected = mini64.encode_text([sentence.format(clean(name)) for name in names])
    torch.testing.assert_close(prompts.text_features(exact=exact), expected, atol=1e-12, rtol=0)


def as_the_originals(clip, names, ctx_init):
    """PromptLearner of TPT and of the study (position "middle", split_idx), word by word."""
    ctx_init = ctx_init.replace("_", " ")
    split_idx = ctx_init.split(" ").index("[CLS]")
    ctx_init = ctx_init.replace("[CLS] ", "")
    n_ctx = len(ctx_init.split(" "))
    model, tokenizer = clip.model, open_clip.SimpleTokenizer()
    ctx = model.token_embedding(open_clip.tokenize(ctx_init))[0, 1 : 1 + n_ctx]
    rows = []
    tokenized = open_clip.tokenize([f"{ctx_init} {name}." for name in names])
    for i, name in enumerate(names):
        embedding = model.token_embedding(tokenized)[i]
        prefix, suffix = embedding[:1], embedding[1 + n_ctx :]
        name_len = len(tokenizer.encode(name))
        parts = [prefix, ctx[:split_idx], suffix[:name_len], ctx[split_idx:], suffix[name_len:]]
        rows.append(torch.cat(parts))
    x = torch.stack(rows) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    x = x[torch.arange(len(x)), tokenized.argmax(dim=-1)] @ model.text_projection
    return F.normalize(x, dim=-1)


@pytest.mark.parametrize("exact", ["fast", "paper"])
@pytest.mark.parametrize(
    "ctx_init", ["a_photo_of_a_[CLS]_on_black", "[CLS] seen in a photo", "a [CLS] photo"]
)
def test_cls_in_ctx_init_splits_the_context_as_the_originals_do(mini64, ctx_init, exact):
    names = [name for name in map(clean, NAMES) if name != "U.S."]
    prompts = Prompts(mini64, names, ctx_init)
    expected = as_the_originals(mini64, names, ctx_init)
    torch.testing.assert_close(prompts.text_features(exact=exact), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("class_specific", [False, True])
def test_a_context_around_cls_is_differentiated_alike_on_both_ways(mini64, class_specific):
    prompts = Prompts(mini64, NAMES, "a photo of a [CLS] now", class_specific=class_specific)
    assert prompts.M == 5 and not prompts.has_jacobian
    ctx = near(prompts.ctx, 2).requires_grad_(True)
    fast, paper = prompts.text_features(ctx), prompts.text_features(ctx, exact="paper")
    torch.testing.assert_close(fast, paper, atol=1e-12, rtol=0)
    cotangent = torch.randn_like(fast)
    (g_fast,) = torch.autograd.grad(fast, ctx, cotangent)
    (g_paper,) = torch.autograd.grad(paper, ctx, cotangent)
    assert g_fast.abs().amin() > 0  # the words behind the name count too
    torch.testing.assert_close(g_fast, g_paper, atol=1e-11, rtol=0)


def test_cls_at_the_end_and_start_are_other_words_for_end_and_front(mini64):
    end = Prompts(mini64, NAMES, "a photo of a [CLS]")
    assert end.has_jacobian
    assert torch.equal(end.text_features(), Prompts(mini64, NAMES).text_features())
    front = Prompts(mini64, NAMES, class_token_position="front").text_features()
    for other in ({"class_token_position": "start"}, {"ctx_init": "[CLS] a photo of a"}):
        assert torch.equal(Prompts(mini64, NAMES, **other).text_features(), front)


def test_a_batch_of_contexts_equals_one_by_one(mini64):
    prompts = Prompts(mini64, NAMES)
    ctx = near(prompts.ctx, 3)
    batch = prompts.text_features(ctx)
    for i in range(3):
        torch.testing.assert_close(batch[i], prompts.text_features(ctx[i]), atol=1e-12, rtol=0)
    shared = Prompts(mini64, NAMES, class_specific=True).text_features(
        ctx[:, None].expand(-1, len(NAMES), -1, -1)
    )
    torch.testing.assert_close(shared, batch, atol=1e-12, rtol=0)


def test_gradient_equals_finite_differences(mini64):
    prompts = Prompts(mini64, NAMES[:3])
    ctx = prompts.ctx.double().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, mini64.embed_dim, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((prompts.text_features(ctx) * weight).sum(), ctx)
    for _ in range(5):
        step = 1e-6 * torch.randn(ctx.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up = (prompts.text_features(ctx + step) * weight).sum()
            down = (prompts.text_features(ctx - step) * weight).sum()
        torch.testing.assert_close((up - down) / 2, (gradient * step).sum(), rtol=1e-6, atol=1e-12)


def test_batched_vjp_runs_without_falling_back(mini64):
    prompts = Prompts(mini64, NAMES)
    ctx = prompts.ctx.double().requires_grad_(True)
    text = prompts.text_features(ctx)
    cotangents = torch.randn(4, *text.shape, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where vmap falls back to a slow loop
        (batched,) = torch.autograd.grad(
            text, ctx, cotangents, is_grads_batched=True, retain_graph=True
        )
    for i in range(4):
        (one,) = torch.autograd.grad(text, ctx, cotangents[i], retain_graph=True)
        torch.testing.assert_close(batched[i], one, atol=1e-11, rtol=0)


def test_features_are_unit_norm_and_in_the_order_of_the_classes(mini):
    prompts = Prompts(mini, NAMES)
    features = prompts.text_features()
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(NAMES)))
    torch.testing.assert_close(features[0], features[6])  # "cat" twice is no error
    backwards = Prompts(mini, NAMES[::-1]).text_features()
    torch.testing.assert_close(backwards.flip(0), features, atol=1e-5, rtol=0)
    one = Prompts(mini, ["hot air balloon"]).text_features()
    torch.testing.assert_close(one[0], features[1], atol=1e-5, rtol=0)


def test_other_towers_of_the_family_work(mini64):
    """A text tower of another depth, with layer scale, and OpenAI's separate ViT image tower."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32},
        "text_cfg": {"width": 64, "heads": 2, "layers": 2, "ls_init_value": 0.5},
    }
    torch.manual_seed(0)
    for cls in (open_clip.CLIP, open_clip.model.CustomTextCLIP):
        model = models.wrap(cls(**config).double(), "other", device="cpu")
        prompts = Prompts(model, NAMES)
        assert (model.embed_dim, model.ctx_dim) == (32, 64)
        fast, paper = prompts.text_features(), prompts.text_features(exact="paper")
        torch.testing.assert_close(fast, paper, atol=1e-12, rtol=0)


# --- construction --------------------------------------------------------------------------------


def test_initial_context(mini):
    prompts = Prompts(mini, NAMES)
    tokens = open_clip.tokenize("a photo of a")[0, 1:5]
    assert torch.equal(prompts.ctx, mini.model.token_embedding.weight[tokens])
    random = Prompts(mini, NAMES, ctx_init=None, n_ctx=16, seed=1)
    assert random.ctx.shape == (16, mini.ctx_dim) and random.M == 16
    assert random.ctx.std() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(random.ctx, Prompts(mini, NAMES, None, 16, seed=1).ctx)
    assert not torch.equal(random.ctx, Prompts(mini, NAMES, None, 16, seed=2).ctx)
    specific = Prompts(mini, NAMES, class_specific=True)
    assert specific.ctx.shape == (len(NAMES), 4, mini.ctx_dim)
    assert len(NAMES) == prompts.C and prompts.classnames == NAMES


@pytest.mark.parametrize(
    "names, options, message",
    [
        ([], {}, "no class names"),
        (["cat", " _"], {}, r"class names \[1\] are empty"),
        (["cat"], {"n_ctx": 16}, "has 4 tokens but n_ctx is 16"),
        (["cat"], {"ctx_init": None}, "n_ctx is needed"),
        (["cat"], {"ctx_init": None, "n_ctx": 0}, "at least one"),
        (["cat"], {"class_token_position": "back"}, "allowed: end, middle, front"),
        (["cat"], {"ctx_init": "a [CLS] [CLS]"}, "may be there once"),
        (
            ["cat"],
            {"ctx_init": "a [CLS]", "class_token_position": "front"},
            "left at end or middle",
        ),
        (["cat"], {"ctx_init": "a [CLS] now", "n_ctx": 4}, "has 2 tokens but n_ctx is 4"),
        (["dog " * 80], {}, "tokens, the model takes 77"),
        (["cat"], {"ctx_init": None, "n_ctx": 74}, "has 78 tokens"),
    ],
)
@pytest.mark.filterwarnings("ignore:a text is longer")
def test_bad_prompts_are_named(mini, names, options, message):
    with pytest.raises(ValueError, match=message):
        Prompts(mini, names, **options)


@pytest.mark.parametrize("shape", [(5, 192), (4, 191), (1, 1, 4, 192), (192,)])
def test_contexts_of_another_shape_are_named(mini, shape):
    with pytest.raises(ValueError, match=r"expected \[4, 192\]"):
        Prompts(mini, NAMES).text_features(torch.zeros(shape))


def test_unseen_token_of_a_class_name_warns(mini):
    tokens = open_clip.tokenize(["a photo of a cat."]).unique()
    known = models.wrap(mini.model, "mini", device="cpu", seen_tokens=tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Prompts(known, ["cat"])
    with pytest.warns(UserWarning, match="'zebra'.*training captions of mini"):
        Prompts(known, ["cat", "zebra"])


# --- templates -----------------------------------------------------------------------------------


def test_template_ensemble(mini64):
    templates = ["a photo of a {}.", "art of the {}."]
    expected = sum(mini64.encode_text([t.format(clean(name)) for name in NAMES]) for t in templates)
    features = template_features(mini64, NAMES, templates)
    torch.testing.assert_close(features, F.normalize(expected, dim=-1), atol=1e-12, rtol=0)
    single = template_features(mini64, NAMES[:3], "single")
    torch.testing.assert_close(single, Prompts(mini64, NAMES[:3]).text_features())
    assert len(models.template_sentences("seven")) == 7
    fixed = TemplatePrompts(mini64, NAMES, templates)
    assert torch.equal(fixed.text_features(), features) and fixed.ctx is None


def test_bad_templates_are_named(mini):
    with pytest.raises(ValueError, match="Known: single, seven, eighty"):
        template_features(mini, NAMES, "ninety")
    with pytest.raises(ValueError, match="a photo"):
        template_features(mini, NAMES, ["a photo"])


# --- CoOp ----------------------------------------------------------------------------------------


def test_coop_round_trip(mini, tmp_path):
    ctx = 0.1 * torch.randn(4, mini.ctx_dim)
    save_coop(tmp_path / "model.pth.tar-50", ctx, epoch=50)
    raw = torch.load(tmp_path / "model.pth.tar-50", weights_only=True)
    assert raw["state_dict"]["ctx"].dtype == torch.float16 and raw["epoch"] == 50
    loaded = Prompts(mini, NAMES, coop=tmp_path / "model.pth.tar-50").ctx
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded, ctx, atol=1e-3, rtol=0)


class Calls:
    """Pickled so that a careless reader calls ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.how = (function, arguments)

    def __reduce__(self):
        return self.how


def test_a_checkpoint_of_coops_trainer_loads_and_runs_nothing(mini, tmp_path):
    """Theirs also hold token buffers of other classes, the optimiser and a scheduler object."""

    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    ctx = torch.randn(4, 192).half()
    checkpoint = {
        "state_dict": {"ctx": ctx, "token_prefix": torch.zeros(1000, 1, 192)},
        "epoch": 50,
        "optimizer": optimizer.state_dict(),
        "scheduler": {
            "successor": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50),
            "last_epoch": 50,
        },
        "evil": Calls(shutil.copytree, str(tmp_path), str(tmp_path / "pwned")),
    }
    torch.save(checkpoint, tmp_path / "model.pth.tar-50")
    assert torch.equal(load_coop(tmp_path / "model.pth.tar-50", 4, 192), ctx.float())
    checkpoint["evil"] = Calls(os.mkdir, str(tmp_path / "pwned"))  # cannot even be made harmless
    torch.save(checkpoint, tmp_path / "worse")
    with pytest.raises(ValueError, match=r"worse holds objects .* models.save_coop"):
        load_coop(tmp_path / "worse", 4, 192)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content, options, message",
    [
        ({"state_dict": {"ctx": torch.zeros(16, 192)}}, {}, "M=16 context vectors; pass n_ctx=16"),
        ({"state_dict": {"ctx": torch.zeros(4, 512)}}, {}, "of width 512, this model has 192"),
        ({"state_dict": {"ctx": torch.zeros(2, 4, 192)}}, {}, "set class_specific=True"),
        (
            {"state_dict": {"ctx": torch.zeros(4, 192)}},
            {"class_specific": True},
            "set class_specific=False",
        ),
        (
            {"state_dict": {"ctx": torch.zeros(2, 4, 192)}},
            {"class_specific": True},
            "trained for 2 classes",
        ),
        ({"ctx": torch.zeros(4, 192)}, {}, r"expected state_dict\['ctx'\], found \['ctx'\]"),
        ({"state_dict": {"ctx": "x"}}, {}, "not laid out"),
        (torch.zeros(4, 192), {}, "found Tensor"),
    ],
)
def test_other_coop_files_are_named(mini, tmp_path, content, options, message):
    torch.save(content, tmp_path / "coop.pth")
    with pytest.raises(ValueError, match=message):
        Prompts(mini, NAMES, coop=tmp_path / "coop.pth", **options)


def test_missing_and_damaged_coop_files(mini, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        Prompts(mini, NAMES, coop=tmp_path / "nowhere.pth")
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"broken.pth is no readable torch checkpoint"):
        Prompts(mini, NAMES, coop=tmp_path / "broken.pth")


def test_coop_with_the_right_n_ctx_and_per_class(mini, tmp_path):
    save_coop(tmp_path / "m16.pth", torch.randn(16, 192), 1)
    assert Prompts(mini, NAMES, coop=tmp_path / "m16.pth", n_ctx=16).M == 16
    save_coop(tmp_path / "csc.pth", torch.randn(len(NAMES), 4, 192), 1)
    specific = Prompts(mini, NAMES, coop=tmp_path / "csc.pth", class_specific=True)
    assert specific.ctx.shape == (len(NAMES), 4, 192)


@pytest.fixture(scope="module")
def coop_world(mini):
    """Image features scattered around the text features of a hidden context."""
    names = ["cat", "dog", "bus", "hot air balloon"]
    prompts = Prompts(mini, names)
    generator = torch.Generator().manual_seed(0)
    hidden = prompts.ctx + 0.3 * torch.randn(prompts.ctx.shape, generator=generator)
    targets = torch.arange(64) % 4
    centres = prompts.text_features(hidden)[targets]
    noise = torch.randn(64, 3, mini.embed_dim, generator=generator)
    return names, F.normalize(centres[:, None] + 0.02 * noise, dim=-1), targets


def cross_entropy(clip, names, ctx, features, targets):
    with torch.no_grad():
        text = Prompts(clip, names).text_features(ctx)
        return F.cross_entropy(clip.logit_scale * features[:, 0] @ text.T, targets).item()


def test_coop_training_lowers_the_loss_and_repeats(mini, coop_world):
    names, features, targets = coop_world
    state = torch.get_rng_state()
    ctx = train_coop(mini, features, targets, names, epochs=8, batch=16, progress=False)
    start = Prompts(mini, names).ctx
    before = cross_entropy(mini, names, start, features, targets)
    after = cross_entropy(mini, names, ctx, features, targets)
    assert after < 0.8 * before
    again = train_coop(mini, features, targets, names, epochs=8, batch=16, progress=False)
    assert torch.equal(ctx, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert ctx.dtype == torch.float32 and not ctx.requires_grad


def test_the_first_coop_epoch_is_a_warm_up(mini, coop_world):
    names, features, targets = coop_world
    start = Prompts(mini, names).ctx
    warm = train_coop(mini, features[:, 0], targets, names, epochs=1, progress=False)
    more = train_coop(mini, features[:, 0], targets, names, epochs=2, progress=False)
    assert 0 < (warm - start).abs().max() < 0.1 * (more - start).abs().max()


def test_bad_coop_training_data_is_named(mini, coop_world):
    names, features, targets = coop_world
    with pytest.raises(ValueError, match="targets span 0..3, but there are 2"):
        train_coop(mini, features, targets, names[:2], progress=False)
    with pytest.raises(ValueError, match=r"expected \[N,D\] or \[N,A,D\]"):
        train_coop(mini, features[:5], targets, names, progress=False)
