"""ConvNeXt in one file, to be read from top to bottom.

"A ConvNet for the 2020s" (Liu et al., 2022, https://arxiv.org/abs/2201.03545) starts from a
ResNet-50 and changes one thing after another until a plain convolutional network matches a Swin
Transformer. This file builds the result from its smallest part to the whole; on the right, where
the paper explains it:

    Patchify            the stem: cut the image into patches             section 2.2
    DepthwiseConv       7x7, one filter per channel: mixes positions     2.3, 2.5
    GELU                the only activation of a block                   2.6
    InvertedBottleneck  narrow, 4x wide, narrow: mixes channels          2.4, 2.6
    LayerNorm           a mean and a variance for each position          2.6
    DropPath            skip branches at random while training           appendix A.1
    LayerScale          let every branch start close to zero             appendix A.1
    Block               all of these but the stem, around a shortcut     figure 4
    Downsample          halve the resolution between stages              2.6
    Head                pool, normalise, classify
    ConvNeXt            four stages of blocks                            table 9
    GRN                 what ConvNeXt V2 adds                            V2's section 3.2
    VARIANTS            atto to xlarge, v2_atto to v2_huge               section 3
    load_weights        checkpoints of Meta, timm, torchvision, Hugging Face; and back again
    DepthwiseGradient   why training is faster here than elsewhere, on a CPU
    ROADMAP             every network between ResNet-50 and this one     table 10

Sections, tables and figures named in this file are the paper's; V2's is
https://arxiv.org/abs/2301.00808 (Woo et al., 2023). Every change of layout is an
einops pattern, which is also its shape comment: b = batch, c = channels, h, w = height, width.
Between the pieces a feature map is (b, c, h, w).

The function, its initialisation and the stochastic-depth schedule are those of the authors' code
(https://github.com/facebookresearch/ConvNeXt). Deliberately different:

  - `patch_size` may be 1 or 2, so that a 32x32 image does not end as a single pixel;
  - `num_classes=0` gives the pooled features, `forward_pyramid` every stage's map;
  - an image below the total stride is refused in a sentence, not in a convolution's words;
  - all LayerNorms run as PyTorch's own kernel, which fixes the memory layout: see LayerNorm2d;
  - where gradients are recorded, strided convolutions run as a linear layer on patches, and on a
    CPU the depthwise one has a gradient of its own: faster, the same numbers up to rounding;
  - each idea is a module, hence `mlp.pwconv1` and `layer_scale.gamma` for `pwconv1`, `gamma`.

`python convnext.py` prints each variant's size and cost beside the published ones.
"""

import argparse
import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise, product
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class Patchify(nn.Conv2d):
    """The stem: cut the image into squares, embed each. (b, c, h, w) -> (b, dim, h / p, w / p)

        y[:, i, j] = W · flatten(x[:, p·i : p·i + p, p·j : p·j + p]) + bias,   p = patch_size

    ResNet begins with overlapping 7x7 windows and a max-pool; a vision transformer cuts the image
    into patches and maps each to a vector by one shared linear layer, which is a convolution
    whose stride is its kernel size. That does as well here (section 2.2). The paper's p is 4.
    Rows and columns at the edge that do not fill a patch are dropped.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int = 4) -> None:
        super().__init__(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        # As a linear layer on patches: the same function, and on a CPU a faster gradient.
        p, (h, w) = self.stride[0], x.shape[2:]
        x = x[:, :, : h - h % p, : w - w % p]
        x = rearrange(x, "b c (h p) (w q) -> b h w (p q c)", p=p, q=p)
        x = F.linear(x, rearrange(self.weight, "dim c p q -> dim (p q c)"), self.bias)
        return rearrange(x, "b h w dim -> b dim h w")


class DepthwiseConv(nn.Conv2d):
    """A 7x7 filter for each channel. (b, dim, h, w) -> (b, dim, h, w)

        y[c, i, j] = Σ_{u,v} W[c, u, v] · x[c, i + u - 3, j + v - 3] + bias[c]

    Like self-attention it mixes positions and leaves channels apart (section 2.3). So it takes
    49·dim multiplications per position where a dense 7x7 takes 49·dim², and a large kernel is
    affordable: 3x3 -> 7x7 gains 0.65 points of accuracy, larger ones no more (section 2.5).
    """

    fast_gradient = True  # False: PyTorch's own, slower on a CPU (see "Faster" below)

    def __init__(self, dim: int, kernel_size: int = 7) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.fast_gradient and torch.is_grad_enabled():
            return depthwise_conv(x, self.weight, self.bias)
        return super().forward(x)


class GELU(nn.GELU):
    """x · Φ(x), with Φ the normal distribution's: a ReLU with a rounded corner. (...) -> (...)

    The exact one; the tanh approximation would move the logits. Where no gradient is recorded it
    overwrites its input, as nn.ReLU(inplace=True) does: the network's widest tensors then need
    not exist twice. (A hook that keeps the output of pwconv1 must clone it.)
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


