"""What is claimed, checked against timm, torchvision, PyTorch and published figures.

pytest test_convnext.py                       needs no network, no GPU and no data set
pytest test_convnext.py -m network            the published weights; downloads 460 MB
pytest test_convnext.py -m slow               all variants in full; needs 6 GB of memory
pytest test_convnext.py -k both_ways -rP      prints the largest difference of logits

claim                                     peer                   test_...
----------------------------------------  ---------------------  -------------------------
the network computes what others compute  timm, torchvision,     the_same_function_both...
                                          transformers
its gradients are theirs                  timm, torchvision      same_gradients_as_...
its sizes and costs are published ones    the papers' tables     published_size_and_cost
a step of the road is the paper's         table 10, torchvision  road_..., ..._on_the_road
the fast gradient is a gradient           gradcheck, PyTorch     depthwise_gradient_is_...
a training step does what it should       PyTorch's optimizers   steps_are_pytorchs
Muon is Muon, for filters too             torch.optim.Muon       muon_is_pytorchs
the learning rate follows its schedule    PyTorch's schedulers   learning_rate_is_pytorchs
augmentation draws what the paper means   timm, torchvision      rand_augment_..., mix...
accuracy is measured right                timm                   evaluation_is_timms
the test images are the test set's        torchvision's classes  splits_are_torchvisions
the test images choose nothing            a spy on evaluate      ...held_out_images_...
a stopped run goes on to the same bits    an unbroken run        a_stopped_run_ends_...
a run learns                              chance                 a_run_learns

First come the tests of what the network and its training compute, in the order of
convnext.py and train.py. They end at the line "What follows is about files, signals and
machines". A reader can skip the rest: refused arguments and files, odd pictures, stopped
runs, exports; in the same order.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import errno
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
import unicodedata
import urllib.error
import urllib.request
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
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
from torch.testing import assert_close

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
    needs_network, slow = pytest.mark.network, pytest.mark.slow

@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)

@pytest.fixture
def speed_up(monkeypatch):
    """Make a model faster, on any CPU and for any type."""
    types = torch.float32, torch.bfloat16, torch.float64
    monkeypatch.setattr(convnext, "FAST_DTYPES", types)
    return convnext.speed_up

def meta(variant, **options):
    with torch.device("meta"):
        return create_convnext(variant, **options)

def randomise(model):
    """Draw every parameter at random, at sizes that keep the scale of what passes."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            # torchvision's layer_scale has the shape (c, 1, 1)
            if p.ndim >= 2 and p.shape != (len(p), 1, 1):
                p.normal_(std=p[0].numel() ** -0.5)
            elif name.endswith("bias"):
                p.normal_(std=0.1)
            else:
                p.uniform_(0.2, 1)
    return model.eval()

def four_blocks(num_classes=10):
    """A small network with every kind of layer."""
    return randomise(convnext.ConvNeXt(
        (1, 1, 1, 1), (8, 16, 24, 32), num_classes=num_classes, grn=True, layer_scale=1e-6))

def logits_of(network, x):
    with torch.inference_mode():
        y = network.eval()(x)
    return getattr(y, "logits", y)

def by_text(value):
    """A case's name: its texts alone."""
    return value if isinstance(value, str) else ""

def assert_same_function(network, other, x):
    assert_close(logits_of(network, x), logits_of(other, x), atol=1e-5, rtol=1e-5)

# --- The network ------------------------------------------------------------------------

# As timm and torchvision count them. The papers print these numbers rounded.
PARAMETERS = dict(zip(VARIANTS, (
    3_695_520, 5_217_784, 9_045_672, 15_593_560,
    28_589_128, 50_223_688, 88_591_464, 197_767_336, 350_196_968,
    3_708_400, 5_233_240, 9_066_280, 15_623_800,
    28_635_496, 88_717_800, 197_956_840, 660_289_640)))
GMACS = dict(zip(VARIANTS, (  # as the papers print them, and timm for the four smallest
    0.55, 0.78, 1.37, 2.45, 4.5, 8.7, 15.4, 34.4, 60.9,
    0.55, 0.78, 1.37, 2.45, 4.5, 15.4, 34.4, 115)))

@pytest.fixture(scope="module")
def variant_lines():
    """The table that `python convnext.py` prints, by variant."""
    return {line.split()[0]: line for line in convnext.variant_table()}

@pytest.mark.parametrize("variant", VARIANTS)
def test_published_size_and_cost(variant, variant_lines):
    published = GMACS[variant]
    *_, parameters, counted, printed = variant_lines[variant].split()
    assert int(parameters.replace(",", "")) == PARAMETERS[variant]
    assert float(printed) == published
    digit = 0.01 if published < 3 else 0.1 if published < 100 else 1  # the last printed
    assert abs(float(counted) - published) <= 0.51 * digit

def sized_peer(library, depths, dims, grn=False, layer_scale=None, patch_size=4,
               num_classes=5):
    """The library's network of any size."""
    if library == "timm":
        scale = 1e-6 if layer_scale or not grn else None  # V1 always has it there
        return timm.models.ConvNeXt(
            depths=depths, dims=dims, use_grn=grn, num_classes=num_classes,
            patch_size=patch_size, ls_init_value=scale)
    if library == "torchvision":
        setting = torchvision.models.convnext.CNBlockConfig
        stages = [setting(*stage) for stage in zip(dims, [*dims[1:], None], depths)]
        model = torchvision.models.ConvNeXt(stages, num_classes=num_classes)
        if patch_size != 4:  # it has no such argument
            model.features[0][0] = nn.Conv2d(3, dims[0], patch_size, patch_size)
        return model
    kind = "ConvNextV2" if grn else "ConvNext"
    config = getattr(transformers, f"{kind}Config")(
        depths=list(depths), hidden_sizes=list(dims), num_stages=len(dims),
        num_labels=num_classes, patch_size=patch_size, layer_norm_eps=1e-6)
    return getattr(transformers, f"{kind}ForImageClassification")(config)

def named_peer(library, variant, num_classes=1000):
    """The library's network, on the meta device; None if it has none of this variant."""
    depths, dims, _, v2 = VARIANTS[variant]
    name = variant.removeprefix("v2_")
    with torch.device("meta"):
        if library == "timm":
            name = f"convnext{'v2' * v2}_{name}"
            return timm.create_model(name, num_classes=num_classes)
        if library == "torchvision":
            build = getattr(torchvision.models, f"convnext_{name}", None)
            return None if v2 or not build else build(num_classes=num_classes)
        return sized_peer(library, depths, dims, v2, num_classes=num_classes)

LIBRARIES = ("timm", "torchvision", "huggingface", "meta")

def network_with(exported, library, network):
    """The library's network on the memory of the exported weights, which must all fit."""
    if library == "meta":  # the authors' code is no package; timm reads their files
        exported = timm.models.convnext.checkpoint_filter_fn({"model": exported}, network)
    network.load_state_dict(exported, strict=True, assign=True)
    return network

IN_FULL = ("atto", "tiny", "v2_atto", "v2_tiny")

@pytest.mark.parametrize("variant", [
    variant if variant in IN_FULL else pytest.param(variant, marks=slow)
    for variant in VARIANTS])
def test_the_same_function_both_ways(variant, request):
    """From us to each library and back: the same logits, and the same parameters."""
    if variant not in IN_FULL and "slow" not in request.config.getoption("-m"):
        pytest.skip("slow: pytest -m slow")
    model = randomise(meta(variant).to_empty(device="cpu"))
    x = torch.randn(1, 3, 70, 97)
    expected = logits_of(model, x)
    assert expected.std() > 0.1
    for library in LIBRARIES:
        peer = named_peer("timm" if library == "meta" else library, variant)
        if peer is None:
            continue
        exported = export_state_dict(model, library)
        logits = logits_of(network_with(exported, library, peer), x)
        assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        print(f"{variant:9} {library:12} {(logits - expected).abs().max().item():.1e}")
        source = exported if library == "meta" else peer.state_dict()
        tensors = convnext.read_weights(source)
        # nothing was copied, so the same memory means that a tensor has its name again
        for name, parameter in model.named_parameters():
            assert tensors.pop(name).data_ptr() == parameter.data_ptr(), name
        assert not tensors
    again = meta(variant).to_empty(device="cpu")
    report = load_weights(again, export_state_dict(model, "meta"))
    assert not report.kept and not report.left_out
    assert all(map(torch.equal, again.parameters(), model.parameters()))

@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_both_ways(variant):
    """In every library that has the variant."""
    model = meta(variant)
    depths, dims, _, grn = VARIANTS[variant]
    assert convnext.variant_of(depths, dims, grn) == variant
    for library in LIBRARIES:
        network = named_peer("timm" if library == "meta" else library, variant)
        if network is None:
            continue
        exported = export_state_dict(model, library)
        network_with(exported, library, network)
        architecture = convnext.infer_architecture(convnext.read_weights(exported))
        assert architecture == {
            "depths": depths, "dims": dims, "grn": grn, "in_channels": 3, "patch_size": 4,
            "num_classes": 1000, "layer_scale": 0.0 if grn else 1e-6}, library

ONE = {"depths": (2,), "dims": (16,)}
FOUR = {"depths": (1, 2, 1, 1), "dims": (8, 24, 96, 16)}
SIX = {"depths": (1, 1, 1, 1, 1, 11), "dims": (8, 8, 16, 16, 24, 24)}
V2 = {"grn": True}

@pytest.mark.parametrize(("library", "options"), [
    ("timm", FOUR), ("timm", FOUR | V2), ("timm", FOUR | V2 | {"layer_scale": 1e-6}),
    ("timm", FOUR | {"layer_scale": 0.0}),
    ("torchvision", ONE), ("torchvision", SIX | {"layer_scale": 0.0}),
    ("torchvision", FOUR | {"patch_size": 2}),
    ("huggingface", ONE | V2), ("huggingface", SIX | {"layer_scale": 0.0}),
    ("huggingface", FOUR | {"patch_size": 2})], ids=str)
def test_any_size_goes_to_the_libraries_that_have_it(library, options):
    """Without LayerScale, V1 is written with scales of 1, which V1 always has there."""
    model = randomise(convnext.ConvNeXt(num_classes=5, **options))
    exported = export_state_dict(model, library)
    network = network_with(exported, library, sized_peer(library, **options))
    x = torch.randn(1, 3, 128, 160)
    assert_same_function(network, model, x)
    assert_same_function(from_checkpoint(network.state_dict()), model, x)

def test_without_classes_it_is_hugging_faces_backbone():
    model = randomise(convnext.ConvNeXt(num_classes=0, **ONE))
    peer = transformers.ConvNextModel(transformers.ConvNextConfig(
        depths=[2], hidden_sizes=[16], num_stages=1, layer_norm_eps=1e-6)).eval()
    peer.load_state_dict(export_state_dict(model, "huggingface"))
    x = torch.randn(1, 3, 64, 64)
    pooled = logits_of(peer, x).pooler_output
    assert_close(pooled, logits_of(model, x), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("gamma", [None, 1e-6, 1], ids=["random", "as at the start", "an int"])
def test_fold_layer_scale_keeps_the_function(gamma):
    model = randomise(create_convnext("atto", num_classes=10))
    block = model.stages[0][0]
    if gamma:
        block.layer_scale = convnext.LayerScale(40, gamma)
    branch = block.mlp.pwconv2.weight.detach() * block.layer_scale.gamma.detach()[:, None]
    x = torch.randn(2, 3, 64, 64)
    expected = logits_of(model, x)
    convnext.fold_layer_scale(model)
    assert not any(name.endswith("gamma") for name, _ in model.named_parameters())
    assert_close(logits_of(model, x), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(block.mlp.pwconv2.weight, branch)

@needs_network
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
    x = cut(PIL.Image.open(path).convert("RGB"))[None]
    logits = logits_of(from_checkpoint(source), x)
    assert logits.argmax() == 281  # tabby cat
    assert_close(logits[0, :3], torch.tensor(expected), atol=3e-3, rtol=0)

@pytest.mark.parametrize(("variant", "library"), [
    ("tiny", "timm"), ("tiny", "torchvision"), ("v2_atto", "timm")])
def test_same_gradients_as_timm_and_torchvision(speed_up, variant, library):
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([3, 7])
    model = speed_up(randomise(create_convnext(variant, num_classes=10)))
    F.cross_entropy(model(x), y).backward()
    peer = named_peer(library, variant, num_classes=10).to_empty(device="cpu").eval()
    peer.load_state_dict(export_state_dict(model, library))
    F.cross_entropy(peer(x), y).backward()
    expected = {name: p.grad for name, p in peer.named_parameters()}
    for name, p in model.named_parameters():
        gradient = expected.pop(convnext.rename(name, "native", library))
        assert_close(p.grad, gradient.reshape(p.shape), atol=1e-5, rtol=1e-4)
    assert not expected

def test_pyramid_is_timms():
    peer = randomise(timm.create_model("convnext_atto"))
    model = create_convnext("atto").eval()
    load_weights(model, peer.state_dict())
    x = torch.randn(1, 3, 96, 64)
    maps = model.forward_pyramid(x)
    assert tuple(m.shape[1] for m in maps) == model.dims
    assert [m.shape[2:] for m in maps] == [(24, 16), (12, 8), (6, 4), (3, 2)]
    expected = peer.forward_intermediates(x, intermediates_only=True)
    assert_close(maps, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.forward_features(x), maps[-1])

def test_grn_is_timms():
    grn, peer = convnext.GRN(12), timm.layers.grn.GlobalResponseNorm(12)
    x = torch.randn(3, 5, 7, 12)
    assert torch.equal(grn(x), x)  # at the start
    for scale in (1, 1e-3):
        for p, q in zip(grn.parameters(), peer.parameters()):
            q.data.copy_(p.data.normal_(std=scale))
        assert_close(grn(x), peer(x))
    assert torch.autograd.gradcheck(grn.double(), x[:1, :2, :2].double().requires_grad_())

def test_drop_path_is_torchvisions():
    x = torch.randn(1000, 3, 2, 2)
    layer, outputs = convnext.DropPath(0.3), []
    for network in (layer, torchvision.ops.StochasticDepth(0.3, "row")):
        torch.manual_seed(1)
        outputs.append(network(x))
    assert_close(*outputs)
    assert layer.eval()(x) is x

def test_drop_path_can_be_exported_for_any_batch():
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(
        convnext.DropPath(0.5), (torch.ones(2, 3),), dynamic_shapes=dynamic)
    assert {*program.module()(torch.ones(50, 3)).flatten().tolist()} == {0, 2}

def test_stochastic_depth_drops_timms_branches():
    shape = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 3}
    model = randomise(convnext.ConvNeXt(**shape, drop_path=0.6))
    peer = timm.models.ConvNeXt(**shape, drop_path_rate=0.6)
    peer.load_state_dict(export_state_dict(model, "timm"))
    x, outputs = torch.randn(8, 3, 32, 32), []
    for network in (model, peer):
        torch.manual_seed(1)
        outputs.append(network.train()(x))
    assert_close(*outputs, atol=1e-5, rtol=1e-5)

def test_drop_path_schedule_is_timms():
    model = meta("tiny", drop_path=0.4)
    rates = [m.p for m in model.modules() if isinstance(m, convnext.DropPath)]
    with torch.device("meta"):
        peer = timm.create_model("convnext_tiny", drop_path_rate=0.4)
    assert rates == pytest.approx([
        getattr(m.drop_path, "drop_prob", 0.0) for m in peer.modules()
        if isinstance(m, timm.models.convnext.ConvNeXtBlock)])

def test_initialisation_is_the_papers():
    model = create_convnext("tiny", head_init_scale=0.001)
    for name, p in model.named_parameters():
        if name == "head.fc.weight":
            assert p.std().item() == pytest.approx(2e-5, rel=0.05)
        elif p.ndim >= 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
            assert p.mean().abs() < 1e-3, name
        else:
            value = 1e-6 if name.endswith("gamma") else float(name.endswith("weight"))
            assert torch.equal(p, torch.full_like(p, value)), name

# --- The road ---------------------------------------------------------------------------

TOP1 = (78.82, 79.36, 79.51, 78.28, 80.50, 80.64, 79.92, 80.35, 80.57, 80.57, 80.47,
        80.62, 81.27, 81.41, 81.47, 81.97)  # table 10
# As table 10 prints them, but for its last two rows, where it prints 4.46 and 4.49. But
# one norm in place of another costs nothing, and the last network is Tiny, with 4.46.
GFLOPS = (4.09, 4.53, 4.42, 2.35, 5.27, 4.64, 4.07, 4.10, 4.15, 4.21, 4.29, 4.15, 4.15,
          4.15, 4.15, 4.46)

def test_road_costs_what_the_paper_prints():
    """Each step from torchvision's ResNet-50 to ConvNeXt-Tiny, as it is printed."""
    _, *lines = convnext.road_table()
    steps = zip(lines, convnext.ROADMAP, TOP1, GFLOPS, strict=True)
    misprints = {"LayerNorm": 4.46, "separate downsampling": 4.49}
    before = 76.13
    for line, step, top1, gflops in steps:
        printed = misprints.get(step.name, gflops)
        remarks = ["not", "kept"] * (step.name in ("kernel 9x9", "kernel 11x11"))
        remarks += ["differs"] * (printed != gflops)
        assert line.split() == [
            *step.name.split(), f"{top1:.2f}", f"{top1 - before:+.2f}", f"{printed:.2f}",
            f"{gflops:.2f}", *remarks]
        before = top1 if step.kept else before

def road_network(step, width=16, patch_size=4, **changes):
    """The network of a step on the road, narrower, for ten classes."""
    design = convnext.DESIGNS[step]._replace(width=width, **changes)
    return convnext.roadmap_network(design, 10, patch_size)

def layers_as_they_run(block, x):
    """What a block is made of, in the order in which it runs."""
    names = {nn.ReLU: "relu", nn.GELU: "gelu", nn.Conv2d: "conv",
             nn.BatchNorm2d: "batchnorm", convnext.LayerNorm2d: "layernorm",
             convnext.DepthwiseConv: "depthwise", convnext.InvertedBottleneck: "mlp",
             convnext.WindowAttention: "attention"}
    found = []
    for module in block.modules():
        if name := names.get(type(module)):
            if name == "conv":
                name = f"{module.kernel_size[0]}x{module.kernel_size[1]}"
            module.register_forward_hook(lambda *_, name=name: found.append(name))
    block(x)
    return found

RESNET = "1x1 batchnorm relu 3x3 batchnorm relu 1x1 batchnorm relu"
FIRST = "depthwise batchnorm relu 1x1 batchnorm relu 1x1 batchnorm relu"

@pytest.mark.parametrize(("step", "layers"), [
    ("ResNet-50", RESNET), ("patchify stem", RESNET),
    ("depthwise conv", RESNET.replace("3x3", "depthwise")),
    ("inverted bottleneck", RESNET.replace("3x3", "depthwise")),
    ("depthwise conv first", FIRST), ("kernel 7x7", FIRST),
    ("GELU", FIRST.replace("relu", "gelu")),
    ("one activation", "depthwise batchnorm 1x1 batchnorm gelu 1x1 batchnorm"),
    ("one norm", "depthwise batchnorm 1x1 gelu 1x1"),
    ("LayerNorm", "depthwise layernorm 1x1 gelu 1x1"),
    ("separate downsampling", "depthwise layernorm 1x1 gelu 1x1"),
    ("window attention", "attention layernorm 1x1 gelu 1x1"),
    ("Swin block", "layernorm attention layernorm gelu mlp")], ids=by_text)
def test_layers_of_a_block_on_the_road(step, layers):
    blocks = [m for m in road_network(step)
              if isinstance(m, convnext.RoadmapBlock | convnext.SwinBlock)]
    assert len(blocks) == (16 if step == "ResNet-50" else 18)
    block = blocks[1]  # not the first, whose shortcut adapts the channels
    channels = 16 if convnext.DESIGNS[step].inverted else 64
    found = layers_as_they_run(block, torch.randn(2, channels, 7, 7))
    assert " ".join(found) == layers

def test_road_leads_from_torchvisions_resnet_50_to_convnext_tiny():
    first, last = (convnext.DESIGNS[convnext.ROADMAP[i].name] for i in (0, -1))
    tiny = create_convnext("tiny").eval()
    in_order = nn.ModuleList()  # our modules in the order in which they run
    for downsampling, stage in zip(tiny.downsample_layers, tiny.stages):
        in_order.extend([*downsampling, *stage])
    in_order.append(tiny.head)
    resnet = torchvision.models.resnet50()
    for design, peer, source in ((first, resnet, resnet), (last, tiny, in_order)):
        randomise(peer)
        network = convnext.roadmap_network(design).eval()
        state, expected = network.state_dict(), source.state_dict()
        network.load_state_dict({
            name: tensor.reshape(state[name].shape)
            for name, tensor in zip(state, expected.values(), strict=True)})
        x = torch.randn(2, 3, 64, 96)
        logits = logits_of(peer, x)
        tolerance = 1e-5 * logits.std().item()
        assert_close(logits_of(network, x), logits, atol=tolerance, rtol=1e-4)

@pytest.mark.parametrize("shift", [False, True])
def test_swin_block_is_torchvisions(shift):
    from torchvision.models.swin_transformer import SwinTransformerBlock

    block = randomise(convnext.SwinBlock(32, shift))
    peer = SwinTransformerBlock(32, 2, [7, 7], [3 * shift] * 2,
                                norm_layer=convnext.LayerNorm).eval()
    ours = block.state_dict()
    for name, theirs in (("attention.", "attn."), ("pwconv1", "0"), ("pwconv2", "3")):
        ours = {key.replace(name, theirs): p for key, p in ours.items()}
    ours["attn.relative_position_bias_table"] = ours.pop("attn.position_bias").T
    ours["attn.relative_position_index"] = peer.attn.relative_position_index
    assert torch.equal(block.attention.index.flatten(), peer.attn.relative_position_index)
    peer.load_state_dict(ours)
    x = torch.randn(2, 14, 21, 32)
    y = block(rearrange(x, "b h w c -> b c h w"))
    assert_close(rearrange(y, "b c h w -> b h w c"), peer(x))

@pytest.mark.parametrize("shift", [False, True])
def test_window_attention_is_torchvisions(shift):
    from torchvision.models.swin_transformer import shifted_window_attention

    layer = convnext.WindowAttention(32, shift)
    with torch.no_grad():
        bias = rearrange(layer.position_bias.normal_()[:, layer.index], "heads q k -> 1 heads q k")
        for size in ((7, 14), (14, 21)):  # an axis with one window is not shifted
            x = torch.randn(2, 32, *size)
            peer = shifted_window_attention(
                rearrange(x, "b c h w -> b h w c"), layer.qkv.weight, layer.proj.weight,
                bias, [7, 7], num_heads=2, shift_size=[3 * shift] * 2,
                qkv_bias=layer.qkv.bias, proj_bias=layer.proj.bias)
            assert_close(layer(x), rearrange(peer, "b h w c -> b c h w"))
        # torchvision's attends to what fills up a window beyond the map, ours must not:
        # compute one such window, with 4 rows and 2 columns, by itself.
        x = x[:, :, : 11 + 3 * shift, : 9 + 3 * shift]
        rows, columns = x.shape[2] - 4, x.shape[3] - 2
        window = rearrange(x[:, :, rows:, columns:], "b c h w -> b (h w) c")
        q, k, v = rearrange(layer.qkv(window), "b t (three m d) -> three b m t d",
                            three=3, m=2)
        bias = rearrange(bias, "1 m (p q) (r s) -> m p q r s", p=7, r=7)
        bias = rearrange(bias[:, :4, :2, :4, :2], "m p q r s -> m (p q) (r s)")
        weights = (q @ k.mT / 4 + bias).softmax(-1)
        y = layer.proj(rearrange(weights @ v, "b m t d -> b t (m d)"))
        assert_close(rearrange(y, "b (h w) c -> b c h w", h=4),
                     layer(x)[:, :, rows:, columns:])

# --- The fast depthwise convolution -----------------------------------------------------

@pytest.mark.parametrize("size", [(1, 2, 1, 1, 7), (2, 3, 5, 4, 7), (3, 2, 2, 9, 3)])
def test_depthwise_gradient_is_the_derivative(size):
    b, c, h, w, k = size
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True)
              for shape in ((b, c, h, w), (c, 1, k, k), (c,))]
    function = convnext.DepthwiseGradient.apply
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [
    (3, 5, 8, 8), (43, 96, 16, 16), (2, 40, 2, 30), (9, 16, 1, 1)])
