"""A variant that strays although every weight lies within its bound names the tensor to blame."""

from pathlib import Path

import pytest
from jaxtyping import Float
from torch import Tensor

from configs.delivery import ExportConfig, ExportSpec
from configs.errors import ExportError
from model.weights.files import load_pretrained
from stages.export import blame, bundle, parity
from stages.export.formats import Bf16
from stages.export.tensors import TensorFolder, write_weights
from tests.conftest import Recorder, workspace_at
from tests.stages.bundles import MODELS, files_of, make_checkpoint, make_corpus

COARSE = {
    "v3": "model.layers.2.mlp.shared_experts.down_proj.weight",
    "v32": "model.embed_tokens.weight",
    "v4": "layers.1.attn.wo_b.weight",
}


class Coarse(Bf16):
    """Bfloat16, but for one tensor whose format rounds so coarsely that its bound allows all."""

    @property
    def coarse(self) -> str:
        """That tensor."""
        return COARSE[self.model.family]

    def encode(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """The tensor in steps of its largest value."""
        step = x.abs().max() if name == self.coarse else None
        return super().encode(name, x if step is None else (x / step).round() * step)

    def error_bound(self, name: str, x: Tensor) -> Float[Tensor, "..."]:
        """Half of such a step."""
        bound = super().error_bound(name, x)
        return bound + 0.51 * x.abs().max() if name == self.coarse else bound


@pytest.mark.parametrize("family", MODELS)
def test_the_tensor_whose_rounding_moves_the_logits_is_found(family: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", MODELS[family])
    source, form = TensorFolder(files_of(tmp_path / "checkpoint")), Coarse(MODELS[family])
    folder = tmp_path / "coarse"
    folder.mkdir()
    write_weights(source, form, folder, max_shard_bytes=10**9, before_write=lambda: None)
    reference = load_pretrained(source.folder)
    rows_NS = parity.held_out_rows(make_corpus(tmp_path / "corpus", rows=1), 2, seed=1)
    found = blame.find_culprit(source, TensorFolder(folder), form, reference, rows_NS, 1e-6)
    assert (found.tensor, found.layer) == (form.coarse, parity.layer_of(form.coarse))
    # By itself it makes nearly all of the error, and no other tensor does.
    assert found.kl_nats > 0.8 * found.whole_kl_nats


def test_passes_are_few_and_the_heaviest_is_found_wherever_it_is() -> None:
    for count in (1, 2, 3, 61, 776):
        for heaviest in {0, count // 3, count - 1}:
            passes = 0

            def weigh(some: object, heaviest: int = heaviest) -> float:
                nonlocal passes
                passes += 1
                assert isinstance(some, list)
                return sum(10.0 if one == str(heaviest) else 0.01 for one in some)

            names = [str(number) for number in range(count)]
            assert blame._heaviest(names, weigh) == str(heaviest)
            assert passes <= 2 * (count - 1).bit_length()


def test_the_message_of_an_export_that_fails_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", MODELS["v3"])
    monkeypatch.setattr(bundle, "formats", lambda *_: (Coarse(MODELS["v3"]),))
    settings = ExportConfig(problems=0, parity_prompts=2, max_kl_nats=0.001, min_top1_agreement=0)
    spec = ExportSpec(seed=1, target="cuda", export=settings)
    work = workspace_at(tmp_path / "bundle", Recorder())
    with pytest.raises(ExportError) as caught:
        bundle.export(
            spec, work, corpus=make_corpus(tmp_path / "corpus", rows=1), checkpoint=checkpoint
        )
    said = str(caught.value)
    assert "above export.max_kl_nats = 0.001" in said
    assert f"; {COARSE['v3']} is to blame before others: its rounding alone makes" in said
    assert "that of model.layers.2" in said
