"""RA-TTA as its authors run it: their settings by data set, their files found by name."""

import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_runs import world  # noqa: F401 (a fixture)

from tpt_nb import datasets, features, models, runs
from tpt_nb.core import download, drive_folder
from tpt_nb.datasets import BENCHMARKS, imagenet_classes
from tpt_nb.methods import ra_tta
from tpt_nb.models import template_sentences

# identifiers of their scripts, in the order of BENCHMARKS; they have no EuroSAT and no ImageNet-C
THEIRS = [
    "imagenet_1k", "imagenet_v2", "imagenet_adversarial", "imagenet_rendition", "imagenet_sketch",
    "caltech101", "oxford_pets", "stanford_cars", "flowers102", "food101", "fgvc_aircraft",
    "sun397", "dtd", "ucf101", "caltech256", "resisc45", "cub200",
]  # fmt: skip


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def test_every_set_of_theirs_has_a_script_and_their_name():
    names = [n for n in BENCHMARKS if n not in ("eurosat", "imagenet-c")]
    assert set(ra_tta.SCRIPTS) == set(names)
    assert [datasets.file_name(n) for n in names] == THEIRS
    for name, script in ra_tta.SCRIPTS.items():
        assert script.q == (0.9 if name.startswith("imagenet") else 0.75)
        assert (script.templates == "eighty") == name.startswith("imagenet")
        assert all(t.count("{}") == 1 for t in template_sentences(script.templates))
        assert script.pre_template.count("{}") == 1 and script.pre_template.endswith(". ")
    shared = {n for n, s in ra_tta.SCRIPTS.items() if s.database}
    assert shared == {"imagenet", "imagenet-v2", "imagenet-sketch"}
    assert ra_tta.script_of("iconshift-a") == ra_tta.Script()


def write_database(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({"embedding": rows.astype(np.float32)}))


def test_databases_are_found_by_name_and_shared_ones_are_drawn_from(tmp_path, monkeypatch):
    rows = unit(40, 8).numpy()
    one, own = (tmp_path / f"LAION2B_{s}_aux_ViT-B_16" for s in ("imagenet_1k", "food101"))
    for path in (one, own):
        write_database(path, rows)
    for name in ("imagenet", "imagenet-v2", "imagenet-sketch"):
        assert ra_tta.find_database(str(tmp_path), name, "ViT-B/16") == one
        drawn = ra_tta.open_database(one, name)
        assert len(drawn) == 30  # int(40 * 0.75), with replacement
        same = (drawn.features[:, None] == ra_tta.read_database(one).features).all(-1)
        assert same.any(1).all() and same.any(0).sum() < 30
        assert np.array_equal(drawn.features, ra_tta.open_database(one, name).features)
    assert len(ra_tta.open_database(own, "food101")) == 40
    # without a place: where the download puts it; a place without their file is the database
    monkeypatch.setenv("TPT_NB_DATASETS", str(tmp_path / "sets"))
    assert ra_tta.find_database("", "food101", "ViT-B/16") is None
    there = tmp_path / "sets" / ra_tta.DATABASES / own.name
    write_database(there, rows)
    assert ra_tta.find_database("", "food101", "ViT-B/16") == there
    assert ra_tta.find_database(str(own), "food101", "ViT-B/16") == own


