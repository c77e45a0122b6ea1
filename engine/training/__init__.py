"""The loop of one run, and what it leaves in its folder."""
