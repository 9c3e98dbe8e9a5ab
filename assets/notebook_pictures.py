"""The pictures and tables of walkthrough.ipynb, and the readers of its data. Nothing to study here.

Orange stands for the mixing of positions, blue for the mixing of channels, green for norms, and
grey for what acts on each value alone. Networks that are compared are mostly black and grey, and
those with attention purple.
"""

import base64
import csv
import io
import json
import textwrap
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torchvision
from einops import rearrange
from IPython import get_ipython
from IPython.display import HTML, display
from matplotlib import colors
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw
from safetensors import safe_open
from torch import Tensor, nn

import convnext

ASSETS = Path(__file__).parent
POSITIONS, CHANNELS, NORM, OTHER = "#D55E00", "#0072B2", "#009E73", "#8C8C8C"
ATTENTION = "#AA3377"
DENSE = "#7A5C3E"  # what mixes positions and channels: dense convolutions, attention
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

DESIGNS = convnext.DESIGNS
STEPS = {step.name: step for step in convnext.ROADMAP}

# --- How things are shown -------------------------------------------------------------------------

plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 84, "font.size": 10,
                     "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11,
                     "image.interpolation": "nearest", "legend.frameon": False})

def png(figure: plt.Figure) -> bytes:
    """Two pixels for each one shown. Without photographs, 128 colours are enough."""
    large, small = io.BytesIO(), io.BytesIO()
    figure.savefig(large, format="png", dpi=2 * figure.dpi, bbox_inches="tight")
    image = Image.open(large).convert("RGB")
    if image.getcolors(4096):
        image = image.quantize(128, Image.Quantize.MAXCOVERAGE)
    image.save(small, "png", optimize=True)
    return small.getvalue()

