"""Files: safe reading of weights, without executing anything in them, and atomic writing."""

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

from .pickles import MOST, expanded_size

LEGACY_PICKLES = 5
"""Number of pickles at the start of a file from PyTorch before 1.6."""
LONGEST = 300
"""Most characters of a reader's own message in an error message."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically; a file or link at `path` is replaced, never written through."""
    unfinished = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_weights(path: Path, refuse: type[ValueError], choose: str, again: str) -> Any:
    """The content of a PyTorch or safetensors file, recognised by content. Large files are memory-mapped if possible.

    Raises `refuse` with one sentence if the file is missing (the sentence ends with `choose`, the advice to the user),
    damaged, of another kind, or loads more than tensors and plain containers (it ends with `again`).
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
    except Exception as error:  # damaged files make the readers raise all kinds of errors
        reason = str(error).strip().partition("\n")[0][:LONGEST].rstrip(".") or type(error).__name__
        raise refuse(f'"{path}" is damaged or incomplete ({reason}): {again}.') from error


def _read(path: Path, refuse: type[ValueError], again: str) -> Any:
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(0)
        if not head:
            raise refuse(f'"{path}" is empty: {again}.')
        if head[4:9] == b"\0\0\0\0{":  # safetensors: eight bytes with the length of the JSON that follows
            return load_file(path)
        archive = head.startswith(b"PK\x03\x04")
        if not archive and head[:1] != b"\x80":  # a bare pickle, as written by PyTorch before 1.6
            begin = repr(head[:24].decode("ascii", "replace"))
            raise refuse(f'"{path}" is neither a PyTorch nor a safetensors file; it begins with {begin}: {again}.')
        if archive:
            _refuse_packed(path, refuse, again)
        else:
            for _ in range(LEGACY_PICKLES):
                _refuse_nested(file, path, refuse, again)
            file.seek(0)
        mapped = archive and path.suffix != ".safetensors"  # torch.load trusts this suffix more than the content
        return torch.load(str(path) if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)


def _refuse_packed(path: Path, refuse: type[ValueError], again: str) -> None:
    """Raise for an archive that unpacks to more than its own size. PyTorch never compresses weights."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if compressed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise refuse(f'"{path}" is a compressed archive, not a PyTorch file: unpack it, or {again}.')
    with zipfile.ZipFile(path) as archive:
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _refuse_nested(io.BytesIO(archive.read(entry)), path, refuse, again)


def _refuse_nested(file: IO[bytes], path: Path, refuse: type[ValueError], again: str) -> None:
    """Raise for a pickle whose nested objects would take endless time to hash or print."""
    if expanded_size(file) > MOST:
        raise refuse(f'"{path}" contains endlessly nested objects instead of weights: {again}.')
