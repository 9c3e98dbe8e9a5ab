"""Train ConvNeXt on CIFAR-10, on your own pictures, or on shapes drawn on the spot.

    python train.py --variant tiny --epochs 100           # the default recipe; downloads CIFAR-10
    python train.py --recipe fast                         # a small network, for two CPU cores
    python train.py --dataset folder --data-dir DIR --img-size 224 --patch-size 4
    python train.py --init-from timm:convnext_tiny.fb_in22k --recipe finetune --dataset folder ...
    python train.py --resume runs/NAME/last.pt            # continue a run that was stopped
    python train.py --eval-only WEIGHTS                   # measure the accuracy
    python train.py --eval-only WEIGHTS --predict PICTURE # say what is in a picture

"The paper" is "A ConvNet for the 2020s" (Liu et al., 2022, https://arxiv.org/abs/2201.03545). The
default recipe is the one of its table 5, adapted to a hundred epochs of 32x32 images;
assets/results.md lists the differences, and the measurements behind them.

After the settings (1), this file is in the order of a run, from `main` on, and a function stands
above those that it calls: the run (2), one step (3), evaluation (4), optimizers (5), network (6),
augmentation (7) and data (8). What deals with files and with the command line stands last:
checkpoints (9), prediction (10) and the command line (11), with the checks of the settings and with
UserError, for mistakes that the user can mend. You can skip these at first.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import hashlib
import io
import itertools
import json
import math
import multiprocessing.util
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.datasets
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from einops import rearrange, reduce
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent))  # Python's option -P leaves this folder out
import convnext


# --- 1. Settings --------------------------------------------------------------------------------
def setting(default: Any, help_: str, allowed: str | tuple = "", *, group: str = "",
            short: str = "") -> Any:
    """A field of Recipe. allowed: a tuple of words, or an interval of numbers: [0, 1) excludes 1.
    group: begins a group of flags in --help. short: a second name of the flag."""
    about = {"help": help_, "allowed": allowed, "group": group, "short": short}
    return field(default=default, metadata=about)

WORKERS = min(8, os.cpu_count() or 1)
if hasattr(os, "sched_getaffinity"):  # this process may have fewer CPUs than the machine
    WORKERS = min(8, len(os.sched_getaffinity(0)))
SMALL = 64  # pixels: images up to this side are read once and kept in memory

@dataclass(frozen=True)
class Recipe:
    """Every setting with its default. Each is a flag: batch_size is --batch-size.
    Raises UserError for a value that is not allowed."""
    recipe: str = setting("scratch", "which defaults to use: finetune is for --init-from, fast for "
                          "two CPU cores", ("scratch", "finetune", "fast"), group="what to do")
    resume: str | None = setting(None, "continue the run in this folder")
    eval_only: str | None = setting(None, "do not train; measure the accuracy of these weights")
    predict: str | None = setting(None, "with --eval-only: a picture, or a folder of pictures")
    output: str | None = setting(None, "folder of the run, or with --predict a .csv file. "
                                 "Default: runs/<time>-<network>")
    dataset: str = setting(
        "cifar10", "images to train on; python: those that train.main is given",
        ("cifar10", "cifar100", "food101", "imagenet", "folder", "synthetic", "python"),
        group="data")
    data_dir: str = setting("data", "folder of the data set; --dataset folder: with train/ and "
                            "test/ or val/, each with a folder per class, or with the classes")
    img_size: int = setting(32, "image size in pixels; with --init-from and --eval-only, the "
                            "weights' own", "[1, inf)")
    crop_pct: float | None = setting(None, "images above 64 pixels: middle share that evaluation "
                                     "sees; 0: all, squeezed. Default: the weights' own, or 0.875, "
                                     "or from 384 pixels on 0", "[0, 1]")
    val_size: float = setting(0, "training images to hold out, as a number or, below 1, a share. "
                              "best.pt is the epoch that is best on them", "[0, inf)")
    skip_bad: bool = setting(False, "leave out images that cannot be read")
    workers: int = setting(WORKERS, "processes that read and augment images", "[0, 256]",
                           short="-j")
    crop_padding: int = setting(4, "images of up to 64 pixels: shift by up to N pixels",
                                "[0, inf)", group="augmentation")
    crop_scale: float = setting(0.08, "images above 64 pixels: smallest share in a random "
                                "crop; 1: no random crop", "(0, 1]")
    flip: float = setting(0.5, "probability of a mirror image", "[0, 1]")
    rand_augment: float = setting(9, "strength of RandAugment; 0: none", "[0, 10]")
    random_erase: float = setting(0.25, "probability of an erased rectangle", "[0, 1]")
    mixup: float = setting(0.8, "alpha of MixUp; 0: none", "[0, 1000]")
    cutmix: float = setting(1, "alpha of CutMix; 0: none", "[0, 1000]")
    mix_prob: float = setting(1, "probability that a batch is mixed", "[0, 1]")
    mix_off_epochs: int | None = setting(
        None, "the last N epochs are not mixed. Default: a tenth of them", "[0, inf)")
    start_size: int = setting(0, "shrink images to this size at first; 0: never", "[0, inf)")
    start_share: float = setting(0.5, "share of the epochs at --start-size", "[0, 1]")
    variant: str = setting("tiny", "network by name", tuple(convnext.VARIANTS), short="--model",
                           group="network")
    depths: tuple[int, ...] | None = setting(
        None, "network by size: blocks in each stage", "[1, inf)")
    dims: tuple[int, ...] | None = setting(
        None, "with --depths: channels in each stage", "[1, inf)")
    grn: bool = setting(False, "with --depths: the block of ConvNeXt V2")
    road: str | None = setting(None, "network on the way from ResNet-50 to ConvNeXt, by its step, "
                               "which python convnext.py --road lists; or one with attention",
                               tuple(convnext.DESIGNS))
    width: int = setting(0, "with --road: channels of stage 1's narrowest layers; 0: as in the "
                            "paper", "[0, inf)")
    # The paper has patches of 4x4 pixels, LayerScale 1e-6 and initial weights of standard
    # deviation 0.02. On 32x32 images the values below learn faster; assets/results.md has figures.
    patch_size: int = setting(2, "side of the stem's patches", "[1, inf)")
    layer_scale: float = setting(0, "initial value of LayerScale; 0: none", "[0, inf)")
    drop_path: float = setting(0.1, "stochastic depth: drop rate of the last block; 0 with "
                               "--freeze-backbone", "[0, 1)")
    init: str = setting("local", "initial weights: paper: of standard deviation 0.02; fan-in: of "
                        "1 / sqrt(fan-in); local: the same, but depthwise filters are smooth and "
                        "strongest in the middle", ("local", "fan-in", "paper"))
    head_init_scale: float = setting(1, "factor on the classifier's initial weights", "[0, inf)")
    init_from: str | None = setting(None, "begin with these weights: a file, a folder, an https "
                                    "address, timm:NAME or hf:REPO", group="other networks")
    freeze_backbone: bool = setting(False, "train the classifier alone")
    teacher: str | None = setting(None, "distillation: learn from these weights' outputs, too")
    distill_alpha: float = setting(0.5, "the teacher's share of the loss", "[0, 1]")
    distill_temperature: float = setting(2, "divisor of both networks' logits", "(0, inf)")
    epochs: int = setting(100, "passes over the images", "[1, 1000000]", group="optimization")
    batch_size: int = setting(128, "images per step", "[1, 1000000]", short="-b")
    accumulate: int = setting(1, "compute each batch in N parts, to need less memory; BatchNorm, "
                                 "in networks of the road, sees one part at a time", "[1, inf)")
    optimizer: str = setting("adamw", "muon: Muon for the blocks' matrices and dense filters, "
                             "AdamW for the rest; sgd: with momentum 0.9", ("adamw", "muon", "sgd"))
    lr: float = setting(1e-3, "peak learning rate", "(0, inf)")
    muon_lr: float = setting(0.02, "peak learning rate of Muon", "(0, inf)")
    min_lr: float = setting(1e-6, "final learning rate; Muon's falls in proportion", "[0, inf)")
    schedule: str = setting("cosine", "decay of the learning rate", ("cosine", "linear"))
    warmup_epochs: float | None = setting(
        None, "epochs in which the learning rate rises. Default: a twentieth", "[0, inf)")
    layer_decay: float = setting(1, "factor on the learning rate for each layer below the head",
                                 "(0, 1]")
    beta2: float = setting(0.999, "AdamW's decay rate of squared gradients", "[0, 1)")
    weight_decay: float = setting(0.05, "decay of matrices and filters", "[0, inf)", short="--wd")
    label_smoothing: float = setting(0.1, "share of a label spread over all classes", "[0, 1)")
    clip_grad: float = setting(0, "largest norm of the gradient; 0: no limit", "[0, inf)")
    ema_horizon: float = setting(0.04, "average the weights over this share of the run; 0: none",
                                 "[0, 1)")
    amp: str = setting("auto", "mixed precision; auto: bf16 on CUDA GPUs and x86 CPUs that have it",
                       ("auto", "bf16", "fp16", "off"), group="run")
    compile: bool = setting(False, "use torch.compile")
    device: str = setting("auto", "cuda, cuda:1, mps or cpu")
    seed: int = setting(0, "seed of the initial weights and of all that a run draws",
                        "[0, 4294967295]")
    eval_every: int = setting(1, "epochs from one evaluation to the next", "[1, inf)")
    tta: bool = setting(False, "also report the mean over each image and its mirror image")

    def __post_init__(self) -> None:
        check_values(self)

    @property
    def warmup(self) -> float:  # in epochs
        return self.epochs / 20 if self.warmup_epochs is None else self.warmup_epochs

    @property
    def mixed_epochs(self) -> int:
        off = self.epochs // 10 if self.mix_off_epochs is None else self.mix_off_epochs
        return self.epochs - off

    @property
    def stride(self) -> int:
        """The network's total stride: images must be at least this large."""
        stages = len(self.depths) if self.depths else 4
        return self.patch_size * 2 ** (stages - 1)

    def size_at(self, epoch: int) -> int:
        """The image size in pixels in this epoch, counted from 0."""
        small = self.start_size and epoch < int(self.epochs * self.start_share)
        return self.start_size if small else self.img_size

    def is_measured(self, epoch: int) -> bool:
        """Whether the network is evaluated after this epoch, counted from 0."""
        return (epoch + 1) % self.eval_every == 0 or epoch + 1 == self.epochs

    @property
    def part_size(self) -> int:
        """How many images of a batch are computed at once."""
        return math.ceil(self.batch_size / self.accumulate)

# For a small network on two CPU cores; assets/results.md shows what most of these gain.
FAST = {
    "variant": "atto", "patch_size": 1, "drop_path": 0.0,
    "optimizer": "muon", "lr": 3e-3, "muon_lr": 0.02, "beta2": 0.95, "weight_decay": 0.02,
    "schedule": "linear", "min_lr": 0.0, "batch_size": 256, "epochs": 40, "ema_horizon": 0.0,
    "rand_augment": 5.0, "mix_prob": 0.0, "start_size": 24, "tta": True}

def fast(given: Recipe) -> dict[str, Any]:
    """FAST. Its start size of 24 pixels needs images of 32, and a total stride that divides 24."""
    fits = given.img_size == 32 and FAST["start_size"] % given.stride == 0
    return FAST if fits else FAST | {"start_size": 0}

def finetune(given: Recipe) -> dict[str, Any]:
    """The settings of the paper's fine-tuning from ImageNet-22K to ImageNet-1K (table 6). V2 gets
    those of V1. `fit_to_data` changes some of them for small data sets."""
    size = network_name(given).removeprefix("ConvNeXt-").removeprefix("v2_")
    scale = given.batch_size / 512  # the paper's batch size
    drop_path = {"small": 0.1, "base": 0.2, "large": 0.3, "xlarge": 0.4, "huge": 0.4}  # huge: ours
    return {
        "epochs": 30, "lr": 5e-5 * scale, "warmup_epochs": 0.0,
        "weight_decay": 1e-8, "rand_augment": 9.0, "mixup": 0.0, "cutmix": 0.0,
        "random_erase": 0.25, "label_smoothing": 0.1, "clip_grad": 0.0,
        # Networks of the road know neither of these two.
        "layer_decay": 1.0 if given.road else 0.8,
        "head_init_scale": 1.0 if given.road else 0.001, "drop_path": drop_path.get(size, 0.0),
        # The paper averages with decay 0.9999, over some 1 / (1 - 0.9999) = 10,000 steps, for
        # XLarge only. It takes 75,000 steps, so this is a share of 0.13.
        "ema_horizon": 0.13 if size == "xlarge" else 0.0}


# --- 2. The run ---------------------------------------------------------------------------------
def main(argv: list[str], splits: tuple[Images, Images] | None = None) -> int:
    """Do what the command line says, and return the exit code. Raises UserError.

    splits: training and test images to use in place of --dataset. In a script, call this below
    `if __name__ == "__main__":`, or with "--workers", "0". On Windows and macOS, and on Linux from
    Python 3.14 on, each process that reads images runs the script once more.
    """
    typed = parse(argv)
    tune_backends()
    with contextlib.ExitStack() as stack:
        if "resume" in typed:  # nobody else may write to the run while it is read
            if Path(typed["resume"]).is_dir():
                typed["resume"] = str(Path(typed["resume"], "last.pt"))
            if not Path(typed["resume"]).exists():
                raise UserError(f"{typed['resume']}: no such file")
            stack.enter_context(lock(Path(typed["resume"]).parent))
        address = typed.get("resume") or typed.get("eval_only") or typed.get("init_from")
        source = open_source(address) if address else None
        recipe = combine(typed, source)
        stack.enter_context(explained_errors(recipe))
        if recipe.predict:
            print_predictions(source, recipe)
            return 0
        if recipe.eval_only:
            report_source(source, recipe, splits)
            return 0
        if not recipe.resume:
            recipe = replace(recipe, output=new_folder(recipe))
            stack.enter_context(lock(Path(recipe.output)))
            for name in ("last.pt", "weights.safetensors"):
                if Path(recipe.output, name).exists():
                    raise UserError(f"{recipe.output} holds a run, {name}: give another --output, "
                                    "or continue the run by --resume")
        if splits:
            recipe = replace(recipe, dataset="python")
        check_early(recipe)
        data = prepare_data(recipe, source, splits)
        recipe = fit_to_data(recipe, len(data.train), typed)
        run = prepare_run(recipe, data, source)
        del source  # a resumed run would hold the weights twice
        describe(run)
        train(run)
        # A signal that comes while the finished run is saved has nothing to stop.
        if run.stopped_by and (run.step < run.total_steps or run.to_measure):
            say(f"stopped; to go on: {command_to_resume(run)}", sys.stderr)
            return 128 + run.stopped_by
        report_run(run)
    return 0

