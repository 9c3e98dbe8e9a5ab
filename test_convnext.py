"""What is claimed, checked against timm, torchvision, PyTorch and published figures.

pytest test_convnext.py                       needs no network, no GPU and no data set
pytest test_convnext.py -m network            the published weights; downloads 460 MB
pytest test_convnext.py -m slow               all variants in full; needs 6 GB of memory
pytest test_convnext.py -k both_ways -rP      prints the largest difference of logits

claim                                     checked against        test_...
----------------------------------------  ---------------------  ------------------------
the network computes what others compute  timm, torchvision,     the_same_function_both_ways
                                          transformers
its gradients are theirs                  timm, torchvision      same_gradients_as_timm_...
its sizes and costs are published ones    the papers' tables     published_size_and_cost
a step of the road is the paper's         table 10, torchvision  road_costs_what_the_paper_...
the fast gradient is a gradient           gradcheck, PyTorch     depthwise_gradient_is_...
a training step does what it should       PyTorch's optimizers   steps_are_pytorchs
Muon is Muon, for filters too             torch.optim.Muon       muon_is_pytorchs
the learning rate follows its schedule    PyTorch's schedulers   learning_rate_is_pytorchs
augmentation draws what the paper means   timm, torchvision      rand_augment_..., random_erase_...
accuracy is measured right                timm                   evaluation_is_timms
the test images choose nothing            what evaluate is sent  held_out_images_choose_...
a stopped run goes on to the same bits    an unbroken run        a_stopped_run_ends_with_...
a run learns                              chance                 a_run_learns

First come the tests of what the network and its training compute, in the order of
convnext.py and train.py. They end at the line "What follows is about files, signals and
machines". A reader can skip the rest, which has the same order.
"""

import argparse
import ast
import contextlib
import copy
import csv
import dataclasses
import errno
import gc
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import unicodedata
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
    warnings.simplefilter("ignore")  # pytest wants markers declared in a file of its own
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


# --- The network ------------------------------------------------------------------------


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


# --- The road ---------------------------------------------------------------------------


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


# --- The fast depthwise convolution -----------------------------------------------------


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


# --- The recipe -------------------------------------------------------------------------
# From here on: train.py, in its order. A test states what a run has to do, and does not
# compare a run with itself. Nearly all take a network of two blocks.


SMALLEST = "--depths 1 1 --dims 8 16 --patch-size 4 --device cpu --amp off -j 0"
# 100 training images of 8 shapes: 3 steps an epoch
QUICK = f"{SMALLEST} --dataset synthetic -b 32"
PLAIN = "--crop-padding 0 --flip 0 --rand-augment 0 --random-erase 0 --mix-prob 0"
FOLDER = f"{SMALLEST} --dataset folder -b 4 --epochs 1"  # 3 steps an epoch
LARGE = f"{FOLDER} --img-size 72"  # these are read when they are needed
posix = pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """An empty folder, 100 training and 20 test images of shapes in place of 5,000 and
    1,000, and one block per stage on the road. The machine's settings stay as they
    were."""
    draw = train.draw_shapes

    def draw_fewer(count, size, seed):
        return draw(count // 50, size, seed)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "draw_shapes", draw_fewer)
    monkeypatch.setattr(train, "tune_backends", lambda: None)
    for step, design in convnext.DESIGNS.items():
        monkeypatch.setitem(convnext.DESIGNS, step, design._replace(depths=(1, 1, 1, 1)))
    train.note.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several are slower with such small networks
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return request.param


def settings(line):
    """The recipe that a command line comes to."""
    typed = train.parse(shlex.split(line))
    origin = typed.get("resume") or typed.get("eval_only") or typed.get("init_from")
    return train.combine(typed, train.open_source(origin) if origin else None)


def prepared(line):
    """The run that a command line begins, before its first step."""
    recipe = settings(f"{line} --output run")
    return train.prepare_run(recipe, train.prepare_data(recipe), None)


def outcome(line):
    """The exit code of a command line, or its error. Any other exception is a failure."""
    try:
        return str(train.main(shlex.split(line)))
    except (train.UserError, SystemExit, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"


def spy(monkeypatch, name, record):
    """Pass the arguments of train's function to `record` before each call."""
    function = getattr(train, name)

    def recorded(*args, **more):
        record(*args, **more)
        return function(*args, **more)

    monkeypatch.setattr(train, name, recorded)


def scores_of(model, images, labels, mean, std):
    """Loss and top-1 by PyTorch alone."""
    x = T.Normalize(list(mean), list(std))(images / 255)
    with torch.inference_mode():
        logits = model.eval()(x)
    top1 = 100 * (logits.argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels).item(), top1.item()


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.fixture
def pretrained(small):
    """The weights of a short run with eight classes and statistics of its own."""
    line = f"{QUICK} --epochs 1 --lr 0.002 --layer-scale 0.1 --output first"
    assert outcome(line) == "0"
    return "first/weights.safetensors"


def make_folder(root, classes=("b cat", "a dog"), splits=("train", "val"), images=6):
    """root/split/class/picture, of different sizes and kinds."""
    generator = np.random.default_rng(0)
    for split, (label, name) in itertools.product(splits, enumerate(classes)):
        folder = Path(root, split, name)
        folder.mkdir(parents=True)
        for i, mode in enumerate(("RGB", "L", "P", "CMYK", "RGB", "RGBA")[:images]):
            pixels = generator.integers(0, 100, (40 + 9 * i, 70 - 5 * i, 3)) + 100 * label
            image = PIL.Image.fromarray(pixels.astype(np.uint8)).convert(mode)
            image.save(folder / f"ünï {i}.{'jpg' if mode in ('L', 'CMYK') else 'png'}")
    return Path(root)


def load(line, train_split=True, classes=None):
    return train.load_split(settings(line), train_split, classes)


WITHOUT_AUGMENTATION = {"crop_padding": 0, "flip": 0, "rand_augment": 0,
                        "random_erase": 0, "mix_prob": 0}


@pytest.mark.parametrize(("variant", "drop_path", "ema_horizon"), [
    ("tiny", 0, 0), ("small", 0.1, 0), ("base", 0.2, 0), ("v2_base", 0.2, 0),
    ("large", 0.3, 0), ("xlarge", 0.4, 0.13), ("v2_huge", 0.4, 0)])
def test_fine_tuning_by_size(variant, drop_path, ema_horizon):
    table = train.finetune(train.Recipe(variant=variant, batch_size=512))
    assert (table["drop_path"], table["ema_horizon"]) == (drop_path, ema_horizon)
    assert (table["lr"], table["min_lr"]) == (5e-5, 1e-6)


def test_images_are_small_for_a_share_of_the_epochs():
    recipe = train.Recipe(start_size=16, epochs=10, start_share=0.3)
    assert [recipe.size_at(epoch) for epoch in range(10)] == [16] * 3 + [32] * 7
    assert train.Recipe().size_at(0) == 32


# --- The run ----------------------------------------------------------------------------


def received(monkeypatch, line):
    """What train_step is given in each step of a run: images, targets and the random
    seed."""
    steps = []

    def record(model, optimizers, x, targets, *_):
        content = x.numpy().tobytes() + targets.numpy().tobytes()
        steps.append((content, torch.initial_seed()))

    with monkeypatch.context() as patch:
        spy(patch, "train_step", record)
        assert outcome(f"{line} --epochs 3 --output received") == "0"
    shutil.rmtree("received")
    return steps


def test_random_numbers_follow_from_seed_and_step(small, monkeypatch):
    """Images, augmentation and stochastic depth differ in each step, and with each
    seed."""
    steps = received(monkeypatch, f"{QUICK} --seed 1")
    assert steps == received(monkeypatch, f"{QUICK} --seed 1")
    others = received(monkeypatch, f"{QUICK} --seed 2")
    contents, seeds = zip(*steps + others)
    assert len(set(contents)) == len(set(seeds)) == 18


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_no_bit(small, monkeypatch, workers):
    assert (received(monkeypatch, f"{QUICK} -j {workers}")
            == received(monkeypatch, QUICK))


def test_the_same_images_are_augmented_by_seed_and_step(small):
    recipe = settings(f"{QUICK} --mix-prob 0")
    data, numbers = train.prepare_data(recipe), [*range(8)]
    batches = [train.TrainingBatches(data, dataclasses.replace(recipe, seed=seed),
        epoch_steps=3)[
        step, numbers][0] for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert torch.equal(batches[0], batches[1])
    for one, other in itertools.combinations(batches[1:], 2):
        assert not any(map(torch.equal, one, other))


def test_initial_weights_follow_from_the_seed(small):
    models = [prepared(f"{QUICK} --seed {seed}").model.state_dict() for seed in (0, 0, 1)]
    name = "stages.0.0.dwconv.weight"
    assert torch.equal(models[0][name], models[1][name])
    assert not torch.equal(models[0][name], models[2][name])


def test_without_augmentation_the_network_sees_every_training_image_once(small,
                                                                         monkeypatch):
    """Normalized with the training images' statistics, and with its own label."""
    seen = []
    spy(monkeypatch, "train_step", lambda model, optimizers, x, targets, *_: seen.append(
        (x.clone(), targets.clone())))
    assert outcome(f"{QUICK} {PLAIN} -b 25 --epochs 1 --output run") == "0"
    x, targets = map(torch.cat, zip(*seen))
    images = train.draw_shapes(5000, 32, seed=1)
    pixels = images.images.double() / 255
    mean, std = pixels.mean((0, 2, 3), True), pixels.std((0, 2, 3), False, keepdim=True)
    expected = ((pixels - mean) / std).float()
    order = torch.cdist(x.flatten(1), expected.flatten(1)).argmin(1)
    assert sorted(order.tolist()) == [*range(100)] != order.tolist()
    torch.testing.assert_close(x, expected[order], atol=1e-5, rtol=1e-5)
    assert torch.equal(targets, F.one_hot(images.labels[order], 8).float())


def measured(monkeypatch, line):
    """(images, which model, tta) of each evaluation in a run."""
    calls, run = [], []
    spy(monkeypatch, "train", run.append)

    def record(model, batches, mean, std, precision, tta=False):
        models = {"raw": run[0].model, "average": run[0].best_model}
        names = [name for name, its_model in models.items()
                 if model is its_model or model is run[0].ema]
        assert torch.equal(mean, run[0].data.mean) and torch.equal(std, run[0].data.std)
        batches = list(batches)
        images = torch.cat([images for images, _ in batches])
        calls.append((images.numpy().tobytes(),
                      names[-1] if model is not run[0].model else "raw", tta))
        return evaluate(model, batches, mean, std, precision, tta)

    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", record)
    assert outcome(f"{line} --output run") == "0"
    return calls, run[0]


def test_held_out_images_choose_and_test_images_report(small, monkeypatch):
    calls, run = measured(monkeypatch,
                          f"{QUICK} --epochs 2 --val-size 30 --ema-horizon 0.5 --tta")
    val = run.data.val.images.numpy().tobytes()
    test = train.draw_shapes(1000, 32, seed=0).images.numpy().tobytes()
    assert calls[:4] == 2 * [(val, "raw", False), (val, "average", False)]
    # last, best
    assert calls[4:] == 2 * [(test, "average", False), (test, "average", True)]


def test_without_held_out_images_the_test_images_are_measured(small, monkeypatch):
    calls, _ = measured(monkeypatch, f"{QUICK} --epochs 1 --ema-horizon 0")
    test = train.draw_shapes(1000, 32, seed=0).images.numpy().tobytes()
    assert calls == 2 * [(test, "raw", False)]
    assert not Path("run/best.pt").exists()


@pytest.mark.parametrize(("horizon", "column", "scores"), [
    (0.5, "val_ema_top1", [1, 2, 2, 9, 11, 5]), (0, "val_top1", [1, 9, 9])])
def test_best_is_the_first_epoch_that_is_best(small, monkeypatch, horizon, column,
                                              scores):
    """The second, by the averaged weights if there are any. (Scores: raw, average, raw,
    ...)"""
    scores = iter(scores)
    evaluate = train.evaluate

    def score(*args):
        score = {"top1": next(scores)} if len(args) == 5 else {}  # not in the report
        return evaluate(*args) | score

    monkeypatch.setattr(train, "evaluate", score)
    line = f"{QUICK} --epochs 3 --val-size 30 --ema-horizon {horizon} --output run"
    assert outcome(line) == "0"
    state = torch.load("run/best.pt", weights_only=True)
    assert state["history"][-1]["epoch"] == 2 and state["history"][-1][column] == 9
    assert state["step"] == 4  # 70 images: 2 steps an epoch


def test_held_out_images_are_not_trained_on(small):
    data = train.prepare_data(settings(f"{QUICK} --val-size 30"))
    learned, held_out, whole = ({image.numpy().tobytes() for image in part.images}
        for part in (
        data.train, data.val, train.draw_shapes(5000, 32, seed=1)))
    assert (len(learned), len(held_out)) == (70, 30)
    assert not learned & held_out and learned | held_out == whole


def test_the_average_is_what_is_saved_and_reported(small, monkeypatch, capsys):
    """At a horizon of three steps, where it differs from the weights."""
    path, name = [], "stages.1.0.mlp.pwconv1.weight"
    step = train.train_step

    def record(model, *args):
        loss = step(model, *args)
        path.append(model.state_dict()[name].clone())
        return loss

    monkeypatch.setattr(train, "train_step", record)
    assert outcome(f"{QUICK} --lr 0.01 --epochs 2 --ema-horizon 0.5 --output run") == "0"
    average = path[0]
    for weights in path[1:]:
        average = average + (weights - average) / 3
    saved, state = load_file("run/weights.safetensors"), torch.load("run/last.pt")
    torch.testing.assert_close(saved[name], average)
    assert all(torch.equal(saved[key], state["ema"][f"module.{key}"]) for key in saved)
    assert torch.equal(state["model"][name], path[-1])
    assert not torch.allclose(saved[name], path[-1], rtol=1e-3)

    text, row = capsys.readouterr().out, read_csv("run/metrics.csv")[-1]
    test = train.draw_shapes(1000, 32, seed=0)
    for prefix, weights in (("test_ema", "run/weights.safetensors"),
                            ("test", state["model"])):
        loss, top1 = scores_of(
            from_checkpoint(weights), test.images, test.labels, state["mean"],
            state["std"])
        assert float(row[f"{prefix}_loss"]) == pytest.approx(loss, rel=1e-5)
        assert float(row[f"{prefix}_top1"]) == pytest.approx(top1)
    loss, top1, top5 = (float(row[f"test_ema_{name}"]) for name
                        in ("loss", "top1", "top5"))
    line = f"test loss {loss:.4f}  top-1 {top1:.2f} %"
    assert f"run/last.pt: {line}  top-5 {top5:.2f} %  of 20 images" in text
    for file in ("last.pt", "weights.safetensors"):
        assert outcome(f"--eval-only run/{file} --device cpu --amp off") == "0"
        assert f"run/{file}: {line}" in capsys.readouterr().out


def test_metrics_are_the_steps_means(small, monkeypatch):
    losses, lrs = [], []
    step = train.train_step

    def record(model, optimizers, x, targets, lr, *more):
        losses.append(step(model, optimizers, x, targets, lr, *more).item())
        lrs.append(lr)
        return torch.tensor(losses[-1])

    monkeypatch.setattr(train, "train_step", record)
    assert outcome(f"{QUICK} --epochs 5 --eval-every 2 --min-lr 5e-4 --output run") == "0"
    rows = read_csv("run/metrics.csv")
    assert [row["epoch"] for row in rows] == [*"12345"]
    assert [bool(row["test_top1"]) for row in rows] == [False, True, False, True, True]
    means = torch.tensor(losses, dtype=torch.double).view(5, 3).mean(1).tolist()
    assert [float(row["train_loss"]) for row in rows] == pytest.approx(means, rel=1e-5)
    assert [float(row["lr"]) for row
            in rows] == lrs[2::3] and lrs[-1] == pytest.approx(5e-4)
    for row in rows:
        images = float(row["images_per_s"]) * float(row["seconds"])
        assert images == pytest.approx(96) and 0 < float(row["data_share"]) < 1


def test_a_run_learns(small, monkeypatch):
    """Eight shapes, 1,000 images of them six times: from 12.5 % to some 55 %."""
    draw = train.draw_shapes

    def draw_more(count, size, seed):
        return draw(10 * count, size, seed)

    monkeypatch.setattr(train, "draw_shapes", draw_more)
    line = f"{QUICK} --epochs 6 --lr 4e-3 --optimizer muon --mix-prob 0 --rand-augment 0"
    assert outcome(f"{line} --random-erase 0 --output run") == "0"
    row = read_csv("run/metrics.csv")[-1]
    assert float(row["test_ema_top1"]) > 40 and float(row["train_loss"]) < 1.5


@pytest.mark.parametrize(("line", "seen"), [
    ("--drop-path 0.3", lambda run: run.model.stages[1][0].drop_path.p == 0.3),
    ("--head-init-scale 0.5", lambda run: 0.4 < run.model.head.fc.weight.std() / 0.02
     < 0.6),
    ("--layer-scale 0.3", lambda run: (run.model.stages[0][0].layer_scale.gamma
                                       == 0.3).all()),
    ("--init paper", lambda run: 0.015 < run.model.stages[1][0].dwconv.weight.std()
     < 0.025),
    ("--init fan-in", lambda run: 0.1 < run.model.stages[1][0].dwconv.weight.std()
     < 0.15),
    ("--grn", lambda run: hasattr(run.model.stages[0][0].mlp, "grn")),
    ("--patch-size 2", lambda run: run.model.downsample_layers[0][0].stride == (2, 2)),
    ("--beta2 0.5", lambda run: run.optimizers[0].param_groups[0]["betas"] == (0.9, 0.5)),
    ("--wd 0.7", lambda run: {g["weight_decay"] for g in run.optimizers[0].param_groups}
     == {0.7, 0}),
    ("--optimizer sgd", lambda run: run.optimizers[0].param_groups[0]["momentum"] == 0.9),
    ("--optimizer muon --muon-lr 0.3",
     lambda run: run.optimizers[1].param_groups[0]["lr_scale"] == pytest.approx(300)),
    ("--layer-decay 0.5",
     lambda run: min(g["lr_scale"] for g in run.optimizers[0].param_groups) == 0.125),
    ("--amp bf16", lambda run: run.precision == torch.bfloat16),
    ("--amp off", lambda run: run.precision == torch.float32
     and not run.scaler.is_enabled()),
    ("--ema-horizon 0", lambda run: run.ema is None and run.best_model is run.model),
    ("--epochs 7 -b 50", lambda run: (run.epoch_steps, run.total) == (2, 14)),
    ("-b 128", lambda run: run.epoch_steps == 1)],
    ids=lambda value: value if type(value) is str else "")
def test_a_flag_reaches_the_run(small, line, seen):
    assert seen(prepared(f"{QUICK} {line}"))


def test_on_a_cpu_the_network_is_sped_up(small):
    assert isinstance(prepared(QUICK).model.stages[0][0].dwconv,
                      convnext.FastDepthwiseConv)


def test_flags_reach_the_step(small, monkeypatch):
    seen = []
    spy(monkeypatch, "train_step", lambda *args: seen.append(args))
    line = "--amp bf16 --lr 0.01 --schedule linear --warmup-epochs 1 --min-lr 0.001"
    assert outcome(f"{QUICK} {line} --epochs 4 --output run") == "0"
    rise, fall = [0.01 / 3, 0.02 / 3, 0.01], [0.01 - 0.001 * i for i in range(9)]
    assert [args[4] for args in seen] == pytest.approx(rise + fall)
    recipe, precision, scaler, teacher = seen[0][5:]
    assert recipe == settings(f"{QUICK} {line} --epochs 4 --output run")
    assert precision == torch.bfloat16 and not scaler.is_enabled() and teacher is None


def test_images_grow_and_mixing_ends(small, monkeypatch):
    seen = []
    spy(monkeypatch, "train_step", lambda model, optimizers, x, targets, *_: seen.append(
        (x.shape[-1], bool((targets.max(1).values < 1).any()))))
    assert outcome(f"{QUICK} --start-size 16 --epochs 4 -b 50 --mix-off-epochs 1 "
                   "--output run") == "0"
    assert seen == [(16, True)] * 4 + [(32, True)] * 2 + [(32, False)] * 2


def at_call(number, function, action):
    """The function, but before its call of this number the action happens."""
    calls = itertools.count(1)

    def wrapped(*args, **more):
        if next(calls) == number:
            action()
        return function(*args, **more)

    return wrapped


def interrupt():
    signal.raise_signal(signal.SIGINT)


VARIABLE = ("seconds", "images_per_s", "data_share", "waiting", "output", "resume",
            "workers")  # times and places


def without_times(content):
    """Nested content with tensors as bytes, to be compared whole."""
    if isinstance(content, dict):
        return {name: without_times(value) for name, value in content.items()
                if name not in VARIABLE}
    if isinstance(content, list | tuple):
        return [without_times(value) for value in content]
    return content.numpy().tobytes() if isinstance(content, torch.Tensor) else content


@pytest.mark.parametrize(("line", "at_resume"), [
    pytest.param(f"{QUICK} --val-size 20", "", id="adamw"),
    pytest.param(f"{QUICK} --optimizer muon --ema-horizon 0.5 --start-size 16", "",
                 id="muon, average, growing images"),
    pytest.param(f"{QUICK} --teacher first/last.pt --accumulate 2 --clip-grad 1", "-j 1",
                 id="teacher, accumulation"),
    pytest.param(f"{QUICK} --amp bf16", "", id="bfloat16", marks=pytest.mark.skipif(
        not train.cpu_has_bfloat16(), reason="slow on this CPU")),
    pytest.param(f"{SMALLEST} --dataset folder -b 4 --img-size 72 -j 1", "-j 2",
                 id="random crops in workers"),
    pytest.param(f"{QUICK} --road ResNet-50 --width 8 --optimizer sgd", "",
                 id="BatchNorm")])
def test_a_stopped_run_ends_with_the_same_bits(request, monkeypatch, line, at_resume):
    """Stopped in the middle of the second of three epochs of three steps."""
    request.getfixturevalue("pretrained" if "first" in line else "small")
    if "folder" in line:
        make_folder("data")
    if "--road" in line:
        line = line.replace("--depths 1 1 --dims 8 16", "")
    line += " --epochs 3 --output "
    assert outcome(line + "whole") == "0"
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", at_call(5, train.train_step, interrupt))
        assert outcome(line + "parts") == "130"
    assert torch.load("parts/last.pt", weights_only=True)["step"] == 5
    torch.rand(7)  # the random state at the time does not matter
    assert outcome(f"--resume parts/last.pt {at_resume}") == "0"
    for name, read in (("last.pt", torch.load), ("metrics.csv", read_csv),
                       ("weights.safetensors", load_file)):
        whole_, parts = (without_times(read(f"{run}/{name}")) for run
                         in ("whole", "parts"))
        assert parts == whole_, name


# --- One step ---------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "parts", "tolerance"), [
    ("adamw", 3, 0.01), ("sgd", 1, 0.01),
    ("muon", 1, 0.2)])  # in bfloat16, which rounds small singular values
def test_steps_are_pytorchs(device, optimizer, parts, tolerance):
    """With parts of unequal size, clipping, two optimizers and a factor for each
    group."""
    recipe = train.Recipe(optimizer=optimizer, accumulate=parts, weight_decay=0.3,
                          clip_grad=0.5, lr=1.0 if optimizer == "sgd" else 1e-3)
    ours = randomise(convnext.ConvNeXt((1, 1), (8, 16), num_classes=8)).to(device).train()
    theirs = copy.deepcopy(ours)
    before = copy.deepcopy(ours.state_dict())
    groups = {"flat": [], "matrices": [], "filters": []}
    for name, p in theirs.named_parameters():
        matrix = optimizer == "muon" and "pwconv" in name
        groups["flat" if p.ndim == 1 else "matrices" if matrix else "filters"].append(p)
    decayed = [{"params": groups["filters"], "weight_decay": 0.3},
               {"params": groups["flat"], "weight_decay": 0}]
    if optimizer == "sgd":
        peers = [torch.optim.SGD(decayed, lr=1, momentum=0.9)]
    else:
        peers = [torch.optim.AdamW(decayed, betas=(0.9, 0.999))]
    if optimizer == "muon":
        peers.append(torch.optim.Muon(groups["matrices"], weight_decay=0.3))
    optimizers = train.make_optimizers(ours, recipe, torch.bfloat16)
    for step in range(4):
        x = torch.randn(20, 3, 32, 32, device=device)
        y = torch.randn(20, 8, device=device).softmax(1)
        lr = recipe.lr * (1 - step / 8)
        loss = train.train_step(ours, optimizers, x, y, lr, recipe)
        expected = F.cross_entropy(theirs(x), y, label_smoothing=0.1)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-3, atol=1e-3)
        expected.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for peer_, factor in zip(peers, (1, 20)):
            for group in peer_.param_groups:
                group["lr"] = factor * lr
            peer_.step()
            peer_.zero_grad()
    for name, p in theirs.state_dict().items():
        moved = (p - before[name]).norm()
        assert (ours.state_dict()[name] - p).norm() <= tolerance * moved > 0, name


