"""What is claimed, checked against someone else: timm, torchvision, PyTorch, published figures.

pytest test_convnext.py                       needs no network, no GPU and no data set
pytest test_convnext.py -m network            the published weights; downloads 230 MB
pytest test_convnext.py -k both_ways -rP      prints the largest difference of logits
"""

import argparse
import ast
import copy
import csv
import errno
import itertools
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
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
from huggingface_hub.errors import EntryNotFoundError
from nbclient import NotebookClient
from safetensors.torch import load_file, save_file
from torch import nn

import convnext
import train
from convnext import VARIANTS, create_convnext, export_state_dict, from_checkpoint, load_weights

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["plain", "fast"])
def speed_up(request, monkeypatch):
    """Make a model faster, on any CPU and for any type, or leave it as it is."""
    monkeypatch.setattr(convnext, "FAST_DTYPES", (torch.float32, torch.bfloat16, torch.float64))
    return convnext.speed_up if request.param == "fast" else lambda model: model


def meta(variant, **options):
    with torch.device("meta"):
        return create_convnext(variant, **options)


def randomise(model):
    """Draw every parameter at random, LayerScale too, at sizes that keep the signal's."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2 and p.shape != (len(p), 1, 1):  # torchvision's layer_scale is (c, 1, 1)
                p.normal_(std=p[0].numel() ** -0.5)
            elif name.endswith("bias"):
                p.normal_(std=0.1)
            else:
                p.uniform_(0.2, 1)
    return model.eval()


def four_blocks(num_classes=10):
    """A small network with every kind of layer."""
    return randomise(
        convnext.ConvNeXt((1, 1, 1, 1), (8, 16, 24, 32), num_classes=num_classes, grn=True))


def gradients(network, x):
    """The gradient of each parameter, by the name it has in the plain network."""
    network.zero_grad()
    network(x).square().sum().backward()
    return {name.removeprefix("_orig_mod."): p.grad for name, p in network.named_parameters()}


# --- The architecture ---------------------------------------------------------------------------


PARAMETERS = dict(zip(VARIANTS, (
    3_695_520, 5_217_784, 9_045_672, 15_593_560,
    28_589_128, 50_223_688, 88_591_464, 197_767_336, 350_196_968,
    3_708_400, 5_233_240, 9_066_280, 15_623_800,
    28_635_496, 88_717_800, 197_956_840, 660_289_640)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_size_and_cost(variant):
    model, published = meta(variant), VARIANTS[variant].gflops
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[variant]
    rounded = 0.0051 if published < 3 else 0.051 if published < 100 else 0.51  # as in print
    assert abs(convnext.count_macs(model, 224) / 1e9 - published) <= rounded


@pytest.mark.parametrize(("patch_size", "mmacs"), [(4, 11.2), (2, 44.3), (1, 176.8)])
def test_cost_at_32_pixels(patch_size, mmacs):
    """Against layer-by-layer arithmetic: (49·C + 8·C²)·positions per block, and so on."""
    depths, dims, *_ = VARIANTS["atto"]
    side = 32 // patch_size
    total = 3 * patch_size**2 * dims[0] * side**2
    for stage, (depth, dim) in enumerate(zip(depths, dims)):
        if stage:
            side //= 2
            total += 4 * dims[stage - 1] * dim * side**2
        total += depth * (49 * dim + 8 * dim**2) * side**2
    total += dims[-1] * 10
    assert convnext.count_macs(meta("atto", num_classes=10, patch_size=patch_size), 32) == total
    assert round(total / 1e6, 1) == mmacs


def peer(library, variant, num_classes=1000):
    """The library's network, on the meta device; None if it has none of this variant."""
    depths, dims, _, v2 = VARIANTS[variant]
    name = variant.removeprefix("v2_")
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(f"convnext{'v2' * v2}_{name}", num_classes=num_classes)
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_function_both_ways(variant):
    """From us to each library and back again: the same logits, and the same parameters."""
    model = randomise(meta(variant).to_empty(device="cpu"))
    again = meta(variant).to_empty(device="cpu")
    x = torch.randn(1, 3, 70, 97)
    expected = logits_of(model, x)
    assert expected.std() > 0.1
    for library in ("timm", "torchvision", "huggingface", "meta"):
        # The authors' code is no package; timm reads their files.
        network = peer("timm" if library == "meta" else library, variant)
        if network is None:
            continue
        exported = export_state_dict(model, library)
        state = exported
        if library == "meta":
            state = timm.models.convnext.checkpoint_filter_fn({"model": exported}, network)
        network.load_state_dict(state, strict=True, assign=True)  # shares the memory
        logits = logits_of(network, x)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        print(f"{variant:9} {library:12} {(logits - expected).abs().max().item():.1e}")
        tensors, layout, _ = convnext.read_weights(
            exported if library == "meta" else network.state_dict())
        assert layout == library
        for name, parameter in model.named_parameters():  # came back to where it had been
            assert tensors.pop(name).data_ptr() == parameter.data_ptr(), name
        assert not tensors
    report = load_weights(again, exported)
    assert not report.kept and not report.left_out
    assert all(map(torch.equal, again.parameters(), model.parameters()))


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
                gradient = expected.pop(convnext.name_map(library)[name]).reshape(p.shape)
                torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-4)
            assert not expected


def test_pyramid_is_timms():
    peer = randomise(timm.create_model("convnext_atto"))
    model = create_convnext("atto").eval()
    load_weights(model, peer.state_dict())
    x = torch.randn(1, 3, 96, 64)
    maps = model.forward_pyramid(x)
    assert [tuple(m.shape) for m in maps] == [
        (1, 40, 24, 16), (1, 80, 12, 8), (1, 160, 6, 4), (1, 320, 3, 2)]
    torch.testing.assert_close(maps, peer.forward_intermediates(x, intermediates_only=True),
                               atol=1e-5, rtol=1e-5)
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
    narrow = x.bfloat16()  # the parameters' small steps must not be rounded away
    torch.testing.assert_close(grn(narrow), peer(narrow.float()))
    assert torch.autograd.gradcheck(grn.double(), x[:1, :2, :2].double().requires_grad_())
    large = torch.rand(1, 56, 56, 12) * 1000 + 1000  # a sum of squares of 7e9, a norm of 84,000
    y = grn.half()(large.half())
    assert y.isfinite().all()
    torch.testing.assert_close(y.float(), peer(large), rtol=1e-2, atol=20)


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
            assert p.std().item() == pytest.approx(0.02, rel=0.1) and p.mean().abs() < 1e-3, name
        else:
            value = 1e-6 if name.endswith("gamma") else float(name.endswith("weight"))
            assert torch.equal(p, torch.full_like(p, value)), name


@pytest.mark.parametrize(("size", "channels", "patch_size"), [
    ((32, 32), 3, 4), ((33, 47), 3, 4), ((16, 21), 1, 2), ((8, 8), 5, 1)])
def test_any_size_layout_and_type(size, channels, patch_size):
    model = randomise(
        create_convnext("atto", num_classes=7, in_channels=channels, patch_size=patch_size))
    x = torch.randn(1, channels, *size)
    expected = model(x)
    assert expected.shape == (1, 7)
    strided = torch.randn(1, *size, channels * 2)[..., ::2].permute(0, 3, 1, 2).copy_(x)
    for same in (x.contiguous(memory_format=torch.channels_last), strided):
        torch.testing.assert_close(model(same), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x) - expected).abs().max() < 0.1 * expected.std() + 0.1
    assert (model.bfloat16()(x.bfloat16()) - expected).abs().max() < 0.1 * expected.std() + 0.1


