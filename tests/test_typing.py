"""Types of the public names: marked as typed, written out, and right for a user's code."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest

import fused_mlp
from fused_mlp import functional, ops

USAGE = Path(__file__).with_name("support") / "typed_usage.py"


def public():
    """Yield every public callable with its name."""
    for name in fused_mlp.__all__:
        value = getattr(fused_mlp, name)
        if callable(value):
            yield pytest.param(value, id=name)
    for module in (functional, ops):
        for name, value in vars(module).items():
            if inspect.isfunction(value) and not name.startswith("_"):
                yield pytest.param(value, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("value", [*public()])
def test_public_name_has_a_typed_signature_and_a_docstring(value):
    assert inspect.getdoc(value)
    function = value.__init__ if inspect.isclass(value) else value
    if inspect.isclass(value) and "__init__" not in vars(value):
        return  # FusedSequential takes what nn.Sequential takes
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    assert all(p.annotation is not p.empty for p in parameters), parameters
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty


def test_package_is_marked_as_typed():
    assert resources.files(fused_mlp).joinpath("py.typed").is_file()


def test_usage_names_every_public_name():
    text = USAGE.read_text()
    missing = [name for name in fused_mlp.__all__ if name not in text]
    assert not missing
    assert isinstance(functional, ModuleType)


@pytest.mark.slow
def test_mypy_accepts_a_users_code_and_finds_its_mistakes(tmp_path):
    pytest.importorskip("mypy")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import fused_mlp\n"
        "fused_mlp.FusedResearchNet('10', [64], 5)\n"
        "fused_mlp.functional.normalize([1.0, 2.0])\n"
        "fused_mlp.fuse(3)\n"
        "fused_mlp.no_such_name\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--follow-imports=silent",
            str(USAGE),
            str(wrong),
        ],
        cwd=Path(fused_mlp.__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert not [line for line in lines if "typed_usage" in line], done.stdout
    found = {int(line.split("wrong.py:")[1].split(":")[0]) for line in lines if "wrong.py" in line}
    assert found == {2, 3, 4, 5}, done.stdout
