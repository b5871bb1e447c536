"""What a model says about itself, as data and as a card, and what it may say."""
