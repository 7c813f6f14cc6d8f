"""The language of the kernels: memory of another type than the sums, for every vector width."""

import itertools

import pytest
import torch
from guarded import guarded

from plainconv.cpu import compile as cpu
from plainconv.cpu.compile import Target
from plainconv.cpu.emit import Emit, natives
from plainconv.cpu.launch import launch

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

TYPES = {"half": torch.float16, "bfloat": torch.bfloat16, "float": torch.float32}
TARGETS = [Target.host(bits) for bits in (512, 256, 128) if cpu.why_not() is None and bits <= Target.host().bits]
every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.bits))
every_half = pytest.mark.parametrize("stored", ["half", "bfloat"])
SPECIAL = [
    0.0,
    -0.0,
    torch.inf,
    -torch.inf,
    torch.nan,
    65504.0,
    65519.9,
    65520.0,
    2.0**-24,
    2.0**-25,
    2.0**-149,
    3.4e38,
]


def run(e, tensors, sizes=(), tasks=1, target=None):
    kernel = cpu.compile(e.module(), target)
    launch(kernel, (*(tensor.data_ptr() for tensor in tensors), *sizes), tasks, 1)


def builder(target):
    return Emit(target.bits // 32, native=natives(target))


def copy(target, source, to, stored, result, masked):
    """to[i] = source[i]: whole vectors, and the last under a mask."""
    e = builder(target)
    x, y, size = e.arguments("ptr", "ptr", "i64")

    def step(i, _):
        at = i * e.lanes
        mask = e.tail(size - at) if masked else None
        e.store(e.load(x, at, mask, stored=stored), y, at, mask, stored=result)
        return []

    e.loop((size + (e.lanes - 1)) // e.lanes, [], step)
    run(e, (source, to), (source.numel(),), target=target)


@every_target
def test_a_vector_written_past_the_caches(target):
    e = builder(target)
    x, y = e.arguments("ptr", "ptr")
    e.stream(e.load(x), y, e.lanes)
    e.fence()
    source, to = torch.arange(1.0, e.lanes + 1), torch.zeros(3 * e.lanes)
    aligned = to[-to.data_ptr() // 4 % e.lanes :]
    run(e, (source, aligned), target=target)
    assert torch.equal(aligned[e.lanes : 2 * e.lanes], source)
    assert int((to != 0).sum()) == e.lanes
    assert "movnt" in cpu.assembly(e.module(), target)


def bits(tensor):
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def assert_same(result, expected):
    """The same bits; any NaN for a NaN."""
    nan = expected.isnan()
    assert torch.equal(result.isnan(), nan)
    assert torch.equal(bits(result)[~nan], bits(expected)[~nan])


def patterns(dtype):
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


def floats():
    """Of every exponent, with what is hard to round: ties, and their neighbours."""
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(1 << 31), 1 << 31, (100_000,), generator=generator).to(torch.int32)
    ties = [any_bits & ~((1 << kept) - 1) | 1 << (kept - 1) for kept in (13, 16)]
    around = [tie + by for tie, by in itertools.product(ties, (-1, 0, 1))]
    # Around the denormals of half, where a pattern of random bits seldom falls.
    small = torch.rand(50_000, generator=generator) * 2.0**-13
    halves = torch.arange(0, 1 << 15).to(torch.int16).view(torch.float16).float()
    middles = (halves[1:-1024] + halves[:-1025]) / 2
    every = [part.to(torch.int32).view(torch.float32) for part in (any_bits, *around)]
    return torch.cat([*every, small, -small, middles, -middles, torch.tensor(SPECIAL)])


@every_target
@every_half
@pytest.mark.parametrize("masked", [False, True])
def test_every_half_becomes_a_float(target, stored, masked):
    source = patterns(TYPES[stored])
    result = torch.full((len(source),), torch.nan)
    copy(target, source, result, stored, "float", masked)
    assert_same(result, source.float())


@every_target
@every_half
@pytest.mark.parametrize("masked", [False, True])
def test_floats_are_rounded_as_torch_does(target, stored, masked):
    source = floats()
    source = source[: len(source) // 16 * 16]
    result = torch.full((len(source),), torch.nan, dtype=TYPES[stored])
    copy(target, source, result, "float", stored, masked)
    assert_same(result, source.to(TYPES[stored]))


@every_target
@every_half
def test_scalars(target, stored):
    """One element at a time: broadcast, widened, narrowed."""
    source = torch.cat([patterns(TYPES[stored])[::251], torch.tensor(SPECIAL).to(TYPES[stored])])
    e = builder(target)
    x, spread, wide, back = e.arguments(*["ptr"] * 4)

    def each(i, _):
        at = e.begin + i
        one = e.scalar(x, at, stored)
        e.store(e.broadcast(one), spread, at * e.lanes)
        e.put(e.widen(one, stored), wide, at)
        e.put(e.narrow(e.scalar(wide, at), stored), back, at)
        return []

    e.loop(e.end - e.begin, [], each)
    spread, wide = torch.full((len(source), e.lanes), torch.nan), torch.full((len(source),), torch.nan)
    back = torch.full_like(source, torch.nan)
    run(e, (source, spread, wide, back), tasks=len(source), target=target)
    assert_same(wide, source.float())
    assert_same(spread, source.float()[:, None].expand(-1, e.lanes).contiguous())
    assert_same(back, source)


@every_target
@pytest.mark.parametrize("stored", TYPES)
@pytest.mark.parametrize("at_end", [True, False])
def test_masks_keep_to_their_lanes(target, stored, at_end):
    """Memory that faults begins right behind, or ends right before, what the mask allows."""
    for count in range(1, 2 * target.bits // 32):
        source = guarded(torch.arange(count).to(TYPES[stored]), at_end=at_end)
        to = guarded(torch.full((count,), torch.nan, dtype=TYPES[stored]), at_end=at_end)
        copy(target, source, to, stored, stored, masked=True)
        assert torch.equal(to, source)


@every_target
@every_half
def test_gathered_halves(target, stored):
    source = torch.randn(300).to(TYPES[stored])
    e = builder(target)
    x, y = e.arguments("ptr", "ptr")
    e.store(e.widen(e.gather(x, e.places(e.number(3), 17), e.tail(e.lanes - 1), stored), stored), y)
    result = torch.full((e.lanes,), torch.nan)
    run(e, (source, result), target=target)
    expected = source[3 : 3 + 17 * e.lanes : 17].float()
    expected[-1] = 0
    assert torch.equal(result, expected)


def test_one_instruction_where_there_is_one():
    e = builder(Target.host())
    if "half" not in e.native:
        pytest.skip("this processor has none")
    x, y = e.arguments("ptr", "ptr")
    e.store(e.load(x, stored="half"), y)
    e.store(e.broadcast(e.scalar(x, 99, "bfloat")), y, 64)
    e.store(e.load(x, 512), y, 512, stored="half")
    text = cpu.assembly(e.module())
    assert "vcvtph2ps\t(" in text
    if Target.host().has("avx512bw"):  # for others LLVM goes by way of a scalar register
        assert "vpbroadcastw\t198(" in text
    assert "vcvtps2ph" in text
    assert "call" not in text


def test_arm_converts_too():
    target = Target.neon()
    e = builder(target)
    x, y = e.arguments("ptr", "ptr")
    for place, stored in enumerate(("half", "bfloat")):
        e.store(e.load(x, 8 * place, stored=stored), y, 8 * place)
        e.store(e.load(y, 8 * place + 4), x, 8 * place + 4, stored=stored)
    text = cpu.assembly(e.module(), target)
    assert "fcvtl" in text
    assert "fcvtn" in text
    assert "\tbl\t" not in text


@pytest.mark.parametrize("lanes", [16, 8, 4])
def test_dot_products_of_pairs(lanes):
    e = Emit(lanes, native=natives(Target.host()))
    if "pairs" not in e.native:
        pytest.skip("this processor has none")
    a, b, y, z = e.arguments("ptr", "ptr", "ptr", "ptr")
    mask = e.tail(lanes - 1)
    e.store(e.dot_pairs(e.load(y), e.load_pairs(a), e.load_pairs(b)), y)
    e.store(e.dot_pairs(e.load(z), e.load_pairs(a, 2 * lanes, mask), e.broadcast_pair(b, 1)), z)
    first = guarded(torch.randint(-9, 9, (4 * lanes - 2,)).bfloat16(), at_end=True)
    second = torch.randint(-9, 9, (2 * lanes,)).bfloat16()
    sums = [torch.arange(float(lanes)), torch.arange(float(lanes))]
    run(e, (first, second, *sums))
    each = (first[: 2 * lanes].float() * second.float()).view(-1, 2).sum(1)
    assert torch.equal(sums[0], torch.arange(float(lanes)) + each)
    once = (first[2 * lanes :].float().view(-1, 2) * second[1:3].float()).sum(1)
    assert torch.equal(sums[1], torch.arange(float(lanes)) + torch.cat([once, torch.zeros(1)]))


@pytest.mark.parametrize("lanes", [16, 8, 4])
def test_sums_without_denormals_are_rounded_by_one_instruction(lanes):
    native = natives(Target.host())
    if "pairs" not in native:
        pytest.skip("this processor has none")
    e = Emit(lanes, native=native | {"flush"})
    x, y = e.arguments("ptr", "ptr")

    def step(i, _):
        e.store(e.load(x, (e.begin + i) * lanes), y, (e.begin + i) * lanes, stored="bfloat")
        return []

    e.loop(e.end - e.begin, [], step)
    source = floats()
    source = source[: len(source) // 16 * 16]
    source[source.abs() < torch.finfo(torch.float32).tiny] = 0.0
    result = torch.full((len(source),), torch.nan, dtype=torch.bfloat16)
    run(e, (source, result), tasks=len(source) // lanes)
    assert_same(result, source.bfloat16())
    assert ("vcvtneps2bf16" in cpu.assembly(e.module())) == (lanes > 4)


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(ValueError, match="stored='half' cannot be converted to accumulators of type 'double'"):
        Emit(4, "double").load(Emit(4).arguments("ptr")[0], stored="half")
    e = Emit(8)
    with pytest.raises(ValueError, match="avx512bf16"):
        e.dot_pairs(e.zero, e.zero, e.zero)


@every_target
def test_the_lanes_of_many_vectors_are_added(target):
    """Lane i of the result is the sum of vector i, of any number of vectors up to as many as there are lanes."""
    lanes = target.bits // 32
    for count in range(1, lanes + 1):
        source, result = torch.randint(-9, 10, (count, lanes)).float(), torch.empty(lanes)
        e = builder(target)
        x, y = e.arguments("ptr", "ptr")
        e.store(e.sums_of([e.load(x, i * lanes) for i in range(count)]), y)
        run(e, (source, result), target=target)
        assert torch.equal(result[:count], source.sum(1))
