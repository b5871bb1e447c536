"""Worker of bench_step.py: a LoRA step as transformers and PEFT make it, on a plain PyTorch of its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lockstep import Job, Server

from data_prep.epochs import Epochs
from data_prep.packing import PackedDataset
from evaluation.hf_model import load_reference

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "up_proj", "down_proj"]
"""All linear layers but router, embedding and lm_head; up_proj and down_proj are the shared expert's."""
EXPERTS = ["experts.up_proj", "experts.down_proj"]
"""Routed experts are two fused parameters of each layer in transformers 5, (experts, out, in)."""


def adapted(job: Job) -> Any:
    """The model in FP32 with PEFT's adapters, ready to train."""
    import peft
    from peft.tuners import tuners_utils

    # PEFT refuses out_proj (and conv1d) of Mamba models, because fused kernels read its weight past the adapter;
    # transformers' plain path, which runs here, calls the layer.
    tuners_utils._check_lora_target_modules_mamba = lambda *_: None
    model = load_reference(Path(job.model), torch.float32).train()
    model.config.use_cache = False
    config = peft.LoraConfig(
        r=job.rank,
        lora_alpha=job.alpha,
        target_modules=LINEARS,
        target_parameters=None if job.experts == "none" else EXPERTS,
    )
    return peft.get_peft_model(model, config)


def main() -> None:
    server = Server()
    job = server.job
    torch.manual_seed(job.seed)
    model = adapted(job)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    packs = Epochs(PackedDataset(job.data, job.seq_length, 1), job.steps, job.seed, shuffle=True)
    config = model.get_base_model().config
    server.ready(
        parameters=sum(parameter.numel() for parameter in trained),
        attention=config._attn_implementation,
        experts=config._experts_implementation,
    )
    server.serve(partial(step, model, optimizer, trained, packs))


def step(model: Any, optimizer: torch.optim.Optimizer, trained: list, packs: Epochs, number: int) -> float:
    """One pack, which is one document: no boundaries to tell the model about."""
    item = {key: torch.from_numpy(value)[None] for key, value in packs[number].items()}
    labels = item["labels"].long().masked_fill(item["loss_mask"] == 0, -100)
    loss = model(input_ids=item["tokens"].long(), labels=labels, shift_labels=labels, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


if __name__ == "__main__":
    main()
