"""What surrounds attention in a model: rotary embeddings, padding, key/value caches."""
