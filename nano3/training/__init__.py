"""What happens around the steps of a run: rates, validation, metrics, and when to stop."""
