"""ConvNeXt in one file, to be read from top to bottom.

    import torch
    from convnext import create_convnext, from_checkpoint

    model = create_convnext("tiny", num_classes=10)                # random weights
    logits = model(torch.randn(8, 3, 224, 224))                    # (8, 10)
    model = create_convnext("tiny", num_classes=10, patch_size=2)  # for images of 32x32 pixels
    model = from_checkpoint("timm:convnext_tiny.fb_in1k")          # pretrained; evaluation mode

"A ConvNet for the 2020s" (Liu et al., 2022, https://arxiv.org/abs/2201.03545) starts from a
ResNet-50 and changes one thing after another until a purely convolutional network matches a Swin
Transformer. An image passes through the result, ConvNeXt-Tiny, like this:

    image                            3 x 224 x 224
    stem                            96 x  56 x  56    cut into 4x4 patches, embed each
    stage 1: 3 blocks               96 x  56 x  56
    stage 2: downsample, 3 blocks  192 x  28 x  28
    stage 3: downsample, 9 blocks  384 x  14 x  14
    stage 4: downsample, 3 blocks  768 x   7 x   7
    head                           768 -> 1000        average over positions, normalise, classify

and each block computes x + branch(x), where the branch first mixes positions, then channels.

Part 1 builds the network from its smallest layers up, part 2 every network on the road from
ResNet-50 to here (`python convnext.py --road` lists them; without --road, it lists the variants).
Part 3 reads and writes the checkpoints of other libraries, and part 4 makes a CPU faster; a reader
who wants to understand ConvNeXt can stop before part 3.

Sections, tables and figures named below are the paper's; V2 is https://arxiv.org/abs/2301.00808
(Woo et al., 2023). Formulas are for a single image. Where axes are reordered, an einops pattern
doubles as the shape comment: b = batch, c = channels, h, w = height and width. Between blocks a
feature map is (b, c, h, w); inside a block, after the depthwise convolution, it is (b, h, w, c).

To try a different norm, change the base class of LayerNorm; for a different MLP or filter, change
InvertedBottleneck or DepthwiseConv. With different parameters, pretrained weights do not fit.

The network computes what the authors' code does (https://github.com/facebookresearch/ConvNeXt),
and is initialised like it. `patch_size` is an addition: 4x4 patches leave small images too few
positions. Each idea is a module of its own, so their `pwconv1` is `mlp.pwconv1` here.
"""

import argparse
import copy
import hashlib
import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise, product
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
    """Cut a map into squares, turn each into a vector. (b, c, h, w) -> (b, dim, h / p, w / p)

        y[:, i, j] = W · flatten(x[:, p·i : p·i + p, p·j : p·j + p]) + bias,   p = patch_size

    A convolution whose stride equals its kernel size: the windows do not overlap, and one linear
    layer is shared by all of them. ResNet's stem is a 7x7 convolution with overlapping windows and
    a max-pool; vision transformers use patches, and those work just as well here (section 2.2).
    The stem has p = 4, the layers between the stages have p = 2. Rows and columns at the edge that
    do not fill a patch are dropped.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int = 4) -> None:
        super().__init__(in_channels, dim, kernel_size=patch_size, stride=patch_size)

class DepthwiseConv(nn.Conv2d):
    """Filter each channel on its own with a 7x7 kernel. (b, dim, h, w) -> (b, dim, h, w)

        y[c, i, j] = Σ_{u,v} W[c, u, v] · x[c, i + u - 3, j + v - 3] + bias[c],   u, v = 0 ... 6

    Outside of the map x is zero. Like the weighted sum in self-attention, this mixes positions and
    keeps channels apart. (ResNeXt's convolutions mixed the channels of small groups, MobileNet's
    mixed none; section 2.3.) It takes 49·dim multiplications per position, where a dense 7x7
    convolution takes 49·dim². So a large kernel is affordable. 3x3 -> 7x7 gains 0.65 points of
    accuracy, and larger kernels no more; the windows of Swin's attention are at least 7x7, too
    (section 2.5).
    """

    def __init__(self, dim: int, kernel_size: int = 7) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

class LayerNorm(nn.LayerNorm):
    """Normalise the channels of each position on their own. (..., dim) -> (..., dim)

        y = weight ⊙ (x - mean(x)) / √(var(x) + ε) + bias

    Mean and variance are taken over the last axis, the channels, of one position of one image.
    (GroupNorm with one group is different: it also averages over the positions.) Replacing
    BatchNorm by it gained only 0.06 points (section 2.6). But an image no longer depends on the
    rest of its batch, and training and evaluation compute the same.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)  # the authors' ε; PyTorch's default is 1e-5

class LayerNorm2d(LayerNorm):
    """LayerNorm of a feature map. (b, dim, h, w) -> (b, dim, h, w)

    The result of nn.LayerNorm lies in memory in the order b h w c, and the second rearrange only
    renames its axes. Convolutions return the order in memory that they are given ("channels_last").
    The stem ends with this layer, so from there on a norm or a linear layer never has to copy.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(rearrange(x, "b c h w -> b h w c"))
        return rearrange(x, "b h w c -> b c h w")

class GRN(nn.Module):
    """Global response normalisation: the new layer of ConvNeXt V2. (b, h, w, dim) -> (b, h, w, dim)

        y = γ ⊙ (x ⊙ n) + β + x,   n[c] = ‖x[:, :, c]‖ / (mean over channels k of ‖x[:, :, k]‖ + ε)

    The norms are taken over all positions of an image. V2 is pre-trained by filling in masked parts
    of images, which made many channels of V1 respond alike. With GRN, channels compete: n is large
    where a channel responds more strongly than the average (V2, section 3). γ and β start at 0, so
    the layer starts as the identity.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        # In at least float32, since squares overflow float16, and bfloat16 rounds the sum.
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide)  # (b, 1, 1, dim)
        n = norm / (reduce(norm, "b 1 1 c -> b 1 1 1", "mean") + 1e-6)
        return (self.gamma * (x * n) + self.beta + x).to(self.gamma.dtype)

