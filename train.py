"""Train ConvNeXt on CIFAR-10, on a folder of images, or on shapes drawn on the spot.

    python train.py --variant tiny --epochs 100       # the full recipe; downloads CIFAR-10
    python train.py --dataset folder --data-dir DIR --img-size 224 --patch-size 4
    python train.py --init-from timm:convnext_tiny.fb_in22k --recipe finetune --dataset folder ...
    python train.py --teacher runs/NAME/weights.safetensors --variant atto ...    # distillation
    python train.py --resume runs/NAME/last.pt        # go on where a run stopped
    python train.py --eval-only CHECKPOINT            # only measure the accuracy; any layout

It is the paper's recipe for ImageNet (table 5) brought down to a hundred epochs of 32x32 images;
README.md lists the changes and the measurements behind them. In the order in which it runs:

    1 Arguments       every switch of the recipe, with its default
    2 Data            numbers of images -> a batch of bytes
    3 Augmentation    bytes -> what the network sees, drawn for each sample on its own
    4 Optimisation    what decays, how fast a layer learns at a step, averages, the loss, a teacher
    5 Evaluation      loss, top-1, top-5
    6 The run         its state, its folder, its log
    7 Training        the loop
"""

import argparse
import contextlib
import ctypes
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
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from einops import rearrange, reduce, repeat
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader, make_dataset
from tqdm import tqdm

import convnext

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UserError(Exception):
    """Something that the user can mend; shown as one line, without a traceback."""


def say(text: str, file: TextIO | None = None) -> None:
    """Print above the progress bar. Whoever read it may have gone, as `head` does: go on."""
    try:
        tqdm.write(text, file)
        (file or sys.stdout).flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())


class Stopped(BaseException):
    """Ctrl-C, or SIGTERM from a scheduler. No Exception, lest somebody take it for an error."""


received: list[int] = []  # the signal for which `batches` raises Stopped


@contextlib.contextmanager
def stop_between_batches() -> Iterator[None]:
    """On the first SIGINT or SIGTERM finish the batch: half a step would update half the weights.

    The second acts as it always does.
    """
    def receive(number: int, _frame: Any) -> None:
        received.append(number)
        handlers.close()

    with contextlib.ExitStack() as handlers:  # when closed it puts back the handlers of before
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers.callback(signal.signal, number, signal.signal(number, receive))
        yield


# --- 1. Arguments -------------------------------------------------------------------------------


def number(kind: type, interval: str) -> Callable[[str], Any]:
    """A type for argparse: a number in the interval, for example "[0, 1)", which excludes 1."""
    low, high = map(float, interval[1:-1].split(","))

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # not in any interval
        above = low <= value if interval[0] == "[" else low < value
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} in {interval}, not {text!r}")
        return value
    return parse


whole, real = partial(number, int), partial(number, float)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def not_empty(text: str) -> str:
    if not text:  # as a shell variable may be that is not set
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=("cifar10", "cifar100", "food101", "imagenet", "folder", "synthetic"),
        default="cifar10", help="what to train on")
    add("--data-dir", default="data", metavar="DIR",
        help="the data set's place; for folder: has train/ and test/ (or val/), with a folder a "
        "class")
    add("--img-size", type=whole("[1, inf)"), default=32, metavar="N",
        help="side; by default that of --init-from's images. Images of up to 64x64 are kept in "
        "memory, larger ones read as needed")
    add("--crop-pct", type=real("(0, 1]"), metavar="P",
        help="share of the shorter side that is tested, of images above 64x64; default 0.875, and "
        "from 384x384 on the whole image, squeezed into a square")
    add("--val-size", type=whole("[0, inf)"), default=0, metavar="N",
        help="hold out N training images, and let them choose best.pt")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read")
    add("--workers", "-j", type=whole("[0, inf)"), default=min(8, os.cpu_count() or 1),
        metavar="N", help="processes that read images")
    add = parser.add_argument_group("augmentation (0 turns a part off)").add_argument
    add("--crop-padding", type=whole("[0, inf)"), default=4, help="pixels, of images up to 64x64")
    add("--crop-scale", type=real("[0, 1]"), default=0.08, help="least area, of larger images")
    add("--flip", type=real("[0, 1]"), default=0.5, help="chance of a mirror image")
    add("--start-size", type=whole("[0, inf)"), default=0, metavar="N",
        help="train on images shrunk to this side during the first --start-share of the run")
    add("--start-share", type=real("[0, 1]"), default=0.5, metavar="X",
        help="share of the epochs at --start-size")
    add("--rand-augment", type=real("[0, 10]"), default=9, help="strength, up to 10")
    add("--random-erase", type=real("[0, 1]"), default=0.25, help="chance of an erased rectangle")
    add("--mixup", type=real("[0, inf)"), default=0.8, help="alpha")
    add("--cutmix", type=real("[0, inf)"), default=1.0, help="alpha")
    add("--mix-prob", type=real("[0, 1]"), default=1.0, help="chance that a batch is mixed")
    add("--mix-off-epochs", type=whole("[0, inf)"), metavar="N", help="last, unmixed; default 1/10")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--variant", "--model", choices=convnext.VARIANTS, default="tiny", metavar="NAME",
        help=f"size: {', '.join(convnext.VARIANTS)}; by default that of --init-from")
    # 2 and 0.1 where the paper has 4 and 1e-6: both learn faster here, README.md has the tables
    add("--patch-size", type=int, choices=(1, 2, 4), default=2, help="stride of the stem")
    add("--drop-path", type=real("[0, 1)"), default=0.1, help="stochastic depth, at the last block")
    add("--layer-scale", type=real("[0, inf)"), metavar="X",
        help="initial value; 0: none; default 0.1, V2: none")
    add("--init", choices=("paper", "fan-in"), default="paper",
        help="initial weights. paper: standard deviation 0.02 everywhere; fan-in: larger for "
        "narrow layers, so that each keeps the size of what it is given")
    add("--head-init-scale", type=real("[0, inf)"), default=1.0, metavar="X",
        help="factor on the classifier's first weights")
    group = parser.add_argument_group("weights")
    add = group.add_mutually_exclusive_group().add_argument
    add("--init-from", type=not_empty, metavar="SOURCE",
        help="begin with these: a file, an https address, timm:NAME or hf:REPO; in the layout of "
        "Meta, timm, torchvision, Hugging Face or this program; averaged weights if there are any")
    add("--resume", type=not_empty, metavar="LAST.PT", help="continue this run, with its arguments")
    add("--eval-only", type=not_empty, metavar="SOURCE",
        help="measure last.pt, best.pt, weights.safetensors, or whatever --init-from takes")
    add = group.add_argument
    add("--override", action="store_true", help="let --resume change arguments")
    add("--freeze-backbone", action="store_true", help="train the classifier alone")
    add("--teacher", type=not_empty, metavar="SOURCE",
        help="learn from this network's answers, too (distillation)")
    add("--distill-alpha", type=real("[0, 1]"), metavar="A",
        help="the teacher's share of the loss; default 0.5")
    add("--distill-temperature", type=real("(0, inf)"), metavar="T",
        help="softens the answers; default 2")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="python train.py [--option value ...]; --help lists the options",
        description=__doc__.partition("\n")[0],
        formatter_class=HelpFormatter, allow_abbrev=False)  # --mix must not pass for --mixup
    add_data_arguments(parser)
    add_model_arguments(parser)
    add = parser.add_argument_group("optimisation").add_argument
    add("--recipe", choices=("scratch", "finetune", "fast"), default="scratch",
        help="other defaults. finetune: for --init-from (V1's table 6, and for V2, too); fast: "
        "for a small network on two CPU cores")
    add("--optimizer", choices=("adamw", "muon"), default="adamw",
        help="muon: for the matrices of the blocks, AdamW for everything else")
    add("--muon-lr", type=real("(0, inf)"), default=0.02, metavar="X",
        help="highest learning rate of the matrices that Muon trains")
    add("--beta2", type=real("[0, 1)"), default=0.999, metavar="B",
        help="AdamW's decay rate for the average of squared gradients")
    add("--schedule", choices=("cosine", "linear"), default="cosine",
        help="how the learning rate falls after the warmup")
    add("--epochs", type=whole("[1, inf)"), default=100, help="passes over the data")
    add("--batch-size", "-b", type=whole("[1, inf)"), default=128, help="images a step")
    add("--accumulate", type=whole("[1, inf)"), default=1, help="parts of a batch, to save memory")
    add("--lr", type=real("(0, inf)"), default=1e-3, help="highest learning rate")
    add("--min-lr", type=real("[0, inf)"), default=1e-6, help="last learning rate")
    add("--layer-decay", type=real("(0, 1]"), default=1.0, metavar="X",
        help="factor on the learning rate from each layer to the one before")
    add("--warmup-epochs", type=real("[0, inf)"), metavar="N", help="default 1/20 of the run")
    add("--weight-decay", "--wd", type=real("[0, inf)"), default=0.05,
        help="of convolutions and linear layers")
    add("--label-smoothing", type=real("[0, 1)"), default=0.1, help="share for all classes alike")
    add("--clip-grad", type=real("[0, inf)"), default=0.0, help="largest gradient norm; 0: any")
    add("--ema-horizon", type=real("[0, 1)"), default=0.04,
        help="share of the run that the average of the weights looks back over; 0: no average")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="autocast")
    add("--compile", action="store_true", help="torch.compile the model")
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="cuda, mps, cpu")
    add("--seed", type=whole("[0, 4294967295]"), default=0, help="of all that is random")
    add("--eval-every", type=whole("[1, inf)"), default=1, metavar="N",
        help="epochs, and after the last")
    add("--tta", action="store_true",
        help="also report the mean of the logits of each test image and its mirror image")
    add("--output", metavar="DIR", help="run folder; default runs/<time>-<variant>")
    return parser


