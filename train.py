"""Train ConvNeXt on CIFAR-10, on a folder of images, or on shapes drawn on the spot.

    python train.py --variant tiny --epochs 100       # the full recipe; downloads CIFAR-10
    python train.py --recipe fast                     # a small network, for two CPU cores
    python train.py --dataset folder --data-dir DIR --img-size 224 --patch-size 4
    python train.py --init-from timm:convnext_tiny.fb_in22k --recipe finetune --dataset folder ...
    python train.py --teacher runs/NAME/weights.safetensors --variant atto ...    # distillation
    python train.py --resume runs/NAME/last.pt        # continue a run that was stopped
    python train.py --eval-only CHECKPOINT            # only measure the accuracy

The default recipe is the paper's for ImageNet (table 5), adapted to a hundred epochs of 32x32
images; README.md lists the differences and the measurements behind them. The file begins with what
learns, 1 to 4; the rest brings the images, keeps the files and reads the command line:

    1 Recipe          every setting with its default, and the named recipes
    2 Augmentation    a batch of bytes -> what the network sees
    3 Optimisation    learning rate, weight decay, optimisers, loss
    4 Training        the step, the epoch, the evaluation
    5 RandAugment     its fifteen operations
    6 Data            folders and data sets -> batches of bytes
    7 Weights         files and downloads -> weights, and what is known about them
    8 Run             its state, its folder, its log
    9 Command line    settings in their order of precedence; main
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from einops import rearrange, reduce, repeat
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import convnext

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# --- 1. Recipe ----------------------------------------------------------------------------------


def setting(default: Any, help_: str, **about: Any) -> Any:
    """A field of Recipe. `about`: its limits (least, above, most, below or choices), a short flag
    (also), and the title of the group of flags that it begins (group)."""
    return field(default=default, metadata={"help": help_, **about})


@dataclass
class Recipe:
    """Every setting with its default. Each is a flag: `batch_size` is --batch-size."""

    dataset: str = setting("cifar10", "images to train on", group="data", choices=(
        "cifar10", "cifar100", "food101", "imagenet", "folder", "synthetic"))
    data_dir: str = setting("data", "place of the data set. For --dataset folder it holds train/ "
                            "and test/ (or val/), each with one folder per class")
    img_size: int = setting(32, "side of the images in pixels. Up to 64x64 they are kept in memory,"
                            " else read in each epoch. With --init-from: the size of its images",
                            least=1)
    crop_pct: float | None = setting(
        None, "side of the square to evaluate on, as a share of the image's shorter side, above "
        "64x64. Default: 0.875; from 384x384 the whole image, squeezed", above=0, most=1)
    val_size: int = setting(0, "training images to hold out; they choose best.pt", least=0)
    skip_bad: bool = setting(False, "leave out images that cannot be read, instead of stopping")
    workers: int = setting(min(8, os.cpu_count() or 1), "processes that read images", least=0,
                           also="-j")

    crop_padding: int = setting(4, "largest shift of an image of up to 64x64, in pixels", least=0,
                                group="augmentation (0 turns a part off)")
    crop_scale: float = setting(0.08, "smallest area of a random crop, above 64x64, as a share of "
                                "the image", least=0, most=1)
    flip: float = setting(0.5, "probability of a mirror image", least=0, most=1)
    rand_augment: float = setting(9.0, "strength of RandAugment", least=0, most=10)
    random_erase: float = setting(0.25, "probability of an erased rectangle", least=0, most=1)
    mixup: float = setting(0.8, "alpha of MixUp", least=0)
    cutmix: float = setting(1.0, "alpha of CutMix", least=0)
    mix_prob: float = setting(1.0, "probability that a batch is mixed", least=0, most=1)
    mix_off_epochs: int | None = setting(
        None, "last epochs, in which no batch is mixed. Default: a tenth of the run", least=0)
    start_size: int = setting(0, "shrink the images to this side at the start of the run", least=0)
    start_share: float = setting(0.5, "share of the epochs at --start-size", least=0, most=1)

    variant: str = setting("tiny", "size of the network", group="network", also="--model",
                           choices=tuple(convnext.VARIANTS))
    # The paper has 4 and 1e-6. At 32x32 both of these learn faster; README.md has the tables.
    patch_size: int = setting(2, "side of the stem's patches", choices=(1, 2, 4))
    layer_scale: float | None = setting(
        None, "initial value of LayerScale; 0: none. Default: 0.1, and none in V2", least=0)
    drop_path: float = setting(0.1, "stochastic depth: probability to skip the last block; it "
                               "rises from 0 at the first", least=0, below=1)
    init: str = setting("paper", "initial weights: of standard deviation 0.02, or fan-in: larger "
                        "in narrow layers, so that small networks learn sooner",
                        choices=("paper", "fan-in"))
    head_init_scale: float = setting(1.0, "factor on the classifier's initial weights", least=0)

    init_from: str | None = setting(
        None, "begin with these weights: a file, an https address, timm:NAME or hf:REPO, in the "
        "layout of Meta, timm, torchvision, Hugging Face or this program", group="pretrained")
    freeze_backbone: bool = setting(False, "train the classifier alone")
    teacher: str | None = setting(None, "learn from this network's outputs, too (distillation); "
                                  "takes what --init-from takes")
    distill_alpha: float = setting(0.5, "the teacher's share of the loss", least=0, most=1)
    distill_temperature: float = setting(2.0, "divisor of both networks' logits", above=0)

    epochs: int = setting(100, "passes over the training images", least=1, group="optimisation")
    batch_size: int = setting(128, "images per step", least=1, also="-b")
    accumulate: int = setting(1, "parts per step: the same step in less memory", least=1)
    optimizer: str = setting("adamw", "muon: Muon for the matrices of the blocks, AdamW for the "
                             "rest", choices=("adamw", "muon"))
    lr: float = setting(1e-3, "highest learning rate", above=0)
    muon_lr: float = setting(0.02, "highest learning rate of Muon's matrices", above=0)
    min_lr: float = setting(1e-6, "last learning rate; Muon's falls in proportion", least=0)
    schedule: str = setting("cosine", "fall of the learning rate", choices=("cosine", "linear"))
    warmup_epochs: float | None = setting(
        None, "epochs in which the learning rate rises. Default: a twentieth of the run", least=0)
    layer_decay: float = setting(1.0, "factor on the learning rate from each layer to the one "
                                 "before", above=0, most=1)
    beta2: float = setting(0.999, "decay rate of AdamW's squared gradients", least=0, below=1)
    weight_decay: float = setting(0.05, "of matrices and filters", least=0, also="--wd")
    label_smoothing: float = setting(0.1, "part of each label given to all classes", least=0,
                                     below=1)
    clip_grad: float = setting(0.0, "largest norm of the gradient; 0: no limit", least=0)
    ema_horizon: float = setting(0.04, "share of the run that the average of the weights looks "
                                 "back over; 0: no average", least=0, below=1)

    amp: str = setting("auto", "number type of matrix products; off: float32. auto: bf16 where the "
                       "hardware has it, else fp16 (CUDA) or off", group="run",
                       choices=("auto", "bf16", "fp16", "off"))
    compile: bool = setting(False, "use torch.compile")
    device: str = setting("auto", "cuda, mps or cpu")
    seed: int = setting(0, "seed of all random numbers", least=0, most=2**32 - 1)
    eval_every: int = setting(1, "epochs from one evaluation to the next; the last epoch is always "
                              "evaluated", least=1)
    tta: bool = setting(False, "at the end, also report the mean logits of each image and its "
                        "mirror image")
    output: str | None = setting(None, "folder of the run. Default: runs/<time>-<variant>")

    def __post_init__(self) -> None:
        complete(self)  # the defaults that depend on other settings; the limits. See section 9.


# For a small network on two CPU cores; README.md shows what each of these gains.
FAST = {
    "variant": "atto", "patch_size": 1, "layer_scale": 0.0, "drop_path": 0.0, "init": "fan-in",
    "optimizer": "muon", "lr": 3e-3, "muon_lr": 0.02, "beta2": 0.95, "min_lr": 0.0,
    "weight_decay": 0.02, "schedule": "linear", "batch_size": 256, "epochs": 40,
    "label_smoothing": 0.1, "crop_padding": 4, "rand_augment": 5.0, "random_erase": 0.25,
    "mix_prob": 0.0, "ema_horizon": 0.0, "start_size": 24, "start_share": 0.5, "tta": True}


def finetune(variant: str, batch_size: int) -> dict[str, Any]:
    """From ImageNet-22K to ImageNet-1K (the paper's table 6). V2 gets the values of V1's sizes."""
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
# Whole batches on the training device, with different random numbers for each image. (torchvision's
# transforms draw once for a whole batch.) What selects images is drawn on the CPU: drawn on a GPU,
# it would have to be waited for.


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """(b,) -> (b, 1, 1, 1) on the device of x, to be combined with x."""
    return rearrange(values, "b -> b 1 1 1").to(x.device, non_blocking=True)


def crop_and_flip(x: Tensor, padding: int, flip: float) -> Tensor:
    """Shift each image by up to `padding` pixels, reflecting its edge, and mirror some of them.

    Computes which pixel goes where, and gathers once. Bytes (b, c, h, w) -> bytes (b, c, h, w).
    """
    b, c, h, w = x.shape

    def source(size: int) -> Tensor:  # (b, size): the row or column that each pixel comes from
        start = torch.randint(-padding, padding + 1, (b, 1))
        index = (start + torch.arange(size)).abs()  # reflected at 0: -1 becomes 1
        return size - 1 - (size - 1 - index).abs()  # and at size - 1: size becomes size - 2

    rows, columns = source(h), source(w)
    columns = torch.where(torch.rand(b, 1) < flip, columns.flip(1), columns)
    sample = rearrange(torch.arange(b), "b -> b 1 1 1")
    channel = rearrange(torch.arange(c), "c -> 1 c 1 1")
    rows, columns = rearrange(rows, "b h -> b 1 h 1"), rearrange(columns, "b w -> b 1 1 w")
    return x[tuple(i.to(x.device, non_blocking=True) for i in (sample, channel, rows, columns))]


def random_erase(x: Tensor, chance: float) -> Tensor:
    """Fill a random rectangle of some images with noise, in place (Zhong et al., 2017).

    Its area is 2 to 33 % of the image, its sides differ by a factor of up to 3.3. As x is
    normalised, standard normal noise is as bright as an image. (b, c, h, w) -> (b, c, h, w).
    """
    chosen = (torch.rand(len(x)) < chance).nonzero()[:, 0]
    n, h, w = len(chosen), *x.shape[2:]
    index = chosen.to(x.device, non_blocking=True)
    area = torch.empty(n).uniform_(0.02, 1 / 3) * h * w
    aspect = torch.empty(n).uniform_(math.log(0.3), math.log(1 / 0.3)).exp()
    height = (area * aspect).sqrt().round().clamp(1, h)
    width = (area / aspect).sqrt().round().clamp(1, w)
    top = (torch.rand(n) * (h - height + 1)).floor()
    left = (torch.rand(n) * (w - width + 1)).floor()
    top, left, height, width = (per_sample(v, x) for v in (top, left, height, width))
    row = rearrange(torch.arange(h, device=x.device), "h -> 1 1 h 1")
    column = rearrange(torch.arange(w, device=x.device), "w -> 1 1 1 w")
    erased = ((row >= top) & (row < top + height)) & ((column >= left) & (column < left + width))
    x[index] = torch.where(erased, torch.randn_like(x[index]), x[index])
    return x


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Bring each channel to mean 0 and standard deviation 1 over the data set. (b, c, h, w)"""
    return ((x - rearrange(mean, "c -> c 1 1")) / rearrange(std, "c -> c 1 1")).contiguous(
        memory_format=torch.channels_last)


def mixing(recipe: Recipe, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """MixUp or CutMix, at random, of images and the labels (b,) -> images, targets (b, classes)."""
    kinds = [make(alpha=alpha, num_classes=classes)
             for make, alpha in ((T.MixUp, recipe.mixup), (T.CutMix, recipe.cutmix)) if alpha]
    return T.RandomChoice(kinds)


def augment(recipe: Recipe, data: "Data", x: Tensor, labels: Tensor, mix: bool,
            size: int = 0) -> tuple[Tensor, Tensor]:
    """Bytes (b, 3, h, w) and labels (b,) -> what the network sees, and targets (b, classes).

    mix: whether MixUp and CutMix may be used. size: the side to shrink the images to, if any.
    """
    x = crop_and_flip(x, recipe.crop_padding if recipe.img_size <= SMALL else 0, recipe.flip)
    x = x.float() / 255
    if recipe.rand_augment:
        x = rand_augment(x, recipe.rand_augment)
    if size and size != recipe.img_size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    x = normalize(x, data.mean, data.std)
    if recipe.random_erase:
        x = random_erase(x, recipe.random_erase)
    if mix and (recipe.mixup or recipe.cutmix) and torch.rand(()) < recipe.mix_prob:
        return mixing(recipe, len(data.classes))(x, labels)
    return x, F.one_hot(labels, len(data.classes)).float()


# --- 3. Optimisation ----------------------------------------------------------------------------


def lr_at(step: int, total: int, warmup: int, peak: float, floor: float,
          schedule: str = "cosine") -> float:
    """The learning rate of step 0 ... total - 1: up in a line, down in half a cosine or a line.

    It depends on the step alone, so there is no scheduler whose state could be lost.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "linear":
        return floor + (peak - floor) * (1 - (step - warmup) / max(1, total - warmup))
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def layer_number(name: str, depths: tuple[int, ...]) -> int:
    """The layer of a parameter for layer-wise decay of the learning rate, from 0 for the stem.

    The third stage counts one layer per three blocks, each other stage is one layer together with
    the Downsample before it, and the head is the last. These are the groups of the authors'
    optim_factory.py (27 blocks) and layer_decay_optimizer_constructor.py (Tiny's 9 blocks).
    """
    fourth_stage = 3 + math.ceil(depths[2] / 3)
    if name.startswith("head."):
        return fourth_stage + 1
    part, stage, block = name.split(".")[:3]
    if part == "downsample_layers":
        return (0, 2, 3, fourth_stage)[int(stage)]
    return (1, 2, 3 + int(block) // 3, fourth_stage)[int(stage)]


def parameter_groups(model: convnext.ConvNeXt, weight_decay: float,
                     layer_decay: float = 1.0) -> list[dict]:
    """The parameters that train, by weight decay and by `lr_scale`, the factor on the rate.

    Only matrices and filters decay: norms, biases, LayerScale and GRN have one axis and do not.
    """
    depths, groups = tuple(map(len, model.stages)), {}
    head = layer_number("head.", depths)
    for decays in (True, False):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (parameter.ndim >= 2) == decays:
                lr_scale = layer_decay ** (head - layer_number(name, depths))
                group = groups.setdefault((decays, lr_scale), {
                    "params": [], "weight_decay": weight_decay * decays, "lr_scale": lr_scale})
                group["params"].append(parameter)
    return list(groups.values())


def make_optimizers(model: convnext.ConvNeXt, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or Muon for the matrices of the blocks, and AdamW for the rest.

    Muon makes each step of a matrix orthogonal: all directions are learned equally fast.
    """
    groups = parameter_groups(model, recipe.weight_decay, recipe.layer_decay)
    matrices = {p for name, p in model.named_parameters()
                if recipe.optimizer == "muon" and ".pwconv" in name and p.ndim == 2}

    def part(in_muon: bool, factor: float) -> list[dict]:
        chosen = [g | {"params": [p for p in g["params"] if (p in matrices) == in_muon],
                       "lr_scale": g["lr_scale"] * factor} for g in groups]
        return [group for group in chosen if group["params"]]

    optimizers = [torch.optim.AdamW(part(False, 1), lr=recipe.lr, betas=(0.9, recipe.beta2),
                                    fused=True)]
    if muon := part(True, recipe.muon_lr / recipe.lr):
        optimizers.append(torch.optim.Muon(muon, lr=recipe.muon_lr))
    return optimizers


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(teacher / T) ‖ softmax(logits / T)), both (b, classes).

    From Hinton et al., 2015. The teacher's small probabilities tell what a class resembles, and a
    T above 1 raises them. The gradients fall with 1 / T², hence the factor.
    """
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


def train_step(run: "Run", x: Tensor, y: Tensor) -> Tensor:
    """Update the weights once. Images (b, 3, h, w), targets (b, classes) -> the mean loss ()."""
    recipe, mean_loss = run.recipe, torch.zeros((), device=run.device)
    for xs, ys in zip(x.chunk(recipe.accumulate), y.chunk(recipe.accumulate)):
        with torch.autocast(run.device.type, run.precision, run.precision != torch.float32):
            logits = run.model(xs)
            answers = run.teacher(xs) if run.teacher else None
        loss = training_loss(recipe, logits.float(), ys, answers) * (len(xs) / len(x))
        run.scaler.scale(loss).backward()
        mean_loss += loss.detach()
    lr = run.lr_of(run.step)
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
    run.step += 1
    return mean_loss


def train_epoch(run: "Run", progress: tqdm) -> dict[str, Any]:
    """The rest of an epoch -> its row for metrics.csv, or {} if a signal stops it on the way.

    All random numbers follow from the seed and the epoch or step, so a resumed run draws the same.
    (The large factors keep the steps, epochs and images of any two seeds apart.)
    """
    recipe, sums, epoch = run.recipe, run.sums, len(run.history)
    done = run.step - epoch * run.steps
    loader = batches(run.data.train, recipe.batch_size, recipe.workers,
                     seed=-1_000_000_007 * recipe.seed - 10_000_019 * (epoch + 1), first=done,
                     pin=run.device.type == "cuda")
    if not done:
        sums |= {"loss": torch.zeros((), device=run.device), "seconds": 0.0, "waiting": 0.0}
    run.model.train()
    ended = time.perf_counter()
    for images, labels in loader:
        torch.manual_seed(1_000_000_007 * recipe.seed + run.step + 1)
        x, y = augment(
            recipe, run.data, images.to(run.device, non_blocking=True),
            labels.to(run.device, non_blocking=True),
            mix=epoch < recipe.epochs - recipe.mix_off_epochs,
            size=recipe.start_size if epoch < recipe.epochs * recipe.start_share else 0)
        sums["waiting"] += time.perf_counter() - ended  # on a GPU, for the launches only
        sums["loss"] += train_step(run, x, y)
        progress.update()
        if run.step % CHECK_EVERY == 0 or run.step % run.steps == 0:
            check_finite(run)  # waits for the GPU, so that the time is right
        before, ended = ended, time.perf_counter()
        sums["seconds"] += ended - before
        if run.stopped_by:
            break
    if run.step < (epoch + 1) * run.steps:
        return {}
    images = run.steps * min(recipe.batch_size, len(run.data.train))
    return {"epoch": epoch + 1, "step": run.step, "train_loss": sums["loss"].item() / run.steps,
            "lr": run.lr_of(run.step - 1), "seconds": sums["seconds"],
            "images_per_s": images / sums["seconds"],
            "data_share": sums["waiting"] / sums["seconds"]}


@torch.inference_mode()
def evaluate(model: nn.Module, images: "Images", mean: Tensor, std: Tensor, workers: int,
             precision: torch.dtype, tta: bool = False,
             stopped: Callable[[], Any] = lambda: False) -> dict[str, float]:
    """The mean cross-entropy, and the shares in % whose class is the likeliest, and among five.

    tta: average the logits of each image and its mirror image. Returns {} once stopped() is true.
    """
    model.eval()
    total = torch.zeros(3, device=mean.device)
    for x, labels in batches(images, 250, workers, pin=mean.is_cuda):
        if stopped():
            return {}
        x, labels = (t.to(mean.device, non_blocking=True) for t in (x, labels))
        with torch.autocast(mean.device.type, precision, precision != torch.float32):
            x = normalize(x / 255.0, mean, std)
            logits = (model(x) + model(x.flip(3))) / 2 if tta else model(x)
        logits = logits.float()
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


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    return warp(x, [angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0])


def sharpen(x: Tensor, amount: Tensor) -> Tensor:
    kernel = torch.ones(3, 3, device=x.device) / 13
    kernel[1, 1] *= 5
    blurred = x.clone()  # pixels at the edge have no full neighbourhood and stay as they are
    blurred[:, :, 1:-1, 1:-1] = F.conv2d(x, repeat(kernel, "u v -> c 1 u v", c=3), groups=3)
    return blend(x, blurred, amount)


def keep_bits(x: Tensor, bits: Tensor) -> Tensor:
    step = 2.0 ** (8 - bits)  # of the 8 bits of a pixel from 0 to 255
    return ((x * 255).round() / step).floor() * step / 255


# What the paper's "RandAugment (9, 0.5)" chooses from, with timm's ranges: at full strength 30
# degrees, 45 % of the side, a colour factor of 1 ± 0.9, and so on. x: (b, 3, h, w) from 0 to 1.
# m: (b, 1, 1, 1), the strength from -1 to 1; operations with one direction ignore its sign.
RAND_AUGMENT_OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto_contrast": lambda x, m: TF.autocontrast(x),
    "equalize": lambda x, m: TF.equalize(x),
    "invert": lambda x, m: 1 - x,
    "rotate": lambda x, m: rotate(x, math.radians(30) * m.flatten()),
    "posterize": lambda x, m: keep_bits(x, 4 - (4 * m.abs()).int()),
    "solarize": lambda x, m: torch.where((x * 255).round() < 256 - (256 * m.abs()).int(), x, 1 - x),
    "solarize_add": lambda x, m: torch.where(
        (x * 255).round() < 128, (x + (110 * m.abs()).int() / 255).clamp(max=1), x),
    "color": lambda x, m: blend(x, TF.rgb_to_grayscale(x), 0.9 * m),
    "contrast": lambda x, m: blend(
        x, reduce(TF.rgb_to_grayscale(x), "b c h w -> b 1 1 1", "mean"), 0.9 * m),
    "brightness": lambda x, m: blend(x, 0, 0.9 * m),
    "sharpness": lambda x, m: sharpen(x, 0.9 * m),
    "shear_x": lambda x, m: warp(x, [1, 0.3 * m.flatten(), 0], [0, 1, 0]),
    "shear_y": lambda x, m: warp(x, [1, 0, 0], [0.3 * m.flatten(), 1, 0]),
    "translate_x": lambda x, m: warp(x, [1, 0, 2 * 0.45 * m.flatten()], [0, 1, 0]),
    "translate_y": lambda x, m: warp(x, [1, 0, 0], [0, 1, 2 * 0.45 * m.flatten()])}


def rand_augment(x: Tensor, level: float) -> Tensor:
    """RandAugment (Cubuk et al., 2019) as the paper means it: timm's rand-m9-mstd0.5-inc1.

    Twice, each image draws one of the fifteen operations and applies it with probability 1/2, at a
    strength of N(level, 0.5) tenths of its largest. (torchvision's magnitude of 9 means 9 of 30,
    always applied.) x: (b, 3, h, w) from 0 to 1, changed in place.
    """
    for _ in range(2):
        choice = torch.randint(len(RAND_AUGMENT_OPS), (len(x),))
        choice[torch.rand(len(x)) < 0.5] = -1  # no operation
        strength = (level + 0.5 * torch.randn(len(x))).clamp(0, 10) / 10
        strength = torch.where(torch.rand(len(x)) < 0.5, strength, -strength)
        for index, operation in enumerate(RAND_AUGMENT_OPS.values()):
            if len(chosen := (choice == index).nonzero()[:, 0]):
                m = per_sample(strength[chosen], x)
                chosen = chosen.to(x.device, non_blocking=True)
                x[chosen] = operation(x[chosen], m)
    return x


# --- 6. Data ------------------------------------------------------------------------------------
# A data set is indexed by a list of numbers and returns a batch: bytes (b, 3, h, w), labels (b,).

SMALL = 64  # images of up to this side are kept in memory


class UserError(Exception):
    """A mistake or a failure that the user can mend. Its text is shown as one line."""


def reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def some(names: list[str], most: int = 4) -> str:
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


say = tqdm.write  # prints above the progress bar


@dataclass
class InMemory(Dataset):
    """Small images, decoded once."""

    images: Tensor  # (n, 3, h, w), bytes
    labels: Tensor  # (n,)
    classes: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]

    def part(self, indices: list[int]) -> "InMemory":
        return InMemory(*self[indices], self.classes)


@dataclass
class Pictures(Dataset):
    """Images of any size, read when they are needed; `cut` makes squares of them."""

    samples: list[tuple[Any, int]]  # (path or pixels (h, w, 3), label)
    classes: list[str]
    cut: Callable[[Image.Image], Image.Image]
    seed: int = 0  # of random cuts: an image's follows from it and the image's number alone

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor] | UserError:
        images = []
        for index in indices:
            item = self.samples[index][0]
            try:
                picture = as_shown(item)
            except Exception as error:  # noqa: BLE001, Pillow raises nearly anything
                # Raised here, it would bring along the traceback of a process that reads images.
                return UserError(f"cannot read the image {item} ({reason(error)}); --skip-bad "
                                 "leaves such images out")
            torch.manual_seed(self.seed - index)  # torchvision's transforms take no generator
            images.append(TF.pil_to_tensor(self.cut(picture)))
        return torch.stack(images), torch.tensor([self.samples[i][1] for i in indices])

    def part(self, indices: list[int]) -> "Pictures":
        return replace(self, samples=[self.samples[i] for i in indices])


Images = InMemory | Pictures


def as_shown(item: str | np.ndarray) -> Image.Image:
    """A picture as a viewer shows it, in RGB: upright, 16 bits scaled to 8, on a white ground."""
    picture = Image.open(item) if isinstance(item, str) else Image.fromarray(item)
    if picture.mode.startswith("I;16") or picture.mode == "I" and picture.format in ("PNG", "PPM"):
        picture = Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("no viewer knows which of its 32-bit values is white: convert it to 8 or "
                         "16 bits")
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def is_hidden(name: str) -> bool:
    """Whether other programs keep this for themselves: .git, @eaDir, #recycle, __MACOSX, ..."""
    return name.startswith((".", "@", "#", "__"))


def images_below(folder: Path, left_out: Counter) -> list[str]:
    """All images in a folder and its sub-folders, in a fixed order; counts what it leaves out.

    Linked folders are left out: they may lead to other classes, or in circles. Raises UserError
    for a folder that cannot be read.
    """
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename} ({error.strerror})")

    Image.init()
    known = {ext for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        for name in [*folders]:
            if is_hidden(name) or os.path.islink(os.path.join(place, name)):
                folders.remove(name)  # so that os.walk does not enter it
                left_out["hidden or linked folders"] += 1
        for name in files:
            extension = os.path.splitext(name)[1].lower()
            if is_hidden(name) or extension not in known:
                left_out[f"files that are hidden or no images ({extension or name})"] += 1
            else:
                paths.append((place, name))
    return [os.path.join(*path) for path in sorted(paths)]


def load_folder(recipe: Recipe, train: bool, classes: list[str] | None) -> Pictures:
    """The images in DIR/train, or DIR/test or DIR/val, in one folder per class.

    classes: the names to be expected, in their order. Raises UserError for a missing folder, an
    unknown class, and a class without training images.
    """
    place, parts = Path(recipe.data_dir), ("train",) if train else ("test", "val")
    root = next((place / part for part in parts if (place / part).is_dir()), None)
    if root is None:
        raise UserError(f"--data-dir {place} has no {'/ or '.join(parts)}/; it must hold train/ "
                        "and test/ (or val/), each with one folder per class")
    entries = sorted(root.iterdir())
    found = [entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)]
    left_out = Counter(e.name for e in entries if e.name not in found)
    names = classes or found
    if unknown := sorted(set(found) - set(names)):
        raise UserError(f"{root} has classes that training does not have: {', '.join(unknown)}")
    samples = [(path, names.index(name)) for name in names if name in found
               for path in images_below(root / name, left_out)]
    if left_out:
        counts = [f"{count} {what}" for what, count in left_out.most_common()]
        say(f"note: {root}: left out {some(counts, 9)}", sys.stderr)
    missing = [name for label, name in enumerate(names) if label not in dict(map(reversed, samples))]
    if missing and (train or not samples) or len(names) < 2:
        raise UserError(f"{root} has no images of {', '.join(missing) or 'a second class'}")
    if missing:
        say(f"note: {root} has no images of {', '.join(missing)}", sys.stderr)
    return Pictures(samples, names, evaluation_cut(recipe.img_size, recipe.crop_pct))


def load_torchvision(recipe: Recipe, train: bool) -> Images:
    """A data set of torchvision, downloaded if it is not there and may be (ImageNet may not)."""
    root, name, sets = recipe.data_dir, recipe.dataset, torchvision.datasets
    cut = evaluation_cut(recipe.img_size, recipe.crop_pct)
    try:
        if name == "imagenet":  # its names are not unique: two classes are cranes
            data = sets.ImageNet(root, "train" if train else "val")
            return Pictures(data.samples, data.wnids, cut)
        if name == "food101":
            data = sets.Food101(root, "train" if train else "test", download=True)
            return Pictures([*zip(map(str, data._image_files), data._labels)], data.classes, cut)
        data = {"cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100}[name](root, train, download=True)
    except (OSError, RuntimeError, ImportError) as error:
        archive = {"cifar10": "cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/",
                   "cifar100": "cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/",
                   "food101": "food-101.tar.gz from http://data.vision.ee.ethz.ch/cvl/",
                   "imagenet": "the development kit and both archives from https://image-net.org"}
        raise UserError(f"{name} could not be loaded ({reason(error)}). Put {archive[name]} into "
                        f"{root}/, or use --dataset folder or --dataset synthetic") from error
    if recipe.img_size != 32:
        return Pictures([*zip(data.data, data.targets)], data.classes, cut)
    images = rearrange(torch.from_numpy(data.data), "n h w c -> n c h w").contiguous()
    return InMemory(images, torch.tensor(data.targets), data.classes)


SHAPES = {  # inside or outside, for u and v from -1 to 1 across the shape
    "disk": lambda u, v: u**2 + v**2 < 0.8,
    "ring": lambda u, v: (u**2 + v**2 - 0.6).abs() < 0.25,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) < 0.8,
    "frame": lambda u, v: (torch.maximum(u.abs(), v.abs()) - 0.75).abs() < 0.15,
    "diamond": lambda u, v: u.abs() + v.abs() < 1,
    "triangle": lambda u, v: (u.abs() * 2 - v < 0.9) & (v < 0.8),
    "plus": lambda u, v: (torch.minimum(u.abs(), v.abs()) < 0.25) & (u.abs() + v.abs() < 1.2),
    "cross": lambda u, v: ((u.abs() - v.abs()).abs() < 0.3) & (u.abs() < 0.9),
    "rows": lambda u, v: (torch.sin(9 * v) > 0) & (u.abs() < 0.9) & (v.abs() < 0.9),
    "columns": lambda u, v: (torch.sin(9 * u) > 0) & (u.abs() < 0.9) & (v.abs() < 0.9)}


def draw_shapes(count: int, size: int, seed: int) -> InMemory:
    """Noisy pictures of the ten shapes at random places, sizes and colours; count: 10, 20, ..."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=generator)

    axis = torch.linspace(-1, 1, size)
    u = (rearrange(axis, "w -> 1 1 w") - uniform(-0.3, 0.3)) / uniform(0.4, 0.7)
    v = (rearrange(axis, "h -> 1 h 1") - uniform(-0.3, 0.3)) / uniform(0.4, 0.7)
    inside = torch.stack([shape(*torch.broadcast_tensors(u[k :: len(SHAPES)], v[k :: len(SHAPES)]))
                          for k, shape in enumerate(SHAPES.values())], 1)
    ground, ink = uniform(0, 0.4, 3), uniform(0.4, 0.6, 3)
    images = ground + ink * rearrange(inside.float(), "n k h w -> (n k) 1 h w")
    images += 0.08 * torch.randn(images.shape, generator=generator)
    labels = torch.arange(count) % len(SHAPES)
    return InMemory((images.clamp(0, 1) * 255).byte(), labels, [*SHAPES])


def evaluation_cut(size: int, crop_pct: float | None) -> T.Transform:
    """Make a square of this side from a picture of any size, as the authors do for evaluation."""
    bicubic = T.InterpolationMode.BICUBIC
    if size >= 384 and crop_pct is None:
        return T.Resize((size, size), interpolation=bicubic)
    share = 1 if size <= SMALL else crop_pct or 0.875  # 224 of 256
    return T.Compose([T.Resize(int(size / share), interpolation=bicubic), T.CenterCrop(size)])


def load_split(recipe: Recipe, train: bool, classes: list[str] | None = None) -> Images:
    """The training or the test images, as they are evaluated. classes: their order, if known."""
    if recipe.dataset == "synthetic":
        return draw_shapes(5000 if train else 1000, recipe.img_size, seed=int(train))
    by_folder = recipe.dataset == "folder"
    data = load_folder(recipe, train, classes) if by_folder else load_torchvision(recipe, train)
    if recipe.skip_bad and isinstance(data, Pictures):
        with ThreadPool(max(1, recipe.workers)) as pool:
            read = tqdm(pool.imap(lambda i: data[[i]], range(len(data))), "checking images",
                        len(data), disable=None, leave=False)
            good = [i for i, batch in enumerate(read) if not isinstance(batch, UserError)]
        if bad := [str(data.samples[i][0]) for i in sorted({*range(len(data))} - {*good})]:
            say(f"note: left out {len(bad)} of {len(data)} images: {some(bad)}", sys.stderr)
        data = data.part(good)
    if isinstance(data, InMemory) or recipe.img_size > SMALL:
        return data
    parts = [*tqdm(batches(data, 500, recipe.workers), "reading images", disable=None, leave=False)]
    images, labels = (torch.cat(part) for part in zip(*parts))
    return InMemory(images, labels, data.classes)


def leave_group(_worker: int) -> None:
    """Keep away signals to the whole group, such as Ctrl-C, from a process that reads images."""
    if hasattr(os, "setsid"):  # Windows has none
        os.setsid()


def batches(data: Images, batch_size: int, workers: int, *, seed: int | None = None,
            first: int = 0, pin: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in order; or, with a seed, an epoch of training from batch number `first` on.

    An epoch is shuffled and has no incomplete batch, unless that is the only one. pin: in memory
    that a GPU can read by itself.
    """
    order = torch.arange(len(data))
    if seed is not None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        order = order[: max(1, len(data) // batch_size) * batch_size]
    if isinstance(data, Pictures):
        data = replace(data, seed=seed or 0)
    loader = DataLoader(
        data, batch_size=None, sampler=[part.tolist() for part in order.split(batch_size)][first:],
        num_workers=workers if isinstance(data, Pictures) else 0, worker_init_fn=leave_group,
        pin_memory=pin)
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def channel_statistics(data: Images, workers: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,) of pixels from 0 to 1; of large images, of about 2,000."""
    if isinstance(data, Pictures):
        data = data.part(range(0, len(data), max(1, len(data) // 2000)))
    sums = [torch.cat([reduce(x / 255.0, "b c h w -> c", "mean"),
                       reduce((x / 255.0) ** 2, "b c h w -> c", "mean")]).double() * len(x)
            for x, _ in batches(data, 500, workers)]
    mean, mean_square = (sum(sums) / len(data)).chunk(2)
    std = (mean_square - mean**2).clamp(min=1e-6).sqrt()  # with a single colour: no division by 0
    return mean.float(), std.float()


def fingerprint(data: Images, root: str) -> str:
    """A hash of the images' order and labels, and of their pixels or, if large, their names."""
    digest = hashlib.sha256(json.dumps(data.classes).encode())
    if isinstance(data, InMemory):
        digest.update(data.images.numpy())
        digest.update(data.labels.numpy())
    for item, label in getattr(data, "samples", ()):
        digest.update(os.fsencode(os.path.relpath(item, root)) if isinstance(item, str) else item)
        digest.update(f"\n{label}\n".encode())
    return digest.hexdigest()


class Data(NamedTuple):
    train: Images
    val: Images | None  # held out of the training images, not augmented; may choose best.pt
    test: Images  # chooses nothing
    classes: list[str]
    mean: Tensor  # (3,), on the training device
    std: Tensor
    fingerprint: str  # of the training images, those held out included


def prepare_data(recipe: Recipe, device: torch.device,
                 statistics: tuple[list[float], list[float]] | None = None) -> Data:
    """Load all images. statistics: mean and standard deviation, if not the images' own."""
    plain, val = load_split(recipe, train=True), None
    train = plain
    if isinstance(plain, Pictures):  # the crops of large images are random as they are read
        train = replace(plain, cut=T.RandomResizedCrop(
            recipe.img_size, (recipe.crop_scale, 1), interpolation=T.InterpolationMode.BICUBIC))
    test = load_split(recipe, train=False, classes=plain.classes)
    if recipe.val_size:
        if recipe.val_size >= len(plain):
            raise UserError(f"--val-size must be below the {len(plain):,} training images")
        order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0)).tolist()
        val, train = plain.part(order[: recipe.val_size]), train.part(order[recipe.val_size :])
    mean, std = (map(torch.tensor, statistics) if statistics
                 else channel_statistics(plain, recipe.workers))
    return Data(train, val, test, plain.classes, mean.to(device), std.to(device),
                fingerprint(plain, recipe.data_dir))


# --- 7. Weights ---------------------------------------------------------------------------------

MADE_BY = "train.py, format 2"  # noted in this program's checkpoints; --resume takes no others
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "img_size": 224}


