"""What code written for flash_attn finds: names, argument order, defaults, versions, submodules, and ``install()``."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import flashtile.integrations.flash_attn as flash_attn
from flashtile.errors import FlashtileError, NameTaken

T = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
U = "dropout_p, softmax_scale=None, causal=False, return_attn_probs=False, deterministic=False"
CU = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {T}",
    "flash_attn_qkvpacked_func": f"qkv, {T}",
    "flash_attn_kvpacked_func": f"q, kv, {T}",
    "flash_attn_varlen_func": f"q, k, v, {CU}, {T}, block_table=None",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {T}",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {CU}, {T}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False"
    ),
    "flash_attn_unpadded_func": f"q, k, v, {CU}, {U}",
    "flash_attn_unpadded_kvpacked_func": f"q, kv, {CU}, {U}",
    "flash_attn_unpadded_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {U}",
    "bert_padding.unpad_input": "hidden_states, attention_mask, unused_mask=None",
    "bert_padding.pad_input": "hidden_states, indices, batch, seqlen",
    "bert_padding.index_first_axis": "input, indices",
    "layers.rotary.apply_rotary_emb": (
        "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None"
    ),
    "layers.rotary.RotaryEmbedding": "dim, base=10000.0, interleaved=False, scale_base=None, device=None",
    "layers.rotary.RotaryEmbedding.forward": ("self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None"),
    "modules.mha.FlashSelfAttention": (
        "causal=False, softmax_scale=None, attention_dropout=0.0, window_size=(-1, -1), alibi_slopes=None, "
        "deterministic=False"
    ),
    "modules.mha.FlashSelfAttention.forward": "self, qkv, causal=None, cu_seqlens=None, max_seqlen=None",
    "modules.mha.FlashCrossAttention": (
        "causal=False, softmax_scale=None, attention_dropout=0.0, alibi_slopes=None, window_size=(-1, -1), "
        "deterministic=False"
    ),
    "modules.mha.FlashCrossAttention.forward": (
        "self, q, kv, causal=None, cu_seqlens=None, max_seqlen=None, cu_seqlens_k=None, max_seqlen_k=None"
    ),
    "modules.mha.MHA": (
        "embed_dim, num_heads, num_heads_kv=None, cross_attn=False, qkv_proj_bias=True, out_proj_bias=True, "
        "dropout=0.0, softmax_scale=None, causal=False, layer_idx=None, dwconv=False, rotary_emb_dim=0, "
        "rotary_emb_base=10000.0, rotary_emb_scale_base=None, rotary_emb_interleaved=False, use_alibi=False, "
        "window_size=(-1, -1), fused_bias_fc=False, use_flash_attn=False, return_residual=False, "
        "checkpointing=False, device=None, dtype=None"
    ),
}
SUBMODULES = ("flash_attn_interface", "bert_padding", "layers", "layers.rotary", "modules", "modules.mha")


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    """Names, order, defaults, and that everything can be passed by position and by name."""
    *path, last = name.split(".")
    module = importlib.import_module(".".join(["flashtile.integrations.flash_attn", *(p for p in path if p.islower())]))
    for part in (*(p for p in path if not p.islower()), last):
        module = getattr(module, part)
    assert callable(module)
    parameters = inspect.signature(module).parameters.values()
    assert {parameter.kind for parameter in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    without_types = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    assert ", ".join(str(parameter) for parameter in without_types) == SIGNATURES[name]


def test_every_function_has_a_signature_in_the_table() -> None:
    assert {name for name in SIGNATURES if "." not in name} | {"install", "uninstall"} == set(flash_attn.__all__)
    interface = importlib.import_module("flashtile.integrations.flash_attn.flash_attn_interface")
    assert {*interface.__all__, "install", "uninstall"} == set(flash_attn.__all__)
    for name in interface.__all__:
        assert getattr(interface, name) is getattr(flash_attn, name)


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"])
def test_unknown_options_are_refused(name: str) -> None:
    """FlashAttention-3's and -4's options, and the library's own."""
    for option in ("qv", "sm_margin", "learnable_sink", "window", "scale", "bias", "backend"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            getattr(flash_attn, name)(**{option: None})


def test_version_compares_as_code_compares_it() -> None:
    numbers = tuple(int(part) for part in flash_attn.__version__.split("."))
    assert (2, 8, 0) <= numbers < (2, 9, 0)


# --- install() --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clean_modules() -> Iterator[None]:
    """No flash_attn before, none after."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "flash_attn"}
    for name in before:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.usefixtures("clean_modules")
def test_install_serves_every_import() -> None:
    flash_attn.install()
    flash_attn.install()
    for name in ("", *(f".{submodule}" for submodule in SUBMODULES)):
        ours = importlib.import_module(f"flashtile.integrations.flash_attn{name}")
        assert importlib.import_module(f"flash_attn{name}") is ours
    flash_attn.uninstall()
    assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]
    flash_attn.uninstall()


@pytest.mark.usefixtures("clean_modules")
@pytest.mark.parametrize("loaded", ["flash_attn", "flash_attn.ops"])
def test_install_refuses_beside_the_real_one(loaded: str) -> None:
    real = ModuleType(loaded)
    real.__file__ = "/somewhere/flash_attn/__init__.py"
    sys.modules[loaded] = real
    with pytest.raises(
        NameTaken, match=r"is loaded already, from /somewhere.*Remedy: call install\(\) before"
    ) as caught:
        flash_attn.install()
    assert isinstance(caught.value, FlashtileError) and isinstance(caught.value, ImportError)
    assert [name for name in sys.modules if name.split(".")[0] == "flash_attn"] == [loaded]
    flash_attn.uninstall()
    assert sys.modules[loaded] is real


def test_scripts_that_import_flash_attn_run_after_install() -> None:
    """In a process of its own; importing alone installs nothing, and what is missing is said to be missing."""
    script = """
import importlib.util, sys
import flashtile.integrations.flash_attn as ours
assert importlib.util.find_spec("flash_attn") is None or "flash_attn" not in sys.modules
ours.install()
import flash_attn
from flash_attn import flash_attn_func
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules.mha import MHA
import flash_attn.modules.mha
assert flash_attn is ours and flash_attn.modules.mha.MHA is MHA
try:
    import flash_attn.losses
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "No module named 'flash_attn.losses'"


def test_importing_flashtile_does_not_import_this() -> None:
    script = "import sys, flashtile; print([name for name in sys.modules if 'flash_attn' in name or '.nn' in name])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "flashtile.integrations" not in done.stdout and "flashtile.nn" not in done.stdout


def test_the_example_was_changed_in_one_line() -> None:
    """The rest of it names nothing of flashtile's."""
    script = Path(__file__).resolve().parents[2] / "examples" / "flash_attn_script.py"
    ours = [line for line in script.read_text().splitlines() if "flashtile" in line]
    assert ours == ["import flashtile.integrations.flash_attn as flash_attn  # was: import flash_attn"]
