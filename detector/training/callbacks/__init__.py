"""Callbacks of a training: its files, checkpoints, pictures, speed and progress bar."""
