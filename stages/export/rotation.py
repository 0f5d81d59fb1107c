"""Residual streams turned by an orthogonal matrix, which spreads outlying channels over all others.

What layers write is turned and what they read is turned back, so that the model computes what it
did while no channel of what its norms give stands out (QuaRot, arXiv 2404.00456, section 4, stage
1a). A norm's weight would not commute with the turn: it is multiplied into what reads the norm,
and 1 is left in its place.

| tensors | become, with the turn Q [D, D] |
|---|---|
| embedding | E Q |
| readers of a layer's norms, output head | W diag(norm) Q |
| weights of hyper-connections, for each stream | W Q |
| attention's last projection, down projections | Q^T W |

The MTP layer is left out, as ModelSlim leaves it out by default: it reads the output head behind a
norm of its own, and one head cannot hold two norms' weights.

Axes: D width, R rows, X columns, D of each stream.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from configs.model import ModelConfig, V4Config
from configs.seed import derive
from model.weights.config import table_of
from stages.export.layouts import turn_width
from stages.export.smoothing import readers_of
from stages.export.tensors import TensorFolder

_NORMS = ("input_layernorm", "post_attention_layernorm")
"""Of a layer, those that read the residual streams."""
_WRITERS = (
    *("self_attn.o_proj.weight", "mlp.down_proj.weight", "mlp.experts.down_proj"),
    "mlp.shared_experts.down_proj.weight",
)
_V4_WRITERS = (
    *("self_attn.o_b_proj.weight", "mlp.experts.down_proj"),
    "mlp.shared_experts.down_proj.weight",
)
_V4_MIXERS = ("attn_hc.fn", "ffn_hc.fn")


class RotatedFolder(TensorFolder):
    """A folder of a model whose tensors are read with its residual streams turned."""

    def __init__(self, folder: Path, model: ModelConfig, *, seed: int) -> None:
        """The seed draws the turn; tensors of the MTP layer are not among the names."""
        super().__init__(folder)
        table, prefix = table_of(model), table_of(model).mtp_prefix(model)
        self.file_of = {n: file for n, file in self.file_of.items() if not n.startswith(prefix)}
        self.turn_DD = turn(model.hidden_size, seed=seed)
        self._norm_of: dict[str, str] = {}
        """Tensors whose columns are turned, and the norm whose weight they take up, if any."""

        def stored(name: str) -> list[str]:
            return [part.name for part in table.parts(model, name) if part.name in self.file_of]

        (embedding,), (head,) = stored("model.embed_tokens.weight"), stored("lm_head.weight")
        (final,) = stored("model.norm.weight")
        self._norm_of |= {embedding: "", head: final}
        rows: list[str] = []
        is_v4 = isinstance(model, V4Config)
        for layer in range(model.num_hidden_layers):
            front = f"model.layers.{layer}."
            for norm in _NORMS:
                (weight,) = stored(f"{front}{norm}.weight")
                for leaf in readers_of(model)[norm]:
                    self._norm_of |= dict.fromkeys(stored(f"{front}{leaf}"), weight)
            for leaf in _V4_WRITERS if is_v4 else _WRITERS:
                rows += stored(f"{front}{leaf}")
            for leaf in _V4_MIXERS if is_v4 else ():
                self._norm_of |= dict.fromkeys(stored(f"{front}{leaf}"), "")
        if is_v4:
            self._norm_of |= dict.fromkeys(stored("model.hc_head.hc_fn"), "")
        self._rows = frozenset(rows)
        self._ones = frozenset(self._norm_of.values()) - {""}

    def read(self, name: str) -> Tensor:
        """One tensor of the turned model; what is turned is float32."""
        tensor = super().read(name)
        if name in self._ones:
            return torch.ones_like(tensor)
        if name in self._rows:
            turned: Tensor = self.turn_DD.T @ tensor.double()
            return turned.float()
        if name not in self._norm_of:
            return tensor
        norm, columns_RX = self._norm_of[name], tensor.double()
        if norm:
            columns_RX = columns_RX * super().read(norm).double()
        # Columns of hyper-connections are those of the streams, side by side.
        apart: Tensor = columns_RX.unflatten(-1, (-1, len(self.turn_DD))) @ self.turn_DD
        return apart.flatten(-2).float()


def turn(width: int, *, seed: int) -> Float[Tensor, "D D"]:
    """float64: blocks of a Hadamard matrix with drawn signs, as wide as `width` divides by 2."""
    block = turn_width(width)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < block:
        above = torch.cat([hadamard, hadamard], 1)
        hadamard = torch.cat([above, torch.cat([hadamard, -hadamard], 1)])
    generator = torch.Generator().manual_seed(derive(seed, "export", "turn"))
    signs_D = 2.0 * torch.randint(0, 2, (width,), generator=generator).double() - 1
    blocks: Tensor = torch.block_diag(*[hadamard / block**0.5] * (width // block))
    turned: Tensor = signs_D.unsqueeze(1) * blocks
    return turned
