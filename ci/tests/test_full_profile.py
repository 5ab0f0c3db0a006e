"""What the full profile needs: declared, brought or said; rows are called by what was run.

A server on this machine stands for the net, through ``TPT_NB_MIRROR``.
"""

import dataclasses
import hashlib
import io
import json
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from tpt_nb import datasets, models, runs
from tpt_nb.core import machine
from tpt_nb.core.download import DownloadError, Source, fetch, mirrored
from tpt_nb.lessons import setup
from tpt_nb.runs import RunConfig, profile, start_name
from tpt_nb.runs.sweep import Row, table

FULL = {"dataset": "imagenet-a", "model": "RN50"}


class Files(SimpleHTTPRequestHandler):
    asked: list[str] = []

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.asked.append(self.path.strip("/"))
        super().do_GET()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder that is served in place of the net; what was asked of it is ``Files.asked``."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "SHA256SUMS").write_text("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(served)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    Files.asked.clear()
    monkeypatch.setenv("TPT_NB_MIRROR", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("TPT_NB_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("tpt_nb.core.download.WAIT", 0)
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def serve(served, name: str, content: bytes) -> None:
    (served / name).write_bytes(content)
    files = [p for p in sorted(served.iterdir()) if p.name != "SHA256SUMS"]
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in files]
    (served / "SHA256SUMS").write_text("".join(lines))


def context(seed: int, M: int = 4) -> bytes:
    """A checkpoint of CoOp's trainer with a context of its own."""
    ctx = torch.randn(M, 512, generator=torch.Generator().manual_seed(seed))
    content = io.BytesIO()
    torch.save({"state_dict": {"ctx": ctx.half()}, "epoch": 50}, content)
    return content.getvalue()


def coop_zip() -> bytes:
    """Laid out as the zip of CoOp's authors; every checkpoint another."""
    content, seed = io.BytesIO(), 0
    with zipfile.ZipFile(content, "w") as archive:
        for net in ("vit_b16", "rn101", "rn50"):
            for M, name in ((16, "nctx16_cscFalse_ctpend"), (4, "nctx4_cscFalse_ctpend")):
                for run in (3, 1, 2):
                    seed += 1
                    folder = f"to_gdrive/{net}_ep50_16shots/{name}/seed{run}/prompt_learner"
                    archive.writestr(f"{folder}/model.pth.tar-50", context(seed, M))
    return content.getvalue()


# --- one variable for all addresses --------------------------------------------------------------


def test_a_mirror_takes_the_place_of_all_addresses(mirror, tmp_path):
    source = Source("a file.bin", ("http://127.0.0.1:9/x", "gdrive:abc"), 3, "0" * 64)
    serve(mirror, "a file.bin", b"other bytes than those of the net")
    # a server on this machine may hold other files under these names, and says what they are
    assert (
        fetch(source, tmp_path / "to", False).read_bytes() == b"other bytes than those of the net"
    )
    assert Files.asked == ["SHA256SUMS", "a%20file.bin"]
    (mirror / "a file.bin").write_bytes(b"damaged")
    with pytest.raises(DownloadError, match="wrong bytes"):
        fetch(source, tmp_path / "again", False)


def test_a_mirror_elsewhere_does_not_change_what_is_right(monkeypatch):
    source = Source("x.tar", ("https://example.org/x.tar",), 5, "1" * 64, inner=("y",))
    monkeypatch.delenv("TPT_NB_MIRROR", raising=False)
    assert mirrored(source) == source
    monkeypatch.setenv("TPT_NB_MIRROR", "http://classroom.example/files/")
    assert mirrored(source) == dataclasses.replace(
        source, urls=("http://classroom.example/files/x.tar",)
    )
    monkeypatch.setenv("TPT_NB_MIRROR", "http://127.0.0.1.example.org")  # not this machine
    assert mirrored(source).sha256 == "1" * 64


# --- CoOp ----------------------------------------------------------------------------------------


def test_the_context_of_coops_authors_is_brought_once(mirror, tmp_path):
    serve(mirror, "coop-weights.zip", coop_zip())
    path = runs.coop_context("RN50", allowed=True)
    assert path.endswith("rn50_ep50_16shots/nctx4_cscFalse_ctpend/seed1/prompt_learner/"
                         "model.pth.tar-50")  # fmt: skip
    expected = torch.randn(4, 512, generator=torch.Generator().manual_seed(17)).half().float()
    assert torch.equal(models.load_coop(path, 4, 512), expected)
    asked = list(Files.asked)
    assert "vit_b16_ep50" in runs.coop_context("ViT-B/16") and runs.coop_context("RN50") == path
    assert Files.asked == asked == ["SHA256SUMS", "coop-weights.zip"]
    assert runs.coop_context("ViT-L/14") == ""  # they published none
    assert runs.coop_context("mini").endswith("coop.pth.tar")
    with pytest.raises(OSError, match="TPT_NB_DOWNLOAD=0 forbids|not hold it"):
        runs.coop_context("ViT-B/32")  # tests must not download


def test_where_the_zip_is_not_to_be_had_the_study_s_own_file_is_asked_for(mirror):
    serve(mirror, "rn50_nctx4_model.pth.tar-50", context(5))
    path = runs.coop_context("RN50", allowed=True)
    assert path.endswith("rn50_nctx4_model.pth.tar-50")
    with pytest.raises(OSError, match="coop-weights.zip could not be downloaded(.|\n)*coop=''"):
        runs.coop_context("RN101", allowed=True)  # the study's is for RN50 alone


@pytest.fixture
def all_but_coop(monkeypatch, tmp_path, mirror):
    """A machine with (pretended) GPU, weights and images, on which downloads are allowed."""
    folder = tmp_path / "datasets" / "imagenet-a" / "imagenet-a" / "n07753592"
    folder.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "x.png")
    monkeypatch.setattr(machine, "gpu_problem", lambda: "no CUDA GPU here")
    monkeypatch.setattr(profile, "weights_here", lambda model: True)
    monkeypatch.setenv("TPT_NB_PRETEND_GPU", "1")
    monkeypatch.setenv("TPT_NB_DOWNLOAD", "1")
    return mirror


