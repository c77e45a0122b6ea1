"""The process: who started it, how it is stopped, what it can print."""