def test_depthwise_gradient_is_pytorchs(size, dtype, monkeypatch):
    """As near to the derivative in double precision as PyTorch's, in three layouts, or for the
    large size, which takes seconds, in the networks' own."""
    monkeypatch.setattr(convnext, "FAST_DTYPES", (dtype,))  # on every CPU
    plain, fast = convnext.DepthwiseConv, convnext.FastDepthwiseConv
    conv, direction = plain(size[1]), torch.randn(size, dtype=dtype)
    wide = torch.randn(*size[:3], 2 * size[3], dtype=dtype)[..., ::2]

    def derivatives(kind, x, dtype=dtype):
        conv.__class__ = kind  # which is what speed_up does
        x = x.to(dtype, copy=True).requires_grad_()
        y = conv.to(dtype)(x)
        assert ("DepthwiseGradient" in y.grad_fn.name()) == (kind is fast)
        inputs = x, conv.weight, conv.bias
        return [g.double() for g in torch.autograd.grad(y, inputs, direction.to(dtype))]

    channels_last = wide.contiguous(memory_format=torch.channels_last)
    layouts = [channels_last] if size[0] == 43 else [wide, wide.contiguous(), channels_last]
    for x in layouts:
        exact = derivatives(plain, x, torch.double)
        all_three = zip(derivatives(fast, x), derivatives(plain, x), exact)
        for ours, pytorchs, truth in all_three:
            allowed = (pytorchs - truth).norm() + torch.finfo(dtype).eps * truth.norm()
            assert (ours - truth).norm() <= 1.5 * allowed

# --- The recipe -------------------------------------------------------------------------
# From here on: train.py, in its order. Nearly all tests take a network of two blocks.

SMALLEST = "--depths 1 1 --dims 8 16 --patch-size 4 --device cpu --amp off -j 0"
QUICK = f"{SMALLEST} --dataset synthetic -b 32"  # 100 images: 3 steps an epoch
PLAIN = "--crop-padding 0 --flip 0 --rand-augment 0 --random-erase 0 --mix-prob 0"
FOLDER = f"{SMALLEST} --dataset folder -b 4 --epochs 1"  # of make_folder: 3 steps
LARGE = f"{FOLDER} --img-size 72"  # these are read when they are needed

@pytest.fixture
def small(monkeypatch, tmp_path):
    """An empty folder, 100 training and 20 test images of shapes in place of 5,000 and
    1,000, one block per stage on the road, and the machine's settings as they were."""
    draw = train.draw_shapes

    def draw_fewer(count, size, seed):
        return draw(count // 50 if count >= 1000 else count, size, seed)

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

def recipe_of(line):
    """The recipe that a command line comes to."""
    typed = train.parse(shlex.split(line))
    origin = typed.get("resume") or typed.get("eval_only") or typed.get("init_from")
    return train.combine(typed, train.open_source(origin) if origin else None)

def prepared(line):
    """The run that a command line begins, before its first step."""
    recipe = recipe_of(f"{line} --output run")
    return train.prepare_run(recipe, train.prepare_data(recipe), None)

def outcome(line):
    """The exit code of a command line, or its error. Any other exception is a failure."""
    try:
        return str(train.main(shlex.split(line)))
    except (train.UserError, SystemExit, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"

@pytest.fixture
def run_once(small, tmp_path_factory):
    """Train as a line says, or copy what an earlier test trained so."""
    def run(line, folder):
        kept = tmp_path_factory.getbasetemp() / folder
        if not kept.exists():
            assert outcome(f"{line} --output {folder}") == "0"
            os.rename(folder, kept)
        shutil.copytree(kept, folder)
    return run

@pytest.fixture
def pretrained(run_once):
    """The weights of a short run with eight classes and statistics of its own."""
    run_once(f"{QUICK} --epochs 1 --lr 0.002 --layer-scale 0.1", "first")
    return "first/weights.safetensors"

def spy(monkeypatch, name, record):
    """Pass the arguments of train's function to `record` before each call."""
    function = getattr(train, name)

    def recorded(*args, **more):
        record(*args, **more)
        return function(*args, **more)

    monkeypatch.setattr(train, name, recorded)

def outcome_with(action, line, number, name="train_step"):
    """The outcome, if the action happens before this call of train's function."""
    calls = itertools.count(1)

    def act(*args, **more):
        if next(calls) == number:
            action()

    with pytest.MonkeyPatch.context() as patch:
        spy(patch, name, act)
        return outcome(line)

def interrupt():
    signal.raise_signal(signal.SIGINT)

def scores_of(model, images, labels, mean, std):
    """Loss and top-1 by PyTorch alone."""
    logits = logits_of(model, T.Normalize(list(mean), list(std))(images / 255))
    top1 = 100 * (logits.argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels).item(), top1.item()

def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))

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

def test_fan_in_initialisation():
    """Weights of a deviation of 1 / √fan-in, cut at two deviations, which leaves 0.88;
    those behind a GELU are smaller by √(2 · 12 blocks), and the classifier's are the
    paper's."""
    deviations, model = {}, create_convnext("atto", layer_scale=0)
    train.fan_in_init(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            scaled = module.weight.std().item() * module.weight[0].numel() ** 0.5
            deviations.setdefault(name.split(".")[-1], []).append(scaled)
    for name, count, expected in (
            ("0", 1, 0.88), ("1", 3, 0.88), ("dwconv", 12, 0.88), ("pwconv1", 12, 0.88),
            ("pwconv2", 12, 0.88 / 24**0.5), ("fc", 1, 0.02 * 320**0.5)):
        assert deviations.pop(name) == pytest.approx([expected] * count, rel=0.06), name
    assert not deviations

def test_local_initialisation():
    """Depthwise filters have norm 1. Without their centre they are noise whose neighbours are
    alike, and whose squares fall as a Gaussian of the block's width. Nothing else is changed."""
    torch.manual_seed(0)
    model = convnext.ConvNeXt((2, 1), (1000, 1000), num_classes=2, layer_scale=0)
    before = copy.deepcopy(model.state_dict())
    train.local_init(model)
    for name, weight in model.state_dict().items():
        assert name.endswith("dwconv.weight") != weight.equal(before[name]), name
    for block, width in zip([*model.stages[0], *model.stages[1]], (1, 1.75, 2.5), strict=True):
        filters = block.dwconv.weight.detach()
        assert filters.flatten(1).norm(dim=1) == pytest.approx(torch.ones(1000), abs=1e-5)
        centre = filters[:, 0, 3, 3]
        assert centre.mean() > 0.6 and centre.min() > 0
        squares = filters.square().mean(0)[0]
        expected = torch.exp(-((torch.arange(7) - 3) / width) ** 2)
        expected = expected * expected[:, None]
        squares[3, 3] = expected[3, 3] = 0
        assert squares / squares.sum() == pytest.approx(expected / expected.sum(), abs=0.02)
        assert torch.corrcoef(filters[:, 0, 3, 1:3].T)[0, 1] > 0.6

# --- The run ----------------------------------------------------------------------------

def steps_of(monkeypatch, line):
    """What train_step is given, and the random seed, in each step of a run."""
    steps = []
    with monkeypatch.context() as patch:
        spy(patch, "train_step", lambda *args: steps.append((*args, torch.initial_seed())))
        assert outcome(f"{line} --output run") == "0"
    shutil.rmtree("run")
    return steps

def received(monkeypatch, line):
    """Images and targets as bytes, and the seed, in each step of three epochs."""
    return [(x.numpy().tobytes() + targets.numpy().tobytes(), seed)
            for _, _, x, targets, *_, seed in steps_of(monkeypatch, f"{line} --epochs 3")]

def test_random_numbers_follow_from_seed_and_step_alone(small, monkeypatch):
    """In any number of workers. The images as augmented, and the seed of stochastic
    depth, differ in each step."""
    steps = received(monkeypatch, f"{QUICK} --seed 1")
    for workers in (1, 2):
        assert received(monkeypatch, f"{QUICK} --seed 1 -j {workers}") == steps
    others = received(monkeypatch, f"{QUICK} --seed 2")
    contents, seeds = zip(*steps + others)
    assert len(set(contents)) == len(set(seeds)) == 2 * 9  # three epochs of three steps

def test_the_same_images_are_augmented_by_seed_and_step(small, monkeypatch):
    monkeypatch.setattr(train, "epoch_order", lambda *_: torch.arange(8).repeat(3))
    recipe = recipe_of(f"{QUICK} --mix-prob 0 -b 8")
    data, batches = train.prepare_data(recipe), []
    for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        seeded = dataclasses.replace(recipe, seed=seed)
        source = train.BatchReader(data, seeded, steps_per_epoch=3)
        batches.append(source[step][0])
    assert torch.equal(batches[0], batches[1])
    for one, other in itertools.combinations(batches[1:], 2):
        assert not any(map(torch.equal, one, other))

def test_initial_weights_follow_from_the_seed(small):
    first, again, other = (
        prepared(f"{QUICK} --seed {seed}").model.stages[0][0].dwconv.weight
        for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)

def test_without_augmentation_every_training_image_is_seen_once(small, monkeypatch):
    """Normalized with the training images' statistics, and with its own label."""
    steps = steps_of(monkeypatch, f"{QUICK} {PLAIN} -b 25 --epochs 1")
    x, targets = (torch.cat([args[i] for args in steps]) for i in (2, 3))
    images = train.draw_shapes(5000, 32, seed=1)
    pixels = images.images.double() / 255
    mean, std = pixels.mean((0, 2, 3), True), pixels.std((0, 2, 3), False, keepdim=True)
    expected = ((pixels - mean) / std).float()
    order = torch.cdist(x.flatten(1), expected.flatten(1)).argmin(1)
    assert sorted(order.tolist()) == [*range(100)] != order.tolist()
    assert_close(x, expected[order], atol=1e-5, rtol=1e-5)
    assert torch.equal(targets, F.one_hot(images.labels[order], 8).float())

def measured(monkeypatch, line):
    """(images, which weights, tta) of each evaluation in a run, and the run."""
    calls, runs, evaluate = [], [], train.evaluate
    spy(monkeypatch, "train", runs.append)

    def record(model, batches, mean, std, precision, tta=False):
        run, batches = runs[0], list(batches)
        assert torch.equal(mean, run.data.mean) and torch.equal(std, run.data.std)
        assert any(model is known for known in (run.model, run.ema, run.eval_model))
        images = torch.cat([images for images, _ in batches]).numpy().tobytes()
        calls.append((images, "raw" if model is run.model else "average", tta))
        return evaluate(model, batches, mean, std, precision, tta)

    monkeypatch.setattr(train, "evaluate", record)
    assert outcome(f"{line} --output run") == "0"
    return calls, runs[0]

def test_held_out_images_choose_and_test_images_report(small, monkeypatch):
    line = f"{QUICK} --epochs 2 --val-size 30 --ema-horizon 0.5 --tta"
    calls, run = measured(monkeypatch, line)
    val = run.data.val.images.numpy().tobytes()
    test = train.draw_shapes(1000, 32, seed=0).images.numpy().tobytes()
    assert calls[:4] == 2 * [(val, "raw", False), (val, "average", False)]
    # of last.pt and best.pt
    assert calls[4:] == 2 * [(test, "average", False), (test, "average", True)]

@pytest.mark.parametrize(("flags", "noted"), [
    ("--epochs 49", True), ("--epochs 50", False), ("--epochs 49 --mix-prob 0", False),
    ("--epochs 49 --rand-augment 0", False)])
def test_much_augmentation_for_few_epochs_is_noted(small, monkeypatch, capsys, flags, noted):
    monkeypatch.setattr(train, "train", lambda run: None)
    assert outcome(f"{QUICK} {flags} --output run") == "0"
    assert ("this is much augmentation" in capsys.readouterr().err) == noted

@pytest.mark.parametrize(("flags", "expected"), [
    ("--epochs 5 --eval-every 2", ["12", "29", "26", "13", "0"]),
    ("--epochs 4 --eval-every 4 --start-size 16", ["27", "24", "3", "0"])],
    ids=["evaluations", "sizes"])
def test_remaining_time(small, monkeypatch, capsys, flags, expected):
    """1 s for each of 3 steps, and 10 s for an evaluation. Nothing is evaluated before the first
    line. Half as large images, half of the time, let expect a fourfold time later."""
    clock = [0]
    step, evaluate = train.train_step, train.evaluate

    def slow_step(*inputs):
        clock[0] += 1
        return step(*inputs)

    def slow_evaluate(*inputs):
        clock[0] += 10
        return evaluate(*inputs)

    monkeypatch.setattr(train, "train_step", slow_step)
    monkeypatch.setattr(train, "evaluate", slow_evaluate)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    assert outcome(f"{QUICK} {flags} --ema-horizon 0 --output run") == "0"
    assert re.findall(r"(\d+) s left", capsys.readouterr().out) == expected

def test_without_held_out_images_the_test_images_are_measured(small, monkeypatch):
    calls, _ = measured(monkeypatch, f"{QUICK} --epochs 1 --ema-horizon 0")
    test = train.draw_shapes(1000, 32, seed=0).images.numpy().tobytes()
    assert calls == 2 * [(test, "raw", False)]
    assert not Path("run/best.pt").exists()

@pytest.mark.parametrize(("horizon", "column", "scores"), [
    (0.5, "val_ema_top1", [1, 2, 2, 9, 11, 5]), (0, "val_top1", [1, 9, 9])])
def test_best_is_the_first_epoch_that_is_best(small, monkeypatch, capsys, horizon,
                                              column, scores):
    """The second here, by the averaged weights, if any. An epoch scores raw, average."""
    scores, evaluate = iter(scores), train.evaluate

    def score(*args):
        # the report at the end gives a sixth argument, tta
        invented = {"top1": next(scores)} if len(args) == 5 else {}
        return evaluate(*args) | invented

    monkeypatch.setattr(train, "evaluate", score)
    line = f"{QUICK} --epochs 3 --lr 0.01 --val-size 30 --ema-horizon {horizon}"
    assert outcome(f"{line} --output run") == "0"
    state = torch.load("run/best.pt", weights_only=True)
    assert state["history"][-1]["epoch"] == 2 and state["history"][-1][column] == 9
    assert state["step"] == 4  # 70 images: 2 steps an epoch
    test = train.draw_shapes(1000, 32, seed=0)
    loss, _ = scores_of(from_checkpoint("run/best.pt"), test.images, test.labels,
                        state["mean"], state["std"])
    assert f"run/best.pt: test loss {loss:.4f}" in capsys.readouterr().out

def test_the_average_is_what_is_saved_and_reported(small, monkeypatch, capsys):
    """At a horizon of three steps, where it differs from the weights."""
    path, name = [], "stages.1.0.mlp.pwconv1.weight"
    step = train.train_step

    def record(model, *args):
        loss = step(model, *args)
        path.append(model.state_dict()[name].clone())
        return loss

    monkeypatch.setattr(train, "train_step", record)
    line = f"{QUICK} --lr 0.01 --epochs 2 --ema-horizon 0.5 --output run"
    assert outcome(line) == "0"
    text, row = capsys.readouterr().out, read_csv("run/metrics.csv")[-1]
    average = path[0]
    for weights in path[1:]:
        average = average + (weights - average) / 3
    saved, state = load_file("run/weights.safetensors"), torch.load("run/last.pt")
    assert_close(saved[name], average)
    assert all(torch.equal(saved[key], state["ema"][f"module.{key}"]) for key in saved)
    assert torch.equal(state["model"][name], path[-1])
    assert not torch.allclose(saved[name], path[-1], rtol=1e-3)
    test = train.draw_shapes(1000, 32, seed=0)
    for prefix, weights in (("test_ema", saved), ("test", state["model"])):
        loss, top1 = scores_of(from_checkpoint(weights), test.images, test.labels,
                               state["mean"], state["std"])
        assert float(row[f"{prefix}_loss"]) == pytest.approx(loss, rel=1e-5)
        assert float(row[f"{prefix}_top1"]) == pytest.approx(top1)
    loss, top1, top5 = (float(row[f"test_ema_{key}"]) for key in ("loss", "top1", "top5"))
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
    assert [float(row["lr"]) for row in rows] == lrs[2::3]
    assert lrs[-1] == pytest.approx(5e-4)
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

def test_schedule_and_recipe_reach_the_step(small, monkeypatch):
    flags = "--amp bf16 --lr 0.01 --schedule linear --warmup-epochs 1 --min-lr 0.001"
    line = f"{QUICK} {flags} --epochs 4"
    steps = steps_of(monkeypatch, line)
    rise, fall = [0.01 / 3, 0.02 / 3, 0.01], [0.01 - 0.001 * i for i in range(9)]
    assert [args[4] for args in steps] == pytest.approx(rise + fall)
    recipe, precision, scaler, teacher, _ = steps[0][5:]
    assert recipe == recipe_of(f"{line} --output run") and precision == torch.bfloat16
    assert not scaler.is_enabled() and teacher is None

def test_the_warmup_can_end_within_an_epoch(small, monkeypatch):
    """A twentieth of eight epochs of ten steps."""
    lrs = [args[4] for args in steps_of(monkeypatch, f"{QUICK} -b 10 --epochs 8")]
    assert lrs[:5] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])

def test_images_grow_and_mixing_ends(small, monkeypatch):
    line = f"{QUICK} --start-size 16 --start-share 0.25 --epochs 4 -b 50 --mix-off-epochs 1"
    seen = [(args[2].shape[-1], bool((args[3].max(1).values < 1).any()))
            for args in steps_of(monkeypatch, line)]
    assert seen == [(16, True)] * 2 + [(32, True)] * 4 + [(32, False)] * 2

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

def assert_same_files(folder, other):
    """The same weights, state and table."""
    for name, read in (("last.pt", torch.load), ("best.pt", torch.load),
                       ("metrics.csv", read_csv), ("weights.safetensors", load_file)):
        assert Path(folder, name).exists() == Path(other, name).exists()
        if Path(folder, name).exists():
            ours, expected = (without_times(read(f"{run}/{name}"))
                              for run in (folder, other))
            assert ours == expected, name

@pytest.mark.parametrize(("line", "at_resume"), [
    pytest.param(f"{QUICK} --val-size 20", "", id="adamw"),
    pytest.param(f"{QUICK} --optimizer muon --ema-horizon 0.5 --start-size 16", "",
                 id="muon, average, growing images"),
    pytest.param(f"{QUICK} --teacher first/last.pt --accumulate 2 --clip-grad 1", "-j 1",
                 id="teacher, accumulation"),
    pytest.param("--init-from first --recipe finetune --lr 0.01 --dataset synthetic -b 32 "
                 "--device cpu --amp off -j 0", "", id="fine-tuning"),
    pytest.param(f"{QUICK} --amp bf16", "", id="bfloat16", marks=pytest.mark.skipif(
        not train.cpu_has_bfloat16(), reason="slow on this CPU")),
    pytest.param(f"{SMALLEST} --dataset folder -b 4 --img-size 72 -j 1", "-j 2",
                 id="random crops in workers"),
    pytest.param("--road ResNet-50 --width 8 --optimizer sgd --patch-size 4 --device cpu "
                 "--amp off -j 0 --dataset synthetic -b 32", "", id="BatchNorm")])
def test_a_stopped_run_ends_with_the_same_bits(request, line, at_resume):
    """Stopped in the middle of the second of three epochs of three steps."""
    request.getfixturevalue("pretrained" if "first" in line else "small")
    if "folder" in line:
        make_folder("data")
    line += " --epochs 3 --output "
    assert outcome(line + "whole") == "0"
    assert outcome_with(interrupt, line + "parts", 5) == "130"
    assert torch.load("parts/last.pt", weights_only=True)["step"] == 5
    torch.rand(7)  # the random state at the time does not matter
    assert outcome(f"--resume parts/last.pt {at_resume}") == "0"
    assert_same_files("parts", "whole")

# --- One step ---------------------------------------------------------------------------

@pytest.mark.parametrize(("optimizer", "parts", "tolerance"), [
    ("adamw", 3, 0.01), ("sgd", 1, 0.01),
    ("muon", 1, 0.2)])  # bfloat16 rounds; test_muon_is_pytorchs is closer
def test_steps_are_pytorchs(device, optimizer, parts, tolerance):
    """With unequal parts, clipping, two optimizers and a factor for each group."""
    recipe = train.Recipe(optimizer=optimizer, accumulate=parts, weight_decay=0.3,
                          label_smoothing=0.2, clip_grad=0.5,
                          lr=1.0 if optimizer == "sgd" else 1e-3)
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
        expected = F.cross_entropy(theirs(x), y, label_smoothing=recipe.label_smoothing)
        assert_close(loss, expected.detach(), rtol=1e-3, atol=1e-3)
        expected.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for peer, factor in zip(peers, (1, 20)):  # Muon's rate is 20 times AdamW's
            for group in peer.param_groups:
                group["lr"] = factor * lr
            peer.step()
            peer.zero_grad()
    for name, p in theirs.state_dict().items():
        moved = (p - before[name]).norm()
        assert (ours.state_dict()[name] - p).norm() <= tolerance * moved > 0, name

# --- Evaluation -------------------------------------------------------------------------

@pytest.mark.parametrize("mirrored", [False, True], ids=["plain", "mirrored"])
def test_evaluation_is_timms(device, mirrored):
    """In evaluation mode: stochastic depth would give other numbers."""
    data = train.draw_shapes(260, 32, seed=0)  # more than a batch
    model = randomise(convnext.ConvNeXt(
        (1, 1), (8, 16), num_classes=8, drop_path=0.9)).to(device)
    mean, std = torch.tensor([0.3, 0.4, 0.5]), torch.tensor([0.2, 0.3, 0.4])
    x = T.Normalize(mean.tolist(), std.tolist())(data.images / 255).to(device)
    logits = logits_of(model, x).cpu()
    if mirrored:
        logits = (logits + logits_of(model, TF.horizontal_flip(x)).cpu()) / 2
    accuracies = timm.utils.accuracy(logits, data.labels, (1, 5))
    expected = [F.cross_entropy(logits, data.labels), *accuracies]
    batches = train.evaluation_batches(data, train.Recipe())
    scores = train.evaluate(model.train(), batches, mean, std, torch.float32, mirrored)
    assert [*scores] == ["loss", "top1", "top5"]
    assert [*scores.values()] == pytest.approx([e.item() for e in expected], rel=1e-4)

def test_evaluation_in_bfloat16_counts_in_float32():
    class Fixed(nn.Module):
        """A network with these logits, whatever it sees."""
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.randn(250, 10).bfloat16())

        def forward(self, x):
            return self.logits

    model, labels = Fixed(), torch.randint(10, (250,))
    batch = torch.zeros(250, 3, 4, 4, dtype=torch.uint8), labels
    scores = train.evaluate(model, [batch], torch.zeros(3), torch.ones(3), torch.bfloat16)
    logits = model.logits.float()
    expected = [F.cross_entropy(logits, labels), *timm.utils.accuracy(logits, labels, (1, 5))]
    assert [*scores.values()] == pytest.approx([e.item() for e in expected], rel=1e-6)

def test_a_smaller_batch_needs_less_memory_in_the_evaluation_too():
    """Which runs out of memory where only a few images fit."""
    data = train.draw_shapes(260, 32, seed=0)
    for batch_size, accumulate, largest in ((128, 1, 250), (10, 1, 80), (10, 5, 16)):
        recipe = train.Recipe(batch_size=batch_size, accumulate=accumulate)
        sizes = [len(labels) for _, labels in train.evaluation_batches(data, recipe)]
        assert max(sizes) == largest and sum(sizes) == 260

@pytest.mark.parametrize(("size", "given", "share", "mode"), [
    (224, None, 0.875, "center"), (288, 0.95, 0.95, "center"), (384, None, 1.0, "squash"),
    (384, 0.9, 0.9, "center"), (224, 0, 1.0, "squash"), (32, None, 1.0, "center"),
    (64, 0.5, 1.0, "center")])
def test_evaluation_square_is_timms(size, given, share, mode):
    picture = PIL.Image.effect_noise((500, 375), 80).convert("RGB")
    theirs = timm.data.create_transform(
        size, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1), crop_pct=share,
        crop_mode=mode)(picture)
    ours = TF.pil_to_tensor(train.evaluation_square(size, given)(picture))
    assert_close(ours / 255, theirs)

# --- The optimizers ---------------------------------------------------------------------

@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_is_pytorchs(schedule):
    lrs = torch.optim.lr_scheduler
    # the cosine ends in the last step, the line one step after it
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.3)
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

