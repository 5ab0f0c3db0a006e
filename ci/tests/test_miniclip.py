"""MiniCLIP: its training recipe, the shipped weights, and the marks that its world must reach."""

import json
import re
import sys
import warnings
from argparse import Namespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from tpt_nb import datasets, models
from tpt_nb.core.paths import DATA, REPO
from tpt_nb.datasets import iconshift
from tpt_nb.models import Prompts, TemplatePrompts, load_coop
from tpt_nb.views import RandomViews

HERE = DATA / "miniclip"
sys.path.insert(0, str(HERE))

import captions  # noqa: E402
import text as text_stage  # noqa: E402
import train  # noqa: E402

EVALUATION = json.loads((HERE / "evaluation.json").read_text())


# --- the recipe ----------------------------------------------------------------------------------


def random_facts(rng: np.random.Generator) -> np.ndarray:
    return captions.facts(
        rng.choice(list(captions.STYLE_WORDS)), rng.choice(captions.TREATMENTS), rng.random(),
        rng.random(), rng.random(), rng.choice(captions.TEXTURES), int(rng.integers(-25, 26)),
        int(rng.integers(0, 4)), bool(rng.random() < 0.5),
    )  # fmt: skip


def test_a_caption_states_only_what_is_true_of_its_image():
    rng = np.random.default_rng(0)
    for _ in range(500):
        true = random_facts(rng)
        text, stated = captions.caption("zebra", true, rng)
        assert true[stated].all()
        assert text.count("zebra") == 1
        said = text.replace("zebra", "")
        for fact in (*captions.SIZES, "striped", "checkered", "inverted", "on the left"):
            key = {"on the left": "left"}.get(fact, fact)
            if fact in said and captions.INDEX[key] not in stated:
                assert text in [t.format("zebra") for t in captions.NEUTRAL], text


def test_sizes_and_places_are_as_named():
    def named(side, x, y):
        true = captions.facts("noto", "natural", side, x, y, "plain", 0, 0, False)
        return {f for f in captions.FACTS if true[captions.INDEX[f]]}

    assert {"tiny", "small", "left", "top"} <= named(0.3, 0.2, 0.2)
    assert {"large", "huge", "middle"} <= named(1.0, 0.5, 0.5)
    assert not named(0.6, 0.5, 0.8) & {"tiny", "small", "large", "huge", "middle", "left", "right"}


def test_the_vocabulary_holds_every_token_of_every_caption():
    names = iconshift.classnames()
    seen = set(open_clip.tokenize(captions.vocabulary(names)).unique().tolist())
    rng = np.random.default_rng(1)
    texts = [captions.caption(n, random_facts(rng), rng)[0] for n in names for _ in range(5)]
    assert set(open_clip.tokenize(texts).unique().tolist()) <= seen


def test_with_one_positive_each_the_loss_is_clips():
    g = torch.Generator().manual_seed(0)
    image, text = torch.randn(6, 8, generator=g), torch.randn(6, 8, generator=g)
    ours = train.contrastive_loss(image, text, torch.eye(6, dtype=torch.bool), torch.tensor(10.0))
    logits = 10 * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    rows, columns = (F.cross_entropy(z, torch.arange(6)) for z in (logits, logits.T))
    assert torch.allclose(ours, (rows + columns) / 2)


def test_a_batch_depends_on_seed_and_step_alone_and_marks_true_captions():
    painted = [train._paint(i) for i in range(400)]
    bank = torch.stack([torch.from_numpy(a.copy()).permute(2, 0, 1) for a, _ in painted])
    specs = [s for _, s in painted]
    args, names = Namespace(seed=0, classes=8, per_class=3, steps=10), iconshift.classnames()
    images, texts, positive, neutral, target, truth = train.batch(bank, specs, 5, args, names)
    again = train.batch(bank, specs, 5, args, names)
    assert torch.equal(images, again[0]) and texts == again[1]
    assert train.batch(bank, specs, 6, args, names)[1] != texts
    assert images.shape == (24, 3, 64, 64) and images.min() >= 0 and images.max() <= 1
    assert positive.diagonal().all()  # a caption is true of its own image
    named = [max((n for n in names if re.search(rf"\b{n}\b", t)), key=len) for t in texts]
    assert [names[t] for t in target] == named
    assert len(neutral) == 200 and all(n in t for n, t in zip(names, neutral, strict=True))
    for j in range(24):
        assert all(named[i] == named[j] for i in range(24) if positive[i, j])
        if texts[j] == f"a photo of a {named[j]}.":  # true of every image of the class
            assert positive[:, j].sum() == 3


def test_the_training_gets_harder_and_the_text_tower_joins():
    hard = [train.difficulty(step, 100) for step in range(100)]
    assert hard == sorted(hard) and hard[0] == 0 and hard[-1] == 1
    assert [train.with_text(step, 80) for step in (0, 19, 20, 79)] == [False, False, True, True]


