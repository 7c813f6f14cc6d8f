"""The command `plainconv`: parse, call one function, print.

What a person can mend (a file that is missing, a name that does not exist, a full disk) is one line on stderr and exit
code 2; so is a command line that does not parse. Anything else is a bug and keeps its traceback.
"""

import json
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from plainconv import measure, picture, train
from plainconv.files import InputError, write_whole
from plainconv.menu.base import AlgorithmRefused
from plainconv.plan import algorithms, check_algorithm, explain_request, plan, tuning
from plainconv.problem import ConvProblem, Direction, Request
from plainconv.version import __version__

# click's ClickException, the base of what the parser raises. Newer typers have a click of their own inside, older ones
# need the package click; so the class is found from a name that all of them have.
PARSER_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


class OneLineGroup(TyperGroup):
    """The command, with an error of the parser as one line too instead of a box of several."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Parse and run as typer does, to sys.exit with the code; without any word, typer shows the help."""
        words = args[0] if args else kwargs.get("args")
        if not (sys.argv[1:] if words is None else words) or not kwargs.get("standalone_mode", True):
            return super().main(*args, **kwargs)
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})  # the code of a typer.Exit, or None
        except PARSER_ERROR as error:
            _say(getattr(error, "format_message", error.__str__)())
            sys.exit(2)
        except typer.Abort:
            _say("stopped")
            sys.exit(1)
        sys.exit(code)


