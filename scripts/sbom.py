"""Lists what an installation of the released wheel brings, as a CycloneDX file in dist/.

    make wheels sbom

The wheel is installed with its dependencies into an empty environment; cyclonedx-py reads what is
there: names, versions, licences. Of torch it is the build that pip chooses on this machine.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"


def main() -> int:
    wheels = list(DIST.glob("*.whl"))
    if len(wheels) != 1:
        raise SystemExit(f"{len(wheels)} wheels in {DIST}: run make wheels first")
    environment = ROOT / "build" / "sbom"
    shutil.rmtree(environment, ignore_errors=True)
    run("-m", "venv", "--without-pip", str(environment))
    python = str(environment / "bin" / "python")
    run("-m", "pip", "--python", python, "install", "--quiet", str(wheels[0]))
    output = DIST / f"{wheels[0].name.split('-py3')[0]}.cdx.json"
    version = wheels[0].name.split("-")[1]
    words = ["--pyproject", str(ROOT / "pyproject.toml"), "--mc-type", "library"]
    words += ["--output-reproducible", "--output-file", str(output)]
    run("-m", "cyclonedx_py", "environment", *words, python)
    shutil.rmtree(environment)
    output.write_text(with_version(output.read_text(), version))
    print(output.relative_to(ROOT))
    return 0


def with_version(listing: str, version: str) -> str:
    """Say which version is listed: pyproject.toml, where cyclonedx-py looks, does not know it."""
    content = json.loads(listing)
    content["metadata"]["component"]["version"] = version
    return json.dumps(content, indent=2) + "\n"


def run(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True)


if __name__ == "__main__":
    sys.exit(main())
