"""Flags of other trainers and generators, and the flag here that each corresponds to.

Other names are those of nanoGPT, transformers, MaxText, litgpt, torchtune, Lightning, vLLM and llama.cpp. They are not
accepted, since values may differ in meaning, but messages name the right flag. Names have underscores for hyphens and
dots. A name may be in several rows: a message names the first flag that the program has.
"""

OTHER_NAMES = {
    # training
    "lr": "learning_rate learn_rate learningrate base_lr peak_lr max_lr initial_lr train_lr optimizer_lr",
    "steps": "max_iters max_iter max_steps num_iters n_iters iters iterations num_iterations num_steps n_steps "
    "num_train_steps train_steps total_steps training_steps max_train_steps train_max_steps max_steps_per_epoch "
    "num_training_steps",
    "batch_size": "batch bs batchsize train_batch_size global_batch_size train_global_batch_size total_batch_size "
    "per_device_train_batch_size per_device_eval_batch_size per_device_batch_size per_gpu_batch_size eval_batch_size "
    "device_batch_size micro_batch_size train_micro_batch_size mini_batch_size minibatch_size",
    "seq_len": "block_size seq_length sequence_length max_seq_len max_seq_length train_max_seq_length max_length "
    "max_len max_target_length context_length context_len context_size context ctx ctx_len n_ctx ctx_size "
    "tokenizer_max_seq_len max_model_len sequence_len seqlen",
    "context": "block_size seq_len seq_length sequence_length max_seq_len max_seq_length max_length context_length "
    "context_len context_size ctx ctx_len n_ctx ctx_size max_context max_model_len",
    "grad_accum": "gradient_accumulation_steps grad_accum_steps gradient_accumulation grad_accumulation "
    "accumulate_grad_batches accumulation_steps accum_steps gradient_accumulation_iters",
    "warmup_ratio": "warmup_steps warmup_iters lr_warmup_steps train_lr_warmup_steps num_warmup_steps warmup_fraction "
    "warmup_tokens warmup_steps_fraction lr_warmup_ratio",
    "min_lr_ratio": "train_min_lr final_lr_frac lr_min_ratio cosine_learning_rate_final_fraction end_lr eta_min",
    "schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler decay_lr lr_decay lr_decay_style",
    "optimizer": "optim optim_name optimizer_name opt opt_type",
    "beta1": "adam_beta1 adam_b1 optimizer_beta1 b1 momentum",
    "beta2": "adam_beta2 adam_b2 optimizer_beta2 b2",
    "weight_decay": "wd adam_weight_decay optimizer_weight_decay l2",
    "grad_clip": "max_grad_norm clip_grad_norm grad_norm_clip clip_grad clip_norm gradient_clip gradient_clip_val "
    "gradient_clipping gradient_clipping_threshold train_max_norm max_norm grad_clip_norm",
    "ema_decay": "use_ema ema_rate ema_beta",
    "seed": "random_seed rng_seed manual_seed init_weights_seed",
    "mesh": "devices gpus num_gpus n_gpus ngpu num_devices n_devices nproc_per_node world_size fsdp dp_size "
    "data_parallel_size ici_fsdp_parallelism ici_data_parallelism dcn_data_parallelism num_nodes",
    "expert_exchange": "use_ragged_all_to_all ragged_all_to_all use_ragged_dispatch moe_dispatch",
    "coordinator": "coordinator_address jax_coordinator_address coordinator_ip coordinator_ip_address master_addr "
    "main_process_ip rdzv_endpoint dist_url",
    "processes": "num_processes n_processes process_count nnodes",
    "process": "process_id process_index rank node_rank machine_rank",
    "eval_every": "eval_interval eval_steps eval_freq eval_iter val_interval val_every val_freq val_check_interval "
    "validation_interval validate_every test_every evaluation_strategy eval_strategy",
    "eval_batches": "eval_iters eval_max_iters val_batches limit_val_batches num_eval_batches",
    "save_every": "save_interval save_steps save_freq save_iter checkpoint_every checkpoint_interval checkpoint_period "
    "ckpt_every ckpt_interval train_save_interval save_strategy save_every_n_steps always_save_checkpoint",
    "max_checkpoints": "save_total_limit keep_checkpoints keep_last max_to_keep num_checkpoints save_top_k",
    "log_every": "log_interval logging_steps log_freq log_steps log_period print_every print_freq log_every_n_steps "
    "train_log_interval logging_interval report_every",
    "sample_every": "sample_interval sample_freq generate_every sample_steps",
    "sample_tokens": "eval_max_new_tokens sample_length sample_len",
    "patience": "early_stopping early_stopping_patience early_stop early_stopping_rounds",
    "init_from": "pretrained_model pretrained_model_name_or_path pretrained_path finetune_from init_checkpoint "
    "init_model load_pretrained initial_checkpoint hf_model hf_path",
    "resume": "resume_from_checkpoint resume_from restore restart continue continue_training "
    "load_checkpoint ckpt checkpoint checkpoint_path ckpt_path load load_checkpoint_path",
    "wandb": "wandb_log use_wandb report_to wandb_project wandb_entity logger logger_name metric_logger",
    "profile_steps": "profile profiler profile_step enable_profiler profiler_steps",
    # the model
    "dim": "n_embd n_embed embed_dim embedding_dim embedding_size emb_dim emb_size base_emb_dim d_model dmodel "
    "model_dim hidden_size n_embedding width model_width",
    "n_layers": "n_layer num_layers num_hidden_layers layers depth n_blocks num_blocks base_num_decoder_layers "
    "num_decoder_layers nlayers",
    "n_heads": "n_head num_heads num_attention_heads nhead heads base_num_query_heads num_query_heads nheads",
    "n_kv_heads": "n_kv_head num_kv_heads num_key_value_heads base_num_kv_heads num_query_groups n_query_groups",
    "head_dim": "head_size d_head d_k qk_head_dim",
    "max_context": "max_position_embeddings max_seq_len max_seq_length max_position n_positions block_size "
    "max_context_length",
    "window": "sliding_window sliding_window_size window_size local_window local_attention_window attention_window",
    "mlp": "activation activation_function hidden_act act act_fn mlp_activations mlp_class_name",
    "mlp_ratio": "intermediate_size hidden_dim d_ff dff ffn_dim ff_dim mlp_dim base_mlp_dim mlp_hidden ffn_hidden_size "
    "ff_mult expansion_ratio expansion_factor",
    "n_experts": "num_experts n_expert experts num_local_experts moe_num_experts n_routed_experts",
    "experts_per_token": "num_experts_per_tok num_experts_per_token n_expert_per_token moe_topk moe_top_k "
    "moe_router_topk num_selected_experts router_topk",
    "shared_expert": "n_shared_experts shared_experts num_shared_experts",
    "n_dense_layers": "num_dense_layers first_k_dense_replace n_dense_first_layers first_num_dense_layers",
    "dense_ratio": "base_mlp_dim dense_intermediate_size",
    "shared_ratio": "shared_expert_intermediate_size moe_shared_expert_intermediate_size",
    "router": "score_func scoring_func moe_router_score_function routed_score_func router_score_func",
    "router_renormalise": "norm_topk_prob route_norm norm_topk moe_router_norm_topk",
    "router_scale": "route_scale routed_scaling_factor moe_router_topk_scaling_factor",
    "selection_bias": "expert_bias e_score_correction_bias moe_router_enable_expert_bias routed_bias",
    "selection_bias_rate": "load_balance_coeff moe_router_bias_update_rate routed_bias_update_rate bias_update_speed",
    "attn_scale": "query_pre_attn_scalar attention_multiplier softmax_scale sm_scale attn_logits_scale qk_scale",
    "norm_offset": "rms_norm_add_unit_offset zero_centered_gamma layernorm_1p scale_plus_one",
    "scale_embeddings": "mup_enabled normalize_embedding embedding_multiplier scale_emb",
    "router_aux_loss_coef": "load_balance_loss_weight moe_aux_loss_coeff aux_loss_coef aux_loss_weight balance_loss",
    "router_z_loss_coef": "router_z_loss z_loss_coef moe_z_loss_coeff z_loss",
    "attn_bias": "attention_bias qkv_bias add_qkv_bias",
    "attn_out_bias": "o_bias o_proj_bias attention_out_bias",
    "attn_sinks": "attention_sinks attention_sink use_sinks sinks",
    "mlp_limit": "swiglu_limit",
    "attn_softcap": "attn_logit_softcapping attn_logits_soft_cap attention_logits_soft_cap attn_logit_cap",
    "logit_softcap": "final_logit_softcapping final_logits_soft_cap logits_soft_cap logit_cap",
    "pos_encoding": "pos_emb pos_embedding position_embedding position_embedding_type pe pos_enc use_rope",
    "rope_theta": "rope_base rotary_base rope_max_timescale rope_freq_base",
    "rope_pattern": "no_rope_layers no_rope_layer_interval nope_layers nope_layer_interval no_rope_pattern",
    "rope_theta_windowed": "rope_local_base_freq local_rope_theta local_rope_max_timescale swa_rope_theta "
    "sliding_rope_theta",
    "rope_scaling": "rope_type rope_scaling_type",
    "tie_embeddings": "tie_word_embeddings weight_tying tie_weights tied_embeddings share_embeddings",
    "dropout": "attention_dropout attn_dropout resid_dropout dropout_rate hidden_dropout resid_pdrop attn_pdrop "
    "dropout_p",
    "norm_eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon normalization_layer_epsilon",
    "norms": "norm_position norm_placement use_post_norm post_norm pre_norm sandwich_norm use_post_attn_norm "
    "use_post_ffw_norm",
    "qk_norm": "use_qk_norm qk_layernorm",
    "param_dtype": "params_dtype weights_dtype load_dtype",
    "dtype": "precision mixed_precision fp16 bf16 half float16 bfloat16 torch_dtype weight_dtype compute_dtype amp",
    "remat": "gradient_checkpointing activation_checkpointing enable_activation_checkpointing remat_policy "
    "grad_checkpointing checkpoint_activations recompute",
    "attn": "attention attention_type attn_implementation attn_impl attention_impl attention_backend flash flash_attn "
    "flash_attention use_flash use_flash_attention sdpa",
    "loss": "loss_fn loss_type loss_impl cross_entropy fused_linear_cross_entropy fused_cross_entropy chunked_loss",
    "data_format": "dataset_format dataset_type chat_format data_type sft dataset_kind",
    "lora_rank": "lora_r use_lora lora peft lora_dim adapter_rank",
    "lora_alpha": "lora_scale lora_scaling",
    "lora_targets": "target_modules lora_target_modules lora_modules lora_attn_modules lora_layers",
    "kv_cache_dtype": "cache_dtype kv_quant kv_cache_quant kv_cache_quantization cache_type_k quantize_kvcache",
    # data
    "data": "dataset dataset_name dataset_path data_path data_dir data_file train_data train_file text text_file input "
    "input_file file corpus train_data_path data_train_data_path",
    "tokenizer": "tokenizer_name tokenizer_path tokenizer_type",
    "bpe_vocab_size": "tokenizer_vocab_size num_merges",
    "val_fraction": "val_split validation_split test_size val_ratio val_size validation_split_percentage",
    # generation
    "prompt": "prompts start input_text text message query",
    "prompt_file": "input_file file input prompts_file",
    "max_new_tokens": "max_tokens num_tokens n_tokens tokens length gen_len max_gen_len max_length max_len "
    "max_generated_tokens n_predict predict max_output_tokens output_len new_tokens",
    "system": "system_prompt system_message sys_prompt",
    "temperature": "temp do_sample",
    "repetition_penalty": "repeat_penalty rep_penalty rep_pen",
    "n": "num_samples n_samples samples num_return_sequences num_sequences best_of nsamples num_outputs",
    "stop": "stop_sequence stop_sequences stop_string stop_strings stop_words stop_token stop_tokens reverse_prompt",
    "stride": "overlap step_size",
    "choices": "questions tasks task multiple_choice",
    # files and messages
    "out": "out_dir output output_dir output_path outdir outfile output_file save_dir save_path export_dir dest",
    "runs_dir": "out_dir output_dir outdir save_dir log_dir logdir run_dir base_output_directory default_root_dir "
    "checkpoint_dir",
    "preset": "model_name model_type model model_size model_config",
    "from": "hf_model hf_path hf_dir hf_folder pretrained pretrained_model",
    "run": "run_name name experiment experiment_name exp_name exp wandb_run_name wandb_name model model_path model_dir "
    "model_name_or_path checkpoint_dir checkpoint ckpt ckpt_path checkpoint_path pretrained_model_name_or_path",
    "shard_mb": "max_shard_size shard_size",
    "layout": "format arch architecture model_type",
    "config": "config_file config_path cfg conf yaml settings",
    "verbose": "debug log_level logging_level verbosity",
    "json": "output_format as_json",
    "dry_run": "dryrun simulate check_only",
}
"""Flag here -> names elsewhere."""