def command_to_resume(run: Run) -> str:
    last = run.folder / "last.pt"
    if run.recipe.dataset == "python":  # the command line cannot name its images
        return f"train.main(['--resume', {str(last)!r}], splits=...)"
    return f"python train.py --resume {quoted([last])}"

@dataclass
class Run:
    """All that a training run consists of."""
    recipe: Recipe
    folder: Path
    data: Data
    device: torch.device
    precision: torch.dtype
    model: nn.Module
    ema: swa_utils.AveragedModel | None  # the running average of the weights
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler  # does nothing unless the precision is float16
    teacher: Teacher | None
    init_note: str  # where the initial weights come from
    macs: int  # multiply-accumulates for one image
    steps_per_epoch: int
    total_steps: int
    step: int = 0  # steps taken so far
    history: list[dict] = field(default_factory=list)  # a row per epoch, as in metrics.csv
    sums: dict[str, Any] = field(default_factory=dict)  # over the steps of the present epoch
    to_measure: bool = False  # the last epoch of the history is yet to be evaluated
    measure_seconds: float = 0.0  # that the last evaluation took
    stopped_by: int = 0  # the signal that ends the run
    tensorboard: Any = None

    @property
    def eval_model(self) -> nn.Module:
        """The network that is measured: that of the averaged weights, if there is an average."""
        return self.ema.module if self.ema else self.model

def check_early(recipe: Recipe) -> None:
    """Find mistakes that need no images before these are read, which can take minutes."""
    pick_precision(recipe.amp, pick_device(recipe.device))
    with torch.device("meta"):
        build_network(recipe, classes=2)
    if recipe.teacher:
        open_source(recipe.teacher)

def prepare_run(recipe: Recipe, data: Data, source: Source | None) -> Run:
    """Build the network, its average and the optimizers, or restore those of --resume."""
    device = pick_device(recipe.device)
    precision = pick_precision(recipe.amp, device)
    classes = data.classes
    torch.manual_seed(recipe.seed)
    model = build_network(recipe, len(classes))
    model = model.to(memory_format=torch.channels_last)
    if recipe.init != "paper" and not recipe.road:
        fan_in_init(model)
    if recipe.init == "local" and not recipe.road:
        local_init(model)
    init_note = "pytorch" if recipe.road else recipe.init
    if recipe.init_from and recipe.resume:
        init_note = f"from {recipe.init_from}"
    elif recipe.init_from:
        init_note = load_initial(model, source, classes, recipe)
    if recipe.freeze_backbone:
        model.requires_grad_(False)
        model.head.fc.requires_grad_(True)
    macs = convnext.count_macs(model, recipe.img_size)
    if device.type == "cpu" and not recipe.compile:
        model = convnext.speed_up(model)
    model.to(device)
    steps_per_epoch = max(1, len(data.train) // recipe.batch_size)
    total_steps = steps_per_epoch * recipe.epochs
    run = Run(
        recipe, Path(recipe.output), data, device, precision, model,
        ema=average_of(model, recipe.ema_horizon * total_steps) if recipe.ema_horizon else None,
        optimizers=make_optimizers(model, recipe, precision),
        # In float16, small gradients would become 0: the loss is scaled up, and they back down.
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        teacher=load_teacher(recipe, data, device) if recipe.teacher else None,
        init_note=init_note, macs=macs, steps_per_epoch=steps_per_epoch,
        total_steps=total_steps)
    if recipe.resume:
        load_state(run, source.state)
    if recipe.compile:
        run.model.compile()  # in place: the parameters keep their names
    return run

def describe(run: Run) -> None:
    """Print what is about to happen, and note the settings in args.json."""
    r, data = run.recipe, run.data
    settings = json.dumps(asdict(r))
    write_file(run.folder / "args.json", lambda path: path.write_text(settings))
    parameters = sum(p.numel() for p in run.model.parameters())
    rates = f"lr {r.lr:g}"
    if len(run.optimizers) > 1:
        rates = f"lr {r.muon_lr:g} and {r.lr:g}"
    names = " and ".join(type(optimizer).__name__ for optimizer in reversed(run.optimizers))
    say(f"model   {network_name(r)}, patch size {r.patch_size}: {parameters:,} parameters, "
        f"{run.macs / 1e9:.3f} GMACs at {r.img_size}x{r.img_size}\n"
        f"init    {run.init_note}\n"
        f"data    {r.dataset}: {len(data.train):,} training + {len(data.val or []):,} held-out + "
        f"{len(data.test):,} test images, {len(data.classes)} classes ({shorten(data.classes)})\n"
        f"device  {run.device}, {str(run.precision)[6:]}, torch {torch.__version__}\n"
        f"steps   {r.epochs} epochs x {run.steps_per_epoch} of "
        f"{min(r.batch_size, len(data.train))} images, {names}, {rates}, "
        f"weight decay {r.weight_decay:g}, seed {r.seed}\n"
        f"run     {run.folder}")
    if r.recipe != "scratch" and not r.resume:
        chosen = [as_typed(name, value) for name, value in asdict(r).items()
                  if name != "recipe" and value != FIELDS[name].default and value is not None]
        say(f"recipe  {r.recipe}: {' '.join(chosen)}")
    is_short = r.epochs < 50 and r.recipe == "scratch" and not r.resume
    if is_short and r.mix_prob and r.rand_augment:
        note(f"for {r.epochs} epochs this is much augmentation: with --rand-augment 0 --mix-prob 0 "
             "the result may be better, as README.md says of 16 epochs")

def train(run: Run) -> None:
    """Train from where the run stands to its last step, or to a signal."""
    r = run.recipe
    progress = tqdm(total=run.total_steps, initial=run.step, unit="step", disable=None)
    with catch_signals(run), progress:
        if run.to_measure:  # the run was stopped between an epoch and its evaluation
            measure_epoch(run)
        if run.step == run.total_steps or run.stopped_by:
            save(run)  # writes weights.safetensors if the finished run lacks it
            return
        reader = BatchReader(run.data, r, run.steps_per_epoch)
        steps = range(run.step, run.total_steps)
        pinned = run.device.type == "cuda"  # an asynchronous copy needs pinned memory
        interval = 60 if progress.disable else 5  # seconds; looking at the loss makes a GPU wait
        step_ended = loss_checked = time.perf_counter()
        for x, targets in read_in_processes(reader, steps, r.workers, pinned):
            if run.step % run.steps_per_epoch == 0:
                run.sums = {"loss": 0.0, "seconds": 0.0, "waiting": 0.0}
            x = x.to(run.device, memory_format=torch.channels_last, non_blocking=pinned)
            targets = targets.to(run.device, non_blocking=pinned)
            run.sums["waiting"] += time.perf_counter() - step_ended

            warmup = round(r.warmup * run.steps_per_epoch)
            lr = lr_at(run.step, run.total_steps, warmup, r.lr, r.min_lr, r.schedule)
            torch.manual_seed(seed_for(r.seed, "network", run.step))  # for stochastic depth
            run.sums["loss"] += train_step(run.model, run.optimizers, x, targets, lr, r,
                                           run.precision, run.scaler, run.teacher)
            if run.ema:
                run.ema.update_parameters(run.model)
            run.step += 1
            run.sums["lr"] = lr
            progress.update()

            epoch_is_over = run.step % run.steps_per_epoch == 0
            now = time.perf_counter()
            if epoch_is_over or now - loss_checked > interval:
                loss = check_finite(run)
                progress.set_postfix(epoch=len(run.history) + 1, loss=f"{loss:.3f}")
                if progress.disable and not epoch_is_over:
                    say(f"epoch {len(run.history) + 1}: step {run.step} of {run.total_steps}, "
                        f"mean loss {loss:.3f}")
                loss_checked = now = time.perf_counter()
            run.sums["seconds"] += now - step_ended
            if epoch_is_over:
                record_epoch(run)
            if run.stopped_by:
                if not epoch_is_over:  # at the end of an epoch it is saved already
                    save(run)  # here, as the processes that read images may take seconds to end
                break
            step_ended = time.perf_counter()

def record_epoch(run: Run) -> None:
    """Save the epoch, then measure: whatever happens in an evaluation, the epoch is not lost."""
    sums = run.sums
    images = run.steps_per_epoch * min(run.recipe.batch_size, len(run.data.train))
    run.history.append({
        "epoch": len(run.history) + 1, "step": run.step,
        "train_loss": sums["loss"].item() / run.steps_per_epoch, "lr": sums["lr"],
        "seconds": sums["seconds"], "images_per_s": images / sums["seconds"],
        "data_share": sums["waiting"] / sums["seconds"]})  # of the time, spent waiting for images
    run.to_measure = run.recipe.is_measured(len(run.history) - 1)
    save(run)
    measure_epoch(run)

def measure_epoch(run: Run) -> None:
    """Evaluate the last epoch if that is due, and print and log its row."""
    row = run.history[-1]
    if run.to_measure:
        started = time.perf_counter()
        scores = measure(run)
        if run.stopped_by:  # --resume measures again
            return
        run.measure_seconds = time.perf_counter() - started
        row |= scores
        run.to_measure = False
        save_best(run)
        save(run)
    r = run.recipe
    epochs_left = range(row["epoch"], r.epochs)  # counted from 0
    pixels_left = sum(r.size_at(epoch) ** 2 for epoch in epochs_left)
    pixels = r.size_at(row["epoch"] - 1) ** 2  # the time of an epoch grows with them
    measurements_left = sum(r.is_measured(epoch) for epoch in epochs_left)
    left = row["seconds"] * pixels_left / pixels + run.measure_seconds * measurements_left
    shown = [name for name in row if name not in ("step", "seconds") and "top5" not in name]
    text = "  ".join(f"{name} {in_digits(row[name])}" for name in shown)
    say(f"{text}  {left:.0f} s left")
    log_to_tensorboard(run, row)

def in_digits(number: float) -> str:
    """With four significant digits, but 12345, not 1.234e+04."""
    return f"{number:.0f}" if 1000 <= number < 1e9 else f"{number:.4g}"

def measure(run: Run) -> dict[str, float]:
    """The scores of the weights, and of their average, as columns of metrics.csv. They are measured
    on the held-out images if there are any, and otherwise on the test images."""
    data = run.data
    split = "val" if data.val else "test"
    models = {split: run.model}
    if run.ema:
        models[f"{split}_ema"] = run.ema
    scores = {}
    for prefix, model in models.items():
        batches = evaluation_batches(data.val or data.test, run.recipe)
        batches = itertools.takewhile(lambda batch: not run.stopped_by, batches)
        for name, value in evaluate(model, batches, data.mean, data.std, run.precision).items():
            scores[f"{prefix}_{name}"] = value
    return scores


# --- 3. One step --------------------------------------------------------------------------------
def train_step(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], x: Tensor, targets: Tensor,
    lr: float, recipe: Recipe, precision: torch.dtype = torch.float32,
    scaler: torch.amp.GradScaler = torch.amp.GradScaler(enabled=False),  # noqa: B008
    teacher: Teacher | None = None,
) -> Tensor:
    """Update the weights once, from images (b, 3, h, w) and targets (b, classes), and return the
    loss. With recipe.accumulate the batch is computed in parts, whose gradients add up."""
    model.train()  # an evaluation leaves it in evaluation mode
    total = torch.zeros((), device=x.device)
    parts = zip(x.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True)
    for images, labels in parts:
        with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
            logits = model(images)
            teacher_logits = teacher(images).float() if teacher else None
        loss = training_loss(recipe, logits.float(), labels, teacher_logits)
        loss = loss * (len(images) / len(x))
        scaler.scale(loss).backward()
        total += loss.detach()
    if scaler.is_enabled():  # one infinite gradient makes all of them NaN, so no optimizer steps
        nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    if recipe.clip_grad:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        scaler.step(optimizer)  # optimizer.step(), unless a gradient in float16 is infinite
        optimizer.zero_grad()
    scaler.update()
    return total

def training_loss(recipe: Recipe, logits: Tensor, targets: Tensor,
                  teacher_logits: Tensor | None = None) -> Tensor:
    """The cross-entropy; with a teacher, (1 - α) · cross-entropy + α · distillation loss.
    All arguments are (b, classes)."""
    loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
    if teacher_logits is None:
        return loss
    alpha = recipe.distill_alpha
    distillation = distillation_loss(logits, teacher_logits, recipe.distill_temperature)
    return (1 - alpha) * loss + alpha * distillation

