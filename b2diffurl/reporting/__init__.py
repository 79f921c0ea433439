"""Showing a run: page, plots, model card, trackers, forecasts."""
