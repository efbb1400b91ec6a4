"""Does a training server keep what `tink-train/1` promises? Asks any URL, and knows only the protocol."""
