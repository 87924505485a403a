"""``flashtile report``: one HTML page of measured results, and of how the algorithm works."""