def parameter_names(model, *groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in groups for p in group["params"]]

@pytest.mark.parametrize("variant", ["atto", "v2_atto"])
def test_weight_decay_groups_are_timms(variant):
    model = create_convnext(variant)
    found = []
    for function in (train.parameter_groups, timm.optim.param_groups_weight_decay):
        groups = function(model, 0.05)
        found.append({group["weight_decay"]: {*parameter_names(model, group)}
                      for group in groups})
    assert found[0] == found[1]

def test_muon_gets_the_matrices_of_blocks():
    model = convnext.ConvNeXt((1, 1), (8, 16), grn=True)
    recipe = train.Recipe(optimizer="muon", layer_decay=0.8)
    adamw, muon = train.make_optimizers(model, recipe)
    names = dict(model.named_parameters()).keys()
    expected = {name for name in names if re.search(r"pwconv\d.weight", name)}
    assert {*parameter_names(model, *muon.param_groups)} == expected
    assert {*parameter_names(model, *adamw.param_groups)} == names - expected
    scales = [group["lr_scale"] for group in muon.param_groups]  # 20 times AdamW's
    assert scales == pytest.approx([20 * 0.8**2, 20 * 0.8])

@pytest.mark.parametrize(("step", "kernels"), [
    ("ResNet-50", {(3, 3): 2, (1, 1): 6}), ("depthwise conv", {(1, 1): 6}),
    ("window attention", {(): 4, (1, 1): 4}), ("Swin block", {(): 8})])
def test_muon_gets_the_dense_weights_of_the_road(step, kernels):
    """Branches' and shortcuts' filters, and matrices."""
    model = road_network(step, depths=(1, 1))
    _, muon = train.make_optimizers(model, train.Recipe(optimizer="muon", road=step))
    assert kernels == Counter(
        tuple(p.shape[2:]) for group in muon.param_groups for p in group["params"])

@pytest.mark.parametrize(("variant", "decay", "expected"), [
    # 0.8 ** (13 - i) for the authors' layers i: stem, stages 1 and 2, 27 blocks by 3
    ("base", 0.8, (0.0550, 0.0687, 0.0859, 0.1074, 0.1342, 0.1678, 0.2097, 0.2621, 0.3277,
                   0.4096, 0.5120, 0.6400, 0.8, 1)),
    ("tiny", 0.7, tuple(0.7**i for i in range(7, -1, -1)))], ids=["base", "tiny"])
def test_layer_decay_is_the_authors(variant, decay, expected):
    model = meta(variant)
    scales = {name: group["lr_scale"]
              for group in train.parameter_groups(model, 0.05, decay)
              for name in parameter_names(model, group)}
    last = len(expected) - 1
    layers = {"downsample_layers.0.": 0, "stages.0.": 1, "downsample_layers.1.": 2,
              "stages.1.": 2, "downsample_layers.2.": 3, "downsample_layers.3.": last - 1,
              "stages.3.": last - 1, "head.": last}
    for block in range(len(model.stages[2])):
        layers[f"stages.2.{block}."] = 3 + block // 3
    for name, _ in model.named_parameters():
        layer = next(layer for part, layer in layers.items() if name.startswith(part))
        assert scales[name] == pytest.approx(expected[layer], abs=5e-5), name

@pytest.mark.parametrize("shape", [
    (24, 8), (8, 24), (16, 16), (12, 3, 3, 3), (6, 8, 2, 2)], ids=str)
def test_muon_is_pytorchs(shape):
    """On filters, it is torch.optim.Muon on their flattened copies."""
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    muon = train.Muon([{"params": [ours], "weight_decay": 0.3}], 0.02, torch.bfloat16)
    peer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.3)
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.flatten(1).clone()
        muon.step()
        peer.step()
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
    assert_close(y, values.diag(), atol=1e-4, rtol=0)
    assert 0.65 < values.min() and values.max() < 1.25

def test_orthogonalize_keeps_small_gradients_in_float16():
    """Which has no numbers below 6e-8."""
    gradient = torch.randn(40, 10)
    expected = train.orthogonalize(gradient)
    y = train.orthogonalize(1e-8 * gradient, torch.float16).float()
    assert F.cosine_similarity(y.flatten(), expected.flatten(), dim=0) > 0.999

def test_the_average_of_weights_is_a_running_mean():
    """Of BatchNorm's statistics, too."""
    model = nn.Sequential(nn.BatchNorm2d(2))
    average = train.average_of(model, 4)
    expected = 0
    for step in range(5):
        model[0].weight.data.fill_(step)
        model[0].running_mean.fill_(10 * step)
        average.update_parameters(model)
        expected += (step - expected) / 4
    assert average.module[0].weight[0].item() == pytest.approx(expected)
    assert average.module[0].running_mean[0].item() == pytest.approx(10 * expected)

# --- Augmentation -----------------------------------------------------------------------

@pytest.fixture
def tiny_images():
    return torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)

def test_augment_does_all_of_it_in_this_order(monkeypatch):
    """Each function is replaced by one that notes what it is given, and adds 1."""
    calls = []
    for name in ("crop_and_flip", "rand_augment", "normalize", "random_erase", "mix"):
        def note(x, *args, name=name):
            calls.append((name, round(x.max().item()), x.shape[-1], x.dtype, *args))
            x = x + (255 if x.dtype == torch.uint8 else 1)
            return (x, None) if name == "mix" else x

        monkeypatch.setattr(train, name, note)
    recipe = train.Recipe(
        crop_padding=3, flip=0.4, rand_augment=7, random_erase=0.2, mixup=0.3, cutmix=0.6,
        start_size=16, epochs=10)
    x, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4)
    mean, std = torch.zeros(3), torch.ones(3)
    x, _ = train.augment(recipe, x, labels, 10, mean, std, epoch=0)
    assert calls == [
        ("crop_and_flip", 0, 32, torch.uint8, 3, 0.4),
        ("rand_augment", 1, 32, torch.float32, 7),
        ("normalize", 2, 16, torch.float32, mean, std),
        ("random_erase", 3, 16, torch.float32, 0.2),
        ("mix", 4, 16, torch.float32, labels, 10, 0.3, 0.6)]
    assert round(x.max().item()) == 5

WITHOUT_AUGMENTATION = train.parse(PLAIN.split())

def test_images_shrink_as_pillow_does_it():
    """Antialiased, between 0 and 1. Pillow rounds twice."""
    recipe = train.Recipe(**WITHOUT_AUGMENTATION, start_size=16, epochs=2)
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.zeros(3), torch.ones(3)
    ours, _ = train.augment(recipe, x, torch.arange(2), 2, mean, std, epoch=0)
    theirs = [TF.to_pil_image(image).resize((16, 16), PIL.Image.Resampling.BILINEAR)
              for image in x]
    theirs = torch.stack([TF.pil_to_tensor(image) for image in theirs])
    assert_close(ours, theirs / 255, atol=1.1 / 255, rtol=0)

@pytest.mark.parametrize("off", [
    {"mix_prob": 0}, {"mix_off_epochs": 10}, {"mixup": 0, "cutmix": 0},
    {"mix_prob": 0, "img_size": 72, "crop_padding": 4}], ids=str)
def test_augmentation_that_is_off_leaves_images_and_labels(tiny_images, off):
    """Large images are not shifted: they are cropped when they are read."""
    usual = WITHOUT_AUGMENTATION | {"mix_prob": 1, "img_size": 16}
    recipe = train.Recipe(**usual | off, epochs=10)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    labels = torch.arange(64) % 5
    x, targets = train.augment(recipe, tiny_images, labels, 5, mean, std, epoch=3)
    assert_close(x, T.Normalize(mean.tolist(), std.tolist())(tiny_images / 255))
    assert torch.equal(targets, F.one_hot(labels, 5).float())

@pytest.mark.parametrize("size", [32, 72])
def test_images_of_any_size_are_mirrored(size):
    recipe = train.Recipe(**WITHOUT_AUGMENTATION | {"flip": 1}, img_size=size)
    x = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    ours, _ = train.augment(recipe, x, torch.arange(2), 2, torch.zeros(3), torch.ones(3), epoch=0)
    assert_close(ours, TF.horizontal_flip(x) / 255)

def test_a_share_of_the_batches_is_mixed(tiny_images):
    recipe = train.Recipe(**WITHOUT_AUGMENTATION | {"mix_prob": 0.3}, img_size=16)
    x, labels, mean, std = tiny_images[:4], torch.arange(4), torch.zeros(3), torch.ones(3)
    mixed = 0
    for _ in range(300):
        _, targets = train.augment(recipe, x, labels, 4, mean, std, epoch=3)
        mixed += bool((targets.max(1).values < 1).any())
    assert 60 < mixed < 120

def test_crop_and_flip_is_a_loop_of_torchvisions(tiny_images):
    padded, draws = TF.pad(tiny_images, [2], padding_mode="reflect"), []
    for before, after in zip(padded, train.crop_and_flip(tiny_images, 2, 0.5)):
        choices = itertools.product(range(5), range(5), (False, True))
        match, = (
            (top, left, flip) for top, left, flip in choices
            if torch.equal(TF.crop(before, top, left, 8, 8),
                           TF.horizontal_flip(after) if flip else after))
        draws.append(match)
    tops, lefts, flips = zip(*draws)
    assert {*tops} == {*lefts} == {*range(5)}
    assert len({*zip(tops, lefts)}) > 15  # both are drawn
    assert 16 < sum(flips) < 48
    assert torch.equal(train.crop_and_flip(tiny_images, 0, 0.0), tiny_images)
    assert torch.equal(train.crop_and_flip(tiny_images, 0, 1.0), tiny_images.flip(3))

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
    options = warp if name.startswith(("rotate", "translate")) else {}
    return lambda i: operation(i, *arguments, **options)

@pytest.mark.parametrize("name", train.RAND_AUGMENT_OPS)
def test_rand_augment_operation_is_timms(name):
    noise = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    images = (TF.autocontrast(T.GaussianBlur(3, 0.8)(noise)) * 0.7 + 40).byte()
    for strength in (0.9, -0.45):
        strengths = torch.full((2, 1, 1, 1), strength)
        ours = 255 * train.RAND_AUGMENT_OPS[name](images / 255, strengths)
        operation = pillow_operation(name, strength)
        theirs = [TF.pil_to_tensor(operation(TF.to_pil_image(i))) for i in images]
        difference = (ours - torch.stack(theirs)).abs()
        # of 255; Pillow rounds, and does not blend at the border
        assert difference.mean() < 1.5
        assert difference[..., 8:24, 8:24].max() < (12 if name == "equalize" else 4.1)
        # so what they agree on is a change
        assert (torch.stack(theirs).float() - images).abs().mean() > 3

def test_rand_augment_draws_for_each_image_what_timm_draws(monkeypatch):
    """Twice one of fifteen operations, half of them left out, of N(level, 0.5) / 10."""
    drawn = {name: [] for name in train.RAND_AUGMENT_OPS}
    for name, strengths in drawn.items():
        def note(x, strength, strengths=strengths):
            strengths.append(strength.flatten())
            return x + 1

        monkeypatch.setitem(train.RAND_AUGMENT_OPS, name, note)
    times = train.rand_augment(torch.zeros(15_000, 3, 1, 1), 5)[:, 0, 0, 0].long()
    assert_close(times.bincount() / 15_000, torch.tensor([0.25, 0.5, 0.25]),
                 atol=0.015, rtol=0)
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

def erased_rectangles(y):
    """Height, width, area, top and left of what is not 0, in images with such pixels."""
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
    peer = T.RandomErasing(0.6, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")
    zeros = torch.zeros(3000, 3, 32, 32)
    ours = erased_rectangles(train.random_erase(zeros, 0.6))
    theirs = erased_rectangles(torch.stack([peer(image) for image in zeros]))
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

def test_mixup_and_cutmix_are_drawn_equally_often():
    """Each mixes the images as it does the targets."""
    x, labels = torch.rand(2, 3, 16, 16), torch.arange(2)
    others, blended = x.roll(1, 0), 0
    for _ in range(400):
        mixed, targets = train.mix(x, labels, 2, 0.8, 1.0)
        share = targets[0, 0]
        assert_close(targets.sum(1), torch.ones(2))
        if torch.allclose(mixed, share * x + (1 - share) * others, atol=1e-5):
            blended += 1
        else:  # a rectangle of the other image, of the area in the targets
            kept = (mixed == x).all(1, True)
            assert torch.equal(torch.where(kept, x, others), mixed)
            assert_close(kept[0].float().mean(), share)
    assert 160 < blended < 240

@pytest.mark.parametrize("alpha", [0.1, 2.0])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_each_mix_has_its_alpha(kind, alpha):
    """The distribution of shares is that of torchvision's transform with this alpha."""
    x, labels = torch.rand(2, 3, 16, 16), torch.arange(2)
    peer = {"mixup": T.MixUp, "cutmix": T.CutMix}[kind](alpha=alpha, num_classes=2)
    alphas = {"mixup": 0.0, "cutmix": 0.0} | {kind: alpha}
    ours = torch.stack([train.mix(x, labels, 2, **alphas)[1][0, 0] for _ in range(400)])
    theirs = torch.stack([peer(x, labels)[1][0, 0] for _ in range(400)])
    assert largest_difference(ours, theirs) < 0.14  # by chance in 1 of 1,000

# --- What is drawn, held out and measured -----------------------------------------------

def test_statistics_are_numpys(small):
    """Of the training images, those held out included, and not of the test images."""
    data = train.prepare_data(recipe_of(f"{QUICK} --val-size 20 -b 5"))  # three batches
    pixels = train.draw_shapes(5000, 32, seed=1).images.numpy() / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(data.std, pixels.std((0, 2, 3)), rtol=1e-5)

def test_statistics_of_large_images_are_numpys(small):
    shades = [np.uint8(40 * i) + RNG.integers(0, 40, (80, 90, 3), np.uint8) for i in range(6)]
    split = train.Images(shades, [0, 1] * 3, ["a", "b"])
    data = train.prepare_data(recipe_of(f"{LARGE} -b 1"), splits=(split, split))
    square = train.evaluation_square(72, None)
    pixels = np.stack([square(PIL.Image.fromarray(shade)) for shade in shades]) / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(data.std, pixels.std((0, 1, 2)), rtol=1e-5)

def test_an_epoch_is_a_new_permutation():
    orders = [train.epoch_order(50, seed, epoch).tolist()
              for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    for one, other in itertools.combinations(orders[:3], 2):
        assert sorted(one) == [*range(50)] != one != other
    assert orders[3] == orders[0]

@pytest.mark.parametrize(("count", "batch_size"), [(50, 10), (53, 10), (7, 10)])
def test_the_batches_of_an_epoch_share_no_image(count, batch_size, monkeypatch):
    """The last images, if they do not fill a batch, are left out, unless there is no other."""
    taken = []

    class Recorder:
        def __len__(self):
            return count

        def __getitem__(self, indices):
            taken.append(indices)
            return None, None

    monkeypatch.setattr(train, "augment", Mock())
    data = train.Data(Recorder(), None, None, [], None, None, "", "")
    steps = max(1, count // batch_size)
    reader = train.BatchReader(data, recipe_of(f"-b {batch_size}"), steps)
    for step in range(2 * steps):
        reader[step]
    for epoch in (0, 1):
        seen = list(itertools.chain(*taken[epoch * steps : (epoch + 1) * steps]))
        order = train.epoch_order(count, 0, epoch).tolist()
        assert seen == order[: min(count, steps * batch_size)]

def test_seeds_never_meet():
    """Those of runs, purposes, and steps or epochs."""
    seeds = {train.seed_for(seed, purpose, number) for seed in (0, 1)
             for purpose in ("order", "augmentation", "network")
             for number in range(3000)}
    assert len(seeds) == 2 * 3 * 3000

def load(line, train_split=True):
    return train.load_split(recipe_of(line), train_split)

def save_picture(path):
    """Save one of a single colour."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (8, 8)).save(path)

@pytest.mark.parametrize(("name", "files", "learned", "tested"), [
    ("cifar10", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
     [1, 1, 2, 2, 3, 3, 4, 4, 5, 5], [6, 6]),
    ("cifar100", ["train", "test"], [1, 1], [2, 2])])
def test_splits_are_torchvisions(small, monkeypatch, name, files, learned, tested):
    """torchvision's own class reads the files, so the training and the test images are
    those of the data set."""
    dataset = getattr(torchvision.datasets, name.upper())
    folder = Path("data", dataset.base_folder)
    folder.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"
    for number, file in enumerate(files, 1):  # two images each, of ones in the first file
        content = {"data": np.full((2, 3072), number, np.uint8), key: [number, 0]}
        Path(folder, file).write_bytes(pickle.dumps(content))
    classes = [f"class {i}" for i in range(100)]
    names = pickle.dumps({dataset.meta["key"]: classes})
    Path(folder, dataset.meta["filename"]).write_bytes(names)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    for train_split, pixels in ((True, learned), (False, tested)):
        data = load(f"--dataset {name}", train_split)
        assert [image.max() for image in data.images] == pixels
        assert data.labels[::2].tolist() == pixels[::2] and data.classes == classes

def test_splits_of_food101_and_imagenet_are_torchvisions(small, capsys):
    Path("data/food-101/meta").mkdir(parents=True)
    dishes = "waffles", "apple_pie"
    for split, dish in itertools.product(("train", "test"), dishes):
        save_picture(f"data/food-101/images/{dish}/{split}.jpg")
        listed = Path("data/food-101/meta", f"{split}.json")
        listed.write_text(json.dumps({dish: [f"{dish}/{split}"] for dish in dishes}))
    for train_split, name in ((True, "train.jpg"), (False, "test.jpg")):
        data = load("--dataset food101 --img-size 96", train_split)
        found = [(Path(path).name, data.classes[label])
                 for path, label in zip(data.images, data.labels)]
        assert found == [(name, "waffles"), (name, "apple_pie")]
        assert [Path(path).parent.name for path in data.images] == [*dishes]
    for split, wnid in itertools.product(("train", "val"), ("n02", "n01")):
        save_picture(f"data/{split}/{wnid}/{split}.JPEG")
    # two classes are called crane, so they have their identifiers as names
    names = {"n01": ("crane", "bird"), "n02": ("crane", "machine")}
    torch.save((names, []), "data/meta.bin")
    for train_split, name in ((True, "train"), (False, "val")):
        data = load("--dataset imagenet --img-size 96", train_split)
        assert [Path(path).parts[-3:] for path in data.images] == [
            (name, wnid, f"{name}.JPEG") for wnid in ("n01", "n02")]
        assert data.classes == ["n01", "n02"] and data.labels.tolist() == [0, 1]
    said = capsys.readouterr().err  # unpacking may have been stopped
    assert "train has 2 images instead of 1,281,167" in said
    assert "val has 2 images instead of 50,000" in said

@pytest.mark.parametrize("size", [7, 0.2])
def test_the_same_share_of_each_class_is_held_out(size):
    """At random, but the same in each run. A class of one image is not lost."""
    labels = torch.tensor([0] * 30 + [1] * 3 + [2])
    numbered = torch.arange(34, dtype=torch.uint8).view(34, 1, 1, 1).expand(34, 3, 1, 1)
    images = train.Images(numbered, labels, [*"abc"])
    parts = train.hold_out(images, size)
    counts = [part.labels.bincount(minlength=3).tolist() for part in parts]
    assert counts == [[24, 2, 1], [6, 1, 0]]
    numbers = [part.images[:, 0, 0, 0].long() for part in parts]
    assert torch.cat(numbers).sort().values.tolist() == [*range(34)]
    for part, number in zip(parts, numbers):  # each image keeps its label
        assert torch.equal(part.labels, labels[number])
    assert torch.equal(train.hold_out(images, size)[1].images, parts[1].images)
    assert numbers[1].sort().values.tolist() != [*range(6), 30]  # not the first
    for wrong, message in (
            (34, "must be below the 34 training images"),
            (0.001, "--val-size 0.001 of 34 images is none"),
            (32, "--val-size 32 leaves no training images of b, c")):
        with pytest.raises(train.UserError, match=message):
            train.hold_out(images, wrong)

# --- What follows is about files, signals and machines ----------------------------------

posix = pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX")

# --- Mistakes in Python

BYTES = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)

@pytest.mark.parametrize(("call", "message"), [
    (lambda: convnext.ConvNeXt((1,), (8,), drop_path=1.5), "0 and below 1, not 1.5"),
    (lambda: convnext.ConvNeXt((1,), (8,), patch_size=0), "patch_size must be 1 or more"),
    (lambda: convnext.ConvNeXt((1, 2), (8,)), r"for each stage, not \(1, 2\) and \(8,\)"),
    (lambda: convnext.ConvNeXt((), ()), r"for each stage, not \(\) and \(\)"),
    (lambda: convnext.ConvNeXt((1, 0), (8, 8)), r"1 or more, .* not \(1, 0\)"),
    (lambda: create_convnext("teeny"), "'teeny'; choose one of atto, femto, pico, nano"),
    (lambda: convnext.DepthwiseConv(8, 4), "kernel_size must be odd, not 4"),
    (lambda: meta("atto")(torch.zeros(1, 3, 31, 64)), r"\(b, 3, h, w\) .* 32 or more"),
    (lambda: meta("atto")(torch.zeros(1, 4, 64, 64)), r"\(b, 3, h, w\) .* 32 or more"),
    (lambda: meta("atto")(torch.zeros(3, 64, 64)), r"\(b, 3, h, w\) .* 32 or more"),
    (lambda: road_network("GELU", patch_size=3), "patch_size must be 1, 2 or 4, not 3"),
    (lambda: road_network("GELU", attention=True), "needs separate_downsampling"),
    (lambda: road_network("GELU", swin_block=True), "needs separate_downsampling"),
    (lambda: convnext.fold_layer_scale(four_blocks().half()), "cannot be folded in float16"),
    (lambda: export_state_dict(four_blocks(), "keras"), "unknown layout 'keras'; choose"),
    (lambda: export_state_dict(convnext.ConvNeXt(**ONE), "timm"), "4 stages, .* has 1"),
    (lambda: export_state_dict(convnext.ConvNeXt(**ONE), "meta"), "meta.* 4 stages, .* has 1"),
    (lambda: export_state_dict(four_blocks(), "torchvision"), "has no ConvNeXt V2"),
    (lambda: export_state_dict(four_blocks(), "huggingface"), "V2 has no LayerScale"),
    (lambda: export_state_dict(four_blocks(), "meta"), "there; fold_layer_scale"),
    (lambda: from_checkpoint({"stages.0.0.mlp.pwconv1.weight": torch.ones(4, 1)}),
     "the stem or a stage is missing"),
    (lambda: load_weights(meta("atto"), create_convnext("atto").state_dict()),
     "layers.0.0.weight is on the meta device in the model"),
    (lambda: load_weights(create_convnext("v2_atto", num_classes=7),
                          create_convnext("v2_atto").state_dict(), strict=True),
     "do not fit the model: head.fc.weight"),
    (lambda: export_state_dict(nn.Linear(1, 1), "timm"), "expected a ConvNeXt, not a"),
    (lambda: export_state_dict(nn.Sequential(four_blocks(), nn.Linear(1, 1)), "timm"),
     "expected a ConvNeXt, not a Sequential"),
    (lambda: from_checkpoint(HERE / "assets"), "holds neither model.safetensors nor pytorch"),
    (lambda: load_weights(torch.compile(nn.Linear(1, 1)), {}), "expected a ConvNeXt"),
    (lambda: load_weights(four_blocks(), four_blocks()), "or a file, not a ConvNeXt"),
    (lambda: train.pick_device("meta"), "--device meta cannot be used here"),
    (lambda: train.as_shown(np.zeros((2, 2), np.float32)), "convert it to 16 bits"),
    (lambda: train.prepare_images(train.Images(BYTES, [0, 1], [*"ab"]), train.Recipe()),
     "have 4x4 pixels: make squares"),
    (lambda: train.prepare_data(train.Recipe(), splits=[
        train.Images(BYTES, [0, 1], [*names]) for names in ("ab", "ac")]),
     "test images of c, which are not among the known classes: a, b"),
    (lambda: train.Images(BYTES.float(), [0, 1], [*"ab"]),
     "uint8 and shape .n, 3, h, w., not torch.float"),
    (lambda: train.Images(BYTES[:, :2], [0, 1], [*"ab"]), r"not torch.uint8 and \(2, 2, 4, 4\)"),
    (lambda: train.Images(BYTES, [0], [*"ab"]), "there are 2 images, but 1 labels"),
    (lambda: train.Images([], [], [*"ab"]), "there are no images"),
    (lambda: train.Images(BYTES, [0, 2], [*"ab"]), "labels must be indices from 0 to 1"),
    (lambda: train.Recipe(epochs="3"), r"a whole number in \[1, 1000000\], not '3'"),
    (lambda: train.Recipe(lr="x"), r"--lr must be a number in \(0, inf\), not 'x'"),
    (lambda: train.Recipe(epochs=True), "--epochs must be a whole number"),
    (lambda: train.Recipe(variant="teeny"), "--variant must be one of")],
    ids=by_text)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises((ValueError, TypeError, train.UserError), match=message):
        call()

def test_layers_that_a_library_lacks_are_not_exported():
    model = create_convnext("atto", num_classes=5)
    model.downsample_layers[1].append(nn.BatchNorm2d(80))
    message = "downsample_layers.1.2.weight has no name in the layout 'timm'"
    with pytest.raises(ValueError, match=message):
        export_state_dict(model, "timm")

# --- Half precision, other layers and other stems

def test_grn_is_safe_in_float16():
    """A sum of squares of 7e9, and a norm of 84,000, are beyond its range."""
    grn = randomise(convnext.GRN(12))
    x = torch.rand(1, 56, 56, 12) * 1000 + 1000
    expected = grn(x)
    assert_close(grn.half()(x.half()).float(), expected, rtol=1e-2, atol=20)

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
    assert (y != x).any() == (dtype == torch.float16)  # bfloat16 does not show 1e-3

def test_v2_of_any_size_has_no_layer_scale():
    """As in V2's paper, so other libraries have such a network."""
    model = convnext.ConvNeXt((1, 1, 1, 1), (8, 8, 8, 16), grn=True)
    assert not any("layer_scale" in name for name, _ in model.named_parameters())
    assert "stages.0.0.grn.gamma" in export_state_dict(model, "meta")
    scaled = convnext.ConvNeXt((1,), (8,), grn=True, layer_scale=0.5)
    assert (scaled.stages[0][0].layer_scale.gamma == 0.5).all()

def test_grn_of_a_dead_channel_has_finite_gradients():
    x = torch.randn(2, 3, 3, 4)
    x[..., 1] = 0
    x.requires_grad_()
    grn = convnext.GRN(4)
    nn.init.ones_(grn.gamma)
    grn(x).sum().backward()
    assert x.grad.isfinite().all() and grn.gamma.grad.isfinite().all()

@pytest.mark.parametrize(("size", "channels", "patch_size"), [
    ((33, 47), 3, 4), ((16, 21), 1, 2), ((8, 8), 5, 1)])
def test_any_size_layout_and_type(size, channels, patch_size):
    model = randomise(create_convnext(
        "atto", num_classes=7, in_channels=channels, patch_size=patch_size))
    x = torch.randn(1, channels, *size)
    expected = model(x)
    assert expected.shape == (1, 7)
    strided = torch.randn(1, *size, channels * 2)[..., ::2].permute(0, 3, 1, 2).copy_(x)
    for same in (x.contiguous(memory_format=torch.channels_last), strided):
        assert_close(model(same), expected, atol=1e-5, rtol=1e-5)
    allowed = 0.1 * expected.std() + 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x) - expected).abs().max() < allowed
    assert (model.bfloat16()(x.bfloat16()) - expected).abs().max() < allowed

@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("step", ["ResNet-50", "patchify stem", "separate downsampling"])
def test_stem_of_the_road_at_any_patch_size(step, patch_size):
    network, maps = road_network(step, patch_size=patch_size), []
    for block in network:
        if isinstance(block, convnext.RoadmapBlock):
            block.register_forward_hook(lambda *args: maps.append(args[2].shape[2:]))
    network(torch.randn(2, 3, 64, 96))
    assert maps[0] == (64 // patch_size, 96 // patch_size)
    assert maps[-1] == (8 // patch_size, 12 // patch_size)

@pytest.mark.parametrize("name", ["window attention", "Swin block"])
def test_every_other_attention_is_shifted(name):
    """Swin-T's order and biases of 0, in a network that is otherwise the last step."""
    network = road_network(name)
    layers = [m for m in network.modules() if isinstance(m, convnext.WindowAttention)]
    shifts = [0, 4, 0] + [0, 4, 0] + [0, 4, 0, 4, 0, 4, 0, 4, 0] + [0, 4, 0]
    assert [layer.before for layer in layers] == shifts
    assert not any(layer.qkv.bias.any() or layer.proj.bias.any() for layer in layers)
    blocks = (convnext.RoadmapBlock, convnext.SwinBlock)
    others, expected = ([type(m) for m in modules if not isinstance(m, blocks)]
                        for modules in (network, road_network("separate downsampling")))
    assert others == expected

@pytest.mark.parametrize("told", [
    {}, {"dilation": (2, 2), "padding": (6, 6)}, {"dilation": (1, 2)}, {"stride": (2, 1)},
    {"padding": (1, 2)}, {"padding_mode": "circular"}], ids=str)
def test_layers_do_what_they_are_told(speed_up, told):
    """Settings changed by hand before or after speed_up, against nn.Conv2d."""
    for kernel_size, is_fast in itertools.product((7, 5), (False, True)):
        layer = convnext.DepthwiseConv(6, kernel_size).double()
        if is_fast:
            speed_up(layer)
        settings = {"groups": 6, "padding": kernel_size // 2} | told
        plain = nn.Conv2d(6, 6, kernel_size, **settings).double()
        plain.load_state_dict(layer.state_dict())
        for name, value in told.items():
            setattr(layer, name, value)
        changed = speed_up(layer)
        x = torch.randn(2, 6, 13, 17, dtype=torch.double, requires_grad=True)
        y = changed(x)
        direction = torch.randn_like(y)
        assert ("DepthwiseGradient" in y.grad_fn.name()) == (not told)
        assert_close(y, plain(x))
        assert_close(*(
            torch.autograd.grad(network(x), (x, *network.parameters()), direction)
            for network in (changed, plain)))
        with torch.no_grad():
            assert_close(changed(x), y)

def test_one_layer_with_another_function_keeps_it(speed_up):
    for change in (speed_up, nn.Identity()):
        layer = change(convnext.DepthwiseConv(6))
        layer._conv_forward = Mock(return_value=torch.ones(1))
        assert speed_up(layer)(torch.zeros(1, 6, 7, 7)) == 1

@pytest.mark.parametrize("stem", [
    nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 40, 1)),
    nn.Sequential(nn.Conv2d(3, 40, 7, 2, 3), nn.MaxPool2d(3, 2, 1))],
    ids=["unshuffle", "resnet"])
def test_any_stem_can_take_the_place_of_patchify(stem):
    model, x = create_convnext("atto"), torch.randn(1, 3, 32, 32)
    norm = model.downsample_layers[0][1]
    model.downsample_layers[0][0] = stem
    first, *_, last = model.forward_pyramid(x)
    assert_close(first, model.stages[0](norm(stem(x))))
    assert last.shape == (1, 320, 1, 1)

# --- Exports and wrappers

def test_a_depthwise_convolution_can_be_several_layers(monkeypatch):
    class Cross(nn.Sequential):
        """Filters of 1x7 and 7x1."""
        def __init__(self, dim):
            super().__init__(nn.Conv2d(dim, dim, (1, 7), padding=(0, 3), groups=dim),
                             nn.Conv2d(dim, dim, (7, 1), padding=(3, 0), groups=dim))

    monkeypatch.setattr(convnext, "DepthwiseConv", Cross)
    model = convnext.ConvNeXt((1, 1), (8, 16), num_classes=2)
    train.fan_in_init(model)
    train.local_init(model)
    convnext.speed_up(model)(torch.randn(2, 3, 32, 32)).sum().backward()
    assert model.stages[0][0].dwconv[0].weight.grad.abs().max() > 0

def test_training_is_evaluation_of_an_edited_layer(speed_up, monkeypatch):
    """What somebody changes in the class is what trains."""
    model, x = four_blocks(), torch.randn(2, 3, 64, 64)
    usual = logits_of(model, x)
    monkeypatch.setattr(convnext.DepthwiseConv, "forward",
                        lambda layer, x: nn.Conv2d.forward(layer, 2 * x))
    logits = speed_up(model).train()(x)
    assert logits.requires_grad and (logits - usual).abs().max() > 0.1 * usual.std()
    assert_close(logits_of(model, x), logits.detach())

def test_speed_up_keeps_another_class(speed_up, monkeypatch):
    class Doubled(nn.Conv2d):
        def __init__(self, dim):
            super().__init__(dim, dim, 7, padding=3, groups=dim)

        def forward(self, x):
            return 2 * super().forward(x)

    monkeypatch.setattr(convnext, "DepthwiseConv", Doubled)
    model, x = convnext.ConvNeXt((1, 1), (8, 16), num_classes=2), torch.randn(2, 3, 32, 32)
    before = logits_of(model, x)
    assert_close(logits_of(speed_up(model), x), before)
    assert type(model.stages[0][0].dwconv) is Doubled

def gradients(network, x):
    """The gradient of each parameter, by the name it has in the plain network."""
    network.zero_grad()
    network(x).square().sum().backward()
    return {name.removeprefix("_orig_mod."): p.grad
            for name, p in network.named_parameters()}

def test_gradients_with_compile_and_autocast(speed_up):
    model = randomise(convnext.ConvNeXt((1, 1), (8, 16), num_classes=10, grn=True))
    x = torch.randn(3, 3, 64, 64)
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
    """The gradient of each image, and the slope in a direction."""
    model, x = four_blocks().double(), torch.randn(3, 3, 64, 64, dtype=torch.double)
    expected, plain = gradients(model, x), copy.deepcopy(model)
    parameters = dict(speed_up(model).named_parameters())

    def loss(parameters, image, model=model):
        y = torch.func.functional_call(model, parameters, (image[None],))
        return y.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert_close({name: g.sum(0) for name, g in each.items()}, expected)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    slope = 0
    for image in x:  # forward-mode derivatives need the model as it was
        _, change = torch.func.jvp(
            lambda p, image=image: loss(p, image, plain), (parameters,), (tangents,))
        slope += change
    products = [(expected[name] * tangent).sum() for name, tangent in tangents.items()]
    assert_close(slope, sum(products))

@pytest.mark.filterwarnings("ignore")  # about tracing, which PyTorch gives up
def test_copies_and_exports_with_any_size(speed_up):
    """With gradients on, as in somebody's script."""
    model, images = four_blocks(), (torch.randn(2, 3, 64, 96), torch.randn(3, 3, 101, 70))
    expected, parameters = [model(x) for x in images], dict(model.named_parameters())
    assert speed_up(model) is model
    assert all(p is parameters[name] for name, p in model.named_parameters())
    again = four_blocks()
    again.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))
    dim = torch.export.Dim
    sizes = {0: dim("batch"), 2: dim("height", min=64), 3: dim("width", min=64)}
    exported = torch.export.export(model, images[:1], dynamic_shapes=(sizes,))
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), speed_up(again)
    traced = torch.jit.trace(model, images[0])
    for network in (model, *copies, exported.module(), traced):
        for x, logits in zip(images, expected):
            assert_close(network(x), logits, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("wrap", [
    torch.optim.swa_utils.AveragedModel, torch.compile,
    lambda model: nn.DataParallel(torch.compile(model))],
    ids=["averaged", "compiled", "parallel and compiled"])
def test_wrapped_models_are_unwrapped_everywhere(wrap):
    model = randomise(create_convnext("atto"))
    wrapped, other = wrap(model), wrap(create_convnext("atto"))
    inner = next(m for m in wrapped.modules() if isinstance(m, convnext.ConvNeXt))
    for layout in convnext.LAYOUTS:
        assert_close(export_state_dict(wrapped, layout), export_state_dict(inner, layout),
                     rtol=0, atol=0)
    report = load_weights(other, wrapped.state_dict())
    assert not report.kept and not report.left_out
    assert_close(export_state_dict(other, "native"), dict(model.state_dict()))
    assert convnext.speed_up(wrapped) is wrapped
    assert sum(isinstance(m, convnext.FastDepthwiseConv) for m in inner.modules()) == 12

# --- Files of weights

X = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)

