"""Draw the pictures of README.md and results.md from the CSV files beside this one.

    python assets/pictures.py                # draws all of them anew
    python assets/pictures.py road ladder    # only these

Each function draws one picture and returns its figure, so a notebook can show it as well. Importing
this module sets matplotlib's style. The colours mean the same everywhere: orange is a change to the
mixing of positions, blue of channels, green of norms; black is what a picture is about, and grey
is what it is compared with.
"""

import csv
import io
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from PIL import Image

ASSETS = Path(__file__).resolve().parent
sys.path.append(str(ASSETS.parent))

import convnext  # from the folder above

POSITIONS, CHANNELS, NORM, OTHER = "#D55E00", "#0072B2", "#009E73", "#8C8C8C"
ATTENTION = "#AA3377"
plt.rcParams.update({
    "figure.constrained_layout.use": True, "font.size": 11, "axes.titlesize": 11,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False})
WIDTH = 8.5  # inches, which README.md shows as 850 pixels

# The kinds of a step of the road, by the field of convnext.Design that it changes.
KINDS = {
    "depthwise": POSITIONS, "depthwise_first": POSITIONS, "kernel_size": POSITIONS,
    "width": CHANNELS, "inverted": CHANNELS, "one_norm": NORM, "norm": NORM}
SWIN_T_TOP1 = 81.3  # ImageNet accuracy in %, table 1 of the paper


