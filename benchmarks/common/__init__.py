"""What every benchmark needs: its page, its clock, and the description of the machine."""
