"""torch's own samples (op_db) for its six convolutions, with our functions in place of torch's."""

import itertools
import re

import pytest
import torch
from checks import EVERYWHERE, FORWARD_ONLY
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing._internal.common_utils import noncontiguous_like
from torch.testing._internal.opinfo.core import SampleInput
from torch_samples import (
    FLOATS,
    FUNCTIONS,
    INFOS,
    INTEGERS,
    assert_served,
    assert_within,
    call,
    error_samples,
    exact_result,
    explained,
    our_function,
    samples,
    small,
    torch_function,
)

import plainconv
from plainconv.problem import ConvProblem

NAMES = ("auto", *EVERYWHERE)
INTEGER_EXACT = tuple(name for name in EVERYWHERE if name != "fft")
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}

every_function = pytest.mark.parametrize("name", FUNCTIONS)


def refuses(algorithm: str, dtype: torch.dtype) -> bool:
    """The only refusal there is on these samples."""
    return algorithm == "fft" and dtype in INTEGERS


def whole_numbers(name: str, dtype: torch.dtype = torch.float64) -> list[SampleInput]:
    """torch's samples with their values rounded: sums are exact in whatever order."""
    return [sample.transform(lambda t: t.round() if isinstance(t, Tensor) else t) for sample in samples(name, dtype)]


def test_the_op_db_has_all_six():
    assert set(INFOS) == set(FUNCTIONS)
    for info in INFOS.values():
        assert info.dtypes <= {*FLOATS, *INTEGERS}


# -- values ----------------------------------------------------------------------------------------------------------


def check_values(name: str, every: list[SampleInput], algorithm: str) -> None:
    for sample in every:
        dtype = sample.input.dtype
        if refuses(algorithm, dtype):
            with pytest.raises(plainconv.AlgorithmRefused, match="must be exact; use algorithm='im2col'"):
                call(our_function(name), sample, algorithm=algorithm)
            continue
        ours = call(our_function(name), sample, algorithm=algorithm)
        assert ours.dtype == dtype
        assert_served(ours, *exact_result(torch_function(name), sample), explained(name, sample, algorithm))


def quick(every: list[SampleInput], algorithm: str) -> list[SampleInput]:
    """Python loops are slow: they get the smaller samples; the others are for the slow tests."""
    return small(every, 300) if algorithm == "loops" else every


every_dtype = pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=lambda dtype: str(dtype).removeprefix("torch."))


@every_function
@pytest.mark.parametrize("algorithm", NAMES)
@every_dtype
def test_values_are_torchs(name, algorithm, dtype):
    check_values(name, quick(samples(name, dtype), algorithm), algorithm)


@every_function
@pytest.mark.parametrize("algorithm", [*FORWARD_ONLY, "winograd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_values_of_what_makes_only_outputs_are_torchs(name, algorithm, dtype):
    """What is refused is refused with a sentence; the rest is right."""
    every = samples(name, dtype)
    able = [sample for sample in every if explained(name, sample, algorithm).chosen == algorithm]
    # Few of torch's samples have one tap, and in three dimensions none has three.
    assert able or algorithm == "pointwise" or (algorithm, name) == ("winograd", "conv3d")
    check_values(name, able, algorithm)
    for sample in every:
        if not any(sample is one for one in able):
            with pytest.raises(plainconv.AlgorithmRefused, match=f"algorithm='{algorithm}' refuses"):
                call(our_function(name), sample, algorithm=algorithm)


@pytest.mark.slow
@every_function
@every_dtype
def test_values_of_loops_are_torchs_on_all_samples(name, dtype):
    check_values(name, samples(name, dtype), "loops")


@every_function
@pytest.mark.parametrize("algorithm", NAMES)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.complex128, torch.bfloat16], ids=["real", "complex", "bfloat16"]
)
def test_gradients_are_torchs(name, algorithm, dtype):
    """The two other directions, by every algorithm; torch in float64 is the judge."""
    for sample in small(samples(name, dtype), 300):
        tensors = [sample.input, *(arg for arg in sample.args if arg is not None)]
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        wide = torch.complex128 if dtype.is_complex else torch.float64
        exact_leaves = [tensor.detach().to(wide).requires_grad_() for tensor in tensors]
        absolute_leaves = [tensor.detach().to(wide).abs().requires_grad_() for tensor in tensors]

        ours = our_function(name)(*leaves, **sample.kwargs, algorithm=algorithm)
        theirs = torch_function(name)(*exact_leaves, **sample.kwargs)
        absolute = torch_function(name)(*absolute_leaves, **sample.kwargs)
        cotangent = torch.randn(ours.shape, dtype=dtype)
        got = torch.autograd.grad(ours, leaves, cotangent)
        wanted = torch.autograd.grad(theirs, exact_leaves, cotangent.to(wide))
        sums = torch.autograd.grad(absolute, absolute_leaves, cotangent.to(wide).abs())
        for gradient, exact, total, leaf in zip(got, wanted, sums, leaves, strict=True):
            assert gradient.dtype == leaf.dtype
            # Terms of a gradient: no more than the elements of the two tensors it is summed over. 60 covers fft's own.
            terms = max(sample.input.numel(), ours.numel(), sample.args[0].numel())
            assert_within(gradient, exact, total, terms + 60, spread=True)