def test_bad_input_to_the_model_is_named():
    model = create_convnext("atto")
    for shape in ((1, 3, 31, 64), (1, 4, 64, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match=r"\(b, 3, h, w\) with h and w 32 or more"):
            model(torch.zeros(shape))
    for variant, options, message in (
            ("atto", {"drop_path": 1.0}, "at least 0 and below 1, not 1.0"),
            ("atto", {"drop_path": -0.1}, "at least 0 and below 1"),
            ("atto", {"patch_size": 0}, "patch_size must be 1 or more"),
            ("teeny", {}, "'teeny'; choose one of atto, femto, pico, nano, tiny")):
        with pytest.raises(ValueError, match=message):
            create_convnext(variant, **options)


def test_a_stem_replaced_by_hand_is_checked_itself():
    model = randomise(create_convnext("atto"))
    stem = model.downsample_layers[0][0] = nn.Conv2d(1, 40, 3, padding=1)
    x = torch.randn(1, 1, 9, 8)
    torch.testing.assert_close(model.forward_pyramid(x)[0], model.stages[0](
        model.downsample_layers[0][1](F.conv2d(x, stem.weight, stem.bias, padding=1))))
    for wrong in (torch.zeros(1, 1, 7, 9), torch.zeros(1, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"\(b, 1, h, w\) with h and w 8 or more"):
            model(wrong)


def test_fold_layer_scale_keeps_the_function():
    model = randomise(create_convnext("atto", num_classes=10))
    x = torch.randn(2, 3, 64, 64)
    expected = logits_of(model, x)
    folded = convnext.fold_layer_scale(model)
    assert not any(name.endswith("gamma") for name, _ in model.named_parameters())
    torch.testing.assert_close(logits_of(folded, x), expected, atol=1e-6, rtol=1e-5)


def test_road_costs_what_the_paper_prints():
    """Each step from torchvision's ResNet-50 to ConvNeXt-Tiny, in the table that is printed."""
    misprinted = {"LayerNorm": "4.15", "separate downsampling": "4.46"}  # see ROADMAP
    run = subprocess.run([sys.executable, HERE / "convnext.py", "--road"], capture_output=True,
                         text=True, check=True)
    lines = run.stdout.splitlines()[1:]
    assert len(lines) == len(convnext.ROADMAP) == 16
    for line, step, before in zip(lines, convnext.ROADMAP, (None, *convnext.ROADMAP)):
        gain, counted = step.top1 - (before.top1 if before else 76.13), f"{step.gflops:.2f}"
        columns = [f"{step.top1:.2f}", f"{gain:+.2f}", counted, misprinted.get(step.name, counted)]
        assert line.split() == step.name.split() + columns + ["misprinted"] * (
            step.name in misprinted)


def test_road_leads_from_torchvisions_resnet_50_to_convnext_tiny():
    (_, first), *_, (_, last) = convnext.roadmap()
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


def test_the_table_of_variants():
    run = subprocess.run([sys.executable, HERE / "convnext.py"], capture_output=True, text=True,
                         check=True)
    for line, (variant, count) in zip(run.stdout.splitlines()[1:], PARAMETERS.items(), strict=True):
        assert line.startswith(variant) and f" {count:,} " in line
        assert line.endswith(f" {VARIANTS[variant].gflops}")


# --- Faster, and in every tool ------------------------------------------------------------------


@pytest.mark.parametrize("told", [
    {}, {"dilation": (2, 2), "padding": (6, 6)}, {"dilation": (1, 2)}, {"stride": (2, 1)},
    {"padding": (1, 2)}, {"padding": (0, 0), "stride": (2, 2)}, {"padding_mode": "circular"},
    {"padding_mode": "reflect"}], ids=str)
def test_layers_do_what_they_are_told(speed_up, told):
    """Settings changed by hand, before and after speed_up, against a convolution built so."""
    for layer, settings in ((convnext.DepthwiseConv(6), {"groups": 6, "padding": 3}),
                            (convnext.DepthwiseConv(6, 4), {"groups": 6, "padding": 2}),
                            (convnext.Patchify(6, 6, patch_size=3), {"stride": 3})):
        plain = nn.Conv2d(6, 6, layer.kernel_size, **settings | told).double()
        plain.load_state_dict(layer.double().state_dict())
        told_before, told_after = copy.deepcopy(layer), speed_up(layer)
        for changed in (told_before, told_after):
            for name, value in told.items():
                setattr(changed, name, value)
        for changed in (speed_up(told_before), told_after):
            for size in ((2, 6, 13, 17), (1, 6, 9, 12)):
                x = torch.randn(size, dtype=torch.double, requires_grad=True)
                y = changed(x)
                direction = torch.randn_like(y)
                slow = told or layer.kernel_size == (4, 4) or "Fast" not in type(layer).__name__
                assert ("Convolution" in y.grad_fn.name()) == bool(slow)
                torch.testing.assert_close(y, plain(x))
                torch.testing.assert_close(*(
                    torch.autograd.grad(network(x), (x, *network.parameters()), direction)
                    for network in (changed, plain)))
                with torch.no_grad():
                    torch.testing.assert_close(changed(x), y)


@pytest.mark.parametrize("when", ["before speed_up", "after it"])
def test_training_is_evaluation_whatever_is_edited(speed_up, when, monkeypatch):
    model, x = four_blocks(), torch.randn(2, 3, 64, 64)
    usual = logits_of(model, x)

    def gated(mlp, x):
        h = mlp.pwconv1(x)
        return mlp.pwconv2(mlp.act(h) * h)

    def doubled(layer, x):
        return nn.Conv2d.forward(layer, 2 * x)

    for edited, forward in ((convnext.InvertedBottleneck, gated), (convnext.DepthwiseConv, doubled),
                            (convnext.Patchify, doubled)):
        with monkeypatch.context() as patch:
            changed = copy.deepcopy(model) if when == "before speed_up" else speed_up(
                copy.deepcopy(model))
            patch.setattr(edited, "forward", forward)
            logits = speed_up(changed).train()(x)
            assert logits.requires_grad and (logits - usual).abs().max() > 0.1 * usual.std()
            torch.testing.assert_close(logits_of(changed, x), logits.detach())


@pytest.mark.parametrize("size", [(1, 2, 1, 1, 7), (2, 3, 5, 4, 7), (3, 2, 2, 9, 3)])
def test_depthwise_gradient_is_the_derivative(size):
    b, c, h, w, k = size
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True)
              for shape in ((b, c, h, w), (c, 1, k, k), (c,))]
    function = convnext.DepthwiseGradient.apply
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(3, 5, 8, 8), (64, 96, 16, 16), (2, 40, 2, 30), (9, 16, 1, 1)])
def test_depthwise_gradient_is_pytorchs(size, dtype, monkeypatch):
    """As near to the derivative in double precision as PyTorch's own is, in three layouts."""
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
        for ours, pytorchs, truth in zip(derivatives(fast, x), derivatives(plain, x), exact):
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
    expected, parameters = gradients(model, x), dict(speed_up(model).named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    torch.testing.assert_close({name: g.sum(0) for name, g in each.items()}, expected)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    slopes = [torch.func.jvp(lambda p, image=image: loss(p, image), (parameters,), (tangents,))[1]
              for image in x]
    torch.testing.assert_close(
        sum(slopes), sum((expected[name] * tangent).sum() for name, tangent in tangents.items()))


def any_size():
    dim = torch.export.Dim
    return ({0: dim("batch"), 2: dim("height", min=64), 3: dim("width", min=64)},)


@pytest.mark.filterwarnings("ignore")  # about tracing, which PyTorch gives up
def test_copies_and_exports_with_any_size(speed_up):
    """With gradients on, as in somebody's script."""
    model, images = four_blocks(), (torch.randn(2, 3, 64, 96), torch.randn(3, 3, 101, 70))
    expected, parameters, calls = [model(x) for x in images], dict(model.named_parameters()), []
    hook = model.stages[1][0].dwconv.register_forward_hook(lambda *_: calls.append(1))
    assert speed_up(model) is model
    model(images[0])
    hook.remove()
    assert calls and all(p is parameters.pop(name) for name, p in model.named_parameters())
    again = four_blocks()
    again.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))
    exported = torch.export.export(model, (images[0],), dynamic_shapes=any_size()).module()
    for network in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), speed_up(again),
                    exported, torch.jit.trace(model, images[0])):
        for x, logits in zip(images, expected):
            torch.testing.assert_close(network(x), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_onnx_export_with_any_size(speed_up):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx.reference")
    model, x = speed_up(four_blocks()), torch.randn(3, 3, 101, 70)
    program = torch.onnx.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=any_size(),
                                dynamo=True, verbose=False)
    logits, = onnx.ReferenceEvaluator(program.model_proto).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), logits_of(model, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrap", [
    nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile,
    lambda model: nn.DataParallel(torch.compile(model))])
def test_wrapped_models_are_unwrapped_everywhere(wrap):
    wrapped, other = wrap(randomise(create_convnext("atto"))), wrap(create_convnext("atto"))
    model = next(m for m in wrapped.modules() if isinstance(m, convnext.ConvNeXt))
    for layout in convnext.LAYOUTS:
        torch.testing.assert_close(
            export_state_dict(wrapped, layout), export_state_dict(model, layout), rtol=0, atol=0)
    report = load_weights(other, wrapped.state_dict())
    assert not report.kept and not report.left_out
    torch.testing.assert_close(export_state_dict(other, "native"), dict(model.state_dict()))
    assert convnext.speed_up(wrapped) is wrapped
    assert sum(isinstance(m, convnext.FastDepthwiseConv) for m in model.modules()) == 12
    for stranger in (peer("timm", "atto"), wrap(nn.Linear(1, 1)), "atto"):
        for function in (export_state_dict, load_weights):
            with pytest.raises(TypeError, match="expected a ConvNeXt, not a"):
                function(stranger, "timm")


