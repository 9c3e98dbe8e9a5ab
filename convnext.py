"""ConvNeXt in one file, to be read from top to bottom.

    import torch
    import convnext

    images = torch.randn(8, 3, 224, 224)
    model = convnext.create_convnext("tiny", num_classes=10)  # random weights
    logits = model(images)                                    # (8, 10)
    maps = model.forward_pyramid(images)                      # the map of each stage, for detection
    convnext.speed_up(model)                                  # train faster on a CPU
    small = convnext.create_convnext("tiny", patch_size=2)    # for images of 32x32 pixels
    middle = convnext.roadmap_network(convnext.DESIGNS["GELU"])  # between ResNet-50 and ConvNeXt

    model = convnext.from_checkpoint("timm:convnext_tiny.fb_in1k")  # pretrained; evaluation mode
    convnext.load_weights(model, "weights.pth")               # copy a file's weights into a model
    weights = convnext.export_state_dict(model, "timm")       # for timm, torchvision or others

It needs torch, einops and safetensors. "timm:", "hf:" and folders that timm wrote also need timm
and huggingface_hub.

"A ConvNet for the 2020s" (Liu et al., 2022, https://arxiv.org/abs/2201.03545) starts from a
ResNet-50 and changes one thing after another, until a purely convolutional network is more accurate
than a Swin Transformer of the same cost (82.0 against 81.3 %). An image passes through the result,
ConvNeXt-Tiny, like this:

    image                            3 x 224 x 224
    stem                            96 x  56 x  56    embed each patch of 4x4 pixels
    stage 1: 3 blocks               96 x  56 x  56
    stage 2: downsample, 3 blocks  192 x  28 x  28
    stage 3: downsample, 9 blocks  384 x  14 x  14
    stage 4: downsample, 3 blocks  768 x   7 x   7
    head                          1000                average over positions, normalise, classify

and each block computes x + branch(x), where the branch first mixes positions, then channels.

Part 1 builds the network from its smallest layers up. Part 2 builds every network on the road from
ResNet-50 to here and counts costs: `python convnext.py` lists the variants of ConvNeXt, and
`python convnext.py --road` lists the steps of the road. Part 3 reads and writes the checkpoints of
other libraries, and part 4 makes the network faster. To understand ConvNeXt, read parts 1 and 2.

Sections, tables and figures named below are the paper's; V2 is https://arxiv.org/abs/2301.00808
(Woo et al., 2023). Formulas describe a single image, without the batch axis. In shapes, b = batch,
c = channels, h, w = height and width. The einops patterns that reorder axes, such as
"b c h w -> b h w c", show the shape before and after. Gains are in percentage points of top-1
accuracy on ImageNet-1K: differences between rows of table 10, which are means of three trainings.
Their standard deviations are 0.02 to 0.18, so gains below 0.2 points may be chance.

The network computes what the authors' code does (https://github.com/facebookresearch/ConvNeXt),
and is initialised like it. `patch_size` is an addition: patches of 4x4 pixels leave too few
positions of a small image. Each idea is a module of its own, so the authors' layer `pwconv1` is
called `mlp.pwconv1` here.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from os import PathLike
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# --- Part 1. The network --------------------------------------------------------------------------

class Patchify(nn.Conv2d):
    """Cut a map into squares of p×p positions and turn each into a vector of dim numbers.

    (b, c, h, w) -> (b, dim, h // p, w // p), with p = patch_size:

        y[:, i, j] = W · flatten(x[:, p·i : p·i + p, p·j : p·j + p]) + bias

    This is a convolution whose stride equals its kernel size, so the windows do not overlap. It is
    the same as one linear layer shared by all patches: W is the convolution's weight, flattened
    from dim x c x p x p to dim x (c·p²). Rows and columns that do not fill a patch are dropped.

    The stem has p = 4, the layers between the stages have p = 2. ResNet's stem is a 7x7 convolution
    with overlapping windows and a max-pool. Patches, which vision transformers use, are simpler and
    do as well: they gain 0.15 points (section 2.2).
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int = 4) -> None:
        super().__init__(in_channels, dim, kernel_size=patch_size, stride=patch_size)