@every_function
@pytest.mark.parametrize("dims", [3, 4, 5])
def test_a_batch_of_none(name, dims):
    for sample in samples(name):
        if sample.input.dim() != dims or sample.args[0].dim() != dims:
            continue
        tensors = [t.clone().requires_grad_() for t in (sample.input[:0], *sample.args) if t is not None]
        ours = our_function(name)(*tensors, **sample.kwargs)
        assert ours.shape == torch_function(name)(*tensors, **sample.kwargs).shape
        for tensor, gradient in zip(tensors, torch.autograd.grad(ours.sum(), tensors), strict=True):
            assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d"])
def test_without_input_channels_the_result_is_the_bias(name):
    """An empty sum is zero. (torch gives a result without channels here: it takes their number from the wrong size.)"""
    dims = int(name[-2])
    bias = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = torch.randn(2, 0, *(3,) * dims, requires_grad=True)
    ours = our_function(name)(torch.randn(2, 0, *(4,) * dims), weight, bias)
    assert torch.equal(ours, bias.view(-1, *(1,) * dims).expand(2, 2, *(2,) * dims))
    ours.sum().backward()
    assert torch.equal(bias.grad, torch.full((2,), 2.0 * 2**dims))
    assert weight.grad.shape == weight.shape
    plain = our_function(name)(torch.randn(2, 0, *(4,) * dims), weight.detach())
    assert torch.equal(plain, torch.zeros(2, 2, *(2,) * dims))


@pytest.mark.parametrize("name", ["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"])
def test_without_output_channels_the_result_is_empty(name):
    dims = int(name[-2])
    x = torch.randn(2, 3, *(4,) * dims, requires_grad=True)
    ours = our_function(name)(x, torch.randn(3, 0, *(3,) * dims))
    assert ours.shape == (2, 0, *(6,) * dims)
    ours.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


# -- strides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if not name.endswith("1d")])
@pytest.mark.parametrize("algorithm", NAMES)
@pytest.mark.parametrize("input_last", [False, True])
@pytest.mark.parametrize("weight_last", [False, True])
def test_the_result_is_channels_last_if_input_or_weight_is(name, algorithm, input_last, weight_last):
    dims = int(name[-2])
    x, w = torch.randn(2, 4, *(5,) * dims), torch.randn(4, 4, *(3,) * dims)
    last = FORMATS[dims + 2]
    x = x.contiguous(memory_format=last) if input_last else x
    w = w.contiguous(memory_format=last) if weight_last else w
    x.requires_grad_()
    w.requires_grad_()
    ours = our_function(name)(x, w, algorithm=algorithm)
    assert ours.is_contiguous(memory_format=last if input_last or weight_last else torch.contiguous_format)
    for tensor, gradient in zip((x, w), torch.autograd.grad(ours.sum(), (x, w)), strict=True):
        assert gradient.stride() == tensor.stride()


@pytest.mark.parametrize("name", ["conv2d", "conv3d", "conv_transpose2d"])
@pytest.mark.parametrize("last", list(itertools.product([False, True], repeat=2)), ids=str)
def test_strides_are_torchs_in_float32(name, last):
    """Ambiguous strides (a size of 1) included. Not for conv_transpose3d, which torch leaves contiguous on CPU."""
    for sample in samples(name, torch.float32):
        if sample.input.dim() != int(name[-2]) + 2:
            continue
        x, w, *rest = sample.input, *sample.args
        x, w = (
            t.contiguous(memory_format=FORMATS[t.dim()]) if wanted else t
            for t, wanted in zip((x, w), last, strict=True)
        )
        ours = our_function(name)(x, w, *rest, **sample.kwargs)
        theirs = torch_function(name)(x, w, *rest, **sample.kwargs)
        assert ours.stride() == theirs.stride(), (sample, x.stride(), w.stride())


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d"])
def test_error_inputs(name):
    every = error_samples(name)
    assert len(every) >= 8
    for error in every:
        with pytest.raises(error.error_type, match=error.error_regex):
            call(our_function(name), error.sample_input)
        with pytest.raises(error.error_type, match=error.error_regex):
            call(torch_function(name), error.sample_input)


