"""Layouts, memory, throughput and preflight: what a run needs, before it starts."""