def saved_atto(path):
    """Write the weights of an atto for three classes, as timm does; return the model."""
    model = randomise(create_convnext("atto", num_classes=3))
    exported = export_state_dict(model, "timm")
    if str(path).endswith(".safetensors"):
        save_file({name: t.contiguous() for name, t in exported.items()}, path)
    else:
        torch.save(exported, path)
    return model

@pytest.mark.parametrize("layout", ["native", "meta", "huggingface", "torchvision"])
@pytest.mark.parametrize(("depths", "dims", "options"), [
    ((2, 4, 2), (96, 192, 384), {"num_classes": 10, "patch_size": 2}),
    ((1, 1), (8, 16), {"grn": True, "layer_scale": 0.0, "num_classes": 21_841}),
    ((1, 1, 1, 1, 1, 45), (8, 8, 16, 16, 24, 24), {"num_classes": 0, "in_channels": 1}),
    ((3,), (24,), {"num_classes": 1, "patch_size": 1, "in_channels": 5})], ids=str)
def test_from_checkpoint_infers_the_network(depths, dims, options, layout):
    if layout == "torchvision" and "grn" in options or layout == "meta" and len(depths) != 4:
        pytest.skip("it has no such network")
    with torch.device("meta"):
        model = convnext.ConvNeXt(depths, dims, **options)
    weights = convnext.read_weights(export_state_dict(model, layout))
    assert convnext.infer_architecture(weights) == {
        "depths": depths, "dims": dims, "grn": False, "in_channels": 3, "patch_size": 4,
        "num_classes": 1000, "layer_scale": 1e-6} | options
    assert convnext.variant_of(depths, dims, "grn" in options) is None

@pytest.mark.parametrize("name", ["~/timm.safetensors", "without checksums.pth"])
def test_a_file_gives_the_same_logits(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    torch.serialization.set_crc32_options("without" not in name)
    try:
        model = saved_atto(name.removeprefix("~/"))
    finally:
        torch.serialization.set_crc32_options(True)
    again = from_checkpoint(name)
    assert not again.training and torch.equal(again(X), model(X))

@pytest.mark.parametrize(("name", "tensor", "message"), [
    ("stages.2.blocks.3.gamma", None,
     r"2.3.layer_scale.gamma is missing in the weights, \(160,\) in the model$"),
    ("extra", torch.zeros(1), r"extra is \(1,\) in .*, missing in the model"),
    ("head.norm.bias", torch.zeros(7), r"head.norm.bias is \(7,\) .*320"),
    ("head.norm.bias", torch.zeros(320, device="meta"), "is on the meta device"),
    ("head.norm.bias", torch.full((320,), torch.nan), "bias contains .* not finite"),
    ("stem.0.bias", torch.zeros(40, dtype=torch.float8_e4m3fn),
     "stem.0.bias has the type torch.float8_e4m3fn, not float16"),
    ("_orig_mod.stem.0.bias", torch.ones(40), "is there twice, under different names")],
    ids=by_text)
def test_weights_that_do_not_fit_change_nothing(name, tensor, message):
    model = randomise(create_convnext("atto", num_classes=5))
    before = copy.deepcopy(model.state_dict())
    weights = export_state_dict(create_convnext("atto", num_classes=5), "timm")
    weights[name] = tensor
    if tensor is None:
        del weights[name]
    with pytest.raises(ValueError, match=message):
        load_weights(model, weights)
    assert_close(model.state_dict(), before, rtol=0, atol=0)

class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)

def assert_unreadable(path, reason):
    """One line with the reason, and nothing in the file runs."""
    with pytest.raises(ValueError, match=f"cannot read {path}: .*{reason}") as raised:
        from_checkpoint(path)
    text = str(raised.value)
    assert "\n" not in text and "weights_only` set to" not in text
    assert not Path("executed").exists()

@pytest.mark.parametrize(("path", "content", "reason"), [
    ("pointer.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
     "begins with b'version https://git-lfs"),
    ("pointer.safetensors", b"version https://git-lfs.github.com", "header too large"),
    ("page.bin", b"<!DOCTYPE html>\n", "begins with b'<!DOCTYPE html>"),
    ("empty.pth", b"", "begins with b''")])
def test_files_of_another_kind_are_unreadable(path, content, reason, tmp_path,
                                              monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(path).write_bytes(content)
    assert_unreadable(path, reason)

@pytest.mark.parametrize(("content", "reason"), [
    ({"accuracy": np.float64(1)}, "GLOBAL numpy.*multiarray.scalar"),
    (nn.Linear(1, 1), "GLOBAL torch.nn.*Linear"), ([1], "it holds a list"),
    ({"stem.0.weight": Malicious()}, "GLOBAL .*system")],
    ids=["number", "model", "list", "malicious"])
def test_other_objects_are_unreadable(content, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "a.pth")
    assert_unreadable("a.pth", reason)

def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}

def renamed(tensors, *pairs):
    """With texts in the names replaced."""
    for old, new in pairs:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors

def for_mmpretrain(tensors):
    backbone = {name: t for name, t in tensors.items()
                if not name.startswith(("norm.", "head."))}
    rest = {name: t for name, t in tensors.items() if name.startswith(("norm.", "head."))}
    pairs = ("dwconv", "depthwise_conv"), ("pwconv", "pointwise_conv")
    return prefixed("backbone.", renamed(backbone, *pairs)) | renamed(
        rest, ("norm.", "backbone.norm3."), ("head.", "head.fc."))

# What a program writes, of a model's tensors in a layout. "other" are other weights.
WRAPPED = {
    "Meta's program": lambda s: {"model": s["meta"], "optimizer": {"state": {}},
                                 "args": argparse.Namespace(lr=1)},
    "model_ema": lambda s: {"model": s["other"], "model_ema": s["timm"]},
    "timm's program": lambda s: {"state_dict": s["other"], "state_dict_ema": s["timm"]},
    "AveragedModel": lambda s: {"model_ema": prefixed("module.", s["timm"]) | {
        "n_averaged": torch.tensor(7)}},
    "parallel, compiled": lambda s: prefixed("module._orig_mod.", s["huggingface"]),
    "compiled blocks": lambda s: renamed(s["native"], (".mlp.", ".mlp._orig_mod.")),
    "FSDP": lambda s: renamed(
        s["timm"], ("stages.", "_fsdp_wrapped_module.stages._fsdp_wrapped_module.")),
    "open_clip": lambda s: prefixed("visual.trunk.", s["timm"]) | {
        "text.weight": torch.ones(2), "logit_scale": 1.0},
    "Lightning": lambda s: {
        "state_dict": prefixed("model.", s["timm"]) | {"criterion.weight": torch.ones(5)},
        "hyper_parameters": {"lr": 1}},
    "net_ema": lambda s: prefixed("net.", s["other"]) | prefixed("net_ema.", s["native"]),
    "timm's linear layers": lambda s: {
        name: t.flatten(1) if t.ndim == 4 and t.shape[2:] == (1, 1) else t
        for name, t in s["timm"].items()},
    "sparse GRN": lambda s: {name: t.reshape(1, -1) if "grn" in name else t
                             for name, t in s["meta"].items()},
    "train.py": lambda s: {
        "made_by": "train.py, format 2", "model": s["other"],
        "ema": prefixed("module.", s["native"]), "args": {}, "classes": []},
    "MMEngine": lambda s: {
        "meta": {"mmengine_version": "0.10"}, "state_dict": s["timm"],
        "ema_state_dict": prefixed("module.", s["other"])},
    "mmpretrain": lambda s: {"meta": {}, "state_dict": for_mmpretrain(s["meta"])},
    "another head with mmpretrain's name": lambda s: prefixed("backbone.", s["timm"]) | {
        "decode.pointwise_conv1.weight": torch.ones(1)}}

@pytest.mark.filterwarnings("error")  # nothing was left out
@pytest.mark.parametrize("program", WRAPPED)
def test_wrapped_and_prefixed_weights(program, tmp_path):
    """As the libraries' training programs write them."""
    model = randomise(create_convnext("v2_atto", num_classes=5))
    states = {layout: export_state_dict(model, layout)
              for layout in convnext.LAYOUTS if layout != "torchvision"}
    states["other"] = {name: torch.zeros_like(t) for name, t in states["timm"].items()}
    torch.save(WRAPPED[program](states), tmp_path / "file.pth")
    assert torch.equal(from_checkpoint(tmp_path / "file.pth")(X), model(X))

def test_several_networks_are_refused():
    state = create_convnext("atto").state_dict()
    with pytest.raises(ValueError, match="several networks, student., teacher.module.: "):
        from_checkpoint({"student": state, "teacher": prefixed("module.", state)})
    with pytest.raises(ValueError, match="may be state_dict .* or ema_state_dict"):
        from_checkpoint({"state_dict": state, "ema_state_dict": state, "meta": 5})

@pytest.mark.parametrize(("name", "message"), [
    ("convnext_atto_ols", r"layers.0.0.weight is \(24, 3, 3, 3\)"),
    ("convnext_nano_ols", r"layers.0.1.weight is \(80, 80, 3, 3\)"),
    ("convnext_tiny_hnf", "norm_pre.weight"),
    ("convnext_large_mlp", "head.pre_logits.fc.weight"),
    ("convnext_zepto_rms", "layers.0.1.bias is missing in the weights"),
    ("resnet18", r"no weights of a ConvNeXt \(conv1.weight, ")])
def test_other_networks_are_refused(name, message):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    with pytest.raises(ValueError, match=message):
        from_checkpoint(state)

# --- Backbones and other heads

def test_dinov3_is_read():
    peer = randomise(transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(
        depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32])))
    x = torch.randn(1, 3, 64, 64)
    new = peer.state_dict()
    old = renamed(new, ("model.stages.", "stages."))  # before version 5
    for state in (new, prefixed("student.", new), old, {"model": old}):
        assert_close(from_checkpoint(state)(x), peer(x).pooler_output)

def assert_backbone(state, x, expected, warned):
    with pytest.warns(UserWarning) as told:
        model = from_checkpoint(state)
    assert "kept its own head.norm.weight" in str(told[0].message)
    assert len(told) == warned
    assert_close(model.forward_features(x), expected, atol=1e-5, rtol=1e-5)
    pooled = F.layer_norm(expected.mean((2, 3)), expected.shape[1:2], eps=1e-6)
    assert_close(logits_of(model, x), pooled, atol=1e-5, rtol=1e-5)  # a new last norm

def test_timms_backbone_is_read():
    """Without a last norm."""
    peer = randomise(timm.create_model("convnext_atto", features_only=True))
    x = torch.randn(1, 3, 64, 64)
    assert_backbone(peer.state_dict(), x, peer(x)[-1], warned=1)

@pytest.mark.parametrize("prefix", ["", "backbone."], ids=["backbone", "UperNet"])
def test_transformers_backbone_is_read(prefix):
    """With norms of its maps, for which there is no place."""
    peer = randomise(transformers.ConvNextBackbone(transformers.ConvNextConfig(
        depths=[1, 2, 1], hidden_sizes=[8, 16, 24], num_stages=3,
        out_features=["stage1", "stage3"])))
    state, x = prefixed(prefix, peer.state_dict()), torch.randn(1, 3, 64, 64)
    if prefix:
        state["decode_head.conv.weight"] = torch.ones(1)
    expected = peer(x, output_hidden_states=True).hidden_states[-1]
    assert_backbone(state, x, expected, warned=2)

def test_the_norms_of_openmmlabs_maps_are_left_out():
    model = randomise(convnext.ConvNeXt((1, 1, 1, 1), (8, 16, 24, 32)))
    state = for_mmpretrain({name: t for name, t in export_state_dict(model, "meta").items()
                            if not name.startswith("head.")})
    state |= {f"backbone.norm0.{name}": torch.ones(8) for name in ("weight", "bias")}
    with pytest.warns(UserWarning) as told:
        backbone = from_checkpoint(state)
    assert backbone.head.norm.weight.eq(1).all() and len(told) == 2

def test_a_classifier_of_several_layers_is_kept():
    model = convnext.ConvNeXt((1, 1), (8, 16), num_classes=5)
    model.head.fc = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 5))
    backbone = convnext.ConvNeXt((1, 1), (8, 16), num_classes=0)
    with pytest.warns(UserWarning, match="the model kept its own head.fc.1.weight"):
        assert load_weights(model, backbone.state_dict()).kept == [
            "head.fc.1.weight", "head.fc.1.bias"]

