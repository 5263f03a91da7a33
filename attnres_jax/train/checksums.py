"""Checksums of a checkpoint's files: written into its folder before that gets its name, read before use."""

import hashlib
import json
from pathlib import Path

from attnres_jax.train import data

NAME = "checksums.json"
LATE = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""What Orbax writes after the checksums; their ends say whether they are whole."""


def write(folder: Path) -> None:
    """Size and SHA-256 of every file below `folder`, into its checksums.json."""
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    found = {name: _describe(file) for name, file in files.items() if name not in (NAME, *LATE)}
    data.write(folder / NAME, json.dumps(found, indent=1).encode())


def damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint `folder`, in words; None where every file is as it was written.

    A file that is there and cannot be read at this time raises `OSError`: that says nothing of it.
    """
    try:
        wanted = json.loads((folder / NAME).read_bytes())
        found = (_differs(folder / name, written) for name, written in wanted.items())
        return next((words for words in found if words), None) or _late_damage(folder)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} does not say what was written ({error})"


def _differs(file, written):
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != written["bytes"]:
        return f"{file.name} has {file.stat().st_size} bytes, not {written['bytes']}"
    return None if _describe(file) == written else f"{file.name} does not match its checksum"


def _late_damage(folder):
    metadata, committed = (folder / name for name in LATE)
    try:
        json.loads(metadata.read_bytes())
    except (FileNotFoundError, ValueError):
        return f"{metadata.name} is cut off"
    if committed.is_file() and not committed.read_text(errors="replace").endswith(f"/{folder.name}"):
        return f"{committed.name} is cut off"
    return None


def _describe(file):
    with file.open("rb") as raw:
        digest = hashlib.file_digest(raw, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
