"""LoRA adapters on disk, ours and Hugging Face PEFT's, and what they make of a model."""