def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher_logits / T) ‖ softmax(logits / T)), from Hinton et al., 2015.
    The teacher's small probabilities say which classes are alike, and T > 1 raises them. The
    gradients shrink with 1 / T², which the factor T² undoes."""
    student = (logits / temperature).log_softmax(1)
    teacher = (teacher_logits / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


# --- 4. Evaluation ------------------------------------------------------------------------------
def report_run(run: Run) -> None:
    """Print the scores of last.pt and, if images were held out, of best.pt."""
    data = run.data
    rest = (data.test, data.mean, data.std, run.recipe, run.precision)
    report(str(run.folder / "last.pt"), run.eval_model, *rest)
    if not data.val:
        return
    best = run.folder / "best.pt"
    if not best.exists():
        note(f"{best} is not there: it was not copied along with last.pt")
        return
    with one_line_errors(str(best)):
        load_state(run, convnext.read_file(best)[0])
    report(str(best), run.eval_model, *rest)

def report_source(source: Source, recipe: Recipe, splits: tuple | None = None) -> None:
    """Print the scores of --eval-only's weights on the test images."""
    test = splits[1] if splits else load_split(recipe, train=False)
    theirs = {*(source.classes or ())}
    here = {*test.classes}
    # Published weights may say "tench" where the data set says "n01440764".
    other_names = theirs and theirs.isdisjoint(here) and not source.settings
    if theirs >= here:
        test = in_order(test, source.classes)
    elif other_names and source.num_classes == len(here):
        note(f"{source.name} names its classes in another way: {shorten(source.classes)}")
        source = replace(source, classes=None)
    check_classes(source, test.classes)
    device = pick_device(recipe.device)
    precision = pick_precision(recipe.amp, device)
    unread = test
    test = prepare_images(test, recipe)
    note_other_images(source, test if test.is_tensor else unread, recipe)
    model = load_network(source).to(device, memory_format=torch.channels_last)
    mean, std = source.statistics
    report(source.name, model, test, mean, std, recipe, precision)

def note_other_images(source: Source, test: Images, recipe: Recipe) -> None:
    """Say so if the folder of a run has other test images than before. Where every fifth image is
    one, a new image moves others from the training set into the test set."""
    known = source.state.get("test_fingerprint")
    is_same_place = all(source.settings.get(name) == getattr(recipe, name)
                        for name in ("dataset", "data_dir", "img_size"))
    if known and is_same_place and fingerprint(test, recipe) != known:
        note("the test images are not those that the run had. If it was trained on some of them, "
             "the accuracy is too high")

def report(name: str, model: nn.Module, images: Images, mean: Tensor, std: Tensor, recipe: Recipe,
           precision: torch.dtype) -> None:
    """Print the scores of a network on the test images."""
    for tta in [False, True] if recipe.tta else [False]:
        batches = evaluation_batches(images, recipe)
        scores = evaluate(model, batches, mean, std, precision, tta)
        # Five classes or fewer always have a top-5 accuracy of 100 %.
        top5 = f"  top-5 {scores['top5']:.2f} %" if len(images.classes) > 5 else ""
        mirror = " with mirror images" if tta else ""
        say(f"{name}{mirror}: test loss {scores['loss']:.4f}  top-1 {scores['top1']:.2f} %{top5}  "
            f"of {len(images):,} images of {recipe.img_size} px")

@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], mean: Tensor, std: Tensor,
             precision: torch.dtype, tta: bool = False) -> dict[str, float]:
    """The mean cross-entropy, and the top-1 and top-5 accuracy in %, over batches of bytes
    (b, 3, h, w) and labels (b,). tta: average the logits of each image and its mirror image."""
    model.eval()
    device = next(model.parameters()).device
    count = 0
    sums = torch.zeros(3, device=device)
    for images, labels in batches:
        labels = labels.to(device)
        x = normalize(images.to(device) / 255, mean, std)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = model(x).float()
            if tta:
                logits = (logits + model(x.flip(3)).float()) / 2
        loss = F.cross_entropy(logits, labels, reduction="sum")
        top = logits.topk(min(5, logits.shape[1])).indices  # (b, 5)
        hits = top == rearrange(labels, "b -> b 1")
        sums += torch.stack([loss, 100 * hits[:, 0].sum(), 100 * hits.sum()])
        count += len(labels)
    loss, top1, top5 = (sums / max(1, count)).tolist()
    return {"loss": loss, "top1": top1, "top5": top5}


# --- 5. The optimizers --------------------------------------------------------------------------
def lr_at(step: int, total_steps: int, warmup: int, peak: float, min_lr: float,
          schedule: str = "cosine") -> float:
    """The learning rate of step 0 ... total_steps - 1. It rises linearly for `warmup` steps, then
    falls to `min_lr`. The cosine has this value in the last step, the straight line would have it
    one step later. The rate depends on the step alone, so a stopped run has no state to lose."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "linear":
        progress = (step - warmup) / max(1, total_steps - warmup)
        return peak + (min_lr - peak) * progress
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

def make_optimizers(model: nn.Module, recipe: Recipe,
                    precision: torch.dtype = torch.float32) -> list[torch.optim.Optimizer]:
    """AdamW or SGD for all parameters; or Muon for what `takes_muon` names, AdamW for the rest.
    precision: the number type of Muon's matrix products."""
    r = recipe
    groups = parameter_groups(model, r.weight_decay, r.layer_decay, r.optimizer == "muon")
    for_muon = [group for group in groups if group["muon"]]
    others = [group for group in groups if not group["muon"]]
    if r.optimizer == "sgd":
        return [torch.optim.SGD(others, lr=r.lr, momentum=0.9, fused=True)]
    optimizers = [torch.optim.AdamW(others, lr=r.lr, betas=(0.9, float(r.beta2)), fused=True)]
    if for_muon:
        for group in for_muon:
            # Both optimizers follow lr_at's schedule, Muon with this factor.
            group["lr_scale"] *= r.muon_lr / r.lr
        optimizers.append(Muon(for_muon, r.muon_lr, precision))
    return optimizers

def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0,
                     muon: bool = False) -> list[dict]:
    """Group the trainable parameters by optimizer, weight decay and `lr_scale`, the factor on the
    learning rate. Only matrices and filters decay: norms, biases, LayerScale and GRN do not."""
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        by_muon = muon and takes_muon(name, p)
        decays = p.ndim >= 2 and not name.endswith("bias")
        decay = weight_decay if decays else 0.0
        lr_scale = layer_decay ** layers_below_head(name, model) if layer_decay < 1 else 1.0
        settings = {"muon": by_muon, "weight_decay": decay, "lr_scale": lr_scale}
        group = groups.setdefault(tuple(settings.values()), settings | {"params": []})
        group["params"].append(p)
    return list(groups.values())

def takes_muon(name: str, p: Tensor) -> bool:
    """Whether Muon trains a parameter: the matrices and the dense filters of the blocks. The
    filters of a depthwise convolution see different channels, so making them orthogonal to each
    other has no meaning."""
    parts = ("pwconv1", "pwconv2", "branch", "shortcut", "qkv", "proj")
    in_block = any(part in parts for part in name.split("."))
    is_dense = p.ndim >= 2 and p.shape[1] > 1
    return in_block and is_dense and name.endswith("weight")

def layers_below_head(name: str, model: convnext.ConvNeXt) -> int:
    """How many layers a parameter is below the head, for layer-wise decay of the learning rate.
    A stage and the Downsample before it are one layer, but in the third stage every three blocks
    are one, as in the authors' code. The stem is a layer, and the head is the last."""
    layers_of_stage = [1] * len(model.stages)
    if len(model.stages) > 2:
        layers_of_stage[2] = math.ceil(len(model.stages[2]) / 3)
    part, stage, block = name.split(".")[:3]
    if part == "head":
        return 0
    if name.startswith("downsample_layers.0."):  # the stem
        return 1 + sum(layers_of_stage)
    below = sum(layers_of_stage[int(stage) :])  # this stage and those after it
    if part == "stages" and stage == "2":
        below -= int(block) // 3
    return below

