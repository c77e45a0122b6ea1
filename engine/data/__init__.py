"""From a manifest row to the uint8 pixels of a bag."""
