"""LLM.int8 by bitsandbytes' operators, with outlier columns that never depend on the batch.

Dettmers et al. 2022 (arXiv 2208.07339): rows of activations and rows of the weight are scaled to int8 by
their absolute maxima and multiplied in integers; the few input columns with large activations are multiplied
in floating point next to it. bitsandbytes finds these columns anew in every call, from all rows of the batch;
here they are fixed per store, so a row's result is the same whatever shares its batch.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

OUTLIER_THRESHOLD = 6.0
FIXED_ROWS = 128
CACHE_ELEMENTS = 1 << 20
DEVICE_ELEMENTS = 1 << 21
BACKWARD_OUTPUTS = 1024
BACKWARD_INPUTS = 2048
"""Of a weight so many outputs and inputs at a time are dequantised on the way back: 8 MB in float32."""
EXACT_INPUTS = 1024
"""How many products of int8 float32 adds up exactly in any order: 127² · 1,024 < 2²⁴."""
FLOAT_OUTPUT_BLOCK = 1024
DEVICE_MULTIPLE = 4
"""What inputs and outputs must be multiples of for cuBLASLt's integer product."""


@cache
def bitsandbytes_operators() -> Any:
    """Import bitsandbytes, which registers its operators with torch, and return them."""
    # Of a kernel that it cannot load for the CPU it warns, and none of it is used here.
    warns = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = warns.level
    warns.setLevel(logging.ERROR)
    try:
        # Imported here: it takes a second, and plans multiply nothing in integers here.
        import bitsandbytes as bnb
    finally:
        warns.setLevel(level)
    assert bnb.__version__, "importing bitsandbytes registers the operators"
    return torch.ops.bitsandbytes


