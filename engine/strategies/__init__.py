"""Who holds parameters, gradients and optimizer state."""