def png_with_size(figure: plt.Figure) -> tuple[bytes, dict[str, int]]:
    data = png(figure)
    width, height = Image.open(io.BytesIO(data)).size
    return data, {"width": width // 2, "height": height // 2}

if get_ipython() is not None:
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    set_matplotlib_formats("png")
    get_ipython().display_formatter.formatters["image/png"].for_type(plt.Figure, png_with_size)

def fold(text: str, figure: plt.Figure | None = None, title: str = "Answer") -> None:
    """Show an answer, and a picture, only to those who open it."""
    picture = ""
    if figure is not None:
        data, size = png_with_size(figure)
        plt.close(figure)
        picture = (f'<br><img width="{size["width"]}" alt="{title}" '
                   f'src="data:image/png;base64,{base64.b64encode(data).decode()}">')
    display(HTML(f"<details><summary><b>{title}</b></summary>{text}{picture}</details>"))

def table(head: list[str], *rows: list) -> str:
    """An HTML table, for `fold`."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"

def bare(*axes: plt.Axes) -> None:
    """Images without ticks and edges."""
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)

def minus(text: str) -> str:
    return text.replace("-", "−")

# --- Data -----------------------------------------------------------------------------------------

def read_csv(name: str) -> list[dict[str, str]]:
    with open(ASSETS / name) as file:
        return list(csv.DictReader(file))

def read_notes(path: str) -> dict:
    """What train.py wrote about its training into a file of weights: settings, classes, ..."""
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    return {name: json.loads(notes[name]) for name in ("args", "classes", "mean", "std")}

def load_pictures(folder: str | None, download: bool) -> tuple[Tensor, Tensor, bool]:
    """Bytes (n, 3, 32, 32), labels (n,), and whether these are CIFAR-10's test photographs.

    Every fourth of the 10,000. Without them, fifty variants of each of the drawings.
    """
    if folder:
        place = Path(folder, "val" if Path(folder, "val").is_dir() else "test")
        data = torchvision.datasets.ImageFolder(place)
        if data.classes != list(CLASSES) or len(data) != 10_000:
            raise ValueError(f"{place} is no copy of CIFAR-10's 10,000 test images in ten folders. "
                             "Set FOLDER to None for drawings; chapter 10 takes your own picture")
        pairs = [data[i] for i in range(0, len(data), 4)]
        images = torch.stack([torch.from_numpy(np.array(image)) for image, _ in pairs])
        return rearrange(images, "n h w c -> n c h w"), torch.tensor([y for _, y in pairs]), True
    if download or Path("data/cifar-10-batches-py").is_dir():
        data = torchvision.datasets.CIFAR10("data", train=False, download=download)
        chosen = np.argsort(data.targets, kind="stable")[::4]  # those of a folder of each class
        images = torch.from_numpy(data.data[chosen])
        labels = torch.tensor(data.targets)[chosen]
        return rearrange(images, "n h w c -> n c h w"), labels, True
    import train

    torch.manual_seed(0)
    drawn = torch.stack([small(picture) for picture in drawings().values()])
    labels = torch.tensor([CLASSES.index(name) for name in drawings()])
    many = train.crop_and_flip(drawn.repeat(50, 1, 1, 1), 4, flip=0.5)
    bright = many.float() * (0.7 + 0.6 * torch.rand(len(many), 3, 1, 1))
    return bright.clamp(0, 255).byte(), labels.repeat(50), False

def small(picture: Image.Image) -> Tensor:
    """A picture as bytes (3, 32, 32)."""
    return torch.from_numpy(np.array(picture.resize((32, 32), Image.LANCZOS))).permute(2, 0, 1)

def canvas(top: tuple, bottom: tuple, horizon: float = 1.0, ground: tuple = ()) -> Image.Image:
    """A sky whose colour changes from top to bottom, 256 pixels wide, and perhaps a ground."""
    rows = np.linspace(0, 1, 256)[:, None, None] * (np.array(bottom) - top) + top
    picture = np.broadcast_to(rows, (256, 256, 3)).astype(np.uint8).copy()
    picture[int(256 * horizon):] = ground or 0
    return Image.fromarray(picture)

def paint(picture: Image.Image, *parts: tuple) -> Image.Image:
    """Draw ("polygon" | "ellipse" | "rectangle", coordinates in 32nds, colour) onto a picture."""
    draw = ImageDraw.Draw(picture)
    for kind, place, color in parts:
        getattr(draw, kind)([8 * value for value in place], fill=color)
    return picture

def wheels(y: float, radius: float, *places: float) -> list[tuple]:
    return [("ellipse", (x - r, y - r, x + r, y + r), color) for x in places
            for r, color in ((radius, (25, 25, 25)), (0.45 * radius, (170, 170, 170)))]

def drawings() -> dict[str, Image.Image]:
    """Five drawings, none of which any network was trained on."""
    white, grey, dark, red = (240, 240, 240), (195, 200, 205), (40, 60, 80), (190, 30, 35)
    return {
        "ship": paint(
            canvas((150, 190, 235), (190, 220, 235), 0.62, (45, 95, 130)),
            ("polygon", (3, 18, 29, 18, 26, 23, 6, 23), (120, 30, 30)),
            ("rectangle", (6, 15, 25, 18), white), ("rectangle", (9, 12, 20, 15), white),
            ("rectangle", (14, 7, 17, 12), red),
            *(("rectangle", (x, 16, x + 1, 17), dark) for x in range(8, 24, 3))),
        "airplane": paint(
            canvas((110, 160, 230), (170, 210, 230)),
            ("ellipse", (3, 14, 29, 18), white),
            ("polygon", (13, 16, 18, 16, 13, 26, 10, 26), grey),
            ("polygon", (14, 15, 18, 15, 15, 9, 13, 9), grey),
            ("polygon", (4, 15, 8, 15, 5, 9, 3, 9), (60, 90, 160))),
        "automobile": paint(
            canvas((205, 215, 220), (205, 215, 220), 0.69, (120, 120, 118)),
            ("polygon", (3, 18, 8, 17, 12, 12, 22, 12, 26, 17, 30, 18, 30, 23, 3, 23), red),
            ("polygon", (10, 17, 13, 13, 16.5, 13, 16.5, 17), dark),
            ("polygon", (17.5, 13, 21.5, 13, 24.5, 17, 17.5, 17), dark),
            *wheels(23, 2.7, 9, 24)),
        "frog": paint(
            canvas((95, 120, 60), (95, 120, 60)),
            ("ellipse", (6, 10, 26, 28), (70, 140, 50)),
            *(("ellipse", (x - 3, 6, x + 3, 13), (80, 150, 60)) for x in (11, 21)),
            *(("ellipse", (x - 1.6, 7.5, x + 1.6, 10.7), (20, 20, 20)) for x in (11, 21)),
            ("ellipse", (10, 18, 22, 21.5), (30, 60, 20)),
            ("ellipse", (10, 17, 22, 20.5), (70, 140, 50))),
        "truck": paint(
            canvas((180, 205, 230), (180, 205, 230), 0.69, (110, 110, 105)),
            ("rectangle", (3, 7, 20, 22), white),
            ("polygon", (21, 11, 26, 11, 29, 16, 29, 22, 21, 22), (40, 80, 170)),
            ("polygon", (22.5, 12, 25.5, 12, 27.5, 16, 22.5, 16), (200, 225, 240)),
            ("rectangle", (3, 21, 29, 23), (50, 50, 50)), *wheels(23, 2.3, 7, 11.5, 25)),
    }

# --- Costs ----------------------------------------------------------------------------------------

def layer_costs(design: convnext.Design, size: int = 224) -> list[dict]:
    """A row for each convolution and linear layer of a network of the road."""
    with torch.device("meta"):
        network = convnext.roadmap_network(design)
    dims = [design.width * 2**s * (1 if design.inverted else 4) for s in range(4)]
    rows = []

    def note(layer: nn.Module, _: object, y: Tensor) -> None:
        positions = y[0, 0].numel() if y.ndim == 4 else 1
        rows.append(layer.about | {
            "gmacs": layer.weight.numel() * positions / 1e9,
            "parameters": sum(p.numel() for p in layer.parameters())})

    for index, part in enumerate(network):
        place = "stem" if index == 0 else "head" if index == len(network) - 1 else "between"
        if isinstance(part, convnext.RoadmapBlock):
            place = f"stage {1 + dims.index(part.dim)}"
        for name, layer in part.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                kind = "stem, downsampling, head"
                if "shortcut" in name:
                    kind = "1×1 on shortcuts"
                elif place.startswith("stage"):
                    kind = "1×1 in branches"
                    if getattr(layer, "kernel_size", (1, 1)) != (1, 1):
                        kind = "k×k depthwise" if layer.groups > 1 else "k×k dense"
                layer.about = {"place": place, "kind": kind}
                layer.register_forward_hook(note)
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size, device="meta"))
    return rows

LAYERS = {name: layer_costs(DESIGNS[name]) for name in STEPS}
GMACS = {name: sum(row["gmacs"] for row in rows) for name, rows in LAYERS.items()}

def gmacs(name: str, kind: str) -> float:
    return sum(row["gmacs"] for row in LAYERS[name] if row["kind"] == kind)

# --- The first screen -----------------------------------------------------------------------------

def stages(images: Tensor, colours: list[Tensor], captions: list[str]) -> None:
    """images (n, 3, h, w) from 0 to 1; colours: for each stage (n, h, w, 3)."""
    rows = [rearrange(images, "n c h w -> n h w c"), *colours]
    names = ["image", *(f"after stage {i}\n{c.shape[1]}×{c.shape[2]}"
                        for i, c in enumerate(colours, 1))]
    _figure, axes = plt.subplots(len(rows), len(images), figsize=(1.05 * len(images), 5.6))
    bare(*axes.flat)
    for line, pictures, name in zip(axes, rows, names):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for axis, picture in zip(line, pictures):
            axis.imshow(picture)
    for axis, caption in zip(axes[0], captions):
        axis.set_title(caption.replace(" ", "\n"), fontsize=8)
    plt.show()

def network() -> None:
    """ConvNeXt-T as a row of stages, and one block of it opened."""
    _figure, (axis, inner) = plt.subplots(2, 1, figsize=(8, 4.3), height_ratios=(2.6, 1.5))
    depths, dims, *_ = convnext.VARIANTS["tiny"]
    x, arrows = 0.0, {"color": "black", "linewidth": 1, "arrowstyle": "-|>", "mutation_scale": 8}
    for stage, (depth, c) in enumerate(zip(depths, dims)):
        side = 56 // 2**stage
        height, width = side**0.5, c**0.5 / 9
        axis.annotate("", (x, 0), (x - 1.3, 0), arrowprops=arrows)
        axis.bar(x, height, 0.4, -height / 2, color="black", align="edge")
        axis.text(x, -height / 2 - 0.9, "downsampling" if stage else "stem", fontsize=8)
        start = x + 0.9
        for block in range(depth):
            left = start + block * (width + 0.7)
            axis.bar(left, height, width / 4, -height / 2, color=POSITIONS, align="edge")
            axis.bar(left + width / 4, height, 0.75 * width, -height / 2, color=CHANNELS,
                     align="edge")
            axis.plot([left - 0.3, left - 0.3, left + width + 0.25, left + width + 0.25],
                      [0, height / 2 + 0.35, height / 2 + 0.35, 0], color="black",
                      linewidth=0.8, zorder=0)
        end = start + depth * (width + 0.7) - 0.7
        axis.plot([x, end + 1.1], [0, 0], color="black", linewidth=1, zorder=0)
        axis.text((start + end) / 2, -8.6, f"stage {stage + 1}\n{depth} blocks\n{c} channels\n"
                  f"{side}×{side} positions", ha="center", fontsize=8)
        x = end + 2.4
    axis.annotate("", (x, 0), (x - 1.6, 0), arrowprops=arrows)
    axis.bar(x, 1.2, 0.4, -0.6, color="black", align="edge")
    axis.text(x + 0.8, -1.6, "head\n1,000\nlogits", fontsize=8)
    axis.text(-6.4, -1.6, "image\n3 channels\n224×224", fontsize=8)
    axis.set(xlim=(-6.5, x + 4), ylim=(-8.8, 4.8), title=f"ConvNeXt-T: {sum(depths)} blocks")
    axis.set_axis_off()
    draw_row(inner, block_boxes(DESIGNS["separate downsampling"]), 0, 0)
    inner.set(xlim=(-4, 14), ylim=(-1.3, 1.6), title="one block of stage 1, opened")
    inner.set_axis_off()
    plt.show()

# --- Designs as rows of boxes ---------------------------------------------------------------------

Box = tuple[str, int, str]  # label, output channels, colour

def block_boxes(d: convnext.Design) -> list[Box]:
    """The layers of a block in stage 1, in the order in which they run."""
    if getattr(d, "swin_block", False):
        return [("LN", d.width, NORM), ("attention", d.width, DENSE), ("+", 0, "black"),
                ("LN", d.width, NORM), ("1×1", 4 * d.width, CHANNELS), ("GELU", 0, OTHER),
                ("1×1", d.width, CHANNELS), ("+", 0, "black")]
    outer, middle = (d.width, 4 * d.width) if d.inverted else (4 * d.width, d.width)
    act = ("GELU" if d.act is nn.GELU else "ReLU", 0, OTHER)
    norm_name = "BN" if d.norm is nn.BatchNorm2d else "LN"
    color = POSITIONS if d.depthwise and not d.attention else DENSE
    label = f"{d.kernel_size}×{d.kernel_size}\n{'depthwise' if d.depthwise else 'dense'}"

    def conv(label: str, channels: int, color: str, norm: bool) -> list[Box]:
        return [(label, channels, color)] + [(norm_name, channels, NORM)] * norm

    def mix(channels: int) -> list[Box]:
        return conv("attention\n7×7" if d.attention else label, channels, color, True)

    optional = [] if d.one_act else [act]
    if d.depthwise_first:
        boxes = mix(outer) + optional + conv("1×1", middle, CHANNELS, not d.one_norm)
    else:
        boxes = conv("1×1", middle, CHANNELS, not d.one_norm) + optional + mix(middle)
    boxes += [act] + conv("1×1", outer, CHANNELS, not d.one_norm)
    return boxes + [("+", 0, "black")] + optional

def stem_boxes(d: convnext.Design) -> list[Box]:
    norm = ("BN" if d.norm is nn.BatchNorm2d else "LN", d.width, NORM)
    if d.patchify:
        return [("4×4\npatches", d.width, "black"), norm]
    return [("7×7\nstride 2", d.width, "black"), norm, ("ReLU", 0, OTHER), ("max-\npool", 0, OTHER)]

def downsampling_boxes(d: convnext.Design) -> list[Box]:
    if d.separate_downsampling:
        outer = d.width if d.inverted else 4 * d.width
        return [("LN", outer, NORM), ("2×2\nstride 2", 2 * d.width, "black")]
    return [("stride 2 in\nthe 1st block", 0, "white")]

def draw_row(axis: plt.Axes, boxes: list[Box], x: float, y: float,
             lit: set[int] | None = None) -> float:
    """Draw boxes from left to right; return where they end. lit: the numbers of the bright ones."""
    start = x
    for i, (label, channels, color) in enumerate(boxes):
        bright = lit is None or i in lit
        wide = {"LN": 1.0, "BN": 1.0, "+": 1.0, "GELU": 1.35, "ReLU": 1.35, "1×1": 1.2,
                "attention": 2.1}.get(label, 2.1)
        if color == "white":
            wide = 2.6
        height = 0.35 + 0.045 * channels**0.5 if channels else 0.55
        look = {"alpha": 1.0 if bright else 0.25}
        if label == "+":
            axis.plot([x + 0.4, x + 0.4, start - 0.2, start - 0.2], [y, y + 0.95, y + 0.95, y],
                      color="black", linewidth=0.9, zorder=0)
            axis.text(x + 0.4, y, "+", ha="center", va="center", fontsize=9,
                      bbox={"boxstyle": "circle,pad=0.15", "fc": "white"})
            start = x + 1.05
        else:
            axis.add_patch(plt.Rectangle((x, y - height / 2), wide - 0.15, height, color=color,
                                         linewidth=0, **look))
            text_color = "black" if color == "white" or not bright else "white"
            small_text = 6.5 if "\n" in label or len(label) > 4 else 7.5
            axis.text(x + wide / 2 - 0.07, y, label, ha="center", va="center",
                      fontsize=small_text, color=text_color)
            if channels:
                axis.text(x + wide / 2 - 0.07, y - height / 2 - 0.07, channels, ha="center",
                          va="top", fontsize=6.5, color="black" if bright else OTHER)
        x += wide
    return x

def changed(before: list, after: list) -> set[int]:
    """The numbers of the entries of `after` that are not in `before`."""
    if [label for label, *_ in before] == [label for label, *_ in after]:  # compare one by one
        pairs = zip(before, after)
        return {number for number, (old, new) in enumerate(pairs) if old != new}
    same = set()
    for block in SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
        same |= set(range(block.b, block.b + block.size))
    return set(range(len(after))) - same

PARTS = {"stem": (stem_boxes, 7.0), "a block of stage 1": (block_boxes, 14.4),
         "between stages": (downsampling_boxes, 3.9)}  # and how wide they are

def designs(named: dict[str, convnext.Design], parts: tuple[str, ...] = tuple(PARTS)) -> None:
    """Networks as rows of boxes. Bright is what differs from the row above, and in the first row
    what the second no longer has."""
    wide = sum(PARTS[part][1] for part in parts)
    _figure, axis = plt.subplots(figsize=(0.266 * (wide + 7), 1.15 * len(named) + 0.35))
    last, alone = None, len(named) == 1
    second = [*named.values()][1:2]
    shows_depths = len(parts) == len(PARTS) or len({d.depths for d in named.values()}) > 1
    for row, (name, d) in enumerate(named.items()):
        x, y = 0.0, -2.3 * row
        axis.text(-0.4, y, textwrap.fill(name, 14), ha="right", va="center", fontsize=8)
        for part in parts:
            boxes_of, width = PARTS[part]
            lit = None
            if not alone:
                other = second[0] if last is None else last
                lit = changed(boxes_of(other), boxes_of(d))
            draw_row(axis, boxes_of(d), x, y, lit)
            x += width
        new = alone or last is not None and last.depths != d.depths
        axis.text(x, y, shows_depths * " ".join(map(str, d.depths)), va="center", fontsize=8,
                  weight="bold" if new else "normal", color="black" if new else OTHER)
        last = d
    x = 0.0
    for part in parts:
        axis.text(x, 1.25, part, fontsize=8, style="italic")
        x += PARTS[part][1]
    axis.text(x, 1.25, shows_depths * "blocks", fontsize=8, style="italic")
    axis.set(xlim=(-4.8, x + 2.2), ylim=(-2.3 * len(named) + 1.0, 1.6))
    axis.set_axis_off()
    plt.show()

def fields_of(d: convnext.Design) -> str:
    """Each field with its value, as it can be typed in the notebook."""
    values = d._asdict()
    for name, value in values.items():
        if isinstance(value, type):
            module = "nn" if value.__module__.startswith("torch.") else value.__module__
            values[name] = f"{module}.{value.__name__}"
    return ", ".join(f"{name}={value}" for name, value in values.items())

def step(after: str, before: str | None = None) -> None:
    """The parts that a step of the road changes. before: the step to compare with, by default
    the last."""
    kept = [name for name, about in STEPS.items() if about.kept]
    before = before or kept[kept.index(after) - 1]
    old, new = DESIGNS[before], DESIGNS[after]
    differ = tuple(part for part, (boxes, _) in PARTS.items() if boxes(old) != boxes(new))
    designs({before: old, after: new}, differ)

# --- The paper's road -----------------------------------------------------------------------------

SPREAD = dict(zip(STEPS, (.07, .07, .18, .08, .02, .03, .08, .08, .14, .06, .11, .14, .06, .09, .09,
                          .06)))  # standard deviations of three seeds (paper, table 10)
KIND = {"depthwise": POSITIONS, "depthwise_first": POSITIONS, "kernel_size": POSITIONS,
        "width": CHANNELS, "inverted": CHANNELS, "one_norm": NORM, "norm": NORM,
        "attention": POSITIONS}

def step_color(name: str) -> str:
    change = STEPS[name].change if name in STEPS else {}
    return KIND.get(next(iter(change), ""), "black")

def road_of_the_paper() -> plt.Figure:
    names = ["old recipe", *STEPS]
    values = [convnext.OLD_RECIPE_TOP1, *(about.top1 for about in STEPS.values())]
    costs = [GMACS["ResNet-50"], *GMACS.values()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.4), sharey=True,
                                         width_ratios=(3, 1.2))
    kept = [i for i, name in enumerate(names) if name not in STEPS or STEPS[name].kept]
    left.plot([values[i] for i in kept], kept, color="#CCCCCC", zorder=1)
    for last, i in pairwise(kept):
        left.annotate(minus(f"{values[i] - values[last]:+.2f}"), (values[i], i), (9, 0),
                      textcoords="offset points", va="center", fontsize=8)
    for i, name in enumerate(names):
        color = step_color(name)
        left.scatter(values[i], i, s=36, color=color if i in kept else "white", edgecolors=color,
                     zorder=3)
        left.plot([values[i] - SPREAD.get(name, 0), values[i] + SPREAD.get(name, 0)], [i, i],
                  color=color, linewidth=1)
        right.barh(i, costs[i], 0.7, color=color if i in kept else "white", edgecolor=color)
        right.text(costs[i] + 0.1, i, f"{costs[i]:.2f}", va="center", fontsize=8)
    left.axvline(81.3, color=OTHER, linestyle=":")
    left.text(81.25, 0.2, "Swin-T", ha="right", fontsize=8, color=OTHER)
    left.set(yticks=range(len(names)), xlabel="ImageNet top-1 in % (the paper's)",
             xlim=(75.7, 83), title=f"The recipe gains {values[1] - values[0]:.1f} of the "
             f"{values[-1] - values[0]:.1f} points")
    left.set_yticklabels(["ResNet-50, old recipe", "ResNet-50, new recipe", *names[2:]], fontsize=9)
    left.invert_yaxis()
    right.set(xlabel="GMACs (counted here)", xlim=(0, 6.6),
              title=f"From {costs[0]:.1f} to {costs[-1]:.1f}")
    left.grid(axis="y", color="#EEEEEE", zorder=0)
    return figure

def stage_budget() -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.5))
    looks = {"ResNet-50": ("ResNet-50, (3, 4, 6, 3)", OTHER),
             "stage ratio": ("ResNet-50, (3, 3, 9, 3)", "#BBBBBB"),
             "separate downsampling": ("ConvNeXt-T, (3, 3, 9, 3)", "black")}
    groups = {"stem": ["stem"], **{f"stage {s}": [f"stage {s}"] for s in range(1, 5)},
              "downs.,\nhead": ["between", "head"]}
    for i, (name, (label, color)) in enumerate(looks.items()):
        for axis, what, scale in zip(axes, ("gmacs", "parameters"), (1, 1e6)):
            values = [sum(row[what] for row in LAYERS[name] if row["place"] in places) / scale
                      for places in groups.values()]
            axis.bar(np.arange(6) + 0.27 * (i - 1), values, 0.27, color=color, label=label)
    for axis, unit in zip(axes, ("GMACs", "million parameters")):
        axis.set(ylabel=unit, xticks=range(6))
        axis.set_xticklabels(groups, fontsize=8)
    axes[0].set_title("Stage 3 has the most arithmetic")
    axes[1].set_title("Stage 4 has the most parameters")
    axes[0].legend(fontsize=8)
    return figure

def patches(picture: Tensor, size: int) -> None:
    """picture: (h, w, 3) from 0 to 1. The image, its patches, and one of them as numbers."""
    _, (left, middle, right) = plt.subplots(1, 3, figsize=(8, 2.3), width_ratios=(1, 1.15, 1.8))
    bare(left, middle)
    left.imshow(picture)
    left.set_title(f"{picture.shape[0]}×{picture.shape[1]} pixels", fontsize=9)
    n = picture.shape[0] // size
    grid = np.ones((n * (size + 1), n * (size + 1), 3))
    for i in range(n):
        for j in range(n):
            grid[i * (size + 1):][:size, j * (size + 1):][:, :size] = (
                picture[i * size:(i + 1) * size, j * size:(j + 1) * size])
    middle.imshow(grid)
    row, column = n // 2 + 1, n // 2
    middle.add_patch(plt.Rectangle((column * (size + 1) - 0.8, row * (size + 1) - 0.8), size + 0.6,
                                   size + 0.6, fill=False, linewidth=2))
    middle.set_title(f"{n}×{n} patches", fontsize=9)
    patch = picture[row * size:(row + 1) * size, column * size:(column + 1) * size]
    values = rearrange(patch, "p q c -> (c p q)")
    shades = ["#CC3333"] * size**2 + ["#33AA33"] * size**2 + ["#3355CC"] * size**2
    right.bar(range(len(values)), values, color=shades)
    right.set(title=f"one patch: {len(values)} numbers", ylim=(0, 1),
              xlabel="red, green and blue of its pixels", ylabel="value / 255")
    plt.show()

def filters_at_work(before: Tensor, kernels: Tensor, after: Tensor) -> None:
    """Maps (n, h, w), filters (n, 7, 7) and responses (n, h, w): a column for each channel."""
    figure, axes = plt.subplots(3, len(kernels), figsize=(1.25 * len(kernels), 3.6))
    bare(*axes.flat)
    names = ("a channel", "its filter", "the response")
    for line, pictures, name in zip(axes, (before, kernels, after), names):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for axis, picture in zip(line, pictures):
            limit = picture.abs().max()
            axis.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit)
    figure.suptitle("Each channel has a filter of its own (red +, blue −; each picture has a "
                    "scale of its own)", fontsize=10)
    plt.show()

def shares_of_a_block() -> plt.Figure:
    dims = convnext.VARIANTS["tiny"].dims
    shares = [49 / (49 + 8 * c) for c in dims]
    figure, axis = plt.subplots(figsize=(7, 2.2))
    names = [f"stage {s}, C = {c}" for s, c in enumerate(dims, 1)]
    axis.barh(names, shares, color=POSITIONS, label="depthwise 7×7")
    axis.barh(names, [1 - share for share in shares], left=shares, color=CHANNELS,
              label="two linear layers")
    for name, share in zip(names, shares):
        axis.text(share + 0.01, name, f"{share:.1%}", color="white", va="center", fontsize=9)
    axis.set(xlabel="share of a block's MACs", xlim=(0, 1),
             title=f"The convolution is {100 * shares[0]:.0f} % of a block, and less in later "
             "stages")
    axis.invert_yaxis()
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure

def arithmetic() -> None:
    kinds = {"stem, downsampling, head": "black", "k×k dense": DENSE,
             "k×k depthwise": POSITIONS, "1×1 in branches": CHANNELS, "1×1 on shortcuts": OTHER}
    names = ["patchify stem", "depthwise conv", "width 64 to 96", "inverted bottleneck",
             "depthwise conv first", "kernel 7x7", "separate downsampling"]
    _, axis = plt.subplots(figsize=(8, 3))
    for i, name in enumerate(names):
        left = 0
        for kind, color in kinds.items():
            value = gmacs(name, kind)
            axis.barh(f"({i}) {name}" if i else name, value, left=left, color=color,
                      label=kind if i == 0 else None)
            left += value
        axis.text(left + 0.05, i, f"{left:.2f} GMACs, {STEPS[name].top1:.2f} %", va="center",
                  fontsize=8)
    axis.set(xlabel="GMACs (counted here); %: top-1 on ImageNet (the paper's)", xlim=(0, 6.9),
             title="Depthwise convolutions cost almost nothing, the 1×1 layers nearly all")
    axis.invert_yaxis()
    axis.legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.4, -0.2),
                columnspacing=1, handlelength=1)
    plt.show()

def fields(sizes: dict[int, Tensor]) -> tuple[plt.Figure, dict[int, float]]:
    """|gradient| for each 4x4 pixels of 544x544, by kernel size -> picture, mean distances."""
    ruler = torch.arange(136) * 4 - 270.0
    distance = (ruler[:, None] ** 2 + ruler**2).sqrt()
    radius = {k: ((field * distance).sum() / field.sum()).item() for k, field in sizes.items()}
    figure, axes = plt.subplots(1, len(sizes), figsize=(8, 3.4), sharey=True)
    for axis, (k, field) in zip(axes, sizes.items()):
        image = axis.imshow(field / field.max(), cmap="Oranges", extent=(-272, 272, -272, 272),
                            norm=colors.PowerNorm(0.5, 0, 1))
        axis.add_patch(plt.Circle((0, 0), radius[k], fill=False, linestyle="--"))
        axis.spines[:].set_visible(False)
        axis.set(title=f"{k}×{k}: {radius[k]:.0f} pixels away on average", xlabel="pixels")
    axes[0].set_ylabel("pixels")
    figure.colorbar(image, ax=axes, label="|gradient|, largest = 1\n(square-root scale)")
    return figure, radius

def activations() -> None:
    x = torch.linspace(-4, 4, 401)
    relu, gelu = x.relu(), nn.functional.gelu(x)
    _, axis = plt.subplots(figsize=(4.2, 2.2))
    axis.plot(x, relu, ":", color="black", label="ReLU")
    axis.plot(x, gelu, color="black", label="GELU")
    axis.axhline(0, color="#DDDDDD", zorder=0)
    axis.set(title=f"GELU and ReLU differ by {(gelu - relu).abs().max():.2f} at most", xlabel="x")
    axis.legend()
    plt.show()

def passing(alike: dict[str, list], added: dict[str, list]) -> None:
    looks = {"GELU": ("three activations, three norms", "o", OTHER),
             "one activation": ("one activation, three norms", "s", "black"),
             "one norm": ("one of each", "^", NORM)}
    _, axes = plt.subplots(1, 2, figsize=(8, 2.8))
    for shift, (name, (label, style, color)) in enumerate(looks.items()):
        blocks = [block + 0.25 * (shift - 1) for block in range(1, 19)]  # side by side
        for axis, values in zip(axes, (alike, added)):
            axis.plot(blocks, values[name], style, color=color, markersize=4, label=label)
    for axis in axes:
        for edge in (3.5, 6.5, 15.5):
            axis.axvline(edge, color="#DDDDDD", zorder=0)
        axis.set(xlabel="block (a line: the next stage begins)", xticks=(1, 4, 7, 10, 13, 16))
    axes[0].set(ylim=(-0.15, 1), ylabel="cosine of two unrelated images",
                title="Three activations make images alike")
    axes[1].set(ylim=(0, 1.5), ylabel="standard deviation\nof branch / shortcut",
                title="One norm keeps the branches small")
    axes[0].legend(fontsize=8)
    plt.show()

def moved(maps: dict[str, Tensor]) -> plt.Figure:
    """For each norm, which positions of which image moved: (2, 5, 5)."""
    figure, axes = plt.subplots(2, len(maps), figsize=(6, 3.6))
    bare(*axes.flat)
    for column, (name, images) in zip(axes.T, maps.items()):
        for image, axis in zip(images, column):
            axis.imshow(image, cmap="Greens", vmin=0, vmax=1.3)
            axis.hlines(np.arange(0.5, 4), -0.5, 4.5, color="white", linewidth=0.8)
            axis.vlines(np.arange(0.5, 4), -0.5, 4.5, color="white", linewidth=0.8)
            axis.set_xlabel(f"{image.sum()} of 25 moved")
        column[0].set_title(name)
    axes[0, 0].set_ylabel("image 1 (touched)")
    axes[1, 0].set_ylabel("image 2")
    return figure

def three_blocks() -> None:
    """ResNet's, Swin's and ConvNeXt's block. The width of a box is its number of channels."""
    P, C, N, G = POSITIONS, CHANNELS, NORM, OTHER
    blocks = {
        "ResNet-50": [("1×1, 4C to C", 1, C), ("BatchNorm, ReLU", 1, N, G),
                      ("3×3, C to C", 1, P, C), ("BatchNorm, ReLU", 1, N, G),
                      ("1×1, C to 4C", 4, C), ("BatchNorm", 4, N), ("+",), ("ReLU", 4, G)],
        "Swin": [("LayerNorm", 1, N), ("attention", 1, P, C), ("+",), ("LayerNorm", 1, N),
                 ("linear, C to 4C", 4, C), ("GELU", 4, G), ("linear, 4C to C", 1, C), ("+",)],
        "ConvNeXt": [("depthwise 7×7", 1, P), ("LayerNorm", 1, N), ("linear, C to 4C", 4, C),
                     ("GELU", 4, G), ("linear, 4C to C", 1, C), ("LayerScale", 1, G), ("+",)],
    }
    _, axis = plt.subplots(figsize=(8, 4))
    for column, (name, layers) in enumerate(blocks.items()):
        middle, start = 6.2 * column, 1.0
        axis.plot([middle] * 2, [1.15, -len(layers) + 0.55], color="black", zorder=0)
        axis.text(middle, 1.3, name, ha="center", fontsize=11)
        for i, (label, *rest) in enumerate(layers):
            if not rest:
                axis.plot([middle, middle - 2.35, middle - 2.35, middle],
                          [start, start, 0.35 - i, 0.35 - i], color="black", zorder=0)
                axis.text(middle, 0.35 - i, "+", ha="center", va="center",
                          bbox={"boxstyle": "circle", "fc": "white"})
                start = -i - 0.12
                continue
            channels, *shades = rest
            width = 1.05 * channels
            for j, shade in enumerate(shades):
                axis.bar(middle - width / 2 + j * width / len(shades), 0.72, width / len(shades),
                         -i, color=shade, align="edge")
            if channels == 4:
                axis.text(middle, 0.36 - i, label, color="white", ha="center", va="center",
                          fontsize=9)
            else:
                axis.text(middle + 0.6, 0.36 - i, label, va="center", fontsize=9,
                          bbox={"fc": "white", "ec": "none", "pad": 0.5})
    axis.set(ylim=(-7.4, 2), xlim=(-2.6, 15.6))
    axis.set_axis_off()
    plt.show()

# --- Training -------------------------------------------------------------------------------------

class LiveCurves:
    """Curves of the loss and the accuracy, which grow while a network learns."""

    def __init__(self) -> None:
        self.runs: dict[str, list[tuple[int, float, float]]] = {}
        self.handle = None

    def add(self, name: str, step: int, loss: float, accuracy: float) -> None:
        """Add a point and draw anew. Step 1 begins the curve anew."""
        if self.handle is None:
            self.handle = display(self.picture(), display_id=True)
        points = self.runs.setdefault(name, [])
        if points and points[-1][0] >= step:
            points.clear()
        points.append((step, loss, 100 * accuracy))
        if self.handle is not None:  # None outside of IPython
            self.handle.update(self.picture())

    def elsewhere(self) -> None:
        """Let the next picture appear below the cell that runs then."""
        self.handle = None

    def picture(self) -> plt.Figure:
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.7))
        looks = {"ConvNeXt": ("black", "-"), "3×3": (POSITIONS, "-"), "no norm": (NORM, "-"),
                 "no mixing": (POSITIONS, ":"), "attention": (ATTENTION, "-"),
                 "attention, own block": (ATTENTION, "--")}
        others = iter(("-", "--", ":", "-.") * 9)
        for name, points in self.runs.items():
            color, style = looks[name] if name in looks else (OTHER, next(others))
            steps, losses, accuracies = zip(*points)
            left.plot(steps, losses, linestyle=style, color=color)
            right.plot(steps, accuracies, linestyle=style, color=color, label=name)
        left.set(xlabel="step", ylabel="loss of the batch", ylim=(0, None))
        right.set(xlabel="step", ylabel="accuracy on new shapes in %", ylim=(0, 100))
        if self.runs:
            right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        plt.close(figure)
        return figure