EXPLANATIONS = {
    "warmup_ratio": "a fraction of --steps",
    "min_lr_ratio": "a fraction of --lr",
    "mlp_ratio": "the hidden width divided by --dim",
    "batch_size": "sequences per step, over all devices and micro-batches",
    "max_new_tokens": "without the prompt",
    "resume": "the run that --run names",
    "mesh": "data=N,fsdp=M",
    "coordinator": "HOST:PORT",
    "wandb": "WANDB_PROJECT and other variables name the destination",
}
"""Flag here -> what differs from the other names."""

NO_COUNTERPART = {
    "model_path model_dir model_name_or_path pretrained": "training starts from random weights, in the shape of "
    "--preset, or from those of --init-from",
    "epochs epoch num_epochs n_epochs max_epochs num_train_epochs train_epochs nb_epochs": "--steps sets the length of "
    "training",
    "lr_decay_iters lr_decay_steps decay_steps max_decay_steps learning_rate_schedule_steps": "the schedule ends at "
    "--steps",
    "device accelerator platform hardware use_cpu no_cuda cuda cpu gpu": "JAX chooses the device, and JAX_PLATFORMS "
    "overrules it",
    "compile torch_compile jit use_compile": "everything is compiled",
    "num_workers workers dataloader_num_workers n_workers num_proc": "batches need no workers",
    "bias use_bias add_bias": "--attn-bias is for attention and --moe-bias for experts; other layers have no bias",
    "norm norm_type norm_class_name normalization": "norms are RMSNorm",
    "adam_epsilon adam_eps eps": "the epsilon of the optimizer is fixed",
    "presence_penalty frequency_penalty": "--repetition-penalty is the one penalty",
    "eval_only": "the program for it is python -m dantinox.evaluate",
    "label_smoothing label_smoothing_factor": "the loss is cross-entropy",
    "num_beams beam_size": "texts are sampled, or greedy with --temperature 0",
    "shuffle": "batches are random slices of the text",
    "overwrite_output_dir overwrite force": "an older run of the same name is renamed",
    "pad_to_multiple_of padding packing": "sequences are full: there is no padding",
    "version": "python -m dantinox.doctor prints versions",
}
"""Names elsewhere -> why no flag here corresponds."""