def finetune_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The paper's table 6: from ImageNet-22K to ImageNet-1K. Each flag given by hand wins.

    V2 has tables of its own, one for each size; here it gets what V1 does.
    """
    scale = args.batch_size / 512
    name = args.variant.removeprefix("v2_")
    # none for T, nor for what is smaller; the paper has no Huge
    drop_path = {"small": 0.1, "base": 0.2, "large": 0.3, "xlarge": 0.4, "huge": 0.4}.get(name, 0.0)
    return {
        "epochs": 30, "lr": 5e-5 * scale, "min_lr": 1e-6 * scale, "warmup_epochs": 0.0,
        "weight_decay": 1e-8, "layer_decay": 0.8, "rand_augment": 9.0, "mixup": 0.0, "cutmix": 0.0,
        "random_erase": 0.25, "label_smoothing": 0.1, "clip_grad": 0.0, "head_init_scale": 0.001,
        "drop_path": drop_path,
        # 0.9999 in the paper's 75,000 steps, for XL only: 10,000 of them are 13 %.
        "ema_horizon": 0.13 if name == "xlarge" else 0.0}


def fast_recipe() -> dict[str, Any]:
    return {
        "variant": "atto", "patch_size": 1, "layer_scale": 0.0, "init": "fan-in",
        "drop_path": 0.0, "optimizer": "muon", "lr": 3e-3, "muon_lr": 0.02, "beta2": 0.95,
        "min_lr": 0.0, "weight_decay": 0.02, "schedule": "linear", "batch_size": 256, "epochs": 40,
        "label_smoothing": 0.1, "crop_padding": 4, "rand_augment": 5.0, "random_erase": 0.25,
        "mix_prob": 0.0, "ema_horizon": 0.0, "start_size": 24, "start_share": 0.5, "tta": True}


def refuse_changes(parser: argparse.ArgumentParser, args: argparse.Namespace,
                   saved: dict) -> None:
    """A checkpoint keeps its arguments, but for those that leave its result the same."""
    path, fixed = args.resume or args.eval_only, {"variant", "patch_size", "layer_scale"}
    if args.eval_only:  # the network alone matters
        saved = {k: v for k, v in saved.items() if k in fixed}
    fixed |= {"dataset", "img_size", "val_size", "skip_bad", "batch_size", "ema_horizon", "output",
              "recipe", "init_from", "freeze_backbone", "layer_decay"}
    changed = [k for k, v in saved.items()
               if getattr(args, k) != v and k not in ("data_dir", "device", "workers")]
    table = "".join(f"\n  --{k.replace('_', '-')}: was {saved[k]}, now {getattr(args, k)}"
                    for k in changed)
    if unchangeable := sorted(fixed & set(changed)):
        parser.error(f"{path} cannot go on with another "
                     f"--{', --'.join(unchangeable).replace('_', '-')}:{table}")
    if changed and not args.override:
        parser.error(f"{path} has other arguments; leave these out or add --override:{table}")
    if changed:
        say(f"note: --override of {len(changed)} arguments:{table}", sys.stderr)


def parse_args(argv: list[str]) -> tuple[
        argparse.Namespace, dict | None, convnext.Weights | None]:
    """The command line -> the arguments, the checkpoint and the first weights they name, if any."""
    # the authors write --drop_path
    argv = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
    parser = make_parser()
    args, checkpoint, weights = parser.parse_args(argv), None, None
    if args.eval_only and (args.teacher or args.freeze_backbone or args.recipe != "scratch"):
        parser.error("--eval-only trains nothing: no --teacher, --freeze-backbone or --recipe")
    if path := args.resume or args.eval_only:
        checkpoint = read_checkpoint(path, any_layout=bool(args.eval_only))
        saved = {k: v for k, v in (vars(parser.parse_args([])) | checkpoint["args"]).items()
                 if k not in ("resume", "override", "eval_only")}  # older files lack newer ones
        parser.set_defaults(**saved)  # the command line still overrides them ...
        args = parser.parse_args(argv)
        refuse_changes(parser, args, saved)  # ... where that leaves it the same run
        if args.resume and "optimizer" not in checkpoint:
            parser.error("argument --resume: takes last.pt, not weights alone")
        newer = Path(path).with_name("last.pt")
        if args.resume and Path(path).name != "last.pt" and newer.exists() and not args.override:
            parser.error(f"--resume {path} would replace {newer}: take that, or add --override")
        args.output = str(Path(path).parent)
    else:
        if args.init_from:
            weights = read_pretrained(args.init_from)
            parser.set_defaults(**network_arguments(weights))
        elif args.recipe == "finetune" or args.freeze_backbone:
            parser.error("--recipe finetune and --freeze-backbone need weights: --init-from SOURCE")
        args = parser.parse_args(argv)  # the recipe depends on the variant
        if args.recipe == "finetune":
            parser.set_defaults(**finetune_recipe(args))
        if args.recipe == "fast":
            parser.set_defaults(**fast_recipe())
        if args.freeze_backbone:  # what does not learn needs no noise
            parser.set_defaults(drop_path=0.0)
        args = parser.parse_args(argv)
    complete_arguments(parser, args)
    if args.epochs < len((checkpoint or {}).get("history", [])):
        parser.error("argument --epochs: must be no less than have been trained")
    return args, checkpoint, weights


def complete_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Defaults that depend on other arguments, and the limits that do."""
    if args.img_size != parser.get_default("img_size") and (
            args.crop_pct == parser.get_default("crop_pct")):
        args.crop_pct = None  # the weights' own, which is meant for their size of image
    if args.layer_scale is None:
        args.layer_scale = 0.0 if convnext.VARIANTS[args.variant].grn else 0.1
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 20
    if args.mix_off_epochs is None:
        args.mix_off_epochs = args.epochs // 10
    distill = (args.distill_alpha, args.distill_temperature)
    if args.teacher:
        args.distill_alpha, args.distill_temperature = (
            default if given is None else given for given, default in zip(distill, (0.5, 2.0)))
    elif distill != (None, None):
        parser.error("--distill-alpha and --distill-temperature need a --teacher")
    stride = 8 * args.patch_size  # of the whole network
    for name, ok, allowed in (
        ("--warmup-epochs", args.warmup_epochs < args.epochs, f"below --epochs, {args.epochs}"),
        ("--min-lr", args.min_lr <= args.lr, f"up to --lr, {args.lr}"),
        ("--accumulate", args.accumulate <= args.batch_size, f"up to {args.batch_size}, a batch"),
        ("--img-size", args.img_size >= stride, f"{stride} or more at this --patch-size"),
        ("--crop-padding", args.crop_padding < args.img_size, f"below {args.img_size}, the image"),
    ):
        if not ok:
            parser.error(f"argument {name}: must be {allowed}")


IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """What is wrong with weights -> a line that names their source."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {source}") from error
    except (ConnectionError, ValueError, ModuleNotFoundError) as error:
        text = str(error) if source in str(error) else f"{source}: {error}"
        hint = "; or give the path of a file" if isinstance(error, ConnectionError) else ""
        raise UserError(text + hint) from error


def read_pretrained(source: str, content: Mapping | None = None) -> convnext.Weights:
    """Whatever --init-from, --teacher or --eval-only name; published files are ImageNet's.

    `content`: the file's, if it has been read.
    """
    with naming(source):
        weights = convnext.read_weights(content or source)
        convnext.infer_architecture(weights)  # refuses what is no variant
    settings = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "classes": None, "args": {}}
    return weights._replace(settings=settings | weights.settings)


def network_arguments(weights: convnext.Weights) -> dict[str, Any]:
    """The arguments that describe the network of these weights, and the images it was made for."""
    network, settings = convnext.infer_architecture(weights), weights.settings
    known = {"img_size": 224} | settings["args"] | settings
    return {k: network[k] for k in ("variant", "patch_size", "layer_scale")} | {
        k: known[k] for k in ("img_size", "crop_pct") if k in known}


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # each backend has its own way of not being there
        raise UserError(f"--device {name} cannot be used on this machine; try cpu") from error
    return device


def pick_precision(amp: str, device: torch.device) -> torch.dtype:
    """The type for matrix products and convolutions; the weights themselves stay in float32."""
    if amp == "auto":  # bfloat16 where the hardware computes in it: elsewhere it is slower
        if device.type == "cuda":
            amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
            amp = "bf16" if native else "off"
    if amp == "fp16" and device.type != "cuda":
        raise UserError(f"--amp fp16 needs a CUDA GPU, not {device.type}; take bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]


# --- 2. Data ------------------------------------------------------------------------------------
SMALL = 64  # up to this side images are kept in memory; larger ones are read as they are needed


@dataclass
class InMemory(Dataset):
    """Images small enough to be decoded once and kept. Indexed by a whole batch at a time."""

    images: Tensor  # (n, 3, h, w), bytes
    labels: Tensor  # (n,)
    classes: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


def evaluation_cut(args: argparse.Namespace) -> T.Transform:
    """A picture of any size -> a square of --img-size, as the authors cut for evaluation."""
    side, bicubic = args.img_size, T.InterpolationMode.BICUBIC
    if side >= 384 and not args.crop_pct:
        return T.Resize((side, side), interpolation=bicubic)
    share = 1 if side <= SMALL else args.crop_pct or 0.875  # 224 of 256
    return T.Compose([T.Resize(int(side / share), interpolation=bicubic), T.CenterCrop(side)])


class Pictures(Dataset):
    """Pictures of any size and colour mode, read when they are needed; `cut` makes squares of them.

    `samples` is a list of paths and labels, or a torchvision data set of pictures and labels.
    `seed`, set for each epoch, is that of the random cuts: an image's follows from it and the
    image alone, whichever worker cuts it.
    """

    seed = 0

    def __init__(self, name: str, samples: list[tuple[str, int]] | Dataset, classes: list[str],
                 args: argparse.Namespace) -> None:
        self.name, self.samples, self.classes = name, samples, classes
        self.cut = evaluation_cut(args)
        if args.skip_bad:
            self.skip_bad(args.workers)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.read(index)
        torch.manual_seed(self.seed - index)
        return TF.pil_to_tensor(self.cut(picture)), label

    def where(self, index: int) -> str:
        by_path = isinstance(self.samples, list)
        return self.samples[index][0] if by_path else f"number {index} of {self.name}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        try:
            picture, label = self.samples[index]
            if isinstance(picture, str):
                picture = default_loader(picture)  # converts to RGB
            return picture, label
        except Exception as error:  # Pillow has many
            raise UserError(f"cannot read the image {self.where(index)} ({error}); --skip-bad "
                            "leaves such images out") from error

    def skip_bad(self, threads: int) -> None:
        """Read every image once, and leave out, with a count, those that cannot be read."""

        def readable(index: int) -> bool:
            with contextlib.suppress(UserError):
                self.read(index)
                return True
            return False

        with ThreadPool(max(1, threads)) as pool:
            good = list(tqdm(pool.imap(readable, range(len(self))), f"checking {self.name}",
                             len(self), disable=None, leave=False))
        if bad := [self.where(i) for i, fine in enumerate(good) if not fine]:
            say(f"note: {self.name}: left out {len(bad)} of {len(self)} images: "
                f"{', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}", sys.stderr)
            kept = [i for i, fine in enumerate(good) if fine]
            by_path = isinstance(self.samples, list)
            self.samples = [self.samples[i] for i in kept] if by_path else Subset(
                self.samples, kept)


def load_folder(args: argparse.Namespace, train: bool, classes: list[str] | None) -> Pictures:
    """DIR/train or DIR/test/<class>/*.jpg etc.; `classes`, if given, are those of training.

    A class is known by its name, not by its position.
    """
    place, parts = Path(args.data_dir), ("train",) if train else ("test", "val")
    root = next((place / part for part in parts if (place / part).is_dir()), None)
    if root is None:
        raise UserError(f"--data-dir {place} has no {'/ or '.join(parts)}/; it must hold train/ "
                        "and val/ or test/, each with a folder for each class")
    found = sorted(entry.name for entry in os.scandir(root)
                   if entry.is_dir() and not entry.name.startswith("."))
    names = classes or found
    if len(names) < 2:
        raise UserError(f"{root} must have two class folders or more, not {len(found)}")
    if unknown := sorted(set(found) - set(names)):
        raise UserError(f"{root} has classes that training has not: {', '.join(unknown)}")
    labels = {name: label for label, name in enumerate(names)}
    samples = make_dataset(str(root), labels, IMG_EXTENSIONS, allow_empty=True)
    data = Pictures(str(root), samples, names, args)
    seen = {label for _, label in data.samples}
    if missing := [name for name, label in labels.items() if label not in seen]:
        message = f"{root} has no images of {', '.join(missing)}"
        if not classes or not seen:
            raise UserError(message)
        say(f"note: {message}", sys.stderr)
    return data


OTHERWISE = {  # what to do where torchvision cannot load a data set
    "cifar10": "Put cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html into "
               "{}/, or use --dataset folder --data-dir DIR, or --dataset synthetic",
    "cifar100": "Put cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html "
                "into {}/",
    "food101": "Remove {0}/food-101, if it is there, and put food-101.tar.gz from "
               "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz into {0}/",
    "imagenet": "Put ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and "
                "ILSVRC2012_img_val.tar from https://image-net.org into {}/ (unpacking them takes "
                "`pip install scipy`); or, if the images are in train/ and val/ with a folder for "
                "each class, use --dataset folder",
}


def load_torchvision(args: argparse.Namespace, train: bool) -> Pictures | InMemory:
    """One of torchvision's data sets, downloaded if that is allowed (not ImageNet's)."""
    root, name = args.data_dir, args.dataset
    sets = torchvision.datasets
    try:
        if name == "imagenet":
            data = sets.ImageNet(root, "train" if train else "val")
            return Pictures(name, data.samples, data.wnids, args)  # two classes are named "crane"
        if name == "food101":
            data = sets.Food101(root, "train" if train else "test", download=True)
        else:  # their md5 sums are checked
            data = (sets.CIFAR10 if name == "cifar10" else sets.CIFAR100)(
                root, train, download=True)
    except (OSError, RuntimeError, ModuleNotFoundError) as error:
        raise UserError(f"{name} could not be loaded ({convnext.first_line(error)}). "
                        f"{OTHERWISE[name].format(root)}") from error
    if name.startswith("cifar") and args.img_size == 32:
        images = rearrange(torch.from_numpy(data.data), "n h w c -> n c h w").contiguous()
        return InMemory(images, torch.tensor(data.targets), data.classes)
    return Pictures(name, data, data.classes, args)


SHAPES = {  # inside or outside, for u and v running from -1 to 1 across the shape
    "disk": lambda u, v: u**2 + v**2 < 0.8,
    "ring": lambda u, v: (u**2 + v**2 - 0.6).abs() < 0.25,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) < 0.8,
    "frame": lambda u, v: (torch.maximum(u.abs(), v.abs()) - 0.75).abs() < 0.15,
    "diamond": lambda u, v: u.abs() + v.abs() < 1,
    "triangle": lambda u, v: (u.abs() * 2 - v < 0.9) & (v < 0.8),
    "plus": lambda u, v: (torch.minimum(u.abs(), v.abs()) < 0.25) & (u.abs() + v.abs() < 1.2),
    "cross": lambda u, v: ((u.abs() - v.abs()).abs() < 0.3) & (u.abs() < 0.9),
    "rows": lambda u, v: (torch.sin(9 * v) > 0) & (u.abs() < 0.9) & (v.abs() < 0.9),
    "columns": lambda u, v: (torch.sin(9 * u) > 0) & (u.abs() < 0.9) & (v.abs() < 0.9),
}


def draw_shapes(count: int, size: int, seed: int) -> InMemory:
    """`count` noisy pictures of the ten shapes, at random places, sizes and colours."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=generator)

    axis = torch.linspace(-1, 1, size)
    u = (rearrange(axis, "w -> 1 1 w") - uniform(-0.3, 0.3)) / uniform(0.4, 0.7)
    v = (rearrange(axis, "h -> 1 h 1") - uniform(-0.3, 0.3)) / uniform(0.4, 0.7)
    labels = torch.arange(count) % len(SHAPES)
    inside = torch.stack([shape(*torch.broadcast_tensors(u[k :: len(SHAPES)], v[k :: len(SHAPES)]))
                          for k, shape in enumerate(SHAPES.values())], 1)  # count: a multiple of 10
    paper, ink = uniform(0, 0.4, 3), uniform(0.4, 0.6, 3)
    images = paper + ink * rearrange(inside.float(), "n k h w -> (n k) 1 h w")
    images += 0.08 * torch.randn(images.shape, generator=generator)
    return InMemory((images.clamp(0, 1) * 255).byte(), labels, list(SHAPES))


def load_split(args: argparse.Namespace, train: bool,
               classes: list[str] | None = None) -> Dataset:
    """The training or the test images, nothing about them random yet."""
    if args.dataset == "synthetic":
        return draw_shapes(5000 if train else 1000, args.img_size, seed=int(train))
    if args.dataset == "folder":
        data = load_folder(args, train, classes)
    else:
        data = load_torchvision(args, train)
    if isinstance(data, InMemory) or args.img_size > SMALL:
        return data
    parts = list(tqdm(batches(data, 500, args.workers), f"reading {data.name}", unit="batch",
                      total=math.ceil(len(data) / 500), disable=None, leave=False))
    images, labels = (torch.cat(part) for part in zip(*parts))
    return InMemory(images, labels, data.classes)


def leave_group(_worker: int) -> None:
    """Signals to the whole group, as Ctrl-C sends, are for the main process to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()


def batches(data: Dataset, batch_size: int, workers: int, *, seed: int | None = None,
            first: int = 0, pin: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in order; or, with a seed, one epoch of training, from batch number `first` on:
    shuffled, and without a last incomplete batch, unless it is the only one. `pin`: in memory
    that a GPU can read by itself."""
    source = data.dataset if isinstance(data, Subset) else data
    order = torch.arange(len(data))
    if seed is not None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        order = order[: max(1, len(data) // batch_size) * batch_size]
        source.seed = seed
    parts = [part.tolist() for part in order.split(batch_size)]
    if isinstance(source, InMemory):
        loader = DataLoader(data, batch_size=None, sampler=parts[first:], pin_memory=pin)
    else:
        loader = DataLoader(data, batch_sampler=parts[first:], num_workers=workers,
                            worker_init_fn=leave_group, pin_memory=pin)
    for batch in loader:
        if received:
            raise Stopped(received.pop())
        yield batch


def channel_statistics(data: Dataset, workers: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,) of pixels from 0 to 1; on disk, of 2,000 images or so."""
    if not isinstance(data, InMemory):
        data = Subset(data, range(0, len(data), max(1, len(data) // 2000)))
    sums = [torch.cat([reduce(x / 255.0, "b c h w -> c", "mean"),
                       reduce((x / 255.0) ** 2, "b c h w -> c", "mean")]).double() * len(x)
            for x, _ in batches(data, 500, workers)]
    mean, mean_square = (sum(sums) / len(data)).chunk(2)
    std = (mean_square - mean**2).clamp(min=1e-6).sqrt()  # one colour only: no division by 0
    return mean.float(), std.float()


class Data(NamedTuple):
    train: Dataset
    val: Dataset | None  # held out of the training set, and not augmented; may choose best.pt
    test: Dataset  # chooses nothing
    classes: list[str]
    mean: Tensor
    std: Tensor


def prepare_data(args: argparse.Namespace, device: torch.device,
                 statistics: tuple[list, list] | None = None) -> Data:
    """`statistics`: the mean and standard deviation to use instead of the training images' own."""
    plain, val = load_split(args, train=True), None
    train, classes = copy(plain), plain.classes
    if isinstance(train, Pictures):  # images too large to be kept: crop at random while reading
        train.cut = T.RandomResizedCrop(args.img_size, (args.crop_scale, 1),
                                        interpolation=T.InterpolationMode.BICUBIC)
    test = load_split(args, train=False, classes=classes)
    if args.val_size:
        if args.val_size >= len(train):
            raise UserError(f"--val-size must be below the {len(train):,} training images")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
        val = Subset(plain, order[: args.val_size])
        train = Subset(train, order[args.val_size :])
    mean, std = (map(torch.tensor, statistics) if statistics
                 else channel_statistics(plain, args.workers))
    return Data(train, val, test, classes, mean.to(device), std.to(device))


# --- 3. Augmentation ----------------------------------------------------------------------------
# All on whole batches, on the training device, and yet with draws of its own for every sample.
# (torchvision's transforms, given a batch, draw once for all of it.) What selects samples is drawn
# on the CPU, which would have to wait for a GPU's draws.


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """(b,) -> (b, 1, 1, 1) on x's device, to be combined with x."""
    return rearrange(values, "b -> b 1 1 1").to(x.device, non_blocking=True)


def crop_and_flip(x: Tensor, padding: int, flip: float) -> Tensor:
    """Shift each image by up to `padding` pixels, reflecting its edge, and mirror some.

    The same as padding by reflection, cropping at random and flipping, but done by working out
    which pixel goes where, and gathering once. Bytes (b, c, h, w) -> bytes (b, c, h, w).
    """
    b, c, h, w = x.shape

    def source(size: int) -> Tensor:  # (b, size): the row or column each pixel comes from
        start = torch.randint(-padding, padding + 1, (b, 1))
        index = (start + torch.arange(size)).abs()  # reflected at 0: -1 becomes 1
        return size - 1 - (size - 1 - index).abs()  # and at size - 1: size becomes size - 2

    rows, columns = source(h), source(w)
    columns = torch.where(torch.rand(b, 1) < flip, columns.flip(1), columns)
    sample = rearrange(torch.arange(b), "b -> b 1 1 1")
    channel = rearrange(torch.arange(c), "c -> 1 c 1 1")
    rows, columns = rearrange(rows, "b h -> b 1 h 1"), rearrange(columns, "b w -> b 1 1 w")
    return x[tuple(i.to(x.device, non_blocking=True) for i in (sample, channel, rows, columns))]


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
    cos, sin = angle.cos(), angle.sin()
    return warp(x, [cos, -sin, 0], [sin, cos, 0])


def sharpen(x: Tensor, amount: Tensor) -> Tensor:
    kernel = torch.ones(3, 3, device=x.device) / 13
    kernel[1, 1] *= 5
    blurred = x.clone()  # the edge has no full neighbourhood and stays
    blurred[:, :, 1:-1, 1:-1] = F.conv2d(x, repeat(kernel, "u v -> c 1 u v", c=3), groups=3)
    return blend(x, blurred, amount)


def keep_bits(x: Tensor, bits: Tensor) -> Tensor:
    step = 2.0 ** (8 - bits)  # of the 8 bits of a pixel from 0 to 255
    return ((x * 255).round() / step).floor() * step / 255


# What the paper's "RandAugment (9, 0.5)" chooses from, with timm's ranges: at full strength 30
# degrees, 45 % of the side, a colour factor of 1 ± 0.9, and so on. x: (b, 3, h, w) from 0 to 1.
# m: (b, 1, 1, 1), the strength from -1 to 1; where there is only one direction its sign is ignored.
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
    "translate_y": lambda x, m: warp(x, [1, 0, 0], [0, 1, 2 * 0.45 * m.flatten()]),
}


def rand_augment(x: Tensor, level: float) -> Tensor:
    """RandAugment (Cubuk et al., 2019) as the paper means it: timm's rand-m9-mstd0.5-inc1.

    Twice, each sample draws one of the fifteen operations and applies it with probability 1/2,
    at a strength of N(level, 0.5) tenths of its largest. (torchvision's RandAugment of magnitude
    9 is another thing: of 30, and always applied.) x: (b, 3, h, w) from 0 to 1.
    """
    for _ in range(2):
        choice = torch.randint(len(RAND_AUGMENT_OPS), (len(x),))
        choice[torch.rand(len(x)) < 0.5] = -1  # leave these as they are
        strength = (level + 0.5 * torch.randn(len(x))).clamp(0, 10) / 10
        strength = torch.where(torch.rand(len(x)) < 0.5, strength, -strength)
        for index, operation in enumerate(RAND_AUGMENT_OPS.values()):
            if len(chosen := (choice == index).nonzero()[:, 0]):
                m = per_sample(strength[chosen], x)
                chosen = chosen.to(x.device, non_blocking=True)
                x[chosen] = operation(x[chosen], m)
    return x


def random_erase(x: Tensor, chance: float) -> Tensor:
    """Fill a random rectangle of some samples with noise, in place (Zhong et al., 2017).

    Its area is 2 to 33 % of the image, its sides differ by up to 3.3 times. x is normalised, so
    standard normal noise is as bright as an image.
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


def mixup(x: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Blend each sample and its label with the one before it (Zhang et al., 2018).

        x' = λ·x + (1 - λ)·x_before,   y' = λ·y + (1 - λ)·y_before,   λ ~ Beta(α, α)
    """
    lam = torch.distributions.Beta(alpha, alpha).sample().item()
    return torch.lerp(x.roll(1, 0), x, lam), torch.lerp(y.roll(1, 0), y, lam)


def cutmix(x: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of the sample before into each; labels by area (Yun et al., 2019).

    The rectangle has 1 - λ of the area, λ ~ Beta(α, α), and is cut off at the image's edge.
    """
    _, _, h, w = x.shape
    half = 0.5 * math.sqrt(1 - torch.distributions.Beta(alpha, alpha).sample().item())
    cx, cy = torch.randint(w, ()).item(), torch.randint(h, ()).item()
    left, right = max(cx - int(half * w), 0), min(cx + int(half * w), w)
    top, bottom = max(cy - int(half * h), 0), min(cy + int(half * h), h)
    x = x.clone()
    x[:, :, top:bottom, left:right] = x.roll(1, 0)[:, :, top:bottom, left:right]
    lam = 1 - (right - left) * (bottom - top) / (h * w)
    return x, torch.lerp(y.roll(1, 0), y, lam)


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Each channel to mean 0 and standard deviation 1 over the data set. (b, c, h, w)"""
    return ((x - rearrange(mean, "c -> c 1 1")) / rearrange(std, "c -> c 1 1")).contiguous(
        memory_format=torch.channels_last)


def augment(args: argparse.Namespace, data: Data, x: Tensor, labels: Tensor,
            mix: bool, size: int = 0) -> tuple[Tensor, Tensor]:
    """Bytes (b, 3, h, w) and labels (b,) -> what the network sees, and targets (b, classes)."""
    x = crop_and_flip(x, args.crop_padding if args.img_size <= SMALL else 0, args.flip)
    x = x.float() / 255
    if args.rand_augment:
        x = rand_augment(x, args.rand_augment)
    if size and size != args.img_size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    x = normalize(x, data.mean, data.std)
    if args.random_erase:
        x = random_erase(x, args.random_erase)
    y = F.one_hot(labels, len(data.classes)).float()
    kinds = [(f, alpha) for f, alpha in ((mixup, args.mixup), (cutmix, args.cutmix)) if alpha]
    if mix and kinds and torch.rand(()) < args.mix_prob:
        kind, alpha = kinds[int(torch.randint(len(kinds), ()))]
        x, y = kind(x, y, alpha)
    return x, y


# --- 4. Optimisation ----------------------------------------------------------------------------


def layer_number(name: str, depths: tuple[int, ...]) -> int:
    """Where a parameter stands for layer-wise learning rate decay: 0 for the stem, and so on.

    Three blocks of the long third stage count as one layer, and each of the other stages, with the
    Downsample before it, as one; the head comes last. With 27 blocks there, or Tiny's 9, these are
    the groups of the authors' classification and detection code (optim_factory.py and
    layer_decay_optimizer_constructor.py).
    """
    last = 3 + math.ceil(depths[2] / 3)  # the fourth stage
    if name.startswith("head."):
        return last + 1
    part, stage, block = name.split(".")[:3]
    if part == "downsample_layers":
        return (0, 2, 3, last)[int(stage)]
    return (1, 2, 3 + int(block) // 3, last)[int(stage)]


def parameter_groups(model: convnext.ConvNeXt, weight_decay: float,
                     layer_decay: float = 1.0) -> list[dict]:
    """What trains, by weight decay and by `lr_scale`, the factor on its learning rate.

    Only matrices and filters decay: norms, biases, LayerScale and GRN have one axis and do not.
    """
    depths, groups = tuple(map(len, model.stages)), {}
    last = layer_number("head.", depths)
    for decays in (True, False):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (parameter.ndim >= 2) == decays:
                lr_scale = layer_decay ** (last - layer_number(name, depths))
                group = groups.setdefault((decays, lr_scale), {
                    "params": [], "weight_decay": weight_decay * decays, "lr_scale": lr_scale})
                group["params"].append(parameter)
    return list(groups.values())


class Optimizers:
    """AdamW alone, or with Muon for the matrices of the blocks, behind one optimiser's methods."""

    def __init__(self, model: nn.Module, args: argparse.Namespace) -> None:
        groups = parameter_groups(model, args.weight_decay, args.layer_decay)
        self.parts: list[torch.optim.Optimizer] = []
        if args.optimizer == "muon":
            matrices = {p for n, p in model.named_parameters() if ".pwconv" in n and p.ndim == 2}
            muon = [g | {"params": [p for p in g["params"] if p in matrices],
                         "lr_scale": g["lr_scale"] * args.muon_lr / args.lr} for g in groups]
            groups = [g | {"params": [p for p in g["params"] if p not in matrices]}
                      for g in groups]
            muon, groups = ([g for g in part if g["params"]] for part in (muon, groups))
            self.parts.append(torch.optim.Muon(muon, lr=args.muon_lr))
        self.parts.append(torch.optim.AdamW(
            groups, lr=args.lr, betas=(0.9, args.beta2), fused=True))

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[dict]) -> None:
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


@torch.no_grad()
def fan_in_init(model: convnext.ConvNeXt) -> None:
    blocks = sum(map(len, model.stages))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and name != "head.fc":
            std = module.weight[0].numel() ** -0.5
            if name.endswith("pwconv2"):
                std /= (2 * blocks) ** 0.5
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)


def lr_at(step: int, total: int, warmup: int, peak: float, floor: float,
          schedule: str = "cosine") -> float:
    """The learning rate of step 0 ... total - 1: a straight line up, then half a cosine down.

    A function of the step alone, so there is no scheduler whose state could be lost.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    if schedule == "linear":
        return floor + (peak - floor) * (1 - (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def make_ema(model: nn.Module, horizon: float, total: int) -> AveragedModel | None:
    """An exponential moving average of the weights: ema += (weights - ema) / (horizon · total).

    The horizon, how far back it looks, is a share of the run. The usual decay of 0.9999 looks
    back 10,000 steps: in a run of 20,000 the average would still hold much of its beginning.
    """
    if not horizon:
        return None
    steps = max(1.0, horizon * total)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / steps)).eval()


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(teacher / T) ‖ softmax(logits / T)), both (b, classes).

    From Hinton et al., 2015. The teacher's small probabilities say what a class looks like, too; a
    T above 1 raises them. Gradients fall with 1 / T², hence the factor.
    """
    ours, theirs = ((x / temperature).log_softmax(1) for x in (logits, teacher))
    return temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def training_loss(args: argparse.Namespace, logits: Tensor, targets: Tensor,
                  teacher: Tensor | None = None) -> Tensor:
    """(1 - α)·CE(targets, logits) + α·T²·KL(teacher ‖ logits); no teacher: α = 0."""
    loss = F.cross_entropy(logits, targets, label_smoothing=args.label_smoothing)
    if teacher is None:
        return loss
    distance = distillation_loss(logits, teacher.float(), args.distill_temperature)
    return torch.lerp(loss, distance, args.distill_alpha)


def check_classes(source: str, known: list[str] | None, tensors: dict[str, Tensor],
                  classes: list[str]) -> None:
    """Refuse a classifier for other classes. Of published weights only the number is known."""
    if known:
        if known != classes:
            order = ", in another order" if sorted(known) == sorted(classes) else ""
            raise UserError(f"{source} was trained on other classes{order}: "
                            f"{', '.join(known[:4])}, ... ({len(known)}), here "
                            f"{', '.join(classes[:4])}, ... ({len(classes)})")
    elif (count := len(tensors.get("head.fc.weight", ()))) != len(classes):
        raise UserError(f"{source} has {f'{count} classes' if count else 'no classifier'}; here "
                        f"are {len(classes)}: {', '.join(classes[:4])}, ...")


def load_teacher(args: argparse.Namespace, data: Data) -> Callable[[Tensor], Tensor]:
    """The network that --teacher names, as a function of normalised images (b, 3, h, w)."""
    weights = read_pretrained(args.teacher)
    device, settings = data.mean.device, weights.settings
    with naming(args.teacher):
        model = convnext.from_checkpoint(weights).requires_grad_(False).to(
            device, memory_format=torch.channels_last)
    check_classes(args.teacher, settings["classes"], weights.tensors, data.classes)
    if args.img_size < model.total_stride or model.in_channels != 3:
        raise UserError(f"--teacher {args.teacher} takes images of {model.total_stride} pixels or "
                        f"more and {model.in_channels} channels")
    mean, std = (torch.tensor(settings[name], device=device) for name in ("mean", "std"))
    scale, shift = (rearrange(v, "c -> c 1 1") for v in (data.std / std, (data.mean - mean) / std))

    @torch.no_grad()
    def teacher(x: Tensor) -> Tensor:
        return model(x * scale + shift)  # from our normalisation to its own
    return teacher


# --- 5. Evaluation ------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(model: nn.Module, images: Dataset, mean: Tensor, std: Tensor, workers: int,
             precision: torch.dtype, tta: bool = False) -> dict[str, float]:
    """Mean cross-entropy, and the share (%) whose class comes first, and among the first five."""
    model.eval()
    device, total = mean.device, torch.zeros(3, device=mean.device)
    for x, labels in batches(images, 250, workers, pin=device.type == "cuda"):
        x, labels = x.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, precision, precision != torch.float32):
            x = normalize(x / 255.0, mean, std)
            logits = (model(x) + model(x.flip(3))) / 2 if tta else model(x)
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == rearrange(labels, "b -> b 1")
        loss = F.cross_entropy(logits, labels, reduction="sum")
        total += torch.stack([loss, 100 * hits[:, 0].sum(), 100 * hits.sum()])
    return dict(zip(("loss", "top1", "top5"), (total / len(images)).tolist()))


# --- 6. The run ---------------------------------------------------------------------------------


def build_model(args: argparse.Namespace, classes: int) -> convnext.ConvNeXt:
    return convnext.create_convnext(
        args.variant, num_classes=classes, patch_size=args.patch_size, drop_path=args.drop_path,
        layer_scale=args.layer_scale, head_init_scale=args.head_init_scale)


def keep_freed_memory() -> None:
    """Have glibc, Linux's C library, keep freed memory instead of returning it to the kernel.

    Otherwise each step's activations go back, and the kernel hands the next step the same pages
    anew, one by one and filled with zeros: a quarter of a step's time on a CPU.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD in malloc.h
        libc.mallopt(-4, 0)  # M_MMAP_MAX


class Run:
    """All that a run consists of; `state` is the part that cannot be made anew."""

    def __init__(self, args: argparse.Namespace, checkpoint: dict | None = None,
                 weights: convnext.Weights | None = None) -> None:
        device = pick_device(args.device)
        self.args, self.folder = args, Path(args.output)
        self.precision = pick_precision(args.amp, device)
        origin = checkpoint or (weights.settings if weights else None)
        self.data = prepare_data(args, device, origin and (origin["mean"], origin["std"]))
        self.teacher = load_teacher(args, self.data) if args.teacher else None
        self.steps = max(1, len(self.data.train) // args.batch_size)  # in an epoch
        self.total = self.steps * args.epochs
        self.step = 0  # of the run, the next one
        self.history: list[dict] = []  # a row for each epoch; metrics.csv
        self.so_far: dict[str, Any] = {}  # sums over the epoch that is going on
        self.finite: dict[str, float] = {}  # what `check_finite` saw last
        self.unwritten: dict[str, str] = {}  # files that could not be written, and why

        keep_freed_memory()
        torch.set_float32_matmul_precision("high")  # TensorFloat-32, on GPUs that have it
        torch.backends.cudnn.benchmark = True  # few batch sizes: find the fastest kernels of each
        torch.manual_seed(args.seed)
        self.model = build_model(args, len(self.data.classes)).to(
            device, memory_format=torch.channels_last)
        if args.init == "fan-in":
            fan_in_init(self.model)
        self.origin = self.initialise(weights) if weights else None
        if args.freeze_backbone:
            self.model.requires_grad_(False).head.fc.requires_grad_(True)
        self.ema = make_ema(self.model, args.ema_horizon, self.total)
        self.optimizer = Optimizers(self.model, args)
        # float16 alone has too small a range for gradients: they are scaled up, and back down
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        if checkpoint:
            self.load_state(checkpoint)
        if args.compile:
            self.model.compile()  # in place: the names in the checkpoint stay as they are

    def initialise(self, weights: convnext.Weights) -> convnext.Report:
        """Begin with pretrained weights; without their classifier if it is for other classes."""
        others = weights.settings["classes"] not in (None, self.data.classes)
        if others:  # perhaps as many
            weights = weights._replace(tensors={
                k: v for k, v in weights.tensors.items() if not k.startswith("head.fc.")})
        with naming(self.args.init_from), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `describe` prints the report
            report = convnext.load_weights(self.model, weights)
        if others:
            report = report._replace(kept=[
                f"{line.split()[0]} is for other classes there" if line.startswith("head.fc.")
                else line for line in report.kept])
        new = [line for line in report.kept if not line.startswith("head.")]
        if self.args.freeze_backbone and new:
            raise UserError(f"--freeze-backbone would leave untrained what does not come from "
                            f"{self.args.init_from}: {', '.join(new)}")
        return report

    @property
    def lr(self) -> float:
        warmup = round(self.steps * self.args.warmup_epochs)
        return lr_at(self.step, self.total, warmup, self.args.lr, self.args.min_lr,
                     self.args.schedule)

    def measure(self, split: str) -> dict[str, float]:
        """The accuracy of the weights, and of their average, as columns of metrics.csv."""
        data, columns = self.data, {}
        for prefix, model in ((split, self.model), (f"{split}_ema", self.ema)):
            if model:
                result = evaluate(model, getattr(data, split), data.mean, data.std,
                                  self.args.workers, self.precision)
                columns |= {f"{prefix}_{name}": value for name, value in result.items()}
        return columns

    def state(self) -> dict:
        """Plain data, which `torch.load(weights_only=True)` reads without running anything."""
        return {
            "args": vars(self.args), "steps": self.steps, "step": self.step,
            "history": self.history, "so_far": self.so_far, "classes": self.data.classes,
            "mean": self.data.mean.tolist(), "std": self.data.std.tolist(),
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "scaler": self.scaler.state_dict()}

    def load_state(self, state: dict) -> None:
        if (self.steps, self.data.classes) != (state["steps"], state["classes"]):
            raise UserError(f"{self.args.resume} was trained on other images than these")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # a run in float16
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.history, self.so_far = state["step"], state["history"], state["so_far"]
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(self.step)  # at 0 the next update would not average but copy
        if self.history:
            self.finite["loss"] = self.history[-1]["train_loss"]
        before, now = state["args"]["epochs"], self.args.epochs
        if before != now and self.step < self.total:
            lr = self.optimizer.param_groups[-1]["lr"]
            say(f"note: {before} -> {now} epochs: the learning rate, {lr:.1e} so far, goes on with "
                f"{self.lr:.1e} and falls to {self.args.min_lr:.1e} at the new end", sys.stderr)

    def write(self, name: str, to: Callable[[Path], Any]) -> None:
        """Replace a file of the run folder. If that fails keep the old one, warn once and go on.

        Whenever the power fails, the file is the old one or the new one, never a part of it.
        """
        path, temporary = self.folder / name, self.folder / f"{name}.tmp"
        try:
            to(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            self.unwritten.pop(name, None)
            with contextlib.suppress(OSError):  # make the folder's entry last, where that works
                folder = os.open(self.folder, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except Exception as error:  # noqa: BLE001, each library reports a full disk in its own way
            if not self.unwritten:
                free = "no folder is"
                if self.folder.is_dir():
                    free = f"{shutil.disk_usage(self.folder).free / 1e6:,.0f} MB are free"
                say(f"warning: cannot write {path}, will try again after the next epoch; "
                    f"{free} there ({error})".splitlines()[0], sys.stderr)
            self.unwritten[name] = str(error).splitlines()[0]
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Make the run folder, lock it, and clear away what a killed run had begun to write."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115, unlocked when closed, or killed
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in ("best.pt", "weights.safetensors", "last.pt", "metrics.csv", "args.json"):
            (folder / f"{name}.tmp").unlink(missing_ok=True)
    except BlockingIOError as error:
        raise UserError(f"another run is writing to {folder}, or was killed seconds ago") from error
    except OSError as error:
        raise UserError(f"cannot write to --output {folder} ({error.strerror})") from error
    with lock:
        try:
            yield
        finally:
            if [path.name for path in folder.glob("*")] == [".lock"]:  # nothing came of it
                shutil.rmtree(folder, ignore_errors=True)


def read_checkpoint(source: str | Path, any_layout: bool = False) -> dict:
    """last.pt, best.pt or weights.safetensors -> its contents, on the CPU; never runs any code.

    any_layout: whatever --init-from takes, in the form of a weights.safetensors.
    """
    path, content = Path(source), None
    if not (any_layout and str(source).startswith(convnext.DOWNLOADS)):
        if not path.is_file():
            raise UserError(f"there is no checkpoint {path}")
        try:
            content, metadata = convnext.read_file(path)
        except ValueError:
            content, metadata = {}, {}
        if settings := convnext.settings_of(content, metadata):
            return settings | (dict(content) if "model" in content else {"weights": content})
        if not content or not any_layout:
            best = path.with_name("best.pt")
            hint = f"; there is also {best}" if best.exists() and best != path else ""
            raise UserError(f"{path} ({path.stat().st_size:,} bytes) is not a complete checkpoint"
                            f"{'' if any_layout else ' written by train.py'}{hint}")
    weights = read_pretrained(str(source), content)
    args = network_arguments(weights) | {"dataset": "imagenet"}  # published weights are ImageNet's
    return weights.settings | {"args": args, "weights": weights.tensors}


def save(run: Run) -> None:
    """best.pt if the held-out images say so, at the end weights.safetensors; last.pt, metrics.csv.

    In this order: a run that is killed before last.pt repeats the epoch, and writes them again.
    metrics.csv is made of the history in last.pt, so the next save mends it.
    """
    check_finite(run)
    state = run.state()
    metric = "val_ema_top1" if run.ema else "val_top1"
    scores = [row.get(metric, -1.0) for row in run.history] or [-1.0]
    at_end_of_epoch = run.step == len(run.history) * run.steps
    if at_end_of_epoch and scores[-1] > max(scores[:-1], default=-1.0):
        run.write("best.pt", lambda path: torch.save(state, path))
    if len(run.history) == run.args.epochs:
        tensors = {k: v.cpu().contiguous() for k, v in (state["ema"] or state["model"]).items()}
        header = {k: json.dumps(state[k]) for k in ("args", "classes", "mean", "std")}
        header["checksum"] = convnext.checksum(tensors, header)
        run.write("weights.safetensors", lambda path: save_file(tensors, path, header))
    run.write("last.pt", lambda path: torch.save(state, path))
    columns = list(max(run.history, key=len, default={}))
    lines = [columns] + [[past.get(name, "") for name in columns] for past in run.history]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    run.write("metrics.csv", lambda path: path.write_text(text))  # whole: every epoch just once


def refuse_unwritten(run: Run) -> None:
    """At the end of a run a file that could not be written is an error."""
    if run.unwritten:
        raise UserError(f"could not write {', '.join(run.unwritten)} in {run.folder}: "
                        f"{next(iter(run.unwritten.values()))}")


def describe(run: Run) -> None:
    """Say what is about to happen, and note it in the run folder."""
    args, data, device = run.args, run.data, run.data.mean.device
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "torchvision": torchvision.__version__}
    text = json.dumps({"argv": sys.argv, "args": vars(args), "versions": versions}, indent=2)
    run.write("args.json", lambda path: path.write_text(text + "\n"))
    with torch.device("meta"):
        macs = convnext.count_macs(build_model(args, len(data.classes)), args.img_size)
    size = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    held_out = f" + {len(data.val):,} held-out" if data.val else ""
    frozen = f" ({trained:,} trained)" if trained < size else ""
    origin = f"init    {args.init_from}: {run.origin}\n" if run.origin else ""
    teacher = (f"teacher {args.teacher}, alpha {args.distill_alpha:g}, temperature "
               f"{args.distill_temperature:g}\n") if args.teacher else ""
    say(f"model   ConvNeXt-{args.variant}, patch size {args.patch_size}: {size:,} parameters"
        f"{frozen}, {macs / 1e9:.3f} GMACs at {args.img_size}x{args.img_size}\n{origin}{teacher}"
        f"data    {args.dataset}: {len(data.train):,} training{held_out} + {len(data.test):,} "
        f"test images, {len(data.classes)} classes ({', '.join(data.classes[:4])}, ...)\n"
        f"device  {device.type} ({name}), {str(run.precision)[6:]}, torch {torch.__version__}"
        f"{', compiled' if args.compile else ''}\n"
        f"steps   {args.epochs} epochs x {run.steps} of {args.batch_size} images, "
        f"lr {args.lr:g}, weight decay {args.weight_decay:g}, seed {args.seed}\n"
        f"run     {run.folder}")


def log(run: Run, writer: SummaryWriter, seconds_left: float) -> None:
    """The newest row of the history: to TensorBoard and the screen."""
    row = run.history[-1]
    if not run.unwritten:  # TensorBoard does not survive a full disk
        for name, value in row.items():
            writer.add_scalar(name, value, row["epoch"])
        writer.flush()
    split, results = "val" if run.data.val else "test", ""
    if f"{split}_loss" in row:
        results = f"  {split} loss {row[f'{split}_loss']:.3f}  top-1 {row[f'{split}_top1']:5.2f} %"
    if f"{split}_ema_top1" in row:
        results += f"  EMA {row[f'{split}_ema_top1']:5.2f} %"
    minutes, seconds = divmod(round(seconds_left), 60)
    say(f"epoch {row['epoch']:3}/{run.args.epochs}  lr {row['lr']:.1e}  train loss "
        f"{row['train_loss']:.3f}{results}  {row['images_per_s']:5.0f} img/s  "
        f"data {row['data_share']:2.0%}  {minutes}:{seconds:02} left")


# --- 7. Training --------------------------------------------------------------------------------

CHECK_EVERY = 50  # steps; each time the CPU waits for the GPU


def train_epoch(run: Run, progress: tqdm) -> dict[str, float]:
    """The rest of an epoch -> its row for metrics.csv."""
    args, data, model, optimizer, scaler = (
        run.args, run.data, run.model, run.optimizer, run.scaler)
    epoch, device = len(run.history), data.mean.device
    # All that is random follows from the seed and the epoch or step: a resumed run draws the same.
    # (Large factors, so that no two steps, or epochs and images, of any two seeds are the same.)
    done = run.step - epoch * run.steps
    loader = batches(data.train, args.batch_size, args.workers,
                     seed=-1_000_000_007 * args.seed - 10_000_019 * (epoch + 1), first=done,
                     pin=device.type == "cuda")
    if not done:
        run.so_far = {"loss": torch.zeros(()), "seconds": 0.0, "waiting": 0.0}
    so_far, ended = run.so_far, time.perf_counter()
    so_far["loss"] = so_far["loss"].to(device)
    model.train()
    for images, labels in loader:
        torch.manual_seed(1_000_000_007 * args.seed + run.step + 1)
        x, y = augment(args, data, images.to(device, non_blocking=True),
                       labels.to(device, non_blocking=True),
                       mix=epoch < args.epochs - args.mix_off_epochs,
                       size=args.start_size if epoch < args.epochs * args.start_share else 0)
        so_far["waiting"] += time.perf_counter() - ended  # on a GPU, for its launches only
        lr = run.lr
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        # ---- learning --------------------------------------------------------------------------
        for xs, ys in zip(x.chunk(args.accumulate), y.chunk(args.accumulate)):
            with torch.autocast(device.type, run.precision, run.precision != torch.float32):
                logits = model(xs)
                answers = run.teacher(xs) if run.teacher else None
            loss = training_loss(args, logits.float(), ys, answers) * (len(xs) / len(x))
            scaler.scale(loss).backward()
            so_far["loss"] += loss.detach()
        if args.clip_grad:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        if run.ema:
            run.ema.update_parameters(model)
        # ----------------------------------------------------------------------------------------
        run.step += 1
        progress.update()
        if run.step % CHECK_EVERY == 0 or run.step == (epoch + 1) * run.steps:
            check_finite(run)  # which waits for a GPU, so that the time is right
        before, ended = ended, time.perf_counter()
        so_far["seconds"] += ended - before
    return {"epoch": epoch + 1, "step": run.step, "train_loss": so_far["loss"].item() / run.steps,
            "lr": optimizer.param_groups[-1]["lr"], "seconds": so_far["seconds"],
            "images_per_s": run.steps * min(args.batch_size, len(data.train)) / so_far["seconds"],
            "data_share": so_far["waiting"] / so_far["seconds"]}


@torch.no_grad()
def check_finite(run: Run) -> None:
    """Refuse to go on, and to save, once the loss or the weights are infinite or no number.

    In float16, too: the scaler skips a step for infinite gradients, but the loss is unscaled.
    """
    epoch, done = divmod(run.step - 1, run.steps)
    when = (f"by step {done + 1} of epoch {epoch + 1}, at lr "
            f"{run.optimizer.param_groups[-1]['lr']:.1e}")
    remedy = (f"try a lower --lr, --clip-grad 1, or --amp bf16 or off. The files in {run.folder} "
              "stay as they were before")
    for name, value in (("loss", run.so_far["loss"] / (done + 1)),
                        ("norm of the weights", nn.utils.get_total_norm(run.model.parameters()))):
        if not value.isfinite():
            before = f", {run.finite[name]:.3f} before" if name in run.finite else ""
            raise UserError(f"the {name} became {value.item()} {when}{before}: {remedy}")
        run.finite[name] = value.item()
    if run.scaler.is_enabled() and run.scaler.get_scale() < 1:
        raise UserError("float16 has no scale left at which the gradients are finite, "
                        f"{when}: {remedy}")


def train(run: Run) -> None:
    """From where the run stands to its end."""
    args, data = run.args, run.data
    describe(run)
    with stop_between_batches(), tqdm(
            total=run.total, initial=run.step, unit="step", disable=None) as progress:
        writer = SummaryWriter(run.folder, purge_step=len(run.history) + 1)
        started, first = time.perf_counter(), run.step
        try:
            if len(run.history) == args.epochs:  # nothing left but to see that all files are there
                save(run)
            for epoch in range(len(run.history), args.epochs):
                row = train_epoch(run, progress)
                if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
                    row |= run.measure("val" if data.val else "test")
                run.history.append(row)
                save(run)
                a_step = (time.perf_counter() - started) / max(1, run.step - first)
                log(run, writer, a_step * (run.total - run.step))
            writer.close()
        except Stopped:
            save(run)
            refuse_unwritten(run)
            raise


def report(path: str | Path, state: dict, args: argparse.Namespace,
           test: Dataset | None = None) -> None:
    """Print the test accuracy of the weights in a checkpoint's state, and of their average."""
    device = pick_device(args.device)
    test = test or load_split(args, train=False, classes=state["classes"])
    check_classes(str(path), state["classes"], state.get("weights", {}), test.classes)
    mean, std = (torch.tensor(state[name], device=device) for name in ("mean", "std"))
    model = build_model(args, len(test.classes)).to(device, memory_format=torch.channels_last)
    for title, key in (("raw", "model"), ("EMA", "ema"), ("weights", "weights")):
        if state.get(key):
            with naming(str(path)):
                convnext.load_weights(model, state[key], strict=True)
            result = evaluate(
                model, test, mean, std, args.workers, pick_precision(args.amp, device))
            if args.tta:
                mirrored = evaluate(model, test, mean, std, args.workers,
                                    pick_precision(args.amp, device), tta=True)
                say(f"{path} ({title}), with mirror: top-1 {mirrored['top1']:.2f} %")
            say(f"{path} ({title}): test loss {result['loss']:.4f}  top-1 {result['top1']:.2f} %  "
                f"top-5 {result['top5']:.2f} %  of {len(test):,} images, "
                f"{args.img_size}x{args.img_size}")


WHAT_HELPS = {  # in an error of PyTorch's or the system's -> what to do about it
    "shared memory|Too many open files":
        "the processes that read images hand them over by it; try fewer --workers, or --workers 0",
    "out of memory|can(not|'t) allocate memory|Unable to allocate":
        "--accumulate 2 (or 4 ...; beside --resume with --override) takes the same steps in less "
        "memory; a smaller --batch-size, --img-size or --variant needs less, too",
    "DataLoader worker":
        "a process that reads images has ended, often for lack of memory; try fewer --workers, "
        "or --workers 0",
    "No space left|quota exceeded": "make room, or give another --output",
}


def main(argv: list[str]) -> int:
    args, checkpoint, weights = parse_args(argv)
    args.output = args.output or time.strftime(f"runs/%Y%m%d-%H%M%S-{args.variant}")
    last, best = Path(args.output) / "last.pt", Path(args.output) / "best.pt"
    go_on = f"to go on: python train.py --resume {shlex.quote(str(last))}"
    try:
        if args.eval_only:
            report(args.eval_only, checkpoint, args)
            return 0
        if last.exists() and not checkpoint:
            raise UserError(f"{args.output} holds a run already: --resume {last}, or give another "
                            "--output")
        with claim(Path(args.output)):
            run = Run(args, checkpoint, weights)
            train(run)
            refuse_unwritten(run)
            for path in (last, best) if run.data.val else (last,):
                report(path, read_checkpoint(path), args, run.data.test)
    except Stopped as stopped:
        say(f"stopped; {go_on}", sys.stderr)
        return 128 + stopped.args[0]
    except (RuntimeError, MemoryError, OSError) as error:
        message = str(error) or "out of memory"
        for pattern, help_ in WHAT_HELPS.items():
            if line := re.search(f".*({pattern}).*", message, re.IGNORECASE):
                saved = f"; {go_on}" if last.exists() and not args.eval_only else ""
                raise UserError(f"{line[0].strip()}: {help_}{saved}") from error
        raise
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        # Raised in a DataLoader's worker, its text is the worker's traceback; our line is the last.
        sys.exit("train.py: error: " + str(error).strip().splitlines()[-1].split("UserError: ")[-1])
