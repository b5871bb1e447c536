"""The stages from questions to a scored model, and what is remembered of them."""