class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal (https://kellerjordan.github.io/posts/muon).

    An orthogonal step is equally long in all directions, so those in which the gradient is small
    are learned as fast as the others. A filter (o, i, h, w) is a matrix of o rows. This computes
    what torch.optim.Muon does. That one takes only matrices, and it always multiplies in bfloat16,
    which is several times slower than float32 on a CPU without it.
    """
    def __init__(self, groups: list[dict], lr: float, precision: torch.dtype) -> None:
        super().__init__(groups, {"lr": lr, "momentum": 0.95, "weight_decay": 0.0})
        self.precision = precision

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, group["lr"], group["momentum"], group["weight_decay"])

    def update(self, p: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        gradient = p.grad.flatten(1)
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = self.state[p]["momentum_buffer"]
        buffer.lerp_(gradient, 1 - momentum)
        direction = orthogonalize(gradient.lerp(buffer, momentum), self.precision)
        rows, columns = direction.shape
        scale = max(1, rows / columns) ** 0.5
        p.mul_(1 - lr * weight_decay)
        p.add_(direction.reshape(p.shape), alpha=-lr * scale)

def orthogonalize(x: Tensor, precision: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """Bring the singular values of a matrix near 1: x = U·S·Vᵀ becomes about U·Vᵀ.
    The iteration is Newton's and Schulz's with Muon's polynomial, which is faster at the start and
    ends between 0.7 and 1.2. It needs matrix products alone."""
    is_tall = x.shape[0] > x.shape[1]
    y = x / x.norm().clamp(min=1e-7)  # first, because float16 would round small gradients to 0
    y = (y.T if is_tall else y).to(precision)
    for _ in range(steps):
        gram = y @ y.T
        y = 3.4445 * y + (-4.775 * gram + 2.0315 * gram @ gram) @ y
    return y.T if is_tall else y

def average_of(model: nn.Module, horizon: float) -> swa_utils.AveragedModel:
    """A running average of the weights: after each step, average += (weights - average) / horizon.
    horizon: how many steps the average looks back; --ema-horizon is this as a share of the run. The
    usual decay of 0.9999 looks back 10,000 steps, which is too far in a run of 20,000."""
    decay = 1 - 1 / max(1, horizon)
    # BatchNorm's running statistics belong to the weights, so they are averaged, too. All other
    # buffers are constant, and some are integers, which an average would round.
    has_statistics = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay),
                                   use_buffers=has_statistics)


# --- 6. The network and its device --------------------------------------------------------------
NETWORK = ("variant", "depths", "dims", "grn", "road", "width")  # the settings that describe one

def build_network(recipe: Recipe, classes: int) -> nn.Module:
    """The network that the settings describe, with PyTorch's or the paper's initial weights."""
    options = {"num_classes": classes, "patch_size": recipe.patch_size,
               "layer_scale": recipe.layer_scale}
    if recipe.road:
        design = convnext.DESIGNS[recipe.road]
        if recipe.width:
            design = design._replace(width=recipe.width)
        with one_line_errors(f"--road {recipe.road} --width {recipe.width}"):
            return convnext.roadmap_network(design, **options)
    options |= {"drop_path": recipe.drop_path, "head_init_scale": recipe.head_init_scale}
    if recipe.depths:
        return convnext.ConvNeXt(recipe.depths, recipe.dims, grn=recipe.grn, **options)
    return convnext.create_convnext(recipe.variant, **options)

def network_name(recipe: Recipe) -> str:
    """Its step of the road, its variant, or its number of blocks and channels."""
    if recipe.road:
        return recipe.road
    variant = recipe.variant
    if recipe.depths:
        variant = convnext.variant_of(recipe.depths, recipe.dims, recipe.grn)
    if variant:
        return f"ConvNeXt-{variant}"
    depths = "-".join(map(str, recipe.depths))
    dims = "-".join(map(str, recipe.dims))
    return f"ConvNeXt {depths} of {dims}"

def fan_in_init(model: convnext.ConvNeXt) -> None:
    """Draw all weights but the classifier's with standard deviation 1 / sqrt(fan_in), in place.

    With inputs of variance 1, the outputs of a linear layer have the standard deviation of its
    weights times sqrt(fan_in). The paper's 0.02 makes that 0.55 at 768 channels, but 0.13 at 40:
    there the two linear layers of a branch, with the GELU between them, shrink its input to 0.016,
    and it has to grow before it can learn. Here each layer keeps the scale, at any width. The
    weights of a branch's last layer, pwconv2, are divided by sqrt(2 · blocks) as well, so that all
    branches together add less than their input, at any depth. The normal distribution is cut at two
    standard deviations, which leaves 0.88 of each of these values.
    """
    blocks = sum(len(stage) for stage in model.stages)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and name != "head.fc":
            fan_in = module.weight[0].numel()
            std = fan_in**-0.5
            if name.endswith("pwconv2"):
                std /= (2 * blocks) ** 0.5
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)

@torch.no_grad()
def local_init(model: convnext.ConvNeXt) -> None:
    """Draw depthwise filters that are smooth and strongest in the middle, in place.

    Filters of independent random weights mix each position with 48 others to equal parts, and the
    layers after them hardly see the position itself. Trained filters are smooth, and in the early
    stages strongest in the middle. So each filter here is the sum of two parts of norm 1. One has a
    single 1 in the centre and passes each position on as it is. The other is noise, blurred and
    fading away from the centre: with a standard deviation of 1 position in the first block, of 2.5
    in the last, and evenly in between. The sum is brought to norm 1, which keeps the scale of
    inputs whose positions are independent.

    That new filters should have the covariances of trained ones is from Trockman, Willmott and
    Kolter, 2022 (https://arxiv.org/abs/2210.03651). Their formula is another one. assets/results.md
    shows what this gains.
    """
    layers = [m for m in model.modules()
              if isinstance(m, convnext.DepthwiseConv) and isinstance(m, nn.Conv2d)]
    for index, layer in enumerate(layers):
        channels, _, size, _ = layer.weight.shape
        centre = nn.init.dirac_(torch.empty(channels, 1, size, size), groups=channels)
        noise = TF.gaussian_blur(torch.randn(channels, 1, size + 6, size + 6), 7, sigma=1.0)
        noise = noise[..., 3:-3, 3:-3]  # near an edge the blur would average fewer numbers
        spread = 1 + 1.5 * index / max(1, len(layers) - 1)
        distance = torch.arange(size) - size // 2
        fading = torch.exp(-((distance / spread) ** 2) / 2)
        noise = noise * fading * rearrange(fading, "h -> h 1")
        filters = centre + F.normalize(noise, dim=(2, 3))
        layer.weight.copy_(F.normalize(filters, dim=(2, 3)))

def load_initial(model: nn.Module, source: Source, classes: list[str], recipe: Recipe) -> str:
    """Load the weights of --init-from, but no classifier for other classes. Says what was done."""
    same_classes = source.num_classes == len(classes) and source.classes in (None, classes)
    if same_classes:
        check_classes(source, classes)  # says which are assumed if the source does not name them
    tensors = {name: tensor for name, tensor in source.tensors.items()
               if same_classes or ".fc." not in name}
    with one_line_errors(source.name):
        if source.network.get("road") != recipe.road:
            raise ValueError("it holds another kind of network")
        if recipe.road:
            kept, unknown = model.load_state_dict(tensors, strict=False)
            if unknown:
                raise ValueError(f"the network has no place for {shorten(unknown)}")
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # `describe` prints what was kept
                kept = convnext.load_weights(model, tensors).kept
    if recipe.freeze_backbone:
        untrained = [name for name in kept if not name.startswith("head.")]
        if untrained:
            raise UserError(f"--freeze-backbone would leave untrained: {shorten(untrained)}")
    new = f"; new: {', '.join(kept)}" if kept else ""
    return f"{len(model.state_dict()) - len(kept)} tensors of {source.name}{new}"

def load_teacher(recipe: Recipe, data: Data, device: torch.device) -> Teacher:
    source = open_source(recipe.teacher)
    check_classes(source, data.classes)
    stride = Recipe(**source.network, img_size=10**6).stride  # any size that is large enough
    if (recipe.start_size or recipe.img_size) < stride:
        raise UserError(f"{source.name} takes images of {stride} or more pixels")
    teacher = Teacher(source, data.mean, data.std)
    return teacher.to(device, memory_format=torch.channels_last)

class Teacher(nn.Module):
    """A trained network that sees the student's images with its own normalization."""
    def __init__(self, source: Source, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = load_network(source).requires_grad_(False)
        its_mean, its_std = source.statistics
        self.register_buffer("scale", rearrange(std / its_std, "c -> c 1 1"))
        self.register_buffer("shift", rearrange((mean - its_mean) / its_std, "c -> c 1 1"))
        self.identity = checksum(source.tensors, {})  # a resumed run needs the same teacher

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Images (b, 3, h, w), normalized for the student -> logits (b, classes)."""
        return self.model(x * self.scale + self.shift)

def pick_device(name: str) -> torch.device:
    try:
        found = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        device = torch.empty(1, device=found if name == "auto" else name).device
        torch.ones(1, device=device).item()  # "meta" has no values
        if device.type == "cuda":
            torch.cuda.set_device(device)  # its precision is asked for, and its memory pinned
        return device
    except Exception as error:  # each backend raises its own
        raise UserError(f"--device {name} cannot be used here ({first_line(error)})") from error

def pick_precision(amp: str, device: torch.device) -> torch.dtype:
    """The type for matrix products and convolutions. The weights themselves stay in float32."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":  # where the hardware does not compute in bfloat16 it is slower
        amp = "bf16" if device.type == "cpu" and cpu_has_bfloat16() else "off"
    if amp == "fp16" and device.type != "cuda":
        raise UserError(f"--amp fp16 needs a CUDA GPU, not {device.type}; take bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]

def cpu_has_bfloat16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):  # from PyTorch 2.14 on
        return torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.cpu._is_avx512_bf16_supported()


# --- 7. Augmentation ----------------------------------------------------------------------------
# Whole batches on the CPU, in the processes that read images, with random numbers for each image.
# (torchvision's transforms draw once per batch.)

def augment(recipe: Recipe, x: Tensor, labels: Tensor, classes: int, mean: Tensor, std: Tensor,
            epoch: int) -> tuple[Tensor, Tensor]:
    """Bytes (b, 3, h, w) and labels (b,) -> what the network sees, and targets (b, classes)."""
    x = crop_and_flip(x, recipe.crop_padding if recipe.img_size <= SMALL else 0, recipe.flip)
    x = x.float() / 255
    if recipe.rand_augment:
        x = rand_augment(x, recipe.rand_augment)
    size = recipe.size_at(epoch)
    if size != recipe.img_size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    x = normalize(x, mean, std)
    if recipe.random_erase:
        x = random_erase(x, recipe.random_erase)
    mixes = (recipe.mixup or recipe.cutmix) and epoch < recipe.mixed_epochs
    if mixes and torch.rand(()) < recipe.mix_prob:
        return mix(x, labels, classes, recipe.mixup, recipe.cutmix)
    return x, F.one_hot(labels, classes).float()

def crop_and_flip(x: Tensor, padding: int, flip: float) -> Tensor:
    """Shift each image by up to `padding` pixels, reflecting its edge, and mirror some of them.
    (b, c, h, w) -> (b, c, h, w)"""
    b, _, h, w = x.shape
    if padding:
        padded = F.pad(x, [padding] * 4, mode="reflect")
        windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # (b, c, places, places, h, w), a view
        top = torch.randint(2 * padding + 1, (b,))
        left = torch.randint(2 * padding + 1, (b,))
        x = windows[torch.arange(b), :, top, left]
    mirrored = torch.rand(b, 1, 1, 1) < flip
    return torch.where(mirrored, x.flip(3), x)

def rand_augment(x: Tensor, magnitude: float) -> Tensor:
    """RandAugment (Cubuk et al., 2019) in the paper's version, timm's rand-m9-mstd0.5-inc1.

    Twice, each image draws one of the fifteen operations and applies it with probability 1/2. Its
    magnitude is drawn from N(magnitude, 0.5) / 10, where 1 is the operation's largest. (In
    torchvision a magnitude of 9 means 9 of 30, always applied.) x: (b, 3, h, w) from 0 to 1,
    changed in place.
    """
    b = len(x)
    for _ in range(2):
        choice = torch.randint(len(RAND_AUGMENT_OPS), (b,))
        choice[torch.rand(b) < 0.5] = -1  # no operation
        drawn = (magnitude + 0.5 * torch.randn(b)).clamp(0, 10) / 10
        drawn = torch.where(torch.rand(b) < 0.5, drawn, -drawn)
        for index, operation in enumerate(RAND_AUGMENT_OPS.values()):
            chosen = (choice == index).nonzero()[:, 0]
            if len(chosen):
                m = rearrange(drawn[chosen], "b -> b 1 1 1")
                x[chosen] = operation(x[chosen], m)
    return x

# The operations of RandAugment, with timm's ranges. x: (b, 3, h, w) from 0 to 1. m: (b, 1, 1, 1),
# the magnitude from -1 to 1. Operations with one direction ignore its sign.
def posterize(x: Tensor, m: Tensor) -> Tensor:
    """Clear the lowest 4 to 8 of a pixel's 8 bits."""
    step = 2 ** (4 + (4 * m.abs()).int())
    return (x * 255).round() // step * step / 255

def solarize(x: Tensor, m: Tensor) -> Tensor:
    """Invert the bright pixels."""
    threshold = 256 - (256 * m.abs()).int()
    return torch.where((x * 255).round() < threshold, x, 1 - x)

def solarize_add(x: Tensor, m: Tensor) -> Tensor:
    """Brighten the dark pixels."""
    brighter = (x + (110 * m.abs()).int() / 255).clamp(max=1)
    return torch.where((x * 255).round() < 128, brighter, x)

def contrast(x: Tensor, m: Tensor) -> Tensor:
    grey = reduce(TF.rgb_to_grayscale(x), "b c h w -> b 1 1 1", "mean")
    return blend(x, grey, 0.9 * m)

def blend(x: Tensor, base: Tensor, amount: Tensor) -> Tensor:
    """Move x away from `base` (amount > 0) or towards it (amount < 0)."""
    return (x + amount * (x - base)).clamp(0, 1)

def rotate(x: Tensor, m: Tensor) -> Tensor:
    angle = math.radians(30) * m
    return warp(x, [angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0])

def warp(x: Tensor, *rows: list[Tensor | float]) -> Tensor:
    """Move pixels: result(p) = image(matrix · p) at each position p = (column, row, 1), column and
    row from -1 to 1. rows: the matrix's two rows of three numbers, or of tensors like m. Grey where
    the image has no pixel."""
    matrix = torch.empty(len(x), 2, 3)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            matrix[:, i, j] = value.flatten() if isinstance(value, Tensor) else value
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x - 0.5, grid, align_corners=False) + 0.5

RAND_AUGMENT_OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto_contrast": lambda x, m: TF.autocontrast(x),
    "equalize": lambda x, m: TF.equalize(x),
    "invert": lambda x, m: 1 - x,
    "rotate": rotate, "posterize": posterize, "solarize": solarize, "solarize_add": solarize_add,
    "color": lambda x, m: blend(x, TF.rgb_to_grayscale(x), 0.9 * m),
    "contrast": contrast,
    "brightness": lambda x, m: blend(x, torch.zeros(()), 0.9 * m),
    "sharpness": lambda x, m: blend(x, TF.adjust_sharpness(x, 0), 0.9 * m),
    "shear_x": lambda x, m: warp(x, [1, 0.3 * m, 0], [0, 1, 0]),
    "shear_y": lambda x, m: warp(x, [1, 0, 0], [0.3 * m, 1, 0]),
    # By up to 0.45 of the side, which is 2 units long.
    "translate_x": lambda x, m: warp(x, [1, 0, 0.9 * m], [0, 1, 0]),
    "translate_y": lambda x, m: warp(x, [1, 0, 0], [0, 1, 0.9 * m])}

def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Bring each channel to mean 0 and standard deviation 1 over the data set. (b, c, h, w)"""
    mean = rearrange(mean.to(x.device), "c -> c 1 1")
    std = rearrange(std.to(x.device), "c -> c 1 1")
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)

def random_erase(x: Tensor, probability: float) -> Tensor:
    """Fill a random rectangle of some images with noise (Zhong et al., 2017). (b, c, h, w)
    It covers 2 to 33 % of the image. The noise has the mean and variance of normalized pixels."""
    b, _, h, w = x.shape
    tries = 10  # the first rectangle that fits is taken; torchvision draws until one fits, 10 times
    area = h * w * (0.02 + (1 / 3 - 0.02) * torch.rand(b, tries))
    ratio = torch.exp(math.log(0.3) * (2 * torch.rand(b, tries) - 1))  # 0.3 to 1 / 0.3
    heights = (area * ratio).sqrt().round()
    widths = (area / ratio).sqrt().round()
    fits = (heights < h) & (widths < w)
    first = rearrange(fits.int().argmax(1), "b -> b 1")
    height = heights.gather(1, first)  # (b, 1)
    width = widths.gather(1, first)
    top = (torch.rand(b, 1) * (h - height + 1)).floor()
    left = (torch.rand(b, 1) * (w - width + 1)).floor()
    rows = (torch.arange(h) >= top) & (torch.arange(h) < top + height)  # (b, h)
    columns = (torch.arange(w) >= left) & (torch.arange(w) < left + width)  # (b, w)
    erased = (torch.rand(b, 1) < probability) & fits.any(1, keepdim=True)
    inside = rearrange(rows, "b h -> b 1 h 1") & rearrange(columns, "b w -> b 1 1 w")
    inside &= rearrange(erased, "b 1 -> b 1 1 1")
    return torch.where(inside, torch.randn(x.shape), x)

def mix(x: Tensor, labels: Tensor, classes: int, mixup: float, cutmix: float,
        ) -> tuple[Tensor, Tensor]:
    """MixUp or CutMix, with equal chances if both have an alpha above 0. One must have. Images
    (b, c, h, w) and labels (b,) -> mixed images, and targets (b, classes) with the shares."""
    kinds = []  # torchvision refuses an alpha that is the whole number 1
    if mixup:
        kinds.append(T.MixUp(alpha=float(mixup), num_classes=classes))
    if cutmix:
        kinds.append(T.CutMix(alpha=float(cutmix), num_classes=classes))
    return T.RandomChoice(kinds)(x, labels)


# --- 8. Data ------------------------------------------------------------------------------------
class Data(NamedTuple):
    train: Images
    val: Images | None  # held out of the training images and not augmented; best.pt is best on them
    test: Images  # measured at the end, and without `val` after each epoch; it chooses nothing
    classes: list[str]
    mean: Tensor  # (3,), of pixels from 0 to 1
    std: Tensor
    fingerprint: str  # of the training images, those held out included
    test_fingerprint: str

def prepare_data(recipe: Recipe, source: Source | None = None,
                 splits: tuple[Images, Images] | None = None) -> Data:
    """Load all images. Their mean and standard deviation are the source's, if there is one."""
    train, test = splits or (load_split(recipe, train=True), load_split(recipe, train=False))
    test = in_order(test, train.classes)
    all_train = prepare_images(train, recipe)
    unread_test = test
    test = prepare_images(test, recipe)
    empty = {*range(len(train.classes))} - {*all_train.labels.tolist()}
    if empty:
        names = shorten([train.classes[i] for i in sorted(empty)])
        raise UserError(f"there are no training images of {names} that can be read")
    train, val = hold_out(all_train, recipe.val_size)
    if train.is_tensor and recipe.img_size > SMALL:
        note(f"images above {SMALL} pixels in a tensor are neither cropped nor shifted; a list of "
             "arrays or a folder is")
    elif not train.is_tensor and recipe.crop_scale < 1:
        train = replace(train, to_square=T.RandomResizedCrop(
            recipe.img_size, (recipe.crop_scale, 1), interpolation=T.InterpolationMode.BICUBIC))
    if source:
        mean, std = source.statistics
    else:
        mean, std = channel_statistics(all_train, recipe)
    # Large images are read only when they are needed. With --skip-bad, a test image that is damaged
    # during the run is left out at its resume, so the list before that counts.
    test_fingerprint = fingerprint(test if test.is_tensor else unread_test, recipe)
    return Data(train, val, test, all_train.classes, mean, std, fingerprint(all_train, recipe),
                test_fingerprint)

@dataclass
class Images(Dataset):
    """Images and their classes. A list of indices selects a batch.

    images: bytes (n, 3, h, w); or a list of paths or of arrays (h, w, 3) of bytes, which are read
    when they are needed. labels: (n,), indices of classes. to_square: makes a square picture of one
    of any size, once `prepare_images` has set it.
    """
    images: Tensor | Sequence[str | np.ndarray]
    labels: Tensor | Sequence[int]
    classes: list[str]
    to_square: Callable[[Image.Image], Image.Image] | None = None

    def __post_init__(self) -> None:
        self.labels = torch.as_tensor(self.labels).long()
        self.classes = [str(name) for name in self.classes]
        if not self.is_tensor:
            self.images = [str(x) if isinstance(x, os.PathLike) else x for x in self.images]
        x = self.images
        if isinstance(x, Tensor) and (x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3):
            raise UserError("a tensor of images must have type uint8 and shape (n, 3, h, w), not "
                            f"{x.dtype} and {tuple(x.shape)}")
        if len(x) != len(self.labels):
            raise UserError(f"there are {len(x)} images, but {len(self.labels)} labels")
        if not len(x):
            raise UserError("there are no images; training and test set need some each")
        used = {*self.labels.flatten().tolist()}
        if self.labels.ndim != 1 or not used <= {*range(len(self.classes))}:
            raise UserError(f"labels must be indices from 0 to {len(self.classes) - 1}, of a class "
                            "each")

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.images, Tensor)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Bytes (b, 3, h, w) and labels (b,)."""
        if self.is_tensor:
            return self.images[indices], self.labels[indices]
        return torch.stack([self.read(index) for index in indices]), self.labels[indices]

    def read(self, index: int) -> Tensor:
        item = self.images[index]
        try:
            return TF.pil_to_tensor(self.to_square(as_shown(item)))
        except Exception as error:  # Pillow raises anything for a damaged file
            name = item if isinstance(item, str) else f"number {index}"
            reason = re.sub(r" <.*>", "", first_line(error))  # the address of a buffer in memory
            raise UserError(f"cannot read the image {name} ({reason}); --skip-bad leaves such "
                            "images out, but not training images of a run that is resumed"
                            ) from error

    def subset(self, indices: Sequence[int]) -> Images:
        if self.is_tensor:
            images = self.images[list(indices)]
        else:
            images = [self.images[i] for i in indices]
        return replace(self, images=images, labels=self.labels[list(indices)])

def in_order(images: Images, classes: list[str]) -> Images:
    """The same images, but their labels count in the order of `classes`."""
    if images.classes == classes:
        return images
    unknown = [name for name in images.classes if name not in classes]
    if unknown:
        raise UserError(f"there are test images of {shorten(unknown)}, which are not among the "
                        f"known classes: {shorten(classes)}")
    missing = [name for name in classes if name not in images.classes]
    if missing:
        note(f"there are no test images of {shorten(missing)}")
    new_labels = torch.tensor([classes.index(name) for name in images.classes])
    return replace(images, labels=new_labels[images.labels], classes=classes)

def load_split(recipe: Recipe, train: bool) -> Images:
    """The training or the test images, not read yet."""
    if recipe.dataset == "synthetic":
        return draw_shapes(5000 if train else 1000, recipe.img_size, seed=int(train))
    if recipe.dataset == "python":
        raise UserError("these images were handed in from Python: call train.main(..., splits=...)")
    if recipe.dataset == "folder":
        return load_folder(recipe, train)
    return load_torchvision(recipe, train)

TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "val", "valid", "validation")

def load_folder(recipe: Recipe, train: bool) -> Images:
    """The images in DIR/train, or in DIR/test or DIR/val, also in capitals. If DIR has neither, its
    sub-folders are the classes, and every fifth image of each is a test image."""
    root = Path(recipe.data_dir)
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: there is no such folder")
    _, entries, _ = next(os.walk(root, onerror=refuse_folder))
    folders = {name: root / name for name in entries}
    lower = {name.lower(): folders[name] for name in folders} | folders
    if {*TRAIN_FOLDERS} & lower.keys() and {*TEST_FOLDERS} & lower.keys():
        folders = lower  # "Train" alone may be a class
    names = TRAIN_FOLDERS if train else TEST_FOLDERS
    places = [folders[name] for name in names if name in folders]
    if places:
        place = places[0]
        found = find_images(place)
        for other in places[1:]:
            note(f"{other} is not used, since there is {place}")
    elif not folders.keys() & {*TRAIN_FOLDERS, *TEST_FOLDERS}:
        place = root
        found = {}
        for name, paths in find_images(root).items():
            for_test = paths[4::5]
            for_training = [path for i, path in enumerate(paths) if i % 5 != 4]
            found[name] = for_training if train else for_test
        note(f"{root} has no folder train or test: every fifth image of each class is a test image")
        if not any(found.values()):
            raise UserError(f"{root} needs five images of a class or more, to use every fifth for "
                            "testing; or make folders train and test in it")
    else:
        raise UserError(f"--data-dir {root} has no folder {' or '.join(names)}")
    for name in [name for name in found if not found[name]]:
        if train:
            note(f"{place} has no images of {name}")
        del found[name]
    if not found:
        raise UserError(f"{place} needs a folder per class with images in it"
                        + (". --predict takes pictures without classes" if not train else ""))
    if train and len(found) < 2:
        raise UserError(f"{place} has images of one class, {next(iter(found))}; two are needed")
    paths = []
    labels = []
    for label, name in enumerate(found):
        paths += found[name]
        labels += [label] * len(found[name])
    return Images(paths, labels, list(found))

# Folders that systems and other programs leave behind; hidden ones are left out, too.
FOREIGN = {"__MACOSX", "@eaDir", "#recycle", "#snapshot", "@Recycle", "lost+found", "$RECYCLE.BIN",
           "System Volume Information"}

def find_images(root: Path) -> dict[str, list[str]]:
    """Map each class, a sub-folder of root, to the paths of all images below it.
    A note counts what is left out: hidden files, other programs' folders, extensions that Pillow
    does not know, and links to folders below a class, which may lead to other classes or in
    circles. Raises UserError for a folder that cannot be read."""
    found: dict[str, list[str]] = {}
    _, folders, files = next(os.walk(root, onerror=refuse_folder))
    left_out = Counter(kind_of(file) for file in files)
    for folder in sorted(folders):
        if is_foreign(folder):
            left_out[folder] += 1
        else:
            # The same name can be written in two ways in Unicode, say by macOS and by Linux.
            name = unicodedata.normalize("NFC", folder)
            found.setdefault(name, []).extend(pictures_below(root / folder, left_out))
    if left_out:
        note(f"{root}: left out what is no image of a class: {counted(left_out)}")
    return {name: found[name] for name in sorted(found)}

def kind_of(file: str) -> str:
    """How a note calls a file that is left out."""
    if file.startswith("."):
        return "hidden"
    suffix = os.path.splitext(file)[1].lower()
    return f"*{suffix}" if suffix else "without a suffix"

def counted(left_out: Counter) -> str:
    return shorten([f"{count} {what}" for what, count in left_out.most_common()], 9)

def is_foreign(name: str) -> bool:
    return name.startswith(".") or name in FOREIGN

def refuse_folder(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename} ({error.strerror})")

def pictures_below(root: str, left_out: Counter) -> list[str]:
    """The paths of all images in a folder and its sub-folders, in order."""
    suffixes = {suffix for suffix, form in Image.registered_extensions().items()
                if form in Image.OPEN}
    paths = []
    for place, folders, files in os.walk(root, onerror=refuse_folder):
        entered = []
        for folder in sorted(folders):
            if is_foreign(folder) or os.path.islink(os.path.join(place, folder)):
                left_out[folder] += 1
            else:
                entered.append(folder)
        folders[:] = entered  # tells os.walk where to go
        for file in sorted(files):
            suffix = os.path.splitext(file)[1].lower()
            if suffix in suffixes and not file.startswith("."):
                paths.append(os.path.join(place, file))
            else:
                left_out[kind_of(file)] += 1
    return paths

def load_torchvision(recipe: Recipe, train: bool) -> Images:
    """A data set of torchvision, downloaded if need be; ImageNet cannot be."""
    root, name = recipe.data_dir, recipe.dataset
    try:
        if name == "imagenet":  # by identifiers, since two classes have the name "crane"
            data = torchvision.datasets.ImageNet(root, "train" if train else "val")
            paths = [path for path, _ in data.samples]
            complete = 1_281_167 if train else 50_000
            if len(paths) != complete:
                note(f"{data.split_folder} has {len(paths):,} images instead of {complete:,}. If "
                     "its unpacking was stopped, delete it and start again")
            return Images(paths, data.targets, data.wnids)
        if name == "food101":
            data = torchvision.datasets.Food101(root, "train" if train else "test", download=True)
            return Images(data._image_files, data._labels, data.classes)
        data = getattr(torchvision.datasets, name.upper())(root, train, download=True)
        return Images(data.data, data.targets, data.classes)
    except (OSError, RuntimeError, ImportError) as error:
        raise UserError(f"{name} could not be loaded ({first_line(error)}). assets/howto.md "
                        f"says which file {root}/ lacks. If an archive was unpacked in part, "
                        "delete the folder that came from it. Or use --dataset folder or synthetic"
                        ) from error

SHAPES = {"star": 0.6, "diamond": 1, "disk": 2, "square": 9}  # exponents p: |u|^p + |v|^p < 1

def draw_shapes(count: int, size: int, seed: int) -> Images:
    """Noisy pictures of the four shapes, full or hollow, at random places, sizes and colours."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.tensor(list(SHAPES.values()))
    labels = torch.arange(count) % (2 * len(SHAPES))
    axis = torch.linspace(-1, 1, size)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        """Random numbers (*shape, 1, 1): one for each picture, or for each of its channels."""
        return low + (high - low) * torch.rand(*shape, 1, 1, generator=generator)

    parts = []
    for part in labels.split(500):
        n = len(part)
        power = rearrange(powers[part // 2], "n -> n 1 1")
        hollow = rearrange(part % 2, "n -> n 1 1")
        u = (axis - uniform(-0.3, 0.3, n)).abs() / uniform(0.4, 0.7, n)
        v = (rearrange(axis, "h -> h 1") - uniform(-0.3, 0.3, n)).abs() / uniform(0.4, 0.7, n)
        distance = (u**power + v**power) ** (1 / power)
        inside = (distance < 1) & (distance > 0.6 * hollow)
        images = uniform(0, 0.4, n, 3)
        images = images + uniform(0.4, 0.6, n, 3) * rearrange(inside, "n h w -> n 1 h w")
        images += 0.08 * torch.randn(images.shape, generator=generator)
        parts.append((images.clamp(0, 1) * 255).byte())
    classes = [f"{kind} {name}" for name in SHAPES for kind in ("full", "hollow")]
    return Images(torch.cat(parts), labels, classes)

def prepare_images(images: Images, recipe: Recipe) -> Images:
    """Images as they are evaluated: squares of --img-size. Small ones are read at once."""
    size = recipe.img_size
    if images.is_tensor:
        if images.images.shape[2:] != (size, size):
            height, width = images.images.shape[2:]
            raise UserError(f"the images have {height}x{width} pixels: make squares of them, and "
                            "give their side as --img-size")
        return images
    images = replace(images, to_square=evaluation_square(size, recipe.crop_pct))
    if recipe.skip_bad:
        images = without_bad(images)
    if size > SMALL:
        return images
    batches = tqdm(evaluation_batches(images, recipe), "reading images", disable=None,
                   leave=False)
    return replace(images, images=torch.cat([x for x, _ in batches]))

def evaluation_square(size: int, crop_pct: float | None) -> T.Transform:
    """Make a square from a picture of any size, as the authors do for evaluation: the middle 224
    pixels of 256. From 384 pixels on they squeeze the whole image. Up to 64 pixels this takes the
    largest square in the middle."""
    bicubic = T.InterpolationMode.BICUBIC
    if crop_pct is None:
        crop_pct = 0 if size >= 384 else 0.875
    if size <= SMALL:
        crop_pct = 1
    if crop_pct == 0:
        return T.Resize((size, size), interpolation=bicubic)
    return T.Compose([T.Resize(int(size / crop_pct), interpolation=bicubic), T.CenterCrop(size)])

def without_bad(images: Images) -> Images:
    """Leave out what cannot be read."""
    good = []
    bad = []
    for i in tqdm(range(len(images)), "checking images", disable=None, leave=False):
        try:
            images.read(i)
            good.append(i)
        except UserError:
            item = images.images[i]
            bad.append(item if isinstance(item, str) else f"number {i}")
    if bad:
        note(f"images that cannot be read are left out, {len(bad)}: {shorten(bad)}")
    if not good:
        raise UserError("no image can be read")
    return images.subset(good)

def as_shown(item: str | np.ndarray) -> Image.Image:
    """A picture as a viewer shows it, in RGB: upright, 16 bits scaled to 8, on a white ground."""
    if isinstance(item, str):  # Pillow 13 garbles some rotated grey TIFFs that it opens by name
        picture = Image.open(io.BytesIO(Path(item).read_bytes()))
    else:
        picture = Image.fromarray(item)
    is_deep = picture.mode.startswith("I;16")
    is_deep |= picture.mode == "I" and picture.format in ("PNG", "PPM")
    if picture.format == "TIFF" and picture.mode == "RGBA" and not picture.tag_v2.get(338):
        # Tag 338 says what a fourth band is. Without it, the band may be infrared.
        note("the fourth band of TIFFs that do not call it transparency is left out")
        picture = Image.merge("RGB", picture.split()[:3])
    is_negative = is_deep and picture.format == "TIFF" and picture.tag_v2.get(262) == 0
    picture.load()  # before the next lines, which would take damaged pixels for broken EXIF data
    with contextlib.suppress(Exception):  # broken EXIF data: the picture as it is stored
        picture = ImageOps.exif_transpose(picture)
    if is_deep:
        picture = to_8_bits(np.asarray(picture))
    if is_negative:  # 0 is white; Pillow knows this of up to 8 bits
        picture = ImageOps.invert(picture)
    if picture.mode in ("I", "F"):
        raise ValueError("which of its 32-bit values is white is unknown: convert it to 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture)
    return picture.convert("RGB")

def to_8_bits(values: np.ndarray) -> Image.Image:
    """A grey picture of 16 bits. Cameras and scanners store 12 or 8 bits in such files, too."""
    largest = int(values.max(initial=0))
    bits = next(bits for bits in (8, 12, 16) if largest < 2**bits)
    if bits < 16:
        note(f"16-bit pictures without a value above {2**bits - 1} are read as {bits}-bit pictures")
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8))

def hold_out(images: Images, val_size: float) -> tuple[Images, Images | None]:
    """Split off val_size images, or below 1 that share: the same share of each class."""
    count = round(val_size * len(images)) if val_size < 1 else int(val_size)
    if val_size and not count:
        raise UserError(f"--val-size {val_size:g} of {len(images)} images is none")
    if not count:
        return images, None
    if count >= len(images):
        raise UserError(f"--val-size must be below the {len(images):,} training images")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    # Within each class the images get evenly spaced ranks from 0 to 1. The `count` images of lowest
    # rank are held out: the same share of each class, as far as possible.
    rank = torch.zeros(len(images), dtype=torch.double)
    for label in range(len(images.classes)):
        members = order[images.labels[order] == label]
        rank[members] = (torch.arange(len(members)) + 0.5).double() / len(members)
    order = order[rank[order].argsort(stable=True)]  # equal ranks stay in their random order
    val = images.subset(order[:count].tolist())
    train = images.subset(order[count:].tolist())
    lost = {*images.labels.tolist()} - {*train.labels.tolist()}
    if lost:
        names = shorten([images.classes[i] for i in sorted(lost)])
        raise UserError(f"--val-size {val_size:g} leaves no training images of {names}")
    return train, val

def channel_statistics(images: Images, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,) of pixels from 0 to 1; above 64x64, of some 2,000 images."""
    if not images.is_tensor:
        images = images.subset(range(0, len(images), max(1, len(images) // 2000)))
    sums = torch.zeros(2, 3, dtype=torch.double)
    for batch, _ in evaluation_batches(images, recipe):
        x = batch / 255
        sums[0] += len(x) * reduce(x, "b c h w -> c", "mean")
        sums[1] += len(x) * reduce(x**2, "b c h w -> c", "mean")
    mean, mean_square = sums / len(images)
    std = (mean_square - mean**2).clamp(min=1e-6).sqrt()  # with a single colour: no division by 0
    return mean.float(), std.float()

def fingerprint(images: Images, recipe: Recipe) -> str:
    """A hash of the images' classes and order, and of their contents or, above 64x64, file names.
    Drawn shapes are described by their settings: their last bits depend on the CPU."""
    digest = hashlib.sha256(json.dumps([images.classes, images.labels.tolist()]).encode())
    if recipe.dataset == "synthetic":
        digest.update(f"shapes of {recipe.img_size} pixels".encode())
        return digest.hexdigest()
    for image in images.images:
        if isinstance(image, str) and recipe.dataset == "python":
            digest.update(os.fsencode(image))
        elif isinstance(image, str):
            path = Path(os.path.relpath(image, recipe.data_dir))
            digest.update(os.fsencode(path.as_posix()))  # the same on Windows
        else:
            digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()

def evaluation_batches(images: Images, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all images in order: bytes (b, 3, h, w) and labels (b,)."""
    # Without gradients an image takes less than an eighth of the memory.
    size = min(8 * recipe.part_size, 250 if images.is_tensor else 64)
    indices = range(len(images))
    order = (list(indices[start : start + size]) for start in range(0, len(images), size))
    return read_in_processes(images, order, 0 if images.is_tensor else recipe.workers)

def read_in_processes(reader: Dataset, order: Iterable, workers: int,
                      pin_memory: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield reader[item] for the items in order, computed by other processes ahead of time.
    An item stands for a whole batch, so DataLoader's own way to make batches is turned off."""
    batches = DataLoader(Reporter(reader), batch_size=None, sampler=order, num_workers=workers,
                         worker_init_fn=prepare_process, pin_memory=pin_memory)
    for batch, notes in batches:
        for text in notes:
            note(text)
        if isinstance(batch, UserError):
            raise batch
        yield batch

class Reporter(Dataset):
    """reader[item] in another process, which hands its errors and notes over to the main one: there
    an error is raised without a traceback, and a note is shown once."""
    def __init__(self, reader: Dataset) -> None:
        self.reader = reader

    def __getitem__(self, item: Any) -> tuple[tuple[Tensor, Tensor] | UserError, list[str]]:
        try:
            batch = self.reader[item]
            if get_worker_info():  # here, since the queue would only print its errors, and go on
                batch = tuple(part.share_memory_() for part in batch)
        except UserError as error:
            batch = error
        notes = list(NOTES)
        NOTES.clear()
        return batch, notes

class BatchReader(Dataset):
    """Step -> augmented images and targets, which the reading processes compute ahead of time. The
    random numbers follow from the seed and the step, whichever process draws them. The last images
    of an epoch, if they do not fill a batch, are left out, unless there is no other batch."""
    def __init__(self, data: Data, recipe: Recipe, steps_per_epoch: int) -> None:
        self.data, self.recipe, self.steps_per_epoch = data, recipe, steps_per_epoch

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        data, r = self.data, self.recipe
        epoch, position = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(data.train), r.seed, epoch)
        first = position * r.batch_size
        indices = order[first : first + r.batch_size].tolist()
        torch.manual_seed(seed_for(r.seed, "augmentation", step))  # before the images are cropped
        images, labels = data.train[indices]
        return augment(r, images, labels, len(data.classes), data.mean, data.std, epoch)

@lru_cache(maxsize=1)
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The indices of all images, in a new order for each epoch."""
    generator = torch.Generator().manual_seed(seed_for(seed, "order", epoch))
    return torch.randperm(count, generator=generator)

def prepare_process(_worker: int) -> None:
    """Leave signals, which may reach all processes, to the main one."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

def end_processes() -> None:
    """End the processes that an error in a user's script left behind. Python would send SIGTERM,
    which they ignore, and then wait for them for ever."""
    if os.name == "posix":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.terminate()
            process.join(1)
            process.kill()

multiprocessing.util.Finalize(None, end_processes, exitpriority=0)  # calls it when Python ends

def seed_for(seed: int, purpose: str, number: int) -> int:
    """A seed of its own for each purpose and step or epoch: a resumed run draws the same."""
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


# --- 9. Checkpoints, folders and signals --------------------------------------------------------
MADE_BY = "train.py, format 3"  # marks this program's files
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "img_size": 224}