def some_shapes(images: Tensor, labels: Tensor, classes: list[str]) -> None:
    _, axes = plt.subplots(1, len(classes), figsize=(8, 1.3))
    bare(*axes)
    for k, (axis, name) in enumerate(zip(axes, classes)):
        axis.imshow(rearrange(images[labels == k][0], "c h w -> h w c"))
        axis.set_title(name.replace(" ", "\n"), fontsize=8)
    plt.show()

# --- Our road -------------------------------------------------------------------------------------

def read_road() -> dict[str, list[dict]]:
    """The runs of assets/road.csv by step, in the order of the road, and then what is not on it."""
    runs: dict[str, list[dict]] = {}
    for row in read_csv("road.csv"):
        name = row["step"] + (", old recipe" if row["recipe"] == "old" else "")
        runs.setdefault(name, []).append(row)
    order = ["ResNet-50, old recipe", *DESIGNS]
    return dict(sorted(runs.items(), key=lambda item: order.index(item[0])
                       if item[0] in order else len(order)))

ROAD = read_road()
OURS = {name: np.array([float(row["held_out_top1"]) for row in rows])
        for name, rows in ROAD.items()}

def road_labels() -> dict[str, str]:
    """For each row, all the steps that were taken since the row before it."""
    labels, pending = {}, []
    for name in ["ResNet-50, old recipe", *(n for n, about in STEPS.items() if about.kept)]:
        pending.append(name)
        if name in OURS:
            labels[name] = " + ".join(pending)
            pending = []
    labels["ResNet-50"] = "new recipe"
    return labels | {name: name for name in OURS if name not in labels}

