"""diffusion: which views the filters keep, what the cache promises, both kinds of generator."""

import json
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tpt_nb import datasets, methods, runs
from tpt_nb.__main__ import main
from tpt_nb.core.paths import DATA
from tpt_nb.features import encode
from tpt_nb.methods import difftpt
from tpt_nb.methods.difftpt import adapt as adapt_module
from tpt_nb.methods.difftpt import filter_views, generate, pictures_of
from tpt_nb.methods.difftpt import pictures as pictures_module
from tpt_nb.models import Prompts
from tpt_nb.models import load as load_clip
from tpt_nb.runs import RunConfig, run
from tpt_nb.views import make_augmenter

NAMES = ["cat", "apple", "hot dog"]


def angles(*degrees: float) -> torch.Tensor:
    """Unit vectors ``[1,n,2]`` at these angles; the first is the original."""
    radians = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([radians.cos(), radians.sin()], -1)[None]


# --- filters -------------------------------------------------------------------------------------


def test_the_papers_filter_drops_the_least_similar_generated_views_and_no_crop():
    crops = angles(0, 170, 5)  # a crop that has nothing to do with the image is kept
    every = torch.cat([crops, angles(40, 10, 90, 20, 30)], 1)
    assert filter_views(every, 3, 0.8).tolist() == [[0, 1, 2, 3, 4, 6, 7]]  # 90 degrees goes
    assert filter_views(every, 3, 0.4).tolist() == [[0, 1, 2, 4, 6]]


def test_the_codes_filter_asks_all_views_but_the_original():
    logits = angles(180, 181, 95, 0, 200, 270, 185, 100)
    kept = filter_views(logits, 1, 0.8)
    assert kept.tolist() == [[0, 1, 2, 4, 6, 7]]  # int(7 * 0.8) = 5 of 7, and the original


@pytest.mark.parametrize(
    ("views", "first", "keep", "left"),
    [(128, 1, 0.8, 102), (128, 65, 0.8, 65 + 50), (91, 1, 0.7, 1 + 62), (11, 1, 0.7, 1 + 7)],
)
def test_the_numbers_of_views_are_those_of_the_published_code(views, first, keep, left):
    vectors = torch.randn(2, views, 5, generator=torch.Generator().manual_seed(0))
    assert filter_views(vectors, first, keep).shape == (2, left)


def test_features_and_logits_may_disagree_about_the_same_views(mini):
    prompts = Prompts(mini, NAMES)
    g = torch.Generator().manual_seed(1)
    views = F.normalize(torch.randn(4, 9, mini.embed_dim, generator=g), dim=-1)
    logits = mini.logit_scale * views @ prompts.text_features().T
    assert (filter_views(views, 4, 0.6) != filter_views(logits, 4, 0.6)).any()


def test_bad_filters():
    with pytest.raises(ValueError, match="keep is 1.2"):
        filter_views(angles(0, 1, 2, 3), 2, 1.2)


# --- methods -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def views(mini) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    every = F.normalize(torch.randn(3, 17, mini.embed_dim, generator=g), dim=-1)
    return every[:, :7], every[:, 7:]


def _adapt(name, views, prompts, **values):
    return methods.get(name)(views[0], prompts, inputs={"generated": views[1]}, **values)


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_without_a_filter_difftpt_is_tpt_on_all_views(mini, views, rule):
    prompts = Prompts(mini, NAMES)
    every = torch.cat(views, 1)
    for steps in (1, 4):
        same = {"rho": 0.3, "steps": steps, "lr": 0.01}
        got = _adapt("difftpt", views, prompts, rule=rule, keep=1.0, **same)
        expected = methods.get("tpt")(every, prompts, **same)
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.selected, expected.selected)


def test_without_generated_views_left_difftpt_is_tpt_on_the_crops(mini, views):
    prompts = Prompts(mini, NAMES)
    got = _adapt("difftpt", views, prompts, keep=0.0, lr=0.01)
    expected = methods.get("tpt")(views[0], prompts, rho=0.3, steps=4, lr=0.01)
    assert torch.equal(got.logits, expected.logits)
    assert not got.selected[:, 7:].any()