app = typer.Typer(
    name="plainconv",
    cls=OneLineGroup,
    help="Convolution in plain Python: filter pictures, train a small network, and compare both with torch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PictureArgument = Annotated[
    Path | None, typer.Argument(metavar="[PICTURE]", help="A picture; default: the photograph that matplotlib ships.")
]
KernelOption = Annotated[
    str,
    typer.Option(help=f'{", ".join(picture.KERNELS)}; a JSON file of rows; or rows as "0 -1 0; -1 5 -1; 0 -1 0".'),
]
AlgorithmOption = Annotated[str, typer.Option(help=f"auto, {', '.join(algorithms())}.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
DatasetOption = Annotated[str, typer.Option(help=f"{', '.join(train.DATASETS)}.")]
DataDirOption = Annotated[
    Path | None, typer.Option(help="Where the idx files are, or go; default: a folder in the user's cache.")
]
EpochsOption = Annotated[int | None, typer.Option(min=1, help="Default: 40 for digits, 5 for the others.")]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Default: 100 for digits, 1000 for the others.")]
BENCH_DIRECTIONS = ("forward", "grad_input", "grad_weight", "train")
BENCH_DTYPES = ("float32", "float64", "bfloat16", "float16")
SeedOption = Annotated[int, typer.Option(min=0, help="Of the weights, the batches and dropout.")]

_COUNTED = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


@contextmanager
def one_line() -> Iterator[None]:
    """Turn an error that a person can mend into its sentence on stderr and exit code 2."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        _stop(f"{place}{error.strerror}")
    except (InputError, AlgorithmRefused) as error:
        _stop(str(error))
    except ModuleNotFoundError as error:
        from plainconv.__main__ import missing

        _stop(missing(error))


def _say(sentence: str) -> None:
    print("plainconv: " + " ".join(sentence.split()), file=sys.stderr)


def _stop(sentence: str) -> NoReturn:
    _say(sentence)
    raise typer.Exit(2)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"plainconv {__version__} (torch {torch.__version__}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Convolution in plain Python: filter pictures, train a small network, and compare both with torch."""


@app.command("filter")
def filter_picture(
    path: PictureArgument = None,
    kernel: KernelOption = "emboss",
    out: Annotated[
        Path | None, typer.Option(help="Where to; its ending names the format. Default: PICTURE-KERNEL in this folder.")
    ] = None,
    algorithm: AlgorithmOption = "auto",
    border: Annotated[str, typer.Option(help=f"{', '.join(picture.BORDERS)}: what is outside.")] = "replicate",
    device: DeviceOption = "cpu",
) -> None:
    """Filter a picture with a kernel; the result has the same size, mode and depth."""
    with one_line():
        algorithm, where = _algorithm(algorithm), _device(device)
        matrix = picture.named_or_typed(kernel)
        path = path or _sample()
        before = picture.read(path)
        target = out or Path(f"{path.stem}-{_label(kernel)}{path.suffix}")
        start = perf_counter()
        after = picture.apply(before.pixels.to(where), matrix, border=border, algorithm=algorithm).cpu()
        spent = perf_counter() - start
        picture.write(before.with_pixels(after), target)
    channels, height, width = after.shape
    print(f"{target}: {width}x{height}, {channels} channel{'s' * (channels > 1)}, filtered in {spent:.3g} s")


@app.command("train")
def train_layers(
    dataset: DatasetOption = "digits",
    data_dir: DataDirOption = None,
    epochs: EpochsOption = None,
    batch: BatchOption = None,
    layer: Annotated[str, typer.Option(help=f"{', '.join(train.LAYERS)}.")] = "both",
    algorithm: AlgorithmOption = "auto",
    dropout: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the numbers that a dropout leaves out.")
    ] = train.DROPOUT,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    out: Annotated[Path | None, typer.Option(help="A JSON file for the records.")] = None,
) -> None:
    """Train the small CNN with plainconv's layer, with torch's, or with both in turn.

    In several processes, which share each batch: torchrun --nproc-per-node 2 -m plainconv.train, with the same options.
    """
    with one_line():
        layers = train.layers(layer, _algorithm(algorithm))
        recipe, where = _recipe(dataset, epochs, batch), _device(train.local_device(device))
        if out is not None:
            _check_file(out)  # a mistake in the name is not worth a training
        with train.joined(where) as team:
            with team.lead_first():
                data = train.load(dataset, data_dir).to(where)
            how: dict[str, Any] = {"epochs": recipe.epochs, "batch": recipe.batch, "seed": seed, "dropout": dropout}
            with _bars(list(layers), train.steps(data, recipe.epochs, recipe.batch), team.leads) as watch:
                runs = train.race(layers, data, **how, team=team, watch=watch)
    if not team.leads:
        return
    table = Table("layer", "test accuracy", "last loss", "training", "each step")
    for name, run in runs.items():
        end = run[-1]
        each = f"{1e3 * end.seconds / end.step:.2f} ms"
        table.add_row(name, f"{100 * end.accuracy:.1f}%", f"{end.loss:.3f}", f"{end.seconds:.1f} s", each)
    Console().print(table)
    if out is not None:
        points = {name: [asdict(point) for point in run] for name, run in runs.items()}
        record = {"dataset": dataset, "algorithm": algorithm, "device": device, "processes": team.size, **how}
        with one_line(), write_whole(out) as file:
            file.write((json.dumps({**record, "runs": points}, indent=1) + "\n").encode())


@app.command("compare")
def compare_all(
    path: PictureArgument = None,
    kernel: KernelOption = "emboss",
    dataset: DatasetOption = "digits",
    data_dir: DataDirOption = None,
    epochs: EpochsOption = None,
    batch: BatchOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    seconds: Annotated[float, typer.Option(min=0, help="How long to time the algorithms, about.")] = 8.0,
    out: Annotated[Path, typer.Option(help="The folder for report.html and records.json.")] = Path("out"),
) -> None:
    """Compare with torch, pictures and training, and write a report."""
    with one_line():
        from plainconv.compare import check_fits, compare
        from plainconv.report import write_report

        where, matrix, recipe = _device(device), picture.named_or_typed(kernel), _recipe(dataset, epochs, batch)
        path = path or _sample()
        before = picture.read(path)
        check_fits(before, matrix)
        _check_folder(out)
        before = before.with_pixels(before.pixels.to(where))
        data = train.load(dataset, data_dir).to(where)
        with _bars(["plainconv", "torch"], train.steps(data, recipe.epochs, recipe.batch)) as watch:
            found = compare(before, matrix, data, **asdict(recipe), seed=seed, seconds=seconds, watch=watch)
        found.records["filter"] |= {"picture": path.name, "kernel_name": kernel}
        found.records["training"] |= {"dataset": dataset}
        out.mkdir(parents=True, exist_ok=True)
        page = write_report(out, found.records, found.gallery, found.made)
    print(page)


@app.command("bench")
def bench_suites(
    suite: Annotated[list[str] | None, typer.Option(metavar="NAME...", help="A suite, or several: see --list.")] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="", hidden=True)] = None,
    direction: Annotated[str, typer.Option(help=f"{', '.join(BENCH_DIRECTIONS)}.")] = "forward",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(BENCH_DTYPES)}.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as many as torch would take.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="How long to time each layer, about.")] = 1.0,
    regret: Annotated[bool, typer.Option("--regret", help="Time every able algorithm beside auto.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Do not cut layers of more than 4 GFLOP.")] = False,
    against: Annotated[
        list[str] | None, typer.Option(metavar="LIBRARY", help="onnxruntime, openvino, jax, scipy or opencv.")
    ] = None,
    device: DeviceOption = "cpu",
    tf32: Annotated[
        bool | None, typer.Option("--tf32/--exact", help="On a GPU, of float32; default: torch's own switch.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for the records and the picture.")] = Path("results"),
    drawn: Annotated[bool, typer.Option("--picture/--no-picture", help="Draw a bar for every layer.")] = True,
    listed: Annotated[bool, typer.Option("--list", help="Name the suites.")] = False,
) -> None:
    """Time the layers of real networks beside torch, and check every one against float64."""
    from plainconv import bench

    if listed:
        for name, known in bench.load().items():
            print(f"{name:<28} {len(known):>3} layers, {sum(layer.flop for layer in known) / 1e9:.3g} GFLOP")
        return
    with one_line():
        names = [*(suite or []), *(more or [])]
        layers = bench.named(names)
        if not layers:
            raise InputError("--suite says which suites to measure; `plainconv bench --list` names them")
        for option, value, choices in (("direction", direction, BENCH_DIRECTIONS), ("dtype", dtype, BENCH_DTYPES)):
            if value not in choices:
                raise InputError(f"unknown {option} {value!r}; {option}s are {', '.join(choices)}")
        if regret and direction == "train":
            raise InputError("--regret is of one choice, and --direction train makes three: ask for each direction")
        place, kind = _device(device), getattr(torch, dtype)
        if place.type == "cpu" and tf32 is not None:
            raise InputError("--tf32 and --exact say how a GPU multiplies: they need --device cuda")
        if place.type != "cpu" and against:
            raise InputError("--against compares on the CPU alone")
        where = bench.device_of(place, tf32)
        _check_folder(out)
        others = bench.others(against or [])
        with bench.alone(threads or torch.get_num_threads(), where) as used:
            peaks = where.peaks(kind, used, direction)
            setting = bench.Setting(direction, kind, used, peaks, seconds, regret, full, others, where)
            with Progress(TextColumn("{task.description:>30}"), *_COUNTED, console=Console(stderr=True)) as progress:
                task = progress.add_task("", total=len(layers))

                def watch(done: int, name: str) -> None:
                    progress.update(task, completed=done, description=name[:60])

                def lose(layer: bench.Layer, error: RuntimeError) -> None:
                    lost.append(f"{layer.suite} {layer.name} could not be measured: {error}")

                lost: list[str] = []
                rows, setting = bench.measure_all(layers, setting, watch, lose)
            if not rows:
                raise InputError(lost[0])
            records = bench.as_records(rows, setting)
        print(bench.heading(records))
        print(bench.table(rows))
        out.mkdir(parents=True, exist_ok=True)
        shown = dtype + "-tf32" * records["tf32"]
        first = [] if place.type == "cpu" else [place.type]
        stem = "-".join((*first, direction, shown, "+".join(dict.fromkeys(names))[:100]))
        with write_whole(out / f"{stem}.json") as file:
            file.write(bench.as_json(records).encode())
        print(out / f"{stem}.json")
        if drawn:
            from plainconv.plots import bars

            with write_whole(out / f"{stem}.png") as file:
                file.write(bars(bench.drawn(records), bench.heading(records).partition("\n")[0]))
            print(out / f"{stem}.png")
        if lost:
            raise InputError("; ".join(lost))