def our_road() -> plt.Figure:
    labels = road_labels()
    on_road = [name for name in OURS if name in labels and (name in STEPS or "old" in name)]
    names = on_road + [name for name in OURS if name not in on_road]
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(names) + 1))
    axis.plot([OURS[name].mean() for name in on_road], range(len(on_road)), color="#CCCCCC",
              zorder=1)
    gains = {last: OURS[last].mean() - OURS[first].mean() for first, last in pairwise(on_road)}
    most, least = max(gains, key=gains.get), min(gains, key=gains.get)
    title = f"{labels[most]} gains most, {labels[least]} loses most"
    axis.set_title(title[0].upper() + title[1:])
    for i, name in enumerate(names):
        values = OURS[name]
        single = name in STEPS and "+" not in labels[name]
        color = step_color(name) if single else "black" if i < len(on_road) else ATTENTION
        axis.plot([values.min(), values.max()], [i, i], color=color, linewidth=1.5)
        if len(values) > 1:
            axis.scatter(values, [i] * len(values), marker="|", s=60, color=color)
        axis.scatter(values.mean(), i, s=36, color=color, zorder=3,
                     marker="o" if i < len(on_road) else "D")
        if name in gains:
            axis.annotate(minus(f"{gains[name]:+.1f}"), (values.max(), i), (9, 0),
                          textcoords="offset points", va="center", fontsize=9,
                          bbox={"fc": "white", "ec": "none", "pad": 0.5})
    best = max(values.max() for values in OURS.values())
    axis.set(yticks=range(len(names)), xlim=(None, best + 1.5), xlabel="CIFAR-10 top-1 in % on "
             "30,000 held-out images; bars: from one seed to the other")
    axis.set_yticklabels([textwrap.fill(labels[name], 44) for name in names], fontsize=8)
    axis.grid(axis="y", color="#EEEEEE", zorder=0)
    axis.invert_yaxis()
    return figure

