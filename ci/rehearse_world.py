"""The outside world of the full profile, small and made here: what downloads come from, a server.

``build`` draws it once into a folder: a CLIP of RN50's shape in OpenAI's archive format, ImageNet's
variants in the archives and layouts in which their authors publish them, CoOp's zip of checkpoints
as its trainer writes them, and what a reader brings: descriptions (CuPL's layout), an image
database (RA-TTA's pickle), a diffusion pipeline, ImageNet's own images. Weights are random and
images drawn: what is rehearsed is that everything fits together, not what comes out. ``Server``
serves it.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from tpt_nb.datasets import imagenet_classes
from tpt_nb.datasets.sources import SOURCES

WIDTH = 512  # of RN50's text tower, and of CoOp's context vectors
LAYERS = {  # blocks of the image tower and of the text tower, which is slow for 1,000 classes
    "RN50": ((3, 4, 6, 3), 2),
    "whole": ((3, 4, 6, 3), 12),
    "quick": ((1, 1, 1, 1), 1),
}
PER_CLASS = {"imagenet-a": 2, "imagenet-r": 1, "imagenet-v2": 2, "imagenet-sketch": 1}


def build(folder: Path, size: str = "RN50") -> Path:
    """The world in ``folder/<size>-<version>``, made if it is not there; returns that folder.

    ``size``: RN50 has its image tower and two of the twelve blocks of its text tower, which is what
    takes minutes on a CPU; whole has all; quick has the same widths, and a block per stage.
    """
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    world = folder / f"{size}-{version}"
    if (world / "served" / "SHA256SUMS").is_file():
        return world
    shutil.rmtree(world, ignore_errors=True)
    served, given = world / "served", world / "given"
    served.mkdir(parents=True)
    given.mkdir()
    weights(served / "RN50.pt", *LAYERS[size])
    coop(served / SOURCES["coop-weights"][0].filename)
    archives(served)
    knowledge(given)
    pipeline(given / "pipeline")
    variations(given / "generated")
    for label, synset in enumerate(imagenet_classes()):  # as torchvision sorts what is downloaded
        path = given / "datasets" / "imagenet" / "val" / synset / f"ILSVRC2012_val_{label:08d}.JPEG"
        path.parent.mkdir(parents=True)
        path.write_bytes(drawn("imagenet", label, 0))
    lines = [f"{sha256(p)}  {p.name}" for p in sorted(served.iterdir())]
    (served / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    return world


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- models --------------------------------------------------------------------------------------


def weights(path: Path, image_layers: tuple[int, ...], text_layers: int) -> None:
    """An archive as OpenAI publishes them: TorchScript, float16, three integers beside them."""
    import open_clip

    config = open_clip.get_model_config("RN50")
    config["vision_cfg"]["layers"] = image_layers
    config["text_cfg"]["layers"] = text_layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**config)
        for module in model.modules():  # as it is made, batch norm would hide half of the network
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                torch.nn.init.uniform_(module.weight, 0.5, 1)
        model.token_embedding.weight.data.mul_(3)  # classes differ, as in a trained one
        model.logit_scale.data.fill_(4.6)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    state |= {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77)}
    state["vocab_size"] = torch.tensor(49408)
    root = torch.nn.Module()
    for key, value in state.items():
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


def coop(path: Path) -> None:
    """The zip of CoOp's authors: for each model, M and seed what the trainer saves."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (net, M, seed) in enumerate(
            (net, M, seed)
            for net in ("rn50", "rn101", "vit_b16", "vit_b32")
            for M in (4, 16)
            for seed in (1, 2)
        ):
            ctx = torch.randn(M, WIDTH, generator=torch.Generator().manual_seed(number)) / 30
            parameter = torch.nn.Parameter(ctx.half())
            optimizer = torch.optim.SGD([parameter], lr=0.002, momentum=0.9)
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            state = {"ctx": ctx.half(), "token_prefix": torch.zeros(1000, 1, WIDTH).half()}
            state["token_suffix"] = torch.zeros(1000, 76 - M, WIDTH).half()
            checkpoint = {"state_dict": state, "epoch": 50, "optimizer": optimizer.state_dict()}
            # the warm-up scheduler of the trainer keeps the next one, an object, in its state
            after = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
            checkpoint["scheduler"] = {"successor": after, "warmup_epoch": 1, "last_epoch": 50}
            checkpoint["val_result"] = np.float64(62.3)
            content = io.BytesIO()
            torch.save(checkpoint, content)
            folder = f"to_gdrive/{net}_ep50_16shots/nctx{M}_cscFalse_ctpend/seed{seed}"
            archive.writestr(f"{folder}/prompt_learner/model.pth.tar-50", content.getvalue())


