"""The TensorBoard of runs."""