def road_in_words() -> str:
    """Which rows of our road are above or below the row before, with both seeds."""
    labels = road_labels()
    names = [name for name in OURS if name in STEPS or "old" in name]
    lines = {"both seeds higher": [], "both lower": [], "the seeds overlap": []}
    for last, name in pairwise(names):
        kind = "the seeds overlap"
        if OURS[name].min() > OURS[last].max():
            kind = "both seeds higher"
        elif OURS[name].max() < OURS[last].min():
            kind = "both lower"
        lines[kind].append(labels[name])
    return "".join(f"<li><b>{kind}</b>: {'; '.join(rows) or 'none'}</li>"
                   for kind, rows in lines.items()).join(("<ul>", "</ul>"))

def cost_and_accuracy() -> None:
    """Published ImageNet-1K top-1 accuracies at 224 pixels, against the cost."""
    networks = {  # GMACs, top-1 in %
        "ConvNeXt": [(4.5, 82.1, "T"), (8.7, 83.1, "S"), (15.4, 83.8, "B"), (34.4, 84.3, "L")],
        "Swin": [(4.5, 81.3, "T"), (8.7, 83.0, "S"), (15.4, 83.5, "B")],
        "isotropic ConvNeXt": [(4.3, 79.7, "S"), (16.9, 82.0, "B"), (59.7, 82.6, "L")],
        "ViT": [(4.6, 79.8, "S"), (17.6, 81.8, "B"), (61.6, 82.6, "L")]}
    looks = {"ConvNeXt": "o-", "Swin": "s--", "isotropic ConvNeXt": "o-", "ViT": "s--"}
    _, axis = plt.subplots(figsize=(7.6, 3))
    for name, points in networks.items():
        x, y, _letters = zip(*points)
        color = "black" if name in ("ConvNeXt", "Swin") else OTHER
        axis.semilogx(x, y, looks[name], color=color, label=name, markersize=5)
        for gx, top1, letter in points:
            above = name in ("ConvNeXt", "isotropic ConvNeXt")
            axis.annotate(letter, (gx, top1), (0, 6 if above else -12), ha="center",
                          textcoords="offset points", fontsize=8, color=color)
    axis.set(xlabel="GMACs at 224×224", ylabel="ImageNet top-1 in %", ylim=(79, 85),
             title="At equal cost, convolution and attention are close")
    axis.set_xticks((4, 8, 16, 32, 64), (4, 8, 16, 32, 64))
    axis.minorticks_off()
    axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.show()

