"""What a machine with GPUs is asked, tier by tier; `python -m tests.gpu_check` runs them."""