# --- Helpers ------------------------------------------------------------------------------------
def read(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file in this folder."""
    with open(ASSETS / f"{name}.csv") as file:
        return list(csv.DictReader(file))

def grouped(rows: list[dict], *columns: str) -> dict[tuple, list[dict]]:
    """The rows by their values in some columns, in the order in which they first appear."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple(row[column] for column in columns)
        groups.setdefault(key, []).append(row)
    return groups

def numbers(rows: list[dict], column: str) -> np.ndarray:
    return np.array([float(row[column]) for row in rows])

def count_road() -> dict[str, float]:
    """The cost of the network after each step, in GMACs at 224x224 pixels."""
    costs = {}
    for step in convnext.ROADMAP:
        with torch.device("meta"):
            network = convnext.roadmap_network(convnext.DESIGNS[step.name])
        costs[step.name] = convnext.count_macs(network, 224) / 1e9
    return costs

def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")

def colour_of(step: convnext.Step) -> str:
    changed = next(iter(step.change), "")
    return KINDS.get(changed, "black")

def note(axis: Axes, text: str, x: float, y: float, right: float = 8, up: float = 0,
         **style) -> None:
    """Write beside a point of the data; `right` and `up` are distances in points."""
    style = {"va": "center", "fontsize": 9.5} | style
    axis.annotate(text, (x, y), (right, up), textcoords="offset points", **style)


# --- The pictures -------------------------------------------------------------------------------
def roadmap() -> Figure:
    """The paper's road alone: accuracy on ImageNet after each of its steps."""
    steps = [step for step in convnext.ROADMAP if step.kept and step.name != "kernel 5x5"]
    names = ["ResNet-50, old recipe", "new training recipe", *(step.name for step in steps[1:])]
    names = [name.replace("kernel 7x7", "kernel 3x3 to 7x7") for name in names]
    top1 = [convnext.OLD_RECIPE_TOP1, *(step.top1 for step in steps)]
    counted = count_road()
    costs = [counted["ResNet-50"], *(counted[step.name] for step in steps)]
    colours = ["black", *map(colour_of, steps)]
    figure, axis = plt.subplots(figsize=(WIDTH, 5.2))
    axis.plot(top1, range(len(top1)), color="#CCCCCC", zorder=1)
    axis.scatter(top1, range(len(top1)), s=60, color=colours, zorder=2)
    for row in range(1, len(top1)):
        note(axis, signed(top1[row] - top1[row - 1], 2), top1[row], row, right=10,
             bbox={"fc": "white", "ec": "none", "pad": 1})
    axis.axvline(SWIN_T_TOP1, color=OTHER, linestyle=":", zorder=0)
    axis.text(SWIN_T_TOP1 - 0.08, 0, "Swin-T, a transformer\nof the same cost", ha="right",
              va="center", color="#666666", fontsize=9.5)
    for row, cost in enumerate(costs):
        axis.text(83.35, row, f"{cost:.1f}", ha="right", va="center", fontsize=9.5, color="#666666")
    axis.text(83.35, -0.95, "GMACs", ha="right", fontsize=9.5, color="#666666")
    for row, (text, colour) in enumerate({"the mixing of positions": POSITIONS,
                                          "the mixing of channels": CHANNELS,
                                          "the norms": NORM, "anything else": "black"}.items()):
        axis.text(76.1, len(top1) - 4.2 + 0.7 * row, text, color=colour, va="center",
                  bbox={"fc": "white", "ec": "none", "pad": 1})
    axis.text(76.1, len(top1) - 4.9, "A step changes", va="center",
              bbox={"fc": "white", "ec": "none", "pad": 1})
    axis.set(yticks=range(len(names)), ylim=(len(names) - 0.4, -1.1), xlim=(75.8, 83.4),
             xlabel="accuracy on ImageNet in % (paper, table 10)")
    axis.set_yticklabels(names)
    axis.grid(axis="y", color="#EEEEEE")
    axis.set_axisbelow(True)
    recipe, whole = top1[1] - top1[0], top1[-1] - top1[0]
    figure.suptitle(f"From ResNet-50 to ConvNeXt: the training recipe brings {recipe:.1f} of the "
                    f"{whole:.1f} points, twelve\nchanges of the network the rest, most of them "
                    "little", x=0.01, ha="left", fontsize=11)
    return figure

def road() -> Figure:
    """The same road in small, on CIFAR-10. What was not measured stays empty."""
    runs = grouped(read("road"), "step", "recipe")
    steps = {step.name: step for step in convnext.ROADMAP if step.kept}
    rows = [("ResNet-50, old recipe", ("ResNet-50", "old"), "black"),
            ("new training recipe", ("ResNet-50", "new"), "black")]
    rows += [(name, (name, "new"), colour_of(step)) for name, step in [*steps.items()][1:]]
    instead = ("window attention", "Swin block")  # of the last network's convolution or block
    rows += [(f"{name} instead", (name, "new"), ATTENTION) for name in instead]
    figure, axis = plt.subplots(figsize=(WIDTH, 5.6))
    before, means = None, {}
    for place, (_, key, colour) in enumerate(rows):
        if key not in runs:
            axis.text(0.99, place, "not measured", transform=axis.get_yaxis_transform(), ha="right",
                      va="center", fontsize=9.5, color="#999999")
            before = None
            continue
        top1 = numbers(runs[key], "held_out_top1")
        means[key] = top1.mean()
        axis.scatter(top1, [place] * len(top1), s=50, color=colour, zorder=2,
                     marker="D" if key[0] in instead else "o")
        axis.plot(top1.mean(), place, "|", color="#999999", markersize=14, zorder=1)
        if before is not None:
            end = ""
            if key[0] in instead:
                before = means["separate downsampling", "new"]
                end = " against the road's end"
            note(axis, signed(top1.mean() - before, 1) + end, top1.max(), place, right=9,
                 bbox={"fc": "white", "ec": "none", "pad": 1})
            if key[0] not in instead:
                axis.plot([before, top1.mean()], [place - 1, place], color="#CCCCCC", zorder=1)
        before = top1.mean()
    axis.set(yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6),
             xlabel="accuracy on 30,000 held-out images of CIFAR-10 in %; a point is a seed")
    axis.margins(x=0.12)
    axis.set_yticklabels([name for name, _, _ in rows])
    axis.grid(axis="y", color="#EEEEEE")
    axis.set_axisbelow(True)
    last, first = means["separate downsampling", "new"], means["ResNet-50", "new"]
    figure.suptitle(f"On a small scale ConvNeXt ends {last - first:.0f} points above ResNet-50 "
                    "with the same recipe.\nThe steps between them gain and lose other amounts "
                    "than in the paper", x=0.01, ha="left", fontsize=11)
    return figure