def test_the_rules_select_among_what_their_filter_keeps(mini, views):
    prompts = Prompts(mini, NAMES)
    every = torch.cat(views, 1)
    logits = mini.logit_scale * every @ prompts.text_features().T
    rules = {"paper": filter_views(every, 7, 0.8), "code": filter_views(logits, 1, 0.8)}
    for rule, kept in rules.items():
        got = _adapt("difftpt", views, prompts, rule=rule, lr=0.01)
        inside = torch.zeros(3, 17, dtype=torch.bool).scatter(1, kept, True)
        assert not (got.selected & ~inside).any()
        assert (got.selected.sum(1) == int(kept.shape[1] * 0.3)).all()
        least = methods.get("tpt")(every[0, kept[0]][None], prompts, rho=0.3, steps=4, lr=0.01)
        assert torch.allclose(got.logits[0], least.logits[0], atol=1e-4)
    assert rules["paper"].shape[1] == 7 + 8
    assert rules["code"].shape[1] == 1 + int(16 * 0.8)


def test_vote_on_the_same_views(mini, views):
    prompts = Prompts(mini, NAMES)
    got = _adapt("difftpt_vote", views, prompts, rho=0.3)
    expected = methods.get("vote")(torch.cat(views, 1), prompts, rho=0.3)
    assert torch.equal(got.logits, expected.logits)


def test_generated_views_of_the_same_images_are_needed(mini, views):
    prompts = Prompts(mini, NAMES)
    with pytest.raises(ValueError, match="needs generated views"):
        methods.get("difftpt")(views[0], prompts)
    for name in ("difftpt", "difftpt_vote"):
        with pytest.raises(ValueError, match=r"\[2, 10, .*expected \[B,G,D\]"):
            _adapt(name, (views[0], views[1][:2]), prompts)


def test_older_names_are_rules():
    assert methods.translate("difftpt_paper") == ("difftpt", {"rule": "paper"})
    assert methods.translate("difftpt_code") == ("difftpt", {"rule": "code"})
    assert difftpt.METHOD.options().rule == "paper"  # as the name difftpt alone always meant
    with pytest.raises(ValueError, match="unknown rule 'papers'; did you mean 'paper'"):
        methods.read_options(difftpt.METHOD, {"rule": "papers"})


# --- the cache -----------------------------------------------------------------------------------


@dataclass
class Paint:
    """A generator for tests: noise on the image's mean colour; counts what it makes."""

    side: int = 8
    strength: float = 20
    dies_after: int = -1
    made: list = field(default_factory=list)
    device: str = "cpu"
    usual: int = 4

    def spec(self) -> dict:
        return {"generator": "paint", "side": self.side, "strength": self.strength}

    def make(self, image, seeds):
        if len(self.made) == self.dies_after:
            raise KeyboardInterrupt
        self.made.append(len(seeds))
        mean = np.asarray(image).reshape(-1, 3).mean(0)
        out = []
        for seed in seeds:
            noise = np.random.default_rng(seed).normal(size=(self.side, self.side, 3))
            out.append(np.clip(mean + self.strength * noise, 0, 255).astype(np.uint8))
        return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def scenes() -> datasets.Dataset:
    return datasets.load("iconshift-a", n=4)


def test_pictures_survive_packing():
    for n in (1, 8, 11):
        pictures = torch.randint(0, 256, (n, 3, 5, 5), dtype=torch.uint8)
        got, seconds = pictures_module.unpack(pictures_module.pack(pictures, 1.25))
        assert torch.equal(got, pictures) and seconds == 1.25


def test_a_picture_depends_on_image_generator_seed_and_number_alone(scenes, tmp_path):
    at_once = generate(scenes, Paint(), 12, cache=tmp_path / "a")
    few = generate(scenes, Paint(), 5, cache=tmp_path / "b")
    first = few.read(scenes.ids[2], 5)
    painter = Paint()
    more = generate(scenes, painter, 12, cache=tmp_path / "b")
    assert painter.made == [7] * 4  # only what was missing
    for image_id in scenes.ids:
        assert torch.equal(at_once.read(image_id, 12), more.read(image_id, 12))
    assert torch.equal(at_once.read(scenes.ids[2], 5), first)
    other = generate(scenes, Paint(), 5, seed=1, cache=tmp_path / "b")
    assert not torch.equal(other.read(scenes.ids[2], 5), first)
    part = datasets.load("iconshift-a", n=2)  # a subset reads what the larger set left
    painter = Paint()
    generate(part, painter, 12, cache=tmp_path / "b")
    assert painter.made == []


