"""How encoder activations are kept from growing with K."""
