"""What is claimed, checked against timm, torchvision, PyTorch and published figures.

pytest test_convnext.py                       needs no network, no GPU and no data set
pytest test_convnext.py -m network            the published weights; downloads 460 MB
pytest test_convnext.py -m slow               all variants in full; needs 6 GB of memory
pytest test_convnext.py -k both_ways -rP      prints the largest difference of logits
"""

import argparse
import ast
import copy
import csv
import errno
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
import warnings
import zipfile
from pathlib import Path
from unittest.mock import Mock

import nbformat
import numpy as np
import PIL.Image
import pytest
import timm
import timm.data.auto_augment as timm_ops
import timm.optim
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
import transformers
from einops import rearrange
from huggingface_hub.errors import LocalEntryNotFoundError
from nbclient import NotebookClient
from safetensors.torch import load_file, save_file
from torch import nn

import convnext
import train
from convnext import (
    VARIANTS,
    create_convnext,
    export_state_dict,
    from_checkpoint,
    load_weights,
)

HERE = Path(__file__).parent

with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore"
    )  # a marker is declared in a configuration file or not at all
    network, slow = pytest.mark.network, pytest.mark.slow


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["plain", "fast"])
def speed_up(request, monkeypatch):
    """Make a model faster, on any CPU and for any type, or leave it as it is."""
    monkeypatch.setattr(
        convnext, "FAST_DTYPES", (torch.float32, torch.bfloat16, torch.float64)
    )
    return convnext.speed_up if request.param == "fast" else lambda model: model


def meta(variant, **options):
    with torch.device("meta"):
        return create_convnext(variant, **options)


def randomise(model):
    """Draw every parameter at random, LayerScale too, at sizes that keep the signal's."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2 and p.shape != (
                len(p),
                1,
                1,
            ):  # torchvision's layer_scale is (c, 1, 1)
                p.normal_(std=p[0].numel() ** -0.5)
            elif name.endswith("bias"):
                p.normal_(std=0.1)
            else:
                p.uniform_(0.2, 1)
    return model.eval()


def four_blocks(num_classes=10):
    """A small network with every kind of layer."""
    return randomise(
        convnext.ConvNeXt(
            (1, 1, 1, 1), (8, 16, 24, 32), num_classes=num_classes, grn=True
        )
    )


def gradients(network, x):
    """The gradient of each parameter, by the name it has in the plain network."""
    network.zero_grad()
    network(x).square().sum().backward()
    return {
        name.removeprefix("_orig_mod."): p.grad for name, p in network.named_parameters()
    }


# --- The architecture -------------------------------------------------------------------


PARAMETERS = dict(zip(VARIANTS, (
    3_695_520, 5_217_784, 9_045_672, 15_593_560,
    28_589_128, 50_223_688, 88_591_464, 197_767_336, 350_196_968,
    3_708_400, 5_233_240, 9_066_280, 15_623_800,
    28_635_496, 88_717_800, 197_956_840, 660_289_640)))


@pytest.fixture(scope="module")
def variant_lines():
    """The table that `python convnext.py` prints, by variant."""
    return {line.split()[0]: line for line in convnext.variant_table()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_size_and_cost(variant, variant_lines):
    published = VARIANTS[variant].gflops
    *_, parameters, counted, printed = variant_lines[variant].split()
    assert int(parameters.replace(",", "")) == PARAMETERS[variant]
    assert float(printed) == published
    rounded = (
        0.0051 if published < 3 else 0.051 if published < 100 else 0.51
    )  # as in print
    assert abs(float(counted) - published) <= rounded


def test_count_macs_takes_what_the_model_takes():
    """Other channels and types; (49·C + 8·C²)·positions in a block of C channels."""
    model = convnext.ConvNeXt((1,), (8,), in_channels=5, num_classes=0).bfloat16()
    assert convnext.count_macs(model, 32) == (5 * 16 * 8 + 49 * 8 + 8 * 64) * 64
    model.downsample_layers[0][0] = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 8, 1))
    model.bfloat16()
    assert convnext.count_macs(model, 32) == (48 * 8 + 49 * 8 + 8 * 64) * 64


def peer(library, variant, num_classes=1000):
    """The library's network, on the meta device; None if it has none of this variant."""
    depths, dims, _, v2 = VARIANTS[variant]
    name = variant.removeprefix("v2_")
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(
                f"convnext{'v2' * v2}_{name}", num_classes=num_classes
            )
        if library == "torchvision":
            build = getattr(torchvision.models, f"convnext_{name}", None)
            return None if v2 or not build else build(num_classes=num_classes)
        kind = "ConvNextV2" if v2 else "ConvNext"
        config = getattr(transformers, f"{kind}Config")(
            depths=list(depths), hidden_sizes=list(dims), num_labels=num_classes)
        return getattr(transformers, f"{kind}ForImageClassification")(config)


def logits_of(network, x):
    with torch.inference_mode():
        y = network.eval()(x)
    return getattr(y, "logits", y)


LIBRARIES = ("timm", "torchvision", "huggingface", "meta")


def network_with(exported, library, network):
    """The library's network on the memory of the exported weights, which must all fit."""
    if library == "meta":  # the authors' code is no package; timm reads their files
        exported = timm.models.convnext.checkpoint_filter_fn({"model": exported}, network)
    network.load_state_dict(exported, strict=True, assign=True)
    return network


IN_FULL = ("atto", "tiny", "base", "v2_atto", "v2_tiny")


@pytest.mark.parametrize("variant", [
    variant if variant in IN_FULL else pytest.param(variant, marks=slow)
    for variant in VARIANTS])
def test_the_same_function_both_ways(variant, request):
    """From us to each library and back: the same logits, and the same parameters."""
    if variant not in IN_FULL and "slow" not in request.config.getoption("-m"):
        pytest.skip("slow: pytest -m slow")
    model = randomise(meta(variant).to_empty(device="cpu"))
    again = meta(variant).to_empty(device="cpu")
    x = torch.randn(1, 3, 70, 97)
    expected = logits_of(model, x)
    assert expected.std() > 0.1
    for library in LIBRARIES:
        network = peer("timm" if library == "meta" else library, variant)
        if network is None:
            continue
        exported = export_state_dict(model, library)
        logits = logits_of(network_with(exported, library, network), x)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        print(f"{variant:9} {library:12} {(logits - expected).abs().max().item():.1e}")
        tensors, _ = convnext.read_weights(
            exported if library == "meta" else network.state_dict())
        for name, parameter in model.named_parameters():  # came back to where it had been
            assert tensors.pop(name).data_ptr() == parameter.data_ptr(), name
        assert not tensors
    report = load_weights(again, exported)
    assert not report.kept and not report.left_out
    assert all(map(torch.equal, again.parameters(), model.parameters()))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_both_ways(variant, library):
    network = peer("timm" if library == "meta" else library, variant)
    if network is None:
        pytest.skip(f"{library} has no {variant}")
    exported = export_state_dict(meta(variant), library)
    network_with(exported, library, network)
    architecture = convnext.infer_architecture(convnext.read_weights(exported))
    depths, dims, _, grn = VARIANTS[variant]
    assert architecture == {
        "depths": depths, "dims": dims, "grn": grn, "in_channels": 3, "patch_size": 4,
        "num_classes": 1000, "layer_scale": 0.0 if grn else 1e-6}
    assert convnext.variant_of(depths, dims, grn) == variant


def sized_peer(library, depths, dims, v2, patch_size=4, num_classes=5):
    """The library's network of any size."""
    if library == "timm":
        return timm.models.ConvNeXt(
            depths=depths, dims=dims, use_grn=v2, num_classes=num_classes,
            patch_size=patch_size, ls_init_value=None if v2 else 1e-6)
    if library == "torchvision":
        setting = torchvision.models.convnext.CNBlockConfig
        return torchvision.models.ConvNeXt(
            [setting(*stage) for stage in zip(dims, [*dims[1:], None], depths)],
            num_classes=num_classes)
    kind = "ConvNextV2" if v2 else "ConvNext"
    config = getattr(transformers, f"{kind}Config")(
        depths=list(depths), hidden_sizes=list(dims), num_stages=len(dims),
        num_labels=num_classes, patch_size=patch_size, layer_norm_eps=1e-6)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("library", ["timm", "torchvision", "huggingface"])
@pytest.mark.parametrize(("depths", "dims"), [
    ((2, 1, 1), (16, 24, 40)), ((1, 2, 1, 1), (8, 24, 96, 16)), ((2,), (16,)),
    ((1, 2), (128, 8)), ((1, 1, 1, 1, 1, 11), (8, 8, 16, 16, 24, 24))], ids=str)
def test_any_size_goes_to_the_libraries_that_have_it(depths, dims, library, v2):
    model = randomise(convnext.ConvNeXt(depths, dims, num_classes=5, grn=v2,
                                        layer_scale=0.0 if v2 else 1e-6))
    if library == "torchvision" and v2:
        with pytest.raises(ValueError, match="torchvision has no ConvNeXt V2"):
            export_state_dict(model, library)
    elif library == "timm" and len(depths) != 4:
        with pytest.raises(
            ValueError, match=f"always has 4 stages, this one has {len(dims)}"
        ):
            export_state_dict(model, library)
    else:
        x = torch.randn(1, 3, 128, 160)
        exported = export_state_dict(model, library)
        network = network_with(exported, library, sized_peer(library, depths, dims, v2))
        torch.testing.assert_close(logits_of(network, x), logits_of(model, x),
                                   atol=1e-5, rtol=1e-5)
        back = from_checkpoint(network.state_dict())
        torch.testing.assert_close(back.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_v2_with_layer_scale_goes_to_timm_alone():
    """No V2 of the other libraries has LayerScale, so its names would be ignored there."""
    model = four_blocks(num_classes=5)
    for library in ("huggingface", "meta"):
        with pytest.raises(ValueError, match="V2 has no LayerScale there; fold_layer_scale"):
            export_state_dict(model, library)
    network = timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), use_grn=True,
                                   num_classes=5, ls_init_value=1e-6)
    network_with(export_state_dict(model, "timm"), "timm", network)
    x = torch.randn(1, 3, 64, 64)
    expected = logits_of(model, x)
    torch.testing.assert_close(logits_of(network, x), expected, atol=1e-5, rtol=1e-5)
    network = sized_peer("huggingface", (1, 1, 1, 1), (8, 16, 24, 32), True)
    exported = export_state_dict(convnext.fold_layer_scale(model), "huggingface")
    network_with(exported, "huggingface", network)
    torch.testing.assert_close(logits_of(network, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["timm", "torchvision", "huggingface", "meta"])
@pytest.mark.parametrize("part", ["classifier", "downsampling"])
def test_layers_that_a_library_lacks_are_not_exported(part, layout):
    model = create_convnext("atto", num_classes=5)
    if part == "classifier":
        model.head.fc = nn.Sequential(nn.Dropout(), model.head.fc)
    else:
        model.downsample_layers[1].append(nn.BatchNorm2d(80))
    name = "head.fc.1.weight" if part == "classifier" else "downsample_layers.1.2.weight"
    with pytest.raises(ValueError, match=f"{name} has no name in the layout '{layout}'"):
        export_state_dict(model, layout)


@pytest.mark.parametrize("library", ["timm", "torchvision", "huggingface"])
def test_without_layer_scale_is_written_with_ones(library):
    """train.py's networks have none, and the libraries' V1 always has it by default."""
    model = randomise(create_convnext("atto", num_classes=5, layer_scale=0.0))
    depths, dims, *_ = VARIANTS["atto"]
    with torch.device("meta"):
        network = (timm.create_model("convnext_atto", num_classes=5) if library == "timm"
                   else sized_peer(library, depths, dims, False))
    network_with(export_state_dict(model, library), library, network)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(logits_of(network, x), logits_of(model, x),
                               atol=1e-5, rtol=1e-5)


def test_patches_of_2x2_pixels_go_to_transformers_and_to_torchvision_with_such_a_stem():
    model = randomise(
        convnext.ConvNeXt((1, 2, 1), (16, 24, 40), num_classes=5, patch_size=2)
    )
    x = torch.randn(1, 3, 32, 32)
    for library in ("huggingface", "torchvision"):
        network = sized_peer(library, (1, 2, 1), (16, 24, 40), False, patch_size=2)
        if library == "torchvision":
            network.features[0][0] = nn.Conv2d(3, 16, 2, 2)
        network_with(export_state_dict(model, library), library, network)
        torch.testing.assert_close(logits_of(network, x), logits_of(model, x),
                                   atol=1e-5, rtol=1e-5)


def test_same_gradients_as_timm_and_torchvision(speed_up):
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([3, 7])
    for variant, libraries in (("tiny", ("timm", "torchvision")), ("v2_atto", ("timm",))):
        model = speed_up(randomise(create_convnext(variant, num_classes=10)))
        F.cross_entropy(model(x), y).backward()
        for library in libraries:
            network = peer(library, variant, num_classes=10).to_empty(device="cpu").eval()
            network.load_state_dict(export_state_dict(model, library))
            F.cross_entropy(network(x), y).backward()
            expected = {name: p.grad for name, p in network.named_parameters()}
            for name, p in model.named_parameters():
                gradient = expected.pop(
                    convnext.renamed(name, "native", library)
                ).reshape(p.shape)
                torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-4)
            assert not expected


