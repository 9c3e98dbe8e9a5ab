"""The checks of the exercises in walkthrough.ipynb. Reading them spoils the exercises."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convnext
import train


def check(answer: Callable) -> bool:
    """Compare the reader's function with an independent computation, and print the result."""
    torch.manual_seed(0)
    name = answer.__name__
    try:
        result = CHECKS[name](answer)
    except Unfilled:
        print(f"{name}: not filled in yet: it returns nothing")
        return False
    except Exception as error:  # noqa: BLE001, an unfinished function raises anything
        print(f"{name}: not yet, it raises {type(error).__name__}: {error}")
        return False
    print(f"{name}: right" if result is True else f"{name}: not yet; {result}")
    return result is True

class Unfilled(Exception):
    """The function returns nothing."""

def filled(value: object) -> object:
    if value is None or value is Ellipsis:
        raise Unfilled
    return value

def close(ours: object, theirs: Tensor) -> bool | str:
    """True, or what is wrong with a tensor."""
    if not isinstance(filled(ours), Tensor):
        return f"expected a tensor, got {type(ours).__name__}"
    if ours.shape != theirs.shape:
        return f"expected the shape {tuple(theirs.shape)}, got {tuple(ours.shape)}"
    distance = (ours - theirs).abs().max().item()
    return distance < 1e-4 or f"the shape is right, but values differ by up to {distance:.2g}"

def weights(layer: nn.Module) -> dict:
    """A layer's parameters by name, those of its parts as dictionaries."""
    parts = {name: weights(part) for name, part in layer.named_children()}
    return parts | dict(layer.named_parameters(recurse=False))

def randomised(layer: nn.Module) -> nn.Module:
    """With parameters that are not 0 or 1, so that each one counts."""
    for p in layer.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 1)
    return layer

def smoothed_cross_entropy(answer: Callable) -> bool | str:
    logits, labels = torch.randn(6, 5), torch.randint(0, 5, (6,))
    return close(answer(logits, labels, 0.1), F.cross_entropy(logits, labels, label_smoothing=0.1))

def block_macs(answer: Callable) -> bool | str:
    for dim, side in ((96, 56), (40, 7)):
        ours = filled(answer(dim, side))
        theirs = convnext.count_macs(convnext.Block(dim), side)
        if ours != theirs:
            return f"for dim {dim} and side {side} expected {theirs:,}, got {ours:,}"
    return True

def unpatchify(answer: Callable) -> bool | str:
    image = torch.randn(2, 12, 16, 3)
    cut = image.unflatten(1, (3, 4)).unflatten(3, (4, 4))  # b h p w q c
    patches = cut.permute(0, 1, 3, 5, 2, 4).flatten(3)
    return close(answer(patches, 4), image)

def grouped(answer: Callable) -> bool | str:
    layer = nn.Conv2d(8, 12, 3, padding=1, groups=4)
    x = torch.randn(2, 8, 6, 5)
    return close(answer(x, layer.weight, layer.bias, 4), layer(x))

def mlp(answer: Callable) -> bool | str:
    layer, x = randomised(convnext.InvertedBottleneck(8)), torch.randn(2, 5, 6, 8)
    return close(answer(x, weights(layer)), layer(x))

