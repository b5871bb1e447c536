"""The NeMo 2 recipe: a function that returns the whole configuration of a LoRA run.

`lora_recipe(run)` gives a `run.Partial` of `llm.finetune` that NeMo-Run can serialize, ship and rebuild; `build` and
call it, and the run starts. The same object runs on CPU ranks and on a cluster.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nano3.model import nano3_model  # switches the CPU backend on where there is no GPU, before NeMo is imported

# isort: split
import nemo_run as run
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.lightning.pytorch.optim import MegatronOptimizerModule

from nano3.arch import Arch
from nano3.checkpoints.adapter_checkpoint import SaveAdapter
from nano3.checkpoints.run_checkpoint import RunCheckpoints
from nano3.hf_config import read_config
from nano3.lora.liveness import AdapterLiveness
from nano3.lora.lora import Nano3LoRA
from nano3.lora.parameter_groups import is_b, is_magnitude
from nano3.pipeline import pipeline_kwargs
from nano3.router import RouterGuard
from nano3.targets import select
from nano3.training.initial_adapter import InitialAdapter
from nano3.training.schedule import Schedule
from nano3.training.validation import Validation
from recipes.checks import check_run
from recipes.identity import run_identity, run_layout
from recipes.packed_data import PackedDataModule
from recipes.reporting import memory_advice, progress
from recipes.settings import Run


def lora_recipe(task: Run) -> run.Partial:
    """The whole configuration of a LoRA run.

    Args:
        task: settings, paths and resources.

    Raises:
        UserError: settings that cannot be right (`recipes.checks`), or a validation store without packs of this length.
    """
    check_run(task, Arch.load(task.model))
    train = task.settings.train
    return run.Partial(
        llm.finetune,
        model=run.Config(
            nano3_model,
            folder=task.model,
            seq_length=train.seq_length,
            bf16=task.bf16,
            router=task.settings.router,
            recompute=train.recompute,
        ),
        data=run.Config(
            PackedDataModule,
            train=task.data,
            validation=task.validation,
            seq_length=train.seq_length,
            pad_multiple=task.settings.document_multiple,
            micro_batch=train.micro_batch,
            global_batch=train.global_batch,
            steps=train.steps,
            seed=train.seed,
        ),
        trainer=_trainer(task),
        log=_log(task),
        resume=run.Config(
            nl.AutoResume, restore_config=run.Config(nl.RestoreConfig, path=task.base, load_artifacts=False)
        ),
        optim=_optimizer(task),
        peft=_lora(task),
        tokenizer=None,
    )


def _lora(task: Run) -> run.Config:
    lora = task.settings.lora
    return run.Config(
        Nano3LoRA,
        modules=select(Arch.load(task.model), lora.chosen_targets(), lora.experts),
        dim=lora.rank,
        alpha=lora.alpha,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        rslora=lora.rslora,
        dora=lora.dora,
        experts=lora.experts,
        dropout=lora.dropout,
        seed=task.settings.train.seed,
    )


def _trainer(task: Run) -> run.Config:
    train, out = task.settings.train, Path(task.out)
    return run.Config(
        nl.Trainer,
        accelerator="cpu" if task.cpu else "gpu",
        devices=task.ranks_per_node,
        num_nodes=task.nodes,
        max_steps=train.steps,
        strategy=_strategy(task),
        plugins=_bf16() if task.bf16 else None,
        callbacks=[
            _checkpoints(task),
            *_initial(task),
            run.Config(RouterGuard, router=task.settings.router),
            run.Config(AdapterLiveness),
            run.Config(SaveAdapter, out=str(out / "adapter"), facts=_facts(task), base=task.base),
            progress(task),
            run.Config(
                Validation,
                out=str(out / "best"),
                patience=train.patience,
                min_improvement=train.min_improvement,
            ),
            memory_advice(task),  # last: see MemoryAdvice
        ],
        limit_val_batches=0 if task.validation is None else 1.0,
        val_check_interval=None if task.validation is None else train.validate_every or train.steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        accumulate_grad_batches=1,
    )


def _initial(task: Run) -> list[run.Config]:
    folder = task.settings.lora.init_from
    return [run.Config(InitialAdapter, folder=folder, facts=_facts(task), base=task.base)] if folder else []


def _checkpoints(task: Run) -> run.Config:
    checkpoint = task.settings.checkpoint
    return run.Config(
        RunCheckpoints,
        out=task.out,
        every=checkpoint.every,
        minutes=checkpoint.minutes,
        keep=checkpoint.keep,
        identity=run.Config(run_identity, run=task.to_json()),  # worked out on the ranks, where base and data are
        layout=run_layout(task),
        seed=task.settings.train.seed,
    )


def _bf16() -> run.Config:
    """BF16 from the first allocation on: without the dtypes NeMo builds and loads the model in FP32, and casts then."""
    dtypes = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    return run.Config(nl.MegatronMixedPrecision, precision="bf16-mixed", **dtypes)


def _strategy(task: Run) -> run.Config:
    layout = task.settings.layout
    return run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        **pipeline_kwargs(Arch.load(task.model), layout.pp),
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=(torch.bfloat16 if task.bf16 else torch.float32) if layout.pp > 1 else None,
        process_group_backend="gloo" if task.cpu else None,
        ddp=run.Config(
            DistributedDataParallelConfig,
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=task.bf16,
            overlap_grad_reduce=False,
            average_in_collective=False,  # gradients are sums, divided once by the tokens of the global batch
        ),
        ckpt_load_optimizer=False,
        ckpt_async_save=False,
        replace_progress_bar=False,
        gradient_as_bucket_view=True,
    )


def _optimizer(task: Run) -> run.Config:
    train = task.settings.train
    return run.Config(
        MegatronOptimizerModule,
        no_weight_decay_cond=is_magnitude,
        scale_lr_cond=is_b,
        lr_mult=task.settings.lora.plus_ratio,
        config=run.Config(
            OptimizerConfig,
            optimizer="adam",
            lr=train.lr,
            weight_decay=train.weight_decay,
            adam_beta1=0.9,
            adam_beta2=train.beta2,
            adam_eps=1e-8,
            clip_grad=train.clip,
            bf16=task.bf16,
            params_dtype=torch.bfloat16 if task.bf16 else torch.float32,
            use_distributed_optimizer=task.bf16,
        ),
        lr_scheduler=run.Config(
            Schedule,
            kind=train.schedule,
            steps=train.steps,
            warmup=train.warmup,
            decay=train.decay,
            floor=train.min_lr / train.lr,
        ),
    )


def _log(task: Run) -> run.Config:
    # NeMo's own log files; metrics are our callback's (recipes/reporting.py).
    return run.Config(
        nl.NeMoLogger, explicit_log_dir=str(Path(task.out) / "nemo"), ckpt=None, update_logger_directory=False
    )


def _facts(task: Run) -> dict[str, Any]:
    """What `lora.json` says, so that a merge can check what it is given."""
    lora = task.settings.lora
    return {
        "format": 2,
        "rank": lora.rank,
        "alpha": lora.alpha,
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.alpha_pattern,
        "rslora": lora.rslora,
        "dora": lora.dora,
        "plus_ratio": lora.plus_ratio,
        "dropout": lora.dropout,
        "targets": lora.chosen_targets(),
        "experts": lora.experts,
        "router": task.settings.router,
        "base_config": read_config(task.model),
    }
