"""Models on disk, in Hugging Face's form and in NeMo's: names and shapes, read and written a few rows at a time."""
