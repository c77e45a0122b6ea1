"""The costs of a kernel: memory, time and error on this machine, and registers and shared memory of any GPU."""