class Source(NamedTuple):
    """What a file or a download holds."""

    name: str
    weights: convnext.Weights  # the average of the weights, where there is one
    network: dict[str, Any]  # variant, patch_size, layer_scale, ...: inferred from the weights
    notes: dict[str, Any]  # args, classes, mean, std of a file of this program, or {}
    images: dict[str, Any]  # that the weights expect: mean, std, img_size and perhaps crop_pct
    state: Mapping  # everything in last.pt or best.pt, or {}


def own_notes(content: Mapping, metadata: Mapping[str, str], classes: int) -> dict[str, Any]:
    """What this program noted beside its weights; {} if any of it cannot be this program's."""
    try:
        notes = {k: json.loads(metadata[k]) if metadata else content[k]
                 for k in ("args", "classes", "mean", "std")}
        names = {name for name in notes["classes"] if isinstance(name, str)}
        fine = len(names) == len(notes["classes"]) == classes and isinstance(notes["args"], dict)
        for key, least in (("mean", 0), ("std", 1e-9)):
            fine &= len(notes[key]) == 3 and all(least <= value <= 1 for value in notes[key])
    except (KeyError, TypeError, ValueError):
        return {}
    return notes if fine else {}


def open_weights(source: str) -> Source:
    """Read a file or a download in any layout. Raises UserError unless it holds a ConvNeXt."""
    remote = source.startswith(convnext.DOWNLOADS)
    try:
        path, images = convnext.download(source) if remote else (source, {})
        content, metadata = convnext.read_file(path)
        weights = convnext.read_weights(content)
        network = convnext.infer_architecture(weights)
        if network["in_channels"] != 3:
            raise ValueError(f"the network takes {network['in_channels']} channels, not 3")
    except Exception as error:
        # What downloads raise depends on the client.
        if not (remote or isinstance(error, OSError | ValueError | ImportError)):
            raise
        text = "there is no such file" if isinstance(error, FileNotFoundError) else reason(error)
        raise UserError(f"{source}: {text}") from error
    if notes := own_notes(content, metadata, network["num_classes"]):
        images = {k: v for k, v in notes["args"].items() if k in ("img_size", "crop_pct")} | {
            k: notes[k] for k in ("mean", "std")}
    elif not images:
        say(f"note: {source} does not say which images it expects; assumed are 224x224 pixels and "
            "ImageNet's mean and standard deviation", sys.stderr)
    return Source(source, weights, network, notes, IMAGENET | images,
                  content if content.get("made_by") == MADE_BY else {})