def test_auto_is_full_with_the_context_and_says_what_lacks_without(all_but_coop):
    assert runs.choose_profile(RunConfig())[0] == "full"
    name, why = runs.choose_profile(RunConfig(coop="auto"))
    assert name == "mini" and "the CoOp context: coop-weights.zip could not" in why
    with pytest.raises(ValueError, match="the CoOp context(.|\n)*coop=''"):
        runs.resolve(RunConfig(coop="auto", profile="full"))
    serve(all_but_coop, "coop-weights.zip", coop_zip())
    config, why = runs.resolve(RunConfig(coop="auto"))
    assert config.profile == "full" and "rn50_ep50" in config.coop and config.device == "cpu"
    assert "TPT_NB_PRETEND_GPU" in why and start_name(config) == "CoOp prompt"
    config, _ = runs.resolve(RunConfig(coop="auto", dataset="imagenet-a", model="ViT-L/14"))
    assert config.coop == "" and start_name(config) == 'prompt "a photo of a"'
    config, _ = runs.resolve(RunConfig(coop="auto", profile="mini"))
    assert config.coop.endswith("coop.pth.tar") and start_name(config) == "CoOp prompt"


def test_a_row_without_coop_is_not_called_coop(tmp_path):
    common = {"dataset": "iconshift-v2", "model": "mini", "reduced_size": 2, "n_aug": 0}
    common |= {"method": "zero_shot", "device": "cpu", "out": str(tmp_path)}
    rows = []
    for coop in ("", "auto"):
        done = runs.run({**common, "coop": coop, "cache": str(tmp_path)}, progress=False)
        rows.append(Row("CoOp prompt", {}, run=done))
    assert [line["label"] for line in table(rows, "")] == ['prompt "a photo of a"', "CoOp prompt"]


# --- what else a notebook needs ------------------------------------------------------------------


def test_what_only_the_reader_can_give_is_said_before_anything_is_downloaded(all_but_coop):
    name, why = runs.choose_profile(RunConfig(), lacking="the parameter pictures")
    assert (name, why) == ("mini", "for full this notebook needs the parameter pictures")
    with pytest.raises(ValueError, match="not everything .*:\n- the parameter pictures\n"):
        runs.resolve(RunConfig(profile="full", coop="auto"), lacking="the parameter pictures")
    assert Files.asked == []