def test_a_killed_generation_goes_on(scenes, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        generate(scenes, Paint(dies_after=2), 3, cache=tmp_path)
    painter = Paint()
    again = generate(scenes, painter, 3, cache=tmp_path)
    assert painter.made == [3, 3]
    undisturbed = generate(scenes, Paint(), 3, cache=tmp_path / "other")
    for image_id in scenes.ids:
        assert torch.equal(again.read(image_id, 3), undisturbed.read(image_id, 3))
    damaged = again.folder / pictures_module.file_name(scenes.ids[0])
    damaged.write_bytes(damaged.read_bytes()[:60])
    assert again.missing(scenes.ids, 3) == scenes.ids[:1]
    painter = Paint()
    generate(scenes, painter, 3, cache=tmp_path)
    assert painter.made == [3] and not again.missing(scenes.ids, 3)


def test_missing_or_other_pictures_are_an_error_that_says_how_to_make_them(scenes, tmp_path):
    wanted = pictures_of(scenes, Paint(), 0, tmp_path)
    with pytest.raises(ValueError, match="4 of 4 images.*python -m tpt_nb generate --x"):
        wanted.check(scenes.ids, 3, "python -m tpt_nb generate --x")
    generate(scenes, Paint(strength=9), 3, cache=tmp_path)
    with pytest.raises(ValueError, match="differs in generator.strength.*Make them with"):
        wanted.check(scenes.ids, 3)
    generate(scenes, Paint(), 3, cache=tmp_path)
    wanted.check(scenes.ids, 3)
    with pytest.raises(ValueError, match="have no 4 variations"):
        wanted.check(scenes.ids, 4)


def test_an_archive_serves_what_the_folder_lacks(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures_module, "SHIPPED", tmp_path / "shipped")
    monkeypatch.syspath_prepend(DATA / "diffusion")
    import ship

    made = generate(scenes, Paint(), 3, cache=tmp_path / "here")
    archive = ship.ship(made, scenes.ids[:3])
    again = archive.read_bytes()
    assert ship.ship(made, scenes.ids[:3]).read_bytes() == again  # no dates in it
    elsewhere = pictures_of(scenes, Paint(), 0, tmp_path / "elsewhere")
    assert elsewhere.missing(scenes.ids, 3) == scenes.ids[3:]
    assert torch.equal(elsewhere.read(scenes.ids[1], 3), made.read(scenes.ids[1], 3))


def test_the_variations_of_the_notebooks_images_ship(tmp_path):
    images = datasets.load("iconshift-a", n=100)
    shipped = pictures_of(images, difftpt.load_generator("mini"), cache=tmp_path)
    shipped.check(
        images.ids, 16
    )  # the error says how to make them again; then data/diffusion/ship.py


def test_file_names_are_safe_and_differ():
    names = {pictures_module.file_name(i) for i in ("a/b.jpg", "a-b.jpg", "ä/../x" * 60, "")}
    assert len(names) == 4 and all("/" not in n and len(n) < 100 for n in names)


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def painted(monkeypatch):
    """Runs in which every generator paints."""
    for module in (adapt_module, difftpt):
        monkeypatch.setattr(module, "load_generator", lambda name, device="cpu": Paint(side=16))


def _config(tmp_path, **more):
    common = dict(dataset="iconshift-a", reduced_size=3, n_aug=3, cache=str(tmp_path / "c"),
                  out=str(tmp_path / "runs"), n_generated=4, workers=0)  # fmt: skip
    return RunConfig.from_dict(common | more)


def test_a_run_reads_pictures_and_says_what_they_cost(painted, tmp_path, capsys):
    config = _config(tmp_path, method="difftpt_paper")
    command = ["evaluate", "--dataset", "iconshift-a", "--reduced_size", "3", "--n_aug", "3",
               "--method", "difftpt_paper", "--n_generated", "4", "--cache", config.cache,
               "--out", config.out, "--workers", "0"]  # fmt: skip
    assert main(command) == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    ask = "python -m tpt_nb generate --dataset iconshift-a --reduced_size 3 --generator mini"
    assert f"{ask} --n_generated 4 --cache {config.cache}" in said
    assert not (tmp_path / "c" / "features").exists()  # said before anything is encoded
    assert main(said.split("python -m tpt_nb ")[-1].split()) == 0
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["n"] == 3 and result["seconds_to_generate"] > 0
    done = run(config)
    selected = [v for r in done.records for v in r["selected"]]
    assert max(selected) < 8  # four crops with the image, four pictures
    # int((4 + int(4 * 0.8)) * 0.3) of them
    assert all(len(r["selected"]) == 2 for r in done.records)
    assert done.config.options["steps"] == 4 and done.config.options["rho"] == 0.3


def test_the_control_takes_the_crops_that_come_next(tmp_path):
    config = _config(tmp_path, method="difftpt_code", generator="crops")
    resolved, _ = runs.resolve(config)
    data, clip = datasets.load("iconshift-a", n=3), load_clip("mini", device="cpu")
    prompts, cache = Prompts(clip, data.classnames), tmp_path / "c"
    augmenter = make_augmenter("random", clip.image_size, n_aug=3)
    setting = methods.Setting(clip, prompts, data, augmenter, resolved, cache, 0, "cpu")
    options = runs.options_of(resolved)
    ready = difftpt.METHOD.ready(options, setting)
    more = encode(data, clip, make_augmenter("random", clip.image_size, n_aug=7), cache=False)
    own, further = more.features[:, :4], more.features[:, 4:]
    backwards = [2, 1, 0]  # the views that go with an image are found by its id
    got = ready.adapt(own[backwards], prompts, [more.ids[i] for i in backwards])
    expected = difftpt.METHOD(own[backwards], prompts, options, {"generated": further[backwards]})
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.selected, expected.selected)
    done = run(config)
    assert done.summary["n"] == 3 and "seconds_to_generate" not in done.summary
    with pytest.raises(ValueError, match="random crops"):
        run(_config(tmp_path, method="difftpt", generator="crops", augmenter="patch"))


