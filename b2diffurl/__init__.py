"""B2-DiffuRL: backward progressive training and branch-based sampling for diffusion models (arXiv 2503.11240)."""
