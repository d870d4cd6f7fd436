"""How the detector is computed fast on the machine at hand."""
