"""Keep and measure predicted rows: units, merging, export, scores. No recipe."""
