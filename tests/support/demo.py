"""What the demo's test files share."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image

from fused_mlp.demo.report import FIGURE_DPI, FIGURE_INCHES

# Options for a run that only has to end well.
SMALL = ["--epochs", "2", "--batch-size", "64", "--hidden", "16,8"]


def assert_png(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (round(side * FIGURE_DPI) for side in FIGURE_INCHES)
    image = matplotlib.image.imread(path)
    assert image.shape == (height, width, 4)
    assert image[..., :3].std() > 0.05, "the picture is empty"
