"""Train ConvNeXt on CIFAR-10, on a folder of images, or on shapes drawn on the spot.

    python train.py --variant tiny --epochs 100       # the full recipe; downloads CIFAR-10
    python train.py --recipe fast                     # a small network, for two CPU cores
    python train.py --dataset folder --data-dir DIR --img-size 224 --patch-size 4
    python train.py --init-from timm:convnext_tiny.fb_in22k --recipe finetune --dataset folder ...
    python train.py --teacher runs/NAME/weights.safetensors --variant atto ...    # distillation
    python train.py --resume runs/NAME/last.pt        # continue a run that was stopped
    python train.py --eval-only CHECKPOINT            # only measure the accuracy

The default recipe is the paper's for ImageNet (table 5), adapted to a hundred epochs of 32x32
images; README.md has the differences, and the measurements behind them. Sections 1 to 4 are the
training method. The others serve it: RandAugment's operations (5), data (6), weights (7), the run
(8) and the command line (9).
"""

import argparse
import contextlib
import ctypes
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.datasets
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from einops import rearrange, reduce
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import convnext


# --- 1. Recipe ----------------------------------------------------------------------------------
def setting(default: Any, help_: str, allowed: str | tuple = "", **more: Any) -> Any:
    """A field of Recipe. `allowed`: the words or the interval to choose from; [0, 1) excludes 1.
    `group` begins a group of flags in --help."""
    return field(default=default, metadata={"help": help_, "allowed": allowed, **more})

@dataclass
class Recipe:
    """Every setting with its default. Each is a flag: batch_size is --batch-size.

    `complete`, in section 9, checks the values and fills in the defaults that depend on others.
    """
    recipe: str = setting("scratch", "different defaults; finetune: for --init-from; fast: for a "
                          "small network on two CPU cores",
                          ("scratch", "finetune", "fast"), group="what to do")
    resume: str | None = setting(None, "continue the run of this last.pt")
    eval_only: str | None = setting(None, "only measure the accuracy of these weights, from a run "
                                    "or as for --init-from")
    dataset: str = setting("cifar10", "images to train on", (
        "cifar10", "cifar100", "food101", "imagenet", "folder", "synthetic"), group="data")
    data_dir: str = setting("data", "folder of the data set; with --dataset folder, the one that "
                            "holds train/ and test/ (or val/), each with a folder per class")
    img_size: int = setting(32, "side in pixels; with --init-from: that of its network", "[1, inf)")
    crop_pct: float | None = setting(None, "part of the shorter side that is evaluated, above 64 "
                                     "pixels. Default: 0.875; from 384 pixels, the whole image, "
                                     "squeezed into a square", "(0, 1]")
    val_size: int = setting(0, "training images to hold out; they choose best.pt", "[0, inf)")
    skip_bad: bool = setting(False, "leave out images that cannot be read")
    workers: int = setting(min(8, os.cpu_count() or 1), "processes that read images", "[0, inf)",
                           short="-j")
    crop_padding: int = setting(4, "largest random shift in pixels, of images up to 64x64; 0: none",
                                "[0, inf)", group="augmentation")
    crop_scale: float = setting(0.08, "smallest area of a random crop of images above 64x64; "
                                "1: no crop", "(0, 1]")
    flip: float = setting(0.5, "probability of a mirror image", "[0, 1]")
    rand_augment: float = setting(9.0, "strength of RandAugment; 0: none", "[0, 10]")
    random_erase: float = setting(0.25, "probability of an erased rectangle", "[0, 1]")
    mixup: float = setting(0.8, "alpha of MixUp; 0: none", "[0, inf)")
    cutmix: float = setting(1.0, "alpha of CutMix; 0: none", "[0, inf)")
    mix_prob: float = setting(1.0, "probability that a batch is mixed", "[0, 1]")
    mix_off_epochs: int | None = setting(None, "last epochs without MixUp and CutMix. Default: a "
                                        "tenth of the run", "[0, inf)")
    start_size: int = setting(0, "shrink the images to this side in the first epochs; 0: never",
                              "[0, inf)")
    start_share: float = setting(0.5, "share of the epochs at --start-size", "[0, 1]")
    variant: str = setting(
        "tiny", "size of the network", tuple(convnext.VARIANTS), short="--model", group="network")
    depths: list[int] | None = setting(
        None, "instead of a variant: blocks in each stage, such as 2 4 2", "[1, inf)")
    dims: list[int] | None = setting(
        None, "with --depths: channels in each stage, such as 96 192 384", "[1, inf)")
    road: str | None = setting(
        None, "instead of a variant, the network after a step from ResNet-50 to ConvNeXt, or the "
        "last one with attention", tuple(convnext.DESIGNS))
    width: int = setting(0, "with --road: channels in its first stage; 0: the paper's 64 or 96",
                         "[0, inf)")
    # The paper has patches of 4x4, LayerScale 1e-6 and its own initialisation. At 32x32 these learn
    # faster; README.md has the tables.
    patch_size: int = setting(2, "side of the stem's patches", (1, 2, 4))
    layer_scale: float = setting(0.0, "initial value of LayerScale; 0: none", "[0, inf)")
    drop_path: float = setting(0.1, "stochastic depth: probability to drop the last block",
                               "[0, 1)")
    init: str = setting("fan-in", "initial weights: of standard deviation 1 / sqrt(fan-in), or "
                        "0.02 like in the paper", ("paper", "fan-in"))
    head_init_scale: float = setting(1.0, "factor on the classifier's initial weights", "[0, inf)")
    init_from: str | None = setting(None, "begin with these weights, in any layout: a file, an "
                                    "https address, timm:NAME or hf:REPO", group="other networks")
    freeze_backbone: bool = setting(False, "train the classifier alone")
    teacher: str | None = setting(None, "learn from this network's outputs, too (distillation)")
    distill_alpha: float = setting(0.5, "the teacher's share of the loss", "[0, 1]")
    distill_temperature: float = setting(2.0, "divisor of both networks' logits", "(0, inf)")
    epochs: int = setting(100, "passes over the images", "[1, inf)", group="optimisation")
    batch_size: int = setting(128, "images per step", "[1, inf)", short="-b")
    accumulate: int = setting(1, "split each step into this many parts, to need less memory",
                              "[1, inf)")
    optimizer: str = setting("adamw", "muon: Muon for the blocks' matrices, AdamW for the rest; "
                             "sgd: with a momentum of 0.9", ("adamw", "muon", "sgd"))
    lr: float = setting(1e-3, "highest learning rate", "(0, inf)")
    muon_lr: float = setting(0.02, "highest learning rate of Muon", "(0, inf)")
    min_lr: float = setting(1e-6, "learning rate at the end; Muon's falls in proportion",
                            "[0, inf)")
    schedule: str = setting("cosine", "how the learning rate falls", ("cosine", "linear"))
    warmup_epochs: float | None = setting(None, "epochs in which the learning rate rises. "
                                           "Default: a twentieth of the run", "[0, inf)")
    layer_decay: float = setting(1.0, "factor on the learning rate from a layer to the one before",
                                 "(0, 1]")
    beta2: float = setting(0.999, "AdamW's decay rate of squared gradients", "[0, 1)")
    weight_decay: float = setting(0.05, "weight decay of matrices and filters",
                                  "[0, inf)", short="--wd")
    label_smoothing: float = setting(0.1, "share of a label spread over all classes", "[0, 1)")
    clip_grad: float = setting(0.0, "largest norm of the gradient; 0: no limit", "[0, inf)")
    ema_horizon: float = setting(0.04, "share of the run that the weights are averaged over; "
                                 "0: no average", "[0, 1)")
    amp: str = setting("auto", "number type of matrix products; auto: bf16 if the hardware has it",
                       ("auto", "bf16", "fp16", "off"), group="run")
    compile: bool = setting(False, "use torch.compile")
    device: str = setting("auto", "cuda, mps or cpu")
    seed: int = setting(0, "seed of all random numbers", "[0, 4294967295]")
    eval_every: int = setting(1, "epochs from one evaluation to the next", "[1, inf)")
    tta: bool = setting(False, "finally, also report the mean over an image and its mirror image")
    output: str | None = setting(None, "folder of the run. Default: runs/<time>-<variant>")

    def __post_init__(self) -> None:
        complete(self)