@pytest.mark.parametrize("clip_grad", [0, 0.5])
def test_float16_with_a_scaler_is_the_step_without(device, clip_grad):
    """Clipping sees the unscaled gradient, and an infinite one leaves the weights as they
    were."""
    recipe = train.Recipe(clip_grad=clip_grad, optimizer="sgd", label_smoothing=0)
    model = randomise(convnext.ConvNeXt((1, 1), (8, 16), num_classes=8)).to(device)
    start = copy.deepcopy(model.state_dict())
    x = torch.randn(8, 3, 32, 32, device=device)
    y = F.one_hot(torch.arange(8, device=device)).float()
    moved = []
    for precision in (torch.float32, torch.float16):
        model.load_state_dict(start)
        scaler = torch.amp.GradScaler(device, enabled=precision == torch.float16,
                                      init_scale=1024)
        optimizers = train.make_optimizers(model, recipe)
        train.train_step(model, optimizers, x, y, 0.1, recipe, precision, scaler)
        moved.append(torch.cat([(p - start[name]).flatten()
                                for name, p in model.named_parameters()]))
    assert (moved[0] - moved[1]).norm() < 0.02 * moved[0].norm()
    after = copy.deepcopy(model.state_dict())
    train.train_step(model, optimizers, x * math.inf, y, 0.1, recipe, precision, scaler)
    assert all(torch.equal(p, after[name]) for name, p in model.state_dict().items())
    assert scaler.get_scale() == 512


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_step_and_evaluation_compute_in_their_precision(device, precision):
    """The weights stay in float32."""
    model, seen = convnext.ConvNeXt((1,), (8,), num_classes=3).to(device), []
    model.head.fc.register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    x, labels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2)
    targets = F.one_hot(labels, 3).float().to(device)
    recipe = train.Recipe()
    optimizers = train.make_optimizers(model, recipe)
    train.train_step(model, optimizers, x.float().to(device), targets, 1e-3, recipe,
                     precision)
    train.evaluate(model, [(x, labels)], torch.zeros(3), torch.ones(3), precision)
    assert seen == [precision, precision]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_distillation_loss_is_hintons():
    ours, theirs = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    p, q = ((x / 3).softmax(1) for x in (theirs, ours))
    loss = train.distillation_loss(ours, theirs, 3.0)
    torch.testing.assert_close(loss, 9 * (p * (p / q).log()).sum() / 5)
    assert train.distillation_loss(theirs, theirs, 3.0) == 0
    gradient, = torch.autograd.grad(loss, ours)
    torch.testing.assert_close(gradient, 3 * (q - p) / 5)


def test_the_loss_is_smoothed_for_mixed_targets_too():
    logits, targets = torch.randn(5, 7), torch.randn(5, 7).softmax(1)
    smoothed = 0.8 * targets + 0.2 / 7
    expected = -(smoothed * logits.log_softmax(1)).sum(1).mean()
    recipe = train.Recipe(label_smoothing=0.2)
    torch.testing.assert_close(train.training_loss(recipe, logits, targets), expected)


def test_the_teachers_share_of_the_loss():
    logits, theirs, targets = (torch.randn(5, 7) for _ in range(3))
    recipe = train.Recipe(distill_alpha=0.25, distill_temperature=3)
    expected = (0.75 * train.training_loss(recipe, logits, targets)
                + 0.25 * train.distillation_loss(logits, theirs, 3))
    torch.testing.assert_close(train.training_loss(recipe, logits, targets, theirs),
                               expected)


# --- Evaluation -------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True], ids=["plain", "mirrored"])
def test_evaluation_is_timms(device, mirrored):
    """In evaluation mode: with stochastic depth, the training mode would give other
    numbers."""
    data = train.draw_shapes(260, 32, seed=0)  # more than a batch
    model = randomise(convnext.ConvNeXt((1, 1), (8, 16), num_classes=8,
                                        drop_path=0.9)).to(device)
    mean, std = torch.tensor([0.3, 0.4, 0.5]), torch.tensor([0.2, 0.3, 0.4])
    x = T.Normalize(mean.tolist(), std.tolist())(data.images / 255).to(device)
    with torch.inference_mode():
        logits = model.eval()(x).cpu()
        if mirrored:
            logits = (logits + model(TF.horizontal_flip(x)).cpu()) / 2
    expected = [F.cross_entropy(logits, data.labels), *timm.utils.accuracy(
        logits, data.labels, (1, 5))]
    scores = train.evaluate(model.train(), train.evaluation_batches(data, 0), mean, std,
                            torch.float32, mirrored)
    assert [*scores] == ["loss", "top1", "top5"]
    assert [*scores.values()] == pytest.approx([e.item() for e in expected], rel=1e-4)


def test_top5_of_three_classes_is_all():
    model = randomise(convnext.ConvNeXt((1,), (8,), num_classes=3))
    batch = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4) % 3
    one = torch.ones(3)
    assert train.evaluate(model, [batch], one, one, torch.float32)["top5"] == 100


@pytest.mark.parametrize(("size", "given", "share", "mode"), [
    (224, None, 0.875, "center"), (288, 0.95, 0.95, "center"), (384, None, 1.0, "squash"),
    (384, 0.9, 0.9, "center"), (32, None, 1.0, "center"), (64, 0.5, 1.0, "center")])
def test_evaluation_square_is_timms(size, given, share, mode):
    picture = PIL.Image.effect_noise((500, 375), 80).convert("RGB")
    theirs = timm.data.create_transform(
        size, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1), crop_pct=share,
        crop_mode=mode)(picture)
    ours = TF.pil_to_tensor(train.evaluation_square(size, given)(picture))
    torch.testing.assert_close(ours / 255, theirs)


# --- The optimizers ---------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_is_pytorchs(schedule):
    optimizer, lrs = torch.optim.SGD([nn.Parameter(torch.zeros(1))],
                                     0.3), torch.optim.lr_scheduler
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


def parameter_names(model, group):
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in group["params"]]


@pytest.mark.parametrize("variant", ["atto", "v2_atto"])
def test_weight_decay_groups_are_timms(variant):
    model = create_convnext(variant)
    ours, theirs = ({(group["weight_decay"], *sorted(parameter_names(model, group)))
                     for group in groups} for groups in (
        train.parameter_groups(model, 0.05), timm.optim.param_groups_weight_decay(model,
                                                                                  0.05)))
    assert ours == theirs


def test_attentions_bias_does_not_decay():
    attention = nn.Sequential(convnext.WindowAttention(16, False))
    undecayed, = (parameter_names(attention, group)
                  for group in train.parameter_groups(attention, 0.1)
                  if not group["weight_decay"])
    assert undecayed == ["0.bias", "0.qkv.bias", "0.proj.bias"]


def test_muon_gets_the_matrices_of_blocks():
    model = convnext.ConvNeXt((1, 1), (8, 16), grn=True)
    adamw, muon = train.make_optimizers(model,
                                        train.Recipe(optimizer="muon", layer_decay=0.8))
    expected = {name for name, _ in model.named_parameters()
                if re.search(r"pwconv\d.weight", name)}
    found, rest = (set(itertools.chain(*(parameter_names(model, group)
                                         for group in optimizer.param_groups)))
                   for optimizer in (muon, adamw))
    assert found == expected and rest == dict(model.named_parameters()).keys() - expected
    scales = [group["lr_scale"] for group in muon.param_groups]  # 20 times AdamW's
    assert scales == pytest.approx([20 * 0.8**2, 20 * 0.8])


def test_muon_gets_the_dense_filters_of_the_road():
    model = convnext.roadmap_network(convnext.DESIGNS["ResNet-50"]._replace(
        depths=(1, 1), width=8))
    _, muon = train.make_optimizers(model, train.Recipe(optimizer="muon",
                                                        road="ResNet-50"))
    shapes = [tuple(p.shape[2:]) for group in muon.param_groups for p in group["params"]]
    # branches and shortcuts
    assert shapes.count((3, 3)) == 2 and shapes.count((1, 1)) == 6
    model = convnext.roadmap_network(convnext.DESIGNS["depthwise conv"]._replace(
        depths=(1, 1), width=8))
    _, muon = train.make_optimizers(model, train.Recipe(optimizer="muon",
                                                        road="depthwise conv"))
    assert not [p for group in muon.param_groups for p in group["params"]
                if p.shape[2:] == (3, 3)]


def test_a_frozen_backbone_leaves_one_optimizer():
    model = convnext.ConvNeXt((1, 1), (8, 16))
    train.freeze_all_but_classifier(model)
    alone, = train.make_optimizers(model, train.Recipe(optimizer="muon"))
    assert [parameter_names(model, group) for group in alone.param_groups] == [
        ["head.fc.weight"], ["head.fc.bias"]]


@pytest.mark.parametrize(("variant", "decay", "expected"), [
    # 0.8 ** (13 - i) for the authors' layers i: stem, stages 1 and 2, 27 blocks by 3
    ("base", 0.8, (0.0550, 0.0687, 0.0859, 0.1074, 0.1342, 0.1678, 0.2097, 0.2621, 0.3277,
                   0.4096, 0.5120, 0.6400, 0.8, 1)),
    ("tiny", 0.7, tuple(0.7**i for i in range(7, -1, -1)))])
