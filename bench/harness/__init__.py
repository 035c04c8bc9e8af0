"""What every measurement needs: cases, checks, timing, clocks, ratios, result files."""
