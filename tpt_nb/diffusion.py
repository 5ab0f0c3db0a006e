"""Views from a diffusion model, and DiffTPT, which filters them and tunes the prompt on them.

Feng et al., "Diverse Data Augmentation with Diffusions for Effective Test-time Prompt Tuning",
2023.

Three parts, in the order in which a run needs them:

- *Generators* make variations of an image, each from its own seed. ``mini`` is embedded: a small
  diffusion model of IconShift, conditioned on MiniCLIP's embedding of the image
  (``data/diffusion``). Any other name is a ``diffusers`` pipeline, on the hub or in a folder; the
  paper's is ``lambdalabs/sd-image-variations-diffusers@v2.0``. A name may carry options:
  ``mini:steps=4,guidance=1``.
- *The cache.* Variations cost far more than all the rest, so they are made once (:func:`generate`,
  ``python -m tpt_nb generate``), one PNG per image in a folder per (data set, generator, seed), and
  read from there; a killed generation goes on. What ships with the repository is read too.
- *The methods* filter the views by their similarity to the image, then by their entropy, and tune
  the prompt on what is left. Paper and published code differ in the first filter:

==================  ============================  ================================
..                  ``difftpt_paper``             ``difftpt_code``
==================  ============================  ================================
cosine of           image features                logit vectors
is asked of         generated views only          all views but the image itself
keeps               0.8 of them                   0.8 of them
then, by entropy    0.3 of what is left           0.3 of what is left
==================  ============================  ================================

With ``generator="crops"`` the generated views are as many further crops: the control that the paper
lacks. Only making new pictures needs ``diffusers``.
"""

import functools
import hashlib
import io
import json
import os
import re
import time
import types
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import Tensor

from tpt_nb.adapt import METHODS, Adapted, _check_features, _initial_logits, tpt
from tpt_nb.methods import vote
from tpt_nb.paths import DATA, cache_dir
from tpt_nb.views import as_rgb, center_view

