"""How pico, the small model of this repository, came to be."""
