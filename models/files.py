"""Files: weights read without executing anything in them, and whatever is written, written whole or not at all."""

from __future__ import annotations

import io
import os
import re
import uuid
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from safetensors.torch import load_file

from .pickles import MOST, things_in

LEGACY_PICKLES = 5
"""How many pickles a file of PyTorch before 1.6 begins with."""
LONGEST = 300
"""Characters of a reader's own words that an error tells."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; a file or link at `path` is replaced, never written through."""
    unfinished = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_weights(path: Path, refuse: type[ValueError], choose: str, again: str) -> Any:
    """What a PyTorch or safetensors file holds, told apart by content. Large files are mapped where possible.

    Raises `refuse` with one sentence when the file is missing (which ends in `choose`: what the artist should do), or
    damaged, of another kind, or asks for more than tensors and plain containers (which ends in `again`).
    """
    if not path.is_file():
        fault = "is a folder" if path.is_dir() else "does not exist"
        raise refuse(f'"{path}" {fault}: {choose}.')
    try:
        return _read(path, refuse, again)
    except UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        fault = f"loads {name[1]}, which weights do not need" if name else "is not a weights file"
        raise refuse(f'"{path}" {fault}, so it was not opened: {again}.') from error
    except refuse:
        raise
    except Exception as error:  # whatever a damaged file makes the readers raise
        reason = str(error).strip().partition("\n")[0][:LONGEST].rstrip(".") or type(error).__name__
        raise refuse(f'"{path}" is damaged or incomplete ({reason}): {again}.') from error


def _read(path: Path, refuse: type[ValueError], again: str) -> Any:
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(0)
        if not head:
            raise refuse(f'"{path}" is empty: {again}.')
        if head[4:9] == b"\0\0\0\0{":  # of safetensors: eight bytes with the length of the JSON that follows
            return load_file(path)
        archive = head.startswith(b"PK\x03\x04")
        if not archive and head[:1] != b"\x80":  # a bare pickle, as PyTorch wrote them before 1.6
            begin = repr(head[:24].decode("ascii", "replace"))
            raise refuse(f'"{path}" is neither a PyTorch nor a safetensors file; it begins with {begin}: {again}.')
        if archive:
            _refuse_packed(path, refuse, again)
        else:
            for _ in range(LEGACY_PICKLES):
                _refuse_knots(file, path, refuse, again)
            file.seek(0)
        mapped = archive and path.suffix != ".safetensors"  # a name that torch.load believes more than the content
        return torch.load(str(path) if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)


def _refuse_packed(path: Path, refuse: type[ValueError], again: str) -> None:
    """Raise for an archive that unpacks to more than it is. PyTorch never compresses weights."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if compressed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise refuse(f'"{path}" is a compressed archive, not a PyTorch file: unpack it, or {again}.')
    with zipfile.ZipFile(path) as archive:
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _refuse_knots(io.BytesIO(archive.read(entry)), path, refuse, again)


def _refuse_knots(file: IO[bytes], path: Path, refuse: type[ValueError], again: str) -> None:
    """Raise for a pickle that is endless when it is read."""
    if things_in(file) > MOST:
        raise refuse(f'"{path}" contains endlessly nested objects instead of weights: {again}.')
