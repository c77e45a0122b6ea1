"""Tile encoders, aggregators, and the slide model that joins them."""