@dataclass
class Source:
    """Weights that were read, from a file or a download, and what is known about them."""
    name: str
    network: dict[str, Any]  # the settings that describe the network
    num_classes: int
    tensors: Mapping[str, Tensor]  # averaged, where there is an average
    expects: dict[str, Any]  # mean, std, img_size and perhaps crop_pct of its images
    classes: list[str] | None  # names, if they are known
    settings: dict[str, Any]  # of the run that made the file; {} for other programs' files
    state: Mapping[str, Any]  # what our program saved beside the weights; {} for other files

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (3,) of its images' pixels, from 0 to 1."""
        return torch.tensor(self.expects["mean"]), torch.tensor(self.expects["std"])

def open_source(name: str) -> Source:
    """Read weights of any layout. Raises UserError unless they are a ConvNeXt's or, from this
    program, a network's of the road. What a file says of its run counts only if it is ours."""
    name = file_in(name)
    with one_line_errors(name):
        content, metadata, described = convnext.read_source(name)
        saved = saved_by_us(content, metadata)
        args = saved.get("args", {})
        if args.get("road"):
            tensors = road_tensors(content)
            network = {key: args[key] for key in ("road", "width", "patch_size", "layer_scale")}
            num_classes = len(saved["classes"])
        else:
            tensors = convnext.read_weights(content)
            network = convnext.infer_architecture(tensors)
            num_classes = network.pop("num_classes")
            channels = network.pop("in_channels")
            if channels != 3:
                raise ValueError(f"its images have {channels} channels, not 3")
    known = described | args | saved  # this program stores mean and std beside its settings
    said = {key: known[key] for key in (*IMAGENET, "crop_pct") if known.get(key) is not None}
    expects = IMAGENET | said
    if not said.keys() >= IMAGENET.keys():
        size = expects["img_size"]
        note(f"{name} does not say all about the images that it expects: assuming {size}x{size} "
             f"pixels, mean {expects['mean']} and standard deviation {expects['std']}")
    classes = known.get("classes")
    if classes and num_classes and len(classes) != num_classes:
        note(f"{name} has {num_classes} classes; the {len(classes)} names beside it are not used")
        classes = None
    return Source(name, network, num_classes, tensors, expects, classes, args, saved)

