"""What an attention call means, in plain Python and torch: no backend, no kernel language."""
