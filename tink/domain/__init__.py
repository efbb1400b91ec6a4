"""What Tink decides, without IO, clock or randomness: ids, requests, events, the fold, lanes, routing."""