def test_options_of_difftpt_belong_to_difftpt(tmp_path):
    with pytest.raises(ValueError, match="generator='crops' is for method 'difftpt'"):
        run(_config(tmp_path, method="tpt", generator="crops", n_generated=None))


def test_a_run_is_known_by_what_its_pictures_depend_on(tmp_path):
    def named(**more):
        return runs.resolve(_config(tmp_path, method="difftpt", **more))[0]

    usual = named(n_generated=None)
    assert usual.options["n_generated"] == 16
    assert runs.identity(usual)["options"]["generator"] == difftpt.MiniGenerator().spec()
    same = named(n_generated=16, generator="mini:steps=10")
    assert runs.identity(same) == runs.identity(usual)
    assert runs.identity(named(generator="mini:steps=4")) != runs.identity(named())
    assert runs.identity(named(generator="crops"))["options"]["generator"] == "crops"
    with pytest.raises(ValueError, match="no option 'speed'"):
        named(generator="mini:speed=3")


def test_without_diffusers_only_new_pictures_fail(scenes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="needs diffusers: pip install") as error:
        difftpt.variations(scenes[0][0], 1, difftpt.load_generator())
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="needs diffusers"):
        difftpt.PipelineGenerator("nobody/nothing").make(scenes[0][0], [0])
    assert run(_config(tmp_path, method="difftpt_paper", generator="crops")).summary["n"] == 3


@pytest.mark.parametrize(
    ("name", "says"),
    [("mini:speed=3", "no option 'speed'"), ("mini:steps=x", "'x', not a number"),
     ("mini:steps=0", "steps >= 1"), ("a/b@v2:batch=0", "batch")],
)  # fmt: skip
def test_bad_generators(name, says):
    with pytest.raises(ValueError, match=says):
        difftpt.load_generator(name)