class InvertedBottleneck(nn.Module):
    """Two linear layers around a GELU, the same at every position. (..., dim) -> (..., dim)

        y = W₂ · GELU(W₁ · x + b₁) + b₂,   W₁: dim -> 4·dim,   W₂: 4·dim -> dim

    ResNet's bottleneck is wide - narrow - wide. MobileNetV2's, like the MLP of a transformer, is
    narrow - wide - narrow (section 2.4). This one also has the transformer's single activation,
    where ResNet has one after each layer. GELU is a smooth ReLU, x · Φ(x), with Φ the distribution
    function of the standard normal (section 2.6). Nine tenths of Tiny's parameters are in these
    layers: 8·dim² per block, each weight used once per position. grn: GRN after the GELU, in V2.
    """

    def __init__(self, dim: int, expansion: int = 4, grn: bool = False) -> None:
        super().__init__()
        # pw stands for pointwise: 1x1 convolutions would compute the same, but nn.Linear on the
        # last axis is one large matrix product.
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
    block starts as almost the identity, and its branch grows as far as it proves useful. γ has one
    axis, like biases and the weights of norms: train.py excludes all of these from weight decay.
    """

    def __init__(self, dim: int, init: float = 1e-6) -> None:
        super().__init__()
        self.gamma = nn.Parameter(init * torch.ones(dim))

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
            raise ValueError(f"drop_path must be at least 0 and below 1, not {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.p)  # (b, 1, 1, 1)
        return x * (keep / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p:.3f}"

class Block(nn.Module):
    """The ConvNeXt block (figure 4). (b, dim, h, w) -> (b, dim, h, w)

        y = x + DropPath(LayerScale(InvertedBottleneck(LayerNorm(DepthwiseConv(x)))))

    A transformer block mixes positions by attention and then channels by an MLP, each with a norm
    and a shortcut. Here both kinds of mixing share one norm, one activation and one shortcut.
    Fewer are better: removing two of the three activations in ResNet's block gained 0.65 points,
    removing two of its three norms 0.14 (section 2.6). The paper measures this and has no theory.

    Of the 49·dim + 8·dim² multiplications per position, the 7x7 kernel takes 6 % at 96 channels and
    0.8 % at 768.

    drop_path: p of DropPath. layer_scale: initial γ of LayerScale, 0 for none. grn: V2's block.
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
    """Halve the resolution between two stages. (b, dim_in, h, w) -> (b, dim, h / 2, w / 2)

    ResNet does this inside the first block of a stage. ConvNeXt, like Swin, has a separate layer, a
    2x2 convolution of stride 2. Without the norm before it, training diverges (section 2.6).
    """

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__(LayerNorm2d(dim_in), Patchify(dim_in, dim, patch_size=2))

