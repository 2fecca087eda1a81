"""march: a laboratory for transformer architectures under one budget."""
