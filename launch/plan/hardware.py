"""The GPUs that this project plans for: memory, peaks and bandwidths from their makers' data sheets.

Imports neither torch nor NeMo. Peaks are dense: data sheets print twice as much "with sparsity" for Hopper's and
Blackwell's tensor cores, and such figures are halved here. Bandwidths are per GPU. What a data sheet calls GB of memory
is what `nvidia-smi` shows in GiB to within 1 % (H100: 81,559 MiB for "80 GB"), so memory is given in GiB; where sheets
of one product differ, the smaller figure stands.

Single cards of 24 to 48 GB talk over PCI Express: what stands for NVLink in the table is that. Their memory is what
`nvidia-smi` shows, with error correction on where the card has it. GeForce cards halve the rate of tensor cores that
accumulate in FP32, as training does; that is the rate here. Nobody here has run one of them.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from nano3.cli import UserError

GIB = 1 << 30

_DGX_H100 = "NVIDIA H100 data sheet (SXM column); DGX H100 data sheet: 8 ConnectX-7 of 400 Gb/s"
_DGX_H200 = "NVIDIA H200 data sheet (SXM column); DGX H200 data sheet: 8 ConnectX-7 of 400 Gb/s"
_DGX_B200 = "DGX B200 data sheet: 1,440 GB, 64 TB/s, 72 PFLOPS FP8 (sparse) in 8 GPUs, 8 ConnectX-7 of 400 Gb/s"
_DGX_B300 = "DGX B300 data sheet (2.1 TB in 8 GPUs) and HGX B300 table (FP8 72, BF16 36 PFLOPS, sparse); ConnectX-8"
_GB200 = "GB200 NVL72 data sheet: 13.4 TB, 576 TB/s, 720 PFLOPS FP8 (sparse) in 72 GPUs; ConnectX-7 of 400 Gb/s"
_GB300 = "GB300 NVL72 data sheet: 20 TB, 576 TB/s, 720 PFLOPS FP8 (sparse) in 72 GPUs; ConnectX-8 of 800 Gb/s"
_DGX_A100 = "NVIDIA A100 data sheet (SXM columns): 312 TFLOPS BF16; DGX A100 data sheet: 8 ConnectX-6 of 200 Gb/s"
_ADA = "NVIDIA Ada architecture white paper, the card's data sheet in its appendix: BF16 with FP32 accumulate, dense"
_RTX_BLACKWELL = (
    "NVIDIA RTX Blackwell white paper, the card's data sheet in its appendix: BF16 with FP32 accumulate, dense"
)
_L40S = "NVIDIA L40S data sheet: BF16 362 TFLOPS dense, 864 GB/s, PCIe 4.0 x16"
_A6000 = "NVIDIA RTX A6000 data sheet: 309.7 TFLOPS sparse, 768 GB/s, PCIe 4.0 x16"
_L4 = "NVIDIA L4 data sheet: 242 TFLOPS BF16 sparse, 300 GB/s, PCIe 4.0 x16"
_A10G = "NVIDIA A10G data sheet: 70 TFLOPS BF16 dense, 600 GB/s, PCIe 4.0 x16"
MOST_CARDS = 8
"""Single cards that one machine holds."""


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
    def most_per_node(self) -> int:
        """The most GPUs that one machine can have: those of the system, or as many single cards as fit."""
        return MOST_CARDS if self.gpus_per_node == 1 else self.gpus_per_node

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
        Gpu("a100-80", 80.0, 8, 8, 312e12, 2.039e12, 300e9, 25e9, _DGX_A100),
        Gpu("a100-40", 40.0, 8, 8, 312e12, 1.555e12, 300e9, 25e9, _DGX_A100),
        Gpu("rtx5090", 31.8, 1, 8, 209.5e12, 1.792e12, 63e9, 12.5e9, _RTX_BLACKWELL),
        Gpu("rtx4090", 23.9, 1, 8, 165.2e12, 1.008e12, 31.5e9, 12.5e9, _ADA),
        Gpu("l40s", 44.9, 1, 8, 362e12, 864e9, 31.5e9, 12.5e9, _L40S),
        Gpu("a6000", 44.9, 1, 8, 154.8e12, 768e9, 31.5e9, 12.5e9, _A6000),
        Gpu("a10g", 22.4, 1, 8, 70e12, 600e9, 31.5e9, 12.5e9, _A10G),
        Gpu("l4", 22.4, 1, 8, 121e12, 300e9, 31.5e9, 12.5e9, _L4),
    )
}
"""By the name that `--hardware` takes."""


def gib_here() -> float | None:
    """Memory in GiB of the smallest GPU of this machine, as `nvidia-smi` shows it; None without one."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        return min(float(line) for line in shown.splitlines()) / 1024
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, whatever its case; `UserError` for another."""
    try:
        return HARDWARE[name.lower()]
    except KeyError:
        raise UserError(f"hardware {name!r} is not known; choose one of {', '.join(HARDWARE)}") from None
