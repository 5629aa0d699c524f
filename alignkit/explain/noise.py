"""The reward of a dry run, in which an untrained model would hardly earn any other."""

from collections.abc import Sequence
from zlib import crc32


def noise(texts: Sequence[str]) -> list[float]:
    """0 or 1 for each answer, by its bytes."""
    return [float(crc32(text.encode()) % 2) for text in texts]