@pytest.mark.filterwarnings("ignore:the token")
def test_a_run_on_their_files(world, tmp_path):  # noqa: F811
    """Test embeddings, database and descriptions in their layout; no picture is read."""
    names = list(imagenet_classes("a").values())
    labels = [0, 3, 7, 3, 199]
    rows = [
        (unit(1, 32, seed=i).half(), unit(6, 32, seed=i + 9).half(), torch.tensor([y]))
        for i, y in enumerate(labels)
    ]
    net = world["model"].replace("/", "_")
    (tmp_path / "test_embedding" / net / "0").mkdir(parents=True)
    torch.save(rows, tmp_path / "test_embedding" / net / "0" / "imagenet_adversarial.pth")
    clip = models.load(world["model"], device="cpu")
    database = f"LAION2B_imagenet_adversarial_aux_{clip.name.replace('/', '_')}"
    write_database(tmp_path / "db_embedding" / database, unit(60, 32, seed=5).numpy())
    sentences = {n: [f"{n} seen {i} times" for i in range(6)] for n in names}
    (tmp_path / "descriptions").mkdir()
    path = tmp_path / "descriptions" / "CuPL_prompts_imagenet_adversarial.json"
    path.write_text(json.dumps(sentences))
    config = {
        "dataset": "imagenet-a", "model": world["model"], "device": "cpu", "method": "ra_tta",
        "embeddings": str(tmp_path / "test_embedding"), "database": str(tmp_path / "db_embedding"),
        "descriptions": str(tmp_path / "descriptions"), "wording": "single",
        "out": str(tmp_path / "runs"), "cache": str(tmp_path / "cache"),
    }  # fmt: skip
    done = runs.run(config, progress=False)
    assert done.config.options["q"] == 0.9  # the script of the ImageNet family
    assert [r["target"] for r in done.records] == labels
    assert done.records[0]["id"] == "imagenet_adversarial/00000"
    texts = ra_tta.embed_texts(clip, names, [sentences[n] for n in names])
    knowledge = ra_tta.read_database(tmp_path / "db_embedding" / database)
    for record, (image, views, _) in zip(done.records, rows, strict=True):
        x = F.normalize(torch.cat([image, views]).float(), dim=-1)
        options = ra_tta.Options(q=0.9)
        one = ra_tta.trace(x, texts, knowledge, float(clip.logit_scale), options)
        # classes whose words the tiny model has not seen look alike to it: ties
        assert float(one.p[record["pred_after"]]) == pytest.approx(float(one.p.max()), abs=1e-6)
        assert record["conf_after"] == pytest.approx(float(one.p.max()), abs=1e-5)
    common = {k: v for k, v in config.items() if k not in ("database", "descriptions", "wording")}
    part = runs.run({**common, "method": "vote", "reduced_size": 3}, progress=False)
    assert len(part.records) == 3  # any method runs on them
    with pytest.raises(ValueError, match=r"no .*imagenet_rendition.pth.*0/imagenet_adversarial"):
        runs.run({**config, "dataset": "imagenet-r"})
    with pytest.raises(ValueError, match="embeddings in place of pictures"):
        runs.data_of(done.config)[0][0]


def test_other_embeddings_are_named(tmp_path):
    torch.save([1, 2], tmp_path / "x.pth")
    with pytest.raises(ValueError, match="is no list of"):
        features.read_rows(tmp_path / "x.pth")
    torch.save([(unit(1, 8), unit(5, 8), 4)], tmp_path / "y.pth")
    with pytest.raises(ValueError, match="labels up to 4, food101 has 3 classes"):
        features.read_given(tmp_path / "y.pth", "food101", ["a", "b", "c"])
    with pytest.raises(ValueError, match="are in the files of the data set, which is not here"):
        datasets.known_classnames("food101")


# --- their folder on Google Drive ----------------------------------------------------------------


def test_the_folder_on_drive(tmp_path, monkeypatch):
    import gdown

    asked = {}

    def come(**options):
        asked.update(options)
        path = tmp_path / "db" / "LAION2B_food101_aux_ViT-B_16"
        path.write_bytes(b"\x80\x04 a pickle")
        return [str(path)]

    monkeypatch.delenv("TPT_NB_MIRROR", raising=False)
    monkeypatch.setattr(gdown, "download_folder", come)
    place = datasets.download(ra_tta.DATABASES, tmp_path / "db", progress=False)
    assert place == tmp_path / "db" and asked["id"] == "1EF8VgitV8xFatQAxNwpf1RTb2PhPQMah"
    assert asked["resume"] and asked["output"] == str(place)
    assert ra_tta.find_database(str(place), "food101", "ViT-B/16").is_file()

    def page(**options):
        (tmp_path / "db" / "LAION2B_dtd_aux_ViT-B_16").write_bytes(b"<!DOCTYPE html> quota")
        return [str(tmp_path / "db" / "LAION2B_dtd_aux_ViT-B_16")]

    monkeypatch.setattr(gdown, "download_folder", page)
    with pytest.raises(download.DownloadError, match="web page in place of LAION2B_dtd"):
        datasets.download(ra_tta.DATABASES, tmp_path / "db", progress=False)
    assert not (tmp_path / "db" / "LAION2B_dtd_aux_ViT-B_16").exists()

    def refuse(**options):
        raise RuntimeError("quota exceeded")

    monkeypatch.setattr(gdown, "download_folder", refuse)
    with pytest.raises(download.DownloadError, match="quota exceeded.*with a browser"):
        drive_folder.fetch_folder("abc", tmp_path / "db", progress=False)
