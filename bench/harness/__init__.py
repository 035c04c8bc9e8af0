"""What every measurement needs: cases, their checks and turns, clocks, ratios, results on disk."""
