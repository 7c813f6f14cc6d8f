"""The door of the command `plainconv` (and of `python -m plainconv`).

Everything the command needs beyond torch comes with the extra "demo". This file imports none of it at the top, so that
without the extra a person reads one line that says what to install, and no traceback.
"""

import sys

INSTALL = 'pip install "plainconv[demo]"'
EXTRA = frozenset({"PIL", "jinja2", "matplotlib", "numpy", "rich", "sklearn", "typer"})


def main() -> None:
    """Run the command line; exit code 2 and one line on stderr where the demo extra is not installed."""
    try:
        from plainconv.cli import app
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        print(f"plainconv: the command needs {package}, which is not installed: {INSTALL}", file=sys.stderr)
        sys.exit(2)
    app()


if __name__ == "__main__":
    main()
