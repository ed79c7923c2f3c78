"""The networks in ONNX Runtime, OpenVINO, JAX and attorch.

Data is converted before anything is timed.
"""

from __future__ import annotations

import copy
import itertools
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .cases import NETWORK
from .errors import Unsupported
from .workload import Workload

if TYPE_CHECKING:
    from .rivals import Contestant


def _require(
    workload: Workload, name: str, modes: tuple[str, ...] = ("eval", "train"), device: str = "cpu"
) -> None:
    case = workload.case
    if case.op != NETWORK:
        raise Unsupported(f"{name}: networks only")
    if case.mode not in modes:
        raise Unsupported(f"{name}: no training")
    if case.dtype != torch.float32 or torch.device(case.device).type != device:
        raise Unsupported(f"{name}: float32 on {device} only")


def _contestant(step: Any, results: Any) -> Contestant:
    from .rivals import Contestant

    return Contestant(step, results)


def _folded(model: nn.Module) -> list[tuple[Tensor, Tensor, str]]:
    """Return (weight, bias, activation) of each layer, the batch norm folded into its Linear."""
    layers: list[tuple[Tensor, Tensor, str]] = []
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Linear):
            layers.append((module.weight.detach(), module.bias.detach(), ""))
        elif isinstance(module, nn.BatchNorm1d):
            weight, bias, _ = layers[-1]
            scale = module.weight.detach() * (module.running_var + module.eps).rsqrt()
            shifted = (bias - module.running_mean) * scale + module.bias.detach()
            layers[-1] = (weight * scale[:, None], shifted, "")
        elif isinstance(module, nn.ReLU | nn.LeakyReLU):
            layers[-1] = (*layers[-1][:2], type(module).__name__)
    return layers


def onnxruntime(workload: Workload) -> Contestant:
    """Prepare a network for ONNX Runtime."""
    _require(workload, "ONNX Runtime", ("eval",))
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants, last = [], [], "x"
    for i, (weight, bias, activation) in enumerate(_folded(workload.eager)):
        constants += [
            numpy_helper.from_array(weight.contiguous().numpy(), f"w{i}"),
            numpy_helper.from_array(bias.contiguous().numpy(), f"b{i}"),
        ]
        nodes.append(helper.make_node("Gemm", [last, f"w{i}", f"b{i}"], [f"z{i}"], transB=1))
        last = f"z{i}"
        if activation:
            kind = {"ReLU": "Relu", "LeakyReLU": "LeakyRelu"}[activation]
            options = {"alpha": 0.01} if kind == "LeakyRelu" else {}
            nodes.append(helper.make_node(kind, [last], [f"y{i}"], **options))
            last = f"y{i}"
    case = workload.case
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [case.batch, case.sizes[0]])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [case.batch, case.sizes[-1]])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    arrays = [{"x": x.numpy()} for x, _ in workload.inputs]
    following = itertools.cycle(arrays).__next__
    run = session.run
    return _contestant(
        lambda: run(None, following()), lambda: [torch.from_numpy(run(None, arrays[0])[0])]
    )