def test_pyramid_is_timms():
    peer = randomise(timm.create_model("convnext_atto"))
    model = create_convnext("atto").eval()
    load_weights(model, peer.state_dict())
    x = torch.randn(1, 3, 96, 64)
    maps = model.forward_pyramid(x)
    assert tuple(m.shape[1] for m in maps) == model.dims
    assert [tuple(m.shape) for m in maps] == [
        (1, 40, 24, 16), (1, 80, 12, 8), (1, 160, 6, 4), (1, 320, 3, 2)]
    torch.testing.assert_close(
        maps, peer.forward_intermediates(x, intermediates_only=True), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(model.forward_features(x), maps[-1])
    headless = create_convnext("atto", num_classes=0).eval()
    headless.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(headless(x), peer.forward_head(maps[-1], pre_logits=True))


def test_grn_is_timms_and_safe_in_float16():
    grn, peer = convnext.GRN(12), timm.layers.grn.GlobalResponseNorm(12)
    x = torch.randn(3, 5, 7, 12)
    assert torch.equal(grn(x), x)  # at the start
    for scale in (1, 1e-3):
        for p, q in zip(grn.parameters(), peer.parameters()):
            q.data.copy_(p.data.normal_(std=scale))
        torch.testing.assert_close(grn(x), peer(x))
    assert torch.autograd.gradcheck(grn.double(), x[:1, :2, :2].double().requires_grad_())
    large = (
        torch.rand(1, 56, 56, 12) * 1000 + 1000
    )  # a sum of squares of 7e9, a norm of 84,000
    y = grn.half()(large.half())
    assert y.isfinite().all()
    torch.testing.assert_close(y.float(), peer(large), rtol=1e-2, atol=20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grn_in_half_precision_is_rounded_once_or_twice(dtype):
    """Against double precision, with γ too small to be seen in 1 + γ·n."""
    grn, x = convnext.GRN(12), torch.randn(3, 16, 16, 12).to(dtype)
    with torch.no_grad():
        grn.gamma.uniform_(-1e-3, 1e-3)
        y = grn(x)
        expected = copy.deepcopy(grn).double()(x.double())
    assert y.dtype == dtype
    error, eps = (y - expected).abs(), torch.finfo(dtype).eps
    assert (error <= eps * (expected.abs() + eps)).all()
    assert (y != x).any() == (
        dtype == torch.float16
    )  # 1e-3 is below bfloat16's precision


def test_grn_of_a_dead_channel_has_finite_gradients():
    x = torch.randn(2, 3, 3, 4)
    x[..., 1] = 0
    x.requires_grad_()
    grn = convnext.GRN(4)
    nn.init.ones_(grn.gamma)
    grn(x).sum().backward()
    assert x.grad.isfinite().all() and grn.gamma.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_v2_in_half_precision_is_near_float64(dtype):
    model, x = (
        randomise(create_convnext("v2_atto", num_classes=10)),
        torch.randn(2, 3, 64, 64),
    )
    expected = logits_of(copy.deepcopy(model).double(), x.double())
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        logits = model(x)
    error = (logits - expected).std() / expected.std()
    assert error < 64 * torch.finfo(dtype).eps


def test_layer_norm_is_torchvisions_and_not_group_norm():
    x = torch.randn(2, 8, 5, 6)
    y = convnext.LayerNorm2d(8)(x)
    torch.testing.assert_close(y, torchvision.models.convnext.LayerNorm2d(8, eps=1e-6)(x))
    assert (y - nn.GroupNorm(1, 8, eps=1e-6)(x)).abs().max() > 0.1


def test_drop_path_is_torchvisions():
    x = torch.randn(1000, 3, 2, 2)
    layer, outputs = convnext.DropPath(0.3), []
    for network in (layer, torchvision.ops.StochasticDepth(0.3, "row")):
        torch.manual_seed(1)
        outputs.append(network(x))
    torch.testing.assert_close(*outputs)
    passed = outputs[0].flatten(1).abs().sum(1) > 0
    assert 0.65 < passed.float().mean() < 0.75
    torch.testing.assert_close(outputs[0][passed], x[passed] / 0.7)
    assert layer.eval()(x) is x


def test_drop_path_schedule_and_initialisation_are_timms():
    model = create_convnext("tiny", drop_path=0.4, head_init_scale=0.001)
    rates = [m.p for m in model.modules() if isinstance(m, convnext.DropPath)]
    peer = timm.create_model("convnext_tiny", drop_path_rate=0.4)
    assert rates == pytest.approx([
        getattr(m.drop_path, "drop_prob", 0.0) for m in peer.modules()
        if isinstance(m, timm.models.convnext.ConvNeXtBlock)])
    for name, p in model.named_parameters():
        if name == "head.fc.weight":
            assert p.std().item() == pytest.approx(2e-5, rel=0.05)
        elif p.ndim >= 2:
            assert (
                p.std().item() == pytest.approx(0.02, rel=0.1) and p.mean().abs() < 1e-3
            ), name
        else:
            value = 1e-6 if name.endswith("gamma") else float(name.endswith("weight"))
            assert torch.equal(p, torch.full_like(p, value)), name


@pytest.mark.parametrize(("size", "channels", "patch_size"), [
    ((32, 32), 3, 4), ((33, 47), 3, 4), ((16, 21), 1, 2), ((8, 8), 5, 1)])
def test_any_size_layout_and_type(size, channels, patch_size):
    model = randomise(
        create_convnext(
            "atto", num_classes=7, in_channels=channels, patch_size=patch_size
        )
    )
    x = torch.randn(1, channels, *size)
    expected = model(x)
    assert expected.shape == (1, 7)
    strided = torch.randn(1, *size, channels * 2)[..., ::2].permute(0, 3, 1, 2).copy_(x)
    for same in (x.contiguous(memory_format=torch.channels_last), strided):
        torch.testing.assert_close(model(same), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x) - expected).abs().max() < 0.1 * expected.std() + 0.1
    assert (
        model.bfloat16()(x.bfloat16()) - expected
    ).abs().max() < 0.1 * expected.std() + 0.1


@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 4, 64, 64), (3, 64, 64)], ids=str)
def test_bad_images_are_named(shape):
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\) with h and w 32 or more"):
        create_convnext("atto")(torch.zeros(shape))


@pytest.mark.parametrize(("depths", "dims", "options", "message"), [
    ((1,), (8,), {"drop_path": 1.5}, "drop_path must be at least 0 and below 1, not 1.5"),
    ((1, 1), (8, 8), {"drop_path": -0.1}, "at least 0 and below 1, not -0.1"),
    ((1,), (8,), {"patch_size": 0}, "patch_size must be 1 or more"),
    ((1, 2), (8,), {}, r"for each stage, not \(1, 2\) and \(8,\)"),
    ((), (), {}, r"for each stage, not \(\) and \(\)"),
    ((1, 0), (8, 8), {}, r"1 or more, for each stage, not \(1, 0\)")], ids=str)
def test_bad_arguments_are_named(depths, dims, options, message):
    with pytest.raises(ValueError, match=message):
        convnext.ConvNeXt(depths, dims, **options)


def test_an_unknown_variant_and_an_even_kernel_are_named():
    with pytest.raises(
        ValueError, match="'teeny'; choose one of atto, femto, pico, nano"
    ):
        create_convnext("teeny")
    with pytest.raises(ValueError, match="kernel_size must be odd, not 4"):
        convnext.DepthwiseConv(8, 4)


class PatchesByLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(48, 40)

    def forward(self, x):
        x = self.linear(rearrange(x, "b c (h p) (w q) -> b h w (c p q)", p=4, q=4))
        return rearrange(x, "b h w c -> b c h w")


@pytest.mark.parametrize("stem", [
    PatchesByLinear(), nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 40, 1)),
    nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 40, 3, 2, 1)),
    nn.Sequential(nn.Conv2d(3, 40, 7, 2, 3), nn.MaxPool2d(3, 2, 1))],
    ids=["linear", "unshuffle", "overlapping", "resnet"])
@pytest.mark.parametrize("whole", [False, True], ids=["convolution", "whole stem"])
def test_any_stem_can_take_the_place_of_patchify(stem, whole):
    model = create_convnext("atto")
    norm = model.downsample_layers[0][1]
    if whole:
        model.downsample_layers[0] = nn.Sequential(stem, norm)
    else:
        model.downsample_layers[0][0] = stem
    x = torch.randn(1, 3, 32, 32)
    first, *_, last = model.forward_pyramid(x)
    torch.testing.assert_close(first, model.stages[0](norm(stem(x))))
    assert last.shape == (1, 320, 1, 1)


@pytest.mark.parametrize("how", ["stride", "layer"])
def test_a_last_stage_at_full_resolution_takes_smaller_images(how):
    """As for segmentation: the last downsampling layer keeps the resolution."""
    model = create_convnext("atto")
    layer = model.downsample_layers[3]
    if how == "stride":
        layer[1].stride = (1, 1)
    else:
        layer[1] = nn.Conv2d(160, 320, 3, padding=1)
    size = 1 if how == "stride" else 2  # of the map: the 2x2 filter has no padding
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape[2:] == (size, size)
    if how == "layer":
        assert model.forward_features(torch.randn(1, 3, 16, 16)).shape[2:] == (1, 1)


def test_a_stem_that_is_no_sequence_runs():
    model = create_convnext("atto")
    model.downsample_layers[0] = PatchesByLinear()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


@pytest.mark.parametrize("first", [nn.Identity(), nn.Sequential()], ids=["identity", "empty"])
def test_a_stem_without_layers_runs(first):
    model = create_convnext("atto", num_classes=5)
    model.downsample_layers[0] = first
    x = torch.randn(1, 40, 8, 8)
    torch.testing.assert_close(model.forward_pyramid(x)[0], model.stages[0](x))


def test_the_example_at_the_top_names_what_exists():
    example, _, _ = convnext.__doc__.partition("\n\nIt needs")
    code = ast.parse(textwrap.dedent(example.partition("\n\n")[2]))
    used = [node for node in ast.walk(code) if isinstance(node, ast.Attribute)]
    found = [node.attr for node in used if getattr(node.value, "id", "") == "convnext"]
    assert len(found) == 8 and all(hasattr(convnext, name) for name in found)
    names = [node for node in ast.walk(code) if isinstance(node, ast.Name)]
    assigned = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    assert {node.id for node in names} - assigned == {"torch", "convnext"}


def test_no_loop_leaves_variables_in_the_module():
    left = [name for name, value in vars(convnext).items()
            if name.islower() and not name.startswith("__")
            and not callable(value) and not isinstance(value, type(os))]
    assert not left


@pytest.mark.parametrize("gamma", [None, 1e-6])
def test_fold_layer_scale_keeps_the_function(gamma):
    model = randomise(create_convnext("atto", num_classes=10))
    if gamma:
        model.stages[0][0].layer_scale = convnext.LayerScale(40, gamma)
        branch = model.stages[0][0].mlp.pwconv2.weight.detach().clone()
    x = torch.randn(2, 3, 64, 64)
    expected = logits_of(model, x)
    with pytest.raises(ValueError, match="before you convert the model to float16"):
        convnext.fold_layer_scale(copy.deepcopy(model).half())
    folded = convnext.fold_layer_scale(model)
    assert not any(name.endswith("gamma") for name, _ in model.named_parameters())
    torch.testing.assert_close(logits_of(folded, x), expected, atol=1e-6, rtol=1e-5)
    if gamma:
        torch.testing.assert_close(folded.stages[0][0].mlp.pwconv2.weight, gamma * branch)


TOP1 = (78.82, 79.36, 79.51, 78.28, 80.50, 80.64, 79.92, 80.35, 80.57, 80.57, 80.47,
        80.62, 81.27, 81.41, 81.47, 81.97)  # table 10
GFLOPS = (4.09, 4.53, 4.42, 2.35, 5.27, 4.64, 4.07, 4.10, 4.15, 4.21, 4.29, 4.15, 4.15,
          4.15, 4.15, 4.46)  # table 10, but for two misprints: 4.46 and 4.49 at the end


def test_road_costs_what_the_paper_prints():
    """Each step from torchvision's ResNet-50 to ConvNeXt-Tiny, as it is printed."""
    lines = [*convnext.road_table()][1:]
    before = 76.13
    for line, step, top1, gflops in zip(
        lines, convnext.ROADMAP, TOP1, GFLOPS, strict=True
    ):
        printed = {"LayerNorm": 4.46, "separate downsampling": 4.49}.get(
            step.name, gflops
        )
        remarks = ["not", "kept"] * (step.name in ("kernel 9x9", "kernel 11x11"))
        remarks += ["differs"] * (printed != gflops)
        assert line.split() == [
            *step.name.split(), f"{top1:.2f}", f"{top1 - before:+.2f}", f"{printed:.2f}",
            f"{gflops:.2f}", *remarks]
        before = top1 if step.kept else before


def test_the_command_prints_the_road():
    run = subprocess.run([sys.executable, HERE / "convnext.py", "--road"], check=True,
                         capture_output=True, text=True)
    assert run.stdout.splitlines() == list(convnext.road_table())


@pytest.mark.parametrize(
    ("step", "acts", "norms", "kind"),
    [
        ("ResNet-50", (nn.ReLU, 3), (nn.BatchNorm2d, 3), nn.Conv2d),
        ("depthwise conv", (nn.ReLU, 3), (nn.BatchNorm2d, 3), convnext.DepthwiseConv),
        ("kernel 7x7", (nn.ReLU, 3), (nn.BatchNorm2d, 3), convnext.DepthwiseConv),
        ("GELU", (nn.GELU, 3), (nn.BatchNorm2d, 3), convnext.DepthwiseConv),
        ("one activation", (nn.GELU, 1), (nn.BatchNorm2d, 3), convnext.DepthwiseConv),
        ("one norm", (nn.GELU, 1), (nn.BatchNorm2d, 1), convnext.DepthwiseConv),
        ("LayerNorm", (nn.GELU, 1), (convnext.LayerNorm2d, 1), convnext.DepthwiseConv),
        (
            "window attention",
            (nn.GELU, 1),
            (convnext.LayerNorm2d, 1),
            convnext.WindowAttention,
        ),
        ("Swin block", (nn.GELU, 1), (convnext.LayerNorm2d, 2), convnext.WindowAttention),
    ],
)
def test_layers_of_a_block_on_the_road(step, acts, norms, kind):
    network = convnext.roadmap_network(convnext.DESIGNS[step]._replace(width=16), 10)
    blocks = [
        m for m in network if isinstance(m, convnext.RoadmapBlock | convnext.SwinBlock)
    ]
    assert len(blocks) == (16 if step == "ResNet-50" else 18)
    layers = [*blocks[1].modules()]
    for layer_type, count in (acts, norms):
        assert sum(type(m) is layer_type for m in layers) == count
    assert any(type(m) is kind for m in layers)
    assert sum(isinstance(m, nn.ReLU | nn.GELU) for m in layers) == acts[1]
    assert sum(isinstance(m, nn.BatchNorm2d | nn.LayerNorm) for m in layers) == norms[1]


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("step", ["ResNet-50", "patchify stem", "separate downsampling"])
def test_stem_of_the_road_at_any_patch_size(step, patch_size):
    design = convnext.DESIGNS[step]._replace(width=16)
    network, maps = convnext.roadmap_network(design, 10, patch_size), []
    for block in network:
        if isinstance(block, convnext.RoadmapBlock):
            block.register_forward_hook(lambda *args: maps.append(args[2].shape[2:]))
    network(torch.randn(2, 3, 64, 96))
    assert maps[0] == (64 // patch_size, 96 // patch_size)
    assert maps[-1] == (8 // patch_size, 12 // patch_size)


def test_depthwise_convolutions_of_the_road_have_the_width_and_a_bias():
    """Also with one channel, where a filter per channel and a dense one look alike."""
    network = convnext.roadmap_network(convnext.DESIGNS["GELU"]._replace(width=1), 10)
    assert network.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    network = convnext.roadmap_network(convnext.DESIGNS["depthwise conv"]._replace(width=8), 10)
    layers = [m for m in network.modules() if isinstance(m, convnext.DepthwiseConv)]
    assert len(layers) == 18 and all(layer.bias is not None for layer in layers)
    assert [layer.stride for layer in layers].count((2, 2)) == 3


def test_roads_that_cannot_be_built_are_named():
    with pytest.raises(ValueError, match="patch_size must be 1, 2 or 4, not 3"):
        convnext.roadmap_network(convnext.DESIGNS["GELU"], patch_size=3)
    for field in ("attention", "swin_block"):
        with pytest.raises(ValueError, match="attention needs separate_downsampling"):
            convnext.roadmap_network(convnext.DESIGNS["GELU"]._replace(**{field: True}))


def test_road_leads_from_torchvisions_resnet_50_to_convnext_tiny():
    first, last = (convnext.DESIGNS[convnext.ROADMAP[i].name] for i in (0, -1))
    tiny = create_convnext("tiny").eval()
    in_order = nn.ModuleList([tiny.head])  # our modules in the order in which they run
    for layers in reversed([*zip(tiny.downsample_layers, tiny.stages)]):
        for layer in reversed(layers):
            in_order.insert(0, layer)
    for design, peer, source in ((first, torchvision.models.resnet50(), None),
                                 (last, tiny, in_order)):
        randomise(peer)
        network = convnext.roadmap_network(design).eval()
        state, expected = network.state_dict(), (source or peer).state_dict()
        assert len(state) == len(expected)
        network.load_state_dict({name: tensor.reshape(state[name].shape)
                                 for name, tensor in zip(state, expected.values())})
        x = torch.randn(2, 3, 64, 96)
        logits = logits_of(peer, x)
        torch.testing.assert_close(logits_of(network, x), logits,
                                   atol=1e-5 * logits.std().item(), rtol=1e-4)


@pytest.mark.parametrize("shift", [False, True])
def test_swin_block_is_torchvisions(shift):
    from torchvision.models.swin_transformer import SwinTransformerBlock

    block = randomise(convnext.SwinBlock(32, shift))
    peer = SwinTransformerBlock(32, 2, [7, 7], [3 * shift] * 2,
                                norm_layer=convnext.LayerNorm).eval()
    ours = {
        name.replace("attention.", "attn.")
        .replace("pwconv1", "0")
        .replace("pwconv2", "3"): p
        for name, p in block.state_dict().items()
    }
    # torchvision's table has a row per relative position; its offsets count the other way
    ours["attn.relative_position_bias_table"] = ours.pop("attn.bias").T
    ours["attn.relative_position_index"] = block.attention.index.flatten()
    peer.load_state_dict(ours)
    x = torch.randn(2, 14, 21, 32)
    y = block(rearrange(x, "b h w c -> b c h w"))
    torch.testing.assert_close(rearrange(y, "b c h w -> b h w c"), peer(x))


@pytest.mark.parametrize("name", ["window attention", "Swin block"])
def test_every_other_attention_is_shifted(name):
    """Swin-T's order and biases of 0, in a network that is otherwise the last step."""
    network = convnext.roadmap_network(convnext.DESIGNS[name]._replace(width=16), 10)
    layers = [m for m in network.modules() if isinstance(m, convnext.WindowAttention)]
    assert [layer.before for layer in layers] == [0, 4, 0] * 2 + [0, 4] * 4 + [0] + [
        0,
        4,
        0,
    ]
    assert not any(layer.qkv.bias.any() or layer.proj.bias.any() for layer in layers)
    last = convnext.roadmap_network(
        convnext.DESIGNS["separate downsampling"]._replace(width=16), 10)
    blocks = (convnext.RoadmapBlock, convnext.SwinBlock)
    assert [type(m) for m in network if not isinstance(m, blocks)] == [
        type(m) for m in last if not isinstance(m, blocks)]


@pytest.mark.parametrize("shift", [False, True])
def test_window_attention_is_torchvisions(shift):
    from torchvision.models.swin_transformer import shifted_window_attention

    layer = convnext.WindowAttention(32, shift)
    with torch.no_grad():
        bias = rearrange(layer.bias.normal_()[:, layer.index], "heads q k -> 1 heads q k")
        for size in ((7, 14), (14, 21)):  # an axis with one window is not shifted
            x = torch.randn(2, 32, *size)
            peer = shifted_window_attention(
                rearrange(x, "b c h w -> b h w c"),
                layer.qkv.weight,
                layer.proj.weight,
                bias,
                [7, 7],
                num_heads=2,
                shift_size=[3 * shift] * 2,
                qkv_bias=layer.qkv.bias,
                proj_bias=layer.proj.bias,
            )
            torch.testing.assert_close(layer(x), rearrange(peer, "b h w c -> b c h w"))
        # torchvision's attends to what fills up a window beyond the map, ours must not:
        # compute one such window, with 4 rows and 2 columns, by itself.
        x = x[:, :, : 11 + 3 * shift, : 9 + 3 * shift]
        rows, columns = x.shape[2] - 4, x.shape[3] - 2
        q, k, v = rearrange(
            layer.qkv(rearrange(x[:, :, rows:, columns:], "b c h w -> b (h w) c")),
            "b t (three m d) -> three b m t d",
            three=3,
            m=2,
        )
        bias = rearrange(bias, "1 m (p q) (r s) -> m p q r s", p=7, r=7)[
            :, :4, :2, :4, :2
        ]
        weights = (q @ k.mT / 4 + rearrange(bias, "m p q r s -> m (p q) (r s)")).softmax(
            -1
        )
        y = layer.proj(rearrange(weights @ v, "b m t d -> b t (m d)"))
        torch.testing.assert_close(rearrange(y, "b (h w) c -> b c h w", h=4),
                                   layer(x)[:, :, rows:, columns:])


# --- Faster, and in every tool ----------------------------------------------------------


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"dilation": (2, 2), "padding": (6, 6)},
        {"dilation": (1, 2)},
        {"stride": (2, 1)},
        {"padding": (1, 2)},
        {"padding": (0, 0), "stride": (2, 2)},
        {"padding_mode": "circular"},
        {"padding_mode": "reflect"},
    ],
    ids=str,
)
def test_layers_do_what_they_are_told(speed_up, told):
    """Settings changed by hand before speed_up, against nn.Conv2d."""
    for layer, settings in ((convnext.DepthwiseConv(6), {"groups": 6, "padding": 3}),
                            (convnext.DepthwiseConv(6, 5), {"groups": 6, "padding": 2})):
        plain = nn.Conv2d(6, 6, layer.kernel_size, **settings | told).double()
        plain.load_state_dict(layer.double().state_dict())
        for name, value in told.items():
            setattr(layer, name, value)
        is_fast = speed_up is convnext.speed_up and not told
        changed = speed_up(layer)
        for size in ((2, 6, 13, 17), (1, 6, 9, 12)):
            x = torch.randn(size, dtype=torch.double, requires_grad=True)
            y = changed(x)
            direction = torch.randn_like(y)
            assert ("DepthwiseGradient" in y.grad_fn.name()) == is_fast
            torch.testing.assert_close(y, plain(x))
            torch.testing.assert_close(*(
                torch.autograd.grad(network(x), (x, *network.parameters()), direction)
                for network in (changed, plain)))
            with torch.no_grad():
                torch.testing.assert_close(changed(x), y)