# For a small network on two CPU cores; README.md shows what each of these gains.
FAST = {
    "variant": "atto", "patch_size": 1, "drop_path": 0.0, "optimizer": "muon", "lr": 3e-3,
    "muon_lr": 0.02, "beta2": 0.95, "min_lr": 0.0, "weight_decay": 0.02, "schedule": "linear",
    "batch_size": 256, "epochs": 40, "rand_augment": 5.0, "mix_prob": 0.0, "ema_horizon": 0.0,
    "start_size": 24, "tta": True}

def finetune(variant: str, batch_size: int) -> dict[str, Any]:
    """From ImageNet-22K to ImageNet-1K (the paper's table 6); V2 gets the values of V1."""
    size, scale = variant.removeprefix("v2_"), batch_size / 512
    rates = {"small": 0.1, "base": 0.2, "large": 0.3, "xlarge": 0.4, "huge": 0.4}  # huge: a guess
    return {
        "epochs": 30, "lr": 5e-5 * scale, "min_lr": 1e-6 * scale, "warmup_epochs": 0.0,
        "weight_decay": 1e-8, "layer_decay": 0.8, "rand_augment": 9.0, "mixup": 0.0, "cutmix": 0.0,
        "random_erase": 0.25, "label_smoothing": 0.1, "clip_grad": 0.0, "head_init_scale": 0.001,
        "drop_path": rates.get(size, 0.0),
        # The paper: decay 0.9999, for XLarge only. Of its 75,000 steps 10,000 are 13 %.
        "ema_horizon": 0.13 if size == "xlarge" else 0.0}

# --- 2. Augmentation ----------------------------------------------------------------------------
# Whole batches on the training device, with random numbers for each image (torchvision's transforms
# draw once per batch). The CPU draws these numbers, and so need not wait for a GPU.

def crop_and_flip(x: Tensor, padding: int, flip: float) -> Tensor:
    """Shift each image by up to `padding` pixels, reflecting its edge, and mirror some of them.
    Computes which pixel goes where, and gathers once. Bytes (b, c, h, w) -> bytes (b, c, h, w)."""
    b, c, h, w = x.shape
    def source(size: int) -> Tensor:  # (b, size): the row or column that each pixel comes from
        index = torch.randint(-padding, padding + 1, (b, 1)) + torch.arange(size)
        index = index.abs()  # reflected at 0: -1 becomes 1
        return size - 1 - (size - 1 - index).abs()  # and at size - 1: size becomes size - 2
    rows, columns = source(h), source(w)
    columns = torch.where(torch.rand(b, 1) < flip, columns.flip(1), columns)
    places = (rearrange(torch.arange(b), "b -> b 1 1 1"), rearrange(torch.arange(c), "c -> c 1 1"),
              rearrange(rows, "b h -> b 1 h 1"), rearrange(columns, "b w -> b 1 1 w"))
    return x[tuple(place.to(x.device, non_blocking=True) for place in places)]

def random_erase(x: Tensor, chance: float) -> Tensor:
    """Fill a random rectangle of some images with noise, in place (Zhong et al., 2017).
    It covers 2 to 33 % of the image. x is normalised, so standard normal noise is as bright."""
    erase = T.RandomErasing(1.0, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")
    for i in (torch.rand(len(x)) < chance).nonzero()[:, 0].tolist():
        x[i] = erase(x[i])
    return x

def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Bring each channel to mean 0 and standard deviation 1 over the data set. (b, c, h, w)"""
    return ((x - rearrange(mean, "c -> c 1 1")) / rearrange(std, "c -> c 1 1")).contiguous(
        memory_format=torch.channels_last)

def augment(recipe: Recipe, data: "Data", x: Tensor, labels: Tensor, mix: bool,
            size: int) -> tuple[Tensor, Tensor]:
    """Bytes (b, 3, h, w) and labels (b,) -> what the network sees, and targets (b, classes).
    mix: whether MixUp and CutMix are on. size: the side to shrink the images to."""
    x = crop_and_flip(x, recipe.crop_padding if recipe.img_size <= SMALL else 0, recipe.flip)
    x = x.float() / 255
    if recipe.rand_augment:
        x = rand_augment(x, recipe.rand_augment)
    if size != recipe.img_size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    x = normalize(x, data.mean, data.std)
    if recipe.random_erase:
        x = random_erase(x, recipe.random_erase)
    mixes = [kind(alpha=alpha, num_classes=len(data.classes))
             for kind, alpha in ((T.MixUp, recipe.mixup), (T.CutMix, recipe.cutmix)) if alpha]
    if mix and mixes and torch.rand(()) < recipe.mix_prob:
        return T.RandomChoice(mixes)(x, labels)
    return x, F.one_hot(labels, len(data.classes)).float()

# --- 3. Optimisation ----------------------------------------------------------------------------
def lr_at(step: int, total: int, warmup: int, peak: float, floor: float,
          schedule: str = "cosine") -> float:
    """The learning rate of step 0 ... total - 1. It rises linearly, then falls as half a cosine to
    `floor`, or linearly, so that it would be `floor` at step `total`. It depends on the step alone,
    so there is no scheduler whose state could be lost."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "linear":
        return floor + (peak - floor) * (1 - (step - warmup) / max(1, total - warmup))
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))

def layer_number(name: str, depths: tuple[int, ...]) -> int:
    """The number of a parameter's layer, for layer-wise decay of the learning rate.
    The stem is layer 0, and the head is the last. A stage and the Downsample before it are one
    layer, but in the third stage every three blocks are one, as in the authors' code."""
    part, stage, block = (name + "..").split(".")[:3]
    fourth_stage = 3 + math.ceil(depths[2] / 3)
    if part == "head":
        return fourth_stage + 1
    if part == "stages" and stage == "2":
        return 3 + int(block) // 3
    return (1 if part == "stages" else 0, 2, 3, fourth_stage)[int(stage)]

def takes_muon(name: str, p: Tensor) -> bool:
    """Whether Muon trains this parameter: the matrices and dense filters of the blocks."""
    in_block = ".pwconv" in name or ".branch." in name or ".shortcut." in name
    return in_block and name.endswith("weight") and p.ndim >= 2 and p.shape[1] > 1

def parameter_groups(model: convnext.ConvNeXt, weight_decay: float,
                     layer_decay: float = 1.0, muon: bool = False) -> list[dict]:
    """Group the trainable parameters by optimiser, weight decay and `lr_scale`, the factor on the
    learning rate. Only matrices and filters decay: norms, biases, LayerScale and GRN do not."""
    depths, groups = tuple(map(len, getattr(model, "stages", ()))), {}  # the road has no stages
    for name, p in model.named_parameters():
        if p.requires_grad:
            below_head = layer_number("head", depths) - layer_number(name, depths) if depths else 0
            about = {"muon": muon and takes_muon(name, p),
                     "weight_decay": weight_decay * (p.ndim >= 2 and not name.endswith("bias")),
                     "lr_scale": layer_decay**below_head}
            groups.setdefault((*about.values(),), about | {"params": []})["params"].append(p)
    return list(groups.values())

def orthogonalize(x: Tensor, precision: torch.dtype, steps: int = 5) -> Tensor:
    """The matrix U·Vᵀ of x = U·S·Vᵀ, roughly: singular values between 0.7 and 1.2 instead of 1.
    Newton and Schulz's iteration, with Muon's polynomial of degree 5 in place of their cubic."""
    wide = x if len(x) <= x.shape[1] else x.T
    wide = wide.to(precision)
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.775 * gram + 2.0315 * gram @ gram) @ wide
    return wide if len(x) <= x.shape[1] else wide.T

