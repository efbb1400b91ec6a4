"""One run on a GPU: see `measure`."""