class Head(nn.Module):
    """Average over the positions, normalise, classify. (b, dim, h, w) -> (b, num_classes)

    The norm comes after the average, so it acts on the vector that is classified: the mean of
    normalised vectors would no longer be normalised. With `num_classes` 0 the head returns the
    normalised features, (b, dim).
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(reduce(x, "b c h w -> b c", "mean")))

class ConvNeXt(nn.Module):
    """Stages of blocks, each at half the resolution of the stage before (table 9).

    depths, dims: the number of blocks and of channels in each stage. num_classes: 0 for features.
    in_channels: channels of the image. patch_size: of the stem, 4 in the paper; at 32x32 pixels,
    2 leaves the last stage 2x2 positions, and 1 leaves 4x4. drop_path: the chance of dropping the
    last block's branch, in [0, 1); it rises linearly from 0 at the first block. The paper trains
    Tiny with 0.1, Small with 0.4, Base and Large with 0.5 (table 5). layer_scale: initial γ, 0 for
    no LayerScale. grn: ConvNeXt V2. head_init_scale: a factor on the classifier's initial weights,
    0.001 in fine-tuning (table 6): the gradient that reaches the pretrained features is multiplied
    by these weights, and a new classifier's would spoil them.
    """

    def __init__(
        self, depths: tuple[int, ...], dims: tuple[int, ...], *, num_classes: int = 1000,
        in_channels: int = 3, patch_size: int = 4, drop_path: float = 0.0,
        layer_scale: float = 1e-6, grn: bool = False, head_init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"patch_size must be 1 or more, not {patch_size}")
        # The authors' name for what comes before each stage: the stem, then the Downsamples.
        stem = nn.Sequential(Patchify(in_channels, dims[0], patch_size), LayerNorm2d(dims[0]))
        self.downsample_layers = nn.ModuleList(
            [stem, *(Downsample(dim_in, dim) for dim_in, dim in pairwise(dims))])
        # Early blocks are dropped less often, since every later block builds on them.
        rates = [drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        self.stages = nn.ModuleList()
        for depth, dim in zip(depths, dims, strict=True):
            blocks = [Block(dim, rates.pop(0), layer_scale, grn) for _ in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
        self.head = Head(dims[-1], num_classes)
        self.apply(self._init_weights)
        if num_classes:
            with torch.no_grad():
                self.head.fc.weight *= head_init_scale

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        # Table 5 prints a standard deviation of 0.2; the authors' code and the libraries have 0.02.
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> (b, num_classes) logits, or (b, dims[-1]) features."""
        return self.head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> the last stage's map, (b, dims[-1], h / 32, w / 32).

        With smaller patches the map is larger: h / 16 at patch size 2. Sizes that are no multiple
        of the stride are rounded down. Raises ValueError for a wrong number of axes or channels,
        and for an image that is smaller than the total stride.
        """
        self._check(x)
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return x

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """(b, in_channels, h, w) -> the map of every stage, at strides 4, 8, 16 and 32.

        These strides are those of 4x4 patches. A detection or segmentation head takes such maps,
        often with a norm of its own for each. Errors: see forward_features.
        """
        self._check(x)
        maps = [x]
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            maps.append(stage(downsample(maps[-1])))
        return maps[1:]

    def _check(self, x: Tensor) -> None:
        # Ask the layers, since a user may have replaced the stem's convolution by a different one.
        convolutions = [m for m in self.downsample_layers.modules() if isinstance(m, nn.Conv2d)]
        channels = convolutions[0].in_channels
        stride = math.prod([m.stride[0] for m in convolutions])  # torch.compile wants a list
        if x.ndim != 4 or x.shape[1] != channels or min(x.shape[2:]) < stride:
            raise ValueError(
                f"images must be (b, {channels}, h, w) with h and w {stride} or more (the total "
                f"stride; a smaller patch_size lowers it), not {tuple(x.shape)}")

class Variant(NamedTuple):
    depths: tuple[int, ...]  # blocks per stage
    dims: tuple[int, ...]  # channels per stage
    gflops: float  # as the papers print it: multiply-accumulates in 1e9 at 224x224 pixels
    grn: bool = False  # ConvNeXt V2

# The paper's stages have 1 : 1 : 3 : 1 blocks, like Swin-T's, or 1 : 1 : 9 : 1. ResNet-50 has
# (3, 4, 6, 3); the change gained 0.54 points (section 2.2). The paper gives no reason beyond that.
VARIANTS = {
    # First published in timm and with ConvNeXt V2.                          parameters
    "atto": Variant((2, 2, 6, 2), (40, 80, 160, 320), 0.55),               # 3.7M
    "femto": Variant((2, 2, 6, 2), (48, 96, 192, 384), 0.78),              # 5.2M
    "pico": Variant((2, 2, 6, 2), (64, 128, 256, 512), 1.37),              # 9.0M
    "nano": Variant((2, 2, 8, 2), (80, 160, 320, 640), 2.45),              # 15.6M
    # The paper's (section 3, table 1).
    "tiny": Variant((3, 3, 9, 3), (96, 192, 384, 768), 4.5),               # 28.6M
    "small": Variant((3, 3, 27, 3), (96, 192, 384, 768), 8.7),             # 50.2M
    "base": Variant((3, 3, 27, 3), (128, 256, 512, 1024), 15.4),           # 88.6M
    "large": Variant((3, 3, 27, 3), (192, 384, 768, 1536), 34.4),          # 197.8M
    "xlarge": Variant((3, 3, 27, 3), (256, 512, 1024, 2048), 60.9),        # 350.2M
}  # fmt: skip
# GRN contains no matrix product, so V2 is counted like V1.
VARIANTS |= {f"v2_{name}": VARIANTS[name]._replace(grn=True)
             for name in ("atto", "femto", "pico", "nano", "tiny", "base", "large")}
VARIANTS["v2_huge"] = Variant((3, 3, 27, 3), (352, 704, 1408, 2816), 115, grn=True)

def create_convnext(variant: str, *, layer_scale: float | None = None, **options: Any) -> ConvNeXt:
    """Build one of the VARIANTS with initial weights, in training mode.

    options: the other keyword arguments of ConvNeXt, except grn. layer_scale: 1e-6 by default in
    V1, and none in V2, whose paper found it unnecessary with GRN. Raises ValueError for an unknown
    variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    depths, dims, _, grn = VARIANTS[variant]
    if layer_scale is None:
        layer_scale = 0.0 if grn else 1e-6
    return ConvNeXt(depths, dims, layer_scale=layer_scale, grn=grn, **options)

# The network ends here. What follows measures it.

def count_macs(model: nn.Module, image_size: int, in_channels: int = 3) -> int:
    """Count the multiply-accumulates of convolutions, linear layers and attention for one image.

    The papers call them FLOPs. They are counted on the meta device, where tensors have only shapes.
    """
    model = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, in_channels, image_size, image_size, device="meta"))
    return counter.get_total_flops() // 2  # PyTorch counts multiplications and additions

def variant_table() -> Iterator[str]:
    """Yield a line per variant: shape, parameters, and the cost as counted and as published."""
    yield f"{'variant':8} {'depths':14} {'dims':24} {'parameters':>11} {'GMACs':>7} {'printed':>7}"
    for name, (depths, dims, gflops, _) in VARIANTS.items():
        with torch.device("meta"):
            model = create_convnext(name)
        size, macs = sum(p.numel() for p in model.parameters()), count_macs(model, 224)
        yield f"{name:8} {depths!s:14} {dims!s:24} {size:11,} {macs / 1e9:7.3f} {gflops:7}"


# --- Part 2. The road: how the paper gets here from a ResNet-50 (section 2, table 10) -------------

class Design(NamedTuple):
    """Everything that the paper changes on the way. The defaults are ResNet-50."""

    depths: tuple[int, ...] = (3, 4, 6, 3)
    patchify: bool = False  # the stem: 4x4 patches instead of a strided 7x7 and a max-pool
    depthwise: bool = False  # the kxk convolution has one filter per channel
    width: int = 64  # channels of the 3x3 convolutions in stage 1; doubled from stage to stage
    inverted: bool = False  # blocks are narrow - wide - narrow, not wide - narrow - wide
    depthwise_first: bool = False  # the kxk convolution is the first layer, not the second
    kernel_size: int = 3  # k
    act: type[nn.Module] = nn.ReLU
    one_act: bool = False  # a block has one activation, not three
    one_norm: bool = False  # a block has one norm, not three
    norm: type[nn.Module] = nn.BatchNorm2d
    separate_downsampling: bool = False  # between the stages; with LayerScale and the head's norm
    attention: bool = False  # Swin's, instead of the depthwise convolution; after the last step