# --- Part II --------------------------------------------------------------------------------------

def grn_maps(before: Tensor, after: Tensor, scale: float) -> None:
    """Channels of one image before and after GRN, (n, h, w) each, on one colour scale."""
    figure, axes = plt.subplots(2, len(before), figsize=(1.1 * len(before), 2.7))
    bare(*axes.flat)
    for line, maps, name in zip(axes, (before, after), ("before", f"after, s = {scale:g}")):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for axis, picture in zip(line, maps):
            axis.imshow(picture, cmap="Greens", norm=colors.PowerNorm(0.4, 0, after.max()))
            axis.set_xlabel(f"{picture.norm():.0f}", fontsize=8)
    figure.suptitle("GRN raises the strong channels most (numbers: norm over the image)",
                    fontsize=10)
    plt.show()

def times(time_of: dict[str, dict[str, float]]) -> plt.Figure:
    macs = {"depthwise 7×7": 49, "LayerNorm": 0, "GELU": 0, "linear": 8 * 96}
    bars = {"MACs": macs} | {f"time, {way}": values for way, values in time_of.items()}
    figure, axis = plt.subplots(figsize=(7.5, 2.2))
    for row, (label, values) in enumerate(bars.items()):
        left, whole = 0, sum(values.values())
        for name, color in zip(macs, (POSITIONS, NORM, OTHER, CHANNELS)):
            share = values[name] / whole
            axis.barh(label, share, left=left, color=color, label=name if row == 0 else None)
            left += share
        axis.text(1.01, row, f"{100 * values['depthwise 7×7'] / whole:.0f} %", color=POSITIONS,
                  va="center")
    slow = time_of["backward"]
    axis.set(xlabel="share of the block (the numbers are the depthwise convolution's)", xlim=(0, 1),
             title=f"The convolution: {4900 / sum(macs.values()):.0f} % of the MACs, "
             f"{100 * slow['depthwise 7×7'] / sum(slow.values()):.0f} % of the backward time")
    axis.invert_yaxis()
    axis.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    return figure

