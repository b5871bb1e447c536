"""Slurm: the site's settings, the script of a job, the queue."""
