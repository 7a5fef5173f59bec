"""Measurements of speed, always as ratios side by side in one run."""