def file_in(address: str) -> str:
    """The weights in the folder of a run; any other address as it is."""
    address = os.path.expanduser(address)
    for name in ("weights.safetensors", "last.pt"):
        path = os.path.join(address, name)
        if os.path.exists(path):
            return path
    if os.path.exists(os.path.join(address, "args.json")):
        raise UserError(f"{address} holds no weights yet, neither weights.safetensors nor last.pt")
    return address

def saved_by_us(content: Mapping, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """What this program stored beside the weights; {} if the file is another program's."""
    if str(content.get("made_by", "")).startswith("train.py, format"):
        return content
    if "checksum" not in metadata:
        return {}
    ours = {key: value for key, value in metadata.items() if key != "checksum"}
    if metadata["checksum"] != checksum(content, ours):
        raise ValueError("it is damaged: its checksum differs")
    return {key: json.loads(value) for key, value in ours.items() if key != "made_by"}

def road_tensors(content: Mapping) -> Mapping[str, Tensor]:
    """The weights of a network of the road: the average in last.pt, if there is one."""
    if "ema" in content:
        prefix = "module."
        return {name.removeprefix(prefix): tensor for name, tensor in content["ema"].items()
                if name.startswith(prefix)}
    return content.get("model", content)

def load_network(source: Source) -> nn.Module:
    """The source's network with its weights, in evaluation mode."""
    with one_line_errors(source.name):
        if not source.network.get("road"):
            return convnext.from_checkpoint(source.tensors)
        model = build_network(Recipe(**source.network), source.num_classes)
        model.load_state_dict(source.tensors)
        return model.eval()

NO_CLASSIFIER = "{} has no classifier: train one with --init-from"

def check_classes(source: Source, classes: list[str]) -> None:
    """Refuse a classifier for other classes; say which are assumed if the source names none."""
    count = source.num_classes
    if not count:
        raise UserError(NO_CLASSIFIER.format(source.name))
    if count != len(classes) or source.classes not in (None, classes):
        known = f" ({shorten(source.classes)})" if source.classes else ""
        others = f"{len(classes)} classes"
        if count == len(classes):
            others = "others, or the same in another order"
        raise UserError(f"{source.name} has {count} classes{known}. The images here have {others} "
                        f"({shorten(classes)})")
    if source.classes:
        return
    order = [f"{name} ({number})" for number, name in enumerate(classes)]
    note(f"assuming that the outputs of {source.name} are {shorten(order)}")
    natural = sorted(classes, key=natural_order)
    if classes == sorted(classes) and classes != natural:
        note(f"timm sorts these classes in another way, {shorten(natural)}. WARNING: with weights "
             "that were trained so, all results are wrong")

def natural_order(name: str) -> list:
    """A key for sorting in which 2 comes before 10."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if part.isdecimal() else part for part in parts]

def save(run: Run) -> None:
    """Write last.pt and metrics.csv and, at the end, weights.safetensors. last.pt comes after the
    weights, so a run that is killed in between writes both again."""
    check_finite(run)
    if run.step == run.total_steps and not run.to_measure:
        save_weights(run)
    write_file(run.folder / "last.pt", lambda path: torch.save(state_of(run), path))
    if run.history:
        try:
            write_table(run.folder / "metrics.csv", run.history)
        except UserError as error:  # on Windows, while another program shows it
            note(f"{error}; the next epoch writes it again")

def state_of(run: Run) -> dict[str, Any]:
    """Plain data, which `torch.load(weights_only=True)` reads without running any code."""
    data = run.data
    state = {
        "made_by": MADE_BY, "args": asdict(run.recipe), "classes": data.classes,
        "mean": data.mean.tolist(), "std": data.std.tolist(), "fingerprint": data.fingerprint,
        "test_fingerprint": data.test_fingerprint, "step": run.step, "history": run.history,
        "sums": run.sums, "to_measure": run.to_measure,
        "teacher": run.teacher.identity if run.teacher else None}
    return state | {name: part.state_dict() for name, part in parts_of(run).items()}

def parts_of(run: Run) -> dict[str, Any]:
    """Whatever has a state_dict, by its name in last.pt."""
    parts = {"model": run.model, "scaler": run.scaler}
    if run.ema:
        parts["ema"] = run.ema
    for optimizer in run.optimizers:
        parts[type(optimizer).__name__] = optimizer
    return parts

def load_state(run: Run, state: Mapping[str, Any]) -> None:
    """Bring a run to where it stood. Raises UserError if its images or its teacher changed."""
    place = run.recipe.data_dir
    for what, key in (("training", "fingerprint"), ("test", "test_fingerprint")):
        if state[key] != getattr(run.data, key):
            raise UserError(f"--resume needs the {what} images that the run began with: those in "
                            f"{place} have other names, classes or contents")
    if run.teacher and state["teacher"] != run.teacher.identity:
        raise UserError(f"--resume needs the teacher that the run began with, unlike "
                        f"{run.recipe.teacher}")
    for name, part in parts_of(run).items():
        if state[name]:  # a scaler that was not needed has none
            part.load_state_dict(state[name])
    run.step = state["step"]
    run.history = state["history"]
    run.sums = state["sums"]
    run.to_measure = state["to_measure"]
    if run.sums:
        run.sums["loss"] = run.sums["loss"].to(run.device)

def save_best(run: Run) -> None:
    """Write best.pt if the last epoch is better on the held-out images than all before."""
    if not run.data.val:
        return
    column = "val_ema_top1" if run.ema else "val_top1"
    *earlier, last = (row[column] for row in run.history if column in row)
    if last > max(earlier, default=-1.0):
        write_file(run.folder / "best.pt", lambda path: torch.save(state_of(run), path))

def save_weights(run: Run) -> None:
    """Write weights.safetensors: the averaged weights, if there is an average."""
    tensors = run.eval_model.state_dict()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    state = {"args": asdict(run.recipe), "classes": run.data.classes,
             "mean": run.data.mean.tolist(), "std": run.data.std.tolist(),
             "test_fingerprint": run.data.test_fingerprint}
    metadata = {key: json.dumps(value) for key, value in state.items()}
    metadata["made_by"] = MADE_BY
    metadata["checksum"] = checksum(tensors, metadata)
    content = to_safetensors(tensors, metadata)
    write_file(run.folder / "weights.safetensors", lambda path: path.write_bytes(content))

def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """A hash of what weights.safetensors holds: the format has no checksum of its own."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        values = tensors[name].cpu().contiguous().flatten()
        digest.update(name.encode() + bytes(values.view(torch.uint8).numpy()))
    return digest.hexdigest()

def write_table(path: Path, rows: list[dict]) -> None:
    table = io.StringIO()
    columns = list(max(rows, key=len))  # an epoch that was not measured has fewer
    writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    text = table.getvalue()  # file names may hold bytes that are no characters
    write_file(path, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"))

def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Replace a file as a whole: a crash or a full disk leaves the old one as it was."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # Windows refuses while another program reads the file. For a table that can be long.
        for _ in range(20 if path.suffix == ".csv" else 600):
            with contextlib.suppress(PermissionError):
                os.replace(temporary, path)
                return
            time.sleep(0.1)
        os.replace(temporary, path)
    except Exception as error:  # PyTorch reports a full disk by a RuntimeError
        raise UserError(f"cannot write {path} ({first_line(error)}); the old files stay") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

@torch.no_grad()
def check_finite(run: Run) -> float:
    """The mean loss of this epoch so far. Raises UserError if it or a weight is not finite."""
    if not run.sums:
        return math.nan
    steps_of_epoch = (run.step - 1) % run.steps_per_epoch + 1  # so far
    loss = run.sums["loss"] / steps_of_epoch
    norm = nn.utils.get_total_norm(run.model.parameters())
    if not (loss + norm).isfinite():
        place = " in a new run, with --init-from" if run.recipe.resume else ""
        raise UserError(f"by step {run.step}, at lr {run.sums['lr']:.1e}, the mean loss became "
                        f"{loss:.3g} and the norm of the weights {norm:.3g}: try --amp off, or a "
                        f"lower --lr (or --muon-lr) or --clip-grad 1{place}. {run.folder} stays as "
                        "it was")
    return loss.item()

def new_folder(recipe: Recipe) -> str:
    """--output, or a folder that no other run has, even if it starts in the same second."""
    parent = Path(recipe.output or "runs")
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {parent} ({error.strerror})") from error
    if recipe.output:
        return recipe.output
    name = time.strftime("%Y%m%d-%H%M%S-") + network_name(recipe).replace(" ", "-")
    for number in itertools.count(1):
        folder = parent / (f"{name}-{number}" if number > 1 else name)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return str(folder)

@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder. One that stays empty is removed."""
    file = folder / ".lock"
    guard = FileLock(file, timeout=0)
    try:
        guard.acquire()
    except Timeout as error:
        raise UserError(f"another run is writing to {folder}") from error
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        raise UserError(f"cannot lock {folder} ({first_line(error)}): a run needs a folder that it "
                        "may write to, on a disk with locks") from error
    try:
        yield
    finally:
        guard.release()
        with contextlib.suppress(OSError):  # the present folder cannot be removed
            if [path.name for path in folder.iterdir()] in ([], [".lock"]):
                file.unlink(missing_ok=True)
                folder.rmdir()

SIGNALS = [number for number in signal.Signals  # Windows lacks the last two
           if number.name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")]

@contextlib.contextmanager
def catch_signals(run: Run) -> Iterator[None]:
    """Let a signal end the run after the present step. A second Ctrl-C acts at once.
    SIGTERM and SIGUSR1 come from schedulers, SIGHUP from a closed terminal, and may come twice."""
    def receive(number: int, _frame: Any) -> None:
        run.stopped_by = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if threading.current_thread() is not threading.main_thread():  # others cannot receive signals
        yield
        return
    with contextlib.ExitStack() as handlers:  # puts the former handlers back
        for number in SIGNALS:
            by_nohup = number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
            if not by_nohup:
                former = signal.signal(number, receive)
                handlers.callback(signal.signal, number, former)
        yield

def log_to_tensorboard(run: Run, row: dict[str, float]) -> None:
    """Add an epoch's row to the run's folder; `tensorboard --logdir runs` shows it. What goes wrong
    here does not end the run, since metrics.csv has the same numbers."""
    try:
        if run.tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            run.tensorboard = SummaryWriter(run.folder, purge_step=row["epoch"])
        for name in [name for name in row if name not in ("epoch", "step")]:
            run.tensorboard.add_scalar(name, row[name], row["epoch"])
        run.tensorboard.flush()
    except Exception as error:  # noqa: BLE001
        note(f"TensorBoard does not get all numbers, metrics.csv does ({first_line(error)})")


# --- 10. Prediction -----------------------------------------------------------------------------
def predict(weights: str, pictures: str | Sequence[str], top: int = 5,
            device: str = "auto") -> list[tuple[str, list[tuple[str, float]]]]:
    """Say what is in pictures: for each, its path and the most likely classes with probabilities.

        for path, classes in predict("runs/NAME/weights.safetensors", "photo.jpg"):
            print(path, classes[0])                          # photo.jpg ('cat', 0.97)

    weights: whatever --eval-only takes. pictures: a path, a folder, or a list of paths. top: how
    many classes to name.
    """
    source = open_source(str(weights))
    # No other processes: on some systems they would run the user's script once more.
    recipe = combine({"eval_only": str(weights), "device": device, "workers": 0}, source)
    if isinstance(pictures, str | os.PathLike):
        pictures = find_pictures(os.path.expanduser(pictures))
    return list(predictions(source, recipe, [str(path) for path in pictures], top))

def print_predictions(source: Source, recipe: Recipe) -> None:
    """Print the predictions for --predict's pictures, or write them to --output."""
    paths = find_pictures(recipe.predict)
    if recipe.output:
        check_writable(Path(recipe.output))
    names = class_names(source)
    rows = []
    for path, classes in predictions(source, recipe, paths):
        text = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in classes)
        if not recipe.output:
            say(f"{path}: {text}")
        row = {"path": path, "true": true_class(path, recipe.predict, names)}
        for i, (name, probability) in enumerate(classes, 1):
            row |= {f"class_{i}": name, f"probability_{i}": f"{probability:.4f}"}
        rows.append(row)
    if recipe.output:
        if not any(row["true"] for row in rows):
            for row in rows:
                del row["true"]
        write_table(Path(recipe.output), rows)
        say(f"{len(rows)} predictions written to {recipe.output}")

def check_writable(path: Path) -> None:
    """Fail before the predictions, not after them."""
    if not path.parent.is_dir():
        raise UserError(f"--output: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output: cannot write into the folder {path.parent}")
    if path.exists():
        try:
            open(path, "ab").close()  # another program may hold it
        except OSError as error:
            raise UserError(f"--output: cannot write {path} ({error.strerror})") from error

@torch.inference_mode()
def predictions(source: Source, recipe: Recipe, paths: list[str],
                top: int = 5) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Yield each path with its most likely classes and their probabilities."""
    if not paths:
        return
    names = class_names(source)
    square = evaluation_square(recipe.img_size, recipe.crop_pct)
    images = Images(paths, [0] * len(paths), names, square)
    if recipe.skip_bad:
        images = without_bad(images)
    device = pick_device(recipe.device)
    model = load_network(source).to(device, memory_format=torch.channels_last)
    mean, std = source.statistics
    done = 0
    if len(paths) <= 100:  # other processes would take longer to start
        recipe = replace(recipe, workers=0)
    for batch, _ in evaluation_batches(images, recipe):
        x = normalize(batch.to(device) / 255, mean, std)
        best = model(x).softmax(1).topk(min(top, len(names)))
        for probabilities, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            likely = [names[index] for index in indices]
            yield images.images[done], list(zip(likely, probabilities, strict=True))
            done += 1

def find_pictures(place: str) -> list[str]:
    """A picture, or all pictures in a folder and its sub-folders."""
    if os.path.isfile(place):
        return [place]
    if not os.path.isdir(place):
        raise UserError(f"--predict {place}: there is no such file or folder")
    left_out = Counter()
    paths = pictures_below(place, left_out)
    if left_out:
        note(f"{place}: left out what is no picture: {counted(left_out)}")
    if not paths:
        raise UserError(f"--predict {place}: there is no picture in this folder")
    return paths

def true_class(path: str, root: str, names: list[str]) -> str:
    """The class of a picture, if it is in a folder below root with the name of a class."""
    folders = Path(os.path.relpath(path, root)).parts[:-1]
    name = unicodedata.normalize("NFC", folders[0]) if folders else ""
    return name if name in names else ""

def class_names(source: Source) -> list[str]:
    """The source's class names, or what is assumed if it names none."""
    if not source.num_classes:
        raise UserError(NO_CLASSIFIER.format(source.name))
    if source.classes:
        return source.classes
    if source.num_classes == 1000:
        note(f"{source.name} does not name its 1,000 classes: assuming ImageNet's")
        return torchvision.models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1.meta["categories"]
    note(f"{source.name} does not name its classes: they are shown as numbers")
    return [str(number) for number in range(source.num_classes)]


# --- 11. Command line ---------------------------------------------------------------------------
FIELDS = {field.name: field for field in fields(Recipe)}
NUMBERS = tuple[int, ...]
# The types that a setting can have, with or without " | None".
KINDS = {"str": str, "int": int, "float": float, "bool": bool, "tuple[int, ...]": NUMBERS}
TYPES = {name: KINDS[about.type.removesuffix(" | None")] for name, about in FIELDS.items()}
PATHS = {"resume", "eval_only", "init_from", "teacher", "predict", "output", "data_dir"}
# The settings that may change when a run is resumed, and those that --eval-only takes.
ANY_TIME = {"resume", "data_dir", "workers", "device", "accumulate", "eval_every", "tta", "teacher",
            "skip_bad", "amp", "compile"}
EVALUATION = {"eval_only", "predict", "output", "dataset", "data_dir", "img_size", "crop_pct",
              "skip_bad", "workers", "device", "amp", "tta", "batch_size"}

def parse(argv: list[str]) -> dict[str, Any]:
    """The command line -> what was typed, and nothing else: {"batch_size": 64, ...}."""
    parser = argparse.ArgumentParser(
        usage="python train.py [--option value ...]; --help lists the options",
        argument_default=argparse.SUPPRESS, allow_abbrev=False)  # --mix must not pass for --mixup
    group = parser
    for name, about in FIELDS.items():
        allowed, short = about.metadata["allowed"], about.metadata["short"]
        if about.metadata["group"]:
            group = parser.add_argument_group(about.metadata["group"])
        how: dict[str, Any] = {"type": TYPES[name]}
        if TYPES[name] is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif TYPES[name] == NUMBERS:
            how = {"type": int, "nargs": "+"}
        elif isinstance(allowed, tuple):
            how["choices"] = allowed
        text = about.metadata["help"]
        if about.default is not None and about.default is not False:
            text += f"; default {about.default}"
        text = text.replace("%", "%%")
        group.add_argument(flag(name), *([short] if short else []), help=text, **how)
    # --drop_path=0.1 -> --drop-path=0.1, since the authors' program has underscores
    argv = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in argv]
    typed = vars(parser.parse_args(argv))
    if "" in typed.values():  # from a shell variable that is not set
        parser.error("no value may be empty")
    for name in PATHS & typed.keys():
        typed[name] = os.path.expanduser(typed[name])
    for name in {"depths", "dims"} & typed.keys():
        typed[name] = tuple(typed[name])
    return typed

