"""Stand-in for Transformer Engine 2.10's PyTorch modules, beneath Megatron-Core's stock layer spec.

Same classes, parameters, arguments and saved tensors; plain PyTorch inside, on any device. Arguments that only choose a
kernel or overlap communication are accepted where Transformer Engine accepts them, and anything that would change the
numbers and is not built here (FP8, LayerNorm, sliding windows, ...) is refused when the module is made.
"""

VERSION = "2.10.0"
"""The version whose signatures are mirrored; Megatron-Core 0.16.1 accepts 2.9 to 2.11 and 2.20 lost what it imports."""
