"""The network of MiniCLIP, from torch alone.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021: a
ResNet with a stem of three convolutions, average pooling in place of strides and a query of the
mean pixel that attends to all at its end; and a causal transformer over tokens. open_clip has the
same network, and importing it brings torchvision, transformers and timm with it, which takes longer
than a thousand images. Names and shapes of the weights, and the order of the operations, are
open_clip's: the same weights give the same bits.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpt_nb.models.tower import QUICK_GELU

EXPANSION = 4  # channels behind a residual block over those within it


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions: ``[B,n_in,H,W] -> [B,4n,H/s,W/s]``."""

    def __init__(self, n_in: int, n: int, stride: int = 1) -> None:
        super().__init__()
        n_out = EXPANSION * n
        self.conv1, self.bn1 = nn.Conv2d(n_in, n, 1, bias=False), nn.BatchNorm2d(n)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(n, n, 3, padding=1, bias=False), nn.BatchNorm2d(n)
        self.act2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(n, n_out, 1, bias=False), nn.BatchNorm2d(n_out)
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or n_in != n_out:
            parts = [nn.AvgPool2d(stride), nn.Conv2d(n_in, n_out, 1, bias=False)]
            parts += [nn.BatchNorm2d(n_out)]
            self.downsample = nn.Sequential()
            for name, part in zip(("-1", "0", "1"), parts, strict=True):  # OpenAI's names
                self.downsample.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.avgpool(y)))
        y += x if self.downsample is None else self.downsample(x)
        return self.act3(y)


class AttentionPool(nn.Module):
    """The mean pixel attends to itself and all pixels: ``[B,d,H,W] -> [B,D]``."""

    def __init__(self, pixels: int, d: int, heads: int, n_out: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(pixels + 1, d))
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(d, d) for _ in range(3))
        self.c_proj = nn.Linear(d, n_out)
        self.num_heads = heads

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)  # [HW,B,d]
        x = torch.cat([x.mean(dim=0, keepdim=True), x])
        x = x + self.positional_embedding[:, None].to(x.dtype)
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        y, _ = F.multi_head_attention_forward(
            x, x, x, x.shape[-1], self.num_heads,
            in_proj_weight=None, in_proj_bias=torch.cat([q.bias, k.bias, v.bias]),
            bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
            out_proj_weight=self.c_proj.weight, out_proj_bias=self.c_proj.bias,
            training=self.training, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=q.weight, k_proj_weight=k.weight, v_proj_weight=v.weight,
        )  # fmt: skip
        return y[0]


class ModifiedResNet(nn.Module):
    """The image tower: ``[B,3,S,S] -> [B,D]``, any norm."""

    def __init__(
        self, embed_dim: int, layers: Sequence[int], width: int, head_width: int, image_size: int
    ) -> None:
        super().__init__()
        self.image_size = image_size
        half = width // 2
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(half), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(half), nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn3, self.act3 = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)
        n_in = width
        for i, blocks in enumerate(layers):
            n, made = width * 2**i, []
            for b in range(blocks):
                made.append(Bottleneck(n_in, n, 2 if b == 0 and i else 1))
                n_in = EXPANSION * n
            setattr(self, f"layer{i + 1}", nn.Sequential(*made))
        side, d = image_size // 32, 32 * width
        self.attnpool = AttentionPool(side**2, d, d // head_width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.avgpool(self.act3(self.bn3(self.conv3(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.attnpool(x)


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, as OpenAI's models have it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(QUICK_GELU * x)


class ResidualBlock(nn.Module):
    """A block of the transformer; layer scale, which open_clip's block may have, is none here."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(d)
        self.attn = nn.MultiheadAttention(d, heads, batch_first=True)
        self.ls_1, self.ls_2 = nn.Identity(), nn.Identity()  # without weights
        self.ln_2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential()
        for name, part in (
            ("c_fc", nn.Linear(d, 4 * d)),
            ("gelu", QuickGELU()),
            ("c_proj", nn.Linear(4 * d, d)),
        ):
            self.mlp.add_module(name, part)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        mask = None if attn_mask is None else attn_mask.to(x.dtype)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Residual blocks one after the other: ``[N,L,d] -> [N,L,d]``."""

    def __init__(self, d: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(d, heads) for _ in range(layers))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, attn_mask)
        return x


class MiniClip(nn.Module):
    """Both towers, to be filled with weights: some of those that are here are anything.

    Args:
        embed_dim: D, width of the joint space.
        vision_cfg, text_cfg, quick_gelu: as ``MINI_CONFIG`` has them.
    """

    text_pool_type = "argmax"

    def __init__(
        self, embed_dim: int, vision_cfg: Mapping, text_cfg: Mapping, quick_gelu: bool = True
    ) -> None:
        super().__init__()
        if not quick_gelu:
            raise ValueError("MiniCLIP has QuickGELU, this file says another activation")
        d, self.context_length = text_cfg["width"], text_cfg["context_length"]
        self.vocab_size = text_cfg["vocab_size"]
        self.visual = ModifiedResNet(embed_dim, **vision_cfg)
        self.transformer = Transformer(d, text_cfg["layers"], text_cfg["heads"])
        table = torch.empty(self.vocab_size, d)  # the largest part by far: not drawn
        self.token_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.positional_embedding = nn.Parameter(torch.empty(self.context_length, d))
        self.ln_final = nn.LayerNorm(d)
        self.text_projection = nn.Parameter(torch.empty(d, embed_dim))
        self.logit_scale = nn.Parameter(torch.empty([]))
        mask = torch.full((self.context_length, self.context_length), float("-inf")).triu_(1)
        self.register_buffer("attn_mask", mask, persistent=False)

    def encode_image(self, image: Tensor) -> Tensor:
        """``[B,3,S,S] -> [B,D]``, any norm."""
        return self.visual(image)

    def encode_text(self, text: Tensor) -> Tensor:
        """Token ids ``[N,77] -> [N,D]``, any norm."""
        x = self.token_embedding(text) + self.positional_embedding
        x = self.ln_final(self.transformer(x, self.attn_mask))
        return x[torch.arange(len(x), device=x.device), text.argmax(dim=-1)] @ self.text_projection