# --- Weights ------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_weights_are_loaded_whole_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = randomise(create_convnext("atto", num_classes=5))
    exported = export_state_dict(model, "timm")
    torch.save(exported, "timm.pth")
    save_file({name: tensor.contiguous() for name, tensor in exported.items()}, "timm.safetensors")
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    for path in ("timm.pth", "timm.safetensors"):
        assert torch.equal(from_checkpoint(path)(x), before)
    missing = {k: v for k, v in exported.items() if k != "stages.2.blocks.3.gamma"}
    for weights, message in (
            (missing, r"2.3.layer_scale.gamma \(missing in the source, \(160,\) in the model\)$"),
            (exported | {"extra": torch.zeros(1)}, r"extra \(\(1,\) in .*, missing in the model\)"),
            (exported | {"head.norm.bias": torch.zeros(7)}, r"head.norm.bias \(\(7,\) .* \(320,\)"),
            (peer("timm", "femto").state_dict(), r"layers.0.1.weight \(\(48,\) .* more$"),
            (peer("timm", "v2_atto").state_dict(), "gamma .*missing .*, and 33 more$")):
        with pytest.raises(ValueError, match=message):
            load_weights(model, weights)
    assert torch.equal(model(x), before)
    for odd in ({"head.fc.weight": torch.zeros(320)}, {"head.fc.weight": torch.zeros(5, 319)},
                {"head.fc.weight": torch.tensor(1.0)},
                {"head.fc.weight": torch.zeros(5, 320, dtype=torch.int8)},
                {"stem.0.weight": torch.zeros(40, 3, 4, 2)}, {"stem.0.weight": torch.zeros(40)},
                {"stages.0.blocks.0.conv_dw.weight": torch.tensor(1.0)},
                {"stages.0.blocks.0.gamma": torch.tensor(1.0)}):
        with pytest.raises(ValueError, match="do not fit the model|four axes"):
            from_checkpoint(exported | odd)
    with pytest.raises(TypeError, match="a state dict or a file, not a ConvNeXt"):
        load_weights(model, model)
    with pytest.raises(ValueError, match="unknown layout 'keras'; choose one of native, meta, tim"):
        export_state_dict(model, "keras")


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_unreadable_files_give_one_line_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, state = four_blocks(), four_blocks().state_dict()
    torch.save(state, "whole.pth")
    save_file(state, "whole.safetensors")
    whole = Path("whole.pth").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 114374272\n"
    for path, content, reason in (
            ("number.pth", state | {"accuracy": np.float64(1)}, "GLOBAL numpy.*multiarray.scalar"),
            ("path.pth", state | {"data": Path("x")}, "GLOBAL pathlib.*PosixPath"),
            ("model.pth", model, "GLOBAL convnext.ConvNeXt"), ("list.pth", [1], "it holds a list"),
            ("script.pth", torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1)), "TorchScript"),
            ("evil.pth", {"stem.0.weight": Malicious()}, "GLOBAL posix.system"),
            ("pointer.pth", pointer, "begins with b'version https://git-lfs"),
            ("pointer.safetensors", pointer, "header too large"),
            ("page.bin", b"<!DOCTYPE html>\n", "begins with b'<!DOCTYPE html>"),
            ("empty.pth", b"", "begins with b''"), ("cut.pth", whole[:-5000], "zip archive"),
            ("flipped.pth", bytes(flipped), "checksum"),
            ("cut.safetensors", Path("whole.safetensors").read_bytes()[:-8], "not fully covered"),
            ("folder.pth", None, "directory"), ("folder.safetensors", None, "."),
            ("locked.pth", whole, "Permission denied")):
        if content is None:
            Path(path).mkdir()
        elif isinstance(content, bytes):
            Path(path).write_bytes(content)
        else:
            (content.save if "script" in path else lambda p, c=content: torch.save(c, p))(path)
        if path == "locked.pth":
            Path(path).chmod(0)
            if os.access(path, os.R_OK):  # the superuser reads everything
                continue
        with pytest.raises(ValueError, match=f"cannot read {path}: .*{reason}") as raised:
            from_checkpoint(path)
        assert "\n" not in str(raised.value) and "weights_only` set to" not in str(raised.value)
    assert not Path("executed").exists()
    with pytest.raises(FileNotFoundError):
        from_checkpoint("none.pth")


def test_wrapped_and_prefixed_weights(tmp_path):
    """As the libraries' training programs write them; found by a rule, not by a list."""
    model = randomise(create_convnext("v2_atto", num_classes=5))
    x = torch.randn(1, 3, 32, 32)
    meta_, hugging, timms, native = (
        export_state_dict(model, layout) for layout in ("meta", "huggingface", "timm", "native"))
    other = {name: torch.zeros_like(tensor) for name, tensor in timms.items()}
    criterion = {"criterion.weight": torch.ones(5)}

    def prefixed(prefix, tensors):
        return {prefix + name: tensor for name, tensor in tensors.items()}

    for content in (
            {"model": meta_, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=1)},
            {"model": other, "model_ema": timms}, {"state_dict": other, "state_dict_ema": timms},
            {"model_ema": prefixed("module.", timms) | {"n_averaged": torch.tensor(7)}},
            prefixed("_orig_mod.", native), prefixed("module._orig_mod.", hugging),
            {"model_state_dict": meta_, "epoch": 3}, {"net": native}, prefixed("encoder.", meta_),
            prefixed("visual.trunk.", timms) | {"text.weight": torch.ones(2), "logit_scale": 1.0},
            {"state_dict": prefixed("model.", timms) | criterion, "hyper_parameters": {"lr": 1}},
            prefixed("convnext.", timms) | criterion, prefixed("model.", hugging) | criterion,
            prefixed("net.", other) | prefixed("net_ema.", native),
            {name: t.flatten(1) if t.ndim == 4 and t.shape[2:] == (1, 1) else t
             for name, t in timms.items()},  # timm's linear layers
            {name: t.reshape(1, -1) if "grn" in name else t for name, t in meta_.items()},
            {"model": other, "ema": native, "args": {}, "classes": [], "mean": [], "std": []}):
        torch.save(content, tmp_path / "file.pth")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing was left out
            assert torch.equal(from_checkpoint(tmp_path / "file.pth")(x), model(x))
    with pytest.raises(ValueError, match="several networks, teacher.module., student.: "):
        from_checkpoint({"student": timms, "teacher": prefixed("module.", meta_)})
    dense = prefixed("backbone.", meta_ | {"norm0.weight": torch.ones(40)})
    with pytest.raises(ValueError, match=r"fit the model: norm0.weight \(\(40,\) in the source, m"):
        load_weights(model, dense | {"decode_head.weight": torch.ones(1)})


def test_a_backbone_another_head_another_stem():
    model = randomise(create_convnext("v2_atto", num_classes=5))
    full = export_state_dict(model, "meta")
    fcmae = {name: t for name, t in full.items() if not name.startswith(("norm.", "head."))}
    headless = create_convnext("v2_atto", num_classes=0)
    with pytest.warns(UserWarning, match="left out: head.fc.weight, head.fc.bias"):
        load_weights(headless, model.state_dict())
    base = export_state_dict(headless, "huggingface")
    with torch.device("meta"):
        transformers.ConvNextV2Model(transformers.ConvNextV2Config(
            depths=[2, 2, 6, 2], hidden_sizes=[40, 80, 160, 320])).load_state_dict(
                base, assign=True)
    stem, norm, head = ([f"{module}.weight", f"{module}.bias"] for module in (
        "downsample_layers.0.0", "head.norm", "head.fc"))
    for weights, classes, patch_size, kept, left_out in (
            (fcmae, 5, 4, norm + head, []), (base, 5, 4, head, []), (full, 7, 4, head, []),
            (full, 5, 2, stem, []), (full, 0, 4, [], head)):
        fresh = create_convnext("v2_atto", num_classes=classes, patch_size=patch_size,
                                head_init_scale=0.001)
        before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
        with pytest.warns(UserWarning, match="the model kept its own"):
            report = load_weights(fresh, weights)
        assert [line.split()[0] for line in report.kept] == kept and report.left_out == left_out
        assert sorted(report.loaded + kept) == sorted(before)
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(tensor, (before if name in kept else model.state_dict())[name]), name
    with pytest.raises(ValueError, match="do not fit the model: head.fc.weight"):
        load_weights(create_convnext("v2_atto", num_classes=7), full, strict=True)
    features = model.forward_features(x := torch.randn(1, 3, 32, 32)).mean((2, 3))
    with pytest.warns(UserWarning, match="head.norm.weight .missing in the source"):
        headless = from_checkpoint(fcmae)
    torch.testing.assert_close(headless(x), F.layer_norm(features, [320], eps=1e-6))
    torch.testing.assert_close(from_checkpoint(base)(x), model.head.norm(features))


