"""Arrays as short texts that the page's script decodes: half floats and bits, deflated, in base64."""

import base64
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MANTISSA_BITS = 10
"""Of a half float."""
LARGEST = 2.0**14
"""What the largest absolute value is scaled to, so that small ones keep their digits."""


@dataclass(frozen=True)
class Encoded:
    """An encoded array: `scale` times what the text holds are its values; NaN where there is none."""

    text: str
    scale: float = 1.0

    def as_json(self) -> dict[str, Any]:
        """Return it as the script reads it."""
        return {"text": self.text, "scale": self.scale}


def encode_halves(values: NDArray[np.float64], mantissa_bits: int = MANTISSA_BITS) -> Encoded:
    """Encode numbers as half floats with so many bits of mantissa: a relative error up to 2^-(bits + 1).

    Low bytes stand after all high bytes, which are alike and deflate well. Infinite values are not allowed.
    """
    largest = float(np.nanmax(np.abs(values), initial=0.0)) if np.isfinite(values).any() else 0.0
    scale = largest / LARGEST if largest else 1.0
    halves = (values / scale).astype("<f2").view("<u2").astype(np.uint32).ravel()
    surplus = MANTISSA_BITS - mantissa_bits
    if surplus:
        rounded = (halves + (1 << (surplus - 1))) >> surplus << surplus
        halves = np.where(np.isnan(values).ravel(), halves, rounded)
    shuffled = np.concatenate([(halves >> 8).astype(np.uint8), (halves & 255).astype(np.uint8)])
    return Encoded(_deflated(shuffled.tobytes()), scale)


def encode_bits(flags: NDArray[np.bool_]) -> Encoded:
    """Encode flags, eight a byte, the first in the highest bit."""
    return Encoded(_deflated(np.packbits(flags.ravel()).tobytes()))


def encode_bytes(content: bytes) -> str:
    """Encode any bytes."""
    return _deflated(content)


def _deflated(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode("ascii")
