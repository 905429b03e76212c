"""Learning curves, open-loop plots and videos."""
