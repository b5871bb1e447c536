"""Nemotron-3-Nano inside NeMo 2: architecture, model, LoRA, frozen router, and the CPU backend that proves them."""
