"""NF4 by bitsandbytes' operators: weights in 4 bits, multiplied in float32, a block of them at a time.

Dettmers et al. 2023 (arXiv 2305.14314): weights are rounded to 16 numbers, quantiles of the normal
distribution, times the absolute maximum of the 64 they stand among. These maxima are rounded to 8 bits in
turn (double quantisation): 4.13 bits a weight in all. In float32 they would take 4.5, a twelfth more to read,
and the demo's weights would be nearer by a two-thousandth of their error. Activations are not rounded, so a
product is that of a float32 model with the dequantised weights, and a row's result is the same whatever
shares its batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.functional import pad

from lowmem_icl.model.int8 import FIXED_ROWS, ThroughWeight, bitsandbytes_operators

BLOCK_WEIGHTS: Literal[64] = 64
"""How many weights share a maximum."""
NESTED_MAXIMA: Literal[256] = 256
"""How many maxima share a float32 scale."""
CONVERTED_ELEMENTS = 1 << 22
PRODUCT_ELEMENTS = 1 << 21
"""Of a weight about so many elements are dequantised at a time: 8 MB in float32."""
OUTPUT_MULTIPLE = 64
"""With a multiple of so many outputs, a block of a weight begins with a maximum of its own."""
PARTS = ("absmax", "nested_absmax", "nested_quant_map", "nested_offset")
"""What is read of a weight besides its packed values, by bitsandbytes' names."""
CODES, NESTED_CODES = 16, 256
FLOAT_BYTES = 4
STATE_BYTES = 256
"""About as long as bitsandbytes' own description of a weight is."""


class Nf4Form(BaseModel):
    """The parameters of NF4 that a store was made with; stores with others are refused."""

    model_config = ConfigDict(strict=True, extra="forbid")
    quant_type: Literal["nf4"] = "nf4"
    blocksize: Literal[64] = BLOCK_WEIGHTS
    double_quant: Literal[True] = True
    nested_blocksize: Literal[256] = NESTED_MAXIMA


