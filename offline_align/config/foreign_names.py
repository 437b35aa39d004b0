"""Names that people know from TRL, transformers, DeepSpeed, vLLM and Megatron-LM, with ours.

Only exact names are here, in lower case with underscores. A name that is the last part of one of our
keys (`seed`, `weight_decay`) needs no entry.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """Our key for a foreign name; `note` says what is different, if the value cannot be taken over."""

    key: str
    note: str = ""


_SAME: dict[str, str] = {
    "run.dir": "output_dir out_dir save_dir save_path save",
    "run.seed": "data_seed random_seed",
    "init.from": "model_name_or_path model_name pretrained_model_name_or_path model_path base_model pretrain load "
    "pretrained_checkpoint ref_load",
    "model.tokenizer": "tokenizer_name_or_path tokenizer_name tokenizer_path tokenizer_model processing_class",
    "model.num_layers": "num_hidden_layers n_layer",
    "model.hidden_size": "n_embd d_model",
    "model.ffn_hidden_size": "intermediate_size",
    "model.num_attention_heads": "n_head",
    "model.num_query_groups": "num_key_value_heads",
    "model.kv_channels": "head_dim",
    "model.rotary_base": "rope_theta",
    "model.layernorm_epsilon": "rms_norm_eps norm_epsilon layer_norm_eps",
    "data.train": "train_file train_data train_data_path train_dataset dataset dataset_name dataset_path data_path",
    "data.valid": "validation_file valid_file eval_file valid_data valid_data_path eval_data eval_dataset",
    "data.max_length": "max_seq_length max_seq_len max_len seq_length seq_len sequence_length cutoff_len block_size "
    "model_max_length max_model_len max_position",
    "data.sample": "max_train_samples",
    "trainer.max_epochs": "num_train_epochs num_epochs epochs train_epochs",
    "trainer.max_steps": "train_iters max_iters max_train_steps total_steps num_steps iterations",
    "trainer.save_interval": "save_steps save_every checkpoint_interval",
    "trainer.eval_interval": "eval_steps eval_every",
    "trainer.log_interval": "logging_steps log_every",
    "trainer.keep_checkpoints": "save_total_limit keep_last",
    "optim.lr": "learning_rate actor_learning_rate base_learning_rate",
    "optim.min_lr": "min_learning_rate",
    "optim.lr_warmup_steps": "warmup_steps num_warmup_steps lr_warmup_iters warmup_iters",
    "optim.lr_decay_style": "lr_scheduler_type lr_scheduler scheduler",
    "optim.lr_decay_steps": "lr_decay_iters",
    "optim.weight_decay": "wd",
    "optim.adam_beta1": "beta1",
    "optim.adam_beta2": "beta2",
    "optim.adam_eps": "adam_epsilon eps",
    "optim.clip_grad": "max_grad_norm gradient_clipping grad_clip max_norm",
    "parallel.tensor_model_parallel_size": "tensor_parallel_size tp_size tp",
    "parallel.context_parallel_size": "context_parallel cp_size cp",
    "launcher.nproc_per_node": "num_processes num_gpus n_gpus gpus devices ngpus",
    "launcher.nodes": "nnodes num_nodes num_machines",
    "generate.max_new_tokens": "max_tokens max_completion_length max_response_length generate_max_len",
    "generate.n": "num_return_sequences num_generations best_of_n n_samples num_samples",
    "generate.stop": "stop_strings stop_sequences",
    "prepare.max_rows": "max_samples",
    "judge.base_url": "api_base openai_api_base",
}

_OTHER: dict[str, tuple[str, str]] = {
    "per_device_train_batch_size per_device_eval_batch_size per_gpu_train_batch_size train_micro_batch_size_per_gpu "
    "micro_train_batch_size": (
        "trainer.micro_batch_size",
        "rows are packed, so it counts full-length rows; 1 is usual",
    ),
    "train_batch_size total_batch_size batch_size": (
        "trainer.global_batch_size",
        "rows of an optimizer step over all ranks",
    ),
    "gradient_accumulation_steps accumulate_grad_batches grad_accumulation": (
        "trainer.global_batch_size",
        "give the rows of an optimizer step over all ranks; the number of micro-batches follows",
    ),
    "bf16 fp16 fp32 tf32 torch_dtype dtype mixed_precision": ("trainer.precision", "bf16 or fp32"),
    "fp8_format": ("trainer.precision", "fp8"),
    "gradient_checkpointing activation_checkpointing recompute_activations recompute_granularity "
    "use_gradient_checkpointing": ("trainer.recompute", "none, selective or full"),
    "warmup_ratio lr_warmup_fraction": ("optim.lr_warmup_steps", "a number of steps, not a share"),
    "eval_strategy evaluation_strategy": ("trainer.eval_interval", "a number of steps; unset, only at the end"),
    "save_strategy": ("trainer.save_interval", "a number of steps; null, only at the end"),
    "report_to use_wandb": ("trainer.wandb_project", "the name of the project"),
    "exit_duration_in_mins": ("trainer.max_time", "as 3h50m"),
    "max_prompt_length": ("data.max_length", "prompt and answer share it"),
    "truncation truncation_side truncation_mode": ("data.too_long", "truncate_prompt, from the left, or drop"),
    "chat_template apply_chat_template": ("data.template", "chat is the template in the model's folder"),
    "packing": ("trainer.micro_batch_size", "rows are always packed, into bins of micro_batch_size full rows"),
    "interleave_probs sampling_probabilities dataset_probs mixture_weights dataset_mixer data_blend": (
        "data.weights",
        "a mapping of sources to shares, as {hh: 0.7, dolly: 0.3}",
    ),
    "zero_stage fsdp deepspeed ddp_backend": (
        "parallel.use_distributed_optimizer",
        "shards the optimizer state over the data parallel ranks; it is on by default",
    ),
    "no_cuda use_cpu": ("run.device", "cpu"),
    "attn_implementation use_flash_attn": ("model.backend", "its attention is chosen with it"),
    "do_sample": ("generate.temperature", "above 0 samples, 0 is greedy"),
    "resume_from_checkpoint resume auto_resume": (
        "run.dir",
        "the same command continues the run in its folder; nothing else is needed",
    ),
    "overwrite_output_dir": ("run.dir", "a finished run is never overwritten; give another folder"),
    "dataloader_num_workers num_workers preprocessing_num_workers dataset_num_proc": (
        "data.cache_dir",
        "one process reads and tokenises on all cores; runs can share the result",
    ),
}

FOREIGN: dict[str, Answer] = {name: Answer(key) for key, names in _SAME.items() for name in names.split()} | {
    name: Answer(key, note) for names, (key, note) in _OTHER.items() for name in names.split()
}


def normal(name: str) -> str:
    """Return a name as it is in the table: the last part, in lower case, with underscores."""
    return name.lstrip("-+").rpartition(".")[2].replace("-", "_").lower()