@app.command("algorithms")
def list_algorithms() -> None:
    """List the algorithms."""
    print("\n".join(algorithms()))


@app.command("explain")
def explain_problem(
    problem: Annotated[str, typer.Argument(help='A convolution in short: "n1 c3 o8 x600x512 k3x3 s1 p1 d1 g1".')],
    direction: Annotated[str, typer.Option(help=f"{', '.join(d.value for d in Direction)}.")] = "forward",
    algorithm: AlgorithmOption = "auto",
) -> None:
    """Show what every algorithm says of a convolution, and which is chosen."""
    with one_line():
        way, parsed = _direction(direction), _problem(problem)
        request = Request(parsed, way, torch.float32, threads=torch.get_num_threads())
        print(explain_request(request, _algorithm(algorithm)))


@app.command("tune")
def tune_problems(
    problem: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help='A convolution in short: "n1 c3 o8 x600x512 k3x3 s1 p1".')
    ] = None,
    suite: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A suite: see `plainconv bench`.")] = None,
    direction: Annotated[str, typer.Option(help=f"{', '.join(d.value for d in Direction)}.")] = "forward",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(BENCH_DTYPES)}.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as many as torch would take.")] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Tensors with channels innermost.")] = False,
    bias: Annotated[bool, typer.Option("--bias", help="With a bias; grad_weight: its gradient.")] = False,
    allow_builtin: Annotated[bool, typer.Option("--allow-builtin", help="Let torch's own compete.")] = False,
) -> None:
    """Measure which algorithm is the quickest for a convolution on this machine, and remember it for all calls."""
    with one_line():
        way = _direction(direction)
        if dtype not in BENCH_DTYPES:
            raise InputError(f"unknown dtype {dtype!r}; dtypes are {', '.join(BENCH_DTYPES)}")
        asked = [(way, _problem(text)) for text in problem or []]
        if suite:
            from plainconv import bench

            asked += [(layer.direction(way), layer.problem) for layer in bench.named(suite)]
        if not asked:
            raise InputError("--problem TEXT or --suite NAME says what to tune")
        if threads:
            torch.set_num_threads(threads)
        with tuning() as report:
            for one, parsed in asked:
                plan(
                    Request(
                        parsed,
                        one,
                        getattr(torch, dtype),
                        channels_last=channels_last,
                        has_bias=bias,
                        threads=torch.get_num_threads(),
                        allow_builtin=allow_builtin,
                    )
                )
                while report.tuned:
                    print(report.tuned.pop())
        for note in measure.notes():
            print(f"note: {note}")