def packed_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of a weight's packed values, two to a byte, as bitsandbytes has them."""
    return -(-torch.Size(shape).numel() // 2), 1


def stored_bytes(shape: Sequence[int]) -> int:
    """Return about how many bytes a weight takes in a store."""
    maxima = -(-torch.Size(shape).numel() // BLOCK_WEIGHTS)
    nested = -(-maxima // NESTED_MAXIMA)
    return packed_shape(shape)[0] + maxima + FLOAT_BYTES * (nested + CODES + NESTED_CODES + 1) + STATE_BYTES


def part_forms(shape: Sequence[int]) -> dict[str, tuple[tuple[int | None, ...], torch.dtype]]:
    """Return shape and type of everything that belongs to a weight [N, K], by bitsandbytes' names; None: of
    any length.
    """
    maxima = -(-torch.Size(shape).numel() // BLOCK_WEIGHTS)
    return {
        "absmax": ((maxima,), torch.uint8),
        "nested_absmax": ((-(-maxima // NESTED_MAXIMA),), torch.float32),
        "nested_quant_map": ((NESTED_CODES,), torch.float32),
        "nested_offset": ((), torch.float32),
        "quant_map": ((CODES,), torch.float32),
        "quant_state.bitsandbytes__nf4": ((None,), torch.uint8),
    }


def quantise_nf4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Return a weight [N, K] in NF4: its packed values and what belongs to them, under the names that
    bitsandbytes serialises them by.

    `nested_offset` stands by itself as well, so that no description need be parsed when a layer is filled.
    What is rounded to does not depend on the weight's precision, nor on the number of threads.
    """
    operators = bitsandbytes_operators()
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

    flat = weight.contiguous().view(-1)
    pieces = [
        operators.quantize_4bit(piece.float(), BLOCK_WEIGHTS, "nf4", torch.uint8)
        for piece in flat.split(CONVERTED_ELEMENTS)
    ]
    packed = torch.cat([piece for piece, _ in pieces])
    maxima = torch.cat([piece for _, piece in pieces])
    # In float32 the mean's last bit would depend on how many threads add.
    offset = maxima.double().mean().float()
    nested, nested_state = quantize_blockwise(maxima - offset, blocksize=NESTED_MAXIMA)
    state = QuantState(
        nested, weight.shape, get_4bit_type("nf4", device=weight.device), BLOCK_WEIGHTS, "nf4", torch.float32,
        offset, nested_state,
    )  # fmt: skip
    parts = {f"{name}.{part}": value.clone() for part, value in state.as_dict(packed=True).items()}
    return {name: packed, f"{name}.nested_offset": offset.clone(), **parts}


class Nf4Linear(nn.Module):
    """A linear layer held in NF4: weight uint8 [⌈N · K / 2⌉, 1], and its maxima as `take` is given them."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        packed = torch.empty(packed_shape((outputs, inputs)), dtype=torch.uint8, device="meta")
        self.register_buffer("weight", packed)
        self.register_buffer("bias", torch.empty(outputs, device="meta") if bias else None)
        self._parts: dict[str, Tensor] = {}
        self._maxima: Tensor | None = None

    def take(self, part: str, tensor: Tensor) -> None:
        """Take a part of the weight besides its packed values, by bitsandbytes' name."""
        if part in PARTS:
            self._parts[part] = tensor

    def fill(self, parts: Mapping[str, Tensor]) -> None:
        """Become the weight that `quantise_nf4` was given as "weight"; the bias stays."""
        self.weight = parts["weight"]
        for name, tensor in parts.items():
            self.take(name.removeprefix("weight."), tensor)
        self.refresh()

    def refresh(self) -> None:
        """Take up newly filled buffers: the maxima of all blocks, float32, which go into every product."""
        absmax, nested_absmax, nested_quant_map, offset = (self._parts[part] for part in PARTS)
        self._maxima = bitsandbytes_operators().dequantize_blockwise(
            absmax, nested_absmax, nested_quant_map, NESTED_MAXIMA, torch.float32
        )
        self._maxima += offset

    def weight_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield some outputs after the others: which, and their weights [n, K] in float32."""
        step = max(1, PRODUCT_ELEMENTS // self.in_features // OUTPUT_MULTIPLE) * OUTPUT_MULTIPLE
        for first in range(0, self.out_features, step):
            outputs = slice(first, min(first + step, self.out_features))
            yield outputs, self._dequantised(outputs)

    def _dequantised(self, outputs: slice) -> Tensor:
        assert self._maxima is not None, "filled before it is used"
        begin, end = outputs.start * self.in_features, outputs.stop * self.in_features
        packed = self.weight.view(-1)[begin // 2 : -(-end // 2)]
        maxima = self._maxima[begin // BLOCK_WEIGHTS : -(-end // BLOCK_WEIGHTS)]
        count = end - begin
        # On the CPU bitsandbytes scales blocks that reach over the end of a row wrongly, and compiles code
        # for odd rows, which takes seconds: one block is a row, the last one filled up.
        blocks = len(maxima)
        missing = blocks * BLOCK_WEIGHTS // 2 - len(packed)
        values: Tensor = bitsandbytes_operators().dequantize_4bit(
            pad(packed, (0, missing)) if missing else packed,
            maxima,
            BLOCK_WEIGHTS,
            "nf4",
            [blocks, BLOCK_WEIGHTS],
            torch.float32,
        )
        return values.view(-1)[:count].view(-1, self.in_features)

    def float_rows(self, rows: Sequence[int] | slice, columns: slice = slice(None)) -> Tensor:
        """Return some rows and columns of the weight in float32."""
        wanted = torch.arange(self.out_features)[rows]
        width = len(range(*columns.indices(self.in_features)))
        out = torch.empty(len(wanted), width, device=self.weight.device)
        for outputs, block in self.weight_blocks():
            inside = ((wanted >= outputs.start) & (wanted < outputs.stop)).nonzero()[:, 0]
            if len(inside):
                at, of = (index.to(out.device) for index in (inside, wanted[inside] - outputs.start))
                out[at] = block[:, columns][of]
        return out

    def forward(self, values: Tensor) -> Tensor:
        """Map [..., K] to [..., N] in float32."""
        if torch.is_grad_enabled() and values.requires_grad:
            return ThroughWeight.apply(values, self)  # type: ignore[no-untyped-call]
        return self.multiply(values)

    def multiply(self, values: Tensor) -> Tensor:
        """Return the product with the dequantised weight, FIXED_ROWS rows at a time, the last ones filled up.

        A floating-point product of another shape may add in another order; with one shape, a row's result
        does not depend on how many rows come with it.
        """
        # Not a part of something larger: activations write into it.
        whole = torch.empty(*values.shape[:-1], self.out_features, device=values.device)
        out = whole.view(-1, self.out_features)
        batches = _row_batches(values.detach().reshape(-1, self.in_features))
        bias = self.bias
        for outputs, weight in self.weight_blocks():
            right = weight.t()
            for rows, batch in batches:
                product = torch.mm(batch, right) if bias is None else torch.addmm(bias[outputs], batch, right)
                part = out[rows, outputs]
                part.copy_(product[: len(part)])
        return whole

    def multiply_back(self, gradient: Tensor) -> Tensor:
        """Return gradient [..., N] · the dequantised weight [N, K], in rows and blocks as `multiply` does."""
        left = gradient.reshape(-1, self.out_features)
        batches = _row_batches(left)
        out = torch.zeros(sum(len(batch) for _, batch in batches), self.in_features, device=left.device)
        for outputs, weight in self.weight_blocks():
            for rows, batch in batches:
                out[rows].addmm_(batch[:, outputs], weight)
        return out[: len(left)].view(*gradient.shape[:-1], self.in_features)


def _row_batches(rows: Tensor) -> list[tuple[slice, Tensor]]:
    """Cut rows [M, K] into batches of one size, the last filled up with zeros, each with where it belongs."""
    size = FIXED_ROWS * (8 if rows.is_cuda else 1)
    places = [slice(start, start + size) for start in range(0, len(rows), size)]
    batches = [(place, rows[place]) for place in places]
    if missing := -len(rows) % size:
        last, batch = batches[-1]
        batches[-1] = (last, pad(batch, (0, 0, 0, missing)))
    return batches


def replace_with_nf4(layer: nn.Module) -> None:
    """Swap every linear module of an empty decoder layer for an Nf4Linear of the same shape."""
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    for name, module in linears.items():
        parent, _, leaf = name.rpartition(".")
        replacement = Nf4Linear(module.in_features, module.out_features, module.bias is not None)
        setattr(layer.get_submodule(parent), leaf, replacement)


def product_bytes(inputs: int) -> int:
    """Return what a weight's dequantised block and rows that are filled up take, of this many inputs."""
    elements = max(PRODUCT_ELEMENTS, OUTPUT_MULTIPLE * inputs)
    return FLOAT_BYTES * (elements + 2 * FIXED_ROWS * inputs)
