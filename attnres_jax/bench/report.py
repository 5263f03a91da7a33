"""What every report of a measurement says beside its numbers, and how it is written."""

import importlib.metadata
import json
import platform
from collections.abc import Collection
from pathlib import Path
from typing import Any

from attnres_jax.analysis.made import commit

PACKAGES = (
    *("jax", "jaxlib", "libtpu", "flax", "jax-triton", "triton", "nvidia-cuda-nvcc"),
    *("torch", "fla-core", "fast-attnres", "flash-attn-res", "liger-kernel"),
)


def provenance(device: str) -> dict[str, Any]:
    """Device, versions and commit."""
    return {"device": device, "versions": versions(), "python": platform.python_version(), "commit": commit()}


def versions() -> dict[str, str]:
    """Of the packages that make the numbers, those that are installed."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in PACKAGES if name in found}


def rows(file: Path | None) -> list[dict[str, Any]]:
    """The JSON lines of a file, none where it is not there."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file and file.exists() else []


def done(file: Path | None, chips: Collection[str], names: Collection[str]) -> set[str]:
    """What names the rows that a file has of these chips, as JSON."""
    return {json.dumps({n: row[n] for n in names}) for row in rows(file) if row["chip"] in chips}


def append(row: dict[str, Any], file: Path | None) -> None:
    """As one JSON line to a file, if there is one; its folder is made."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


def write(report: dict[str, Any], name: str | None) -> None:
    """As JSON into the file `name`, if there is one; its folder is made."""
    if name is not None:
        file = Path(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {file}")