@pytest.mark.parametrize(("variant", "options"), [
    ("femto", {}), ("v2_nano", {"num_classes": 21_841}), ("small", {"num_classes": 0}),
    ("atto", {"num_classes": 1, "in_channels": 1, "patch_size": 2}),
    ("tiny", {"layer_scale": 0.0, "patch_size": 1})])
@pytest.mark.parametrize("layout", convnext.LAYOUTS)
def test_from_checkpoint_infers_the_network(variant, options, layout):
    model = meta(variant, **options)
    if layout == "torchvision" and (variant.startswith("v2") or options.get("layer_scale") == 0):
        with pytest.raises(ValueError, match="torchvision has no ConvNeXt"):
            export_state_dict(model, layout)
        return
    weights = convnext.read_weights(export_state_dict(model, layout))
    expected = {"num_classes": 1000, "in_channels": 3, "patch_size": 4, "variant": variant,
                "layer_scale": 0.0 if variant.startswith("v2") else 1e-6}
    assert convnext.infer_architecture(weights) == expected | options


@pytest.mark.parametrize(("name", "message"), [
    ("convnext_atto_ols", r"layers.0.0.weight \(\(24, 3, 3, 3\)"),
    ("convnext_nano_ols", r"layers.0.1.weight \(\(80, 80, 3, 3\)"),
    ("convnext_tiny_hnf", "norm_pre.weight"), ("convnext_large_mlp", "head.pre_logits.fc.weight"),
    ("convnext_zepto_rms", r"no variant has \(2, 2, 4, 2\) blocks of \(32, 64"),
    ("convnext_xxlarge", r"no variant has \(3, 4, 30, 3\) blocks of \(384, 768"),
    ("resnet18", r"no weights of a ConvNeXt \(\['conv1.weight', ")])
def test_other_networks_are_refused(name, message):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    with pytest.raises(ValueError, match=message):
        from_checkpoint(state)


def test_downloads(tmp_path, monkeypatch):
    """Each client is asked for the right file; what it brings is loaded."""
    monkeypatch.chdir(tmp_path)
    asked, model = [], randomise(create_convnext("atto"))
    torch.save(export_state_dict(model, "meta"), "file.bin")
    for variant, network in (("atto", model), ("v2_nano", create_convnext("v2_nano"))):
        exported = export_state_dict(network, "timm")
        save_file({name: t.contiguous() for name, t in exported.items()}, f"{variant}.safetensors")

    def fetch(repo_id, filename, **_):
        asked.append((repo_id, filename))
        if repo_id == "nobody/offline":
            raise OSError("no route")
        if filename == "model.safetensors" and repo_id == "old/model":
            raise EntryNotFoundError("404")
        variant = "v2_nano" if "nano" in repo_id else "atto"
        return "file.bin" if filename.endswith("bin") else f"{variant}.safetensors"

    def urlopen(request):
        asked.append((request.full_url, ""))
        name = "page.html" if "blob" in request.full_url else "file.bin"
        return urllib.request.urlopen(Path(name).absolute().as_uri())

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", fetch)
    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    x = torch.randn(1, 3, 32, 32)
    for source, *requests in (
            ("timm:convnext_atto", ("timm/convnext_atto.d2_in1k", "model.safetensors")),
            ("hf:facebook/convnext", ("facebook/convnext", "model.safetensors")),
            ("hf:old/model", ("old/model", "model.safetensors"),
             ("old/model", "pytorch_model.bin")),
            ("https://host/a/file.bin?x=1", ("https://host/a/file.bin?x=1", "")),
            ("https://host/a/file.bin?x=1",),  # fetched only once
            ("https://host/b/file.bin?x=1", ("https://host/b/file.bin?x=1", ""))):
        assert torch.equal(from_checkpoint(source)(x), model(x))
        assert asked == requests
        asked.clear()
    for name, size, crop_pct in (("convnext_atto.d2_in1k", 224, 0.875),
                                 ("convnextv2_nano.fcmae_ft_in22k_in1k_384", 384, None)):  # squash
        assert convnext.read_weights(f"timm:{name}").settings == {
            "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "img_size": size,
            "crop_pct": crop_pct}
    Path("page.html").write_text("<!DOCTYPE html>")
    for source, error, message in (
            ("timm:convnext_teeny", RuntimeError, "Unknown model"),
            ("timm:convnextv2_small", RuntimeError, "No pretrained weights"),
            ("timm:convnext_tiny.no", RuntimeError, "Invalid pretrained tag"),
            ("hf:nobody/offline", OSError, "no route"),
            ("https://host/blob/file.bin", ValueError, "it begins with b'<!DOCTYPE html>'")):
        with pytest.raises(error, match=message):
            from_checkpoint(source)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a marker is declared in a configuration file or not at all
    network = pytest.mark.network


@network
@pytest.mark.parametrize(("source", "expected"), [
    ("timm:convnext_tiny.fb_in1k", [-0.0260, -0.4739, 0.1911]),
    ("hf:facebook/convnext-tiny-224", [-0.0260, -0.4739, 0.1911]),
    ("https://dl.fbaipublicfiles.com/convnext/convnext_tiny_1k_224_ema.pth",
     [-0.0260, -0.4739, 0.1911]),
    ("hf:facebook/convnextv2-tiny-1k-224", [0.9996, 0.1966, -0.4386])])
def test_published_weights_on_two_cats(source, expected, request, tmp_path):
    """The logits in transformers' tests and conversion programs; their resizing varies by 1e-3."""
    if "network" not in request.config.getoption("-m"):
        pytest.skip("needs a network: pytest -m network")
    path, _ = urllib.request.urlretrieve(
        "http://images.cocodataset.org/val2017/000000039769.jpg", tmp_path / "cats.jpg")
    cut = timm.data.create_transform(224, crop_pct=0.875, interpolation="bicubic")
    logits = logits_of(from_checkpoint(source), cut(PIL.Image.open(path).convert("RGB"))[None])
    assert logits.argmax() == 281  # tabby cat
    torch.testing.assert_close(logits[0, :3], torch.tensor(expected), atol=3e-3, rtol=0)


# --- The recipe ---------------------------------------------------------------------------------


def arguments(*argv):
    return train.parse_args(list(argv))[0]


def test_lr_is_pytorchs_warmup_and_cosine():
    total, warmup = 50, 10
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - 1 - warmup, eta_min=0.01)
    for step in range(total):
        expected = optimizer.param_groups[0]["lr"]
        if step == warmup:
            optimizer.param_groups[0]["lr"] = expected = 0.3
        assert train.lr_at(step, total, warmup, 0.3, 0.01) == pytest.approx(expected)
        optimizer.step()
        (rise if step < warmup - 1 else fall).step() if step != warmup - 1 else None
    assert train.lr_at(0, 1, 0, 0.3, 0.01) == 0.3


@pytest.mark.parametrize("variant", ["atto", "v2_atto"])
def test_weight_decay_groups_are_timms(variant):
    model = create_convnext(variant)
    ours = train.parameter_groups(model, 0.05)
    theirs = timm.optim.param_groups_weight_decay(model, 0.05)
    as_sets = [{(g["weight_decay"], frozenset(map(id, g["params"]))) for g in groups}
               for groups in (ours, theirs)]
    assert as_sets[0] == as_sets[1]


@pytest.mark.parametrize(("variant", "decay", "expected"), [
    # 0.8 ** (13 - i) for the authors' layers i: stem, first stage, second, 27 blocks by threes ...
    ("base", 0.8, (0.0550, 0.0687, 0.0859, 0.1074, 0.1342, 0.1678, 0.2097, 0.2621, 0.3277, 0.4096,
                   0.5120, 0.6400, 0.8, 1)),
    ("tiny", 0.7, tuple(0.7**i for i in range(7, -1, -1)))])
