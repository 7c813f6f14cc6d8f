"""Measurements: who is measured, what is kept and how it is used, and the records on disk under attack."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from attacks import DAMAGES, MOMENTS, by_fork, killed, told_by
from checks import BY_NAME, request

import plainconv
from plainconv import measure
from plainconv import plan as plans
from plainconv.cpu import store as storage
from plainconv.measure import Candidate, Record
from plainconv.menu import ALGORITHMS
from plainconv.plan import explain_request, plan, tune, tuning
from plainconv.problem import ConvProblem, Direction
from plainconv.timing import Timing

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes of files are POSIX's")
SMALL = request(ConvProblem.parse("n1 c2 o3 x8x8 k3x3 p1"), Direction.FORWARD, torch.float32)
TIMING = Timing(1e-3, 9e-4, 2e-3, 7)


@pytest.fixture(autouse=True)
def _quick_and_forgotten(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    plans.forget()
    yield
    plans.forget()


@pytest.fixture
def folder(tmp_path):
    """Where the records are."""
    with measure.kept_in(tmp_path / "records"):
        yield tmp_path / "records"


@pytest.fixture
def measured(monkeypatch):
    """The requests that are measured, and whom."""
    seen, real = [], measure.measure
    monkeypatch.setattr(measure, "measure", lambda asked, who: seen.append((asked, set(who))) or real(asked, who))
    return seen


def recorded(asked, **median_s):
    """Keep records of these medians."""
    measure.keep(asked, {name: Record(BY_NAME[name].version, Timing(s, s, s, 5)) for name, s in median_s.items()})
    plans.forget()


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


# -- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.uint8], ids=str)
def test_candidates_get_tensors_as_the_request_says(direction, dtype):
    how = {"channels_last": True, "has_bias": True, "has_residual": True}
    asked = request(ConvProblem.parse("n2 c4 o6 x5x6 k3x3 g2"), direction, dtype, **how)
    seen = []
    state = torch.get_rng_state()
    found = measure.measure(asked, {"a": Candidate(1.0, lambda _: lambda tensors, out: seen.append((tensors, out)))})
    assert found["a"].calls >= 2
    assert torch.equal(torch.get_rng_state(), state), "the user's random numbers are left alone"
    tensors, out = seen[0]
    assert (tensors.first.shape, tensors.second.shape) == tuple(map(asked.problem.shape_of, direction.given))
    assert tensors.bias.shape == asked.bias_shape == ((4,) if direction is Direction.GRAD_INPUT else (6,))
    assert tensors.residual.shape == out.shape == asked.problem.shape_of(direction.makes)
    assert all(tensor.dtype == dtype for tensor in (*tensors, out))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (tensors.first, tensors.residual, out))
    assert len(set(tensors.first.flatten().tolist())) > 10


def test_a_hopeless_candidate_is_not_run_but_one_that_is_only_estimated_badly_is():
    def never(tensors):
        raise AssertionError("it was run")

    quick = Candidate(1e-6, lambda _: lambda tensors, out: None)
    others = {"hopeless": Candidate(1.0, never), "misjudged": quick._replace(estimate_s=0.01)}
    found = measure.measure(SMALL, {**others, "a": quick})
    assert found["hopeless"] is None
    assert found["misjudged"].calls > 1


def test_an_error_in_a_candidate_is_a_bug_that_is_seen():
    def broken(tensors, out):
        raise ZeroDivisionError("a bug")

    for _ in range(2):  # and nothing stays locked
        with pytest.raises(ZeroDivisionError):
            measure.measure(SMALL, {"a": Candidate(1.0, lambda _: broken)})


# -- tuning ----------------------------------------------------------------------------------------------------------


def test_an_ordinary_call_measures_nothing_and_leaves_no_file(folder, measured):
    plainconv.conv2d(torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3))
    plainconv.explain(torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3))
    assert measured == []
    assert not folder.exists()


def test_tuning_measures_each_new_request_once_forward_and_backward(folder, measured):
    layer, x = plainconv.nn.Conv2d(2, 3, 3), torch.randn(1, 2, 8, 8, requires_grad=True)
    with tuning() as report:
        for _ in range(3):
            layer(x).sum().backward()
    assert [asked.direction for asked, _ in measured] == [
        Direction.FORWARD,
        *sorted((asked.direction for asked, _ in measured[1:]), key=str),
    ]
    assert {asked.direction for asked, _ in measured} == set(Direction)
    assert len(measured) == len(report.tuned) == len(files(folder)) == 3
    assert str(report).splitlines() == [str(tuned) for tuned in report.tuned]
    for tuned in report.tuned:
        best = min((v for v in tuned.verdicts if v.timing), key=lambda v: v.timing.median_s)
        assert tuned.chosen == best.algorithm.name == plan(tuned.request).algorithm.name
    layer(x)
    with tuning():
        layer(x)
    assert len(measured) == 3, "measured before"


def test_gradients_made_before_are_planned_again(folder, measured):
    x, w = torch.randn(1, 2, 8, 8, requires_grad=True), torch.randn(3, 2, 3, 3, requires_grad=True)
    y = plainconv.conv2d(x, w)
    y.backward(torch.ones_like(y), retain_graph=True)
    with tuning():
        y.backward(torch.ones_like(y))
    assert {asked.direction for asked, _ in measured} == {Direction.GRAD_INPUT, Direction.GRAD_WEIGHT}


def test_calls_made_before_are_planned_again(folder, served):
    x, w = torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3)
    before = plainconv.explain(x, w)
    plainconv.conv2d(x, w)
    other = next(v.algorithm.name for v in before.verdicts if v.cost and v.algorithm.name != before.chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "measure", lambda asked, who: {n: Timing(*[1.0 + (n != other)] * 3, 5) for n in who})
        report = tune(plainconv.conv2d, x, w)
    assert [tuned.chosen for tuned in report.tuned] == [other]
    assert f"{other} 1 s, not {before.chosen} 2 s" in str(report)
    served.clear()
    plainconv.conv2d(x, w)
    plainconv.conv2d(x, w, algorithm=before.chosen)
    assert [plan.algorithm.name for plan, _ in served] == [other, before.chosen], "a name still wins"
    assert plainconv.explain(x, w).chosen == other


def test_a_named_algorithm_is_not_measured(folder, measured):
    report = tune(plainconv.conv2d, torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3), algorithm="shift")
    assert measured == []
    assert str(report) == "no convolution with algorithm='auto' was met"


def test_only_those_that_the_settings_let_in_are_measured(folder, measured):
    x, w = torch.randn(1, 4, 16, 16), torch.randn(4, 4, 3, 3)
    tune(plainconv.conv2d, x, w, max_workspace=0)
    tune(plainconv.conv2d, x, w, allow_builtin=True)
    (tight, few), (_, many) = measured
    assert all(BY_NAME[name].cost(tight).workspace == 0 for name in few)
    assert "builtin" not in few
    assert {"builtin", "im2col"} <= many
    plainconv.conv2d(x, w, max_workspace=1 << 20)
    assert len(measured) == 2


def test_a_tuned_call_is_right(folder):
    x, w = torch.randn(2, 3, 12, 11), torch.randn(4, 3, 3, 3)
    expected = torch.nn.functional.conv2d(x, w)
    with tuning():
        torch.testing.assert_close(plainconv.conv2d(x, w), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plainconv.conv2d(x, w), expected, rtol=1e-4, atol=1e-4)


# -- records ---------------------------------------------------------------------------------------------------------


def test_a_record_beats_an_estimate_and_less_beats_more(folder):
    by_estimate = plan(SMALL).algorithm.name
    recorded(SMALL, shift=1e-9)
    assert plan(SMALL).algorithm.name == "shift" != by_estimate
    recorded(SMALL, im2col=1e-10)
    assert plan(SMALL).algorithm.name == "im2col", "records of one request are kept beside each other"
    assert plan(SMALL, "loops").algorithm.name == "loops"


@pytest.mark.parametrize(
    "other",
    [
        {"threads": 7},
        {"dtype": torch.float64},
        {"channels_last": True},
        {"has_bias": True},
        {"has_residual": True},
        {"activation": "relu"},
        {"max_workspace": 1 << 20},
        {"direction": Direction.GRAD_INPUT},
        {"device": "cuda"},
        {"tf32": True},
        {"problem": ConvProblem.parse("n2 c2 o3 x8x8 k3x3 p1")},
    ],
    ids=str,
)
def test_a_record_is_of_one_request(folder, other):
    recorded(SMALL, shift=1e-9)
    assert measure.known(SMALL)
    assert measure.known(dataclasses.replace(SMALL, **other)) == {}


def test_a_record_holds_whether_or_not_torchs_own_is_allowed(folder):
    recorded(SMALL, shift=1e-9, builtin=1e-10)
    assert plan(SMALL).algorithm.name == "shift"
    assert plan(dataclasses.replace(SMALL, allow_builtin=True)).algorithm.name == "builtin"


def test_a_record_is_of_one_version(folder, monkeypatch):
    recorded(SMALL, shift=1e-9)
    newer = tuple(dataclasses.replace(a, version=a.version + 1) if a.name == "shift" else a for a in ALGORITHMS)
    with monkeypatch.context() as patch:
        patch.setattr(plans, "ALGORITHMS", newer)
        plans.forget()
        assert plan(SMALL).algorithm.name != "shift"
    for where, what in ((measure, "__version__"), (torch, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, "0")
            assert measure.known(SMALL) == {}
    with monkeypatch.context() as patch:
        patch.setattr(measure, "_device", lambda *_: "another processor")
        assert measure.known(SMALL) == {}
    assert measure.known(SMALL)


def test_explain_shows_estimate_and_measurement_and_notes(folder):
    recorded(SMALL, shift=1.5e-3)
    DAMAGES["a bit"](files(folder)[0])
    told = str(explain_request(SMALL))
    assert f"note: {folder / files(folder)[0].name} is damaged" in told
    recorded(SMALL, shift=1.5e-3)
    rows = {line.split()[0]: line.split() for line in str(explain_request(SMALL)).splitlines()}
    assert rows["algorithm"] == ["algorithm", "estimate", "measured", "prepacked", "workspace"]
    assert rows["shift"][3:5] == ["1.5", "ms"]
    assert rows["im2col"][3] == "-"


def test_prepack_goes_by_its_own_measurements_and_else_by_those_of_plain_calls():
    packed = dataclasses.replace(SMALL, packed=True)
    recorded(SMALL, shift=1e-9)
    assert plan(packed).algorithm.name == "shift"
    recorded(packed, shift=1e-3, im2col=1e-8)
    assert plan(packed).algorithm.name == "im2col"
    assert plan(SMALL).algorithm.name == "shift"


# -- the records under attack ----------------------------------------------------------------------------------------


def record_again(folder: Path, asked=SMALL) -> tuple[bool, tuple[str, ...]]:
    """As a new process would: whether there is a record, and what was said; then one is kept."""
    with measure.kept_in(folder):
        found = measure.known(asked)
        assert found in ({}, {"shift": Record(1, TIMING), "fft": Record(1, None)}), "nothing wrong is ever believed"
        if not found:
            measure.keep(asked, {"shift": Record(1, TIMING), "fft": Record(1, None)})
            assert set(measure.known(asked)) == {"shift", "fft"}, "in memory, if not on disk"
        return bool(found), measure.notes()


@pytest.mark.parametrize("attack", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_ignored_and_replaced(tmp_path, attack):
    assert record_again(tmp_path / "records") == (False, ())
    attack(files(tmp_path / "records")[0])
    there, said = record_again(tmp_path / "records")
    assert not there
    assert len(said) == 1
    assert "damaged" in said[0]
    assert record_again(tmp_path / "records") == (True, ())


def test_a_file_of_another_request_or_processor_is_ignored(tmp_path):
    record_again(tmp_path / "records")
    (other,) = files(tmp_path / "records")
    asked = dataclasses.replace(SMALL, threads=3)
    record_again(tmp_path / "records", asked)
    (mine,) = set(files(tmp_path / "records")) - {other}
    mine.write_bytes(other.read_bytes())
    there, said = record_again(tmp_path / "records", asked)
    assert not there
    assert "not what its name says" in said[0]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"records": 1}', b'{"records": {"shift": 3}}', b'{"records": {"shift": [1, [1, 2]]}}'],
)
def test_a_whole_file_that_holds_no_records_is_ignored(tmp_path, content):
    record_again(tmp_path / "records")
    name = files(tmp_path / "records")[0].name
    assert storage.Store(tmp_path / "records", measure._MAGIC).write(name, content)
    there, said = record_again(tmp_path / "records")
    assert not there
    assert said == (f"{tmp_path / 'records' / name} holds no records, so it was ignored",)


@by_fork
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_writing_leaves_nothing_that_is_read(tmp_path, moment):
    folder, other = tmp_path / "records", dataclasses.replace(SMALL, threads=3)
    record_again(folder)
    killed(lambda: record_again(folder, other), moment)
    renamed = moment == "behind the rename"
    assert len(files(folder)) == 2
    assert sum(file.suffix == ".part" for file in files(folder)) == (not renamed)
    assert record_again(folder, other) == (renamed, ())
    assert record_again(folder, other) == record_again(folder) == (True, ())


@by_fork
def test_killed_at_any_moment(tmp_path):
    """Records that are written over and over are the old ones or the new ones."""
    folder, moments = tmp_path / "records", random.Random(0)
    each = [dataclasses.replace(SMALL, threads=threads) for threads in range(1, 7)]

    def work():
        with measure.kept_in(folder):
            for asked in each:
                measure.keep(asked, {"shift": Record(1, TIMING), "fft": Record(1, None)})

    with measure.kept_in(folder):
        work()
        for _ in range(20):
            killed(work, after_s=moments.uniform(0, 0.01))
            assert all(measure.known(asked) for asked in each)
        assert measure.notes() == ()
    assert len(files(folder)) <= 6 + 20
    assert told_by(CHILD.format(folder=str(folder))) == "right\n"
    assert all(record_again(folder, asked) == (True, ()) for asked in each)


@posix
@pytest.mark.parametrize(("mode", "of_folder"), [(0o620, False), (0o602, False), (0o720, True), (0o702, True)])
def test_what_others_may_write_is_ignored(tmp_path, mode, of_folder):
    record_again(tmp_path / "records")
    (tmp_path / "records" if of_folder else files(tmp_path / "records")[0]).chmod(mode)
    there, said = record_again(tmp_path / "records")
    assert not there
    assert "written by others" in said[0]


@posix
@pytest.mark.skipif(not ROOT, reason="only root can give files away")
def test_what_belongs_to_another_is_ignored(tmp_path):
    record_again(tmp_path / "records")
    os.chown(files(tmp_path / "records")[0], 12345, -1)
    there, said = record_again(tmp_path / "records")
    assert not there
    assert "another user" in said[0]
    assert record_again(tmp_path / "records") == (True, ())
    os.chown(tmp_path / "records", 12345, -1)
    there, said = record_again(tmp_path / "records")
    assert not there
    assert "another user" in said[0]


@posix
def test_the_folder_is_private(tmp_path):
    record_again(tmp_path / "records")
    assert (tmp_path / "records").stat().st_mode & 0o777 == 0o700


@posix
@pytest.mark.parametrize("filled", [False, True])
def test_a_read_only_folder(filled):
    user = 65534 if ROOT else os.geteuid()  # modes do not stop root
    top = Path(tempfile.mkdtemp())  # pytest's own folders let nobody else in
    folder = top / "records"
    try:
        if filled:
            record_again(folder)
            os.chown(files(folder)[0], user, -1)
        folder.mkdir(exist_ok=True)
        top.chmod(0o755)
        folder.chmod(0o500)
        os.chown(folder, user, -1)
        os.seteuid(user)
        there, said = record_again(folder)
    finally:
        if ROOT:
            os.seteuid(0)
        folder.chmod(0o700)
        shutil.rmtree(top)
    assert there == filled
    if not filled:
        assert "could be kept" in said[0]


def test_what_is_held_in_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(measure, "MAX_HELD", 3)
    with measure.kept_in(None):
        for threads in range(1, 9):
            measure.keep(dataclasses.replace(SMALL, threads=threads), {"shift": Record(1, TIMING)})
            assert len(measure._state.held) <= 3
        assert measure.known(dataclasses.replace(SMALL, threads=8))


CHILD = """
from pathlib import Path
import torch
torch.set_num_threads(1)
import plainconv
from plainconv import measure
measure.SECONDS = 0.0
with measure.kept_in(Path({folder!r})):
    for size in (*range(5, 11), *range(5, 11)):
        x, w = torch.randn(1, 2, size, size), torch.randn(3, 2, 3, 3)
        with plainconv.tuning():
            y = plainconv.conv2d(x, w)
        torch.testing.assert_close(y, torch.nn.functional.conv2d(x, w), rtol=1e-4, atol=1e-4)
    assert measure.notes() == (), measure.notes()
