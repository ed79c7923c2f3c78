"""A chain of Linear layers in one node of the CPU library: its numbers, what it draws and keeps.

When modules run as one: test_mlp_modules.py. What it notices of them: test_mlp_changes.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support import (
    ACTIVATIONS,
    LAYOUTS,
    MULTIPLIES_BFLOAT16,
    assert_same_differentiable_gradients,
    assert_same_nonfinite,
    check_case,
    lay_out,
    mlp_case,
)
from torch import Tensor

from fused_mlp import activations, backends
from fused_mlp.dropout import draw_seed
from fused_mlp.functional import linear_act
from fused_mlp.ops import mlp

pytestmark = pytest.mark.skipif(
    backends.active_backend("cpu") != "native", reason="only the CPU library has this op"
)
KERNELS = torch.ops.fused_mlp_kernels
# bfloat16 where the processor multiplies it.
DTYPES = (torch.float32, torch.float64, *[torch.bfloat16] * MULTIPLIES_BFLOAT16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_every_activation_at_any_number_of_rows(dtype: torch.dtype, kind: str, p: float) -> None:
    """A handful of rows goes layer by layer, more of them by blocks of rows."""
    for rows in (0, 1, 2, 4, 5, 17, 65, 200):
        for last in ("none", kind):
            check_case(mlp_case((rows, 5), (33, 16, 7), (kind, kind, last), p, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["relu", "tanh", "silu", "leaky_relu, slope below 0"])
@pytest.mark.usefixtures("all_threads")
def test_larger(dtype: torch.dtype, kind: str) -> None:
    """On several threads, of widths at and beyond the cache."""
    for rows, features, widths in (
        (1500, 17, (256, 256, 6)),
        (3, 300, (270, 20)),
        (70, 257, (64, 300, 1)),
        (700, 3, (5, 3, 8, 2)),
    ):
        kinds = (*[kind] * (len(widths) - 1), "none")
        for p in (0.0, 0.4):
            check_case(mlp_case((rows, features), widths, kinds, p, dtype=dtype))


def test_every_layer_has_its_own_activation_and_dropout() -> None:
    kinds = tuple(ACTIVATIONS)
    for rows in (3, 40):
        check_case(mlp_case((rows, 6), range(20, 20 + len(kinds)), kinds, 0.2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norms", [(0,), (1,), (2,), (0, 1, 2), (0, 2)])
@pytest.mark.parametrize("kind", ["none", "relu", "leaky_relu", "leaky_relu, slope below 0"])
def test_batch_norms(dtype: torch.dtype, training: bool, norms: tuple[int, ...], kind: str) -> None:
    """Between any of the layers, of the batch's own statistics or constant ones."""
    kinds = [kind if layer in norms else "tanh" for layer in range(3)]
    for rows in (5, 40, 200):  # the gradients of two rows behind a batch norm are rounding alone
        for p in (0.0, 0.3):
            for more in ({}, {"affine": False}, {"biases": False}):
                options = {"norms": norms, "training": training, "dtype": dtype, **more}
                check_case(mlp_case((rows, 5), (33, 16, 7), kinds, p, **options))


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("training", [True, False])
def test_batch_norms_of_larger_layers(training: bool) -> None:
    for rows, features, widths in ((1500, 17, (256, 64, 6)), (70, 300, (270, 33, 1))):
        for norms in ((0,), (0, 1)):
            kinds = ("leaky_relu", "leaky_relu", "none")
            check_case(
                mlp_case((rows, features), widths, kinds, 0.2, norms=norms, training=training)
            )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["none", "leaky_relu"])
def test_gradients_through_batch_norms_are_differentiable(training: bool, kind: str) -> None:
    options = {"norms": (0, 1), "training": training, "dtype": torch.float64}
    case = mlp_case((5, 3), (4, 4, 2), (kind, kind, "tanh"), 0.3, **options)
    assert_same_differentiable_gradients(case)
    leaves = [t.requires_grad_() for t in case.tensors.values()]
    assert torch.autograd.gradcheck(case.fused, leaves)
    assert torch.autograd.gradgradcheck(case.fused, leaves)