class DepthwiseConv(nn.Conv2d):
    """Filter each channel on its own with a k×k kernel.

    (b, dim, h, w) -> (b, dim, ⌈h / s⌉, ⌈w / s⌉), with s = stride:

        y[c, i, j] = Σ_{u,v} W[c, u, v] · x[c, s·i + u - r, s·j + v - r] + bias[c]

    with u, v = 0 ... k - 1, k = kernel_size, r = k // 2, and x = 0 outside the map. In PyTorch this
    is a convolution with as many groups as channels, whose weight W is stored as (dim, 1, k, k). In
    ConvNeXt k is 7 and s is 1; some blocks of part 2 have a stride of 2. Like the weighted sum in
    self-attention, this mixes positions and keeps channels apart. MobileNet has such convolutions;
    ResNeXt's mix the channels of small groups (section 2.3).

    A 7x7 kernel takes 49·dim multiplications per position, where a dense 7x7 convolution takes
    49·dim², so a large kernel is affordable. Moving this layer to the front of the block costs 0.72
    points, going from 3x3 to 7x7 gains 0.65, and larger kernels gain no more. Swin's attention
    windows are also 7x7 (section 2.5). Raises ValueError for an even kernel size, which would
    change the size of the map.
    """

    def __init__(self, dim: int, kernel_size: int = 7, stride: int = 1) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {kernel_size}")
        super().__init__(dim, dim, kernel_size, stride, padding=kernel_size // 2, groups=dim)

class LayerNorm(nn.LayerNorm):
    """Normalise the channels of each position on their own. (..., dim) -> (..., dim)

        y = weight ⊙ (x - mean(x)) / √(var(x) + ε) + bias

    Mean and variance are taken over the last axis, the channels, of one position of one image.
    (GroupNorm with one group is different: it also averages over the positions.) BatchNorm takes
    them over all positions of all images of the batch and, in evaluation, uses averages from the
    training instead. Replacing it gained only 0.06 points (section 2.6). The benefit is elsewhere:
    an image no longer depends on the rest of its batch, and evaluation computes what training does.

    ε prevents a division by zero where all channels are alike. If the variance is not much larger
    than ε, pretrained weights need the ε of their training, 1e-6. PyTorch's default is 1e-5.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

class LayerNorm2d(LayerNorm):
    """LayerNorm of a feature map. (b, dim, h, w) -> (b, dim, h, w)

    nn.LayerNorm acts on the last axis, so the channels are moved there and back. That changes only
    strides and copies nothing. The norm then copies the map, unless the channels of a position lie
    side by side in memory already, in the order that PyTorch calls "channels_last".
    """

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(rearrange(x, "b c h w -> b h w c"))
        return rearrange(x, "b h w c -> b c h w")

class GRN(nn.Module):
    """Global response normalisation, for ConvNeXt V2 alone. (b, h, w, dim) -> (b, h, w, dim)

        y = γ ⊙ (x ⊙ n) + β + x,   n[c] = ‖x[:, :, c]‖ / (m + ε),   m = mean over k of ‖x[:, :, k]‖

    with x indexed by row, column and channel, the norm ‖·‖ taken over all positions of an image,
    and ε = 1e-6. V2 is pre-trained by filling in masked parts of images. When V1 is pre-trained in
    this way, many of its channels respond alike. GRN makes channels compete: n is large where a
    channel responds more strongly than the average of all (V2, section 4). γ and β start at 0, so
    the layer starts as the identity.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        # The sum needs float32: squares overflow float16, and bfloat16 rounds small terms away.
        precise = torch.promote_types(x.dtype, torch.float32)
        squares = x.to(precise).square().sum((1, 2), keepdim=True)  # (b, 1, 1, dim)
        norm = squares.clamp(min=1e-30).sqrt()  # keeps the derivative of √ finite at 0
        n = norm / (norm.mean(-1, keepdim=True) + 1e-6)
        scale = (self.gamma * n).to(x.dtype)
        # (x + β) + x ⊙ scale. In x ⊙ (1 + scale) + β, half precision would round 1 + scale first.
        return torch.addcmul(x + self.beta.to(x.dtype), x, scale)  # addcmul(a, b, c) = a + b ⊙ c

class InvertedBottleneck(nn.Module):
    """Two linear layers around a GELU, the same at every position. (..., dim) -> (..., dim), with
    GRN (b, h, w, dim) -> (b, h, w, dim)

        y = W₂ · GELU(W₁ · x + b₁) + b₂,   W₁: dim -> 4·dim,   W₂: 4·dim -> dim

    ResNet's bottleneck is wide - narrow - wide. MobileNetV2's, like the MLP of a transformer, is
    narrow - wide - narrow (section 2.4). This one also has the transformer's single activation,
    where ResNet has one after each layer. GELU is a smooth ReLU, x · Φ(x), with Φ the distribution
    function of the standard normal (section 2.6). Nine tenths of Tiny's parameters are in these
    layers: 8·dim² per block, shared by all positions. grn: put a GRN after the GELU, as V2 does.
    """

    def __init__(self, dim: int, expansion: int = 4, grn: bool = False) -> None:
        super().__init__()
        # pw stands for pointwise. A 1x1 convolution computes the same, but nn.Linear acts on the
        # last axis, as LayerNorm does, so between the two nothing has to be moved.
        self.pwconv1 = nn.Linear(dim, expansion * dim)
        self.act = nn.GELU()
        self.grn = GRN(expansion * dim) if grn else nn.Identity()
        self.pwconv2 = nn.Linear(expansion * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.pwconv2(self.grn(self.act(self.pwconv1(x))))

class LayerScale(nn.Module):
    """Multiply each channel of the branch by a learned factor. (..., dim) -> (..., dim)

        y = γ ⊙ x,   γ starts at `init`, 1e-6 in the paper

    This comes from CaiT, a deep vision transformer (Touvron et al., 2021). With so small a γ every
    block starts as almost the identity, and its branch grows as far as it proves useful.
    """

    def __init__(self, dim: int, init: float = 1e-6) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x

class DropPath(nn.Module):
    """Stochastic depth: drop the branch of random samples in training. (b, ...) -> (b, ...)

        y = x · keep / (1 - p),   keep ~ Bernoulli(1 - p), drawn per sample

    A sample whose branch is dropped passes through the block unchanged, so the network cannot rely
    on any single block (Huang et al., 2016). Dividing by 1 - p keeps the expectation. In evaluation
    nothing is dropped. Raises ValueError unless 0 <= p < 1.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must be at least 0 and below 1, not {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        shape = [x.shape[0]] + [1] * (x.ndim - 1)  # (b, 1, 1, 1) for a feature map
        keep = x.new_empty(shape).bernoulli_(1 - self.p)  # 1 with probability 1 - p, else 0
        return x * (keep / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p:.3f}"

class Block(nn.Module):
    """The ConvNeXt block (figure 4). (b, dim, h, w) -> (b, dim, h, w)

        y = x + DropPath(LayerScale(InvertedBottleneck(LayerNorm(DepthwiseConv(x)))))

    A transformer block mixes positions by attention and then channels by an MLP, each with a norm
    and a shortcut. Here the two share one norm and one shortcut. ResNet's block has three norms and
    three activations. Removing two of the activations gained 0.65 points, removing two of the norms
    0.14 (section 2.6); the paper does not explain why. Of the 49·dim + 8·dim² multiplications per
    position, the 7x7 kernel takes 6 % at 96 channels and 0.8 % at 768.

    The two rearranges copy nothing (see LayerNorm2d). Nor does the norm, as the stem's norm leaves
    the maps in channels_last order, and in float32 the convolutions keep it.

    drop_path: p of DropPath. layer_scale: initial γ of LayerScale, 0 for none. grn: add V2's GRN.
    To try other layers, change DepthwiseConv, LayerNorm or InvertedBottleneck; pretrained weights
    fit only layers with the same parameters.
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
        x = self.dwconv(x)  # mixes positions, (b, dim, h, w)
        x = rearrange(x, "b c h w -> b h w c")  # what follows acts on the channels, the last axis
        x = self.norm(x)
        x = self.mlp(x)  # mixes channels, (b, h, w, dim)
        x = self.layer_scale(x)
        x = rearrange(x, "b h w c -> b c h w")
        return shortcut + self.drop_path(x)

class Downsample(nn.Sequential):
    """Halve the resolution between two stages. (b, dim_in, h, w) -> (b, dim, h // 2, w // 2)

    ResNet does this inside the first block of a stage. ConvNeXt, like Swin, has a separate layer, a
    2x2 convolution of stride 2. With separate layers alone, training diverged. It became stable
    with a LayerNorm before each of them, one after the stem and one after the final average
    (section 2.6). Swin's layer, too, has the norm before the linear map. (In the stem the norm
    comes second, since its convolution takes the image.)
    """

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__(LayerNorm2d(dim_in), Patchify(dim_in, dim, patch_size=2))

class Head(nn.Module):
    """Average over the positions, normalise, classify. (b, dim, h, w) -> (b, num_classes)

    Swin normalises before it averages. With `num_classes` 0 the head returns the normalised
    features, (b, dim).
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(reduce(x, "b c h w -> b c", "mean")))

class ConvNeXt(nn.Module):
    """Stages of blocks, each at half the resolution of the stage before (table 9).

    depths: the number of blocks in each stage, for any number of stages. The paper has most of them
    in stage 3, as Swin does.
    dims: the number of channels in each stage, which can be read as `model.dims`.
    num_classes: 0 for features. in_channels: channels of the image.
    drop_path: p of the last block's DropPath, in [0, 1). It rises linearly from 0 at the first
    block. The paper trains Tiny with 0.1, Small with 0.4, Base and Large with 0.5 (table 5).
    grn: put a GRN into each block, as ConvNeXt V2 does.
    layer_scale: initial γ, 0 for no LayerScale. The default is 1e-6, and 0 with grn: V2's paper
    found LayerScale unnecessary there.

    patch_size: of the stem, 4 in the paper. Four stages turn an image of 32x32 pixels into a map of
    1x1 positions with patch_size 4, of 2x2 with patch_size 2, and of 4x4 with patch_size 1. Half
    the patch size means four times as many positions, and so four times the work.

    head_init_scale: a factor on the classifier's initial weights, 0.001 in fine-tuning (table 6).
    Random classifier weights send a meaningless gradient into pretrained layers. Small ones let the
    classifier learn first.

    All weights start with a standard deviation of 0.02, which slows small networks down. They learn
    faster with train.py's fan_in_init and local_init, and without LayerScale.
    """

    def __init__(
        self, depths: tuple[int, ...], dims: tuple[int, ...], *, num_classes: int = 1000,
        in_channels: int = 3, patch_size: int = 4, drop_path: float = 0.0,
        layer_scale: float | None = None, grn: bool = False, head_init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not depths or len(depths) != len(dims) or min(*depths, *dims) < 1:
            raise ValueError("depths and dims must have one number, 1 or more, for each stage, not "
                             f"{tuple(depths)} and {tuple(dims)}")
        if patch_size < 1:
            raise ValueError(f"patch_size must be 1 or more, not {patch_size}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, not {drop_path}")
        if layer_scale is None:
            layer_scale = 0.0 if grn else 1e-6
        self.dims = tuple(dims)
        stem = nn.Sequential(Patchify(in_channels, dims[0], patch_size), LayerNorm2d(dims[0]))
        # The authors' name: downsample_layers[i] stands before stages[i], so the first is the stem.
        self.downsample_layers = nn.ModuleList([stem])
        for dim_in, dim in pairwise(dims):
            self.downsample_layers.append(Downsample(dim_in, dim))
        self.stages = nn.ModuleList()
        index = 0  # of the block in the whole network
        for depth, dim in zip(depths, dims, strict=True):
            stage = nn.Sequential()
            for _ in range(depth):
                # Early blocks are dropped less often, since every later block builds on them.
                rate = drop_path * index / max(1, sum(depths) - 1)
                stage.append(Block(dim, rate, layer_scale, grn))
                index += 1
            self.stages.append(stage)
        self.head = Head(dims[-1], num_classes)
        self.apply(self._init_weights)
        if num_classes:
            with torch.no_grad():
                self.head.fc.weight *= head_init_scale

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        # Table 5 prints a standard deviation of 0.2; the authors' code and the libraries have 0.02.
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)  # cut at ±2, so in effect a normal one
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> (b, num_classes) logits, or (b, dims[-1]) features."""
        return self.head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> the last stage's map, before the head's average and norm.
        (The authors' method of this name includes both.) Its shape: see forward_pyramid."""
        return self.forward_pyramid(x)[-1]

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """(b, in_channels, h, w) -> the map of each stage, (b, dims[i], h // stride, w // stride).

        stride = patch_size · 2^i pixels per position: 4, 8, 16 and 32 by default. Detection and
        segmentation heads take such maps, often with a norm for each. Raises ValueError for a wrong
        number of axes or channels, and for an image smaller than the last stride.
        """
        self._check(x)
        maps = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
            maps.append(x)
        return maps

    def _check(self, x: Tensor) -> None:
        """Raise ValueError for images that the network cannot take."""
        stem = next(self.downsample_layers[0].children(), None)
        if not isinstance(stem, Patchify):
            return  # you replaced the stem: only your layer knows which images fit
        layers = [m for m in self.downsample_layers.modules() if isinstance(m, Patchify)]
        stride = math.prod([layer.stride[0] for layer in layers])
        if x.ndim != 4 or x.shape[1] != stem.in_channels or min(x.shape[2:]) < stride:
            raise ValueError(
                f"images must be (b, {stem.in_channels}, h, w) with h and w {stride} or more (the "
                f"total stride; a smaller patch_size lowers it), not {tuple(x.shape)}")

class Variant(NamedTuple):
    depths: tuple[int, ...]  # blocks per stage
    dims: tuple[int, ...]  # channels per stage
    gflops: float  # FLOPs in the papers: 1e9 multiply-accumulates at 224x224 pixels
    grn: bool = False  # ConvNeXt V2

# The paper's stages have 1 : 1 : 3 : 1 blocks, like Swin-T's, or 1 : 1 : 9 : 1. ResNet-50 has
# (3, 4, 6, 3). The change gains 0.54 points, and brings the cost to Swin-T's (section 2.2).
VARIANTS = {
    # These four were first published in timm and with ConvNeXt V2.         parameters
    "atto": Variant((2, 2, 6, 2), (40, 80, 160, 320), 0.55),               # 3.7M
    "femto": Variant((2, 2, 6, 2), (48, 96, 192, 384), 0.78),              # 5.2M
    "pico": Variant((2, 2, 6, 2), (64, 128, 256, 512), 1.37),              # 9.0M
    "nano": Variant((2, 2, 8, 2), (80, 160, 320, 640), 2.45),              # 15.6M
    # These are the paper's (section 3, table 1).
    "tiny": Variant((3, 3, 9, 3), (96, 192, 384, 768), 4.5),               # 28.6M
    "small": Variant((3, 3, 27, 3), (96, 192, 384, 768), 8.7),             # 50.2M
    "base": Variant((3, 3, 27, 3), (128, 256, 512, 1024), 15.4),           # 88.6M
    "large": Variant((3, 3, 27, 3), (192, 384, 768, 1536), 34.4),          # 197.8M
    "xlarge": Variant((3, 3, 27, 3), (256, 512, 1024, 2048), 60.9),        # 350.2M
}  # fmt: skip
# GRN contains no matrix product, so V2 is counted like V1. (Its paper prints 4.47 for Tiny.)
VARIANTS |= {f"v2_{name}": VARIANTS[name]._replace(grn=True)
             for name in ("atto", "femto", "pico", "nano", "tiny", "base", "large")}
VARIANTS["v2_huge"] = Variant((3, 3, 27, 3), (352, 704, 1408, 2816), 115, grn=True)

def create_convnext(variant: str, **options: Any) -> ConvNeXt:
    """Build one of the VARIANTS with initial weights, in training mode.

    options: keyword arguments of ConvNeXt other than depths, dims and grn, which the variant fixes.
    Raises ValueError for an unknown variant. Networks of other sizes: ConvNeXt(depths, dims).
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    depths, dims, _, grn = VARIANTS[variant]
    return ConvNeXt(depths, dims, grn=grn, **options)

def variant_of(depths: tuple[int, ...], dims: tuple[int, ...], grn: bool) -> str | None:
    """Return the name of the variant with these stages, or None if there is none."""
    for name, variant in VARIANTS.items():
        if (variant.depths, variant.dims, variant.grn) == (tuple(depths), tuple(dims), grn):
            return name
    return None


# --- Part 2. The road: how the paper gets here from a ResNet-50 (section 2, table 10) -------------

class Design(NamedTuple):
    """Everything that the paper changes on the way. The defaults are ResNet-50."""

    depths: tuple[int, ...] = (3, 4, 6, 3)
    patchify: bool = False  # the stem: patches of 4x4 pixels, not a strided 7x7 and a max-pool
    depthwise: bool = False  # the k×k convolution has one filter per channel
    width: int = 64  # channels of stage 1's narrowest layers; each later stage has twice as many
    inverted: bool = False  # blocks are narrow - wide - narrow, not wide - narrow - wide
    depthwise_first: bool = False  # the k×k convolution is the first layer, not the second
    kernel_size: int = 3  # k
    act: type[nn.Module] = nn.ReLU
    one_act: bool = False  # a block has one activation, not three
    one_norm: bool = False  # a block has one norm, not three
    norm: type[nn.Module] = nn.BatchNorm2d
    # Layers of their own between the stages. The head's norm comes with this step, as in the paper.
    separate_downsampling: bool = False
    # Not in the paper: blocks with attention, for networks with separate_downsampling.
    attention: bool = False  # WindowAttention takes the place of the depthwise convolution
    swin_block: bool = False  # SwinBlock takes the place of the whole block

class Step(NamedTuple):
    name: str
    change: dict[str, Any]  # fields of Design; all else stays what it was in the last kept step
    top1: float  # ImageNet accuracy in %, table 10: means of three trainings of 300 epochs
    gflops: float  # multiply-accumulates in 1e9 at 224x224, as table 10 prints them
    kept: bool = True  # False: tried and undone, so the later steps do not have it

OLD_RECIPE_TOP1 = 76.13  # ResNet-50 as PyTorch trained it: the new recipe is the largest step
ROADMAP = (
    Step("ResNet-50", {}, 78.82, 4.09),
    Step("stage ratio", {"depths": (3, 3, 9, 3)}, 79.36, 4.53),
    Step("patchify stem", {"patchify": True}, 79.51, 4.42),
    Step("depthwise conv", {"depthwise": True}, 78.28, 2.35),
    Step("width 64 to 96", {"width": 96}, 80.50, 5.27),
    Step("inverted bottleneck", {"inverted": True}, 80.64, 4.64),
    Step("depthwise conv first", {"depthwise_first": True}, 79.92, 4.07),
    Step("kernel 5x5", {"kernel_size": 5}, 80.35, 4.10),
    Step("kernel 7x7", {"kernel_size": 7}, 80.57, 4.15),
    Step("kernel 9x9", {"kernel_size": 9}, 80.57, 4.21, kept=False),
    Step("kernel 11x11", {"kernel_size": 11}, 80.47, 4.29, kept=False),
    Step("GELU", {"act": nn.GELU}, 80.62, 4.15),
    Step("one activation", {"one_act": True}, 81.27, 4.15),
    Step("one norm", {"one_norm": True}, 81.41, 4.15),
    # These two costs seem to be misprints: LayerNorm adds nothing to 4.15 (see also the paper's
    # table 11), and ConvNeXt-Tiny has 4.46.
    Step("LayerNorm", {"norm": LayerNorm2d}, 81.47, 4.46),
    Step("separate downsampling", {"separate_downsampling": True}, 81.97, 4.49),
)

def all_designs() -> dict[str, Design]:
    """Return the network after each step, by the step's name, and two networks with attention."""
    designs = {}
    kept = Design()
    for step in ROADMAP:
        designs[step.name] = kept._replace(**step.change)
        if step.kept:
            kept = designs[step.name]
    # Not steps of the paper: attention in place of the convolution, in two kinds of block.
    designs["window attention"] = kept._replace(attention=True)
    designs["Swin block"] = kept._replace(swin_block=True)
    return designs

DESIGNS = all_designs()

def pointwise(dim_in: int, dim: int, norm: type[nn.Module] | None, stride: int = 1
              ) -> list[nn.Module]:
    """Return a 1x1 convolution, which mixes channels, and its norm, if it has one.

    BatchNorm subtracts the mean, and a bias with it. So a dense layer before one has none, as in
    ResNet.
    """
    layer = nn.Conv2d(dim_in, dim, 1, stride, bias=norm is not nn.BatchNorm2d)
    return [layer, norm(dim)] if norm else [layer]

def spatial(design: Design, dim: int, stride: int, shift: bool) -> list[nn.Module]:
    """Return the layer of a block that mixes positions, and its norm."""
    k = design.kernel_size
    if design.attention:
        return [WindowAttention(dim, shift), design.norm(dim)]
    if design.depthwise:
        return [DepthwiseConv(dim, k, stride), design.norm(dim)]  # with a bias, as in ConvNeXt
    return [nn.Conv2d(dim, dim, k, stride, k // 2, bias=False), design.norm(dim)]

class RoadmapBlock(nn.Module):
    """A block between ResNet's and ConvNeXt's. (b, dim_in, h, w) -> (b, dim, ⌈h / s⌉, ⌈w / s⌉)

    width: channels of the narrow layers. The block returns dim channels, 4·width or, if it is
    inverted, width; they can be read as `block.dim`. Its three layers have, for a width of 64,
    256 - 64 - 64 - 256 channels, inverted 64 - 256 - 256 - 64, and with the k×k layer first
    64 - 64 - 256 - 64. stride: s, of the k×k convolution and of the shortcut; attention needs 1.
    shift: see WindowAttention.
    """

    def __init__(self, design: Design, dim_in: int, width: int, stride: int, shift: bool,
                 layer_scale: float) -> None:
        super().__init__()
        self.dim = width if design.inverted else 4 * width
        hidden_dim = 4 * width if design.inverted else width
        # The steps "one norm" and "one activation" remove these. What stays is the norm after the
        # k×k layer and the activation before the last layer.
        extra_norm = None if design.one_norm else design.norm
        extra_act = nn.Identity if design.one_act else design.act
        if design.depthwise_first:  # k×k - 1x1 - 1x1
            layers = spatial(design, dim_in, stride, shift)
            layers += [extra_act(), *pointwise(dim_in, hidden_dim, extra_norm)]
        else:  # 1x1 - k×k - 1x1
            layers = pointwise(dim_in, hidden_dim, extra_norm)
            layers += [extra_act(), *spatial(design, hidden_dim, stride, shift)]
        layers += [design.act(), *pointwise(hidden_dim, self.dim, extra_norm)]
        self.branch = nn.Sequential(*layers)
        self.shortcut = nn.Identity()
        if dim_in != self.dim or stride > 1:
            self.shortcut = nn.Sequential(*pointwise(dim_in, self.dim, design.norm, stride))
        self.act = extra_act()
        # LayerScale comes with the last step here. The paper does not say which steps had it; by
        # appendix A.1 all were trained with table 5's settings, where it is 1e-6.
        has_scale = design.separate_downsampling and layer_scale > 0
        self.layer_scale = LayerScale(self.dim, layer_scale) if has_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = rearrange(self.branch(x), "b c h w -> b h w c")  # LayerScale acts on the last axis
        y = rearrange(self.layer_scale(y), "b h w c -> b c h w")
        return self.act(self.shortcut(x) + y)

class WindowAttention(nn.Module):
    """Self-attention within windows of 7x7 positions, like Swin's. (b, dim, h, w) -> same shape

        y = linear([head₁, head₂, ...]),   head = softmax(q · kᵀ / √d + B) · v,   d = dim / heads

    with q, k, v = another linear map of x, cut into heads of d channels. There are dim // 16 heads.
    Swin has one per 32 channels; with 16, even narrow networks have several. B is learned, for each
    head and relative position. Positions off the map are masked. As in Swin, the biases of the
    linear layers start at 0.

    shift: windows begin at -4, 3, 10, ... instead of 0, 7, 14, ... In Swin every other block is
    shifted, so that windows exchange information. An axis with a single window is not shifted.
    Raises ValueError if dim is not a multiple of the number of heads.
    """

    def __init__(self, dim: int, shift: bool, window: int = 7) -> None:
        super().__init__()
        self.window = window
        self.heads = max(1, dim // 16)
        # rows above the map, and columns left of it, that the first window covers
        self.before = window - window // 2 if shift else 0
        if dim % self.heads:
            raise ValueError(f"{dim} channels cannot be divided into {self.heads} heads; give a "
                             "multiple of 16")
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)
        offsets = 2 * window - 1  # -6 ... 6 rows or columns lie between two positions
        self.position_bias = nn.Parameter(0.02 * torch.randn(self.heads, offsets**2))
        position = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        offset = position[:, None] - position + window - 1  # (49, 49, 2), from 0 to 12
        index = offset[..., 0] * offsets + offset[..., 1]  # (49, 49), into position_bias
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n = self.window
        h, w = x.shape[2:]
        top = self.before if h > n else 0
        left = self.before if w > n else 0
        rows = math.ceil((top + h) / n)  # of windows
        columns = math.ceil((left + w) / n)
        padding = (left, columns * n - left - w, top, rows * n - top - h)  # up to whole windows
        qkv = self.qkv(rearrange(x, "b c h w -> b h w c"))
        qkv = F.pad(qkv, (0, 0, *padding))  # from the last axis on: channels, columns, rows
        # i x j windows of p x q positions, m heads of c channels
        qkv = rearrange(qkv, "b (i p) (j q) (three m c) -> three b (i j) m (p q) c",
                        three=3, m=self.heads, p=n, q=n)
        q, k, v = qkv
        outside = F.pad(x.new_zeros(h, w), padding, value=1)
        outside = rearrange(outside, "(i p) (j q) -> (i j) 1 1 (p q)", p=n, q=n)
        # (windows, heads, 49, 49). In place of infinity, 1e4 is a number that float16 can hold.
        mask = self.position_bias[:, self.index] - 1e4 * outside
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
        y = rearrange(y, "b (i j) m (p q) c -> b (i p) (j q) (m c)", i=rows, p=n)
        y = self.proj(y[:, top : top + h, left : left + w])
        return rearrange(y, "b h w c -> b c h w")

class SwinBlock(nn.Module):
    """Swin's block: attention and MLP each have a norm and a shortcut. (b, dim, h, w) -> the same

        y = x + WindowAttention(LayerNorm(x)),   z = y + InvertedBottleneck(LayerNorm(y))

    It has no LayerScale. shift: see WindowAttention.
    """

    def __init__(self, dim: int, shift: bool) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim)
        self.attention = WindowAttention(dim, shift)
        self.norm2 = LayerNorm2d(dim)
        self.mlp = InvertedBottleneck(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = rearrange(self.norm2(x), "b c h w -> b h w c")
        return x + rearrange(self.mlp(y), "b h w c -> b c h w")

def roadmap_network(design: Design, num_classes: int = 1000, patch_size: int = 4,
                    layer_scale: float = 1e-6) -> nn.Sequential:
    """Build any network of the road, such as DESIGNS["GELU"]. (b, 3, h, w) -> (b, num_classes)

    patch_size: the stride of the whole stem, 4, or 1 or 2 for images of 32x32 pixels. Where the
    stem is ResNet's, 4 means a stride of 2 in its convolution and in its max-pool; for 1 and 2
    there is no max-pool. layer_scale: initial γ of LayerScale, which comes with separate
    downsampling; 0 for none. For another width, use DESIGNS["GELU"]._replace(width=32).

    Initial weights are PyTorch's, and the stochastic depth of the paper's networks is left out: the
    last step is ConvNeXt-Tiny, but starts from other weights. Raises ValueError for a different
    patch_size, and for attention without separate downsampling.
    """
    if patch_size not in (1, 2, 4):
        raise ValueError(f"patch_size must be 1, 2 or 4, not {patch_size}")
    if (design.attention or design.swin_block) and not design.separate_downsampling:
        raise ValueError("attention needs separate_downsampling: it has no stride")
    dim = design.width
    layers: list[nn.Module]
    if design.patchify:  # the norm is a guess: the paper names none before the last step
        layers = [Patchify(3, dim, patch_size), design.norm(dim)]
    else:
        layers = [nn.Conv2d(3, dim, 7, stride=min(2, patch_size), padding=3, bias=False),
                  design.norm(dim), design.act()]
        if patch_size == 4:
            layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    for stage, depth in enumerate(design.depths):
        width = design.width * 2**stage
        stride = 2 if stage else 1  # of the first block
        if stage and design.separate_downsampling:
            layers.append(Downsample(dim, width))
            dim, stride = width, 1
        for index in range(depth):
            shift = index % 2 == 1
            if design.swin_block:
                layers.append(SwinBlock(dim, shift))
            else:
                block = RoadmapBlock(design, dim, width, stride, shift, layer_scale)
                layers.append(block)
                dim, stride = block.dim, 1
    head = Head(dim, num_classes)
    if not design.separate_downsampling:
        head.norm = nn.Identity()  # the head's norm came with the last step
    return nn.Sequential(*layers, head)

def count_macs(model: nn.Module, image_size: int) -> int:
    """Count the multiply-accumulates of convolutions, linear layers and attention for one image.

    The papers call them FLOPs. They are counted on the meta device, where tensors have only shapes.
    The image has as many channels as the first convolution takes.
    """
    model = copy.deepcopy(model).to("meta").eval()
    channels = next(m.in_channels for m in model.modules() if hasattr(m, "in_channels"))
    dtype = next(model.parameters()).dtype
    image = torch.zeros(1, channels, image_size, image_size, device="meta", dtype=dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() // 2  # PyTorch counts multiplications and additions

def variant_table() -> Iterator[str]:
    """Yield a line per variant: shape, parameters, and the cost at 224x224, as counted here and as
    published, in 1e9 multiply-accumulates."""
    yield (f"{'variant':8} {'depths':14} {'dims':24} {'parameters':>11} {'counted':>7} "
           f"{'printed':>7}")
    for name, (depths, dims, gflops, _) in VARIANTS.items():
        with torch.device("meta"):
            model = create_convnext(name)
        size = sum(p.numel() for p in model.parameters())
        counted = count_macs(model, 224) / 1e9
        yield f"{name:8} {depths!s:14} {dims!s:24} {size:11,} {counted:7.3f} {gflops:7}"

def road_table() -> Iterator[str]:
    """Yield a line per step: accuracy, gain and the cost at 224x224, as printed in the paper and as
    counted here, in 1e9 multiply-accumulates."""
    yield f"{'step':24} {'top-1, %':>8} {'gain':>6} {'printed':>7} {'counted':>8}"
    before = OLD_RECIPE_TOP1
    for step in ROADMAP:
        with torch.device("meta"):
            model = roadmap_network(DESIGNS[step.name])
        printed = f"{step.gflops:.2f}"
        counted = f"{count_macs(model, 224) / 1e9:.2f}"
        remarks = "" if step.kept else "  not kept"
        remarks += "" if counted == printed else "  differs"
        yield (f"{step.name:24} {step.top1:8.2f} {step.top1 - before:+6.2f} {printed:>7} "
               f"{counted:>8}{remarks}")
        if step.kept:
            before = step.top1


# --- Part 3. Weights: the checkpoints of other libraries, in and out ------------------------------

# The authors (Meta), timm, torchvision and Hugging Face's transformers store the same network under
# different names. Each entry of NAMES has five names of one module, in the order of LAYOUTS; "-":
# the layout has none. A name that begins with a dot belongs to a block, and follows its BLOCK_NAME.
# {s} is the stage and {b} the block, from 0 on. In torchvision stage s is features.{e}, with
# e = 2·s + 1, and the layer before it is features.{d}, with d = 2·s.
LAYOUTS = ("native", "meta", "timm", "torchvision", "huggingface")
BLOCK_NAME = ("stages.{s}.{b}", "stages.{s}.{b}", "stages.{s}.blocks.{b}", "features.{e}.{b}",
              "encoder.stages.{s}.layers.{b}")
NAMES = """
downsample_layers.0.0    downsample_layers.0.0    stem.0                   features.0.0
                                                           embeddings.patch_embeddings
downsample_layers.0.1    downsample_layers.0.1    stem.1                   features.0.1
                                                           embeddings.layernorm
downsample_layers.{s}.0  downsample_layers.{s}.0  stages.{s}.downsample.0  features.{d}.0
                                                           encoder.stages.{s}.downsampling_layer.0
downsample_layers.{s}.1  downsample_layers.{s}.1  stages.{s}.downsample.1  features.{d}.1
                                                           encoder.stages.{s}.downsampling_layer.1
head.norm                norm                     head.norm                classifier.0
                                                           layernorm
head.fc                  head                     head.fc                  classifier.2
                                                           classifier
.dwconv             .dwconv      .conv_dw         .block.0      .dwconv
.norm               .norm        .norm            .block.2      .layernorm
.mlp.pwconv1        .pwconv1     .mlp.fc1         .block.3      .pwconv1
.mlp.grn.gamma      .grn.gamma   .mlp.grn.weight  -             .grn.weight
.mlp.grn.beta       .grn.beta    .mlp.grn.bias    -             .grn.bias
.mlp.pwconv2        .pwconv2     .mlp.fc2         .block.5      .pwconv2
.layer_scale.gamma  .gamma       .gamma           .layer_scale  .layer_scale_parameter
"""
SHAPES = {  # the parameters with a different shape, by a part of their native name
    "meta": {".grn.": "c -> 1 1 1 c"},
    "torchvision": {".gamma": "c -> c 1 1"},
    "huggingface": {".grn.": "c -> 1 1 1 c"},
}

# timm has 1x1 convolutions in place of linear layers, in these variants alone.
TIMM_1X1 = [name for name in VARIANTS if name.endswith(("atto", "femto", "pico", "nano"))]
TIMM_1X1_SHAPES = {".pwconv1.weight": "o i -> o i 1 1", ".pwconv2.weight": "o i -> o i 1 1"}

def name_table() -> dict[str, dict[str, str]]:
    """Map the native name of each module of NAMES to its full names, by layout."""
    names = NAMES.split()
    table = {}
    for start in range(0, len(names), len(LAYOUTS)):
        of_module = names[start : start + len(LAYOUTS)]
        full_names = [block + name if name.startswith(".") else name
                      for block, name in zip(BLOCK_NAME, of_module, strict=True)]
        table[full_names[0]] = dict(zip(LAYOUTS, full_names, strict=True))
    return table

NAME_TABLE = name_table()

@cache
def to_regex(text: str) -> str:
    """Turn a name of the table into a regular expression whose groups are called s, d, e and b."""
    return re.sub(r"\\{(.)\\}", r"(?P<\1>\\d+)", re.escape(text))

def rename(name: str, old: str, new: str) -> str | None:
    """Translate a parameter's name from one layout into another; None if it is unknown there.

    For example, "stages.2.8.mlp.pwconv1.weight" is "stages.2.blocks.8.mlp.fc1.weight" in timm.
    """
    for row in NAME_TABLE.values():  # the stem's come first, so {s} of later rows is not a stem's 0
        match = re.fullmatch(to_regex(row[old]) + r"(?P<end>\.weight|\.bias|)", name)
        if match is None or row[new] == "-":
            continue
        found = match.groupdict()
        twice = found.get("d") or found.get("e")  # torchvision counts stages by twos
        stage = int(twice) // 2 if twice else int(found.get("s", 0))
        numbers = {"s": stage, "d": 2 * stage, "e": 2 * stage + 1, "b": found.get("b")}
        return row[new].format(**numbers) + found["end"]
    return None

def unwrap(model: nn.Module) -> ConvNeXt:
    """Return the ConvNeXt inside torch.compile, DataParallel, AveragedModel or the like. TypeError
    if there is none that holds all of the model's parameters."""
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, ConvNeXt) and {*module.parameters()} == {*model.parameters()}:
                return module
    raise TypeError(f"expected a ConvNeXt, not a {type(model).__name__}")

def export_state_dict(model: nn.Module, layout: str) -> dict[str, Tensor]:
    """Return the state dict, which shares the model's memory, in one of the LAYOUTS.

    In the other libraries V1 always has LayerScale. A V1 without it is written with γ = 1, which
    computes the same. Hugging Face's last norm has ε = 1e-12 unless you configure
    layer_norm_eps=1e-6. Its names have no prefix "convnext." if the network has no classes, as in
    its ConvNextModel. timm's V2 has LayerScale only with ls_init_value. torchvision's stem always
    has patches of 4x4 pixels, and timm halves the map once more after patches of 2x2: for another
    patch size, replace the stem in their model. Raises ValueError for an unknown layout or
    parameter, and for a network that the library lacks.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    model = unwrap(model)
    state = model.state_dict()
    if layout == "native":
        return state
    depths = tuple(len(stage) for stage in model.stages)
    grn = "stages.0.0.mlp.grn.gamma" in state
    if layout == "torchvision" and grn:
        raise ValueError("torchvision has no ConvNeXt V2")
    if layout in ("meta", "huggingface") and grn and "stages.0.0.layer_scale.gamma" in state:
        raise ValueError("ConvNeXt V2 has no LayerScale there; fold_layer_scale removes it")
    if layout in ("timm", "meta") and len(depths) != 4:
        raise ValueError(f"{layout}'s ConvNeXt always has 4 stages, this one has {len(depths)}")
    if not grn:
        for name, bias in list(state.items()):
            if name.endswith(".dwconv.bias"):  # one in each block, with as many numbers as γ
                gamma_name = name.replace("dwconv.bias", "layer_scale.gamma")
                state.setdefault(gamma_name, torch.ones_like(bias))
    shapes = SHAPES.get(layout, {})
    if layout == "timm" and variant_of(depths, model.dims, grn) in TIMM_1X1:
        shapes = TIMM_1X1_SHAPES
    exported = {}
    for native, tensor in state.items():
        name = rename(native, "native", layout)
        if name is None:
            raise ValueError(f"{native} has no name in the layout {layout!r}")
        if layout == "huggingface" and "head.fc.weight" in state and "classifier" not in name:
            name = ("convnextv2." if grn else "convnext.") + name
        for part, axes in shapes.items():
            if part in native:
                tensor = rearrange(tensor, axes)
        exported[name] = tensor
    return exported

def read_file(path: str | PathLike) -> tuple[Mapping, dict[str, str]]:
    """Read content and metadata of a .safetensors, .pt, .pth or .bin file, on the CPU.

    Only .safetensors files have metadata. Pickles are read with torch.load(weights_only=True), so
    no code inside a file ever runs. Raises FileNotFoundError, or ValueError with the path and the
    reader's reason.
    """
    path = os.path.expanduser(path)
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
                return tensors, file.metadata() or {}
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                records = [record for record in archive.infolist() if not record.is_dir()]
                # torch.load ignores checksums. A file without them has 0 everywhere.
                damaged = archive.testzip() if any(record.CRC for record in records) else None
                # Where damage gave a record a folder's attribute (16), torch.load does not read it
                # and returns whatever was in memory.
                folders = [record.filename for record in records if record.external_attr & 16]
            if damaged or folders:
                raise ValueError(f"it is damaged in {damaged or folders[0]}")
        else:
            with open(path, "rb") as file:
                start = file.read(24)
            if start[:1] not in (b"\x80", b"P"):  # how a pickle and a cut archive begin
                raise ValueError(f"it is no checkpoint, since it begins with {start}")
        # The authors' training program also stores its arguments, a Namespace: plain data.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about TorchScript and old pickles, before the error
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, Mapping):
            raise TypeError(f"it holds a {type(content).__name__}, not a state dict")
        return content, {}
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file makes the readers raise anything
        # torch.load's reason is the last line before advice to load the file without safety.
        text, advice, _ = str(error).strip().partition("\n\nCheck the documentation")
        lines = text.splitlines() or [type(error).__name__]
        line = lines[-1] if advice else lines[0]
        raise ValueError(f"cannot read {path}: {line.strip().partition('. ')[0]}") from error

DOWNLOADS = ("timm:", "hf:", "https:")
WEIGHT_FILES = "model.safetensors", "pytorch_model.bin"  # what save_pretrained calls the weights
CONFIG_FILES = "config.json", "preprocessor_config.json"  # what it calls their description

def read_source(source: str | PathLike) -> tuple[Mapping, dict[str, str], dict[str, Any]]:
    """Read the content, the metadata and the settings of a file, a folder or a download.

    source: timm:NAME, hf:REPO, the path or https address of a .safetensors, .pt, .pth or .bin file,
    or a folder that save_pretrained wrote. What is fetched is kept for the next time. The files
    config.json and preprocessor_config.json beside a file are read, too.

    settings: what is known about the images and classes, some of mean and std (lists), img_size,
    crop_pct (the middle share that is seen, or 0: the whole image, squeezed) and classes (names in
    the order of the logits). Raises FileNotFoundError, ValueError for a file that cannot be read or
    if they describe another network, ConnectionError where timm or huggingface_hub have no
    connection, urllib's URLError for an address, and other errors of timm and huggingface_hub.
    """
    path = os.path.expanduser(source)
    if path.startswith("http:"):
        raise ValueError(f"{source}: give an address that begins with https:")
    try:
        if path.startswith("timm:"):
            return fetch_from_timm(path.removeprefix("timm:"))
        if path.startswith("hf:"):
            path = fetch_from_hub(path.removeprefix("hf:"))
    except FileNotFoundError as error:  # huggingface_hub's error without a connection is one
        raise ConnectionError(f"cannot fetch {source}: {error}") from error
    if path.startswith("https:"):
        return *fetch_address(path), {}
    if os.path.isdir(path):
        present = [name for name in WEIGHT_FILES if os.path.exists(os.path.join(path, name))]
        if not present:
            raise ValueError(f"{source} holds neither {' nor '.join(WEIGHT_FILES)}")
        path = os.path.join(path, present[0])
    return *read_file(path), read_settings(os.path.dirname(path))

def fetch_from_timm(name: str) -> tuple[Mapping, dict[str, str], dict[str, Any]]:
    """Let timm fetch a pretrained network; return what read_source does."""
    import timm

    model = timm.create_model(name, pretrained=True)
    refuse_other_timm_network(name, model)
    return model.state_dict(), {}, timm_settings(model.pretrained_cfg)

def fetch_from_hub(repository: str) -> str:
    """Fetch weights and settings from a repository of Hugging Face; return the folder."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(repository, allow_patterns=[WEIGHT_FILES[0], *CONFIG_FILES])
    if not os.path.exists(os.path.join(folder, WEIGHT_FILES[0])):
        folder = snapshot_download(repository, allow_patterns=[WEIGHT_FILES[1], *CONFIG_FILES])
    return folder

def fetch_address(address: str) -> tuple[Mapping, dict[str, str]]:
    """Read the file at an https address, and fetch it if that was not done before."""
    digest = hashlib.sha256(address.encode()).hexdigest()[:8]  # since two can have the same name
    file_name = f"{digest}-{address.partition('?')[0].rpartition('/')[2]}"
    path = os.path.join(torch.hub.get_dir(), "checkpoints", file_name)
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.hub.download_url_to_file(address, path)
    try:
        return read_file(path)
    except ValueError:  # perhaps a page that says why: do not keep it
        os.remove(path)
        raise

def refuse_other_network(source: str, epsilons: set[float], activations: set[str]) -> None:
    """Raise ValueError if these, which do not show in the tensors, are not those of ConvNeXt."""
    other_epsilons = epsilons - {1e-6}
    if other_epsilons:
        raise ValueError(f"{source} is another network: its norms have ε = {max(other_epsilons)}")
    other_activations = activations - {"gelu"}
    if other_activations:
        raise ValueError(f"{source} is another network: its activation is {max(other_activations)}")

def refuse_other_timm_network(source: str, model: nn.Module) -> None:
    """Raise ValueError if a part of timm's network that tensors do not show is not ConvNeXt's."""
    layers = dict(model.named_modules())
    for layer in layers.values():
        if "max" in getattr(layer, "pool_type", ""):
            raise ValueError(f"{source} is another network: its pooling is {layer.pool_type}")
        if isinstance(layer, nn.Conv2d) and layer.dilation != (1, 1):
            raise ValueError(f"{source} is another network: it has dilated convolutions")
    norms = [layer for layer in layers.values() if isinstance(layer, nn.LayerNorm)]
    activations = [layer for name, layer in layers.items() if name.endswith("mlp.act")]
    refuse_other_network(source, {norm.eps for norm in norms},
                         {type(activation).__name__.lower() for activation in activations})

def read_json(path: str) -> dict[str, Any]:
    """Read a JSON file that holds a dict; {} if there is no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return {}
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error

def read_settings(folder: str) -> dict[str, Any]:
    """Read what the CONFIG_FILES in a folder say, as far as they are there; see read_source."""
    config, images = (read_json(os.path.join(folder, name)) for name in CONFIG_FILES)
    path = os.path.join(folder, CONFIG_FILES[0])
    if "convnext" not in str(config.get("architecture", config.get("model_type", "convnext"))):
        config = images = {}  # they belong to something else in this folder
    if "architecture" in config and "pretrained_cfg" in config:
        import timm

        with torch.device("meta"):
            model = timm.create_model(config["architecture"], **(config.get("model_args") or {}))
        refuse_other_timm_network(path, model)
        described = config["pretrained_cfg"] or {}
        if "label_names" in config:  # newer than those of the network that training began with
            described = described | {"label_names": config["label_names"]}
        return timm_settings(described)
    # transformers uses layer_norm_eps in the last norm alone. Its default, 1e-12, is accepted: it
    # differs from 1e-6 only where the variance of the features is nearly as small.
    epsilons = {config.get("layer_norm_eps", 1e-12)} - {1e-12}
    refuse_other_network(path, epsilons, {str(config.get("hidden_act", "gelu"))})
    labels = config.get("id2label")
    classes = names_in_order(labels) if isinstance(labels, dict) else []
    if classes == [f"LABEL_{i}" for i in range(len(classes))]:
        classes = []  # transformers' placeholders
    size = images.get("size", config.get("image_size"))
    crop_pct = images.get("crop_pct")
    crop = images.get("crop_size")
    if isinstance(size, dict) and "height" in size:
        size = size["height"]
        crop_pct = 0
    elif isinstance(size, dict):
        size = size.get("shortest_edge")
    if isinstance(crop, dict):
        crop = crop.get("height")
    if not isinstance(size, int) or size == 0:
        size = crop_pct = None
    elif images.get("do_center_crop") and isinstance(crop, int):
        size, crop_pct = crop, min(1, crop / size)
    elif size >= 384 and crop_pct:
        crop_pct = 0  # ConvNeXt's processor does not crop to 384 pixels or more
    settings = {"mean": images.get("image_mean"), "std": images.get("image_std"), "img_size": size,
                "classes": classes}
    settings = {name: value for name, value in settings.items() if value}
    if crop_pct is not None:
        settings["crop_pct"] = crop_pct
    return settings

def names_in_order(labels: Mapping[str, str]) -> list[str]:
    """The names in {"0": name, "1": name, ...}; [] if one is missing."""
    names = [labels.get(str(i)) for i in range(len(labels))]
    return [] if None in names else names

def timm_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate timm's description of a pretrained network; see read_source."""
    labels = config.get("label_names")
    classes = names_in_order(labels) if isinstance(labels, dict) else labels
    settings = {"mean": config.get("mean"), "std": config.get("std"), "classes": classes}
    settings = {name: list(value) for name, value in settings.items() if value}
    if "input_size" in config:
        settings["img_size"] = config["input_size"][-1]
    if "crop_pct" in config:
        squeezed = config.get("crop_mode") == "squash"
        settings["crop_pct"] = 0 if squeezed else config["crop_pct"]
    return settings

# Regular expressions for other spellings of the layouts' names, and what they become.
SPELLINGS = {
    r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.": "",
    r"\b(stem|stages)_(\d+)\.": r"\1.\2.",  # timm's features_only
}
OPENMMLAB_AND_DINOV3 = {  # from the names of mmpretrain, and of DINOv3 in transformers, to Meta's
    "depthwise_conv": "dwconv", "pointwise_conv": "pwconv",
    r"(stages\.\d+)\.layers\.": r"\1.",
    r"stages\.(\d+)\.downsample_layers\.": r"downsample_layers.\1.",
    r"(\d)\.layer_norm\.": r"\1.norm.", r"\blayer_norm\.": "model.norm.",
    r"\bbackbone\.norm3\.": "backbone.norm.", r"\bhead\.fc\.": "backbone.head.",
}
# Norms of the maps that a backbone returns, which a classifier has no place for.
OUTPUT_NORMS = r"(hidden_states_norms\.\w+|norms\.\d|norm\d)\.(weight|bias)"

def flatten(content: Mapping, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dicts, with their names joined by dots."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value

def respell(values: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Give the values the names of a layout, where another program spells them differently."""
    spellings = SPELLINGS
    if any(re.search(r"\d\.pointwise_conv1\.", name) for name, _ in values):
        spellings = SPELLINGS | OPENMMLAB_AND_DINOV3
        names = {name for name, _ in values}
        places = {name.partition("stages.")[0] for name in names if "stages." in name}
        # Before version 5 of transformers, the last norm stood beside the stages.
        if any(f"{place}layer_norm.weight" in names for place in places):
            spellings |= {r"\blayer_norm\.": "norm."}
        if any(".norm0." in name for name in names):  # the norms of all maps, none of the head
            spellings |= {r"\bbackbone\.norm3\.": "backbone.norm3."}
    for old, new in spellings.items():
        values = [(re.sub(old, new, name), value) for name, value in values]
    return values

def find_network(names: list[str]) -> tuple[str, str]:
    """Return layout and prefix of the network whose parameters are among these names."""
    networks = {}
    for layout in LAYOUTS:
        # the names of this layer differ in each layout
        marker = to_regex(NAME_TABLE["stages.{s}.{b}.mlp.pwconv1"][layout])
        for name in names:
            match = re.fullmatch(rf"(|.*\.){marker}\.weight", name)
            if match:
                networks[match[1]] = layout
    if not networks:
        found = ", ".join(names[:3]) + ", ..." if names else "nothing"
        raise ValueError(f"these are no weights of a ConvNeXt ({found})")
    averaged = [prefix for prefix in networks if re.search(r"(?<![a-z])ema(?![a-z])", prefix)]
    prefixes = averaged or list(networks)
    if len(prefixes) > 1:
        raise ValueError(f"these are several networks, {', '.join(prefixes)}: pass one of them")
    return networks[prefixes[0]], prefixes[0]

def read_weights(source: Mapping | str | PathLike) -> dict[str, Tensor]:
    """Read the weights of a ConvNeXt in any layout, and return them with native names and shapes.

    source: a state dict, or what read_source takes.

    Training programs nest a state dict (`model`, `state_dict`, ...) and put prefixes before its
    names (`module.`, `backbone.`, ...). The prefix is whatever stands before the name of any
    block's pwconv1. Only tensors with this prefix are read; if it is empty, all must fit. Of
    several networks, the averaged one is chosen, whose prefix has the word "ema", as in timm.

    Raises ValueError unless there is just one ConvNeXt, or just one averaged one, with finite
    weights; TypeError for what is neither a state dict nor a file's name; and what read_source
    raises.
    """
    content = read_source(source)[0] if isinstance(source, str | PathLike) else source
    if not isinstance(content, Mapping):
        raise TypeError(f"weights are a state dict or a file, not a {type(content).__name__}")
    if "state_dict" in content and "ema_state_dict" in content:
        notes = content.get("meta")
        if not isinstance(notes, Mapping) or "mmengine_version" not in notes:
            raise ValueError("the average may be state_dict (as MMEngine writes it) or "
                             "ema_state_dict: pass one of them")
        content = content["state_dict"]
    values = respell(list(flatten(content)))
    layout, prefix = find_network([name for name, _ in values])
    if layout == "huggingface":  # there only the backbone has "convnext.", the classifier has not
        prefix = re.sub(r"convnext(v2)?\.$", "", prefix)
    tensors = {}
    for name, tensor in values:
        if not name.startswith(prefix) or not isinstance(tensor, Tensor):
            continue
        name = re.sub(r"^convnext(v2)?\.", "", name.removeprefix(prefix))
        native = rename(name, layout, "native")
        if native is None and not tensor.is_floating_point():  # such as a count of steps
            continue
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{name} has the type {tensor.dtype}, not float16, bfloat16, float32 "
                             "or float64")
        if not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"{name} contains numbers that are not finite")
        native = native or name
        if native in tensors:
            raise ValueError(f"{native} is there twice, under different names")
        if native.endswith(("gamma", "beta")) and tensor.squeeze().ndim <= 1:
            tensor = tensor.flatten()
        elif "pwconv" in native and tensor.shape[2:] == (1, 1):
            tensor = rearrange(tensor, "o i 1 1 -> o i")
        tensors[native] = tensor
    return tensors

class Report(NamedTuple):
    """What load_weights did, with native names."""

    loaded: list[str]
    kept: list[str]  # parameters of the model that kept their values
    left_out: list[str]  # tensors of the source whose names the model does not have

def load_weights(model: nn.Module, source: Mapping | str | PathLike, strict: bool = False
                 ) -> Report:
    """Copy weights into the model, in place.

    source: a state dict in any layout, or what read_source takes.

    The model keeps its classifier if the source has none or one for another number of classes, and
    its stem if the source's has other patches or channels. With strict=True, both are errors. The
    model keeps its last norm if the source has no head at all. The norms of a backbone's maps are
    left out. A warning names what was kept or left out. If anything else does not fit, ValueError
    names it. After an error the model is unchanged. For further errors see read_weights.
    """
    model = unwrap(model)
    tensors = read_weights(source)
    state = model.state_dict()

    def shape(place: Mapping[str, Tensor], name: str) -> str:
        return str(tuple(place[name].shape)) if name in place else "missing"

    misfits = [name for name in state | tensors if shape(state, name) != shape(tensors, name)]
    may_keep = [  # what the names of a part begin with, and when it may keep its values
        ("head.fc.", not strict),
        ("downsample_layers.0.0.", not strict and "downsample_layers.0.0.weight" in tensors),
        ("head.norm.", not any(name.startswith("head.") for name in tensors)),
    ]
    kept_parts = tuple(
        name for name, may in may_keep
        if may and (f"{name}weight" in misfits or not any(key.startswith(name) for key in tensors)))
    wrong = [name for name in misfits
             if not name.startswith(kept_parts) and not re.fullmatch(OUTPUT_NORMS, name)]
    if wrong:
        details = [f"{name} is {shape(tensors, name)} in the weights, {shape(state, name)} in the "
                   "model" for name in wrong[:3]]
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"these weights do not fit the model: {'; '.join(details)}{more}")
    kept = [name for name in state if name.startswith(kept_parts)]
    loaded = [name for name in state if not name.startswith(kept_parts)]
    left_out = [name for name in tensors if name not in state]
    for name in loaded:
        for place, tensor in (("weights", tensors[name]), ("model", state[name])):
            if tensor.is_meta:
                raise ValueError(f"{name} is on the meta device in the {place}: it has no values")
    # Warn first: where warnings are errors, the model stays unchanged.
    if kept:
        warnings.warn(f"the model kept its own {', '.join(kept)}", stacklevel=2)
    if left_out:
        warnings.warn(f"the model has no place for {', '.join(left_out)}", stacklevel=2)
    model.load_state_dict({name: tensors[name] for name in loaded}, strict=False)
    return Report(loaded, kept, left_out)

def infer_architecture(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Derive ConvNeXt's arguments from what read_weights returns. ValueError if a stage or the stem
    is missing."""
    stages = [name.split(".")[1] for name in tensors if name.endswith(".dwconv.weight")]
    depths = tuple(stages.count(str(s)) for s in range(len(set(stages))))
    filters = [tensors.get(f"stages.{s}.0.dwconv.weight") for s in range(len(depths))]
    stem = tensors.get("downsample_layers.0.0.weight")
    if any(tensor is None or tensor.ndim != 4 for tensor in (stem, *filters)):
        raise ValueError("the stem or a stage is missing, or has no filters with four axes")
    classifier = tensors.get("head.fc.weight")
    has_classes = classifier is not None and classifier.ndim == 2
    return {"depths": depths, "dims": tuple(len(tensor) for tensor in filters),
            "grn": "stages.0.0.mlp.grn.gamma" in tensors,
            "in_channels": stem.shape[1], "patch_size": stem.shape[2],
            "num_classes": len(classifier) if has_classes else 0,
            "layer_scale": 1e-6 if "stages.0.0.layer_scale.gamma" in tensors else 0.0}

def from_checkpoint(source: Mapping | str | PathLike) -> ConvNeXt:
    """Build the network that a checkpoint holds, with its weights, in evaluation mode.

    source: see load_weights. The number and size of the stages, of classes (none for a backbone),
    channels and patches follow from the tensors. Raises ValueError for whatever does not fit.
    """
    tensors = read_weights(source)
    with torch.device("meta"):  # draws no random numbers that would be overwritten at once
        model = ConvNeXt(**infer_architecture(tensors))
    model.to_empty(device="cpu")
    if "head.norm.weight" not in tensors:  # those of a backbone
        model.head.norm.reset_parameters()
    load_weights(model, tensors, strict=True)
    return model.eval()


# --- Part 4. Faster, with the same results. Nothing new about ConvNeXt follows --------------------

@torch.no_grad()
def fold_layer_scale(model: nn.Module) -> nn.Module:
    """Multiply each Block's LayerScale into the linear layer before it, in place; return the model.

        γ ⊙ (W·x + b) = (γ ⊙ W)·x + γ ⊙ b

    The logits stay the same up to rounding, and inference is faster on any device. Training would
    go on differently without γ. Raises ValueError for float16, where such a product can become 0;
    so do not convert a folded network to float16 either.
    """
    for block in model.modules():
        if isinstance(block, Block) and isinstance(block.layer_scale, LayerScale):
            gamma = block.layer_scale.gamma
            linear = block.mlp.pwconv2
            if linear.weight.dtype == torch.float16:
                raise ValueError("LayerScale cannot be folded in float16, where the products can "
                                 "become 0: keep it, or take bfloat16")
            linear.weight *= rearrange(gamma, "c -> c 1")
            linear.bias *= gamma
            block.layer_scale = nn.Identity()
    return model

def speed_up(model: nn.Module) -> nn.Module:
    """Make training on a CPU faster, in place, and return the model.

    The 7x7 kernel takes 21 % of a block's training time at 96 channels, 8 % at 768, and with this
    13 % and 4 % (maps of 56x56 and 7x7 positions, batch 8, float32, one Zen 3 core with AVX2).
    CPUs without AVX2 or AVX512, such as Apple's, stay as fast as they were.

    Each DepthwiseConv becomes a FastDepthwiseConv. Only its class is exchanged, so parameters,
    names and hooks stay, and it computes the same up to rounding. PyTorch's own convolution still
    runs on a GPU, without gradients, in an export, and in a layer that has a stride or whose
    settings you changed. Forward-mode derivatives (torch.func.jvp) need the model as it was before.
    """
    known = FastDepthwiseConv.__base__  # DepthwiseConv, unless you put another class in its place
    if getattr(known, "_conv_forward", None) is nn.Conv2d._conv_forward:
        for module in model.modules():
            if type(module) is known:
                module.__class__ = FastDepthwiseConv
    return model

# The number types for which FastDepthwiseConv was measured to be faster than PyTorch's convolution,
# by the vector instructions of the CPU.
MEASURED = {"AVX2": (torch.float32,), "AVX512": (torch.float32, torch.bfloat16)}
has_onednn = torch.backends.mkldnn.is_available()
FAST_DTYPES = MEASURED.get(torch.backends.cpu.get_cpu_capability(), ()) if has_onednn else ()

class FastDepthwiseConv(DepthwiseConv):
    """DepthwiseConv with the backward pass of DepthwiseGradient."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # nn.Conv2d.forward calls this.
        c, k = self.groups, self.kernel_size[0]
        settings = (self.in_channels, self.out_channels, self.kernel_size, self.stride,
                    self.padding, self.dilation, self.padding_mode)
        unchanged = settings == (c, c, (k, k), (1, 1), (k // 2, k // 2), (1, 1), "zeros")
        autocast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        is_exported = torch.jit.is_tracing() or torch.compiler.is_exporting()
        fits = (not is_exported and unchanged and bias is not None and x.device.type == "cpu"
                and dtype in FAST_DTYPES and x.ndim == 4 and x.numel() > 0)
        if not fits or not torch.is_grad_enabled():
            return super()._conv_forward(x, weight, bias)
        x = x.to(dtype)  # autocast does not convert the inputs of our own functions
        return DepthwiseGradient.apply(x, weight, bias)

class DepthwiseGradient(torch.autograd.Function):
    """The depthwise convolution; its derivatives are depthwise convolutions again.

        ∂L/∂x[c, i, j] = Σ_{u,v} W[c, u, v] · g[c, i - u + r, j - v + r]
        ∂L/∂W[c, u, v] = Σ_b Σ_{i,j} g[b, c, i, j] · x[b, c, i + u - r, j + v - r]

    where L is the loss, g = ∂L/∂y and r = k // 2. The first convolves g with W turned by 180
    degrees. In the second, g is the filter: as large as the map, it moves over x to only k×k
    places. Each channel of each sample has a filter of its own, so all of them lie side by side as
    b·c channels of one image; the sum over b comes last. PyTorch's kernel for such a convolution is
    so much faster than its kernel for this gradient that the layer's backward pass takes 0.4 to 0.6
    of the time (the networks' maps, float32, one Zen 3 core with AVX2).
    x: (b, c, h, w), W: (c, 1, k, k), bias: (c,).
    """

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        c, h, w = x.shape[1:]
        radius = weight.shape[-1] // 2
        grad_x, grad_weight = None, None
        if ctx.needs_input_grad[0]:
            grad_x = F.conv2d(g, weight.to(g.dtype).flip(2, 3), padding=radius, groups=c)
        if ctx.needs_input_grad[1]:
            # Weights further from the centre than the map is wide only ever meet zeros.
            reach = min(radius, h - 1), min(radius, w - 1)
            precise = torch.promote_types(weight.dtype, torch.float32)
            grad_weight = weight.new_zeros(c, 1, *(2 * r + 1 for r in reach), dtype=precise)
            at_once = max(1, 2**20 // (c * h * w))  # samples: about what fits into a CPU's cache
            for xs, gs in zip(x.split(at_once), g.split(at_once), strict=True):
                xs = rearrange(xs, "b c h w -> 1 (b c) h w")
                gs = rearrange(gs, "b c h w -> (b c) 1 h w")
                part = F.conv2d(xs, gs, padding=reach, groups=len(gs))
                part = rearrange(part, "1 (b c) u v -> b c 1 u v", c=c)
                grad_weight = grad_weight + part.sum(0, dtype=precise)
            top, left = (radius - r for r in reach)
            grad_weight = F.pad(grad_weight, (left, left, top, top)).to(weight.dtype)
        return grad_x, grad_weight, reduce(g, "b c h w -> c", "sum")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="List the variants, or the steps of the road.")
    parser.add_argument("--road", action="store_true", help="list the steps from ResNet-50 on")
    table = road_table() if parser.parse_args().road else variant_table()
    for line in table:
        print(line)
