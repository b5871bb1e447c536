"""A model in plain transformers, PEFT and bitsandbytes, for recipes/qwen3_qlora.py: nothing of the Megatron path.

transformers keeps packed documents apart only when it is given position_ids, no attention mask and no cache: it then
derives the documents from the positions. Otherwise every token sees all before it, and nothing says so.
"""

from __future__ import annotations

import math
import resource
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from data_prep.packing import PackedDataset
from nano3.cli import UserError
from nano3.hf_config import read_config

LEAK = 1e-3
"""What another document may move logits by, over their largest: rounding. A leak moves them by about their size."""


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def checked_packs(folder: Path, seq_length: int, model: Path) -> PackedDataset:
    """The packs of a store that was made with the tokenizer of `model`, every byte of it checked."""
    packs = PackedDataset(folder, seq_length)
    packs.check_contents()
    packs.store.check_tokenizer(model)
    return packs


def load_base(folder: Path, four_bit: bool) -> Any:
    """The causal language model in `folder`, frozen: BF16 on a GPU, FP32 on a CPU, its linear layers in NF4 if asked.

    NF4 has double quantization, and lm_head and embeddings stay as they are. Raises `UserError` for a folder that
    transformers cannot load, and for a Nemotron-H, whose experts this path leaves in 16 bit.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if read_config(folder).get("model_type") == "nemotron_h":
        raise UserError(f"{folder} is a Nemotron-H; use recipes/nemotron_lora.py, which packs and merges it exactly")
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    more = {"quantization_config": nf4} if four_bit else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device()}, attn_implementation="sdpa", local_files_only=True, **more
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"transformers cannot load {folder}: {error}") from error
    for module in model.modules():  # bitsandbytes' CPU kernel for evaluation packs weights anew and computes in BF16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
    return model


def with_lora(model: Any, rank: int, alpha: int, dropout: float) -> Any:
    """The model with a PEFT adapter on all linear layers but lm_head, layers computed again in the backward pass."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    kind = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, kind)


def logits(model: Any, pack: dict[str, Any]) -> torch.Tensor:
    """(S, vocabulary) of a pack of `data_prep.packing.PackedDataset`, its documents apart."""
    tokens, positions = (torch.from_numpy(pack[key])[None].to(model.device) for key in ("tokens", "position_ids"))
    return model(input_ids=tokens, position_ids=positions, use_cache=False).logits[0]


def weighted_loss(model: Any, pack: dict[str, Any]) -> torch.Tensor:
    """Sum over the pack of each token's loss times its weight, in nats; FP32."""
    labels, weights = (torch.from_numpy(pack[key]).to(model.device) for key in ("labels", "loss_mask"))
    losses = cross_entropy(logits(model, pack).float(), labels, reduction="none")
    return (losses * weights).sum()


def mean_loss(model: Any, packs: PackedDataset) -> float:
    """Over all supervised tokens of a store, in nats, by weight; without dropout and gradients."""
    training = model.training
    model.eval()
    with torch.no_grad():
        total = sum(float(weighted_loss(model, packs[number])) for number in range(len(packs)))
    model.train(training)
    return total / sum(float(packs[number]["loss_mask"].sum()) for number in range(len(packs)))


def order_of_packs(packs: int, epochs: float, batch: int, seed: int) -> np.ndarray:
    """Numbers of the packs of each step, (steps, batch) int64: every pass over the data in an order of its own."""
    steps = math.ceil(epochs * packs / batch)
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(packs) for _ in range(math.ceil(steps * batch / packs))]
    return np.concatenate(passes)[: steps * batch].reshape(steps, batch)


def prove_isolation(model: Any, packs: PackedDataset) -> float:
    """`require_isolation` on the first pack that holds several documents; 0 where documents have packs of their own."""
    several = (number for number in range(len(packs)) if len(packs.documents(number)) > 1)
    first = next(several, None)
    return 0.0 if first is None else require_isolation(model, packs[first])


def require_isolation(model: Any, pack: dict[str, Any]) -> float:
    """How far other tokens in the first document move the logits of those behind it, over the largest logit.

    `pack` holds at least two documents. Raises `UserError` when it is more than rounding: documents leak.
    """
    first = int(pack["cu_seqlens"][1])
    other = dict(pack, tokens=pack["tokens"].copy())
    other["tokens"][:first] = (pack["tokens"][:first] + 1) % (pack["tokens"].max() + 1)  # every one another
    training = model.training
    model.eval()
    with torch.no_grad():
        before, after = (logits(model, one)[first:].float() for one in (pack, other))
    model.train(training)
    moved = float((before - after).abs().max() / before.abs().max())
    if not moved <= LEAK:
        raise UserError(
            f"packed documents see each other: a document's logits move by {moved:.1e} of the largest when another one "
            "changes. This transformers does not read document boundaries from position_ids; use the pinned release"
        )
    return moved


def peak_memory_gb() -> float:
    """Peak memory of the GPU's tensors, or of this process on a CPU, in 10^9 bytes."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