# -- derivatives -----------------------------------------------------------------------------------------------------


def differentiable(name: str, sample: SampleInput) -> tuple:
    """The function of the sample's tensors alone, and those tensors."""
    tensors = [sample.input, *(arg for arg in sample.args if arg is not None)]

    def function(*given: Tensor) -> Tensor:
        return our_function(name)(*given, **sample.kwargs)

    return function, [tensor.detach().requires_grad_() for tensor in tensors]


def check_first_derivatives(name: str, every: list[SampleInput], *, fast_mode: bool) -> None:
    for sample in every:
        function, tensors = differentiable(name, sample)
        assert gradcheck(
            function,
            tensors,
            check_forward_ad=True,
            check_backward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            check_undefined_grad=True,
            fast_mode=fast_mode,
        )


def check_second_derivatives(name: str, every: list[SampleInput], *, fast_mode: bool) -> None:
    for sample in every:
        function, tensors = differentiable(name, sample)
        assert gradgradcheck(function, tensors, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=fast_mode)


both_kinds = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])


@every_function
@both_kinds
def test_gradcheck(name, dtype):
    every = samples(name, dtype)
    check_first_derivatives(name, small(every, 150) if dtype.is_complex else every, fast_mode=True)


@pytest.mark.slow
@every_function
def test_gradcheck_of_all_complex_samples(name):
    check_first_derivatives(name, samples(name, torch.complex128), fast_mode=True)


@every_function
@both_kinds
def test_gradgradcheck(name, dtype):
    check_second_derivatives(name, small(samples(name, dtype), 60), fast_mode=True)


@pytest.mark.slow
@every_function
@both_kinds
def test_gradcheck_element_by_element(name, dtype):
    if (name, dtype) == ("conv_transpose3d", torch.complex128):
        pytest.skip("minutes; the random directions of test_gradcheck must do")
    check_first_derivatives(name, small(samples(name, dtype), 60), fast_mode=False)


@pytest.mark.slow
@every_function
@both_kinds
def test_gradgradcheck_of_larger_samples(name, dtype):
    check_second_derivatives(name, small(samples(name, dtype), 500), fast_mode=True)


@every_function
def test_second_derivatives_are_torchs(name):
    for sample in small(whole_numbers(name), 200):
        found = []
        for function in (our_function(name), torch_function(name)):
            leaves = [t.detach().requires_grad_() for t in (sample.input, sample.args[0])]
            result = function(*leaves, sample.args[1], **sample.kwargs)
            first = torch.autograd.grad((result**2).sum(), leaves, create_graph=True)
            found.append(torch.autograd.grad(sum((g * g).sum() for g in first), leaves))
        for ours, theirs in zip(*found, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=0)


@every_function
def test_forward_mode_tangents_are_torchs(name):
    for sample in whole_numbers(name):
        tensors = [t for t in (sample.input, *sample.args) if t is not None]
        for moved in itertools.product([False, True], repeat=len(tensors)):
            found = []
            for function in (our_function(name), torch_function(name)):
                with forward_ad.dual_level():
                    duals = [
                        forward_ad.make_dual(t, torch.ones_like(t)) if moves else t
                        for t, moves in zip(tensors, moved, strict=True)
                    ]
                    found.append(forward_ad.unpack_dual(function(*duals, **sample.kwargs)).tangent)
            ours, theirs = found
            assert (ours is None) == (theirs is None) == (not any(moved))
            if any(moved):
                assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-9)


# -- memory of every kind --------------------------------------------------------------------------------------------


@every_function
@pytest.mark.parametrize("algorithm", NAMES)
def test_noncontiguous(name, algorithm):
    for sample in quick(samples(name), algorithm):
        scattered = sample.transform(lambda t: noncontiguous_like(t) if isinstance(t, Tensor) else t)
        assert not scattered.input.is_contiguous()
        ours = call(our_function(name), scattered, algorithm=algorithm)
        exact, absolute = exact_result(torch_function(name), sample)
        assert_served(ours, exact, absolute, explained(name, scattered, algorithm))