def test_layer_decay_is_the_authors(variant, decay, expected):
    with torch.device("meta"):
        model = create_convnext(variant)
    scales = {name: group["lr_scale"] for group
              in train.parameter_groups(model, 0.05, decay)
              for name in parameter_names(model, group)}
    last = len(expected) - 1
    layers = {"downsample_layers.0.": 0, "stages.0.": 1, "downsample_layers.1.": 2,
              "stages.1.": 2, "downsample_layers.2.": 3, "downsample_layers.3.": last - 1,
              "stages.3.": last - 1, "head.": last}
    layers |= {f"stages.2.{block}.": 3 + block // 3 for block
               in range(len(model.stages[2]))}
    for name, _ in model.named_parameters():
        layer = next(layer for part, layer in layers.items() if name.startswith(part))
        assert scales[name] == pytest.approx(expected[layer], abs=5e-5), name


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16), (12, 3, 3, 3),
                                   (6, 8, 2, 2)], ids=str)
def test_muon_is_pytorchs(shape):
    """On filters, it is torch.optim.Muon on their flattened copies."""
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    muon = train.Muon([{"params": [ours], "weight_decay": 0.3}], 0.02, torch.bfloat16)
    peer_ = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.3)
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.flatten(1).clone()
        muon.step()
        peer_.step()
    moved = (theirs - start.flatten(1)).norm()
    assert (ours.flatten(1) - theirs).norm() < 0.03 * moved  # bfloat16's rounding


@pytest.mark.parametrize("shape", [(40, 10), (10, 40), (30, 30)], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_orthogonalize_changes_the_singular_values_alone(shape, scale):
    """By five steps of Muon's polynomial, and from 0.1 ... 1 to near 1."""
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(0.1, 1, min(shape))
    y = u.T @ train.orthogonalize(scale * (u * values) @ v) @ v.T
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(y, values.diag(), atol=1e-4, rtol=0)
    assert 0.65 < values.min() and values.max() < 1.25


def test_the_average_of_weights_is_a_running_mean():
    """Of BatchNorm's statistics, too, but not of whole numbers such as attention's
    index."""
    model = nn.Sequential(nn.BatchNorm2d(2))
    average = train.average_of(model, 4)
    expected = None
    for step in range(5):
        model[0].weight.data.fill_(step)
        model[0].running_mean.fill_(10 * step)
        average.update_parameters(model)
        expected = step if expected is None else expected + (step - expected) / 4
    assert average.module[0].weight[0].item() == pytest.approx(expected)
    assert average.module[0].running_mean[0].item() == pytest.approx(10 * expected)
    attention = nn.Sequential(convnext.WindowAttention(16, False))
    # would change 661 of its entries in 30 steps
    average = train.average_of(attention, 10)
    for _ in range(30):
        average.update_parameters(attention)
    assert torch.equal(average.module[0].index, attention[0].index)


# --- Fine-tuning and teachers -----------------------------------------------------------


def test_fan_in_initialisation():
    """The layers' weights, and with them the branch of a block of 40 channels beside its
    input."""
    model, x = create_convnext("atto", layer_scale=0), torch.randn(4, 40, 16, 16)
    loudness, deviations = [], {}
    for init in (lambda model: None, train.fan_in_init):
        init(model)
        loudness.append((model.stages[0][0].eval()(x) - x).std().item())
    assert loudness[0] < 0.03 and 0.08 < loudness[1] < 0.2
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            scaled = module.weight.std().item() * module.weight[0].numel() ** 0.5
            deviations.setdefault(name.split(".")[-1], []).append(scaled)
    # what cutting a normal distribution at two standard deviations leaves of them
    cut = 0.88
    for name, count, expected in (
            ("0", 1, cut), ("1", 3, cut), ("dwconv", 12, cut), ("pwconv1", 12, cut),
            ("pwconv2", 12, cut / 24**0.5), ("fc", 1, 0.02 * 320**0.5)):
        assert deviations.pop(name) == pytest.approx([expected] * count, rel=0.06), name
    assert not deviations


def fine_tune(line):
    usual = "--dataset folder --epochs 2 --lr 0.01 -b 4 -j 0 --device cpu --amp off"
    assert outcome(f"{usual} {line} --output tuned") == "0"
    return torch.load("tuned/last.pt", weights_only=True)


def test_fine_tuning_begins_with_the_weights(pretrained, capsys):
    make_folder("data")
    state = fine_tune(f"--recipe finetune --init-from {pretrained} --lr 1e-9 --min-lr 0")
    source = train.open_source(pretrained)
    assert (state["mean"], state["std"]) == (source.expects["mean"],
                                             source.expects["std"])
    for name, tensor in source.tensors.items():
        if "head.fc" not in name:
            torch.testing.assert_close(state["model"][name], tensor, atol=1e-6, rtol=1e-6)
    assert len(state["model"]["head.fc.weight"]) == 2
    assert "new: head.fc.weight, head.fc.bias\n" in capsys.readouterr().out


def test_layer_decay_moves_the_stem_least(pretrained):
    make_folder("data")
    first = load_file(pretrained)
    state = fine_tune(f"--recipe finetune --init-from {pretrained} --layer-decay 0.1")
    stem, head = ((state["model"][name] - first[name]).abs().max() for name in (
        "downsample_layers.0.0.weight", "head.norm.weight"))
    assert 0 < 20 * stem < head


def test_a_frozen_backbone_stays_as_it_is(pretrained):
    make_folder("data")
    line = f"--init-from {pretrained} --freeze-backbone --drop-path 0.1"
    state = fine_tune(line)
    assert settings("--resume tuned/last.pt --freeze-backbone").drop_path == 0.1
    first = load_file(pretrained)
    for name, tensor in state["model"].items():
        if not name.startswith("head.fc."):
            assert torch.equal(tensor, first[name]), name
    trained = train.open_source("tuned/weights.safetensors").tensors["head.fc.bias"]
    assert trained.abs().min() > 1e-3  # it began at 0
    ended = outcome(f"{line} --dataset folder --device cpu --patch-size 2 --output other")
    assert "would leave untrained: downsample_layers.0.0.weight" in ended


def test_a_classifier_for_the_same_classes_is_kept(pretrained, capsys):
    make_folder("data")
    fine_tune(f"--init-from {pretrained}")
    os.rename("tuned", "first_tuned")
    before = load_file("first_tuned/weights.safetensors")["head.fc.weight"]
    state = fine_tune("--init-from first_tuned/weights.safetensors --lr 1e-9 --min-lr 0")
    torch.testing.assert_close(state["model"]["head.fc.weight"], before)
    for split in ("train", "val"):
        Path("data", split, "a dog").rename(Path("data", split, "wolf"))
    shutil.rmtree("tuned")
    capsys.readouterr()
    fine_tune("--init-from first_tuned/weights.safetensors")  # two other classes
    assert "new: head.fc.weight, head.fc.bias" in capsys.readouterr().out


def test_fine_tuning_few_images(pretrained):
    """fit_to_data: some 1,000 steps of a quarter of the images, and what is typed
    stays."""
    recipe = settings(f"--init-from {pretrained} --recipe finetune")
    few = train.fit_to_data(recipe, 100, {})
    assert (few.batch_size, few.epochs, few.lr, few.rand_augment) == (25, 250, 3e-4, 0)
    assert few.eval_every == 12
    typed = train.fit_to_data(recipe, 100, {"epochs": 3, "batch_size": 10})
    assert (typed.epochs, typed.batch_size) == (30, 128)  # those of the recipe given
    assert train.fit_to_data(recipe, 40_000, {}) == recipe


def test_a_teacher_without_a_say_changes_nothing(pretrained):
    """And a copy of it has no loss."""
    line = f"{QUICK} --epochs 1 --init-from {pretrained} --output "
    teach = f"--teacher {pretrained} --distill-alpha"
    losses = []
    for name, more in (("plain", ""), ("silent", f"{teach} 0"), ("half", teach + " 0.5"),
                       ("copy", f"{teach} 1 --lr 1e-9 --min-lr 0 --drop-path 0")):
        assert outcome(f"{line}{name} {more}".replace("--depths 1 1 --dims 8 16",
                                                      "")) == "0"
        losses.append(float(read_csv(f"{name}/metrics.csv")[0]["train_loss"]))
    assert losses[0] == losses[1] != losses[2] and losses[3] < 1e-3


def test_the_teacher_sees_its_own_normalisation(pretrained):
    data, source = train.draw_shapes(1000, 32, seed=1), train.open_source(pretrained)
    mean, std, x = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6,
                                                                0.7]), data.images / 255
    with torch.inference_mode():
        expected = from_checkpoint(pretrained)(T.Normalize(
            source.expects["mean"], source.expects["std"])(x))
    logits = train.Teacher(source, mean, std)(train.normalize(x, mean, std))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


# --- Augmentation -----------------------------------------------------------------------


@pytest.fixture
def bytes_():
    return torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)


def test_augment_does_all_of_it_in_this_order(monkeypatch):
    """Each function is replaced by one that notes what it is given."""
    calls = []
    for name in ("crop_and_flip", "rand_augment", "normalize", "random_erase", "mix"):
        def note(x, *args, name=name):
            calls.append((name, x.shape[-1], x.dtype, *args))
            return (x, None) if name == "mix" else x

        monkeypatch.setattr(train, name, note)
    recipe = train.Recipe(
        crop_padding=3, flip=0.4, rand_augment=7, random_erase=0.2, mixup=0.3, cutmix=0.6,
        start_size=16, epochs=10)
    x, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4)
    mean, std = torch.zeros(3), torch.ones(3)
    train.augment(recipe, x, labels, 10, mean, std, epoch=0)
    assert calls == [
        ("crop_and_flip", 32, torch.uint8, 3, 0.4),
        ("rand_augment", 32, torch.float32, 7),
        ("normalize", 16, torch.float32, mean, std),
        ("random_erase", 16, torch.float32, 0.2),
        ("mix", 16, torch.float32, labels, 10, 0.3, 0.6)]


def test_images_shrink_as_pillow_does_it():
    """Antialiased, between 0 and 1."""
    recipe = train.Recipe(**WITHOUT_AUGMENTATION, start_size=16, epochs=2)
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ours, _ = train.augment(recipe, x, torch.arange(2), 2, torch.zeros(3), torch.ones(3),
                            0)
    theirs = torch.stack([TF.pil_to_tensor(TF.to_pil_image(image).resize(
        (16, 16), PIL.Image.Resampling.BILINEAR)) for image in x])
    # Pillow rounds twice
    torch.testing.assert_close(ours, theirs / 255, atol=1.1 / 255, rtol=0)


@pytest.mark.parametrize("off", [{"mix_prob": 0}, {"mix_off_epochs": 10},
                                 {"mixup": 0, "cutmix": 0}],
                         ids=str)
def test_augmentation_that_is_off_leaves_images_and_labels(bytes_, off):
    recipe = train.Recipe(**WITHOUT_AUGMENTATION | {"mix_prob": 1} | off, epochs=10,
                          img_size=16)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    x, targets = train.augment(recipe, bytes_, torch.arange(64) % 5, 5, mean, std,
                               epoch=3)
    torch.testing.assert_close(x, T.Normalize(mean.tolist(), std.tolist())(bytes_ / 255))
    assert torch.equal(targets, F.one_hot(torch.arange(64) % 5, 5).float())


def test_a_share_of_the_batches_is_mixed(bytes_):
    recipe = train.Recipe(**WITHOUT_AUGMENTATION | {"mix_prob": 0.3}, img_size=16)
    mixed = 0
    for _ in range(300):
        _, targets = train.augment(recipe, bytes_[:4], torch.arange(4), 4, torch.zeros(3),
                                   torch.ones(3), epoch=3)
        mixed += bool((targets.max(1).values < 1).any())
    assert 60 < mixed < 120


def test_crop_and_flip_is_a_loop_of_torchvisions(bytes_):
    padded, draws = TF.pad(bytes_, [2], padding_mode="reflect"), []
    for before, after in zip(padded, train.crop_and_flip(bytes_, 2, 0.5)):
        match, = ((top, left, flip) for top in range(5) for left in range(5) for flip
                  in (0, 1)
                  if torch.equal(TF.crop(before, top, left, 8, 8),
                                 TF.horizontal_flip(after) if flip else after))
        draws.append(match)
    assert {d[0] for d in draws} == {d[1] for d in draws} == set(range(5))
    assert len({d[:2] for d in draws}) > 15  # both are drawn
    assert 16 < sum(d[2] for d in draws) < 48
    assert torch.equal(train.crop_and_flip(bytes_, 0, 0.0), bytes_)
    assert torch.equal(train.crop_and_flip(bytes_, 0, 1.0), bytes_.flip(3))


def pillow_operation(name, strength):
    """What timm does to a Pillow image at `strength` of an operation's range."""
    warp = {"resample": PIL.Image.Resampling.BILINEAR, "fillcolor": (128, 128, 128)}
    # timm shears about a corner, we about the centre: k * 16 pixels apart
    k = 0.3 * strength
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
    return lambda i: operation(i, *arguments, **(warp if name[:2]
                                                 in ("ro", "tr") else {}))


@pytest.mark.parametrize("name", train.RAND_AUGMENT_OPS)
def test_rand_augment_operation_is_timms(name):
    images = T.GaussianBlur(3, 0.8)(torch.randint(0, 256, (2, 3, 32, 32),
                                                  dtype=torch.uint8))
    images = (TF.autocontrast(images) * 0.7 + 40).byte()
    for strength in (0.9, -0.45):
        ours = 255 * train.RAND_AUGMENT_OPS[name](images / 255,
                                                  torch.full((2, 1, 1, 1), strength))
        operation = pillow_operation(name, strength)
        theirs = torch.stack([TF.pil_to_tensor(operation(TF.to_pil_image(i))) for i
                              in images])
        difference = (ours - theirs).abs()
        # of 255; Pillow rounds, and does not blend at the border
        assert difference.mean() < 1.5
        assert difference[..., 8:24, 8:24].max() < (12 if name == "equalize" else 4.1)
        # so what they agree on is a change
        assert (theirs.float() - images).abs().mean() > 3


def test_rand_augment_draws_for_each_image_what_timm_draws(monkeypatch):
    """Twice one of fifteen operations, each left out half of the time, of N(level, 0.5) /
    10."""
    drawn = {name: [] for name in train.RAND_AUGMENT_OPS}
    for name in drawn:
        monkeypatch.setitem(train.RAND_AUGMENT_OPS, name, lambda x, m, name=name: (
            drawn[name].append(m.flatten()), x)[1])
    train.rand_augment(torch.zeros(15_000, 3, 1, 1), 5)
    counts = torch.tensor([len(torch.cat(m)) for m in drawn.values()])
    # 2 * 15,000 / 2 / 15
    assert len(counts) == 15 and ((counts > 900) & (counts < 1100)).all()
    strengths = torch.cat([torch.cat(m) for m in drawn.values()])
    assert strengths.abs().mean().item() == pytest.approx(0.5, abs=0.003)
    assert strengths.abs().std().item() == pytest.approx(0.05, abs=0.002)
    assert 0.48 < (strengths > 0).float().mean() < 0.52
    drawn["invert"].clear()
    train.rand_augment(torch.zeros(3000, 3, 1, 1), 10)
    assert torch.cat(drawn["invert"]).abs().max() == 1  # never more than the largest


def test_rand_augment_changes_each_image_alone():
    x = torch.rand(1, 3, 16, 16).repeat(3000, 1, 1, 1)
    y = train.rand_augment(x.clone(), 9)
    untouched = (y == x).flatten(1).all(1).float().mean().item()
    # both operations left out, 1/4, or without effect on this image
    assert 0.23 < untouched < 0.33
    assert len({tuple(image.flatten().tolist()) for image in y}) > 500


def erased_rectangles(y):
    """Height, width, area, top and left of what is not 0 in each image, if anything
    is."""
    erased = (y != 0).any(1)
    rows, columns = erased.any(2), erased.any(1)
    inside = rearrange(rows, "b h -> b h 1") & rearrange(columns, "b w -> b 1 w")
    assert torch.equal(erased, inside)  # it is a rectangle
    rows, columns = rows[rows.any(1)], columns[columns.any(1)]
    height, width = rows.sum(1), columns.sum(1)
    top, left = rows.int().argmax(1), columns.int().argmax(1)
    return {"height": height, "width": width, "area": height * width, "top": top,
            "left": left}


def largest_difference(a, b):
    """Of two samples' distribution functions: Kolmogorov's and Smirnov's statistic."""
    values = torch.cat([a, b]).sort().values
    shares = [torch.searchsorted(sample.sort().values, values, right=True) / len(sample)
              for sample in (a, b)]
    return (shares[0] - shares[1]).abs().max()


def test_random_erase_is_torchvisions():
    """The same distribution of sizes and places, and of how many images are erased."""
    theirs = T.RandomErasing(0.6, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3),
                             value="random")
    zeros = torch.zeros(3000, 3, 32, 32)
    ours = erased_rectangles(train.random_erase(zeros, 0.6))
    theirs = erased_rectangles(torch.stack([theirs(image) for image in zeros]))
    for name in ours:
        assert 0.57 < len(ours[name]) / 3000 < 0.63
        # by chance in 1 of 1,000
        assert largest_difference(ours[name], theirs[name]) < 0.065, name


