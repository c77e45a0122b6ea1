"""What a slide is labelled with."""
