"""How a slide's tiles and the model's state are spread over ranks."""
