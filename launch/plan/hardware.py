"""The GPUs that this project plans for: memory, peaks and bandwidths from their makers' data sheets.

Imports neither torch nor NeMo. Peaks are dense: data sheets print twice as much "with sparsity" for Hopper's and
Blackwell's tensor cores, and such figures are halved here. Bandwidths are per GPU. What a data sheet calls GB of memory
is what `nvidia-smi` shows in GiB to within 1 % (H100: 81,559 MiB for "80 GB"), so memory is given in GiB; where sheets
of one product differ, the smaller figure stands.
"""

from __future__ import annotations

from dataclasses import dataclass

from nano3.cli import UserError

GIB = 1 << 30

_DGX_H100 = "NVIDIA H100 data sheet (SXM column); DGX H100 data sheet: 8 ConnectX-7 of 400 Gb/s"
_DGX_H200 = "NVIDIA H200 data sheet (SXM column); DGX H200 data sheet: 8 ConnectX-7 of 400 Gb/s"
_DGX_B200 = "DGX B200 data sheet: 1,440 GB, 64 TB/s, 72 PFLOPS FP8 (sparse) in 8 GPUs, 8 ConnectX-7 of 400 Gb/s"
_DGX_B300 = "DGX B300 data sheet (2.1 TB in 8 GPUs) and HGX B300 table (FP8 72, BF16 36 PFLOPS, sparse); ConnectX-8"
_GB200 = "GB200 NVL72 data sheet: 13.4 TB, 576 TB/s, 720 PFLOPS FP8 (sparse) in 72 GPUs; ConnectX-7 of 400 Gb/s"
_GB300 = "GB300 NVL72 data sheet: 20 TB, 576 TB/s, 720 PFLOPS FP8 (sparse) in 72 GPUs; ConnectX-8 of 800 Gb/s"


@dataclass(frozen=True)
class Gpu:
    """One GPU in the system that it is sold in.

    `nvlink` and `network` are bytes per second in one direction; data sheets print both directions of NVLink together.
    """

    name: str
    memory_gib: float
    """GPU memory in GiB before anything runs."""
    gpus_per_node: int
    """GPUs of one operating system: what Slurm calls a node."""
    nvlink_domain: int
    """GPUs that NVLink connects all to all; a multiple of `gpus_per_node` where it spans nodes."""
    bf16: float
    """Dense BF16 FLOP/s of the tensor cores."""
    hbm: float
    """Bytes per second of GPU memory."""
    nvlink: float
    network: float
    source: str

    @property
    def memory(self) -> int:
        """GPU memory in bytes."""
        return int(self.memory_gib * GIB)


HARDWARE = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 79.6, 8, 8, 989e12, 3.35e12, 450e9, 50e9, _DGX_H100),
        Gpu("h200", 140.4, 8, 8, 989e12, 4.8e12, 450e9, 50e9, _DGX_H200),
        Gpu("b200", 179.0, 8, 8, 2250e12, 8.0e12, 900e9, 50e9, _DGX_B200),
        Gpu("b300", 262.5, 8, 8, 2250e12, 8.0e12, 900e9, 100e9, _DGX_B300),
        Gpu("gb200", 184.0, 4, 72, 2500e12, 8.0e12, 900e9, 50e9, _GB200),
        Gpu("gb300", 277.0, 4, 72, 2500e12, 8.0e12, 900e9, 100e9, _GB300),
    )
}
"""By the name that `--hardware` takes."""


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, whatever its case; `UserError` for another."""
    try:
        return HARDWARE[name.lower()]
    except KeyError:
        raise UserError(f"hardware {name!r} is not known; choose one of {', '.join(HARDWARE)}") from None