def test_other_data_sets_are_brought_too(all_but_coop, monkeypatch):
    asked = []

    def refused(name):
        asked.append(name)
        raise OSError("no room")

    monkeypatch.setattr(datasets, "download", refused)
    name, why = runs.choose_profile(RunConfig(), needs=["imagenet-v2"])
    assert name == "mini" and "the images of imagenet-v2: no room" in why
    monkeypatch.delenv("TPT_NB_DOWNLOAD")
    assert runs.choose_profile(RunConfig(), needs=["imagenet-v2"])[0] == "mini"
    assert asked == ["imagenet-v2"]  # nothing is downloaded on a guess
    assert runs.choose_profile(RunConfig(), needs=["imagenet-a"])[0] == "full"


def test_packages_are_installed_where_downloads_are_allowed(monkeypatch):
    ran = []
    monkeypatch.setattr(setup, "_pip", ran.append)
    monkeypatch.setenv("TPT_NB_DOWNLOAD", "1")
    setup.packages("pillow>=10", "no-such-package>=1.5")()
    assert ran == [["no-such-package>=1.5"]]
    monkeypatch.delenv("TPT_NB_DOWNLOAD")
    with pytest.raises(ValueError, match="pip install no-such-package>=1.5"):
        setup.packages("no-such-package>=1.5")()
    setup.packages("pillow")()
    assert len(ran) == 1


def test_a_pretended_gpu_chooses_the_profile_and_no_device(monkeypatch, capsys):
    monkeypatch.setattr(machine, "gpu_problem", lambda: "no CUDA GPU here")
    monkeypatch.setattr(profile, "weights_here", lambda model: False)
    monkeypatch.delenv("TPT_NB_DOWNLOAD")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "rehearsal")
    monkeypatch.setattr(setup, "install", lambda: None)
    monkeypatch.setenv("TPT_NB_PRETEND_GPU", "1")
    setup.start()
    out = capsys.readouterr().out
    assert "profile auto: full" in out and "device: CPU" in out and "as if there were a GPU" in out
    monkeypatch.delenv("TPT_NB_DOWNLOAD")  # start has set it, as on Colab
    assert runs.resolve(RunConfig(profile="mini"))[0].device == "cpu"


SMALL = {"device": "cpu", "reduced_size": 4, "n_aug": 2}


def test_in_mini_other_values_take_the_place_of_auto(monkeypatch, capsys):
    monkeypatch.setattr(machine, "gpu_problem", lambda: "no CUDA GPU here")
    mini = {"dataset": "iconshift-r"}
    assert setup.prepare(mini=mini, dataset="auto", **SMALL).images.name == "iconshift-r"
    assert "profile mini (no CUDA GPU here): mini on iconshift-r" in capsys.readouterr().out
    named = setup.prepare(mini=mini, dataset="iconshift-a", **SMALL)
    assert named.images.name == "iconshift-a"


def test_auto_never_ends_in_an_error_for_what_mini_cannot_take(monkeypatch, capsys):
    monkeypatch.setattr(machine, "gpu_problem", lambda: "no CUDA GPU here")

    def also(world):
        if world.config.options["captioner"] != "clip":
            raise ValueError("no hub here")

    values = {"method": "caption_prompts", "also": also, "mini": {"captioner": "auto"}}
    world = setup.prepare(captioner="vit-gpt2", **values, **SMALL)
    assert world.config.options["captioner"] == "clip"
    assert "profile mini cannot take captioner: no hub here" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no hub here"):  # what is wholly named is not exchanged
        setup.prepare(captioner="vit-gpt2", profile="mini", **values, **SMALL)


# --- the notebooks -------------------------------------------------------------------------------

STATES = {  # what each says in its code that full needs, and what its rows are called by
    "01": ('needs=["imagenet-v2"]',),
    "02": ("runs.coop_context(config.model)",),
    "03": ("coop=coop", "start = runs.start_name(config)"),
    "04": ("coop=coop", "start = runs.start_name(config)"),
    "05": ("coop=coop",),
    "06": ('"lacking": diffusion.lacking(generator)',),
    "07": ('setup.packages("transformers',),
    "08": ('"lacking": retrieval.lacking(',),
}


@pytest.mark.parametrize("number", STATES)
def test_a_notebook_states_what_it_needs(number):
    (path,) = (setup.REPO / "notebooks").glob(f"{number}_*.ipynb")
    cells = [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    code = "\n".join("".join(c["source"]) for c in cells)
    assert [text for text in STATES[number] if text not in code] == []
    assert "none in full" not in code  # the start that full had by mistake
