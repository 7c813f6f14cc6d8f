"""The door of the command `plainconv` (and of `python -m plainconv`).

Everything the command needs beyond torch comes with the extra "demo". This file imports none of it at the top, so that
without the extra a person reads one line that says what to install, and no traceback.
"""

import sys

EXTRA = frozenset({"PIL", "jinja2", "matplotlib", "numpy", "rich", "sklearn", "typer"})


def main() -> None:
    """Run the command line; exit code 2 and one line on stderr where the demo extra is not installed."""
    try:
        from plainconv.cli import app
    except ModuleNotFoundError as error:
        print(f"plainconv: {missing(error)}", file=sys.stderr)
        sys.exit(2)
    app()


def missing(error: ModuleNotFoundError) -> str:
    """The sentence about a package of the demo extra that is not installed; any other absence is raised again."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRA:
        raise error
    return f'the command needs {package}, which is not installed: pip install "plainconv[demo]"'


if __name__ == "__main__":
    main()