def test_speed_up_draws_no_random_numbers_and_leaves_layers_with_a_stride():
    network = convnext.roadmap_network(convnext.DESIGNS["GELU"]._replace(width=8), 10)
    before = torch.get_rng_state()
    convnext.speed_up(network)
    assert torch.equal(torch.get_rng_state(), before)
    layers = [m for m in network.modules() if isinstance(m, convnext.DepthwiseConv)]
    kinds = [type(layer) for layer in layers if layer.stride == (2, 2)]
    assert kinds == [convnext.DepthwiseConv] * 3
    assert sum(type(layer) is convnext.FastDepthwiseConv for layer in layers) == 15


def test_training_is_evaluation_whatever_is_edited(speed_up, monkeypatch):
    model, x = four_blocks(), torch.randn(2, 3, 64, 64)
    usual = logits_of(model, x)

    def gated(mlp, x):
        h = mlp.pwconv1(x)
        return mlp.pwconv2(mlp.act(h) * h)

    def doubled(layer, x):
        return nn.Conv2d.forward(layer, 2 * x)

    def padded(layer, x, weight, bias):
        return F.conv2d(2 * x, weight, bias, padding=3, groups=len(weight))

    for edited, method, forward in ((convnext.InvertedBottleneck, "forward", gated),
                                    (convnext.DepthwiseConv, "forward", doubled),
                                    (convnext.DepthwiseConv, "_conv_forward", padded)):
        with monkeypatch.context() as patch:
            patch.setattr(edited, method, forward)
            changed = speed_up(copy.deepcopy(model))
            logits = changed.train()(x)
            assert (
                logits.requires_grad and (logits - usual).abs().max() > 0.1 * usual.std()
            )
            torch.testing.assert_close(logits_of(changed, x), logits.detach())


@pytest.mark.parametrize("size", [(1, 2, 1, 1, 7), (2, 3, 5, 4, 7), (3, 2, 2, 9, 3)])
def test_depthwise_gradient_is_the_derivative(size):
    b, c, h, w, k = size
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True)
              for shape in ((b, c, h, w), (c, 1, k, k), (c,))]
    function = convnext.DepthwiseGradient.apply
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "size", [(3, 5, 8, 8), (64, 96, 16, 16), (2, 40, 2, 30), (9, 16, 1, 1)]
)
def test_depthwise_gradient_is_pytorchs(size, dtype, monkeypatch):
    """As near to the derivative in double precision as PyTorch's, in three layouts."""
    monkeypatch.setattr(convnext, "FAST_DTYPES", (dtype,))  # on every CPU
    plain, fast = convnext.DepthwiseConv, convnext.FastDepthwiseConv
    conv, direction = plain(size[1]), torch.randn(size, dtype=dtype)
    wide = torch.randn(*size[:3], 2 * size[3], dtype=dtype)

    def derivatives(kind, x, dtype=dtype):
        conv.__class__ = kind
        x = x.to(dtype, copy=True).requires_grad_()
        y = conv.to(dtype)(x)
        assert ("DepthwiseGradient" in y.grad_fn.name()) == (kind is fast)
        return [g.double() for g in torch.autograd.grad(
            y, (x, conv.weight, conv.bias), direction.to(dtype))]

    for x in (wide[..., ::2], wide[..., ::2].contiguous(),
              wide[..., ::2].contiguous(memory_format=torch.channels_last)):
        exact = derivatives(plain, x, torch.double)
        for ours, pytorchs, truth in zip(
            derivatives(fast, x), derivatives(plain, x), exact
        ):
            allowed = (pytorchs - truth).norm() + torch.finfo(dtype).eps * truth.norm()
            assert (ours - truth).norm() <= 1.5 * allowed


def test_gradients_with_compile_and_autocast(speed_up):
    model, x = four_blocks(), torch.randn(3, 3, 64, 64)
    expected = gradients(model, x)
    model = speed_up(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for network, dtype, tolerance in (
            (model, torch.float32, 1e-5), (compiled, torch.float32, 1e-4),
            (model, torch.bfloat16, 0.1), (compiled, torch.bfloat16, 0.1)):
        with torch.autocast("cpu", dtype, dtype != torch.float32):
            found = gradients(network, x)
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error < tolerance, (name, error)


def test_torch_func(speed_up):
    model, x = four_blocks().double(), torch.randn(3, 3, 64, 64, dtype=torch.double)
    expected, plain = gradients(model, x), copy.deepcopy(model)
    parameters = dict(speed_up(model).named_parameters())

    def loss(parameters, image):
        return (
            torch.func.functional_call(model, parameters, (image[None],)).square().sum()
        )

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    torch.testing.assert_close({name: g.sum(0) for name, g in each.items()}, expected)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    model = plain  # forward-mode derivatives need it as it was
    slopes = [
        torch.func.jvp(lambda p, image=image: loss(p, image), (parameters,), (tangents,))[
            1
        ]
        for image in x
    ]
    torch.testing.assert_close(
        sum(slopes),
        sum((expected[name] * tangent).sum() for name, tangent in tangents.items()),
    )


def any_size():
    dim = torch.export.Dim
    return ({0: dim("batch"), 2: dim("height", min=64), 3: dim("width", min=64)},)


@pytest.mark.filterwarnings("ignore")  # about tracing, which PyTorch gives up
def test_copies_and_exports_with_any_size(speed_up):
    """With gradients on, as in somebody's script."""
    model, images = four_blocks(), (torch.randn(2, 3, 64, 96), torch.randn(3, 3, 101, 70))
    expected, parameters, calls = (
        [model(x) for x in images],
        dict(model.named_parameters()),
        [],
    )
    hook = model.stages[1][0].dwconv.register_forward_hook(lambda *_: calls.append(1))
    assert speed_up(model) is model
    model(images[0])
    hook.remove()
    assert calls and all(
        p is parameters.pop(name) for name, p in model.named_parameters()
    )
    again = four_blocks()
    again.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))
    exported = torch.export.export(
        model, (images[0],), dynamic_shapes=any_size()
    ).module()
    for network in (
        model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        speed_up(again),
        exported,
        torch.jit.trace(model, images[0]),
    ):
        for x, logits in zip(images, expected):
            torch.testing.assert_close(network(x), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_onnx_export_with_any_size(speed_up):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx.reference")
    model, x = speed_up(four_blocks()), torch.randn(3, 3, 101, 70)
    program = torch.onnx.export(
        model,
        (torch.randn(2, 3, 64, 96),),
        dynamic_shapes=any_size(),
        dynamo=True,
        verbose=False,
    )
    logits, = onnx.ReferenceEvaluator(program.model_proto).run(None, {"x": x.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(logits), logits_of(model, x), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("wrap", [
    nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile,
    lambda model: nn.DataParallel(torch.compile(model))])
def test_wrapped_models_are_unwrapped_everywhere(wrap):
    wrapped, other = (
        wrap(randomise(create_convnext("atto"))),
        wrap(create_convnext("atto")),
    )
    model = next(m for m in wrapped.modules() if isinstance(m, convnext.ConvNeXt))
    for layout in convnext.LAYOUTS:
        torch.testing.assert_close(
            export_state_dict(wrapped, layout),
            export_state_dict(model, layout),
            rtol=0,
            atol=0,
        )
    report = load_weights(other, wrapped.state_dict())
    assert not report.kept and not report.left_out
    torch.testing.assert_close(
        export_state_dict(other, "native"), dict(model.state_dict())
    )
    assert convnext.speed_up(wrapped) is wrapped
    assert sum(isinstance(m, convnext.FastDepthwiseConv) for m in model.modules()) == 12
    for stranger in (peer("timm", "atto"), wrap(nn.Linear(1, 1)), "atto"):
        for function in (export_state_dict, load_weights):
            with pytest.raises(TypeError, match="expected a ConvNeXt, not a"):
                function(stranger, "timm")


# --- Weights ----------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("name", ["timm.pth", "timm.safetensors", "~/timm.pth"])
def test_a_file_gives_the_same_logits(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    model = randomise(create_convnext("atto", num_classes=5))
    exported = export_state_dict(model, "timm")
    torch.save(exported, "timm.pth")
    save_file({name: t.contiguous() for name, t in exported.items()}, "timm.safetensors")
    x = torch.randn(1, 3, 32, 32)
    again = from_checkpoint(name)
    assert not again.training
    assert torch.equal(again(x), model(x))


WITHOUT = object()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stages.2.blocks.3.gamma": WITHOUT},
            r"2.3.layer_scale.gamma is missing in the weights, \(160,\) in the model$",
        ),
        ({"extra": torch.zeros(1)}, r"extra is \(1,\) in .*, missing in the model"),
        ({"head.norm.bias": torch.zeros(7)}, r"head.norm.bias is \(7,\) .*320"),
        (
            {"head.norm.bias": torch.zeros(320, device="meta")},
            "head.norm.bias is on the meta device",
        ),
        (
            {"head.norm.bias": torch.full((320,), torch.nan)},
            "head.norm.bias contains .* not finite",
        ),
        (
            {"stem.0.bias": torch.full((40,), torch.inf)},
            "stem.0.bias contains .* not finite",
        ),
        (
            {"stem.0.bias": torch.zeros(40, dtype=torch.int8)},
            "stem.0.bias has the type torch.int8",
        ),
        (
            {"stem.0.bias": torch.zeros(40, dtype=torch.float8_e4m3fn)},
            "stem.0.bias has the type torch.float8_e4m3fn, not float16",
        ),
        (
            {"stages.0.blocks.0.gamma": torch.ones(2, 20)},
            r"0.0.layer_scale.gamma is \(2, 20\) in the weights, \(40,\) in the model",
        ),
        (
            {"_orig_mod.stem.0.bias": torch.ones(40)},
            "layers.0.0.bias is there twice, under different names",
        ),
        ("femto", r"layers.0.1.weight is \(48,\) .* more$"),
        ("v2_atto", "gamma .*missing .*; and 33 more$"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(changes, message):
    model = randomise(create_convnext("atto", num_classes=5))
    before = copy.deepcopy(model.state_dict())
    if isinstance(changes, str):
        weights = export_state_dict(create_convnext(changes, num_classes=5), "timm")
    else:
        weights = (
            export_state_dict(create_convnext("atto", num_classes=5), "timm") | changes
        )
        weights = {
            name: tensor for name, tensor in weights.items() if tensor is not WITHOUT
        }
    with pytest.raises(ValueError, match=message):
        load_weights(model, weights)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("error")
def test_warnings_as_errors_change_nothing():
    model = randomise(create_convnext("atto", num_classes=5))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserWarning, match="kept its own head.fc.weight"):
        load_weights(model, create_convnext("atto", num_classes=7).state_dict())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "tensor"), [
    ("head.fc.weight", torch.zeros(320)), ("head.fc.weight", torch.zeros(5, 319)),
    ("head.fc.weight", torch.tensor(1.0)), ("stem.0.weight", torch.zeros(40, 3, 4, 2)),
    ("stem.0.weight", torch.zeros(40)),
    ("stages.0.blocks.0.conv_dw.weight", torch.tensor(1.0)),
    ("stages.0.blocks.0.gamma", torch.tensor(1.0))], ids=str)
def test_odd_shapes_are_refused(name, tensor):
    exported = export_state_dict(create_convnext("atto", num_classes=5), "timm")
    with pytest.raises(ValueError, match="do not fit the model|four axes"):
        from_checkpoint(exported | {name: tensor})


def test_a_model_on_the_meta_device_cannot_hold_weights():
    with pytest.raises(ValueError, match="layers.0.0.weight is on the meta device in the model"):
        load_weights(meta("atto"), create_convnext("atto").state_dict())


def test_a_model_is_no_source_and_keras_no_layout():
    model = four_blocks()
    with pytest.raises(TypeError, match="a state dict or a file, not a ConvNeXt"):
        load_weights(model, model)
    with pytest.raises(
        ValueError, match="unknown layout 'keras'; choose one of native, meta"
    ):
        export_state_dict(model, "keras")


def whole(path):
    """A good file, as bytes."""
    if path.endswith("safetensors"):
        save_file(four_blocks().state_dict(), path)
    else:
        torch.save(four_blocks().state_dict(), path)
    return Path(path).read_bytes()


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 114374272\n"


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("path", "content", "reason"),
    [
        (
            "number.pth",
            lambda: {"accuracy": np.float64(1)},
            "GLOBAL numpy.*multiarray.scalar",
        ),
        ("path.pth", lambda: {"data": Path("x")}, "GLOBAL pathlib.*Path"),
        ("model.pth", four_blocks, "GLOBAL convnext.ConvNeXt"),
        ("list.pth", lambda: [1], "it holds a list"),
        (
            "script.pth",
            lambda: torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1)),
            "TorchScript",
        ),
        ("evil.pth", lambda: {"stem.0.weight": Malicious()}, "GLOBAL .*system"),
        ("pointer.pth", POINTER, "begins with b'version https://git-lfs"),
        ("pointer.safetensors", POINTER, "header too large"),
        ("page.bin", b"<!DOCTYPE html>\n", "begins with b'<!DOCTYPE html>"),
        ("empty.pth", b"", "begins with b''"),
        ("cut.pth", lambda: whole("cut.pth")[:-5000], "zip archive"),
        ("flipped.pth", lambda: flipped(whole("flipped.pth")), "damaged in flipped/data"),
        ("cut.safetensors", lambda: whole("cut.safetensors")[:-8], "not fully covered"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[-13:] else "",
)
def test_an_unreadable_file_gives_one_line_and_runs_nothing(
        path, content, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = content() if callable(content) else content
    if isinstance(content, bytes):
        Path(path).write_bytes(content)
    elif "script" in path:
        content.save(path)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"cannot read {path}: .*{reason}") as raised:
        from_checkpoint(path)
    assert "\n" not in str(raised.value) and "weights_only` set to" not in str(
        raised.value
    )
    assert not Path("executed").exists()


