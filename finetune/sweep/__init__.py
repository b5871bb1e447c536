"""A sweep's space, its book of trials, and what its trials gave. How trials run: finetune/sweep_trials.py."""