def check_classes(source: Source, classes: list[str]) -> None:
    """Refuse a classifier for other classes; say which are assumed where the source names none."""
    known, count = source.notes.get("classes"), source.network["num_classes"]
    if count != len(classes) or known not in (None, classes):
        theirs = some(known) if known else "without names"
        raise UserError(f"{source.name} is for other classes or another order of them: {theirs} "
                        f"({count}); here are {some(classes)} ({len(classes)})")
    natural = sorted(classes, key=lambda name: [
        int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())])
    if known is None:
        warning = f". WARNING: if it was trained by a program that sorts {some(natural)}, as timm " \
            "does, the results are wrong; name the folders so that both orders are the same"
        say(f"note: {source.name} does not name its classes; assumed are 0 = {classes[0]}, 1 = "
            f"{classes[1]}, ..., {count - 1} = {classes[-1]}"
            f"{warning if natural != classes == sorted(classes) else ''}", sys.stderr)


def load_teacher(source: Source, run: "Run") -> Callable[[Tensor], Tensor]:
    """The source's network as a function of images (b, 3, h, w), normalised for the student."""
    check_classes(source, run.data.classes)
    model = convnext.from_checkpoint(source.weights).requires_grad_(False)
    model = model.to(run.device, memory_format=torch.channels_last)
    if (run.recipe.start_size or run.recipe.img_size) < model.total_stride:
        raise UserError(f"{source.name} takes images of {model.total_stride} or more pixels")
    mean, std = (torch.tensor(source.images[name], device=run.device) for name in ("mean", "std"))
    scale, shift = (rearrange(v, "c -> c 1 1")
                    for v in (run.data.std / std, (run.data.mean - mean) / std))

    @torch.no_grad()
    def teacher(x: Tensor) -> Tensor:
        return model(x * scale + shift)  # normalised for the teacher
    return teacher