def image_grid(columns: dict[str, Tensor], names: list[str]) -> None:
    """A column for each entry: images (n, 3, h, w) from 0 to 1."""
    _figure, axes = plt.subplots(len(names), len(columns), squeeze=False,
                                figsize=(1.05 * len(columns), 1.08 * len(names) + 0.3))
    bare(*axes.flat)
    for column, (title, images) in zip(axes.T, columns.items()):
        column[0].set_title(title, fontsize=8)
        for axis, image in zip(column, images):
            axis.imshow(rearrange(image, "c h w -> h w c").clamp(0, 1))
    for axis, name in zip(axes[:, 0], names):
        axis.set_ylabel(name, fontsize=8)
    plt.show()

def training_curves() -> None:
    _figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.7))
    ends = []
    for label, name, color, line in (("--recipe fast", "fast-atto", "black", "-"),
                                     ("with --init fan-in", "fast-atto-fan-in", OTHER, "-"),
                                     ("the former recipe", "atto-patch2", OTHER, ":")):
        rows = read_csv(f"{name}.csv")
        epochs = [int(row["epoch"]) for row in rows]
        losses = [float(row["train_loss"]) for row in rows]
        left.plot(epochs, losses, color=color, linestyle=line)
        tested = [(e, float(row["test_top1"])) for e, row in zip(epochs, rows) if row["test_top1"]]
        ends.append(tested[-1][1])
        right.plot(*zip(*tested), color=color, linestyle=line, marker=".",
                   label=f"{label}: {tested[-1][1]:.1f} %")
    smoothed = np.array([0.91] + [0.01] * 9)
    lowest = -(smoothed * np.log(smoothed)).sum()
    left.axhline(lowest, color=OTHER, linestyle="--")
    left.text(40, lowest - 0.03, "lowest that label smoothing allows", va="top", ha="right",
              fontsize=8)
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0.3, 2.1),
             title="With smooth initial filters it learns faster")
    right.set(xlabel="epoch", ylabel="test accuracy in %",
              title=f"The fast recipe ends {ends[0] - ends[2]:.0f} points above the former")
    right.legend(loc="lower right", fontsize=8)
    plt.show()