def training() -> Figure:
    """Accuracy over equal minutes, and over the epochs of the whole run of --recipe fast."""
    curves = grouped(read("time-to-accuracy"), "network")
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.6), width_ratios=(1.25, 1))
    styles = {  # colour, line, label and its height
        "atto, fast recipe": ("black", "-", "atto, fast recipe", 77.5),
        "ResNet, fast recipe with AdamW": (OTHER, "-", "ResNet, fast recipe\nwith AdamW", 72.5),
        "atto, fast recipe with AdamW": ("black", "--", "atto, fast recipe\nwith AdamW", 66),
        "atto, former recipe": (OTHER, ":", "atto, former recipe", 60.5)}
    for name, (colour, line, label, height) in styles.items():
        minutes = numbers(curves[name,], "minutes")
        top1 = numbers(curves[name,], "held_out_top1")
        left.plot(minutes, top1, color=colour, linestyle=line, marker=".")
        left.annotate(label, (minutes[-1], top1[-1]), (20, height), va="center", fontsize=9,
                      color="black" if colour == "black" else "#666666",
                      arrowprops={"arrowstyle": "-", "color": "#CCCCCC", "shrinkB": 3})
    by_resnet = numbers(curves["ResNet, fast recipe, on Zen 3",], "held_out_top1")[-1]
    left.axhline(by_resnet, color=OTHER, linewidth=1)
    left.text(0.5, by_resnet + 0.8, "ResNet, fast recipe: eight epochs on another machine",
              fontsize=9, color="#666666")
    fast, former = (numbers(curves[name,], "held_out_top1")[-1]
                    for name in ("atto, fast recipe", "atto, former recipe"))
    left.set(xlabel="minutes on one CPU core", ylabel="held-out accuracy in %", xlim=(0, 30),
             xticks=(0, 5, 10, 15, 20), ylim=(30, 86),
             title=f"After 14 minutes: {fast:.0f} % with the fast\nrecipe, {former:.0f} % with the "
             "former")
    ends = {}
    whole_runs = {"fast-atto-fan-in": (OTHER, "-"), "fast-atto": ("black", "-"),
                  "fast-atto-seed1": ("black", "--")}
    for name, (colour, line) in whole_runs.items():
        rows = [row for row in read(name) if row["test_top1"]]
        epochs, top1 = numbers(rows, "epoch"), numbers(rows, "test_top1")
        right.plot(epochs, top1, color=colour, linestyle=line, marker=".")
        ends[name] = top1[-1]
    right.text(0.5, 81, "seeds 0 and\n1 (dashed)", fontsize=9)
    right.text(9, 67, f"--init fan-in:\n{ends['fast-atto-fan-in']:.1f} %", fontsize=9,
               color="#666666")
    grown = epochs[-1] / 2
    right.axvline(grown, color=OTHER, linestyle=":")
    right.text(grown + 1, 66, "images grow from\n24 to 32 pixels", color="#666666", fontsize=9,
               va="center")
    right.set(xlabel="epoch", ylabel="test accuracy in %", xlim=(0, None),
              title=f"The whole run of --recipe fast: {ends['fast-atto']:.1f} and\n"
              f"{ends['fast-atto-seed1']:.1f} % with two seeds")
    return figure

def transfer() -> Figure:
    """Five new classes: fine-tuned, only a new classifier, from scratch."""
    rows = [row for row in read("transfer") if row["measured_on"] == "test"]
    runs = grouped(rows, "start", "images_per_class", "seed")
    shots = sorted({int(key[1]) for key in runs})
    styles = {"finetune": ("black", "-", "fine-tuned"),
              "probe": (OTHER, "-", "only the classifier"),
              "scratch": (OTHER, ":", "from scratch")}
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4), sharey=True)
    means = {}
    for start, (colour, line, label) in styles.items():
        run = runs[start, "100", "0"]
        left.plot(numbers(run, "epoch"), numbers(run, "test_top1"), color=colour, linestyle=line)
        ends = [[float(runs[start, str(shot), seed][-1]["test_top1"]) for seed in "01"]
                for shot in shots]
        means[start] = np.mean(ends, 1)
        right.plot(shots, means[start], color=colour, linestyle=line)
        for seed in range(2):
            right.plot(shots, np.array(ends)[:, seed], ".", color=colour)
        note(right, label, shots[-1], means[start][-1], fontsize=9.5,
             up=5 if start == "probe" else -4 if start == "scratch" else 0,
             color="black" if colour == "black" else "#666666")
    gains = means["finetune"] - means["scratch"]
    left.set(xlabel="epoch", ylabel="test accuracy on\nfive new classes in %",
             title="With 100 images a class, fine-tuning\nis ahead from the first epochs on")
    right.set(xscale="log", xlabel="training images a class (log); points are seeds",
              xlim=(17, 2600),
              title=f"Pretrained weights gain {min(gains):.0f} to {max(gains):.0f} points,\nmost "
              "with few images")
    right.xaxis.set_major_locator(FixedLocator(shots))
    right.xaxis.set_minor_locator(NullLocator())
    right.set_xticklabels(shots)
    return figure

