"""Neural language models: layers, heads, dropouts."""
