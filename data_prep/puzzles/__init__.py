"""Puzzles in the kinds of the public reasoning challenge: drawn, solved with reasons, and solved again another way."""
