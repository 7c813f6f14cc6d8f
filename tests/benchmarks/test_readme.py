"""The numbers in README.md are those of the records in results/, not typed in."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_readme_shows_what_the_records_say():
    checked = subprocess.run([sys.executable, ROOT / "benchmarks" / "readme.py", "--check"], check=False)
    assert checked.returncode == 0, "run benchmarks/readme.py"