# --- 8. Run -------------------------------------------------------------------------------------


def fan_in_init(model: convnext.ConvNeXt) -> None:
    """Draw all weights but the classifier's with standard deviation 1 / sqrt(fan_in), in place.

    For inputs of variance 1, the outputs of a linear layer have the standard deviation of its
    weights times sqrt(fan_in). The paper's 0.02 makes that 0.55 at 768 channels, 0.20 at 96, and
    0.13 at 40. Two such layers follow each other in a branch, so the branches of a narrow network
    begin almost switched off, and the optimiser has to grow them first. Here it is 1 at any width.
    The last layer of each branch is divided by sqrt(2 · blocks): the sum of all branches, which is
    what the head sees, then does not grow with the depth.
    """
    blocks = sum(map(len, model.stages))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and name != "head.fc":
            std = module.weight[0].numel() ** -0.5
            if name.endswith("pwconv2"):
                std /= (2 * blocks) ** 0.5
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)


def build_model(recipe: Recipe, classes: int) -> convnext.ConvNeXt:
    model = convnext.create_convnext(
        recipe.variant, num_classes=classes, patch_size=recipe.patch_size,
        drop_path=recipe.drop_path, layer_scale=recipe.layer_scale,
        head_init_scale=recipe.head_init_scale).to(memory_format=torch.channels_last)
    if recipe.init == "fan-in":
        fan_in_init(model)
    return model


