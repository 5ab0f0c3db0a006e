"""The embedded diffusion model."""

import functools
import hashlib
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tpt_nb.core.images import as_rgb
from tpt_nb.core.paths import DATA
from tpt_nb.views import center_view

SIDE = 32  # pixels of what the embedded generator makes


CHUNK = 8  # variations that it makes at once, always: rounding is then the same for each of them


WEIGHTS = DATA / "diffusion" / "generator.safetensors"


PAPER = "lambdalabs/sd-image-variations-diffusers@v2.0"


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
        from tpt_nb.models import MINI_PATH

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

        from tpt_nb import models

        state = {key: value.float() for key, value in load_file(self.weights).items()}
        center, spread = state.pop("condition.mean"), state.pop("condition.std")
        network = Network()
        network.load_state_dict(state)
        network = network.eval().requires_grad_(False).to(self.device)
        mini = models.load("mini", device=self.device)
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


def split_name(name: str) -> tuple[str, dict[str, str]]:
    """ "mini:steps=4,guidance=1" -> ("mini", {"steps": "4", "guidance": "1"})."""
    match = re.fullmatch(r"(.+?)(?::((?:\w+=[^,=]*,?)+))?", name.strip())
    if not match:
        raise ValueError(f"generator is {name!r}; expected a name, or name:option=value,...")
    pairs = [part.split("=") for part in (match[2] or "").split(",") if part]
    return match[1], dict(pairs)
