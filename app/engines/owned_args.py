"""Arguments of each engine that Baton sets itself, with where the user sets them instead."""

from __future__ import annotations

from app.messages import EngineName

OWNED_ARGS: dict[EngineName, dict[str, str]] = {
    "vllm": {
        "kv_transfer_config": "the transfer section",
        "kv_connector": "the transfer section",
        "kv_events_config": "nothing: Baton reads the events, for routing",
        "tensor_parallel_size": "the pool's tensor_parallel_size",
        "data_parallel_size": "the pool's replicas",
        "data_parallel_rank": "the pool's replicas",
        "distributed_executor_backend": "Baton itself: one replica, one engine",
        "model": "the model's source",
        "served_model_name": "the model's name",
        "host": "http_options of the Serve config",
        "port": "http_options of the Serve config",
    },
    "sglang": {
        "model_path": "the model's source",
        "served_model_name": "the model's name",
        "tp_size": "the pool's tensor_parallel_size",
        "dp_size": "the pool's replicas",
        "device": "device, at the top of the configuration",
        "disaggregation_mode": "the model's prefill pool",
        "disaggregation_transfer_backend": "the transfer section",
        "disaggregation_bootstrap_port": "transfer.port_min and port_max",
        "disaggregation_enable_kv_checksum": "transfer.checksum_rate",
        "kv_events_config": "nothing: Baton reads the events, for routing",
        "host": "http_options of the Serve config",
        "port": "http_options of the Serve config",
        "incremental_streaming_output": "nothing: Baton passes tokens on as they come",
        "tokenizer_worker_num": "the pool's replicas",
    },
    "sim": {
        "model": "the model's source",
        "served_model_name": "the model's name",
        "tensor_parallel_size": "another profile: times are of the whole engine",
        "host": "http_options of the Serve config",
        "port": "http_options of the Serve config",
    },
}
