"""What is on disk: an experiment's folder, its stages, and their files (table: stage.py)."""