class InvertedBottleneck(nn.Module):
    """Two linear layers around a GELU, the same at every position. (..., dim) -> (..., dim)

        y = W₂ · GELU(W₁ · x + b₁) + b₂,   W₁: dim -> 4·dim,  W₂: 4·dim -> dim

    ResNet's bottleneck goes wide - narrow - wide; a transformer's MLP goes narrow - wide - narrow
    with one activation, and the paper adopts both habits (sections 2.4 and 2.6). In here are
    nine tenths of Tiny's parameters, 8·dim² a block, each multiplied once at every position.
    """

    def __init__(self, dim: int, expansion: int = 4, grn: bool = False) -> None:
        super().__init__()
        # pw: pointwise. As 1x1 convolutions they would be the same function, but nn.Linear on
        # the last axis is one large matrix product.
        self.pwconv1 = nn.Linear(dim, expansion * dim)
        self.act = GELU()
        self.grn = GRN(expansion * dim) if grn else nn.Identity()  # V2 only, see below
        self.pwconv2 = nn.Linear(expansion * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.pwconv2(self.grn(self.act(self.pwconv1(x))))


class LayerNorm(nn.LayerNorm):
    """Normalise each position's channels on their own. (..., dim) -> (..., dim)

        y = γ · (x - mean(x)) / √(var(x) + ε) + β,   mean and var over the last axis

    No statistic is shared between positions or samples, so training and evaluation compute the
    same. (GroupNorm with one group is another thing: it averages over the positions as well.)
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)  # as the authors'; PyTorch's 1e-5 would move the logits


class LayerNorm2d(LayerNorm):
    """LayerNorm for a feature map. (b, dim, h, w) -> (b, dim, h, w)

    PyTorch's kernel wants the channels of a position side by side in memory, as linear layers do.
    It leaves its output like that, and convolutions keep the layout of their input. So after the
    stem's norm every map is laid out this way ("channels_last") whatever the caller's image was,
    and the `rearrange`s of the blocks change the view of the memory, not the memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(x, "b c h w -> b h w c")
        x = super().forward(x)
        return rearrange(x, "b h w c -> b c h w")


class DropPath(nn.Module):
    """Stochastic depth: while training, zero the branch with probability p. (b, ...) -> (b, ...)

        y = x · m / (1 - p),   m ~ Bernoulli(1 - p), drawn for each sample;  x: the branch's output

    A sample whose branch is zero skips the block, so no block can be relied on alone (Huang et
    al., 2016). Dividing by 1 - p keeps the expectation, and evaluation leaves x as it is.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        mask = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * (mask / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p:.3f}"


class LayerScale(nn.Module):
    """A learned factor for each channel of the branch. (..., dim) -> (..., dim)

        y = γ ⊙ x,   γ = 1e-6 at first

    From CaiT (Touvron et al., 2021): with γ this small every block begins as the identity, and
    its branch grows as far as it proves useful.
    """

    def __init__(self, dim: int, init: float = 1e-6) -> None:
        super().__init__()
        # One axis, like norms and biases: by that train.py knows what weight decay must not touch.
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


class Block(nn.Module):
    """The ConvNeXt block (figure 4). (b, dim, h, w) -> (b, dim, h, w)

        y = x + DropPath(LayerScale(InvertedBottleneck(LayerNorm(DepthwiseConv(x)))))

    A transformer block has a shortcut, a norm and so on for attention and again for the MLP;
    here both kinds of mixing share one shortcut, one norm and one activation.

    drop_path: probability, in [0, 1), of skipping the branch. layer_scale: first γ, 0 for none.
    grn: with ConvNeXt V2's normalisation.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale: float = 1e-6,
                 grn: bool = False) -> None:
        super().__init__()
        self.dwconv = DepthwiseConv(dim)
        self.norm = LayerNorm(dim)
        self.mlp = InvertedBottleneck(dim, grn=grn)
        self.layer_scale = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.dwconv(x)
        x = rearrange(x, "b c h w -> b h w c")  # what follows acts on the channels, the last axis
        x = self.norm(x)
        x = self.mlp(x)
        x = self.layer_scale(x)
        x = rearrange(x, "b h w c -> b c h w")
        return shortcut + self.drop_path(x)


class Downsample(nn.Sequential):
    """Between stages: half the resolution, another width. (b, c_in, h, w) -> (b, c, h / 2, w / 2)

    ResNet has the stride inside a stage's first block; ConvNeXt, as Swin, gives it a layer of its
    own, a 2x2 convolution. Without the norm before it training diverges (section 2.6).
    """

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__(LayerNorm2d(dim_in), Patchify(dim_in, dim, patch_size=2))