def strongest_filters(networks: dict[str, nn.Module]) -> None:
    """The twelve strongest 7x7 filters of blocks."""
    figure, axes = plt.subplots(len(networks), 12, figsize=(7.2, 0.62 * len(networks) + 0.3))
    bare(*axes.flat)
    for row, (name, block) in zip(axes, networks.items()):
        kernels = block.dwconv.weight.detach()[:, 0]
        order = kernels.flatten(1).norm(dim=1).argsort(descending=True)
        for axis, kernel in zip(row, kernels[order]):
            limit = kernel.abs().max()
            axis.imshow(kernel, cmap="RdBu_r", vmin=-limit, vmax=limit)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle("Early filters stay small, later ones grow wide (red +, blue −; each has its "
                    "own scale)", fontsize=10)
    plt.show()

def learned_fields(networks: dict[str, list[tuple[Tensor, float]]]) -> plt.Figure:
    """For each network, |gradient| (32, 32) and mean distance of each stage."""
    stages = len(next(iter(networks.values())))
    figure, axes = plt.subplots(len(networks), stages, figsize=(1.8 * stages, 3.6))
    bare(*axes.flat)
    for row, (name, sizes) in zip(axes, networks.items()):
        row[0].set_ylabel(name)
        for number, (axis, (size, radius)) in enumerate(zip(row, sizes), 1):
            axis.imshow(size / size.max(), cmap="Oranges", norm=colors.PowerNorm(0.5, 0, 1))
            axis.set_title(f"stage {number}: {radius:.1f} px away", fontsize=9)
    figure.suptitle("|gradient| by pixel, relative to the panel's maximum, on a square-root scale, "
                    "and its mean distance", fontsize=10)
    return figure

def confidence(sure_by: Tensor, correct: Tensor) -> plt.Figure:
    """How often answers are right, by their stated probability; bars: two standard errors."""
    figure, axis = plt.subplots(figsize=(4.6, 3))
    for low in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        chosen = (sure_by >= low) & (sure_by < low + 0.1)
        n = chosen.sum().item()
        if n >= 10:
            x, y = sure_by[chosen].mean().item(), correct[chosen].float().mean().item()
            axis.errorbar(x, y, 2 * (y * (1 - y) / n) ** 0.5, fmt="o", color="black", markersize=4)
            below = (6, -10) if y < x + 0.05 else (6, -3)
            axis.annotate(n, (x, y), below, textcoords="offset points", fontsize=7)
    axis.plot((0.3, 1), (0.3, 1), color=OTHER, linestyle="--", zorder=0, label="stated = right")
    axis.axvline(0.91, color=OTHER, linestyle=":", label="label smoothing's target, 0.91")
    axis.legend(fontsize=8)
    axis.set(xlabel="stated probability (beside the dots: number of answers)",
             ylabel="share that is right", xlim=(0.28, 1.02), ylim=(0, 1.05),
             title=f"Where it states 90 % or more, "
             f"{100 * correct[sure_by >= 0.9].float().mean():.0f} % are right")
    return figure

def mistakes(images: Tensor, captions: list[str]) -> None:
    _, axes = plt.subplots(1, max(2, len(images)), figsize=(8, 1.5))
    bare(*axes)
    for axis, image, caption in zip(axes, images, captions):
        axis.imshow(rearrange(image, "c h w -> h w c"))
        axis.set_xlabel(caption, fontsize=7, labelpad=1)
    plt.show()

TUNING = {"finetune": ("fine-tuned", "o-", "black"), "probe": ("only the classifier", "s-", OTHER),
          "scratch": ("from scratch", "o:", "black")}

def fine_tuning() -> plt.Figure:
    runs: dict[tuple, dict[int, float]] = {}
    for row in read_csv("transfer.csv"):
        if row["measured_on"] == "test":
            key = row["start"], int(row["images_per_class"]), row["seed"]
            runs.setdefault(key, {})[int(row["epoch"])] = float(row["test_top1"])
    shots = sorted({key[1] for key in runs})
    figure, axis = plt.subplots(figsize=(4.8, 2.6))
    for start, (label, style, color) in TUNING.items():
        means = [np.mean([curve[max(curve)] for key, curve in runs.items()
                          if key[:2] == (start, n)]) for n in shots]
        axis.semilogx(shots, means, style, color=color, label=label, markersize=4)
        for n, mean in zip(shots, means):
            above = start == "finetune" or start == "probe" and n == shots[-1]
            axis.annotate(f"{mean:.0f}", (n, mean), (0, 5 if above else -11),
                          textcoords="offset points", ha="center", fontsize=7)
    axis.set(xlabel="images per class", ylabel="test accuracy in %", ylim=(45, 92),
             title="Fine-tuning is best at every size")
    axis.set_xticks(shots, shots)
    axis.minorticks_off()
    axis.legend(fontsize=8)
    return figure