@pytest.mark.parametrize("wanted", [*[(i,) for i in range(11)], (), (2, 9), (0, 8), (4, 10)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_about_a_batch_norm_that_nobody_wants(wanted: tuple[int, ...], p: float) -> None:
    case = mlp_case((7, 4), (9, 8, 2), ("relu", "leaky_relu", "none"), norms=(0, 1))
    tensors = list(case.tensors.values())
    x, weights, biases, affine = tensors[0], tensors[1:4], tensors[4:7], tensors[7:]
    norm_tensors = [*affine[:2], None, None, None, *affine[2:], None, None, None]
    handle = KERNELS.mlp_prepare(
        weights, biases, [1, 2, 0], [0.2] * 3, [p, p, 0.0], [0, 1], norm_tensors, [True] * 2,
        [0.1] * 2, [1e-5] * 2,
    )  # fmt: skip
    output, saved = KERNELS.mlp_prepared(x, handle)
    grad = torch.randn_like(output)
    everything = KERNELS.mlp_prepared_backward(grad, x, None, saved, handle, [True] * 11)
    mask = [i in wanted for i in range(11)]
    found = KERNELS.mlp_prepared_backward(grad, x, None, saved, handle, mask)
    assert len(found) == len(wanted)
    for i, ours in zip(wanted, found, strict=True):
        assert torch.equal(ours, everything[i])


def test_running_statistics_and_counters_are_those_of_torch() -> None:
    eager = [torch.nn.BatchNorm1d(6, momentum=0.3), torch.nn.BatchNorm1d(5, affine=False)]
    ours = [copy.deepcopy(norm) for norm in eager]
    weights = [torch.randn(6, 4), torch.randn(5, 6)]
    for rows in (2, 30):
        x = torch.randn(rows, 4)
        expected = eager[1](eager[0](x @ weights[0].t()).relu() @ weights[1].t())
        norms = {
            layer: (n.weight, n.bias, n.running_mean, n.running_var, n.num_batches_tracked, True,
                    n.momentum, n.eps)
            for layer, n in enumerate(ours)
        }  # fmt: skip
        for wants_grad in (False, True):
            with torch.set_grad_enabled(wants_grad):
                found = mlp.run(
                    x, mlp.Layers(weights, [None] * 2, [1, 0], [0.0] * 2, [0.0] * 2, norms)
                )
            torch.testing.assert_close(found, expected)
            for theirs, own in zip(eager, ours, strict=True):
                for a, b in zip(theirs.buffers(), own.buffers(), strict=True):
                    torch.testing.assert_close(a, b)
            if not wants_grad:
                expected = eager[1](eager[0](x @ weights[0].t()).relu() @ weights[1].t())


def test_statistics_of_a_single_row_are_refused_before_any_is_written() -> None:
    weights = [torch.randn(3, 3)] * 2
    means = [torch.zeros(3), torch.zeros(3)]
    tensors = [t for mean in means for t in (None, None, mean, torch.ones(3), None)]
    for rows, eps, second in ((1, 1e-5, means[1]), (4, 0.0, means[1]), (4, 1e-5, torch.zeros(2))):
        tensors[7] = second
        handle = KERNELS.mlp_prepare(
            weights, [None] * 2, [0, 0], [0.0] * 2, [0.0] * 2, [0, 1], tensors, [True] * 2,
            [0.1] * 2, [1e-5, eps],
        )  # fmt: skip
        with pytest.raises(RuntimeError, match=r"more than one row|running_mean"):
            KERNELS.mlp_prepared(torch.randn(rows, 3), handle)
        assert not any(map(torch.any, means))


@pytest.mark.parametrize("shape", [(6,), (2, 1, 3, 6), (0, 3, 6), (3, 0, 6), (1, 6)])
def test_batch_shapes(shape: tuple[int, ...]) -> None:
    for biases in (True, False):
        check_case(mlp_case(shape, (9, 4), ("gelu", "tanh"), 0.3, biases))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [3, 11])
def test_layouts(layout: str, rows: int) -> None:
    case = mlp_case((rows, 18), (20, 13), ("tanh", "none"))
    grad = torch.randn(rows, 13)
    check_case(case, [lay_out(t, layout) for t in case.tensors.values()], lay_out(grad, layout))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_nonfinite(kind: str, value: float) -> None:
    for rows in (2, 9):
        for place in ("input", "weights[0]", "biases[0]", "weights[1]"):
            case = mlp_case((rows, 11), (13, 5), (kind, "none"), 0.4)
            case.tensors[place].view(-1)[4] = value
            tensors = list(case.tensors.values())
            with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's GELU of infinity is NaN
                assert_same_nonfinite(case.fused(*tensors), case.plain(*tensors))


@pytest.mark.parametrize("kind", ["none", "leaky_relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_are_differentiable(kind: str, p: float) -> None:
    case = mlp_case((4, 3), (5, 2), (kind, kind), p, dtype=torch.float64)
    assert_same_differentiable_gradients(case)
    leaves = [t.requires_grad_() for t in case.tensors.values()]
    assert torch.autograd.gradcheck(case.fused, leaves)
    assert torch.autograd.gradgradcheck(case.fused, leaves)


def prepare(*arguments) -> Tensor:
    """Hand over layers without a batch norm."""
    return KERNELS.mlp_prepare(*arguments, [], [], [], [], [])


def layers_of(case) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    tensors = list(case.tensors.values())
    layers = (len(tensors) - 1) // 2
    return tensors[0], tensors[1 : 1 + layers], tensors[1 + layers :]


@pytest.mark.parametrize(
    ("rows", "widths"), [(3, (9, 8, 2)), (70, (9, 8, 2)), (20, (130, 120, 2)), (20, (300, 8, 2))]
)
@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (5,), (6,), (2, 4), (0, 6), ()])
def test_gradients_that_nobody_wants_are_not_computed(
    rows: int, widths: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    """Nor anything below the first layer that has one, whose mask of outputs is empty."""
    x, weights, biases = layers_of(mlp_case((rows, 4), widths, ("tanh", "relu", "none")))
    handle = prepare(weights, biases, [6, 1, 0], [0.0] * 3, [0.2, 0.0, 0.0])
    output, saved = KERNELS.mlp_prepared(x, handle)
    grad = torch.randn_like(output)
    backward = KERNELS.mlp_prepared_backward
    everything = backward(grad, x, output, saved, handle, [True] * 7)
    found = backward(grad, x, output, saved, handle, [i in wanted for i in range(7)])
    assert len(found) == len(wanted)
    for i, ours in zip(wanted, found, strict=True):
        assert torch.equal(ours, everything[i])


def test_backward_without_a_mask_gives_the_gradients_of_all_parameters_there_are() -> None:
    x, weights, biases = layers_of(mlp_case((6, 4), (9, 2), ("tanh", "tanh")))
    handle = prepare(weights, [None, biases[1]], [6, 6], [0.0] * 2, [0.0] * 2)
    output, saved = KERNELS.mlp_prepared(x, handle)
    grad = torch.randn_like(output)
    mask = [False, True, True, False, True]
    found = KERNELS.mlp_prepared_backward(grad, x, output, saved, handle, None)
    expected = KERNELS.mlp_prepared_backward(grad, x, output, saved, handle, mask)
    assert [t.shape for t in found] == [(9, 4), (2, 9), (2,)]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("rows", [2, 50])
def test_masks_are_those_of_single_layers_whose_seeds_offset_counts_the_layers(rows: int) -> None:
    x, weights, biases = layers_of(mlp_case((rows, 4), (40, 30, 20), ("tanh", "silu", "relu")))
    options = ([6, 5, 1], [0.0] * 3, [0.3, 0.5, 0.4])
    torch.manual_seed(7)
    seed = draw_seed("cpu")
    hidden = x
    for layer, name in enumerate(("tanh", "silu", "relu")):
        hidden = torch.ops.fused_mlp.linear_act(
            hidden, weights[layer], biases[layer], name, dropout_p=options[2][layer],
            seed=mlp.layer_seed(seed, layer),
        )  # fmt: skip
    state = torch.get_rng_state()
    with torch.no_grad():
        for wants_grad in (False, True):
            torch.manual_seed(7)
            with torch.set_grad_enabled(wants_grad):
                weights[0].requires_grad_(wants_grad)
                torch.testing.assert_close(
                    mlp.run(x, mlp.Layers(weights, biases, *options, {})), hidden
                )
            assert torch.equal(torch.get_rng_state(), state)


def test_a_row_has_the_same_bits_alone_and_in_a_batch_and_on_any_number_of_threads() -> None:
    # Few enough rows that none of them are torch's (fused_mlp/on_chip.py: runs_blas).
    for rows, widths in ((260, (64, 64, 2)), (250, (300, 40, 1))):
        x, weights, biases = layers_of(mlp_case((rows, 10), widths, ("tanh", "gelu", "none")))
        options = ([6, 3, 0], [0.0] * 3, [0.0] * 3)
        whole = mlp.run(x, mlp.Layers(weights, biases, *options, {}))
        for size in (1, 2, 3, 5, 64, 113):
            parts = [
                mlp.run(part, mlp.Layers(weights, biases, *options, {})) for part in x.split(size)
            ]
            assert torch.equal(torch.cat(parts), whole), size
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert torch.equal(mlp.run(x, mlp.Layers(weights, biases, *options, {})), whole)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_only_what_the_derivatives_need_is_kept(kind: str) -> None:
    """The outputs of hidden layers in one tensor; beside them what GELU and SiLU saw."""
    case = mlp_case((50, 6), (20, 30, 4), (kind, kind, "none"))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.fused(*(t.requires_grad_() for t in case.tensors.values()))
    twice = kind.split(",")[0] in ("gelu", "silu") or "below" in kind
    given = {t.data_ptr() for t in case.tensors.values()}
    own = [t.numel() for t in kept if t is not None and t.data_ptr() not in given]
    assert own == [50 * 50 * (2 if twice else 1)]


def test_what_is_kept_is_what_single_layers_keep() -> None:
    """The library works out for itself what fused_mlp/activations.py says."""
    for number in activations.TABLE:
        for slope in (-0.5, 0.0, 0.5):
            for p in (0.0, 0.5):
                weight = torch.randn(3, 2)
                handle = prepare([weight], [None], [number], [slope], [p])
                _, saved = KERNELS.mlp_prepared(torch.randn(8, 2), handle)
                seen = activations.kept(number, slope, p) == activations.INPUT
                assert saved.numel() == 24 * seen + 4 * (p > 0)


def test_handle_is_not_taken_from_a_copy_or_another_op() -> None:
    x, weights, biases = layers_of(mlp_case((6, 4), (9, 2), ("tanh", "none")))
    handle = prepare(weights, biases, [6, 0], [0.0] * 2, [0.0] * 2)
    expected = linear_act(
        linear_act(x, weights[0], biases[0], "tanh"), *weights[1:], biases[1], "none"
    )
    torch.testing.assert_close(KERNELS.mlp_evaluate(x, handle), expected)
    network = KERNELS.research_net_prepare(
        weights, biases, None, None, torch.zeros(9), torch.ones(9), None, False, [], 0.1, 1e-5, 0.01
    )
    for wrong in (handle.clone(), torch.zeros_like(handle), handle[:-1], x, network):
        with pytest.raises(RuntimeError, match="mlp_prepare"):
            KERNELS.mlp_evaluate(x, wrong)
    with pytest.raises(RuntimeError, match="research_net_prepare"):
        KERNELS.research_net_evaluate(x, handle)


def test_tensors_that_changed_under_the_handle_raise_before_anything_is_read() -> None:
    x, weights, biases = layers_of(mlp_case((6, 4), (9, 2), ("tanh", "none")))
    handle = prepare(weights, biases, [6, 0], [0.0] * 2, [0.0] * 2)
    output, saved = KERNELS.mlp_prepared(x, handle)
    for changed, message in ((x[:, 1:], r"weights\[0\]"), (x.double(), r"weights\[0\]"),
                             (x.half(), "float32 or float64")):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            KERNELS.mlp_prepared(changed, handle)
    for arguments in (
        (output[1:], x, output, saved, handle, None),
        (output, x[1:], output, saved, handle, None),
        (output, x, output, saved[1:], handle, None),
        (output.double(), x, output, saved, handle, None),
        (output, x, output, saved, handle, [True] * 4),
    ):
        with pytest.raises(RuntimeError, match="mlp_backward"):
            KERNELS.mlp_prepared_backward(*arguments)
    biases[0].data = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"biases\[0\]"):
        KERNELS.mlp_evaluate(x, handle)


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (33, ([0] * 33, [0.0] * 33, [0.0] * 33), "expected 1 to 32"),
        (2, ([0], [0.0] * 2, [0.0] * 2), "expected 1 to 32"),
        (1, ([7], [0.0], [0.0]), "activation"),
        (1, ([0], [0.0], [1.5]), "dropout_p must be between 0 and 1, but got 1.5"),
    ],
)
def test_layers_that_make_no_chain_are_refused(layers: int, options, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        prepare([torch.randn(2, 2)] * layers, [None] * layers, *options)


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        (([2], [None] * 5, [True], [0.1], [1e-5]), "no layer 2 for a batch norm"),
        (([-1], [None] * 5, [True], [0.1], [1e-5]), "no layer -1 for a batch norm"),
        (([1, 1], [None] * 10, [True] * 2, [0.1] * 2, [1e-5] * 2), "or it has one"),
        (([1], [None] * 4, [True], [0.1], [1e-5]), "five tensors, a mode, a momentum and an eps"),
        (([1], [None] * 5, [True], [0.1], []), "five tensors, a mode, a momentum and an eps"),
        (([0], [None] * 5, [True], [0.1], [1e-5]), "activation"),
    ],
)
def test_batch_norms_that_stand_nowhere_are_refused(norms, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        KERNELS.mlp_prepare(
            [torch.randn(2, 2)] * 2, [None] * 2, [6, 0], [0.0] * 2, [0.0] * 2, *norms
        )
