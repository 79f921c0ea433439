"""The mathematics of the method: pure functions of tensors, which import torch and nothing else of the package."""
