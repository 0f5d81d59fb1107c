"""What a card says of a variant by itself: how it is stored, and what its figures leave out."""

from dataclasses import dataclass, replace

from configs.delivery import ExportConfig
from configs.model import ModelConfig, V4Config


@dataclass(frozen=True, slots=True)
class _Words:
    """What a card says of a family."""

    kind: str
    exact: str
    """Stays float32 in every variant."""
    scales: str
    """Of the blocks of the FP8 variant."""
    bfloat16: str
    """Of the layers, beside norms, in the FP8 variant."""
    unrounded: str
    """Of the layers, beside norms, not in int8 in the INT8 variant."""


_V3 = _Words(
    kind="DeepSeek-V3 family: multi-head latent attention and a mixture of experts",
    exact="the routing bias",
    scales="float32 scale",
    bfloat16="router",
    unrounded="key-value up-projection, router",
)
WORDS = {
    "v3": _V3,
    "v32": replace(
        _V3,
        kind="DeepSeek-V3.2 family: latent attention to the tokens that an indexer picks, and a "
        "mixture of experts",
        scales="float32 scale, a power of two,",
        bfloat16="router and the indexer's norm and head weights",
        unrounded="key-value up-projection, indexer, router",
    ),
    "v4": _Words(
        kind="DeepSeek-V4 family: attention over compressed keys and values, hyper-connections "
        "between layers, and a mixture of experts",
        exact="routing biases, attention sinks, position biases and hyper-connections",
        scales="float32 scale, a power of two,",
        bfloat16="router, compressors and the indexer's head weights",
        unrounded="attention's output projections, compressors, the indexer's head weights, router",
    ),
}


def stored(model: ModelConfig, variant: str, settings: ExportConfig) -> str:
    """How the weights lie on disk."""
    words, memory = WORDS[model.family], ", the memory" if model.engram else ""
    wide = f"embeddings, output head{memory}, norms and {words.bfloat16} in bfloat16, "
    wide += f"{words.exact} in float32."
    asked = {
        "ue8m0": "float32 scale, a power of two,",
        "float32": "float32 scale",
        None: words.scales,
    }
    scales = asked[settings.fp8_scales]
    mtp = " and the MTP layer" if model.num_nextn_predict_layers else ""
    kept = f"{words.unrounded}, norms, embeddings, output head{memory}{mtp} in "
    kept += f"bfloat16, {words.exact} in float32. `quant_model_description.json` says which tensor "
    kept += "is which."
    attention = ""
    if settings.calibration_rows and not isinstance(model, V4Config):
        attention = ", those of attention with one scale and offset for all activations (W8A8)"
    match variant:
        case "fp8":
            return (
                f"Linear and expert weights in float8 E4M3 with one {scales} per 128 x 128 block; "
                f"{wide}"
            )
        case "fp4":
            return (
                "Routed experts in FP4 (E2M1), two values a byte, with one float8 E8M0 scale per "
                f"32 inputs; other Linear weights in float8 E4M3 with one such scale per 128 x 128 "
                f"block; {wide}"
            )
        case "w8a8":
            return (
                "Linear and expert weights in int8 with a scale for each output row "
                f"(W8A8_DYNAMIC){attention}; {kept}"
            )
        case "w4a8":
            return (
                "Routed experts in int4, two rows a byte (W4A8_DYNAMIC), other Linear weights in "
                f"int8 (W8A8_DYNAMIC){attention}, with a scale for each output row; {kept}"
            )
        case _:
            return f"All weights in bfloat16, {words.exact} in float32."


def computed(variant: str) -> str:
    """What the figures contain of how a server computes."""
    if variant in ("w8a8", "w4a8"):
        return (
            "Products are those of integers, as an NPU\nmultiplies them, activations rounded too; "
            "what is between them is float32, where a server has\nbfloat16."
        )
    return (
        "Weights are rounded; activations are float32 on both sides, so what a server's own\n"
        "quantisation of activations adds is not in these figures."
    )


def limits(model: ModelConfig, variant: str, settings: ExportConfig, source: ModelConfig) -> str:
    """What a reader must not expect, as a list."""
    found = [
        "No licence is recorded: neither of its training text nor of what it was made from. Settle "
        "that before you pass it on.",
        "It knows what its corpus taught it and nothing else; it was not aligned to be helpful or "
        "harmless.",
        "These files follow the formats that the servers document. The parity above was measured "
        "by Ingot, on the machine that made the bundle, not by those servers.",
    ]
    ragged = {
        name: size
        for name in ("intermediate_size", "moe_intermediate_size", "hidden_size")
        if (size := getattr(model, name, 0)) % 128
    }
    if variant == "fp8" and ragged:
        sizes = ", ".join(f"{name} = {size}" for name, size in ragged.items())
        found.append(
            f"Block-FP8 kernels want sizes that are multiples of 128; here {sizes}. A server that "
            "insists must be given the bf16 variant."
        )
    if variant == "fp8" and isinstance(model, V4Config):
        found.append("The released DeepSeek-V4 has its routed experts in FP4; these are in FP8.")
    if variant in ("w8a8", "w4a8"):
        smoothed = settings.smooth and settings.calibration_rows > 0
        done = {
            (False, False): "neither rotated nor smoothed",
            (False, True): "smoothed, not rotated",
            (True, False): "rotated, not smoothed",
            (True, True): "rotated and smoothed",
        }[settings.rotate, smoothed]
        found.append(f"Weights were {done} before rounding.")
        if source.num_nextn_predict_layers > model.num_nextn_predict_layers:
            found.append(
                "The MTP layer is left out, so servers cannot draft with it: it shares the output "
                "head with the model, but not the norm in front, which rotation multiplies in."
            )
    if model.engram:
        found.append(
            "No released model of this family has a memory of n-grams. Its tensors are named "
            "`engram.` and are stored in bfloat16; only Ingot reads them."
        )
    return "".join(f"- {limit}\n" for limit in found)
