"""retrieval and database: every step of RA-TTA against a second way to compute it."""

import hashlib
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import wasserstein_distance
from test_runs import CLASSES, PER_CLASS, world  # noqa: F401 (a fixture)

from tpt_nb import __main__ as cli
from tpt_nb import datasets, methods, models
from tpt_nb.core.images import read_rgb
from tpt_nb.datasets import iconshift
from tpt_nb.methods import ra_tta
from tpt_nb.methods.ra_tta import Options
from tpt_nb.methods.ra_tta.build import FIRST
from tpt_nb.models import Prompts, template_sentences
from tpt_nb.runs import run
from tpt_nb.views import center_view


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def masses(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)


# --- optimal transport ---------------------------------------------------------------------------


def test_exact_plan_by_hand():
    x, a = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    y, b = torch.tensor([0.25, 1.0]), torch.tensor([0.75, 0.25])
    plan = ra_tta.monotone_plan(x, a, y, b)
    # 0 -> 0.25 moves 0.5; of the half at 1, 0.25 goes down to 0.25 and 0.25 stays
    assert plan.tolist() == [[0.25, 0.25], [0.5, 0.0]]
    assert float((plan * (x[:, None] - y).abs()).sum()) == 0.25 * 0.75 + 0.5 * 0.25


@pytest.mark.parametrize("seed", range(6))
def test_exact_plan_is_the_closed_form_in_one_dimension(seed):
    x, a = unit(3, 17, seed=seed).double(), masses(3, 17, seed=seed)
    y, b = unit(3, 9, seed=seed + 50).double(), masses(3, 9, seed=seed + 50)
    y[0, :4] = x[0, :4]  # equal places
    plan = ra_tta.monotone_plan(x, a, y, b)
    assert (plan >= 0).all()
    assert torch.allclose(plan.sum(-1), a) and torch.allclose(plan.sum(-2), b)
    cost = (x[..., :, None] - y[..., None, :]).abs()
    for i in range(3):
        expected = wasserstein_distance(x[i], y[i], a[i], b[i])
        assert float((plan[i] * cost[i]).sum()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("reg", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("tol", [1e-2, 1e-9])
def test_transport_agrees_with_pot(reg, tol):
    ot = pytest.importorskip("ot")
    x, a = unit(4, 21).double(), masses(4, 21)
    y, b = unit(4, 8, seed=1).double(), masses(4, 8, seed=1)
    cost = (x[..., :, None] - y[..., None, :]).abs()
    ours = ra_tta.sinkhorn(a, b, cost, reg, tol=tol)
    exact = ra_tta.monotone_plan(x, a, y, b)
    for i in range(4):
        problem = (a[i].numpy(), b[i].numpy(), cost[i].numpy())
        theirs = ot.sinkhorn(*problem, reg=reg, numItermax=100, stopThr=tol, warn=False)
        assert np.abs(ours[i].numpy() - theirs).max() < 1e-12
        alone = ra_tta.sinkhorn(a[i], b[i], cost[i], reg, tol=tol)
        assert torch.allclose(alone, ours[i], atol=1e-14)  # the others do not change its steps
        assert float((exact[i] * cost[i]).sum()) == pytest.approx(ot.emd2(*problem), abs=1e-9)


def test_entropic_is_between_exact_and_independent():
    x, a = unit(1, 15).double(), masses(1, 15)
    y, b = unit(1, 6, seed=1).double(), masses(1, 6, seed=1)
    gap = (x[..., :, None] - y[..., None, :]).abs()

    def cost(kind, reg=0.1):
        return float((ra_tta.transport_plan(kind, x, a, y, b, reg) * gap).sum())

    assert cost("exact") < cost("entropic", 0.05) < cost("entropic", 0.5) < cost("independent")
    assert cost("entropic", 1e4) == pytest.approx(cost("independent"), rel=1e-3)
    assert cost("mean") == pytest.approx(float(gap.mean()), rel=1e-12)


# --- the whole method on one image ---------------------------------------------------------------


def example(seed: int = 0, classes: int = 4, sentences: int = 5):
    """Texts, database and views around a few directions, so that some classes survive."""
    d = 6
    centres = unit(classes, d, seed=seed)
    noisy = lambda c, k, s: F.normalize(centres[c] + 0.25 * unit(k, d, seed=s), dim=-1)  # noqa: E731
    owner = torch.arange(classes).repeat_interleave(sentences)
    texts = ra_tta.Texts(
        unit(classes, d, seed=seed + 9),
        torch.cat([noisy(c, sentences, 10 + c) for c in range(classes)]),
        owner,
        [f"sentence {i}" for i in range(len(owner))],
    )
    images = torch.cat([noisy(c, 12, 30 + c) for c in range(classes)])
    views = F.normalize(centres[0] + centres[1] + 0.9 * unit(7, d, seed=seed + 3), dim=-1)
    return views, texts, ra_tta.Database(images.numpy())


def by_hand(views, texts, images, scale, s: Options) -> np.ndarray:
    """RA-TTA in NumPy with loops, from the description of the authors' code."""
    x, t = views.double().numpy(), texts.vectors.double().numpy()
    owner, images = texts.owner.numpy(), images.astype(float)
    logits = scale * x[0] @ texts.classifier.double().numpy().T
    p0 = np.exp(logits - logits.max())
    p0 /= p0.sum()
    h0 = -(p0 * np.log(p0)).sum()
    score = np.quantile(x @ t.T, 0.75 if s.q is None else s.q, axis=0)
    top = np.argsort(-score)[: s.top_k_d]
    survivors = [c for c in range(len(p0)) if (owner[top] == c).sum() >= s.min_descriptions]
    if not survivors:
        return p0
    kept = [i for i in top if owner[i] in survivors]
    u = t[kept].mean(0)
    u /= np.linalg.norm(u)
    distance = []
    for c in survivors:
        uc = t[[i for i in top if owner[i] == c]].mean(0)
        uc /= np.linalg.norm(uc)
        nearest = images[np.argsort(((images - uc) ** 2).sum(1))[: s.top_k_s]]  # L2, as theirs
        mu, nu = np.exp(scale * x @ u), np.exp(scale * nearest @ uc)
        mu, nu = mu / mu.sum(), nu / nu.sum()
        if s.transport == "exact":
            distance.append(wasserstein_distance(x @ uc, nearest @ uc, mu, nu))
        else:
            ot = pytest.importorskip("ot")
            cost = np.abs((x @ uc)[:, None] - (nearest @ uc)[None])
            plan = ot.sinkhorn(mu, nu, cost, reg=0.1, numItermax=100, stopThr=1e-2)
            distance.append((plan * cost).sum())
    r = np.zeros_like(p0)
    z = scale / (1 + np.array(distance))
    r[survivors] = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    hr = -(r * np.log(r + 1e-7)).sum()
    l0, lr = math.exp(1 / (1 + h0)), math.exp(1 / (1 + hr))
    return (l0 * p0 + lr * r) / (l0 + lr)


@pytest.mark.parametrize("transport", ["exact", "entropic"])
@pytest.mark.parametrize("seed", range(4))
def test_every_step_is_what_one_computes_by_hand(transport, seed):
    views, texts, database = example(seed)
    options = Options(top_k_d=8, top_k_s=5, min_descriptions=2, transport=transport)
    done = ra_tta.trace(views, texts, database, 10.0, options)
    assert len(done.classes) >= 2, "the example should let several classes survive"
    expected = by_hand(views, texts, database.features, 10.0, options)
    assert np.abs(done.p.numpy() - expected).max() < 1e-6
    assert float(done.p.sum()) == pytest.approx(1)
    assert done.rows.shape == (len(done.classes), 5) and done.plans.shape[1:] == (7, 5)
    assert 0.27 < done.share < 0.74  # the fusion never switches a branch off


def test_quantile():
    cosines = torch.randn(23, 5, generator=torch.Generator().manual_seed(0))
    for q in (0, 0.3, 0.75, 0.9, 1):
        got = ra_tta.quantile_over_views(cosines, q)
        assert np.allclose(got, np.quantile(cosines.numpy(), q, axis=0), atol=1e-6)
    assert ra_tta.quantile_over_views(cosines[:1], 0.75).tolist() == cosines[0].tolist()


def test_one_surviving_class_always_wins_unless_it_abstains():
    views, texts, database = example()
    for seed in range(20):
        one = F.normalize(texts.vectors[10:11] + 0.1 * unit(6, 6, seed=seed), dim=-1)  # class 2
        options = Options(top_k_d=5, top_k_s=5, min_descriptions=5)
        done = ra_tta.trace(one, texts, database, 10.0, options)
        assert done.classes.tolist() == [2] and done.r.tolist() == [0, 0, 1, 0]
        assert int(done.p.argmax()) == 2 and done.share <= 0.5
        calm = Options(top_k_d=5, top_k_s=5, min_descriptions=5, lone="abstains")
        done = ra_tta.trace(one, texts, database, 10.0, calm)
        assert torch.equal(done.p, done.p0)


def test_no_surviving_class_changes_nothing():
    views, texts, database = example()
    for options in (Options(top_k_d=8, min_descriptions=9), Options(retrieval="off")):
        done = ra_tta.trace(views, texts, database, 10.0, options)
        assert torch.equal(done.p, done.p0) and done.r is None and done.share == 1
    assert torch.allclose(done.p0.float(), (10 * texts.classifier @ views[0]).softmax(0))


def test_the_switches():
    views, texts, database = example()
    base = {"top_k_d": 8, "top_k_s": 5, "min_descriptions": 2}
    only = ra_tta.trace(views, texts, database, 10.0, Options(**base, fusion="retrieval"))
    assert torch.equal(only.p, only.r)
    half = ra_tta.trace(views, texts, database, 10.0, Options(**base, fusion="equal"))
    assert torch.allclose(half.p, (half.p0 + half.r) / 2)
    # the text in the place of the images: everything is moved to cosine 1
    text = ra_tta.trace(views, texts, None, 10.0, Options(**base, retrieval="text"))
    u, overall = ra_tta.prototypes_of(texts, text.chosen, text.classes)
    mu = (10 * views @ overall).softmax(0)
    assert torch.allclose(text.distances.float(), (mu * (1 - views @ u.T).T).sum(1), atol=1e-6)
    with pytest.raises(ValueError, match="needs a database"):
        ra_tta.trace(views, texts, None, 10.0, Options(**base))
    for wrong in ({"transport": "sinkhorn"}, {"fusion": "x"}, {"lone": "x"}, {"retrieval": "x"}):
        with pytest.raises(ValueError, match="unknown .* Known: "):
            Options(**wrong)
    with pytest.raises(ValueError, match="q is 75; it must be a fraction from 0 to 1"):
        Options(q=75)
    with pytest.raises(ValueError, match="unknown transport 'sinkhorn'.*entropic"):
        ra_tta.transport_plan("sinkhorn", *[torch.ones(1, 2)] * 4, 0.1)


# --- texts ---------------------------------------------------------------------------------------


def test_shipped_descriptions():
    names = iconshift.classnames()
    lists = ra_tta.read_descriptions(ra_tta.DESCRIPTIONS, names)
    assert len(lists) == 200
    for name, some in zip(names, lists, strict=True):
        assert len(set(some)) >= 10
        assert all(name in s.lower() and s[0].isupper() and s.endswith(".") for s in some)
    whole = json.loads(ra_tta.DESCRIPTIONS.read_text())
    assert list(whole) == names
    for some in ra_tta.depictions(names):
        assert len(set(some)) == 10


def test_descriptions_of_others(tmp_path):
    path = tmp_path / "cupl.json"
    path.write_text(json.dumps({"Hot_Dog": ["a sausage"], "cat": ["fur", "tail "], "x": ["y"]}))
    assert ra_tta.read_descriptions(path, ["cat", "hot dog"]) == [["fur", "tail"], ["a sausage"]]
    with pytest.raises(ValueError, match="describes 3 classes, but not 1 of the 2.*owl"):
        ra_tta.read_descriptions(path, ["cat", "owl"])
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="is not {class"):
        ra_tta.read_descriptions(path, ["cat"])
    with pytest.raises(ValueError, match="no file of descriptions"):
        ra_tta.read_descriptions(tmp_path / "nothing.json", ["cat"])


def test_texts_by_hand(mini):
    names, lists = ["cat", "hot_dog"], [["with fur", "with a tail"], ["in a bun"]]
    texts = ra_tta.embed_texts(mini, names, lists, "seven")
    assert texts.owner.tolist() == [0, 0, 0, 1, 1]
    assert texts.sentences[0] == "a photo of the cat. with fur"
    assert texts.sentences[4] == "a photo of the hot dog."
    assert torch.allclose(texts.vectors, mini.encode_text(texts.sentences), atol=1e-5)
    for c, name in enumerate(("cat", "hot dog")):
        sentences = [t.format(name) for t in template_sentences("seven")] + lists[c]
        mean = F.normalize(mini.encode_text(sentences).mean(0), dim=0)
        assert torch.allclose(texts.classifier[c], mean, atol=1e-5)


# --- search --------------------------------------------------------------------------------------


def test_search_is_that_of_all_distances():
    vectors = unit(731, 16).numpy()
    groups = {"a": (0, 150), "b": (150, 420), "c": (420, 731)}
    database = ra_tta.Database(vectors, groups=groups)
    queries = unit(5, 16, seed=3)
    for without in (None, "b", "nobody"):
        distance = ((queries.numpy()[:, None] - vectors[None]) ** 2).sum(-1)
        if without == "b":
            distance[:, 150:420] = np.inf
        expected = distance.argsort(1)[:, :30]
        cosines, rows = database.search(queries, 30, without)
        assert rows.tolist() == expected.tolist()
        assert torch.allclose(
            cosines, 1 - torch.tensor(np.sort(distance, 1)[:, :30]) / 2, atol=1e-5
        )
    assert torch.allclose(database.vectors(rows), torch.from_numpy(vectors)[rows], atol=1e-6)


def test_search_mistakes():
    database = ra_tta.Database(unit(9, 8).numpy(), groups={"a": (0, 5)})
    with pytest.raises(ValueError, match="vectors of 8: it was embedded with another model"):
        database.search(unit(1, 16), 3)
    with pytest.raises(ValueError, match="k is 5; the database has 4 images"):
        database.search(unit(1, 8), 5, without="a")


def test_subset():
    database = ra_tta.Database(unit(10, 4).numpy(), [f"i{k}" for k in range(10)], {"a": (2, 7)})
    small = database.subset([0, 3, 5, 9])
    assert small.items == ["i0", "i3", "i5", "i9"] and small.groups == {"a": (1, 3)}
    assert np.array_equal(small.features, database.features[[0, 3, 5, 9]])
    with pytest.raises(ValueError, match="would not lie together"):
        database.subset([3, 0, 5])


# --- the embedded database -----------------------------------------------------------------------


def test_no_test_image_is_in_the_database():
    pictures = ra_tta.iconshift_pictures(220)
    assert len(pictures.items) == len(set(pictures.items)) == 11 * 220
    seen = {}
    for style, (start, stop) in pictures.groups.items():
        missing = iconshift.styles()[style]["missing"]
        for item in pictures.items[start:stop]:
            s = ra_tta.database_spec(item)
            assert s["style"] == style and s["target"] not in missing
            assert s["photos"] == "train"  # test scenes have other photographs
            assert tuple(s["paint"]) not in seen
            seen[tuple(s["paint"])] = item
    # by construction: no test scene has such parameters; by hash: no test image has such pixels
    sizes = (128,)
    in_database = {
        hashlib.sha256(ra_tta.database_scene(i, size).tobytes()).digest()
        for i in pictures.items[:: len(pictures.items) // 150]
        for size in sizes
    }
    for variant in datasets.ICONSHIFT:
        for i in range(0, iconshift.size(variant), 10):
            indices = iconshift.kept(variant)
            s = iconshift.spec(variant, i if indices is None else indices[i])
            assert tuple(s["paint"]) not in seen
        for i in range(0, iconshift.size(variant), iconshift.size(variant) // 25):
            indices = iconshift.kept(variant)
            s = iconshift.spec(variant, i if indices is None else indices[i])
            pixels = iconshift.compose(s, sizes[0]).tobytes()
            assert hashlib.sha256(pixels).digest() not in in_database
    # nor are they scenes that MiniCLIP (from 0) or CoOp (20,000,000) learned from
    assert FIRST >= 40_000_000 and FIRST % 200 == 0


def test_an_image_does_not_see_its_own_style():
    for variant in ("iconshift-r", "iconshift-a", "iconshift-sketch"):
        data = datasets.load(variant, n=20)
        indices = iconshift.kept(variant)
        for image_id in data.ids:
            style = ra_tta.style_of(image_id)
            number = int(image_id.split("/")[1])
            assert style == iconshift.spec(variant, indices[number] if indices else number)["style"]
            assert style in ra_tta.iconshift_pictures(3).groups
    assert ra_tta.style_of("n01440764/x.JPEG") is None


# --- building and reading ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(11):
        name = place / ("deep/er" if i % 2 else "") / f"{i:02d}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(name)
    (place / "05.jpg").write_bytes(b"no picture")
    (place / "06.jpg").symlink_to(place / "not there.jpg")
    return place


def test_build_and_read(mini, folder, tmp_path):
    pictures = ra_tta.folder_pictures(folder)
    with pytest.warns(UserWarning, match=r"2 images left out.*05\.jpg"):
        made = ra_tta.build(pictures, mini, tmp_path / "db")
    about = json.loads((tmp_path / "db" / "about.json").read_text())
    assert [Path(text.split(": ")[0]).name for text in about["failed"]] == ["05.jpg", "06.jpg"]
    assert made.features.dtype == np.float16 and made.features.shape == (11, mini.embed_dim)
    assert [Path(i).name for i in made.items] == sorted(
        (Path(i).name for i in made.items), key=lambda n: (int(n[:2]) % 2, n)
    )
    for item, row in zip(made.items, made.features, strict=True):
        view = torch.from_numpy(np.array(center_view(read_rgb(item), 64))).permute(2, 0, 1)
        assert torch.allclose(
            mini.encode_views(view[None])[0], torch.tensor(row).float(), atol=1e-3
        )
    again = ra_tta.build(pictures, mini, tmp_path / "db")
    assert np.array_equal(again.features, made.features) and again.items == made.items
    other = models.wrap(models.build_mini(seed=1), "other", device="cpu")
    with pytest.raises(ValueError, match="of other images or of another model"):
        ra_tta.build(pictures, other, tmp_path / "db")
    assert not list((tmp_path / "db").glob("part-*"))
    (tmp_path / "db" / "about.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        ra_tta.build(pictures, mini, tmp_path / "db")


def test_names_do_not_shift_vectors(mini, tmp_path):
    place = tmp_path / "pictures"
    place.mkdir()
    names = ["a\nb.png", "c\u2028d.png", "e.png"]
    for i, name in enumerate(names):
        Image.new("RGB", (64, 64), (90 * i, 0, 0)).save(place / name)
    made = ra_tta.build(ra_tta.folder_pictures(place), mini, tmp_path / "db", progress=False)
    assert [Path(item).name for item in made.items] == names
    for row, item in zip(made.features, made.items, strict=True):
        view = torch.from_numpy(np.array(center_view(read_rgb(item), 64))).permute(2, 0, 1)
        assert torch.allclose(
            mini.encode_views(view[None])[0], torch.tensor(row).float(), atol=1e-3
        )


def test_older_and_damaged_databases(tmp_path):
    ra_tta.write_database(tmp_path, unit(2, 4).numpy(), ["a", "b"], {"groups": {"x": (0, 1)}})
    (tmp_path / "items.json").rename(tmp_path / "kept.json")
    (tmp_path / "items.txt").write_text("a\nb\u2028\n", "utf-8")  # as it was
    there = ra_tta.read_database(tmp_path)
    assert there.items == ["a", "b\u2028"] and there.groups == {"x": (0, 1)}
    (tmp_path / "items.txt").write_text("a\nb\nc\n")
    with pytest.raises(ValueError, match="is damaged .3 names for 2 vectors.: delete it"):
        ra_tta.read_database(tmp_path)
    vectors = tmp_path / "vectors.safetensors"
    for damaged in (vectors.read_bytes()[:-3], b"", b"{"):
        vectors.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            ra_tta.read_database(tmp_path)
    vectors.unlink()
    ra_tta.write_database(tmp_path, unit(2, 4).numpy(), ["a", "b"], {"groups": {"x": (0, 1)}})
    for damaged in ("{", "[]", "{}", '{"groups": 3}', '{"groups": {"x": 3}}'):
        (tmp_path / "about.json").write_text(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            ra_tta.read_database(tmp_path)


def test_a_killed_build_goes_on(mini, tmp_path):
    pictures = ra_tta.iconshift_pictures(50)  # 550 images: two parts
    asked = []

    def fetch(item, stop=530):
        asked.append(item)
        if len(asked) > stop:
            raise KeyboardInterrupt
        return Image.new("RGB", (64, 64), (len(item), int(item.split("/")[1]) % 256, 0))

    def of(stop):
        return ra_tta.Pictures(pictures.items, lambda i: fetch(i, stop), "x", pictures.groups)

    with pytest.raises(KeyboardInterrupt):
        ra_tta.build(of(530), mini, tmp_path / "db", progress=False)
    assert len(list((tmp_path / "db").glob("part-*.npz"))) == 1
    asked.clear()
    done = ra_tta.build(of(10**6), mini, tmp_path / "db", progress=False)
    assert asked == pictures.items[512:]  # the first part is not made again
    whole = ra_tta.build(of(10**6), mini, tmp_path / "other", progress=False)
    assert np.array_equal(done.features, whole.features)
    assert done.groups == {k: tuple(v) for k, v in pictures.groups.items()}


@pytest.mark.parametrize("protocol", [2, 4])
def test_embeddings_of_the_authors(tmp_path, protocol):
    rows = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    for value in (
        {"embedding": rows},
        {"embedding": torch.from_numpy(rows)},
        {"embedding": rows.astype(np.float16)},
    ):
        path = tmp_path / "LAION2B_x_aux_ViT-B_16"
        path.write_bytes(pickle.dumps(value, protocol=protocol))
        got = ra_tta.read_database(path)
        assert got.features.dtype == np.float16
        expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        assert np.allclose(got.features, expected, atol=2e-3)
    path.write_bytes(pickle.dumps({"embedding": [1, 2]}))
    with pytest.raises(ValueError, match=r"no array \[M,D\]"):
        ra_tta.read_database(path)


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch pwned",)


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_bytes(pickle.dumps({"embedding": Evil()}))
    with pytest.raises(ValueError, match="system, which is no array"):
        ra_tta.read_database(tmp_path / "bad")
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(ValueError, match="is no database: make one with"):
        ra_tta.read_database(tmp_path)


# --- as a method of runs -------------------------------------------------------------------------


def test_a_run_from_the_shell(world, tmp_path, capsys):  # noqa: F811
    sentences = {name: [f"{name} number {i}" for i in range(6)] for name in CLASSES}
    (tmp_path / "d.json").write_text(json.dumps(sentences))
    shell = [f"--{key}={value}" for key, value in world.items()]
    place = str(tmp_path / "db")
    build = ["database", "--images", world["root"], "--out", place, "--device=cpu"]
    with pytest.warns(UserWarning, match="1 images left out"):
        assert cli.main([*build, "--model", world["model"]]) == 0
    assert f"{len(CLASSES) * PER_CLASS} of {len(CLASSES) * PER_CLASS + 1} images" in (
        capsys.readouterr().out
    )
    options = ["--method=ra_tta", f"--descriptions={tmp_path / 'd.json'}", f"--database={place}"]
    call = ["evaluate", *shell, *options, f"--out={tmp_path / 'runs'}", "--json"]
    assert cli.main(call) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["method"] == "ra_tta" and result["n"] == len(CLASSES) * PER_CLASS
    low, high = result["accuracy_ci95"]
    assert low <= result["accuracy"] <= high
    assert cli.main(["evaluate", *shell, "--method=ra_tta"]) == 2
    assert "needs descriptions=FILE" in capsys.readouterr().err
    assert cli.main(["database", "--images", str(tmp_path / "d.json"), "--out", place]) == 2


def test_a_batch_is_its_images_one_by_one(mini):
    names = ["cat", "dog", "bus"]
    texts = ra_tta.embed_texts(mini, names, [[f"{n} {i}" for i in range(6)] for n in names])
    database = ra_tta.Database(unit(80, mini.embed_dim).numpy(), groups={"noto": (0, 30)})
    knowledge = ra_tta.Knowledge(texts, database, lambda i: "noto" if i == "x" else None)
    prompts = Prompts(mini, names)
    features = unit(3, 5, mini.embed_dim, seed=4)
    method = methods.get("ra_tta")
    done = method(features, prompts, inputs={"knowledge": knowledge, "ids": ["x", "y", "x"]})
    scale = float(mini.logit_scale)
    for i, without in enumerate(["noto", None, "noto"]):
        one = ra_tta.trace(features[i], texts, database, scale, None, without)
        assert torch.allclose(done.logits[i].exp(), one.p.float(), atol=1e-6)
        if without and one.rows.numel():
            assert one.rows.min() >= 30
    assert done.selected.all() and done.logits.exp().sum(1).allclose(torch.ones(3))
    with pytest.raises(ValueError, match="needs descriptions and a database"):
        method(features, prompts)


def test_options_and_widths_are_checked(world, mini, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="database='x' is for method 'ra_tta', not 'tpt'"):
        run({**world, "database": "x"})
    sentences = {name: ["s"] * 6 for name in CLASSES}
    (tmp_path / "d.json").write_text(json.dumps(sentences))
    ra_tta.write_database(tmp_path / "db", np.zeros((3, 7), np.float16), list("abc"), {})
    wrong = {"descriptions": str(tmp_path / "d.json"), "database": str(tmp_path / "db")}
    with pytest.raises(ValueError, match="the database has vectors of 7, .* makes 32"):
        run({**world, "method": "ra_tta", "out": str(tmp_path), **wrong}, progress=False)


def test_files_count_by_content(tmp_path):
    path, identity = tmp_path / "d.json", ra_tta.METHOD.identity
    path.write_text("{}")
    before = identity(Options(descriptions=str(path)), None)
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "about.json").write_text("1")
    both = identity(Options(descriptions=str(path), database=str(tmp_path / "db")), None)
    assert before["descriptions"] == both["descriptions"] and "database" not in before
    assert both["database"][0] == "about.json"
    path.write_text("{ }")
    assert identity(Options(descriptions=str(path)), None) != before


# --- figures -------------------------------------------------------------------------------------


def test_labelled_boxes_draws_every_box_and_its_text():
    import matplotlib

    matplotlib.use("Agg")
    from tpt_nb import figures

    boxes = [(0, 0, 10, 20), (3, 4, 8, 9)]
    fig = figures.labelled_boxes(np.zeros((20, 20, 3)), boxes, ["all of it", "a part"], "t")
    left, right = fig.axes
    drawn = [line.get_xydata() for line in left.lines[1::2]]  # under each one a white line
    for (x0, y0, x1, y1), outline in zip(boxes, drawn, strict=True):
        assert outline.min(0).tolist() == [x0 - 0.5, y0 - 0.5]
        assert outline.max(0).tolist() == [x1 - 0.5, y1 - 0.5]
    assert [t.get_text() for t in left.texts] == ["1", "2"]
    assert [t.get_text() for t in right.texts] == ["1", "all of it", "2", "a part"]
    with pytest.raises(ValueError, match="2 boxes but 1 labels"):
        figures.labelled_boxes(np.zeros((20, 20, 3)), boxes, ["one"])


def test_distributions_show_every_value_and_the_median():
    import matplotlib

    matplotlib.use("Agg")
    from tpt_nb import figures

    panels = {"a": {"one": [0.0, 1, 1], "two": [3.0]}, "b": {"one": [5.0, 5], "two": [5.0]}}
    fig = figures.distributions(panels, ["x", "y"])
    for axis, series in zip(fig.axes, panels.values(), strict=True):
        for i, (dots, values) in enumerate(zip(axis.lines, series.values(), strict=True)):
            assert dots.get_xdata().tolist() == list(values)
            assert (np.abs(dots.get_ydata() - i) < 0.5).all()  # in the row of its name
        told = [float(text.get_text()) for text in axis.texts]
        assert told == [pytest.approx(np.median(v)) for v in series.values()]
    assert [axis.get_xlabel() for axis in fig.axes] == ["x", "y"]
