"""Any diffusers pipeline as a generator, and generators by name."""

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from tpt_nb.core.images import as_rgb
from tpt_nb.methods.difftpt.folder import PictureFolder, is_folder_of_pictures
from tpt_nb.methods.difftpt.network import (
    MiniGenerator,
    check_sampling,
    require_diffusers,
    whole_view,
)

PAPER = "lambdalabs/sd-image-variations-diffusers@v2.0"


@dataclass
class PipelineGenerator:
    """Variations by a ``diffusers`` pipeline that takes an image.

    Args:
        name: id on the hub, with ``@revision`` if it has one, or a folder.
        steps: of denoising; None leaves it to the pipeline (50 for the paper's).
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

    usual: ClassVar[int] = 63

    def __post_init__(self) -> None:
        check_sampling(1 if self.steps is None else self.steps, self.guidance or 0.0)
        if self.batch < 1 or self.side < 1:
            raise ValueError(f"batch and side must be 1 or more; got {self.batch}, {self.side}.")

    def spec(self) -> dict:
        """What the pictures depend on, beside image and seed. A folder counts by its content."""
        name, guidance = self.name, self.guidance
        if Path(name).is_dir():
            h = hashlib.sha256()
            for path in sorted(p for p in Path(name).rglob("*") if p.is_file()):
                h.update(f"{path.relative_to(name)} {path.stat().st_size} ".encode())
                with path.open("rb") as file:  # the first MiB: weights of gigabytes differ there
                    h.update(file.read(1 << 20))
            name = f"{Path(name).name} {h.hexdigest()[:16]}"
        spec = {"generator": name, "steps": self.steps, "side": self.side}
        return spec | {"guidance": None if guidance is None else float(guidance)}

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
        kind = type(self.pipeline)
        takes = kind.__call__.__annotations__
        if "image" not in takes:
            raise ValueError(
                f"the pipeline {self.name!r} ({kind.__name__}) takes no image; a pipeline for "
                "image variations or image-to-image does."
            )
        options = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        options = {key: v for key, v in options.items() if v is not None and key in takes}
        image, made = as_rgb(image), []
        for start in range(0, len(seeds), self.batch):
            draws = [torch.Generator().manual_seed(s) for s in seeds[start : start + self.batch]]
            n = len(draws)
            if kind.__name__ == "StableDiffusionImageVariationPipeline":
                options["image"] = _clip_input(image, self.pipeline).expand(n, -1, -1, -1)
            else:
                options["image"] = [image] * n
            if "prompt" in takes:
                options["prompt"] = [""] * n
            done = self.pipeline(**options, generator=draws, output_type="pil").images
            made += [whole_view(picture, self.side) for picture in done]
        return torch.cat(made)


def _clip_input(image: Image.Image, pipeline) -> Tensor:
    """``[1,3,224,224]`` as DiffTPT's generation script prepares it."""
    import torchvision.transforms.v2.functional as TF  # here: it takes as long to import as torch
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    x = TF.to_dtype(TF.pil_to_tensor(image)[None], torch.float32, scale=True)
    side = pipeline.image_encoder.config.image_size
    x = TF.resize(x, [side, side], TF.InterpolationMode.BICUBIC, antialias=False)
    x = TF.normalize(x, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    return x.to(pipeline.device, pipeline.dtype)


def load_generator(
    name: str = "mini", device: str = "cpu"
) -> MiniGenerator | PipelineGenerator | PictureFolder:
    """A generator by name: ``mini``, a pipeline, or a folder of pictures; options behind a colon.

    For example "mini:steps=4,guidance=1", or the paper's with fewer steps: ``PAPER + ":steps=25"``.
    Raises ``ValueError`` for options that it does not have.
    """
    match = re.fullmatch(r"(.+?)(?::((?:\w+=[^,=]*,?)+))?", name.strip())
    if not match:
        raise ValueError(f"generator is {name!r}; expected a name, or name:option=value,...")
    name, kinds, values = match[1], {"steps": int, "guidance": float}, {}
    kinds |= {} if name == "mini" else {"batch": int, "side": int}
    for part in filter(None, (match[2] or "").split(",")):
        key, text = part.split("=")
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
    if is_folder_of_pictures(name):
        return PictureFolder(name, **{k: v for k, v in values.items() if k == "side"})
    return PipelineGenerator(name, **values, device=device)
