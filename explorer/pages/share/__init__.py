"""Share: saved views, reports, runs without their text, and runs from somebody else."""
