"""Fill the measured parts of README.md from the records in results/.

    python benchmarks/readme.py            write README.md and the pictures it shows
    python benchmarks/readme.py --check    only say whether README.md is what the records give

The records come from
    plainconv compare --out out                                 -> results/compare.json (out/records.json)
    plainconv train --dataset mnist --seed S --out ...          -> results/mnist-seed-S.json
    python benchmarks/shift_against_seed.py --json ...          -> results/shift_against_seed.json
    python benchmarks/gaussians.py                              -> results/gaussians.json
    python benchmarks/tables.py                                 -> results/bench/DIRECTION-TYPE-SUITE.json
    python benchmarks/models.py                                 -> results/models.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gaussians_page
import models_page
from models_page import table
from PIL import Image

from plainconv import bench, picture, plots
from plainconv.picture.io import to_image
from plainconv.timing import duration

ROOT = Path(__file__).parent.parent
RESULTS, PICTURES = ROOT / "results", ROOT / "docs" / "pictures"
SHOWN = ("identity", "emboss", "sharpen", "edge", "sobel")


def filters(records: dict[str, Any]) -> str:
    """The picture filter: every algorithm beside torch."""
    rows = {row["name"]: row for row in records["filter"]["rows"] if row["timing"]}
    torch_s = rows["torch"]["timing"]["median_s"]

    def line(row: dict[str, Any]) -> list[str]:
        spent, scaled = row["timing"]["median_s"], row["scale"] != 1
        name = "torch" if row["name"] == "torch" else f"`{row['name']}`"
        return [
            name,
            duration(spent) + (" (scaled from a cut-out)" if scaled else ""),
            f"{torch_s / spent:.3g}x",
            f"{row['largest_error']:.1e}",
        ]

    told = records["filter"]
    head = [
        f"{told['channels']}x{told['height']}x{told['width']} picture, 3x3",
        "median",
        "torch's time over it",
        "error",
    ]
    return table(head, map(line, rows.values()))


def training(records: dict[str, Any], mnist: Sequence[dict[str, Any]]) -> str:
    """Accuracy and seconds of both layers."""
    digits = records["training"]
    runs = [("digits", digits["epochs"], digits["seed"], digits["runs"])]
    runs += [("MNIST", record["epochs"], record["seed"], record["runs"]) for record in mnist]
    rows = []
    for name, epochs, seed, both in runs:
        ours, theirs = both["plainconv"][-1], both["torch"][-1]
        rows.append(
            [
                f"{name}, {epochs} epochs, seed {seed}",
                *(f"{100 * end['accuracy']:.1f}%" for end in (ours, theirs)),
                *(f"{end['seconds']:.1f} s" for end in (ours, theirs)),
                f"{theirs['seconds'] / ours['seconds']:.2f}x",
            ]
        )
    return table(["training", "ours", "torch", "ours", "torch", "torch's time over ours"], rows)


def seed(record: dict[str, Any]) -> str:
    """`shift` beside the lines that the project grew from."""
    layers: dict[str, dict[str, float]] = {}
    for row in record["records"]:
        layers.setdefault(row["layer"], {})[row["direction"]] = row["ratio"]
    rows = [[layer, *(f"{ratio:.1f}x" for ratio in ratios.values())] for layer, ratios in layers.items()]
    return table(["layer", "forward", "gradient for the input", "gradient for the weight"], rows)


def suites() -> str:
    """Every suite that was measured: geometric mean of the layers' ratios, and the worst."""
    found: dict[str, dict[tuple[str, str], bench.Summary]] = {}
    for path in sorted((RESULTS / "bench").glob("*.json")):
        record = json.loads(path.read_text())
        for total in bench.summary(bench.rows_of(record)):
            found.setdefault(total.suite, {})[record["direction"], record["dtype"]] = total
    columns = {
        "forward, float32": ("forward", "float32"),
        "float64": ("forward", "float64"),
        "bfloat16": ("forward", "bfloat16"),
        "training, float32": ("train", "float32"),
    }

    def cell(total: bench.Summary | None) -> str:
        if total is None or total.geomean is None:
            return ""
        return f"{total.geomean:.2f}x ({total.worst:.2f}x)" + (", with wrong layers" if total.red else "")

    rows = [
        [suite, *(cell(found[suite].get(which)) for which in columns.values())]
        for suite in bench.load()
        if suite in found
    ]
    return table(["torch's time over ours: mean (worst layer)", *columns], rows)


def machine(record: dict[str, Any]) -> str:
    """The machine in a sentence."""
    told = record["machine"]
    return (
        f"Measured on: {told['processor']}, {told['cores']} cores, {told['threads']} threads, "
        f"torch {told['torch']}, Python {told['python']}, float32."
    )


def parts() -> dict[str, str]:
    """Name of a part of README.md -> its text."""
    compared = json.loads((RESULTS / "compare.json").read_text())
    mnist = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("mnist-seed-*.json"))]
    against_seed = json.loads((RESULTS / "shift_against_seed.json").read_text())
    gaussians = json.loads((RESULTS / "gaussians.json").read_text())
    return {
        "machine": machine(compared),
        "filters": filters(compared),
        "training": training(compared, mnist),
        "seed": seed(against_seed),
        "gaussians": gaussians_page.times(gaussians),
        "suites": suites(),
        "models": models_page.summary(json.loads((RESULTS / "models.json").read_text())),
    }


def filled(text: str) -> str:
    """The text with each `<!-- name -->` ... `<!-- end -->` filled anew."""
    for name, part in parts().items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        if not mark:
            raise SystemExit(f"README.md has no part '<!-- {name} -->'")
        text = before + mark + part + "\n" + rest[rest.index("<!-- end -->") :]
    return text


def draw() -> None:
    """The two pictures of README.md: the photograph under a few kernels, and the training curves."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    photograph = picture.read(plots.sample_photograph())
    strips = []
    for name in SHOWN:
        made = picture.apply(photograph.pixels, picture.named_or_typed(name))
        image = to_image(photograph.with_pixels(made))
        strips.append(image.resize((image.width * 240 // image.height, 240), Image.Resampling.LANCZOS))
    strip = Image.new("RGB", (sum(image.width + 8 for image in strips) - 8, 240), "white")
    left = 0
    for image in strips:
        strip.paste(image, (left, 0))
        left += image.width + 8
    strip.save(PICTURES / "filters.jpg", quality=88)
    mnist = json.loads(sorted(RESULTS.glob("mnist-seed-*.json"))[0].read_text())
    (PICTURES / "training.png").write_bytes(plots.training(mnist["runs"], "seconds"))


def main() -> int:
    """Parse; write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = filled(text)
    if arguments.check:
        return int(new != text)
    draw()
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
