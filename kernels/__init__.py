"""The two places where every tile of a slide passes: tile preparation and attention pooling."""
