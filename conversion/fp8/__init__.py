"""Selective FP8: what becomes it, how its scales are found, who reads it how."""
