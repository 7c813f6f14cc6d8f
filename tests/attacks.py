"""What may happen to a file of a private folder (plainconv/cpu/store.py) between two processes."""

from collections.abc import Callable
from pathlib import Path


def _another_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit": _another_bit,
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "cut in the head": lambda file: file.write_bytes(file.read_bytes()[:10]),
    "empty": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "another magic": lambda file: file.write_bytes(b"X" + file.read_bytes()[1:]),
}