def receptive_field(answer: Callable) -> bool | str:
    """Compare with the pixels that have a gradient, in networks with positive weights."""
    for kernel, depths in ((3, (1, 2)), (5, (2, 1)), (7, (1, 1))):
        layers: list[nn.Module] = []
        for stage, depth in enumerate(depths):
            layers.append(nn.Conv2d(1, 1, 2 if stage else 4, stride=2 if stage else 4))
            layers += [nn.Conv2d(1, 1, kernel, padding=kernel // 2) for _ in range(depth)]
        network = nn.Sequential(*layers)
        for p in network.parameters():
            nn.init.constant_(p, 0.5)
        x = torch.ones(1, 1, 256, 256, requires_grad=True)
        y = network(x)
        y[0, 0, y.shape[2] // 2, y.shape[3] // 2].backward()
        theirs = (x.grad[0, 0].amax(0) > 0).sum().item()
        ours = filled(answer(kernel, depths))
        if ours != theirs:
            return f"for kernel size {kernel} and depths {depths} expected {theirs}, got {ours}"
    return True

def gelu_gradient(answer: Callable) -> bool | str:
    x = torch.linspace(-4, 4, 50, requires_grad=True)
    slope, = torch.autograd.grad(F.gelu(x).sum(), x)
    return close(answer(x.detach()), slope)

def layer_norm(answer: Callable) -> bool | str:
    layer, x = randomised(convnext.LayerNorm(6)), 3 * torch.randn(4, 5, 5, 6) + 1
    x[0] *= 1e-3  # so small that the 1e-6 counts
    ours, theirs = filled(answer(x, weights(layer))), layer(x)
    unbiased = (6 - 1) / 6  # of the variance
    if torch.allclose((ours - layer.bias)[1:] / unbiased**0.5, (theirs - layer.bias)[1:],
                      atol=1e-3):
        return "the variance is divided by n - 1; divide by n"
    result = close(ours, theirs)
    if result is not True and close(ours[1:], theirs[1:]) is True:
        return "small values come out wrong: add 1e-6 to the variance, before the root"
    vectors = x[:, 0, 0]  # (b, c), as in the head
    return result if result is not True else close(answer(vectors, weights(layer)), layer(vectors))

def batch_norm(answer: Callable) -> bool | str:
    layer, x = randomised(nn.BatchNorm2d(6, eps=1e-6)), 3 * torch.randn(4, 6, 5, 5) + 1
    x[:, 0] *= 1e-3  # so small that the 1e-6 counts
    theirs = layer(x).permute(0, 2, 3, 1)
    return close(answer(x.permute(0, 2, 3, 1), weights(layer)), theirs)

def downsample(answer: Callable) -> bool | str:
    layer, x = convnext.Downsample(6, 12), 3 * torch.randn(2, 6, 8, 4)
    randomised(layer[0])
    theirs = layer(x).permute(0, 2, 3, 1)
    return close(answer(x.permute(0, 2, 3, 1), weights(layer)), theirs)

def block(answer: Callable) -> bool | str:
    layer, x = randomised(convnext.Block(6, layer_scale=1.0)), torch.randn(2, 5, 7, 6)

    def mix(x: Tensor, p: dict) -> Tensor:  # twice the usual, so that the argument has to be used
        y = F.conv2d(x.permute(0, 3, 1, 2), p["weight"], p["bias"], padding=3, groups=6)
        return 2 * y.permute(0, 2, 3, 1)

    def norm(x: Tensor, p: dict) -> Tensor:
        return 2 * F.layer_norm(x, [6], p["weight"], p["bias"], 1e-6)

    p = weights(layer)
    for case in ("with LayerScale", "without LayerScale"):
        branch = layer.mlp(norm(mix(x, p["dwconv"]), p["norm"]))
        theirs = x + layer.layer_scale(branch)
        before = x.clone()
        ours = filled(answer(x, p, mix, norm))
        if not torch.equal(x, before):
            return "it changes its input, which training needs as it was: write x = x + y"
        if close(ours, theirs - x) is True:
            return "the shortcut is missing"
        result = close(ours, theirs)
        if result is not True:
            return f"{result} ({case})"
        p.pop("layer_scale", None)
        layer.layer_scale = nn.Identity()
    return True

def pooling_weight(answer: Callable) -> bool | str:
    weight = filled(answer(5))
    x = torch.randn(2, 5, 8, 8)
    return close(F.conv2d(x, weight, stride=2), F.avg_pool2d(x, 2))

def prenorm_block(answer: Callable) -> bool | str:
    mix, mlp, x = convnext.DepthwiseConv(8), convnext.InvertedBottleneck(8), torch.randn(2, 9, 9, 8)
    first, second = randomised(convnext.LayerNorm(8)), randomised(convnext.LayerNorm(8))
    p = {"norm1": weights(first), "mix": weights(mix), "norm2": weights(second),
         "mlp": weights(mlp)}
    y = x + mix(first(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return close(answer(x, p), y + mlp(second(y)))

def learning_rate(answer: Callable) -> bool | str:
    for step in (0, 10, 19, 20, 55, 99):
        ours, theirs = filled(answer(step, 100, 20, 0.01)), train.lr_at(step, 100, 20, 0.01, 0.0)
        if abs(ours - theirs) > 1e-7:
            return f"in step {step} of 100, 20 of them warmup, peak 0.01: expected {theirs:.6f}, " \
                   f"got {ours:.6f}"
    return True

def drop_path(answer: Callable) -> bool | str:
    x = torch.rand(4000, 3, 3, 2) + 1
    ours = filled(answer(x, 0.25))
    if not isinstance(ours, Tensor) or ours.shape != x.shape:
        return f"expected a tensor of the shape {tuple(x.shape)}"
    kept = (ours / x).flatten(1)
    kept = torch.where((kept - 1 / 0.75).abs() < 1e-5, 1 / 0.75, kept)  # without rounding
    if not torch.equal(kept, kept[:, :1].expand_as(kept)):
        return "a part of an image is dropped and a part kept; drop the whole branch of an image"
    share = (kept[:, 0] > 0).float().mean().item()
    if abs(share - 0.75) > 0.03:
        return f"with rate 0.25 {share:.0%} of the images are kept, not 75 %"
    if not torch.allclose(kept.max(), torch.tensor(1 / 0.75)):
        return "the others are not divided by 1 - rate"
    return True

def grn(answer: Callable) -> bool | str:
    layer, x = randomised(convnext.GRN(8)), torch.randn(2, 5, 6, 8)
    return close(answer(x, weights(layer)), layer(x))

CHECKS = {function.__name__: function for function in (
    smoothed_cross_entropy, block_macs, unpatchify, grouped, mlp, receptive_field,
    gelu_gradient, layer_norm, batch_norm, downsample, pooling_weight, block, prenorm_block,
    learning_rate, drop_path, grn)}