class Head(nn.Module):
    """Average over the positions, normalise, classify. (b, dim, h, w) -> (b, num_classes)

    With `num_classes` 0 nothing is classified: (b, dim) normalised features.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(reduce(x, "b c h w -> b c", "mean")))


class ConvNeXt(nn.Module):
    """Stages of blocks, four of them, each at half the resolution of the last (table 9).

    depths: blocks in each stage. dims: channels in each. The rest: see create_convnext.
    """

    def __init__(
        self, depths: tuple[int, ...], dims: tuple[int, ...], *, num_classes: int = 1000,
        in_channels: int = 3, patch_size: int = 4, drop_path: float = 0.0,
        layer_scale: float = 1e-6, grn: bool = False, head_init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.total_stride = patch_size * 2 ** (len(depths) - 1)  # the stem's, then 2 per stage
        # What lowers the resolution before each stage: first the stem, then Downsamples.
        stem = nn.Sequential(Patchify(in_channels, dims[0], patch_size), LayerNorm2d(dims[0]))
        self.downsample_layers = nn.ModuleList(
            [stem, *(Downsample(before, dim) for before, dim in pairwise(dims))])
        # Early features feed all that follows, so the chance of a skip rises linearly with depth.
        last = max(1, sum(depths) - 1)
        rates = (drop_path * i / last for i in range(sum(depths)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, next(rates), layer_scale, grn) for _ in range(depth)))
            for depth, dim in zip(depths, dims))
        self.head = Head(dims[-1], num_classes)
        self.apply(self._init_weights)
        if num_classes:
            with torch.no_grad():
                self.head.fc.weight *= head_init_scale

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        # The paper's table 5 prints 0.2; the authors' code, and all who follow it, use 0.02.
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """(b, c, h, w) -> each stage's map, [(b, dims[0], h / 4, w / 4), ... h / 32] at patch 4.

        The inputs of a detection or segmentation head. Odd sizes are rounded down. Raises
        ValueError for other channels or axes and for an image smaller than the total stride.
        """
        least = self.total_stride
        if x.ndim != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < least:
            raise ValueError(
                f"images must be (b, {self.in_channels}, h, w) with h and w {least} or more "
                f"(the total stride; a smaller patch_size lowers it), not {tuple(x.shape)}")
        maps = []
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> the last stage's map, (b, dims[-1], h / 32, w / 32) at patch 4."""
        return self.forward_pyramid(x)[-1]

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, num_classes) logits, or (b, dims[-1]) features without classes."""
        return self.head(self.forward_features(x))


class GRN(nn.Module):
    """ConvNeXt V2's one new part: global response normalisation. (b, h, w, dim) -> same

        y = γ ⊙ (x · N) + β + x,   N[c] = ‖x[:, :, c]‖ / mean over k of ‖x[:, :, k]‖

    (V2, section 3.2.) After masked pre-training many channels of the wide layer answer alike. Here
    they compete: one that answers more strongly than the rest, over the whole image, is raised.
    V2's block is the one above with this after its GELU, and without LayerScale, which it makes
    superfluous (V2's section 3.2). γ and β are 0 at first: the identity.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))  # one axis: no weight decay, as the authors'
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        # In float16 a 56x56 map full of 20s has an infinite sum of squares, and one of 1200s an
        # infinite norm; in bfloat16 1 + 0.003 is 1. So all this is as wide as float32.
        norm = torch.linalg.vector_norm(
            x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        n = norm / (reduce(norm, "b 1 1 c -> b 1 1 1", "mean") + 1e-6)
        return torch.addcmul(self.beta, x, 1 + self.gamma * n).to(self.beta.dtype)


class Variant(NamedTuple):
    depths: tuple[int, ...]  # blocks in each stage
    dims: tuple[int, ...]  # channels in each stage
    grn: bool = False  # ConvNeXt V2


VARIANTS = {
    # the sizes below the paper's, from timm and from ConvNeXt V2
    "atto": Variant((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": Variant((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": Variant((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": Variant((2, 2, 8, 2), (80, 160, 320, 640)),
    # the paper's: blocks 1 : 1 : 3 : 1, as in Swin-T, or 1 : 1 : 9 : 1 (section 2.2)
    "tiny": Variant((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": Variant((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": Variant((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": Variant((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": Variant((3, 3, 27, 3), (256, 512, 1024, 2048)),
}
VARIANTS |= {f"v2_{name}": VARIANTS[name]._replace(grn=True)
             for name in ("atto", "femto", "pico", "nano", "tiny", "base", "large")}
VARIANTS["v2_huge"] = Variant((3, 3, 27, 3), (352, 704, 1408, 2816), grn=True)


def create_convnext(
    variant: str, *, num_classes: int = 1000, in_channels: int = 3, patch_size: int = 4,
    drop_path: float = 0.0, layer_scale: float | None = None, head_init_scale: float = 1.0,
) -> ConvNeXt:
    """A freshly initialised ConvNeXt, in training mode.

    variant: a key of VARIANTS. num_classes: 0 for features. patch_size: the stem's; 1 or 2 for
    small images. drop_path: the last block's chance of a skip, in [0, 1); the paper has 0.1 for
    Tiny, 0.4 for Small, 0.5 for Base and Large (table 5). layer_scale: first γ, 0 for none; by
    default 1e-6, and none in V2. head_init_scale: factor on the classifier's first weights; 0.001
    in fine-tuning, where a new head's large gradients would spoil the pretrained features (table
    6).

    Raises ValueError, with what is allowed, for anything else.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    depths, dims, grn = VARIANTS[variant]
    if layer_scale is None:
        layer_scale = 0.0 if grn else 1e-6
    for name, value, least in (("num_classes", num_classes, 0), ("in_channels", in_channels, 1),
                               ("patch_size", patch_size, 1), ("layer_scale", layer_scale, 0)):
        if not value >= least:  # nan is not, either
            raise ValueError(f"{name} must be {least} or more, not {value}")
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path must be at least 0 and below 1, not {drop_path}")
    return ConvNeXt(
        depths, dims, num_classes=num_classes, in_channels=in_channels, patch_size=patch_size,
        drop_path=drop_path, layer_scale=layer_scale, grn=grn, head_init_scale=head_init_scale)


def count_macs(model: nn.Module, image_size: int, in_channels: int = 3) -> int:
    """Multiply-accumulates in the convolutions and linear layers for one square image.

    The papers call them FLOPs. They are counted as an image runs through the model, which may be
    on the meta device, where tensors have a shape and nothing else.
    """
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, in_channels, image_size, image_size, device=device))
    return counter.get_total_flops() // 2  # PyTorch counts the multiplication and the addition


# GFLOPs at 224x224 as printed in the paper's table 1 and, for V2 and the four small ones, in V2's:
# GRN multiplies by no matrix, so V2 costs what V1 does.
PUBLISHED_GFLOPS = dict(zip(VARIANTS, (
    0.55, 0.78, 1.37, 2.45, 4.5, 8.7, 15.4, 34.4, 60.9,
    0.55, 0.78, 1.37, 2.45, 4.47, 15.4, 34.4, 115)))


def table() -> Iterator[str]:
    """A line for each variant: shape, parameters and GMACs at 224x224, counted and published."""
    yield (f"{'variant':8} {'depths':14} {'dims':24} {'parameters':>11} {'GMACs':>7} "
           f"{'published':>9}")
    for name, (depths, dims, _) in VARIANTS.items():
        with torch.device("meta"):
            model = create_convnext(name)
        parameters, macs = sum(p.numel() for p in model.parameters()), count_macs(model, 224)
        yield (f"{name:8} {depths!s:14} {dims!s:24} {parameters:11,} {macs / 1e9:7.3f} "
               f"{PUBLISHED_GFLOPS[name]:9}")


# --- Checkpoints: every layout in, every layout out ---------------------------------------------
#
# The same network is stored under four other sets of names. In the tables our names are on the
# left, the layout's on the right; {s} is the stage, 0 to 3, {b} the block in it, and * stands for
# weight and bias. The first row that fits a name applies. What has other shapes, too, is in SHAPES.

META = {  # the authors': https://github.com/facebookresearch/ConvNeXt and ConvNeXt-V2
    "downsample_layers.{s}.0.*":         "downsample_layers.{s}.0.*",
    "downsample_layers.{s}.1.*":         "downsample_layers.{s}.1.*",
    "stages.{s}.{b}.dwconv.*":           "stages.{s}.{b}.dwconv.*",
    "stages.{s}.{b}.norm.*":             "stages.{s}.{b}.norm.*",
    "stages.{s}.{b}.mlp.pwconv1.*":      "stages.{s}.{b}.pwconv1.*",
    "stages.{s}.{b}.mlp.grn.gamma":      "stages.{s}.{b}.grn.gamma",
    "stages.{s}.{b}.mlp.grn.beta":       "stages.{s}.{b}.grn.beta",
    "stages.{s}.{b}.mlp.pwconv2.*":      "stages.{s}.{b}.pwconv2.*",
    "stages.{s}.{b}.layer_scale.gamma":  "stages.{s}.{b}.gamma",
    "head.norm.*":                       "norm.*",
    "head.fc.*":                         "head.*",
}  # fmt: skip
TIMM = {  # https://github.com/huggingface/pytorch-image-models
    "downsample_layers.0.0.*":           "stem.0.*",
    "downsample_layers.0.1.*":           "stem.1.*",
    "downsample_layers.{s}.0.*":         "stages.{s}.downsample.0.*",
    "downsample_layers.{s}.1.*":         "stages.{s}.downsample.1.*",
    "stages.{s}.{b}.dwconv.*":           "stages.{s}.blocks.{b}.conv_dw.*",
    "stages.{s}.{b}.norm.*":             "stages.{s}.blocks.{b}.norm.*",
    "stages.{s}.{b}.mlp.pwconv1.*":      "stages.{s}.blocks.{b}.mlp.fc1.*",
    "stages.{s}.{b}.mlp.grn.gamma":      "stages.{s}.blocks.{b}.mlp.grn.weight",
    "stages.{s}.{b}.mlp.grn.beta":       "stages.{s}.blocks.{b}.mlp.grn.bias",
    "stages.{s}.{b}.mlp.pwconv2.*":      "stages.{s}.blocks.{b}.mlp.fc2.*",
    "stages.{s}.{b}.layer_scale.gamma":  "stages.{s}.blocks.{b}.gamma",
    "head.norm.*":                       "head.norm.*",
    "head.fc.*":                         "head.fc.*",
}  # fmt: skip
TORCHVISION = {  # V1 alone. The gaps in block's numbers are layers without parameters.
    "downsample_layers.0.0.*":           "features.0.0.*",
    "downsample_layers.0.1.*":           "features.0.1.*",
    "downsample_layers.{s}.0.*":         "features.{2s}.0.*",
    "downsample_layers.{s}.1.*":         "features.{2s}.1.*",
    "stages.{s}.{b}.dwconv.*":           "features.{2s+1}.{b}.block.0.*",
    "stages.{s}.{b}.norm.*":             "features.{2s+1}.{b}.block.2.*",
    "stages.{s}.{b}.mlp.pwconv1.*":      "features.{2s+1}.{b}.block.3.*",
    "stages.{s}.{b}.mlp.pwconv2.*":      "features.{2s+1}.{b}.block.5.*",
    "stages.{s}.{b}.layer_scale.gamma":  "features.{2s+1}.{b}.layer_scale",
    "head.norm.*":                       "classifier.0.*",
    "head.fc.*":                         "classifier.2.*",
}  # fmt: skip
HUGGINGFACE = {  # transformers' base model; in one with a classifier "convnext." comes before
    "downsample_layers.0.0.*":           "embeddings.patch_embeddings.*",
    "downsample_layers.0.1.*":           "embeddings.layernorm.*",
    "downsample_layers.{s}.0.*":         "encoder.stages.{s}.downsampling_layer.0.*",
    "downsample_layers.{s}.1.*":         "encoder.stages.{s}.downsampling_layer.1.*",
    "stages.{s}.{b}.dwconv.*":           "encoder.stages.{s}.layers.{b}.dwconv.*",
    "stages.{s}.{b}.norm.*":             "encoder.stages.{s}.layers.{b}.layernorm.*",
    "stages.{s}.{b}.mlp.pwconv1.*":      "encoder.stages.{s}.layers.{b}.pwconv1.*",
    "stages.{s}.{b}.mlp.grn.gamma":      "encoder.stages.{s}.layers.{b}.grn.weight",
    "stages.{s}.{b}.mlp.grn.beta":       "encoder.stages.{s}.layers.{b}.grn.bias",
    "stages.{s}.{b}.mlp.pwconv2.*":      "encoder.stages.{s}.layers.{b}.pwconv2.*",
    "stages.{s}.{b}.layer_scale.gamma":  "encoder.stages.{s}.layers.{b}.layer_scale_parameter",
    "head.norm.*":                       "layernorm.*",
    "head.fc.*":                         "classifier.*",
}  # fmt: skip
LAYOUTS = {"ours": {}, "meta": META, "timm": TIMM, "torchvision": TORCHVISION,
           "huggingface": HUGGINGFACE}

# Where a layout's shapes are others than ours, too: by the end of the name, from ours to theirs.
SHAPES = {
    "meta": {".grn.gamma": "c -> 1 1 1 c", ".grn.beta": "c -> 1 1 1 c"},
    "timm": {".fc1.weight": "o i -> o i 1 1", ".fc2.weight": "o i -> o i 1 1"},  # if under 96 wide
    "torchvision": {".layer_scale": "c -> c 1 1"},
    "huggingface": {".grn.weight": "c -> 1 1 1 c", ".grn.bias": "c -> 1 1 1 c"},
}


@cache
def names(layout: str) -> Mapping[str, str]:
    """Every name that a parameter can have: ours -> the layout's.

    For four stages of up to 40 blocks, more than any variant has; so no depths need be known.
    """
    found: dict[str, str] = {}
    for row in LAYOUTS[layout].items():
        for s, b, kind in product(range(4), range(40), ("weight", "bias")):
            numbers = {"s": s, "2s": 2 * s, "2s+1": 2 * s + 1, "b": b}
            ours, theirs = (name.format_map(numbers).replace("*", kind) for name in row)
            found.setdefault(ours, theirs)
    return found


def export_state_dict(model: ConvNeXt, layout: str) -> dict[str, Tensor]:
    """The model's state dict as "meta", "timm", "torchvision", "huggingface" or "ours" has it.

    The tensors share the model's memory. Without classes, Hugging Face's is that of the base model.
    Raises ValueError for another layout or network, and where torchvision has none: for V2, and
    without LayerScale.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    state = model.state_dict()
    if layout == "ours":
        return state
    v2 = "stages.0.0.mlp.grn.gamma" in state
    if layout == "torchvision" and (v2 or "stages.0.0.layer_scale.gamma" not in state):
        raise ValueError(f"torchvision has no ConvNeXt {'V2' if v2 else 'without LayerScale'}")
    theirs, shapes, exported = names(layout), SHAPES[layout], {}
    if layout == "timm" and model.downsample_layers[0][0].out_channels >= 96:
        shapes = {}  # only atto, femto, pico and nano have 1x1 convolutions there
    for ours, tensor in state.items():
        if ours not in theirs:
            raise ValueError(f"{ours} has no name in the layout {layout!r}; a model wrapped by "
                             "torch.compile or DataParallel has to be unwrapped first")
        name = theirs[ours]
        for ending, pattern in shapes.items():
            if name.endswith(ending):
                tensor = rearrange(tensor, pattern)
        if layout == "huggingface" and "head.fc.weight" in state and "classifier" not in name:
            name = ("convnextv2." if v2 else "convnext.") + name
        exported[name] = tensor
    return exported


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of names, types, shapes and values: in .safetensors files, which have none of their own."""
    digest = hashlib.sha256()
    for name, text in sorted(metadata.items()):
        if name != "checksum":
            digest.update(f"{name} {text}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_file(path: str | PathLike) -> tuple[Mapping, Mapping[str, str]]:
    """Content and metadata of a .safetensors, .pt or .pth file, if nothing in it is damaged.

    Never runs anything that a file brings along. Raises FileNotFoundError, ValueError, or
    ModuleNotFoundError without safetensors.
    """
    try:
        if str(path).endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if (given := metadata.get("checksum")) and given != checksum(content, metadata):
                raise ValueError("the checksum differs")
            return content, metadata
        if zipfile.is_zipfile(path):  # as torch.save writes it, with checksums torch.load ignores
            with zipfile.ZipFile(path) as archive:
                if (member := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {member} differs")
        # weights_only: an ordinary pickle can run any program as it is opened. Beside plain data
        # the authors' training program stores its arguments, a Namespace, which can not.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # on the way to an error, about the pickle's version
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, Mapping):
            raise TypeError("not a mapping")
        return content, {}
    except (FileNotFoundError, ModuleNotFoundError):
        raise
    except Exception as error:  # a damaged file can make the readers raise anything
        raise ValueError(f"{path} is not a readable file of tensors and plain data, or it is "
                         "damaged") from error


SETTINGS = {"args", "classes", "mean", "std"}  # what train.py notes in its files


def settings_of(content: Mapping, metadata: Mapping[str, str]) -> dict[str, Any]:
    """SETTINGS, and more, of a file that train.py wrote; of another file {}."""
    if metadata.keys() >= SETTINGS:
        return {k: json.loads(text) for k, text in metadata.items() if k != "checksum"}
    if content.keys() >= SETTINGS | {"model"} and isinstance(content["args"], dict):
        return {name: content[name] for name in SETTINGS}
    return {}


DOWNLOADS = ("timm:", "hf:", "https:")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def download(source: str) -> tuple[str, dict[str, Any]]:
    """timm:NAME, hf:REPO or an https address -> its file's path, and the settings timm has for it.

    The file goes where its library keeps such files, and is fetched only once. Raises ValueError
    for a name that cannot be, ConnectionError for what cannot be fetched.
    """
    kind, _, name = source.partition(":")
    settings: dict[str, Any] = {}
    try:
        if kind == "https":
            # Two addresses may end alike; torchvision's names have the beginning of a hash.
            prefix = hashlib.sha256(name.encode()).hexdigest()[:8]
            folder = Path(torch.hub.get_dir(), "checkpoints")
            path = folder / f"{prefix}-{Path(urlparse(source).path).name}"
            begins = re.search(r"download\.pytorch\.org/.*-([0-9a-f]{8})\.", source)
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(source, str(path), begins and begins[1])
            return str(path), settings
        if kind == "timm":
            import timm

            config = timm.models.get_pretrained_cfg(name)
            if not config or not config.hf_hub_id:
                raise ValueError("timm has no pretrained weights of that name")
            name, settings = config.hf_hub_id, {
                "mean": list(config.mean), "std": list(config.std),
                "img_size": config.input_size[-1],
                "crop_pct": None if config.crop_mode == "squash" else config.crop_pct}
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return hf_hub_download(name, "model.safetensors"), settings
        except LocalEntryNotFoundError:  # there is no connection
            raise
        except EntryNotFoundError:
            return hf_hub_download(name, "pytorch_model.bin"), settings
    except Exception as error:  # each client has its own
        wrong_name = isinstance(error, ValueError | RuntimeError)
        reason = first_line(error).rstrip(".")
        raise (ValueError if wrong_name else ConnectionError)(f"{source}: {reason}") from error


# What training programs put around a state dict, and before its names. Where there is an average
# of the weights it is taken, as timm does: its accuracy is the published one.
WRAPPERS = ("ema", "model_ema", "state_dict_ema", "model", "state_dict")
PREFIXES = re.compile(r"((module|_orig_mod|model|net|backbone|convnext|convnextv2)\.)*")


def unwrap(content: Mapping) -> dict[str, Any]:
    """What a training program saved -> the state dict in it, without prefixes."""
    while wrapper := next((k for k in WRAPPERS if isinstance(content.get(k), Mapping)), None):
        content = content[wrapper]
    state: dict[str, Any] = {}
    for name, value in content.items():
        plain = PREFIXES.sub("", str(name), count=1)
        if plain in state:
            raise ValueError(f"these weights have {plain} twice")
        if plain != "n_averaged":  # AveragedModel's counter
            state[plain] = value
    return state


OTHER_NETWORKS = {  # a parameter that a relative has -> why it does not fit
    "stem.2.weight": "timm's `_ols`: its stem is two overlapping convolutions",
    "norm_pre.weight": "timm's `_hnf`: its head normalises before it averages",
    "head.pre_logits.fc.weight": "timm's `_mlp`: its head has a hidden layer",
    "blocks.0.dwconv.weight": "an isotropic ConvNeXt: it has one resolution, and no stages",
    "mask_token": "FCMAE's encoder and decoder: only encoders saved for fine-tuning are ConvNeXts",
}


class Weights(NamedTuple):
    """A checkpoint in our terms."""

    tensors: dict[str, Tensor]  # by our names, in our shapes
    layout: str
    left_out: list[str]  # entries that are no parameters
    settings: dict[str, Any]  # train.py's SETTINGS, or timm's mean, std, img_size, crop_pct


def read_weights(source: Weights | Mapping | str | PathLike) -> Weights:
    """A checkpoint of any layout, with our names; see load_weights for what a source can be.

    Raises ValueError for anything but a ConvNeXt's weights, and what read_file, download raise.
    """
    if isinstance(source, Weights):
        return source
    content, settings = source, {}
    if isinstance(source, str | PathLike):
        path = source
        if str(source).startswith(DOWNLOADS):
            path, settings = download(str(source))
        content, metadata = read_file(path)
        settings |= settings_of(content, metadata)
    if not isinstance(content, Mapping):
        raise TypeError(f"weights are a state dict or a file, not a {type(content).__name__}")
    given = unwrap(content)
    for name, network in OTHER_NETWORKS.items():
        if name in given:
            raise ValueError(f"these are the weights of {network}")
    first = "stages.0.0.mlp.pwconv1.weight"  # has another name in each layout
    layout = next((one for one in LAYOUTS if names(one).get(first, first) in given), None)
    if layout is None:
        raise ValueError(f"these are no weights of a ConvNeXt ({', '.join([*given][:3])}, ...)")
    if layout == "timm" and "stem.1.bias" not in given:
        raise ValueError("these are the weights of timm's `_rms`: its norms have no bias")
    ours, tensors, left_out = {there: here for here, there in names(layout).items()}, {}, []
    for name, tensor in given.items():
        name = ours.get(name, name)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            left_out.append(name)
        elif name.endswith(("gamma", "beta")) and tensor.numel() == max(tensor.shape, default=0):
            tensors[name] = tensor.flatten()
        elif ".pwconv" in name and tensor.shape[2:] == (1, 1):
            tensors[name] = rearrange(tensor, "o i 1 1 -> o i")
        else:
            tensors[name] = tensor
    return Weights(tensors, layout, left_out, settings)


class Report(NamedTuple):
    """What load_weights did, by our names."""

    layout: str
    loaded: list[str]
    kept: list[str]  # parameters that stayed as they were in the model, and why
    left_out: list[str]  # entries of the source that the model has no place for

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.kept)
        text = f"{len(self.loaded)} of {total} parameters loaded, from the layout {self.layout!r}"
        if self.kept:
            text += f"; kept as they were: {', '.join(self.kept)}"
        if self.left_out:
            text += f"; left out: {', '.join(self.left_out)}"
        return text


def load_weights(model: ConvNeXt, source: Weights | Mapping | str | PathLike,
                 strict: bool = False) -> Report:
    """Copy weights into the model: all of them but for a stem or a head that does not fit, or none.

    source: a state dict, or the path of a .safetensors, .pt, .pth or .bin file that holds one, an
    https address of such a file, `timm:NAME`, `hf:REPO`, or what read_weights returned; in the
    layout of Meta, timm, torchvision, Hugging Face or this file. The model keeps its classifier if
    the source has another number of classes or none, and its stem if the patches or channels
    differ, unless `strict`; it keeps its last norm if the source has no head at all (a backbone).
    A warning then says so.

    Raises ValueError for weights that cannot be read, or of another network; FileNotFoundError for
    a missing file and ConnectionError for one that cannot be fetched. The model is then unchanged.
    """
    weights = read_weights(source)
    given, state = weights.tensors, model.state_dict()
    stem, norm, classifier = "downsample_layers.0.0.", "head.norm.", "head.fc."

    def fits(name: str) -> bool:
        return name in given and name in state and given[name].shape == state[name].shape

    no_classifier = not any(name.startswith(classifier) for name in given)
    keep: list[str] = []
    if no_classifier and not any(name.startswith(norm) for name in given):
        keep.append(norm)
    if not strict and (no_classifier or not fits(f"{classifier}weight")):
        keep.append(classifier)
    if not strict and f"{stem}weight" in given and not fits(f"{stem}weight"):
        keep.append(stem)

    found, kept, problems = {}, [], []
    for name, parameter in state.items():
        tensor, here = given.get(name), tuple(parameter.shape)
        there = "is missing there" if tensor is None else f"is {tuple(tensor.shape)} there"
        if name.startswith(tuple(keep)):
            kept.append(f"{name} {there}, {here} here")
        elif fits(name):
            found[name] = tensor
        else:
            problems.append(f"{name} {there}, {here} here")
    unknown = [name for name in given if name not in state]
    surplus = ("head.fc.weight", "head.fc.bias") if classifier in keep else ()
    problems += [f"{name} is unknown here" for name in unknown if name not in surplus]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"these weights do not fit the model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(found, strict=False)
    report = Report(weights.layout, [*found], kept, unknown + weights.left_out)
    if report.kept or report.left_out:
        warnings.warn(str(report), stacklevel=2)
    return report


def infer_architecture(weights: Weights) -> dict[str, Any]:
    """create_convnext's arguments for the network that has these weights, from their shapes."""
    tensors = weights.tensors
    needed = "downsample_layers.0.0.weight", *(f"stages.{s}.0.dwconv.weight" for s in range(4))
    for name in needed:
        if name not in tensors or tensors[name].ndim != 4:
            raise ValueError(f"{name} is missing, or does not have four axes")
    (_, in_channels, patch_size, _), *filters = (tensors[name].shape for name in needed)
    dims = tuple(shape[0] for shape in filters)
    depths = tuple(sum(name.startswith(f"stages.{s}.") and name.endswith(".dwconv.weight")
                       for name in tensors) for s in range(4))
    shape = Variant(depths, dims, grn="stages.0.0.mlp.grn.gamma" in tensors)
    variant = next((name for name, other in VARIANTS.items() if other == shape), None)
    if variant is None:
        raise ValueError(f"no variant has {depths} blocks of {dims} channels"
                         f"{' and GRN' if shape.grn else ''}")
    classifier = tensors.get("head.fc.weight", torch.empty(0))
    return {"variant": variant, "in_channels": in_channels, "patch_size": patch_size,
            "num_classes": len(classifier) if classifier.ndim == 2 else 0,
            "layer_scale": 1e-6 if "stages.0.0.layer_scale.gamma" in tensors else 0.0}


def from_checkpoint(source: Weights | Mapping | str | PathLike) -> ConvNeXt:
    """The network that a checkpoint holds, with its weights, in evaluation mode.

    source, errors: see load_weights. Variant, classes (none for a backbone), channels and patch
    size follow from the tensors; whatever then does not fit is an error.
    """
    weights = read_weights(source)
    with torch.device("meta"):  # no random numbers for what is overwritten at once
        model = create_convnext(**infer_architecture(weights))
    model.to_empty(device="cpu").head.norm.reset_parameters()  # which a backbone may lack
    load_weights(model, weights, strict=True)
    return model.eval()


# --- Faster: the same function, sooner. Nothing else is to be learned here: skip it at will. ----


class DepthwiseGradient(torch.autograd.Function):
    """The depthwise convolution with derivatives that are depthwise convolutions again.

        ∂L/∂x[c, i, j] = Σ_{u,v} W[c, u, v] · g[c, i - u + 3, j - v + 3],     g = ∂L/∂y
        ∂L/∂W[c, u, v] = Σ_b Σ_{i,j} g[b, c, i, j] · x[b, c, i + u - 3, j + v - 3]

    The first convolves g with W turned by 180 degrees. In the second, g is the filter: as large
    as the map, and slid over x to only 7x7 places. Samples do not mix until the sum over b, so a
    batch is b·c channels of one image. PyTorch's forward kernel, which computes in the width of
    the CPU's vector registers along the channels, does that several times as fast as its kernel
    for this gradient: the README has the measurements.
    """

    # For torch.func's vmap, grad and jacrev; its forward mode (jvp) wants fast_gradient = False.
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        (x, weight), grad_x, grad_weight = ctx.saved_tensors, None, None
        radius = weight.shape[-1] // 2
        if ctx.needs_input_grad[0]:
            turned = weight.to(g.dtype).flip(2, 3)
            grad_x = F.conv2d(g, turned, padding=radius, groups=len(weight))
        if ctx.needs_input_grad[1]:
            c, h, w = x.shape[1:]
            # An offset as large as the map meets nothing but padding: its gradient is zero.
            reach = min(radius, h - 1), min(radius, w - 1)
            grad_weight = weight.new_zeros(c, *(2 * r + 1 for r in reach))
            at_once = max(1, 2**20 // (c * h * w))  # samples; about what fits into the cache
            for xs, gs in zip(x.split(at_once), g.split(at_once)):
                xs = rearrange(xs, "b c h w -> 1 (b c) h w")
                gs = rearrange(gs, "b c h w -> (b c) 1 h w")
                part = F.conv2d(xs, gs, padding=reach, groups=len(gs))
                part = rearrange(part, "1 (b c) u v -> b c u v", c=c)
                grad_weight = grad_weight + part.sum(0, dtype=weight.dtype)
            top, left = (radius - r for r in reach)
            grad_weight = F.pad(grad_weight[:, None], (left, left, top, top))
        return grad_x, grad_weight, reduce(g, "b c h w -> c", "sum")


# Where it was measured to pay. Other devices and number types have other kernels: PyTorch's own.
FAST_DTYPES: tuple[torch.dtype, ...] = ()
if torch.backends.mkldnn.is_available():
    FAST_DTYPES = {"AVX2": (torch.float32,), "AVX512": (torch.float32, torch.bfloat16)}.get(
        torch.backends.cpu.get_cpu_capability(), ())


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What DepthwiseConv computes; backward by DepthwiseGradient where that is faster.

    x: (b, c, h, w). weight: (c, 1, k, k), k odd. bias: (c,). Returns (b, c, h, w).
    """
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # F.conv2d sees to it itself
        x = x.to(torch.get_autocast_dtype("cpu"))
    fast = x.device.type == "cpu" and x.dtype in FAST_DTYPES and x.numel() > 0
    apply = DepthwiseGradient.apply if fast else DepthwiseGradient.forward
    return apply(x, weight, bias)


@torch.no_grad()
def fold_layer_scale(model: ConvNeXt) -> ConvNeXt:
    """Multiply every LayerScale into the linear layer before it, in place; same logits.

        γ ⊙ (W·x + b) = (γ ⊙ W)·x + γ ⊙ b

    For deployment: one pass over memory less in each block. Training would go another way from
    here on, as γ is gone. Returns the model.
    """
    for block in model.modules():
        if isinstance(block, Block) and isinstance(block.layer_scale, LayerScale):
            gamma, linear = block.layer_scale.gamma, block.mlp.pwconv2
            linear.weight *= rearrange(gamma, "c -> c 1")
            linear.bias *= gamma
            block.layer_scale = nn.Identity()
    return model


# --- The road: how the paper gets here from a ResNet-50 (section 2, table 10) -------------------


class Design(NamedTuple):
    """Everything that the paper changes. The defaults are ResNet-50."""

    depths: tuple[int, ...] = (3, 4, 6, 3)
    patchify: bool = False  # the stem: 4x4 patches instead of a strided 7x7 and a max-pool
    depthwise: bool = False  # the convolution over positions has one filter a channel
    width: int = 64  # of the first stage; it doubles from stage to stage
    inverted: bool = False  # blocks are narrow - wide - narrow, not wide - narrow - wide
    depthwise_first: bool = False  # positions are mixed before the widening, not in the middle
    kernel_size: int = 3
    act: type[nn.Module] = nn.ReLU
    one_act: bool = False  # a block has one activation, not three
    one_norm: bool = False  # a block has one norm, not three
    norm: type[nn.Module] = nn.BatchNorm2d
    separate_downsampling: bool = False  # layers of their own halve the resolution


class Step(NamedTuple):
    name: str
    change: dict  # fields of Design; a step keeps those of the steps before it
    top1: float  # ImageNet accuracy in %, from table 10: means of three trainings of 300 epochs
    gflops: float  # multiply-accumulates in 1e9 at 224x224, from table 10


ROADMAP = (
    Step("ResNet-50, new recipe", {}, 78.82, 4.09),
    Step("stage ratio", {"depths": (3, 3, 9, 3)}, 79.36, 4.53),
    Step("patchify stem", {"patchify": True}, 79.51, 4.42),
    Step("depthwise conv", {"depthwise": True}, 78.28, 2.35),
    Step("width 64 to 96", {"width": 96}, 80.50, 5.27),
    Step("inverted bottleneck", {"inverted": True}, 80.64, 4.64),
    Step("depthwise conv first", {"depthwise_first": True}, 79.92, 4.07),
    Step("kernel 5x5", {"kernel_size": 5}, 80.35, 4.10),
    Step("kernel 7x7", {"kernel_size": 7}, 80.57, 4.15),
    Step("kernel 9x9", {"kernel_size": 9}, 80.57, 4.21),
    Step("kernel 11x11", {"kernel_size": 11}, 80.47, 4.29),
    Step("GELU, kernel 7x7", {"kernel_size": 7, "act": nn.GELU}, 80.62, 4.15),
    Step("one activation", {"one_act": True}, 81.27, 4.15),
    Step("one norm", {"one_norm": True}, 81.41, 4.15),
    # The paper prints 4.46 and 4.49 here. But LayerNorm costs what BatchNorm does in this count
    # (its table 11 agrees), and 4.46 is the next step's: ConvNeXt-T has 4.456e9 MACs.
    Step("LayerNorm", {"norm": LayerNorm2d}, 81.47, 4.46),
    Step("separate downsampling", {"separate_downsampling": True}, 81.97, 4.49),
)


class RoadmapBlock(nn.Module):
    """A bottleneck on the way from ResNet's to ConvNeXt's. (b, c, h, w) -> (b, dim, h, w)"""

    def __init__(self, design: Design, dim_in: int, width: int, stride: int) -> None:
        super().__init__()
        d, k = design, design.kernel_size
        middle, self.dim = (4 * width, width) if d.inverted else (width, 4 * width)
        shapes = [(dim_in, middle, 1), (middle, middle, k), (middle, self.dim, 1)]
        spatial = 1
        if d.depthwise_first:
            shapes, spatial = [(dim_in, dim_in, k), (dim_in, middle, 1), (middle, self.dim, 1)], 0
        layers: list[nn.Module] = []
        for i, (c_in, c_out, size) in enumerate(shapes):
            here, normed = i == spatial, i == spatial or not d.one_norm
            layers.append(nn.Conv2d(
                c_in, c_out, size, stride if here else 1, size // 2,
                groups=c_in if here and d.depthwise else 1, bias=self.needs_bias(d, normed)))
            layers += [d.norm(c_out)] if normed else []
            layers += [d.act()] if i == 1 or i == 0 and not d.one_act else []
        self.branch = nn.Sequential(*layers)
        self.shortcut = nn.Identity() if (dim_in, stride) == (self.dim, 1) else nn.Sequential(
            nn.Conv2d(dim_in, self.dim, 1, stride, bias=self.needs_bias(d, True)),
            d.norm(self.dim))
        self.act = nn.Identity() if d.one_act else d.act()
        # The paper does not say in which steps LayerScale was there; ConvNeXt has it.
        self.layer_scale = LayerScale(self.dim) if d.separate_downsampling else nn.Identity()

    @staticmethod
    def needs_bias(design: Design, normed: bool) -> bool:
        return not (normed and design.norm is nn.BatchNorm2d)  # which would subtract it again

    def forward(self, x: Tensor) -> Tensor:
        y = rearrange(self.branch(x), "b c h w -> b h w c")
        return self.act(self.shortcut(x) + rearrange(self.layer_scale(y), "b h w c -> b c h w"))


def roadmap_network(design: Design, num_classes: int = 1000) -> nn.Sequential:
    """Any network of the road, with PyTorch's initialisation. (b, 3, h, w) -> (b, num_classes)"""
    d, dim = design, design.width
    if d.patchify:  # its norm is a guess, the paper names none before the last step
        layers: list[nn.Module] = [Patchify(3, dim), d.norm(dim)]
    else:
        layers = [nn.Conv2d(3, dim, 7, 2, 3, bias=False), d.norm(dim), d.act(),
                  nn.MaxPool2d(3, 2, 1)]
    for stage, depth in enumerate(d.depths):
        width = d.width * 2**stage
        if stage and d.separate_downsampling:
            layers.append(Downsample(dim, width))
            dim = width
        for b in range(depth):
            strided = stage and b == 0 and not d.separate_downsampling
            layers.append(RoadmapBlock(d, dim, width, stride=2 if strided else 1))
            dim = layers[-1].dim
    head = Head(dim, num_classes)
    if not d.separate_downsampling:
        head.norm = nn.Identity()
    return nn.Sequential(*layers, head)


def roadmap() -> Iterator[tuple[Step, Design]]:
    """Each step of the paper's road with the whole design it arrives at."""
    design = Design()
    for step in ROADMAP:
        design = design._replace(**step.change)
        yield step, design


if __name__ == "__main__":
    print(*table(), sep="\n")
