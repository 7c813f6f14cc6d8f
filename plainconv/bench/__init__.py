"""How fast the layers of real networks are, beside torch: suites, what the machine can do, timing, records."""

from plainconv.bench.against import others
from plainconv.bench.cuda import device_of
from plainconv.bench.peaks import Peaks
from plainconv.bench.records import SLOWED, Summary, as_json, as_records, drawn, heading, rows_of, summary, table
from plainconv.bench.run import Row, Setting, alone, measure, measure_all
from plainconv.bench.suites import Layer, load, named
from plainconv.bench.thresholds import LIMIT_SHARE, REGRET, Held, Threshold, held, picked

__all__ = [
    "LIMIT_SHARE",
    "REGRET",
    "SLOWED",
    "Held",
    "Layer",
    "Peaks",
    "Row",
    "Setting",
    "Summary",
    "Threshold",
    "alone",
    "as_json",
    "as_records",
    "device_of",
    "drawn",
    "heading",
    "held",
    "load",
    "measure",
    "measure_all",
    "named",
    "others",
    "picked",
    "rows_of",
    "summary",
    "table",
]