@every_function
@pytest.mark.parametrize("algorithm", NAMES)
def test_conjugated(name, algorithm):
    """x.conj() only sets a bit; nothing may read the memory as if it were not set."""
    for sample in small(samples(name, torch.complex128), 80):
        for which in itertools.product([False, True], repeat=3):
            if not any(which):
                continue
            tensors = [
                t.conj() if t is not None and conjugated else t
                for t, conjugated in zip((sample.input, *sample.args), which, strict=True)
            ]
            lazy = SampleInput(tensors[0], args=tuple(tensors[1:]), kwargs=sample.kwargs)
            resolved = lazy.transform(lambda t: t.resolve_conj() if isinstance(t, Tensor) else t)
            assert tensors[0].is_conj() == which[0]
            ours = call(our_function(name), lazy, algorithm=algorithm)
            assert torch.equal(ours, call(our_function(name), resolved, algorithm=algorithm))
            if all(which):
                assert_served(ours, *exact_result(torch_function(name), resolved), explained(name, lazy, algorithm))


@every_function
@pytest.mark.parametrize("algorithm", NAMES)
def test_negated(name, algorithm):
    """x.conj().imag is -x.imag by a bit."""
    for sample in quick(samples(name, torch.complex128), algorithm):
        negated = sample.transform(lambda t: t.conj().imag if isinstance(t, Tensor) else t)
        assert negated.input.is_neg()
        ours = call(our_function(name), negated, algorithm=algorithm)
        resolved = negated.transform(lambda t: t.resolve_neg().clone() if isinstance(t, Tensor) else t)
        assert_served(ours, *exact_result(torch_function(name), resolved), explained(name, resolved, algorithm))


@every_function
def test_gradients_of_conjugated_and_negated(name):
    for lazily, eagerly in (
        (torch.conj, lambda t: t.conj().resolve_conj()),
        (lambda t: t.conj().imag, lambda t: -t.imag),
    ):
        for sample in small(samples(name, torch.complex128), 120):
            found = []
            for seen in (lazily, eagerly):
                leaves = [t.detach().requires_grad_() for t in (sample.input, sample.args[0])]
                result = our_function(name)(*map(seen, leaves), **sample.kwargs)
                found.append(torch.autograd.grad(result.abs().pow(2).sum(), leaves))
            for ours, theirs in zip(*found, strict=True):
                assert torch.equal(ours, theirs)


@every_function
def test_expanded_and_overlapping_memory(name):
    """Stride 0, and windows that share their memory."""
    dims = int(name[-2])
    weight = torch.arange(9.0 * 3**dims).view(3, 3, *(3,) * dims)
    expanded = torch.arange(3.0).view(1, 3, *(1,) * dims).expand(2, 3, *(5,) * dims)
    overlapping = torch.arange(100.0).as_strided((2, 3, *(5,) * dims), (1, 2, *range(dims, 0, -1)))
    for x in (expanded, overlapping):
        for algorithm in INTEGER_EXACT:
            ours = our_function(name)(x, weight, algorithm=algorithm)
            assert torch.equal(ours, torch_function(name)(x.contiguous(), weight))


# -- vmap ------------------------------------------------------------------------------------------------------------