def quantise_rows(values: Tensor, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return int8 rows and their absolute maxima: values ≈ quantised · maxima / 127.

    values: [M, K]; quantised: int8 [M, K]; maxima: float32 [M]. Columns in `without` (int64 [K']) count as
    zero. Bitwise what bitsandbytes' `int8_vectorwise_quant` gives on the CPU; its steps are written out here,
    a few rows at a time, so that a wide input goes through the processor's cache once instead of through
    memory five times. On a CUDA device they give the same integers, where bitsandbytes' own kernel would take
    float16: other integers, and infinite ones beyond 65,504.
    """
    quantised = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    maxima = torch.empty(values.shape[0], device=values.device)
    step = max(1, (DEVICE_ELEMENTS if values.is_cuda else CACHE_ELEMENTS) // values.shape[1])
    scratch = torch.empty(min(step, len(values)), values.shape[1], device=values.device)
    for start in range(0, values.shape[0], step):
        rows = slice(start, start + step)
        part = values[rows].detach().float()
        scaled = torch.abs(part, out=scratch[: len(part)])
        if without is not None:
            scaled.index_fill_(1, without, 0.0)
        largest = torch.amax(scaled, 1, out=maxima[rows])
        # A row of zeros (all heads removed) would divide by nothing; any scale keeps it zero.
        scale = 127.0 / torch.where(largest == 0, 1.0, largest)
        torch.mul(part, scale[:, None], out=scaled)
        if without is not None:
            scaled.index_fill_(1, without, 0.0)
        quantised[rows] = scaled.round_()
    return quantised, maxima


def dequantise_rows(quantised: Tensor, maxima: Tensor) -> Tensor:
    """Return float32 values of int8 rows [N, K] with absolute maxima [N].

    Bitwise what bitsandbytes' `int8_vectorwise_dequant` gives, without its second copy.
    """
    return quantised.float().mul_(maxima[:, None]).mul_(1 / 127)


def integer_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the exact product of int8 rows, left [M, K] · right [N, K]ᵀ, as int32 [M, N].

    Where the processor lacks AVX512, bitsandbytes would turn the whole weight into float32 and multiply that,
    which takes four bytes a parameter and is not exact for long rows of one sign; blocks of it are. On a CUDA
    device the same holds for sizes that cuBLASLt's integer product does not take.
    """
    if left.is_cuda:
        exact = len(left) > 0 and all(size % DEVICE_MULTIPLE == 0 for size in right.shape)
    else:
        exact = _has_integer_instructions()
    if exact and left.is_cuda:
        return bitsandbytes_operators().int8_linear_matmul(left, right)
    if exact:
        # What bitsandbytes' operator calls here, without the way through Python's dispatcher.
        return torch._int_mm(left, right.t())
    return product_in_float_blocks(left, right)


def product_in_float_blocks(left: Tensor, right: Tensor) -> Tensor:
    """Return `integer_product` by float32 products of blocks short enough to be exact, added in int32."""
    outputs, inputs = right.shape
    parts = [left[:, start : start + EXACT_INPUTS].float() for start in range(0, inputs, EXACT_INPUTS)]
    product = torch.zeros(left.shape[0], outputs, dtype=torch.int32, device=left.device)
    for start in range(0, outputs, FLOAT_OUTPUT_BLOCK):
        rows = right[start : start + FLOAT_OUTPUT_BLOCK]
        for number, part in enumerate(parts):
            block = rows[:, number * EXACT_INPUTS : (number + 1) * EXACT_INPUTS]
            product[:, start : start + FLOAT_OUTPUT_BLOCK] += (part @ block.float().t()).int()
    return product


def _has_integer_instructions() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def matmul_in_fixed_rows(left: Tensor, right: Tensor, fixed_rows: int = FIXED_ROWS) -> Tensor:
    """Return left [M, K] @ right [K, N] in blocks of `fixed_rows` rows, the last one padded with zeros.

    A floating-point product of another shape may add in another order; with one shape, a row's result does
    not depend on how many rows come with it.
    """
    rows = left.shape[0]
    if rows == fixed_rows:
        return left @ right
    out = left.new_empty(rows, right.shape[1])
    for start in range(0, rows, fixed_rows):
        block = left[start : start + fixed_rows]
        if block.shape[0] < fixed_rows:
            block = torch.cat([block, block.new_zeros(fixed_rows - block.shape[0], block.shape[1])])
        out[start : start + fixed_rows] = (block @ right)[: rows - start]
    return out


def add_product_in_fixed_rows(out: Tensor, left: Tensor, right: Tensor, fixed_rows: int) -> None:
    """Add left [M, K] @ right [K, N] to out [M, N] in blocks of so many rows, the last one filled up.

    As in `matmul_in_fixed_rows` a row's result does not depend on how many come with it, and the product is
    never in memory by itself.
    """
    for start in range(0, len(out), fixed_rows):
        rows = slice(start, start + fixed_rows)
        part, block = out[rows], left[rows]
        if missing := fixed_rows - len(part):
            filled = pad(part, (0, 0, 0, missing)).addmm_(pad(block, (0, 0, 0, missing)), right)
            part.copy_(filled[: len(part)])
        else:
            part.addmm_(block, right)


def product_with_weight(
    left: Tensor,
    weight: Tensor,
    maxima: Tensor,
    blocks: tuple[int, int] = (BACKWARD_OUTPUTS, BACKWARD_INPUTS),
) -> Tensor:
    """Return left [M, N] · the dequantised weight [N, K], a small block of which is in float32 at a time.

    weight: int8 [N, K] with absolute maxima [N]; blocks: how many outputs and inputs make a block of it. Rows
    are multiplied FIXED_ROWS at a time, the last ones padded, so that a row's result does not depend on how
    many rows come with it.
    """
    rows, (outputs, inputs) = left.shape[0], weight.shape
    at_once = FIXED_ROWS * (8 if left.is_cuda else 1)
    filled = -(-rows // at_once) * at_once
    out = left.new_zeros(filled, inputs)
    scale = maxima / 127
    for first_output in range(0, outputs, blocks[0]):
        output = slice(first_output, first_output + blocks[0])
        # The rows are scaled instead of the weight: there are fewer of them.
        scaled = left.new_zeros(filled, len(scale[output]))
        torch.mul(left[:, output], scale[output], out=scaled[:rows])
        for first_input in range(0, inputs, blocks[1]):
            block = weight[output, first_input : first_input + blocks[1]].float()
            here = out[:, first_input : first_input + blocks[1]]
            for first in range(0, filled, at_once):
                here[first : first + at_once].addmm_(scaled[first : first + at_once], block)
    return out[:rows]


class SharedInput:
    """Quantises one tensor once for all linears that read it (q, k and v)."""

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._result: tuple[Tensor, Tensor, Tensor | None] | None = None

    def quantise(self, values: Tensor, outlier_columns: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return int8 rows, their maxima and the float32 outlier columns [M, K'] taken out, or None."""
        if self._result is None or self._last is not values:
            self._result = _split_and_quantise(_flat(values), outlier_columns)
            self._last = values
        return self._result

    def forget(self) -> None:
        """Drop the tensor it holds."""
        self._last = self._result = None


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _split_and_quantise(values: Tensor, outlier_columns: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    if not outlier_columns.numel():
        return *quantise_rows(values), None
    # Zeroed before quantising: they neither set a row's scale nor count twice.
    return *quantise_rows(values, outlier_columns), values[:, outlier_columns]


class Int8Linear(nn.Module):
    """A linear layer held in int8: weight [N, K] ≈ weight · SCB / 127, names as bitsandbytes serialises them.

    `outlier_columns`: int64 [K'], the fixed columns of the input that are multiplied in floating point. While
    `calibrating`, a call first adds to them every column in which its input reaches OUTLIER_THRESHOLD.
    """

    weight: Tensor
    SCB: Tensor
    bias: Tensor | None
    outlier_columns: Tensor

    def __init__(self, inputs: int, outputs: int, bias: bool, shared: SharedInput | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("weight", torch.empty(outputs, inputs, dtype=torch.int8, device="meta"))
        self.register_buffer("SCB", torch.empty(outputs, dtype=torch.float32, device="meta"))
        self.register_buffer("bias", torch.empty(outputs, device="meta") if bias else None)
        self.register_buffer("outlier_columns", torch.empty(0, dtype=torch.int64))
        # What is kept for other linears would be kept for none.
        self.shared = shared
        self.calibrating = False
        self._outlier_weight: Tensor | None = None

    def refresh(self) -> None:
        """Take up newly filled buffers: dequantise the weight's outlier columns, [K', N] in float32."""
        if self.shared is not None:
            self.shared.forget()
        columns = self.outlier_columns
        self._outlier_weight = (
            dequantise_rows(self.weight[:, columns].contiguous(), self.SCB).t().contiguous()
            if columns.numel()
            else None
        )

    def forward(self, values: Tensor) -> Tensor:
        """Map [..., K] to [..., N] in float32."""
        if self.calibrating:
            self._add_outlier_columns(values)
        if torch.is_grad_enabled() and values.requires_grad:
            return ThroughWeight.apply(values, self)  # type: ignore[no-untyped-call]
        return self.multiply(values)

    def multiply(self, values: Tensor) -> Tensor:
        """Return the LLM.int8 product; the integer part is exact, the floating-point part of fixed shape."""
        if self.shared is None:
            quantised, maxima, outliers = _split_and_quantise(_flat(values), self.outlier_columns)
        else:
            quantised, maxima, outliers = self.shared.quantise(values, self.outlier_columns)
        product = integer_product(quantised, self.weight)
        del quantised
        whole = torch.empty(*values.shape[:-1], product.shape[1], device=product.device)
        out = whole.view(product.shape)
        step = _epilogue_rows(out)
        fixed_rows = step if out.is_cuda else min(step, FIXED_ROWS)
        scale = (maxima / (127.0 * 127.0))[:, None]
        for start in range(0, out.shape[0], step):
            rows = slice(start, start + step)
            part = out[rows].copy_(product[rows]).mul_(scale[rows])
            if self.bias is None:
                part.mul_(self.SCB)
            else:
                torch.addcmul(self.bias, part, self.SCB, out=part)
            if outliers is not None and self._outlier_weight is not None:
                add_product_in_fixed_rows(part, outliers[rows], self._outlier_weight, fixed_rows)
        return whole

    def multiply_back(self, gradient: Tensor) -> Tensor:
        """Return gradient [..., N] · the dequantised weight [N, K]."""
        out = product_with_weight(_flat(gradient), self.weight, self.SCB)
        return out.view(*gradient.shape[:-1], self.in_features)

    def _add_outlier_columns(self, values: Tensor) -> None:
        large = _flat(values).abs().amax(0) >= OUTLIER_THRESHOLD
        large[self.outlier_columns] = True
        found = large.nonzero()[:, 0]
        if found.numel() != self.outlier_columns.numel():
            self.outlier_columns = found
            self.refresh()


def _epilogue_rows(out: Tensor) -> int:
    """Return how many rows of a result are finished together: on the CPU about as many as its cache takes."""
    if out.is_cuda:
        return 8 * FIXED_ROWS
    fitting = CACHE_ELEMENTS // out.shape[1]
    return max(FIXED_ROWS // 4, fitting // FIXED_ROWS * FIXED_ROWS)


class QuantisedLinear(Protocol):
    """A linear layer whose weight is rounded: its product, and the way back through the dequantised one."""

    def multiply(self, values: Tensor) -> Tensor:
        """Map [..., K] to [..., N] in float32."""

    def multiply_back(self, gradient: Tensor) -> Tensor:
        """Map the gradient [..., N] of a product to that of its input, [..., K]."""


class ThroughWeight(torch.autograd.Function):
    """Forward as a rounded weight is multiplied, backward through the dequantised one: rounding is treated as
    the identity. Of the weight no more than a block is held.
    """

    @staticmethod
    def forward(context: Any, values: Tensor, linear: QuantisedLinear) -> Tensor:
        """Return the product, values [..., K] to [..., N]."""
        context.linear = linear
        return linear.multiply(values)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the values, [..., K]."""
        linear: QuantisedLinear = context.linear
        return linear.multiply_back(gradients[0]), None


def replace_linears(layer: nn.Module, with_one_input: Sequence[Sequence[str]]) -> None:
    """Swap every linear module of an empty decoder layer for an Int8Linear of the same shape.

    `with_one_input`: names of linears that are fed by one tensor, which is quantised once for all of them.
    """
    shared: dict[str, SharedInput] = {}
    for names in with_one_input:
        if len(names) > 1:
            shared |= dict.fromkeys(names, SharedInput())
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    for name, module in linears.items():
        parent, _, leaf = name.rpartition(".")
        replacement = Int8Linear(
            module.in_features, module.out_features, module.bias is not None, shared.get(name)
        )
        setattr(layer.get_submodule(parent), leaf, replacement)


def check_outlier_columns(linears: Mapping[str, Int8Linear]) -> None:
    """Raise ValueError, naming the linear, where outlier columns are none of the input's, in another order,
    or not those of the linears that share the input.
    """
    of_input: dict[int, list[int]] = {}
    for name, linear in linears.items():
        columns, what = linear.outlier_columns.cpu().tolist(), ""
        if columns != sorted({column for column in columns if 0 <= column < linear.in_features}):
            what = f"columns below {linear.in_features} in ascending order"
        elif of_input.setdefault(id(linear.shared or linear), columns) != columns:
            what = "those of the other linears that share its input"
        if what:
            raise ValueError(f"'{name}.outlier_columns': expected {what}, found {str(columns)[:80]}")


def slow_product_note() -> str | None:
    """Return why int8 products are slow on this CPU, None where they are not."""
    if not _has_integer_instructions():
        return "this CPU has no AVX512: int8 is multiplied in blocks of float32, exactly but more slowly"
    # Not public in torch; a version that does not answer is taken to have the instructions.
    has_vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: True)
    return None if has_vnni() else "this CPU has no AVX512-VNNI: int8 products are slower"
