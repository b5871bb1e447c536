"""What other tools call our settings: a wrong key names what people mean. Imports nothing.

Names of transformers, PEFT, TRL, axolotl, LLaMA-Factory, Megatron-LM, NeMo and torchtune. Only the last part of a key
counts, so that `train.learning_rate` and `optim.lr` are found too.
"""

from __future__ import annotations

_NAMES = {
    "train.lr": "learning_rate max_lr peak_lr base_lr initial_lr",
    "train.min_lr": "lr_min minimum_lr end_lr final_lr learning_rate_end",
    "train.epochs": "epoch num_epochs num_train_epochs max_epochs n_epochs passes train_epochs",
    "train.steps": "max_steps num_steps total_steps train_steps iterations train_iters max_iters num_iterations "
    "max_train_steps",
    "train.global_batch": "batch_size global_batch_size train_batch_size per_device_train_batch_size "
    "gradient_accumulation_steps gradient_accumulation gbs effective_batch_size micro_batch micro_batch_size mbs "
    "per_device_batch_size",
    "train.seq_length": "max_seq_length max_length cutoff_len seq_len max_seq_len sequence_len sequence_length "
    "block_size context_length max_tokens encoder_seq_length model_max_length",
    "train.warmup": "warmup_steps warmup_ratio num_warmup_steps lr_warmup_iters lr_warmup_fraction warmup_iters "
    "warmup_fraction warmup_share warm_up",
    "train.decay": "decay_steps num_decay_steps lr_decay_iters cooldown cooldown_steps",
    "train.schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule lr_decay_style scheduler_type",
    "train.weight_decay": "wd decay_rate",
    "train.beta2": "adam_beta2 betas adam_betas adam_b2",
    "train.clip": "max_grad_norm grad_clip gradient_clip_val clip_grad gradient_clipping clip_grad_norm max_norm",
    "train.validate_every": "eval_steps val_check_interval eval_interval eval_every evaluation_strategy eval_strategy "
    "validation_interval eval_iters",
    "train.patience": "early_stopping_patience early_stopping",
    "train.min_improvement": "early_stopping_threshold min_delta",
    "train.seed": "random_seed data_seed manual_seed",
    "train.recompute": "gradient_checkpointing activation_checkpointing recompute_granularity "
    "use_gradient_checkpointing recompute_activations checkpoint_activations",
    "train.loss_chunk": "chunked_loss loss_chunk_size cross_entropy_chunk use_liger fused_linear_cross_entropy",
    "train.precision": "bf16 fp16 fp32 dtype torch_dtype mixed_precision params_dtype",
    "train.pad_multiple": "pad_to_multiple_of",
    "lora.rank": "lora_r r lora_rank lora_dim dim",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": "target_modules lora_target_modules lora_target lora_modules modules",
    "lora.rslora": "use_rslora",
    "lora.dora": "use_dora",
    "lora.max_rank": "max_lora_rank",
    "lora.plus_ratio": "loraplus_lr_ratio lora_plus loraplus lora_plus_ratio",
    "lora.init_from": "adapter_name_or_path lora_path peft_path restore_from_path init_lora_weights",
    "lora.rank_pattern": "ranks",
    "lora.alpha_pattern": "alphas",
    "layout.tp": "tensor_parallel tensor_parallel_size tp_size tensor_model_parallel_size",
    "layout.pp": "pipeline_parallel pipeline_parallel_size pp_size pipeline_model_parallel_size",
    "layout.cp": "context_parallel context_parallel_size cp_size",
    "layout.ep": "expert_parallel expert_parallel_size ep_size expert_model_parallel_size",
    "layout.etp": "expert_tensor_parallel expert_tensor_parallel_size",
    "layout.sp": "sequence_parallel",
    "router": "freeze_router router_mode",
    "checkpoint.every": "save_steps save_interval save_every save_every_n_train_steps checkpoint_interval",
    "checkpoint.keep": "save_total_limit save_top_k keep_last_n",
    "checkpoint.minutes": "save_minutes train_time_interval",
    "log.every": "logging_steps log_interval log_every log_every_n_steps",
    "log.wandb": "report_to use_wandb wandb_mode",
    "log.project": "wandb_project",
    "log.name": "run_name wandb_run_name experiment_name wandb_name",
    "log.tensorboard": "tensorboard_dir use_tensorboard",
}
SYNONYMS = {word: key for key, words in _NAMES.items() for word in words.split()}
"""Another tool's name -> our key."""

FLAGS = {
    **dict.fromkeys(("model_name_or_path", "model_name", "base_model", "pretrained_model_name_or_path"), "--model"),
    **dict.fromkeys(("dataset", "datasets", "data_path", "train_file", "dataset_path", "train_data"), "--data"),
    **dict.fromkeys(("eval_dataset", "validation_file", "val_data", "eval_data", "val_dataset"), "--validation"),
    **dict.fromkeys(("output_dir", "output", "save_dir", "out_dir", "explicit_log_dir"), "--out"),
    **dict.fromkeys(("num_nodes", "nnodes", "n_nodes"), "--nodes"),
    **dict.fromkeys(
        ("num_gpus", "devices", "nproc_per_node", "gpus", "n_gpus", "num_gpus_per_node"), "--gpus-per-node"
    ),
    **dict.fromkeys(
        ("resume", "resume_from_checkpoint", "resume_from"), "the same command again, which resumes by itself"
    ),
}
"""Another tool's name -> our flag."""


def meant_by(key: str, known: list[str]) -> str:
    """What somebody who writes `key` means, in words: one of the settings `known` or a flag; empty when unknown."""
    word = key.rpartition(".")[2].lower().replace("-", "_").lstrip("_")
    setting = SYNONYMS.get(word)
    return setting if setting in known else FLAGS.get(word, "")
