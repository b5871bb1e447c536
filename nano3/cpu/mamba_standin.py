"""Stand-ins for the packages `mamba_ssm` and `causal_conv1d`, whose kernels need CUDA, beneath megatron-core's mixer.

What they offer: the two scan functions, the convolution and the gated norm, for training and whole-sequence forward.
What they leave out, so that megatron-core falls back to its own PyTorch code for single-token decoding:
`causal_conv1d_update` is None and `mamba_ssm.ops.triton.selective_state_update` does not exist.

transformers, too, picks these packages up where it finds them, at the import of its `nemotron_h` model. A reference
must not run on the code that it checks: import `transformers.models.nemotron_h.modeling_nemotron_h` before `install()`,
or compare with a process that never calls it.
"""

from __future__ import annotations

from typing import Any

from nano3.cpu.conv import causal_conv1d_fn, causal_conv1d_varlen_states
from nano3.cpu.norm import RMSNorm, rmsnorm_fn
from nano3.cpu.ssd_combined import mamba_chunk_scan_combined
from nano3.cpu.ssd_split import mamba_split_conv1d_scan_combined
from nano3.cpu.standin import put_module

MAMBA_VERSION = "2.3.2.post1"
"""The mamba-ssm release whose public signatures are mirrored; megatron-core asks for 2.0.0 to train on packed data."""
CONV_VERSION = "1.7.0"
"""The same for causal-conv1d; megatron-core asks for 1.4.0."""

MODULES: dict[str, dict[str, Any]] = {
    "mamba_ssm": {"__version__": MAMBA_VERSION},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
        "mamba_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
    },
    "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": RMSNorm, "rmsnorm_fn": rmsnorm_fn},
    "causal_conv1d": {
        "__version__": CONV_VERSION,
        "causal_conv1d_fn": causal_conv1d_fn,
        "causal_conv1d_update": None,
    },
    "causal_conv1d.causal_conv1d_varlen": {"causal_conv1d_varlen_states": causal_conv1d_varlen_states},
}
"""Every module that is put in place, with the names it has."""


def install() -> None:
    """Puts the stand-ins into `sys.modules`, over whatever is there. Call it before megatron-core is imported.

    The versions are on the modules only, where megatron-core reads them, and not in the package metadata: whoever asks
    for installed distributions must hear the truth.
    """
    for name, names in MODULES.items():
        put_module(name, **names)
