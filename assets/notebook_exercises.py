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
        right = CHECKS[name](answer)
    except Exception as error:  # noqa: BLE001, an unfinished function raises anything
        print(f"{name}: not yet, it raises {type(error).__name__}: {error}")
        return False
    if right is None:
        print(f"{name}: not filled in yet")
    else:
        print(f"{name}: right" if right else f"{name}: not yet, the values differ")
    return bool(right)

def close(ours: Tensor | None, theirs: Tensor) -> bool | None:
    if ours is None or ours is Ellipsis:
        return None
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-4)

def smoothed_cross_entropy(answer: Callable) -> bool | None:
    logits, labels = torch.randn(6, 5), torch.randint(0, 5, (6,))
    return close(answer(logits, labels, 0.1), F.cross_entropy(logits, labels, label_smoothing=0.1))

def block_macs(answer: Callable) -> bool | None:
    values = [answer(dim, side) for dim, side in ((96, 56), (40, 7))]
    if None in values:
        return None
    return values == [convnext.count_macs(convnext.Block(dim), side, in_channels=dim)
                      for dim, side in ((96, 56), (40, 7))]

def unpatchify(answer: Callable) -> bool | None:
    image = torch.randn(2, 12, 16, 3)
    cut = image.unflatten(1, (3, 4)).unflatten(3, (4, 4))  # b h p w q c
    patches = cut.permute(0, 1, 3, 5, 2, 4).flatten(3)
    return close(answer(patches, 4), image)

def grouped(answer: Callable) -> bool | None:
    layer = nn.Conv2d(8, 12, 3, padding=1, groups=4)
    x = torch.randn(2, 8, 6, 5)
    return close(answer(x, layer.weight, layer.bias, 4), layer(x))

def mlp_as_convolutions(answer: Callable) -> bool | None:
    mlp, x = convnext.InvertedBottleneck(8), torch.randn(2, 5, 6, 8)
    p = {name: {"weight": layer.weight, "bias": layer.bias}
         for name, layer in (("pwconv1", mlp.pwconv1), ("pwconv2", mlp.pwconv2))}
    return close(answer(x.permute(0, 3, 1, 2), p), mlp(x).permute(0, 3, 1, 2))

def receptive_field(answer: Callable) -> bool | None:
    """Compare with the pixels that have a gradient, in networks with positive weights."""
    for kernel, depths in ((3, (1, 2)), (5, (2, 1)), (7, (1, 1))):
        if answer(kernel, depths) is None:
            return None
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
        if (x.grad[0, 0].amax(0) > 0).sum().item() != answer(kernel, depths):
            return False
    return True

def gelu_gradient(answer: Callable) -> bool | None:
    x = torch.linspace(-4, 4, 50, requires_grad=True)
    slope, = torch.autograd.grad(F.gelu(x).sum(), x)
    return close(answer(x.detach()), slope)

def batch_norm(answer: Callable) -> bool | None:
    layer, x = nn.BatchNorm2d(6, eps=1e-6), 3 * torch.randn(4, 6, 5, 5) + 1
    for p in layer.parameters():
        nn.init.normal_(p)
    theirs = layer(x).permute(0, 2, 3, 1)
    return close(answer(x.permute(0, 2, 3, 1), {"weight": layer.weight, "bias": layer.bias}),
                 theirs)

def pooling_weight(answer: Callable) -> bool | None:
    weight = answer(5)
    if weight is None:
        return None
    x = torch.randn(2, 5, 8, 8)
    return close(F.conv2d(x, weight, stride=2), F.avg_pool2d(x, 2))

def prenorm_block(answer: Callable) -> bool | None:
    dim, x = 8, torch.randn(2, 9, 9, 8)
    mix, mlp = convnext.DepthwiseConv(dim), convnext.InvertedBottleneck(dim)
    first, second = convnext.LayerNorm(dim), convnext.LayerNorm(dim)
    for norm in (first, second):
        nn.init.normal_(norm.weight)

    def weights(layer: nn.Module) -> dict[str, Tensor]:
        return {"weight": layer.weight, "bias": layer.bias}

    p = {"norm1": weights(first), "mix": weights(mix), "norm2": weights(second),
         "mlp": {"pwconv1": weights(mlp.pwconv1), "pwconv2": weights(mlp.pwconv2)}}
    y = x + mix(first(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return close(answer(x, p), y + mlp(second(y)))

def learning_rate(answer: Callable) -> bool | None:
    steps = range(0, 100, 7)
    ours = [answer(step, 100, 20, 0.01) for step in steps]
    if None in ours:
        return None
    return close(torch.tensor(ours), torch.tensor([train.lr_at(s, 100, 20, 0.01, 0.0)
                                                   for s in steps]))

def drop_path(answer: Callable) -> bool | None:
    x = torch.ones(4000, 3, 3, 2)
    y = answer(x, 0.25)
    if y is None:
        return None
    kept = y.flatten(1)
    whole = torch.equal(kept, kept[:, :1].expand_as(kept))  # a branch is dropped as a whole
    values = torch.allclose(kept[:, 0].unique(), torch.tensor([0, 1 / 0.75]))
    return whole and values and abs((kept[:, 0] > 0).float().mean() - 0.75) < 0.03

def grn(answer: Callable) -> bool | None:
    layer, x = convnext.GRN(8), torch.randn(2, 5, 6, 8)
    for p in layer.parameters():
        nn.init.normal_(p)
    return close(answer(x, {"gamma": layer.gamma, "beta": layer.beta}), layer(x))

CHECKS = {function.__name__: function for function in (
    smoothed_cross_entropy, block_macs, unpatchify, grouped, mlp_as_convolutions, receptive_field,
    gelu_gradient, batch_norm, pooling_weight, prenorm_block, learning_rate, drop_path, grn)}