class Step(NamedTuple):
    name: str
    change: dict[str, Any]  # fields of Design; all else stays what it was in the last kept step
    top1: float  # ImageNet accuracy in %, table 10: means of three trainings of 300 epochs
    gflops: float  # multiply-accumulates in 1e9 at 224x224, as table 10 prints them
    kept: bool = True

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

class WindowAttention(nn.Module):
    """Self-attention within windows of 7x7 positions, like Swin's. (b, dim, h, w) -> same shape

        y = W · softmax(q · kᵀ / √d + B) · v,   q, k, v = linear(x),   d = dim / heads

    There is a head per 16 channels. B is learned, for each head and relative position. Positions
    outside of the map are masked. shift: the windows begin at position 3 instead of 0, and what
    lies before forms a smaller window. In Swin every other block is shifted, so that windows
    exchange information. An axis with a single window is not shifted. Raises ValueError if dim is
    not a multiple of the number of heads.
    """

    def __init__(self, dim: int, shift: bool, window: int = 7) -> None:
        super().__init__()
        self.window, self.heads = window, max(1, dim // 16)
        self.before = window - window // 2 if shift else 0  # rows of the first window off the map
        if dim % self.heads:
            raise ValueError(f"{dim} channels cannot be divided into {self.heads} heads; give a "
                             "multiple of 16")
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(0.02 * torch.randn(self.heads, (2 * window - 1) ** 2))
        position = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        offset = position[:, None] - position + window - 1  # (49, 49, 2), rows and columns, from 0
        self.register_buffer("index", offset[..., 0] * (2 * window - 1) + offset[..., 1],
                             persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        (h, w), n = x.shape[2:], self.window
        top, left = (self.before if size > n else 0 for size in (h, w))
        sides = (left, -(w + left) % n, top, -(h + top) % n)  # fill up to whole windows
        x = F.pad(self.qkv(rearrange(x, "b c h w -> b h w c")), (0, 0, *sides))
        q, k, v = rearrange(x, "b (i p) (j q) (three m c) -> three b (i j) m (p q) c",
                            three=3, m=self.heads, p=n, q=n)  # m heads of c channels
        outside = F.pad(x.new_zeros(h, w), sides, value=1)
        outside = rearrange(outside, "(i p) (j q) -> (i j) 1 1 (p q)", p=n, q=n)
        bias = self.bias[:, self.index] - 1e4 * outside  # (windows, heads, 49, 49)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        y = rearrange(y, "b (i j) m (p q) c -> b (i p) (j q) (m c)", j=x.shape[2] // n, p=n)
        y = self.proj(y[:, top : top + h, left : left + w])
        return rearrange(y, "b h w c -> b c h w")

class RoadmapBlock(nn.Module):
    """A block between ResNet's and ConvNeXt's. (b, dim_in, h, w) -> (b, dim, h / s, w / s)

    width: that of the stage. There are self.dim output channels: 4·width, or width if inverted.
    stride: s, of the kxk convolution and the shortcut. index: the position in the stage; in odd
    ones attention is shifted.
    """

    def __init__(self, design: Design, dim_in: int, width: int, stride: int, index: int,
                 layer_scale: float) -> None:
        super().__init__()
        d = design
        middle, self.dim = (4 * width, width) if d.inverted else (width, 4 * width)
        optional_act = nn.Identity if d.one_act else d.act  # the step "one activation" removes it

        def conv(c_in: int, c_out: int, size: int = 1, stride: int = 1, groups: int = 1,
                 norm: bool = True) -> list[nn.Module]:
            if groups == c_in == c_out and stride == 1:
                layer: nn.Conv2d = DepthwiseConv(c_in, size)
            else:
                bias = not (norm and d.norm is nn.BatchNorm2d)  # BatchNorm subtracts any bias
                layer = nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=bias)
            return [layer, d.norm(c_out)] if norm else [layer]

        def mix(dim: int) -> list[nn.Module]:  # what mixes positions
            if d.attention:
                return [WindowAttention(dim, shift=index % 2 == 1), d.norm(dim)]
            return conv(dim, dim, d.kernel_size, stride, groups=dim if d.depthwise else 1)

        if d.depthwise_first:  # kxk - wide - narrow
            layers = [*mix(dim_in), optional_act(), *conv(dim_in, middle, norm=not d.one_norm)]
        else:  # 1x1 - kxk - 1x1
            layers = [*conv(dim_in, middle, norm=not d.one_norm), optional_act(), *mix(middle)]
        self.branch = nn.Sequential(*layers, d.act(), *conv(middle, self.dim, norm=not d.one_norm))
        keeps_shape = (dim_in, stride) == (self.dim, 1)
        self.shortcut = nn.Sequential(
            *([] if keeps_shape else conv(dim_in, self.dim, stride=stride)))
        self.act = optional_act()
        # The paper does not say from which step on LayerScale was used.
        scaled = d.separate_downsampling and layer_scale
        self.layer_scale = LayerScale(self.dim, layer_scale) if scaled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_scale(rearrange(self.branch(x), "b c h w -> b h w c"))
        return self.act(self.shortcut(x) + rearrange(y, "b h w c -> b c h w"))

def roadmap_network(design: Design, num_classes: int = 1000, patch_size: int = 4,
                    layer_scale: float = 1e-6) -> nn.Sequential:
    """Build any network of the road, with PyTorch's initialisation. (b, 3, h, w) -> (b, classes)

    patch_size: the stem's stride, also without patches: 4, or 1 or 2 for images of 32x32 pixels.
    layer_scale: see Block. The paper's networks had stochastic depth too, which is left out here.
    Raises ValueError for a different patch_size, and for attention before the road's last step.
    """
    d, dim = design, design.width
    if patch_size not in (1, 2, 4) or d.attention and not d.separate_downsampling:
        raise ValueError("patch_size must be 1, 2 or 4, and attention needs separate_downsampling")
    if d.patchify:  # the paper names no norm here before the last step, so this one is a guess
        layers: list[nn.Module] = [Patchify(3, dim, patch_size), d.norm(dim)]
    else:
        layers = [nn.Conv2d(3, dim, 7, stride=min(2, patch_size), padding=3, bias=False),
                  d.norm(dim), d.act()]
        if patch_size == 4:
            layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    for stage, depth in enumerate(d.depths):
        width, stride = d.width * 2**stage, 2 if stage else 1
        if stage and d.separate_downsampling:
            layers.append(Downsample(dim, width))
            dim, stride = width, 1
        for index in range(depth):
            layers.append(RoadmapBlock(d, dim, width, stride, index, layer_scale))
            dim, stride = layers[-1].dim, 1
    head = Head(dim, num_classes)
    if not d.separate_downsampling:
        head.norm = nn.Identity()  # the head's norm came with the last step
    return nn.Sequential(*layers, head)

def roadmap() -> Iterator[tuple[Step, Design]]:
    """Yield each step of the road with the whole design that it arrives at."""
    kept = Design()
    for step in ROADMAP:
        design = kept._replace(**step.change)
        yield step, design
        kept = design if step.kept else kept

def named_design(name: str, width: int = 0) -> Design:
    """Return the design after the step with this name. "window attention": the last with attention.

    width: instead of the paper's 64 or 96; 0 keeps these. Raises KeyError for an unknown name.
    """
    designs = {step.name: design for step, design in roadmap()}
    designs["window attention"] = [*designs.values()][-1]._replace(attention=True)
    return designs[name]._replace(width=width or designs[name].width)

def road_table() -> Iterator[str]:
    """Yield a line per step: accuracy, gain and cost as printed, and the cost as counted here."""
    yield f"{'step':24} {'top-1, %':>8} {'gain':>6} {'GFLOPs':>7} {'counted':>8}"
    before = OLD_RECIPE_TOP1
    for step, design in roadmap():
        with torch.device("meta"):
            macs = count_macs(roadmap_network(design), 224)
        counted = f"{macs / 1e9:.2f}"
        mark = "" if step.kept else "  not kept"
        mark += "" if counted == f"{step.gflops:.2f}" else "  differs"
        yield (f"{step.name:24} {step.top1:8.2f} {step.top1 - before:+6.2f} {step.gflops:7.2f} "
               f"{counted:>8}{mark}")
        before = step.top1 if step.kept else before


# --- Part 3. Weights: the checkpoints of other libraries, in and out ------------------------------

# The authors (Meta), timm, torchvision and Hugging Face's transformers store the same network under
# different names. Each row has the names of one module, in the order of LAYOUTS. "=" means the name
# in the first column, "-" that the layout has none. {s} is the stage from 0 to 3, {d} = 2·s, {e} =
# 2·s + 1, and {b} is the block. The names of a row that begins with a dot follow those in BLOCK.
LAYOUTS = ("native", "meta", "timm", "torchvision", "huggingface")
BLOCK = ("stages.{s}.{b}", "stages.{s}.{b}", "stages.{s}.blocks.{b}", "features.{e}.{b}",
         "encoder.stages.{s}.layers.{b}")
NAMES = """
downsample_layers.0.0 =    stem.0                features.0.0 embeddings.patch_embeddings
downsample_layers.0.1 =    stem.1                features.0.1 embeddings.layernorm
downsample_layers.{s} =    stages.{s}.downsample features.{d} encoder.stages.{s}.downsampling_layer
head.norm             norm head.norm             classifier.0 layernorm
head.fc               head head.fc               classifier.2 classifier
.dwconv               =          .conv_dw           .block.0         .dwconv
.norm                 =          .norm              .block.2         .layernorm
.mlp.pwconv1          .pwconv1   .mlp.fc1           .block.3         .pwconv1
.mlp.grn.gamma        .grn.gamma .mlp.grn.weight    -                .grn.weight
.mlp.grn.beta         .grn.beta  .mlp.grn.bias      -                .grn.bias
.mlp.pwconv2          .pwconv2   .mlp.fc2           .block.5         .pwconv2
.layer_scale.gamma    .gamma     .gamma             .layer_scale     .layer_scale_parameter
"""
SHAPES = {  # the parameters with a different shape, by a part of their native name
    "meta": {".grn.": "c -> 1 1 1 c"},
    "timm": {".pwconv1.weight": "o i -> o i 1 1", ".pwconv2.weight": "o i -> o i 1 1"},
    "torchvision": {".gamma": "c -> c 1 1"},
    "huggingface": {".grn.": "c -> 1 1 1 c"},
}

@cache
def name_map(layout: str) -> Mapping[str, str]:
    """Map native names to the layout's: all parameters of four stages of up to 40 blocks each."""
    names, column = {}, LAYOUTS.index(layout)
    ends = ("", ".weight", ".bias", ".0.weight", ".0.bias", ".1.weight", ".1.bias")
    for row in map(str.split, NAMES.strip().splitlines()):
        texts = [row[0], row[0] if row[column] == "=" else row[column]]
        if row[0].startswith("."):
            texts = [BLOCK[i] + text for i, text in zip((0, column), texts, strict=True)]
        for s, b, end in product(range(4), range(40), ends):
            native, name = (t.format(s=s, d=2 * s, e=2 * s + 1, b=b) + end for t in texts)
            names.setdefault(native, name)  # for stage 0 the stem's rows, which come first, stand
    return names

def unwrapped(model: nn.Module) -> ConvNeXt:
    """Return the ConvNeXt inside of torch.compile, DataParallel, AveragedModel or the like."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, ConvNeXt) and {*module.parameters()} == {*model.parameters()}:
            return module
    raise TypeError(f"expected a ConvNeXt, not a {type(model).__name__}")

def export_state_dict(model: nn.Module, layout: str) -> dict[str, Tensor]:
    """Return the state dict, which shares the model's memory, in one of the LAYOUTS.

    Without classes, huggingface's names have no prefix "convnext.", like those of its base model.
    Raises ValueError for an unknown layout or parameter, and for a network that torchvision lacks.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    state = unwrapped(model).state_dict()
    if layout == "native":
        return state
    names, shapes, exported = name_map(layout), SHAPES[layout], {}
    v2 = "stages.0.0.mlp.grn.gamma" in state
    if layout == "torchvision" and (v2 or "stages.0.0.layer_scale.gamma" not in state):
        raise ValueError(f"torchvision has no ConvNeXt {'V2' if v2 else 'without LayerScale'}")
    if layout == "timm" and len(state["stages.0.0.norm.weight"]) >= 96:
        shapes = {}  # only atto, femto, pico and nano have 1x1 convolutions there
    for native, tensor in state.items():
        if native not in names:
            raise ValueError(f"{native} has no name in the layout {layout!r}")
        name = names[native]
        if layout == "huggingface" and "head.fc.weight" in state and "classifier" not in name:
            name = ("convnextv2." if v2 else "convnext.") + name
        for part, pattern in shapes.items():
            tensor = rearrange(tensor, pattern) if part in native else tensor
        exported[name] = tensor
    return exported

def read_file(path: str | PathLike) -> tuple[Mapping, Mapping[str, str]]:
    """Read content and metadata of a .safetensors, .pt, .pth or .bin file, on the CPU.

    Pickles are read with torch.load(weights_only=True), so no code inside a file ever runs. Raises
    FileNotFoundError, or ValueError with the path and the reader's reason.
    """
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
                return tensors, file.metadata() or {}
        if zipfile.is_zipfile(path):  # torch.load ignores the checksums
            with zipfile.ZipFile(path) as archive:
                # torch.load reads nothing from a record with a folder's attribute (16).
                odd = [info.filename for info in archive.infolist() if info.external_attr & 16]
                if member := archive.testzip() or " ".join(odd):
                    raise ValueError(f"it is damaged: the checksum of {member} differs")
        else:
            with open(path, "rb") as file:
                if (start := file.read(24))[:1] not in (b"\x80", b"P"):  # a pickle, a cut archive
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
        # torch.load puts its reason into the middle of advice to load the file without safety.
        reason = re.search(r"(.*)\n+Check the documentation", str(error)) or [0, str(error)]
        line = reason[1].strip().partition("\n")[0].partition(". ")[0]
        raise ValueError(f"cannot read {path}: {line or type(error).__name__}") from error

DOWNLOADS = ("timm:", "hf:", "https:")

def download(source: str) -> tuple[Mapping, dict[str, Any]]:
    """Fetch timm:NAME, hf:REPO or an https address; return its content and timm's settings.

    The settings are mean, std, img_size and crop_pct; {} unless the source is timm's. The libraries
    keep what they fetched, and raise errors of their own.
    """
    kind, _, name = source.partition(":")
    if kind == "timm":
        import timm

        model = timm.create_model(name, pretrained=True)
        config = model.pretrained_cfg
        squashed = config["crop_mode"] == "squash"  # the whole image, without a crop
        return model.state_dict(), {"mean": list(config["mean"]), "std": list(config["std"]),
                                    "img_size": config["input_size"][-1],
                                    "crop_pct": None if squashed else config["crop_pct"]}
    if kind == "https":
        file_name = name.partition("?")[0].rpartition("/")[2]  # two addresses can have the same
        file_name = f"{hashlib.sha256(name.encode()).hexdigest()[:8]}-{file_name}"
        path = os.path.join(torch.hub.get_dir(), "checkpoints", file_name)
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(source, path)
        try:
            return read_file(path)[0], {}
        except ValueError:  # perhaps a page that says why: do not keep it
            os.remove(path)
            raise
    from huggingface_hub import errors, hf_hub_download

    try:
        path = hf_hub_download(name, "model.safetensors")
    except errors.EntryNotFoundError:  # there is none, or none is kept and there is no connection
        path = hf_hub_download(name, "pytorch_model.bin")
    return read_file(path)[0], {}

class Weights(NamedTuple):
    """A checkpoint with native names and shapes."""

    tensors: dict[str, Tensor]
    layout: str
    settings: dict[str, Any]  # see download

def read_weights(source: Weights | Mapping | str | PathLike) -> Weights:
    """Read the weights of a ConvNeXt from a checkpoint in any layout. source: see load_weights.

    Training programs nest a state dict (`model`, `state_dict`, ...) and put prefixes before its
    names (`module.`, `backbone.`, ...). The prefix is whatever stands before the name of the first
    pwconv1; entries without it are ignored. If there are several networks, the averaged one ("ema")
    is chosen, like in timm. Raises ValueError for anything but a ConvNeXt, and what read_file and
    download raise.
    """
    if isinstance(source, Weights):
        return source
    content, settings = source, {}
    if isinstance(source, str) and source.startswith(DOWNLOADS):
        content, settings = download(source)
    elif isinstance(source, str | PathLike):
        content, _ = read_file(source)
    if not isinstance(content, Mapping):
        raise TypeError(f"weights are a state dict or a file, not a {type(content).__name__}")

    def flatten(mapping: Mapping, path: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in mapping.items():
            if isinstance(value, Mapping):
                yield from flatten(value, f"{path}{name}.")
            else:
                yield f"{path}{name}", value

    values, found = dict(flatten(content)), {}
    for layout in LAYOUTS:
        marker = name_map(layout)["stages.0.0.mlp.pwconv1.weight"]  # differs in each
        found |= {name.removesuffix(marker): layout for name in values
                  if f".{name}".endswith(f".{marker}")}
    averaged = [prefix for prefix in found if re.search(r"(?<![a-z])ema(?![a-z])", prefix)]
    if not found:
        raise ValueError(f"these are no weights of a ConvNeXt ({', '.join([*values][:3])}, ...)")
    if len(prefixes := averaged or [*found]) > 1:
        raise ValueError(f"these are several networks, {', '.join(prefixes)}: pass one of them")
    layout, prefix = found[prefixes[0]], prefixes[0]
    if layout == "huggingface":  # there the classifier's names are without the backbone's prefix
        prefix = re.sub(r"convnext(v2)?\.$", "", prefix)
    native_names, tensors = {name: native for native, name in name_map(layout).items()}, {}
    for name, tensor in values.items():
        if name.startswith(prefix) and isinstance(tensor, Tensor) and tensor.is_floating_point():
            name = re.sub(r"^convnext(v2)?\.", "", name.removeprefix(prefix))
            native = native_names.get(name, name)
            if native.endswith(("gamma", "beta")):
                tensor = tensor.flatten()
            elif "pwconv" in native and tensor.shape[2:] == (1, 1):
                tensor = rearrange(tensor, "o i 1 1 -> o i")
            tensors[native] = tensor
    return Weights(tensors, layout, settings)

class Report(NamedTuple):
    """What load_weights did, with native names."""

    loaded: list[str]
    kept: list[str]  # parameters of the model that kept their values
    left_out: list[str]  # tensors of the source for which the model has no place

def load_weights(model: nn.Module, source: Weights | Mapping | str | PathLike,
                 strict: bool = False) -> Report:
    """Copy weights into the model, in place.

    source: a state dict, the path or the https address of a .safetensors, .pt, .pth or .bin file,
    timm:NAME, hf:REPO, or what read_weights returned; in any of the LAYOUTS.

    The model keeps its classifier if the source has none or one for another number of classes, and
    its stem if the source's has other patches or channels; strict=True forbids both. It keeps its
    last norm if the source has no head at all. A warning says so. If anything else does not fit,
    ValueError names it and the model stays unchanged. For further errors see read_weights.
    """
    model, tensors = unwrapped(model), read_weights(source).tensors
    state, stem = model.state_dict(), "downsample_layers.0.0."

    def shape(place: Mapping[str, Tensor], name: str) -> str:
        return str(tuple(place[name].shape)) if name in place else "missing"

    misfits = [name for name in state | tensors if shape(state, name) != shape(tensors, name)]
    # Parts that keep their own weights if those of the source do not fit.
    optional = {"head.norm.": not any(name.startswith("head.") for name in tensors),
                "head.fc.": not strict, stem: not strict and f"{stem}weight" in tensors}
    kept = tuple(part for part, may in optional.items() if may and f"{part}weight" in misfits)
    if wrong := [name for name in misfits if not name.startswith(kept)]:
        details = [f"{name} is {shape(tensors, name)} in the weights, {shape(state, name)} in the "
                   "model" for name in wrong[:3]]
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"these weights do not fit the model: {'; '.join(details)}{more}")
    report = Report([name for name in state if not name.startswith(kept)],
                    [name for name in state if name.startswith(kept)],
                    [name for name in tensors if name not in state])
    model.load_state_dict({name: tensors[name] for name in report.loaded}, strict=False)
    for what, names in (("kept its own", report.kept), ("has no place for", report.left_out)):
        if names:
            warnings.warn(f"the model {what} {', '.join(names)}", stacklevel=2)
    return report

def infer_architecture(weights: Weights) -> dict[str, Any]:
    """Derive create_convnext's arguments from the tensors; ValueError if they are no variant's."""
    tensors = weights.tensors
    filters = [tensors.get(f"stages.{s}.0.dwconv.weight") for s in range(4)]
    stem = tensors.get("downsample_layers.0.0.weight")
    if any(tensor is None or tensor.ndim != 4 for tensor in (stem, *filters)):
        raise ValueError("the stem or a stage is missing, or has no filters with four axes")
    stages = [name.split(".")[1] for name in tensors if name.endswith(".dwconv.weight")]
    network = (tuple(stages.count(s) for s in "0123"), tuple(map(len, filters)),
               "stages.0.0.mlp.grn.gamma" in tensors)
    variants = {(depths, dims, grn): name for name, (depths, dims, _, grn) in VARIANTS.items()}
    if network not in variants:
        raise ValueError("no variant has {} blocks of {} channels and GRN {}".format(*network))
    return {"variant": variants[network], "in_channels": stem.shape[1],
            "patch_size": stem.shape[2],
            "num_classes": (*tensors.get("head.fc.weight", torch.empty(0)).shape, 0)[0],
            "layer_scale": 1e-6 if "stages.0.0.layer_scale.gamma" in tensors else 0.0}

def from_checkpoint(source: Weights | Mapping | str | PathLike) -> ConvNeXt:
    """Build the network that a checkpoint holds, with its weights, in evaluation mode.

    source: see load_weights. Variant, number of classes (none for a backbone), channels and patch
    size follow from the tensors. Raises ValueError for whatever does not fit.
    """
    weights = read_weights(source)
    with torch.device("meta"):  # draws no random numbers that would be overwritten at once
        model = create_convnext(**infer_architecture(weights))
    model.to_empty(device="cpu")
    model.head.norm.reset_parameters()  # a backbone has no last norm to load
    load_weights(model, weights, strict=True)
    return model.eval()


# --- Part 4. Faster on a CPU, with the same results. Nothing new about ConvNeXt follows -----------

def speed_up(model: nn.Module) -> nn.Module:
    """Make training on a CPU faster, in place, and return the model.

    The layers keep their parameters, names and hooks, and compute the same up to rounding. Where a
    layer was changed by hand (its stride, padding, forward, ...), and on a GPU, in an export and
    without gradients, PyTorch's own convolution runs.
    """
    fast = {DepthwiseConv: FastDepthwiseConv, Patchify: FastPatchify}
    for module in model.modules():
        if type(module) in fast:
            module.__class__ = fast[type(module)]
    return model

# The number types for which this was measured to be faster, by the CPU's vector instructions.
CPU = torch.backends.cpu.get_cpu_capability() if torch.backends.mkldnn.is_available() else ""
FAST_DTYPES = {"AVX2": (torch.float32,), "AVX512": (torch.float32, torch.bfloat16)}.get(CPU, ())

def can_be_faster(layer: nn.Conv2d, x: Tensor, *settings: Any) -> bool:
    """Return whether the layer has these settings, and gradients are recorded on a CPU."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or not torch.is_grad_enabled():
        return False
    autocast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    edited = type(layer).__base__.forward is not nn.Conv2d.forward  # by a user
    return (x.device.type == "cpu" and dtype in FAST_DTYPES and x.ndim == 4 and x.numel() > 0
            and not edited and layer.bias is not None and layer.padding_mode == "zeros"
            and settings == (layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                             layer.dilation, layer.groups))

class FastPatchify(Patchify):
    """Patchify as a linear layer on patches, whose gradients are matrix products."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.kernel_size[0]
        if (not can_be_faster(self, x, self.out_channels, (p, p), (p, p), (0, 0), (1, 1), 1)
                or min(x.shape[2:]) < p):  # too small: the convolution raises an error
            return super().forward(x)
        h, w = x.shape[2:]
        x = x[:, :, : h - h % p, : w - w % p]
        x = rearrange(x, "b c (h p) (w q) -> b h w (p q c)", p=p, q=p)
        x = F.linear(x, rearrange(self.weight, "dim c p q -> dim (p q c)"), self.bias)
        return rearrange(x, "b h w dim -> b dim h w")

class FastDepthwiseConv(DepthwiseConv):
    """DepthwiseConv with the backward pass of DepthwiseGradient."""

    def forward(self, x: Tensor) -> Tensor:
        k, r, dim = self.kernel_size[0], self.kernel_size[0] // 2, self.in_channels
        if not can_be_faster(self, x, dim, (k, k), (1, 1), (r, r), (1, 1), dim) or k % 2 == 0:
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):  # which does not convert inputs of our own functions
            x = x.to(torch.get_autocast_dtype("cpu"))
        gradient = DepthwiseGradient if torch.compiler.is_compiling() else DepthwiseTangent
        return gradient.apply(x, self.weight, self.bias)

