"""The embedded generator: a small diffusion model of IconShift, told MiniCLIP's embedding."""

import functools
import hashlib
import json
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tpt_nb.core.paths import DATA
from tpt_nb.views import RandomViews

SIDE = 32  # pixels of what the embedded generator makes
CHUNK = 8  # variations that it makes at once, always: rounding is then the same for each of them
WEIGHTS = DATA / "diffusion" / "generator.safetensors"
CONFIG = DATA / "diffusion" / "network.json"  # settings of diffusers' UNet and noise schedule


def require_diffusers() -> types.ModuleType:
    """The package ``diffusers``; ``ValueError`` with what to install where it is missing."""
    try:
        import diffusers
    except ImportError:
        raise ValueError(
            "making variations needs diffusers: pip install -r requirements.txt. "
            "Everything else works without it."
        ) from None
    return diffusers


class Network(torch.nn.Module):
    """diffusers' UNet without text: the embedding is its class, and a map of places beside it.

    Blocks of 2 x 2 pixels are 12 channels. The map (16 channels) says what to expect *where*: a
    small network learns shapes far sooner with it.
    """

    def __init__(self) -> None:
        super().__init__()
        settings = json.loads(CONFIG.read_text())["unet"]
        self.unet = require_diffusers().UNet2DConditionModel(**settings)
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


def build_schedule():
    """The noise schedule, with DDIM as its sampler: cosine, from pure noise, of velocities."""
    return require_diffusers().DDIMScheduler(**json.loads(CONFIG.read_text())["noise"])


@torch.no_grad()
def denoise(
    network: Callable,
    schedule,
    noise: Tensor,
    condition: Tensor,
    steps: int = 10,
    guidance: float = 2.0,
) -> Tensor:
    """DDIM (Song et al. 2021) from ``noise`` ``[B,3,S,S]`` to images in [-1,1].

    Classifier-free guidance (Ho and Salimans 2022): the prediction goes ``guidance`` times as far
    from that without a condition; 1 is the plain prediction, at half the price.
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
        x = schedule.step(v, t, x).prev_sample
    return x.clamp(-1, 1)


def as_bytes(images: Tensor) -> Tensor:
    """[-1,1] -> uint8."""
    return (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def start_noise(seed: int) -> Tensor:
    """The noise that the variation with this seed starts from: ``[3,32,32]``."""
    return torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def whole_view(image: Image.Image, size: int) -> Tensor:
    """An image as view 0: uint8 ``[1,3,size,size]``."""
    return RandomViews(n_aug=0, size=size)(image, 0)


@dataclass
class MiniGenerator:
    """The embedded generator: 32 px variations of an image from MiniCLIP's embedding of it.

    ``steps`` and ``guidance`` as in :func:`denoise`; ``weights`` as data/diffusion/train.py writes.
    """

    steps: int = 10
    guidance: float = 2.0
    weights: Path = WEIGHTS
    device: str = "cpu"

    usual: ClassVar[int] = 16  # variations per image, where nothing else is asked for

    def __post_init__(self) -> None:
        check_sampling(self.steps, self.guidance)
        if not Path(self.weights).is_file():
            raise ValueError(
                f"{self.weights}: missing. Restore it with `git checkout`, or train it again: "
                "python data/diffusion/train.py --help"
            )

    def spec(self) -> dict:
        """What the pictures depend on, beside image and seed."""
        from tpt_nb.models import MINI_PATH

        # the condition comes from MiniCLIP: other weights of its image tower, other pictures
        digests = [_digest(Path(self.weights)), _digest(MINI_PATH, "visual.")]
        spec = {"generator": "mini", "weights": digests, "steps": self.steps}
        return spec | {"guidance": float(self.guidance), "side": SIDE}

    @functools.cached_property
    def parts(self) -> tuple:
        """(network, schedule, MiniCLIP, mean and std of embeddings)."""
        from safetensors.torch import load_file

        from tpt_nb import models

        state = {key: v.float().to(self.device) for key, v in load_file(self.weights).items()}
        center, spread = state.pop("condition.mean"), state.pop("condition.std")
        network = Network().to(self.device)
        network.load_state_dict(state)
        mini = models.load("mini", device=self.device)
        return network.eval().requires_grad_(False), build_schedule(), mini, center, spread

    def condition(self, image: Image.Image) -> Tensor:
        """Standardised embedding ``[256]`` of an image."""
        _, _, mini, center, spread = self.parts
        return (mini.encode_views(whole_view(image, mini.image_size))[0] - center) / spread

    def make(self, image: Image.Image, seeds: Sequence[int]) -> Tensor:
        """One variation per seed: uint8 ``[n,3,32,32]``."""
        network, schedule, *_ = self.parts
        condition = self.condition(image).expand(CHUNK, -1)
        made = []
        for some in torch.stack([start_noise(seed) for seed in seeds]).split(CHUNK):
            filled = torch.cat([some, some.new_zeros(CHUNK - len(some), *some.shape[1:])])
            filled = filled.to(self.device)
            out = denoise(network, schedule, filled, condition, self.steps, self.guidance)
            made.append(as_bytes(out[: len(some)]).cpu())
        return torch.cat(made)


def check_sampling(steps: int, guidance: float) -> None:
    """Raise ``ValueError`` for settings that no generator takes."""
    if steps < 1 or not guidance >= 0:
        raise ValueError(
            f"a generator takes steps >= 1 and guidance >= 0; got {steps}, {guidance}."
        )


def _digest(path: Path, start: str = "") -> str:
    """Hash of the tensors of a safetensors file whose names begin so: 16 hexadecimal digits."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(path, framework="np") as file:
        for name in sorted(n for n in file.keys() if n.startswith(start)):  # noqa: SIM118
            value = file.get_tensor(name)
            digest.update(f"{name} {value.shape} {value.dtype}".encode() + value.tobytes())
    return digest.hexdigest()[:16]