class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, for matrices (https://kellerjordan.github.io/posts/muon).
    All directions are learned equally fast, also those in which the gradient is small. A filter
    (o, i, h, w) is a matrix of o rows. It computes what torch.optim.Muon does, which takes no
    filters, and which multiplies in bfloat16 also where the hardware is slow at it."""
    def __init__(self, groups: list[dict], lr: float, precision: torch.dtype) -> None:
        super().__init__(groups, {"lr": lr, "momentum": 0.95, "weight_decay": 0.0})
        self.precision = precision  # of the matrix products

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                gradient = p.grad.flatten(1)
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                update = orthogonalize(gradient.lerp(average, momentum), self.precision)
                rows, columns = update.shape
                scale = max(1, rows / columns) ** 0.5
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-lr * scale)

def make_optimizers(model: nn.Module, recipe: Recipe,
                    precision: torch.dtype = torch.float32) -> list[torch.optim.Optimizer]:
    """AdamW or SGD; with --optimizer muon, Muon for the blocks' matrices and AdamW for the rest.
    Muon orthogonalises the step of a matrix, so that all directions are learned equally fast."""
    r = recipe
    groups = parameter_groups(model, r.weight_decay, r.layer_decay, r.optimizer == "muon")
    matrices, others = [g for g in groups if g["muon"]], [g for g in groups if not g["muon"]]
    if r.optimizer == "sgd":
        return [torch.optim.SGD(others, lr=r.lr, momentum=0.9, fused=True)]
    optimizers = [torch.optim.AdamW(others, lr=r.lr, betas=(0.9, r.beta2), fused=True)]
    if matrices:
        for group in matrices:
            group["lr_scale"] *= r.muon_lr / r.lr  # both follow one schedule
        optimizers.append(Muon(matrices, r.muon_lr, precision))
    return optimizers

def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(teacher / T) ‖ softmax(logits / T)), both (b, classes).
    From Hinton et al., 2015. The teacher's small probabilities tell what a class resembles, and a
    T above 1 raises them. The gradients fall with 1 / T², hence the factor."""
    ours, theirs = ((x / temperature).log_softmax(1) for x in (logits, teacher))
    return temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")

def training_loss(recipe: Recipe, logits: Tensor, targets: Tensor,
                  teacher: Tensor | None = None) -> Tensor:
    """(1 - α)·CE(targets, logits) + α·T²·KL(teacher ‖ logits); without a teacher α is 0."""
    loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
    if teacher is None:
        return loss
    distance = distillation_loss(logits, teacher.float(), recipe.distill_temperature)
    return torch.lerp(loss, distance, recipe.distill_alpha)

# --- 4. Training --------------------------------------------------------------------------------
CHECK_EVERY = 50  # steps; each check makes the CPU wait for the GPU

def train_step(run: "Run", x: Tensor, y: Tensor) -> None:
    """Update the weights once, from images (b, 3, h, w) and targets (b, classes)."""
    recipe, warmup = run.recipe, round(run.epoch_steps * run.recipe.warmup_epochs)
    lr = lr_at(run.step, run.total, warmup, recipe.lr, recipe.min_lr, recipe.schedule)
    for xs, ys in zip(x.chunk(recipe.accumulate), y.chunk(recipe.accumulate)):
        with torch.autocast(run.device.type, run.precision, run.precision != torch.float32):
            logits = run.model(xs)
            answers = run.teacher(xs) if run.teacher else None
        loss = training_loss(recipe, logits.float(), ys, answers) * (len(xs) / len(x))
        run.scaler.scale(loss).backward()
        run.sums["loss"] += loss.detach()
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
    if recipe.clip_grad:
        nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip_grad)
    for optimizer in run.optimizers:
        run.scaler.step(optimizer)  # optimizer.step(), unless a gradient in float16 is infinite
        optimizer.zero_grad()
    run.scaler.update()
    if run.ema:
        run.ema.update_parameters(run.model)
    run.step, run.sums["lr"] = run.step + 1, lr

def train_epoch(run: "Run", progress: tqdm) -> dict[str, Any]:
    """Finish the present epoch. Return its row for metrics.csv, or {} if a signal stops it.
    All random numbers follow from the seed and the epoch or step, so a resumed run draws the same.
    (The large factors keep the steps, epochs and images of any two seeds apart.)"""
    r, data = run.recipe, run.data
    epoch, done = divmod(run.step, run.epoch_steps)
    if len(run.history) < epoch:  # it is trained, but not evaluated yet
        epoch, done = epoch - 1, run.epoch_steps
    if not done:
        run.sums = {"loss": torch.zeros((), device=run.device), "seconds": 0.0, "waiting": 0.0}
    size = r.start_size if r.start_size and epoch < r.epochs * r.start_share else r.img_size
    run.model.train()
    ended = time.perf_counter()
    for batch in batches(data.train, r.batch_size, r.workers, first=done,
                         seed=-1_000_000_007 * r.seed - 10_000_019 * (epoch + 1)):
        torch.manual_seed(1_000_000_007 * r.seed + run.step + 1)
        images, labels = (part.to(run.device, non_blocking=True) for part in batch)
        x, y = augment(r, data, images, labels, epoch < r.epochs - r.mix_off_epochs, size)
        run.sums["waiting"] += time.perf_counter() - ended  # on a GPU, for the launches only
        train_step(run, x, y)
        progress.update()
        if run.step % CHECK_EVERY == 0 or run.step % run.epoch_steps == 0:
            check_finite(run)  # waits for the GPU, so that the time is right
        run.sums["seconds"] += time.perf_counter() - ended
        ended = time.perf_counter()
        if run.stopped_by and run.step < (epoch + 1) * run.epoch_steps:
            return {}
    seconds, images = run.sums["seconds"], run.epoch_steps * min(r.batch_size, len(data.train))
    return {"epoch": epoch + 1, "step": run.step,
            "train_loss": run.sums["loss"].item() / run.epoch_steps, "lr": run.sums["lr"],
            "seconds": seconds, "images_per_s": images / seconds,
            "data_share": run.sums["waiting"] / seconds}

@torch.inference_mode()
def evaluate(model: nn.Module, images: "Images", mean: Tensor, std: Tensor, workers: int,
             precision: torch.dtype, tta: bool = False,
             stopped: Callable[[], Any] = lambda: False) -> dict[str, float]:
    """Return the mean cross-entropy, and the top-1 and top-5 accuracy in %.
    tta: average the logits of each image and its mirror image. Returns {} once it is stopped."""
    model.eval()
    total = torch.zeros(3, device=mean.device)
    for batch in batches(images, 250, workers):
        if stopped():
            return {}
        x, labels = (part.to(mean.device, non_blocking=True) for part in batch)
        with torch.autocast(mean.device.type, precision, precision != torch.float32):
            x = normalize(x / 255.0, mean, std)
            logits = ((model(x) + model(x.flip(3))) / 2 if tta else model(x)).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == rearrange(labels, "b -> b 1")
        loss = F.cross_entropy(logits, labels, reduction="sum")
        total += torch.stack([loss, 100 * hits[:, 0].sum(), 100 * hits.sum()])
    return dict(zip(("loss", "top1", "top5"), (total / len(images)).tolist()))

# --- 5. RandAugment -----------------------------------------------------------------------------
def blend(x: Tensor, base: Tensor | float, amount: Tensor) -> Tensor:
    """Move x away from `base` (amount > 0) or towards it (amount < 0)."""
    return (x + amount * (x - base)).clamp(0, 1)

def warp(x: Tensor, *rows: list[Tensor | float]) -> Tensor:
    """y(position) = x(rows · position), about the centre; grey where x has no pixel."""
    zero = torch.zeros_like(x[:, 0, 0, 0])
    matrix = torch.stack([torch.stack([zero + v for v in row], 1) for row in rows], 1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x - 0.5, grid, align_corners=False) + 0.5

# What the paper's "RandAugment (9, 0.5)" chooses from, with timm's ranges: at full strength 30
# degrees, 45 % of the side, a colour factor of 1 ± 0.9, and so on. x: (b, 3, h, w) from 0 to 1.
# m: (b, 1, 1, 1), the strength from -1 to 1; operations with one direction ignore its sign.
RAND_AUGMENT_OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto_contrast": lambda x, m: TF.autocontrast(x),
    "equalize": lambda x, m: TF.equalize(x),
    "invert": lambda x, m: 1 - x,
    "rotate": lambda x, m: warp(x, [(a := math.radians(30) * m.flatten()).cos(), -a.sin(), 0],
                                [a.sin(), a.cos(), 0]),
    "posterize": lambda x, m: (  # clears the lowest bits of a pixel, 4 to 8 of them
        (x * 255).round() // (step := 2 ** (4 + (4 * m.abs()).int())) * step / 255),
    "solarize": lambda x, m: torch.where((x * 255).round() < 256 - (256 * m.abs()).int(), x, 1 - x),
    "solarize_add": lambda x, m: torch.where(
        (x * 255).round() < 128, (x + (110 * m.abs()).int() / 255).clamp(max=1), x),
    "color": lambda x, m: blend(x, TF.rgb_to_grayscale(x), 0.9 * m),
    "contrast": lambda x, m: blend(
        x, reduce(TF.rgb_to_grayscale(x), "b c h w -> b 1 1 1", "mean"), 0.9 * m),
    "brightness": lambda x, m: blend(x, 0, 0.9 * m),
    "sharpness": lambda x, m: blend(x, TF.adjust_sharpness(x, 0), 0.9 * m),
    "shear_x": lambda x, m: warp(x, [1, 0.3 * m.flatten(), 0], [0, 1, 0]),
    "shear_y": lambda x, m: warp(x, [1, 0, 0], [0.3 * m.flatten(), 1, 0]),
    "translate_x": lambda x, m: warp(x, [1, 0, 2 * 0.45 * m.flatten()], [0, 1, 0]),
    "translate_y": lambda x, m: warp(x, [1, 0, 0], [0, 1, 2 * 0.45 * m.flatten()])}