def test_a_missing_file_a_locked_file_and_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        from_checkpoint(tmp_path / "none.pth")
    with pytest.raises(
        ValueError, match="holds neither model.safetensors nor pytorch_model.bin"
    ):
        from_checkpoint(tmp_path)
    locked = tmp_path / "locked.pth"
    locked.write_bytes(b"")
    locked.chmod(0)
    if not os.access(locked, os.R_OK):  # the superuser reads everything
        with pytest.raises(ValueError, match="cannot read .*Permission denied"):
            from_checkpoint(locked)


@pytest.mark.parametrize("kind", ["without checksums", "with an entry for the folder"])
def test_unusual_archives_are_read(kind, tmp_path):
    path, model = tmp_path / "file.pth", four_blocks()
    torch.serialization.set_crc32_options(kind != "without checksums")
    torch.save(model.state_dict(), path)
    torch.serialization.set_crc32_options(True)
    if "folder" in kind:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("file/other/", b"")
    torch.testing.assert_close(
        dict(convnext.read_file(path)[0]), dict(model.state_dict())
    )


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


WRAPPED = {
    "Meta's program": lambda s: {
        "model": s["meta"],
        "optimizer": {"state": {}},
        "args": argparse.Namespace(lr=1),
    },
    "model_ema": lambda s: {"model": s["other"], "model_ema": s["timm"]},
    "timm's program": lambda s: {"state_dict": s["other"], "state_dict_ema": s["timm"]},
    "AveragedModel": lambda s: {
        "model_ema": prefixed("module.", s["timm"]) | {"n_averaged": torch.tensor(7)}
    },
    "compiled": lambda s: prefixed("_orig_mod.", s["native"]),
    "parallel, compiled": lambda s: prefixed("module._orig_mod.", s["huggingface"]),
    "compiled blocks": lambda s: {
        name.replace(".mlp.", ".mlp._orig_mod."): t for name, t in s["native"].items()
    },
    "FSDP": lambda s: {
        name.replace("stages.", "_fsdp_wrapped_module.stages._fsdp_wrapped_module."): t
        for name, t in s["timm"].items()
    },
    "checkpointed": lambda s: {
        name.replace(".dwconv", "._checkpoint_wrapped_module.dwconv"): t
        for name, t in s["meta"].items()
    },
    "epoch": lambda s: {"model_state_dict": s["meta"], "epoch": 3},
    "net": lambda s: {"net": s["native"]},
    "encoder": lambda s: prefixed("encoder.", s["meta"]),
    "open_clip": lambda s: (
        prefixed("visual.trunk.", s["timm"])
        | {"text.weight": torch.ones(2), "logit_scale": 1.0}
    ),
    "Lightning": lambda s: {
        "state_dict": prefixed("model.", s["timm"]) | {"criterion.weight": torch.ones(5)},
        "hyper_parameters": {"lr": 1},
    },
    "convnext": lambda s: (
        prefixed("convnext.", s["timm"]) | {"criterion.weight": torch.ones(5)}
    ),
    "transformers": lambda s: prefixed("model.", s["huggingface"]),
    "net_ema": lambda s: prefixed("net.", s["other"]) | prefixed("net_ema.", s["native"]),
    "timm's linear layers": lambda s: {
        name: t.flatten(1) if t.ndim == 4 and t.shape[2:] == (1, 1) else t
        for name, t in s["timm"].items()
    },
    "sparse GRN": lambda s: {
        name: t.reshape(1, -1) if "grn" in name else t for name, t in s["meta"].items()
    },
    "train.py": lambda s: {
        "made_by": "train.py, format 2",
        "model": s["other"],
        "ema": prefixed("module.", s["native"]),
        "args": {},
        "classes": [],
    },
    "MMEngine": lambda s: {
        "meta": {"mmengine_version": "0.10"},
        "state_dict": s["timm"],
        "ema_state_dict": prefixed("module.", s["other"]),
    },
    "mmpretrain": lambda s: {
        "meta": {},
        "state_dict": prefixed(
            "backbone.",
            {
                name.replace("dwconv", "depthwise_conv").replace(
                    "pwconv", "pointwise_conv"
                ): t
                for name, t in s["meta"].items()
                if not name.startswith(("norm", "head"))
            },
        )
        | {
            "backbone.norm3.weight": s["meta"]["norm.weight"],
            "backbone.norm3.bias": s["meta"]["norm.bias"],
            "head.fc.weight": s["meta"]["head.weight"],
            "head.fc.bias": s["meta"]["head.bias"],
        },
    },
}


def test_another_programs_head_with_pointwise_conv_changes_no_names():
    model = randomise(create_convnext("atto", num_classes=5))
    state = prefixed("backbone.", export_state_dict(model, "timm"))
    weights = convnext.read_weights(
        state | {"decode.pointwise_conv1.weight": torch.ones(1)}
    )
    torch.testing.assert_close(weights.tensors, dict(model.state_dict()), atol=0, rtol=0)


@pytest.mark.filterwarnings("error")  # nothing was left out
@pytest.mark.parametrize("program", WRAPPED)
def test_wrapped_and_prefixed_weights(program, tmp_path):
    """As the libraries' training programs write them."""
    model, x = (
        randomise(create_convnext("v2_atto", num_classes=5)),
        torch.randn(1, 3, 32, 32),
    )
    states = {layout: export_state_dict(model, layout)
              for layout in convnext.LAYOUTS if layout != "torchvision"}
    states["other"] = {name: torch.zeros_like(t) for name, t in states["timm"].items()}
    torch.save(WRAPPED[program](states), tmp_path / "file.pth")
    assert torch.equal(from_checkpoint(tmp_path / "file.pth")(x), model(x))


def test_several_networks_are_refused():
    state = create_convnext("atto").state_dict()
    with pytest.raises(
        ValueError, match="several networks, student., teacher.module.: pass"
    ):
        from_checkpoint({"student": state, "teacher": prefixed("module.", state)})
    with pytest.raises(
        ValueError, match="average may be state_dict .* or ema_state_dict"
    ):
        from_checkpoint({"state_dict": state, "ema_state_dict": state, "meta": 5})


def small_config(kind, **options):
    return getattr(transformers, f"{kind}Config")(
        depths=[1, 2, 1], hidden_sizes=[8, 16, 24], num_stages=3, **options)


def test_dinov3_is_read():
    peer = randomise(transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(
        depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32])))
    x = torch.randn(1, 3, 64, 64)
    for state in (peer.state_dict(), prefixed("student.", peer.state_dict())):
        torch.testing.assert_close(from_checkpoint(state)(x), peer(x).pooler_output)


@pytest.mark.parametrize("kind", ["transformers", "UperNet", "authors", "features_only"])
def test_backbones_are_read(kind):
    """Without a last norm, and with norms of their maps, for which there is no place."""
    model, x = create_convnext("atto", num_classes=0), torch.randn(1, 3, 64, 64)
    if kind == "features_only":
        peer = randomise(timm.create_model("convnext_atto", features_only=True))
        state, expected = peer.state_dict(), peer(x)[-1]
    elif kind == "authors":
        state = export_state_dict(randomise(model), "meta") | {
            "norm3.weight": torch.ones(320)
        }
        state = {name: t for name, t in state.items() if not name.startswith("norm.")}
        expected = model.forward_features(x)
    else:
        config = small_config("ConvNext", out_features=["stage1", "stage3"])
        peer = randomise(transformers.ConvNextBackbone(config))
        state, expected = peer.state_dict(), peer(
                x, output_hidden_states=True).hidden_states[-1]
        if kind == "UperNet":
            state = prefixed("backbone.", state) | {
                "decode_head.conv.weight": torch.ones(1)
            }
    with pytest.warns(UserWarning) as told:
        model = from_checkpoint(state)
    assert "kept its own head.norm.weight" in str(told[0].message)
    assert len(told) == (1 if kind == "features_only" else 2)
    torch.testing.assert_close(model.forward_features(x), expected, atol=1e-5, rtol=1e-5)


def test_a_backbone_another_head_another_stem():
    model = randomise(create_convnext("v2_atto", num_classes=5))
    full = export_state_dict(model, "meta")
    fcmae = {
        name: t for name, t in full.items() if not name.startswith(("norm.", "head."))
    }
    headless = create_convnext("v2_atto", num_classes=0)
    with pytest.warns(UserWarning, match="no place for head.fc.weight, head.fc.bias"):
        load_weights(headless, model.state_dict())
    base = export_state_dict(headless, "huggingface")
    with torch.device("meta"):
        transformers.ConvNextV2Model(transformers.ConvNextV2Config(
            depths=[2, 2, 6, 2], hidden_sizes=[40, 80, 160, 320])).load_state_dict(
                base, assign=True)
    stem, norm, head = ([f"{module}.weight", f"{module}.bias"] for module in (
        "downsample_layers.0.0", "head.norm", "head.fc"))
    for weights, classes, patch_size, kept, left_out in (
        (fcmae, 5, 4, norm + head, []),
        (base, 5, 4, head, []),
        (full, 7, 4, head, []),
        (full, 5, 2, stem, []),
        (full, 0, 4, [], head),
    ):
        fresh = create_convnext("v2_atto", num_classes=classes, patch_size=patch_size,
                                head_init_scale=0.001)
        before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
        with pytest.warns(UserWarning, match="the model (kept its own|has no place)"):
            report = load_weights(fresh, weights)
        assert [
            line.split()[0] for line in report.kept
        ] == kept and report.left_out == left_out
        assert sorted(report.loaded + kept) == sorted(before)
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(
                tensor, (before if name in kept else model.state_dict())[name]
            ), name
    with pytest.raises(ValueError, match="do not fit the model: head.fc.weight"):
        load_weights(create_convnext("v2_atto", num_classes=7), full, strict=True)
    features = model.forward_features(x := torch.randn(1, 3, 32, 32)).mean((2, 3))
    with pytest.warns(UserWarning, match="kept its own head.norm.weight"):
        headless = from_checkpoint(fcmae)
    torch.testing.assert_close(headless(x), F.layer_norm(features, [320], eps=1e-6))
    torch.testing.assert_close(from_checkpoint(base)(x), model.head.norm(features))


@pytest.mark.parametrize("layout", convnext.LAYOUTS)
@pytest.mark.parametrize(("depths", "dims", "options"), [
    ((2, 4, 2), (96, 192, 384), {"num_classes": 10, "patch_size": 2}),
    ((1, 1), (8, 16), {"grn": True, "layer_scale": 0.0, "num_classes": 21_841}),
    ((1, 1, 1, 1, 1, 45), (8, 8, 16, 16, 24, 24), {"num_classes": 0, "in_channels": 1}),
    ((3,), (24,), {"num_classes": 1, "patch_size": 1, "in_channels": 5})], ids=str)
def test_from_checkpoint_infers_the_network(depths, dims, options, layout):
    with torch.device("meta"):
        model = convnext.ConvNeXt(depths, dims, **options)
    if layout == "timm" or (layout == "torchvision" and "grn" in options):
        pytest.skip("it has no such network")
    weights = convnext.read_weights(export_state_dict(model, layout))
    assert convnext.infer_architecture(weights) == {
        "depths": depths, "dims": dims, "grn": False, "in_channels": 3, "patch_size": 4,
        "num_classes": 1000, "layer_scale": 1e-6} | options
    assert convnext.variant_of(depths, dims, "grn" in options) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnext_atto_ols", r"layers.0.0.weight is \(24, 3, 3, 3\)"),
        ("convnext_nano_ols", r"layers.0.1.weight is \(80, 80, 3, 3\)"),
        ("convnext_tiny_hnf", "norm_pre.weight"),
        ("convnext_large_mlp", "head.pre_logits.fc.weight"),
        ("convnext_zepto_rms", "layers.0.1.bias is missing in the weights"),
        ("resnet18", r"no weights of a ConvNeXt \(conv1.weight, "),
    ],
)
def test_other_networks_are_refused(name, message):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    with pytest.raises(ValueError, match=message):
        from_checkpoint(state)


def no_connection(*args, **kwargs):
    raise LocalEntryNotFoundError("Please check your connection")


def saved_atto(path, layout="timm"):
    """Write the weights of an atto, as a library does; return the model."""
    model = randomise(create_convnext("atto", num_classes=3))
    exported = export_state_dict(model, layout)
    if str(path).endswith(".safetensors"):
        save_file({name: t.contiguous() for name, t in exported.items()}, path)
    else:
        torch.save(exported, path)
    return model


X = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize(("name", "settings"), [
    ("convnext_atto.d2_in1k", IMAGENET | {"img_size": 224, "crop_pct": 0.875}),
    ("convnextv2_nano.fcmae_ft_in22k_in1k_384",
     IMAGENET | {"img_size": 384, "crop_pct": None})])  # squash
def test_timm_is_asked_for_weights_and_settings(name, settings, tmp_path, monkeypatch):
    variant = "v2_nano" if "nano" in name else "atto"
    state = export_state_dict(create_convnext(variant), "timm")
    save_file(
        {name: t.contiguous() for name, t in state.items()}, tmp_path / "file.safetensors"
    )
    asked = []
    monkeypatch.setattr(
        "timm.models._hub.hf_hub_download",
        lambda repo_id, filename, **_: [
            asked.append(repo_id),
            str(tmp_path / "file.safetensors"),
        ][1],
    )
    weights = convnext.read_weights(f"timm:{name}")
    assert asked == [f"timm/{name}"] and weights.settings == settings
    assert infer_variant(weights) == variant