def pipeline(folder: Path) -> None:
    """A diffusers pipeline of the kind that DiffTPT uses, tiny and with random weights."""
    import diffusers
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16,
        )  # fmt: skip
        vision = transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=37, projection_dim=32, num_hidden_layers=1,
            num_attention_heads=2, image_size=32, patch_size=8,
        )  # fmt: skip
        encoder = transformers.CLIPVisionModelWithProjection(vision)
    made = diffusers.StableDiffusionImageVariationPipeline(
        vae=vae, unet=unet, image_encoder=encoder, safety_checker=None,
        scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False,
        feature_extractor=transformers.CLIPImageProcessor(crop_size=32, size=32),
    )  # fmt: skip
    made.save_pretrained(folder)


# --- images --------------------------------------------------------------------------------------


def drawn(name: str, label: int, k: int) -> bytes:
    """A JPEG file: an ellipse whose colour and place belong to the class, on ground of the set."""
    rng = np.random.default_rng([sum(name.encode()), label, k])
    width, height = (int(v) for v in rng.integers(90, 160, 2))
    of_class = np.random.default_rng(label).integers(0, 256, 3)
    image = Image.new("RGB", (width, height), tuple(int(v) for v in rng.integers(0, 256, 3)))
    left, top = (float(v) for v in rng.uniform(0.1, 0.5, 2) * (width, height))
    box = (left, top, left + 0.4 * width, top + 0.4 * height)
    ImageDraw.Draw(image).ellipse(box, fill=tuple(int(v) for v in of_class))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return content.getvalue()


def members(name: str) -> Iterator[tuple[str, bytes]]:
    """(path in the archive, content) of a set, laid out as its authors do."""
    every = list(imagenet_classes())
    variant = name[-1] if name in ("imagenet-a", "imagenet-r") else ""
    chosen = list(imagenet_classes(variant))
    if variant:
        yield f"{name}/README.txt", b"drawn for the rehearsal\n"
    for synset in chosen:
        label = every.index(synset)
        for k in range(PER_CLASS[name]):
            content = drawn(name, label, k)
            digest = hashlib.sha1(content).hexdigest()
            yield (
                {
                    "imagenet-a": f"imagenet-a/{synset}/0.00{k}_thing _ thing_0.{label}.jpg",
                    "imagenet-r": f"imagenet-r/{synset}/art_{k}.jpg",
                    "imagenet-v2": f"imagenetv2-matched-frequency-format-val/{label}/{digest}.jpeg",
                    "imagenet-sketch": f"sketch/{synset}/sketch_{k}.JPEG",
                }[name],
                content,
            )


def archives(folder: Path) -> None:
    """The archives of the four sets that can be downloaded, under their names."""
    for name in PER_CLASS:
        path = folder / SOURCES[name][0].filename
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as zipped:
                for member, content in members(name):
                    zipped.writestr(member, content)
        else:
            with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
                for member, content in members(name):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def knowledge(folder: Path) -> None:
    """Descriptions of all classes as CuPL has them; embeddings as RA-TTA's authors pickle them."""
    looks = ("a round shape", "a smooth surface", "two colours", "a dark outline", "a small body")
    names = dict.fromkeys(imagenet_classes().values())
    texts = {n: [f"A {n} has {look}." for look in looks] for n in names}
    (folder / "CuPL_prompts_imagenet_adversarial.json").write_text(json.dumps(texts))
    vectors = np.random.default_rng(0).normal(size=(2000, 1024)).astype(np.float16)
    (folder / "db_embedding").mkdir()
    place = folder / "db_embedding" / "LAION2B_imagenet_adversarial_aux_RN50"
    with open(place, "wb") as file:
        pickle.dump({"embedding": vectors}, file)


def variations(folder: Path, count: int = 4) -> None:
    """Pictures of ImageNet-A named as by DiffTPT's script: ``<class>/<name>_<i>.jpg``."""
    for member, _ in members("imagenet-a"):
        *_, synset, file = member.split("/")
        if file.endswith(".jpg"):
            (folder / synset).mkdir(parents=True, exist_ok=True)
            label = int(file.removesuffix(".jpg").rsplit(".", 1)[1])
            for i in range(count):
                path = folder / synset / f"{file.removesuffix('.jpg')}_{i}.jpg"
                path.write_bytes(drawn("generated", label, i))


# --- the server ----------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Serves a folder on this machine; ``asked`` are the paths that were asked for, in order."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        """For ``TPT_NB_MIRROR``."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    """Files of the server's folder, from the byte that is asked for."""

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        self.server.asked.append(path.name)
        if not path.is_file():
            return self.send_error(404)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        size = path.stat().st_size
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        with open(path, "rb") as file:
            file.seek(start)
            shutil.copyfileobj(file, self.wfile)


if __name__ == "__main__":
    print(build(Path(os.environ.get("TPT_NB_CACHE", "out/cache")) / "rehearsal"))
