"""Measuring a checkpoint: images, rewards, diversity, statistics."""