def place(model: convnext.ConvNeXt, recipe: Recipe, device: torch.device) -> convnext.ConvNeXt:
    if device.type == "cpu" and not recipe.compile:
        model = convnext.speed_up(model)
    return model.to(device)


def pick_device(name: str) -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    try:
        return torch.empty(1, device=(found or "cpu") if name == "auto" else name).device
    except Exception as error:  # each backend has its own
        raise UserError(f"--device {name} cannot be used here ({reason(error)})") from error


def pick_precision(amp: str, device: torch.device) -> torch.dtype:
    """The type for matrix products and convolutions; the weights themselves stay in float32."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":  # where the hardware does not compute in bfloat16 it is slower
        native = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16")
        amp = "bf16" if native else "off"
    if amp == "fp16" and device.type != "cuda":
        raise UserError(f"--amp fp16 needs a CUDA GPU, not {device.type}; take bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]


class Run:
    """All that a training run consists of; `state` is what last.pt holds of it."""

    def __init__(self, recipe: Recipe, source: Source | None = None, resume: bool = False) -> None:
        self.recipe, self.folder = recipe, Path(recipe.output)
        self.device = pick_device(recipe.device)
        self.precision = pick_precision(recipe.amp, self.device)
        self.data = prepare_data(recipe, self.device,
                                 source and (source.images["mean"], source.images["std"]))
        self.teacher = recipe.teacher and load_teacher(open_weights(recipe.teacher), self)
        self.steps = max(1, len(self.data.train) // recipe.batch_size)  # per epoch
        self.total = self.steps * recipe.epochs
        self.step = 0  # number of the next step
        self.history: list[dict] = []  # a row per epoch, as in metrics.csv
        self.sums: dict[str, Any] = {}  # over the present epoch: loss, seconds, waiting
        self.stopped_by = 0  # the signal that ends the run after the present step
        torch.manual_seed(recipe.seed)
        self.model = place(build_model(recipe, len(self.data.classes)), recipe, self.device)
        self.report = self.load_initial(source) if source and not resume else None
        if recipe.freeze_backbone:
            self.model.requires_grad_(False).head.fc.requires_grad_(True)
        # ema += (weights - ema) / horizon. The horizon is a share of the run: the usual decay of
        # 0.9999 looks back 10,000 steps, which is too far in a run of 20,000.
        average = get_ema_multi_avg_fn(1 - 1 / max(1.0, recipe.ema_horizon * self.total))
        self.ema = AveragedModel(self.model, multi_avg_fn=average).eval() if (
            recipe.ema_horizon) else None
        self.optimizers = make_optimizers(self.model, recipe)
        # float16 alone has too small a range for gradients: they are scaled up, and back down.
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.precision == torch.float16)
        if resume:
            self.load_state(source.state)
        if recipe.compile:
            self.model.compile()  # in place: the names in the checkpoint stay as they are

    def lr_of(self, step: int) -> float:
        r = self.recipe
        return lr_at(
            step, self.total, round(self.steps * r.warmup_epochs), r.lr, r.min_lr, r.schedule)

    def load_initial(self, source: Source) -> convnext.Report:
        """Begin with the weights of a source, without a classifier for other classes."""
        weights, classes = source.weights, self.data.classes
        if source.notes.get("classes", classes) == classes and (
                source.network["num_classes"] == len(classes)):
            check_classes(source, classes)
        else:
            weights = weights._replace(tensors={
                k: v for k, v in weights.tensors.items() if not k.startswith("head.fc.")})
        try:
            with warnings.catch_warnings(action="ignore"):  # `describe` prints the report
                report = convnext.load_weights(self.model, weights)
        except ValueError as error:
            raise UserError(f"{source.name}: {reason(error)}") from error
        new = [line for line in report.kept if not line.startswith("head.")]
        if self.recipe.freeze_backbone and new:
            raise UserError("--freeze-backbone would leave untrained what does not come from "
                            f"{source.name}: {', '.join(new)}")
        return report

    def measure(self, split: str, images: Images) -> dict[str, float]:
        """The accuracy of the weights, and of their average, as columns of metrics.csv."""
        columns = {}
        for prefix, model in ((split, self.model), (f"{split}_ema", self.ema)):
            result = model and evaluate(
                model, images, self.data.mean, self.data.std, self.recipe.workers, self.precision,
                stopped=lambda: self.stopped_by)
            columns |= {f"{prefix}_{name}": value for name, value in (result or {}).items()}
        return columns

    def state(self) -> dict:
        """Plain data, which `torch.load(weights_only=True)` reads without running any code."""
        return {
            "made_by": MADE_BY, "args": asdict(self.recipe), "classes": self.data.classes,
            "mean": self.data.mean.tolist(), "std": self.data.std.tolist(),
            "fingerprint": self.data.fingerprint, "step": self.step, "history": self.history,
            "sums": self.sums, "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict()}

    def load_state(self, state: Mapping) -> None:
        if state["fingerprint"] != self.data.fingerprint:
            raise UserError("--resume needs the training images that the run began with; those in "
                            f"{self.recipe.data_dir} have other names, classes or contents")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if state["scaler"]:  # in float16
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.history, self.sums = state["step"], state["history"], state["sums"]
        self.sums["loss"] = self.sums["loss"].to(self.device)
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(self.step)  # at 0 the next update would copy, not average


@torch.no_grad()
def check_finite(run: Run) -> None:
    """Raise UserError once the loss or a weight is infinite or not a number."""
    epoch, done = divmod(run.step - 1, run.steps)
    for name, value in (("loss", run.sums["loss"] / (done + 1)),
                        ("norm of the weights", nn.utils.get_total_norm(run.model.parameters()))):
        if not value.isfinite() or run.scaler.is_enabled() and run.scaler.get_scale() < 1:
            raise UserError(
                f"the {name} is {value.item()}, or no gradient fits into float16, at step "
                f"{done + 1} of epoch {epoch + 1} and lr {run.lr_of(run.step - 1):.1e}: try a lower "
                f"--lr, --clip-grad 1, or --amp off. {run.folder} stays as it was before")


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Replace a file as a whole: a crash or a full disk leaves the old one as it was."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # PyTorch reports a full disk by a RuntimeError
        raise UserError(f"cannot write {path} ({reason(error)}); the files of the last epoch stay. "
                        "Make room and use --resume") from error
    finally:
        temporary.unlink(missing_ok=True)


def save(run: Run) -> None:
    """Write best.pt if the held-out images choose it, weights.safetensors at the end, last.pt and
    metrics.csv; in this order, so that a run killed before last.pt repeats all of it."""
    check_finite(run)
    state, folder = run.state(), run.folder
    scores = [row.get("val_ema_top1" if run.ema else "val_top1", -1.0) for row in run.history]
    if run.step == len(run.history) * run.steps and scores[-1] > max(scores[:-1], default=-1.0):
        write_file(folder / "best.pt", lambda path: torch.save(state, path))
    if len(run.history) == run.recipe.epochs:
        tensors = {k: v.cpu().contiguous() for k, v in (state["ema"] or state["model"]).items()}
        notes = {k: json.dumps(state[k]) for k in ("made_by", "args", "classes", "mean", "std")}
        write_file(folder / "weights.safetensors", lambda path: save_file(tensors, path, notes))
    write_file(folder / "last.pt", lambda path: torch.save(state, path))
    columns = [*max(run.history, key=len, default={})]  # not every row has an evaluation
    lines = [columns, *([row.get(name, "") for name in columns] for row in run.history)]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    write_file(folder / "metrics.csv", lambda path: path.write_text(text))


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Make the folder of a run and lock it against a second run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115, closed, and so unlocked, below or by kill
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in folder.glob("*.tmp"):  # by a killed run
            left.unlink()
    except BlockingIOError as error:
        raise UserError(f"another run is writing to {folder}, or was killed seconds ago") from error
    except OSError as error:
        raise UserError(f"cannot write to --output {folder} ({error.strerror})") from error
    with lock:
        try:
            yield
        finally:
            if [path.name for path in folder.iterdir()] == [".lock"]:  # nothing came of the run
                shutil.rmtree(folder, ignore_errors=True)


def describe(run: Run) -> None:
    """Print what is about to happen, and note it in the run folder."""
    recipe, data, device = run.recipe, run.data, run.device
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    text = json.dumps({"argv": sys.argv, "args": asdict(recipe), "versions": versions}, indent=2)
    write_file(run.folder / "args.json", lambda path: path.write_text(text + "\n"))
    with torch.device("meta"):
        macs = convnext.count_macs(build_model(recipe, len(data.classes)), recipe.img_size)
    size = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    lines = [
        f"model   ConvNeXt-{recipe.variant}, patch size {recipe.patch_size}: {size:,} parameters"
        f"{f' ({trained:,} trained)' if trained < size else ''}, {macs / 1e9:.3f} GMACs at "
        f"{recipe.img_size}x{recipe.img_size}",
        f"init    {recipe.init_from}: {run.report}" if run.report else "",
        f"teacher {recipe.teacher}, alpha {recipe.distill_alpha:g}, temperature "
        f"{recipe.distill_temperature:g}" if recipe.teacher else "",
        f"data    {recipe.dataset}: {len(data.train):,} training"
        f"{f' + {len(data.val):,} held-out' if data.val else ''} + {len(data.test):,} test images, "
        f"{len(data.classes)} classes ({some(data.classes)})",
        f"device  {device.type} ({name}), {str(run.precision)[6:]}, torch {torch.__version__}"
        f"{', compiled' if recipe.compile else ''}",
        f"steps   {recipe.epochs} epochs x {run.steps} of {recipe.batch_size} images, lr "
        f"{recipe.lr:g}, weight decay {recipe.weight_decay:g}, seed {recipe.seed}",
        f"run     {run.folder}"]
    say("\n".join(filter(None, lines)))


def log(run: Run, seconds_left: float) -> None:
    """Print the newest row of the history."""
    row, split = run.history[-1], "val" if run.data.val else "test"
    results = ""
    if f"{split}_loss" in row:
        results = f"  {split} loss {row[f'{split}_loss']:.3f}  top-1 {row[f'{split}_top1']:5.2f} %"
    if f"{split}_ema_top1" in row:
        results += f"  EMA {row[f'{split}_ema_top1']:5.2f} %"
    minutes, seconds = divmod(round(seconds_left), 60)
    say(f"epoch {row['epoch']:3}/{run.recipe.epochs}  lr {row['lr']:.1e}  train loss "
        f"{row['train_loss']:.3f}{results}  {row['images_per_s']:5.0f} img/s  "
        f"data {row['data_share']:2.0%}  {minutes}:{seconds:02} left")


@contextlib.contextmanager
def stop_signals(run: Run) -> Iterator[None]:
    """Let a signal end the run after the present step. A second Ctrl-C acts at once.

    SIGTERM and SIGUSR1 come from schedulers, SIGHUP from a terminal that closes (unless nohup had
    it ignored). These may come twice, so the second has no effect.
    """
    def receive(number: int, _frame: Any) -> None:
        run.stopped_by = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with contextlib.ExitStack() as handlers:  # when closed it restores the former handlers
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows lacks the last two
            if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                handlers.callback(signal.signal, number, signal.signal(number, receive))
        yield


def train(run: Run) -> None:
    """Train from where the run stands to its end, or until a signal stops it; save each epoch."""
    recipe, data, begun, started = run.recipe, run.data, run.step, time.perf_counter()
    with stop_signals(run), tqdm(
            total=run.total, initial=run.step, unit="step", disable=None) as progress:
        while len(run.history) < recipe.epochs and not run.stopped_by:
            row = train_epoch(run, progress)
            if row and (row["epoch"] % recipe.eval_every == 0 or row["epoch"] == recipe.epochs):
                row |= run.measure("val", data.val) if data.val else run.measure("test", data.test)
            if not run.stopped_by:  # an epoch whose evaluation was stopped is evaluated on resume
                run.history.append(row)
            save(run)
            if not run.stopped_by:
                a_step = (time.perf_counter() - started) / max(1, run.step - begun)
                log(run, a_step * (run.total - run.step))


def report(source: Source, recipe: Recipe, test: Images) -> None:
    """Print the accuracy of the weights in a source on the test images, and of their average."""
    check_classes(source, test.classes)
    device = pick_device(recipe.device)
    mean, std = (torch.tensor(source.images[name], device=device) for name in ("mean", "std"))
    model = place(convnext.from_checkpoint(source.weights), recipe, device)
    kinds = {"raw": source.state["model"], "EMA": source.state["ema"]} if source.state else {
        "weights": source.weights}
    for title, weights in kinds.items():
        if weights is not None:
            convnext.load_weights(model, weights, strict=True)
            for mirror in (False, True)[: 1 + recipe.tta]:
                result = evaluate(model, test, mean, std, recipe.workers,
                                  pick_precision(recipe.amp, device), tta=mirror)
                say(f"{source.name} ({title}{', with mirror images' if mirror else ''}): test loss "
                    f"{result['loss']:.4f}  top-1 {result['top1']:.2f} %  top-5 "
                    f"{result['top5']:.2f} %  of {len(test):,} images, "
                    f"{recipe.img_size}x{recipe.img_size}")


# --- 9. Command line ----------------------------------------------------------------------------

ANY_TIME = {  # may be given beside --resume, since it does not change what is learned
    "data_dir", "workers", "device", "accumulate", "eval_every", "tta"}
EVALUATION = {  # may be given beside --eval-only
    "dataset", "data_dir", "img_size", "crop_pct", "skip_bad", "workers", "device", "amp", "tta"}
FIELDS = {f.name: f for f in fields(Recipe)}
KINDS = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}


def kind(name: str) -> type:
    """The type of a setting, for `float | None` float."""
    return next(t for t in (*get_args(FIELDS[name].type), FIELDS[name].type) if t in KINDS)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def complete(recipe: Recipe) -> None:
    """Fill in the defaults that depend on other settings; raise UserError for what is not allowed.

    This holds wherever a value comes from, be it the command line or a checkpoint.
    """
    for name, about in ((name, f.metadata) for name, f in FIELDS.items()):
        value, choices = getattr(recipe, name), about.get("choices")
        least, above = about.get("least", -math.inf), about.get("above", -math.inf)
        most, below = about.get("most", math.inf), about.get("below", math.inf)
        fine = isinstance(value, kind(name)) and (value in choices if choices else kind(name) in (
            str, bool) or least <= value <= most and above < value < below)
        if not fine and not value is FIELDS[name].default is None:
            limits = [f"{k} {about[k]}" for k in ("least", "above", "most", "below") if k in about]
            allowed = f"one of {some(choices, 99)}" if choices else ", ".join(
                [KINDS[kind(name)], *limits])
            raise UserError(f"{flag(name)} must be {allowed}, not {value!r}")
    if recipe.layer_scale is None:
        recipe.layer_scale = 0.0 if convnext.VARIANTS[recipe.variant].grn else 0.1
    if recipe.warmup_epochs is None:
        recipe.warmup_epochs = recipe.epochs / 20
    if recipe.mix_off_epochs is None:
        recipe.mix_off_epochs = recipe.epochs // 10
    stride = 8 * recipe.patch_size  # of the whole network
    for name, fine, allowed in (
        ("warmup_epochs", recipe.warmup_epochs < recipe.epochs, f"below --epochs {recipe.epochs}"),
        ("min_lr", recipe.min_lr <= recipe.lr, f"up to --lr {recipe.lr}"),
        ("accumulate", recipe.accumulate <= recipe.batch_size, "up to --batch-size"),
        ("img_size", recipe.img_size >= stride, f"{stride} or more at this --patch-size"),
        ("start_size", recipe.start_size == 0 or stride <= recipe.start_size <= recipe.img_size,
         f"0, or from {stride} to --img-size"),
        ("crop_padding", recipe.crop_padding < recipe.img_size, "below --img-size"),
    ):
        if not fine:
            raise UserError(f"{flag(name)} must be {allowed}, not {getattr(recipe, name)}")


def parse(argv: list[str]) -> dict[str, Any]:
    """The command line -> what was typed, and nothing else: {"batch_size": 64, ...}."""
    parser = argparse.ArgumentParser(
        usage="python train.py [--option value ...]; --help lists the options",
        description=__doc__.partition("\n")[0], argument_default=argparse.SUPPRESS,
        allow_abbrev=False)  # --mix must not pass for --mixup
    group = parser.add_argument_group("what to do, other than to begin a run")
    group.add_argument("--resume", metavar="LAST.PT", help="continue this run to its end")
    group.add_argument("--eval-only", metavar="SOURCE", help="measure the accuracy of last.pt, "
                       "best.pt, weights.safetensors, or of anything that --init-from takes")
    group.add_argument("--recipe", choices=("scratch", "finetune", "fast"), help="other defaults. "
                       "finetune: for --init-from; fast: a small network on two CPU cores")
    for name, about in ((name, f.metadata) for name, f in FIELDS.items()):
        if "group" in about:
            group = parser.add_argument_group(about["group"])
        default = FIELDS[name].default
        text = about["help"].replace("%", "%%") + (
            "" if default in (None, False) else f" (default: {default})")
        how = {"action": argparse.BooleanOptionalAction} if kind(name) is bool else {
            "type": kind(name), "choices": about.get("choices"),
            "metavar": "NAME" if name == "variant" else None}
        group.add_argument(flag(name), *filter(None, [about.get("also")]), help=text, **how)
    # The authors write --drop_path.
    argv = [re.sub("^--[^=]+", lambda match: match[0].replace("_", "-"), word) for word in argv]
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if value == "":  # as from a shell variable that is not set
            parser.error(f"{flag(name)} must not be empty")
    return given


def refuse_beside(given: dict[str, Any], action: str, allowed: set[str], hint: str) -> None:
    if unfit := [flag(name) for name in given if name not in allowed | {action}]:
        raise UserError(f"{', '.join(unfit)} cannot be given beside {flag(action)}: {hint}")


def combine(given: dict[str, Any], source: Source | None = None) -> Recipe:
    """All settings, in their order of precedence, from what was typed and from the weights."""
    typed = {name: value for name, value in given.items() if name in FIELDS}
    if "resume" in given:
        saved = {k: v for k, v in source.notes["args"].items() if k in FIELDS}
        saved["output"] = str(Path(given["resume"]).parent)
        changed = {k: v for k, v in given.items() if k not in saved or saved[k] != v}
        refuse_beside(changed, "resume", ANY_TIME, "the run keeps its settings. A longer or "
                      f"different run begins with --init-from {given['resume']}")
        return Recipe(**saved | typed)
    weights = {}
    if source:
        weights = {k: source.network[k] for k in ("variant", "patch_size", "layer_scale")} | {
            k: v for k, v in source.images.items() if k in ("img_size", "crop_pct")}
        if typed.get("img_size", weights["img_size"]) != weights["img_size"]:
            weights.pop("crop_pct", None)  # it is meant for the weights' own size
    if "eval_only" in given:
        refuse_beside(given, "eval_only", EVALUATION, "it changes nothing in an evaluation")
        saved = {k: v for k, v in source.notes.get("args", {"dataset": "imagenet"}).items()
                 if k in EVALUATION - {"workers", "device"}}
        return Recipe(**saved | weights | typed)
    name, from_weights = given.get("recipe", "scratch"), "init_from" in given
    if not from_weights and (name == "finetune" or "freeze_backbone" in given):
        raise UserError("--recipe finetune and --freeze-backbone need weights: --init-from SOURCE")
    if from_weights and (name == "fast" or given.get("init") == "fan-in"):
        raise UserError("--recipe fast and --init fan-in begin without weights, not --init-from")
    if "teacher" not in given and {"distill_alpha", "distill_temperature"} & given.keys():
        raise UserError("--distill-alpha and --distill-temperature need a --teacher")
    some_known = Recipe(**weights | typed)
    named = {"scratch": {}, "fast": FAST,
             "finetune": finetune(some_known.variant, some_known.batch_size)}[name]
    if given.get("freeze_backbone"):
        named = named | {"drop_path": 0.0}  # what does not learn needs no noise
    if named:
        say("recipe  " + name + ": " + ", ".join(
            f"{flag(k)[2:]} {v}" for k, v in named.items() if k not in typed))
    return Recipe(**weights | named | typed)


def main(argv: list[str]) -> int:
    """Do what the command line says -> the exit code. Raises UserError, or KeyboardInterrupt."""
    given = parse(argv)
    actions = [name for name in ("resume", "eval_only", "init_from") if name in given]
    if len(actions) > 1:
        raise UserError(f"{' and '.join(map(flag, actions))} cannot be given together")
    source = open_weights(given[actions[0]]) if actions else None
    resume = "resume" in given
    if resume and not source.state:
        raise UserError(f"--resume takes the last.pt of this version of train.py, not "
                        f"{source.name}")
    recipe = combine(given, source)
    if "eval_only" in given:
        report(source, recipe, load_split(recipe, False, source.notes.get("classes")))
        return 0
    recipe.output = recipe.output or time.strftime(f"runs/%Y%m%d-%H%M%S-{recipe.variant}")
    last, best = Path(recipe.output) / "last.pt", Path(recipe.output) / "best.pt"
    if last.exists() and not (resume and last.samefile(source.name)):
        raise UserError(f"{recipe.output} holds a run already: --resume {last}, or give another "
                        "--output")
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TensorFloat-32, on GPUs that have it
    torch.backends.cudnn.benchmark = True  # few batch sizes: find the fastest kernels of each
    with claim(Path(recipe.output)):
        run = Run(recipe, source, resume)
        describe(run)
        train(run)
        if run.stopped_by:
            say("stopped; to go on: python train.py --resume " + shlex.quote(str(last)), sys.stderr)
            return 128 + run.stopped_by
        save(run)  # a run resumed at its end may lack a file
        for path in (last, best) if run.data.val else (last,):
            report(open_weights(str(path)), recipe, run.data.test)
    return 0


def keep_freed_memory() -> None:
    """Have glibc, Linux's C library, keep freed memory instead of returning it to the kernel.

    Otherwise the kernel hands each step its pages anew, one by one and filled with zeros: a
    quarter of a step's time on a CPU.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD in malloc.h
        libc.mallopt(-4, 0)  # M_MMAP_MAX


class Unfailing:
    """A text stream that drops what it cannot write: a full disk under the log, or a terminal that
    was closed, must not end a run."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115, Python had none
        self.stream.reconfigure(errors="backslashreplace", line_buffering=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


if __name__ == "__main__":
    sys.stdout, sys.stderr = Unfailing(sys.stdout), Unfailing(sys.stderr)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(f"train.py: error: {reason(error)}")