def test_names_of_generators():
    made = difftpt.load_generator("mini:steps=4,guidance=1")
    assert (made.steps, made.guidance) == (4, 1.0)
    made = difftpt.load_generator(difftpt.PAPER + ":steps=25")
    assert (made.name, made.steps, made.guidance) == (difftpt.PAPER, 25, 3.0)
    assert difftpt.load_generator("mini").usual < made.usual == 63


# --- the embedded generator ----------------------------------------------------------------------


def test_the_same_seed_gives_the_same_picture_in_any_company(scenes):
    pytest.importorskip("diffusers")
    generator = difftpt.MiniGenerator(steps=1)
    image = scenes[0][0]
    some = generator.make(image, [3, 4, 5])
    many = generator.make(image, [*range(100, 108), 4])
    assert some.dtype == torch.uint8 and some.shape == (3, 3, 32, 32)
    assert torch.equal(some[1], many[8])
    assert not torch.equal(some[0], some[1])


def test_a_generator_without_weights_says_where_they_come_from(tmp_path):
    with pytest.raises(ValueError, match="train.py"):
        difftpt.MiniGenerator(weights=tmp_path / "none.safetensors")


def test_denoising_with_a_perfect_network_gives_the_image():
    pytest.importorskip("diffusers")
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    schedule = difftpt.build_schedule()

    class Perfect:
        """Knows the image, so that its velocity is exact."""

        def __call__(self, x, t, condition):
            a = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
            noise = (x - a.sqrt() * image) / (1 - a).sqrt()
            return a.sqrt() * noise - (1 - a).sqrt() * image

    for steps, guidance in ((1, 1.0), (10, 1.0), (10, 3.0)):
        noise = torch.randn(1, 3, 32, 32)
        got = difftpt.denoise(Perfect(), schedule, noise, torch.zeros(1, 256), steps, guidance)
        assert torch.allclose(got, image, atol=1e-3)


def test_most_variations_of_source_scenes_are_recognised(mini):
    """The shipped weights: MiniCLIP names the class far above chance (1 in 200)."""
    pytest.importorskip("diffusers")
    known, clip = datasets.load("iconshift-v2", n=6), load_clip("mini", device="cpu")
    generator = difftpt.MiniGenerator(steps=4)
    text = Prompts(clip, known.classnames).text_features()
    hits = []
    for i, image_id in enumerate(known.ids):
        made = difftpt.variations(known[i][0], 4, generator, image_id=image_id)
        features = clip.encode_views(difftpt.Row(4, clip.image_size)(difftpt.as_row(made)))
        hits += ((features @ text.T).argmax(1) == known.targets[i]).tolist()
    assert np.mean(hits) > 0.2


# --- any pipeline --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_pipeline(tmp_path_factory):
    """The paper's kind of pipeline, tiny and with random weights, saved to a folder."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, projection_dim=32, num_hidden_layers=1,
        num_attention_heads=2, image_size=32, patch_size=8,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionImageVariationPipeline(
        vae=vae,
        image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=transformers.CLIPImageProcessor(crop_size=32, size=32),
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


def test_the_papers_pipeline(tiny_pipeline, scenes, tmp_path):
    name = f"{tiny_pipeline}:steps=2,side=16"
    generator = difftpt.load_generator(f"{name},batch=2")
    made = generate(scenes, generator, 3, cache=tmp_path).read(scenes.ids[0], 3)
    assert made.shape == (3, 3, 16, 16)
    one_by_one = difftpt.load_generator(f"{name},batch=1")
    assert generator.spec() == one_by_one.spec()  # it is the same cache
    seeds = [difftpt.picture_seed(0, scenes.ids[0], k) for k in range(3)]
    again = one_by_one.make(scenes[0][0], seeds)
    assert (again.int() - made.int()).abs().max() <= 1  # rounding
    assert not torch.equal(made[0], made[1])
    other = one_by_one.make(scenes[1][0], seeds)
    assert not torch.equal(other, again)  # the image matters


def test_a_pipeline_that_takes_no_image(scenes, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(ValueError, match="takes no image"):
        difftpt.load_generator(str(tmp_path / "ddpm")).make(scenes[0][0], [0])


def test_a_pipeline_that_is_not_there(scenes, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot load the diffusion pipeline"):
        difftpt.load_generator(str(tmp_path / "empty")).make(scenes[0][0], [0])
