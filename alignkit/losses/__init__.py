"""Losses, un-reduced: multiply by weights and sum (`weights.weigh`) to get the scalar to minimise."""
