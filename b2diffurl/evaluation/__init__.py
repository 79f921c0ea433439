"""Measuring a checkpoint: its images of held-out prompts, their rewards and diversity, and the statistics of both."""