def test_random_erase_fills_with_noise_of_its_own():
    x = torch.full((2000, 3, 16, 16), 9.0)
    y = train.random_erase(x, 1.0)
    noise = y[y != 9]
    assert abs(noise.mean()) < 0.01 and noise.std().item() == pytest.approx(1, abs=0.01)
    assert noise.unique().numel() > 0.9 * len(noise)
    assert torch.equal(train.random_erase(x, 0.0), x)


def mixed_shares(mixup, cutmix, draws=400):
    """The largest share of a class in each of many mixed batches, by kind."""
    x, labels = torch.rand(2, 3, 16, 16), torch.arange(2)
    shares = {"MixUp": [], "CutMix": []}
    for _ in range(draws):
        mixed, targets = train.mix(x, labels, 2, mixup, cutmix)
        share, others = targets[0, 0], x.roll(1, 0)
        kept = (mixed == x).all(1, True)
        if torch.allclose(mixed, share * x + (1 - share) * others, atol=1e-5):
            kind = "MixUp"
        else:
            kind = "CutMix"  # a rectangle of the other image, of the area in the targets
            assert torch.equal(torch.where(kept, x, others), mixed)
            torch.testing.assert_close(kept[0].float().mean(), share)
        torch.testing.assert_close(targets.sum(1), torch.ones(2))
        shares[kind].append(share.item())
    return {kind: torch.tensor(values) for kind, values in shares.items()}


def test_mixup_and_cutmix_are_drawn_equally_often():
    shares = mixed_shares(0.8, 1.0)
    assert 160 < len(shares["MixUp"]) < 240


@pytest.mark.parametrize("alpha", [0.1, 2.0])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_each_mix_has_its_alpha(kind, alpha):
    """The distribution of shares is that of torchvision's transform with this alpha."""
    x, labels = torch.rand(2, 3, 16, 16), torch.arange(2)
    theirs = {"mixup": T.MixUp, "cutmix": T.CutMix}[kind](alpha=alpha, num_classes=2)
    alphas = {"mixup": 0.0, "cutmix": 0.0} | {kind: alpha}
    ours = torch.stack([train.mix(x, labels, 2, **alphas)[1][0, 0] for _ in range(400)])
    peers = torch.stack([theirs(x, labels)[1][0, 0] for _ in range(400)])
    assert largest_difference(ours, peers) < 0.14  # by chance in 1 of 1,000


def test_mix_without_alphas_mixes_nothing():
    x, labels = torch.rand(2, 3, 4, 4), torch.arange(2)
    mixed, targets = train.mix(x, labels, 3, 0, 0)
    assert torch.equal(mixed, x) and torch.equal(targets, F.one_hot(labels, 3).float())


# --- What is drawn, held out and measured -----------------------------------------------


def test_only_training_crops_large_images_at_random(small):
    make_folder("data")
    data = train.prepare_data(settings(f"{LARGE} --val-size 4"))
    for part in (data.train, data.val, data.test):
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(part[[0, 1]][0])
        assert torch.equal(draws[0], draws[1])
        assert torch.equal(draws[0], draws[2]) != (part is data.train)
        if part is not data.train:
            whole_cut = T.Compose([T.Resize(82, T.InterpolationMode.BICUBIC),
                                   T.CenterCrop(72)])
            expected = TF.pil_to_tensor(whole_cut(train.as_shown(part.images[0])))
            assert torch.equal(draws[0][0], expected)


@pytest.mark.parametrize(("scale", "smallest"), [(0.08, 0.08), (0.7, 0.7)])
def test_a_random_crop_has_an_area_from_crop_scale_to_1(small, scale, smallest):
    make_folder("data")
    square = train.prepare_data(settings(f"{LARGE} --crop-scale {scale}")).train.square
    assert isinstance(square, T.RandomResizedCrop) and tuple(square.size) == (72, 72)
    areas = [height * width for height, width in (
        (params["height"], params["width"]) for params in (
            square.make_params([torch.zeros(3, 1000, 1000)]) for _ in range(300)))]
    assert 0.9 * smallest < min(areas) / 1e6 < smallest + 0.1 and max(areas) > 0.9e6


def test_crop_scale_1_is_the_evaluations_square(small):
    make_folder("data")
    data = train.prepare_data(settings(f"{LARGE} --crop-scale 1"))
    assert not isinstance(data.train.square, T.RandomResizedCrop)
    evaluated = dataclasses.replace(data.test, images=data.train.images)
    assert torch.equal(data.train[[0]][0], evaluated[[0]][0])


def test_statistics_are_numpys(small):
    """Of the training images, those held out included, and not of the test images."""
    data = train.prepare_data(settings(f"{QUICK} --val-size 20"))
    pixels = train.draw_shapes(5000, 32, seed=1).images.numpy() / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(data.std, pixels.std((0, 2, 3)), rtol=1e-5)


def test_statistics_of_large_images_are_without_random_crops(small):
    make_folder("data")
    data = train.prepare_data(settings(LARGE))
    whole_cut = train.evaluation_square(72, None)
    pixels = torch.stack([TF.pil_to_tensor(whole_cut(train.as_shown(path)))
                          for path in data.train.images]).double() / 255
    torch.testing.assert_close(data.mean, pixels.mean((0, 2, 3)).float())
    torch.testing.assert_close(data.std, pixels.std((0, 2, 3), correction=0).float())


def test_a_single_colour_does_not_divide_by_0():
    images = train.Images(torch.full((4, 3, 8, 8), 51, dtype=torch.uint8),
                          torch.zeros(4).long(), ["a"])
    mean, std = train.channel_statistics(images, 0)
    torch.testing.assert_close(mean, torch.full((3,), 0.2))
    assert (std > 0).all() and std.isfinite().all()


@pytest.mark.parametrize(("count", "batch_size"), [(50, 10), (53, 10), (7, 10)])
def test_an_epoch_is_a_new_permutation(count, batch_size):
    steps = max(1, count // batch_size)
    batches = list(train.training_order(count, batch_size, 0, 0, 2 * steps))
    assert [step for step, _ in batches] == [*range(2 * steps)]
    epochs = [list(itertools.chain(*(numbers for _, numbers in part)))
              for part in (batches[:steps], batches[steps:])]
    for epoch in epochs:
        assert len({*epoch}) == len(epoch) == min(count, steps * batch_size)
        assert epoch != sorted(epoch) and {*epoch} <= {*range(count)}
    assert epochs[0] != epochs[1]
    assert batches[3:] == list(train.training_order(count, batch_size, 0, 3, 2 * steps))
    assert batches != list(train.training_order(count, batch_size, 1, 0, 2 * steps))


def test_seeds_never_meet():
    """Also beyond 100 epochs, where those of the former formula did."""
    seeds = {train.seed_for(seed, purpose, number) for seed in (0, 1)
             for purpose in ("order", "augmentation", "network")
             for number in range(3000)}
    assert len(seeds) == 2 * 3 * 3000


@pytest.mark.parametrize(("size", "held_out"), [("8", 8), ("0.19", 8), ("0", 0)])
def test_held_out_images_are_of_each_class_equally_many(small, size, held_out):
    labels = torch.arange(40) % 4
    numbered = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 3, 1, 1)
    images = train.Images(numbered, labels, [*"abcd"])
    learned, val = train.hold_out(images, float(size))
    assert len(learned) == 40 - held_out
    if held_out:
        assert val.labels.bincount().tolist() == [2] * 4
        assert sorted([*learned.images[:, 0].flatten(),
                       *val.images[:, 0].flatten()]) == [*range(40)]
        again = train.hold_out(images, float(size))[1]
        assert torch.equal(again.images, val.images)  # the same in each run
    else:
        assert val is None


# --- What follows is about files, signals and machines ----------------------------------


# --- Bad arguments and custom stems


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


def test_roads_that_cannot_be_built_are_named():
    with pytest.raises(ValueError, match="patch_size must be 1, 2 or 4, not 3"):
        convnext.roadmap_network(convnext.DESIGNS["GELU"], patch_size=3)
    for field in ("attention", "swin_block"):
        with pytest.raises(ValueError, match="attention needs separate_downsampling"):
            convnext.roadmap_network(convnext.DESIGNS["GELU"]._replace(**{field: True}))


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


def test_the_command_prints_the_road():
    run = subprocess.run([sys.executable, HERE / "convnext.py", "--road"], check=True,
                         capture_output=True, text=True)
    assert run.stdout.splitlines() == list(convnext.road_table())


# --- Exports and wrappers


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


# --- Files of weights


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


# --- Weights from timm, the hub and addresses


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


# --- Networks and machines


@pytest.mark.parametrize("line", [
    "--depths 1 2 --dims 8 16", "--depths 1 2 --dims 8 16 --grn", "--variant v2_atto",
    *(f"--road '{step}' --width 8" for step in convnext.DESIGNS)])
def test_a_network_is_saved_and_built_again_by_its_description(small, line):
    """From last.pt and weights.safetensors: the very same logits."""
    line = f"{line} --patch-size 2 --device cpu --amp off -j 0 --dataset synthetic"
    run = prepared(line)
    run.folder.mkdir()
    run.step = run.total
    train.save(run)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        logits = run.model.eval()(x)
        for name in ("last.pt", "weights.safetensors"):
            source = train.open_source(f"run/{name}")
            torch.testing.assert_close(train.load_network(source)(x), logits)
            again = train.Recipe(**source.network)
            assert train.network_name(again) == train.network_name(run.recipe)
            assert source.classes[:2] == ["full star", "hollow star"]


ROAD = "--road LayerNorm --width 8 --patch-size 4 --device cpu --amp off -j 0 -b 32"


@pytest.mark.parametrize("network_flags", [ROAD, SMALLEST],
                         ids=["road", "depths and dims"])
def test_every_network_evaluates_begins_teaches_and_predicts(small, capsys,
                                                             network_flags):
    quick = f"{network_flags} --dataset synthetic -b 32 --epochs 1"
    assert outcome(f"{quick} --output first") == "0"
    top1 = float(read_csv("first/metrics.csv")[-1]["test_ema_top1"])
    weights = "first/weights.safetensors"
    for name in ("weights.safetensors", "last.pt"):
        capsys.readouterr()
        assert outcome(f"--eval-only first/{name} --device cpu") == "0"
        assert f"top-1 {top1:.2f} %" in capsys.readouterr().out
    line = f"--init-from {weights} --dataset synthetic -b 32 -j 0 --device cpu --epochs 1"
    assert outcome(f"{line} --lr 1e-9 --min-lr 0 --output second") == "0"
    before, after = load_file(weights), load_file("second/weights.safetensors")
    for name, tensor in before.items():
        if "running" not in name:
            torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-6)
    assert outcome(f"{quick} --teacher {weights} --distill-alpha 1 --output third") == "0"
    PIL.Image.new("RGB", (32, 32)).save("a.png")
    (path, classes), = train.predict(weights, "a.png", device="cpu")
    assert path == "a.png" and sum(p for _, p in classes) < 1 and len(classes) == 5


@pytest.mark.parametrize(("line", "message"), [
    pytest.param(f"{SMALLEST} --dataset folder",
                 r"has other classes or another order: full star, "
                 r".* \(8\); here: a dog, b cat \(2\)", id="classes"),
    pytest.param(f"{QUICK} --patch-size 2 --start-size 4",
                 "takes images of 8 or more pixels", id="size")])
def test_a_teacher_that_does_not_fit_is_refused(pretrained, line, message):
    make_folder("data")
    line = f"{line} --teacher {pretrained} --output run"
    assert re.search(f"UserError: {pretrained} {message}", outcome(line))
    assert not Path("run").exists()


@pytest.mark.parametrize(("amp", "device_type", "bf16", "expected"), [
    ("auto", "cpu", True, torch.bfloat16), ("auto", "cpu", False, torch.float32),
    ("auto", "cuda", True, torch.bfloat16), ("auto", "cuda", False, torch.float16),
    ("auto", "mps", True, torch.float32), ("off", "cuda", True, torch.float32),
    ("bf16", "cpu", False, torch.bfloat16), ("fp16", "cuda", True, torch.float16)])
