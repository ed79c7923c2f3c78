"""The ops of a chain that graphs of torch.compile hold, called by themselves, and wrong arguments.

They are public to whoever looks for them: whatever they are given, they raise or compute.
"""

from __future__ import annotations

import math
import random
import struct

import pytest
import torch
from support import MULTIPLIES_BFLOAT16
from support.memory import assert_equal_bytes
from torch import Tensor

from fused_mlp import backends
from fused_mlp.activations import LEAKY_RELU, NONE, RELU, TANH
from fused_mlp.ops.traced_mlp import mlp
from fused_mlp.text import numbers_of, text_of

KERNELS = torch.ops.fused_mlp_kernels
BIAS, DROPS, NORM, TRAINS, AFFINE = 8, 16, 32, 64, 128  # fused_mlp/ops/compiled_mlp.py

pytestmark = pytest.mark.skipif(
    backends.active_backend("cpu") != "native", reason="only the CPU library has these ops"
)


def arguments(dtype=torch.float32, p: float = 0.3, rows: int = 6, width: int = 5) -> list:
    """Return those of a chain with all that there may be: input, parameters, buffers, layers."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 4), (width, 4), (3, width), (2, 3), (width,), (2,), (width,), (width,)]
    x, *parameters = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    buffers = [
        torch.zeros(width, dtype=dtype), torch.ones(width, dtype=dtype), torch.tensor(0),
        torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype),
    ]  # fmt: skip
    first = [LEAKY_RELU | BIAS | DROPS | NORM | TRAINS | AFFINE, 0.2, p, 0.1, 1e-5]
    return [x, parameters, buffers, text(0, *first, RELU | NORM, 0.1, 1e-3, TANH | BIAS)]


def text(*numbers: float) -> str:
    return " ".join(map(str, numbers))


def prepared(x: Tensor, parameters: list, buffers: list, layers: str) -> Tensor:
    """Return the same chain as a module hands it over."""
    w0, w1, w2, b0, b2, gamma, beta = parameters
    norms = [gamma, beta, *buffers[:3], None, None, *buffers[3:], None]
    _, _, slope, p, m0, e0, _, m1, e1, _ = map(float, layers.split())
    return KERNELS.mlp_prepare(
        [w0, w1, w2], [b0, None, b2], [LEAKY_RELU, RELU, TANH], [slope, 0.0, 0.0], [p, 0.0, 0.0],
        [0, 1], norms, [True, False], [m0, m1], [e0, e1],
    )  # fmt: skip


def test_equal_calls_give_equal_bytes_whatever_was_in_memory() -> None:
    def prepare():
        given = arguments(p=0.0)
        return lambda: KERNELS.mlp_compiled(*given)

    assert_equal_bytes(prepare)


# Bits of input, weights, biases, and weight and bias of each layer's batch norm.
MASK = 0b11_101_111_1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("rows", "width"), [(6, 5), (70, 33), (9, 300)])
def test_a_step_is_that_of_the_prepared_chain(dtype, p, rows, width):
    if dtype == torch.bfloat16 and not MULTIPLIES_BFLOAT16:
        pytest.skip("this processor leaves bfloat16 to other ops")
    given, again = arguments(dtype, p, rows, width), arguments(dtype, p, rows, width)
    torch.manual_seed(1)
    output, saved = KERNELS.mlp_compiled(*given)
    handle = prepared(*again)
    torch.manual_seed(1)
    expected, expected_saved = KERNELS.mlp_prepared(again[0], handle)
    assert torch.equal(output, expected)
    assert all(map(torch.equal, given[2], again[2])), "running statistics"
    grad = torch.ones_like(output)
    x, weights = given[0], given[1][:3]
    found = KERNELS.mlp_compiled_backward(grad, x, weights, output, saved, MASK)
    flags = [True] * 4 + [True, False, True] + [True, True, False, False]
    wanted = KERNELS.mlp_prepared_backward(grad, x, expected, expected_saved, handle, flags)
    assert len(found) == len(wanted) == 8
    assert all(map(torch.equal, found, wanted))
    for bits in (0, 1, 0b1010, 0b10_0000_0000):
        some = KERNELS.mlp_compiled_backward(grad, x, weights, output, saved, bits)
        places = [bit for bit in range(11) if MASK >> bit & 1]
        everything = dict(zip(places, found, strict=False))
        assert all(map(torch.equal, some, [everything[b] for b in places if bits >> b & 1]))
        assert len(some) == bits.bit_count()


def test_evaluation_is_that_of_the_prepared_chain():
    x, parameters, buffers, trained = arguments(p=0.0)
    w0, w1, w2, b0, b2, gamma, beta = parameters
    mean0, var0, _, mean1, var1 = buffers
    norms = [gamma, beta, mean0, var0, None, None, None, mean1, var1, None]
    handle = KERNELS.mlp_prepare(
        [w0, w1, w2], [b0, None, b2], [LEAKY_RELU, RELU, TANH], [0.2, 0.0, 0.0], [0.0] * 3, [0, 1],
        norms, [False] * 2, [0.1] * 2, [1e-5, 1e-3],
    )  # fmt: skip
    expected = KERNELS.mlp_evaluate(x, handle)
    layers = change_layer(trained, 0, lambda code: code & ~TRAINS)
    tensors = [*parameters, mean0, var0, mean1, var1]
    assert torch.equal(KERNELS.mlp_compiled_evaluate(x, tensors, layers), expected)
    with pytest.raises(RuntimeError, match="batch norms in evaluation"):
        KERNELS.mlp_compiled_evaluate(x, [*parameters, *buffers], trained)
    with pytest.raises(RuntimeError, match="7 parameters and 4 buffers for these layers"):
        KERNELS.mlp_compiled_evaluate(x, tensors[1:], layers)


def test_numbers_arrive_as_they_were_written():
    source = random.Random(0)
    x, weight = torch.full((1, 1), -1.0, dtype=torch.float64), torch.ones(1, 1).double()
    for _ in range(500):
        (slope,) = struct.unpack("d", source.randbytes(8))
        layers = text_of((0, LEAKY_RELU, slope))
        if math.isfinite(slope):
            assert KERNELS.mlp_compiled_evaluate(x, [weight], layers).item() == -slope
            assert numbers_of(layers) == [0, LEAKY_RELU, slope]
        else:
            assert layers is None


PLACES = (1, 6, 9)  # of the layers' numbers, behind that of the call


def change_layer(layers: str, layer: int, change) -> str:
    """Return the text with another number for a layer."""
    numbers = layers.split()
    numbers[PLACES[layer]] = str(change(int(numbers[PLACES[layer]])))
    return " ".join(numbers)


def change_number(place: int, value: object):
    """Return what puts another number at this place of a text."""
    return lambda layers: " ".join(
        str(value) if at == place else number for at, number in enumerate(layers.split())
    )


def changed(place: int, value) -> list:
    given = arguments()
    given[place] = value(given[place])
    return given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (changed(3, lambda layers: ""), "layers is empty"),
        (changed(3, lambda layers: "0"), "expected 1 to 32 layers"),
        (changed(3, lambda layers: text(0, *[NONE] * 33)), "expected 1 to 32 layers"),
        (changed(3, change_number(1, -1)), "no layer has the number -1"),
        (changed(3, change_number(1, 1 << 40)), "no layer has the number"),
        (changed(3, change_number(1, 0.5)), "no layer has the number 0.5"),
        (changed(3, lambda layers: text(0, NONE | TRAINS)), "no layer has the number 64"),
        (changed(3, lambda layers: text(0, TANH | NORM)), "no activation of number 6"),
        (changed(3, lambda layers: text(0, 7)), "no activation of number 7"),
        (changed(3, lambda layers: f"{layers} {NONE}"), "8 parameters and 5 buffers"),
        (changed(3, lambda layers: text(0, LEAKY_RELU)), "layer 2 has 1 options"),
        (changed(3, lambda layers: f"{layers} nan"), "numbers separated by blanks, but got '0 "),
        (changed(3, change_number(4, "1e")), "numbers separated by blanks"),
        (changed(3, lambda layers: layers.replace(" ", ", ")), "numbers separated by blanks"),
        (changed(3, change_number(3, 1.5)), "between 0 and 1, but got 1.5"),
        (changed(3, change_number(5, 0.0)), "an eps in training"),
        (changed(1, lambda parameters: parameters[:-1]), "got 6 and 5"),
        (changed(2, lambda buffers: [*buffers, buffers[0]]), "got 7 and 6"),
        (changed(0, lambda x: x[:1]), "more than one row"),
        (changed(0, lambda x: x[:, 1:]), r"weights\[0\]"),
        (changed(0, lambda x: x.double()), "batch norms must have the input's dtype"),
        (changed(0, lambda x: x[0]), "two dimensions before a batch norm"),
        (changed(1, lambda p: [p[0].t(), *p[1:]]), r"weights\[0\]"),
        (changed(1, lambda p: [*p[:3], p[3][1:], *p[4:]]), r"biases\[0\]"),
        (changed(1, lambda p: [*p[:5], p[5][1:], p[6]]), "weight must be a CPU vector of 5"),
        (changed(2, lambda b: [b[0][1:], *b[1:]]), "running_mean must be a CPU vector of 5"),
        (changed(2, lambda b: [*b[:2], b[0], *b[3:]]), "num_batches_tracked must be one int64"),
    ],
)
def test_arguments_that_make_no_chain_are_refused(given, message):
    before = [buffer.clone() for buffer in given[2]]
    with pytest.raises(RuntimeError, match=message):
        KERNELS.mlp_compiled(*given)
    assert all(map(torch.equal, given[2], before))


def test_backward_refuses_what_does_not_fit():
    x, parameters, *rest = arguments()
    weights = parameters[:3]
    output, saved = KERNELS.mlp_compiled(x, parameters, *rest)
    right = [output, x, weights, output, saved, MASK]
    for place, wrong in (
        (0, output[1:]), (0, output.double()), (1, x[1:]), (1, x.double()), (2, weights[:2]),
        (2, []), (2, [*weights[:2], weights[2].double()]), (3, None), (3, output[1:]),
        (4, saved[1:]), (4, saved[:-2]), (4, saved[:0]), (4, saved.double()), (4, saved.long()),
        (4, saved[::2]), (4, torch.cat([saved, saved])), (4, torch.zeros_like(saved)),
        (5, 1 << 5), (5, 1 << 40), (5, -1), (5, 1 << 9 | 1 << 11),
    ):  # fmt: skip
        given = [*right[:place], wrong, *right[place + 1 :]]
        if (place, wrong) == (5, 1 << 5):  # of a bias that there is not: as if there were one
            assert KERNELS.mlp_compiled_backward(*given)[0].shape == (3,)
            continue
        with pytest.raises(RuntimeError, match=r"fused_mlp: mlp|no activation"):
            KERNELS.mlp_compiled_backward(*given)


def test_backward_survives_any_numbers_in_what_forward_saved():
    x, parameters, *rest = arguments()
    weights = parameters[:3]
    output, saved = KERNELS.mlp_compiled(x, parameters, *rest)
    source = random.Random(0)
    returned, said = 0, set()
    for _ in range(3000):
        words = saved.clone().view(torch.int64)
        for _ in range(source.choice((1, 1, 2, 5))):
            value = source.choice(
                (0, 1, 7, 8, 39, 111, 255, 256, -1, 1 << 62, source.getrandbits(62))
            )
            words[-source.choice(range(1, 14))] = value
        try:
            KERNELS.mlp_compiled_backward(
                output, x, weights, output, words.view(torch.float32), source.getrandbits(11)
            )
            returned += 1
        except RuntimeError as error:
            said.add(str(error))
    assert 0 < returned < 3000
    assert all("fused_mlp: " in message for message in said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: "x"}, "argument 'input' must be Tensor"),
        ({1: []}, "expected at least 1 weight"),
        ({2: [None]}, "expected at least 1 weight"),
        ({3: [RELU, 9]}, "no activation of number 9"),
        ({3: [TANH, NONE]}, "no activation of number 6"),  # behind the batch norm
        ({5: [0.0, 1.5]}, r"dropout_p\[1\]"),
        ({3: [RELU, RELU], 6: [1]}, r"shape \(2,\)"),
        ({6: [2]}, "normed_layers must be ascending layers"),
        ({6: [0, 0]}, "two parameters, three buffers"),
        ({7: [None]}, "two parameters, three buffers"),
        ({8: [None] * 2}, "two parameters, three buffers"),
        ({11: [-1.0]}, "eps must not be negative"),
        ({0: torch.randn(1, 4)}, "more than 1 value per channel"),
        ({0: torch.randn(4)}, "2D input"),
        ({0: torch.randn(6, 3)}, r"weights\[0\]"),
        ({0: torch.randn(6, 4).long()}, "float32, float64"),
    ],
)
def test_the_public_op_names_what_is_wrong(change, message):
    weights = [torch.randn(3, 4), torch.randn(2, 3)]
    buffers = [torch.zeros(3), torch.ones(3), torch.tensor(0)]
    given = [
        torch.randn(6, 4), weights, [None, torch.randn(2)], [RELU, TANH], [0.0, 0.0], [0.0, 0.3],
        [0], [torch.ones(3), None], buffers, [True], [0.1], [1e-5],
    ]  # fmt: skip
    assert mlp(*given).shape == torch.ops.fused_mlp.mlp(*given).shape == (6, 2)
    assert buffers[2].item() == 2
    for place, value in change.items():
        given[place] = value
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        mlp(*given)
    assert buffers[2].item() == 2


def test_another_backend_says_for_which_a_graph_was_compiled():
    given = arguments()
    output, saved = KERNELS.mlp_compiled(*given)
    with backends.use_backend("reference"):
        for call in (
            lambda: KERNELS.mlp_compiled(*given),
            lambda: KERNELS.mlp_compiled_evaluate(given[0], given[1], given[3]),
            lambda: KERNELS.mlp_compiled_backward(
                output, given[0], given[1][:3], output, saved, MASK
            ),
        ):
            with pytest.raises(RuntimeError, match="compiled for the native CPU backend"):
                call()
