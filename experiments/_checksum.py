"""Weights that packages bring: used only if they are those that the tables were made with."""

import hashlib
from pathlib import Path


def verified(path: Path, sha256: str) -> Path:
    """The path, if its file has that checksum.

    Raises:
        ValueError: If it has another.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} has the checksum {found}, expected {sha256}: these are not the weights that "
            f"were measured. Install the version of the package that pyproject.toml names."
        )
    return path