def test_layer_decay_is_the_authors(variant, decay, expected):
    model = meta(variant, num_classes=10)
    depths, scales = VARIANTS[variant].depths, {}
    for group in train.parameter_groups(model, 0.05, decay):
        scales |= {id(p): group["lr_scale"] for p in group["params"]}
    third = 3 + depths[2] // 3  # where the fourth stage begins
    parts = {"downsample_layers.0.": 0, "stages.0.": 1, "downsample_layers.1.": 2, "stages.1.": 2,
             "downsample_layers.2.": 3, "downsample_layers.3.": third, "stages.3.": third,
             "head.": third + 1}
    parts |= {f"stages.2.{b}.": 3 + b // 3 for b in range(depths[2])}
    assert len(expected) == third + 2
    for name, parameter in model.named_parameters():
        layer = next(layer for part, layer in parts.items() if name.startswith(part))
        assert scales[id(parameter)] == pytest.approx(expected[layer], abs=5e-5), name


def test_distillation_loss_is_hintons():
    ours, theirs = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    p, q = ((x / 3).softmax(1) for x in (theirs, ours))
    loss = train.distillation_loss(ours, theirs, 3.0)
    torch.testing.assert_close(loss, 9 * (p * (p / q).log()).sum() / 5)
    assert train.distillation_loss(theirs, theirs, 3.0) == 0
    gradient, = torch.autograd.grad(loss, ours)
    torch.testing.assert_close(gradient, 3 * (q - p) / 5)


@pytest.mark.parametrize(("size", "share", "mode"), [
    (224, 0.875, "center"), (288, 0.95, "center"), (384, 1.0, "squash"), (32, 1.0, "center")])
def test_evaluation_cut_is_timms(size, share, mode):
    picture = PIL.Image.effect_noise((500, 375), 80).convert("RGB")
    theirs = timm.data.create_transform(
        size, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1), crop_pct=share,
        crop_mode=mode)(picture)
    given = ("--crop-pct", str(share)) if share == 0.95 else ()
    ours = TF.pil_to_tensor(train.evaluation_cut(
        arguments("--img-size", str(size), *given))(picture))
    torch.testing.assert_close(ours / 255, theirs)


def test_crop_and_flip_are_torchvisions_for_each_sample():
    x = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    y = train.crop_and_flip(x, 2, 0.5)
    padded = TF.pad(x, [2], padding_mode="reflect")
    draws = []
    for before, after in zip(padded, y):
        crops = {(top, left): TF.crop(before, top, left, 8, 8)
                 for top in range(5) for left in range(5)}
        matches = [(*place, flip) for place, crop in crops.items() for flip in (False, True)
                   if torch.equal(after, TF.horizontal_flip(crop) if flip else crop)]
        assert len(matches) == 1
        draws += matches
    assert {d[0] for d in draws} == {d[1] for d in draws} == set(range(5))
    assert 16 < sum(d[2] for d in draws) < 48
    assert torch.equal(train.crop_and_flip(x, 0, 0.0), x)


def pillow_operation(name, strength):
    """What timm does to a Pillow image at `strength` of an operation's range."""
    factor, level = 1 + 0.9 * strength, 10 * abs(strength)
    warp = {"resample": PIL.Image.Resampling.BILINEAR, "fillcolor": (128, 128, 128)}
    k = 0.3 * strength  # timm shears about a corner, we about the centre: k * 16 pixels apart
    return {
        "auto_contrast": timm_ops.auto_contrast,
        "equalize": timm_ops.equalize,
        "invert": timm_ops.invert,
        "rotate": lambda i: timm_ops.rotate(i, 30 * strength, **warp),
        "posterize": lambda i: timm_ops.posterize(
            i, *timm_ops._posterize_increasing_level_to_arg(level, None)),
        "solarize": lambda i: timm_ops.solarize(
            i, *timm_ops._solarize_increasing_level_to_arg(level, None)),
        "solarize_add": lambda i: timm_ops.solarize_add(
            i, *timm_ops._solarize_add_level_to_arg(level, None)),
        "color": lambda i: timm_ops.color(i, factor),
        "contrast": lambda i: timm_ops.contrast(i, factor),
        "brightness": lambda i: timm_ops.brightness(i, factor),
        "sharpness": lambda i: timm_ops.sharpness(i, factor),
        "shear_x": lambda i: i.transform(
            i.size, PIL.Image.Transform.AFFINE, (1, k, -16 * k, 0, 1, 0), **warp),
        "shear_y": lambda i: i.transform(
            i.size, PIL.Image.Transform.AFFINE, (1, 0, 0, k, 1, -16 * k), **warp),
        "translate_x": lambda i: timm_ops.translate_x_rel(i, 0.45 * strength, **warp),
        "translate_y": lambda i: timm_ops.translate_y_rel(i, 0.45 * strength, **warp),
    }[name]


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


def test_rand_augment_draws_for_each_sample():
    x = torch.rand(1, 3, 16, 16).repeat(3000, 1, 1, 1)
    y = train.rand_augment(x.clone(), 9)
    untouched = (y == x).flatten(1).all(1).float().mean().item()
    assert 0.23 < untouched < 0.33  # both operations left out, 1/4, or without effect on this image
    assert len({tuple(image.flatten().tolist()) for image in y}) > 500


def test_random_erase():
    x = torch.zeros(4000, 1, 32, 32)
    y = train.random_erase(x.clone(), 0.25)
    erased = (y != 0).flatten(1).float().mean(1)
    assert 0.22 < (erased > 0).float().mean() < 0.28
    assert erased.max() < 0.36 and 0.15 < erased[erased > 0].mean() < 0.19
    noise = y[y != 0]
    assert abs(noise.mean()) < 0.02 and noise.std().item() == pytest.approx(1, abs=0.02)
    for image in y[erased > 0][:50, 0] != 0:  # a full rectangle
        rows, columns = image.any(1), image.any(0)
        assert torch.equal(image, rows[:, None] & columns)
    assert len({tuple(torch.nonzero(image)[0].tolist()) for image in y[erased > 0]}) > 100


@pytest.mark.parametrize(("ours", "theirs"), [(train.mixup, T.MixUp), (train.cutmix, T.CutMix)])
def test_mixing_is_torchvisions(ours, theirs):
    x, labels = torch.rand(6, 3, 16, 16), torch.arange(6)
    for draw in range(20):
        torch.manual_seed(draw)
        a, target_a = ours(x.clone(), F.one_hot(labels, 6).float(), 0.8)
        torch.manual_seed(draw)
        b, target_b = theirs(alpha=0.8, num_classes=6)(x.clone(), labels)
        torch.testing.assert_close((a, target_a), (b, target_b))


def test_statistics_are_the_data_sets():
    data = train.draw_shapes(300, 32, seed=3)
    mean, std = train.channel_statistics(data, 0)
    pixels = data.images.numpy() / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-5)


# --- The script ---------------------------------------------------------------------------------


QUICK = ("--variant", "atto", "--dataset", "synthetic", "--patch-size", "4", "--batch-size", "32",
         "--device", "cpu")