def openvino(workload: Workload) -> Contestant:
    """Prepare a network for OpenVINO."""
    _require(workload, "OpenVINO", ("eval",))
    import openvino as ov

    example = workload.inputs[0][0]
    converted = ov.convert_model(
        copy.deepcopy(workload.eager), example_input=example, input=[tuple(example.shape)]
    )
    compiled = ov.compile_model(
        converted,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()
    arrays = [[x.numpy()] for x, _ in workload.inputs]
    following = itertools.cycle(arrays).__next__

    def step() -> object:
        return request.infer(following(), share_inputs=True, share_outputs=True)

    def results() -> list[Tensor]:
        return [torch.from_numpy(request.infer(arrays[0])[0].copy())]

    return _contestant(step, results)


def jax(workload: Workload) -> Contestant:
    """Prepare a network for JAX on the CPU."""
    _require(workload, "JAX")
    if torch.get_num_threads() == 1:  # read when JAX starts
        os.environ.setdefault(
            "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax as jx
    import jax.numpy as jnp

    eager, case = workload.eager, workload.case
    linears = [m for m in eager.modules() if isinstance(m, nn.Linear)]
    norm: Any = next(m for m in eager.modules() if isinstance(m, nn.BatchNorm1d))

    def array(tensor: Any) -> Any:
        return jnp.array(tensor.detach().numpy())

    parameters: list[Any] = []
    for position, linear in enumerate(linears):
        parameters += [array(linear.weight), array(linear.bias)]
        if position == len(linears) - 2:
            parameters += [array(norm.weight), array(norm.bias)]
    running = (array(norm.running_mean), array(norm.running_var))
    train, rows = case.mode == "train", case.batch

    def forward(parameters: Any, x: Any, running: Any, key: Any, p: float) -> Any:
        rest = iter(parameters)
        for layer in range(len(linears) - 2):
            x = jx.nn.relu(x @ next(rest).T + next(rest))
            if train and p > 0:
                keep = jx.random.bernoulli(jx.random.fold_in(key, layer), 1 - p, x.shape)
                x = jnp.where(keep, x / (1 - p), 0)
        x = x @ next(rest).T + next(rest)
        mean, var = running
        if train:
            mean, var = x.mean(0), x.var(0)
            unbiased = var * rows / (rows - 1)
            running = (running[0] * 0.9 + 0.1 * mean, running[1] * 0.9 + 0.1 * unbiased)
        x = (x - mean) * jx.lax.rsqrt(var + norm.eps) * next(rest) + next(rest)
        x = jx.nn.leaky_relu(x, 0.01)
        return x @ next(rest).T + next(rest), running

    def make(p: float) -> Any:
        def evaluate(x: Any) -> Any:
            return [forward(parameters, x, running, None, p)[0]]

        def update(parameters: Any, running: Any, x: Any, grad: Any, key: Any) -> Any:
            key, now = jx.random.split(key)
            output, pull, running = jx.vjp(
                lambda w: forward(w, x, running, now, p), parameters, has_aux=True
            )
            return [output, *pull(grad)[0]], running, key

        return jx.jit(update) if train else jx.jit(evaluate)

    pairs = [(array(x), array(g)) for x, g in workload.inputs]
    following = itertools.cycle(pairs).__next__
    timed = make(case.dropout)
    state = {"running": running, "key": jx.random.key(0)}

    def step() -> object:
        x, grad = following()
        if not train:
            return timed(x)[0].block_until_ready()
        out, state["running"], state["key"] = timed(
            parameters, state["running"], x, grad, state["key"]
        )
        return jx.block_until_ready(out)

    def results() -> list[Tensor]:
        x, grad = pairs[0]
        out = make(0.0)
        found = out(parameters, running, x, grad, jx.random.key(0))[0] if train else out(x)
        return [torch.from_numpy(_numpy(value)) for value in found]

    return _contestant(step, results)


def _numpy(value: Any) -> Any:
    import numpy

    return numpy.array(value)


def attorch(workload: Workload) -> Contestant:
    """Prepare a network of attorch's layers, which run on CUDA alone.

    Its Linear takes the ReLU with it and holds its weight transposed.
    """
    _require(workload, "attorch", device="cuda")
    import attorch as at

    layers: list[nn.Module] = []
    for module in workload.eager.modules():
        if isinstance(module, nn.Linear):
            layers.append(at.Linear(module.in_features, module.out_features))
        elif isinstance(module, nn.ReLU):
            layers[-1].act_func = "relu"
        elif isinstance(module, nn.Dropout):
            layers.append(at.Dropout(module.p))
        elif isinstance(module, nn.BatchNorm1d):
            layers.append(at.BatchNorm1d(module.num_features, module.eps, module.momentum))
        elif isinstance(module, nn.LeakyReLU):
            layers.append(at.LeakyReLU(module.negative_slope))
    model = nn.Sequential(*layers).to(workload.case.device)
    theirs = [m for m in model if any(True for _ in m.parameters())]
    ours = [m for m in workload.eager.modules() if isinstance(m, nn.Linear | nn.BatchNorm1d)]
    transpose = {m: isinstance(m, nn.Linear) for m in theirs}
    with torch.no_grad():
        for to, of in zip(theirs, ours, strict=True):
            state = of.state_dict()
            if transpose[to]:
                state["weight"] = state["weight"].t()
            to.load_state_dict(state)
    model.train(workload.case.mode == "train")

    def results() -> list[Tensor]:
        found = workload.results(model)
        if workload.case.mode == "eval":
            return found
        turned = [transpose[m] and name == "weight" for m in theirs for name, _ in
                  m.named_parameters()]  # fmt: skip
        gradients = [g.t() if t else g for g, t in zip(found[1:], turned, strict=True)]
        return [found[0], *gradients]

    return _contestant(workload.step(model, list(model.parameters())), results)