SIDE = 32  # pixels of what the embedded generator makes
CHUNK = 8  # variations that it makes at once, always: rounding is then the same for each of them
WEIGHTS = DATA / "diffusion" / "generator.safetensors"
SHIPPED = DATA / "diffusion" / "pictures"
PAPER = "lambdalabs/sd-image-variations-diffusers@v2.0"
FORMAT = 1  # of the cache
COLUMNS = 8  # pictures in a row of a cached PNG
UNET = {  # diffusers' UNet2DConditionModel, without text: the embedding of an image is its class
    "sample_size": SIDE // 2,
    "in_channels": 12 + 16,  # blocks of 2 x 2 pixels as channels, and the map of the embedding
    "out_channels": 12,
    "block_out_channels": (64, 96, 160),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("UpBlock2D",) * 3,
    "norm_num_groups": 16,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 256,
    "resnet_time_scale_shift": "scale_shift",
}
NOISE = {  # diffusers' schedulers: cosine, from pure noise, the network predicts the velocity
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def require_diffusers() -> types.ModuleType:
    """The package ``diffusers``; ``ValueError`` with what to install where it is missing."""
    try:
        import diffusers
    except ImportError:
        raise ValueError(
            "making variations needs diffusers: pip install -r ci/requirements-extras.txt. "
            "Everything else works without it."
        ) from None
    return diffusers


# --- the embedded generator ----------------------------------------------------------------------


class Network(torch.nn.Module):
    """The embedded generator's network: diffusers' UNet, and a map from the embedding to places.

    The UNet is told the embedding everywhere alike, in each of its blocks, as classes are. The map
    tells it too what to expect *where* (16 channels of 8 x 8): a small network learns shapes far
    sooner with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unet = require_diffusers().UNet2DConditionModel(**UNET)
        self.map = torch.nn.Sequential(
            torch.nn.Linear(256, 512), torch.nn.SiLU(), torch.nn.Linear(512, 16 * 8 * 8)
        )
        self.share = 1.0  # of the map; 0 while training goes without it

    def forward(self, noisy: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity ``[B,3,S,S]`` of noisy images at timesteps ``t`` ``[B]``.

        ``condition`` ``[B,256]`` are standardised embeddings; zeros mean no condition.
        """
        x = F.pixel_unshuffle(noisy, 2)
        places = self.share * self.map(condition).unflatten(1, (16, 8, 8))
        places = F.interpolate(places.to(x.dtype), scale_factor=2, mode="bilinear")
        x = torch.cat([x, places], 1)
        out = self.unet(x, t, encoder_hidden_states=None, class_labels=condition).sample
        return F.pixel_shuffle(out.float(), 2)


def _digest(path: Path, start: str = "") -> str:
    """Hash of the tensors of a safetensors file whose names begin so: 16 hexadecimal digits."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(path, framework="np") as file:
        for name in sorted(n for n in file.keys() if n.startswith(start)):  # noqa: SIM118
            value = file.get_tensor(name)
            digest.update(f"{name} {value.shape} {value.dtype}".encode() + value.tobytes())
    return digest.hexdigest()[:16]


def build_schedule():
    """The noise schedule of the embedded generator, with DDIM as its sampler."""
    return require_diffusers().DDIMScheduler(**NOISE)


@torch.no_grad()
def denoise(
    network: Callable,
    schedule,
    noise: Tensor,
    condition: Tensor,
    steps: int = 10,
    guidance: float = 2.0,
    watch: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021) from ``noise`` ``[B,3,S,S]`` to images in [-1,1].

    Classifier-free guidance (Ho and Salimans 2022): the prediction goes ``guidance`` times as far
    from that without a condition; 1 is the plain prediction, at half the price.

    Args:
        watch: called after each step with (timestep, the noisy images, the clean images guessed).
    """
    schedule.set_timesteps(steps)
    x, b = noise, len(noise)
    for t in schedule.timesteps:
        if guidance == 1:
            v = network(x, t.expand(b), condition)
        else:
            both = torch.cat([condition, torch.zeros_like(condition)])
            v = network(x.repeat(2, 1, 1, 1), t.expand(2 * b), both)
            v = v[b:] + guidance * (v[:b] - v[b:])
        step = schedule.step(v, t, x)
        x = step.prev_sample
        if watch:
            watch(int(t), x, step.pred_original_sample)
    return x.clamp(-1, 1)


def _bytes(images: Tensor) -> Tensor:
    """[-1,1] -> uint8."""
    return (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


@dataclass
class MiniGenerator:
    """The embedded generator: 32 px variations of an image from MiniCLIP's embedding of it.

    Args:
        steps: of DDIM.
        guidance: see :func:`denoise`.
        weights: a file that ``data/diffusion/train.py`` wrote.
    """

    steps: int = 10
    guidance: float = 2.0
    weights: Path = WEIGHTS
    device: str = "cpu"

    side = SIDE
    usual = 16  # variations per image, where nothing else is asked for

    def __post_init__(self) -> None:
        _check_sampling(self.steps, self.guidance)
        if not Path(self.weights).is_file():
            raise ValueError(
                f"{self.weights}: missing. Restore it with `git checkout`, or train it again: "
                "python data/diffusion/train.py --help"
            )

    def spec(self) -> dict:
        """What the pictures depend on, beside image and seed."""
        from tpt_nb.clip import MINI_PATH

        # the condition comes from MiniCLIP: other weights of its image tower, other pictures
        digests = [_digest(Path(self.weights)), _digest(MINI_PATH, "visual.")]
        return {
            "generator": "mini",
            "weights": digests,
            "steps": self.steps,
            "guidance": float(self.guidance),
            "side": self.side,
        }

    @functools.cached_property
    def parts(self) -> tuple:
        """(network, schedule, MiniCLIP, mean and std of embeddings)."""
        from safetensors.torch import load_file

        from tpt_nb import clip

        state = {key: value.float() for key, value in load_file(self.weights).items()}
        center, spread = state.pop("condition.mean"), state.pop("condition.std")
        network = Network()
        network.load_state_dict(state)
        network = network.eval().requires_grad_(False).to(self.device)
        mini = clip.load("mini", device=self.device)
        return network, build_schedule(), mini, center.to(self.device), spread.to(self.device)

    def condition(self, image: Image.Image) -> Tensor:
        """Standardised embedding ``[256]`` of an image."""
        _, _, mini, center, spread = self.parts
        pixels = np.asarray(center_view(as_rgb(image), mini.image_size)).copy()
        view = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        return (mini.encode_views(view)[0] - center) / spread

    def make(self, image: Image.Image, seeds: Sequence[int]) -> Tensor:
        """One variation per seed: uint8 ``[n,3,32,32]``."""
        network, schedule, *_ = self.parts
        condition = self.condition(image)
        noise = torch.stack([start_noise(seed) for seed in seeds])
        made = []
        for some in noise.split(CHUNK):
            n = len(some)
            some = torch.cat([some, some.new_zeros(CHUNK - n, *some.shape[1:])])
            some = some.to(self.device)
            rows = condition.expand(CHUNK, -1)
            out = denoise(network, schedule, some, rows, self.steps, self.guidance)
            made.append(_bytes(out[:n]).cpu())
        return torch.cat(made)


def start_noise(seed: int) -> Tensor:
    """The noise that the variation with this seed starts from: ``[3,32,32]``."""
    return torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def _check_sampling(steps: int, guidance: float) -> None:
    if steps < 1 or not guidance >= 0:
        raise ValueError(
            f"a generator takes steps >= 1 and guidance >= 0; got {steps}, {guidance}."
        )


# --- any pipeline --------------------------------------------------------------------------------


@dataclass
class PipelineGenerator:
    """Variations by a ``diffusers`` pipeline that takes an image.

    Args:
        name: id on the hub, with ``@revision`` if it has one, or a folder.
        steps: of denoising; None leaves it to the pipeline (50 for the paper's). Distilled models
            take 1 to 4.
        guidance: 3 as in the paper's code; None leaves it to the pipeline.
        batch: variations at once (the paper's code has 5); changes pictures by rounding at most.
        side: pictures are kept at this size; CLIP sees 224.
        device: half precision on a GPU.

    ``StableDiffusionImageVariationPipeline`` gets its image as the paper's code gives it: squeezed
    to 224 x 224, bicubic without antialiasing, normalised as CLIP's. Others get the picture, and an
    empty prompt if they take one.
    """

    name: str = PAPER
    steps: int | None = None
    guidance: float | None = 3.0
    batch: int = 5
    side: int = 224
    device: str = "cpu"

    usual = 63

    def __post_init__(self) -> None:
        _check_sampling(1 if self.steps is None else self.steps, self.guidance or 0.0)
        if self.batch < 1 or self.side < 1:
            raise ValueError(f"batch and side must be 1 or more; got {self.batch}, {self.side}.")

    def spec(self) -> dict:
        """What the pictures depend on, beside image and seed. A folder counts by its content."""
        name = self.name
        if Path(name).is_dir():
            h = hashlib.sha256()
            for path in sorted(p for p in Path(name).rglob("*") if p.is_file()):
                h.update(f"{path.relative_to(name)} {path.stat().st_size} ".encode())
                with path.open("rb") as file:  # the first MiB: weights of gigabytes differ there
                    h.update(file.read(1 << 20))
            name = f"{Path(name).name} {h.hexdigest()[:16]}"
        return {
            "generator": name,
            "steps": self.steps,
            "guidance": None if self.guidance is None else float(self.guidance),
            "side": self.side,
        }

    @functools.cached_property
    def pipeline(self):
        """The pipeline, loaded when first used."""
        diffusers = require_diffusers()
        folder = Path(self.name).is_dir()
        name, _, revision = (self.name, "", "") if folder else self.name.partition("@")
        half = torch.device(self.device).type == "cuda"
        try:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(name, revision=revision or None)
        except (OSError, ImportError) as error:
            raise ValueError(
                f"cannot load the diffusion pipeline {self.name!r}: {str(error).strip()}. It takes "
                "an id on the Hugging Face hub (id@revision), or a folder made by save_pretrained; "
                "pip install -r ci/requirements-extras.txt brings what pipelines need."
            ) from error
        if getattr(pipeline, "safety_checker", None) is not None:
            pipeline.safety_checker = None  # it blackens pictures; the paper's code has it off
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device, torch.float16 if half else torch.float32)

    def make(self, image: Image.Image, seeds: Sequence[int]) -> Tensor:
        """One variation per seed: uint8 ``[n,3,side,side]``."""
        import inspect

        takes = inspect.signature(self.pipeline.__call__).parameters
        if "image" not in takes:
            raise ValueError(
                f"the pipeline {self.name!r} ({type(self.pipeline).__name__}) takes no image; a "
                "pipeline for image variations or image-to-image does."
            )
        options = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        options = {key: v for key, v in options.items() if v is not None and key in takes}
        image, made = as_rgb(image), []
        for start in range(0, len(seeds), self.batch):
            some = seeds[start : start + self.batch]
            draws = [torch.Generator().manual_seed(seed) for seed in some]
            if type(self.pipeline).__name__ == "StableDiffusionImageVariationPipeline":
                options["image"] = _clip_input(image, self.pipeline).expand(len(some), -1, -1, -1)
            else:
                options["image"] = [image] * len(some)
            if "prompt" in takes:
                options["prompt"] = [""] * len(some)
            done = self.pipeline(**options, generator=draws, output_type="pil").images
            for picture in done:
                view = center_view(picture.convert("RGB"), self.side)
                made.append(torch.from_numpy(np.asarray(view).copy()).permute(2, 0, 1))
        return torch.stack(made)


def _clip_input(image: Image.Image, pipeline) -> Tensor:
    """``[1,3,224,224]`` as DiffTPT's generation script prepares it."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
    size = pipeline.image_encoder.config.image_size
    x = F.interpolate(x, (size, size), mode="bicubic", align_corners=False, antialias=False)
    mean = torch.tensor(OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(OPENAI_DATASET_STD).view(1, 3, 1, 1)
    return ((x - mean) / std).to(pipeline.device, pipeline.dtype)


def load_generator(name: str = "mini", device: str = "cpu") -> MiniGenerator | PipelineGenerator:
    """A generator by name: ``mini``, or a pipeline; options behind a colon.

    For example "mini:steps=4,guidance=1", or the paper's with fewer steps: ``PAPER + ":steps=25"``.
    Raises ``ValueError`` for options that it does not have.
    """
    name, options = split_name(name)
    kinds = {"steps": int, "guidance": float}
    if name != "mini":
        kinds |= {"batch": int, "side": int}
    values = {}
    for key, text in options.items():
        if key not in kinds:
            raise ValueError(
                f"generator {name!r} has no option {key!r}; known: {', '.join(kinds)}."
            )
        try:
            values[key] = kinds[key](text)
        except ValueError:
            raise ValueError(f"generator {name!r}: {key} is {text!r}, not a number.") from None
    if name == "mini":
        return MiniGenerator(**values, device=device)
    return PipelineGenerator(name, **values, device=device)


def usual_number(name: str) -> int:
    """How many variations of an image a generator makes where nothing is said."""
    small = split_name(name)[0] in ("mini", "crops")
    return MiniGenerator.usual if small else PipelineGenerator.usual


def split_name(name: str) -> tuple[str, dict[str, str]]:
    """ "mini:steps=4,guidance=1" -> ("mini", {"steps": "4", "guidance": "1"})."""
    match = re.fullmatch(r"(.+?)(?::((?:\w+=[^,=]*,?)+))?", name.strip())
    if not match:
        raise ValueError(f"generator is {name!r}; expected a name, or name:option=value,...")
    pairs = [part.split("=") for part in (match[2] or "").split(",") if part]
    return match[1], dict(pairs)


def picture_seed(seed: int, image_id: str, k: int) -> int:
    """Seed of variation k of an image; it does not depend on how many there are."""
    digest = hashlib.blake2b(f"{int(seed)}\0{image_id}\0{k}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def variations(
    image: Image.Image, n: int, generator="mini", seed: int = 0, image_id: str = ""
) -> Tensor:
    """``n`` variations of one image, online: uint8 ``[n,3,S,S]``."""
    if isinstance(generator, str):
        generator = load_generator(generator)
    return generator.make(image, [picture_seed(seed, image_id, k) for k in range(n)])


# --- the cache -----------------------------------------------------------------------------------


@dataclass
class Pictures:
    """Variations of images of one data set by one generator from one seed, on disk.

    ``folder`` is where they are written and looked for first; ``archive`` is a zip file of such a
    folder. The name of both has a hash of ``key``, which is also what ``manifest.json`` holds.
    """

    key: dict
    folder: Path
    archive: Path
    command: str = field(default="", repr=False)

    def read(self, image_id: str, n: int) -> Tensor | None:
        """The first ``n`` variations, uint8 ``[n,3,S,S]``; None if there are not as many."""
        data = self._data(image_id)
        if data is None:
            return None
        pictures, _ = unpack(data)
        return pictures[:n] if len(pictures) >= n else None

    def seconds(self, image_id: str, n: int) -> float:
        """What making the first ``n`` variations of an image took, when it was done."""
        pictures, seconds = unpack(self._data(image_id))
        return seconds * n / len(pictures)

    def missing(self, ids: Sequence[str], n: int) -> list[str]:
        """The ids of images that have fewer than ``n`` variations, or damaged ones."""

        def there(image_id: str) -> bool:
            try:
                return self.read(image_id, n) is not None
            except (OSError, ValueError):
                return False

        return [image_id for image_id in ids if not there(image_id)]

    def check(self, ids: Sequence[str], n: int) -> None:
        """Raise ``ValueError`` with the command that makes them unless all variations are there."""
        missing = self.missing(ids, n)
        if not missing:
            return
        about = f"{len(missing)} of {len(ids)} images of {self.key['dataset']['name']} have no " + (
            f"{n} variations by {self.key['generator']['generator']} (seed {self.key['seed']}) in "
            f"{self.folder}"
        )
        other = self._other()
        other = f". What is in {other[0].name} differs in {', '.join(other[1])}" if other else ""
        raise ValueError(f"{about}{other}. Make them with: {self.command}")

    def _data(self, image_id: str) -> bytes | None:
        name = file_name(image_id)
        if (self.folder / name).is_file():
            return (self.folder / name).read_bytes()
        if self.archive.is_file():
            with zipfile.ZipFile(self.archive) as archive:
                if name in archive.NameToInfo:
                    return archive.read(name)
        return None

    def _other(self) -> tuple[Path, list[str]] | None:
        """A cache of the same data set made otherwise, and in what it differs."""
        for path in sorted(self.folder.parent.glob("*/manifest.json")):
            try:
                theirs, mine = (_flat(k) for k in (json.loads(path.read_text())["key"], self.key))
            except (ValueError, KeyError, OSError):
                continue
            if theirs.get("dataset.name") != mine["dataset.name"]:
                continue
            differ = [k for k in {**theirs, **mine} if theirs.get(k) != mine.get(k)]
            if differ:
                return path.parent, differ
        return None


def _flat(values: Mapping, front: str = "") -> dict:
    out = {}
    for key, value in values.items():
        out |= (
            _flat(value, f"{front}{key}.") if isinstance(value, Mapping) else {front + key: value}
        )
    return out


def file_name(image_id: str) -> str:
    """Name of an image's file: readable, and as unique as the id."""
    digest = hashlib.sha256(image_id.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', image_id)[-60:]}.{digest}.png"


def pictures_of(
    dataset, generator, seed: int = 0, cache: Path | str | None = None, command: str = ""
) -> Pictures:
    """Where the variations of a data set are, or will be; nothing is read or made."""
    key = {
        "format": FORMAT,
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint},
        "generator": generator.spec(),
        "seed": int(seed),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{dataset.name}-{digest}"
    root = Path(cache or cache_dir()) / "generated"
    return Pictures(key, root / name, SHIPPED / f"{name}.zip", command)


def generate(
    dataset,
    generator,
    n: int,
    seed: int = 0,
    cache: Path | str | None = None,
    progress: bool = True,
) -> Pictures:
    """Make ``n`` variations of every image of a data set, those that are not there yet.

    A picture depends on (image, generator, seed, its number) alone. Each image's file is written
    whole or not at all, so a killed call is simply repeated. Where there are fewer than ``n``, only
    the further ones are made.

    Raises:
        ValueError: ``n`` < 1, or what the generator raises.
    """
    from tpt_nb.encode import _write_atomically

    if n < 1:
        raise ValueError(f"n is {n}; at least one variation per image.")
    pictures = pictures_of(dataset, generator, seed, cache)
    missing = set(pictures.missing(list(dataset.ids), n))
    if not missing:
        return pictures
    pictures.folder.mkdir(parents=True, exist_ok=True)
    about = {"key": pictures.key, "made_with": _made_with(generator)}
    text = json.dumps(about, indent=1) + "\n"
    _write_atomically(pictures.folder / "manifest.json", text.encode())
    with _bar(len(dataset.ids), len(missing), generator.spec()["generator"], progress) as bar:
        for i, image_id in enumerate(dataset.ids):
            if image_id not in missing:
                continue
            old, seconds = torch.empty(0), 0.0
            try:
                data = pictures._data(image_id)
                if data is not None:
                    old, seconds = unpack(data)
            except (OSError, ValueError):
                pass  # damaged: made again
            image = dataset[i][0]
            start = time.perf_counter()
            fresh = generator.make(
                image, [picture_seed(seed, image_id, k) for k in range(len(old), n)]
            )
            seconds += time.perf_counter() - start
            whole = torch.cat([old, fresh]) if len(old) else fresh
            _write_atomically(pictures.folder / file_name(image_id), pack(whole, seconds))
            bar.update()
    return pictures


def pack(pictures: Tensor, seconds: float) -> bytes:
    """uint8 ``[n,3,S,S]`` as one PNG, eight in a row, with their number and what they took."""
    n, side = len(pictures), pictures.shape[-1]
    sheet = np.zeros((-(-n // COLUMNS) * side, COLUMNS * side, 3), np.uint8)
    for k, picture in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
        y, x = k // COLUMNS * side, k % COLUMNS * side
        sheet[y : y + side, x : x + side] = picture
    text = PngImagePlugin.PngInfo()
    text.add_text("pictures", str(n))
    text.add_text("seconds", f"{seconds:.4f}")
    out = io.BytesIO()
    Image.fromarray(sheet).save(out, "PNG", pnginfo=text, optimize=True)
    return out.getvalue()


def unpack(data: bytes) -> tuple[Tensor, float]:
    """The reverse of :func:`pack`. Raises ``OSError`` or ``ValueError`` for damaged data."""
    with Image.open(io.BytesIO(data)) as sheet:
        try:
            n, seconds = int(sheet.text["pictures"]), float(sheet.text["seconds"])
        except KeyError:
            raise ValueError("a PNG without the number of its pictures") from None
        pixels = torch.from_numpy(np.array(sheet.convert("RGB"))).permute(2, 0, 1)
    side = pixels.shape[-1] // COLUMNS
    cells = pixels.unfold(1, side, side).unfold(2, side, side)  # [3,rows,8,S,S]
    return cells.flatten(1, 2).transpose(0, 1)[:n].contiguous(), seconds


def ship(pictures: Pictures, ids: Sequence[str]) -> Path:
    """Put the variations of these images into the archive that the repository ships."""
    pictures.archive.parent.mkdir(parents=True, exist_ok=True)
    temporary = pictures.archive.with_suffix(".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        names = ["manifest.json", *(file_name(image_id) for image_id in ids)]
        for name in names:  # a fixed date: the same pictures make the same file
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, (pictures.folder / name).read_bytes())
    temporary.replace(pictures.archive)
    return pictures.archive


def _made_with(generator) -> dict:
    from tpt_nb.experiment import device_name, versions

    out = versions()
    for name in ("diffusers", "transformers"):
        try:
            from importlib import metadata

            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out | {"device": device_name(str(generator.device))}


def _bar(total: int, missing: int, name: str, progress: bool):
    from tqdm.auto import tqdm

    off = {} if progress and not os.environ.get("TQDM_DISABLE") else {"disable": True}
    return tqdm(total=total, initial=total - missing, desc=f"generate {name}", unit="image", **off)


# --- pictures as views ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """Getter of an image's pictures, side by side in one picture; picklable."""

    pictures: Pictures
    ids: tuple[str, ...]
    n: int

    def __call__(self, i: int) -> Image.Image:
        got = self.pictures.read(self.ids[i], self.n)
        return Image.fromarray(torch.cat(list(got), 2).permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class Row:
    """An "augmenter" that cuts a row of ``n`` square pictures into views; nothing is random."""

    n: int
    size: int

    @property
    def n_views(self) -> int:
        return self.n

    @property
    def groups(self) -> tuple[int, int]:
        return 1, self.n

    def spec(self) -> dict:
        return {"class": "Row", "version": 1, "n": self.n, "size": self.size}

    def __call__(self, image: Image.Image, seed: int = 0) -> Tensor:
        """Views ``[n,3,size,size]`` uint8: each picture resized (bicubic), its centre."""
        side = image.width // self.n
        cells = [image.crop((k * side, 0, (k + 1) * side, side)) for k in range(self.n)]
        views = np.stack([np.asarray(center_view(cell, self.size)) for cell in cells])
        return torch.from_numpy(views).permute(0, 3, 1, 2)


def generated_features(dataset, clip, pictures: Pictures, n: int, cache=None, progress=True):
    """Features ``[N,n,D]`` of the first ``n`` variations of each image, as ``encode.Features``.

    Kept in the feature cache like those of any views; ``ValueError`` if pictures are missing.
    """
    from tpt_nb.datasets import Dataset
    from tpt_nb.encode import encode

    pictures.check(list(dataset.ids), n)
    digest = hashlib.sha256(json.dumps(pictures.key, sort_keys=True).encode()).hexdigest()[:16]
    rows = Dataset(
        name=f"{dataset.name}-generated",
        classnames=list(dataset.classnames),
        ids=list(dataset.ids),
        targets=list(dataset.targets),
        fingerprint=digest,
        fetch=_Stored(pictures, tuple(dataset.ids), n),
    )
    return encode(rows, clip, Row(n, clip.image_size), cache=cache, workers=0, progress=progress)


# --- filters -------------------------------------------------------------------------------------


def most_similar(views: Tensor, original: Tensor, keep: float) -> Tensor:
    """Indices ``[B,k]`` of the views most similar to the original, in the order of the views.

    Args:
        views: ``[B,V,D]`` features or logits.
        original: ``[B,D]``.
        keep: fraction in [0,1]; k = int(V * keep), as the published code rounds.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep is {keep}; it must be a fraction in [0,1], DiffTPT has 0.8.")
    cosine = F.cosine_similarity(views, original[:, None], dim=-1)
    k = int(views.shape[1] * keep + 1e-9)  # 0.7 * 10 is a little less than 7
    best = cosine.argsort(dim=1, descending=True, stable=True)[:, :k]
    return best.sort(dim=1).values


def filter_views(
    features: Tensor,
    generated: Tensor,
    logits: Tensor | None = None,
    scope: str = "generated",
    keep: float = 0.8,
) -> Tensor:
    """Indices ``[B,k]`` into the views (features, then generated) that the cosine filter keeps.

    Args:
        features: ``[B,V,D]``, the original first, then its crops.
        generated: ``[B,G,D]``.
        logits: ``[B,V+G,C]``: compare these; None: compare the features.
        scope: "generated": crops are kept unseen (the paper); "all": every view but the original
            has to pass (the code). The original always stays, first.
    """
    if scope not in ("generated", "all"):
        raise ValueError(f"scope is {scope!r}; it must be 'generated' (the paper) or 'all' (code).")
    vectors = torch.cat([features, generated], 1) if logits is None else logits
    first = features.shape[1] if scope == "generated" else 1
    kept = first + most_similar(vectors[:, first:], vectors[:, 0], keep)
    always = torch.arange(first, device=kept.device).expand(len(kept), -1)
    return torch.cat([always, kept], 1)


# --- methods -------------------------------------------------------------------------------------


@dataclass
class Generated:
    """Features of generated views by image id, and what they cost.

    ``features`` ``[N,G,D]``; ``seconds``: "encode" and "generate", of all N images.
    """

    ids: Sequence[str]
    features: Tensor
    seconds: dict[str, float] = field(default_factory=dict)

    def of(self, ids: Sequence[str]) -> Tensor:
        """``[B,G,D]`` of these images."""
        place = {image_id: i for i, image_id in enumerate(self.ids)}
        return self.features[[place[image_id] for image_id in ids]]


def difftpt(
    features: Tensor,
    prompts,
    generated: Generated | Tensor | None = None,
    ids: Sequence[str] | None = None,
    similar: str = "features",
    scope: str = "generated",
    keep: float = 0.8,
    rho: float = 0.3,
    steps: int = 4,
    lr: float = 5e-3,
    optimizer: str = "adamw",
    exact: str = "fast",
    n_images: int | None = None,
    cache: str | Path | None = None,
) -> Adapted:
    """DiffTPT: TPT on crops and generated views, filtered by similarity, then by entropy.

    The prediction is that of the original view under the tuned prompt; ``selected`` is over the
    views in the order original, crops, generated.

    Args:
        features: ``[B,V,D]``, the original first, then crops.
        generated: of the same images: features ``[B,G,D]``, or :class:`Generated` with ``ids``.
        similar: cosine of "features" (the paper) or of "logits" (the code).
        scope: which views have to pass, see :func:`filter_views`.
        keep: fraction that passes; 1 is no filter.
        rho: fraction of the rest that is kept for its low entropy.
        steps, lr, optimizer, exact, n_images, cache: as in :func:`tpt_nb.adapt.tpt`.
    """
    extra = _generated(features, generated, ids, prompts)
    if similar not in ("features", "logits"):
        raise ValueError(f"similar is {similar!r}; it must be 'features' (the paper) or 'logits'.")
    every = torch.cat([features, extra], 1)
    logits = _initial_logits(every, prompts).to(every.device) if similar == "logits" else None
    kept = filter_views(features, extra, logits, scope, keep)
    chosen = every.gather(1, kept[..., None].expand(-1, -1, every.shape[-1]))
    options = {"optimizer": optimizer, "exact": exact, "n_images": n_images, "cache": cache}
    done = tpt(chosen, prompts, rho=rho, lr=lr, steps=steps, **options)
    selected = torch.zeros(every.shape[:2], dtype=torch.bool, device=every.device)
    done.selected = selected.scatter(1, kept, done.selected)
    return done


def difftpt_code(
    features: Tensor,
    prompts,
    generated: Generated | Tensor | None = None,
    ids: Sequence[str] | None = None,
    keep: float = 0.8,
    rho: float = 0.3,
    steps: int = 4,
    lr: float = 5e-3,
    optimizer: str = "adamw",
    exact: str = "fast",
    n_images: int | None = None,
    cache: str | Path | None = None,
) -> Adapted:
    """:func:`difftpt` as the published code runs: cosine of logits, of all views; four steps."""
    options = {"keep": keep, "rho": rho, "steps": steps, "lr": lr, "optimizer": optimizer}
    options |= {"exact": exact, "n_images": n_images, "cache": cache}
    return difftpt(features, prompts, generated, ids, "logits", "all", **options)


def difftpt_paper(
    features: Tensor,
    prompts,
    generated: Generated | Tensor | None = None,
    ids: Sequence[str] | None = None,
    keep: float = 0.8,
    rho: float = 0.3,
    steps: int = 4,
    lr: float = 5e-3,
    optimizer: str = "adamw",
    exact: str = "fast",
    n_images: int | None = None,
    cache: str | Path | None = None,
) -> Adapted:
    """:func:`difftpt` as the paper says: cosine of image features, of generated views only."""
    options = {"keep": keep, "rho": rho, "steps": steps, "lr": lr, "optimizer": optimizer}
    options |= {"exact": exact, "n_images": n_images, "cache": cache}
    return difftpt(features, prompts, generated, ids, "features", "generated", **options)


def difftpt_vote(
    features: Tensor,
    prompts,
    generated: Generated | Tensor | None = None,
    ids: Sequence[str] | None = None,
    rho: float = 0.1,
) -> Adapted:
    """Votes of the confident ones among the same views: nothing tuned, no filter for similarity."""
    extra = _generated(features, generated, ids, prompts)
    return vote(torch.cat([features, extra], 1), prompts, rho)


def _generated(features: Tensor, generated, ids, prompts) -> Tensor:
    """Features of the generated views of a batch, ``[B,G,D]``."""
    _check_features(features, prompts)
    if generated is None:
        raise ValueError(
            "DiffTPT needs generated views: pass generated=[B,G,D], features of variations of the "
            "same images (generated_features)."
        )
    if isinstance(generated, Generated):
        if ids is None:
            raise ValueError("generated views by image id need ids=..., those of the features.")
        generated = generated.of(ids)
    if generated.ndim != 3 or generated.shape[::2] != features.shape[::2]:
        raise ValueError(
            f"generated views have shape {list(generated.shape)}, the views {list(features.shape)};"
            " expected [B,G,D] and [B,V,D] with the same B and D."
        )
    return generated.to(features)


def bind(method: Callable, config, clip, dataset) -> Callable:
    """A method with the generated views that a (filled-in) run configuration names."""
    n = config.n_generated
    if config.generator == "crops":
        made = _further_crops(config, clip, dataset, n)
    else:
        generator = load_generator(config.generator, config.device)
        pictures = pictures_of(
            dataset, generator, config.generator_seed, config.cache, command_of(config)
        )
        features = generated_features(dataset, clip, pictures, n, config.cache)
        seconds = sum(pictures.seconds(image_id, n) for image_id in features.ids)
        seconds = {"encode": features.seconds, "generate": seconds}
        made = Generated(features.ids, features.features, seconds)
    bound = functools.partial(method, generated=made)
    bound.seconds = made.seconds
    return bound


def _further_crops(config, clip, dataset, n: int) -> Generated:
    """In place of generated views: the crops that come after those of the run."""
    from tpt_nb.encode import encode
    from tpt_nb.views import AUGMENTERS, RandomViews, make_augmenter

    kind = AUGMENTERS[config.augmenter]
    if kind is not RandomViews:
        raise ValueError(
            f"generator='crops' continues the random crops; augmenter {config.augmenter!r} makes "
            "no more views of the same kind."
        )
    params = {name: getattr(config, name) for name in kind.__dataclass_fields__ if name != "size"}
    params["n_aug"] = config.n_aug + n
    augmenter = make_augmenter(config.augmenter, clip.image_size, **params)
    features = encode(dataset, clip, augmenter, config.seed, Path(config.cache), config.workers)
    share = n / (config.n_aug + n + 1)  # of the time for all of these views
    crops = features.features[:, config.n_aug + 1 :]
    return Generated(features.ids, crops, {"encode": share * features.seconds})


def command_of(config) -> str:
    """The command that makes the pictures of a run."""
    words = ["python -m tpt_nb generate", f"--dataset {config.dataset}"]
    words += [f"--root {config.root}"] if config.root else []
    words += [f"--reduced_size {config.reduced_size}"] if config.reduced_size else []
    words += [f"--subset_seed {config.subset_seed}"] if config.subset_seed else []
    words += [f"--generator {config.generator}", f"--n_generated {config.n_generated}"]
    words += [f"--generator_seed {config.generator_seed}"] if config.generator_seed else []
    if Path(config.cache) != cache_dir():
        words.append(f"--cache {config.cache}")
    return " ".join(words)


def check_pictures(config, dataset) -> None:
    """Raise ``ValueError`` if pictures that a run needs are not there, before it starts."""
    if config.generator != "crops":
        generator = load_generator(config.generator, config.device)
        made = pictures_of(
            dataset, generator, config.generator_seed, config.cache, command_of(config)
        )
        made.check(list(dataset.ids), config.n_generated)


for _method in (difftpt, difftpt_code, difftpt_paper, difftpt_vote):
    _method.bind = functools.partial(bind, _method)
    _method.check = check_pictures
    METHODS[_method.__name__] = _method
NAMES = tuple(m.__name__ for m in (difftpt, difftpt_code, difftpt_paper, difftpt_vote))
