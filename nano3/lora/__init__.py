"""The adapters: how they compute, shard, start and are seen to learn."""
