"""The textbook formula; it materialises the scores, and everything else is compared with it."""
