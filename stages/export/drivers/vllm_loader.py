"""What vLLM's loader makes of a variant's files, read back parameter by parameter.

The real model class, quantisation config, parameters and loader; no product is computed, since
those of FP8 need other CPUs or a GPU, and those of W8A8 an NPU. Every parameter is filled with a
value that no file holds before anything is loaded, so that one that is never written shows.

Job: `bundle`, `ascend` (vllm-ascend's schemes in place of vLLM's FP8).
Answer: `versions`, `checks`.

Several stored matrices become one parameter: `_SOURCES` says which, first rows first.
"""

import importlib
import importlib.metadata
import json
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_PLUGINS": "",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
}
ASCEND = Path(__file__).with_name("ascend")
_SOURCES = {
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "wk_weights_proj": ("wk", "weights_proj"),
    "fused_wqa_wkv": ("wq_a", "wkv"),
    "fused_wkv_wgate": ("wkv", "wgate"),
}
_EXPERTS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
_V4_WORDS = (
    ("model.embed_tokens.", "embed."),
    ("lm_head.", "head."),
    ("model.", ""),
    (".self_attn.", ".attn."),
    (".mlp.", ".ffn."),
    (".gate_proj.", ".w1."),
    (".up_proj.", ".w3."),
    (".down_proj.", ".w2."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".e_score_correction_bias", ".bias"),
)
BLOCK = 128
UNWRITTEN = 0x7F
"""In every byte before loading: no number in E4M3, and beyond all weights in other types."""
_UNUSED_IF_STATIC = ("weight_scale", "weight_offset")
"""Made for every INT8 Linear; a static scheme multiplies by `deq_scale`, and stores neither."""


