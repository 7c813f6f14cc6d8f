"""How fast the layers of real networks are, beside torch: suites, what the machine can do, timing, records."""

from plainconv.bench.against import others
from plainconv.bench.peaks import Peaks, measured
from plainconv.bench.records import Summary, as_json, as_records, drawn, heading, rows_of, summary, table
from plainconv.bench.run import Row, Setting, alone, measure, measure_all
from plainconv.bench.suites import Layer, load, named

__all__ = [
    "Layer",
    "Peaks",
    "Row",
    "Setting",
    "Summary",
    "alone",
    "as_json",
    "as_records",
    "drawn",
    "heading",
    "load",
    "measure",
    "measure_all",
    "measured",
    "named",
    "others",
    "rows_of",
    "summary",
    "table",
]