def mapped_along(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """`size` different tensors like this one, stacked along dim; itself if dim is None."""
    if tensor is None or dim is None:
        return tensor
    return torch.stack([tensor + i for i in range(size)], dim)


@every_function
@pytest.mark.parametrize("bias_dim", [None, 0, 1])
def test_vmap(name, bias_dim):
    """Over every choice of mapped arguments, against a loop; whole numbers, so that the sums must be equal."""
    for sample in small(whole_numbers(name), 60):
        weight, bias = sample.args
        if bias is None and bias_dim is not None:
            continue

        def function(x: Tensor, w: Tensor, b: Tensor | None = None, kwargs: dict = sample.kwargs) -> Tensor:
            return our_function(name)(x, w, b, **kwargs, algorithm="im2col")

        for x_dim, w_dim in itertools.product([None, 0, 1, -1], repeat=2):
            in_dims = (x_dim, w_dim, bias_dim)
            if in_dims == (None, None, None):
                continue
            given = [mapped_along(t, d, 3) for t, d in zip((sample.input, weight, bias), in_dims, strict=True)]
            ours = torch.func.vmap(function, in_dims)(*given)
            loop = [
                function(*(t if d is None else t.select(d, i) for t, d in zip(given, in_dims, strict=True)))
                for i in range(3)
            ]
            assert torch.equal(ours, torch.stack(loop)), in_dims


@every_function
def test_vmap_within_vmap(name):
    for sample in small(whole_numbers(name), 60):
        x, w = mapped_along(sample.input, 0, 2), mapped_along(sample.args[0], 0, 3)

        def function(x: Tensor, w: Tensor, kwargs: dict = sample.kwargs) -> Tensor:
            return our_function(name)(x, w, **kwargs, algorithm="shift")

        table = torch.func.vmap(torch.func.vmap(function, (None, 0)), (0, None))(x, w)
        for i, j in itertools.product(range(2), range(3)):
            assert torch.equal(table[i, j], function(x[i], w[j]))


@every_function
def test_gradients_per_sample(name):
    """vmap over grad: torch.func's way to a gradient for each example."""
    for sample in small(whole_numbers(name), 60):

        def loss(w: Tensor, x: Tensor, kwargs: dict = sample.kwargs) -> Tensor:
            return our_function(name)(x, w, **kwargs, algorithm="im2col").pow(2).sum()

        w, xs = sample.args[0], mapped_along(sample.input, 0, 3)
        ours = torch.func.vmap(torch.func.grad(loss), (None, 0))(w, xs)
        assert torch.equal(ours, torch.stack([torch.func.grad(loss)(w, x) for x in xs]))


@every_function
def test_jacobians(name):
    """jacrev is vmap of vjp, jacfwd vmap of jvp; the map is linear, so both are the same matrix."""
    sample = small(whole_numbers(name), 0)[0]

    def function(x: Tensor, w: Tensor) -> Tensor:
        return our_function(name)(x, w, **sample.kwargs, algorithm="im2col")

    given = sample.input, sample.args[0]
    theirs = torch.autograd.functional.jacobian(lambda x, w: torch_function(name)(x, w, **sample.kwargs), given)
    assert all(map(torch.equal, torch.func.jacrev(function, (0, 1))(*given), theirs))
    assert all(map(torch.equal, torch.func.jacfwd(function, (0, 1))(*given), theirs))


# -- the algorithm that is named serves, in every derivative -----------------------------------------------------------


@every_function
@pytest.mark.parametrize("algorithm", EVERYWHERE)
def test_the_algorithm_named_serves_forward_and_backward(name, algorithm, monkeypatch):
    """Every plan made in a call and in its gradients is the named algorithm's."""
    from plainconv import ops
    from plainconv.plan import forget

    made = []

    def watched(request, asked):
        assert isinstance(request.problem, ConvProblem)
        made.append((request.direction.name, asked))
        return original(request, asked)

    original = ops.plan
    forget()
    monkeypatch.setattr(ops, "plan", watched)
    sample = samples(name)[0]
    x, w, b = (t.detach().requires_grad_() for t in (sample.input, *sample.args))
    our_function(name)(x, w, b, **sample.kwargs, algorithm=algorithm).sum().backward()
    forget()
    assert sorted(made) == [(direction, algorithm) for direction in ("FORWARD", "GRAD_INPUT", "GRAD_WEIGHT")]


@every_function
def test_only_what_needs_a_gradient_is_computed(name, monkeypatch):
    from plainconv import ops
    from plainconv.plan import forget

    directions = []
    original = ops.remembered

    def watched(first, second, bias, make):
        directions.append(make.direction.name)
        return original(first, second, bias, make)

    monkeypatch.setattr(ops, "remembered", watched)
    sample = samples(name)[0]
    for asks in itertools.product([False, True], repeat=3):
        if not any(asks):
            continue
        tensors = [t.detach().requires_grad_(ask) for t, ask in zip((sample.input, *sample.args), asks, strict=True)]
        result = our_function(name)(*tensors, **sample.kwargs)
        forget()
        directions.clear()
        result.sum().backward()
        wanted = {"GRAD_WEIGHT": asks[1], ("FORWARD" if "transpose" in name else "GRAD_INPUT"): asks[0]}
        assert sorted(directions) == sorted(direction for direction, ask in wanted.items() if ask)


def test_a_refusal_is_a_whole_sentence():
    pattern = re.compile(r"algorithm='fft' refuses forward n1 c1 o1 x4 k2 int32 cpu: the Fourier transform rounds, .*")
    with pytest.raises(plainconv.AlgorithmRefused, match=pattern):
        plainconv.conv1d(torch.ones(1, 1, 4).int(), torch.ones(1, 1, 2).int(), algorithm="fft")
