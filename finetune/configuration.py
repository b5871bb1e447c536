"""The NeMo 2 recipe: a function that returns the whole configuration of a LoRA run.

`lora_recipe(run)` gives a `nemo_run.Partial` of `llm.finetune` that NeMo-Run can serialize and rebuild. `build` and
call it, and the run starts. The same object runs on CPU ranks and on a cluster.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nano3.model import nano3_model  # switches the CPU backend on where there is no GPU, before NeMo is imported

# isort: split
import nemo_run
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.lightning.pytorch.optim import MegatronOptimizerModule

from finetune.checks import check_run
from finetune.nf4_source import load_base
from finetune.packed_data import PackedDataModule
from finetune.reporting import memory_advice, progress
from finetune.run_identity import run_identity, run_layout
from finetune.settings import Run
from finetune.sweep.pruning import Pruning
from nano3.arch import Arch
from nano3.checkpoints.adapter_checkpoint import SaveAdapter
from nano3.checkpoints.checkpoint_folder import BEST
from nano3.checkpoints.run_checkpoint import RunCheckpoints
from nano3.gate import mark_ids
from nano3.hf_config import read_config
from nano3.lora.liveness import AdapterLiveness
from nano3.lora.lora import Nano3LoRA
from nano3.lora.parameter_groups import is_b, is_magnitude
from nano3.pipeline_parallel import pipeline_kwargs
from nano3.router import RouterGuard
from nano3.training.initial_adapter import InitialAdapter
from nano3.training.schedule import Schedule
from nano3.training.stage_weighting import StageWeighting
from nano3.training.supervised import Supervision
from nano3.training.validation import Validation


def lora_recipe(run: Run) -> nemo_run.Partial:
    """The whole configuration of a LoRA run.

    Args:
        run: settings, paths and resources.

    Raises:
        UserError: settings that cannot be right (`finetune.checks`), or a validation store without packs of this
            length.
    """
    check_run(run, Arch.load(run.model))
    train = run.settings.train
    return nemo_run.Partial(
        llm.finetune,
        model=nemo_run.Config(
            nano3_model,
            folder=run.model,
            seq_length=train.seq_length,
            bf16=run.bf16,
            router=run.settings.router,
            recompute=train.recompute,
            loss_chunk=train.loss_chunk,
            load_base=nemo_run.Partial(load_base, folder=run.weights) if run.nf4 else None,
        ),
        data=nemo_run.Config(
            PackedDataModule,
            train=run.data,
            validation=run.validation,
            seq_length=train.seq_length,
            pad_multiple=run.settings.document_multiple,
            global_batch=train.global_batch,
            steps=train.total_steps,
            seed=train.seed,
            stages=run.settings.stages.weights != "uniform",
            mark=mark_ids(run.model, run.settings.lora.mark),
        ),
        trainer=_trainer(run),
        log=_log(run),
        resume=nemo_run.Config(
            nl.AutoResume,
            restore_config=None if run.nf4 else nemo_run.Config(nl.RestoreConfig, path=run.base, load_artifacts=False),
        ),
        optim=_optimizer(run),
        peft=_lora(run),
        tokenizer=None,
    )


def _lora(run: Run) -> nemo_run.Config:
    lora = run.settings.lora
    return nemo_run.Config(
        Nano3LoRA,
        modules=lora.paths(Arch.load(run.model)),
        **lora.kind(),
        dropout=lora.dropout,
        seed=run.settings.train.seed,
        mark=mark_ids(run.model, lora.mark),
    )


def _trainer(run: Run) -> nemo_run.Config:
    train, out = run.settings.train, Path(run.out)
    return nemo_run.Config(
        nl.Trainer,
        accelerator="cpu" if run.cpu else "gpu",
        devices=run.ranks_per_node,
        num_nodes=run.nodes,
        max_steps=train.total_steps,
        strategy=_strategy(run),
        plugins=_bf16() if run.bf16 else None,
        callbacks=[
            _checkpoints(run),
            nemo_run.Config(Supervision, stuck_minutes=run.settings.supervision.stuck_minutes),
            *_initial(run),
            *_stages(run),
            nemo_run.Config(RouterGuard, router=run.settings.router),
            nemo_run.Config(AdapterLiveness),
            nemo_run.Config(SaveAdapter, out=str(out / "adapter"), facts=lora_json(run), base=run.base),
            progress(run),
            nemo_run.Config(
                Validation,
                out=str(out / BEST),
                patience=train.patience,
                min_improvement=train.min_improvement,
            ),
            *_trial(run),
            memory_advice(run),  # last: see MemoryAdvice
        ],
        limit_val_batches=0 if run.validation is None else 1.0,
        val_check_interval=None if run.validation is None else train.validate_every or train.total_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_checkpointing=False,
        logger=False,  # metrics.jsonl is the record; Lightning would write lightning_logs/ where you stand
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        accumulate_grad_batches=1,
    )


def _initial(run: Run) -> list[nemo_run.Config]:
    folder = run.settings.lora.init_from
    return [nemo_run.Config(InitialAdapter, folder=folder, facts=lora_json(run), base=run.base)] if folder else []


def _stages(run: Run) -> list[nemo_run.Config]:
    stages = run.settings.stages
    exponent = stages.exponent if stages.weights == "dynamic" else 0.0
    weighed = stages.weights != "uniform"
    return [nemo_run.Config(StageWeighting, fixed=stages.fixed, exponent=exponent)] if weighed else []


def _trial(run: Run) -> list[nemo_run.Config]:
    folder = str(Path(run.out).parents[1])
    return [] if run.trial is None else [nemo_run.Config(Pruning, folder=folder, number=run.trial)]


def _checkpoints(run: Run) -> nemo_run.Config:
    checkpoint = run.settings.checkpoint
    return nemo_run.Config(
        RunCheckpoints,
        out=run.out,
        every=checkpoint.every,
        minutes=checkpoint.minutes,
        keep=checkpoint.keep,
        identity=nemo_run.Config(run_identity, text=run.to_json()),  # worked out on the ranks, where base and data are
        layout=run_layout(run),
        seed=run.settings.train.seed,
    )


def _bf16() -> nemo_run.Config:
    """BF16 from the first allocation on: without the dtypes NeMo builds and loads the model in FP32, and casts then."""
    dtypes = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    return nemo_run.Config(nl.MegatronMixedPrecision, precision="bf16-mixed", **dtypes)


def _strategy(run: Run) -> nemo_run.Config:
    layout = run.settings.layout
    return nemo_run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        **pipeline_kwargs(Arch.load(run.model), layout.pp),
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=(torch.bfloat16 if run.bf16 else torch.float32) if layout.pp > 1 else None,
        process_group_backend="gloo" if run.cpu else None,
        ddp=nemo_run.Config(
            DistributedDataParallelConfig,
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=run.bf16,
            overlap_grad_reduce=False,
            average_in_collective=False,  # gradients are sums, divided once by the tokens of the global batch
        ),
        ckpt_load_optimizer=False,
        ckpt_async_save=False,
        replace_progress_bar=False,
        gradient_as_bucket_view=True,
    )


def _optimizer(run: Run) -> nemo_run.Config:
    train = run.settings.train
    return nemo_run.Config(
        MegatronOptimizerModule,
        no_weight_decay_cond=is_magnitude,
        scale_lr_cond=is_b,
        lr_mult=run.settings.lora.plus_ratio,
        config=nemo_run.Config(
            OptimizerConfig,
            optimizer="adam",
            lr=train.lr,
            weight_decay=train.weight_decay,
            adam_beta1=0.9,
            adam_beta2=train.beta2,
            adam_eps=1e-8,
            clip_grad=train.clip,
            bf16=run.bf16,
            params_dtype=torch.bfloat16 if run.bf16 else torch.float32,
            use_distributed_optimizer=run.bf16,
        ),
        lr_scheduler=nemo_run.Config(
            Schedule,
            kind=train.schedule,
            steps=train.total_steps,
            warmup=train.warmup_steps,
            decay=train.decay,
            floor=train.min_lr / train.lr,
        ),
    )


def _log(run: Run) -> nemo_run.Config:
    # NeMo's own log files; metrics are our callback's (finetune/reporting.py).
    return nemo_run.Config(
        nl.NeMoLogger, explicit_log_dir=str(Path(run.out) / "nemo"), ckpt=None, update_logger_directory=False
    )


def lora_json(run: Run) -> dict[str, Any]:
    """What `lora.json` says, so that a merge can check what it is given."""
    lora = run.settings.lora
    return {
        "format": 2,
        **lora.kind(),
        "plus_ratio": lora.plus_ratio,
        "dropout": lora.dropout,
        "targets": lora.chosen_targets(),
        "mark": mark_ids(run.model, lora.mark),
        "router": run.settings.router,
        "base_quantization": "nf4" if run.nf4 else None,
        "base_config": read_config(run.model),
    }