def main(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to a job."""
    if job["ascend"]:
        sys.path.insert(0, str(ASCEND))
        importlib.import_module("torch_npu")
    checks = read_back(dict(loaded(job).named_parameters()), Path(job["bundle"]))
    names = ("vllm-cpu", "vllm-ascend") if job["ascend"] else ("vllm-cpu",)
    return {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "checks": checks,
    }


def loaded(job: dict[str, Any]) -> Any:
    """The model, after loading and before anything is laid out for a device."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    patched = importlib.import_module("without_npu").patched if job["ascend"] else without_products
    more = {"quantization": "ascend"} if job["ascend"] else {}
    attend_anyhow()
    with patched():
        config = EngineArgs(
            model=job["bundle"],
            dtype="bfloat16",
            enforce_eager=True,
            **more,
        ).create_engine_config()
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
            initialize_model_parallel(1, 1)
            with set_default_torch_dtype(torch.bfloat16), torch.device("cpu"):
                model = initialize_model(config)
            for parameter in model.parameters():
                parameter.data.reshape(-1).view(torch.uint8).fill_(UNWRITTEN)
            DefaultModelLoader(config.load_config).load_weights(model, config.model_config)
    return model


def attend_anyhow() -> None:
    """MLA, sparse or not, gets a backend of GPUs, which is never called: a CPU lacks the sparse."""
    platform = importlib.import_module("vllm.platforms.cpu").CpuPlatform
    usual = platform.get_attn_backend_cls.__func__

    def choose(cls: Any, *args: Any, **kwargs: Any) -> Any:
        asked = next(one for one in (*args, *kwargs.values()) if hasattr(one, "use_mla"))
        if asked.use_mla:
            return "vllm.v1.attention.backends.mla.triton_mla.TritonMLABackend"
        return usual(cls, *args, **kwargs)

    platform.get_attn_backend_cls = classmethod(choose)


@contextmanager
def without_products() -> Iterator[None]:
    """No kernel of FP8 is looked for, of which this CPU may have none, and nothing attends."""
    fp8: Any = importlib.import_module("vllm.model_executor.layers.quantization.fp8")
    fp8.init_fp8_linear_kernel = lambda **_: MagicMock()
    for name in dir(fp8):
        if name.startswith("select_fp8_moe_backend"):
            setattr(fp8, name, lambda *_, **__: (MagicMock(), MagicMock()))

    def idle(*_: Any, **__: Any) -> MagicMock:
        return MagicMock(dcp_world_size=1, uses_amx_bmm=False, q_pad_num_heads=None)

    # Of V4: experts in FP4, and what overlaps its parts on a GPU.
    mxfp4: Any = importlib.import_module("vllm.model_executor.layers.quantization.mxfp4")
    mxfp4.select_deepseek_v4_mxfp4_moe_backend = lambda *_, **__: (MagicMock(), MagicMock())
    cuda: Any = importlib.import_module("torch.cuda")
    cuda.Event = cuda.Stream = MagicMock()

    # It would be told which tokens an indexer picked, and knows none.
    backend: Any = importlib.import_module("vllm.v1.attention.backends.mla.triton_mla")
    backend.TritonMLABackend.get_impl_cls = staticmethod(lambda: idle)
    yield


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def read_back(parameters: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Parameters and rows against the files, and whether each stored tensor went somewhere."""
    files, config = stored(folder), json.loads((folder / "config.json").read_text())
    is_v4 = config["model_type"] == "deepseek_v4"
    used: set[str] = set()
    wrong: list[str] = []
    rows = rows_right = compared = 0
    for name in parameters:
        groups = sources(name, files, is_v4)
        if not groups:
            module, _, leaf = name.rpartition(".")
            if leaf in _UNUSED_IF_STATIC and f"{module}.deq_scale" in parameters:
                continue
            wrong.append(f"{name}, which no stored tensor is for")
            compared += 1
            continue
        parts = [part for group in groups for part in group]
        # A matrix that is widened takes its scales in.
        used |= {one for part in parts for one in (part, scale_name(part, files)) if one}
        right, of = rows_alike(name, parameters, groups, files)
        compared += 1
        if right != of:
            wrong.append(f"{name}, {of - right} of {of} rows")
        if name.endswith("weight"):
            rows, rows_right = rows + of, rows_right + right
    mtp = "mtp." if is_v4 else f"model.layers.{config['num_hidden_layers']}."
    wanted = {name for name in files if not name.startswith(mtp)}
    lost = sorted(wanted - used)
    return [
        check("parameters equal to the files", compared - len(wrong), compared, wrong),
        check("rows of weights equal to the files", rows_right, rows, wrong),
        check("stored tensors loaded", len(wanted) - len(lost), len(wanted), lost),
    ]


def check(what: str, equal: int, of: int, wrong: list[str]) -> dict[str, Any]:
    """One comparison."""
    return {"what": what, "equal": equal, "of": of, "first_apart": wrong[0] if wrong else ""}


def stored(folder: Path) -> dict[str, Any]:
    """Every tensor of the folder, by name."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in list(file.keys())}
    return found


def sources(name: str, files: Mapping[str, Any], is_v4: bool) -> list[tuple[str, ...]]:
    """The stored tensors that a parameter is made of: for each expert, or once, those in a row.

    Empty if one of them is not stored.
    """
    routed = re.fullmatch(r"(.*\.experts)\.(?:\w+\.)?(w13|w2)_(\w+)", name)
    if routed:
        prefix, kind, leaf = routed.groups()
        many = [
            tuple(f"{prefix}.{expert}.{module}.{leaf}" for module in _EXPERTS[kind])
            for expert in range(count_experts(files))
        ]
    else:
        path, _, leaf = name.rpartition(".")
        parent, _, module = path.rpartition(".")
        many = [tuple(f"{parent}.{one}.{leaf}" for one in _SOURCES.get(module, (module,)))]
        if not parent:
            many = [(name,)]
    if is_v4:
        many = [tuple(v4_name(one, files) for one in group) for group in many]
    return many if all(one in files for group in many for one in group) else []


def v4_name(name: str, files: Mapping[str, Any]) -> str:
    """The released name of a tensor of V4, whose words differ from those of its parameters.

    Scales of FP8 and FP4 are called `scale`, those of ModelSlim as their parameters are.
    """
    for ours, theirs in _V4_WORDS:
        name = name.removeprefix(ours) if ours == "model." else name.replace(ours, theirs)
    released = re.sub(r"\.weight_scale(_inv)?$", ".scale", name)
    return released if released in files else name


def count_experts(files: Mapping[str, Any]) -> int:
    """Routed experts of a layer."""
    return 1 + max(int(match[1]) for name in files if (match := re.search(r"experts\.(\d+)", name)))


def rows_alike(
    name: str,
    parameters: Mapping[str, Any],
    groups: list[tuple[str, ...]],
    files: Mapping[str, Any],
) -> tuple[int, int]:
    """How many rows of a parameter are what the files hold, and how many there are."""
    import torch

    have = parameters[name].data
    right = of = 0
    for number, group in enumerate(groups):
        mine = have[number] if len(groups) > 1 else have
        wanted = [value(files, one) for one in group]
        if mine.numel() == 1 and len(group) > 1:
            # One figure for a whole matrix: all that it is made of must agree on it.
            same = all(torch.equal(one.to(mine.dtype).flatten(), mine.flatten()) for one in wanted)
            right, of = right + same, of + 1
            continue
        got = widened(mine, parameters.get(f"{name}_scale_inv"), number, len(groups))
        want = torch.cat(wanted) if wanted[0].dim() else wanted[0]
        rows = mine.shape[0] if mine.dim() else 1
        of += rows
        if got.numel() == want.numel():
            want = alike(want, got.dtype).reshape(got.shape)
            right += int((got == want).reshape(rows, -1).all(1).sum())
    return right, of


def alike(x: Any, dtype: Any) -> Any:
    """`x` in another type; what goes into bytes goes there bit by bit, as codes do."""
    import torch

    return x.view(dtype) if dtype == torch.uint8 and x.element_size() == 1 else x.to(dtype)


def value(tensors: Mapping[str, Any], name: str) -> Any:
    """A stored tensor, widened if it has block scales."""
    scale = scale_name(name, tensors)
    return widened(tensors[name], tensors[scale] if scale else None, 0, 1)


def scale_name(name: str, files: Mapping[str, Any]) -> str | None:
    """Where the block scales of an FP8 matrix are stored; none of what has none."""
    if "float8_e4m3" not in str(files[name].dtype):
        return None
    names = (f"{name}_scale_inv", f"{name.removesuffix('.weight')}.scale")
    return next((one for one in names if one in files), None)


def widened(x: Any, scale: Any, number: int, of: int) -> Any:
    """FP8 of one matrix times its blocks' scales; anything else as it is."""
    if scale is None:
        return x.data
    grid = (scale.data[number] if of > 1 else scale.data).float()
    grid = grid.repeat_interleave(BLOCK, 0)[: x.shape[0]]
    return x.data.float() * grid.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