def test_precision(monkeypatch, amp, device_type, bf16, expected):
    monkeypatch.setattr(train, "cpu_has_bfloat16", lambda: bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    assert train.pick_precision(amp, torch.device(device_type)) == expected


def test_float16_needs_a_gpu():
    with pytest.raises(train.UserError, match="--amp fp16 needs a CUDA GPU, not cpu"):
        train.pick_precision("fp16", torch.device("cpu"))


@pytest.mark.parametrize("name", ["quantum", "meta"])
def test_devices_that_cannot_be_used(name):
    with pytest.raises(train.UserError,
                       match=rf"^--device {name} cannot be used here \("):
        train.pick_device(name)


def test_workers_are_the_cpus_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert train.usable_cpus() == 2


@slow
def test_compile_without_a_compiler(small, monkeypatch, request):
    if "slow" not in request.config.getoption("-m"):
        pytest.skip("takes 20 seconds: pytest -m slow")
    monkeypatch.setenv("CXX", "/no/compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/no/compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    torch._dynamo.reset()
    ended = outcome(f"{QUICK} --compile --output run")
    assert ended.startswith("UserError: ") and ended.endswith("; leave out --compile")


def test_compile_calls_the_network(small, monkeypatch):
    """Without a compiler: torch.compile is asked, and the parameters keep their names."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda model: compiled.append(model))
    assert prepared(f"{QUICK} --compile").model is compiled[0]
    prepared(QUICK)
    assert len(compiled) == 1


# --- Pictures and folders


@pytest.mark.parametrize(("size", "workers"), [(32, 0), (72, 1)])
def test_a_folder_of_mixed_pictures(small, capsys, size, workers):
    make_folder("data")
    line = f"{FOLDER} --img-size {size} -j {workers} --val-size 2"
    assert outcome(f"{line} --output run") == "0"
    assert ("10 training + 2 held-out + 12 test images, 2 classes (a dog, b cat)"
            in capsys.readouterr().out)


@pytest.mark.parametrize(("folders", "learned", "tested", "said"), [
    pytest.param(("train", "test"), ["train"], ["test"], "", id="train and test"),
    pytest.param(("train", "val"), ["train"], ["val"], "", id="train and val"),
    pytest.param(("train", "valid"), ["train"], ["valid"], "", id="train and valid"),
    pytest.param(("training", "validation"), ["training"], ["validation"], "",
                 id="long names"),
    pytest.param(("train", "test", "val"), ["train"], ["test"],
                 "data/val is not used, since there is data/test", id="all three")])
def test_names_of_folders(small, capsys, folders, learned, tested, said):
    make_folder("data", splits=folders, images=2)
    for is_train, expected in ((True, learned), (False, tested)):
        data = load(FOLDER, is_train)
        assert sorted({Path(path).parts[1] for path in data.images}) == expected
        assert len(data) == 4
    assert said in capsys.readouterr().err


def test_without_a_folder_train_every_fifth_image_of_a_class_is_a_test_image(small,
                                                                             capsys):
    for name, count in (("a", 10), ("b", 5), ("c", 7)):
        Path("data", name).mkdir(parents=True)
        for i in range(count):
            PIL.Image.new("RGB", (8, 8)).save(f"data/{name}/{i:02}.png")
    learned, tested = load(FOLDER), load(FOLDER, train_split=False)
    assert [*map(str, tested.images)] == ["data/a/04.png", "data/a/09.png",
                                          "data/b/04.png", "data/c/04.png"]
    assert len(learned) == 18 and not {*learned.images} & {*tested.images}
    said = capsys.readouterr().err
    assert "data has no folder train or test: every fifth image of each class" in said


@pytest.mark.parametrize(("made", "message"), [
    pytest.param([], "--data-dir data: there is no such folder", id="nothing"),
    pytest.param(["val/a/x.png", "val/b/x.png"], "has no folder train or training",
                 id="no train"),
    pytest.param(["train/a/x.png", "train/b/x.png"], "has no folder test or val",
                 id="no test"),
    pytest.param(["train/x.png", "val/x.png"], "data/train needs a folder per class",
                 id="flat"),
    pytest.param(["train/a/x.png", "val/a/x.png"],
                 "has images of one class, a; two are needed", id="one class"),
    pytest.param(["train/a/x.png", "train/b/x.png", "test/1.png"],
                 "data/test needs a folder per class with images in it. --predict takes "
                 "pictures without classes", id="flat test"),
    pytest.param(["train/a/x.png", "train/b/x.png", "val/a/x.png", "val/c/x.png"],
                 "data/val has images of c, which are no classes of the training images: a,",
                 id="another class")])
def test_folders_that_do_not_fit(small, made, message):
    for path in made:
        Path("data", path).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (8, 8)).save(Path("data", path))
    assert message in outcome(f"{FOLDER} --output run")
    assert not Path("run").exists()


def test_classes_are_matched_by_name_in_any_unicode_form(small, capsys):
    make_folder("data", ("ä", "b", "c"), images=1)
    os.rename("data/val/ä", unicodedata.normalize("NFD", "data/val/ä"))
    shutil.rmtree("data/val/c")
    Path("data/train/empty").mkdir()
    data = load(FOLDER)
    assert data.classes == ["b", "c", "ä"]
    tested = load(FOLDER, train_split=False, classes=data.classes)
    assert tested.classes == data.classes and tested.labels.tolist() == [0, 2]
    said = capsys.readouterr().err
    assert "data/val has no images of c" in said
    assert "data/train has no images of empty" in said


def test_characters_are_classes(small):
    """A folder per character: none of them is left out."""
    make_folder("data", ("#", "@", "!", "$", "a", "_", "~"), images=1)
    assert load(FOLDER).classes == ["!", "#", "$", "@", "_", "a", "~"]


def test_nothing_in_a_folder_disappears_or_is_doubled(small, monkeypatch, capsys):
    root = make_folder("data") / "train"
    elsewhere = make_folder("elsewhere", ("wolf",), ("train",))
    cats, scan = root / "b cat", os.scandir
    (root / "wolf").symlink_to((elsewhere / "train" / "wolf").absolute())
    expected = {*root.rglob("*.*"), *(root / "wolf").iterdir()}
    for place in (".ipynb_checkpoints", "@eaDir", "more/deeper"):
        (cats / place).mkdir(parents=True)
        shutil.copy(cats / "ünï 0.png", cats / place / "again.png")
    (root / ".hidden").mkdir()
    (cats / "parent").symlink_to(root.absolute())
    new = {cats / name for name in ("a.jfif", "b.jpe", "c.GIF", "more/e.bmp",
                                    "more/f.ppm")}
    for path in new:
        PIL.Image.new("RGB", (9, 9)).save(path)
    for path in (cats / "labels.txt", cats / "._a.png", root / "stray.png"):
        path.touch()
    data = load(LARGE)
    assert {*map(Path, data.images)} == expected | new | {cats / "more/deeper/again.png"}
    assert len(data) == len({*data.images}) == 24
    assert data.classes == ["a dog", "b cat", "wolf"]
    assert [Path(path).relative_to(root).parts[0] for path in data.images] == [
        data.classes[label] for label in data.labels]
    said = capsys.readouterr().err
    for count in ("1 .ipynb_checkpoints", "1 @eaDir", "1 parent", "1 .hidden", "1 *.txt",
                  "2 *.pn"):
        assert count in said, said

    def locked(place):  # the superuser can read every folder
        if str(place).endswith("deeper"):
            raise PermissionError(errno.EACCES, "Permission denied", place)
        return scan(place)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(train.UserError,
                       match=r"the folder .*more/deeper \(Permission denied"):
        load(LARGE)


@pytest.mark.parametrize(("size", "message"), [
    (60, "must be below the 60 training images"),
    (5000, "must be below the 60 training images"),
    (0.001, "--val-size 0.001 of 60 images is none"),
    (55, "--val-size 55 leaves no training images of ")])
def test_no_class_is_lost_by_holding_out(size, message):
    names = [str(i) for i in range(20)]
    pixels = torch.zeros(60, 3, 1, 1, dtype=torch.uint8)
    images = train.Images(pixels, torch.arange(60) % 20, names)
    learned, val = train.hold_out(images, 20)  # of three images of each class, one
    assert len({*learned.labels.tolist()}) == 20
    assert val.labels.bincount().tolist() == [1] * 20
    with pytest.raises(train.UserError, match=message):
        train.hold_out(images, size)


RNG = np.random.default_rng(0)
EXIF = PIL.Image.Exif()
EXIF[0x0112] = 6  # the top is on the right: a viewer turns it clockwise
RGB, ALPHA = (RNG.integers(0, 256, (5, 7, axes), np.uint8) for axes in (3, 1))
GREY16 = RNG.integers(0, 65536, (5, 7), np.uint16)
GREY16[0, :2] = 0, 65535
GREY = (GREY16 >> 8).astype(np.uint8)
CLEAR = np.dstack([RGB, ALPHA])
ON_WHITE = RGB * (ALPHA / 255) + (255.0 - ALPHA)
DRAWING = PIL.Image.fromarray(np.dstack([0 * RGB, (ALPHA > 99) * np.uint8(255)]))
DRAWN = np.where(ALPHA > 99, 0, 255)
KEY = tuple(RGB[0, 0].tolist())


@pytest.mark.parametrize(("kind", "picture", "expected", "options"), [
    pytest.param("png", GREY16, GREY, {}, id="16-bit png"),
    pytest.param("tif", GREY16, GREY, {}, id="16-bit tif"),
    pytest.param("ppm", GREY16, GREY, {}, id="16-bit ppm"),
    pytest.param("tif", GREY16.astype(">u2"), GREY, {}, id="16-bit big-endian tif"),
    pytest.param("png", GREY > 99, 255 * (GREY > 99), {}, id="1-bit png"),
    *(pytest.param(kind, picture, np.rot90(expected, -1), {"exif": EXIF},
                   id=f"rotated {name} {kind}")
      for kind in ("png", "tif") for name, picture, expected in (
          ("rgb", RGB, RGB), ("grey", GREY, GREY), ("16-bit", GREY16, GREY))),
    pytest.param("png", CLEAR, ON_WHITE, {}, id="alpha png"),
    pytest.param("tif", CLEAR, ON_WHITE, {}, id="alpha tif"),
    pytest.param("gif", DRAWING, DRAWN, {}, id="drawing gif"),
    pytest.param("png", DRAWING, DRAWN, {}, id="drawing png"),
    pytest.param("png", DRAWING.convert("LA"), DRAWN, {}, id="grey and alpha"),
    pytest.param("png", DRAWING.quantize(4), DRAWN, {}, id="palette and alpha"),
    pytest.param("png", RGB, np.where((RGB == RGB[0, 0]).all(2, keepdims=True), 255, RGB),
                 {"transparency": KEY}, id="one colour is clear")])
def test_a_picture_is_read_as_a_viewer_shows_it(tmp_path, kind, picture, expected,
                                                options):
    if isinstance(picture, np.ndarray):
        picture = PIL.Image.fromarray(picture)
    picture.save(tmp_path / f"x.{kind}", **options)
    shown = np.asarray(train.as_shown(str(tmp_path / f"x.{kind}"))).astype(float)
    assert shown.shape[2] == 3
    assert abs(shown - expected.reshape(*expected.shape[:2], -1)).max() <= 1


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_16_bit_files_that_are_not_full_are_no_black_pictures(tmp_path, capsys, kind,
                                                              bits):
    train.note.cache_clear()
    values = np.linspace(0, 2**bits - 1, 70).astype(np.uint16).reshape(7, 10)
    PIL.Image.fromarray(values).save(tmp_path / f"x.{kind}")
    shown = np.asarray(train.as_shown(str(tmp_path / f"x.{kind}")))[..., 0]
    scale = {8: 255, 10: 1023 / 16, 12: 255, 16: 255}[bits]  # 10 bits are taken for 12
    assert abs(shown - np.linspace(0, scale, 70).reshape(7, 10)).max() <= 1
    assert ("are read as" in capsys.readouterr().err) == (bits < 16)


@pytest.mark.parametrize(("tag", "meaning", "expected"), [
    pytest.param(338, 2, ON_WHITE, id="transparency"),
    pytest.param(338, 0, RGB, id="unspecified"),
    pytest.param(33338, 2, RGB, id="not said: perhaps infrared")])
def test_a_fourth_band_is_transparency_only_where_it_says_so(tmp_path, capsys, tag,
                                                             meaning, expected):
    """Tag 338 of a TIFF says what it is."""
    train.note.cache_clear()
    PIL.Image.fromarray(CLEAR).save(tmp_path / "x.tif")
    content = (tmp_path / "x.tif").read_bytes()
    before, after = (struct.pack("<HHIH", *entry) for entry in (
        (338, 3, 1, 2), (tag, 3, 1, meaning)))
    assert content.count(before) == 1
    (tmp_path / "x.tif").write_bytes(content.replace(before, after))
    shown = np.asarray(train.as_shown(str(tmp_path / "x.tif"))).astype(float)
    assert abs(shown - expected).max() <= 1
    assert ("fourth band" in capsys.readouterr().err) == (tag != 338)


def test_broken_exif_leaves_the_picture_as_it_is_stored(tmp_path):
    PIL.Image.fromarray(RGB).save(tmp_path / "x.png",
                                  exif=b"Exif\x00\x00II*\x00broken" + b"\xff" * 9)
    assert np.array_equal(train.as_shown(str(tmp_path / "x.png")), RGB)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bit_pictures_are_refused_with_a_reason(tmp_path, dtype):
    PIL.Image.fromarray(GREY16.astype(dtype)).save(tmp_path / "deep.tif")
    data = train.Images([tmp_path / "deep.tif"], [0], ["a"], lambda picture: picture)
    assert "deep.tif (which of its 32-bit values is white is unknown" in str(data[[0]])


def test_imagenet(small):
    """By identifiers, since two classes are called crane."""
    for split, wnid in itertools.product(("train", "val"), ("n02", "n01")):
        Path("data", split, wnid).mkdir(parents=True)
        PIL.Image.new("L", (50, 40)).save(f"data/{split}/{wnid}/a.JPEG")
    torch.save(({"n01": ("crane", "bird"), "n02": ("crane", "machine")}, []),
               "data/meta.bin")
    data = load("--dataset imagenet --img-size 96", train_split=False)
    assert data.classes == ["n01", "n02"] and data.labels.tolist() == [0, 1]
    assert [Path(path).parent.name for path in data.images] == ["n01", "n02"]


@pytest.mark.parametrize("size", [32, 40, 96])
def test_cifar100(small, monkeypatch, size):
    def fake(root, train, download):
        assert (root, download) == ("data", True)
        return Mock(data=np.full((3, 32, 32, 3), 7, np.uint8), targets=[3, 1, 2],
                    classes=[f"class {i}" for i in range(100)])

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fake)
    line = f"--dataset cifar100 --img-size {size} -j 0"
    data = train.prepare_images(load(line), settings(line))
    images, labels = data[[0, 2]]
    assert isinstance(data.images, torch.Tensor) == (size < 65)
    assert len(data.classes) == 100
    assert images.shape == (2, 3, size, size) and (images == 7).all()
    assert labels.tolist() == [3, 2]


def test_food101(small):
    for folder in ("meta", "images/apple_pie"):
        Path("data/food-101", folder).mkdir(parents=True)
    for split in ("train", "test"):
        Path("data/food-101/meta", f"{split}.json").write_text(
            '{"apple_pie": ["apple_pie/1"]}')
    PIL.Image.new("RGB", (50, 40)).save("data/food-101/images/apple_pie/1.jpg")
    data = load("--dataset food101 --img-size 96")
    assert [Path(path).name for path in data.images] == ["1.jpg"]
    assert data.classes == ["apple_pie"]


def test_a_data_set_that_cannot_be_downloaded(small, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10",
                        Mock(side_effect=urllib.error.URLError("no route")))
    ended = outcome("--device cpu --output run")
    assert re.search("cifar10 could not be loaded .*no route.* or use --dataset folder",
                     ended)
    assert not Path("run").exists()


def shapes_as(kind, count, size=32):
    """Drawn shapes as a tensor of bytes, or as the arrays or the paths that Images takes,
    too."""
    shapes = train.draw_shapes(50 * count, size, seed=count)
    if kind == "tensor":
        return shapes
    arrays = list(rearrange(shapes.images, "b c h w -> b h w c").numpy())
    if kind == "arrays":
        return dataclasses.replace(shapes, images=arrays)
    paths = []
    for i, array in enumerate(arrays):
        paths.append(f"{count}-{i}.png")
        PIL.Image.fromarray(array).save(paths[-1])
    return dataclasses.replace(shapes, images=paths)


@pytest.mark.parametrize("kind", ["tensor", "arrays", "paths"])
def test_images_from_python(small, capsys, kind):
    """Training, resuming and evaluation are the same as with the shapes themselves."""
    splits = shapes_as(kind, 64), shapes_as(kind, 16)
    line = f"{SMALLEST} -b 32 --epochs 1 --output "
    assert train.main(shlex.split(line + kind), splits) == 0
    assert "64 training + 0 held-out + 16 test images" in capsys.readouterr().out
    assert train.main(["--resume", f"{kind}/last.pt"], splits) == 0
    assert train.main(shlex.split(f"--eval-only {kind}/last.pt --device cpu"),
                      splits) == 0
    state = torch.load(f"{kind}/last.pt", weights_only=True)
    test = shapes_as("tensor", 16)
    loss, _ = scores_of(from_checkpoint(f"{kind}/last.pt"), test.images, test.labels,
                        state["mean"], state["std"])
    assert state["history"][-1]["test_ema_loss"] == pytest.approx(loss, rel=1e-5)


def test_images_from_python_of_another_size(small):
    splits = shapes_as("tensor", 64, 28), shapes_as("tensor", 16, 28)
    with pytest.raises(train.UserError,
                       match="the images have 28x28 pixels: make squares of them"):
        train.main(shlex.split(f"{SMALLEST} --output run"), splits)


@pytest.mark.parametrize(("images", "size", "message"), [
    ("all", 32, "no image can be read"), ("all", 72, "no image can be read"),
    ("dogs", 32, "there are no training images of a dog that can be read"),
    ("dogs", 72, "there are no training images of a dog that can be read")])
def test_skip_bad_with_too_little_left(small, images, size, message):
    root = make_folder("data")
    for path in root.glob("train/*/*" if images == "all" else "train/a dog/*"):
        path.write_bytes(b"")
    ended = outcome(f"{FOLDER} --img-size {size} --skip-bad --output run")
    assert ended == f"UserError: {message}"


@pytest.mark.parametrize("size", [32, 72])
def test_pictures_that_cannot_be_read(small, capsys, size):
    dogs = make_folder("data") / "train" / "a dog"
    line = f"{FOLDER} --img-size {size} --output run"
    for name, content in (("empty.png", b""), ("text.png", b"no image"),
                          ("cut.png", (dogs / "ünï 0.png").read_bytes()[:900])):
        (dogs / name).write_bytes(content)
    error = outcome(line)
    reason = r"UserError: cannot read the image .*(empty|text|cut).png \(.*--skip-bad"
    assert re.match(reason, error)
    assert "0x" not in error  # no address of a buffer in memory
    assert outcome(f"{line} --skip-bad") == "0"
    said = capsys.readouterr().err
    assert "note: images that cannot be read are left out, 3: " in said
    assert "cut.png" in said


def test_a_bad_test_image_costs_no_epoch(small):
    """Large images are read late. The epoch is saved before they are, and --skip-bad goes
    on."""
    make_folder("data")
    bad = Path("data/val/b cat/ünï 0.png")
    bad.write_bytes(b"junk")
    assert "cannot read the image data/val/b cat" in outcome(
        f"{LARGE} --epochs 3 --eval-every 2 --output run")
    assert torch.load("run/last.pt", weights_only=True)["step"] == 6
    assert outcome("--resume run/last.pt --skip-bad") == "0"
    rows = read_csv("run/metrics.csv")
    assert [row["epoch"] for row in rows] == [*"123"]
    assert [bool(row["test_top1"]) for row in rows] == [False, True, True]


@pytest.mark.parametrize("size", [32, 72])
@pytest.mark.parametrize(("split", "change", "refused"), [
    ("train", "moved", ()), ("train", "deleted", (32, 72)), ("train", "class", (32, 72)),
    ("train", "renamed", (72,)), ("train", "content", (32,)),
    ("val", "deleted", (32, 72)), ("val", "class", (32, 72)), ("val", "content", (32,))])
def test_other_images_are_refused_by_resume(small, size, split, change, refused):
    """They would be split anew into training and held-out images, or measured as the
    same. Small images are compared by class, order and content, large ones by their
    names."""
    make_folder("data")
    line = f"{FOLDER} --img-size {size} --val-size 4 --skip-bad --output run"
    assert outcome(line) == "0"
    os.rename("data", "elsewhere")
    path = Path("elsewhere", split, "a dog", "ünï 5.png")
    if change == "deleted":
        path.unlink()
    elif change == "class":
        path.rename(Path("elsewhere", split, "b cat", "a.png"))
    elif change == "renamed":
        path.rename(path.with_name("ünï 6.png"))
    elif change == "content":
        PIL.Image.new("RGB", (50, 50)).save(path)
    ended = outcome("--resume run/last.pt --data-dir elsewhere")
    what = "training" if split == "train" else "test"
    error = f"UserError: --resume needs the {what} images that the run began with: "
    assert ended.startswith(error if size in refused else "0")


def test_shapes_are_the_same_on_another_cpu(small, monkeypatch):
    """Its last bits differ, as they do without vector instructions."""
    assert outcome(f"{QUICK} --epochs 1 --output run") == "0"
    draw = train.draw_shapes

    def draw_elsewhere(*args, **more):
        shapes = draw(*args, **more)
        shapes.images[0, 0, 0, 0] ^= 1
        return shapes

    monkeypatch.setattr(train, "draw_shapes", draw_elsewhere)
    assert outcome("--resume run/last.pt") == "0"


# --- Checkpoints


@pytest.mark.parametrize("classes", [[str(i) for i in range(1, 13)], [*"abcdefghijkl"]],
                         ids=["1 to 12", "a to l"])
@pytest.mark.parametrize("use", ["--eval-only", "--teacher", "--init-from"])
def test_the_order_of_classes_is_said_if_it_is_assumed(small, capsys, classes, use):
    """Loudly where there are two: timm sorts 2 before 10."""
    make_folder("data", classes, images=1)
    model = convnext.ConvNeXt((1,) * 4, (8, 16, 24, 32), num_classes=12)
    torch.save(export_state_dict(model, "timm"), "a.pth")
    line = f"{use} a.pth --dataset folder --device cpu -j 0 --img-size 32"
    if use != "--eval-only":
        line += f" --epochs 1 --output run {SMALLEST if use == '--teacher' else ''}"
    assert outcome(line) == "0"
    names, said = sorted(classes), capsys.readouterr().err
    assumed = f"assuming {names[0]} (0), {names[1]} (1), ..., {names[-1]} (11)"
    assert f"a.pth does not name its classes: {assumed}" in said
    other = "timm sorts these classes in another way, 1, 2, 3, 4, ..."
    assert (other in said) == ("12" in classes)


def test_classes_in_another_order_are_evaluated_in_the_order_of_the_weights(small,
                                                                            capsys):
    make_folder("data")
    assert outcome(f"{FOLDER} --output run") == "0"
    state = torch.load("run/last.pt", weights_only=True)
    torch.save(state | {"classes": state["classes"][::-1]}, "turned.pt")
    data = train.prepare_images(load(FOLDER, train_split=False), settings(FOLDER))
    for path, labels in (("run/last.pt", data.labels), ("turned.pt", 1 - data.labels)):
        capsys.readouterr()
        assert outcome(f"--eval-only {path} --device cpu --amp off") == "0"
        loss, top1 = scores_of(
            from_checkpoint(path), data.images, labels, state["mean"], state["std"])
        said = capsys.readouterr()
        assert f"test loss {loss:.4f}  top-1 {top1:.2f} %" in said.out
        assert "assum" not in said.err
    assert "turned.pt has other classes or another order" in outcome(
        f"{FOLDER} --teacher turned.pt --output x")


def transformers_folder(folder, labels):
    """What save_pretrained writes, with classes, size and normalization of its own."""
    config = transformers.ConvNextConfig(
        depths=[1, 1], hidden_sizes=[8, 16], num_stages=2, layer_norm_eps=1e-6,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)})
    model = transformers.ConvNextForImageClassification(config).eval()
    model.save_pretrained(folder)
    transformers.ConvNextImageProcessor(
        size={"shortest_edge": 48}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6],
        crop_pct=0.9).save_pretrained(folder)
    return model


def test_a_folder_of_transformers_says_classes_size_and_normalization(small, capsys):
    """And it is evaluated by them: classes in another order than the folders'."""
    make_folder("data")
    model = transformers_folder("hugging", ["b cat", "a dog"])
    line = "--eval-only hugging --dataset folder --device cpu --amp off -j 0"
    assert outcome(line) == "0"
    line = f"{FOLDER} --img-size 48"
    data = train.prepare_images(load(line, False, ["b cat", "a dog"]), settings(line))
    x = T.Normalize([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])(data.images / 255)
    with torch.inference_mode():
        logits = model(x).logits
    loss = F.cross_entropy(logits, data.labels)
    top1, = timm.utils.accuracy(logits, data.labels)
    said = capsys.readouterr()
    assert (f"hugging: test loss {loss:.4f}  top-1 {top1:.2f} %  of 12 images of 48 px"
            in said.out)
    assert "assum" not in said.err


def test_published_weights_are_evaluated_as_timm_does(small, capsys):
    make_folder("data")
    model = randomise(timm.create_model("convnext_atto", num_classes=2))
    save_file(model.state_dict(), "timm.safetensors", {"format": "pt"})
    line = "--eval-only timm.safetensors --device cpu --amp off --img-size 96 -j 0 --tta"
    assert outcome(f"{line} --dataset folder") == "0"
    text = capsys.readouterr().out
    prepare = timm.data.create_transform(96, interpolation="bicubic", crop_pct=0.875)
    images = torchvision.datasets.ImageFolder("data/val", prepare)
    x, labels = torch.stack([x for x, _ in images]), torch.tensor(images.targets)
    with torch.inference_mode():
        plain, mirrored = model(x), model(TF.horizontal_flip(x))
    for title, logits in (("", plain), (" with mirror images", (plain + mirrored) / 2)):
        loss = F.cross_entropy(logits, labels)
        top1, = timm.utils.accuracy(logits, labels)
        scores = f"test loss {loss:.4f}  top-1 {top1:.2f} %"
        assert f"timm.safetensors{title}: {scores}" in text
    ended = outcome(f"{line} --dataset synthetic")
    assert re.search("safetensors has other classes or .*: 2, not named; here: full",
                     ended)


@pytest.mark.parametrize("use", ["--eval-only", "--init-from",
                                 f"{QUICK} --output x --teacher"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_weights_that_are_not_finite_are_refused(small, use, value):
    state = convnext.ConvNeXt((1, 1), (8, 16), num_classes=8).state_dict()
    state["stages.0.0.mlp.pwconv1.weight"][3, 2] = value
    torch.save(state, "nan.pth")
    ended = outcome(f"{use} nan.pth --dataset synthetic")
    assert re.search("UserError: nan.pth: .*pwconv1.weight contains numbers that are not",
                     ended)


@pytest.mark.parametrize("use", ["--resume", "--eval-only", "--init-from",
                                 f"{QUICK} --output x --teacher"])
@pytest.mark.parametrize(("name", "reason"), [
    ("zero", "no checkpoint"), ("evil", "GLOBAL"), ("other", "no weights of a ConvNeXt"),
    ("grey", "1 channels, not 3"), ("none", "no such file"),
    ("hnf", "norm_pre.weight"), ("empty", "no weights of a ConvNeXt")])
def test_files_that_are_no_weights(small, use, name, reason):
    """One line with the reason; no code in the file runs."""
    if name == "zero":
        Path("zero.pt").touch()
    elif name != "none":
        model = convnext.ConvNeXt((1, 1), (8, 16), num_classes=8,
                                  in_channels=1 + 2 * (name == "hnf"))
        torch.save({
            "evil": {"args": Malicious(), "made_by": train.MADE_BY},
            "other": {"model": {}}, "empty": {}, "grey": model.state_dict(),
            "hnf": model.state_dict() | {"norm_pre.weight": torch.ones(16)}}[name],
            f"{name}.pt")
    ended = outcome(f"{use} {name}.pt" + " --dataset synthetic" * ("--resume" not in use))
    assert re.search(f"^UserError: .*{name}.pt: .*{reason}", ended) or (
        (use, name) == ("--resume", "hnf") and "--resume takes last.pt" in ended)
    assert not Path("executed").exists() and not Path("x").exists()


def test_who_uses_our_keys_for_other_things_does_not_pass_for_us(small, capsys):
    torch.save({"model": create_convnext("atto", num_classes=8).state_dict(), "step": 3,
                "args": {"variant": "tiny", "img_size": 96}, "classes": ["a"],
                "mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}, "like.pt")
    source = train.open_source("like.pt")
    assert (source.expects, source.settings, source.state) == (train.IMAGENET, {}, {})
    assert train.network_name(train.Recipe(**source.network)) == "ConvNeXt-atto"
    assert "note: like.pt does not say what images it expects" in capsys.readouterr().err
    assert "--resume takes last.pt, of this version" in outcome("--resume like.pt")


def test_a_file_of_a_later_version_is_named(pretrained):
    state = torch.load("first/last.pt", weights_only=True)
    torch.save(state | {"args": state["args"] | {"new_flag": 1}}, "first/last.pt")
    ended = outcome("--resume first/last.pt")
    assert "last.pt is of a later version: it has the unknown settings new_flag" in ended


def contents(source):
    tensors = {name: tensor.numpy().tobytes() for name, tensor in source.tensors.items()}
    return [tensors, source.network, source.expects, source.classes, source.settings,
            without_times(dict(source.state))]


@pytest.mark.parametrize("name", ["last.pt", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "overwritten", "turned", "renamed"])
def test_no_damage_to_a_file_goes_unnoticed(pretrained, name, damage):
    """It is refused in one line, or the content is the very same."""
    path, refused = f"first/{name}", 0
    content, original = Path(path).read_bytes(), contents(train.open_source(path))
    choose, size = random.Random(damage), len(content)
    for _ in range(30):
        near = choose.randrange(min(size, 4000))  # most are near an end
        at = choose.choice([choose.randrange(size), near, size - 1 - near])
        Path(path).write_bytes({
            "flipped": content[:at] + bytes([content[at] ^ 1 << choose.randrange(8)])
            + content[at + 1 :],
            "cut": content[:at],
            "overwritten": content[:at] + choose.randbytes(50) + content[at + 50 :],
            "turned": content[at:] + content[:at],
            "renamed": content.replace(b"train.py, f", b"Train.py, f")}[damage])
        try:
            assert contents(train.open_source(path)) == original
        except train.UserError as error:
            assert path in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 15


def test_the_weights_file_has_the_usual_mode(pretrained):
    """And not 0600, so that colleagues can read it."""
    weights, table = map(os.stat, ("first/weights.safetensors", "first/metrics.csv"))
    assert weights.st_mode == table.st_mode


def test_a_run_leaves_what_is_promised(small, capsys):
    line = f"{QUICK} --epochs 2 --output run"
    assert outcome(line) == "0"
    text = capsys.readouterr().out
    model = convnext.ConvNeXt((1, 1), (8, 16), num_classes=8, layer_scale=0)
    size = sum(p.numel() for p in model.parameters())
    assert f"patch size 4: {size:,} parameters, " in text
    assert len(text.split("\nepoch ")) == 3
    files = {name for name in os.listdir("run") if "tfevents" not in name
             and name != ".lock"}
    assert files == {"args.json", "last.pt", "metrics.csv", "weights.safetensors"}
    assert json.loads(Path("run/args.json").read_text())["epochs"] == 2
    assert "run holds a run: give --resume run/last.pt, or another" in outcome(line)


def test_tensorboard_shows_what_metrics_csv_has(small):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert outcome(f"{QUICK} --epochs 3 --eval-every 2 --output run") == "0"
    events, rows = EventAccumulator("run").Reload(), read_csv("run/metrics.csv")
    assert {*events.Tags()["scalars"]} == rows[-1].keys() - {"epoch", "step"}
    for name in events.Tags()["scalars"]:
        logged = {str(event.step): event.value for event in events.Scalars(name)}
        expected = {row["epoch"]: float(row[name]) for row in rows if row[name]}
        assert logged == pytest.approx(expected, rel=1e-6), name


def test_tensorboard_of_a_resumed_run_has_each_epoch_once(small, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", at_call(5, train.train_step, interrupt))
        assert outcome(f"{QUICK} --epochs 3 --output run") == "130"
    assert outcome("--resume run/last.pt") == "0"
    events = EventAccumulator("run").Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3]


def test_a_run_stopped_in_its_first_epoch_has_no_table_yet(small, monkeypatch):
    monkeypatch.setattr(train, "train_step", at_call(2, train.train_step, interrupt))
    assert outcome(f"{QUICK} --output run") == "130"
    assert Path("run/last.pt").exists() and not Path("run/metrics.csv").exists()


def test_runs_started_in_the_same_second_have_folders_of_their_own(small, monkeypatch):
    monkeypatch.setattr(train.time, "strftime",
                        lambda text: text.replace("%Y%m%d-%H%M%S", "now"))
    for _ in range(3):
        assert outcome(f"{QUICK} --epochs 1") == "0"
    assert sorted(os.listdir("runs")) == [
        f"now-ConvNeXt-1-1-of-8-16{number}" for number in ("", "-2", "-3")]


def test_a_second_run_is_refused_before_anything_is_read(pretrained, monkeypatch):
    """So it cannot overwrite what the first one finishes meanwhile."""
    monkeypatch.setattr(train, "prepare_data", Mock(side_effect=AssertionError))
    monkeypatch.setattr(train, "open_source", Mock(side_effect=AssertionError))
    with train.FileLock("first/.lock"):
        for line in (f"{QUICK} --output first", "--resume first/last.pt"):
            assert outcome(line) == "UserError: another run is writing to first"


def test_a_refused_run_takes_nothing_from_the_first(small):
    """Which may be reading its images, with nothing but the lock in its folder."""
    Path("run").mkdir()
    with train.FileLock("run/.lock"):
        ended = outcome(f"{QUICK} --output run")
        assert ended == "UserError: another run is writing to run"
        assert os.listdir("run") == [".lock"]
        with pytest.raises(train.Timeout):
            train.FileLock("run/.lock", timeout=0).acquire()


def test_the_lock_is_held_while_images_are_read(small, monkeypatch):
    def try_lock(*_):
        with pytest.raises(train.Timeout), train.FileLock("run/.lock", timeout=0):
            pass

    spy(monkeypatch, "prepare_data", try_lock)
    assert outcome(f"{QUICK} --epochs 1 --output run") == "0"


def test_last_pt_alone_can_be_resumed_to_its_end(small, capsys):
    """best.pt was not copied along; the run is complete without it."""
    assert outcome(f"{QUICK} --epochs 2 --val-size 20 --output run") == "0"
    Path("copied").mkdir()
    shutil.copy("run/last.pt", "copied")
    assert outcome("--resume copied/last.pt") == "0"
    assert "copied/best.pt is not there" in capsys.readouterr().err
    assert {"metrics.csv", "weights.safetensors"} <= {*os.listdir("copied")}


def test_a_damaged_best_pt_is_named(small):
    assert outcome(f"{QUICK} --epochs 1 --val-size 20 --output run") == "0"
    Path("run/best.pt").write_bytes(Path("run/best.pt").read_bytes()[:-9])
    assert re.match("UserError: .*run/best.pt", outcome("--resume run/last.pt"))


@pytest.mark.parametrize(("change", "result"), [
    ("moved", "0"),
    ("replaced", "UserError: --resume needs the teacher that the run began with")])
def test_a_teacher_may_move_but_not_change(pretrained, change, result):
    assert outcome(f"{QUICK} --epochs 1 --teacher {pretrained} --output run") == "0"
    if change == "replaced":
        assert outcome(f"{QUICK} --epochs 1 --seed 1 --output first2") == "0"
        pretrained = "first2/weights.safetensors"
    os.rename(pretrained, "moved.safetensors")
    assert outcome("--resume run/last.pt --teacher moved.safetensors").startswith(result)


@pytest.mark.parametrize("use", [
    "--eval-only first --device cpu", f"{QUICK} --init-from first --epochs 1 --output run",
    f"{QUICK} --teacher first --epochs 1 --output run"])
def test_the_folder_of_a_run_stands_for_its_weights(pretrained, use):
    assert outcome(use) == "0"


def test_a_locked_table_is_noted_and_written_later(small, monkeypatch, capsys):
    """As on Windows, while another program shows it: all other files are written."""
    move, refusals = os.replace, iter([True, True, False, False, False])

    def locked(old, new):
        if str(new).endswith("metrics.csv") and next(refusals, False):
            raise PermissionError(errno.EACCES, "used by another process", str(new))
        move(old, new)

    monkeypatch.setattr(os, "replace", locked)
    assert outcome(f"{QUICK} --epochs 2 --output run") == "0"
    assert "metrics.csv (" in capsys.readouterr().err
    assert len(read_csv("run/metrics.csv")) == 2


def test_a_resumed_run_holds_no_second_copy_of_the_weights(pretrained, monkeypatch):
    sources = []

    def count(run):
        gc.collect()
        sources.extend(thing for thing in gc.get_objects()
                       if isinstance(thing, train.Source))

    spy(monkeypatch, "train", count)
    assert outcome("--resume first/last.pt") == "0"
    assert not sources


@pytest.mark.parametrize("line", [
    "--teacher none.pt --output run", "--device quantum --output run",
    "--amp fp16 --output run", "--road 'window attention' --width 33 --output run"])
def test_mistakes_are_found_before_images_are_read(small, monkeypatch, line):
    monkeypatch.setattr(train, "load_split", Mock(side_effect=AssertionError))
    line = f"{QUICK} {line}"
    if "--road" in line:
        line = line.replace("--depths 1 1 --dims 8 16", "")
    assert outcome(line).startswith("UserError: ")
    assert not Path("run").exists()


# --- Prediction


@pytest.fixture
def pictures(pretrained):
    """Pictures of shapes in folders with their classes' names, and one beside them."""
    shapes = train.draw_shapes(600, 40, seed=5)
    for i, (pixels, label) in enumerate(zip(shapes.images, shapes.labels)):
        path = Path("pictures", shapes.classes[label], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(pixels).save(path)
    Path("pictures/elsewhere").mkdir()  # which is no class
    TF.to_pil_image(shapes.images[0]).save("pictures/elsewhere/alone.png")
    return sorted(map(str, Path("pictures").rglob("*.png")))


def probabilities(paths):
    """By torchvision's transforms and the network alone: {path: {class: probability}}."""
    state = torch.load("first/last.pt", weights_only=True)
    prepare = T.Compose([
        T.Resize(32, T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToImage(),
        T.ToDtype(torch.float32, scale=True), T.Normalize(state["mean"], state["std"])])
    x = torch.stack([prepare(PIL.Image.open(path).convert("RGB")) for path in paths])
    with torch.inference_mode():
        rows = from_checkpoint("first/weights.safetensors")(x).softmax(1).tolist()
    return {path: dict(zip(state["classes"], row)) for path, row in zip(paths, rows)}


def best_five(by_class):
    return sorted(by_class.items(), key=lambda pair: -pair[1])[:5]


PREDICT = "--eval-only first/weights.safetensors --device cpu --predict"


@pytest.mark.parametrize("given", ["a folder", "a path", "a Path", "a list"])
def test_predict_from_python(pictures, given):
    wanted = {"a folder": "pictures", "a path": pictures[3], "a Path": Path(pictures[3]),
              "a list": pictures[:2]}[given]
    answers = train.predict("first/weights.safetensors", wanted, top=3, device="cpu")
    paths = [path for path, _ in answers]
    several = {"a folder": pictures, "a list": pictures[:2]}
    assert sorted(paths) == several.get(given, [pictures[3]])
    expected = probabilities(paths)
    for path, classes in answers:
        best = best_five(expected[path])[:3]
        assert [name for name, _ in classes] == [name for name, _ in best]
        assert [p for _, p in classes] == pytest.approx([p for _, p in best], abs=1e-5)


def test_predict_as_text(pictures, capsys):
    capsys.readouterr()
    assert outcome(f"{PREDICT} {shlex.quote(pictures[0])}") == "0"
    expected = best_five(probabilities(pictures[:1])[pictures[0]])
    text = ", ".join(f"{name} {100 * p:.1f} %" for name, p in expected)
    assert capsys.readouterr().out == f"{pictures[0]}: {text}\n"


def test_predict_as_a_table_with_the_true_classes(pictures, capsys):
    capsys.readouterr()
    assert outcome(f"{PREDICT} pictures --output a.csv") == "0"
    assert capsys.readouterr().out == "13 predictions written to a.csv\n"
    rows, expected = read_csv("a.csv"), probabilities(pictures)
    assert sorted(row["path"] for row in rows) == pictures
    for row in rows:
        folder = Path(row["path"]).parent.name
        assert row["true"] == ("" if folder == "elsewhere" else folder)
        for i, (name, p) in enumerate(best_five(expected[row["path"]]), 1):
            assert row[f"class_{i}"] == name
            assert float(row[f"probability_{i}"]) == pytest.approx(p, abs=1e-4)


def test_a_table_without_true_classes_has_no_such_column(pictures):
    assert outcome(f"{PREDICT} pictures/elsewhere/alone.png --output a.csv") == "0"
    assert list(read_csv("a.csv")[0]) == ["path"] + [
        f"{what}_{i}" for i in range(1, 6) for what in ("class", "probability")]


def test_predict_leaves_out_bad_pictures_if_told_to(pictures):
    Path("pictures/bad.png").write_bytes(b"junk")
    line = f"{PREDICT} pictures --output a.csv"
    assert re.match(r"UserError: cannot read the image pictures/bad.png \(",
                    outcome(line))
    assert not Path("a.csv").exists()
    assert outcome(f"{line} --skip-bad") == "0" and len(read_csv("a.csv")) == 13


@pytest.mark.parametrize(("picture", "message"), [
    ("none.png", "--predict none.png: there is no such file or folder"),
    ("empty", "--predict empty: there is no picture in this folder"),
    ("text.txt", "cannot read the image text.txt (")])
def test_nothing_to_predict(pretrained, picture, message):
    Path("empty").mkdir()
    Path("text.txt").write_text("no picture")
    line = f"--eval-only {pretrained} --predict {picture} --device cpu"
    assert outcome(line).startswith(f"UserError: {message}")


@pytest.mark.parametrize(("classes", "first"), [(1000, "tench"), (7, "0")])
def test_names_of_classes_that_weights_do_not_have(small, classes, first):
    torch.save(convnext.ConvNeXt((1,), (8,), num_classes=classes).state_dict(), "a.pth")
    names = train.class_names(train.open_source("a.pth"))
    assert names[0] == first and len(names) == classes


def test_a_backbone_cannot_predict(small):
    PIL.Image.new("RGB", (9, 9)).save("a.png")
    torch.save(convnext.ConvNeXt((1,), (8,), num_classes=0).state_dict(), "a.pth")
    assert "a.pth has no classifier: train one with --init-from" in outcome(
        "--eval-only a.pth --predict a.png --device cpu")


# --- The command line


@pytest.mark.parametrize(("line", "expected"), [
    pytest.param("", {
        "variant": "tiny", "patch_size": 2, "img_size": 32, "epochs": 100,
        "batch_size": 128, "optimizer": "adamw", "lr": 1e-3, "min_lr": 1e-6,
        "schedule": "cosine", "warmup": 5, "beta2": 0.999, "weight_decay": 0.05,
        "clip_grad": 0, "label_smoothing": 0.1, "drop_path": 0.1, "layer_scale": 0,
        "init": "fan-in", "crop_padding": 4, "flip": 0.5, "rand_augment": 9,
        "random_erase": 0.25, "mixup": 0.8, "cutmix": 1, "mix_prob": 1,
        "mixed_epochs": 90, "ema_horizon": 0.04, "start_size": 0, "val_size": 0,
        "tta": False},
        id="defaults"),
    pytest.param("--recipe fast", {
        "variant": "atto", "patch_size": 1, "drop_path": 0, "optimizer": "muon",
        "lr": 3e-3, "muon_lr": 0.02, "beta2": 0.95, "weight_decay": 0.02,
        "schedule": "linear", "min_lr": 0, "batch_size": 256, "epochs": 40,
        "ema_horizon": 0, "rand_augment": 5, "mix_prob": 0, "start_size": 24, "tta": True,
        "warmup": 2, "label_smoothing": 0.1, "random_erase": 0.25},
        id="fast"),
    pytest.param("--init-from first/weights.safetensors --recipe finetune", {
        "epochs": 30, "lr": 1.25e-5, "min_lr": 2.5e-7, "warmup": 0, "weight_decay": 1e-8,
        "layer_decay": 0.8, "rand_augment": 9, "mixup": 0, "cutmix": 0,
        "random_erase": 0.25, "label_smoothing": 0.1, "clip_grad": 0,
        "head_init_scale": 0.001, "drop_path": 0, "ema_horizon": 0, "depths": (1, 1),
        "dims": (8, 16), "patch_size": 4, "img_size": 32},
        id="finetune: the paper's table 6 at a quarter of its batch"),
    pytest.param("--epochs 40 --init paper", {"init": "paper", "warmup": 2,
                                              "mixed_epochs": 36},
                 id="typed"),
    pytest.param("--recipe fast --epochs 100 --layer-scale 0.1 --no-tta --variant tiny",
                 {"epochs": 100, "layer_scale": 0.1, "tta": False, "variant": "tiny"},
                 id="typed over fast"),
    pytest.param("--recipe fast --patch-size 2", {"start_size": 0},
                 id="24 px do not fit"),
    pytest.param("--recipe fast --img-size 96", {"start_size": 0}, id="24 px are for 32"),
    pytest.param("--init-from first/last.pt --recipe finetune -b 256 --mixup 1 --lr 1e-3",
                 {"min_lr": 2e-5, "mixup": 1, "lr": 1e-3}, id="typed over finetune"),
    pytest.param("--init-from first/weights.safetensors", {
        "depths": (1, 1), "dims": (8, 16), "layer_scale": 1e-6, "lr": 1e-3,
        "batch_size": 128},
        id="init-from takes the network alone"),
    pytest.param("--init-from first/weights.safetensors --patch-size 2 --variant tiny",
                 {"patch_size": 2, "variant": "tiny", "depths": None},
                 id="typed over weights"),
    pytest.param("--init-from first/weights.safetensors --freeze-backbone",
                 {"drop_path": 0}, id="freeze-backbone"),
    pytest.param("--eval-only first/weights.safetensors", {
        "dataset": "synthetic", "depths": (1, 1), "epochs": 100},
        id="eval-only takes the data set"),
    pytest.param("--eval-only first/weights.safetensors --dataset cifar10",
                 {"dataset": "cifar10"}, id="typed over eval-only"),
    pytest.param("--resume first/last.pt", {
        "lr": 0.002, "layer_scale": 0.1, "output": "first", "epochs": 1},
        id="resume takes all"),
    pytest.param("--resume first/last.pt --lr 0.002 -j 3 --data-dir x",
                 {"lr": 0.002, "workers": 3, "data_dir": "x"}, id="typed over resume"),
    pytest.param("--resume first/last.pt --data-dir ~/x",
                 {"data_dir": os.path.expanduser("~/x")}, id="home")])
def test_settings_by_precedence(request, line, expected):
    if "first/" in line:
        request.getfixturevalue("pretrained")
    recipe = settings(line)
    for name, value in expected.items():
        assert getattr(recipe, name) == (
            pytest.approx(value) if isinstance(value, float) else value), name


@pytest.mark.parametrize(("line", "img_size", "crop_pct"), [
    ("", 224, 0.95), ("--img-size 224", 224, 0.95), ("--img-size 320", 320, None),
    ("--img-size 320 --crop-pct 0.9", 320, 0.9), ("--crop-pct 0.875", 224, 0.875)])
@pytest.mark.parametrize("use", ["--init-from", "--eval-only"])
def test_the_crop_of_weights_belongs_to_their_size(monkeypatch, use, line, img_size,
                                                   crop_pct):
    state = export_state_dict(create_convnext("atto"), "timm")
    images = {**train.IMAGENET, "crop_pct": 0.95}
    monkeypatch.setattr(convnext, "read_source", lambda _: (state, {}, images))
    recipe = settings(f"{use} timm:name --dataset imagenet {line}")
    assert (recipe.img_size, recipe.crop_pct) == (img_size, crop_pct)
    assert train.network_name(recipe) == "ConvNeXt-atto"


@pytest.mark.parametrize(("values", "message"), [
    ({"epochs": "3"}, "--epochs must be a whole number in [1, inf), not '3'"),
    ({"lr": "x"}, "--lr must be a number in (0, inf), not 'x'"),
    ({"lr": math.nan}, "--lr must be a number in (0, inf), not nan"),
    ({"tta": 1}, "--tta must be"), ({"epochs": True}, "--epochs must be a whole number"),
    ({"depths": [1, 2]}, "--depths and --dims must have one length"),
    ({"depths": [], "dims": []}, "--depths must be whole numbers in [1, inf), not []"),
    ({"variant": "teeny"}, "--variant must be one of"),
    ({"epochs": None}, "--epochs must be")],
    ids=str)
def test_wrong_values_from_python(values, message):
    if "epochs" in values:
        message = message.replace("[1, inf)", "[1, 1000000]")
    with pytest.raises(train.UserError, match=re.escape(message)):
        train.Recipe(**values)


def test_recipe_from_python():
    # whole numbers are fine
    recipe = train.Recipe(mixup=0, lr=1, warmup_epochs=5, epochs=10)
    assert (recipe.mixup, recipe.lr) == (0.0, 1.0)
    recipe = dataclasses.replace(train.Recipe(epochs=10), epochs=100)
    assert (recipe.warmup, recipe.mixed_epochs) == (5, 90)  # not those of 10 epochs
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.lr = -5


@pytest.mark.parametrize(("line", "message"), [
    ("--vairant tiny", "unrecognized arguments: --vairant"),
    ("--mix 0.5", "unrecognized arguments: --mix"),
    ("--output=", "no value may be empty"),
    ('--variant teeny', "invalid choice: 'teeny'"),
    ("--patch-size 3", "choose from 1, 2, 4"),
    ('--lr x', "--lr: invalid float value: 'x'"),
    ('--epochs 1.5', "'1.5'"),
    ("--lr 0", "--lr must be a number in (0, inf), not 0.0"),
    ("--lr nan", "--lr must be "),
    ("--lr inf", "not inf"),
    ("--epochs 0", "--epochs must be a whole number in [1, 1000000]"),
    ("--drop_path 1", "--drop-path must be a number in [0, 1)"),
    ("--flip 1.1", "number in [0, 1], not 1.1"),
    ("--layer-scale -1", "number in [0, inf)"),
    ("--epochs 3 --warmup-epochs 3",
     "--warmup-epochs must be below --epochs, 3, not 3.0"),
    ('--img-size 8', "--img-size must be 16 or more, the network's total stride, not 8"),
    ('--start-size 8', "--start-size must be a multiple of 16, the network's stride"),
    ("--crop-padding 32", "--crop-padding must be below --img-size, 32"),
    ("--min-lr 1", "--min-lr must be up to --lr, 0.001"),
    ("--seed -1", "--seed must be "),
    ("--accumulate 9 -b 8", "--accumulate must be up to --batch-size, 8, not 9"),
    ("--val-size 1.5", "--val-size must be a share below 1 or a whole number, not 1.5"),
    ("--val-size -0.1", "--val-size must be a number in [0, inf)"),
    ("--batch-size 99999999999999999999",
     "--batch-size must be a whole number in [1, 1000000]"),
    ("--mixup 1e-46", "--mixup must be 0 or at least 0.001"),
    ("--workers 99999", "--workers must be a whole number in [0, 256]"),
    ("--depths 1 2 --dims 8", "--depths and --dims must have one length"),
    ("--depths 1 0 --dims 8 8", "--depths must be whole numbers in [1, inf)"),
    ('--road nowhere', "invalid choice: 'nowhere'")], ids=lambda value: str(value)[:40])
def test_wrong_values_are_refused_with_the_range(capsys, line, message):
    text = (outcome(line) + "\n" + capsys.readouterr().err).strip().splitlines()[-1]
    assert message in text and re.match("UserError: |.*: error: ", text)


@pytest.mark.parametrize(("line", "message"), [
    ("--resume first/last.pt --lr 0.001 --wd 1",
     "change --lr, --weight-decay; .*with --init-from"),
    ("--resume first/last.pt --recipe fast",
     "cannot change --recipe; .* with --init-from"),
    ("--resume first/last.pt --teacher first/last.pt",
     "--resume cannot change --teacher"),
    ("--resume first/weights.safetensors", "--resume takes last.pt"),
    ("--resume first/last.pt --eval-only first/last.pt",
     "only one of --resume, --eval-only and"),
    ("--eval-only first/last.pt --epochs 3 --tta", "trains nothing: leave out --epochs$"),
    ("--eval-only first/last.pt --output x", "--output only with --predict"),
    ("--predict a.png", "--predict needs weights: --eval-only WEIGHTS"),
    ("--init-from first/last.pt --recipe fast", "--recipe fast .* without --init-from"),
    ("--init-from first/last.pt --init fan-in", "--init fan-in .* without --init-from"),
    ("--init-from first/last.pt --variant femto --dataset synthetic --output x",
     "do not fit"),
    ("--recipe finetune", "need weights: --init-from"),
    ("--freeze-backbone", "need weights"),
    ("--init-from first/last.pt --recipe finetune --optimizer muon",
     "give --muon-lr, too"),
    ("--variant atto --road GELU", "only one of --variant, --depths and --road"),
    ("--depths 1 1", "--depths and --dims belong together"),
    ("--road GELU --layer-decay 0.5", "--layer-decay needs a network without --road"),
    ("--road 'window attention' --width 33 --dataset synthetic --output x --device cpu",
     "33 channels cannot be divided into 2 heads")])
def test_contradictions_are_refused(request, line, message):
    request.getfixturevalue("pretrained" if "first" in line else "small")
    assert re.search(f"^UserError: .*{message}", outcome(line))
    assert not Path("x").exists()


@pytest.mark.parametrize(("line", "needs"), [
    ("--muon-lr 0.1", "--optimizer muon"),
    ("--beta2 0.9 --optimizer sgd", "--optimizer adamw or"),
    ("--distill-alpha 1", "--teacher"), ("--distill-temperature 3", "--teacher"),
    ("--start-share 0.3", "--start-size"), ("--crop-scale 0.5", "images above 64 pixels"),
    ("--crop-pct 0.5", "images above 64 pixels"),
    ("--crop-padding 3 --img-size 96", "images of up to 64 pixels"),
    ("--mixup 0.3 --mix-prob 0", "a --mix-prob above 0"), ("--width 8", "--road"),
    ("--cutmix 0.3 --mix-prob 0", "a --mix-prob above 0"), ("--grn", "--depths"),
    ("--road GELU --drop-path 0.2", "a network without --road"),
    ("--road GELU --init paper", "a network without --road"),
    ("--road GELU --head-init-scale 2", "a network without --road")])
def test_a_flag_that_would_do_nothing_is_refused(line, needs):
    name = line.split()[2 if "GELU" in line else 0]
    assert outcome(line).startswith(f"UserError: {name} needs {needs}")


def test_what_is_turned_off_may_be_typed():
    assert settings("--distill-alpha 0 --mix-prob 0 --mixup 0 --width 0").mixup == 0


def test_help_shows_every_default(capsys):
    assert outcome("--help") == "SystemExit: 0"
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for flag_, default in (("--seed", "0"), ("--val-size", "0"), ("--clip-grad", "0"),
                           ("--epochs", "100"), ("--lr", "0.001"), ("--variant", "tiny")):
        assert re.search(rf"{flag_}[ ,].*?; default {default}\b", text), flag_


def test_flags_with_underscores_and_equals_signs():
    recipe = settings("--drop_path=0.3 --batch_size 7 --model atto --wd 0.2 -j 1")
    assert (recipe.drop_path, recipe.batch_size, recipe.variant) == (0.3, 7, "atto")
    assert (recipe.weight_decay, recipe.workers) == (0.2, 1)


DOCUMENTS = ["README.md", "assets/results.md", "assets/howto.md"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_in_the_documents_are_understood(name):
    commands = re.findall(r"^ *python train\.py (.*)$", (HERE / name).read_text(),
                          re.MULTILINE)
    assert commands
    values = {"P": "2", "N": "30", "R": "0", "S": "0", "E": "20", "W": "16",
              "INIT": "paper", "SCALE": "0.1", "LR": "1e-3", "BETA2": "0.999",
              "STEP": "stage ratio", "FLAGS": "", "$lr": "1e-3", "$seed": "0", "REST": "",
              "$lr-$seed": "x"}
    for command in commands:
        words = [values.get(word, word) for word in shlex.split(command, comments=True)]
        train.parse([word for word in words if word])  # SystemExit would name the flag


def test_python_blocks_of_the_how_to_run(small, capsys):
    """From the top to the bottom, on a small run; and their results are right."""
    pytest.importorskip("matplotlib").use("Agg")
    quick = "--variant atto --patch-size 4 --dataset synthetic -b 100 --device cpu"
    for folder, seed in (("runs/first", 0), ("runs/rates/a", 0), ("runs/rates/b", 1)):
        assert outcome(f"{quick} --epochs 1 --seed {seed} --output {folder}") == "0"
    shapes = train.draw_shapes(800, 40, seed=5)
    for i, (pixels, label) in enumerate(zip(shapes.images, shapes.labels)):
        path = Path("pictures", shapes.classes[label], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(pixels).save(path)
    weights = "runs/first/weights.safetensors"
    line = f"--eval-only {weights} --predict pictures --output predictions.csv"
    assert outcome(line) == "0"
    digits = [(PIL.Image.new("L", (28, 28), 9 * i), i % 3) for i in range(6)]
    how_to = HERE / "assets" / "howto.md"
    text, done = how_to.read_text(), {}
    has_onnx = all(map(importlib.util.find_spec, ("onnxscript", "onnxruntime")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets, "MNIST", lambda *_, **__: digits)
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            if "onnx" in block and not has_onnx:
                continue
            line = text[: text.index(block)].count("\n")
            exec(compile("\n" * line + block, str(how_to), "exec"), done)  # noqa: S102

    with torch.inference_mode():
        logits = done["model"](done["images"])
    answers = dict(train.predict(weights, "pictures", top=1, device="cpu"))
    for path, row in zip(done["paths"], logits.softmax(1)):
        (name, probability), = answers[str(path)]
        assert done["classes"][row.argmax()] == name
        assert probability == pytest.approx(row.max().item(), abs=1e-3)
    torch.testing.assert_close(done["peer"](done["images"]).logits, logits, atol=1e-5,
                               rtol=1e-5)
    assert len(done["answers"]) == 16 and sum(done["counts"].values()) == 16
    assert done["heat"].shape == (32, 32) and (done["heat"] >= 0).all()
    assert done["embeddings"].shape == (16, 320)
    assert len([*Path("data/mnist/train").glob("*/*.png")]) == 6
    assert Path("runs/from-python/weights.safetensors").is_file()
    if has_onnx:
        with torch.inference_mode():
            expected = done["whole"](done["pixels"])
        for name, tolerance in (("probabilities", 1e-5), ("rounded", 0.05)):
            torch.testing.assert_close(
                torch.from_numpy(done[name]), expected, atol=tolerance, rtol=0)


# --- Signals and disks


@contextlib.contextmanager
def full_disk():
    """No file can grow."""
    resource = pytest.importorskip("resource")
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def quick_run(small):
    """The command line of a run of 4 epochs, each of 5 steps, and what it leaves if
    nothing ends it. SIGHUP has its usual effect, which nohup would take away."""
    line = f"{QUICK} -b 16 --epochs 4 --val-size 20 --output "
    assert outcome(line + "undisturbed") == "0"
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL) if os.name == "posix" else None
    yield line + "run"
    if former is not None:
        signal.signal(signal.SIGHUP, former)


def assert_undisturbed():
    for name, read in (("last.pt", torch.load), ("best.pt", torch.load),
                       ("metrics.csv", read_csv), ("weights.safetensors", load_file)):
        ours, expected = (without_times(read(f"{run}/{name}"))
                          for run in ("run", "undisturbed"))
        assert ours == expected, name
    assert not [*Path("run").glob("*.tmp")]


@posix
@pytest.mark.parametrize(("name", "function", "number", "step"), [
    ("SIGINT", "train_step", 3, 3), ("SIGHUP", "train_step", 7, 7),
    ("SIGTERM", "evaluate", 2, 10), ("SIGUSR1", "train_step", 20, 20)])
def test_a_signal_ends_a_run_and_loses_nothing(quick_run, monkeypatch, capsys, name,
                                               function, number, step):
    """In an epoch, in an evaluation, and in the last step. Schedulers may send it
    twice."""
    signals = [getattr(signal, name)] * (1 if name == "SIGINT" else 2)
    if function == "evaluate":
        number = 2 * number - 1  # of the weights, then of their average

    def send():
        for each in signals:
            signal.raise_signal(each)

    with monkeypatch.context() as patch:
        patch.setattr(train, function, at_call(number, getattr(train, function), send))
        assert outcome(quick_run) == str(128 + signals[0])
    said = capsys.readouterr().err
    assert "stopped; to go on: python train.py --resume run/last.pt" in said
    assert torch.load("run/last.pt", weights_only=True)["step"] == step
    assert outcome("--resume run/last.pt") == "0"
    assert_undisturbed()


@posix
def test_a_second_interrupt_acts_at_once(quick_run, monkeypatch):
    def twice():
        interrupt()
        interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", at_call(7, train.train_step, twice))
        assert outcome(quick_run) == "KeyboardInterrupt: "
    assert torch.load("run/last.pt", weights_only=True)["step"] == 5
    assert outcome("--resume run/last.pt") == "0"
    assert_undisturbed()


@posix
def test_under_nohup_a_closed_terminal_ends_no_run(quick_run, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(train, "train_step", at_call(
        3, train.train_step, lambda: signal.raise_signal(signal.SIGHUP)))
    assert outcome(quick_run) == "0"
    assert_undisturbed()


@posix
def test_a_full_disk_leaves_the_old_files(quick_run, monkeypatch):
    monkeypatch.setattr(train, "SummaryWriter", Mock(), raising=False)
    with contextlib.ExitStack() as stack, monkeypatch.context() as patch:
        patch.setattr(train, "train_step", at_call(
            7, train.train_step, lambda: stack.enter_context(full_disk())))
        ended = outcome(quick_run)
    assert re.fullmatch(r"UserError: cannot write run/last.pt \(.*\); the old files stay",
                        ended)
    assert torch.load("run/last.pt", weights_only=True)["step"] == 5
    assert outcome("--resume run/last.pt") == "0"
    assert_undisturbed()


def test_what_a_killed_run_left_is_written_again(quick_run):
    assert outcome(quick_run) == "0"
    Path("run/last.pt.tmp").write_bytes(b"half a file")
    Path("run/metrics.csv").unlink()
    Path("run/weights.safetensors").unlink()
    assert outcome("--resume run/last.pt") == "0"
    assert_undisturbed()


def test_a_file_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """After a power failure, there would be an empty file otherwise."""
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, function=function: (
            calls.append(name), function(*args)))
    train.write_file(tmp_path / "x", lambda path: path.write_text("y"))
    assert calls == ["fsync", "replace"] and (tmp_path / "x").read_text() == "y"


@posix
@pytest.mark.parametrize(("name", "result"), [
    ("SIGTERM", "0"), ("SIGKILL", "UserError: .*try fewer --workers")])
def test_signals_to_processes_that_read_images(small, monkeypatch, name, result):
    """What reaches all processes is left to the main one; a killed one ends the run in
    one line."""
    number = getattr(signal, name)

    def send():
        for process in multiprocessing.active_children():
            os.kill(process.pid, number)
            if name == "SIGKILL":
                process.join(20)  # the news arrives here, not where images are awaited

    make_folder("data")
    monkeypatch.setattr(train, "train_step", at_call(1, train.train_step, send))
    assert re.match(result, outcome(f"{LARGE} -b 1 -j 1 --output run"))


@pytest.mark.parametrize("what", ["mean loss", "norm of the weights"])
def test_a_number_that_is_none_ends_the_run(small, monkeypatch, what):
    step, calls = train.train_step, itertools.count(1)

    def poisoned(model, optimizers, x, *more):
        number = next(calls)
        loss = step(model, optimizers, x, *more)
        if what == "norm of the weights" and number == 6:
            model.head.fc.bias.data[0] = math.inf
        return loss * math.nan if what == "mean loss" and number == 5 else loss

    monkeypatch.setattr(train, "train_step", poisoned)
    ended = outcome(f"{QUICK} --epochs 3 --output run")
    assert re.match(f"UserError: by step 6, .* the {what} .*(nan|inf).*: try a lower",
                    ended)
    state = torch.load("run/last.pt")
    assert state["step"] == 3 and all(p.isfinite().all() for p in state["model"].values())


@posix
def test_what_is_no_number_is_not_saved_by_a_signal_either(small, monkeypatch):
    def poisoned(*_):
        interrupt()
        return torch.tensor(math.nan)

    monkeypatch.setattr(train, "train_step", poisoned)
    assert outcome(f"{QUICK} --output run").startswith("UserError: by step 1, at lr ")
    assert not Path("run/last.pt").exists()


def test_within_50_steps_of_a_long_epoch(small, monkeypatch):
    monkeypatch.setattr(train, "train_step", lambda *_: torch.tensor(math.nan))
    ended = outcome(f"{QUICK} -b 1 --output run")
    assert ended.startswith("UserError: by step 50, at lr ")


# --- Errors, streams and notebooks


@pytest.mark.parametrize(("error", "remedy"), [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
     "give a smaller --batch-size, or a larger --accumulate"),
    (MemoryError("Unable to allocate 9 GiB"), "give a smaller --batch-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed"), "try fewer --workers"),
    (torch._dynamo.exc.BackendCompilerFailed(print, ValueError("no cl.exe"), None),
     "leave out --compile")], ids=["memory", "MemoryError", "worker", "compiler"])
def test_known_errors_have_a_remedy(small, monkeypatch, error, remedy):
    monkeypatch.setattr(train, "train_step", Mock(side_effect=error))
    monkeypatch.setattr(nn.Module, "compile", lambda model: None)
    ended = outcome(f"{QUICK} --compile --output run")
    assert ended.startswith("UserError: ") and remedy in ended and "\n" not in ended


def test_unknown_errors_keep_their_traceback(small, monkeypatch):
    monkeypatch.setattr(train, "train_step", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        outcome(f"{QUICK} --output run")


def test_batchnorm_with_a_single_value(small):
    line = "--road ResNet-50 --width 8 --patch-size 4 --dataset synthetic --device cpu"
    ended = outcome(f"{line} -j 0 -b 4 --accumulate 4 --output run")
    assert re.match("UserError: .*; BatchNorm needs more: give a larger --batch-size",
                    ended)


@pytest.mark.parametrize(("source", "function", "error"), [
    ("timm:convnext_tiny", "timm.create_model", RuntimeError("Unknown model")),
    ("timm:convnext_tiny", "timm.create_model",
     FileNotFoundError("no connection to the hub")),
    ("hf:nobody/nothing", "huggingface_hub.snapshot_download",
     OSError("no connection to the hub"))],
    ids=["name", "timm", "hub"])
def test_downloads_that_fail_give_the_clients_reason(small, monkeypatch, source, function,
                                                     error):
    monkeypatch.setattr(function, Mock(side_effect=error))
    for use in ("--eval-only", "--init-from", f"{QUICK} --output x --teacher"):
        ended = outcome(f"{use} {source}")
        assert ended.startswith("UserError: ") and source in ended and str(error) in ended
        assert "no such file" not in ended and not Path("x").exists()


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The program, with the hardest of outputs: (exit code, output, errors, weights?) by
    name."""
    place = tmp_path_factory.mktemp("programs")
    make_folder(place / "data", ("ünï 😀", "b"), images=1)
    option = "-P" if sys.version_info >= (3, 11) else ""
    python, program = (shlex.quote(str(path))
                       for path in (sys.executable, HERE / "train.py"))
    flags = f"{SMALLEST} --dataset folder -b 2 --epochs 1 --output"
    line = f"{python} {option} {program} {flags}"
    commands = {"full": ">/dev/full 2>/dev/full", "closed": ">&- 2>&-",
                "nobody": "| true", "ascii": ""}
    running = {name: subprocess.Popen(
        ["sh", "-c", f"{line} {name} {streams}"], cwd=place, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"})
        for name, streams in commands.items()}
    outputs = {name: process.communicate(timeout=400)
               for name, process in running.items()}
    return {name: (running[name].returncode, *outputs[name],
                   (place / name / "weights.safetensors").exists()) for name in commands}


@posix
@pytest.mark.parametrize("name", ["full", "closed", "nobody", "ascii"])
def test_printing_ends_no_run(programs, name):
    """A full disk under the log, a closed one, nobody behind it, names that a terminal
    lacks."""
    if name == "full" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    code, out, err, has_weights = programs[name]
    assert code == 0 and has_weights and "Traceback" not in err
    assert (r"(b, \xfcn\xef \U0001f600)" in out) == (name == "ascii")


def run_as_script(line, monkeypatch):
    """As `python train.py` and a notebook's %run do it, in this process: the exit
    code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(line)])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(HERE / "train.py"), run_name="__main__")
    return ended.value.code


def test_run_from_a_notebook(small, monkeypatch):
    make_folder("data", images=1)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    monkeypatch.setattr("ctypes.CDLL", Mock())
    assert run_as_script(f"{FOLDER} --output run", monkeypatch) == 0
    assert Path("run/weights.safetensors").exists()


@pytest.mark.parametrize(("line", "text"), [
    ("--output file/run --dataset synthetic", "file/run"),
    ("--resume none.pt", "none.pt: no such"), ("--lr 0", "--lr must be a number")])
def test_a_mistake_is_one_line_and_exit_code_1(small, monkeypatch, line, text):
    """A text as exit code is printed, and the code is 1."""
    Path("file").touch()
    code = run_as_script(line, monkeypatch)
    assert re.fullmatch(f"train.py: error: .*{text}.*", code)


def test_a_run_in_a_thread(small):
    results = []
    thread = threading.Thread(target=lambda: results.append(
        outcome(f"{QUICK} --epochs 1 --output run")))
    thread.start()
    thread.join()
    assert results == ["0"] and Path("run/weights.safetensors").exists()


def test_streams_of_a_notebook(small, monkeypatch):
    """They are no files, and have no method `reconfigure`. None is what pythonw has."""
    written = []

    class Stream:
        def write(self, text):
            written.append(text)

        def flush(self):
            raise OSError("closed")

    for stream in (Stream(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", Stream())
        train.guard_streams()
        print("a line", flush=True)
    assert "a line" in written


# --- The notebook -----------------------------------------------------------------------


def test_notebook(monkeypatch):
    """Runs from a clean kernel without CIFAR-10, with a short training; solutions are
    right."""
    path = HERE / "walkthrough.ipynb"
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        assert cell.execution_count and all(o.output_type != "error" for o
                                            in cell.outputs)
        whole_network = "def my_convnext(" in cell.source
        assert len(cell.source.splitlines()) <= (60 if whole_network else 30), cell.source
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    # a heading begins its cell
    assert not any(re.search(r"\n#{1,2} ", text) for text in texts)
    assert len(notebook.cells) <= 110 and len(" ".join(texts).split()) <= 7500
    assert path.stat().st_size < 1.6e6
    solved = 0
    for before, cell in itertools.pairwise(notebook.cells):
        solution = re.search(r"<summary>Solutions?</summary>\s+```python([^`]*)```",
                             before.source)
        if solution:
            checks = [f"assert {call}" for call
                      in re.findall(r"(?m:^check\(\w+\))", cell.source)]
            cell.source += solution[1] + "\n".join(checks)
            solved += len(checks)
    assert solved == 13
    training, = [cell for cell in cells if "SIZE, STEPS = 24, 250" in cell.source]
    training.source = training.source.replace("24, 250", "24, 3")
    monkeypatch.delenv("CIFAR10_FOLDER", raising=False)
    NotebookClient(notebook, timeout=300,
                   resources={"metadata": {"path": HERE}}).execute()
