"""What vllm-ascend asks of an NPU while it makes and loads a model, answered without one.

Model classes, the ModelSlim config, its schemes and the loader stay as they are: replaced are the
groups of several machines, and the settings that a server would read.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock

_OFF = ("oproj_tp_enable", "mlp_tp_enable", "flashcomm2_enable", "enable_dsa_cp_with_layer_shard")


@contextmanager
def patched() -> Iterator[None]:
    """Once for this process."""
    vllm: Any = importlib.import_module("vllm")
    prefill: Any = importlib.import_module("vllm.v1.attention.backends.mla.prefill.flash_attn")
    prefill.flash_attn_varlen_func = MagicMock()
    importlib.import_module("vllm_ascend.quantization.modelslim_config")
    v4: Any = importlib.import_module("vllm_ascend.models.deepseek_v4")
    v4.FusedMoE = _without_routing(v4.FusedMoE)
    # The class itself: by its name, vLLM would look at it in a process that has no stand-in.
    vllm.ModelRegistry.register_model("DeepseekV4ForCausalLM", v4.AscendDeepseekV4ForCausalLM)
    importlib.import_module("vllm_ascend.quantization.method_adapters")
    importlib.import_module("vllm_ascend.quantization.methods")
    settings = _settings()

    def no_group() -> Any:
        raise AttributeError("one machine has no such group")

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm_ascend"):
            if hasattr(module, "get_ascend_config"):
                vars(module)["get_ascend_config"] = lambda: settings
            if hasattr(module, "get_mc2_group"):
                vars(module)["get_mc2_group"] = no_group
            for name in _OFF:
                if hasattr(module, name):
                    setattr(module, name, lambda *_, **__: False)
    yield


def _without_routing(experts: Any) -> Any:
    """Experts that are not told how tokens are routed to them by hash, which loads nothing."""

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in ("hash", "tid2eid"):
            kwargs.pop(name, None)
        experts.__init__(self, *args, **kwargs)

    return type("Experts", (experts,), {"__init__": make})


def _settings() -> MagicMock:
    """A server's, with all that needs more than one device off."""
    settings = MagicMock()
    settings.eplb_config.dynamic_eplb = False
    for name in (
        *("multistream_overlap_gate", "enable_fused_mc2", "mix_placement"),
        *("enable_mc2_hierarchy_comm",),
    ):
        setattr(settings, name, False)
    return settings