def infer_variant(weights):
    network = convnext.infer_architecture(weights)
    return convnext.variant_of(network["depths"], network["dims"], network["grn"])


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("convnext_teeny", RuntimeError, "Unknown model"),
        ("convnextv2_small", RuntimeError, "No pretrained weights"),
        ("convnext_tiny.no", RuntimeError, "Invalid pretrained tag"),
        (
            "convnext_atto",
            ConnectionError,
            "cannot fetch timm:convnext_atto: Please check your conn",
        ),
    ],
)
def test_timms_own_reason_is_given(name, error, message, monkeypatch):
    monkeypatch.setattr("timm.models._hub.hf_hub_download", no_connection)
    with pytest.raises(error, match=message):
        from_checkpoint(f"timm:{name}")


def test_timms_network_with_another_epsilon_is_refused(monkeypatch):
    monkeypatch.setattr(
        "timm.create_model", lambda name, pretrained, make=timm.create_model: make(name)
    )
    with pytest.raises(
        ValueError, match="test_convnext is another network: .* ε = 1e-05"
    ):
        from_checkpoint("timm:test_convnext")
    monkeypatch.setattr(
        "timm.create_model", lambda name, pretrained, make=timm.models.create_model: make(
            name, act_layer="gelu_tanh"))
    with pytest.raises(ValueError, match="atto is another network: .* is gelutanh"):
        from_checkpoint("timm:convnext_atto")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_repository_is_fetched_as_a_folder(name, tmp_path, monkeypatch):
    model, asked = saved_atto(tmp_path / name), []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, allow_patterns[0]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "config.json").write_text('{"id2label": {"0": "a", "1": "b", "2": "c"}}')
    weights = convnext.read_weights("hf:who/what")
    assert weights.settings == {"classes": ["a", "b", "c"]}
    assert torch.equal(from_checkpoint(weights)(X), model(X))
    assert (
        asked
        == [("who/what", "model.safetensors"), ("who/what", "pytorch_model.bin")][
            : 1 + name.endswith("bin")
        ]
    )


def test_hugging_faces_own_reason_is_given(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_connection)
    with pytest.raises(ConnectionError, match="cannot fetch hf:who/what: Please check"):
        from_checkpoint("hf:who/what")


def test_an_address_is_fetched_once_and_kept_if_it_is_good(tmp_path, monkeypatch):
    model, asked = saved_atto(tmp_path / "file.bin"), []
    (tmp_path / "page.html").write_text("<!DOCTYPE html>")

    def urlopen(request):
        asked.append(request.full_url)
        name = "page.html" if "blob" in request.full_url else "file.bin"
        return urllib.request.urlopen((tmp_path / name).as_uri())

    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    addresses = ["https://host/a/file.bin?x=1", "https://host/b/file.bin?x=1"]
    for address in addresses * 2:
        assert torch.equal(from_checkpoint(address)(X), model(X))
    assert asked == addresses
    for _ in range(2):
        with pytest.raises(ValueError, match="it begins with b'<!DOCTYPE html>'"):
            from_checkpoint("https://host/blob/file.bin")
    assert len(asked) == 4
    with pytest.raises(ValueError, match="http://host/file.bin: .* begins with https:"):
        from_checkpoint("http://host/file.bin")


