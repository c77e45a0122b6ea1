"""A measurement, and what it is compared with."""