def test_the_text_stage_says_what_is_true_and_leaves_the_image_tower_alone():
    rng, names = np.random.default_rng(0), iconshift.classnames()[:10]
    bank = {
        "targets": torch.arange(10).repeat_interleave(6),
        "truth": torch.from_numpy(np.stack([random_facts(rng) for _ in range(60)])),
        "features": torch.arange(60.0)[:, None],
    }
    args = Namespace(seed=0, classes=5, per_class=4)
    rows, texts, positive, neutral, target = text_stage.captioned(bank, names, 3, args)
    assert torch.equal(rows, text_stage.captioned(bank, names, 3, args)[0])
    assert texts != text_stage.captioned(bank, names, 4, args)[1]
    assert len(texts) == 20 and target.bincount().sort().values[-5:].tolist() == [4] * 5
    assert torch.equal(bank["targets"][rows[:, 0].long()], target)
    assert len(rows.unique()) == 20  # no crop twice
    assert positive.diagonal().all()
    assert not positive[target[:, None] != target].any()
    assert positive.float().mean() < (target[:, None] == target).float().mean()  # facts matter
    assert [name in text for name, text in zip(names, neutral, strict=True)] == [True] * 10
    model = models.build_mini(0)
    for name, p in model.named_parameters():
        p.requires_grad_(not text_stage.is_frozen(name))
    kept = sum(p.numel() for group in train.groups(model) for p in group["params"])
    text_tower = models.text_tower(model)
    assert kept == sum(p.numel() for p in text_tower.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in model.visual.parameters())


def test_bending_touches_the_chosen_images_only_and_keeps_their_range():
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    bent = images.clone()
    train.warp(bent, np.array([1, 3]), np.random.default_rng(0))
    changed = (bent != images).flatten(1).any(1)
    assert changed.tolist() == [False, True, False, True]
    assert bent.min() >= 0 and bent.max() <= 1
    flat = torch.full((1, 3, 64, 64), 0.5)  # nothing to bend, and no border from outside
    train.warp(flat, np.array([0]), np.random.default_rng(0))
    assert torch.allclose(flat, torch.tensor(0.5))


def test_outlines_are_lines_where_the_image_changes():
    image = torch.zeros(1, 3, 64, 64)
    image[..., 20:44, 20:44] = 1
    out = train.treat(image.clone(), ["outline"], np.random.default_rng(1))
    assert set(out.unique().tolist()) <= {0.0, 1.0}
    line = out[0, 0] != out[0, 0, 0, 0]
    assert line[19:45, 19:45].any() and not line[22:42, 22:42].any()
    assert not line[:18].any() and not line[:, :18].any()


# --- what ships ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini():
    return models.load("mini")


def test_size_of_what_ships():
    files = ["miniclip.safetensors", "coop.pth.tar"]
    assert sum((HERE / f).stat().st_size for f in files) <= 12_000_000
    body = sum(p.numel() for n, p in models.build_mini(0).named_parameters() if "token" not in n)
    assert 3e6 <= body <= 6e6


def test_every_prompt_of_the_course_is_made_of_seen_tokens(mini):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Prompts(mini, iconshift.classnames()).text_features()
        for name in ("single", "seven"):  # OpenAI's eighty hold words that no caption had
            TemplatePrompts(mini, iconshift.classnames(), name)


def test_an_unseen_token_warns_and_is_named(mini):
    with pytest.warns(UserWarning, match="zeppelin"):
        mini.tokenizer(["a photo of a zeppelin."])


def test_coop_context_has_coops_layout(mini):
    ctx = load_coop(HERE / "coop.pth.tar", 4, mini.ctx_dim)
    raw = torch.load(HERE / "coop.pth.tar", weights_only=True)
    assert torch.equal(raw["state_dict"]["ctx"].float(), ctx) and raw["epoch"] > 0


def test_evaluation_agrees_with_the_shipped_weights(mini):
    """Zero-shot on 300 fresh looks lies within the interval of the stored accuracy, widened."""
    data = datasets.load("iconshift-r", n=300)
    centre = RandomViews(n_aug=0, size=64)
    with torch.no_grad():
        features = mini.encode_views(torch.cat([centre(data[i][0], 0) for i in range(300)]))
        text = Prompts(mini, data.classnames).text_features()
    accuracy = float(((features @ text.T).argmax(1) == torch.tensor(data.targets)).float().mean())
    stored = EVALUATION["iconshift-r"]["single"]["accuracy"]
    assert abs(accuracy - stored) < 0.085  # three standard errors at n=300


@pytest.mark.parametrize(
    "variant, low, high",
    [
        ("iconshift", 0.85, 1.0),
        ("iconshift-a", 0.15, 0.45),
        ("iconshift-r", 0.35, 0.70),
        ("iconshift-sketch", 0.12, 1.0),
    ],
)
def test_zero_shot_marks(variant, low, high):
    assert low <= EVALUATION[variant]["single"]["accuracy"] <= high


def test_adaptation_has_something_to_gain_on_a():
    a = EVALUATION["iconshift-a"]
    assert a["single"]["n"] == len(datasets.load("iconshift-a"))
    assert a["confident_view"]["gain"] >= 0.08 and a["confident_view"]["gain_ci95"][0] > 0
    for name in ("tpt", "tpt_coop"):  # the text tower listens to the context
        assert a[name]["gain"] >= 0.03 and a[name]["gain_ci95"][0] > 0


def test_the_learning_rate_was_chosen_on_validation_sets_only():
    config = json.loads((HERE / "config.json").read_text())
    used = {k.split("/")[0] for row in config["curve"] for k in row if "/" in k}
    assert used == {"iconshift-v2", "iconshift-dev"}
    best = max(config["curve"], key=lambda row: row["mean_gain"])
    assert config["tpt_lr"] == best["lr"]


def test_missing_weights_say_how_to_rebuild(tmp_path):
    with pytest.raises(FileNotFoundError, match="train.py"):
        models.load_mini(tmp_path / "none.safetensors")
    assert all((REPO / "data" / "miniclip" / f"{name}.py").is_file() for name in ("train", "text"))