def flag(name: str) -> str:
    return "--" + name.replace("_", "-")

def as_typed(name: str, value: Any) -> str:
    """A setting as it can be typed: --tta, --dims 96 192, --lr 0.001."""
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    values = value if isinstance(value, tuple) else [value]
    return f"{flag(name)} {quoted(values)}"

def quoted(values: Iterable) -> str:
    """Words as a shell reads them. Windows' knows double quotes alone."""
    words = [str(value) for value in values]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)

def combine(typed: Mapping[str, Any], source: Source | None = None) -> Recipe:
    """Merge the settings. Each of these wins over those before it:

        the defaults of Recipe
        what the weights of --init-from or --eval-only say of themselves
        the named recipe, or for --eval-only some settings of the run that made the weights, such
            as its data set
        what was typed

    --resume has all settings from its file.
    """
    refuse_contradictions(typed, source)
    if "resume" in typed:
        settings = source.settings | typed | {"output": str(Path(typed["resume"]).parent)}
        unknown = settings.keys() - FIELDS.keys()
        if unknown:
            raise UserError(f"{typed['resume']} is of a later version: it has the unknown settings "
                            f"{shorten(sorted(unknown))}")
        return Recipe(**settings)
    weights = {}
    named = {}
    if source:
        weights = dict(source.network)
        weights["img_size"] = source.expects["img_size"]
        if typed.get("img_size", weights["img_size"]) == weights["img_size"]:
            weights["crop_pct"] = source.expects.get("crop_pct")  # it belongs to this size
    if "eval_only" in typed:
        kept = {"skip_bad", "amp", "batch_size", "accumulate"}
        if source.settings.get("amp") == "fp16":
            kept.remove("amp")  # a CPU can measure this run, but not in float16
        trained_on = source.settings.get("dataset")
        if typed.get("dataset", trained_on) == trained_on:
            kept |= {"dataset", "data_dir"}  # the folder belongs to this data set
        if "batch_size" in typed:
            kept.remove("accumulate")  # it belongs to the batch size of the run
        named = {key: value for key, value in source.settings.items() if key in kept}
    elif typed.get("recipe") == "fast":
        named = fast(Recipe(**merge(FAST | {"start_size": 0}, typed)))
    elif typed.get("recipe") == "finetune":
        # No --lr that was typed is below this min_lr.
        named = finetune(Recipe(**merge({"min_lr": 0.0}, weights, typed)))
        named["min_lr"] = typed.get("lr", named["lr"]) / 50  # as in the paper's fine-tuning
    if typed.get("freeze_backbone"):
        named["drop_path"] = 0.0  # there is nothing to regularize
    recipe = Recipe(**merge(weights, named, typed))
    refuse_idle(typed, recipe)
    return recipe