def test_a_folder_of_transformers_says_what_its_images_and_classes_are(tmp_path):
    names = ["cat", "dog", "eel"]
    config = small_config("ConvNext", id2label=dict(enumerate(names)), image_size=64)
    peer = randomise(transformers.ConvNextForImageClassification(config))
    peer.save_pretrained(tmp_path)
    assert convnext.read_weights(tmp_path).settings == {"classes": names, "img_size": 64}
    processor = transformers.ConvNextImageProcessor(
        size={"shortest_edge": 96}, crop_pct=0.9, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        weights = convnext.read_weights(source)
        assert weights.settings == {
            "classes": names, "img_size": 96, "crop_pct": 0.9, "mean": [0.1, 0.2, 0.3],
            "std": list(processor.image_std)}
        torch.testing.assert_close(from_checkpoint(weights)(X), peer(X).logits)
    content, metadata, settings = convnext.read_source(str(tmp_path))
    assert metadata == {"format": "pt"} and settings == weights.settings
    assert content.keys() == peer.state_dict().keys()


@pytest.mark.parametrize(
    ("config", "images", "settings"),
    [
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}, {}, {}),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, {}, {}),
        (
            {"image_size": 224},
            {"size": 384, "crop_pct": 0.875},
            {"img_size": 384, "crop_pct": None},
        ),
        ({}, {"size": {"height": 64, "width": 64}}, {"img_size": 64}),
        (
            {
                "label_names": ["a", "b", "c"],
                "pretrained_cfg": {
                    "mean": [0.5],
                    "std": [0.25],
                    "input_size": [3, 288, 288],
                    "crop_pct": 1.0,
                },
            },
            {},
            {
                "classes": ["a", "b", "c"],
                "mean": [0.5],
                "std": [0.25],
                "img_size": 288,
                "crop_pct": 1.0,
            },
        ),
    ],
    ids=["placeholders", "gaps", "squeezed", "height", "timm's"],
)
def test_settings_beside_the_weights(config, images, settings, tmp_path):
    saved_atto(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    assert convnext.read_weights(tmp_path).settings == settings


def test_settings_that_cannot_be_used_are_named(tmp_path):
    saved_atto(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_act": "relu"}')
    with pytest.raises(ValueError, match="another network: its activation is relu"):
        from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: Expecting"):
        from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="cannot read .*config.json"):
        from_checkpoint(tmp_path)


@pytest.mark.parametrize(("config", "message"), [
    ({"architecture": "test_convnext2"}, "its norms have ε = 1e-05"),
    ({"architecture": "convnext_atto", "model_args": {"act_layer": "silu"}},
     "its activation is silu"),
    ({"architecture": "convnext_atto"}, None),
    ({"hidden_act": "gelu_new"}, "its activation is gelu_new"),
    ({"layer_norm_eps": 1e-3}, "its norms have ε = 0.001"),
    ({"layer_norm_eps": 1e-6}, None), ({"layer_norm_eps": 1e-12}, None)], ids=str)
@pytest.mark.parametrize("name", ["model.safetensors", "renamed.pth"])
def test_what_tensors_do_not_tell_is_read_beside_them(config, message, name, tmp_path):
    """Another ε or activation, for timm's and transformers' folders, whatever the file's name."""
    model = saved_atto(tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if message is None:
        assert torch.equal(from_checkpoint(tmp_path / name)(X), model(X))
    else:
        with pytest.raises(ValueError, match=f"is another network: {message}"):
            from_checkpoint(tmp_path / name)


@network
@pytest.mark.parametrize(("source", "expected"), [
    ("timm:convnext_tiny.fb_in1k", [-0.0260, -0.4739, 0.1911]),
    ("hf:facebook/convnext-tiny-224", [-0.0260, -0.4739, 0.1911]),
    ("https://dl.fbaipublicfiles.com/convnext/convnext_tiny_1k_224_ema.pth",
     [-0.0260, -0.4739, 0.1911]),
    ("hf:facebook/convnextv2-tiny-1k-224", [0.9996, 0.1966, -0.4386])])
def test_published_weights_on_two_cats(source, expected, request, tmp_path):
    """The logits in transformers' tests and programs; resizing varies by 1e-3."""
    if "network" not in request.config.getoption("-m"):
        pytest.skip("needs a network: pytest -m network")
    path, _ = urllib.request.urlretrieve(
        "http://images.cocodataset.org/val2017/000000039769.jpg", tmp_path / "cats.jpg")
    cut = timm.data.create_transform(224, crop_pct=0.875, interpolation="bicubic")
    logits = logits_of(
        from_checkpoint(source), cut(PIL.Image.open(path).convert("RGB"))[None]
    )
    assert logits.argmax() == 281  # tabby cat
    torch.testing.assert_close(logits[0, :3], torch.tensor(expected), atol=3e-3, rtol=0)


# --- The recipe ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_is_pytorchs(schedule):
    optimizer, lrs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.3), torch.optim.lr_scheduler
    rise = lrs.LinearLR(optimizer, 1 / 10, total_iters=9)
    fall = (lrs.CosineAnnealingLR(optimizer, 39, 0.01) if schedule == "cosine" else
            lrs.LinearLR(optimizer, 1, 0.01 / 0.3, 40))
    both = lrs.SequentialLR(optimizer, [rise, fall], [10])
    for step in range(50):
        lr = train.lr_at(step, 50, 10, 0.3, 0.01, schedule)
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    assert train.lr_at(0, 1, 0, 0.3, 0.01, schedule) == 0.3


@pytest.mark.parametrize("variant", ["atto", "v2_atto"])
def test_weight_decay_groups_are_timms_and_muon_gets_the_blocks_matrices(variant):
    model, recipe = create_convnext(variant), train.Recipe(optimizer="muon", layer_decay=0.8)
    ours, theirs = ({(g["weight_decay"], frozenset(map(id, g["params"]))) for g in groups}
                    for groups in (train.parameter_groups(model, 0.05),
                                   timm.optim.param_groups_weight_decay(model, 0.05)))
    assert ours == theirs
    names = {id(p): name for name, p in model.named_parameters()}
    blocks = {name for name in names.values() if "pwconv" in name and "weight" in name}
    for optimizer, expected in zip(train.make_optimizers(model, recipe), (
            {*names.values()} - blocks, blocks), strict=True):
        groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        assert all(groups) and sorted(itertools.chain(*groups)) == sorted(expected)
    scales = {group["lr_scale"] for group in optimizer.param_groups}  # of Muon, 20 times AdamW's
    assert sorted(scales) == pytest.approx([20 * 0.8**i for i in range(5, 0, -1)])
    model.requires_grad_(False).head.fc.requires_grad_(True)
    alone, = train.make_optimizers(model, recipe)
    assert [[names[id(p)] for p in group["params"]] for group in alone.param_groups] == [
        ["head.fc.weight"], ["head.fc.bias"]]


@pytest.mark.parametrize(("variant", "decay", "expected"), [
    # 0.8 ** (13 - i) for the authors' layers i: stem, first stage, second, 27 blocks by threes ...
    ("base", 0.8, (0.0550, 0.0687, 0.0859, 0.1074, 0.1342, 0.1678, 0.2097, 0.2621, 0.3277, 0.4096,
                   0.5120, 0.6400, 0.8, 1)),
    ("tiny", 0.7, tuple(0.7**i for i in range(7, -1, -1)))])
def test_layer_decay_is_the_authors(variant, decay, expected):
    model, depth, last = meta(variant), VARIANTS[variant].depths[2], len(expected) - 1
    scales = {id(p): group["lr_scale"] for group in train.parameter_groups(model, 0.05, decay)
              for p in group["params"]}
    layers = {"downsample_layers.0.": 0, "stages.0.": 1, "downsample_layers.1.": 2, "stages.1.": 2,
              "downsample_layers.2.": 3, "downsample_layers.3.": last - 1, "stages.3.": last - 1,
              "head.": last} | {f"stages.2.{b}.": 3 + b // 3 for b in range(depth)}
    for name, parameter in model.named_parameters():
        layer = next(layer for part, layer in layers.items() if name.startswith(part))
        assert scales[id(parameter)] == pytest.approx(expected[layer], abs=5e-5), name


@pytest.fixture
def small(monkeypatch, tmp_path):
    """An empty folder, four narrow blocks for atto, 100 training and 20 test images of shapes."""
    monkeypatch.chdir(tmp_path)
    draw, atto = train.draw_shapes, VARIANTS["atto"]
    monkeypatch.setitem(VARIANTS, "atto", atto._replace(depths=(1,) * 4, dims=(8, 16, 24, 32)))
    monkeypatch.setattr(
        train, "draw_shapes", lambda count, size, seed: draw(count // 50, size, seed))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several are slower with such small networks
    yield
    torch.set_num_threads(threads)


COMMON = "--variant atto --patch-size 4 --device cpu --dataset "
QUICK, FOLDER = f"{COMMON} synthetic -b 32", f"{COMMON} folder -b 4 -j 0 --epochs 1"


def settings(line):
    """The recipe that a command line comes to."""
    given = train.parse(line.split())
    origin = given.get("resume") or given.get("eval_only") or given.get("init_from")
    return train.combine(given, origin and train.open_weights(origin))


def outcome(line):
    """The exit code of a command line, or its error."""
    try:
        return str(train.main(line.split()))
    except BaseException as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(("optimizer", "parts", "tolerance"), [
    ("adamw", 3, 0.01), ("muon", 1, 1e-3), ("sgd", 1, 0.2)])  # norms move by a few roundings
def test_steps_are_pytorchs(small, optimizer, parts, tolerance):
    """With parts of unequal size, clipping, two optimisers and the average of the weights."""
    peak = 1.0 if optimizer == "sgd" else 1e-3
    run = train.Run(settings(
        f"{QUICK} --output x --amp off --drop-path 0 -b 20 --epochs 4 --lr {peak} --wd 0.3 "
        f"--schedule linear --optimizer {optimizer} --accumulate {parts} --clip-grad 0.5 "
        "--ema-horizon 0.5"))
    model, average, run.sums = copy.deepcopy(run.model), {}, {"loss": 0.0}
    before, ps = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    flat, muon, rest = groups = [], [], []
    for name, p in ps.items():
        matrix = optimizer == "muon" and "pwconv" in name
        groups[0 if p.ndim == 1 else 1 if matrix else 2].append(p)
    theirs = [torch.optim.AdamW([{"params": rest, "weight_decay": 0.3},
                                 {"params": flat, "weight_decay": 0}], fused=True)]
    if optimizer == "sgd":
        theirs = [torch.optim.SGD(theirs[0].param_groups, momentum=0.9, lr=1)]
        theirs[0].param_groups[0]["weight_decay"] = 0.3
    theirs += [torch.optim.Muon(muon, weight_decay=0.3)] if muon else []
    for step in range(4):
        x, y = torch.randn(20, 3, 32, 32), torch.eye(8)[torch.randint(8, (20,))]
        train.train_step(run, x, y)
        F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(ps.values(), 0.5)
        lr = 1e-6 + (peak - 1e-6) * (20 - step) / 19 if step else peak  # after one step of warmup
        for optim, factor in zip(theirs, (1, 20)):
            for group in optim.param_groups:
                group["lr"] = factor * lr
            optim.step()
            optim.zero_grad()
        average = {name: p if step == 0 else average[name] + (p - average[name]) / 10
                   for name, p in copy.deepcopy(model).state_dict().items()}
    for ours, by_hand in ((run.model, model.state_dict()), (run.ema.module, average)):
        for name, p in ours.state_dict().items():
            moved = (by_hand[name] - before[name]).norm()
            assert (p - by_hand[name]).norm() <= tolerance * moved > 0, name


def test_fan_in_initialisation():
    """The layers' weights, and with them the branch of a block of 40 channels beside its input."""
    model, x, loudness, deviations = (
        create_convnext("atto", layer_scale=0), torch.randn(4, 40, 16, 16), [], {})
    for init in (lambda model: None, train.fan_in_init):
        init(model)
        loudness.append((model.stages[0][0].eval()(x) - x).std().item())
    assert loudness[0] < 0.03 and 0.08 < loudness[1] < 0.2
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = nn.init._calculate_correct_fan(module.weight, "fan_in")
            deviations.setdefault(name.split(".")[-1], []).append(
                module.weight.std().item() * fan_in**0.5)
    cut = 0.88  # what cutting a normal distribution at two standard deviations leaves of them
    for name, count, expected in (
            ("0", 1, cut), ("1", 3, cut), ("dwconv", 12, cut), ("pwconv1", 12, cut),
            ("pwconv2", 12, cut / 24**0.5), ("fc", 1, 0.02 * 320**0.5)):
        assert deviations.pop(name) == pytest.approx([expected] * count, rel=0.06), name
    assert not deviations


def test_distillation_loss_is_hintons():
    ours, theirs = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    p, q = ((x / 3).softmax(1) for x in (theirs, ours))
    loss = train.distillation_loss(ours, theirs, 3.0)
    torch.testing.assert_close(loss, 9 * (p * (p / q).log()).sum() / 5)
    assert train.distillation_loss(theirs, theirs, 3.0) == 0
    gradient, = torch.autograd.grad(loss, ours, retain_graph=True)
    torch.testing.assert_close(gradient, 3 * (q - p) / 5)
    labels, recipe = torch.arange(5), train.Recipe(
        distill_alpha=0.25, distill_temperature=3.0, label_smoothing=0.2)
    torch.testing.assert_close(
        train.training_loss(recipe, ours, F.one_hot(labels, 7).float(), theirs),
        0.75 * F.cross_entropy(ours, labels, label_smoothing=0.2) + 0.25 * loss)


@pytest.mark.parametrize(("size", "given", "share", "mode"), [
    (224, None, 0.875, "center"), (288, 0.95, 0.95, "center"), (384, None, 1.0, "squash"),
    (384, 0.9, 0.9, "center"), (32, None, 1.0, "center")])
def test_evaluation_cut_is_timms(size, given, share, mode):
    picture = PIL.Image.effect_noise((500, 375), 80).convert("RGB")
    theirs = timm.data.create_transform(
        size, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1), crop_pct=share,
        crop_mode=mode)(picture)
    ours = TF.pil_to_tensor(train.evaluation_cut(size, given)(picture))
    torch.testing.assert_close(ours / 255, theirs)


def test_crop_and_flip_are_torchvisions_for_each_sample():
    x = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    padded, draws = TF.pad(x, [2], padding_mode="reflect"), []
    for before, after in zip(padded, train.crop_and_flip(x, 2, 0.5)):
        match, = ((top, left, flip) for top in range(5) for left in range(5) for flip in (0, 1)
                  if torch.equal(TF.crop(before, top, left, 8, 8),
                                 TF.horizontal_flip(after) if flip else after))
        draws.append(match)
    assert {d[0] for d in draws} == {d[1] for d in draws} == set(range(5))
    assert 16 < sum(d[2] for d in draws) < 48
    assert torch.equal(train.crop_and_flip(x, 0, 0.0), x)


def pillow_operation(name, strength):
    """What timm does to a Pillow image at `strength` of an operation's range."""
    warp = {"resample": PIL.Image.Resampling.BILINEAR, "fillcolor": (128, 128, 128)}
    k = 0.3 * strength  # timm shears about a corner, we about the centre: k * 16 pixels apart
    if name.startswith("shear"):
        rows = (1, k, -16 * k, 0, 1, 0) if name == "shear_x" else (1, 0, 0, k, 1, -16 * k)
        return lambda i: i.transform(i.size, PIL.Image.Transform.AFFINE, rows, **warp)
    level = 10 * abs(strength), None
    arguments = {
        "auto_contrast": (), "equalize": (), "invert": (), "rotate": (30 * strength,),
        "posterize": timm_ops._posterize_increasing_level_to_arg(*level),
        "solarize": timm_ops._solarize_increasing_level_to_arg(*level),
        "solarize_add": timm_ops._solarize_add_level_to_arg(*level),
        "translate_x": (0.45 * strength,), "translate_y": (0.45 * strength,),
    }.get(name, (1 + 0.9 * strength,))
    operation = getattr(timm_ops, name + "_rel" * name.startswith("translate"))
    return lambda i: operation(i, *arguments, **(warp if name[:2] in ("ro", "tr") else {}))


@pytest.mark.parametrize("strength", [0.9, -0.45])
@pytest.mark.parametrize("name", train.RAND_AUGMENT_OPS)
def test_rand_augment_operation_is_timms(name, strength):
    images = T.GaussianBlur(3, 0.8)(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    images = (TF.autocontrast(images) * 0.7 + 40).byte()
    ours = 255 * train.RAND_AUGMENT_OPS[name](images / 255, torch.full((2, 1, 1, 1), strength))
    operation = pillow_operation(name, strength)
    theirs = torch.stack([TF.pil_to_tensor(operation(TF.to_pil_image(i))) for i in images])
    difference = (ours - theirs).abs()
    assert difference.mean() < 1.5  # of 255; Pillow rounds, and does not blend at the border
    assert difference[..., 8:24, 8:24].max() < (12 if name == "equalize" else 4.1)
    assert (theirs.float() - images).abs().mean() > 3  # so what they agree on is a change


def test_rand_augment_and_erasing_draw_for_each_sample():
    x = torch.rand(1, 3, 16, 16).repeat(3000, 1, 1, 1)
    y = train.rand_augment(x.clone(), 9)
    untouched = (y == x).flatten(1).all(1).float().mean().item()
    assert 0.23 < untouched < 0.33  # both operations left out, 1/4, or without effect on this image
    assert len({tuple(image.flatten().tolist()) for image in y}) > 500

    y = train.random_erase(torch.zeros(4000, 1, 32, 32), 0.25)
    erased, noise = (y != 0).flatten(1).float().mean(1), y[y != 0]
    assert 0.22 < (erased > 0).float().mean() < 0.28 and erased.max() < 0.36
    assert 0.15 < erased[erased > 0].mean() < 0.19
    assert abs(noise.mean()) < 0.02 and noise.std().item() == pytest.approx(1, abs=0.02)
    shapes = (y != 0)[erased > 0, 0]
    assert torch.equal(shapes, shapes.any(1, True) & shapes.any(2, True))  # rectangles
    assert len({tuple(torch.nonzero(shape)[0].tolist()) for shape in shapes}) > 100


def test_mixing(small):
    """MixUp blends and CutMix pastes, by the shares in the targets, each about half as often."""
    data, kinds = train.prepare_data(settings(QUICK), torch.device("cpu")), []
    x = train.normalize(data.train.images[:8] / 255, data.mean, data.std)
    for draw in range(102):
        recipe = train.Recipe(
            crop_padding=0, flip=0.0, rand_augment=0.0, random_erase=0.0, mix_prob=float(draw > 0),
            **{"mixup": 0.0, "cutmix": 0.0} if draw == 1 else {})
        mixed, targets = train.augment(
            recipe, data, data.train.images[:8], torch.arange(8), True, 32)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        share, kept, others = targets[0, 0], (mixed == x).all(1, True), x.roll(1, 0)
        pasted = torch.equal(torch.where(kept, x, others), mixed) and torch.allclose(
            kept.float().mean((1, 2, 3)), share, atol=0.02)
        assert pasted or torch.allclose(mixed, share * x + (1 - share) * others, atol=1e-4)
        kinds.append("none" if torch.equal(mixed, x) else "CutMix" if pasted else "MixUp")
    assert kinds[:2] == ["none"] * 2 and 30 < kinds.count("CutMix") < 70


def test_images_grow_and_mixing_ends(small, monkeypatch):
    def step(run, x, y):
        seen.append((x.shape[-1], bool((y.max(1).values < 1).any())))
        run.step, run.sums["lr"] = run.step + 1, 0.0

    seen = []
    monkeypatch.setattr(train, "train_step", step)
    run = train.Run(settings(f"{QUICK} --output x --start-size 16 --patch-size 2 --epochs 4 -b 50 "
                             "--mix-off-epochs 1"))
    for _ in range(4):
        run.history.append(train.train_epoch(run, Mock()))
    assert seen == [(16, True)] * 4 + [(32, True)] * 2 + [(32, False)] * 2


@pytest.mark.parametrize("mirrored", [False, True])
def test_statistics_are_numpys_and_evaluation_is_timms(mirrored):
    data, model = train.draw_shapes(260, 32, seed=0), four_blocks(8)  # more than a batch
    mean, std = train.channel_statistics(data, 0)
    pixels = data.images.numpy() / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-5)
    x = T.Normalize(mean.tolist(), std.tolist())(data.images / 255)
    logits = logits_of(model, x)
    if mirrored:
        logits = (logits + logits_of(model, TF.horizontal_flip(x))) / 2
    expected = [F.cross_entropy(logits, data.labels), *timm.utils.accuracy(
        logits, data.labels, (1, 5))]
    measured = train.evaluate(model.train(), data, mean, std, 0, torch.float32, mirrored)
    assert [*measured.values()] == pytest.approx([e.item() for e in expected], rel=1e-4)
    assert not train.evaluate(model, data, mean, std, 0, torch.float32, stopped=lambda: True)


# --- Settings -----------------------------------------------------------------------------------


@pytest.fixture
def pretrained(small):
    """The weights of a short run with patches of 4, eight classes and statistics of its own."""
    assert outcome(f"{QUICK} --epochs 1 --lr 0.002 --layer-scale 0.1 --output first") == "0"
    return "first/weights.safetensors"


def test_settings_in_order_of_precedence(pretrained, monkeypatch):
    state = export_state_dict(create_convnext("atto"), "timm")
    images = {**train.IMAGENET, "crop_pct": 0.95}
    monkeypatch.setattr(convnext, "download", lambda source: (state, images))
    ours, timms, last = f"--init-from {pretrained}", "--init-from timm:a", "--resume first/last.pt"
    of_weights = {"variant": "atto", "patch_size": 4, "img_size": 32, "layer_scale": 1e-6}
    table = {"lr": 1.25e-5, "min_lr": 2.5e-7, "weight_decay": 1e-8, "layer_decay": 0.8,
             "epochs": 30, "head_init_scale": 0.001, "mixup": 0, "warmup_epochs": 0, "drop_path": 0}
    for line, expected in (
            ("", {"variant": "tiny", "epochs": 100, "init": "fan-in", "warmup_epochs": 5}),
            ("--epochs 40 --init paper", {"init": "paper", "warmup_epochs": 2}),
            ("--recipe fast", train.FAST), ("--recipe fast --patch-size 2", {"start_size": 0}),
            ("--recipe fast --img-size 96", {"start_size": 0}),
            ("--recipe scratch", {"variant": "tiny", "optimizer": "adamw"}),
            ("--recipe fast --epochs 100 --layer-scale 0.1 --mix-prob 1 --no-tta --variant tiny",
             {"epochs": 100, "layer_scale": 0.1, "mix_prob": 1, "tta": False, "variant": "tiny"}),
            (ours, of_weights | {"epochs": 100, "lr": 1e-3, "batch_size": 128}),
            (f"{ours} --patch-size 2 --variant tiny", {"patch_size": 2, "variant": "tiny"}),
            (f"{ours} --recipe finetune", of_weights | table),
            (f"{ours} --recipe finetune -b 256 --mixup 0.8 --lr 0.001 --epochs 100",
             table | {"min_lr": 5e-7, "mixup": 0.8, "lr": 1e-3, "epochs": 100}),
            *((f"{ours} --recipe finetune --variant {variant}", {"drop_path": rate})
              for variant, rate in (("small", 0.1), ("base", 0.2), ("large", 0.3), ("xlarge", 0.4),
                                    ("v2_base", 0.2), ("base --freeze-backbone", 0))),
            *((f"{timms} {line}", {"img_size": size, "crop_pct": crop_pct})
              for line, size, crop_pct in (
                  ("", 224, 0.95), ("--img-size 224", 224, 0.95), ("--img-size 320", 320, None),
                  ("--img-size 320 --crop-pct 0.95", 320, 0.95), ("--crop-pct 0.875", 224, 0.875))),
            ("--eval-only timm:a --img-size 320", {"dataset": "imagenet", "crop_pct": None}),
            (f"--eval-only {pretrained}", of_weights | {"dataset": "synthetic"}),
            (f"--eval-only {pretrained} --dataset cifar10", {"dataset": "cifar10"}),
            (last, {"lr": 0.002, "layer_scale": 0.1, "output": "first"}),
            (f"{last} --lr 0.002 -j 3 --data-dir x", {"lr": 0.002, "workers": 3})):
        recipe = settings(line)
        assert {k: getattr(recipe, k) for k in expected} == pytest.approx(expected), line


def test_bad_values_are_refused_with_the_range(capsys):
    for line, message in (
            ("--vairant tiny", "unrecognized arguments: --vairant"), ("--mix 0.5", "uments: --mix"),
            ("--output=", "no value may be empty"), ("--variant teeny", "invalid choice: 'teeny'"),
            ("--patch-size 3", "choose from 1, 2, 4"), ("--lr x", "--lr: invalid float value: 'x'"),
            ("--lr 0", "--lr must be a number in (0, inf), not 0.0"), ("--lr nan", "--lr must be "),
            ("--lr inf", "not inf"), ("--epochs 0", "--epochs must be a whole number in [1, inf)"),
            ("--epochs 1.5", "'1.5'"), ("--drop_path 1", "--drop-path must be a number in [0, 1)"),
            ("--flip 1.1", "number in [0, 1], not 1.1"), ("--layer-scale -1", "number in [0, inf)"),
            ("--epochs 3 --warmup-epochs 3", "--warmup-epochs must be below --epochs, 3, not 3.0"),
            ("--img-size 8", "--img-size must be 16 or more at --patch-size 2, not 8"),
            ("--start-size 8", "--start-size must be a multiple of 16, the network's stride"),
            ("--crop-padding 32", "--crop-padding must be below --img-size, 32"),
            ("--min-lr 1", "--min-lr must be up to --lr, 0.001"), ("--seed -1", "--seed must be "),
            ("--accumulate 9 -b 8", "--accumulate must be up to --batch-size, 8, not 9"),
            ("--dataset synthetic --val-size 5000", "--val-size must be below the 5,000 training"),
            ("--device quantum", "--device quantum cannot be used here (")):
        text = (outcome(line) + "\n" + capsys.readouterr().err).strip().splitlines()[-1]
        assert message in text and re.match("UserError: |.*: error: ", text), line


def test_contradictions_and_misfits_are_refused(pretrained):
    torch.save(load_file(pretrained) | {"norm_pre.weight": torch.ones(32)}, "hnf.pth")
    for line, message in (
            ("--resume first/last.pt --lr 0.001 --wd 1", "change --lr, --weight-decay;.*--init-fr"),
            ("--resume first/last.pt --recipe fast", "cannot change --recipe; .* with --init-from"),
            (f"--resume {pretrained}", "--resume takes last.pt"),
            ("--resume first/last.pt --eval-only first/last.pt", "only one of --resume, --eval-on"),
            ("--eval-only first/last.pt --epochs 3 --tta", "trains nothing: leave out --epochs$"),
            (f"--init-from {pretrained} --recipe fast", "--recipe fast .* without --init-from"),
            (f"--init-from {pretrained} --init fan-in", "--init fan-in .* without --init-from"),
            (f"--init-from {pretrained} --variant femto --dataset synthetic --output x", "fit"),
            ("--recipe finetune", "need weights: --init-f"), ("--freeze-backbone", "need weights"),
            ("--muon-lr 0.1", "--muon-lr needs --optimizer muon"),
            (f"--init-from {pretrained} --recipe finetune --optimizer muon", "give --muon-lr, too"),
            ("--distill-alpha 1", "need a --teacher"), ("--resume no.pt", "no.pt: no such file"),
            ("--init-from hnf.pth --dataset synthetic --output x", "hnf.pth: .*norm_pre.weight"),
            ("--teacher hnf.pth --dataset synthetic --output x", "hnf.pth: .*norm_pre.weight"),
            ("--eval-only hnf.pth --dataset synthetic", "hnf.pth: .*norm_pre.weight")):
        assert re.search(f"^UserError: .*{message}", outcome(line)), line
    assert not Path("x").exists()


# --- The run ------------------------------------------------------------------------------------


def read_csv(path):
    with open(path) as file:
        return [*csv.DictReader(file)]


def plain(content):
    """Nested content, tensors as bytes, without times and places: to be compared whole."""
    if isinstance(content, dict):
        return {name: plain(value) for name, value in content.items() if name not in (
            "seconds", "images_per_s", "data_share", "waiting", "output", "resume")}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    return content.numpy().tobytes() if isinstance(content, torch.Tensor) else content


def at_call(number, function, action):
    """The function, but before its call of this number the action happens."""
    def wrapped(*args, **kwargs):
        if next(calls) == number:
            action()
        return function(*args, **kwargs)

    calls = itertools.count(1)
    return wrapped


def fill_disk(size=0):
    """From now on, no file grows beyond this size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("more", ["", "--optimizer muon --ema-horizon 0 --teacher first/last.pt"])
def test_what_ends_a_run_loses_nothing(pretrained, monkeypatch, capsys, more):
    """Signals in an epoch and in an evaluation, a full disk, a lost file: no trace is left."""
    def send(*numbers):
        return lambda: [signal.raise_signal(number) for number in numbers]

    line = f"{QUICK} -b 16 --epochs 4 --val-size 20 --accumulate 2 --clip-grad 1 {more} --output "
    assert outcome(line + "whole") == "0"
    line, last, former = line + "parts", Path("parts/last.pt"), signal.signal(
        signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
    for function, number, action, step, result in (  # an epoch has 5 steps
            ("augment", 3, send(signal.SIGINT), 3, "130"),
            ("augment", 4, send(signal.SIGHUP), 7, "129"),
            ("evaluate", 1, send(signal.SIGTERM), 10, "143"),
            ("augment", 1, send(signal.SIGUSR1, signal.SIGUSR1), 11, "138"),
            ("augment", 2, send(signal.SIGINT, signal.SIGINT), 11, "KeyboardInterrupt: "),
            ("augment", 4, fill_disk, 11, "UserError: cannot write parts/.*; the old files stay")):
        with monkeypatch.context() as patch:
            patch.setattr(train, function, at_call(number, getattr(train, function), action))
            ended = outcome(line)
        fill_disk(resource.RLIM_INFINITY)
        assert re.fullmatch(result, ended) and not [*last.parent.glob("*.tmp")]
        assert torch.load(last, weights_only=True)["step"] == step
        assert ("--resume parts/last.pt" in capsys.readouterr().err) == result.isdigit()
        line = f"--resume {last}"
        torch.rand(7)  # the random state at the time does not matter
    signal.signal(signal.SIGHUP, former)
    Path("parts/last.pt.tmp").write_bytes(b"left by a killed run")
    assert outcome(line) == "0" and len(read_csv("parts/metrics.csv")) == 4
    Path("parts/metrics.csv").unlink()  # as if killed before the last file was written
    assert outcome(line) == "0"
    assert sorted(os.listdir("parts")) == sorted(os.listdir("whole"))
    for name, read in (("last.pt", torch.load), ("best.pt", torch.load), ("metrics.csv", read_csv),
                       ("weights.safetensors", load_file)):
        assert plain(read(f"parts/{name}")) == plain(read(f"whole/{name}")), name


def test_networks_of_the_road_train_and_resume(small, monkeypatch):
    """Also BatchNorm's running statistics come back; what the road has not is refused."""
    line = ("--dataset synthetic -j 0 --epochs 2 -b 35 --val-size 20 --mix-prob 0 --width 16 "
            "--patch-size 4 --optimizer sgd --lr 0.05 --road ")
    assert outcome(f"{line}ResNet-50 --output whole") == "0"
    with monkeypatch.context() as patch:
        patch.setattr(train, "augment", at_call(3, train.augment,
                                                lambda: signal.raise_signal(signal.SIGINT)))
        assert outcome(f"{line}ResNet-50 --output parts") == "130"
    assert outcome("--resume parts/last.pt") == "0"
    whole, parts = (torch.load(f"{name}/last.pt") for name in ("whole", "parts"))
    assert plain(whole) == plain(parts) and "1.running_mean" in whole["model"]
    path = {name: [] for name in ("1.weight", "1.running_mean")}  # both are averaged alike
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", lambda run, x, y, step=train.train_step: [
            step(run, x, y), *(path[name].append(run.model.state_dict()[name].clone())
                               for name in path)])
        assert outcome(f"{line}ResNet-50 --ema-horizon 0.5 --output average") == "0"
    average = torch.load("average/last.pt")["ema"]
    for name, (value, *later) in path.items():
        for new in later:  # 4 steps: a horizon of 2
            value = value + (new - value) / 2
        torch.testing.assert_close(average[f"module.{name}"], value)
    attention = nn.Sequential(convnext.WindowAttention(16, False))
    undecayed, = (group["params"] for group in train.parameter_groups(attention, 0.1)
                  if not group["weight_decay"])
    assert attention[0].bias in set(undecayed)
    for flags, text in (
            (f"{line}LayerNorm --drop-path 0.1", "--road has no --drop-path"),
            (f"{line}LayerNorm --optimizer muon", "give --optimizer adamw"),
            ("--recipe fast --road LayerNorm", "give --optimizer adamw"),
            ("--width 8", "--width needs a --road"),
            ("--init-from whole/last.pt", "whole/last.pt: it holds a network of the road"),
            ("--eval-only whole/last.pt", "whole/last.pt: it holds a network of the road"),
            (f"{QUICK} --teacher whole/last.pt", "whole/last.pt: it holds a network of the road")):
        assert re.match(f"UserError: .*{text}", outcome(flags)), flags
    given = train.parse([*line.split(), "window attention", "--width", "33", "--output", "x"])
    with pytest.raises(train.UserError, match="33 channels cannot be divided into 2 heads"):
        train.Run(train.combine(given))


@pytest.mark.parametrize(("number", "result"), [
    (signal.SIGTERM, "0"), (signal.SIGKILL, "UserError: .*try fewer --workers")])
def test_signals_to_processes_that_read_images(small, monkeypatch, number, result):
    """What reaches all processes is left to the main one; a killed one ends the run in one line."""
    def send():
        for process in multiprocessing.active_children():
            os.kill(process.pid, number)
            if number == signal.SIGKILL:  # the news arrives here, not where images are awaited
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    make_folder("data")
    monkeypatch.setattr(train, "augment", at_call(1, train.augment, send))
    assert re.match(result, outcome(f"{FOLDER} -b 1 --img-size 96 -j 1 --output run"))


@pytest.mark.parametrize("what", ["mean loss became", "norm of the weights"])
def test_a_number_that_is_none_ends_the_run(small, monkeypatch, what):
    def poisoned(run, x, y):
        step(run, x * math.nan if what[0] == "m" and run.step == 4 else x, y)
        if what[0] == "n" and run.step == 6:  # after the last step of the second epoch
            run.model.head.fc.bias.data[0] = math.inf

    step = train.train_step
    monkeypatch.setattr(train, "train_step", poisoned)
    assert re.search(rf"^UserError: by step 6, at lr .* the {what} (nan|inf).*: try a lower --lr",
                     outcome(f"{QUICK} --epochs 3 --output run"))
    state = torch.load("run/last.pt")
    assert state["step"] == 3 and all(p.isfinite().all() for p in state["model"].values())


@pytest.mark.parametrize("name", ["last.pt", "weights.safetensors"])
def test_no_damage_to_a_file_goes_unnoticed(name, pretrained):
    """A bit flipped, a part cut off, overwritten or moved: refused, or the very same content."""
    path, refused = f"first/{name}", 0
    whole, original = Path(path).read_bytes(), plain(train.open_weights(path))
    for trial in range(200):
        choose, size = random.Random(trial), len(whole)
        at = choose.choice([choose.randrange(size), choose.randrange(min(size, 4000)),
                            size - 1 - choose.randrange(min(size, 4000))])  # most near an end
        Path(path).write_bytes(choose.choice([
            whole[:at] + bytes([whole[at] ^ 1 << choose.randrange(8)]) + whole[at + 1 :],
            whole[:at], whole[:at] + choose.randbytes(50) + whole[at + 50 :],
            whole[at:] + whole[:at], whole.replace(b"train.py, f", b"Train.py, f")]))
        try:
            assert plain(train.open_weights(path)) == original, trial
        except train.UserError as error:
            assert path in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 130


def test_foreign_and_hostile_files(small, capsys):
    """No code runs, and who uses our keys for other things does not pass for us."""
    Path("zero.pt").touch()
    torch.save({"args": Malicious(), "made_by": train.MADE_BY}, "evil.pt")
    torch.save({"model": {}}, "other.pt")
    torch.save(create_convnext("atto", in_channels=1).state_dict(), "grey.pt")
    for flag, (name, reason) in itertools.product(
            ("--resume", "--eval-only", "--init-from", f"{QUICK} --output x --teacher"),
            (("zero", "no checkpoint"), ("evil", "GLOBAL"), ("other", "no weights of a ConvNeXt"),
             ("grey", "1 channels, not 3"))):
        assert re.search(f"^UserError: .*{name}.pt: .*{reason}", outcome(f"{flag} {name}.pt"))
    assert not Path("executed").exists()
    torch.save({"model": create_convnext("atto", num_classes=8).state_dict(), "step": 3,
                "args": {"variant": "tiny", "img_size": 96}, "classes": ["a"],
                "mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}, "like.pt")
    source = train.open_weights("like.pt")
    assert (source.images, source.notes, source.network["variant"]) == (train.IMAGENET, {}, "atto")
    assert "note: like.pt does not say what images it expects" in capsys.readouterr().err
    assert "--resume takes last.pt, of this version" in outcome("--resume like.pt")


def test_a_run_leaves_what_is_promised(small, capsys):
    line = f"{QUICK} --epochs 2 --output run"
    Path("run").mkdir()
    with train.FileLock("run/.lock"):
        assert outcome(line) == "UserError: another run is writing to run"
    assert outcome(f"{line} --tta") == "0"
    text, rows = capsys.readouterr().out, read_csv("run/metrics.csv")
    network = {"num_classes": 8, "patch_size": 4, "layer_scale": 0}
    size = sum(p.numel() for p in meta("atto", **network).parameters())
    assert f"patch size 4: {size:,} parameters, " in text and len(text.split("\nepoch ")) == 3
    assert {*os.listdir("run")} - {".lock"} == {"args.json", "last.pt", "metrics.csv",
                                                "weights.safetensors"}
    assert [row["epoch"] for row in rows] == ["1", "2"]
    top1 = f"top-1 {float(rows[-1]['test_ema_top1']):.2f} %"
    assert top1 in text and "run/last.pt with mirror images: test loss" in text

    model = create_convnext("atto", **network)
    load_weights(model, "run/weights.safetensors")
    saved, test = torch.load("run/last.pt"), train.draw_shapes(1000, 32, seed=0)
    x = T.Normalize(saved["mean"], saved["std"])(test.images / 255)
    hits = (logits_of(model, x).argmax(1) == test.labels).float()
    assert f"top-1 {100 * hits.mean():.2f} %" == top1  # of 20 images
    for name in ("last.pt", "weights.safetensors"):
        assert outcome(f"--eval-only run/{name}") == "0" and top1 in capsys.readouterr().out
    assert "UserError: run holds a run: give --resume run/last.pt, or another" in outcome(line)


def test_held_out_images_choose_the_best(small, monkeypatch):
    """And are not trained on. By the averaged weights the second epoch is best, else the last."""
    scores, good = iter([1, 2, 2, 9, 3, 5]), train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args, **more: good(*args, **more) | (
        {"top1": next(scores)} if "stopped" in more else {}))
    assert outcome(f"{QUICK} --epochs 3 --val-size 30 --output run") == "0"
    assert torch.load("run/best.pt")["step"] == 4  # 70 images: 2 steps an epoch
    whole = Path("run/best.pt").read_bytes()
    Path("run/best.pt").write_bytes(whole[:-9])
    assert re.match("UserError: .*run/best.pt", outcome("--resume run/last.pt"))
    Path("run/best.pt").write_bytes(whole)
    data = train.prepare_data(settings("--resume run/last.pt"), torch.device("cpu"))
    learned, held_out, whole = ({image.numpy().tobytes() for image in part.images} for part in (
        data.train, data.val, train.draw_shapes(5000, 32, seed=1)))
    assert not learned & held_out and learned | held_out == whole


def test_printing_ends_no_run_and_mistakes_are_one_line(tmp_path):
    """A full disk under the log, nobody behind it, names that a terminal lacks."""
    make_folder(tmp_path / "data", ("ünï 😀", "b"))
    (tmp_path / "file").touch()
    line = f"{sys.executable} {HERE / 'train.py'} {FOLDER} --output"
    programs = [subprocess.Popen(
        ["sh", "-c", command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"})
        for command in (f"{line} full >/dev/full 2>/dev/full", f"{line} closed >&- 2>&-",
                        f"{line} nobody | true", f"{line} ascii", f"{line} file/run",
                        f"{line} x --resume none.pt")]
    results = [(*program.communicate(timeout=400), program.returncode) for program in programs]
    for name, (_, err, code) in zip(("full", "closed", "nobody", "ascii"), results):
        assert (tmp_path / name / "weights.safetensors").exists() and code == 0, err
        assert "Traceback" not in err
    assert r"(b, \xfcn\xef \U0001f600)" in results[3][0]
    for (_, err, code), reason in zip(results[4:], ("file/run", "none.pt: no such file")):
        assert re.fullmatch(f"train.py: error: .*{reason}.*\n", err) and code == 1


# --- Data ---------------------------------------------------------------------------------------


def make_folder(root, classes=("b cat", "a dog"), splits=("train", "val"), images=6):
    generator = np.random.default_rng(0)
    for split, (label, name) in itertools.product(splits, enumerate(classes)):
        folder = Path(root, split, name)
        folder.mkdir(parents=True)
        for i, mode in enumerate(("RGB", "L", "P", "CMYK", "RGB", "RGBA")[:images]):
            pixels = generator.integers(0, 100, (40 + 9 * i, 70 - 5 * i, 3)) + 100 * label
            image = PIL.Image.fromarray(pixels.astype(np.uint8)).convert(mode)
            image.save(folder / f"ünï {i}.{'jpg' if mode in ('L', 'CMYK') else 'png'}")
    return Path(root)


@pytest.mark.parametrize("size", [32, 96])
def test_a_folder_of_mixed_images(small, capsys, size):
    dogs = make_folder("data") / "train" / "a dog"
    line = f"{FOLDER} --img-size {size} -j {size // 96} --ema-horizon 0 --val-size 2 --output "
    assert outcome(line + "run") == "0"
    assert ("10 training + 2 held-out + 12 test images, 2 classes (a dog, b cat)"
            in capsys.readouterr().out)
    for name, content in (("empty.png", b""), ("text.png", b"no image"),
                          ("cut.png", (dogs / "ünï 0.png").read_bytes()[:900])):
        (dogs / name).write_bytes(content)
    assert re.search(r"^UserError: cannot read the image .*(empty|text|cut).png \(.*--skip-bad",
                     outcome(line + "other"))
    assert outcome(f"{line} good --skip-bad") == "0"
    note = capsys.readouterr().err
    assert "note: 3 images cannot be read: " in note and "cut.png" in note


@pytest.mark.parametrize("size", [32, 96])
def test_other_images_are_refused_by_resume(small, size):
    """They would be split anew into training and held-out images. Another place is fine."""
    make_folder("data")
    assert outcome(f"{FOLDER} --img-size {size} --val-size 4 --skip-bad --output run") == "0"
    for name, change in (
            ("moved", lambda path: None), ("deleted", lambda path: path.unlink()),
            ("damaged", lambda path: path.write_bytes(b"")),
            ("class", lambda path: path.rename(path.parents[1] / "b cat" / "a.png")),
            ("renamed", lambda path: path.rename(path.with_name("ünï 6.png"))),
            ("content", lambda path: PIL.Image.new("RGB", (50, 50)).save(path)),
            ("wolf", lambda path: path.parent.rename(path.parents[1] / "wolf"))):
        shutil.copytree("data", name)
        for split in ("train", "val") if name == "wolf" else ("train",):
            change(Path(name, split, "a dog", "ünï 5.png"))
        # images in memory are compared by class, order and content, larger ones by their names
        refused = "" if (name, size) in (("moved", 32), ("moved", 96), ("renamed", 32), (
            "content", 96)) else "UserError: --resume needs the training images that the run bega"
        assert outcome(f"--resume run/last.pt --data-dir {name}").startswith(refused or "0"), name


def test_nothing_in_a_folder_disappears_or_is_doubled(small, monkeypatch, capsys):
    root, elsewhere = make_folder("data") / "train", make_folder("elsewhere", ("wolf",), ("train",))
    cats, scan = root / "b cat", os.scandir
    (root / "wolf").symlink_to((elsewhere / "train" / "wolf").absolute())
    expected = {*root.rglob("*.*"), *(root / "wolf").iterdir()}
    for place in (".ipynb_checkpoints", "@eaDir", "more/deeper"):
        (cats / place).mkdir(parents=True)
        shutil.copy(cats / "ünï 0.png", cats / place / "again.png")
    (root / ".hidden").mkdir()
    (cats / "parent").symlink_to(root.absolute())
    new = {cats / name for name in ("a.jfif", "b.jpe", "c.GIF", "more/e.bmp", "more/f.ppm")}
    for path in new:
        PIL.Image.new("RGB", (9, 9)).save(path)
    for path in (cats / "labels.txt", cats / "._a.png", root / "stray.png"):
        path.touch()
    recipe = settings(f"{FOLDER} --img-size 96")
    data = train.load_split(recipe, train=True)
    assert {*map(Path, data.images)} == expected | new | {cats / "more/deeper/again.png"}
    assert len(data) == len({*data.images}) == 24
    assert data.classes == ["a dog", "b cat", "wolf"]
    assert [Path(path).relative_to(root).parts[0] for path in data.images] == [
        data.classes[label] for label in data.labels]
    note = capsys.readouterr().err
    for count in ("1 .ipynb_checkpoints", "1 @eaDir", "1 parent", "1 .hidden", "1 *.txt", "2 *.pn"):
        assert count in note, note

    def locked(place):  # the superuser can read every folder
        if str(place).endswith("deeper"):
            raise PermissionError(errno.EACCES, "Permission denied", place)
        return scan(place)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(train.UserError, match=r"the folder .*more/deeper \(Permission denied"):
        train.load_split(recipe, train=True)


def test_pictures_are_read_as_a_viewer_shows_them(tmp_path):
    rng, exif = np.random.default_rng(0), PIL.Image.Exif()
    exif[0x0112] = 6  # the top is on the right: a viewer turns it clockwise
    rgb, alpha = (rng.integers(0, 256, (5, 7, axes), np.uint8) for axes in (3, 1))
    grey16 = rng.integers(0, 65536, (5, 7), np.uint16)
    grey16[0, :2] = 0, 65535
    grey = (grey16 >> 8).astype(np.uint8)
    clear, on_white = np.dstack([rgb, alpha]), rgb * (alpha / 255) + (255.0 - alpha)
    drawing = PIL.Image.fromarray(np.dstack([0 * rgb, (alpha > 99) * np.uint8(255)]))
    drawn = np.where(alpha > 99, 0, 255)
    for kind_, picture, expected, options in (
            ("png", grey16, grey, {}), ("tif", grey16, grey, {}), ("ppm", grey16, grey, {}),
            ("tif", grey16.astype(">u2"), grey, {}), ("png", grey > 99, 255 * (grey > 99), {}),
            *((kind_, picture, np.rot90(expected, -1), {"exif": exif}) for kind_ in ("png", "tif")
              for picture, expected in ((rgb, rgb), (grey, grey), (grey16, grey))),
            ("png", clear, on_white, {}), ("tif", clear, on_white, {}), ("gif", drawing, drawn, {}),
            *(("png", picture, drawn, {}) for picture in (
                drawing, drawing.convert("LA"), drawing.quantize(4))),
            ("png", rgb, np.where((rgb == rgb[0, 0]).all(2, keepdims=True), 255, rgb),
             {"transparency": tuple(rgb[0, 0].tolist())})):
        picture = PIL.Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        picture.save(tmp_path / f"x.{kind_}", **options)
        shown = np.asarray(train.as_shown(str(tmp_path / f"x.{kind_}"))).astype(float)
        difference = shown - expected.reshape(*expected.shape[:2], -1)
        assert shown.shape[2] == 3 and abs(difference).max() <= 1, (kind_, picture.mode, options)
    for type_ in (np.float32, np.int32):
        PIL.Image.fromarray(grey16.astype(type_)).save(tmp_path / "deep.tif")
        data = train.Images([str(tmp_path / "deep.tif")], torch.zeros(1), [], Mock())
        assert "deep.tif (which of its 32-bit values is white is unknown" in str(data[[0]])


@pytest.mark.parametrize("classes", [[str(i) for i in range(1, 13)], [*"abcdefghijkl"]])
def test_the_order_of_classes(small, capsys, classes):
    """It comes with our weights; else the assumed one is said, loudly where there are two."""
    make_folder("data", classes, images=1)
    torch.save(export_state_dict(create_convnext("atto", num_classes=12), "timm"), "timm.pth")
    names = sorted(classes)
    note = (f"timm.pth does not name its classes; assumed are {names[0]} (0), {names[1]} (1), ..., "
            f"{names[-1]} (11)") + (". WARNING: not in timm's order, 1, 2, 3, 4, ...;" if
                                         "12" in classes else "\n")
    for line in ("--eval-only timm.pth --dataset folder --img-size 32",
                 f"{FOLDER} --teacher timm.pth --output run",
                 f"{FOLDER} --init-from timm.pth --img-size 32 --output other"):
        assert outcome(line) == "0" and note in capsys.readouterr().err
    state = torch.load("run/last.pt")
    torch.save(state | {"classes": names[::-1]}, "turned.pt")
    for path in ("run/last.pt", "turned.pt"):
        assert outcome(f"--eval-only {path} --amp off") == "0"
        out, err = capsys.readouterr()
        data = train.load_split(settings(f"--eval-only {path}"), train=False)
        labels = 11 - data.labels if path == "turned.pt" else data.labels
        x = T.Normalize(state["mean"], state["std"])(data.images / 255)
        loss = F.cross_entropy(logits_of(from_checkpoint(path), x), labels)
        assert f"test loss {loss:.4f}" in out and "assumed" not in err
    assert "turned.pt has other classes or another order" in outcome(
        f"{FOLDER} --teacher turned.pt --output x")


def test_classes_are_matched_by_name(small, capsys):
    root, recipe = make_folder("data"), settings(FOLDER)
    (root / "val" / "a dog").rename(root / "val" / "cow")
    shutil.copytree(root / "val" / "b cat", root / "val" / "ape")
    val = train.load_split(recipe, train=False, classes=["cow", "ape", "a dog", "b cat"])
    assert {*val.labels.tolist()} == {0, 1, 3} and "no images of a dog" in capsys.readouterr().err
    shutil.rmtree(root / "train" / "a dog")
    (root / "train" / "a dog").mkdir()
    for train_, message in ((True, "missing: a dog"), (False, "missing: a dog; unknown: ape, cow")):
        with pytest.raises(train.UserError, match=f"images of the classes of training.*{message}"):
            train.load_split(recipe, train_, None if train_ else ["a dog", "b cat"])
    assert "--data-dir nowhere has no folder train" in outcome(f"{FOLDER} --data-dir nowhere")


def test_data_sets_of_torchvision(small, monkeypatch):
    for split, wnid in itertools.product(("train", "val"), ("n02", "n01")):
        Path("data", split, wnid).mkdir(parents=True)
        PIL.Image.new("L", (50, 40)).save(f"data/{split}/{wnid}/a.JPEG")
    torch.save(({"n01": ("crane", "bird"), "n02": ("crane", "machine")}, []), "data/meta.bin")
    data = train.load_split(settings("--dataset imagenet --img-size 96"), train=False)
    assert data.classes == ["n01", "n02"] and data[[1, 0]][1].tolist() == [1, 0]
    assert data[[1, 0]][0].shape == (2, 3, 96, 96)

    class Fake(torchvision.datasets.FakeData):
        classes, targets = [f"class {i}" for i in range(100)], [3, 1, 2]
        data = np.full((3, 32, 32, 3), 7, dtype=np.uint8)

        def __init__(self, root, train, download):
            super().__init__(3, (3, 32, 32), 100)

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Fake)
    for size in (32, 40, 96):
        data = train.load_split(settings(f"--dataset cifar100 --img-size {size} -j 0"), train=True)
        images, labels = data[[0, 2]]
        assert isinstance(data.images, torch.Tensor) == (size < 65) and len(data.classes) == 100
        assert images.shape == (2, 3, size, size) and (images == 7).all()
        assert labels.tolist() == [3, 2]

    for folder in ("meta", "images/apple_pie"):
        Path("data/food-101", folder).mkdir(parents=True)
    for split in ("train", "test"):
        Path(f"data/food-101/meta/{split}.json").write_text('{"apple_pie": ["apple_pie/1"]}')
    image = Path("data/food-101/images/apple_pie/1.jpg")
    PIL.Image.new("RGB", (50, 40)).save(image)
    data = train.load_split(settings("--dataset food101 --img-size 96"), train=True)
    assert data[[0]][0].shape == (1, 3, 96, 96) and data.classes == ["apple_pie"]
    image.unlink()
    assert re.search(r"cannot read the image .*apple_pie/1.jpg", str(data[[0]]))
    data = train.load_split(settings("--dataset food101 --img-size 96 --skip-bad"), train=True)
    assert len(data) == 0

    monkeypatch.setattr(torchvision.datasets, "CIFAR10",
                        Mock(side_effect=urllib.error.URLError("no route")))
    assert re.search("cifar10 could not be loaded .*no route.* or use --dataset folder or synthet",
                     outcome("--device cpu --output run"))
    assert not Path("run").exists()


# --- Other networks -----------------------------------------------------------------------------


def test_fine_tuning_on_other_classes(pretrained, capsys):
    def fine_tune(output, more):
        assert outcome(f"--dataset folder --epochs 2 --lr 0.01 -b 4 -j 0 --device cpu {more} "
                       f"--output {output}") == "0"
        return torch.load(f"{output}/last.pt"), capsys.readouterr().out

    root, first = make_folder("data"), load_file(pretrained)
    state, text = fine_tune("a", f"--recipe finetune --init-from {pretrained}")
    images = train.open_weights(pretrained).images
    assert (state["mean"], state["std"]) == (images["mean"], images["std"])
    assert "head.fc.weight" in text  # the new one is named
    moved = [(state["model"][name] - tensor).abs().max() / tensor.abs().max()
             for name, tensor in first.items() if name.endswith("dwconv.weight")]
    assert 0 < moved[0] < moved[-1]

    frozen = f"--init-from {pretrained} --freeze-backbone --optimizer muon --drop-path 0.1"
    state, _ = fine_tune("b", frozen)
    assert settings("--resume b/last.pt --freeze-backbone").drop_path == 0.1
    for name, tensor in state["model"].items():
        changed = name.startswith("head.fc.")
        assert tensor.any() if changed else torch.equal(tensor, first[name]), name
    assert "--freeze-backbone would leave untrained: downsample_layers.0.0.weight" in outcome(
        f"{frozen} --dataset folder --patch-size 2 --output c")

    state, text = fine_tune("d", "--init-from a/weights.safetensors --lr 1e-9 --min-lr 0")
    before = load_file("a/weights.safetensors")["head.fc.weight"]
    torch.testing.assert_close(state["model"]["head.fc.weight"], before)
    assert "head.fc.weight" not in text
    for split in ("train", "val"):
        (root / split / "a dog").rename(root / split / "wolf")
    _, text = fine_tune("e", "--init-from a/weights.safetensors")  # two other classes
    assert "head.fc.weight" in text


def test_a_distilled_run(pretrained):
    """A teacher without a say changes nothing; a copy of it has no loss; its classes are ours."""
    line, losses = f"{QUICK} --epochs 2 --layer-decay 0.8 --init-from {pretrained} --output ", []
    teach = f"--teacher {pretrained} --distill-alpha"
    for more in ("plain", f"silent {teach} 0", f"half {teach} 0.5",
                 f"copy {teach} 1 --lr 1e-9 --min-lr 0 --drop-path 0"):
        assert outcome(line + more) == "0"
        losses.append([float(row["train_loss"]) for row in read_csv(
            f"{more.split()[0]}/metrics.csv")])
    assert losses[0] == losses[1] != losses[2] and losses[3][0] < 1e-3
    make_folder("data")
    for options, message in (
            (FOLDER, r"has other classes or another order: full star, .* \(8\), here a dog, b cat"),
            (f"{QUICK} --patch-size 2 --start-size 16", "takes images of 32 or more pixels")):
        assert re.search(f"UserError: {pretrained} {message}", outcome(
            f"{options} --teacher {pretrained} --output x"))


def test_the_teacher_sees_its_own_normalisation(pretrained):
    data, source = train.draw_shapes(1000, 32, seed=1), train.open_weights(pretrained)
    mean, std, x = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7]), data.images / 255
    teacher = train.load_teacher(source, Mock(
        data=Mock(classes=data.classes, mean=mean, std=std), device="cpu",
        recipe=Mock(start_size=0, img_size=32)))
    expected = logits_of(from_checkpoint(pretrained), T.Normalize(
        source.images["mean"], source.images["std"])(x))
    torch.testing.assert_close(
        teacher(train.normalize(x, mean, std)), expected, atol=1e-4, rtol=1e-4)


def test_published_weights_are_evaluated_as_timm_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_folder("data")
    network = randomise(timm.create_model("convnext_atto", num_classes=2))
    save_file(network.state_dict(), "timm.safetensors", {"format": "pt"})
    line = "--eval-only timm.safetensors --amp off --img-size 96 -j 0 --tta --dataset"
    assert outcome(f"{line} folder") == "0"
    text, images = capsys.readouterr().out, torchvision.datasets.ImageFolder(
        "data/val", timm.data.create_transform(96, interpolation="bicubic", crop_pct=0.875))
    x, labels = torch.stack([x for x, _ in images]), torch.tensor(images.targets)
    plain_, mirrored = logits_of(network, x), logits_of(network, TF.horizontal_flip(x))
    for title, logits in (("", plain_), (" with mirror images", (plain_ + mirrored) / 2)):
        loss, top1 = F.cross_entropy(logits, labels), timm.utils.accuracy(logits, labels)[0]
        assert f"timm.safetensors{title}: test loss {loss:.4f}  top-1 {top1:.2f} %" in text
    for dataset, message in (
            ("synthetic", r"timm.safetensors has other classes or .* \(2\), here full star, "),
            ("imagenet", "imagenet could not be loaded .* or use --dataset folder")):
        assert re.search(message, outcome(f"{line} {dataset}"))


# --- The notebook -------------------------------------------------------------------------------


def test_notebook(monkeypatch):
    """Runs from a clean kernel, without CIFAR-10 too; redefines nothing; was committed as run."""
    notebook = nbformat.read(HERE / "walkthrough.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        nodes = list(ast.walk(ast.parse(cell.source)))
        assert not any(isinstance(node, ast.ClassDef) for node in nodes), cell.source
        called = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert not called & {"optim", "step", "zero_grad"}, cell.source
        hidden = "hide-input" in cell.metadata.get("tags", ())  # pictures, set-up
        assert hidden or len(cell.source.splitlines()) <= 30, cell.source
        assert cell.execution_count and all(o.output_type != "error" for o in cell.outputs)
    assert (HERE / "walkthrough.ipynb").stat().st_size < 1.5e6
    monkeypatch.delenv("CIFAR10_FOLDER", raising=False)
    NotebookClient(notebook, timeout=90, resources={"metadata": {"path": HERE}}).execute()