def rand_augment(x: Tensor, level: float) -> Tensor:
    """RandAugment (Cubuk et al., 2019) as the paper means it: timm's rand-m9-mstd0.5-inc1.
    Twice, each image draws one of the fifteen operations and applies it with probability 1/2. The
    strength is drawn from N(level, 0.5) / 10, where 1 is the operation's largest. (torchvision's
    magnitude of 9 means 9 of 30, always applied.) x: (b, 3, h, w) from 0 to 1, changed in place."""
    for _ in range(2):
        choice = torch.randint(len(RAND_AUGMENT_OPS), (len(x),))
        choice[torch.rand(len(x)) < 0.5] = -1  # no operation
        strength = (level + 0.5 * torch.randn(len(x))).clamp(0, 10) / 10
        strength = torch.where(torch.rand(len(x)) < 0.5, strength, -strength)
        for index, operation in enumerate(RAND_AUGMENT_OPS.values()):
            if len(chosen := (choice == index).nonzero()[:, 0]):
                m = rearrange(strength[chosen], "b -> b 1 1 1").to(x.device, non_blocking=True)
                chosen = chosen.to(x.device, non_blocking=True)
                x[chosen] = operation(x[chosen], m)
    return x

# --- 6. Data ------------------------------------------------------------------------------------
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # Windows lacks the last two
SMALL = 64  # images of up to this side are decoded once and kept in memory
say = tqdm.write  # prints above the progress bar

class UserError(Exception):
    """A mistake or a failure that the user can mend. Its text is shown as one line."""

def reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

def some(names: list, most: int = 4) -> str:
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")

@dataclass
class Images(Dataset):
    """Images and their classes. A list of numbers selects a batch: (b, 3, h, w), labels (b,)."""
    images: Tensor | list  # bytes (n, 3, h, w); or paths or arrays (h, w, 3), read when needed
    labels: Tensor  # (n,)
    classes: list[str]
    cut: Callable[[Image.Image], Image.Image] | None = None  # makes squares of what is read
    seed: int = 0  # with an image's number, the seed of its random crop

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, numbers: list[int]) -> tuple[Tensor, Tensor] | UserError:
        if not self.cut:
            return self.images[numbers], self.labels[numbers]
        squares = []
        for number in numbers:
            try:
                picture = as_shown(self.images[number])
            except Exception as error:  # noqa: BLE001, `batches` raises it, without a traceback
                return UserError(f"cannot read the image {self.images[number]} ({reason(error)}); "
                                 "--skip-bad leaves such images out")
            torch.manual_seed(self.seed - number)  # torchvision's transforms take no generator
            squares.append(TF.pil_to_tensor(self.cut(picture)))
        return torch.stack(squares), self.labels[numbers]

    def part(self, numbers: list[int]) -> "Images":
        images = [self.images[i] for i in numbers] if self.cut else self.images[numbers]
        return replace(self, images=images, labels=self.labels[numbers])

def as_shown(item: str | np.ndarray) -> Image.Image:
    """A picture as a viewer shows it, in RGB: upright, 16 bits scaled to 8, on a white ground."""
    if isinstance(item, str):  # as bytes: given a name, Pillow 13 garbles some rotated grey TIFFs
        picture = Image.open(io.BytesIO(Path(item).read_bytes()))
    else:
        picture = Image.fromarray(item)
    deep = picture.mode[:4] == "I;16" or picture.mode == "I" and picture.format in ("PNG", "PPM")
    picture = ImageOps.exif_transpose(picture)
    if deep:
        picture = Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("which of its 32-bit values is white is unknown: convert it to 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")

def find_images(root: Path) -> dict[str, list[str]]:
    """Map each class, a sub-folder of root, to the paths of all images below it.
    A note counts what is left out: hidden files, other programs' folders (@eaDir), extensions that
    Pillow does not know, and links to folders below a class, which may lead to other classes or in
    circles. Raises UserError for a folder that cannot be read."""
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename} ({error.strerror})")
    Image.init()
    known = {ext for ext, form in Image.registered_extensions().items() if form in Image.OPEN}
    found, left_out = {}, Counter()
    for place, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        name = os.path.relpath(place, root).split(os.sep)[0]
        odd = [folder for folder in folders if folder.startswith((".", "@", "#", "__MACOSX"))
               or name != "." and os.path.islink(os.path.join(place, folder))]
        folders[:] = sorted({*folders} - {*odd})  # which os.walk enters
        suffixes = {file: os.path.splitext(file)[1].lower() for file in sorted(files)}
        fine = [] if name == "." else [
            file for file, suffix in suffixes.items() if suffix in known and file[0] != "."]
        left_out.update(odd + [f"*{suffixes[file]}" for file in {*files} - {*fine}])
        found.setdefault(name, []).extend(os.path.join(place, file) for file in fine)
    if counts := [f"{count} {what}" for what, count in left_out.most_common()]:
        say(f"note: {root}: left out what is no image of a class: {some(counts, 9)}", sys.stderr)
    return {name: found[name] for name in sorted(found) if name != "."}

def load_folder(recipe: Recipe, train: bool, classes: list[str] | None) -> Images:
    """The images in DIR/train, or DIR/test or DIR/val. `classes` are those to expect, in order."""
    parts = ("train",) if train else ("test", "val")
    places = [Path(recipe.data_dir, part) for part in parts if Path(recipe.data_dir, part).is_dir()]
    if not places:
        raise UserError(f"--data-dir {recipe.data_dir} has no folder {' or '.join(parts)}")
    found = find_images(places[0])
    classes = classes or [*found]
    missing = [name for name in classes if not found.get(name)]
    unknown = [name for name in found if name not in classes]
    if unknown or len(found) < 2 or missing and (train or not any(found.values())):
        raise UserError(f"{places[0]} must have images of the classes of training, two or more; "
                        f"missing: {some(missing)}; unknown: {some(unknown)}")
    if missing:
        say(f"note: {places[0]} has no images of {some(missing)}", sys.stderr)
    labels = [i for i, name in enumerate(classes) for _ in found.get(name, [])]
    return Images([path for name in classes for path in found.get(name, [])],
                  torch.tensor(labels), classes)

def load_torchvision(recipe: Recipe, train: bool) -> Images:
    """A data set of torchvision, downloaded if need be; ImageNet cannot be."""
    root, name, split = recipe.data_dir, recipe.dataset, "train" if train else "test"
    try:
        if name == "imagenet":  # by identifiers, since two classes have the name "crane"
            data = torchvision.datasets.ImageNet(root, split.replace("test", "val"))
            return Images([*dict(data.samples)], torch.tensor(data.targets), data.wnids)
        if name == "food101":
            data = torchvision.datasets.Food101(root, split, download=True)
            return Images([*map(str, data._image_files)], torch.tensor(data._labels), data.classes)
        data = getattr(torchvision.datasets, name.upper())(root, train, download=True)
        return Images([*data.data], torch.tensor(data.targets), data.classes)
    except (OSError, RuntimeError, ImportError) as error:
        raise UserError(f"{name} could not be loaded ({reason(error)}). README.md says which file "
                        f"{root}/ lacks; or use --dataset folder or synthetic") from error

SHAPES = {"star": 0.6, "diamond": 1, "disk": 2, "square": 9}  # exponents p: |u|^p + |v|^p < 1

