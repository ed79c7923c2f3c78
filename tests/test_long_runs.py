"""What happens to long-lived processes: steps without end, forks, interrupts, no memory left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fused_mlp import FusedResearchNet, TrainStep

ROOT = Path(__file__).resolve().parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, forks or limits memory")


def in_a_process(code: str, seconds: int = 120) -> str:
    """Run code in a process of its own and return what it prints; it must end well."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stderr[-3000:]}"
    return done.stdout


@linux
@pytest.mark.slow
def test_nothing_grows() -> None:
    """Twenty thousand steps of every kind; `make soak` makes a million."""
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--steps", "20000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    # Time is for the command to judge, on a machine that has nothing else to do.
    for line in done.stdout.splitlines():
        grown = float(line.split("memory ")[1].split(" MiB")[0])
        assert grown < 4, line
        assert "+0 open files" in line, line
    assert len(done.stdout.splitlines()) == 6, done.stderr


@linux
def test_fork_after_use() -> None:
    """A forked child computes what its parent computes, whatever ran before the fork."""
    out = in_a_process(
        """
        import os, torch, torch.nn.functional as F
        from fused_mlp import FusedResearchNet, TrainStep
        torch.set_num_threads(2)
        net = FusedResearchNet(10, [64, 32], 5)
        step = TrainStep(net, F.mse_loss, torch.optim.SGD(net.parameters(), lr=0.01))
        x, y = torch.randn(64, 10), torch.randn(64, 5)
        step(x, y); step(x, y)
        net.eval()
        expected = net(x)
        net(torch.randn(5000, 10))
        child = os.fork()
        if child == 0:
            # As torch's own data loaders do: threads do not survive a fork.
            torch.set_num_threads(1)
            same = torch.equal(net(x), expected)
            net.train()
            finite = step(x, y).isfinite().item()
            os._exit(0 if same and finite else 1)
        _, status = os.waitpid(child, 0)
        net.eval()
        print(os.waitstatus_to_exitcode(status), torch.equal(net(x), expected))
        """
    )
    assert out.split() == ["0", "True"]


@linux
def test_no_memory_left() -> None:
    """A clean RuntimeError, the buffers as they were, and the next call works."""
    out = in_a_process(
        """
        import resource, torch, torch.nn.functional as F
        from pathlib import Path
        from fused_mlp import FusedResearchNet, TrainStep
        from fused_mlp.functional import (
            batch_norm_act, batch_norm_leaky_relu, linear_act, linear_relu, normalize
        )
        torch.set_num_threads(2)
        net = FusedResearchNet(10, [64, 32], 5)
        wide = FusedResearchNet(300, [400, 300], 5)
        step = TrainStep(net, F.mse_loss, torch.optim.SGD(net.parameters(), lr=0.01))
        small = torch.randn(64, 10)
        step(small, torch.randn(64, 5))
        net(small); wide(torch.randn(64, 300)).sum().backward()
        rows = 1_500_000
        large, target = torch.randn(1, 10).expand(rows, 10), torch.randn(1, 5).expand(rows, 5)
        broad = torch.randn(1, 300).expand(200_000, 300)
        mean, var = torch.zeros(10), torch.ones(10)
        before = [t.clone() for n in (net, wide) for t in (*n.state_dict().values(), mean, var)]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), -1))
        calls = {
            "normalize": lambda: normalize(large),
            "linear_relu": lambda: linear_relu(large, torch.ones(64, 10), None, 0.3, True),
            "linear_act": lambda: linear_act(large, torch.ones(64, 10), None, "gelu"),
            "batch_norm": lambda: batch_norm_leaky_relu(large, mean, var, training=True),
            "batch_norm_act": lambda: batch_norm_act(
                large, mean, var, training=True, activation="relu", dropout_p=0.3
            ),
            "network": lambda: net(large),
            "wide network": lambda: wide(broad),
            "train step": lambda: step(large, target),
        }
        for name, call in calls.items():
            try:
                call()
            except RuntimeError as error:
                print(name, "|", str(error).splitlines()[0][:60])
            except MemoryError:
                raise SystemExit(f"{name}: a MemoryError where torch raises RuntimeError")
            else:
                raise SystemExit(f"{name} found memory")
        after = [t for n in (net, wide) for t in (*n.state_dict().values(), mean, var)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        net(small).sum().backward()
        step(small, torch.randn(64, 5))
        print("works")
        """
    )
    assert out.splitlines()[-1] == "works", out
    assert len(out.splitlines()) == 9


@linux
def test_interrupt_in_a_kernel() -> None:
    """Ctrl-C during a long kernel: KeyboardInterrupt after it, and everything goes on working."""
    out = in_a_process(
        """
        import os, signal, threading, time, torch, torch.nn.functional as F
        from fused_mlp import FusedResearchNet, TrainStep
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has none
        torch.set_num_threads(2)
        net = FusedResearchNet(10, [64, 32], 5)
        step = TrainStep(net, F.mse_loss, torch.optim.SGD(net.parameters(), lr=0.01))
        x, y = torch.randn(100_000, 10), torch.randn(100_000, 5)
        step(x, y)
        seen = 0
        for kind in ("train", "step", "eval"):
            net.train(kind != "eval")
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                end = time.time() + 60
                while time.time() < end:
                    if kind == "step":
                        step(x, y)
                    elif kind == "train":
                        net(x).sum().backward()
                    else:
                        net(x)
            except KeyboardInterrupt:
                seen += 1
        assert all(t.isfinite().all() for t in net.state_dict().values())
        # Outputs are what plain modules with the same state put out.
        net.eval()
        plain = torch.nn.Sequential(*net.research_layers)
        torch.testing.assert_close(net(x[:100]), plain(x[:100]), atol=1e-4, rtol=1e-4)
        net.train()
        counted = int(net.research_layers[4].num_batches_tracked)
        step(x, y)
        print(seen, int(net.research_layers[4].num_batches_tracked) - counted)
        """
    )
    assert out.split() == ["3", "1"]


@pytest.mark.parametrize("where", ["forward", "backward", "parameter"])
def test_exceptions_in_hooks(device: torch.device, where: str) -> None:
    """A hook that raises stops the call; without it the next one is what it would have been."""
    torch.manual_seed(0)
    net = FusedResearchNet(10, [64, 32], 5, device=device)
    x = torch.randn(32, 10, device=device)
    expected = [p.clone() for p in net.parameters()]

    def fail(*_: object) -> None:
        raise LookupError("from the hook")

    layer = net.research_layers[3]
    hook = {
        "forward": lambda: layer.register_forward_hook(fail),
        "backward": lambda: layer.register_full_backward_hook(fail),
        "parameter": lambda: layer.weight.register_hook(fail),
    }[where]()
    with pytest.raises(LookupError, match="from the hook"):
        net(x).sum().backward()
    hook.remove()
    net.zero_grad()
    for parameter, before in zip(net.parameters(), expected, strict=True):
        assert torch.equal(parameter, before)
    net.eval()
    plain = torch.nn.Sequential(*net.research_layers)
    torch.testing.assert_close(net(x), plain(x), atol=1e-5, rtol=1e-5)
    net.train()
    step = TrainStep(net, F.mse_loss, torch.optim.SGD(net.parameters(), lr=0.01))
    assert step(x, torch.randn(32, 5, device=device)).isfinite()


@linux
def test_signals_keep_their_handlers() -> None:
    """Importing and running the package installs no handler."""
    before = signal.getsignal(signal.SIGINT)
    FusedResearchNet(10, [64, 32], 5)(torch.randn(8, 10))
    assert signal.getsignal(signal.SIGINT) is before