print("right")
"""


def test_two_processes_at_once(tmp_path):
    folder = tmp_path / "records"
    code = CHILD.format(folder=str(folder))
    assert told_by(code, code) == "right\n" * 2
    assert len(files(folder)) == 6
    for file in files(folder):
        told = json.loads(storage.Store(folder, measure._MAGIC).read(file.name))
        assert told["request"]["direction"] == "forward"
        assert "shift" in told["records"]


def test_eight_threads_tune_at_once(folder):
    wrong = []

    def work() -> None:
        for size in range(5, 9):
            x, w = torch.randn(1, 2, size, size), torch.randn(3, 2, 3, 3)
            if not torch.allclose(plainconv.conv2d(x, w), torch.nn.functional.conv2d(x, w), rtol=1e-4, atol=1e-4):
                wrong.append(size)

    with tuning():
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
            assert not thread.is_alive()
    assert wrong == []


def test_nothing_is_measured_where_there_is_nothing_to_multiply(folder):
    with plainconv.tuning() as report:
        assert plainconv.conv2d(torch.ones(1, 0, 8, 8), torch.ones(4, 0, 3, 3)).shape == (1, 4, 6, 6)
        assert plainconv.conv2d(torch.ones(0, 3, 8, 8), torch.ones(4, 3, 3, 3)).shape == (0, 4, 6, 6)
    assert not report.tuned


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_child_forked_while_another_thread_measures_measures_too():
    """The thread that holds the lock is not in the child."""
    held, free = threading.Event(), threading.Event()

    def hold():
        with measure._one_at_a_time:
            held.set()
            free.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, b"free" if measure._one_at_a_time.acquire(timeout=5) else b"held")
        finally:
            os._exit(0)
    free.set()
    thread.join()
    os.close(writing)
    with open(reading) as pipe:
        assert pipe.read() == "free"
    assert os.waitpid(child, 0)[1] == 0


def test_on_a_gpu_the_device_is_timed_and_it_is_that_of_the_request(monkeypatch):
    held, clocked = [], []

    @contextlib.contextmanager
    def device(place):
        held.append(place)
        yield
        held.pop()

    def clock(call):
        call()
        clocked.append(tuple(held))
        return {"quick": 1e-5, "slow": 1e-3}[running[-1]]

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(measure, "on_device", clock)
    asked = dataclasses.replace(SMALL, device="cuda", gpu=1)
    there = measure._tensors(SMALL)
    monkeypatch.setattr(measure, "_tensors", lambda request: there)
    running = []
    candidates = {
        name: Candidate(1e-6, lambda tensors, name=name: lambda tensors, out: running.append(name))
        for name in ("quick", "slow")
    }
    found = measure.measure(asked, candidates)
    assert {name: timing.median_s for name, timing in found.items()} == {"quick": 1e-5, "slow": 1e-3}
    assert found["quick"].calls < 10, "a turn is one look at the clock, which makes many calls"
    assert set(clocked) == {(torch.device("cuda:1"),)}


def test_records_of_a_gpu_hold_for_its_name_and_for_the_compiler(monkeypatch):
    class Triton:
        version = "3.6"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", ["one", "two", "one"].__getitem__)
    monkeypatch.setattr(measure, "distributions", lambda name: [Triton])
    told = measure._device.__wrapped__
    first = told("cuda", 0)
    assert "one" in first
    Triton.version = "3.7"
    assert told("cuda", 0) != first
    assert told("cpu", None) == measure._device("cpu", None)
    asked = request(ConvProblem.parse("n1 c1 o1 x3 k3"), Direction.FORWARD, torch.float32, device="cuda")
    monkeypatch.setattr(measure, "_device", functools.cache(told))
    names = [measure._name(dataclasses.replace(asked, gpu=gpu)) for gpu in (0, 1, 2)]
    assert names[0] == names[2] != names[1], "those of one kind share them"