def draw_shapes(count: int, size: int, seed: int) -> Images:
    """Noisy pictures of the four shapes, full or hollow, at random places, sizes and colours."""
    generator = torch.Generator().manual_seed(seed)
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=generator)
    labels = torch.arange(count) % (2 * len(SHAPES))
    power = rearrange(torch.tensor([*SHAPES.values()])[labels // 2], "n -> n 1 1")
    axis = torch.linspace(-1, 1, size)
    u = (axis - uniform(-0.3, 0.3)).abs() / uniform(0.4, 0.7)
    v = (rearrange(axis, "h -> h 1") - uniform(-0.3, 0.3)).abs() / uniform(0.4, 0.7)
    distance = (u**power + v**power) ** (1 / power)
    inside = (distance < 1) & (distance > 0.6 * rearrange(labels % 2, "n -> n 1 1"))
    images = uniform(0, 0.4, 3) + uniform(0.4, 0.6, 3) * rearrange(inside, "n h w -> n 1 h w")
    images += 0.08 * torch.randn(images.shape, generator=generator)
    return Images((images.clamp(0, 1) * 255).byte(), labels,
                  [f"{kind} {name}" for name in SHAPES for kind in ("full", "hollow")])

def evaluation_cut(size: int, crop_pct: float | None) -> T.Transform:
    """Make a square of this side from a picture of any size, as the authors do for evaluation."""
    bicubic = T.InterpolationMode.BICUBIC
    if size >= 384 and crop_pct is None:
        return T.Resize((size, size), interpolation=bicubic)
    share = 1 if size <= SMALL else crop_pct or 0.875  # 224 of 256
    return T.Compose([T.Resize(int(size / share), interpolation=bicubic), T.CenterCrop(size)])

def load_split(recipe: Recipe, train: bool, classes: list[str] | None = None) -> Images:
    """The training or the test images, as they are evaluated. classes: in this order, if known."""
    if recipe.dataset == "synthetic":
        return draw_shapes(5000 if train else 1000, recipe.img_size, seed=int(train))
    data = load_folder(recipe, train, classes) if recipe.dataset == "folder" else (
        load_torchvision(recipe, train))
    data.cut = evaluation_cut(recipe.img_size, recipe.crop_pct)
    if recipe.skip_bad:
        numbers = tqdm(range(len(data)), "checking images", disable=None, leave=False)
        bad = {i: data.images[i] for i in numbers if isinstance(data[[i]], UserError)}
        say(f"note: {len(bad)} images cannot be read: {some([*bad.values()])}", sys.stderr)
        data = data.part([i for i in range(len(data)) if i not in bad])
    if recipe.img_size > SMALL:
        return data
    parts = tqdm(batches(data, 500, recipe.workers), "reading images", disable=None, leave=False)
    return replace(data, images=torch.cat([images for images, _ in parts]), cut=None)

def ignore_signals(_worker: int) -> None:
    """Leave signals, which may reach all processes, to the main one. For those that read images."""
    for name in SIGNALS:
        signal.signal(getattr(signal, name, signal.SIGINT), signal.SIG_IGN)

def batches(data: Images, batch_size: int, workers: int, *, seed: int | None = None,
            first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in order; or, with a seed, an epoch of training from batch number `first` on.
    An epoch is shuffled and has no incomplete batch, unless that is the only one."""
    order = torch.arange(len(data))
    if seed is not None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        order = order[: max(1, len(data) // batch_size) * batch_size]
    loader = DataLoader(
        replace(data, seed=seed or 0), batch_size=None, worker_init_fn=ignore_signals,
        sampler=[part.tolist() for part in order.split(batch_size)][first:],
        num_workers=workers if data.cut else 0, pin_memory=torch.cuda.is_available())
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (RuntimeError, ConnectionError) as error:  # a killed process, or no memory
        raise UserError(f"{reason(error)}; try fewer --workers") from error

def channel_statistics(data: Images, workers: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,) of pixels from 0 to 1; of large images, of about 2,000."""
    data = data.part(range(0, len(data), max(1, len(data) // 2000))) if data.cut else data
    sums = [torch.cat([reduce(x / 255.0, "b c h w -> c", "mean"),
                       reduce((x / 255.0) ** 2, "b c h w -> c", "mean")]).double() * len(x)
            for x, _ in batches(data, 500, workers)]
    mean, mean_square = (sum(sums) / len(data)).chunk(2)
    std = (mean_square - mean**2).clamp(min=1e-6).sqrt()  # with a single colour: no division by 0
    return mean.float(), std.float()

def fingerprint(data: Images, root: str) -> str:
    """A hash of the images' classes and order, and of their pixels or, above 64x64, file names."""
    digest = hashlib.sha256(json.dumps([data.classes, data.labels.tolist()]).encode())
    for image in data.images:
        digest.update(os.fsencode(os.path.relpath(image, root)) if isinstance(image, str)
                      else np.ascontiguousarray(image))
    return digest.hexdigest()

class Data(NamedTuple):
    train: Images
    val: Images | None  # held out of the training images, not augmented; may choose best.pt
    test: Images  # chooses nothing
    classes: list[str]
    mean: Tensor  # (3,), on the training device
    std: Tensor
    fingerprint: str  # of the training images, those held out included

def prepare_data(recipe: Recipe, device: torch.device, source: "Source | None" = None) -> Data:
    """Load all images. Their mean and standard deviation are the source's, if there is one."""
    train, val = load_split(recipe, train=True), None
    plain, test = train, load_split(recipe, train=False, classes=train.classes)
    if train.cut:
        train = replace(train, cut=T.RandomResizedCrop(
            recipe.img_size, (recipe.crop_scale, 1), interpolation=T.InterpolationMode.BICUBIC))
    if recipe.val_size >= len(plain):
        raise UserError(f"--val-size must be below the {len(plain):,} training images")
    if recipe.val_size:
        order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0)).tolist()
        val, train = plain.part(order[: recipe.val_size]), train.part(order[recipe.val_size :])
    mean, std = ((torch.tensor(source.images[name]) for name in ("mean", "std")) if source else
                 channel_statistics(plain, recipe.workers))
    return Data(train, val, test, plain.classes, mean.to(device), std.to(device),
                fingerprint(plain, recipe.data_dir))

# --- 7. Weights ---------------------------------------------------------------------------------
MADE_BY = "train.py, format 2"  # marks this program's files
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "img_size": 224}

class Source(NamedTuple):
    """What a file or a download holds."""
    name: str
    weights: convnext.Weights | None  # averaged, where there is an average; None for the road
    network: dict[str, Any]  # variant, patch_size, layer_scale, num_classes: from the weights
    images: dict[str, Any]  # that the network expects: mean, std, img_size and perhaps crop_pct
    notes: dict[str, Any]  # args, classes and more, if this program made the file

@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """Turn what reading or fitting weights raises into one line that names their source."""
    try:
        yield
    except Exception as error:
        downloaded = source.startswith(convnext.DOWNLOADS)  # by clients with errors of their own
        if not downloaded and not isinstance(error, OSError | ValueError | ImportError):
            raise
        text = "no such file" if isinstance(error, FileNotFoundError) else reason(error)
        raise UserError(text if source in text else f"{source}: {text}") from error

def checksum(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> str:
    """A hash of what weights.safetensors holds: the format has no checksum of its own."""
    digest = hashlib.sha256(json.dumps(sorted(notes.items())).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + bytes(tensors[name].flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()

def open_weights(source: str, resume: bool = False) -> Source:
    """Read a file or a download of any layout. Raises UserError unless it holds a ConvNeXt or, to
    resume, a network of the road. Notes are trusted only in files with this program's mark."""
    with naming(source):
        content, metadata, images = convnext.read_source(source)
        if content.get("made_by") == MADE_BY and content["args"].get("road"):
            if not resume:
                raise ValueError("it holds a network of the road, which --resume alone can take")
            return Source(source, None, {}, {k: content[k] for k in ("mean", "std")}, content)
        weights = convnext.read_weights(content)
        network = convnext.infer_architecture(weights)
        variant = convnext.variant_of(network["depths"], network["dims"], network["grn"])
        network |= {"variant": variant} if variant else {}
        if network["in_channels"] != 3:
            raise ValueError(f"its images have {network['in_channels']} channels, not 3")
        notes = content if content.get("made_by") == MADE_BY else {}
        if "checksum" in metadata or metadata.get("made_by") == MADE_BY:
            kept = {k: v for k, v in metadata.items() if k != "checksum"}
            if metadata.get("checksum") != checksum(content, kept):
                raise ValueError("it is damaged: its checksum differs")
            notes = {k: json.loads(v) for k, v in kept.items() if k != "made_by"}
    images = images or {k: v for k, v in (notes.get("args", {}) | {**notes}).items()
                        if k in {*IMAGENET, "crop_pct"}}
    if not images:
        say(f"note: {source} does not say what images it expects; assumed are 224x224 pixels and "
            "ImageNet's mean and standard deviation", sys.stderr)
    return Source(source, weights, network, IMAGENET | images, notes)

def check_classes(source: Source, classes: list[str]) -> None:
    """Refuse a classifier for other classes; say which are assumed if the source names none."""
    known, count = source.notes.get("classes"), source.network["num_classes"]
    if count != len(classes) or known not in (None, classes):
        raise UserError(f"{source.name} has other classes or another order: {some(known or [])} "
                        f"({count}), here {some(classes)} ({len(classes)})")
    natural = sorted(classes, key=lambda name: [
        int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())])
    if not known:
        say(f"note: {source.name} does not name its classes; assumed are {classes[0]} (0), "
            f"{classes[1]} (1), ..., {classes[-1]} ({count - 1})" + (
                f". WARNING: not in timm's order, {some(natural)}; with weights that are, all "
                "results are wrong" if natural != classes == sorted(classes) else ""), sys.stderr)

def load_teacher(source: Source, run: "Run") -> Callable[[Tensor], Tensor]:
    """The source's network, as a function of images (b, 3, h, w) normalised for the student."""
    check_classes(source, run.data.classes)
    with naming(source.name):
        model = convnext.from_checkpoint(source.weights).requires_grad_(False)
    model = model.to(run.device, memory_format=torch.channels_last)
    stride = 8 * source.network["patch_size"]
    if (run.recipe.start_size or run.recipe.img_size) < stride:
        raise UserError(f"{source.name} takes images of {stride} or more pixels")
    mean, std = (torch.tensor(source.images[name], device=run.device) for name in ("mean", "std"))
    scale, shift = (rearrange(v, "c -> c 1 1")
                    for v in (run.data.std / std, (run.data.mean - mean) / std))
    return torch.no_grad()(lambda x: model(x * scale + shift))

# --- 8. Run -------------------------------------------------------------------------------------
def fan_in_init(model: convnext.ConvNeXt) -> None:
    """Draw all weights but the classifier's with standard deviation 1 / sqrt(fan_in), in place.
    With inputs of variance 1, a linear layer's outputs have the standard deviation of its weights
    times sqrt(fan_in). The paper's 0.02 makes that 0.55 at 768 channels, 0.20 at 96, and 0.13 at
    40. The two layers of a branch with 40 channels then shrink its input to 0.016, and it has to
    grow before it learns. Here each layer keeps the scale, at any width. The last layer's weights
    are divided by sqrt(2 · blocks), so that the sum of all branches stays near 1. Cutting the
    normal distribution at two standard deviations leaves 0.88 of these values."""
    blocks = sum(map(len, model.stages))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and name != "head.fc":
            std = module.weight[0].numel() ** -0.5
            if name.endswith("pwconv2"):
                std /= (2 * blocks) ** 0.5
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)

def pick_device(name: str) -> torch.device:
    try:
        found = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        return torch.empty(1, device=found if name == "auto" else name).device
    except Exception as error:  # each backend raises its own
        raise UserError(f"--device {name} cannot be used here ({reason(error)})") from error

def pick_precision(amp: str, device: torch.device) -> torch.dtype:
    """The type for matrix products and convolutions; the weights themselves stay in float32."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":  # where the hardware does not compute in bfloat16 it is slower
        has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
        amp = "bf16" if has_bf16 and device.type == "cpu" else "off"
    if amp == "fp16" and device.type != "cuda":
        raise UserError(f"--amp fp16 needs a CUDA GPU, not {device.type}; take bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]

class Run:
    """All that a training run consists of. `state` is what last.pt holds of it."""
    def __init__(self, recipe: Recipe, source: Source | None = None, resume: bool = False) -> None:
        self.recipe, self.folder = recipe, Path(recipe.output)
        self.device = pick_device(recipe.device)
        self.precision = pick_precision(recipe.amp, self.device)
        self.data = prepare_data(recipe, self.device, source)
        self.teacher = recipe.teacher and load_teacher(open_weights(recipe.teacher), self)
        self.epoch_steps = max(1, len(self.data.train) // recipe.batch_size)
        self.total = self.epoch_steps * recipe.epochs
        self.step = 0  # the number of the next one
        self.history: list[dict] = []  # a row per epoch, as in metrics.csv
        self.sums: dict[str, Any] = {"loss": torch.zeros(())}  # over the present epoch
        self.stopped_by = 0  # the signal that ends the run after the present step
        torch.manual_seed(recipe.seed)
        network = {"num_classes": len(self.data.classes), "patch_size": recipe.patch_size,
                   "layer_scale": recipe.layer_scale}
        if recipe.road:
            design = convnext.DESIGNS[recipe.road]
            with naming(f"--road {recipe.road} --width {recipe.width}"):
                self.model: nn.Module = convnext.roadmap_network(
                    design._replace(width=recipe.width or design.width), **network)
        else:
            create = convnext.create_convnext
            shape: tuple = (recipe.variant,)
            if recipe.depths:
                create, shape = convnext.ConvNeXt, (recipe.depths, recipe.dims)
            self.model = create(
                *shape, drop_path=recipe.drop_path,
                head_init_scale=recipe.head_init_scale, **network)
        self.model.to(memory_format=torch.channels_last)
        if recipe.init == "fan-in" and not recipe.road:
            fan_in_init(self.model)
        self.origin = self.load_initial(source) if source and not resume else ""
        if recipe.freeze_backbone:
            self.model.requires_grad_(False).head.fc.requires_grad_(True)
        self.macs = convnext.count_macs(self.model, recipe.img_size)
        if self.device.type == "cpu" and not recipe.compile:
            self.model = convnext.speed_up(self.model)
        self.model.to(self.device)
        # ema += (weights - ema) / horizon. The horizon is a share of the run: the usual decay of
        # 0.9999 looks back 10,000 steps, which is too far in a run of 20,000.
        average = swa_utils.get_ema_multi_avg_fn(1 - 1 / max(1, recipe.ema_horizon * self.total))
        # BatchNorm's statistics belong to the averaged weights; other buffers are constants.
        has_statistics = any(isinstance(m, nn.BatchNorm2d) for m in self.model.modules())
        self.ema = recipe.ema_horizon and swa_utils.AveragedModel(
            self.model, multi_avg_fn=average, use_buffers=has_statistics)
        self.optimizers = make_optimizers(self.model, recipe, self.precision)
        if self.precision == torch.half and len(self.optimizers) > 1:  # one could skip a step alone
            raise UserError("--optimizer muon does not work in float16: give --amp bf16 or off")
        # float16 alone has too small a range for gradients: they are scaled up, and back down.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.half)
        if resume:
            self.load_state(source.notes)
        if recipe.compile:
            self.model.compile()  # in place: the names in the checkpoint stay as they are

    def load_initial(self, source: Source) -> str:
        """Begin with the weights of a source, but without a classifier for other classes."""
        tensors, classes = source.weights.tensors, self.data.classes
        if (source.notes.get("classes", classes), source.network["num_classes"]) == (
                classes, len(classes)):
            check_classes(source, classes)
        else:
            tensors = {k: v for k, v in tensors.items() if not k.startswith("head.fc.")}
        with naming(source.name), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `describe` prints the report
            report = convnext.load_weights(self.model, source.weights._replace(tensors=tensors))
        if self.recipe.freeze_backbone and any("head." not in name for name in report.kept):
            raise UserError(f"--freeze-backbone would leave untrained: {some(report.kept)}")
        new = f"; new: {', '.join(report.kept)}" if report.kept else ""
        return f"{len(report.loaded)} parameters of {source.name}{new}"

    def measure(self) -> dict[str, float]:
        """The accuracy of the weights, and of their average, as columns of metrics.csv."""
        data, split = self.data, "val" if self.data.val else "test"
        models = {split: self.model} | ({f"{split}_ema": self.ema} if self.ema else {})
        return {f"{prefix}_{name}": value for prefix, model in models.items() for name, value in
                evaluate(model, data.val or data.test, data.mean, data.std, self.recipe.workers,
                         self.precision, stopped=lambda: self.stopped_by).items()}

    def parts(self) -> dict[str, Any]:
        """What has a state_dict, by its name in the checkpoint."""
        parts = {"model": self.model, "scaler": self.scaler, "ema": self.ema} | {
            type(optimizer).__name__: optimizer for optimizer in self.optimizers}
        return {name: part for name, part in parts.items() if part}

    def state(self) -> dict[str, Any]:
        """Plain data, which `torch.load(weights_only=True)` reads without running any code."""
        return {
            "made_by": MADE_BY, "args": asdict(self.recipe), "classes": self.data.classes,
            "mean": self.data.mean.tolist(), "std": self.data.std.tolist(),
            "fingerprint": self.data.fingerprint, "step": self.step, "history": self.history,
            "sums": self.sums, **{name: part.state_dict() for name, part in self.parts().items()}}

    def load_state(self, state: Mapping) -> None:
        if state["fingerprint"] != self.data.fingerprint:
            raise UserError("--resume needs the training images that the run began with: those in "
                            f"{self.recipe.data_dir} have other names, classes or contents")
        for name, part in self.parts().items():
            if state[name]:  # a scaler that was not needed has none
                part.load_state_dict(state[name])
        self.step, self.history, self.sums = state["step"], state["history"], state["sums"]
        self.sums["loss"] = self.sums["loss"].to(self.device)

@torch.no_grad()
def check_finite(run: Run) -> None:
    """Raise UserError once the loss or a weight is infinite or not a number."""
    loss = run.sums["loss"] / ((run.step - 1) % run.epoch_steps + 1)
    norm = nn.utils.get_total_norm(run.model.parameters())
    if not (loss + norm).isfinite():
        raise UserError(f"by step {run.step}, at lr {run.sums['lr']:.1e}, the mean loss became "
                        f"{loss:.3g} and the norm of the weights {norm:.3g}: try a lower --lr "
                        f"(or --muon-lr), --clip-grad 1 or --amp off. {run.folder} stays as it was")

def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Replace a file as a whole: a crash or a full disk leaves the old one as it was."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # PyTorch reports a full disk by a RuntimeError
        raise UserError(f"cannot write {path} ({reason(error)}); the old files stay") from error
    finally:
        temporary.unlink(missing_ok=True)

def save(run: Run) -> None:
    """Write best.pt if the held-out images choose it, at the end weights.safetensors, last.pt and
    metrics.csv: in this order, so that a run killed before last.pt writes all of them again."""
    check_finite(run)
    state, folder, history = run.state(), run.folder, run.history
    scores = [row.get("val_ema_top1" if run.ema else "val_top1", -1.0) for row in history] or [-1.0]
    if run.step == len(history) * run.epoch_steps and scores[-1] > max(scores[:-1], default=-1.0):
        write_file(folder / "best.pt", lambda path: torch.save(state, path))
    if len(history) == run.recipe.epochs:
        tensors = (run.ema.module if run.ema else run.model).state_dict()
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        notes = {k: json.dumps(state[k]) for k in ("args", "classes", "mean", "std")}
        notes["made_by"] = MADE_BY
        notes["checksum"] = checksum(tensors, notes)
        write_file(folder / "weights.safetensors", lambda path: save_file(tensors, path, notes))
    write_file(folder / "last.pt", lambda path: torch.save(state, path))
    columns = [*max(history, key=len, default={})]  # some rows have no evaluation
    lines = [columns, *([row.get(name, "") for name in columns] for row in history)]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    write_file(folder / "metrics.csv", lambda path: path.write_text(text))

def describe(run: Run) -> None:
    """Print what is about to happen, and note the settings in args.json."""
    r, data, parameters = run.recipe, run.data, [p.numel() for p in run.model.parameters()]
    write_file(run.folder / "args.json", lambda path: path.write_text(json.dumps(asdict(r))))
    say(f"model   {r.road or f'ConvNeXt-{r.variant}'}, patch size {r.patch_size}: "
        f"{sum(parameters):,} parameters, {run.macs / 1e9:.3f} GMACs at {r.img_size}x{r.img_size}\n"
        f"init    {run.origin or r.init_from or ('pytorch' if r.road else r.init)}\n"
        f"data    {r.dataset}: {len(data.train):,} training + {len(data.val or []):,} held-out + "
        f"{len(data.test):,} test images, {len(data.classes)} classes ({some(data.classes)})\n"
        f"device  {run.device}, {str(run.precision)[6:]}, torch {torch.__version__}\n"
        f"steps   {r.epochs} epochs x {run.epoch_steps} of {r.batch_size} images, {r.optimizer}, "
        f"lr {r.lr:g}, weight decay {r.weight_decay:g}, seed {r.seed}\nrun     {run.folder}")

@contextlib.contextmanager
def stop_signals(run: Run) -> Iterator[None]:
    """Let a signal end the run after the present step. A second Ctrl-C acts at once.
    SIGTERM and SIGUSR1 come from schedulers, SIGHUP from a closed terminal, all perhaps twice."""
    def receive(number: int, _frame: Any) -> None:
        run.stopped_by = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.ExitStack() as handlers:  # puts the former handlers back
        for name in SIGNALS:
            number = getattr(signal, name, None)  # nohup ignores SIGHUP
            if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                handlers.callback(signal.signal, number, signal.signal(number, receive))
        yield

def train(run: Run) -> None:
    """Train from where the run stands to its end or to a signal, and save after each epoch."""
    epochs, begun = run.recipe.epochs, run.step
    with stop_signals(run), tqdm(
            total=run.total, initial=run.step, unit="step", disable=None) as progress:
        while len(run.history) < epochs and not run.stopped_by:
            row = train_epoch(run, progress)
            if row and (row["epoch"] % run.recipe.eval_every == 0 or row["epoch"] == epochs):
                row |= run.measure()
            if not run.stopped_by:  # else --resume repeats the evaluation
                run.history.append(row)
                left = (epochs - row["epoch"]) * row["seconds"]  # at this epoch's image size
                say("  ".join(f"{name} {value:.4g}" for name, value in row.items()
                              if name not in ("step", "seconds") and "top5" not in name)
                    + f"  {left:.0f} s left")
            save(run)
        if run.step == begun:  # a complete run; one of its files may be missing
            save(run)

def report(name: str, model: nn.Module, recipe: Recipe, test: Images, mean: Tensor,
           std: Tensor) -> None:
    """Print the accuracy of a network on the test images."""
    for mirror in (False, True) if recipe.tta else (False,):
        loss, top1, top5 = evaluate(model, test, mean, std, recipe.workers,
                                    pick_precision(recipe.amp, mean.device), mirror).values()
        say(f"{name}{' with mirror images' if mirror else ''}: test loss {loss:.4f}  top-1 "
            f"{top1:.2f} %  top-5 {top5:.2f} %  of {len(test):,} images of {recipe.img_size} px")

def report_source(source: Source, recipe: Recipe) -> None:
    """Print the accuracy of a source's weights on the test images."""
    test = load_split(recipe, False, source.notes.get("classes"))
    check_classes(source, test.classes)
    with naming(source.name):
        model = convnext.from_checkpoint(source.weights)
    device = pick_device(recipe.device)
    model.to(device, memory_format=torch.channels_last)
    mean, std = (torch.tensor(source.images[name], device=device) for name in ("mean", "std"))
    report(source.name, model, recipe, test, mean, std)

# --- 9. Command line ----------------------------------------------------------------------------
FIELDS = {field.name: field for field in fields(Recipe)}
KINDS = {name: (*get_args(field.type), field.type)[0] for name, field in FIELDS.items()}
LISTS = {"depths", "dims"}  # of whole numbers
# Settings that may change on --resume, that --eval-only can take, and that --road has no use for.
ANY_TIME = {"resume", "data_dir", "workers", "device", "accumulate", "eval_every", "tta"}
EVALUATION = {"eval_only", "dataset", "data_dir", "img_size", "crop_pct", "skip_bad", "workers",
              "device", "amp", "tta"}
NO_ROAD = {"variant", "drop_path", "init", "head_init_scale", "init_from", "layer_decay"}

def flag(name: str) -> str:
    return "--" + name.replace("_", "-")

def complete(r: Recipe) -> None:
    """Fill in the defaults that follow from others, and check each value, wherever it comes from.
    Raises UserError for a value that is not allowed."""
    for name, value in (("warmup_epochs", r.epochs / 20), ("mix_off_epochs", r.epochs // 10)):
        setattr(r, name, value if getattr(r, name) is None else getattr(r, name))
    for name, about in FIELDS.items():
        value, allowed = getattr(r, name), about.metadata["allowed"]
        if name in LISTS:
            continue
        fine = isinstance(value, KINDS[name]) or value is about.default is None
        if fine and isinstance(allowed, tuple):
            fine = value is None or value in allowed
        elif fine and allowed and value is not None:
            low, high = map(float, allowed[1:-1].split(","))
            fine = (low <= value <= high and (value > low or allowed[0] == "[")
                    and (value < high or allowed[-1] == "]"))
        if not fine:
            what = {int: "a whole number in ", float: "a number in "}.get(KINDS[name], "one of ")
            raise UserError(f"{flag(name)} must be {what}{allowed}, not {value!r}")
    stages = len(r.dims) if r.dims else 4
    stride = 2 ** (stages - 1) * r.patch_size  # of the whole network
    for name, fine, allowed in (
            ("warmup_epochs", r.warmup_epochs < r.epochs, f"below --epochs, {r.epochs}"),
            ("min_lr", r.min_lr <= r.lr, f"up to --lr, {r.lr}"),
            ("accumulate", r.accumulate <= r.batch_size, f"up to --batch-size, {r.batch_size}"),
            ("img_size", r.img_size >= stride, f"{stride} or more at --patch-size {r.patch_size}"),
            ("start_size", r.start_size <= r.img_size and r.start_size % stride == 0,
             f"a multiple of {stride}, the network's stride, up to --img-size, {r.img_size}"),
            ("crop_padding", r.crop_padding < r.img_size, f"below --img-size, {r.img_size}")):
        if not fine:
            raise UserError(f"{flag(name)} must be {allowed}, not {getattr(r, name)}")

def parse(argv: list[str]) -> dict[str, Any]:
    """The command line -> what was typed, and nothing else: {"batch_size": 64, ...}."""
    parser = argparse.ArgumentParser(
        usage="python train.py [--option value ...]; --help lists the options",
        argument_default=argparse.SUPPRESS, allow_abbrev=False)  # --mix must not pass for --mixup
    for name, about in FIELDS.items():
        help_, allowed = about.metadata["help"], about.metadata["allowed"]
        if "group" in about.metadata:
            group = parser.add_argument_group(about.metadata["group"])
        how = {"action": argparse.BooleanOptionalAction} if KINDS[name] is bool else {
            "type": KINDS[name], "choices": allowed if isinstance(allowed, tuple) else None}
        if about.default not in (None, False):
            help_ += f"; default {about.default}"
        if name in LISTS:
            how = {"type": int, "nargs": "+"}
        short = [about.metadata["short"]] if "short" in about.metadata else []
        group.add_argument(flag(name), *short, help=help_, **how)
    # The authors write --drop_path.
    argv = [re.sub("^--[^=]+", lambda match: match[0].replace("_", "-"), word) for word in argv]
    given = vars(parser.parse_args(argv))
    if "" in given.values():  # from a shell variable that is not set
        parser.error("no value may be empty")
    return given

def refuse_contradictions(given: dict[str, Any], notes: Mapping[str, Any]) -> None:
    """Raise UserError for flags that cannot stand together."""
    saved, names, fast = notes.get("args", {}), given.keys(), given.get("recipe") == "fast"
    optimizer = given.get("optimizer", "muon" if fast else "adamw")
    changed = some([flag(k) for k in given if k not in ANY_TIME and saved.get(k) != given[k]])
    unused = some([flag(k) for k in given if k not in EVALUATION])
    tuned = given.get("recipe") == "finetune" or given.get("freeze_backbone")
    for wrong, text in (
            (len(names & {"resume", "eval_only", "init_from"}) > 1,
             "only one of --resume, --eval-only and --init-from can be given"),
            ("resume" in names and "step" not in notes, "--resume takes last.pt, of this version"),
            ("resume" in names and changed,
             f"--resume cannot change {changed}; a different run begins with --init-from"),
            ("eval_only" in names and unused, f"--eval-only trains nothing: leave out {unused}"),
            ("init_from" in names and (fast or given.get("init") == "fan-in"),
             "--recipe fast and --init fan-in begin with new weights, without --init-from"),
            (not names & {"init_from", "resume"} and tuned,
             "--recipe finetune and --freeze-backbone need weights: --init-from SOURCE"),
            ("road" in names and names & NO_ROAD,
             f"--road has no {some([flag(k) for k in given if k in NO_ROAD])}"),
            ("resume" not in names and "muon_lr" in names and optimizer != "muon",
             "--muon-lr needs --optimizer muon"),
            (given.get("recipe") == "finetune" and optimizer == "muon" and "muon_lr" not in names,
             "--recipe finetune has no learning rate for Muon: give --muon-lr, too"),
            (not names & {"road", "resume"} and "width" in names, "--width needs a --road"),
            (not names & {"teacher", "resume"} and names & {"distill_alpha", "distill_temperature"},
             "--distill-alpha and --distill-temperature need a --teacher")):
        if wrong:
            raise UserError(text)

def combine(given: dict[str, Any], source: Source | None = None) -> Recipe:
    """Merge all settings. Later ones win: defaults, the weights', the named recipe's, those typed.
    With --resume and --eval-only, the checkpoint's settings replace the named recipe's."""
    refuse_contradictions(given, source.notes if source else {})
    weights, named, name = {}, {}, given.get("recipe")
    if source:
        saved = source.notes.get("args", {"dataset": "imagenet"})
        weights = {k: v for k, v in (source.network | source.images).items() if k in (
            "variant", "patch_size", "layer_scale", "img_size", "crop_pct")}
        if given.get("img_size") not in (None, weights.get("img_size")):
            weights["crop_pct"] = None  # it belongs to the weights' own size
    if "resume" in given:
        named = saved | {"output": str(Path(given["resume"]).parent)}
    elif "eval_only" in given:
        named = {k: v for k, v in saved.items() if k in ("dataset", "data_dir", "skip_bad", "amp")}
    else:
        if name == "fast":  # its 24 pixels are for 32, and for a network with a stride of 8
            fits = given.get("img_size", 32) == 32
            named = FAST if fits else FAST | {"start_size": 0}
        elif name == "finetune":
            known = {"variant": Recipe.variant, "batch_size": Recipe.batch_size} | weights | given
            named = finetune(known["variant"], known["batch_size"])
        if given.get("road"):
            named = {k: v for k, v in named.items() if k not in NO_ROAD} | {"drop_path": 0.0}
        if given.get("freeze_backbone"):
            named = named | {"drop_path": 0.0}  # what does not learn needs no noise
        if name in ("fast", "finetune"):
            say(f"{name}: " + ", ".join(
                f"{flag(k)} {v}" for k, v in named.items() if k not in given))
    return Recipe(**weights | named | given)

def main(argv: list[str]) -> int:
    """Do what the command line says -> the exit code. Raises UserError and KeyboardInterrupt."""
    given = parse(argv)
    origin = given.get("resume") or given.get("eval_only") or given.get("init_from")
    source = open_weights(origin, "resume" in given) if origin else None
    recipe = combine(given, source)
    if "eval_only" in given:
        report_source(source, recipe)
        return 0
    recipe.output = recipe.output or time.strftime(
        f"runs/%Y%m%d-%H%M%S-{(recipe.road or recipe.variant).replace(' ', '-')}")
    folder, last = Path(recipe.output), Path(recipe.output) / "last.pt"
    if last.exists() and not ("resume" in given and last.samefile(origin)):
        raise UserError(f"{folder} holds a run: give --resume {last}, or another --output")
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # Linux would hand each step its memory anew, page by page and filled with zeros, which is a
        # quarter of the time on a CPU: keep it. The numbers are M_TRIM_THRESHOLD and M_MMAP_MAX.
        libc.mallopt(-1, 2**31 - 1), libc.mallopt(-4, 0)
    torch.set_float32_matmul_precision("high")  # TensorFloat-32, on GPUs that have it
    torch.backends.cudnn.benchmark = True  # few batch sizes: find the fastest kernels of each
    run = Run(recipe, source, "resume" in given)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            describe(run)
            train(run)
    except Timeout as error:
        raise UserError(f"another run is writing to {folder}") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # raised wherever this process was at the time
            raise
        raise UserError(f"{reason(error)}; try fewer --workers") from error
    if run.stopped_by:
        say(f"stopped; to go on: python train.py --resume {last}", sys.stderr)
        return 128 + run.stopped_by
    for path in (last, folder / "best.pt") if run.data.val else (last,):
        with naming(str(path)):
            run.load_state(convnext.read_file(path)[0])
        report(str(path), run.ema.module if run.ema else run.model, recipe, run.data.test,
               run.data.mean, run.data.std)
    return 0

def unfailing(method: Callable) -> Callable:
    """Ignore what goes wrong: a full disk under the log or a closed terminal must not end a run."""
    def call(*args: Any) -> None:
        with contextlib.suppress(OSError, ValueError):
            method(*args)
    return call

if __name__ == "__main__":
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
        stream.write, stream.flush = unfailing(stream.write), unfailing(stream.flush)
        setattr(sys, name, stream)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(f"train.py: error: {reason(error)}")
