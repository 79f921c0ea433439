"""The mathematics of the method: torch alone, nothing of the package above it."""
