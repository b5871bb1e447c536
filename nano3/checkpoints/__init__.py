"""What a run leaves on disk to go on from, and that it is whole and the same everywhere."""
