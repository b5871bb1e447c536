"""vLLM on a CPU as an independent reader of what we export: `make check-vllm`."""
