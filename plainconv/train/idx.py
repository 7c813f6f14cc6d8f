"""Idx files, the format of MNIST: read them, and fetch the ones that are not there.

bytes 0, 1   zero
byte 2       the type of a number; 8 is an unsigned byte, the only one that MNIST uses
byte 3       d, how many dimensions
then         d sizes, each four bytes, the highest first
then         the numbers, the last dimension running fastest
"""

import gzip
import hashlib
import http.client
import math
import struct
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plainconv.files import InputError, write_whole

TIMEOUT_S = 30.0
CHUNK_BYTES = 1 << 16


def read_idx(path: Path) -> Tensor:
    """Read an idx file of unsigned bytes, packed by gzip if its name ends in .gz.

    Returns:
        uint8, with the sizes that the file states.

    Raises:
        InputError: the file is damaged, cut short, or holds something else.
        OSError: it cannot be opened.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: a damaged gzip file ({error})") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise InputError(f"{path}: not an idx file of unsigned bytes")
    start = 4 + 4 * content[3]
    sizes = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != math.prod(sizes):
        stated = "x".join(map(str, sizes))
        raise InputError(f"{path}: states {stated} numbers and holds {len(content) - start}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy())


def fetch(url: str, path: Path, md5: str) -> None:
    """Download a file, unless its checksum is wrong; `path` is there complete or not at all.

    Args:
        url: from where.
        path: to where; its folder is made.
        md5: the checksum that the publisher states, in hexadecimal.

    Raises:
        InputError: no such address or no network, or the bytes are not the ones that were published.
        OSError: the disk is full and so on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    checksum = hashlib.md5(usedforsecurity=False)
    with write_whole(path) as file:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                while chunk := answer.read(CHUNK_BYTES):
                    checksum.update(chunk)
                    file.write(chunk)
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            raise InputError(f"{path} is not there and cannot be downloaded from {url}: {error}") from error
        if checksum.hexdigest() != md5:
            raise InputError(f"{url}: its checksum is {checksum.hexdigest()}, not {md5}; nothing was kept")