STEM, NORM, HEAD = ([f"{module}.weight", f"{module}.bias"] for module in (
    "downsample_layers.0.0", "head.norm", "head.fc"))

@pytest.mark.parametrize(("without", "classes", "patch_size", "kept", "left_out"), [
    pytest.param(("norm.", "head."), 5, 4, NORM + HEAD, [], id="FCMAE"),
    pytest.param(("head.",), 5, 4, HEAD, [], id="headless"),
    pytest.param((), 7, 4, HEAD, [], id="other classes"),
    pytest.param((), 5, 2, STEM, [], id="other patches"),
    pytest.param((), 0, 4, [], HEAD, id="no classes")])
def test_what_does_not_fit_is_kept_or_left_out(without, classes, patch_size, kept,
                                               left_out):
    model = randomise(create_convnext("v2_atto", num_classes=5))
    weights = {name: t for name, t in export_state_dict(model, "meta").items()
               if not name.startswith(without)}
    fresh = create_convnext("v2_atto", num_classes=classes, patch_size=patch_size)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.warns(UserWarning, match="the model (kept its own|has no place)"):
        report = load_weights(fresh, weights)
    assert [line.split()[0] for line in report.kept] == kept
    assert report.left_out == left_out
    assert sorted(report.loaded + kept) == sorted(before)
    for name, tensor in fresh.state_dict().items():
        source = before if name in kept else model.state_dict()
        assert torch.equal(tensor, source[name]), name

# --- Weights from timm, the hub and addresses

@pytest.mark.parametrize(("name", "img_size", "crop_pct"), [
    ("convnextv2_nano.fcmae_ft_in22k_in1k", 224, 0.875),
    ("convnextv2_nano.fcmae_ft_in22k_in1k_384", 384, 0)])  # it squashes
def test_timm_is_asked_for_weights_and_settings(name, img_size, crop_pct, tmp_path,
                                                monkeypatch):
    path, asked = tmp_path / "file.safetensors", []
    state = export_state_dict(create_convnext("v2_nano"), "timm")
    save_file({name: t.contiguous() for name, t in state.items()}, path)

    def download(repo_id, filename, **_):
        asked.append(repo_id)
        return str(path)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    _, _, settings = convnext.read_source(f"timm:{name}")
    assert asked == [f"timm/{name}"]
    assert settings == {**train.IMAGENET, "img_size": img_size, "crop_pct": crop_pct}

@pytest.mark.parametrize(("name", "error", "message"), [
    ("timm:convnext_teeny", RuntimeError, "Unknown model"),
    ("timm:convnextv2_small", RuntimeError, "No pretrained weights"),
    ("timm:convnext_tiny.no", RuntimeError, "Invalid pretrained tag"),
    ("timm:convnext_atto", ConnectionError, "cannot fetch timm:convnext_atto: No way"),
    ("hf:who/what", ConnectionError, "cannot fetch hf:who/what: No way")])
def test_the_clients_own_reason_is_given(name, error, message, monkeypatch):
    no_connection = Mock(side_effect=LocalEntryNotFoundError("No way"))
    monkeypatch.setattr("timm.models._hub.hf_hub_download", no_connection)
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_connection)
    with pytest.raises(error, match=message):
        from_checkpoint(name)

@pytest.mark.parametrize(("name", "options", "message"), [
    ("test_convnext", {}, "test_convnext is another network: .* ε = 1e-05"),
    ("convnext_atto", {"act_layer": "gelu_tanh"}, "is another network: .* is gelutanh"),
    ("convnext_atto", {"global_pool": "avgmax"}, "is another network: its pooling is avgmax"),
    ("convnext_atto", {"output_stride": 16}, "is another network: it has dilated")])
def test_timms_network_with_other_parts_than_ours_is_refused(
        name, options, message, monkeypatch):
    network = timm.create_model(name, **options)
    monkeypatch.setattr("timm.create_model", lambda name, pretrained: network)
    with pytest.raises(ValueError, match=message):
        from_checkpoint(f"timm:{name}")

@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_repository_is_fetched_as_a_folder(name, tmp_path, monkeypatch):
    model, asked = saved_atto(tmp_path / name), []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, allow_patterns[0]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "config.json").write_text('{"id2label": {"0": "a", "1": "b", "2": "c"}}')
    content, _, settings = convnext.read_source("hf:who/what")
    assert settings == {"classes": ["a", "b", "c"]}
    assert torch.equal(from_checkpoint(content)(X), model(X))
    assert asked[0] == ("who/what", "model.safetensors")
    assert asked[1:] == [("who/what", name)] * (name == "pytorch_model.bin")

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
    with pytest.raises(ValueError, match="it begins with b'<!DOCTYPE html>'"):
        from_checkpoint("https://host/blob/file.bin")
    with pytest.raises(ValueError, match="http://host/file.bin: .* begins with https:"):
        from_checkpoint("http://host/file.bin")

TIMMS = {"mean": [0.5], "std": [0.25], "input_size": [3, 288, 288], "crop_pct": 1.0}

