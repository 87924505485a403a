"""The section of a results file of ``flashtile bench io``."""