def _direction(name: str) -> Direction:
    if name not in (known := [d.value for d in Direction]):
        raise InputError(f"unknown direction {name!r}; directions are {', '.join(known)}")
    return Direction(name)


def _problem(text: str) -> ConvProblem:
    try:
        return ConvProblem.parse(text)
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from error


@contextmanager
def _bars(names: list[str], total: int, shown: bool = True) -> Iterator[Callable[[str, train.Point], None]]:
    """A progress bar for each training, on stderr; yields what to call with a name and its newest point."""
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.1%}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        tasks = {name: progress.add_task(name, total=total, loss=float("nan"), accuracy=0.0) for name in names}

        def watch(name: str, point: train.Point) -> None:
            progress.update(tasks[name], completed=point.step, loss=point.loss, accuracy=point.accuracy)

        yield watch


def _algorithm(name: str) -> str:
    try:
        check_algorithm(name)
    except ValueError as error:
        raise InputError(str(error)) from error
    return name


def _device(name: str) -> torch.device:
    try:
        if re.fullmatch("cpu|cuda(:[0-9]+)?", name) is None:
            raise ValueError
        return torch.empty(0, device=name).device
    except (ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise InputError(f"device {name!r} is not there; this machine has {', '.join(there)}") from error


def _check_file(path: Path) -> None:
    """Raise InputError if no file can be written at a path because of what is there or is not there."""
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise InputError(f"{path}: not a regular file, so it cannot be replaced")
    if not target.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")


def _check_folder(path: Path) -> None:
    """Raise InputError if a path is not a folder and cannot become one because a file is in the way."""
    nearest = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise InputError(f"{path}: {nearest.name} is a file, not a folder")


def _recipe(dataset: str, epochs: int | None, batch: int | None) -> train.Recipe:
    if dataset not in train.DATASETS:
        raise InputError(f"unknown dataset {dataset!r}; datasets are {', '.join(train.DATASETS)}")
    usual = train.DATASETS[dataset]
    return train.Recipe(epochs or usual.epochs, batch or usual.batch)


def _sample() -> Path:
    from plainconv.plots import sample_photograph  # matplotlib takes a second to import; only here is it needed

    return sample_photograph()


def _label(kernel: str) -> str:
    """What the name of the written picture says of its kernel."""
    if kernel in picture.KERNELS:
        return kernel
    return Path(kernel).stem if kernel.lower().endswith(".json") else "filtered"
