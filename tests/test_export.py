"""torch.export, AOTInductor, ONNX and TorchScript: with the fused ops, and without them."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.drop_in import COLUMNS, KINDS, drop_in, rows
from torch import nn
from torch.export import Dim

import fused_mlp
from fused_mlp import BatchNormLeakyReLU, LinearReLU, Normalize

BATCH = ({0: Dim.DYNAMIC},)
kinds = pytest.mark.parametrize("kind", KINDS)
modes = pytest.mark.parametrize("mode", ["train", "eval"])


def pair_in(kind, mode, dropout=0.0):
    eager, fused = drop_in(kind, dropout)
    return eager.train(mode == "train"), fused.train(mode == "train")


def ops(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def assert_agrees(eager, module, **tolerance):
    """Assert that outputs agree for many batch sizes, and buffers after them."""
    for count in (16, 2, 5, 33):
        torch.testing.assert_close(
            module(rows(count)), eager(rows(count)), rtol=1e-4, atol=1e-5, **tolerance
        )
    buffers = dict(eager.named_buffers())
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("target")
@kinds
@modes
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_exported_program_holds_the_fused_ops(kind, mode, strict):
    eager, fused = pair_in(kind, mode)
    program = torch.export.export(fused, (rows(),), dynamic_shapes=BATCH, strict=strict)
    fused_ops = [op for op in ops(program) if op.startswith("fused_mlp.")]
    assert fused_ops == [f"fused_mlp.{name}.default" for name in KINDS[kind]]
    assert_agrees(eager, program.module())


@pytest.mark.usefixtures("target")
@kinds
@modes
@pytest.mark.parametrize("how", ["unfuse", "decompose"])
def test_exported_program_without_the_fused_ops(kind, mode, how):
    eager, fused = pair_in(kind, mode)
    if how == "unfuse":
        fused = fused_mlp.unfuse(fused)
    program = torch.export.export(fused, (rows(),), dynamic_shapes=BATCH)
    if how == "decompose":
        program = fused_mlp.decompose(program)
    assert not [op for op in ops(program) if not op.startswith(("aten.", "<built-in"))]
    assert_agrees(eager, program.module())


def test_decompose_serves_modules_that_unfuse_leaves():
    layers = nn.Sequential(
        Normalize(0, eps=1e-3), LinearReLU(COLUMNS, 8, dropout=0.2), BatchNormLeakyReLU(8)
    )
    program = torch.export.export(layers.eval(), (rows(),), dynamic_shapes=BATCH)
    program = fused_mlp.decompose(program, {})
    assert not [op for op in ops(program) if op.startswith("fused_mlp")]
    torch.testing.assert_close(program.module()(rows(7)), layers(rows(7)))


@kinds
def test_exported_dropout_draws_the_masks_of_the_module(kind):
    _, fused = pair_in(kind, "train", dropout=0.5)
    program = torch.export.export(fused, (rows(),), dynamic_shapes=BATCH)
    for module in (program.module(), fused_mlp.decompose(program).module()):
        torch.manual_seed(7)
        expected = copy.deepcopy(fused)(rows(32))
        torch.manual_seed(7)
        torch.testing.assert_close(module(rows(32)), expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(module(rows(32)), module(rows(32)))


def run_in_fresh_process(folder: Path, code: str) -> None:
    script = "import sys\nimport torch\nx = torch.load('input.pt')\n" + code
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_programs_run_in_a_fresh_process(tmp_path):
    """Without the fused ops the package need not even be there."""
    _, fused = pair_in("fuse(model)", "eval")
    program = torch.export.export(fused, (rows(),), dynamic_shapes=BATCH)
    torch.export.save(program, tmp_path / "fused.pt2")
    torch.export.save(fused_mlp.decompose(program), tmp_path / "plain.pt2")
    torch.save(rows(9), tmp_path / "input.pt")
    run_in_fresh_process(
        tmp_path,
        "plain = torch.export.load('plain.pt2').module()(x)\n"
        "assert not [name for name in sys.modules if name.startswith('fused_mlp')]\n"
        "import fused_mlp\n"
        "program = torch.export.load('fused.pt2')\n"
        "again = fused_mlp.decompose(program)\n"
        "torch.save([plain, program.module()(x), again.module()(x)], 'outputs.pt')\n",
    )
    for output in torch.load(tmp_path / "outputs.pt"):
        torch.testing.assert_close(output, fused(rows(9)), rtol=1e-4, atol=1e-5)


# Half a minute of C++ compiler time less: what is compiled is a thin wrapper around the ops.
QUICK = {
    "cpp_cache_precompile_headers": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
}


def package(program, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=QUICK
    )


def run_packaged(folder: Path, name: str, imports: str) -> torch.Tensor:
    run_in_fresh_process(
        folder,
        f"{imports}\nmodel = torch._inductor.aoti_load_package('{name}')\n"
        "torch.save(model(x), 'output.pt')\n",
    )
    return torch.load(folder / "output.pt")


@pytest.mark.slow
def test_aot_inductor_package_with_the_fused_op_runs_in_a_fresh_process(tmp_path):
    eager, fused = pair_in("FusedResearchNet", "eval")
    package(torch.export.export(fused, (rows(),), dynamic_shapes=BATCH), tmp_path / "model.pt2")
    torch.save(rows(9), tmp_path / "input.pt")
    output = run_packaged(tmp_path, "model.pt2", "import fused_mlp")
    torch.testing.assert_close(output, eager(rows(9)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@kinds
@modes
@pytest.mark.parametrize("form", ["fused", "unfused", "decomposed"])
def test_aot_inductor_package_of_any_form(kind, mode, form, tmp_path):
    eager, fused = pair_in(kind, mode)
    if form == "unfused":
        fused = fused_mlp.unfuse(fused)
    program = torch.export.export(fused, (rows(),), dynamic_shapes=BATCH)
    if form == "decomposed":
        program = fused_mlp.decompose(program)
    package(program, tmp_path / "model.pt2")
    torch.save(rows(9), tmp_path / "input.pt")
    imports = "import fused_mlp" if form == "fused" else ""
    output = run_packaged(tmp_path, "model.pt2", imports)
    torch.testing.assert_close(output, eager(rows(9)), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------- ONNX


def onnx_model(net, **options):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    return torch.onnx.export(net, (rows(),), dynamo=True, verbose=False, **options)


def onnx_run(model, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(model.model_proto.SerializeToString())
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(output)


@kinds
@pytest.mark.parametrize("dynamic", [False, True], ids=["one size", "any size"])
def test_onnx_model_agrees(kind, dynamic):
    eager, fused = pair_in(kind, "eval")
    model = onnx_model(fused, **({"dynamic_shapes": BATCH} if dynamic else {}))
    for count in (2, 5, 33) if dynamic else (16,):
        torch.testing.assert_close(
            onnx_run(model, rows(count)), eager(rows(count)), rtol=1e-4, atol=1e-5
        )
    assert {node.domain for node in model.model.graph} == {""}


@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode")
def test_onnx_model_of_a_training_network_is_eagers():
    models = [onnx_model(net) for net in pair_in("FusedResearchNet", "train")]
    nodes = [[node.op_type for node in model.model.graph] for model in models]
    assert nodes[0] == nodes[1]
    torch.testing.assert_close(onnx_run(models[1], rows()), onnx_run(models[0], rows()))


def test_onnx_model_of_an_exported_program():
    eager, fused = pair_in("fuse(model)", "eval")
    program = fused_mlp.decompose(torch.export.export(fused, (rows(),), dynamic_shapes=BATCH))
    model = onnx_model(program)
    torch.testing.assert_close(onnx_run(model, rows(5)), eager(rows(5)), rtol=1e-4, atol=1e-5)


def test_onnx_model_of_an_ordinary_mlp_agrees():
    layers = (
        nn.Linear(10, 9), nn.GELU(), nn.Dropout(0.2), nn.Linear(9, 7), nn.BatchNorm1d(7), nn.ReLU(),
        nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 3),
    )  # fmt: skip
    fused = nn.Sequential(*layers).eval()
    eager = copy.deepcopy(fused)
    assert len(fused_mlp.fuse(fused).fused) > 0
    model = onnx_model(fused)
    torch.testing.assert_close(onnx_run(model, rows()), eager(rows()), rtol=1e-4, atol=1e-5)
    assert {node.domain for node in model.model.graph} == {""}


# ---------------------------------------------------------------------------------- TorchScript


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(lambda kind=kind: drop_in(kind)[1], id=kind) for kind in KINDS),
        pytest.param(lambda: nn.Sequential(LinearReLU(3, 4)), id="LinearReLU"),
        pytest.param(lambda: BatchNormLeakyReLU(3), id="BatchNormLeakyReLU"),
        pytest.param(lambda: Normalize(), id="Normalize"),
    ],
)
def test_torchscript_error_names_export(make):
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script .* torch\.export\.export"):
        torch.jit.script(make())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@kinds
def test_unfused_network_compiles_to_torchscript(kind):
    eager, fused = pair_in(kind, "eval")
    scripted = torch.jit.script(fused_mlp.unfuse(copy.deepcopy(fused)))
    torch.testing.assert_close(scripted(rows(3)), eager(rows(3)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@kinds
def test_trace_records_torchs_own_ops(kind):
    eager, fused = pair_in(kind, "eval")
    fused(rows())
    traced = torch.jit.trace(fused, rows())
    torch.testing.assert_close(traced(rows(3)), eager(rows(3)))
    assert "fused_mlp" not in {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