def scaling() -> Figure:
    """How many times as fast as timm, over batch, image size and variant."""
    groups = grouped(read("scaling"), "axis", "work")
    panels = {"batch": ("batch", "images in a batch (log)\natto, 64 px"),
              "size": ("size", "image size in pixels\nTiny, batch 8"),
              "variant": ("variant", "variant\n64 px, batch 16")}
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.3), sharey=True)
    ratios = {work: numbers([row for row in read("scaling") if row["work"] == work], "ratio")
              for work in ("training", "inference")}
    for axis, (panel, (column, label)) in zip(axes, panels.items()):
        for work, colour in (("training", "black"), ("inference", OTHER)):
            rows = groups[panel, work]
            places = range(len(rows)) if panel == "variant" else numbers(rows, column)
            axis.plot(places, numbers(rows, "ratio"), color=colour, marker=".")
        axis.axhline(1, color=OTHER, linestyle=":", zorder=0)
        axis.set(xlabel=label, ylim=(0.8, 1.5))
    rows = groups["variant", "training"]
    axes[2].set_xticks(range(len(rows)), [row["variant"] for row in rows], rotation=45,
                       ha="right", rotation_mode="anchor")
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks([1, 8, 64, 512], [1, 8, 64, 512])
    axes[1].set_xticks([32, 96, 160, 224])
    axes[0].set_ylabel("times as fast as timm")
    axes[0].text(1, 1.42, "training", fontsize=9.5)
    axes[0].text(1, 0.92, "inference", color="#666666", fontsize=9.5)
    low, high = np.quantile(ratios["training"], (0.1, 0.9))
    figure.suptitle(f"On two CPU cores, training is {low:.1f} to {high:.1f} times as fast as "
                    "timm's, and inference is as fast", x=0.01, ha="left", fontsize=11)
    return figure

def ladder() -> Figure:
    """What each change from the former recipe to the fast one gains, and its time."""
    runs = grouped(read("ladder"), "rung", "change")
    rungs = sorted(runs, key=lambda key: (not key[0].isdecimal(), key[0]))  # side trials come last
    top1 = {rung: numbers(runs[rung, change], "held_out_top1") for rung, change in rungs}
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 4.2), sharey=True,
                                         width_ratios=(3, 1))
    labels, gains = [], {}
    for place, (rung, change) in enumerate(rungs):
        side = not rung.isdecimal()
        change = change.replace("beta2", "β₂").replace("V2 (v2_atto)", "rung 4 with ConvNeXt V2")
        labels.append(textwrap.fill(change if side else f"{rung}: {change}", 34))
        before = rung.rstrip("abc") if side else str(int(rung) - 1)
        left.plot(top1[rung], [place] * len(top1[rung]), "o", color="black",
                  markerfacecolor="white" if side else "black")
        if before in top1:
            gain = top1[rung].mean() - top1[before].mean()
            gains[change] = gain
            text = signed(gain, 1) + (" over\nrung 4" if side else "")
            note(left, text, top1[rung].max(), place, right=9)
        minutes = numbers(runs[rungs[place]], "train_seconds").mean() / 60
        right.barh(place, minutes, 0.5, color="white" if side else OTHER, edgecolor=OTHER)
        note(right, f"{minutes:.0f}", minutes, place, right=4)
    means = [top1[rung].mean() for rung, _ in rungs if rung.isdecimal()]
    left.plot(means, range(len(means)), color="#CCCCCC", zorder=0)
    left.set(xlim=(52.5, 73.5), xticks=(55, 60, 65, 70),
             xlabel="held-out accuracy in %; a point is a seed")
    left.set_yticks(range(len(rungs)), labels)
    left.invert_yaxis()
    right.set(xlabel="minutes, one core", xlim=(0, 17))
    best = max(gains, key=gains.get).partition(" for ")[0]
    figure.suptitle(f"From {means[0]:.1f} to {means[-1]:.1f} % in six passes over 20,000 images: "
                    f"the step to {best} gains most, {max(gains.values()):.1f} points", x=0.01,
                    ha="left", fontsize=11)
    return figure

PICTURES = {"roadmap": roadmap, "road": road, "training": training, "transfer": transfer,
            "scaling": scaling, "ladder": ladder}

def save(figure: Figure, path: Path) -> None:
    """Write a PNG of two pixels for each one shown, in 64 colours: more would only be larger."""
    full = io.BytesIO()
    figure.savefig(full, format="png", dpi=200)
    image = Image.open(full).convert("RGB")
    image.quantize(64, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    plt.close(figure)

if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        save(PICTURES[name](), ASSETS / f"{name}.png")
        print(f"assets/{name}.png")