class DepthwiseGradient(torch.autograd.Function):
    """The depthwise convolution; its derivatives are depthwise convolutions again.

        ∂L/∂x[c, i, j] = Σ_{u,v} W[c, u, v] · g[c, i - u + 3, j - v + 3],     g = ∂L/∂y
        ∂L/∂W[c, u, v] = Σ_b Σ_{i,j} g[b, c, i, j] · x[b, c, i + u - 3, j + v - 3]

    The first convolves g with W turned by 180 degrees. In the second, g is the filter: as large as
    the map, it moves over x to only 7x7 places. Each channel of each sample has a filter of its
    own, so all of them lie side by side as b·c channels of one image; the sum over b comes last.
    PyTorch's kernel for such a convolution is several times faster than its kernel for this
    gradient (README.md has figures). x: (b, c, h, w), W: (c, 1, k, k), bias: (c,).
    """

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        (x, weight), grad_x, grad_weight = ctx.saved_tensors, None, None
        radius, (c, h, w) = weight.shape[-1] // 2, x.shape[1:]
        if ctx.needs_input_grad[0]:
            grad_x = F.conv2d(g, weight.to(g.dtype).flip(2, 3), padding=radius, groups=c)
        if ctx.needs_input_grad[1]:
            # Weights further from the centre than the map is wide only ever meet zeros.
            reach = min(radius, h - 1), min(radius, w - 1)
            grad_weight = weight.new_zeros(c, 1, *(2 * r + 1 for r in reach))
            at_once = max(1, 2**20 // (c * h * w))  # samples: about what fits into a CPU's cache
            for xs, gs in zip(x.split(at_once), g.split(at_once), strict=True):
                xs = rearrange(xs, "b c h w -> 1 (b c) h w")
                gs = rearrange(gs, "b c h w -> (b c) 1 h w")
                part = F.conv2d(xs, gs, padding=reach, groups=len(gs))
                part = rearrange(part, "1 (b c) u v -> b c 1 u v", c=c)
                grad_weight = grad_weight + part.sum(0, dtype=weight.dtype)
            top, left = (radius - r for r in reach)
            grad_weight = F.pad(grad_weight, (left, left, top, top))
        return grad_x, grad_weight, reduce(g, "b c h w -> c", "sum")

class DepthwiseTangent(DepthwiseGradient):
    """The same, with forward-mode derivatives for torch.func.jvp, which torch.compile refuses."""

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor, weight_t: Tensor, bias_t: Tensor) -> Tensor:
        x, weight = ctx.saved_tensors
        product_rule = DepthwiseGradient.forward(x_t, weight, bias_t)
        return product_rule + DepthwiseGradient.forward(x, weight_t, None)

@torch.no_grad()
def fold_layer_scale(model: nn.Module) -> nn.Module:
    """Multiply each Block's LayerScale into the linear layer before it, in place; return the model.

        γ ⊙ (W·x + b) = (γ ⊙ W)·x + γ ⊙ b

    The logits stay the same up to rounding, and inference is faster. Training would go on
    differently without γ.
    """
    for block in model.modules():
        if isinstance(block, Block) and isinstance(block.layer_scale, LayerScale):
            gamma, linear = block.layer_scale.gamma, block.mlp.pwconv2
            linear.weight *= rearrange(gamma, "c -> c 1")
            linear.bias *= gamma
            block.layer_scale = nn.Identity()
    return model

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="List the variants, or the steps of the road.")
    parser.add_argument("--road", action="store_true", help="list the steps from ResNet-50 on")
    print(*(road_table() if parser.parse_args().road else variant_table()), sep="\n")