def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later settings win. One that names a network replaces all of the former description."""
    merged: dict[str, Any] = {}
    for layer in layers:
        if layer.keys() & {"variant", "depths", "road"}:
            merged = {key: value for key, value in merged.items() if key not in NETWORK}
        merged |= layer
    return merged

def fit_to_data(recipe: Recipe, images: int, typed: Mapping[str, Any]) -> Recipe:
    """Change --recipe finetune for a small data set. The paper's values are meant for ImageNet's
    75,000 steps; with few images they hardly move the weights. assets/results.md has the runs
    behind the values here."""
    if recipe.recipe != "finetune" or recipe.resume or images >= 40_000:
        return recipe
    batch_size = typed.get("batch_size", max(1, min(32, images // 4)))
    steps = max(1, images // batch_size)  # in an epoch
    epochs = typed.get("epochs", max(20, math.ceil(1000 / steps)))
    lr = typed.get("lr", 3e-4)
    chosen = {"batch_size": batch_size, "epochs": epochs, "lr": lr, "min_lr": lr / 50,
              "rand_augment": 0.0, "eval_every": max(1, epochs // 20)}
    chosen = {name: value for name, value in chosen.items() if name not in typed}
    return replace(recipe, **chosen)

def refuse_contradictions(typed: Mapping[str, Any], source: Source | None) -> None:
    """Raise UserError for flags that cannot stand together."""
    names = typed.keys()
    saved = source.settings if source else {}
    changed = [flag(name) for name in changed_settings(typed, saved)]
    unused = [flag(name) for name in typed if name not in EVALUATION]
    resumes = "resume" in names
    evaluates = "eval_only" in names
    begins = "init_from" in names
    is_fast = typed.get("recipe") == "fast"
    finetunes = typed.get("recipe") == "finetune"
    rules = (
        (resumes + evaluates + begins > 1,
         "only one of --resume, --eval-only and --init-from can be given"),
        (resumes and "to_measure" not in source.state, "--resume takes last.pt, of this version"),
        (resumes and Path(typed["resume"]).name == "best.pt",
         "--resume continues last.pt; a new run can begin with best.pt by --init-from"),
        (resumes and changed,
         f"--resume keeps all settings: leave out {shorten(changed)}, or give --init-from"),
        (resumes and "teacher" in names and not saved.get("teacher"),
         "--resume keeps all settings: leave out --teacher, or give --init-from"),
        (evaluates and unused, f"--eval-only trains nothing: leave out {shorten(unused)}"),
        (evaluates and "output" in names and "predict" not in names,
         "--output needs --predict beside --eval-only"),
        ("predict" in names and not typed.get("output", ".csv").endswith(".csv"),
         f"--predict writes a .csv file, not --output {typed.get('output')}"),
        ("predict" in names and not evaluates, "--predict needs weights: --eval-only WEIGHTS"),
        ("predict" in names and names & {"tta", "amp", "dataset", "data_dir"},
         "--predict has no --tta, --amp, --dataset or --data-dir"),
        (len(names & {"variant", "depths", "road"}) > 1,
         "only one of --variant, --depths and --road can be given"),
        (("depths" in names) != ("dims" in names), "--depths and --dims belong together"),
        (begins and (is_fast or typed.get("init", "paper") != "paper"),
         "--recipe fast and --init fan-in or local begin with new weights, without --init-from"),
        (not (begins or resumes) and (finetunes or typed.get("freeze_backbone")),
         "--recipe finetune and --freeze-backbone need weights: --init-from SOURCE"),
        (typed.get("freeze_backbone") and typed.get("optimizer") == "muon",
         "--optimizer muon has nothing to train with --freeze-backbone"),
        (finetunes and typed.get("optimizer") == "muon" and "muon_lr" not in names,
         "--recipe finetune has no learning rate for Muon: give --muon-lr, too"),
        # fit_to_data chooses epochs and lr by the number of images.
        (finetunes and typed.get("warmup_epochs") and "epochs" not in names,
         "--recipe finetune with --warmup-epochs needs --epochs, too"),
        (finetunes and typed.get("min_lr") and "lr" not in names,
         "--recipe finetune with --min-lr needs --lr, too"))
    for is_wrong, text in rules:
        if is_wrong:
            raise UserError(text)

def changed_settings(typed: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """What differs from the settings of a saved run and would change its result."""
    free = set(ANY_TIME)
    design = convnext.DESIGNS.get(saved.get("road"))
    if design and design.norm is nn.BatchNorm2d:
        free.remove("accumulate")  # BatchNorm's statistics are those of a part
    return [name for name in typed if name not in free and saved.get(name) != typed[name]]

def refuse_idle(typed: Mapping[str, Any], r: Recipe) -> None:
    """Raise UserError for a flag that would do nothing. 0, which turns something off (but not as
    --crop-pct), is fine."""
    design = convnext.DESIGNS.get(r.road)
    has_scale = not design or (design.separate_downsampling and not design.swin_block)
    uses = {  # a flag: whether it does something, and what it needs
        "width": (r.road, "--road"), "grn": (r.depths, "--depths"),
        "muon_lr": (r.optimizer == "muon", "--optimizer muon"),
        "beta2": (r.optimizer != "sgd", "--optimizer adamw or muon"),
        "start_share": (r.start_size, "--start-size"),
        "start_size": (r.size_at(0) == r.start_size, "an epoch of --start-share"),
        "layer_decay": (r.layer_decay == 1 or not r.freeze_backbone, "a backbone that is trained"),
        "crop_padding": (r.img_size <= SMALL, f"images of up to {SMALL} pixels"),
        "crop_scale": (r.img_size > SMALL, f"images above {SMALL} pixels"),
        "crop_pct": (r.img_size > SMALL, f"images above {SMALL} pixels"),
        "mix_prob": (r.mixup or r.cutmix, "a --mixup or --cutmix above 0"),
        "distill_alpha": (r.teacher, "--teacher"), "distill_temperature": (r.teacher, "--teacher"),
        "layer_scale": (has_scale, "a network without --road, or its last step")}
    if r.init_from:
        uses["layer_scale"] = (False, "new weights, without --init-from")
    for name in ("mixup", "cutmix", "mix_off_epochs"):
        uses[name] = (r.mix_prob, "a --mix-prob above 0")
    if not (r.mixup or r.cutmix):
        uses["mix_off_epochs"] = (False, "a --mixup or --cutmix above 0")
    for name in ("drop_path", "head_init_scale", "init"):
        uses[name] = (not r.road, "a network without --road")
    for name, (is_used, needs) in uses.items():
        asked = name in typed if name == "crop_pct" else typed.get(name)
        if asked and not is_used:
            raise UserError(f"{flag(name)} needs {needs}")

def check_values(r: Recipe) -> None:
    """Raise UserError for a value that is not allowed, wherever it comes from."""
    for name, about in FIELDS.items():
        value, allowed = getattr(r, name), about.metadata["allowed"]
        if value is None and about.default is None:
            continue
        fine = is_of_type(value, TYPES[name])
        if fine and isinstance(allowed, tuple):
            fine = value in allowed
        elif fine and allowed:
            values = value if isinstance(value, list | tuple) else [value]
            fine = bool(values) and all(within(number, allowed) for number in values)
        if not fine:
            kinds = {int: "a whole number in ", float: "a number in ", NUMBERS: "whole numbers in ",
                     str: "one of " if allowed else "a text"}
            what = kinds.get(TYPES[name], "true or false")
            raise UserError(f"{flag(name)} must be {what}{allowed}, not {value!r}")
    if r.depths and (not r.dims or len(r.depths) != len(r.dims)):
        raise UserError(f"--depths and --dims need equally many numbers: {r.depths}, {r.dims}")
    for name in ("layer_decay", "freeze_backbone"):
        if r.road and getattr(r, name) != FIELDS[name].default:
            raise UserError(f"{flag(name)} needs a network without --road")
    demands = (  # a setting, whether it is right, and what it must be
        ("mixup", r.mixup == 0 or r.mixup >= 1e-3, "0 or at least 0.001"),
        ("cutmix", r.cutmix == 0 or r.cutmix >= 1e-3, "0 or at least 0.001"),
        ("val_size", r.val_size < 1 or r.val_size == int(r.val_size),
         "a share below 1 or a whole number"),
        ("warmup_epochs", r.warmup < r.epochs, f"below --epochs, {r.epochs}"),
        ("min_lr", r.min_lr <= r.lr, f"at most --lr, {r.lr}"),
        ("patch_size", r.road is None or r.patch_size in (1, 2, 4), "1, 2 or 4 with --road"),
        ("accumulate", r.accumulate <= r.batch_size, f"at most --batch-size, {r.batch_size}"),
        ("img_size", r.img_size >= r.stride, f"{r.stride} or more, the network's total stride"),
        ("start_size", r.start_size <= r.img_size and r.start_size % r.stride == 0,
         f"a multiple of {r.stride}, the network's stride, up to --img-size, {r.img_size}"),
        ("crop_padding", r.crop_padding < r.img_size or r.eval_only is not None,
         f"below --img-size, {r.img_size}"))
    for name, fine, must_be in demands:
        if not fine:
            raise UserError(f"{flag(name)} must be {must_be}, not {getattr(r, name)}")

def is_of_type(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):  # in Python a bool is an int
        return kind is bool
    if kind is float:  # whole numbers are numbers, too
        return isinstance(value, int | float)
    if kind == NUMBERS:
        return isinstance(value, list | tuple) and all(is_of_type(item, int) for item in value)
    return isinstance(value, kind)

def within(number: float, interval: str) -> bool:
    """Whether a number is in an interval like "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    return above and below

class UserError(Exception):
    """A mistake or a failure that the user can mend. Its text is shown as one line."""

@contextlib.contextmanager
def one_line_errors(source: str) -> Iterator[None]:
    """Turn what reading or fitting weights raises into one line that names their source."""
    try:
        yield
    except Exception as error:
        downloaded = source.startswith(convnext.DOWNLOADS)  # by clients with errors of their own
        mendable = isinstance(error, OSError | ValueError | ImportError | RuntimeError)
        if not downloaded and not mendable:
            raise
        missing = isinstance(error, FileNotFoundError) and not downloaded
        text = "no such file" if missing else first_line(error)
        raise UserError(text if source in text else f"{source}: {text}") from error

@contextlib.contextmanager
def explained_errors(recipe: Recipe) -> Iterator[None]:
    """Turn PyTorch's errors with a known remedy into one line."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError, ConnectionError) as error:
        text = str(error)
        line = first_line(error)
        # If a process that reads images is killed, this is raised wherever the main process is.
        is_of_workers = any(part in text for part in (
            "DataLoader worker (pid", "shared memory", "shared file mapping"))
        if is_of_workers or isinstance(error, ConnectionError):
            remedy = "try fewer --workers, or 0, or in Docker a larger --shm-size"
        elif "more than 1 value per channel" in text:
            remedy = "BatchNorm needs more: give a larger --batch-size, or a smaller --accumulate"
        elif "allocate" in text or "out of memory" in text:
            remedy = "give a smaller --batch-size, or a larger --accumulate"
            if recipe.resume:
                remedy = "give a larger --accumulate, with BatchNorm in a new run by --init-from"
            elif recipe.eval_only and recipe.part_size > 1:  # see evaluation_batches
                size = min(8, recipe.part_size)
                remedy = f"give a --batch-size below {size}: eight times as many are read at once"
            elif recipe.eval_only:
                remedy = "give a smaller --img-size, or --device cpu"
        elif recipe.compile and type(error).__module__.startswith("torch._"):
            remedy = "leave out --compile, or give --no-compile"
        else:
            raise
        raise UserError(f"{line}; {remedy}") from error

def say(text: str, file: Any = None) -> None:
    """Print above the progress bar."""
    tqdm.write(text, file=file)

NOTES: list[str] = []  # of a process that reads images, for the main one

@cache
def note(text: str) -> None:
    """Tell the user something, once."""
    if get_worker_info():
        NOTES.append(text)
    else:
        say(f"note: {text}", sys.stderr)

def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    if text.startswith("Caught "):  # DataLoader puts a traceback before a process's error
        return text.splitlines()[-1]
    text = text.replace(":\n\t", ": ")  # load_state_dict gives its reason in the second line
    return text.splitlines()[0]

def shorten(names: Sequence, most: int = 4) -> str:
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")

def tune_backends() -> None:
    """Settings of PyTorch and the C library for speed. On Linux, the program keeps the memory that
    it frees. On GPUs with TensorFloat-32, matrix products round their float32 factors to it."""
    # Linux would hand the memory that a step frees to the next one page by page and filled with
    # zeros, which took a fifth of the time on a CPU. The C library shall keep it.
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
            libc.mallopt(-4, 0)  # M_MMAP_MAX
    torch.set_float32_matmul_precision("high")  # TensorFloat-32: 10 of the 23 bits
    torch.backends.cudnn.benchmark = True  # few batch sizes: find the fastest kernels of each

def guard_streams() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):  # a notebook's streams do not have it
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
        stream.write = unfailing(stream.write)
        stream.flush = unfailing(stream.flush)
        setattr(sys, name, stream)

def unfailing(method: Callable) -> Callable:
    """Ignore what goes wrong: a full disk under the log or a closed terminal must not end a run."""
    def call(*args: Any) -> None:
        with contextlib.suppress(OSError, ValueError):
            method(*args)
    return call

if __name__ == "__main__":
    guard_streams()
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        code = f"train.py: error: {first_line(error)}"
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    sys.exit(code)
