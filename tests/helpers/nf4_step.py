"""Run by tests/nano3/test_nf4_step.py: one QLoRA step on pico, by Hugging Face and bitsandbytes and by us.

python -m tests.helpers.nf4_step FOLDER/reference.pt  -> {"loss", "gradients"}: transformers, PEFT, bitsandbytes
python -m tests.helpers.nf4_step FOLDER/ours.pt       -> the same by Megatron-Core under the stand-ins, and what is kept

Adapters are on what PEFT takes: q, k, v and o, in_proj, the shared expert's; PEFT refuses out_proj. The frozen weights
of both are in NF4 with bitsandbytes' rounding of scales; transformers leaves routed experts as they are, so these get
the values that NF4 has for them.
"""

from __future__ import annotations

import hashlib
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nano3.arch import Arch, resolve_model

RANK, ALPHA, TOKENS = 8, 16.0, 48
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj")
FOLDER = resolve_model("pico")


def drawn(name: str, *shape: int) -> torch.Tensor:
    """Random numbers of this name: both sides have the same."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and loss mask, (1, TOKENS)."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(20, 312, (2, 1, TOKENS), generator=generator)
    return tokens, labels, (torch.rand(1, TOKENS, generator=generator) > 0.3).float()


def low_name(name: str) -> str:
    """q, k and v share one A, as Megatron's linear_qkv has it."""
    return name[:-6] + "qkv" if name.endswith(("q_proj", "k_proj", "v_proj")) else name


def reference() -> dict[str, Any]:
    """The step by transformers, PEFT and bitsandbytes; gradients by `NAME.A` and `NAME.B`, names as on disk."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tests.helpers.bitsandbytes_cpu import theirs

    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, quantization_config=four, device_map={"": "cpu"}, local_files_only=True
    )
    tensors, frozen = load_file(FOLDER / "model.safetensors"), 0
    for name, module in model.named_modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))  # evaluation/hf_model.py says why
        frozen += type(module).__name__ == "Linear4bit"
        if name.endswith("mixer.experts"):
            disk = name.replace("model.", "backbone.", 1)
            for part in ("up_proj", "down_proj"):
                whole = getattr(module, part)
                for number in range(whole.shape[0]):
                    made = theirs(tensors[f"{disk}.{number}.{part}.weight"].float())
                    whole.data[number].copy_(made[str(torch.float32)])
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), bias="none"))
    adapters = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            name = path.removeprefix("base_model.model.").replace("model.", "backbone.", 1)
            adapters[name] = low, high = module.lora_A["default"].weight, module.lora_B["default"].weight
            with torch.no_grad():
                low.copy_(drawn(low_name(name) + ".A", *low.shape))
                high.copy_(drawn(name + ".B", *high.shape))
    tokens, labels, mask = batch()
    logits = model.train()(input_ids=tokens).logits.float()
    losses = torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="none")
    loss = (losses * mask[0]).sum() / mask.sum()
    loss.backward()
    found = {
        f"{name}.{side}": one.grad for name, pair in adapters.items() for side, one in zip("AB", pair, strict=True)
    }
    return {"loss": loss.item(), "gradients": found, "frozen": frozen}


def ours() -> dict[str, Any]:
    """The same by Megatron-Core; and how many dequantized weights are alive after forward, and at most at once."""
    from nano3.model import nano3_config  # first: it switches the CPU backend on

    # isort: split
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module

    from nano3.core import packed_seq_params
    from nano3.lora.adapter_walk import adapted_layers
    from nano3.lora.lora import Nano3LoRA
    from nano3.nf4 import Nf4
    from nano3.nf4_base import load_in_nf4
    from nano3.targets import select
    from nano3.tensor_names import adaptable
    from tests.helpers.bitsandbytes_cpu import quantized

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    arch, tensors = Arch.load(FOLDER), load_file(FOLDER / "model.safetensors")
    modules = select(arch, ["linear_qkv", "linear_proj", "in_proj", "*.shared_experts.*"], "none")

    def build(bf16: bool, nf4: bool = True) -> torch.nn.Module:
        def load(model: Any) -> None:
            load_in_nf4(model, arch, lambda name: tensors[name], quantized)

        model = nano3_config(arch, TOKENS, bf16, load_base=load if nf4 else None).configure_model(None)
        return Nano3LoRA(modules=modules, rank=RANK, alpha=ALPHA)(model)

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        tokens, labels, mask = batch()
        bounds = {"cu_seqlens": torch.tensor([0, TOKENS]).int(), "max_seqlen": torch.tensor(TOKENS)}
        losses = model(
            input_ids=tokens, position_ids=torch.arange(TOKENS)[None], attention_mask=None, labels=labels,
            packed_seq_params=packed_seq_params(bounds, 1),
        )  # fmt: skip
        return (losses * mask).sum() / mask.sum()

    def kept_bytes(model: torch.nn.Module) -> int:
        """Bytes of activations that forward keeps for backward."""
        own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(model)
        del loss
        return sum(found.values())

    # 1. The step in FP32 with bitsandbytes' rounding.
    model, linears, found = build(False), adaptable(arch), {}
    layers = list(adapted_layers(model))
    for layer in layers:
        blocks = linears[layer.path].blocks
        names = [block.name.removesuffix(".weight") for block in blocks]
        high = [drawn(f"{n}.B", tensors[f"{n}.weight"].shape[0], RANK) for n in names]
        with torch.no_grad():
            layer.adapter.linear_in.weight.copy_(drawn(low_name(names[0]) + ".A", RANK, linears[layer.path].width))
            rows = [part[b.start : b.start + b.count] for part, b in zip(high, blocks, strict=True)]
            layer.adapter.linear_out.weight.copy_(torch.cat(rows))
    loss = loss_of(model)
    loss.backward()
    for layer in layers:
        blocks = linears[layer.path].blocks
        found[layer.path] = {
            "A": layer.adapter.linear_in.weight.grad,
            "B": layer.adapter.linear_out.weight.grad,
            "blocks": [(block.name.removesuffix(".weight"), block.start, block.count) for block in blocks],
        }
    activations = kept_bytes(build(False, nf4=False)), kept_bytes(model)
    # 2. A BF16 model as training wraps it: scales stay FP32, and no dequantized weight outlives its product.
    model = build(True)
    scales = {buffer.dtype for part in model.modules() if isinstance(part, Nf4) for buffer in (part.scale, part.offset)}
    wrapped = Float16Module(model.config, model)
    kept = {buffer.dtype for part in model.modules() if isinstance(part, Nf4) for buffer in (part.scale, part.offset)}
    alive: set[int] = set()
    peak, made = 0, 0
    values = Nf4.values

    def counted(self: Nf4, dtype: torch.dtype) -> torch.Tensor:
        nonlocal peak, made
        out = values(self, dtype)
        key, made = id(out.untyped_storage()), made + 1
        alive.add(key)
        weakref.finalize(out.untyped_storage(), alive.discard, key)
        weakref.finalize(out, alive.discard, key)
        peak = max(peak, len(alive))
        return out

    Nf4.values = counted  # type: ignore[method-assign]
    rough = loss_of(wrapped)
    after_forward = len(alive)
    rough.backward()
    Nf4.values = values  # type: ignore[method-assign]
    floats = sum(p.numel() for name, p in model.named_parameters() if ".adapter." not in name)
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    return {
        "kept": activations, "loss": loss.item(), "layers": found, "scales": {*scales, *kept}, "alive": after_forward,
        "peak": peak, "made": made, "bf16_loss": rough.item(), "float_values": floats,
        "gradients_finite": finite,
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    torch.save({"reference": reference, "ours": ours}[out.stem](), out)