@pytest.mark.parametrize(("config", "images", "settings"), [
    pytest.param({"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}, {}, {},
                 id="placeholders"),
    pytest.param({"id2label": {"1": "a", "2": "b", "3": "c"}}, {}, {}, id="gaps"),
    pytest.param({"image_size": 64}, {}, {"img_size": 64}, id="size"),
    pytest.param({"image_size": 224}, {"size": 384, "crop_pct": 0.875},
                 {"img_size": 384, "crop_pct": 0}, id="squeezed"),
    pytest.param({}, {"size": {"height": 224, "width": 224}},
                 {"img_size": 224, "crop_pct": 0}, id="squeezed, as for DINOv3"),
    pytest.param({}, {"size": {"shortest_edge": 256}, "do_center_crop": True,
                      "crop_size": {"height": 224, "width": 224}},
                 {"img_size": 224, "crop_pct": 0.875}, id="as for ResNet"),
    pytest.param({}, {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 192},
                 {"img_size": 192, "crop_pct": 0.75}, id="one number for both sides"),
    pytest.param({"architecture": "convnext_atto", "pretrained_cfg": None}, {}, {},
                 id="timm's, without a description"),
    pytest.param({}, {
        "size": {"shortest_edge": 96}, "crop_pct": 0.9, "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6]}, {
        "img_size": 96, "crop_pct": 0.9, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
        id="transformers' processor"),
    pytest.param({"architecture": "convnext_atto", "label_names": ["a", "b", "c"],
                  "pretrained_cfg": TIMMS}, {}, {
        "classes": ["a", "b", "c"], "mean": [0.5], "std": [0.25], "img_size": 288,
        "crop_pct": 1.0}, id="timm's"),
    pytest.param({"architecture": "convnext_atto", "label_names": {"0": "new", "1": "names"},
                  "pretrained_cfg": {"label_names": ["old", "names"], "crop_mode": "squash",
                                     "crop_pct": 1.0}}, {},
                 {"classes": ["new", "names"], "crop_pct": 0}, id="timm's, trained anew")])
def test_settings_beside_the_weights(config, images, settings, tmp_path):
    saved_atto(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    assert convnext.read_source(tmp_path)[2] == settings

@pytest.mark.parametrize(("config", "message"), [
    ('{"architecture": "test_convnext2", "pretrained_cfg": {}}',
     "config.json is another network: its norms have ε = 1e-05"),
    ('{"architecture": "convnext_atto", "model_args": {"act_layer": "silu"}, "pretrained_cfg": {}}',
     "config.json is another network: its activation is silu"),
    ('{"architecture": "convnext_atto", "model_args": {"act_layer": "relu"}, "pretrained_cfg": 0}',
     "config.json is another network: its activation is relu"),
    ('{"hidden_act": "gelu_new"}', "config.json is another network: its activation is gelu_new"),
    ('{"hidden_act": ["gelu"]}', "its activation is ..gelu"),
    ('{"layer_norm_eps": 1e-3}', "another network: its norms have ε = 0.001"),
    ("{", "config.json: Expecting"), ("[1, 2]", "cannot read .*config.json")])
def test_another_network_in_the_config_is_refused(config, message, tmp_path):
    """What tensors do not tell is read beside them, whatever the file's name."""
    saved_atto(tmp_path / "renamed.pth")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        from_checkpoint(tmp_path / "renamed.pth")

@pytest.mark.parametrize("config", [
    '{"architecture": "unet", "lr": 1e-3}', '{"model_type": "bert", "hidden_act": "relu"}',
    '{"architecture": "resnet18", "pretrained_cfg": {"mean": [0.5]}}', '{"model_type": null}',
    '{"id2label": ["a", "b", "c"]}', '{"pretrained_cfg": {}}'])
def test_a_config_of_something_else_means_nothing(config, tmp_path):
    saved_atto(tmp_path / "weights.pth")
    (tmp_path / "config.json").write_text(config)
    if "type" in config or "arch" in config:  # the other network's processor
        (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    assert convnext.read_source(tmp_path / "weights.pth")[2] == {}

# --- Steps, fine-tuning and teachers

def assert_settings(line, expected):
    recipe = recipe_of(line)
    for name, value in expected.items():
        wanted = pytest.approx(value) if isinstance(value, float) else value
        assert getattr(recipe, name) == wanted, name

def test_default_recipe(small):
    assert_settings("", {
        "variant": "tiny", "patch_size": 2, "img_size": 32, "epochs": 100,
        "batch_size": 128, "optimizer": "adamw", "lr": 1e-3, "min_lr": 1e-6,
        "schedule": "cosine", "warmup": 5, "beta2": 0.999, "weight_decay": 0.05,
        "clip_grad": 0, "label_smoothing": 0.1, "drop_path": 0.1, "layer_scale": 0,
        "init": "local", "crop_padding": 4, "flip": 0.5, "rand_augment": 9,
        "random_erase": 0.25, "mixup": 0.8, "cutmix": 1, "mix_prob": 1,
        "mixed_epochs": 90, "ema_horizon": 0.04, "start_size": 0, "val_size": 0,
        "tta": False})

def test_fast_recipe(small):
    assert_settings("--recipe fast", {
        "variant": "atto", "patch_size": 1, "drop_path": 0, "optimizer": "muon",
        "lr": 3e-3, "muon_lr": 0.02, "beta2": 0.95, "weight_decay": 0.02,
        "schedule": "linear", "min_lr": 0, "batch_size": 256, "epochs": 40,
        "ema_horizon": 0, "rand_augment": 5, "mix_prob": 0, "start_size": 24, "tta": True,
        "warmup": 2, "label_smoothing": 0.1, "random_erase": 0.25})

@pytest.mark.parametrize(("epochs", "small_epochs"), [(1, 0), (2, 1), (5, 2), (40, 20)])
def test_the_last_epochs_have_images_of_full_size(epochs, small_epochs):
    recipe = recipe_of(f"--recipe fast --epochs {epochs}")
    sizes = [recipe.size_at(epoch) for epoch in range(epochs)]
    assert sizes == [24] * small_epochs + [32] * (epochs - small_epochs)

@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("clip_grad", [0, 0.5])
def test_with_a_scaler_all_optimizers_step_or_none(clip_grad, value):
    """The gradient of one parameter, which is AdamW's, is not finite."""
    recipe = train.Recipe(clip_grad=clip_grad, optimizer="muon")
    model = randomise(convnext.ConvNeXt((1, 1), (8, 16), num_classes=8))
    start = copy.deepcopy(model.state_dict())
    model.head.fc.bias.register_hook(lambda gradient: gradient * value)
    optimizers = train.make_optimizers(model, recipe)
    assert len(optimizers) == 2
    y = torch.eye(8)
    scaler = torch.amp.GradScaler("cpu")
    train.train_step(model, optimizers, torch.randn(8, 3, 32, 32), y, 0.1, recipe, scaler=scaler)
    assert_close(model.state_dict(), start, rtol=0, atol=0)

@pytest.mark.parametrize("clip_grad", [0, 0.5])
def test_float16_with_a_scaler_is_the_step_without(device, clip_grad):
    """Clipping sees the unscaled gradient. An infinite one changes no weights."""
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
        steps = [(p - start[name]).flatten() for name, p in model.named_parameters()]
        moved.append(torch.cat(steps))
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

def test_attentions_bias_does_not_decay():
    attention = nn.Sequential(convnext.WindowAttention(16, False))
    groups = train.parameter_groups(attention, 0.1)
    undecayed = [group for group in groups if not group["weight_decay"]]
    names = parameter_names(attention, *undecayed)
    assert names == ["0.position_bias", "0.qkv.bias", "0.proj.bias"]

def test_the_average_of_whole_numbers_is_not_taken():
    """In 30 steps, 661 entries of attention's index would change."""
    attention = nn.Sequential(convnext.WindowAttention(16, False))
    average = train.average_of(attention, 10)
    for _ in range(30):
        average.update_parameters(attention)
    assert torch.equal(average.module[0].index, attention[0].index)

def test_finetune_recipe_is_the_papers_at_a_quarter_of_its_batch(pretrained):
    """Table 6, and the network of the weights."""
    assert_settings(f"--init-from {pretrained} --recipe finetune", {
        "epochs": 30, "lr": 1.25e-5, "min_lr": 2.5e-7, "warmup": 0, "weight_decay": 1e-8,
        "layer_decay": 0.8, "rand_augment": 9, "mixup": 0, "cutmix": 0,
        "random_erase": 0.25, "label_smoothing": 0.1, "clip_grad": 0,
        "head_init_scale": 0.001, "drop_path": 0, "ema_horizon": 0, "depths": (1, 1),
        "dims": (8, 16), "patch_size": 4, "img_size": 32})

@pytest.mark.parametrize(("variant", "drop_path", "ema_horizon"), [
    ("tiny", 0, 0), ("small", 0.1, 0), ("base", 0.2, 0), ("v2_base", 0.2, 0),
    ("large", 0.3, 0), ("xlarge", 0.4, 0.13), ("v2_huge", 0.4, 0)])
def test_finetune_recipe_by_size(variant, drop_path, ema_horizon):
    table = train.finetune(train.Recipe(variant=variant, batch_size=512))
    assert (table["drop_path"], table["ema_horizon"]) == (drop_path, ema_horizon)
    assert table["lr"] == 5e-5

def fine_tune(line):
    usual = "--dataset folder --epochs 2 --lr 0.01 -b 4 -j 0 --device cpu --amp off"
    assert outcome(f"{usual} {line} --output tuned") == "0"
    return torch.load("tuned/last.pt", weights_only=True)

def test_fine_tuning_begins_with_the_weights(pretrained, capsys):
    make_folder("data")
    state = fine_tune(f"--recipe finetune --init-from {pretrained} --lr 1e-9 --min-lr 0")
    source = train.open_source(pretrained)
    expected = source.expects["mean"], source.expects["std"]
    assert (state["mean"], state["std"]) == expected
    for name, tensor in source.tensors.items():
        if "head.fc" not in name:
            assert_close(state["model"][name], tensor, atol=1e-6, rtol=1e-6)
    assert len(state["model"]["head.fc.weight"]) == 2
    assert state["args"]["rand_augment"] == 0  # for few images, where the paper has 9
    text = capsys.readouterr().out
    assert "new: head.fc.weight, head.fc.bias\n" in text
    chosen = train.parse(shlex.split(re.search("recipe  finetune: (.*)", text)[1]))
    assert chosen["layer_decay"] == 0.8 and chosen["depths"] == (1, 1)
    assert all(state["args"][name] == value for name, value in chosen.items())

def test_fine_tuning_a_network_of_the_road(small, capsys):
    flags = "--dataset synthetic -b 32 --epochs 1 --device cpu --amp off -j 0"
    line = f"{flags} --road GELU --width 8 --patch-size 2 --lr 0.01 --ema-horizon 0"
    assert outcome(f"{line} --output road") == "0"
    capsys.readouterr()
    line = f"{flags} --init-from road --recipe finetune --lr 1e-9 --min-lr 0"
    assert outcome(f"{line} --output tuned") == "0"
    chosen = re.search("recipe  finetune: (.*)", capsys.readouterr().out)[1]
    first, tuned = (load_file(f"{run}/weights.safetensors") for run in ("road", "tuned"))
    for name, p in first.items():
        if "running" not in name and "num_batches" not in name:  # BatchNorm's go on
            assert_close(tuned[name], p, atol=1e-6, rtol=1e-6)
    assert outcome(f"{chosen} --output again") == "0"  # it can be typed
    for more, message in (
            ("--freeze-backbone", "--freeze-backbone needs a network without --road"),
            ("--variant atto", "road/weights.safetensors: it holds another kind of network")):
        ended = outcome(f"{flags} --init-from road {more} --output x")
        assert ended == f"UserError: {message}"

def test_a_frozen_backbone_stays_as_it_is(pretrained):
    make_folder("data")
    state = fine_tune(f"--init-from {pretrained} --freeze-backbone")
    first = load_file(pretrained)
    for name, tensor in state["model"].items():
        if not name.startswith("head.fc."):
            assert torch.equal(tensor, first[name]), name
    trained = train.open_source("tuned/weights.safetensors").tensors["head.fc.bias"]
    assert trained.abs().min() > 1e-3  # it began at 0

def test_a_classifier_is_kept_for_the_same_classes_alone(pretrained, capsys):
    make_folder("data")
    fine_tune(f"--init-from {pretrained}")
    os.rename("tuned", "first_tuned")
    before = load_file("first_tuned/weights.safetensors")["head.fc.weight"]
    state = fine_tune("--init-from first_tuned/weights.safetensors --lr 1e-9 --min-lr 0")
    assert_close(state["model"]["head.fc.weight"], before)
    for split in ("train", "val"):
        Path("data", split, "a dog").rename(Path("data", split, "wolf"))
    shutil.rmtree("tuned")
    capsys.readouterr()
    fine_tune("--init-from first_tuned/weights.safetensors")  # two other classes
    assert "new: head.fc.weight, head.fc.bias" in capsys.readouterr().out

def test_fine_tuning_few_images(pretrained):
    """Some 1,000 steps of a quarter of the images; what is typed stays."""
    line = f"--init-from {pretrained} --recipe finetune"
    recipe, typed = recipe_of(line), recipe_of(f"{line} -b 10 --lr 0.1")
    few = train.fit_to_data(recipe, 100, {})
    assert (few.batch_size, few.epochs, few.eval_every, few.rand_augment) == (25, 250, 12, 0)
    assert (few.lr, few.min_lr) == pytest.approx((3e-4, 6e-6))
    more = train.fit_to_data(recipe, 39_999, {})
    assert (more.batch_size, more.epochs) == (32, 20)
    typed = train.fit_to_data(typed, 100, {"batch_size": 10, "lr": 0.1})
    assert (typed.batch_size, typed.epochs) == (10, 100)
    assert (typed.lr, typed.min_lr) == pytest.approx((0.1, 0.002))
    resumed = dataclasses.replace(few, resume="x", lr=1e-3)
    for kept, images in ((recipe, 40_000), (resumed, 100)):
        assert train.fit_to_data(kept, images, {}) == kept

def test_distillation_loss_is_hintons():
    ours, theirs = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    p, q = ((x / 3).softmax(1) for x in (theirs, ours))
    loss = train.distillation_loss(ours, theirs, 3.0)
    assert_close(loss, 9 * (p * (p / q).log()).sum() / 5)
    assert train.distillation_loss(theirs, theirs, 3.0) == 0
    gradient, = torch.autograd.grad(loss, ours)
    assert_close(gradient, 3 * (q - p) / 5)

def test_the_teachers_share_of_the_loss():
    logits, theirs, targets = (torch.randn(5, 7) for _ in range(3))
    recipe = train.Recipe(distill_alpha=0.25, distill_temperature=3)
    expected = (0.75 * train.training_loss(recipe, logits, targets)
                + 0.25 * train.distillation_loss(logits, theirs, 3))
    assert_close(train.training_loss(recipe, logits, targets, theirs), expected)

def test_a_teacher_without_a_say_changes_nothing(pretrained):
    """And a copy of it has no loss."""
    flags = "--dataset synthetic -b 32 --epochs 1 --device cpu --amp off -j 0"
    teach, losses = f"--teacher {pretrained} --distill-alpha", []
    for name, more in (("plain", ""), ("silent", f"{teach} 0"), ("half", f"{teach} 0.5"),
                       ("copy", f"{teach} 1 --lr 1e-9 --min-lr 0 --drop-path 0")):
        assert outcome(f"{flags} --init-from {pretrained} --output {name} {more}") == "0"
        losses.append(float(read_csv(f"{name}/metrics.csv")[0]["train_loss"]))
    assert losses[0] == losses[1] != losses[2] and losses[3] < 1e-3

def test_the_teacher_sees_its_own_normalisation(pretrained):
    source, x = train.open_source(pretrained), torch.rand(4, 3, 32, 32)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    its_own = T.Normalize(source.expects["mean"], source.expects["std"])
    expected = logits_of(from_checkpoint(pretrained), its_own(x))
    logits = train.Teacher(source, mean, std)(train.normalize(x, mean, std))
    assert_close(logits, expected, atol=1e-4, rtol=1e-4)

def test_a_teacher_of_larger_images_is_refused(pretrained):
    line = f"{QUICK} --patch-size 2 --start-size 4 --teacher {pretrained} --output run"
    assert f"{pretrained} takes images of 8 or more pixels" in outcome(line)
    assert not Path("run").exists()
    deep = convnext.ConvNeXt((1,) * 5, (8,) * 5, num_classes=8)  # their total stride is 64
    torch.save(deep.state_dict(), "deep.pth")
    line = f"{QUICK} --img-size 40 --teacher deep.pth --output run"
    assert "deep.pth takes images of 64 or more pixels" in outcome(line)
    assert outcome(f"{line} --img-size 64 --epochs 1") == "0"

# --- Networks and machines

@pytest.mark.parametrize("line", [
    "--depths 1 2 --dims 8 16", "--depths 1 2 --dims 8 16 --grn", "--variant v2_atto",
    *(f"--road '{step}' --width 8" for step in convnext.DESIGNS)])
def test_a_network_is_saved_and_built_again_by_its_description(small, line):
    """From last.pt and weights.safetensors: the very same logits."""
    run = prepared(f"{line} --patch-size 2 --device cpu --amp off -j 0 "
                   "--dataset synthetic")
    run.folder.mkdir()
    run.step = run.total_steps
    randomise(run.ema.module)  # unlike the weights themselves
    train.save(run)
    x = torch.randn(2, 3, 32, 32)
    logits = logits_of(run.eval_model, x)
    for name in ("last.pt", "weights.safetensors"):
        source = train.open_source(f"run/{name}")
        network = train.load_network(source)
        assert not network.training
        assert_close(logits_of(network, x), logits)
        again = train.Recipe(**source.network)
        assert train.network_name(again) == train.network_name(run.recipe)
        assert source.classes[:2] == ["full star", "hollow star"]

@pytest.mark.parametrize(("amp", "device_type", "bf16", "expected"), [
    ("auto", "cpu", True, torch.bfloat16), ("auto", "cpu", False, torch.float32),
    ("auto", "cuda", True, torch.bfloat16), ("auto", "cuda", False, torch.float16),
    ("auto", "mps", True, torch.float32), ("off", "cuda", True, torch.float32),
    ("bf16", "cpu", False, torch.bfloat16), ("fp16", "cuda", True, torch.float16)])
def test_precision(monkeypatch, amp, device_type, bf16, expected):
    monkeypatch.setattr(train, "cpu_has_bfloat16", lambda: bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    assert train.pick_precision(amp, torch.device(device_type)) == expected

def test_a_run_in_float16_keeps_its_scale(small, monkeypatch):
    monkeypatch.setattr(train, "pick_precision", lambda *_: torch.float16)
    run, resumed = prepared(QUICK), prepared(QUICK)
    run.scaler.scale(torch.ones(()))
    run.scaler.update(8.0)
    train.load_state(resumed, train.state_of(run))
    assert resumed.scaler.is_enabled() and resumed.scaler.get_scale() == 8

def test_compile_calls_the_network(small, monkeypatch):
    """Without a compiler: torch.compile is asked, and the parameters keep their names."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda model: compiled.append(model))
    assert prepared(f"{QUICK} --compile").model is compiled[0]
    assert type(compiled[0].stages[0][0].dwconv) is convnext.DepthwiseConv  # no speed_up
    prepared(QUICK)
    assert len(compiled) == 1

# --- Pictures and folders

def test_only_training_crops_large_images_at_random(small):
    make_folder("data")
    data = train.prepare_data(recipe_of(f"{LARGE} --val-size 4"))
    cut = T.Compose([T.Resize(82, T.InterpolationMode.BICUBIC), T.CenterCrop(72)])
    for part in (data.train, data.val, data.test):
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(part[[0, 1]][0])
        assert torch.equal(draws[0], draws[1])
        assert torch.equal(draws[0], draws[2]) != (part is data.train)
        if part is not data.train:
            expected = TF.pil_to_tensor(cut(train.as_shown(part.images[0])))
            assert torch.equal(draws[0][0], expected)

def test_a_large_tensor_of_images_says_that_it_is_not_cropped(small, capsys):
    """Unlike a list of arrays, which is not in memory as the network sees it."""
    pictures = torch.randint(256, (6, 3, 72, 72), dtype=torch.uint8)
    arrays = [picture.numpy() for picture in rearrange(pictures, "n c h w -> n h w c")]
    for images, is_said in ((pictures, True), (arrays, False)):
        split = train.Images(images, [0, 1] * 3, ["a", "b"])
        data = train.prepare_data(recipe_of(f"{LARGE} --crop-scale 0.5"), splits=(split, split))
        assert ("neither cropped nor shifted" in capsys.readouterr().err) == is_said
        assert isinstance(data.train.to_square, T.RandomResizedCrop) != is_said

@pytest.mark.parametrize("scale", [0.08, 0.7])
def test_a_random_crop_has_an_area_from_crop_scale_to_1(small, scale):
    make_folder("data")
    square = train.prepare_data(recipe_of(f"{LARGE} --crop-scale {scale}")).train.to_square
    assert isinstance(square, T.RandomResizedCrop) and tuple(square.size) == (72, 72)
    assert square.interpolation == T.InterpolationMode.BICUBIC
    crops = [square.make_params([torch.zeros(3, 1000, 1000)]) for _ in range(300)]
    areas = [crop["height"] * crop["width"] / 1e6 for crop in crops]
    assert 0.9 * scale < min(areas) < scale + 0.1 and max(areas) > 0.9
    whole = train.prepare_data(recipe_of(f"{LARGE} --crop-scale 1")).train.to_square
    assert not isinstance(whole, T.RandomResizedCrop)

@pytest.mark.parametrize(("folders", "tested", "said"), [
    (("train", "test"), "test", ""), (("train", "valid"), "valid", ""),
    (("training", "validation"), "validation", ""), (("Train", "TEST"), "TEST", ""),
    (("train", "test", "val"), "test", "data/val is not used, since there is data/test")])
def test_names_of_folders(small, capsys, folders, tested, said):
    make_folder("data", splits=folders, images=2)
    for is_train, expected in ((True, folders[0]), (False, tested)):
        data = load(FOLDER, is_train)
        assert {Path(path).parts[1] for path in data.images} == {expected}
        assert len(data) == 4
    text = capsys.readouterr().err
    assert said in text and bool(said) == ("not used" in text)

def test_without_a_folder_train_every_fifth_image_of_a_class_is_a_test_image(small,
                                                                             capsys):
    for name, count in (("a", 10), ("b", 5), ("c", 7)):
        for i in range(count):
            save_picture(f"data/{name}/{i:02}.png")
    learned, tested = load(FOLDER), load(FOLDER, train_split=False)
    assert [*map(str, tested.images)] == ["data/a/04.png", "data/a/09.png",
                                          "data/b/04.png", "data/c/04.png"]
    assert len(learned) == 18 and not {*learned.images} & {*tested.images}
    said = capsys.readouterr().err
    assert "data has no folder train or test: every fifth image of each class" in said

@pytest.mark.parametrize("size", [32, 72])
def test_other_test_images_than_those_of_the_run_are_noted(small, capsys, size):
    """One more picture, and the test images are former training images."""
    make_folder("made", splits=["all"])
    os.rename("made/all", "data")
    assert outcome(f"{FOLDER} --img-size {size} --output run") == "0"
    assert outcome("--eval-only run") == "0"
    noted = "note: the test images are not those that the run had"
    assert noted not in capsys.readouterr().err
    save_picture("data/a dog/a.png")
    for weights in ("run", "run/last.pt"):
        train.note.cache_clear()
        assert outcome(f"--eval-only {weights}") == "0"
        assert noted in capsys.readouterr().err

@pytest.mark.parametrize(("made", "message"), [
    ("", "--data-dir data: there is no such folder"),
    ("val/a/x.png val/b/x.png", "has no folder train or training"),
    ("train/a/x.png train/b/x.png", "has no folder test or val"),
    ("train/x.png val/x.png", "data/train needs a folder per class"),
    ("Train/x.png Bus/x.png", "data needs five images of a class or more"),
    ("train/a/x.png val/a/x.png", "has images of one class, a; two are needed"),
    ("train/a/x.png train/b/x.png test/1.png",
     "data/test needs a folder per class with images in it. --predict takes"),
    ("train/a/x.png train/b/x.png val/a/x.png val/c/x.png",
     "there are test images of c, which are not among the known classes: a, b")])
def test_folders_that_do_not_fit(small, made, message):
    for path in made.split():
        save_picture(f"data/{path}")
    assert message in outcome(f"{FOLDER} --output run")
    assert not Path("run").exists()

def test_classes_are_matched_by_name_in_any_unicode_form(small, capsys):
    make_folder("data", ("ä", "b", "c"), images=1)
    os.rename("data/val/ä", unicodedata.normalize("NFD", "data/val/ä"))
    shutil.rmtree("data/val/c")
    Path("data/train/empty").mkdir()
    data = load(FOLDER)
    assert data.classes == ["b", "c", "ä"]
    tested = train.in_order(load(FOLDER, train_split=False), data.classes)
    assert tested.classes == data.classes and tested.labels.tolist() == [0, 2]
    said = capsys.readouterr().err
    assert "there are no test images of c" in said
    assert "data/train has no images of empty" in said

def test_characters_are_classes(small):
    """A folder per character: none of them is left out."""
    make_folder("data", ("#", "@", "!", "$", "a", "_", "~"), images=1)
    assert load(FOLDER).classes == ["!", "#", "$", "@", "_", "a", "~"]

def test_nothing_in_a_folder_disappears_or_is_doubled(small, capsys):
    root = make_folder("data") / "train"
    elsewhere = make_folder("elsewhere", ("wolf",), ("train",)) / "train" / "wolf"
    cats = root / "b cat"
    (root / "wolf").symlink_to(elsewhere.absolute())
    expected = {*root.rglob("*.*"), *(root / "wolf").iterdir()}
    for name in ("a.jfif", "b.jpe", "c.GIF", "more/e.bmp", "more/deeper/again.png"):
        save_picture(cats / name)
        expected.add(cats / name)
    for name in (".ipynb_checkpoints/a.png", "@eaDir/a.png"):
        save_picture(cats / name)
    (root / ".hidden").mkdir()
    (cats / "parent").symlink_to(root.absolute())
    for path in (cats / "labels.txt", cats / "._a.png", root / "stray.png"):
        path.touch()
    data = load(LARGE)
    assert {*map(Path, data.images)} == expected
    assert len(data) == len(expected) == 23
    assert data.classes == ["a dog", "b cat", "wolf"]
    for path, label in zip(data.images, data.labels):
        assert Path(path).relative_to(root).parts[0] == data.classes[label]
    said = capsys.readouterr().err
    for count in ("1 .ipynb_checkpoints", "1 @eaDir", "1 parent", "1 .hidden", "1 *.txt",
                  "1 *.png", "1 hidden"):
        assert count in said, said

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
KEYED = np.where((RGB == RGB[0, 0]).all(2, keepdims=True), 255, RGB)

@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(("kind", "image", "expected", "options"), [
    pytest.param("png", GREY16, GREY, {}, id="16-bit png"),
    pytest.param("tif", GREY16.astype(">u2"), GREY, {}, id="16-bit big-endian tif"),
    pytest.param("png", GREY > 99, 255 * (GREY > 99), {}, id="1-bit png"),
    pytest.param("png", RGB, np.rot90(RGB, -1), {"exif": EXIF}, id="rotated png"),
    pytest.param("tif", GREY16, np.rot90(GREY, -1), {"exif": EXIF}, id="rotated 16-bit"),
    pytest.param("png", RGB, RGB, {"exif": b"Exif\x00\x00II*\x00broken" + b"\xff" * 9},
                 id="broken exif"),
    pytest.param("gif", DRAWING, DRAWN, {}, id="drawing gif"),
    pytest.param("png", DRAWING.convert("LA"), DRAWN, {}, id="grey and alpha"),
    pytest.param("png", DRAWING.quantize(4), DRAWN, {}, id="palette and alpha"),
    pytest.param("png", RGB, KEYED, {"transparency": KEY}, id="one colour is clear")])
def test_a_picture_is_read_as_a_viewer_shows_it(tmp_path, kind, image, expected, options):
    if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image)
    image.save(tmp_path / f"x.{kind}", **options)
    shown = np.asarray(train.as_shown(str(tmp_path / f"x.{kind}"))).astype(float)
    assert shown.shape[2] == 3
    assert abs(shown - expected.reshape(*expected.shape[:2], -1)).max() <= 1

def test_a_16_bit_tiff_whose_0_is_white(tmp_path):
    """Tag 262 says so."""
    path = tmp_path / "x.tif"
    PIL.Image.fromarray(GREY16).save(path)
    content = path.read_bytes()
    zero_is_black = struct.pack("<HHIH", 262, 3, 1, 1)
    assert content.count(zero_is_black) == 1
    path.write_bytes(content.replace(zero_is_black, struct.pack("<HHIH", 262, 3, 1, 0)))
    assert (np.asarray(train.as_shown(str(path)))[..., 0] == 255 - GREY).all()

@pytest.mark.parametrize(("bits", "white"), [(8, 255), (10, 1023 / 16), (12, 255)])
def test_16_bit_files_that_are_not_full_are_no_black_pictures(tmp_path, capsys, bits,
                                                              white):
    """10 bits are taken for 12."""
    train.note.cache_clear()
    values = np.linspace(0, 2**bits - 1, 70).astype(np.uint16).reshape(7, 10)
    PIL.Image.fromarray(values).save(tmp_path / "x.png")
    shown = np.asarray(train.as_shown(str(tmp_path / "x.png")))[..., 0]
    assert abs(shown - np.linspace(0, white, 70).reshape(7, 10)).max() <= 1
    assert "are read as" in capsys.readouterr().err

def test_a_note_of_other_processes_is_shown_once(small, capfd):
    for path in make_folder("data").glob("*/*/*"):
        path.unlink()
        values = np.full((80, 80), 999, np.uint16)  # 16 bits, but below 2¹²
        PIL.Image.fromarray(values).save(path.with_suffix(".png"))
    assert outcome(f"{LARGE} -j 2 --epochs 3 --output run") == "0"
    assert capfd.readouterr().err.count("are read as 12-bit pictures") == 1

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
    before = struct.pack("<HHIH", 338, 3, 1, 2)
    assert content.count(before) == 1
    content = content.replace(before, struct.pack("<HHIH", tag, 3, 1, meaning))
    (tmp_path / "x.tif").write_bytes(content)
    shown = np.asarray(train.as_shown(str(tmp_path / "x.tif"))).astype(float)
    assert abs(shown - expected).max() <= 1
    assert ("fourth band" in capsys.readouterr().err) == (tag != 338)

@pytest.mark.parametrize("size", [40, 96])
def test_images_of_a_data_set_are_enlarged(small, monkeypatch, size):
    pixels = np.full((3, 32, 32, 3), 7, np.uint8)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", lambda *_, **__: Mock(
        data=pixels, targets=[3, 1, 2], classes=[f"class {i}" for i in range(100)]))
    line = f"--dataset cifar100 --img-size {size} -j 0"
    data = train.prepare_images(load(line), recipe_of(line))
    images, labels = data[[0, 2]]
    assert isinstance(data.images, torch.Tensor) == (size < 65)
    assert images.shape == (2, 3, size, size) and (images == 7).all()
    assert labels.tolist() == [3, 2]

def test_a_data_set_that_cannot_be_downloaded(small, monkeypatch):
    error = urllib.error.URLError("no route")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Mock(side_effect=error))
    ended = outcome("--device cpu --output run")
    assert re.search("cifar10 could not be loaded .*no route.* Or use --dataset", ended)
    assert not Path("run").exists()

def shapes_as(kind, count, size=32):
    """Drawn shapes as a tensor of bytes, or as arrays or paths, as Images takes them."""
    shapes = train.draw_shapes(count, size, seed=count)
    if kind == "tensor":
        return shapes
    arrays = list(rearrange(shapes.images, "b c h w -> b h w c").numpy())
    if kind == "arrays":
        return dataclasses.replace(shapes, images=arrays)
    paths = [f"{count}-{i}.png" for i in range(count)]
    for path, array in zip(paths, arrays):
        PIL.Image.fromarray(array).save(path)
    return dataclasses.replace(shapes, images=paths)

@pytest.mark.parametrize("kind", ["tensor", "arrays", "paths"])
def test_images_from_python(small, capsys, kind):
    """Training, resuming and evaluation are the same as with the shapes themselves."""
    splits, test = (shapes_as(kind, 64), shapes_as(kind, 16)), shapes_as("tensor", 16)
    line = f"{SMALLEST} -b 32 --epochs 1 --output {kind}"
    assert train.main(shlex.split(line), splits) == 0
    assert "64 training + 0 held-out + 16 test images" in capsys.readouterr().out
    assert train.main(["--resume", f"{kind}/last.pt"], splits) == 0
    assert train.main(["--eval-only", f"{kind}/last.pt", "--device", "cpu"], splits) == 0
    state = torch.load(f"{kind}/last.pt", weights_only=True)
    loss, _ = scores_of(from_checkpoint(f"{kind}/last.pt"), test.images, test.labels,
                        state["mean"], state["std"])
    assert state["history"][-1]["test_ema_loss"] == pytest.approx(loss, rel=1e-5)

@posix
def test_a_stopped_run_of_images_from_python_says_how_it_goes_on(small, monkeypatch, capsys):
    splits = shapes_as("tensor", 64), shapes_as("tensor", 16)
    spy(monkeypatch, "train_step", lambda *_: interrupt())
    line = f"{SMALLEST} -b 32 --epochs 1 --output run"
    assert train.main(shlex.split(line), splits) == 130
    expected = "to go on: train.main(['--resume', 'run/last.pt'], splits=...)"
    assert expected in capsys.readouterr().err

def test_names_of_classes_from_python(small, capsys):
    """In any sequence, and two may be alike: ImageNet has two classes called crane."""
    names = np.array(["crane", "crane", *map(str, range(6))])
    splits = [dataclasses.replace(shapes_as("tensor", count), classes=names) for count in (64, 16)]
    assert train.main(shlex.split(f"{SMALLEST} -b 32 --epochs 1 --output run"), splits) == 0
    top1 = read_csv("run/metrics.csv")[-1]["test_ema_top1"]
    line = "--eval-only run --device cpu --amp off"
    assert train.main(shlex.split(line), splits) == 0
    assert f"top-1 {float(top1):.2f} %" in capsys.readouterr().out.splitlines()[-1]
    line = "--init-from run --epochs 1 --device cpu --amp off -b 32 --output again"
    assert train.main(shlex.split(line), splits) == 0
    assert "new: " not in capsys.readouterr().out  # the classifier is kept

def test_skipped_arrays_have_numbers(small, capsys):
    arrays = [np.zeros((9, 9, 3)), np.zeros((9, 9, 3), np.uint8)]
    square = train.evaluation_square(32, None)
    kept = train.without_bad(train.Images(arrays, [0, 1], [*"ab"], square))
    assert kept.labels.tolist() == [1]
    assert capsys.readouterr().err.splitlines()[-1].endswith("are left out, 1: number 0")

@pytest.mark.parametrize("size", [32, 72])
@pytest.mark.parametrize(("pattern", "message"), [
    ("train/*/*", "no image can be read"),
    ("train/a dog/*", "there are no training images of a dog that can be read")])
def test_skip_bad_with_too_little_left(small, pattern, size, message):
    for path in make_folder("data").glob(pattern):
        path.write_bytes(b"")
    ended = outcome(f"{FOLDER} --img-size {size} --skip-bad --output run")
    assert ended == f"UserError: {message}"

@pytest.mark.parametrize("size", [32, 72])
def test_pictures_that_cannot_be_read(small, capsys, size):
    dogs = make_folder("data") / "train" / "a dog"
    line = f"{FOLDER} --img-size {size} --output run"
    whole = (dogs / "ünï 0.png").read_bytes()
    torn = whole[:900] + bytes(64) + whole[964:]
    for name, content in (("empty", b""), ("text", b"no image"), ("cut", whole[:900]),
                          ("torn", torn)):
        (dogs / f"{name}.png").write_bytes(content)
    error = outcome(line)
    reason = r"UserError: cannot read the image .*(empty|text|cut|torn).png \(.*--skip-bad"
    assert re.match(reason, error)
    assert "0x" not in error  # no address of a buffer in memory
    assert outcome(f"{line} --skip-bad") == "0"
    said = capsys.readouterr().err
    assert "note: images that cannot be read are left out, 4: " in said
    assert "cut.png" in said and "torn.png" in said

def test_a_bad_test_image_costs_no_epoch(small):
    """Large images are read late, after the epoch is saved, and --skip-bad goes on."""
    make_folder("data")
    Path("data/val/b cat/ünï 0.png").write_bytes(b"junk")
    ended = outcome(f"{LARGE} --epochs 3 --eval-every 2 --output run")
    assert "cannot read the image data/val/b cat" in ended
    assert torch.load("run/last.pt", weights_only=True)["step"] == 6
    assert outcome("--resume run/last.pt --skip-bad") == "0"
    rows = read_csv("run/metrics.csv")
    assert [bool(row["test_top1"]) for row in rows] == [False, True, True]

@pytest.mark.parametrize("size", [32, 72])
def test_other_images_are_refused_by_resume(small, size):
    """Small images are compared by class, order and content, large ones by name."""
    make_folder("data")
    line = f"{FOLDER} --img-size {size} --val-size 4 --skip-bad --output run"
    assert outcome(line) == "0"
    os.rename("data", "original")
    for split, change, refused in (
            ("train", "moved", ()), ("train", "class", (32, 72)),
            ("train", "renamed", (72,)), ("train", "content", (32,)),
            ("val", "deleted", (32, 72)), ("val", "content", (32,))):
        shutil.copytree("original", "elsewhere")
        path = Path("elsewhere", split, "a dog", "ünï 5.png")
        if change == "deleted":
            path.unlink()
        elif change == "class":
            path.rename(Path("elsewhere", split, "b cat", "a.png"))
        elif change == "renamed":
            path.rename(path.with_name("ünï 6.png"))
        elif change == "content":
            save_picture(path)
        ended = outcome("--resume run/last.pt --data-dir elsewhere")
        what = "training" if split == "train" else "test"
        error = f"UserError: --resume needs the {what} images that the run began with: "
        assert ended.startswith(error if size in refused else "0"), (split, change)
        shutil.rmtree("elsewhere")

# --- Checkpoints

@pytest.mark.parametrize(("use", "classes"), [
    ("--eval-only", [*"abcdefghijkl"]), ("--eval-only", [*map(str, range(1, 13))]),
    ("--eval-only", ["a"]),
    (f"--epochs 1 --output run {SMALLEST} --teacher", [*map(str, range(1, 13))])],
    ids=["a to l", "1 to 12", "a", "teacher"])
def test_the_order_of_classes_is_said_if_it_is_assumed(small, capsys, use, classes):
    """Loudly where there are two: timm sorts 2 before 10."""
    make_folder("data", classes, images=1)
    model = convnext.ConvNeXt((1,) * 4, (8, 16, 24, 32), num_classes=len(classes))
    torch.save(export_state_dict(model, "timm"), "a.pth")
    assert outcome(f"{use} a.pth --dataset folder --device cpu -j 0 --img-size 32") == "0"
    numbered = [f"{name} ({number})" for number, name in enumerate(sorted(classes))]
    assumed = ", ".join(numbered[:4]) + (", ..." if len(classes) > 4 else "")
    said = capsys.readouterr().err
    assert f"assuming that the outputs of a.pth are {assumed}\n" in said
    other = "timm sorts these classes in another way, 1, 2, 3, 4, ..."
    assert (other in said) == ("12" in classes)

def test_classes_in_another_order_are_evaluated_in_the_order_of_the_weights(small,
                                                                            capsys):
    make_folder("data")
    assert outcome(f"{FOLDER} --output run") == "0"
    state = torch.load("run/last.pt", weights_only=True)
    torch.save(state | {"classes": state["classes"][::-1]}, "turned.pt")
    data = train.prepare_images(load(FOLDER, train_split=False), recipe_of(FOLDER))
    for path, labels in (("run/last.pt", data.labels), ("turned.pt", 1 - data.labels)):
        capsys.readouterr()
        assert outcome(f"--eval-only {path} --device cpu --amp off") == "0"
        loss, top1 = scores_of(
            from_checkpoint(path), data.images, labels, state["mean"], state["std"])
        said = capsys.readouterr()
        assert f"test loss {loss:.4f}  top-1 {top1:.2f} %" in said.out
        assert "assum" not in said.err
    ended = outcome(f"{FOLDER} --teacher turned.pt --output x")
    assert "turned.pt has 2 classes (b cat, a dog). The images here have others, or the" in ended
    torch.save(state | {"classes": ["fox", "wolf"]}, "foxes.pt")
    ended = outcome("--eval-only foxes.pt --device cpu --amp off")
    assert "foxes.pt has 2 classes (fox, wolf). The images here have others" in ended
    shutil.rmtree("data/val/b cat")
    assert outcome("--eval-only run/last.pt --device cpu --amp off") == "0"
    assert "there are no test images of b cat" in capsys.readouterr().err

@pytest.mark.parametrize(("count", "said"), [
    (2, "assuming that the outputs of hf are a dog (0), b cat (1)"),
    (3, "hf has 3 classes (wolf 0, wolf 1, wolf 2). The images here have 2 classes (a dog")])
def test_other_names_of_the_classes(small, capsys, count, said):
    """As many are taken for the same classes, in the same order, with a note."""
    make_folder("data")
    model = convnext.ConvNeXt((1,), (8,), num_classes=count, patch_size=4)
    Path("hf").mkdir()
    save_file(export_state_dict(model, "huggingface"), "hf/model.safetensors")
    labels = {str(i): f"wolf {i}" for i in range(count)}
    Path("hf/config.json").write_text(json.dumps({"id2label": labels, "image_size": 32}))
    ended = outcome("--eval-only hf --dataset folder --device cpu -j 0")
    assert said in ended + capsys.readouterr().err
    assert (ended == "0") == (count == 2)

def test_published_weights_are_evaluated_as_timm_does(small, capsys):
    make_folder("data")
    model = randomise(timm.create_model("convnext_atto", num_classes=2))
    save_file(model.state_dict(), "timm.safetensors", {"format": "pt"})
    line = "--eval-only timm.safetensors --device cpu --amp off --img-size 96 -j 0 --tta"
    line += " --crop-pct 0.9"
    assert outcome(f"{line} --dataset folder") == "0"
    text = capsys.readouterr().out
    prepare = timm.data.create_transform(96, interpolation="bicubic", crop_pct=0.9)
    images = torchvision.datasets.ImageFolder("data/val", prepare)
    x, labels = torch.stack([x for x, _ in images]), torch.tensor(images.targets)
    plain, mirrored = logits_of(model, x), logits_of(model, TF.horizontal_flip(x))
    for title, logits in (("", plain), (" with mirror images", (plain + mirrored) / 2)):
        loss = F.cross_entropy(logits, labels)
        top1, = timm.utils.accuracy(logits, labels)
        scores = f"test loss {loss:.4f}  top-1 {top1:.2f} %  of 12 images of 96 px"
        assert f"timm.safetensors{title}: {scores}" in text  # no top-5 of two classes
    line = "--eval-only timm.safetensors --device cpu --img-size 96 --crop-pct 0.9 -j 0"
    assert outcome(f"{line} --predict data/val --output a.csv") == "0"
    largest = plain.softmax(1).max(1).values.tolist()
    rows = read_csv("a.csv")
    assert [float(row["probability_1"]) for row in rows] == pytest.approx(largest, abs=1e-4)

@pytest.mark.parametrize("use", ["--resume", f"{QUICK} --output x --teacher"])
@pytest.mark.parametrize(("content", "reason"), [
    pytest.param({"args": Malicious(), "made_by": train.MADE_BY}, "GLOBAL", id="evil"),
    pytest.param({"model": {}}, "no weights of a ConvNeXt", id="other"),
    pytest.param({}, "no weights of a ConvNeXt", id="empty"),
    pytest.param(convnext.ConvNeXt((1,), (8,), in_channels=1).state_dict(),
                 "1 channels, not 3", id="grey"),
    pytest.param(convnext.ConvNeXt((1,), (8,), num_classes=8).state_dict() | {
        "head.fc.bias": torch.full((8,), torch.nan)}, "not finite", id="nan"),
    pytest.param(None, "no such file", id="none")])
def test_files_that_are_no_weights(small, use, content, reason):
    """One line with the reason; no code in the file runs."""
    if content is not None:
        torch.save(content, "a.pt")
    ended = outcome(f"{use} a.pt")
    assert re.search(f"^UserError: .*a.pt: .*{reason}", ended)
    assert not Path("executed").exists() and not Path("x").exists()

def content_of(path):
    source = train.open_source(path)
    return without_times([source.tensors, source.network, source.expects, source.classes,
                          source.settings, dict(source.state)])

@pytest.mark.parametrize("name", ["last.pt", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "overwritten", "turned"])
def test_no_damage_to_a_file_goes_unnoticed(pretrained, name, damage):
    """It is refused in one line, or the content is the very same."""
    path, refused = f"first/{name}", 0
    content, original = Path(path).read_bytes(), content_of(path)
    choose, size = random.Random(damage), len(content)
    for _ in range(30):
        near = choose.randrange(min(size, 4000))  # most are near an end
        at = choose.choice([choose.randrange(size), near, size - 1 - near])
        flipped = bytes([content[at] ^ 1 << choose.randrange(8)])
        Path(path).write_bytes({
            "flipped": content[:at] + flipped + content[at + 1 :],
            "cut": content[:at],
            "overwritten": content[:at] + choose.randbytes(50) + content[at + 50 :],
            "turned": content[at:] + content[:at]}[damage])
        try:
            assert content_of(path) == original
        except train.UserError as error:
            assert path in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 15
    Path(path).write_bytes(content.replace(b"train.py, f", b"Train.py, f"))
    with pytest.raises(train.UserError, match=path):
        content_of(path)

def test_a_record_that_looks_like_a_folder_is_damage(tmp_path, monkeypatch):
    """PyTorch would not read it, and return whatever was in memory."""
    monkeypatch.chdir(tmp_path)
    torch.save(four_blocks().state_dict(), "a.pth")
    content = bytearray(Path("a.pth").read_bytes())
    listed = content.index(b"a/data/0", content.index(b"PK\x01\x02")) - 46
    content[listed + 38] |= 16  # the attribute of a folder
    Path("a.pth").write_bytes(content)
    with pytest.raises(ValueError, match="it is damaged in a/data/0"):
        from_checkpoint("a.pth")

def test_a_run_leaves_what_is_promised(small, capsys):
    line = f"{QUICK} --epochs 2 --output run"
    assert outcome(line) == "0"
    text = capsys.readouterr().out
    model = convnext.ConvNeXt((1, 1), (8, 16), num_classes=8, layer_scale=0)
    size = sum(p.numel() for p in model.parameters())
    assert f"patch size 4: {size:,} parameters, " in text
    assert len(text.split("\nepoch ")) == 3
    files = {name for name in os.listdir("run") if "tfevents" not in name}
    assert files - {".lock"} == {
        "args.json", "last.pt", "metrics.csv", "weights.safetensors"}
    assert json.loads(Path("run/args.json").read_text())["epochs"] == 2
    Path("plain").touch()  # not 0600: colleagues can read the weights
    assert os.stat("run/weights.safetensors").st_mode == os.stat("plain").st_mode
    assert "run holds a run, last.pt: give another --output" in outcome(line)
    os.remove("run/last.pt")  # to save space
    assert "run holds a run, weights.safetensors: give another" in outcome(line)

def test_a_run_goes_on_without_tensorboard(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not there
    assert outcome(f"{QUICK} --epochs 2 --output run") == "0"
    assert capsys.readouterr().err.count("TensorBoard does not get all numbers") == 1
    assert len(read_csv("run/metrics.csv")) == 2

def test_tensorboard_shows_what_metrics_csv_has(small):
    """Each epoch once, also those that a resumed run takes again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def keep():
        shutil.copy("run/last.pt", "after_one.pt")

    line = f"{QUICK} --epochs 3 --eval-every 2 --output run"
    assert outcome_with(keep, line, 4) == "0"
    shutil.move("after_one.pt", "run/last.pt")
    assert outcome("--resume run/last.pt") == "0"
    events, rows = EventAccumulator("run").Reload(), read_csv("run/metrics.csv")
    assert {*events.Tags()["scalars"]} == rows[-1].keys() - {"epoch", "step"}
    for name in events.Tags()["scalars"]:
        logged = [number for event in events.Scalars(name)
                  for number in (event.step, event.value)]
        expected = [float(row[key]) for row in rows if row[name] for key in ("epoch", name)]
        assert logged == pytest.approx(expected, rel=1e-6), name

def test_a_second_run_is_refused_before_anything_is_read(pretrained, monkeypatch):
    """So it cannot overwrite what the first one finishes meanwhile."""
    monkeypatch.setattr(train, "prepare_data", Mock(side_effect=AssertionError))
    monkeypatch.setattr(train, "open_source", Mock(side_effect=AssertionError))
    with train.FileLock("first/.lock"):
        for line in (f"{QUICK} --output first", "--resume first/last.pt"):
            assert outcome(line) == "UserError: another run is writing to first"

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
    assert outcome("--resume run/best.pt").startswith("UserError: --resume continues last.pt")
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
    os.rename(pretrained, "moved.safetensors")
    if change == "replaced":
        assert outcome(f"{QUICK} --epochs 1 --seed 1 --output other") == "0"
        shutil.copy("other/weights.safetensors", "moved.safetensors")
    assert outcome("--resume run/last.pt --teacher moved.safetensors").startswith(result)

# --- Prediction

def save_shapes(count):
    """Pictures of shapes in folders with their classes' names."""
    shapes = train.draw_shapes(count, 40, seed=5)
    for i, (pixels, label) in enumerate(zip(shapes.images, shapes.labels)):
        path = Path("pictures", shapes.classes[label], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(pixels).save(path)

@pytest.fixture
def pictures(pretrained):
    """Paths of 12 pictures of shapes, and of one in a folder that is no class."""
    save_shapes(12)
    save_picture("pictures/elsewhere/alone.png")
    return sorted(map(str, Path("pictures").rglob("*.png")))

def best_classes(paths):
    """By torchvision's transforms and the network alone: {path: [(class, p), ...]}."""
    state = torch.load("first/last.pt", weights_only=True)
    prepare = T.Compose([
        T.Resize(32, T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToImage(),
        T.ToDtype(torch.float32, scale=True), T.Normalize(state["mean"], state["std"])])
    x = torch.stack([prepare(PIL.Image.open(path).convert("RGB")) for path in paths])
    rows = logits_of(from_checkpoint("first/weights.safetensors"), x).softmax(1)
    best = rows.sort(1, descending=True)
    return {path: [(state["classes"][number], p) for number, p in zip(numbers, values)]
            for path, values, numbers in zip(paths, best.values.tolist(), best.indices)}

PREDICT = "--eval-only first/weights.safetensors --device cpu --predict"

@pytest.mark.parametrize("given", ["a folder", "a Path", "a list"])
def test_predict_from_python(pictures, given):
    asked, wanted = {
        "a folder": ("pictures", pictures), "a Path": (Path(pictures[3]), pictures[3:4]),
        "a list": (pictures[:2], pictures[:2])}[given]
    answers = train.predict("first/weights.safetensors", asked, top=3, device="cpu")
    assert sorted(path for path, _ in answers) == wanted
    assert train.predict(str(Path("first").resolve()), asked, top=3, device="cpu") == answers
    expected = best_classes(wanted)
    for path, classes in answers:
        names, values = zip(*expected[path][:3])
        assert [name for name, _ in classes] == [*names]
        assert [p for _, p in classes] == pytest.approx(values, abs=1e-5)

def test_predict_from_python_starts_no_processes(pictures, monkeypatch):
    """On macOS and Windows each would run the user's script once more."""
    seen = []
    spy(monkeypatch, "read_in_processes", lambda _reader, _order, workers: seen.append(workers))
    train.predict("first", pictures[:1] * 101, device="cpu")
    assert seen == [0]

def test_predict_prints_five_classes(pictures, capsys):
    capsys.readouterr()
    assert outcome(f"{PREDICT} {shlex.quote(pictures[3])}") == "0"
    (path, classes), = best_classes(pictures[3:4]).items()
    best = ", ".join(f"{name} {100 * p:.1f} %" for name, p in classes[:5])
    assert capsys.readouterr().out == f"{path}: {best}\n"

def test_predict_as_a_table_with_the_true_classes(pictures, capsys):
    capsys.readouterr()
    assert outcome(f"{PREDICT} pictures --output a.csv") == "0"
    assert capsys.readouterr().out == "13 predictions written to a.csv\n"
    rows, expected = read_csv("a.csv"), best_classes(pictures)
    assert sorted(row["path"] for row in rows) == pictures
    for row in rows:
        folder = Path(row["path"]).parent.name
        assert row["true"] == ("" if folder == "elsewhere" else folder)
        for i, (name, p) in enumerate(expected[row["path"]][:5], 1):
            assert row[f"class_{i}"] == name
            assert float(row[f"probability_{i}"]) == pytest.approx(p, abs=1e-4)

def test_predict_leaves_out_bad_pictures_if_told_to(pictures):
    Path("pictures/bad.png").write_bytes(b"junk")
    line = f"{PREDICT} pictures --output a.csv"
    assert "UserError: cannot read the image pictures/bad.png (" in outcome(line)
    assert not Path("a.csv").exists()
    assert outcome(f"{line} --skip-bad") == "0" and len(read_csv("a.csv")) == 13

def test_predict_says_what_it_leaves_out(small, capsys):
    save_picture("pictures/a.png")
    for name in ("a.heic", "b.heic", "c", ".DS_Store", "._a.png"):
        Path("pictures", name).touch()
    assert train.find_pictures("pictures") == [str(Path("pictures/a.png"))]
    said = "pictures: left out what is no picture: 2 hidden, 2 *.heic, 1 without a suffix\n"
    assert capsys.readouterr().err == f"note: {said}"

def test_predict_tries_first_whether_it_can_write(pictures, monkeypatch):
    """As on Windows, where another program may hold the file; here it is a folder."""
    Path("a.csv").mkdir()
    monkeypatch.setattr(train, "predictions", Mock(side_effect=AssertionError))
    ended = outcome(f"{PREDICT} pictures --output a.csv")
    assert ended.startswith("UserError: --output: cannot write a.csv (")
    monkeypatch.setattr(os, "access", Mock(return_value=False))
    ended = outcome(f"{PREDICT} pictures --output b.csv")
    assert ended == "UserError: --output: cannot write into the folder ."

@pytest.mark.parametrize(("asked", "message"), [
    ("none.png", "--predict none.png: there is no such file or folder"),
    ("empty", "--predict empty: there is no picture in this folder"),
    ("text.txt", "cannot read the image text.txt (")])
def test_nothing_to_predict(pretrained, asked, message):
    Path("empty").mkdir()
    Path("text.txt").write_text("no picture")
    assert outcome(f"{PREDICT} {asked}").startswith(f"UserError: {message}")
    assert train.predict(pretrained, [], device="cpu") == []

@pytest.mark.parametrize(("classes", "first"), [(1000, "tench"), (7, "0")])
def test_names_of_classes_that_weights_do_not_have(small, classes, first):
    torch.save(convnext.ConvNeXt((1,), (8,), num_classes=classes).state_dict(), "a.pth")
    names = train.class_names(train.open_source("a.pth"))
    assert names[0] == first and len(names) == classes

def test_names_beside_weights_of_other_classes_are_not_used(small, capsys):
    """As if weights for three classes had been saved into a folder of another network."""
    saved_atto("a.pth")
    labels = {str(i): name for i, name in enumerate(("tench", "goldfish", "shark", "ray", "hen"))}
    Path("config.json").write_text(json.dumps({"model_type": "convnext", "id2label": labels}))
    PIL.Image.new("RGB", (40, 40)).save("photo.png")
    assert outcome("--eval-only a.pth --predict photo.png") == "0"
    printed = capsys.readouterr()
    assert "3 classes; the 5 names beside it are not used" in printed.err
    assert re.search(r"photo.png: [012] [\d.]+ %, [012] [\d.]+ %, [012]", printed.out)

@pytest.mark.parametrize(("system", "command"), [
    ("posix", "'my runs/last.pt'"), ("nt", '"my runs/last.pt"')])
def test_the_command_that_continues_can_be_pasted(monkeypatch, system, command):
    monkeypatch.setattr(train.os, "name", system)
    assert train.quoted(["my runs/last.pt"]) == command

# --- The command line

def test_images_of_any_size_can_be_evaluated(small):
    """Smaller ones than a setting of training, which plays no role."""
    line = f"{QUICK} --patch-size 1 --img-size 4 --crop-padding 0 --epochs 1 --output run"
    assert outcome(line) == "0"
    assert outcome("--eval-only run --device cpu") == "0"
    Path("run/last.pt").unlink()
    Path("run/weights.safetensors").unlink()
    assert outcome("--eval-only run").startswith("UserError: run holds no weights yet")
    signed = "https://host/w.pth?" + "x" * 5000  # longer than a path can be
    assert train.file_in(signed) == signed

@pytest.mark.parametrize(("number", "text"), [
    (12345.6, "12346"), (999.96, "1000"), (1e30, "1e+30"), (0.00123456, "0.001235"), (3, "3")])
def test_large_numbers_are_printed_without_exponents(number, text):
    assert train.in_digits(number) == text

@pytest.mark.parametrize(("line", "expected"), [
    ("--epochs 40 --init paper", {"init": "paper", "warmup": 2, "mixed_epochs": 36}),
    ("--recipe fast --epochs 100 --layer-scale 0.1 --no-tta --variant tiny",
     {"epochs": 100, "layer_scale": 0.1, "tta": False, "variant": "tiny"}),
    ("--recipe fast --patch-size 2", {"start_size": 0}),  # 24 pixels do not fit
    ("--recipe fast --depths 1 --dims 8 --img-size 4 --crop-padding 0", {"img_size": 4}),
    ("--init-from first/last.pt --recipe finetune -b 256 --mixup 1 --lr 1e-3",
     {"min_lr": 2e-5, "mixup": 1, "lr": 1e-3}),
    ("--init-from first/weights.safetensors", {  # takes the network alone
        "depths": (1, 1), "dims": (8, 16), "layer_scale": 1e-6, "lr": 1e-3,
        "batch_size": 128}),
    ("--init-from first/weights.safetensors --patch-size 2 --variant tiny",
     {"patch_size": 2, "variant": "tiny", "depths": None}),
    ("--init-from first/weights.safetensors --freeze-backbone", {"drop_path": 0}),
    ("--init-from first --recipe finetune", {"layer_decay": 0.8}),
    ("--init-from first --recipe finetune --min-lr 0 --warmup-epochs 0", {"min_lr": 0}),
    ("--eval-only first/weights.safetensors",  # takes the data set
     {"dataset": "synthetic", "depths": (1, 1), "epochs": 100}),
    ("--eval-only first/last.pt", {"batch_size": 32, "epochs": 100}),
    ("--resume first/last.pt",  # takes all
     {"lr": 0.002, "layer_scale": 0.1, "output": "first", "epochs": 1}),
    ("--resume first/last.pt --lr 0.002 -j 3 --data-dir ~/x --amp bf16 --compile",
     {"lr": 0.002, "workers": 3, "data_dir": os.path.expanduser("~/x"), "amp": "bf16",
      "compile": True}),
    ("--drop_path=0.3 --batch_size 7 --model atto --wd 0.2 -j 1",
     {"drop_path": 0.3, "batch_size": 7, "variant": "atto", "weight_decay": 0.2}),
    ("--distill-alpha 0 --mix-prob 0 --mixup 0 --width 0", {"mixup": 0})])
def test_settings_by_precedence(request, line, expected):
    """What is typed, the weights, the recipe, the defaults."""
    request.getfixturevalue("pretrained" if "first" in line else "small")
    assert_settings(line, expected)

def test_weights_with_patches_of_any_size_are_measured(small, capsys):
    network = convnext.ConvNeXt([1, 1], [8, 16], num_classes=8, patch_size=3)
    torch.save(network.state_dict(), "patches.pth")
    assert outcome("--eval-only patches.pth --dataset synthetic --device cpu -j 0") == "0"
    assert "of 20 images" in capsys.readouterr().out

def test_a_run_in_float16_can_be_measured_without_a_gpu(pretrained):
    source = train.open_source("first/weights.safetensors")
    for precision, expected in (("fp16", "auto"), ("off", "off")):
        source.settings["amp"] = precision
        assert train.combine({"eval_only": "first"}, source).amp == expected

def test_a_smaller_batch_can_be_evaluated_than_the_run_had_parts(pretrained):
    source = train.open_source("first/weights.safetensors")
    source.settings["accumulate"] = 8
    assert train.combine({"eval_only": "first"}, source).accumulate == 8
    assert train.combine({"eval_only": "first", "batch_size": 4}, source).accumulate == 1

@pytest.mark.parametrize(("road", "fixed"), [("one norm", True), ("LayerNorm", False)])
def test_accumulate_cannot_change_where_it_changes_the_result(pretrained, road, fixed):
    source = train.open_source("first/last.pt")
    source.settings["road"] = road
    line = {"resume": "first/last.pt", "accumulate": 2}
    with pytest.raises(train.UserError, match="leave out --accumulate, ") if fixed \
            else contextlib.nullcontext():
        assert train.combine(line, source).accumulate == 2

def test_the_folder_of_weights_belongs_to_their_data_set(small):
    weights = shlex.quote(str(HERE / "assets" / "cifar10-atto.safetensors"))
    assert_settings(f"--eval-only {weights}", {
        "dataset": "folder", "data_dir": "data/cifar10-jpeg"})
    assert_settings(f"--eval-only {weights} --dataset cifar10", {"data_dir": "data"})

@pytest.mark.parametrize(("line", "img_size", "crop_pct"), [
    ("", 224, 0.95), ("--img-size 224", 224, 0.95), ("--img-size 320", 320, None),
    ("--img-size 320 --crop-pct 0.9", 320, 0.9), ("--crop-pct 0.875", 224, 0.875)])
@pytest.mark.parametrize("use", ["--init-from", "--eval-only"])
def test_the_crop_of_weights_belongs_to_their_size(monkeypatch, use, line, img_size,
                                                   crop_pct):
    state = export_state_dict(create_convnext("atto"), "timm")
    images = {**train.IMAGENET, "crop_pct": 0.95}
    monkeypatch.setattr(convnext, "read_source", lambda _: (state, {}, images))
    recipe = recipe_of(f"{use} timm:name --dataset imagenet {line}")
    assert (recipe.img_size, recipe.crop_pct) == (img_size, crop_pct)
    assert train.network_name(recipe) == "ConvNeXt-atto"

def first_group(run):
    """The settings of AdamW's or SGD's first group of parameters."""
    return run.optimizers[0].param_groups[0]

def filters_of(run):
    return run.model.stages[1][0].dwconv.weight

@pytest.mark.parametrize(("line", "seen"), [
    ("", lambda run: type(run.model.stages[0][0].dwconv) is convnext.FastDepthwiseConv),
    ("--drop-path 0.3", lambda run: run.model.stages[1][0].drop_path.p == 0.3),
    ("--head-init-scale 0.5", lambda run: 0.008 < run.model.head.fc.weight.std() < 0.012),
    ("--layer-scale 0.3", lambda run: run.model.stages[0][0].layer_scale.gamma[0] == 0.3),
    ("--init paper", lambda run: 0.015 < filters_of(run).std() < 0.025),
    ("--init fan-in", lambda run: 0.1 < filters_of(run).std() < 0.15
     and filters_of(run)[..., 3, 3].mean() < 0.1),
    ("--init local", lambda run: filters_of(run)[..., 3, 3].mean() > 0.5),
    ("--grn", lambda run: isinstance(run.model.stages[0][0].mlp.grn, convnext.GRN)),
    ("--patch-size 2", lambda run: run.model.downsample_layers[0][0].stride == (2, 2)),
    ("--beta2 0.5", lambda run: first_group(run)["betas"] == (0.9, 0.5)),
    ("--wd 0.7", lambda run: first_group(run)["weight_decay"] == 0.7),
    ("--optimizer muon --muon-lr 0.3",
     lambda run: run.optimizers[1].param_groups[0]["lr_scale"] == pytest.approx(300)),
    ("--layer-decay 0.5", lambda run: first_group(run)["lr_scale"] == 0.125)],
    ids=by_text)
def test_a_flag_reaches_the_run(small, line, seen):
    assert seen(prepared(f"{QUICK} {line}"))

@pytest.mark.parametrize(("line", "message"), [
    ("--vairant tiny", "unrecognized arguments: --vairant"),
    ("--output=", "no value may be empty"), ("--init x", "--init: invalid choice: 'x'"),
    ("--patch-size 0", "--patch-size must be a whole number in [1, inf), not 0"),
    ("--road GELU --patch-size 8", "--patch-size must be 1, 2 or 4 with --road, not 8"),
    ("--lr x", "--lr: invalid float value: 'x'"),
    ("--lr 0", "--lr must be a number in (0, inf), not 0.0"), ("--lr nan", "must be "),
    ("--drop_path 1", "--drop-path must be a number in [0, 1)"),
    ("--epochs 3 --warmup-epochs 3", "--warmup-epochs must be below --epochs, 3, not 3"),
    ("--img-size 8", "--img-size must be 16 or more, the network's total stride, not 8"),
    ("--start-size 8", "--start-size must be a multiple of 16, the network's stride"),
    ("--crop-padding 32", "--crop-padding must be below --img-size, 32"),
    ("--min-lr 1", "--min-lr must be at most --lr, 0.001"),
    ("--accumulate 9 -b 8", "--accumulate must be at most --batch-size, 8, not 9"),
    ("--val-size 1.5", "--val-size must be a share below 1 or a whole number, not 1.5"),
    ("--batch-size 9999999", "--batch-size must be a whole number in [1, 1000000]"),
    ("--mixup 1e-46", "--mixup must be 0 or at least 0.001"),
    ("--depths 1 2 --dims 8", "--depths and --dims need equally many numbers")])
def test_wrong_values_are_refused_with_the_range(capsys, line, message):
    text = (outcome(line) + "\n" + capsys.readouterr().err).strip().splitlines()[-1]
    assert message in text and re.match("UserError: |.*: error: ", text)

@pytest.mark.parametrize(("line", "message"), [
    ("--resume first/last.pt --lr 0.001 --wd 1",
     "leave out --lr, --weight-decay, or give --init-from"),
    ("--resume first/last.pt --teacher first/last.pt", "leave out --teacher, or give --init-from"),
    ("--resume first/weights.safetensors", "--resume takes last.pt"),
    ("--resume first/last.pt --eval-only first/last.pt", "only one of --resume, --eval"),
    ("--eval-only first/last.pt --epochs 3 --tta", "trains nothing: leave out --epochs$"),
    ("--eval-only first/last.pt --output x", "--output needs --predict beside --eval-only"),
    ("--predict a.png", "--predict needs weights: --eval-only WEIGHTS"),
    ("--init-from first/last.pt --recipe fast", "--recipe fast .* without --init-from"),
    ("--init-from first/last.pt --variant femto --dataset synthetic --output x",
     "do not fit"),
    ("--init-from first/last.pt --freeze-backbone --patch-size 2 --dataset synthetic",
     "would leave untrained: downsample_layers.0.0.weight"),
    ("--recipe finetune", "need weights: --init-from"),
    ("--init-from first/last.pt --recipe finetune --optimizer muon", "give --muon-lr"),
    ("--init-from first/last.pt --recipe finetune --warmup-epochs 2", "needs --epochs, too"),
    ("--init-from first/last.pt --recipe finetune --min-lr 1e-6", "needs --lr, too"),
    ("--init-from first/last.pt --layer-scale 0.1", "--layer-scale needs new weights"),
    ("--init-from first/last.pt --freeze-backbone --layer-decay 0.5", "a backbone that is trained"),
    ("--start-size 16 --epochs 1", "--start-size needs an epoch of --start-share"),
    ("--init-from first/last.pt --freeze-backbone --optimizer muon", "muon has nothing to train"),
    ("--variant atto --road GELU", "only one of --variant, --depths and --road"),
    ("--depths 1 1", "--depths and --dims belong together"),
    ("--muon-lr 0.1", "--muon-lr needs --optimizer muon"),
    ("--distill-alpha 1", "--distill-alpha needs --teacher"),
    ("--crop-padding 3 --img-size 96", "--crop-padding needs images of up to 64 pixels"),
    ("--mixup 0.3 --mix-prob 0", "--mixup needs a --mix-prob above 0"),
    ("--mix-off-epochs 3 --mix-prob 0", "--mix-off-epochs needs a --mix-prob above 0"),
    ("--mix-prob 0.5 --mixup 0 --cutmix 0", "--mix-prob needs a --mixup or --cutmix above 0"),
    ("--width 8", "--width needs --road"), ("--grn", "--grn needs --depths"),
    ("--road GELU --layer-decay 0.5", "--layer-decay needs a network without --road"),
    ("--eval-only first/last.pt --predict a.png --output x", "--predict writes a .csv file"),
    ("--eval-only first/last.pt --predict a.png --tta", "--predict has no --tta"),
    ("--init-from first/last.pt --init fan-in", "--init fan-in or local begin with new weights"),
    ("--init-from first/last.pt --init local", "--init fan-in or local begin with new weights"),
    ("--optimizer sgd --beta2 0.9", "--beta2 needs --optimizer adamw or muon"),
    ("--start-share 0.3", "--start-share needs --start-size"),
    ("--crop-scale 0.3", "--crop-scale needs images above 64"),
    ("--crop-pct 0.9", "--crop-pct needs images above 64"),
    ("--cutmix 1 --mix-prob 0", "--cutmix needs a --mix-prob"),
    ("--mix-off-epochs 3 --mixup 0 --cutmix 0", "--mix-off-epochs needs a --mixup or --cutmix"),
    ("--distill-temperature 3", "--distill-temperature needs --teacher"),
    ("--road GELU --drop-path 0.1", "--drop-path needs a network without --road"),
    ("--road GELU --init paper", "--init needs a network without --road"),
    ("--road LayerNorm --layer-scale 0.1",
     "--layer-scale needs a network without --road, or its last step"),
    ("--road 'Swin block' --layer-scale 0.1", "--layer-scale needs a network without --road"),
    ("--road GELU --head-init-scale 0.1", "--head-init-scale needs a network without")])
def test_contradictions_are_refused(request, line, message):
    request.getfixturevalue("pretrained" if "first" in line else "small")
    assert re.search(f"^UserError: .*{message}", outcome(line))
    assert not Path("x").exists()

@pytest.mark.parametrize("line", [
    f"{QUICK} --teacher none.pt", f"{QUICK} --device quantum",
    f"{QUICK} --device cpu --amp fp16",
    "--road 'window attention' --width 33 --device cpu --dataset synthetic"])
def test_mistakes_are_found_before_images_are_read(small, monkeypatch, line):
    monkeypatch.setattr(train, "load_split", Mock(side_effect=AssertionError))
    assert outcome(f"{line} --output run").startswith("UserError: ")
    assert not Path("run").exists()

def test_help_lists_all_settings(capsys):
    assert outcome("--help") == "SystemExit: 0"
    text = capsys.readouterr().out
    assert all(train.flag(name) in text for name in train.FIELDS)

@pytest.mark.parametrize("name", ["README.md", "assets/results.md", "assets/howto.md"])
def test_commands_in_the_documents_are_understood(name):
    text = (HERE / name).read_text()
    commands = re.findall(r"^ *python train\.py (.*)$", text, re.MULTILINE)
    assert commands
    values = {"P": "2", "N": "30", "R": "0", "S": "0", "E": "20", "W": "16", "A": "0.5",
              "INIT": "paper", "SCALE": "0.1", "LR": "1e-3", "BETA2": "0.999",
              "STEP": "stage ratio", "FLAGS": "", "$lr": "1e-3", "$seed": "0", "REST": "",
              "$lr-$seed": "x"}
    for command in commands:
        words = [values.get(word, word) for word in shlex.split(command, comments=True)]
        typed = train.parse([word for word in words if word])  # SystemExit names a flag
        if not {"init_from", "eval_only", "resume"} & typed.keys():
            train.combine(typed)  # UserError names a contradiction

def test_the_python_block_of_readme_runs(monkeypatch):
    monkeypatch.chdir(HERE)
    heading = "## The network in Python\n"
    _, text = Path("README.md").read_text().split(heading)
    block, done = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {}
    exec(block, done)  # noqa: S102
    assert done["logits"].shape == (8, 10)
    assert len(done["maps"]) == len(done["model"].stages)

def test_python_blocks_of_the_how_to_run(small):
    """From the top to the bottom, on a small run; and their results are right."""
    pytest.importorskip("matplotlib").use("Agg")
    quick = "--depths 1 1 1 1 --dims 8 16 24 32 --dataset synthetic -b 100 --device cpu"
    for folder, seed in (("runs/first", 0), ("runs/rates/a", 0), ("runs/rates/b", 1)):
        assert outcome(f"{quick} --epochs 1 --seed {seed} --output {folder}") == "0"
    weights = "runs/first/weights.safetensors"
    predict = f"--eval-only {weights} --predict pictures --output predictions.csv"
    digits = [(PIL.Image.new("L", (28, 28), 9 * i), i % 3) for i in range(6)]
    how_to = HERE / "assets" / "howto.md"
    text, done = how_to.read_text(), {"__name__": "__main__"}
    has_onnx = all(map(importlib.util.find_spec, ("onnxscript", "onnxruntime")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets, "MNIST", lambda *_, **__: digits)
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            if "predictions.csv" in block:
                assert outcome(predict) == "0"
            if "onnx" not in block or has_onnx:
                line = text[: text.index(block)].count("\n")
                code = compile("\n" * line + block, str(how_to), "exec")
                exec(code, done)  # noqa: S102

    logits = logits_of(done["model"], done["images"])
    answers = dict(train.predict(weights, "pictures", top=1, device="cpu"))
    for path, row in zip(done["paths"], logits.softmax(1)):
        (name, probability), = answers[str(path)]
        assert done["classes"][row.argmax()] == name
        assert probability == pytest.approx(row.max().item(), abs=1e-3)
    assert_close(done["peer"](done["images"]).logits, logits, atol=1e-5, rtol=1e-5)
    assert len(done["answers"]) == 40 and done["embeddings"].shape == (40, 32)
    assert len([*Path("data/mnist/train").glob("*/*.png")]) == 6
    assert Path("runs/from-python/weights.safetensors").is_file()
    if has_onnx:
        expected = logits_of(done["whole"], done["pixels"])
        for name, tolerance in (("probabilities", 1e-5), ("rounded", 0.05)):
            assert_close(torch.from_numpy(done[name]), expected, atol=tolerance, rtol=0)
    else:
        pytest.skip("all ran but the export to ONNX: needs onnxscript and onnxruntime")

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
def quick_run(run_once):
    """The command line of a run of 4 epochs, each of 5 steps, and what it leaves if
    nothing ends it. SIGHUP has its usual effect, which nohup would take away."""
    line = f"{QUICK} -b 16 --epochs 4 --val-size 20"
    run_once(line, "undisturbed")
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL) if os.name == "posix" else None
    yield f"{line} --output run"
    if former is not None:
        signal.signal(signal.SIGHUP, former)

def assert_undisturbed():
    assert_same_files("run", "undisturbed")
    assert not [*Path("run").glob("*.tmp")]

def assert_goes_on(step):
    """From this step, to what an undisturbed run leaves."""
    assert torch.load("run/last.pt", weights_only=True)["step"] == step
    assert outcome("--resume run") == "0"
    assert_undisturbed()

@posix
@pytest.mark.parametrize(("name", "function", "number", "step"), [
    ("SIGINT", "train_step", 3, 3), ("SIGHUP", "train_step", 7, 7),
    ("SIGTERM", "evaluate", 3, 10), ("SIGUSR1", "train_step", 20, 20)])
def test_a_signal_ends_a_run_and_loses_nothing(quick_run, capsys, name, function, number,
                                               step):
    """In an epoch, in an evaluation (the weights', then their average's), and in the last
    step. Schedulers may send it twice."""
    signals = [getattr(signal, name)] * (1 if name == "SIGINT" else 2)

    def send():
        for each in signals:
            signal.raise_signal(each)

    assert outcome_with(send, quick_run, number, function) == str(128 + signals[0])
    said = capsys.readouterr().err
    assert "stopped; to go on: python train.py --resume run/last.pt" in said
    assert_goes_on(step)

@posix
def test_a_second_interrupt_acts_at_once(quick_run):
    def twice():
        interrupt()
        interrupt()

    assert outcome_with(twice, quick_run, 7) == "KeyboardInterrupt: "
    assert_goes_on(step=5)

@posix
def test_under_nohup_a_closed_terminal_ends_no_run(quick_run):
    def hang_up():
        signal.raise_signal(signal.SIGHUP)

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert outcome_with(hang_up, quick_run, 3) == "0"
    assert_undisturbed()

@posix
def test_a_full_disk_leaves_the_old_files(quick_run):
    with contextlib.ExitStack() as stack:
        ended = outcome_with(lambda: stack.enter_context(full_disk()), quick_run, 7)
    message = r"UserError: cannot write run/last.pt \(.*\); the old files stay"
    assert re.fullmatch(message, ended)
    assert_goes_on(step=5)

def test_what_a_killed_run_left_is_written_again(quick_run):
    assert outcome(quick_run) == "0"
    Path("run/last.pt.tmp").write_bytes(b"half a file")
    Path("run/metrics.csv").unlink()
    Path("run/weights.safetensors").unlink()
    assert outcome("--resume run/last.pt") == "0"
    assert_undisturbed()

def test_a_file_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """After a power failure, there would be an empty file otherwise."""
    calls = Mock(fsync=Mock(wraps=os.fsync), replace=Mock(wraps=os.replace))
    monkeypatch.setattr(os, "fsync", calls.fsync)
    monkeypatch.setattr(os, "replace", calls.replace)
    train.write_file(tmp_path / "x", lambda path: path.write_text("y"))
    assert [name for name, _, _ in calls.mock_calls] == ["fsync", "replace"]
    assert (tmp_path / "x").read_text() == "y"

@posix
@pytest.mark.parametrize(("name", "result"), [
    ("SIGTERM", "0"), ("SIGKILL", "UserError: .*try fewer --workers")])
def test_signals_to_processes_that_read_images(small, name, result):
    """What reaches all processes is left to the main one; a killed one ends the run in
    one line."""
    def send():
        for process in multiprocessing.active_children():
            os.kill(process.pid, getattr(signal, name))
            if name == "SIGKILL":
                process.join(20)  # the news arrives here, not where images are awaited

    make_folder("data")
    assert re.match(result, outcome_with(send, f"{LARGE} -b 1 -j 1 --output run", 1))

@posix
def test_a_stopped_run_is_saved_before_its_processes_end(small, monkeypatch):
    """Schedulers give a program some seconds, and a process may be busy with a large batch."""
    processes = []
    spy(monkeypatch, "save", lambda run: processes.extend(multiprocessing.active_children()))
    make_folder("data")
    assert outcome_with(interrupt, f"{LARGE} -b 1 -j 1 --output run", 2) == "130"
    assert len(processes) == 1

@posix
def test_a_script_ends_although_it_holds_processes(tmp_path):
    """Python keeps the last error to its end, and would wait for what it holds. A pool that the
    script has forgotten is Python's to end."""
    script = tmp_path / "script.py"
    script.write_text("""
import multiprocessing
import train
def use(batches):
    next(batches)
    raise ValueError("a fault")
if __name__ == "__main__":
    pool = multiprocessing.Pool(1)
    pool.map(abs, [-1])
    use(train.read_in_processes(train.draw_shapes(1, 32, seed=0), [[0]] * 9, workers=1))
""")
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    ended = subprocess.run([sys.executable, script], check=False, env=environment,
                           capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1 and ended.stderr.endswith("ValueError: a fault\n")

def lock_file(monkeypatch, name, tries):
    """As on Windows, while another program reads it, it cannot be replaced for some tries."""
    move, refusals = os.replace, iter([True] * tries)

    def locked(old, new):
        if str(new).endswith(name) and next(refusals, False):
            raise PermissionError(errno.EACCES, "used by another process", str(new))
        move(old, new)

    monkeypatch.setattr(os, "replace", locked)
    monkeypatch.setattr(train.time, "sleep", lambda seconds: None)
    return refusals

def test_a_locked_table_is_noted_and_written_later(small, monkeypatch, capsys):
    """All other files are written."""
    refusals = lock_file(monkeypatch, "metrics.csv", 42)  # two times 21
    assert outcome(f"{QUICK} --epochs 2 --output run") == "0"
    assert "metrics.csv (" in capsys.readouterr().err
    assert next(refusals, None) is None and len(read_csv("run/metrics.csv")) == 2

def test_a_checkpoint_that_is_being_read_is_replaced_later(small, monkeypatch):
    refusals = lock_file(monkeypatch, "last.pt", 3)
    assert outcome(f"{QUICK} --epochs 1 --output run") == "0"
    assert next(refusals, None) is None and torch.load("run/last.pt")["step"] == 3

# --- Errors, streams and notebooks

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
    message = f"UserError: by step 6, .* the {what} .*(nan|inf).*: try --amp off"
    assert re.match(message, ended)
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

def test_within_a_minute_of_a_long_epoch(small, monkeypatch):
    clock = [0]

    def slow_step(*_):
        clock[0] += 25  # seconds
        return torch.tensor(math.nan)

    monkeypatch.setattr(sys, "stderr", io.StringIO())  # no terminal, which would look more often
    monkeypatch.setattr(train, "train_step", slow_step)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    ended = outcome(f"{QUICK} -b 1 --output run")
    assert ended.startswith("UserError: by step 3, at lr ")

@pytest.mark.parametrize(("error", "remedy"), [
    ("DataLoader worker (pid 7) is killed",
     "try fewer --workers, or 0, or in Docker a larger --shm-size"),
    ("DefaultCPUAllocator: can't allocate memory",
     "give a --batch-size below 7: eight times as many are read at once")])
def test_errors_of_an_evaluation_have_a_remedy(pretrained, monkeypatch, error, remedy):
    monkeypatch.setattr(train, "evaluate", Mock(side_effect=RuntimeError(error)))
    assert outcome(f"--eval-only {pretrained} --batch-size 7") == f"UserError: {error}; {remedy}"

def test_a_resumed_run_has_remedies_that_it_accepts(quick_run, monkeypatch):
    assert outcome_with(interrupt, quick_run, 2) == "130"
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", Mock(side_effect=RuntimeError("out of memory")))
        assert "out of memory; give a larger --accumulate, " in outcome("--resume run")
    monkeypatch.setattr(train, "train_step", lambda *_: torch.tensor(math.nan))
    assert "--clip-grad 1 in a new run, with --init-from" in outcome("--resume run")

@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="needs a patch there")
def test_too_little_shared_memory_ends_the_run(small, monkeypatch):
    """PyTorch's queue of batches would print the error and wait for ever."""
    error = RuntimeError("unable to allocate shared memory(shm) for file </torch_7>")
    monkeypatch.setattr(torch.Tensor, "share_memory_", Mock(side_effect=error))
    ended = outcome(f"{QUICK} -j 1 --output run")
    assert ended.startswith(f"UserError: RuntimeError: {error}; try fewer --workers, or 0")

def test_a_disk_without_locks(small, monkeypatch):
    no_locks = Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr(train.FileLock, "acquire", no_locks)
    ended = outcome(f"{QUICK} --output run")
    assert ended.startswith("UserError: cannot lock run (") and "on a disk with locks" in ended

@pytest.mark.parametrize(("error", "remedy"), [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
     "give a smaller --batch-size, or a larger --accumulate"),
    (MemoryError("Unable to allocate 9 GiB"), "give a smaller --batch-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed"), "try fewer --workers"),
    (torch._dynamo.exc.BackendCompilerFailed(print, ValueError("no cl.exe"), None),
     "leave out --compile")], ids=["memory", "MemoryError", "worker", "compiler"])
def test_known_errors_have_a_remedy(small, monkeypatch, error, remedy):
    """While the network is built, and in a step."""
    monkeypatch.setattr(nn.Module, "compile", lambda model: None)
    for function in ("fan_in_init", "train_step"):
        with monkeypatch.context() as patch:
            patch.setattr(train, function, Mock(side_effect=error))
            ended = outcome(f"{QUICK} --compile --output run")
        assert ended.startswith("UserError: ") and remedy in ended and "\n" not in ended

def test_batch_norm_of_single_values_has_a_remedy(small):
    line = "--road ResNet-50 --width 8 --patch-size 4 -b 1 --device cpu --amp off -j 0"
    ended = outcome(f"{line} --dataset synthetic --output run")
    assert re.match("UserError: Expected more than 1 value per channel.*larger --batch-size", ended)

def test_an_error_of_two_lines_keeps_its_reason():
    with pytest.raises(RuntimeError) as error:
        nn.Linear(2, 1).load_state_dict(nn.Linear(3, 1).state_dict())
    assert "Linear: size mismatch for weight" in train.first_line(error.value)

def test_unknown_errors_keep_their_traceback(small, monkeypatch):
    monkeypatch.setattr(train, "train_step", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        outcome(f"{QUICK} --output run")

def test_a_run_in_a_thread(small):
    """Where no signals can be caught."""
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(outcome, f"{QUICK} --epochs 1 --output run").result()
    assert ended == "0"

def run_as_script(line, monkeypatch):
    """The exit code of `python train.py` and a notebook's %run, but in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(line)])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    # what tune_backends changes would last
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    monkeypatch.setattr("ctypes.CDLL", Mock())
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(HERE / "train.py"), run_name="__main__")
    return ended.value.code

def test_a_mistake_is_one_line_and_exit_code_1(small, monkeypatch):
    """A text as exit code is printed, and the code is 1."""
    Path("file").touch()
    code = run_as_script("--output file/run --dataset synthetic", monkeypatch)
    assert re.fullmatch("train.py: error: cannot make the folder file/run .*", code)

def test_a_system_without_two_of_the_signals(small, monkeypatch):
    """Windows."""
    for name in ("SIGUSR1", "SIGHUP"):
        monkeypatch.delattr(signal, name, raising=False)
    monkeypatch.setattr(signal, "Signals", [signal.SIGINT, signal.SIGTERM])
    make_folder("data", images=1)
    assert run_as_script(f"{FOLDER} --output run", monkeypatch) == 0
    assert Path("run/weights.safetensors").exists()

def test_runs_without_output_get_folders_of_their_own(small, monkeypatch):
    """Even if they start in the same second."""
    monkeypatch.setattr(train.time, "strftime", lambda _: "now-")
    recipe = train.Recipe(road="stage ratio")
    folders = [Path(train.new_folder(recipe)) for _ in range(3)]
    names = ("now-stage-ratio", "now-stage-ratio-2", "now-stage-ratio-3")
    assert folders == [Path("runs", name) for name in names]
    shutil.rmtree("runs")
    Path("runs").touch()
    with pytest.raises(train.UserError, match="cannot make the folder runs"):
        train.new_folder(recipe)

@pytest.mark.parametrize(("source", "function", "error"), [
    ("timm:convnext_tiny", "timm.create_model", Exception("Unknown model")),
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

# --- Beside the other tests -------------------------------------------------------------

def executed_notebook():
    """The notebook after a run from a clean kernel, without CIFAR-10 and with a short training.
    The solutions of its exercises stand in the cells that check them."""
    notebook = nbformat.read(HERE / "walkthrough.ipynb", as_version=4)
    for before, cell in itertools.pairwise(notebook.cells):
        solution = re.search(r"<summary>Solutions?</summary>\s+```python([^`]*)```",
                             before.source)
        if solution:
            checks = [f"assert {call}" for call
                      in re.findall(r"(?m:^check\(\w+\))", cell.source)]
            cell.source += solution[1] + "\n".join(checks)
    training, = [cell for cell in notebook.cells if "SIZE, STEPS = 24, 250" in cell.source]
    training.source = training.source.replace("24, 250", "24, 3").replace("1000", "100")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("CIFAR10_FOLDER", None)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": HERE}})
    return client.execute(env=environment)

def printing_runs(folder):
    """Four runs, one after another, that print to closed streams, to a pipe that nobody reads, to
    an ASCII terminal and to a full disk."""
    make_folder(folder / "data", ("ünï 😀", "b"), images=1)
    line = f"{shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'train.py'))}"
    line += f" {SMALLEST} --dataset folder -b 2 --epochs 1"
    all_streams = {"closed": ">&- 2>&-", "unread": "| true", "ascii": ""}
    if os.path.exists("/dev/full"):
        all_streams["full"] = ">/dev/full 2>/dev/full"
    lines = [f"({line} --output {name}; echo $? >{name}.code) {streams}"
             for name, streams in all_streams.items()]
    ended = subprocess.run(
        ["sh", "-c", "; ".join(lines)], check=True, cwd=folder, text=True, capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"})
    return ended, [folder / name for name in all_streams]

@pytest.fixture(scope="session", autouse=True)
def beside(request, tmp_path_factory):
    """What two of the tests run in other processes begins before the first test, since it takes
    long. One goes on after the other, so they need one core alone. Nothing is run for a test that
    is not selected."""
    selected = {item.name for item in request.session.items}
    torch.set_num_threads(1)  # the other core is theirs
    begun = {}
    with ThreadPoolExecutor(max_workers=1) as pool:
        if "test_printing_ends_no_run" in selected and os.name == "posix":
            folder = tmp_path_factory.mktemp("printing")
            begun["printing"] = pool.submit(printing_runs, folder)
        if "test_notebook" in selected:
            begun["notebook"] = pool.submit(executed_notebook)
        yield begun

@posix
def test_printing_ends_no_run(beside):
    ended, folders = beside["printing"].result()
    for folder in folders:
        assert folder.with_suffix(".code").read_text() == "0\n"
        assert (folder / "weights.safetensors").exists()
    assert ended.stdout.count(r"(b, \xfcn\xef \U0001f600)") == 1  # by the run in ASCII alone
    assert "Traceback" not in ended.stderr

@pytest.mark.parametrize(("name", "answer", "said"), [
    ("layer_norm", lambda x, p: F.layer_norm(x, x.shape[-1:], p["weight"], p["bias"]),
     "add 1e-6"),
    ("layer_norm", lambda x, p: F.layer_norm(x, x.shape[3:], p["weight"], p["bias"], 1e-6),
     "normalized_shape"),
    ("batch_norm", lambda x, p: rearrange(F.batch_norm(
        rearrange(x, "b h w c -> b c h w"), None, None, p["weight"], p["bias"], True),
        "b c h w -> b h w c"), "values differ"),
    ("block", lambda x, p, mix, norm: x + p["layer_scale"]["gamma"] * F.linear(F.gelu(F.linear(
        F.layer_norm(mix(x, p["dwconv"]), [6], *p["norm"].values(), 1e-6),
        *p["mlp"]["pwconv1"].values())), *p["mlp"]["pwconv2"].values()), "values differ"),
    ("block", lambda x, p, mix, norm: x.add_(1), "changes its input"),
    ("drop_path", lambda x, rate: (torch.rand(len(x), 1, 1, 1) >= rate) / (1 - rate),
     "of the shape"),
    ("drop_path", lambda x, rate: ((torch.rand(len(x), 1, 1, 1) >= rate) / (1 - rate)
                                   ).expand(x.shape), "dropped and a part kept")],
    ids=by_text)
def test_the_notebooks_checks_refuse_wrong_answers(monkeypatch, capsys, name, answer, said):
    monkeypatch.syspath_prepend(HERE / "assets")
    from notebook_exercises import check

    answer.__name__ = name
    assert not check(answer)
    assert said in capsys.readouterr().out

def test_notebook(beside):
    """It was committed with its outputs and keeps to its limits; and it runs, and the solutions
    of its exercises are right."""
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
    executed = beside["notebook"].result()
    assert sum(cell.source.count("assert check(") for cell in executed.cells) == 16
