"""Part 5: attention of DeepSeek-V3's widths by every kernel that takes them, forward and backward.

Queries and keys are 192 wide and values 128, which torch's flash kernel refuses: it gets values
that are padded with zeros, and the time of that counts. What is checked is the project's own
choice, by FlexAttention, against scores of every pair in float32.

Axes: B sequences, H heads, S positions, Q width of queries and keys, V of values.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.documents import attend_in_documents
from model.passes import Whole
from tests.bench.gpu.rows import SKIPPED, Figure, Row, attempted, ratio, share, why
from tests.bench.gpu.setting import Setting, interleaved

HEADS, LENGTH, ODD_LENGTH = 128, 4096, 1000
QUERY, VALUE = 192, 128
SCALE = QUERY**-0.5
DOCUMENTS = 12
HEADS_AT_A_TIME = 16
"""Of the check: scores of all pairs are as many as memory has room for."""
CLOSE = 2.0**-6
"""Of the largest value: operands, probabilities and results are rounded to 8 bits."""
ROUNDS = 5

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def rows(setting: Setting) -> Iterator[Row]:
    """The check first, for it compiles what is timed."""
    for kind in ("documents", "one text"):
        yield from attempted(setting, f"attention, {kind}", "flex", _checked, kind, LENGTH)
    for kind in ("one text", "documents"):
        yield from attempted(setting, f"attention, {kind}", "all", _timed, kind)
    what = f"attention of {ODD_LENGTH} tokens"
    yield from attempted(setting, what, "flex", _checked, "documents", ODD_LENGTH)


def operands(setting: Setting, length: int) -> list[Tensor]:
    """Queries, keys, values and the slope of the results, [1, H, S, width], learning."""
    heads = setting.pick(HEADS, 2)
    generator = torch.Generator(setting.device).manual_seed(0)
    drawn = [
        torch.randn(1, heads, length, width, device=setting.device, generator=generator)
        for width in (QUERY, QUERY, VALUE, VALUE)
    ]
    return [x.bfloat16().requires_grad_() for x in drawn]


def whole_of(setting: Setting, length: int, kind: str) -> Whole:
    """One row of documents of unequal lengths, or of one."""
    tokens_BS = torch.zeros(1, length, dtype=torch.int64, device=setting.device)
    if kind == "one text":
        return Whole(tokens_BS, tokens_BS)
    generator = torch.Generator().manual_seed(0)
    begins_BS = torch.rand(1, length, generator=generator) < DOCUMENTS / length
    return Whole(tokens_BS, begins_BS.cumsum(1).to(setting.device))


def _own(whole: Whole, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the model does on this device, as [B, H, S, V]."""
    return attend_in_documents(q, k, v, whole, scale=SCALE).transpose(1, 2)


def _by(backend: SDPBackend, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=SCALE
        )


def _padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide = F.pad(v, (0, QUERY - VALUE))
    return _by(SDPBackend.FLASH_ATTENTION, None, q, k, wide)[..., :VALUE]


def variants(whole: Whole, kind: str) -> dict[str, Attend | str]:
    """Every kernel, by name, or why it is none for such texts."""
    mask = None if kind == "one text" else whole.mask_B1SS
    flash: Attend | str = _padded if mask is None else f"{SKIPPED}flash takes no mask"
    return {
        "flex": partial(_own, whole),
        "efficient": partial(_by, SDPBackend.EFFICIENT_ATTENTION, mask),
        "cudnn": partial(_by, SDPBackend.CUDNN_ATTENTION, mask),
        "flash, values padded": flash,
    }


def _timed(setting: Setting, kind: str) -> Iterator[Row]:
    length = setting.pick(LENGTH, 64)
    *learnt, slope = operands(setting, length)
    whole = whole_of(setting, length, kind)
    # What the model makes once for all its layers.
    _own(whole, *learnt)

    def forward(attend: Attend) -> object:
        with torch.no_grad():
            return attend(*learnt)

    def both(attend: Attend) -> object:
        return torch.autograd.grad(attend(*learnt), learnt, slope)

    pairs = slope.shape[1] * length * length / 2
    # Backward makes the scores again, and of each of the other products two.
    for name, run, widths in (
        ("forward", forward, QUERY + VALUE),
        ("forward and backward", both, 4 * QUERY + 3 * VALUE),
    ):
        all_of_them: dict[str, Callable[[], object] | str] = {
            by: attend if isinstance(attend, str) else partial(run, attend)
            for by, attend in variants(whole, kind).items()
        }
        found = interleaved(all_of_them, setting, _why, setting.pick(ROUNDS, 1))
        for by, seconds in found.items():
            rate = ratio(2 * pairs * widths / 1e12, seconds)
            more: dict[str, Figure] = {"TFLOP/s": rate} if rate != "" and kind == "one text" else {}
            what = f"attention, {kind}, {name}"
            against = ratio(found["efficient"], seconds)
            figure = share(seconds, 1e-3)
            yield Row(what, by, figure, "ms", ratio=against, of="times efficient", more=more)


def _why(error: BaseException) -> str:
    """That a kernel does not take these widths is no fault, but what was to be found."""
    if any(told in str(error) for told in ("No viable backend", "No available kernel")):
        return f"{SKIPPED}it does not take these operands"
    return why(error)


def _checked(setting: Setting, kind: str, full_length: int) -> Iterator[Row]:
    length = setting.pick(full_length, 64)
    *learnt, slope = operands(setting, length)
    whole = whole_of(setting, length, kind)
    out = _own(whole, *learnt)
    found = [out.detach(), *torch.autograd.grad(out, learnt, slope)]
    gaps = {}
    for name, one, other in zip(
        ("results", "of queries", "of keys", "of values"),
        found,
        by_every_pair(whole, learnt, slope),
        strict=True,
    ):
        gaps[name] = float((one.float() - other).abs().max() / other.abs().max())
    what = f"attention of {length} tokens, {kind}, against every pair"
    figure = max(gaps.values())
    yield Row(what, "flex", figure, "of the largest", most=CLOSE, more=gaps)


def by_every_pair(whole: Whole, learnt: list[Tensor], slope: Tensor) -> list[Tensor]:
    """Results and gradients in float32, a few heads at a time."""
    mask = whole.mask_B1SS
    assert mask is not None
    parts = []
    for first in range(0, slope.shape[1], HEADS_AT_A_TIME):
        some = slice(first, first + HEADS_AT_A_TIME)
        q, k, v = (x.detach()[:, some].float().requires_grad_() for x in learnt)
        scores = (SCALE * (q @ k.mT)).masked_fill(~mask, float("-inf"))
        out = scores.softmax(-1) @ v
        grads = torch.autograd.grad(out, (q, k, v), slope.detach()[:, some].float())
        parts.append([out.detach(), *grads])
    return [torch.cat(each, dim=1) for each in zip(*parts, strict=True)]
