"""Weights of whole detectors, of this project and of others, as a start for a training."""
