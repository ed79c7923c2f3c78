"""The scripts in examples/ run, and what they train is what the eager network becomes."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.networks import kernels_run
from torch import nn

import fused_mlp
from fused_mlp import FusedResearchNet
from fused_mlp.eager import IntelligentResearchNetwork

# All of them: CI installs the extra `examples` before its slow tests.
pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str) -> dict:
    """Run a script in this process and return its names."""
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def torchrun(processes: int, *arguments: str) -> list[str]:
    """Return the lines a script prints under torchrun."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), *arguments]
    finished = subprocess.run(
        command, cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


@pytest.fixture
def nets() -> tuple[nn.Module, nn.Module]:
    """A fused and an eager network of the same parameters, without dropout."""
    made = []
    for network in (FusedResearchNet, IntelligentResearchNetwork):
        torch.manual_seed(0)
        made.append(network(30, [64, 32], 2, dropout=0.0))
    return made[0], made[1]


# ------------------------------------------------------------------------------- processes


def test_ddp_gives_the_same_losses_with_one_process_and_with_two():
    alone, together = torchrun(1, "ddp.py"), torchrun(2, "ddp.py")
    losses = [[float(line.split()[-1]) for line in lines[:-1]] for lines in (alone, together)]
    assert len(losses[0]) == 10
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert together[-1].startswith("2 processes  accuracy 0.9")


def test_fsdp_stops_with_two_processes_and_goes_on_with_three(tmp_path):
    def losses(processes: int, folder: str, epochs: str) -> list[float]:
        path = str(tmp_path / folder)
        lines = torchrun(processes, "fsdp.py", "--checkpoint", path, "--epochs", epochs)
        return [float(line.split()[-1]) for line in lines]

    alone = losses(1, "alone", "4")
    assert len(alone) == 4
    resumed = losses(2, "resumed", "2") + losses(3, "resumed", "4")
    assert resumed == pytest.approx(alone, rel=1e-3)


# --------------------------------------------------------------------------------- clients


def test_skorch_grid_search_finds_what_it_finds_for_the_eager_network(capsys):
    pytest.importorskip("skorch")
    search = run("skorch_grid_search.py")["search"]
    assert capsys.readouterr().out.startswith("accuracy 0.9")
    grid = {
        "neuralnetclassifier__lr": [0.003, 0.03],
        "neuralnetclassifier__module__dropout": [0.0],
    }
    fused, eager = (search(n, grid) for n in (FusedResearchNet, IntelligentResearchNetwork))
    for key in ("mean_test_score", "std_test_score", "rank_test_score"):
        assert fused.cv_results_[key] == pytest.approx(eager.cv_results_[key])
    assert kernels_run(fused.best_estimator_[-1].module_, torch.randn(8, 13))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning advises on DataLoader workers
def test_lightning_trains_to_the_parameters_of_the_eager_network(capsys, nets):
    pytest.importorskip("lightning")
    example = run("lightning_trainer.py")
    assert "accuracy 0.9" in capsys.readouterr().out
    accuracies = [example["train"](net, epochs=2) for net in nets]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.01)
    for ours, expected in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_safetensors_files_load_both_ways(capsys, nets, tmp_path):
    pytest.importorskip("safetensors")
    copy_through_file = run("safetensors_checkpoint.py")["copy_through_file"]
    assert float(capsys.readouterr().out.split()[-1]) < 1e-6
    fused, eager = nets
    for source, target in ((fused, eager), (eager, fused)):
        source(torch.randn(16, 30))
        copy_through_file(source, target, tmp_path / "net.safetensors")
        for name, tensor in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], tensor), name


def test_stable_baselines3_learns_cartpole_as_before(capsys):
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("gymnasium")
    example = run("stable_baselines3_cartpole.py")
    printed = capsys.readouterr().out
    assert float(printed.split("balanced ")[1].split()[0]) > 200

    fused = example["make_agent"]()
    report = fused_mlp.fuse(fused.policy)
    runs = [entry.path for entry in report.fused]
    nets = ("mlp_extractor.policy_net", "mlp_extractor.value_net")
    assert runs == [f"{net}.0-3" for net in nets]
    fused.learn(512)
    eager = example["make_agent"]().learn(512)  # made now: it seeds the generators of all
    for ours, expected in zip(fused.policy.parameters(), eager.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_stable_baselines3_says_why_elu_layers_are_left():
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("gymnasium")
    make_agent = runpy.run_path(str(EXAMPLES / "stable_baselines3_cartpole.py"))["make_agent"]
    for activation in (nn.Tanh, nn.ReLU, nn.GELU):
        assert len(fused_mlp.fuse(make_agent(activation).policy).fused) == 2
    report = fused_mlp.fuse(make_agent(nn.ELU).policy)
    assert not report.fused
    reasons = [e.reason for e in report.left if "_net." in e.path]
    assert len(reasons) == 4
    assert all(reason.startswith("followed by ELU, not ReLU, LeakyReLU") for reason in reasons)