@pytest.fixture
def small_data(monkeypatch):
    draw = train.draw_shapes
    monkeypatch.setattr(
        train, "draw_shapes", lambda count, size, seed: draw(count // 50, size, seed))


def read_csv(path):
    with open(path) as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s", "data_share")}
                for row in csv.DictReader(file)]


def test_one_batch_is_learned_by_heart():
    data = train.draw_shapes(40, 32, seed=0)
    mean, std = train.channel_statistics(data, 0)
    x = train.normalize(data.images / 255, mean, std)
    model = create_convnext("atto", num_classes=10, patch_size=4)
    optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.05), lr=1e-3)
    for _ in range(80):
        loss = F.cross_entropy(model(x), data.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1


def at_call(number, function, action):
    """The function, but before its call of this number the action happens."""
    calls = itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == number:
            action()
        return function(*args, **kwargs)
    return wrapped


def assert_same_run(first, second):
    """All that was trained, and every row of the log but for its times."""
    states = [torch.load(f"{run}/last.pt", weights_only=True) for run in (first, second)]
    for part in ("model", "ema"):
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), name
    for index, moments in states[0]["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, states[1]["optimizer"]["state"][index][name])
    assert read_csv(f"{first}/metrics.csv") == read_csv(f"{second}/metrics.csv")


def test_a_signal_loses_nothing(tmp_path, monkeypatch, small_data, capsys):
    """Stopped in the middle of an epoch and resumed, a run ends as if it had never been stopped."""
    def stop(number):
        return lambda: signal.raise_signal(number)

    argv = [*QUICK, "--epochs", "4", "--val-size", "20", "--accumulate", "2", "--clip-grad", "1",
            "--batch-size", "16"]  # 5 steps an epoch
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert train.main([*argv, "--output", whole]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "augment", at_call(8, train.augment, stop(signal.SIGINT)))
        assert train.main([*argv, "--output", parts]) == 130
        assert f"--resume {parts}/last.pt" in capsys.readouterr().err
        assert torch.load(f"{parts}/last.pt", weights_only=True)["step"] == 8
        # during the evaluation it stops at once
        patch.setattr(train, "evaluate", at_call(2, train.evaluate, stop(signal.SIGTERM)))
        assert train.main(["--resume", f"{parts}/last.pt"]) == 143
        assert torch.load(f"{parts}/last.pt", weights_only=True)["step"] == 10
    Path(f"{parts}/last.pt.tmp").write_bytes(b"left by a killed run")
    torch.rand(7)  # the random state at the time does not matter
    assert train.main(["--resume", f"{parts}/last.pt"]) == 0
    assert not list(Path(parts).glob("*.tmp"))
    Path(f"{parts}/metrics.csv").unlink()  # as if killed before the last file was written
    assert train.main(["--resume", f"{parts}/last.pt"]) == 0
    assert_same_run(whole, parts)
    assert len(read_csv(f"{parts}/metrics.csv")) == 4


def test_changed_arguments_want_override(tmp_path, small_data, capsys):
    last = str(tmp_path / "last.pt")
    argv = [*QUICK, "--output", str(tmp_path)]
    assert train.main([*argv, "--epochs", "1"]) == 0
    for extra, message in (
        (["--lr", "0.5"], "add --override:\n  --lr: was 0.001, now 0.5"),
        (["--batch-size", "8", "--override"], "cannot go on with another --batch-size"),
        (["--val-size", "9"], "cannot go on with another --val-size"),
    ):
        with pytest.raises(SystemExit):
            train.main(["--resume", last, *extra])
        assert message in capsys.readouterr().err
    other = ["--epochs", "2", "--weight-decay", "0.5", "--override"]
    assert train.main(["--resume", last, *other]) == 0
    groups = torch.load(last, weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert "note: 1 -> 2 epochs: the learning rate, 1.0e-06 so far, goes on with" in (
        capsys.readouterr().err)
    assert [row["epoch"] for row in read_csv(tmp_path / "metrics.csv")] == ["1", "2"]
    with pytest.raises(SystemExit):
        train.main(["--resume", last, "--epochs", "1", "--override"])
    assert "--epochs: must be no less than have been trained" in capsys.readouterr().err


def test_a_full_disk_costs_no_checkpoint(tmp_path, monkeypatch, small_data, capsys):
    good = torch.save

    def full(state, path):
        Path(path).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_in_the_second_epoch(state, path):
        (full if len(state["history"]) == 2 else good)(state, path)

    monkeypatch.setattr(torch, "save", full_in_the_second_epoch)
    argv = [*QUICK, "--epochs", "3", "--output"]
    assert train.main([*argv, str(tmp_path / "a")]) == 0
    assert capsys.readouterr().err.count("warning: cannot write") == 1

    monkeypatch.setattr(torch, "save", at_call(2, good, lambda: monkeypatch.setattr(
        torch, "save", full)))
    with pytest.raises(train.UserError, match=r"could not write last.pt .* No space left"):
        train.main([*argv, str(tmp_path / "b")])
    assert capsys.readouterr().err.count("warning: cannot write") == 1
    assert len(train.read_checkpoint(tmp_path / "b" / "last.pt")["history"]) == 2
    assert not list((tmp_path / "b").glob("*.tmp"))


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch, small_data):
    def poison(args, data, x, labels, mix):
        x, y = augment(args, data, x, labels, mix)
        return (x * math.nan if next(steps) == 5 else x), y  # in the second epoch of three steps

    augment, steps = train.augment, itertools.count(1)
    monkeypatch.setattr(train, "augment", poison)
    with pytest.raises(train.UserError, match=r"the loss became nan by step 3 of epoch 2, at lr "
                                              r"\d.*, 2\.\d+ before: try"):
        train.main([*QUICK, "--epochs", "3", "--output", str(tmp_path)])
    state = train.read_checkpoint(tmp_path / "last.pt")
    assert state["step"] == 3 and all(p.isfinite().all() for p in state["model"].values())


@pytest.mark.parametrize("name", ["last.pt", "weights.safetensors"])
def test_no_damage_to_a_file_goes_unnoticed(name, tmp_path, small_data):
    """Bits flipped, a part cut off, overwritten or moved: refused, or the very same content."""
    assert train.main([*QUICK, "--epochs", "1", "--output", str(tmp_path)]) == 0
    whole, path = (tmp_path / name).read_bytes(), tmp_path / f"damaged-{name}"
    (tmp_path / name).rename(path)
    original = pickle.dumps(train.read_checkpoint(path))
    refused = 0
    for trial in range(60):
        path.write_bytes(damage(whole, random.Random(trial)))
        try:
            assert pickle.dumps(train.read_checkpoint(path)) == original, trial
        except train.UserError as error:
            assert str(error).startswith(f"{path} (") and "\n" not in str(error)
            refused += 1
    assert refused > 40


def damage(content, choose):
    """One of four kinds of damage; two in three near an end, where a file's structure is."""
    kind, size = choose.randrange(4), len(content)
    at = choose.choice([choose.randrange(size), choose.randrange(min(size, 4000)),
                        size - 1 - choose.randrange(min(size, 4000))])
    if kind == 0:
        return content[:at] + bytes([content[at] ^ 1 << choose.randrange(8)]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + choose.randbytes(50) + content[at + 50 :]
    return content[at:] + content[:at]


def test_the_surroundings_fail(tmp_path, monkeypatch, small_data):
    argv = [*QUICK, "--epochs", "1", "--output", str(tmp_path / "run")]

    for name, error, message in (
        ("augment", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
         r"allocate 2.00 GiB.: --accumulate 2"),
        ("batches", OSError(errno.ENOMEM, "Cannot allocate memory"), "memory: --accumulate 2"),
        ("augment", RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n"
                                 "RuntimeError: unable to allocate shared memory(shm)"),
         r"\(shm\): .*--workers"),
        ("SummaryWriter", OSError(errno.ENOSPC, "No space left on device"), "device: make room"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(train, name, Mock(side_effect=error))
            with pytest.raises(train.UserError, match=message):
                train.main(argv)
    with train.claim(tmp_path / "run"), pytest.raises(train.UserError, match="another run"):
        train.main(argv)
    (tmp_path / "file").touch()
    with pytest.raises(train.UserError, match="cannot write to --output .*file/run"):
        train.main([*argv, "--output", str(tmp_path / "file" / "run")])
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:  # python train.py | head
        train.say("to nobody", gone)
        train.say("to nobody", gone)


def test_a_run_leaves_what_is_promised(tmp_path, small_data, capsys):
    out = tmp_path / "a run"
    assert train.main([*QUICK, "--epochs", "2", "--output", str(out)]) == 0
    text = capsys.readouterr().out
    size = sum(p.numel() for p in meta("atto", num_classes=10, patch_size=4).parameters())
    assert f"patch size 4: {size:,} parameters, 0.011 GMACs at 32x32" in text
    rows = read_csv(out / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"args.json", "last.pt", "weights.safetensors"} <= {p.name for p in out.iterdir()}
    assert list(out.glob("events*")) and not list(out.glob("*.tmp"))

    model = create_convnext("atto", num_classes=10, patch_size=4).eval()
    load_weights(model, out / "weights.safetensors")
    data = train.draw_shapes(1000, 32, seed=0)
    saved = torch.load(out / "last.pt", weights_only=True)
    x = train.normalize(
        data.images / 255, torch.tensor(saved["mean"]), torch.tensor(saved["std"]))
    top1 = 100 * (model(x).argmax(1) == data.labels).float().mean().item()
    assert top1 == pytest.approx(float(rows[-1]["test_ema_top1"]), abs=5.1)  # of 20 images, bf16
    for name in ("last.pt", "weights.safetensors"):
        assert train.main(["--eval-only", str(out / name)]) == 0
        assert f"top-1 {float(rows[-1]['test_ema_top1']):.2f} %" in capsys.readouterr().out
    with pytest.raises(train.UserError, match="holds a run already"):
        train.main([*QUICK, "--epochs", "2", "--output", str(out)])
    for argv, message in ((["--resume", str(out / "weights.safetensors")], "takes last.pt"),
                          (["--eval-only", str(out / "last.pt"), "--variant", "tiny"],
                           "cannot go on with another --variant:")):
        with pytest.raises(SystemExit):
            train.main(argv)
        assert message in capsys.readouterr().err


@pytest.fixture
def pretrained(tmp_path, small_data):
    """The weights of a short run with patches of 4, ten classes and statistics of its own."""
    assert train.main([*QUICK, "--epochs", "1", "--output", str(tmp_path / "first")]) == 0
    return str(tmp_path / "first" / "weights.safetensors")


def test_the_recipe_for_fine_tuning(pretrained):
    args = arguments("--init-from", pretrained, "--recipe", "finetune", "--batch-size", "256",
                     "--epochs", "7", "--mixup", "0.3")
    assert (args.variant, args.patch_size, args.img_size) == ("atto", 4, 32)  # of the weights
    assert (args.lr, args.min_lr, args.weight_decay) == (2.5e-5, 5e-7, 1e-8)
    assert (args.layer_decay, args.head_init_scale, args.ema_horizon) == (0.8, 0.001, 0)
    assert (args.epochs, args.mixup, args.cutmix, args.warmup_epochs) == (7, 0.3, 0, 0)
    for variant, rate in (("tiny", 0), ("small", 0.1), ("base", 0.2), ("large", 0.3),
                          ("xlarge", 0.4), ("v2_base", 0.2)):
        args = arguments("--init-from", pretrained, "--recipe", "finetune", "--variant", variant)
        assert args.drop_path == rate
    assert arguments("--init-from", pretrained).layer_scale == 1e-6
    assert arguments("--variant", "v2_atto").layer_scale == 0


def test_fine_tuning_on_other_classes(tmp_path, pretrained, capsys):
    root = make_folder(tmp_path / "data")
    argv = ["--init-from", pretrained, "--dataset", "folder", "--data-dir", str(root), "--epochs",
            "2", "--lr", "0.01", "--batch-size", "4", "--workers", "0", "--device", "cpu"]
    assert train.main([*argv, "--recipe", "finetune", "--output", str(tmp_path / "a")]) == 0
    assert ("126 of 128 parameters loaded, from the layout 'ours'; kept as they were: "
            "head.fc.weight is for other classes there, head.fc.bias is for other classes there\n"
            ) in capsys.readouterr().out
    state, first = train.read_checkpoint(tmp_path / "a" / "last.pt"), load_file(pretrained)
    settings = convnext.read_weights(pretrained).settings
    assert (state["mean"], state["std"]) == (settings["mean"], settings["std"])
    moved = {name: (state["model"][name] - tensor).abs().max() / tensor.abs().max()
             for name, tensor in first.items() if name.endswith("dwconv.weight")}
    assert 0 < moved["stages.0.0.dwconv.weight"] < moved["stages.3.1.dwconv.weight"]

    assert train.main([*argv, "--freeze-backbone", "--output", str(tmp_path / "b")]) == 0
    state = train.read_checkpoint(tmp_path / "b" / "last.pt")
    for name, tensor in state["model"].items():
        if name.startswith("head.fc."):
            assert tensor.abs().max() > 0.01
        else:
            assert torch.equal(tensor, first[name]), name
    assert state["args"]["drop_path"] == 0
    with pytest.raises(train.UserError, match="--freeze-backbone would leave untrained .* down"):
        train.main([*argv, "--freeze-backbone", "--patch-size", "2", "--output",
                    str(tmp_path / "c")])

    capsys.readouterr()
    (root / "train" / "a dog").rename(root / "train" / "wolf")
    (root / "val" / "a dog").rename(root / "val" / "wolf")
    assert train.main([*argv, "--init-from", str(tmp_path / "a" / "weights.safetensors"),
                       "--output", str(tmp_path / "d")]) == 0
    assert "126 of 128 parameters loaded" in capsys.readouterr().out  # two other classes


def test_a_distilled_run(tmp_path, pretrained, monkeypatch, capsys):
    """A teacher without a say changes nothing; resumed it is the same; its copy has no loss."""
    argv = [*QUICK, "--epochs", "2", "--batch-size", "16", "--layer-decay", "0.8",
            "--init-from", pretrained]
    teach = [*argv, "--teacher", pretrained, "--distill-alpha"]
    runs = {name: str(tmp_path / name) for name in ("plain", "silent", "half", "parts", "copy")}
    assert train.main([*argv, "--output", runs["plain"]]) == 0
    assert train.main([*teach, "0", "--output", runs["silent"]]) == 0
    assert_same_run(runs["plain"], runs["silent"])
    assert train.main([*teach, "0.5", "--output", runs["half"]]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "augment", at_call(
            8, train.augment, lambda: signal.raise_signal(signal.SIGINT)))
        assert train.main([*teach, "0.5", "--output", runs["parts"]]) == 130
    assert train.main(["--resume", f"{runs['parts']}/last.pt"]) == 0
    assert_same_run(runs["half"], runs["parts"])
    losses = [[float(row["train_loss"]) for row in read_csv(f"{run}/metrics.csv")]
              for run in (runs["plain"], runs["half"])]
    assert losses[0] != losses[1]
    assert train.main([*teach, "1", "--lr", "1e-9", "--min-lr", "0", "--drop-path", "0",
                       "--output", runs["copy"]]) == 0
    assert float(read_csv(f"{runs['copy']}/metrics.csv")[0]["train_loss"]) < 1e-3
    root = make_folder(tmp_path / "data")
    with pytest.raises(train.UserError, match=r"on other classes: disk, .* \(10\), here a dog, b"):
        train.main([*teach, "1", "--dataset", "folder", "--data-dir", str(root), "--output",
                    str(tmp_path / "other")])


def test_the_teacher_sees_its_own_normalisation(pretrained):
    args = arguments("--dataset", "synthetic", "--teacher", pretrained)
    data = train.draw_shapes(20, 32, seed=1)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    teacher = train.load_teacher(args, train.Data(data, None, data, data.classes, mean, std))
    settings = convnext.read_weights(pretrained).settings
    x = data.images / 255
    expected = from_checkpoint(pretrained)(train.normalize(
        x, torch.tensor(settings["mean"]), torch.tensor(settings["std"])))
    torch.testing.assert_close(teacher(train.normalize(x, mean, std)), expected,
                               atol=1e-4, rtol=1e-4)


def test_published_weights_are_evaluated_as_timm_does(tmp_path, capsys):
    root = make_folder(tmp_path / "data")
    network = randomise(timm.create_model("convnext_atto", num_classes=2))
    weights = str(tmp_path / "timm.safetensors")
    save_file(network.state_dict(), weights, {"format": "pt"})
    assert train.main(["--eval-only", weights, "--dataset", "folder", "--amp",
                       "off", "--data-dir", str(root), "--img-size", "96", "--workers", "0"]) == 0
    cut = timm.data.create_transform(96, interpolation="bicubic", crop_pct=0.875)
    images = torchvision.datasets.ImageFolder(root / "val", cut)
    x, labels = torch.stack([x for x, _ in images]), torch.tensor(images.targets)
    logits = logits_of(network, x)
    loss, top1 = F.cross_entropy(logits, labels), 100 * (logits.argmax(1) == labels).float().mean()
    assert f"test loss {loss:.4f}  top-1 {top1:.2f} %" in capsys.readouterr().out
    for argv, message in (
            (["--dataset", "synthetic"], "timm.safetensors has 2 classes; here are 10: disk, "),
            ([], "imagenet could not be loaded .* use --dataset folder")):
        with pytest.raises(train.UserError, match=message):
            train.main(["--eval-only", weights, "--data-dir", str(tmp_path), *argv])
    grey = create_convnext("atto", num_classes=2, in_channels=1).state_dict()
    part = {name: t for name, t in network.state_dict().items() if name != "stem.1.weight"}
    for content, message in ((grey, r"grey.pth: these .*0.0.weight is \(40, 1, 4, 4\) there"),
                             (part, "grey.pth: these .*layers.0.1.weight is missing there")):
        torch.save(content, tmp_path / "grey.pth")
        with pytest.raises(train.UserError, match=message):
            train.main(["--eval-only", str(tmp_path / "grey.pth"), "--dataset", "folder",
                        "--data-dir", str(root), "--img-size", "96", "--workers", "0"])


def test_bad_weights_are_refused(tmp_path, pretrained, capsys):
    other = str(tmp_path / "other.pth")
    torch.save(timm.create_model("convnext_tiny_hnf").state_dict(), other)
    for argv, message in (
            (["--init-from", "none.pth"], "there is no checkpoint none.pth"),
            (["--init-from", other], "other.pth: these are the weights of timm's `_hnf`"),
            (["--eval-only", other], "other.pth: these are the weights of timm's `_hnf`"),
            (["--init-from", "timm:convnext_teeny"], "^timm:convnext_teeny: timm has no"),
            (["--teacher", other, "--dataset", "synthetic", "--output", str(tmp_path / "x")],
             "other.pth: these are the weights of timm's `_hnf`"),
            (["--init-from", pretrained, "--variant", "tiny", "--dataset", "synthetic", "--output",
              str(tmp_path / "x")], "weights.safetensors: these weights do not fit the model: ")):
        with pytest.raises(train.UserError, match=message):
            train.main(argv)
    for argv, message in ((["--recipe", "finetune"], "need weights: --init-from SOURCE"),
                          (["--freeze-backbone"], "need weights: --init-from SOURCE"),
                          (["--init-from", ""], "--init-from: must not be empty"),
                          (["--eval-only", other, "--teacher", other], "trains nothing"),
                          (["--eval-only", other, "--init-from", other], "not allowed with"),
                          (["--distill-alpha", "0.3"], "need a --teacher")):
        with pytest.raises(SystemExit):
            train.main(argv)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_data_sets_of_torchvision(tmp_path, monkeypatch):
    for split in ("train", "val"):
        for wnid in ("n02", "n01"):
            (tmp_path / split / wnid).mkdir(parents=True)
            PIL.Image.new("L", (50, 40)).save(tmp_path / split / wnid / "a.JPEG")
    torch.save(({"n01": ("crane", "bird"), "n02": ("crane", "machine")}, []), tmp_path / "meta.bin")
    args = arguments("--dataset", "imagenet", "--data-dir", str(tmp_path), "--img-size", "96")
    data = train.load_split(args, train=False)
    assert data.classes == ["n01", "n02"] and [label for _, label in data.samples] == [0, 1]
    assert data[1][0].shape == (3, 96, 96)

    class Fake(torchvision.datasets.FakeData):
        classes, targets = [f"class {i}" for i in range(100)], [3, 1, 2]
        data = np.full((3, 32, 32, 3), 7, dtype=np.uint8)

        def __init__(self, root, train, download):
            super().__init__(3, (3, 32, 32), 100)

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Fake)
    for size, kind in ((32, train.InMemory), (40, train.InMemory), (96, train.Pictures)):
        data = train.load_split(arguments("--dataset", "cifar100", "--img-size", str(size),
                                          "--workers", "0"), train=True)
        assert isinstance(data, kind) and len(data.classes) == 100 and len(data) == 3
        assert data[[0] if kind is train.InMemory else 0][0].shape[-3:] == (3, size, size)

    food = tmp_path / "food-101"
    (food / "meta").mkdir(parents=True)
    for split in ("train", "test"):
        (food / "meta" / f"{split}.json").write_text('{"apple_pie": ["apple_pie/1"]}')
    (food / "images" / "apple_pie").mkdir(parents=True)
    PIL.Image.new("RGB", (50, 40)).save(food / "images" / "apple_pie" / "1.jpg")
    args = arguments("--dataset", "food101", "--data-dir", str(tmp_path), "--img-size", "96")
    data = train.load_split(args, train=True)
    assert data[0][0].shape == (3, 96, 96) and data.classes == ["apple_pie"]
    (food / "images" / "apple_pie" / "1.jpg").unlink()
    with pytest.raises(train.UserError, match="cannot read the image number 0 of food101 .*1.jpg"):
        train.load_split(args, train=True)[0]
    assert len(train.load_split(arguments("--dataset", "food101", "--data-dir", str(tmp_path),
                                          "--img-size", "96", "--skip-bad"), train=True)) == 0


def test_held_out_images_are_not_trained_on(small_data):
    args = arguments(*QUICK, "--val-size", "30")
    data = train.prepare_data(args, torch.device("cpu"))
    assert len(data.train) == 70 and len(data.val) == 30
    assert not set(data.train.indices) & set(data.val.indices)


def make_folder(root, classes=("b cat", "a dog"), splits=("train", "val")):
    generator = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i, mode in enumerate(("RGB", "L", "P", "CMYK", "RGB", "RGBA")):
                pixels = generator.integers(0, 100, (40 + 9 * i, 70 - 5 * i, 3)) + 100 * label
                image = PIL.Image.fromarray(pixels.astype(np.uint8)).convert(mode)
                image.save(folder / f"ünï {i}.{'jpg' if mode in ('L', 'CMYK') else 'png'}")
    (root / "train" / ".hidden").mkdir(exist_ok=True)
    return root


@pytest.mark.parametrize("size", [32, 96])
def test_a_folder_of_mixed_images(tmp_path, capsys, size):
    root = make_folder(tmp_path / "my data")
    argv = ["--variant", "atto", "--dataset", "folder", "--data-dir", str(root), "--epochs", "1",
            "--img-size", str(size), "--batch-size", "4", "--workers", str(size // 96),
            "--device", "cpu", "--patch-size", "4", "--ema-horizon", "0"]
    assert train.main([*argv, "--output", str(tmp_path / "run"), "--val-size", "2"]) == 0
    text = capsys.readouterr().out
    assert "10 training + 2 held-out + 12 test images, 2 classes (a dog, b cat, ...)" in text
    good = (root / "train" / "a dog" / "ünï 0.png").read_bytes()
    for name, content in (("empty.png", b""), ("text.png", b"no image"), ("cut.png", good[:900])):
        (root / "train" / "a dog" / name).write_bytes(content)
    with pytest.raises(train.UserError, match="cannot read the image .*(empty|text|cut).png"):
        train.main([*argv, "--output", str(tmp_path / "other")])
    assert len(train.load_split(arguments(*argv, "--skip-bad"), train=True)) == 12
    note = capsys.readouterr().err
    assert "left out 3 of 15 images: " in note and "cut.png" in note


def test_a_worker_is_killed(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "data")
    monkeypatch.setattr(train.Pictures, "read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(train.UserError, match="DataLoader worker .*fewer --workers"):
        train.main(["--dataset", "folder", "--data-dir", str(root), "--img-size", "96",
                    "--workers", "1", "--device", "cpu", "--output", str(tmp_path / "run")])


def test_classes_are_matched_by_name(tmp_path, capsys):
    root = make_folder(tmp_path)
    args = arguments("--dataset", "folder", "--data-dir", str(root))
    (root / "val" / "a dog").rename(root / "gone")
    val = train.load_split(args, train=False, classes=["a dog", "b cat"])
    assert set(val.labels.tolist()) == {1} and "has no images of a dog" in capsys.readouterr().err
    for image in (root / "train" / "a dog").iterdir():
        image.unlink()
    with pytest.raises(train.UserError, match="train has no images of a dog"):
        train.load_split(args, train=True)
    (root / "gone").rename(root / "val" / "wolf")
    with pytest.raises(train.UserError, match="classes that training has not: wolf"):
        train.load_split(args, train=False, classes=["a dog", "b cat"])


def test_cifar10_without_a_network(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    with pytest.raises(train.UserError, match="Put cifar-10-python.tar.gz .* into data/, or use "
                                              "--dataset folder .* or --dataset synthetic"):
        train.main(["--device", "cpu", "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("argv", "message"), [
    ("--vairant tiny", "unrecognized arguments: --vairant"),
    ("--mix 0.5", "unrecognized arguments: --mix"),
    ("--variant teeny", "invalid choice: 'teeny'"),
    ("--lr 0", "--lr: must be a number in (0, inf)"), ("--lr nan", "--lr: must be a number in"),
    ("--lr inf", "not 'inf'"), ("--epochs 0", "--epochs: must be a whole number in [1, inf)"),
    ("--epochs 1.5", "not '1.5'"), ("--drop_path 1", "--drop-path: must be a number in [0, 1)"),
    ("--random-erase 1.1", "must be a number in [0, 1], not '1.1'"),
    ("--warmup-epochs 3 --epochs 3", "--warmup-epochs: must be below --epochs, 3"),
    ("--img-size 8", "--img-size: must be 16 or more at this --patch-size"),
    ("--resume a --eval-only b", "--eval-only: not allowed with argument --resume"),
    ("--accumulate 9 -b 8", "--accumulate: must be up to 8, a batch")])
def test_bad_arguments_are_refused_with_the_range(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        train.main(argv.split())
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_bad_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(train.UserError, match="there is no checkpoint none.pt"):
        train.main(["--resume", "none.pt"])
    Path("zero.pt").touch()
    torch.save({"args": Malicious()}, "evil.pt")
    torch.save({"model": {}}, "other.pt")
    for flag, name in itertools.product(("--resume", "--eval-only"),
                                        ("zero.pt", "evil.pt", "other.pt")):
        message = rf"{name} \(.* is not a complete checkpoint"
        if (flag, name) == ("--eval-only", "other.pt"):
            message = "other.pt: these are no weights of a ConvNeXt"
        with pytest.raises(train.UserError, match=message):
            train.main([flag, name])
    assert not Path("executed").exists()


def test_the_error_of_a_user_is_one_line(tmp_path):
    run = subprocess.run([sys.executable, HERE / "train.py", "--resume", "none.pt"],
                         capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 1
    assert run.stderr == "train.py: error: there is no checkpoint none.pt\n"


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
        assert len(cell.source.splitlines()) <= 20, cell.source
        assert cell.execution_count and all(o.output_type != "error" for o in cell.outputs)
    assert (HERE / "walkthrough.ipynb").stat().st_size < 1.5e6
    monkeypatch.delenv("CIFAR10_FOLDER", raising=False)
    NotebookClient(notebook, timeout=90, resources={"metadata": {"path": HERE}}).execute()
