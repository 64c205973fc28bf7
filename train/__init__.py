"""Phase two: fit estimators for all layers at once, and measure them beside the baselines."""
