"""The report: one HTML page that stands alone, and the records it was made from beside it, as JSON."""

import json
from base64 import b64encode
from collections.abc import Mapping
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from plainconv import plots
from plainconv.files import write_whole
from plainconv.picture import Picture
from plainconv.picture.io import to_image
from plainconv.timing import duration

TEMPLATE = "report.html.j2"
PAGE, RECORDS = "report.html", "records.json"
QUALITY = 88  # of the pictures on the page, as JPEG


def write_report(
    folder: str | Path, records: Mapping[str, Any], gallery: Mapping[str, Picture], made: Mapping[str, Picture]
) -> Path:
    """Write report.html and records.json.

    Args:
        folder: where to; it must exist.
        records, gallery, made: see plainconv.compare.Comparison. records["filter"] also has "picture" and
            "kernel_name", records["training"] also has "dataset": the names a person gave.

    Returns:
        the page's path.

    Raises:
        OSError: the disk is full and so on; then an older report is still whole.
    """
    page = Path(folder) / PAGE
    html = render(records, gallery, made)  # before a file is touched
    with write_whole(page) as file, write_whole(page.with_name(RECORDS)) as beside:
        file.write(html.encode())
        beside.write((json.dumps(records, indent=1) + "\n").encode())
    return page


def render(records: Mapping[str, Any], gallery: Mapping[str, Picture], made: Mapping[str, Picture]) -> str:
    """The page as text; pictures and figures are inside it as data URIs."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["duration"] = duration
    template = environment.from_string(files("plainconv").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in records["filter"]["rows"]}
    runs = records["training"]["runs"]
    return template.render(
        records=records,
        rows=rows,
        ends={name: points[-1] for name, points in runs.items()},
        gallery={name: picture_uri(picture) for name, picture in gallery.items()},
        made={name: picture_uri(picture) for name, picture in made.items() if name != "auto"},
        figures={
            "times": png_uri(plots.times(records["filter"]["rows"])),
            "seconds": png_uri(plots.training(runs, "seconds")),
            "steps": png_uri(plots.training(runs, "step")),
        },
    )


def picture_uri(picture: Picture) -> str:
    """A picture as the address of itself: 8-bit JPEG, without its alpha."""
    shown = Picture(picture.pixels * (255 / picture.peak), profile=picture.profile)
    buffer = BytesIO()
    to_image(shown).save(buffer, format="JPEG", quality=QUALITY, icc_profile=picture.profile)
    return _uri(buffer.getvalue(), "image/jpeg")


def png_uri(png: bytes) -> str:
    """A figure as the address of itself."""
    return _uri(png, "image/png")


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"
